//! Weights that are NaN or infinite: looked for in all of a checkpoint's tensors, those of eight bits as they are decoded, by all threads, at the speed of
//! memory or of the disk, whichever is slower.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use serde::Serialize;

use super::elements::Float;
use super::set::Checkpoint;
use super::stored::CheckpointTensor;
use super::write::WriteObserver;
use crate::error::Result;
use crate::printable::shown_name;

/// Bytes that one task reads.
const TASK_BYTES: usize = 1 << 20;

/// Bytes between two reports of progress.
const REPORT_BYTES: usize = 64 << 20;

/// The weights of a checkpoint that are no numbers to compute with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotFinite {
    /// The file of the first tensor that holds some.
    pub path: PathBuf,
    /// That tensor's name in the file.
    pub tensor: String,
    /// How many of its elements are NaN or infinite.
    pub elements: u64,
    /// How many elements it has.
    pub of: u64,
    /// How many tensors hold some.
    pub tensors: usize,
    /// How many elements of all tensors are NaN or infinite.
    pub total: u64,
}

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "tensor `{}` holds NaN or infinity in {} of {} elements",
            shown_name(&self.tensor),
            self.elements,
            self.of
        )?;
        match self.tensors - 1 {
            0 => Ok(()),
            1 => write!(f, ", and so does another tensor"),
            more => write!(f, ", and so do {more} other tensors"),
        }
    }
}

impl Checkpoint {
    /// What is not finite in the tensors, in the order of their names; reads all of them. Types that cannot be computed with are
    /// left out.
    ///
    /// # Errors
    /// When a file cannot be read, or `observer` stops.
    pub fn first_not_finite(&self, observer: &mut dyn WriteObserver) -> Result<Option<NotFinite>> {
        let floats = || {
            let tensors = self.tensors().values();
            tensors.filter_map(|tensor| Some((tensor, tensor.float().ok()?)))
        };
        let bytes = |(tensor, float): (&CheckpointTensor, Float)| (tensor.elements() * float.size()) as u64;
        observer.begin(floats().map(bytes).sum());
        let mut found: Option<NotFinite> = None;
        for (tensor, float) in floats() {
            let elements = count(tensor, float, observer)?;
            if elements == 0 {
                continue;
            }
            let found = found.get_or_insert_with(|| NotFinite {
                path: tensor.path().into(),
                tensor: tensor.stored_name().into(),
                elements,
                of: tensor.elements() as u64,
                tensors: 0,
                total: 0,
            });
            found.tensors += 1;
            found.total += elements;
        }
        Ok(found)
    }
}

/// How many elements of `tensor` are not finite.
fn count(tensor: &CheckpointTensor, float: Float, observer: &mut dyn WriteObserver) -> Result<u64> {
    tensor.read_ahead();
    let found = AtomicU64::new(0);
    let bytes = tensor.elements() * float.size();
    for first in (0..bytes).step_by(REPORT_BYTES) {
        let part = REPORT_BYTES.min(bytes - first);
        let tasks = (0..part.div_ceil(TASK_BYTES)).into_par_iter();
        tasks.try_for_each_init(Vec::new, |buffer, task| {
            let start = task * TASK_BYTES;
            buffer.resize(TASK_BYTES.min(part - start), 0);
            tensor.read_numbers(first + start, buffer)?;
            found.fetch_add(count_in(buffer, float), Ordering::Relaxed);
            Ok(())
        })?;
        observer.advance(part as u64)?;
    }
    Ok(found.into_inner())
}

/// How many elements in `bytes` have an exponent of ones alone.
fn count_in(bytes: &[u8], float: Float) -> u64 {
    /// Elements whose count fits the narrow type that makes the loop fast.
    const BLOCK: usize = 1 << 12;
    let halves = |exponent: u16| {
        let blocks = bytes.as_chunks::<2>().0.chunks(BLOCK);
        let count = |block: &[[u8; 2]]| {
            let bad = |element: &[u8; 2]| u16::from(u16::from_le_bytes(*element) & exponent == exponent);
            block.iter().map(bad).sum::<u16>()
        };
        blocks.map(|block| u64::from(count(block))).sum()
    };
    match float {
        Float::Bf16 => halves(0x7f80),
        Float::F16 => halves(0x7c00),
        Float::F32 => {
            const EXPONENT: u32 = 0x7f80_0000;
            let blocks = bytes.as_chunks::<4>().0.chunks(BLOCK);
            let count = |block: &[[u8; 4]]| {
                let bad = |element: &[u8; 4]| u32::from(u32::from_le_bytes(*element) & EXPONENT == EXPONENT);
                block.iter().map(bad).sum::<u32>()
            };
            blocks.map(|block| u64::from(count(block))).sum()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::elements::encode;
    use super::*;

    #[test]
    fn infinities_and_nan_are_counted_in_every_type() {
        let mut values = vec![1.5f32; 10_001];
        for (index, value) in [(0, f32::NAN), (4096, f32::INFINITY), (10_000, f32::NEG_INFINITY)] {
            values[index] = value;
        }
        values[5] = 65504.0;
        for float in [Float::Bf16, Float::F16, Float::F32] {
            let mut bytes = vec![0; values.len() * float.size()];
            encode(&values, &mut bytes, float);
            assert_eq!(count_in(&bytes, float), 3, "{float:?}");
            assert_eq!(count_in(&bytes[float.size()..float.size() * 4096], float), 0);
            let all = vec![0xff; 3 * 4096 * float.size()];
            assert_eq!(count_in(&all, float), 3 * 4096);
        }
    }
}
