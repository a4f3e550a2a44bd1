//! Schedules and whole walks from noise to latent.

use l2p_engine::flow::sampler::{Conditioning, StepReport, sample};
use l2p_engine::flow::schedule::Schedule;
use l2p_engine::model::Denoiser;
use l2p_engine::model::config::ModelKind;
use l2p_engine::ops::guidance::{Guidance, guided_euler_step};
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
        case.check("t", &schedule.times())?;
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
        let delta = Tensor::from_slice(&Device::Cpu, &[schedule.delta(step)], [1])?;
        guided_euler_step(&mut x, &velocity, Some(guidance), &delta)?;
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
