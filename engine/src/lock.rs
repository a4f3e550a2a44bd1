//! Locks that outlive a panic.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, also after a thread has panicked while it held the lock. What is kept under the engine's locks (accounts, free
/// blocks, tables of kernels, queues, lists of damages) is whole between any two steps of a change, and has to be reached while a
/// panic unwinds: buffers return what they hold when they are dropped, and a second panic there would end the process without a
/// word on the first.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
