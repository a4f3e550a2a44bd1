//! Copies of a model that may still be made while it is trained on.

use std::sync::{Arc, OnceLock};

use crate::device::{CudaDevice, Event, HostCopies, StreamMark};
use crate::error::Result;

/// The points in the device's work between which it stood still for copies.
pub(super) type Held = Arc<OnceLock<(Event, Event)>>;

/// Copies that may still be made of a model's memory. Nothing of it is changed or given back before they are.
#[derive(Default)]
pub(super) struct Copying(Option<Pending>);

struct Pending {
    /// The point after the last copy.
    made: Arc<StreamMark>,
    device: Arc<CudaDevice>,
    held: Held,
}

impl Copying {
    /// Those in `copies`, which are all submitted. For how long the device waits for them will stand in `held`.
    pub fn new(copies: &mut HostCopies, held: &Held) -> Result<Self> {
        Ok(Copying(Some(Pending {
            made: copies.end()?,
            device: copies.device().clone(),
            held: held.clone(),
        })))
    }

    /// What the device does from now on waits for the copies; the host does not.
    pub fn hold_device(&mut self) -> Result<()> {
        let Some(Pending { made, device, held }) = self.0.take() else {
            return Ok(());
        };
        let before = device.record_event()?;
        made.hold_device()?;
        // Set nowhere else, and a snapshot is waited for once.
        let _ = held.set((before, device.record_event()?));
        Ok(())
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        if let Some(Pending { made, .. }) = &self.0 {
            // A device that failed copies nothing any more.
            let _ = made.wait();
        }
    }
}
