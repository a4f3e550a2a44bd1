//! How much a client may ask for: so many pictures a minute, saved up for no longer than one.

use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::time::Instant;

use axum::http::StatusCode;
use l2p_engine::lock::lock;
use lru::LruCache;

use super::failure::Failure;

/// Clients that are remembered; of the others it is thought that they have asked for nothing.
const CLIENTS: usize = 4096;

/// What clients have left.
pub struct Rate {
    per_minute: Option<f64>,
    clients: Mutex<LruCache<String, Purse>>,
}

/// What a client has left.
struct Purse {
    left: f64,
    at: Instant,
}

impl Rate {
    /// So many pictures a minute, or as many as anybody likes.
    pub fn new(per_minute: Option<f64>) -> Self {
        Rate {
            per_minute,
            clients: Mutex::new(LruCache::new(NonZeroUsize::new(CLIENTS).expect("it is more than none"))),
        }
    }

    /// Takes what a request costs.
    ///
    /// # Errors
    /// When the client has not that much left, with when it will have.
    pub fn spend(&self, client: &str, pictures: f64) -> Result<(), Failure> {
        self.spend_at(client, pictures, Instant::now())
    }

    fn spend_at(&self, client: &str, pictures: f64, now: Instant) -> Result<(), Failure> {
        let Some(most) = self.per_minute else { return Ok(()) };
        let mut clients = lock(&self.clients);
        let purse = clients.get_or_insert_mut(client.to_owned(), || Purse { left: most, at: now });
        let saved = now.saturating_duration_since(purse.at).as_secs_f64() * most / 60.0;
        purse.left = (purse.left + saved).min(most);
        purse.at = now;
        if pictures <= purse.left {
            purse.left -= pictures;
            return Ok(());
        }
        let message = format!("more than {most} pictures a minute");
        Err(match pictures > most {
            true => Failure::field("count", message),
            false => {
                let seconds = ((pictures - purse.left) * 60.0 / most).ceil() as u64;
                Failure::later(
                    StatusCode::TOO_MANY_REQUESTS,
                    format!("{message}: come again in {seconds} s"),
                    seconds,
                )
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_is_spent_comes_back() {
        let rate = Rate::new(Some(6.0));
        let start = Instant::now();
        let spend = |client: &str, pictures: f64, seconds: u64| {
            rate.spend_at(client, pictures, start + Duration::from_secs(seconds))
                .map_err(|failure| (failure.status.as_u16(), failure.retry_after))
        };
        assert_eq!(spend("a", 6.0, 0), Ok(()));
        assert_eq!(spend("a", 1.0, 0), Err((429, Some(10))));
        assert_eq!(spend("b", 1.0, 0), Ok(()));
        assert_eq!(spend("a", 1.0, 10), Ok(()));
        assert_eq!(spend("a", 6.0, 1000), Ok(()), "no more than a minute's are saved");
        assert_eq!(spend("a", 1.0, 1000), Err((429, Some(10))));
        assert_eq!(spend("a", 7.0, 2000), Err((400, None)), "which it could never have");
        assert!(Rate::new(None).spend("a", 1e9).is_ok());
    }
}
