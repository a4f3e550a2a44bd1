//! Accounting: every allocation carries a tag, and a ledger per device keeps what is held now and at its peak.

use std::cell::Cell;
use std::sync::{Mutex, OnceLock};

use serde::Serialize;

use crate::lock::lock;

/// What an allocation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryTag {
    /// Model parameters.
    Weights,
    /// Tensors that live within one forward or backward step.
    Activations,
    /// Tensors kept by forward for backward.
    Saved,
    /// Parameter gradients.
    Gradients,
    /// Master weights, moments and averages.
    Optimizer,
    /// Scratch memory of library calls and kernels.
    Workspace,
}

impl MemoryTag {
    /// All tags, in the order of reports.
    pub const ALL: [MemoryTag; 6] = [
        MemoryTag::Weights,
        MemoryTag::Activations,
        MemoryTag::Saved,
        MemoryTag::Gradients,
        MemoryTag::Optimizer,
        MemoryTag::Workspace,
    ];

    /// The name used in reports.
    pub fn name(self) -> &'static str {
        match self {
            MemoryTag::Weights => "weights",
            MemoryTag::Activations => "activations",
            MemoryTag::Saved => "saved",
            MemoryTag::Gradients => "gradients",
            MemoryTag::Optimizer => "optimizer",
            MemoryTag::Workspace => "workspace",
        }
    }

    /// Tags what this thread allocates with `self` until the returned scope is dropped.
    pub fn scope(self) -> TagScope {
        TagScope {
            outer: CURRENT_TAG.replace(self),
        }
    }

    /// The tag of this thread's next allocation.
    pub(super) fn current() -> Self {
        CURRENT_TAG.get()
    }
}

thread_local! {
    static CURRENT_TAG: Cell<MemoryTag> = const { Cell::new(MemoryTag::Activations) };
}

/// Restores the outer tag when dropped; see [`MemoryTag::scope`].
#[must_use = "the tag applies while the scope lives"]
pub struct TagScope {
    outer: MemoryTag,
}

impl Drop for TagScope {
    fn drop(&mut self) {
        CURRENT_TAG.set(self.outer);
    }
}

/// Bytes held by one tag.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Usage {
    /// Held now.
    pub current: u64,
    /// The most held at once since the accounting phase began.
    pub peak: u64,
}

/// What a device's ledger says.
#[derive(Clone, Debug, Default, Serialize)]
pub struct MemoryReport {
    /// By tag, in the order of [`MemoryTag::ALL`].
    pub by_tag: [Usage; 6],
    /// Over all tags.
    pub total: Usage,
    /// Taken from the driver by the pool, free blocks included; 0 on the CPU.
    pub reserved: u64,
    /// Beside the pool; nothing on the CPU.
    pub beside_pool: BesidePool,
}

/// Bytes of a GPU's memory that are not the pool's, by what they were taken for: the growth of the driver's own count while that
/// was set up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BesidePool {
    /// In use when the device was opened: the context, and what other processes hold.
    pub context: u64,
    /// Images and kernels.
    pub kernels: u64,
    /// cuBLASLt's handle and kernels.
    pub library: u64,
    /// Recorded graphs.
    pub graphs: u64,
}

impl BesidePool {
    /// The parts' names and bytes.
    pub fn parts(&self) -> [(&'static str, u64); 4] {
        [
            ("context", self.context),
            ("kernels", self.kernels),
            ("library", self.library),
            ("graphs", self.graphs),
        ]
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }

    fn keep_larger(&mut self, other: &BesidePool) {
        self.context = self.context.max(other.context);
        self.kernels = self.kernels.max(other.kernels);
        self.library = self.library.max(other.library);
        self.graphs = self.graphs.max(other.graphs);
    }
}

impl MemoryReport {
    /// The usage under `tag`.
    pub fn tag(&self, tag: MemoryTag) -> Usage {
        self.by_tag[tag as usize]
    }

    /// Raises each peak to that of `other` where that is larger.
    pub fn keep_larger_peaks(&mut self, other: &MemoryReport) {
        let pairs = self
            .by_tag
            .iter_mut()
            .chain([&mut self.total])
            .zip(other.by_tag.iter().chain([&other.total]));
        for (mine, others) in pairs {
            mine.peak = mine.peak.max(others.peak);
        }
        self.reserved = self.reserved.max(other.reserved);
        self.beside_pool.keep_larger(&other.beside_pool);
    }

    /// All of a GPU's memory that is accounted for: the pool's, and what is beside it.
    pub fn accounted(&self) -> u64 {
        self.reserved + self.beside_pool.total()
    }

