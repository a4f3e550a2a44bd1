//! Picture files: what is written is read back, settings survive, and whatever is wrong is said.

pub mod hostile;

use std::path::Path;

use image::codecs::jpeg::JpegEncoder;
use image::{DynamicImage, ImageEncoder};
use l2p_engine::image_io::{
    Filter, ImageFormat, RgbImage, Settings, StartSettings, WeightSettings, WriteOptions, centre_crop, encode_image,
    ensure_writable, fit_to_multiple, fitted_size, read_image, read_settings, resize, write_image,
};
use l2p_tests::{Outcome, Suite, hash_uniform};

pub fn register(suite: &mut Suite) {
    suite.cpu("image_io::lossless_files_round_trip", lossless_files_round_trip);
    suite.cpu("image_io::jpeg_is_close", jpeg_is_close);
    suite.cpu(
        "image_io::drawings_and_photographs_become_small",
        drawings_and_photographs_become_small,
    );
    suite.cpu(
        "image_io::png_bytes_do_not_depend_on_threads",
        png_bytes_do_not_depend_on_threads,
    );
    suite.cpu("image_io::settings_round_trip", settings_round_trip);
    suite.cpu("image_io::absent_settings_are_explained", absent_settings_are_explained);
    suite.cpu("image_io::unwritable_files_are_named", unwritable_files_are_named);
    suite.cpu("image_io::failure_leaves_the_old_file", failure_leaves_the_old_file);
    suite.cpu("image_io::other_pixels_become_rgb", other_pixels_become_rgb);
    suite.cpu(
        "image_io::turned_pictures_are_set_upright",
        turned_pictures_are_set_upright,
    );
    suite.cpu("image_io::bad_files_are_named", bad_files_are_named);
    suite.cpu("image_io::resize_equals_plain_loops", resize_equals_plain_loops);
    suite.cpu("image_io::sizes_fit_and_centre", sizes_fit_and_centre);
    hostile::register(suite);
}

/// Smooth in one half and noisy in the other, so that every PNG filter is chosen somewhere.
fn picture(width: usize, height: usize) -> RgbImage {
    let noise = hash_uniform("picture", width * height * 3);
    let pixels = noise.iter().enumerate().map(|(index, noise)| {
        let (row, column, channel) = (index / 3 / width, index / 3 % width, index % 3);
        let smooth = 128.0 + 100.0 * ((row + 2 * column) as f32 / 40.0 + channel as f32).sin();
        let amplitude = [0.0, 2.0, 90.0, 255.0][row * 4 / height];
        (smooth + amplitude * noise).clamp(0.0, 255.0) as u8
    });
    RgbImage::new(width, height, pixels.collect()).expect("the size fits")
}

/// A smooth picture, which a lossy format can keep.
fn smooth(width: usize, height: usize) -> RgbImage {
    let pixels = (0..width * height * 3).map(|index| {
        let (row, column, channel) = (index / 3 / width, index / 3 % width, index % 3);
        (128.0 + 100.0 * ((row + 2 * column) as f32 / 40.0 + channel as f32).sin()) as u8
    });
    RgbImage::new(width, height, pixels.collect()).expect("the size fits")
}

fn settings() -> Settings {
    Settings {
        prompt: "a sign that says \"你好\" 🍕,\nsecond line\0".into(),
        negative: "blurry".into(),
        seed: u64::MAX,
        steps: 8,
        cfg: 4.1,
        solver: None,
        shift: 3.0,
        width: 70,
        height: 50,
        model: "models/demo/pixel".into(),
        rng: "philox".into(),
        weights: Some(WeightSettings {
            trunk: "int8".into(),
            trunk_keep: vec!["layers.0.*".into()],
            text: "fp8".into(),
        }),
        start: Some(StartSettings {
            picture_sha256: "00ff".into(),
            strength: 0.6,
            mask_sha256: Some("ff00".into()),
        }),
    }
}

