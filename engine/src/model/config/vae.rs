//! The VAE's sizes and scales.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Described, config_of, read_json};
use crate::error::{Error, Result};
use crate::files;
use crate::limits::{self, LatentScale, LatentShift, Layers, NormEpsilon, Real, Width};

/// The class that a VAE's `config.json` names.
const CLASS: &str = "AutoencoderKL";

/// The class whose latents are packed and normalised by statistics.
const PACKED_CLASS: &str = "AutoencoderKLFlux2";

/// The kind of the decoder's blocks.
const UP_BLOCK: &str = "UpDecoderBlock2D";

/// The VAE's sizes and scales, from its `config.json`; missing entries have the defaults of diffusers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VaeConfig {
    /// Channels of the latent.
    pub latent_channels: usize,
    /// Channels of the image.
    pub out_channels: usize,
    /// Widths of the encoder's blocks, from the image inwards; the decoder's are the same, reversed.
    pub block_out_channels: Vec<usize>,
    /// Kinds of the decoder's blocks, one per width.
    pub up_block_types: Option<Vec<String>>,
    /// Residual blocks in an encoder block; a decoder block has one more.
    pub layers_per_block: usize,
    /// Groups of each normalisation.
    pub norm_num_groups: usize,
    /// The activation's name.
    pub act_fn: String,
    /// A latent of the transformer, divided by this, …
    pub scaling_factor: f32,
    /// … plus this, is what the decoder takes.
    pub shift_factor: f32,
    /// Whether a 1×1 convolution stands before the decoder.
    pub use_post_quant_conv: bool,
    /// Whether a 1×1 convolution stands after the encoder.
    pub use_quant_conv: bool,
    /// Whether the middle block has attention.
    pub mid_block_add_attention: bool,
    /// Of an autoencoder whose latents are packed 2×2, four times as many channels, and normalised by statistics of each: what is added
    /// to variances. `scaling_factor` and `shift_factor` are without meaning then.
    pub batch_norm_eps: Option<f32>,
}

impl Default for VaeConfig {
    fn default() -> Self {
        VaeConfig {
            latent_channels: 4,
            out_channels: 3,
            block_out_channels: vec![64],
            up_block_types: None,
            layers_per_block: 1,
            norm_num_groups: 32,
            act_fn: "silu".into(),
            scaling_factor: 0.18215,
            shift_factor: 0.0,
            use_post_quant_conv: true,
            use_quant_conv: true,
            mid_block_add_attention: true,
            batch_norm_eps: None,
        }
    }
}

/// The entries of the `config.json` that are used.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Entries {
    #[serde(rename = "_class_name")]
    class_name: Option<String>,
    latent_channels: Option<Width>,
    out_channels: Option<Width>,
    block_out_channels: Option<Vec<Width>>,
    up_block_types: Option<Vec<String>>,
    layers_per_block: Option<Layers>,
    norm_num_groups: Option<Width>,
    act_fn: Option<String>,
    scaling_factor: Option<LatentScale>,
    shift_factor: Option<LatentShift>,
    use_post_quant_conv: Option<bool>,
    use_quant_conv: Option<bool>,
    mid_block_add_attention: Option<bool>,
    batch_norm_eps: Option<NormEpsilon>,
    patch_size: Option<[Width; 2]>,
    decoder_block_out_channels: Option<Vec<Width>>,
}

impl Entries {
    /// The sizes and scales, if they are supported.
    fn checked(self) -> std::result::Result<VaeConfig, String> {
        if let Some(size) = self.patch_size.filter(|size| size.map(Width::get) != [2, 2]) {
            return Err(format!(
                "says patch_size = {:?}, only [2, 2] is supported",
                size.map(Width::get)
            ));
        }
        let decoder = self.decoder_block_out_channels.clone();
        let config = VaeConfig::from(self);
        let decoder = decoder.map(|widths| widths.into_iter().map(Width::get).collect::<Vec<_>>());
        if let Some(widths) = decoder.filter(|widths| *widths != config.block_out_channels) {
            return Err(format!(
                "says decoder_block_out_channels = {widths:?}, only the encoder's {:?} are supported",
                config.block_out_channels
            ));
        }
        config.check()?;
        Ok(config)
    }
}

impl From<Entries> for VaeConfig {
    fn from(entries: Entries) -> Self {
        let is_packed = entries.class_name.as_deref() == Some(PACKED_CLASS);
        let default = match is_packed {
            true => VaeConfig::packed(),
            false => VaeConfig::default(),
        };
        let widths = entries.block_out_channels;
        VaeConfig {
            latent_channels: entries.latent_channels.map_or(default.latent_channels, Width::get),
            out_channels: entries.out_channels.map_or(default.out_channels, Width::get),
            block_out_channels: widths.map_or(default.block_out_channels, |widths| {
                widths.into_iter().map(Width::get).collect()
            }),
            up_block_types: entries.up_block_types,
            layers_per_block: entries.layers_per_block.map_or(default.layers_per_block, Layers::get),
            norm_num_groups: entries.norm_num_groups.map_or(default.norm_num_groups, Width::get),
            act_fn: entries.act_fn.unwrap_or(default.act_fn),
            scaling_factor: entries.scaling_factor.map_or(default.scaling_factor, Real::single),
            shift_factor: entries.shift_factor.map_or(default.shift_factor, Real::single),
            use_post_quant_conv: entries.use_post_quant_conv.unwrap_or(default.use_post_quant_conv),
            use_quant_conv: entries.use_quant_conv.unwrap_or(default.use_quant_conv),
            mid_block_add_attention: entries
                .mid_block_add_attention
                .unwrap_or(default.mid_block_add_attention),
            batch_norm_eps: default
                .batch_norm_eps
                .map(|default| entries.batch_norm_eps.map_or(default, Real::single)),
        }
    }
}

