//! RMS normalisation and what the transformer block fuses with it.
//!
//! With `rms(x) = sqrt(mean(x²) + ε)` over the last dimension:
//!
//! * [`rms_norm`]: `x / rms(x) · weight`
//! * [`rms_norm_modulate`]: the same `· (1 + scale)`, the scale being one vector per batch item
//! * [`gated_residual_rms_norm`]: `sum = x + tanh(gate) · rms_norm(y)`, and at once the next sublayer's
//!   `rms_norm_modulate(sum)`
//!
//! Backward, with x̂ = x / rms(x), f what multiplies x̂ per channel, g = f · dy:
//!
//! * `dx = (g − x̂ · mean(g · x̂)) / rms(x)`, and with S = Σ dy · x̂ over an item's rows: `d weight = Σ items (1 + scale) · S` or
//!   `tanh(gate) · S`, `d scale = weight · S`, `d gate = weight · (1 − tanh²(gate)) · S`
//! * [`gated_residual_rms_norm_backward`] sends the gradients of both results through the second normalisation, then through
//!   the branch, and makes the sum again from `x` and `y`
//!
//! Shapes: activations `[batch, tokens, dim]`, weights `[dim]`, scale and gate as [`Modulation`] in f32. On CUDA `dim` is a
//! multiple of 8 and at most 8192, in the backward pass 4096. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); the gating
//! and modulation are those of the Z-Image transformer block.

mod backward;

use std::sync::Arc;

use rayon::prelude::*;

use super::quantise::{Activation, Coding, Quantised, Scaling};
use super::{Modulation, TokenSizes, ensure_parameter, grid};
use crate::device::{Args, CudaDevice, Kernel};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

pub(in crate::ops) use backward::finish_sums;
pub use backward::{
    NormGradients, ResidualNormGradients, gated_residual_backward, gated_residual_rms_norm_backward,
    rms_norm_modulate_backward,
};

/// Elements that a CUDA thread moves at once, threads of a warp, and the most threads that a row may have.
const VECTOR: usize = 8;
const WARP: usize = 32;
const MAX_THREADS: usize = 256;

/// The normalisation of a sublayer's input: weight `[dim]`, optional scale per batch item, and ε.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm<'a> {
    /// The learned factor per channel.
    pub weight: &'a Tensor,
    /// Multiplies the result by `1 + scale`.
    pub scale: Option<Modulation<'a>>,
    /// Added to the mean square.
    pub epsilon: f32,
}

impl RmsNorm<'_> {
    fn expect(&self, op: &'static str, x: &Tensor, sizes: TokenSizes) -> Result<()> {
        ensure_parameter(op, "weight", self.weight, &[sizes.dim], x)?;
        match &self.scale {
            Some(scale) => scale.expect(op, "scale", sizes.batch, sizes.dim, x),
            None => Ok(()),
        }
    }
}

/// `x / rms(x) · weight`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
    rms_norm_modulate(
        x,
        &RmsNorm {
            weight,
            scale: None,
            epsilon,
        },
    )
}

/// `x / rms(x) · weight · (1 + scale)`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn rms_norm_modulate(x: &Tensor, norm: &RmsNorm<'_>) -> Result<Tensor> {
    rms_norm_modulate_in(x, norm, None).map(Activation::into_values)
}

/// [`rms_norm_modulate`] in eight bits with a scale per row, where `coding` asks for it.
///
/// # Errors
/// As [`rms_norm_modulate`], and when the width is not one for eight bits.
pub fn rms_norm_modulate_in(x: &Tensor, norm: &RmsNorm<'_>, coding: Option<Coding>) -> Result<Activation> {
    const OP: &str = "rms_norm_modulate";
    let sizes = TokenSizes::of(OP, "x", x)?;
    norm.expect(OP, x, sizes)?;
    let Some(device) = x.cuda() else {
        let mut output = Tensor::empty(&x.device(), x.shape(), x.dtype())?;
        let _op = crate::profile::op(OP, x, 0, 2 * x.bytes());
        cpu_rms_norm_modulate(x, norm, sizes, &mut output)?;
        return Activation::of(output, coding, Scaling::Rows);
    };
    let mut output = Output::empty(OP, x, coding)?;
    let _op = crate::profile::op(OP, x, 0, x.bytes() + output.bytes());
    cuda_rms_norm_modulate(device, x, norm, sizes, &mut output)?;
    Ok(output.0)
}

