//! On CUDA against the CPU, from the same numbers. Results of sums over many rows are compared as they are added up: in f32,
//! rounded once to bf16.

use l2p_engine::ops::VectorGradient;
use l2p_engine::ops::flow_loss::{flow_loss, noisy_image};
use l2p_engine::ops::layer_norm::layer_norm_modulate_backward;
use l2p_engine::ops::linear::{
    InputActivation, LinearGradients, linear_backward_input, linear_backward_weight, linear_vectors_backward,
};
use l2p_engine::ops::patch_embed::patch_embed_backward;
use l2p_engine::ops::qk_norm_rope::{
    QkNormGradients, QkNormRope, Rotation, qk_norm_rope, qk_norm_rope_backward, qk_norm_rope_from,
};
use l2p_engine::ops::rms_norm::{
    GatedResidual, NormGradients, ResidualNormGradients, RmsNorm, gated_residual_backward,
    gated_residual_rms_norm_backward, rms_norm_modulate_backward,
};
use l2p_engine::ops::sum_rows::{add_pad_row_sum, add_row_sum};
use l2p_engine::ops::swiglu::swiglu_backward;
use l2p_engine::ops::tokens::stack_tokens;
use l2p_engine::ops::unpatchify::patchify;
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::{BF16_TOLERANCE, F32_TOLERANCE, Outcome, Suite, expect_like_cpu, random};

use super::{EPSILON, begun, gradients, table, tensor, vector};

pub fn register(suite: &mut Suite) {
    suite.cuda("ops::backward::cuda_norms_equal_cpu", norms);
    suite.cuda("ops::backward::cuda_residual_norms_equal_cpu", residual_norms);
    suite.cuda("ops::backward::cuda_layer_norm_equals_cpu", layer_norm);
    suite.cuda("ops::backward::cuda_swiglu_equals_cpu", swiglu);
    suite.cuda("ops::backward::cuda_linear_equals_cpu", linear);
    suite.cuda("ops::backward::cuda_linear_vectors_equal_cpu", linear_vectors);
    suite.cuda("ops::backward::cuda_qk_norm_rope_equals_cpu", rotations);
    suite.cuda("ops::backward::cuda_row_sums_equal_cpu", row_sums);
    suite.cuda("ops::backward::cuda_patches_equal_cpu", patches);
    suite.cuda("ops::backward::cuda_stacks_equal_cpu", stacks);
    suite.cuda("ops::backward::cuda_flow_loss_equals_cpu", flow);
    suite.cuda("ops::backward::cuda_repeats_bit_for_bit", repeats);
}

/// Batch, tokens and dim of rows that fill a block, leave threads idle, or need several vectors per thread.
const SIZES: [(usize, usize, usize); 7] = [
    (1, 1, 8),
    (2, 5, 384),
    (1, 67, 2560),
    (2, 33, 3840),
    (1, 3, 4096),
    (3, 700, 1032),
    (40, 2, 256),
];

fn norms(device: &Device) -> Outcome {
    for (batch, tokens, dim) in SIZES {
        for gated in [false, true] {
            let what = format!("{batch}x{tokens}x{dim} gated: {gated}");
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                let shape = [batch, tokens, dim];
                let [x, dy, passing] = [
                    tensor(device, "x", &shape)?,
                    tensor(device, "dy", &shape)?,
                    tensor(device, "passing", &shape)?,
                ];
                let weight = tensor(device, "w", &[dim])?;
                let table = table(device, [batch, 4, dim])?;
                let (mut d_weight, mut d_vector) = (begun(device, &[dim])?, gradients(device, [batch, 1, dim])?);
                let wanted = NormGradients {
                    weight: Some(&mut d_weight),
                    vector: Some(VectorGradient {
                        table: &mut d_vector,
                        index: 0,
                    }),
                };
                let dx = if gated {
                    let spec = GatedResidual {
                        weight: &weight,
                        gate: vector(&table, 1)?,
                        epsilon: EPSILON,
                    };
                    gated_residual_backward(&dy, &x, &spec, wanted)?
                } else {
                    let spec = RmsNorm {
                        weight: &weight,
                        scale: vector(&table, 2)?,
                        epsilon: EPSILON,
                    };
                    rms_norm_modulate_backward(&dy, &x, &spec, Some(&passing), wanted)?
                };
                // The same for a frozen norm without vectors.
                let spec = RmsNorm {
                    weight: &weight,
                    scale: None,
                    epsilon: EPSILON,
                };
                let plain = rms_norm_modulate_backward(&dy, &x, &spec, None, NormGradients::default())?;
                Ok(vec![dx, d_weight, d_vector, plain])
            })?;
        }
    }
    Ok(())
}

