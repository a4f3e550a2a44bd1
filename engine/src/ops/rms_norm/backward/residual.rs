//! The backward pass of a gated residual and the normalisation after it, which share one kernel.

use super::{Branch, IMAGE, NormGradients, ensure_like, finish_sums};
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::modulation::{VectorGradient, ensure_gradient_table};
use crate::ops::rms_norm::{GatedResidual, RmsNorm, RowLaunch, cpu_gated_residual};
use crate::ops::{Modulation, TokenSizes};
use crate::tensor::Tensor;

const OP: &str = "gated_residual_rms_norm_backward";

/// Which of the indices of [`ResidualNormGradients::vectors`] is whose.
const GATE: usize = 0;
const SCALE: usize = 1;

/// Where the gradients of [`gated_residual_rms_norm_backward`]'s parameters go.
#[derive(Debug, Default)]
pub struct ResidualNormGradients<'a> {
    /// Of the branch's weight, `[dim]`, added to.
    pub weight: Option<&'a mut Tensor>,
    /// Of the next normalisation's weight, `[dim]`, added to.
    pub next_weight: Option<&'a mut Tensor>,
    /// A table f32 `[batch, vectors, dim]` and the indices of gate and next scale in it, which are overwritten.
    pub vectors: Option<(&'a mut Tensor, [usize; 2])>,
}

/// The gradients of `x` and `y` in [`super::super::gated_residual_rms_norm`] for those of its results, `d_sum` and `d_normalised`.
///
/// # Errors
/// As for [`rms_norm_modulate_backward`](super::rms_norm_modulate_backward).
pub fn gated_residual_rms_norm_backward(
    d_sum: &Tensor,
    d_normalised: &Tensor,
    [x, y]: [&Tensor; 2],
    residual: &GatedResidual<'_>,
    next: &RmsNorm<'_>,
    gradients: ResidualNormGradients<'_>,
) -> Result<(Tensor, Tensor)> {
    let pair = Pair {
        branch: Branch::of(OP, residual),
        after: Branch {
            op: OP,
            weight: next.weight,
            vectors: next.scale.as_ref(),
            gated: false,
            epsilon: next.epsilon,
        },
        residual,
        x,
        y,
        d_sum,
        d_normalised,
        sizes: TokenSizes::of(OP, "x", x)?,
    };
    pair.ensure_fit(&gradients)?;
    let mut dx = Tensor::empty(&x.device(), x.shape(), x.dtype())?;
    let mut dy = Tensor::empty(&x.device(), x.shape(), x.dtype())?;
    match x.cuda() {
        None => pair.cpu([&mut dx, &mut dy], gradients)?,
        Some(device) => pair.cuda(device, [&mut dx, &mut dy], gradients)?,
    }
    Ok((dx, dy))
}

/// Both operations, their inputs, and the gradients of their results.
struct Pair<'a> {
    /// What normalises and gates `y`.
    branch: Branch<'a>,
    /// What normalises the sum.
    after: Branch<'a>,
    residual: &'a GatedResidual<'a>,
    x: &'a Tensor,
    y: &'a Tensor,
    d_sum: &'a Tensor,
    d_normalised: &'a Tensor,
    sizes: TokenSizes,
}