/// Where a kernel leaves normalised rows.
struct Output(Activation);

impl Output {
    fn empty(op: &'static str, x: &Tensor, coding: Option<Coding>) -> Result<Self> {
        Ok(Output(match coding {
            None => Activation::Values(Tensor::empty(&x.device(), x.shape(), x.dtype())?),
            Some(coding) => Activation::Codes(Quantised::empty(op, x, x.shape(), coding, Scaling::Rows)?),
        }))
    }

    fn bytes(&self) -> usize {
        match &self.0 {
            Activation::Values(values) => values.bytes(),
            Activation::Codes(codes) => codes.bytes(),
        }
    }

    /// As arguments: the values, or codes and scales.
    fn arguments(output: Option<&mut Self>, args: Args) -> Result<Args> {
        match output {
            None => args.optional_output(None),
            Some(Output(Activation::Values(values))) => args.output(values),
            Some(Output(Activation::Codes(quantised))) => {
                let [codes, scales] = quantised.parts_mut();
                args.output(codes)?.output(scales)
            }
        }
    }

    /// Of the kernels for values, integers and floating point the ones that leave this.
    fn kernels(output: Option<&Self>, kernels: &[[&'static str; 4]; 3]) -> [&'static str; 4] {
        kernels[match output {
            Some(Output(Activation::Codes(codes))) if codes.coding() == Coding::Int8 => 1,
            Some(Output(Activation::Codes(_))) => 2,
            _ => 0,
        }]
    }
}

/// A sublayer's end: its output `y` is normalised, gated and added to the residual stream.
#[derive(Clone, Copy, Debug)]
pub struct GatedResidual<'a> {
    /// The factor per channel of the normalisation of `y`.
    pub weight: &'a Tensor,
    /// The branch is multiplied by `tanh(gate)`; by 1 without a gate.
    pub gate: Option<Modulation<'a>>,
    /// Added to the mean square of `y`.
    pub epsilon: f32,
}

/// `sum = x + tanh(gate) · rms_norm(y)`; with `next`, also the normalised input of the sublayer that follows. Returns both.
///
/// # Errors
/// When shapes, types or devices do not fit, or `next` has another ε.
pub fn gated_residual_rms_norm(
    x: &Tensor,
    y: &Tensor,
    residual: &GatedResidual<'_>,
    next: Option<&RmsNorm<'_>>,
) -> Result<(Tensor, Option<Tensor>)> {
    let (sum, normalised) = gated_residual_rms_norm_in(x, y, residual, next, None)?;
    Ok((sum, normalised.map(Activation::into_values)))
}

/// [`gated_residual_rms_norm`] whose normalised rows are in eight bits with a scale each, where `coding` asks for it.
///
/// # Errors
/// As [`gated_residual_rms_norm`], and when the width is not one for eight bits.
pub fn gated_residual_rms_norm_in(
    x: &Tensor,
    y: &Tensor,
    residual: &GatedResidual<'_>,
    next: Option<&RmsNorm<'_>>,
    coding: Option<Coding>,
) -> Result<(Tensor, Option<Activation>)> {
    const OP: &str = "gated_residual_rms_norm";
    let sizes = TokenSizes::of(OP, "x", x)?;
    y.ensure_shape(OP, "y", x.shape())?;
    y.ensure_dtype(OP, "y", x.dtype())?;
    y.ensure_device(OP, "y", &x.device())?;
    ensure_parameter(OP, "weight", residual.weight, &[sizes.dim], x)?;
    if let Some(gate) = &residual.gate {
        gate.expect(OP, "gate", sizes.batch, sizes.dim, x)?;
    }
    if let Some(next) = next {
        next.expect(OP, x, sizes)?;
        if next.epsilon != residual.epsilon {
            return Err(Error::invalid(format!(
                "{OP}: both normalisations must have the same epsilon"
            )));
        }
    }
    let mut sum = Tensor::empty(&x.device(), x.shape(), x.dtype())?;
    let Some(device) = x.cuda() else {
        let _op = crate::profile::op(OP, x, 0, (3 + usize::from(next.is_some())) * x.bytes());
        cpu_gated_residual(x, y, residual, sizes, &mut sum)?;
        let Some(next) = next else { return Ok((sum, None)) };
        let mut normalised = Tensor::empty(&x.device(), x.shape(), x.dtype())?;
        cpu_rms_norm_modulate(&sum, next, sizes, &mut normalised)?;
        return Ok((sum, Some(Activation::of(normalised, coding, Scaling::Rows)?)));
    };
    let mut normalised = next.map(|_| Output::empty(OP, x, coding)).transpose()?;
    let _op = crate::profile::op(OP, x, 0, 3 * x.bytes() + normalised.as_ref().map_or(0, Output::bytes));
    cuda_gated_residual_rms_norm(device, [x, y], residual, next, sizes, &mut sum, normalised.as_mut())?;
    Ok((sum, normalised.map(|output| output.0)))
}

/// `1 / rms(row)`.
pub(super) fn inverse_rms(row: &[f32], epsilon: f32) -> f32 {
    let squares: f32 = row.iter().map(|value| value * value).sum();
    1.0 / (squares / row.len() as f32 + epsilon).sqrt()
}

fn cpu_rms_norm_modulate(x: &Tensor, norm: &RmsNorm<'_>, sizes: TokenSizes, output: &mut Tensor) -> Result<()> {
    let weight = norm.weight.as_slice::<f32>()?;
    let scales = Modulation::rows_or_none(norm.scale.as_ref(), sizes.batch)?;
    let rows = x.as_slice::<f32>()?.par_chunks(sizes.dim);
    output
        .as_mut_slice::<f32>()?
        .par_chunks_mut(sizes.dim)
        .zip(rows)
        .enumerate()
        .for_each(|(row, (output, x))| {
            let inverse = inverse_rms(x, norm.epsilon);
            for ((output, x), weight) in output.iter_mut().zip(x).zip(weight) {
                *output = x * inverse * weight;
            }
            if let Some(scales) = &scales {
                for (output, scale) in output.iter_mut().zip(scales[row / sizes.tokens]) {
                    *output *= 1.0 + scale;
                }
            }
        });
    Ok(())
}

fn cpu_gated_residual(
    x: &Tensor,
    y: &Tensor,
    residual: &GatedResidual<'_>,
    sizes: TokenSizes,
    sum: &mut Tensor,
) -> Result<()> {
    let weight = residual.weight.as_slice::<f32>()?;
    let gates = Modulation::rows_or_none(residual.gate.as_ref(), sizes.batch)?;
    let (x, y) = (
        x.as_slice::<f32>()?.par_chunks(sizes.dim),
        y.as_slice::<f32>()?.par_chunks(sizes.dim),
    );
    sum.as_mut_slice::<f32>()?
        .par_chunks_mut(sizes.dim)
        .zip(x)
        .zip(y)
        .enumerate()
        .for_each(|(row, ((sum, x), y))| {
            let inverse = inverse_rms(y, residual.epsilon);
            let gate = gates.as_ref().map(|gates| gates[row / sizes.tokens]);
            for channel in 0..sizes.dim {
                let factor = gate.map_or(1.0, |gate| gate[channel].tanh());
                sum[channel] = x[channel] + factor * (y[channel] * inverse * weight[channel]);
            }
        });
    Ok(())
}

fn cuda_rms_norm_modulate(
    device: &CudaDevice,
    x: &Tensor,
    norm: &RmsNorm<'_>,
    sizes: TokenSizes,
    output: &mut Output,
) -> Result<()> {
    const OP: &str = "rms_norm_modulate";
    const KERNELS: [[&str; 4]; 3] = [
        [
            "rms_norm_modulate_1",
            "rms_norm_modulate_2",
            "rms_norm_modulate_3",
            "rms_norm_modulate_4",
        ],
        [
            "rms_norm_modulate_1_s8",
            "rms_norm_modulate_2_s8",
            "rms_norm_modulate_3_s8",
            "rms_norm_modulate_4_s8",
        ],
        [
            "rms_norm_modulate_1_e4m3",
            "rms_norm_modulate_2_e4m3",
            "rms_norm_modulate_3_e4m3",
            "rms_norm_modulate_4_e4m3",
        ],
    ];
    let launch = RowLaunch::new(OP, device, "rms_norm", &Output::kernels(Some(output), &KERNELS), sizes)?;
    let args = Args::new()
        .input(x)?
        .input(norm.weight)?
        .long(Modulation::address_or_null(norm.scale.as_ref())?);
    let args = Output::arguments(Some(output), args)?
        .int(sizes.dim)
        .int(sizes.tokens)
        .int(norm.scale.map_or(0, |scale| scale.stride()))
        .float(norm.epsilon);
    // SAFETY: the arguments are those of `rms_norm_modulate_N`, of the shapes and types checked at the door; the threads
    // hold a whole row.
    unsafe { launch.kernel.launch_with(device, launch.grid, launch.threads, args) }
}

fn cuda_gated_residual_rms_norm(
    device: &CudaDevice,
    [x, y]: [&Tensor; 2],
    residual: &GatedResidual<'_>,
    next: Option<&RmsNorm<'_>>,
    sizes: TokenSizes,
    sum: &mut Tensor,
    normalised: Option<&mut Output>,
) -> Result<()> {
    const OP: &str = "gated_residual_rms_norm";
    const KERNELS: [[&str; 4]; 3] = [
        [
            "gated_residual_rms_norm_1",
            "gated_residual_rms_norm_2",
            "gated_residual_rms_norm_3",
            "gated_residual_rms_norm_4",
        ],
        [
            "gated_residual_rms_norm_1_s8",
            "gated_residual_rms_norm_2_s8",
            "gated_residual_rms_norm_3_s8",
            "gated_residual_rms_norm_4_s8",
        ],
        [
            "gated_residual_rms_norm_1_e4m3",
            "gated_residual_rms_norm_2_e4m3",
            "gated_residual_rms_norm_3_e4m3",
            "gated_residual_rms_norm_4_e4m3",
        ],
    ];
    let kernels = Output::kernels(normalised.as_deref(), &KERNELS);
    let launch = RowLaunch::new(OP, device, "rms_norm", &kernels, sizes)?;
    let next_scale = next.and_then(|next| next.scale);
    let args = Args::new()
        .input(x)?
        .input(y)?
        .input(residual.weight)?
        .long(Modulation::address_or_null(residual.gate.as_ref())?)
        .output(sum)?
        .optional(next.map(|next| next.weight))?
        .long(Modulation::address_or_null(next_scale.as_ref())?);
    let args = Output::arguments(normalised, args)?
        .int(sizes.dim)
        .int(sizes.tokens)
        .int(residual.gate.map_or(0, |gate| gate.stride()))
        .int(next_scale.map_or(0, |scale| scale.stride()))
        .float(residual.epsilon);
    // SAFETY: the arguments are those of `gated_residual_rms_norm_N`, of the shapes and types checked at the door; the
    // threads hold a whole row; null pointers stand for what is absent.
    unsafe { launch.kernel.launch_with(device, launch.grid, launch.threads, args) }
}

/// How a kernel that takes rows one after the other is launched.
pub(in crate::ops) struct RowLaunch {
    pub kernel: Arc<Kernel>,
    pub threads: u32,
    pub grid: [u32; 3],
}

impl RowLaunch {
    /// Of `kernels`, which hold 1, 2, … vectors per thread, the one whose threads fit the row best; as many blocks as run at
    /// once, with equally many rows each.
    pub(in crate::ops) fn new(
        op: &'static str,
        device: &CudaDevice,
        image: &'static str,
        kernels: &[&'static str],
        sizes: TokenSizes,
    ) -> Result<Self> {
        sizes.ensure_vectors(op)?;
        let vectors = sizes.dim / VECTOR;
        let threads = |per_thread: usize| vectors.div_ceil(per_thread).next_multiple_of(WARP);
        // Few threads with many vectors leave more loads in flight; idle lanes are worse than that is good.
        let fitting = (1..=kernels.len()).filter(|&per_thread| threads(per_thread) <= MAX_THREADS);
        let best =
            fitting.min_by_key(|&per_thread| (threads(per_thread) * per_thread - vectors, kernels.len() - per_thread));
        let per_thread = best.ok_or_else(|| {
            let longest = MAX_THREADS * kernels.len() * VECTOR;
            Error::invalid(format!(
                "{op}: rows of {} elements are longer than the CUDA kernel's {longest}",
                sizes.dim
            ))
        })?;
        let kernel = device.kernel(image, kernels[per_thread - 1])?;
        let threads = threads(per_thread) as u32;
        let resident = (kernel.resident_blocks(threads)? * device.multiprocessors()) as usize;
        let rows_per_block = sizes.rows().div_ceil(resident.max(1)).max(1);
        let blocks = sizes.tokens.div_ceil(rows_per_block);
        Ok(RowLaunch {
            kernel,
            threads,
            grid: [grid(op, blocks)?, grid(op, sizes.batch)?, 1],
        })
    }
}
