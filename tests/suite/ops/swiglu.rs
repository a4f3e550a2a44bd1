use l2p_engine::ops::swiglu::swiglu;
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::fixtures::Group;
use l2p_tests::{BF16_TOLERANCE, Outcome, Suite, expect_like_cpu, random_bf16};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::swiglu::cpu_equals_references", cpu_equals_references);
    suite.cpu("ops::swiglu::wrong_arguments_are_named", wrong_arguments_are_named);
    suite.cuda("ops::swiglu::cuda_equals_cpu", cuda_equals_cpu);
}

fn cpu_equals_references() -> Outcome {
    for case in Group::load("ops").cases("swiglu") {
        let ((gate, shape), (up, _)) = (case.input("gate"), case.input("up"));
        let (rows, hidden) = (shape[0], shape[1]);
        let x: Vec<f32> = gate
            .chunks(hidden)
            .zip(up.chunks(hidden))
            .flat_map(|(gate, up)| [gate, up].concat())
            .collect();
        let y = swiglu(&Tensor::from_slice(&Device::Cpu, &x, [1, rows, 2 * hidden])?)?;
        assert_eq!(*y.shape(), [1, rows, hidden]);
        case.check("y", y.as_slice()?)?;
    }
    Ok(())
}

fn wrong_arguments_are_named() -> Outcome {
    let message = |shape: &[usize], dtype| -> Result<String, l2p_engine::Error> {
        let x = Tensor::zeros(&Device::Cpu, shape, dtype)?;
        Ok(swiglu(&x).unwrap_err().to_string())
    };
    assert_eq!(
        message(&[2, 7], DType::F32)?,
        "swiglu: x has shape [2, 7], expected [.., 2·hidden]"
    );
    assert_eq!(message(&[2, 8], DType::Bf16)?, "swiglu: x holds bf16, expected f32");
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for (rows, hidden) in [(1, 8), (3, 1016), (7, 1024), (5, 1032), (33, 9728), (2, 10240)] {
        expect_like_cpu(&format!("{rows}x{hidden}"), device, BF16_TOLERANCE, |device| {
            // Gates far from zero on either side, where the sigmoid saturates, are among them.
            let x: Vec<f32> = random_bf16("x", rows * 2 * hidden)
                .into_iter()
                .enumerate()
                .map(|(index, x)| if index % 5 == 0 { 64.0 * x } else { x })
                .collect();
            Ok(vec![swiglu(&Tensor::from_f32(device, &x, [1, rows, 2 * hidden])?)?])
        })?;
    }
    let x = Tensor::zeros(device, [1, 2 * 12], DType::Bf16)?;
    let message = swiglu(&x).unwrap_err().to_string();
    assert_eq!(
        message,
        "swiglu: a hidden width of 12 is not a multiple of 8, which the CUDA kernel needs"
    );
    Ok(())
}
