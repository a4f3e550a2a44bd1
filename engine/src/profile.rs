//! Where time goes: NVTX ranges for Nsight, nested run / phase / step / block / op, and the same operations timed without it.

mod ops;

use std::ffi::CStr;
use std::marker::PhantomData;

pub use ops::{ClassTime, Op, OpTime, Profile, Work, measure, op};

/// An open range; closed when dropped, on the thread that opened it.
#[must_use = "a range lasts as long as this value"]
pub struct Range(PhantomData<*const ()>);

/// Opens a range named `name` on this thread. Costs a nanosecond when no profiler is attached.
pub fn range(name: &CStr) -> Range {
    crate::nvtx::push(name);
    Range(PhantomData)
}

/// As [`range`], for a name without the zero byte that profilers want.
fn range_of(name: &str) -> Range {
    crate::nvtx::push_str(name);
    Range(PhantomData)
}

impl Drop for Range {
    fn drop(&mut self) {
        crate::nvtx::pop();
    }
}
