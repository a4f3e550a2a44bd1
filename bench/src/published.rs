//! The published models' sizes, and small models of the same structure.

use std::fmt;
use std::sync::Arc;

use l2p_engine::model::Spec;
use l2p_engine::model::config::{ModelKind, TextConfig, VaeConfig};
use l2p_engine::model::detailer::DetailerLayout;
use l2p_engine::model::flux2::{Flux2, Flux2Config};
use l2p_engine::model::zimage::{DitConfig, ZImage};
use l2p_engine::{Error, Result};

/// A published source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Z-Image, and L2P's pixel models of it.
    ZImage,
    /// FLUX.2 [klein] base 4B, and pixel models made of it in the same way.
    Klein,
}

impl Family {
    /// What the names of its models begin with.
    fn prefix(self) -> &'static str {
        match self {
            Family::ZImage => "",
            Family::Klein => "klein-",
        }
    }

    /// Tokens of a caption that a step is measured with; FLUX.2's are filled up to so many.
    pub fn caption_tokens(self) -> usize {
        match self {
            Family::ZImage => 96,
            Family::Klein => 512,
        }
    }
}

/// A model at a picture size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelName {
    /// Of which source.
    pub family: Family,
    /// Latent or pixel.
    pub kind: ModelKind,
    /// The published size is 1024 times this.
    pub thousands: usize,
}

impl ModelName {
    /// All that are measured; the latent model at 8K would have a quarter of a million tokens.
    pub const ALL: [ModelName; 12] = [
        ModelName::new(ModelKind::Pixel, 1),
        ModelName::new(ModelKind::Pixel, 2),
        ModelName::new(ModelKind::Pixel, 4),
        ModelName::new(ModelKind::Pixel, 8),
        ModelName::new(ModelKind::Pixel, 10),
        ModelName::new(ModelKind::Latent, 1),
        ModelName::new(ModelKind::Latent, 2),
        ModelName::new(ModelKind::Latent, 4),
        ModelName::of(Family::Klein, ModelKind::Pixel, 1),
        ModelName::of(Family::Klein, ModelKind::Pixel, 4),
        ModelName::of(Family::Klein, ModelKind::Latent, 1),
        ModelName::of(Family::Klein, ModelKind::Latent, 4),
    ];

    /// Z-Image's model that draws 1024 times `thousands` pixels along a side.
    pub const fn new(kind: ModelKind, thousands: usize) -> Self {
        ModelName::of(Family::ZImage, kind, thousands)
    }

    /// A family's model that draws 1024 times `thousands` pixels along a side.
    pub const fn of(family: Family, kind: ModelKind, thousands: usize) -> Self {
        ModelName {
            family,
            kind,
            thousands,
        }
    }

    /// The model's patch in pixels (latent: in latent cells). No pixel model was published for 2K: the one for 1K draws it,
    /// with four times the tokens.
    pub fn patch(self) -> usize {
        match (self.kind, self.thousands) {
            (ModelKind::Latent, _) if self.family == Family::Klein => 1,
            (ModelKind::Latent, _) => 2,
            (ModelKind::Pixel, 4) => 64,
            (ModelKind::Pixel, 8) => 128,
            (ModelKind::Pixel, 10) => 160,
            (ModelKind::Pixel, _) => 16,
        }
    }

    /// The model with its sizes: those published, or small ones.
    ///
    /// # Errors
    /// When there is no head for the patch.
    pub fn model(self, tiny: bool) -> Result<Model> {
        self.built(tiny, false)
    }

    /// The model, or one of the same widths with one block of each kind.
    fn built(self, tiny: bool, shallow: bool) -> Result<Model> {
        let patch = self.patch();
        let head = |dim| match self.kind {
            ModelKind::Pixel => head(patch, dim, tiny).map(Some),
            ModelKind::Latent => Ok(None),
        };
        let spec: Arc<dyn Spec> = match self.family {
            Family::ZImage => {
                let mut config = transformer(self.kind, patch, tiny);
                if shallow {
                    (config.layers, config.refiner_layers) = (1, 1);
                }
                Arc::new(ZImage {
                    head: head(config.dim)?,
                    config,
                })
            }
            Family::Klein => {
                let mut config = klein(self.kind, patch, tiny);
                if shallow {
                    (config.double_blocks, config.single_blocks) = (1, 1);
                }
                Arc::new(Flux2 {
                    head: head(config.dim)?,
                    config,
                })
            }
        };
        let vae = (self.kind == ModelKind::Latent).then(|| match self.family {
            Family::ZImage => vae(tiny),
            Family::Klein => klein_vae(tiny),
        });
        let side = match (tiny, self.kind) {
            (false, _) => 1024 * self.thousands,
            (true, ModelKind::Pixel) => 4 * patch,
            (true, ModelKind::Latent) => 64,
        };
        Ok(Model {
            name: self,
            tiny,
            spec,
            vae,
            side,
        })
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}-{}k", self.family.prefix(), self.kind, self.thousands)
    }
}

impl std::str::FromStr for ModelName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|name| name.to_string() == text);
        found.ok_or_else(|| {
            let names = Self::ALL.map(|name| name.to_string()).join(", ");
            Error::invalid(format!("`{text}` names no model; there are {names}"))
        })
    }
}

