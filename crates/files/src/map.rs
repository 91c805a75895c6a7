//! The one place that maps files into memory, and asks for memory by the page.

use memmap2::{Mmap, MmapMut};
use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut, Range};

/// Bytes that stay where they are while somebody holds them.
pub trait Region: AsRef<[u8]> + Send + Sync {
    /// Lets the system take back the memory of a part that will not be needed soon, if it can be had again.
    fn release(&self, _range: Range<usize>) {}
}

impl Region for Vec<u8> {}

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

impl Region for Mapped {
    #[allow(unsafe_code)]
    fn release(&self, range: Range<usize>) {
        // Pages that the part shares with its neighbours stay.
        const PAGE: usize = 4096;
        let (start, end) = (range.start.next_multiple_of(PAGE), range.end.min(self.0.len()) / PAGE * PAGE);
        #[cfg(unix)]
        if start < end {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the mapping is of a file and only read: pages that are let go of are read from it again. That this fails
            // costs memory alone.
            let _ = unsafe { self.0.unchecked_advise_range(advice, start, end - start) };
        }
        let _ = (start, end);
    }
}

/// Zeros in memory of their own, in large pages where the system has them.
#[derive(Debug)]
pub struct Pages(MmapMut);

impl Pages {
    /// `len` bytes.
    pub fn zeroed(len: usize) -> io::Result<Self> {
        let pages = MmapMut::map_anon(len.max(1))?;
        #[cfg(target_os = "linux")]
        // A system that has none says so, and gives small ones.
        let _ = pages.advise(memmap2::Advice::HugePage);
        Ok(Self(pages))
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
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
