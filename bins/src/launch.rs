//! Many ranks of a program: its flags, this project's own launcher, and how a rank that another launcher started finds out.
//!
//! `--ranks N` makes a program start itself N times, with the variables that torchrun would set, and watch over these ranks: signals
//! are passed on, a rank's end that is no success ends all of them, and all may be started again. What ranks other than the first
//! print appears line by line with their number before it.

use std::fmt::Display;
use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use l2p_engine::dist::{Launch, Options, World, derived_port};
use l2p_engine::limits::{Count, Patience, Ranks};
use l2p_engine::{Device, DeviceChoice, Error};

use crate::{say, stop_requested};

/// What `--help` says about many ranks, for the long help of programs.
pub const RANKS_HELP: &str = "\
Many GPUs: --ranks N starts N ranks of the program on this machine, each on a GPU of its own (with
--device cpu: N processes that share the CPU). Over several machines, or instead, any of these does
the same, without --ranks:
  torchrun --no-python --nnodes 2 --nproc-per-node 8 … PROGRAM …
  srun --kill-on-bad-exit=1 --ntasks-per-node 8 PROGRAM …
  mpirun -np 8 PROGRAM …             (several machines: add -x MASTER_ADDR=HOST)
When a rank dies or hangs, all others end with one line that names it, and exit code 1.";

/// The variable that tells a rank which process started it.
const PARENT: &str = "L2P_PARENT";

/// How long ranks may take to end by themselves once one has failed; they know of it from each other.
const GRACE: Duration = Duration::from_secs(10);

/// How long they may take to end when told to.
const LAST_GRACE: Duration = Duration::from_secs(10);

/// Between two looks at the ranks.
const LOOK: Duration = Duration::from_millis(20);

/// Exit code of arguments that make no sense: starting again changes nothing.
const USAGE: u8 = 2;

/// How many ranks, and how long they wait for each other.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Many ranks")]
pub struct RankFlags {
    /// Start N ranks on this machine, each on a GPU of its own (with --device cpu: on the CPU)
    #[arg(long, visible_alias = "gpus", value_name = "N")]
    pub ranks: Option<Ranks>,
    /// With --ranks: start all ranks again, up to K times, when one fails
    #[arg(long, value_name = "K", default_value = "0", requires = "ranks")]
    pub max_restarts: Count,
    /// The longest that ranks wait for one that hangs
    #[arg(long, value_name = "SECONDS", default_value = "300")]
    pub rank_timeout: Patience,
    /// The longest that ranks wait for each other to start
    #[arg(long, value_name = "SECONDS", default_value = "300")]
    pub start_timeout: Patience,
}

impl RankFlags {
    /// How ranks meet and wait.
    pub fn options(&self) -> Options {
        let options = Options {
            start: Duration::from_secs(self.start_timeout.into()),
            interrupted: stop_requested,
            ..Options::default()
        };
        options.with_patience(Duration::from_secs(self.rank_timeout.into()))
    }

    /// The device of this rank, by the user's choice, and its connections to the others; alone where no launcher started this process.
    ///
    /// # Errors
    /// When there is no such device, or the ranks do not meet.
    pub fn join(&self, launch: Option<Launch>, choice: DeviceChoice) -> anyhow::Result<(Device, World)> {
        let Some(launch) = launch else {
            return Ok((Device::open(choice)?, World::solo()));
        };
        let device = launch.open_device(choice)?;
        let world = World::join(launch, &device, &self.options())?;
        Ok((device, world))
    }

    /// Runs a program's work: as one rank where a launcher started this process, which `work` is told; alone where neither that nor
    /// `--ranks` says otherwise; and else as the launcher of ranks that do. Errors are printed and counted as
    /// [`run`](crate::run) does; a launcher ends with the worst code of its ranks.
    pub fn run(&self, work: impl FnOnce(Option<Launch>) -> anyhow::Result<()>) -> ExitCode {
        let mut worst = 0;
        let outcome = crate::run(|| {
            end_with_parent();
            let launch = Launch::from_environment()?;
            match (launch, self.ranks) {
                (Some(launch), ranks) => {
                    ensure_ranks(&launch, ranks)?;
                    work(Some(launch))
                }
                (None, Some(ranks)) if ranks.get() > 1 => {
                    worst = Launcher::new(ranks.get())?.run(self.max_restarts.get())?;
                    Ok(())
                }
                (None, _) => work(None),
            }
        });
        match worst {
            0 => outcome,
            code => ExitCode::from(code),
        }
    }
}

/// Ends this rank's part by what came of its work: in agreement with the others after success, and after Ctrl-C, which all ranks come to
/// together; else on all of them, with the error as the reason.
///
/// # Errors
/// That of the work, and when a rank was lost.
pub fn part(world: &World, outcome: anyhow::Result<()>) -> anyhow::Result<()> {
    match &outcome {
        Ok(()) => world.leave()?,
        Err(error) if matches!(error.downcast_ref(), Some(Error::Interrupted)) => world.leave()?,
        Err(error) => world.give_up(&crate::one_line(error)),
    }
    outcome
}

