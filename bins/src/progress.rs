//! Progress on standard error: bars, and lines where that is no terminal.

use std::io::IsTerminal;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use l2p_engine::Error;
use l2p_engine::checkpoint::WriteObserver;

use crate::stop_requested;

/// Shows how much of a file is written, how fast, and how long the rest will take; stops at Ctrl-C.
pub struct WriteProgress {
    bar: ProgressBar,
}

impl WriteProgress {
    /// A bar with this word before it.
    pub fn new(what: &'static str) -> Self {
        let style = ProgressStyle::with_template(
            "{msg} [{bar:32}] {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  {eta} left",
        );
        let bar = ProgressBar::no_length().with_message(what);
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_millis(200));
        WriteProgress { bar }
    }

    /// The time since the start.
    pub fn elapsed(&self) -> Duration {
        self.bar.elapsed()
    }
}

impl WriteObserver for WriteProgress {
    fn begin(&mut self, bytes: u64) {
        self.bar.set_length(bytes);
    }

    fn advance(&mut self, bytes: u64) -> l2p_engine::Result<()> {
        self.bar.inc(bytes);
        if stop_requested() {
            Err(Error::Interrupted)
        } else {
            Ok(())
        }
    }
}

impl Drop for WriteProgress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// The longest that nothing is said where there is no terminal for a bar.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// How often it is looked whether that is over.
const TICK: Duration = Duration::from_millis(500);

/// One thing after another, each with a bar of its own that tells how far it is, how fast, and how long the rest will take. Where there
/// is no terminal a line says the same whenever nothing else was said for a while, whether the work moves or not.
pub struct PhaseBar {
    bar: ProgressBar,
    shown: &'static str,
    /// What stands before the name of each thing, such as the number of a stage.
    stage: &'static str,
    lines: Arc<Lines>,
    teller: Option<JoinHandle<()>>,
}

/// What lines tell.
struct Lines {
    state: Mutex<Phase>,
    ended: Condvar,
}

/// Where the work is.
struct Phase {
    /// What stands before it.
    stage: &'static str,
    what: &'static str,
    /// What is being done of the part that is next.
    detail: String,
    done: u64,
    total: u64,
    /// When it began, and where.
    began: (Instant, u64),
    /// When something was last said.
    told: Instant,
    over: bool,
}

impl Phase {
    /// The line that is due, if one is.
    fn line(&mut self) -> Option<String> {
        if self.what.is_empty() || self.told.elapsed() < LINE_INTERVAL {
            return None;
        }
        self.told = Instant::now();
        let (began, first) = self.began;
        let seconds = began.elapsed().as_secs_f64();
        let gained = self.done.saturating_sub(first);
        let speed = match gained {
            0 => format!("for {seconds:.0} s now"),
            gained => {
                let rate = gained as f64 / seconds;
                let left = self.total.saturating_sub(self.done) as f64 / rate;
                match rate {
                    1.0.. => format!("{rate:.1}/s  {left:.0} s left"),
                    _ => format!("{:.1} s each  {left:.0} s left", 1.0 / rate),
                }
            }
        };
        Some(format!(
            "{}{} {}/{}{}  {speed}",
            self.stage, self.what, self.done, self.total, self.detail
        ))
    }
}

impl Lines {
    fn state(&self) -> MutexGuard<'_, Phase> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells what is due until it is over.
    fn tell(&self) {
        let mut state = self.state();
        while !state.over {
            if let Some(line) = state.line() {
                crate::say(line);
            }
            let waited = self.ended.wait_timeout(state, TICK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl PhaseBar {
    /// Nothing is shown yet.
    pub fn new() -> Self {
        let lines = Arc::new(Lines {
            state: Mutex::new(Phase {
                stage: "",
                what: "",
                detail: String::new(),
                done: 0,
                total: 0,
                began: (Instant::now(), 0),
                told: Instant::now(),
                over: false,
            }),
            ended: Condvar::new(),
        });
        let teller = (!std::io::stderr().is_terminal()).then(|| {
            let lines = lines.clone();
            std::thread::spawn(move || lines.tell())
        });
        PhaseBar {
            bar: ProgressBar::hidden(),
            shown: "",
            stage: "",
            lines,
            teller,
        }
    }

    /// From now on this stands before the name of each thing, such as `2/4 `.
    pub fn stage(&mut self, stage: &'static str) {
        self.stage = stage;
    }

    /// `done` of `total` of what is named; a new bar when that is something else than before.
    pub fn show(&mut self, what: &'static str, done: u64, total: u64) {
        if self.shown != what {
            self.bar.finish_and_clear();
            let style = ProgressStyle::with_template("{prefix}{msg} [{bar:32}] {pos}/{len}  {per_sec}  {eta} left");
            self.bar = ProgressBar::new(total).with_prefix(format!("{}{what}", self.stage));
            self.bar
                .set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            self.bar.enable_steady_tick(Duration::from_millis(200));
            // What an earlier run did says nothing about the speed of this one.
            self.bar.set_position(done);
            self.bar.reset_eta();
            self.shown = what;
            let mut state = self.lines.state();
            (state.stage, state.what) = (self.stage, what);
            state.began = (Instant::now(), done);
        }
        self.bar.set_length(total);
        self.bar.set_position(done);
        self.detail(String::new());
        let mut state = self.lines.state();
        (state.done, state.total) = (done, total);
    }

    /// What is being done of the part that is next, such as `, batch 3 of 8`; gone with the next part.
    pub fn detail(&self, text: String) {
        self.bar.set_message(text.clone());
        self.lines.state().detail = text;
    }

    /// Runs `work`, which prints, without the bar in its way.
    pub fn suspend<T>(&self, work: impl FnOnce() -> T) -> T {
        self.lines.state().told = Instant::now();
        self.bar.suspend(work)
    }

    /// Takes the bar away; nothing is told from then on until something is shown.
    pub fn clear(&mut self) {
        self.bar.finish_and_clear();
        self.shown = "";
        self.lines.state().what = "";
    }
}

impl Drop for PhaseBar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        self.lines.state().over = true;
        self.lines.ended.notify_all();
        if let Some(teller) = self.teller.take() {
            let _ = teller.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(done: u64, seconds: u64, quiet: u64) -> Phase {
        let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        Phase {
            stage: "",
            what: "training",
            detail: ", batch 40 of 1000".into(),
            done,
            total: 12,
            began: (ago(seconds), 2),
            told: ago(quiet),
            over: false,
        }
    }

    #[test]
    fn a_line_is_due_when_nothing_was_said_for_a_while_though_nothing_moves() {
        assert_eq!(phase(2, 30, 3).line(), None);
        let mut still = phase(2, 30, 11);
        assert_eq!(still.line().unwrap(), "training 2/12, batch 40 of 1000  for 30 s now");
        assert_eq!(still.line(), None);
        let slow = phase(7, 20, 11).line().unwrap();
        assert_eq!(slow, "training 7/12, batch 40 of 1000  4.0 s each  20 s left");
        assert!(phase(12, 2, 11).line().unwrap().ends_with("5.0/s  0 s left"));
        assert_eq!(
            Phase {
                what: "",
                ..phase(3, 30, 30)
            }
            .line(),
            None
        );
    }
}
