//! A copy, in host memory, of all that a checkpoint is made of, so that training goes on while it is written.
//!
//! The optimizer's arrays are copied as they lie, and the trained weights one behind the other; [`Layout`] alone says what lies where.
//! On CUDA the copies are made while the device computes: only the optimizer's next step waits for them, and the host never does. On
//! the CPU they are made at once.

use std::ops::Range;

use half::bf16;

use super::adamw::{Place, StateArray};
use super::copying::{Copying, Held};
use super::source::{StatePart, StateSource};
use super::trainable::TrainableModel;
use crate::device::{Device, HostCopies};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layers::NamedParameter;
use crate::tensor::Tensor;

/// Host memory for snapshots: taken once, used for one after the other.
pub struct SnapshotMemory(Area);

enum Area {
    /// Of a model on the CPU, whose elements are all f32.
    Plain(Vec<f32>),
    /// Of a model on a GPU.
    Pinned(HostCopies),
}

impl SnapshotMemory {
    /// Takes memory for a snapshot of `bytes` bytes ([`TrainableModel::snapshot_bytes`]) of a model on `device`, which may take
    /// seconds; steps may be taken meanwhile. `go_on` is asked again and again.
    ///
    /// # Errors
    /// Those of `go_on`, and when the system does not give the memory.
    pub fn new(device: &Device, bytes: usize, go_on: &dyn Fn() -> Result<()>) -> Result<Self> {
        go_on()?;
        Ok(SnapshotMemory(match device {
            Device::Cpu => {
                let mut elements = Vec::new();
                let reserved = elements.try_reserve_exact(bytes.div_ceil(DType::F32.size()));
                reserved.map_err(|error| Error::invalid(format!("no host memory for {bytes} bytes: {error}")))?;
                Area::Plain(elements)
            }
            Device::Cuda(device) => Area::Pinned(HostCopies::new(device, bytes, go_on)?),
        }))
    }

    /// Forgets what was copied; what comes next is of the device's work so far.
    fn begin(&mut self) -> Result<()> {
        match &mut self.0 {
            Area::Plain(elements) => {
                elements.clear();
                Ok(())
            }
            Area::Pinned(copies) => copies.begin(),
        }
    }

    fn add(&mut self, tensor: &Tensor) -> Result<Copied> {
        let place = match &mut self.0 {
            Area::Plain(elements) => {
                let start = elements.len();
                elements.extend_from_slice(tensor.as_slice::<f32>()?);
                start * DType::F32.size()..elements.len() * DType::F32.size()
            }
            Area::Pinned(copies) => tensor.copy_aside(copies)?,
        };
        let dtype = tensor.dtype();
        Ok(Copied { place, dtype })
    }

    /// Elements of what was copied. Waits for the copies.
    fn read(&self, copied: &Copied, elements: Range<usize>) -> Result<Vec<f32>> {
        let size = copied.dtype.size();
        let at = copied.place.start + elements.start * size..copied.place.start + elements.end * size;
        if at.end > copied.place.end {
            return Err(Error::invalid("a snapshot is read past the end of a tensor"));
        }
        match &self.0 {
            Area::Plain(values) => Ok(values[at.start / size..at.end / size].to_vec()),
            Area::Pinned(copies) => {
                let mut values = Vec::with_capacity(elements.len());
                copies.read(at, &mut |bytes| match copied.dtype {
                    DType::Bf16 => {
                        let halves: &[bf16] = bytemuck::cast_slice(bytes);
                        values.extend(halves.iter().map(|value| value.to_f32()));
                    }
                    _ => values.extend_from_slice(bytemuck::cast_slice(bytes)),
                })?;
                Ok(values)
            }
        }
    }
}

/// A tensor's copy: its bytes in the memory, and the type of its elements.
struct Copied {
    place: Range<usize>,
    dtype: DType,
}

/// What lies where in a snapshot.
struct Layout {
    /// By [`StateArray::ALL`]; those of them that are kept.
    arrays: [Option<Copied>; StateArray::ALL.len()],
    /// In each of the arrays: what of the trained parameters lies where.
    places: Vec<Place>,
    /// Whether that is a share of theirs, which other ranks complete.
    shared: bool,
    /// Of each trained parameter; empty where another rank writes the weights.
    weights: Vec<Copied>,
}