/// Where another launcher started this rank, `--ranks` may only repeat what that one says.
fn ensure_ranks(launch: &Launch, ranks: Option<Ranks>) -> anyhow::Result<()> {
    let (Some(asked), Some(started)) = (ranks, launch.local_world) else {
        return Ok(());
    };
    anyhow::ensure!(
        asked.get() == started,
        "--ranks asks for {asked} ranks on this machine, but {} has started {started}: leave --ranks away",
        launch.launcher.name()
    );
    Ok(())
}

/// Whether this process is a rank that this project's own launcher started.
pub fn is_own_rank() -> bool {
    std::env::var_os(PARENT).is_some()
}

/// Starts ranks and watches over them.
struct Launcher {
    world: usize,
    program: std::path::PathBuf,
}

/// A rank that was started.
struct Rank {
    number: usize,
    child: Child,
    status: Option<ExitStatus>,
    readers: Vec<JoinHandle<()>>,
}

/// How all ranks ended.
struct Outcome {
    /// The worst exit code.
    code: u8,
    /// The first rank that failed, in words.
    failure: Option<String>,
}

impl Launcher {
    fn new(world: usize) -> anyhow::Result<Self> {
        Ok(Launcher {
            world,
            program: std::env::current_exe().context("cannot find this program to start it again")?,
        })
    }

    /// Runs all ranks, again after a failure, and returns the exit code.
    fn run(&self, restarts: usize) -> anyhow::Result<u8> {
        let mut restarted = 0;
        loop {
            let outcome = self.attempt()?;
            let Some(failure) = outcome.failure else {
                return Ok(outcome.code);
            };
            if outcome.code == USAGE || stop_requested() || restarted == restarts {
                say(format_args!("note: {failure}"));
                return Ok(outcome.code);
            }
            restarted += 1;
            say(format_args!(
                "note: {failure}; starting all ranks again ({restarted} of {restarts})"
            ));
        }
    }

    fn attempt(&self) -> anyhow::Result<Outcome> {
        let port = free_port().context("cannot find a free port")?;
        let job = format!("{} {port} {:?}", std::process::id(), Instant::now());
        let mut ranks = Vec::with_capacity(self.world);
        for number in 0..self.world {
            match self.start(number, port, &job) {
                Ok(rank) => ranks.push(rank),
                Err(error) => {
                    ranks.iter_mut().for_each(|rank| rank.signal(Signal::Kill));
                    return Err(error.context(format!("cannot start rank {number}")));
                }
            }
        }
        Ok(watch(&mut ranks))
    }

    fn start(&self, number: usize, port: u16, job: &str) -> anyhow::Result<Rank> {
        let mut command = Command::new(&self.program);
        command.args(std::env::args_os().skip(1));
        for (name, value) in [
            ("RANK", number.to_string()),
            ("WORLD_SIZE", self.world.to_string()),
            ("LOCAL_RANK", number.to_string()),
            ("LOCAL_WORLD_SIZE", self.world.to_string()),
            ("MASTER_ADDR", Ipv4Addr::LOCALHOST.to_string()),
            ("MASTER_PORT", port.to_string()),
            ("TORCHELASTIC_RUN_ID", job.to_owned()),
            (PARENT, std::process::id().to_string()),
        ] {
            command.env(name, value);
        }
        command
            .env_remove("TORCHELASTIC_USE_AGENT_STORE")
            .env_remove("L2P_MASTER_PORT");
        if std::env::var_os("RAYON_NUM_THREADS").is_none() {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            command.env("RAYON_NUM_THREADS", (cores / self.world).max(1).to_string());
        }
        command.stdin(Stdio::null());
        if number > 0 {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        // Ctrl-C in a terminal reaches a whole group; ranks get it from their launcher, once.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn()?;
        let mut readers = Vec::new();
        readers.extend(child.stdout.take().map(|output| repeat(number, output)));
        readers.extend(child.stderr.take().map(|output| repeat(number, output)));
        Ok(Rank {
            number,
            child,
            status: None,
            readers,
        })
    }
}

/// Repeats what a rank prints, with its number before each line.
fn repeat(number: usize, output: impl Read + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        // A line that cannot be read is the last.
        while output.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end();
            if !text.is_empty() {
                say(format_args!("rank {number}: {text}"));
            }
            line.clear();
        }
    })
}

/// A port that nobody listens at, outside the range from which the system takes ports for connections: one of those could take it before
/// rank 0 listens there.
fn free_port() -> std::io::Result<u16> {
    const TRIES: usize = 100;
    let now = Instant::now();
    let mut last = None;
    for number in 0..TRIES {
        let port = derived_port(&format!("{} {now:?} {number}", std::process::id()));
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Ok(_) => return Ok(port),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| std::io::ErrorKind::AddrInUse.into()))
}

