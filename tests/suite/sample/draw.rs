//! What is drawn, how it is named, and what is said about it.

use l2p_engine::image_io::read_settings;
use l2p_tests::{Outcome, Suite};
use serde_json::Value;

use super::{demo, draw, names, picture, psnr, run, try_draw};

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "sample::draw::a_picture_carries_its_settings",
        a_picture_carries_its_settings,
    );
    suite.cpu("sample::draw::the_same_twice_is_the_same", the_same_twice_is_the_same);
    suite.cpu("sample::draw::seeds_and_generators_differ", seeds_and_generators_differ);
    suite.cpu("sample::draw::prompt_files_and_counts", prompt_files_and_counts);
    suite.cpu("sample::draw::batches_draw_the_same", batches_draw_the_same);
    suite.cpu("sample::draw::guidance_follows_the_words", guidance_follows_the_words);
    suite.cpu("sample::draw::sizes_are_rounded_up", sizes_are_rounded_up);
    suite.cpu("sample::draw::formats", formats);
    suite.cpu("sample::draw::reports", reports);
    suite.cpu("sample::draw::a_profile_adds_up", a_profile_adds_up);
    suite.cpu("sample::draw::devices", devices);
    suite.cpu(
        "sample::draw::long_prompts_are_cut_with_a_notice",
        long_prompts_are_cut_with_a_notice,
    );
}

fn a_picture_carries_its_settings() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let prompt = "slice of \"pizza\" 🍕";
    let finished = draw(
        folder,
        &[
            "--prompt",
            prompt,
            "--negative",
            "blue",
            "--seed",
            "5",
            "--out",
            "a.png",
        ],
    )?;
    assert_eq!(finished.stdout, "");
    assert_eq!(
        finished.stderr,
        "1 picture 128x128 on cpu: 2 steps, shift 3, cfg 2.5\na.png\n"
    );
    let settings = read_settings(&folder.join("a.png"))?;
    assert_eq!((settings.prompt.as_str(), settings.negative.as_str()), (prompt, "blue"));
    assert_eq!(
        (settings.seed, settings.steps, settings.cfg, settings.shift),
        (5, 2, 2.5, 3.0)
    );
    assert_eq!(
        (settings.width, settings.height, settings.rng.as_str()),
        (128, 128, "philox")
    );
    // Where the model lies is nobody's business.
    assert_eq!(settings.model, "source");
    // What other programs show.
    let bytes = std::fs::read(folder.join("a.png"))?;
    let reader = png::Decoder::new(std::io::Cursor::new(&bytes)).read_info()?;
    let texts = &reader.info().utf8_text;
    let words = texts
        .iter()
        .find(|text| text.keyword == "parameters")
        .ok_or("no text for viewers")?;
    let words = words.get_text()?;
    assert!(
        words.starts_with(prompt) && words.contains("Negative prompt: blue\nSteps: 2, CFG scale: 2.5, Seed: 5"),
        "{words}"
    );
    assert!(words.contains("Model: source, "), "{words}");
    let whole = demo()?.display().to_string();
    assert!(!bytes.windows(whole.len()).any(|part| part == whole.as_bytes()));

    let like = |arguments: &[&str]| {
        let first = ["--like", "a.png", "--model", &whole, "--device", "cpu"];
        run(folder, &[&first, arguments].concat())
    };
    like(&["--out", "b.png"])?.success()?;
    assert!(
        std::fs::read(folder.join("b.png"))? == bytes,
        "--like draws another picture"
    );
    like(&["--out", "c.png", "--seed", "6", "--steps", "1"])?.success()?;
    let changed = read_settings(&folder.join("c.png"))?;
    assert_eq!((changed.seed, changed.steps, changed.prompt), (6, 1, settings.prompt));
    assert!(picture(folder, "c.png")? != picture(folder, "a.png")?);
    assert_eq!(names(folder)?, ["a.png", "b.png", "c.png"]);
    Ok(())
}

