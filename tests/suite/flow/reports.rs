//! When steps are told.

use l2p_engine::flow::sampler::{Conditioning, StepReport, sample};
use l2p_engine::flow::schedule::Schedule;
use l2p_engine::model::Denoiser;
use l2p_engine::model::config::ModelKind;
use l2p_engine::profile::measure;
use l2p_engine::{Device, Error, Tensor};
use l2p_tests::{Outcome, Suite};

use crate::models::dit::load;
use crate::models::{random_model, small_config};

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "flow::reports::a_step_is_told_before_the_next_begins",
        a_step_is_told_before_the_next_begins,
    );
}

/// On the CPU a step is done when it was submitted: whoever stops at one pays for none after it.
fn a_step_is_told_before_the_next_begins() -> Outcome {
    let cpu = &Device::Cpu;
    let config = small_config(ModelKind::Latent, 384, 2);
    let model = load(&random_model(&config, &[]), &config, cpu)?;
    let caption = Tensor::from_f32(cpu, &[0.5; 7 * 96], [1, 7, 96])?;
    let conditioning = Conditioning {
        prompt: model.prepare(&[&caption], [4, 4])?,
        negative: None,
    };
    let schedule = Schedule::new(6, 3.0)?;
    for stop in [1, 2, 5] {
        let noise = Tensor::from_slice(cpu, &[0.25f32; 4 * 4 * 16], [1, 4, 4, 16])?;
        let (outcome, profile) = measure(cpu, || {
            Ok(sample(
                &model,
                &conditioning,
                &schedule,
                noise,
                &mut |report: StepReport| {
                    if report.done == stop {
                        Err(Error::Interrupted)
                    } else {
                        Ok(())
                    }
                },
            ))
        })?;
        assert!(matches!(outcome.map(|_| ()), Err(Error::Interrupted)));
        let steps = profile.ops.iter().filter(|op| op.name == "guided_euler_step");
        assert_eq!(steps.count(), stop);
    }
    Ok(())
}
