//! The noise of PyTorch's CPU generator: `torch.manual_seed(seed)`, then `torch.randn` in f32.
//!
//! The random words are exactly PyTorch's: MT19937 started from the low 32 bits of the seed, drawn in the same order. For
//! fewer than 16 values the normal numbers are too: both compute in f64 and round once. From 16 values on they follow
//! PyTorch's formulas and its roundings of u and of the angle, but with correctly rounded logarithm, cosine and sine where
//! PyTorch has vector routines of its own. Over 262 144 values the largest difference from PyTorch 2.11 on AVX-512 is 4.8·10⁻⁷
//! (5 in 6 values are equal in every bit, ‖Δ‖/‖ref‖ is 3·10⁻⁸); its path for processors without vector units rounds the
//! angle differently, and there the same figures are 2.0·10⁻⁶ and 2·10⁻⁷.
//!
//! Source of the generator: Matsumoto and Nishimura, "Mersenne Twister" (1998).

/// Words of the generator's state.
const STATE_WORDS: usize = 624;

/// Values that PyTorch transforms at a time; shorter requests take another path.
const BLOCK: usize = 16;

/// A generator like PyTorch's on the CPU; see the module's head comment.
pub struct TorchNormal {
    engine: MersenneTwister,
    /// The second value of the last pair that the path for short requests drew.
    kept: Option<f64>,
}

impl TorchNormal {
    /// The generator after `torch.manual_seed(seed)`.
    pub fn new(seed: u64) -> Self {
        TorchNormal {
            // Only the low word of the seed enters, as in PyTorch.
            engine: MersenneTwister::new(seed as u32),
            kept: None,
        }
    }

    /// The values of `torch.randn` for a tensor of `values.len()` elements, as the next draw from the generator.
    pub fn fill(&mut self, values: &mut [f32]) {
        if values.len() < BLOCK {
            values.fill_with(|| self.single() as f32);
            return;
        }
        values.fill_with(|| self.engine.uniform_f32());
        let (blocks, rest) = values.as_chunks_mut::<BLOCK>();
        blocks.iter_mut().for_each(transform_block);
        if !rest.is_empty() {
            // The last whole block of values is drawn anew, over some that were already transformed.
            if let Some(last) = values.last_chunk_mut::<BLOCK>() {
                last.fill_with(|| self.engine.uniform_f32());
                transform_block(last);
            }
        }
    }

    /// [`TorchNormal::fill`] into a new vector.
    pub fn sample(&mut self, count: usize) -> Vec<f32> {
        let mut values = vec![0.0; count];
        self.fill(&mut values);
        values
    }

    /// The values of `torch.rand`: uniform in [0, 1).
    pub fn sample_uniform(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.engine.uniform_f32()).collect()
    }

    /// One value of the path for short requests, which draws pairs.
    fn single(&mut self) -> f64 {
        if let Some(kept) = self.kept.take() {
            return kept;
        }
        let (angle, radius) = (self.engine.uniform_f64(), self.engine.uniform_f64());
        let angle = std::f64::consts::TAU * angle;
        let radius = (-2.0 * (-radius).ln_1p()).sqrt();
        self.kept = Some(radius * angle.sin());
        radius * angle.cos()
    }
}

/// Turns sixteen uniform values into normal ones: value j and value j + 8 make a pair.
fn transform_block(block: &mut [f32; BLOCK]) {
    let (first, second) = block.split_at_mut(BLOCK / 2);
    for (first, second) in first.iter_mut().zip(second) {
        let radius = (-2.0 * (1.0 - *first).ln()).sqrt();
        // The angle is rounded to f32 before its sine and cosine are taken, which here are those of f64 rounded once.
        let angle = f64::from(std::f32::consts::TAU * *second);
        (*first, *second) = (radius * angle.cos() as f32, radius * angle.sin() as f32);
    }
}

/// MT19937: the words of PyTorch's CPU generator and of NumPy's `RandomState`.
pub struct MersenneTwister {
    state: [u32; STATE_WORDS],
    next: usize,
}

impl MersenneTwister {
    /// The generator started from a seed, as the paper's `init_genrand` does.
    pub fn new(seed: u32) -> Self {
        let mut state = [seed; STATE_WORDS];
        for index in 1..STATE_WORDS {
            let previous = state[index - 1];
            state[index] = (previous ^ (previous >> 30))
                .wrapping_mul(1_812_433_253)
                .wrapping_add(index as u32);
        }
        MersenneTwister {
            state,
            next: STATE_WORDS,
        }
    }

    /// The next word.
    pub fn word(&mut self) -> u32 {
        if self.next == STATE_WORDS {
            self.renew();
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// The next state.
    fn renew(&mut self) {
        const SHIFT: usize = 397;
        for index in 0..STATE_WORDS {
            let joined = (self.state[index] & 0x8000_0000) | (self.state[(index + 1) % STATE_WORDS] & 0x7fff_ffff);
            let twist = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[index] = self.state[(index + SHIFT) % STATE_WORDS] ^ (joined >> 1) ^ twist;
        }
        self.next = 0;
    }

    /// Uniform in [0, 1), of 24 bits.
    fn uniform_f32(&mut self) -> f32 {
        (self.word() & 0x00ff_ffff) as f32 * 2f32.powi(-24)
    }

    /// Uniform in [0, 1), of 53 bits; the first word is the high one.
    fn uniform_f64(&mut self) -> f64 {
        let (high, low) = (u64::from(self.word()), u64::from(self.word()));
        ((high << 32 | low) & ((1 << 53) - 1)) as f64 * 2f64.powi(-53)
    }
}
