//! What a layer does with each kind of router and of expert: values against plain compositions, gradients against finite differences, the same
//! bits from any number of threads and however a step is cut.

#![allow(clippy::unwrap_used)]

use candle_core::{Device, Tensor, Var};
use senmon_kernels::dispatch::EMPTY;
use senmon_moe::config::{DenseGradient, Extras, Noise, RandomEval};
use senmon_moe::layer::{MoeParams, Routing, Wants, extra_defs};
use senmon_moe::rng::Stream;
use senmon_moe::router::{self, KINDS};
use senmon_moe::{
    BalanceConfig, Ctx, MoeConfig, MoeLayer, Param, RouterConfig, RoutingObserver, SelectionBias, balance,
};

const H: usize = 6;

fn numbers(n: usize, seed: u64, size: f32) -> Vec<f32> {
    let stream = Stream::new(&[seed]);
    (0..n as u64).map(|i| (2.0 * stream.uniform(i) - 1.0) * size).collect()
}

fn tensor(dims: &[usize], seed: u64, size: f32) -> Tensor {
    Tensor::from_vec(numbers(dims.iter().product(), seed, size), dims, &Device::Cpu).unwrap()
}

fn config(kind: &str) -> MoeConfig {
    let (experts, top_k) = match kind {
        "depth" => (1, 1),
        "switch" | "base" => (4, 1),
        _ => (4, 2),
    };
    let groups = if kind == "hierarchical" { 2 } else { 1 };
    let slots = if kind == "soft" { 2 } else { 0 };
    let router = RouterConfig { kind: kind.into(), groups, slots, ..RouterConfig::default() };
    MoeConfig { router, ..MoeConfig::new(H, 5, experts, top_k) }
}

/// A layer with parameters by seed.
fn layer_of(c: &MoeConfig, wrap: &dyn Fn(&str, &Tensor) -> Param) -> MoeLayer {
    let (e, inner, i) = (c.experts, c.inner(), c.intermediate);
    let kind = router::kind(&c.router.kind).unwrap();
    let make = |name: &str, dims: &[usize], seed: u64| wrap(name, &tensor(dims, seed, 0.7));
    let columns = router::columns(&c.router, c.choices());
    let params = MoeParams {
        selection_bias: kind.selection_bias.then(|| SelectionBias::new(numbers(c.choices(), 6, 0.1))),
        table: kind
            .by_token_id
            .then(|| SelectionBias::new(router::balanced_table(&[5, 4, 3, 3, 2, 2, 1, 1, 0, 0], e, c.top_k))),
        extras: extra_defs(c)
            .iter()
            .enumerate()
            .map(|(n, def)| (def.name, make(def.name, &def.shape, 30 + n as u64)))
            .collect(),
        ..MoeParams::new(
            make("router", &[columns, H], 1),
            make("gate_up", &[e, 2 * i, inner], 2),
            make("down", &[e, inner, i], 3),
        )
    };
    MoeLayer::from_params(c.clone(), params).unwrap()
}

fn frozen(name: &str, t: &Tensor) -> Param {
    Param::new(name, t.clone())
}

fn trained(name: &str, t: &Tensor) -> Param {
    Param::trainable(name, t.flatten_all().unwrap().to_vec1().unwrap(), t.dims()).unwrap()
}

fn ids(tokens: usize) -> Vec<u32> {
    (0..tokens as u32).map(|t| t * 7 % 10).collect()
}

/// One pass in training.
fn pass<'a>(ids: &'a [u32], wants: Wants) -> Ctx<'a> {
    Ctx { train: true, seed: 3, step: 5, sequences: 2, token_ids: Some(ids), wants, ..Ctx::default() }
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// What is minimised: a weighted sum of the layer's output, and all of its losses.
fn total(layer: &MoeLayer, x: &Tensor, balance: &BalanceConfig, wants: Wants) -> (Tensor, Routing) {
    let tokens = ids(x.dim(0).unwrap());
    let (y, routing) = layer.forward(x, &mut pass(&tokens, wants)).unwrap();
    let mut sum = (y * tensor(x.dims(), 10, 1.0)).unwrap().sum_all().unwrap();
    let around = balance::Around { multiplier: 0.3, ..balance::Around::default() };
    for term in balance::losses_of(std::slice::from_ref(&routing), balance, around).unwrap() {
        sum = (sum + (term.value * term.coefficient).unwrap()).unwrap();
    }
    (sum, routing)
}

