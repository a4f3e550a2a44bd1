use l2p_engine::ops::attention::{Attention, attention_in};
use l2p_engine::ops::linear_quantised::{linear_quantised, linear_quantised_swiglu};
use l2p_engine::ops::quantise::{Activation, Coding, GROUP, Quantised, Scaling, dequantise, quantise, restore};
use l2p_engine::ops::rms_norm::{GatedResidual, RmsNorm, gated_residual_rms_norm_in, rms_norm_modulate_in};
use l2p_engine::{Device, Result, Tensor};
use l2p_tests::{
    BF16_TOLERANCE, Outcome, Suite, expect_like_cpu, random, random_bf16, relative_error, with_poisoned_buffers,
};

use super::loops::{exact, product, silu};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::quantise::codes_are_as_defined", codes_are_as_defined);
    suite.cpu("ops::quantise::what_is_restored_is_near", what_is_restored_is_near);
    suite.cpu("ops::quantise::outliers_are_spread", outliers_are_spread);
    suite.cpu("ops::quantise::zeros_and_damage", zeros_and_damage);
    suite.cpu("ops::quantise::mistakes_are_named", mistakes_are_named);
    suite.cpu(
        "ops::linear_quantised::cpu_equals_plain_loops",
        products_equal_plain_loops,
    );
    suite.cuda("ops::quantise::cuda_equals_cpu", cuda_equals_cpu);
    suite.cuda("ops::quantise::cuda_zeros_and_damage", cuda_zeros_and_damage);
    suite.cuda("ops::linear_quantised::cuda_equals_cpu", products_equal_cpu);
    suite.cuda("ops::linear_quantised::cuda_swiglu_equals_cpu", swiglu_equals_cpu);
    suite.cuda(
        "ops::linear_quantised::cuda_repeats_its_bits",
        products_repeat_their_bits,
    );
    suite.cuda("ops::rms_norm::cuda_in_eight_bits", norms_equal_cpu);
    suite.cuda("ops::attention::cuda_in_eight_bits", attention_equals_cpu);
}

const CODINGS: [Coding; 2] = [Coding::Int8, Coding::Float8];
const SCALINGS: [Scaling; 2] = [Scaling::Rows, Scaling::Groups];

/// Values that are made of the same numbers on both devices may be a code apart where they lie in the middle between two; sums of
/// bf16 lie where they want.
const CODES: f64 = 2e-3;
const RESULTS: f64 = 5e-3;

fn tokens(device: &Device, name: &str, shape: [usize; 3]) -> Result<Tensor> {
    Tensor::from_f32(device, &random_bf16(name, shape.iter().product()), shape)
}

fn weight(device: &Device, name: &str, [outputs, inputs]: [usize; 2]) -> Result<Tensor> {
    let scale = 1.0 / (inputs as f32).sqrt();
    let values: Vec<f32> = random(name, outputs * inputs)
        .into_iter()
        .map(|value| half::bf16::from_f32(value * scale).to_f32())
        .collect();
    Tensor::from_f32(device, &values, [outputs, inputs])
}

/// Element (i, j) of Sylvester's matrix of ±1.
fn sylvester(i: usize, j: usize) -> f64 {
    if (i & j).count_ones().is_multiple_of(2) {
        1.0
    } else {
        -1.0
    }
}

/// By the definition, in f64: what is rounded, and the scale of each element.
fn defined(row: &[f64], coding: Coding, scaling: Scaling) -> (Vec<f64>, Vec<f64>) {
    let rotated: Vec<f64> = row
        .chunks(GROUP)
        .flat_map(|group| {
            (0..GROUP).map(|j| match coding {
                Coding::Float8 => group[j],
                Coding::Int8 => {
                    let sum: f64 = group.iter().enumerate().map(|(i, value)| value * sylvester(i, j)).sum();
                    sum / (GROUP as f64).sqrt()
                }
            })
        })
        .collect();
    let part = match scaling {
        Scaling::Rows => row.len(),
        Scaling::Groups => GROUP,
    };
    let largest = |values: &[f64]| values.iter().fold(0.0_f64, |most, value| most.max(value.abs()));
    let scales = rotated
        .chunks(part)
        .flat_map(|values| vec![largest(values) / f64::from(coding.largest()); part])
        .collect();
    (rotated, scales)
}

