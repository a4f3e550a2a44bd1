use l2p_engine::ops::guidance::{Guidance, guided_euler_step};
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::fixtures::Group;
use l2p_tests::{Outcome, Suite, expect_close, expect_like_cpu, random};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::guidance::cpu_equals_references", cpu_equals_references);
    suite.cpu("ops::guidance::wrong_velocities_are_named", wrong_velocities_are_named);
    suite.cuda("ops::guidance::cuda_equals_cpu", cuda_equals_cpu);
}

fn factors(device: &Device, keep: f32, add: f32) -> l2p_engine::Result<Tensor> {
    Tensor::from_slice(device, &[keep, add], [2])
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
        guided_euler_step(
            &mut x,
            &velocity,
            Some(guidance),
            &factors(&Device::Cpu, 1.0, delta as f32)?,
        )?;
        case.check("x_next", x.as_slice()?)?;
    }
    // Without guidance there is one pass, and its prediction is followed as it is; a keep of 1 rounds nothing.
    let (values, v) = (random("x", 30), random("v", 30));
    let stepped = |keep: f32| {
        let mut x = Tensor::from_slice(&Device::Cpu, &values, [2, 15])?;
        let v = Tensor::from_slice(&Device::Cpu, &v, [2, 15])?;
        guided_euler_step(&mut x, &v, None, &factors(&Device::Cpu, keep, -0.25)?)?;
        x.to_vec::<f32>()
    };
    let whole: Vec<f32> = values.iter().zip(&v).map(|(x, v)| x - 0.25 * v).collect();
    assert_eq!(stepped(1.0)?, whole);
    let part: Vec<f32> = values.iter().zip(&v).map(|(x, v)| 0.875 * x - 0.25 * v).collect();
    expect_close("a part is kept", &stepped(0.875)?, &part, [2, 15], 1e-6)
}

fn wrong_velocities_are_named() -> Outcome {
    let mut x = Tensor::zeros(&Device::Cpu, [2, 3], DType::F32)?;
    let good = Tensor::zeros(&Device::Cpu, [2, 3], DType::F32)?;
    let long = Tensor::zeros(&Device::Cpu, [4, 3], DType::F32)?;
    let half = Tensor::zeros(&Device::Cpu, [2, 3], DType::Bf16)?;
    let factors = factors(&Device::Cpu, 1.0, -0.1)?;
    let mut message = |velocity: &Tensor, negative: &Tensor| {
        let guidance = Some(Guidance { negative, cfg: 2.0 });
        guided_euler_step(&mut x, velocity, guidance, &factors)
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
        for (guided, keep) in [(false, 1.0), (true, 1.0), (false, 0.75), (true, 0.75)] {
            expect_like_cpu(
                &format!("{batch}x{elements}, guided: {guided}, keep: {keep}"),
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
                    guided_euler_step(&mut x, &velocity, guidance, &factors(device, keep, -0.125)?)?;
                    Ok(vec![x])
                },
            )?;
        }
    }
    Ok(())
}
