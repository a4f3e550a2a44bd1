//! What the factory asks of a language model, and what answers.
//!
//! A stage makes [`Request`]s and hands many of them at once to a [`LanguageModel`], which answers in any order. How a model is asked
//! (over HTTP, on a device, by a grammar) is its own matter; what an answer is worth is the stage's. Nothing here trusts an answer:
//! it is text of unknown content until a stage has read it.

pub mod endpoint;
mod kept;
pub mod own;
pub mod writer;

use std::ops::RangeInclusive;

use clap::ValueEnum;
pub use kept::Kept;
use serde::{Deserialize, Serialize};

/// A language that prompts are written in.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Language {
    /// English
    En,
    /// Chinese, in simplified characters
    Zh,
}

impl Language {
    /// Its code, as files and flags have it.
    pub fn code(self) -> &'static str {
        match self {
            Language::En => "en",
            Language::Zh => "zh",
        }
    }

    /// Its name in English, for people and models.
    pub fn name(self) -> &'static str {
        match self {
            Language::En => "English",
            Language::Zh => "Chinese",
        }
    }
}

/// What the text of an answer has to be. A model that can only produce what fits a grammar takes it from here; one that cannot is told
/// the same in the request's words, so that a stage has to read every answer with care either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// A JSON list of texts, and nothing around it.
    Texts {
        /// How many.
        count: usize,
    },
    /// `{"is_valid": true, "reason": "…"}` with exactly these keys in this order, and nothing around it.
    Verdict,
}

impl Shape {
    /// The JSON schema of such an answer.
    pub fn schema(self) -> serde_json::Value {
        match self {
            Shape::Texts { count } => serde_json::json!({
                "type": "array", "items": {"type": "string"}, "minItems": count, "maxItems": count,
            }),
            Shape::Verdict => serde_json::json!({
                "type": "object",
                "properties": {"is_valid": {"type": "boolean"}, "reason": {"type": "string"}},
                "required": ["is_valid", "reason"],
                "additionalProperties": false,
            }),
        }
    }
}

/// A thing that a prompt is to show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Its name in English, from the taxonomy.
    pub name: String,
    /// Its name in the language of the prompt.
    pub shown: String,
}

/// What a request is about. Its words say the same; this is for a writer that reads no words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// A prompt for each subject, in their order.
    Prompts {
        /// The class and sub-class, as `nature/food`.
        sub_class: String,
        /// Whether its pictures show text, which then stands in quotes.
        renders_text: bool,
        /// The language of the prompts.
        language: Language,
        /// What they show.
        subjects: Vec<Subject>,
        /// How many characters a prompt may have.
        length: RangeInclusive<usize>,
    },
    /// Whether a prompt may be used.
    Verdict {
        /// The prompt.
        prompt: String,
    },
    /// More categories of a sub-class.
    Categories {
        /// The class and sub-class, as `nature/food`.
        sub_class: String,
        /// How many.
        count: usize,
    },
}

/// One question to a language model, independent of all others.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Request {
    /// The rules: the system's message.
    pub system: String,
    /// The matter: the user's message. Data in it stands in JSON.
    pub user: String,
    /// The most tokens of the answer.
    pub max_tokens: usize,
    /// 0 takes the likeliest token each time.
    pub temperature: f32,
    /// Tokens are drawn from the likeliest ones that have this share of the probability; 1 leaves none out.
    pub top_p: f32,
    /// Of the draws. The same request with another seed is another request.
    pub seed: u64,
    /// What the answer has to be; nothing in particular without one.
    pub shape: Option<Shape>,
    /// What the words are about.
    #[serde(skip)]
    pub task: Task,
}

/// What a language model said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The text, of unknown content.
    pub text: String,
    /// Tokens of it, where the model counts them, else 0.
    pub tokens: usize,
    /// Whether it ended because `max_tokens` were reached.
    pub cut: bool,
}

/// Told the number of a request and its answer, or why this request alone has none; an error ends the work.
pub type Take<'a> = dyn FnMut(usize, Result<Answer, String>) -> anyhow::Result<()> + 'a;

/// Something that answers requests.
pub trait LanguageModel {
    /// What it is called in manifests and on the screen; two that answer differently have different names.
    fn name(&self) -> String;

    /// Whether it understands what it reads, so that its word on a prompt counts. A writer by grammar does not.
    fn judges(&self) -> bool {
        true
    }

    /// Whether what it says depends on the request alone and costs nothing, so that keeping its answers is of no use.
    fn is_free(&self) -> bool {
        false
    }

    /// What happened since this was last asked that is worth a word, such as how often a server had to be asked again.
    fn notes(&mut self) -> Vec<String> {
        Vec::new()
    }

    /// Answers all requests, in any order, each once: as soon as an answer is there, `take` is told of it on the thread of the caller.
    ///
    /// # Errors
    /// When nothing more can be answered at all (no server, no device, no right to ask), when the user asks to stop
    /// ([`l2p_engine::Error::Interrupted`]), and what `take` returns. Answers that were taken before stay good.
    fn answer(&mut self, requests: &[Request], take: &mut Take<'_>) -> anyhow::Result<()>;
}
