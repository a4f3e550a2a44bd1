use l2p_engine::ops::guidance::{Guidance, guided_euler_step};
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::fixtures::Group;
use l2p_tests::{Outcome, Suite, expect_close, expect_like_cpu, random};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::guidance::cpu_equals_references", cpu_equals_references);
    suite.cpu("ops::guidance::wrong_velocities_are_named", wrong_velocities_are_named);
    suite.cuda("ops::guidance::cuda_equals_cpu", cuda_equals_cpu);
}

fn scalar(device: &Device, value: f32) -> l2p_engine::Result<Tensor> {
    Tensor::from_slice(device, &[value], [1])
}

fn cpu_equals_references() -> Outcome {
    for case in Group::load("ops").cases("guided_euler") {
        let number = |key| case.config(&[key]).as_f64().expect("the case has this number");
        let (x, shape) = case.input("x");
        let mut x = Tensor::from_slice(&Device::Cpu, &x, shape.as_slice())?;
        let velocity = Tensor::from_slice(&Device::Cpu, &case.input("v_pos").0, shape.as_slice())?;
        let negative = Tensor::from_slice(&Device::Cpu, &case.input("v_neg").0, shape.as_slice())?;
        let guidance = Guidance {
            negative: &negative,
            cfg: number("cfg") as f32,
        };
        let delta = number("sigma_next") - number("sigma");
        guided_euler_step(&mut x, &velocity, Some(guidance), &scalar(&Device::Cpu, delta as f32)?)?;
        case.check("x_next", x.as_slice()?)?;
    }
    // Without guidance there is one pass, and its velocity is followed as it is.
    let (x, v) = (random("x", 30), random("v", 30));
    let expected: Vec<f32> = x.iter().zip(&v).map(|(x, v)| x - 0.25 * v).collect();
    let mut x = Tensor::from_slice(&Device::Cpu, &x, [2, 15])?;
    guided_euler_step(
        &mut x,
        &Tensor::from_slice(&Device::Cpu, &v, [2, 15])?,
        None,
        &scalar(&Device::Cpu, -0.25)?,
    )?;
    expect_close("without guidance", x.as_slice()?, &expected, x.shape(), 1e-6)
}

fn wrong_velocities_are_named() -> Outcome {
    let mut x = Tensor::zeros(&Device::Cpu, [2, 3], DType::F32)?;
    let good = Tensor::zeros(&Device::Cpu, [2, 3], DType::F32)?;
    let long = Tensor::zeros(&Device::Cpu, [4, 3], DType::F32)?;
    let half = Tensor::zeros(&Device::Cpu, [2, 3], DType::Bf16)?;
    let delta = scalar(&Device::Cpu, -0.1)?;
    let mut message = |velocity: &Tensor, negative: &Tensor| {
        let guidance = Some(Guidance { negative, cfg: 2.0 });
        guided_euler_step(&mut x, velocity, guidance, &delta)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        message(&long, &good),
        "guided_euler_step: velocity has shape [4, 3], expected [2, 3]"
    );
    assert_eq!(
        message(&good, &long),
        "guided_euler_step: negative has shape [4, 3], expected [2, 3]"
    );
    assert_eq!(
        message(&half, &good),
        "guided_euler_step: velocity holds bf16, expected f32"
    );
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    // Whole vectors, halves that do not start at a multiple of 16 bytes, and more than one block.
    for (batch, elements) in [
        (1, 1),
        (1, 4),
        (2, 15),
        (1, 1023),
        (3, 1024),
        (1, 6 * 10 * 16),
        (2, 4099),
    ] {
        for guided in [false, true] {
            expect_like_cpu(
                &format!("{batch}x{elements}, guided: {guided}"),
                device,
                1e-6,
                |device| {
                    let tensor =
                        |name: &str| Tensor::from_slice(device, &random(name, batch * elements), [batch, elements]);
                    let (mut x, velocity, negative) = (tensor("x")?, tensor("v")?, tensor("n")?);
                    let guidance = guided.then_some(Guidance {
                        negative: &negative,
                        cfg: 2.5,
                    });
                    guided_euler_step(&mut x, &velocity, guidance, &scalar(device, -0.125)?)?;
                    Ok(vec![x])
                },
            )?;
        }
    }
    Ok(())
}
