//! Schedules and whole walks from noise to latent.

use l2p_engine::flow::sampler::{Conditioning, Guides, Listener, Sampler, Seen, StepReport, Walk, sample};
use l2p_engine::flow::schedule::Schedule;
use l2p_engine::flow::solver::Solver;
use l2p_engine::model::Denoiser;
use l2p_engine::model::config::ModelKind;
use l2p_engine::model::objective::{FlowMatching, Objective, Prediction, Trained};
use l2p_engine::ops::guidance::{Guidance, guided_euler_step};
use l2p_engine::ops::noise::normal_noise;
use l2p_engine::{Device, Error, Tensor};
use l2p_tests::fixtures::Group;
use l2p_tests::{Outcome, Suite, expect_close};

use crate::models::dit::{caption, config, load};
use crate::models::{channels_first, input_image, params, random_model, small_config};

pub fn register(suite: &mut Suite) {
    suite.cpu("flow::sampler::tables_equal_diffusers", tables_equal_diffusers);
    suite.cpu(
        "flow::sampler::a_walk_equals_the_pipelines",
        a_walk_equals_the_pipelines,
    );
    suite.cpu(
        "flow::sampler::every_step_has_its_modulations",
        every_step_has_its_modulations,
    );
    suite.cpu("flow::sampler::kept_steps_draw_the_same", || {
        kept_steps_draw_the_same(&Device::Cpu)
    });
    suite.cuda(
        "flow::sampler::a_second_picture_needs_nothing_new_on_cuda",
        kept_steps_draw_the_same,
    );
    suite.cpu("flow::sampler::steps_of_second_order", || {
        recorded_steps_look_back(&Device::Cpu)
    });
    suite.cuda(
        "flow::sampler::recorded_steps_of_second_order_on_cuda",
        recorded_steps_look_back,
    );
    suite.cpu("flow::sampler::states_are_seen_as_they_were", || {
        states_are_seen_as_they_were(&Device::Cpu)
    });
    suite.cuda(
        "flow::sampler::states_are_seen_as_they_were_on_cuda",
        states_are_seen_as_they_were,
    );
    suite.cpu("flow::sampler::steps_are_reported_and_stopped", || {
        steps_are_reported_and_stopped(&Device::Cpu)
    });
    suite.cuda(
        "flow::sampler::steps_are_reported_and_stopped_on_cuda",
        steps_are_reported_and_stopped,
    );
}

fn tables_equal_diffusers() -> Outcome {
    for case in Group::load("flow").cases("table.") {
        let shift = case.config(&["shift"]).as_f64().ok_or("a shift is a number")?;
        let schedule = Schedule::new(case.size(&["steps"]), shift)?;
        let sigmas: Vec<f32> = (0..=schedule.steps()).map(|step| schedule.sigma(step)).collect();
        case.check("sigmas", &sigmas)?;
        let times: Vec<f32> = (0..schedule.steps())
            .map(|step| FlowMatching.time(schedule.sigma(step)))
            .collect();
        case.check("t", &times)?;
    }
    Ok(())
}

