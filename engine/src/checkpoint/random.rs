//! Random numbers for tensors that start random.
//!
//! They follow PyTorch's default for Linear and Conv2d: weights and biases uniform in ±1/√fan_in, where
//! fan_in counts the inputs of one output (inputs · height · width). They depend on seed, tensor name and index alone:
//!
//! ```text
//! start = mix(seed + G) xor FNV-1a-64(name)          G = 0x9E3779B97F4A7C15, arithmetic modulo 2^64
//! z_i   = mix(start + (i + 1) · G)                   mix: the output function of splitmix64
//! x_i   = ((z_i >> 40) · 2^-23 − 1) / √fan_in        in f32, then rounded to the model's type
//! ```

use rayon::prelude::*;

use super::elements::{Float, encode};

/// 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Elements that one task makes.
const TASK_ELEMENTS: usize = 1 << 14;

/// Uniform random numbers for one tensor; see the module's head comment.
#[derive(Clone, Copy, Debug)]
pub struct UniformInit {
    start: u64,
    bound: f32,
}

impl UniformInit {
    /// Numbers in ±1/√`fan_in` for the tensor of this name.
    pub fn new(seed: u64, name: &str, fan_in: usize) -> Self {
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        UniformInit {
            start: mix(seed.wrapping_add(GOLDEN)) ^ hash,
            bound: 1.0 / (fan_in.max(1) as f32).sqrt(),
        }
    }

    /// The number at `index`.
    fn at(&self, index: usize) -> f32 {
        let z = mix(self.start.wrapping_add((index as u64 + 1).wrapping_mul(GOLDEN)));
        ((z >> 40) as f32 * 2.0f32.powi(-23) - 1.0) * self.bound
    }

    /// Writes the numbers from index `first` on into `target`, rounded to type `to`.
    pub(super) fn fill(&self, first: usize, target: &mut [u8], to: Float) {
        let tasks = target.par_chunks_mut(TASK_ELEMENTS * to.size()).enumerate();
        tasks.for_each(|(task, target)| {
            let first = first + task * TASK_ELEMENTS;
            let values: Vec<f32> = (0..target.len() / to.size())
                .map(|index| self.at(first + index))
                .collect();
            encode(&values, target, to);
        });
    }
}

/// The output function of splitmix64.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
