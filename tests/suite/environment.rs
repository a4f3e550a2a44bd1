//! Environment variables are those that `docs/environment.md` lists, and the engine reads them where it says so.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use l2p_tests::cli::{Finished, program};
use l2p_tests::{Outcome, Suite};

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "environment::a_value_that_means_nothing_ends_every_program",
        senseless_values,
    );
    // Only where the whole source tree is; the tests may have been copied elsewhere.
    if workspace().join(TABLE).is_file() {
        suite.cpu("environment::every_variable_is_in_the_table", table);
        suite.cpu("environment::the_engine_reads_them_in_few_places", places);
    }
}

const TABLE: &str = "docs/environment.md";

/// Names that begin as variables do and are the kernels' macros.
const MACROS: [&str; 5] = [
    "L2P_FAULT",
    "L2P_FAULT_IF",
    "L2P_LAUNCH",
    "L2P_FOR_EVERY_N",
    "L2P_RMS_NORM",
];

/// The engine's files that may read the environment: the switches, what launchers leave, a machine's name, NCCL's own switch, and what a
/// profiler leaves.
const READERS: [&str; 5] = [
    "engine/src/device/options.rs",
    "engine/src/dist/launch/mod.rs",
    "engine/src/dist/nccl/library.rs",
    "engine/src/dist/world.rs",
    "engine/src/nvtx.rs",
];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The files below `folder` that hold code, and their texts.
fn sources(folder: &Path, found: &mut Vec<(PathBuf, String)>) -> std::io::Result<()> {
    const KINDS: [&str; 4] = ["rs", "py", "sh", ""];
    for entry in folder.read_dir()? {
        let path = entry?.path();
        let kind = path.extension().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            sources(&path, found)?;
        } else if KINDS.contains(&kind.as_str())
            && let Ok(text) = std::fs::read_to_string(&path)
        {
            found.push((path, text));
        }
    }
    Ok(())
}

/// All code but the kernels', whose macros have such names too.
fn code() -> std::io::Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    for folder in [
        "bench/peers",
        "bench/src",
        "bins/src",
        "engine/src",
        "kernels/src",
        "mutants/src",
        "ptx-build/src",
        "scripts",
        "tests",
    ] {
        sources(&workspace().join(folder), &mut found)?;
    }
    Ok(found)
}

/// The names in a text that begin with `L2P_`, macros aside.
fn names(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (start, _) in text.match_indices("L2P_") {
        let rest = &text[start..];
        let end = rest.find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'));
        let name = &rest[..end.unwrap_or(rest.len())];
        if name != "L2P_" && !MACROS.contains(&name) {
            found.insert(name.to_owned());
        }
    }
    found
}

fn table() -> Outcome {
    let text = std::fs::read_to_string(workspace().join(TABLE))?;
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `"));
    let listed: BTreeSet<String> = rows.filter_map(|row| Some(row.split_once('`')?.0.to_owned())).collect();
    let this = Path::new(file!()).file_name();
    let used: BTreeSet<String> = code()?
        .iter()
        .filter(|(path, _)| path.file_name() != this)
        .flat_map(|(_, text)| names(text))
        .collect();
    let missing: Vec<_> = used.difference(&listed).collect();
    let gone: Vec<_> = listed.difference(&used).collect();
    assert!(
        missing.is_empty() && gone.is_empty(),
        "{TABLE} lacks {missing:?} and lists {gone:?}, which nothing reads"
    );
    Ok(())
}

fn places() -> Outcome {
    let mut found = Vec::new();
    sources(&workspace().join("engine/src"), &mut found)?;
    let mut readers: Vec<String> = Vec::new();
    for (path, text) in found {
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        if code.into_iter().any(|line| line.contains("env::var")) {
            readers.push(path.strip_prefix(workspace())?.display().to_string());
        }
    }
    readers.sort();
    assert_eq!(readers, READERS);
    Ok(())
}

fn senseless_values() -> Outcome {
    for name in ["l2p-sample", "l2p-data", "l2p-train", "l2p-convert"] {
        let arguments: &[&str] = match name {
            "l2p-data" => &["synthesize", "--model", "m", "--prompts", "p", "--out", "o"],
            "l2p-train" => &["report", "run"],
            "l2p-convert" => &["inspect", "m"],
            _ => &["devices"],
        };
        let mut command = std::process::Command::new(program(name)?);
        command
            .args(arguments)
            .env("L2P_GRAPH", "off")
            .env("L2P_POOL", "direct");
        Finished::from(&mut command)?.failure(
            1,
            "the environment variable L2P_GRAPH is `off`, which means nothing: set it to 0 or 1, or not at all",
        )?;
    }
    Ok(())
}
