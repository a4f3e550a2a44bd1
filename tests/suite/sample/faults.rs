//! What `l2p-sample` says when it cannot do what it is asked for, and that it says so before any work.

use l2p_tests::cli::Finished;
use l2p_tests::{Outcome, Suite, gpu};

use super::{command, demo, draw, names, run, try_draw, with_demo};

pub fn register(suite: &mut Suite) {
    suite.cpu("sample::faults::wrong_usage_ends_with_2", wrong_usage_ends_with_2);
    suite.cpu(
        "sample::faults::senseless_settings_end_with_1",
        senseless_settings_end_with_1,
    );
    suite.cpu("sample::faults::prompt_files", prompt_files);
    suite.cpu("sample::faults::too_large_for_memory", too_large_for_memory);
    suite.cpu(
        "sample::faults::unwritable_targets_are_named",
        unwritable_targets_are_named,
    );
    suite.cpu(
        "sample::faults::a_full_disk_leaves_nothing_behind",
        a_full_disk_leaves_nothing_behind,
    );
    suite.cpu("sample::faults::no_gpu", no_gpu);
    suite.cpu("sample::faults::pictures_to_repeat", pictures_to_repeat);
}

fn wrong_usage_ends_with_2() -> Outcome {
    let folder = tempfile::tempdir()?;
    for (arguments, message) in [
        ("--bogus", "unexpected argument '--bogus'"),
        (
            "--width 0",
            "invalid value '0' for '--width <PIXELS>': expected a whole number from 1 to 65536, found `0`",
        ),
        (
            "--height 0",
            "invalid value '0' for '--height <PIXELS>': expected a whole number from 1 to 65536, found `0`",
        ),
        (
            "--width -5",
            "'--width <PIXELS>': expected a whole number from 1 to 65536, found `-5`",
        ),
        (
            "--width wide",
            "'--width <PIXELS>': expected a whole number from 1 to 65536, found `wide`",
        ),
        (
            "--height 18446744073709551615",
            "'--height <PIXELS>': expected a whole number from 1 to 65536",
        ),
        (
            "--steps 0",
            "'--steps <N>': expected a whole number from 1 to 100000, found `0`",
        ),
        (
            "--steps 100001",
            "'--steps <N>': expected a whole number from 1 to 100000, found `100001`",
        ),
        (
            "--count 0",
            "'--count <N>': expected a whole number from 1 to 1000000, found `0`",
        ),
        (
            "--count 18446744073709551615",
            "'--count <N>': expected a whole number from 1 to 1000000",
        ),
        (
            "--batch 0",
            "'--batch <N>': expected a whole number from 1 to 65536, found `0`",
        ),
        (
            "--batch 4294967296",
            "'--batch <N>': expected a whole number from 1 to 65536",
        ),
        (
            "--seed -1",
            "'--seed <N>': expected a whole number from 0 to 18446744073709551615; there is no random seed (-1 in other programs)",
        ),
        (
            "--seed 1.5",
            "'--seed <N>': expected a whole number from 0 to 18446744073709551615",
        ),
        ("--cfg high", "invalid value 'high' for '--cfg <SCALE>'"),
        (
            "--quality 101",
            "'--quality <N>': expected a whole number from 1 to 100, found `101`",
        ),
        ("--rng dice", "`dice` names no generator; use philox or torch"),
        (
            "--device gpu",
            "`gpu` names no device; use auto, cpu, cuda or cuda:N (cuda:0 is the first GPU)",
        ),
        ("--dtype f16", "[possible values: auto, bf16, f32]"),
        ("--report xml", "[possible values: text, json]"),
        ("--prompt a --prompts b", "cannot be used with"),
        ("devices --jsn", "unexpected argument '--jsn'"),
    ] {
        let finished = run(folder.path(), &arguments.split(' ').collect::<Vec<_>>())?;
        assert_eq!(finished.code, 2, "{arguments}\n{}", finished.stderr);
        assert!(
            finished.stderr.starts_with("error: "),
            "{arguments}\n{}",
            finished.stderr
        );
        assert!(finished.stderr.contains(message), "{arguments}\n{}", finished.stderr);
    }
    assert_eq!(names(folder.path())?.len(), 0);
    Ok(())
}

