//! Conversion between the element types of files and of devices: bf16, f16 and f32, little-endian, of any alignment.
//!
//! Widening is exact; narrowing rounds to nearest, ties to even. Large pieces are converted by all threads, so that a load
//! runs near the speed of memory.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use safetensors::Dtype;

use crate::dtype::DType;
use crate::error::Result;

/// Elements that one task converts; its source and target together fit a second-level cache.
const TASK_ELEMENTS: usize = 1 << 16;

/// Elements between decoding and encoding, in a buffer that stays in the first-level cache.
const BLOCK_ELEMENTS: usize = 1 << 10;

/// One of the element types that can be converted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float {
    /// bfloat16.
    Bf16,
    /// IEEE 754 binary16.
    F16,
    /// IEEE 754 binary32.
    F32,
}

impl Float {
    /// The type as which a file's `dtype` can be read, `None` for integers and the like.
    pub fn stored(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::BF16 => Some(Float::Bf16),
            Dtype::F16 => Some(Float::F16),
            Dtype::F32 => Some(Float::F32),
            _ => None,
        }
    }

    /// The type of a tensor in a device's compute type.
    pub(crate) fn computed(dtype: DType) -> Self {
        match dtype {
            DType::Bf16 => Float::Bf16,
            _ => Float::F32,
        }
    }

    /// The name in a file's header.
    pub fn dtype(self) -> Dtype {
        match self {
            Float::Bf16 => Dtype::BF16,
            Float::F16 => Dtype::F16,
            Float::F32 => Dtype::F32,
        }
    }

    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Float::Bf16 | Float::F16 => 2,
            Float::F32 => 4,
        }
    }

    /// Reads the element at the start of `bytes`.
    pub(crate) fn read(self, bytes: &[u8]) -> f32 {
        match self {
            Float::Bf16 => widen_bf16([bytes[0], bytes[1]]),
            Float::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            Float::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        }
    }
}

/// Converts all elements of `source` into `target`, which must hold as many; all threads share the work.
pub(crate) fn convert(source: &[u8], from: Float, target: &mut [u8], to: Float) {
    debug_assert_eq!(source.len() / from.size(), target.len() / to.size());
    target
        .par_chunks_mut(TASK_ELEMENTS * to.size())
        .zip(source.par_chunks(TASK_ELEMENTS * from.size()))
        .for_each(|(target, source)| convert_here(source, from, target, to));
}

/// [`convert`] on this thread.
fn convert_here(source: &[u8], from: Float, target: &mut [u8], to: Float) {
    match (from, to) {
        _ if from == to => target.copy_from_slice(source),
        (Float::Bf16, Float::F32) => {
            for (target, source) in target.as_chunks_mut::<4>().0.iter_mut().zip(source.as_chunks::<2>().0) {
                *target = widen_bf16(*source).to_le_bytes();
            }
        }
        _ => {
            let targets = target.chunks_mut(BLOCK_ELEMENTS * to.size());
            for (target, source) in targets.zip(source.chunks(BLOCK_ELEMENTS * from.size())) {
                let mut block = [0.0; BLOCK_ELEMENTS];
                let block = &mut block[..source.len() / from.size()];
                decode(source, from, block);
                encode(block, target, to);
            }
        }
    }
}

/// Fills `target` with elements of type `to` that `read(first_byte, bytes)` gives in type `from`; all threads share the work.
/// What needs no conversion is read to where it belongs; the rest passes through a buffer that stays in the second-level cache.
///
/// # Errors
/// When `read` fails.
pub(crate) fn read_converted(
    read: &(dyn Fn(usize, &mut [u8]) -> Result<()> + Sync),
    from: Float,
    target: &mut [u8],
    to: Float,
) -> Result<()> {
    let one = |buffer: &mut Vec<u8>, task: usize, target: &mut [u8]| {
        let first = task * TASK_ELEMENTS * from.size();
        if from == to {
            return read(first, target);
        }
        buffer.resize(target.len() / to.size() * from.size(), 0);
        read(first, buffer)?;
        convert_here(buffer, from, target, to);
        Ok(())
    };
    if target.len() <= TASK_ELEMENTS * to.size() {
        return one(&mut Vec::new(), 0, target);
    }
    let tasks = target.par_chunks_mut(TASK_ELEMENTS * to.size()).enumerate();
    tasks.try_for_each_init(Vec::new, |buffer, (task, target)| one(buffer, task, target))
}

