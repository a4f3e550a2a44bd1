//! Pictures and captions that cannot be used: each is reported once, skipped and counted; too many end the run.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::lock::lock;

/// Entries that a message shows before it only counts.
const SHOWN: usize = 5;

/// Something in a data set that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// The picture, or the line of the metadata.
    pub what: String,
    /// Why it cannot be used.
    pub reason: String,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.reason)
    }
}

/// Collects damages from all threads.
#[derive(Debug)]
pub struct DamageLog {
    /// Entries of the data set, damaged ones included.
    entries: usize,
    /// The share of damaged entries that is put up with.
    tolerance: f64,
    found: Mutex<Found>,
}

#[derive(Debug, Default)]
struct Found {
    /// By what is damaged, so that nothing counts twice.
    all: BTreeMap<String, String>,
    /// Not yet reported.
    fresh: Vec<Damage>,
}

impl DamageLog {
    /// Of a data set with so many entries, of which a share of `tolerance` may be damaged.
    pub fn new(entries: usize, tolerance: f64) -> Self {
        DamageLog {
            entries,
            tolerance,
            found: Mutex::default(),
        }
    }

    /// Notes a damage, unless it is known.
    pub fn note(&self, damage: Damage) {
        let mut found = lock(&self.found);
        if found.all.insert(damage.what.clone(), damage.reason.clone()).is_none() {
            found.fresh.push(damage);
        }
    }

    /// The damages that were noted since the last call.
    pub fn take_fresh(&self) -> Vec<Damage> {
        let mut found = lock(&self.found);
        std::mem::take(&mut found.fresh)
    }

    /// How many are known.
    pub fn count(&self) -> usize {
        let found = lock(&self.found);
        found.all.len()
    }

    /// Refuses to go on when more is damaged than is put up with.
    ///
    /// # Errors
    /// Listing the damages.
    pub fn check(&self) -> Result<()> {
        let found = lock(&self.found);
        let count = found.all.len();
        if count as f64 <= self.tolerance * self.entries as f64 {
            return Ok(());
        }
        let shown: Vec<String> = found
            .all
            .iter()
            .take(SHOWN)
            .map(|(what, reason)| format!("{what}: {reason}"))
            .collect();
        let more = match count.saturating_sub(SHOWN) {
            0 => String::new(),
            more => format!("; and {more} more"),
        };
        Err(Error::invalid(format!(
            "{count} of {} entries of the data set are damaged, more than the {} % that are put up with (max_damaged): {}{more}",
            self.entries,
            self.tolerance * 100.0,
            shown.join("; ")
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn damage(index: usize) -> Damage {
        Damage {
            what: format!("{index}.png"),
            reason: "is no picture".into(),
        }
    }

    #[test]
    fn damages_count_and_are_reported_once() {
        let log = DamageLog::new(200, 0.01);
        log.note(damage(1));
        log.note(damage(1));
        assert_eq!((log.take_fresh(), log.count()), (vec![damage(1)], 1));
        log.note(damage(1));
        log.note(damage(2));
        assert_eq!(log.take_fresh(), [damage(2)]);
        log.check().unwrap();
        (3..9).for_each(|index| log.note(damage(index)));
        let message = log.check().unwrap_err().to_string();
        assert!(
            message.contains("8 of 200") && message.contains("1.png: is no picture; 2.png"),
            "{message}"
        );
        assert!(message.ends_with("; and 3 more"), "{message}");
    }
}
