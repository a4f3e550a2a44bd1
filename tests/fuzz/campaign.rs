//! Many cases by several workers, one process each, with an end to those that die, hang or take all memory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::case::{self, Campaign};
use crate::worker::Report;

/// A case may take so much of a processor's time, …
const MOST_SECONDS: f64 = 5.0;
/// … and, should it wait for something, so much time at all.
const MOST_WAIT: Duration = Duration::from_secs(60);

/// Cases that a worker is told of at once.
const BLOCK: u64 = 500;

/// Findings that are kept in full; of more, only the number.
const MOST_FINDINGS: usize = 200;

/// What is to be done, and where.
pub struct Plan {
    /// Which cases.
    pub campaign: Campaign,
    /// How many.
    pub cases: u64,
    /// Processes.
    pub workers: usize,
    /// Where the base and the campaign's state are.
    pub folder: PathBuf,
    /// How often a line of progress is printed.
    pub every: Duration,
}

/// What is known of one reader.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    cases: u64,
    accepted: u64,
    drawn: u64,
    refused: u64,
    /// The most bytes allocated at once by one case.
    peak_bytes: usize,
    /// Of all cases together, and of the slowest.
    seconds: f64,
    slowest_seconds: f64,
    slowest_case: u64,
}

/// A case that did not end as it may.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Finding {
    case: u64,
    reader: String,
    end: String,
    message: String,
}

/// The campaign so far; what the summary says, and what a campaign goes on from.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    seed: u64,
    /// Every block below is done.
    blocks: u64,
    /// And these.
    further: BTreeSet<u64>,
    seconds: f64,
    /// Cases in all, by how they ended.
    ends: BTreeMap<String, u64>,
    /// Cases that ended as they may not.
    pub unexpected: u64,
    peak_bytes: usize,
    readers: BTreeMap<String, Tally>,
    findings: Vec<Finding>,
}

impl State {
    /// The state in `folder`, or a new one.
    fn load(folder: &Path, seed: u64) -> Self {
        let read = || serde_json::from_slice::<State>(&std::fs::read(folder.join("state.json")).ok()?).ok();
        read().filter(|state| state.seed == seed).unwrap_or(State {
            seed,
            ..State::default()
        })
    }

    fn save(&self, folder: &Path) -> anyhow::Result<()> {
        let beside = folder.join("state.json.new");
        std::fs::write(&beside, serde_json::to_vec_pretty(self)?)?;
        Ok(std::fs::rename(beside, folder.join("state.json"))?)
    }

    fn cases(&self) -> u64 {
        self.ends.values().sum()
    }

    fn is_done(&self, block: u64) -> bool {
        block < self.blocks || self.further.contains(&block)
    }

    fn done(&mut self, block: u64) {
        self.further.insert(block);
        while self.further.remove(&self.blocks) {
            self.blocks += 1;
        }
    }

    fn add(&mut self, case: u64, report: &Report) {
        *self.ends.entry(report.end.clone()).or_default() += 1;
        self.peak_bytes = self.peak_bytes.max(report.peak);
        let tally = self.readers.entry(report.reader.clone()).or_default();
        tally.cases += 1;
        tally.peak_bytes = tally.peak_bytes.max(report.peak);
        tally.seconds += report.seconds;
        if report.seconds > tally.slowest_seconds {
            (tally.slowest_seconds, tally.slowest_case) = (report.seconds, case);
        }
        match report.end.as_str() {
            "accepted" => tally.accepted += 1,
            "drawn" => tally.drawn += 1,
            "refused" => tally.refused += 1,
            _ => {
                self.unexpected += 1;
                let of_kind = |finding: &&Finding| finding.reader == report.reader && finding.end == report.end;
                let alike = self.findings.iter().filter(of_kind).count();
                if self.findings.len() < MOST_FINDINGS && alike < 20 {
                    self.findings.push(Finding {
                        case,
                        reader: report.reader.clone(),
                        end: report.end.clone(),
                        message: report.message.clone(),
                    });
                }
            }
        }
    }

    /// The summary as JSON.
    pub fn summary(&self) -> serde_json::Value {
        let mut summary = serde_json::to_value(self).unwrap_or_default();
        if let Some(entries) = summary.as_object_mut() {
            entries.remove("blocks");
            entries.remove("further");
            entries.insert("cases".into(), self.cases().into());
        }
        summary
    }

