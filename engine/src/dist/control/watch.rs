//! Finds ranks that are silent, and ranks that do not come where others wait.

use std::collections::BTreeMap;
use std::time::Instant;

use super::wire::{Pulse, Wait};
use crate::dist::Options;

/// What is known of a rank.
#[derive(Clone, Debug)]
pub struct Signs {
    /// When it was last heard of.
    pub heard: Instant,
    entered: u64,
    /// The operation it waits in: number, name, and since when.
    waits: Option<(u64, String, Instant)>,
    /// How often it said that it works, and when it last did so.
    worked: (u64, Option<Instant>),
}

impl Signs {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::of(Pulse::default(), Instant::now())
    }

    /// Those of a pulse that came at `now`.
    pub fn of(pulse: Pulse, now: Instant) -> Self {
        let waits = pulse.waits.map(|wait| {
            let since = now.checked_sub(std::time::Duration::from_millis(wait.milliseconds));
            (wait.number, wait.what, since.unwrap_or(now))
        });
        Signs {
            heard: now,
            entered: pulse.entered,
            waits,
            worked: (pulse.worked, None),
        }
    }

    /// Takes in a pulse that comes now.
    pub fn take(&mut self, pulse: Pulse) {
        let (known, at) = self.worked;
        let now = Instant::now();
        let at = if pulse.worked > known { Some(now) } else { at };
        *self = Self::of(pulse, now);
        self.worked.1 = at;
    }
}

/// The oldest operation that has not ended.
pub fn oldest(open: &BTreeMap<u64, (String, Instant)>, now: Instant) -> Option<Wait> {
    let (number, (what, since)) = open.first_key_value()?;
    Some(Wait {
        number: *number,
        what: what.clone(),
        milliseconds: now.saturating_duration_since(*since).as_millis() as u64,
    })
}

/// A rank other than `own` that has not been heard of for too long.
pub fn silent(signs: &[Signs], own: usize, options: &Options, now: Instant) -> Option<(usize, String)> {
    let (rank, silence) = signs
        .iter()
        .enumerate()
        .filter(|(rank, _)| *rank != own)
        .map(|(rank, signs)| (rank, now.saturating_duration_since(signs.heard)))
        .max_by_key(|(_, silence)| *silence)?;
    (silence > options.silence).then(|| {
        let seconds = options.silence.as_secs_f64();
        (
            rank,
            format!("nothing was heard of it for {seconds} s: stopped, or its machine or network is down"),
        )
    })
}

/// The rank that others have waited for too long: the one that has entered the fewest operations, unless it says that it works. Where
/// all have entered the one they wait in, it is the operation that does not end.
pub fn hanging(signs: &[Signs], options: &Options, now: Instant) -> Option<(usize, String)> {
    // What is known may be as old as two beats.
    let limit = options.operation + 2 * options.heartbeat();
    let (waiting, number, what) = signs
        .iter()
        .enumerate()
        .filter_map(|(rank, signs)| signs.waits.as_ref().map(|wait| (rank, wait)))
        .filter(|(_, (_, _, since))| now.saturating_duration_since(*since) > limit)
        .map(|(rank, (number, what, _))| (rank, *number, what))
        .max_by_key(|(_, number, _)| *number)?;
    let (rank, least) = signs.iter().enumerate().min_by_key(|(_, signs)| signs.entered)?;
    let works = |at: Instant| now.saturating_duration_since(at) <= limit;
    if least.entered < number && least.worked.1.is_some_and(works) {
        return None;
    }
    let (what, seconds) = (crate::printable(what), options.operation.as_secs_f64());
    Some(match least.entered < number {
        true => (
            rank,
            format!(
                "it is {} behind: rank {waiting} has waited in operation {number} ({what}) for more than {seconds} s",
                match number - least.entered {
                    1 => "one operation".into(),
                    more => format!("{more} operations"),
                }
            ),
        ),
        false => (
            waiting,
            format!("operation {number} ({what}), which all ranks have entered, has not ended within {seconds} s"),
        ),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn signs(now: Instant, entered: u64, waits: Option<(u64, u64)>) -> Signs {
        let waits = waits.map(|(number, seconds)| Wait {
            number,
            what: "all_gather".into(),
            milliseconds: seconds * 1000,
        });
        let worked = 0;
        Signs::of(Pulse { entered, waits, worked }, now)
    }

    fn options() -> Options {
        Options {
            operation: Duration::from_secs(60),
            silence: Duration::from_secs(30),
            ..Options::default()
        }
    }

    #[test]
    fn the_one_that_is_furthest_behind_is_named() {
        let now = Instant::now() + Duration::from_secs(1000);
        let ranks = [
            signs(now, 12, Some((12, 70))),
            signs(now, 12, Some((11, 70))),
            signs(now, 9, None),
            signs(now, 10, None),
        ];
        assert_eq!(
            hanging(&ranks, &options(), now).unwrap(),
            (
                2,
                "it is 3 operations behind: rank 0 has waited in operation 12 (all_gather) for more than 60 s".into()
            )
        );
    }

    #[test]
    fn one_that_works_is_waited_for() {
        let now = Instant::now();
        let mut ranks = [signs(now, 12, Some((12, 70))), signs(now, 9, None)];
        let pulse = |worked| Pulse {
            entered: 9,
            waits: None,
            worked,
        };
        assert!(hanging(&ranks, &options(), now).is_some());
        ranks[1].take(pulse(3));
        assert_eq!(hanging(&ranks, &options(), now), None);
        // It said so too long ago.
        ranks[1].take(pulse(3));
        let later = now + Duration::from_secs(90);
        assert!(hanging(&ranks, &options(), later).is_some());
        ranks[1].take(pulse(2));
        assert!(hanging(&ranks, &options(), later).is_some());
    }

    #[test]
    fn nobody_is_blamed_early() {
        let now = Instant::now() + Duration::from_secs(1000);
        let ranks = [signs(now, 12, Some((12, 61))), signs(now, 11, None)];
        assert_eq!(hanging(&ranks, &options(), now), None);
        let ranks = [signs(now, 12, None), signs(now, 2, None)];
        assert_eq!(hanging(&ranks, &options(), now), None);
    }

    #[test]
    fn an_operation_that_does_not_end_is_named_where_all_are_in_it() {
        let now = Instant::now() + Duration::from_secs(1000);
        let ranks = [signs(now, 5, Some((5, 80))), signs(now, 5, Some((5, 90)))];
        let (_, reason) = hanging(&ranks, &options(), now).unwrap();
        assert_eq!(
            reason,
            "operation 5 (all_gather), which all ranks have entered, has not ended within 60 s"
        );
    }

    #[test]
    fn silence_is_noticed_but_not_ones_own() {
        let now = Instant::now() + Duration::from_secs(1000);
        let old = signs(now - Duration::from_secs(31), 3, None);
        let ranks = [old.clone(), signs(now, 3, None), old];
        assert_eq!(silent(&ranks, 0, &options(), now).unwrap().0, 2);
        assert_eq!(silent(&ranks[..2], 0, &options(), now), None);
    }
}
