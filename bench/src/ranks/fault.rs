//! What becomes of the others when something happens to a rank.

use std::fmt;
use std::process::Command;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::Context;
use l2p_engine::dist::World;
use l2p_engine::{DType, Device};

use super::check;

/// Something that happens to a rank, and which; or nothing, until somebody else ends one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault(Option<(What, usize)>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// SIGKILL.
    Kill,
    /// SIGSTOP: the process is there, and says nothing.
    Stop,
    /// It computes forever, and still gives signs of life.
    Hang,
    /// It gives up with an error.
    Fail,
    /// It panics.
    Panic,
}

const WAYS: [(&str, What); 5] = [
    ("kill", What::Kill),
    ("stop", What::Stop),
    ("hang", What::Hang),
    ("fail", What::Fail),
    ("panic", What::Panic),
];

impl Fault {
    /// Everything that can happen to each of these ranks.
    pub fn all(ranks: &[usize]) -> Vec<Fault> {
        let each = |(_, what)| ranks.iter().map(move |rank| Fault(Some((what, *rank))));
        WAYS.into_iter().flat_map(each).collect()
    }

    /// The rank that is lost, if one is.
    pub fn rank(self) -> Option<usize> {
        self.0.map(|(_, rank)| rank)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |what| {
            WAYS.iter()
                .find(|(_, other)| *other == what)
                .map_or("", |(name, _)| name)
        };
        match self.0 {
            None => f.write_str("none"),
            Some((what, rank)) => write!(f, "{}:{rank}", name(what)),
        }
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected =
            || format!("`{text}` is not WHAT:RANK, with kill, stop, hang, fail or panic, such as kill:1; nor none");
        if text == "none" {
            return Ok(Fault(None));
        }
        let (what, rank) = text.split_once(':').ok_or_else(expected)?;
        let (_, what) = WAYS.into_iter().find(|(name, _)| *name == what).ok_or_else(expected)?;
        let rank = rank.parse().map_err(|_| expected())?;
        Ok(Fault(Some((what, rank))))
    }
}

/// Exchanges and checks tensors until the fault happens, and then until that is noticed.
pub fn run(world: &World, device: &Device, fault: Fault, after: f64) -> anyhow::Result<()> {
    if let Some((_, rank)) = fault.0 {
        anyhow::ensure!(
            rank < world.size(),
            "--fault: there is no rank {rank} among {}",
            world.size()
        );
    }
    let after = Duration::try_from_secs_f64(after).context("--after is no time")?;
    if world.is_first() {
        l2p_bins::print("exchanging\n")?;
    }
    let begun = Instant::now();
    for round in 0usize.. {
        if let Some((what, rank)) = fault.0
            && rank == world.rank()
            && begun.elapsed() >= after
        {
            happen(what)?;
        }
        let stop = world.decide("end", || Ok(l2p_bins::stop_requested()))?;
        if stop {
            return Err(l2p_engine::Error::Interrupted.into());
        }
        let size = [1, 1000, 65_537, 1 << 20][round % 4];
        let dtype = [DType::F32, DType::Bf16][round % 2];
        check::all(world, device, size, dtype)?;
    }
    Ok(())
}

fn happen(what: What) -> anyhow::Result<()> {
    match what {
        What::Kill => signal("KILL"),
        What::Stop => signal("STOP"),
        What::Hang => loop {
            std::thread::sleep(Duration::from_secs(1));
        },
        What::Fail => anyhow::bail!("the disk is full"),
        What::Panic => panic!("this rank was told to panic"),
    }
}

/// Sends this process a signal, and waits for what comes of it.
fn signal(name: &str) -> anyhow::Result<()> {
    let command = format!("kill -{name} {}", std::process::id());
    Command::new("sh").args(["-c", &command]).status()?;
    std::thread::sleep(Duration::from_secs(1));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read() {
        assert_eq!("kill:1".parse(), Ok(Fault(Some((What::Kill, 1)))));
        assert_eq!("none".parse(), Ok(Fault(None)));
        for fault in Fault::all(&[0, 12]).into_iter().chain([Fault(None)]) {
            assert_eq!(fault.to_string().parse(), Ok(fault));
        }
        for bad in ["kill", "kill:", "kill:-1", "die:1", ""] {
            assert!(bad.parse::<Fault>().unwrap_err().contains("such as kill:1"), "{bad}");
        }
    }
}
