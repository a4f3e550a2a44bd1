//! The tokenizer and its files.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokenizers::{PostProcessor, Tokenizer, TruncationDirection};

use super::contained::{Failure, contained};
use super::growth::Growth;
use super::outline::{Outline, ensure_few_added};
use super::{ChatTemplate, Conversation};
use crate::error::{Error, Result};
use crate::files;
use crate::limits::{Budget, LONGEST_NORMALIZED, LONGEST_PROMPT, PROMPT_SECONDS, TOKENIZER_SECONDS};
use crate::shown_name;

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";

/// Turns prompts into the token ids that the text encoder was trained on.
///
/// The library behind it is meant for sound files. It is called on a thread of its own, with a bound on time and on what it may make
/// of a text; its panics become errors that name the file.
#[derive(Debug)]
pub struct PromptTokenizer {
    dir: PathBuf,
    tokenizer: Arc<Tokenizer>,
    growth: Growth,
    template: ChatTemplate,
    template_file: PathBuf,
    max_tokens: usize,
    cut_side: TruncationDirection,
    /// The `eos_token` of its configuration.
    end_token: Option<String>,
    /// Its `pad_token`, if pads are to stand at the end.
    pad_token: Option<String>,
    /// A text took too long, and whatever works on it may still go on.
    given_up: AtomicBool,
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
        let text = read(&path, Budget::TOKENIZER)?;
        let (tokenizer, growth) =
            load(text).map_err(|reason| Error::file(&path, format!("not a tokenizer that can be used: {reason}")))?;
        let path = dir.join(CONFIG);
        let config: Value = serde_json::from_str(&read(&path, Budget::TOKENIZER)?)
            .map_err(|error| Error::file(&path, format!("not valid JSON: {error}")))?;
        ensure_same_tokens(&tokenizer, &config).map_err(|reason| Error::file(&path, reason))?;
        let (template_file, source) = read_template(dir, &config)?;
        let special = special_tokens(&config);
        let end_token = special.iter().find(|(name, _)| name == "eos_token");
        let end_token = end_token.map(|(_, token)| token.clone());
        let pad_token = special.iter().find(|(name, _)| name == "pad_token");
        let pad_token = pad_token.filter(|_| config["padding_side"].as_str() != Some("left"));
        let pad_token = pad_token.map(|(_, token)| token.clone());
        let template = ChatTemplate::compile(&source, special)
            .map_err(|reason| Error::file(&template_file, format!("the chat template cannot be used: {reason}")))?;
        Ok(PromptTokenizer {
            dir: dir.to_owned(),
            tokenizer: Arc::new(tokenizer),
            growth,
            template,
            template_file,
            max_tokens: Self::DEFAULT_MAX_TOKENS,
            cut_side: cut_side(&config),
            end_token,
            pad_token,
            given_up: AtomicBool::new(false),
        })
    }

    /// Keeps at most `max_tokens` tokens of a prompt.
    ///
    /// # Errors
    /// When that leaves no room for a prompt.
    pub fn set_max_tokens(&mut self, max_tokens: usize) -> Result<()> {
        let added = added_tokens(&self.tokenizer);
        if max_tokens <= added {
            return Err(Error::invalid(format!(
                "a prompt cannot be cut to {max_tokens} tokens; it needs at least {}",
                added + 1
            )));
        }
        self.max_tokens = max_tokens;
        Ok(())
    }

    /// The text that is tokenized for `prompt`: the chat template around it.
    ///
    /// # Errors
    /// When it is too long, or the template refuses it.
    pub fn render(&self, prompt: &str) -> Result<String> {
        self.ensure_short(prompt.len())?;
        self.template
            .render(prompt)
            .map_err(|reason| self.template_failed(&reason))
    }

    fn ensure_short(&self, bytes: usize) -> Result<()> {
        match bytes > LONGEST_PROMPT {
            true => Err(self.refusal(format!(
                "the prompt has {bytes} bytes, more than the {LONGEST_PROMPT} that one may have"
            ))),
            false => Ok(()),
        }
    }

    fn template_failed(&self, reason: &str) -> Error {
        Error::file(&self.template_file, format!("the chat template failed: {reason}"))
    }

    /// The token ids of a conversation, up to where the answer begins. Nothing is cut, whatever the tokenizer's limit.
    ///
    /// # Errors
    /// As [`PromptTokenizer::encode`].
    pub fn encode_conversation(&self, conversation: &Conversation) -> Result<Vec<u32>> {
        let system = conversation.system.as_ref().map_or(0, String::len);
        self.ensure_short(system.saturating_add(conversation.user.len()))?;
        let text = self.template.render_conversation(conversation);
        let text = text.map_err(|reason| self.template_failed(&reason))?;
        Ok(self.tokenized(text, usize::MAX)?.ids)
    }

    /// The library's own.
    pub(super) fn library(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Its file, for messages.
    pub(super) fn file(&self) -> PathBuf {
        self.dir.join(TOKENIZER)
    }

    /// The `eos_token` of its configuration.
    pub(super) fn end_token(&self) -> Option<&str> {
        self.end_token.as_deref()
    }

    /// The token ids of `prompt`.
    ///
    /// # Errors
    /// An [`Error::File`] when the prompt is too long, the template refuses it, or the tokenizer has no token for a part of it.
    /// When the tokenizer takes too long, [`Error::Invalid`], and from then on for every prompt.
    pub fn encode(&self, prompt: &str) -> Result<PromptTokens> {
        self.tokenized(self.render(prompt)?, self.room())
    }

    /// The same without thinking aloud.
    ///
    /// # Errors
    /// As [`PromptTokenizer::encode`].
    pub fn encode_thoughtless(&self, prompt: &str) -> Result<PromptTokens> {
        self.ensure_short(prompt.len())?;
        let conversation = Conversation {
            system: None,
            user: prompt.to_owned(),
        };
        let text = self.template.render_conversation(&conversation);
        self.tokenized(text.map_err(|reason| self.template_failed(&reason))?, self.room())
    }

    /// The id of the token that fills prompts up at their end.
    ///
    /// # Errors
    /// When the configuration names none, or wants it at the beginning.
    pub fn pad_id(&self) -> Result<u32> {
        let id = self
            .pad_token
            .as_deref()
            .and_then(|token| self.tokenizer.token_to_id(token));
        id.ok_or_else(|| {
            Error::file(
                self.dir.join(CONFIG),
                "names no pad_token that its tokenizer knows and that stands on the right, with which this transformer's prompts are \
                 filled up",
            )
        })
    }

    /// The ids of a text, of which `room` are kept before the tokenizer adds its own.
    fn tokenized(&self, text: String, room: usize) -> Result<PromptTokens> {
        let most = self.growth.of(text.len());
        if most > LONGEST_NORMALIZED {
            return Err(self.refusal(format!(
                "it may make {most:.0} bytes of the prompt's {}, more than {LONGEST_NORMALIZED:.0}",
                text.len()
            )));
        }
        if self.given_up.load(Ordering::Relaxed) {
            return Err(self.gave_up("it took too long for another one"));
        }
        let (tokenizer, side) = (self.tokenizer.clone(), self.cut_side);
        match contained(PROMPT_TIME, move || tokens(&tokenizer, text, room, side)) {
            Ok(outcome) => outcome.map_err(|error| self.refusal(shown_name(&error.to_string()))),
            Err(failure @ Failure::TooLong(_)) => {
                self.given_up.store(true, Ordering::Relaxed);
                Err(self.gave_up(&failure.reason()))
            }
            Err(failure) => Err(self.refusal(failure.reason())),
        }
    }

    /// Tokens of the text itself that are kept.
    fn room(&self) -> usize {
        self.max_tokens.saturating_sub(added_tokens(&self.tokenizer))
    }

    /// The tokenizer does not take a prompt.
    fn refusal(&self, reason: impl std::fmt::Display) -> Error {
        Error::file(
            self.dir.join(TOKENIZER),
            format!("cannot tokenize the prompt: {reason}"),
        )
    }

    fn gave_up(&self, reason: &str) -> Error {
        let path = self.dir.join(TOKENIZER);
        Error::invalid(format!("{}: cannot tokenize the prompt: {reason}", path.display()))
    }
}

