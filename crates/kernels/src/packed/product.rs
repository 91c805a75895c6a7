//! Products with packed weights: cut into tasks, computed panel by panel.

use super::activations::{self, Activations, View};
use super::floats::{self, MOST};
use super::ints;
use super::unpack::Unpacked;
use super::{Format, PANEL, Packed};
use crate::pool::{self, Shared};
use crate::profile;
use crate::simd::Level;
use std::cell::RefCell;
use std::ops::Range;

/// Rows of activations that a task takes, at most.
const ROWS: usize = 256;
/// Bytes of activations that a task meets each of its panels with: they stay in the second-level cache.
const CACHED: usize = 1 << 20;

/// `rows` cut into even pieces, one a task, for a weight such as `w`.
pub(super) fn rows_of_tasks(
    level: Level,
    w: Packed,
    rows: Range<usize>,
) -> impl Iterator<Item = Range<usize>> + use<> {
    let most = if w.format.is_coded() {
        // Their sums go in and out with each chunk of k: those of two panels, and the chunk, stay in the first-level cache.
        ROWS / 2
    } else {
        (CACHED / activations::row_bytes(level, w.format, w.k)).clamp(ROWS / 4, ROWS)
    };
    let tasks = rows.len().div_ceil(most).max(1);
    let size = rows.len().div_ceil(tasks).max(1);
    pieces(rows, size)
}

/// Panels whose results are gathered before they are written: a row's are then written as one run.
pub(super) const RUN: usize = 8;

/// Numbers of the columns of a panel, \[rows, 16\].
pub(super) type Columns = Vec<[f32; PANEL]>;

/// What one thread computes in.
pub(super) struct Space {
    scratch: Scratch,
    /// Sums of panels beside each other.
    pub sums: [Columns; RUN],
    /// What an epilogue makes of them.
    pub made: [Columns; RUN],
}

/// What kernels need for themselves.
struct Scratch {
    unpacked: Box<[Unpacked; 2]>,
    rows: Vec<*const u8>,
}

/// Lends the thread's space.
pub(super) fn with_space<R>(work: impl FnOnce(&mut Space) -> R) -> R {
    thread_local! {
        static SPACE: RefCell<Space> = RefCell::new(Space {
            scratch: Scratch { unpacked: Box::new([const { Unpacked::new() }; 2]), rows: Vec::with_capacity(ROWS) },
            sums: std::array::from_fn(|_| vec![[0.0; PANEL]; ROWS]),
            made: std::array::from_fn(|_| vec![[0.0; PANEL]; ROWS]),
        });
    }
    SPACE.with_borrow_mut(work)
}

/// One panel, or two beside each other, that are computed together.
#[derive(Clone, Copy)]
pub(super) struct Pair<'a> {
    first: (Packed<'a>, usize),
    second: Option<usize>,
}

impl<'a> Pair<'a> {
    /// Panel `index` of a weight and the one after it, if that is before `end`.
    pub fn of(w: Packed<'a>, index: usize, end: usize) -> Self {
        Self { first: (w, index), second: (index + 1 < end).then_some(index + 1) }
    }

    fn panels(&self) -> [&'a [u8]; 2] {
        let (w, index) = self.first;
        [w.panel(index), w.panel(self.second.unwrap_or(index))]
    }
}

/// The sums of `rows` of the activations with a pair of panels, into the first rows of `to`. `ahead` is what the thread will need next.
fn sums(
    level: Level,
    pair: Pair,
    ahead: Option<Pair>,
    a: View,
    rows: &[u32],
    space: &mut Scratch,
    to: &mut [Columns; 2],
) {
    let (w, _) = pair.first;
    assert!(rows.len() <= ROWS && w.k == a.k(), "{} rows of {} elements", rows.len(), a.k());
    assert!(rows.iter().all(|row| (*row as usize) < a.rows()), "rows of {}", a.rows());
    if w.format.is_coded() {
        let panels = ints::Panels {
            format: w.format,
            k: w.k,
            bytes: pair.panels(),
            single: pair.second.is_none(),
            activations: a,
            rows,
            next: ahead.map_or([std::ptr::null(); 2], |pair| pair.panels().map(<[u8]>::as_ptr)),
        };
        ints::panels(level, &panels, &mut space.unpacked, to);
        return;
    }
    space.rows.clear();
    space.rows.extend(rows.iter().map(|row| a.chunk(0, *row as usize)));
    a.check(level, w.format);
    let tiles = rows.len().div_ceil(floats::height(level, w.format)).max(1);
    let (low, more) = (rows.len() / tiles, rows.len() % tiles);
    let mut found = [[[0.0; PANEL]; MOST]; 2];
    let (panels, next) = (pair.panels(), ahead.map(|pair| pair.panels()));
    let mut first = 0;
    for t in 0..tiles {
        let height = low + usize::from(t < more);
        // The last two tiles ask for the panels that come next, while these are in the cache.
        let ahead = match (&next, tiles - t) {
            (Some(next), 2) => next[0].as_ptr(),
            (Some(next), 1) if tiles > 1 => next[1].as_ptr(),
            _ => panels[0].as_ptr(),
        };
        let tile = floats::Tile {
            format: w.format,
            k: w.k,
            panels,
            single: pair.second.is_none(),
            rows: &space.rows[first..][..height],
            chunk_stride: a.chunk_stride(),
            ahead,
        };
        // SAFETY: rows of activations that were made for this format, with `k` elements.
        unsafe { floats::tile(level, &tile, &mut found) };
        for (sums, found) in to.iter_mut().zip(&found) {
            sums[first..][..height].copy_from_slice(&found[..height]);
        }
        first += height;
    }
}

