//! What a `tokenizer.json` says, read beside the library that executes it, and what of it is refused.
//!
//! The library expects sound files. It panics on some others, draws tokens at random where a file says so, and goes on with ids that
//! are not the ones listed.

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokenizers::Tokenizer;

use super::growth::Growth;
use crate::limits::{LONGEST_NORMALIZED, TOKENIZER_ADDED, TOKENIZER_STEPS};
use crate::shown_name;

/// Bytes of a text that every tokenizer has to take.
const SHORT: usize = 64;

/// The parts of the file that are looked at.
#[derive(Deserialize)]
pub(super) struct Outline<'a> {
    #[serde(borrow, default)]
    normalizer: Option<&'a RawValue>,
    #[serde(borrow, default)]
    pre_tokenizer: Option<&'a RawValue>,
    #[serde(borrow, default)]
    post_processor: Option<&'a RawValue>,
    /// Never used, but compiled when the file is loaded.
    #[serde(borrow, default)]
    decoder: Option<&'a RawValue>,
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(borrow)]
    model: Model<'a>,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
}

#[derive(Deserialize)]
struct Model<'a> {
    #[serde(default)]
    dropout: Option<f64>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(borrow, default)]
    merges: Option<&'a RawValue>,
}

/// Two tokens that are merged; older files have them in one text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair([String; 2]),
    Text(String),
}

impl Merge {
    fn second(&self) -> &str {
        match self {
            Merge::Pair([_, second]) => second,
            Merge::Text(text) => text.split(' ').nth(1).unwrap_or_default(),
        }
    }
}

impl<'a> Outline<'a> {
    /// Reads the file's text.
    ///
    /// # Errors
    /// When it is no JSON, or lacks what every tokenizer has.
    pub(super) fn read(text: &'a str) -> Result<Self, String> {
        serde_json::from_str(text).map_err(|error| shown_name(&error.to_string()).into_owned())
    }

    /// How long a text may become.
    ///
    /// # Errors
    /// What of the file cannot be used, whatever the text.
    pub(super) fn check(&self) -> Result<Growth, String> {
        self.ensure_fixed_tokens()?;
        self.ensure_prefixed_merges()?;
        let part = |name: &str, raw: Option<&RawValue>| match raw.map(RawValue::get) {
            None => Ok(Value::Null),
            Some(text) if text.len() > TOKENIZER_STEPS => Err(format!(
                "has a {name} of {} bytes, more than the {TOKENIZER_STEPS} that one may have",
                text.len()
            )),
            Some(text) => serde_json::from_str(text).map_err(|error| format!("has no sound {name}: {error}")),
        };
        part("decoder", self.decoder)?;
        ensure_template(&part("post_processor", self.post_processor)?)?;
        let growth = Growth::of_steps(
            &part("normalizer", self.normalizer)?,
            &part("pre_tokenizer", self.pre_tokenizer)?,
        )?;
        let tokens: f64 = self
            .added_tokens
            .iter()
            .map(|token| growth.of(token.content.len()))
            .sum();
        for (bytes, text) in [
            (growth.of(SHORT), "a text of a few words"),
            (tokens, "its added tokens"),
        ] {
            if bytes > LONGEST_NORMALIZED {
                return Err(format!(
                    "has steps that may make {bytes:.0} bytes of {text}, more than {LONGEST_NORMALIZED:.0}"
                ));
            }
        }
        Ok(growth)
    }

    fn ensure_fixed_tokens(&self) -> Result<(), String> {
        match self.model.dropout.filter(|dropout| *dropout != 0.0) {
            Some(dropout) => Err(format!(
                "says dropout = {dropout}, which draws tokens at random, so that a seed would not give the same picture again: \
                 set it to null"
            )),
            None => Ok(()),
        }
    }

    /// The library cuts the prefix off without looking.
    fn ensure_prefixed_merges(&self) -> Result<(), String> {
        let prefix = self.model.continuing_subword_prefix.as_deref().unwrap_or_default();
        let (Some(merges), false) = (self.model.merges, prefix.is_empty()) else {
            return Ok(());
        };
        let merges: Vec<Merge> =
            serde_json::from_str(merges.get()).map_err(|error| format!("has no sound merges: {error}"))?;
        match merges.iter().find(|merge| !merge.second().starts_with(prefix)) {
            Some(merge) => Err(format!(
                "says continuing_subword_prefix = `{}`, but merges `{}`, which does not begin with it",
                shown_name(prefix),
                shown_name(merge.second())
            )),
            None => Ok(()),
        }
    }

    /// Compares the ids that the file lists with those that its tokens have in the library.
    ///
    /// # Errors
    /// Naming the first token with another one.
    pub(super) fn ensure_listed_ids(&self, tokenizer: &Tokenizer) -> Result<(), String> {
        for Added { id, content } in &self.added_tokens {
            if let Some(found) = tokenizer.token_to_id(content).filter(|found| found != id) {
                return Err(format!(
                    "lists the added token {} as id {id}, but its vocabulary gives it id {found}",
                    shown_name(content)
                ));
            }
        }
        Ok(())
    }
}

/// Checks what a post-processor adds to a text.
fn ensure_template(entry: &Value) -> Result<(), String> {
    if entry["type"] == "Sequence" {
        return entry["processors"]
            .as_array()
            .into_iter()
            .flatten()
            .try_for_each(ensure_template);
    }
    if entry["type"] != "TemplateProcessing" {
        return Ok(());
    }
    let (mut texts, mut added) = (0, 0);
    for piece in entry["single"].as_array().into_iter().flatten() {
        if let Some(name) = piece["SpecialToken"]["id"].as_str() {
            let ids = entry["special_tokens"][name]["ids"].as_array();
            let ids = ids.ok_or_else(|| {
                format!(
                    "has a template with `{}`, which its special_tokens lack",
                    shown_name(name)
                )
            })?;
            added += ids.len();
        } else if piece["Sequence"]["id"] == "B" {
            return Err("has a template for one text with a second text in it".into());
        } else {
            texts += 1;
        }
    }
    if texts > 1 {
        return Err("has a template with the text in it more than once".into());
    }
    ensure_few_added(added)
}

/// Refuses tokenizers that add more tokens to a text than there is room for.
///
/// # Errors
/// With the number.
pub(super) fn ensure_few_added(added: usize) -> Result<(), String> {
    match added > TOKENIZER_ADDED {
        true => Err(format!(
            "adds {added} tokens to every text, more than the {TOKENIZER_ADDED} that it may add"
        )),
        false => Ok(()),
    }
}
