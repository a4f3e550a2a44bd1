//! `l2p-data score`, against what the official programs made of the same files (`tests/fixtures/scores.py`).

use std::path::{Path, PathBuf};

use l2p_engine::checkpoint::{Values, write_values};
use l2p_engine::image_io::{RgbImage, WriteOptions, write_image};
use l2p_tests::cli::{Finished, run};
use l2p_tests::{Outcome, Suite, fixtures, models_folder};
use libtest_mimic::Failed;
use serde_json::Value;

use super::write_grey;

pub fn register(suite: &mut Suite) {
    suite.cpu("data::score::official_results_are_met", official);
    suite.cpu("data::score::pictures_are_compared", pictures);
    suite.cpu("data::score::crops_are_at_the_same_places", crops);
    suite.cpu("data::score::a_vae_tells_sets_apart", in_vae);
    suite.cuda("data::score::a_vae_on_cuda", in_vae_on_cuda);
    suite.cpu("data::score::bad_input_is_named", refused);
    suite.cpu("data::score::results_are_tabulated", results);
}

fn stored(name: &str) -> PathBuf {
    fixtures::folder().join("data/scores").join(name)
}

fn score<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<Finished, Failed> {
    let arguments = arguments.into_iter().map(|argument| argument.as_ref().to_owned());
    run("l2p-data", std::iter::once("score".into()).chain(arguments))
}

fn json<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<Value, Failed> {
    let arguments = arguments.into_iter().map(|argument| argument.as_ref().to_owned());
    let finished = score(arguments.chain(["--json".into()]))?.success()?;
    Ok(serde_json::from_str(&finished.stdout)?)
}

/// Fails unless a number is one to 1e-6 of it.
fn same(what: &str, found: &Value, expected: &Value) -> Outcome {
    let (found, expected) = (found.as_f64(), expected.as_f64());
    let close = |found: f64, expected: f64| (found - expected).abs() <= 1e-6 * expected.abs();
    match found
        .zip(expected)
        .is_some_and(|(found, expected)| close(found, expected))
    {
        true => Ok(()),
        false => Err(format!("{what}: {found:?} instead of {expected:?}").into()),
    }
}

fn official() -> Outcome {
    let expected: Value = serde_json::from_slice(&std::fs::read(stored("expected.json"))?)?;
    let path = |name: &str| stored(name).display().to_string();
    let features = &expected["features"];
    let subsets = [
        "--subsets".to_owned(),
        features["kid_subsets"].to_string(),
        "--subset-size".to_owned(),
        features["kid_subset_size"].to_string(),
    ];
    for first in ["first.npy", "first-transposed.npy"] {
        let arguments = [
            "features".to_owned(),
            path(first),
            "--against".to_owned(),
            path("second.npz"),
        ];
        let found = json(arguments.iter().chain(&subsets))?;
        for key in ["fid", "kid", "kid_deviation"] {
            same(&format!("{first}, {key}"), &found["sets"][0][key], &features[key])?;
        }
        assert_eq!(found["sets"][0]["pictures"], 96);
    }
    // Of statistics alone the distance can be told, but no kernel distance.
    let found = json(["features", &path("first.npy"), "--against", &path("second-moments.npz")])?;
    same("statistics", &found["sets"][0]["fid"], &features["fid"])?;
    assert_eq!(found["sets"][0]["kid"], Value::Null);
    // The same features in safetensors.
    let folder = tempfile::tempdir()?;
    let copy = folder.path().join("second.safetensors").display().to_string();
    let found = json(["features", &path("second.npz"), "--against", &path("second.npz")])?;
    assert_eq!(
        (&found["sets"][0]["fid"], &found["dimensions"]),
        (&0.0.into(), &12.into())
    );
    let values = hash_features(40, 12);
    write_values(Path::new(&copy), &[("features".to_owned(), values)])?;
    json(["features", &copy, "--against", &path("second.npz")])?;

    let inception = &expected["inception"];
    let found = json([
        "inception",
        &path("logits.npz"),
        "--splits",
        &inception["splits"].to_string(),
    ])?;
    same(
        "IS",
        &found["sets"][0]["inception_score"],
        &inception["inception_score"],
    )?;
    same("IS ±", &found["sets"][0]["deviation"], &inception["deviation"])?;

    let clip = path("clip.npz");
    let found = json([
        "clip",
        &clip,
        "--captions",
        &clip,
        "--key",
        "pictures",
        "--caption-key",
        "captions",
    ])?;
    same("CLIP", &found["sets"][0]["clip_score"], &expected["clip"])?;

    let found = json([
        "pictures",
        &path("drawn"),
        "--against",
        &path("reference"),
        "--patch",
        "8",
    ])?;
    for key in ["psnr", "ssim"] {
        same(key, &found["sets"][0][key], &expected["pictures"][key])?;
    }
    Ok(())
}

