//! Headers that are made to take memory and time: refused in a small multiple of their own length.

use std::io::Write;
use std::path::Path;

use l2p_engine::Device;
use l2p_engine::checkpoint::Checkpoint;
use l2p_engine::layers::ParamSource;
use l2p_tests::{Outcome, Suite, cli};
use libtest_mimic::Failed;
use safetensors::Dtype;
use serde_json::json;

use super::model;

pub fn register(suite: &mut Suite) {
    suite.cpu("checkpoint::header::limits_are_named", limits_are_named);
    suite.cpu(
        "checkpoint::header::large_ones_take_little_memory",
        large_ones_take_little_memory,
    );
    suite.cpu(
        "checkpoint::header::names_reach_no_terminal_raw",
        names_reach_no_terminal_raw,
    );
    suite.cpu(
        "checkpoint::header::a_file_cut_while_it_is_read",
        a_file_cut_while_it_is_read,
    );
    suite.cpu("checkpoint::header::pipes_are_not_waited_for", pipes_are_not_waited_for);
}

/// Bytes of a large header.
const LARGE: usize = 99_000_000;

/// A file whose header has about `bytes` bytes: `before`, many of `item`, `after`.
fn write(path: &Path, before: &str, item: &dyn Fn(usize) -> String, after: &str, bytes: usize) -> Result<(), Failed> {
    let mut header = before.to_owned();
    let mut count = 0;
    while count == 0 || header.len() + after.len() < bytes {
        if count > 0 {
            header.push(',');
        }
        header.push_str(&item(count));
        count += 1;
    }
    header.push_str(after);
    let mut file = std::fs::File::create(path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    Ok(())
}

fn limits_are_named() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("m.safetensors");
    let tensor = json!({ "dtype": "U8", "shape": [0], "data_offsets": [0, 0] });
    let long = format!("\"x_pad_token{}\":{tensor}", "x".repeat(1020));
    let many = |index: usize| format!("\"x_pad_token{index}\":{tensor}");
    let extent = |_: usize| "0".to_owned();
    let strings = |index: usize| format!("\"{index}\":\"\"");
    type Case<'a> = (&'a str, &'a dyn Fn(usize) -> String, &'a str, usize, &'a str);
    let cases: [Case<'_>; 5] = [
        (
            "{",
            &|_| long.clone(),
            "}",
            1,
            "xxx… (1031 bytes)` has a name of more than 1024 bytes",
        ),
        (
            "{",
            &many,
            "}",
            20_000_000,
            "holds more than 262144 tensors, the most that a file may have",
        ),
        (
            "{\"a\":{\"dtype\":\"U8\",\"shape\":[",
            &extent,
            "],\"data_offsets\":[0,0]}}",
            200,
            "tensor `a` has a malformed entry: invalid length 9, expected at most 8 extents",
        ),
        (
            "{\"__metadata__\":{",
            &strings,
            "}}",
            2_000_000,
            "the header is not valid: invalid length 65537, expected an object of at most 65536 strings",
        ),
        (
            "{\"a\":[",
            &extent,
            "]}",
            200,
            "tensor `a` has a malformed entry: invalid type: integer `0`, expected a string",
        ),
    ];
    for (before, item, after, bytes, message) in cases {
        write(&path, before, item, after, bytes)?;
        let found = Checkpoint::open_transformer(&path).err().ok_or("accepted")?.to_string();
        assert!(found.contains(message), "{found}");
        assert!(found.len() < 1000, "{} bytes", found.len());
    }
    Ok(())
}

/// Runs `l2p-convert inspect` where 700 MB of memory can be had, code and stacks included.
#[cfg(target_os = "linux")]
fn inspect_in_little(path: &Path) -> Result<cli::Finished, Failed> {
    let program = cli::program("l2p-convert")?;
    let script = format!(
        "ulimit -v 700000; exec {} inspect {}",
        program.display(),
        path.display()
    );
    cli::Finished::from(
        std::process::Command::new("sh")
            .env("RAYON_NUM_THREADS", "2")
            .args(["-c", &script]),
    )
}

