use l2p_engine::ops::qk_norm_rope::{QkNormRope, Rotation, qk_norm_rope};
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::fixtures::{Case, Group};
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_like_cpu, hash_uniform, random, random_bf16};

const HEAD_DIM: usize = 128;

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::qk_norm_rope::cpu_equals_references", cpu_equals_references);
    suite.cpu(
        "ops::qk_norm_rope::wrong_arguments_are_named",
        wrong_arguments_are_named,
    );
    suite.cuda("ops::qk_norm_rope::cuda_equals_cpu", cuda_equals_cpu);
    suite.cuda(
        "ops::qk_norm_rope::cuda_names_unknown_head_dims",
        cuda_names_unknown_head_dims,
    );
}

/// Cosines and sines of three-axis positions, theta 256: frequency and angle in f64, the angle rounded to f32.
pub fn axes_table(ids: &[f32]) -> Vec<f32> {
    ids.chunks(3)
        .flat_map(|ids| [32, 48, 48].into_iter().zip(ids))
        .flat_map(|(axis_dim, &position)| {
            (0..axis_dim / 2).flat_map(move |index| {
                let frequency = 256f64.powf(-f64::from(2 * index) / f64::from(axis_dim));
                let angle = (f64::from(position) * frequency) as f32;
                [angle.cos(), angle.sin()]
            })
        })
        .collect()
}

/// Cosines and sines of one-axis positions, theta 10⁶, in f32.
fn line_table(positions: &[f32]) -> Vec<f32> {
    positions
        .iter()
        .flat_map(|&position| {
            (0..HEAD_DIM / 2).flat_map(move |index| {
                let frequency = 1.0 / 1e6f32.powf((2 * index) as f32 / HEAD_DIM as f32);
                [(position * frequency).cos(), (position * frequency).sin()]
            })
        })
        .collect()
}

/// Puts q, k and a v of our own side by side, runs the operation, and holds each part against the reference.
fn check_case(
    case: &Case<'_>,
    rotation: Rotation,
    table: (&[f32], usize),
    weights: [&str; 2],
    epsilon: f32,
) -> Outcome {
    let ((q, q_shape), (k, k_shape)) = (case.input("q"), case.input("k"));
    let [batch, tokens, heads, kv_heads] = [q_shape[0], q_shape[1], q_shape[2], k_shape[2]];
    let v = random("v", k.len());
    let parts = [(&q, heads), (&k, kv_heads), (&v, kv_heads)];
    let packed: Vec<f32> = (0..batch * tokens)
        .flat_map(|token| {
            parts
                .iter()
                .map(move |(values, heads)| (values, token, heads * HEAD_DIM))
        })
        .flat_map(|(values, token, width)| values[token * width..][..width].iter().copied())
        .collect();
    let width = (heads + 2 * kv_heads) * HEAD_DIM;
    let mut qkv = Tensor::from_slice(&Device::Cpu, &packed, [batch, tokens, width])?;
    let weight = |name| Tensor::from_slice(&Device::Cpu, &case.weight(name), [HEAD_DIM]);
    let spec = QkNormRope {
        heads,
        kv_heads,
        head_dim: HEAD_DIM,
        q_weight: &weight(weights[0])?,
        k_weight: &weight(weights[1])?,
        epsilon,
        rotation,
    };
    let table = Tensor::from_slice(&Device::Cpu, table.0, [table.1, tokens, HEAD_DIM / 2, 2])?;
    qk_norm_rope(&mut qkv, &spec, &table)?;
    let rows = qkv.as_slice::<f32>()?.chunks(width);
    let columns = |from: usize, to: usize| -> Vec<f32> {
        let rows = rows.clone();
        rows.flat_map(|row| &row[from * HEAD_DIM..to * HEAD_DIM])
            .copied()
            .collect()
    };
    case.check("q_out", &columns(0, heads))?;
    case.check("k_out", &columns(heads, heads + kv_heads))?;
    assert_eq!(columns(heads + kv_heads, heads + 2 * kv_heads), v, "v has changed");
    Ok(())
}

fn cpu_equals_references() -> Outcome {
    let group = Group::load("ops");
    for case in group.cases("qk_norm_rope_interleaved") {
        let (ids, shape) = case.input("ids");
        let table = axes_table(&ids);
        check_case(
            &case,
            Rotation::Interleaved,
            (&table, shape[0]),
            ["norm_q.weight", "norm_k.weight"],
            1e-5,
        )?;
    }
    for case in group.cases("qk_norm_rope_half") {
        let table = line_table(&case.input("positions").0);
        check_case(
            &case,
            Rotation::HalfSplit,
            (&table, 1),
            ["q_norm.weight", "k_norm.weight"],
            1e-6,
        )?;
    }
    Ok(())
}

