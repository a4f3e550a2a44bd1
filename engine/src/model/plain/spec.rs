//! The family's description of itself.

use serde_json::{Value, json};

use super::sizes::{Plain, PlainConfig};
use super::trained::TrainedPlain;
use super::{Block, CLASS, PlainDit};
use crate::device::Device;
use crate::error::Result;
use crate::layers::{Choose, Module, NamedParameter, ParamSource, metas};
use crate::model::denoiser::{Denoiser, Geometry, Trainable, TrainingChoice};
use crate::model::detailer::DetailerLayout;
use crate::model::spec::{Loading, Spec};
use crate::model::work::{BlockElements, BlockWork, Keep, OutputWork, ProductWork, RowsWork, StackWork, Work};

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

    fn metas(&self) -> Vec<NamedParameter> {
        metas(&self.describe()).into_iter().cloned().collect()
    }

    fn sizes(&self) -> Value {
        json!(self.0)
    }

    fn summary(&self) -> String {
        format!("width {}, {} blocks", self.0.dim, self.0.blocks)
    }

    fn config_json(&self) -> Value {
        json!({ "_class_name": CLASS, "heads": self.0.heads })
    }

    fn ensure_runs_on(&self, _device: &Device) -> Result<()> {
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
            .transform(&mut Choose(|meta: &NamedParameter| (choice.trains)(meta)))?;
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
