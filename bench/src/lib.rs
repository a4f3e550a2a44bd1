//! What the benchmarks share: inputs and models, timing, comparison, peers, records.

pub mod arguments;
pub mod attention;
pub mod check;
mod children;
pub mod decode;
pub mod elementwise;
pub mod environment;
pub mod gemm;
pub mod head;
pub mod inputs;
pub mod params;
pub mod parity;
pub mod peer;
pub mod published;
pub mod ranks;
pub mod record;
pub mod report;
pub mod runner;
pub mod sample;
pub mod serve;
pub mod step;
pub mod synthesize;
pub mod targets;
pub mod timing;
pub mod train;
