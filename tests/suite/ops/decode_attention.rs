use l2p_engine::ops::attention::{Attention, attention};
use l2p_engine::ops::decode_attention::{DecodeScratch, KeyCache, decode_attention, keep_keys};
use l2p_engine::ops::qk_norm_rope::{QkNormRope, Rotation, qk_norm_rope_from};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::{BF16_TOLERANCE, F32_TOLERANCE, Outcome, Suite, expect_close, expect_like_cpu, random_bf16};

const HEAD_DIM: usize = 128;

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "ops::decode_attention::a_step_is_the_last_row_of_attention",
        a_step_is_the_last_row,
    );
    suite.cpu("ops::decode_attention::nobody_is_there", nobody_is_there);
    suite.cpu("ops::decode_attention::mistakes_are_named", mistakes_are_named);
    suite.cuda("ops::decode_attention::cuda_equals_cpu", cuda_equals_cpu);
    suite.cuda("ops::decode_attention::cuda_repeats_its_bits", cuda_repeats_its_bits);
    suite.cuda(
        "ops::decode_attention::cuda_names_unknown_heads",
        cuda_names_unknown_heads,
    );
}

/// The heads and the factors of their norms.
struct Heads {
    heads: usize,
    kv_heads: usize,
    factors: [Tensor; 2],
}

impl Heads {
    fn new(device: &Device, heads: usize, kv_heads: usize) -> Result<Self> {
        let factor = |name| {
            let values: Vec<f32> = random_bf16(name, HEAD_DIM)
                .iter()
                .map(|value| 1.0 + 0.25 * value)
                .collect();
            Tensor::from_f32(device, &values, [HEAD_DIM])
        };
        Ok(Heads {
            heads,
            kv_heads,
            factors: [factor("q")?, factor("k")?],
        })
    }

    fn spec(&self) -> QkNormRope<'_> {
        QkNormRope {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: HEAD_DIM,
            q_weight: &self.factors[0],
            k_weight: &self.factors[1],
            epsilon: 1e-6,
            rotation: Rotation::HalfSplit,
        }
    }

    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * HEAD_DIM
    }

    fn packed(&self, device: &Device, name: &str, items: usize, tokens: usize) -> Result<Tensor> {
        let values = random_bf16(name, items * tokens * self.width());
        Tensor::from_f32(device, &values, [items, tokens, self.width()])
    }
}

fn table(device: &Device, tokens: usize) -> Result<Tensor> {
    let angle = |position: usize, pair: usize| position as f32 * 1e4f32.powf(-(2.0 * pair as f32) / HEAD_DIM as f32);
    let values: Vec<f32> = (0..tokens)
        .flat_map(|position| (0..HEAD_DIM / 2).map(move |pair| angle(position, pair)))
        .flat_map(|angle| [angle.cos(), angle.sin()])
        .collect();
    Tensor::from_slice(device, &values, [1, tokens, HEAD_DIM / 2, 2])
}

/// What `count` steps give from these positions on, and the cache after them. What stands before them is noise.
fn steps(device: &Device, heads: &Heads, starts: &[i32], capacity: usize, count: usize) -> Result<Vec<Tensor>> {
    let (spec, items) = (heads.spec(), starts.len());
    let mut cache = KeyCache::new(device, items, heads.kv_heads, capacity, HEAD_DIM)?;
    let mut scratch = DecodeScratch::new(device, items, &spec, capacity)?;
    let table = table(device, capacity)?;
    for (item, &start) in starts.iter().enumerate() {
        if start > 0 {
            let earlier = heads.packed(device, &format!("earlier {item}"), 1, start as usize)?;
            keep_keys(&earlier, &spec, &mut cache, item)?;
        }
    }
    let mut results = Vec::new();
    for step in 0..count {
        let positions: Vec<i32> = starts
            .iter()
            .map(|&start| if start < 0 { -1 } else { start + step as i32 })
            .collect();
        let positions = Tensor::from_slice(device, &positions, [items])?;
        let qkv = heads.packed(device, &format!("step {step}"), items, 1)?;
        results.push(decode_attention(
            &qkv,
            &spec,
            &table,
            &positions,
            &mut cache,
            &mut scratch,
        )?);
    }
    results.push(cache.tensor().clone());
    Ok(results)
}

fn a_step_is_the_last_row() -> Outcome {
    for (count, kv_heads, tokens) in [(2, 1, 1), (4, 2, 2), (6, 3, 37)] {
        let heads = Heads::new(&Device::Cpu, count, kv_heads)?;
        let (spec, table) = (heads.spec(), table(&Device::Cpu, tokens)?);
        let packed = heads.packed(&Device::Cpu, "all", 1, tokens)?;
        let turned = qk_norm_rope_from(&packed, &spec, &table)?;
        let whole = Attention {
            heads: count,
            kv_heads,
            head_dim: HEAD_DIM,
            causal: true,
            scale: 1.0 / (HEAD_DIM as f32).sqrt(),
        };
        let expected = attention(&turned, &whole, None)?;
        let expected = &expected.as_slice::<f32>()?[(tokens - 1) * count * HEAD_DIM..];

        let mut cache = KeyCache::new(&Device::Cpu, 2, kv_heads, tokens, HEAD_DIM)?;
        let mut scratch = DecodeScratch::new(&Device::Cpu, 2, &spec, tokens)?;
        let rows = turned.reshape([tokens, heads.width()])?;
        if tokens > 1 {
            let before = rows.narrow(0, tokens - 1)?.into_shape([1, tokens - 1, heads.width()])?;
            keep_keys(&before, &spec, &mut cache, 1)?;
        }
        let width = heads.width();
        let last = &packed.as_slice::<f32>()?[(tokens - 1) * width..];
        let both = Tensor::from_slice(&Device::Cpu, &[last, last].concat(), [2, 1, width])?;
        let positions = Tensor::from_slice(&Device::Cpu, &[0, tokens as i32 - 1], [2])?;
        let found = decode_attention(&both, &spec, &table, &positions, &mut cache, &mut scratch)?;
        assert_eq!(found.shape().to_vec(), [2, 1, count * HEAD_DIM]);
        let found = &found.as_slice::<f32>()?[count * HEAD_DIM..];
        let shape = Tensor::zeros(&Device::Cpu, [count, HEAD_DIM], DType::F32)?.shape();
        expect_close(&format!("{tokens} tokens"), found, expected, shape, F32_TOLERANCE)?;
    }
    Ok(())
}