fn lossless_files_round_trip() -> Outcome {
    let dir = tempfile::tempdir()?;
    // One pixel, one row, one column, rows that are longer than a band, several bands with a short last one.
    for (width, height) in [(1, 1), (301, 1), (1, 77), (180_001, 3), (640, 577)] {
        let image = picture(width, height);
        for name in ["a.png", "a.webp", "A.PNG"] {
            if name == "a.webp" && width > 16384 {
                continue;
            }
            let path = dir.path().join(name);
            write_image(&path, &image, &WriteOptions::default())?;
            assert!(read_image(&path)? == image, "{width}x{height} {name}");
        }
    }
    Ok(())
}

fn jpeg_is_close() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("a.jpeg");
    let image = smooth(123, 77);
    let mut sizes = Vec::new();
    for jpeg_quality in [40, 92] {
        let options = WriteOptions {
            jpeg_quality,
            ..WriteOptions::default()
        };
        write_image(&path, &image, &options)?;
        sizes.push(std::fs::metadata(&path)?.len());
    }
    assert!(sizes[0] < sizes[1], "{sizes:?}");
    let found = read_image(&path)?;
    let square = |(a, b): (&u8, &u8)| (f64::from(*a) - f64::from(*b)).powi(2);
    let error = found.pixels().iter().zip(image.pixels()).map(square).sum::<f64>() / found.pixels().len() as f64;
    assert!(error < 4.0, "mean square error {error}");
    Ok(())
}

/// Both ways of deflating are taken, each where it is the better one: neither alone comes as low as the bounds. Another decoder finds
/// every pixel.
fn drawings_and_photographs_become_small() -> Outcome {
    let (width, height) = (700, 800);
    let at = |index: usize| (index / 3 / width, index / 3 % width, index % 3);
    let tiles = (0..width * height * 3).map(|index| {
        let (row, column, channel) = at(index);
        let inside = (row % 31) * (column % 23) % 7 < 3;
        [[200, 30, 40], [20, 90, 200], [250, 250, 240]][(row / 31 + column / 23 + usize::from(inside)) % 3][channel]
    });
    let noise = hash_uniform("grain", width * height * 3);
    let grain = (0..width * height * 3).map(|index| {
        let (row, column, channel) = at(index);
        let smooth = 128.0 + 90.0 * ((row + 2 * column) as f32 / 90.0 + channel as f32).sin();
        (smooth + 3.0 * noise[index]) as u8
    });
    let raw = width * height * 3;
    for (name, pixels, most) in [
        ("tiles", tiles.collect::<Vec<u8>>(), 0.05),
        ("grain", grain.collect(), 0.45),
    ] {
        let image = RgbImage::new(width, height, pixels.clone())?;
        let bytes = encode_image(&image, ImageFormat::Png, &WriteOptions::default())?;
        let decoded = image::load_from_memory(&bytes)?.into_rgb8();
        assert!(decoded.into_raw() == pixels, "{name}");
        let share = bytes.len() as f64 / raw as f64;
        assert!(share < most, "{name}: {share:.3} of its bytes");
    }
    Ok(())
}

fn png_bytes_do_not_depend_on_threads() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("a.png");
    let image = picture(500, 900);
    let mut files = Vec::new();
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        pool.install(|| write_image(&path, &image, &WriteOptions::default()))?;
        files.push(std::fs::read(&path)?);
    }
    assert!(files[0] == files[1]);
    Ok(())
}

fn write_with_settings(path: &Path) -> l2p_engine::Result<()> {
    let settings = settings();
    let options = WriteOptions {
        settings: Some(&settings),
        ..WriteOptions::default()
    };
    write_image(path, &picture(70, 50), &options)
}

