//! The family's description of itself.

use std::sync::Arc;

use serde_json::{Value, json};

use super::family::of_the_other_kind;
use super::trained::{Reach, TrainedFlux2};
use super::{Flux2, Flux2Config, Flux2Dit};
use crate::device::Device;
use crate::error::Result;
use crate::layers::{Choose, Linear, Module, NamedParameter, ParamSource, Trained, any_trained, metas};
use crate::model::config::ModelKind;
use crate::model::denoiser::{Denoiser, Geometry, Trainable, TrainingChoice};
use crate::model::detailer::DetailerLayout;
use crate::model::limits::DeviceLimits;
use crate::model::spec::{Loading, Spec};
use crate::model::text::Readout;
use crate::model::work::{BlockElements, BlockWork, Keep, OutputWork, ProductWork, RowsWork, StackWork, Work};

/// After which layers of the text encoder its stream is read.
const TEXT_STATES: [usize; 3] = [9, 18, 27];

/// Tokens that prompts are filled up to.
const TEXT_TOKENS: usize = 512;

/// The shift e^μ of the published schedule: μ is linear in the number of image tokens, on one line for 10 steps and on another for 200, and
/// linear in the steps between; from 4301 tokens on it is that of 200 steps. Source: the published pipeline.
fn empirical_shift(image_tokens: usize, steps: usize) -> f64 {
    const MANY_TOKENS: usize = 4300;
    let tokens = image_tokens as f64;
    let of_200 = 0.000_169_27 * tokens + 0.456_666_66;
    let of_10 = 8.738_095_24e-5 * tokens + 1.898_333_33;
    let slope = (of_200 - of_10) / 190.0;
    match image_tokens > MANY_TOKENS {
        true => of_200,
        false => of_200 + slope * (steps as f64 - 200.0),
    }
    .exp()
}

impl Flux2 {
    fn block(&self, keep: Keep, products: &[(&Linear<Trained>, [usize; 2])], tokens: f64) -> BlockWork {
        let (dim, ffn) = (self.config.dim, self.config.ffn_hidden);
        let product =
            |(layer, extents): &(&Linear<Trained>, [usize; 2])| ProductWork::of(layer, *extents, keep.reached());
        BlockWork {
            tokens,
            keep,
            products: products.iter().map(product).collect(),
            attention_width: dim,
            elements: BlockElements {
                input: dim,
                inside: 7 * dim + 2 * ffn,
                inside_f32: self.config.heads,
                // The streams beside the feed-forward network's halves, or the heads twice over.
                forward: 3 * dim + (3 * ffn + dim).max(7 * dim),
                // Gradients of the streams beside those of heads and halves side by side.
                backward: 4 * dim + (4 * ffn + 4 * dim).max(10 * dim),
            },
        }
    }
}

impl Spec for Flux2 {
    fn geometry(&self) -> Geometry {
        self.config.geometry()
    }

    fn caption_width(&self) -> usize {
        self.config.caption_width
    }

    fn readout(&self) -> Readout {
        Readout {
            states: TEXT_STATES.to_vec(),
            thoughtless: true,
            padded: Some(TEXT_TOKENS),
        }
    }

    fn shift(&self, image_tokens: usize, steps: usize) -> Option<f32> {
        (self.config.kind == ModelKind::Latent).then(|| empirical_shift(image_tokens, steps) as f32)
    }

    fn main_blocks(&self) -> usize {
        self.config.blocks()
    }

    fn head(&self) -> Option<&DetailerLayout> {
        self.head.as_ref()
    }

    fn metas(&self) -> Vec<NamedParameter> {
        metas(&self.describe()).into_iter().cloned().collect()
    }

    fn leaves_aside(&self, name: &str) -> bool {
        of_the_other_kind(self.config.kind, name)
    }

    fn sizes(&self) -> Value {
        json!(self.config)
    }

