//! Routers and their balancing over whole runs: every kind trains, resumes to the same bits with its state, does not depend on how a step is cut where it must
//! not, and can take the place of another.

#![allow(clippy::unwrap_used)]

mod common;

use common::{config, create, metrics, newest_bytes, resume, train, write_corpus};
use senmon_moe::router::{KINDS, Kind};
use senmon_train::observer::{Observer, StepRecord};
use senmon_train::{Layers, Result, setup};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

struct At<'a> {
    step: u64,
    what: &'a dyn Fn(),
}

impl Observer for At<'_> {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        if record.step == self.step {
            (self.what)();
        }
        Ok(())
    }
}

fn nothing() -> impl Observer {
    At { step: 0, what: &|| () }
}

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_corpus(&dir.path().join("data"));
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A whole run; the bytes of its newest checkpoint.
    fn run(&self, name: &str, more: &[&str]) -> std::collections::BTreeMap<String, Vec<u8>> {
        let setup = create(config(&self.path("data"), more), &self.path(name), &self.path("cache"));
        let setup = setup.unwrap_or_else(|e| panic!("{name}: {e}"));
        train(setup, &mut nothing(), &AtomicBool::new(false)).unwrap_or_else(|e| panic!("{name}: {e}"));
        newest_bytes(&self.path(name))
    }

    /// The same run, interrupted after step 3 and gone on with.
    fn run_in_two(&self, name: &str, more: &[&str]) -> std::collections::BTreeMap<String, Vec<u8>> {
        let (out, cache) = (self.path(name), self.path("cache"));
        let stop = AtomicBool::new(false);
        let what = || stop.store(true, Ordering::Relaxed);
        let setup = create(config(&self.path("data"), more), &out, &cache).unwrap();
        train(setup, &mut At { step: 3, what: &what }, &stop).unwrap();
        train(resume(&out, &cache).unwrap(), &mut nothing(), &AtomicBool::new(false)).unwrap();
        newest_bytes(&out)
    }
}

/// What is left of the common run: few steps, four plain experts.
const SMALL: &[&str] = &[
    "train.steps=6",
    "train.eval_every=0",
    "train.save_every=0",
    "experts.shared=0",
    "model.layers=2",
    "experts.first_dense=0",
];

fn small<'a>(more: &[&'a str]) -> Vec<&'a str> {
    SMALL.iter().chain(more).copied().collect()
}

#[test]
fn every_kind_trains_and_resumes_to_the_same_bits() {
    trains_and_resumes(&KINDS[..KINDS.len() / 2]);
}

#[test]
fn every_other_kind_trains_and_resumes_to_the_same_bits() {
    trains_and_resumes(&KINDS[KINDS.len() / 2..]);
}

fn trains_and_resumes(kinds: &[Kind]) {
    let place = Place::new();
    for kind in kinds {
        let count = if kind.name == "depth" { "experts.count=1" } else { "experts.count=4" };
        let name = format!("router.kind={}", kind.name);
        // What means nothing to a kind is refused for it.
        let capacity = if kind.name == "dense" { "router.capacity=0" } else { "router.capacity=1.1" };
        let jitter = if kind.name == "soft" { "router.jitter=0" } else { "router.jitter=0.01" };
        let more = small(&[&name, count, "router.allow_noncausal=true", capacity, jitter]);
        let whole = place.run(&format!("{}-whole", kind.name), &more);
        let two = place.run_in_two(&format!("{}-two", kind.name), &more);
        let other: Vec<_> =
            whole.iter().filter(|(name, file)| two.get(*name) != Some(file)).map(|(n, _)| n).collect();
        assert!(other.is_empty() && whole.len() == two.len(), "{}: {other:?}", kind.name);
        let lines = metrics(&place.path(&format!("{}-whole", kind.name)));
        let losses: Vec<f64> = lines.iter().filter_map(|line| line["loss"].as_f64()).collect();
        assert!(losses.len() == 6 && losses[5] < losses[0], "{}: {losses:?}", kind.name);
    }
}

