//! How a run configuration comes together, what is refused, and that it survives being written down.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use senmon_models::spec::{FfnSpec, QkNorm};
use senmon_train::config::{Count, Ffn};
use senmon_train::presets::{self, footprint};
use senmon_train::schedule::{ScheduleKind, Warmup};
use senmon_train::{Layers, Result, RunConfig};

fn resolve(file: &str, sets: &[&str]) -> Result<RunConfig> {
    let layers = Layers::new().toml("run.toml", file)?;
    sets.iter().try_fold(layers, |layers, set| layers.set(set))?.resolve()
}

/// The message that a file and `--set` arguments are refused with: one line that holds each of `words`.
#[track_caller]
fn refused(file: &str, sets: &[&str], words: &[&str]) {
    let error = resolve(file, sets).unwrap_err();
    let message = error.to_string();
    assert!(error.is_users_mistake(), "{message}");
    assert!(!message.contains('\n'), "{message}");
    for word in words {
        assert!(message.contains(word), "{message:?} lacks {word:?}");
    }
}

#[test]
fn nothing_said_is_nano() {
    let config = Layers::new().resolve().unwrap();
    assert_eq!(config.model.preset, "nano");
    assert_eq!(config.schedule.min_lr, Some(config.optimizer.lr / 10.0));
    assert_eq!(config.model.intermediate, None);
    assert!(config.warnings().is_empty(), "{:?}", config.warnings());
    assert!(config.balance.aux == 0.01 && config.balance.z == 0.001);
}

#[test]
fn a_file_wins_over_the_preset_and_set_over_the_file() {
    let file = "[model]\npreset = 'tiny'\nlayers = 3\n[train]\nbatch = 5\nsteps = 7\n";
    let config = resolve(file, &["train.batch=6", "optimizer.lr=1e-4", "optimizer.lr=2e-4"]).unwrap();
    assert_eq!((config.model.preset.as_str(), config.model.hidden, config.model.layers), ("tiny", 256, 3));
    assert_eq!((config.train.batch, config.train.steps, config.train.tokens), (6, Some(7), None));
    assert_eq!((config.optimizer.lr, config.schedule.min_lr), (2e-4, Some(2e-5)));
    // The flag wins over the file's preset, --set over the flag.
    let layers = Layers::new().toml("f", file).unwrap().preset("small");
    assert_eq!(layers.clone().resolve().unwrap().model.hidden, 512);
    assert_eq!(layers.set("model.preset=nano").unwrap().resolve().unwrap().model.hidden, 128);
}

#[test]
fn values_of_set_are_toml_or_bare_strings() {
    let config = resolve(
        "",
        &[
            "router.kind=topk_post",
            "schedule.kind=\"wsd\"",
            "train.tokens=1.5M",
            "train.eval_tokens = 64Ki",
            "schedule.warmup=1k",
            "optimizer.betas=[0.8, 0.9]",
            "data.column=123",
            "data.paths=texts",
            "optimizer.weight_decay=0",
            "train.batch=4e0",
            "model.tie_embeddings=false",
        ],
    )
    .unwrap();
    assert_eq!(config.router.kind, "topk_post");
    assert_eq!(config.schedule.kind, ScheduleKind::Wsd);
    assert_eq!((config.train.tokens, config.train.eval_tokens), (Some(1_500_000), 65_536));
    assert_eq!(config.schedule().warmup, Warmup::Steps(1000));
    assert_eq!(config.optimizer.betas, [0.8, 0.9]);
    assert_eq!((config.data.column.as_str(), config.data.paths.len()), ("123", 1));
    assert_eq!((config.optimizer.weight_decay, config.train.batch), (0.0, 4));
    assert!(!config.model.tie_embeddings);
    let config = resolve("[train]\ntokens = '8M'\nsequence = '1Ki'", &[]).unwrap();
    assert_eq!((config.train.tokens, config.train.sequence), (Some(8_000_000), 1024));
}