/// Waits for all ranks to end, and sees to it that they do once one has failed.
fn watch(ranks: &mut [Rank]) -> Outcome {
    let mut failure: Option<(Instant, String)> = None;
    let mut told = false;
    let mut killed = false;
    loop {
        let ended = ranks.iter_mut().filter_map(Rank::look).collect::<Vec<_>>();
        // Of those that ended since the last look, one that was killed is rather the cause than the effect.
        let cause = ended.iter().filter(|(_, status)| !status.success());
        let cause = cause.min_by_key(|(_, status)| (status.code().is_some(), status.code()));
        if let (None, Some((number, status))) = (&failure, cause)
            && !stop_requested()
        {
            failure = Some((Instant::now(), format!("rank {number} {}", describe(*status))));
        }
        if ranks.iter().all(|rank| rank.status.is_some()) {
            break;
        }
        let waited = failure.as_ref().map(|(since, _)| since.elapsed());
        let late = waited.is_some_and(|waited| waited > GRACE);
        if !told && (stop_requested() || late) {
            told = true;
            ranks.iter_mut().for_each(|rank| rank.signal(Signal::Terminate));
        }
        if !killed && waited.is_some_and(|waited| waited > GRACE + LAST_GRACE) {
            killed = true;
            ranks.iter_mut().for_each(|rank| rank.signal(Signal::Kill));
        }
        std::thread::sleep(LOOK);
    }
    for reader in ranks.iter_mut().flat_map(|rank| rank.readers.drain(..)) {
        // A panic of the thread was printed where it happened.
        let _ = reader.join();
    }
    Outcome {
        code: ranks.iter().filter_map(|rank| rank.status).map(code).max().unwrap_or(0),
        failure: failure.map(|(_, failure)| failure),
    }
}

#[derive(Clone, Copy)]
enum Signal {
    Terminate,
    Kill,
}

impl Rank {
    /// Its number and status, if it has ended since the last look.
    fn look(&mut self) -> Option<(usize, ExitStatus)> {
        if self.status.is_some() {
            return None;
        }
        // That a child of this process cannot be waited for does not happen.
        self.status = self.child.try_wait().ok()?;
        self.status.map(|status| (self.number, status))
    }

    /// Sends a signal, unless it has ended.
    fn signal(&mut self, signal: Signal) {
        if self.status.is_some() {
            return;
        }
        // One that has just ended needs none.
        #[cfg(unix)]
        {
            let signal = match signal {
                Signal::Terminate => rustix::process::Signal::TERM,
                Signal::Kill => rustix::process::Signal::KILL,
            };
            let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal);
        }
        #[cfg(not(unix))]
        if matches!(signal, Signal::Terminate | Signal::Kill) {
            let _ = self.child.kill();
        }
    }
}

/// A status as an exit code, as shells count.
fn code(status: ExitStatus) -> u8 {
    match status.code() {
        Some(code) => u8::try_from(code).unwrap_or(1),
        None => 128 + u8::try_from(signal_of(status).unwrap_or(0)).unwrap_or(0),
    }
}

fn describe(status: ExitStatus) -> impl Display {
    match (status.code(), signal_of(status)) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "was ended".into(),
    }
}

fn signal_of(status: ExitStatus) -> Option<i32> {
    #[cfg(unix)]
    return std::os::unix::process::ExitStatusExt::signal(&status);
    #[cfg(not(unix))]
    return None;
}

/// Sees to it that a rank ends when the launcher that started it is killed.
fn end_with_parent() {
    #[cfg(target_os = "linux")]
    if let Some(parent) = std::env::var(PARENT).ok().and_then(|text| text.parse::<i32>().ok()) {
        // Where the system refuses, the rank goes on by itself, as under any other launcher.
        let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM));
        let now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
        // It may have ended before the line above; but a parent that was inherited from further up is not this rank's.
        if now == Some(1) && parent != 1 {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM);
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        ranks: RankFlags,
    }

    #[test]
    fn flags_are_read_and_bounded() {
        Program::command().debug_assert();
        let flags = |arguments: &[&str]| {
            let all = std::iter::once("program").chain(arguments.iter().copied());
            Program::try_parse_from(all).map(|program| program.ranks)
        };
        assert!(flags(&[]).unwrap().ranks.is_none());
        let flags_given = flags(&["--gpus", "4", "--max-restarts", "2", "--rank-timeout", "5"]).unwrap();
        assert_eq!(
            (flags_given.ranks.unwrap().get(), flags_given.max_restarts.get()),
            (4, 2)
        );
        let options = flags_given.options();
        assert_eq!(
            (options.operation, options.silence),
            (Duration::from_secs(5), Duration::from_secs(5))
        );
        assert_eq!(options.start, Duration::from_secs(300));
        for bad in [
            &["--ranks", "0"][..],
            &["--ranks", "5000"],
            &["--max-restarts", "1"],
            &["--rank-timeout", "0"],
        ] {
            assert!(flags(bad).is_err(), "{bad:?}");
        }
    }
}
