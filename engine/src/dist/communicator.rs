//! What every data plane offers.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::sum_parts::sum_parts;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// Moves tensors between ranks. Operations begin after all work that was submitted to the device before, and run beside what is
/// submitted later: they return at once with a [`Pending`], and take the order in which they were started. Every rank must start
/// the same ones with the same shapes and types.
pub trait Communicator: Send {
    /// This rank.
    fn rank(&self) -> usize;

    /// The number of ranks.
    fn world(&self) -> usize;

    /// Row j of `parts` `[world, …]` goes to rank j; row i of the result, in `receive` of the same shape and type, comes from rank i.
    ///
    /// # Errors
    /// When shapes or types do not fit, `receive` shares its buffer, or a rank was lost.
    fn all_to_all(&self, parts: &Tensor, receive: Tensor) -> Result<Pending>;

    /// `part` goes to every rank; row i of the result, in `receive` `[world, …part's shape]`, comes from rank i.
    ///
    /// # Errors
    /// As for [`Communicator::all_to_all`].
    fn all_gather(&self, part: &Tensor, receive: Tensor) -> Result<Pending>;

    /// The result is `tensor` of rank `root`, on every rank.
    ///
    /// # Errors
    /// As for [`Communicator::all_to_all`], and when there is no such rank.
    fn broadcast(&self, tensor: Tensor, root: usize) -> Result<Pending>;

    /// Waits, on the host, until all that was started has ended.
    ///
    /// # Errors
    /// When a rank was lost.
    fn settle(&self) -> Result<()>;

    /// The sum over ranks of their row `rank` of `parts` `[world, n]` (bf16 or f32, which is what travels), in f32 and in the order of
    /// ranks, once it is waited for.
    ///
    /// # Errors
    /// As for [`Communicator::all_to_all`].
    fn reduce_scatter(&self, parts: &Tensor) -> Result<PendingSum> {
        const OP: &str = "reduce_scatter";
        parts.ensure_rank(OP, "parts", 2, "[ranks, elements]")?;
        ensure_float(OP, "parts", parts)?;
        let receive = Tensor::empty(&parts.device(), parts.shape(), parts.dtype())?;
        self.all_to_all(parts, receive).map(PendingSum)
    }

    /// `factor` times the sum of all ranks' `x` (bf16 or f32 of any shape; what travels is of that type first, then f32), in f32 and in
    /// the order of ranks: the same bits on every rank.
    ///
    /// # Errors
    /// As for [`Communicator::all_to_all`].
    fn all_reduce(&self, x: &Tensor, factor: f32) -> Result<Tensor> {
        ensure_float("all_reduce", "x", x)?;
        let (world, elements) = (self.world(), x.elements());
        let slice = elements.div_ceil(world);
        // What is behind the end is summed and dropped.
        let mut parts = Tensor::zeros(&x.device(), [world * slice], x.dtype())?;
        parts.copy_elements_from(0, x)?;
        let sum = self.reduce_scatter(&parts.into_shape([world, slice])?)?.wait(factor)?;
        let gathered = Tensor::empty(&x.device(), [world, slice], DType::F32)?;
        let gathered = self.all_gather(&sum, gathered)?.wait()?;
        gathered
            .into_shape([world * slice])?
            .narrow(0, elements)?
            .into_shape(x.shape())
    }
}

fn ensure_float(op: &'static str, name: &str, tensor: &Tensor) -> Result<()> {
    match tensor.dtype() {
        DType::F32 | DType::Bf16 => Ok(()),
        other => Err(Error::invalid(format!("{op}: {name} is {other}, expected f32 or bf16"))),
    }
}

/// Checks the arguments of [`Communicator::all_to_all`].
pub(super) fn ensure_all_to_all(world: usize, parts: &Tensor, receive: &Tensor) -> Result<()> {
    const OP: &str = "all_to_all";
    let rows = parts.shape().first().copied();
    if rows != Some(world) {
        return Err(Error::Shape {
            op: OP,
            tensor: "parts".into(),
            expected: format!("[{world}, …], a row for each rank"),
            found: parts.shape(),
        });
    }
    receive.ensure_shape(OP, "receive", parts.shape())?;
    receive.ensure_dtype(OP, "receive", parts.dtype())?;
    receive.ensure_device(OP, "receive", &parts.device())
}

/// Checks the arguments of [`Communicator::all_gather`].
pub(super) fn ensure_all_gather(world: usize, part: &Tensor, receive: &Tensor) -> Result<()> {
    const OP: &str = "all_gather";
    let shape = receive.shape();
    let fits = shape.first() == Some(&world) && Shape::new(&shape[1..]) == part.shape();
    if !fits {
        return Err(Error::Shape {
            op: OP,
            tensor: "receive".into(),
            expected: format!("{world} rows of {}", part.shape()),
            found: shape,
        });
    }
    receive.ensure_dtype(OP, "receive", part.dtype())?;
    receive.ensure_device(OP, "receive", &part.device())
}

/// Checks the arguments of [`Communicator::broadcast`].
pub(super) fn ensure_broadcast(world: usize, root: usize) -> Result<()> {
    match root < world {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "broadcast: there is no rank {root} among {world}"
        ))),
    }
}

/// An operation that was started. Its tensors belong to it until it is waited for; one that is dropped is still waited for by the
/// device's later work.
#[must_use = "the result is in what it returns"]
pub struct Pending(Work);

enum Work {
    Done(Tensor),
    Running(Box<dyn Running>),
}

/// An operation that runs beside the computation.
pub(super) trait Running: Send {
    /// The result, as [`Pending::wait`] gives it.
    fn wait(self: Box<Self>) -> Result<Tensor>;
}

impl Pending {
    /// An operation that has ended.
    pub(super) fn done(result: Tensor) -> Self {
        Pending(Work::Done(result))
    }

    /// An operation that runs.
    pub(super) fn running(operation: impl Running + 'static) -> Self {
        Pending(Work::Running(Box::new(operation)))
    }

    /// The result. On CUDA the device's later work begins after it, and the host does not wait; on the CPU this waits.
    ///
    /// # Errors
    /// When a rank was lost.
    pub fn wait(self) -> Result<Tensor> {
        match self.0 {
            Work::Done(result) => Ok(result),
            Work::Running(operation) => operation.wait(),
        }
    }
}

/// A [`Communicator::reduce_scatter`] that was started.
#[must_use = "the sum is in what it returns"]
pub struct PendingSum(Pending);

impl PendingSum {
    /// `factor` times the sum, f32 `[n]`; waits as [`Pending::wait`] does.
    ///
    /// # Errors
    /// When a rank was lost, or the device has no room.
    pub fn wait(self, factor: f32) -> Result<Tensor> {
        let parts = self.0.wait()?;
        let mut sum = Tensor::empty(&parts.device(), [parts.dim(1)], DType::F32)?;
        sum_parts(&parts, factor, &mut sum, 0)?;
        Ok(sum)
    }

    /// As [`PendingSum::wait`], into `target` (f32) from its element `first` on.
    ///
    /// # Errors
    /// When a rank was lost, or the sum does not fit there.
    pub fn wait_into(self, factor: f32, target: &mut Tensor, first: usize) -> Result<()> {
        sum_parts(&self.0.wait()?, factor, target, first)
    }
}
