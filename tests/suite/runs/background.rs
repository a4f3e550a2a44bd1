//! Checkpoints that are written while training goes on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use l2p_engine::checkpoint::{Float, WriteObserver};
use l2p_engine::model::Precision;
use l2p_engine::model::config::ModelKind;
use l2p_engine::model::zimage::{DitConfig, ZImage};
use l2p_engine::train::run::checkpoint::{Checkpoint, RunState, SaveOptions, list, save};
use l2p_engine::train::run::log::{Record, read};
use l2p_engine::train::run::{Finished, Keep, SaveJob, Saver};
use l2p_engine::train::{AdamWOptions, Batch, Recompute, TrainOptions, TrainableModel};
use l2p_engine::{Device, Error, Tensor};
use l2p_tests::{Outcome, Suite, hash_uniform, random_bf16};
use libtest_mimic::Failed;

use super::interrupt::signal;
use super::{checkpoints, command, curve, delta, train, world};
use crate::models::{random_model, small_config};

pub fn register(suite: &mut Suite) {
    suite.cpu("runs::background::files_are_those_of_a_plain_save", || {
        same_files(&Device::Cpu)
    });
    suite.cpu("runs::background::training_goes_on_during_a_slow_save", || {
        slow(&Device::Cpu)
    });
    suite.cuda("runs::background::cuda_files_are_those_of_a_plain_save", same_files);
    suite.cuda("runs::background::cuda_training_goes_on_during_a_slow_save", slow);
    suite.cpu("runs::background::errors_reach_the_run", errors);
    suite.cpu("runs::background::a_saver_that_goes_leaves_nothing_unfinished", dropped);
    suite.cpu("runs::background::the_log_tells_how_long_training_stood_still", told);
    if cfg!(unix) {
        suite.cpu("runs::background::kill_leaves_the_last_whole_checkpoint", kill);
        suite.cpu("runs::background::nobody_else_writes_meanwhile", locked);
        suite.cpu("runs::background::a_signal_waits_for_what_is_being_written", signalled);
    }
}

fn config() -> DitConfig {
    small_config(ModelKind::Pixel, 384, 16)
}

fn model(device: &Device) -> l2p_engine::Result<TrainableModel> {
    let (config, params) = (config(), random_model(&config(), &[8, 16, 24, 32]));
    let options = TrainOptions {
        policy: "paper:1".parse().expect("a freeze policy"),
        recompute: Recompute::None,
        adamw: AdamWOptions::default(),
        clip_norm: Some(1.0),
        ema_decay: Some(0.9),
        trunk: Precision::default(),
    };
    let spec = ZImage::read(&params, &config)?;
    TrainableModel::load(&spec, &params, device, &options, &mut |_, _| Ok(()))
}

/// A step on a batch of its own; the loss before it.
fn step(model: &mut TrainableModel) -> l2p_engine::Result<f32> {
    let (config, name, device) = (config(), model.steps(), model.denoiser().device().clone());
    let shape = [1, 32, 32, config.in_channels];
    let tensor = |kind: &str, shape: &[usize]| {
        let values = random_bf16(&format!("{kind} {name}"), shape.iter().product());
        match kind {
            "caption" => Tensor::from_f32(&device, &values, shape),
            _ => Tensor::from_slice(&device, &values, shape),
        }
    };
    let batch = (
        tensor("image", &shape)?,
        tensor("noise", &shape)?,
        tensor("caption", &[1, 7, config.caption_width])?,
    );
    let loss = model.accumulate(
        &Batch {
            images: &batch.0,
            noise: &batch.1,
            sigmas: &[0.6],
            captions: &[&batch.2],
        },
        1.0,
    )?;
    model.step(1e-3)?;
    Ok(loss.to_vec_f32()?[0])
}

fn state(step: u64) -> RunState {
    RunState {
        step,
        finite: Some(true),
        ..RunState::new("data".into(), "model".into(), serde_json::json!({ "lr": 1e-3 }))
    }
}

fn add_a_file(folder: &Path) -> l2p_engine::Result<()> {
    let path = folder.join("l2p.json");
    std::fs::write(&path, "{}").map_err(|error| Error::io(path, error))
}

const OPTIONS: SaveOptions = SaveOptions {
    dtype: Float::Bf16,
    average: true,
};

fn job(run: &Path, step: u64, observer: Box<dyn WriteObserver + Send>) -> SaveJob {
    SaveJob {
        run: run.into(),
        state: state(step),
        options: OPTIONS,
        complete: Box::new(add_a_file),
        share: None,
        keep: Keep {
            last: 2,
            every: 0,
            calm: 0,
        },
        observer,
    }
}

