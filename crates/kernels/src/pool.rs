//! Work for as many threads as the rayon pool has that the caller runs in.

use crate::layout::extent;
use crate::{profile, team};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Runs `task(0)`, …, `task(count - 1)`, each once, on the threads of the current pool, in no given order.
///
/// Threads claim the next task when they are done with one, so that tasks of unequal size balance. A task must
/// write only what is its own; what it writes must not depend on which thread runs it.
pub fn for_each(count: usize, task: impl Fn(usize) + Sync) {
    let threads = rayon::current_num_threads().min(count);
    let part = profile::current();
    if threads <= 1 {
        let _share = profile::share(part);
        for index in 0..count {
            task(index);
        }
        return;
    }
    let next = AtomicUsize::new(0);
    let worker = || {
        let _share = profile::share(part);
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                break;
            }
            task(index);
        }
    };
    together(threads, &worker);
}

/// As [`for_each`], for tasks that want to know which the same thread will run after: `task(index, next)`, where `next` is the
/// thread's next task if it has one. Tasks begin in the order of their numbers: a task may wait for ones of lower numbers, if
/// those wait for none of higher.
pub fn for_each_ahead(count: usize, task: impl Fn(usize, Option<usize>) + Sync) {
    let threads = rayon::current_num_threads().min(count);
    let next = AtomicUsize::new(0);
    let part = profile::current();
    let claim = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|index| *index < count);
    let worker = || {
        let _share = profile::share(part);
        let mut claimed = claim();
        while let Some(index) = claimed {
            claimed = claim();
            task(index, claimed);
        }
    };
    if threads <= 1 {
        return worker();
    }
    together(threads, &worker);
}

/// Runs `worker` on `threads` threads: this one and helpers that are awake, or threads of the pool where those help someone else.
fn together(threads: usize, worker: &(impl Fn() + Sync)) {
    if team::join(threads, worker) {
        return;
    }
    rayon::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| worker());
        }
        worker();
    });
}

/// A slice that the tasks of [`for_each`] write at places that do not overlap.
///
/// The borrow of the whole slice lasts as long as this value; what each task takes out of it is up to the
/// kernel, which is why taking is `unsafe`.
#[derive(Clone, Copy)]
pub struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    lifetime: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: a `Shared` only hands out parts of a slice that is exclusively borrowed for its lifetime, and the
// caller of `part` promises that no two threads hold overlapping parts; `T: Send` lets a part move to a thread.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above; sharing the value gives no more than copying it.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Lends `slice` to tasks.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), lifetime: std::marker::PhantomData }
    }

    /// Where the slice begins.
    pub fn as_ptr(&self) -> *const T {
        self.start
    }

    /// The elements `[start, start + len)`. Panics when they are not within the slice.
    ///
    /// # Safety
    /// No other part that is alive may overlap with this one.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start, "part {start}+{len} of {}", self.len);
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }

    /// The first of `rows` rows of `width` elements, `stride` apart: a pointer, since other tasks may own what lies between the rows. Panics
    /// when they are not within the slice.
    pub(crate) fn rows(&self, start: usize, rows: usize, stride: usize, width: usize) -> *mut T {
        let end = extent(rows, stride, width).and_then(|rows| rows.checked_add(start));
        assert!(end.is_some_and(|end| end <= self.len), "{rows} rows from {start} on in {}", self.len);
        self.start.wrapping_add(start)
    }
}
