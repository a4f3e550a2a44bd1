//! Models whose weights are in eight bits or in host memory.

use std::sync::Arc;

use l2p_engine::Device;
use l2p_engine::image_io::RgbImage;
use l2p_engine::layers::Spread;
use l2p_engine::model::Precision;
use l2p_engine::ops::quantise::Coding;
use l2p_engine::pipeline::Settings;
use l2p_engine::serve::{Drawn, Request, Worker, WorkerOptions};
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;

use super::{draw, opened, small};

pub fn register(suite: &mut Suite) {
    suite.cpu("serve::precision::eight_bits_draw_nearly_the_same", || {
        eight_bits(&Device::Cpu)
    });
    suite.cpu("serve::precision::what_makes_no_sense_is_refused", refused);
    suite.cuda("serve::precision::eight_bits_draw_nearly_the_same_on_cuda", eight_bits);
    suite.cuda("serve::precision::weights_in_host_memory_draw_the_same", in_host_memory);
}

fn of(coding: Option<Coding>, stream: Option<Spread>) -> Precision {
    Precision {
        coding,
        stream,
        ..Precision::default()
    }
}

fn worker(name: &str, device: &Device, trunk: Precision, text: Precision) -> Result<Worker, Failed> {
    let files = opened(name, device)?.kept_in(trunk, text)?;
    Ok(Worker::start(Arc::new(files), WorkerOptions::default())?)
}

/// Peak signal-to-noise ratio in decibels.
fn psnr(a: &RgbImage, b: &RgbImage) -> f64 {
    let squares: f64 = a
        .pixels()
        .iter()
        .zip(b.pixels())
        .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
        .sum();
    10.0 * (255f64.powi(2) * a.pixels().len() as f64 / squares.max(1e-9)).log10()
}

/// With the demo's own number of steps: where a trajectory ends is what people see.
fn settings(worker: &Worker) -> Result<Settings, Failed> {
    let own = worker.files().defaults()?;
    Ok(Settings {
        steps: own.steps.min(8),
        ..own
    })
}

fn eight_bits(device: &Device) -> Outcome {
    for name in ["source", "pixel"] {
        let usual = worker(name, device, Precision::default(), Precision::default())?;
        let settings = settings(&usual)?;
        let prompts = [("fox", 1), ("slice of pizza", 2)];
        let all = |worker: &Worker| -> Result<Vec<Drawn>, Failed> {
            prompts
                .iter()
                .map(|(prompt, seed)| draw(worker, Request::of(*prompt, settings, *seed)))
                .collect()
        };
        let expected = all(&usual)?;
        drop(usual);
        for (coding, least) in [(Coding::Int8, 30.0), (Coding::Float8, 20.0)] {
            let trunk = of(Some(coding), None);
            let found = all(&worker(name, device, trunk.clone(), Precision::default())?)?;
            for ((found, expected), (prompt, _)) in found.iter().zip(&expected).zip(prompts) {
                let ratio = psnr(&found.pictures[0], &expected.pictures[0]);
                assert!(
                    ratio >= least && found != expected,
                    "{name}, {coding}, {prompt}: {ratio:.1} dB"
                );
            }
            // Everything kept as it was is everything as it was.
            let kept = Precision {
                keep: vec!["*".into()],
                ..trunk
            };
            let same = draw(
                &worker(name, device, kept, Precision::default())?,
                Request::of("fox", settings, 1),
            )?;
            assert!(
                same == expected[0],
                "{name}, {coding}: --trunk-keep '*' draws other bits"
            );
        }
    }
    Ok(())
}

/// More blocks than there are places on the device, as many, fewer; call by call, recorded and replayed; the text encoder too.
fn in_host_memory(device: &Device) -> Outcome {
    for (name, coding) in [("pixel", None), ("pixel", Some(Coding::Int8)), ("source", None)] {
        let resident = worker(name, device, of(coding, None), Precision::default())?;
        let settings = Settings {
            steps: 6,
            cfg: 2.0,
            solver: l2p_engine::flow::solver::Solver::Euler,
            ..small(&resident)?
        };
        let requests = || [("fox", 1), ("fox", 2)].map(|(prompt, seed)| Request::of(prompt, settings, seed));
        let all = |worker: &Worker| -> Result<Vec<Drawn>, Failed> {
            requests().into_iter().map(|request| draw(worker, request)).collect()
        };
        let expected = all(&resident)?;
        drop(resident);
        let files = opened(name, device)?;
        let (blocks, layers) = (files.spec().main_blocks(), files.prompt_files()?.layers());
        drop(files);
        for count in [1, blocks / 2, blocks - 1, blocks] {
            let [trunk, text] = [Spread::of(count, blocks)?, Spread::of(layers, layers)?];
            let streamed = worker(name, device, of(coding, trunk), of(None, text))?;
            assert!(
                all(&streamed)? == expected,
                "{name}, {coding:?}: {count} of {blocks} blocks in host memory draw other bits"
            );
        }
    }
    Ok(())
}

fn refused() -> Outcome {
    let unused = Precision {
        coding: Some(Coding::Int8),
        keep: vec!["layers.0.attention.*".into(), "no.such.*".into()],
        stream: None,
    };
    let files = || opened("pixel", &Device::Cpu);
    let refused = files()?.kept_in(unused, Precision::default()).err();
    let message = refused.ok_or("a pattern that fits nothing was taken")?.to_string();
    assert!(message.contains("`no.such.*`"), "{message}");
    let mut cpu = files()?;
    let settings = cpu.defaults()?;
    let message = cpu.fit(Some(1 << 40), &settings, 1).unwrap_err().to_string();
    assert!(
        message.contains("--vram") && message.contains("--device cuda"),
        "{message}"
    );
    let on_cpu = files()?.kept_in(of(None, Spread::of(1, 2)?), Precision::default())?;
    let worker = Worker::start(Arc::new(on_cpu), WorkerOptions::default())?;
    let message = worker.load()?.wait().unwrap_err().to_string();
    assert!(message.contains("for a GPU only"), "{message}");
    Ok(())
}
