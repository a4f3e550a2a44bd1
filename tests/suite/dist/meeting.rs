//! How ranks find each other, and what they say when they do not.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use l2p_engine::dist::{Launch, Options, Variables, World};
use l2p_engine::{Device, Error, Result};
use l2p_tests::{Outcome, Suite, hash_uniform_seeded};

use super::{launches, options, places};

pub fn register(suite: &mut Suite) {
    suite.cpu("dist::meeting::missing_ranks_are_named_to_all_who_came", missing);
    suite.cpu("dist::meeting::nobody_waits_forever_for_rank_0", no_rank_0);
    suite.cpu(
        "dist::meeting::ranks_that_contradict_each_other_are_named",
        contradictions,
    );
    suite.cpu("dist::meeting::ranks_of_another_run_are_turned_away", another_run);
    suite.cpu("dist::meeting::strangers_and_nonsense_keep_nobody_out", strangers);
    suite.cpu("dist::meeting::a_port_in_use_is_named_with_the_way_out", port_in_use);
    suite.cpu("dist::meeting::the_user_can_stop_the_waiting", interrupted);
    suite.cpu("dist::meeting::many_ranks_meet", many);
    suite.cpu("dist::meeting::one_rank_needs_nobody", alone);
}

fn joined(launch: Launch, options: &Options) -> Result<()> {
    World::connect(launch, &Device::Cpu, options)?.leave()
}

fn messages(outcomes: Vec<Result<()>>) -> Vec<String> {
    let message = |outcome: Result<()>| outcome.err().map_or_else(|| "joined".into(), |error| error.to_string());
    outcomes.into_iter().map(message).collect()
}

fn soon(seconds: f64) -> Options {
    Options {
        start: Duration::from_secs_f64(seconds),
        ..options()
    }
}

fn missing() -> Outcome {
    let mut launches = launches(6);
    launches.remove(5);
    launches.remove(2);
    let port = launches[0].port;
    let told = messages(places(launches, &soon(1.5), joined));
    let expected = format!("ranks 2 and 5 of 6 did not arrive at 127.0.0.1:{port} within 1.5 s");
    assert_eq!(told, vec![expected; 4]);
    Ok(())
}

fn no_rank_0() -> Outcome {
    let launch = launches(2).remove(1);
    let (port, began) = (launch.port, Instant::now());
    let message = joined(launch, &soon(1.0)).unwrap_err().to_string();
    assert!(
        message.starts_with(&format!(
            "rank 1 of 2 did not reach rank 0 at 127.0.0.1:{port} within 1 s (nobody listens there)"
        )),
        "{message}"
    );
    assert!(began.elapsed() < Duration::from_secs(10));

    // Something else listens there, which says nothing, or something of its own.
    for greeting in [b"".as_slice(), b"SSH-2.0-OpenSSH_9.6\r\n"] {
        let other = TcpListener::bind(("127.0.0.1", 0))?;
        let mut launch = launches(2).remove(1);
        launch.port = other.local_addr()?.port();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = other.accept() {
                let _ = stream.write_all(greeting);
            }
        });
        let message = joined(launch, &soon(1.0)).unwrap_err().to_string();
        let reason = if greeting.is_empty() {
            "the connection was closed"
        } else {
            "something else listens there"
        };
        assert!(message.contains(reason), "{message}");
    }
    Ok(())
}

fn contradictions() -> Outcome {
    type Change = fn(&mut [Launch]);
    let cases: [(Change, &str); 4] = [
        (
            |ranks| ranks[2].world = 4,
            "was told of 4 ranks, rank 0 of 3: start all ranks with the same number",
        ),
        (|ranks| ranks[2].rank = 1, "two processes are rank 1: process"),
        (|ranks| ranks[2].rank = 3, "there is no rank 3 among 3 ranks"),
        (|ranks| ranks[2].rank = 7, "there is no rank 7 among 3 ranks"),
    ];
    for (change, expected) in cases {
        let mut launches = launches(3);
        change(&mut launches);
        for message in messages(places(launches, &options(), joined)) {
            assert!(message.contains(expected), "{message}");
        }
    }
    let told = messages(places(launches(3), &options(), |launch, options| {
        let code = if launch.rank == 1 {
            "l2p 0.2.0 (abc)"
        } else {
            "l2p 0.1.0 (def)"
        };
        let code = Some(code.to_owned());
        joined(
            launch,
            &Options {
                code,
                ..options.clone()
            },
        )
    }));
    for message in told {
        let expected = "runs l2p 0.2.0 (abc), rank 0 runs l2p 0.1.0 (def): start the same program on all machines";
        assert!(
            message.starts_with("rank 1 (process ") && message.ends_with(expected),
            "{message}"
        );
    }
    // One that comes when the others have given up already hears why, too.
    let mut launches_of_three = launches(3);
    launches_of_three[2].world = 4;
    let began = Instant::now();
    let told = messages(places(launches_of_three, &options(), |launch, options| {
        if launch.rank == 1 {
            std::thread::sleep(Duration::from_millis(700));
        }
        joined(launch, options)
    }));
    for message in told {
        assert!(message.contains("was told of 4 ranks, rank 0 of 3"), "{message}");
    }
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    // Two that believe to be rank 0: the second cannot have the port.
    let mut launches = launches(2);
    launches[1].rank = 0;
    let told = messages(places(launches, &options(), |launch, _| {
        // The first keeps it for as long as the second tries.
        let patience = if launch.local_rank == 0 { 3.0 } else { 0.5 };
        joined(launch, &soon(patience))
    }));
    assert!(told[1].contains("cannot listen at port"), "{told:?}");
    Ok(())
}

