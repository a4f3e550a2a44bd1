//! Who is served next: clients in turn, each one's requests in the order in which they came, and with the first of them whatever has its
//! shape, so that it is drawn along.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What waits.
pub trait Waits {
    /// Its number, which no other has.
    fn id(&self) -> u64;

    /// Pictures that it asks for.
    fn pictures(&self) -> usize;

    /// Whether both can be drawn at once.
    fn joins(&self, other: &Self) -> bool;
}

/// A queue that any number of threads take from.
pub struct Queue<J> {
    inner: Mutex<Inner<J>>,
    changed: Condvar,
    most: usize,
}

struct Inner<J> {
    /// Clients that wait, the next one first, each with what it asks for.
    clients: VecDeque<(String, VecDeque<J>)>,
    closed: bool,
}

/// Why something cannot wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// So many wait already.
    Full(usize),
    /// The server is about to end.
    Closed,
}

impl<J: Waits> Queue<J> {
    /// One in which at most so many wait.
    pub fn new(most: usize) -> Self {
        Queue {
            inner: Mutex::new(Inner {
                clients: VecDeque::new(),
                closed: false,
            }),
            changed: Condvar::new(),
            most,
        }
    }

    /// Puts a client's request at the end of its row.
    ///
    /// # Errors
    /// When too many wait, or the queue is closed.
    pub fn push(&self, client: &str, job: J) -> Result<(), Refused> {
        let mut inner = self.lock();
        let waiting = inner.waiting();
        if inner.closed {
            return Err(Refused::Closed);
        }
        if waiting >= self.most {
            return Err(Refused::Full(waiting));
        }
        match inner.clients.iter_mut().find(|(name, _)| name == client) {
            Some((_, jobs)) => jobs.push_back(job),
            None => inner.clients.push_back((client.to_owned(), VecDeque::from([job]))),
        }
        self.changed.notify_one();
        Ok(())
    }

