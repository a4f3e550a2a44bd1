//! Who this process is among those that were started together: read from what the launcher left in the environment.
//!
//! | launcher | rank and ranks | place on the machine | where rank 0 listens |
//! | --- | --- | --- | --- |
//! | torchrun, and this project's own | `RANK`, `WORLD_SIZE` | `LOCAL_RANK`, `LOCAL_WORLD_SIZE` | `MASTER_ADDR`, `MASTER_PORT` |
//! | Open MPI | `OMPI_COMM_WORLD_RANK`, `_SIZE` | `OMPI_COMM_WORLD_LOCAL_RANK`, `_LOCAL_SIZE` | this machine, if it has all ranks |
//! | Slurm (`srun`) | `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS` | `SLURM_LOCALID` | the first host of the step |
//!
//! The first that is complete counts, since torchrun may itself have been started by one of the others. `MASTER_ADDR`, `MASTER_PORT`
//! and, before both, `L2P_MASTER_PORT` overrule what is derived for Open MPI and Slurm. Ports that are derived lie from 20000 to 29999,
//! outside the range from which Linux takes ports for connections. All of this is a function of the variables alone.

mod slurm;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, TcpListener};

use crate::device::{CudaDevice, Device, DeviceChoice, DeviceOptions, visible_gpus};
use crate::error::{Error, Result};
use crate::limits::Ranks;
use crate::printable::shown_name;

/// Environment variables.
pub type Variables = BTreeMap<String, String>;

/// Overrules every other port.
const PORT_VARIABLE: &str = "L2P_MASTER_PORT";

/// Ports that are derived: the first, and how many there are.
const PORTS: (u16, u64) = (20_000, 10_000);

/// What started the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// This project's own (`--ranks`), torchrun, or variables set by hand.
    Torchrun,
    /// `mpirun` of Open MPI.
    OpenMpi,
    /// `srun`.
    Slurm,
    /// Threads of one process, see [`Launch::in_process`].
    Threads,
}

/// One rank's place, and where the ranks meet.
#[derive(Debug)]
pub struct Launch {
    /// What started it.
    pub launcher: Launcher,
    /// Its number, from 0.
    pub rank: usize,
    /// Ranks in all.
    pub world: usize,
    /// Its number among the ranks of its machine.
    pub local_rank: usize,
    /// Ranks on its machine, where the launcher tells.
    pub local_world: Option<usize>,
    /// Where rank 0 listens: a name or an address.
    pub host: String,
    /// The port on which it listens.
    pub port: u16,
    /// What tells these ranks from those of another run that may look for the same port.
    pub job: String,
    /// Rank 0's port, where it is open already.
    pub(super) listener: Option<TcpListener>,
}