fn senseless_settings_end_with_1() -> Outcome {
    let folder = tempfile::tempdir()?;
    const GUIDANCE: &str = "makes no sense: use 1 for none, about 2 to 6 to follow the prompt closer";
    const SHIFT: &str = "makes no schedule: use a positive number (3 at 1024², 4 at 4096²)";
    for (arguments, message) in [
        ("--cfg nan", format!("a guidance scale (cfg) of NaN {GUIDANCE}")),
        ("--cfg -1", format!("a guidance scale (cfg) of -1 {GUIDANCE}")),
        ("--cfg inf", format!("a guidance scale (cfg) of inf {GUIDANCE}")),
        ("--shift 0", format!("a shift of 0 {SHIFT}")),
        ("--shift -2.5", format!("a shift of -2.5 {SHIFT}")),
        ("--shift NaN", format!("a shift of NaN {SHIFT}")),
        (
            "--dtype bf16",
            "the CPU computes in f32: use --dtype auto or f32, or --device cuda for bf16".into(),
        ),
        (
            "--out a.gif",
            "a.gif: pictures are written as .png, .jpg, .jpeg or .webp".into(),
        ),
        (
            "--out v1.6",
            "v1.6: pictures are written as .png, .jpg, .jpeg or .webp; end the name of a folder with /".into(),
        ),
    ] {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        try_draw(folder.path(), &[&["--prompt", "fox"], &arguments[..]].concat())?.failure(1, &message)?;
    }
    try_draw(folder.path(), &[])?.failure(1, "nothing to draw: give --prompt TEXT or --prompts FILE.jsonl")?;
    assert_eq!(names(folder.path())?.len(), 0);
    Ok(())
}

fn prompt_files() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let expected = "expected {\"prompt\": \"...\"}";
    for (content, message) in [
        (
            "",
            "p.jsonl: holds no prompts; write one JSON object per line, {\"prompt\": \"...\"}".to_owned(),
        ),
        (
            "\n  \n",
            "p.jsonl: holds no prompts; write one JSON object per line, {\"prompt\": \"...\"}".into(),
        ),
        (
            "{\"prompt\": \"a\"}\n\nfox\n",
            format!("p.jsonl, line 3: {expected}: expected ident at line 1 column 2"),
        ),
        (
            "{\"prompt\": \"a\"}\n{\"seed\": 3}\n",
            format!("p.jsonl, line 2: {expected}: missing field `prompt` at line 1 column 11"),
        ),
        (
            "{\"prompt\": \"a\", \"sed\": 3}\n",
            format!(
                "p.jsonl, line 1: {expected}: unknown field `sed`, expected one of `prompt`, `negative`, `seed`, `out` at line 1 \
                 column 21"
            ),
        ),
        (
            "{\"prompt\": \"a\", \"seed\": -3}\n",
            format!("p.jsonl, line 1: {expected}: invalid value: integer `-3`, expected u64 at line 1 column 26"),
        ),
        (
            "{\"prompt\": \"a\", \"out\": \"x.png\"}\n{\"prompt\": \"b\", \"out\": \"./x.png\"}\n",
            "two pictures would be written to new/./x.png".into(),
        ),
        (
            "{\"prompt\": \"a\"}\n{\"prompt\": \"a\", \"out\": \"../x.png\"}\n",
            "p.jsonl, line 2: \"out\" is ../x.png, which is no name of a file within --out".into(),
        ),
        (
            "{\"prompt\": \"a\", \"out\": \"/tmp/x.png\"}\n",
            "p.jsonl, line 1: \"out\" is /tmp/x.png, which is no name of a file within --out".into(),
        ),
        (
            "{\"prompt\": \"a\", \"out\": \"x.bmp\"}\n",
            "new/x.bmp: pictures are written as .png, .jpg, .jpeg or .webp".into(),
        ),
    ] {
        std::fs::write(folder.join("p.jsonl"), content)?;
        try_draw(folder, &["--prompts", "p.jsonl", "--out", "new"])?.failure(1, &message)?;
    }
    std::fs::write(folder.join("p.jsonl"), b"{\"prompt\": \"\xff\"}")?;
    try_draw(folder, &["--prompts", "p.jsonl"])?.failure(
        1,
        "p.jsonl: is not UTF-8: line 1 has the byte 0xff (an older Windows or Latin encoding?); save it as UTF-8",
    )?;
    std::fs::write(folder.join("p.jsonl"), b"\xff\xfe{\0}\0")?;
    try_draw(folder, &["--prompts", "p.jsonl"])?
        .failure(1, "p.jsonl: is UTF-16 text or no text at all; save it as UTF-8")?;
    #[cfg(target_os = "linux")]
    try_draw(folder, &["--prompts", "/dev/zero"])?.failure(1, "/dev/zero: is a pipe or device, expected a file")?;
    try_draw(folder, &["--prompts", "gone.jsonl"])?.failure(1, "gone.jsonl: No such file or directory (os error 2)")?;
    try_draw(folder, &["--prompts", "."])?
        .failure(1, ".: holds no .txt file; a folder of prompts has one prompt per file")?;
    assert_eq!(names(folder)?, ["p.jsonl"]);
    Ok(())
}

