//! Answers of a language model: conversations in, texts out, many at a time.
//!
//! [`LanguageFiles`] is a source's text encoder and tokenizer on disk, looked at as a language model; a [`Generator`] is the same on its
//! device. It writes as many answers at a time as fit, and gives the place of one that is finished to the next question. What an answer
//! is follows from its question, options and seed: not from what is written beside it, but for rounding on CUDA.

mod batch;
mod files;
mod options;

pub use files::LanguageFiles;
pub use options::{Completion, Finish, Progress, Question, SamplingOptions};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::layers::ParamSource;
use crate::model::language::LanguageModel;
use crate::text::json::TokenTable;
use crate::text::{Conversation, PromptTokenizer, Vocabulary};

use super::blame::of_file;

/// Told the number of a question and its answer, or why this question alone has none; an error ends the work.
pub type Take<'a> = dyn FnMut(usize, Result<Completion>) -> Result<()> + 'a;

/// Told after every token of all texts; an error ends the work.
pub type OnProgress<'a> = dyn FnMut(Progress) -> Result<()> + 'a;

/// A language model on its device, with its tokenizer.
pub struct Generator {
    tokenizer: PromptTokenizer,
    vocabulary: Vocabulary,
    model: LanguageModel,
    /// Tokens at which an answer ends.
    ends: Vec<u32>,
    /// The vocabulary for answers of a shape, or why there can be none.
    table: std::result::Result<TokenTable, String>,
}

impl Generator {
    /// Brings a source's text encoder onto the device, all of its layers. `loaded` is told how many tensors are there and how many there
    /// are; an error from it ends the loading.
    ///
    /// # Errors
    /// When the encoder is no language model, a file is damaged, or the device has no room.
    pub fn load(
        files: &LanguageFiles<'_>,
        device: &Device,
        loaded: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        let tokenizer = PromptTokenizer::open(files.tokenizer())?;
        let params: &dyn ParamSource = files.checkpoint();
        let model = LanguageModel::load(params, device, files.config(), loaded);
        let model = model.map_err(|error| of_file(files.checkpoint(), error))?;
        let mut generator = Generator::of(tokenizer, model)?;
        generator.end_at(files.ends())?;
        Ok(generator)
    }

    /// A model that is loaded already, with the tokenizer that it was trained with.
    ///
    /// # Errors
    /// When the tokenizer's tokens are not bytes, or it has one at its end that the model does not know.
    pub fn of(tokenizer: PromptTokenizer, model: LanguageModel) -> Result<Self> {
        let vocabulary = Vocabulary::of(&tokenizer)?;
        let entries = model.config().vocabulary;
        let mut generator = Generator {
            ends: Vec::new(),
            table: TokenTable::new(&vocabulary, entries).map_err(|error| error.to_string()),
            tokenizer,
            vocabulary,
            model,
        };
        let ends = generator.vocabulary.ends().to_vec();
        generator.end_at(&ends)?;
        Ok(generator)
    }

    /// Lets answers end at these tokens too.
    ///
    /// # Errors
    /// When one of them is not in the model's vocabulary.
    pub fn end_at(&mut self, tokens: &[u32]) -> Result<()> {
        let entries = self.model.config().vocabulary;
        if let Some(token) = tokens.iter().find(|token| **token as usize >= entries) {
            return Err(Error::invalid(format!(
                "texts end at token {token}, which is not in the text encoder's vocabulary of {entries}; tokenizer and text encoder are of \
                 different models"
            )));
        }
        self.ends.extend(tokens);
        Ok(())
    }

    /// The model.
    pub fn model(&self) -> &LanguageModel {
        &self.model
    }

    /// The tokens of a conversation, up to where the answer begins.
    ///
    /// # Errors
    /// When the tokenizer or its template refuses it, or makes nothing of it.
    pub fn tokens(&self, conversation: &Conversation) -> Result<Vec<u32>> {
        let tokens = self.tokenizer.encode_conversation(conversation)?;
        match tokens.is_empty() {
            true => Err(Error::invalid(
                "the chat template and tokenizer make no token of the conversation, so that there is nothing to answer",
            )),
            false => Ok(tokens),
        }
    }

    /// The answers to conversations, in their order, all with the same options; their draws differ by their number.
    ///
    /// # Errors
    /// When the options make no sense, a conversation cannot be answered, the device has no room, or `on_progress` says so.
    pub fn generate(
        &self,
        conversations: &[Conversation],
        options: &SamplingOptions,
        on_progress: &mut OnProgress<'_>,
    ) -> Result<Vec<Completion>> {
        let questions: Vec<Question> = conversations
            .iter()
            .enumerate()
            .map(|(stream, conversation)| Question {
                conversation: conversation.clone(),
                options: options.clone(),
                stream: stream as u64,
            })
            .collect();
        let mut answers: Vec<Option<Completion>> = vec![None; questions.len()];
        let mut take = |index: usize, answer: Result<Completion>| {
            answers[index] = Some(answer?);
            Ok(())
        };
        self.answer(&questions, &mut take, on_progress)?;
        Ok(answers.into_iter().flatten().collect())
    }
}
