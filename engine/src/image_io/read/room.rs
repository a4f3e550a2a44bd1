//! Memory for decoding, shared by all threads: however many of them decode, together they take no more than
//! [`DECODING_BYTES`].

use std::sync::{Condvar, Mutex, PoisonError};

use crate::limits::DECODING_BYTES;
use crate::lock::lock;

static ROOM: Room = Room {
    turn: Mutex::new(()),
    taken: Mutex::new(0),
    given_back: Condvar::new(),
};

struct Room {
    /// Held by the one who waits, so that a large picture is not overtaken by small ones for ever.
    turn: Mutex<()>,
    /// Bytes.
    taken: Mutex<u64>,
    given_back: Condvar,
}

/// Bytes that were taken; dropping this gives them back. Whoever holds it must not wait for work that may take more.
pub(super) struct Taken(u64);

/// Waits until there are so many bytes, at most [`DECODING_BYTES`], and takes them.
pub(super) fn take(bytes: u64) -> Taken {
    let bytes = bytes.min(DECODING_BYTES);
    let _turn = lock(&ROOM.turn);
    let mut taken = lock(&ROOM.taken);
    while *taken + bytes > DECODING_BYTES {
        taken = ROOM.given_back.wait(taken).unwrap_or_else(PoisonError::into_inner);
    }
    *taken += bytes;
    Taken(bytes)
}

impl Drop for Taken {
    fn drop(&mut self) {
        *lock(&ROOM.taken) -= self.0;
        ROOM.given_back.notify_all();
    }
}

/// `length` zeros, or that there is no memory for them; a decoder's own `vec!` would end the program.
pub(super) fn zeros(length: usize) -> Result<Vec<u8>, String> {
    let mut bytes = with_room(length)?;
    bytes.resize(length, 0);
    Ok(bytes)
}

/// An empty list with room for `length` bytes, or that there is no memory for them.
pub(super) fn with_room(length: usize) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    match bytes.try_reserve_exact(length) {
        Ok(()) => Ok(bytes),
        Err(_) => Err(format!("cannot be decoded: there is no memory for its {length} bytes")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn many_threads_together_take_no_more_than_there_is() {
        let (now, most) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let (now, most) = (&now, &most);
                scope.spawn(move || {
                    for turn in 0..50 {
                        let bytes = DECODING_BYTES / (2 + (thread + turn) % 5);
                        let taken = take(bytes);
                        most.fetch_max(now.fetch_add(bytes, Ordering::SeqCst) + bytes, Ordering::SeqCst);
                        now.fetch_sub(bytes, Ordering::SeqCst);
                        drop(taken);
                    }
                });
            }
        });
        assert!(most.into_inner() <= DECODING_BYTES);
        // What asks for more than there is gets all of it, alone.
        drop(take(u64::MAX));
    }
}
