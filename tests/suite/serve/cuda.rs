//! A worker on a GPU: what a second picture needs, and who may touch the device.

use l2p_engine::Device;
use l2p_engine::pipeline::Asked;
use l2p_engine::serve::{Request, Worker, WorkerOptions};
use l2p_tests::{Outcome, Suite};

use super::{draw, files, small, worker};
use crate::flow::taken;

pub fn register(suite: &mut Suite) {
    suite.cuda("serve::cuda::a_second_picture_needs_nothing_new", nothing_new);
    suite.cuda("serve::cuda::recordings_are_bounded", bounded);
    suite.cuda("serve::cuda::a_gpu_has_one_worker", one_worker);
}

/// Pictures of one shape, with other words of as many tokens and other seeds, through a worker that has drawn one.
fn nothing_new(device: &Device) -> Outcome {
    for name in ["source", "pixel"] {
        let worker = worker(name, device)?;
        let settings = worker.files().settings(&Asked {
            steps: Some(5),
            ..Asked::default()
        })?;
        let mut counts = Vec::new();
        let mut drawn = Vec::new();
        for (prompt, seed) in [("fox", 1), ("fox", 2), ("frog", 1), ("fox", 1)] {
            let before = taken(device);
            drawn.push(draw(&worker, Request::of(prompt, settings, seed))?);
            counts.push((before, taken(device)));
        }
        for (before, after) in &counts[1..2] {
            assert_eq!(before, after, "{name}: memory, recordings and searches");
        }
        let (before, after) = counts[3];
        assert_eq!(before, after, "{name}: the first picture again");
        assert!(drawn[0] == drawn[3], "{name}: the same request has other bits");
        assert!(drawn[0] != drawn[1] && drawn[0] != drawn[2]);
        // As a worker draws that keeps nothing.
        drop(worker);
        let options = WorkerOptions {
            recordings: 0,
            ..WorkerOptions::default()
        };
        let fresh = Worker::start(files(name, device)?, options)?;
        let again = draw(&fresh, Request::of("fox", settings, 2))?;
        assert!(again == drawn[1], "{name}: kept steps draw other bits");
    }
    Ok(())
}

fn bounded(device: &Device) -> Outcome {
    let options = WorkerOptions {
        recordings: 2,
        ..WorkerOptions::default()
    };
    let worker = Worker::start(files("pixel", device)?, options)?;
    let settings = small(&worker)?;
    for width in [64, 96, 128, 160] {
        let settings = l2p_engine::pipeline::Settings {
            width,
            steps: 4,
            ..settings
        };
        draw(&worker, Request::of("fox", settings, 1))?;
        let kept = worker.call(|pipeline| Ok(pipeline.kept_steps()))?.wait()?.value;
        assert!(kept <= 2, "{kept} are kept");
    }
    Ok(())
}

fn one_worker(device: &Device) -> Outcome {
    let first = worker("pixel", device)?;
    let second = Worker::start(first.files().clone(), WorkerOptions::default());
    let message = second.err().ok_or("a second worker was started")?.to_string();
    assert!(message.contains("has a worker already"), "{message}");
    drop(first);
    worker("pixel", device).map(drop)
}