/// A saver with memory for this model.
fn saver(model: &TrainableModel) -> Saver {
    let mut saver = Saver::new();
    saver.prepare(model.denoiser().device(), model.snapshot_bytes() as u64, u64::MAX);
    saver
}

/// What is written, file by file.
fn files(folder: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>, Failed> {
    let entries = folder.read_dir()?.map(|entry| {
        let path = entry?.path();
        Ok((path.file_name().unwrap_or_default().into(), std::fs::read(&path)?))
    });
    entries.collect()
}

/// The result of the checkpoint that is being written.
fn awaited(saver: &mut Saver) -> Result<Finished, Failed> {
    Ok(saver.wait(&mut |_, _| ())?.ok_or("nothing was being written")?)
}

fn same_files(device: &Device) -> Outcome {
    let folder = tempfile::tempdir()?;
    let [plain, background, standing] = ["plain", "background", "standing"].map(|name| folder.path().join(name));
    let mut model = model(device)?;
    let (mut saver, mut without_memory) = (saver(&model), Saver::new());
    for number in 1..4 {
        step(&mut model)?;
        let expected = save(&plain, &model, &state(number), OPTIONS, &add_a_file, &mut ())?;
        let begun = saver.begin(&mut model, job(&background, number, Box::new(())), Instant::now())?;
        assert!(begun.is_none(), "it was not written in the background");
        let finished = awaited(&mut saver)?;
        let step = finished.step;
        let saved = finished.into_saved()?;
        assert_eq!(
            (step, saved.bytes, saved.folder.file_name()),
            (number, expected.bytes, expected.folder.file_name())
        );
        let (expected, found) = (files(&expected.folder)?, files(&saved.folder)?);
        assert_eq!(found.len(), 5);
        assert!(found == expected, "the files of step {number} differ");
        // Without memory it is written at once.
        let begun = without_memory.begin(&mut model, job(&standing, number, Box::new(())), Instant::now())?;
        let finished = begun.ok_or("it was not written at once")?;
        assert_eq!(finished.stall_seconds, finished.seconds);
        assert!(files(&finished.into_saved()?.folder)? == expected);
    }
    // Old ones are deleted once the new one is there.
    assert_eq!(list(&background)?.len(), 2);
    Ok(())
}

/// Lets bytes pass when it is told to.
struct Gate {
    open: Receiver<()>,
    reached: Option<Sender<()>>,
}

impl WriteObserver for Gate {
    fn begin(&mut self, _bytes: u64) {}

    fn advance(&mut self, _bytes: u64) -> l2p_engine::Result<()> {
        // A closed channel is an open gate.
        if self.reached.take().is_some() {
            let _ = self.open.recv();
        }
        Ok(())
    }
}

/// A gate, what opens it, and what is closed when it is reached.
fn gate() -> (Box<Gate>, Sender<()>, Receiver<()>) {
    let ((opener, open), (reached, arrival)) = (channel(), channel());
    let reached = Some(reached);
    (Box::new(Gate { open, reached }), opener, arrival)
}

fn slow(device: &Device) -> Outcome {
    let folder = tempfile::tempdir()?;
    let [plain, run] = ["plain", "run"].map(|name| folder.path().join(name));
    let (mut unsaved, mut model) = (model(device)?, model(device)?);
    let mut saver = saver(&model);
    let mut losses = [Vec::new(), Vec::new()];
    let mut both = |unsaved: &mut TrainableModel, model: &mut TrainableModel| -> l2p_engine::Result<()> {
        losses[0].push(step(unsaved)?);
        losses[1].push(step(model)?);
        Ok(())
    };
    for _ in 0..2 {
        both(&mut unsaved, &mut model)?;
    }
    let expected = save(&plain, &unsaved, &state(2), OPTIONS, &add_a_file, &mut ())?;
    let (slow, opener, arrival) = gate();
    assert!(saver.begin(&mut model, job(&run, 2, slow), Instant::now())?.is_none());
    assert!(arrival.recv().is_err(), "closed when the first bytes are written");
    // The thread stands; training does not.
    for _ in 0..3 {
        both(&mut unsaved, &mut model)?;
        assert!(saver.poll()?.is_none());
    }
    assert_eq!((saver.in_flight(), model.steps()), (Some(2), 5));
    assert!(list(&run)?.is_empty(), "what is not whole has a checkpoint's name");
    let second = saver.begin(&mut model, job(&run, 5, Box::new(())), Instant::now());
    let message = second.err().ok_or("two are written at a time")?.to_string();
    assert!(message.contains("is being written still"), "{message}");
    drop(opener);
    let finished = awaited(&mut saver)?;
    assert!(finished.stall_seconds < finished.seconds);
    let found = files(&finished.into_saved()?.folder)?;
    assert!(found == files(&expected.folder)?, "it is not of the step that it says");
    both(&mut unsaved, &mut model)?;
    assert_eq!(losses[0], losses[1]);
    assert!(
        unsaved.parameter_values()? == model.parameter_values()?,
        "saving changes the training"
    );
    // It is one that a run goes on from.
    let checkpoint = Checkpoint::open(&run.join("checkpoints/step-00000002"))?;
    assert!(checkpoint.verify(&mut |_, _| Ok(()))?.is_empty());
    assert!(checkpoint.restore(&mut model)?.is_none());
    assert_eq!(model.steps(), 2);
    Ok(())
}

/// A disk that is full after some bytes.
struct Full(u64);

impl WriteObserver for Full {
    fn begin(&mut self, _bytes: u64) {}

    fn advance(&mut self, bytes: u64) -> l2p_engine::Result<()> {
        self.0 = self.0.saturating_sub(bytes);
        match self.0 {
            0 => Err(Error::io("disk", std::io::ErrorKind::StorageFull.into())),
            _ => Ok(()),
        }
    }
}

fn errors() -> Outcome {
    let folder = tempfile::tempdir()?;
    let mut model = model(&Device::Cpu)?;
    let mut saver = saver(&model);
    step(&mut model)?;
    saver.begin(&mut model, job(folder.path(), 1, Box::new(())), Instant::now())?;
    awaited(&mut saver)?.into_saved()?;
    let before = files(&folder.path().join("checkpoints/step-00000001"))?;
    step(&mut model)?;
    let all: u64 = before.values().map(|bytes| bytes.len() as u64).sum();
    // In the first file, and in the last.
    for room in [1000, all - 10_000] {
        saver.begin(&mut model, job(folder.path(), 2, Box::new(Full(room))), Instant::now())?;
        let error = awaited(&mut saver)?.into_saved().err().ok_or("a full disk took it")?;
        assert!(
            matches!(&error, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull),
            "{error}"
        );
        assert_eq!(checkpoints(folder.path())?, ["step-00000001"]);
        assert!(files(&folder.path().join("checkpoints/step-00000001"))? == before);
    }
    // The same memory serves the next one.
    saver.begin(&mut model, job(folder.path(), 2, Box::new(())), Instant::now())?;
    awaited(&mut saver)?.into_saved()?;
    assert_eq!(checkpoints(folder.path())?, ["step-00000001", "step-00000002"]);
    Ok(())
}

fn dropped() -> Outcome {
    let folder = tempfile::tempdir()?;
    let mut model = model(&Device::Cpu)?;
    let mut saver = saver(&model);
    let (slow, opener, arrival) = gate();
    saver.begin(&mut model, job(folder.path(), 1, slow), Instant::now())?;
    assert!(arrival.recv().is_err());
    let opening = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        drop(opener);
    });
    drop(saver);
    assert_eq!(checkpoints(folder.path())?, ["step-00000001"]);
    opening.join().map_err(|_| "the thread panicked")?;
    Ok(())
}

