//! What of a picture is known, and held on the way down a schedule while the rest is drawn.

use crate::error::Result;
use crate::ops::hold_known::hold_known;
use crate::tensor::Tensor;

/// After each step the walk is brought back to it: where the mask says so, to the known picture with as much of the noise as the step's
/// level has, and at the end to the picture itself.
pub struct Held {
    /// f32 `[1, height, width, channels]`
    pub known: Tensor,
    /// What the walk's noise was, of the shape of the pictures that are drawn.
    pub noise: Tensor,
    /// u8 `[1, height, width, 1]`: how much of a place may change, of 255.
    pub mask: Tensor,
}

impl Held {
    /// Brings pictures back to what is known, at a level with so much of picture and noise.
    pub(super) fn hold(&self, x: &mut Tensor, mix: [f32; 2]) -> Result<()> {
        hold_known(x, &self.known, &self.noise, &self.mask, mix)
    }
}

/// What a walk begins with.
pub struct Beginning {
    /// f32 `[batch, height, width, channels]`: noise, or what is left of a picture in it.
    pub noise: Tensor,
    /// What is held on the way, if anything.
    pub held: Option<Held>,
}

impl From<Tensor> for Beginning {
    fn from(noise: Tensor) -> Self {
        Beginning { noise, held: None }
    }
}
