//! The one place of this crate that maps a file into memory.

use std::fs::File;
use std::io;

use memmap2::Mmap;

/// Maps a file of the token cache for reading.
///
/// Only for files that this crate wrote whole under a temporary name and renamed: they are replaced, never changed.
#[allow(unsafe_code)]
pub(crate) fn map_file(file: &File) -> io::Result<Mmap> {
    // SAFETY: the mapping is sound as long as nobody changes or shortens the file while it is mapped. Shards are
    // written under another name, renamed, and from then on only unlinked or replaced by a rename; both leave the
    // mapped inode as it was. Another program that truncates a file inside the cache folder breaks this contract.
    unsafe { Mmap::map(file) }
}
