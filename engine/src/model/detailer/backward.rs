//! The head in training: forward with what backward needs, and backward.

use super::{Detailer, DetailerLayout, IMAGE_CHANNELS, Stage, StageLayout};
use crate::device::MemoryTag;
use crate::error::{Error, Result};
use crate::model::parameters::{Parameter, Slot, list_tensors};
use crate::ops::conv::{
    Activation, Conv, ConvGrads, ConvSaved, conv2d_backward, conv2d_f32, conv2d_f32_backward, conv2d_silu_with_sum,
    conv3x3_silu_pool_backward, conv3x3_silu_pool_with_sum, upsample_conv3x3, upsample_conv3x3_backward,
};
use crate::profile;
use crate::tensor::Tensor;

/// Weight and bias.
const CONV_PARAMETERS: usize = 2;
/// Encoder, upsampling and decoder.
const STAGE_PARAMETERS: usize = 3 * CONV_PARAMETERS;

/// What a head has kept of its forward pass.
pub struct SavedDetailer {
    image: Tensor,
    context: Tensor,
    /// From the image inwards.
    encoders: Vec<SavedEncoder>,
    pooled: Tensor,
    bottleneck_sum: Option<Tensor>,
    /// From the bottom out.
    decoders: Vec<SavedDecoder>,
    decoded: Tensor,
}

struct SavedEncoder {
    skip: Tensor,
    sum: Option<Tensor>,
    /// What the next stage reads; the last one's is the bottleneck's.
    pooled: Option<Tensor>,
}

struct SavedDecoder {
    below: Tensor,
    upsampled: Tensor,
    sum: Option<Tensor>,
}

impl DetailerLayout {
    /// The parameters of the head whose tensors are named `{prefix}.…`, in the order of its tensors.
    pub fn parameters(&self, prefix: &str) -> Vec<Parameter> {
        let conv = |name: &str, kernel: usize, inputs: usize, outputs: usize| {
            [
                Parameter::one(format!("{prefix}.{name}.weight"), &[outputs, inputs, kernel, kernel]),
                Parameter::one(format!("{prefix}.{name}.bias"), &[outputs]),
            ]
        };
        let mut all = Vec::new();
        for stage in &self.stages {
            let StageLayout {
                name,
                inputs,
                skip,
                below,
                upsampled,
                outputs,
            } = stage;
            all.extend(conv(&format!("enc{name}.0"), 3, *inputs, *skip));
            all.extend(conv(&format!("up{name}.1"), 3, *below, *upsampled));
            all.extend(conv(&format!("dec{name}.0"), 3, upsampled + skip, *outputs));
        }
        let deepest = self.stages.last().map_or(IMAGE_CHANNELS, |stage| stage.skip);
        all.extend(conv("bottleneck.0", 1, deepest + self.context, self.bottleneck));
        let last = self.stages.first().map_or(self.bottleneck, |stage| stage.outputs);
        all.extend(conv("out_conv", 1, last, IMAGE_CHANNELS));
        all
    }
}

list_tensors!(Detailer, |head, all| {
    let Detailer {
        stages,
        bottleneck,
        output,
        ..
    } = head;
    for Stage { encoder, up, decoder } in stages {
        all.extend(encoder.listed());
        all.extend(up.listed());
        all.extend(decoder.listed());
    }
    all.extend(bottleneck.listed());
    all.extend(output.listed());
});

impl Detailer {
    /// As [`Detailer::forward`]. Without `keep_sums` the convolutions before each SiLU are computed again in the backward pass,
    /// which saves about 40 % of what is kept. Either way SiLU reads the sums as they are stored, rounded to the compute type, so
    /// that both give the same bits.
    ///
    /// # Errors
    /// As for [`Detailer::forward`].
    pub fn forward_keeping(&self, x: &Tensor, c: Tensor, keep_sums: bool) -> Result<(Tensor, SavedDetailer)> {
        let _range = profile::range(c"detailer");
        self.expect_image(x)?;
        let _tag = MemoryTag::Saved.scope();
        let mut encoders: Vec<SavedEncoder> = Vec::with_capacity(self.stages.len());
        for stage in &self.stages {
            let input = encoders.last().and_then(|before| before.pooled.as_ref()).unwrap_or(x);
            let (skip, pooled, sum) = conv3x3_silu_pool_with_sum(input, &stage.encoder)?;
            encoders.push(SavedEncoder {
                skip,
                sum: keep_sums.then_some(sum),
                pooled: Some(pooled),
            });
        }
        let pooled = encoders
            .last_mut()
            .and_then(|last| last.pooled.take())
            .unwrap_or(x.clone());
        let silu = |x: &Tensor, second: &Tensor, conv: &Conv| {
            let (y, sum) = conv2d_silu_with_sum(x, Some(second), conv)?;
            Ok::<_, Error>((y, keep_sums.then_some(sum)))
        };
        let (mut current, bottleneck_sum) = silu(&pooled, &c, &self.bottleneck)?;
        let mut decoders = Vec::with_capacity(self.stages.len());
        for (stage, encoder) in self.stages.iter().zip(&encoders).rev() {
            let upsampled = upsample_conv3x3(&current, &stage.up)?;
            let (decoded, sum) = silu(&upsampled, &encoder.skip, &stage.decoder)?;
            decoders.push(SavedDecoder {
                below: std::mem::replace(&mut current, decoded),
                upsampled,
                sum,
            });
        }
        let velocity = conv2d_f32(&current, &self.output, -1.0)?;
        let kept = SavedDetailer {
            image: x.clone(),
            context: c,
            encoders,
            pooled,
            bottleneck_sum,
            decoders,
            decoded: current,
        };
        Ok((velocity, kept))
    }

