//! Transformers whose weights are in eight bits.

use l2p_engine::layers::MemoryParams;
use l2p_engine::model::config::ModelKind;
use l2p_engine::model::zimage::{Dit, DitConfig};
use l2p_engine::model::{Denoiser, Precision};
use l2p_engine::ops::quantise::Coding;
use l2p_engine::{Device, Result, Tensor};
use l2p_tests::{Outcome, Suite, random_bf16, relative_error};

use super::dit::load_over;
use super::{random_model, small_config};

pub fn register(suite: &mut Suite) {
    suite.cpu("models::eight_bit::outliers_cost_little", || {
        outliers_cost_little(&Device::Cpu)
    });
    suite.cuda("models::eight_bit::outliers_cost_little_on_cuda", outliers_cost_little);
}

/// Hidden channels of each feed-forward layer that are made large, and by how much each factor of theirs is.
const CHANNELS: [usize; 3] = [5, 130, 777];
const FACTOR: f32 = 64.0;

/// Makes some inputs of each w2 thousands of times as large as the others, and its weights for them as much smaller: in exact arithmetic
/// nothing changes, since factors are powers of two.
fn with_outliers(mut params: MemoryParams, config: &DitConfig) -> MemoryParams {
    let (dim, hidden) = (config.dim, config.ffn_hidden);
    for (name, (_, values)) in &mut params.0 {
        for channel in CHANNELS {
            if name.ends_with("feed_forward.w1.weight") || name.ends_with("feed_forward.w3.weight") {
                values[channel * dim..(channel + 1) * dim]
                    .iter_mut()
                    .for_each(|value| *value *= FACTOR);
            } else if name.ends_with("feed_forward.w2.weight") {
                let column = values.iter_mut().skip(channel).step_by(hidden);
                column.for_each(|value| *value /= FACTOR * FACTOR);
            }
        }
    }
    params
}

fn velocity(params: &MemoryParams, config: &DitConfig, precision: &Precision, device: &Device) -> Result<Vec<f32>> {
    let dit: Dit = load_over(params, config, precision, device)?;
    let caption = Tensor::from_f32(device, &random_bf16("caption", 40 * 96), [1, 40, 96])?;
    let image = Tensor::from_f32(device, &random_bf16("image", 16 * 16 * 16), [1, 16, 16, 16])?;
    let prepared = dit.prepare(&[&caption], [16, 16])?;
    dit.forward(&image, &prepared, &dit.modulate(&[0.35], None)?)?
        .to_vec_f32()
}

/// With channels that are thousands of times larger than the others, a velocity in int8 is as near to that in the compute type as without
/// them; in fp8 too, whose codes have exponents of their own.
fn outliers_cost_little(device: &Device) -> Outcome {
    let config = small_config(ModelKind::Latent, 384, 2);
    let plain = random_model(&config, &[]);
    let large = with_outliers(plain.clone(), &config);
    for coding in [Coding::Int8, Coding::Float8] {
        let precision = Precision {
            coding: Some(coding),
            ..Precision::default()
        };
        let error = |params: &MemoryParams| -> Result<f64> {
            let expected = velocity(params, &config, &Precision::default(), device)?;
            Ok(relative_error(
                &velocity(params, &config, &precision, device)?,
                &expected,
            ))
        };
        let (without, with) = (error(&plain)?, error(&large)?);
        assert!(without > 0.0 && without < 0.1, "{coding}: {without}");
        assert!(
            with < 1.5 * without,
            "{coding}: {with} with outliers, {without} without"
        );
    }
    Ok(())
}