fn residual_norms(device: &Device) -> Outcome {
    for (batch, tokens, dim) in SIZES {
        for modulated in [false, true] {
            let what = format!("{batch}x{tokens}x{dim} modulated: {modulated}");
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                let shape = [batch, tokens, dim];
                let [x, y, d_sum, d_normalised] = [
                    tensor(device, "x", &shape)?,
                    tensor(device, "y", &shape)?,
                    tensor(device, "d_sum", &shape)?,
                    tensor(device, "d_normalised", &shape)?,
                ];
                let (weight, next_weight) = (tensor(device, "w", &[dim])?, tensor(device, "next", &[dim])?);
                let table = table(device, [batch, 4, dim])?;
                let of_table = |index: usize| if modulated { vector(&table, index) } else { Ok(None) };
                let residual = GatedResidual {
                    weight: &weight,
                    gate: of_table(1)?,
                    epsilon: EPSILON,
                };
                let next = RmsNorm {
                    weight: &next_weight,
                    scale: of_table(2)?,
                    epsilon: EPSILON,
                };
                let (mut d_weight, mut d_next) = (begun(device, &[dim])?, begun(device, &[dim])?);
                let mut d_vectors = Tensor::zeros(device, [batch, 4, dim], DType::F32)?;
                let wanted = ResidualNormGradients {
                    weight: Some(&mut d_weight),
                    next_weight: Some(&mut d_next),
                    vectors: modulated.then_some((&mut d_vectors, [1, 2])),
                };
                let (dx, dy) =
                    gated_residual_rms_norm_backward(&d_sum, &d_normalised, [&x, &y], &residual, &next, wanted)?;
                Ok(vec![dx, dy, d_weight, d_next, d_vectors])
            })?;
        }
    }
    Ok(())
}

fn layer_norm(device: &Device) -> Outcome {
    for (batch, tokens, dim) in SIZES {
        expect_like_cpu(&format!("{batch}x{tokens}x{dim}"), device, BF16_TOLERANCE, |device| {
            let (x, dy) = (
                tensor(device, "x", &[batch, tokens, dim])?,
                tensor(device, "dy", &[batch, tokens, dim])?,
            );
            let table = table(device, [batch, 3, dim])?;
            let mut d_scale = gradients(device, [batch, 1, dim])?;
            let wanted = VectorGradient {
                table: &mut d_scale,
                index: 0,
            };
            let dx = layer_norm_modulate_backward(&dy, &x, vector(&table, 2)?, 1e-6, Some(wanted))?;
            let plain = layer_norm_modulate_backward(&dy, &x, None, 1e-6, None)?;
            Ok(vec![dx, d_scale, plain])
        })?;
    }
    Ok(())
}

fn swiglu(device: &Device) -> Outcome {
    for (rows, hidden) in [(1, 8), (5, 688), (33, 1024), (7, 10240)] {
        expect_like_cpu(&format!("{rows}x{hidden}"), device, BF16_TOLERANCE, |device| {
            let x = tensor(device, "x", &[1, rows, 2 * hidden])?;
            let dy = tensor(device, "dy", &[1, rows, hidden])?;
            // A shared input is left as it is.
            let (from_shared, none) = swiglu_backward(&dy, x.clone(), false)?;
            assert!(none.is_none());
            let (dx, again) = swiglu_backward(&dy, x, true)?;
            Ok([dx, from_shared].into_iter().chain(again).collect())
        })?;
    }
    Ok(())
}

fn linear(device: &Device) -> Outcome {
    for (rows, inputs, outputs) in [
        (1, 64, 64),
        (33, 256, 136),
        (300, 384, 1152),
        (128, 4096, 72),
        (1000, 2560, 3840),
    ] {
        expect_like_cpu(
            &format!("{rows}x{inputs}x{outputs}"),
            device,
            BF16_TOLERANCE,
            |device| {
                let (x, dy) = (
                    tensor(device, "x", &[1, rows, inputs])?,
                    tensor(device, "dy", &[1, rows, outputs])?,
                );
                let weight = tensor(device, "w", &[outputs, inputs])?;
                let (mut d_weight, mut d_bias) = (begun(device, &[outputs, inputs])?, begun(device, &[outputs])?);
                let wanted = LinearGradients {
                    weight: Some(&mut d_weight),
                    bias: Some(&mut d_bias),
                };
                linear_backward_weight(&dy, &x, wanted)?;
                Ok(vec![linear_backward_input(&dy, &weight)?, d_weight, d_bias])
            },
        )?;
    }
    Ok(())
}

