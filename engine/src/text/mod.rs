//! Prompts to token ids: the chat template and the tokenizer that stand beside a text encoder.
//!
//! A prompt becomes one user message; the tokenizer's own template renders it with the generation prompt on and thinking
//! enabled, or disabled where a transformer was trained so, and the rendered text is tokenized and cut to a largest number of tokens, as
//! the published pipelines do. There is no padding here: whoever wants pads is told the token to fill up with.
//!
//! A [`Conversation`] becomes the beginning of an answer in the same way, with thinking turned off and nothing cut; [`Vocabulary`] makes
//! text of the tokens that are written behind it, and [`json`] holds answers to a shape.

mod contained;
mod growth;
pub mod json;
mod outline;
mod template;
mod tokenizer;
mod vocabulary;

pub use template::{ChatTemplate, Conversation};
pub use tokenizer::{PromptTokenizer, PromptTokens};
pub use vocabulary::Vocabulary;
