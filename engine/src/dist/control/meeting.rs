//! How ranks find each other: rank 0 waits at its port until every other one has come, and tells all of them who is there.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::door::{self, GREETING};
use super::wire::{self, Hello, LONGEST_FRAME, LONGEST_HELLO, Member, Other, Place, Reply, Roster, Until};
use crate::dist::Options;
use crate::dist::launch::Launch;
use crate::error::{Error, Result};
use crate::printable::{printable, shown_name};

/// How long a port that is in use is tried again: a run that has just ended may still hold it.
const PORT_PATIENCE: Duration = Duration::from_secs(5);

/// How long one attempt to reach rank 0 may take.
const ATTEMPT: Duration = Duration::from_secs(5);

/// How long rank 0 stays, once ranks contradict each other, to tell those who have not come yet.
const LAST_WORD: Duration = Duration::from_secs(5);

/// Between attempts.
const PAUSE: Duration = Duration::from_millis(100);

/// Who came, and over which connection; rank 0's own place is empty.
pub struct Met {
    pub roster: Roster,
    /// On rank 0 by rank, without one for itself; elsewhere the one to rank 0.
    pub streams: Vec<TcpStream>,
}

/// A number that no other process draws.
pub fn nonce() -> u64 {
    RandomState::new().hash_one(std::process::id())
}

/// Opens rank 0's port.
///
/// # Errors
/// When it is in use, with the way out.
pub fn listen(launch: &Launch, options: &Options) -> Result<TcpListener> {
    let wildcard = SocketAddr::from((Ipv6Addr::UNSPECIFIED, launch.port));
    let only_v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, launch.port));
    let resolved: Vec<SocketAddr> = (launch.host.as_str(), launch.port)
        .to_socket_addrs()
        .into_iter()
        .flatten()
        .collect();
    // A name of this machine alone is not to be reached from others.
    let local = launch.on_one_machine() && resolved.first().is_some_and(|address| address.ip().is_loopback());
    let addresses = match local {
        true => vec![resolved[0]],
        false => vec![wildcard, only_v4],
    };
    let end = Instant::now() + PORT_PATIENCE.min(options.start);
    loop {
        let error = match TcpListener::bind(&addresses[..]) {
            Ok(listener) => return Ok(listener),
            Err(error) => error,
        };
        if error.kind() != ErrorKind::AddrInUse || Instant::now() >= end {
            return Err(Error::invalid(format!(
                "rank 0 cannot listen at port {} of {}: {error}; choose another with L2P_MASTER_PORT, the same for all ranks",
                launch.port, launch.host
            )));
        }
        if (options.interrupted)() {
            return Err(Error::Interrupted);
        }
        std::thread::sleep(PAUSE);
    }
}

/// One who came to rank 0's port.
enum Guest {
    Rank(Box<Arrival>),
    TurnedAway(String),
}

struct Arrival {
    hello: Hello,
    stream: TcpStream,
    address: SocketAddr,
}

