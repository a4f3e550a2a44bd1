//! The only places that write to standard output and standard error (lints forbid the macros elsewhere, for they panic).

use std::fmt::Display;
use std::io::{ErrorKind, Write};

use l2p_engine::printable;

/// Prints a line to standard error, without control characters that came from files. Nothing that happens to a line ends the
/// work that it speaks of: a reader that left, a full disk behind a redirection and a closed terminal are no errors.
pub fn say(line: impl Display) {
    let line = line.to_string();
    let text: Vec<_> = line.split('\n').map(printable).collect();
    let _ = std::io::stderr()
        .lock()
        .write_all(format!("{}\n", text.join("\n")).as_bytes());
}

/// Prints to standard output what the user asked for; that nobody reads it any more (`… | head`) is no error.
///
/// # Errors
/// When standard output cannot be written for another reason.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("cannot write to standard output"))
        }
        _ => Ok(()),
    }
}
