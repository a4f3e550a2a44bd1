//! What a picture is drawn with: a model's files, or random weights of the published sizes.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use flate2::read::GzDecoder;
use l2p_engine::Device;
use l2p_engine::checkpoint::{Checkpoint, ModelPaths, Transformer};
use l2p_engine::device::MemoryTag;
use l2p_engine::layers::{NamedParameter, ParamSource, metas};
use l2p_engine::model::config::{ModelKind, TextConfig, VaeConfig};
use l2p_engine::model::text::TextEncoder;
use l2p_engine::model::vae::VaeDecoder;
use l2p_engine::model::{Denoiser, Precision, Spec};
use l2p_engine::text::PromptTokenizer;

use crate::params::RandomParams;
use crate::published::{self, Model};

/// A model whose parts can be brought to a device.
pub struct Source {
    /// The transformer.
    pub spec: Arc<dyn Spec>,
    /// A latent model's autoencoder.
    pub vae: Option<VaeConfig>,
    text: TextConfig,
    parts: Parts,
    weights: Weights,
}

/// How the weights of blocks are kept.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    /// The transformer's.
    pub trunk: Precision,
    /// The text encoder's.
    pub text: Precision,
}

enum Parts {
    Random { seed: u64 },
    Files(Box<Files>),
}

struct Files {
    paths: ModelPaths,
    transformer: Transformer,
}

impl Source {
    /// Random weights.
    pub fn random(model: &Model, seed: u64, tiny: bool) -> Self {
        Source {
            spec: model.spec.clone(),
            vae: model.vae.clone(),
            text: published::text(tiny.then_some(model.spec.caption_width())),
            parts: Parts::Random { seed },
            weights: Weights::default(),
        }
    }

    /// The same with its weights kept so.
    pub fn kept_in(self, weights: Weights) -> Self {
        Source { weights, ..self }
    }

    /// The text encoder's layers that are run.
    pub fn text_layers(&self) -> usize {
        self.text.layers.saturating_sub(1)
    }

    /// A model's files.
    ///
    /// # Errors
    /// When a part is missing or damaged.
    pub fn files(paths: ModelPaths) -> anyhow::Result<Self> {
        let transformer = paths.open_transformer()?;
        let vae = match transformer.spec.geometry().kind {
            ModelKind::Pixel => None,
            ModelKind::Latent => Some(VaeConfig::read(paths.vae()?)?),
        };
        Ok(Source {
            spec: transformer.spec.clone(),
            vae,
            text: TextConfig::read(paths.text_encoder()?)?,
            parts: Parts::Files(Box::new(Files { paths, transformer })),
            weights: Weights::default(),
        })
    }

    /// Sides of a picture are multiples of this many pixels.
    pub fn size_multiple(&self) -> usize {
        self.spec
            .size_multiple(self.vae.as_ref().map_or(1, VaeConfig::downsampling))
    }

    /// The tokenizer: the model's own; for random weights that of Qwen3.
    ///
    /// # Errors
    /// When it is not found or damaged.
    pub fn tokenizer(&self, given: Option<&Path>) -> anyhow::Result<PromptTokenizer> {
        Ok(match (&self.parts, given) {
            (_, Some(folder)) => PromptTokenizer::open(folder)?,
            (Parts::Files(files), None) => PromptTokenizer::open(files.paths.tokenizer()?)?,
            (Parts::Random { .. }, None) => qwen3()?,
        })
    }

    /// The ids as the text encoder takes them: the small encoder of random weights knows fewer.
    pub fn fit(&self, ids: Vec<u32>) -> Vec<u32> {
        match self.parts {
            Parts::Files(_) => ids,
            Parts::Random { .. } => ids.into_iter().map(|id| id % self.text.vocabulary as u32).collect(),
        }
    }

    /// The text encoder on the device.
    ///
    /// # Errors
    /// When it is missing or damaged, or the device has no room.
    pub fn text(&self, device: &Device) -> anyhow::Result<TextEncoder> {
        let _tag = MemoryTag::Weights.scope();
        let described = TextEncoder::describe(&self.text, "")?;
        let metas: Vec<NamedParameter> = metas(&described).into_iter().cloned().collect();
        let load = |params: &dyn ParamSource| {
            TextEncoder::load(
                &self.weights.text.over_blocks(params, &metas, device)?,
                device,
                &self.text,
            )
        };
        Ok(match &self.parts {
            Parts::Random { seed, .. } => load(&RandomParams::text(*seed, &self.text))?,
            Parts::Files(files) => load(&Checkpoint::open_text_encoder(files.paths.text_encoder()?)?)?,
        })
    }

    /// The transformer on the device.
    ///
    /// # Errors
    /// When it is damaged, or the device has no room.
    pub fn dit(&self, device: &Device) -> anyhow::Result<Box<dyn Denoiser>> {
        let load = |params: &dyn ParamSource| {
            let params = self.weights.trunk.over_blocks(params, &self.spec.metas(), device)?;
            self.spec.load(&params, device, &mut |_, _| Ok(()))
        };
        Ok(match &self.parts {
            Parts::Random { seed, .. } => load(&RandomParams::transformer(*seed, &*self.spec))?,
            Parts::Files(files) => load(&files.transformer.checkpoint)?,
        })
    }

    /// A latent model's decoder on the device.
    ///
    /// # Errors
    /// When it is missing or damaged, or the device has no room.
    pub fn decoder(&self, device: &Device) -> anyhow::Result<Option<VaeDecoder>> {
        let Some(config) = &self.vae else { return Ok(None) };
        let _tag = MemoryTag::Weights.scope();
        Ok(Some(match &self.parts {
            Parts::Random { seed, .. } => VaeDecoder::load(&RandomParams::vae(*seed, config), device, config)?,
            Parts::Files(files) => VaeDecoder::load(&Checkpoint::open_vae(files.paths.vae()?)?, device, config)?,
        }))
    }
}

/// Qwen3's tokenizer, which the fixtures hold packed.
fn qwen3() -> anyhow::Result<PromptTokenizer> {
    const NAME: &str = "tokenizer-qwen3";
    let places: Vec<PathBuf> = match std::env::var_os("L2P_FIXTURES") {
        Some(folder) => vec![folder.into()],
        None => {
            let bundled = std::env::current_exe()
                .ok()
                .and_then(|program| Some(program.parent()?.parent()?.join("fixtures")));
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
            bundled.into_iter().chain([source]).collect()
        }
    };
    let found = places
        .iter()
        .map(|place| place.join(NAME))
        .find(|folder| folder.is_dir());
    let packed = found.with_context(|| {
        let places: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
        format!(
            "there is no {NAME} in {}: name a tokenizer's folder with --tokenizer, or the fixtures' in L2P_FIXTURES",
            places.join(" or ")
        )
    })?;
    let folder = tempfile::tempdir()?;
    let read = |name: &str| {
        let path = packed.join(name);
        std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let mut text = Vec::new();
    GzDecoder::new(&read("tokenizer.json.gz")?[..])
        .read_to_end(&mut text)
        .with_context(|| format!("cannot unpack {}/tokenizer.json.gz", packed.display()))?;
    std::fs::write(folder.path().join("tokenizer.json"), text)?;
    std::fs::write(
        folder.path().join("tokenizer_config.json"),
        read("tokenizer_config.json")?,
    )?;
    Ok(PromptTokenizer::open(folder.path())?)
}
