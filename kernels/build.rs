//! Compiles `cuda/*.cu` and writes the table of images that `src/lib.rs` includes.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let out_dir = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let toolchain = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.cuda/toolkit");
    let builder = ptx_build::Builder::new("cuda", &out_dir).toolchain_dir(toolchain);
    let build = match builder.compile() {
        Ok(build) => build,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    for line in build.cargo_lines() {
        println!("{line}");
    }
    std::fs::write(out_dir.join("images.rs"), image_table(&build)).expect("OUT_DIR is writable");
    ExitCode::SUCCESS
}

fn image_table(build: &ptx_build::Build) -> String {
    let mut table = String::from("&[\n");
    for image in &build.images {
        let [machine, portable] = &image.files;
        writeln!(
            table,
            "    Image {{ name: {:?}, sm_90a: include_bytes!({machine:?}), compute_80: include_bytes!({portable:?}) }},",
            image.name
        )
        .expect("writing to a string succeeds");
    }
    table.push(']');
    table
}
