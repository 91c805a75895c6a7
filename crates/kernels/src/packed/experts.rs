//! The MLPs of all experts with packed weights as one list of tasks: none waits for an expert that is not its own.

use super::product::{
    self, Columns, Forms, RUN, Space, Stretch, Target, pieces, rows_of_tasks, share, with_space,
};
use super::{PANEL, Packed};
use crate::activation;
use crate::buffers::Buffer;
use crate::dispatch::Dispatch;
use crate::expert_mlp::{self, Shape};
use crate::pool::{self, Shared};
use crate::profile;
use crate::simd::Level;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Rows that a task brings to the form of the second product.
const FORMED: usize = 32;

/// The weights of an expert.
#[derive(Clone, Copy, Debug)]
pub struct Expert<'a> {
    /// \[I, H\], of a gated expert.
    pub gate: Option<Packed<'a>>,
    /// \[I, H\].
    pub up: Packed<'a>,
    /// \[H, I\].
    pub down: Packed<'a>,
}

/// Biases of all experts.
#[derive(Clone, Copy, Debug, Default)]
pub struct MlpBiases<'a> {
    /// \[E, P\]: of an expert those of the gate, then of up.
    pub up: Option<&'a [f32]>,
    /// \[E, H\].
    pub down: Option<&'a [f32]>,
}

/// What a task does for the expert at `place` among those that have rows; rows are those of the dispatch.
#[derive(Debug)]
struct Task {
    place: usize,
    rows: Range<usize>,
    step: Step,
}

#[derive(Clone, Debug)]
enum Step {
    /// Panels of gate and up, or of up.
    Up(Range<usize>),
    /// Rows brought to the form of the second product, when all of the first is there.
    Form,
    /// Panels of down, when all rows are in their form.
    Down(Range<usize>),
}

/// Tasks that others wait for.
struct Left {
    /// How many are left, by place.
    counts: Vec<AtomicUsize>,
    /// One panicked: what its thread had begun, and what it would have done next, will not come.
    failed: AtomicBool,
}

/// Tells those who wait when a task panics.
struct Alarm<'a>(&'a [&'a Left]);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.iter().for_each(|left| left.failed.store(true, Ordering::Release));
        }
    }
}

impl Left {
    fn of(tasks: &[Task], places: usize, counts: fn(&Step) -> bool) -> Self {
        let mut left = vec![0; places];
        tasks.iter().filter(|task| counts(&task.step)).for_each(|task| left[task.place] += 1);
        Self { counts: left.into_iter().map(AtomicUsize::new).collect(), failed: AtomicBool::new(false) }
    }

    fn done(&self, place: usize) {
        self.counts[place].fetch_sub(1, Ordering::Release);
    }