fn nobody_is_there() -> Outcome {
    let heads = Heads::new(&Device::Cpu, 2, 1)?;
    let found = steps(&Device::Cpu, &heads, &[3, -1, 4], 5, 2)?;
    // The second step of the third item lies behind the cache's end.
    let zero = |tensor: &Tensor, item: usize| -> Result<bool> {
        Ok(tensor
            .narrow(item, 1)?
            .as_slice::<f32>()?
            .iter()
            .all(|&value| value == 0.0))
    };
    for (step, item, expected) in [
        (0, 0, false),
        (0, 1, true),
        (0, 2, false),
        (1, 0, false),
        (1, 1, true),
        (1, 2, true),
    ] {
        assert_eq!(zero(&found[step], item)?, expected, "step {step}, item {item}");
    }
    let cache = found[2].reshape([2, 3, 5, HEAD_DIM])?;
    assert!(zero(&cache.narrow(0, 1)?.into_shape([3, 5, HEAD_DIM])?, 1)?);
    Ok(())
}

/// No key but the new one, fewer than a block's step, all of a run and one more, as many runs as there can be; groups of every size
/// that has a kernel, and of sizes between; items of different lengths, one of them absent.
fn cuda_equals_cpu(device: &Device) -> Outcome {
    for (heads, kv_heads) in [(2, 2), (4, 2), (6, 2), (32, 8), (5, 1), (8, 1)] {
        for (starts, capacity) in [
            (&[0][..], 4),
            (&[30, 0, 31, -1, 7], 40),
            (&[500, 33, 511], 520),
            (&[1021], 1024),
        ] {
            let what = format!("{heads} heads of {kv_heads} from {starts:?}");
            expect_like_cpu(&what, device, BF16_TOLERANCE, |device| {
                let heads = Heads::new(device, heads, kv_heads)?;
                steps(device, &heads, starts, capacity, 3)
            })?;
        }
    }
    Ok(())
}

fn cuda_repeats_its_bits(device: &Device) -> Outcome {
    let heads = Heads::new(device, 32, 8)?;
    let run = || -> Result<Vec<half::bf16>> { steps(device, &heads, &[2000, 17], 2048, 8)?[7].to_vec() };
    let first = run()?;
    for _ in 0..5 {
        assert!(run()? == first);
    }
    Ok(())
}

fn cuda_names_unknown_heads(device: &Device) -> Outcome {
    let heads = Heads::new(device, 9, 1)?;
    let message = DecodeScratch::new(device, 1, &heads.spec(), 8)
        .err()
        .map(|error| error.to_string());
    let message = message.unwrap_or_default();
    assert!(
        message.contains("9 heads of 128 elements") && message.contains("at most 8 of 128"),
        "{message}"
    );
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let heads = Heads::new(&Device::Cpu, 4, 2)?;
    let spec = heads.spec();
    let mut cache = KeyCache::new(&Device::Cpu, 2, 2, 3, HEAD_DIM)?;
    let mut scratch = DecodeScratch::new(&Device::Cpu, 2, &spec, 3)?;
    let table = table(&Device::Cpu, 3)?;
    let positions = Tensor::zeros(&Device::Cpu, [2], DType::I32)?;
    let mut step = |qkv: &Tensor, spec: &QkNormRope<'_>, positions: &Tensor| {
        let outcome = decode_attention(qkv, spec, &table, positions, &mut cache, &mut scratch);
        outcome.unwrap_err().to_string()
    };
    let two = heads.packed(&Device::Cpu, "x", 2, 1)?;
    let message = step(&heads.packed(&Device::Cpu, "x", 2, 2)?, &spec, &positions);
    assert_eq!(
        message,
        "decode_attention: qkv has shape [2, 2, 1024], expected [2, 1, 1024]"
    );
    let message = step(&two, &spec, &Tensor::zeros(&Device::Cpu, [3], DType::I32)?);
    assert_eq!(message, "decode_attention: positions has shape [3], expected [2]");
    let message = step(&heads.packed(&Device::Cpu, "x", 1, 1)?, &spec, &positions.narrow(0, 1)?);
    assert!(
        message.starts_with("decode_attention: cache has shape [2, 2, 2, 3, 128]"),
        "{message}"
    );
    let pairs = QkNormRope {
        rotation: Rotation::Interleaved,
        ..spec
    };
    assert!(step(&two, &pairs, &positions).contains("halves of a head"));
    let four = heads.packed(&Device::Cpu, "x", 1, 4)?;
    let message = keep_keys(&four, &spec, &mut cache, 0).unwrap_err().to_string();
    assert_eq!(
        message,
        "keep_keys: 4 tokens of item 0 do not fit a cache of 2 items of 3 tokens"
    );
    Ok(())
}
