//! The memory pool of one GPU.
//!
//! One contiguous range of virtual addresses, as large as the card, is reserved once and backed with physical memory from
//! its start as far as it is needed. Blocks are cut from it best fit and merged with free neighbours when they return, so
//! that whatever a phase frees the next one can use, whatever the sizes. All work of a device runs on one stream, so a
//! block may be handed out again at once: later work on the stream finds earlier work done.
//!
//! Where the driver has no virtual memory management, and when [`PoolKind::Direct`] asks for it (compute-sanitizer then sees
//! the bounds of every tensor), each allocation is the driver's own.

use std::collections::{BTreeMap, BTreeSet};

use cudarc::driver::{result, sys};

use super::driver::check;
use super::options::PoolKind;
use crate::error::Result;

/// Blocks start and end on multiples of this many bytes; at least what bulk tensor copies and cuBLASLt ask for.
const BLOCK_ALIGNMENT: u64 = 512;

/// Physical memory is added in steps of at least this many bytes.
const SMALLEST_GROWTH: u64 = 32 << 20;

/// A pool of device memory; see the module's head comment.
pub(super) enum Pool {
    Arena(Arena),
    Direct,
}

impl Pool {
    /// A pool of this kind for the device with ordinal `device` and `total` bytes of memory.
    pub fn new(kind: PoolKind, device: i32, total: u64) -> Result<Self> {
        if kind == PoolKind::Direct || !supports_virtual_memory(device)? {
            return Ok(Pool::Direct);
        }
        Ok(Pool::Arena(Arena::new(device, total)?))
    }

    /// The address of a new block of at least `bytes` bytes, or the driver's error.
    pub fn allocate(&mut self, bytes: u64) -> std::result::Result<u64, result::DriverError> {
        match self {
            Pool::Arena(arena) => arena.allocate(bytes),
            // SAFETY: allocates; the block is freed once, in `free`.
            Pool::Direct => unsafe { result::malloc_sync(bytes.max(1) as usize) },
        }
    }

    /// Takes back a block of `bytes` bytes that `allocate` gave out.
    pub fn free(&mut self, address: u64, bytes: u64) {
        match self {
            Pool::Arena(arena) => arena.free_blocks.insert(address, block_size(bytes)),
            Pool::Direct => {
                // SAFETY: the caller owns the block; cuMemFree waits for the work that still uses it.
                if let Err(error) = unsafe { result::free_sync(address) } {
                    tracing::warn!("freeing device memory failed: {error}");
                }
            }
        }
    }

