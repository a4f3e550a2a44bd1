//! Who stands beside whom, and when.
//!
//! An epoch shows every picture of a set at least once, in an order drawn from the seed. A batch holds pictures of one size.
//! Where the pictures of a size do not fill their last batch, it is filled up with the first ones of that size. The order is
//! a function of seed and epoch, so that a place in it is two numbers ([`Position`]).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::random::{Draws, Purpose};
use super::sizing::PictureSize;

/// A place in the order of batches: the next one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Epochs done.
    pub epoch: u32,
    /// Batches of the epoch done.
    pub batch: usize,
}

/// A batch to be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedBatch {
    /// The size of all its pictures.
    pub size: PictureSize,
    /// The pictures, as indices into the set.
    pub pictures: Vec<usize>,
}

/// The order of batches of a set; see the module's head comment.
#[derive(Clone, Debug)]
pub struct BatchOrder {
    sizes: Vec<PictureSize>,
    batch: usize,
    seed: u64,
}

impl BatchOrder {
    /// The order of pictures with these sizes in batches of `batch`.
    pub fn new(sizes: &[PictureSize], batch: usize, seed: u64) -> Self {
        BatchOrder {
            sizes: sizes.to_vec(),
            batch: batch.max(1),
            seed,
        }
    }

    /// The batches of an epoch.
    pub fn epoch(&self, epoch: u32) -> Vec<PlannedBatch> {
        let draws = Draws::part(self.seed, Purpose::Order, epoch);
        let mut pictures: Vec<usize> = (0..self.sizes.len()).collect();
        draws.shuffle(&mut pictures);
        let mut by_size: BTreeMap<PictureSize, Vec<usize>> = BTreeMap::new();
        for picture in pictures {
            by_size.entry(self.sizes[picture]).or_default().push(picture);
        }
        let mut batches = Vec::with_capacity(self.batches_per_epoch());
        for (size, pictures) in by_size {
            let whole = pictures.len().next_multiple_of(self.batch);
            let filled: Vec<usize> = pictures.iter().copied().cycle().take(whole).collect();
            batches.extend(filled.chunks(self.batch).map(|pictures| PlannedBatch {
                size,
                pictures: pictures.to_vec(),
            }));
        }
        draws.shuffle(&mut batches);
        batches
    }

    /// The number of batches in every epoch.
    pub fn batches_per_epoch(&self) -> usize {
        let mut counts: BTreeMap<PictureSize, usize> = BTreeMap::new();
        for size in &self.sizes {
            *counts.entry(*size).or_default() += 1;
        }
        counts.values().map(|count| count.div_ceil(self.batch)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(width: usize) -> PictureSize {
        PictureSize { width, height: 16 }
    }

    #[test]
    fn an_epoch_shows_everything_in_batches_of_one_size() {
        let sizes: Vec<PictureSize> = (0..23).map(|index| size(16 + 16 * (index % 3))).collect();
        let order = BatchOrder::new(&sizes, 4, 9);
        let epoch = order.epoch(2);
        assert_eq!((epoch.len(), order.batches_per_epoch()), (6, 6));
        let mut shown: Vec<usize> = epoch.iter().flat_map(|batch| batch.pictures.clone()).collect();
        assert_eq!(shown.len(), 24);
        shown.sort_unstable();
        shown.dedup();
        assert_eq!(shown, (0..23).collect::<Vec<_>>());
        for batch in &epoch {
            assert!(batch.pictures.iter().all(|&picture| sizes[picture] == batch.size));
        }
        assert_eq!(order.epoch(2), epoch);
        assert_ne!(order.epoch(3), epoch);
        assert_ne!(BatchOrder::new(&sizes, 4, 10).epoch(2), epoch);
    }

    #[test]
    fn fewer_pictures_than_a_batch_fill_one() {
        let order = BatchOrder::new(&[size(16), size(16)], 5, 0);
        let epoch = order.epoch(0);
        assert_eq!(epoch.len(), 1);
        let mut pictures = epoch[0].pictures.clone();
        pictures.sort_unstable();
        assert!(
            pictures == [0, 0, 0, 1, 1] || pictures == [0, 0, 1, 1, 1],
            "{pictures:?}"
        );
    }
}