fn another_run() -> Outcome {
    let mut launches = launches(2);
    let mut other = launches.remove(1);
    other.job = "another".into();
    let told = messages(places(vec![launches.remove(0), other], &soon(1.5), joined));
    assert!(
        told[0].ends_with("within 1.5 s; a rank of another run (another) was turned away"),
        "{}",
        told[0]
    );
    // The last of its attempts may meet the end of that run.
    let reasons = [
        "another run listens here",
        "nobody listens there",
        "the connection was closed",
        "no answer",
    ];
    assert!(
        reasons.iter().any(|reason| told[1].contains(&format!("({reason})"))),
        "{}",
        told[1]
    );
    Ok(())
}

/// The greeting of a rank, so that what follows is looked at.
fn greeting() -> Vec<u8> {
    let mut greeting = b"l2pranks".to_vec();
    greeting.extend(1u32.to_le_bytes());
    greeting
}

fn nonsense(seed: u64) -> Vec<u8> {
    let bytes = hash_uniform_seeded("nonsense", seed, 200);
    let bytes: Vec<u8> = bytes.into_iter().map(|value| (value * 128.0) as i8 as u8).collect();
    let length = bytes[0] as usize % bytes.len();
    match seed % 4 {
        0 => bytes[..length].to_vec(),
        1 => [greeting(), bytes[..length].to_vec()].concat(),
        // A length that fits what follows, and one that never comes.
        2 => [
            greeting(),
            (length as u32).to_le_bytes().to_vec(),
            bytes[..length].to_vec(),
        ]
        .concat(),
        _ => [greeting(), u32::MAX.to_le_bytes().to_vec(), bytes].concat(),
    }
}

fn strangers() -> Outcome {
    const STRANGERS: u64 = 200;
    let mut launches = launches(3);
    let port = launches[0].port;
    let late = launches.split_off(1);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| places(launches, &options(), joined));
        // Some stay and say nothing more, some leave at once; none of them gets an answer but the greeting.
        let mut kept = Vec::new();
        for seed in 0..STRANGERS {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("rank 0 listens");
            let _ = stream.write_all(&nonsense(seed));
            match seed % 5 {
                0 if kept.len() < 40 => kept.push(stream),
                1 => {
                    let mut answer = Vec::new();
                    let _ = stream.shutdown(std::net::Shutdown::Write);
                    let _ = stream.set_read_timeout(Some(Duration::from_secs(20)));
                    let _ = stream.read_to_end(&mut answer);
                    assert!(answer.len() <= 12, "{answer:?}");
                }
                _ => {}
            }
        }
        let others = places(late, &options(), joined);
        let first = first.join().expect("rank 0 does not panic");
        first.into_iter().chain(others).collect::<Result<Vec<()>>>()?;
        Ok(())
    })
}

fn port_in_use() -> Outcome {
    let other = TcpListener::bind(("127.0.0.1", 0))?;
    let port = other.local_addr()?.port();
    let variables = [
        ("RANK", "0".to_owned()),
        ("WORLD_SIZE", "2".to_owned()),
        ("LOCAL_WORLD_SIZE", "2".to_owned()),
        ("MASTER_ADDR", "127.0.0.1".to_owned()),
        ("MASTER_PORT", port.to_string()),
    ];
    let variables: Variables = variables
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    let launch = Launch::from_variables(&variables)?.ok_or("a launcher is recognised")?;
    let message = joined(launch, &soon(0.5)).unwrap_err().to_string();
    assert!(
        message.starts_with(&format!("rank 0 cannot listen at port {port} of 127.0.0.1: "))
            && message.ends_with("choose another with L2P_MASTER_PORT, the same for all ranks"),
        "{message}"
    );
    Ok(())
}

fn interrupted() -> Outcome {
    let mut launches = launches(3);
    launches.remove(2);
    let began = Instant::now();
    let options = Options {
        interrupted: || true,
        ..options()
    };
    for outcome in places(launches, &options, joined) {
        assert!(matches!(outcome, Err(Error::Interrupted)), "{outcome:?}");
    }
    assert!(began.elapsed() < Duration::from_secs(10));
    Ok(())
}

fn many() -> Outcome {
    let outcomes = places(launches(16), &options(), |launch, options| {
        let ranks = World::connect(launch, &Device::Cpu, options)?;
        let sum = ranks.gather("numbers", ranks.rank())?;
        ranks.leave()?;
        Ok(sum)
    });
    let gathered = outcomes.into_iter().collect::<Result<Vec<_>>>()?;
    assert_eq!(gathered[0], Some((0..16).collect()));
    Ok(())
}

fn alone() -> Outcome {
    let ranks = World::join(launches(1).remove(0), &Device::Cpu, &options())?;
    assert_eq!((ranks.rank(), ranks.size(), ranks.is_first()), (0, 1, true));
    ranks.leave()?;
    Ok(())
}
