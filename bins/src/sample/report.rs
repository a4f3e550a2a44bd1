//! What a run took: time and memory by phase and tag, and time by operation.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use l2p_engine::ceilings::Ceilings;
use l2p_engine::device::{Device, MemoryReport, MemoryTag, format_bytes};
use l2p_engine::dist::{Peer, World};
use l2p_engine::pipeline::{self, ModelFiles, Phase, Settings};
use l2p_engine::profile::Profile;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::arguments::{Arguments, ReportFormat};
use super::plan::Plan;
use super::writer::copy_of;

/// What a rank tells the first one of its part.
#[derive(Serialize, Deserialize)]
pub struct Share {
    /// The numbers of the jobs that it has drawn.
    jobs: Vec<usize>,
    /// Which copies of their names the pictures have, see [`copy_of`].
    copies: Vec<usize>,
    peak: Option<u64>,
    driver_peak: Option<u64>,
}

impl Share {
    /// That of a rank which has drawn these jobs.
    pub fn of(jobs: Vec<usize>, copies: Vec<usize>, report: &Report) -> Self {
        Share {
            jobs,
            copies,
            peak: report.peak(),
            driver_peak: report.taken.driver_peak(),
        }
    }
}

/// Collects what is reported.
pub struct Report {
    model: String,
    device: String,
    settings: Settings,
    batch: usize,
    pictures: Vec<Value>,
    /// Pictures that were there.
    skipped: usize,
    /// What each of several ranks has drawn, and its peaks of memory.
    ranks: Vec<Value>,
    estimated: u64,
    taken: pipeline::Report,
    total: Duration,
    profile: Option<(Profile, Ceilings)>,
}

impl Report {
    /// A report of a run that begins.
    pub fn new(arguments: &Arguments, files: &ModelFiles, plan: &Plan) -> Self {
        let device = match files.device() {
            Device::Cpu => "cpu".to_owned(),
            Device::Cuda(device) => format!("cuda:{} {}", device.index(), device.name()),
        };
        let model = arguments
            .model
            .as_deref()
            .map(|path| path.display().to_string())
            .unwrap_or_default();
        Report {
            model,
            device,
            settings: plan.settings,
            batch: plan.batch,
            pictures: Vec::new(),
            skipped: plan.jobs.len() - plan.missing.len(),
            ranks: Vec::new(),
            estimated: files.estimate(&plan.settings, plan.batch),
            taken: pipeline::Report::default(),
            total: Duration::ZERO,
            profile: None,
        }
    }

    /// Sets the time from the program's start to the last picture's end.
    pub fn total(&mut self, total: Duration) {
        self.total = total;
    }

    /// Adds what a request took.
    pub fn took(&mut self, report: pipeline::Report) {
        self.taken.merge(report);
    }

    /// Adds the operations of a step.
    pub fn profiled(&mut self, profile: Profile, ceilings: Ceilings) {
        self.profile = Some((profile, ceilings));
    }

    /// Adds what the ranks have drawn. Returns the pictures' files, in the order of the jobs.
    pub fn drawn(&mut self, plan: &Plan, shares: Vec<Share>, world: &World) -> Vec<PathBuf> {
        if !world.is_solo() {
            let ranks = shares.iter().zip(world.peers()).enumerate();
            let rank = |(rank, (share, peer)): (usize, (&Share, &Peer))| {
                json!({
                    "rank": rank,
                    "host": peer.host,
                    "device": peer.device,
                    "pictures": share.jobs.len(),
                    "peak_bytes": share.peak,
                    "driver_peak_bytes": share.driver_peak,
                })
            };
            self.ranks = ranks.map(rank).collect();
        }
        let drawn = shares
            .into_iter()
            .flat_map(|share| share.jobs.into_iter().zip(share.copies));
        let drawn: BTreeMap<usize, usize> = drawn.collect();
        let mut files = Vec::with_capacity(drawn.len());
        for (job, copy) in drawn
            .into_iter()
            .filter_map(|(job, copy)| Some((plan.jobs.get(job)?, copy)))
        {
            let file = copy_of(&job.out, copy);
            // A name need not be UTF-8.
            let name = file.display().to_string();
            self.pictures
                .push(json!({ "file": name, "prompt": job.prompt, "negative": job.negative, "seed": job.seed }));
            files.push(file);
        }
        files
    }

