//! Manual pages and completions for shells, made from the same description as `--help`.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use clap_complete::{Shell, generate};
use clap_mangen::Man;

/// The variable that asks for one: `man`, or a shell's name.
const VARIABLE: &str = "L2P_MANUAL";

/// The arguments of the program; nothing where the environment asks for its manual page (`L2P_MANUAL=man`) or for a shell's completions
/// (`L2P_MANUAL=bash`, `zsh`, `fish`, …), which is printed instead, with the exit code that the program is to end with.
pub fn arguments<A: Parser>() -> Result<A, ExitCode> {
    arguments_by(A::parse)
}

/// As [`arguments`], for a program that reads its own way.
pub fn arguments_by<A: CommandFactory>(parse: impl FnOnce() -> A) -> Result<A, ExitCode> {
    match std::env::var_os(VARIABLE).filter(|kind| !kind.is_empty()) {
        None => Ok(parse()),
        Some(kind) => Err(crate::run(|| print::<A>(&kind))),
    }
}

fn print<A: CommandFactory>(kind: &OsString) -> anyhow::Result<()> {
    let mut bytes = Vec::new();
    let mut command = A::command();
    let name = command.get_name().to_owned();
    match kind.to_str() {
        Some("man") => pages(&mut bytes, command)?,
        kind => match kind.and_then(|kind| kind.parse::<Shell>().ok()) {
            Some(shell) => generate(shell, &mut command, name, &mut bytes),
            None => anyhow::bail!(
                "{VARIABLE}={}: expected man, bash, elvish, fish, powershell or zsh",
                l2p_engine::shown_name(kind.unwrap_or("?"))
            ),
        },
    }
    crate::print(&String::from_utf8_lossy(&bytes))
}

/// The page of a program, with those of its subcommands behind it.
fn pages(bytes: &mut Vec<u8>, mut command: clap::Command) -> std::io::Result<()> {
    command.build();
    let subcommands: Vec<clap::Command> = command.get_subcommands().cloned().collect();
    Man::new(command).render(bytes)?;
    let of_its_own = |command: &clap::Command| command.get_name() != "help";
    for subcommand in subcommands.into_iter().filter(of_its_own) {
        Man::new(subcommand).render(bytes)?;
    }
    Ok(())
}
