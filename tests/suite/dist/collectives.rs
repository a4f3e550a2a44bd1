//! Every operation equals a plain loop, bit for bit, whatever the number of ranks and elements.

use half::bf16;
use l2p_engine::dist::{Communicator, Shards, World};
use l2p_engine::{DType, Device, Element, Result, Tensor};
use l2p_tests::{Outcome, Suite, hash_uniform_seeded};

use super::all_ranks;

pub fn register(suite: &mut Suite) {
    suite.cpu("dist::collectives::all_to_all", all_to_all);
    suite.cpu("dist::collectives::all_gather", all_gather);
    suite.cpu("dist::collectives::broadcast", broadcast);
    suite.cpu("dist::collectives::sums_in_the_order_of_ranks", sums);
    suite.cpu("dist::collectives::sharded_sums_equal_whole_ones", sharded);
    suite.cpu("dist::collectives::more_than_a_connection_holds", large);
    suite.cpu("dist::collectives::many_at_once_keep_their_order", many_at_once);
    suite.cpu("dist::collectives::arguments_are_checked_at_the_door", arguments);
    suite.cpu("dist::collectives::a_world_of_one_copies", solo);
}

/// Numbers of elements for each rank: none, odd ones, and some that fill several buffers.
const SIZES: [usize; 8] = [0, 1, 3, 7, 8, 9, 1000, 70_001];

const WORLDS: [usize; 4] = [1, 2, 3, 4];

fn values(name: &str, rank: usize, count: usize) -> Vec<f32> {
    hash_uniform_seeded(name, rank as u64, count)
}

/// A tensor of another type's worth of these values, and its bits.
trait Wire: Element + PartialEq + std::fmt::Debug {
    fn of(value: f32) -> Self;
    fn wide(self) -> f32;

    fn all(values: &[f32]) -> Vec<Self> {
        values.iter().map(|value| Self::of(*value)).collect()
    }
}

impl Wire for f32 {
    fn of(value: f32) -> Self {
        value
    }
    fn wide(self) -> f32 {
        self
    }
}

