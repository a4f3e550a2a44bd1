//! Pictures whose files are small and that are not: made here, never kept in the repository.

use std::io::Write;
use std::path::Path;

use flate2::write::ZlibEncoder;
use flate2::{Compression, Crc};
use image::DynamicImage;
use l2p_engine::image_io::{
    Colours, Filter, RgbImage, WriteOptions, cover, read_cover, read_header, read_image, write_image,
};
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;

pub fn register(suite: &mut Suite) {
    suite.cpu("image_io::hostile::sizes_are_refused_by_the_header", sizes);
    suite.cpu("image_io::hostile::headers_that_lie", lies);
    suite.cpu("image_io::hostile::long_pictures_are_cut_first", long);
    suite.cpu("image_io::hostile::pipes_and_devices", devices);
    suite.cpu("image_io::hostile::decoded_like_the_image_crate", like_the_image_crate);
    suite.cpu("image_io::hostile::damaged_jpeg_data_is_no_grey", damaged_jpeg);
    suite.cpu("image_io::hostile::colour_profiles", profiles);
    suite.cpu("image_io::hostile::mutated_files_end_in_an_answer", mutated);
}

/// A PNG file of these extents whose rows, filter bytes included, `rows` writes.
pub fn write_png(
    path: &Path,
    [width, height]: [u32; 2],
    [depth, colours]: [u8; 2],
    rows: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    file.write_all(b"\x89PNG\r\n\x1a\n")?;
    let mut chunk = |kind: &[u8; 4], data: &[u8]| {
        let mut crc = Crc::new();
        crc.update(kind);
        crc.update(data);
        file.write_all(&(data.len() as u32).to_be_bytes())?;
        file.write_all(kind)?;
        file.write_all(data)?;
        file.write_all(&crc.sum().to_be_bytes())
    };
    let mut deflated = ZlibEncoder::new(Vec::new(), Compression::best());
    rows(&mut deflated)?;
    let header = [
        &width.to_be_bytes()[..],
        &height.to_be_bytes(),
        &[depth, colours, 0, 0, 0],
    ]
    .concat();
    chunk(b"IHDR", &header)?;
    chunk(b"IDAT", &deflated.finish()?)?;
    chunk(b"IEND", &[])
}

/// One bit a pixel, all black: 60000 rows of 7500 bytes in some hundred kilobytes.
pub fn write_huge_png(path: &Path) -> std::io::Result<()> {
    write_png(path, [60_000; 2], [1, 0], |rows| {
        let row = vec![0; 1 + 60_000 / 8];
        (0..60_000).try_for_each(|_| rows.write_all(&row))
    })
}

/// A million pixels wide and one high, in three kilobytes.
pub fn write_long_png(path: &Path) -> std::io::Result<()> {
    write_png(path, [1_000_000, 1], [8, 2], |row| {
        row.write_all(&vec![0; 1 + 3_000_000])
    })
}

/// As wide as WebP pictures can be, and one pixel high.
pub fn write_long_webp(path: &Path) -> l2p_engine::Result<()> {
    let image = RgbImage::new(16_383, 1, vec![90; 3 * 16_383])?;
    write_image(path, &image, &WriteOptions::default())
}

/// A JPEG file of 16x16 pixels whose header says something else.
pub fn write_lying_jpeg(path: &Path, width: u16, height: u16) -> Outcome {
    let image = RgbImage::new(16, 16, vec![90; 3 * 256])?;
    write_image(path, &image, &WriteOptions::default())?;
    let mut bytes = std::fs::read(path)?;
    let frame = bytes.windows(2).position(|marker| marker == [0xff, 0xc0]);
    let frame = frame.ok_or("no header in a JPEG file")?;
    bytes[frame + 5..frame + 7].copy_from_slice(&height.to_be_bytes());
    bytes[frame + 7..frame + 9].copy_from_slice(&width.to_be_bytes());
    Ok(std::fs::write(path, bytes)?)
}

/// The same word from the header and from the whole, naming the file.
fn expect_refused(path: &Path, word: &str) -> Outcome {
    for message in [
        read_header(path).map(|_| ()).unwrap_err().to_string(),
        read_image(path).map(|_| ()).unwrap_err().to_string(),
    ] {
        let named = message.starts_with(&path.display().to_string());
        if !named || !message.contains(word) {
            return Err(format!("expected …{word}…, found {message}").into());
        }
    }
    Ok(())
}

