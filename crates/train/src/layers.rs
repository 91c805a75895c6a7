//! How a configuration comes together: a preset, over it a TOML file, over that every `--set table.key=value`. What is
//! left unsaid then follows from what is said: a vocabulary from its tokenizer, a head's width from the number of heads.

use std::path::Path;

use serde::de::{self, Deserialize, Deserializer, Visitor};
use toml::{Table, Value};

use senmon_models::spec::{FfnSpec, ModelSpec};

use crate::config::{Biases, Count, ExpertsConfig, Ffn, ModelConfig, RunConfig};
use crate::error::{Result, TrainError};
use crate::sizes::parse_size;

/// The layers of a configuration, lowest first: preset, files, `--set`.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    base: Option<RunConfig>,
    preset: Option<String>,
    files: Vec<Table>,
    set: Table,
}

impl Layers {
    /// Nothing but the default preset, `nano`.
    pub fn new() -> Self {
        Self::default()
    }

    /// Over the configuration of an earlier run, instead of a preset.
    pub fn over(config: RunConfig) -> Self {
        Self { base: Some(config), ..Self::default() }
    }

    /// Starts from this preset, whatever a file says.
    pub fn preset(mut self, name: &str) -> Self {
        self.preset = Some(name.to_owned());
        self
    }

    /// A TOML file over what there is.
    pub fn file(self, path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(TrainError::io("read", path))?;
        self.toml(&path.display().to_string(), &text)
    }

    /// The text of a TOML file over what there is; `origin` names it in errors.
    pub fn toml(mut self, origin: &str, text: &str) -> Result<Self> {
        self.files.push(parse_table(origin, text)?);
        Ok(self)
    }

    /// A `--set` argument, `table.key=value`, over all files. The value is read as TOML, else it is a bare string.
    pub fn set(self, argument: &str) -> Result<Self> {
        let origin = format!("--set {argument}");
        let wrong = || TrainError::Syntax {
            origin: origin.clone(),
            reason: "expected table.key=value, as in optimizer.lr=1e-3".into(),
        };
        let (name, text) = argument.split_once('=').ok_or_else(wrong)?;
        let text = text.trim();
        let value = format!("value = {text}")
            .parse::<Table>()
            .ok()
            .filter(|t| t.len() == 1)
            .and_then(|mut t| t.remove("value"))
            .unwrap_or_else(|| Value::String(text.to_owned()));
        self.put(&origin, name.trim(), value, wrong)
    }

    /// Over the presets and under every file: what a given model is made of, as far as a configuration can say it.
    pub fn model(mut self, spec: &ModelSpec, family: &str) -> Result<Self> {
        self.files.insert(0, describe(spec, family)?);
        Ok(self)
    }

    /// A key of one of these tables that a file or `--set` names, `table.key`, other than those of `except`.
    pub fn says(&self, tables: &[&str], except: &[&str]) -> Option<String> {
        self.files.iter().chain([&self.set]).find_map(|layer| {
            tables.iter().find_map(|table| {
                let keys = layer.get(*table)?.as_table()?.keys();
                keys.map(|key| format!("{table}.{key}")).find(|name| !except.contains(&name.as_str()))
            })
        })
    }

    /// The value of one key, `table.key`, as a file or `--set` gives it; `--set` wins.
    pub fn text(&self, table: &str, key: &str) -> Option<String> {
        [&self.set].into_iter().chain(self.files.iter().rev()).find_map(|layer| text(layer, table, key))
    }

    /// The value of one key, `table.key`, over all files: for flags such as `--minutes`.
    pub fn set_value(self, name: &str, value: impl Into<Value>) -> Result<Self> {
        let origin = format!("--set {name}");
        let wrong = || TrainError::Syntax { origin: origin.clone(), reason: "expected table.key".into() };
        self.put(&origin, name, value.into(), wrong)
    }

    fn put(mut self, origin: &str, name: &str, value: Value, wrong: impl Fn() -> TrainError) -> Result<Self> {
        let (table, key) = name.split_once('.').ok_or_else(&wrong)?;
        if table.is_empty() || key.is_empty() || key.contains('.') {
            return Err(wrong());
        }
        let one =
            Table::from_iter([(table.to_owned(), Value::Table(Table::from_iter([(key.to_owned(), value)])))]);
        let mut one = checked(origin, one)?;
        coerce_strings(&mut one);
        merge(&mut self.set, one);
        Ok(self)
    }