/// Panels of a task: the same ones of one or two weights (gate and up), whose results are gathered run by run.
///
/// In a run the panels of one weight come before those of the other: what is read from memory is then long stretches, which a processor
/// foresees.
#[derive(Clone)]
pub(super) struct Stretch<'a> {
    pub weights: [Option<Packed<'a>>; 2],
    pub panels: Range<usize>,
}

impl<'a> Stretch<'a> {
    /// Panels of each weight in a run.
    fn run(&self) -> usize {
        if self.weights[1].is_some() { RUN / 2 } else { RUN }
    }

    /// The first panels, of the run that begins with `first`.
    fn begin(&self, first: usize) -> Option<Pair<'a>> {
        Some(Pair::of(self.weights[0]?, first, self.panels.end.min(first + self.run())))
    }

    /// Computes the sums of `rows` of the activations, and calls `done` with each run's panels when `space.sums` has the sums of the first
    /// weight in its first panels and those of the second from the middle on. `after` is what the thread needs next.
    pub fn compute(
        &self,
        level: Level,
        after: Option<&Stretch>,
        a: View,
        rows: &[u32],
        space: &mut Space,
        mut done: impl FnMut(Range<usize>, &mut Space),
    ) {
        for run in pieces(self.panels.clone(), self.run()) {
            for (number, w) in self.weights.iter().flatten().enumerate() {
                for panel in run.clone().step_by(2) {
                    let ahead = if panel + 2 < run.end {
                        Some(Pair::of(*w, panel + 2, run.end))
                    } else if let (0, Some(w)) = (number, self.weights[1]) {
                        Some(Pair::of(w, run.start, run.end))
                    } else if run.end < self.panels.end {
                        self.begin(run.end)
                    } else {
                        after.and_then(|after| after.begin(after.panels.start))
                    };
                    let at = number * self.run() + panel - run.start;
                    let to = &mut space.sums.as_chunks_mut().0[at / 2];
                    sums(level, Pair::of(*w, panel, run.end), ahead, a, rows, &mut space.scratch, to);
                }
            }
            done(run, space);
        }
    }
}

/// Panels `panels` of the weight, for rows `rows`.
struct Task {
    part: usize,
    panels: Range<usize>,
    rows: Range<usize>,
}

/// Bytes of weights that a task reads, at most, unless two panels, or with many rows a [`RUN`], are more: some twenty microseconds from memory.
const TASK: usize = 512 << 10;
/// Rows from which on arithmetic takes longer than memory, and a task may have a whole [`RUN`] whatever its bytes.
const MANY: usize = 32;

/// Panels that a task of a weight takes, of so many bytes each and for so many rows, so that each thread gets several of all `total`, and
/// what the others wait for at the end is little. `run` of them give a whole [`RUN`] of results.
pub(super) fn share(total: usize, bytes: usize, rows: usize, run: usize) -> usize {
    let least = if rows < MANY { 2 } else { run };
    let most = (TASK / bytes.max(1) / 2 * 2).clamp(least, 32);
    (total / (8 * rayon::current_num_threads())).next_multiple_of(2).clamp(2, most)
}

/// A product to be made: `y` \[T, ΣN\] = `x` \[T, K\] · the weights' transposes, side by side.
pub struct Linear<'a> {
    /// \[T, K\].
    pub x: &'a [f32],
    /// \[N, K\] each.
    pub weights: &'a [Packed<'a>],
    /// \[T, ΣN\].
    pub y: &'a mut [f32],
    /// Add to `y`.
    pub accumulate: bool,
}