fn hash_features(pictures: usize, dimensions: usize) -> Values {
    Values {
        shape: vec![pictures, dimensions],
        values: l2p_tests::hash_uniform("features", pictures * dimensions),
    }
}

fn pictures() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    for (name, grey) in [
        ("a/x/1.png", 100),
        ("a/2.jpg", 50),
        ("b/x/1.webp", 100),
        ("b/2.png", 50),
    ] {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().ok_or("no folder")?)?;
        write_grey(&path, 32, 16, grey)?;
    }
    let found = json(["pictures", &format!("mine={}", path("a")), "--against", &path("b")])?;
    let set = &found["sets"][0];
    assert_eq!(
        (&set["name"], &set["pictures"], &set["equal"]),
        (&"mine".into(), &2.into(), &2.into())
    );
    assert_eq!(
        (&set["psnr"], &set["ssim"], &set["seams"]),
        (&Value::Null, &1.0.into(), &1.0.into())
    );
    let table = score(["pictures", &path("a"), "--against", &path("b")])?
        .success()?
        .stdout;
    assert!(
        table.starts_with("set  pictures   PSNR     SSIM") && table.contains("\na           2  equal  1.00000"),
        "{table}"
    );

    write_grey(&folder.path().join("b/3.png"), 32, 16, 1)?;
    let message = score(["pictures", &path("a"), "--against", &path("b")])?.stderr;
    assert!(
        message.starts_with("error: 1 of ") && message.contains("b/3.png"),
        "{message}"
    );
    write_grey(&folder.path().join("a/3.png"), 16, 16, 1)?;
    let message = score(["pictures", &path("a"), "--against", &path("b")])?.stderr;
    assert!(
        message.contains("a/3.png has 16x16 pixels") && message.contains("has 32x16"),
        "{message}"
    );
    Ok(())
}

fn crops() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    // A pixel of the first says where it is, one of the second the same in other channels.
    for (set, channels) in [("a", [0, 1]), ("b", [1, 2])] {
        std::fs::create_dir_all(folder.path().join(set).join("x"))?;
        for name in ["1.png", "x/2.png"] {
            let mut pixels = vec![0; 3 * 40 * 30];
            for (index, pixel) in pixels.chunks_mut(3).enumerate() {
                pixel[channels[0]] = (index / 40) as u8;
                pixel[channels[1]] = (index % 40) as u8;
            }
            let image = RgbImage::new(40, 30, pixels)?;
            write_image(&folder.path().join(set).join(name), &image, &WriteOptions::default())?;
        }
    }
    let fixed = [
        "crops".to_owned(),
        path("a"),
        "--against".into(),
        path("b"),
        "--out".into(),
        path("out"),
    ];
    let flags = |side: &str| {
        fixed
            .iter()
            .cloned()
            .chain(["--side".into(), side.into(), "--per-picture".into(), "3".into()])
    };
    assert_eq!(json(flags("8"))?["crops"], 6);
    let mut corners = std::collections::BTreeSet::new();
    for name in ["1-1.png", "1-2.png", "1-3.png", "x/2-1.png", "x/2-2.png", "x/2-3.png"] {
        let read = |set: &str| l2p_engine::image_io::read_image(&folder.path().join("out").join(set).join(name));
        let (a, b) = (read("a")?, read("reference")?);
        assert_eq!((a.width(), a.height()), (8, 8));
        assert!(
            a.pixels()
                .chunks(3)
                .zip(b.pixels().chunks(3))
                .all(|(a, b)| a[..2] == b[1..]),
            "{name}"
        );
        let (first, last) = (&a.pixels()[..2], &a.pixels()[3 * 63..3 * 63 + 2]);
        assert_eq!((last[0] - first[0], last[1] - first[1]), (7, 7));
        corners.insert(first.to_vec());
    }
    assert!(corners.len() > 3, "{corners:?}");
    let message = score(flags("31"))?.stderr;
    assert!(
        message.contains("has 40x30 pixels, too few for a crop of 31x31"),
        "{message}"
    );
    write_grey(&folder.path().join("a/1.png"), 39, 30, 1)?;
    let message = score(flags("8"))?.stderr;
    assert!(
        message.contains("a/1.png: has 39x30 pixels, its counterpart 40x30"),
        "{message}"
    );
    Ok(())
}

