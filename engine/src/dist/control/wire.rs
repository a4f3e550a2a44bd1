//! What goes over the control plane's connections: a greeting, then frames of a length (u32, little-endian) and that many bytes of
//! postcard.

use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The first bytes of every connection, in both directions.
const MAGIC: [u8; 8] = *b"l2pranks";

/// Grows whenever a message changes.
const PROTOCOL: u32 = 1;

/// The longest frame of one that is not known yet.
pub const LONGEST_HELLO: usize = 64 << 10;

/// The longest frame between ranks.
pub const LONGEST_FRAME: usize = 64 << 20;

/// A rank's first word to rank 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// What tells the ranks of this run from others.
    pub job: String,
    /// Tells this attempt to join from every other one.
    pub nonce: u64,
    pub rank: u32,
    pub world: u32,
    /// The program and its build.
    pub code: String,
    pub member: Member,
}

/// What ranks know of each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The machine's name.
    pub host: String,
    /// Its process there.
    pub pid: u32,
    /// `cpu`, or the GPU's own name among all GPUs.
    pub device: String,
    /// Where it takes connections for tensors; 0 where it takes none.
    pub data_port: u16,
}

/// Rank 0's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// All ranks are there.
    Welcome(Roster),
    /// This one cannot join.
    Refused {
        /// Why.
        reason: String,
        /// Whether another attempt may fare better.
        again: bool,
    },
}

/// All ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Roster {
    /// Tells these ranks' connections from strangers'.
    pub session: u64,
    /// The ranks and where to reach them.
    pub members: Vec<(Member, Place)>,
}

/// Where a rank is, as seen from the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// On the machine of rank 0, wherever that is from where one stands.
    WithRankZero,
    /// At this address.
    At(IpAddr),
}

/// What kind of operation ranks enter together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Agree,
    Decide,
    Gather,
    Barrier,
    Leave,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Agree => "agreement on",
            Kind::Decide => "decision on",
            Kind::Gather => "gathering of",
            Kind::Barrier => "barrier",
            Kind::Leave => "leaving",
        }
    }
}

/// What a rank brings to an operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub kind: Kind,
    /// Which one, for messages.
    pub what: String,
    pub payload: Vec<u8>,
}

impl Entry {
    /// For messages.
    pub fn name(&self) -> String {
        format!("{} {}", self.kind.name(), self.what).trim_end().to_owned()
    }

    /// Fails when neither this nor an answer that repeats it fits into a frame. Asked before anybody hears of it.
    pub fn ensure_short(&self) -> Result<()> {
        // For the other fields, each of a few bytes.
        const OTHERS: usize = 64;
        let bytes = self.payload.len() + self.what.len() + OTHERS;
        match bytes <= LONGEST_FRAME {
            true => Ok(()),
            false => Err(Error::invalid(format!(
                "{}: a message of {bytes} bytes is longer than the control plane carries ({LONGEST_FRAME})",
                self.name()
            ))),
        }
    }
}

/// A sign of life, and how far a rank is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pulse {
    /// Operations entered so far.
    pub entered: u64,
    /// The oldest of them that has not ended.
    pub waits: Option<Wait>,
    /// Grows while it works on what others wait for.
    pub worked: u64,
}

/// An operation that a rank waits in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wait {
    /// Its number, counted from 1.
    pub number: u64,
    /// Its name.
    pub what: String,
    /// For how long already.
    pub milliseconds: u64,
}

/// Between ranks that know each other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Message {
    /// To rank 0: the sender enters its operation of this number on the control plane.
    Enter(u64, Entry),
    /// From rank 0: what came of it.
    Answer(u64, std::result::Result<Vec<u8>, String>),
    Pulse(Pulse),
    /// To rank 0: something is wrong, with this rank if it can be told.
    Report {
        suspect: Option<u32>,
        reason: String,
        /// Seen in what was received, and not only by the end of a connection, which may be the work of another report.
        certain: bool,
    },
    /// To rank 0: the sender gives up.
    GaveUp {
        reason: String,
    },
    /// From rank 0: the run is over because of this rank.
    Lost {
        rank: u32,
        reason: String,
    },
}

/// Sends the greeting.
pub fn greet(mut stream: &TcpStream) -> io::Result<()> {
    let mut greeting = [0; 12];
    greeting[..8].copy_from_slice(&MAGIC);
    greeting[8..].copy_from_slice(&PROTOCOL.to_le_bytes());
    stream.write_all(&greeting)
}

/// What stands at the other end, by its greeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Other {
    Rank,
    Foreign(u32),
    Stranger,
}

/// Reads the greeting.
pub fn meet(from: &mut impl Read) -> io::Result<Other> {
    let mut greeting = [0; 12];
    from.read_exact(&mut greeting[..8])?;
    if greeting[..8] != MAGIC {
        return Ok(Other::Stranger);
    }
    from.read_exact(&mut greeting[8..])?;
    let protocol = u32::from_le_bytes(greeting[8..].try_into().expect("four bytes"));
    Ok(match protocol {
        PROTOCOL => Other::Rank,
        other => Other::Foreign(other),
    })
}

