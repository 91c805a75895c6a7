//! Packed products against plain loops over the decoded weights.

use super::*;
use crate::activation::{self, Activation, GPT_OSS};
use crate::blocks::{can_quantize, dequantize, quantize};
use crate::dispatch::{Dispatch, EMPTY};
use crate::elements::Matrix;
use crate::expert_mlp::Shape;
use crate::simd::Level;
use crate::testing::{Random, assert_same_on_any_threads, bits};

/// A weight in a file's order, packed, and decoded.
struct Weight {
    format: Format,
    n: usize,
    k: usize,
    packed: Vec<u8>,
    values: Vec<f32>,
}

impl Weight {
    fn random(random: &mut Random, format: Format, n: usize, k: usize) -> Self {
        let ty = format.element_type();
        assert!(can_quantize(ty));
        let x = random.vec(n * k, 0.5);
        let mut coded = vec![0; ty.row_bytes(k).unwrap() * n];
        quantize(ty, &x, &mut coded);
        let mut values = vec![0.0; n * k];
        dequantize(ty, &coded, &mut values);
        let mut packed = vec![0xA5; format.bytes(n, k)];
        pack(format, Matrix::coded(ty, &coded, n, k, ty.row_bytes(k).unwrap()), &mut packed);
        Self { format, n, k, packed, values }
    }

    fn packed(&self) -> Packed<'_> {
        Packed::new(self.format, self.n, self.k, &self.packed)
    }

    /// The product in f64 with activations as they are, and the sum of the sizes of its terms.
    fn exact(&self, x: &[f32]) -> Vec<(f64, f64)> {
        x.chunks_exact(self.k)
            .flat_map(|x| {
                self.values.chunks_exact(self.k).map(move |w| {
                    let terms = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                    terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
                })
            })
            .collect()
    }
}

/// How far a product may be from the exact one, as a part of the sum of the sizes of its terms: the elements of activations are
/// rounded, to bf16 (8 bits) or by half a step of 1/127 of the largest of 32 or 256.
fn tolerance(format: Format) -> f64 {
    match format {
        Format::F32 | Format::F16 => 2e-6,
        Format::Bf16 => 1.0 / 256.0,
        _ => 0.02,
    }
}

fn widths(format: Format) -> &'static [usize] {
    match format {
        Format::F32 | Format::F16 | Format::Bf16 => &[1, 2, 7, 64, 129, 300],
        Format::Q4K | Format::Q6K => &[256, 768],
        _ => &[32, 96, 256, 288, 640],
    }
}

