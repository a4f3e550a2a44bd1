//! What the headers of `cuda/common` offer beyond what today's kernels use compiles for Hopper.

use std::path::Path;

/// Operand types and columns of the products that `common/wgmma.cuh` has instances of.
const OPERANDS: [&str; 3] = ["bf16", "e4m3", "s8"];
const COLUMNS: [u32; 9] = [8, 16, 32, 48, 64, 96, 128, 192, 256];

/// Without a CUDA compiler the crate has no kernels either, and there is nothing to compile with.
#[test]
fn products_of_every_operand_type_and_width_compile_without_spills() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let build = ptx_build::Builder::new(here.join("tests/instances"), env!("CARGO_TARGET_TMPDIR"))
        .include_dir(here.join("cuda"))
        .toolchain_dir(here.join("../.cuda/toolkit"))
        .compile()
        .unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(build.nvcc.is_none(), l2p_kernels::IMAGES.is_empty());
    let Some(image) = build.images.first() else { return };
    let mut compiled: Vec<&str> = image.kernels.iter().map(|kernel| kernel.name.as_str()).collect();
    let mut expected: Vec<String> = OPERANDS
        .iter()
        .flat_map(|operand| COLUMNS.map(|columns| format!("wgmma_{operand}_{columns}")))
        .collect();
    compiled.sort();
    expected.sort();
    assert_eq!(compiled, expected);
    for kernel in &image.kernels {
        assert!(!kernel.spills(), "{kernel}");
    }
}
