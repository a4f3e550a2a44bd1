//! What the benchmarks record.

use l2p_tests::{Outcome, Suite, models_folder};
use serde_json::Value;

use super::{number, read, run};

pub fn register(suite: &mut Suite) {
    suite.cpu("bench::records::every_benchmark", every_benchmark);
    suite.cpu("bench::records::whole_pictures", whole_pictures);
    suite.cpu(
        "bench::records::several_models_in_one_record",
        several_models_in_one_record,
    );
    suite.cpu("bench::records::sets_of_pictures", sets_of_pictures);
    suite.cpu("bench::records::refusals", refusals);
}

/// What every row of every benchmark holds.
fn expect_row(row: &Value, repeats: usize) {
    assert_eq!(row["pass"], true, "{row:#}");
    assert!(number(&row["error"]) <= number(&row["tolerance"]), "{row:#}");
    let samples = row["samples_ms"].as_array().cloned().unwrap_or_default();
    assert_eq!(samples.len(), repeats, "{row:#}");
    let least = samples.iter().map(number).fold(f64::INFINITY, f64::min);
    assert!(least > 0.0 && number(&row["milliseconds"]) >= least, "{row:#}");
    assert!(
        number(&row["share"]) > 0.0 && number(&row["peak_bytes"]) > 0.0,
        "{row:#}"
    );
}

fn every_benchmark() -> Outcome {
    let folder = tempfile::tempdir()?;
    let small: [(&str, &[&str], &[&str]); 6] = [
        (
            "bench-attention",
            &["--tokens", "70", "--heads", "2"],
            &["attention-70-auto"],
        ),
        ("bench-gemm", &["--shape", "a=20x48x32+bias"], &["gemm-a"]),
        (
            "bench-elementwise",
            &[
                "--tokens",
                "20",
                "--heads",
                "2",
                "--ffn",
                "256",
                "--image",
                "64",
                "--ops",
                "swiglu,to_rgb8",
            ],
            &["swiglu", "to_rgb8"],
        ),
        ("bench-head", &["--tiny", "--heads", "1k"], &["head-1k"]),
        ("bench-step", &["--tiny", "--model", "pixel-1k"], &["pixel-1k"]),
        (
            "bench-decode",
            &["--tiny", "--batch", "1,3", "--prompt", "5", "--tokens", "3"],
            &["step-1", "decode-1", "step-3", "decode-3"],
        ),
    ];
    for (program, arguments, names) in small {
        let common = ["--device", "cpu", "--repeats", "2", "--json", "record.json"];
        let finished = run(folder.path(), program, &[arguments, &common].concat())?.success()?;
        let record = read(&folder.path().join("record.json"))?;
        assert_eq!(record["gpu"], "cpu");
        assert!(number(&record["ceilings"]["bytes_per_second"]) > 0.0, "{record:#}");
        let rows = record["rows"].as_array().ok_or("no rows")?;
        let found: Vec<&str> = rows.iter().filter_map(|row| row["name"].as_str()).collect();
        assert_eq!(found, names, "{program}");
        for row in rows {
            expect_row(row, 2);
            let name = row["name"].as_str().unwrap_or_default();
            assert!(finished.stdout.contains(name), "{}", finished.stdout);
        }
    }
    Ok(())
}

/// Pictures take the time of their parts, and the latent model's have one part more.
fn whole_pictures() -> Outcome {
    let folder = tempfile::tempdir()?;
    for (latent, name) in [(false, "sample-pixel-1k"), (true, "sample-latent-1k")] {
        let mut arguments = vec![
            "--tiny",
            "--sizes",
            "1k",
            "--steps",
            "2",
            "--device",
            "cpu",
            "--repeats",
            "2",
        ];
        arguments.extend(["--json", "record.json", "--out", "picture.png"]);
        arguments.extend(latent.then_some("--latent"));
        run(folder.path(), "bench-sample", &arguments)?.success()?;
        let record = read(&folder.path().join("record.json"))?;
        let row = &record["rows"][0];
        assert_eq!(row["name"], name);
        expect_row(row, 2);
        // The prompt has as many tokens as the published steps are measured with.
        assert_eq!(
            (number(&row["inputs"]["caption"]), number(&row["inputs"]["steps"])),
            (96.0, 2.0)
        );
        let samples = |part: &str, index: usize| number(&row["parts"][part]["samples_ms"][index]);
        for index in 0..2 {
            let sum: f64 = ["text", "noise", "steps", "decode", "rgb", "png"]
                .iter()
                .map(|part| samples(part, index))
                .sum();
            assert!((sum - number(&row["samples_ms"][index])).abs() < 1e-6 * sum, "{row:#}");
        }
        assert!(samples("steps", 0) > samples("noise", 0), "{row:#}");
        assert!(!latent || samples("decode", 0) > 0.1, "{row:#}");
        let side = number(&row["inputs"]["side"]) as u32;
        let picture = image::open(folder.path().join("picture.png"))?;
        assert_eq!((picture.width(), picture.height()), (side, side));
    }
    Ok(())
}

