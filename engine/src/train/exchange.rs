//! Gradients on their way between ranks, and updated weights back.
//!
//! Trained tensors are laid out in the order in which a backward pass finishes their gradients ([`Arena`]), in buckets. As soon as all
//! gradients of a bucket are there, which is in the middle of the backward pass, they are copied out of their places and sent: each rank
//! receives its slice of them from every rank and adds these up in f32, in the order of ranks. What travels is of the compute type, bf16
//! on GPUs and f32 on CPUs.
//!
//! With [`Sharding::Optimizer`] a rank keeps masters and moments of its slices alone, updates them, and weights are gathered from all
//! ranks, bucket by bucket. With [`Sharding::None`] the sums are gathered instead, and every rank updates everything; the sums, the norm
//! and the updates are the same, bit for bit. Tensors that are not trained are never sent.

mod division;
mod ring;

use std::collections::VecDeque;
use std::ops::Range;

use super::adamw::Place;
use crate::device::{Device, MemoryTag};
use crate::dist::{Arena, Bucket, Pending, Piece, World};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layers::Slot;
use crate::ops::sum_parts::sum_parts;
use crate::ops::sum_squares::sum_squares;
use crate::profile;
use crate::tensor::Tensor;
pub use division::{BUCKET_BYTES, Division, Ranks, Sharding};
use ring::{IN_FLIGHT, Ring};

/// A bucket that is being filled.
struct Filling {
    /// `[ranks · slice]`
    parts: Option<Tensor>,
    /// Its tensors that are not in it yet.
    missing: usize,
}

/// A bucket that is on its way.
struct Sent {
    bucket: usize,
    parts: Tensor,
    received: Pending,
}

/// Changes the weights whose optimizer state lies in a part of its arrays.
type Change<'a> = dyn FnMut(&mut [&mut Tensor], Range<usize>) -> Result<()> + 'a;

/// Weights that are being changed and gathered.
struct Renewal<'a, 'b, 'c> {
    weights: &'a mut [&'b mut Tensor],
    ring: Ring,
    change: &'a mut Change<'c>,
}

/// See the module's head comment. Tensors are known by their numbers among the trained ones.
pub(super) struct Exchange {
    ranks: Ranks,
    device: Device,
    arena: Arena,
    /// The trained tensor of each one in the arena, and the other way round.
    trained: Vec<usize>,
    place: Vec<usize>,
    /// The bucket of each tensor in the arena.
    bucket: Vec<usize>,
    /// What this rank keeps of them.
    pieces: Vec<Piece>,
    /// Elements of each bucket between and behind its tensors.
    gaps: Vec<Vec<Range<usize>>>,
    filling: Vec<Filling>,
    /// Tensors in the arena whose gradients were taken for this step.
    taken: Vec<bool>,
    sent: VecDeque<Sent>,
    ring: Ring,
    /// f32, the sums of this rank's slices.
    sums: Tensor,
    /// f32, those of all; without sharding.
    all_sums: Option<Tensor>,
}

