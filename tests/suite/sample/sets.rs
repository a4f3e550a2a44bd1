//! Prompts of scorers: their layouts, going on, and what is never mixed.

use std::path::Path;
use std::time::{Duration, Instant};

use l2p_engine::image_io::{read_image, read_settings};
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;
use serde_json::Value;

use super::{command, draw, names, picture, try_draw, with_demo};

pub fn register(suite: &mut Suite) {
    suite.cpu("sample::sets::geneval_is_laid_out_and_gone_on_with", geneval);
    suite.cpu("sample::sets::grids_of_dpg_bench", dpg);
    suite.cpu("sample::sets::captions_of_a_folder", flat);
    suite.cpu("sample::sets::other_settings_are_kept_out", kept_out);
    suite.cpu("sample::sets::mix_ups_are_named", mixed_up);
}

const GENEVAL: [&str; 2] = [
    "{\"tag\": \"single_object\", \"include\": [{\"class\": \"fox\", \"count\": 1}], \"prompt\": \"a photo of a fox\"}",
    "{\"tag\":\"counting\",\"include\":[{\"class\":\"cat\",\"count\":2}],\"exclude\":[{\"class\":\"cat\",\"count\":3}],\"prompt\":\"a photo of two cats\"}",
];

fn write_geneval(folder: &Path) -> Outcome {
    Ok(std::fs::write(
        folder.join("evaluation_metadata.jsonl"),
        format!("{}\n\n{}\n", GENEVAL[0], GENEVAL[1]),
    )?)
}

fn geneval_flags<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [
        &["--prompts", "evaluation_metadata.jsonl", "--out", out, "--seed", "5"],
        more,
    ]
    .concat()
}

/// How many pictures were drawn and how many were there.
fn counts(stdout: &str) -> Result<(usize, Option<u64>), Failed> {
    let report: Value = serde_json::from_str(stdout)?;
    Ok((
        report["pictures"].as_array().map_or(0, Vec::len),
        report["skipped"].as_u64(),
    ))
}

fn geneval() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    write_geneval(folder)?;
    let finished = draw(folder, &geneval_flags("whole/", &["--report", "json"]))?;
    assert_eq!(counts(&finished.stdout)?, (8, Some(0)));
    assert!(
        finished
            .stderr
            .contains("next: python evaluation/evaluate_images.py whole/ --outfile results.jsonl"),
        "{}",
        finished.stderr
    );
    let expected: Vec<String> = [
        "00000",
        "00000/metadata.jsonl",
        "00000/samples",
        "00000/samples/0000.png",
        "00000/samples/0001.png",
        "00000/samples/0002.png",
        "00000/samples/0003.png",
    ]
    .iter()
    .flat_map(|name| [(*name).to_owned(), name.replace("00000", "00001")])
    .chain(["manifest.json".to_owned()])
    .collect();
    let mut found = names(&folder.join("whole"))?;
    found.sort();
    let mut expected = expected;
    expected.sort();
    assert_eq!(found, expected);
    // The scorer reads the line as it was.
    for (number, line) in GENEVAL.iter().enumerate() {
        let text = std::fs::read_to_string(folder.join(format!("whole/0000{number}/metadata.jsonl")))?;
        assert_eq!(text, format!("{line}\n"));
    }
    let settings = read_settings(&folder.join("whole/00001/samples/0002.png"))?;
    assert_eq!((settings.prompt.as_str(), settings.seed), ("a photo of two cats", 11));
    draw(
        folder,
        &["--prompt", "a photo of two cats", "--seed", "11", "--out", "one.png"],
    )?;
    assert_eq!(
        picture(folder, "one.png")?,
        picture(folder, "whole/00001/samples/0002.png")?
    );
    let manifest: Value = serde_json::from_slice(&std::fs::read(folder.join("whole/manifest.json"))?)?;
    assert_eq!(
        (
            &manifest["layout"],
            &manifest["steps"],
            &manifest["seed"],
            &manifest["per_prompt"]
        ),
        (&"geneval".into(), &2.into(), &5.into(), &4.into())
    );
    assert_eq!(manifest["transformer_sha256"].as_str().map(str::len), Some(64));

    // Killed, damaged, thinned out and given again, by two ranks: the same set.
    let arguments = with_demo(&geneval_flags("parted/", &["--report", "json"]))?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut child = command(folder, &arguments)?
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()?;
    let started = Instant::now();
    while !folder.join("parted/00000/samples/0001.png").exists() && started.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill()?;
    child.wait()?;
    std::fs::write(folder.join("parted/00000/samples/0000.png"), "no picture")?;
    let ranks = ["--ranks", "2", "--report", "json"];
    let (drawn, there) = counts(&draw(folder, &geneval_flags("parted/", &ranks))?.stdout)?;
    assert!(
        drawn >= 1 && there.is_some_and(|there| there >= 1 && there as usize + drawn == 8),
        "{drawn} {there:?}"
    );
    for name in names(&folder.join("whole"))?
        .iter()
        .filter(|name| name.ends_with(".png"))
    {
        assert!(
            std::fs::read(folder.join("whole").join(name))? == std::fs::read(folder.join("parted").join(name))?,
            "{name}"
        );
    }
    assert_eq!(
        std::fs::read(folder.join("whole/manifest.json"))?,
        std::fs::read(folder.join("parted/manifest.json"))?
    );
    Ok(())
}