#[test]
fn an_end_replaces_the_ends_below_it() {
    let config = resolve("[train]\nsteps = 100\ntokens = 5000", &[]).unwrap();
    assert_eq!(
        (config.train.steps, config.train.tokens, config.train.minutes),
        (Some(100), Some(5000), None)
    );
    let config = resolve("[train]\nsteps = 100", &["train.minutes=3"]).unwrap();
    assert_eq!((config.train.steps, config.train.tokens, config.train.minutes), (None, None, Some(3.0)));
    assert_eq!(config.schedule().total_steps, None);
    // A run that goes on for longer.
    let longer = Layers::over(config.clone()).set_value("train.steps", 500).unwrap().resolve().unwrap();
    assert_eq!((longer.train.steps, longer.train.minutes), (Some(500), None));
    assert_eq!(Layers::over(config.clone()).resolve().unwrap(), config);
}

#[test]
fn what_follows_from_what() {
    let config = resolve("", &["model.hidden=192", "model.heads=3"]).unwrap();
    assert_eq!((config.model.head_dim, config.model.kv_heads), (64, 3));
    let config = resolve("", &["model.vocab=1000"]).unwrap();
    assert_eq!((config.model.vocab, config.data.vocab), (Some(1000), 1000));
    let config = resolve("", &["data.vocab=9000"]).unwrap();
    assert_eq!((config.model.vocab, config.data.vocab), (Some(9000), 9000));
    let config = resolve("", &["train.sequence=4096"]).unwrap();
    assert_eq!(config.model.max_positions, 4096);
    let config = resolve("", &["router.kind=sigmoid_bias"]).unwrap();
    assert_eq!((config.balance.aux, config.balance.bias_rate), (0.0, 1e-3));
    let config = resolve("[balance]\naux = 0.5", &["router.kind=sigmoid_bias"]).unwrap();
    assert_eq!((config.balance.aux, config.balance.bias_rate), (0.5, 1e-3));
    let config = resolve("", &["router.kind=switch"]).unwrap();
    assert_eq!(config.experts.top_k, 1);
    let config = resolve("", &["model.window=0"]).unwrap();
    assert_eq!(config.model.window, None);
    let config = resolve("", &["model.family=olmoe"]).unwrap();
    assert_eq!((config.model.qk_norm, config.router.normalize), (QkNorm::Full, false));
    let config = resolve("", &["model.family=dots1"]).unwrap();
    assert_eq!((config.router.kind.as_str(), config.balance.bias_rate), ("sigmoid_bias", 1e-3));
    assert!(matches!(config.model_spec().unwrap().layers[0], FfnSpec::Dense(_)));
}

#[test]
fn a_given_tokenizer_gives_the_vocabulary() {
    let mut config = resolve("", &["data.tokenizer=tokenizer.json"]).unwrap();
    assert_eq!(config.model.vocab, None);
    let error = config.model_spec().unwrap_err().to_string();
    assert!(error.contains("model.vocab"), "{error}");
    config.fit_tokenizer(777).unwrap();
    assert_eq!(config.model_spec().unwrap().vocab, 777);
    let mut config = resolve("", &["data.tokenizer=tokenizer.json", "model.vocab=500"]).unwrap();
    config.fit_tokenizer(400).unwrap();
    assert_eq!(config.model.vocab, Some(500));
    let error = config.fit_tokenizer(501).unwrap_err().to_string();
    assert!(error.contains("501") && error.contains("500"), "{error}");
}

#[test]
fn layers_with_and_without_experts() {
    let spec = |sets: &[&str]| {
        let layers = resolve("", sets).unwrap().model_spec().unwrap().layers;
        layers.iter().map(|l| matches!(l, FfnSpec::Moe(_)) as u8).collect::<Vec<_>>()
    };
    assert_eq!(spec(&[]), [1, 1, 1, 1]);
    assert_eq!(spec(&["model.ffn=dense"]), [0, 0, 0, 0]);
    assert_eq!(spec(&["experts.first_dense=1"]), [0, 1, 1, 1]);
    assert_eq!(spec(&["experts.every=2"]), [0, 1, 0, 1]);
    assert_eq!(spec(&["experts.every=2", "experts.first_dense=2"]), [0, 0, 0, 1]);
    let config = resolve("", &["experts.count=[4, 8]", "experts.every=2"]).unwrap();
    assert_eq!(config.experts.count, Count::PerLayer(vec![4, 8]));
    let experts: Vec<_> = config
        .model_spec()
        .unwrap()
        .layers
        .into_iter()
        .filter_map(|l| if let FfnSpec::Moe(m) = l { Some(m.experts) } else { None })
        .collect();
    assert_eq!(experts, [4, 8]);
}

