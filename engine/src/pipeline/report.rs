//! What a call took: time and memory by phase.

use serde::Serialize;

use crate::device::MemoryReport;

/// One phase of a call.
#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    /// Its name; see the head comment of `pipeline`.
    pub name: &'static str,
    /// Wall time, waiting for the device included.
    pub seconds: f64,
    /// Device memory, peaks within the phase.
    pub memory: MemoryReport,
    /// Bytes of the GPU in use at the phase's end as its driver counts them (all processes, contexts included).
    pub driver_bytes: Option<u64>,
}

/// The phases of a call, or of several: one of each name, in the order in which they came first.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    phases: Vec<Phase>,
}

impl Report {
    /// Adds a phase. Of phases of the same name times add up, and peaks are the largest.
    pub fn add(&mut self, phase: Phase) {
        match self.phases.iter_mut().find(|other| other.name == phase.name) {
            None => self.phases.push(phase),
            Some(other) => {
                other.seconds += phase.seconds;
                other.driver_bytes = other.driver_bytes.max(phase.driver_bytes);
                other.memory.keep_larger_peaks(&phase.memory);
            }
        }
    }

    /// Adds all phases of another call.
    pub fn merge(&mut self, other: Report) {
        other.phases.into_iter().for_each(|phase| self.add(phase));
    }

    /// The phases.
    pub fn phases(&self) -> &[Phase] {
        &self.phases
    }

    /// The phase of this name, if there was one.
    pub fn phase(&self, name: &str) -> Option<&Phase> {
        self.phases.iter().find(|phase| phase.name == name)
    }

    /// The most of the GPU's memory that its driver has counted.
    pub fn driver_peak(&self) -> Option<u64> {
        self.phases.iter().filter_map(|phase| phase.driver_bytes).max()
    }

    /// The memory of the phase with the most of the GPU's memory accounted for.
    pub fn fullest(&self) -> Option<&MemoryReport> {
        let reports = self.phases.iter().map(|phase| &phase.memory);
        reports.max_by_key(|memory| memory.accounted())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    #[test]
    fn calls_add_up_and_their_number_takes_no_room() {
        let phase = |name, seconds, driver| Phase {
            name,
            seconds,
            memory: Device::Cpu.memory_report(),
            driver_bytes: driver,
        };
        let mut all = Report::default();
        for call in 0..3 {
            let mut report = Report::default();
            report.add(phase("denoise", 2.0, Some(10 - call)));
            report.add(phase("decode", 0.5, None));
            all.merge(report);
        }
        let names: Vec<_> = all.phases().iter().map(|phase| phase.name).collect();
        assert_eq!(names, ["denoise", "decode"]);
        assert_eq!(all.phase("denoise").map(|phase| phase.seconds), Some(6.0));
        assert_eq!((all.driver_peak(), all.phase("text").is_none()), (Some(10), true));
    }
}
