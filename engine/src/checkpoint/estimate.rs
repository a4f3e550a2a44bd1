//! Estimates of the GPU memory that a model needs, said before any work starts.
//!
//! All sizes are bytes for one picture of W×H pixels at a time; the transformer computes in bf16 (2 bytes). With
//! L = image tokens (padded to 32) + 512 caption tokens, and per pixel p = W·H:
//!
//! | part | formula |
//! | --- | --- |
//! | weights | 2 · parameters |
//! | transformer step | 2 · L · (3·dim + max(4·dim, 3·ffn)): stream, sum and normalised input, beside either q, k, v and their attention, or the feed-forward network's two halves and their product |
//! | head | 2 · p · (Σ wₖ/4ᵏ + 2·w₀) + 2 · L · dim: every skip, at full size the map before and after a convolution, and the tokens |
//! | image | 4 · 3 · p · 3: picture, velocity and guidance's second velocity in f32 (latents: 16 channels at 1/64 of the pixels) |
//! | VAE decoder | 2 · p · (2·c₁ + 2·c₀), c the widths of its last two blocks |
//! | text encoder | 2 · its parameters, freed before the transformer is loaded |
//!
//! Sampling peaks at the larger of the text encoder and weights + max(transformer step, head or VAE) + image.
//!
//! Training is that of the released recipe: all but the blocks from the sixth to the sixth-last is trained, T parameters,
//! batch 1 per GPU, each block recomputed in the backward pass:
//!
//! | part | formula |
//! | --- | --- |
//! | gradients | 2 · T |
//! | optimizer | 12 · T: master copy and two moments in f32 |
//! | saved | 2 · L · dim · blocks + 2 · (transformer step) + 2 · p · (3 · Σ wₖ/4ᵏ + 2·w₀): each block's input, one block again with its gradients, and the head's maps |

use serde::Serialize;

use super::head::HeadLayout;
use crate::model::config::{DitConfig, ModelKind, VaeConfig};
use crate::model::zimage::TOKEN_MULTIPLE;

/// Bytes of a weight or activation.
const COMPUTE: u128 = 2;

/// Caption tokens that are allowed for.
const CAPTION_TOKENS: u128 = 512;

/// Blocks that the released recipe trains at either end.
const TRAINED_ENDS: usize = 5;

/// The side of a latent pixel in image pixels, where no VAE says otherwise.
const LATENT_DOWNSAMPLING: usize = 8;

/// What an estimate is made for.
#[derive(Clone, Copy, Debug)]
pub struct EstimateInput<'a> {
    /// The transformer's sizes.
    pub config: &'a DitConfig,
    /// Its head.
    pub head: Option<&'a HeadLayout>,
    /// The VAE, for a latent model.
    pub vae: Option<&'a VaeConfig>,
    /// The text encoder's parameters, 0 where none is known.
    pub text_parameters: u64,
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
}

/// Bytes needed for sampling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SamplingMemory {
    /// The transformer with its head.
    pub weights: u64,
    /// Everything that lives within a step, and the picture.
    pub activations: u64,
    /// The text encoder, freed before the transformer is loaded.
    pub text_encoder: u64,
    /// The most at once.
    pub peak: u64,
}

/// Bytes needed for training by the released recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TrainingMemory {
    /// Parameters that are trained.
    pub trained_parameters: u64,
    /// The transformer with its head.
    pub weights: u64,
    /// Gradients.
    pub gradients: u64,
    /// Master copy and moments.
    pub optimizer: u64,
    /// What the backward pass needs, and the step itself.
    pub activations: u64,
    /// The most at once.
    pub peak: u64,
}

/// See the module's head comment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    /// The picture's width in pixels.
    pub width: usize,
    /// The picture's height in pixels.
    pub height: usize,
    /// Drawing one picture.
    pub sampling: SamplingMemory,
    /// Training on one picture at a time.
    pub training: TrainingMemory,
}

