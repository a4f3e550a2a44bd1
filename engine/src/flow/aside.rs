//! A copy of a walk's picture, which is read while the next step runs.

use std::ops::Range;

use crate::device::{Device, HostCopies};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Pictures of more bytes are not copied: where memory is what counts, whoever looks waits.
const MOST_BYTES: usize = 64 << 20;

/// A place for copies of one picture, one after the other.
pub(super) struct Aside {
    /// On CUDA, where a copy lies on the host.
    host: Option<(HostCopies, Range<usize>)>,
    /// f32, of the picture's shape.
    picture: Tensor,
}

impl Aside {
    /// A place for copies of `x`; `None` where they would be too large.
    ///
    /// # Errors
    /// When device or host have no room.
    pub(super) fn of(x: &Tensor) -> Result<Option<Self>> {
        if x.bytes() > MOST_BYTES {
            return Ok(None);
        }
        let host = match x.device() {
            Device::Cpu => None,
            Device::Cuda(device) => Some((
                HostCopies::new(&device, HostCopies::room_for(x.bytes()), &|| Ok(()))?,
                0..0,
            )),
        };
        let picture = Tensor::empty(&x.device(), x.shape(), x.dtype())?;
        Ok(Some(Aside { host, picture }))
    }

    /// Copies `x` as the work submitted so far leaves it. On CUDA the device goes on meanwhile. The last copy has to be read before.
    ///
    /// # Errors
    /// When the driver refuses.
    pub(super) fn set(&mut self, x: &Tensor) -> Result<()> {
        self.picture.copy_from(x)?;
        if let Some((copies, place)) = &mut self.host {
            copies.begin()?;
            *place = self.picture.copy_aside(copies)?;
            copies.end()?;
        }
        Ok(())
    }

    /// The values of the last copy, row-major; waits for it, and for no later work.
    ///
    /// # Errors
    /// When the device has failed, or there is no copy.
    pub(super) fn values(&self) -> Result<Vec<f32>> {
        let Some((copies, place)) = &self.host else {
            return self.picture.to_vec();
        };
        if place.is_empty() {
            return Err(Error::invalid("no picture was set aside"));
        }
        let mut values = Vec::with_capacity(self.picture.elements());
        copies.read(place.clone(), &mut |bytes| {
            values.extend(
                bytes
                    .chunks_exact(4)
                    .map(|bytes| f32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])),
            );
        })?;
        Ok(values)
    }
}
