//! Ranks that give up, end, or hang: every other one is told which, and why, and none waits longer than it must.

use std::time::{Duration, Instant};

use l2p_engine::dist::{Options, World};
use l2p_engine::{DType, Device, Error, Result, Tensor};
use l2p_tests::{Outcome, Suite};

use super::{options, ranks};

pub fn register(suite: &mut Suite) {
    suite.cpu("dist::loss::a_rank_that_gives_up_says_why", gives_up);
    suite.cpu("dist::loss::a_rank_that_ends_is_missed", ends);
    suite.cpu("dist::loss::a_rank_that_hangs_is_named_by_all", hangs);
    suite.cpu("dist::loss::a_loss_reaches_those_who_do_not_wait", checked);
    suite.cpu("dist::loss::programs_that_come_apart_over_tensors_are_told", apart);
    suite.cpu("dist::loss::leaving_needs_everybody_and_then_nobody", leaving);
}

/// What a rank waits in when another one is lost.
#[derive(Clone, Copy, Debug)]
enum Where {
    Barrier,
    Gather,
    Exchange,
}

const PLACES: [Where; 3] = [Where::Barrier, Where::Gather, Where::Exchange];

fn wait_in(ranks: &World, place: Where) -> Result<()> {
    match place {
        Where::Barrier => ranks.barrier("epoch"),
        Where::Gather => ranks.gather("losses", 1.0).map(|_| ()),
        Where::Exchange => {
            let (communicator, world) = (ranks.communicator(), ranks.size());
            // More than a connection holds, in both directions.
            let parts = Tensor::zeros(&Device::Cpu, [world, 3_000_000], DType::F32)?;
            let receive = Tensor::zeros(&Device::Cpu, [world, 3_000_000], DType::F32)?;
            communicator.all_to_all(&parts, receive)?.wait().map(|_| ())
        }
    }
}

fn lost(outcome: &Result<()>, who: usize) -> String {
    match outcome {
        Err(Error::PeerLost { rank, reason, .. }) if *rank == who => reason.clone(),
        other => panic!("rank {who} is to blame, but: {other:?}"),
    }
}

fn gives_up() -> Outcome {
    for place in PLACES {
        for who in 0..3 {
            let outcomes = ranks(3, &options(), |ranks| {
                if ranks.rank() != who {
                    return wait_in(&ranks, place);
                }
                std::thread::sleep(Duration::from_millis(50));
                ranks.give_up(&Error::invalid("the disk\n is full"));
                Ok(())
            });
            for (rank, outcome) in outcomes.iter().enumerate().filter(|(rank, _)| *rank != who) {
                assert_eq!(
                    lost(outcome, who),
                    "it gave up: the disk is full",
                    "rank {rank} in {place:?}"
                );
            }
        }
    }
    Ok(())
}

fn ends() -> Outcome {
    for place in PLACES {
        for who in 0..3 {
            let outcomes = ranks(3, &options(), |ranks| match ranks.rank() == who {
                true => Ok(()),
                false => wait_in(&ranks, place),
            });
            for outcome in outcomes
                .iter()
                .enumerate()
                .filter(|(rank, _)| *rank != who)
                .map(|(_, outcome)| outcome)
            {
                assert_eq!(lost(outcome, who), "it ended before the others", "{place:?}");
            }
        }
    }
    Ok(())
}

fn hangs() -> Outcome {
    let options = Options {
        operation: Duration::from_secs(1),
        silence: Duration::from_secs(1),
        ..options()
    };
    for place in PLACES {
        for who in 0..3 {
            let outcomes = ranks(3, &options, |ranks| {
                let began = Instant::now();
                if ranks.rank() == who {
                    while ranks.check().is_ok() && began.elapsed() < Duration::from_secs(30) {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
                let outcome = wait_in(&ranks, place);
                assert!(
                    began.elapsed() < Duration::from_secs(20),
                    "{place:?} lasted {:?}",
                    began.elapsed()
                );
                outcome
            });
            for outcome in &outcomes {
                let reason = lost(outcome, who);
                assert!(reason.starts_with("it is one operation behind: rank "), "{reason}");
                assert!(reason.ends_with("for more than 1 s"), "{reason}");
            }
        }
    }
    Ok(())
}

fn checked() -> Outcome {
    let outcomes = ranks(3, &options(), |ranks| {
        if ranks.rank() == 1 {
            return Ok(());
        }
        let began = Instant::now();
        while ranks.check().is_ok() && began.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(5));
        }
        ranks.check()
    });
    lost(&outcomes[0], 1);
    lost(&outcomes[2], 1);
    Ok(())
}

fn apart() -> Outcome {
    let outcomes = ranks(2, &options(), |ranks| {
        let elements = 10 + ranks.rank();
        let part = Tensor::zeros(&Device::Cpu, [elements], DType::F32)?;
        let receive = Tensor::zeros(&Device::Cpu, [2, elements], DType::F32)?;
        ranks.communicator().all_gather(&part, receive)?.wait().map(|_| ())
    });
    for outcome in outcomes {
        let message = outcome.unwrap_err().to_string();
        assert!(
            message.contains("bytes of operation 2 (all_gather) where 4")
                && message.ends_with("was expected: the ranks' programs have come apart"),
            "{message}"
        );
    }
    Ok(())
}

fn leaving() -> Outcome {
    let began = Instant::now();
    let outcomes = ranks(3, &options(), |ranks| {
        let (rank, world) = (ranks.rank(), ranks.size());
        // Started and not waited for.
        let part = Tensor::zeros(&Device::Cpu, [1000], DType::F32)?;
        let receive = Tensor::zeros(&Device::Cpu, [world, 1000], DType::F32)?;
        let _pending = ranks.communicator().all_gather(&part, receive)?;
        std::thread::sleep(Duration::from_millis(100 * rank as u64));
        ranks.leave()
    });
    outcomes.into_iter().collect::<Result<Vec<()>>>()?;
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    // One that leaves while others go on comes apart with them.
    let outcomes = ranks(2, &options(), |ranks| match ranks.rank() {
        0 => ranks.barrier("epoch"),
        _ => ranks.leave(),
    });
    for outcome in outcomes {
        let message = outcome.unwrap_err().to_string();
        assert!(
            message.contains("rank 1 is at the leaving where rank 0 is at the barrier epoch"),
            "{message}"
        );
    }
    Ok(())
}