    /// The summary for people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<24}{:>10}{:>10}{:>10}{:>10}{:>12}{:>10}{:>10}\n",
            "", "cases", "accepted", "drawn", "refused", "peak", "mean", "slowest"
        );
        for (name, tally) in &self.readers {
            text += &format!(
                "{name:<24}{:>10}{:>10}{:>10}{:>10}{:>9} MB{:>7.2} ms{:>8.2} s\n",
                tally.cases,
                tally.accepted,
                tally.drawn,
                tally.refused,
                tally.peak_bytes >> 20,
                1e3 * tally.seconds / tally.cases.max(1) as f64,
                tally.slowest_seconds
            );
        }
        for (end, count) in &self.ends {
            text += &format!("{end}: {count}\n");
        }
        for finding in self.findings.iter().take(40) {
            text += &format!(
                "case {}: {}: {}: {}\n",
                finding.case, finding.reader, finding.end, finding.message
            );
        }
        text
    }
}

/// Runs the campaign, or what is left of it.
///
/// # Errors
/// When workers cannot be started or the disk fails; findings are no errors.
pub fn run(plan: &Plan) -> anyhow::Result<State> {
    let blocks = plan.cases.div_ceil(BLOCK);
    let state = Mutex::new(State::load(&plan.folder, plan.campaign.seed));
    let (next, failed) = (Mutex::new(0), Mutex::new(None));
    let take = || {
        let mut next = lock(&next);
        let state = lock(&state);
        while *next < blocks && state.is_done(*next) {
            *next += 1;
        }
        let block = *next;
        *next += 1;
        (block < blocks).then_some(block)
    };
    let (begun, before) = (Instant::now(), lock(&state).seconds);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..plan.workers)
            .map(|number| {
                let (take, state, failed) = (&take, &state, &failed);
                scope.spawn(move || {
                    if let Err(error) = work(plan, number, take, state) {
                        lock(failed).get_or_insert(error);
                    }
                })
            })
            .collect();
        let mut said = Instant::now();
        let mut saved = Instant::now();
        while workers.iter().any(|worker| !worker.is_finished()) {
            std::thread::sleep(Duration::from_millis(50));
            lock(&state).seconds = before + begun.elapsed().as_secs_f64();
            if said.elapsed() > plan.every {
                said = Instant::now();
                eprintln!("{}", progress(&lock(&state), plan.cases));
            }
            if saved.elapsed() > Duration::from_secs(5) {
                saved = Instant::now();
                let _ = lock(&state).save(&plan.folder);
            }
        }
    });
    if let Some(error) = lock(&failed).take() {
        return Err(error);
    }
    let state = state.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    state.save(&plan.folder)?;
    Ok(state)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn progress(state: &State, cases: u64) -> String {
    let done = state.cases();
    let rate = done as f64 / state.seconds.max(1e-3);
    let left = cases.saturating_sub(done) as f64 / rate.max(1e-3);
    format!(
        "{done} of {cases} cases, {rate:.0} a second, {:.0} min left, {} unexpected, at most {} MB",
        left / 60.0,
        state.unexpected,
        state.peak_bytes >> 20
    )
}

/// Works through blocks with one process after another.
fn work(plan: &Plan, number: usize, take: &dyn Fn() -> Option<u64>, state: &Mutex<State>) -> anyhow::Result<()> {
    // In memory where there is such a place: every case writes files.
    let memory = Path::new("/dev/shm");
    let scratch = match memory.is_dir() {
        true => tempfile::tempdir_in(memory)?,
        false => tempfile::tempdir()?,
    };
    let mut process = None;
    while let Some(block) = take() {
        let (mut first, end) = (block * BLOCK, ((block + 1) * BLOCK).min(plan.cases));
        // Counted when the block is done: one that is interrupted is run again.
        let mut reports = Vec::new();
        while first < end {
            let mut running = match process.take() {
                Some(running) => running,
                None => Process::start(plan, number, scratch.path())?,
            };
            match running.run(first, end, &mut |case, report| reports.push((case, report)))? {
                Stopped::Done => {
                    first = end;
                    process = Some(running);
                }
                Stopped::At(case, None) => first = case,
                Stopped::At(case, Some((kind, message))) => {
                    let report = Report {
                        reader: case::reader_of(plan.campaign, case).name.into(),
                        end: kind.into(),
                        message,
                        peak: 0,
                        seconds: 0.0,
                    };
                    reports.push((case, report));
                    first = case + 1;
                }
            }
        }
        let mut state = lock(state);
        reports.iter().for_each(|(case, report)| state.add(*case, report));
        state.done(block);
    }
    Ok(())
}