/// Pictures of the data set, and the same ones the other way round, in a folder each; some of them only in the first.
fn demo_sets(folder: &Path) -> Outcome {
    let pictures = models_folder().join("demo/pictures");
    for set in ["same", "turned", "grey"] {
        std::fs::create_dir(folder.join(set))?;
    }
    for entry in pictures.read_dir()? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "webp") {
            continue;
        }
        let name = Path::new(path.file_name().ok_or("no name")?).with_extension("png");
        let image = l2p_engine::image_io::read_image(&path)?;
        let turned: Vec<u8> = image.pixels().chunks(3).rev().flatten().copied().collect();
        let options = WriteOptions::default();
        write_image(&folder.join("same").join(&name), &image, &options)?;
        write_image(
            &folder.join("turned").join(&name),
            &RgbImage::new(image.width(), image.height(), turned)?,
            &options,
        )?;
        write_grey(
            &folder.join("grey").join(&name),
            64,
            48,
            name.as_os_str().len() as u8 * 8,
        )?;
    }
    Ok(())
}

fn vae_scores(folder: &Path, device: &str) -> Result<Value, Failed> {
    let path = |name: &str| folder.join(name).display().to_string();
    let source = models_folder().join("demo/source").display().to_string();
    let reference = models_folder().join("demo/pictures").display().to_string();
    let sets = [path("same"), path("turned"), path("grey")];
    let fixed = [
        "vae",
        "--model",
        &source,
        "--against",
        &reference,
        "--device",
        device,
        "--grid",
        "1",
    ];
    json(fixed.iter().map(|argument| (*argument).to_owned()).chain(sets))
}

fn in_vae() -> Outcome {
    let folder = tempfile::tempdir()?;
    demo_sets(folder.path())?;
    let found = vae_scores(folder.path(), "cpu")?;
    assert_eq!(found["dimensions"], 16);
    assert!(
        found["features"]
            .as_str()
            .is_some_and(|words| words.contains("the model's own VAE at 128x128")),
        "{found}"
    );
    let fid = |set: usize| found["sets"][set]["fid"].as_f64().ok_or("no FID");
    // The same pictures are no distance apart, turned ones little, grey ones far.
    assert!(fid(0)? < 1e-9 && fid(1)? > 1e-3 && fid(2)? > 2.0 * fid(1)?, "{found}");
    assert_eq!(found["sets"][0]["kid_subset_size"], 24);
    let refused = score([
        "vae",
        "--model",
        &models_folder().join("demo/source").display().to_string(),
        "--against",
        &folder.path().display().to_string(),
        &folder.path().display().to_string(),
        "--side",
        "100",
    ])?;
    assert!(
        refused
            .stderr
            .contains("a --side that is a multiple of 16, such as 112"),
        "{}",
        refused.stderr
    );
    Ok(())
}

fn in_vae_on_cuda(_: &l2p_engine::Device) -> Outcome {
    let folder = tempfile::tempdir()?;
    demo_sets(folder.path())?;
    let (cpu, cuda) = (vae_scores(folder.path(), "cpu")?, vae_scores(folder.path(), "cuda")?);
    for set in [1, 2] {
        let of = |scores: &Value| scores["sets"][set]["fid"].as_f64().ok_or("no FID");
        let (expected, found) = (of(&cpu)?, of(&cuda)?);
        // The device encodes in bf16.
        assert!((found - expected).abs() < 0.05 * expected, "{found} {expected}");
    }
    Ok(())
}

