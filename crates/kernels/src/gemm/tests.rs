//! The blocked products against plain loops: every level, every kind of operand, odd sizes, empty groups.

use super::*;
use crate::elements::ElementType;
use proptest::prelude::*;

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 40) as f32 / (1u64 << 24) as f32) - 0.5
        })
        .collect()
}

/// The product of element functions, in f64.
fn plain(
    m: usize,
    n: usize,
    k: usize,
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize, usize) -> f32,
) -> Vec<f64> {
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            c[i * n + j] = (0..k).map(|p| a(i, p) as f64 * b(p, j) as f64).sum();
        }
    }
    c
}

fn close(got: &[f32], want: &[f64], k: usize) {
    let bound = 1e-6 * (k as f64).sqrt().max(1.0);
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((*g as f64 - w).abs() <= bound, "element {i}: {g}, not {w}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn dense_products_agree_with_loops(
        m in 0usize..70, n in 0usize..90, k in 0usize..300, a_t: bool, b_t: bool, accumulate: bool, seed: u64,
    ) {
        let (a, b) = (numbers(m * k, seed), numbers(k * n, seed ^ 1));
        let start = numbers(m * n, seed ^ 2);
        let a_at = |i: usize, p: usize| if a_t { a[p * m + i] } else { a[i * k + p] };
        let b_at = |p: usize, j: usize| if b_t { b[j * k + p] } else { b[p * n + j] };
        let mut want = plain(m, n, k, a_at, b_at);
        if accumulate {
            for (w, s) in want.iter_mut().zip(&start) {
                *w += *s as f64;
            }
        }
        let va = if a_t { View::rows(&a, m).t() } else { View::rows(&a, k) };
        let vb = if b_t { View::rows(&b, k).t() } else { View::rows(&b, n) };
        // A view whose two strides are 1 is read either way.
        for level in Level::available() {
            let mut c = start.clone();
            serial_at(level, m, n, k, va, vb, &mut c, n.max(1), accumulate);
            close(&c, &want, k);
        }
    }

    #[test]
    fn bits_do_not_depend_on_blocks_or_threads(m in 1usize..200, n in 1usize..140, k in 1usize..530, seed: u64) {
        let (a, b) = (numbers(m * k, seed), numbers(n * k, seed ^ 1));
        let (va, vb) = (View::rows(&a, k), View::rows(&b, k).t());
        let mut whole = vec![0.0; m * n];
        serial(m, n, k, va, vb, &mut whole, n, false);
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut c = vec![0.0; m * n];
            pool.install(|| parallel(Precision::F32, m, n, k, va, vb, &mut c, n, false));
            prop_assert_eq!(&c, &whole);
        }
        // One row alone, and one column alone.
        let (i, j) = (seed as usize % m, (seed >> 20) as usize % n);
        let mut row = vec![0.0; n];
        serial(1, n, k, View::rows(&a[i * k..], k), vb, &mut row, n, false);
        prop_assert_eq!(&row[..], &whole[i * n..][..n]);
        let mut col = vec![0.0; m];
        serial(m, 1, k, va, View::rows(&b[j * k..], k).t(), &mut col, 1, false);
        for i in 0..m {
            prop_assert_eq!(col[i], whole[i * n + j]);
        }
    }

    /// Lines named one by one are packed; without names they are multiplied where they lie, where that pays.
    #[test]
    fn packed_or_where_they_lie_gives_the_same_bits(
        m in 1usize..60, panels in 1usize..5, ragged in 0usize..9, k in 1usize..40, long: bool, beside in 0usize..40,
        far: bool, a_t: bool, seed: u64,
    ) {
        let (n, k) = (32 * panels - ragged, if long { k + KC } else { k });
        let (a_lines, a_width) = if a_t { (k, m) } else { (m, k) };
        let apart = |width: usize| if far { 1024 } else { width + beside };
        let (a_wide, b_wide) = (apart(a_width), apart(n));
        // The last line ends with its last element.
        let a = numbers((a_lines - 1) * a_wide + a_width, seed);
        let b = numbers((k - 1) * b_wide + n, seed ^ 1);
        let names: Vec<u32> = (0..m.max(k) as u32).collect();
        for level in Level::available() {
            let product = |named: bool| {
                let a = if a_t { Operand::k_outer(&a, a_wide) } else { Operand::k_inner(&a, a_wide) };
                let b = Operand::k_outer(&b, b_wide);
                let (a, b) = if named { (a.gathered(&names), b.gathered(&names)) } else { (a, b) };
                Product { m, n, k, a, b, c_start: 0, c_stride: n, accumulate: false, twin: None, twin_b: None }
            };
            let (mut packed, mut plain) = (vec![f32::NAN; m * n], vec![f32::NAN; m * n]);
            run_all(level, &[product(true)], &mut packed, |_| {});
            run_all(level, &[product(false)], &mut plain, |_| {});
            prop_assert_eq!(&packed, &plain);
        }
    }

    #[test]
    fn grouped_products_gather_scale_and_pair(
        sizes in prop::collection::vec(0usize..40, 1..6), n in 1usize..50, k in 1usize..70, seed: u64,
    ) {
        // Groups of rows gathered from a pool of rows, each group with a weight of its own of [2n, k].
        let total: usize = sizes.iter().sum();
        let pool_rows = 17;
        let x = numbers(pool_rows * k, seed);
        let w = numbers(sizes.len() * 2 * n * k, seed ^ 3);
        let scale = numbers(total, seed ^ 4);
        let lines: Vec<u32> = (0..total).map(|i| ((i as u64 * 7 + seed) % pool_rows as u64) as u32).collect();
        for level in Level::available() {
            let mut c = vec![f32::NAN; total * 2 * n];
            let mut products = Vec::new();
            let mut start = 0;
            for (g, &rows) in sizes.iter().enumerate() {
                products.push(Product {
                    m: rows, n, k,
                    a: Operand::k_inner(&x, k).gathered(&lines[start..start + rows]).scaled(&scale[start..start + rows]),
                    b: Operand::k_inner(&w[g * 2 * n * k..][..2 * n * k], k),
                    c_start: start * 2 * n, c_stride: 2 * n, accumulate: false, twin: Some(n), twin_b: None,
                });
                start += rows;
            }
            // The epilogue swaps the halves, so each is seen once and finished.
            run_all(level, &products, &mut c, |mut tile| {
                for i in tile.rows.clone() {
                    let (a, b) = tile.row_pair(i);
                    a.swap_with_slice(b);
                }
            });
            let mut start = 0;
            for (g, &rows) in sizes.iter().enumerate() {
                let at = |i: usize, p: usize| x[lines[start + i] as usize * k + p] * scale[start + i];
                let want = plain(rows, 2 * n, k, at, |p, j| w[(g * 2 * n + (j + n) % (2 * n)) * k + p]);
                close(&c[start * 2 * n..][..rows * 2 * n], &want, k);
                start += rows;
            }
        }
    }

    #[test]
    fn gradients_of_weights_add_over_gathered_lines(m in 1usize..60, n in 1usize..60, k in 0usize..300, seed: u64) {
        // C += Aᵀ·B with both operands across k, gathered and scaled.
        let pool_rows = 13;
        let (a, b) = (numbers(pool_rows * m, seed), numbers(pool_rows * n, seed ^ 1));
        let lines: Vec<u32> = (0..k).map(|i| ((i as u64 * 5 + seed) % pool_rows as u64) as u32).collect();
        let scale = numbers(k, seed ^ 2);
        let start = numbers(m * n, seed ^ 3);
        let at = |i: usize, p: usize| a[lines[p] as usize * m + i] * scale[p];
        let mut want = plain(m, n, k, at, |p, j| b[lines[p] as usize * n + j]);
        for (w, s) in want.iter_mut().zip(&start) {
            *w += *s as f64;
        }
        for level in Level::available() {
            let mut c = start.clone();
            let product = Product {
                m, n, k,
                a: Operand::k_outer(&a, m).gathered(&lines).scaled(&scale),
                b: Operand::k_outer(&b, n).gathered(&lines),
                c_start: 0, c_stride: n, accumulate: true, twin: None, twin_b: None,
            };
            run_all(level, &[product], &mut c, |_| {});
            close(&c, &want, k);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn coded_weights_give_the_bits_of_decoded_ones(
        m in 1usize..40, n in 1usize..80, k in 1usize..700, ty in 0usize..3, across: bool, apart: bool, seed: u64,
    ) {
        let ty = [ElementType::F32, ElementType::F16, ElementType::Bf16][ty];
        // [2n, k] as x · Wᵀ has it, or [k, 2n].
        let (rows, cols) = if across { (k, 2 * n) } else { (2 * n, k) };
        let bytes: Vec<u8> = numbers(rows * cols, seed)
            .iter()
            .flat_map(|x| match ty {
                ElementType::F32 => x.to_le_bytes().to_vec(),
                ElementType::Bf16 => x.to_le_bytes()[2..].to_vec(),
                // Some half between 2^-8 and 2^8.
                _ => ((x.to_bits() >> 13 & 0x83ff) | (x.to_bits() >> 3 & 15) << 10 | 0x2000).to_le_bytes()[..2].to_vec(),
            })
            .collect();
        let w = Matrix::coded(ty, &bytes, rows, cols, cols * ty.block_bytes());
        let mut decoded = vec![0.0; rows * cols];
        decoded.chunks_exact_mut(cols).enumerate().for_each(|(r, row)| w.row(r, row));
        let plain = Matrix::plain(&decoded, rows, cols);
        let a = numbers(m * k, seed ^ 1);
        for level in Level::available() {
            let run = |w: Matrix| {
                let mut c = vec![f32::NAN; m * 2 * n];
                let (b, twin, twin_b) = match (across, apart) {
                    (true, _) => (Operand::weight_across(w), None, None),
                    (false, false) => (Operand::weight(w), Some(n), None),
                    (false, true) => {
                        (Operand::weight(w.some(0..n)), Some(n), Some(Operand::weight(w.some(n..2 * n))))
                    }
                };
                let n = if across { 2 * n } else { n };
                let a = Operand::k_inner(&a, k);
                let c_stride = if across { n } else { 2 * n };
                let product = Product { m, n, k, a, b, c_start: 0, c_stride, accumulate: false, twin, twin_b };
                run_all(level, &[product], &mut c, |_| {});
                c
            };
            prop_assert_eq!(run(w), run(plain));
        }
    }
}

/// What bf16 has nearest.
fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| bf16_to_f32(f32_to_bf16(*x))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn bf16_products_are_those_of_rounded_elements(
        m in 0usize..70, n in 0usize..90, k in 0usize..1300, a_t: bool, b_t: bool, accumulate: bool, seed: u64,
    ) {
        let (a, b) = (numbers(m * k, seed), numbers(k * n, seed ^ 1));
        let (ra, rb) = (rounded(&a), rounded(&b));
        let start = numbers(m * n, seed ^ 2);
        let a_at = |i: usize, p: usize| if a_t { ra[p * m + i] } else { ra[i * k + p] };
        let b_at = |p: usize, j: usize| if b_t { rb[j * k + p] } else { rb[p * n + j] };
        let mut want = plain(m, n, k, a_at, b_at);
        if accumulate {
            want.iter_mut().zip(&start).for_each(|(w, s)| *w += *s as f64);
        }
        let va = if a_t { View::rows(&a, m).t() } else { View::rows(&a, k) };
        let vb = if b_t { View::rows(&b, k).t() } else { View::rows(&b, n) };
        for level in Level::available() {
            let arithmetic = Arithmetic { level, precision: Precision::Bf16 };
            let mut c = start.clone();
            serial_at(arithmetic, m, n, k, va, vb, &mut c, n.max(1), accumulate);
            close(&c, &want, k);
            for threads in [2, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut again = start.clone();
                pool.install(|| parallel(arithmetic, m, n, k, va, vb, &mut again, n.max(1), accumulate));
                prop_assert_eq!(&again, &c);
            }
        }
    }

    #[test]
    fn bf16_operands_are_scaled_before_they_are_rounded(
        m in 1usize..60, n in 1usize..70, k in 0usize..300, across: bool, pair: bool, seed: u64,
    ) {
        let lines = if across { k } else { m };
        let pool_rows = 13;
        let width = if across { m } else { k };
        let (a, b) = (numbers(pool_rows * width, seed), numbers(2 * n * k, seed ^ 1));
        let picked: Vec<u32> = (0..lines).map(|i| ((i as u64 * 5 + seed) % pool_rows as u64) as u32).collect();
        let scale = numbers(lines, seed ^ 2);
        let round = |x: f32| bf16_to_f32(f32_to_bf16(x));
        let a_at = |i: usize, p: usize| {
            let (line, at) = if across { (p, i) } else { (i, p) };
            round(a[picked[line] as usize * width + at] * scale[line])
        };
        let columns = if pair { 2 * n } else { n };
        let want = plain(m, columns, k, a_at, |p, j| round(b[j * k + p]));
        for level in Level::available() {
            let mut c = vec![f32::NAN; m * columns];
            let a = if across { Operand::k_outer(&a, m) } else { Operand::k_inner(&a, k) };
            let product = Product {
                m, n, k,
                a: a.gathered(&picked).scaled(&scale),
                b: Operand::k_inner(&b, k),
                c_start: 0, c_stride: columns, accumulate: false, twin: pair.then_some(n), twin_b: None,
            };
            run_all(Arithmetic { level, precision: Precision::Bf16 }, &[product], &mut c, |_| {});
            close(&c, &want, k);
        }
    }
}