/// Said with the estimate, and before a folder is made.
fn too_large_for_memory() -> Outcome {
    let folder = tempfile::tempdir()?;
    for side in ["50000", "65536"] {
        let estimate = format!("{side}x{side} pixels take about ");
        let finished = try_draw(
            folder.path(),
            &[
                "--prompt",
                "fox",
                "--width",
                side,
                "--height",
                side,
                "--out",
                "new/a.png",
            ],
        )?;
        let message = finished.stderr.strip_prefix("error: ").unwrap_or_default();
        assert!(
            message.starts_with(&estimate)
                && message.contains("B of memory, but cpu has ")
                && message.ends_with(" to spare: draw smaller\n"),
            "{}",
            finished.stderr
        );
        assert_eq!((finished.code, finished.stdout.as_str()), (1, ""));
    }
    let many = [
        "--prompt", "fox", "--width", "4096", "--height", "4096", "--count", "1000", "--batch", "1000", "--out", "new",
    ];
    let finished = try_draw(folder.path(), &many)?;
    assert!(
        finished
            .stderr
            .contains("4096x4096 pixels in batches of 1000 take about ")
            && finished
                .stderr
                .ends_with(" to spare: draw smaller or fewer at once (--batch 1)\n"),
        "{}",
        finished.stderr
    );
    assert_eq!(finished.code, 1);
    assert_eq!(names(folder.path())?.len(), 0);
    Ok(())
}

fn unwritable_targets_are_named() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    std::fs::write(folder.join("file"), "mine")?;
    std::fs::create_dir(folder.join("folder.png"))?;
    let before = names(folder)?;
    for (arguments, message) in [
        (
            "--out file/a.png",
            "file: is a file, expected a folder for the pictures",
        ),
        ("--out file", "file: is a file, expected a folder for the pictures"),
        (
            "--out file/below/a.png",
            "cannot make the folder file/below: Not a directory (os error 20)",
        ),
        (
            "--save-raw file/a.safetensors",
            "file/a.safetensors: Not a directory (os error 20)",
        ),
        (
            "--save-raw gone/a.safetensors",
            "gone/a.safetensors: No such file or directory (os error 2)",
        ),
        (
            "--save-raw folder.png",
            "folder.png: is a folder, expected the name of a file to write",
        ),
        (
            "--width 65536 --height 16 --out a.jpg",
            "a.jpg: JPEG pictures are at most 65535 pixels wide and high, this one would be 65536x16",
        ),
        (
            "--width 16400 --height 16 --out a.webp",
            "a.webp: WebP pictures are at most 16384 pixels wide and high, this one would be 16400x16",
        ),
    ] {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        try_draw(folder, &[&["--prompt", "fox"], &arguments[..]].concat())?.failure(1, message)?;
    }
    #[cfg(target_os = "linux")]
    try_draw(folder, &["--prompt", "fox", "--out", "/proc/a.png"])?.failure(
        1,
        "/proc/a.png: cannot write into /proc: No such file or directory (os error 2)",
    )?;
    assert_eq!(names(folder)?, before);
    // A folder whose name looks like a picture's is a folder.
    draw(folder, &["--prompt", "fox", "--steps", "1", "--out", "folder.png"])?;
    assert!(names(folder)?.contains(&"folder.png/0001-0.png".into()));
    Ok(())
}

/// Runs the program in a shell, after `first`.
#[cfg(unix)]
fn run_in_shell(folder: &std::path::Path, first: &str, arguments: &[&str]) -> Result<Finished, libtest_mimic::Failed> {
    let program = l2p_tests::cli::program("l2p-sample")?;
    let script = format!("{first} exec \"$@\"");
    let mut shell = std::process::Command::new("sh");
    shell
        .current_dir(folder)
        .args(["-c", &script, "sh"])
        .arg(program)
        .args(with_demo(arguments)?);
    Finished::from(&mut shell)
}

