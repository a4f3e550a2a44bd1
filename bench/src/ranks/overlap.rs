//! Whether operations between ranks run beside the computation.

use l2p_engine::dist::World;
use l2p_engine::ops::linear::linear;
use l2p_engine::{DType, Device, Result, Tensor};
use serde::Serialize;

use super::check::{tensor, travelling};
use super::measure::{kept, samples};
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
    /// all_to_all alone, between memory that communicators give.
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
            "overlap: products {:.3} ms, all_to_all of {} {} {:.3} ms, both {:.3} ms: {:.0} % of the shorter one hidden\n",
            self.compute_ms,
            self.elements,
            self.dtype,
            self.exchange_ms,
            self.both_ms,
            100.0 * self.hidden_share
        )
    }
}

/// Measures products and all_to_all, alone and together, and checks that what arrived is right in the end.
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
    let communicator = world.communicator();
    let parts = travelling(
        world,
        &tensor(device, dtype, rank, 0, ranks * slice)?.into_shape([ranks, slice])?,
    )?;
    // Owned by an operation while it runs, and kept for the next.
    let mut target = Some(communicator.buffer(device, parts.shape(), dtype)?);
    let x = random(device, [1, width, width], 0, rank as u64)?;
    let weight = random(device, [width, width], 1, 0)?;
    let compute = || -> Result<Tensor> {
        let mut y = linear(&x, &weight, None)?;
        for _ in 1..products {
            y = linear(&x, &weight, None)?;
        }
        Ok(y)
    };
    let mut beside = |compute: &dyn Fn() -> Result<()>| -> Result<()> {
        let receive = target.take().ok_or_else(kept)?;
        let pending = communicator.all_to_all(&parts, receive)?;
        compute()?;
        target = Some(pending.wait()?);
        Ok(())
    };
    let compute_ms = median(&samples(world, device, repeats, &mut || compute().map(|_| ()))?);
    let exchange_ms = median(&samples(world, device, repeats, &mut || beside(&|| Ok(())))?);
    let both_ms = median(&samples(world, device, repeats, &mut || {
        beside(&|| compute().map(|_| ()))
    })?);
    let received = target.ok_or_else(kept)?;
    super::check::expect("all_to_all beside products", &received, |index| {
        super::check::value(dtype, index / slice, rank * slice + index % slice)
    })?;
    Ok(Overlap {
        elements: ranks * slice,
        dtype: dtype.to_string(),
        compute_ms,
        exchange_ms,
        both_ms,
        hidden_share: (compute_ms + exchange_ms - both_ms) / compute_ms.min(exchange_ms),
    })
}