impl VaeConfig {
    /// Those of the VAE of Z-Image, which is FLUX.1's.
    pub fn published() -> Self {
        VaeConfig {
            latent_channels: 16,
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            scaling_factor: 0.3611,
            shift_factor: 0.1159,
            use_post_quant_conv: false,
            ..VaeConfig::default()
        }
    }

    /// Those of FLUX.2's.
    fn packed() -> Self {
        VaeConfig {
            latent_channels: 32,
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            scaling_factor: 1.0,
            batch_norm_eps: Some(1e-4),
            ..VaeConfig::default()
        }
    }

    /// Reads `config.json` in the VAE's folder or beside its file; the published sizes are assumed of a file that stands without.
    ///
    /// # Errors
    /// When it cannot be read, has a number that makes no sense, or describes an autoencoder that cannot be decoded for.
    pub fn read(path: &Path) -> Result<Self> {
        Ok(Self::find(path)?.unwrap_or_else(Self::published))
    }

    /// As [`VaeConfig::read`], `None` for a file that stands without.
    ///
    /// # Errors
    /// As [`VaeConfig::read`].
    pub fn find(part: &Path) -> Result<Option<Self>> {
        let path = config_of(part);
        let Some(described) = Described::of(part)? else {
            return Ok(None);
        };
        match described.class_name.as_deref() {
            Some(CLASS | PACKED_CLASS) => {}
            // Older files do not say it.
            None if part.is_dir() || described.latent_channels.is_some() => {}
            _ if !part.is_dir() => return Ok(None),
            other => {
                let other = crate::shown_name(other.unwrap_or_default()).into_owned();
                return Err(Error::file(path, format!("describes a {other}, expected an {CLASS}")));
            }
        }
        described.ensure_plain(&path)?;
        let config = read_json::<Entries>(&path)?.checked();
        config.map(Some).map_err(|reason| Error::file(&path, reason))
    }

    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// As [`VaeConfig::read`].
    pub fn from_json(text: &str) -> Result<Self> {
        let refused = |reason: String| Error::invalid(format!("the VAE's configuration {reason}"));
        let entries = files::from_json::<Entries>(text.as_bytes()).map_err(refused)?;
        entries.checked().map_err(refused)
    }

    /// What is not supported or makes no sense, in words.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        let refuse = |entry: &str, found: &dyn std::fmt::Debug, expected: &str| {
            Err(format!("says {entry} = {found:?}, only {expected} is supported"))
        };
        if self.use_post_quant_conv && self.batch_norm_eps.is_none() {
            return refuse("use_post_quant_conv", &true, "false");
        }
        if !["silu", "swish"].contains(&self.act_fn.as_str()) {
            return refuse("act_fn", &self.act_fn, "\"silu\"");
        }
        let widths = &self.block_out_channels;
        if !(1..=limits::VAE_BLOCKS).contains(&widths.len()) {
            let expected = format!("a list of 1 to {}", limits::VAE_BLOCKS);
            return refuse("block_out_channels of a length", &widths.len(), &expected);
        }
        if let Some(kinds) = &self.up_block_types
            && (kinds.iter().any(|kind| kind != UP_BLOCK) || kinds.len() != widths.len())
        {
            return refuse("up_block_types", kinds, "one \"UpDecoderBlock2D\" per width");
        }
        let sizes = [
            ("latent_channels", self.latent_channels),
            ("out_channels", self.out_channels),
            ("norm_num_groups", self.norm_num_groups),
        ];
        let sizes = sizes
            .into_iter()
            .chain(widths.iter().map(|width| ("block_out_channels", *width)));
        for (entry, size) in sizes {
            Width::checked(size as u64).map_err(|reason| format!("says {entry} = {size}: {reason}"))?;
        }
        if !widths.iter().all(|width| width.is_multiple_of(self.norm_num_groups)) {
            let expected = format!("multiples of norm_num_groups = {}", self.norm_num_groups);
            return refuse("block_out_channels", widths, &expected);
        }
        let layers = self.layers_per_block;
        Layers::checked(layers as u64).map_err(|reason| format!("says layers_per_block = {layers}: {reason}"))?;
        LatentScale::checked_single(self.scaling_factor).map_err(|reason| format!("says scaling_factor: {reason}"))?;
        LatentShift::checked_single(self.shift_factor).map_err(|reason| format!("says shift_factor: {reason}"))?;
        Ok(())
    }

    /// Cells of the autoencoder along a side of one of the transformer's.
    pub fn packing(&self) -> usize {
        1 + usize::from(self.batch_norm_eps.is_some())
    }

    /// Channels of one of the transformer's cells.
    pub fn cell_channels(&self) -> usize {
        self.latent_channels * self.packing().pow(2)
    }

    /// Image pixels along a side of one of the transformer's cells.
    pub fn downsampling(&self) -> usize {
        self.packing() << (self.block_out_channels.len() - 1)
    }
}