/// No file can grow beyond 2 kB, which fails as a full disk does, in the midst of writing.
#[cfg(unix)]
fn a_full_disk_leaves_nothing_behind() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    std::fs::write(folder.join("old.png"), "mine")?;
    for out in ["new.png", "old.png", "new.jpg", "new.webp"] {
        let arguments = ["--prompt", "fox", "--steps", "1", "--quality", "100", "--out", out];
        let finished = run_in_shell(folder, "trap '' XFSZ; ulimit -f 4;", &arguments)?;
        let message = format!("error: {out}: File too large (os error 27)\n");
        assert!(
            finished.code == 1 && finished.stderr.ends_with(&message),
            "{} {}",
            finished.code,
            finished.stderr
        );
        assert_eq!(names(folder)?, ["old.png"]);
    }
    assert_eq!(std::fs::read_to_string(folder.join("old.png"))?, "mine");
    let arguments = [
        "--prompt", "fox", "--steps", "1", "--width", "16", "--height", "16", "--out", "a.png",
    ];
    let finished = run_in_shell(
        folder,
        "exec > /dev/full;",
        &[&arguments[..], &["--report", "json"]].concat(),
    )?;
    let message = "error: cannot write to standard output: No space left on device (os error 28)\n";
    assert!(
        finished.code == 1 && finished.stderr.ends_with(message),
        "{}",
        finished.stderr
    );
    Ok(())
}

#[cfg(not(unix))]
fn a_full_disk_leaves_nothing_behind() -> Outcome {
    Ok(())
}

/// Where there is no GPU, and where there is one that the process may not see.
fn no_gpu() -> Outcome {
    let folder = tempfile::tempdir()?;
    let demo = demo()?.display().to_string();
    let hidden = |device: &str| {
        let arguments = [
            "--model", &demo, "--prompt", "fox", "--steps", "1", "--out", "a.png", "--device", device,
        ];
        let mut command = command(folder.path(), &arguments)?;
        if gpu().is_ok() {
            command.env("CUDA_VISIBLE_DEVICES", "");
        }
        Finished::from(&mut command)
    };
    let reason = match gpu() {
        Ok(_) => {
            "the NVIDIA driver shows no GPU: look at CUDA_VISIBLE_DEVICES and nvidia-smi, or run with --device cpu"
        }
        Err(reason) => reason,
    };
    for device in ["cuda", "cuda:0", "cuda:3"] {
        hidden(device)?.failure(1, reason)?;
    }
    assert_eq!(names(folder.path())?.len(), 0);
    let finished = hidden("auto")?.success()?;
    assert_eq!(
        finished.stderr,
        "1 picture 128x128 on cpu: 1 step, shift 3, cfg 2.5\na.png\n"
    );
    Ok(())
}

fn pictures_to_repeat() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    std::fs::write(folder.join("words.png"), "words")?;
    draw(
        folder,
        &[
            "--prompt", "fox", "--steps", "1", "--width", "16", "--height", "16", "--out", "a.png",
        ],
    )?;
    let like = |name: &str, more: &[&str]| {
        run(
            folder,
            &[&["--like", name, "--device", "cpu", "--out", "b.png"], more].concat(),
        )
    };
    like("gone.png", &[])?.failure(1, "gone.png: No such file or directory (os error 2)")?;
    like("words.png", &[])?.failure(1, "words.png: is not a PNG file; settings are kept in PNG files only")?;
    // What an editor leaves of a picture.
    let plain = super::picture(folder, "a.png")?;
    l2p_engine::image_io::write_image(&folder.join("plain.png"), &plain, &Default::default())?;
    like("plain.png", &[])?.failure(
        1,
        "plain.png: carries no settings; only PNG files as l2p wrote them do, not copies that an editor saved",
    )?;
    // Settings that make no sense are refused wherever they come from.
    let mut settings = l2p_engine::image_io::read_settings(&folder.join("a.png"))?;
    let mut write = |change: &dyn Fn(&mut l2p_engine::image_io::Settings)| -> Outcome {
        change(&mut settings);
        let options = l2p_engine::image_io::WriteOptions {
            settings: Some(&settings),
            ..Default::default()
        };
        Ok(l2p_engine::image_io::write_image(
            &folder.join("changed.png"),
            &plain,
            &options,
        )?)
    };
    write(&|settings| settings.model = "gone".into())?;
    like("changed.png", &[])?.failure(
        1,
        "changed.png: was drawn with a model named gone, which is not here: name it with --model DIR|FILE",
    )?;
    let demo = demo()?.display().to_string();
    write(&|settings| settings.rng = "dice".into())?;
    like("changed.png", &["--model", &demo])?.failure(1, "`dice` names no generator; use philox or torch")?;
    let refused = |what: &str| format!("changed.png: its text of settings is not what was expected: entry {what}");
    write(&|settings| settings.width = 0)?;
    like("changed.png", &["--model", &demo])?.failure(
        1,
        &refused("`width`: expected a whole number from 1 to 65536, found 0 at line 1 column 80"),
    )?;
    assert!(!names(folder)?.contains(&"b.png".into()));
    Ok(())
}
