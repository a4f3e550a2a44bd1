//! Against central differences: the derivative along random directions of Σ output · upstream.

use l2p_engine::ops::VectorGradient;
use l2p_engine::ops::flow_loss::flow_loss;
use l2p_engine::ops::layer_norm::{layer_norm_modulate, layer_norm_modulate_backward};
use l2p_engine::ops::linear::{
    InputActivation, LinearGradients, linear, linear_backward_input, linear_backward_weight, linear_vectors,
    linear_vectors_backward,
};
use l2p_engine::ops::patch_embed::{patch_embed, patch_embed_backward};
use l2p_engine::ops::qk_norm_rope::{QkNormGradients, QkNormRope, Rotation, qk_norm_rope_backward, qk_norm_rope_from};
use l2p_engine::ops::rms_norm::{
    GatedResidual, ResidualNormGradients, RmsNorm, gated_residual_rms_norm, gated_residual_rms_norm_backward,
};
use l2p_engine::ops::sum_rows::add_pad_row_sum;
use l2p_engine::ops::swiglu::{swiglu, swiglu_backward};
use l2p_engine::ops::tokens::fill_pad_tokens;
use l2p_engine::ops::unpatchify::{patchify, unpatchify};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::{Outcome, Suite, random};

use super::{EPSILON, vector};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::backward::norms_equal_differences", norms);
    suite.cpu("ops::backward::layer_norm_equals_differences", layer_norm);
    suite.cpu("ops::backward::swiglu_equals_differences", gates);
    suite.cpu("ops::backward::linear_equals_differences", linears);
    suite.cpu("ops::backward::qk_norm_rope_equals_differences", rotations);
    suite.cpu("ops::backward::patches_equal_differences", patches);
    suite.cpu("ops::backward::pads_equal_differences", pads);
    suite.cpu("ops::backward::flow_loss_equals_differences", flow);
}

const CPU: Device = Device::Cpu;

fn values(name: &str, shape: &[usize]) -> Result<Tensor> {
    Tensor::from_slice(&CPU, &random(name, shape.iter().product()), shape)
}

/// Σ output · upstream over all outputs, upstream gradients being named after their place.
fn scalar(outputs: &[Tensor]) -> Result<f64> {
    let mut sum = 0.0;
    for (index, output) in outputs.iter().enumerate() {
        let upstream = random(&format!("upstream {index}"), output.elements());
        let terms = output.as_slice::<f32>()?.iter().zip(&upstream);
        sum += terms.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    }
    Ok(sum)
}

fn upstream(index: usize, like: &Tensor) -> Result<Tensor> {
    values(&format!("upstream {index}"), &like.shape())
}

/// Fails unless each of `gradients` is the derivative of [`scalar`] of what `forward` makes of `inputs` with respect to the input of
/// the same place, along a few directions.
fn expect_derivatives(
    what: &str,
    inputs: &[Tensor],
    gradients: &[Tensor],
    forward: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>,
) -> Outcome {
    const STEP: f32 = 1e-2;
    const TOLERANCE: f64 = 3e-3;
    assert_eq!(inputs.len(), gradients.len());
    for (place, gradient) in gradients.iter().enumerate() {
        for trial in 0..3 {
            let direction = random(&format!("direction {place} {trial}"), gradient.elements());
            let at = |sign: f32| -> Result<f64> {
                let mut moved = inputs.to_vec();
                let values: Vec<f32> = inputs[place]
                    .as_slice::<f32>()?
                    .iter()
                    .zip(&direction)
                    .map(|(x, d)| x + sign * STEP * d)
                    .collect();
                moved[place] = Tensor::from_slice(&CPU, &values, inputs[place].shape())?;
                scalar(&forward(&moved)?)
            };
            let difference = (at(1.0)? - at(-1.0)?) / (2.0 * f64::from(STEP));
            let gradient = gradient.as_slice::<f32>()?;
            let along: f64 = gradient
                .iter()
                .zip(&direction)
                .map(|(g, d)| f64::from(*g) * f64::from(*d))
                .sum();
            let size = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let error = (difference - along).abs() / size;
            if !error.is_finite() || error > TOLERANCE {
                return Err(format!(
                    "{what}, input {place}: derivative {along:.6e}, difference {difference:.6e}, off by {error:.1e}"
                )
                .into());
            }
        }
    }
    Ok(())
}

fn zeros(like: &Tensor) -> Result<Tensor> {
    Tensor::zeros(&CPU, like.shape(), DType::F32)
}

