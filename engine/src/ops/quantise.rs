//! Numbers of eight bits with scales: `x ≈ code · scale`.
//!
//! [`quantise`] takes rows `[.., width]` in the compute type. Every row has one scale, or each of its groups of
//! [`GROUP`] elements has one: the largest magnitude divided by the largest code. Codes are rounded to nearest even.
//!
//! | [`Coding`] | codes | largest | before |
//! | --- | --- | --- | --- |
//! | `Int8` | −127 … 127 | 127 | each group is rotated: `x · H / √128`, H the Hadamard matrix of Sylvester's order |
//! | `Float8` | e4m3: four bits of exponent, three of mantissa | 448 | nothing |
//!
//! H / √128 is its own inverse, and both factors of a product are rotated, so that the product is that of the values: outliers are
//! spread over their group without that anything else changes. A row of zeros has a small scale and codes of zero; NaN and infinities make
//! the scale such, and with it the result. [`dequantise`] gives `code · scale`, still rotated, [`restore`] turns that back.
//!
//! Codes are bytes `[.., width]`, scales f32 `[rows]`, or `[width / 128, rows]` of groups. `width` is a multiple of 128; on CUDA rows
//! with one scale have at most 16384 elements. Sources: Micikevicius et al., "FP8 Formats for Deep Learning" (2022); Ashkboos et al.,
//! "QuaRot" (2024).

mod code;

use rayon::prelude::*;

pub use code::Coding;

use super::grid;
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::shape::Shape;
use crate::tensor::Tensor;

/// Elements that are rotated together, and that may have a scale of their own.
pub const GROUP: usize = 128;

/// Magnitudes below count as this one, so that zeros have a scale; the kernels' own (`common/quantise.cuh`).
const SMALLEST_MAGNITUDE: f32 = f32::from_bits((127 - 100) << 23);

/// What has a scale of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scaling {
    /// A row.
    Rows,
    /// A group of [`GROUP`] elements of a row.
    Groups,
}

/// Rows in eight bits; see the module's head comment.
#[derive(Clone, Debug)]
pub struct Quantised {
    codes: Tensor,
    scales: Tensor,
    coding: Coding,
    scaling: Scaling,
}

/// What a linear layer takes: values in the compute type or numbers of eight bits.
pub enum Activation {
    /// `[.., width]` in the compute type.
    Values(Tensor),
    /// `[.., width]` in eight bits.
    Codes(Quantised),
}

/// An [`Activation`] by reference.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    /// In the compute type.
    Values(&'a Tensor),
    /// In eight bits.
    Codes(&'a Quantised),
}

impl<'a> From<&'a Tensor> for Input<'a> {
    fn from(values: &'a Tensor) -> Self {
        Input::Values(values)
    }
}

impl<'a> From<&'a Activation> for Input<'a> {
    fn from(activation: &'a Activation) -> Self {
        match activation {
            Activation::Values(values) => Input::Values(values),
            Activation::Codes(codes) => Input::Codes(codes),
        }
    }
}

impl Activation {
    /// `values`, in eight bits if a coding is given.
    ///
    /// # Errors
    /// As [`quantise`].
    pub fn of(values: Tensor, coding: Option<Coding>, scaling: Scaling) -> Result<Self> {
        match coding {
            None => Ok(Activation::Values(values)),
            Some(coding) => quantise(&values, coding, scaling).map(Activation::Codes),
        }
    }

    /// The values that it was made of, by an operation that was asked for no coding.
    ///
    /// # Panics
    /// When it is in eight bits.
    pub(crate) fn into_values(self) -> Tensor {
        match self {
            Activation::Values(values) => values,
            Activation::Codes(_) => unreachable!("no coding was asked for"),
        }
    }
}

impl Quantised {
    /// Room for rows of this shape, without defined values yet.
    ///
    /// # Errors
    /// When the width is no multiple of [`GROUP`], or the device has no room.
    pub(in crate::ops) fn empty(
        op: &'static str,
        like: &Tensor,
        shape: Shape,
        coding: Coding,
        scaling: Scaling,
    ) -> Result<Self> {
        let (rows, width) = (shape.rows(), shape.last());
        if width == 0 || !width.is_multiple_of(GROUP) {
            return Err(Error::invalid(format!(
                "{op}: a width of {width} is not a multiple of {GROUP}, which numbers of eight bits need; keep this layer in the \
                 compute type"
            )));
        }
        let scales = match scaling {
            Scaling::Rows => Shape::new(&[rows]),
            Scaling::Groups => Shape::new(&[width / GROUP, rows]),
        };
        Ok(Quantised {
            codes: Tensor::empty(&like.device(), shape, DType::U8)?,
            scales: Tensor::empty(&like.device(), scales, DType::F32)?,
            coding,
            scaling,
        })
    }