impl MemoryEstimate {
    /// Estimates by the formulas of the module's head comment. Nothing overflows: all is computed in 128 bits, from sizes of at most
    /// 2⁴⁸ (see [`limits`](crate::limits)), and what does not fit 64 is said to be the most that does.
    pub fn of(input: &EstimateInput<'_>) -> Self {
        let parameters = parameters(&input.config.tensors()) + input.head.map_or(0, |head| parameters(&head.tensors()));
        let trained = parameters.saturating_sub(frozen_parameters(input.config));
        let weights = COMPUTE * parameters;
        let step = input.step();
        let text_encoder = COMPUTE * u128::from(input.text_parameters);
        let activations = step.max(input.output()) + input.image();
        let sampling = SamplingMemory {
            weights: bytes(weights),
            activations: bytes(activations),
            text_encoder: bytes(text_encoder),
            peak: bytes(text_encoder.max(weights + activations)),
        };
        let (gradients, optimizer) = (COMPUTE * trained, 12 * trained);
        let saved = input.block_inputs() + 2 * step + input.head_saved() + input.image();
        let training = TrainingMemory {
            trained_parameters: bytes(trained),
            weights: bytes(weights),
            gradients: bytes(gradients),
            optimizer: bytes(optimizer),
            activations: bytes(saved),
            peak: bytes(weights + gradients + optimizer + saved),
        };
        MemoryEstimate {
            width: input.width,
            height: input.height,
            sampling,
            training,
        }
    }
}

/// As a number of 64 bits, or the most of these.
fn bytes(exact: u128) -> u64 {
    u64::try_from(exact).unwrap_or(u64::MAX)
}

impl EstimateInput<'_> {
    fn pixels(&self) -> u128 {
        self.width as u128 * self.height as u128
    }

    fn tokens(&self) -> u128 {
        let side = match self.config.kind {
            ModelKind::Pixel => self.config.patch,
            ModelKind::Latent => self.config.patch * self.vae.map_or(LATENT_DOWNSAMPLING, VaeConfig::downsampling),
        };
        let image = self.width.div_ceil(side) as u128 * self.height.div_ceil(side) as u128;
        image.next_multiple_of(TOKEN_MULTIPLE as u128) + CAPTION_TOKENS
    }

    fn step(&self) -> u128 {
        let (dim, ffn) = (self.config.dim as u128, self.config.ffn_hidden as u128);
        COMPUTE * self.tokens() * (3 * dim + (4 * dim).max(3 * ffn))
    }

    fn block_inputs(&self) -> u128 {
        let blocks = (self.config.layers + 2 * self.config.refiner_layers) as u128;
        COMPUTE * self.tokens() * self.config.dim as u128 * blocks
    }

    /// The head, or the VAE's decoder.
    fn output(&self) -> u128 {
        match (self.config.kind, self.vae.map(|vae| vae.block_out_channels.as_slice())) {
            (ModelKind::Pixel, _) => {
                let (skips, full) = self.head_maps();
                COMPUTE * (skips + 2 * full + self.tokens() * self.config.dim as u128)
            }
            (ModelKind::Latent, Some([last, rest @ ..])) => {
                let before = rest.first().unwrap_or(last);
                COMPUTE * self.pixels() * 2 * (*last as u128 + *before as u128)
            }
            (ModelKind::Latent, Some([]) | None) => 0,
        }
    }

    fn head_saved(&self) -> u128 {
        let (skips, full) = self.head_maps();
        COMPUTE * (3 * skips + 2 * full)
    }

    /// Elements of all the head's skips together, and of its widest map at full size.
    fn head_maps(&self) -> (u128, u128) {
        let widths = self.head.map(HeadLayout::widths).unwrap_or_default();
        let skips = widths
            .iter()
            .enumerate()
            .map(|(stage, width)| (self.pixels() >> (2 * stage)) * *width as u128)
            .sum();
        let outer_width = self
            .head
            .and_then(|head| head.stages.first())
            .map_or(0, |stage| stage.width);
        (skips, self.pixels() * outer_width as u128)
    }

    fn image(&self) -> u128 {
        let elements = match self.config.kind {
            ModelKind::Pixel => self.pixels() * self.config.in_channels as u128,
            ModelKind::Latent => self.pixels() / 64 * self.config.in_channels as u128,
        };
        3 * 4 * elements
    }
}

