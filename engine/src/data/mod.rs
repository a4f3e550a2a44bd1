//! Data sets: pictures with captions, read ahead of the device.
//!
//! [`Metadata`] lists the pictures, [`DataSet`] knows the size at which each is used, [`BatchOrder`] who stands beside whom in
//! which epoch, and [`Loader`] decodes in worker threads what comes next. Captions go through a text encoder once and wait in
//! a [`FeatureStore`] on disk, as do the latents of a latent model's pictures. [`synthesize`] makes a set by drawing it.
//!
//! Everything that is random depends on a seed and a place alone ([`Draws`]), never on the order in which threads finish.

mod captions;
mod damage;
mod features;
mod kept;
mod latents;
mod loader;
mod metadata;
mod notes;
mod order;
mod random;
mod set;
mod sizing;
mod synthesis;
mod table;

pub use crate::tensor::HostTensor as Features;
pub use captions::{CaptionReport, encode_captions, encode_captions_among};
pub use damage::{Damage, DamageLog};
pub(crate) use features::hex;
pub use features::{FeatureStore, StoreKey};
pub use kept::Room;
pub use latents::encode_latents;
pub use loader::{Caption, Content, Item, ItemSource, Latents, Loader, LoaderOptions, Turn};
pub use metadata::{Metadata, Record};
pub use order::{BatchOrder, PlannedBatch, Position};
pub use random::{Draws, Purpose};
pub use set::DataSet;
pub(crate) use set::damage_of;
pub use sizing::{PictureSize, Sizing};
pub use synthesis::{SynthesisJob, SynthesisOptions, SynthesisReport, synthesize};
pub use table::write_table;
