//! Operations, told to profilers and, within [`measure`], timed one by one.
//!
//! Every operation opens an [`op`] at its door, with the arithmetic and the memory traffic that it cannot do without. Outside
//! [`measure`] that is an NVTX range and nothing else.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::device::{Device, Event};
use crate::error::Result;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// What work amounts to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// Floating point operations of its products, a multiplication and an addition counting as two; other arithmetic counts
    /// for nothing.
    pub flops: u64,
    /// Bytes of memory that it reads and writes when it reads every input once and writes every result once.
    pub bytes: u64,
}

impl Work {
    /// Both together.
    pub fn plus(self, other: Work) -> Work {
        Work {
            flops: self.flops + other.flops,
            bytes: self.bytes + other.bytes,
        }
    }
}

/// One operation of a [`Profile`].
#[derive(Clone, Debug)]
pub struct OpTime {
    /// Its name.
    pub name: &'static str,
    /// The shape of its first input.
    pub shape: Shape,
    /// What it does.
    pub work: Work,
    /// Device time; on the CPU wall time.
    pub milliseconds: f64,
}

/// All operations of one name.
#[derive(Clone, Debug, Serialize)]
pub struct ClassTime {
    /// Their name.
    pub name: &'static str,
    /// How many there were.
    pub calls: usize,
    /// What they do together.
    pub work: Work,
    /// The sum of their times.
    pub milliseconds: f64,
}

/// The operations of a piece of work, in the order in which they ran.
#[derive(Clone, Debug)]
pub struct Profile {
    /// The operations.
    pub ops: Vec<OpTime>,
    /// The time of the whole, what lies between the operations included.
    pub milliseconds: f64,
}

impl Profile {
    /// The operations by name, the longest first.
    pub fn classes(&self) -> Vec<ClassTime> {
        let mut classes: Vec<ClassTime> = Vec::new();
        for op in &self.ops {
            let class = match classes.iter_mut().find(|class| class.name == op.name) {
                Some(class) => class,
                None => {
                    classes.push(ClassTime {
                        name: op.name,
                        calls: 0,
                        work: Work::default(),
                        milliseconds: 0.0,
                    });
                    classes.last_mut().expect("just added")
                }
            };
            class.calls += 1;
            class.work = class.work.plus(op.work);
            class.milliseconds += op.milliseconds;
        }
        classes.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
        classes
    }

    /// What all operations do together.
    pub fn work(&self) -> Work {
        self.ops.iter().fold(Work::default(), |sum, op| sum.plus(op.work))
    }
}

/// An operation that runs; it ends when this is dropped.
#[must_use = "an operation lasts as long as this value"]
pub struct Op(PhantomData<*const ()>);

/// Opens the operation `name` on `input`, which does `flops` floating point operations in products and must move `bytes`
/// bytes (see [`Work`]). An operation inside another is part of it.
pub fn op(name: &'static str, input: &Tensor, flops: usize, bytes: usize) -> Op {
    crate::nvtx::push_str(name);
    RECORDER.with_borrow_mut(|recorder| {
        if let Some(recorder) = recorder {
            recorder.open(|| OpTime {
                name,
                shape: input.shape(),
                work: Work {
                    flops: flops as u64,
                    bytes: bytes as u64,
                },
                milliseconds: 0.0,
            });
        }
    });
    Op(PhantomData)
}

impl Drop for Op {
    fn drop(&mut self) {
        RECORDER.with_borrow_mut(|recorder| {
            if let Some(recorder) = recorder {
                recorder.close();
            }
        });
        crate::nvtx::pop();
    }
}

/// Runs `work` and times each operation that it runs on this thread, on CUDA by events between which the device does not
/// wait for the host as long as enough work was submitted before. Not for work that is being recorded as a graph.
///
/// # Errors
/// Those of `work`, and when the driver refuses an event.
pub fn measure<T>(device: &Device, work: impl FnOnce() -> Result<T>) -> Result<(T, Profile)> {
    let start = Point::now(device)?;
    RECORDER.set(Some(Recorder {
        device: device.clone(),
        depth: 0,
        ops: Vec::new(),
        failure: None,
    }));
    let stop = StopOnDrop;
    let outcome = work();
    drop(stop);
    let recorder = FINISHED.take().expect("the recorder was set above");
    let outcome = outcome?;
    let end = Point::now(device)?;
    if let Some(failure) = recorder.failure {
        return Err(failure);
    }
    let ops = recorder.ops.into_iter().map(|(op, start, end)| {
        let milliseconds = match end {
            Some(end) => start.milliseconds_to(&end)?,
            None => 0.0,
        };
        Ok(OpTime { milliseconds, ..op })
    });
    let profile = Profile {
        ops: ops.collect::<Result<_>>()?,
        milliseconds: start.milliseconds_to(&end)?,
    };
    Ok((outcome, profile))
}

