use l2p_engine::ops::linear::linear;
use l2p_engine::ops::linear_qk_norm_rope::linear_qk_norm_rope;
use l2p_engine::ops::qk_norm_rope::{QkNormRope, Rotation, qk_norm_rope};
use l2p_engine::{Device, Result, Tensor};
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_like_cpu, random, random_bf16};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::linear_qk_norm_rope::is_what_it_is_made_of", is_what_it_is_made_of);
    suite.cuda("ops::linear_qk_norm_rope::cuda_equals_cpu", cuda_equals_cpu);
    suite.cuda("ops::linear_qk_norm_rope::cuda_repeats_its_bits", cuda_repeats_its_bits);
}

/// Sizes of a layer and of its input.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    tokens: usize,
    dim: usize,
    heads: usize,
    kv_heads: usize,
    /// Items of the table of angles: one for all, or as many as the batch has.
    tables: usize,
    rotation: Rotation,
}

const HEAD_DIM: usize = 128;
const EPSILON: f32 = 1e-5;

struct Inputs {
    x: Tensor,
    weight: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    table: Tensor,
}

impl Inputs {
    fn new(device: &Device, sizes: Sizes) -> Result<Self> {
        let rounded = |values: Vec<f32>, map: fn(f32) -> f32| -> Vec<f32> {
            let values = values.into_iter().map(map);
            values.map(|value| half::bf16::from_f32(value).to_f32()).collect()
        };
        let width = (sizes.heads + 2 * sizes.kv_heads) * HEAD_DIM;
        let scale = 1.0 / (sizes.dim as f32).sqrt();
        let weight: Vec<f32> = random("weight", width * sizes.dim)
            .into_iter()
            .map(|value| value * scale)
            .collect();
        let angles: Vec<f32> = random("angles", sizes.tables * sizes.tokens * HEAD_DIM / 2)
            .into_iter()
            .flat_map(|angle| [angle.cos(), angle.sin()])
            .collect();
        Ok(Inputs {
            x: Tensor::from_f32(
                device,
                &random_bf16("x", sizes.batch * sizes.tokens * sizes.dim),
                [sizes.batch, sizes.tokens, sizes.dim],
            )?,
            weight: Tensor::from_f32(device, &rounded(weight, |value| value), [width, sizes.dim])?,
            q_weight: Tensor::from_f32(device, &rounded(random("q", HEAD_DIM), |v| 1.0 + 0.1 * v), [HEAD_DIM])?,
            k_weight: Tensor::from_f32(device, &rounded(random("k", HEAD_DIM), |v| 1.0 + 0.1 * v), [HEAD_DIM])?,
            table: Tensor::from_slice(device, &angles, [sizes.tables, sizes.tokens, HEAD_DIM / 2, 2])?,
        })
    }

    fn spec(&self, sizes: Sizes) -> QkNormRope<'_> {
        QkNormRope {
            heads: sizes.heads,
            kv_heads: sizes.kv_heads,
            head_dim: HEAD_DIM,
            q_weight: &self.q_weight,
            k_weight: &self.k_weight,
            epsilon: EPSILON,
            rotation: sizes.rotation,
        }
    }

    fn run(&self, sizes: Sizes) -> Result<Tensor> {
        linear_qk_norm_rope(&self.x, &self.weight, &self.spec(sizes), &self.table)
    }
}

const SMALL: Sizes = Sizes {
    batch: 2,
    tokens: 5,
    dim: 24,
    heads: 2,
    kv_heads: 1,
    tables: 2,
    rotation: Rotation::Interleaved,
};

fn is_what_it_is_made_of() -> Outcome {
    let inputs = Inputs::new(&Device::Cpu, SMALL)?;
    let mut expected = linear(&inputs.x, &inputs.weight, None)?;
    qk_norm_rope(&mut expected, &inputs.spec(SMALL), &inputs.table)?;
    assert_eq!(inputs.run(SMALL)?.as_slice::<f32>()?, expected.as_slice::<f32>()?);
    Ok(())
}

/// Few rows, which the library takes; one head of each kind, an odd number of tiles of columns, fewer key heads than query
/// heads, rows and summed elements with a rest, a table for all items and one for each, and the other rotation.
fn cuda_equals_cpu(device: &Device) -> Outcome {
    let case = |batch, tokens, dim, heads, kv_heads, tables| Sizes {
        batch,
        tokens,
        dim,
        heads,
        kv_heads,
        tables,
        rotation: Rotation::Interleaved,
    };
    for sizes in [
        SMALL,
        case(1, 1024, 64, 1, 1, 1),
        case(1, 1024, 256, 2, 2, 1),
        case(1, 1100, 384, 3, 3, 1),
        case(2, 700, 200, 4, 2, 1),
        case(2, 555, 328, 5, 1, 2),
        case(1, 2500, 1024, 8, 8, 1),
        Sizes {
            rotation: Rotation::HalfSplit,
            ..case(1, 1024, 64, 2, 1, 1)
        },
    ] {
        let Sizes {
            batch,
            tokens,
            dim,
            heads,
            kv_heads,
            ..
        } = sizes;
        let what = format!("{batch}x{tokens}x{dim}, {heads} and {kv_heads} heads");
        expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
            Ok(vec![Inputs::new(device, sizes)?.run(sizes)?])
        })?;
    }
    Ok(())
}

fn cuda_repeats_its_bits(device: &Device) -> Outcome {
    let sizes = Sizes {
        batch: 1,
        tokens: 2048,
        dim: 512,
        heads: 4,
        kv_heads: 4,
        tables: 1,
        rotation: Rotation::Interleaved,
    };
    let inputs = Inputs::new(device, sizes)?;
    let run = || inputs.run(sizes)?.to_vec::<half::bf16>();
    assert!(run()? == run()?);
    Ok(())
}
