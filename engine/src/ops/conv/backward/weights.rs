//! The gradient of a convolution's weight: the product, over all pixels, of the sum's gradient and the neighbourhoods.

use rayon::prelude::*;

use super::super::cpu::{BAND_VALUES, gather_row, sources};
use super::Gradient;
use crate::error::Result;
use crate::ops::linear::{Matrix, cpu_matmul};
use crate::tensor::Tensor;

impl Gradient<'_> {
    /// Adds the weight's gradient.
    pub(super) fn add_weight_gradient(&self, ds: &Tensor, weight: &mut Tensor) -> Result<()> {
        if self.pixels() == 0 {
            return Ok(());
        }
        let (conv, sizes) = (self.call.conv, self.sizes);
        let depth = conv.kernel * conv.kernel * conv.inputs();
        let (row_depth, row_outputs) = (sizes.width * depth, sizes.width * sizes.outputs);
        let band_rows = (BAND_VALUES / row_depth).clamp(1, sizes.batch * sizes.height);
        let mut neighbourhoods = vec![0.0; band_rows * row_depth];
        let sources = sources(&self.call, sizes)?;
        let weight = weight.as_mut_slice::<f32>()?;
        for (band, ds) in ds.as_slice::<f32>()?.chunks(band_rows * row_outputs).enumerate() {
            let rows = ds.len() / row_outputs;
            let neighbourhoods = &mut neighbourhoods[..rows * row_depth];
            let by_row = neighbourhoods.par_chunks_mut(row_depth).enumerate();
            by_row.for_each(|(row, values)| gather_row(conv.kernel, sizes, &sources, band * band_rows + row, values));
            let ds = Matrix {
                values: ds,
                row_stride: 1,
                column_stride: sizes.outputs,
            };
            let neighbourhoods = Matrix {
                values: neighbourhoods,
                row_stride: depth,
                column_stride: 1,
            };
            cpu_matmul(
                [sizes.outputs, rows * sizes.width, depth],
                ds,
                neighbourhoods,
                true,
                weight,
            );
        }
        Ok(())
    }
}
