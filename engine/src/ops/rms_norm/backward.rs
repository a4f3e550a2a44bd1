//! Gradients of the RMS normalisations; the formulas are in the parent's head comment.

mod residual;

use super::{GatedResidual, RmsNorm, RowLaunch, inverse_rms};
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::modulation::{VectorGradient, ensure_gradient_table};
use crate::ops::sum_rows::{cpu_add, cpu_row_sums, cuda_add_partial_sums};
use crate::ops::{Modulation, TokenSizes, grid};
use crate::tensor::Tensor;

use rayon::prelude::*;

pub use residual::{ResidualNormGradients, gated_residual_rms_norm_backward};

/// Where the gradients of a normalisation's parameters go.
#[derive(Debug, Default)]
pub struct NormGradients<'a> {
    /// `[dim]`, added to; `None` for a frozen weight.
    pub weight: Option<&'a mut Tensor>,
    /// Of the scale or gate, overwritten; `None` where nobody needs them.
    pub vector: Option<VectorGradient<'a>>,
}

/// The gradient of `x` in [`super::rms_norm_modulate`] for the gradient `dy` of its result, plus `residual`, the gradient that
/// reaches `x` past the normalisation.
///
/// # Errors
/// When shapes, types or devices do not fit; on CUDA also for rows of more than 4096 elements.
pub fn rms_norm_modulate_backward(
    dy: &Tensor,
    x: &Tensor,
    norm: &RmsNorm<'_>,
    residual: Option<&Tensor>,
    gradients: NormGradients<'_>,
) -> Result<Tensor> {
    let branch = Branch {
        op: "rms_norm_modulate_backward",
        weight: norm.weight,
        vectors: norm.scale.as_ref(),
        gated: false,
        epsilon: norm.epsilon,
    };
    branch.backward(dy, x, residual, gradients)
}

/// The gradient of `y` in [`super::gated_residual_rms_norm`] without a next normalisation, for the gradient `d_sum` of the sum,
/// which is also that of `x`.
///
/// # Errors
/// As for [`rms_norm_modulate_backward`].
pub fn gated_residual_backward(
    d_sum: &Tensor,
    y: &Tensor,
    residual: &GatedResidual<'_>,
    gradients: NormGradients<'_>,
) -> Result<Tensor> {
    Branch::of("gated_residual_backward", residual).backward(d_sum, y, None, gradients)
}

const IMAGE: &str = "rms_norm_backward";

/// A normalisation and what multiplies its result: `weight · (1 + vector)`, or `weight · tanh(vector)` when gated.
struct Branch<'a> {
    op: &'static str,
    weight: &'a Tensor,
    vectors: Option<&'a Modulation<'a>>,
    gated: bool,
    epsilon: f32,
}

impl<'a> Branch<'a> {
    fn of(op: &'static str, residual: &'a GatedResidual<'a>) -> Self {
        Branch {
            op,
            weight: residual.weight,
            vectors: residual.gate.as_ref(),
            gated: true,
            epsilon: residual.epsilon,
        }
    }

    fn stride(&self) -> usize {
        self.vectors.map_or(0, Modulation::stride)
    }

    fn ensure_parameters(&self, x: &Tensor, sizes: TokenSizes) -> Result<()> {
        crate::ops::ensure_parameter(self.op, "weight", self.weight, &[sizes.dim], x)?;
        match self.vectors {
            Some(vectors) => vectors.expect(self.op, "vectors", sizes.batch, sizes.dim, x),
            None => Ok(()),
        }
    }

    fn ensure_weight_gradient(&self, gradient: Option<&Tensor>, sizes: TokenSizes, x: &Tensor) -> Result<()> {
        match gradient {
            Some(gradient) => crate::ops::ensure_parameter(self.op, "weight gradient", gradient, &[sizes.dim], x),
            None => Ok(()),
        }
    }

    /// Gradients of vectors are per item, so there must be vectors, one per item.
    fn ensure_vectors(&self, sizes: TokenSizes) -> Result<()> {
        match self.vectors {
            Some(vectors) if vectors.items() == sizes.batch => Ok(()),
            Some(vectors) => Err(Error::invalid(format!(
                "{}: gradients of vectors are per item, but {} vectors serve {} items",
                self.op,
                vectors.items(),
                sizes.batch
            ))),
            None => Err(Error::invalid(format!(
                "{}: there are no vectors to differentiate",
                self.op
            ))),
        }
    }

