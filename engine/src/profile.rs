//! Where time goes: NVTX ranges for Nsight, nested run / phase / step / block / op, and the same ranges and operations timed
//! without it.

mod ops;
mod parts;

use std::ffi::CStr;
use std::marker::PhantomData;

pub use ops::{ClassTime, Op, OpTime, Profile, Work, measure, op};
pub use parts::{PartTime, PartTimes};

/// An open range; closed when dropped, on the thread that opened it.
#[must_use = "a range lasts as long as this value"]
pub struct Range(PhantomData<*const ()>);

/// Opens a range named `name` on this thread. Costs some nanoseconds when neither a profiler is attached nor a [`PartTimes`]
/// records.
pub fn range(name: &'static CStr) -> Range {
    crate::nvtx::push(name);
    parts::with_recorder(|recorder| recorder.open(name));
    Range(PhantomData)
}

impl Drop for Range {
    fn drop(&mut self) {
        parts::with_recorder(parts::Recorder::close);
        crate::nvtx::pop();
    }
}
