//! Random draws that depend on a seed, a purpose and an index alone, so that any of them can be made again without those
//! before it. The words are those of Philox 4×32-10 (see [`crate::ops::noise`]) with key = seed and counter = (index, purpose).

use crate::ops::noise::philox4x32;

/// What random numbers are for; each purpose has a sequence of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Who comes when in an epoch.
    Order = 1,
    /// The noise level of a training picture.
    Sigma = 2,
    /// Whether a caption is left out.
    Dropout = 3,
    /// Seeds of noise that is fresh every time.
    FreshNoise = 4,
    /// Which pictures are held out.
    HeldOut = 5,
}

/// A sequence of random numbers with random access.
#[derive(Clone, Copy, Debug)]
pub struct Draws {
    seed: u64,
    purpose: Purpose,
    /// Tells apart the sequences of one purpose, such as epochs.
    part: u32,
}

impl Draws {
    /// The sequence of this seed and purpose.
    pub fn new(seed: u64, purpose: Purpose) -> Self {
        Self::part(seed, purpose, 0)
    }

    /// One of many sequences of this seed and purpose.
    pub fn part(seed: u64, purpose: Purpose, part: u32) -> Self {
        Draws { seed, purpose, part }
    }

    /// The word at `index`.
    pub fn word(&self, index: u64) -> u64 {
        let counter = [index as u32, (index >> 32) as u32, self.purpose as u32, self.part];
        let [low, high, ..] = philox4x32(counter, [self.seed as u32, (self.seed >> 32) as u32]);
        u64::from(high) << 32 | u64::from(low)
    }

    /// The number at `index`, uniform in [0, 1).
    pub fn uniform(&self, index: u64) -> f64 {
        (self.word(index) >> 11) as f64 * 2f64.powi(-53)
    }

    /// The whole number at `index`, uniform below `bound` (at least 1) but for a bias of at most bound · 2⁻⁶⁴.
    pub fn below(&self, index: u64, bound: usize) -> usize {
        ((u128::from(self.word(index)) * bound.max(1) as u128) >> 64) as usize
    }

    /// Brings `items` into an order of this sequence (Fisher and Yates).
    pub fn shuffle<T>(&self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64, last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shuffles_are_even() {
        // Each of the 24 orders of four items comes up about as often as the others.
        let mut counts = std::collections::BTreeMap::new();
        for seed in 0..24_000 {
            let mut items = [0, 1, 2, 3];
            Draws::new(seed, Purpose::Order).shuffle(&mut items);
            *counts.entry(items).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 24);
        assert!(counts.values().all(|count| (850..1150).contains(count)), "{counts:?}");
    }

    #[test]
    fn sequences_differ_and_repeat() {
        let order = Draws::new(7, Purpose::Order);
        assert_eq!(order.word(3), Draws::new(7, Purpose::Order).word(3));
        assert_ne!(order.word(3), Draws::new(7, Purpose::Sigma).word(3));
        assert_ne!(order.word(3), Draws::part(7, Purpose::Order, 1).word(3));
        let mean = (0..10_000).map(|index| order.uniform(index)).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        assert!((0..1000).all(|index| order.below(index, 3) < 3));
    }
}