/// All losses, large enough to be seen.
fn balance(kind: &str) -> BalanceConfig {
    BalanceConfig {
        aux: 0.5,
        z: 0.1,
        sequence: 0.3,
        importance: 0.2,
        entropy: 0.2,
        load: if kind == "noisy_topk" { 0.4 } else { 0.0 },
        ..BalanceConfig::default()
    }
}

/// Compares the gradients of all parameters and of the input with differences of the loss, as long as the choice of experts stays.
fn check_gradients(case: &str, c: &MoeConfig, balance: &BalanceConfig, wants: Wants) {
    let x0 = tensor(&[12, H], 9, 1.0);
    let x = Var::from_tensor(&x0).unwrap();
    let layer = layer_of(c, &trained);
    let (sum, routing) = total(&layer, &x, balance, wants);
    let grads = sum.backward().unwrap();
    let p = layer.params();
    let mut params = vec![&p.router, &p.gate_up, &p.down];
    params.extend(p.extras.values());
    let loss = |x: &Tensor| -> Option<f64> {
        let (sum, now) = total(&layer, x, balance, wants);
        (now.experts == routing.experts).then(|| f64::from(sum.to_scalar::<f32>().unwrap()))
    };
    let step = 4e-3f32;
    let mut checked = 0;
    let mut compare = |name: &str, at: usize, got: f32, up: Option<f64>, down: Option<f64>| {
        let (Some(up), Some(down)) = (up, down) else { return };
        let want = (up - down) / f64::from(2.0 * step);
        let off = (f64::from(got) - want).abs();
        assert!(off < 2e-2 * want.abs().max(1.0), "{case}: d {name}[{at}] is {got}, differences say {want}");
        checked += 1;
    };
    for param in params {
        let gradient = param.sink().unwrap().lock().clone();
        // A few elements of each.
        for at in (0..gradient.len()).step_by(gradient.len().div_ceil(7)) {
            let moved = |by: f32| {
                param.update(|values| values[at] += by).unwrap();
                let found = loss(&x0);
                param.update(|values| values[at] -= by).unwrap();
                found
            };
            compare(param.name(), at, gradient[at], moved(step), moved(-step));
        }
    }
    let dx = grads.get(&x).map_or_else(|| vec![0.0; x0.elem_count()], values);
    for at in (0..x0.elem_count()).step_by(9) {
        let moved = |by: f32| {
            let mut values = values(&x0);
            values[at] += by;
            loss(&Tensor::from_vec(values, x0.dims(), &Device::Cpu).unwrap())
        };
        compare("x", at, dx[at], moved(step), moved(-step));
    }
    assert!(checked >= 12, "{case}: only {checked} elements stayed with their experts");
}

#[test]
fn gradients_of_every_kind_are_those_of_its_losses() {
    // Draws of sparsemixer have an estimate for a gradient, not a derivative: it has a golden file.
    for kind in KINDS.iter().filter(|kind| kind.name != "sparsemixer") {
        let mut c = config(kind.name);
        c.router.predictor = false;
        check_gradients(kind.name, &c, &balance(kind.name), Wants::default());
    }
}

#[test]
fn gradients_of_what_is_beyond_plain_experts() {
    let with = |change: &dyn Fn(&mut MoeConfig)| {
        let mut c = config("topk_pre");
        change(&mut c);
        c
    };
    let cases = [
        ("identity and zero", with(&|c| c.extras = Extras { zero: 1, identity: 1, ..Extras::default() })),
        ("constant", with(&|c| c.extras = Extras { constant: 2, ..Extras::default() })),
        ("residual", with(&|c| c.extras.residual = true)),
        ("latent", with(&|c| c.extras = Extras { latent: 4, ..Extras::default() })),
        ("latent norm", with(&|c| c.extras = Extras { latent: 4, latent_norm: true, ..Extras::default() })),
        (
            "latent, all special",
            with(&|c| {
                c.extras = Extras {
                    latent: 4,
                    zero: 1,
                    identity: 1,
                    constant: 1,
                    residual: true,
                    ..Extras::default()
                };
            }),
        ),
        ("dropout", with(&|c| c.router.expert_dropout = 0.4)),
        ("capacity", with(&|c| c.router.capacity = 0.7)),
    ];
    for (case, c) in cases {
        check_gradients(case, &c, &balance("topk_pre"), Wants::default());
    }
    let distill = BalanceConfig { distill: 0.7, ..balance("topk_pre") };
    let wants = Wants { distance: true, ..Wants::default() };
    for kind in ["topk_pre", "sigmoid_input"] {
        check_gradients(&format!("distill {kind}"), &config(kind), &distill, wants);
    }
}

