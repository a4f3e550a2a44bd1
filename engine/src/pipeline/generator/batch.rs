//! Answers that are written side by side.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Completion, Finish, Generator, OnProgress, Progress, Question, Take};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::language::{Decoding, Feed, LanguageMemory};
use crate::ops::linear_few::MOST_ROWS;
use crate::ops::sample_tokens::{TokenChoice, sample_tokens};
use crate::tensor::Tensor;
use crate::text::json::{Guide, Masks};

/// The most tokens of a question with its answer: what models of the family were trained on.
const LONGEST_TEXT: usize = 32_768;

/// A text that stands in one of the places.
struct Writing {
    /// The number of its question.
    question: usize,
    /// The question's tokens, and the answer's behind them.
    text: Vec<u32>,
    asked: usize,
    guide: Option<Guide>,
    /// Whether the answer is held to be complete within its tokens.
    held: bool,
}

impl Writing {
    fn written(&self) -> usize {
        self.text.len() - self.asked
    }

    fn feed(&self) -> Option<Feed> {
        let token = *self.text.last()?;
        let position = self.text.len() - 1;
        Some(Feed { token, position })
    }
}

impl Generator {
    /// Answers all questions, each once, in any order: as soon as an answer is there, `take` is told of it.
    ///
    /// # Errors
    /// When options make no sense, an answer of a shape cannot be held to it with this tokenizer, the device has no room, or `take` or
    /// `on_progress` says so. A question that is too long or that the tokenizer refuses fails by itself.
    pub fn answer(&self, questions: &[Question], take: &mut Take<'_>, on_progress: &mut OnProgress<'_>) -> Result<()> {
        for question in questions {
            question.options.check()?;
        }
        let shaped = questions.iter().any(|question| question.options.shape.is_some());
        if let Err(reason) = &self.table
            && shaped
        {
            return Err(Error::invalid(reason.clone()));
        }
        let mut queue = VecDeque::new();
        let mut finished = 0;
        for (index, question) in questions.iter().enumerate() {
            match self.begin(index, question) {
                Ok(writing) => queue.push_back(writing),
                Err(error) => {
                    finished += 1;
                    take(index, Err(error))?;
                }
            }
        }
        if queue.is_empty() {
            return Ok(());
        }
        let longest = queue.iter().map(|writing| {
            let most = questions[writing.question].options.max_tokens;
            writing.asked + most
        });
        let capacity = longest.max().unwrap_or(1);
        let slots = self.places(queue.len(), capacity)?;
        let mut batch = Batch {
            generator: self,
            questions,
            decoding: Decoding::new(&self.model, slots, capacity)?,
            places: (0..slots).map(|_| None).collect(),
            masks: Masks::default(),
            progress: Progress {
                finished,
                of: questions.len(),
                tokens: 0,
            },
        };
        while batch.fill(&mut queue)? {
            batch.step(take)?;
            on_progress(batch.progress)?;
        }
        Ok(())
    }

    fn begin(&self, index: usize, question: &Question) -> Result<Writing> {
        let text = self.tokens(&question.conversation)?;
        let (asked, most) = (text.len(), question.options.max_tokens);
        if asked.saturating_add(most) > LONGEST_TEXT {
            return Err(Error::invalid(format!(
                "a question of {asked} tokens and an answer of {most} are longer than the {LONGEST_TEXT} that a text may have"
            )));
        }
        let guide = question.options.shape.as_ref().map(Guide::new).transpose()?;
        Ok(Writing {
            question: index,
            held: guide.as_ref().is_some_and(|guide| guide.least_bytes() <= most),
            text,
            asked,
            guide,
        })
    }

    /// Places for so many texts: no more than fit.
    fn places(&self, texts: usize, capacity: usize) -> Result<usize> {
        let device = self.model.device();
        let mut slots = texts.clamp(1, MOST_ROWS);
        loop {
            let memory = LanguageMemory::of(self.model.config(), &device, slots, capacity, capacity.max(4096));
            match memory.ensure_room(&device, true) {
                Ok(()) => return Ok(slots),
                Err(error) if slots == 1 => return Err(error),
                Err(_) => slots = slots.div_ceil(2),
            }
        }
    }
}

struct Batch<'a> {
    generator: &'a Generator,
    questions: &'a [Question],
    decoding: Decoding<'a>,
    places: Vec<Option<Writing>>,
    masks: Masks,
    progress: Progress,
}