fn a_walk_equals_the_pipelines() -> Outcome {
    let group = Group::load("flow");
    let case = group.case("trajectory");
    let params = params(&case);
    let dit = load(&params, &config(&case, &params)?, &Device::Cpu)?;
    let noise = input_image(&case, "noise")?;
    let prepare = |name: &str| dit.prepare(&[&caption(&case, name)?], [noise.dim(1), noise.dim(2)]);
    let number = |name: &str| case.config(&[name]).as_f64().ok_or("a setting is a number");
    let schedule = Schedule::new(case.size(&["steps"]), number("shift")?)?;
    let cfg = number("cfg")? as f32;
    let (prompt, negative) = (prepare("cap.0")?, prepare("cap.1")?);

    // Every step by itself, then the sampler, which makes the modulation vectors of all steps in one product.
    let fresh = || Tensor::from_slice(&Device::Cpu, noise.as_slice::<f32>()?, noise.shape());
    let mut x = fresh()?;
    for step in 0..schedule.steps() {
        let modulations = dit.modulate(&[1.0 - schedule.sigma(step)], None)?;
        let [velocity, away] = [&prompt, &negative].map(|prepared| dit.forward(&x, prepared, &modulations));
        let (velocity, away) = (velocity?, away?);
        let guidance = Guidance { negative: &away, cfg };
        let factors = FlowMatching.step(schedule.sigma(step), schedule.sigma(step + 1));
        let factors = Tensor::from_slice(&Device::Cpu, &factors, [2])?;
        guided_euler_step(&mut x, &velocity, Some(guidance), &factors)?;
        case.check(&format!("x.{}", step + 1), &channels_first(&x)?)?;
    }
    let conditioning = Conditioning {
        prompt,
        negative: Some((negative, cfg)),
    };
    let walked = sample(&dit, &conditioning, &schedule, fresh()?, &mut |_| Ok(()))?;
    case.check("x.4", &channels_first(&walked)?)?;
    expect_close(
        "the sampler and single steps",
        walked.as_slice()?,
        x.as_slice()?,
        x.shape(),
        3e-6,
    )
}

/// A walk of more steps than a table of modulations holds, without guidance, step by step by hand.
fn every_step_has_its_modulations() -> Outcome {
    let model = small_config(ModelKind::Latent, 384, 2);
    let dit = load(&random_model(&model, &[]), &model, &Device::Cpu)?;
    let caption = Tensor::from_f32(&Device::Cpu, &[0.5; 7 * 96], [1, 7, 96])?;
    let prompt = dit.prepare(&[&caption], [4, 4])?;
    let values: Vec<f32> = (0..4 * 4 * 16).map(|index| (index % 13) as f32 / 6.0 - 1.0).collect();
    let noise = || Tensor::from_slice(&Device::Cpu, &values, [1, 4, 4, 16]);
    let schedule = Schedule::new(35, 3.0)?;
    let mut x = noise()?;
    for step in 0..schedule.steps() {
        let modulations = dit.modulate(&[1.0 - schedule.sigma(step)], None)?;
        let velocity = dit.forward(&x, &prompt, &modulations)?;
        let factors = FlowMatching.step(schedule.sigma(step), schedule.sigma(step + 1));
        let factors = Tensor::from_slice(&Device::Cpu, &factors, [2])?;
        guided_euler_step(&mut x, &velocity, None, &factors)?;
    }
    let conditioning = Conditioning { prompt, negative: None };
    for recorded in [true, false] {
        let walk = Walk::new(&dit, &conditioning, &schedule, noise()?)?;
        let mut walk = if recorded { walk } else { walk.unrecorded() };
        for _ in 0..schedule.steps() {
            walk.advance()?;
        }
        assert!(walk.advance().is_err());
        let walked = walk.finish();
        expect_close("a long walk", walked.as_slice()?, x.as_slice()?, x.shape(), 3e-5)?;
    }
    Ok(())
}

