//! A place in the bytes of a file, from which numbers and texts are taken one after another.

/// Why something could not be taken; the caller knows what it was.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Bad {
    /// The file ends first.
    End,
    /// Not UTF-8.
    Text,
}

impl Bad {
    /// What is said after the name of what was read.
    pub(crate) fn what(&self) -> &'static str {
        match self {
            Bad::End => "the file ends in the middle of it: it is cut short or damaged",
            Bad::Text => "it is not UTF-8: the file is damaged",
        }
    }
}

/// What is left of the bytes.
#[derive(Clone, Debug)]
pub(crate) struct Bytes<'a> {
    all: &'a [u8],
    at: usize,
}

impl<'a> Bytes<'a> {
    pub(crate) fn new(all: &'a [u8]) -> Self {
        Self { all, at: 0 }
    }

    /// How many bytes have been taken.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// How many bytes are left.
    pub(crate) fn left(&self) -> usize {
        self.all.len() - self.at
    }

    /// The next `n` bytes.
    pub(crate) fn take(&mut self, n: u64) -> Result<&'a [u8], Bad> {
        let n = usize::try_from(n).ok().filter(|n| *n <= self.left()).ok_or(Bad::End)?;
        let taken = &self.all[self.at..][..n];
        self.at += n;
        Ok(taken)
    }

    /// The next `N` bytes.
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Bad> {
        self.take(N as u64)?.try_into().map_err(|_| Bad::End)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Bad> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Bad> {
        self.array().map(u64::from_le_bytes)
    }

    /// A length and as many bytes of UTF-8.
    pub(crate) fn text(&mut self) -> Result<&'a str, Bad> {
        let len = self.u64()?;
        std::str::from_utf8(self.take(len)?).map_err(|_| Bad::Text)
    }

    /// A count of things that take at least `each` bytes: no more than the file can hold, so that room can be
    /// made for them all.
    pub(crate) fn count(&mut self, each: usize) -> Result<usize, Bad> {
        let count = self.u64()?;
        usize::try_from(count).ok().filter(|n| *n <= self.left() / each).ok_or(Bad::End)
    }
}