fn linear_vectors(device: &Device) -> Outcome {
    for (vectors, inputs, outputs) in [
        (1, 256, 1024),
        (3, 1024, 256),
        (2, 256, 4 * 3840),
        (1, 8, 5),
        (37, 264, 40),
    ] {
        for activation in [InputActivation::None, InputActivation::Silu] {
            let what = format!("{vectors}x{inputs}x{outputs} {activation:?}");
            let run = |device: &Device| {
                let single = |name: &str, shape: [usize; 2]| {
                    Tensor::from_slice(device, &random(name, shape[0] * shape[1]), shape)
                };
                let (x, dy) = (single("x", [vectors, inputs])?, single("dy", [vectors, outputs])?);
                let weight = tensor(device, "w", &[outputs, inputs])?;
                let (mut d_weight, mut d_bias) = (begun(device, &[outputs, inputs])?, begun(device, &[outputs])?);
                let mut dx = single("dx", [vectors, inputs])?;
                let wanted = LinearGradients {
                    weight: Some(&mut d_weight),
                    bias: Some(&mut d_bias),
                };
                linear_vectors_backward(&dy, &x, activation, &weight, wanted, Some(&mut dx))?;
                Ok([dx, d_weight, d_bias])
            };
            expect_like_cpu(&what, device, F32_TOLERANCE, |device| {
                run(device).map(|[dx, ..]| vec![dx])
            })?;
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| run(device).map(Vec::from))?;
        }
    }
    Ok(())
}

fn rotations(device: &Device) -> Outcome {
    const HEAD_DIM: usize = 128;
    for (batch, tokens, heads, kv_heads, shared) in [
        (1, 1, 1, 1, true),
        (2, 37, 3, 3, false),
        (3, 20, 4, 2, true),
        (1, 300, 30, 30, true),
        (2, 5, 17, 1, false),
    ] {
        for rotation in [Rotation::Interleaved, Rotation::HalfSplit] {
            let what = format!("{batch}x{tokens}, {heads} and {kv_heads} heads, {rotation:?}");
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                let shape = [batch, tokens, (heads + 2 * kv_heads) * HEAD_DIM];
                let (mut qkv, mut gradient) = (tensor(device, "qkv", &shape)?, tensor(device, "gradient", &shape)?);
                let angles = random("angles", batch * tokens * HEAD_DIM / 2);
                let angles: Vec<f32> = angles.iter().flat_map(|angle| [angle.cos(), angle.sin()]).collect();
                let items = if shared { 1 } else { batch };
                let table = [items, tokens, HEAD_DIM / 2, 2];
                let table = Tensor::from_slice(device, &angles[..table.iter().product()], table)?;
                let (q_weight, k_weight) = (tensor(device, "q", &[HEAD_DIM])?, tensor(device, "k", &[HEAD_DIM])?);
                let spec = QkNormRope {
                    heads,
                    kv_heads,
                    head_dim: HEAD_DIM,
                    q_weight: &q_weight,
                    k_weight: &k_weight,
                    epsilon: EPSILON,
                    rotation,
                };
                let (mut d_q, mut d_k) = (begun(device, &[HEAD_DIM])?, begun(device, &[HEAD_DIM])?);
                let wanted = QkNormGradients {
                    q: Some(&mut d_q),
                    k: Some(&mut d_k),
                };
                qk_norm_rope_backward(&mut gradient, &qkv, &spec, &table, wanted)?;
                let apart = qk_norm_rope_from(&qkv, &spec, &table)?;
                qk_norm_rope(&mut qkv, &spec, &table)?;
                assert_eq!(apart.to_vec_f32()?, qkv.to_vec_f32()?, "in place and apart");
                Ok(vec![gradient, d_q, d_k, apart])
            })?;
        }
    }
    Ok(())
}

fn row_sums(device: &Device) -> Outcome {
    for (batch, tokens, dim) in SIZES {
        expect_like_cpu(&format!("{batch}x{tokens}x{dim}"), device, BF16_TOLERANCE, |device| {
            let x = tensor(device, "x", &[batch, tokens, dim])?;
            let lengths: Vec<i32> = (0..batch).map(|item| ((item * 7) % (tokens + 1)) as i32).collect();
            let lengths = Tensor::from_slice(device, &lengths, [batch])?;
            let (mut all, mut pads) = (begun(device, &[dim])?, begun(device, &[dim])?);
            add_row_sum(&x, &mut all)?;
            add_pad_row_sum(&x, &lengths, &mut pads)?;
            Ok(vec![all, pads])
        })?;
    }
    Ok(())
}

