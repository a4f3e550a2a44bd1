//! Linear layers for few rows, as the one-token steps of a language model have them: `y = x · weightᵀ`.
//!
//! [`linear_few`] takes `x` `[batch, tokens, in]` of at most [`MOST_ROWS`] rows and `weight` `[out, in]`, all in the device's compute
//! type; the result is `[batch, tokens, out]`. Given a [`RowNorm`], it is `rms_norm(x) · weightᵀ`, the normalised row rounded as
//! [`rms_norm`] rounds it. [`linear_few_f32`] writes the sums in f32 into a tensor that stays (logits); [`linear_few_add`] adds them to what stands in `sum`;
//! [`linear_few_swiglu`] takes a stacked weight `[2·hidden, in]`, gate first, and gives `silu(gate) · up`. Where something is done to a
//! sum, it is done before it is rounded.
//!
//! What counts is that the weights are read once, whatever the number of rows. On CUDA a row's result does not depend on the other
//! rows, to the bit, as long as there are no more than 8 (or always more); `in` is a multiple of 8 there.

use std::sync::Arc;

use super::add_rms_norm::add;
use super::linear::{linear, with_last};
use super::rms_norm::rms_norm;
use super::swiglu::swiglu;
use super::{TokenSizes, ensure_parameter, launch_overlapped};
use crate::device::{Args, CudaDevice, Kernel};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The most rows that `x` may have.
pub const MOST_ROWS: usize = 32;

/// The most rows that are normalised by the product's own kernel.
const MOST_NORMED: usize = 8;

/// The kernels' image.
const IMAGE: &str = "linear_few";

/// The normalisation of rows ahead of a product: `x / rms(x) · weight`.
#[derive(Clone, Copy, Debug)]
pub struct RowNorm<'a> {
    /// The factor per element, `[in]`.
    pub weight: &'a Tensor,
    /// Added to the mean square.
    pub epsilon: f32,
}

/// `x · weightᵀ`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit, or there are too many rows.
pub fn linear_few(x: &Tensor, norm: Option<RowNorm<'_>>, weight: &Tensor) -> Result<Tensor> {
    const NAMES: Names = Names {
        op: "linear_few",
        normed: "linear_few_normed",
        by_rows: ["linear_few_1", "linear_few_2", "linear_few_4"],
    };
    let problem = Problem::new(&NAMES, x, norm, weight, 1)?;
    let Some(device) = x.cuda() else {
        return linear(&problem.normalised()?, weight, None);
    };
    let mut y = Tensor::empty_compute(&x.device(), with_last(x.shape(), problem.outputs))?;
    problem.launch(device, &mut y)?;
    Ok(y)
}

/// `x · weightᵀ` in f32, into `y`; see the module's head comment.
///
/// # Errors
/// As for [`linear_few`], and when `y` does not fit or is shared.
pub fn linear_few_f32(x: &Tensor, norm: Option<RowNorm<'_>>, weight: &Tensor, y: &mut Tensor) -> Result<()> {
    const NAMES: Names = Names {
        op: "linear_few_f32",
        normed: "linear_few_f32_normed",
        by_rows: ["linear_few_f32_1", "linear_few_f32_2", "linear_few_f32_4"],
    };
    let problem = Problem::new(&NAMES, x, norm, weight, 1)?;
    y.ensure_shape(NAMES.op, "y", with_last(x.shape(), problem.outputs))?;
    y.ensure_dtype(NAMES.op, "y", DType::F32)?;
    y.ensure_device(NAMES.op, "y", &x.device())?;
    match x.cuda() {
        None => y.copy_from(&linear(&problem.normalised()?, weight, None)?),
        Some(device) => problem.launch(device, y),
    }
}

/// `sum += x · weightᵀ`; see the module's head comment.
///
/// # Errors
/// As for [`linear_few`], and when `sum` does not fit or is shared.
pub fn linear_few_add(x: &Tensor, weight: &Tensor, sum: &mut Tensor) -> Result<()> {
    const NAMES: Names = Names {
        op: "linear_few_add",
        normed: "",
        by_rows: ["linear_few_add_1", "linear_few_add_2", "linear_few_add_4"],
    };
    let problem = Problem::new(&NAMES, x, None, weight, 1)?;
    sum.ensure_shape(NAMES.op, "sum", with_last(x.shape(), problem.outputs))?;
    sum.ensure_dtype(NAMES.op, "sum", x.dtype())?;
    sum.ensure_device(NAMES.op, "sum", &x.device())?;
    match x.cuda() {
        None => {
            let added = add(sum, &linear(x, weight, None)?)?;
            sum.copy_from(&added)
        }
        Some(device) => problem.launch(device, sum),
    }
}

