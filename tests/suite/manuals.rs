//! Manual pages and completions of all programs.

use std::process::Command;

use l2p_tests::cli::{Finished, program};
use l2p_tests::{Outcome, Suite};

pub fn register(suite: &mut Suite) {
    suite.cpu("manuals::every_program_has_a_page_and_completions", pages);
}

fn pages() -> Outcome {
    for name in ["l2p-sample", "l2p-train", "l2p-convert", "l2p-data", "l2p-serve"] {
        let made = |kind: &str| Finished::from(Command::new(program(name)?).env("L2P_MANUAL", kind));
        let page = made("man")?.success()?.stdout;
        assert!(page.contains(".TH") && page.contains(".SH OPTIONS"), "{name}");
        for shell in ["bash", "zsh", "fish"] {
            let completions = made(shell)?.success()?.stdout;
            assert!(
                completions.contains(name) && completions.contains("version"),
                "{name} {shell}"
            );
        }
        let wrong = made("tcsh")?;
        assert!(
            wrong.code == 1 && wrong.stderr.contains("expected man, bash"),
            "{name}: {}",
            wrong.stderr
        );
    }
    Ok(())
}