fn write_captions(folder: &Path) -> Outcome {
    std::fs::create_dir_all(folder.join("captions"))?;
    std::fs::write(folder.join("captions/partiprompts7.txt"), "a fox\n")?;
    Ok(std::fs::write(folder.join("captions/b.txt"), "a house")?)
}

fn dpg() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    write_captions(folder)?;
    let flags = ["--prompts", "captions", "--out", "grids", "--report", "json"];
    let finished = draw(folder, &flags)?;
    assert_eq!(counts(&finished.stdout)?, (8, Some(0)));
    assert!(
        finished
            .stderr
            .contains("--image-root-path grids --resolution 128 --pic-num 4"),
        "{}",
        finished.stderr
    );
    // Nothing but pictures lies where the scorer looks.
    assert_eq!(names(&folder.join("grids"))?, ["b.png", "partiprompts7.png"]);
    let cells = ["b-1.png", "b-2.png", "b-3.png", "b-4.png", "manifest.json"];
    assert_eq!(names(&folder.join("grids-cells"))?[..5], cells);
    let grid = picture(folder, "grids/b.png")?;
    assert_eq!((grid.width(), grid.height()), (256, 256));
    let cell = picture(folder, "grids-cells/b-3.png")?;
    let rows = (0..128).flat_map(|row| &grid.pixels()[3 * 256 * (128 + row)..][..3 * 128]);
    assert!(rows.eq(cell.pixels()));
    // A grid that is gone is made of the pictures that are there, one whose picture is gone anew.
    std::fs::remove_file(folder.join("grids/b.png"))?;
    std::fs::remove_file(folder.join("grids-cells/partiprompts7-2.png"))?;
    std::fs::write(folder.join("grids/partiprompts7.png"), "no picture")?;
    assert_eq!(counts(&draw(folder, &flags)?.stdout)?, (1, Some(7)));
    assert_eq!(picture(folder, "grids/b.png")?, grid);
    assert!(read_image(&folder.join("grids/partiprompts7.png")).is_ok());
    try_draw(folder, &[&flags[..], &["--count", "2"]].concat())?.failure(
        1,
        "--count 2: DPG-Bench's folder of prompts takes 4 per prompt; leave --count away",
    )
}

fn flat() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    write_captions(folder)?;
    draw(
        folder,
        &[
            "--prompts",
            "captions",
            "--layout",
            "flat",
            "--out",
            "flat",
            "--negative",
            "blur",
        ],
    )?;
    assert_eq!(
        names(&folder.join("flat"))?,
        ["b.png", "manifest.json", "partiprompts7.png"]
    );
    let settings = read_settings(&folder.join("flat/partiprompts7.png"))?;
    assert_eq!(
        (settings.prompt.as_str(), settings.negative.as_str(), settings.seed),
        ("a fox", "blur", 1)
    );
    Ok(())
}

