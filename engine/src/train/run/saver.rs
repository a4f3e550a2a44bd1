//! Checkpoints that are written while training goes on.
//!
//! What a checkpoint is made of is copied into host memory ([`Snapshot`]), and a thread writes, syncs and renames it and then deletes
//! old ones. One is written at a time. The memory is taken once, before it is needed; where the host does not have it, a checkpoint is
//! written from the model itself, and training stands still meanwhile.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::checkpoint::{self, RunState, SaveOptions, Saved, Share};
use super::checksums::Checksums;
use crate::checkpoint::WriteObserver;
use crate::device::{Device, format_bytes};
use crate::error::{Error, Result};
use crate::train::{Snapshot, SnapshotMemory, StateSource, TrainableModel};

/// Bytes of host memory that are left for all else: pictures that are decoded ahead, and the system.
const RESERVE: u64 = 2 << 30;

/// How often it is told how far writing is.
const TOLD_EVERY: Duration = Duration::from_millis(100);

/// Which checkpoints stay; see [`checkpoint::prune`].
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    /// The newest ones that stay.
    pub last: usize,
    /// Multiples of so many steps that stay; 0 for none.
    pub every: u64,
    /// The step at which the last good interval ended.
    pub calm: u64,
}

/// Files that are added to a checkpoint's folder before it is renamed.
pub type AddFiles = Box<dyn Fn(&Path) -> Result<()> + Send>;

/// A checkpoint that is due: all of it but the values.
pub struct SaveJob {
    /// The run's folder.
    pub run: PathBuf,
    /// What the run continues from.
    pub state: RunState,
    /// How it is written.
    pub options: SaveOptions,
    /// What else lies in its folder.
    pub complete: AddFiles,
    /// Where this rank's share of it is written, for a run of several ranks, which together complete it.
    pub share: Option<(PathBuf, Share)>,
    /// Which checkpoints stay when it is on the disk.
    pub keep: Keep,
    /// Watches the writing, on the thread that writes.
    pub observer: Box<dyn WriteObserver + Send>,
}

impl SaveJob {
    fn write(&mut self, source: &dyn StateSource, done: &AtomicU64) -> Written {
        let SaveJob {
            run, state, options, ..
        } = self;
        let mut observer = Counting {
            inner: &mut *self.observer,
            done,
        };
        if let Some((place, share)) = &self.share {
            return Written::Share(checkpoint::write_share(
                (run, place),
                source,
                state,
                *options,
                share,
                &mut observer,
            ));
        }
        let saved = checkpoint::save(run, source, state, *options, &*self.complete, &mut observer);
        let Keep { last, every, calm } = self.keep;
        let pruned = match &saved {
            Ok(_) => checkpoint::prune(run, last, every, calm),
            Err(_) => Ok(()),
        };
        Written::Whole { saved, pruned }
    }
}

/// Counts what is written.
struct Counting<'a> {
    inner: &'a mut dyn WriteObserver,
    done: &'a AtomicU64,
}

impl WriteObserver for Counting<'_> {
    fn begin(&mut self, bytes: u64) {
        self.inner.begin(bytes);
    }

    fn advance(&mut self, bytes: u64) -> Result<()> {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        self.inner.advance(bytes)
    }

    fn written(&mut self, path: &Path) -> Result<()> {
        self.inner.written(path)
    }

    fn next_bytes(&mut self, bytes: &[u8]) {
        self.inner.next_bytes(bytes);
    }
}

/// What was written.
#[derive(Debug)]
pub enum Written {
    /// A checkpoint.
    Whole {
        /// Where it is, or why it is not.
        saved: Result<Saved>,
        /// Whether old checkpoints could be deleted.
        pruned: Result<()>,
    },
    /// A rank's share of one.
    Share(Result<Checksums>),
}

/// What became of a checkpoint.
#[derive(Debug)]
pub struct Finished {
    /// Its step.
    pub step: u64,
    /// What came of it.
    pub written: Written,
    /// Seconds from when it was due until it was on the disk and old ones were deleted.
    pub seconds: f64,
    /// Seconds of them in which training stood still.
    pub stall_seconds: f64,
}

impl Finished {
    /// Where the checkpoint is that no other ranks complete, old ones deleted.
    ///
    /// # Errors
    /// Why it is not there, or old ones could not be deleted.
    pub fn into_saved(self) -> Result<Saved> {
        match self.written {
            Written::Whole { saved, pruned } => pruned.and(saved),
            Written::Share(_) => Err(Error::invalid("a rank's share is no checkpoint")),
        }
    }
}