impl Launch {
    /// This process's place, `None` where no launcher left a word.
    ///
    /// # Errors
    /// When the variables contradict each other or leave something open; the message names them.
    pub fn from_environment() -> Result<Option<Self>> {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
        };
        Self::from_variables(&std::env::vars_os().filter_map(text).collect())
    }

    /// As [`Launch::from_environment`], from these variables.
    ///
    /// # Errors
    /// As for [`Launch::from_environment`].
    pub fn from_variables(variables: &Variables) -> Result<Option<Self>> {
        let read = Reader(variables);
        let generic = (read.number("RANK")?, read.number("WORLD_SIZE")?);
        if let (Some(rank), Some(world)) = generic {
            return read.torchrun(rank, world).map(Some);
        }
        let found = match read.number("OMPI_COMM_WORLD_RANK")? {
            Some(rank) => Some(read.open_mpi(rank)?),
            // A shell of an allocation has SLURM_PROCID too, but is no step of it.
            None if read.text("SLURM_STEP_ID").is_some() => {
                read.number("SLURM_PROCID")?.map(|rank| read.slurm(rank)).transpose()?
            }
            None => None,
        };
        let given = [("RANK", generic.0), ("WORLD_SIZE", generic.1)];
        let given = given.into_iter().find_map(|(name, value)| Some((name, value?)));
        match (&found, given) {
            (Some(found), Some((name, value))) => {
                let (own, launcher) = match name {
                    "RANK" => (found.rank, found.launcher),
                    _ => (found.world, found.launcher),
                };
                if value != own {
                    let launcher = launcher.name();
                    return Err(Error::invalid(format!(
                        "{name} is {value}, but {launcher} says {own}: remove {name}, or set both RANK and WORLD_SIZE"
                    )));
                }
            }
            (None, Some((name, _))) => {
                let missing = if name == "RANK" { "WORLD_SIZE" } else { "RANK" };
                return Err(Error::invalid(format!(
                    "{name} is set, but {missing} is not: a launcher such as torchrun sets both; remove {name} to run alone"
                )));
            }
            _ => {}
        }
        Ok(found)
    }

    /// The places of `world` ranks that are threads of this process, for tests: rank 0's port is open when this returns.
    ///
    /// # Errors
    /// When no port can be opened.
    pub fn in_process(world: usize) -> Result<Vec<Self>> {
        let open = || {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            Ok((listener.local_addr()?.port(), listener))
        };
        let (port, listener) =
            open().map_err(|error: std::io::Error| Error::invalid(format!("cannot open a port: {error}")))?;
        let mut listener = Some(listener);
        let place = |rank| Launch {
            launcher: Launcher::Threads,
            rank,
            world,
            local_rank: rank,
            local_world: Some(world),
            host: Ipv4Addr::LOCALHOST.to_string(),
            port,
            job: format!("threads of process {}", std::process::id()),
            listener: listener.take(),
        };
        Ok((0..world).map(place).collect())
    }

    /// Whether all ranks run on this machine, as far as the launcher tells.
    pub fn on_one_machine(&self) -> bool {
        self.local_world == Some(self.world)
    }

    /// The device of this rank: the GPU of its place on the machine, or the CPU where that is chosen or no GPU can be used.
    ///
    /// # Errors
    /// When a GPU is asked for and cannot be used, when one of several is named for all ranks, or when the machine has too few.
    pub fn open_device(&self, choice: DeviceChoice) -> Result<Device> {
        DeviceOptions::of_process()?;
        match self.device_index(choice, || visible_gpus().unwrap_or(0))? {
            Some(index) if choice == DeviceChoice::Auto => Device::open(DeviceChoice::Cuda(index)).or_else(|reason| {
                tracing::debug!("running on the CPU: {reason}");
                Ok(Device::Cpu)
            }),
            Some(index) => CudaDevice::open(index).map(Device::Cuda),
            None => Ok(Device::Cpu),
        }
    }

    fn device_index(&self, choice: DeviceChoice, gpus: impl Fn() -> usize) -> Result<Option<usize>> {
        match choice {
            DeviceChoice::Cpu => Ok(None),
            DeviceChoice::Cuda(index) if self.world == 1 => Ok(Some(index)),
            DeviceChoice::Cuda(index) if index > 0 => Err(Error::invalid(format!(
                "--device cuda:{index} names one GPU, but there are {} ranks: each takes the GPU of its place on its machine, so \
                 say --device cuda",
                self.world
            ))),
            DeviceChoice::Auto | DeviceChoice::Cuda(_) => match gpus() {
                0 => Ok((choice != DeviceChoice::Auto).then_some(0)),
                // Where the launcher shows each rank a GPU of its own, all of them are the first.
                1 => Ok(Some(0)),
                gpus if self.local_rank < gpus => Ok(Some(self.local_rank)),
                gpus => Err(Error::invalid(format!(
                    "rank {} is number {} on its machine, which shows {gpus} GPUs: start no more than one rank for each",
                    self.rank,
                    self.local_rank + 1
                ))),
            },
        }
    }
}

impl Launcher {
    /// The name, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Launcher::Torchrun => "torchrun",
            Launcher::OpenMpi => "Open MPI",
            Launcher::Slurm => "Slurm",
            Launcher::Threads => "this process",
        }
    }
}

/// Reads variables.
struct Reader<'a>(&'a Variables);