#[cfg(target_os = "linux")]
fn large_ones_take_little_memory() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("m.safetensors");
    let tensor = "{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,0]}";
    type Case<'a> = (&'a str, &'a dyn Fn(usize) -> String, &'a str);
    let cases: [Case<'_>; 6] = [
        ("{\"a\":[", &|_| "[]".into(), "]}"),
        (
            "{\"a\":{\"dtype\":\"U8\",\"shape\":[",
            &|_| "0".into(),
            "],\"data_offsets\":[0,0]}}",
        ),
        (
            "{\"a\":{\"dtype\":\"U8\",\"x\":[",
            &|_| "{}".into(),
            "],\"shape\":[],\"data_offsets\":[0,0]}}",
        ),
        ("{\"__metadata__\":{", &|index| format!("\"{index}\":\"\""), "}}"),
        ("{", &|index| format!("\"{index}\":{tensor}"), "}"),
        ("{\"", &|_| "x".repeat(LARGE - 100), &format!("\":{tensor}}}")),
    ];
    for (before, item, after) in cases {
        write(&path, before, item, after, LARGE)?;
        let started = std::time::Instant::now();
        let finished = inspect_in_little(&path)?;
        assert_eq!(finished.code, 1, "{before}: {}", finished.stderr);
        assert!(finished.stderr.starts_with("error: "), "{}", finished.stderr);
        assert!(
            finished.stderr.len() < 1000,
            "{before}: {} bytes",
            finished.stderr.len()
        );
        // Seconds on a busy machine; what it stands against took half a minute on an idle one.
        assert!(started.elapsed().as_secs() < 20, "{before}: {:?}", started.elapsed());
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn large_ones_take_little_memory() -> Outcome {
    Ok(())
}

/// Escape codes and endless names in files are written out and cut, in messages and in reports.
fn names_reach_no_terminal_raw() -> Outcome {
    let folder = tempfile::tempdir()?;
    let hostile = "layers.1.\u{1b}[2J\u{202e}evil";
    let mut tensors = model::pixel(Dtype::BF16);
    tensors.insert(hostile.into(), model::stored("e", Dtype::BF16, &[1]));
    tensors.insert(
        format!("layers.0.{}", "n".repeat(1000)),
        model::stored("n", Dtype::BF16, &[1]),
    );
    tensors.insert("vae.\u{1b}]0;title\u{7}".into(), model::stored("v", Dtype::BF16, &[1]));
    model::save(&folder.path().join("m.safetensors"), &tensors)?;
    for arguments in [
        &["inspect", "m.safetensors"][..],
        &[
            "export",
            "--in",
            "m.safetensors",
            "--out",
            "o.safetensors",
            "--layout",
            "plain",
        ],
    ] {
        let program = cli::program("l2p-convert")?;
        let mut command = std::process::Command::new(program);
        let finished = cli::Finished::from(command.current_dir(folder.path()).args(arguments))?;
        let text = format!("{}{}", finished.stdout, finished.stderr);
        let raw = text
            .chars()
            .find(|c| (c.is_control() && *c != '\n') || *c == '\u{202e}');
        assert_eq!(raw, None, "{text}");
        assert!(text.contains("evil") && !text.contains(&"n".repeat(300)), "{text}");
    }
    Ok(())
}

/// A file that somebody shortens while its tensors are loaded is an error, not the end of the process.
fn a_file_cut_while_it_is_read() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("m.safetensors");
    let tensors = [("a", 3 << 20), ("b", 3 << 20)]
        .map(|(name, size)| (name.to_owned(), model::stored(name, Dtype::F32, &[size])))
        .into();
    model::save(&path, &tensors)?;
    let checkpoint = Checkpoint::open_plain(&path)?;
    std::fs::File::options().write(true).open(&path)?.set_len(16 << 20)?;
    checkpoint.load(&Device::Cpu, "a", &[3 << 20])?;
    let cut = format!(
        "{}: ends before the data that its header lists: it was changed while it was read",
        path.display()
    );
    let load = checkpoint.load(&Device::Cpu, "b", &[3 << 20]).err().ok_or("loaded")?;
    assert_eq!(load.to_string(), cut);
    assert_eq!(checkpoint.identity().err().ok_or("identified")?.to_string(), cut);
    let bytes = checkpoint.tensors()["b"].bytes().err().ok_or("read")?;
    assert_eq!(bytes.to_string(), cut);
    let scan = checkpoint.first_not_finite(&mut ()).err().ok_or("looked over")?;
    assert_eq!(scan.to_string(), cut);
    Ok(())
}

#[cfg(target_os = "linux")]
fn pipes_are_not_waited_for() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = super::demo::copy(folder.path())?;
    for file in [
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "transformer/config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
        "l2p.json",
    ] {
        let path = source.join(file);
        let copy = folder.path().join("kept");
        std::fs::copy(&path, &copy)?;
        std::fs::remove_file(&path)?;
        assert!(std::process::Command::new("mkfifo").arg(&path).status()?.success());
        let program = cli::program("l2p-convert")?;
        let mut command = std::process::Command::new("timeout");
        // An open that waits for a writer heeds no other signal.
        command
            .args(["-s", "KILL", "20"])
            .arg(program)
            .arg("inspect")
            .arg(&source);
        let finished = cli::Finished::from(&mut command)?;
        assert!([0, 1].contains(&finished.code), "{file}: waited for a writer");
        let said = format!("{}{}", finished.stdout, finished.stderr);
        assert!(said.contains("is a pipe or device, expected a file"), "{file}: {said}");
        std::fs::remove_file(&path)?;
        std::fs::copy(&copy, &path)?;
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn pipes_are_not_waited_for() -> Outcome {
    Ok(())
}
