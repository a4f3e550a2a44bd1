//! One run of a benchmark: its device, ceilings, rows and peer.

use std::path::Path;

use anyhow::bail;
use l2p_engine::ceilings::Ceilings;
use l2p_engine::device::Effort;
use l2p_engine::profile::{Work, measure};
use l2p_engine::{Device, Tensor};
use serde_json::Value;

use crate::arguments::Common;
use crate::environment::Environment;
use crate::peer::{Peer, Turns};
use crate::record::{Record, Row, Timing, write_json};
use crate::timing::{Call, Timer};

/// Larger work on the CPU is refused: nobody waits for it.
const MOST_CPU_FLOPS: f64 = 2e11;

/// One case of a benchmark: the same call on several sets of inputs.
pub struct Case<'a> {
    /// Its name; without spaces, since it is typed after `--once`.
    pub name: String,
    /// Sizes and choices, for the record.
    pub inputs: Value,
    /// Sets of inputs.
    pub sets: usize,
    /// Calls with one of them.
    pub call: &'a mut Call<'a>,
    /// The error of the results of the first set.
    pub check: &'a mut dyn FnMut(&[Tensor]) -> anyhow::Result<f64>,
    /// The largest error that passes.
    pub tolerance: f64,
    /// What the peer is told to do; `None` for a case without peer.
    pub peer: Option<Value>,
}

/// A run of a benchmark.
pub struct Bench {
    /// Where it runs.
    pub device: Device,
    /// What the user asked for.
    pub common: Common,
    record: Record,
    peer: Option<Peer>,
    /// Cases met, and whether one was the one to run once.
    names: Vec<String>,
    found: bool,
}

impl Bench {
    /// Opens the device, measures its ceilings and starts the peer, the script `peer` of `bench/peers`.
    ///
    /// # Errors
    /// When the device or the peer cannot be used.
    pub fn start(name: &str, common: &Common, peer: &str) -> anyhow::Result<Self> {
        let device = Device::open(common.device)?;
        if let Device::Cuda(cuda) = &device {
            // What is measured is what `l2p-sample warm` gives.
            cuda.blas()?.set_effort(Effort::Thorough);
        }
        let ceilings = match &common.once {
            None => Ceilings::measure(&device)?,
            // Nothing is measured.
            Some(_) => Ceilings {
                bytes_per_second: 0.0,
                flops_per_second: 0.0,
                copy_bytes: 0,
                product_size: 0,
            },
        };
        let peer = match common.peer {
            true => Some(Peer::start(peer, &device, common)?),
            false => None,
        };
        let bench = Bench {
            record: Record {
                bench: name.into(),
                environment: Environment::of(&device),
                torch: peer.as_ref().map(|peer| peer.torch().to_owned()),
                ceilings,
                rows: Vec::new(),
            },
            device,
            common: common.clone(),
            peer,
            names: Vec::new(),
            found: false,
        };
        if bench.common.once.is_none() {
            let Environment {
                gpu, driver, commit, ..
            } = &bench.record.environment;
            bench.say(&format!("{gpu}, driver {driver}, commit {commit}"))?;
            bench.say(&format!(
                "ceilings: copy {:.2} TB/s ({} MiB), product {:.1} TFLOP/s ({}³)\n\n{}",
                ceilings.bytes_per_second / 1e12,
                ceilings.copy_bytes >> 20,
                ceilings.flops_per_second / 1e12,
                ceilings.product_size,
                Row::header()
            ))?;
        }
        Ok(bench)
    }

    /// The device's ceilings.
    pub fn ceilings(&self) -> &Ceilings {
        &self.record.ceilings
    }

    /// The peer, where there is one.
    pub fn peer(&mut self) -> Option<&mut Peer> {
        self.peer.as_mut()
    }

    /// Ends the peer, so that its memory is free.
    pub fn end_peer(&mut self) {
        self.peer = None;
    }

    /// Device, driver, commit and date.
    pub fn environment(&self) -> &Environment {
        &self.record.environment
    }

    /// The version of PyTorch, where there was a peer.
    pub fn torch(&self) -> Option<&str> {
        self.record.torch.as_deref()
    }

    /// Sets of inputs of `bytes` bytes each: enough not to find one in the cache when its turn comes again.
    pub fn sets(&self, bytes: usize) -> usize {
        /// Several times the largest second-level cache.
        const ROTATED_BYTES: usize = 256 << 20;
        match self.device {
            Device::Cpu => 2,
            Device::Cuda(_) => ROTATED_BYTES.div_ceil(bytes.max(1)).clamp(2, 16),
        }
    }

    /// Refuses work that a CPU would take too long for; `flops` is that of one call.
    ///
    /// # Errors
    /// Saying how to ask for less.
    pub fn ensure_feasible(&self, name: &str, flops: f64, way_out: &str) -> anyhow::Result<()> {
        if self.device == Device::Cpu && flops > MOST_CPU_FLOPS {
            bail!(
                "{name} takes {:.1} TFLOP, which is for a GPU (none is in use: see `l2p-sample devices`); {way_out}",
                flops / 1e12
            );
        }
        Ok(())
    }