fn several_models_in_one_record() -> Outcome {
    let folder = tempfile::tempdir()?;
    let mut arguments = vec![
        "--tiny",
        "--model",
        "pixel-1k,latent-1k",
        "--device",
        "cpu",
        "--repeats",
        "2",
    ];
    arguments.extend(["--json", "record.json"]);
    run(folder.path(), "bench-step", &arguments)?.success()?;
    let record = read(&folder.path().join("record.json"))?;
    let rows = record["rows"].as_array().ok_or("no rows")?;
    let found: Vec<&str> = rows.iter().filter_map(|row| row["name"].as_str()).collect();
    assert_eq!(found, ["pixel-1k", "latent-1k", "latent-1k-decode"]);
    Ok(())
}

/// A set is drawn and written; the first batch does not count.
fn sets_of_pictures() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = models_folder().join("demo/source").display().to_string();
    let mut arguments = vec!["--model", &source, "--device", "cpu", "--side", "32", "--steps", "2"];
    arguments.extend(["--pictures", "5", "--batch", "2", "--json", "record.json"]);
    let finished = run(folder.path(), "bench-synthesize", &arguments)?.success()?;
    let record = read(&folder.path().join("record.json"))?;
    let measured = &record["measured"];
    assert_eq!((number(&measured["pictures"]), number(&measured["batch"])), (3.0, 2.0));
    let written: Vec<f64> = measured["written"]
        .as_array()
        .ok_or("no times")?
        .iter()
        .map(number)
        .collect();
    assert_eq!(written.len(), 5);
    let seconds = written[4] - written[1];
    assert!((number(&measured["seconds"]) - seconds).abs() < 1e-9, "{record:#}");
    let rate = number(&measured["pictures_per_second"]);
    assert!(
        (rate * seconds - 3.0).abs() < 1e-6 && measured["idle"].is_null(),
        "{record:#}"
    );
    assert!(finished.stdout.contains(&format!("{rate:.3}/s")), "{}", finished.stdout);
    arguments[9] = "2";
    let refused = run(folder.path(), "bench-synthesize", &arguments)?;
    let message = "error: 2 pictures are not more than the first 2, which warm up: ask for more (--pictures)";
    assert!(refused.code == 1 && refused.stderr.contains(message), "{refused:?}");
    Ok(())
}

fn refusals() -> Outcome {
    let folder = tempfile::tempdir()?;
    let cases: [(&str, &[&str], &str); 4] = [
        (
            "bench-step",
            &["--model", "pixel-3k"],
            "`pixel-3k` names no model; there are pixel-1k, pixel-2k, pixel-4k, pixel-8k, pixel-10k, latent-1k, latent-2k, latent-4k, klein-pixel-1k, klein-pixel-4k, klein-latent-1k, klein-latent-4k",
        ),
        (
            "bench-sample",
            &["--tiny", "--side", "100", "--device", "cpu"],
            "a side of 100 is no multiple of 64, which this model needs",
        ),
        (
            "bench-elementwise",
            &["--ops", "nothing", "--tokens", "8", "--image", "64"],
            "there is no operation `nothing`; there are qk_norm_rope, rms_norm_modulate, gated_residual_rms_norm, swiglu, \
             layer_norm_modulate, concat_tokens, patch_embed_16, patch_embed_64, cast, guided_euler_step, to_rgb8, group_norm, \
             unpatchify",
        ),
        (
            "bench-targets",
            &["--only", "everything"],
            "there is no part `everything`; there are sample, attention, elementwise, products, head, step-4k, eight-bit, streamed, sample-8gb, sample-4gb, sample-8k, step-1k, latent-4k",
        ),
    ];
    for (program, arguments, message) in cases {
        run(folder.path(), program, arguments)?.failure(1, message)?;
    }
    // Work for a GPU is not begun on a CPU.
    let finished = run(folder.path(), "bench-sample", &["--device", "cpu"])?;
    assert!(
        finished.code == 1 && finished.stderr.contains("sample-pixel-4k takes") && finished.stderr.contains("--tiny"),
        "{finished:?}"
    );
    Ok(())
}
