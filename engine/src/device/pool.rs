//! The memory pool of one GPU.
//!
//! One range of virtual addresses is reserved once and backed with physical memory as far as it is needed ([`Arena`]). Blocks are cut from
//! it best fit and merged with free neighbours when they return, so that whatever a phase frees the next one can use, whatever the sizes.
//! All work of a device runs on one stream, so a block may be handed out again at once: later work on the stream finds earlier work done.
//!
//! Where the driver has no virtual memory management, and when [`PoolKind::Direct`] asks for it (compute-sanitizer then sees
//! the bounds of every tensor), each allocation is the driver's own.

mod arena;
mod free_blocks;
mod physical;

use std::ops::Range;

use cudarc::driver::{result, sys};

use super::driver::check;
use super::options::PoolKind;
use crate::error::Result;
use arena::{Arena, no_room};
use free_blocks::FreeBlocks;
use physical::{Driver, Outcome, Physical};

/// Blocks start and end on multiples of this many bytes; at least what bulk tensor copies and cuBLASLt ask for.
const BLOCK_ALIGNMENT: u64 = 512;

/// A pool of device memory; see the module's head comment.
pub(super) struct Pool(Kind);

enum Kind {
    Arena(Arena<Driver>),
    Direct,
}

impl Pool {
    /// A pool of this kind for the device with ordinal `device` and `total` bytes of memory.
    pub fn new(kind: PoolKind, device: i32, total: u64) -> Result<Self> {
        if kind == PoolKind::Direct || !supports_virtual_memory(device)? {
            return Ok(Pool(Kind::Direct));
        }
        Ok(Pool(Kind::Arena(Arena::new(Driver::new(device, total)?, total))))
    }

    /// The address of a new block of at least `bytes` bytes, or the driver's error.
    pub fn allocate(&mut self, bytes: u64) -> Outcome<u64> {
        match &mut self.0 {
            Kind::Arena(arena) => arena.allocate(block_size(bytes)),
            // SAFETY: allocates; the block is freed once, in `free`.
            Kind::Direct => unsafe { result::malloc_sync(bytes.max(1) as usize) },
        }
    }

    /// As [`Pool::allocate`], for work that is recorded.
    pub fn allocate_recorded(&mut self, recording: &mut Recording, bytes: u64) -> Outcome<u64> {
        let address = match &mut self.0 {
            Kind::Arena(arena) => recording.allocate(arena, block_size(bytes))?,
            Kind::Direct => {
                let address = self.allocate(bytes)?;
                recording.taken.push((address, block_size(bytes)));
                address
            }
        };
        recording.live += 1;
        Ok(address)
    }

    /// Takes back a block of `bytes` bytes that `allocate` gave out.
    pub fn free(&mut self, address: u64, bytes: u64) {
        match &mut self.0 {
            Kind::Arena(arena) => arena.free(address, block_size(bytes)),
            Kind::Direct => {
                // SAFETY: the caller owns the block; cuMemFree waits for the work that still uses it.
                if let Err(error) = unsafe { result::free_sync(address) } {
                    tracing::warn!("freeing device memory failed: {error}");
                }
            }
        }
    }

    /// Whether a block of `bytes` bytes would take new memory from the driver although there is some under free blocks that could be moved.
    /// After so many times that it is not: where sizes alternate, moving memory, which waits for the GPU, could go on for ever.
    pub fn should_compact(&mut self, bytes: u64) -> bool {
        match &mut self.0 {
            Kind::Arena(arena) => arena.should_compact(block_size(bytes)),
            Kind::Direct => false,
        }
    }

    /// Takes the physical memory from under what is free, to back other addresses with it. Nothing that uses free memory may be under way.
    /// Says whether there was any.
    pub fn compact(&mut self) -> bool {
        match &mut self.0 {
            Kind::Arena(arena) => arena.compact(),
            Kind::Direct => false,
        }
    }

    /// Bytes of physical memory taken from the driver; 0 when each allocation is the driver's own.
    pub fn reserved(&self) -> u64 {
        match &self.0 {
            Kind::Arena(arena) => arena.reserved(),
            Kind::Direct => 0,
        }
    }
}

fn block_size(bytes: u64) -> u64 {
    bytes.max(1).next_multiple_of(BLOCK_ALIGNMENT)
}

fn supports_virtual_memory(device: i32) -> Result<bool> {
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED;
    // SAFETY: `device` is a handle the driver gave out.
    let value = unsafe { result::device::get_attribute(device, attribute) };
    Ok(check("cuDeviceGetAttribute", value)? != 0)
}

