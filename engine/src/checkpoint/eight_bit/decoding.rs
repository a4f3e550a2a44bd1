//! How the bytes of one tensor become numbers: what its codes stand for, times a scale, rotated back.

use rayon::prelude::*;
use serde::Serialize;

use super::rotation::rotate;
use crate::checkpoint::elements::{Float, encode};
use crate::codes::Code;
use crate::error::Result;

/// Elements that one task decodes, in whole groups of any rotation.
const TASK_ELEMENTS: usize = 1 << 16;

/// The names by which files call the scales of a layer's weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleName {
    /// `NAME.weight_scale`.
    WeightScale,
    /// `NAME.scale_weight`.
    ScaleWeight,
}

impl ScaleName {
    /// The end of the tensor's name.
    pub fn end(self) -> &'static str {
        match self {
            ScaleName::WeightScale => "weight_scale",
            ScaleName::ScaleWeight => "scale_weight",
        }
    }
}

/// How a tensor's bytes become numbers; see the module's head comment.
#[derive(Clone, Debug)]
pub struct Decoding {
    /// The type of its elements.
    pub code: Code,
    /// What its scales are called, where it has some.
    pub scale: Option<ScaleName>,
    /// One for all elements, or one for each row; finite and above zero.
    pub scales: Vec<f32>,
    /// Elements of a row.
    pub row: usize,
    /// Inputs that are rotated together.
    pub rotation: Option<usize>,
    /// What a scale of the layer's inputs is called, which only those need who compute with eight bits.
    pub input_scale: Option<&'static str>,
}

impl Decoding {
    /// That of a tensor whose codes are its numbers.
    pub fn plain(code: Code, row: usize) -> Self {
        Decoding {
            code,
            scale: None,
            scales: vec![1.0],
            row,
            rotation: None,
            input_scale: None,
        }
    }

    /// Whether each row has a scale of its own.
    pub fn is_by_row(&self) -> bool {
        self.scales.len() > 1
    }

    /// The same for some rows of the tensor.
    pub fn rows(&self, rows: std::ops::Range<usize>) -> Self {
        let mut part = self.clone();
        if self.is_by_row() {
            part.scales = self.scales[rows].to_vec();
        }
        part
    }

    /// Fills `target` with the elements from `first` on as f32, little-endian; `read` gives bytes from one of the tensor's on. Large
    /// pieces are decoded by all threads.
    ///
    /// # Errors
    /// When `read` fails.
    pub fn read(
        &self,
        first: usize,
        target: &mut [u8],
        read: &(dyn Fn(usize, &mut [u8]) -> Result<()> + Sync),
    ) -> Result<()> {
        let size = Float::F32.size();
        let one = |buffers: &mut (Vec<u8>, Vec<f32>), first: usize, target: &mut [u8]| {
            let (bytes, values) = buffers;
            let count = target.len() / size;
            // Whole groups, of which all numbers are needed for any.
            let group = self.rotation.unwrap_or(1);
            let start = first / group * group;
            let length = (first + count).next_multiple_of(group) - start;
            bytes.resize(length, 0);
            values.resize(length, 0.0);
            read(start, bytes)?;
            self.decode(start, bytes, values);
            encode(&values[first - start..][..count], target, Float::F32);
            Ok(())
        };
        if target.len() <= TASK_ELEMENTS * size {
            return one(&mut Default::default(), first, target);
        }
        let tasks = target.par_chunks_mut(TASK_ELEMENTS * size).enumerate();
        tasks.try_for_each_init(Default::default, |buffers, (task, target)| {
            one(buffers, first + task * TASK_ELEMENTS, target)
        })
    }

    /// Decodes the elements from `start` on, which are whole groups where there is a rotation.
    fn decode(&self, start: usize, bytes: &[u8], values: &mut [f32]) {
        let numbers = self.code.numbers();
        let mut at = 0;
        while at < bytes.len() {
            let (row, column) = ((start + at) / self.row, (start + at) % self.row);
            let end = bytes.len().min(at + self.row - column);
            let scale = self.scales[if self.is_by_row() { row } else { 0 }];
            for (value, byte) in values[at..end].iter_mut().zip(&bytes[at..end]) {
                *value = numbers[usize::from(*byte)] * scale;
            }
            at = end;
        }
        if let Some(group) = self.rotation {
            rotate(values, group);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_is_the_same_as_that_of_the_whole() {
        let (rows, row) = (300, 512);
        let bytes: Vec<u8> = (0..rows * row).map(|i| (i * 7 % 251) as u8).collect();
        for (rotation, scales) in [
            (None, vec![0.5]),
            (Some(256), (0..rows).map(|row| 1.0 + row as f32).collect()),
            (Some(16), vec![2.0]),
        ] {
            let decoding = Decoding {
                scale: Some(ScaleName::WeightScale),
                scales,
                rotation,
                ..Decoding::plain(Code::Int8, row)
            };
            let read = |first: usize, target: &mut [u8]| {
                target.copy_from_slice(&bytes[first..first + target.len()]);
                Ok(())
            };
            let decoded = |first: usize, count: usize| {
                let mut target = vec![0; 4 * count];
                decoding.read(first, &mut target, &read).unwrap();
                target
            };
            let whole = decoded(0, rows * row);
            for (first, count) in [(0, 1), (3, 700), (511, 2), (row * 200 + 5, 1), (255, TASK_ELEMENTS + 3)] {
                assert_eq!(
                    decoded(first, count),
                    whole[4 * first..][..4 * count],
                    "{first} {count}"
                );
            }
            let mut expected: Vec<f32> = (0..row)
                .map(|i| f32::from(bytes[7 * row + i] as i8) * decoding.rows(7..8).scales[0])
                .collect();
            if let Some(group) = rotation {
                rotate(&mut expected, group);
            }
            let mut found = vec![0; 4 * row];
            encode(&expected, &mut found, Float::F32);
            assert_eq!(found, whole[4 * 7 * row..][..4 * row]);
        }
    }
}
