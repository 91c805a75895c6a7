//! The expert MLPs against a token-by-token loop in f64, their gradients against its finite differences.

use super::*;
use crate::gemm::Precision;
use proptest::prelude::*;

/// y \[T, H\] of a layer, one token and slot after another.
fn plain_layer(
    d: &Dispatch,
    experts: &[u32],
    s: Shape,
    x: &[f64],
    wu: &[f64],
    wd: &[f64],
    g: &[f64],
    biases: Option<(&[f64], &[f64])>,
) -> Vec<f64> {
    let (h, i, p) = (s.hidden, s.intermediate, s.pre());
    let mut y = vec![0.0; d.tokens * h];
    for t in 0..d.tokens {
        for k in 0..d.slots {
            let e = experts[t * d.slots + k];
            if e == EMPTY {
                continue;
            }
            let dot = |row: usize| -> f64 {
                let bias = biases.map_or(0.0, |(up, _)| up[e as usize * p + row]);
                bias + (0..h).map(|c| x[t * h + c] * wu[(e as usize * p + row) * h + c]).sum::<f64>()
            };
            let a: Vec<f64> = (0..i)
                .map(|j| {
                    let act = activation::reference(s.activation, dot(j));
                    if s.gated { act * activation::up_reference(s.activation, dot(i + j)) } else { act }
                })
                .collect();
            for c in 0..h {
                let bias = biases.map_or(0.0, |(_, down)| down[e as usize * h + c]);
                let out: f64 = bias + (0..i).map(|j| a[j] * wd[(e as usize * h + c) * i + j]).sum::<f64>();
                y[t * h + c] += g[t * d.slots + k] * out;
            }
        }
    }
    y
}

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    (0..n as u64)
        .map(|i| {
            let z = (i ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
        })
        .collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| *x as f64).collect()
}

struct Case {
    d: Dispatch,
    experts: Vec<u32>,
    s: Shape,
    x: Vec<f32>,
    wu: Vec<f32>,
    wd: Vec<f32>,
    g: Vec<f32>,
    dy: Vec<f32>,
}

fn case(
    tokens: usize,
    slots: usize,
    count: usize,
    h: usize,
    i: usize,
    kind: Activation,
    gated: bool,
    seed: u64,
) -> Case {
    let s = Shape { hidden: h, intermediate: i, activation: kind, gated };
    // Expert 0 gets nothing, and some slots are empty.
    let experts: Vec<u32> = numbers(tokens * slots, seed)
        .iter()
        .map(|r| ((r + 1.0) * 0.5 * count as f32) as u32)
        .map(|e| if e == 0 || e as usize >= count { EMPTY } else { e })
        .collect();
    Case {
        d: Dispatch::new(&experts, slots, count).unwrap(),
        experts,
        s,
        x: numbers(tokens * h, seed ^ 1),
        wu: numbers(count * s.pre() * h, seed ^ 2),
        wd: numbers(count * h * i, seed ^ 3),
        g: numbers(tokens * slots, seed ^ 4),
        dy: numbers(tokens * h, seed ^ 5),
    }
}

struct Gradients {
    y: Vec<f32>,
    dx: Vec<f32>,
    dwu: Vec<f32>,
    dwd: Vec<f32>,
    dg: Vec<f32>,
}