/// A model's sizes.
#[derive(Clone, Debug)]
pub struct Model {
    /// Which model it is.
    pub name: ModelName,
    /// Whether its sizes are small ones.
    tiny: bool,
    /// The transformer.
    pub spec: Arc<dyn Spec>,
    /// A latent model's decoder.
    pub vae: Option<VaeConfig>,
    /// Pixels along a side of the picture.
    pub side: usize,
}

impl Model {
    /// The model of the same widths with one block of each kind.
    ///
    /// # Errors
    /// When there is no head for the patch.
    pub fn shallow(&self) -> Result<Self> {
        self.name.built(self.tiny, true)
    }

    /// Height, width and channels of what the transformer draws.
    pub fn canvas(&self) -> [usize; 3] {
        let side = self.side / self.vae.as_ref().map_or(1, VaeConfig::downsampling);
        [side, side, self.spec.geometry().channels]
    }
}

/// The transformer of Z-Image and L2P, or a small one.
pub fn transformer(kind: ModelKind, patch: usize, tiny: bool) -> DitConfig {
    let published = DitConfig {
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
    };
    match tiny {
        false => published,
        true => DitConfig {
            dim: 256,
            heads: 2,
            layers: 2,
            refiner_layers: 1,
            ffn_hidden: 512,
            caption_width: 128,
            t_frequencies: 64,
            t_hidden: 64,
            adaln_width: 64,
            ..published
        },
    }
}

/// The transformer of FLUX.2 [klein] base 4B or of a pixel model of it, or a small one.
pub fn klein(kind: ModelKind, patch: usize, tiny: bool) -> Flux2Config {
    let published = Flux2Config {
        kind,
        dim: 3072,
        heads: 24,
        head_dim: 128,
        double_blocks: 5,
        single_blocks: 20,
        ffn_hidden: 9216,
        caption_width: 7680,
        patch,
        in_channels: if kind == ModelKind::Pixel { 3 } else { 128 },
        rope_theta: 2000.0,
        axes_dims: [32; 4],
        norm_eps: 1e-6,
        t_frequencies: 256,
    };
    match tiny {
        false => published,
        true => Flux2Config {
            dim: 256,
            heads: 2,
            double_blocks: 1,
            single_blocks: 2,
            ffn_hidden: 768,
            caption_width: 128,
            t_frequencies: 64,
            ..published
        },
    }
}

/// Red, green, blue.
const PICTURE_CHANNELS: usize = 3;

/// The Detailer Head for a patch, over a feature map of `context` channels.
///
/// # Errors
/// When none was published for the patch.
pub fn head(patch: usize, context: usize, tiny: bool) -> Result<DetailerLayout> {
    let published = DetailerLayout::for_patch(patch, None, None, 3840)?;
    match tiny {
        false => Ok(DetailerLayout { context, ..published }),
        true => {
            // Stages of full resolution keep the picture's channels; nobody chooses their widths.
            let chosen = published.stages.iter().filter(|stage| stage.skip > PICTURE_CHANNELS);
            let widths = vec![8; chosen.count()];
            DetailerLayout::for_patch(patch, Some(&widths), Some(16), context)
        }
    }
}

/// The autoencoder of Z-Image, or a small one.
pub fn vae(tiny: bool) -> VaeConfig {
    VaeConfig {
        latent_channels: 16,
        block_out_channels: match tiny {
            false => vec![128, 256, 512, 512],
            true => vec![16, 16, 32, 32],
        },
        layers_per_block: if tiny { 1 } else { 2 },
        norm_num_groups: if tiny { 8 } else { 32 },
        scaling_factor: 0.3611,
        shift_factor: 0.1159,
        use_post_quant_conv: false,
        ..VaeConfig::default()
    }
}

/// The autoencoder of FLUX.2, or a small one.
pub fn klein_vae(tiny: bool) -> VaeConfig {
    VaeConfig {
        latent_channels: 32,
        use_post_quant_conv: true,
        batch_norm_eps: Some(1e-4),
        ..vae(tiny)
    }
}

/// Qwen3-4B, or a small text encoder with features of `width`.
pub fn text(tiny: Option<usize>) -> TextConfig {
    let published = TextConfig::published();
    match tiny {
        None => published,
        Some(width) => TextConfig {
            vocabulary: 8192,
            dim: width,
            layers: 3,
            heads: 2,
            kv_heads: 1,
            ffn_hidden: 256,
            ..published
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in ModelName::ALL {
            assert_eq!(name.to_string().parse::<ModelName>().unwrap(), name);
            let model = name.model(false).unwrap();
            assert_eq!(model.side, 1024 * name.thousands);
            let patch = name.patch();
            assert!(model.canvas()[0].is_multiple_of(patch));
            let tiny = name.model(true).unwrap();
            assert!(tiny.spec.caption_width() < model.spec.caption_width() && tiny.canvas()[0].is_multiple_of(patch));
        }
        let message = "pixel-3k".parse::<ModelName>().unwrap_err().to_string();
        assert!(
            message.contains("pixel-4k, pixel-8k, pixel-10k, latent-1k"),
            "{message}"
        );
    }
}
