//! Right sides of products that are packed once and met by several left sides, and products whose result is itself in panels, ready
//! to be the right side of the next: for kernels that keep their tiles in the caches.

use super::micro::{Left, Right};
use super::{Arithmetic, How, KC, MAX_M, Operand, View, a_along, micro, pack, pack_a_across, pack_b, round};
use crate::buffers::Lines;
use crate::pool::Shared;
use crate::simd::Level;
use std::ops::Range;

/// Columns of a panel.
pub(crate) fn width(level: Level) -> usize {
    micro::shape(level.min(Level::detected())).1
}

/// Elements from a panel of `rows` rows to the next: at least a cache line more than it needs, so that the same row of all panels lies in
/// several sets of the caches.
pub(crate) fn panel_len(level: Level, rows: usize) -> usize {
    (rows.next_multiple_of(16)) * width(level) + 16
}

/// A right side \[k, n\], packed.
pub(crate) struct Columns {
    how: How,
    k: usize,
    n: usize,
    panel: usize,
    data: Lines,
}

impl Columns {
    /// Packs `b` \[k, n\].
    pub fn pack(arithmetic: impl Into<Arithmetic>, k: usize, n: usize, b: View) -> Self {
        let (how, b) = (How::of(arithmetic.into()), Operand::of_b(b));
        let nr = width(how.level);
        let panel = panel_len(how.level, k.min(how.steps()));
        let (panels, visits) = (n.div_ceil(nr), k.div_ceil(how.steps()));
        let mut data = Lines::stale(visits * panels * panel);
        for (visit, k0) in (0..k).step_by(how.steps()).enumerate() {
            let into = &mut data[visit * panels * panel..];
            pack_b(how, &b, k0, how.steps().min(k - k0), 0, n, nr, panel, into);
        }
        Self { how, k, n, panel, data }
    }

    /// All of it.
    pub fn panels(&self) -> Panels<'_> {
        let Self { how, k, n, panel, ref data } = *self;
        Panels { how, k, panel, visit: n.div_ceil(width(how.level)) * panel, data }
    }
}

/// A right side in panels: of f32 or of pairs, as the arithmetic wants them.
#[derive(Clone, Copy)]
pub(crate) struct Panels<'a> {
    how: How,
    k: usize,
    /// Elements from a panel to the next.
    panel: usize,
    /// Elements from the panels of one visit to C to those of the next.
    visit: usize,
    data: &'a [f32],
}

/// Where a product goes.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    /// Elements from a row to the next.
    pub stride: usize,
    /// Elements from the columns of one panel to those of the next.
    pub panel: usize,
    /// Columns of all panels; with whole panels some may be of no use.
    pub columns: usize,
}

impl<'a> Panels<'a> {
    /// A tile of f32, `k` rows in panels `panel` apart, of which `which` are meant, as a right side. Where elements are rounded, they
    /// are rounded in the tile, or in `space`.
    pub fn of_tile(
        arithmetic: impl Into<Arithmetic>,
        k: usize,
        tile: &'a mut [f32],
        panel: usize,
        which: Range<usize>,
        space: &'a mut [f32],
    ) -> Self {
        let how = How::of(arithmetic.into());
        assert!(k <= KC, "a tile of {k} rows");
        let nr = width(how.level);
        #[cfg(target_arch = "x86_64")]
        if how.pairs {
            for j in which {
                super::pairs::panel(&tile[j * panel..][..k * nr], k, &mut space[j * panel..][..panel]);
            }
            return Self { how, k, panel, visit: 0, data: space };
        }
        let _ = space;
        if how.rounded {
            which.for_each(|j| round(how.level, &mut tile[j * panel..][..k * nr]));
        }
        Self { how, k, panel, visit: 0, data: tile }
    }

    /// Without the first `skip` rows, which must be a multiple of a panel's width; only of what C is visited for once.
    pub fn after(self, skip: usize) -> Self {
        let nr = width(self.how.level);
        assert!(self.k <= self.how.steps() && skip <= self.k && skip.is_multiple_of(nr));
        let rows = if self.how.pairs { skip / 2 } else { skip };
        Self { k: self.k - skip, data: &self.data[(rows * nr).min(self.data.len())..], ..self }
    }

    /// The first rows alone, if there are more.
    pub fn until(self, rows: usize) -> Self {
        Self { k: self.k.min(rows), ..self }
    }

    /// `C = A·B`, or `C += A·B`, of the columns of panels `which`; `a` \[m, k\].
    pub fn times(
        self,
        m: usize,
        a: View,
        which: Range<usize>,
        c: &mut [f32],
        place: Place,
        accumulate: bool,
    ) {
        let (how, a) = (self.how, Operand::of_a(a));
        let (mr, nr) = micro::shape(how.level);
        let c = Shared::new(c);
        if which.is_empty() {
            return;
        }
        pack::with_scratch(|scratch| {
            for m0 in (0..m).step_by(MAX_M) {
                let high = MAX_M.min(m - m0);
                for (visit, k0) in (0..self.k).step_by(how.steps()).enumerate() {
                    let kc = how.steps().min(self.k - k0);
                    let steps = if how.pairs { kc.div_ceil(2) } else { kc };
                    if !a.k_inner {
                        pack_a_across(how, &a, k0, kc, m0, high, mr, scratch.a);
                    }
                    for (number, i0) in (0..high).step_by(mr).enumerate() {
                        let rows = mr.min(high - i0);
                        let left = match a.k_inner {
                            true => a_along(how, &a, k0, kc, m0 + i0, rows, scratch.a),
                            false => Left::Columns(&scratch.a[number * pack::panel_of_a(mr)..]),
                        };
                        for j in which.clone() {
                            let panel = &self.data[visit * self.visit + j * self.panel..][..steps * nr];
                            let right = Right { rows: panel, stride: nr };
                            let tile = micro::Target {
                                c,
                                start: (m0 + i0) * place.stride + j * place.panel,
                                stride: place.stride,
                                rows,
                                cols: nr.min(place.columns - j * nr),
                                load: accumulate || k0 > 0,
                            };
                            micro::run(how.level, how.pairs, steps, left, right, tile);
                        }
                    }
                }
            }
        });
    }
}

