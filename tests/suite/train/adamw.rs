use l2p_engine::ops::cast::cast;
use l2p_engine::ops::sum_squares::sum_squares;
use l2p_engine::train::{AdamW, AdamWOptions, Recompute, StateArray, TrainOptions};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::fixtures::{Case, Group};
use l2p_tests::{BF16_TOLERANCE, F32_TOLERANCE, Outcome, Suite, expect_close, random, random_bf16};

use super::options;

pub fn register(suite: &mut Suite) {
    suite.cpu("train::adamw::cpu_equals_torch", cpu_equals_torch);
    suite.cpu(
        "train::adamw::infinite_gradients_are_skipped",
        infinite_gradients_are_skipped,
    );
    suite.cpu("train::adamw::nonsense_is_refused", nonsense_is_refused);
    suite.cpu("train::adamw::other_tensors_are_refused", other_tensors_are_refused);
    suite.cpu("train::adamw::parts_equal_the_whole", || parts(&Device::Cpu));
    suite.cuda("train::adamw::cuda_parts_equal_the_whole", parts);
    suite.cuda("train::adamw::cuda_equals_cpu", cuda_equals_cpu);
    suite.cuda(
        "train::adamw::tensors_that_moved_are_followed",
        tensors_that_moved_are_followed,
    );
    suite.cuda("train::adamw::cuda_refuses_other_tensors", refuses_others);
    suite.cuda("train::adamw::cuda_skips_infinite_gradients", skips);
}

fn number(case: &Case<'_>, name: &str) -> f32 {
    case.config(&[name]).as_f64().expect("a number") as f32
}

fn references(tensors: &mut [Tensor]) -> Vec<&mut Tensor> {
    tensors.iter_mut().collect()
}

fn cpu_equals_torch() -> Outcome {
    let group = Group::load("adamw");
    for case in group.cases("") {
        let betas = case.config(&["betas"]).as_array().expect("a list");
        let beta = |index: usize| betas[index].as_f64().expect("a number") as f32;
        let options = TrainOptions {
            adamw: AdamWOptions {
                beta1: beta(0),
                beta2: beta(1),
                epsilon: number(&case, "eps"),
                weight_decay: number(&case, "weight_decay"),
            },
            clip_norm: case.has_config(&["clip_norm"]).then(|| number(&case, "clip_norm")),
            ema_decay: Some(number(&case, "ema_decay")),
            ..options("full", Recompute::None)
        };
        let count = case.config(&["shapes"]).as_array().expect("a list").len();
        let input = |name: String| -> Result<Tensor> {
            let (values, shape) = case.input(&name);
            Tensor::from_slice(&Device::Cpu, &values, shape.as_slice())
        };
        let mut weights: Vec<Tensor> = (0..count)
            .map(|index| input(format!("w.{index}")))
            .collect::<Result<_>>()?;
        let mut gradients: Vec<Tensor> = weights
            .iter()
            .map(|w| Tensor::zeros(&Device::Cpu, w.shape(), DType::F32))
            .collect::<Result<_>>()?;
        let mut optimizer = AdamW::new(
            &Device::Cpu,
            &mut references(&mut weights),
            &mut references(&mut gradients),
            &options,
        )?;
        let mut norms = Vec::new();
        for step in 0..case.size(&["count"]) {
            for (index, gradient) in gradients.iter_mut().enumerate() {
                gradient.copy_from(&input(format!("grad.{step}.{index}"))?)?;
            }
            let norm = optimizer.step(
                &mut references(&mut weights),
                &mut references(&mut gradients),
                number(&case, "lr"),
            )?;
            let norm = norm.to_vec::<f32>()?;
            assert_eq!(norm[1], 0.0);
            norms.push(norm[0]);
            assert!(gradients.iter().all(|gradient| {
                gradient
                    .as_slice::<f32>()
                    .expect("on the CPU")
                    .iter()
                    .all(|g| *g == 0.0)
            }));
        }
        case.check("norms", &norms)?;
        for (index, weight) in weights.iter().enumerate() {
            case.check(&format!("w.{index}"), weight.as_slice()?)?;
            for (name, array) in [
                ("m", StateArray::FirstMoment),
                ("v", StateArray::SecondMoment),
                ("ema", StateArray::Average),
            ] {
                let found = optimizer.state(array, index)?.expect("it is kept");
                case.check(&format!("{name}.{index}"), found.as_slice()?)?;
            }
            assert!(optimizer.state(StateArray::Master, index)?.is_none());
        }
        assert_eq!(optimizer.steps() as usize, case.size(&["count"]));
    }
    Ok(())
}