/// The sum with the residual stream, within the experts' op or after what follows them, has the bits of one made outside, and so have all gradients.
#[test]
fn added_to_the_residual_stream_is_the_sum() {
    let mut cases: Vec<(String, MoeConfig, Wants)> =
        KINDS.iter().map(|kind| (kind.name.to_owned(), config(kind.name), Wants::default())).collect();
    let with = |extras: Extras| MoeConfig { extras, ..config("topk_pre") };
    let plain = Extras::default();
    for extras in [
        Extras { zero: 1, ..plain },
        Extras { identity: 1, ..plain },
        Extras { constant: 1, ..plain },
        Extras { residual: true, ..plain },
        Extras { latent: 4, ..plain },
    ] {
        cases.push((format!("{extras:?}"), with(extras), Wants::default()));
    }
    let mut dropout = config("topk_pre");
    dropout.router.expert_dropout = 0.3;
    cases.push(("dropout".into(), dropout, Wants::default()));
    for dense_gradient in [DenseGradient::StraightThrough, DenseGradient::Ema] {
        cases.push((
            format!("{dense_gradient:?}"),
            config("topk_pre"),
            Wants { dense_gradient, ..Wants::default() },
        ));
    }
    cases.push(("distance".into(), config("topk_pre"), Wants { distance: true, ..Wants::default() }));
    // So many that the memory of gradients is used again.
    cases.push(("many tokens".into(), config("topk_pre"), Wants::default()));
    for (case, c, wants) in cases {
        let count = if case == "many tokens" { 6_000 } else { 12 };
        let (tokens, upstream) = (ids(count), tensor(&[count, H], 10, 1.0));
        let run = |within: bool| {
            let x = Var::from_tensor(&tensor(&[count, H], 9, 1.0)).unwrap();
            let stream = Var::from_tensor(&tensor(&[count, H], 8, 1.0)).unwrap();
            let layer = layer_of(&c, &trained);
            let mut ctx = pass(&tokens, wants);
            let y = match within {
                true => layer.forward_onto(&x, Some(&stream), &mut ctx).unwrap().0,
                false => (stream.as_tensor() + layer.forward(&x, &mut ctx).unwrap().0).unwrap(),
            };
            let grads = (&y * &upstream).unwrap().sum_all().unwrap().backward().unwrap();
            let mut all = vec![values(&y)];
            all.extend([&x, &stream].map(|x| values(grads.get(x).unwrap())));
            let p = layer.params();
            all.extend([&p.router, &p.gate_up, &p.down].map(|p| p.sink().unwrap().lock().clone()));
            all.extend(p.extras.values().map(|p| p.sink().unwrap().lock().clone()));
            all
        };
        let (within, outside) = (run(true), run(false));
        assert!(within.iter().flatten().all(|x| x.is_finite()), "{case}");
        assert_eq!(within, outside, "{case}");
    }
}

