//! What whoever asked holds, and what the worker tells it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::image_io::RgbImage;
use crate::pipeline::Report;

/// How often somebody who waits is asked whether to go on.
const TICK: Duration = Duration::from_millis(100);

/// How far a request is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A text was encoded.
    Encoded {
        /// The text.
        text: String,
        /// Tokens at its end that the tokenizer's limit cut off.
        dropped_tokens: usize,
    },
    /// A part of the model was loaded.
    Loaded {
        /// Parts that are.
        done: usize,
        /// Parts in all.
        total: usize,
    },
    /// A step was done.
    Step {
        /// Steps done, of all pictures of the request.
        done: usize,
        /// Steps in all.
        total: usize,
    },
    /// What a picture is about to show, where the request wants to know.
    Preview {
        /// The picture's number in the request.
        index: usize,
        /// What the model predicts now, at most 512 pixels a side; of a latent model the first three channels of its latent.
        image: RgbImage,
    },
    /// Nothing new; told now and then while there is nothing else.
    Waiting,
}

/// What a request gave, and what it took.
#[derive(Debug)]
pub struct Answer<T> {
    /// The result.
    pub value: T,
    /// Time and memory of this request alone.
    pub report: Report,
}

pub(super) enum Message<T> {
    Event(Event),
    Ended(Result<Answer<T>>),
}

/// Why a worker has ended, once it has.
pub(super) type Fault = Arc<OnceLock<String>>;

/// A request that was accepted. Dropping it cancels the request.
pub struct Ticket<T> {
    messages: Receiver<Message<T>>,
    cancelled: Arc<AtomicBool>,
    device: String,
    fault: Fault,
}

/// The worker's end of a ticket.
pub(super) struct Asker<T> {
    messages: Sender<Message<T>>,
    cancelled: Arc<AtomicBool>,
    closing: Arc<AtomicBool>,
}

/// Both ends of a request to the worker of the device named so; it ends early when `closing` is set.
pub(super) fn ticket<T>(device: &str, closing: &Arc<AtomicBool>, fault: &Fault) -> (Asker<T>, Ticket<T>) {
    let (sender, messages) = channel();
    let cancelled = Arc::new(AtomicBool::new(false));
    let asker = Asker {
        messages: sender,
        cancelled: cancelled.clone(),
        closing: closing.clone(),
    };
    let ticket = Ticket {
        messages,
        cancelled,
        device: device.to_owned(),
        fault: fault.clone(),
    };
    (asker, ticket)
}

impl<T> Ticket<T> {
    /// Asks the worker to stop at the request's next step; it then ends with [`Error::Interrupted`], unless it is done before.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Waits for the answer.
    ///
    /// # Errors
    /// The request's; [`Error::WorkerEnded`] when the worker has ended before it was served.
    pub fn wait(self) -> Result<Answer<T>> {
        self.wait_with(&mut |_| Ok(()))
    }

    /// Waits for the answer; `event` is told of what happens meanwhile, in order. An error from it cancels the request and is what this
    /// returns, after the worker has let go of the request.
    ///
    /// # Errors
    /// As [`Ticket::wait`], and those of `event`.
    pub fn wait_with(self, event: &mut dyn FnMut(Event) -> Result<()>) -> Result<Answer<T>> {
        let mut stopped = None;
        loop {
            let happened = match self.messages.recv_timeout(TICK) {
                Ok(Message::Ended(outcome)) => return stopped.map_or(outcome, Err),
                Ok(Message::Event(happened)) => happened,
                Err(RecvTimeoutError::Timeout) => Event::Waiting,
                Err(RecvTimeoutError::Disconnected) => return Err(stopped.unwrap_or_else(|| self.ended())),
            };
            if stopped.is_none()
                && let Err(error) = event(happened)
            {
                self.cancel();
                stopped = Some(error);
            }
        }
    }

    /// The error where the worker is gone without an answer: it has a fault, or was dropped.
    fn ended(&self) -> Error {
        match self.fault.get() {
            Some(reason) => Error::WorkerEnded {
                device: self.device.clone(),
                reason: reason.clone(),
            },
            None => Error::Interrupted,
        }
    }
}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl<T> Asker<T> {
    /// Tells what has happened. That nobody listens is no reason to stop: then the request is cancelled anyway.
    pub(super) fn tell(&self, event: Event) {
        let _ = self.messages.send(Message::Event(event));
    }

    /// Whether to go on.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when the request was cancelled or the worker is closing.
    pub(super) fn go_on(&self) -> Result<()> {
        match self.cancelled.load(Ordering::Relaxed) || self.closing.load(Ordering::Relaxed) {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }

    /// The answer.
    pub(super) fn end(self, outcome: Result<Answer<T>>) {
        let _ = self.messages.send(Message::Ended(outcome));
    }
}
