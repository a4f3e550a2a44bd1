//! The data plane between GPUs: NCCL, on a stream beside the device's own.
//!
//! NCCL moves bytes and sums nothing: sums are ours, in the order of ranks. Its calls return at once and are polled, so that a rank that
//! is lost in the middle of one ends it everywhere: when the control plane says that the run is over, communicators are aborted, which
//! makes kernels that wait for the lost rank return. A thread polls for errors and for operations that have ended.

mod library;

use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use library::{BYTES, Comm, Config, ID_BYTES, IN_PROGRESS, Library, SUCCESS, UniqueId, library};

use super::communicator::{Communicator, Pending, Running, ensure_all_gather, ensure_all_to_all, ensure_broadcast};
use super::control::{Control, Shared, Ticket};
use crate::device::{CudaDevice, Device, SideStream, StreamMark, keep_out_of_recordings};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::tensor::Tensor;

/// Between two looks at what runs.
const LOOK: Duration = Duration::from_millis(20);

/// Between two looks at a call that has not returned its result.
const POLL: Duration = Duration::from_micros(20);

/// How long most calls take at most.
const SOON: Duration = Duration::from_micros(500);

/// How long the end of a communicator may take before it is aborted.
const ENDING: Duration = Duration::from_secs(5);

/// NCCL's version, if it can be used.
///
/// # Errors
/// [`Error::NoGpu`] with where it was looked for.
pub fn available() -> Result<String> {
    library::version_text()
}

/// See the module's head comment.
pub(super) struct Nccl {
    rank: usize,
    world: usize,
    shared: Arc<Shared>,
    stream: SideStream,
    handle: Arc<Handle>,
    running: Arc<Mutex<VecDeque<Unfinished>>>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// An operation that has not ended.
struct Unfinished {
    mark: Arc<StreamMark>,
    _ticket: Ticket,
}

/// NCCL's communicator; null once it was aborted or destroyed.
struct Handle {
    library: &'static Library,
    comm: Mutex<RawComm>,
}

struct RawComm(Comm);

// SAFETY: NCCL allows calls from any thread, one at a time, which the mutex around it sees to.
unsafe impl Send for RawComm {}

impl Handle {
    fn lock(&self) -> MutexGuard<'_, RawComm> {
        lock(&self.comm)
    }

    fn checked(&self, call: &str, code: c_int) -> Result<()> {
        match code {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => Err(Error::Cuda {
                call: call.into(),
                reason: self.library.describe(code),
            }),
        }
    }

    /// Waits until the last call on `comm` has done its work on the host.
    fn finish(&self, call: &str, comm: &RawComm, check: impl Fn() -> Result<()>) -> Result<()> {
        let began = Instant::now();
        loop {
            let mut code = SUCCESS;
            // SAFETY: the communicator is neither aborted nor destroyed, for it is locked and not null.
            self.checked(call, unsafe { (self.library.comm_get_async_error)(comm.0, &mut code) })?;
            self.checked(call, code)?;
            if code == SUCCESS {
                return Ok(());
            }
            check()?;
            // Once connections are made, a call takes less than the shortest sleep.
            match began.elapsed() < SOON {
                true => std::thread::yield_now(),
                false => std::thread::sleep(POLL),
            }
        }
    }

    /// Ends all that runs, here and, by their waiting for this rank, elsewhere.
    fn abort(&self) {
        let mut comm = self.lock();
        let raw = std::mem::replace(&mut comm.0, std::ptr::null_mut());
        if !raw.is_null() {
            // SAFETY: the communicator is not used after this: its place is null. That it fails changes nothing for a run that is over.
            unsafe { (self.library.comm_abort)(raw) };
        }
    }

    /// The first error of what runs, if there is one.
    fn asynchronous_error(&self) -> Result<()> {
        let comm = self.lock();
        if comm.0.is_null() {
            return Ok(());
        }
        let mut code = SUCCESS;
        // SAFETY: the communicator is neither aborted nor destroyed, for it is locked and not null.
        self.checked("NCCL", unsafe {
            (self.library.comm_get_async_error)(comm.0, &mut code)
        })?;
        self.checked("NCCL", code)
    }
}