    /// The parts of [`MemoryReport::accounted`] for people: `pool 13.6 GB, context 292 MB, …`.
    pub fn account(&self) -> String {
        let parts = [("pool", self.reserved)].into_iter().chain(self.beside_pool.parts());
        let parts = parts.map(|(name, bytes)| format!("{name} {}", format_bytes(bytes)));
        parts.collect::<Vec<_>>().join(", ")
    }
}

/// Counts allocations of one device.
#[derive(Default)]
pub(super) struct Ledger(Mutex<MemoryReport>);

impl Ledger {
    pub fn add(&self, tag: MemoryTag, bytes: u64) {
        let mut report = lock(&self.0);
        let MemoryReport { by_tag, total, .. } = &mut *report;
        for usage in [&mut by_tag[tag as usize], total] {
            usage.current += bytes;
            usage.peak = usage.peak.max(usage.current);
        }
    }

    pub fn remove(&self, tag: MemoryTag, bytes: u64) {
        let mut report = lock(&self.0);
        let MemoryReport { by_tag, total, .. } = &mut *report;
        for usage in [&mut by_tag[tag as usize], total] {
            // Called by what is dropped, which must not panic, not even over an account that is wrong.
            usage.current = usage.current.saturating_sub(bytes);
        }
    }

    pub fn report(&self) -> MemoryReport {
        lock(&self.0).clone()
    }

    pub fn reset_peaks(&self) {
        let mut report = lock(&self.0);
        let MemoryReport { by_tag, total, .. } = &mut *report;
        for usage in by_tag.iter_mut().chain([total]) {
            usage.peak = usage.current;
        }
    }
}

/// The ledger of tensors in host memory.
pub(super) fn cpu_ledger() -> &'static Ledger {
    static LEDGER: OnceLock<Ledger> = OnceLock::new();
    LEDGER.get_or_init(Ledger::default)
}

/// A byte count for people, in decimal units: `12.3 GB`.
pub fn format_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ if value < 9.995 => format!("{value:.2} {}", UNITS[unit]),
        _ if value < 99.95 => format!("{value:.1} {}", UNITS[unit]),
        _ => format!("{value:.0} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_are_kept_by_tag_and_in_all() {
        let ledger = Ledger::default();
        ledger.add(MemoryTag::Weights, 100);
        ledger.add(MemoryTag::Activations, 50);
        ledger.remove(MemoryTag::Activations, 50);
        ledger.add(MemoryTag::Workspace, 20);
        let report = ledger.report();
        assert_eq!((report.total.current, report.total.peak), (120, 150));
        assert_eq!(report.tag(MemoryTag::Activations).peak, 50);
        ledger.reset_peaks();
        assert_eq!(ledger.report().total.peak, 120);
        assert_eq!(ledger.report().tag(MemoryTag::Activations).peak, 0);
    }

    /// A buffer that is dropped while a panic unwinds returns what it holds: a second panic would end the process.
    #[test]
    fn accounts_outlive_a_panic_under_their_lock() {
        let ledger = Ledger::default();
        ledger.add(MemoryTag::Saved, 100);
        let panicked = std::panic::catch_unwind(|| {
            let _held = ledger.0.lock().unwrap();
            std::panic::resume_unwind(Box::new("on purpose"));
        });
        assert!(panicked.is_err() && ledger.0.is_poisoned());
        ledger.remove(MemoryTag::Saved, 60);
        ledger.add(MemoryTag::Weights, 1);
        assert_eq!(ledger.report().total.current, 41);
        // Nor does an account that is wrong.
        ledger.remove(MemoryTag::Saved, 60);
        assert_eq!(ledger.report().tag(MemoryTag::Saved).current, 0);
    }

    #[test]
    fn scopes_nest() {
        assert_eq!(MemoryTag::current(), MemoryTag::Activations);
        let outer = MemoryTag::Weights.scope();
        {
            let _inner = MemoryTag::Workspace.scope();
            assert_eq!(MemoryTag::current(), MemoryTag::Workspace);
        }
        assert_eq!(MemoryTag::current(), MemoryTag::Weights);
        drop(outer);
        assert_eq!(MemoryTag::current(), MemoryTag::Activations);
    }

    #[test]
    fn byte_counts_read_well() {
        assert_eq!(format_bytes(999), "999 B");
        assert_eq!(format_bytes(12_345_678_901), "12.3 GB");
        assert_eq!(format_bytes(999_999), "1.00 MB");
    }
}
