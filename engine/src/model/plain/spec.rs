//! Sizes, and what follows from them.

use serde::Serialize;
use serde_json::{Value, json};

use super::family::PlainFamily;
use super::trained::TrainedPlain;
use super::{Block, Parts, PlainDit, VECTORS};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::layers::{Bare, Choose, Described, Group, Linear, Meta, Module, ParamSource, metas};
use crate::model::config::ModelKind;
use crate::model::denoiser::{Denoiser, Geometry, Trainable, TrainingChoice};
use crate::model::detailer::DetailerLayout;
use crate::model::family::Family;
use crate::model::spec::{Loading, Spec};
use crate::model::time_embedder::TimeEmbedder;
use crate::model::work::{BlockElements, BlockWork, Keep, OutputWork, ProductWork, RowsWork, StackWork, Work};
use crate::ops::attention::Attention;

/// The sizes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlainConfig {
    pub dim: usize,
    pub heads: usize,
    pub blocks: usize,
    pub ffn: usize,
    pub caption_width: usize,
    /// Patches of a picture; the model takes pictures of so many alone.
    pub positions: usize,
    pub patch: usize,
    pub channels: usize,
    /// Widths of the timestep's sinusoids, hidden layer and embedding.
    pub times: [usize; 3],
}

impl PlainConfig {
    pub fn geometry(&self) -> Geometry {
        Geometry {
            kind: ModelKind::Pixel,
            patch: self.patch,
            channels: self.channels,
        }
    }

    pub fn patch_features(&self) -> usize {
        self.patch * self.patch * self.channels
    }

    /// Patches of a picture of this size.
    ///
    /// # Errors
    /// When there are not as many as positions.
    pub fn tokens(&self, [height, width]: [usize; 2]) -> Result<usize> {
        let tokens = self.geometry().image_tokens([height, width]);
        let whole = height.is_multiple_of(self.patch) && width.is_multiple_of(self.patch);
        match whole && tokens == self.positions {
            true => Ok(tokens),
            false => Err(Error::invalid(format!(
                "an image of {width}x{height} does not have {} patches of {}",
                self.positions, self.patch
            ))),
        }
    }
}

/// A model of the family.
#[derive(Clone, Debug, PartialEq)]
pub struct Plain(pub PlainConfig);

impl Plain {
    /// Its parameters.
    pub fn describe(&self) -> Parts<Described> {
        let config = &self.0;
        let PlainConfig { dim, ffn, blocks, .. } = *config;
        let [_, _, width] = config.times;
        let linear = |group, name: &str, outputs, inputs| Linear::new(group, name, outputs, inputs);
        let block = |index: usize| {
            let group = Group::Block { index, of: blocks };
            let name = |suffix: &str| format!("blocks.{index}.{suffix}");
            let head_dim = dim / config.heads;
            Block {
                qkv: linear(group, &name("attn.qkv"), 3 * dim, dim),
                out: linear(group, &name("attn.proj"), dim, dim),
                w13: linear(group, &name("mlp.fc1"), 2 * ffn, dim),
                w2: linear(group, &name("mlp.fc2"), dim, ffn),
                modulation: linear(group, &name("adaln"), VECTORS * dim, width).with_bias(),
                attention: Attention {
                    heads: config.heads,
                    kv_heads: config.heads,
                    head_dim,
                    causal: false,
                    scale: 1.0 / (head_dim as f32).sqrt(),
                },
            }
        };
        let mut positions = Bare::new(Group::Embedder, "pos_embed", &[1, config.positions, dim]);
        positions.0.flat = true;
        Parts {
            patch: linear(Group::Input, "patch_embed.proj", dim, config.patch_features()).with_bias(),
            positions,
            caption: linear(Group::Embedder, "caption_embed", dim, config.caption_width).with_bias(),
            time: TimeEmbedder::describe(["time_embed.0", "time_embed.2"], config.times, 1.0),
            blocks: (0..blocks).map(block).collect(),
            last_scale: linear(Group::Output, "head.adaln", dim, width).with_bias(),
            output: linear(Group::Output, "head.proj", config.patch_features(), dim).with_bias(),
        }
    }
}

impl Spec for Plain {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn caption_width(&self) -> usize {
        self.0.caption_width
    }

    fn main_blocks(&self) -> usize {
        self.0.blocks
    }

    fn head(&self) -> Option<&DetailerLayout> {
        None
    }

    fn metas(&self) -> Vec<Meta> {
        metas(&self.describe()).into_iter().cloned().collect()
    }

    fn sizes(&self) -> Value {
        json!(self.0)
    }

    fn summary(&self) -> String {
        format!("width {}, {} blocks", self.0.dim, self.0.blocks)
    }

    fn config_json(&self) -> Value {
        json!({ "_class_name": PlainFamily.class(), "heads": self.0.heads })
    }

    fn expect_runs_on(&self, _device: &Device) -> Result<()> {
        Ok(())
    }

    fn load(&self, params: &dyn ParamSource, device: &Device, loaded: &mut Loading<'_>) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(PlainDit::load(self, params, device, loaded)?))
    }

    fn load_trainable(
        &self,
        params: &dyn ParamSource,
        device: &Device,
        choice: &TrainingChoice<'_>,
        loaded: &mut Loading<'_>,
    ) -> Result<Box<dyn Trainable>> {
        Ok(Box::new(TrainedPlain::load(self, params, device, choice, loaded)?))
    }

    fn work(&self, choice: &TrainingChoice<'_>, size: [usize; 2], caption_tokens: usize) -> Result<Work> {
        let PlainConfig { dim, ffn, .. } = self.0;
        let image = self.0.tokens(size)? as f64;
        let chosen = self
            .describe()
            .transform(&mut Choose(|meta: &Meta| (choice.trains)(meta)))?;
        let rows = |rows, layer, extents| RowsWork {
            rows,
            product: ProductWork::of(layer, extents, false),
        };
        let block = |block: &Block<crate::layers::Trained>| BlockWork {
            tokens: image + caption_tokens as f64,
            keep: match (choice.recomputes)(true) {
                true => Keep::Input,
                false => Keep::Everything,
            },
            products: [
                (&block.qkv, [3 * dim, dim]),
                (&block.out, [dim, dim]),
                (&block.w13, [2 * ffn, dim]),
                (&block.w2, [dim, ffn]),
            ]
            .map(|(layer, extents)| ProductWork::of(layer, extents, true))
            .to_vec(),
            attention_width: dim,
            elements: BlockElements {
                input: dim,
                inside: 5 * dim + 2 * ffn,
                inside_f32: self.0.heads,
                forward: 3 * dim + (3 * ffn).max(5 * dim),
                backward: 4 * dim + (3 * ffn).max(6 * dim),
            },
        };
        Ok(Work {
            embedders: vec![
                rows(image, &chosen.patch, [dim, self.0.patch_features()]),
                rows(caption_tokens as f64, &chosen.caption, [dim, self.0.caption_width]),
            ],
            stacks: vec![StackWork {
                names: ["blocks", "blocks' attention"],
                blocks: chosen.blocks.iter().map(block).collect(),
            }],
            output: OutputWork::FinalLayer(RowsWork {
                rows: image,
                product: ProductWork::of(&chosen.output, [self.0.patch_features(), dim], true),
            }),
        })
    }
}