impl Exchange {
    /// For trained tensors of `sizes` elements whose gradients are finished in the order `finished`.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(ranks: Ranks, device: &Device, sizes: &[usize], finished: &[usize]) -> Result<Self> {
        let in_order: Vec<usize> = finished.iter().map(|&trained| sizes[trained]).collect();
        let bucket = ranks.bucket_bytes.div_ceil(device.compute_dtype().size());
        let arena = Arena::new(&in_order, ranks.world.size(), bucket)?;
        let mut place = vec![0; sizes.len()];
        finished
            .iter()
            .enumerate()
            .for_each(|(number, &trained)| place[trained] = number);
        let mut bucket = vec![0; sizes.len()];
        for (number, one) in arena.buckets().iter().enumerate() {
            bucket[one.tensors.clone()].fill(number);
        }
        let longest = arena
            .buckets()
            .iter()
            .map(|bucket| bucket.shards.padded())
            .max()
            .unwrap_or(0);
        let _tag = MemoryTag::Gradients.scope();
        let all_sums = match ranks.sharding {
            Sharding::None => Some(Tensor::zeros(device, [arena.elements()], DType::F32)?),
            Sharding::Optimizer => None,
        };
        let mut exchange = Exchange {
            pieces: arena.pieces(ranks.world.rank()),
            gaps: gaps(&arena),
            sums: Tensor::zeros(device, [arena.kept()], DType::F32)?,
            all_sums,
            trained: finished.to_vec(),
            place,
            bucket,
            filling: Vec::new(),
            taken: Vec::new(),
            sent: VecDeque::new(),
            ring: Ring::new(device, longest)?,
            device: device.clone(),
            arena,
            ranks,
        };
        exchange.begin();
        Ok(exchange)
    }

    /// The ranks.
    pub fn world(&self) -> &World {
        &self.ranks.world
    }

    /// What of the trained tensors has its optimizer state here, and the elements of the state's arrays.
    pub fn state_places(&self) -> (Vec<Place>, usize) {
        match self.ranks.sharding {
            Sharding::Optimizer => {
                let places = self.pieces.iter().map(|piece| Place {
                    tensor: self.trained[piece.tensor],
                    elements: piece.elements.clone(),
                    offset: piece.kept,
                });
                (places.collect(), self.arena.kept())
            }
            Sharding::None => {
                let places = self
                    .arena
                    .tensors()
                    .iter()
                    .zip(&self.trained)
                    .map(|(range, &tensor)| Place {
                        tensor,
                        elements: 0..range.len(),
                        offset: range.start,
                    });
                (places.collect(), self.arena.elements())
            }
        }
    }

    /// Before the first gradient of a step.
    fn begin(&mut self) {
        self.filling = self
            .arena
            .buckets()
            .iter()
            .map(|bucket| Filling {
                parts: None,
                missing: bucket.tensors.len(),
            })
            .collect();
        self.taken = vec![false; self.trained.len()];
    }

    /// Takes the gradient of trained tensor `trained`, to which this step adds nothing more, and sets it to zero. Where it is the last
    /// of its bucket, the bucket is sent.
    ///
    /// # Errors
    /// When the device has no room, or a rank was lost.
    pub fn take(&mut self, trained: usize, gradient: &mut Tensor) -> Result<()> {
        let tensor = self.place[trained];
        if std::mem::replace(&mut self.taken[tensor], true) {
            return Err(Error::invalid("a gradient was finished twice in one step"));
        }
        let number = self.bucket[tensor];
        let bucket = &self.arena.buckets()[number];
        let filling = &mut self.filling[number];
        if filling.parts.is_none() {
            let parts = self.ring.part(&self.device, &[bucket.shards.padded()])?;
            filling.parts = Some(with_zeros(parts, &self.gaps[number])?);
        }
        if let Some(parts) = &mut filling.parts {
            parts.copy_elements_from(self.arena.tensors()[tensor].start - bucket.start, gradient)?;
        }
        gradient.set_zero()?;
        filling.missing -= 1;
        match filling.missing {
            0 => self.send(number),
            _ => Ok(()),
        }
    }

    fn send(&mut self, number: usize) -> Result<()> {
        let _range = profile::range(c"send gradients");
        let (ranks, slice) = (self.world().size(), self.arena.buckets()[number].shards.slice());
        if let Some(parts) = self.filling[number].parts.take() {
            let parts = parts.into_shape([ranks, slice])?;
            let target = self.ring.target(&self.device, &[ranks, slice])?;
            let received = self.world().communicator().all_to_all(&parts, target)?;
            self.sent.push_back(Sent {
                bucket: number,
                parts,
                received,
            });
        }
        while self.sent.len() >= IN_FLIGHT {
            self.receive()?;
        }
        Ok(())
    }

    /// Adds up the oldest bucket that is on its way.
    fn receive(&mut self) -> Result<()> {
        let Some(sent) = self.sent.pop_front() else {
            return Ok(());
        };
        let received = sent.received.wait()?;
        sum_parts(
            &received,
            1.0,
            &mut self.sums,
            self.arena.buckets()[sent.bucket].kept_at,
        )?;
        self.ring.parts.push(sent.parts);
        self.ring.received.push(received);
        Ok(())
    }

    /// Takes the gradients that no backward pass has finished, and waits for all sums. Returns the sums that belong to the elements of the
    /// optimizer's state, to be let go before the next step, and what each rank adds to the square of their norm.
    ///
    /// # Errors
    /// As for [`Exchange::take`].
    pub fn finish(&mut self, gradients: &mut [&mut Tensor]) -> Result<(Tensor, Tensor)> {
        let _range = profile::range(c"exchange");
        for tensor in 0..self.taken.len() {
            if !self.taken[tensor] {
                let trained = self.trained[tensor];
                self.take(trained, gradients[trained])?;
            }
        }
        while !self.sent.is_empty() {
            self.receive()?;
        }
        self.begin();
        let ranks = self.world().size();
        let squares = Tensor::empty(&self.device, [ranks, 1], DType::F32)?;
        let own = sum_squares(&self.sums)?;
        let squares = self.world().communicator().all_gather(&own, squares)?.wait()?;
        let squares = squares.into_shape([ranks])?;
        if self.all_sums.is_some() {
            self.gather_sums()?;
        }
        Ok((self.all_sums.as_ref().unwrap_or(&self.sums).clone(), squares))
    }

    fn gather_sums(&mut self) -> Result<()> {
        let Some(mut all) = self.all_sums.take() else {
            return Ok(());
        };
        let outcome = self.gather(
            &mut all,
            |exchange, _, bucket| exchange.own_part(&exchange.sums, bucket),
            |_, all, bucket, [_, whole]| all.copy_elements_from(bucket.start, &whole),
        );
        self.all_sums = Some(all);
        outcome
    }

    /// Gathers what `own` gives of this rank's slice of every bucket, and hands each bucket to `put`; a few are on their way at a time.
    fn gather<C>(
        &self,
        context: &mut C,
        own: impl Fn(&Self, &mut C, &Bucket) -> Result<(Tensor, Tensor)>,
        put: impl Fn(&Self, &mut C, &Bucket, [Tensor; 2]) -> Result<()>,
    ) -> Result<()> {
        let mut started: VecDeque<(&Bucket, Tensor, Pending)> = VecDeque::new();
        let oldest = |started: &mut VecDeque<(&Bucket, Tensor, Pending)>, context: &mut C| match started.pop_front() {
            Some((bucket, part, whole)) => {
                let whole = whole.wait()?.into_shape([bucket.shards.padded()])?;
                put(self, context, bucket, [part, whole])
            }
            None => Ok(()),
        };
        for bucket in self.arena.buckets() {
            let (part, whole) = own(self, context, bucket)?;
            let whole = self.world().communicator().all_gather(&part, whole)?;
            started.push_back((bucket, part, whole));
            if started.len() == IN_FLIGHT {
                oldest(&mut started, context)?;
            }
        }
        while !started.is_empty() {
            oldest(&mut started, context)?;
        }
        Ok(())
    }

    /// A part of an f32 array of the optimizer's state, and where to gather it.
    fn own_part(&self, array: &Tensor, bucket: &Bucket) -> Result<(Tensor, Tensor)> {
        let slice = bucket.shards.slice();
        let whole = Tensor::empty(&self.device, [self.world().size(), slice], DType::F32)?;
        Ok((array.narrow(bucket.kept_at, slice)?, whole))
    }

    /// The whole of an array of the optimizer's state, of which each rank keeps a part, on the host of the first rank: the values of each
    /// trained tensor. Empty on the others.
    ///
    /// # Errors
    /// When a rank was lost.
    pub fn gather_state(&self, array: &Tensor) -> Result<Vec<Vec<f32>>> {
        let tensors = self.arena.tensors();
        let mut all: Vec<Vec<f32>> = vec![Vec::new(); tensors.len()];
        self.gather(
            &mut all,
            |exchange, _, bucket| exchange.own_part(array, bucket),
            |exchange, all, bucket, [_, whole]| {
                for tensor in bucket.tensors.clone().filter(|_| exchange.world().is_first()) {
                    let range = &tensors[tensor];
                    let values = whole.narrow(range.start - bucket.start, range.len())?;
                    all[exchange.trained[tensor]] = values.to_vec::<f32>()?;
                }
                Ok(())
            },
        )?;
        Ok(all)
    }

    /// Whether each rank keeps a part of the optimizer's state alone.
    pub fn shards(&self) -> bool {
        self.ranks.sharding == Sharding::Optimizer
    }

    /// Has all trained weights changed: `change` those whose state lies in a part of the optimizer's arrays, the other ranks theirs, which
    /// are brought here. A bucket travels while the next ones are changed.
    ///
    /// # Errors
    /// Those of `change`; when the device has no room, or a rank was lost.
    pub fn renew_weights(&mut self, weights: &mut [&mut Tensor], change: &mut Change<'_>) -> Result<()> {
        if self.ranks.sharding == Sharding::None {
            return change(weights, 0..self.arena.elements());
        }
        let _range = profile::range(c"renew weights");
        let mut context = Renewal {
            weights,
            ring: std::mem::take(&mut self.ring),
            change,
        };
        let outcome = self.gather(&mut context, Self::own_weights, Self::put_weights);
        self.ring = context.ring;
        outcome
    }

    /// This rank's slice of a bucket of weights, and where to gather them.
    fn own_weights(&self, renewal: &mut Renewal<'_, '_, '_>, bucket: &Bucket) -> Result<(Tensor, Tensor)> {
        let Renewal { weights, ring, change } = renewal;
        let slice = bucket.shards.slice();
        change(weights, bucket.kept_at..bucket.kept_at + slice)?;
        let mut part = ring.part(&self.device, &[slice])?;
        for piece in self
            .pieces
            .iter()
            .filter(|piece| bucket.tensors.contains(&piece.tensor))
        {
            let weight = &weights[self.trained[piece.tensor]];
            let flat = weight.reshape([weight.elements()])?;
            let own = flat.narrow(piece.elements.start, piece.elements.len())?;
            part.copy_elements_from(piece.kept - bucket.kept_at, &own)?;
        }
        let whole = ring.target(&self.device, &[self.world().size(), slice])?;
        Ok((part, whole))
    }

    /// Overwrites the weights of a bucket with what was gathered.
    fn put_weights(
        &self,
        Renewal { weights, ring, .. }: &mut Renewal<'_, '_, '_>,
        bucket: &Bucket,
        [part, whole]: [Tensor; 2],
    ) -> Result<()> {
        for tensor in bucket.tensors.clone() {
            let range = &self.arena.tensors()[tensor];
            let values = whole.narrow(range.start - bucket.start, range.len())?;
            weights[self.trained[tensor]].copy_elements_from(0, &values)?;
        }
        ring.parts.push(part);
        ring.received.push(whole);
        Ok(())
    }
}