fn the_same_twice_is_the_same() -> Outcome {
    let folder = tempfile::tempdir()?;
    for name in ["a.png", "b.png"] {
        draw(folder.path(), &["--prompt", "fox", "--out", name])?;
    }
    // With another number of threads and the text encoder kept.
    let arguments = super::with_demo(&["--prompt", "fox", "--out", "c.png", "--keep-text-encoder"])?;
    let mut command = super::command(folder.path(), &arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
    assert!(command.env("RAYON_NUM_THREADS", "3").output()?.status.success());
    let read = |name: &str| std::fs::read(folder.path().join(name));
    assert!(read("a.png")? == read("b.png")?);
    assert!(psnr(&picture(folder.path(), "a.png")?, &picture(folder.path(), "c.png")?) > 50.0);
    Ok(())
}

fn seeds_and_generators_differ() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    draw(
        folder,
        &[
            "--prompt",
            "fox",
            "--seed",
            "3",
            "--out",
            "philox.png",
            "--rng",
            "philox",
        ],
    )?;
    draw(
        folder,
        &["--prompt", "fox", "--seed", "3", "--out", "torch.png", "--rng", "torch"],
    )?;
    draw(folder, &["--prompt", "fox", "--seed", "4", "--out", "other.png"])?;
    let philox = picture(folder, "philox.png")?;
    assert!(philox != picture(folder, "torch.png")? && philox != picture(folder, "other.png")?);
    assert_eq!(read_settings(&folder.join("torch.png"))?.rng, "torch");
    let model = demo()?.display().to_string();
    let like = ["--like", "torch.png", "--model", &model, "--device", "cpu"];
    run(folder, &[&like[..], &["--out", "again.png"]].concat())?.success()?;
    assert!(std::fs::read(folder.join("again.png"))? == std::fs::read(folder.join("torch.png"))?);
    Ok(())
}

fn prompt_files_and_counts() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let lines = "\u{feff}{\"prompt\": \"fox\"}\n\n{\"prompt\": \"frog\", \"seed\": 40, \"negative\": \"red\", \"out\": \"frog.webp\"}\n";
    std::fs::write(folder.join("prompts.jsonl"), lines)?;
    let arguments = [
        "--prompts",
        "prompts.jsonl",
        "--count",
        "2",
        "--steps",
        "1",
        "--seed",
        "9",
        "--negative",
        "blue",
    ];
    let finished = draw(folder, &[&arguments[..], &["--out", "new/all"]].concat())?;
    let files = [
        "new/all/0001-9.png",
        "new/all/0002-10.png",
        "new/all/frog-1.webp",
        "new/all/frog-2.webp",
    ];
    assert_eq!(
        finished.stderr,
        format!(
            "4 pictures 128x128 on cpu: 1 step, shift 3, cfg 2.5\n{}\n",
            files.join("\n")
        )
    );
    let settings = |name: &str| read_settings(&folder.join(name));
    let (first, second) = (settings(files[0])?, settings(files[1])?);
    assert_eq!(
        (first.prompt.as_str(), first.negative.as_str(), first.seed),
        ("fox", "blue", 9)
    );
    assert_eq!((second.prompt.as_str(), second.seed), ("fox", 10));
    // A line's own words win: the same by hand.
    draw(
        folder,
        &[
            "--prompt",
            "frog",
            "--seed",
            "41",
            "--negative",
            "red",
            "--steps",
            "1",
            "--out",
            "frog.png",
        ],
    )?;
    assert!(picture(folder, "frog.png")? == picture(folder, files[3])?);
    // Numbered beside each other.
    draw(
        folder,
        &["--prompt", "fox", "--count", "2", "--steps", "1", "--out", "fox.jpg"],
    )?;
    let found = names(folder)?;
    assert!(
        found.contains(&"fox-0001.jpg".into()) && found.contains(&"fox-0002.jpg".into()),
        "{found:?}"
    );
    Ok(())
}

fn batches_draw_the_same() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    std::fs::write(
        folder.join("p.jsonl"),
        // Captions of 32 and 64 tokens when padded.
        format!(
            "{{\"prompt\":\"fox\"}}\n{{\"prompt\":\"{}\"}}\n{{\"prompt\":\"crown\"}}\n",
            "red apple ".repeat(15)
        ),
    )?;
    for (batch, out) in [("1", "one"), ("3", "three"), ("2", "two")] {
        draw(folder, &["--prompts", "p.jsonl", "--batch", batch, "--out", out])?;
    }
    for name in ["0001-0.png", "0002-1.png", "0003-2.png"] {
        let alone = picture(folder, &format!("one/{name}"))?;
        for other in ["two", "three"] {
            let together = picture(folder, &format!("{other}/{name}"))?;
            let ratio = psnr(&alone, &together);
            assert!(ratio > 50.0, "{name}: {ratio} dB in batches of {other}");
        }
    }
    Ok(())
}

fn guidance_follows_the_words() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let finished = draw(
        folder,
        &[
            "--prompt",
            "fox",
            "--cfg",
            "1",
            "--negative",
            "frog",
            "--out",
            "one.png",
        ],
    )?;
    assert_eq!(
        finished.stderr.lines().next_back(),
        Some("one.png"),
        "{}",
        finished.stderr
    );
    let note = "note: what to stay away from has no effect without guidance: give a --cfg other than 1\n";
    assert!(finished.stderr.contains(note), "{}", finished.stderr);
    // With a scale of 0 only what to stay away from is drawn, which few mean.
    let finished = draw(
        folder,
        &[
            "--prompt",
            "frog",
            "--cfg",
            "0",
            "--negative",
            "fox",
            "--out",
            "zero.png",
        ],
    )?;
    let word = "note: cfg 0 ignores the prompt and draws the negative one; no guidance is --cfg 1 here";
    assert!(finished.stderr.contains(word), "{}", finished.stderr);
    assert!(psnr(&picture(folder, "one.png")?, &picture(folder, "zero.png")?) > 50.0);
    draw(folder, &["--prompt", "fox", "--cfg", "3", "--out", "three.png"])?;
    assert!(picture(folder, "three.png")? != picture(folder, "one.png")?);
    Ok(())
}

