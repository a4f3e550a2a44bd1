//! What operations tell profilers of their work: arithmetic of products, and bytes when every input is read once and every result
//! written once. Rates and shares in reports are made of these numbers.

use l2p_engine::ops::add_rms_norm::{add, add_rms_norm};
use l2p_engine::ops::attention::{Attention, attention};
use l2p_engine::ops::cast::cast;
use l2p_engine::ops::conv::{Activation, Canvas, Conv, conv2d, conv2d_f32, conv3x3_silu_pool, upsample_conv3x3};
use l2p_engine::ops::detail_stage::{DetailStage, detail_stage};
use l2p_engine::ops::embedding::embedding;
use l2p_engine::ops::group_norm::{GroupNorm, group_norm, group_norm_in_place};
use l2p_engine::ops::guidance::{Guidance, guided_euler_step};
use l2p_engine::ops::latent::denormalize_latent;
use l2p_engine::ops::layer_norm::layer_norm_modulate;
use l2p_engine::ops::linear::{InputActivation, linear, linear_vectors};
use l2p_engine::ops::noise::normal_noise;
use l2p_engine::ops::patch_embed::patch_embed;
use l2p_engine::ops::qk_norm_rope::{QkNormRope, Rotation, qk_norm_rope};
use l2p_engine::ops::resize::resize_nearest;
use l2p_engine::ops::rms_norm::{GatedResidual, RmsNorm, gated_residual_rms_norm, rms_norm};
use l2p_engine::ops::swiglu::swiglu;
use l2p_engine::ops::to_rgb8::to_rgb8;
use l2p_engine::ops::tokens::{concat_tokens, fill_pad_tokens, narrow_tokens, pad_tokens};
use l2p_engine::ops::unpatchify::unpatchify;
use l2p_engine::profile::{Work, measure};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::{Outcome, Suite, random};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::work::products_tell_their_work", products);
    suite.cpu("ops::work::passes_tell_their_bytes", passes);
    suite.cpu("ops::work::convolutions_tell_their_work", convolutions);
}

const CPU: Device = Device::Cpu;

/// Bytes of an f32.
const F32: u64 = 4;

fn tensor(shape: &[usize]) -> Result<Tensor> {
    Tensor::from_slice(&CPU, &random("values", shape.iter().product()), shape)
}

/// Fails unless `work` is one operation of this name, arithmetic and elements moved (of f32, read or written).
fn expect(name: &str, flops: u64, elements: u64, work: impl FnOnce() -> Result<()>) -> Outcome {
    let (_, profile) = measure(&CPU, work)?;
    let found: Vec<(&str, Work)> = profile.ops.iter().map(|op| (op.name, op.work)).collect();
    let bytes = elements * F32;
    assert_eq!(found, [(name, Work { flops, bytes })]);
    Ok(())
}

fn products() -> Outcome {
    let (x, weight) = (tensor(&[2, 5, 7])?, tensor(&[11, 7])?);
    expect("linear", 2 * 10 * 7 * 11, 70 + 77 + 110, || {
        linear(&x, &weight, None).map(drop)
    })?;
    let vectors = tensor(&[3, 7])?;
    expect("linear_vectors", 2 * 3 * 7 * 11, 77 + 33, || {
        linear_vectors(&vectors, InputActivation::None, &weight, None).map(drop)
    })?;
    let qkv = tensor(&[2, 5, (3 + 2 * 3) * 4])?;
    for (causal, flops) in [(false, 4 * 2 * 5 * 5 * 12), (true, 2 * 2 * 5 * 5 * 12)] {
        let spec = Attention {
            heads: 3,
            kv_heads: 3,
            head_dim: 4,
            causal,
            scale: 0.5,
        };
        expect("attention", flops, 2 * 5 * 36 + 2 * 5 * 12, || {
            attention(&qkv, &spec, None).map(drop)
        })?;
    }
    let (image, weight, bias) = (tensor(&[3, 4, 6, 3])?, tensor(&[5, 12])?, tensor(&[5])?);
    // Eighteen patches of 2×2×3.
    expect("patch_embed", 2 * 18 * 12 * 5, 216 + 60 + 90, || {
        patch_embed(&image, 2, &weight, &bias).map(drop)
    })
}

