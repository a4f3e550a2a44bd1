//! What the benchmarks share: timing, comparison, records.

pub mod parity;
pub mod timing;
