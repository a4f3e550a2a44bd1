//! The head in training: forward with what backward needs, and backward.

use super::Detailer;
use crate::device::MemoryTag;
use crate::error::{Error, Result};
use crate::layers::Gradients;
use crate::ops::conv::{
    Activation, Conv, ConvSaved, conv2d_backward, conv2d_f32, conv2d_f32_backward, conv2d_silu_with_sum,
    conv3x3_silu_pool_backward, conv3x3_silu_pool_with_sum, upsample_conv3x3, upsample_conv3x3_backward,
};
use crate::profile;
use crate::tensor::Tensor;

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

impl Detailer {
    /// As [`Detailer::forward`]. Without `keep_sums` the convolutions before each SiLU are computed again in the backward pass,
    /// which saves about 40 % of what is kept. Either way SiLU reads the sums as they are stored, rounded to the compute type, so
    /// that both give the same bits.
    ///
    /// # Errors
    /// As for [`Detailer::forward`].
    pub fn forward_saving(&self, x: &Tensor, c: Tensor, keep_sums: bool) -> Result<(Tensor, SavedDetailer)> {
        let _range = profile::range(c"detailer");
        self.ensure_image(x)?;
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
    /// gradients are added to `gradients`.
    ///
    /// # Errors
    /// When shapes do not fit or the device has no room.
    pub fn backward(
        &self,
        dv: &Tensor,
        kept: SavedDetailer,
        gradients: &mut Detailer<Gradients>,
        want_context: bool,
    ) -> Result<Option<Tensor>> {
        let _range = profile::range(c"detailer backward");
        // Whether a stage's encoder or one before it is trained; the skips of the others need no gradient.
        let mut trained = false;
        let stages = gradients.stages.iter();
        let encoder_needed: Vec<bool> = stages
            .map(|stage| {
                trained |= stage.encoder.wants_any();
                trained
            })
            .collect();

        let SavedDetailer {
            image,
            context,
            encoders,
            pooled,
            bottleneck_sum,
            decoders,
            decoded,
        } = kept;
        let gradient = gradients
            .output
            .with_places(&self.output, |grads| {
                conv2d_f32_backward(dv, &decoded, &self.output, -1.0, true, grads)
            })?
            .expect("it was wanted");
        drop(decoded);
        let (gradient, d_skips) = self.decoders_backward(gradient, decoders, &encoders, gradients, &encoder_needed)?;
        let saved = ConvSaved {
            x: &pooled,
            second: Some(&context),
            sum: bottleneck_sum,
        };
        let wanted = [trained, want_context];
        let sources = gradients.bottleneck.with_places(&self.bottleneck, |grads| {
            conv2d_backward(&gradient, saved, &self.bottleneck, Activation::Silu, wanted, grads)
        })?;
        drop((gradient, pooled, context));
        self.encoders_backward(sources.x, d_skips, encoders, &image, gradients, &encoder_needed)?;
        Ok(sources.second)
    }

    /// From the head's output layer back to its bottleneck: the gradient of the bottleneck's result for that of the last decoder's,
    /// and those of the skips from the image inwards, where they are needed.
    fn decoders_backward(
        &self,
        mut gradient: Tensor,
        mut decoders: Vec<SavedDecoder>,
        encoders: &[SavedEncoder],
        gradients: &mut Detailer<Gradients>,
        encoder_needed: &[bool],
    ) -> Result<(Tensor, Vec<Option<Tensor>>)> {
        let mut d_skips = Vec::with_capacity(self.stages.len());
        for (index, (stage, gradients)) in self.stages.iter().zip(&mut gradients.stages).enumerate() {
            let SavedDecoder { below, upsampled, sum } = decoders.pop().expect("each stage has kept its decoder");
            let saved = ConvSaved {
                x: &upsampled,
                second: Some(&encoders[index].skip),
                sum,
            };
            let wanted = [true, encoder_needed[index]];
            let sources = gradients.decoder.with_places(&stage.decoder, |grads| {
                conv2d_backward(&gradient, saved, &stage.decoder, Activation::Silu, wanted, grads)
            })?;
            drop(upsampled);
            d_skips.push(sources.second);
            let d_upsampled = sources.x.expect("it was wanted");
            gradient = gradients
                .up
                .with_places(&stage.up, |grads| {
                    upsample_conv3x3_backward(&d_upsampled, &below, &stage.up, true, grads)
                })?
                .expect("it was wanted");
        }
        Ok((gradient, d_skips))
    }

    /// From the bottleneck back to the image, as far as a stage is trained.
    fn encoders_backward(
        &self,
        mut d_pooled: Option<Tensor>,
        mut d_skips: Vec<Option<Tensor>>,
        mut encoders: Vec<SavedEncoder>,
        image: &Tensor,
        gradients: &mut Detailer<Gradients>,
        encoder_needed: &[bool],
    ) -> Result<()> {
        for (index, stage) in self.stages.iter().enumerate().rev() {
            let SavedEncoder { skip, sum, .. } = encoders.pop().expect("each stage has kept its encoder");
            let (Some(from_below), Some(d_skip)) = (d_pooled.take(), d_skips.pop().flatten()) else {
                break;
            };
            let input = encoders
                .last()
                .and_then(|before| before.pooled.as_ref())
                .unwrap_or(image);
            let saved = ConvSaved {
                x: input,
                second: None,
                sum,
            };
            let wanted = index > 0 && encoder_needed[index - 1];
            let places = &mut gradients.stages[index].encoder;
            d_pooled = places.with_places(&stage.encoder, |grads| {
                conv3x3_silu_pool_backward([&d_skip, &from_below], &skip, saved, &stage.encoder, wanted, grads)
            })?;
        }
        Ok(())
    }
}