#[test]
fn a_dense_gradient_is_the_routers_alone_and_that_of_all_experts() {
    let x = tensor(&[12, H], 9, 1.0);
    let plain = BalanceConfig { aux: 0.0, z: 0.0, ..BalanceConfig::default() };
    let c = MoeConfig {
        router: RouterConfig { normalize: false, ..config("topk_pre").router },
        ..config("topk_pre")
    };
    let run = |c: &MoeConfig, gradient: DenseGradient| {
        let layer = layer_of(c, &trained);
        let (sum, _) = total(&layer, &x, &plain, Wants { dense_gradient: gradient, ..Wants::default() });
        sum.backward().unwrap();
        let p = layer.params();
        let of = |p: &Param| p.sink().unwrap().lock().clone();
        (f64::from(sum.to_scalar::<f32>().unwrap()), of(&p.router), of(&p.gate_up))
    };
    let (sparse, through) = (run(&c, DenseGradient::None), run(&c, DenseGradient::StraightThrough));
    let all = run(&MoeConfig { top_k: 4, ..c.clone() }, DenseGradient::None);
    let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5 + 1e-4 * b.abs());
    // Values and the experts' gradients stay; the router's is that of a layer which uses all experts.
    assert!((sparse.0 - through.0).abs() < 1e-5 && near(&sparse.2, &through.2));
    assert!(near(&through.1, &all.1) && !near(&sparse.1, &all.1));

    // Means stand for what was not computed: with the true outputs of one token in their place, they give the same.
    let one = x.narrow(0, 0, 1).unwrap();
    let layer = layer_of(&c, &trained);
    let outputs = layer_of(
        &MoeConfig {
            top_k: 4,
            router: RouterConfig { kind: "dense".into(), ..c.router.clone() },
            ..c.clone()
        },
        &frozen,
    );
    let mut means = Vec::new();
    for e in 0..4u32 {
        // All weight on one expert.
        let forced = [e];
        let single = MoeConfig {
            top_k: 1,
            router: RouterConfig { kind: "topk_post".into(), ..c.router.clone() },
            ..c.clone()
        };
        let single = MoeLayer::from_params(single, outputs.params().clone()).unwrap();
        let (y, _) = single.forward(&one, &mut Ctx { forced: Some(&forced), ..Ctx::default() }).unwrap();
        means.extend(values(&y));
    }
    layer.running().restore(means);
    let gradient = |dense_gradient: DenseGradient, layer: &MoeLayer| {
        let (sum, _) = total(layer, &one, &plain, Wants { dense_gradient, ..Wants::default() });
        sum.backward().unwrap();
        let found = layer.params().router.sink().unwrap().lock().clone();
        layer.params().router.sink().unwrap().lock().fill(0.0);
        found
    };
    let (ema, through) =
        (gradient(DenseGradient::Ema, &layer), gradient(DenseGradient::StraightThrough, &layer));
    assert!(near(&ema, &through), "{ema:?} {through:?}");
    // And the step takes in what the picked experts gave: half of the way from twice the outputs to them.
    let truth = layer.running().values().unwrap();
    layer.running().restore(truth.iter().map(|x| 2.0 * x).collect());
    gradient(DenseGradient::Ema, &layer);
    layer.running().step(0.5);
    let moved = layer.running().values().unwrap();
    let factors: Vec<f32> = moved.iter().zip(&truth).map(|(a, b)| a / b).collect();
    assert!(factors.iter().all(|f| (f - 2.0).abs() < 1e-3 || (f - 1.5).abs() < 1e-3), "{factors:?}");
    assert_eq!(factors.iter().filter(|f| **f < 1.75).count(), 2 * H);
}

#[test]
fn special_experts_give_what_they_say() {
    let mut c = config("topk_pre");
    c.extras = Extras { zero: 1, identity: 1, constant: 1, ..Extras::default() };
    let layer = layer_of(&c, &frozen);
    let x = tensor(&[1, H], 9, 1.0);
    let forced = |a: u32, b: u32| {
        let picks = [a, b];
        let (y, routing) = layer.forward(&x, &mut Ctx { forced: Some(&picks), ..Ctx::default() }).unwrap();
        (values(&y), values(&routing.weights), routing.load)
    };
    let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
    let (y, _, load) = forced(4, EMPTY);
    assert!(y.iter().all(|y| *y == 0.0));
    assert_eq!(load, [0, 0, 0, 0, 1, 0, 0]);
    let (y, weights, _) = forced(5, 4);
    let scaled: Vec<f32> = values(&x).iter().map(|x| x * weights[0]).collect();
    assert!(near(&y, &scaled));
    // α₁x + α₂v.
    let (y, weights, _) = forced(6, EMPTY);
    let mix = values(layer.params().extras["constant.mix"].tensor());
    let v = values(layer.params().extras["constant.values"].tensor());
    let x = values(&x);
    let dot = |row: &[f32]| row.iter().zip(&x).map(|(a, b)| a * b).sum::<f32>();
    let (a, b) = (dot(&mix[..H]).exp(), dot(&mix[H..]).exp());
    let want: Vec<f32> =
        x.iter().zip(&v).map(|(x, v)| weights[0] * (a / (a + b) * x + b / (a + b) * v)).collect();
    assert!(near(&y, &want), "{y:?} {want:?}");
}

