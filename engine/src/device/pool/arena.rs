//! A range of addresses that is backed with physical memory where it is needed.
//!
//! Physical memory comes in pieces of [`PIECE`] bytes and is kept for good. A piece that lies wholly in free memory can be taken from there
//! ([`Arena::compact`]) and back other addresses: what a phase has left between the blocks that outlive it becomes one block again for the
//! next, although nothing is copied and no address changes.

use std::collections::BTreeMap;
use std::ops::Range;

use cudarc::driver::{result, sys};

use super::free_blocks::FreeBlocks;
use super::physical::{Outcome, PIECE, Physical};

/// How often memory is moved because a block is asked for; loading a model and a first step need it a few times.
const MOST_COMPACTIONS: usize = 64;

/// See the module's head comment.
pub(super) struct Arena<P: Physical> {
    physical: P,
    /// Pieces of physical memory that there may be.
    most: usize,
    free_blocks: FreeBlocks,
    /// The mapped pieces, by the number of the place that they back.
    mapped: BTreeMap<u64, P::Piece>,
    /// Pieces that back nothing.
    spare: Vec<P::Piece>,
    /// How often memory was moved because a block was asked for.
    compactions: usize,
}

impl<P: Physical> Arena<P> {
    /// One that may take `total` bytes of physical memory.
    pub fn new(physical: P, total: u64) -> Self {
        Arena {
            physical,
            most: (total / PIECE) as usize,
            free_blocks: FreeBlocks::default(),
            mapped: BTreeMap::new(),
            spare: Vec::new(),
            compactions: 0,
        }
    }

    /// The address of a block of `size` bytes.
    pub fn allocate(&mut self, size: u64) -> Outcome<u64> {
        if let Some(address) = self.free_blocks.take(size) {
            return Ok(address);
        }
        let places = self.cheapest(size).ok_or_else(no_room)?;
        self.back(places)?;
        self.free_blocks.take(size).ok_or_else(no_room)
    }

    /// See [`super::Pool::should_compact`].
    pub fn should_compact(&mut self, size: u64) -> bool {
        let needed = self.growth(size);
        let moves = self.compactions < MOST_COMPACTIONS
            && needed > self.spare.len() as u64
            && self.whole_places().next().is_some();
        self.compactions += usize::from(moves);
        moves
    }

    /// The places whose memory lies wholly in free blocks.
    fn whole_places(&self) -> impl Iterator<Item = u64> + '_ {
        let start = self.physical.start();
        let whole =
            move |(address, size): (u64, u64)| (address - start).div_ceil(PIECE)..(address + size - start) / PIECE;
        self.free_blocks.iter().flat_map(whole)
    }

    /// Takes back what `allocate` has given.
    pub fn free(&mut self, address: u64, size: u64) {
        self.free_blocks.insert(address, size);
    }

    /// What is free.
    pub fn free_blocks(&mut self) -> &mut FreeBlocks {
        &mut self.free_blocks
    }

    /// Bytes of physical memory.
    pub fn reserved(&self) -> u64 {
        (self.mapped.len() + self.spare.len()) as u64 * PIECE
    }

    /// Takes the pieces from under free memory, where nothing may be under way; says whether there were any.
    pub fn compact(&mut self) -> bool {
        let places: Vec<u64> = self.whole_places().collect();
        let mut any = false;
        for place in places {
            let address = self.address(place);
            // What cannot be unmapped stays where it is.
            if self.physical.unmap(address, PIECE).is_ok()
                && let Some(piece) = self.mapped.remove(&place)
            {
                self.free_blocks.take_out(address, PIECE);
                self.spare.push(piece);
                any = true;
            }
        }
        any
    }

    /// Pieces of physical memory that a block of `size` bytes needs anew.
    pub fn growth(&self, size: u64) -> u64 {
        match self.free_blocks.fits(size) {
            true => 0,
            false => self.cheapest(size).map_or(u64::MAX, |places| places.end - places.start),
        }
    }

    /// The places to be backed, if any, so that `bytes` bytes from `address` on are free; `None` where something else is in the way.
    pub fn places_for(&self, address: u64, bytes: u64) -> Option<Range<u64>> {
        let free = self.free_blocks.at(address).unwrap_or(0);
        let behind = address + free - self.physical.start();
        let first = behind / PIECE;
        let places = first..first + bytes.saturating_sub(free).div_ceil(PIECE);
        let unbacked = behind.is_multiple_of(PIECE)
            && places.end <= self.physical.capacity() / PIECE
            && self.mapped.range(places.clone()).next().is_none();
        (places.is_empty() || unbacked).then_some(places)
    }

    fn address(&self, place: u64) -> u64 {
        self.physical.start() + place * PIECE
    }

    /// The fewest places that are to be backed so that `size` bytes are free in a row; of equal ones the first. Behind the last backed place
    /// there is always room, as long as there are addresses.
    fn cheapest(&self, size: u64) -> Option<Range<u64>> {
        let last = self.physical.capacity() / PIECE;
        let mut best: Option<Range<u64>> = None;
        let mut first = 0;
        let mut consider = |places: Range<u64>| {
            if places.is_empty() {
                return;
            }
            let before = self.free_blocks.ending_at(self.address(places.start));
            let needed = size.saturating_sub(before).div_ceil(PIECE).max(1);
            let all = places.end - places.start;
            let places = match needed <= all {
                true => places.start..places.start + needed,
                // What is free behind them may be enough.
                false if before + all * PIECE + self.free_blocks.at(self.address(places.end)).unwrap_or(0) >= size => {
                    places
                }
                false => return,
            };
            if best
                .as_ref()
                .is_none_or(|best| places.end - places.start < best.end - best.start)
            {
                best = Some(places);
            }
        };
        for &place in self.mapped.keys() {
            consider(first..place);
            first = place + 1;
        }
        consider(first..last);
        best
    }

    /// Backs these places, of which none is backed.
    pub fn back(&mut self, places: Range<u64>) -> Outcome<()> {
        let count = (places.end - places.start) as usize;
        if count == 0 {
            return Ok(());
        }
        let missing = count.saturating_sub(self.spare.len());
        if self.mapped.len() + self.spare.len() + missing > self.most {
            return Err(no_room());
        }
        for _ in 0..missing {
            // Those that were created stay for what is asked next.
            let piece = self.physical.create(PIECE)?;
            self.spare.push(piece);
        }
        let pieces = self.spare.split_off(self.spare.len() - count);
        let address = self.address(places.start);
        if let Err(error) = self.physical.map(address, PIECE, &pieces) {
            self.spare.extend(pieces);
            return Err(error);
        }
        self.mapped.extend(places.zip(pieces));
        self.free_blocks.insert(address, count as u64 * PIECE);
        Ok(())
    }
}

