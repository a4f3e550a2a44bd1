//! Where the parts of a model are: a diffusers folder, a folder with an `l2p.json`, a transformer's folder, or a bare file.

use std::path::{Path, PathBuf};

use super::audit::{Transformer, is_whole};
use super::hub;
use super::manifest::{Defaults, MANIFEST, Manifest};
use super::set::Checkpoint;
use super::shards::INDEX_SUFFIX;
use crate::error::{Error, Result};
use crate::model::config::{ModelKind, SchedulerConfig};
use crate::model::family::TransformerConfig;
use crate::model::objective::Trained;

/// Bases of bases that are followed before a circle is assumed.
const LONGEST_CHAIN: usize = 8;

/// Parts that the user names; they win over what the model says.
#[derive(Clone, Debug, Default)]
pub struct PathOverrides {
    /// The model that a delta lies over.
    pub base: Option<PathBuf>,
    /// The text encoder's folder or file.
    pub text_encoder: Option<PathBuf>,
    /// The tokenizer's folder or file.
    pub tokenizer: Option<PathBuf>,
    /// The VAE's folder or file.
    pub vae: Option<PathBuf>,
}

/// How a model lies on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Container {
    /// `model_index.json` and a folder for each part.
    Diffusers,
    /// An `l2p.json`.
    Manifest,
    /// The transformer's own folder.
    Folder,
    /// One file, or an index of shards.
    File,
}

/// Where the parts of a model are.
#[derive(Clone, Debug)]
pub struct ModelPaths {
    /// What was named; of a model in the Hugging Face hub's cache, the snapshot in use.
    pub path: PathBuf,
    /// How it lies on disk.
    pub container: Container,
    /// The transformer's files or folder.
    pub transformer: Vec<PathBuf>,
    /// The transformer's `config.json`, where there is one.
    pub config: Option<PathBuf>,
    /// The model that the transformer, a delta, lies over.
    pub base: Option<Box<ModelPaths>>,
    /// The text encoder's folder or file.
    pub text_encoder: Option<PathBuf>,
    /// The tokenizer's folder or file.
    pub tokenizer: Option<PathBuf>,
    /// The VAE's folder or file.
    pub vae: Option<PathBuf>,
    /// The scheduler's folder.
    pub scheduler: Option<PathBuf>,
    /// What a manifest says that the model was trained for; see [`ModelPaths::trained`].
    pub objective: Option<Trained>,
    /// What to draw with when the user does not say.
    pub defaults: Defaults,
    /// What the manifest says the model is.
    pub kind: Option<ModelKind>,
}

impl ModelPaths {
    /// Finds the parts of the model at `path`. Parts that are neither named nor found stay open until they are asked for.
    ///
    /// # Errors
    /// When there is no model at `path`, its manifest is wrong, or a part that is named does not exist.
    pub fn resolve(path: &Path, overrides: &PathOverrides) -> Result<Self> {
        let mut paths = Self::find(path, LONGEST_CHAIN)?;
        if let Some(base) = &overrides.base {
            paths.set_base(Self::find(base, LONGEST_CHAIN)?);
        }
        for (part, given, folder) in [
            (&mut paths.text_encoder, &overrides.text_encoder, "text_encoder"),
            (&mut paths.tokenizer, &overrides.tokenizer, "tokenizer"),
            (&mut paths.vae, &overrides.vae, "vae"),
        ] {
            if let Some(given) = given {
                *part = Some(hub::part(given, folder)?);
            }
        }
        for part in [&paths.text_encoder, &paths.tokenizer, &paths.vae, &paths.scheduler]
            .into_iter()
            .flatten()
        {
            part.metadata().map_err(|error| Error::io(part, error))?;
        }
        Ok(paths)
    }