    fn backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        residual: Option<&Tensor>,
        gradients: NormGradients<'_>,
    ) -> Result<Tensor> {
        let sizes = TokenSizes::of(self.op, "x", x)?;
        ensure_like(self.op, "dy", dy, x)?;
        if let Some(residual) = residual {
            ensure_like(self.op, "residual", residual, x)?;
        }
        self.ensure_parameters(x, sizes)?;
        self.ensure_weight_gradient(gradients.weight.as_deref(), sizes, x)?;
        if let Some(vector) = &gradients.vector {
            ensure_gradient_table(self.op, vector.table, &[vector.index], [sizes.batch, sizes.dim], x)?;
            self.ensure_vectors(sizes)?;
        }
        let mut dx = Tensor::empty(&x.device(), x.shape(), x.dtype())?;
        match x.cuda() {
            None => {
                self.cpu_input(dy, x, residual, sizes, &mut dx)?;
                self.cpu_parameters(dy, x, sizes, gradients)?;
            }
            Some(device) => self.cuda_backward(device, [dy, x], residual, sizes, &mut dx, gradients)?,
        }
        Ok(dx)
    }

    /// What multiplies the normalised rows of one item.
    fn factor(&self, item: usize) -> Result<Vec<f32>> {
        let weight = self.weight.as_slice::<f32>()?;
        let Some(vectors) = self.vectors else {
            return Ok(weight.to_vec());
        };
        let products = weight.iter().zip(vectors.row(item)?);
        Ok(products.map(|(weight, vector)| weight * self.opened(*vector)).collect())
    }

    fn opened(&self, vector: f32) -> f32 {
        if self.gated { vector.tanh() } else { 1.0 + vector }
    }

    fn cpu_input(
        &self,
        dy: &Tensor,
        x: &Tensor,
        residual: Option<&Tensor>,
        sizes: TokenSizes,
        dx: &mut Tensor,
    ) -> Result<()> {
        if sizes.dim == 0 {
            return Ok(());
        }
        let factors: Vec<Vec<f32>> = (0..sizes.batch).map(|item| self.factor(item)).collect::<Result<_>>()?;
        let residual = residual.map(Tensor::as_slice::<f32>).transpose()?;
        let (dy, x) = (dy.as_slice::<f32>()?, x.as_slice::<f32>()?);
        let rows = dx.as_mut_slice::<f32>()?.par_chunks_mut(sizes.dim).enumerate();
        rows.for_each(|(row, dx)| {
            let range = row * sizes.dim..(row + 1) * sizes.dim;
            let (dy, x, factor) = (&dy[range.clone()], &x[range.clone()], &factors[row / sizes.tokens]);
            let inverse = inverse_rms(x, self.epsilon);
            let along: f32 = dy
                .iter()
                .zip(factor)
                .zip(x)
                .map(|((dy, factor), x)| dy * factor * x)
                .sum();
            let share = along * inverse * inverse / sizes.dim as f32;
            for (((dx, dy), factor), x) in dx.iter_mut().zip(dy).zip(factor).zip(x) {
                *dx = inverse * (dy * factor - x * share);
            }
            if let Some(residual) = residual {
                dx.iter_mut()
                    .zip(&residual[range])
                    .for_each(|(dx, passing)| *dx += passing);
            }
        });
        Ok(())
    }

    fn cpu_parameters(&self, dy: &Tensor, x: &Tensor, sizes: TokenSizes, gradients: NormGradients<'_>) -> Result<()> {
        let NormGradients { mut weight, mut vector } = gradients;
        if weight.is_none() && vector.is_none() {
            return Ok(());
        }
        let (dy, x) = (dy.as_slice::<f32>()?, x.as_slice::<f32>()?);
        for item in 0..sizes.batch {
            let sums = cpu_row_sums(
                item * sizes.tokens..(item + 1) * sizes.tokens,
                sizes.dim,
                |row, sums| {
                    let range = row * sizes.dim..(row + 1) * sizes.dim;
                    let (dy, x) = (&dy[range.clone()], &x[range]);
                    let inverse = inverse_rms(x, self.epsilon);
                    for ((sum, dy), x) in sums.iter_mut().zip(dy).zip(x) {
                        *sum += dy * (x * inverse);
                    }
                },
            );
            let vectors = self.vectors.map(|vectors| vectors.row(item)).transpose()?;
            if let Some(VectorGradient { table, index }) = &mut vector {
                let own = self.weight.as_slice::<f32>()?;
                let start = (item * table.dim(1) + *index) * sizes.dim;
                let target = &mut table.as_mut_slice::<f32>()?[start..start + sizes.dim];
                for (channel, target) in target.iter_mut().enumerate() {
                    let slope = match (self.gated, vectors) {
                        (true, Some(vectors)) => 1.0 - vectors[channel].tanh().powi(2),
                        _ => 1.0,
                    };
                    *target = own[channel] * slope * sums[channel];
                }
            }
            if let Some(weight) = &mut weight {
                let opened = |channel: usize| vectors.map_or(1.0, |vectors| self.opened(vectors[channel]));
                let sums: Vec<f32> = sums
                    .iter()
                    .enumerate()
                    .map(|(channel, sum)| opened(channel) * sum)
                    .collect();
                cpu_add(weight, &sums)?;
            }
        }
        Ok(())
    }

    fn cuda_backward(
        &self,
        device: &CudaDevice,
        [dy, x]: [&Tensor; 2],
        residual: Option<&Tensor>,
        sizes: TokenSizes,
        dx: &mut Tensor,
        gradients: NormGradients<'_>,
    ) -> Result<()> {
        const KERNELS: [&str; 2] = ["rms_norm_backward_1", "rms_norm_backward_2"];
        let launch = RowLaunch::new(self.op, device, IMAGE, &KERNELS, sizes)?;
        let needed = gradients.weight.is_some() || gradients.vector.is_some();
        let partial = [sizes.batch, launch.grid[0] as usize, sizes.dim];
        let mut partial = needed
            .then(|| Tensor::empty(&x.device(), partial, DType::F32))
            .transpose()?;
        let args = Args::new()
            .input(dy)?
            .input(x)?
            .input(self.weight)?
            .long(Modulation::address_or_null(self.vectors)?)
            .optional(residual)?
            .output(dx)?
            .optional_output(partial.as_mut())?
            .int(sizes.dim)
            .int(sizes.tokens)
            .int(self.stride())
            .int(usize::from(self.gated))
            .float(self.epsilon);
        // SAFETY: the arguments are those of `rms_norm_backward_N`, of the shapes and types checked at the door; the threads
        // hold a whole row, there are at most as many blocks as tokens, and null pointers stand for what is absent.
        unsafe { launch.kernel.launch_with(device, launch.grid, launch.threads, args)? };
        match partial {
            Some(partial) => finish_sums(
                self.op,
                device,
                &partial,
                Some(self.weight),
                self.vectors,
                self.gated,
                gradients,
            ),
            None => Ok(()),
        }
    }
}

