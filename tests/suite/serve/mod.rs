//! A model that stays loaded: what a worker answers, in which order, and what it keeps.

mod cuda;
mod precision;
mod start;

use std::sync::Arc;

use l2p_engine::checkpoint::{ModelPaths, PathOverrides};
use l2p_engine::image_io::{ImageFormat, RgbImage, WriteOptions, encode_image, read_image, read_settings};
use l2p_engine::limits::Batch;
use l2p_engine::pipeline::{Asked, ModelFiles, Settings};
use l2p_engine::serve::{Caption, Drawn, Event, Item, Request, Ticket, Worker, WorkerOptions};
use l2p_engine::{Device, Error, HostTensor};
use l2p_tests::cli::{Finished, program};
use l2p_tests::{Outcome, Suite, models_folder};
use libtest_mimic::Failed;

pub fn register(suite: &mut Suite) {
    cuda::register(suite);
    precision::register(suite);
    start::register(suite);
    suite.cpu("serve::a_worker_draws_as_the_program_does", as_the_program);
    suite.cpu("serve::requests_are_answered_in_order", in_order);
    suite.cpu("serve::the_error_of_one_request_leaves_the_others", one_error);
    suite.cpu("serve::a_cancelled_request_ends_at_its_next_step", cancelled);
    suite.cpu("serve::what_makes_no_sense_is_refused_at_once", refused);
    suite.cpu("serve::recorded_steps_are_kept_within_bounds", kept_steps);
    suite.cpu("serve::reports_are_of_one_request", reports);
    suite.cpu("serve::batches_and_encoded_captions_draw_the_same", batches);
    suite.cpu("serve::a_worker_that_is_dropped_ends_what_it_has", dropped);
}

/// A demo model on a device.
fn opened(name: &str, device: &Device) -> Result<ModelFiles, Failed> {
    let folder = models_folder().join("demo").join(name);
    let paths = ModelPaths::resolve(&folder, &PathOverrides::default())?;
    Ok(ModelFiles::open(paths, device.clone())?)
}

fn files(name: &str, device: &Device) -> Result<Arc<ModelFiles>, Failed> {
    opened(name, device).map(Arc::new)
}

fn worker(name: &str, device: &Device) -> Result<Worker, Failed> {
    Ok(Worker::start(files(name, device)?, WorkerOptions::default())?)
}

/// The model's own settings, with a small picture and few steps.
fn small(worker: &Worker) -> Result<Settings, Failed> {
    Ok(worker.files().settings(&Asked {
        width: Some(64),
        height: Some(64),
        steps: Some(2),
        ..Asked::default()
    })?)
}

fn draw(worker: &Worker, request: Request) -> Result<Drawn, Failed> {
    Ok(worker.draw(request)?.wait()?.value)
}

