//! A thread that owns a state and works on it, one request after another. It knows nothing of models.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use super::ticket::{Answer, Asker, Fault, Ticket, ticket};
use crate::error::{Error, Result};
use crate::pipeline::Report;

/// What a state can tell of itself.
pub(super) trait Owned: Sized + 'static {
    /// What was done since this was last asked.
    fn take_report(&mut self) -> Report;

    /// Why nothing more can be done after a request failed so; `None` where the next one can be served.
    fn fault(&mut self, error: &Error) -> Option<String>;
}

/// Work on the state; it returns why the thread must end, if it must.
type Job<S> = Box<dyn FnOnce(&mut S) -> Option<String> + Send>;

/// The thread's handle.
pub(super) struct Owner<S> {
    device: String,
    jobs: Option<Sender<Job<S>>>,
    thread: Option<JoinHandle<()>>,
    closing: Arc<AtomicBool>,
    /// Requests that are not ended yet.
    open: Arc<AtomicUsize>,
    most: usize,
    fault: Fault,
}

/// Counts a request as open as long as it lives, whatever becomes of it.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl<S: Owned> Owner<S> {
    /// Starts the thread, which makes the state, and waits until it has. `device` is its name in messages; at most `most` requests may
    /// be open at a time.
    ///
    /// # Errors
    /// Those of `make`, and when the system gives no thread.
    pub(super) fn start(device: &str, most: usize, make: impl FnOnce() -> Result<S> + Send + 'static) -> Result<Self> {
        let (sender, jobs) = channel::<Job<S>>();
        let (made, outcome) = channel::<Result<()>>();
        let fault: Fault = Arc::new(OnceLock::new());
        let theirs = fault.clone();
        let work = move || match make() {
            Ok(state) => {
                // Whoever started it waits for this word.
                let _ = made.send(Ok(()));
                serve(state, jobs, &theirs);
            }
            Err(error) => {
                let _ = made.send(Err(error));
            }
        };
        let thread = std::thread::Builder::new().name(format!("worker of {device}"));
        let thread = thread
            .spawn(work)
            .map_err(|error| Error::invalid(format!("a thread for {device} cannot be started: {error}")))?;
        match outcome.recv() {
            Ok(outcome) => outcome?,
            Err(_) => {
                let reason = thread.join().err().map(|panic| words(&*panic)).unwrap_or_default();
                return Err(Error::WorkerEnded {
                    device: device.to_owned(),
                    reason,
                });
            }
        }
        Ok(Owner {
            device: device.to_owned(),
            jobs: Some(sender),
            thread: Some(thread),
            closing: Arc::default(),
            open: Arc::default(),
            most,
            fault,
        })
    }

    /// Requests that wait or are served.
    pub(super) fn open(&self) -> usize {
        self.open.load(Ordering::Acquire)
    }

    /// Has the thread do this work, after all that was asked for before.
    ///
    /// # Errors
    /// [`Error::Busy`] when too many requests are open, [`Error::WorkerEnded`] when the thread has ended.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut S, &Asker<T>) -> Result<T> + Send + 'static,
    ) -> Result<Ticket<T>> {
        let open = self.open.fetch_add(1, Ordering::AcqRel);
        let place = Place(self.open.clone());
        if open >= self.most {
            return Err(Error::Busy {
                device: self.device.clone(),
                open,
            });
        }
        let (asker, ticket) = ticket(&self.device, &self.closing, &self.fault);
        let device = self.device.clone();
        let request = Open { place, asker };
        let job: Job<S> = Box::new(move |state| {
            // As a whole, so that one that is never served gives its place back before it is answered, too.
            let request = request;
            let Open { place, asker } = request;
            let attempt = catch_unwind(AssertUnwindSafe(|| asker.go_on().and_then(|()| work(state, &asker))));
            let (outcome, fault) = match attempt {
                Ok(outcome) => {
                    let report = state.take_report();
                    let fault = outcome.as_ref().err().and_then(|error| state.fault(error));
                    (outcome.map(|value| Answer { value, report }), fault)
                }
                // What it has left of the state is anyone's guess.
                Err(panic) => {
                    let reason = format!("a request ended in a panic: {}", words(&*panic));
                    let error = Error::WorkerEnded {
                        device,
                        reason: reason.clone(),
                    };
                    (Err(error), Some(reason))
                }
            };
            // First the place, so that whoever has the answer finds it free.
            drop(place);
            asker.end(outcome);
            fault
        });
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        match sent {
            true => Ok(ticket),
            false => Err(Error::WorkerEnded {
                device: self.device.clone(),
                reason: self.fault.get().cloned().unwrap_or_default(),
            }),
        }
    }
}

