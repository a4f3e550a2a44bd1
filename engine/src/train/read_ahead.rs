//! Reading on one thread what another one takes up, a few values ahead.

use std::sync::mpsc::sync_channel;

use crate::error::Result;

/// Values that are read and wait; with the one that is read and the one that is taken up, so many more are in memory at most.
const WAITING: usize = 1;

/// Reads the value of each job on a thread of its own, in order, and takes them up on this one.
///
/// # Errors
/// The first of either side; nothing is read or taken up after it.
pub(super) fn read_ahead<J: Send, T: Send>(
    jobs: impl IntoIterator<Item = J, IntoIter: Send>,
    read: &mut (dyn FnMut(&J) -> Result<T> + Send),
    take: &mut dyn FnMut(J, T) -> Result<()>,
) -> Result<()> {
    let jobs = jobs.into_iter();
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(WAITING);
        scope.spawn(move || {
            for job in jobs {
                let value = read(&job);
                let failed = value.is_err();
                // Nobody receives any more once something was not taken up.
                if sender.send((job, value)).is_err() || failed {
                    break;
                }
            }
        });
        receiver.into_iter().try_for_each(|(job, value)| take(job, value?))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::error::Error;

    #[test]
    fn values_come_in_order_and_few_of_them_wait() {
        let (alive, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let mut taken = Vec::new();
        let mut read = |job: &usize| {
            most.fetch_max(alive.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            Ok(job * job)
        };
        let mut take = |job, value| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            taken.push((job, value));
            alive.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        };
        read_ahead(0..50, &mut read, &mut take).unwrap();
        assert_eq!(taken, (0..50).map(|job| (job, job * job)).collect::<Vec<_>>());
        assert!(most.into_inner() <= WAITING + 2);
    }

    #[test]
    fn the_first_error_of_either_side_ends_it() {
        let failing = |at: usize| move |job: &usize| if *job == at { Err(Error::Interrupted) } else { Ok(()) };
        let mut taken = 0;
        let mut count = |_, ()| {
            taken += 1;
            Ok(())
        };
        assert!(read_ahead(0..1000, &mut failing(7), &mut count).is_err());
        assert_eq!(taken, 7);
        let mut read = 0;
        let mut reading = |_: &usize| {
            read += 1;
            Ok(())
        };
        let mut refuse = |job, ()| if job == 3 { Err(Error::Interrupted) } else { Ok(()) };
        assert!(read_ahead(0..1000, &mut reading, &mut refuse).is_err());
        assert!(read <= 3 + WAITING + 2, "{read} were read");
    }
}