/// The blocks of a recording: what it frees it gets again, and nobody else does.
#[derive(Default)]
pub(super) struct Recording {
    /// Addresses and sizes of the blocks that came from the pool.
    pub taken: Vec<(u64, u64)>,
    /// Tensors on these blocks that are alive.
    pub live: usize,
    free_blocks: FreeBlocks,
}

impl Recording {
    /// A block of `size` bytes, from what the recording has freed, from what is free behind that, or from the arena; whatever takes the
    /// least new memory.
    fn allocate<P: Physical>(&mut self, arena: &mut Arena<P>, size: u64) -> Outcome<u64> {
        if let Some(address) = self.free_blocks.take(size) {
            return Ok(address);
        }
        let lengthening = self.cheapest_lengthening(arena, size);
        match lengthening {
            Some((places, missing, at)) if places.is_empty() || arena.growth(size) >= places.end - places.start => {
                arena.back(places)?;
                arena.free_blocks().take_at(at, missing);
                self.taken.push((at, missing));
                self.free_blocks.insert(at, missing);
                self.free_blocks.take(size).ok_or_else(no_room)
            }
            _ => {
                let address = arena.allocate(size)?;
                self.taken.push((address, size));
                Ok(address)
            }
        }
    }

    /// How one of the recording's own free blocks becomes one of `size` bytes: the places to be backed for it, the bytes that are missing,
    /// and where they begin. What small tensors have left serves large ones.
    fn cheapest_lengthening<P: Physical>(&self, arena: &Arena<P>, size: u64) -> Option<(Range<u64>, u64, u64)> {
        let ways = self.free_blocks.iter().filter_map(|(address, own)| {
            let missing = size.checked_sub(own)?;
            Some((arena.places_for(address + own, missing)?, missing, address + own))
        });
        ways.min_by_key(|(places, missing, at)| (places.end - places.start, *missing, *at))
    }

    /// Whether the address lies in one of the recording's own blocks.
    pub fn holds(&self, address: u64) -> bool {
        let mut taken = self.taken.iter();
        taken.any(|(start, size)| (*start..start + size).contains(&address))
    }

    /// Takes back a block of `bytes` bytes if it is one of the recording's; says whether it was.
    pub fn free(&mut self, address: u64, bytes: u64) -> bool {
        let mine = self.holds(address);
        if mine {
            self.free_blocks.insert(address, block_size(bytes));
            self.live = self.live.saturating_sub(1);
        }
        mine
    }
}

#[cfg(test)]
mod tests {
    use super::arena::tests::arena;
    use super::physical::PIECE;
    use super::*;

    /// What the pool has behind a recording's block is taken as far as it is missing, and returns as two pieces that merge.
    #[test]
    fn recordings_lengthen_their_blocks() {
        let mut arena = arena(1);
        let start = arena.allocate(PIECE).unwrap();
        arena.free(start, PIECE);
        let mut recording = Recording::default();
        assert_eq!(recording.allocate(&mut arena, 1024).unwrap(), start);
        assert!(recording.free(start, 1024));
        assert_eq!(recording.allocate(&mut arena, 4096).unwrap(), start);
        assert!(recording.free(start, 4096));
        assert_eq!(recording.taken, [(start, 1024), (start + 1024, 3072)]);
        for (address, bytes) in recording.taken {
            arena.free(address, bytes);
        }
        assert_eq!(arena.free_blocks().iter().collect::<Vec<_>>(), [(start, PIECE)]);
    }

    /// Where nothing is free behind it, a block is lengthened by new memory, which is less than a block of its own would take.
    #[test]
    fn new_memory_lengthens_blocks() {
        let mut arena = arena(10);
        let mut recording = Recording::default();
        let start = recording.allocate(&mut arena, 4 * PIECE).unwrap();
        assert!(recording.free(start, 4 * PIECE));
        assert_eq!(recording.allocate(&mut arena, 6 * PIECE).unwrap(), start);
        assert_eq!(arena.reserved(), 6 * PIECE);
        // Another's block ends that.
        let other = arena.allocate(PIECE).unwrap();
        assert_eq!(other, start + 6 * PIECE);
        assert!(recording.free(start, 6 * PIECE));
        assert!(recording.allocate(&mut arena, 7 * PIECE).is_err());
        assert_eq!(recording.allocate(&mut arena, 3 * PIECE).unwrap(), start);
    }
}