#[test]
fn what_is_beyond_plain_experts_trains_and_resumes_to_the_same_bits() {
    let place = Place::new();
    let cases: &[(&str, &[&str])] = &[
        ("special", &["router.kind=topk_pre", "experts.zero=1", "experts.identity=1", "experts.constant=1"]),
        ("residual", &["router.kind=switch", "experts.residual=true"]),
        ("latent", &["router.kind=topk_post", "experts.latent=16", "experts.latent_norm=true"]),
        ("shared gate", &["router.kind=topk_pre", "experts.shared=1", "experts.shared_gate=true"]),
        ("pyramid", &["router.kind=topk_pre", "experts.count=[2, 6]"]),
        (
            "members",
            &["router.kind=topk_pre", "experts.members=2", "experts.top_k=1", "router.normalize=false"],
        ),
        ("quantile", &["router.kind=sigmoid_bias", "balance.quantile=true"]),
        ("means", &["router.kind=topk_pre", "balance.dense_gradient=ema"]),
        ("through", &["router.kind=topk_pre", "balance.dense_gradient=straight_through"]),
        ("distill", &["router.kind=topk_pre", "balance.distill=0.1"]),
        ("consistency", &["router.kind=random", "balance.distill=0.5"]),
        ("global", &["router.kind=topk_pre", "balance.scope=global", "balance.sequence=0.001"]),
        ("dropout", &["router.kind=gshard", "router.expert_dropout=0.2"]),
    ];
    for (name, more) in cases {
        let more = small(more);
        let (whole, two) =
            (place.run(&format!("{name} whole"), &more), place.run_in_two(&format!("{name} two"), &more));
        let other: Vec<_> =
            whole.iter().filter(|(name, file)| two.get(*name) != Some(file)).map(|(n, _)| n).collect();
        assert!(other.is_empty() && whole.len() == two.len(), "{name}: {other:?}");
        let lines = metrics(&place.path(&format!("{name} whole")));
        assert!(lines.iter().any(|line| line.get("loss").is_some()));
        // What the model is comes back from its folder.
        let loaded = senmon_models::checkpoint::load(&place.path(&format!("{name} whole"))).unwrap();
        loaded.spec.validate().unwrap();
    }
}

/// The greatest difference of two models, in units of the greatest change since the start.
fn apart(a: &Path, b: &Path, start: &Path) -> f64 {
    let load = |path: &Path| senmon_models::checkpoint::load(path).unwrap().params.concat();
    let (a, b, start) = (load(a), load(b), load(start));
    let most =
        |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from((x - y).abs())).fold(0.0, f64::max);
    most(&a, &b) / most(&a, &start)
}

#[test]
fn the_global_batch_is_what_counts_however_it_is_cut() {
    let place = Place::new();
    // The rate is small: Adam makes much of the last bit of a gradient near 0.
    let shared = ["optimizer.eps=1e-3", "train.steps=3", "router.jitter=0"];
    let cases: &[(&str, &[&str], f64)] = &[
        ("aux", &["router.kind=topk_pre", "balance.scope=global", "balance.aux=0.5"], 5e-3),
        ("bias", &["router.kind=sigmoid_bias", "balance.bias_rate=0.01"], 5e-3),
        ("quantile", &["router.kind=sigmoid_bias", "balance.quantile=true"], 5e-3),
        ("means", &["router.kind=topk_pre", "balance.dense_gradient=ema"], 5e-3),
        (
            "noise",
            &["router.kind=noisy_topk", "router.noise=fixed", "balance.importance=0", "balance.load=0"],
            5e-3,
        ),
        ("relu", &["router.kind=relu", "balance.scope=global"], 5e-3),
    ];
    for (name, more, bound) in cases {
        let cut = |batch: &'static str, accumulate: &'static str| {
            let mut all = small(more);
            all.extend(shared);
            all.extend([batch, accumulate]);
            let out = format!("{name} {batch}");
            place.run(&out, &all);
            place.path(&out)
        };
        let (one, three) =
            (cut("train.batch=6", "train.accumulate=1"), cut("train.batch=2", "train.accumulate=3"));
        let mut all = small(more);
        all.extend(["train.steps=1", "optimizer.lr=1e-12", "schedule.min_lr=0"]);
        let start = format!("{name} start");
        place.run(&start, &all);
        let off = apart(&one, &three, &place.path(&start));
        assert!(off < *bound, "{name}: {off:e}");
    }
    // Over micro-batches the same coefficient is another loss.
    let off = {
        let more = small(&[
            "router.kind=topk_pre",
            "balance.aux=0.5",
            "optimizer.eps=1e-3",
            "train.steps=3",
            "router.jitter=0",
        ]);
        let with = |name: &str, extra: [&'static str; 2]| {
            place.run(name, &[&more[..], &extra].concat());
            place.path(name)
        };
        let one = with("micro one", ["train.batch=6", "train.accumulate=1"]);
        let three = with("micro three", ["train.batch=2", "train.accumulate=3"]);
        apart(&one, &three, &place.path("aux start"))
    };
    assert!(off > 2e-2, "{off:e}");
}

