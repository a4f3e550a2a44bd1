//! Random parameters, made where they are used, so that a model of the published size needs no file.
//!
//! A parameter is a function of seed and name: normal numbers whose mean and deviation keep activations near 1, rounded to
//! bf16. On a GPU six billion take well under a second.

use std::collections::HashMap;

use l2p_engine::device::MemoryTag;
use l2p_engine::model::Spec;
use l2p_engine::model::config::{TextConfig, VaeConfig};
use l2p_engine::ops::cast::cast;
use l2p_engine::ops::latent::denormalize_latent;
use l2p_engine::ops::noise::normal_noise;
use l2p_engine::{DType, Device, Error, ParamSource, Result, Tensor};

/// Elements that are drawn at once.
const PIECE: usize = 1 << 22;

/// Random parameters of given names and shapes.
pub struct RandomParams {
    seed: u64,
    shapes: HashMap<String, Vec<usize>>,
}

impl RandomParams {
    /// Parameters of these names and shapes.
    pub fn new(seed: u64, tensors: impl IntoIterator<Item = (String, Vec<usize>)>) -> Self {
        RandomParams {
            seed,
            shapes: tensors.into_iter().collect(),
        }
    }

    /// A transformer with its head.
    pub fn transformer(seed: u64, spec: &dyn Spec) -> Self {
        Self::new(seed, spec.tensors())
    }

    /// A VAE decoder.
    pub fn vae(seed: u64, config: &VaeConfig) -> Self {
        Self::new(seed, vae_tensors(config))
    }

    /// A text encoder.
    pub fn text(seed: u64, config: &TextConfig) -> Self {
        Self::new(seed, text_tensors(config))
    }

    fn get(&self, name: &str) -> Result<&[usize]> {
        let shape = self.shapes.get(name);
        Ok(shape.ok_or_else(|| Error::invalid(format!("there is no parameter `{name}`")))?)
    }

    /// Random numbers for the parameter `name`, of which `inputs` are summed into one value, as a tensor of another shape.
    fn draw(&self, device: &Device, name: &str, inputs: usize, rank: usize, shape: &[usize]) -> Result<Tensor> {
        let (mean, deviation) = distribution(name, inputs, rank);
        let _tag = MemoryTag::Weights.scope();
        let mut parameter = Tensor::empty(device, shape, device.compute_dtype())?;
        // Piece by piece: what comes and goes beside a large parameter would leave holes between it and the next.
        for first in (0..parameter.elements()).step_by(PIECE) {
            let elements = PIECE.min(parameter.elements() - first);
            let stream = hash(name).wrapping_add((first / PIECE) as u64);
            let noise = normal_noise(device, [elements], self.seed, stream)?;
            let values = denormalize_latent(&noise, 1.0 / deviation, mean)?;
            drop(noise);
            // So that every device holds the same numbers.
            let values = cast(&cast(&values, DType::Bf16)?, device.compute_dtype())?;
            parameter.copy_elements_from(first, &values)?;
        }
        Ok(parameter)
    }
}

impl ParamSource for RandomParams {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shapes.get(name).cloned()
    }

    fn load(&self, device: &Device, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.load_stacked(device, &[name], shape)
    }

    fn load_stacked(&self, device: &Device, names: &[&str], shape: &[usize]) -> Result<Tensor> {
        let mut rows = 0;
        for name in names {
            let found = self.get(name)?;
            rows += found.first().copied().unwrap_or(1);
            if found.len() != shape.len() || found.get(1..) != shape.get(1..) {
                return Err(Error::invalid(format!(
                    "`{name}` has shape {found:?}, expected {shape:?}"
                )));
            }
        }
        if shape.first().is_some_and(|&all| all != rows) {
            let names = names.join("`, `");
            return Err(Error::invalid(format!(
                "`{names}` have {rows} rows, expected {shape:?}"
            )));
        }
        let inputs = shape.get(1..).unwrap_or_default().iter().product();
        self.draw(
            device,
            names.first().copied().unwrap_or_default(),
            inputs,
            shape.len(),
            shape,
        )
    }

    fn load_conv(&self, device: &Device, name: &str) -> Result<Tensor> {
        let &[outputs, inputs, height, width] = self.get(name)? else {
            return Err(Error::invalid(format!("`{name}` is no convolution's weight")));
        };
        let summed = inputs * height * width;
        self.draw(device, name, summed, 4, &[outputs, summed])
    }
}