    /// The whole configuration, checked.
    pub fn resolve(self) -> Result<RunConfig> {
        let mut user = Table::new();
        for layer in self.files.into_iter().chain([self.set.clone()]) {
            // A layer that names an end of the run replaces the ends of those below it.
            if ENDS.iter().any(|end| has(&layer, "train", end)) {
                remove(&mut user, "train", ENDS);
            }
            merge(&mut user, layer);
        }
        let mut all = match self.base {
            Some(config) => to_table(&config)?,
            None => {
                // The flag wins over a file, `--set model.preset` over the flag.
                let name = text(&self.set, "model", "preset")
                    .or(self.preset)
                    .or_else(|| text(&user, "model", "preset"))
                    .unwrap_or_else(|| crate::presets::NAMES[0].to_owned());
                let preset = crate::presets::preset(&name)?;
                remove(&mut user, "model", &["preset"]);
                to_table(&preset)?
            }
        };
        follow(&mut all, &user);
        merge(&mut all, user);
        // 0 says that there is none.
        if get(&all, "model", "window").and_then(Value::as_integer) == Some(0) {
            remove(&mut all, "model", &["window"]);
        }
        let mut config = typed(all)?;
        config.settle()?;
        config.check()?;
        Ok(config)
    }
}

/// The keys of `[train]` that end a run.
const ENDS: &[&str] = &["steps", "tokens", "minutes"];

/// Changes `base` where what `user` says has consequences for keys that `user` does not mention.
fn follow(base: &mut Table, user: &Table) {
    let said = |table: &str, key: &str| has(user, table, key);
    if let Some(family) = text(user, "model", "family") {
        merge(base, family_defaults(&family));
    }
    if ENDS.iter().any(|end| said("train", end)) {
        remove(base, "train", ENDS);
    }
    // Batches from a file are the whole run.
    if said("train", "batches") && !ENDS.iter().any(|end| said("train", end)) {
        remove(base, "train", ENDS);
    }
    if said("optimizer", "lr") {
        remove(base, "schedule", &["min_lr"]);
    }
    // A width that was derived from other widths is derived again when those change.
    let of_cost = [
        "count",
        "top_k",
        "intermediate",
        "shared",
        "gated",
        "latent",
        "residual",
        "zero",
        "identity",
        "constant",
    ];
    if of_cost.iter().any(|key| said("experts", key)) || said("router", "kind") {
        remove(base, "model", &["intermediate"]);
    }
    // One vocabulary for the model and the tokenizer trained for it.
    if said("data", "tokenizer") {
        remove(base, "model", &["vocab"]);
    } else if let (Some(vocab), false) = (get(user, "data", "vocab"), said("model", "vocab")) {
        put(base, "model", "vocab", vocab.clone());
    } else if let (Some(vocab), false) = (get(user, "model", "vocab"), said("data", "vocab")) {
        put(base, "data", "vocab", vocab.clone());
    }
    let number = |table: &Table, t: &str, k: &str| get(table, t, k).and_then(Value::as_integer);
    let of = |t: &str, k: &str, base: &Table| number(user, t, k).or_else(|| number(base, t, k));
    if let (Some(hidden), Some(heads)) = (of("model", "hidden", base), of("model", "heads", base)) {
        if (said("model", "hidden") || said("model", "heads")) && !said("model", "head_dim") && heads > 0 {
            put(base, "model", "head_dim", Value::Integer(hidden / heads));
        }
        if let (false, Some(kv)) = (said("model", "kv_heads"), number(base, "model", "kv_heads"))
            && (kv <= 0 || heads % kv != 0)
        {
            put(base, "model", "kv_heads", Value::Integer(heads));
        }
    }
    if let (Some(s), Some(p)) = (number(user, "train", "sequence"), number(base, "model", "max_positions"))
        && s > p
        && !said("model", "max_positions")
    {
        put(base, "model", "max_positions", Value::Integer(s));
    }
    if (said("router", "kind") || said("model", "family"))
        && let Some(kind) = text(user, "router", "kind").or_else(|| text(base, "router", "kind"))
    {
        follow_kind(base, user, &kind);
    }
}

