//! metadata.jsonl, metadata.json, metadata.csv.

use std::path::Path;

use l2p_engine::data::{DataSet, Metadata, Sizing};
use l2p_tests::{Outcome, Suite};

use super::write_grey;

pub fn register(suite: &mut Suite) {
    suite.cpu("data::metadata::three_formats_say_the_same", formats);
    suite.cpu("data::metadata::what_cannot_be_used_is_named", faults);
    suite.cpu("data::metadata::every_format_of_pictures_and_size", pictures);
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
