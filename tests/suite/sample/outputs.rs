//! Where pictures go: none is overwritten that nobody named, none lands outside the folder, and none is lost for its name.

use l2p_engine::image_io::read_settings;
use l2p_tests::{Outcome, Suite};

use super::{demo, draw, names, run, try_draw};

pub fn register(suite: &mut Suite) {
    suite.cpu("sample::outputs::a_folder_keeps_what_it_holds", folders);
    suite.cpu("sample::outputs::a_list_of_prompts_stays_within_its_folder", lists);
    suite.cpu("sample::outputs::a_name_need_not_be_text", odd_names);
    suite.cpu("sample::outputs::relative_models_are_found_again", relative_models);
    suite.cpu("sample::outputs::terminals_get_plain_text", plain_text);
}

/// The quickest picture.
const SMALL: [&str; 6] = ["--steps", "1", "--width", "16", "--height", "16"];

fn folders() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let fox = draw(folder, &[&SMALL[..], &["--prompt", "fox", "--out", "v1.6/"]].concat())?;
    assert!(fox.stderr.ends_with("v1.6/0001-0.png\n"), "{}", fox.stderr);
    let first = std::fs::read(folder.join("v1.6/0001-0.png"))?;
    // Another prompt with the same seed would have the same name.
    let frog = draw(folder, &[&SMALL[..], &["--prompt", "frog", "--out", "v1.6"]].concat())?;
    assert!(frog.stderr.ends_with("v1.6/0002-0.png\n"), "{}", frog.stderr);
    assert!(std::fs::read(folder.join("v1.6/0001-0.png"))? == first);
    assert_eq!(read_settings(&folder.join("v1.6/0002-0.png"))?.prompt, "frog");
    // So do names with a number behind them.
    let two = [&SMALL[..], &["--prompt", "fox", "--count", "2", "--out", "x.png"]].concat();
    draw(folder, &two)?;
    draw(folder, &two)?;
    let expected = [
        "v1.6",
        "v1.6/0001-0.png",
        "v1.6/0002-0.png",
        "x-0001.png",
        "x-0002.png",
        "x-0003.png",
        "x-0004.png",
    ];
    assert_eq!(names(folder)?, expected);
    // A file that is named is meant.
    draw(
        folder,
        &[&SMALL[..], &["--prompt", "frog", "--out", "x-0001.png"]].concat(),
    )?;
    assert_eq!(read_settings(&folder.join("x-0001.png"))?.prompt, "frog");
    Ok(())
}

fn lists() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    for out in ["../x.png", "a/../../x.png", "/x.png", "..", "."] {
        let line = serde_json::json!({ "prompt": "fox", "out": out });
        std::fs::write(folder.join("p.jsonl"), line.to_string())?;
        let message = format!("p.jsonl, line 1: \"out\" is {out}, which is no name of a file within --out");
        try_draw(folder, &["--prompts", "p.jsonl", "--out", "in/"])?.failure(1, &message)?;
    }
    assert_eq!(names(folder)?, ["p.jsonl"]);
    std::fs::write(folder.join("p.jsonl"), "{\"prompt\": \"fox\", \"out\": \"./a/x.png\"}")?;
    draw(
        folder,
        &[&SMALL[..], &["--prompts", "p.jsonl", "--out", "in/"]].concat(),
    )?;
    assert_eq!(names(folder)?, ["in", "in/a", "in/a/x.png", "p.jsonl"]);
    Ok(())
}

/// Once it was drawn, and lost because the report could not name it.
#[cfg(target_os = "linux")]
fn odd_names() -> Outcome {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use l2p_tests::cli::Finished;
    let folder = tempfile::tempdir()?;
    let odd = |name: &[u8]| OsStr::from_bytes(name).to_owned();
    for (out, count, expected) in [
        (odd(b"caf\xe9.png"), "1", vec![odd(b"caf\xe9.png")]),
        (
            odd(b"th\xe9.png"),
            "2",
            vec![odd(b"th\xe9-0001.png"), odd(b"th\xe9-0002.png")],
        ),
        (odd(b"d\xe9/"), "1", vec![odd(b"d\xe9/0001-0.png")]),
    ] {
        let arguments = super::with_demo(&[&SMALL[..], &["--prompt", "fox", "--count", count]].concat())?;
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut command = super::command(folder.path(), &arguments)?;
        command.arg("--report").arg("json").arg("--out").arg(&out);
        let finished = Finished::from(&mut command)?.success()?;
        let report: serde_json::Value = serde_json::from_str(&finished.stdout)?;
        let pictures = report["pictures"].as_array().map(Vec::len);
        assert_eq!(pictures, Some(expected.len()), "{report}");
        for name in expected {
            l2p_engine::image_io::read_image(&folder.path().join(&name))?;
        }
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn odd_names() -> Outcome {
    Ok(())
}

#[cfg(unix)]
fn relative_models() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    std::os::unix::fs::symlink(demo()?, folder.join("model"))?;
    let model = ["--model", "model", "--device", "cpu"];
    run(
        folder,
        &[&model[..], &SMALL, &["--prompt", "fox", "--out", "a.png"]].concat(),
    )?
    .success()?;
    assert_eq!(read_settings(&folder.join("a.png"))?.model, "model");
    run(folder, &["--like", "a.png", "--device", "cpu", "--out", "b.png"])?.success()?;
    assert!(std::fs::read(folder.join("a.png"))? == std::fs::read(folder.join("b.png"))?);
    // From elsewhere it is a name.
    std::fs::create_dir(folder.join("in"))?;
    run(
        &folder.join("in"),
        &["--like", "../a.png", "--device", "cpu", "--out", "b.png"],
    )?
    .failure(
        1,
        "../a.png: was drawn with a model named model, which is not here: name it with --model DIR|FILE",
    )
}

#[cfg(not(unix))]
fn relative_models() -> Outcome {
    Ok(())
}

/// What a list of prompts holds never moves the cursor of whoever draws with it.
fn plain_text() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let line = serde_json::json!({ "prompt": format!("\u{1b}[2J\u{202e}{}", "red apple, ".repeat(300)) });
    std::fs::write(folder.join("p.jsonl"), line.to_string())?;
    let finished = draw(
        folder,
        &[&SMALL[..], &["--prompts", "p.jsonl", "--out", "in/"]].concat(),
    )?;
    assert!(finished.stderr.contains("are cut off"), "{}", finished.stderr);
    assert!(
        !finished.stderr.contains(['\u{1b}', '\u{202e}']),
        "{:?}",
        finished.stderr
    );
    assert!(folder.join("in/0001-0.png").is_file());
    Ok(())
}
