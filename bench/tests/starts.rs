//! Every benchmark starts and explains itself. That this test stands here also makes `cargo test` build the benchmarks, which the
//! integration tests run.

use std::process::Command;

/// The programs, each with words that its help must hold.
const PROGRAMS: [(&str, &[&str]); 10] = [
    (env!("CARGO_BIN_EXE_bench-attention"), &["--tokens", "--peer"]),
    (env!("CARGO_BIN_EXE_bench-decode"), &["--batch", "--peer"]),
    (env!("CARGO_BIN_EXE_bench-elementwise"), &["--ops", "--peer"]),
    (env!("CARGO_BIN_EXE_bench-gemm"), &["--shape", "--peer"]),
    (env!("CARGO_BIN_EXE_bench-head"), &["--heads", "--peer"]),
    (env!("CARGO_BIN_EXE_bench-parity"), &["--io"]),
    (env!("CARGO_BIN_EXE_bench-report"), &["--check", "<!-- bench:NAME -->"]),
    (env!("CARGO_BIN_EXE_bench-sample"), &["--latent", "--model", "png"]),
    (env!("CARGO_BIN_EXE_bench-step"), &["--model", "--kernels"]),
    (
        env!("CARGO_BIN_EXE_bench-targets"),
        &["--only", "--merge", "--reasons", "latent-4k"],
    ),
];

#[test]
fn every_benchmark_explains_itself() {
    for (program, words) in PROGRAMS {
        let output = Command::new(program).arg("--help").output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{program}");
        for word in words.iter().chain(&["Example", "Exit code"]) {
            assert!(text.contains(word), "{word} is missing from:\n{text}");
        }
    }
}
