//! Every technique of the routing menu against golden files of other systems and of plain loops after the papers, through the path of
//! `senmon route`, which is that of training.

#![allow(clippy::unwrap_used)]

use candle_core::{Device, Tensor, Var};
use safetensors::SafeTensors;
use senmon_kernels::dispatch::EMPTY;
use senmon_moe::balance::{self, Around};
use senmon_moe::layer::Routing;
use senmon_train::config::RunConfig;
use senmon_train::layers::Layers;
use senmon_train::route::{Given, route};
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

/// Weights and losses agree to this, in units of the greatest or of 1 where that is less.
const CLOSE: f64 = 1e-6;
/// Gradients, of which those of the other systems are f32.
const CLOSE_GRADIENT: f64 = 2e-5;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/routing")
}

struct Golden {
    name: String,
    path: PathBuf,
    bytes: Vec<u8>,
    about: HashMap<String, String>,
}

impl Golden {
    fn all() -> Vec<Self> {
        let mut all: Vec<Self> = std::fs::read_dir(folder())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|ext| ext == "safetensors"))
            .map(|path| {
                let bytes = std::fs::read(&path).unwrap();
                let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
                let about = header.metadata().clone().unwrap_or_default();
                Self { name: path.file_stem().unwrap().to_string_lossy().into_owned(), path, bytes, about }
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    fn named(name: &str) -> Self {
        Self::all().into_iter().find(|golden| golden.name == name).unwrap()
    }

    fn config(&self) -> RunConfig {
        let text = &self.about["config"];
        let layers = Layers::new().toml(&self.name, text).unwrap_or_else(|e| panic!("{}: {e}", self.name));
        layers
            .set("router.allow_noncausal=true")
            .unwrap()
            .resolve()
            .unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    fn trains(&self) -> bool {
        self.about["train"] == "true"
    }

    fn names(&self) -> Vec<String> {
        SafeTensors::deserialize(&self.bytes).unwrap().names().into_iter().map(str::to_owned).collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        SafeTensors::deserialize(&self.bytes).unwrap().tensor(name).ok().map(|view| view.shape().to_vec())
    }

    /// The elements of a tensor of any type.
    fn get(&self, name: &str) -> Option<Vec<f64>> {
        use safetensors::Dtype;
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).ok()?;
        let word = |b: &[u8]| [b[0], b[1], b[2], b[3]];
        Some(match view.dtype() {
            Dtype::F32 => {
                view.data().chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(word(b)))).collect()
            }
            Dtype::I32 => {
                view.data().chunks_exact(4).map(|b| f64::from(i32::from_le_bytes(word(b)))).collect()
            }
            Dtype::U32 => {
                view.data().chunks_exact(4).map(|b| f64::from(u32::from_le_bytes(word(b)))).collect()
            }
            Dtype::U8 => view.data().iter().map(|b| f64::from(*b)).collect(),
            other => panic!("{}: {name} is {other:?}", self.name),
        })
    }

    fn tensor(&self, name: &str) -> Option<Tensor> {
        let values: Vec<f32> = self.get(name)?.iter().map(|x| *x as f32).collect();
        Some(Tensor::from_vec(values, self.shape(name)?, &Device::Cpu).unwrap())
    }
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let flat: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
    flat.into_iter().map(f64::from).collect()
}

/// The greatest difference, in units of the greatest of `want` or of 1.
fn far(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let unit = want.iter().fold(1.0f64, |most, x| most.max(x.abs()));
    got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / unit
}

/// For each token its experts with what goes with each, in the order of experts.
fn sets(experts: &[f64], with: &[f64], slots: usize) -> Vec<Vec<(i64, f64)>> {
    let rows = experts.chunks_exact(slots).zip(with.chunks_exact(slots));
    rows.map(|(experts, with)| {
        let mut row: Vec<(i64, f64)> =
            experts.iter().zip(with).map(|(e, w)| (*e as i64, *w)).filter(|(e, _)| *e >= 0).collect();
        row.sort_by_key(|(e, _)| *e);
        row
    })
    .collect()
}

fn experts_of(routing: &Routing) -> Vec<f64> {
    routing.experts.iter().map(|e| if *e == EMPTY { -1.0 } else { f64::from(*e) }).collect()
}

