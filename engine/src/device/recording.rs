//! What a recording uses while it is made; see [`graph`](super::graph).

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;
use std::thread::ThreadId;

use super::pool::Recording;

/// What a recording uses.
pub(super) struct Recorded {
    /// What it allocates.
    pub blocks: Recording,
    /// The owners of what was there before, by address: nothing is asked of them but to live.
    pub kept: HashMap<u64, Arc<dyn Any + Send + Sync>>,
    thread: ThreadId,
}

impl Recorded {
    /// A recording of this thread that has used nothing yet.
    pub fn new() -> Self {
        Recorded {
            blocks: Recording::default(),
            kept: HashMap::new(),
            thread: std::thread::current().id(),
        }
    }

    /// Whether this thread records.
    pub fn is_mine(&self) -> bool {
        self.thread == std::thread::current().id()
    }

    /// Holds what owns the memory at an address, unless it is one of the recording's own blocks, which must return to it.
    pub fn keep<T: Any + Send + Sync>(&mut self, address: u64, owner: &Arc<T>) {
        if !self.blocks.holds(address) {
            self.kept.entry(address).or_insert_with(|| owner.clone());
        }
    }
}