/// Makes a [`Linear`] on the threads of the pool. Panics where the shapes do not fit.
pub fn linear(level: Level, product: Linear) {
    let _span = profile::span(profile::PRODUCTS);
    let level = level.min(Level::detected());
    let Linear { x, weights, y, accumulate } = product;
    let Some(k) = weights.first().map(Packed::k) else { return };
    let width: usize = weights.iter().map(Packed::n).sum();
    let count = x.len() / k;
    assert!(weights.iter().all(|w| w.k == k), "weights of one K");
    assert!(x.len() == count * k && y.len() == count * width, "x and y fit the weights");
    let rows: Vec<u32> = (0..count as u32).collect();
    let forms = Forms::of(level, x, k, weights.iter().map(Packed::format));
    let total: usize = weights.iter().map(Packed::panels).sum();
    let bytes = weights.iter().map(|w| w.format.panel_bytes(k)).max().unwrap_or(0);
    let (size, mut tasks) = (share(total, bytes, count, RUN), Vec::new());
    for (part, w) in weights.iter().enumerate() {
        for panels in pieces(0..w.panels(), size) {
            let rows = rows_of_tasks(level, *w, 0..count);
            tasks.extend(rows.map(|rows| Task { part, panels: panels.clone(), rows }));
        }
    }
    let starts: Vec<usize> =
        weights.iter().scan(0, |sum, w| Some(std::mem::replace(sum, *sum + w.n))).collect();
    let shared = Shared::new(y);
    pool::for_each_ahead(tasks.len(), |index, next| {
        let task = &tasks[index];
        let of =
            |task: &Task| Stretch { weights: [Some(weights[task.part]), None], panels: task.panels.clone() };
        let (w, rows, first) = (weights[task.part], &rows[task.rows.clone()], starts[task.part]);
        let (a, after) = (forms.get(w.format).view(), next.map(|next| of(&tasks[next])));
        with_space(|space| {
            of(task).compute(level, after.as_ref(), a, rows, space, |run, space| {
                let columns = first + run.start * PANEL..first + w.n.min(run.end * PANEL);
                let target = Target { out: shared, width, rows: task.rows.clone(), columns };
                // SAFETY: a row's columns of a panel are one task's.
                unsafe { target.write(&space.sums, accumulate) };
            });
        });
    });
}

/// `range` cut into pieces of `size`.
pub(super) fn pieces(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(size).map(move |first| first..range.end.min(first + size))
}

/// Where results go: columns, of at most [`RUN`] panels, of rows of a matrix of `width` columns.
pub(super) struct Target<'a> {
    pub out: Shared<'a, f32>,
    pub width: usize,
    pub rows: Range<usize>,
    pub columns: Range<usize>,
}

impl Target<'_> {
    /// Cache lines that are asked for before they are written.
    const LINES: usize = 32;

    /// Asks for the memory of a row: each is on another page, and a store that misses waits long.
    #[inline(always)]
    fn ask(&self, row: usize) {
        #[cfg(not(target_arch = "x86_64"))]
        let _ = row;
        #[cfg(target_arch = "x86_64")]
        for at in self.columns.clone().step_by(PANEL) {
            // SAFETY: SSE is part of x86-64, and a prefetch has no effect on what the program computes.
            unsafe {
                use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
                _mm_prefetch::<_MM_HINT_T0>(self.out.as_ptr().wrapping_add(row * self.width + at).cast());
            }
        }
    }

    /// Writes, or adds, the first rows of the panels of `from`.
    ///
    /// # Safety
    /// Nobody else reads or writes these columns of these rows meanwhile.
    pub unsafe fn write(&self, from: &[Columns], accumulate: bool) {
        let columns = self.columns.len();
        let whole = columns.is_multiple_of(PANEL) && !accumulate;
        let ahead = (Self::LINES * PANEL / columns.max(1)).max(1);
        for (r, row) in self.rows.clone().enumerate() {
            self.ask((row + ahead).min(self.rows.end - 1));
            // SAFETY: by the caller's promise.
            let to = unsafe { self.out.part(row * self.width + self.columns.start, columns) };
            if whole {
                // Of a known length: no call for each 64 bytes.
                to.as_chunks_mut::<PANEL>().0.iter_mut().zip(from).for_each(|(to, from)| *to = from[r]);
                continue;
            }
            for (to, from) in to.chunks_mut(PANEL).zip(from) {
                let each = to.iter_mut().zip(&from[r]);
                each.for_each(|(to, x)| *to = if accumulate { *to + x } else { *x });
            }
        }
    }
}

/// The same rows in the forms of several formats.
pub(super) struct Forms(Vec<(Format, Activations)>);

thread_local! {
    /// Memory of forms that are done with.
    static SPARE: RefCell<Vec<Activations>> = const { RefCell::new(Vec::new()) };
}

/// Activations whose content is done with.
pub(super) fn spare() -> Activations {
    SPARE.with_borrow_mut(Vec::pop).unwrap_or_default()
}

/// Gives memory back for [`spare`].
pub(super) fn keep(done: Activations) {
    SPARE.with_borrow_mut(|spare| spare.push(done));
}

impl Forms {
    pub fn of(level: Level, x: &[f32], k: usize, formats: impl Iterator<Item = Format>) -> Self {
        let mut forms: Vec<(Format, Activations)> = Vec::new();
        for format in formats {
            if forms.iter().all(|(has, _)| *has != format) {
                let mut form = spare();
                form.fill(level, format, x, k);
                forms.push((format, form));
            }
        }
        Self(forms)
    }

    pub fn get(&self, format: Format) -> &Activations {
        let found = self.0.iter().find(|(has, _)| *has == format);
        &found.expect("the form of every format was made").1
    }
}

impl Drop for Forms {
    fn drop(&mut self) {
        self.0.drain(..).for_each(|(_, form)| keep(form));
    }
}