    fn find(path: &Path, chain: usize) -> Result<Self> {
        path.metadata().map_err(|error| Error::io(path, error))?;
        let path = &hub::snapshot(path)?;
        if let Some(manifest) = manifest_for(path)? {
            return Self::from_manifest(path, &manifest, chain);
        }
        if !path.is_dir() {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let is_index = name.ends_with(INDEX_SUFFIX);
            let config = beside(path, "config.json");
            let config = config.filter(|config| is_index || TransformerConfig::describes(config));
            return Ok(Self::bare(path, Container::File, path.into(), config));
        }
        let transformer = path.join("transformer");
        if path.join("model_index.json").exists() || transformer.is_dir() {
            if !transformer.is_dir() {
                return Err(Error::file(path, "has a model_index.json but no folder `transformer`"));
            }
            let part = |name: &str| Some(path.join(name)).filter(|part| part.is_dir());
            let config = Some(transformer.join("config.json")).filter(|config| config.exists());
            return Ok(ModelPaths {
                text_encoder: part("text_encoder"),
                tokenizer: part("tokenizer"),
                vae: part("vae"),
                scheduler: part("scheduler"),
                ..Self::bare(path, Container::Diffusers, transformer, config)
            });
        }
        let config = Some(path.join("config.json")).filter(|config| config.exists());
        Ok(Self::bare(path, Container::Folder, path.into(), config))
    }

    fn bare(path: &Path, container: Container, transformer: PathBuf, config: Option<PathBuf>) -> Self {
        ModelPaths {
            path: path.into(),
            container,
            transformer: vec![transformer],
            config,
            base: None,
            text_encoder: None,
            tokenizer: None,
            vae: None,
            scheduler: None,
            objective: None,
            defaults: Defaults::default(),
            kind: None,
        }
    }

    fn from_manifest(path: &Path, manifest_path: &Path, chain: usize) -> Result<Self> {
        let manifest = Manifest::read(manifest_path)?;
        let Some(chain) = chain.checked_sub(1) else {
            return Err(Error::file(manifest_path, "is its own base, through others"));
        };
        let transformer = manifest.transformer.as_slice();
        let named = [
            &manifest.base,
            &manifest.text_encoder,
            &manifest.tokenizer,
            &manifest.vae,
            &manifest.scheduler,
        ];
        for part in transformer.iter().chain(named.into_iter().flatten()) {
            if !part.exists() {
                return Err(Error::file(
                    manifest_path,
                    format!("names {}, which is not there", part.display()),
                ));
            }
        }
        let part = |part: &Option<PathBuf>, name: &str| part.as_deref().map(|part| hub::part(part, name)).transpose();
        let folder_config = |folder: &PathBuf| Some(folder.join("config.json")).filter(|config| config.exists());
        let config = transformer
            .first()
            .filter(|_| transformer.len() == 1)
            .and_then(folder_config);
        let mut paths = ModelPaths {
            transformer: transformer.to_vec(),
            config,
            text_encoder: part(&manifest.text_encoder, "text_encoder")?,
            tokenizer: part(&manifest.tokenizer, "tokenizer")?,
            vae: part(&manifest.vae, "vae")?,
            scheduler: part(&manifest.scheduler, "scheduler")?,
            objective: manifest.objective,
            defaults: manifest.defaults,
            kind: manifest.kind,
            ..Self::bare(path, Container::Manifest, PathBuf::new(), None)
        };
        if let Some(base) = &manifest.base {
            paths.set_base(Self::find(base, chain)?);
        }
        Ok(paths)
    }

    /// Lays the transformer over `base`, and takes from there the parts that have no place yet.
    fn set_base(&mut self, base: ModelPaths) {
        if self.objective.is_none() && self.scheduler.is_none() {
            self.objective.clone_from(&base.objective);
        }
        let parts = [
            (&mut self.text_encoder, &base.text_encoder),
            (&mut self.tokenizer, &base.tokenizer),
            (&mut self.vae, &base.vae),
            (&mut self.scheduler, &base.scheduler),
        ];
        for (mine, bases) in parts {
            if mine.is_none() {
                mine.clone_from(bases);
            }
        }
        self.base = Some(Box::new(base));
    }

    /// The text encoder's folder or file.
    ///
    /// # Errors
    /// Saying how to name it, when there is none.
    pub fn text_encoder(&self) -> Result<&Path> {
        self.part(&self.text_encoder, "text encoder", "--text-encoder DIR|FILE")
    }

    /// The tokenizer's folder or file.
    ///
    /// # Errors
    /// Saying how to name it, when there is none.
    pub fn tokenizer(&self) -> Result<&Path> {
        self.part(&self.tokenizer, "tokenizer", "--tokenizer DIR")
    }