/// Writes `values` into `target` as elements of type `to`.
pub(crate) fn encode(values: &[f32], target: &mut [u8], to: Float) {
    match to {
        Float::F32 => {
            for (target, value) in target.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *target = value.to_le_bytes();
            }
        }
        Float::Bf16 => {
            for (target, value) in target.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *target = narrow_bf16(*value).to_le_bytes();
            }
        }
        Float::F16 => {
            let mut narrowed = [f16::ZERO; BLOCK_ELEMENTS];
            let targets = target.chunks_mut(2 * BLOCK_ELEMENTS);
            for (target, values) in targets.zip(values.chunks(BLOCK_ELEMENTS)) {
                let narrowed = &mut narrowed[..values.len()];
                narrowed.convert_from_f32_slice(values);
                for (target, value) in target.as_chunks_mut::<2>().0.iter_mut().zip(narrowed.iter()) {
                    *target = value.to_le_bytes();
                }
            }
        }
    }
}

/// Reads elements of type `from`, at most [`BLOCK_ELEMENTS`] of them.
fn decode(source: &[u8], from: Float, values: &mut [f32]) {
    match from {
        Float::F32 => {
            for (value, source) in values.iter_mut().zip(source.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*source);
            }
        }
        Float::Bf16 => {
            for (value, source) in values.iter_mut().zip(source.as_chunks::<2>().0) {
                *value = widen_bf16(*source);
            }
        }
        Float::F16 => {
            let mut narrow = [f16::ZERO; BLOCK_ELEMENTS];
            let narrow = &mut narrow[..values.len()];
            for (narrow, source) in narrow.iter_mut().zip(source.as_chunks::<2>().0) {
                *narrow = f16::from_le_bytes(*source);
            }
            narrow.convert_to_f32_slice(values);
        }
    }
}

fn widen_bf16(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

/// To nearest, ties to even; without a branch, so that the loop around it becomes vector code.
fn narrow_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    // A NaN's payload could round away; it is kept quiet instead.
    let nan = (bits >> 16) as u16 | 0x40;
    if value.is_nan() { nan } else { rounded }
}

/// The first element that is finite in type `from` and not so in type `to`, which holds less.
pub(crate) fn first_overflow(source: &[u8], from: Float, to: Float) -> Option<f32> {
    if to != Float::F16 || from == Float::F16 {
        return None;
    }
    let overflows = |value: &f32| value.is_finite() && f16::from_f32(*value).is_infinite();
    source.par_chunks(TASK_ELEMENTS * from.size()).find_map_first(|source| {
        source
            .chunks_exact(from.size())
            .map(|bytes| from.read(bytes))
            .find(overflows)
    })
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn bytes(values: &[f32], float: Float) -> Vec<u8> {
        values
            .iter()
            .flat_map(|&value| match float {
                Float::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
                Float::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
                Float::F32 => value.to_le_bytes().to_vec(),
            })
            .collect()
    }

    /// Values of all magnitudes, ties, subnormals, infinities and NaN; more than one task's worth, and no round number.
    fn values() -> Vec<f32> {
        let special = [
            0.0,
            -0.0,
            1.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            1.003_906_3,
            1.011_718_8,
            6e-8,
            65504.0,
        ];
        let mut values = special.to_vec();
        let mut bits = 1u32;
        while values.len() < TASK_ELEMENTS + 3 * BLOCK_ELEMENTS + 7 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            values.push(f32::from_bits(bits));
        }
        values
    }

    #[test]
    fn every_pair_of_types_converts_like_one_value_at_a_time() {
        let values = values();
        for from in [Float::Bf16, Float::F16, Float::F32] {
            let source = bytes(&values, from);
            let decoded: Vec<f32> = source.chunks_exact(from.size()).map(|bytes| from.read(bytes)).collect();
            for to in [Float::Bf16, Float::F16, Float::F32] {
                // One byte of displacement: files promise no alignment.
                let mut shifted = vec![0; source.len() + 1];
                shifted[1..].copy_from_slice(&source);
                let mut target = vec![0; values.len() * to.size() + 1];
                convert(&shifted[1..], from, &mut target[1..], to);
                let expected = bytes(&decoded, to);
                for (index, value) in decoded.iter().enumerate() {
                    let range = index * to.size()..(index + 1) * to.size();
                    let (found, expected) = (&target[1..][range.clone()], &expected[range]);
                    let both_nan = value.is_nan() && to.read(found).is_nan();
                    assert!(
                        found == expected || both_nan,
                        "{from:?} to {to:?}, {value}: {found:x?}, {expected:x?}"
                    );
                }
            }
        }
    }

    #[test]
    fn overflow_to_f16_is_found() {
        let source = bytes(&[1.0, 65519.0, 65520.0], Float::F32);
        assert_eq!(first_overflow(&source, Float::F32, Float::F16), Some(65520.0));
        assert_eq!(first_overflow(&source[..8], Float::F32, Float::F16), None);
        assert_eq!(first_overflow(&source, Float::F32, Float::Bf16), None);
    }
}
