//! Where the kernels find tensors, their gradients and their state.

use std::ops::Range;
use std::sync::Arc;

use super::Place;
use super::update::Source;
use crate::device::{CudaDevice, Device};
use crate::error::Result;
use crate::tensor::Tensor;

/// What the kernels know of the tensors.
pub(super) struct Table {
    /// One [`Segment`] per place: where it was when it was stepped last.
    known: Vec<Segment>,
    /// The same on the device.
    pub segments: Tensor,
    /// i32, the segment of each chunk.
    pub segment_of_chunk: Tensor,
    pub chunks: usize,
}

/// As in `adamw.cu`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
struct Segment {
    weight: u64,
    gradient: u64,
    offset: u64,
    elements: u64,
    first_chunk: u64,
}

impl Table {
    /// That of these places.
    pub fn new(device: &Device, cuda: &Arc<CudaDevice>, places: &[Place]) -> Result<Self> {
        let chunk = cuda.kernel("adamw", "adamw_step")?.info().tile[0] as usize;
        let mut known = Vec::with_capacity(places.len());
        let mut segment_of_chunk = Vec::new();
        for (index, place) in places.iter().enumerate() {
            let elements = place.elements.len();
            known.push(Segment {
                weight: 0,
                gradient: 0,
                offset: place.offset as u64,
                elements: elements as u64,
                first_chunk: segment_of_chunk.len() as u64,
            });
            segment_of_chunk.extend(std::iter::repeat_n(index as i32, elements.div_ceil(chunk)));
        }
        let bytes: &[u8] = bytemuck::cast_slice(&known);
        Ok(Table {
            segments: Tensor::from_slice(device, bytes, [bytes.len()])?,
            chunks: segment_of_chunk.len(),
            segment_of_chunk: Tensor::from_slice(device, &segment_of_chunk, [segment_of_chunk.len()])?,
            known,
        })
    }

    /// Notes where the tensors of a step are; they are of the sizes in the table.
    pub fn find(
        &mut self,
        places: &[Place],
        weights: &mut [&mut Tensor],
        gradients: &mut Source<'_, '_>,
    ) -> Result<()> {
        let mut found = self.known.clone();
        for (segment, place) in found.iter_mut().zip(places) {
            let weight = &mut weights[place.tensor];
            segment.weight = weight.device_ptr_mut()? + (place.elements.start * weight.dtype().size()) as u64;
            segment.gradient = match gradients {
                Source::Slots(gradients) => {
                    let gradient = &mut gradients[place.tensor];
                    gradient.device_ptr_mut()? + (place.elements.start * gradient.dtype().size()) as u64
                }
                Source::Sums(sums) => sums.device_ptr()? + (place.offset * sums.dtype().size()) as u64,
            };
        }
        if found != self.known {
            self.segments.copy_from_slice::<u8>(bytemuck::cast_slice(&found))?;
            self.known = found;
        }
        Ok(())
    }

    /// The chunks of the places whose numbers these are.
    pub fn chunks_of(&self, places: &Range<usize>) -> Range<usize> {
        let start = |place: usize| match self.known.get(place) {
            Some(segment) => segment.first_chunk as usize,
            None => self.chunks,
        };
        start(places.start)..start(places.end)
    }
}