/// A frame with `message`.
///
/// # Errors
/// When it is longer than any frame may be.
pub fn frame(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = postcard::to_extend(message, vec![0; 4]).map_err(io::Error::other)?;
    let length = bytes.len() - 4;
    if length > LONGEST_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a message of {length} bytes is longer than the control plane carries ({LONGEST_FRAME})"),
        ));
    }
    bytes[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(bytes)
}

/// Reads a frame of at most `longest` bytes.
///
/// # Errors
/// `InvalidData` when it is longer, or no message of this type; otherwise the connection's own.
pub fn read_frame<T: DeserializeOwned>(from: &mut impl Read, longest: usize) -> io::Result<T> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > longest {
        return Err(invalid(format!("a message of {length} bytes, longer than any of ours")));
    }
    // Memory is taken as bytes arrive: a length alone costs nothing.
    let mut bytes = Vec::new();
    from.take(length as u64).read_to_end(&mut bytes)?;
    if bytes.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    match postcard::take_from_bytes(&bytes) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(invalid(format!("a message with {} bytes behind its end", rest.len()))),
        Err(error) => Err(invalid(format!("no message of ours ({error})"))),
    }
}

/// Reads from a connection until a moment, however slowly bytes trickle in.
pub struct Until<'a> {
    pub stream: &'a TcpStream,
    pub end: Instant,
}

impl Read for Until<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // The shortest time that the system counts is not taken for none.
        self.stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        self.stream.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages() -> Vec<Message> {
        let entry = Entry {
            kind: Kind::Agree,
            what: "configuration".into(),
            payload: (0..200).collect(),
        };
        let wait = Wait {
            number: 12,
            what: "all_gather".into(),
            milliseconds: 1 << 40,
        };
        vec![
            Message::Enter(7, entry),
            Message::Answer(7, Ok(vec![0xff; 300])),
            Message::Answer(8, Err("no".into())),
            Message::Pulse(Pulse::default()),
            Message::Pulse(Pulse {
                entered: u64::MAX,
                waits: Some(wait),
                worked: 5,
            }),
            Message::Report {
                suspect: Some(3),
                reason: "é".into(),
                certain: true,
            },
            Message::GaveUp { reason: String::new() },
            Message::Lost {
                rank: u32::MAX,
                reason: "gone".into(),
            },
        ]
    }

    #[test]
    fn messages_come_through_whole() {
        let mut wire = Vec::new();
        for message in messages() {
            wire.extend(frame(&message).unwrap());
        }
        let mut wire = wire.as_slice();
        for message in messages() {
            assert_eq!(read_frame::<Message>(&mut wire, LONGEST_FRAME).unwrap(), message);
        }
        assert!(wire.is_empty());
    }

    #[test]
    fn broken_frames_are_errors_and_nothing_else() {
        let mut state = 1u64;
        let mut next = move || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) as usize
        };
        let frames: Vec<Vec<u8>> = messages().iter().map(|message| frame(message).unwrap()).collect();
        let mut refused = 0;
        for round in 0..20_000 {
            let mut bytes = frames[round % frames.len()].clone();
            match next() % 3 {
                0 => bytes.truncate(next() % bytes.len()),
                1 => (0..=next() % 4).for_each(|_| {
                    let place = next() % bytes.len();
                    bytes[place] = next() as u8;
                }),
                _ => bytes = (0..next() % 64).map(|_| next() as u8).collect(),
            }
            // What is read in spite of all that is a message; it never ends the reader.
            let outcome = read_frame::<Message>(&mut bytes.as_slice(), LONGEST_FRAME);
            refused += usize::from(outcome.is_err());
        }
        assert!(refused > 10_000, "{refused}");
    }

    #[test]
    fn a_length_alone_takes_no_memory_and_long_frames_are_refused() {
        let claim = [0xff, 0xff, 0xff, 0x03];
        let error = read_frame::<Message>(&mut claim.as_slice(), LONGEST_FRAME).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let error = read_frame::<Message>(&mut claim.as_slice(), LONGEST_HELLO).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let long = Message::Answer(1, Ok(vec![0; LONGEST_FRAME + 1]));
        assert!(
            frame(&long)
                .unwrap_err()
                .to_string()
                .contains("longer than the control plane carries")
        );
        let mut longer = frame(&Message::Pulse(Pulse::default())).unwrap();
        longer[0] += 1;
        longer.push(0);
        let error = read_frame::<Message>(&mut longer.as_slice(), LONGEST_FRAME).unwrap_err();
        assert!(error.to_string().contains("behind its end"), "{error}");
    }

    #[test]
    fn greetings_tell_ranks_from_strangers() {
        let mut ours = MAGIC.to_vec();
        ours.extend(PROTOCOL.to_le_bytes());
        assert_eq!(meet(&mut ours.as_slice()).unwrap(), Other::Rank);
        ours[8] = 9;
        assert_eq!(meet(&mut ours.as_slice()).unwrap(), Other::Foreign(9));
        assert_eq!(meet(&mut b"GET / HTTP/1.1\r\n".as_slice()).unwrap(), Other::Stranger);
        assert!(meet(&mut b"l2p".as_slice()).is_err());
    }
}