    /// The VAE's folder or file.
    ///
    /// # Errors
    /// Saying how to name it, when there is none.
    pub fn vae(&self) -> Result<&Path> {
        self.part(&self.vae, "VAE, which a latent model needs", "--vae DIR|FILE")
    }

    fn part<'a>(&self, part: &'a Option<PathBuf>, what: &str, option: &str) -> Result<&'a Path> {
        part.as_deref().ok_or_else(|| {
            let reason =
                format!("comes without a {what}: name one with {option}, or in an {MANIFEST} beside the model");
            Error::file(&self.path, reason)
        })
    }

    /// The schedule's settings, where the model has some.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn scheduler(&self) -> Result<Option<SchedulerConfig>> {
        self.scheduler.as_deref().map(SchedulerConfig::read).transpose()
    }

    /// What the model was trained for: as its manifest says, or else its scheduler; flow matching where neither does.
    ///
    /// # Errors
    /// As [`ModelPaths::scheduler`].
    pub fn trained(&self) -> Result<Trained> {
        match &self.objective {
            Some(trained) => Ok(trained.clone()),
            None => Ok(self.scheduler()?.map(|scheduler| scheduler.trained).unwrap_or_default()),
        }
    }

    /// The transformer's own tensors, without the base's.
    ///
    /// # Errors
    /// As [`Checkpoint::open_transformer`].
    pub fn open_own_tensors(&self) -> Result<Checkpoint> {
        Checkpoint::open_transformer_files(&self.transformer)
    }

    /// The transformer's tensors, laid over the base where there is one and they are no whole model by themselves.
    ///
    /// # Errors
    /// As [`Checkpoint::open_transformer`] and [`Checkpoint::over`].
    pub fn open_tensors(&self) -> Result<Checkpoint> {
        let own = self.open_own_tensors()?;
        match &self.base {
            Some(base) if !is_whole(&own) => own.over(base.open_tensors()?),
            _ => Ok(own),
        }
    }

    /// The transformer's `config.json`, or the base's as far as it holds for a model made from it.
    ///
    /// # Errors
    /// When it cannot be read or describes another kind of transformer.
    pub fn transformer_config(&self) -> Result<Option<TransformerConfig>> {
        match (&self.config, &self.base) {
            // Beside a file may stand the configuration of the model that it was made from.
            (Some(config), _) if self.container == Container::File => {
                Ok(Some(TransformerConfig::read(config)?.trunk_only()))
            }
            (Some(config), _) => TransformerConfig::read(config).map(Some),
            (None, Some(base)) => Ok(base.transformer_config()?.map(TransformerConfig::trunk_only)),
            (None, None) => Ok(None),
        }
    }

    /// The whole transformer, checked.
    ///
    /// # Errors
    /// As [`ModelPaths::open_tensors`] and [`Transformer::new`], and when the manifest says it is of another kind.
    pub fn open_transformer(&self) -> Result<Transformer> {
        let transformer = Transformer::new(self.open_tensors()?, self.transformer_config()?.as_ref())?;
        let found = transformer.spec.geometry().kind;
        match self.kind {
            Some(kind) if kind != found => Err(Error::file(
                &self.path,
                format!("is said to be a {kind} model, but its tensors are those of a {found} one"),
            )),
            _ => Ok(transformer),
        }
    }
}

/// The manifest that stands for `path`: itself, the one in the folder, or one beside a file that names the file.
fn manifest_for(path: &Path) -> Result<Option<PathBuf>> {
    if path.is_dir() {
        return Ok(Some(path.join(MANIFEST)).filter(|manifest| manifest.exists()));
    }
    if path.file_name().is_some_and(|name| name == MANIFEST) {
        return Ok(Some(path.into()));
    }
    let Some(manifest) = beside(path, MANIFEST) else {
        return Ok(None);
    };
    let transformer = Manifest::read(&manifest)?.transformer;
    let names_it = transformer
        .as_slice()
        .iter()
        .any(|part| part.file_name() == path.file_name());
    Ok(names_it.then_some(manifest))
}

/// The file of this name in the folder of `path`, if there is one.
fn beside(path: &Path, name: &str) -> Option<PathBuf> {
    Some(path.parent()?.join(name)).filter(|file| file.exists())
}
