//! When the next request may be sent.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::data::dice::Dice;

/// The first wait before asking again; each further one is twice as long.
const FIRST: Duration = Duration::from_millis(500);

/// The longest wait that the server did not ask for.
const LONGEST: Duration = Duration::from_secs(30);

/// The longest sleep between two looks at whether to go on.
const SLICE: Duration = Duration::from_millis(50);

/// Turns for all threads that send.
pub(super) struct Pace {
    /// Between two requests.
    interval: Duration,
    /// When the next one may be sent.
    next: Mutex<Instant>,
}

impl Pace {
    /// As many requests a minute, evenly spread; any number without a limit.
    pub(super) fn new(per_minute: Option<usize>) -> Self {
        let interval = per_minute.map_or(Duration::ZERO, |count| Duration::from_secs(60) / count.max(1) as u32);
        Pace {
            interval,
            next: Mutex::new(Instant::now()),
        }
    }

    /// Waits for a turn; `false` when `stop` says so meanwhile.
    pub(super) fn wait_for_turn(&self, stop: &dyn Fn() -> bool) -> bool {
        loop {
            let wait = {
                let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
                let now = Instant::now();
                if *next <= now {
                    *next = now + self.interval;
                    return !stop();
                }
                *next - now
            };
            // No longer than a slice, for a server may move the next turn meanwhile.
            if !sleep(wait.min(SLICE), stop) {
                return false;
            }
        }
    }

    /// No request is sent for so long.
    pub(super) fn hold(&self, time: Duration) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        *next = (*next).max(Instant::now() + time);
    }
}

/// How long to wait before asking for the so-manieth time again: twice as long each time, less a random part, so that requests that
/// failed together do not come back together.
pub(super) fn back_off(seed: u64, again: usize) -> Duration {
    let whole = FIRST.saturating_mul(1 << again.saturating_sub(1).min(10)).min(LONGEST);
    whole.mul_f64(0.5 + 0.5 * Dice::new(seed, "back off", again as u64).uniform())
}

/// Sleeps; `false` when `stop` says so meanwhile.
pub(super) fn sleep(time: Duration, stop: &dyn Fn() -> bool) -> bool {
    let end = Instant::now() + time;
    loop {
        if stop() {
            return false;
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        std::thread::sleep(left.min(SLICE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_end() {
        for again in 1..40 {
            let wait = back_off(7, again);
            let whole = Duration::from_millis(500 * (1 << (again - 1).min(10))).min(LONGEST);
            assert!(wait >= whole / 2 && wait <= whole, "{again}: {wait:?}");
        }
        assert_ne!(back_off(1, 1), back_off(2, 1));
    }

    #[test]
    fn turns_are_spread_and_held() {
        let pace = Pace::new(Some(1200));
        let started = Instant::now();
        for _ in 0..3 {
            assert!(pace.wait_for_turn(&|| false));
        }
        assert!(started.elapsed() >= Duration::from_millis(100));
        pace.hold(Duration::from_millis(80));
        let held = Instant::now();
        assert!(pace.wait_for_turn(&|| false));
        assert!(held.elapsed() >= Duration::from_millis(80));
        pace.hold(Duration::from_secs(60));
        assert!(!pace.wait_for_turn(&|| true));
    }
}
