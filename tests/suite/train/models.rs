//! Whole models against torch autograd, under each freeze policy.

use l2p_engine::model::config::ModelKind;
use l2p_engine::train::{Recompute, StatePart};
use l2p_engine::{Device, Result, Tensor};
use l2p_tests::fixtures::{Case, Group};
use l2p_tests::{Outcome, Suite, Tolerance, expect_close};

use super::{Inputs, load, options, trained_names};
use crate::models::dit::{caption, config};
use crate::models::{input_image, params, random_model, small_config};

pub fn register(suite: &mut Suite) {
    suite.cpu("train::models::gradients_equal_torch", gradients_equal_torch);
    suite.cuda("train::models::cuda_gradients_equal_cpu", cuda_gradients_equal_cpu);
}

/// Gradients by name, with their shapes.
type Gradients = Vec<(String, (Vec<usize>, Vec<f32>))>;

const POLICIES: [&str; 7] = [
    "full",
    "paper:1",
    "released:1",
    "released:0",
    "head-only",
    "layers.1.*",
    "noise_refiner.*,context_refiner.0.ffn_norm2.weight,cap_pad_token",
];

/// A batch whose noisy image and target are those of the case: with sigma = 1 − t, image = x − sigma · target and noise = x + t ·
/// target give (1 − sigma) · image + sigma · noise = x and noise − image = target.
fn inputs(case: &Case<'_>) -> Result<Inputs> {
    let (x, target) = (input_image(case, "x")?, input_image(case, "target")?);
    let times = case.input("t").0;
    let item = x.elements() / times.len();
    let moved = |by: &dyn Fn(f32) -> f32| {
        let values = x.as_slice::<f32>()?.iter().zip(target.as_slice::<f32>()?).enumerate();
        let values: Vec<f32> = values
            .map(|(index, (x, target))| x + by(times[index / item]) * target)
            .collect();
        Tensor::from_slice(&Device::Cpu, &values, x.shape())
    };
    let captions = (0..)
        .map(|index| format!("cap.{index}"))
        .take_while(|name| case.has_input(name));
    Ok(Inputs {
        images: moved(&|t| t - 1.0)?,
        noise: moved(&|t| t)?,
        sigmas: times.iter().map(|t| 1.0 - t).collect(),
        captions: captions.map(|name| caption(case, &name)).collect::<Result<_>>()?,
    })
}

fn gradients_equal_torch() -> Outcome {
    let group = Group::load("grads");
    for case in group.cases("pixel.").into_iter().chain(group.cases("latent.")) {
        let params = params(&case);
        let config = config(&case, &params)?;
        let inputs = inputs(&case)?;
        for policy in POLICIES {
            let recompute = Recompute::ALL[policy.len() % 3];
            let options = options(policy, recompute);
            let mut model = load(&params, &Device::Cpu, &config, &options)?;
            let loss = inputs.batch(|batch| model.accumulate(batch, 1.0))?.to_vec_f32()?;
            case.check("loss", &loss)?;
            // Through the path that sampling takes, without gradients.
            case.check("loss", &inputs.batch(|batch| model.evaluate(batch))?.to_vec_f32()?)?;
            let mut names = Vec::new();
            for tensor in model.trained() {
                let gradient = tensor.read(StatePart::Gradient)?.expect("it is trained");
                case.check(&format!("grad.{}", tensor.name), &gradient)?;
                names.push(tensor.name);
            }
            names.sort();
            assert_eq!(
                names,
                trained_names(&params, &options.policy, config.layers),
                "{policy}"
            );
        }
    }
    Ok(())
}

/// Errors of PyTorch's own bf16 gradients on such models are up to 3 %; of small sums such as a pad token's, more.
const BF16_GRADIENT_TOLERANCE: Tolerance = Tolerance::of_gradients(4e-2);

fn cuda_gradients_equal_cpu(device: &Device) -> Outcome {
    let heads: [&[usize]; 3] = [&[8, 16, 24, 32], &[8, 8, 16, 16, 24, 32], &[]];
    for (kind, patch, head, size, lengths) in [
        (ModelKind::Pixel, 16, heads[0], [96, 112], &[20, 45][..]),
        (ModelKind::Pixel, 64, heads[1], [128, 192], &[33][..]),
        (ModelKind::Latent, 2, heads[2], [10, 14], &[20, 45][..]),
    ] {
        let config = small_config(kind, 384, patch);
        let params = random_model(&config, head);
        for recompute in Recompute::ALL {
            let run = |device: &Device| -> Result<(f32, Gradients)> {
                let inputs = Inputs::new(device, "a", &config, size, lengths)?;
                let mut model = load(&params, device, &config, &options("full", recompute))?;
                let loss = inputs.batch(|batch| model.accumulate(batch, 1.0))?.to_vec_f32()?[0];
                let gradients = model.trained().into_iter().map(|tensor| {
                    let gradient = tensor.read(StatePart::Gradient)?.expect("it is trained");
                    Ok((tensor.name, (tensor.shape, gradient)))
                });
                Ok((loss, gradients.collect::<Result<_>>()?))
            };
            let ((expected_loss, expected), (found_loss, found)) = (run(&Device::Cpu)?, run(device)?);
            assert!(
                (found_loss - expected_loss).abs() <= 5e-3 * expected_loss,
                "{found_loss} {expected_loss}"
            );
            let mut far = Vec::new();
            for ((name, (shape, expected)), (_, (_, found))) in expected.iter().zip(&found) {
                let outcome = expect_close(name, found, expected, shape.as_slice(), BF16_GRADIENT_TOLERANCE);
                far.extend(
                    outcome
                        .err()
                        .map(|failed| failed.message().unwrap_or_default().to_owned()),
                );
            }
            if !far.is_empty() {
                return Err(format!("{kind} patch {patch}, recompute {recompute}: {}", far.join("\n")).into());
            }
        }
    }
    Ok(())
}
