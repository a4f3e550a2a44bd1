//! Numbers instead of words: noise and caption features from files, images to files.

use std::path::Path;

use l2p_engine::checkpoint::{Checkpoint, Values, read_values, write_values};
use l2p_engine::model::Spec;
use l2p_engine::model::config::{ModelKind, TextConfig};
use l2p_engine::model::detailer::DetailerLayout;
use l2p_engine::model::text::TextEncoder;
use l2p_engine::model::zimage::ZImage;
use l2p_engine::ops::noise::normal_noise;
use l2p_engine::text::PromptTokenizer;
use l2p_engine::{Device, Result};
use l2p_tests::fixtures::generated_weight;
use l2p_tests::{Outcome, Suite, random};
use libtest_mimic::Failed;

use super::{demo, draw, names, picture, run, try_draw};
use crate::models::small_config;

pub fn register(suite: &mut Suite) {
    suite.cpu("sample::inputs::raw_images_are_the_picture", raw_images_are_the_picture);
    suite.cpu("sample::inputs::noise_from_a_file", noise_from_a_file);
    suite.cpu("sample::inputs::captions_from_a_file", captions_from_a_file);
    suite.cpu("sample::inputs::a_bare_pixel_model_draws", a_bare_pixel_model_draws);
    suite.cpu("sample::inputs::wrong_files_are_named", wrong_files_are_named);
}

fn values(shape: &[usize], values: Vec<f32>) -> Values {
    Values {
        shape: shape.to_vec(),
        values,
    }
}

fn write(folder: &Path, name: &str, tensors: &[(&str, Values)]) -> Result<()> {
    let tensors: Vec<(String, Values)> = tensors
        .iter()
        .map(|(name, values)| ((*name).into(), values.clone()))
        .collect();
    write_values(&folder.join(name), &tensors)
}

fn raw_images_are_the_picture() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let size = ["--width", "48", "--height", "32"];
    let arguments = [
        "--prompt",
        "fox",
        "--count",
        "2",
        "--out",
        "a",
        "--save-raw",
        "raw.safetensors",
    ];
    draw(folder, &[&arguments[..], &size].concat())?;
    let raw = read_values(&folder.join("raw.safetensors"))?;
    assert_eq!(raw.keys().collect::<Vec<_>>(), ["image", "latent"]);
    let image = &raw["image"];
    assert_eq!(
        (&image.shape, &raw["latent"].shape),
        (&vec![2, 3, 32, 48], &vec![2, 16, 4, 6])
    );
    for (item, name) in ["a/0001-0.png", "a/0002-1.png"].into_iter().enumerate() {
        let picture = picture(folder, name)?;
        let planes = &image.values[item * 3 * 32 * 48..][..3 * 32 * 48];
        for (index, &byte) in picture.pixels().iter().enumerate() {
            let value = planes[index % 3 * 32 * 48 + index / 3];
            let expected = (value.clamp(-1.0, 1.0) + 1.0) * 127.5;
            assert!(
                (f32::from(byte) - expected).abs() <= 0.51,
                "{name}, byte {index}: {byte}, {value}"
            );
        }
    }
    // It is replaced, as pictures are.
    draw(
        folder,
        &[
            &["--prompt", "fox", "--out", "b.png", "--save-raw", "raw.safetensors"],
            &size[..],
        ]
        .concat(),
    )?;
    assert_eq!(
        read_values(&folder.join("raw.safetensors"))?["image"].shape,
        [1, 3, 32, 48]
    );
    Ok(())
}

fn noise_from_a_file() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    draw(folder, &["--prompt", "fox", "--seed", "11", "--out", "seed.png"])?;
    let cells = 16 * 16;
    let noise = normal_noise(&Device::Cpu, [cells, 16], 11, 0)?;
    let noise = noise.as_slice::<f32>()?;
    let planes: Vec<f32> = (0..cells * 16)
        .map(|index| noise[index % cells * 16 + index / cells])
        .collect();
    for (name, shape) in [("three", &[16, 16, 16][..]), ("four", &[1, 16, 16, 16])] {
        let file = format!("{name}.safetensors");
        write(folder, &file, &[("noise", values(shape, planes.clone()))])?;
        let out = format!("{name}.png");
        draw(
            folder,
            &["--prompt", "fox", "--seed", "99", "--noise", &file, "--out", &out],
        )?;
        assert!(picture(folder, &out)? == picture(folder, "seed.png")?, "{name}");
    }
    Ok(())
}

