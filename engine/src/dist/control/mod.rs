//! The control plane: small messages between ranks over TCP, in a star around rank 0. It never carries tensors.
//!
//! Ranks enter its operations together, in the order of the program that all of them run. Rank 0 concludes an operation when the last
//! one has entered, and answers all. Beside that every rank sends a sign of life each second, with the number of operations it has
//! entered and the oldest one it waits in, those of the data plane included. The run is over for all when
//!
//! * a connection ends without all having left (a rank died), or a rank says that it gives up;
//! * nothing is heard of a rank for too long (it is stopped, or its machine or network is down);
//! * ranks wait in an operation for too long: the one that has entered the fewest is the one that hangs.
//!
//! Rank 0 tells everybody which rank is to blame, and every wait, of the data plane too, ends with that error.

mod door;
mod link;
mod meeting;
mod rounds;
mod state;
mod watch;
mod wire;

use std::net::{IpAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub(super) use door::{GREETING, admit};
pub(super) use meeting::{address_of, connect};
pub(super) use state::{Shared, Ticket};
use wire::{Hello, Kind};
pub(super) use wire::{Member, Place, Until};

use super::Options;
use super::launch::Launch;
use crate::error::{Error, Result};

/// One rank's part of the control plane. Dropping it without [`Control::leave`] tells the others that this rank gave up.
pub(super) struct Control {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Tells connections of these ranks from strangers'.
    pub session: u64,
    /// Where each rank is.
    pub places: Vec<Place>,
    /// Where rank 0 is, as it was reached from here.
    pub hub: IpAddr,
}

impl Control {
    /// Meets the other ranks.
    ///
    /// # Errors
    /// When some are missing, contradict each other, or run another program.
    pub fn join(launch: &mut Launch, member: Member, options: &Options) -> Result<Self> {
        let hello = Hello {
            job: launch.job.clone(),
            nonce: meeting::nonce(),
            rank: launch.rank as u32,
            world: launch.world as u32,
            code: options.code.clone().unwrap_or_else(|| super::code::identity().into()),
            member,
        };
        let met = match launch.rank {
            0 => {
                let listener: TcpListener = match launch.listener.take() {
                    Some(listener) => listener,
                    None => meeting::listen(launch, options)?,
                };
                meeting::host(&listener, &hello, launch, options)?
            }
            _ => meeting::visit(&hello, launch, options)?,
        };
        let broken =
            |error: std::io::Error| Error::invalid(format!("the connection to rank 0 broke at once ({error})"));
        let hub = match launch.rank {
            0 => IpAddr::from([127, 0, 0, 1]),
            _ => met.streams[0].peer_addr().map_err(broken)?.ip(),
        };
        let (members, places) = met.roster.members.into_iter().unzip();
        let ranks = if launch.rank == 0 { 1..launch.world } else { 0..1 };
        let mut links = Vec::new();
        let mut readers = Vec::new();
        for (rank, stream) in ranks.zip(met.streams) {
            stream.set_read_timeout(None).map_err(broken)?;
            // One that takes nothing in must not keep this rank from giving signs of life to others.
            let longest = GREETING.min(options.silence / 2).max(Duration::from_millis(1));
            stream.set_write_timeout(Some(longest)).map_err(broken)?;
            readers.push((rank, stream.try_clone().map_err(broken)?));
            links.push(link::Link::new(rank, stream));
        }
        let shared = Arc::new(Shared::new(launch.rank, members, links, options.clone()));
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        for (rank, stream) in readers {
            let shared = shared.clone();
            threads.push(std::thread::spawn(move || shared.listen(rank, stream)));
        }
        let watched = shared.clone();
        threads.push(std::thread::spawn(move || watched.watch()));
        Ok(Control {
            shared,
            threads,
            session: met.roster.session,
            places,
            hub,
        })
    }

    /// What this rank's threads share.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Fails unless every rank brings the same bytes.
    ///
    /// # Errors
    /// Naming which ranks differ and how.
    pub fn agree(&self, what: &str, bytes: &[u8]) -> Result<()> {
        self.shared.exchange(Kind::Agree, what, bytes.to_vec()).map(|_| ())
    }

    /// Rank 0's value, on all ranks; the others bring `None`.
    ///
    /// # Errors
    /// When a rank was lost, or rank 0 brings none.
    pub fn decide<T: Serialize + DeserializeOwned>(&self, what: &str, value: Option<&T>) -> Result<T> {
        let payload = match (self.shared.rank, value) {
            (0, Some(value)) => encode(what, value)?,
            (0, None) => {
                return Err(Error::invalid(format!(
                    "rank 0 must bring the {what} that it decides on"
                )));
            }
            _ => Vec::new(),
        };
        decode(what, &self.shared.exchange(Kind::Decide, what, payload)?)
    }

    /// What every rank brings, by rank, on rank 0; `None` on the others.
    ///
    /// # Errors
    /// When a rank was lost.
    pub fn gather<T: Serialize + DeserializeOwned>(&self, what: &str, value: &T) -> Result<Option<Vec<T>>> {
        let gathered = self.shared.exchange(Kind::Gather, what, encode(what, value)?)?;
        if self.shared.rank != 0 {
            return Ok(None);
        }
        let payloads: Vec<Vec<u8>> = decode(what, &gathered)?;
        let values = payloads.iter().map(|payload| decode(what, payload));
        values.collect::<Result<_>>().map(Some)
    }

    /// Waits until every rank is here.
    ///
    /// # Errors
    /// When a rank was lost.
    pub fn barrier(&self, what: &str) -> Result<()> {
        self.shared.exchange(Kind::Barrier, what, Vec::new()).map(|_| ())
    }

    /// Waits until every rank leaves; from then on none is missed.
    ///
    /// # Errors
    /// When a rank was lost.
    pub fn leave(&self) -> Result<()> {
        self.shared.exchange(Kind::Leave, "", Vec::new()).map(|_| ())
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.shared.give_up("it ended before the others");
        self.shared.close();
        for thread in self.threads.drain(..) {
            // A panic of a thread was printed where it happened.
            let _ = thread.join();
        }
    }
}

fn encode(what: &str, value: &impl Serialize) -> Result<Vec<u8>> {
    postcard::to_stdvec(value)
        .map_err(|error| Error::invalid(format!("the {what} cannot be sent to other ranks ({error})")))
}

fn decode<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T> {
    postcard::from_bytes(bytes)
        .map_err(|error| Error::invalid(format!("the {what} of another rank cannot be read ({error})")))
}