#[test]
fn unknown_names_are_told_with_the_nearest() {
    refused("[modle]\nlayers = 1", &[], &["run.toml", "[modle]", "`model`"]);
    refused("[train]\nbach = 1", &[], &["run.toml", "`bach`", "[train]", "`batch`"]);
    refused("[train]\nlr = 1", &[], &["`lr`", "[train]", "in [optimizer]"]);
    refused("", &["model.layer=2"], &["--set model.layer=2", "`layers`"]);
    refused("", &["router.zzz=2"], &["`zzz`", "[router]", "kind, normalize"]);
    refused("lr = 3", &[], &["`lr`", "[optimizer]"]);
    refused("train = 3", &[], &["[train]"]);
    // Keys of the design that are not built yet.
    refused("", &["optimizer.sparse=true"], &["unknown key"]);
    refused("", &["model.ffn=dense", "train.trace_every=4"], &["train.trace_every", "no experts"]);
}

#[test]
fn values_that_make_no_sense_are_told_with_their_key() {
    refused("[train]\nbatch = 'many'", &[], &["train.batch", "many"]);
    refused("[train]\nbatch = -1", &[], &["train.batch", "-1"]);
    refused("[train]\nbatch = 1.5", &[], &["train.batch", "1.5"]);
    refused("[train\nbatch = 1", &[], &["run.toml", "line 1"]);
    refused("[train]\nbatch = 1\nbatch = 2", &[], &["run.toml", "line 3"]);
    refused("", &["train.batch"], &["table.key=value"]);
    refused("", &["batch=1"], &["table.key=value"]);
    refused("", &["a.b.c=1"], &["table.key=value"]);
    refused("", &["experts.top_k=9"], &["experts.top_k = 9", "experts.count = 8"]);
    refused("", &["experts.top_k=0"], &["experts.top_k = 0"]);
    refused("", &["experts.count=[8, 8]"], &["lists 2 numbers", "4 MoE layers"]);
    refused("", &["experts.count=many"], &["experts.count", "a number of experts"]);
    refused("", &["experts.first_dense=4"], &["no layer has experts", "dense"]);
    refused("", &["model.preset=huge"], &["huge", "nano, tiny, small"]);
    refused("", &["model.family=gpt9"], &["gpt9", "qwen3_moe"]);
    refused("", &["model.heads=3", "model.kv_heads=2"], &["model.heads = 3", "model.kv_heads = 2"]);
    refused("", &["model.head_dim=33"], &["model.head_dim = 33", "even"]);
    refused("", &["model.ffn=mixed"], &["model.ffn", "mixed"]);
    refused("", &["model.vocab=300", "data.vocab=400"], &["data.vocab = 400", "model.vocab = 300"]);
    refused("", &["router.kind=magic"], &["router.kind", "magic", "topk_pre"]);
    refused("", &["router.kind=switch", "experts.top_k=2"], &["switch", "experts.top_k = 2"]);
    refused("", &["router.groups=3"], &["experts.count = 8", "router.groups = 3"]);
    refused(
        "",
        &["router.kind=sigmoid_bias", "router.groups=8", "router.top_groups=1"],
        &["router.top_groups = 1", "experts.top_k = 2"],
    );
    refused("", &["router.jitter=1"], &["router.jitter = 1"]);
    refused("", &["balance.aux=-1"], &["balance.aux = -1"]);
    refused("", &["balance.convention=odd"], &["balance.convention", "odd"]);
    refused("", &["optimizer.lr=0"], &["optimizer.lr = 0"]);
    refused("", &["optimizer.lr=nan"], &["optimizer.lr"]);
    refused("", &["optimizer.betas=[0.9, 1.0]"], &["optimizer.betas = 1"]);
    refused("", &["schedule.min_lr=1"], &["schedule.min_lr = 1", "optimizer.lr"]);
    refused("", &["schedule.warmup=1.5"], &["schedule.warmup = 1.5"]);
    refused("", &["train.sequence=512", "model.max_positions=256"], &["512", "256"]);
    refused("", &["train.minutes=0"], &["train.minutes = 0"]);
    refused("", &["train.steps=0"], &["train.steps = 0"]);
    refused("", &["train.seed=-5"], &["train.seed", "-5"]);
    refused("", &["data.group=town"], &["data.group", "town"]);
    refused("", &["model.hidden=9999999999999"], &["model.hidden"]);
    // No end at all can only be said in a whole file.
    let text = Layers::new().resolve().unwrap().to_toml().unwrap().replace("tokens = 20000000\n", "");
    let error = RunConfig::from_toml("senmon.toml", &text).unwrap_err().to_string();
    assert!(error.contains("no end"), "{error}");
}