/// Pictures of one shape, other captions and other noise, by a sampler that keeps its steps and by one that begins anew.
fn kept_steps_draw_the_same(device: &Device) -> Outcome {
    let (euler, second) = (Schedule::new(5, 3.0)?, second_order()?);
    for (kind, patch, schedule) in [
        (ModelKind::Latent, 2, &euler),
        (ModelKind::Pixel, 16, &euler),
        (ModelKind::Latent, 2, &second),
        (ModelKind::Pixel, 16, &second),
    ] {
        let model = small_config(kind, 384, patch);
        let dit = load(&random_model(&model, &[16, 32, 48, 64]), &model, device)?;
        // The latent as many tokens as the picture has patches.
        let side = if kind == ModelKind::Latent { 8 } else { 64 };
        let extents = [1, side, side, model.in_channels];
        let noise = |seed| normal_noise(device, extents, seed, 0);
        let caption = |tokens: usize, seed: usize| {
            let values: Vec<f32> = (0..tokens * 96)
                .map(|index| ((index * seed) % 17) as f32 / 8.0 - 1.0)
                .collect();
            Tensor::from_f32(device, &values, [1, tokens, 96])
        };
        // Twice one shape, another one, the first again, which was given up for it, and one with guidance.
        let pictures = [
            (7, 3, 1.0),
            (7, 5, 1.0),
            (40, 3, 1.0),
            (7, 5, 1.0),
            (7, 7, 2.5),
            (7, 9, 2.5),
        ];
        let mut sampler = Sampler::keeping(1);
        let mut counts = Vec::new();
        let mut drawn = Vec::new();
        for (index, (tokens, seed, cfg)) in pictures.into_iter().enumerate() {
            let (prompts, away) = ([caption(tokens, seed)?], [caption(3, seed + 1)?]);
            let guides = Guides {
                prompts: &prompts,
                negatives: if cfg == 1.0 { &[] } else { &away },
                cfg,
            };
            let noise = noise(index as u64)?;
            let before = taken(device);
            let picture = sampler.draw(&dit, guides, schedule, noise, &mut |_| Ok(()))?;
            device.synchronize()?;
            counts.push((before, taken(device)));
            drawn.push(picture.to_vec_f32()?);
        }
        for again in [1, 5] {
            let (before, after) = counts[again];
            assert_eq!(
                before, after,
                "{kind:?}, picture {again}: memory, recordings and searches"
            );
        }
        for (index, (tokens, seed, cfg)) in pictures.into_iter().enumerate() {
            let (prompts, away) = ([caption(tokens, seed)?], [caption(3, seed + 1)?]);
            let negatives: &[Tensor] = if cfg == 1.0 { &[] } else { &away };
            let guides = Guides {
                prompts: &prompts,
                negatives,
                cfg,
            };
            let conditioning = guides.prepare(&dit, [extents[1], extents[2]])?;
            let fresh = sample(&dit, &conditioning, schedule, noise(index as u64)?, &mut |_| Ok(()))?;
            assert!(
                fresh.to_vec_f32()? == drawn[index],
                "{kind:?}, picture {index} has other bits"
            );
        }
        assert!(
            drawn[0] != drawn[1] && drawn[1] != drawn[3],
            "{kind:?}: captions and noise count"
        );
    }
    Ok(())
}

/// Five steps of second order for a model of v.
fn second_order() -> Result<Schedule, Error> {
    Schedule::of(&Trained::new(Prediction::V, None)?, Solver::Dpm2M, 5, 1.0)
}

/// Recorded steps of a solver that looks back, with guidance, give the bits of steps that run call by call.
fn recorded_steps_look_back(device: &Device) -> Outcome {
    for (kind, patch) in [(ModelKind::Latent, 2), (ModelKind::Pixel, 16)] {
        let model = small_config(kind, 384, patch);
        let dit = load(&random_model(&model, &[16, 32, 48, 64]), &model, device)?;
        let side = if kind == ModelKind::Latent { 8 } else { 64 };
        let caption = |value: f32| Tensor::from_f32(device, &[value; 7 * 96], [1, 7, 96]);
        let (prompts, negatives) = ([caption(0.5)?], [caption(-0.25)?]);
        let guides = Guides {
            prompts: &prompts,
            negatives: &negatives,
            cfg: 2.5,
        };
        let (conditioning, schedule) = (guides.prepare(&dit, [side, side])?, second_order()?);
        let walked = |recorded: bool| {
            let noise = normal_noise(device, [1, side, side, model.in_channels], 3, 0)?;
            let mut walk = Walk::new(&dit, &conditioning, &schedule, noise)?;
            if !recorded {
                walk = walk.unrecorded();
            }
            (0..schedule.steps()).try_for_each(|_| walk.advance())?;
            walk.finish().to_vec_f32()
        };
        let found = walked(true)?;
        assert!(found.iter().all(|value| value.is_finite()));
        assert!(found == walked(false)?, "{kind:?}");
    }
    Ok(())
}