fn codes_are_as_defined() -> Outcome {
    for (coding, scaling) in CODINGS
        .into_iter()
        .flat_map(|coding| SCALINGS.map(|scaling| (coding, scaling)))
    {
        for [batch, rows, width] in [[1, 1, 128], [2, 3, 384], [1, 5, 1024]] {
            let x = tokens(&Device::Cpu, "x", [batch, rows, width])?;
            let found = quantise(&x, coding, scaling)?;
            assert_eq!(found.shape().to_vec(), [batch, rows, width]);
            let values = dequantise(&found)?.to_vec_f32()?;
            let all = exact(&x)?;
            for (row, values) in all.chunks(width).zip(values.chunks(width)) {
                let (rotated, scales) = defined(row, coding, scaling);
                for ((value, expected), scale) in values.iter().zip(rotated).zip(scales) {
                    let value = f64::from(*value);
                    // Half a step of integers; of floating point half of a sixteenth or of the smallest step.
                    let step = match coding {
                        Coding::Int8 => 0.5 * scale,
                        Coding::Float8 => (expected.abs() / 16.0).max(scale * 2f64.powi(-10)),
                    };
                    assert!(
                        (value - expected).abs() <= step * 1.001,
                        "{coding} {scaling:?}: {value} for {expected}"
                    );
                }
            }
        }
    }
    Ok(())
}

fn what_is_restored_is_near() -> Outcome {
    let x = tokens(&Device::Cpu, "x", [1, 64, 1024])?;
    for (coding, scaling, most) in [
        (Coding::Int8, Scaling::Rows, 0.0085),
        (Coding::Int8, Scaling::Groups, 0.0075),
        (Coding::Float8, Scaling::Rows, 0.028),
        (Coding::Float8, Scaling::Groups, 0.028),
    ] {
        let error = relative_error(
            &restore(&quantise(&x, coding, scaling)?)?.to_vec_f32()?,
            &x.to_vec_f32()?,
        );
        assert!(error < most && error > most / 2.0, "{coding} {scaling:?}: {error}");
    }
    Ok(())
}

/// An element a thousand times as large as the others takes nearly all bits of a row of integers; rotated and by groups only some of its
/// group's.
fn outliers_are_spread() -> Outcome {
    let mut values = random_bf16("x", 1024);
    values[700] = 1000.0;
    let x = Tensor::from_f32(&Device::Cpu, &values, [1, 1024])?;
    let error = |scaling| -> Result<f64> {
        let found = restore(&quantise(&x, Coding::Int8, scaling)?)?.to_vec_f32()?;
        let others = |values: &[f32]| [&values[..640], &values[768..]].concat();
        Ok(relative_error(&others(&found), &others(&values)))
    };
    let (rows, groups) = (error(Scaling::Rows)?, error(Scaling::Groups)?);
    assert!(groups < 0.008 && rows < 0.5 && rows > 0.01, "{groups} {rows}");
    Ok(())
}

fn zeros_and_damage() -> Outcome {
    damage_reaches_the_result(&Device::Cpu)
}

fn cuda_zeros_and_damage(device: &Device) -> Outcome {
    damage_reaches_the_result(device)
}

/// Rows of zeros stay zeros; what is not finite stays so, and in its row.
fn damage_reaches_the_result(device: &Device) -> Outcome {
    for (coding, scaling) in CODINGS
        .into_iter()
        .flat_map(|coding| SCALINGS.map(|scaling| (coding, scaling)))
    {
        let mut values = vec![0.0; 4 * 256];
        values[256] = f32::NAN;
        values[512..768].copy_from_slice(&random_bf16("x", 256));
        values[3 * 256 + 5] = f32::NEG_INFINITY;
        let x = Tensor::from_f32(device, &values, [4, 256])?;
        let codes = quantise(&x, coding, scaling)?;
        let weights = quantise(&weight(device, "weight", [64, 256])?, coding, Scaling::Rows)?;
        for found in [restore(&codes)?, linear_quantised(&codes, &weights)?] {
            let found = found.to_vec_f32()?;
            let rows: Vec<&[f32]> = found.chunks(found.len() / 4).collect();
            assert!(rows[0].iter().all(|value| *value == 0.0), "{coding} {scaling:?}");
            assert!(rows[1].iter().any(|value| value.is_nan()), "{coding} {scaling:?}");
            assert!(rows[2].iter().all(|value| value.is_finite()) && rows[2].iter().any(|value| *value != 0.0));
            assert!(rows[3].iter().any(|value| !value.is_finite()), "{coding} {scaling:?}");
        }
    }
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let narrow = tokens(&Device::Cpu, "x", [1, 2, 96])?;
    let message = quantise(&narrow, Coding::Int8, Scaling::Rows).unwrap_err().to_string();
    assert!(message.contains("96 is not a multiple of 128"), "{message}");
    let x = quantise(&tokens(&Device::Cpu, "x", [1, 2, 256])?, Coding::Int8, Scaling::Groups)?;
    let of = |inputs, coding, scaling| quantise(&weight(&Device::Cpu, "w", [8, inputs])?, coding, scaling);
    for (weight, what) in [
        (of(128, Coding::Int8, Scaling::Rows)?, "expected [.., 128]"),
        (of(256, Coding::Float8, Scaling::Rows)?, "a weight in fp8"),
        (of(256, Coding::Int8, Scaling::Groups)?, "scales of Groups"),
    ] {
        let message = linear_quantised(&x, &weight).unwrap_err().to_string();
        assert!(
            message.contains("linear_quantised") && message.contains(what),
            "{message}"
        );
    }
    Ok(())
}

