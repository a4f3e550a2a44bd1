//! Kernels and their images: what a launch is checked for.

use std::path::Path;
use std::process::Command;

use l2p_engine::device::Args;
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::cli::Finished;
use l2p_tests::{Outcome, Suite, gpu};
use libtest_mimic::Trial;
use serde_json::{Value, json};

/// Last of all, so that the tests of the kernels' faults are known.
pub fn register(suite: &mut Suite) {
    let tests: Vec<String> = suite
        .trials
        .iter()
        .filter(|trial| trial.kind() == "cuda")
        .map(|trial| trial.name().into())
        .collect();
    suite.trials.push(Trial::test(
        "kernels::every_fault_has_tests_that_may_catch_it",
        move || every_fault_has_tests(&tests),
    ));
    suite.cpu("kernels::faults_are_tried_and_told", faults_are_tried_and_told);
    suite.cuda(
        "kernels::arguments_are_compared_with_the_image",
        arguments_are_compared_with_the_image,
    );
}

/// Says on stderr which kernels were not the build's, so that no outcome is taken for theirs; scripts/kernel-faults reads the line.
pub fn say_whose_images() {
    if let Ok(Device::Cuda(device)) = gpu() {
        let foreign = device.foreign_images();
        if !foreign.is_empty() {
            eprintln!("kernel images of L2P_KERNEL_IMAGES: {}", foreign.join(", "));
        }
    }
}

/// One kernel stands for all: every other test that launches one is refused where its arguments are not those of the image.
fn arguments_are_compared_with_the_image(device: &Device) -> Outcome {
    let Device::Cuda(cuda) = device else {
        return Err("not a GPU".into());
    };
    let kernel = cuda.kernel("from_rgb8", "from_rgb8")?;
    let x = Tensor::zeros(device, [6], DType::U8)?;
    let mut y = Tensor::zeros(device, [6], DType::F32)?;
    let mut addresses = || Args::new().input(&x)?.output(&mut y);
    let message = |args: Args| kernel.check(&args).unwrap_err().to_string();
    for _ in 0..2 {
        // What has passed, or has been refused, says nothing of another layout.
        kernel.check(&addresses()?.long(6))?;
        assert_eq!(
            message(addresses()?.int(6)),
            "kernel from_rgb8: argument 3, an int, has 4 bytes, but the image's parameter has 8, from offset 16 on"
        );
        assert_eq!(
            message(addresses()?),
            "kernel from_rgb8: argument 3 is missing: the image's kernel takes 3 arguments"
        );
        assert_eq!(
            message(addresses()?.long(6).float(1.0)),
            "kernel from_rgb8: argument 4, a float, is one too many: the image's kernel takes 3 arguments"
        );
    }
    Ok(())
}

/// What can be switched on in the kernels; whether each stands in the sources is tested beside them.
const FAULTS: &str = include_str!("../../kernels/faults.json");
const SCRIPT: &str = include_str!("../../scripts/kernel-faults");

fn every_fault_has_tests(tests: &[String]) -> Outcome {
    let faults: Vec<Value> = serde_json::from_str(FAULTS)?;
    assert!(faults.len() >= 14, "only {} faults", faults.len());
    for fault in faults {
        let filter = fault["tests"].as_str().ok_or("a fault without tests")?;
        assert!(
            tests.iter().any(|test| test.contains(filter)),
            "no test on a GPU is called {filter}"
        );
    }
    Ok(())
}

/// Stands for the test executable: two tests, whose outcomes hang on the images that it is given and on the filter.
const FAKE_TESTS: &str = r#"#!/bin/sh
echo "running 2 tests"
echo "test        $1::on_the_cpu ... ok"
said() { echo "kernel images of L2P_KERNEL_IMAGES: conv, noise" >&2; }
case "$1-$L2P_KERNEL_IMAGES" in
    */1) echo "test [cuda] $1::equals ... FAILED"; said; exit 101 ;;
    */2) said ;;
    */3) sleep 60 ;;
    */4) ;;
    */5) kill -9 $$ ;;
    broken-) echo "test [cuda] $1::equals ... FAILED"; exit 101 ;;
    portable-*) [ "$L2P_PORTABLE" = 1 ] || exit 3; said ;;