impl Wire for bf16 {
    fn of(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn wide(self) -> f32 {
        self.to_f32()
    }
}

impl Wire for i32 {
    fn of(value: f32) -> Self {
        value.to_bits() as i32
    }
    fn wide(self) -> f32 {
        self as f32
    }
}

impl Wire for u8 {
    fn of(value: f32) -> Self {
        value.to_bits() as u8
    }
    fn wide(self) -> f32 {
        f32::from(self)
    }
}

/// `test` for every number of ranks and elements, with all ranks in one world for each number.
fn everywhere(test: impl Fn(&World, usize) -> Result<()> + Sync) -> Outcome {
    for world in WORLDS {
        all_ranks(world, |ranks| {
            for size in SIZES {
                test(&ranks, size)?;
            }
            ranks.leave()
        })?;
    }
    Ok(())
}

fn exchanged<T: Wire>(ranks: &World, size: usize) -> Result<()> {
    let (rank, world) = (ranks.rank(), ranks.size());
    let sent = |from: usize| T::all(&values("all_to_all", from, world * size));
    let parts = Tensor::from_slice(&Device::Cpu, &sent(rank), [world, size])?;
    let receive = Tensor::empty(&Device::Cpu, [world, size], T::DTYPE)?;
    let received = ranks.communicator().all_to_all(&parts, receive)?.wait()?;
    let expected: Vec<T> = (0..world)
        .flat_map(|from| sent(from)[rank * size..][..size].to_vec())
        .collect();
    assert_eq!(
        received.as_slice::<T>()?,
        expected,
        "{size} elements, rank {rank} of {world}"
    );
    Ok(())
}

fn all_to_all() -> Outcome {
    everywhere(|ranks, size| {
        exchanged::<f32>(ranks, size)?;
        exchanged::<bf16>(ranks, size)?;
        exchanged::<i32>(ranks, size)?;
        exchanged::<u8>(ranks, size)
    })
}

fn gathered<T: Wire>(ranks: &World, size: usize) -> Result<()> {
    let (rank, world) = (ranks.rank(), ranks.size());
    let part = |from: usize| T::all(&values("all_gather", from, size));
    let own = Tensor::from_slice(&Device::Cpu, &part(rank), [size])?;
    let receive = Tensor::empty(&Device::Cpu, [world, size], T::DTYPE)?;
    let received = ranks.communicator().all_gather(&own, receive)?.wait()?;
    let expected: Vec<T> = (0..world).flat_map(part).collect();
    assert_eq!(
        received.as_slice::<T>()?,
        expected,
        "{size} elements, rank {rank} of {world}"
    );
    Ok(())
}

fn all_gather() -> Outcome {
    everywhere(|ranks, size| {
        gathered::<f32>(ranks, size)?;
        gathered::<bf16>(ranks, size)
    })
}

fn sent_out<T: Wire>(ranks: &World, size: usize, root: usize) -> Result<()> {
    let value = |from: usize| T::all(&values("broadcast", from, size));
    let own = Tensor::from_slice(&Device::Cpu, &value(ranks.rank()), [size])?;
    let mut received = ranks.communicator().broadcast(own, root)?.wait()?;
    assert_eq!(received.as_slice::<T>()?, value(root), "{size} elements from {root}");
    // Nobody else holds it.
    received.as_mut_slice::<T>()?;
    Ok(())
}

fn broadcast() -> Outcome {
    everywhere(|ranks, size| {
        for root in 0..ranks.size() {
            sent_out::<f32>(ranks, size, root)?;
            sent_out::<bf16>(ranks, size, root)?;
        }
        Ok(())
    })
}

/// `factor` times the sum over ranks, one addition after the other.
fn plain_sum<T: Wire>(world: usize, factor: f32, part: impl Fn(usize) -> Vec<T>) -> Vec<f32> {
    let mut sum: Vec<f32> = part(0).into_iter().map(T::wide).collect();
    for rank in 1..world {
        sum.iter_mut()
            .zip(part(rank))
            .for_each(|(sum, value)| *sum += value.wide());
    }
    sum.iter().map(|sum| sum * factor).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn summed<T: Wire>(ranks: &World, size: usize) -> Result<()> {
    const FACTOR: f32 = 0.3;
    let (rank, world) = (ranks.rank(), ranks.size());
    let communicator = ranks.communicator();
    let parts = |from: usize| T::all(&values("parts", from, world * size));
    let own = Tensor::from_slice(&Device::Cpu, &parts(rank), [world, size])?;
    let expected = plain_sum(world, FACTOR, |from| parts(from)[rank * size..][..size].to_vec());
    let sum = communicator.reduce_scatter(&own)?.wait(FACTOR)?;
    assert_eq!(
        bits(sum.as_slice()?),
        bits(&expected),
        "{size} elements, rank {rank} of {world}"
    );

    let mut target = Tensor::from_slice(&Device::Cpu, &vec![7.0f32; size + 5], [size + 5])?;
    communicator.reduce_scatter(&own)?.wait_into(FACTOR, &mut target, 3)?;
    let target = target.as_slice::<f32>()?;
    assert_eq!(bits(&target[3..3 + size]), bits(&expected));
    assert!(target[..3].iter().chain(&target[3 + size..]).all(|value| *value == 7.0));

    let whole = |from: usize| T::all(&values("whole", from, size));
    let own = Tensor::from_slice(&Device::Cpu, &whole(rank), [1, size])?;
    let sum = communicator.all_reduce(&own, FACTOR)?;
    assert_eq!(sum.shape(), own.shape());
    assert_eq!(
        bits(sum.as_slice()?),
        bits(&plain_sum(world, FACTOR, whole)),
        "{size} elements of {world}"
    );
    Ok(())
}

fn sums() -> Outcome {
    everywhere(|ranks, size| {
        summed::<f32>(ranks, size)?;
        summed::<bf16>(ranks, size)
    })
}

/// What each rank sums of its slice is what the sum of everything has there.
fn sharded() -> Outcome {
    for world in WORLDS {
        all_ranks(world, |ranks| {
            for size in SIZES {
                let shards = Shards::new(size, world);
                let mut padded = values("gradients", ranks.rank(), size);
                let whole = Tensor::from_slice(&Device::Cpu, &padded, [size])?;
                padded.resize(shards.padded(), f32::NAN);
                let parts = Tensor::from_slice(&Device::Cpu, &padded, [world, shards.slice()])?;
                let communicator = ranks.communicator();
                let slice = communicator.reduce_scatter(&parts)?.wait(0.25)?;
                let all = communicator.all_reduce(&whole, 0.25)?;
                let range = shards.range(ranks.rank());
                let slice = &slice.as_slice::<f32>()?[..range.len()];
                assert_eq!(bits(slice), bits(&all.as_slice::<f32>()?[range]));
            }
            ranks.leave()
        })?;
    }
    Ok(())
}

/// All ranks send megabytes to all others before any of them can have read them.
fn large() -> Outcome {
    const ROW: usize = 3_000_001;
    all_ranks(3, |ranks| {
        let sent: Vec<u8> = (0..3 * ROW).map(|index| (index * 7 + ranks.rank()) as u8).collect();
        let parts = Tensor::from_slice(&Device::Cpu, &sent, [3, ROW])?;
        let receive = Tensor::empty(&Device::Cpu, [3, ROW], DType::U8)?;
        let received = ranks.communicator().all_to_all(&parts, receive)?.wait()?;
        let rank = ranks.rank();
        for (from, row) in received.as_slice::<u8>()?.chunks_exact(ROW).enumerate() {
            let wrong = row
                .iter()
                .enumerate()
                .position(|(index, value)| *value != ((rank * ROW + index) * 7 + from) as u8);
            assert_eq!(wrong, None, "of rank {from}");
        }
        ranks.leave()
    })?;
    Ok(())
}

fn many_at_once() -> Outcome {
    all_ranks(4, |ranks| {
        let communicator = ranks.communicator();
        let start = |number: usize| {
            let part = Tensor::from_slice(&Device::Cpu, &[number as f32, ranks.rank() as f32], [2])?;
            let pending = communicator.all_gather(&part, Tensor::empty(&Device::Cpu, [4, 2], DType::F32)?)?;
            Ok((part, pending))
        };
        let started = (0..50).map(start).collect::<Result<Vec<_>>>()?;
        // The last first, and some not at all.
        for (number, (mut part, pending)) in started.into_iter().enumerate().rev() {
            if number % 7 == 3 {
                continue;
            }
            let received = pending.wait()?;
            let expected: Vec<f32> = (0..4).flat_map(|rank| [number as f32, rank as f32]).collect();
            assert_eq!(received.as_slice::<f32>()?, expected);
            // What was sent is free again.
            part.as_mut_slice::<f32>()?[0] = -1.0;
        }
        ranks.leave()
    })?;
    Ok(())
}

fn refusal(outcome: Result<impl Sized>) -> String {
    match outcome {
        Ok(_) => "it was accepted".into(),
        Err(error) => error.to_string(),
    }
}

fn arguments() -> Outcome {
    all_ranks(2, |ranks| {
        let communicator: &dyn Communicator = ranks.communicator();
        let tensor = |shape: &[usize]| Tensor::zeros(&Device::Cpu, shape, DType::F32);
        let message = refusal(communicator.all_to_all(&tensor(&[3, 4])?, tensor(&[3, 4])?));
        assert!(
            message.starts_with("all_to_all: parts has shape [3, 4], expected [2, …]"),
            "{message}"
        );
        let message = refusal(communicator.all_to_all(&tensor(&[2, 4])?, tensor(&[2, 5])?));
        assert_eq!(message, "all_to_all: receive has shape [2, 5], expected [2, 4]");
        let message = refusal(communicator.all_gather(&tensor(&[4])?, tensor(&[4, 2])?));
        assert_eq!(message, "all_gather: receive has shape [4, 2], expected 2 rows of [4]");
        let ids = Tensor::zeros(&Device::Cpu, [2, 4], DType::I32)?;
        let message = refusal(communicator.all_gather(&tensor(&[4])?, ids.clone()));
        assert_eq!(message, "all_gather: receive holds i32, expected f32");
        let message = refusal(communicator.broadcast(tensor(&[4])?, 2));
        assert_eq!(message, "broadcast: there is no rank 2 among 2");
        let message = refusal(communicator.reduce_scatter(&ids));
        assert_eq!(message, "reduce_scatter: parts is i32, expected f32 or bf16");
        let shared = tensor(&[2, 4])?;
        let message = refusal(communicator.all_to_all(&tensor(&[2, 4])?, shared.clone()));
        assert_eq!(message, "a tensor that shares its buffer cannot be written");
        // Nothing of this was entered: the ranks are in step.
        ranks.barrier("end")?;
        ranks.leave()
    })?;
    Ok(())
}

fn solo() -> Outcome {
    let ranks = World::solo();
    for size in SIZES {
        exchanged::<f32>(&ranks, size)?;
        gathered::<bf16>(&ranks, size)?;
        sent_out::<f32>(&ranks, size, 0)?;
        summed::<bf16>(&ranks, size)?;
    }
    assert_eq!(ranks.decide("steps", || Ok(f64::NAN))?.to_bits(), f64::NAN.to_bits());
    assert_eq!(ranks.gather("ranks", 3)?, Some(vec![3]));
    ranks.agree("configuration", b"anything")?;
    ranks.leave()?;
    Ok(())
}