/// One row that stands for all: rows 0 apart.
#[test]
fn rows_may_be_the_same_row() {
    let (m, n, k) = (5, 32, 7);
    let (a, b) = (numbers(k, 1), numbers(n, 2));
    for level in Level::available() {
        let mut c = vec![f32::NAN; m * n];
        serial_at(level, m, n, k, View::rows(&a, 0), View::rows(&b, 0), &mut c, n, false);
        let sum: f32 = a.iter().sum();
        for (i, c) in c.iter().enumerate() {
            assert!((c - sum * b[i % n]).abs() < 1e-5, "{level:?}");
        }
    }
}

#[test]
#[should_panic]
fn a_stride_beyond_all_numbers_is_refused() {
    let (a, b, mut c) = ([1.0; 64], [1.0; 128], [0.0; 128]);
    serial(4, 32, 4, View::rows(&a, usize::MAX / 3 + 1), View::rows(&b, 32), &mut c, 32, false);
}

#[test]
fn blocks_of_full_size_and_beyond() {
    // Larger than a block in every direction, A across k, B both ways; then a pair whose halves are larger than half a block.
    let (m, k) = (MAX_M + 6, 2 * KC + 6);
    for (n, twin) in [(MAX_N + 8, false), (MAX_N / 2 + 44, true)] {
        let columns = if twin { 2 * n } else { n };
        let (a, b) = (numbers(m * k, 1), numbers(columns * k, 2));
        for precision in [Precision::F32, Precision::Bf16] {
            let round = |x: f32| if precision == Precision::Bf16 { bf16_to_f32(f32_to_bf16(x)) } else { x };
            for b_inner in [true, false] {
                let b_at =
                    |p: usize, j: usize| round(if b_inner { b[j * k + p] } else { b[p * columns + j] });
                // Some rows and columns, those at the edges of blocks among them.
                let rows = [0, 13, 14, MAX_M - 1, MAX_M, m - 1];
                let cols = [0, 31, 32, columns / 2 - 1, columns / 2, MAX_N - 1, MAX_N, columns - 1];
                for level in Level::available() {
                    let product = Product {
                        m,
                        n,
                        k,
                        a: Operand::k_outer(&a, m),
                        b: if b_inner { Operand::k_inner(&b, k) } else { Operand::k_outer(&b, columns) },
                        c_start: 0,
                        c_stride: columns,
                        accumulate: false,
                        twin: twin.then_some(n),
                        twin_b: None,
                    };
                    let mut c = vec![f32::NAN; m * columns];
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
                    pool.install(|| run_all(Arithmetic { level, precision }, &[product], &mut c, |_| {}));
                    for i in rows {
                        for j in cols {
                            let want: f64 =
                                (0..k).map(|p| f64::from(round(a[p * m + i])) * f64::from(b_at(p, j))).sum();
                            let got = f64::from(c[i * columns + j]);
                            assert!(
                                (got - want).abs() < 1e-4,
                                "{level:?} {precision:?} ({i}, {j}): {got}, not {want}"
                            );
                        }
                    }
                    assert!(c.iter().all(|x| x.is_finite()));
                }
            }
        }
    }
}