/// Memory for snapshots.
enum Room {
    /// None was asked for, or it is not to be had.
    None,
    /// On its way; the flag calls it off.
    Coming(JoinHandle<Result<SnapshotMemory>>, Arc<AtomicBool>),
    /// Free.
    There(SnapshotMemory),
    /// The checkpoint in flight uses it.
    Used,
}

/// A checkpoint that is being written.
struct Flight {
    thread: JoinHandle<(Written, Instant, Snapshot)>,
    /// Closed when the thread is done.
    ended: Receiver<()>,
    done: Arc<AtomicU64>,
    total: u64,
    step: u64,
    started: Instant,
    /// Until training went on.
    stood: Duration,
}

/// Writes a run's checkpoints; see the module's head comment.
pub struct Saver {
    room: Room,
    flight: Option<Flight>,
    /// Why checkpoints are written from the model, not said yet.
    short: Option<String>,
}

impl Saver {
    /// One without memory, which writes from the model.
    pub fn new() -> Self {
        Saver {
            room: Room::None,
            flight: None,
            short: None,
        }
    }

    /// Begins to take host memory for snapshots of `bytes` bytes of a model on `device`, unless that would leave too little of the
    /// `available` bytes. A thread takes it, so that the first steps need not wait.
    pub fn prepare(&mut self, device: &Device, bytes: u64, available: u64) {
        if available < bytes.saturating_add(RESERVE) {
            self.short = Some(short(bytes, &format!("{} are available", format_bytes(available))));
            return;
        }
        let called_off = Arc::new(AtomicBool::new(false));
        let (device, stop) = (device.clone(), called_off.clone());
        let work = move || {
            SnapshotMemory::new(&device, bytes as usize, &|| {
                // Others take memory too; what is free now counts, not what was when this began.
                let left = Device::Cpu.available_memory()?;
                match stop.load(Ordering::Relaxed) {
                    true => Err(Error::Interrupted),
                    false if left < RESERVE => Err(Error::invalid(format!("{} are left", format_bytes(left)))),
                    false => Ok(()),
                }
            })
            .map_err(|error| Error::invalid(short(bytes, &error.to_string())))
        };
        match std::thread::Builder::new().name("snapshot memory".into()).spawn(work) {
            Ok(thread) => self.room = Room::Coming(thread, called_off),
            Err(error) => self.short = Some(short(bytes, &error.to_string())),
        }
    }

    /// Whether memory that was asked for is on its way.
    pub fn is_coming(&self) -> bool {
        matches!(&self.room, Room::Coming(thread, _) if !thread.is_finished())
    }

    /// Calls off memory that is on its way: writing from the model is sooner done than waiting for it.
    pub fn call_off(&mut self) {
        if let Room::Coming(_, called_off) = &self.room {
            called_off.store(true, Ordering::Relaxed);
            // It may have come meanwhile; that it was called off is nothing to tell.
            self.room = self.take_memory().map_or(Room::None, Room::There);
            self.short = None;
        }
    }

    /// What is to be said of memory that is not to be had; once.
    pub fn take_notice(&mut self) -> Option<String> {
        self.short.take()
    }

    /// The free memory; waits where it is on its way.
    fn take_memory(&mut self) -> Option<SnapshotMemory> {
        match std::mem::replace(&mut self.room, Room::None) {
            Room::There(memory) => Some(memory),
            Room::Coming(thread, _) => match joined(thread) {
                Ok(memory) => Some(memory),
                Err(error) => {
                    self.short = Some(error.to_string());
                    None
                }
            },
            room => {
                self.room = room;
                None
            }
        }
    }

