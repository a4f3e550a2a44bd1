//! Linear layers for few rows, as the one-token steps of a language model have them: `y = x · weightᵀ`.
//!
//! [`linear_few`] takes `x` `[batch, tokens, in]` of at most [`MOST_ROWS`] rows and `weight` `[out, in]`, all in the device's compute
//! type; the result is `[batch, tokens, out]`. Given a [`RowNorm`], it is `rms_norm(x) · weightᵀ`, the normalised row rounded as
//! [`rms_norm`] rounds it. [`linear_few_f32`] writes the sums in f32 into a tensor that stays (logits); [`linear_few_add`] adds them to
//! what stands in `sum`; [`linear_few_swiglu`] takes a stacked weight `[2·hidden, in]`, gate first, and gives `silu(gate) · up`. Where
//! something is done to a sum, it is done before it is rounded.
//!
//! What counts is that the weights are read once, whatever the number of rows. On CUDA blocks share the work evenly, and what they leave
//! for each other stands in a [`FewScratch`], which serves any number of products that follow one another. There a row's result does not
//! depend on the other rows, to the bit, as long as there are no more than 8 (or always more); `in` is a multiple of 8 there.

use std::sync::Arc;

use super::add_rms_norm::add;
use super::linear::{linear, with_last};
use super::rms_norm::rms_norm;
use super::swiglu::swiglu;
use super::{TokenSizes, ensure_parameter, launch_overlapped};
use crate::device::{Args, CudaDevice, Device, Kernel};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The most rows that `x` may have.
pub const MOST_ROWS: usize = 32;

/// The most rows that are normalised by the product's own kernel.
const MOST_NORMED: usize = 8;

/// The kernels' image.
const IMAGE: &str = "linear_few";

/// Blocks of a multiprocessor.
const BLOCKS_EACH: u32 = 2;

/// What the blocks of one launch leave for each other.
pub struct FewScratch {
    parts: Option<Parts>,
}

/// On CUDA.
struct Parts {
    /// f32, for each block as many as a tile of the most rows has.
    sums: Tensor,
    /// i32 `[blocks]`, zero between launches.
    ready: Tensor,
}

impl FewScratch {
    /// Scratch for products on `device`.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(device: &Device) -> Result<Self> {
        /// Outputs of a tile, both parts of SwiGLU together.
        const TILE: usize = 2 * 16;
        let parts = match device {
            Device::Cpu => None,
            Device::Cuda(cuda) => {
                let blocks = (cuda.multiprocessors() * BLOCKS_EACH) as usize;
                Some(Parts {
                    sums: Tensor::empty(device, [blocks, MOST_ROWS * TILE], DType::F32)?,
                    ready: Tensor::zeros(device, [blocks], DType::I32)?,
                })
            }
        };
        Ok(FewScratch { parts })
    }
}

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
pub fn linear_few(x: &Tensor, norm: Option<RowNorm<'_>>, weight: &Tensor, scratch: &mut FewScratch) -> Result<Tensor> {
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
    problem.launch(device, &mut y, scratch)?;
    Ok(y)
}

/// `x · weightᵀ` in f32, into `y`; see the module's head comment.
///
/// # Errors
/// As for [`linear_few`], and when `y` does not fit or is shared.
pub fn linear_few_f32(
    x: &Tensor,
    norm: Option<RowNorm<'_>>,
    weight: &Tensor,
    y: &mut Tensor,
    scratch: &mut FewScratch,
) -> Result<()> {
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
        Some(device) => problem.launch(device, y, scratch),
    }
}

/// `sum += x · weightᵀ`; see the module's head comment.
///
/// # Errors
/// As for [`linear_few`], and when `sum` does not fit or is shared.
pub fn linear_few_add(x: &Tensor, weight: &Tensor, sum: &mut Tensor, scratch: &mut FewScratch) -> Result<()> {
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
        Some(device) => problem.launch(device, sum, scratch),
    }
}