fn sizes() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.png");
    write_huge_png(&path)?;
    expect_refused(
        &path,
        "has 60000x60000 pixels, more than the 268435456 that a picture may have",
    )?;
    // Few enough pixels, but of eight bytes each, and held as a whole for being interlaced.
    write_png(&path, [16_000; 2], [16, 6], |_| Ok(()))?;
    assert_eq!(read_header(&path)?.width, 16_000);
    let mut bytes = std::fs::read(&path)?;
    bytes[28] = 1;
    let mut crc = Crc::new();
    crc.update(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&crc.sum().to_be_bytes());
    std::fs::write(&path, bytes)?;
    expect_refused(&path, "has 16000x16000 pixels, which take ")?;
    write_png(&path, [u32::MAX >> 1, u32::MAX >> 1], [8, 2], |_| Ok(()))?;
    expect_refused(&path, "pixels, more than")?;
    write_lying_jpeg(&folder.path().join("a.jpg"), 65_500, 65_500)?;
    expect_refused(&folder.path().join("a.jpg"), "has 65500x65500 pixels, more than")?;
    // A canvas, and a picture that says another size than it.
    let path = folder.path().join("a.webp");
    let image = RgbImage::new(16, 16, vec![90; 3 * 256])?;
    write_image(&path, &image, &WriteOptions::default())?;
    let plain = std::fs::read(&path)?;
    let canvas = |side: u32| {
        let side = (side - 1).to_le_bytes();
        let extended = [b"VP8X\x0a\0\0\0\0\0\0\0", &side[..3], &side[..3]].concat();
        let length = ((plain.len() - 8 + extended.len()) as u32).to_le_bytes();
        [b"RIFF", &length[..], b"WEBP", &extended, &plain[12..]].concat()
    };
    std::fs::write(&path, canvas(16))?;
    assert!(read_image(&path)? == image);
    std::fs::write(&path, canvas(20_000))?;
    expect_refused(&path, "has 20000x20000 pixels, more than")?;
    std::fs::write(&path, canvas(17))?;
    expect_refused(&path, "its header says 17x17 pixels, its picture 16x16")
}

/// What the header promises is not there.
fn lies() -> Outcome {
    let folder = tempfile::tempdir()?;
    let refused = |path: &Path, word: &str| {
        let message = read_image(path).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains(word), "{message}");
    };
    let path = folder.path().join("a.jpg");
    write_lying_jpeg(&path, 10_000, 10_000)?;
    refused(&path, "the file ends before the picture does");
    let path = folder.path().join("a.png");
    write_png(&path, [10_000; 2], [8, 2], |rows| rows.write_all(&[0; 30_001]))?;
    refused(&path, "cannot be decoded");
    // A profile that inflates to more than any is long.
    let bomb = {
        let mut deflated = ZlibEncoder::new(Vec::new(), Compression::fast());
        (0..100).try_for_each(|_| deflated.write_all(&[0; 1 << 20]))?;
        deflated.finish()?
    };
    write_png(&path, [1; 2], [8, 2], |rows| rows.write_all(&[0; 4]))?;
    let plain = std::fs::read(&path)?;
    let data = [b"x\0\0", &bomb[..]].concat();
    let mut crc = Crc::new();
    crc.update(b"iCCP");
    crc.update(&data);
    let chunk = [
        &(data.len() as u32).to_be_bytes()[..],
        b"iCCP",
        &data,
        &crc.sum().to_be_bytes(),
    ]
    .concat();
    std::fs::write(&path, [&plain[..33], &chunk, &plain[33..]].concat())?;
    // Refused or read without it, but not inflated.
    let _ = read_image(&path);
    Ok(())
}