fn patches(device: &Device) -> Outcome {
    for (batch, rows, columns, patch, channels, dim) in [
        (1, 3, 5, 16, 3, 384),
        (2, 5, 7, 2, 16, 256),
        (1, 2, 3, 64, 3, 128),
        (2, 1, 1, 8, 1, 8),
        (3, 1, 2, 4, 6, 40),
    ] {
        let what = format!("{batch}x{rows}x{columns} patches of {patch}");
        expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
            let shape = [batch, rows * patch, columns * patch, channels];
            let image = tensor(device, "image", &shape)?;
            let single = Tensor::from_slice(device, &image.to_vec_f32()?, shape)?;
            let tokens = rows * columns;
            let dy = tensor(device, "dy", &[batch, tokens, dim])?;
            let (mut d_weight, mut d_bias) = (begun(device, &[dim, patch * patch * channels])?, begun(device, &[dim])?);
            let wanted = LinearGradients {
                weight: Some(&mut d_weight),
                bias: Some(&mut d_bias),
            };
            patch_embed_backward(&dy, &image, patch, wanted)?;
            Ok(vec![
                patchify(&image, patch, tokens, -1.0)?,
                patchify(&single, patch, tokens + 3, 0.5)?,
                d_weight,
                d_bias,
            ])
        })?;
    }
    Ok(())
}

fn stacks(device: &Device) -> Outcome {
    expect_like_cpu("stack_tokens", device, 0.0, |device| {
        let parts = [(5, "a"), (32, "b"), (1, "c")].map(|(tokens, name)| tensor(device, name, &[1, tokens, 40]));
        let [a, b, c] = parts;
        Ok(vec![stack_tokens(&[&a?, &b?, &c?], 32)?])
    })
}

fn flow(device: &Device) -> Outcome {
    for shape in [[1, 1, 1, 3], [2, 6, 10, 3], [3, 64, 40, 16], [1, 130, 70, 3]] {
        let what = format!("{shape:?}");
        let run = |device: &Device| {
            let elements = shape.iter().product();
            let single = |name: &str| Tensor::from_slice(device, &random(name, elements), shape);
            let (image, noise, velocity) = (single("image")?, single("noise")?, single("velocity")?);
            let shares = |name: &str| Tensor::from_slice(device, &random(name, 2 * shape[0]), [shape[0], 2]);
            let (mixes, targets) = (shares("mixes")?, shares("targets")?);
            let (loss, gradient) = flow_loss(&velocity, &image, &noise, &targets, Some(0.25))?;
            let (alone, none) = flow_loss(&velocity, &image, &noise, &targets, None)?;
            assert!(none.is_none());
            Ok((
                vec![loss, alone],
                vec![noisy_image(&image, &noise, &mixes)?, gradient.expect("asked for")],
            ))
        };
        expect_like_cpu(&what, device, F32_TOLERANCE, |device| {
            run(device).map(|(losses, _)| losses)
        })?;
        expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
            run(device).map(|(_, images)| images)
        })?;
    }
    Ok(())
}

/// Sums over rows have one order: a second run gives the same bits.
fn repeats(device: &Device) -> Outcome {
    let (batch, tokens, dim) = (2, 500, 3840);
    let run = || -> l2p_engine::Result<Vec<Vec<f32>>> {
        let shape = [batch, tokens, dim];
        let (x, dy) = (tensor(device, "x", &shape)?, tensor(device, "dy", &shape)?);
        let weight = tensor(device, "w", &[dim])?;
        let table = table(device, [batch, 1, dim])?;
        let (mut d_weight, mut d_vector) = (begun(device, &[dim])?, gradients(device, [batch, 1, dim])?);
        let wanted = NormGradients {
            weight: Some(&mut d_weight),
            vector: Some(VectorGradient {
                table: &mut d_vector,
                index: 0,
            }),
        };
        let spec = RmsNorm {
            weight: &weight,
            scale: vector(&table, 0)?,
            epsilon: EPSILON,
        };
        let dx = rms_norm_modulate_backward(&dy, &x, &spec, None, wanted)?;
        let mut d_matrix = begun(device, &[dim, dim])?;
        let mut d_bias = begun(device, &[dim])?;
        let wanted = LinearGradients {
            weight: Some(&mut d_matrix),
            bias: Some(&mut d_bias),
        };
        linear_backward_weight(&dy, &x, wanted)?;
        [dx, d_weight, d_vector, d_matrix, d_bias]
            .iter()
            .map(Tensor::to_vec_f32)
            .collect()
    };
    assert!(run()? == run()?, "two runs differ");
    Ok(())
}
