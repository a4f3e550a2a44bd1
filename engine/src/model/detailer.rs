//! The Detailer Head: a small U-Net over the noisy image, with the transformer's feature map joined at its bottom.
//!
//! Encoder stage k, from the image inwards: 3×3 convolution and SiLU, kept as the skip, then 2×2 maxima. Bottleneck: 1×1
//! convolution and SiLU over the last maxima and the feature map. Decoder stage k, from the bottom out: 3×3 convolution of the
//! nearest-2×-upsampled input, then 3×3 convolution and SiLU over that and the skip. Last, a 1×1 convolution to the image's
//! channels, whose negative is the velocity.
//!
//! Which stages there are and how wide they are is read off the parameters' names and shapes ([`DetailerLayout`]), so that the
//! published heads for 1K, 4K, 8K and 10K and any smaller ones are all the same code.

mod backward;
mod layout;

use super::limits::DeviceLimits;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layers::{ConvLayer, Loader, ParamSource, module};
use crate::ops::conv::{
    Activation, Canvas, conv2d, conv3x3_silu_picture, conv3x3_silu_pool, conv3x3_silu_pooled, upsample_conv3x3,
};
use crate::ops::detail_stage::{DetailStage, DetailWeights, detail_stage};
use crate::profile;
use crate::tensor::Tensor;

pub use backward::SavedDetailer;
pub use layout::{DetailerLayout, HeadVariant, StageLayout};

module! {
    /// A head.
    pub struct Detailer<K> {
        /// From the image inwards.
        pub stages: Vec<Stage<K>>,
        /// 1×1 over the deepest maxima and the feature map.
        pub bottleneck: ConvLayer<K>,
        /// 1×1 to the image's channels.
        pub output: ConvLayer<K>,
        ;
        layout: DetailerLayout,
        ; made
        /// On CUDA, where its sizes suit: the outermost stage's weights for doing it in one pass.
        outermost: Option<DetailWeights>,
    }
}

module! {
    /// One stage of the head.
    pub struct Stage<K> {
        /// 3×3 to the skip.
        pub encoder: ConvLayer<K>,
        /// 3×3 on the upsampled map from below.
        pub up: ConvLayer<K>,
        /// 3×3 over that and the skip.
        pub decoder: ConvLayer<K>,
    }
}

/// What the outermost stage decodes: the map of half the picture's resolution, and the stage's skip, unless it encodes the image
/// again.
struct BelowPicture {
    map: Tensor,
    skip: Option<Tensor>,
}

impl Detailer {
    /// Reads the head whose parameters are named `{prefix}.…`.
    ///
    /// # Errors
    /// Those of [`DetailerLayout::read`], and when the device's kernels cannot take its widths or it has no room.
    pub fn load(params: &dyn ParamSource, device: &Device, prefix: &str) -> Result<Self> {
        let layout = DetailerLayout::read(params, prefix)?;
        layout.ensure_runs_on(device)?;
        let mut head = Loader::load(&layout.describe(prefix), params, device, &mut |_, _| Ok(()))?;
        head.arrange(device)?;
        Ok(head)
    }

    /// Makes what the device's kernels keep in forms of their own, after loading.
    pub(in crate::model) fn arrange(&mut self, device: &Device) -> Result<()> {
        self.outermost = match device {
            Device::Cuda(_) if self.outermost_stage().suits() => Some(self.outermost_stage().arrange()?),
            _ => None,
        };
        Ok(())
    }

