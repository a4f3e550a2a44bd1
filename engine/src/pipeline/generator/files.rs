//! A source's text encoder, looked at as a language model.

use std::path::Path;

use serde::Deserialize;

use crate::checkpoint::{Checkpoint, ModelPaths, open_text_encoder};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::files;
use crate::layers::metas;
use crate::limits::Budget;
use crate::model::DeviceLimits;
use crate::model::config::TextConfig;
use crate::model::language::LanguageModel;

/// Parameters of the smallest language models that write usable text. Encoders with fewer were made for captions.
const FEWEST_PARAMETERS: u64 = 100_000_000;

/// What an encoder's folder may say of the tokens that end a text.
const GENERATION_CONFIG: &str = "generation_config.json";

/// The most tokens that end a text.
const MOST_ENDS: usize = 64;

/// A text encoder's files, opened and checked; its weights are not loaded.
#[derive(Debug)]
pub struct LanguageFiles<'a> {
    paths: &'a ModelPaths,
    config: TextConfig,
    checkpoint: Checkpoint,
    ends: Vec<u32>,
}

/// The entry of a `generation_config.json` that is used.
#[derive(Deserialize)]
struct GenerationConfig {
    eos_token_id: Option<Tokens>,
}

/// One token or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum Tokens {
    One(u32),
    Several(Vec<u32>),
}

impl<'a> LanguageFiles<'a> {
    /// Finds the text encoder and tokenizer of a source.
    ///
    /// # Errors
    /// When the encoder is no language model, with the way out; saying how to name a part that is missing, or what is damaged or cannot run
    /// on the device.
    pub fn open(paths: &'a ModelPaths, device: &Device) -> Result<Self> {
        LanguageFiles::find(paths, device)?.map_err(|reason| {
            let way_out = "name a source whose encoder is one, as Qwen3-4B in Z-Image is, or let something else write";
            Error::invalid(format!("{reason}; {way_out}"))
        })
    }

    /// As [`LanguageFiles::open`], where an encoder that is no language model is no error: then the answer is why it is none.
    ///
    /// # Errors
    /// Saying how to name a part that is missing, or what is damaged or cannot run on the device.
    pub fn find(paths: &'a ModelPaths, device: &Device) -> Result<std::result::Result<Self, String>> {
        let folder = paths.text_encoder()?;
        paths.tokenizer()?;
        let (config, checkpoint) = open_text_encoder(folder)?;
        config.ensure_runs_on(device)?;
        let ends = ends(folder)?;
        let parameters = parameters(&config)?;
        if parameters < FEWEST_PARAMETERS {
            return Ok(Err(format!(
                "{}: this text encoder is no language model: it has {:.1} million parameters, made for captions",
                folder.display(),
                parameters as f64 / 1e6
            )));
        }
        Ok(Ok(LanguageFiles {
            paths,
            config,
            checkpoint,
            ends,
        }))
    }

    /// The model's sizes.
    pub fn config(&self) -> &TextConfig {
        &self.config
    }

    /// The weights.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The tokenizer's folder.
    pub(super) fn tokenizer(&self) -> &Path {
        self.paths.tokenizer().expect("it was there when this was opened")
    }

    /// Tokens at which texts end, as the encoder's folder says.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }
}

/// Parameters of a whole model of these sizes.
fn parameters(config: &TextConfig) -> Result<u64> {
    let described = LanguageModel::describe(config, "", false)?;
    Ok(metas(&described).iter().map(|meta| meta.elements() as u64).sum())
}

/// The tokens that end a text, as a `generation_config.json` in the folder says; none where there is no such file.
///
/// # Errors
/// When the file cannot be read or says something else there.
pub(super) fn ends(folder: &Path) -> Result<Vec<u32>> {
    let path = folder.join(GENERATION_CONFIG);
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let config: GenerationConfig = files::read_json(&path, Budget::CONFIG)?;
    let ends = match config.eos_token_id {
        None => Vec::new(),
        Some(Tokens::One(token)) => vec![token],
        Some(Tokens::Several(tokens)) => tokens,
    };
    match ends.len() > MOST_ENDS {
        true => Err(Error::file(
            path,
            format!("names {} tokens that end a text, more than {MOST_ENDS}", ends.len()),
        )),
        false => Ok(ends),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_one_or_several_or_none() {
        let folder = tempfile::tempdir().unwrap();
        assert!(ends(folder.path()).unwrap().is_empty());
        let read = |text: &str| {
            std::fs::write(folder.path().join(GENERATION_CONFIG), text).unwrap();
            ends(folder.path())
        };
        assert_eq!(read(r#"{"eos_token_id": 7}"#).unwrap(), [7]);
        assert_eq!(read(r#"{"eos_token_id": [7, 8], "top_k": 20}"#).unwrap(), [7, 8]);
        assert!(read("{}").unwrap().is_empty());
        for bad in [
            r#"{"eos_token_id": -1}"#,
            r#"{"eos_token_id": "x"}"#,
            "[",
            r#"{"eos_token_id": [1.5]}"#,
        ] {
            let message = read(bad).unwrap_err().to_string();
            assert!(message.contains(GENERATION_CONFIG), "{message}");
        }
        let many = format!("{{\"eos_token_id\": {:?}}}", vec![1; 65]);
        assert!(read(&many).unwrap_err().to_string().contains("65 tokens"));
    }
}
