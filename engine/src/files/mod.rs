//! Files: reading what others wrote, writing what is either whole or not there, and holding a folder against other runs.
//!
//! Whatever is read whole goes through [`read`], [`read_text`] or [`read_json`], whatever is read in parts or streamed through
//! [`open_regular`]: no pipe or device is waited for, and no file takes more memory than its kind's [`Budget`](crate::limits::Budget).

mod leftovers;
mod lock;
mod read;
mod replace;

pub(crate) use leftovers::remove_leftovers;
pub use lock::FolderLock;
pub(crate) use read::read_exact_at;
pub use read::{decode_text, from_json, open_regular, read, read_json, read_text};
pub(crate) use read::{read_if_there, text_of, without_mark};
pub use replace::replace;
pub(crate) use replace::{folder_of, relative, sync_folder};
