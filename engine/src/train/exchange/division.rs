//! What ranks divide among them, and what that takes.

use std::fmt;
use std::rc::Rc;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use super::ring::IN_FLIGHT;
use crate::dist::World;
use crate::error::{Error, Result};

/// Bytes of gradients that a bucket holds at least: enough that sending takes much longer than starting to send.
pub const BUCKET_BYTES: usize = 64 << 20;

/// What ranks divide among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharding {
    /// Nothing: each keeps the whole state of the optimizer.
    None,
    /// The state of the optimizer.
    #[default]
    Optimizer,
}

impl FromStr for Sharding {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "none" => Ok(Sharding::None),
            "optimizer" => Ok(Sharding::Optimizer),
            _ => Err(Error::invalid(format!(
                "`{text}` is nothing that ranks can divide among them; use optimizer or none"
            ))),
        }
    }
}

impl fmt::Display for Sharding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Sharding::None => "none",
            Sharding::Optimizer => "optimizer",
        })
    }
}

/// How many ranks divide what among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Division {
    /// The ranks.
    pub ranks: usize,
    /// What they divide.
    #[serde(serialize_with = "as_text")]
    pub sharding: Sharding,
}

fn as_text<S: Serializer>(sharding: &Sharding, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(sharding)
}

impl Default for Division {
    /// One alone.
    fn default() -> Self {
        Division {
            ranks: 1,
            sharding: Sharding::default(),
        }
    }
}

impl Division {
    /// Bytes that a rank holds beside gradients and optimizer, where `trained` parameters of `element` bytes each are trained and the
    /// largest of them has `largest` elements: sums of gradients, and buckets on their way.
    pub fn exchange_bytes(&self, trained: u64, element: u64, largest: u64) -> u64 {
        if self.ranks == 1 {
            return 0;
        }
        let own = 4 * trained.div_ceil(self.ranks as u64);
        let all = match self.sharding {
            Sharding::None => 4 * trained,
            Sharding::Optimizer => 0,
        };
        let bucket = (BUCKET_BYTES as u64 + largest * element).min(trained * element);
        own + all + 2 * (IN_FLIGHT as u64 + 1) * bucket
    }

    /// The parameters of which a rank keeps the optimizer's state.
    pub fn kept(&self, trained: u64) -> u64 {
        match self.sharding {
            Sharding::None => trained,
            Sharding::Optimizer => trained.div_ceil(self.ranks as u64),
        }
    }
}

/// How the ranks of a run share its work.
#[derive(Clone)]
pub struct Ranks {
    /// The ranks.
    pub world: Rc<World>,
    /// What they divide among them.
    pub sharding: Sharding,
    /// Bytes of gradients that are sent together at least.
    pub bucket_bytes: usize,
}

impl Ranks {
    /// How many they are, and what they divide.
    pub fn division(&self) -> Division {
        Division {
            ranks: self.world.size(),
            sharding: self.sharding,
        }
    }

    /// A rank that is alone.
    pub fn solo() -> Self {
        Ranks {
            world: Rc::new(World::solo()),
            sharding: Sharding::default(),
            bucket_bytes: BUCKET_BYTES,
        }
    }
}
