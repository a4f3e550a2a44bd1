//! The family's description of itself.

use std::sync::Arc;

use serde_json::{Value, json};

use super::backward::GradPlan;
use super::family::{FINAL_LAYER, INPUT};
use super::sizes::ZImage;
use super::trained::TrainedDit;
use super::{Block, Dit, TOKEN_MULTIPLE};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::layers::{Choose, Module, NamedParameter, ParamSource, Trained, metas};
use crate::model::config::ModelKind;
use crate::model::denoiser::{Denoiser, Geometry, Trainable, TrainingChoice};
use crate::model::detailer::DetailerLayout;
use crate::model::limits::DeviceLimits;
use crate::model::spec::{Loading, Spec};
use crate::model::work::{BlockElements, BlockWork, Keep, OutputWork, ProductWork, RowsWork, StackWork, Work};
use crate::model::zimage::DitConfig;

impl ZImage {
    fn blocks(&self, blocks: &[Block<Trained>], keeps: &[Keep], tokens: f64) -> Vec<BlockWork> {
        let (dim, ffn) = (self.config.dim, self.config.ffn_hidden);
        let elements = BlockElements {
            input: dim,
            inside: 6 * dim + 2 * ffn,
            inside_f32: self.config.heads,
            // The stream, its sum and its normalised form beside the feed-forward network's halves and their product, or the heads.
            forward: 3 * dim + (3 * ffn).max(5 * dim),
            // Two gradients of the stream beside the feed-forward network's, or the rotated heads, their gradient and the result's.
            backward: 2 * dim + (2 * ffn).max(7 * dim),
        };
        let work = |(block, keep): (&Block<Trained>, &Keep)| {
            let product = |layer, outputs, inputs| ProductWork::of(layer, [outputs, inputs], keep.reached());
            BlockWork {
                tokens,
                keep: *keep,
                products: vec![
                    product(&block.qkv, 3 * dim, dim),
                    product(&block.out, dim, dim),
                    product(&block.w13, 2 * ffn, dim),
                    product(&block.w2, dim, ffn),
                ],
                attention_width: dim,
                elements,
            }
        };
        blocks.iter().zip(keeps).map(work).collect()
    }
}

impl Spec for ZImage {
    fn geometry(&self) -> Geometry {
        self.config.geometry()
    }

    fn caption_width(&self) -> usize {
        self.config.caption_width
    }

    fn token_multiple(&self) -> usize {
        TOKEN_MULTIPLE
    }

    fn main_blocks(&self) -> usize {
        self.config.layers
    }

    fn head(&self) -> Option<&DetailerLayout> {
        self.head.as_ref()
    }

    fn metas(&self) -> Vec<NamedParameter> {
        let described = self.describe();
        described.map_or_else(|_| Vec::new(), |parts| metas(&parts).into_iter().cloned().collect())
    }

    fn leaves_aside(&self, name: &str) -> bool {
        let other_patch = |part: &str| {
            name.strip_prefix(part)
                .is_some_and(|rest| !rest.starts_with(&format!("{}-1.", self.config.patch)))
        };
        match self.config.kind {
            ModelKind::Pixel => other_patch(INPUT) || name.starts_with(FINAL_LAYER),
            ModelKind::Latent => other_patch(INPUT) || other_patch(FINAL_LAYER),
        }
    }

    fn sizes(&self) -> Value {
        json!(self.config)
    }

    fn summary(&self) -> String {
        let config = &self.config;
        format!(
            "width {}, {} heads × {}, {} blocks and {}+{} refiners, feed-forward {}, captions {}, {} channels",
            config.dim,
            config.heads,
            config.head_dim,
            config.layers,
            config.refiner_layers,
            config.refiner_layers,
            config.ffn_hidden,
            config.caption_width,
            config.in_channels
        )
    }

    fn config_json(&self) -> Value {
        self.config.to_transformer_json()
    }

    fn pixel_model(&self, patch: usize, widths: Option<&[usize]>, bottleneck: Option<usize>) -> Result<Arc<dyn Spec>> {
        let config = DitConfig {
            kind: ModelKind::Pixel,
            patch,
            in_channels: 3,
            ..self.config.clone()
        };
        let head = DetailerLayout::for_patch(patch, widths, bottleneck, config.dim)?;
        Ok(Arc::new(ZImage {
            config,
            head: Some(head),
        }))
    }

    fn streams(&self) -> bool {
        true
    }

    fn ensure_runs_on(&self, device: &Device) -> Result<()> {
        self.config.ensure_runs_on(device)?;
        self.head.as_ref().map_or(Ok(()), |head| head.ensure_runs_on(device))
    }

    fn load(&self, params: &dyn ParamSource, device: &Device, loaded: &mut Loading<'_>) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(Dit::load(self, params, device, loaded)?))
    }

    fn load_trainable(
        &self,
        params: &dyn ParamSource,
        device: &Device,
        choice: &TrainingChoice<'_>,
        loaded: &mut Loading<'_>,
    ) -> Result<Box<dyn Trainable>> {
        Ok(Box::new(TrainedDit::load(self, params, device, choice, loaded)?))
    }

    fn work(&self, choice: &TrainingChoice<'_>, [height, width]: [usize; 2], caption_tokens: usize) -> Result<Work> {
        let DitConfig {
            dim,
            patch,
            in_channels,
            caption_width,
            ..
        } = self.config;
        if patch == 0 || !height.is_multiple_of(patch) || !width.is_multiple_of(patch) {
            return Err(Error::invalid(format!(
                "an image of {width}x{height} cannot be cut into patches of {patch}"
            )));
        }
        let trained = self
            .describe()?
            .transform(&mut Choose(|meta: &NamedParameter| (choice.trains)(meta)))?;
        let reach = GradPlan::new(&trained, choice.recomputes);
        let padded = |tokens: f64| (tokens / TOKEN_MULTIPLE as f64).ceil() * TOKEN_MULTIPLE as f64;
        let image = (height / patch) as f64 * (width / patch) as f64;
        let padded_image = padded(image);
        let captions = padded(caption_tokens.max(1) as f64);
        let features = patch * patch * in_channels;
        let rows = |rows, product| RowsWork { rows, product };
        let mut refiners = self.blocks(&trained.noise_refiner, &reach.noise_refiner, padded_image);
        refiners.extend(self.blocks(&trained.context_refiner, &reach.context_refiner, captions));
        Ok(Work {
            embedders: vec![
                rows(image, ProductWork::of(&trained.patch, [dim, features], false)),
                rows(
                    captions,
                    ProductWork::of(&trained.caption, [dim, caption_width], reach.caption_embedder),
                ),
            ],
            stacks: vec![
                StackWork {
                    names: ["refiners", "refiners' attention"],
                    blocks: refiners,
                },
                StackWork {
                    names: ["main blocks", "main blocks' attention"],
                    blocks: self.blocks(&trained.layers, &reach.layers, padded_image + captions),
                },
            ],
            output: match &self.head {
                Some(_) => OutputWork::Head {
                    passes: reach.features,
                    trained: reach.output,
                },
                None => OutputWork::FinalLayer(rows(
                    image,
                    ProductWork {
                        size: (dim * features) as f64,
                        passes: reach.features || reach.output,
                        trained: reach.output,
                    },
                )),
            },
        })
    }
}