/// Elements of all tensors.
pub(super) fn parameters(tensors: &[(String, Vec<usize>)]) -> u128 {
    let elements = |shape: &[usize]| shape.iter().map(|extent| *extent as u128).product::<u128>();
    tensors.iter().map(|(_, shape)| elements(shape)).sum()
}

/// Parameters of the main blocks that the released recipe leaves frozen.
fn frozen_parameters(config: &DitConfig) -> u128 {
    let frozen = TRAINED_ENDS..config.layers.saturating_sub(TRAINED_ENDS);
    let names: Vec<String> = frozen.map(|index| format!("layers.{index}.")).collect();
    let is_frozen = |name: &String| names.iter().any(|block| name.starts_with(block.as_str()));
    let tensors: Vec<_> = config
        .tensors()
        .into_iter()
        .filter(|(name, _)| is_frozen(name))
        .collect();
    parameters(&tensors)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published(kind: ModelKind, patch: usize) -> DitConfig {
        DitConfig {
            kind,
            dim: 3840,
            heads: 30,
            head_dim: 128,
            layers: 30,
            refiner_layers: 2,
            ffn_hidden: 10240,
            caption_width: 2560,
            patch,
            in_channels: if kind == ModelKind::Pixel { 3 } else { 16 },
            rope_theta: 256.0,
            axes_dims: [32, 48, 48],
            norm_eps: 1e-5,
            t_scale: 1000.0,
            t_frequencies: 256,
            t_hidden: 1024,
            adaln_width: 256,
        }
    }

    #[test]
    fn published_models_have_their_published_sizes() {
        let billions = |config: &DitConfig, head: Option<&HeadLayout>| {
            let head = head.map_or(0, |head| parameters(&head.tensors()));
            (parameters(&config.tensors()) + head) as f64 / 1e9
        };
        assert!((billions(&published(ModelKind::Latent, 2), None) - 6.15).abs() < 0.01);
        for (patch, size) in [(16, 6.16), (64, 6.21)] {
            let head = HeadLayout::for_patch(patch, None, None, 3840).unwrap();
            let found = billions(&published(ModelKind::Pixel, patch), Some(&head));
            assert!((found - size).abs() < 0.02, "patch {patch}: {found}");
        }
    }

    #[test]
    fn the_largest_sizes_overflow_nothing() {
        let most = 1 << 18;
        let config = DitConfig {
            dim: most,
            head_dim: most,
            layers: 512,
            refiner_layers: 512,
            ffn_hidden: most,
            caption_width: most,
            patch: 1,
            in_channels: most,
            adaln_width: most,
            ..published(ModelKind::Latent, 1)
        };
        let vae = VaeConfig {
            block_out_channels: vec![usize::MAX],
            ..VaeConfig::default()
        };
        let head = HeadLayout::for_patch(16, Some(&[most; 4]), Some(most), most).unwrap();
        for (kind, head) in [(ModelKind::Latent, None), (ModelKind::Pixel, Some(&head))] {
            let estimate = MemoryEstimate::of(&EstimateInput {
                config: &DitConfig { kind, ..config.clone() },
                head,
                vae: Some(&vae),
                text_parameters: u64::MAX,
                width: 1 << 48,
                height: 1 << 48,
            });
            assert_eq!((estimate.sampling.peak, estimate.training.peak), (u64::MAX, u64::MAX));
        }
    }

    #[test]
    fn the_released_recipe_trains_two_and_a_half_billion() {
        let config = published(ModelKind::Pixel, 16);
        let head = HeadLayout::for_patch(16, None, None, 3840).unwrap();
        let estimate = MemoryEstimate::of(&EstimateInput {
            config: &config,
            head: Some(&head),
            vae: None,
            text_parameters: 4_022_000_000,
            width: 1024,
            height: 1024,
        });
        assert!((estimate.training.trained_parameters as f64 / 1e9 - 2.54).abs() < 0.02);
        assert!((estimate.sampling.weights as f64 / 1e9 - 12.3).abs() < 0.1);
        assert!(estimate.sampling.peak > estimate.sampling.weights);
        assert!(estimate.training.peak > estimate.training.optimizer + estimate.training.weights);
    }
}
