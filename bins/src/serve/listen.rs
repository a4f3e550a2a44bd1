//! Connections: so many at a time, each with a limit on how long its headers take, and an end that lets what is under way finish.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;

use super::app::App;
use super::guard::Peer;

/// Bytes of a request's line and headers at most.
const HEADER_BYTES: usize = 64 << 10;

/// How often it is looked whether to stop.
const TICK: Duration = Duration::from_millis(100);

/// Serves until the program is asked to stop, or nothing can be drawn any more; then waits for what is under way.
///
/// # Errors
/// When the address cannot be listened at.
pub async fn listen(app: &Arc<App>, router: Router) -> anyhow::Result<()> {
    let arguments = &app.arguments;
    let address = SocketAddr::new(arguments.host, arguments.port);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen at {address}: choose another --port, or --port 0 for a free one"))?;
    let address = listener.local_addr()?;
    crate::say(format_args!("listening at http://{address}/"));
    let places = Arc::new(Semaphore::new(arguments.connections.get()));
    let graceful = GracefulShutdown::new();
    let mut ticks = tokio::time::interval(TICK);
    let mut end: Option<Instant> = None;
    loop {
        let place = places.clone().acquire_owned();
        let connection = async {
            let place = place.await.ok()?;
            let (stream, peer) = listener.accept().await.ok()?;
            Some((place, stream, peer))
        };
        tokio::pin!(connection);
        let accepted = loop {
            tokio::select! {
                accepted = &mut connection => break Some(accepted),
                _ = ticks.tick() => {
                    if end.is_none() && (crate::stop_requested() || app.is_stopping()) {
                        app.stop();
                        let seconds = arguments.drain().as_secs();
                        crate::say(format_args!("stopping: what is under way has {seconds} s"));
                        end = Some(Instant::now() + arguments.drain());
                    }
                    // Whoever comes meanwhile is told to come again; what waits is drawn, as far as there is time.
                    if end.is_some_and(|end| app.under_way().is_empty() || Instant::now() > end) {
                        break None;
                    }
                }
            }
        };
        let Some(accepted) = accepted else { break };
        // Too many files are open, or the client is gone already.
        let Some((place, stream, peer)) = accepted else {
            tokio::time::sleep(TICK).await;
            continue;
        };
        // Small events go out at once.
        let _ = stream.set_nodelay(true);
        // Whoever does not read an answer is left, too.
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(arguments.patience()));
        let service = TowerToHyperService::new(router.clone().layer(Extension(Peer(peer.ip()))));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(arguments.patience())
            .max_buf_size(HEADER_BYTES)
            .serve_connection(TokioIo::new(Box::pin(stream)), service);
        let watched = graceful.watch(connection);
        tokio::spawn(async move {
            // What breaks off is the client's matter.
            let _ = watched.await;
            drop(place);
        });
    }
    drop(listener);
    // Answers that are on their way.
    let left = end
        .map_or(TICK, |end| end.saturating_duration_since(Instant::now()))
        .max(TICK);
    if tokio::time::timeout(left, graceful.shutdown()).await.is_err() {
        tracing::warn!("the time to finish is over: what is left is given up");
    }
    Ok(())
}