/// `silu(gate) · up`; see the module's head comment.
///
/// # Errors
/// As for [`linear_few`].
pub fn linear_few_swiglu(x: &Tensor, norm: Option<RowNorm<'_>>, weight: &Tensor) -> Result<Tensor> {
    const NAMES: Names = Names {
        op: "linear_few_swiglu",
        normed: "linear_few_swiglu_normed",
        by_rows: ["linear_few_swiglu_1", "linear_few_swiglu_2", "linear_few_swiglu_4"],
    };
    let problem = Problem::new(&NAMES, x, norm, weight, 2)?;
    let Some(device) = x.cuda() else {
        return swiglu(&linear(&problem.normalised()?, weight, None)?);
    };
    let mut y = Tensor::empty_compute(&x.device(), with_last(x.shape(), problem.outputs))?;
    problem.launch(device, &mut y)?;
    Ok(y)
}

/// The kernels of one operation.
struct Names {
    op: &'static str,
    normed: &'static str,
    /// For up to 8, 16 and 32 rows.
    by_rows: [&'static str; 3],
}

/// What was checked at the door.
struct Problem<'a> {
    names: &'a Names,
    x: &'a Tensor,
    norm: Option<RowNorm<'a>>,
    weight: &'a Tensor,
    rows: usize,
    /// Of a row of the result.
    outputs: usize,
}

impl<'a> Problem<'a> {
    /// `parts` rows of the weight make one output.
    fn new(
        names: &'a Names,
        x: &'a Tensor,
        norm: Option<RowNorm<'a>>,
        weight: &'a Tensor,
        parts: usize,
    ) -> Result<Self> {
        let op = names.op;
        let sizes = TokenSizes::of(op, "x", x)?;
        weight.ensure_rank(op, "weight", 2, "[out, in]")?;
        if !weight.dim(0).is_multiple_of(parts) {
            return Err(Error::Shape {
                op,
                tensor: "weight".into(),
                expected: "[2·hidden, in]".into(),
                found: weight.shape(),
            });
        }
        ensure_parameter(op, "weight", weight, &[weight.dim(0), sizes.dim], x)?;
        if let Some(norm) = &norm {
            ensure_parameter(op, "norm", norm.weight, &[sizes.dim], x)?;
        }
        if sizes.rows() > MOST_ROWS {
            return Err(Error::invalid(format!(
                "{op}: x has {} rows, more than the {MOST_ROWS} that are few",
                sizes.rows()
            )));
        }
        if x.cuda().is_some() {
            sizes.ensure_vectors(op)?;
        }
        Ok(Problem {
            names,
            x,
            norm,
            weight,
            rows: sizes.rows(),
            outputs: weight.dim(0) / parts,
        })
    }

    /// `x`, normalised if that is asked for.
    fn normalised(&self) -> Result<Tensor> {
        match self.norm {
            None => Ok(self.x.clone()),
            Some(norm) => rms_norm(self.x, norm.weight, norm.epsilon),
        }
    }

    fn launch(&self, device: &Arc<CudaDevice>, y: &mut Tensor) -> Result<()> {
        if y.elements() == 0 {
            return Ok(());
        }
        let flops = 2 * self.rows * self.weight.elements();
        let bytes = self.x.bytes() + self.weight.bytes() + y.bytes();
        let _op = crate::profile::op(self.names.op, self.x, flops, bytes);
        let normed = self.norm.filter(|_| self.rows <= MOST_NORMED);
        let x = match normed {
            Some(_) => self.x.clone(),
            None => self.normalised()?,
        };
        let [few, more, most] = self.names.by_rows;
        let name = match self.rows {
            _ if normed.is_some() => self.names.normed,
            0..=8 => few,
            9..=16 => more,
            _ => most,
        };
        let kernel = device.kernel(IMAGE, name)?;
        let mut args = Args::new().input(&x)?;
        if let Some(norm) = normed {
            args = args.input(norm.weight)?;
        }
        let mut args = args
            .input(self.weight)?
            .output(y)?
            .int(self.rows)
            .int(x.shape().last())
            .int(self.outputs);
        if let Some(norm) = normed {
            args = args.float(norm.epsilon);
        }
        let blocks = blocks(device, &kernel, self.outputs)?;
        // SAFETY: the arguments are those of the kernels, of the shapes and types checked at the door; the blocks share the tiles whatever
        // their number. Ahead of the wait they read weights alone, which no work writes.
        unsafe { launch_overlapped(device, &kernel, [blocks, 1, 1], args) }
    }
}

/// A block per tile, but no more than run at the same time.
fn blocks(device: &CudaDevice, kernel: &Kernel, outputs: usize) -> Result<u32> {
    let info = kernel.info();
    let tiles = outputs.div_ceil((info.tile[0] as usize).max(1));
    let resident = kernel.resident_blocks(info.threads)?.max(1) * device.multiprocessors();
    Ok(tiles.min(resident as usize) as u32)
}
