//! The layer against stock candle ops and plain formulas: values, gradients, losses, masks, threads.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use senmon_kernels::activation::Activation;
use senmon_kernels::dispatch::EMPTY;
use senmon_kernels::expert_mlp::Shape;
use senmon_moe::config::{AuxCounts, Convention};
use senmon_moe::layer::MoeParams;
use senmon_moe::layer::extra_defs;
use senmon_moe::rng::Stream;
use senmon_moe::router::{self, KINDS, RouteInput};
use senmon_moe::{
    BalanceConfig, Ctx, MoeConfig, MoeLayer, Param, RouterConfig, SelectionBias, balance, reference,
};

fn numbers(n: usize, seed: u64, size: f32) -> Vec<f32> {
    let stream = Stream::new(&[seed]);
    (0..n as u64).map(|i| (2.0 * stream.uniform(i) - 1.0) * size).collect()
}

fn tensor(dims: &[usize], seed: u64, size: f32) -> Tensor {
    Tensor::from_vec(numbers(dims.iter().product(), seed, size), dims, &Device::Cpu).unwrap()
}

fn config(kind: &str, top_k: usize) -> MoeConfig {
    let groups = if kind == "hierarchical" { 2 } else { 1 };
    let router = RouterConfig { kind: kind.into(), groups, ..RouterConfig::default() };
    MoeConfig { shared_intermediate: 5, router, ..MoeConfig::new(12, 9, 6, top_k) }
}

/// K for a kind: the only one that it has, else two.
fn usual(kind: &str) -> usize {
    if ["switch", "base"].contains(&kind) { 1 } else { 2 }
}

/// Router, gate_up, down, and the two of the shared experts.
fn weights(c: &MoeConfig) -> [Tensor; 5] {
    let (e, h, i, s) = (c.experts, c.hidden, c.intermediate, c.shared_intermediate);
    let p = if c.gated { 2 } else { 1 };
    [
        tensor(&[router::columns(&c.router, c.choices()), h], 1, 0.7),
        tensor(&[e, p * i, h], 2, 0.5),
        tensor(&[e, h, i], 3, 0.5),
        tensor(&[p * s, h], 4, 0.5),
        tensor(&[h, s], 5, 0.5),
    ]
}

fn layer(c: &MoeConfig, w: &[Tensor; 5], wrap: impl Fn(&str, &Tensor) -> Param) -> MoeLayer {
    let bias = router::kind(&c.router.kind).unwrap().selection_bias;
    let params = MoeParams {
        selection_bias: bias.then(|| SelectionBias::new(numbers(c.experts, 6, 0.3))),
        shared: Some((wrap("shared_up", &w[3]), wrap("shared_down", &w[4]))),
        extras: extra_defs(c)
            .iter()
            .enumerate()
            .map(|(n, def)| (def.name, wrap(def.name, &tensor(&def.shape, 30 + n as u64, 0.6))))
            .collect(),
        ..MoeParams::new(wrap("router", &w[0]), wrap("gate_up", &w[1]), wrap("down", &w[2]))
    };
    MoeLayer::from_params(c.clone(), params).unwrap()
}

fn frozen(name: &str, t: &Tensor) -> Param {
    Param::new(name, t.clone())
}

fn sunk(name: &str, t: &Tensor) -> Param {
    Param::trainable(name, t.flatten_all().unwrap().to_vec1().unwrap(), t.dims()).unwrap()
}

/// Greatest difference over the greatest of `b`.
fn far(a: &Tensor, b: &Tensor) -> f32 {
    let scale = b.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap().max(1e-3);
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() / scale
}

