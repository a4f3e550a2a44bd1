//! The same code on the device and on the CPU, on inputs that a CPU can take.

use l2p_engine::model::Precision;
use l2p_engine::model::config::VaeConfig;
use l2p_engine::model::vae::VaeDecoder;
use l2p_engine::{Device, Result};

use super::Setup;
use crate::check::relative_error;
use crate::inputs::random_f32;
use crate::params::RandomParams;
use crate::published::Model;

/// Patches along a side of the small image, and tokens of its caption.
const GRID: usize = 4;
const CAPTION: usize = 20;

/// Rows and columns of the small latent.
const LATENT: usize = 8;

/// The error of one step of a model of the same widths with one block of each kind, on a small image.
pub(super) fn step_error(device: &Device, model: &Model, precision: &Precision, seed: u64) -> Result<f64> {
    let mut small = model.shallow()?;
    let cell = model.vae.as_ref().map_or(1, VaeConfig::downsampling);
    small.side = GRID * small.spec.geometry().patch * cell;
    let drawn = |device: &Device| {
        let drawn = Setup::new(device, &small, precision, CAPTION, seed)?.drawn(1)?;
        drawn.to_vec::<f32>()
    };
    Ok(relative_error(&drawn(device)?, &drawn(&Device::Cpu)?))
}

/// The error of decoding a small latent.
pub(super) fn decode_error(device: &Device, config: &VaeConfig, seed: u64) -> Result<f64> {
    let decoded = |device: &Device| {
        let vae = VaeDecoder::load(&RandomParams::vae(seed, config), device, config)?;
        let latent = random_f32(device, [1, LATENT, LATENT, config.cell_channels()], seed, 4)?;
        vae.decode(&latent)?.to_vec::<f32>()
    };
    Ok(relative_error(&decoded(device)?, &decoded(&Device::Cpu)?))
}