/// What does not agree with the file.
fn differences(golden: &Golden, config: &RunConfig) -> Vec<String> {
    let mut found = Vec::new();
    let mut given = Given::read(&golden.path).unwrap_or_else(|e| panic!("{}: {e}", golden.name));
    let logits = Var::from_tensor(&given.logits).unwrap();
    given.logits = logits.as_tensor().clone();
    let (routing, losses) = match route(config, &given, golden.trains()) {
        Ok(routed) => routed,
        Err(e) => return vec![e.to_string()],
    };
    let (want_experts, want_weights) = (golden.get("experts").unwrap(), golden.get("weights").unwrap());
    let want_slots = golden.shape("experts").unwrap()[1];
    let got = sets(&experts_of(&routing), &values(&routing.weights), routing.top_k);
    let want = sets(&want_experts, &want_weights, want_slots);
    let ids = |rows: &[Vec<(i64, f64)>]| -> Vec<Vec<i64>> {
        rows.iter().map(|row| row.iter().map(|(e, _)| *e).collect()).collect()
    };
    if ids(&got) != ids(&want) {
        let t = ids(&got).iter().zip(ids(&want)).position(|(a, b)| *a != b);
        let t = t.unwrap_or(0);
        found.push(format!("token {t} has {:?}, expected {:?}", got[t], want[t]));
        return found;
    }
    let flat = |rows: &[Vec<(i64, f64)>]| -> Vec<f64> { rows.iter().flatten().map(|(_, w)| *w).collect() };
    let off = far(&flat(&got), &flat(&want));
    if off > CLOSE {
        found.push(format!("weights are {off:e} off"));
    }
    let counts = [
        ("load", routing.load.clone()),
        ("picked_load", routing.picked_load.clone()),
        ("dropped", vec![routing.dropped as u32]),
    ];
    for (name, got) in counts {
        let got: Vec<f64> = got.into_iter().map(f64::from).collect();
        if golden.get(name).is_some_and(|want| want != got) {
            found.push(format!("{name} is {got:?}, expected {:?}", golden.get(name).unwrap()));
        }
    }

    let gradient = |of: &Tensor| {
        let grads = of.backward().unwrap();
        grads.get(&logits).map_or_else(|| vec![0.0; logits.elem_count()], values)
    };
    let mut compare = |name: &str, got: &[f64]| {
        if let Some(want) = golden.get(name) {
            let off = far(got, &want);
            if off.is_nan() || off > CLOSE_GRADIENT {
                found.push(format!("{name} is {off:e} off"));
            }
        }
    };
    if let Some(upstream) = golden.get("upstream") {
        // The slots of ours may be in another order.
        let by_expert: HashMap<(usize, i64), f64> = upstream
            .iter()
            .zip(&want_experts)
            .enumerate()
            .map(|(at, (up, e))| ((at / want_slots, *e as i64), *up))
            .collect();
        let ours: Vec<f32> = experts_of(&routing)
            .iter()
            .enumerate()
            .map(|(at, e)| by_expert.get(&(at / routing.top_k, *e as i64)).copied().unwrap_or(0.0) as f32)
            .collect();
        let ours = Tensor::from_vec(ours, routing.weights.shape(), &Device::Cpu).unwrap();
        let total = (&routing.weights * ours).unwrap().sum_all().unwrap();
        compare("grad.weights", &gradient(&total));
    }
    for name in golden.names() {
        let Some(loss) = name.strip_prefix("loss.") else { continue };
        let Some(term) = losses.iter().find(|term| term.name == loss) else {
            found.push(format!("there is no loss {loss}"));
            continue;
        };
        let off = far(&values(&term.value), &golden.get(&name).unwrap());
        if off.is_nan() || off > CLOSE {
            let (got, want) = (values(&term.value), golden.get(&name).unwrap());
            found.push(format!("{name} is {got:?}, expected {want:?}"));
        }
        let mut compare = |name: &str, got: &[f64]| {
            if let Some(want) = golden.get(name) {
                let off = far(got, &want);
                if off.is_nan() || off > CLOSE_GRADIENT {
                    found.push(format!("{name} is {off:e} off"));
                }
            }
        };
        if golden.get(&format!("grad.{loss}")).is_some() {
            compare(&format!("grad.{loss}"), &gradient(&term.value));
        }
    }
    found
}

/// Files of another form, which have tests of their own.
fn is_plain(golden: &Golden) -> bool {
    golden.get("experts").is_some() && golden.get("logits").is_some()
}