impl Nccl {
    /// Makes a communicator of all ranks, each with its own GPU.
    pub fn connect(device: &Arc<CudaDevice>, control: &Control) -> Result<Self> {
        let library = library()?;
        let shared = control.shared().clone();
        let (rank, world) = (shared.rank, shared.world());
        let id = control.decide(
            "NCCL id",
            if rank == 0 { Some(unique_id(library)?) } else { None }.as_ref(),
        )?;
        let id: [u8; ID_BYTES] = id
            .try_into()
            .map_err(|_| Error::invalid("rank 0 sent no id of NCCL's length"))?;
        device.bind()?;
        let handle = Arc::new(Handle {
            library,
            comm: Mutex::new(RawComm(std::ptr::null_mut())),
        });
        let began = device.charged_to_library(|| {
            let mut comm = handle.lock();
            let mut config = Config::not_blocking();
            // SAFETY: out-parameter and configuration outlive the call, which copies them; the id is one of NCCL's.
            let code = unsafe {
                (library.comm_init_rank_config)(&mut comm.0, world as c_int, UniqueId(id), rank as c_int, &mut config)
            };
            handle.checked("ncclCommInitRankConfig", code)?;
            let end = Instant::now() + shared.options.start;
            handle.finish("ncclCommInitRankConfig", &comm, || match Instant::now() < end {
                true => shared.check(),
                false => Err(Error::Cuda {
                    call: "ncclCommInitRankConfig".into(),
                    reason: format!("it has not ended within {} s", shared.options.start.as_secs_f64()),
                }),
            })
        });
        began.inspect_err(|_| handle.abort())?;
        let aborted = handle.clone();
        shared.on_loss(Box::new(move || aborted.abort()));
        let running = Arc::new(Mutex::new(VecDeque::new()));
        let ending = Arc::new(AtomicBool::new(false));
        let watcher = Watcher {
            device: device.clone(),
            shared: shared.clone(),
            handle: handle.clone(),
            running: running.clone(),
            ending: ending.clone(),
        };
        Ok(Nccl {
            rank,
            world,
            stream: SideStream::new(device)?,
            shared,
            handle,
            running,
            ending,
            thread: Some(std::thread::spawn(move || watcher.watch())),
        })
    }

    /// Runs `call`, which submits one operation, on the side stream after the device's work so far.
    fn submit(
        &self,
        name: &'static str,
        tensor: Tensor,
        source: Option<Tensor>,
        call: impl FnOnce(&Library, Comm, *mut c_void) -> c_int,
    ) -> Result<Pending> {
        let ticket = self.shared.enter(name)?;
        let device = self.stream.device();
        device.bind()?;
        self.stream.begin_after_device()?;
        {
            let comm = self.handle.lock();
            if comm.0.is_null() {
                self.shared.check()?;
                return Err(Error::invalid(format!("{name}: NCCL's communicator has ended")));
            }
            let code = call(self.handle.library, comm.0, self.stream.handle().cast());
            let outcome = self
                .handle
                .checked(name, code)
                .and_then(|()| self.handle.finish(name, &comm, || self.shared.check()));
            drop(comm);
            if let Err(error) = outcome {
                return Err(match error {
                    Error::Cuda { reason, .. } => {
                        let reason = format!("NCCL failed there in {name} ({reason})");
                        self.shared.report(None, &reason, false);
                        self.shared.verdict(None, reason)
                    }
                    other => other,
                });
            }
        }
        let mark = Arc::new(self.stream.mark()?);
        let running = Unfinished {
            mark: mark.clone(),
            _ticket: ticket,
        };
        lock(&self.running).push_back(running);
        Ok(Pending::running(Submitted {
            tensor: Some(tensor),
            _source: source,
            mark,
            shared: self.shared.clone(),
        }))
    }

    fn ensure_here(&self, op: &'static str, name: &str, tensor: &Tensor) -> Result<()> {
        tensor.ensure_device(op, name, &Device::Cuda(self.stream.device().clone()))
    }
}

