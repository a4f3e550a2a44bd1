//! Ranges, timed by the program itself while a [`PartTimes`] records.
//!
//! On CUDA the times are the device's, between events in its stream, so that recording waits for nothing; time in which the
//! device had nothing to do counts to the range that kept it waiting.

use std::cell::RefCell;
use std::ffi::CStr;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::device::{Device, Event};
use crate::error::Result;

thread_local! {
    /// What records this thread's ranges now.
    static RECORDER: RefCell<Option<Recorder>> = const { RefCell::new(None) };
}

pub(super) fn with_recorder(work: impl FnOnce(&mut Recorder)) {
    RECORDER.with_borrow_mut(|recorder| {
        if let Some(recorder) = recorder {
            work(recorder);
        }
    });
}

/// The time of one part of recorded work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartTime {
    /// The names of its range and of those around it, outermost first, joined by `/`.
    pub path: String,
    /// How often it was entered.
    pub calls: u64,
    /// Seconds in all, those of the parts within included.
    pub seconds: f64,
}

/// Times of ranges by path, gathered over any number of recordings.
pub struct PartTimes {
    /// `None` while it records.
    recorder: Option<Recorder>,
}

pub(super) struct Recorder {
    device: Device,
    nodes: Vec<Node>,
    /// Ends of ranges that are not yet added up.
    spans: Vec<Span>,
    /// The ranges that are open now.
    open: Vec<(usize, Option<Mark>)>,
}

/// A range in its place among the others.
struct Node {
    name: &'static CStr,
    parent: Option<usize>,
    calls: u64,
    seconds: f64,
}

struct Span {
    node: usize,
    start: Mark,
    end: Mark,
}

/// A point in a device's work.
enum Mark {
    Host(Instant),
    Device(Event),
}

impl PartTimes {
    /// Nothing yet, of work on `device`.
    pub fn new(device: &Device) -> Self {
        PartTimes {
            recorder: Some(Recorder {
                device: device.clone(),
                nodes: Vec::new(),
                spans: Vec::new(),
                open: Vec::new(),
            }),
        }
    }

    /// Does `work` and records the ranges that it opens on this thread. The work must not be recorded as a graph meanwhile.
    pub fn record<T>(&mut self, work: impl FnOnce() -> T) -> T {
        RECORDER.set(self.recorder.take());
        let outcome = work();
        self.recorder = RECORDER.take();
        outcome
    }

    /// Adds up what was recorded. Waits for the device.
    ///
    /// # Errors
    /// When the work so far failed.
    pub fn settle(&mut self) -> Result<()> {
        let Some(recorder) = &mut self.recorder else {
            return Ok(());
        };
        for Span { node, start, end } in recorder.spans.drain(..) {
            let node = &mut recorder.nodes[node];
            node.seconds += start.seconds_to(&end)?;
            node.calls += 1;
        }
        Ok(())
    }

    /// The parts that were recorded and settled, each after the one around it, in the order in which they were first met.
    pub fn parts(&self) -> Vec<PartTime> {
        let mut parts = Vec::new();
        if let Some(recorder) = &self.recorder {
            recorder.list(None, "", &mut parts);
        }
        parts
    }
}

impl Recorder {
    pub(super) fn open(&mut self, name: &'static CStr) {
        let parent = self.open.last().map(|(node, _)| *node);
        let fits = |node: &Node| node.parent == parent && node.name == name;
        let node = self.nodes.iter().position(fits).unwrap_or_else(|| {
            self.nodes.push(Node {
                name,
                parent,
                calls: 0,
                seconds: 0.0,
            });
            self.nodes.len() - 1
        });
        let mark = Mark::now(&self.device);
        self.open.push((node, mark));
    }

    pub(super) fn close(&mut self) {
        // A range that was opened before recording began, or that the driver refused to mark, is not timed.
        if let Some((node, Some(start))) = self.open.pop()
            && let Some(end) = Mark::now(&self.device)
        {
            self.spans.push(Span { node, start, end });
        }
    }

    fn list(&self, parent: Option<usize>, prefix: &str, parts: &mut Vec<PartTime>) {
        for (index, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.parent == parent) {
            let path = format!("{prefix}{}", node.name.to_string_lossy());
            parts.push(PartTime {
                path: path.clone(),
                calls: node.calls,
                seconds: node.seconds,
            });
            self.list(Some(index), &format!("{path}/"), parts);
        }
    }
}

impl Mark {
    fn now(device: &Device) -> Option<Self> {
        match device {
            Device::Cpu => Some(Mark::Host(Instant::now())),
            Device::Cuda(cuda) => cuda.record_event().ok().map(Mark::Device),
        }
    }

    fn seconds_to(&self, later: &Mark) -> Result<f64> {
        match (self, later) {
            (Mark::Device(start), Mark::Device(end)) => Ok(f64::from(start.milliseconds_to(end)?) / 1e3),
            (Mark::Host(start), Mark::Host(end)) => Ok(end.duration_since(*start).as_secs_f64()),
            // All marks of a profile are of one kind.
            _ => Ok(0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::range;
    use super::*;

    #[test]
    fn parts_add_up_by_path() {
        let mut profile = PartTimes::new(&Device::Cpu);
        let _around = range(c"around");
        for _ in 0..3 {
            profile.record(|| {
                let _step = range(c"step");
                for _ in 0..2 {
                    let _block = range(c"block");
                    std::thread::sleep(Duration::from_millis(1));
                }
                let _block = range(c"last");
            });
        }
        drop(range(c"unrecorded"));
        profile.settle().unwrap();
        let parts = profile.parts();
        let counts: Vec<_> = parts.iter().map(|part| (part.path.as_str(), part.calls)).collect();
        assert_eq!(counts, [("step", 3), ("step/block", 6), ("step/last", 3)]);
        assert!(parts[1].seconds >= 0.006 && parts[0].seconds >= parts[1].seconds);
    }
}