fn long() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.png");
    write_long_png(&path)?;
    assert!(std::fs::metadata(&path)?.len() < 4000);
    let header = read_header(&path)?;
    assert_eq!((header.width, header.height), (1_000_000, 1));
    let square = read_cover(&path, 1024, 1024, Filter::default())?;
    assert!(square.pixels().iter().all(|value| *value == 0));
    write_long_webp(&folder.path().join("a.webp"))?;
    let square = read_cover(&folder.path().join("a.webp"), 512, 1024, Filter::Lanczos)?;
    assert!((square.width(), square.height()) == (512, 1024) && square.pixels().iter().all(|value| *value == 90));
    // What is cut is what the whole picture would have been cut to; turned ones included.
    let image = super::picture(400, 30);
    for orientation in 1..=8u8 {
        let path = folder.path().join("turned.png");
        let exif = [
            b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0",
            &[orientation, 0, 0, 0, 0, 0, 0, 0][..],
        ]
        .concat();
        let mut info = png::Info::with_size(400, 30);
        (info.color_type, info.bit_depth) = (png::ColorType::Rgb, png::BitDepth::Eight);
        info.exif_metadata = Some(exif.into());
        let mut writer = png::Encoder::with_info(std::fs::File::create(&path)?, info)?.write_header()?;
        writer.write_image_data(image.pixels())?;
        writer.finish()?;
        let upright = read_image(&path)?;
        let header = read_header(&path)?;
        assert_eq!((header.width, header.height), (upright.width(), upright.height()));
        assert_eq!(upright.width() < upright.height(), orientation > 4, "{orientation}");
        for (width, height) in [(16, 16), (64, 16), (16, 64), (200, 30)] {
            let found = read_cover(&path, width, height, Filter::default())?;
            let expected = cover(&upright, width, height, Filter::default())?;
            let pairs = found.pixels().iter().zip(expected.pixels());
            let furthest = pairs.map(|(a, b)| a.abs_diff(*b)).max();
            assert!(furthest <= Some(1), "{orientation}, {width}x{height}: {furthest:?}");
        }
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn devices() -> Outcome {
    let folder = tempfile::tempdir()?;
    let pipe = folder.path().join("a.png");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status()?;
    assert!(made.success());
    for path in [&pipe, Path::new("/dev/zero")] {
        expect_refused(path, "is a pipe or device")?;
    }
    expect_refused(folder.path(), "is a folder")
}

#[cfg(not(target_os = "linux"))]
fn devices() -> Outcome {
    Ok(())
}

/// A picture of every kind of pixel, some of them deeper than eight bits and some with opacity.
fn kinds() -> Result<Vec<DynamicImage>, Failed> {
    let bytes = |count: usize| -> Vec<u8> { (0..count).map(|index| (index * 97 % 251) as u8).collect() };
    let words = |count: usize| -> Vec<u16> { (0..count).map(|index| (index * 12_347 % 65_536) as u16).collect() };
    let (width, height) = (31, 17);
    let pixels = (width * height) as usize;
    let missing = || Failed::from("too few pixels");
    Ok(vec![
        image::GrayImage::from_raw(width, height, bytes(pixels))
            .ok_or_else(missing)?
            .into(),
        DynamicImage::ImageLumaA8(
            image::GrayAlphaImage::from_raw(width, height, bytes(2 * pixels)).ok_or_else(missing)?,
        ),
        image::RgbImage::from_raw(width, height, bytes(3 * pixels))
            .ok_or_else(missing)?
            .into(),
        image::RgbaImage::from_raw(width, height, bytes(4 * pixels))
            .ok_or_else(missing)?
            .into(),
        DynamicImage::ImageLuma16(image::ImageBuffer::from_raw(width, height, words(pixels)).ok_or_else(missing)?),
        DynamicImage::ImageLumaA16(image::ImageBuffer::from_raw(width, height, words(2 * pixels)).ok_or_else(missing)?),
        DynamicImage::ImageRgb16(image::ImageBuffer::from_raw(width, height, words(3 * pixels)).ok_or_else(missing)?),
        DynamicImage::ImageRgba16(image::ImageBuffer::from_raw(width, height, words(4 * pixels)).ok_or_else(missing)?),
    ])
}

/// Row by row comes to what the `image` crate makes of the whole.
fn like_the_image_crate() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.png");
    for picture in kinds()? {
        picture.save(&path)?;
        let found = read_image(&path)?;
        let expected: Vec<u8> = match picture.color().has_alpha() {
            false => picture.to_rgb8().into_raw(),
            true => picture
                .to_rgba8()
                .pixels()
                .flat_map(|pixel| {
                    let [r, g, b, alpha] = pixel.0.map(u32::from);
                    [r, g, b].map(|channel| ((channel * alpha + 255 * (255 - alpha) + 127) / 255) as u8)
                })
                .collect(),
        };
        assert!(found.pixels() == expected, "{:?}", picture.color());
        // Cut to its middle, of which the filter sees no more than it would of all.
        let part = read_cover(&path, 31, 4, Filter::default())?;
        assert!(
            part == cover(&found, 31, 4, Filter::default())?,
            "{:?}",
            picture.color()
        );
    }
    // Interlaced, in palettes and in fewer bits than eight: as the same crate's reader of PNG has them.
    for (depth, colours) in [(1, 0), (2, 0), (4, 0), (8, 3), (2, 3)] {
        let row = |width: usize| 1 + (width * depth as usize).div_ceil(8);
        let mut rows: Vec<u8> = (0..row(37) * 9)
            .map(|index| (index * 89 % 253) as u8 & if colours == 3 { 3 } else { 255 })
            .collect();
        rows.chunks_mut(row(37)).for_each(|row| row[0] = 0);
        write_png(&path, [37, 9], [depth, colours], |file| file.write_all(&rows))?;
        if colours == 3 {
            let mut bytes = std::fs::read(&path)?;
            let data: Vec<u8> = (0..12).map(|index| index * 20).collect();
            let mut crc = Crc::new();
            crc.update(b"PLTE");
            crc.update(&data);
            let chunk = [&12u32.to_be_bytes()[..], b"PLTE", &data, &crc.sum().to_be_bytes()].concat();
            bytes.splice(33..33, chunk);
            std::fs::write(&path, bytes)?;
        }
        let expected = image::open(&path);
        match expected {
            Ok(expected) => assert!(
                read_image(&path)?.pixels() == expected.to_rgb8().into_raw(),
                "{depth} {colours}"
            ),
            Err(error) => assert!(read_image(&path).is_err(), "{depth} {colours}: {error}"),
        }
    }
    Ok(())
}

