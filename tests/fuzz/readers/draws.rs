//! Readers of models and of what goes into them: whatever they take is drawn, small, by the programs' own code.

use clap::Parser;
use l2p_engine::checkpoint::read_values;

use super::Ended;
use crate::case::Case;

/// The pictures' side, a whole number of patches of both models.
const SIDE: &str = "16";

/// Runs `l2p-sample` on the CPU for one small step and looks at the numbers that it drew.
fn sample(case: &Case, model: &str, more: &[&str]) -> Ended {
    let path = |name: &str| case.path(name).display().to_string();
    let (model, out, raw) = (path(model), path("out.png"), path("raw.safetensors"));
    let fixed = [
        "l2p-sample",
        "--device",
        "cpu",
        "--model",
        &model,
        "--out",
        &out,
        "--save-raw",
        &raw,
    ];
    let sizes = ["--width", SIDE, "--height", SIDE, "--steps", "1"];
    let arguments = [&fixed[..], &sizes, more].concat();
    let arguments = match l2p_bins::sample::Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => return Ended::Wrong("the arguments do not fit", error.to_string()),
    };
    if let Err(error) = l2p_bins::sample::sample(arguments) {
        return Ended::Refused(format!("{error:#}"));
    }
    let drawn = match read_values(&case.path("raw.safetensors")) {
        Ok(drawn) => drawn,
        Err(error) => return Ended::Wrong("no numbers were kept", error.to_string()),
    };
    match drawn
        .iter()
        .find(|(_, values)| values.values.iter().any(|value| !value.is_finite()))
    {
        Some((name, _)) => Ended::Wrong("a picture that is not finite", format!("tensor `{name}`")),
        None if !case.path("out.png").is_file() => Ended::Wrong("no picture", String::new()),
        None => Ended::Drawn,
    }
}

/// A latent model of which something was changed.
pub fn latent(case: &mut Case) -> Ended {
    sample(case, "latent", &["--prompt", "a fox"])
}

/// A pixel model of which something was changed.
pub fn pixel(case: &mut Case) -> Ended {
    match case.random.one_in(4) {
        true => sample(case, "pixel", &["--prompt", "a fox", "--negative", "x", "--cfg", "2"]),
        false => sample(case, "pixel", &["--prompt", "a fox"]),
    }
}

/// A pixel model of eight bits of which something was changed.
pub fn eight_bit(case: &mut Case) -> Ended {
    sample(case, "eight-bit", &["--prompt", "a fox"])
}

/// Noise and caption features from files.
pub fn inputs(case: &mut Case) -> Ended {
    let path = |name: &str| case.path(name).display().to_string();
    let (noise, embeds) = (path("inputs/noise.safetensors"), path("inputs/embeds.safetensors"));
    match case.changed[0].contains("noise") {
        true => sample(case, "pixel", &["--noise", &noise, "--prompt", "a fox"]),
        false => sample(case, "pixel", &["--embeds", &embeds, "--cfg", "1.5"]),
    }
}

/// Files of prompts, of both programs. There is no model, so that nothing is drawn: prompts are read before it is looked for.
pub fn prompts(case: &mut Case) -> Ended {
    let path = |name: &str| case.path(name).display().to_string();
    let (prompts, out, none) = (path(&case.changed[0]), path("out"), path("no-model"));
    let rest = [
        "--model",
        &none,
        "--prompts",
        &prompts,
        "--out",
        &out,
        "--device",
        "cpu",
    ];
    let outcome = match case.changed[0].contains("data.jsonl") {
        true => {
            let arguments = ["l2p-data", "synthesize"].into_iter().chain(rest);
            l2p_bins::data::Arguments::try_parse_from(arguments).map(l2p_bins::data::data)
        }
        false => {
            let arguments = std::iter::once("l2p-sample").chain(rest);
            l2p_bins::sample::Arguments::try_parse_from(arguments).map(l2p_bins::sample::sample)
        }
    };
    without_model(outcome)
}

