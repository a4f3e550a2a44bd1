//! What was loaded from disk, kept in host memory as long as there is room, so that later epochs read nothing.
//!
//! Entries stay until the end: the next epoch needs every one of them again, in another order, so that making room for a
//! new one would only move the reading elsewhere.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// Bytes that several stores share.
#[derive(Debug)]
pub struct Room(AtomicUsize);

impl Room {
    /// Room for so many bytes.
    pub fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Room(AtomicUsize::new(bytes)))
    }

    /// Takes `bytes`, if they are there.
    fn take(&self, bytes: usize) -> bool {
        let take = |left: usize| left.checked_sub(bytes);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Values by key, shared by threads; see the module's head comment.
#[derive(Debug)]
pub struct Kept<K, V> {
    room: Arc<Room>,
    entries: RwLock<HashMap<K, Arc<V>>>,
}

impl<K: Eq + Hash + Clone, V> Kept<K, V> {
    /// An empty store with a part in `room`.
    pub fn new(room: Arc<Room>) -> Self {
        Kept {
            room,
            entries: RwLock::default(),
        }
    }

    /// The value of `key`: the one that is kept, or what `load` gives, which is kept where there is room for its bytes.
    ///
    /// # Errors
    /// Those of `load`.
    pub fn get<E>(
        &self,
        key: &K,
        bytes: impl Fn(&V) -> usize,
        load: impl FnOnce() -> Result<V, E>,
    ) -> Result<Arc<V>, E> {
        let known = self
            .entries
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(key)
            .cloned();
        if let Some(value) = known {
            return Ok(value);
        }
        let value = Arc::new(load()?);
        let bytes = bytes(&value);
        if self.room.take(bytes) {
            let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
            // Another thread may have loaded the same meanwhile.
            if entries.insert(key.clone(), value.clone()).is_some() {
                self.room.give_back(bytes);
            }
        }
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_is_loaded_once() {
        let room = Room::new(10);
        let kept = [Kept::new(room.clone()), Kept::new(room)];
        let mut loads = 0;
        let mut get = |store: usize, key: u32| {
            let load = || {
                loads += 1;
                Ok::<_, ()>(vec![key as u8; 4])
            };
            assert_eq!(*kept[store].get(&key, Vec::len, load).unwrap(), [key as u8; 4]);
            loads
        };
        assert_eq!([get(0, 1), get(0, 1), get(1, 1), get(1, 1)], [1, 1, 2, 2]);
        // Two bytes are left: the third entry is loaded every time.
        assert_eq!([get(0, 2), get(0, 2), get(0, 1)], [3, 4, 4]);
        assert!(kept[0].get(&9, Vec::len, || Err::<Vec<u8>, _>("damaged")).is_err());
    }
}