/// Looks at every state.
#[derive(Default)]
struct Looker {
    reported: usize,
    seen: Vec<(usize, [f32; 2], Vec<f32>)>,
}

impl Listener for Looker {
    fn step(&mut self, report: StepReport) -> Result<(), Error> {
        self.reported = report.done;
        Ok(())
    }

    fn looks(&self, _done: usize, _steps: usize) -> bool {
        true
    }

    fn look(&mut self, seen: &Seen<'_>) -> Result<(), Error> {
        self.seen.push((seen.done, seen.mix, (seen.values)()?));
        Ok(())
    }
}

/// A state is looked at while the next step is under way; it is the state before that step, and looking changes nothing.
fn states_are_seen_as_they_were(device: &Device) -> Outcome {
    let model = small_config(ModelKind::Pixel, 384, 16);
    let dit = load(&random_model(&model, &[16, 32, 48, 64]), &model, device)?;
    let caption = Tensor::from_f32(device, &[0.5; 7 * 96], [1, 7, 96])?;
    let conditioning = Conditioning {
        prompt: dit.prepare(&[&caption], [64, 64])?,
        negative: None,
    };
    let noise = || normal_noise(device, [1, 64, 64, 3], 3, 0);
    let schedule = Schedule::new(6, 3.0)?;
    let mut looker = Looker::default();
    let drawn = sample(&dit, &conditioning, &schedule, noise()?, &mut looker)?.to_vec_f32()?;
    assert_eq!((looker.reported, looker.seen.len()), (6, 6));
    let mut walk = Walk::new(&dit, &conditioning, &schedule, noise()?)?;
    for (step, (done, mix, values)) in looker.seen.iter().enumerate() {
        walk.advance()?;
        assert_eq!((*done, *mix), (step + 1, FlowMatching.mix(schedule.sigma(step + 1))));
        assert!(*values == walk.values()?, "the state after step {done} is another one");
    }
    assert!(drawn == looker.seen[5].2);
    Ok(())
}

/// Bytes taken from the driver, recordings, and products searched for.
pub fn taken(device: &Device) -> (u64, u64, usize) {
    match device {
        Device::Cpu => (0, 0, 0),
        Device::Cuda(cuda) => (
            device.memory_report().reserved,
            cuda.recordings(),
            cuda.searched().products,
        ),
    }
}

fn steps_are_reported_and_stopped(device: &Device) -> Outcome {
    let model = small_config(ModelKind::Latent, 384, 2);
    let dit = load(&random_model(&model, &[]), &model, device)?;
    let caption = Tensor::from_f32(device, &[0.5; 7 * 96], [1, 7, 96])?;
    let conditioning = Conditioning {
        prompt: dit.prepare(&[&caption], [4, 4])?,
        negative: None,
    };
    let noise = || Tensor::from_slice(device, &[0.25f32; 4 * 4 * 16], [1, 4, 4, 16]);
    // More steps than one table of modulations holds.
    let schedule = Schedule::new(18, 3.0)?;
    let mut reports = Vec::new();
    let mut note = |report: StepReport| {
        reports.push((report.done, report.steps));
        Ok(())
    };
    sample(&dit, &conditioning, &schedule, noise()?, &mut note)?;
    assert_eq!(reports, (1..=18).map(|done| (done, 18)).collect::<Vec<_>>());

    let mut last = 0;
    let mut stop = |report: StepReport| {
        last = report.done;
        if report.done == 3 {
            Err(Error::Interrupted)
        } else {
            Ok(())
        }
    };
    let outcome = sample(&dit, &conditioning, &schedule, noise()?, &mut stop);
    assert!(matches!(outcome.map(|_| ()), Err(Error::Interrupted)));
    assert_eq!(last, 3);
    Ok(())
}
