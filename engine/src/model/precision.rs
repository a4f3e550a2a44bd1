//! Which weights of a model are kept in eight bits: data, not code.
//!
//! Kept so are the weights of the linear layers of main blocks (of a text encoder those of all blocks), and neither what modulates them
//! nor embedders, refiners, input projection and output; patterns keep more in the compute type.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::device::{Device, PLACES, format_bytes};
use crate::error::{Error, Result};
use crate::layers::{NamedParameter, ParamSource, Spread, Streamed, Weight, block_of, room_for};
use crate::ops::quantise::Coding;
use crate::patterns::{self, fits};
use crate::tensor::Tensor;

/// How the weights of a model's blocks are kept; see the module's head comment. The default is the compute type.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Precision {
    /// `None` for the compute type.
    pub coding: Option<Coding>,
    /// Patterns of names (`*` stands for any characters, `?` for any one) of weights that stay in the compute type.
    pub keep: Vec<String>,
    /// Blocks whose weights stay in host memory and are brought to the GPU when they run; `None` for none.
    pub stream: Option<Spread>,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.coding {
            None => f.write_str("bf16"),
            Some(coding) => coding.fmt(f),
        }
    }
}

impl FromStr for Precision {
    type Err = Error;

    /// `bf16`, `int8` or `fp8`.
    fn from_str(text: &str) -> Result<Self> {
        let coding = match text {
            "bf16" => None,
            other => Some(other.parse().map_err(|_| {
                Error::invalid(format!(
                    "`{text}` is no precision of weights: use int8, fp8 or bf16 (the compute type)"
                ))
            })?),
        };
        Ok(Precision {
            coding,
            ..Precision::default()
        })
    }
}

impl Precision {
    /// In which coding a parameter is kept, a linear layer's weight or not.
    pub fn of(&self, meta: &NamedParameter) -> Option<Coding> {
        let names = || meta.parts.iter().map(|part| &part.name);
        let kept = || names().any(|name| self.keep.iter().any(|pattern| fits(pattern, name)));
        self.coding.filter(|_| is_weight_of_block(meta) && !kept())
    }

    /// Bytes of the tensors that a parameter is made of, where the compute type has elements of so many bytes.
    fn parts(&self, meta: &NamedParameter, element: usize) -> [f64; 2] {
        let elements = meta.elements_exact();
        match self.of(meta) {
            None => [elements * element as f64, 0.0],
            Some(_) => [elements, 4.0 * meta.shape()[0] as f64],
        }
    }

    /// The block in host memory that a parameter is part of, counted among those there.
    fn streamed_block(&self, meta: &NamedParameter) -> Option<usize> {
        let spread = self.stream.filter(|_| is_weight_of_block(meta))?;
        spread.place(block_of(meta)?)
    }

    /// Bytes of each block in host memory.
    pub fn streamed_blocks(&self, metas: &[NamedParameter], element: usize) -> Vec<usize> {
        let mut blocks = Vec::new();
        for meta in metas {
            let Some(block) = self.streamed_block(meta) else {
                continue;
            };
            blocks.resize(blocks.len().max(block + 1), 0);
            let parts = self.parts(meta, element).map(|bytes| room_for(bytes as usize));
            blocks[block] += parts.iter().sum::<usize>();
        }
        blocks
    }

    /// Bytes on a device whose compute type has elements of so many bytes: of what stays there, and of the places for the rest.
    pub fn bytes(&self, metas: &[NamedParameter], element: usize) -> f64 {
        let here = metas.iter().filter(|meta| self.streamed_block(meta).is_none());
        let here: f64 = here.flat_map(|meta| self.parts(meta, element)).sum();
        let streamed = self.streamed_blocks(metas, element);
        let place = streamed.iter().copied().max().unwrap_or(0);
        here + (place * PLACES.min(streamed.len())) as f64
    }