/// A folder of one kind of pictures takes no others.
fn kept_out() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    write_geneval(folder)?;
    let flags = geneval_flags("out/", &["--count", "1"]);
    draw(folder, &flags)?;
    let before = std::fs::read(folder.join("out/00000/samples/0000.png"))?;
    std::fs::remove_file(folder.join("out/00001/samples/0000.png"))?;
    let refused = |more: &[&str], words: &str| -> Outcome {
        let finished = try_draw(folder, &[&flags[..], more].concat())?;
        let line = finished.stderr.lines().next_back().unwrap_or_default();
        match finished.code == 1
            && line.starts_with("error: out/manifest.json: the pictures there were drawn")
            && line.contains(words)
        {
            true => Ok(()),
            false => Err(format!("{more:?}: {}", finished.stderr).into()),
        }
    };
    refused(&["--steps", "3"], "with another steps (2 there, 3 now)")?;
    refused(&["--cfg", "1.5"], "with another cfg (2.5 there, 1.5 now)")?;
    refused(&["--shift", "2"], "with another shift")?;
    refused(&["--width", "64"], "with another width (128 there, 64 now)")?;
    refused(&["--rng", "torch"], "with another rng")?;
    refused(&["--negative", "blur"], "with another negative")?;
    let finished = try_draw(folder, &[&["--seed", "6"], &flags[..4], &["--count", "1"]].concat())?;
    assert!(
        finished.stderr.contains("with another seed (5 there, 6 now)"),
        "{}",
        finished.stderr
    );
    // Other prompts under the same names.
    std::fs::write(
        folder.join("evaluation_metadata.jsonl"),
        format!("{}\n{}\n", GENEVAL[1], GENEVAL[0]),
    )?;
    refused(&[], "with another prompts sha256")?;
    write_geneval(folder)?;
    // Another version of the program, and a file that says something that this one does not know.
    let manifest = std::fs::read_to_string(folder.join("out/manifest.json"))?;
    let version = format!("\"engine\": \"{}\"", env!("CARGO_PKG_VERSION"));
    std::fs::write(
        folder.join("out/manifest.json"),
        manifest.replace(&version, "\"engine\": \"0.0.1\""),
    )?;
    refused(&[], "with another engine (\"0.0.1\" there")?;
    std::fs::write(
        folder.join("out/manifest.json"),
        manifest.replacen('{', "{\"eta\": 1,", 1),
    )?;
    assert!(
        try_draw(folder, &flags)?
            .stderr
            .contains("has an entry `eta` that this program does not know")
    );
    std::fs::write(folder.join("out/manifest.json"), "[")?;
    assert!(
        try_draw(folder, &flags)?
            .stderr
            .contains("out/manifest.json: is not what was expected")
    );
    assert!(!folder.join("out/00001/samples/0000.png").exists());
    assert_eq!(std::fs::read(folder.join("out/00000/samples/0000.png"))?, before);
    std::fs::write(folder.join("out/manifest.json"), manifest)?;
    draw(folder, &flags)?;
    Ok(())
}

fn mixed_up() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    write_geneval(folder)?;
    write_captions(folder)?;
    std::fs::create_dir(folder.join("empty"))?;
    let before = names(folder)?;
    let cases: [(&[&str], &str); 8] = [
        (
            &[
                "--prompts",
                "evaluation_metadata.jsonl",
                "--layout",
                "dpg",
                "--out",
                "new/",
            ],
            "evaluation_metadata.jsonl: is GenEval's evaluation_metadata.jsonl, but --layout dpg is for DPG-Bench's folder of prompts: give \
             --layout geneval, or leave it away",
        ),
        (
            &["--prompts", "captions", "--layout", "geneval", "--out", "new/"],
            "captions: is DPG-Bench's folder of prompts, but --layout geneval is for GenEval's evaluation_metadata.jsonl: give --layout dpg, \
             or leave it away",
        ),
        (
            &["--prompts", "captions", "--out", "new.png"],
            "new.png: the pictures of DPG-Bench's folder of prompts go to a folder: name one with --out DIR/",
        ),
        (
            &["--prompts", "captions"],
            "out.png: the pictures of DPG-Bench's folder of prompts go to a folder: name one with --out DIR/",
        ),
        (
            &["--prompts", "empty", "--out", "new/"],
            "empty: holds no .txt file; a folder of prompts has one prompt per file",
        ),
        (
            &["--prompts", "captions", "--out", "new/", "--profile"],
            "--profile is not for the prompts of a scorer's set: leave it away, or give --prompts a file of prompts",
        ),
        (
            &["--prompts", "captions", "--out", ".."],
            "..: grids go to a folder with a name of its own: --out DIR",
        ),
        (
            &["--prompts", "gone.jsonl", "--out", "new/"],
            "gone.jsonl: No such file or directory (os error 2)",
        ),
    ];
    for (arguments, message) in cases {
        try_draw(folder, arguments)?.failure(1, message)?;
    }
    assert_eq!(names(folder)?, before);
    // Of GenEval's file the prompts alone.
    let flags = [
        "--prompts",
        "evaluation_metadata.jsonl",
        "--layout",
        "plain",
        "--out",
        "plain/",
    ];
    draw(folder, &flags)?;
    assert_eq!(names(&folder.join("plain"))?, ["0001-0.png", "0002-1.png"]);
    Ok(())
}