#[test]
fn what_is_warned_of() {
    let warned = |sets: &[&str]| resolve("", sets).unwrap().warnings().join("\n");
    let one = warned(&["experts.top_k=1", "balance.aux=0"]);
    assert!(one.contains("learns nothing") && one.contains("experts may die"), "{one}");
    assert!(warned(&["experts.top_k=1"]).contains("balancing alone"));
    assert_eq!(warned(&["router.kind=switch"]), "");
    assert_eq!(warned(&["experts.top_k=1", "router.normalize=false"]), "");
    assert!(warned(&["balance.bias_rate=0.1"]).contains("no effect"));
    assert!(warned(&["experts.count=2"]).contains("every expert"));
    assert!(warned(&["train.steps=10", "schedule.warmup=10"]).contains("only rises"));
    assert_eq!(warned(&["model.ffn=dense", "balance.aux=0"]), "");
}

#[test]
fn presets_are_as_large_as_they_say() {
    for (name, active) in presets::NAMES.iter().zip([1e6, 5e6, 30e6]) {
        let moe = Layers::new().preset(name).resolve().unwrap();
        let dense = Layers::new().preset(name).set("model.ffn=dense").unwrap().resolve().unwrap();
        assert_eq!(dense.model.ffn, Ffn::Dense);
        let count = |c: &RunConfig| footprint(&c.model_spec().unwrap(), c.train.sequence);
        let (m, d) = (count(&moe), count(&dense));
        println!("{name}: moe {m:?}; dense {:?} {d:?}", dense.model.intermediate);
        assert!((m.active as f64 / active - 1.0).abs() < 0.15, "{name}: {m:?}");
        assert!(
            (m.flops_per_token as f64 / d.flops_per_token as f64 - 1.0).abs() < 0.01,
            "{name}: {m:?} {d:?}"
        );
        assert!(m.total > m.active && d.total == d.active);
        assert!(moe.warnings().is_empty() && dense.warnings().is_empty());
    }
}

