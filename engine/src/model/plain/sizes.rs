//! Sizes, from which the parameters follow.

use serde::Serialize;

use super::{Block, Parts, VECTORS};
use crate::error::{Error, Result};
use crate::layers::{Bare, Described, Group, Linear};
use crate::model::config::ModelKind;
use crate::model::denoiser::Geometry;
use crate::model::time_embedder::TimeEmbedder;
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
