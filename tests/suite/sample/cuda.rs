//! Drawing on a GPU.

use l2p_engine::Device;
use l2p_tests::{Outcome, Suite};
use serde_json::Value;

use super::{demo, picture, psnr, run};

pub fn register(suite: &mut Suite) {
    suite.cuda("sample::cuda::pictures_equal_the_cpus", pictures_equal_the_cpus);
    suite.cuda("sample::cuda::the_same_twice_is_the_same", the_same_twice_is_the_same);
    suite.cuda("sample::cuda::batches_draw_the_same", batches_draw_the_same);
    suite.cuda("sample::cuda::memory_is_accounted_for", memory_is_accounted_for);
    suite.cuda("sample::cuda::wrong_devices_are_named", wrong_devices_are_named);
}

/// The least signal-to-noise ratio, in dB, of pictures in bf16 and f32 from the same noise.
const LEAST_RATIO: f64 = 30.0;

/// With the model's own settings.
fn pictures_equal_the_cpus(_device: &Device) -> Outcome {
    let folder = tempfile::tempdir()?;
    let demo = demo()?.display().to_string();
    for (prompt, seed) in [
        ("slice of pizza", "0"),
        ("smiling face with sunglasses", "7"),
        ("fox", "41"),
    ] {
        for device in ["cpu", "cuda"] {
            let out = format!("{device}.png");
            let arguments = [
                "--model", &demo, "--prompt", prompt, "--seed", seed, "--device", device, "--out", &out,
            ];
            run(folder.path(), &arguments)?.success()?;
        }
        let ratio = psnr(
            &picture(folder.path(), "cuda.png")?,
            &picture(folder.path(), "cpu.png")?,
        );
        println!("{prompt}, seed {seed}: {ratio:.1} dB");
        if ratio < LEAST_RATIO {
            return Err(format!("{prompt}, seed {seed}: {ratio:.1} dB, expected {LEAST_RATIO} or more").into());
        }
    }
    Ok(())
}

fn the_same_twice_is_the_same(_device: &Device) -> Outcome {
    let folder = tempfile::tempdir()?;
    let demo = demo()?.display().to_string();
    // A batch of three, and images in f32 too.
    let arguments = ["--model", &demo, "--prompt", "fox", "--count", "3", "--device", "cuda"];
    for (name, raw) in [("a", "a.safetensors"), ("b", "b.safetensors")] {
        run(
            folder.path(),
            &[&arguments[..], &["--out", name, "--save-raw", raw]].concat(),
        )?
        .success()?;
    }
    let read = |name: &str| std::fs::read(folder.path().join(name));
    for seed in 0..3 {
        let name = format!("{:04}-{seed}.png", seed + 1);
        assert!(
            read(&format!("a/{name}"))? == read(&format!("b/{name}"))?,
            "{name} differs"
        );
    }
    assert!(
        read("a.safetensors")? == read("b.safetensors")?,
        "the numbers behind the pictures differ"
    );
    Ok(())
}

fn batches_draw_the_same(_device: &Device) -> Outcome {
    let folder = tempfile::tempdir()?;
    let demo = demo()?.display().to_string();
    // Captions of 32 and 64 tokens when padded.
    let long = "red apple ".repeat(15);
    std::fs::write(
        folder.path().join("p.jsonl"),
        format!("{{\"prompt\":\"fox\"}}\n{{\"prompt\":\"{long}\"}}\n"),
    )?;
    for batch in ["1", "2"] {
        let arguments = [
            "--model",
            &demo,
            "--prompts",
            "p.jsonl",
            "--device",
            "cuda",
            "--batch",
            batch,
            "--out",
            batch,
        ];
        run(folder.path(), &arguments)?.success()?;
    }
    for name in ["0001-0.png", "0002-1.png"] {
        let ratio = psnr(
            &picture(folder.path(), &format!("1/{name}"))?,
            &picture(folder.path(), &format!("2/{name}"))?,
        );
        assert!(ratio > LEAST_RATIO, "{name}: {ratio:.1} dB");
    }
    Ok(())
}

/// The report's parts add up to what the driver says, but for half a gigabyte.
fn memory_is_accounted_for(_device: &Device) -> Outcome {
    let folder = tempfile::tempdir()?;
    let demo = demo()?.display().to_string();
    let arguments = [
        "--model", &demo, "--prompt", "fox", "--device", "cuda", "--report", "json",
    ];
    let finished = run(folder.path(), &arguments)?.success()?;
    let report: Value = serde_json::from_str(&finished.stdout)?;
    let [driver, accounted] = ["driver_peak_bytes", "accounted_bytes"].map(|key| report[key].as_f64());
    let (driver, accounted) = driver.zip(accounted).ok_or("the report leaves memory out")?;
    assert!((driver - accounted).abs() < 0.5e9, "{driver} {accounted}");
    let phases = report["phases"].as_array().ok_or("no phases")?;
    for phase in phases {
        let beside = phase["beside_pool_bytes"]
            .as_object()
            .ok_or("nothing beside the pool")?;
        let parts = beside.values().filter_map(Value::as_f64);
        let sum = parts.sum::<f64>() + phase["reserved_bytes"].as_f64().unwrap_or_default();
        assert!(sum > 0.0 && sum <= accounted, "{phase:#}");
    }
    Ok(())
}

fn wrong_devices_are_named(_device: &Device) -> Outcome {
    let folder = tempfile::tempdir()?;
    let demo = demo()?.display().to_string();
    let draw = |arguments: &[&str]| {
        run(
            folder.path(),
            &[&["--model", &demo, "--prompt", "fox"], arguments].concat(),
        )
    };
    let finished = draw(&["--device", "cuda:99"])?;
    assert_eq!(finished.code, 1, "{}", finished.stderr);
    let message = finished.stderr.strip_prefix("error: there is no cuda:99: ");
    let known = ["the only GPU is cuda:0\n", "the GPUs are cuda:0 to cuda:"];
    assert!(
        message.is_some_and(|message| known.iter().any(|known| message.starts_with(known))),
        "{}",
        finished.stderr
    );
    draw(&["--device", "cuda", "--dtype", "f32"])?.failure(
        1,
        "CUDA computes in bf16 with f32 sums: use --dtype auto or bf16, or --device cpu for f32",
    )?;
    // Taken for the CPU, which has f32.
    let finished = draw(&["--dtype", "f32", "--steps", "1"])?.success()?;
    assert!(finished.stderr.contains("on cpu:"), "{}", finished.stderr);
    Ok(())
}
