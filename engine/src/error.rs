//! The one error type of the engine.

use std::path::PathBuf;

use crate::dtype::DType;
use crate::shape::Shape;

/// What went wrong, in a form that can be shown to a user: it names the thing at fault and, where there is one, the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor does not have the shape an operation needs.
    #[error("{op}: {tensor} has shape {found}, expected {expected}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The argument's name.
        tensor: String,
        /// The shape the operation needs, in words or numbers.
        expected: String,
        /// The shape it got.
        found: Shape,
    },
    /// A tensor does not have the element type an operation needs.
    #[error("{op}: {tensor} holds {found}, expected {expected}")]
    DType {
        /// The operation.
        op: &'static str,
        /// The argument's name.
        tensor: String,
        /// The element type it needs.
        expected: DType,
        /// The element type it got.
        found: DType,
    },
    /// Two tensors of one operation live on different devices.
    #[error("{op}: {tensor} is on {found}, but the operation runs on {expected}")]
    Placement {
        /// The operation.
        op: &'static str,
        /// The argument's name.
        tensor: String,
        /// The device of the operation's first argument.
        expected: String,
        /// The device of the argument.
        found: String,
    },
    /// A call into a CUDA library failed.
    #[error("{call} failed: {reason}")]
    Cuda {
        /// The library's function.
        call: String,
        /// The library's own word for the failure.
        reason: String,
    },
    /// The device has no room for an allocation.
    #[error(
        "out of {device} memory: {requested} asked for, {in_use} in use by this process, {free} free; \
         use a smaller size, batch or model"
    )]
    OutOfMemory {
        /// `CPU` or the GPU's name.
        device: String,
        /// Bytes of the failed request, formatted.
        requested: String,
        /// Bytes held by this process's pool, formatted.
        in_use: String,
        /// Bytes that the device reports as free, formatted.
        free: String,
    },
    /// No GPU can be used; holds the reason and the way out.
    #[error("{0}")]
    NoGpu(String),
    /// A file could not be opened, read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file's content is not what it should be.
    #[error("{path}: {reason}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An argument makes no sense; holds a sentence that says which and why.
    #[error("{0}")]
    Invalid(String),
    /// A result holds NaN or an infinity. What was computed is of no use; weights, settings or inputs are at fault.
    #[error("{what}: not finite (NaN or infinity)")]
    NotFinite {
        /// The result and how many of its values, such as "picture 2: 12 of 3072 values"; callers that know more put the
        /// weight or part that is to blame behind it.
        what: String,
    },
    /// A run of several ranks cannot go on, because one of them is gone, hangs, or gave up.
    #[error("rank {rank} on {host} was lost: {reason}")]
    PeerLost {
        /// The rank.
        rank: usize,
        /// Its machine.
        host: String,
        /// How that was noticed, or why it gave up.
        reason: String,
    },
    /// The worker of a device has ended, so that nothing more can be asked of it.
    #[error("the worker of {device} has ended: {reason}; start the program again")]
    WorkerEnded {
        /// The device.
        device: String,
        /// What was wrong with it.
        reason: String,
    },
    /// More requests wait for a device than may.
    #[error("{device} is busy: {open} requests are waiting; ask again later")]
    Busy {
        /// The device.
        device: String,
        /// Requests that wait or are served.
        open: usize,
    },
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// Whose matter an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The caller asked for something that makes no sense, or that this model or device cannot do; asking again is of no use.
    Request,
    /// A file of the model or data set is missing, damaged or of another kind.
    Data,
    /// The machine failed or has too little of something: memory, disk, a GPU, a library, another rank. The same request may be
    /// served elsewhere or later.
    Machine,
    /// The user asked to stop.
    Interrupted,
}

/// A result of the engine.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Whose matter it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Shape { .. } | Error::DType { .. } | Error::Placement { .. } | Error::Invalid(_) => {
                ErrorKind::Request
            }
            Error::File { .. } | Error::NotFinite { .. } => ErrorKind::Data,
            Error::Io { source, .. } => match source.kind() {
                std::io::ErrorKind::NotFound
                | std::io::ErrorKind::InvalidData
                | std::io::ErrorKind::InvalidInput
                | std::io::ErrorKind::IsADirectory
                | std::io::ErrorKind::NotADirectory => ErrorKind::Data,
                _ => ErrorKind::Machine,
            },
            Error::Cuda { .. }
            | Error::OutOfMemory { .. }
            | Error::NoGpu(_)
            | Error::PeerLost { .. }
            | Error::WorkerEnded { .. }
            | Error::Busy { .. } => ErrorKind::Machine,
            Error::Interrupted => ErrorKind::Interrupted,
        }
    }

    /// An [`Error::Io`] for `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io {
            path: path.into(),
            source,
        }
    }

    /// An [`Error::File`] for `path`. A reason that goes on and on, for it quotes the file, is cut.
    pub fn file(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Error::File {
            path: path.into(),
            reason: bounded(reason.into()),
        }
    }

    /// An [`Error::NotFinite`] of `what`.
    pub fn not_finite(what: impl Into<String>) -> Self {
        Error::NotFinite { what: what.into() }
    }

    /// An [`Error::Invalid`]. A reason that goes on and on, for it quotes a file, is cut.
    pub fn invalid(reason: impl Into<String>) -> Self {
        Error::Invalid(bounded(reason.into()))
    }
}

/// Characters of a reason; what is longer quotes names or values of a file that no one reads.
const LONGEST_REASON: usize = 2000;

fn bounded(reason: String) -> String {
    match reason.char_indices().nth(LONGEST_REASON) {
        None => reason,
        Some((end, _)) => format!("{}… ({} bytes)", &reason[..end], reason.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistake_is_told_from_a_fault_of_the_machine() {
        let io = |kind: std::io::ErrorKind| Error::io("file", kind.into()).kind();
        assert_eq!(Error::invalid("width 0").kind(), ErrorKind::Request);
        assert_eq!(Error::file("m.safetensors", "is cut").kind(), ErrorKind::Data);
        assert_eq!(io(std::io::ErrorKind::NotFound), ErrorKind::Data);
        assert_eq!(io(std::io::ErrorKind::StorageFull), ErrorKind::Machine);
        assert_eq!(Error::NoGpu("no driver".into()).kind(), ErrorKind::Machine);
        assert_eq!(Error::Interrupted.kind(), ErrorKind::Interrupted);
    }

    #[test]
    fn reasons_do_not_quote_whole_files() {
        let name = "é".repeat(1 << 20);
        for error in [
            Error::file("a.json", format!("has `{name}`")),
            Error::invalid(format!("has `{name}`")),
        ] {
            let text = error.to_string();
            assert!(
                text.len() < 5000 && text.ends_with("é… (2097158 bytes)"),
                "{}",
                &text[text.len() - 40..]
            );
        }
        assert_eq!(Error::file("a", "is short").to_string(), "a: is short");
    }
}