thread_local! {
    static RECORDER: RefCell<Option<Recorder>> = const { RefCell::new(None) };
    static FINISHED: RefCell<Option<Recorder>> = const { RefCell::new(None) };
}

/// Ends the recording of operations, also when work panics.
struct StopOnDrop;

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        FINISHED.set(RECORDER.take());
    }
}

/// Collects the operations of one thread.
struct Recorder {
    device: Device,
    /// Operations that are open.
    depth: usize,
    ops: Vec<(OpTime, Point, Option<Point>)>,
    failure: Option<crate::error::Error>,
}

impl Recorder {
    fn open(&mut self, op: impl FnOnce() -> OpTime) {
        self.depth += 1;
        if self.depth > 1 {
            return;
        }
        match Point::now(&self.device) {
            Ok(start) => self.ops.push((op(), start, None)),
            Err(error) => self.failure = Some(error),
        }
    }

    fn close(&mut self) {
        self.depth = self.depth.saturating_sub(1);
        if self.depth > 0 || self.failure.is_some() {
            return;
        }
        match (Point::now(&self.device), self.ops.last_mut()) {
            (Ok(end), Some((_, _, last))) => *last = Some(end),
            (Err(error), _) => self.failure = Some(error),
            (Ok(_), None) => {}
        }
    }
}

/// A moment in a device's work.
enum Point {
    Host(Instant),
    Device(Event),
}

impl Point {
    fn now(device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Point::Host(Instant::now())),
            Device::Cuda(device) => Ok(Point::Device(device.record_event()?)),
        }
    }

    fn milliseconds_to(&self, later: &Point) -> Result<f64> {
        match (self, later) {
            (Point::Host(start), Point::Host(end)) => Ok(end.duration_since(*start).as_secs_f64() * 1e3),
            (Point::Device(start), Point::Device(end)) => Ok(f64::from(start.milliseconds_to(end)?)),
            _ => unreachable!("both points are of one device"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    fn tensor() -> Tensor {
        Tensor::from_slice(&Device::Cpu, &[0f32; 6], [2, 3]).unwrap()
    }

    #[test]
    fn operations_are_timed_in_order_and_summed_by_name() {
        let x = tensor();
        let (value, profile) = measure(&Device::Cpu, || {
            for bytes in [8, 16] {
                let _op = op("move", &x, 0, bytes);
            }
            let _outer = op("product", &x, 100, 1);
            // Part of the product.
            let _inner = op("move", &x, 0, 1000);
            std::thread::sleep(std::time::Duration::from_millis(2));
            Ok(5)
        })
        .unwrap();
        assert_eq!(value, 5);
        let names: Vec<_> = profile.ops.iter().map(|op| op.name).collect();
        assert_eq!(names, ["move", "move", "product"]);
        assert_eq!(profile.ops[0].shape.to_vec(), [2, 3]);
        let classes = profile.classes();
        assert_eq!((classes[0].name, classes[0].calls), ("product", 1));
        assert_eq!(
            (classes[1].name, classes[1].calls, classes[1].work.bytes),
            ("move", 2, 24)
        );
        assert!(classes[0].milliseconds >= 2.0 && profile.milliseconds >= classes[0].milliseconds);
        assert_eq!(profile.work(), Work { flops: 100, bytes: 25 });
    }

    #[test]
    fn nothing_is_kept_after_an_error() {
        let x = tensor();
        let failed = measure(&Device::Cpu, || {
            let _op = op("move", &x, 0, 8);
            Err::<(), _>(Error::invalid("no"))
        });
        assert!(failed.is_err());
        drop(op("move", &x, 0, 8));
        let (_, profile) = measure(&Device::Cpu, || Ok(())).unwrap();
        assert!(profile.ops.is_empty());
    }
}
