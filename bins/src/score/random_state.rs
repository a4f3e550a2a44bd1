//! The orders in which torch-fidelity takes pictures: those of NumPy's `RandomState`, whose stream is frozen.
//!
//! `permutation(n)` shuffles 0 … n − 1 from the end, each place with one at or before it, chosen by words under the least mask of ones
//! that holds the number, drawn anew until one fits. `choice(n, k, replace=False)` is the first k of a permutation.

use l2p_engine::flow::MersenneTwister;

/// `numpy.random.RandomState`.
pub struct RandomState(MersenneTwister);

impl RandomState {
    /// The state after `RandomState(seed)`.
    pub fn new(seed: u32) -> Self {
        RandomState(MersenneTwister::new(seed))
    }

    /// `permutation(count)`, of at most 2³² places.
    pub fn permutation(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for last in (1..count).rev() {
            order.swap(last, self.up_to(last as u32) as usize);
        }
        order
    }

    /// `choice(count, chosen, replace=False)`.
    pub fn choice(&mut self, count: usize, chosen: usize) -> Vec<usize> {
        let mut order = self.permutation(count);
        order.truncate(chosen);
        order
    }

    /// A whole number from 0 to `most`.
    fn up_to(&mut self, most: u32) -> u32 {
        let mask = u32::MAX >> most.leading_zeros();
        loop {
            let number = self.0.word() & mask;
            if number <= most {
                return number;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As NumPy 2.4 prints them.
    #[test]
    fn orders_are_numpys() {
        let mut state = RandomState::new(2020);
        assert_eq!(state.permutation(10), PERMUTATION);
        assert_eq!(state.choice(1000, 5), CHOICE);
        assert_eq!(RandomState::new(0).permutation(1), [0]);
        assert!(RandomState::new(0).permutation(0).is_empty());
    }

    const PERMUTATION: [usize; 10] = [2, 4, 9, 1, 5, 7, 6, 3, 8, 0];
    const CHOICE: [usize; 5] = [358, 763, 430, 530, 677];
}