fn run(arithmetic: impl Into<Arithmetic>, c: &Case) -> Gradients {
    let level = arithmetic.into();
    let (n, i, p) = (c.d.rows(), c.s.intermediate, c.s.pre());
    let (mut pre, mut a, mut y) = (vec![f32::NAN; n * p], vec![f32::NAN; n * i], vec![f32::NAN; c.dy.len()]);
    up(level, &c.d, c.s, &c.x, &Matrix::each(&c.wu, c.s.pre(), c.s.hidden), None, &mut pre, &mut a);
    down(level, &c.d, c.s, &a, &Matrix::each(&c.wd, c.s.hidden, c.s.intermediate), None, Some(&c.g), &mut y);
    let (mut da, mut dx) = (vec![f32::NAN; n * i], vec![f32::NAN; c.x.len()]);
    let (mut dwu, mut dwd, mut dg) =
        (vec![0.0; c.wu.len()], vec![0.0; c.wd.len()], vec![f32::NAN; c.g.len()]);
    down_backward(level, &c.d, c.s, &a, &c.wd, Some(&c.g), &c.dy, &mut da, Some(&mut dg), Some(&mut dwd));
    up_backward(level, &c.d, c.s, &c.x, &c.wu, &mut pre, &da, &mut dx, Some(&mut dwu));
    Gradients { y, dx, dwu, dwd, dg }
}

const KINDS: [Activation; 6] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::Relu,
    Activation::Relu2,
    Activation::GeluTanh,
    activation::GPT_OSS,
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn forward_agrees_with_the_loop_at_every_level(
        tokens in 0usize..40, slots in 1usize..4, count in 1usize..7, h in 1usize..40, i in 1usize..40,
        kind in 0usize..6, gated: bool, seed: u64,
    ) {
        let c = case(tokens, slots, count, h, i, KINDS[kind], gated, seed);
        let (bu, bd) = (numbers(count * c.s.pre(), seed ^ 6), numbers(count * h, seed ^ 7));
        let (wbu, wbd) = (wide(&bu), wide(&bd));
        let (x, wu, wd, g) = (wide(&c.x), wide(&c.wu), wide(&c.wd), wide(&c.g));
        for biased in [false, true] {
            let biases = biased.then_some((&wbu[..], &wbd[..]));
            let want = plain_layer(&c.d, &c.experts, c.s, &x, &wu, &wd, &g, biases);
            let scale = want.iter().fold(1.0f64, |m, v| m.max(v.abs()));
            for level in Level::available() {
                let (n, p) = (c.d.rows(), c.s.pre());
                let (mut pre, mut a, mut y) = (vec![f32::NAN; n * p], vec![f32::NAN; n * i], vec![f32::NAN; tokens * h]);
                up(level, &c.d, c.s, &c.x, &Matrix::each(&c.wu, p, h), biased.then_some(&bu[..]), &mut pre, &mut a);
                down(level, &c.d, c.s, &a, &Matrix::each(&c.wd, h, i), biased.then_some(&bd[..]), Some(&c.g), &mut y);
                for (got, want) in y.iter().zip(&want) {
                    prop_assert!((*got as f64 - want).abs() <= 2e-5 * scale, "{level:?}: {got}, not {want}");
                }
            }
        }
    }

    #[test]
    fn gradients_agree_with_finite_differences(
        tokens in 1usize..6, slots in 1usize..3, count in 2usize..4, h in 1usize..6, i in 1usize..6,
        smooth in 0usize..2, gated: bool, seed: u64,
    ) {
        // The two smooth kinds; ReLU's slopes are held to theirs in `activation`.
        let c = case(tokens, slots, count, h, i, KINDS[smooth], gated, seed);
        let (x, wu, wd, g) = (wide(&c.x), wide(&c.wu), wide(&c.wd), wide(&c.g));
        let loss = |x: &[f64], wu: &[f64], wd: &[f64], g: &[f64]| -> f64 {
            let y = plain_layer(&c.d, &c.experts, c.s, x, wu, wd, g, None);
            y.iter().zip(&c.dy).map(|(y, d)| y * *d as f64).sum()
        };
        let slope = |v: &[f64], at: usize, f: &dyn Fn(&[f64]) -> f64| {
            let (mut low, mut high) = (v.to_vec(), v.to_vec());
            low[at] -= 1e-5;
            high[at] += 1e-5;
            (f(&high) - f(&low)) / 2e-5
        };
        for level in Level::available() {
            let got = run(level, &c);
            let near = |got: f32, want: f64| (got as f64 - want).abs() <= 1e-3 + 1e-4 * want.abs();
            for at in 0..x.len() {
                prop_assert!(near(got.dx[at], slope(&x, at, &|v| loss(v, &wu, &wd, &g))), "dx[{at}]");
            }
            for at in 0..wu.len() {
                prop_assert!(near(got.dwu[at], slope(&wu, at, &|v| loss(&x, v, &wd, &g))), "dwu[{at}]");
            }
            for at in 0..wd.len() {
                prop_assert!(near(got.dwd[at], slope(&wd, at, &|v| loss(&x, &wu, v, &g))), "dwd[{at}]");
            }
            for at in 0..g.len() {
                prop_assert!(near(got.dg[at], slope(&g, at, &|v| loss(&x, &wu, &wd, v))), "dg[{at}]");
            }
        }
    }
}