/// Waits for all ranks, as rank 0, whose own hello is `own`.
///
/// # Errors
/// When ranks are missing, contradict each other or run different programs: all who came get the same error.
pub fn host(listener: &TcpListener, own: &Hello, launch: &Launch, options: &Options) -> Result<Met> {
    let world = launch.world;
    let mut arrivals: Vec<Option<Arrival>> = (1..world).map(|_| None).collect();
    let mut turned_away = Vec::new();
    let mut contradiction = None;
    let take = |guest| {
        match own_rank(guest, own) {
            Err(note) => {
                if !turned_away.contains(&note) && turned_away.len() < 4 {
                    turned_away.push(note);
                }
            }
            Ok(arrival) => {
                let rank = arrival.hello.rank as usize;
                contradiction = seat(&mut arrivals, arrival, own).err().map(|reason| (rank, reason));
            }
        }
        Ok(match contradiction.is_some() || arrivals.iter().all(Option::is_some) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        })
    };
    let wait = || match (options.interrupted)() {
        true => Err(Error::Interrupted),
        false => Ok(()),
    };
    let complete = world == 1 || door::admit(listener, Instant::now() + options.start, greet, take, wait)?;
    if let Some((told, reason)) = contradiction {
        tell_all(listener, &arrivals, told, own, &reason, wait);
        return Err(Error::invalid(reason));
    }
    if !complete {
        let missing: Vec<usize> = (1..world).filter(|rank| arrivals[rank - 1].is_none()).collect();
        let mut reason = missing_ranks(&missing, launch, options);
        for note in turned_away {
            reason = format!("{reason}; {note}");
        }
        let streams = arrivals.iter().flatten().map(|arrival| &arrival.stream);
        streams.for_each(|stream| refuse(stream, &reason, false));
        return Err(Error::invalid(reason));
    }
    let arrivals: Vec<Arrival> = arrivals.into_iter().flatten().collect();
    let own_member = (own.member.clone(), Place::WithRankZero);
    let others = arrivals
        .iter()
        .map(|arrival| (arrival.hello.member.clone(), place(arrival)));
    let roster = Roster {
        session: nonce(),
        members: std::iter::once(own_member).chain(others).collect(),
    };
    for arrival in &arrivals {
        // One who has left meanwhile is missed as soon as the run begins.
        let _ = wire::frame(&Reply::Welcome(roster.clone())).and_then(|frame| send(&arrival.stream, &frame));
    }
    Ok(Met {
        roster,
        streams: arrivals.into_iter().map(|arrival| arrival.stream).collect(),
    })
}

/// A guest who is a rank of this run; of others what to say about them.
fn own_rank(guest: Guest, own: &Hello) -> std::result::Result<Arrival, String> {
    let note = match guest {
        Guest::Rank(arrival) if arrival.hello.job == own.job => return Ok(*arrival),
        Guest::Rank(arrival) => {
            refuse(&arrival.stream, "another run listens here", true);
            let other = shown_name(&arrival.hello.job);
            format!("a rank of another run ({other}) was turned away")
        }
        Guest::TurnedAway(note) => note,
    };
    tracing::debug!("{note}");
    Err(note)
}

/// Tells all ranks that the run is over before it began: those that are there, and those that come soon; rank `told` knows.
fn tell_all(
    listener: &TcpListener,
    arrivals: &[Option<Arrival>],
    told: usize,
    own: &Hello,
    reason: &str,
    wait: impl Fn() -> Result<()>,
) {
    let here = arrivals.iter().flatten().map(|arrival| &arrival.stream);
    here.for_each(|stream| refuse(stream, reason, false));
    let mut missing: BTreeSet<usize> = (1..=arrivals.len())
        .filter(|rank| arrivals[rank - 1].is_none())
        .collect();
    missing.remove(&told);
    let all_know = missing.is_empty();
    let take = |guest| {
        if let Ok(arrival) = own_rank(guest, own) {
            refuse(&arrival.stream, reason, false);
            missing.remove(&(arrival.hello.rank as usize));
        }
        Ok(match missing.is_empty() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        })
    };
    if !all_know {
        // Whatever keeps the last of them from hearing it, the reason stays the same.
        let _ = door::admit(listener, Instant::now() + LAST_WORD, greet, take, wait);
    }
}

/// Hears who a connection is.
fn greet(stream: TcpStream, address: SocketAddr) -> Guest {
    let hear = || -> std::io::Result<std::result::Result<Hello, String>> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(GREETING))?;
        wire::greet(&stream)?;
        let end = Instant::now() + GREETING;
        let mut from = Until { stream: &stream, end };
        Ok(match wire::meet(&mut from)? {
            Other::Rank => Ok(wire::read_frame(&mut from, LONGEST_HELLO)?),
            Other::Foreign(version) => Err(format!(
                "a rank of another version of this program (protocol {version}) at {} was turned away",
                address.ip().to_canonical()
            )),
            Other::Stranger => Err(format!("a stranger at {} was turned away", address.ip().to_canonical())),
        })
    };
    match hear() {
        Ok(Ok(hello)) => Guest::Rank(Box::new(Arrival { hello, stream, address })),
        Ok(Err(note)) => Guest::TurnedAway(note),
        Err(error) => Guest::TurnedAway(format!(
            "a connection from {} said nothing of use ({error})",
            address.ip().to_canonical()
        )),
    }
}

