//! Progress on standard error, hidden where that is no terminal.

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

/// Between two lines where there is no terminal for a bar.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// One thing after another, each with a bar of its own that tells how far it is, how fast, and how long the rest will take.
pub struct PhaseBar {
    bar: ProgressBar,
    shown: &'static str,
    /// Where there is no terminal, a line now and then.
    lines: bool,
    /// When what is shown began, where it began, and when it was last told in a line.
    began: (Instant, u64),
    told: Instant,
}

impl PhaseBar {
    /// Nothing is shown yet. With `lines` it is told in a line now and then where there is no terminal.
    pub fn new(lines: bool) -> Self {
        PhaseBar {
            bar: ProgressBar::hidden(),
            shown: "",
            lines,
            began: (Instant::now(), 0),
            told: Instant::now(),
        }
    }

    /// `done` of `total` of what is named; a new bar when that is something else than before.
    pub fn show(&mut self, what: &'static str, done: u64, total: u64) {
        if self.shown != what {
            self.bar.finish_and_clear();
            let style = ProgressStyle::with_template("{msg} [{bar:32}] {pos}/{len}  {per_sec}  {eta} left");
            self.bar = ProgressBar::new(total).with_message(what);
            self.bar
                .set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            self.bar.enable_steady_tick(Duration::from_millis(200));
            // What an earlier run did says nothing about the speed of this one.
            self.bar.set_position(done);
            self.bar.reset_eta();
            self.shown = what;
            self.began = (Instant::now(), done);
            self.told = Instant::now();
        }
        self.bar.set_length(total);
        self.bar.set_position(done);
        if self.lines && self.bar.is_hidden() && self.told.elapsed() >= LINE_INTERVAL {
            let (began, first) = self.began;
            let rate = (done - first) as f64 / began.elapsed().as_secs_f64();
            let left = (total - done) as f64 / rate.max(f64::MIN_POSITIVE);
            crate::say(format_args!("{what} {done}/{total}  {rate:.1}/s  {left:.0} s left"));
            self.told = Instant::now();
        }
    }

    /// Runs `work`, which prints, without the bar in its way.
    pub fn suspend<T>(&self, work: impl FnOnce() -> T) -> T {
        self.bar.suspend(work)
    }

    /// Takes the bar away.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }
}