impl Batch<'_> {
    /// Gives free places to what waits; whether anything is being written.
    fn fill(&mut self, queue: &mut VecDeque<Writing>) -> Result<bool> {
        let mut begun = Vec::new();
        for (slot, place) in self.places.iter_mut().enumerate() {
            if place.is_none()
                && let Some(writing) = queue.pop_front()
            {
                begun.push(slot);
                *place = Some(writing);
            }
        }
        let places = &self.places;
        let text = |slot: usize| {
            places[slot]
                .as_ref()
                .map_or(&[][..], |writing| &writing.text[..writing.asked - 1])
        };
        // The last token is fed by the next step.
        let texts = begun.into_iter().map(|slot| (slot, text(slot)));
        let texts: Vec<(usize, &[u32])> = texts.filter(|(_, text)| !text.is_empty()).collect();
        self.decoding.read(&texts)?;
        Ok(self.places.iter().any(Option::is_some))
    }

    /// Writes a token of every text.
    fn step(&mut self, take: &mut Take<'_>) -> Result<()> {
        let feeds: Vec<Option<Feed>> = self.places.iter().map(|place| place.as_ref()?.feed()).collect();
        let logits = self.decoding.step(&feeds)?;
        // While the device is at it.
        let choice = |place: &Option<Writing>| match place {
            Some(writing) => self.questions[writing.question].choice(writing.written()),
            None => TokenChoice::GREEDY,
        };
        let choices: Vec<TokenChoice> = self.places.iter().map(choice).collect();
        let allowed = self.allowed(&self.generator.model.device())?;
        let tokens = sample_tokens(&logits, &choices, allowed.as_ref())?.to_vec::<i32>()?;
        drop(logits);
        for (slot, token) in tokens.into_iter().enumerate() {
            let Some(mut writing) = self.places[slot].take() else {
                continue;
            };
            self.progress.tokens += 1;
            match self.write(&mut writing, token)? {
                None => self.places[slot] = Some(writing),
                Some(finish) => {
                    self.progress.finished += 1;
                    take(writing.question, Ok(self.completion(&writing, finish)))?;
                }
            }
        }
        Ok(())
    }

    /// The tokens that may come next, where a text is held to a shape.
    fn allowed(&mut self, device: &Device) -> Result<Option<Tensor>> {
        let Ok(table) = &self.generator.table else {
            return Ok(None);
        };
        let (masks, questions) = (&mut self.masks, self.questions);
        let mut of_place = |place: &Option<Writing>| {
            let writing = place.as_ref()?;
            let most = questions[writing.question].options.max_tokens;
            let left = if writing.held {
                most - writing.written()
            } else {
                usize::MAX
            };
            Some(masks.allowed(table, writing.guide.as_ref()?, left))
        };
        let found: Vec<Option<Arc<[i32]>>> = self.places.iter().map(&mut of_place).collect();
        if found.iter().all(Option::is_none) {
            return Ok(None);
        }
        let every: Arc<[i32]> = vec![-1; table.words()].into();
        let words: Vec<i32> = found
            .iter()
            .flat_map(|mask| mask.as_ref().unwrap_or(&every).iter().copied())
            .collect();
        Tensor::from_slice(device, &words, [self.places.len(), table.words()]).map(Some)
    }

    /// Adds a token to a text; says so if it is the last one.
    fn write(&self, writing: &mut Writing, token: i32) -> Result<Option<Finish>> {
        let Ok(token) = u32::try_from(token) else {
            return Err(Error::invalid(
                "the language model's logits are no numbers: its weights hold NaN or infinities, or overflow",
            ));
        };
        let most = self.questions[writing.question].options.max_tokens;
        let vocabulary = &self.generator.vocabulary;
        let is_end = match &mut writing.guide {
            None if self.generator.ends.contains(&token) => return Ok(Some(Finish::Stop)),
            None => false,
            Some(guide) => {
                let bytes = vocabulary.bytes(token).unwrap_or_default();
                if !guide.advance(bytes) {
                    return Err(Error::invalid(format!(
                        "token {token} was chosen for an answer whose shape does not allow it"
                    )));
                }
                guide.is_done()
            }
        };
        writing.text.push(token);
        Ok(match is_end {
            true => Some(Finish::Stop),
            false => (writing.written() >= most).then_some(Finish::Length),
        })
    }

    fn completion(&self, writing: &Writing, finish: Finish) -> Completion {
        Completion {
            text: self.generator.vocabulary.text(&writing.text[writing.asked..]),
            tokens: writing.written(),
            finish,
        }
    }
}
