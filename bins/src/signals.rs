//! The wish to stop, as it reaches a program: Ctrl-C, a request to terminate, a terminal that is closed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Once};

use signal_hook::consts::signal;
use signal_hook::flag;

use crate::INTERRUPTED;

static STOP: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

#[cfg(unix)]
const SIGNALS: [i32; 3] = [signal::SIGINT, signal::SIGTERM, signal::SIGHUP];
#[cfg(not(unix))]
const SIGNALS: [i32; 2] = [signal::SIGINT, signal::SIGTERM];

/// Handlers are installed once, whatever a program runs one after the other: a second set would take the first signal for the second.
static LISTENING: Once = Once::new();

/// From now on these signals ask to stop, and a second one ends the program at once. One that whoever started the program has it
/// ignore, as `nohup` does with the closing of the terminal, stays ignored.
pub(crate) fn listen() {
    LISTENING.call_once(install);
}

fn install() {
    let ignored = ignored();
    for signal in SIGNALS.into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0) {
        // In this order: the first signal finds the flag down, and raises it. Where a handler cannot be installed, the signal ends
        // the program at once.
        let _ = flag::register_conditional_shutdown(signal, INTERRUPTED.into(), STOP.clone());
        let _ = flag::register(signal, STOP.clone());
    }
}

/// The signals that this process was started to ignore; bit 0 is signal 1.
#[cfg(target_os = "linux")]
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    mask(&status)
}

/// Elsewhere nobody tells without a call that is not safe.
#[cfg(not(target_os = "linux"))]
fn ignored() -> u64 {
    0
}

/// The mask of ignored signals in a process's status.
#[cfg(target_os = "linux")]
fn mask(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

/// Whether the user has asked to stop. Long work asks now and then and then ends with [`l2p_engine::Error::Interrupted`];
/// a second Ctrl-C ends the program at once.
pub fn stop_requested() -> bool {
    STOP.load(Ordering::Relaxed)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_status() {
        let status = "Name:\tx\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000440\n";
        assert_eq!(mask(status), 1 | 1 << 12);
        assert_eq!(mask(""), 0);
        // This very process: no test runner ignores a request to terminate.
        assert_eq!(ignored() >> (signal::SIGTERM - 1) & 1, 0);
    }
}