    /// `[.., width]`
    pub fn shape(&self) -> Shape {
        self.codes.shape()
    }

    /// What the codes stand for.
    pub fn coding(&self) -> Coding {
        self.coding
    }

    /// What the scales belong to.
    pub fn scaling(&self) -> Scaling {
        self.scaling
    }

    /// The bytes.
    pub fn codes(&self) -> &Tensor {
        &self.codes
    }

    /// f32, `[rows]` or `[groups, rows]`.
    pub fn scales(&self) -> &Tensor {
        &self.scales
    }

    /// Both, to be written by the kernel that makes them.
    pub(in crate::ops) fn parts_mut(&mut self) -> [&mut Tensor; 2] {
        [&mut self.codes, &mut self.scales]
    }

    /// The bytes, to be changed.
    pub fn codes_mut(&mut self) -> &mut Tensor {
        &mut self.codes
    }

    /// The same with codes and scales as `change` makes them, of the same shapes and types.
    ///
    /// # Errors
    /// Those of `change`.
    pub fn map(self, mut change: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Quantised {
            codes: change(&self.codes)?,
            scales: change(&self.scales)?,
            ..self
        })
    }

    /// Bytes of both.
    pub fn bytes(&self) -> usize {
        self.codes.bytes() + self.scales.bytes()
    }

    /// A scale's number.
    fn scale_index(&self, row: usize, group: usize) -> usize {
        match self.scaling {
            Scaling::Rows => row,
            Scaling::Groups => group * self.codes.shape().rows() + row,
        }
    }
}

/// Rows `[.., width]` in eight bits; see the module's head comment.
///
/// # Errors
/// When the width does not fit, or the device has no room.
pub fn quantise(x: &Tensor, coding: Coding, scaling: Scaling) -> Result<Quantised> {
    const OP: &str = "quantise";
    x.ensure_dtype(OP, "x", x.device().compute_dtype())?;
    let mut result = Quantised::empty(OP, x, x.shape(), coding, scaling)?;
    let _op = crate::profile::op(OP, x, 0, x.bytes() + result.bytes());
    if result.codes.elements() == 0 {
        return Ok(result);
    }
    match x.cuda() {
        None => cpu_quantise(x, &mut result)?,
        Some(device) => cuda_quantise(OP, device, x, &mut result)?,
    }
    Ok(result)
}

/// `code · scale`, rotated as the codes are.
///
/// # Errors
/// When the device has no room.
pub fn dequantise(x: &Quantised) -> Result<Tensor> {
    decode("dequantise", x, false)
}

/// `code · scale`, rotated back: what was quantised, but for what was rounded away.
///
/// # Errors
/// When the device has no room.
pub fn restore(x: &Quantised) -> Result<Tensor> {
    decode("restore", x, true)
}

fn decode(op: &'static str, x: &Quantised, back: bool) -> Result<Tensor> {
    let mut result = Tensor::empty_compute(&x.codes.device(), x.shape())?;
    let _op = crate::profile::op(op, &x.codes, 0, x.bytes() + result.bytes());
    if result.elements() == 0 {
        return Ok(result);
    }
    match x.codes.cuda() {
        None => cpu_decode(x, back, &mut result)?,
        Some(device) => cuda_decode(op, device, x, back, &mut result)?,
    }
    Ok(result)
}

/// `x · H / √128` of each group.
fn rotate(group: &mut [f32]) {
    let mut distance = 1;
    while distance < group.len() {
        for pair in group.chunks_mut(2 * distance) {
            let (first, second) = pair.split_at_mut(distance);
            for (first, second) in first.iter_mut().zip(second) {
                (*first, *second) = (*first + *second, *first - *second);
            }
        }
        distance *= 2;
    }
    let factor = 1.0 / (group.len() as f32).sqrt();
    group.iter_mut().for_each(|value| *value *= factor);
}

/// The largest magnitude, NaN before all others.
fn largest(values: &[f32]) -> f32 {
    let bits = values.iter().map(|value| value.abs().to_bits()).max();
    f32::from_bits(bits.unwrap_or(0))
}

