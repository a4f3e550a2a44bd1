//! The outermost stage of a Detailer Head in one pass, from half resolution to the picture.
//!
//! `output(silu(decoder([up(map), silu(encoder(image))])))` onto a [`Canvas`], where `up` is a 3×3 convolution of the map at
//! twice its height and width, `encoder` and `decoder` are 3×3 convolutions and `output` is a 1×1 one to three colours (see
//! [`super::conv`]). Encoding the image again costs less than keeping what the head's first stage made of it: nothing of the
//! picture's size but images is ever stored.
//!
//! Shapes: map `[batch, height / 2, width / 2, 16]`, image `[batch, height, width, 3]`, both in the compute type; all
//! convolutions in between have 16 channels, which is what the 4K head has. On CUDA weights of `up` that meet the same pixel
//! are added up and rounded to bf16.

use super::conv::{
    Activation, Canvas, Conv, PICTURE_CHANNELS, conv2d, conv2d_f32, conv3x3_silu_pool, paint, upsample_conv3x3,
};
use super::grid;
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Channels of the map and of everything in between.
const CHANNELS: usize = 16;

const OP: &str = "detail_stage";
const IMAGE: &str = "detail_stage";

/// The stage's convolutions.
#[derive(Clone, Copy, Debug)]
pub struct DetailStage<'a> {
    /// From the image, with SiLU.
    pub encoder: &'a Conv,
    /// From the map at twice its size, without activation.
    pub up: &'a Conv,
    /// From both, `up`'s channels first, with SiLU.
    pub decoder: &'a Conv,
    /// To three colours.
    pub output: &'a Conv,
}

/// The weights of a [`DetailStage`] as the CUDA kernel wants them; nothing on the CPU.
#[derive(Clone, Debug)]
pub struct DetailWeights {
    arranged: Option<Tensor>,
}

impl DetailStage<'_> {
    /// Whether convolutions of these sizes (outputs, channels of the sources) make such a stage.
    pub fn suits(&self) -> bool {
        let sizes = |conv: &Conv| (conv.kernel(), conv.channels(), conv.outputs());
        sizes(self.encoder) == (3, [PICTURE_CHANNELS, 0], CHANNELS)
            && sizes(self.up) == (3, [CHANNELS, 0], CHANNELS)
            && sizes(self.decoder) == (3, [CHANNELS, CHANNELS], CHANNELS)
            && sizes(self.output) == (1, [CHANNELS, 0], PICTURE_CHANNELS)
    }

    /// Arranges the weights of now; after they change, do it again.
    ///
    /// # Errors
    /// When the sizes do not suit, or the device has no room.
    pub fn arrange(&self) -> Result<DetailWeights> {
        self.ensure_suits()?;
        let arranged = match self.encoder.weight().cuda() {
            None => None,
            Some(device) => Some(self.arrange_on(device)?),
        };
        Ok(DetailWeights { arranged })
    }

    fn arrange_on(&self, device: &CudaDevice) -> Result<Tensor> {
        let kernel = device.kernel(IMAGE, "detail_stage_arrange")?;
        let elements = kernel.info().tile[0] as usize;
        let mut arranged = Tensor::empty(&self.encoder.weight().device(), [elements], DType::I32)?;
        let args = Args::new()
            .input(self.encoder.weight())?
            .input(self.up.weight())?
            .input(self.decoder.weight())?
            .output(&mut arranged)?;
        let blocks = grid(OP, elements.div_ceil(kernel.info().threads.max(1) as usize))?;
        // SAFETY: the arguments are those of `detail_stage_arrange`, the weights' sizes suit, and the result has the number of words
        // that the kernel says it writes.
        unsafe { kernel.launch(device, [blocks, 1, 1], args)? };
        Ok(arranged)
    }

    fn ensure_suits(&self) -> Result<()> {
        if self.suits() {
            return Ok(());
        }
        let sizes = [self.encoder, self.up, self.decoder, self.output].map(|conv| (conv.channels(), conv.outputs()));
        Err(Error::invalid(format!(
            "{OP}: convolutions between {sizes:?} channels; expected {CHANNELS} everywhere between images"
        )))
    }
}

/// The stage on `map` and `image`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn detail_stage(
    stage: &DetailStage<'_>,
    weights: &DetailWeights,
    map: &Tensor,
    image: &Tensor,
    canvas: Canvas<'_>,
) -> Result<()> {
    stage.ensure_suits()?;
    image.ensure_rank(OP, "image", 4, "[batch, height, width, 3]")?;
    let [batch, height, width] = [image.dim(0), image.dim(1), image.dim(2)];
    if !height.is_multiple_of(2) || !width.is_multiple_of(2) {
        return Err(Error::invalid(format!(
            "{OP}: an image of {width}x{height} has no half resolution: both sides must be even"
        )));
    }
    let compute = image.device().compute_dtype();
    image.ensure_shape(OP, "image", [batch, height, width, PICTURE_CHANNELS])?;
    image.ensure_dtype(OP, "image", compute)?;
    map.ensure_shape(OP, "map", [batch, height / 2, width / 2, CHANNELS])?;
    map.ensure_dtype(OP, "map", compute)?;
    map.ensure_device(OP, "map", &image.device())?;
    stage.encoder.weight().ensure_device(OP, "weight", &image.device())?;
    canvas.expect(OP, [batch, height, width, PICTURE_CHANNELS], image)?;
    let pixels = batch * height * width;
    // Per pixel: encoder, four pixels of the map, decoder, and the colours.
    let flops = 2 * pixels * CHANNELS * (27 + 4 * CHANNELS + 18 * CHANNELS + PICTURE_CHANNELS);
    let _op = crate::profile::op(OP, image, flops, map.bytes() + image.bytes() + canvas.bytes());
    match image.cuda().zip(weights.arranged.as_ref()) {
        None => step_by_step(stage, map, image, canvas),
        Some((device, arranged)) => launch(device, stage, arranged, map, image, canvas),
    }
}

/// The definition.
fn step_by_step(stage: &DetailStage<'_>, map: &Tensor, image: &Tensor, canvas: Canvas<'_>) -> Result<()> {
    let (encoded, _) = conv3x3_silu_pool(image, stage.encoder)?;
    let upsampled = upsample_conv3x3(map, stage.up)?;
    let decoded = conv2d(&upsampled, Some(&encoded), stage.decoder, Activation::Silu, None)?;
    paint(&conv2d_f32(&decoded, stage.output, canvas.scale)?, canvas)
}

fn launch(
    device: &CudaDevice,
    stage: &DetailStage<'_>,
    arranged: &Tensor,
    map: &Tensor,
    image: &Tensor,
    canvas: Canvas<'_>,
) -> Result<()> {
    let kernel = device.kernel(IMAGE, OP)?;
    let [batch, height, width] = [image.dim(0), image.dim(1), image.dim(2)];
    let args = Args::new()
        .input(map)?
        .input(image)?
        .input(arranged)?
        .input(stage.output.weight())?
        .input(stage.encoder.bias())?
        .input(stage.up.bias())?
        .input(stage.decoder.bias())?
        .input(stage.output.bias())?
        .output(canvas.picture)?
        .optional(canvas.factors)?
        .int(height)
        .int(width)
        .float(canvas.scale);
    let [tile_height, tile_width, ..] = kernel.info().tile.map(|extent| extent.max(1) as usize);
    let blocks = grid(OP, batch * height.div_ceil(tile_height) * width.div_ceil(tile_width))?;
    // SAFETY: the arguments are those of `detail_stage`, of the shapes and types checked at the door; one block per tile.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}
