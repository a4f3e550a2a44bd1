//! What of a range of addresses is free.

use std::collections::{BTreeMap, BTreeSet};

/// Free blocks, found by size and by address.
#[derive(Default)]
pub(super) struct FreeBlocks {
    by_size: BTreeSet<(u64, u64)>,
    by_address: BTreeMap<u64, u64>,
}

impl FreeBlocks {
    /// Takes `size` bytes off the smallest block that is large enough.
    pub fn take(&mut self, size: u64) -> Option<u64> {
        let &(_, address) = self.by_size.range((size, 0)..).next()?;
        self.take_at(address, size);
        Some(address)
    }

    /// Whether a block of `size` bytes can be taken.
    pub fn fits(&self, size: u64) -> bool {
        self.by_size.range((size, 0)..).next().is_some()
    }

    /// Takes the first `size` bytes of the free block at `address`, which has as many.
    pub fn take_at(&mut self, address: u64, size: u64) {
        let found = self.by_address[&address];
        self.remove(address, found);
        if found > size {
            self.add(address + size, found - size);
        }
    }

    /// Adds a block, merged with the free blocks that touch it.
    pub fn insert(&mut self, mut address: u64, mut size: u64) {
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
    pub fn ending_at(&self, end: u64) -> u64 {
        match self.by_address.range(..end).next_back() {
            Some((&address, &size)) if address + size == end => size,
            _ => 0,
        }
    }

    /// The size of the free block that starts at `address`.
    pub fn at(&self, address: u64) -> Option<u64> {
        self.by_address.get(&address).copied()
    }

    /// All of them, by address: where they start, and their sizes.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.by_address.iter().map(|(&address, &size)| (address, size))
    }

    /// Takes `size` bytes from `address` on out of the free block that holds them.
    pub fn take_out(&mut self, address: u64, size: u64) {
        let Some((&start, &found)) = self.by_address.range(..=address).next_back() else {
            return;
        };
        self.remove(start, found);
        if start < address {
            self.add(start, address - start);
        }
        if address + size < start + found {
            self.add(address + size, start + found - address - size);
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

    #[test]
    fn what_is_taken_out_leaves_what_is_around_it() {
        let mut blocks = FreeBlocks::default();
        blocks.insert(100, 100);
        blocks.take_out(130, 20);
        assert_eq!(blocks.iter().collect::<Vec<_>>(), [(100, 30), (150, 50)]);
        blocks.take_out(150, 50);
        blocks.take_out(100, 10);
        assert_eq!(blocks.iter().collect::<Vec<_>>(), [(110, 20)]);
    }
}
