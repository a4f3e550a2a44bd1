//! The data plane between CPUs: a connection between any two ranks.
//!
//! Operations run one after the other in a thread of their own, beside the computation. What goes to each rank is written by a thread
//! for that rank, so that no two ranks can ever wait for each other to read, whatever the size. A transfer begins with a header that
//! says which operation it belongs to; ranks whose programs have come apart notice it there.

mod door;
mod lane;

use std::io;
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::JoinHandle;

pub(super) use door::Door;
use lane::{Header, Lane, Outgoing, bytes, bytes_mut};

use super::communicator::{Communicator, Pending, Running, ensure_all_gather, ensure_all_to_all, ensure_broadcast};
use super::control::{Control, Shared, Ticket};
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// See the module's head comment.
pub(super) struct Tcp {
    rank: usize,
    world: usize,
    shared: Arc<Shared>,
    queue: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    sockets: Arc<Vec<TcpStream>>,
}

impl Tcp {
    /// Connects this rank with all others.
    pub fn connect(door: &Door, control: &Control) -> Result<Self> {
        Self::begin(control.shared().clone(), door.meet(control)?)
    }

    fn begin(shared: Arc<Shared>, streams: Vec<Option<TcpStream>>) -> Result<Self> {
        let failed = |error: io::Error| Error::invalid(format!("a connection for tensors broke at once ({error})"));
        let mut lanes = Vec::new();
        let mut sockets = Vec::new();
        for (peer, stream) in streams.into_iter().enumerate() {
            let Some(stream) = stream else { continue };
            stream.set_nodelay(true).map_err(failed)?;
            stream.set_read_timeout(None).map_err(failed)?;
            stream.set_write_timeout(None).map_err(failed)?;
            sockets.push(stream.try_clone().map_err(failed)?);
            lanes.push(Lane::new(peer, stream).map_err(failed)?);
        }
        let sockets = Arc::new(sockets);
        let closed = sockets.clone();
        shared.on_loss(Box::new(move || close(&closed)));
        let (queue, jobs) = mpsc::channel::<Job>();
        let (rank, world) = (shared.rank, shared.world());
        let mut runner = Runner {
            rank,
            shared: shared.clone(),
            lanes,
            broken: false,
        };
        let thread = std::thread::spawn(move || jobs.into_iter().for_each(|job| runner.run(job)));
        Ok(Tcp {
            rank,
            world,
            shared,
            queue: Some(queue),
            thread: Some(thread),
            sockets,
        })
    }

    fn start(&self, name: &'static str, plan: Plan) -> Result<Pending> {
        let ticket = self.shared.enter(name)?;
        let (reply, receiver) = mpsc::sync_channel(1);
        let job = Job {
            name,
            plan,
            ticket,
            reply,
        };
        let queue = self.queue.as_ref().expect("there is a queue until this is dropped");
        queue
            .send(job)
            .map_err(|_| Error::invalid("the thread that exchanges tensors has ended"))?;
        Ok(Pending::running(Queued(receiver)))
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        // The queue ends; whatever a job still waits for will not come, unless all have left, and then there is no such job.
        self.queue = None;
        close(&self.sockets);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed where it happened.
            let _ = thread.join();
        }
    }
}

impl Communicator for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.world
    }

    fn all_to_all(&self, parts: &Tensor, receive: Tensor) -> Result<Pending> {
        ensure_all_to_all(self.world, parts, &receive)?;
        let receive = owned("all_to_all", receive)?;
        let row = parts.bytes() / self.world;
        let rows: Vec<Option<Range<usize>>> = (0..self.world).map(|rank| Some(rank * row..(rank + 1) * row)).collect();
        self.start(
            "all_to_all",
            Plan {
                source: Some(parts.clone()),
                outgoing: rows.clone(),
                target: receive,
                incoming: rows,
            },
        )
    }

    fn all_gather(&self, part: &Tensor, receive: Tensor) -> Result<Pending> {
        ensure_all_gather(self.world, part, &receive)?;
        let receive = owned("all_gather", receive)?;
        let row = part.bytes();
        self.start(
            "all_gather",
            Plan {
                source: Some(part.clone()),
                outgoing: vec![Some(0..row); self.world],
                target: receive,
                incoming: (0..self.world).map(|rank| Some(rank * row..(rank + 1) * row)).collect(),
            },
        )
    }

    fn broadcast(&self, tensor: Tensor, root: usize) -> Result<Pending> {
        ensure_broadcast(self.world, root)?;
        let tensor = owned("broadcast", tensor)?;
        let all = 0..tensor.bytes();
        let to_others = |rank| (self.rank == root && rank != root).then(|| all.clone());
        let from_root = |rank| (self.rank != root && rank == root).then(|| all.clone());
        let plan = Plan {
            source: None,
            outgoing: (0..self.world).map(to_others).collect(),
            incoming: (0..self.world).map(from_root).collect(),
            target: tensor,
        };
        self.start("broadcast", plan)
    }

    fn settle(&self) -> Result<()> {
        let nothing = Plan {
            source: None,
            outgoing: vec![None; self.world],
            target: Tensor::empty(&Device::Cpu, [0], DType::F32)?,
            incoming: vec![None; self.world],
        };
        self.start("settling", nothing)?.wait().map(|_| ())
    }
}