fn settings_round_trip() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("a.png");
    write_with_settings(&path)?;
    assert_eq!(read_settings(&path)?, settings());
    assert!(read_image(&path)? == picture(70, 50));
    // What picture viewers show, read by an independent decoder.
    let decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&path)?));
    let reader = decoder.read_info()?;
    let words = reader.info().utf8_text.iter().find(|text| text.keyword == "parameters");
    let words = words.expect("the file has settings in words").get_text()?;
    let expected = "a sign that says \"你好\" 🍕,\nsecond line\u{fffd}\nNegative prompt: blurry\nSteps: 8, CFG scale: 4.1, \
                    Seed: 18446744073709551615, Size: 70x50, Model: pixel, Shift: 3, RNG: philox, Trunk: int8, Text encoder: fp8, \
                    Denoising strength: 0.6";
    assert_eq!(words, expected);

    // Written again by a program that keeps the text but compresses it.
    let mut info = png::Info::with_size(1, 1);
    let mut text = png::text_metadata::ITXtChunk::new("l2p", serde_json::to_string(&settings())?);
    text.compressed = true;
    text.compress_text()?;
    info.utf8_text.push(text);
    let mut writer = png::Encoder::with_info(std::fs::File::create(&path)?, info)?.write_header()?;
    writer.write_image_data(&[0])?;
    writer.finish()?;
    assert_eq!(read_settings(&path)?, settings());
    Ok(())
}

fn absent_settings_are_explained() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("a.png");
    let expect = |path: &Path, reason: &str| {
        let message = read_settings(path).unwrap_err().to_string();
        assert!(
            message.starts_with(&path.display().to_string()) && message.contains(reason),
            "{message}"
        );
    };
    expect(&path, "No such file");
    write_image(&path, &picture(9, 9), &WriteOptions::default())?;
    expect(&path, "carries no settings; only PNG files as l2p wrote them do");
    let jpeg = dir.path().join("a.jpg");
    write_image(&jpeg, &picture(9, 9), &WriteOptions::default())?;
    expect(&jpeg, "is not a PNG file");
    std::fs::write(&jpeg, "")?;
    expect(&jpeg, "is not a PNG file");

    write_with_settings(&path)?;
    let whole = std::fs::read(&path)?;
    for length in [20, 40, 60] {
        std::fs::write(&path, &whole[..length])?;
        expect(&path, "the file ends before the picture does");
    }
    let find = |text: &[u8]| whole.windows(text.len()).position(|window| window == text);
    let key = find(b"\"steps\"").expect("the settings are plain JSON");
    let mut damaged = whole.clone();
    damaged[key + 1] = b'S';
    std::fs::write(&path, &damaged)?;
    expect(&path, "is damaged: the checksum of its text is wrong");
    Ok(())
}

fn unwritable_files_are_named() -> Outcome {
    let dir = tempfile::tempdir()?;
    let expect = |name: &str, width: usize, reason: &str| {
        let path = dir.path().join(name);
        let message = ensure_writable(&path, width, 8).unwrap_err().to_string();
        assert!(
            message.starts_with(&path.display().to_string()) && message.contains(reason),
            "{message}"
        );
    };
    for name in ["a.gif", "a", "png"] {
        expect(name, 8, "pictures are written as .png, .jpg, .jpeg or .webp");
    }
    expect("missing/a.png", 8, "cannot write into");
    expect(
        "a.webp",
        16385,
        "WebP pictures are at most 16384 pixels wide and high, this one would be 16385x8",
    );
    expect("a.jpg", 65536, "JPEG pictures are at most 65535 pixels wide and high");
    std::fs::create_dir(dir.path().join("folder.png"))?;
    expect("folder.png", 8, "is a folder");
    std::fs::remove_dir(dir.path().join("folder.png"))?;
    ensure_writable(&dir.path().join("a.png"), 20_000, 8)?;
    assert_eq!(
        std::fs::read_dir(dir.path())?.count(),
        0,
        "a check leaves nothing behind"
    );
    let message = RgbImage::new(2, 2, vec![0; 11]).unwrap_err().to_string();
    assert_eq!(message, "11 bytes do not make a picture of 2x2 pixels");
    Ok(())
}

