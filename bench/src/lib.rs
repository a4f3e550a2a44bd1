//! What the benchmarks share: inputs and models, timing, comparison, peers, records.

pub mod arguments;
pub mod attention;
pub mod check;
pub mod elementwise;
pub mod environment;
pub mod gemm;
pub mod head;
pub mod inputs;
pub mod params;
pub mod parity;
pub mod peer;
pub mod published;
pub mod record;
pub mod runner;
pub mod step;
pub mod timing;
pub mod train;