fn passes() -> Outcome {
    let (x, y, weight) = (tensor(&[2, 5, 8])?, tensor(&[2, 5, 8])?, tensor(&[8])?);
    expect("rms_norm_modulate", 0, 2 * 80, || rms_norm(&x, &weight, 1e-5).map(drop))?;
    expect("layer_norm_modulate", 0, 2 * 80, || {
        layer_norm_modulate(&x, None, 1e-5).map(drop)
    })?;
    let residual = GatedResidual {
        weight: &weight,
        gate: None,
        epsilon: 1e-5,
    };
    let next = RmsNorm {
        weight: &weight,
        scale: None,
        epsilon: 1e-5,
    };
    for (next, tensors) in [(None, 3), (Some(&next), 4)] {
        expect("gated_residual_rms_norm", 0, tensors * 80, || {
            gated_residual_rms_norm(&x, &y, &residual, next).map(drop)
        })?;
    }
    expect("add", 0, 3 * 80, || add(&x, &y).map(drop))?;
    expect("add_rms_norm", 0, 4 * 80, || {
        add_rms_norm(&x, &y, &weight, 1e-5).map(drop)
    })?;
    expect("swiglu", 0, 80 + 40, || swiglu(&x).map(drop))?;
    expect("concat_tokens", 0, 2 * 160, || concat_tokens(&x, &y).map(drop))?;
    expect("narrow_tokens", 0, 2 * 32, || narrow_tokens(&x, 1, 2).map(drop))?;
    expect("pad_tokens", 0, 80 + 112, || pad_tokens(&x, 7).map(drop))?;
    let lengths = Tensor::from_slice(&CPU, &[1, 5], [2])?;
    let mut filled = tensor(&[2, 5, 8])?;
    expect("fill_pad_tokens", 0, 8, || {
        fill_pad_tokens(&mut filled, &lengths, &weight)
    })?;
    let ids = Tensor::from_slice(&CPU, &[4, 0, 1], [1, 3])?;
    let table = tensor(&[5, 8])?;
    expect("embedding", 0, 2 * 24, || embedding(&table, &ids).map(drop))?;

    let mut qkv = tensor(&[2, 5, (3 + 2 * 2) * 4])?;
    let (norm, angles) = (tensor(&[4])?, tensor(&[1, 5, 2, 2])?);
    let spec = QkNormRope {
        heads: 3,
        kv_heads: 2,
        head_dim: 4,
        q_weight: &norm,
        k_weight: &norm,
        epsilon: 1e-5,
        rotation: Rotation::Interleaved,
    };
    // Queries and keys, read and written; values are left alone.
    expect("qk_norm_rope", 0, 2 * 10 * 5 * 4 + 20, || {
        qk_norm_rope(&mut qkv, &spec, &angles)
    })?;

    let image = tensor(&[1, 4, 6, 8])?;
    let norm = GroupNorm {
        weight: tensor(&[8])?,
        bias: tensor(&[8])?,
        groups: 2,
        epsilon: 1e-5,
    };
    expect("group_norm", 0, 2 * 192, || {
        group_norm(&image, &norm, Activation::None).map(drop)
    })?;
    let mut in_place = tensor(&[1, 4, 6, 8])?;
    expect("group_norm", 0, 2 * 192, || {
        group_norm_in_place(&mut in_place, &norm, Activation::None)
    })?;
    expect("resize_nearest", 0, 192 + 48, || resize_nearest(&image, 2, 3).map(drop))?;
    expect("denormalize_latent", 0, 2 * 192, || {
        denormalize_latent(&image, 0.5, 0.25).map(drop)
    })?;
    let tokens = tensor(&[1, 7, 12])?;
    expect("unpatchify", 0, 84 + 72, || {
        unpatchify(&tokens, 4, 6, 2, 3, 1.0).map(drop)
    })?;
    expect("normal_noise", 0, 192, || normal_noise(&CPU, [192], 0, 0).map(drop))?;
    narrow_types()?;
    euler_steps()
}

