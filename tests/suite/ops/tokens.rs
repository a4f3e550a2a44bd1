use l2p_engine::ops::sum_rows::{add_pad_row_sum, add_row_sum};
use l2p_engine::ops::tokens::{concat_tokens, fill_pad_tokens, narrow_tokens, pad_tokens, stack_tokens};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::{Outcome, Suite, expect_like_cpu, random, random_bf16, with_poisoned_buffers};

use super::loops::{exact, expect_exact};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::tokens::tokens_go_where_they_belong", tokens_go_where_they_belong);
    suite.cpu("ops::tokens::parts_are_stacked", parts_are_stacked);
    suite.cpu("ops::tokens::rows_are_summed", rows_are_summed);
    suite.cpu("ops::tokens::wrong_lengths_are_named", wrong_lengths_are_named);
    suite.cuda("ops::tokens::cuda_equals_cpu", cuda_equals_cpu);
}

/// Every token names its origin: item, number and channel as digits, on top of `base`.
fn numbered(device: &Device, base: usize, [batch, tokens, dim]: [usize; 3]) -> Result<Tensor> {
    let values: Vec<f32> = (0..batch * tokens * dim)
        .map(|index| (base + index / (tokens * dim) * 100 + index / dim % tokens * 10 + index % dim) as f32)
        .collect();
    Tensor::from_f32(device, &values, [batch, tokens, dim])
}

fn tokens_go_where_they_belong() -> Outcome {
    let cpu = &Device::Cpu;
    let (a, b) = (numbered(cpu, 0, [2, 3, 2])?, numbered(cpu, 1000, [2, 1, 2])?);
    let both = concat_tokens(&a, &b)?;
    assert_eq!(*both.shape(), [2, 4, 2]);
    let first = [0.0, 1.0, 10.0, 11.0, 20.0, 21.0, 1000.0, 1001.0];
    let second = [100.0, 101.0, 110.0, 111.0, 120.0, 121.0, 1100.0, 1101.0];
    assert_eq!(both.as_slice::<f32>()?, [first, second].concat());

    let middle = narrow_tokens(&both, 2, 2)?;
    assert_eq!(*middle.shape(), [2, 2, 2]);
    assert_eq!(middle.as_slice::<f32>()?, [&first[4..], &second[4..]].concat());
    let single = narrow_tokens(&both.narrow(1, 1)?, 1, 2)?;
    assert_eq!(*single.shape(), [1, 2, 2]);
    assert_eq!(single.as_slice::<f32>()?, &second[2..6]);

    let mut padded = pad_tokens(&b, 3)?;
    assert_eq!(*padded.shape(), [2, 3, 2]);
    let expected = [1000.0, 1001.0, 0.0, 0.0, 0.0, 0.0, 1100.0, 1101.0, 0.0, 0.0, 0.0, 0.0];
    assert_eq!(padded.as_slice::<f32>()?, expected);

    let lengths = Tensor::from_slice(cpu, &[1, 2], [2])?;
    let pad = Tensor::from_slice(cpu, &[7.0f32, 8.0], [2])?;
    fill_pad_tokens(&mut padded, &lengths, &pad)?;
    let expected = [1000.0, 1001.0, 7.0, 8.0, 7.0, 8.0, 1100.0, 1101.0, 0.0, 0.0, 7.0, 8.0];
    assert_eq!(padded.as_slice::<f32>()?, expected);
    Ok(())
}

fn parts_are_stacked() -> Outcome {
    let cpu = &Device::Cpu;
    let (a, b) = (numbered(cpu, 0, [1, 3, 2])?, numbered(cpu, 1000, [1, 1, 2])?);
    let stacked = with_poisoned_buffers(|| stack_tokens(&[&a, &b, &a], 3))?;
    assert_eq!(*stacked.shape(), [3, 3, 2]);
    let whole = [0.0, 1.0, 10.0, 11.0, 20.0, 21.0];
    let padded = [1000.0, 1001.0, 0.0, 0.0, 0.0, 0.0];
    assert_eq!(stacked.as_slice::<f32>()?, [whole, padded, whole].concat());
    let longer = with_poisoned_buffers(|| stack_tokens(&[&a, &b], 5))?;
    let zeros = &[0.0; 4][..];
    assert_eq!(longer.as_slice::<f32>()?, [&whole[..], zeros, &padded, zeros].concat());
    let message = |outcome: Result<Tensor>| outcome.unwrap_err().to_string();
    assert_eq!(message(stack_tokens(&[], 3)), "stack_tokens: nothing to put together");
    assert_eq!(
        message(stack_tokens(&[&b, &a], 2)),
        "stack_tokens: part 1 has shape [1, 3, 2], expected [1, 2, 2]"
    );
    Ok(())
}

