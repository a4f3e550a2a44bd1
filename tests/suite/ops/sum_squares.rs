use l2p_engine::ops::sum_squares::sum_squares;
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::{Outcome, Suite, expect_close, random};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::sum_squares::cpu_equals_plain_sums", cpu);
    suite.cuda("ops::sum_squares::cuda_equals_plain_sums", cuda);
}

fn cpu() -> Outcome {
    let halves = Tensor::zeros(&Device::Cpu, [4], DType::Bf16)?;
    assert_eq!(
        sum_squares(&halves).unwrap_err().to_string(),
        "sum_squares: x holds bf16, expected f32"
    );
    sums(&Device::Cpu)
}

fn cuda(device: &Device) -> Outcome {
    sums(device)?;
    // A number that f32 alone would lose: 1 beside 2^24 squares of 1, in other chunks.
    let mut values = vec![1.0f32; (1 << 24) + 8192];
    values[0] = 3.0;
    let x = Tensor::from_slice(device, &values, [values.len()])?;
    let sum = sum_squares(&x)?.to_vec::<f32>()?[0];
    assert_eq!(sum, (values.len() + 8) as f32);
    Ok(())
}

fn sums(device: &Device) -> Outcome {
    for elements in [0, 1, 7, 8, 4095, 4097, 8191, 8192, 8200, 100_003, 3_000_001] {
        let values = random("x", elements + 3);
        let whole = Tensor::from_slice(device, &values, [elements + 3])?;
        for first in [0, 3] {
            let x = whole.narrow(first, elements)?;
            let exact: f64 = values[first..first + elements]
                .iter()
                .map(|value| f64::from(*value).powi(2))
                .sum();
            let found = sum_squares(&x)?.to_vec::<f32>()?;
            let again = sum_squares(&x)?.to_vec::<f32>()?;
            assert_eq!(found, again);
            expect_close(&format!("{elements} from {first}"), &found, &[exact as f32], [1], 2e-6)?;
        }
    }
    Ok(())
}