/// The tensor, if it can be written; checked when an operation is started, not when it runs.
fn owned(op: &'static str, mut tensor: Tensor) -> Result<Tensor> {
    tensor.ensure_device(op, "receive", &Device::Cpu)?;
    bytes_mut(&mut tensor)?;
    Ok(tensor)
}

/// An operation: which bytes of `source` (of `target`, where there is none) go to each rank, and which of `target` come from it.
struct Plan {
    source: Option<Tensor>,
    outgoing: Vec<Option<Range<usize>>>,
    target: Tensor,
    incoming: Vec<Option<Range<usize>>>,
}

struct Job {
    name: &'static str,
    plan: Plan,
    ticket: Ticket,
    reply: SyncSender<Result<Tensor>>,
}

/// An operation in the queue.
struct Queued(Receiver<Result<Tensor>>);

impl Running for Queued {
    fn wait(self: Box<Self>) -> Result<Tensor> {
        let ended = |_| Err(Error::invalid("the thread that exchanges tensors has ended"));
        self.0.recv().unwrap_or_else(ended)
    }
}

/// Runs operations, one after the other.
struct Runner {
    rank: usize,
    shared: Arc<Shared>,
    lanes: Vec<Lane>,
    /// Connections are out of step.
    broken: bool,
}

impl Runner {
    fn run(&mut self, job: Job) {
        let Job {
            name,
            plan,
            ticket,
            reply,
        } = job;
        let outcome = match self.broken {
            true => Err(self
                .shared
                .verdict(None, "its connections for tensors are broken".into())),
            false => self.exchange(name, ticket.number, plan),
        };
        self.broken |= outcome.is_err();
        drop(ticket);
        // Nobody may wait for the result any more.
        let _ = reply.send(outcome);
    }

    fn exchange(&mut self, name: &'static str, number: u64, plan: Plan) -> Result<Tensor> {
        let Plan {
            source,
            outgoing,
            mut target,
            incoming,
        } = plan;
        for lane in &self.lanes {
            if let Some(range) = outgoing[lane.peer].clone() {
                let header = Header::new(name, number, range.len());
                let tensor = source.as_ref().unwrap_or(&target).clone();
                // A thread that has ended says so below.
                let _ = lane.jobs.send(Outgoing { header, tensor, range });
            }
        }
        let mut outcome = self.receive(name, number, source.as_ref(), &mut target, &outgoing, &incoming);
        if let Err((peer, error)) = &outcome {
            // Reported before the other connections close, which other ranks will report.
            self.shared
                .report(Some(*peer), &self.reason(name, error), is_certain(error));
            self.lanes.iter().for_each(Lane::close);
        }
        // All that was begun is waited for, whatever happened: it holds the tensors.
        for lane in self.lanes.iter().filter(|lane| outgoing[lane.peer].is_some()) {
            let sent = lane
                .done
                .recv()
                .unwrap_or_else(|_| Err(io::Error::other("its thread ended")));
            if let (Err(error), true) = (sent, outcome.is_ok()) {
                self.shared.report(Some(lane.peer), &self.reason(name, &error), false);
                self.lanes.iter().for_each(Lane::close);
                outcome = Err((lane.peer, error));
            }
        }
        match outcome {
            Ok(()) => Ok(target),
            Err((peer, error)) => Err(self.shared.verdict(Some(peer), self.reason(name, &error))),
        }
    }

    /// What an error says of the rank at the other end.
    fn reason(&self, name: &str, error: &io::Error) -> String {
        match is_certain(error) {
            true => error.to_string(),
            false => format!("rank {}'s connection to it broke in {name} ({error})", self.rank),
        }
    }

    fn receive(
        &mut self,
        name: &'static str,
        number: u64,
        source: Option<&Tensor>,
        target: &mut Tensor,
        outgoing: &[Option<Range<usize>>],
        incoming: &[Option<Range<usize>>],
    ) -> std::result::Result<(), (usize, io::Error)> {
        let other = |error: Error| (self.rank, io::Error::other(error.to_string()));
        if incoming.iter().all(Option::is_none) {
            return Ok(());
        }
        let target = bytes_mut(target).map_err(other)?;
        if let (Some(source), Some(from), Some(to)) = (source, &outgoing[self.rank], &incoming[self.rank]) {
            target[to.clone()].copy_from_slice(&bytes(source).map_err(other)?[from.clone()]);
        }
        for lane in &mut self.lanes {
            if let Some(range) = incoming[lane.peer].clone() {
                let expected = Header::new(name, number, range.len());
                lane.receive(&expected, &mut target[range])
                    .map_err(|error| (lane.peer, error))?;
            }
        }
        Ok(())
    }
}

fn close(sockets: &[TcpStream]) {
    for socket in sockets {
        // What is closed already needs no closing.
        let _ = socket.shutdown(Shutdown::Both);
    }
}

/// Whether what a rank sent is wrong, rather than its connection.
fn is_certain(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidData
}