fn refused() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    let write = |name: &str, shape: [usize; 2], values: Vec<f32>| {
        let values = Values {
            shape: shape.to_vec(),
            values,
        };
        write_values(Path::new(&path(name)), &[("features".to_owned(), values)])
    };
    write(
        "three.safetensors",
        [20, 3],
        (0..60).map(|value| (value * value % 17) as f32).collect(),
    )?;
    write(
        "four.safetensors",
        [20, 4],
        (0..80).map(|value| (value * value % 17) as f32).collect(),
    )?;
    write("one.safetensors", [1, 3], vec![1.0; 3])?;
    write("huge.safetensors", [2, 3], vec![3e38; 6])?;
    std::fs::write(path("text.npz"), "no archive")?;
    let mut nan = std::fs::read(stored("first.npy"))?;
    let end = nan.len();
    nan[end - 8..].copy_from_slice(&f64::NAN.to_le_bytes());
    std::fs::write(path("nan.npy"), nan)?;
    let short = std::fs::read(stored("first.npy"))?;
    std::fs::write(path("short.npy"), &short[..short.len() - 5])?;
    let first = stored("first.npy").display().to_string();
    let cases: [(&[&str], &str); 11] = [
        (
            &["features", "three.safetensors", "--against", "four.safetensors"],
            "of 3 and of 4 dimensions cannot be compared",
        ),
        (
            &["features", "one.safetensors", "--against", "three.safetensors"],
            "one.safetensors: one picture has no covariance",
        ),
        (
            &[
                "features",
                "three.safetensors",
                "--against",
                "three.safetensors",
                "--subset-size",
                "21",
            ],
            "subsets of 21 pictures, but one set has 20",
        ),
        (
            &["features", "nan.npy", "--against", &first],
            "nan.npy: holds NaN at element 1151",
        ),
        (
            &["features", "short.npy", "--against", &first],
            "short.npy: holds 9211 bytes of an array of shape [96, 12]",
        ),
        (&["features", "text.npz", "--against", &first], "text.npz: "),
        (&["features", "gone.npz", "--against", &first], "gone.npz: No such file"),
        (
            &["features", &first, "--against", &first, "--key", "x"],
            "holds no array `x` (--key), but `arr_0` [96, 12]",
        ),
        (
            &["inception", "one.safetensors"],
            "10 parts of a set, but there are 1 pictures",
        ),
        (
            &["clip", "one.safetensors", "--captions", "three.safetensors"],
            "features of 1 pictures and of 20 captions",
        ),
        (&["pictures", "gone", "--against", "gone"], "cannot look into gone"),
    ];
    for (arguments, words) in cases {
        let arguments = [&["score"], arguments].concat();
        let mut command = std::process::Command::new(l2p_tests::cli::program("l2p-data")?);
        let finished = Finished::from(command.current_dir(folder.path()).args(&arguments))?;
        let good = finished.code == 1
            && finished.stdout.is_empty()
            && finished
                .stderr
                .lines()
                .next_back()
                .is_some_and(|line| line.starts_with("error: ") && line.contains(words));
        if !good {
            return Err(format!("{arguments:?}: {words}\n{} {}", finished.code, finished.stderr).into());
        }
    }
    // Numbers as large as f32 has them are computed with.
    json([
        "features",
        &path("huge.safetensors"),
        "--against",
        &path("huge.safetensors"),
    ])?;
    Ok(())
}

fn results() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    let line = |file: usize, tag: &str, correct: bool| {
        let metadata = file / 2;
        format!(
            "{{\"filename\":\"{file}.png\",\"tag\":\"{tag}\",\"prompt\":\"p\",\"correct\":{correct},\"reason\":\"\",\"metadata\":\"{metadata}\",\"details\":\"\"}}\n"
        )
    };
    let lines = [
        line(0, "colors", true),
        line(1, "colors", false),
        line(2, "counting", false),
        line(3, "counting", false),
    ];
    std::fs::write(path("geneval.jsonl"), lines.concat())?;
    let finished = score(["geneval", &path("geneval.jsonl")])?.success()?;
    assert!(
        finished.stderr.contains("GenEval has 553 prompts, these results 2"),
        "{}",
        finished.stderr
    );
    assert!(
        finished.stdout.contains("colors                   50.00 %  1 / 2\n"),
        "{}",
        finished.stdout
    );
    assert_eq!(json(["geneval", &path("geneval.jsonl")])?["overall"], 0.25);
    let text = "out/a.png, 1.0, 0.5, 0.75, 0.75, 0.75\nModel: out\nL1 category scores:\n\tentity: 60.0\nL2 category scores:\n\
                \tentity - whole: 60.0\nImage path: out\nSave results to: r.txt\nDPG-Bench score: 75.0\n";
    std::fs::write(path("dpg.txt"), text)?;
    let found = json(["dpg", &path("dpg.txt")])?;
    assert_eq!(
        (&found["score"], &found["broad"]["entity"], &found["per_prompt"]),
        (&75.0.into(), &60.0.into(), &4.into())
    );
    let table = score(["dpg", &path("dpg.txt")])?.success()?.stdout;
    assert!(
        table.ends_with("DPG-Bench (1 prompts, 4 pictures each)  75.00\n"),
        "{table}"
    );
    Ok(())
}
