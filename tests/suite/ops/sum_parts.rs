use half::bf16;
use l2p_engine::ops::sum_parts::sum_parts;
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::{Outcome, Suite, random};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::sum_parts::cpu_adds_in_the_order_of_ranks", order);
    suite.cpu("ops::sum_parts::what_does_not_fit_is_named", refusals);
    suite.cuda("ops::sum_parts::cuda_equals_cpu_bit_for_bit", cuda_equals_cpu);
}

fn order() -> Outcome {
    // (1e8 + 1) − 1e8 is 0 in f32, in any other order 1; nothing was rounded before; −0 stays.
    let parts = [1e8f32, -0.0, 1.0, 1.0, -0.0, 2.0, -1e8, -0.0, 3.0];
    let parts = Tensor::from_slice(&Device::Cpu, &parts, [3, 3])?;
    let mut target = Tensor::from_slice(&Device::Cpu, &[9.0f32; 5], [5])?;
    sum_parts(&parts, 0.5, &mut target, 1)?;
    let sums: Vec<u32> = target.as_slice::<f32>()?.iter().map(|value| value.to_bits()).collect();
    assert_eq!(sums, [9.0f32, 0.0, -0.0, 3.0, 9.0].map(f32::to_bits));

    let halves: Vec<bf16> = [1.0f32, 0.003_906_25].map(bf16::from_f32).to_vec();
    let parts = Tensor::from_slice(&Device::Cpu, &halves, [2, 1])?;
    let mut target = Tensor::zeros(&Device::Cpu, [1], DType::F32)?;
    sum_parts(&parts, 1.0, &mut target, 0)?;
    // In bf16 this would be 1.
    assert_eq!(target.as_slice::<f32>()?, [1.0 + 0.003_906_25]);
    Ok(())
}

fn refusals() -> Outcome {
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&Device::Cpu, shape, dtype);
    let refusal =
        |parts: Tensor, mut target: Tensor, first| sum_parts(&parts, 1.0, &mut target, first).unwrap_err().to_string();
    let f32s = |shape: &[usize]| zeros(shape, DType::F32);
    assert_eq!(
        refusal(f32s(&[2, 3])?, f32s(&[4])?, 2),
        "sum_parts: target has shape [4], expected at least 5 elements"
    );
    assert!(refusal(f32s(&[2, 3])?, f32s(&[4])?, usize::MAX).contains("expected at least"));
    assert_eq!(refusal(f32s(&[0, 3])?, f32s(&[4])?, 0), "sum_parts: there is no part");
    assert_eq!(
        refusal(f32s(&[6])?, f32s(&[4])?, 0),
        "sum_parts: parts has shape [6], expected [ranks, elements]"
    );
    assert_eq!(
        refusal(zeros(&[2, 3], DType::I32)?, f32s(&[4])?, 0),
        "sum_parts: the parts are i32, expected f32 or bf16"
    );
    assert_eq!(
        refusal(f32s(&[2, 3])?, zeros(&[4], DType::Bf16)?, 0),
        "sum_parts: target holds bf16, expected f32"
    );
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for ranks in [1, 2, 3, 8] {
        for elements in [0, 1, 7, 8, 2047, 2048, 2049, 100_000, 100_008] {
            for (dtype, first) in [(DType::F32, 0), (DType::Bf16, 0), (DType::Bf16, 4), (DType::F32, 3)] {
                let values = random("parts", ranks * elements);
                let sum = |device: &Device| -> l2p_engine::Result<Vec<u32>> {
                    let parts = match dtype {
                        DType::F32 => Tensor::from_slice(device, &values, [ranks, elements])?,
                        _ => {
                            let rounded: Vec<bf16> = values.iter().map(|value| bf16::from_f32(*value)).collect();
                            Tensor::from_slice(device, &rounded, [ranks, elements])?
                        }
                    };
                    let mut target = Tensor::from_slice(device, &vec![7.0f32; elements + 9], [elements + 9])?;
                    sum_parts(&parts, 0.3, &mut target, first)?;
                    Ok(target.to_vec::<f32>()?.into_iter().map(f32::to_bits).collect())
                };
                let (found, expected) = (sum(device)?, sum(&Device::Cpu)?);
                assert!(found == expected, "{ranks} parts of {elements} {dtype} to {first}");
            }
        }
    }
    Ok(())
}
