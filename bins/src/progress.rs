//! Progress on standard error, hidden where that is no terminal.

use std::time::Duration;

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
