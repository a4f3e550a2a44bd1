//! metadata.jsonl, metadata.json, metadata.csv.

use std::path::Path;

use l2p_engine::data::{DataSet, Metadata, Sizing};
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;

use super::write_grey;

pub fn register(suite: &mut Suite) {
    suite.cpu("data::metadata::three_formats_say_the_same", formats);
    suite.cpu("data::metadata::what_cannot_be_used_is_named", faults);
    suite.cpu("data::metadata::every_format_of_pictures_and_size", pictures);
    suite.cpu("data::metadata::rows_of_csv_that_cannot_be_meant", csv_rows);
    suite.cpu("data::metadata::encodings_are_named_alike", encodings);
    suite.cpu("data::metadata::json_of_any_kind", json_of_any_kind);
    suite.cpu("data::metadata::pipes_and_devices", devices);
    suite.cpu("data::metadata::what_is_worth_a_word", notes);
}

fn formats() -> Outcome {
    let folder = tempfile::tempdir()?;
    let files = [
        (
            "metadata.jsonl",
            "{\"image\":\"a.png\",\"prompt\":\"a, \\\"b\\\"\",\"seed\":7}\n\n{\"file_name\":\"b.png\",\"text\":\"\",\"seed\":null}\n",
        ),
        (
            "metadata.json",
            "[{\"file_name\":\"a.png\",\"text\":\"a, \\\"b\\\"\",\"seed\":\"7\"}, {\"image\":\"b.png\",\"prompt\":\"\"}]",
        ),
        (
            "metadata.csv",
            "\u{feff}seed,prompt,other,image\n7.0,\"a, \"\"b\"\"\",x,a.png\n,,,b.png\n",
        ),
    ];
    for (name, text) in files {
        let path = folder.path().join(name);
        std::fs::write(&path, text)?;
        // The folder, while it holds one of them, or the file.
        for path in [folder.path(), &path] {
            let metadata = Metadata::read(path)?;
            assert!(metadata.damaged.is_empty(), "{name}: {:?}", metadata.damaged);
            let found: Vec<_> = metadata
                .records
                .iter()
                .map(|record| (record.name.as_str(), record.caption.as_str(), record.seed))
                .collect();
            assert_eq!(found, [("a.png", "a, \"b\"", Some(7)), ("b.png", "", None)], "{name}");
            assert_eq!(metadata.records[0].path, folder.path().join("a.png"));
        }
        if name != "metadata.csv" {
            std::fs::remove_file(path)?;
        }
    }
    std::fs::write(folder.path().join("metadata.json"), "[]")?;
    let both = Metadata::read(folder.path()).unwrap_err().to_string();
    assert!(both.contains("holds both metadata.json and metadata.csv"), "{both}");
    Ok(())
}

fn faults() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("metadata.jsonl");
    let lines = [
        "{\"image\":\"a.png\",\"prompt\":\"a\",\"seed\":-1}",
        "{\"image\":\"a.png\"}",
        "{\"prompt\":\"a\"}",
        "{\"image\":\"a.png\",\"prompt\":5}",
        "{\"image\":\"a.png\",\"prompt\":\"a\",\"seed\":1.5}",
        "no JSON",
    ];
    std::fs::write(&path, lines.join("\n"))?;
    let metadata = Metadata::read(&path)?;
    assert_eq!((metadata.records.len(), metadata.entries()), (1, 6));
    assert_eq!(metadata.records[0].seed, Some(u64::MAX));
    for (damage, (line, reason)) in metadata.damaged.iter().zip([
        (2, "has no prompt or text"),
        (3, "has no image or file_name"),
        (4, "says prompt or text = 5"),
        (5, "says seed = 1.5"),
        (6, "is not JSON"),
    ]) {
        assert!(
            damage.what.ends_with(&format!("metadata.jsonl, line {line}")),
            "{damage}"
        );
        assert!(damage.reason.starts_with(reason), "{damage}");
    }
    let message = |name: &str, text: &str| -> std::io::Result<String> {
        let path = folder.path().join(name);
        std::fs::write(&path, text)?;
        Ok(Metadata::read(&path).unwrap_err().to_string())
    };
    let column = message("m.csv", "file,prompt\na.png,a\n")?;
    assert!(
        column.contains("has no column `image` or `file_name`; its columns are file, prompt"),
        "{column}"
    );
    assert!(message("m.json", "{}")?.contains("is not a list of JSON objects"));
    assert!(message("m.jsonl", "\n")?.contains("lists no pictures"));
    assert!(message("m.txt", "a")?.contains(".jsonl, .json or .csv"));
    let nowhere = Metadata::read(Path::new("/nowhere")).unwrap_err().to_string();
    assert!(nowhere.contains("/nowhere"), "{nowhere}");
    Ok(())
}