    /// The most memory in use at a time, of all phases.
    fn peak(&self) -> Option<u64> {
        let phases = self.taken.phases().iter();
        phases.map(|phase| phase.memory.total.peak).max()
    }

    /// The whole report: phases when a format is given, the operations of a step when they were timed.
    ///
    /// # Errors
    /// When it cannot be formatted.
    pub fn finish(&self, format: Option<ReportFormat>) -> anyhow::Result<String> {
        let phases = self.taken.phases();
        let operations = || match &self.profile {
            Some((profile, ceilings)) => format!("{}\n", crate::profile::table(profile, ceilings)),
            None => String::new(),
        };
        Ok(match format {
            Some(ReportFormat::Json) => {
                let mut report = json!({
                    "model": self.model,
                    "device": self.device,
                    "settings": self.settings,
                    "batch": self.batch,
                    "pictures": self.pictures,
                    "skipped": self.skipped,
                    "phases": phases.iter().map(phase_json).collect::<Vec<_>>(),
                    "total_seconds": self.total.as_secs_f64(),
                    "estimated_bytes": self.estimated,
                    "peak_bytes": self.peak(),
                    "accounted_bytes": self.taken.fullest().map(MemoryReport::accounted),
                    "driver_peak_bytes": self.taken.driver_peak(),
                });
                if !self.ranks.is_empty() {
                    report["ranks"] = self.ranks.clone().into();
                }
                if let Some((profile, ceilings)) = &self.profile {
                    report["profile"] = crate::profile::json(profile, ceilings);
                }
                format!("{}\n", serde_json::to_string_pretty(&report)?)
            }
            Some(ReportFormat::Text) => format!("{}{}", self.table(phases), operations()),
            None => operations(),
        })
    }

    fn table(&self, phases: &[Phase]) -> String {
        let mut text = format!(
            "{} on {}, {} at {}x{}\n",
            self.model,
            self.device,
            super::count(self.pictures.len(), "picture"),
            self.settings.width,
            self.settings.height
        );
        let used: Vec<MemoryTag> = MemoryTag::ALL
            .into_iter()
            .filter(|&tag| phases.iter().any(|phase| phase.memory.tag(tag).peak > 0))
            .collect();
        // Writing to a string succeeds.
        let _ = write!(text, "{:<10}{:>10}{:>12}", "phase", "time", "peak");
        for tag in &used {
            let _ = write!(text, "{:>13}", tag.name());
        }
        let _ = writeln!(text, "{:>13}", "driver");
        for phase in phases {
            let _ = write!(
                text,
                "{:<10}{:>8.3} s{:>12}",
                phase.name,
                phase.seconds,
                format_bytes(phase.memory.total.peak)
            );
            for &tag in &used {
                let _ = write!(text, "{:>13}", format_bytes(phase.memory.tag(tag).peak));
            }
            let _ = writeln!(text, "{:>13}", phase.driver_bytes.map_or("-".into(), format_bytes));
        }
        let _ = writeln!(text, "{:<10}{:>8.3} s", "all", self.total.as_secs_f64());
        for share in &self.ranks {
            let pictures = share["pictures"].as_u64().unwrap_or_default() as usize;
            let _ = writeln!(
                text,
                "rank {} on {}: {}, peak {}",
                share["rank"],
                share["host"].as_str().unwrap_or_default(),
                super::count(pictures, "picture"),
                format_bytes(share["peak_bytes"].as_u64().unwrap_or_default())
            );
        }
        if let Some((driver, fullest)) = self.taken.driver_peak().zip(self.taken.fullest()) {
            let _ = writeln!(
                text,
                "of the driver's {}, {} are accounted for: {}",
                format_bytes(driver),
                format_bytes(fullest.accounted()),
                fullest.account()
            );
        }
        text
    }
}

fn phase_json(phase: &Phase) -> Value {
    let tags = MemoryTag::ALL.map(|tag| (tag.name().to_owned(), json!(phase.memory.tag(tag).peak)));
    json!({
        "name": phase.name,
        "seconds": phase.seconds,
        "peak_bytes": phase.memory.total.peak,
        "peak_bytes_by_tag": serde_json::Map::from_iter(tags),
        "reserved_bytes": phase.memory.reserved,
        "beside_pool_bytes": phase.memory.beside_pool,
        "driver_bytes": phase.driver_bytes,
    })
}