    fn outermost_stage(&self) -> DetailStage<'_> {
        let Stage { encoder, up, decoder } = &self.stages[0];
        DetailStage {
            encoder,
            up,
            decoder,
            output: &self.output,
        }
    }

    /// Brings what kernels keep in forms of their own up to date, after parameters have changed.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn rearrange(&mut self) -> Result<()> {
        for Stage { encoder, up, decoder } in &mut self.stages {
            encoder.rearrange()?;
            up.rearrange()?;
            decoder.rearrange()?;
        }
        self.bottleneck.rearrange()?;
        if self.outermost.is_some() {
            self.outermost = Some(self.outermost_stage().arrange()?);
        }
        Ok(())
    }

    /// The stages and channels.
    pub fn layout(&self) -> &DetailerLayout {
        &self.layout
    }

    /// The velocity `[batch, height, width, 3]` in f32 for the noisy image `x` `[batch, height, width, 3]` and the feature map
    /// `c` `[batch, rows, columns, context]`, which is nearest-resized to the bottleneck's grid.
    ///
    /// # Errors
    /// When shapes do not fit or the device has no room.
    pub fn forward(&self, x: &Tensor, c: &Tensor) -> Result<Tensor> {
        let _range = profile::range(c"detailer");
        let below = self.below_picture(x, c)?;
        let mut velocity = Tensor::empty(&x.device(), x.shape(), DType::F32)?;
        let canvas = Canvas {
            picture: &mut velocity,
            scale: 1.0,
            factors: None,
        };
        self.onto_picture(below, x, canvas)?;
        Ok(velocity)
    }

    /// The velocity of [`Detailer::forward`], as the result that goes onto `canvas`. The canvas may be the picture that `x` was
    /// converted from.
    ///
    /// # Errors
    /// As [`Detailer::forward`].
    pub fn paint(&self, x: &Tensor, c: &Tensor, canvas: Canvas<'_>) -> Result<()> {
        let _range = profile::range(c"detailer");
        self.onto_picture(self.below_picture(x, c)?, x, canvas)
    }

    /// All but the outermost stage's decoder.
    fn below_picture(&self, x: &Tensor, c: &Tensor) -> Result<BelowPicture> {
        self.ensure_image(x)?;
        let mut skips = Vec::with_capacity(self.stages.len());
        let mut map = x.clone();
        for (index, stage) in self.stages.iter().enumerate() {
            map = match (index, &self.outermost) {
                // The outermost stage encodes the image again when it decodes.
                (0, Some(_)) => conv3x3_silu_pooled(&map, &stage.encoder)?,
                _ => {
                    let (skip, pooled) = conv3x3_silu_pool(&map, &stage.encoder)?;
                    skips.push(skip);
                    pooled
                }
            };
        }
        map = conv2d(&map, Some(c), &self.bottleneck, Activation::Silu, None)?;
        // Each skip is freed as soon as its stage is decoded.
        for stage in self.stages[1..].iter().rev() {
            let skip = skips.pop().expect("each of these stages left a skip");
            let upsampled = upsample_conv3x3(&map, &stage.up)?;
            drop(map);
            map = conv2d(&upsampled, Some(&skip), &stage.decoder, Activation::Silu, None)?;
        }
        Ok(BelowPicture { map, skip: skips.pop() })
    }

    /// The outermost stage's decoder and the output convolution.
    fn onto_picture(&self, below: BelowPicture, x: &Tensor, canvas: Canvas<'_>) -> Result<()> {
        // The velocity is minus what the output convolution gives.
        let canvas = Canvas {
            scale: -canvas.scale,
            ..canvas
        };
        let BelowPicture { map, skip } = below;
        match &self.outermost {
            Some(weights) => detail_stage(&self.outermost_stage(), weights, &map, x, canvas),
            None => {
                let Stage { up, decoder, .. } = &self.stages[0];
                let upsampled = upsample_conv3x3(&map, up)?;
                drop(map);
                conv3x3_silu_picture(&upsampled, skip.as_ref(), decoder, &self.output, canvas)
            }
        }
    }

    fn ensure_image(&self, x: &Tensor) -> Result<()> {
        x.ensure_rank("detailer", "x", 4, "[batch, height, width, 3]")?;
        let reduction = self.layout.reduction();
        if x.dim(1).is_multiple_of(reduction) && x.dim(2).is_multiple_of(reduction) {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "detailer: an image of {}x{} cannot be halved {} times: height and width must be multiples of {reduction}",
            x.dim(1),
            x.dim(2),
            self.stages.len()
        )))
    }
}