impl Reader<'_> {
    /// A variable that is set and not empty.
    fn text(&self, name: &str) -> Option<&str> {
        self.0
            .get(name)
            .map(|value| value.trim())
            .filter(|value| !value.is_empty())
    }

    fn number(&self, name: &str) -> Result<Option<usize>> {
        let parse = |text: &str| {
            text.parse().map_err(|_| {
                let text = shown_name(text);
                Error::invalid(format!("{name} is `{text}`, which is not a whole number"))
            })
        };
        self.text(name).map(parse).transpose()
    }

    fn needed(&self, name: &str, why: &str) -> Result<usize> {
        self.number(name)?
            .ok_or_else(|| Error::invalid(format!("{name} is not set, but {why}")))
    }

    fn port(&self, name: &str) -> Result<Option<u16>> {
        match self.number(name)? {
            None => Ok(None),
            Some(port) => match u16::try_from(port) {
                Ok(port) if port > 0 => Ok(Some(port)),
                _ => Err(Error::invalid(format!("{name} is {port}; a port lies from 1 to 65535"))),
            },
        }
    }

    fn torchrun(&self, rank: usize, world: usize) -> Result<Launch> {
        let local_world = self.number("LOCAL_WORLD_SIZE")?;
        let host = match self.text("MASTER_ADDR") {
            Some(host) => host.to_owned(),
            None if world == 1 => Ipv4Addr::LOCALHOST.to_string(),
            None => return Err(not_told("MASTER_ADDR", "the machine of rank 0", world)),
        };
        let local_rank = match self.number("LOCAL_RANK")? {
            Some(local_rank) => local_rank,
            None if world == 1 || is_loopback(&host) => rank,
            None => return Err(not_told("LOCAL_RANK", "this rank's number on its machine", world)),
        };
        let run = self.text("TORCHELASTIC_RUN_ID").unwrap_or("none");
        let given = self.port("MASTER_PORT")?;
        // Where torchrun keeps its own store on that port, rank 0 needs another.
        let taken = self.text("TORCHELASTIC_USE_AGENT_STORE") == Some("True");
        let port = match (self.port(PORT_VARIABLE)?, given) {
            (Some(port), _) => port,
            (None, Some(port)) if taken => derived_port(&format!("{run} {port}")),
            (None, Some(port)) => port,
            (None, None) if world == 1 => 0,
            (None, None) => return Err(not_told("MASTER_PORT", "a free port of rank 0's machine", world)),
        };
        let job = format!("{run} {}", given.unwrap_or(0));
        let launch = Launch {
            launcher: Launcher::Torchrun,
            rank,
            world,
            local_rank,
            local_world,
            host,
            port,
            job,
            listener: None,
        };
        launch.checked(["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
    }

    fn open_mpi(&self, rank: usize) -> Result<Launch> {
        const NAMES: [&str; 4] = [
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        ];
        let why = "OMPI_COMM_WORLD_RANK is: start with mpirun";
        let world = self.needed(NAMES[1], why)?;
        let local_rank = self.needed(NAMES[2], why)?;
        let local_world = self.needed(NAMES[3], why)?;
        let host = match self.text("MASTER_ADDR") {
            Some(host) => host.to_owned(),
            None if local_world >= world => Ipv4Addr::LOCALHOST.to_string(),
            None => {
                return Err(Error::invalid(format!(
                    "Open MPI does not tell which of its machines has rank 0: add -x MASTER_ADDR=HOST to mpirun, with the name \
                     of the first machine (here are {local_world} of {world} ranks)"
                )));
            }
        };
        let job = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"]
            .into_iter()
            .find_map(|name| self.text(name))
            .unwrap_or("mpirun")
            .to_owned();
        let launch = Launch {
            launcher: Launcher::OpenMpi,
            rank,
            world,
            local_rank,
            local_world: Some(local_world),
            host,
            port: self.given_port()?.unwrap_or_else(|| derived_port(&job)),
            job,
            listener: None,
        };
        launch.checked(NAMES)
    }

    fn slurm(&self, rank: usize) -> Result<Launch> {
        let why = "SLURM_PROCID is: start with srun";
        let tasks = ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"]
            .into_iter()
            .find(|name| self.text(name).is_some())
            .unwrap_or("SLURM_STEP_NUM_TASKS");
        let world = self.needed(tasks, why)?;
        let local_rank = self.needed("SLURM_LOCALID", why)?;
        let (list_name, list) = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"]
            .into_iter()
            .find_map(|name| Some((name, self.text(name)?)))
            .unwrap_or(("SLURM_STEP_NODELIST", ""));
        let host = match self.text("MASTER_ADDR") {
            Some(host) => host.to_owned(),
            None => slurm::first_host(list).ok_or_else(|| {
                let list = shown_name(list);
                Error::invalid(format!(
                    "{list_name} is `{list}`, which names no host: set MASTER_ADDR to that of rank 0"
                ))
            })?,
        };
        let job = [self.text("SLURM_JOB_ID"), self.text("SLURM_STEP_ID")].map(|part| part.unwrap_or("0"));
        let job = job.join(".");
        let one_machine = self.number("SLURM_STEP_NUM_NODES")? == Some(1);
        let launch = Launch {
            launcher: Launcher::Slurm,
            rank,
            world,
            local_rank,
            local_world: one_machine.then_some(world),
            host,
            port: self.given_port()?.unwrap_or_else(|| derived_port(&job)),
            job,
            listener: None,
        };
        launch.checked(["SLURM_PROCID", tasks, "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"])
    }

    fn given_port(&self) -> Result<Option<u16>> {
        Ok(self.port(PORT_VARIABLE)?.or(self.port("MASTER_PORT")?))
    }
}

impl Launch {
    /// Itself, if its numbers fit each other; `names` are the variables of rank, ranks, and the same two on this machine.
    fn checked(self, names: [&str; 4]) -> Result<Self> {
        let [rank, world, local_rank, local_world] = names;
        Ranks::checked(self.world).map_err(|reason| Error::invalid(format!("{world}: {reason}")))?;
        let below = |name: &str, number: usize, of: &str, count: usize| match number < count {
            true => Ok(()),
            false => Err(Error::invalid(format!(
                "{name} is {number}, but {of} is {count}: ranks are counted from 0"
            ))),
        };
        below(rank, self.rank, world, self.world)?;
        below(local_rank, self.local_rank, world, self.world)?;
        if let Some(count) = self.local_world {
            below(local_rank, self.local_rank, local_world, count)?;
            if count > self.world {
                return Err(Error::invalid(format!(
                    "{local_world} is {count}, but {world} is {}",
                    self.world
                )));
            }
        }
        Ok(self)
    }
}

fn not_told(name: &str, what: &str, world: usize) -> Error {
    Error::invalid(format!(
        "{name} is not set: {world} ranks need {what} (torchrun sets it; by hand: export {name}=…)"
    ))
}

fn is_loopback(host: &str) -> bool {
    let address = host.parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// A port that is the same wherever `text` is, by the FNV-1a hash.
pub fn derived_port(text: &str) -> u16 {
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    // The low bits of this hash depend on the low bits of the text alone.
    PORTS.0 + ((hash ^ (hash >> 32)) % PORTS.1) as u16
}

#[cfg(test)]
mod tests;
