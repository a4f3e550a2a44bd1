//! A port at which anybody may knock: connections are greeted each in a thread of its own, so that one that says nothing, or
//! nonsense, keeps nobody waiting.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// The longest that one connection may take to say who it is.
pub const GREETING: Duration = Duration::from_secs(10);

/// Connections that are greeted at the same time; more wait outside.
const MOST_AT_ONCE: usize = 64;

/// Between two looks for a connection.
const PAUSE: Duration = Duration::from_millis(5);

/// Greets connections to `listener` until `take` has enough (true) or the time is over (false). `greet` runs in threads; `take`
/// gets what it returned, on this one; `wait` is asked now and then whether to go on.
///
/// # Errors
/// Those of `take` and `wait`, and when the port can no longer be listened at.
pub fn admit<T: Send + 'static>(
    listener: &TcpListener,
    end: Instant,
    greet: impl Fn(TcpStream, SocketAddr) -> T + Clone + Send + 'static,
    mut take: impl FnMut(T) -> Result<ControlFlow<()>>,
    wait: impl Fn() -> Result<()>,
) -> Result<bool> {
    let failed = |error: std::io::Error| Error::invalid(format!("cannot take connections: {error}"));
    listener.set_nonblocking(true).map_err(failed)?;
    let (sender, receiver) = mpsc::channel();
    let mut greeted = 0;
    loop {
        while let Ok(guest) = receiver.try_recv() {
            greeted -= 1;
            if take(guest)?.is_break() {
                return Ok(true);
            }
        }
        wait()?;
        if Instant::now() >= end {
            return Ok(false);
        }
        let accepted = match greeted < MOST_AT_ONCE {
            true => listener.accept(),
            false => Err(ErrorKind::WouldBlock.into()),
        };
        match accepted {
            Ok((stream, address)) => {
                greeted += 1;
                let (sender, greet) = (sender.clone(), greet.clone());
                std::thread::spawn(move || {
                    // Accepted sockets inherit that they do not block on some systems.
                    let _ = stream.set_nonblocking(false);
                    // Nobody hears of a guest who comes after the end.
                    let _ = sender.send(greet(stream, address));
                });
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(PAUSE),
            // The guest has left already.
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => {}
            Err(error) => return Err(failed(error)),
        }
    }
}