fn failure_leaves_the_old_file() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("a.jpg");
    std::fs::write(&path, "old")?;
    let options = WriteOptions {
        jpeg_quality: 0,
        ..WriteOptions::default()
    };
    let message = write_image(&path, &picture(8, 8), &options).unwrap_err().to_string();
    assert_eq!(message, "a JPEG quality of 0 is not in 1 to 100");
    assert_eq!(std::fs::read(&path)?, b"old");
    assert_eq!(std::fs::read_dir(dir.path())?.count(), 1);
    Ok(())
}

fn other_pixels_become_rgb() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("a.png");
    let read = |picture: DynamicImage| -> Result<Vec<u8>, libtest_mimic::Failed> {
        picture.save(&path)?;
        Ok(read_image(&path)?.into_pixels())
    };
    let alpha = image::RgbaImage::from_raw(3, 1, vec![10, 20, 30, 255, 10, 20, 30, 0, 0, 100, 255, 51]);
    let alpha = alpha.expect("three pixels");
    assert_eq!(read(alpha.into())?, [10, 20, 30, 255, 255, 255, 204, 224, 255]);
    let grey = image::GrayImage::from_raw(2, 1, vec![7, 200]).expect("two pixels");
    assert_eq!(read(grey.into())?, [7, 7, 7, 200, 200, 200]);
    let deep = image::ImageBuffer::<image::Rgb<u16>, _>::from_raw(1, 1, vec![0, 257 * 100, 65535]).expect("a pixel");
    assert_eq!(read(deep.into())?, [0, 100, 255]);
    Ok(())
}

fn turned_pictures_are_set_upright() -> Outcome {
    let dir = tempfile::tempdir()?;
    // The name lies; the content counts.
    let path = dir.path().join("a.png");
    // One entry in the one directory of a little-endian TIFF: orientation 6, to be turned by 90° clockwise.
    let exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
    let pixels: Vec<u8> = (0..16 * 8)
        .flat_map(|index| if index < 64 { [0; 3] } else { [255; 3] })
        .collect();
    let mut encoder = JpegEncoder::new_with_quality(std::fs::File::create(&path)?, 95);
    encoder.set_exif_metadata(exif.to_vec())?;
    encoder.write_image(&pixels, 16, 8, image::ExtendedColorType::Rgb8)?;
    let found = read_image(&path)?;
    assert_eq!((found.width(), found.height()), (8, 16));
    // The dark upper half is now the right half.
    assert!(found.pixels()[0] > 200 && found.pixels()[7 * 3] < 50);
    Ok(())
}

fn bad_files_are_named() -> Outcome {
    let dir = tempfile::tempdir()?;
    let expect = |path: &Path, reason: &str| {
        let message = read_image(path).unwrap_err().to_string();
        assert!(
            message.starts_with(&path.display().to_string()) && message.contains(reason),
            "{message}"
        );
    };
    for name in ["a.png", "a.jpg", "a.webp"] {
        let path = dir.path().join(name);
        expect(&path, "No such file");
        write_image(&path, &picture(64, 64), &WriteOptions::default())?;
        let whole = std::fs::read(&path)?;
        for length in [whole.len() / 2, whole.len() - 24, 30] {
            std::fs::write(&path, &whole[..length])?;
            expect(
                &path,
                if name == "a.jpg" {
                    "the file ends before"
                } else {
                    "cannot be decoded"
                },
            );
        }
        std::fs::write(&path, "GIF89a and more")?;
        expect(&path, "is not a PNG, JPEG or WebP picture");
        std::fs::write(&path, "")?;
        expect(&path, "is not a PNG, JPEG or WebP picture");
    }
    Ok(())
}

/// The weight of a source pixel at `distance` from the target's centre, in units of the filter's own pixels.
fn weight(filter: Filter, distance: f64) -> f64 {
    let x = distance.abs();
    let sinc = |x: f64| {
        if x == 0.0 {
            1.0
        } else {
            (std::f64::consts::PI * x).sin() / (std::f64::consts::PI * x)
        }
    };
    match filter {
        Filter::Bicubic if x < 1.0 => 1.5 * x.powi(3) - 2.5 * x.powi(2) + 1.0,
        Filter::Bicubic if x < 2.0 => -0.5 * x.powi(3) + 2.5 * x.powi(2) - 4.0 * x + 2.0,
        Filter::Lanczos if x < 3.0 => sinc(x) * sinc(x / 3.0),
        _ => 0.0,
    }
}

