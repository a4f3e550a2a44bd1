//! Pictures that begin with another one, and of which some is kept.

use std::path::Path;

use l2p_engine::checkpoint::read_values;
use l2p_engine::image_io::{Filter, RgbImage, WriteOptions, read_cover, read_settings, write_image};
use l2p_tests::cli::Finished;
use l2p_tests::{Outcome, Suite, models_folder};
use libtest_mimic::Failed;

use super::{names, picture, psnr, run};

pub fn register(suite: &mut Suite) {
    suite.cpu("sample::edit::what_is_kept_comes_back_to_the_bit", kept_to_the_bit);
    suite.cpu("sample::edit::only_pixels_keep_what_is_kept", without_restoring);
    suite.cpu("sample::edit::borders_fade_within_what_is_drawn", borders);
    suite.cpu("sample::edit::pictures_go_on_beyond_their_borders", extended);
    suite.cpu("sample::edit::pictures_are_drawn_over_by_their_strength", drawn_over);
    suite.cpu("sample::edit::edits_are_known_again", known_again);
    suite.cpu("sample::edit::wrong_edits_are_named", wrong_edits);
}

/// The name of a demo model that draws pictures of this kind.
const MODELS: [&str; 2] = ["pixel", "source"];

/// Draws with a demo model on the CPU, whatever comes of it.
fn try_edit(folder: &Path, model: &str, arguments: &[&str]) -> Result<Finished, Failed> {
    let model = models_folder().join("demo").join(model).canonicalize()?;
    let model = model.display().to_string();
    let first = ["--model", &model, "--device", "cpu", "--prompt", "slice of pizza"];
    let steps = match arguments.contains(&"--steps") {
        true => &[][..],
        false => &["--steps", "4"],
    };
    run(folder, &[&first, steps, arguments].concat())
}

fn edit(folder: &Path, model: &str, arguments: &[&str]) -> Result<Finished, Failed> {
    try_edit(folder, model, arguments)?.success()
}

/// Fails unless the program ended with an error that has these words, and with nothing else.
fn expect_refused(finished: &Finished, words: &str) -> Outcome {
    let sound = finished.code != 0 && finished.stdout.is_empty() && !finished.stderr.contains("panicked");
    match sound && finished.stderr.contains(words) {
        true => Ok(()),
        false => Err(format!(
            "expected an error with `{words}`, found {}\n{}",
            finished.code, finished.stderr
        )
        .into()),
    }
}

fn write(folder: &Path, name: &str, image: &RgbImage) -> l2p_engine::Result<()> {
    write_image(&folder.join(name), image, &WriteOptions::default())
}

/// Writes `init.png`, one of the demo's pictures, of a size that no model draws, and returns it.
fn write_init(folder: &Path, width: usize, height: usize) -> Result<RgbImage, Failed> {
    let path = models_folder().join("demo/pictures/fox.webp");
    let image = read_cover(&path, width, height, Filter::default())?;
    write(folder, "init.png", &image)?;
    Ok(image)
}

/// A mask that is white right of a column.
fn right_of(column: usize, width: usize, height: usize) -> Result<RgbImage, Failed> {
    let row = (0..width).flat_map(|x| [if x >= column { 255 } else { 0 }; 3]);
    let row: Vec<u8> = row.collect();
    Ok(RgbImage::new(width, height, row.repeat(height))?)
}

/// The columns of a picture from `first` on, up to `end`.
fn columns(image: &RgbImage, first: usize, end: usize) -> Vec<u8> {
    let rows = image.pixels().chunks_exact(3 * image.width());
    rows.flat_map(|row| &row[3 * first..3 * end]).copied().collect()
}

/// How much two lists of bytes differ on average.
fn difference(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    let sum: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
    sum / a.len() as f64
}