#[test]
fn noise_is_of_training_and_has_its_deviation() {
    let x = tensor(&[400, H], 9, 1.0);
    for noise in [Noise::Learned, Noise::Fixed] {
        let mut c = config("noisy_topk");
        (c.router.noise, c.router.noise_std) = (noise, 0.5);
        let layer = layer_of(&c, &frozen);
        let quiet = layer.forward(&x, &mut Ctx::default()).unwrap().1;
        let noisy = layer.forward(&x, &mut pass(&ids(400), Wants::default())).unwrap().1;
        assert!(quiet.smooth_load.is_none() && noisy.smooth_load.is_some());
        assert_ne!(quiet.experts, noisy.experts);
        // The smooth load is near what is picked in the mean.
        let smooth: f32 = values(noisy.smooth_load.as_ref().unwrap()).iter().sum();
        assert!((smooth / 800.0 - 1.0).abs() < 0.1, "{smooth}");
    }
}

#[test]
fn second_experts_come_by_chance_as_often_as_their_gate_says() {
    let layer = layer_of(&config("gshard"), &frozen);
    let x = tensor(&[3000, H], 9, 0.6);
    let routing = layer.forward(&x, &mut pass(&ids(3000), Wants::default())).unwrap().1;
    let quiet = layer.forward(&x, &mut Ctx::default()).unwrap().1;
    let expected: f64 = values(&quiet.weights).chunks_exact(2).map(|g| f64::from(2.0 * g[1]).min(1.0)).sum();
    let kept = routing.experts.iter().skip(1).step_by(2).filter(|e| **e != EMPTY).count() as f64;
    assert!((kept - expected).abs() < 4.0 * 3000f64.sqrt() / 2.0, "{kept} of {expected}");
    assert!(kept < 2990.0 && quiet.experts.iter().all(|e| *e != EMPTY));
}

#[test]
fn random_experts_are_even_different_and_the_mean_afterwards() {
    let mut c = config("random");
    let x = tensor(&[2000, H], 9, 1.0);
    let routing = layer_of(&c, &frozen).forward(&x, &mut pass(&ids(2000), Wants::default())).unwrap().1;
    assert!(routing.load.iter().all(|n| (900..1100).contains(n)), "{:?}", routing.load);
    assert!(routing.experts.chunks_exact(2).all(|pair| pair[0] != pair[1]));
    let mean = layer_of(&c, &frozen).forward(&x, &mut Ctx::default()).unwrap().1;
    assert_eq!((mean.top_k, mean.load), (4, vec![2000; 4]));
    c.router.random_eval = RandomEval::Random;
    let tokens = ids(2000);
    let drawn =
        layer_of(&c, &frozen).forward(&x, &mut Ctx { token_ids: Some(&tokens), ..Ctx::default() }).unwrap().1;
    // The same id, the same experts.
    assert_eq!(drawn.experts[..20], drawn.experts[20..40]);
    assert!(layer_of(&c, &frozen).forward(&x, &mut Ctx::default()).is_err());
}

#[test]
fn depth_takes_its_share_of_each_sequence_and_learns_to_tell() {
    let mut c = config("depth");
    (c.router.capacity, c.router.predictor) = (0.25, true);
    let layer = layer_of(&c, &frozen);
    let x = tensor(&[40, H], 9, 1.0);
    let (y, routing) = layer.forward(&x, &mut pass(&ids(40), Wants::default())).unwrap();
    // Two sequences of 20 tokens, 5 of each.
    let taken = |half: &[u32]| half.iter().filter(|e| **e == 0).count();
    assert_eq!((taken(&routing.experts[..20]), taken(&routing.experts[20..])), (5, 5));
    let r = values(&routing.logits);
    let least = (0..20).filter(|t| routing.experts[*t] == 0).map(|t| r[t]).fold(f32::INFINITY, f32::min);
    assert!((0..20).all(|t| routing.experts[t] == 0 || r[t] <= least));
    for (t, row) in values(&y).chunks_exact(H).enumerate() {
        assert_eq!(row.iter().all(|y| *y == 0.0), routing.experts[t] == EMPTY);
    }
    // The loss of the predictor is its cross-entropy.
    let predictor = values(layer.params().extras["router_predictor"].tensor());
    let want: f64 = values(&x)
        .chunks_exact(H)
        .zip(&routing.experts)
        .map(|(x, e)| {
            let z: f32 = x.iter().zip(&predictor).map(|(a, b)| a * b).sum();
            let p = 1.0 / (1.0 + f64::from(-z).exp());
            if *e == 0 { -p.ln() } else { -(1.0 - p).ln() }
        })
        .sum::<f64>()
        / 40.0;
    let (name, got) = &routing.terms[0];
    assert!(*name == "predictor" && (f64::from(got.to_scalar::<f32>().unwrap()) - want).abs() < 1e-5);
    // Alone or among others a token fares the same when not training.
    let all = layer.forward(&x, &mut Ctx::default()).unwrap().1.experts;
    let one = layer.forward(&x.narrow(0, 3, 1).unwrap(), &mut Ctx::default()).unwrap().1.experts;
    assert_eq!(all[3], one[0]);
    assert!(all.contains(&0) && all.contains(&EMPTY));
}