/// The rows of a panel, of `cols` columns, as columns: element (r, c) goes to `into[c * stride + r]`.
pub(crate) fn transpose(
    level: Level,
    panel: &[f32],
    rows: usize,
    cols: usize,
    into: &mut [f32],
    stride: usize,
) {
    let level = level.min(Level::detected());
    let lines = Operand::k_inner(panel, width(level));
    pack::b_columns(level, &lines, 0, cols, 0, rows, stride, into);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::{Precision, serial_at};
    use crate::testing::Random;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// The bits of a product that packs for itself, for whole results and for those in panels.
        #[test]
        fn packed_once_or_each_time_is_the_same(
            m in 1usize..70, k in 1usize..80, n in 1usize..100, long: bool, a_t: bool, b_t: bool, seed: u64,
        ) {
            let k = if long { k + 1100 } else { k };
            let (a, b) = (Random(seed).vec(m * k, 1.0), Random(seed ^ 1).vec(k * n, 1.0));
            let a = if a_t { View::rows(&a, m).t() } else { View::rows(&a, k) };
            let b = if b_t { View::rows(&b, k).t() } else { View::rows(&b, n) };
            for level in Level::available() {
                for precision in [Precision::F32, Precision::Bf16] {
                    let how = Arithmetic { level, precision };
                    let mut want = Random(seed ^ 2).vec(m * n, 1.0);
                    let mut found = want.clone();
                    serial_at(how, m, n, k, a, b, &mut want, n, true);
                    let (columns, nr) = (Columns::pack(how, k, n, b), width(level));
                    let place = Place { stride: n, panel: nr, columns: n };
                    columns.panels().times(m, a, 0..n.div_ceil(nr), &mut found, place, true);
                    prop_assert_eq!(&found, &want);

                    // In panels, transposed, without the first of them.
                    let panel = panel_len(level, m);
                    let mut tile = vec![f32::NAN; n.div_ceil(nr) * panel];
                    let place = Place { stride: nr, panel, columns: n.next_multiple_of(nr) };
                    let first = 1.min(n / nr);
                    columns.panels().times(m, a, first..n.div_ceil(nr), &mut tile, place, false);
                    serial_at(how, m, n, k, a, b, &mut want, n, false);
                    let mut turned = vec![0.0; n * m];
                    for j in first..n.div_ceil(nr) {
                        let cols = nr.min(n - j * nr);
                        transpose(level, &tile[j * panel..][..m * nr], m, cols, &mut turned[j * nr * m..], m);
                    }
                    for c in first * nr..n {
                        for r in 0..m {
                            prop_assert_eq!(turned[c * m + r], want[r * n + c], "{} {}", r, c);
                        }
                    }
                }
            }
        }

        /// A tile as the right side of the next product, and a right side without its first rows.
        #[test]
        fn a_tile_is_a_right_side(m in 1usize..40, rows in 1usize..70, n in 1usize..100, skip in 0usize..3, seed: u64) {
            for level in Level::available() {
                for precision in [Precision::F32, Precision::Bf16] {
                    let (how, nr) = (Arithmetic { level, precision }, width(level));
                    let (panel, panels) = (panel_len(level, rows), n.div_ceil(nr));
                    let mut tile = vec![f32::NAN; panels * panel];
                    let b = Random(seed).vec(rows * n, 1.0);
                    for r in 0..rows {
                        for c in 0..panels * nr {
                            tile[c / nr * panel + r * nr + c % nr] = if c < n { b[r * n + c] } else { 0.0 };
                        }
                    }
                    let a = Random(seed ^ 1).vec(m * rows, 1.0);
                    let (mut want, mut found) = (vec![0.0; m * n], vec![0.0; m * n]);
                    serial_at(how, m, n, rows, View::rows(&a, rows), View::rows(&b, n), &mut want, n, false);
                    let mut space = vec![f32::NAN; tile.len()];
                    let right = Panels::of_tile(how, rows, &mut tile, panel, 0..panels, &mut space);
                    let place = Place { stride: n, panel: nr, columns: n };
                    right.times(m, View::rows(&a, rows), 0..panels, &mut found, place, false);
                    prop_assert_eq!(&found, &want);

                    let skip = (skip * nr).min(rows / nr * nr);
                    let (left, b) = (View::rows(&a[skip..], rows), View::rows(&b, n));
                    let rest = View::rows(&b.data[(skip * n).min(b.data.len())..], n);
                    serial_at(how, m, n, rows - skip, left, rest, &mut want, n, false);
                    let columns = Columns::pack(how, rows, n, b);
                    columns.panels().after(skip).times(m, left, 0..panels, &mut found, place, false);
                    if skip < rows {
                        prop_assert_eq!(&found, &want);
                    }
                }
            }
        }
    }
}