#[test]
fn products_are_those_of_the_decoded_weights() {
    let mut random = Random(1);
    for format in Format::ALL {
        for &k in widths(format) {
            for (m, n) in [(1, 16), (2, 5), (3, 33), (13, 48), (29, 40)] {
                let w = Weight::random(&mut random, format, n, k);
                let x = random.vec(m * k, 1.0);
                let exact = w.exact(&x);
                for level in Level::available() {
                    let mut y = vec![0.0; m * n];
                    let weights = [w.packed()];
                    linear(level, Linear { x: &x, weights: &weights, y: &mut y, accumulate: false });
                    for (got, (want, size)) in y.iter().zip(&exact) {
                        let off = (f64::from(*got) - want).abs();
                        assert!(
                            off <= tolerance(format) * size + 1e-6,
                            "{format:?} {level:?} [{m}, {n}, {k}]: {got}, not {want}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn levels_differ_by_rounding_alone() {
    // What levels share is more than the bound above says: activations are rounded alike.
    let mut random = Random(2);
    for format in Format::ALL {
        let k = *widths(format).last().unwrap();
        let w = Weight::random(&mut random, format, 37, k);
        let x = random.vec(9 * k, 1.0);
        let size = w.exact(&x).iter().fold(0.0, |m: f64, (_, size)| m.max(*size));
        let of = |level| {
            let mut y = vec![0.0; 9 * 37];
            linear(level, Linear { x: &x, weights: &[w.packed()], y: &mut y, accumulate: false });
            y
        };
        let portable = of(Level::Portable);
        for level in Level::available() {
            for (a, b) in of(level).iter().zip(&portable) {
                assert!(f64::from(a - b).abs() <= 1e-6 * size, "{format:?} {level:?}: {a} and {b}");
            }
        }
    }
}

#[test]
fn a_row_has_the_bits_that_it_has_alone_on_any_threads() {
    let mut random = Random(3);
    for format in Format::ALL {
        let k = *widths(format).last().unwrap();
        let parts = [Weight::random(&mut random, format, 50, k), Weight::random(&mut random, format, 31, k)];
        let weights = [parts[0].packed(), parts[1].packed()];
        let x = random.vec(300 * k, 1.0);
        for level in Level::available() {
            let run = |x: &[f32]| {
                let mut y = vec![0.0; x.len() / k * 81];
                linear(level, Linear { x, weights: &weights, y: &mut y, accumulate: false });
                y
            };
            let all = run(&x);
            assert_same_on_any_threads(|| run(&x));
            for row in [0, 1, 13, 99, 100, 149, 150, 199, 200, 255, 256, 299] {
                let alone = run(&x[row * k..][..k]);
                assert_eq!(bits(&alone), bits(&all[row * 81..][..81]), "{format:?} {level:?} row {row}");
            }
            // Side by side and apart, written and added.
            let mut y = vec![1.0; 300 * 31];
            linear(level, Linear { x: &x, weights: &weights[1..], y: &mut y, accumulate: true });
            let sum: Vec<f32> =
                all.chunks_exact(81).flat_map(|row| row[50..].iter().map(|x| 1.0 + x)).collect();
            assert_eq!(bits(&y), bits(&sum), "{format:?} {level:?}");
        }
    }
}

#[test]
fn a_row_has_its_bits_in_tiles_of_any_height() {
    let mut random = Random(9);
    for format in Format::ALL {
        // Three panels: a pair and a single one. The last chunk is short where it can be, and a pair of k has one.
        let (n, k) = (33, [301, 288, 512].into_iter().find(|k| format.fits(*k)).unwrap());
        let w = Weight::random(&mut random, format, n, k);
        let x = random.vec(26 * k, 1.0);
        for level in Level::available() {
            let run = |x: &[f32]| {
                let mut y = vec![0.0; x.len() / k * n];
                linear(level, Linear { x, weights: &[w.packed()], y: &mut y, accumulate: false });
                y
            };
            let alone: Vec<f32> = x.chunks_exact(k).flat_map(run).collect();
            for m in 1..=26 {
                assert_eq!(bits(&run(&x[..m * k])), bits(&alone[..m * n]), "{format:?} {level:?}, {m} rows");
            }
        }
    }
}

#[test]
fn a_wide_result_is_written_whole() {
    let mut random = Random(11);
    for (format, k) in [(Format::F32, 33), (Format::Bf16, 64), (Format::Q8_0, 64)] {
        // On one thread a task has 10 panels: a run of eight and one of two, of which the last is not whole.
        let (m, n) = (70, 16 * 80 - 3);
        let w = Weight::random(&mut random, format, n, k);
        let x = random.vec(m * k, 1.0);
        for level in Level::available() {
            let run = |x: &[f32], accumulate| {
                let mut y = vec![1.0; x.len() / k * n];
                let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
                pool.install(|| linear(level, Linear { x, weights: &[w.packed()], y: &mut y, accumulate }));
                y
            };
            let alone: Vec<f32> = x.chunks_exact(k).flat_map(|x| run(x, false)).collect();
            assert_eq!(bits(&run(&x, false)), bits(&alone), "{format:?} {level:?}");
            let sums: Vec<f32> = alone.iter().map(|y| 1.0 + y).collect();
            assert_eq!(bits(&run(&x, true)), bits(&sums), "{format:?} {level:?}");
            for (got, (want, size)) in alone.iter().zip(w.exact(&x)) {
                let off = (f64::from(*got) - want).abs();
                assert!(off <= tolerance(format) * size + 1e-6, "{format:?} {level:?}: {got}, not {want}");
            }
        }
    }
}

#[test]
fn weights_of_several_formats_share_a_product() {
    let mut random = Random(10);
    let (m, n, k) = (7, 20, 96);
    let parts = [Format::Q8_0, Format::Q4_0, Format::Mxfp4, Format::Bf16]
        .map(|format| Weight::random(&mut random, format, n, k));
    let weights = parts.each_ref().map(Weight::packed);
    let x = random.vec(m * k, 1.0);
    for level in Level::available() {
        let run = |weights: &[Packed]| {
            let mut y = vec![0.0; m * n * weights.len()];
            linear(level, Linear { x: &x, weights, y: &mut y, accumulate: false });
            y
        };
        let all = run(&weights);
        for (part, w) in weights.iter().enumerate() {
            let own: Vec<f32> =
                all.chunks_exact(4 * n).flat_map(|row| row[part * n..][..n].to_vec()).collect();
            assert_eq!(bits(&own), bits(&run(&[*w])), "{:?} {level:?}", w.format());
        }
    }
}

#[test]
fn bf16_is_rounded_to_nearest_and_what_is_not_finite_stays_so() {
    let w = Weight::random(&mut Random(4), Format::Q8_0, 16, 64);
    for format in
        [Format::F32, Format::Bf16, Format::Q8_0, Format::Q4_0, Format::Mxfp4, Format::Q4K, Format::Q6K]
    {
        let k = 256;
        let w = Weight::random(&mut Random(5), format, 16, k);
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            // A few rows, and tiles of them.
            for rows in [2, 7] {
                let mut x = vec![0.5; rows * k];
                x[3] = odd;
                for level in Level::available() {
                    let mut y = vec![0.0; rows * 16];
                    linear(level, Linear { x: &x, weights: &[w.packed()], y: &mut y, accumulate: false });
                    let (first, others) = y.split_at(16);
                    assert!(first.iter().all(|y| !y.is_finite()), "{format:?} {level:?} {odd}: {first:?}");
                    assert!(others.iter().all(|y| y.is_finite()), "{format:?} {level:?}");
                }
            }
        }
    }
    // Zeros are exact.
    for level in Level::available() {
        let mut y = vec![1.0; 16];
        linear(level, Linear { x: &[0.0; 64], weights: &[w.packed()], y: &mut y, accumulate: false });
        assert!(y.iter().all(|y| *y == 0.0), "{level:?}");
    }
}

#[test]
fn rows_come_out_as_they_went_in() {
    let mut random = Random(8);
    for format in Format::ALL {
        for &k in widths(format) {
            let w = Weight::random(&mut random, format, 21, k);
            let mut row = vec![0.0; k];
            for n in 0..21 {
                w.packed().row(n, &mut row);
                assert_eq!(bits(&row), bits(&w.values[n * k..][..k]), "{format:?} [{n}, {k}]");
            }
            // Coded while it is packed.
            let x = random.vec(21 * k, 0.5);
            let (ty, mut coded) =
                (format.element_type(), vec![0; format.element_type().row_bytes(k).unwrap() * 21]);
            quantize(ty, &x, &mut coded);
            let (mut a, mut b) = (vec![0; format.bytes(21, k)], vec![1; format.bytes(21, k)]);
            pack(format, Matrix::plain(&x, 21, k), &mut a);
            pack(format, Matrix::coded(ty, &coded, 21, k, ty.row_bytes(k).unwrap()), &mut b);
            let (a, b) = (Packed::new(format, 21, k, &a), Packed::new(format, 21, k, &b));
            let mut other = vec![0.0; k];
            for n in 0..21 {
                a.row(n, &mut row);
                b.row(n, &mut other);
                assert_eq!(bits(&row), bits(&other), "{format:?} [{n}, {k}]");
            }
        }
    }
}

/// An expert's weights, biases of all, and the layer's output by plain loops in f64.
struct Layer {
    shape: Shape,
    experts: Vec<[Weight; 3]>,
    up_bias: Vec<f32>,
    down_bias: Vec<f32>,
}

impl Layer {
    fn random(random: &mut Random, up: Format, down: Format, shape: Shape, count: usize) -> Self {
        let (h, i) = (shape.hidden, shape.intermediate);
        let experts = (0..count)
            .map(|_| {
                [
                    Weight::random(random, up, i, h),
                    Weight::random(random, up, i, h),
                    Weight::random(random, down, h, i),
                ]
            })
            .collect();
        Self {
            shape,
            experts,
            up_bias: random.vec(count * shape.pre(), 0.5),
            down_bias: random.vec(count * h, 0.5),
        }
    }

    fn run(&self, level: Level, d: &Dispatch, x: &[f32], biases: bool, weights: Option<&[f32]>) -> Vec<f32> {
        let experts: Vec<Expert> = self
            .experts
            .iter()
            .map(|[gate, up, down]| Expert {
                gate: self.shape.gated.then(|| gate.packed()),
                up: up.packed(),
                down: down.packed(),
            })
            .collect();
        let biases = match biases {
            true => MlpBiases { up: Some(&self.up_bias), down: Some(&self.down_bias) },
            false => MlpBiases::default(),
        };
        let mut y = vec![f32::NAN; x.len()];
        mlp(level, d, self.shape, x, &experts, biases, weights, &mut y);
        y
    }

    fn reference(
        &self,
        picks: &[u32],
        slots: usize,
        x: &[f32],
        biases: bool,
        weights: Option<&[f32]>,
    ) -> Vec<f64> {
        let s = self.shape;
        let (h, i, bias) = (s.hidden, s.intermediate, f64::from(u8::from(biases)));
        let product = |w: &Weight, x: &[f64]| -> Vec<f64> {
            w.values
                .chunks_exact(w.k)
                .map(|w| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum())
                .collect()
        };
        let mut y = vec![0.0; x.len()];
        for (slot, pick) in picks.iter().enumerate().filter(|(_, pick)| **pick != EMPTY) {
            let (token, e) = (slot / slots, *pick as usize);
            let x: Vec<f64> = x[token * h..][..h].iter().map(|x| f64::from(*x)).collect();
            let [gate, up, down] = &self.experts[e];
            let of = |at: usize| bias * f64::from(self.up_bias[e * s.pre() + at]);
            let (gate, up) = (product(gate, &x), product(up, &x));
            let inner: Vec<f64> = (0..i)
                .map(|j| match s.gated {
                    true => {
                        let up = activation::up_reference(s.activation, up[j] + of(i + j));
                        activation::reference(s.activation, gate[j] + of(j)) * up
                    }
                    false => activation::reference(s.activation, up[j] + of(j)),
                })
                .collect();
            let weight = weights.map_or(1.0, |weights| f64::from(weights[slot]));
            for (j, out) in product(down, &inner).iter().enumerate() {
                y[token * h + j] += weight * (out + bias * f64::from(self.down_bias[e * h + j]));
            }
        }
        y
    }
}

#[test]
fn a_layer_is_that_of_the_decoded_experts() {
    let mut random = Random(6);
    let cases = [
        (Format::F32, Format::F32, 20, 24, true, Activation::Silu),
        (Format::F32, Format::F32, 33, 17, false, Activation::Relu2),
        (Format::F32, Format::F32, 20, 40, false, Activation::Silu),
        (Format::Bf16, Format::Bf16, 48, 40, true, GPT_OSS),
        (Format::Q8_0, Format::Q4_0, 64, 96, true, Activation::Gelu),
        (Format::Q4K, Format::Q6K, 256, 256, true, Activation::Silu),
        (Format::Mxfp4, Format::Mxfp4, 32, 64, false, Activation::Silu),
        // Rows of the inner width would be a multiple of 4 KiB apart.
        (Format::Q8_0, Format::Q6K, 32, 1024, true, Activation::Silu),
        // A task has several runs of the outer width, the last panel is not whole.
        (Format::Bf16, Format::Bf16, 1047, 36, true, Activation::Silu),
    ];
    for (up, down, hidden, intermediate, gated, activation) in cases {
        let shape = Shape { hidden, intermediate, activation, gated };
        let layer = Layer::random(&mut random, up, down, shape, 5);
        for tokens in [1, 2, 40, 600] {
            // Expert 2 gets none, some slots are empty, with many tokens one expert has more rows than a task takes.
            let picks: Vec<u32> = (0..tokens * 2)
                .map(|_| match random.below(8) {
                    0..4 => 0,
                    4 => 1,
                    5 => 3,
                    6 => 4,
                    _ => EMPTY,
                })
                .collect();
            let d = Dispatch::new(&picks, 2, 5).unwrap();
            let (x, g) = (random.vec(tokens * hidden, 1.0), random.vec(tokens * 2, 1.0));
            let biases = tokens != 2;
            let want = layer.reference(&picks, 2, &x, biases, Some(&g));
            let size = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            let bound = if up == Format::F32 { 1e-5 } else { 0.05 };
            for level in Level::available() {
                let got = layer.run(level, &d, &x, biases, Some(&g));
                for (got, want) in got.iter().zip(&want) {
                    let off = (f64::from(*got) - want).abs();
                    assert!(off <= bound * size, "{up:?} {level:?} {tokens} tokens: {got}, not {want}");
                }
                if tokens == 600 {
                    assert_same_on_any_threads(|| layer.run(level, &d, &x, biases, Some(&g)));
                    // A token alone.
                    let alone = Dispatch::new(&picks[8..10], 2, 5).unwrap();
                    let row = layer.run(level, &alone, &x[4 * hidden..][..hidden], biases, Some(&g[8..10]));
                    assert_eq!(bits(&row), bits(&got[4 * hidden..][..hidden]), "{up:?} {level:?}");
                }
            }
        }
        // A dense MLP: every token, one expert, no weights.
        let one = Layer::random(&mut random, up, down, shape, 1);
        let x = random.vec(300 * hidden, 1.0);
        let want = one.reference(&vec![0; 300], 1, &x, true, None);
        let size = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let bound = if up == Format::F32 { 1e-5 } else { 0.05 };
        for level in Level::available() {
            let got = one.run(level, &Dispatch::whole(300), &x, true, None);
            let off = got.iter().zip(&want).fold(0.0f64, |m, (a, b)| m.max((f64::from(*a) - b).abs()));
            assert!(off <= bound * size, "{up:?} {level:?}: {off} of {size}");
        }
    }
}

#[test]
fn runs_of_gate_and_up_may_be_odd() {
    let mut random = Random(12);
    // On one thread a task has six panels of each: a run of four and one of two, and at the end one of three, of which the last is
    // not whole.
    let shape = Shape { hidden: 32, intermediate: 16 * 51 - 3, activation: Activation::Silu, gated: true };
    let layer = Layer::random(&mut random, Format::Bf16, Format::Bf16, shape, 1);
    let x = random.vec(40 * 32, 1.0);
    let want = layer.reference(&[0; 40], 1, &x, true, None);
    let size = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for level in Level::available() {
        let got = pool.install(|| layer.run(level, &Dispatch::whole(40), &x, true, None));
        let off = got.iter().zip(&want).fold(0.0f64, |m, (a, b)| m.max((f64::from(*a) - b).abs()));
        assert!(off <= 0.01 * size, "{level:?}: {off} of {size}");
    }
}

#[test]
fn no_tokens_and_no_rows() {
    let mut random = Random(7);
    let shape = Shape { hidden: 32, intermediate: 32, activation: Activation::Silu, gated: true };
    let layer = Layer::random(&mut random, Format::Q8_0, Format::Q8_0, shape, 2);
    let none = Dispatch::new(&[EMPTY, EMPTY], 1, 2).unwrap();
    let y = layer.run(Level::current(), &none, &[1.0; 64], false, Some(&[1.0, 1.0]));
    assert_eq!(y, [0.0; 64]);
    let y = layer.run(Level::current(), &Dispatch::new(&[], 1, 2).unwrap(), &[], false, Some(&[]));
    assert!(y.is_empty());
    linear(Level::current(), Linear { x: &[], weights: &[], y: &mut [], accumulate: false });
    for format in Format::ALL {
        let w = Weight::random(&mut random, format, 5, 256);
        linear(Level::current(), Linear { x: &[], weights: &[w.packed()], y: &mut [], accumulate: false });
    }
}

#[test]
fn rows_are_cut_into_even_tasks_that_fit_the_caches() {
    let mut random = Random(11);
    for format in [Format::F32, Format::Bf16, Format::Q8_0, Format::Q6K] {
        for k in [256, 2048, 8192] {
            let w = Weight::random(&mut random, format, 1, k);
            for level in Level::available() {
                for rows in [0..0, 3..4, 5..133, 0..257, 7..1031] {
                    let pieces: Vec<_> = product::rows_of_tasks(level, w.packed(), rows.clone()).collect();
                    let all: Vec<usize> = pieces.iter().cloned().flatten().collect();
                    assert_eq!(all, rows.clone().collect::<Vec<_>>(), "{format:?}, k {k}, {rows:?}");
                    let sizes = || pieces.iter().map(|piece| piece.len());
                    let (least, most) = (sizes().min().unwrap_or(0), sizes().max().unwrap_or(0));
                    assert!(most <= if format.is_coded() { 128 } else { 256 }, "{most} rows in {format:?}");
                    assert!(pieces.len() <= rows.len().div_ceil(64), "{} tasks for {rows:?}", pieces.len());
                    // A few too few in the last.
                    assert!(most - least < pieces.len().max(1), "{least} to {most} rows of {rows:?}");
                    let bytes = activations::row_bytes(level, format, k) * most;
                    assert!(
                        most <= 64 || format.is_coded() || bytes <= 1 << 20,
                        "{bytes} bytes of {format:?}, k {k}"
                    );
                }
            }
        }
    }
}