/// The features of `texts` as the demo model's text encoder makes them.
fn features(texts: &[&str]) -> std::result::Result<Vec<Values>, Failed> {
    let folder = demo()?.join("text_encoder");
    let tokenizer = PromptTokenizer::open(&demo()?.join("tokenizer"))?;
    let encoder = TextEncoder::load(
        &Checkpoint::open_text_encoder(&folder)?,
        &Device::Cpu,
        &TextConfig::read(&folder)?,
    )?;
    let encode = |text: &&str| {
        let features = encoder.encode(&tokenizer.encode(text)?.ids)?;
        Ok(values(&[features.dim(1), features.dim(2)], features.to_vec::<f32>()?))
    };
    texts.iter().map(encode).collect()
}

fn captions_from_a_file() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    draw(folder, &["--prompt", "fox", "--out", "fox.png"])?;
    draw(folder, &["--prompt", "frog", "--seed", "1", "--out", "frog.png"])?;
    let features = features(&["fox", "frog", ""])?;
    let [fox, frog, nothing] = &features[..] else {
        return Err("three features".into());
    };
    let all = [
        ("cap.0", fox.clone()),
        ("cap.1", frog.clone()),
        ("neg.0", nothing.clone()),
    ];
    write(folder, "two.safetensors", &all)?;
    draw(folder, &["--embeds", "two.safetensors", "--count", "2", "--out", "two"])?;
    assert!(picture(folder, "two/0001-0.png")? == picture(folder, "fox.png")?);
    assert!(picture(folder, "two/0002-1.png")? == picture(folder, "frog.png")?);
    // One caption for all pictures; without guidance none to stay away from is needed.
    write(folder, "one.safetensors", &[("cap.0", fox.clone())])?;
    draw(
        folder,
        &[
            "--embeds",
            "one.safetensors",
            "--cfg",
            "1",
            "--count",
            "2",
            "--steps",
            "1",
            "--out",
            "one",
        ],
    )?;
    try_draw(folder, &["--embeds", "one.safetensors", "--out", "no.png"])?.failure(
        1,
        "one.safetensors: holds no tensor `neg.0`, which guidance needs: add it, or draw with --cfg 1",
    )?;
    Ok(())
}

/// Saves a pixel model of patch 16 whose captions are 96 wide.
fn save_pixel_model(path: &Path) -> Outcome {
    let config = small_config(ModelKind::Pixel, 256, 16);
    let head = DetailerLayout::for_patch(16, Some(&[8, 16, 24, 32]), Some(32), 256)?;
    let spec = ZImage {
        config,
        head: Some(head),
    };
    let tensors: Vec<(String, Values)> = spec
        .tensors()
        .into_iter()
        .map(|(name, shape)| {
            let generated = generated_weight(&name, &shape, 0);
            (name, values(&shape, generated))
        })
        .collect();
    Ok(write_values(path, &tensors)?)
}

fn a_bare_pixel_model_draws() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    save_pixel_model(&folder.join("pixel.safetensors"))?;
    write(
        folder,
        "cap.safetensors",
        &[("cap.0", values(&[7, 96], random("cap", 7 * 96)))],
    )?;
    let arguments = [
        "--model",
        "pixel.safetensors",
        "--device",
        "cpu",
        "--embeds",
        "cap.safetensors",
        "--steps",
        "2",
    ];
    let size = [
        "--width",
        "40",
        "--height",
        "32",
        "--out",
        "a.png",
        "--save-raw",
        "raw.safetensors",
    ];
    let finished = run(folder, &[&arguments[..], &size].concat())?.success()?;
    assert_eq!(
        finished.stderr,
        "note: width 40 is rounded up to 48: this model draws multiples of 16\n\
         1 picture 48x32 on cpu: 2 steps, shift 3, cfg 1\na.png\n"
    );
    let raw = read_values(&folder.join("raw.safetensors"))?;
    assert_eq!(raw.keys().collect::<Vec<_>>(), ["image"]);
    assert!(raw["image"].values.iter().all(|value| value.is_finite()));
    // With words it needs a text encoder, and says how to give one; nothing has been drawn or made then.
    let out = [
        "--prompt",
        "fox",
        "--out",
        "new/b.png",
        "--width",
        "48",
        "--height",
        "32",
    ];
    let with = |more: &[&str]| {
        run(
            folder,
            &[&["--model", "pixel.safetensors", "--device", "cpu"], &out[..], more].concat(),
        )
    };
    let without = |what: &str, flag: &str| {
        format!("pixel.safetensors: comes without a {what}: name one with {flag}, or in an l2p.json beside the model")
    };
    with(&[])?.failure(1, &without("text encoder", "--text-encoder DIR|FILE"))?;
    let encoder = demo()?.join("text_encoder").display().to_string();
    with(&["--text-encoder", &encoder])?.failure(1, &without("tokenizer", "--tokenizer DIR"))?;
    let tokenizer = demo()?.join("tokenizer").display().to_string();
    with(&["--text-encoder", &encoder, "--tokenizer", &tokenizer])?.failure(
        1,
        &format!("{encoder}: makes features of width 256, the transformer takes 96"),
    )?;
    with(&["--text-encoder", "gone", "--tokenizer", &tokenizer])?
        .failure(1, "gone: No such file or directory (os error 2)")?;
    assert!(!names(folder)?.contains(&"new".into()), "a folder was made for nothing");
    Ok(())
}