    /// Prints a line of the table: to standard error where the record goes to standard output.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn say(&self, line: &str) -> anyhow::Result<()> {
        match self.common.json.as_deref() == Some(Path::new("-")) {
            true => eprintln!("{line}"),
            false => l2p_bins::print(&format!("{line}\n"))?,
        }
        Ok(())
    }

    /// Whether the case of this name is to be measured. With `--once` none is: the one that was asked for is run by `once`.
    ///
    /// # Errors
    /// Those of `once`.
    pub fn wants(&mut self, name: &str, once: &mut dyn FnMut() -> l2p_engine::Result<()>) -> anyhow::Result<bool> {
        self.names.push(name.into());
        let Some(wanted) = &self.common.once else {
            return Ok(true);
        };
        if wanted == name {
            self.found = true;
            once()?;
            match &self.device {
                Device::Cpu => once()?,
                Device::Cuda(device) => device.profiled(once)?,
            }
            eprintln!("{name} ran once");
        }
        Ok(false)
    }

    /// Whether the case of this name is wanted at all, asked before its inputs are made.
    pub fn may_want(&mut self, name: &str) -> bool {
        let wanted = self.common.once.as_deref().is_none_or(|wanted| wanted == name);
        if !wanted {
            self.names.push(name.into());
        }
        wanted
    }

    /// Checks and measures a case, and adds its row.
    ///
    /// # Errors
    /// When it cannot be run. A wrong result is no error here, but at the end of the run.
    pub fn case(&mut self, case: Case<'_>) -> anyhow::Result<()> {
        match self.measure(case)? {
            Some(row) => self.add(row),
            None => Ok(()),
        }
    }

    /// Checks and measures a case; gives no row when it was only to be run once.
    ///
    /// # Errors
    /// As [`Bench::case`].
    pub fn measure(&mut self, case: Case<'_>) -> anyhow::Result<Option<Row>> {
        let Case {
            name,
            inputs,
            sets,
            call,
            check,
            tolerance,
            peer,
        } = case;
        if !self.wants(&name, &mut || call(0).map(drop))? {
            return Ok(None);
        }
        let results = call(0)?;
        let error = check(&results)?;
        drop(results);
        let (work, peak, resident) = self.peak_of(&mut || call(0).map(drop))?;
        let mut timer = Timer::new(&self.device, sets, call)?;
        let turns = self.take_turns(peer.as_ref(), &mut || timer.sample())?;
        drop(timer);
        let timing = Timing::of(turns.ours);
        let mut row = Row::new(&name, inputs, timing, work, self.ceilings()).checked(error, tolerance);
        row.peak_bytes = peak;
        row.activation_bytes = peak - resident;
        row.peers = turns.peers;
        Ok(Some(row))
    }

    /// Work, peak of memory and what was held before of a call that is warm.
    ///
    /// # Errors
    /// Those of `call`.
    pub fn peak_of(&self, call: &mut dyn FnMut() -> l2p_engine::Result<()>) -> anyhow::Result<(Work, u64, u64)> {
        self.device.synchronize()?;
        self.device.reset_memory_peaks();
        let resident = self.device.memory_report().total.current;
        let ((), profile) = measure(&self.device, call)?;
        self.device.synchronize()?;
        Ok((profile.work(), self.device.memory_report().total.peak, resident))
    }

    /// Samples of ours in alternation with the peer's.
    ///
    /// # Errors
    /// Those of `ours`; what happens to the peer is told in its row.
    pub fn take_turns(
        &mut self,
        peer: Option<&Value>,
        ours: &mut dyn FnMut() -> l2p_engine::Result<f64>,
    ) -> anyhow::Result<Turns> {
        let repeats = self.common.repeats as usize;
        match (&mut self.peer, peer) {
            (Some(process), Some(case)) => process.take_turns(case, repeats, ours),
            _ => Ok(Turns {
                ours: (0..repeats).map(|_| ours()).collect::<l2p_engine::Result<_>>()?,
                peers: Vec::new(),
            }),
        }
    }

    /// Adds a row and prints it.
    ///
    /// # Errors
    /// When it cannot be printed.
    pub fn add(&mut self, row: Row) -> anyhow::Result<()> {
        self.say(&row.line())?;
        self.record.rows.push(row);
        Ok(())
    }

    /// Ends the run: writes the record.
    ///
    /// # Errors
    /// When it cannot be written, a result was wrong, or there was no case of the name after `--once`.
    pub fn finish(self) -> anyhow::Result<()> {
        if let Some(name) = &self.common.once {
            if !self.found {
                bail!("there is no case `{name}`; there are {}", self.names.join(", "));
            }
            return Ok(());
        }
        if let Some(path) = &self.common.json {
            write_json(path, &self.record)?;
        }
        let wrong: Vec<&str> = self
            .record
            .rows
            .iter()
            .filter(|row| !row.pass)
            .map(|row| row.name.as_str())
            .collect();
        match wrong[..] {
            [] => Ok(()),
            _ => bail!("wrong results: {}", wrong.join(", ")),
        }
    }
}
