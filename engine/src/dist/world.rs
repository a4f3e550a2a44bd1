//! The ranks of a run, as one of them sees them.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::communicator::Communicator;
use super::control::{Control, Member};
use super::launch::Launch;
use super::solo::Solo;
use super::{Options, nccl, tcp};
use crate::device::Device;
use crate::error::{Error, Result};

/// A rank, for messages and reports.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Peer {
    /// Its machine's name.
    pub host: String,
    /// Its process there.
    pub pid: u32,
    /// `cpu`, or the GPU's own name among all GPUs.
    pub device: String,
}

/// How a rank's part in something went.
#[derive(PartialEq, Eq, Serialize, serde::Deserialize)]
enum Went {
    Well,
    Interrupted,
    Wrong(String),
}

/// This rank's connections to the others; see the head comment of [`dist`](super). Dropping it without [`World::leave`] ends the run on
/// all ranks.
pub struct World {
    // Before the control plane, which ends what this waits for.
    communicator: Box<dyn Communicator>,
    control: Option<Control>,
    peers: Vec<Peer>,
}

impl World {
    /// A world of one rank.
    pub fn solo() -> Self {
        World {
            communicator: Box::new(Solo),
            control: None,
            peers: vec![Peer {
                host: host_name(),
                pid: std::process::id(),
                device: String::new(),
            }],
        }
    }

    /// Meets the other ranks; `device` is where this one's tensors are. A world of one needs nobody.
    ///
    /// # Errors
    /// When ranks are missing, contradict each other, run another program, or share a GPU; and when NCCL is needed and not found.
    pub fn join(launch: Launch, device: &Device, options: &Options) -> Result<Self> {
        if launch.world == 1 {
            return Ok(World::solo());
        }
        Self::connect(launch, device, options)
    }