fn wrong_files_are_named() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    write(
        folder,
        "a.safetensors",
        &[
            ("noise", values(&[16, 8, 16], vec![0.0; 2048])),
            ("cap.0", values(&[3, 5], vec![0.0; 15])),
        ],
    )?;
    write(
        folder,
        "b.safetensors",
        &[
            ("cap.0", values(&[1, 256], vec![0.0; 256])),
            ("cap.2", values(&[1, 256], vec![0.0; 256])),
        ],
    )?;
    std::fs::write(folder.join("c.safetensors"), "words")?;
    let mut odd = vec![0.0; 16 * 16 * 16];
    odd[17] = f32::NAN;
    let tokens = |count: usize| values(&[count, 256], vec![0.0; count * 256]);
    let mut infinite = tokens(2);
    infinite.values[300] = f32::NEG_INFINITY;
    write(
        folder,
        "d.safetensors",
        &[("noise", values(&[16, 16, 16], odd)), ("cap.0", infinite)],
    )?;
    write(
        folder,
        "e.safetensors",
        &[("cap.0", tokens(4097)), ("noise", values(&[0, 16, 16], Vec::new()))],
    )?;
    write(folder, "f.safetensors", &[("cap.0", values(&[0, 256], Vec::new()))])?;
    for (arguments, message) in [
        ("--noise gone", "gone: No such file or directory (os error 2)"),
        ("--noise b.safetensors", "b.safetensors: holds no tensor `noise`"),
        (
            "--noise a.safetensors",
            "a.safetensors: tensor `noise` has shape [16, 8, 16], expected [16, 16, 16]",
        ),
        (
            "--noise c.safetensors",
            "c.safetensors: not a safetensors file: it has only 5 bytes",
        ),
        (
            "--noise d.safetensors",
            "d.safetensors: tensor `noise` holds NaN at element 17: no number to compute with",
        ),
        (
            "--noise e.safetensors",
            "e.safetensors: tensor `noise` has shape [0, 16, 16], expected [16, 16, 16]",
        ),
        (
            "--embeds d.safetensors --cfg 1",
            "d.safetensors: tensor `cap.0` holds -inf at element 300: no number to compute with",
        ),
        (
            "--embeds e.safetensors --cfg 1",
            "e.safetensors: tensor `cap.0` has 4097 tokens: expected a whole number from 1 to 4096, found 4097",
        ),
        (
            "--embeds f.safetensors --cfg 1",
            "f.safetensors: tensor `cap.0` has 0 tokens: expected a whole number from 1 to 4096, found 0",
        ),
        ("--embeds gone", "gone: No such file or directory (os error 2)"),
        (
            "--embeds a.safetensors --cfg 1",
            "a.safetensors: tensor `cap.0` has shape [3, 5], expected [tokens, 256]",
        ),
        (
            "--embeds b.safetensors --cfg 1 --count 3",
            "b.safetensors: holds 2 tensors `cap.N` for 3 pictures; one each or one for all are needed",
        ),
        (
            "--embeds b.safetensors --cfg 1 --count 2",
            "b.safetensors: holds no tensor `cap.1`",
        ),
    ] {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        try_draw(
            folder,
            &[&["--prompt", "fox", "--out", "x.png"], &arguments[..]].concat(),
        )?
        .failure(1, message)?;
    }
    let mut left = names(folder)?;
    left.retain(|name| !name.ends_with(".safetensors"));
    assert!(left.is_empty(), "{left:?}");
    Ok(())
}