/// Makes the parameters' gradients of a norm from its sums `partial` f32 `[batch, blocks, dim]`, as `norm_item_sums` of
/// `kernels/cuda/rms_norm_backward.cu` says; the caller has checked what `gradients` hold.
pub(in crate::ops) fn finish_sums(
    op: &'static str,
    device: &CudaDevice,
    partial: &Tensor,
    weight: Option<&Tensor>,
    vectors: Option<&Modulation<'_>>,
    gated: bool,
    gradients: NormGradients<'_>,
) -> Result<()> {
    let [batch, blocks, dim] = [partial.dim(0), partial.dim(1), partial.dim(2)];
    let kernel = device.kernel(IMAGE, "norm_item_sums")?;
    let NormGradients {
        weight: weight_gradient,
        vector,
    } = gradients;
    let mut weight_sums = weight_gradient
        .is_some()
        .then(|| Tensor::empty(&partial.device(), [batch, dim], DType::F32))
        .transpose()?;
    let (address, stride) = match vector {
        Some(VectorGradient { table, index }) => {
            let start = table.device_ptr_mut()? + (index * dim * DType::F32.size()) as u64;
            (start, table.dim(1) * dim)
        }
        None => (0, 0),
    };
    let args = Args::new()
        .input(partial)?
        .optional(weight)?
        .long(Modulation::address_or_null(vectors)?)
        .long(address)
        .optional_output(weight_sums.as_mut())?
        .int(blocks)
        .int(dim)
        .int(vectors.map_or(0, Modulation::stride))
        .int(stride)
        .int(usize::from(gated));
    let tiles = dim.div_ceil(kernel.info().tile[0] as usize);
    // SAFETY: the arguments are those of `norm_item_sums`; the caller has checked weight, vectors and gradient table against
    // the batch and width of the sums; null pointers stand for what is absent.
    unsafe { kernel.launch(device, [grid(op, tiles)?, grid(op, batch)?, 1], args)? };
    match (weight_gradient, weight_sums) {
        (Some(gradient), Some(sums)) => cuda_add_partial_sums(op, device, &sums, gradient),
        _ => Ok(()),
    }
}

fn ensure_like(op: &'static str, name: &str, tensor: &Tensor, x: &Tensor) -> Result<()> {
    tensor.ensure_shape(op, name, x.shape())?;
    tensor.ensure_dtype(op, name, x.dtype())?;
    tensor.ensure_device(op, name, &x.device())
}