/// Tensors of odd sizes, several chunks among them.
const SIZES: [usize; 5] = [1, 7, 8200, 30_001, 64];

struct Run {
    weights: Vec<Tensor>,
    gradients: Vec<Tensor>,
    optimizer: AdamW,
}

impl Run {
    fn new(device: &Device, clip_norm: Option<f32>) -> Result<Self> {
        let options = TrainOptions {
            clip_norm,
            ema_decay: Some(0.9),
            ..options("full", Recompute::None)
        };
        let tensors = |name: &str| -> Result<Vec<Tensor>> {
            let sizes = SIZES.iter().enumerate();
            sizes
                .map(|(index, &size)| Tensor::from_f32(device, &random_bf16(&format!("{name}{index}"), size), [size]))
                .collect()
        };
        let (mut weights, mut gradients) = (tensors("w")?, tensors("g")?);
        let optimizer = AdamW::new(
            device,
            &mut references(&mut weights),
            &mut references(&mut gradients),
            &options,
        )?;
        Ok(Run {
            weights,
            gradients,
            optimizer,
        })
    }

    fn set_gradients(&mut self, step: usize) -> Result<()> {
        for (index, gradient) in self.gradients.iter_mut().enumerate() {
            let values = random_bf16(&format!("g{step}.{index}"), gradient.elements());
            gradient.copy_from(&Tensor::from_f32(&gradient.device(), &values, gradient.shape())?)?;
        }
        Ok(())
    }

    fn step(&mut self) -> Result<Vec<f32>> {
        let (weights, gradients) = (&mut references(&mut self.weights), &mut references(&mut self.gradients));
        self.optimizer.step(weights, gradients, 1e-2)?.to_vec::<f32>()
    }
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for clip_norm in [None, Some(3.0)] {
        let (mut cpu, mut cuda) = (Run::new(&Device::Cpu, clip_norm)?, Run::new(device, clip_norm)?);
        for step in 0..4 {
            cpu.set_gradients(step)?;
            cuda.set_gradients(step)?;
            let (expected, found) = (cpu.step()?, cuda.step()?);
            expect_close("norm", &found[..1], &expected[..1], [1], F32_TOLERANCE)?;
            assert_eq!(found[1], 0.0);
        }
        for index in 0..SIZES.len() {
            let weight = cpu.weights[index].to_vec_f32()?;
            let master = cuda
                .optimizer
                .state(StateArray::Master, index)?
                .expect("CUDA keeps one")
                .to_vec_f32()?;
            expect_close("master", &master, &weight, [weight.len()], F32_TOLERANCE)?;
            // The weight is its master, rounded.
            let rounded: Vec<f32> = master
                .iter()
                .map(|value| half::bf16::from_f32(*value).to_f32())
                .collect();
            assert!(
                cuda.weights[index].to_vec_f32()? == rounded,
                "a weight does not follow its master"
            );
            expect_close("weight", &rounded, &weight, [weight.len()], BF16_TOLERANCE)?;
            for array in [StateArray::FirstMoment, StateArray::SecondMoment, StateArray::Average] {
                let values = |run: &Run| run.optimizer.state(array, index)?.expect("it is kept").to_vec_f32();
                let (found, expected) = (values(&cuda)?, values(&cpu)?);
                expect_close(
                    &format!("{array:?}"),
                    &found,
                    &expected,
                    [expected.len()],
                    F32_TOLERANCE,
                )?;
            }
            assert!(
                cuda.gradients[index].to_vec_f32()?.iter().all(|value| *value == 0.0),
                "a gradient is left"
            );
        }
    }
    Ok(())
}