fn told() -> Outcome {
    let folder = tempfile::tempdir()?;
    let finished = train(world()?, folder.path(), &[])?.success()?;
    let records = read(folder.path())?;
    let mut steps = Vec::new();
    for record in &records {
        if let Record::Checkpoint {
            step,
            seconds,
            stall_seconds,
            ..
        } = record
        {
            let stall = stall_seconds.ok_or("it is not told")?;
            assert!(0.0 < stall && stall <= *seconds, "{stall} of {seconds}");
            steps.push(*step);
        }
    }
    assert_eq!(steps, [4, 8, 12]);
    let lines = finished.stderr.lines().filter(|line| line.contains("  saved "));
    let told = lines
        .filter(|line| line.contains(", training stood still for "))
        .count();
    assert_eq!(told, 3, "{}", finished.stderr);
    Ok(())
}

/// What is half-written in a run's folder.
fn half_written(out: &Path) -> Result<bool, Failed> {
    Ok(checkpoints(out)?.iter().any(|name| name.starts_with(".step-")))
}

/// Kills a run while it writes checkpoints, at moments that nobody can foresee.
fn kill() -> Outcome {
    const KILLS: usize = 20;
    let folder = tempfile::tempdir()?;
    let (parted, whole) = (folder.path().join("parted"), folder.path().join("whole"));
    // More to write than a step computes.
    let arguments = |every, steps| {
        let words = [
            "--policy",
            "full",
            "--ema",
            "0.9",
            "--validate-every",
            "0",
            "--log-every",
            "1",
        ];
        [&words[..], &["--save-every", every, "--steps", steps]].concat()
    };
    let (mut newest, mut caught) = (0, 0);
    for wait in hash_uniform("moments of death while writing", KILLS) {
        let mut child = command(world()?, &parted, &arguments("1", "100000"))?
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let (first, started) = (newest, Instant::now());
        while !(newest > first && half_written(&parted)?) {
            assert!(started.elapsed() < Duration::from_secs(60), "it takes too long");
            assert!(child.try_wait()?.is_none(), "the program ended by itself");
            std::thread::sleep(Duration::from_millis(1));
            newest = list(&parted)?.last().map_or(0, |(step, _)| *step);
        }
        std::thread::sleep(Duration::from_secs_f32(0.004 * (wait + 1.0)));
        child.kill()?;
        child.wait()?;
        caught += usize::from(half_written(&parted)?);
        let (found, refused) = Checkpoint::newest(&parted)?;
        assert!(refused.is_empty(), "{refused:?}");
        let found = found.ok_or("there is no checkpoint")?;
        assert!(found.verify(&mut |_, _| Ok(()))?.is_empty());
        assert!(found.state.step >= newest, "the checkpoint of step {newest} is gone");
        newest = found.state.step;
    }
    assert!(caught > 0, "no kill came while a checkpoint was written");
    let steps = (newest + 2).to_string();
    train(world()?, &parted, &arguments("1", &steps))?.success()?;
    assert!(!half_written(&parted)?);
    train(world()?, &whole, &arguments("0", &steps))?.success()?;
    assert_eq!(curve(&parted)?, curve(&whole)?);
    let name = format!("step-{steps:0>8}");
    assert!(delta(&parted, &name)? == delta(&whole, &name)?);
    Ok(())
}

