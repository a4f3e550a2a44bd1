//! Physical memory and addresses, as the driver gives them.

use cudarc::driver::{result, sys};

use super::super::driver::check;
use crate::error::Result;

/// Bytes of a piece of physical memory: small beside what a phase leaves, and so large that those of a whole card are few.
pub(super) const PIECE: u64 = 32 << 20;

/// What a call of the driver gives.
pub(super) type Outcome<T> = std::result::Result<T, result::DriverError>;

/// A range of addresses, pieces of physical memory, and what brings them together.
pub(super) trait Physical {
    /// A piece of physical memory that is mapped nowhere.
    type Piece;

    /// Where the addresses begin.
    fn start(&self) -> u64;

    /// Bytes of addresses.
    fn capacity(&self) -> u64;

    /// Takes `bytes` bytes of physical memory from the driver.
    fn create(&mut self, bytes: u64) -> Outcome<Self::Piece>;

    /// Backs the addresses from `address` on, of which nothing is backed, with these pieces of `bytes` bytes each. On failure none is.
    fn map(&mut self, address: u64, bytes: u64, pieces: &[Self::Piece]) -> Outcome<()>;

    /// Takes the piece of `bytes` bytes away from under `address`. Nothing may use the memory any more.
    fn unmap(&mut self, address: u64, bytes: u64) -> Outcome<()>;
}

/// The driver's, on one device.
pub(super) struct Driver {
    device: i32,
    start: u64,
    capacity: u64,
}

/// A piece of physical memory; given back to the driver when it is dropped and no longer mapped.
pub(super) struct Piece(sys::CUmemGenericAllocationHandle);

impl Drop for Piece {
    fn drop(&mut self) {
        // SAFETY: the driver gave out the handle, which is released once; memory that is still mapped stays until it is unmapped. Errors at
        // this point (a lost context) leave nothing to be done.
        unsafe {
            let _ = sys::cuMemRelease(self.0);
        }
    }
}

impl Driver {
    /// Addresses for twice the `total` bytes of the device: memory moves to where it is needed, and leaves addresses without.
    pub fn new(device: i32, total: u64) -> Result<Self> {
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
        // Pieces are multiples of every granularity there is, 2 MiB.
        let capacity = (2 * total).next_multiple_of(PIECE.max(granularity as u64));
        let mut start = 0;
        // SAFETY: reserves addresses, touches no memory; released in `drop`.
        let outcome = unsafe { sys::cuMemAddressReserve(&mut start, capacity as usize, 0, 0, 0) };
        check("cuMemAddressReserve", outcome.result())?;
        Ok(Driver {
            device,
            start,
            capacity,
        })
    }
}

impl Physical for Driver {
    type Piece = Piece;

    fn start(&self) -> u64 {
        self.start
    }

    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn create(&mut self, bytes: u64) -> Outcome<Piece> {
        let mut handle = 0;
        // SAFETY: plain out-parameter; the handle is released when the piece is dropped.
        unsafe { sys::cuMemCreate(&mut handle, bytes as usize, &allocation_properties(self.device), 0) }.result()?;
        Ok(Piece(handle))
    }

    fn map(&mut self, address: u64, bytes: u64, pieces: &[Piece]) -> Outcome<()> {
        let access = sys::CUmemAccessDesc {
            location: location(self.device),
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        let place = |number: usize| address + number as u64 * bytes;
        let all = pieces.len() as u64 * bytes;
        // SAFETY: the caller gives addresses of the reservation that are not backed, and pieces of that size.
        let map =
            |number: usize| unsafe { sys::cuMemMap(place(number), bytes as usize, 0, pieces[number].0, 0).result() };
        let mut mapped = 0;
        let mut outcome = Ok(());
        while mapped < pieces.len() && outcome.is_ok() {
            outcome = map(mapped);
            mapped += usize::from(outcome.is_ok());
        }
        let outcome = outcome.and_then(|()| {
            // SAFETY: all of it was mapped above.
            unsafe { sys::cuMemSetAccess(address, all as usize, &access, 1) }.result()
        });
        if outcome.is_err() {
            // The refusal is the error worth reporting.
            for number in 0..mapped {
                let _ = self.unmap(place(number), bytes);
            }
        }
        outcome
    }

    fn unmap(&mut self, address: u64, bytes: u64) -> Outcome<()> {
        // SAFETY: the caller gives what `map` has mapped as one piece, and nothing uses it.
        unsafe { sys::cuMemUnmap(address, bytes as usize) }.result()
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // SAFETY: reserved in `new`; the arena has unmapped everything. Errors at this point (a lost context) leave nothing to be done.
        unsafe {
            let _ = sys::cuMemAddressFree(self.start, self.capacity as usize);
        }
    }
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