    /// Waits for requests, and takes the next one with what can be drawn along, up to so many pictures together; nothing once the queue is
    /// closed and empty.
    pub fn take(&self, pictures: usize) -> Option<Vec<J>> {
        let mut inner = self.lock();
        loop {
            if let Some(first) = inner.next() {
                return Some(inner.along(first, pictures));
            }
            if inner.closed {
                return None;
            }
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes a request out that nobody waits for any more; nothing where it is being drawn.
    pub fn remove(&self, id: u64) -> Option<J> {
        let mut inner = self.lock();
        let mut found = None;
        for (_, jobs) in &mut inner.clients {
            if let Some(place) = jobs.iter().position(|job| job.id() == id) {
                found = jobs.remove(place);
            }
        }
        inner.clients.retain(|(_, jobs)| !jobs.is_empty());
        found
    }

    /// Requests that will be drawn before this one, if it waits.
    pub fn ahead(&self, id: u64) -> Option<usize> {
        let inner = self.lock();
        // Round by round, one of each client.
        let longest = inner.clients.iter().map(|(_, jobs)| jobs.len()).max()?;
        let order = (0..longest).flat_map(|round| inner.clients.iter().filter_map(move |(_, jobs)| jobs.get(round)));
        order.map(Waits::id).position(|other| other == id)
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.lock().waiting()
    }

    /// Takes nothing more. What waits is still given out, or returned here where it is not to be.
    pub fn close(&self, empty: bool) -> Vec<J> {
        let mut inner = self.lock();
        inner.closed = true;
        let mut left = Vec::new();
        if empty {
            left.extend(inner.clients.drain(..).flat_map(|(_, jobs)| jobs));
        }
        self.changed.notify_all();
        left
    }

    fn lock(&self) -> MutexGuard<'_, Inner<J>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<J: Waits> Inner<J> {
    fn waiting(&self) -> usize {
        self.clients.iter().map(|(_, jobs)| jobs.len()).sum()
    }

    /// The first request of the first client, who then stands behind all others.
    fn next(&mut self) -> Option<J> {
        let (client, mut jobs) = self.clients.pop_front()?;
        let job = jobs.pop_front();
        if !jobs.is_empty() {
            self.clients.push_back((client, jobs));
        }
        job
    }

    /// The request with the next ones of the others, and then of its own client, that can be drawn along.
    fn along(&mut self, first: J, pictures: usize) -> Vec<J> {
        let mut sum = first.pictures();
        let mut taken = vec![first];
        let mut found = true;
        while found && sum < pictures {
            found = false;
            for (_, jobs) in &mut self.clients {
                let fits = |job: &J| job.joins(&taken[0]) && sum + job.pictures() <= pictures;
                if let Some(job) = jobs.front().is_some_and(fits).then(|| jobs.pop_front()).flatten() {
                    sum += job.pictures();
                    taken.push(job);
                    found = true;
                }
            }
            self.clients.retain(|(_, jobs)| !jobs.is_empty());
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Eq)]
    struct Job {
        id: u64,
        shape: char,
        pictures: usize,
    }

    impl Waits for Job {
        fn id(&self) -> u64 {
            self.id
        }

        fn pictures(&self) -> usize {
            self.pictures
        }

        fn joins(&self, other: &Self) -> bool {
            self.shape == other.shape
        }
    }

    /// Puts requests into a queue, each as client, number and shape.
    fn queue(jobs: &[(&str, u64, char)]) -> Queue<Job> {
        let queue = Queue::new(jobs.len());
        for &(client, id, shape) in jobs {
            let job = Job { id, shape, pictures: 1 };
            queue.push(client, job).unwrap();
        }
        queue
    }

    fn ids(queue: &Queue<Job>, pictures: usize) -> Vec<u64> {
        queue.take(pictures).unwrap().iter().map(|job| job.id).collect()
    }

    #[test]
    fn clients_are_served_in_turn() {
        let queue = queue(&[
            ("a", 1, 'x'),
            ("a", 2, 'x'),
            ("a", 3, 'x'),
            ("b", 4, 'x'),
            ("c", 5, 'x'),
            ("b", 6, 'x'),
        ]);
        assert_eq!([3, 6].map(|id| queue.ahead(id)), [Some(5), Some(4)]);
        let order: Vec<u64> = (0..6).flat_map(|_| ids(&queue, 1)).collect();
        assert_eq!(order, [1, 4, 5, 2, 6, 3]);
        assert_eq!((queue.waiting(), queue.ahead(3)), (0, None));
    }

    #[test]
    fn requests_of_one_shape_are_drawn_along() {
        let queue = queue(&[
            ("a", 1, 'x'),
            ("a", 2, 'x'),
            ("b", 3, 'y'),
            ("c", 4, 'x'),
            ("c", 5, 'y'),
            ("d", 6, 'x'),
        ]);
        // In a client's row nothing is passed over.
        assert_eq!(ids(&queue, 4), [1, 4, 6, 2]);
        assert_eq!(ids(&queue, 4), [3, 5]);
        let large = Job {
            id: 7,
            shape: 'x',
            pictures: 9,
        };
        queue.push("a", large).unwrap();
        assert_eq!(ids(&queue, 4), [7], "what is larger than a batch is drawn in several");
    }

    #[test]
    fn who_leaves_frees_a_place() {
        let queue = queue(&[("a", 1, 'x'), ("b", 2, 'x')]);
        let third = || Job {
            id: 3,
            shape: 'x',
            pictures: 1,
        };
        assert_eq!(queue.push("c", third()), Err(Refused::Full(2)));
        assert!(queue.remove(1).is_some() && queue.remove(1).is_none());
        queue.push("c", third()).unwrap();
        assert_eq!(queue.close(false), []);
        assert_eq!(queue.push("d", third()), Err(Refused::Closed));
        assert_eq!(ids(&queue, 1), [2]);
        assert_eq!(queue.close(true).len(), 1);
        assert_eq!(queue.take(1), None);
    }
}