    fn wait(&self, place: usize) {
        let mut turns = 0u32;
        while self.counts[place].load(Ordering::Acquire) > 0 {
            assert!(!self.failed.load(Ordering::Acquire), "another task of the layer panicked");
            turns += 1;
            // Where there are more threads than processors, the one that is waited for may not run.
            if turns.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

/// `y` \[T, H\] from `x` \[T, H\] and `weights` \[T, K\] (none: all 1): each token's rows through their experts, weighted and summed in
/// the order of its slots. Panics where shapes do not fit, or the experts' formats differ.
pub fn mlp(
    level: Level,
    d: &Dispatch,
    s: Shape,
    x: &[f32],
    experts: &[Expert],
    biases: MlpBiases,
    weights: Option<&[f32]>,
    y: &mut [f32],
) {
    let _span = profile::span(profile::PRODUCTS);
    let level = level.min(Level::detected());
    let (h, i) = (s.hidden, s.intermediate);
    assert!(
        experts.len() == d.experts() && x.len() == d.tokens * h && y.len() == x.len(),
        "a layer of {s:?}"
    );
    assert!(biases.up.is_none_or(|bias| bias.len() == d.experts() * s.pre()), "biases [E, P]");
    assert!(biases.down.is_none_or(|bias| bias.len() == d.experts() * h), "biases [E, H]");
    let Some(one) = experts.first() else { return y.fill(0.0) };
    for e in experts {
        let right = (e.up.n, e.up.k, e.down.n, e.down.k) == (i, h, h, i) && e.gate.is_some() == s.gated;
        assert!(right && e.gate.is_none_or(|gate| (gate.n, gate.k) == (i, h)), "an expert of {s:?}");
        let alike = e.gate.is_none_or(|gate| gate.format == e.up.format);
        assert!(alike && e.up.format == one.up.format && e.down.format == one.down.format, "experts alike");
    }
    let touched: Vec<usize> = d.touched().collect();
    let tasks = cut(level, d, &touched, one);
    let ups = Left::of(&tasks, touched.len(), |step| matches!(step, Step::Up(_)));
    let forms = Left::of(&tasks, touched.len(), |step| matches!(step, Step::Form));

    let first = Forms::of(level, x, h, std::iter::once(one.up.format));
    let first = first.get(one.up.format).view();
    let mut second = product::spare();
    second.shape(level, one.down.format, d.rows(), i);
    // Rows a multiple of 4 KiB apart would share a few sets of the caches: a task writes a line of each.
    let wide = if i.is_multiple_of(1024) { i + PANEL } else { i };
    let mut inner = Buffer::stale(d.rows() * wide);
    let direct = d.is_identity() && weights.is_none();
    let mut rows_out = if direct { Buffer::default() } else { Buffer::stale(d.rows() * h) };
    let every: Vec<u32> = (0..d.rows() as u32).collect();
    {
        let second = second.shares();
        let inner = Shared::new(&mut inner);
        let out = Shared::new(if direct { &mut *y } else { &mut rows_out });
        let stretch = |task: &Task| {
            let expert = &experts[touched[task.place]];
            let (weights, panels) = match (&task.step, expert.gate) {
                (Step::Up(panels), Some(gate)) => ([Some(gate), Some(expert.up)], panels.clone()),
                (Step::Up(panels), None) => ([Some(expert.up), None], panels.clone()),
                (Step::Down(panels), _) => ([Some(expert.down), None], panels.clone()),
                (Step::Form, _) => ([Some(expert.down), None], 0..1),
            };
            Stretch { weights, panels }
        };
        pool::for_each_ahead(tasks.len(), |index, next| {
            let _alarm = Alarm(&[&ups, &forms]);
            let task = &tasks[index];
            let expert = touched[task.place];
            let after = next.map(|next| stretch(&tasks[next]));
            match &task.step {
                Step::Up(_) => {
                    let bias = biases.up.map(|bias| &bias[expert * s.pre()..][..s.pre()]);
                    let rows = &d.token_of_row[task.rows.clone()];
                    with_space(|space| {
                        stretch(task).compute(level, after.as_ref(), first, rows, space, |run, space| {
                            activate(level, s, bias, &run, rows.len(), space);
                            let columns = run.start * PANEL..i.min(run.end * PANEL);
                            let target = Target { out: inner, width: wide, rows: task.rows.clone(), columns };
                            // SAFETY: a row's columns of a panel are one task's.
                            unsafe { target.write(&space.made, false) };
                        });
                    });
                    ups.done(task.place);
                }
                Step::Form => {
                    ups.wait(task.place);
                    for row in task.rows.clone() {
                        // SAFETY: all of the row was written before `wait` returned, and nobody writes it again; its form is
                        // this task's.
                        unsafe { second.fill(level, one.down.format, row, inner.part(row * wide, i)) };
                    }
                    forms.done(task.place);
                }
                Step::Down(_) => {
                    forms.wait(task.place);
                    let bias = biases.down.map(|bias| &bias[expert * h..][..h]);
                    let (rows, from) = (&every[task.rows.clone()], second.view());
                    with_space(|space| {
                        stretch(task).compute(level, after.as_ref(), from, rows, space, |run, space| {
                            let columns = run.start * PANEL..h.min(run.end * PANEL);
                            if let Some(bias) = bias {
                                add(&mut space.sums, rows.len(), &bias[columns.clone()]);
                            }
                            let target = Target { out, width: h, rows: task.rows.clone(), columns };
                            // SAFETY: as above.
                            unsafe { target.write(&space.sums, false) };
                        });
                    });
                }
            }
        });
    }
    product::keep(second);
    if !direct {
        expert_mlp::combine(level, d, &rows_out, weights, y, h);
    }
}

/// Adds a bias to the first `rows` rows of panels beside each other.
fn add(sums: &mut [Columns], rows: usize, bias: &[f32]) {
    for (sums, bias) in sums.iter_mut().zip(bias.chunks(PANEL)) {
        sums[..rows].iter_mut().for_each(|row| row.iter_mut().zip(bias).for_each(|(x, b)| *x += b));
    }
}

/// From the sums of a run to `space.made`: act(gate) · up, or act(up).
fn activate(
    level: Level,
    s: Shape,
    bias: Option<&[f32]>,
    run: &Range<usize>,
    rows: usize,
    space: &mut Space,
) {
    let (sums, made) = (&mut space.sums, &mut space.made[..run.len()]);
    let middle = if s.gated { RUN / 2 } else { 0 };
    if let Some(bias) = bias {
        let columns = run.start * PANEL..s.intermediate.min(run.end * PANEL);
        let (gate, up) = bias.split_at(if s.gated { s.intermediate } else { 0 });
        add(&mut sums[middle..], rows, &up[columns.clone()]);
        if s.gated {
            add(&mut sums[..middle], rows, &gate[columns]);
        }
    }
    for (panel, made) in made.iter_mut().enumerate() {
        let (first, up) = (sums[panel][..rows].as_flattened(), sums[middle + panel][..rows].as_flattened());
        let made = made[..rows].as_flattened_mut();
        match s.gated {
            true => activation::gated(level, s.activation, first, up, made),
            false => activation::plain(level, s.activation, up, made),
        }
    }
}

/// All first products, then all forms, then all second products: a task waits only for ones before it.
fn cut(level: Level, d: &Dispatch, touched: &[usize], one: &Expert) -> Vec<Task> {
    let mut tasks = Vec::new();
    let bytes = |w: Packed| w.format.panel_bytes(w.k);
    let (halves, rows) = (1 + usize::from(one.gate.is_some()), d.rows() / touched.len().max(1));
    let up = share(one.up.panels() * touched.len(), bytes(one.up) * halves, rows, RUN / halves);
    let down = share(one.down.panels() * touched.len(), bytes(one.down), rows, RUN);
    let mut add = |rows: &dyn Fn(Range<usize>) -> Vec<Range<usize>>, steps: Vec<Step>| {
        for (place, expert) in touched.iter().enumerate() {
            let rows = rows(d.rows_of(*expert));
            for step in &steps {
                // Rows of the same panels are neighbours: the second finds them in a cache.
                tasks.extend(rows.iter().map(|rows| Task { place, rows: rows.clone(), step: step.clone() }));
            }
        }
    };
    add(
        &|rows| rows_of_tasks(level, one.up, rows).collect(),
        pieces(0..one.up.panels(), up).map(Step::Up).collect(),
    );
    add(&|rows| pieces(rows, FORMED).collect(), vec![Step::Form]);
    add(
        &|rows| rows_of_tasks(level, one.down, rows).collect(),
        pieces(0..one.down.panels(), down).map(Step::Down).collect(),
    );
    tasks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_a_task_that_panicked() {
        let tasks = [Task { place: 0, rows: 0..1, step: Step::Form }];
        let left = Left::of(&tasks, 1, |step| matches!(step, Step::Form));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| std::panic::catch_unwind(|| left.wait(0)));
            let failing = scope.spawn(|| {
                std::panic::catch_unwind(|| {
                    let _alarm = Alarm(&[&left]);
                    panic!("as asked");
                })
            });
            assert!(failing.join().unwrap().is_err());
            assert!(waiting.join().unwrap().is_err(), "it waited no longer, and did not go on");
        });
        // A task that ends well rings no alarm.
        let left = Left::of(&tasks, 1, |step| matches!(step, Step::Form));
        drop(Alarm(&[&left]));
        left.done(0);
        left.wait(0);
    }
}