    fn summary(&self) -> String {
        let config = &self.config;
        format!(
            "width {}, {} heads × {}, {} double-stream and {} single-stream blocks, feed-forward {}, captions {}, {} channels",
            config.dim,
            config.heads,
            config.head_dim,
            config.double_blocks,
            config.single_blocks,
            config.ffn_hidden,
            config.caption_width,
            config.in_channels
        )
    }

    fn config_json(&self) -> Value {
        self.config.to_json()
    }

    fn pixel_model(&self, patch: usize, widths: Option<&[usize]>, bottleneck: Option<usize>) -> Result<Arc<dyn Spec>> {
        let config = Flux2Config {
            kind: ModelKind::Pixel,
            patch,
            in_channels: 3,
            ..self.config.clone()
        };
        let head = DetailerLayout::for_patch(patch, widths, bottleneck, config.dim)?;
        Ok(Arc::new(Flux2 {
            config,
            head: Some(head),
        }))
    }

    fn ensure_runs_on(&self, device: &Device) -> Result<()> {
        self.config.ensure_runs_on(device)?;
        self.head.as_ref().map_or(Ok(()), |head| head.ensure_runs_on(device))
    }

    fn load(&self, params: &dyn ParamSource, device: &Device, loaded: &mut Loading<'_>) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(Flux2Dit::load(self, params, device, loaded)?))
    }

    fn load_trainable(
        &self,
        params: &dyn ParamSource,
        device: &Device,
        choice: &TrainingChoice<'_>,
        loaded: &mut Loading<'_>,
    ) -> Result<Box<dyn Trainable>> {
        Ok(Box::new(TrainedFlux2::load(self, params, device, choice, loaded)?))
    }

    fn work(&self, choice: &TrainingChoice<'_>, size: [usize; 2], caption_tokens: usize) -> Result<Work> {
        let Flux2Config {
            dim,
            ffn_hidden: ffn,
            caption_width,
            ..
        } = self.config;
        let [rows, columns] = self.config.grid(size)?;
        let (image, captions) = (rows as f64 * columns as f64, caption_tokens.max(1) as f64);
        let trained = self
            .describe()
            .transform(&mut Choose(|meta: &NamedParameter| (choice.trains)(meta)))?;
        let reach = Reach::new(&trained, choice.recomputes);
        let features = self.config.patch_features();
        let rows = |rows, layer, extents, passes| RowsWork {
            rows,
            product: ProductWork::of(layer, extents, passes),
        };
        // A token meets the weights of its own stream alone, which are as large as the other's.
        let double = trained.double.iter().zip(&reach.double).map(|(block, keep)| {
            let stream = &block.image;
            let products = [
                (&stream.qkv, [3 * dim, dim]),
                (&stream.out, [dim, dim]),
                (&stream.w13, [2 * ffn, dim]),
                (&stream.w2, [dim, ffn]),
            ];
            self.block(*keep, &products, image + captions)
        });
        let single = trained.single.iter().zip(&reach.single).map(|(block, keep)| {
            let products = [(&block.input, [3 * dim + 2 * ffn, dim]), (&block.out, [dim, dim + ffn])];
            self.block(*keep, &products, image + captions)
        });
        Ok(Work {
            embedders: vec![
                rows(image, &trained.patch, [dim, features], false),
                rows(captions, &trained.caption, [dim, caption_width], false),
            ],
            stacks: vec![
                StackWork {
                    names: ["double-stream blocks", "double-stream blocks' attention"],
                    blocks: double.collect(),
                },
                StackWork {
                    names: ["single-stream blocks", "single-stream blocks' attention"],
                    blocks: single.collect(),
                },
            ],
            output: match &trained.last {
                None => OutputWork::Head {
                    passes: reach.features,
                    trained: any_trained(&trained.head),
                },
                Some(last) => OutputWork::FinalLayer(rows(image, &last.linear, [features, dim], reach.features)),
            },
        })
    }
}
