//! Normal noise from a counter-based generator: the same bits on every device.
//!
//! [`normal_noise`] gives element `i` of a tensor (row-major) from `seed`, `stream` and `i` alone:
//!
//! * Philox 4×32-10 with key (low, high word of `seed`) and counter (low, high word of `i / 4`, low, high word of `stream`) gives
//!   words w0 … w3.
//! * Elements `4k` and `4k + 1` are `r·cos(2πa)` and `r·sin(2πa)` with `r = sqrt(−2·ln u)`, `u = (w0 + ½)·2⁻³²` and `a = w1·2⁻³²`;
//!   `4k + 2` and `4k + 3` are the same of w2 and w3. The largest magnitude is sqrt(66·ln 2) ≈ 6.76.
//!
//! Logarithm, cosine and sine are polynomials of correctly rounded f32 additions and multiplications in a fixed order,
//! without fused multiply-adds, so that CPU and CUDA agree in every bit; `kernels/cuda/noise.cu` holds the same sequence.
//! The error stays below 2⁻²² of r, given u rounded to f32. Sources: Salmon et al., "Parallel Random Numbers: As Easy as
//! 1, 2, 3" (2011); Box and Muller (1958).

use rayon::prelude::*;

use super::grid;
use crate::device::{Args, Device};
use crate::dtype::DType;
use crate::error::Result;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// Elements that one block of random words makes.
const ELEMENTS_PER_COUNTER: usize = 4;

/// Standard normal numbers in f32; see the module's head comment. Different streams of one seed are independent.
///
/// # Errors
/// When the device has no room.
pub fn normal_noise(device: &Device, shape: impl Into<Shape>, seed: u64, stream: u64) -> Result<Tensor> {
    const OP: &str = "normal_noise";
    let mut output = Tensor::empty(device, shape, DType::F32)?;
    let _op = crate::profile::op(OP, &output, 0, output.bytes());
    let Some(cuda) = output.cuda().cloned() else {
        cpu_normal_noise(output.as_mut_slice()?, seed, stream);
        return Ok(output);
    };
    let kernel = cuda.kernel("noise", OP)?;
    let elements = output.elements();
    let blocks = grid(OP, elements.div_ceil(kernel.info().tile[0] as usize))?;
    let args = Args::new()
        .output(&mut output)?
        .long(elements as u64)
        .long(seed)
        .long(stream);
    // SAFETY: the arguments are those of `normal_noise`; the blocks cover every element of the new f32 tensor.
    unsafe { kernel.launch(&cuda, [blocks, 1, 1], args)? };
    Ok(output)
}

/// Where an item's noise comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoiseOrigin {
    /// The seed.
    pub seed: u64,
    /// The stream of the seed.
    pub stream: u64,
}

/// A batch whose items are each what [`normal_noise`] gives for its own origin: `[origins, item …]` in f32.
///
/// # Errors
/// When the device has no room.
pub fn normal_noise_items(device: &Device, origins: &[NoiseOrigin], item: &[usize]) -> Result<Tensor> {
    const OP: &str = "normal_noise_items";
    let elements: usize = item.iter().product();
    let shape = Shape::from([&[origins.len()], item].concat().as_slice());
    let mut output = Tensor::empty(device, shape, DType::F32)?;
    let Some(cuda) = output.cuda().cloned() else {
        let items = output.as_mut_slice::<f32>()?.chunks_mut(elements.max(1));
        for (output, origin) in items.zip(origins) {
            cpu_normal_noise(output, origin.seed, origin.stream);
        }
        return Ok(output);
    };
    let words: Vec<i32> = origins
        .iter()
        .flat_map(|origin| [words(origin.seed), words(origin.stream)].concat())
        .map(u32::cast_signed)
        .collect();
    let origins = Tensor::from_slice(device, &words, [words.len()])?;
    let kernel = cuda.kernel("noise", OP)?;
    let blocks = grid(OP, elements.div_ceil(kernel.info().tile[0] as usize))?;
    let args = Args::new().output(&mut output)?.input(&origins)?.long(elements as u64);
    // SAFETY: the arguments are those of `normal_noise_items`: an output of `elements` values and four words for each item;
    // the blocks cover every value of one item, and there is one row of them for each.
    unsafe { kernel.launch(&cuda, [blocks, grid(OP, words.len() / 4)?, 1], args)? };
    Ok(output)
}

