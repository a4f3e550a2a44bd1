//! A model that stays loaded: one thread for each device draws what others ask for.
//!
//! A [`Worker`] owns a device's work: model, stream, memory pool and recorded steps are touched by its thread alone. Others send it
//! requests, which hold nothing but host memory, and get a [`Ticket`] for each: the way to learn how far it is, to cancel it, and to wait
//! for its answer and a report of what it took. Requests are served one after another, in the order in which they came.
//!
//! | what happens | what follows |
//! | --- | --- |
//! | a request makes no sense | it is refused before it waits |
//! | too many wait | it is refused with [`Error::Busy`](crate::Error::Busy) |
//! | a request fails | its ticket has the error; the next one is served |
//! | a request is cancelled, or its ticket dropped | it ends with [`Error::Interrupted`](crate::Error::Interrupted) at its next step, or before its first |
//! | the device fails for good, or the worker panics | the request has its error; it and all later ones: [`Error::WorkerEnded`](crate::Error::WorkerEnded) |
//! | the worker is dropped | what runs is cancelled, what waits is too, and the thread has ended when the drop returns |
//!
//! Recorded steps are kept by size, batch, caption tokens and guidance, as many as [`WorkerOptions::recordings`] says and the device
//! has room for; the one that was not used for longest goes first. A second picture of the same shape needs no allocation,
//! recording or search.

mod owner;
mod preview;
mod request;
mod ticket;
mod worker;

pub use request::{Caption, Drawn, Item, RawImages, Request};
pub use ticket::{Answer, Event, Ticket};
pub use worker::{Worker, WorkerOptions};