    /// Keeps as few of `count` blocks in host memory as let the rest and `beside` bytes of activations fit into `limit` bytes of the device;
    /// how many.
    ///
    /// # Errors
    /// When it does not fit however many stay there.
    pub fn fit(
        &mut self,
        what: &str,
        metas: &[NamedParameter],
        count: usize,
        device: &Device,
        beside: f64,
        limit: u64,
    ) -> Result<usize> {
        let element = device.compute_dtype().size();
        for kept in 0..=count {
            self.stream = Spread::of(kept, count)?;
            if self.bytes(metas, element) + beside <= limit as f64 {
                return Ok(kept);
            }
        }
        let least = self.bytes(metas, element) + beside;
        self.stream = None;
        Err(Error::invalid(format!(
            "{what} takes at least {} of GPU memory even with all of its blocks in host memory, but there are only {}: allow more \
             (--vram), draw smaller or fewer pictures at once, or keep weights in eight bits",
            format_bytes(least as u64),
            format_bytes(limit)
        )))
    }

    /// Refuses patterns that fit none of these parameters' weights that would be in eight bits.
    ///
    /// # Errors
    /// Naming the first such pattern.
    pub fn ensure_used(&self, metas: &[NamedParameter]) -> Result<()> {
        let weights = metas.iter().filter(|meta| is_weight_of_block(meta));
        let parts = weights.flat_map(|meta| &meta.parts);
        let names: Vec<&str> = parts.map(|part| part.name.as_str()).collect();
        match patterns::unused(&self.keep, &names).first() {
            None => Ok(()),
            Some(pattern) => Err(Error::invalid(format!(
                "no weight of a main block fits the pattern `{pattern}` of those to keep in the compute type; they have names such as \
                 `{}`",
                names.first().copied().unwrap_or_default()
            ))),
        }
    }

    /// `params` with this precision, all on the device.
    pub fn over<'a>(&'a self, params: &'a dyn ParamSource) -> Over<'a> {
        Over {
            precision: self,
            params,
            streamed: None,
        }
    }

    /// `params` with this precision, and, where blocks are to stay in host memory, with memory for them.
    ///
    /// # Errors
    /// When blocks are to stay there and the device is no GPU, or the host has too little memory.
    pub fn over_blocks<'a>(
        &'a self,
        params: &'a dyn ParamSource,
        metas: &[NamedParameter],
        device: &Device,
    ) -> Result<Over<'a>> {
        let Some(spread) = self.stream else {
            return Ok(self.over(params));
        };
        let Device::Cuda(cuda) = device else {
            return Err(Error::invalid(
                "weights are kept in host memory for a GPU only; the CPU has them there",
            ));
        };
        let sizes = self.streamed_blocks(metas, device.compute_dtype().size());
        Ok(Over {
            precision: self,
            params,
            streamed: Some(Arc::new(Streamed::new(cuda, spread, &sizes)?)),
        })
    }
}

/// Whether a parameter is the weight of a linear layer of a block, which may be in eight bits or in host memory.
fn is_weight_of_block(meta: &NamedParameter) -> bool {
    let matrix = !meta.flat && meta.parts.iter().all(|part| part.shape.len() == 2);
    matrix && block_of(meta).is_some()
}

/// Parameters of a source, kept as a [`Precision`] says.
pub struct Over<'a> {
    precision: &'a Precision,
    params: &'a dyn ParamSource,
    streamed: Option<Arc<Streamed>>,
}