const PROMPT_TIME: Duration = Duration::from_secs(PROMPT_SECONDS);
const LOAD_TIME: Duration = Duration::from_secs(TOKENIZER_SECONDS);

/// Tokens that the tokenizer itself adds to every text.
fn added_tokens(tokenizer: &Tokenizer) -> usize {
    let processor = tokenizer.get_post_processor();
    processor.map_or(0, |processor| processor.added_tokens(false))
}

/// The tokenizer that `text` describes, and how long it may make a prompt.
fn load(text: String) -> std::result::Result<(Tokenizer, Growth), String> {
    let loaded = contained(LOAD_TIME, move || {
        let outline = Outline::read(&text)?;
        let growth = outline.check()?;
        let mut tokenizer = Tokenizer::from_bytes(text.as_bytes()).map_err(|error| error.to_string())?;
        // The file may ask for both; what is cut is decided here, and nothing is padded.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
        outline.ensure_listed_ids(&tokenizer)?;
        ensure_few_added(added_tokens(&tokenizer))?;
        Ok((tokenizer, growth))
    });
    let (tokenizer, growth) = match loaded {
        Ok(outcome) => outcome.map_err(|reason: String| shown_name(&reason).into_owned())?,
        Err(failure) => return Err(failure.reason()),
    };
    // Some faults show only when a text is tokenized; whether it has tokens for this one does not matter.
    let tried = contained(PROMPT_TIME, move || {
        let _ = tokens(&tokenizer, "a".into(), 1, TruncationDirection::Right);
        tokenizer
    });
    Ok((tried.map_err(|failure| failure.reason())?, growth))
}

