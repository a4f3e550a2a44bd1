//! Faults that are known and not mended yet, each with its reason.

use crate::worker::Report;

/// A kind of report that is expected.
struct Known {
    /// The reader; all, where it is empty.
    reader: &'static str,
    /// How the case ends.
    end: &'static str,
    /// A part of its message.
    message: &'static str,
    reason: &'static str,
}

const KNOWN: [Known; 2] = [
    Known {
        reader: "pictures",
        end: "memory",
        message: "",
        reason: "decoded pictures have no budget yet",
    },
    Known {
        reader: "pictures",
        end: "hang",
        message: "",
        reason: "decoded pictures have no budget yet",
    },
];

/// Why this report is expected, if it is.
pub fn reason(report: &Report) -> Option<&'static str> {
    let fits = |known: &&Known| {
        (known.reader.is_empty() || known.reader == report.reader)
            && known.end == report.end
            && report.message.contains(known.message)
    };
    KNOWN.iter().find(fits).map(|known| known.reason)
}