#[test]
fn infinities_survive_bf16_beside_an_odd_last_step() {
    let (a, b) = ([1.0, f32::INFINITY, 2.0], [1.0, 1.0, 1.0]);
    for level in Level::available() {
        for (a, b) in [(View::rows(&a, 3), View::rows(&b, 3).t()), (View::rows(&a, 1).t(), View::rows(&b, 1))]
        {
            let mut c = [0.0];
            serial_at(Arithmetic { level, precision: Precision::Bf16 }, 1, 1, 3, a, b, &mut c, 1, false);
            assert_eq!(c[0], f32::INFINITY);
        }
    }
}

#[test]
fn quantised_weights_give_the_bits_of_decoded_ones() {
    let (m, n, k) = (5, 40, 768);
    let (a, x) = (numbers(m * k, 1), numbers(n * k, 2));
    for ty in ElementType::ALL.iter().copied().filter(|ty| crate::blocks::can_quantize(*ty)) {
        let row = ty.row_bytes(k).unwrap();
        let mut bytes = vec![0; n * row];
        for (x, bytes) in x.chunks_exact(k).zip(bytes.chunks_exact_mut(row)) {
            crate::blocks::quantize(ty, x, bytes);
        }
        let w = Matrix::coded(ty, &bytes, n, k, row);
        let mut decoded = vec![0.0; n * k];
        decoded.chunks_exact_mut(k).enumerate().for_each(|(r, out)| w.row(r, out));
        for (across, c_cols) in [(false, n), (true, k)] {
            // Across, the rows of W are those of B: k is then n.
            let run = |w: Matrix| {
                let mut c = vec![f32::NAN; m * c_cols];
                let (b, inner) =
                    if across { (Operand::weight_across(w), n) } else { (Operand::weight(w), k) };
                let a = Operand::k_inner(&a, k);
                let product = Product {
                    m,
                    n: c_cols,
                    k: inner,
                    a,
                    b,
                    c_start: 0,
                    c_stride: c_cols,
                    accumulate: false,
                    twin: None,
                    twin_b: None,
                };
                run_all(Level::current(), &[product], &mut c, |_| {});
                c
            };
            assert_eq!(run(w), run(Matrix::plain(&decoded, n, k)), "{ty}");
        }
    }
}

#[test]
#[should_panic(expected = "C has 3 elements")]
fn a_short_result_is_refused() {
    let mut c = [0.0; 3];
    parallel(
        Precision::F32,
        2,
        2,
        1,
        View::rows(&[1.0, 2.0], 1),
        View::rows(&[1.0, 2.0], 2),
        &mut c,
        2,
        false,
    );
}
