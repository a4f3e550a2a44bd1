//! Every program starts and explains itself. That these tests stand here also makes `cargo test` build the programs, which
//! the integration tests run.

use std::process::Command;

#[test]
fn l2p_convert_explains_itself() {
    let output = Command::new(env!("CARGO_BIN_EXE_l2p-convert"))
        .arg("--help")
        .output()
        .unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    for word in ["inspect", "init", "merge", "export", "Examples"] {
        assert!(text.contains(word), "{word} is missing from:\n{text}");
    }
    let arguments = ["init", "--help"];
    let output = Command::new(env!("CARGO_BIN_EXE_l2p-convert"))
        .args(arguments)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("copied bit by bit"),
        "the long description is missing from:\n{text}"
    );
}
