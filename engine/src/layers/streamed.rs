//! Weights that stay in host memory: those of some of a model's blocks, whose linear layers find them on the GPU when it is their turn.
//!
//! A block's weights lie one after the other in the host's memory and, while it runs, in one of the places on the GPU
//! ([`HostBlocks`]). A weight's tensor is a view of its block's place; layers know nothing of this. Whoever runs the blocks takes a
//! [`Pass`] and says before and after which.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Group, NamedParameter, Weight};
use crate::device::{CudaDevice, Device, HostBlocks, MemoryTag, PLACES};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Bytes to whose multiples weights are aligned.
const ALIGNMENT: usize = 256;

/// Which blocks of a model have their weights in host memory: so many of all, as far from each other as that allows, so that each copy
/// has the time of the blocks between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spread {
    streamed: usize,
    blocks: usize,
}

impl Spread {
    /// `streamed` of `blocks`; `None` for none.
    ///
    /// # Errors
    /// When there are not as many.
    pub fn of(streamed: usize, blocks: usize) -> Result<Option<Self>> {
        match streamed <= blocks {
            true => Ok((streamed > 0).then_some(Spread { streamed, blocks })),
            false => Err(Error::invalid(format!(
                "{streamed} blocks are to stay in host memory, but there are {blocks}"
            ))),
        }
    }

    /// The block's number among those in host memory, if it is one of them.
    pub fn place(&self, block: usize) -> Option<usize> {
        let before = |block: usize| block * self.streamed / self.blocks;
        (block < self.blocks && before(block + 1) > before(block)).then(|| before(block))
    }

    /// The blocks in host memory, in their order.
    pub fn chosen(&self) -> impl Iterator<Item = usize> + use<> {
        let spread = *self;
        (0..self.blocks).filter(move |&block| spread.place(block).is_some())
    }
}

/// Weights in host memory; see the module's head comment.
pub struct Streamed {
    spread: Spread,
    /// Bytes.
    places: Tensor,
    stride: usize,
    state: Mutex<State>,
}

struct State {
    blocks: HostBlocks,
    /// By block, bytes that are filled.
    filled: Vec<usize>,
}

/// The bytes that a tensor of `bytes` bytes takes in a block.
pub fn room_for(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// The block, counted through the model, with which a weight is brought to the device; `None` for what is needed at other times.
pub fn block_of(meta: &NamedParameter) -> Option<usize> {
    match meta.group {
        Group::Block { index, .. } | Group::Layer { index } if !meta.precise => Some(index),
        _ => None,
    }
}

impl Streamed {
    /// Takes memory on the host for these blocks, of which `sizes` are the bytes, and places for some of them on the device.
    ///
    /// # Errors
    /// When the host or the device has too little memory.
    pub fn new(device: &Arc<CudaDevice>, spread: Spread, sizes: &[usize]) -> Result<Self> {
        let stride = sizes.iter().copied().max().unwrap_or(0);
        let _tag = MemoryTag::Weights.scope();
        let places = stride * PLACES.min(sizes.len());
        Ok(Streamed {
            spread,
            places: Tensor::empty(&Device::Cuda(device.clone()), [places], DType::U8)?,
            stride,
            state: Mutex::new(State {
                blocks: HostBlocks::new(device, sizes, stride)?,
                filled: vec![0; sizes.len()],
            }),
        })
    }

    /// `weight` in the host's memory if it belongs to one of the blocks, and a view of its place; as it is otherwise.
    ///
    /// # Errors
    /// When a copy fails, or the block holds more than was said.
    pub fn keep(&self, meta: &NamedParameter, weight: Weight) -> Result<Weight> {
        let Some(block) = block_of(meta).and_then(|block| self.spread.place(block)) else {
            return Ok(weight);
        };
        weight.map(|tensor| self.keep_tensor(block, tensor))
    }

    fn keep_tensor(&self, block: usize, tensor: &Tensor) -> Result<Tensor> {
        let mut state = self.lock();
        let State { blocks, filled } = &mut *state;
        let (at, bytes) = (filled[block], tensor.bytes());
        if at + bytes > self.stride {
            return Err(Error::invalid(format!(
                "block {block} in host memory has no room for its weights"
            )));
        }
        blocks.keep(block, at, tensor.device_ptr()?, bytes)?;
        filled[block] = at + room_for(bytes);
        self.places
            .view_of_bytes(block % PLACES * self.stride + at, tensor.shape(), tensor.dtype())
    }

    /// Begins to run the model's blocks.
    ///
    /// # Errors
    /// When a copy cannot be submitted.
    pub fn pass(&self) -> Result<Pass<'_>> {
        let mut state = self.lock();
        let places = self.places.device_ptr()?;
        state.blocks.begin(places)?;
        Ok(Pass {
            state,
            spread: self.spread,
            places,
        })
    }

    /// Bytes of host memory.
    pub fn host_bytes(&self) -> u64 {
        self.lock().blocks.host_bytes()
    }

    /// The blocks whose weights are in host memory.
    pub fn spread(&self) -> Spread {
        self.spread
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One run through a model's blocks. If it is not ended, because of an error, the next one begins anew.
pub struct Pass<'a> {
    state: MutexGuard<'a, State>,
    spread: Spread,
    places: u64,
}

impl Pass<'_> {
    /// What is submitted from now on finds the weights of main block `block`.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn before(&mut self, block: usize) -> Result<()> {
        match self.spread.place(block) {
            Some(block) => self.state.blocks.before(block),
            None => Ok(()),
        }
    }

    /// All that uses the weights of main block `block` was submitted.
    ///
    /// # Errors
    /// When a copy cannot be submitted.
    pub fn after(&mut self, block: usize) -> Result<()> {
        match self.spread.place(block) {
            Some(block) => self.state.blocks.after(block, self.places),
            None => Ok(()),
        }
    }

    /// Ends the run, and whatever follows waits for the copies that the next one begins with.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn end(mut self) -> Result<()> {
        self.state.blocks.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As many as asked for, numbered in their order, and no two gaps that differ by more than one.
    #[test]
    fn blocks_in_host_memory_are_spread_over_the_model() {
        for blocks in 1..=36 {
            assert_eq!(Spread::of(0, blocks).unwrap(), None);
            for streamed in 1..=blocks {
                let spread = Spread::of(streamed, blocks).unwrap().unwrap();
                let chosen: Vec<usize> = spread.chosen().collect();
                let places: Vec<usize> = chosen.iter().filter_map(|&block| spread.place(block)).collect();
                assert_eq!(places, (0..streamed).collect::<Vec<_>>());
                // The next pass begins where this one ends.
                let next = chosen.iter().skip(1).copied().chain([chosen[0] + blocks]);
                let gaps: Vec<usize> = chosen.iter().zip(next).map(|(block, next)| next - block).collect();
                let [least, most] = [gaps.iter().min(), gaps.iter().max()].map(|gap| *gap.unwrap());
                assert!(most - least <= 1, "{streamed} of {blocks}: {chosen:?}");
            }
            assert_eq!(Spread::of(1, blocks).unwrap().unwrap().place(blocks), None);
            assert!(Spread::of(blocks + 1, blocks).is_err());
        }
    }
}