/// A second run on the same folder is refused while the first one writes, and disturbs nothing.
fn locked() -> Outcome {
    let folder = tempfile::tempdir()?;
    let out = folder.path();
    let many = ["--steps", "100000", "--validate-every", "0", "--save-every", "1"];
    let mut first = command(world()?, out, &many)?
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let started = Instant::now();
    while (list(out)?.is_empty() || !half_written(out)?) && started.elapsed() < Duration::from_secs(60) {
        assert!(first.try_wait()?.is_none(), "the program ended by itself");
        std::thread::sleep(Duration::from_millis(1));
    }
    let second = train(world()?, out, &["--steps", "3"])?;
    let running = first.try_wait()?.is_none();
    first.kill()?;
    first.wait()?;
    assert!(running, "the first run was disturbed");
    assert!(
        second.code == 1 && second.stderr.contains("is in use by l2p-train"),
        "{}",
        second.stderr
    );
    let (found, refused) = Checkpoint::newest(out)?;
    assert!(refused.is_empty(), "{refused:?}");
    assert!(found.is_some());
    Ok(())
}

/// Asked to end while a checkpoint is written, a run ends with that one whole and with the last step saved.
fn signalled() -> Outcome {
    let folder = tempfile::tempdir()?;
    let out = folder.path();
    let many = [
        "--policy",
        "full",
        "--steps",
        "100000",
        "--validate-every",
        "0",
        "--save-every",
        "1",
        "--log-every",
        "1",
    ];
    for _ in 0..3 {
        let mut child = command(world()?, out, &many)?
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let newest = || -> Result<Option<u64>, Failed> { Ok(list(out)?.last().map(|(step, _)| *step)) };
        let (started, first) = (Instant::now(), newest()?);
        while !(newest()? > first && half_written(out)?) && started.elapsed() < Duration::from_secs(60) {
            assert!(child.try_wait()?.is_none(), "the program ended by itself");
            std::thread::sleep(Duration::from_millis(1));
        }
        signal(&child, "TERM")?;
        let output = child.wait_with_output()?;
        let stderr = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(130), "{stderr}");
        assert!(!half_written(out)?, "something half-written is left");
        let newest = Checkpoint::newest(out)?.0.ok_or("there is no checkpoint")?;
        assert!(newest.verify(&mut |_, _| Ok(()))?.is_empty());
        assert_eq!(Some(newest.state.step), curve(out)?.last().map(|point| point.0));
    }
    Ok(())
}
