//! A connection of the control plane, and what its end says.

use std::io::{ErrorKind, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Mutex;

use super::wire::{self, Message};
use crate::lock::lock;

/// A connection of the control plane.
pub struct Link {
    /// The rank at its other end.
    pub rank: usize,
    writer: Mutex<TcpStream>,
}

impl Link {
    /// The connection to `rank`.
    pub fn new(rank: usize, stream: TcpStream) -> Self {
        Link {
            rank,
            writer: Mutex::new(stream),
        }
    }

    /// Sends a message.
    ///
    /// # Errors
    /// Those of the connection; `InvalidInput` when the message is longer than any may be, of which nothing is sent.
    pub fn send(&self, message: &Message) -> std::io::Result<()> {
        let frame = wire::frame(message)?;
        lock(&self.writer).write_all(&frame)
    }

    /// Closes one direction, or both.
    pub fn close(&self, how: Shutdown) {
        // What is closed already needs no closing.
        let _ = lock(&self.writer).shutdown(how);
    }
}

/// What the end of a connection says of the rank at its other end.
pub fn ended(error: &std::io::Error) -> String {
    match error.kind() {
        ErrorKind::InvalidData => format!("it sent {error}"),
        // Which of these it is depends on what was on its way.
        ErrorKind::UnexpectedEof
        | ErrorKind::ConnectionReset
        | ErrorKind::ConnectionAborted
        | ErrorKind::BrokenPipe => {
            "its connection closed without a word: killed, crashed, or its machine went down".into()
        }
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            "it takes in nothing of what it is sent: stopped, or its machine or network is down".into()
        }
        _ => format!("its connection broke ({error})"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;
    use std::time::Duration;

    use super::*;

    /// Two connected sockets.
    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    #[test]
    fn a_death_reads_the_same_whatever_was_on_its_way() {
        let (mut near, far) = pair();
        drop(far);
        let quiet = near.read_exact(&mut [0]).unwrap_err();
        let (mut near, far) = pair();
        // What it has not read when it ends resets the connection.
        near.write_all(&[1; 100]).unwrap();
        far.peek(&mut [0]).unwrap();
        drop(far);
        let reset = near.read_exact(&mut [0]).unwrap_err();
        let sent = loop {
            if let Err(error) = near.write_all(&[1; 100]) {
                break error;
            }
        };
        assert_ne!(quiet.kind(), reset.kind());
        for error in [quiet, reset, sent] {
            let reason = ended(&error);
            assert!(
                reason.starts_with("its connection closed without a word"),
                "{error}: {reason}"
            );
        }
    }

    #[test]
    fn one_that_takes_nothing_in_keeps_nobody_for_long() {
        let (near, far) = pair();
        near.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
        let link = Link::new(1, near);
        let error = loop {
            if let Err(error) = link.send(&Message::Answer(1, Ok(vec![0; 1 << 20]))) {
                break error;
            }
        };
        assert!(
            ended(&error).starts_with("it takes in nothing of what it is sent"),
            "{error}"
        );
        drop(far);
    }
}
