use std::f64::consts::{PI, TAU};

use l2p_engine::ops::noise::{NoiseOrigin, normal_noise, normal_noise_items, philox4x32};
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::{Outcome, Suite};

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "ops::noise::philox_equals_published_vectors",
        philox_equals_published_vectors,
    );
    suite.cpu("ops::noise::transform_is_accurate", transform_is_accurate);
    suite.cpu("ops::noise::values_are_normal", values_are_normal);
    suite.cpu("ops::noise::values_are_independent", values_are_independent);
    suite.cpu("ops::noise::bits_never_change", bits_never_change);
    suite.cpu("ops::noise::items_have_their_own_noise", items_have_their_own_noise);
    suite.cuda("ops::noise::cuda_equals_cpu_in_every_bit", cuda_equals_cpu_in_every_bit);
    suite.cuda(
        "ops::noise::items_on_cuda_equal_cpu_in_every_bit",
        items_on_cuda_equal_cpu_in_every_bit,
    );
}

/// The known-answer tests of Random123 for ten rounds.
fn philox_equals_published_vectors() -> Outcome {
    let zeros = philox4x32([0; 4], [0; 2]);
    assert_eq!(zeros, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    let ones = philox4x32([u32::MAX; 4], [u32::MAX; 2]);
    assert_eq!(ones, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    let pi = philox4x32(
        [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
        [0xa409_3822, 0x299f_31d0],
    );
    assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    Ok(())
}

fn noise(count: usize, seed: u64, stream: u64) -> l2p_engine::Result<Vec<f32>> {
    normal_noise(&Device::Cpu, [count], seed, stream)?.to_vec()
}

/// Every value against the exact transform of the same uniform numbers, of which the radius's is held in f32.
fn transform_is_accurate() -> Outcome {
    let (seed, stream) = (0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210u64);
    let values = noise(1 << 20, seed, stream)?;
    let mut worst = 0f64;
    for (index, values) in values.chunks(4).enumerate() {
        let counter = [index as u32, 0, stream as u32, (stream >> 32) as u32];
        let random = philox4x32(counter, [seed as u32, (seed >> 32) as u32]);
        for (pair, words) in values.chunks(2).zip(random.chunks(2)) {
            let uniform = words[0] as f32 * 2f32.powi(-32) + 2f32.powi(-33);
            let radius = (-2.0 * f64::from(uniform).ln()).sqrt();
            let turn = f64::from(words[1]) / 2f64.powi(32);
            let exact = [radius * (TAU * turn).cos(), radius * (TAU * turn).sin()];
            for (value, exact) in pair.iter().zip(exact) {
                worst = worst.max((f64::from(*value) - exact).abs() / radius.max(f64::MIN_POSITIVE));
            }
        }
    }
    assert!(worst < 2f64.powi(-22), "error of {worst:e} of the radius");
    Ok(())
}

/// The normal distribution function, by Simpson's rule.
fn normal_cdf(x: f64) -> f64 {
    const STEPS: usize = 200;
    let width = x / STEPS as f64;
    let density = |x: f64| (-x * x / 2.0).exp() / (2.0 * PI).sqrt();
    let sum: f64 = (0..STEPS)
        .map(|step| {
            let left = step as f64 * width;
            density(left) + 4.0 * density(left + width / 2.0) + density(left + width)
        })
        .sum();
    0.5 + sum * width / 6.0
}

fn moment(values: &[f32], power: i32) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(power)).sum::<f64>() / values.len() as f64
}

/// Bounds are four standard deviations of each statistic.
fn values_are_normal() -> Outcome {
    let count = 1 << 20;
    let scale = 4.0 / (count as f64).sqrt();
    for (seed, stream) in [(0, 0), (42, 7), (u64::MAX, 1 << 40)] {
        let values = noise(count, seed, stream)?;
        let [mean, variance, skewness, kurtosis] = [1, 2, 3, 4].map(|power| moment(&values, power));
        assert!(mean.abs() < scale, "mean {mean}");
        assert!((variance - 1.0).abs() < scale * 2f64.sqrt(), "variance {variance}");
        assert!(skewness.abs() < scale * 15f64.sqrt(), "skewness {skewness}");
        assert!((kurtosis - 3.0).abs() < scale * 96f64.sqrt(), "kurtosis {kurtosis}");
        // Beyond four there are 6.3e-5 of all values.
        let far = values.iter().filter(|value| value.abs() > 4.0).count() as f64;
        let expected = count as f64 * 2.0 * (1.0 - normal_cdf(4.0));
        assert!(
            (far - expected).abs() < 4.0 * expected.sqrt(),
            "{far} beyond 4, expected {expected}"
        );
        // Kolmogorov and Smirnov: the bound is passed once in a thousand times.
        let mut sorted = values[..1 << 16].to_vec();
        sorted.sort_by(f32::total_cmp);
        let distance = sorted.iter().enumerate().map(|(rank, value)| {
            let found = (rank as f64 + 0.5) / sorted.len() as f64;
            (found - normal_cdf(f64::from(*value))).abs()
        });
        let distance = distance.fold(0.0, f64::max);
        assert!(distance < 1.95 / (sorted.len() as f64).sqrt(), "distance {distance}");
    }
    Ok(())
}

fn correlation(a: &[f32], b: &[f32]) -> f64 {
    let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
    products.sum::<f64>() / a.len().min(b.len()) as f64
}

fn values_are_independent() -> Outcome {
    let count = 1 << 18;
    let bound = 4.5 / (count as f64 - 1024.0).sqrt();
    let values = noise(count, 5, 9)?;
    for lag in [1, 2, 3, 4, 5, 8, 64, 1000, 1024] {
        let found = correlation(&values, &values[lag..]);
        assert!(found.abs() < bound, "correlation {found} at distance {lag}");
    }
    let squares: Vec<f32> = values.iter().map(|value| (value * value - 1.0) / 2f32.sqrt()).collect();
    for lag in [1, 2, 3, 4] {
        let found = correlation(&squares, &squares[lag..]);
        assert!(found.abs() < bound, "correlation {found} of squares at distance {lag}");
    }
    for (seed, stream) in [(5, 10), (6, 9), (5 + (1 << 32), 9), (5, 9 + (1 << 32)), (9, 5)] {
        let found = correlation(&values, &noise(count, seed, stream)?);
        assert!(
            found.abs() < bound,
            "correlation {found} with seed {seed}, stream {stream}"
        );
    }
    // An element depends on its index alone, not on how many there are or how they are arranged.
    for count in [1, 2, 3, 4, 5, 1021] {
        assert_eq!(noise(count, 5, 9)?, values[..count]);
    }
    let arranged = normal_noise(&Device::Cpu, [3, 5, 7], 5, 9)?;
    assert_eq!((arranged.dtype(), *arranged.shape() == [3, 5, 7]), (DType::F32, true));
    assert_eq!(arranged.as_slice::<f32>()?, &values[..105]);
    Ok(())
}

/// Pictures are named by their seeds, so the noise of a seed is for ever.
fn bits_never_change() -> Outcome {
    let bits = |seed, stream| -> l2p_engine::Result<Vec<u32>> {
        Ok(noise(8, seed, stream)?.into_iter().map(f32::to_bits).collect())
    };
    let expected = [
        0x3f7d_bb31,
        0xbf6c_b6b0,
        0xbf1e_1b9f,
        0xbef6_d1b2,
        0xbe1d_5354,
        0x3e39_2a68,
        0x3f54_ec97,
        0x3e4a_2da2,
    ];
    assert_eq!(bits(0, 0)?, expected);
    let expected = [
        0xc018_d15e,
        0x3f59_5c03,
        0xbf28_3173,
        0xbeee_7981,
        0x3f5a_5032,
        0x3f41_b3ba,
        0x3bf4_381b,
        0x3f68_258a,
    ];
    assert_eq!(bits(42, 3)?, expected);
    Ok(())
}

fn cuda_equals_cpu_in_every_bit(device: &Device) -> Outcome {
    for (count, seed, stream) in [
        (1, 0, 0),
        (2, 1, 1),
        (7, 2, 3),
        (1021, 3, u64::MAX),
        (1 << 22, u64::MAX, 5),
        (4099, 1 << 33, 1 << 35),
    ] {
        l2p_engine::device::set_poison_new_buffers(true);
        let found = normal_noise(device, [count], seed, stream);
        l2p_engine::device::set_poison_new_buffers(false);
        let bits = |tensor: &Tensor| -> l2p_engine::Result<Vec<u32>> {
            Ok(tensor.to_vec::<f32>()?.into_iter().map(f32::to_bits).collect())
        };
        let (found, expected) = (
            bits(&found?)?,
            bits(&normal_noise(&Device::Cpu, [count], seed, stream)?)?,
        );
        let first = found
            .iter()
            .zip(&expected)
            .position(|(found, expected)| found != expected);
        assert_eq!(first, None, "{count} values of seed {seed}, stream {stream}");
    }
    Ok(())
}

const ORIGINS: [NoiseOrigin; 3] = [
    NoiseOrigin { seed: 5, stream: 0 },
    NoiseOrigin {
        seed: 0x0123_4567_89ab_cdef,
        stream: 0xfedc_ba98_7654_3210,
    },
    NoiseOrigin { seed: 5, stream: 1 },
];

fn items_have_their_own_noise() -> Outcome {
    let item = [3, 5, 3];
    let batch = normal_noise_items(&Device::Cpu, &ORIGINS, &item)?;
    assert_eq!(batch.shape().to_vec(), [3, 3, 5, 3]);
    for (found, origin) in batch.to_vec::<f32>()?.chunks(45).zip(ORIGINS) {
        assert_eq!(found, noise(45, origin.seed, origin.stream)?);
    }
    Ok(())
}

fn items_on_cuda_equal_cpu_in_every_bit(device: &Device) -> Outcome {
    for item in [[1, 1, 1], [3, 5, 3], [16, 16, 16], [37, 41, 3], [128, 128, 3]] {
        l2p_tests::expect_like_cpu(&format!("{item:?}"), device, 0.0, |device| {
            Ok(vec![normal_noise_items(device, &ORIGINS, &item)?])
        })?;
    }
    Ok(())
}
