//! Reading a described module.

use super::{ConvMeta, Described, Loaded, Module, NamedParameter, ParamSource, Transform, Weight, metas};
use crate::device::{Device, MemoryTag};
use crate::error::{Error, Result};
use crate::ops::conv::Conv;
use crate::ops::quantise::GROUP;
use crate::tensor::Tensor;

/// Brings described parameters onto a device.
pub struct Loader<'a> {
    pub(super) params: &'a dyn ParamSource,
    pub(super) device: &'a Device,
    /// Told how many parameters are read, and how many there are.
    loaded: &'a mut dyn FnMut(usize, usize) -> Result<()>,
    done: usize,
    total: usize,
}

impl<'a> Loader<'a> {
    /// Reads all parameters of `module`. `loaded` is called after each, with how many are done and how many there are; an error
    /// from it ends the loading.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, the device has no room, or `loaded` says so.
    pub fn load<M: Module<Kind = Described>>(
        module: &M,
        params: &'a dyn ParamSource,
        device: &'a Device,
        loaded: &'a mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<M::As<Loaded>> {
        let _tag = MemoryTag::Weights.scope();
        let mut loader = Loader {
            params,
            device,
            loaded,
            done: 0,
            total: metas(module).len(),
        };
        module.transform(&mut loader)
    }

    fn read(&mut self, meta: &NamedParameter) -> Result<Tensor> {
        let tensor = match &meta.parts[..] {
            [one] if one.shape.len() == 4 => {
                self.ensure_conv_shape(&one.name, &one.shape)?;
                self.params.load_conv(self.device, &one.name)?
            }
            [one] => self
                .params
                .load(self.device, &one.name, &one.shape)?
                .into_shape(&meta.shape()[..])?,
            parts => {
                let names: Vec<&str> = parts.iter().map(|part| part.name.as_str()).collect();
                self.params.load_stacked(self.device, &names, &meta.shape())?
            }
        };
        self.done += 1;
        (self.loaded)(self.done, self.total)?;
        Ok(tensor)
    }

    /// [`ParamSource::load_conv`] takes whatever shape it finds.
    fn ensure_conv_shape(&self, name: &str, expected: &[usize]) -> Result<()> {
        match self.params.shape(name) {
            Some(found) if found == expected => Ok(()),
            Some(found) => Err(Error::invalid(format!(
                "`{name}` has shape {found:?}, expected {expected:?}"
            ))),
            None => Err(Error::invalid(format!("there is no parameter `{name}`"))),
        }
    }
}

impl Transform<Described, Loaded> for Loader<'_> {
    fn matrix(&mut self, meta: &NamedParameter) -> Result<Weight> {
        let coding = self.params.coding(meta);
        if let Some(coding) = coding.filter(|_| !meta.shape().last().is_some_and(|width| width.is_multiple_of(GROUP))) {
            return Err(Error::invalid(format!(
                "`{}` of shape {:?} cannot be kept in {coding}: its inputs are no multiple of {GROUP}; keep it in the compute type",
                meta.name(),
                meta.shape()
            )));
        }
        let values = self.read(meta)?;
        let values = self.balanced(meta, values, coding)?;
        let weight = Weight::of(values, coding)?;
        self.params.keep(meta, weight)
    }

    fn dense(&mut self, meta: &NamedParameter) -> Result<Tensor> {
        self.read(meta)
    }

    fn conv(&mut self, conv: &ConvMeta) -> Result<Conv> {
        let (weight, bias) = (self.read(&conv.weight)?, self.read(&conv.bias)?);
        let plain = Conv::new(weight, bias, conv.kernel, &conv.channels)?;
        match conv.arranged {
            Some(input) => plain.arranged(input),
            None => Ok(plain),
        }
    }
}