#[test]
fn values_and_gradients_agree_with_stock_ops_for_every_kind_and_activation() {
    let (x0, dy) = (tensor(&[3, 7, 12], 9, 1.0), tensor(&[3, 7, 12], 10, 1.0));
    // Soft slots, tables and depth have tests of their own.
    for kind in KINDS.iter().filter(|kind| !["soft", "hash", "depth"].contains(&kind.name)) {
        for activation in [Activation::Silu, Activation::Gelu, Activation::Relu, Activation::Relu2] {
            for gated in [true, false] {
                let top_k = usual(kind.name);
                let c = MoeConfig { activation, gated, ..config(kind.name, top_k) };
                let w = weights(&c);
                let vars = w.each_ref().map(|t| Var::from_tensor(t).unwrap());
                let x = Var::from_tensor(&x0).unwrap();
                let tensors = vars.each_ref().map(|v| v.as_tensor().clone());
                let (y, routing) = layer(&c, &tensors, frozen).forward(&x, &mut Ctx::default()).unwrap();
                let grads = (&y * &dy).unwrap().sum_all().unwrap().backward().unwrap();

                // The same from stock ops, with the same picks.
                let flat = x.reshape(((), 12)).unwrap();
                let logits = flat.matmul(&vars[0].t().unwrap()).unwrap();
                let built = router::build(&c.router, c.experts, c.top_k).unwrap();
                let input = RouteInput { top_k, forced: Some(&routing.experts), ..RouteInput::default() };
                let choice = built.choose(&logits, &input).unwrap();
                let (g, slots) = (choice.weights, choice.slots);
                let shape = Shape { hidden: 12, intermediate: 9, activation, gated };
                let experts = |x: &Tensor, picks: &[u32], g: &Tensor| {
                    reference::experts(x, &vars[1], &vars[2], picks, g, shape).unwrap()
                };
                let routed = match choice.weighs_input {
                    false => experts(&flat, &routing.experts, &g),
                    true => (0..slots)
                        .map(|slot| {
                            let picks: Vec<u32> =
                                routing.experts.iter().skip(slot).step_by(slots).copied().collect();
                            let g = g.narrow(1, slot, 1).unwrap();
                            experts(&flat.broadcast_mul(&g).unwrap(), &picks, &g.ones_like().unwrap())
                        })
                        .reduce(|a, b| (a + b).unwrap())
                        .unwrap(),
                };
                let shared_shape = Shape { intermediate: 5, ..shape };
                let shared = reference::mlp(&flat, &vars[3], &vars[4], shared_shape).unwrap();
                let want = (routed + shared).unwrap().reshape((3, 7, 12)).unwrap();
                let want_grads = (&want * &dy).unwrap().sum_all().unwrap().backward().unwrap();
                let case = format!("{} {activation:?} gated {gated}", kind.name);
                assert!(far(&y, &want) < 1e-5, "{case}");
                for (i, var) in vars.iter().chain([&x]).enumerate() {
                    let (Some(got), Some(want)) = (grads.get(var), want_grads.get(var)) else {
                        // Weights that go by nothing give their router no gradient.
                        assert!(i == 0 && kind.name == "random", "{case}: gradient {i} is missing");
                        continue;
                    };
                    let off = far(got, want);
                    assert!(off < 2e-4, "{case}: gradient {i} is {off} off");
                }
            }
        }
    }
}

#[test]
fn sinks_gather_what_backward_would_return_and_add_up() {
    let c = config("topk_pre", 2);
    let w = weights(&c);
    let (x, dy) = (Var::from_tensor(&tensor(&[20, 12], 9, 1.0)).unwrap(), tensor(&[20, 12], 10, 1.0));
    let free = layer(&c, &w.each_ref().map(|t| Var::from_tensor(t).unwrap().into_inner()), frozen);
    let with_sinks = layer(&c, &w, sunk);
    let backward = |layer: &MoeLayer| {
        let (y, _) = layer.forward(&x, &mut Ctx::default()).unwrap();
        (y * &dy).unwrap().sum_all().unwrap().backward().unwrap()
    };
    let (grads, first) = (backward(&free), backward(&with_sinks));
    backward(&with_sinks);
    // With sinks the layer is fewer ops, so candle adds up what comes from router, experts and shared experts in another order: one
    // rounding. Two of them are the same in either order, to the bit.
    assert!(far(first.get(&x).unwrap(), grads.get(&x).unwrap()) < f32::EPSILON);
    let alone = |layer: &MoeLayer| {
        let params = MoeParams { shared: None, ..layer.params().clone() };
        MoeLayer::from_params(MoeConfig { shared_intermediate: 0, ..c.clone() }, params).unwrap()
    };
    let (free_alone, sunk_alone) = (backward(&alone(&free)), backward(&alone(&layer(&c, &w, sunk))));
    assert_eq!(far(sunk_alone.get(&x).unwrap(), free_alone.get(&x).unwrap()), 0.0);
    let (a, b) = (free.params(), with_sinks.params());
    for (free, sunk) in [(&a.router, &b.router), (&a.gate_up, &b.gate_up), (&a.down, &b.down)] {
        assert!(first.get(sunk.tensor()).is_none());
        let once = grads.get(free.tensor()).unwrap();
        let twice =
            Tensor::from_vec(sunk.sink().unwrap().lock().clone(), once.shape(), &Device::Cpu).unwrap();
        assert!(far(&twice, &(once * 2.0).unwrap()) < 1e-6, "{}", sunk.name());
    }
}

