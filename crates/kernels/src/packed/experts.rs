//! The MLPs of all experts with packed weights as one list of tasks: none waits for an expert that is not its own.

use super::product::{self, Columns, Forms, Pair, ROWS, RUN, Space, Target, pieces, share, with_space};
use super::{PANEL, Packed};
use crate::activation;
use crate::buffers::Buffer;
use crate::dispatch::Dispatch;
use crate::expert_mlp::{self, Shape};
use crate::pool::{self, Shared};
use crate::profile;
use crate::simd::Level;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

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
struct Left(Vec<AtomicUsize>);

impl Left {
    fn of(tasks: &[Task], places: usize, counts: fn(&Step) -> bool) -> Self {
        let mut left = vec![0; places];
        tasks.iter().filter(|task| counts(&task.step)).for_each(|task| left[task.place] += 1);
        Self(left.into_iter().map(AtomicUsize::new).collect())
    }

    fn done(&self, place: usize) {
        self.0[place].fetch_sub(1, Ordering::Release);
    }

    fn wait(&self, place: usize) {
        let mut turns = 0u32;
        while self.0[place].load(Ordering::Acquire) > 0 {
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
    let tasks = cut(d, &touched, one);
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
        let pair = |task: &Task, panel: usize| {
            let expert = &experts[touched[task.place]];
            match (&task.step, expert.gate) {
                (Step::Up(_), Some(gate)) => Pair { first: (gate, panel), second: Some((expert.up, panel)) },
                (Step::Up(panels), None) => Pair::of(expert.up, panel, panels.end),
                (Step::Down(panels), _) => Pair::of(expert.down, panel, panels.end),
                (Step::Form, _) => Pair::of(expert.down, 0, 1),
            }
        };
        let start = |task: &Task| match &task.step {
            Step::Up(panels) | Step::Down(panels) => panels.start,
            Step::Form => 0,
        };
        pool::for_each_ahead(tasks.len(), |index, next| {
            let task = &tasks[index];
            let expert = touched[task.place];
            let after = next.map(|next| pair(&tasks[next], start(&tasks[next])));
            match &task.step {
                Step::Up(panels) => {
                    // A gated expert's pair is one panel of each half.
                    let step = if s.gated { 1 } else { 2 };
                    let bias = biases.up.map(|bias| &bias[expert * s.pre()..][..s.pre()]);
                    let rows = &d.token_of_row[task.rows.clone()];
                    with_space(|space| {
                        for run in pieces(panels.clone(), RUN) {
                            for panel in run.clone().step_by(step) {
                                let more = panel + step < panels.end;
                                let ahead = if more { Some(pair(task, panel + step)) } else { after };
                                let Space { scratch, sums, results } = &mut *space;
                                product::sums(level, pair(task, panel), ahead, first, rows, scratch, sums);
                                let results = &mut results[panel - run.start..][..step];
                                activate(level, s, bias, panel, rows.len(), sums, results);
                            }
                            let columns = run.start * PANEL..i.min(run.end * PANEL);
                            let target = Target { out: inner, width: wide, rows: task.rows.clone(), columns };
                            // SAFETY: a row's columns of a panel are one task's.
                            unsafe { target.write(&space.results, false) };
                        }
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
                Step::Down(panels) => {
                    forms.wait(task.place);
                    let bias = biases.down.map(|bias| &bias[expert * h..][..h]);
                    let rows = &every[task.rows.clone()];
                    with_space(|space| {
                        for run in pieces(panels.clone(), RUN) {
                            for panel in run.clone().step_by(2) {
                                let more = panel + 2 < panels.end;
                                let ahead = if more { Some(pair(task, panel + 2)) } else { after };
                                let to = &mut space.results.as_chunks_mut().0[(panel - run.start) / 2];
                                let (this, from) = (pair(task, panel), second.view());
                                product::sums(level, this, ahead, from, rows, &mut space.scratch, to);
                            }
                            let columns = run.start * PANEL..h.min(run.end * PANEL);
                            if let Some(bias) = bias {
                                for (sums, bias) in
                                    space.results.iter_mut().zip(bias[columns.clone()].chunks(PANEL))
                                {
                                    for row in &mut sums[..rows.len()] {
                                        row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
                                    }
                                }
                            }
                            let target = Target { out, width: h, rows: task.rows.clone(), columns };
                            // SAFETY: as above.
                            unsafe { target.write(&space.results, false) };
                        }
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

/// From the sums of a pair of panels, of which `panel` is the first, to the results: act(gate) · up of one panel, or act(up) of two.
fn activate(
    level: Level,
    s: Shape,
    bias: Option<&[f32]>,
    panel: usize,
    rows: usize,
    [a, b]: &mut [Columns; 2],
    results: &mut [Columns],
) {
    let i = s.intermediate;
    let (a, b) = (&mut a[..rows], &mut b[..rows]);
    if let Some(bias) = bias {
        let at = panel * PANEL;
        let (first, second) = if s.gated { (at, i + at) } else { (at, at + PANEL) };
        let end = |first: usize| if s.gated && first >= i { 2 * i } else { i };
        for (sums, from) in [(&mut *a, first), (&mut *b, second)] {
            let bias = bias.get(from..end(from).min(from + PANEL)).unwrap_or_default();
            sums.iter_mut().for_each(|row| row.iter_mut().zip(bias).for_each(|(x, b)| *x += b));
        }
    }
    match results {
        [to] => activation::gated(
            level,
            s.activation,
            a.as_flattened(),
            b.as_flattened(),
            to[..rows].as_flattened_mut(),
        ),
        _ => {
            for (to, from) in results.iter_mut().zip([a, b]) {
                activation::plain(level, s.activation, from.as_flattened(), to[..rows].as_flattened_mut());
            }
        }
    }
}

/// All first products, then all forms, then all second products: a task waits only for ones before it.
fn cut(d: &Dispatch, touched: &[usize], one: &Expert) -> Vec<Task> {
    let mut tasks = Vec::new();
    let gated = one.gate.is_some();
    let bytes = |w: Packed| w.format.panel_bytes(w.k);
    let (halves, rows) = (1 + usize::from(gated), d.rows() / touched.len().max(1));
    let up = share(one.up.panels() * touched.len() * halves, bytes(one.up), rows, RUN * halves) / halves;
    let down = share(one.down.panels() * touched.len(), bytes(one.down), rows, RUN);
    let mut add = |rows: usize, step: &dyn Fn() -> Vec<Step>| {
        for (place, expert) in touched.iter().enumerate() {
            let all = d.rows_of(*expert);
            for step in step() {
                // Rows of the same panels are neighbours: the second finds them in a cache.
                tasks.extend(pieces(all.clone(), rows).map(|rows| Task { place, rows, step: step.clone() }));
            }
        }
    };
    add(ROWS, &|| pieces(0..one.up.panels(), up).map(Step::Up).collect());
    add(FORMED, &|| vec![Step::Form]);
    add(ROWS, &|| pieces(0..one.down.panels(), down).map(Step::Down).collect());
    tasks
}
