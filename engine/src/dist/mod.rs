//! Many ranks: processes that run the same program, each on a device of its own, and exchange tensors.
//!
//! A [`Launch`] says who this process is, [`World::join`] meets the others, and the world's two planes connect them:
//!
//! * the control plane ([`World::agree`], [`World::decide`], …): small messages over TCP, which also notices ranks that die or hang;
//! * the data plane, a [`Communicator`]: NCCL between GPUs, TCP between CPUs, copies within a world of one.
//!
//! All ranks enter the same operations in the same order. What rank 0 alone can know (that the user wants to stop, that a disk is
//! full) it decides for all, so that no rank waits in an operation that the others never enter. A rank that is lost ends every wait
//! on every other one with [`Error::PeerLost`](crate::Error::PeerLost), within [`Options::operation`] at the latest.
//!
//! Sums do not depend on how tensors travel: [`Communicator::reduce_scatter`] brings all parts of a rank's slice to that rank,
//! which adds them in the order of ranks in f32 ([`sum_parts`](crate::ops::sum_parts)). A sharded optimizer therefore gets the same
//! bits as an unsharded one, over every network and with every version of NCCL.

mod code;
mod communicator;
mod control;
mod launch;
mod nccl;
mod shard;
mod solo;
mod tcp;
mod world;

pub use communicator::{Communicator, Pending, PendingSum};
pub use launch::{Launch, Launcher, Variables, derived_port};
pub use nccl::available as nccl_available;
pub use shard::{ALIGNMENT, Arena, Bucket, Piece, Shards};
pub use world::{Peer, World};

use std::time::Duration;

/// How long ranks wait for each other, and what else they need to meet.
#[derive(Clone, Debug)]
pub struct Options {
    /// For all ranks to arrive.
    pub start: Duration,
    /// For a rank to enter an operation that others wait in.
    pub operation: Duration,
    /// For a sign of life of a rank; the shortest time in which a machine that went down is noticed. One that dies alone is
    /// noticed at once.
    pub silence: Duration,
    /// Whether the user wants to stop, asked while ranks are missing.
    pub interrupted: fn() -> bool,
    /// What must be the same program on all ranks; by default name, version and hash of the executable.
    pub code: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            start: Duration::from_secs(300),
            operation: Duration::from_secs(300),
            silence: Duration::from_secs(60),
            interrupted: || false,
            code: None,
        }
    }
}

impl Options {
    /// These options with `operation` for how long ranks wait for one another, and no longer for a sign of life.
    pub fn with_patience(self, operation: Duration) -> Self {
        Options {
            operation,
            silence: self.silence.min(operation),
            ..self
        }
    }

    /// Between two signs of life.
    fn heartbeat(&self) -> Duration {
        (self.silence / 10).clamp(Duration::from_millis(20), Duration::from_secs(1))
    }
}