    /// The gradient of the feature map for the gradient `dv` of the velocity, if `want_context`; `None` otherwise. Parameters'
    /// gradients are added to `slots`, in the order of [`DetailerLayout::parameters`].
    ///
    /// # Errors
    /// When shapes do not fit or the device has no room.
    pub fn backward(
        &self,
        dv: &Tensor,
        kept: SavedDetailer,
        slots: &mut [Slot],
        want_context: bool,
    ) -> Result<Option<Tensor>> {
        let _range = profile::range(c"detailer backward");
        let (stage_slots, rest) = slots.split_at_mut(STAGE_PARAMETERS * self.stages.len());
        let (bottleneck_slots, output_slots) = rest.split_at_mut(CONV_PARAMETERS);
        // Whether a stage's encoder or one before it is trained; the skips of the others need no gradient.
        let mut trained = false;
        let encoder_needed: Vec<bool> = stage_slots
            .chunks(STAGE_PARAMETERS)
            .map(|slots| {
                trained |= slots[..CONV_PARAMETERS].iter().any(Option::is_some);
                trained
            })
            .collect();

        let SavedDetailer {
            image,
            context,
            mut encoders,
            pooled,
            bottleneck_sum,
            mut decoders,
            decoded,
        } = kept;
        let mut gradient = with_grads(&self.output, output_slots, |grads| {
            conv2d_f32_backward(dv, &decoded, &self.output, -1.0, true, grads)
        })?
        .expect("it was wanted");
        drop(decoded);
        let mut d_skips = Vec::with_capacity(self.stages.len());
        let stages = self.stages.iter().zip(stage_slots.chunks_mut(STAGE_PARAMETERS));
        for (index, (stage, slots)) in stages.enumerate() {
            let SavedDecoder { below, upsampled, sum } = decoders.pop().expect("each stage has kept its decoder");
            let (up_slots, decoder_slots) = slots[CONV_PARAMETERS..].split_at_mut(CONV_PARAMETERS);
            let saved = ConvSaved {
                x: &upsampled,
                second: Some(&encoders[index].skip),
                sum,
            };
            let wanted = [true, encoder_needed[index]];
            let sources = with_grads(&stage.decoder, decoder_slots, |grads| {
                conv2d_backward(&gradient, saved, &stage.decoder, Activation::Silu, wanted, grads)
            })?;
            drop(upsampled);
            d_skips.push(sources.second);
            let d_upsampled = sources.x.expect("it was wanted");
            gradient = with_grads(&stage.up, up_slots, |grads| {
                upsample_conv3x3_backward(&d_upsampled, &below, &stage.up, true, grads)
            })?
            .expect("it was wanted");
        }
        let saved = ConvSaved {
            x: &pooled,
            second: Some(&context),
            sum: bottleneck_sum,
        };
        let wanted = [trained, want_context];
        let sources = with_grads(&self.bottleneck, bottleneck_slots, |grads| {
            conv2d_backward(&gradient, saved, &self.bottleneck, Activation::Silu, wanted, grads)
        })?;
        drop((gradient, pooled, context));
        let mut d_pooled = sources.x;
        for (index, stage) in self.stages.iter().enumerate().rev() {
            let SavedEncoder { skip, sum, .. } = encoders.pop().expect("each stage has kept its encoder");
            let (Some(from_below), Some(d_skip)) = (d_pooled.take(), d_skips.pop().flatten()) else {
                break;
            };
            let input = encoders
                .last()
                .and_then(|before| before.pooled.as_ref())
                .unwrap_or(&image);
            let saved = ConvSaved {
                x: input,
                second: None,
                sum,
            };
            let wanted = index > 0 && encoder_needed[index - 1];
            let slots = &mut stage_slots[index * STAGE_PARAMETERS..][..CONV_PARAMETERS];
            d_pooled = with_grads(&stage.encoder, slots, |grads| {
                conv3x3_silu_pool_backward([&d_skip, &from_below], &skip, saved, &stage.encoder, wanted, grads)
            })?;
        }
        Ok(sources.second)
    }
}

/// Runs `backward` with the places of a convolution's gradients; where one of the two is frozen, with a place to forget it in.
fn with_grads<T>(
    conv: &Conv,
    slots: &mut [Slot],
    backward: impl FnOnce(Option<ConvGrads<'_>>) -> Result<T>,
) -> Result<T> {
    let [weight, bias] = slots else {
        unreachable!("a convolution has {CONV_PARAMETERS} parameters");
    };
    if weight.is_none() && bias.is_none() {
        return backward(None);
    }
    let spare = |slot: &Slot, like: &Tensor| {
        let make = || Tensor::zeros(&like.device(), like.shape(), like.dtype());
        slot.is_none().then(make).transpose()
    };
    let [like_weight, like_bias] = conv.parameters();
    let (mut no_weight, mut no_bias) = (spare(weight, like_weight)?, spare(bias, like_bias)?);
    let (Some(weight), Some(bias)) = (
        weight.as_mut().or(no_weight.as_mut()),
        bias.as_mut().or(no_bias.as_mut()),
    ) else {
        unreachable!("what has no slot got a spare one");
    };
    backward(Some(ConvGrads { weight, bias }))
}