    /// As [`World::join`], with the planes of many ranks even where there is one, for tests.
    ///
    /// # Errors
    /// As for [`World::join`].
    pub fn connect(mut launch: Launch, device: &Device, options: &Options) -> Result<Self> {
        let door = match device {
            Device::Cpu => Some(tcp::Door::open(&launch)?),
            // Whether NCCL can be used is asked once the others are met, who are told when it cannot.
            Device::Cuda(_) => None,
        };
        let member = Member {
            host: host_name(),
            pid: std::process::id(),
            device: match device {
                Device::Cpu => "cpu".into(),
                Device::Cuda(device) => device.uuid()?,
            },
            data_port: door.as_ref().map_or(0, tcp::Door::port),
        };
        let control = Control::join(&mut launch, member, options)?;
        let peers: Vec<Peer> = control.shared().members.iter().map(peer).collect();
        ensure_devices(&peers)?;
        let connect = || -> Result<Box<dyn Communicator>> {
            Ok(match (device, &door) {
                (Device::Cuda(device), _) => Box::new(nccl::Nccl::connect(device, &control)?),
                (Device::Cpu, Some(door)) => Box::new(tcp::Tcp::connect(door, &control)?),
                (Device::Cpu, None) => unreachable!("a rank on the CPU has opened its door"),
            })
        };
        let communicator = connect().inspect_err(|error| give_up(&control, error))?;
        let world = World {
            communicator,
            control: Some(control),
            peers,
        };
        world.barrier("start")?;
        Ok(world)
    }

    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.communicator.rank()
    }

    /// The number of ranks.
    pub fn size(&self) -> usize {
        self.communicator.world()
    }

    /// Whether there are no others, and nothing to connect to them.
    pub fn is_solo(&self) -> bool {
        self.control.is_none()
    }

    /// Whether this is the rank that decides, writes and prints.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// All ranks.
    pub fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// What moves tensors.
    pub fn communicator(&self) -> &dyn Communicator {
        &*self.communicator
    }

    /// Fails unless every rank brings the same bytes; texts are compared by lines in the message.
    ///
    /// # Errors
    /// Naming `what`, which ranks differ, and how: the same on every rank.
    pub fn agree(&self, what: &str, bytes: &[u8]) -> Result<()> {
        match &self.control {
            Some(control) => control.agree(what, bytes),
            None => Ok(()),
        }
    }

    /// What rank 0 decides, bit for bit, on all ranks. `value` is only called there; where it fails, the run is over for all. Its
    /// type must be one that serde can read without names (no untagged or flattened fields).
    ///
    /// # Errors
    /// Those of `value`, and when a rank was lost.
    pub fn decide<T: Serialize + DeserializeOwned>(&self, what: &str, value: impl FnOnce() -> Result<T>) -> Result<T> {
        let own = match self.is_first() {
            true => Some(value().inspect_err(|error| self.say_why(error))?),
            false => None,
        };
        match (&self.control, own) {
            (None, Some(own)) => Ok(own),
            (Some(control), own) => control.decide(what, own.as_ref()),
            (None, None) => unreachable!("a rank that is alone is the first"),
        }
    }

    /// What every rank brings, by rank, on rank 0; `None` on the others. For types as in [`World::decide`].
    ///
    /// # Errors
    /// When a rank was lost.
    pub fn gather<T: Serialize + DeserializeOwned>(&self, what: &str, value: T) -> Result<Option<Vec<T>>> {
        match &self.control {
            Some(control) => control.gather(what, &value),
            None => Ok(Some(vec![value])),
        }
    }

    /// What every rank brings, by rank, on all ranks. For types as in [`World::decide`].
    ///
    /// # Errors
    /// When a rank was lost.
    pub fn share<T: Serialize + DeserializeOwned>(&self, what: &str, value: T) -> Result<Vec<T>> {
        let all = self.gather(what, value)?;
        self.decide(what, || Ok(all.unwrap_or_default()))
    }

    /// What came of this rank's part in `what`, if all ranks were successful; otherwise an error on all of them, so that none goes on
    /// alone: [`Error::Interrupted`] where users want to stop, the own error where there is one, and else that of the first rank that
    /// has one.
    ///
    /// # Errors
    /// As said, and when a rank was lost.
    pub fn together<T>(&self, what: &str, outcome: Result<T>) -> Result<T> {
        if self.is_solo() || matches!(outcome, Err(Error::PeerLost { .. })) {
            return outcome;
        }
        let own = match &outcome {
            Ok(_) => Went::Well,
            Err(Error::Interrupted) => Went::Interrupted,
            Err(error) => Went::Wrong(error.to_string()),
        };
        let all = self.share(what, own)?;
        let wrong = all.iter().enumerate().find_map(|(rank, went)| match went {
            Went::Wrong(reason) => Some((rank, reason)),
            _ => None,
        });
        match (wrong, outcome) {
            (Some(_), Err(error)) if !matches!(error, Error::Interrupted) => Err(error),
            (Some((rank, reason)), _) => Err(Error::invalid(format!(
                "rank {rank} on {}: {}",
                self.peers[rank].host,
                crate::printable(reason)
            ))),
            (None, _) if all.contains(&Went::Interrupted) => Err(Error::Interrupted),
            (None, outcome) => outcome,
        }
    }

    /// Does `work` on the first rank, then, once it is done there, on all others: what it leaves in files they find.
    ///
    /// # Errors
    /// On all ranks, when it fails on one.
    pub fn first_then_others<T>(&self, what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.is_first() {
            let done = self.together(what, work())?;
            self.together(what, Ok(()))?;
            return Ok(done);
        }
        self.together(what, Ok(()))?;
        self.together(what, work())
    }

    /// Does `work` on the first rank alone, while the others wait; `None` on these.
    ///
    /// # Errors
    /// On all ranks, when it fails.
    pub fn on_first<T>(&self, what: &str, work: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
        let outcome = match self.is_first() {
            true => work().map(Some),
            false => Ok(None),
        };
        self.together(what, outcome)
    }

    /// As [`World::on_first`], and all know what comes of it. Unlike in [`World::decide`] a failure is no end of the run.
    ///
    /// # Errors
    /// On all ranks, when it fails.
    pub fn first_decides<T: Serialize + DeserializeOwned>(
        &self,
        what: &str,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let own = self.on_first(what, work)?;
        let own = self.decide(what, || Ok(own))?;
        own.ok_or_else(|| Error::invalid(format!("the first rank has decided nothing about the {what}")))
    }

    /// Says that this rank works on something that others may wait for, which is no reason yet to count it as lost.
    pub fn work(&self) {
        if let Some(control) = &self.control {
            control.shared().work();
        }
    }

    /// Waits until every rank is here.
    ///
    /// # Errors
    /// When a rank was lost.
    pub fn barrier(&self, what: &str) -> Result<()> {
        match &self.control {
            Some(control) => control.barrier(what),
            None => Ok(()),
        }
    }

    /// Fails once a rank was lost; does not wait. Long work between operations asks now and then.
    ///
    /// # Errors
    /// [`Error::PeerLost`].
    pub fn check(&self) -> Result<()> {
        match &self.control {
            Some(control) => control.shared().check(),
            None => Ok(()),
        }
    }

    /// Ends this rank's part in agreement with the others: waits for what was started, and for all ranks to leave.
    ///
    /// # Errors
    /// When a rank was lost.
    pub fn leave(&self) -> Result<()> {
        self.communicator.settle()?;
        match &self.control {
            Some(control) => control.leave(),
            None => Ok(()),
        }
    }

    /// Ends the run on all ranks because this one cannot go on; the others name `error` as the reason.
    pub fn give_up(&self, error: &dyn std::fmt::Display) {
        self.say_why(error);
    }

    fn say_why(&self, error: &dyn std::fmt::Display) {
        if let Some(control) = &self.control {
            give_up(control, error);
        }
    }
}

