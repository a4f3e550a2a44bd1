//! What a rank's threads share: which operations it is in, what has come in answer, and whether the run is over.

use std::collections::BTreeMap;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::link::{Link, ended};
use super::rounds::{Round, conclude};
use super::watch::{Signs, oldest};
use super::wire::{self, Entry, Kind, Member, Message, Pulse};
use crate::dist::Options;
use crate::error::{Error, Result};
use crate::lock::lock;

/// How long a rank that noticed something waits for rank 0's word, which knows more.
const VERDICT: Duration = Duration::from_secs(5);

/// How long rank 0 waits, after a rank's report, for a better explanation: the end of the connection to the one at fault.
const BETTER_EXPLANATION: Duration = Duration::from_secs(2);

/// Why the run is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    pub rank: usize,
    pub host: String,
    pub reason: String,
}

impl Loss {
    pub fn error(&self) -> Error {
        Error::PeerLost {
            rank: self.rank,
            host: self.host.clone(),
            reason: self.reason.clone(),
        }
    }
}

/// Ends what a data plane waits for.
pub type Hook = Box<dyn FnOnce() + Send>;

/// A rank's side of the control plane; see the module's head comment.
pub struct Shared {
    pub rank: usize,
    pub members: Vec<Member>,
    pub options: Options,
    /// On rank 0 to every other rank, elsewhere to rank 0.
    links: Vec<Link>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Why the run is over; set once those were told who must be.
    loss: Option<Loss>,
    /// Somebody is about to say that the run is over.
    losing: bool,
    hooks: Vec<Hook>,
    /// Operations that this rank has entered, and those that have not ended.
    entered: u64,
    open: BTreeMap<u64, (String, Instant)>,
    /// How often this rank said that it works.
    worked: u64,
    /// Operations of the control plane that this rank has entered.
    round: u64,
    answers: BTreeMap<u64, std::result::Result<Vec<u8>, String>>,
    /// On rank 0: what ranks have brought so far.
    rounds: BTreeMap<u64, Round>,
    /// On rank 0 of every rank, elsewhere of rank 0 at its place: signs of life.
    signs: Vec<Signs>,
    /// What was found wrong, on rank 0 by others too.
    reports: Vec<Report>,
    /// The number of the operation by which this rank leaves.
    leaves_by: Option<u64>,
    /// All ranks have left in agreement.
    left: bool,
    /// This rank wants its threads to end.
    closing: bool,
    /// Connections whose other end is closed.
    closed: usize,
}

/// Something that was found wrong.
struct Report {
    /// When to believe it.
    due: Instant,
    loss: Loss,
    /// See [`Message::Report`].
    certain: bool,
}

impl Report {
    fn new(loss: Loss, certain: bool) -> Self {
        let due = Instant::now() + BETTER_EXPLANATION;
        Report { due, loss, certain }
    }
}

/// An operation that this rank is in, until it is dropped.
pub struct Ticket {
    shared: Arc<Shared>,
    /// Its number, counted from 1 and the same on all ranks.
    pub number: u64,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.shared.lock().open.remove(&self.number);
    }
}

