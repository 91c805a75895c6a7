//! Files: mapped into memory, written whole or not at all, and the folder of what is kept between runs.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod map;
mod memory;
mod write;

pub use map::{Mapped, Pages, Region, map};
pub use memory::available_memory;
pub use write::{is_file, write_whole};

use std::path::PathBuf;

/// The folder of what is kept between runs and can be made again: `$SENMON_CACHE`, or `senmon` in `$XDG_CACHE_HOME`, or in
/// `.cache` of the home; none where none of them is set.
pub fn cache_folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("SENMON_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|path| path.join("senmon")))
        .or_else(|| set("HOME").map(|path| path.join(".cache/senmon")))
}