fn pictures() -> Outcome {
    let folder = tempfile::tempdir()?;
    let mut lines = String::new();
    for (name, width, height) in [
        ("a.png", 100, 60),
        ("b.jpg", 60, 100),
        ("c.webp", 64, 64),
        ("d.png", 10, 10),
    ] {
        write_grey(&folder.path().join(name), width, height, 90)?;
        lines += &format!("{{\"image\":\"{name}\",\"prompt\":\"x\"}}\n");
    }
    std::fs::write(folder.path().join("metadata.jsonl"), lines)?;
    let open = |sizing: Sizing| DataSet::open(folder.path(), &sizing, 16, 0.5, &mut |_, _| Ok(()));
    let sizes = |sizing: Sizing| -> l2p_engine::Result<Vec<String>> {
        Ok(open(sizing)?.sizes().iter().map(ToString::to_string).collect())
    };
    // Multiples of 16, never enlarged; the last one is smaller than a patch.
    assert_eq!(sizes(Sizing::MaxPixels(100 * 60))?, ["96x48", "48x96", "64x64"]);
    assert_eq!(sizes(Sizing::MaxPixels(2500))?, ["64x32", "32x64", "48x48"]);
    assert_eq!(open(Sizing::MaxPixels(2500))?.damages().count(), 1);
    assert_eq!(sizes(Sizing::Fixed("32x16".parse()?))?, ["32x16"; 4]);
    let buckets = Sizing::Buckets(vec!["64x32".parse()?, "48x48".parse()?, "32x64".parse()?]);
    assert_eq!(sizes(buckets)?, ["64x32", "32x64", "48x48", "48x48"]);
    Ok(())
}

/// Name, caption and seed.
type Said = (String, String, Option<u64>);

/// What a file of metadata says: its records, and the lines and reasons of what is damaged.
fn said(path: &Path, text: impl AsRef<[u8]>) -> Result<(Vec<Said>, Vec<String>), Failed> {
    std::fs::write(path, text)?;
    let metadata = Metadata::read(path)?;
    let records = metadata.records.into_iter();
    let records = records
        .map(|record| (record.name, record.caption, record.seed))
        .collect();
    let damaged = metadata.damaged.iter();
    let prefix = format!("{}, ", path.display());
    let damaged = damaged.map(|damage| damage.to_string().replace(&prefix, "")).collect();
    Ok((records, damaged))
}

fn record(name: &str, caption: &str, seed: u64) -> Said {
    (name.into(), caption.into(), Some(seed))
}

fn csv_rows() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("metadata.csv");
    // Commas that nobody quoted.
    let (records, damaged) = said(
        &path,
        "image,prompt,seed\na.png,a fox, red,1\nb.png,a house,2\nc.png,a frog\n",
    )?;
    assert_eq!(records, [record("b.png", "a house", 2)]);
    assert_eq!(
        damaged,
        [
            "line 2: has 4 fields, the header 3: a text with a comma in it must stand in double quotes",
            "line 4: has 2 fields, the header 3: a text with a comma in it must stand in double quotes",
        ]
    );
    // A quote that closes in another row, and all rows between them.
    let rows = |count: usize, last: &str| -> String {
        let plain = (0..count).map(|index| format!("{index}.png,picture {index},{index}\n"));
        format!(
            "image,prompt,seed\na.png,\"a fox,7\n{}{last}",
            plain.collect::<String>()
        )
    };
    for (count, last) in [
        (79, "z.png,\"a, b\",80\n"),
        (79, "z.png,picture,80\n"),
        (1, "z.png,he says \"hi\",80\n"),
        (1, "z.png,\"\",80\n"),
        (0, "z.png,picture,80\n"),
        (3000, ""),
    ] {
        for text in [rows(count, last), rows(count, last).replace('\n', "\r\n")] {
            let (records, damaged) = said(&path, &text)?;
            let last = usize::from(!last.is_empty());
            assert_eq!((records.len(), damaged.len()), (count + last, 1), "{damaged:?}");
            assert!(damaged[0].starts_with("line 2: "), "{damaged:?}");
            for (index, found) in records[..count].iter().enumerate() {
                assert_eq!(
                    *found,
                    record(&format!("{index}.png"), &format!("picture {index}"), index as u64)
                );
            }
        }
    }
    // A quote that closes at a field's end, over whole rows.
    let (records, damaged) = said(
        &path,
        "image,prompt,seed\na.png,\"a fox\nb.png,a house,2\nc.png,a frog\",3\nd.png,x,4\n",
    )?;
    assert_eq!(
        records,
        [
            record("b.png", "a house", 2),
            record("c.png", "a frog\"", 3),
            record("d.png", "x", 4)
        ]
    );
    assert_eq!(damaged.len(), 1, "{damaged:?}");
    assert!(
        damaged[0].starts_with("line 2: opens a quote that closes 2 lines later"),
        "{damaged:?}"
    );
    // A caption of several lines is none of these, nor one with a quote in its middle.
    let sound = "image,prompt,seed\na.png,\"one\ntwo, three\n\nfour\",1\nb.png,a \"small\" fox,2\n";
    let (records, damaged) = said(&path, sound)?;
    assert_eq!(
        records,
        [
            record("a.png", "one\ntwo, three\n\nfour", 1),
            record("b.png", "a \"small\" fox", 2)
        ]
    );
    assert!(damaged.is_empty(), "{damaged:?}");
    // A line behind such a caption has the number that an editor shows.
    let (_, damaged) = said(&path, format!("{sound}c.png\n").replace('\n', "\r\n"))?;
    assert!(
        damaged.len() == 1 && damaged[0].starts_with("line 7: has 1 fields"),
        "{damaged:?}"
    );
    // Quotes left open all over a file end in an error, and soon.
    let started = std::time::Instant::now();
    std::fs::write(&path, format!("image,prompt,seed\n{}", "a.png,\"x\n".repeat(150_000)))?;
    let message = Metadata::read(&path).unwrap_err().to_string();
    assert!(
        message.contains("holds more than 100000 lines that cannot be used"),
        "{message}"
    );
    std::fs::write(&path, format!("image,prompt,seed\n{}", "\"x\n\"\"\n".repeat(150_000)))?;
    let message = Metadata::read(&path).unwrap_err().to_string();
    assert!(
        message.contains("quotes are left open all over it") || message.contains("100000"),
        "{message}"
    );
    assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
    Ok(())
}

