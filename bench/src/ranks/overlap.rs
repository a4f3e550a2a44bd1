//! Whether operations between ranks run beside the computation.

use l2p_engine::dist::World;
use l2p_engine::ops::linear::linear;
use l2p_engine::{DType, Device, Result, Tensor};
use serde::Serialize;

use super::check::tensor;
use super::measure::samples;
use crate::inputs::random;
use crate::timing::median;

/// Elements that are exchanged, and the width of the products beside it.
struct Sizes {
    elements: usize,
    width: usize,
    products: usize,
}

/// Times in milliseconds of the same work alone and together.
#[derive(Debug, Serialize)]
pub struct Overlap {
    elements: usize,
    dtype: String,
    /// Matrix products alone.
    compute_ms: f64,
    /// reduce_scatter alone.
    exchange_ms: f64,
    /// Both, the exchange started first and waited for last.
    both_ms: f64,
    /// (compute + exchange − both) / the shorter of the two.
    hidden_share: f64,
}

impl Overlap {
    /// For people.
    pub fn lines(&self) -> String {
        format!(
            "overlap: products {:.3} ms, reduce_scatter of {} {} {:.3} ms, both {:.3} ms: {:.0} % of the shorter one hidden\n",
            self.compute_ms,
            self.elements,
            self.dtype,
            self.exchange_ms,
            self.both_ms,
            100.0 * self.hidden_share
        )
    }
}

/// Measures products and reduce_scatter, alone and together, and checks that the sum is right in the end.
pub fn measure(world: &World, device: &Device, repeats: usize) -> anyhow::Result<Overlap> {
    let (rank, ranks) = (world.rank(), world.size());
    let Sizes {
        elements,
        width,
        products,
    } = match device {
        Device::Cuda(_) => Sizes {
            elements: 32 << 20,
            width: 8192,
            products: 2,
        },
        Device::Cpu => Sizes {
            elements: 1 << 20,
            width: 256,
            products: 4,
        },
    };
    let dtype = DType::Bf16;
    let slice = elements.div_ceil(ranks);
    let parts = tensor(device, dtype, rank, 0, ranks * slice)?.into_shape([ranks, slice])?;
    let x = random(device, [1, width, width], 0, rank as u64)?;
    let weight = random(device, [width, width], 1, 0)?;
    let compute = || -> Result<Tensor> {
        let mut y = linear(&x, &weight, None)?;
        for _ in 1..products {
            y = linear(&x, &weight, None)?;
        }
        Ok(y)
    };
    let communicator = world.communicator();
    let exchange = || communicator.reduce_scatter(&parts);
    let compute_ms = median(&samples(world, device, repeats, &mut || compute().map(|_| ()))?);
    let exchange_ms = median(&samples(world, device, repeats, &mut || {
        exchange()?.wait(1.0).map(|_| ())
    })?);
    let mut sum = None;
    let both_ms = median(&samples(world, device, repeats, &mut || {
        let pending = exchange()?;
        let _y = compute()?;
        sum = Some(pending.wait(1.0)?);
        Ok(())
    })?);
    if let Some(sum) = &sum {
        super::check::expect("reduce_scatter beside products", sum, |index| {
            let place = rank * slice + index;
            (0..ranks)
                .map(|from| super::check::value(dtype, from, place))
                .fold(-0.0, |sum, value| sum + value)
        })?;
    }
    Ok(Overlap {
        elements: ranks * slice,
        dtype: dtype.to_string(),
        compute_ms,
        exchange_ms,
        both_ms,
        hidden_share: (compute_ms + exchange_ms - both_ms) / compute_ms.min(exchange_ms),
    })
}