/// Gives an arrival its place, or tells it, and the caller, what it contradicts.
fn seat(arrivals: &mut [Option<Arrival>], arrival: Arrival, own: &Hello) -> std::result::Result<(), String> {
    let hello = &arrival.hello;
    let who = |hello: &Hello| {
        let Member { host, pid, .. } = &hello.member;
        format!("process {pid} on {}", shown_name(host))
    };
    let wrong = |reason: String| {
        refuse(&arrival.stream, &reason, false);
        Err(reason)
    };
    if hello.world != own.world {
        return wrong(format!(
            "rank {} ({}) was told of {} ranks, rank 0 of {}: start all ranks with the same number",
            hello.rank,
            who(hello),
            hello.world,
            own.world
        ));
    }
    if hello.code != own.code {
        return wrong(format!(
            "rank {} ({}) runs {}, rank 0 runs {}: start the same program on all machines",
            hello.rank,
            who(hello),
            shown_name(&hello.code),
            own.code
        ));
    }
    let seat = match (hello.rank as usize).checked_sub(1) {
        None => {
            return wrong(format!("two processes are rank 0: {} and {}", who(own), who(hello)));
        }
        Some(seat) => arrivals.get_mut(seat),
    };
    match seat {
        None => wrong(format!("there is no rank {} among {} ranks", hello.rank, own.world)),
        Some(Some(other)) if other.hello.nonce != hello.nonce => {
            let reason = format!(
                "two processes are rank {}: {} and {}",
                hello.rank,
                who(&other.hello),
                who(hello)
            );
            wrong(reason)
        }
        // A first word, or another attempt of the same.
        Some(seat) => {
            *seat = Some(arrival);
            Ok(())
        }
    }
}

/// Where an arrival is to be found by the others.
fn place(arrival: &Arrival) -> Place {
    let theirs = arrival.address.ip().to_canonical();
    let ours = arrival.stream.local_addr().map(|address| address.ip().to_canonical());
    match theirs.is_loopback() || ours.is_ok_and(|ours| ours == theirs) {
        true => Place::WithRankZero,
        false => Place::At(theirs),
    }
}

fn missing_ranks(missing: &[usize], launch: &Launch, options: &Options) -> String {
    let (who, verb) = (numbers(missing), if missing.len() == 1 { "rank" } else { "ranks" });
    format!(
        "{verb} {who} of {} did not arrive at {}:{} within {} s",
        launch.world,
        launch.host,
        launch.port,
        options.start.as_secs_f64()
    )
}

/// `2`, `2 and 5`, `2, 5 and 7`, or the first few and how many more.
pub(super) fn numbers(all: &[usize]) -> String {
    const SHOWN: usize = 8;
    let text: Vec<String> = all.iter().take(SHOWN).map(usize::to_string).collect();
    match (all.len().saturating_sub(SHOWN), text.as_slice()) {
        (0, [front @ .., last]) if !front.is_empty() => format!("{} and {last}", front.join(", ")),
        (0, _) => text.concat(),
        (more, _) => format!("{} and {more} more", text.join(", ")),
    }
}

fn send(mut stream: &TcpStream, frame: &[u8]) -> std::io::Result<()> {
    std::io::Write::write_all(&mut stream, frame)
}

fn refuse(stream: &TcpStream, reason: &str, again: bool) {
    let reply = Reply::Refused {
        reason: reason.into(),
        again,
    };
    // One who does not hear it gives up by itself.
    let _ = wire::frame(&reply).and_then(|frame| send(stream, &frame));
}

/// Goes to rank 0's port, as any other rank.
///
/// # Errors
/// When rank 0 cannot be reached in time, or with what it answered.
pub fn visit(hello: &Hello, launch: &Launch, options: &Options) -> Result<Met> {
    let end = Instant::now() + options.start;
    loop {
        let reason = match attempt(hello, launch, options, end) {
            Ok(Ok(met)) => return Ok(met),
            Ok(Err((reason, false))) => return Err(Error::invalid(reason)),
            Ok(Err((reason, true))) => reason,
            Err(error) => describe(&error),
        };
        if (options.interrupted)() {
            return Err(Error::Interrupted);
        }
        if Instant::now() >= end {
            return Err(Error::invalid(format!(
                "rank {} of {} did not reach rank 0 at {}:{} within {} s ({reason}): is it running there, and is that the right \
                 address? MASTER_ADDR and MASTER_PORT say where it is looked for",
                launch.rank,
                launch.world,
                launch.host,
                launch.port,
                options.start.as_secs_f64()
            )));
        }
        std::thread::sleep(PAUSE);
    }
}