fn norms() -> Outcome {
    let (batch, tokens, dim) = (2, 5, 48);
    let inputs = [
        values("x", &[batch, tokens, dim])?,
        values("y", &[batch, tokens, dim])?,
        values("w", &[dim])?,
        values("next", &[dim])?,
        values("table", &[batch, 4, dim])?,
    ];
    for modulated in [true, false] {
        let forward = |inputs: &[Tensor]| {
            let [x, y, weight, next_weight, table] = inputs else {
                unreachable!()
            };
            let of_table = |index: usize| if modulated { vector(table, index) } else { Ok(None) };
            let residual = GatedResidual {
                weight,
                gate: of_table(1)?,
                epsilon: EPSILON,
            };
            let next = RmsNorm {
                weight: next_weight,
                scale: of_table(3)?,
                epsilon: EPSILON,
            };
            let (sum, normalised) = gated_residual_rms_norm(x, y, &residual, Some(&next))?;
            Ok(vec![sum, normalised.expect("asked for")])
        };
        let outputs = forward(&inputs)?;
        let [x, y, weight, next_weight, table] = &inputs;
        let of_table = |index: usize| if modulated { vector(table, index) } else { Ok(None) };
        let residual = GatedResidual {
            weight,
            gate: of_table(1)?,
            epsilon: EPSILON,
        };
        let next = RmsNorm {
            weight: next_weight,
            scale: of_table(3)?,
            epsilon: EPSILON,
        };
        let [mut d_weight, mut d_next, mut d_table] = [zeros(weight)?, zeros(next_weight)?, zeros(table)?];
        let wanted = ResidualNormGradients {
            weight: Some(&mut d_weight),
            next_weight: Some(&mut d_next),
            vectors: modulated.then_some((&mut d_table, [1, 3])),
        };
        let (d_sum, d_normalised) = (upstream(0, &outputs[0])?, upstream(1, &outputs[1])?);
        let (dx, dy) = gated_residual_rms_norm_backward(&d_sum, &d_normalised, [x, y], &residual, &next, wanted)?;
        let mut gradients = vec![dx, dy, d_weight, d_next];
        let mut moved = inputs.to_vec();
        if modulated {
            gradients.push(d_table);
            expect_derivatives("modulated", &moved, &gradients, forward)?;
        } else {
            let table = moved.pop().expect("there are five");
            let forward = |inputs: &[Tensor]| forward(&[inputs, std::slice::from_ref(&table)].concat());
            expect_derivatives("plain", &moved, &gradients, forward)?;
        }
    }
    Ok(())
}

fn layer_norm() -> Outcome {
    let (batch, tokens, dim) = (2, 5, 48);
    let inputs = [values("x", &[batch, tokens, dim])?, values("table", &[batch, 3, dim])?];
    let forward = |inputs: &[Tensor]| Ok(vec![layer_norm_modulate(&inputs[0], vector(&inputs[1], 2)?, 1e-6)?]);
    let mut d_table = zeros(&inputs[1])?;
    let wanted = VectorGradient {
        table: &mut d_table,
        index: 2,
    };
    let dy = upstream(0, &inputs[0])?;
    let dx = layer_norm_modulate_backward(&dy, &inputs[0], vector(&inputs[1], 2)?, 1e-6, Some(wanted))?;
    expect_derivatives("layer norm", &inputs, &[dx, d_table], forward)
}

fn gates() -> Outcome {
    let inputs = [values("x", &[1, 5, 2 * 33])?];
    let dy = upstream(0, &swiglu(&inputs[0])?)?;
    let (dx, _) = swiglu_backward(&dy, inputs[0].clone(), false)?;
    expect_derivatives("swiglu", &inputs, &[dx], |inputs| Ok(vec![swiglu(&inputs[0])?]))
}

fn linears() -> Outcome {
    let inputs = [values("x", &[3, 20])?, values("w", &[13, 20])?, values("b", &[13])?];
    let [x, weight, bias] = &inputs;
    let places = || -> Result<[Tensor; 2]> { Ok([zeros(weight)?, zeros(bias)?]) };
    let dy = upstream(0, &linear(x, weight, Some(bias))?)?;
    let [mut d_weight, mut d_bias] = places()?;
    let wanted = LinearGradients {
        weight: Some(&mut d_weight),
        bias: Some(&mut d_bias),
    };
    linear_backward_weight(&dy, x, wanted)?;
    let gradients = [linear_backward_input(&dy, weight)?, d_weight, d_bias];
    expect_derivatives("linear", &inputs, &gradients, |inputs| {
        Ok(vec![linear(&inputs[0], &inputs[1], Some(&inputs[2]))?])
    })?;
    for activation in [InputActivation::None, InputActivation::Silu] {
        let [mut d_weight, mut d_bias] = places()?;
        let wanted = LinearGradients {
            weight: Some(&mut d_weight),
            bias: Some(&mut d_bias),
        };
        let mut dx = zeros(x)?;
        linear_vectors_backward(&dy, x, activation, weight, wanted, Some(&mut dx))?;
        expect_derivatives("vectors", &inputs, &[dx, d_weight, d_bias], |inputs| {
            Ok(vec![linear_vectors(
                &inputs[0],
                activation,
                &inputs[1],
                Some(&inputs[2]),
            )?])
        })?;
    }
    Ok(())
}