impl Shared {
    pub fn new(rank: usize, members: Vec<Member>, links: Vec<Link>, options: Options) -> Self {
        let state = State {
            signs: members.iter().map(|_| Signs::new()).collect(),
            ..State::default()
        };
        Shared {
            rank,
            members,
            options,
            links,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    pub fn world(&self) -> usize {
        self.members.len()
    }

    fn is_hub(&self) -> bool {
        self.rank == 0
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn loss(&self, rank: usize, reason: impl Into<String>) -> Loss {
        Loss {
            rank,
            host: crate::shown_name(&self.members[rank].host).into_owned(),
            reason: crate::printable(&reason.into()).into_owned(),
        }
    }

    /// Fails once the run is over.
    pub fn check(&self) -> Result<()> {
        match &self.lock().loss {
            Some(loss) => Err(loss.error()),
            None => Ok(()),
        }
    }

    /// Enters an operation.
    pub fn enter(self: &Arc<Self>, what: &str) -> Result<Ticket> {
        let mut state = self.lock();
        if let Some(loss) = &state.loss {
            return Err(loss.error());
        }
        state.entered += 1;
        let number = state.entered;
        state.open.insert(number, (what.to_owned(), Instant::now()));
        Ok(Ticket {
            shared: self.clone(),
            number,
        })
    }

    /// This rank works on something that others may wait for.
    pub fn work(&self) {
        self.lock().worked += 1;
    }

    /// Runs `hook` as soon as the run is over because a rank was lost.
    pub fn on_loss(&self, hook: Hook) {
        let mut state = self.lock();
        match state.loss {
            None => state.hooks.push(hook),
            Some(_) => {
                drop(state);
                hook();
            }
        }
    }

    /// Brings `payload` to an operation that every rank enters, and waits for what comes of it.
    pub fn exchange(self: &Arc<Self>, kind: Kind, what: &str, payload: Vec<u8>) -> Result<Vec<u8>> {
        let entry = Entry {
            kind,
            what: what.to_owned(),
            payload,
        };
        entry.ensure_short()?;
        let _ticket = self.enter(&entry.name())?;
        let number = {
            let mut state = self.lock();
            state.round += 1;
            if kind == Kind::Leave {
                state.leaves_by = Some(state.round);
            }
            state.round
        };
        if self.is_hub() {
            self.arrive(0, number, entry);
        } else if let Err(error) = self.links[0].send(&Message::Enter(number, entry)) {
            // Rank 0's last word may be on its way.
            return Err(self.verdict(Some(0), ended(&error)));
        }
        let mut state = self.lock();
        loop {
            if let Some(answer) = state.answers.remove(&number) {
                return answer.map_err(Error::Invalid);
            }
            if let Some(loss) = &state.loss {
                return Err(loss.error());
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// On rank 0: a rank enters an operation of the control plane.
    fn arrive(&self, rank: usize, number: u64, entry: Entry) {
        let world = self.world();
        let mut state = self.lock();
        let round = state.rounds.entry(number).or_insert_with(|| Round::new(world));
        round.entries[rank] = Some(entry);
        if !round.is_complete() {
            return;
        }
        let round = state.rounds.remove(&number).expect("looked at above");
        let leaving = round.leaves();
        // From here on a closed connection is no loss.
        state.left |= leaving;
        drop(state);
        let conclusion = conclude(&round, &self.members);
        for link in &self.links {
            self.tell(link, &Message::Answer(number, conclusion.of(link.rank)));
        }
        self.lock().answers.insert(number, conclusion.of(0));
        self.changed.notify_all();
    }

    /// Sends a message. Where that fails, the end of the connection says why, if it is not another one that takes nothing in.
    fn tell(&self, link: &Link, message: &Message) {
        if let Err(error) = link.send(message) {
            let loss = self.loss(link.rank, ended(&error));
            self.lock().reports.push(Report::new(loss, false));
        }
    }

    /// Tells rank 0 that something is wrong, with rank `suspect` if it can be told; `certain` as in [`Message::Report`].
    pub fn report(&self, suspect: Option<usize>, reason: &str, certain: bool) {
        if self.is_hub() {
            let loss = self.loss(suspect.unwrap_or(self.rank), reason);
            self.lock().reports.push(Report::new(loss, certain));
            self.changed.notify_all();
        } else {
            let suspect = suspect.map(|rank| rank as u32);
            let reason = reason.to_owned();
            // Where rank 0 cannot be told, its connection is closed, which is noticed elsewhere.
            let _ = self.links[0].send(&Message::Report {
                suspect,
                reason,
                certain,
            });
        }
    }

    /// What a rank that reported something must tell its user: rank 0's word, or its own where that does not come.
    pub fn verdict(&self, suspect: Option<usize>, reason: String) -> Error {
        let own = self.loss(suspect.unwrap_or(self.rank), reason);
        let end = Instant::now() + VERDICT;
        let mut state = self.lock();
        loop {
            if let Some(loss) = &state.loss {
                return loss.error();
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(state);
                self.lose(own.clone());
                return self.check().err().unwrap_or_else(|| own.error());
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The run is over: on rank 0 everybody is told first, then this rank's own waits end.
    pub fn lose(&self, loss: Loss) {
        {
            let mut state = self.lock();
            if state.losing || state.left {
                return;
            }
            state.losing = true;
        }
        if self.is_hub() {
            let message = Message::Lost {
                rank: loss.rank as u32,
                reason: loss.reason.clone(),
            };
            for link in &self.links {
                // One who is gone need not hear it.
                let _ = link.send(&message);
            }
        }
        let hooks = {
            let mut state = self.lock();
            state.loss = Some(loss);
            std::mem::take(&mut state.hooks)
        };
        self.changed.notify_all();
        hooks.into_iter().for_each(|hook| hook());
    }

    /// This rank gives up, unless all have left: the others are told why.
    pub fn give_up(&self, reason: &str) {
        {
            let state = self.lock();
            if state.left || state.losing {
                return;
            }
        }
        if !self.is_hub() {
            let reason = reason.to_owned();
            // Where it cannot be told, the connection's end says enough.
            let _ = self.links[0].send(&Message::GaveUp { reason });
        }
        self.lose(self.loss(self.rank, reason));
    }

    /// Reads what comes over the connection to `from` until it ends.
    pub fn listen(self: &Arc<Self>, from: usize, mut stream: TcpStream) {
        let ended = loop {
            match wire::read_frame::<Message>(&mut stream, wire::LONGEST_FRAME) {
                Ok(message) => {
                    if let Err(reason) = self.hear(from, message) {
                        break reason;
                    }
                }
                Err(error) => break ended(&error),
            }
        };
        // An end that this rank wanted is no loss of another one.
        if !self.lock().closing {
            self.lose(self.loss(from, ended));
        }
        // Nothing more is said to one who no longer speaks; it need not wait for more.
        let link = self.links.iter().find(|link| link.rank == from);
        link.into_iter().for_each(|link| link.close(Shutdown::Both));
        self.lock().closed += 1;
        self.changed.notify_all();
    }

    fn hear(&self, from: usize, message: Message) -> std::result::Result<(), String> {
        self.lock().signs[from].heard = Instant::now();
        match message {
            Message::Pulse(pulse) => self.lock().signs[from].take(pulse),
            Message::Enter(number, entry) if self.is_hub() => self.arrive(from, number, entry),
            Message::Report {
                suspect,
                reason,
                certain,
            } if self.is_hub() => {
                let rank = suspect.map_or(from, |rank| rank as usize);
                let rank = if rank < self.world() { rank } else { from };
                let loss = self.loss(rank, reason);
                self.lock().reports.push(Report::new(loss, certain));
            }
            Message::GaveUp { reason } if self.is_hub() => self.lose(self.loss(from, reason)),
            Message::Answer(number, answer) if !self.is_hub() => {
                let mut state = self.lock();
                // Noted before the connection's end is: it may follow at once.
                state.left |= state.leaves_by == Some(number) && answer.is_ok();
                state.answers.insert(number, answer);
            }
            Message::Lost { rank, reason } if !self.is_hub() => {
                let rank = rank as usize;
                let rank = if rank < self.world() { rank } else { 0 };
                self.lose(self.loss(rank, reason));
            }
            _ => return Err("it sent what nobody expects of it".into()),
        }
        self.changed.notify_all();
        Ok(())
    }

    /// Tells the others that this rank lives, and watches them, until the run is over.
    pub fn watch(&self) {
        let beat = self.options.heartbeat();
        let mut sent: Option<Instant> = None;
        loop {
            let now = Instant::now();
            if sent.is_none_or(|sent| now - sent >= beat) {
                sent = Some(now);
                let pulse = self.pulse(now);
                for link in &self.links {
                    self.tell(link, &Message::Pulse(pulse.clone()));
                }
                self.lock().signs[self.rank].take(pulse);
            }
            if let Some(loss) = self.find_loss(Instant::now()) {
                self.lose(loss);
            }
            let state = self.lock();
            if state.closing || state.loss.is_some() {
                return;
            }
            let pause = beat.min(Duration::from_millis(100));
            // What wakes it early is one more reason to look.
            drop(self.changed.wait_timeout(state, pause));
        }
    }

    fn pulse(&self, now: Instant) -> Pulse {
        let state = self.lock();
        Pulse {
            entered: state.entered,
            waits: oldest(&state.open, now),
            worked: state.worked,
        }
    }

    /// Who is to blame, if something takes too long or was reported long enough ago.
    fn find_loss(&self, now: Instant) -> Option<Loss> {
        let state = self.lock();
        if state.left {
            return None;
        }
        if let Some(report) = state.reports.iter().find(|report| report.due <= now) {
            let certain = state.reports.iter().find(|report| report.certain);
            return Some(certain.unwrap_or(report).loss.clone());
        }
        let found = match self.is_hub() {
            true => super::watch::silent(&state.signs, self.rank, &self.options, now)
                .or_else(|| super::watch::hanging(&state.signs, &self.options, now)),
            false => super::watch::silent(&state.signs[..1], self.rank, &self.options, now),
        };
        found.map(|(rank, reason)| self.loss(rank, reason))
    }

    /// Ends the threads of this rank: the other ends are given a moment to hear the last word.
    pub fn close(&self) {
        self.lock().closing = true;
        self.changed.notify_all();
        self.links.iter().for_each(|link| link.close(Shutdown::Write));
        let end = Instant::now() + Duration::from_secs(1);
        let mut state = self.lock();
        while state.closed < self.links.len() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        self.links.iter().for_each(|link| link.close(Shutdown::Both));
    }
}