#[test]
fn in_bf16_forward_and_gradients_stay_close_to_f32() {
    // Rounding to 8 bits of mantissa, of both sides: errors of up to 2^-8 in each term, which mostly cancel out.
    let c = case(60, 2, 5, 48, 40, Activation::Silu, true, 3);
    for level in Level::available() {
        let exact = run(level, &c);
        let bf16 = run(Arithmetic { level, precision: Precision::Bf16 }, &c);
        let parts = |g: Gradients| [g.y, g.dx, g.dwu, g.dwd, g.dg];
        for (exact, bf16) in parts(exact).iter().zip(&parts(bf16)) {
            let difference: f64 = exact.iter().zip(bf16).map(|(x, y)| f64::from(x - y).powi(2)).sum();
            let size: f64 = exact.iter().map(|x| f64::from(*x).powi(2)).sum();
            let relative = (difference / size).sqrt();
            assert!((1e-5..1e-2).contains(&relative), "{level:?}: {relative}");
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let c = case(211, 2, 5, 70, 50, Activation::Silu, true, 7);
    let runs: Vec<Gradients> = [1, 2, 3]
        .map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run(Level::current(), &c))
        })
        .into();
    for other in &runs[1..] {
        assert_eq!(runs[0].y, other.y);
        assert_eq!(runs[0].dx, other.dx);
        assert_eq!(runs[0].dwu, other.dwu);
        assert_eq!(runs[0].dwd, other.dwd);
        assert_eq!(runs[0].dg, other.dg);
    }
}

#[test]
fn a_dense_mlp_is_one_expert_for_all() {
    let (tokens, h, i) = (33, 20, 24);
    let s = Shape { hidden: h, intermediate: i, activation: Activation::Silu, gated: true };
    let (x, wu, wd) = (numbers(tokens * h, 1), numbers(2 * i * h, 2), numbers(h * i, 3));
    let dy = numbers(tokens * h, 4);
    let ones = vec![1.0; tokens];
    let results: Vec<_> = [Dispatch::whole(tokens), Dispatch::new(&vec![0; tokens], 1, 1).unwrap()]
        .iter()
        .map(|d| {
            let weights = (!d.is_identity()).then_some(&ones[..]);
            let (mut pre, mut a, mut y) =
                (vec![0.0; tokens * 2 * i], vec![0.0; tokens * i], vec![0.0; tokens * h]);
            let level = Level::current();
            up(level, d, s, &x, &Matrix::each(&wu, 2 * i, h), None, &mut pre, &mut a);
            down(level, d, s, &a, &Matrix::each(&wd, h, i), None, weights, &mut y);
            let (mut da, mut dx) = (vec![0.0; tokens * i], vec![0.0; tokens * h]);
            let (mut dwu, mut dwd) = (vec![0.0; wu.len()], vec![0.0; wd.len()]);
            down_backward(level, d, s, &a, &wd, weights, &dy, &mut da, None, Some(&mut dwd));
            up_backward(level, d, s, &x, &wu, &mut pre, &da, &mut dx, Some(&mut dwu));
            (y, dx, dwu, dwd)
        })
        .collect();
    assert_eq!(results[0], results[1]);
}