fn cpu_quantise(x: &Tensor, result: &mut Quantised) -> Result<()> {
    let (coding, scaling, width) = (result.coding, result.scaling, x.shape().last());
    let scaled = match scaling {
        Scaling::Rows => width,
        Scaling::Groups => GROUP,
    };
    let codes = result.codes.as_mut_slice::<u8>()?;
    let rows = x.as_slice::<f32>()?.par_chunks(width).zip(codes.par_chunks_mut(width));
    let scales: Vec<Vec<f32>> = rows
        .map(|(x, codes)| {
            let mut row = x.to_vec();
            if coding.rotates() {
                row.chunks_mut(GROUP).for_each(rotate);
            }
            let parts = row.chunks(scaled).zip(codes.chunks_mut(scaled));
            let scale_part = |(values, codes): (&[f32], &mut [u8])| {
                let magnitude = largest(values);
                let magnitude = if magnitude < SMALLEST_MAGNITUDE {
                    SMALLEST_MAGNITUDE
                } else {
                    magnitude
                };
                let inverse = coding.largest() / magnitude;
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = coding.encode(value * inverse);
                }
                magnitude / coding.largest()
            };
            parts.map(scale_part).collect()
        })
        .collect();
    let mut all = vec![0.0; result.scales.elements()];
    for (row, scales) in scales.iter().enumerate() {
        for (group, scale) in scales.iter().enumerate() {
            all[result.scale_index(row, group)] = *scale;
        }
    }
    result.scales.as_mut_slice::<f32>()?.copy_from_slice(&all);
    Ok(())
}

fn cpu_decode(x: &Quantised, back: bool, result: &mut Tensor) -> Result<()> {
    let width = x.shape().last();
    let (codes, scales) = (x.codes.as_slice::<u8>()?, x.scales.as_slice::<f32>()?);
    let table = x.coding.numbers();
    let rows = result
        .as_mut_slice::<f32>()?
        .par_chunks_mut(width)
        .zip(codes.par_chunks(width));
    rows.enumerate().for_each(|(row, (values, codes))| {
        let groups = values.chunks_mut(GROUP).zip(codes.chunks(GROUP));
        for (group, (values, codes)) in groups.enumerate() {
            let scale = scales[x.scale_index(row, group)];
            for (value, code) in values.iter_mut().zip(codes) {
                *value = table[*code as usize] * scale;
            }
            if back && x.coding.rotates() {
                rotate(values);
            }
        }
    });
    Ok(())
}

fn cuda_quantise(op: &'static str, device: &CudaDevice, x: &Tensor, result: &mut Quantised) -> Result<()> {
    let (rows, width) = (x.shape().rows(), x.shape().last());
    let (coding, scaling) = (result.coding, result.scaling);
    let kernel = device.kernel("quantise", coding.of_kernels(scaling.kernels()))?;
    let args = Args::new()
        .input(x)?
        .output(&mut result.codes)?
        .output(&mut result.scales)?;
    let covered = kernel.info().tile[0] as usize;
    let (args, blocks) = match scaling {
        Scaling::Rows if width > covered => {
            return Err(Error::invalid(format!(
                "{op}: rows of {width} elements are longer than the CUDA kernel's {covered}"
            )));
        }
        Scaling::Rows => (args.int(width), rows),
        Scaling::Groups => (args.int(rows).int(width), (rows * (width / GROUP)).div_ceil(covered)),
    };
    // SAFETY: the arguments are those of the kernels for rows and for groups, of shapes and types checked above; the blocks cover all
    // rows or groups.
    unsafe { kernel.launch(device, [grid(op, blocks)?, 1, 1], args) }
}

fn cuda_decode(op: &'static str, device: &CudaDevice, x: &Quantised, back: bool, result: &mut Tensor) -> Result<()> {
    let (rows, width) = (x.shape().rows(), x.shape().last());
    let kernel = device.kernel("quantise", x.coding.of_kernels(["dequantise_s8", "dequantise_e4m3"]))?;
    let blocks = (rows * (width / GROUP)).div_ceil(kernel.info().tile[0] as usize);
    let args = Args::new()
        .input(&x.codes)?
        .input(&x.scales)?
        .output(result)?
        .int(rows)
        .int(width)
        .int(usize::from(x.scaling == Scaling::Groups))
        .int(usize::from(back));
    // SAFETY: the arguments are those of `dequantise_…`, of the shapes that `Quantised` has; the blocks cover all groups.
    unsafe { kernel.launch(device, [grid(op, blocks)?, 1, 1], args) }
}

impl Scaling {
    /// The kernels that quantise so, in the order of [`Coding`].
    fn kernels(self) -> [&'static str; 2] {
        match self {
            Scaling::Rows => ["quantise_rows_s8", "quantise_rows_e4m3"],
            Scaling::Groups => ["quantise_groups_s8", "quantise_groups_e4m3"],
        }
    }
}