impl Layout {
    /// Whose copy holds elements of a part of trained parameter `trained`, and where these begin in it; `None` for what is not kept.
    fn find(&self, part: StatePart, trained: usize, first: usize) -> Option<(&Copied, usize)> {
        let kept = || {
            let array = part.array()?;
            let index = StateArray::ALL.iter().position(|other| *other == array)?;
            let place = Place::of(&self.places, trained)?;
            let start = place.offset + first.checked_sub(place.elements.start)?;
            Some((self.arrays[index].as_ref()?, start))
        };
        let weight = || self.weights.get(trained).map(|copied| (copied, first));
        match part {
            StatePart::Weight => weight(),
            // On the CPU the optimizer changes the weight itself.
            StatePart::Master => kept().or_else(weight),
            _ => kept(),
        }
    }
}

/// What a [`TrainableModel`] was; see the module's head comment.
pub struct Snapshot {
    metas: Vec<NamedParameter>,
    steps: u64,
    keeps_average: bool,
    layout: Layout,
    memory: SnapshotMemory,
    held: Held,
}

impl Snapshot {
    /// Steps that the model had done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Seconds for which the device stood still because its next step waited for the copies; 0 where there was none yet. Waits for
    /// the copies.
    ///
    /// # Errors
    /// The first error of the device's work before.
    pub fn held_seconds(&self) -> Result<f64> {
        match self.held.get() {
            None => Ok(0.0),
            Some((before, after)) => Ok(f64::from(before.milliseconds_to(after)?) / 1e3),
        }
    }

    /// The memory, for the next snapshot.
    pub fn into_memory(self) -> SnapshotMemory {
        self.memory
    }
}

impl StateSource for Snapshot {
    fn metas(&self) -> Vec<&NamedParameter> {
        self.metas.iter().collect()
    }

    fn keeps_average(&self) -> bool {
        self.keeps_average
    }

    fn share(&self) -> Option<&[Place]> {
        self.layout.shared.then_some(&self.layout.places)
    }

    fn values(&self, part: StatePart, trained: usize, elements: Range<usize>) -> Result<Option<Vec<f32>>> {
        match self.layout.find(part, trained, elements.start) {
            Some((copied, start)) => self.memory.read(copied, start..start + elements.len()).map(Some),
            None => Ok(None),
        }
    }
}

impl TrainableModel {
    /// Bytes of host memory that a snapshot takes.
    pub fn snapshot_bytes(&self) -> usize {
        let arrays = StateArray::ALL
            .into_iter()
            .filter_map(|array| self.optimizer.array(array));
        let tensors = arrays.chain(self.saved_weights());
        tensors.map(|tensor| HostCopies::room_for(tensor.bytes())).sum()
    }

    /// A snapshot in `memory`, which was taken for one of this model. Does not wait for the device.
    ///
    /// # Errors
    /// When the memory is too small or another device's, or the driver refuses.
    pub fn snapshot(&mut self, mut memory: SnapshotMemory) -> Result<Snapshot> {
        memory.begin()?;
        let mut arrays = [const { None }; StateArray::ALL.len()];
        for (copied, array) in arrays.iter_mut().zip(StateArray::ALL) {
            *copied = self.optimizer.array(array).map(|array| memory.add(array)).transpose()?;
        }
        let weights = self.saved_weights().into_iter().map(|weight| memory.add(weight));
        let weights = weights.collect::<Result<_>>()?;
        let held = Held::default();
        if let Area::Pinned(copies) = &mut memory.0 {
            self.copying = Copying::new(copies, &held)?;
        }
        Ok(Snapshot {
            metas: self.metas().into_iter().cloned().collect(),
            steps: self.steps(),
            keeps_average: self.keeps_average(),
            layout: Layout {
                arrays,
                places: self.optimizer.places().to_vec(),
                shared: self.share().is_some(),
                weights,
            },
            memory,
            held,
        })
    }
}