    /// Bytes of physical memory taken from the driver; 0 when each allocation is the driver's own.
    pub fn reserved(&self) -> u64 {
        match self {
            Pool::Arena(arena) => arena.mapped,
            Pool::Direct => 0,
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
    /// A block of at least `bytes` bytes, from what the recording has freed or from the pool.
    pub fn allocate(&mut self, pool: &mut Pool, bytes: u64) -> std::result::Result<u64, result::DriverError> {
        let size = block_size(bytes);
        let own = self.free_blocks.take(size);
        let address = match own.or_else(|| self.take_lengthened(pool, size)) {
            Some(address) => address,
            None => {
                let address = pool.allocate(size)?;
                self.taken.push((address, size));
                address
            }
        };
        self.live += 1;
        Ok(address)
    }

    /// A block of `size` bytes, of one of the recording's own and what is missing from behind it, where the pool has that free: what
    /// small tensors have left serves large ones.
    fn take_lengthened(&mut self, pool: &mut Pool, size: u64) -> Option<u64> {
        let Pool::Arena(arena) = pool else { return None };
        let mine = self.free_blocks.by_address.iter();
        let fitting = mine.filter_map(|(&address, &own)| {
            let missing = size.checked_sub(own)?;
            let behind = *arena.free_blocks.by_address.get(&(address + own))?;
            (behind >= missing).then_some((missing, address + own))
        });
        let (missing, address) = fitting.min()?;
        arena.free_blocks.take_at(address, missing);
        self.taken.push((address, missing));
        self.free_blocks.insert(address, missing);
        self.free_blocks.take(size)
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

/// The reserved range and what is known of it.
pub(super) struct Arena {
    device: i32,
    start: u64,
    /// Bytes of reserved addresses.
    capacity: u64,
    /// Bytes backed with physical memory, from the start on.
    mapped: u64,
    /// Physical memory comes in multiples of this many bytes.
    granularity: u64,
    free_blocks: FreeBlocks,
    /// Mapped pieces: offset, bytes, handle.
    pieces: Vec<(u64, u64, sys::CUmemGenericAllocationHandle)>,
}

impl Arena {
    fn new(device: i32, total: u64) -> Result<Self> {
        let properties = allocation_properties(device);
        let mut granularity = 0;
        // SAFETY: plain out-parameter.
        let outcome = unsafe {
            sys::cuMemGetAllocationGranularity(
                &mut granularity,
                &properties,
                sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED,
            )
        };
        check("cuMemGetAllocationGranularity", outcome.result())?;
        let granularity = granularity as u64;
        let capacity = total.next_multiple_of(granularity);
        let mut start = 0;
        // SAFETY: reserves addresses, touches no memory; released in `drop`.
        let outcome = unsafe { sys::cuMemAddressReserve(&mut start, capacity as usize, 0, 0, 0) };
        check("cuMemAddressReserve", outcome.result())?;
        Ok(Arena {
            device,
            start,
            capacity,
            mapped: 0,
            granularity,
            free_blocks: FreeBlocks::default(),
            pieces: Vec::new(),
        })
    }

    fn allocate(&mut self, bytes: u64) -> std::result::Result<u64, result::DriverError> {
        let size = block_size(bytes);
        if let Some(address) = self.free_blocks.take(size) {
            return Ok(address);
        }
        // A free block at the end of the mapped range only needs to be made longer.
        let missing = size - self.free_blocks.ending_at(self.start + self.mapped);
        self.grow(missing)?;
        Ok(self
            .free_blocks
            .take(size)
            .expect("the block at the end is long enough now"))
    }

    fn grow(&mut self, missing: u64) -> std::result::Result<(), result::DriverError> {
        let smallest = missing.next_multiple_of(self.granularity);
        let wanted = smallest.max(SMALLEST_GROWTH).min(self.capacity - self.mapped);
        if smallest > self.capacity - self.mapped {
            return Err(result::DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY));
        }
        match self.map(wanted) {
            Err(_) if smallest < wanted => self.map(smallest),
            outcome => outcome,
        }
    }

    /// Backs the next `bytes` bytes of the range with physical memory.
    fn map(&mut self, bytes: u64) -> std::result::Result<(), result::DriverError> {
        let properties = allocation_properties(self.device);
        let address = self.start + self.mapped;
        let mut handle = 0;
        // SAFETY: the range [address, address + bytes) lies in the reservation and is not mapped yet; on failure the
        // handle is released and nothing is recorded.
        unsafe {
            sys::cuMemCreate(&mut handle, bytes as usize, &properties, 0).result()?;
            if let Err(error) = map_and_open(address, bytes, handle, self.device) {
                // The mapping's own error is the one worth reporting.
                let _ = sys::cuMemRelease(handle);
                return Err(error);
            }
        }
        self.pieces.push((self.mapped, bytes, handle));
        self.mapped += bytes;
        self.free_blocks.insert(address, bytes);
        Ok(())
    }
}

/// Maps physical memory and allows the device to use it; undoes the mapping when that is refused.
///
/// # Safety
/// The range must be reserved, unmapped and as large as the handle's memory.
unsafe fn map_and_open(
    address: u64,
    bytes: u64,
    handle: sys::CUmemGenericAllocationHandle,
    device: i32,
) -> std::result::Result<(), result::DriverError> {
    let access = sys::CUmemAccessDesc {
        location: location(device),
        flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };
    // SAFETY: by the caller's promise.
    unsafe {
        sys::cuMemMap(address, bytes as usize, 0, handle, 0).result()?;
        if let Err(error) = sys::cuMemSetAccess(address, bytes as usize, &access, 1).result() {
            // The refusal is the error worth reporting.
            let _ = sys::cuMemUnmap(address, bytes as usize);
            return Err(error);
        }
    }
    Ok(())
}

fn location(device: i32) -> sys::CUmemLocation {
    // SAFETY: a plain C structure for which all zeros is a valid value.
    let mut location: sys::CUmemLocation = unsafe { std::mem::zeroed() };
    location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    location.id = device;
    location
}

fn allocation_properties(device: i32) -> sys::CUmemAllocationProp {
    // SAFETY: a plain C structure for which all zeros is a valid value.
    let mut properties: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
    properties.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location = location(device);
    properties
}

impl Drop for Arena {
    fn drop(&mut self) {
        for (offset, bytes, handle) in self.pieces.drain(..) {
            // SAFETY: mapped in `map` and owned by this arena; no buffer is left, each holds the device alive. Errors at
            // this point (a lost context) leave nothing to be done.
            unsafe {
                let _ = sys::cuMemUnmap(self.start + offset, bytes as usize);
                let _ = sys::cuMemRelease(handle);
            }
        }
        // SAFETY: reserved in `new`, all mappings are gone.
        unsafe {
            let _ = sys::cuMemAddressFree(self.start, self.capacity as usize);
        }
    }
}

/// Free blocks, found by size and by address.
#[derive(Default)]
struct FreeBlocks {
    by_size: BTreeSet<(u64, u64)>,
    by_address: BTreeMap<u64, u64>,
}

impl FreeBlocks {
    /// Takes `size` bytes off the smallest block that is large enough.
    fn take(&mut self, size: u64) -> Option<u64> {
        let &(_, address) = self.by_size.range((size, 0)..).next()?;
        self.take_at(address, size);
        Some(address)
    }

    /// Takes the first `size` bytes of the free block at `address`, which has as many.
    fn take_at(&mut self, address: u64, size: u64) {
        let found = self.by_address[&address];
        self.remove(address, found);
        if found > size {
            self.add(address + size, found - size);
        }
    }

    /// Adds a block, merged with the free blocks that touch it.
    fn insert(&mut self, mut address: u64, mut size: u64) {
        if let Some((&before, &before_size)) = self.by_address.range(..address).next_back()
            && before + before_size == address
        {
            self.remove(before, before_size);
            (address, size) = (before, size + before_size);
        }
        if let Some(&after_size) = self.by_address.get(&(address + size)) {
            self.remove(address + size, after_size);
            size += after_size;
        }
        self.add(address, size);
    }

    /// The size of the free block that ends at `end`, 0 when there is none.
    fn ending_at(&self, end: u64) -> u64 {
        match self.by_address.range(..end).next_back() {
            Some((&address, &size)) if address + size == end => size,
            _ => 0,
        }
    }

    fn add(&mut self, address: u64, size: u64) {
        self.by_size.insert((size, address));
        self.by_address.insert(address, size);
    }

    fn remove(&mut self, address: u64, size: u64) {
        self.by_size.remove(&(size, address));
        self.by_address.remove(&address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_block_that_fits_is_cut() {
        let mut blocks = FreeBlocks::default();
        blocks.insert(0, 1000);
        blocks.insert(5000, 300);
        assert_eq!(blocks.take(200), Some(5000));
        assert_eq!(blocks.take(200), Some(0));
        assert_eq!(blocks.take(900), None);
        assert_eq!(blocks.take(800), Some(200));
        assert_eq!(blocks.ending_at(5300), 100);
    }

    /// What the pool has behind a recording's block is taken as far as it is missing, and returns as two pieces that merge.
    #[test]
    fn recordings_lengthen_their_blocks() {
        let mut pool = Pool::Arena(Arena {
            device: 0,
            start: 0,
            capacity: 1 << 20,
            mapped: 1 << 20,
            granularity: 1 << 20,
            free_blocks: FreeBlocks::default(),
            pieces: Vec::new(),
        });
        pool.free(0, 1 << 20);
        let mut recording = Recording::default();
        assert_eq!(recording.allocate(&mut pool, 1024).unwrap(), 0);
        assert!(recording.free(0, 1024));
        assert_eq!(recording.allocate(&mut pool, 4096).unwrap(), 0);
        assert!(recording.free(0, 4096));
        assert_eq!(recording.taken, [(0, 1024), (1024, 3072)]);
        for (address, bytes) in recording.taken {
            pool.free(address, bytes);
        }
        let Pool::Arena(arena) = &mut pool else {
            unreachable!("made so above")
        };
        assert_eq!(arena.free_blocks.by_address.len(), 1);
        // Nothing was reserved that could be given back.
        std::mem::forget(pool);
    }

    #[test]
    fn returned_blocks_merge_with_both_neighbours() {
        let mut blocks = FreeBlocks::default();
        blocks.insert(0, 100);
        blocks.insert(200, 100);
        assert_eq!(blocks.take(300), None);
        blocks.insert(100, 100);
        assert_eq!(blocks.by_address.len(), 1);
        assert_eq!(blocks.take(300), Some(0));
        assert!(blocks.by_size.is_empty());
    }
}