/// How a program ended that was to read its inputs and then find no model.
fn without_model(outcome: Result<anyhow::Result<()>, clap::Error>) -> Ended {
    match outcome {
        Err(error) => Ended::Wrong("the arguments do not fit", error.to_string()),
        Ok(Ok(())) => Ended::Wrong("drawn without a model", String::new()),
        Ok(Err(error)) => match format!("{error:#}") {
            text if text.contains("no-model") => Ended::Accepted,
            text => Ended::Refused(text),
        },
    }
}

/// A data set that is drawn, then gone on with after its files changed.
pub fn synthesis(case: &mut Case) -> Ended {
    let path = |name: &str| case.path(name).display().to_string();
    let (model, prompts, out) = (path("pixel"), path("inputs/data.jsonl"), path("set"));
    let run = || {
        let fixed = [
            "l2p-data",
            "synthesize",
            "--device",
            "cpu",
            "--model",
            &model,
            "--prompts",
            &prompts,
            "--out",
            &out,
        ];
        let sizes = ["--width", SIDE, "--height", SIDE, "--steps", "1", "--limit", "2"];
        let arguments = l2p_bins::data::Arguments::try_parse_from([&fixed[..], &sizes].concat());
        arguments.map_err(anyhow::Error::from).and_then(l2p_bins::data::data)
    };
    again(case, &["metadata.jsonl", "synthesis.json", "000/000000.png"], &run)
}

/// Runs a program that draws into `set`, changes one of these files there, and runs it again.
fn again(case: &mut Case, names: &[&str], run: &dyn Fn() -> anyhow::Result<()>) -> Ended {
    if let Err(error) = run() {
        return Ended::Refused(format!("{error:#}"));
    }
    let target = case.path("set").join(case.random.pick(names));
    let mut bytes = std::fs::read(&target).unwrap_or_default();
    crate::lines::mutate(&mut bytes, &[], &mut case.random);
    let _ = std::fs::write(&target, bytes);
    match run() {
        Ok(()) => Ended::Drawn,
        Err(error) => Ended::Refused(format!("{error:#}")),
    }
}

/// The prompts of scorers. There is no model, so that nothing is drawn.
pub fn sets(case: &mut Case) -> Ended {
    let path = |name: &str| case.path(name).display().to_string();
    let prompts = match case.changed[0].contains("captions") {
        true => path("sets/captions"),
        false => path("sets/geneval.jsonl"),
    };
    let (out, none) = (path("out/"), path("no-model"));
    let fixed = [
        "l2p-sample",
        "--device",
        "cpu",
        "--model",
        &none,
        "--out",
        &out,
        "--prompts",
        &prompts,
    ];
    let layout = case.random.pick(&["plain", "geneval", "dpg", "flat"]);
    let layout: &[&str] = if case.random.one_in(3) {
        &["--layout", layout]
    } else {
        &[]
    };
    let arguments = l2p_bins::sample::Arguments::try_parse_from([&fixed[..], layout].concat());
    without_model(arguments.map(l2p_bins::sample::sample))
}

/// A scorer's set that is drawn, then gone on with after a file beside the pictures changed.
pub fn manifests(case: &mut Case) -> Ended {
    let path = |name: &str| case.path(name).display().to_string();
    let (model, prompts, out) = (path("pixel"), path("sets/geneval.jsonl"), path("set/"));
    let run = || {
        let fixed = [
            "l2p-sample",
            "--device",
            "cpu",
            "--model",
            &model,
            "--out",
            &out,
            "--prompts",
            &prompts,
        ];
        let sizes = ["--width", SIDE, "--height", SIDE, "--steps", "1", "--count", "1"];
        let arguments = l2p_bins::sample::Arguments::try_parse_from([&fixed[..], &sizes].concat());
        arguments
            .map_err(anyhow::Error::from)
            .and_then(l2p_bins::sample::sample)
    };
    let names = [
        "manifest.json",
        "manifest.json",
        "00000/samples/0000.png",
        "00000/metadata.jsonl",
    ];
    again(case, &names, &run)
}