    /// Begins to write a checkpoint of `model`, which was due at `started`; training may go on when this returns. One that had to be
    /// written from the model itself, and is done, is returned.
    ///
    /// # Errors
    /// When one is being written still, the device refuses to copy, or there is no thread. What comes of writing stands in
    /// [`Finished`].
    pub fn begin(
        &mut self,
        model: &mut TrainableModel,
        mut job: SaveJob,
        started: Instant,
    ) -> Result<Option<Finished>> {
        if self.flight.is_some() {
            return Err(Error::invalid("a checkpoint is being written still"));
        }
        let (step, done) = (job.state.step, Arc::new(AtomicU64::new(0)));
        let Some(memory) = self.take_memory() else {
            let written = job.write(model, &done);
            let seconds = started.elapsed().as_secs_f64();
            return Ok(Some(Finished {
                step,
                written,
                seconds,
                stall_seconds: seconds,
            }));
        };
        let snapshot = model.snapshot(memory)?;
        let total = checkpoint::bytes_of(&snapshot, job.options);
        let (counted, (ending, ended)) = (done.clone(), channel::<()>());
        let work = move || {
            let written = job.write(&snapshot, &counted);
            drop(ending);
            (written, Instant::now(), snapshot)
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(work);
        self.room = Room::Used;
        self.flight = Some(Flight {
            thread: thread.map_err(|error| Error::invalid(format!("no thread writes the checkpoint: {error}")))?,
            ended,
            done,
            total,
            step,
            started,
            stood: started.elapsed(),
        });
        Ok(None)
    }

    /// The step of the checkpoint that is being written.
    pub fn in_flight(&self) -> Option<u64> {
        self.flight.as_ref().map(|flight| flight.step)
    }

    /// Whether nothing is being written any more.
    pub fn is_done(&self) -> bool {
        self.flight.as_ref().is_none_or(|flight| flight.thread.is_finished())
    }

    /// What became of the checkpoint that was being written, once it is done; does not wait.
    ///
    /// # Errors
    /// The first error of the device's work before its snapshot.
    pub fn poll(&mut self) -> Result<Option<Finished>> {
        match &self.flight {
            Some(flight) if flight.thread.is_finished() => self.wait(&mut |_, _| ()),
            _ => Ok(None),
        }
    }

    /// What becomes of the checkpoint that is being written, if there is one. Waits for it; `told` hears how many of how many bytes
    /// are written.
    ///
    /// # Errors
    /// The first error of the device's work before its snapshot.
    pub fn wait(&mut self, told: &mut dyn FnMut(u64, u64)) -> Result<Option<Finished>> {
        let Some(flight) = self.flight.take() else {
            return Ok(None);
        };
        while flight.ended.recv_timeout(TOLD_EVERY) == Err(RecvTimeoutError::Timeout) {
            told(flight.done.load(Ordering::Relaxed).min(flight.total), flight.total);
        }
        let (written, ended, snapshot) = joined(flight.thread);
        let held = snapshot.held_seconds();
        self.room = Room::There(snapshot.into_memory());
        Ok(Some(Finished {
            step: flight.step,
            written,
            seconds: (ended - flight.started).as_secs_f64(),
            stall_seconds: flight.stood.as_secs_f64() + held?,
        }))
    }
}

impl Default for Saver {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Saver {
    /// Whoever drops it may give the run's folder to another run next: nothing is written after that.
    fn drop(&mut self) {
        if let Some(flight) = self.flight.take() {
            let _ = flight.thread.join();
        }
        if let Room::Coming(thread, called_off) = std::mem::replace(&mut self.room, Room::None) {
            called_off.store(true, Ordering::Relaxed);
            // A panic while another one unwinds would end the process without a word on the first.
            let _ = thread.join();
        }
    }
}

/// What a thread returned; its panic goes on in this one.
fn joined<T>(thread: JoinHandle<T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Why training stands still while checkpoints are written.
fn short(bytes: u64, reason: &str) -> String {
    format!(
        "a checkpoint takes {} of host memory while it is written beside training, and {} are kept free, but {reason}: checkpoints are \
         written piece by piece, and training stands still meanwhile",
        format_bytes(bytes),
        format_bytes(RESERVE)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_not_there_is_not_taken_and_told_of_once() {
        let mut saver = Saver::new();
        saver.prepare(&Device::Cpu, 5_000_000_000, RESERVE + 4_999_999_999);
        assert!(saver.take_memory().is_none());
        let notice = saver.take_notice().unwrap();
        assert!(
            notice.starts_with("a checkpoint takes 5.00 GB of host memory")
                && notice.contains("but 7.15 GB are available"),
            "{notice}"
        );
        assert!(saver.take_notice().is_none());
        saver.prepare(&Device::Cpu, 1000, RESERVE + 1000);
        assert!(saver.take_memory().is_some());
        assert!(saver.take_notice().is_none());
    }

    #[test]
    fn what_cannot_be_taken_after_all_is_told() {
        let mut saver = Saver::new();
        saver.prepare(&Device::Cpu, u64::MAX / 4, u64::MAX);
        assert!(saver.take_memory().is_none());
        let notice = saver.take_notice().unwrap();
        assert!(notice.contains("training stands still meanwhile"), "{notice}");
    }
}
