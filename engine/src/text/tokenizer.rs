//! The tokenizer and its files.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::{PostProcessor, Tokenizer, TruncationDirection};

use super::ChatTemplate;
use crate::error::{Error, Result};

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";

/// Turns prompts into the token ids that the text encoder was trained on.
#[derive(Debug)]
pub struct PromptTokenizer {
    dir: PathBuf,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    max_tokens: usize,
    cut_side: TruncationDirection,
}

/// A prompt's tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptTokens {
    /// The ids, template included; at most as many as the tokenizer allows.
    pub ids: Vec<u32>,
    /// How many tokens did not fit and were cut off.
    pub dropped: usize,
}

impl PromptTokenizer {
    /// The most tokens kept of a prompt, template included, unless [`PromptTokenizer::set_max_tokens`] says otherwise.
    pub const DEFAULT_MAX_TOKENS: usize = 512;

    /// The names of its files, the last of which need not be there.
    pub const FILES: [&str; 3] = [TOKENIZER, CONFIG, TEMPLATE];

    /// Reads `tokenizer.json`, `tokenizer_config.json` and, where it stands beside them, `chat_template.jinja`, which takes
    /// precedence over the template inside the configuration.
    ///
    /// # Errors
    /// Naming the file that is missing or wrong, and what to do about it.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(TOKENIZER);
        let text = read(&path)?;
        let mut tokenizer = Tokenizer::from_bytes(text.as_bytes())
            .map_err(|error| Error::file(&path, format!("not a tokenizer that can be used: {error}")))?;
        // The file may ask for both; what is cut is decided here, and nothing is padded.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| Error::file(&path, error.to_string()))?;
        let path = dir.join(CONFIG);
        let config: Value = serde_json::from_str(&read(&path)?)
            .map_err(|error| Error::file(&path, format!("not valid JSON: {error}")))?;
        expect_same_tokens(&tokenizer, &config).map_err(|reason| Error::file(&path, reason))?;
        let (path, source) = read_template(dir, &config)?;
        let template = ChatTemplate::compile(&source, special_tokens(&config))
            .map_err(|reason| Error::file(path, format!("the chat template cannot be used: {reason}")))?;
        Ok(PromptTokenizer {
            dir: dir.to_owned(),
            tokenizer,
            template,
            max_tokens: Self::DEFAULT_MAX_TOKENS,
            cut_side: cut_side(&config),
        })
    }

    /// Keeps at most `max_tokens` tokens of a prompt.
    ///
    /// # Errors
    /// When that leaves no room for a prompt.
    pub fn set_max_tokens(&mut self, max_tokens: usize) -> Result<()> {
        let added = self.added_tokens();
        if max_tokens <= added {
            return Err(Error::invalid(format!(
                "a prompt cannot be cut to {max_tokens} tokens; it needs at least {}",
                added + 1
            )));
        }
        self.max_tokens = max_tokens;
        Ok(())
    }

    /// Tokens that the tokenizer itself adds to every text.
    fn added_tokens(&self) -> usize {
        self.tokenizer
            .get_post_processor()
            .map_or(0, |processor| processor.added_tokens(false))
    }

    /// The text that is tokenized for `prompt`: the chat template around it.
    ///
    /// # Errors
    /// When the template refuses it.
    pub fn render(&self, prompt: &str) -> Result<String> {
        self.template
            .render(prompt)
            .map_err(|reason| Error::file(&self.dir, format!("the chat template failed: {reason}")))
    }

    /// The token ids of `prompt`.
    ///
    /// # Errors
    /// When the template refuses it, or the tokenizer has no token for a part of it.
    pub fn encode(&self, prompt: &str) -> Result<PromptTokens> {
        let text = self.render(prompt)?;
        let fail = |error: tokenizers::Error| {
            Error::file(self.dir.join(TOKENIZER), format!("cannot tokenize the prompt: {error}"))
        };
        let mut encoding = self.tokenizer.encode_fast(text, false).map_err(fail)?;
        let room = self.max_tokens.saturating_sub(self.added_tokens());
        let dropped = encoding.len().saturating_sub(room);
        encoding.truncate(room, 0, self.cut_side);
        let encoding = self.tokenizer.post_process(encoding, None, true).map_err(fail)?;
        Ok(PromptTokens {
            ids: encoding.get_ids().to_vec(),
            dropped,
        })
    }
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| {
        if source.kind() == std::io::ErrorKind::NotFound {
            return Error::file(
                path,
                "no such file; a tokenizer folder holds tokenizer.json and tokenizer_config.json, \
                 as the `tokenizer` folder of a published model does",
            );
        }
        Error::io(path, source)
    })
}

/// The template and the file it stands in.
fn read_template(dir: &Path, config: &Value) -> Result<(PathBuf, String)> {
    let path = dir.join(TEMPLATE);
    if path.exists() {
        let source = read(&path)?;
        return Ok((path, source));
    }
    let path = dir.join(CONFIG);
    match config.get("chat_template").and_then(template_text) {
        Some(source) => Ok((path, source.to_owned())),
        None => Err(Error::file(
            path,
            format!("has no chat_template, and there is no {TEMPLATE} beside it; copy that file of the same model"),
        )),
    }
}

/// A template is a string, or the one named `default` in a list.
fn template_text(entry: &Value) -> Option<&str> {
    let default = |item: &&Value| item["name"] == "default";
    match entry {
        Value::Array(templates) => templates.iter().find(default)?["template"].as_str(),
        _ => entry.as_str(),
    }
}

/// The entries `bos_token`, `eos_token`, … of the configuration: a string, or an object with `content`.
fn special_tokens(config: &Value) -> Vec<(String, String)> {
    let entries = config.as_object().into_iter().flatten();
    entries
        .filter(|(name, _)| name.ends_with("_token"))
        .filter_map(|(name, value)| Some((name.clone(), value.as_str().or(value["content"].as_str())?.to_owned())))
        .collect()
}

fn cut_side(config: &Value) -> TruncationDirection {
    match config["truncation_side"].as_str() {
        Some("left") => TruncationDirection::Left,
        _ => TruncationDirection::Right,
    }
}

/// Both files list the added tokens. Files of two models side by side would give wrong ids without a word.
fn expect_same_tokens(tokenizer: &Tokenizer, config: &Value) -> std::result::Result<(), String> {
    let listed = config["added_tokens_decoder"].as_object().into_iter().flatten();
    for (id, token) in listed {
        let text = token["content"].as_str().unwrap_or_default();
        let found = tokenizer.token_to_id(text);
        if found.map(|id| id.to_string()).as_ref() != Some(id) {
            let found = found.map_or("does not know it".to_owned(), |found| format!("gives it id {found}"));
            return Err(format!(
                "lists the token {text} as id {id}, but {TOKENIZER} {found}; the files are of two different models"
            ));
        }
    }
    Ok(())
}
