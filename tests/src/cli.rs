//! Running the programs of the workspace as a user does.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::Failed;

/// What a program printed and how it ended.
#[derive(Debug)]
pub struct Finished {
    /// The exit code; -1 when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// Waits for `command` and keeps what it printed.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn from(command: &mut Command) -> Result<Self, Failed> {
        let output = command
            .output()
            .map_err(|error| format!("{} does not start: {error}", command.get_program().display()))?;
        Ok(Finished {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout)?,
            stderr: String::from_utf8(output.stderr)?,
        })
    }

    /// Fails unless the program ended well.
    ///
    /// # Errors
    /// With what it printed.
    pub fn success(self) -> Result<Self, Failed> {
        if self.code == 0 {
            return Ok(self);
        }
        Err(format!("exit code {}\n{}{}", self.code, self.stdout, self.stderr).into())
    }

    /// Fails unless the program ended with `code` and printed nothing but `message` as its error.
    ///
    /// # Errors
    /// With what it printed.
    pub fn failure(self, code: i32, message: &str) -> Result<(), Failed> {
        let expected = format!("error: {message}\n");
        if self.code == code && self.stderr == expected && self.stdout.is_empty() {
            return Ok(());
        }
        Err(format!(
            "expected exit code {code} and\n{expected}found exit code {} and\n{}{}",
            self.code, self.stdout, self.stderr
        )
        .into())
    }
}

/// Where the program `name` is: in `L2P_BIN_DIR`, beside the test executable, or in the build folder above it.
///
/// # Errors
/// When it is in none of these, with the way to build it.
pub fn program(name: &str) -> Result<PathBuf, Failed> {
    let file = format!("{name}{}", std::env::consts::EXE_SUFFIX);
    let folders = match std::env::var_os("L2P_BIN_DIR") {
        Some(folder) => vec![PathBuf::from(folder)],
        None => std::env::current_exe()?
            .ancestors()
            .skip(1)
            .take(2)
            .map(PathBuf::from)
            .collect(),
    };
    let found = folders
        .iter()
        .map(|folder| folder.join(&file))
        .find(|path| path.is_file());
    found.ok_or_else(|| {
        let places: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
        let places = places.join(" or ");
        format!("{file} is not in {places}: run `cargo build --bin {name}`, with the profile of the tests").into()
    })
}

/// Whether a program that is none of this workspace is installed.
pub fn is_installed(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

/// `mpirun` or `torchrun`, about to start so many ranks of `program` on this machine, whose arguments follow.
pub fn under(launcher: &str, ranks: usize, program: &Path) -> Command {
    let ranks = ranks.to_string();
    let mut command = Command::new(launcher);
    match launcher {
        "mpirun" => command.args(["--oversubscribe", "--allow-run-as-root", "-np", &ranks]),
        _ => command.args(["--standalone", "--no-python", "--nproc-per-node", &ranks]),
    };
    command.arg(program);
    command
}

/// Runs the program `name` with these arguments.
///
/// # Errors
/// When it cannot be found or started; how it ends is for the caller to judge.
pub fn run<A: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = A>) -> Result<Finished, Failed> {
    Finished::from(Command::new(program(name)?).args(arguments))
}
