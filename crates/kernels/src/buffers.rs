//! Working memory that is used again: a training step needs the same buffers as the one before, and fresh ones would
//! cost a page fault every 4 KiB and a pass of zeros.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Spare buffers, the one that was returned first in front.
struct Spare {
    buffers: VecDeque<Vec<f32>>,
    /// Their elements in all.
    elements: usize,
    /// Elements in all, at most.
    most: usize,
}

/// 1 GiB at most.
static SPARE: Mutex<Spare> = Mutex::new(Spare::new(1 << 28));

impl Spare {
    const fn new(most: usize) -> Self {
        Self { buffers: VecDeque::new(), elements: 0, most }
    }

    fn locked() -> MutexGuard<'static, Self> {
        SPARE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The shortest buffer of `len` to `longest` elements; of several the one that was returned last, which may still be in a cache.
    fn take(&mut self, len: usize, longest: usize) -> Option<Vec<f32>> {
        let fits = |buffer: &Vec<f32>| (len..=longest).contains(&buffer.len());
        let found = self.buffers.iter().enumerate().rev().filter(|(_, buffer)| fits(buffer));
        let (at, _) = found.min_by_key(|(_, buffer)| buffer.len())?;
        let buffer = self.buffers.remove(at)?;
        self.elements -= buffer.len();
        Some(buffer)
    }

    /// Keeps a buffer. What there is no room for is given back, to be freed: those that were returned first, or this one if it alone is
    /// too long.
    fn put(&mut self, buffer: Vec<f32>) -> Vec<Vec<f32>> {
        if buffer.len() > self.most {
            return vec![buffer];
        }
        self.elements += buffer.len();
        self.buffers.push_back(buffer);
        let mut freed = Vec::new();
        while self.elements > self.most {
            let Some(oldest) = self.buffers.pop_front() else { break };
            self.elements -= oldest.len();
            freed.push(oldest);
        }
        freed
    }
}

/// A buffer of f32 that goes back to the spare ones when dropped.
#[derive(Debug, Default)]
pub struct Buffer {
    whole: Vec<f32>,
    /// How many of its elements were asked for.
    len: usize,
}

impl Buffer {
    /// `len` elements whose values are whatever they were: for results that are written before they are read. What is spare may be up to a
    /// half longer: prompts are of all lengths, and so are the buffers that they leave.
    pub fn stale(len: usize) -> Self {
        Self::between(len, len + len / 2)
    }

    /// As [`stale`](Self::stale), no longer than that: for what becomes a vector.
    pub fn exact(len: usize) -> Self {
        Self::between(len, len)
    }

    fn between(len: usize, longest: usize) -> Self {
        if len == 0 {
            return Self::default();
        }
        let found = Spare::locked().take(len, longest);
        Self { whole: found.unwrap_or_else(|| vec![0.0; len]), len }
    }

    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let mut buffer = Self::stale(len);
        buffer.fill(0.0);
        buffer
    }

    /// The elements, for good.
    pub fn into_vec(mut self) -> Vec<f32> {
        let mut whole = std::mem::take(&mut self.whole);
        whole.truncate(self.len);
        whole
    }
}

/// A [`Buffer`] that begins with a cache line: vectors that lay across two would take two loads.
#[derive(Debug)]
pub(crate) struct Lines {
    whole: Buffer,
    start: usize,
}

impl Lines {
    /// f32 in a cache line.
    const LINE: usize = 16;

    /// As [`Buffer::stale`].
    pub fn stale(len: usize) -> Self {
        let whole = Buffer::stale(len + Self::LINE);
        let start = whole.as_ptr().align_offset(Self::LINE * size_of::<f32>()).min(Self::LINE);
        Self { whole, start }
    }
}

impl Deref for Lines {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.whole[self.start..]
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.whole[self.start..]
    }
}

impl From<Vec<f32>> for Buffer {
    /// A vector whose memory becomes spare when the buffer is dropped.
    fn from(whole: Vec<f32>) -> Self {
        Self { len: whole.len(), whole }
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.whole[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.whole[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let whole = std::mem::take(&mut self.whole);
        if !whole.is_empty() {
            // Freed when the lock is open again.
            let freed = Spare::locked().put(whole);
            drop(freed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_returned_buffer_is_used_again() {
        // Longer than what other tests ask for at the same time.
        let len = 12_345_678;
        let mut first = Buffer::stale(len);
        first[3] = 5.0;
        let at = first.as_ptr();
        drop(first);
        let second = Buffer::exact(len);
        assert_eq!((second.as_ptr(), second.len(), second[3]), (at, len, 5.0));
        drop(second);
        let third = Buffer::zeros(len - 5);
        assert_eq!((third.as_ptr(), third.len()), (at, len - 5));
        assert!(third.iter().all(|x| *x == 0.0));
        assert_eq!(third.into_vec().len(), len - 5);
        assert_eq!(Buffer::stale(0).len(), 0);
    }

    #[test]
    fn the_shortest_that_fits_is_taken() {
        let mut spare = Spare::new(1 << 20);
        for (len, mark) in [(1_000, 0.0), (3_000, 0.0), (2_000, 1.0), (2_000, 2.0)] {
            assert!(spare.put(vec![mark; len]).is_empty());
        }
        // Of equals the last.
        assert_eq!(spare.take(1_500, 2_250).map(|buffer| (buffer.len(), buffer[0])), Some((2_000, 2.0)));
        assert_eq!(spare.take(2_000, 3_000).map(|buffer| buffer.len()), Some(2_000));
        assert!(spare.take(1_999, 2_998).is_none());
        assert_eq!(spare.take(2_000, 3_000).map(|buffer| buffer.len()), Some(3_000));
        assert_eq!((spare.elements, spare.buffers.len()), (1_000, 1));
    }

    #[test]
    fn what_was_returned_first_goes_first() {
        let mut spare = Spare::new(100);
        assert!(spare.put(vec![0.0; 10]).is_empty());
        assert!(spare.put(vec![0.0; 90]).is_empty());
        let freed: Vec<usize> = spare.put(vec![0.0; 5]).iter().map(Vec::len).collect();
        assert_eq!((freed, spare.elements), (vec![10], 95));
        // What could never be kept drives nothing out.
        assert_eq!(spare.put(vec![0.0; 101]).len(), 1);
        assert_eq!((spare.elements, spare.buffers.len()), (95, 2));
    }
}
