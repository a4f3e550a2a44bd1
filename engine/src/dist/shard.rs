//! How elements are divided among ranks: pure arithmetic.
//!
//! [`Shards`] divides one array into equal slices. An [`Arena`] lays tensors one behind the other, gathers them into buckets that are
//! communicated one at a time, and divides every bucket, so that each rank has an equal share of all of them:
//!
//! ```text
//! tensors    a a a a b b b c | d d d d d d d - | e e - -        - padding
//! ranks      0 0 0 0 1 1 1 1 | 0 0 0 0 1 1 1 1 | 0 0 1 1
//! ```
//!
//! What a rank keeps of the optimizer's state are its slices of all buckets, one behind the other.

use std::ops::Range;

use crate::error::{Error, Result};

/// Elements to whose multiples slices and tensors are aligned; kernels move eight at a time.
pub const ALIGNMENT: usize = 8;

/// An array divided into equal slices, one per rank; the last of them may reach past its end, which is padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shards {
    elements: usize,
    ranks: usize,
    slice: usize,
}

impl Shards {
    /// Divides `elements` elements among `ranks` ranks.
    ///
    /// # Panics
    /// When there is no rank.
    pub fn new(elements: usize, ranks: usize) -> Self {
        Shards {
            elements,
            ranks,
            slice: elements.div_ceil(ranks).next_multiple_of(ALIGNMENT),
        }
    }

    /// Elements that are divided, without padding.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Elements of every rank's slice, padding included: a multiple of [`ALIGNMENT`].
    pub fn slice(&self) -> usize {
        self.slice
    }

    /// Elements of all slices, padding included.
    pub fn padded(&self) -> usize {
        self.slice * self.ranks
    }

    /// The elements of `rank`, without padding; empty where all of its slice is padding.
    pub fn range(&self, rank: usize) -> Range<usize> {
        let bound = |rank: usize| (rank * self.slice).min(self.elements);
        bound(rank)..bound(rank + 1)
    }

    /// The rank that `element` belongs to.
    ///
    /// # Panics
    /// When nothing is divided.
    pub fn owner(&self, element: usize) -> usize {
        element / self.slice
    }
}

/// Tensors that are communicated together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Numbers of its tensors.
    pub tensors: Range<usize>,
    /// Its first element in the arena.
    pub start: usize,
    /// How its elements are divided; they are counted from `start`.
    pub shards: Shards,
    /// Where a rank's slice of this bucket begins in what the rank keeps.
    pub kept_at: usize,
}

/// A run of a tensor's elements that belongs to one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The tensor's number.
    pub tensor: usize,
    /// Which of its elements.
    pub elements: Range<usize>,
    /// The first one's place in the arena.
    pub arena: usize,
    /// The first one's place in what the rank keeps.
    pub kept: usize,
}

/// Tensors laid one behind the other and divided among ranks; see the module's head comment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arena {
    ranks: usize,
    tensors: Vec<Range<usize>>,
    buckets: Vec<Bucket>,
}

impl Arena {
    /// Lays out tensors of `sizes` elements in this order, and closes a bucket as soon as it holds `bucket_elements` elements. A tensor
    /// is never parted by buckets.
    ///
    /// # Errors
    /// When there is no rank, or the sizes are more than can be counted.
    pub fn new(sizes: &[usize], ranks: usize, bucket_elements: usize) -> Result<Self> {
        if ranks == 0 {
            return Err(Error::invalid("nothing can be divided among no ranks"));
        }
        let most = sizes
            .iter()
            .try_fold(0usize, |sum, size| sum.checked_add(size.checked_add(ALIGNMENT)?));
        // Every bucket is padded by at most this; there are no more buckets than tensors.
        let padding = (ranks + 1)
            .checked_mul(ALIGNMENT)
            .and_then(|each| each.checked_mul(sizes.len()));
        if most
            .zip(padding)
            .and_then(|(most, padding)| most.checked_add(padding))
            .is_none()
        {
            return Err(Error::invalid(
                "the sizes of the tensors add up to more than can be counted",
            ));
        }
        let mut arena = Arena {
            ranks,
            tensors: Vec::with_capacity(sizes.len()),
            buckets: Vec::new(),
        };
        let (mut first, mut start, mut end) = (0, 0, 0);
        for (number, size) in sizes.iter().enumerate() {
            arena.tensors.push(end..end + size);
            end = (end + size).next_multiple_of(ALIGNMENT);
            if end - start >= bucket_elements || number + 1 == sizes.len() {
                end = arena.close(first..number + 1, start, end);
                (first, start) = (number + 1, end);
            }
        }
        Ok(arena)
    }

    /// Makes a bucket of what lies from `start` to `end`, and says where the next one begins.
    fn close(&mut self, tensors: Range<usize>, start: usize, end: usize) -> usize {
        let shards = Shards::new(end - start, self.ranks);
        self.buckets.push(Bucket {
            tensors,
            start,
            shards,
            kept_at: self.kept(),
        });
        start + shards.padded()
    }