#[test]
fn parameters_are_counted_as_they_are() {
    let sets = [
        "model.layers=1",
        "model.hidden=8",
        "model.heads=2",
        "model.kv_heads=1",
        "model.vocab=300",
        "experts.count=4",
        "experts.top_k=1",
        "experts.intermediate=6",
        "experts.shared=1",
        "model.tie_embeddings=false",
        "model.qk_norm=none",
        "model.biases=all",
    ];
    let spec = resolve("", &sets).unwrap().model_spec().unwrap();
    let attention = 8 * 8 + 2 * 8 * 4 + 8 * 8 + (8 + 4 + 4) + 8;
    let expert = 3 * 8 * 6;
    let rest = 2 * 8 + 8 * 4 + expert + 8 + 300 * 8;
    let f = footprint(&spec, 4);
    assert_eq!(f.total, attention + 4 * expert + rest + 300 * 8);
    assert_eq!(f.active, attention + expert + rest);
    // Four tokens see 1 + 2 + 3 + 4 keys: 2.5 each, two heads of four, two products.
    let products = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 2 * expert + 8 * 4 + 300 * 8;
    assert_eq!(f.flops_per_token, 2 * products + 4 * 8 * 10 / 4);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_configuration_survives_being_written(
        layers in 1usize..9, k in 1usize..5, lr in 1e-6..1.0f64, aux in 0.0..1.0f64, eps in 1e-12..1e-3f64,
        beta in 0.0..1.0f64, minutes in prop::option::of(0.001..1e4f64), seed in 0..i64::MAX, dense: bool,
        window in prop::option::of(1usize..4096), tokenizer in prop::option::of("[a-z ü\"']{1,9}"),
        path in "[a-z/ \\\\\"\n#=]{1,12}",
    ) {
        let mut layers = Layers::new()
            .set_value("model.layers", layers as i64).unwrap()
            .set_value("experts.top_k", k as i64).unwrap()
            .set_value("optimizer.lr", lr).unwrap()
            .set_value("optimizer.eps", eps).unwrap()
            .set_value("balance.aux", aux).unwrap()
            .set_value("optimizer.betas", vec![beta, 0.99]).unwrap()
            .set_value("train.seed", seed).unwrap()
            .set_value("data.paths", vec![path]).unwrap()
            .set_value("model.ffn", if dense { "dense" } else { "moe" }).unwrap();
        if let Some(m) = minutes {
            layers = layers.set_value("train.minutes", m).unwrap();
        }
        if let Some(w) = window {
            layers = layers.set_value("model.window", w as i64).unwrap();
        }
        if let Some(t) = tokenizer {
            layers = layers.set_value("data.tokenizer", t).unwrap();
        }
        let config = layers.resolve().unwrap();
        let text = config.to_toml().unwrap();
        let again = RunConfig::from_toml("senmon.toml", &text).unwrap();
        prop_assert_eq!(&again, &config);
        prop_assert_eq!(again.to_toml().unwrap(), text);
    }

    #[test]
    fn dense_twins_cost_the_same(e in 1usize..257, k in 1usize..9, i in 1usize..2000, shared in 0usize..2000, gated: bool) {
        let width = presets::dense_twin_width(e as f64, k, i, shared, gated) as f64;
        let m = if gated { 3.0 } else { 2.0 };
        let exact = m * (k * i + shared) as f64 + e as f64;
        let off = (m * width / exact - 1.0).abs();
        // A width is a whole number: no nearer than half of one.
        prop_assert!(off < 0.01 || (m * width - exact).abs() <= m / 2.0 + 1e-9 || width == 1.0);
    }

    #[test]
    fn any_text_is_answered(file in ".{0,60}", set in "[a-z.=\\[\\]0-9\"' ]{0,30}") {
        let _ = Layers::new().toml("f", &file).and_then(Layers::resolve);
        let _ = Layers::new().set(&set).and_then(Layers::resolve);
    }

    #[test]
    fn any_value_is_answered(which in 0usize..200, value in prop_oneof![
        Just("0".to_owned()), Just("-1".to_owned()), Just("9223372036854775807".to_owned()), Just("1e300".to_owned()),
        Just("nan".to_owned()), Just("inf".to_owned()), Just("true".to_owned()), Just("[]".to_owned()),
        Just("{}".to_owned()), Just("''".to_owned()), Just("1".to_owned()), Just("2024-01-01".to_owned()), ".{0,9}"
    ], dense: bool) {
        let keys: Vec<_> = senmon_train::layers::known_keys()
            .into_iter()
            .flat_map(|(table, keys)| keys.iter().map(move |key| format!("{table}.{key}")))
            .collect();
        let key = &keys[which % keys.len()];
        let layers = Layers::new().set_value("model.ffn", if dense { "dense" } else { "moe" }).unwrap();
        if let Ok(config) = layers.set(&format!("{key}={value}")).and_then(Layers::resolve) {
            let _ = (config.model_spec(), config.warnings(), config.schedule().lr(0, 0.0));
            let text = config.to_toml().unwrap();
            prop_assert_eq!(RunConfig::from_toml("again", &text).unwrap(), config);
        }
    }
}

#[test]
fn every_table_is_known() {
    let whole: toml::Table = RunConfig::default().to_toml().unwrap().parse().unwrap();
    let known = senmon_train::layers::known_keys();
    assert_eq!(known.len(), whole.len());
    for (table, keys) in known {
        for key in whole[table].as_table().unwrap().keys() {
            assert!(keys.contains(&key.as_str()), "{table}.{key}");
        }
    }
}
