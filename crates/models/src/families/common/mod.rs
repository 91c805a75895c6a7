//! What families share: keys of `config.json` read, and written.

mod read;
mod write;

pub use read::{Defaults, Json, activation_named};
pub use write::*;
