//! Prompts to token ids: the chat template and the tokenizer that stand beside a text encoder.
//!
//! A prompt becomes one user message; the tokenizer's own template renders it with the generation prompt on and thinking
//! enabled, and the rendered text is tokenized and cut to a largest number of tokens, as the published pipeline does. There
//! is no padding: only real tokens go on to the text encoder.

mod contained;
mod growth;
mod outline;
mod template;
mod tokenizer;

pub use template::ChatTemplate;
pub use tokenizer::{PromptTokenizer, PromptTokens};
