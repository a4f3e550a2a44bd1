//! Walks of diffusers' schedulers.

use serde::Deserialize;

use super::sampler::{Conditioning, Guides, Sampler, Walk, sample};
use super::schedule::Schedule;
use super::solver::Solver;
use crate::device::Device;
use crate::model::Denoiser;
use crate::model::objective::{Discrete, Objective, Trained};
use crate::model::plain::linear::Linear;
use crate::tensor::Tensor;

#[derive(Deserialize)]
struct Walks {
    noise: Vec<f32>,
    cfg: f32,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    objective: Trained,
    solver: Solver,
    steps: usize,
    shift: f64,
    #[serde(default)]
    left: std::collections::BTreeMap<i64, f64>,
    states: Vec<Vec<f32>>,
}

fn walks() -> Walks {
    serde_json::from_str(include_str!("../../../tests/fixtures/data/solvers.json")).unwrap()
}

fn captions() -> [Tensor; 2] {
    [1, 2].map(|tokens| Tensor::from_slice(&Device::Cpu, &vec![0.0_f32; tokens], [1, tokens, 1]).unwrap())
}

/// The largest difference, against the largest number.
fn distance(found: &[f32], expected: &[f32]) -> f32 {
    let largest = expected.iter().fold(1.0_f32, |largest, value| largest.max(value.abs()));
    let differences = found
        .iter()
        .zip(expected)
        .map(|(found, expected)| (found - expected).abs());
    differences.fold(0.0, f32::max) / largest
}

/// Every step of every solver is that of diffusers' class, guided.
#[test]
fn every_step_is_that_of_diffusers() {
    let Walks { noise, cfg, cases } = walks();
    let [prompt, negative] = captions();
    let noise = Tensor::from_slice(&Device::Cpu, &noise, [1, 2, 2, 1]).unwrap();
    assert!(cases.len() > 40);
    for paints in [false, true] {
        let model = Linear { paints };
        let conditioning = Conditioning {
            prompt: model.prepare(&[&prompt], [2, 2]).unwrap(),
            negative: Some((model.prepare(&[&negative], [2, 2]).unwrap(), cfg)),
        };
        for case in &cases {
            let schedule = Schedule::of(&case.objective, case.solver, case.steps, case.shift).unwrap();
            assert_eq!((schedule.steps(), case.states.len()), (case.steps, case.steps));
            for (step, expected) in case.states.iter().enumerate() {
                let own = noise.clone().into_unshared().unwrap();
                let mut walk = Walk::new(&model, &conditioning, &schedule, own).unwrap();
                (0..=step).for_each(|_| walk.advance().unwrap());
                let found = walk.finish().to_vec::<f32>().unwrap();
                let distance = distance(&found, expected);
                assert!(
                    distance < 1e-5,
                    "{} by {}, step {step} of {}: {found:?}, {expected:?}, {distance:e}",
                    case.objective,
                    case.solver,
                    case.steps
                );
            }
        }
    }
}

#[test]
fn tables_are_those_of_diffusers() {
    let cases = walks().cases;
    let tables = cases.iter().filter(|case| !case.left.is_empty());
    for case in tables {
        let discrete = Discrete::of(&case.objective, 1.0).unwrap().unwrap();
        for (&timestep, &left) in &case.left {
            let [a, _] = discrete.exact(discrete.level(timestep))[0];
            assert!(
                (a - left.sqrt()).abs() < 1e-7 + 1e-6 * a,
                "{} at {timestep}: {a}, {}",
                case.objective,
                left.sqrt()
            );
        }
    }
}

/// A step that is kept draws the same again, though another picture's predictions lay in it, and those of first order do not share it.
#[test]
fn kept_steps_forget_what_they_found() {
    let model = Linear { paints: false };
    let captions = captions();
    let guides = Guides {
        prompts: &captions[..1],
        negatives: &captions[1..],
        cfg: 2.0,
    };
    let noise = |scale: f32| {
        let values = [0.1, 0.5, -0.4, 1.0].map(|value: f32| value * scale);
        Tensor::from_slice(&Device::Cpu, &values, [1, 2, 2, 1]).unwrap()
    };
    let mut sampler = Sampler::keeping(2);
    let mut go_on = |_| Ok(());
    for solver in [Solver::Dpm2M, Solver::Euler, Solver::Dpm2M] {
        let schedule = Schedule::of(&Trained::FLOW, solver, 5, 2.0).unwrap();
        for scale in [1.0, f32::INFINITY, 3.0] {
            let drawn = sampler
                .draw(&model, guides, &schedule, noise(scale), &mut go_on)
                .unwrap();
            let conditioning = guides.prepare(&model, [2, 2]).unwrap();
            let once = sample(&model, &conditioning, &schedule, noise(scale), &mut go_on).unwrap();
            let [drawn, once] = [drawn, once].map(|drawn| drawn.to_vec::<f32>().unwrap());
            let bits = |values: Vec<f32>| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            if scale.is_finite() {
                assert_eq!(bits(drawn), bits(once), "{solver}, {scale}");
            }
        }
    }
    assert_eq!(sampler.kept(), 2);
}