fn cpu_normal_noise(output: &mut [f32], seed: u64, stream: u64) {
    let key = words(seed);
    let [stream_low, stream_high] = words(stream);
    let blocks = output.par_chunks_mut(ELEMENTS_PER_COUNTER).enumerate();
    blocks.for_each(|(index, output)| {
        let [low, high] = words(index as u64);
        let random = philox4x32([low, high, stream_low, stream_high], key);
        let (first, second) = (normal_pair(random[0], random[1]), normal_pair(random[2], random[3]));
        let normals = [first.0, first.1, second.0, second.1];
        output.copy_from_slice(&normals[..output.len()]);
    });
}

/// Low and high word.
fn words(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

/// Ten rounds of Philox 4×32.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
    const KEY_STEPS: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
    for _ in 0..10 {
        let [low0, high0] = words(u64::from(MULTIPLIERS[0]) * u64::from(counter[0]));
        let [low1, high1] = words(u64::from(MULTIPLIERS[1]) * u64::from(counter[2]));
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    counter
}

/// Two independent normal numbers from two random words.
fn normal_pair(radius_word: u32, angle_word: u32) -> (f32, f32) {
    const UNIT: f32 = 1.0 / 4_294_967_296.0;
    let uniform = radius_word as f32 * UNIT + 0.5 * UNIT;
    let radius = (-2.0 * natural_logarithm(uniform)).sqrt();
    let (cos, sin) = cos_sin_of_turn(angle_word);
    (radius * cos, radius * sin)
}

/// `ln(x)` for a positive normal `x`, by `x = 2^e · (1 + f)` with 1 + f in [√½, √2).
fn natural_logarithm(x: f32) -> f32 {
    const SQRT_HALF_BITS: u32 = 0x3f35_04f3;
    /// Of (ln(1 + f) − f + f²/2) / f³, lowest power first.
    const COEFFICIENTS: [f32; 9] = [
        0.333_333_3,
        -0.249_999_8,
        0.200_006_89,
        -0.166_691_51,
        0.142_511_56,
        -0.123_967,
        0.116_346_61,
        -0.116_599_336,
        0.073_325_39,
    ];
    /// ln 2 in two parts; a product of the first with a small integer is exact.
    const LN_2: [f32; 2] = [0.693_145_75, 1.428_606_8e-6];
    let bits = x.to_bits();
    let exponent = (bits.wrapping_sub(SQRT_HALF_BITS) as i32) >> 23;
    let f = f32::from_bits(bits.wrapping_sub((exponent << 23) as u32)) - 1.0;
    let exponent = exponent as f32;
    let square = f * f;
    let tail = horner(&COEFFICIENTS, f) * f * square - 0.5 * square + exponent * LN_2[1];
    tail + f + exponent * LN_2[0]
}

/// Cosine and sine of 2π·word/2³², by the angle's distance from the nearest quarter of a turn.
fn cos_sin_of_turn(word: u32) -> (f32, f32) {
    /// Of cos(π/2·t) and of sin(π/2·t)/t in powers of t², lowest first, for |t| ≤ ½.
    const COS: [f32; 5] = [1.0, -1.233_700_5, 0.253_669_2, -0.020_860_072, 0.000_903_631_7];
    const SIN: [f32; 5] = [
        1.570_796_4,
        -0.645_964_1,
        0.079_692_58,
        -0.004_681_266_4,
        0.000_158_206_75,
    ];
    const QUARTER: f32 = 1.0 / 1_073_741_824.0;
    let quarter = word.wrapping_add(1 << 29) >> 30;
    let t = word.wrapping_sub(quarter << 30) as i32 as f32 * QUARTER;
    let square = t * t;
    let (cos, sin) = (horner(&COS, square), horner(&SIN, square) * t);
    match quarter {
        0 => (cos, sin),
        1 => (-sin, cos),
        2 => (-cos, -sin),
        _ => (sin, -cos),
    }
}

/// The polynomial with these coefficients, lowest power first; each step is one multiplication and one addition.
fn horner(coefficients: &[f32], x: f32) -> f32 {
    coefficients
        .iter()
        .rev()
        .fold(0.0, |value, coefficient| value * x + coefficient)
}