#[test]
fn sinks_are_filled_where_the_input_has_no_gradient() {
    let c = config("topk_pre", 2);
    let w = weights(&c);
    let (x, dy) = (tensor(&[20, 12], 9, 1.0), tensor(&[20, 12], 10, 1.0));
    let gathered = |x: &Tensor| {
        let layer = layer(&c, &w, sunk);
        let (y, _) = layer.forward(x, &mut Ctx::default()).unwrap();
        (y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
        let p = layer.params();
        let (up, down) = p.shared.as_ref().unwrap();
        [&p.router, &p.gate_up, &p.down, up, down].map(|param| param.sink().unwrap().lock().clone())
    };
    let with = gathered(&Var::from_tensor(&x).unwrap());
    assert!(with.iter().all(|gradient| gradient.iter().any(|x| *x != 0.0)));
    assert_eq!(gathered(&x), with);
}

#[test]
fn a_second_backward_is_refused() {
    let c = config("topk_pre", 2);
    let w = weights(&c);
    let x = Var::from_tensor(&tensor(&[20, 12], 9, 1.0)).unwrap();
    let trainable = layer(&c, &w.each_ref().map(|t| Var::from_tensor(t).unwrap().into_inner()), frozen);
    for (layer, sinks) in [(layer(&c, &w, sunk), true), (trainable, false)] {
        let (y, _) = layer.forward(&x, &mut Ctx::default()).unwrap();
        let loss = y.sum_all().unwrap();
        loss.backward().unwrap();
        let told = loss.backward().unwrap_err().to_string();
        assert!(told.contains("backward a second time"), "sinks: {sinks}: {told}");
    }
}

#[test]
fn weights_and_picks_follow_their_formulas() {
    let (t, e, k) = (40, 8, 3);
    let z = numbers(t * e, 3, 2.0);
    let logits = Tensor::from_slice(&z, (t, e), &Device::Cpu).unwrap();
    let bias = numbers(e, 4, 0.4);
    let cases = [
        ("topk_pre", true),
        ("topk_pre", false),
        ("topk_post", true),
        ("sigmoid_bias", true),
        ("sigmoid_bias", false),
    ];
    for (kind, normalize) in cases {
        let config = RouterConfig { kind: kind.into(), normalize, scale: 1.5, ..RouterConfig::default() };
        let biased = (kind == "sigmoid_bias").then_some(&bias[..]);
        let router = router::build(&config, e, k).unwrap();
        let choice =
            router.choose(&logits, &RouteInput { top_k: k, bias: biased, ..RouteInput::default() }).unwrap();
        let got = choice.weights.to_vec2::<f32>().unwrap();
        for row in 0..t {
            let z: Vec<f64> = z[row * e..][..e].iter().map(|z| *z as f64).collect();
            let total: f64 = z.iter().map(|z| z.exp()).sum();
            let score = |i: usize| match kind {
                "sigmoid_bias" => 1.0 / (1.0 + (-z[i]).exp()),
                _ => z[i].exp() / total,
            };
            let mut order: Vec<usize> = (0..e).collect();
            let rank = |i: usize| score(i) + biased.map_or(0.0, |b| b[i] as f64);
            order.sort_by(|a, b| rank(*b).total_cmp(&rank(*a)));
            let picked: f64 = order[..k].iter().map(|i| score(*i)).sum();
            for slot in 0..k {
                assert_eq!(choice.experts[row * k + slot] as usize, order[slot], "{kind}");
                let divide = if normalize || kind == "topk_post" { picked } else { 1.0 };
                let want = 1.5 * score(order[slot]) / divide;
                assert!((got[row][slot] as f64 - want).abs() < 1e-6, "{kind} {normalize}");
            }
        }
    }
}

#[test]
fn losses_follow_their_conventions() {
    let c = config("topk_pre", 2);
    let x = tensor(&[50, 12], 9, 1.0);
    let routings: Vec<_> = (0..3)
        .map(|l| {
            let mut w = weights(&c);
            w[0] = tensor(&[6, 12], 20 + l, 0.9);
            layer(&c, &w, frozen).forward(&x, &mut Ctx::default()).unwrap().1
        })
        .collect();
    let value = |convention| {
        let config = BalanceConfig { aux: 0.5, convention, z: 0.25, ..BalanceConfig::default() };
        let terms = balance::losses(&routings, &config).unwrap();
        assert_eq!((terms[0].name, terms[0].coefficient, terms[1].name), ("aux", 0.5, "z"));
        (terms[0].value.to_scalar::<f32>().unwrap() as f64, terms[1].value.to_scalar::<f32>().unwrap() as f64)
    };
    // Plain loops over logits.
    let (mut per_layer, mut z_loss, mut f_all, mut p_all) = (vec![], 0.0, [0.0; 6], [0.0; 6]);
    for routing in &routings {
        let (mut f, mut p) = ([0.0f64; 6], [0.0f64; 6]);
        for row in routing.logits.to_vec2::<f32>().unwrap() {
            let total: f64 = row.iter().map(|z| (*z as f64).exp()).sum();
            z_loss += total.ln().powi(2) / 150.0;
            for e in 0..6 {
                p[e] += (row[e] as f64).exp() / total / 50.0;
            }
        }
        routing.experts.iter().for_each(|pick| f[*pick as usize] += 1.0 / 100.0);
        per_layer.push(6.0 * (0..6).map(|e| f[e] * p[e]).sum::<f64>());
        for e in 0..6 {
            f_all[e] += f[e] / 3.0;
            p_all[e] += p[e] / 3.0;
        }
    }
    let senmon = per_layer.iter().sum::<f64>() / 3.0;
    let joint = 2.0 * 6.0 * (0..6).map(|e| f_all[e] * p_all[e]).sum::<f64>();
    let wanted = [
        (Convention::Senmon, senmon),
        (Convention::Megatron, 3.0 * senmon),
        (Convention::Huggingface, joint),
    ];
    for (convention, want) in wanted {
        let (aux, z) = value(convention);
        assert!((aux - want).abs() < 1e-5 * want, "{convention:?}: {aux}, not {want}");
        assert!((z - z_loss).abs() < 1e-5 * z_loss);
    }
}

#[test]
fn an_even_router_pays_the_coefficient_and_unbiased_counts_ignore_the_bias() {
    let c = config("sigmoid_bias", 2);
    let (_, routing) =
        layer(&c, &weights(&c), frozen).forward(&tensor(&[64, 12], 9, 1.0), &mut Ctx::default()).unwrap();
    let picked = BalanceConfig { aux: 1.0, z: 0.0, ..BalanceConfig::default() };
    let unbiased = BalanceConfig { aux_counts: AuxCounts::Unbiased, ..picked.clone() };
    let value = |config: &BalanceConfig, routing| {
        balance::losses(std::slice::from_ref(routing), config).unwrap()[0].value.to_scalar::<f32>().unwrap()
    };
    assert_ne!(routing.load, *routing.unbiased_load.as_ref().unwrap());
    assert_ne!(value(&picked, &routing), value(&unbiased, &routing));
    let mut even = routing.clone();
    even.load = vec![10; 6];
    even.mean_scores = Tensor::new(&[1.0f32 / 6.0; 6], &Device::Cpu).unwrap();
    assert!((value(&picked, &even) - 1.0).abs() < 1e-6);
}

#[test]
fn padding_goes_nowhere_and_counts_nowhere() {
    let c = config("topk_pre", 2);
    let layer = layer(&c, &weights(&c), frozen);
    let x = tensor(&[10, 12], 9, 1.0);
    let mask = [true, true, false, true, false, true, true, true, false, true];
    let (y, with) = layer.forward(&x, &mut Ctx { mask: Some(&mask), ..Ctx::default() }).unwrap();
    let kept: Vec<u32> = (0..10).filter(|t| mask[*t as usize]).collect();
    let keep = |x: &Tensor| x.index_select(&Tensor::new(&kept[..], &Device::Cpu).unwrap(), 0).unwrap();
    let (y_short, without) = layer.forward(&keep(&x), &mut Ctx::default()).unwrap();
    assert_eq!(with.load, without.load);
    assert!(far(&with.mean_scores, &without.mean_scores) < 1e-6);
    assert!((with.entropy - without.entropy).abs() < 1e-9);
    assert!((with.z.to_scalar::<f32>().unwrap() - without.z.to_scalar::<f32>().unwrap()).abs() < 1e-5);
    assert!(with.experts[4..6].iter().all(|e| *e == EMPTY));
    assert_eq!(keep(&y).to_vec2::<f32>().unwrap(), y_short.to_vec2::<f32>().unwrap());
}

#[test]
fn a_forced_routing_repeats_the_pass() {
    let c = config("topk_post", 2);
    let layer = layer(&c, &weights(&c), frozen);
    let x = tensor(&[10, 12], 9, 1.0);
    let forced = |experts: &[u32]| layer.forward(&x, &mut Ctx { forced: Some(experts), ..Ctx::default() });
    let (y, first) = layer.forward(&x, &mut Ctx::default()).unwrap();
    assert_eq!(far(&y, &forced(&first.experts).unwrap().0), 0.0);
    let other: Vec<u32> = first.experts.iter().map(|e| (e + 1) % 6).collect();
    let (changed, second) = forced(&other).unwrap();
    assert_eq!(second.experts, other);
    assert!(far(&changed, &y) > 1e-3);
    assert!(forced(&[0, 1]).is_err() && forced(&[77; 20]).is_err());
}

#[test]
fn jitter_is_noise_of_training_alone_and_repeats_by_counter() {
    let mut c = config("switch", 1);
    c.router.jitter = 0.3;
    let layer = layer(&c, &weights(&c), frozen);
    let x = tensor(&[30, 12], 9, 1.0);
    let logits =
        |train, step| layer.forward(&x, &mut Ctx { train, step, ..Ctx::default() }).unwrap().1.logits;
    let (quiet, noisy) = (logits(false, 3), logits(true, 3));
    assert!(far(&noisy, &quiet) > 1e-2);
    assert_eq!(far(&noisy, &logits(true, 3)), 0.0);
    assert!(far(&noisy, &logits(true, 4)) > 1e-3);
}

#[test]
fn bits_do_not_depend_on_threads() {
    let c = MoeConfig { shared_intermediate: 32, ..MoeConfig::new(48, 40, 5, 2) };
    let (w, x0) = (weights(&c), tensor(&[130, 48], 9, 1.0));
    let runs = [1, 2, 3].map(|threads| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let layer = layer(&c, &w, sunk);
            let x = Var::from_tensor(&x0).unwrap();
            let (y, routing) = layer.forward(&x, &mut Ctx::default()).unwrap();
            let total = (y.sqr().unwrap().sum_all().unwrap() + routing.z).unwrap();
            let dx = total.backward().unwrap().get(&x).unwrap().to_vec2::<f32>().unwrap();
            let sink = |p: &Param| p.sink().unwrap().lock().clone();
            (y.to_vec2::<f32>().unwrap(), dx, sink(&layer.params().down), sink(&layer.params().router))
        })
    });
    assert!(runs[0] == runs[1] && runs[0] == runs[2]);
}

#[test]
fn mistakes_are_errors_of_one_line() {
    let vars = VarMap::new();
    let vb = || VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let refused = |c: MoeConfig| MoeLayer::new(c, vb()).unwrap_err().to_string();
    let text = refused(MoeConfig::new(8, 8, 4, 5));
    assert!(text.contains("top_k = 5") && text.contains("4 experts"), "{text}");
    let text = refused(config("topk_prey", 2));
    assert!(text.contains("topk_prey") && text.contains("sigmoid_bias"), "{text}");
    assert!(refused(config("switch", 2)).contains("one expert per token"));
    let mut c = config("sigmoid_bias", 2);
    c.router.groups = 4;
    assert!(refused(c.clone()).contains("does not divide"));
    c.router.groups = 6;
    assert!(refused(c).contains("fewer than top_k"));
    let other = VarMap::new();
    let vb = VarBuilder::from_varmap(&other, DType::F32, &Device::Cpu);
    let layer = MoeLayer::new(MoeConfig::new(8, 8, 4, 2), vb).unwrap();
    let text = layer.forward(&tensor(&[3, 9], 1, 1.0), &mut Ctx::default()).unwrap_err().to_string();
    assert!(text.contains("[3, 9]") && text.contains("[.., 8]"), "{text}");
}