fn rotations() -> Outcome {
    let (batch, tokens, heads, kv_heads, head_dim) = (2, 3, 4, 2, 16);
    let inputs = [
        values("qkv", &[batch, tokens, (heads + 2 * kv_heads) * head_dim])?,
        values("q", &[head_dim])?,
        values("k", &[head_dim])?,
    ];
    let angles: Vec<f32> = random("angles", tokens * head_dim / 2)
        .iter()
        .flat_map(|angle| [angle.cos(), angle.sin()])
        .collect();
    let table = Tensor::from_slice(&CPU, &angles, [1, tokens, head_dim / 2, 2])?;
    for rotation in [Rotation::Interleaved, Rotation::HalfSplit] {
        let with = |inputs: &[Tensor], run: &mut dyn FnMut(&QkNormRope<'_>) -> Result<()>| {
            run(&QkNormRope {
                heads,
                kv_heads,
                head_dim,
                q_weight: &inputs[1],
                k_weight: &inputs[2],
                epsilon: EPSILON,
                rotation,
            })
        };
        let mut gradient = upstream(0, &inputs[0])?;
        let [mut d_q, mut d_k] = [zeros(&inputs[1])?, zeros(&inputs[2])?];
        with(&inputs, &mut |spec| {
            let wanted = QkNormGradients {
                q: Some(&mut d_q),
                k: Some(&mut d_k),
            };
            qk_norm_rope_backward(&mut gradient, &inputs[0], spec, &table, wanted)
        })?;
        expect_derivatives(&format!("{rotation:?}"), &inputs, &[gradient, d_q, d_k], |inputs| {
            let mut result = None;
            with(inputs, &mut |spec| {
                result = Some(qk_norm_rope_from(&inputs[0], spec, &table)?);
                Ok(())
            })?;
            Ok(result.into_iter().collect())
        })?;
    }
    Ok(())
}

fn patches() -> Outcome {
    let (patch, shape) = (4, [2, 8, 12, 3]);
    let inputs = [values("w", &[10, patch * patch * 3])?, values("b", &[10])?];
    let image = values("image", &shape)?;
    let forward = |inputs: &[Tensor]| Ok(vec![patch_embed(&image, patch, &inputs[0], &inputs[1])?]);
    let dy = upstream(0, &forward(&inputs)?[0])?;
    let [mut d_weight, mut d_bias] = [zeros(&inputs[0])?, zeros(&inputs[1])?];
    let wanted = LinearGradients {
        weight: Some(&mut d_weight),
        bias: Some(&mut d_bias),
    };
    patch_embed_backward(&dy, &image, patch, wanted)?;
    // With the other parameter frozen, the same.
    let [mut weight_alone, mut bias_alone] = [zeros(&inputs[0])?, zeros(&inputs[1])?];
    for (weight, bias) in [
        (Some(&mut weight_alone), None),
        (None, Some(&mut bias_alone)),
        (None, None),
    ] {
        patch_embed_backward(&dy, &image, patch, LinearGradients { weight, bias })?;
    }
    assert_eq!(weight_alone.as_slice::<f32>()?, d_weight.as_slice::<f32>()?);
    assert_eq!(bias_alone.as_slice::<f32>()?, d_bias.as_slice::<f32>()?);
    expect_derivatives("patch_embed", &inputs, &[d_weight, d_bias], forward)?;

    // Eight tokens, of which the last two are padding.
    let inputs = [values("tokens", &[2, 8, patch * patch * 3])?];
    let forward = |inputs: &[Tensor]| Ok(vec![unpatchify(&inputs[0], 8, 12, patch, 3, -1.0)?]);
    let gradient = patchify(&upstream(0, &image)?, patch, 8, -1.0)?;
    expect_derivatives("unpatchify", &inputs, &[gradient], forward)
}

fn pads() -> Outcome {
    let x = values("x", &[3, 7, 12])?;
    let lengths = Tensor::from_slice(&CPU, &[7, 2, 5], [3])?;
    let inputs = [values("pad", &[12])?];
    let forward = |inputs: &[Tensor]| {
        let mut filled = x.clone().into_unshared()?;
        fill_pad_tokens(&mut filled, &lengths, &inputs[0])?;
        Ok(vec![filled])
    };
    let mut gradient = zeros(&inputs[0])?;
    add_pad_row_sum(&upstream(0, &x)?, &lengths, &mut gradient)?;
    expect_derivatives("pads", &inputs, &[gradient], forward)
}

fn flow() -> Outcome {
    let shape = [2, 6, 10, 3];
    let (image, noise) = (values("image", &shape)?, values("noise", &shape)?);
    let inputs = [values("velocity", &shape)?];
    let weight = random("upstream 0", 1)[0];
    let targets = values("targets", &[2, 2])?;
    let (_, gradient) = flow_loss(&inputs[0], &image, &noise, &targets, Some(weight))?;
    expect_derivatives("flow_loss", &inputs, &[gradient.expect("asked for")], |inputs| {
        Ok(vec![flow_loss(&inputs[0], &image, &noise, &targets, None)?.0])
    })
}