/// The weights of all source pixels for each target pixel along one axis.
fn axis_weights(filter: Filter, source: usize, target: usize) -> Vec<Vec<f64>> {
    let scale = source as f64 / target as f64;
    let widened = scale.max(1.0);
    (0..target)
        .map(|index| {
            let centre = (index as f64 + 0.5) * scale;
            let raw: Vec<f64> = (0..source)
                .map(|i| weight(filter, (i as f64 + 0.5 - centre) / widened))
                .collect();
            let sum: f64 = raw.iter().sum();
            raw.into_iter().map(|weight| weight / sum).collect()
        })
        .collect()
}

fn resize_equals_plain_loops() -> Outcome {
    // Half the contrast, so that nothing is clamped between the two passes, whichever comes first.
    let pixels = picture(23, 17).pixels().iter().map(|value| 64 + value / 2).collect();
    let image = RgbImage::new(23, 17, pixels)?;
    for filter in [Filter::Bicubic, Filter::Lanczos] {
        for (width, height) in [(10, 5), (23, 9), (40, 33)] {
            let found = resize(&image, width, height, filter)?;
            let columns = axis_weights(filter, 23, width);
            let rows = axis_weights(filter, 17, height);
            for (index, found) in found.pixels().iter().enumerate() {
                let (row, column, channel) = (index / 3 / width, index / 3 % width, index % 3);
                // Between the two passes the rows are rounded to bytes.
                let along = |y: usize| {
                    let sum: f64 = (0..23)
                        .map(|x| columns[column][x] * f64::from(image.pixels()[(y * 23 + x) * 3 + channel]))
                        .sum();
                    sum.round().clamp(0.0, 255.0)
                };
                let expected: f64 = (0..17).map(|y| rows[row][y] * along(y)).sum::<f64>().clamp(0.0, 255.0);
                assert!(
                    (f64::from(*found) - expected).abs() < 2.0,
                    "{filter:?} {width}x{height}: {found} {expected}"
                );
            }
        }
    }
    let message = resize(&image, 0, 5, Filter::Bicubic).unwrap_err().to_string();
    assert_eq!(
        message,
        "cannot resize 23x17 pixels to 0x5: an extent is 0 or too large"
    );
    Ok(())
}

fn sizes_fit_and_centre() -> Outcome {
    assert_eq!(fitted_size(1024, 1024, 1 << 20, 16)?, (1024, 1024));
    assert_eq!(fitted_size(4000, 3000, 1 << 20, 16)?, (1168, 880));
    // A small picture is not enlarged.
    assert_eq!(fitted_size(100, 70, 1 << 20, 16)?, (96, 64));
    let message = fitted_size(15, 200, 1 << 20, 16).unwrap_err().to_string();
    assert!(
        message.starts_with("a picture of 15x200 pixels is too small"),
        "{message}"
    );

    let image = picture(7, 5);
    let cropped = centre_crop(&image, 4, 2)?;
    let expected: Vec<u8> = [1, 2]
        .iter()
        .flat_map(|row| &image.pixels()[(row * 7 + 1) * 3..(row * 7 + 5) * 3])
        .copied()
        .collect();
    assert_eq!(cropped.pixels(), expected);
    let message = centre_crop(&image, 8, 2).unwrap_err().to_string();
    assert_eq!(message, "cannot cut 8x2 pixels out of 7x5");

    let fitted = fit_to_multiple(&picture(200, 90), 32 * 32, 16, Filter::Lanczos)?;
    assert_eq!((fitted.width(), fitted.height()), (32, 16));
    Ok(())
}
