//! The faults that can be switched on in the kernels: each stands where the list says, and compiles to something else.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn faults() -> Vec<Value> {
    let text = std::fs::read_to_string(folder().join("faults.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn images(fault: &Value) -> impl Iterator<Item = &str> {
    fault["images"]
        .as_array()
        .unwrap()
        .iter()
        .map(|image| image.as_str().unwrap())
}

/// The numbers of `L2P_FAULT_IF(number, …)` in a source and the headers that it reaches.
fn faults_of(source: PathBuf) -> BTreeSet<u64> {
    let (mut files, mut numbers, mut next) = (vec![source], BTreeSet::new(), 0);
    while let Some(file) = files.get(next).cloned() {
        let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let included = text
            .lines()
            .filter_map(|line| line.strip_prefix("#include \"")?.split('"').next());
        for header in included.map(|name| folder().join("cuda").join(name)) {
            if !files.contains(&header) {
                files.push(header);
            }
        }
        let uses = text.split("L2P_FAULT_IF(").skip(1);
        numbers.extend(uses.filter_map(|rest| rest.split(',').next()?.parse::<u64>().ok()));
        next += 1;
    }
    numbers
}

#[test]
fn every_fault_stands_in_the_images_that_the_list_names() {
    let mut listed = BTreeSet::new();
    for fault in faults() {
        let number = fault["number"].as_u64().unwrap();
        assert!(listed.insert(number), "fault {number} is listed twice");
        assert!(images(&fault).next().is_some(), "fault {number} affects nothing");
        for image in images(&fault) {
            let here = faults_of(folder().join("cuda").join(format!("{image}.cu")));
            assert!(here.contains(&number), "fault {number} is not in {image}.cu");
        }
    }
    let sources = std::fs::read_dir(folder().join("cuda")).unwrap();
    let sources = sources.map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    let placed: BTreeSet<u64> = sources.flat_map(faults_of).collect();
    assert_eq!(placed, listed);
}

/// Two small images by the script that makes all of them. Without a CUDA compiler there is nothing to compile with.
#[test]
fn images_with_a_fault_differ_from_the_builds() {
    const IMAGES: [(u32, &str); 2] = [(16, "unpatchify"), (18, "noise")];
    if l2p_kernels::IMAGES.is_empty() {
        return;
    }
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("faults");
    let mut script = Command::new(folder().join("../scripts/kernel-faults"));
    let script = script
        .arg("build")
        .arg(&out)
        .args(IMAGES.map(|(number, _)| number.to_string()));
    let built = match script.output() {
        // The script is Python's.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
        built => built.unwrap(),
    };
    if built.status.code() == Some(127) {
        return; // `env` found no python3
    }
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    for (number, name) in IMAGES {
        let right = l2p_kernels::image(name).unwrap();
        for (target, right) in [("sm_90a", right.sm_90a), ("compute_80", right.compute_80)] {
            let faulty = std::fs::read(out.join(format!("{number}/{name}.{target}.fatbin"))).unwrap();
            assert_eq!(faulty[..4], right[..4], "{name} for {target} is no fat binary");
            assert_ne!(faulty, right, "fault {number} changes nothing in {name} for {target}");
        }
    }
    assert!(out.join("faults.json").is_file());
}
