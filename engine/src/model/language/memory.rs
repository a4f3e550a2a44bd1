//! The memory that a language model takes, by its sizes alone: what is said, and checked, before anything is loaded.
//!
//! With e bytes per element of the compute type, for S texts of at most C tokens, prompts read R tokens at a time:
//!
//! | part | bytes |
//! | --- | --- |
//! | weights | e · (vocabulary · dim + layers · (dim · (heads + 2·kv_heads) · head_dim + heads · head_dim · dim + 3 · dim · ffn_hidden)), norms left out |
//! | keys and values | e · 2 · layers · S · kv_heads · C · head_dim |
//! | work | e · R · (4 · dim + (2·heads + 2·kv_heads) · head_dim + 3 · ffn_hidden) for prompts; 4 · S · vocabulary of logits; 4 · C · head_dim of angles |

use super::super::config::TextConfig;
use crate::device::{Device, format_bytes};
use crate::error::{Error, Result};

/// Bytes of a language model at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LanguageMemory {
    /// The model's parameters.
    pub weights: u64,
    /// Keys and values of all texts.
    pub cache: u64,
    /// Activations, logits and angles.
    pub work: u64,
}

impl LanguageMemory {
    /// Of `slots` texts of at most `capacity` tokens each, whose prompts are read `read` tokens at a time.
    pub fn of(config: &TextConfig, device: &Device, slots: usize, capacity: usize, read: usize) -> Self {
        let element = device.compute_dtype().size() as f64;
        let [dim, heads, kv_heads, head_dim, ffn, layers, vocabulary] = [
            config.dim,
            config.heads,
            config.kv_heads,
            config.head_dim,
            config.ffn_hidden,
            config.layers,
            config.vocabulary,
        ]
        .map(|size| size as f64);
        let [slots, capacity, read] = [slots, capacity, read].map(|count| count as f64);
        let layer = dim * (heads + 2.0 * kv_heads) * head_dim + heads * head_dim * dim + 3.0 * dim * ffn;
        let activations = 4.0 * dim + (2.0 * heads + 2.0 * kv_heads) * head_dim + 3.0 * ffn;
        LanguageMemory {
            weights: (element * (vocabulary * dim + layers * layer)) as u64,
            cache: (element * 2.0 * layers * slots * kv_heads * capacity * head_dim) as u64,
            work: (element * read * activations + 4.0 * slots * vocabulary + 4.0 * capacity * head_dim) as u64,
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.cache).saturating_add(self.work)
    }

    /// Refuses what a device has no memory for; `loaded` says that the weights are there already.
    ///
    /// # Errors
    /// With what it takes, what there is, and the way out.
    pub fn ensure_room(&self, device: &Device, loaded: bool) -> Result<()> {
        let available = device.available_memory()?;
        let needed = match loaded {
            true => self.cache.saturating_add(self.work),
            false => self.total(),
        };
        if needed <= available {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "writing takes about {} of memory ({} of weights, {} of keys and values), but {device} has {} to spare: ask for fewer tokens, \
             or for fewer texts at a time",
            format_bytes(needed),
            format_bytes(if loaded { 0 } else { self.weights }),
            format_bytes(self.cache),
            format_bytes(available)
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_the_published_sizes() {
        let memory = LanguageMemory::of(&TextConfig::published(), &Device::Cpu, 2, 1024, 512);
        // 4.02 G parameters of four bytes; 36 layers of 2 x 8 x 128 elements for each of 2048 tokens.
        assert!(
            (memory.weights as f64 / 4.0 / 4.02e9 - 1.0).abs() < 0.01,
            "{}",
            memory.weights
        );
        assert_eq!(memory.cache, 4 * 36 * 2 * 8 * 128 * 2048);
        assert_eq!(memory.total(), memory.weights + memory.cache + memory.work);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_way_out() {
        let large = LanguageMemory::of(&TextConfig::published(), &Device::Cpu, 1 << 20, 1 << 20, 512);
        let message = large.ensure_room(&Device::Cpu, true).unwrap_err().to_string();
        assert!(message.contains("fewer tokens"), "{message}");
        assert!(
            message.contains("0 B of weights") || message.contains("0 bytes of weights"),
            "{message}"
        );
    }
}