/// A request that is open; its parts are dropped in this order.
struct Open<T> {
    place: Place,
    asker: Asker<T>,
}

impl<S> Drop for Owner<S> {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // Panics within requests were caught; there is nobody to tell of one in between.
            let _ = thread.join();
        }
    }
}

/// Does what comes until nobody can ask any more, or something fails for good.
fn serve<S>(mut state: S, jobs: Receiver<Job<S>>, fault: &Fault) {
    for job in jobs {
        if let Some(reason) = job(&mut state) {
            // Set once, before what waits is dropped with the queue.
            let _ = fault.set(reason);
            return;
        }
    }
}

/// What a panic said.
fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "without a word".into())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::{RecvTimeoutError, channel, sync_channel};
    use std::time::Duration;

    use super::super::ticket::Event;
    use super::*;

    /// Numbers in the order in which they came, and word of the state's end.
    #[derive(Default)]
    struct Notes {
        numbers: Vec<usize>,
        dropped: Arc<AtomicBool>,
    }

    impl Owned for Notes {
        fn take_report(&mut self) -> Report {
            Report::default()
        }

        fn fault(&mut self, error: &Error) -> Option<String> {
            matches!(error, Error::Cuda { .. }).then(|| "the device is lost".into())
        }
    }

    impl Drop for Notes {
        fn drop(&mut self) {
            self.dropped.store(true, Ordering::SeqCst);
        }
    }

    fn owner(most: usize) -> Owner<Notes> {
        Owner::start("cpu", most, || Ok(Notes::default())).unwrap()
    }

    fn note(owner: &Owner<Notes>, number: usize) -> Ticket<Vec<usize>> {
        let work = move |notes: &mut Notes, _: &Asker<Vec<usize>>| {
            notes.numbers.push(number);
            Ok(notes.numbers.clone())
        };
        owner.ask(work).unwrap()
    }

    fn lost() -> Error {
        Error::Cuda {
            call: "cuLaunchKernel".into(),
            reason: "CUDA_ERROR_ILLEGAL_ADDRESS".into(),
        }
    }

    /// A request that begins, says so, and goes on until the other end of the channel is dropped or it is cancelled.
    fn hold(owner: &Owner<Notes>) -> (Ticket<()>, Sender<()>) {
        let (free, held) = channel::<()>();
        let (begun, begins) = sync_channel(0);
        let work = move |_: &mut Notes, asker: &Asker<()>| {
            let _ = begun.send(());
            loop {
                asker.go_on()?;
                if held.recv_timeout(Duration::from_millis(1)) == Err(RecvTimeoutError::Disconnected) {
                    return Ok(());
                }
            }
        };
        let ticket = owner.ask(work).unwrap();
        begins.recv().unwrap();
        (ticket, free)
    }

    #[test]
    fn requests_are_served_in_order_whoever_waits_first() {
        let owner = owner(100);
        let tickets: Vec<_> = (0..20).map(|number| note(&owner, number)).collect();
        for (number, ticket) in tickets.into_iter().enumerate().rev() {
            assert_eq!(ticket.wait().unwrap().value, (0..=number).collect::<Vec<_>>());
        }
        assert_eq!(owner.open(), 0);
    }

    #[test]
    fn the_error_of_one_request_leaves_the_others() {
        let owner = owner(100);
        let first = note(&owner, 1);
        let bad = owner
            .ask(|_, _: &Asker<()>| Err(Error::invalid("no such thing")))
            .unwrap();
        let last = note(&owner, 2);
        assert_eq!(bad.wait().unwrap_err().to_string(), "no such thing");
        assert_eq!(first.wait().unwrap().value, [1]);
        assert_eq!(last.wait().unwrap().value, [1, 2]);
    }

    #[test]
    fn what_is_cancelled_ends_wherever_it_is() {
        let owner = owner(100);
        let (running, _free) = hold(&owner);
        let waiting = note(&owner, 1);
        drop(note(&owner, 2));
        let after = note(&owner, 3);
        waiting.cancel();
        running.cancel();
        assert!(matches!(running.wait(), Err(Error::Interrupted)));
        assert!(matches!(waiting.wait(), Err(Error::Interrupted)));
        assert_eq!(after.wait().unwrap().value, [3], "neither of the others was begun");
    }

    #[test]
    fn an_error_of_whoever_listens_cancels() {
        let owner = owner(100);
        let (running, _free) = hold(&owner);
        let mut told = 0;
        let outcome = running.wait_with(&mut |event| {
            assert_eq!(event, Event::Waiting);
            told += 1;
            Err(Error::invalid("enough"))
        });
        assert_eq!((outcome.unwrap_err().to_string().as_str(), told), ("enough", 1));
        assert_eq!(note(&owner, 1).wait().unwrap().value, [1]);
    }

    #[test]
    fn a_device_that_is_lost_ends_the_thread_with_its_reason() {
        let owner = owner(100);
        let (running, free) = hold(&owner);
        let bad = owner.ask(|_, _: &Asker<()>| Err(lost())).unwrap();
        let after = note(&owner, 1);
        drop(free);
        running.wait().unwrap();
        assert!(matches!(bad.wait(), Err(Error::Cuda { .. })));
        let message = after.wait().unwrap_err().to_string();
        assert!(
            message.contains("cpu") && message.contains("the device is lost"),
            "{message}"
        );
        // Whether the thread is gone yet or not.
        let later = owner.ask(|_, _: &Asker<()>| Ok(())).and_then(Ticket::wait);
        assert!(later.is_err_and(|error| error.to_string() == message));
        assert_eq!(owner.open(), 0);
    }

    #[test]
    fn a_panic_ends_the_thread_with_its_words() {
        let owner = owner(100);
        let work = |_: &mut Notes, _: &Asker<()>| -> Result<()> { std::panic::panic_any("no way out") };
        let bad = owner.ask(work).unwrap();
        let message = bad.wait().unwrap_err().to_string();
        assert!(message.contains("ended in a panic: no way out"), "{message}");
    }

    #[test]
    fn too_many_are_refused_until_one_has_ended() {
        let owner = owner(2);
        let (running, free) = hold(&owner);
        let waiting = note(&owner, 1);
        let refused = owner.ask(|_, _: &Asker<()>| Ok(()));
        assert!(matches!(refused, Err(Error::Busy { open: 2, .. })));
        drop(free);
        running.wait().unwrap();
        waiting.wait().unwrap();
        assert_eq!(note(&owner, 2).wait().unwrap().value, [1, 2]);
    }

    #[test]
    fn dropping_it_cancels_and_joins() {
        let dropped = Arc::new(AtomicBool::new(false));
        let theirs = dropped.clone();
        let make = move || {
            Ok(Notes {
                numbers: Vec::new(),
                dropped: theirs,
            })
        };
        let owner = Owner::start("cpu", 100, make).unwrap();
        let (running, _free) = hold(&owner);
        let waiting = note(&owner, 1);
        drop(owner);
        assert!(dropped.load(Ordering::SeqCst), "the state was dropped by its thread");
        assert!(matches!(running.wait(), Err(Error::Interrupted)));
        assert!(matches!(waiting.wait(), Err(Error::Interrupted)));
    }

    #[test]
    fn a_state_that_cannot_be_made_is_an_error_at_once() {
        let failed = Owner::<Notes>::start("cpu", 1, || Err(Error::invalid("no model")));
        assert_eq!(failed.err().unwrap().to_string(), "no model");
        let panicked = Owner::<Notes>::start("cpu", 1, || std::panic::panic_any("no way"));
        assert!(panicked.err().unwrap().to_string().contains("no way"));
    }

    /// Many threads may ask one worker.
    #[test]
    fn it_may_be_shared() {
        fn shared<T: Send + Sync>() {}
        shared::<super::super::Worker>();
        shared::<Owner<Notes>>();
    }

    #[test]
    fn events_come_in_order() {
        let owner = owner(1);
        let work = |_: &mut Notes, asker: &Asker<()>| {
            (1..=3).for_each(|done| asker.tell(Event::Step { done, total: 3 }));
            Ok(())
        };
        let told = Mutex::new(Vec::new());
        let mut tell = |event| {
            if event != Event::Waiting {
                told.lock().unwrap().push(event);
            }
            Ok(())
        };
        owner.ask(work).unwrap().wait_with(&mut tell).unwrap();
        let steps = [1, 2, 3].map(|done| Event::Step { done, total: 3 });
        assert_eq!(told.into_inner().unwrap(), steps);
    }
}
