//! Estimates of the GPU memory that a model needs, said before any work starts: bytes for one picture of W×H pixels at a time with
//! 512 caption tokens, in bf16. Weights take 2 bytes a parameter, the text encoder, which is freed before the transformer is loaded,
//! too; what a pass takes is counted in [`crate::model::memory`]; a VAE's decoder takes 2 · W·H · (2·c₁ + 2·c₀), c the widths of its
//! last two blocks.
//!
//! Sampling peaks at the larger of the text encoder and weights + step or VAE. Training is that of the released recipe: all but the
//! blocks from the sixth to the sixth-last is trained, T parameters, batch 1 per GPU, each block recomputed in the backward pass;
//! gradients take 2 · T, the optimizer 12 · T: master copy and two moments in f32.

use serde::Serialize;

use crate::layers::{Group, NamedParameter};
use crate::model::config::{ModelKind, VaeConfig};
use crate::model::denoiser::TrainingChoice;
use crate::model::memory::{Pass, bytes};
use crate::model::{Precision, Spec};

/// Bytes of a weight or activation.
const COMPUTE: usize = 2;

/// Caption tokens that are allowed for.
const CAPTION_TOKENS: usize = 512;

/// Blocks that the released recipe trains at either end.
const TRAINED_ENDS: usize = 5;

/// The side of a latent pixel in image pixels, where no VAE says otherwise.
const LATENT_DOWNSAMPLING: usize = 8;

/// What an estimate is made for.
#[derive(Clone, Copy, Debug)]
pub struct EstimateInput<'a> {
    /// The transformer.
    pub spec: &'a dyn Spec,
    /// The VAE, for a latent model.
    pub vae: Option<&'a VaeConfig>,
    /// The text encoder's parameters, 0 where none is known.
    pub text_parameters: u64,
    /// How the weights of the transformer's blocks are kept when pictures are drawn.
    pub trunk: &'a Precision,
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
    /// Estimates as the module's head comment says. What does not fit 64 bits is said to be the most that does.
    pub fn of(input: &EstimateInput<'_>) -> Self {
        let metas = input.spec.metas();
        let parameters: f64 = metas.iter().map(NamedParameter::elements_exact).sum();
        let trained: f64 = metas
            .iter()
            .filter(|meta| is_trained(meta))
            .map(NamedParameter::elements_exact)
            .sum();
        let weights = COMPUTE as f64 * parameters;
        let kept = input.trunk.bytes(&metas, COMPUTE);
        let text_encoder = COMPUTE as f64 * input.text_parameters as f64;
        let nothing = TrainingChoice {
            trains: &|_| Ok(false),
            recomputes: &|_| false,
            keep_sums: false,
        };
        let activations = input.pass(&nothing, &|pass| pass.sampling()).max(input.decoder());
        let sampling = SamplingMemory {
            weights: bytes(kept),
            activations: bytes(activations),
            text_encoder: bytes(text_encoder),
            peak: bytes(text_encoder.max(kept + activations)),
        };
        let released = TrainingChoice {
            trains: &|meta| Ok(is_trained(meta)),
            recomputes: &|_| true,
            keep_sums: false,
        };
        let saved = input.pass(&released, &|pass| {
            let training = pass.training(false);
            training.saved + training.activations
        });
        let (gradients, optimizer) = (COMPUTE as f64 * trained, 12.0 * trained);
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

impl EstimateInput<'_> {
    /// What `count` says of a picture's pass, at the next larger size that the model takes.
    fn pass(&self, choice: &TrainingChoice<'_>, count: &dyn Fn(Pass<'_>) -> f64) -> f64 {
        let geometry = self.spec.geometry();
        let cell = match geometry.kind {
            ModelKind::Pixel => 1,
            ModelKind::Latent => self.vae.map_or(LATENT_DOWNSAMPLING, VaeConfig::downsampling),
        };
        let patch = geometry.patch.max(1);
        let size = [self.height, self.width].map(|side| side.div_ceil(cell).div_ceil(patch).saturating_mul(patch));
        let work = self.spec.work(choice, size, CAPTION_TOKENS);
        work.map_or(f64::INFINITY, |work| {
            count(Pass {
                spec: self.spec,
                work: &work,
                size,
                batch: 1,
                element: COMPUTE,
            })
        })
    }

    /// A latent model's decoder, which runs after the last step.
    fn decoder(&self) -> f64 {
        match self.vae.map(|vae| vae.block_out_channels.as_slice()) {
            Some([last, rest @ ..]) => {
                let before = *rest.first().unwrap_or(last) as f64;
                COMPUTE as f64 * self.width as f64 * self.height as f64 * 2.0 * (*last as f64 + before)
            }
            Some([]) | None => 0.0,
        }
    }
}

/// Whether the released recipe trains a parameter.
fn is_trained(meta: &NamedParameter) -> bool {
    match meta.group {
        Group::Block { index, of } => index < TRAINED_ENDS || index + TRAINED_ENDS >= of,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::detailer::DetailerLayout;
    use crate::model::zimage::{DitConfig, ZImage};

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
        let billions = |config: DitConfig, head: Option<DetailerLayout>| {
            ZImage { config, head }
                .metas()
                .iter()
                .map(NamedParameter::elements_exact)
                .sum::<f64>()
                / 1e9
        };
        assert!((billions(published(ModelKind::Latent, 2), None) - 6.15).abs() < 0.01);
        for (patch, size) in [(16, 6.16), (64, 6.21)] {
            let head = DetailerLayout::for_patch(patch, None, None, 3840).unwrap();
            let found = billions(published(ModelKind::Pixel, patch), Some(head));
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
        let head = DetailerLayout::for_patch(16, Some(&[most; 4]), Some(most), most).unwrap();
        for (kind, head) in [(ModelKind::Latent, None), (ModelKind::Pixel, Some(head))] {
            let estimate = MemoryEstimate::of(&EstimateInput {
                spec: &ZImage {
                    config: DitConfig { kind, ..config.clone() },
                    head,
                },
                vae: Some(&vae),
                text_parameters: u64::MAX,
                trunk: &Precision::default(),
                width: 1 << 48,
                height: 1 << 48,
            });
            assert_eq!((estimate.sampling.peak, estimate.training.peak), (u64::MAX, u64::MAX));
        }
    }

    #[test]
    fn the_released_recipe_trains_two_and_a_half_billion() {
        let config = published(ModelKind::Pixel, 16);
        let head = DetailerLayout::for_patch(16, None, None, 3840).unwrap();
        let estimate = MemoryEstimate::of(&EstimateInput {
            spec: &ZImage {
                config,
                head: Some(head),
            },
            vae: None,
            text_parameters: 4_022_000_000,
            trunk: &Precision::default(),
            width: 1024,
            height: 1024,
        });
        assert!((estimate.training.trained_parameters as f64 / 1e9 - 2.54).abs() < 0.02);
        assert!((estimate.sampling.weights as f64 / 1e9 - 12.3).abs() < 0.1);
        assert!(estimate.sampling.peak > estimate.sampling.weights);
        assert!(estimate.training.peak > estimate.training.optimizer + estimate.training.weights);
    }
}
