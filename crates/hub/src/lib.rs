//! Models by their names on the Hugging Face hub: `owner/name`, `owner/name@revision`, `owner/name:Q4_K_M`.
//!
//! [`Hub::find`] makes a name a folder or a `.gguf` file of the cache that Python's `huggingface_hub` uses too, and downloads
//! what is missing. Only files that hold numbers or configuration are asked for; nothing of a repository is ever executed.
//! What a server says is not trusted: names, hashes and lengths are checked before they become paths or files.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod cache;
mod client;
mod download;
mod error;
mod find;
mod name;
mod settings;
mod wanted;

pub use error::{HubError, Result};
pub use find::{Hub, Progress};
pub use name::Name;
pub use settings::Settings;