/// How a range of cases came to its end.
enum Stopped {
    /// All were run.
    Done,
    /// The process ended before this case; what killed it, unless it chose to.
    At(u64, Option<(&'static str, String)>),
}

/// A worker.
struct Process {
    child: Child,
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    /// Where its standard error goes.
    words: PathBuf,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    fn start(plan: &Plan, number: usize, scratch: &Path) -> anyhow::Result<Self> {
        let socket = scratch.join("socket");
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)?;
        let words = scratch.join("stderr");
        let mut child = Command::new(std::env::current_exe()?)
            .arg("worker")
            .args([&socket, &plan.folder.join("base"), scratch])
            .arg(plan.campaign.seed.to_string())
            .args(plan.campaign.planted.then_some("--planted"))
            // The processes share the processors among them.
            .env("RAYON_NUM_THREADS", "1")
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::options().create(true).append(true).open(&words)?)
            .spawn()
            .context("a worker does not start")?;
        listener.set_nonblocking(true)?;
        let begun = Instant::now();
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error.into()),
                Err(_) => {}
            }
            if child.try_wait()?.is_some() || begun.elapsed() > MOST_WAIT {
                anyhow::bail!("worker {number} ended at once: {}", last_words(&words));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(Duration::from_millis(200)))?;
        Ok(Process {
            child,
            lines: BufReader::new(stream.try_clone()?),
            stream,
            words,
        })
    }

    fn run(&mut self, first: u64, end: u64, told: &mut dyn FnMut(u64, Report)) -> anyhow::Result<Stopped> {
        let _ = File::options()
            .write(true)
            .open(&self.words)
            .and_then(|file| file.set_len(0));
        let mut next = first;
        if writeln!(self.stream, "{first} {end}").is_err() {
            return Ok(Stopped::At(next, None));
        }
        let mut line = String::new();
        let (mut since, mut used) = (Instant::now(), self.processor_seconds());
        while next < end {
            match self.lines.read_line(&mut line) {
                Ok(0) => return self.died(next),
                Ok(_) if line.ends_with('\n') => {
                    let (case, report) = line.trim().split_once(' ').context("a worker's line is malformed")?;
                    told(case.parse()?, serde_json::from_str(report)?);
                    next += 1;
                    line.clear();
                    (since, used) = (Instant::now(), self.processor_seconds());
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    let seconds = self.processor_seconds() - used;
                    if seconds > MOST_SECONDS || since.elapsed() > MOST_WAIT {
                        let message = format!(
                            "{seconds:.1} s of a processor in {:.1} s",
                            since.elapsed().as_secs_f64()
                        );
                        return Ok(Stopped::At(next, Some(("hang", message))));
                    }
                }
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return self.died(next),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Stopped::Done)
    }

    /// What ended the process that was to run case `next`.
    fn died(&mut self, next: u64) -> anyhow::Result<Stopped> {
        let status = self.child.wait()?;
        let words = last_words(&self.words);
        if status.success() {
            return Ok(Stopped::At(next, None));
        }
        let told = |word: &str| words.contains(word);
        let kind = match () {
            () if told("overflowed its stack") => "stack overflow",
            () if told("memory allocation of") => "memory",
            () => "abort",
        };
        Ok(Stopped::At(next, Some((kind, format!("{status}: {words}")))))
    }

    /// Seconds of processors that the process has used; on systems that do not tell, the clock.
    fn processor_seconds(&self) -> f64 {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        let read = || {
            let text = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).ok()?;
            // The name may hold spaces and parentheses; the fields behind it do not.
            let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
            let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
            Some(ticks as f64 / 100.0)
        };
        read().unwrap_or_else(|| START.get_or_init(Instant::now).elapsed().as_secs_f64())
    }
}

/// What a process wrote to standard error about its end.
fn last_words(path: &Path) -> String {
    const OF_ENDS: [&str; 3] = ["overflowed its stack", "memory allocation of", "fatal runtime error"];
    let text = String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    let of_ends = lines
        .iter()
        .filter(|line| OF_ENDS.iter().any(|words| line.contains(words)));
    let of_ends: Vec<&str> = of_ends.copied().collect();
    let told = match of_ends.is_empty() {
        true => &lines[lines.len().saturating_sub(4)..],
        false => &of_ends,
    };
    told.join(" ").chars().take(300).collect()
}
