//! Ctrl-C.

use std::process::Stdio;
use std::time::{Duration, Instant};

use l2p_engine::Device;
use l2p_tests::{Outcome, Suite};

use super::{command, demo, names};

pub fn register(suite: &mut Suite) {
    suite.cpu("sample::interrupt::nothing_half_written", || interrupted("cpu"));
    suite.cuda("sample::interrupt::nothing_half_written_on_cuda", |_: &Device| {
        interrupted("cuda")
    });
}

/// Ctrl-C while the second of many pictures is drawn: the first is whole, there is no second, and the program is gone after
/// a step.
#[cfg(unix)]
fn interrupted(device: &str) -> Outcome {
    let folder = tempfile::tempdir()?;
    let demo = demo()?.display().to_string();
    let arguments = [
        "--model", &demo, "--device", device, "--prompt", "fox", "--count", "2000", "--batch", "1",
    ];
    let out = ["--steps", "3", "--out", "pictures"];
    let mut child = command(folder.path(), &[&arguments[..], &out].concat())?
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?;
    let finished = |names: &[String]| names.iter().filter(|name| name.ends_with(".png")).count();
    let started = Instant::now();
    while finished(&names(folder.path())?) == 0 && started.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(2));
        assert!(child.try_wait()?.is_none(), "the program ended by itself");
    }
    let signal = std::process::Command::new("sh")
        .args(["-c", &format!("kill -INT {}", child.id())])
        .status()?;
    assert!(signal.success());
    let asked = Instant::now();
    let output = child.wait_with_output()?;
    assert_eq!(output.status.code(), Some(130));
    assert!(asked.elapsed() < Duration::from_secs(20));
    let stderr = String::from_utf8(output.stderr)?;
    assert!(stderr.ends_with("error: interrupted\n"), "{stderr}");
    let left = names(folder.path())?;
    assert!((1..2000).contains(&finished(&left)), "{} pictures", finished(&left));
    assert!(
        left.iter().all(|name| name == "pictures" || name.ends_with(".png")),
        "{left:?}"
    );
    for name in left.iter().filter(|name| name.ends_with(".png")) {
        l2p_engine::image_io::read_image(&folder.path().join(name))?;
    }
    Ok(())
}

#[cfg(not(unix))]
fn interrupted(_device: &str) -> Outcome {
    Ok(())
}