fn encodings() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let word = "is not UTF-8: line 3 has the byte 0xe9 (an older Windows or Latin encoding?); save it as UTF-8";
    // Of lines that stand for themselves only that one is damaged.
    let (records, damaged) = said(
        &path("m.jsonl"),
        b"{\"image\":\"a.png\",\"prompt\":\"a\",\"seed\":1}\n\n{\"image\":\"b.png\",\"prompt\":\"caf\xe9\"}\n",
    )?;
    assert_eq!((records.len(), damaged), (1, vec![format!("line 3: {word}")]));
    let (records, damaged) = said(&path("m.csv"), b"image,prompt,seed\na.png,a,1\nb.png,caf\xe9,2\n")?;
    assert_eq!((records.len(), damaged), (1, vec![format!("line 3: {word}")]));
    let message = |name: &str, text: &[u8]| -> std::io::Result<String> {
        std::fs::write(path(name), text)?;
        Ok(Metadata::read(&path(name)).unwrap_err().to_string())
    };
    let list = b"[{\"image\":\"a.png\",\n\"prompt\":\"a\"},\n{\"image\":\"b.png\",\"prompt\":\"caf\xe9\"}]";
    assert_eq!(
        message("m.json", list)?,
        format!("{}: {word}", path("m.json").display())
    );
    let header = message("m.csv", b"image,pr\xf6mpt\na.png,a\n")?;
    assert!(header.contains("is not UTF-8: line 1 has the byte 0xf6"), "{header}");
    for name in ["m.jsonl", "m.json", "m.csv"] {
        for text in [&b"\xff\xfei\0m\0"[..], b"\xfe\xff\0i\0m", b"i\0m\0a\0"] {
            let message = message(name, text)?;
            assert!(
                message.ends_with("is UTF-16 text or no text at all; save it as UTF-8"),
                "{message}"
            );
        }
    }
    Ok(())
}

