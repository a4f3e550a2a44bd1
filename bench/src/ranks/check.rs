//! Every operation against a plain loop.

use anyhow::ensure;
use half::bf16;
use l2p_engine::dist::World;
use l2p_engine::{DType, Device, Result, Tensor};

/// What sums are multiplied by.
const FACTOR: f32 = 0.3;

/// Element `index` of rank `rank`: 24 random bits where the type has room for them, 8 otherwise, so that it is the same in both.
pub fn value(dtype: DType, rank: usize, index: usize) -> f32 {
    let mixed =
        (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (rank as u64 + 1).wrapping_mul(0xd1b5_4a32_d192_ed03);
    let bits = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40;
    match dtype {
        DType::Bf16 => (bits >> 16) as f32 / 128.0 - 1.0,
        _ => bits as f32 * 2f32.powi(-23) - 1.0,
    }
}

/// Elements of `rank` from `first` on.
pub fn tensor(device: &Device, dtype: DType, rank: usize, first: usize, count: usize) -> Result<Tensor> {
    let values = (first..first + count).map(|index| value(dtype, rank, index));
    match dtype {
        DType::Bf16 => Tensor::from_slice(device, &values.map(bf16::from_f32).collect::<Vec<_>>(), [count]),
        _ => Tensor::from_slice(device, &values.collect::<Vec<f32>>(), [count]),
    }
}

/// Checks all operations with about `size` elements of `dtype`.
pub fn all(world: &World, device: &Device, size: usize, dtype: DType) -> anyhow::Result<()> {
    let (rank, ranks) = (world.rank(), world.size());
    let slice = size.div_ceil(ranks);
    let communicator = world.communicator();
    let empty = || Tensor::empty(device, [ranks, slice], dtype);
    let parts = tensor(device, dtype, rank, 0, ranks * slice)?.into_shape([ranks, slice])?;

    let received = communicator.all_to_all(&parts, empty()?)?.wait()?;
    expect("all_to_all", &received, |index| {
        value(dtype, index / slice, rank * slice + index % slice)
    })?;

    let gathered = communicator.all_gather(&parts.narrow(rank, 1)?.into_shape([slice])?, empty()?)?;
    expect("all_gather", &gathered.wait()?, |index| {
        let from = index / slice;
        value(dtype, from, from * slice + index % slice)
    })?;

    for root in [0, ranks - 1] {
        let own = tensor(device, dtype, rank, 0, size)?;
        let sent = communicator.broadcast(own, root)?.wait()?;
        expect("broadcast", &sent, |index| value(dtype, root, index))?;
    }

    let sum_at = |index: usize| {
        let mut sum = value(dtype, 0, index);
        (1..ranks).for_each(|from| sum += value(dtype, from, index));
        sum * FACTOR
    };
    let sum = communicator.reduce_scatter(&parts)?.wait(FACTOR)?;
    expect("reduce_scatter", &sum, |index| sum_at(rank * slice + index))?;

    let own = tensor(device, dtype, rank, 0, size)?;
    let sum = communicator.all_reduce(&own, FACTOR)?;
    expect("all_reduce", &sum, sum_at)?;
    Ok(())
}

/// Fails unless every element of `found` has the bits of `expected`.
pub fn expect(what: &str, found: &Tensor, expected: impl Fn(usize) -> f32) -> anyhow::Result<()> {
    let values = found.to_vec_f32()?;
    let wrong = values
        .iter()
        .enumerate()
        .find(|(index, value)| value.to_bits() != expected(*index).to_bits());
    if let Some((index, value)) = wrong {
        ensure!(
            false,
            "{what}: element {index} is {value}, expected {}",
            expected(index)
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_exact_in_their_type_and_differ() {
        for index in 0..2000 {
            let coarse = value(DType::Bf16, index % 5, index);
            assert_eq!(bf16::from_f32(coarse).to_f32(), coarse);
            assert!((-1.0..1.0).contains(&coarse));
            assert_ne!(value(DType::F32, 0, index), value(DType::F32, 1, index));
        }
    }

    #[test]
    fn a_wrong_bit_is_found() {
        let tensor = tensor(&Device::Cpu, DType::F32, 2, 5, 9).unwrap();
        expect("copy", &tensor, |index| value(DType::F32, 2, index + 5)).unwrap();
        let message = expect("copy", &tensor, |index| {
            value(DType::F32, 2, index + 5) + f32::from(u8::from(index == 3))
        })
        .unwrap_err()
        .to_string();
        assert!(message.starts_with("copy: element 3 is "), "{message}");
    }

    #[test]
    fn a_world_of_one_is_right() {
        for size in [0, 1, 7, 1000] {
            for dtype in [DType::F32, DType::Bf16] {
                all(&World::solo(), &Device::Cpu, size, dtype).unwrap();
            }
        }
    }
}