#[test]
fn every_technique_agrees_with_its_oracle() {
    let (mut kinds, mut drops, mut losses, mut bad, mut count) =
        (BTreeSet::new(), BTreeSet::new(), BTreeSet::new(), Vec::new(), 0);
    for golden in Golden::all().iter().filter(|golden| is_plain(golden)) {
        let config = golden.config();
        let found = differences(golden, &config);
        count += 1;
        if !found.is_empty() {
            bad.push(format!("{}: {}", golden.name, found.join("; ")));
        }
        kinds.insert(config.router.kind.clone());
        if config.router.capacity > 0.0 {
            drops.insert(format!("{:?}", config.router.drop));
        }
        losses.extend(golden.names().into_iter().filter(|name| name.starts_with("loss.")));
    }
    assert!(bad.is_empty(), "{} of {count} differ:\n{}", bad.len(), bad.join("\n"));
    // Soft MoE has a test of its own; what is drawn by our own numbers, or has no choice to make, has one in `moe`.
    let without = ["soft", "random", "depth"];
    let missing: Vec<_> = senmon_moe::router::KINDS
        .iter()
        .map(|kind| kind.name)
        .filter(|name| !kinds.contains(*name) && !without.contains(name))
        .collect();
    assert!(missing.is_empty(), "no golden file for {missing:?}");
    assert_eq!(drops.len(), 5, "{drops:?}");
    for loss in ["aux", "z", "sequence", "importance", "load", "entropy", "l1"] {
        assert!(losses.contains(&format!("loss.{loss}")), "{losses:?}");
    }
}

#[test]
fn what_is_changed_is_noticed() {
    // A comparison that cannot fail proves nothing: each change of a configuration must be seen in some file.
    let changes: &[(&str, fn(&mut RunConfig))] = &[
        ("normalize", |c| c.router.normalize = !c.router.normalize),
        ("scale", |c| c.router.scale *= 1.01),
        ("kind", |c| {
            c.router.kind = if c.router.kind == "topk_pre" { "topk_post" } else { "topk_pre" }.into()
        }),
        ("capacity", |c| c.router.capacity *= 2.0),
        ("top_groups", |c| c.router.top_groups = c.router.groups),
        ("convention", |c| {
            c.balance.convention = match c.balance.convention {
                senmon_moe::config::Convention::Fairscale => senmon_moe::config::Convention::Senmon,
                _ => senmon_moe::config::Convention::Fairscale,
            }
        }),
    ];
    let all = Golden::all();
    for (what, change) in changes {
        let seen = all.iter().filter(|golden| is_plain(golden)).any(|golden| {
            let mut config = golden.config();
            change(&mut config);
            !differences(golden, &config).is_empty()
        });
        assert!(seen, "{what} goes unnoticed");
    }
}

#[test]
fn losses_over_layers_agree_in_every_convention() {
    let mut count = 0;
    for golden in Golden::all().iter().filter(|golden| golden.get("logits.0").is_some()) {
        let config = golden.config();
        let layers: Vec<Var> = (0..)
            .map_while(|l| golden.tensor(&format!("logits.{l}")))
            .map(|logits| Var::from_tensor(&logits).unwrap())
            .collect();
        let routings: Vec<Routing> = layers
            .iter()
            .map(|logits| {
                let mut given = Given::new(logits.as_tensor().clone());
                given.mask = golden.get("mask").map(|mask| mask.iter().map(|n| *n != 0.0).collect());
                route(&config, &given, golden.trains()).unwrap().0
            })
            .collect();
        let terms = balance::losses_of(&routings, &config.balance, Around::default()).unwrap();
        for name in golden.names() {
            let Some(loss) = name.strip_prefix("loss.") else { continue };
            let term = terms
                .iter()
                .find(|term| term.name == loss)
                .unwrap_or_else(|| panic!("{}: {name}", golden.name));
            let off = far(&values(&term.value), &golden.get(&name).unwrap());
            assert!(off < CLOSE, "{}: {name} is {off:e} off", golden.name);
            let grads = term.value.backward().unwrap();
            for (l, logits) in layers.iter().enumerate() {
                if let Some(want) = golden.get(&format!("grad.{loss}.{l}")) {
                    let off = far(&values(grads.get(logits).unwrap()), &want);
                    assert!(
                        off < CLOSE_GRADIENT,
                        "{}: gradient of {loss} in layer {l} is {off:e} off",
                        golden.name
                    );
                }
            }
            count += 1;
        }
    }
    assert!(count >= 7, "{count} losses over layers");
}