/// Mean and deviation of a parameter's values, so that activations stay near 1 and every branch matters.
fn distribution(name: &str, inputs: usize, rank: usize) -> (f32, f32) {
    if rank == 1 {
        return match (
            name.ends_with("weight") || name.ends_with("var"),
            name.contains("adaLN"),
        ) {
            (true, _) => (1.0, 0.1),
            (false, true) => (0.0, 0.3),
            (false, false) => (0.0, 0.1),
        };
    }
    if name.contains("pad_token") || name.contains("embed_tokens") {
        return (0.0, 1.0);
    }
    let gain = if name.contains("t_embedder") {
        2.0
    } else if name.contains("adaLN") {
        0.3
    } else if rank == 4 && !name.contains("out_conv") && !name.contains(".up") {
        // SiLU keeps about 1/1.6 of a unit normal's deviation.
        1.6
    } else {
        1.0
    };
    (0.0, gain / (inputs.max(1) as f32).sqrt())
}

/// FNV-1a; names of one model do not collide in 64 bits.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

type Tensors = Vec<(String, Vec<usize>)>;

fn add_layer(tensors: &mut Tensors, name: &str, weight: Vec<usize>) {
    tensors.push((format!("{name}.bias"), vec![weight[0]]));
    tensors.push((format!("{name}.weight"), weight));
}

/// Names and shapes of a decoder's tensors, as diffusers names them.
fn vae_tensors(config: &VaeConfig) -> Tensors {
    let mut tensors = Tensors::new();
    let widths = &config.block_out_channels;
    let deepest = widths[widths.len() - 1];
    let residual = |tensors: &mut Tensors, name: &str, inputs: usize, outputs: usize| {
        for (index, width) in [(1, inputs), (2, outputs)] {
            add_layer(tensors, &format!("{name}.norm{index}"), vec![width]);
            add_layer(tensors, &format!("{name}.conv{index}"), vec![outputs, width, 3, 3]);
        }
        if inputs != outputs {
            add_layer(tensors, &format!("{name}.conv_shortcut"), vec![outputs, inputs, 1, 1]);
        }
    };
    if config.use_post_quant_conv {
        let channels = config.latent_channels;
        add_layer(&mut tensors, "post_quant_conv", vec![channels, channels, 1, 1]);
    }
    if config.batch_norm_eps.is_some() {
        for name in ["mean", "var"] {
            tensors.push((format!("bn.running_{name}"), vec![config.cell_channels()]));
        }
    }
    add_layer(
        &mut tensors,
        "decoder.conv_in",
        vec![deepest, config.latent_channels, 3, 3],
    );
    for index in 0..2 {
        residual(
            &mut tensors,
            &format!("decoder.mid_block.resnets.{index}"),
            deepest,
            deepest,
        );
    }
    let attention = "decoder.mid_block.attentions.0";
    add_layer(&mut tensors, &format!("{attention}.group_norm"), vec![deepest]);
    for layer in ["to_q", "to_k", "to_v", "to_out.0"] {
        add_layer(&mut tensors, &format!("{attention}.{layer}"), vec![deepest, deepest]);
    }
    let mut width = deepest;
    for (index, &outputs) in widths.iter().rev().enumerate() {
        let name = format!("decoder.up_blocks.{index}");
        for layer in 0..=config.layers_per_block {
            residual(&mut tensors, &format!("{name}.resnets.{layer}"), width, outputs);
            width = outputs;
        }
        if index + 1 < widths.len() {
            add_layer(
                &mut tensors,
                &format!("{name}.upsamplers.0.conv"),
                vec![width, width, 3, 3],
            );
        }
    }
    add_layer(&mut tensors, "decoder.conv_norm_out", vec![width]);
    add_layer(&mut tensors, "decoder.conv_out", vec![config.out_channels, width, 3, 3]);
    tensors
}

