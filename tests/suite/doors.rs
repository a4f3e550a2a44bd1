//! Safe calls stay within memory that is theirs, and `unsafe` code where it is said to be.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use l2p_engine::{DType, Device, Tensor};
use l2p_tests::{Outcome, Suite};

pub fn register(suite: &mut Suite) {
    suite.cpu("doors::shapes_larger_than_memory_are_refused", too_large);
    suite.cpu("doors::views_stay_within_their_tensor", views);
    // Only where the whole source tree is; the tests may have been copied elsewhere.
    if workspace().join(STATEMENT).is_file() {
        suite.cpu("doors::unsafe_code_is_where_it_is_said_to_be", unsafe_code);
    }
}

const CPU: Device = Device::Cpu;

fn too_large() -> Outcome {
    const HUGE: usize = 1 << 40;
    for shape in [
        vec![HUGE, HUGE],
        vec![HUGE, HUGE, 0],
        vec![0, HUGE, HUGE],
        vec![usize::MAX],
        vec![1 << 62, 4, 4],
        vec![usize::MAX, 2, 1 << 63],
    ] {
        let message = match Tensor::empty(&CPU, shape.as_slice(), DType::F32) {
            Ok(tensor) => return Err(format!("{tensor:?} was made").into()),
            Err(error) => error.to_string(),
        };
        assert!(message.contains("larger than any memory"), "{shape:?}: {message}");
        assert!(
            Tensor::from_slice(&CPU, &[0f32; 0], shape.as_slice()).is_err(),
            "{shape:?}"
        );
        assert!(
            Tensor::zeros(&CPU, [0], DType::F32)?.reshape(shape.as_slice()).is_err(),
            "{shape:?}"
        );
    }
    Ok(())
}

fn views() -> Outcome {
    let tensor = Tensor::from_slice(&CPU, &[0f32, 1.0, 2.0, 3.0, 4.0, 5.0], [3, 2])?;
    assert_eq!(tensor.narrow(1, 2)?.to_vec::<f32>()?, [2.0, 3.0, 4.0, 5.0]);
    for (start, count) in [
        (2, 2),
        (4, 0),
        (usize::MAX, 2),
        (2, usize::MAX),
        (usize::MAX, usize::MAX),
    ] {
        assert!(
            tensor.narrow(start, count).is_err(),
            "{start} and {count} of 3 are given out"
        );
    }
    let scalar = Tensor::from_slice(&CPU, &[1f32], [0usize; 0])?;
    assert!(scalar.narrow(0, 0).is_err() && scalar.narrow(0, 1).is_err());
    let mut tensor = tensor;
    assert!(tensor.copy_elements_from_slice(usize::MAX, &[1f32; 2]).is_err());
    let two = Tensor::from_slice(&CPU, &[1f32; 2], [2])?;
    assert!(tensor.copy_elements_from(usize::MAX, &two).is_err());
    Ok(())
}

/// Where the statement stands.
const STATEMENT: &str = "engine/src/device/mod.rs";

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The places that the statement lists: its head comment's entries, each of which begins with a path.
fn stated() -> std::io::Result<BTreeSet<String>> {
    let text = std::fs::read_to_string(workspace().join(STATEMENT))?;
    let entries = text.lines().filter_map(|line| line.strip_prefix("//! * `"));
    Ok(entries
        .filter_map(|entry| Some(entry.split_once('`')?.0.to_owned()))
        .collect())
}

/// Rust sources below `folder`, relative to the workspace.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in folder.read_dir()? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

/// Whether a line of code, comments and texts aside, has the keyword.
fn is_unsafe(line: &str) -> bool {
    let line = line.replace("'\"'", "").replace("\\\"", "");
    let outside_texts: String = line.split('"').step_by(2).collect();
    let code = outside_texts.split("//").next().unwrap_or_default();
    let words = code.split(|character: char| !(character.is_alphanumeric() || character == '_'));
    words.into_iter().any(|word| word == "unsafe")
}

fn unsafe_code() -> Outcome {
    assert!(is_unsafe("let x = unsafe { y };") && is_unsafe("pub unsafe fn f(): // why"));
    assert!(
        !is_unsafe("// unsafe") && !is_unsafe(&format!("{0}unsafe{0}", '"')) && !is_unsafe("unsafe_op_in_unsafe_fn")
    );
    let (root, stated) = (workspace().canonicalize()?, stated()?);
    assert!(stated.len() >= 3, "the statement in {STATEMENT} lists {stated:?}");
    let mut files = Vec::new();
    sources(&root, &mut files)?;
    let mut used = BTreeSet::new();
    for file in files {
        if !std::fs::read_to_string(&file)?.lines().any(is_unsafe) {
            continue;
        }
        let name = file.strip_prefix(&root)?.display().to_string().replace('\\', "/");
        let place = stated.iter().find(|place| match place.ends_with('/') {
            true => name.starts_with(place.as_str()),
            false => name == **place,
        });
        match place {
            Some(place) => used.insert(place.clone()),
            None => return Err(format!("{name} holds `unsafe` code, which {STATEMENT} does not list").into()),
        };
    }
    let idle: Vec<_> = stated.difference(&used).collect();
    assert!(
        idle.is_empty(),
        "{STATEMENT} lists places without `unsafe` code: {idle:?}"
    );
    Ok(())
}