fn give_up(control: &Control, error: &dyn std::fmt::Display) {
    let reason = error.to_string();
    let reason = reason.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    control.shared().give_up(&format!("it gave up: {reason}"));
}

impl Drop for World {
    fn drop(&mut self) {
        // Before the connections for tensors close, so that nobody wonders why they did.
        if let Some(control) = &self.control {
            control.shared().give_up("it ended before the others");
        }
    }
}

fn peer(member: &Member) -> Peer {
    let shown = |text: &str| crate::shown_name(text).into_owned();
    Peer {
        host: shown(&member.host),
        pid: member.pid,
        device: shown(&member.device),
    }
}

/// Checks that all ranks compute on the same kind of device, and no two on the same GPU.
fn ensure_devices(peers: &[Peer]) -> Result<()> {
    let on_cpu = |peer: &Peer| peer.device == "cpu";
    let kind = |peer: &Peer| if on_cpu(peer) { "the CPU" } else { "a GPU" };
    for (rank, peer) in peers.iter().enumerate() {
        if on_cpu(peer) != on_cpu(&peers[0]) {
            return Err(Error::invalid(format!(
                "rank {rank} on {} runs on {}, rank 0 on {} on {}: say --device for all of them",
                peer.host,
                kind(peer),
                peers[0].host,
                kind(&peers[0])
            )));
        }
        // Where GPUs are parted among virtual machines, two of them may show the same name.
        let same = |other: &Peer| (&other.host, &other.device) == (&peer.host, &peer.device);
        if let Some(other) = peers[..rank].iter().position(|other| !on_cpu(peer) && same(other)) {
            return Err(Error::invalid(format!(
                "ranks {other} and {rank} on {} use the same GPU ({}): start one rank for each",
                peer.host, peer.device
            )));
        }
    }
    Ok(())
}

/// This machine's name.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = name.or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_default();
    match name.trim() {
        "" => "localhost".into(),
        name => name.into(),
    }
}