    /// The ranks it is divided among.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Elements of the whole arena, padding included.
    pub fn elements(&self) -> usize {
        self.buckets.last().map_or(0, |last| last.start + last.shards.padded())
    }

    /// Elements that every rank keeps, padding included.
    pub fn kept(&self) -> usize {
        self.buckets.last().map_or(0, |last| last.kept_at + last.shards.slice())
    }

    /// The buckets, in the order of their tensors.
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// Where each tensor lies in the arena.
    pub fn tensors(&self) -> &[Range<usize>] {
        &self.tensors
    }

    /// The tensors' elements that belong to `rank`, in the order of the arena.
    pub fn pieces(&self, rank: usize) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for bucket in &self.buckets {
            let slice = bucket.shards.range(rank);
            let slice = bucket.start + slice.start..bucket.start + slice.end;
            for tensor in bucket.tensors.clone() {
                let place = &self.tensors[tensor];
                let (first, end) = (place.start.max(slice.start), place.end.min(slice.end));
                if first < end {
                    pieces.push(Piece {
                        tensor,
                        elements: first - place.start..end - place.start,
                        arena: first,
                        kept: bucket.kept_at + first - slice.start,
                    });
                }
            }
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes without pattern, by a linear congruential generator.
    fn sizes(seed: usize, count: usize, most: usize) -> Vec<usize> {
        let mut state = seed as u64 + 1;
        let mut next = || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) as usize
        };
        (0..count).map(|_| next() % (most + 1)).collect()
    }

    #[test]
    fn slices_are_equal_aligned_and_cover_every_element_once() {
        for ranks in 1..=9 {
            for elements in (0..200).chain([1000, 4095, 4096, 4097, 123_457]) {
                let shards = Shards::new(elements, ranks);
                assert!(shards.slice().is_multiple_of(ALIGNMENT));
                assert!(shards.padded() >= elements && shards.padded() < elements + ranks * ALIGNMENT);
                let mut next = 0;
                for rank in 0..ranks {
                    let range = shards.range(rank);
                    assert_eq!(range.start, next);
                    assert!(range.len() <= shards.slice());
                    assert!(range.clone().all(|element| shards.owner(element) == rank));
                    next = range.end;
                }
                assert_eq!(next, elements, "{elements} among {ranks}");
            }
        }
    }

    #[test]
    fn every_element_of_every_tensor_belongs_to_one_rank() {
        for seed in 0..60 {
            let sizes = sizes(seed, 1 + seed % 13, 100);
            for (ranks, bucket) in [(1, 0), (2, 1), (3, 64), (4, 150), (7, 100_000)] {
                let arena = Arena::new(&sizes, ranks, bucket).unwrap();
                let mut owners: Vec<Vec<usize>> = sizes.iter().map(|size| vec![0; *size]).collect();
                for rank in 0..ranks {
                    let mut kept_end = 0;
                    for piece in arena.pieces(rank) {
                        owners[piece.tensor][piece.elements.clone()]
                            .iter_mut()
                            .for_each(|count| *count += 1);
                        assert_eq!(piece.arena, arena.tensors()[piece.tensor].start + piece.elements.start);
                        assert!(piece.kept >= kept_end, "pieces overlap in what rank {rank} keeps");
                        kept_end = piece.kept + piece.elements.len();
                        assert!(kept_end <= arena.kept());
                    }
                }
                assert!(
                    owners.iter().flatten().all(|count| *count == 1),
                    "{sizes:?} {ranks} {bucket}"
                );
            }
        }
    }

    #[test]
    fn buckets_follow_each_other_and_hold_whole_aligned_tensors() {
        let sizes = sizes(7, 40, 500);
        for ranks in [1, 2, 5, 8] {
            let arena = Arena::new(&sizes, ranks, 700).unwrap();
            let (mut tensor, mut end, mut kept) = (0, 0, 0);
            for (number, bucket) in arena.buckets().iter().enumerate() {
                assert_eq!(
                    (bucket.tensors.start, bucket.start, bucket.kept_at),
                    (tensor, end, kept)
                );
                tensor = bucket.tensors.end;
                end += bucket.shards.padded();
                kept += bucket.shards.slice();
                assert!(bucket.shards.elements() >= 700 || number + 1 == arena.buckets().len());
                for place in &arena.tensors()[bucket.tensors.clone()] {
                    assert!(place.start.is_multiple_of(ALIGNMENT));
                    assert!(place.start >= bucket.start && place.end <= end);
                }
            }
            assert_eq!((tensor, end, kept), (sizes.len(), arena.elements(), arena.kept()));
            assert!(arena.buckets().len() > 5);
        }
        assert_eq!(Arena::new(&[], 4, 10).unwrap().elements(), 0);
    }

    #[test]
    fn what_cannot_be_counted_or_divided_is_refused() {
        assert!(Arena::new(&[3], 0, 8).is_err());
        assert!(Arena::new(&[usize::MAX, 1], 2, 8).is_err());
        assert!(Arena::new(&[usize::MAX - 20], 8, 8).is_err());
    }
}