fn sizes_are_rounded_up() -> Outcome {
    let folder = tempfile::tempdir()?;
    let finished = draw(
        folder.path(),
        &[
            "--prompt", "fox", "--width", "100", "--height", "33", "--steps", "1", "--out", "a.png",
        ],
    )?;
    assert_eq!(
        finished.stderr,
        "note: width 100 is rounded up to 112: this model draws multiples of 16\n\
         note: height 33 is rounded up to 48: this model draws multiples of 16\n\
         1 picture 112x48 on cpu: 1 step, shift 3, cfg 2.5\na.png\n"
    );
    let picture = picture(folder.path(), "a.png")?;
    assert_eq!((picture.width(), picture.height()), (112, 48));
    assert_eq!(read_settings(&folder.path().join("a.png"))?.width, 112);
    Ok(())
}

fn formats() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    draw(folder, &["--prompt", "fox", "--out", "a.png"])?;
    let png = picture(folder, "a.png")?;
    draw(folder, &["--prompt", "fox", "--out", "a.webp"])?;
    assert!(picture(folder, "a.webp")? == png);
    let mut sizes = Vec::new();
    for (out, quality) in [("b.jpg", "30"), ("c.JPEG", "95")] {
        draw(folder, &["--prompt", "fox", "--out", out, "--quality", quality])?;
        assert!(psnr(&picture(folder, out)?, &png) > 25.0);
        sizes.push(std::fs::metadata(folder.join(out))?.len());
    }
    assert!(sizes[0] < sizes[1], "{sizes:?}");
    run(folder, &["--like", "a.webp"])?.failure(1, "a.webp: is not a PNG file; settings are kept in PNG files only")?;
    run(folder, &["--like", "b.jpg"])?.failure(1, "b.jpg: is not a PNG file; settings are kept in PNG files only")?;
    Ok(())
}

fn reports() -> Outcome {
    let folder = tempfile::tempdir()?;
    let arguments = ["--prompt", "fox", "--count", "2", "--steps", "1", "--out", "a.png"];
    let finished = draw(folder.path(), &[&arguments[..], &["--report", "json"]].concat())?;
    let report: Value = serde_json::from_str(&finished.stdout)?;
    assert_eq!(report["device"], "cpu");
    assert_eq!(report["model"], demo()?.display().to_string());
    assert_eq!(report["settings"]["steps"], 1);
    assert_eq!(report["batch"], 1);
    assert_eq!(report["pictures"][1]["file"], "a-0002.png");
    assert_eq!(report["pictures"][1]["seed"], 1);
    let phases = report["phases"].as_array().ok_or("no phases")?;
    let named: Vec<&str> = phases.iter().filter_map(|phase| phase["name"].as_str()).collect();
    assert_eq!(named, ["text", "load", "denoise", "decode"]);
    let number = |value: &Value| value.as_f64().unwrap_or(-1.0);
    let mut seconds = 0.0;
    for phase in phases {
        let by_tag = phase["peak_bytes_by_tag"].as_object().ok_or("no tags")?;
        let mut tags: Vec<&str> = by_tag.keys().map(String::as_str).collect();
        tags.sort_unstable();
        assert_eq!(
            tags,
            ["activations", "gradients", "optimizer", "saved", "weights", "workspace"]
        );
        assert!(
            number(&by_tag["weights"]) > 1e6 && number(&by_tag["gradients"]) == 0.0,
            "{phase}"
        );
        assert!(number(&phase["peak_bytes"]) >= number(&by_tag["weights"]), "{phase}");
        seconds += number(&phase["seconds"]);
    }
    assert!(
        seconds > 0.0 && seconds <= number(&report["total_seconds"]),
        "{report:#}"
    );
    let peaks = phases.iter().map(|phase| number(&phase["peak_bytes"]));
    assert_eq!(number(&report["peak_bytes"]), peaks.fold(0.0, f64::max));
    let estimate = number(&report["estimated_bytes"]) / number(&report["peak_bytes"]);
    assert!(
        (0.5..2.0).contains(&estimate),
        "estimated {estimate} times what was used"
    );
    // The text encoder is gone when the transformer comes: 5.1 MB in bf16.
    let weights = |phase: usize| number(&phases[phase]["peak_bytes_by_tag"]["weights"]);
    let kept = draw(
        folder.path(),
        &[&arguments[..], &["--report", "json", "--keep-text-encoder"]].concat(),
    )?;
    let kept: Value = serde_json::from_str(&kept.stdout)?;
    let kept = number(&kept["phases"][2]["peak_bytes_by_tag"]["weights"]);
    assert!(
        (kept - weights(2) - weights(0)).abs() < 1.0,
        "{kept} {} {}",
        weights(2),
        weights(0)
    );

    let table = draw(folder.path(), &[&arguments[..], &["--report"]].concat())?.stdout;
    for word in [
        "phase",
        "peak",
        "weights",
        "activations",
        "text",
        "denoise",
        "all",
        "2 pictures at 128x128",
    ] {
        assert!(table.contains(word), "{word} is missing from\n{table}");
    }
    Ok(())
}