/// Takes the gradients of a part of a model that are finished: `trained` says of every parameter which of the trained ones it is.
pub(super) fn take_part(
    exchange: &mut Exchange,
    trained: &[Option<usize>],
    first: usize,
    slots: Vec<&mut Slot>,
) -> Result<()> {
    for (number, slot) in (first..).zip(slots) {
        if let (Some(trained), Some(gradient)) = (trained[number], slot) {
            exchange.take(trained, gradient)?;
        }
    }
    Ok(())
}

/// A bucket whose elements have no value yet, with zeros in its gaps.
fn with_zeros(mut bucket: Tensor, gaps: &[Range<usize>]) -> Result<Tensor> {
    let longest = gaps.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
    let zeros = Tensor::zeros(&bucket.device(), [longest], bucket.dtype())?;
    for gap in gaps {
        bucket.copy_elements_from(gap.start, &zeros.narrow(0, gap.len())?)?;
    }
    Ok(bucket)
}

fn gaps(arena: &Arena) -> Vec<Vec<Range<usize>>> {
    let of_bucket = |bucket: &Bucket| {
        let mut gaps = Vec::new();
        let mut end = 0;
        for tensor in &arena.tensors()[bucket.tensors.clone()] {
            let start = tensor.start - bucket.start;
            gaps.push(end..start);
            end = start + tensor.len();
        }
        gaps.push(end..bucket.shards.padded());
        gaps.retain(|gap: &Range<usize>| !gap.is_empty());
        gaps
    };
    arena.buckets().iter().map(of_bucket).collect()
}