fn wrong_arguments_are_named() -> Outcome {
    let zeros = |shape: &[usize]| Tensor::zeros(&Device::Cpu, shape, DType::F32);
    let weight = zeros(&[8])?;
    let spec = QkNormRope {
        heads: 2,
        kv_heads: 1,
        head_dim: 8,
        q_weight: &weight,
        k_weight: &weight,
        epsilon: 1e-5,
        rotation: Rotation::HalfSplit,
    };
    let message = |qkv: &[usize], table: &[usize]| -> Result<String, l2p_engine::Error> {
        let outcome = qk_norm_rope(&mut zeros(qkv)?, &spec, &zeros(table)?);
        Ok(outcome.unwrap_err().to_string())
    };
    assert_eq!(
        message(&[1, 3, 24], &[1, 3, 4, 2])?,
        "qk_norm_rope: qkv has shape [1, 3, 24], expected [1, 3, 32]"
    );
    assert_eq!(
        message(&[3, 5, 32], &[2, 5, 4, 2])?,
        "qk_norm_rope: table has shape [2, 5, 4, 2], expected [3, 5, 4, 2]"
    );
    let shared = zeros(&[1, 3, 32])?;
    let outcome = qk_norm_rope(&mut shared.clone(), &spec, &zeros(&[1, 3, 4, 2])?);
    assert_eq!(
        outcome.unwrap_err().to_string(),
        "a tensor that shares its buffer cannot be written"
    );
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    // Rows that fill a block's groups exactly, partly, and not at all; odd and even row counts.
    let sizes = [
        (1, 1, 1, 1),
        (2, 5, 3, 2),
        (1, 67, 30, 30),
        (3, 33, 32, 8),
        (2, 4, 16, 16),
        (1, 3, 17, 0),
    ];
    for (batch, tokens, heads, kv_heads) in sizes {
        for rotation in [Rotation::Interleaved, Rotation::HalfSplit] {
            for table_batch in [1, batch] {
                let what = format!("{batch}x{tokens} heads {heads}+{kv_heads} {rotation:?} table of {table_batch}");
                let width = (heads + 2 * kv_heads) * HEAD_DIM;
                expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                    let values = random_bf16("qkv", batch * tokens * width);
                    let mut qkv = Tensor::from_f32(device, &values, [batch, tokens, width])?;
                    let weight = |name| Tensor::from_f32(device, &random_bf16(name, HEAD_DIM), [HEAD_DIM]);
                    let spec = QkNormRope {
                        heads,
                        kv_heads,
                        head_dim: HEAD_DIM,
                        q_weight: &weight("q weight")?,
                        k_weight: &weight("k weight")?,
                        epsilon: 1e-5,
                        rotation,
                    };
                    let table: Vec<f32> = hash_uniform("angles", table_batch * tokens * HEAD_DIM / 2)
                        .into_iter()
                        .flat_map(|angle| [(9.0 * angle).cos(), (9.0 * angle).sin()])
                        .collect();
                    let table = Tensor::from_slice(device, &table, [table_batch, tokens, HEAD_DIM / 2, 2])?;
                    qk_norm_rope(&mut qkv, &spec, &table)?;
                    Ok(vec![qkv])
                })?;
            }
        }
    }
    Ok(())
}

fn cuda_names_unknown_head_dims(device: &Device) -> Outcome {
    let weight = Tensor::zeros(device, [64], DType::Bf16)?;
    let spec = QkNormRope {
        heads: 1,
        kv_heads: 1,
        head_dim: 64,
        q_weight: &weight,
        k_weight: &weight,
        epsilon: 1e-5,
        rotation: Rotation::Interleaved,
    };
    let mut qkv = Tensor::zeros(device, [1, 1, 192], DType::Bf16)?;
    let table = Tensor::zeros(device, [1, 1, 32, 2], DType::F32)?;
    let message = qk_norm_rope(&mut qkv, &spec, &table).unwrap_err().to_string();
    assert_eq!(
        message,
        "qk_norm_rope: heads of 64 elements; the CUDA kernel handles 128"
    );
    Ok(())
}