fn coded(device: &Device, [batch, rows, width]: [usize; 3], coding: Coding, scaling: Scaling) -> Result<Quantised> {
    quantise(&tokens(device, "x", [batch, rows, width])?, coding, scaling)
}

fn coded_weight(device: &Device, shape: [usize; 2], coding: Coding) -> Result<Quantised> {
    quantise(&weight(device, "weight", shape)?, coding, Scaling::Rows)
}

fn products_equal_plain_loops() -> Outcome {
    for (coding, scaling) in CODINGS
        .into_iter()
        .flat_map(|coding| SCALINGS.map(|scaling| (coding, scaling)))
    {
        let (x, weight) = (
            coded(&Device::Cpu, [2, 3, 256], coding, scaling)?,
            coded_weight(&Device::Cpu, [20, 256], coding)?,
        );
        let expected = product(&exact(&dequantise(&x)?)?, &exact(&dequantise(&weight)?)?, 256);
        let close = |found: &Tensor, expected: &[f64]| -> Outcome {
            let expected: Vec<f32> = expected.iter().map(|value| *value as f32).collect();
            let error = relative_error(&found.to_vec_f32()?, &expected);
            assert!(error < 1e-5, "{coding} {scaling:?}: {error}");
            Ok(())
        };
        close(&linear_quantised(&x, &weight)?, &expected)?;
        let gated: Vec<f64> = expected
            .chunks(20)
            .flat_map(|row| (0..10).map(|column| silu(row[column]) * row[10 + column]))
            .collect();
        let Activation::Values(found) = linear_quantised_swiglu(&x, &weight, None)? else {
            return Err("codes, though none were asked for".into());
        };
        close(&found, &gated)?;
    }
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for (coding, scaling) in CODINGS
        .into_iter()
        .flat_map(|coding| SCALINGS.map(|scaling| (coding, scaling)))
    {
        for shape in [[1, 1, 128], [2, 7, 384], [1, 100, 3840], [1, 3, 10240], [3, 33, 1024]] {
            expect_like_cpu(&format!("{coding} {scaling:?} {shape:?}"), device, CODES, |device| {
                let found = coded(device, shape, coding, scaling)?;
                let scales = found.scales().clone();
                Ok(vec![scales, dequantise(&found)?, restore(&found)?])
            })?;
        }
    }
    Ok(())
}

/// One tile and less, tiles with a rest in both directions, an odd number of columns' tiles, one step of summed elements and more than
/// the ring holds; several waves of tiles.
fn products_equal_cpu(device: &Device) -> Outcome {
    for (coding, scaling) in CODINGS
        .into_iter()
        .flat_map(|coding| SCALINGS.map(|scaling| (coding, scaling)))
    {
        for [batch, rows, width, outputs] in [
            [1, 1, 128, 8],
            [2, 65, 256, 136],
            [1, 128, 128, 256],
            [1, 200, 1152, 392],
            [1, 700, 640, 768],
            [1, 3000, 384, 1160],
        ] {
            let what = format!("{coding} {scaling:?} {batch}x{rows}x{width} to {outputs}");
            expect_like_cpu(&what, device, RESULTS, |device| {
                let x = coded(device, [batch, rows, width], coding, scaling)?;
                Ok(vec![linear_quantised(
                    &x,
                    &coded_weight(device, [outputs, width], coding)?,
                )?])
            })?;
        }
    }
    Ok(())
}

/// Codes that a kernel makes of sums in registers are as near to the result on the CPU in f32 as if that had been quantised by itself, but
/// for the kernel's own error: as a whole to `whole`, every row to half as much again. Whether a value that lies between two codes takes the
/// one or the other is decided by its last bits, so that codes themselves cannot be compared.
fn expect_as_near(what: &str, found: &Activation, exact: &Tensor, whole: f64) -> Outcome {
    let Activation::Codes(found) = found else {
        return Err("values, though codes were asked for".into());
    };
    let by_itself = restore(&quantise(exact, found.coding(), found.scaling())?)?.to_vec_f32()?;
    let (found, exact, width) = (restore(found)?.to_vec_f32()?, exact.to_vec_f32()?, exact.shape().last());
    let least = relative_error(&by_itself, &exact);
    let error = relative_error(&found, &exact);
    assert!(error <= whole * least, "{what}: {error}, by itself {least}");
    for (row, (found, exact)) in found.chunks(width).zip(exact.chunks(width)).enumerate() {
        let error = relative_error(found, exact);
        let zero = exact.iter().all(|value| *value == 0.0) && found == exact;
        assert!(
            zero || error <= 1.5 * whole * least,
            "{what}, row {row}: {error}, by itself {least}"
        );
    }
    Ok(())
}

