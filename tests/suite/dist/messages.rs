//! The control plane's operations, where all goes well and where ranks differ.

use l2p_engine::Error;
use l2p_engine::dist::World;
use l2p_tests::{Outcome, Suite};

use super::{all_ranks, options, ranks};

pub fn register(suite: &mut Suite) {
    suite.cpu("dist::messages::rank_0_decides_bit_for_bit", decide);
    suite.cpu("dist::messages::rank_0_gathers_by_rank", gather);
    suite.cpu("dist::messages::a_barrier_holds_everybody", barrier);
    suite.cpu("dist::messages::what_differs_is_named_on_every_rank", agree);
    suite.cpu("dist::messages::ranks_that_come_apart_are_told_where", apart);
    suite.cpu("dist::messages::what_rank_0_cannot_decide_ends_the_run", undecided);
    suite.cpu(
        "dist::messages::long_ones_come_through_and_too_long_ones_are_refused",
        long,
    );
}

fn decide() -> Outcome {
    // Bits that text would lose: a NaN with a payload, the smallest number, a double that lies between two short decimals.
    let floats = [
        f64::from_bits(0x7ff8_dead_beef_0001),
        5e-324,
        0.1 + 0.2,
        -0.0,
        f64::INFINITY,
    ];
    let told = all_ranks(4, |ranks| {
        let own = floats.map(|value| if ranks.is_first() { value } else { 1.0 });
        let mut asked = false;
        let decided: Vec<f64> = ranks.decide("learning rates", || {
            asked = true;
            Ok(own.to_vec())
        })?;
        assert_eq!(asked, ranks.is_first());
        let stop: Option<String> = ranks.decide("end", || Ok(Some("disk full: é".to_owned())))?;
        ranks.leave()?;
        Ok((decided, stop))
    })?;
    for (decided, stop) in told {
        assert!(
            decided.iter().zip(floats).all(|(a, b)| a.to_bits() == b.to_bits()),
            "{decided:?}"
        );
        assert_eq!(stop.as_deref(), Some("disk full: é"));
    }
    Ok(())
}

fn gather() -> Outcome {
    let told = all_ranks(3, |ranks| {
        let gathered = ranks.gather("names", (ranks.rank(), format!("rank {}", ranks.rank())))?;
        ranks.leave()?;
        Ok(gathered)
    })?;
    let expected: Vec<_> = (0..3).map(|rank| (rank, format!("rank {rank}"))).collect();
    assert_eq!(told, [Some(expected), None, None]);
    Ok(())
}

fn barrier() -> Outcome {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let arrived = AtomicUsize::new(0);
    all_ranks(4, |ranks| {
        for round in 1..=20 {
            std::thread::sleep(std::time::Duration::from_millis((ranks.rank() * round % 3) as u64));
            arrived.fetch_add(1, Ordering::SeqCst);
            ranks.barrier("here")?;
            let count = arrived.load(Ordering::SeqCst);
            assert!(count >= 4 * round, "round {round} went on with {count}");
        }
        ranks.leave()
    })?;
    Ok(())
}

fn agree() -> Outcome {
    let outcomes = ranks(3, &options(), |ranks| {
        ranks.agree("code version", b"1")?;
        let seed = if ranks.rank() == 2 { 2 } else { 1 };
        let outcome = ranks.agree("configuration", format!("steps = 3\nseed = {seed}\n").as_bytes());
        // All heard of it, and nobody is gone: they may still leave together.
        ranks.leave()?;
        outcome
    });
    let host = World::solo().peers()[0].host.clone();
    for outcome in outcomes {
        assert_eq!(
            outcome.unwrap_err().to_string(),
            format!(
                "the configuration of rank 2 differs from that of rank 0: line 2: rank 2 on {host} has `seed = 2`, rank 0 `seed = 1`; \
                 start all ranks with the same"
            )
        );
    }
    Ok(())
}

fn apart() -> Outcome {
    let outcomes = ranks(3, &options(), |ranks| match ranks.rank() {
        1 => ranks.decide("steps", || Ok(1)).map(|_| ()),
        _ => ranks.barrier("epoch"),
    });
    for outcome in outcomes {
        let message = outcome.unwrap_err().to_string();
        assert_eq!(
            message,
            "the ranks have come apart: rank 1 is at the decision on steps where rank 0 is at the barrier epoch"
        );
    }
    Ok(())
}

fn undecided() -> Outcome {
    let outcomes = ranks(3, &options(), |ranks| {
        ranks.decide::<u64>("steps", || Err(Error::invalid("the disk\nis full")))
    });
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        let error = outcome.unwrap_err();
        match rank {
            0 => assert_eq!(error.to_string(), "the disk\nis full"),
            _ => {
                assert!(matches!(error, Error::PeerLost { rank: 0, .. }), "{error}");
                assert!(
                    error.to_string().ends_with("was lost: it gave up: the disk is full"),
                    "{error}"
                );
            }
        }
    }
    Ok(())
}

fn long() -> Outcome {
    all_ranks(2, |ranks| {
        let bytes: Vec<u8> = (0..5_000_000u32).map(|index| (index % 251) as u8).collect();
        let decided: Vec<u8> = ranks.decide("table", || Ok(bytes.clone()))?;
        assert!(decided == bytes);
        ranks.leave()
    })?;
    let outcomes = ranks(2, &options(), |ranks| {
        ranks.decide("table", || Ok(vec![0u8; 70 << 20])).map(|_| ())
    });
    let own = outcomes[0].as_ref().unwrap_err().to_string();
    assert!(own.starts_with("decision on table: a message of 734"), "{own}");
    assert!(
        matches!(outcomes[1], Err(Error::PeerLost { rank: 0, .. })),
        "{:?}",
        outcomes[1]
    );
    let outcomes = ranks(2, &options(), |ranks| {
        let bytes = vec![0u8; if ranks.rank() == 1 { 70 << 20 } else { 1 }];
        ranks.gather("logs", bytes).map(|_| ())
    });
    let own = outcomes[1].as_ref().unwrap_err().to_string();
    assert!(own.contains("longer than the control plane carries"), "{own}");
    assert!(
        matches!(outcomes[0], Err(Error::PeerLost { rank: 1, .. })),
        "{:?}",
        outcomes[0]
    );
    Ok(())
}
