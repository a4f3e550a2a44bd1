//! Progress on standard error, hidden where that is no terminal.

use std::io::IsTerminal;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
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

/// Between two lines where there is no terminal for a bar.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// One thing after another, each with a bar of its own that tells how far it is, how fast, and how long the rest will take.
pub struct PhaseBar {
    bar: ProgressBar,
    shown: &'static str,
    /// Where there is no terminal, a line now and then.
    lines: Option<Lines>,
}

impl PhaseBar {
    /// Nothing is shown yet. With `lines` it is told in a line now and then where there is no terminal, also while nothing
    /// gets done for long.
    pub fn new(lines: bool) -> Self {
        PhaseBar {
            bar: ProgressBar::hidden(),
            shown: "",
            lines: (lines && !std::io::stderr().is_terminal()).then(|| Lines::every(LINE_INTERVAL, crate::say)),
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
        }
        self.bar.set_length(total);
        self.bar.set_position(done);
        if let Some(lines) = &self.lines {
            lines.show(what, done, total);
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

/// Tells at intervals, from a thread of its own, how far the work is: a step of a large batch may take minutes, and whoever reads
/// a log should see what it is at.
struct Lines {
    shared: Arc<(Mutex<Told>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

/// How far the work is.
struct Told {
    what: &'static str,
    done: u64,
    total: u64,
    /// When this began, and where.
    began: (Instant, u64),
    ended: bool,
}

impl Lines {
    fn every(interval: Duration, tell: impl Fn(String) + Send + 'static) -> Self {
        let told = Told {
            what: "",
            done: 0,
            total: 0,
            began: (Instant::now(), 0),
            ended: false,
        };
        let shared = Arc::new((Mutex::new(told), Condvar::new()));
        let there = shared.clone();
        let thread = std::thread::spawn(move || {
            let (told, changed) = &*there;
            let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
            while !told.ended {
                let wait = changed.wait_timeout_while(told, interval, |told| !told.ended);
                told = wait.unwrap_or_else(PoisonError::into_inner).0;
                if !told.ended && !told.what.is_empty() && told.done < told.total {
                    tell(told.line());
                }
            }
        });
        Lines {
            shared,
            thread: Some(thread),
        }
    }

    fn show(&self, what: &'static str, done: u64, total: u64) {
        let mut told = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        if told.what != what {
            (told.what, told.began) = (what, (Instant::now(), done));
        }
        (told.done, told.total) = (done, total);
    }
}

impl Told {
    fn line(&self) -> String {
        let Told { what, done, total, .. } = *self;
        let (began, first) = self.began;
        let seconds = began.elapsed().as_secs_f64();
        match done.saturating_sub(first) {
            0 => format!("{what} {done}/{total}  for {seconds:.0} s so far"),
            more => {
                let rate = more as f64 / seconds;
                let left = (total - done) as f64 / rate;
                format!("{what} {done}/{total}  {rate:.1}/s  {left:.0} s left")
            }
        }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        let (told, changed) = &*self.shared;
        told.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
        changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn work_that_takes_long_is_told_of_while_it_lasts() {
        let (told, lines) = channel();
        let display = Lines::every(Duration::from_millis(5), move |line| {
            let _ = told.send(line);
        });
        display.show("drawing", 40, 100);
        // Nothing gets done meanwhile.
        let line = lines.recv_timeout(Duration::from_secs(30)).unwrap();
        assert!(line.starts_with("drawing 40/100  for "), "{line}");
        display.show("drawing", 60, 100);
        let told = std::iter::from_fn(|| lines.recv_timeout(Duration::from_secs(30)).ok());
        let line = told.take(1000).find(|line| line.starts_with("drawing 60/100")).unwrap();
        assert!(line.contains("/s") && line.ends_with(" s left"), "{line}");
        drop(display);
        assert!(lines.iter().count() < 1000);
    }
}