#[test]
fn even_assignments_are_even_and_greedy_afterwards() {
    let x = tensor(&[40, H], 9, 1.0);
    let layer = layer_of(&config("base"), &frozen);
    let routing = layer.forward(&x, &mut pass(&ids(40), Wants::default())).unwrap().1;
    assert_eq!(routing.load, [10; 4]);
    let greedy = layer.forward(&x, &mut Ctx::default()).unwrap().1;
    assert_ne!(greedy.load, [10; 4]);
    let layer = layer_of(&config("expert_choice"), &frozen);
    let routing = layer.forward(&x, &mut Ctx::default()).unwrap().1;
    assert_eq!(routing.load, [20; 4]);
}

#[test]
fn bits_do_not_depend_on_threads_or_on_how_a_step_is_cut() {
    let x0 = tensor(&[24, H], 9, 1.0);
    let tokens = ids(24);
    for kind in KINDS {
        let mut c = config(kind.name);
        c.router.jitter = if kind.name == "soft" { 0.0 } else { 0.1 };
        c.router.expert_dropout = if kind.name == "soft" { 0.0 } else { 0.2 };
        let run = |threads: usize| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let layer = layer_of(&c, &trained);
                let x = Var::from_tensor(&x0).unwrap();
                let (sum, routing) = total(&layer, &x, &balance(kind.name), Wants::default());
                let dx = sum.backward().unwrap().get(&x).map(values);
                let of = |p: &Param| p.sink().unwrap().lock().clone();
                (
                    routing.experts,
                    values(&routing.weights),
                    dx,
                    of(&layer.params().router),
                    of(&layer.params().down),
                )
            })
        };
        let (one, two, three) = (run(1), run(2), run(3));
        assert!(one == two && one == three, "{}", kind.name);
        // Kinds that look at one token at a time: cut in two, with the numbers of each token.
        if ["base", "sinkhorn", "expert_choice", "soft", "depth", "relu"].contains(&kind.name) {
            continue;
        }
        let layer = layer_of(&c, &frozen);
        let whole = layer.forward(&x0, &mut pass(&tokens, Wants::default())).unwrap();
        let part = |from: usize| {
            let mut ctx =
                Ctx { first_token: from as u64, ..pass(&tokens[from..from + 12], Wants::default()) };
            layer.forward(&x0.narrow(0, from, 12).unwrap(), &mut ctx).unwrap()
        };
        let (first, second) = (part(0), part(12));
        assert_eq!(whole.1.experts, [first.1.experts, second.1.experts].concat(), "{}", kind.name);
        let rows = |t: &Tensor| values(t);
        assert_eq!(rows(&whole.0), [rows(&first.0), rows(&second.0)].concat(), "{}", kind.name);
    }
}

#[test]
fn a_pass_is_repeated_by_its_picks() {
    let x = tensor(&[24, H], 9, 1.0);
    let tokens = ids(24);
    let kinds = KINDS.iter().filter(|kind| !["soft", "dense"].contains(&kind.name));
    for (kind, after) in kinds.flat_map(|kind| [(kind, false), (kind, kind.name != "gshard")]) {
        let mut c = config(kind.name);
        c.router.capacity = 0.6;
        c.router.normalize_after_drop = after;
        c.router.drop = senmon_moe::config::Drop::Gate;
        let layer = layer_of(&c, &frozen);
        let (y, first) = layer.forward(&x, &mut pass(&tokens, Wants::default())).unwrap();
        let mut again = Ctx { forced: Some(&first.picked), ..pass(&tokens, Wants::default()) };
        let (y2, second) = layer.forward(&x, &mut again).unwrap();
        assert_eq!(first.experts, second.experts, "{}", kind.name);
        let near = values(&y).iter().zip(values(&y2)).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(near, "{}", kind.name);
    }
}

