use half::bf16;
use l2p_engine::ops::finite::{count_not_finite, ensure_finite};
use l2p_engine::{DType, Device, Error, Tensor};
use l2p_tests::{Outcome, Suite, random};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::finite::cpu_counts", || counts(&Device::Cpu));
    suite.cpu("ops::finite::what_is_not_finite_is_named", what_is_not_finite_is_named);
    suite.cpu("ops::finite::other_types_are_named", other_types_are_named);
    suite.cuda("ops::finite::cuda_counts", counts);
}

const BAD: [f32; 3] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];

/// Of both types: none, one at either end, one in every seventh place, all; from the start and from an element that no vector starts
/// at. The largest finite numbers and the smallest are finite.
fn counts(device: &Device) -> Outcome {
    for count in [1, 7, 8, 31, 2047, 2048, 2049, 10_000, 300_001] {
        let places: [&dyn Fn(usize) -> bool; 5] = [
            &|_| false,
            &|index| index == 0,
            &|index| index == count - 1,
            &|index| index % 7 == 3,
            &|_| true,
        ];
        for (case, is_bad) in places.into_iter().enumerate() {
            let mut values = random("x", count);
            values[count / 2] = [bf16::MAX.to_f32(), -bf16::MAX.to_f32(), 1e-40][count % 3];
            for (index, value) in values.iter_mut().enumerate() {
                if is_bad(index) {
                    *value = BAD[index % 3];
                }
            }
            let expected = (0..count).filter(|&index| is_bad(index)).count() as i32;
            // What stands before and after a view does not count.
            let around: Vec<f32> = [f32::NAN].into_iter().chain(values).chain([f32::INFINITY]).collect();
            let rounded: Vec<bf16> = around.iter().map(|value| bf16::from_f32(*value)).collect();
            let tensors = [
                Tensor::from_slice(device, &around, [count + 2])?,
                Tensor::from_slice(device, &rounded, [count + 2])?,
            ];
            for x in tensors {
                let found = count_not_finite(&x.narrow(1, count)?)?;
                assert_eq!((found.dtype(), found.shape().to_vec()), (DType::I32, vec![1]));
                assert_eq!(found.to_vec::<i32>()?, [expected], "{} {count}, case {case}", x.dtype());
                let from_the_start = count_not_finite(&x.narrow(0, count)?)?.to_vec::<i32>()?;
                assert_eq!(from_the_start, [expected + 1 - i32::from(is_bad(count - 1))]);
            }
        }
    }
    Ok(())
}

fn what_is_not_finite_is_named() -> Outcome {
    let x = Tensor::from_slice(&Device::Cpu, &[0.0, f32::NAN, 1.0, f32::INFINITY], [2, 2])?;
    let error = ensure_finite("the caption's features", &x).unwrap_err();
    assert!(matches!(error, Error::NotFinite { .. }));
    assert_eq!(
        error.to_string(),
        "the caption's features (2 of 4 values): not finite (NaN or infinity)"
    );
    ensure_finite("its first value", &x.reshape([4])?.narrow(0, 1)?)?;
    ensure_finite("nothing", &Tensor::zeros(&Device::Cpu, [0], DType::F32)?)?;
    Ok(())
}

fn other_types_are_named() -> Outcome {
    let ids = Tensor::zeros(&Device::Cpu, [3], DType::I32)?;
    let message = count_not_finite(&ids).unwrap_err().to_string();
    assert_eq!(message, "count_not_finite: x is i32, expected f32 or bf16");
    Ok(())
}