/// The program's files hold the pixels that a worker gives for the same prompts, and the bytes that it can make of them.
fn as_the_program() -> Outcome {
    let folder = tempfile::tempdir()?;
    std::fs::write(
        folder.path().join("prompts.jsonl"),
        "{\"prompt\": \"fox\", \"negative\": \"blue\", \"seed\": 3, \"out\": \"0.png\"}\n\
         {\"prompt\": \"slice of pizza\", \"seed\": 4, \"out\": \"1.jpg\"}\n\
         {\"prompt\": \"fox\", \"seed\": 5, \"out\": \"2.webp\"}\n",
    )?;
    for name in ["source", "pixel"] {
        let worker = worker(name, &Device::Cpu)?;
        let model = models_folder().join("demo").join(name).canonicalize()?;
        let mut command = std::process::Command::new(program("l2p-sample")?);
        command
            .current_dir(folder.path())
            .args(["--model", &model.display().to_string()]);
        let rest = "--prompts prompts.jsonl --steps 2 --cfg 2 --device cpu --width 64 --height 64 --out";
        command.args(rest.split(' ')).arg(name);
        Finished::from(&mut command)?.success()?;
        let settings = Settings {
            cfg: 2.0,
            solver: l2p_engine::flow::solver::Solver::Euler,
            ..small(&worker)?
        };
        let item = |prompt: &str, negative: &str, seed| Item {
            prompt: Caption::Text(prompt.into()),
            negative: Caption::Text(negative.into()),
            seed,
        };
        let request = Request {
            items: vec![
                item("fox", "blue", 3),
                item("slice of pizza", "", 4),
                item("fox", "", 5),
            ],
            at_once: Batch::new(1),
            ..Request::of("", settings, 0)
        };
        let drawn = draw(&worker, request)?;
        for (index, (file, format)) in [
            ("0.png", ImageFormat::Png),
            ("1.jpg", ImageFormat::Jpeg),
            ("2.webp", ImageFormat::WebP),
        ]
        .into_iter()
        .enumerate()
        {
            let path = folder.path().join(name).join(file);
            let picture = &drawn.pictures[index];
            let settings = match format {
                ImageFormat::Png => Some(read_settings(&path)?),
                _ => None,
            };
            let options = WriteOptions {
                settings: settings.as_ref(),
                ..WriteOptions::default()
            };
            assert!(
                std::fs::read(&path)? == encode_image(picture, format, &options)?,
                "{name}/{file} has other bytes"
            );
            if format != ImageFormat::Jpeg {
                assert!(read_image(&path)? == *picture, "{name}/{file} has other pixels");
            }
        }
    }
    let long = RgbImage::new(70_000, 1, vec![0; 210_000])?;
    let refused = encode_image(&long, ImageFormat::Jpeg, &WriteOptions::default()).unwrap_err();
    assert!(refused.to_string().contains("at most 65535 pixels"), "{refused}");
    Ok(())
}

fn in_order() -> Outcome {
    let worker = worker("source", &Device::Cpu)?;
    let settings = small(&worker)?;
    let ask = |seed| worker.draw(Request::of("fox", settings, seed));
    let tickets: Vec<Ticket<Drawn>> = (0..4).map(ask).collect::<Result<_, _>>()?;
    // Whoever waits for the last has the others' answers ready.
    let mut drawn = Vec::new();
    for ticket in tickets.into_iter().rev() {
        let open = worker.open();
        drawn.push(ticket.wait()?.value.pictures.remove(0));
        assert!(worker.open() <= open);
        assert_eq!(worker.open(), 0, "the last of them is done");
    }
    drawn.reverse();
    for (seed, picture) in drawn.iter().enumerate() {
        let again = draw(&worker, Request::of("fox", settings, seed as u64))?;
        assert!(again.pictures[0] == *picture, "seed {seed}");
    }
    assert!(drawn[0] != drawn[1]);
    Ok(())
}

/// Features that no weight can follow, between requests that can be drawn.
fn one_error() -> Outcome {
    let worker = worker("source", &Device::Cpu)?;
    let settings = Settings {
        cfg: 1.0,
        solver: l2p_engine::flow::solver::Solver::Euler,
        ..small(&worker)?
    };
    let expected = draw(&worker, Request::of("fox", settings, 1))?;
    let width = worker.files().spec().caption_width();
    let huge = HostTensor::from_f32(&vec![f32::MAX; 3 * width], &[1, 3, width]);
    let mut bad = Request::of("", settings, 1);
    bad.noise = Some(Arc::new(HostTensor::from_f32(
        &vec![f32::MAX; worker.files().canvas(&settings).iter().product()],
        &[&[1], &worker.files().canvas(&settings)[..]].concat(),
    )));
    bad.items[0].prompt = Caption::Features(Arc::new(huge));
    let tickets = [
        worker.draw(Request::of("fox", settings, 1))?,
        worker.draw(bad)?,
        worker.draw(Request::of("fox", settings, 1))?,
    ];
    let [before, bad, after] = tickets.map(Ticket::wait);
    let error = bad.err().ok_or("features without bounds were drawn")?;
    assert!(matches!(error, Error::NotFinite { .. }), "{error}");
    assert!(before?.value == expected && after?.value == expected);
    Ok(())
}