#[test]
fn a_router_takes_the_place_of_another_and_says_what_is_kept() {
    let place = Place::new();
    place.run("first", &small(&["router.kind=topk_pre"]));
    let model = place.path("first");
    let started = |name: &str, sets: &[&str]| {
        let layers = Layers::new()
            .set_value("data.paths", vec![place.path("data").display().to_string()])
            .unwrap()
            .set_value("train.init", model.display().to_string())
            .unwrap();
        let sets =
            ["train.batch=2", "train.sequence=32", "train.steps=2", "data.holdout=0.1"].iter().chain(sets);
        let config = setup::configure(sets.fold(layers, |layers, set| layers.set(set).unwrap()));
        config.and_then(|config| create(config, &place.path(name), &place.path("cache")))
    };
    let before = senmon_models::checkpoint::load(&model).unwrap();
    // The same shape of router: all is kept but what is new.
    let setup = started("bias", &["router.kind=sigmoid_bias"]).unwrap();
    let note = setup.notes.iter().find(|note| note.contains("goes from")).unwrap();
    assert!(
        note.contains("\"topk_pre\"") && note.contains("\"sigmoid_bias\"") && note.contains("router_bias"),
        "{note}"
    );
    let after = setup.trainer.decoder.values().unwrap();
    let defs = senmon_models::params::param_defs(setup.trainer.decoder.spec());
    let kept = |name: &str| {
        let index = defs.iter().position(|def| def.name == name).unwrap();
        before.params.contains(&after[index])
    };
    assert!(kept("layers.0.router") && kept("layers.1.experts.gate_up") && kept("embed"));
    train(setup, &mut nothing(), &AtomicBool::new(false)).unwrap();
    train(started("same", &[]).unwrap(), &mut nothing(), &AtomicBool::new(false)).unwrap();
    // Another shape: the router begins anew.
    let setup = started("groups", &["router.kind=hierarchical", "router.groups=2"]).unwrap();
    let note = setup.notes.iter().find(|note| note.contains("goes from")).unwrap();
    assert!(note.contains("anew: layers.0.router, layers.1.router"), "{note}");
    let setup = started("hash", &["router.kind=hash"]).unwrap();
    let table = setup.trainer.decoder.moe_layers().next().unwrap().1.params().table.clone().unwrap().values();
    assert_eq!(table.len(), 300 * 2);
    assert!((0..4).all(|e| table.contains(&(e as f32))));
    // Experts are the model's.
    let error = started("experts", &["experts.count=8"]).err().unwrap().to_string();
    assert!(error.contains("experts.count cannot be set with --init"), "{error}");
}

#[test]
fn what_is_not_causal_is_refused_and_says_why() {
    let refused = |sets: &[&str]| {
        let layers = sets.iter().fold(Layers::new(), |layers, set| layers.set(set).unwrap());
        layers.resolve().err().map(|e| e.to_string()).unwrap_or_default()
    };
    for kind in ["expert_choice", "soft", "depth"] {
        let text = refused(&[&format!("router.kind={kind}")]);
        assert!(
            text.contains("not causal") && text.contains("allow_noncausal = true") && text.contains("later"),
            "{text}"
        );
        assert_eq!(refused(&[&format!("router.kind={kind}"), "router.allow_noncausal=true"]), "");
    }
    assert_eq!(refused(&["router.kind=depth", "router.predictor=true"]), "");
    assert!(refused(&["balance.quantile=true"]).contains("sigmoid_bias"));
    assert!(refused(&["balance.load=0.1"]).contains("noisy_topk"));
    assert!(
        refused(&["router.kind=sigmoid_bias", "balance.quantile=true", "balance.bias_rate=0.1"])
            .contains("both")
    );
    assert!(refused(&["router.kind=hash", "experts.identity=1"]).contains("hash"));
    assert!(refused(&["experts.latent=500"]).contains("no narrower"));
    assert!(refused(&["router.kind=gshard", "experts.top_k=3"]).contains("experts.top_k = 3"));
    assert!(
        refused(&["router.kind=hierarchical", "router.top_groups=2", "experts.top_k=3"])
            .contains("experts.top_k = 3")
    );
    assert!(refused(&["router.capacity=-1"]).contains("router.capacity = -1"));
}