fn swiglu_equals_cpu(device: &Device) -> Outcome {
    for coding in CODINGS {
        for [batch, rows, width, hidden] in [
            [1, 1, 128, 128],
            [2, 65, 256, 384],
            [1, 1500, 640, 256],
            [1, 700, 1152, 1280],
        ] {
            let what = format!("{coding} {batch}x{rows}x{width} to {hidden}");
            let run = |device: &Device, then| {
                let x = coded(device, [batch, rows, width], coding, Scaling::Rows)?;
                linear_quantised_swiglu(&x, &coded_weight(device, [2 * hidden, width], coding)?, then)
            };
            let Activation::Values(exact) = run(&Device::Cpu, None)? else {
                return Err("codes, though none were asked for".into());
            };
            let found = with_poisoned_buffers(|| run(device, Some(coding)))?;
            expect_as_near(&what, &found, &exact, 1.1)?;
        }
    }
    Ok(())
}

fn products_repeat_their_bits(device: &Device) -> Outcome {
    for (coding, scaling) in CODINGS
        .into_iter()
        .flat_map(|coding| SCALINGS.map(|scaling| (coding, scaling)))
    {
        let x = coded(device, [1, 2048, 1024], coding, scaling)?;
        let weight = coded_weight(device, [1536, 1024], coding)?;
        let run = || linear_quantised(&x, &weight)?.to_vec::<half::bf16>();
        assert!(run()? == run()?);
    }
    Ok(())
}

fn norms_equal_cpu(device: &Device) -> Outcome {
    for coding in CODINGS {
        for [batch, rows, dim] in [[1, 1, 128], [2, 37, 384], [1, 500, 3840], [2, 300, 1024]] {
            let what = format!("{coding} {batch}x{rows}x{dim}");
            let run = |device: &Device, coding| -> Result<(Activation, Tensor, Activation)> {
                let (x, y) = (
                    tokens(device, "x", [batch, rows, dim])?,
                    tokens(device, "y", [batch, rows, dim])?,
                );
                let factors = |name| Tensor::from_f32(device, &random_bf16(name, dim), [dim]);
                let (weight, next_weight) = (factors("weight")?, factors("next")?);
                let norm = RmsNorm {
                    weight: &next_weight,
                    scale: None,
                    epsilon: 1e-5,
                };
                let residual = GatedResidual {
                    weight: &weight,
                    gate: None,
                    epsilon: 1e-5,
                };
                let first = rms_norm_modulate_in(&x, &norm, coding)?;
                let (sum, next) = gated_residual_rms_norm_in(&x, &y, &residual, Some(&norm), coding)?;
                Ok((first, sum, next.expect("a normalisation was asked for")))
            };
            let (Activation::Values(first), sum, Activation::Values(next)) = run(&Device::Cpu, None)? else {
                return Err("codes, though none were asked for".into());
            };
            let (found_first, found_sum, found_next) = with_poisoned_buffers(|| run(device, Some(coding)))?;
            expect_as_near(&what, &found_first, &first, 1.05)?;
            expect_as_near(&what, &found_next, &next, 1.05)?;
            assert!(relative_error(&found_sum.to_vec_f32()?, &sum.to_vec_f32()?) < BF16_TOLERANCE);
        }
    }
    Ok(())
}

fn attention_equals_cpu(device: &Device) -> Outcome {
    for coding in CODINGS {
        for [batch, rows, heads] in [[1, 5, 1], [2, 130, 3], [1, 700, 2], [2, 1000, 5]] {
            let spec = Attention {
                heads,
                kv_heads: heads,
                head_dim: 128,
                causal: false,
                scale: 128f32.sqrt().recip(),
            };
            let lengths: Vec<i32> = (0..batch).map(|item| (rows - item * (rows / 3)) as i32).collect();
            let run = |device: &Device, coding| {
                let qkv = tokens(device, "qkv", [batch, rows, 3 * heads * 128])?;
                let lengths = Tensor::from_slice(device, &lengths, [batch])?;
                attention_in(&qkv, &spec, Some(&lengths), coding)
            };
            let Activation::Values(exact) = run(&Device::Cpu, None)? else {
                return Err("codes, though none were asked for".into());
            };
            let found = with_poisoned_buffers(|| run(device, Some(coding)))?;
            // The weights of the values are rounded to bf16.
            expect_as_near(&format!("{coding} {batch}x{rows}x{heads}"), &found, &exact, 1.2)?;
        }
    }
    Ok(())
}