/// A step's operations take no longer than the step, and every line says how near it is to what the device can do.
fn a_profile_adds_up() -> Outcome {
    let folder = tempfile::tempdir()?;
    let arguments = ["--prompt", "fox", "--steps", "1", "--out", "a.png", "--profile"];
    let finished = draw(folder.path(), &[&arguments[..], &["--report", "json"]].concat())?;
    let report: Value = serde_json::from_str(&finished.stdout)?;
    let profile = &report["profile"];
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let operations = profile["operations"].as_array().ok_or("no operations")?;
    let sum = |key: &str| operations.iter().map(|op| number(&op[key])).sum::<f64>();
    let whole = number(&profile["milliseconds"]);
    assert!(whole > 0.0 && sum("milliseconds") <= whole * 1.001, "{profile:#}");
    assert!((sum("share") - sum("milliseconds") / whole).abs() < 1e-6, "{profile:#}");
    assert!(number(&profile["ceilings"]["bytes_per_second"]) > 0.0, "{profile:#}");
    let named = |name: &str| operations.iter().find(|op| op["name"] == name);
    for name in ["linear", "attention", "guided_euler_step"] {
        let op = named(name).ok_or_else(|| format!("no {name} in {profile:#}"))?;
        assert!(
            number(&op["calls"]) >= 1.0 && number(&op["share_of_ceiling"]) > 0.0,
            "{op}"
        );
    }
    // Without a report, the table alone.
    let finished = draw(folder.path(), &arguments)?;
    let mut lines = finished.stdout.lines();
    assert!(
        lines.next().is_some_and(|line| line.starts_with("operation")),
        "{}",
        finished.stdout
    );
    assert!(
        lines.next_back().is_some_and(|line| line.starts_with("whole")),
        "{}",
        finished.stdout
    );
    Ok(())
}

fn devices() -> Outcome {
    let folder = tempfile::tempdir()?;
    let text = run(folder.path(), &["devices"])?.success()?.stdout;
    assert!(
        text.contains("--device auto takes ") && text.contains("driver ") && text.contains("cuBLASLt"),
        "{text}"
    );
    assert_eq!(
        run(folder.path(), &["--list-devices"])?
            .success()?
            .stdout
            .lines()
            .count(),
        text.lines().count()
    );
    let report: Value = serde_json::from_str(&run(folder.path(), &["devices", "--json"])?.success()?.stdout)?;
    assert!(
        report["cpu_threads"].as_u64() > Some(0) && report["gpus"].is_array() && report["kernel_images"].is_array()
    );
    match l2p_tests::gpu() {
        Ok(_) => assert_eq!(
            (&report["gpus"][0]["index"], &report["obstacle"]),
            (&0.into(), &Value::Null)
        ),
        Err(reason) => {
            assert!(
                text.ends_with("--device auto takes cpu\n") && text.contains("no GPU     "),
                "{text}"
            );
            assert_eq!(report["obstacle"].as_str(), Some(reason.as_str()));
        }
    }
    Ok(())
}

fn long_prompts_are_cut_with_a_notice() -> Outcome {
    let folder = tempfile::tempdir()?;
    let long = "red apple, ".repeat(300);
    let arguments = [
        "--steps", "1", "--cfg", "1", "--width", "16", "--height", "16", "--out", "a.png",
    ];
    let finished = try_draw(folder.path(), &[&["--prompt", &long], &arguments[..]].concat())?.success()?;
    let note = finished.stderr.lines().nth(1).ok_or("no notice")?;
    let (dropped, rest) = note
        .strip_prefix("note: the last ")
        .and_then(|note| note.split_once(' '))
        .ok_or_else(|| note.to_owned())?;
    assert!(dropped.parse::<usize>()? > 50, "{note}");
    assert_eq!(
        rest,
        "tokens of the prompt \"red apple, red apple, red apple,…\" are cut off: it is longer than the text encoder reads"
    );
    // The picture still carries all of it.
    assert_eq!(read_settings(&folder.path().join("a.png"))?.prompt, long);
    Ok(())
}