/// All rows, and those past their item's length, added to what is there; more rows than one task sums.
fn rows_are_summed() -> Outcome {
    let (batch, tokens, dim) = (3, 67, 5);
    let x = Tensor::from_slice(&Device::Cpu, &random("x", batch * tokens * dim), [batch, tokens, dim])?;
    let before = Tensor::from_slice(&Device::Cpu, &random("before", dim), [dim])?;
    let lengths = [67usize, 0, 41];
    let sums = |counts: &dyn Fn(usize, usize) -> bool| -> Result<Vec<f64>> {
        let mut sums = exact(&before)?;
        for (row, values) in exact(&x)?.chunks(dim).enumerate() {
            if counts(row / tokens, row % tokens) {
                sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
            }
        }
        Ok(sums)
    };
    let mut all = before.clone().into_unshared()?;
    add_row_sum(&x, &mut all)?;
    expect_exact("all rows", &all, &sums(&|_, _| true)?)?;
    let mut pads = before.clone().into_unshared()?;
    let of_items = Tensor::from_slice(&Device::Cpu, &lengths.map(|length| length as i32), [batch])?;
    add_pad_row_sum(&x, &of_items, &mut pads)?;
    expect_exact("pads", &pads, &sums(&|item, token| token >= lengths[item])?)
}

fn wrong_lengths_are_named() -> Outcome {
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&Device::Cpu, shape, dtype);
    let x = zeros(&[2, 3, 8], DType::F32)?;
    let message = |outcome: Result<Tensor>| outcome.unwrap_err().to_string();
    assert_eq!(
        message(concat_tokens(&x, &zeros(&[2, 3, 16], DType::F32)?)),
        "concat_tokens: part 1 has shape [2, 3, 16], expected [2, 3, 8]"
    );
    assert_eq!(
        message(narrow_tokens(&x, 2, 2)),
        "narrow_tokens: x has shape [2, 3, 8], expected at least 4 tokens"
    );
    assert!(narrow_tokens(&x, usize::MAX, 2).is_err());
    assert_eq!(
        message(pad_tokens(&x, 2)),
        "pad_tokens: x has shape [2, 3, 8], expected at most 2 tokens"
    );
    let outcome = fill_pad_tokens(
        &mut zeros(&[2, 3, 8], DType::F32)?,
        &zeros(&[3], DType::I32)?,
        &zeros(&[8], DType::F32)?,
    );
    assert_eq!(
        outcome.unwrap_err().to_string(),
        "fill_pad_tokens: lengths has shape [3], expected [2]"
    );
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for (batch, tokens, other, dim) in [
        (1, 1, 1, 8),
        (2, 5, 3, 384),
        (3, 33, 65, 3840),
        (1, 100, 1, 2560),
        (2, 1, 4, 8),
    ] {
        expect_like_cpu(&format!("{batch}x{tokens}+{other}x{dim}"), device, 0.0, |device| {
            let random =
                |name, tokens| Tensor::from_f32(device, &random_bf16(name, batch * tokens * dim), [batch, tokens, dim]);
            let both = concat_tokens(&random("a", tokens)?, &random("b", other)?)?;
            let total = tokens + other;
            let padded = pad_tokens(&both, total.next_multiple_of(32) + 32)?;
            let mut filled = pad_tokens(&both, total + 3)?;
            // Nothing but pads, all tokens, and lengths in between.
            let lengths: Vec<i32> = (0..batch).map(|item| [total as i32, 0, 2][item]).collect();
            let lengths = Tensor::from_slice(device, &lengths, [batch])?;
            let pad = Tensor::from_f32(device, &random_bf16("pad", dim), [dim])?;
            fill_pad_tokens(&mut filled, &lengths, &pad)?;
            let middle = narrow_tokens(&both, total / 3, total / 2)?;
            Ok(vec![both, padded, filled, middle])
        })?;
    }
    Ok(())
}