/// What a kind of router is mostly trained with.
fn follow_kind(base: &mut Table, user: &Table, kind: &str) {
    let mut set = |table: &str, key: &str, value: Value| put(base, table, key, value);
    let (float, whole) = (Value::Float, Value::Integer);
    // What evens out the load by itself needs no auxiliary loss, which would work against it.
    if senmon_moe::router::kind(kind).is_ok_and(|kind| kind.even) {
        set("balance", "aux", float(0.0));
    }
    match kind {
        "sigmoid_bias" | "softmax_bias" | "sqrt_softplus" => {
            let quantile = get(user, "balance", "quantile").and_then(Value::as_bool) == Some(true);
            set("balance", "aux", float(0.0));
            set("balance", "bias_rate", float(if quantile { 0.0 } else { 1e-3 }));
        }
        "noisy_topk" => {
            set("balance", "aux", float(0.0));
            set("balance", "importance", float(0.01));
            set("balance", "load", float(0.01));
        }
        "top_p" => {
            set("balance", "entropy", float(1e-4));
            set("experts", "top_k", whole(4));
        }
        "hierarchical" => set("router", "groups", whole(2)),
        "depth" => set("experts", "count", whole(1)),
        // Nobody asks what its logits are.
        "hash" | "random" => set("balance", "z", float(0.0)),
        _ => {}
    }
    match kind {
        "switch" | "base" | "depth" => set("experts", "top_k", whole(1)),
        "gshard" | "sparsemixer" => set("experts", "top_k", whole(2)),
        _ => {}
    }
}

/// The tables that say a model, as far as they can: layers in no regular pattern are said as if they were all alike.
fn describe(spec: &ModelSpec, family: &str) -> Result<Table> {
    let mut config = RunConfig::default();
    let a = &spec.attention;
    config.model = ModelConfig {
        family: family.to_owned(),
        layers: spec.layers.len(),
        hidden: spec.hidden,
        heads: a.heads,
        kv_heads: a.kv_heads,
        head_dim: a.head_dim,
        vocab: Some(spec.vocab),
        max_positions: spec.max_positions,
        norm_eps: spec.norm_eps,
        tie_embeddings: spec.tie_embeddings,
        qk_norm: a.qk_norm,
        biases: match (a.qkv_bias, a.out_bias) {
            (false, _) => Biases::None,
            (true, false) => Biases::Qkv,
            (true, true) => Biases::All,
        },
        rope_theta: a.rope_theta,
        window: a.window,
        ffn: if spec.first_moe().is_some() { Ffn::Moe } else { Ffn::Dense },
        intermediate: None,
        ..config.model
    };
    let dense = spec.layers.iter().find_map(|layer| match layer {
        FfnSpec::Dense(mlp) => Some(mlp),
        FfnSpec::Moe(_) => None,
    });
    config.model.intermediate = dense.map(|mlp| mlp.intermediate);
    if let Some(mlp) = dense {
        (config.experts.activation, config.experts.gated) = (mlp.activation, mlp.gated);
    }
    if let Some(moe) = spec.first_moe() {
        config.router = moe.router.clone();
        config.experts = ExpertsConfig {
            count: Count::Same(moe.experts),
            top_k: moe.top_k,
            intermediate: moe.expert.intermediate,
            shared: moe.shared_intermediate.div_ceil(moe.expert.intermediate.max(1)),
            shared_gate: moe.shared_gate,
            residual: moe.extras.residual,
            latent: moe.extras.latent,
            latent_norm: moe.extras.latent_norm,
            zero: moe.extras.zero,
            identity: moe.extras.identity,
            constant: moe.extras.constant,
            members: moe.extras.members.max(1),
            activation: moe.expert.activation,
            gated: moe.expert.gated,
            ..config.experts
        };
        let is_moe: Vec<bool> = spec.layers.iter().map(|l| matches!(l, FfnSpec::Moe(_))).collect();
        let mut patterns =
            (1..=is_moe.len()).flat_map(|every| (0..is_moe.len()).map(move |first| (first, every)));
        let fits = |&(first, every): &(usize, usize)| {
            is_moe.iter().enumerate().all(|(l, moe)| *moe == (l >= first && (l + 1).is_multiple_of(every)))
        };
        if let Some((first_dense, every)) = patterns.find(fits) {
            (config.experts.first_dense, config.experts.every) = (first_dense, every);
            let counts: Vec<usize> = spec
                .layers
                .iter()
                .filter_map(|layer| match layer {
                    FfnSpec::Moe(moe) => Some(moe.experts),
                    FfnSpec::Dense(_) => None,
                })
                .collect();
            if counts.iter().any(|count| *count != moe.experts) {
                config.experts.count = Count::PerLayer(counts);
            }
        }
    }
    let mut all = to_table(&config)?;
    all.retain(|table, _| MODEL_TABLES.contains(&table));
    remove(&mut all, "model", &["preset"]);
    Ok(all)
}

/// The tables that say what a model is.
pub const MODEL_TABLES: &[&str] = &["model", "experts", "router"];