fn kept_to_the_bit() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    // No multiple of anything.
    let (width, height, column) = (99, 77, 45);
    let init = write_init(folder, width, height)?;
    write(folder, "mask.png", &right_of(column, width, height)?)?;
    for model in MODELS {
        let flags = [
            "--init", "init.png", "--mask", "mask.png", "--count", "2", "--batch", "2",
        ];
        edit(folder, model, &[&flags[..], &["--out", &format!("{model}/")]].concat())?;
        let drawn = names(&folder.join(model))?;
        assert_eq!(drawn.len(), 2);
        let drawn: Vec<RgbImage> = drawn
            .iter()
            .map(|name| picture(&folder.join(model), name))
            .collect::<Result<_, _>>()?;
        for drawn in &drawn {
            assert_eq!([drawn.width(), drawn.height()], [width, height]);
            assert_eq!(
                columns(drawn, 0, column),
                columns(&init, 0, column),
                "{model}: what is kept"
            );
        }
        let [first, second] = [&drawn[0], &drawn[1]].map(|drawn| columns(drawn, column, width));
        assert!(
            difference(&first, &columns(&init, column, width)) > 5.0,
            "{model}: nothing was drawn"
        );
        assert!(difference(&first, &second) > 2.0, "{model}: seeds draw the same");
    }
    // Another file format without loss, and a mask by opacity.
    edit(
        folder,
        "pixel",
        &["--init", "init.png", "--mask", "mask.png", "--out", "a.webp"],
    )?;
    let webp = picture(folder, "a.webp")?;
    assert_eq!(columns(&webp, 0, column), columns(&init, 0, column));
    let mut opacity = image::RgbaImage::new(width as u32, height as u32);
    for (x, _, pixel) in opacity.enumerate_pixels_mut() {
        *pixel = image::Rgba([90, 0, 200, if (x as usize) < column { 255 } else { 0 }]);
    }
    opacity.save(folder.join("opacity.png"))?;
    edit(
        folder,
        "pixel",
        &["--init", "init.png", "--mask", "opacity.png", "--out", "b.webp"],
    )?;
    assert_eq!(picture(folder, "b.webp")?, webp, "transparent places are drawn anew");
    Ok(())
}

/// What the models themselves make of what is kept, before its bytes are put back.
fn without_restoring() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let (side, column) = (128, 64);
    let init = write_init(folder, side, side)?;
    write(folder, "mask.png", &right_of(column, side, side)?)?;
    let mut lost = Vec::new();
    for model in MODELS {
        let flags = [
            "--init",
            "init.png",
            "--mask",
            "mask.png",
            "--save-raw",
            "raw.safetensors",
            "--out",
            "a.png",
        ];
        edit(folder, model, &flags)?;
        let raw = read_values(&folder.join("raw.safetensors"))?;
        let planes = &raw["image"].values;
        let place = |index: usize| planes[index % 3 * side * side + index / 3];
        let bytes = (0..3 * side * side).map(|index| (place(index) * 127.5 + 127.5).round().clamp(0.0, 255.0) as u8);
        let drawn = RgbImage::new(side, side, bytes.collect())?;
        let kept = |image: &RgbImage| RgbImage::new(column, side, columns(image, 0, column));
        lost.push(psnr(&kept(&drawn)?, &kept(&init)?));
    }
    println!("{lost:?} dB, of pixels and of latents");
    assert!(lost[0] == f64::INFINITY && lost[1] < 50.0, "{lost:?}");
    Ok(())
}

fn borders() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let (side, column) = (128, 64);
    let init = write_init(folder, side, side)?;
    write(folder, "mask.png", &right_of(column, side, side)?)?;
    for model in MODELS {
        let drawn = |feather: &str| -> Result<RgbImage, Failed> {
            let flags = [
                "--init",
                "init.png",
                "--mask",
                "mask.png",
                "--feather",
                feather,
                "--out",
                "a.png",
            ];
            edit(folder, model, &flags)?;
            picture(folder, "a.png")
        };
        let [hard, soft] = [drawn("0")?, drawn("16")?];
        for drawn in [&hard, &soft] {
            assert_eq!(columns(drawn, 0, column), columns(&init, 0, column), "{model}");
        }
        // The first column that may change hardly does where the border is soft.
        let change =
            |image: &RgbImage| difference(&columns(image, column, column + 1), &columns(&init, column, column + 1));
        println!("{model}: {:.1} hard, {:.1} soft", change(&hard), change(&soft));
        assert!(change(&soft) < 0.5 * change(&hard), "{model}");
    }
    Ok(())
}

fn extended() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let init = write_init(folder, 64, 64)?;
    for model in MODELS {
        let name = format!("{model}.png");
        edit(
            folder,
            model,
            &["--init", "init.png", "--extend", "10,0,54,0", "--out", &name],
        )?;
        let wide = picture(folder, &name)?;
        assert_eq!([wide.width(), wide.height()], [128, 64]);
        assert_eq!(columns(&wide, 10, 74), init.pixels());
        let settings = read_settings(&folder.join(&name))?;
        assert_eq!([settings.width, settings.height], [128, 64]);
        let start = settings.start.ok_or("the picture does not say what it began with")?;
        assert!(start.strength == 1.0 && start.mask_sha256.is_some());
    }
    Ok(())
}

