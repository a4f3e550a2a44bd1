//! What is asked for, and what comes of it.

use crate::error::{Error, Result};
use crate::ops::noise::philox4x32;
use crate::ops::sample_tokens::TokenChoice;
use crate::text::Conversation;
use crate::text::json::JsonShape;

/// How an answer is written.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingOptions {
    /// What logits are divided by; 0 takes the likeliest token each time.
    pub temperature: f32,
    /// Tokens are drawn from the likeliest ones that have this share of the probability together; 1 leaves none out.
    pub top_p: f32,
    /// Tokens are drawn from this many of the likeliest ones; 0 for all.
    pub top_k: u32,
    /// Of the draws.
    pub seed: u64,
    /// The most tokens of the answer.
    pub max_tokens: usize,
    /// What the answer has to be. It is held to the shape whatever the model says, and to be complete within `max_tokens` if the shape's
    /// least number of bytes is no larger than that.
    pub shape: Option<JsonShape>,
}

impl Default for SamplingOptions {
    /// Those that Qwen recommends for answers without thinking.
    fn default() -> Self {
        SamplingOptions {
            temperature: 0.7,
            top_p: 0.8,
            top_k: 20,
            seed: 0,
            max_tokens: 1024,
            shape: None,
        }
    }
}

impl SamplingOptions {
    /// Refuses what makes no sense.
    ///
    /// # Errors
    /// Naming the option.
    pub fn check(&self) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(Error::invalid(format!(
                "a temperature of {} makes no sense: use 0, or a positive number",
                self.temperature
            )));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::invalid(format!(
                "a share of the probability (top-p) of {} makes no sense: use more than 0 and at most 1",
                self.top_p
            )));
        }
        match self.max_tokens {
            0 => Err(Error::invalid(
                "an answer of no tokens cannot be written: ask for at least one",
            )),
            _ => Ok(()),
        }
    }
}

/// A question and how its answer is written.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// What is asked.
    pub conversation: Conversation,
    /// How the answer is written.
    pub options: SamplingOptions,
    /// Tells the draws of answers with the same seed apart.
    pub stream: u64,
}

impl Question {
    /// How token number `index` of the answer is chosen.
    pub(super) fn choice(&self, index: usize) -> TokenChoice {
        let (seed, stream) = (self.options.seed, self.stream);
        let counter = [index as u32, 0, stream as u32, (stream >> 32) as u32];
        TokenChoice {
            temperature: self.options.temperature,
            top_p: self.options.top_p,
            top_k: self.options.top_k,
            random: philox4x32(counter, [seed as u32, (seed >> 32) as u32])[0],
        }
    }
}

/// Why an answer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model said so, or the answer has its shape.
    Stop,
    /// It had as many tokens as it may have.
    Length,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Its text, without the token that ends it.
    pub text: String,
    /// Its tokens.
    pub tokens: usize,
    /// Why it ends.
    pub finish: Finish,
}

/// How far a call has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Questions that are answered.
    pub finished: usize,
    /// Questions.
    pub of: usize,
    /// Tokens that were written, of all answers.
    pub tokens: u64,
}