/// What a family has only one way of, so that naming it is enough.
fn family_defaults(family: &str) -> Table {
    let text = match family {
        "mixtral" => "model.qk_norm = 'none'\nrouter.kind = 'topk_post'",
        "olmoe" => "model.qk_norm = 'full'\nrouter.kind = 'topk_pre'\nrouter.normalize = false",
        "qwen3_moe" => "model.qk_norm = 'head'\nrouter.kind = 'topk_pre'",
        "dots1" => {
            "model.qk_norm = 'head'\nrouter.kind = 'sigmoid_bias'\nexperts.first_dense = 1\nexperts.shared = 1"
        }
        "llama" => "model.qk_norm = 'none'\nmodel.ffn = 'dense'",
        "qwen3" => "model.qk_norm = 'head'\nmodel.ffn = 'dense'",
        _ => "",
    };
    text.parse().unwrap_or_default()
}

impl RunConfig {
    /// Writes down what was left to be derived.
    fn settle(&mut self) -> Result<()> {
        if self.schedule.min_lr.is_none() {
            self.schedule.min_lr = Some(self.optimizer.lr / 10.0);
        }
        // Not checked yet: a number of layers that will be refused is not counted through.
        if self.model.intermediate.is_none() && self.model.layers <= 1 << 16 && self.has_dense() {
            self.model.intermediate = Some(self.twin_width());
        }
        Ok(())
    }
}

/// Reads TOML text as tables of known keys.
pub(crate) fn parse_table(origin: &str, text: &str) -> Result<Table> {
    let table = text.parse::<Table>().map_err(|e| {
        let line = e.span().map(|s| text[..s.start.min(text.len())].matches('\n').count() + 1);
        let place = line.map_or_else(String::new, |l| format!("line {l}: "));
        TrainError::Syntax { origin: origin.to_owned(), reason: format!("{place}{}", one_line(e.message())) }
    })?;
    checked(origin, table)
}

/// The configuration that tables of known keys say.
pub(crate) fn typed(table: Table) -> Result<RunConfig> {
    match Value::Table(table.clone()).try_into() {
        Ok(config) => Ok(config),
        Err(whole) => {
            // Which key is it? The one that fails alone.
            for (name, keys) in &table {
                for (key, value) in keys.as_table().into_iter().flatten() {
                    let mut one = Table::new();
                    put(&mut one, name, key, value.clone());
                    if let Err(e) = Value::Table(one).try_into::<RunConfig>() {
                        return Err(TrainError::bad(&format!("{name}.{key}"), value, one_line(e.message())));
                    }
                }
            }
            Err(TrainError::Conflict(one_line(whole.message())))
        }
    }
}

/// A message without line breaks.
pub(crate) fn one_line(message: impl ToString) -> String {
    message.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Refuses unknown tables and keys by name; turns sizes with suffixes into numbers.
fn checked(origin: &str, mut table: Table) -> Result<Table> {
    let known = known_keys();
    let template = template();
    for (name, value) in table.iter_mut() {
        let Some((_, keys)) = known.iter().find(|(t, _)| t == name) else {
            let (table, hint) = if value.is_table() {
                (name.clone(), nearest(name, known.iter().map(|(t, _)| *t)))
            } else {
                return Err(TrainError::Syntax {
                    origin: origin.to_owned(),
                    reason: format!("`{name}` stands outside the tables{}", elsewhere(name, "", &known)),
                });
            };
            return Err(TrainError::UnknownTable { origin: origin.to_owned(), table, hint });
        };
        let Some(entries) = value.as_table_mut() else {
            return Err(TrainError::Syntax {
                origin: origin.to_owned(),
                reason: format!("`{name}` is a table: write [{name}], and its keys below"),
            });
        };
        for (key, value) in entries.iter_mut() {
            if !keys.contains(&key.as_str()) {
                let mut hint = elsewhere(key, name, &known);
                if hint.is_empty() {
                    hint = nearest(key, keys.iter().copied());
                }
                return Err(TrainError::UnknownKey {
                    origin: origin.to_owned(),
                    table: name.clone(),
                    key: key.clone(),
                    hint,
                });
            }
            coerce_size(value, get(&template, name, key));
        }
    }
    Ok(table)
}

/// "; did you mean …?" for the most similar name, or the list of all when none is.
fn nearest<'a>(word: &str, names: impl Iterator<Item = &'a str> + Clone) -> String {
    let best = names.clone().map(|n| (strsim::jaro_winkler(word, n), n)).max_by(|a, b| a.0.total_cmp(&b.0));
    match best {
        Some((likeness, name)) if likeness > 0.75 => format!("; did you mean `{name}`?"),
        _ => format!("; there are {}", names.collect::<Vec<_>>().join(", ")),
    }
}