impl Pair<'_> {
    /// # Errors
    /// When shapes, types or devices do not fit, or the operations' settings do not go together.
    fn ensure_fit(&self, gradients: &ResidualNormGradients<'_>) -> Result<()> {
        let (x, sizes) = (self.x, self.sizes);
        let others = [
            ("y", self.y),
            ("d_sum", self.d_sum),
            ("d_normalised", self.d_normalised),
        ];
        for (name, tensor) in others {
            ensure_like(OP, name, tensor, x)?;
        }
        self.branch.ensure_parameters(x, sizes)?;
        self.after.ensure_parameters(x, sizes)?;
        if self.after.epsilon != self.branch.epsilon {
            return Err(Error::invalid(format!(
                "{OP}: both normalisations must have the same epsilon"
            )));
        }
        self.branch
            .ensure_weight_gradient(gradients.weight.as_deref(), sizes, x)?;
        self.after
            .ensure_weight_gradient(gradients.next_weight.as_deref(), sizes, x)?;
        if let Some((table, indices)) = &gradients.vectors {
            ensure_gradient_table(OP, table, indices, [sizes.batch, sizes.dim], x)?;
            self.branch.ensure_vectors(sizes)?;
            self.after.ensure_vectors(sizes)?;
        }
        Ok(())
    }

    fn cpu(&self, [dx, dy]: [&mut Tensor; 2], gradients: ResidualNormGradients<'_>) -> Result<()> {
        let (x, sizes) = (self.x, self.sizes);
        let ResidualNormGradients {
            weight,
            next_weight,
            mut vectors,
        } = gradients;
        let mut sum = Tensor::empty(&x.device(), x.shape(), x.dtype())?;
        cpu_gated_residual(x, self.y, self.residual, sizes, &mut sum)?;
        self.after
            .cpu_input(self.d_normalised, &sum, Some(self.d_sum), sizes, dx)?;
        self.branch.cpu_input(dx, self.y, None, sizes, dy)?;
        let places = NormGradients {
            weight: next_weight,
            vector: vector(&mut vectors, SCALE),
        };
        self.after.cpu_parameters(self.d_normalised, &sum, sizes, places)?;
        let places = NormGradients {
            weight,
            vector: vector(&mut vectors, GATE),
        };
        self.branch.cpu_parameters(dx, self.y, sizes, places)
    }

    fn cuda(
        &self,
        device: &CudaDevice,
        [dx, dy]: [&mut Tensor; 2],
        gradients: ResidualNormGradients<'_>,
    ) -> Result<()> {
        const KERNELS: [&str; 2] = [
            "gated_residual_rms_norm_backward_1",
            "gated_residual_rms_norm_backward_2",
        ];
        let (branch, after, sizes) = (&self.branch, &self.after, self.sizes);
        let ResidualNormGradients {
            weight,
            next_weight,
            mut vectors,
        } = gradients;
        let launch = RowLaunch::new(OP, device, IMAGE, &KERNELS, sizes)?;
        let partial = |needed: bool| {
            let extents = [sizes.batch, launch.grid[0] as usize, sizes.dim];
            needed
                .then(|| Tensor::empty(&self.x.device(), extents, DType::F32))
                .transpose()
        };
        let mut sums = partial(weight.is_some() || vectors.is_some())?;
        let mut next_sums = partial(next_weight.is_some() || vectors.is_some())?;
        let args = Args::new()
            .input(self.d_sum)?
            .input(self.d_normalised)?
            .input(self.x)?
            .input(self.y)?
            .input(branch.weight)?
            .long(Modulation::address_or_null(branch.vectors)?)
            .input(after.weight)?
            .long(Modulation::address_or_null(after.vectors)?)
            .output(dx)?
            .output(dy)?
            .optional_output(sums.as_mut())?
            .optional_output(next_sums.as_mut())?
            .int(sizes.dim)
            .int(sizes.tokens)
            .int(branch.stride())
            .int(after.stride())
            .float(branch.epsilon);
        // SAFETY: the arguments are those of `gated_residual_rms_norm_backward_N`, of the shapes and types checked at the door;
        // the threads hold a whole row, there are at most as many blocks as tokens, and null pointers stand for what is absent.
        unsafe { launch.kernel.launch_with(device, launch.grid, launch.threads, args)? };
        for (branch, sums, weight, which) in [(branch, sums, weight, GATE), (after, next_sums, next_weight, SCALE)] {
            let vector = vector(&mut vectors, which);
            let places = NormGradients { weight, vector };
            if let Some(sums) = sums {
                let Branch {
                    weight, vectors, gated, ..
                } = *branch;
                finish_sums(OP, device, &sums, Some(weight), vectors, gated, places)?;
            }
        }
        Ok(())
    }
}

/// The place of one of the vectors' gradients.
fn vector<'a>(vectors: &'a mut Option<(&mut Tensor, [usize; 2])>, which: usize) -> Option<VectorGradient<'a>> {
    vectors.as_mut().map(|(table, indices)| VectorGradient {
        table,
        index: indices[which],
    })
}
