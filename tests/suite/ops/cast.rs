use half::bf16;
use l2p_engine::ops::cast::cast;
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::{Outcome, Suite, random};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::cast::cpu_rounds_to_nearest_even", cpu_rounds_to_nearest_even);
    suite.cpu("ops::cast::other_types_are_named", other_types_are_named);
    suite.cuda("ops::cast::cuda_equals_cpu", cuda_equals_cpu);
}

/// Values that are exact, between two bf16 values, halfway between them, tiny, infinite and huge.
const VALUES: [f32; 12] = [
    0.0,
    -0.0,
    1.0,
    -3.140_625,
    1.003_906_3,
    1.011_718_8,
    1.003_906_4,
    1e-40,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::MAX,
    3.3e38,
];

fn cpu_rounds_to_nearest_even() -> Outcome {
    let x = Tensor::from_slice(&Device::Cpu, &VALUES, [3, 4])?;
    let rounded = cast(&x, DType::Bf16)?;
    assert_eq!((rounded.dtype(), rounded.shape()), (DType::Bf16, x.shape()));
    let values = rounded.to_vec::<bf16>()?;
    // 1 + 2⁻⁸ lies halfway between 1 and 1 + 2⁻⁷, 1 + 3·2⁻⁸ between 1 + 2⁻⁷ and 1 + 2⁻⁶.
    assert_eq!(values[4].to_f32(), 1.0);
    assert_eq!(values[5].to_f32(), 1.015_625);
    assert_eq!(values[6].to_f32(), 1.007_812_5);
    assert_eq!(values[10].to_f32(), f32::INFINITY);
    let back = cast(&rounded, DType::F32)?;
    let expected: Vec<f32> = values.iter().map(|value| value.to_f32()).collect();
    assert_eq!(back.as_slice::<f32>()?, expected);
    assert_eq!(cast(&x, DType::F32)?.as_slice::<f32>()?, VALUES);
    Ok(())
}

fn other_types_are_named() -> Outcome {
    let ids = Tensor::zeros(&Device::Cpu, [3], DType::I32)?;
    let message = cast(&ids, DType::F32).unwrap_err().to_string();
    assert_eq!(message, "cast: x is i32, expected f32 or bf16");
    let x = Tensor::zeros(&Device::Cpu, [3], DType::F32)?;
    let message = cast(&x, DType::U8).unwrap_err().to_string();
    assert_eq!(message, "cast: the result is u8, expected f32 or bf16");
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for count in [1, 7, 8, 2047, 2048, 2049, 10_000] {
        let mut values = random("x", count + 1);
        values
            .iter_mut()
            .zip(VALUES)
            .for_each(|(value, special)| *value = special);
        let expected: Vec<u16> = values.iter().map(|value| bf16::from_f32(*value).to_bits()).collect();
        let x = Tensor::from_slice(device, &values, [count + 1])?;
        // From the start, and from an element that no vector starts at.
        for start in [0, 1] {
            l2p_engine::device::set_poison_new_buffers(true);
            let rounded = x.narrow(start, count).and_then(|view| cast(&view, DType::Bf16));
            let back = rounded.as_ref().map(|rounded| cast(rounded, DType::F32));
            l2p_engine::device::set_poison_new_buffers(false);
            let back = match back {
                Ok(back) => back?.to_vec::<f32>()?,
                Err(_) => return Err(rounded.unwrap_err().into()),
            };
            let found: Vec<u16> = rounded?.to_vec::<bf16>()?.into_iter().map(bf16::to_bits).collect();
            assert_eq!(found, expected[start..start + count], "{count} from {start}");
            let exact = found.iter().map(|bits| bf16::from_bits(*bits).to_f32());
            assert!(back.into_iter().eq(exact), "{count} from {start}, back to f32");
        }
    }
    Ok(())
}