/// A marker in the midst of the data, where none may be: the rest was filled with grey, without a word.
fn damaged_jpeg() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.jpg");
    write_image(&path, &super::smooth(160, 160), &WriteOptions::default())?;
    let whole = std::fs::read(&path)?;
    let scan = whole.windows(2).position(|marker| marker == [0xff, 0xda]);
    let middle = (scan.ok_or("no scan")? + whole.len()) / 2;
    std::fs::write(&path, [&whole[..middle], &[0xff, 0xd8], &whole[middle..]].concat())?;
    let message = read_image(&path).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("cannot be decoded"), "{message}");
    Ok(())
}

/// Words that follow from a seed (SplitMix64).
struct Words(u64);

impl Words {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound.max(1) as u64) as usize
    }
}

/// A few bytes changed, cut out or put in.
fn mutate(bytes: &mut Vec<u8>, words: &mut Words) {
    for _ in 0..1 + words.below(4) {
        // Headers are where sizes stand.
        let within = if words.below(2) == 0 {
            bytes.len().min(200)
        } else {
            bytes.len()
        };
        let at = words.below(within);
        match words.below(6) {
            0 => bytes[at] ^= 1 << words.below(8),
            1 => bytes[at] = words.below(256) as u8,
            2 => bytes[at] = 0xff,
            3 => bytes.truncate(at.max(1)),
            4 => {
                let end = bytes.len().min(at + 1 + words.below(40));
                bytes.drain(at..end);
            }
            _ => {
                let part = bytes[at..bytes.len().min(at + 1 + words.below(40))].to_vec();
                bytes.splice(at..at, part);
            }
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
}

/// Makes the checksums of a PNG file right, so that what they guard is read.
fn mend_checksums(bytes: &mut [u8]) {
    let mut at = 8;
    while let Some(length) = bytes.get(at..at + 4) {
        let length = u32::from_be_bytes([length[0], length[1], length[2], length[3]]) as usize;
        let Some(body) = bytes.get(at + 4..at.saturating_add(length).saturating_add(8)) else {
            return;
        };
        let mut crc = Crc::new();
        crc.update(body);
        let crc = crc.sum().to_be_bytes();
        let end = at + 8 + length;
        match bytes.get_mut(end..end + 4) {
            None => return,
            Some(place) => place.copy_from_slice(&crc),
        }
        at = end + 4;
    }
}

/// Thousands of damaged files: a picture or an error, soon, and no decoder panics.
fn mutated() -> Outcome {
    const CASES: usize = 4000;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a");
    let mut seeds: Vec<Vec<u8>> = Vec::new();
    for name in ["a.png", "a.jpg", "a.webp"] {
        write_image(
            &folder.path().join(name),
            &super::picture(40, 30),
            &WriteOptions::default(),
        )?;
        seeds.push(std::fs::read(folder.path().join(name))?);
    }
    let mut info = png::Info::with_size(40, 30);
    (info.color_type, info.bit_depth) = (png::ColorType::Rgb, png::BitDepth::Eight);
    info.icc_profile = Some(moxcms::ColorProfile::new_display_p3().encode()?.into());
    let mut writer = png::Encoder::with_info(std::fs::File::create(&path)?, info)?.write_header()?;
    writer.write_image_data(super::picture(40, 30).pixels())?;
    writer.finish()?;
    seeds.push(std::fs::read(&path)?);
    let mut words = Words(9);
    let mut read = 0;
    for case in 0..CASES {
        let mut bytes = seeds[case % seeds.len()].clone();
        mutate(&mut bytes, &mut words);
        if bytes.starts_with(b"\x89PNG") && words.below(8) > 0 {
            mend_checksums(&mut bytes);
        }
        std::fs::write(&path, &bytes)?;
        let started = std::time::Instant::now();
        let header = read_header(&path);
        let outcome = read_cover(&path, 24, 24, Filter::default());
        assert!(
            started.elapsed().as_secs() < 5,
            "case {case} took {:?}",
            started.elapsed()
        );
        match outcome {
            Ok(_) => assert!(header.is_ok(), "case {case} has a picture and no header"),
            Err(error) => {
                let message = error.to_string();
                assert!(
                    !message.contains("makes the decoder fail"),
                    "case {case} panics: {message}"
                );
            }
        }
        read += usize::from(header.is_ok());
    }
    // Most are damaged behind their headers, so that decoders have been at work.
    assert!(read > CASES / 4, "{read}");
    Ok(())
}

/// A PNG file in Display P3 becomes sRGB, and one with a profile that cannot be used is told apart.
fn profiles() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.png");
    let write = |icc: Option<Vec<u8>>| -> Outcome {
        let mut info = png::Info::with_size(2, 1);
        (info.color_type, info.bit_depth) = (png::ColorType::Rgba, png::BitDepth::Eight);
        info.icc_profile = icc.map(Into::into);
        let mut writer = png::Encoder::with_info(std::fs::File::create(&path)?, info)?.write_header()?;
        writer.write_image_data(&[204, 51, 51, 255, 204, 51, 51, 0])?;
        Ok(writer.finish()?)
    };
    write(Some(moxcms::ColorProfile::new_display_p3().encode()?))?;
    assert_eq!(read_header(&path)?.colours, Colours::Profile);
    let found = read_image(&path)?;
    // Computed in f64 from both spaces' primaries; what cannot be seen is white.
    let expected = [222u8, 24, 41, 255, 255, 255];
    let furthest = found.pixels().iter().zip(expected).map(|(a, b)| a.abs_diff(b)).max();
    assert!(furthest <= Some(1), "{:?}", found.pixels());
    for (icc, colours) in [
        (None, Colours::Srgb),
        (Some(moxcms::ColorProfile::new_srgb().encode()?), Colours::Srgb),
        (Some(b"no profile at all".to_vec()), Colours::Unknown),
        (
            Some(moxcms::ColorProfile::new_lab().encode().unwrap_or_default()),
            Colours::Unknown,
        ),
    ] {
        write(icc)?;
        assert_eq!(read_header(&path)?.colours, colours);
        assert_eq!(read_image(&path)?.pixels(), [204, 51, 51, 255, 255, 255]);
    }
    Ok(())
}