/// Names and shapes of a Qwen3 encoder's tensors.
fn text_tensors(config: &TextConfig) -> Tensors {
    let TextConfig {
        dim,
        heads,
        kv_heads,
        head_dim,
        ffn_hidden,
        ..
    } = *config;
    let mut tensors: Tensors = vec![
        ("embed_tokens.weight".into(), vec![config.vocabulary, dim]),
        ("norm.weight".into(), vec![dim]),
    ];
    for layer in 0..config.layers {
        let shapes = [
            ("input_layernorm", vec![dim]),
            ("post_attention_layernorm", vec![dim]),
            ("self_attn.q_norm", vec![head_dim]),
            ("self_attn.k_norm", vec![head_dim]),
            ("self_attn.q_proj", vec![heads * head_dim, dim]),
            ("self_attn.k_proj", vec![kv_heads * head_dim, dim]),
            ("self_attn.v_proj", vec![kv_heads * head_dim, dim]),
            ("self_attn.o_proj", vec![dim, heads * head_dim]),
            ("mlp.gate_proj", vec![ffn_hidden, dim]),
            ("mlp.up_proj", vec![ffn_hidden, dim]),
            ("mlp.down_proj", vec![dim, ffn_hidden]),
        ];
        tensors.extend(shapes.map(|(name, shape)| (format!("layers.{layer}.{name}.weight"), shape)));
    }
    tensors
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::published::{self, ModelName};
    use l2p_engine::model::text::TextEncoder;
    use l2p_engine::model::vae::VaeDecoder;

    #[test]
    fn every_small_model_loads_and_runs() {
        for name in ModelName::ALL {
            let model = name.model(true).unwrap();
            let params = RandomParams::transformer(1, &*model.spec);
            model.spec.load(&params, &Device::Cpu, &mut |_, _| Ok(())).unwrap();
        }
        let config = published::vae(true);
        let decoder = VaeDecoder::load(&RandomParams::vae(1, &config), &Device::Cpu, &config).unwrap();
        let latent = normal_noise(&Device::Cpu, [1, 2, 2, 16], 0, 0).unwrap();
        let image = decoder.decode(&latent).unwrap();
        assert!(image.to_vec::<f32>().unwrap().iter().all(|value| value.is_finite()));
        let config = published::text(Some(128));
        let encoder = TextEncoder::load(&RandomParams::text(1, &config), &Device::Cpu, &config).unwrap();
        assert_eq!(encoder.encode(&[1, 2, 3]).unwrap().shape().to_vec(), [1, 3, 128]);
    }

    #[test]
    fn values_follow_from_seed_and_name() {
        let params = |seed| {
            RandomParams::new(
                seed,
                [
                    ("a.weight".to_owned(), vec![64, 64]),
                    ("b.weight".to_owned(), vec![64, 64]),
                ],
            )
        };
        let values = |seed, name| {
            params(seed)
                .load(&Device::Cpu, name, &[64, 64])
                .unwrap()
                .to_vec::<f32>()
                .unwrap()
        };
        assert_eq!(values(1, "a.weight"), values(1, "a.weight"));
        assert_ne!(values(1, "a.weight"), values(2, "a.weight"));
        assert_ne!(values(1, "a.weight"), values(1, "b.weight"));
        let variance = values(1, "a.weight").iter().map(|value| value * value).sum::<f32>() / 4096.0;
        assert!((variance * 64.0 - 1.0).abs() < 0.1, "{variance}");
        assert!(params(1).load(&Device::Cpu, "c.weight", &[64, 64]).is_err());
        assert!(params(1).load(&Device::Cpu, "a.weight", &[64, 32]).is_err());
    }
}
