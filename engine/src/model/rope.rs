//! Rotary position tables of diffusion transformers: some axes, interleaved pairs.
//!
//! A head's channels are split over the axes (Z-Image: 32, 48 and 48 of 128; FLUX.2: four times 32); pair `i` of an axis of `d` channels
//! turns by `position · θ^(−2i/d)`. Angles are computed in f64; whether they are rounded to f32 before sine and cosine is the published
//! model's choice.
//! Source: Su et al., "RoFormer" (2021), and the position ids of the Z-Image transformer.

use crate::device::Device;
use crate::error::Result;
use crate::tensor::Tensor;

/// A token's position on the axes.
pub type Position<const AXES: usize = 3> = [usize; AXES];

/// The axes of a rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeAxes<const AXES: usize = 3> {
    /// Base of the frequencies.
    pub theta: f64,
    /// Channels per axis, even; their sum is the head dimension.
    pub dims: [usize; AXES],
    /// Whether angles are rounded to f32.
    pub rounded: bool,
}

impl<const AXES: usize> RopeAxes<AXES> {
    /// Pairs of channels over all axes.
    pub fn pairs(&self) -> usize {
        self.dims.iter().sum::<usize>() / 2
    }

    /// The `(cos, sin)` pairs of positions `0..count` on the axis of `dim` channels.
    fn axis_table(&self, dim: usize, count: usize) -> Vec<f32> {
        let frequencies: Vec<f64> = (0..dim / 2)
            .map(|pair| 1.0 / self.theta.powf(2.0 * pair as f64 / dim as f64))
            .collect();
        let angles =
            (0..count).flat_map(|position| frequencies.iter().map(move |frequency| position as f64 * frequency));
        angles
            .flat_map(|angle| {
                let angle = if self.rounded { f64::from(angle as f32) } else { angle };
                [angle.cos() as f32, angle.sin() as f32]
            })
            .collect()
    }

    /// The table `[items, tokens, pairs, 2]` of `(cos, sin)` in f32 for items of equally many tokens.
    ///
    /// # Errors
    /// When the device has no room, or the items have different lengths.
    pub fn table(&self, device: &Device, items: &[Vec<Position<AXES>>]) -> Result<Tensor> {
        let tokens = items.first().map_or(0, Vec::len);
        // Many tokens share few positions per axis, so sines are taken once per position.
        let axes: [Vec<f32>; AXES] = std::array::from_fn(|axis| {
            let count = items
                .iter()
                .flatten()
                .map(|position| position[axis] + 1)
                .max()
                .unwrap_or(0);
            self.axis_table(self.dims[axis], count)
        });
        let mut table = Vec::with_capacity(items.len() * tokens * self.pairs() * 2);
        for position in items.iter().flatten() {
            for ((&position, &dim), axis) in position.iter().zip(&self.dims).zip(&axes) {
                table.extend_from_slice(&axis[position * dim..(position + 1) * dim]);
            }
        }
        Tensor::from_slice(device, &table, [items.len(), tokens, self.pairs(), 2])
    }
}

/// Positions of caption tokens, pads included: `(1 + i, 0, 0)`.
pub fn caption_positions(padded_length: usize) -> impl Iterator<Item = Position> {
    (0..padded_length).map(|index| [1 + index, 0, 0])
}

/// Positions of a grid of image tokens that follows a caption, row by row, then of its pads, which are all at the origin.
pub fn image_positions(
    caption_padded_length: usize,
    [height, width]: [usize; 2],
    padded_length: usize,
) -> impl Iterator<Item = Position> {
    let grid = (0..height * width).map(move |index| [1 + caption_padded_length, index / width, index % width]);
    grid.chain(std::iter::repeat_n([0, 0, 0], padded_length - height * width))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_follow_the_caption() {
        let positions: Vec<Position> = image_positions(32, [2, 3], 8).collect();
        assert_eq!(positions[4], [33, 1, 1]);
        assert_eq!(positions[6..], [[0, 0, 0], [0, 0, 0]]);
        assert_eq!(
            caption_positions(3).collect::<Vec<_>>(),
            [[1, 0, 0], [2, 0, 0], [3, 0, 0]]
        );
    }

    #[test]
    fn the_first_pair_of_each_axis_turns_by_its_position() {
        let axes = RopeAxes {
            theta: 256.0,
            dims: [32, 48, 48],
            rounded: true,
        };
        let table = axes.table(&Device::Cpu, &[vec![[3, 1, 2]]]).unwrap();
        assert_eq!(*table.shape(), [1, 1, 64, 2]);
        let values = table.as_slice::<f32>().unwrap();
        for (pair, angle) in [(0, 3f32), (16, 1.0), (40, 2.0)] {
            assert!((values[2 * pair] - angle.cos()).abs() < 1e-6);
            assert!((values[2 * pair + 1] - angle.sin()).abs() < 1e-6);
        }
    }
}