impl<P: Physical> Drop for Arena<P> {
    fn drop(&mut self) {
        for (place, piece) in std::mem::take(&mut self.mapped) {
            // No buffer is left, each holds the device alive. Errors at this point (a lost context) leave nothing to be done.
            let _ = self.physical.unmap(self.address(place), PIECE);
            drop(piece);
        }
    }
}

/// The driver's word for too little memory.
pub(super) fn no_room() -> result::DriverError {
    result::DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Addresses and numbered pieces, with what is mapped where.
    #[derive(Default)]
    pub struct Fake {
        created: usize,
        most: usize,
        places: BTreeMap<u64, usize>,
    }

    const START: u64 = 7 * PIECE;

    impl Physical for Fake {
        type Piece = usize;

        fn start(&self) -> u64 {
            START
        }

        fn capacity(&self) -> u64 {
            64 * PIECE
        }

        fn create(&mut self, bytes: u64) -> Outcome<usize> {
            assert_eq!(bytes, PIECE);
            if self.created == self.most {
                return Err(no_room());
            }
            self.created += 1;
            Ok(self.created)
        }

        fn map(&mut self, address: u64, bytes: u64, pieces: &[usize]) -> Outcome<()> {
            for (number, piece) in (0..).zip(pieces) {
                let place = address + number * bytes;
                assert!(place >= START && place + bytes <= START + self.capacity());
                assert!(
                    !self.places.values().any(|mapped| mapped == piece),
                    "a piece is mapped twice"
                );
                assert!(self.places.insert(place, *piece).is_none(), "a place is backed twice");
            }
            Ok(())
        }

        fn unmap(&mut self, address: u64, _bytes: u64) -> Outcome<()> {
            assert!(self.places.remove(&address).is_some(), "nothing is mapped there");
            Ok(())
        }
    }

    /// One with so many pieces of memory.
    pub fn arena(pieces: usize) -> Arena<Fake> {
        let fake = Fake {
            most: pieces,
            ..Fake::default()
        };
        Arena::new(fake, pieces as u64 * PIECE)
    }

    #[test]
    fn holes_back_what_does_not_fit_into_them() {
        let mut arena = arena(8);
        let blocks = [2, 1, 2, 1].map(|pieces| arena.allocate(pieces * PIECE).unwrap());
        arena.free(blocks[0], 2 * PIECE);
        arena.free(blocks[2], 2 * PIECE);
        assert_eq!(arena.reserved(), 6 * PIECE);
        assert!(
            arena.allocate(5 * PIECE).is_err(),
            "eight pieces, of which two are used and two twice in holes"
        );
        assert!(arena.compact());
        assert!(!arena.compact(), "nothing is left to be taken");
        let large = arena.allocate(5 * PIECE).unwrap();
        assert!(!blocks.contains(&large));
        assert_eq!(arena.reserved(), 7 * PIECE, "four that were moved, and one");
        // What has no memory under it is filled first where that is enough.
        assert_eq!(arena.allocate(PIECE).unwrap(), blocks[0]);
        assert!(arena.allocate(1).is_err());
    }

    /// What is used never loses its memory or overlaps, whatever comes and goes, and no more memory is taken than was used at most, but for
    /// the edges of blocks.
    #[test]
    fn nothing_in_use_is_touched() {
        let mut state = 1u64;
        let mut next = |below: u64| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        for _ in 0..200 {
            let mut arena = arena(40);
            let mut used: Vec<(u64, u64)> = Vec::new();
            for _ in 0..120 {
                match next(5) {
                    0..=2 => {
                        let size = (1 + next(6 * PIECE / 512)) * 512;
                        let Ok(address) = arena.allocate(size) else { continue };
                        let end = address + size;
                        assert!(
                            used.iter()
                                .all(|&(start, bytes)| end <= start || start + bytes <= address)
                        );
                        used.push((address, size));
                    }
                    3 if !used.is_empty() => {
                        let (address, size) = used.swap_remove(next(used.len() as u64) as usize);
                        arena.free(address, size);
                    }
                    _ => {
                        arena.compact();
                    }
                }
                for &(address, size) in &used {
                    let first = (address - START) / PIECE;
                    let end = (address + size - START).div_ceil(PIECE);
                    assert!((first..end).all(|place| arena.physical.places.contains_key(&(START + place * PIECE))));
                }
                assert_eq!(arena.mapped.len(), arena.physical.places.len());
                let free: u64 = arena.free_blocks.iter().map(|(_, size)| size).sum();
                let taken: u64 = used.iter().map(|(_, size)| size).sum();
                assert_eq!(free + taken, arena.mapped.len() as u64 * PIECE);
            }
        }
    }
}
