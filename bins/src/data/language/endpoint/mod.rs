//! A language model behind an HTTP server that speaks the `chat/completions` protocol, as vLLM, llama.cpp, Ollama, SGLang, transformers and
//! most services do.
//!
//! Several requests are under way at once. What may be better the second time (no connection, time-out, 408, 409, 429, 5xx, an answer that
//! is no JSON) is asked again, later each time and never before the server said (`Retry-After`); what is the matter of one request (400,
//! 413, 422) ends that request; anything else ends the work, which goes on when the same command is given again.

mod exchange;
mod pace;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{anyhow, bail};
use l2p_engine::Error;

pub(in crate::data) use self::exchange::is_this_machine;
use self::exchange::{Exchange, Outcome};
use self::pace::Pace;
use super::{Answer, LanguageModel, Request, Take};
use crate::stop_requested;

/// How often it is looked whether the user wants to stop.
const LOOK: Duration = Duration::from_millis(100);

/// The longest that a server may ask to wait within a run.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// How a server is asked.
#[derive(Clone, Debug)]
pub struct EndpointOptions {
    /// The server: its root, its `/v1`, or the whole path of its `chat/completions`.
    pub url: String,
    /// The model's name there.
    pub model: String,
    /// The key, sent as a bearer token.
    pub key: Option<String>,
    /// Requests under way at one time, at least 1.
    pub concurrency: usize,
    /// The most requests a minute.
    pub per_minute: Option<usize>,
    /// The longest that one request may take.
    pub timeout: Duration,
    /// How often a request is asked again before the work ends.
    pub retries: usize,
    /// Whether to send the schema of the answer, for servers that can hold a model to it.
    pub schema: bool,
}

/// The client of a server.
pub struct Endpoint {
    shared: Arc<Shared>,
}

/// What the threads that ask have in common.
struct Shared {
    options: EndpointOptions,
    exchange: Exchange,
    pace: Pace,
    /// How often was asked again, by reason.
    again: Mutex<BTreeMap<String, usize>>,
}

/// Requests that threads take from in turn.
struct Round {
    requests: Vec<Request>,
    next: AtomicUsize,
    over: AtomicBool,
}

/// How asking for one answer ended.
enum Ended {
    Answered(Answer),
    Refused(String),
    /// Nothing more can be had.
    Over(String),
    /// Another one has ended the work.
    Dropped,
}

impl Endpoint {
    /// A client; nothing is sent before the first request.
    ///
    /// # Errors
    /// When the URL is none of `http` or `https`, or holds a password.
    pub fn new(options: EndpointOptions) -> anyhow::Result<Self> {
        let exchange = Exchange::new(&options)?;
        let pace = Pace::new(options.per_minute);
        Ok(Endpoint {
            shared: Arc::new(Shared {
                options,
                exchange,
                pace,
                again: Mutex::default(),
            }),
        })
    }
}

impl LanguageModel for Endpoint {
    fn name(&self) -> String {
        format!("{} at {}", self.shared.options.model, self.shared.exchange.url())
    }

    fn notes(&mut self) -> Vec<String> {
        let again = std::mem::take(&mut *self.shared.again());
        let notes = again.into_iter();
        notes
            .map(|(reason, count)| format!("{count} requests were sent again: {reason}"))
            .collect()
    }

    fn answer(&mut self, requests: &[Request], take: &mut Take<'_>) -> anyhow::Result<()> {
        let round = Arc::new(Round {
            requests: requests.to_vec(),
            next: AtomicUsize::new(0),
            over: AtomicBool::new(false),
        });
        let (told, answers) = channel();
        for _ in 0..self.shared.options.concurrency.clamp(1, requests.len().max(1)) {
            // Not joined: one that waits for a silent server must not keep a program from ending.
            let (shared, round, told) = (self.shared.clone(), round.clone(), told.clone());
            std::thread::spawn(move || {
                while let Some(number) = round.take() {
                    if told.send((number, shared.ask(&round, number))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(told);
        let mut outcome = Ok(());
        let mut open = requests.len();
        while open > 0 {
            if stop_requested() {
                outcome = Err(Error::Interrupted.into());
                break;
            }
            match answers.recv_timeout(LOOK) {
                Ok((number, ended)) => {
                    open -= 1;
                    let taken = match ended {
                        Ended::Answered(answer) => take(number, Ok(answer)),
                        Ended::Refused(reason) => take(number, Err(reason)),
                        Ended::Over(reason) => Err(anyhow!(reason)),
                        Ended::Dropped => Ok(()),
                    };
                    if taken.is_err() {
                        // Answers under way are waited for, since they cost what they cost; no more are asked for.
                        round.over.store(true, Ordering::Relaxed);
                        outcome = outcome.and(taken);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        round.over.store(true, Ordering::Relaxed);
        match outcome {
            Ok(()) if open > 0 => bail!("the threads that ask the language model ended unexpectedly"),
            outcome => outcome,
        }
    }
}

impl Round {
    /// The number of a request that nobody has taken.
    fn take(&self) -> Option<usize> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        (number < self.requests.len() && !self.is_over()).then_some(number)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn again(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, usize>> {
        self.again.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks until there is an answer or no hope.
    fn ask(&self, round: &Round, number: usize) -> Ended {
        let request = &round.requests[number];
        let stop = || round.is_over() || stop_requested();
        let mut tries = 0;
        loop {
            if !self.pace.wait_for_turn(&stop) {
                return Ended::Dropped;
            }
            let (reason, after) = match self.exchange.send(request) {
                Outcome::Answered(answer) => return Ended::Answered(answer),
                Outcome::Refused(reason) => return Ended::Refused(reason),
                Outcome::Over(reason) => return Ended::Over(reason),
                Outcome::Again { reason, after } => (reason, after),
            };
            if tries == self.options.retries {
                return match self.exchange.is_of_the_answer(&reason) {
                    true => Ended::Refused(reason),
                    false => Ended::Over(format!(
                        "{reason}, after {} tries; what was answered is kept: give the same command again to go on",
                        tries + 1
                    )),
                };
            }
            tries += 1;
            *self.again().entry(reason.clone()).or_default() += 1;
            match after {
                Some(after) if after > LONGEST_WAIT => {
                    return Ended::Over(format!(
                        "{reason} and asks to come back in {} s; give the same command again then to go on",
                        after.as_secs()
                    ));
                }
                // All others wait too: the limit is that of the key, not of a request.
                Some(after) => self.pace.hold(after),
                None => {}
            }
            // In any case a while, for some servers ask for no wait at all.
            if !pace::sleep(pace::back_off(request.seed ^ number as u64, tries), &stop) {
                return Ended::Dropped;
            }
        }
    }
}