#[test]
fn states_move_as_their_oracles_say() {
    let golden = Golden::named("megatron-bias-rate");
    let config = golden.config();
    let mut bias: Vec<f32> = golden.get("bias").unwrap().iter().map(|x| *x as f32).collect();
    let load: Vec<u64> = golden.get("picked_load").unwrap().iter().map(|n| *n as u64).collect();
    balance::step_bias(&mut bias, &load, config.balance.bias_rate, config.balance.recentre);
    let bias: Vec<f64> = bias.into_iter().map(f64::from).collect();
    assert!(far(&bias, &golden.get("bias_out").unwrap()) < CLOSE);

    let golden = Golden::named("plain-quantile");
    let scores: Vec<f32> = golden.get("scores").unwrap().iter().map(|x| *x as f32).collect();
    let experts = golden.shape("scores").unwrap()[1];
    let mut bias: Vec<f32> = golden.get("beta").unwrap().iter().map(|x| -*x as f32).collect();
    balance::quantile(&scores, experts, golden.config().experts.top_k, &mut bias);
    let beta: Vec<f64> = bias.into_iter().map(|b| -f64::from(b)).collect();
    assert!(far(&beta, &golden.get("beta_out").unwrap()) < CLOSE);
}

#[test]
fn soft_slots_agree_with_their_oracles() {
    use senmon_moe::config::RouterConfig;
    use senmon_moe::layer::MoeParams;
    use senmon_moe::{Ctx, MoeConfig, MoeLayer, Param};
    for name in ["soft_moe_pytorch", "soft_moe_pytorch-mask", "plain-soft"] {
        let golden = Golden::named(name);
        let var = |name: &str, shape: &[usize]| {
            Var::from_tensor(&golden.tensor(name).unwrap().reshape(shape).unwrap()).unwrap()
        };
        let (xs, phi) = (golden.shape("x").unwrap(), golden.shape("phi").unwrap());
        let (b, n, d, e, s) = (xs[0], xs[1], xs[2], phi[0], phi[1]);
        let (gate_up, down) = (golden.shape("gate_up").unwrap(), golden.shape("down").unwrap());
        let x = var("x", &[b * n, d]);
        let router = var("phi", &[e * s, d]);
        let (up, out, scale) = (var("gate_up", &gate_up), var("down", &down), var("scale", &[1]));
        let param = |name: &str, var: &Var| Param::new(name, var.as_tensor().clone());
        let params = MoeParams {
            extras: [("router_scale", param("scale", &scale))].into(),
            ..MoeParams::new(param("router", &router), param("gate_up", &up), param("down", &out))
        };
        let config = MoeConfig {
            router: RouterConfig { kind: "soft".into(), slots: s, ..RouterConfig::default() },
            ..MoeConfig::new(d, down[2], e, 1)
        };
        let layer = MoeLayer::from_params(config, params).unwrap();
        let mask: Option<Vec<bool>> =
            golden.get("mask").map(|mask| mask.iter().map(|counts| *counts != 0.0).collect());
        let mut ctx = Ctx { sequences: b, mask: mask.as_deref(), ..Ctx::default() };
        let (y, _) = layer.forward(&x, &mut ctx).unwrap();
        // What padding gets is nobody's.
        let counted = |y: Vec<f64>| -> Vec<f64> {
            let rows = y.chunks_exact(d).enumerate();
            rows.filter(|(t, _)| mask.as_ref().is_none_or(|mask| mask[*t]))
                .flat_map(|(_, row)| row.to_vec())
                .collect()
        };
        let off = far(&counted(values(&y)), &counted(golden.get("y").unwrap()));
        assert!(off < 1e-5, "{name}: {off:e}");
        let upstream = golden.tensor("upstream").unwrap().reshape((b * n, d)).unwrap();
        let grads = (y * upstream).unwrap().sum_all().unwrap().backward().unwrap();
        for (what, var) in [("x", &x), ("phi", &router), ("gate_up", &up), ("down", &out), ("scale", &scale)]
        {
            if let Some(want) = golden.get(&format!("grad.{what}")) {
                let off = far(&values(grads.get(var).unwrap()), &want);
                assert!(off < CLOSE_GRADIENT, "{name}: gradient of {what} is {off:e} off");
            }
        }
    }
}