esac
echo "test [cuda] $1::equals   ... ok"
"#;

/// scripts/kernel-faults on a test executable that is none: what fails, hangs or dies with a fault has caught it; what passes has not;
/// what fails without it, uses no image with it or has not been compiled says nothing. Needs Python, as the script does.
fn faults_are_tried_and_told() -> Outcome {
    if Command::new("python3").arg("--version").output().is_err() {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    std::fs::create_dir(path("scripts"))?;
    std::fs::write(path("scripts/kernel-faults"), SCRIPT)?;
    write_executable(&path("tests"), FAKE_TESTS)?;
    let fault = |number: u32, tests: &str| json!({"number": number, "images": ["conv"], "what": "w", "tests": tests});
    let mut faults: Vec<Value> = (1..=5).map(|number| fault(number, "ops")).collect();
    faults.extend([fault(6, "broken"), fault(7, "ops")]);
    faults.push(json!({"number": 8, "images": ["conv"], "what": "w", "tests": "portable", "portable": true}));
    for number in [1, 2, 3, 4, 5, 6, 8] {
        std::fs::create_dir_all(path(&format!("out/{number}")))?;
    }
    std::fs::write(path("out/faults.json"), serde_json::to_string(&faults)?)?;
    let run = |numbers: &[&str]| {
        let mut script = Command::new("python3");
        script
            .arg(path("scripts/kernel-faults"))
            .arg("run")
            .arg(path("out"))
            .args(numbers);
        Finished::from(script.arg("--tests").arg(path("tests")).args(["--timeout", "1"]))
    };
    let told = |stdout: &str, number: usize| {
        stdout
            .lines()
            .nth(2 * number - 1)
            .unwrap_or_default()
            .trim()
            .to_string()
    };

    let all = run(&[])?;
    assert_eq!(all.code, 2, "{all:?}");
    assert_eq!(told(&all.stdout, 1), "caught by ops::equals");
    assert_eq!(told(&all.stdout, 2), "SURVIVED all of ops passed");
    assert_eq!(told(&all.stdout, 3), "caught by no end in 1 s");
    assert_eq!(told(&all.stdout, 4), "NOT TRIED no test used an image with the fault");
    assert_eq!(told(&all.stdout, 5), "caught by ended by signal 9");
    assert_eq!(told(&all.stdout, 6), "NOT TRIED without the fault: broken::equals");
    assert!(told(&all.stdout, 7).starts_with("NOT TRIED") && told(&all.stdout, 7).ends_with("is not there: build it"));
    assert_eq!(told(&all.stdout, 8), "SURVIVED all of portable passed");
    assert!(
        all.stdout.ends_with("\n3 caught, 2 survived, 3 not tried\n"),
        "{}",
        all.stdout
    );
    let report: Value = serde_json::from_str(&std::fs::read_to_string(path("out/report.json"))?)?;
    assert_eq!(report["counts"], json!({"caught": 3, "survived": 2, "not tried": 3}));
    assert_eq!(report["faults"][0]["images used"], json!(["conv", "noise"]));
    assert_eq!(report["faults"][1]["verdict"], "survived");

    assert_eq!(run(&["1", "2"])?.code, 1);
    assert_eq!(run(&["1", "5"])?.code, 0);
    // What is known of the others is kept.
    let report: Value = serde_json::from_str(&std::fs::read_to_string(path("out/report.json"))?)?;
    assert_eq!(report["counts"], json!({"caught": 3, "survived": 2, "not tried": 3}));
    let unknown = run(&["99"])?;
    assert_eq!(
        (unknown.code, unknown.stderr.contains("there is no fault 99")),
        (2, true),
        "{unknown:?}"
    );
    Ok(())
}

fn write_executable(path: &Path, text: &str) -> std::io::Result<()> {
    std::fs::write(path, text)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}