#[test]
fn gradients_stay_numbers_at_the_edges() {
    // Tokens of zeros, logits far from 0 on both sides, padding, experts that are full at once.
    let x0 = {
        let mut values = numbers(12 * H, 9, 1.0);
        values[..H].fill(0.0);
        values[5 * H..6 * H].fill(0.0);
        Tensor::from_vec(values, (12, H), &Device::Cpu).unwrap()
    };
    let mask: Vec<bool> = (0..12).map(|t| t != 5 && t != 7).collect();
    let tokens = ids(12);
    for kind in KINDS {
        for (size, capacity) in [(60.0, 0.0), (60.0, 0.4), (0.0, 0.0), (1e-3, 0.4)] {
            let mut c = config(kind.name);
            c.router.capacity = if kind.name == "dense" { 0.0 } else { capacity };
            c.router.normalize_after_drop = kind.name != "gshard";
            let layer = layer_of(&c, &trained);
            let p = layer.params();
            p.router.update(|values| values.iter_mut().for_each(|x| *x *= size)).unwrap();
            for extra in p.extras.values() {
                // A learned deviation that has gone to 0.
                extra.update(|values| values.iter_mut().for_each(|x| *x *= size)).unwrap();
            }
            let x = Var::from_tensor(&x0).unwrap();
            let mut ctx = Ctx { mask: Some(&mask), ..pass(&tokens, Wants::default()) };
            let (y, routing) = layer.forward(&x, &mut ctx).unwrap();
            let mut sum = (y * tensor(&[12, H], 10, 1.0)).unwrap().sum_all().unwrap();
            let around = balance::Around { multiplier: 0.3, ..balance::Around::default() };
            for term in balance::losses_of(&[routing], &balance(kind.name), around).unwrap() {
                sum = (sum + (term.value * term.coefficient).unwrap()).unwrap();
            }
            let grads = sum.backward().unwrap();
            let finite = |values: &[f32]| values.iter().all(|x| x.is_finite());
            let case = format!("{} times {size}, capacity {capacity}", kind.name);
            assert!(sum.to_scalar::<f32>().unwrap().is_finite(), "{case}");
            assert!(grads.get(&x).is_none_or(|dx| finite(&values(dx))), "{case}: gradient of x");
            for param in [&p.router, &p.gate_up, &p.down].into_iter().chain(p.extras.values()) {
                assert!(finite(&param.sink().unwrap().lock()), "{case}: gradient of {}", param.name());
            }
        }
    }
}

/// What an observer is shown of all experts, weighted as the router says, is what the layer gives.
#[test]
fn an_observer_sees_what_every_expert_gives() {
    struct Seen {
        routing: Option<Routing>,
        outputs: Vec<f32>,
    }
    impl RoutingObserver for Seen {
        fn routed(&mut self, _layer: usize, routing: &Routing) {
            self.routing = Some(routing.clone());
        }
        fn probes(&mut self, layer: usize, tokens: usize) -> Vec<u32> {
            assert_eq!((layer, tokens), (3, 5));
            vec![4, 0]
        }
        fn outputs(&mut self, _layer: usize, rows: usize, experts: usize, outputs: &[f32]) {
            assert_eq!((rows, experts, outputs.len()), (2, 4, 2 * 4 * H));
            self.outputs = outputs.to_vec();
        }
    }
    let layer = layer_of(&config("topk_pre"), &|name, tensor| Param::new(name, tensor.clone()));
    let x = tensor(&[5, H], 9, 1.0);
    let mut seen = Seen { routing: None, outputs: Vec::new() };
    let mut ctx = Ctx { layer: 3, observer: Some(&mut seen), ..Ctx::default() };
    let (y, _) = layer.forward(&x, &mut ctx).unwrap();
    let y: Vec<Vec<f32>> = y.to_vec2().unwrap();
    let routing = seen.routing.unwrap();
    let weights: Vec<Vec<f32>> = routing.weights.to_vec2().unwrap();
    for (place, row) in [4, 0].into_iter().enumerate() {
        for (h, y) in y[row].iter().enumerate() {
            let picks = routing.experts[2 * row..][..2].iter().zip(&weights[row]);
            let sum: f32 = picks.map(|(e, w)| w * seen.outputs[(place * 4 + *e as usize) * H + h]).sum();
            assert!((sum - y).abs() < 1e-5, "{sum} {y}");
        }
    }
}