/// The ids of `text`, of which `room` are kept before the tokenizer adds its own.
fn tokens(
    tokenizer: &Tokenizer,
    text: String,
    room: usize,
    cut_side: TruncationDirection,
) -> std::result::Result<PromptTokens, tokenizers::Error> {
    let mut encoding = tokenizer.encode_fast(text, false)?;
    let dropped = encoding.len().saturating_sub(room);
    encoding.truncate(room, 0, cut_side);
    let encoding = tokenizer.post_process(encoding, None, true)?;
    Ok(PromptTokens {
        ids: encoding.get_ids().to_vec(),
        dropped,
    })
}

fn read(path: &Path, budget: Budget) -> Result<String> {
    files::read_text(path, budget).map_err(|error| match error {
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Error::file(
            path,
            "no such file; a tokenizer folder holds tokenizer.json and tokenizer_config.json, \
             as the `tokenizer` folder of a published model does",
        ),
        error => error,
    })
}

/// The template and the file it stands in.
fn read_template(dir: &Path, config: &Value) -> Result<(PathBuf, String)> {
    let path = dir.join(TEMPLATE);
    if path.exists() {
        let source = read(&path, Budget::CHAT_TEMPLATE)?;
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
fn ensure_same_tokens(tokenizer: &Tokenizer, config: &Value) -> std::result::Result<(), String> {
    let listed = config["added_tokens_decoder"].as_object().into_iter().flatten();
    for (id, token) in listed {
        let text = token["content"].as_str().unwrap_or_default();
        let found = tokenizer.token_to_id(text);
        if found.map(|id| id.to_string()).as_ref() != Some(id) {
            let found = found.map_or("does not know it".to_owned(), |found| format!("gives it id {found}"));
            let (text, id) = (shown_name(text), shown_name(id));
            return Err(format!(
                "lists the token {text} as id {id}, but {TOKENIZER} {found}; the files are of two different models"
            ));
        }
    }
    Ok(())
}
