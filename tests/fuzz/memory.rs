//! What a case allocates, counted, and an end to it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The most bytes that a reader may hold at once; beyond, an allocation fails, which ends the process.
pub const MOST: usize = 2 << 30;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counting.
pub struct Counting;

impl Counting {
    /// Starts to look for a new peak; returns what is held now.
    pub fn begin() -> usize {
        let held = HELD.load(Ordering::Relaxed);
        PEAK.store(held, Ordering::Relaxed);
        held
    }

    /// The most bytes held at once since [`Counting::begin`].
    pub fn peak() -> usize {
        PEAK.load(Ordering::Relaxed)
    }
}

fn take(bytes: usize) -> bool {
    let held = HELD.fetch_add(bytes, Ordering::Relaxed) + bytes;
    if held > MOST {
        HELD.fetch_sub(bytes, Ordering::Relaxed);
        return false;
    }
    PEAK.fetch_max(held, Ordering::Relaxed);
    true
}

fn give(bytes: usize) {
    HELD.fetch_sub(bytes, Ordering::Relaxed);
}

// SAFETY: every call goes to the system's allocator with the layout that it was given; counting changes nothing of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !take(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's promises are the system allocator's conditions.
        let found = unsafe { System.alloc(layout) };
        if found.is_null() {
            give(layout.size());
        }
        found
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !take(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: as above.
        let found = unsafe { System.alloc_zeroed(layout) };
        if found.is_null() {
            give(layout.size());
        }
        found
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let more = size.saturating_sub(layout.size());
        if !take(more) {
            return std::ptr::null_mut();
        }
        // SAFETY: as above.
        let found = unsafe { System.realloc(place, layout, size) };
        match found.is_null() {
            true => give(more),
            false => give(layout.size().saturating_sub(size)),
        }
        found
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        give(layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(place, layout) }
    }
}