fn unique_id(library: &Library) -> Result<Vec<u8>> {
    let mut id = UniqueId([0; ID_BYTES]);
    // SAFETY: a plain out-parameter.
    match unsafe { (library.get_unique_id)(&mut id) } {
        SUCCESS => Ok(id.0.to_vec()),
        code => Err(Error::Cuda {
            call: "ncclGetUniqueId".into(),
            reason: library.describe(code),
        }),
    }
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.world
    }

    fn all_to_all(&self, parts: &Tensor, mut receive: Tensor) -> Result<Pending> {
        const OP: &str = "all_to_all";
        ensure_all_to_all(self.world, parts, &receive)?;
        self.ensure_here(OP, "parts", parts)?;
        let row = parts.bytes() / self.world;
        let (from, to) = (parts.device_ptr()?, receive.device_ptr_mut()?);
        let world = self.world;
        self.submit(OP, receive, Some(parts.clone()), |library, comm, stream| {
            // SAFETY: both tensors have a row of `row` bytes for every rank, on this communicator's device, and live until the
            // operation was waited for; the group is closed whatever happens in it.
            unsafe {
                let mut code = (library.group_start)();
                for rank in 0..if row == 0 { 0 } else { world } {
                    let offset = (rank * row) as u64;
                    let calls = [
                        (library.send)(
                            (from + offset) as *const c_void,
                            row,
                            BYTES,
                            rank as c_int,
                            comm,
                            stream,
                        ),
                        (library.recv)((to + offset) as *mut c_void, row, BYTES, rank as c_int, comm, stream),
                    ];
                    code = calls.into_iter().fold(code, worse);
                }
                worse(code, (library.group_end)())
            }
        })
    }

    fn all_gather(&self, part: &Tensor, mut receive: Tensor) -> Result<Pending> {
        const OP: &str = "all_gather";
        ensure_all_gather(self.world, part, &receive)?;
        self.ensure_here(OP, "part", part)?;
        let bytes = part.bytes();
        let (from, to) = (part.device_ptr()?, receive.device_ptr_mut()?);
        self.submit(OP, receive, Some(part.clone()), |library, comm, stream| match bytes {
            0 => SUCCESS,
            // SAFETY: `receive` has a row of `bytes` bytes for every rank, `part` one, on this communicator's device, and both live
            // until the operation was waited for.
            _ => unsafe { (library.all_gather)(from as *const c_void, to as *mut c_void, bytes, BYTES, comm, stream) },
        })
    }

    fn broadcast(&self, mut tensor: Tensor, root: usize) -> Result<Pending> {
        const OP: &str = "broadcast";
        ensure_broadcast(self.world, root)?;
        self.ensure_here(OP, "tensor", &tensor)?;
        let bytes = tensor.bytes();
        let place = tensor.device_ptr_mut()?;
        self.submit(OP, tensor, None, |library, comm, stream| match bytes {
            0 => SUCCESS,
            // SAFETY: the tensor has `bytes` bytes on this communicator's device and lives until the operation was waited for; NCCL
            // allows source and target to be the same.
            _ => unsafe {
                let place = place as *mut c_void;
                (library.broadcast)(place, place, bytes, BYTES, root as c_int, comm, stream)
            },
        })
    }

    fn settle(&self) -> Result<()> {
        let mark = self.stream.mark()?;
        while !mark.is_reached()? {
            self.shared.check()?;
            std::thread::sleep(POLL);
        }
        self.shared.check()
    }
}

/// The first code that is an error.
fn worse(first: c_int, second: c_int) -> c_int {
    match first {
        SUCCESS | IN_PROGRESS => second,
        error => error,
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed where it happened.
            let _ = thread.join();
        }
        let library = self.handle.library;
        let mut comm = self.handle.lock();
        if comm.0.is_null() {
            return;
        }
        let end = Instant::now() + ENDING;
        let in_time = || match Instant::now() < end {
            true => self.shared.check(),
            false => Err(Error::Interrupted),
        };
        let ended = self.stream.device().bind().and_then(|()| {
            // SAFETY: the communicator is neither aborted nor destroyed, for it is locked and not null.
            let code = unsafe { (library.comm_finalize)(comm.0) };
            self.handle.checked("ncclCommFinalize", code)?;
            self.handle.finish("ncclCommFinalize", &comm, in_time)
        });
        if ended.is_ok() {
            let raw = std::mem::replace(&mut comm.0, std::ptr::null_mut());
            // SAFETY: as above; it is not used after this, for its place is null. Nothing depends on how that ends.
            unsafe { (library.comm_destroy)(raw) };
        }
        drop(comm);
        self.handle.abort();
    }
}

/// Polls for errors, and for operations that have ended.
struct Watcher {
    device: Arc<CudaDevice>,
    shared: Arc<Shared>,
    handle: Arc<Handle>,
    running: Arc<Mutex<VecDeque<Unfinished>>>,
    ending: Arc<AtomicBool>,
}

impl Watcher {
    fn watch(&self) {
        // Where this fails, recordings may be disturbed, which is an error of theirs.
        let _ = self.device.bind().and_then(|()| keep_out_of_recordings());
        while !self.ending.load(Ordering::Relaxed) && self.shared.check().is_ok() {
            let outcome = self.handle.asynchronous_error().and_then(|()| self.forget_what_ended());
            if let Err(error) = outcome {
                let reason = format!("NCCL failed there ({error})");
                self.shared.report(None, &reason, false);
                // Ends this rank's waits, too.
                self.shared.verdict(None, reason);
                return;
            }
            std::thread::sleep(LOOK);
        }
    }

    fn forget_what_ended(&self) -> Result<()> {
        let mut running = lock(&self.running);
        while let Some(first) = running.front()
            && first.mark.is_reached()?
        {
            running.pop_front();
        }
        Ok(())
    }
}

/// An operation on the side stream, with the tensors that it uses.
struct Submitted {
    tensor: Option<Tensor>,
    _source: Option<Tensor>,
    mark: Arc<StreamMark>,
    shared: Arc<Shared>,
}

impl Running for Submitted {
    fn wait(mut self: Box<Self>) -> Result<Tensor> {
        self.shared.check()?;
        self.mark.hold_device()?;
        Ok(self.tensor.take().expect("taken once"))
    }
}

impl Drop for Submitted {
    fn drop(&mut self) {
        // The tensors return to the pool, in the order of the device's own stream, after the operation. Where the driver refuses, the
        // device is of no more use.
        if self.tensor.is_some() {
            let _ = self.mark.hold_device();
        }
    }
}