fn json_of_any_kind() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("metadata.json");
    let entries = [
        "{\"image\":\"a.png\",\"prompt\":\"a\",\"seed\":1,\"other\":[[1,{\"image\":2}],null]}",
        "{\"file_name\":\"b.png\",\"image\":null,\"text\":\"b\",\"seed\":\"2\"}",
        "{\"image\":\"c\\u002epng\",\"prompt\":\"c\",\"seed\":3.0}",
        "17",
        "\"d.png\"",
        "[\"d.png\", \"d\"]",
        "null",
        "{\"image\":\"e.png\",\"prompt\":[\"e\"]}",
        "{\"image\":\"f.png\",\"prompt\":\"f\",\"seed\":1e400}",
    ];
    let expected = [
        record("a.png", "a", 1),
        record("b.png", "b", 2),
        record("c.png", "c", 3),
    ];
    let reasons = [
        (4, "has no image or file_name"),
        (5, "has no image or file_name"),
        (6, "has no image or file_name"),
        (7, "has no image or file_name"),
        (8, "says prompt or text = a list, expected a text"),
    ];
    // As a list, where a number that is none ends the file, and as lines, where it ends its own.
    let (records, damaged) = said(&path, format!("[{}]", entries[..8].join(",\n")))?;
    assert_eq!(records, expected);
    assert_eq!(
        damaged,
        reasons.map(|(number, reason)| format!("entry {number}: {reason}"))
    );
    let (records, damaged) = said(&folder.path().join("m.jsonl"), entries.join("\n"))?;
    assert_eq!(records, expected);
    assert_eq!(
        damaged[..5],
        reasons.map(|(number, reason)| format!("line {number}: {reason}"))
    );
    assert!(
        damaged[5].starts_with("line 9: is not JSON: number out of range"),
        "{damaged:?}"
    );
    // A list of a hundred million numbers is a hundred million entries of no use, and none of them is held.
    let message = {
        let mut text = b"[".to_vec();
        text.extend(b"0,".repeat(1_000_000));
        text.extend(b"0]");
        std::fs::write(&path, text)?;
        Metadata::read(&path).unwrap_err().to_string()
    };
    assert!(
        message.contains("holds more than 100000 lines that cannot be used"),
        "{message}"
    );
    let deep = format!("{{\"image\":\"a.png\",\"x\":{}", "[".repeat(100_000));
    std::fs::write(&path, format!("[{deep}"))?;
    let message = Metadata::read(&path).unwrap_err().to_string();
    assert!(message.contains("is not a list of JSON objects"), "{message}");
    Ok(())
}

#[cfg(target_os = "linux")]
fn devices() -> Outcome {
    let folder = tempfile::tempdir()?;
    let pipe = folder.path().join("metadata.jsonl");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status()?.success());
    for path in [folder.path(), &pipe, Path::new("/dev/zero")] {
        let message = Metadata::read(path).unwrap_err().to_string();
        assert!(message.contains("is a pipe or device, expected a file"), "{message}");
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn devices() -> Outcome {
    Ok(())
}

fn notes() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    std::fs::create_dir(path("more"))?;
    for name in [
        "a.png",
        "b.png",
        "more/c.png",
        "x.png",
        "more/y.JPG",
        "more/z.webp",
        ".hidden.png",
    ] {
        let side = if name == "b.png" { 16 } else { 48 };
        write_grey(&path(name), side, side, 90)?;
    }
    std::fs::write(path("notes.txt"), "none")?;
    // A line that cannot be used names its picture all the same.
    let text = "image,prompt\na.png,a\n./b.png,b\nmore/c.png,c\nx.png,a fox, red\n";
    std::fs::write(path("metadata.csv"), text)?;
    let open = |sizing: Sizing| -> Result<Vec<String>, Failed> {
        Ok(DataSet::open(folder.path(), &sizing, 16, 0.5, &mut |_, _| Ok(()))?
            .notes()
            .to_vec())
    };
    let unnamed = format!(
        "2 pictures beside those of {} are named by none of its entries and are not used (the first: y.JPG)",
        path("metadata.csv").display()
    );
    assert_eq!(open(Sizing::MaxPixels(1 << 20))?, std::slice::from_ref(&unnamed));
    let small = "1 of 3 pictures are less than half as wide or high as the size that they are enlarged to (the first: ./b.png, \
                 16x16 for 48x64)";
    assert_eq!(open(Sizing::Fixed("48x64".parse()?))?, [unnamed.clone(), small.into()]);
    // Nothing to say of a set that is as it should be.
    for name in ["x.png", "more/y.JPG", "more/z.webp", "b.png"] {
        std::fs::remove_file(path(name))?;
    }
    std::fs::write(path("metadata.csv"), "image,prompt\na.png,a\nmore/c.png,c\n")?;
    assert!(open(Sizing::Fixed("48x64".parse()?))?.is_empty());
    // Colours that nobody can tell.
    let mut info = png::Info::with_size(48, 48);
    info.color_type = png::ColorType::Grayscale;
    info.icc_profile = Some(b"no profile".to_vec().into());
    let mut writer = png::Encoder::with_info(std::fs::File::create(path("a.png"))?, info)?.write_header()?;
    writer.write_image_data(&[90; 48 * 48])?;
    writer.finish()?;
    let odd = "1 of 2 pictures are in inks or have a colour profile that cannot be used (the first: a.png); they are taken for sRGB";
    assert_eq!(open(Sizing::MaxPixels(1 << 20))?, [odd]);
    Ok(())
}
