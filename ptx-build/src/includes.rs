//! Which headers a source is compiled with.

use std::path::{Path, PathBuf};

use crate::Error;

/// `source` and the files of `include_dir` that it includes, directly or by way of others, in the order in which they are met;
/// whatever the preprocessor would leave out counts too. Only `#include "…"`: what stands in `<…>` is the compiler's.
pub fn reached_from(source: &Path, include_dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut reached = vec![source.to_path_buf()];
    let mut next = 0;
    while next < reached.len() {
        let path = reached[next].clone();
        let text = std::fs::read_to_string(&path).map_err(|error| Error::Io(path.clone(), error))?;
        for header in text.lines().filter_map(included).map(|name| include_dir.join(name)) {
            if header.is_file() && !reached.contains(&header) {
                reached.push(header);
            }
        }
        next += 1;
    }
    Ok(reached)
}

fn included(line: &str) -> Option<&str> {
    let rest = line
        .trim_start()
        .strip_prefix('#')?
        .trim_start()
        .strip_prefix("include")?;
    rest.trim_start().strip_prefix('"')?.split('"').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_headers_are_reached_and_others_are_not() {
        let folder = std::env::temp_dir().join(format!("ptx-build-includes-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("common")).unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
        write(
            "a.cu",
            "#include <cuda.h>\n#if 0\n#  include \"common/b.cuh\"\n#endif\n",
        );
        write(
            "common/b.cuh",
            "#pragma once\n#include \"common/c.cuh\" // last\n#include \"not_there.h\"\n",
        );
        write("common/c.cuh", "#include \"common/b.cuh\"\n");
        write("common/d.cuh", "");
        let reached = reached_from(&folder.join("a.cu"), &folder);
        std::fs::remove_dir_all(&folder).unwrap();
        let expected = ["a.cu", "common/b.cuh", "common/c.cuh"].map(|name| folder.join(name));
        assert_eq!(reached.unwrap(), expected);
    }
}
