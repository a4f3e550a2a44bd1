//! The source's own text encoder as a language model, decoded where the pictures are drawn.

use l2p_engine::checkpoint::ModelPaths;
use l2p_engine::pipeline::generator::{Completion, Finish, Generator, LanguageFiles, Question, SamplingOptions};
use l2p_engine::text::Conversation;
use l2p_engine::text::json::{JsonKind, JsonShape};
use l2p_engine::{Device, Error};

use super::{Answer, LanguageModel, Request, Shape, Take, Task};
use crate::stop_requested;

/// The most characters of a text whose request does not say how long it may be.
const LONGEST_TEXT: u32 = 1000;

/// The most characters of a verdict's reason.
const LONGEST_REASON: u32 = 400;

/// A text encoder that writes.
pub struct OwnEncoder {
    generator: Generator,
    name: String,
}

impl OwnEncoder {
    /// Brings a source's text encoder onto a device, or says why it is no language model. `loaded` is told how many tensors are there
    /// and how many there are.
    ///
    /// # Errors
    /// When a file is missing or damaged, or the device has no room.
    pub fn open(
        paths: &ModelPaths,
        device: &Device,
        loaded: &mut dyn FnMut(usize, usize) -> l2p_engine::Result<()>,
    ) -> l2p_engine::Result<Result<Self, String>> {
        let files = match LanguageFiles::find(paths, device)? {
            Ok(files) => files,
            Err(reason) => return Ok(Err(reason)),
        };
        let identity = files.checkpoint().identity()?;
        let identity: String = identity.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        Ok(Ok(OwnEncoder {
            name: format!("text encoder {identity} in {}", device.compute_dtype()),
            generator: Generator::load(&files, device, loaded)?,
        }))
    }
}

impl LanguageModel for OwnEncoder {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn answer(&mut self, requests: &[Request], take: &mut Take<'_>) -> anyhow::Result<()> {
        let questions: Vec<Question> = requests.iter().map(question).collect();
        // What the listener says ends the work through the engine's own error.
        let mut refusal = None;
        let mut told = |index: usize, answer: l2p_engine::Result<Completion>| {
            let answer = answer.map(said).map_err(|error| error.to_string());
            take(index, answer).map_err(|error| {
                refusal = Some(error);
                Error::Interrupted
            })
        };
        let mut progress = |_| match stop_requested() {
            true => Err(Error::Interrupted),
            false => Ok(()),
        };
        let outcome = self.generator.answer(&questions, &mut told, &mut progress);
        match refusal {
            Some(error) => Err(error),
            None => Ok(outcome?),
        }
    }
}

/// A request as the generator takes it.
fn question(request: &Request) -> Question {
    Question {
        conversation: Conversation {
            system: Some(request.system.clone()),
            user: request.user.clone(),
        },
        options: SamplingOptions {
            temperature: request.temperature,
            top_p: request.top_p,
            top_k: 0,
            seed: request.seed,
            max_tokens: request.max_tokens,
            shape: request.shape.map(|shape| json_shape(shape, &request.task)),
        },
        stream: 0,
    }
}

/// Bounds are wide: whether a text is as long as was asked is the stage's to judge; they keep a model that does not stop from filling an
/// answer with one text.
fn json_shape(shape: Shape, task: &Task) -> JsonShape {
    match shape {
        Shape::Texts { count } => {
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            let most = match task {
                Task::Prompts { length, .. } => u32::try_from(length.end() * 2).unwrap_or(LONGEST_TEXT),
                _ => LONGEST_TEXT,
            };
            JsonShape::Texts {
                count: count..=count,
                characters: 1..=most,
            }
        }
        Shape::Verdict => JsonShape::Object(vec![
            ("is_valid".into(), JsonKind::Flag),
            ("reason".into(), JsonKind::Text(0..=LONGEST_REASON)),
        ]),
    }
}

fn said(completion: Completion) -> Answer {
    Answer {
        tokens: completion.tokens,
        cut: completion.finish == Finish::Length,
        text: completion.text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::language::Language;

    #[test]
    fn requests_become_questions_of_their_shape() {
        let request = |shape, task| Request {
            system: "rules".into(),
            user: "{}".into(),
            max_tokens: 9,
            temperature: 0.5,
            top_p: 0.9,
            seed: 3,
            shape: Some(shape),
            task,
        };
        let prompts = Task::Prompts {
            sub_class: "nature/food".into(),
            renders_text: false,
            language: Language::En,
            subjects: Vec::new(),
            length: 200..=350,
        };
        let asked = question(&request(Shape::Texts { count: 4 }, prompts));
        assert_eq!(asked.conversation.system.as_deref(), Some("rules"));
        assert_eq!((asked.options.seed, asked.options.max_tokens), (3, 9));
        let expected = JsonShape::Texts {
            count: 4..=4,
            characters: 1..=700,
        };
        assert_eq!(asked.options.shape, Some(expected));
        let verdict = Task::Verdict { prompt: "x".into() };
        let asked = question(&request(Shape::Verdict, verdict));
        assert!(matches!(asked.options.shape, Some(JsonShape::Object(entries)) if entries.len() == 2));
    }

    #[test]
    fn an_answer_that_was_cut_says_so() {
        let of = |finish| {
            said(Completion {
                text: "[]".into(),
                tokens: 2,
                finish,
            })
        };
        assert!(of(Finish::Length).cut && !of(Finish::Stop).cut);
    }
}