/// Short words for why rank 0 was not reached.
fn describe(error: &std::io::Error) -> String {
    match error.kind() {
        ErrorKind::ConnectionRefused => "nobody listens there".into(),
        ErrorKind::TimedOut | ErrorKind::WouldBlock => "no answer".into(),
        ErrorKind::UnexpectedEof
        | ErrorKind::ConnectionReset
        | ErrorKind::ConnectionAborted
        | ErrorKind::BrokenPipe => "the connection was closed".into(),
        _ => error.to_string(),
    }
}

type Refusal = (String, bool);

fn attempt(
    hello: &Hello,
    launch: &Launch,
    options: &Options,
    end: Instant,
) -> std::io::Result<std::result::Result<Met, Refusal>> {
    let stream = connect((launch.host.as_str(), launch.port).to_socket_addrs()?, end)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(GREETING))?;
    let hello = wire::frame(hello)?;
    let said = wire::greet(&stream).and_then(|()| send(&stream, &hello));
    // What listens there may have said what it is and hung up, without hearing this out.
    let greeting = Instant::now() + GREETING;
    match wire::meet(&mut Until {
        stream: &stream,
        end: greeting,
    })? {
        Other::Rank => said?,
        Other::Foreign(version) => {
            let reason = format!("rank 0 runs another version of this program (protocol {version})");
            return Ok(Err((reason, false)));
        }
        Other::Stranger => return Ok(Err(("something else listens there".into(), true))),
    }
    // Rank 0 began to wait at most as long ago as this rank did, or later; its word comes when its own time is over.
    let patience = Instant::now() + options.start + GREETING;
    let mut answer = Answer {
        stream: &stream,
        end: patience,
        interrupted: options.interrupted,
    };
    let roster = match wire::read_frame(&mut answer, LONGEST_FRAME)? {
        Reply::Welcome(roster) => roster,
        Reply::Refused { reason, again } => return Ok(Err((printable(&reason).into_owned(), again))),
    };
    if roster.members.len() != launch.world {
        return Ok(Err((format!("rank 0 speaks of {} ranks", roster.members.len()), false)));
    }
    stream.set_read_timeout(None)?;
    Ok(Ok(Met {
        roster,
        streams: vec![stream],
    }))
}

/// Connects to one of `addresses`.
pub fn connect(addresses: impl Iterator<Item = SocketAddr>, end: Instant) -> std::io::Result<TcpStream> {
    let mut last = std::io::Error::from(ErrorKind::AddrNotAvailable);
    for address in addresses {
        let left = end.saturating_duration_since(Instant::now());
        match TcpStream::connect_timeout(&address, left.clamp(PAUSE, ATTEMPT)) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Reads rank 0's answer, and looks up now and then.
struct Answer<'a> {
    stream: &'a TcpStream,
    end: Instant,
    interrupted: fn() -> bool,
}

impl std::io::Read for Answer<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            if (self.interrupted)() {
                return Err(std::io::Error::other("interrupted"));
            }
            let end = self.end.min(Instant::now() + PAUSE);
            let outcome = Until {
                stream: self.stream,
                end,
            }
            .read(buffer);
            match outcome {
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) && Instant::now() < self.end => {}
                other => return other,
            }
        }
    }
}

/// The address of a rank, from where this one stands: `hub` is rank 0's, as it was reached.
pub fn address_of(place: Place, hub: IpAddr) -> IpAddr {
    match place {
        Place::WithRankZero => hub,
        Place::At(address) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(numbers(&[3]), "3");
        assert_eq!(numbers(&[2, 5]), "2 and 5");
        assert_eq!(numbers(&[2, 5, 7]), "2, 5 and 7");
        assert_eq!(
            numbers(&(0..11).collect::<Vec<_>>()),
            "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"
        );
    }
}