impl ParamSource for Over<'_> {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.params.shape(name)
    }

    fn load(&self, device: &Device, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.params.load(device, name, shape)
    }

    fn load_stacked(&self, device: &Device, names: &[&str], shape: &[usize]) -> Result<Tensor> {
        self.params.load_stacked(device, names, shape)
    }

    fn load_conv(&self, device: &Device, name: &str) -> Result<Tensor> {
        self.params.load_conv(device, name)
    }

    fn keep(&self, meta: &NamedParameter, weight: Weight) -> Result<Weight> {
        match &self.streamed {
            Some(streamed) => streamed.keep(meta, weight),
            None => Ok(weight),
        }
    }

    fn streamed(&self) -> Option<Arc<Streamed>> {
        self.streamed.clone()
    }

    fn coding(&self, meta: &NamedParameter) -> Option<Coding> {
        self.precision.of(meta).or_else(|| self.params.coding(meta))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Spec;
    use crate::model::config::ModelKind;
    use crate::model::detailer::DetailerLayout;
    use crate::model::zimage::{DitConfig, ZImage};

    fn metas() -> Vec<NamedParameter> {
        let config = DitConfig {
            kind: ModelKind::Pixel,
            dim: 256,
            heads: 2,
            head_dim: 128,
            layers: 4,
            refiner_layers: 1,
            ffn_hidden: 512,
            caption_width: 128,
            patch: 16,
            in_channels: 3,
            rope_theta: 256.0,
            axes_dims: [32, 48, 48],
            norm_eps: 1e-5,
            t_scale: 1000.0,
            t_frequencies: 64,
            t_hidden: 64,
            adaln_width: 64,
        };
        let head = DetailerLayout::for_patch(16, Some(&[8, 8, 8, 8]), Some(16), 256).ok();
        ZImage { config, head }.metas()
    }

    /// With so many of the four blocks in host memory.
    fn of(coding: Option<Coding>, streamed: usize) -> Precision {
        Precision {
            coding,
            stream: Spread::of(streamed, 4).unwrap(),
            ..Precision::default()
        }
    }

    /// q, k, v, out, w1, w3 and w2 of each of the four main blocks, and nothing else.
    #[test]
    fn weights_of_main_blocks_are_kept_in_eight_bits() {
        let metas = metas();
        let int8 = of(Some(Coding::Int8), 0);
        let kept: Vec<&str> = metas
            .iter()
            .filter(|meta| int8.of(meta).is_some())
            .map(NamedParameter::name)
            .collect();
        assert_eq!(kept.len(), 4 * 4, "{kept:?}");
        assert!(
            kept.iter()
                .all(|name| name.starts_with("layers.") && !name.contains("adaLN")),
            "{kept:?}"
        );
        let weights = 4.0 * (256.0 * 256.0 * 4.0 + 256.0 * 512.0 * 3.0);
        let rows = 4.0 * 4.0 * (4.0 * 256.0 + 2.0 * 512.0 + 256.0);
        let [dense, halved] = [Precision::default(), int8.clone()].map(|precision| precision.bytes(&metas, 2));
        assert_eq!(dense - halved, weights - rows);
        let but_one = Precision {
            keep: vec!["layers.3.feed_forward.w2.weight".into()],
            ..int8
        };
        assert!(but_one.ensure_used(&metas).is_ok());
        assert_eq!(but_one.bytes(&metas, 2) - halved, 256.0 * 512.0 - 4.0 * 256.0);
        let unused = Precision {
            keep: vec!["x_pad_token".into()],
            ..but_one
        };
        assert!(
            unused
                .ensure_used(&metas)
                .unwrap_err()
                .to_string()
                .contains("`x_pad_token`")
        );
    }

    #[test]
    fn blocks_in_host_memory_leave_their_places() {
        let metas = metas();
        let all = of(None, 4).streamed_blocks(&metas, 2);
        assert_eq!(all, vec![2 * (256 * 256 * 4 + 256 * 512 * 3); 4]);
        assert_eq!(of(None, 1).streamed_blocks(&metas, 2), all[3..]);
        let here = |streamed| of(None, streamed).bytes(&metas, 2);
        assert_eq!(here(0) - here(4), all[0] as f64, "three places stand for four blocks");
        assert_eq!(here(0), here(2), "places for both");
    }

    /// As few as it takes, and a limit that nothing helps to reach is an error.
    #[test]
    fn as_few_blocks_as_needed_stay_in_host_memory() {
        let metas = metas();
        let all = Precision::default().bytes(&metas, 4);
        let fit = |limit: f64| Precision::default().fit("it", &metas, 4, &Device::Cpu, 1e6, limit as u64);
        assert_eq!(fit(all + 1e6).unwrap(), 0);
        assert_eq!(fit(all + 1e6 - 1.0).unwrap(), 4, "three blocks need as many places");
        let message = fit(1e6).unwrap_err().to_string();
        assert!(
            message.starts_with("it takes at least") && message.contains("--vram"),
            "{message}"
        );
    }
}