/// Steps by sums: all weights at once, and tensor by tensor, where those whose turn has not come are as they were.
fn parts(device: &Device) -> Outcome {
    // So large that every weight changes, in bf16 too.
    const RATE: f32 = 0.1;
    let (mut whole, mut parted) = (Run::new(device, Some(3.0))?, Run::new(device, Some(3.0))?);
    let values = |tensors: &[Tensor]| -> Result<Vec<Vec<f32>>> { tensors.iter().map(Tensor::to_vec_f32).collect() };
    for step in 0..3 {
        let all = whole.optimizer.all();
        let sums = Tensor::from_f32(device, &random(&format!("sums{step}"), all.len()), [all.len()])?;
        let sums = cast(&sums, DType::F32)?;
        let squares = sum_squares(&sums)?;
        let weights = &mut references(&mut whole.weights);
        let update = whole.optimizer.begin_sums(weights, &sums, &squares, RATE)?;
        whole.optimizer.change_by_sums(&update, all.clone(), weights, &sums)?;

        let before = values(&parted.weights)?;
        let starts: Vec<usize> = parted.optimizer.places().iter().map(|place| place.offset).collect();
        let update = {
            let weights = &mut references(&mut parted.weights);
            parted.optimizer.begin_sums(weights, &sums, &squares, RATE)?
        };
        for (part, &start) in starts.iter().enumerate() {
            let end = starts.get(part + 1).copied().unwrap_or(all.end);
            let weights = &mut references(&mut parted.weights);
            parted.optimizer.change_by_sums(&update, start..end, weights, &sums)?;
            let now = values(&parted.weights)?;
            // A few weights in bf16 may stay where they are.
            assert!(
                SIZES[part] < 64 || now[part] != before[part],
                "part {part} has not changed"
            );
            assert!(now[part + 1..] == before[part + 1..], "part {part} has changed another");
        }
        assert!(values(&parted.weights)? == values(&whole.weights)?, "step {step}");
        assert_eq!(update.values().to_vec::<f32>()?[1], 0.0, "nothing of this is infinite");
    }
    Ok(())
}

fn infinite_gradients_are_skipped() -> Outcome {
    skips(&Device::Cpu)
}

fn skips(device: &Device) -> Outcome {
    for bad in [f32::INFINITY, f32::NAN] {
        let mut run = Run::new(device, Some(1.0))?;
        run.set_gradients(0)?;
        run.step()?;
        let before: Vec<Vec<f32>> = run.weights.iter().map(Tensor::to_vec_f32).collect::<Result<_>>()?;
        run.set_gradients(1)?;
        let mut values = random("bad", SIZES[3]);
        values[29_999] = bad;
        run.gradients[3].copy_from(&Tensor::from_f32(device, &values, [SIZES[3]])?)?;
        let norm = run.step()?;
        assert!(!norm[0].is_finite() && norm[1] == 1.0, "{norm:?}");
        for (index, before) in before.iter().enumerate() {
            assert!(
                run.weights[index].to_vec_f32()? == *before,
                "a skipped step has changed a weight"
            );
            assert!(
                run.gradients[index].to_vec_f32()?.iter().all(|value| *value == 0.0),
                "a gradient is left"
            );
        }
        run.set_gradients(2)?;
        assert!(run.step()?[0].is_finite(), "the next step is like any other");
    }
    Ok(())
}