/// "; did you mean [table] key?" where another table has just this key.
fn elsewhere(key: &str, not: &str, known: &[(&'static str, &'static [&'static str])]) -> String {
    let found = known.iter().find(|(t, keys)| *t != not && keys.contains(&key));
    found.map_or_else(String::new, |(t, _)| format!("; did you mean `{key}` in [{t}]?"))
}

/// Where a whole number is wanted, `"4k"` and `1e6` are one; where a number is wanted, `"2k"` is one.
fn coerce_size(value: &mut Value, template: Option<&Value>) {
    let wanted = match template {
        Some(Value::Integer(_)) => true,
        Some(Value::Float(_)) => false,
        _ => return,
    };
    let new = match value {
        Value::String(s) => parse_size(s).and_then(|n| i64::try_from(n).ok()),
        Value::Float(f) if wanted && f.fract() == 0.0 && f.abs() < 9e15 => Some(*f as i64),
        _ => None,
    };
    if let Some(n) = new {
        *value = Value::Integer(n);
    }
}

/// `--set data.column=123` and `--set data.paths=texts` mean a string and a list of one.
fn coerce_strings(table: &mut Table) {
    let template = template();
    for (name, entries) in table.iter_mut() {
        for (key, value) in entries.as_table_mut().into_iter().flatten() {
            match get(&template, name, key) {
                Some(Value::String(_)) if !value.is_str() && !value.is_array() && !value.is_table() => {
                    *value = Value::String(value.to_string());
                }
                Some(Value::Array(_)) if value.is_str() => *value = Value::Array(vec![value.clone()]),
                _ => {}
            }
        }
    }
}

/// A configuration in which every key has a value: it tells what each key's type is.
fn template() -> Table {
    let mut config = RunConfig::default();
    config.model.vocab = Some(1);
    config.model.window = Some(1);
    config.model.intermediate = Some(1);
    config.model.ffn = Ffn::Moe;
    config.experts.count = Count::Same(1);
    config.schedule.min_lr = Some(0.5);
    config.train.steps = Some(1);
    config.train.tokens = Some(1);
    config.train.minutes = Some(0.5);
    config.train.init = Some("model".into());
    config.train.batches = Some("batches.safetensors".into());
    config.data.tokenizer = Some("tokenizer.json".into());
    to_table(&config).unwrap_or_default()
}

fn to_table(config: &RunConfig) -> Result<Table> {
    Table::try_from(config).map_err(|e| {
        TrainError::Conflict(format!("the configuration cannot be written as TOML: {}", one_line(e)))
    })
}

fn merge(below: &mut Table, above: Table) {
    for (key, value) in above {
        match (below.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => merge(below, above),
            (_, value) => {
                below.insert(key, value);
            }
        }
    }
}

fn get<'a>(all: &'a Table, table: &str, key: &str) -> Option<&'a Value> {
    all.get(table)?.get(key)
}

fn has(all: &Table, table: &str, key: &str) -> bool {
    get(all, table, key).is_some()
}

fn text(all: &Table, table: &str, key: &str) -> Option<String> {
    Some(get(all, table, key)?.as_str()?.to_owned())
}

fn put(all: &mut Table, table: &str, key: &str, value: Value) {
    let one = Table::from_iter([(key.to_owned(), value)]);
    merge(all, Table::from_iter([(table.to_owned(), Value::Table(one))]));
}

fn remove(all: &mut Table, table: &str, keys: &[&str]) {
    if let Some(entries) = all.get_mut(table).and_then(Value::as_table_mut) {
        for key in keys {
            entries.remove(*key);
        }
    }
}

/// Every table of a run configuration with its keys, as the types declare them.
pub fn known_keys() -> Vec<(&'static str, &'static [&'static str])> {
    use crate::config::{ExpertsConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig};
    vec![
        ("model", field_names::<ModelConfig>()),
        ("experts", field_names::<ExpertsConfig>()),
        ("router", field_names::<senmon_moe::config::RouterConfig>()),
        ("balance", field_names::<senmon_moe::config::BalanceConfig>()),
        ("optimizer", field_names::<OptimizerConfig>()),
        ("schedule", field_names::<ScheduleConfig>()),
        ("train", field_names::<TrainConfig>()),
        ("data", field_names::<senmon_data::DataConfig>()),
    ]
}

/// The names of a struct's fields, as its `Deserialize` asks for them.
fn field_names<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    struct Names<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Names<'_> {
        type Error = de::value::Error;

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _name: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> std::result::Result<V::Value, Self::Error> {
            *self.0 = fields;
            self.deserialize_any(visitor)
        }

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> std::result::Result<V::Value, Self::Error> {
            Err(de::Error::custom("only the names were wanted"))
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut names: &'static [&'static str] = &[];
    let _ = T::deserialize(Names(&mut names));
    names
}