fn drawn_over() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let init = write_init(folder, 128, 128)?;
    let mut distances = Vec::new();
    let schedule = ["--steps", "20", "--shift", "1"];
    for strength in ["0.05", "0.5", "0.9"] {
        let flags = ["--init", "init.png", "--strength", strength, "--out", "a.png"];
        edit(folder, "pixel", &[&flags[..], &schedule].concat())?;
        distances.push(psnr(&picture(folder, "a.png")?, &init));
    }
    println!("{distances:?} dB");
    assert!(distances.is_sorted_by(|a, b| a > b), "{distances:?}");
    // Another size than the picture's.
    let size = ["--width", "64", "--height", "96"];
    edit(
        folder,
        "pixel",
        &[&["--init", "init.png", "--out", "a.png"], &size[..]].concat(),
    )?;
    let small = picture(folder, "a.png")?;
    assert_eq!([small.width(), small.height()], [64, 96]);
    Ok(())
}

fn known_again() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    write_init(folder, 64, 64)?;
    write(folder, "mask.png", &right_of(30, 64, 64)?)?;
    let flags = [
        "--init",
        "init.png",
        "--mask",
        "mask.png",
        "--skip-existing",
        "--out",
        "a.png",
    ];
    edit(folder, "pixel", &flags)?;
    let before = picture(folder, "a.png")?;
    let again = edit(folder, "pixel", &flags)?;
    assert!(again.stderr.contains("1 of them are there"), "{}", again.stderr);
    let other = try_edit(folder, "pixel", &[&flags[..], &["--strength", "0.5"]].concat())?;
    expect_refused(&other, "drawn with another picture to begin with, strength or mask")?;
    // What is drawn like it must be told what it began with; the rest it knows.
    let like = ["--like", "a.png", "--out", "b.png"];
    expect_refused(&try_edit(folder, "pixel", &like)?, "name that with --init")?;
    edit(folder, "pixel", &[&like[..], &flags[..4]].concat())?;
    assert_eq!(picture(folder, "b.png")?, before);
    // How weights are kept is known again too.
    edit(
        folder,
        "pixel",
        &["--width", "64", "--height", "64", "--trunk", "int8", "--out", "c.png"],
    )?;
    edit(folder, "pixel", &["--like", "c.png", "--out", "d.png"])?;
    assert_eq!(picture(folder, "c.png")?, picture(folder, "d.png")?);
    assert_eq!(
        read_settings(&folder.join("d.png"))?
            .weights
            .map(|weights| weights.trunk),
        Some("int8".into())
    );
    edit(
        folder,
        "pixel",
        &["--like", "c.png", "--trunk", "bf16", "--out", "d.png"],
    )?;
    assert_ne!(picture(folder, "c.png")?, picture(folder, "d.png")?);
    Ok(())
}

fn wrong_edits() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    write_init(folder, 64, 64)?;
    write(folder, "small.png", &right_of(3, 32, 64)?)?;
    write(folder, "black.png", &right_of(64, 64, 64)?)?;
    std::fs::write(folder.join("text.png"), "no picture")?;
    let cases: [(&[&str], &str); 9] = [
        (&["--mask", "small.png"], "--init"),
        (&["--init", "nothing.png"], "nothing.png"),
        (&["--init", "text.png"], "is not a PNG, JPEG or WebP picture"),
        (
            &["--init", "init.png", "--mask", "text.png"],
            "is not a PNG, JPEG or WebP picture",
        ),
        (
            &["--init", "init.png", "--mask", "small.png"],
            "the mask has 32x64 places",
        ),
        (
            &["--init", "init.png", "--mask", "black.png"],
            "keeps all of the picture",
        ),
        (&["--init", "init.png", "--strength", "2"], "a --strength of 2"),
        (&["--init", "init.png", "--extend", "1,2"], "LEFT,TOP,RIGHT,BOTTOM"),
        (
            &["--init", "init.png", "--mask", "black.png", "--width", "64"],
            "leave --width and --height away",
        ),
    ];
    for (flags, word) in cases {
        let refused = try_edit(folder, "pixel", flags)?;
        expect_refused(&refused, word)?;
        assert!(!folder.join("out.png").exists(), "{flags:?}");
    }
    Ok(())
}
