//! Working memory that is used again: a training step needs the same buffers as the one before, and fresh ones would
//! cost a page fault every 4 KiB and a pass of zeros.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::{LazyLock, Mutex, PoisonError};

/// Spare buffers by length, and their elements in all.
#[derive(Default)]
struct Spare {
    by_len: HashMap<usize, Vec<Vec<f32>>>,
    elements: usize,
}

static SPARE: LazyLock<Mutex<Spare>> = LazyLock::new(Mutex::default);

/// Spare elements beyond which returned buffers are freed: 1 GiB.
const KEEP: usize = 1 << 28;

/// A buffer of f32 that goes back to the spare ones when dropped.
#[derive(Debug, Default)]
pub struct Buffer(Vec<f32>);

impl Buffer {
    /// `len` elements whose values are whatever they were: for results that are written before they are read.
    pub fn stale(len: usize) -> Self {
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        match spare.by_len.get_mut(&len).and_then(Vec::pop) {
            Some(buffer) => {
                spare.elements -= len;
                Self(buffer)
            }
            None => {
                drop(spare);
                Self(vec![0.0; len])
            }
        }
    }

    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let mut buffer = Self::stale(len);
        buffer.fill(0.0);
        buffer
    }

    /// The elements, for good.
    pub fn into_vec(mut self) -> Vec<f32> {
        std::mem::take(&mut self.0)
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        if buffer.is_empty() {
            return;
        }
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.elements + buffer.len() <= KEEP {
            spare.elements += buffer.len();
            spare.by_len.entry(buffer.len()).or_default().push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_returned_buffer_is_used_again() {
        let len = 12_347;
        let mut first = Buffer::stale(len);
        first[3] = 5.0;
        let at = first.as_ptr();
        drop(first);
        let second = Buffer::stale(len);
        assert_eq!((second.as_ptr(), second.len(), second[3]), (at, len, 5.0));
        drop(second);
        assert!(Buffer::zeros(len).iter().all(|x| *x == 0.0));
        assert_eq!(Buffer::stale(0).len(), 0);
    }
}