fn cancelled() -> Outcome {
    let worker = worker("pixel", &Device::Cpu)?;
    let settings = small(&worker)?;
    let expected = draw(&worker, Request::of("fox", settings, 1))?;
    let endless = Settings {
        steps: 100_000,
        ..settings
    };
    let running = worker.draw(Request::of("fox", endless, 1))?;
    let waiting = worker.draw(Request::of("fox", endless, 2))?;
    let after = worker.draw(Request::of("fox", settings, 1))?;
    drop(waiting);
    let mut steps = 0;
    let outcome = running.wait_with(&mut |event| match event {
        Event::Step { done, total } => {
            assert_eq!(total, 100_000);
            steps = done;
            Err(Error::Interrupted)
        }
        _ => Ok(()),
    });
    assert!(matches!(outcome, Err(Error::Interrupted)));
    assert_eq!(steps, 1);
    assert!(after.wait()?.value == expected);
    Ok(())
}

fn refused() -> Outcome {
    let worker = worker("source", &Device::Cpu)?;
    let settings = small(&worker)?;
    let width = worker.files().spec().caption_width();
    let request = || Request::of("fox", settings, 0);
    let with = |change: &dyn Fn(&mut Request)| {
        let mut request = request();
        change(&mut request);
        request
    };
    let features =
        |values: Vec<f32>, shape: &[usize]| Caption::Features(Arc::new(HostTensor::from_f32(&values, shape)));
    let noise = |side: usize, value: f32| Some(Arc::new(HostTensor::from_f32(&vec![value; side], &[1, 1, 1, side])));
    for (bad, word) in [
        (with(&|r| r.items.clear()), "1 to 65536 pictures, not for 0"),
        (with(&|r| r.settings.width = 0), "a width of 0"),
        (
            with(&|r| r.settings.height = 65),
            "this model draws multiples of 16, such as 80",
        ),
        (with(&|r| r.settings.steps = 0), "at least one step"),
        (with(&|r| r.settings.cfg = f32::NAN), "(cfg) of NaN"),
        (
            with(&|r| r.items[0].prompt = Caption::Text("x".repeat(1 << 17))),
            "a prompt of 131072 bytes",
        ),
        (
            with(&|r| r.items[0].negative = features(vec![0.0; 8], &[1, 1, 8])),
            "have shape [1, 1, 8]",
        ),
        (
            with(&|r| r.items[0].prompt = features(vec![], &[1, 0, width])),
            "a caption has 0 tokens",
        ),
        (
            with(&|r| r.items[0].prompt = features(vec![f32::NAN; width], &[1, 1, width])),
            "the features of a caption: not finite",
        ),
        (with(&|r| r.noise = noise(5, 0.0)), "the noise has shape [1, 1, 1, 5]"),
    ] {
        let message = match worker.draw(bad) {
            Ok(_) => return Err(format!("accepted, expected: {word}").into()),
            Err(error) => error.to_string(),
        };
        assert!(message.contains(word), "{message}");
    }
    let few = Worker::start(
        worker.files().clone(),
        WorkerOptions {
            most_open: 1,
            ..WorkerOptions::default()
        },
    )?;
    let first = few.draw(request())?;
    let busy = few.draw(request()).err().ok_or("a second request was taken")?;
    assert!(
        busy.to_string().contains("cpu is busy: 1 requests are waiting"),
        "{busy}"
    );
    first.wait()?;
    few.draw(request())?.wait()?;
    Ok(())
}

fn kept_steps() -> Outcome {
    let files = files("source", &Device::Cpu)?;
    for (recordings, kept) in [(2, [1, 2, 2, 2, 2]), (0, [0; 5])] {
        let options = WorkerOptions {
            recordings,
            ..WorkerOptions::default()
        };
        let worker = Worker::start(files.clone(), options)?;
        let settings = small(&worker)?;
        let wide = Settings { width: 96, ..settings };
        let unguided = Settings { cfg: 1.0, ..settings };
        let mut first = Vec::new();
        // Another size, other guidance, and what was given up for that.
        for (settings, kept) in [settings, wide, unguided, settings, settings].into_iter().zip(kept) {
            let drawn = draw(&worker, Request::of("fox", settings, 7))?;
            let found = worker.call(|pipeline| Ok(pipeline.kept_steps()))?.wait()?.value;
            assert_eq!(found, kept);
            first.push(drawn);
        }
        assert!(first[0] == first[3] && first[0] == first[4] && first[0] != first[2]);
    }
    Ok(())
}