/// `silu(gate) · up`; see the module's head comment.
///
/// # Errors
/// As for [`linear_few`].
pub fn linear_few_swiglu(
    x: &Tensor,
    norm: Option<RowNorm<'_>>,
    weight: &Tensor,
    scratch: &mut FewScratch,
) -> Result<Tensor> {
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
    problem.launch(device, &mut y, scratch)?;
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

    fn launch(&self, device: &Arc<CudaDevice>, y: &mut Tensor, scratch: &mut FewScratch) -> Result<()> {
        if y.elements() == 0 {
            return Ok(());
        }
        let Some(Parts { sums, ready }) = &mut scratch.parts else {
            return Err(Error::invalid(format!("{}: the scratch is for the CPU", self.names.op)));
        };
        sums.ensure_device(self.names.op, "scratch", &self.x.device())?;
        let flops = 2 * self.rows * self.weight.elements();
        let bytes = self.x.bytes() + self.weight.bytes() + y.bytes();
        let _op = crate::profile::op(self.names.op, self.x, flops, bytes);
        let normed = match self.norm {
            Some(norm) if self.rows <= MOST_NORMED && keeps(&*device.kernel(IMAGE, self.names.normed)?, self.x) => {
                Some(norm)
            }
            _ => None,
        };
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
            .output(sums)?
            .output(ready)?
            .int(self.rows)
            .int(x.shape().last())
            .int(self.outputs);
        let sharing = Sharing::new(device, &kernel, x.shape().last(), self.outputs)?;
        args = args.int(sharing.each).int(sharing.rest).int(sharing.reciprocal);
        if let Some(norm) = normed {
            args = args.float(norm.epsilon);
        }
        // SAFETY: the arguments are those of the kernels, of the shapes and types checked at the door; the blocks share the units of work
        // evenly, there are no more of them than units, and the scratch has room for each. Ahead of the wait they read weights alone, which
        // no work writes.
        unsafe { launch_overlapped(device, &kernel, [sharing.blocks, 1, 1], args) }
    }
}

/// Whether a kernel has room for as many rows as it may be asked to normalise. A matter of their length alone, so that a row's result does
/// not depend on how many others there are.
fn keeps(kernel: &Kernel, x: &Tensor) -> bool {
    let [_, _, rows, elements] = kernel.info().tile.map(|size| size as usize);
    rows * x.shape().last() <= elements
}

/// How blocks share the units of work.
struct Sharing {
    blocks: u32,
    /// Units of a block.
    each: usize,
    /// Blocks that have one more.
    rest: usize,
    /// 2³¹ over the units of a tile, rounded up; 0 for one, where it is not needed.
    reciprocal: usize,
}

impl Sharing {
    /// As many blocks as run at the same time and are of use, but no more than there are units of work. A matter of the kernel and of the
    /// weights' shape alone, not of the number of rows, for it decides in which order elements are summed.
    fn new(device: &CudaDevice, kernel: &Kernel, depth: usize, outputs: usize) -> Result<Self> {
        let info = kernel.info();
        let [tile, step] = [0, 1].map(|index| (info.tile[index] as usize).max(1));
        let steps = depth.div_ceil(step);
        let units = outputs.div_ceil(tile) * steps;
        if (units * steps) as u64 >= 1 << 31 {
            return Err(Error::invalid(format!(
                "linear_few: a weight of {outputs} rows of {depth} elements is too large"
            )));
        }
        let resident = kernel.resident_blocks(info.threads)?.clamp(1, BLOCKS_EACH) * device.multiprocessors();
        let blocks = units.min(resident as usize).max(1);
        Ok(Sharing {
            blocks: blocks as u32,
            each: units / blocks,
            rest: units % blocks,
            reciprocal: if steps > 1 { (1usize << 31).div_ceil(steps) } else { 0 },
        })
    }
}
