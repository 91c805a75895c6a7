//! The one place that maps files into memory.

use memmap2::Mmap;
use std::fs::File;
use std::io;
use std::ops::Deref;

/// The bytes of a file, as far as they are looked at, in memory.
#[derive(Debug)]
pub struct Mapped(Mmap);

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Maps a file for reading.
///
/// For files that are replaced rather than changed: what Senmon writes, it writes under a temporary name and renames. A
/// program that shortens a mapped file ends this one with a bus error, as with every program that maps files.
#[allow(unsafe_code)]
pub fn map(file: &File) -> io::Result<Mapped> {
    // SAFETY: the mapping is sound as long as nobody changes or shortens the file while it is mapped. Checkpoints and
    // shards are written under another name, renamed, and from then on only unlinked or replaced by a rename; both leave
    // the mapped inode as it was. Another program that writes into such a file breaks this contract.
    unsafe { Mmap::map(file) }.map(Mapped)
}