fn nonsense_is_refused() -> Outcome {
    let message = |change: &dyn Fn(&mut TrainOptions)| {
        let mut options = options("full", Recompute::None);
        change(&mut options);
        AdamW::new(&Device::Cpu, &mut [], &mut [], &options)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        message(&|options| options.adamw.beta2 = 1.0),
        "beta2 must be at least 0 and less than 1"
    );
    assert_eq!(
        message(&|options| options.ema_decay = Some(-0.1)),
        "ema_decay must be at least 0 and less than 1"
    );
    assert_eq!(
        message(&|options| options.clip_norm = Some(f32::NAN)),
        "clip_norm must be a number that is not negative"
    );
    let mut run = Run::new(&Device::Cpu, None)?;
    let (weights, gradients) = (&mut references(&mut run.weights), &mut references(&mut run.gradients));
    let message = run
        .optimizer
        .step(weights, gradients, f32::NAN)
        .unwrap_err()
        .to_string();
    assert_eq!(message, "a learning rate of NaN makes no sense");
    Ok(())
}

fn other_tensors_are_refused() -> Outcome {
    refuses_others(&Device::Cpu)
}

/// A step takes the tensors that it is given, and only such as the state was made for.
fn refuses_others(device: &Device) -> Outcome {
    let message = |change: &dyn Fn(&mut Run) -> Result<()>| -> std::result::Result<String, libtest_mimic::Failed> {
        let mut run = Run::new(device, None)?;
        run.set_gradients(0)?;
        change(&mut run)?;
        let before: Vec<Vec<f32>> = run.weights.iter().map(Tensor::to_vec_f32).collect::<Result<_>>()?;
        let outcome = run.step();
        let after: Vec<Vec<f32>> = run.weights.iter().map(Tensor::to_vec_f32).collect::<Result<_>>()?;
        assert!(before == after, "a refused step has changed a weight");
        Ok(outcome.err().map(|error| error.to_string()).unwrap_or_default())
    };
    let zeros = |size: usize| Tensor::zeros(device, [size], device.compute_dtype());
    let fewer = message(&|run| {
        run.weights.pop();
        run.gradients.pop();
        Ok(())
    })?;
    assert!(fewer.contains("not of the number and sizes"), "{fewer}");
    let smaller = message(&|run| {
        run.weights[2] = zeros(8)?;
        run.gradients[2] = zeros(8)?;
        Ok(())
    })?;
    assert!(smaller.contains("not of the number and sizes"), "{smaller}");
    let unpaired = message(&|run| {
        run.gradients.pop();
        Ok(())
    })?;
    assert!(unpaired.contains("5 weights have 4 gradients"), "{unpaired}");
    let shape = message(&|run| {
        run.gradients[1] = zeros(8)?;
        Ok(())
    })?;
    assert!(shape.contains("gradient has shape [8], expected [7]"), "{shape}");
    Ok(())
}

/// Weights and gradients that are replaced between steps: the new ones are stepped, and the memory of the old ones, which others
/// have by then, is left alone.
fn tensors_that_moved_are_followed(device: &Device) -> Outcome {
    let (mut still, mut moved) = (Run::new(device, None)?, Run::new(device, None)?);
    for step in 0..3 {
        for tensors in [&mut moved.weights, &mut moved.gradients] {
            for tensor in tensors.iter_mut() {
                let mut copy = Tensor::empty(device, tensor.shape(), tensor.dtype())?;
                copy.copy_from(tensor)?;
                *tensor = copy;
            }
        }
        let zeros = |size: &usize| Tensor::zeros(device, [*size], DType::Bf16);
        let bystanders: Vec<Tensor> = SIZES.iter().chain(&SIZES).map(zeros).collect::<Result<_>>()?;
        still.set_gradients(step)?;
        moved.set_gradients(step)?;
        assert_eq!(still.step()?, moved.step()?);
        for (still, moved) in still.weights.iter().zip(&moved.weights) {
            assert!(
                still.to_vec_f32()? == moved.to_vec_f32()?,
                "a weight that moved was not stepped"
            );
        }
        for bystander in &bystanders {
            assert!(
                bystander.to_vec_f32()?.iter().all(|value| *value == 0.0),
                "a step wrote elsewhere"
            );
        }
    }
    Ok(())
}