/// Results of other types than f32.
fn narrow_types() -> Outcome {
    let picture = tensor(&[1, 4, 4, 3])?;
    // 48 values of four bytes to 48 of two, and of one.
    expect("cast", 0, 48 + 24, || cast(&picture, DType::Bf16).map(drop))?;
    expect("to_rgb8", 0, 48 + 12, || to_rgb8(&picture).map(drop))
}

fn euler_steps() -> Outcome {
    let (mut x, velocity, factors) = (tensor(&[2, 24])?, tensor(&[2, 24])?, tensor(&[2])?);
    expect("guided_euler_step", 0, 3 * 48, || {
        guided_euler_step(&mut x, &velocity, None, &factors)
    })?;
    let guidance = Guidance {
        negative: &velocity,
        cfg: 2.0,
    };
    expect("guided_euler_step", 0, 4 * 48, || {
        guided_euler_step(&mut x, &velocity, Some(guidance), &factors)
    })
}

fn convolutions() -> Outcome {
    let layer = |kernel: usize, channels: &[usize], outputs: usize| {
        let depth = kernel * kernel * channels.iter().sum::<usize>();
        Conv::new(tensor(&[outputs, depth])?, tensor(&[outputs])?, kernel, channels)
    };
    let (x, second) = (tensor(&[2, 4, 6, 5])?, tensor(&[2, 2, 3, 7])?);
    let residual = tensor(&[2, 4, 6, 3])?;
    let both = layer(3, &[5, 7], 3)?;
    expect("conv2d", 2 * 48 * 9 * 12 * 3, 240 + 84 + 144 + 144, || {
        conv2d(&x, Some(&second), &both, Activation::None, Some(&residual)).map(drop)
    })?;
    let pointwise = layer(1, &[5], 3)?;
    expect("conv2d_f32", 2 * 48 * 5 * 3, 240 + 144, || {
        conv2d_f32(&x, &pointwise, 1.0).map(drop)
    })?;
    let single = layer(3, &[5], 3)?;
    expect("conv3x3_silu_pool", 2 * 48 * 9 * 5 * 3, 240 + 144 + 36, || {
        conv3x3_silu_pool(&x, &single).map(drop)
    })?;
    // A pixel of an upsampled image meets four pixels of its source.
    expect("upsample_conv3x3", 2 * 192 * 4 * 5 * 3, 240 + 576, || {
        upsample_conv3x3(&x, &single).map(drop)
    })?;

    let layers = [
        layer(3, &[3], 16)?,
        layer(3, &[16], 16)?,
        layer(3, &[16, 16], 16)?,
        layer(1, &[16], 3)?,
    ];
    let [encoder, up, decoder, output] = &layers;
    let stage = DetailStage {
        encoder,
        up,
        decoder,
        output,
    };
    let (map, picture, factors) = (tensor(&[1, 2, 3, 16])?, tensor(&[1, 4, 6, 3])?, tensor(&[2])?);
    let weights = stage.arrange()?;
    let mut target = tensor(&[1, 4, 6, 3])?;
    for (factors, canvas_elements) in [(None, 72), (Some(&factors), 144)] {
        let flops = 2 * 24 * 16 * (27 + 4 * 16 + 9 * 32 + 3);
        expect("detail_stage", flops, 96 + 72 + canvas_elements, || {
            let canvas = Canvas {
                picture: &mut target,
                scale: 1.0,
                factors,
            };
            detail_stage(&stage, &weights, &map, &picture, canvas)
        })?;
    }
    Ok(())
}
