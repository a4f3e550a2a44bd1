//! What a run says while it works before its first step and between steps.

use super::{Event, Observer};
use crate::error::{Error, Result};

/// Passes the progress of work on, and ends it when the user asks for that.
pub(super) struct Progress<'a> {
    /// The observer.
    pub observer: &'a mut dyn Observer,
}

impl Progress<'_> {
    /// Whether to go on.
    pub fn go_on(&mut self) -> Result<()> {
        match self.observer.stop_requested() {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }

    /// Tells that `done` of `total` parts of `what` are done.
    pub fn report(&mut self, what: &'static str, done: usize, total: usize) -> Result<()> {
        self.observer.event(&Event::Progress { what, done, total });
        self.go_on()
    }

    /// Says something that stops nothing.
    pub fn notice(&mut self, text: &str) {
        self.observer.event(&Event::Notice(text));
    }
}
