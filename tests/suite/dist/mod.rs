//! Many ranks: as threads of this process, each with a world of its own, and as processes under the launchers.

mod collectives;
mod loss;
mod meeting;
mod messages;
mod nccl;
mod processes;

use std::time::Duration;

use l2p_engine::dist::{Launch, Options, World};
use l2p_engine::{Device, Result};
use l2p_tests::Suite;

pub fn register(suite: &mut Suite) {
    collectives::register(suite);
    loss::register(suite);
    meeting::register(suite);
    messages::register(suite);
    nccl::register(suite);
    processes::register(suite);
}

/// Options that let no test wait for long.
pub fn options() -> Options {
    Options {
        start: Duration::from_secs(30),
        operation: Duration::from_secs(60),
        silence: Duration::from_secs(60),
        ..Options::default()
    }
}

/// Runs `work` on `world` ranks that are threads, and returns what came of it by rank.
fn ranks<T: Send>(world: usize, options: &Options, work: impl Fn(World) -> Result<T> + Sync) -> Vec<Result<T>> {
    places(launches(world), options, |launch, options| {
        World::connect(launch, &Device::Cpu, options).and_then(&work)
    })
}

/// As [`ranks`], where all must succeed.
pub fn all_ranks<T: Send>(world: usize, work: impl Fn(World) -> Result<T> + Sync) -> Result<Vec<T>> {
    ranks(world, &options(), work).into_iter().collect()
}

pub fn launches(world: usize) -> Vec<Launch> {
    Launch::in_process(world).expect("this machine has a free port")
}

/// Runs `work` in a thread for each place.
pub fn places<T: Send>(
    launches: Vec<Launch>,
    options: &Options,
    work: impl Fn(Launch, &Options) -> Result<T> + Sync,
) -> Vec<Result<T>> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = launches
            .into_iter()
            .map(|launch| scope.spawn(move || work(launch, options)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a rank's thread does not panic"))
            .collect()
    })
}
