//! How the connections for tensors are made: each rank goes to those before it, and takes those behind it.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::dist::control::{Control, GREETING, Place, Until, address_of, admit, connect};
use crate::dist::launch::Launch;
use crate::error::{Error, Result};

/// The first bytes of every connection, before the session and the rank.
const MAGIC: [u8; 8] = *b"l2ptensr";

/// Between attempts to reach a rank.
const PAUSE: Duration = Duration::from_millis(50);

/// Where this rank takes connections from those of higher rank.
pub struct Door {
    listener: TcpListener,
    port: u16,
}

impl Door {
    /// Opens a port that the system picks.
    pub fn open(launch: &Launch) -> Result<Self> {
        let everywhere = [IpAddr::from(Ipv6Addr::UNSPECIFIED), IpAddr::from(Ipv4Addr::UNSPECIFIED)];
        let here = [IpAddr::from(Ipv4Addr::LOCALHOST)];
        let addresses: &[IpAddr] = match launch.on_one_machine() {
            true => &here,
            false => &everywhere,
        };
        let addresses: Vec<SocketAddr> = addresses.iter().map(|address| (*address, 0).into()).collect();
        let open = || {
            let listener = TcpListener::bind(&addresses[..])?;
            let port = listener.local_addr()?.port();
            Ok(Door { listener, port })
        };
        open().map_err(|error: io::Error| Error::invalid(format!("cannot open a port for other ranks: {error}")))
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The connections to all other ranks, by rank; none to this one.
    ///
    /// # Errors
    /// When one cannot be made in time, or a rank was lost.
    pub fn meet(&self, control: &Control) -> Result<Vec<Option<TcpStream>>> {
        let shared = control.shared();
        let (rank, world) = (shared.rank, shared.world());
        let end = Instant::now() + shared.options.start;
        let mut streams: Vec<Option<TcpStream>> = (0..world).map(|_| None).collect();
        for (other, stream) in streams.iter_mut().enumerate().take(rank) {
            *stream = Some(reach(control, other, end)?);
        }
        let mut missing = world - rank - 1;
        if missing > 0 {
            let session = control.session;
            let greet = move |stream: TcpStream, _| hear(stream, session).ok();
            let take = |guest: Option<(usize, TcpStream)>| {
                if let Some((other, stream)) = guest
                    && other > rank
                    && other < world
                    && streams[other].is_none()
                {
                    streams[other] = Some(stream);
                    missing -= 1;
                }
                Ok(match missing {
                    0 => ControlFlow::Break(()),
                    _ => ControlFlow::Continue(()),
                })
            };
            if !admit(&self.listener, end, greet, take, || shared.check())? {
                let missing: Vec<String> = (rank + 1..world)
                    .filter(|other| streams[*other].is_none())
                    .map(|other| other.to_string())
                    .collect();
                return Err(Error::invalid(format!(
                    "no connection for tensors came from rank {} within {} s: a firewall between the machines may keep port {} closed",
                    missing.join(", "),
                    shared.options.start.as_secs_f64(),
                    self.port
                )));
            }
        }
        Ok(streams)
    }
}

/// Connects to a rank before this one.
fn reach(control: &Control, other: usize, end: Instant) -> Result<TcpStream> {
    let shared = control.shared();
    let member = &shared.members[other];
    let place: Place = control.places[other];
    let address = SocketAddr::new(address_of(place, control.hub), member.data_port);
    loop {
        shared.check()?;
        let error = match introduce(address, control.session, shared.rank, end) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        if Instant::now() >= end {
            return Err(Error::invalid(format!(
                "rank {} cannot reach rank {other} at {address} for tensors ({error}): a firewall between the machines may keep \
                 that port closed",
                shared.rank
            )));
        }
        std::thread::sleep(PAUSE);
    }
}

fn introduce(address: SocketAddr, session: u64, rank: usize, end: Instant) -> io::Result<TcpStream> {
    let mut stream = connect(std::iter::once(address), end)?;
    let mut greeting = MAGIC.to_vec();
    greeting.extend(session.to_le_bytes());
    greeting.extend((rank as u64).to_le_bytes());
    stream.set_write_timeout(Some(GREETING))?;
    stream.write_all(&greeting)?;
    // The other one answers with the session, so that neither takes a stranger for a rank.
    let mut answer = [0; 8];
    let end = end.min(Instant::now() + GREETING);
    Until { stream: &stream, end }.read_exact(&mut answer)?;
    match u64::from_le_bytes(answer) == session {
        true => Ok(stream),
        false => Err(io::Error::other("something else listens there")),
    }
}

fn hear(mut stream: TcpStream, session: u64) -> io::Result<(usize, TcpStream)> {
    let mut greeting = [0; 24];
    let end = Instant::now() + GREETING;
    Until { stream: &stream, end }.read_exact(&mut greeting)?;
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    if greeting[..8] != MAGIC || number(&greeting[8..16]) != session {
        return Err(io::Error::other("a stranger"));
    }
    stream.set_write_timeout(Some(GREETING))?;
    stream.write_all(&session.to_le_bytes())?;
    let rank = usize::try_from(number(&greeting[16..])).unwrap_or(usize::MAX);
    Ok((rank, stream))
}
