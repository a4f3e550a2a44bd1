//! Work of foreign code on foreign files, held in: on a thread with a known stack, for a limited time, and with panics that become
//! errors instead of text on the terminal.
//!
//! Tokenizer files and chat templates are programs for libraries that do not expect hostile ones. Nothing here bounds memory; what
//! the work may allocate is bounded by its callers before they start it.

use std::any::Any;
use std::cell::Cell;
use std::panic;
use std::sync::Once;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// Enough for the deepest work that the checks of templates and tokenizers let through, several times over; only what is used of
/// it takes memory.
const STACK: usize = 64 << 20;

/// Why contained work has no result.
#[derive(Debug)]
pub(super) enum Failure {
    /// It panicked, or could not be started; holds the reason.
    Broken(String),
    /// It ran for this long and was left alone. Its thread may go on until the program ends.
    TooLong(Duration),
}

impl Failure {
    /// What happened, in words that follow those on what was done.
    pub(super) fn reason(&self) -> String {
        match self {
            Failure::Broken(reason) => format!("it breaks its library ({})", crate::shown_name(reason)),
            Failure::TooLong(limit) => format!("it takes more than {} s", limit.as_secs_f32()),
        }
    }
}

/// The result of `work`, unless it panics or takes longer than `limit`.
pub(super) fn contained<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    let (sender, receiver) = channel();
    let run = move || {
        keep_panics_quiet();
        // Nobody listens any more after the time limit.
        let _ = sender.send(work());
    };
    let builder = thread::Builder::new().name("text".into()).stack_size(STACK);
    let thread = builder.spawn(run).map_err(|error| Failure::Broken(error.to_string()))?;
    // In two parts: a program that was stopped and goes on finds the first one past, and the work deserves another chance.
    for _ in 0..2 {
        match receiver.recv_timeout(limit / 2) {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                let panic = thread.join().err();
                return Err(Failure::Broken(
                    panic.map_or("no result".into(), |panic| message_of(&*panic)),
                ));
            }
        }
    }
    Err(Failure::TooLong(limit))
}

/// The text of a panic.
fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or("a panic".into())
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Keeps the panics of this thread off the terminal; those of other threads are printed as before.
fn keep_panics_quiet() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |information| {
            if !QUIET.with(Cell::get) {
                usual(information);
            }
        }));
    });
    QUIET.with(|quiet| quiet.set(true));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn results_panics_and_time_are_told_apart() {
        let limit = Duration::from_secs(10);
        assert_eq!(contained(limit, || 7).unwrap(), 7);
        let broken = contained(limit, || panic!("no {}", "good")).unwrap_err();
        assert_eq!(broken.reason(), "it breaks its library (no good)");
        let deep = contained(limit, || vec![0u8; 4][std::hint::black_box(9)]).unwrap_err();
        assert!(deep.reason().contains("index out of bounds"), "{deep:?}");
        let begun = Instant::now();
        let slow = contained(Duration::from_millis(50), || thread::sleep(Duration::from_secs(2)));
        assert!(matches!(slow, Err(Failure::TooLong(_))) && begun.elapsed() < Duration::from_secs(1));
    }

    #[test]
    fn there_is_room_for_deep_work() {
        fn depth(left: usize) -> usize {
            let frame = std::hint::black_box([left; 64]);
            if left == 0 { frame[0] } else { 1 + depth(frame[63] - 1) }
        }
        assert_eq!(contained(Duration::from_secs(10), || depth(50_000)).unwrap(), 50_000);
    }
}