fn reports() -> Outcome {
    let worker = worker("source", &Device::Cpu)?;
    let settings = small(&worker)?;
    let mut names = Vec::new();
    for _ in 0..2 {
        let answer = worker.draw(Request::of("fox", settings, 1))?.wait()?;
        let phases = answer.report.phases();
        assert!(
            phases
                .iter()
                .all(|phase| phase.seconds > 0.0 && phase.memory.total.peak > 0)
        );
        names.push(phases.iter().map(|phase| phase.name).collect::<Vec<_>>());
    }
    assert_eq!(names[0], ["text", "load", "denoise", "decode"]);
    assert_eq!(names[1], ["text", "denoise", "decode"]);
    let loaded = worker.load()?.wait()?;
    assert!(loaded.report.phases().is_empty(), "it is loaded already");
    Ok(())
}

fn batches() -> Outcome {
    let worker = worker("source", &Device::Cpu)?;
    let settings = small(&worker)?;
    let mut captions = Vec::new();
    let mut told = Vec::new();
    let texts = ["fox", "slice of pizza", ""].map(String::from).to_vec();
    captions.extend(
        worker
            .encode(texts)?
            .wait_with(&mut |event| {
                if let Event::Encoded { text, .. } = event {
                    told.push(text);
                }
                Ok(())
            })?
            .value,
    );
    assert_eq!(told, ["fox", "slice of pizza", ""]);
    let item = |prompt: Caption, negative: Caption, seed| Item { prompt, negative, seed };
    let words = |text: &str| Caption::Text(text.into());
    let request = |items, at_once| Request {
        items,
        at_once: Batch::new(at_once),
        raw: true,
        ..Request::of("", settings, 0)
    };
    let by_words = vec![
        item(words("fox"), words(""), 1),
        item(words("slice of pizza"), words(""), 2),
        item(words("fox"), words(""), 3),
    ];
    let by_features = vec![
        item(captions[0].clone(), captions[2].clone(), 1),
        item(captions[1].clone(), captions[2].clone(), 2),
        item(captions[0].clone(), captions[2].clone(), 3),
    ];
    let one = draw(&worker, request(by_words.clone(), 1))?;
    assert!(
        draw(&worker, request(by_features, 1))? == one,
        "features draw other pictures"
    );
    let mut steps = Vec::new();
    let two = worker.draw(request(by_words, 2))?.wait_with(&mut |event| {
        if let Event::Step { done, total } = event {
            steps.push((done, total));
        }
        Ok(())
    })?;
    assert_eq!(steps, [(1, 4), (2, 4), (3, 4), (4, 4)]);
    assert_eq!((one.pictures.len(), two.value.pictures.len()), (3, 3));
    let shapes: Vec<_> = two.value.raw.iter().map(|raw| raw.images.shape().to_vec()).collect();
    assert_eq!(shapes, [[2, 64, 64, 3], [1, 64, 64, 3]]);
    assert!(two.value.raw.iter().all(|raw| raw.latents.is_some()));
    // The last is a batch of one both times.
    assert!(one.pictures[2] == two.value.pictures[2]);
    Ok(())
}

fn dropped() -> Outcome {
    let worker = worker("pixel", &Device::Cpu)?;
    let endless = Settings {
        steps: 100_000,
        ..small(&worker)?
    };
    let tickets = [1, 2].map(|seed| worker.draw(Request::of("fox", endless, seed)));
    drop(worker);
    for ticket in tickets {
        assert!(matches!(ticket?.wait(), Err(Error::Interrupted)));
    }
    Ok(())
}
