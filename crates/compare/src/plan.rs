//! What is trained: from a configuration with experts and a number of tokens, the models of each arm at each equality, and their runs.

use std::fmt;
use std::str::FromStr;

use senmon_data::TextTokenizer;
use senmon_train::config::{Ffn, RunConfig};
use senmon_train::layers::Layers;
use senmon_train::presets::Footprint;
use senmon_train::setup::configure;
use serde::{Deserialize, Serialize};

use crate::error::{CompareError, Result};
use crate::sizes::{dense_form, equal, measure, smaller, with_experts, with_width};

/// Seeds of an ensemble's members are so far apart.
const MEMBER_SEEDS: u64 = 1_000_003;
/// Evaluations of a run, at most and at least.
const EVALUATIONS: (f64, f64) = (24.0, 5.0);
/// The share of a run's operations that its evaluations may take.
const EVALUATING: f64 = 0.25;

/// A kind of model.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Arm {
    /// The configuration as it was given, with experts.
    Moe,
    /// A dense model, of the size that the equality asks for.
    Dense,
    /// A dense model with as many parameters as the model with experts has in total.
    DenseTotal,
    /// Several smaller dense models, whose probabilities are averaged.
    Ensemble,
    /// Experts in members, each of which predicts (2110.03360).
    EfficientEnsemble,
    /// The model with experts behind another router.
    Router(String),
}

/// The arms by their names on a command line.
pub const ARMS: &[(&str, Arm)] = &[
    ("moe", Arm::Moe),
    ("dense", Arm::Dense),
    ("dense-total", Arm::DenseTotal),
    ("ensemble", Arm::Ensemble),
    ("efficient-ensemble", Arm::EfficientEnsemble),
];

impl Arm {
    /// The arm in a sentence.
    pub fn words(&self) -> String {
        match self {
            Self::Moe => "MoE".into(),
            Self::Dense => "dense".into(),
            Self::DenseTotal => "the large dense model".into(),
            Self::Ensemble => "the ensemble".into(),
            Self::EfficientEnsemble => "the efficient ensemble".into(),
            Self::Router(kind) => format!("router {kind}"),
        }
    }
}

impl fmt::Display for Arm {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Router(kind) => write!(f, "router-{kind}"),
            arm => f.write_str(ARMS.iter().find(|(_, a)| a == arm).map_or("", |(name, _)| name)),
        }
    }
}

impl FromStr for Arm {
    type Err = CompareError;
    fn from_str(name: &str) -> Result<Self> {
        if let Some(kind) = name.strip_prefix("router-") {
            return Ok(Self::Router(kind.to_owned()));
        }
        let found = ARMS.iter().find(|(known, _)| *known == name.trim()).map(|(_, arm)| arm.clone());
        found.ok_or_else(|| {
            let known: Vec<&str> = ARMS.iter().map(|(name, _)| *name).collect();
            CompareError::Mistake(format!("--arms {name}: no such arm; there are {}", known.join(", ")))
        })
    }
}

impl From<Arm> for String {
    fn from(arm: Arm) -> Self {
        arm.to_string()
    }
}

impl TryFrom<String> for Arm {
    type Error = CompareError;
    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

/// What is equal in a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Equality {
    /// Operations of the whole training.
    Flops,
    /// Parameters that a token meets, and tokens.
    Active,
    /// Parameters in all, and tokens.
    Total,
    /// Time spent training.
    Time,
}

impl Equality {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Flops, Self::Active, Self::Total, Self::Time];

    /// Its name on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Flops => "flops",
            Self::Active => "active",
            Self::Total => "total",
            Self::Time => "time",
        }
    }

    /// In a sentence.
    pub fn words(self) -> &'static str {
        match self {
            Self::Flops => "equal training FLOPs",
            Self::Active => "equal active parameters and tokens",
            Self::Total => "equal total parameters and tokens",
            Self::Time => "equal wall time",
        }
    }
}

impl FromStr for Equality {
    type Err = CompareError;
    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|e| e.name() == name.trim());
        found.ok_or_else(|| {
            CompareError::Mistake(format!("--equal {name}: expected flops, active, total or time"))
        })
    }
}

/// What is to be compared.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The model with experts; how long it trains says `tokens`.
    pub base: RunConfig,
    /// What the user said of it, from which routers are configured: what goes with one kind must not stay with another.
    pub layers: Layers,
    /// Tokens that it is trained on.
    pub tokens: u64,
    /// Seeds, from `train.seed` on.
    pub seeds: usize,
    /// The arms; every other one is compared with the first.
    pub arms: Vec<Arm>,
    /// Router kinds, compared with the first arm.
    pub routers: Vec<String>,
    /// The equalities.
    pub equal: Vec<Equality>,
    /// Members of the ensembles.
    pub members: usize,
}

/// A model that is trained: once for each seed and member.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// Its name in tables and of its folders; no other model has it.
    pub name: String,
    /// The arm that it was made for first.
    pub arm: Arm,
    /// The configuration of its run with the first seed.
    pub config: RunConfig,
    /// How many of it make one prediction.
    pub members: usize,
    /// Tokens that each member is trained on.
    pub tokens: u64,
    /// What all members have and cost together.
    pub footprint: Footprint,
}

impl Model {
    /// Operations of the training of all members.
    pub fn training_flops(&self) -> f64 {
        3.0 * self.footprint.flops_per_token as f64 * self.tokens as f64
    }
}

/// An arm at an equality.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// The arm.
    pub arm: Arm,
    /// What is equal.
    pub equality: Equality,
    /// Its model, by its place in [`Plan::models`].
    pub model: usize,
    /// What is equal over that of the reference; 1 for time, which only the run tells.
    pub ratio: f64,
}

/// An arm that has no model at an equality.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// The arm.
    pub arm: Arm,
    /// What was to be equal.
    pub equality: Equality,
    /// Why there is none.
    pub why: String,
}

/// One run of the trainer.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The hash of its configuration.
    pub hash: String,
    /// Its folder's name.
    pub name: String,
    /// Its whole configuration.
    pub config: RunConfig,
    /// The seed of the comparison that it belongs to.
    pub seed: u64,
    /// The model, by its place in [`Plan::models`].
    pub model: usize,
    /// Which member of it.
    pub member: usize,
}

/// All that is trained, and what for.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What the first arm has and costs.
    pub reference: Footprint,
    /// Tokens that it is trained on: whole steps.
    pub tokens: u64,
    /// The seeds.
    pub seeds: Vec<u64>,
    /// The models, each once.
    pub models: Vec<Model>,
    /// Arms at equalities.
    pub places: Vec<Place>,
    /// Arms that are not at an equality.
    pub missing: Vec<Missing>,
}

/// The hash that a run is known by: of its whole configuration, but for the number of threads.
pub fn hash_of(config: &RunConfig) -> Result<String> {
    let mut config = config.clone();
    config.train.threads = 0;
    Ok(blake3::hash(config.to_toml()?.as_bytes()).to_hex()[..16].to_owned())
}

/// A configuration as runs of a comparison need it: from random weights, to a number of tokens, with the vocabulary known.
pub fn prepared(base: &RunConfig) -> Result<RunConfig> {
    let mut config = base.clone();
    let t = &mut config.train;
    if t.init.is_some() || t.batches.is_some() {
        let what = "a comparison trains from random weights on text: leave out train.init and train.batches";
        return Err(CompareError::Mistake(what.into()));
    }
    if config.data.holdout <= 0.0 {
        let what =
            "data.holdout = 0 leaves nothing to compare on: hold some text out, as data.holdout = 0.02";
        return Err(CompareError::Mistake(what.into()));
    }
    (t.steps, t.minutes, t.trace_every) = (None, None, 0);
    // The comparison evaluates by itself, and saves when it does.
    (t.eval_every, t.save_every, t.keep) = (0, 0, 1);
    // How long it is said for each run; this stands for it until then.
    config.train.tokens = Some(config.tokens_per_step());
    config.make_paths_absolute()?;
    if let (None, Some(path)) = (config.model.vocab, &config.data.tokenizer) {
        let tokenizer = TextTokenizer::from_file(path).map_err(senmon_train::TrainError::from)?;
        config.fit_tokenizer(tokenizer.vocab_size())?;
    }
    Ok(config)
}

/// `tokens` in whole steps, at least one.
pub fn whole_steps(config: &RunConfig, tokens: f64) -> u64 {
    let step = config.tokens_per_step().max(1);
    ((tokens / step as f64).round().max(1.0) as u64).saturating_mul(step)
}

/// The steps after which a run is evaluated, the last among them: evenly spaced, as many as do not cost much beside the training.
pub fn evaluations(config: &RunConfig) -> Vec<u64> {
    let tokens = config.train.tokens.unwrap_or(0);
    let steps = tokens.div_ceil(config.tokens_per_step().max(1)).max(1);
    let held = config.train.eval_tokens.max(1) as f64;
    // Evaluating costs a third of training.
    let most =
        (3.0 * EVALUATING * tokens as f64 / held).clamp(EVALUATIONS.1, EVALUATIONS.0).min(steps as f64);
    let count = most.floor().max(1.0) as u64;
    let mut at: Vec<u64> = (1..=count).map(|i| (i * steps).div_ceil(count)).collect();
    at.dedup();
    at
}

impl Plan {
    /// The models of all arms at all equalities, and which of them are the same.
    pub fn new(ask: &Ask) -> Result<Self> {
        let base = prepared(&ask.base)?;
        let mistake = |what: &str| Err(CompareError::Mistake(what.to_owned()));
        if base.model.ffn == Ffn::Dense {
            return mistake(
                "the configuration is dense: a comparison starts from a model with experts (model.ffn = \"moe\")",
            );
        }
        if ask.seeds == 0 {
            return mistake(
                "--seeds 0: expected one or more (three or more give an interval that says something)",
            );
        }
        if ask.tokens == 0 {
            return mistake("no tokens to train on: say --tokens N or --minutes N");
        }
        let ensembles = ask.arms.iter().any(|arm| matches!(arm, Arm::Ensemble | Arm::EfficientEnsemble));
        if ensembles && ask.members < 2 {
            return mistake("--members: an ensemble has two members or more");
        }
        let mut arms: Vec<Arm> = Vec::new();
        let routers = ask.routers.iter().map(|kind| Arm::Router(kind.clone()));
        for arm in ask.arms.iter().cloned().chain(routers) {
            if !arms.contains(&arm) {
                arms.push(arm);
            }
        }
        if arms.len() < 2 {
            return mistake(
                "one arm alone is compared with nothing: name two or more in --arms and --routers",
            );
        }
        if ask.equal.is_empty() {
            return mistake("nothing to be equal: say --equal flops, active, total or time");
        }
        let tokens = whole_steps(&base, ask.tokens as f64);
        let seeds = (0..ask.seeds as u64).map(|k| base.train.seed.wrapping_add(k)).collect();
        let mut plan = Self {
            reference: measure(&base)?,
            tokens,
            seeds,
            models: Vec::new(),
            places: Vec::new(),
            missing: Vec::new(),
        };
        // At equal time stands what was trained at equal operations.
        let equalities: Vec<Equality> = Equality::ALL.into_iter().filter(|e| ask.equal.contains(e)).collect();
        for arm in &arms {
            for &equality in &equalities {
                match plan.config_of(&base, &ask.layers, arm, equality, ask.members)? {
                    Ok((config, members)) => plan.put(arm, equality, config, members)?,
                    Err(why) => plan.missing.push(Missing { arm: arm.clone(), equality, why }),
                }
            }
        }
        plan.unite();
        plan.name_twins();
        if plan.subject() != arms.first() {
            let why = plan.missing.first().map_or_else(String::new, |m| format!(" ({}: {})", m.arm, m.why));
            let first = arms.first().map_or_else(String::new, ToString::to_string);
            return Err(CompareError::Mistake(format!(
                "{first}, which all others are compared with, has no model{why}"
            )));
        }
        if plan.pairs().is_empty() {
            let why = plan.missing.first().map_or_else(String::new, |m| format!(" ({}: {})", m.arm, m.why));
            return Err(CompareError::Mistake(format!("no two arms can be compared so{why}")));
        }
        Ok(plan)
    }

    /// The configuration and the number of members of an arm at an equality, its tokens aside; or why there is none.
    fn config_of(
        &self,
        base: &RunConfig,
        layers: &Layers,
        arm: &Arm,
        equality: Equality,
        members: usize,
    ) -> Result<std::result::Result<(RunConfig, usize), String>> {
        let r = &self.reference;
        let of: fn(&Footprint) -> u64 = match equality {
            Equality::Flops | Equality::Time => |f| f.flops_per_token,
            Equality::Active => |f| f.active,
            Equality::Total => |f| f.total,
        };
        let target = of(r) as f64;
        let fixed = |config: RunConfig| -> Result<std::result::Result<(RunConfig, usize), String>> {
            let f = measure(&config)?;
            let (what, have, want) = match equality {
                // Tokens make up for what a token costs.
                Equality::Flops | Equality::Time => return Ok(Ok((config, 1))),
                Equality::Active => ("active", f.active, r.active),
                Equality::Total => ("total", f.total, r.total),
            };
            Ok(match equal(have as f64, want as f64) {
                true => Ok((config, 1)),
                false => Err(format!("has {have} {what} parameters, not {want}")),
            })
        };
        let small = |what: &str| format!("no {what} is so small");
        Ok(match arm {
            Arm::Moe => Ok((base.clone(), 1)),
            Arm::Dense => {
                let twin = dense_form(base)?;
                match equal(of(&measure(&twin)?) as f64, target) {
                    true => Ok((twin, 1)),
                    false => {
                        with_width(&twin, target, of)?.map(|c| (c, 1)).ok_or_else(|| small("dense model"))
                    }
                }
            }
            Arm::DenseTotal => match with_width(&dense_form(base)?, r.total as f64, |f| f.total)? {
                Some(config) => return fixed(config),
                None => Err(small("dense model")),
            },
            Arm::Ensemble => {
                let found = smaller(&dense_form(base)?, target / members as f64, of)?;
                found.map(|config| (config, members)).ok_or_else(|| small("member"))
            }
            Arm::EfficientEnsemble => {
                let mut config = base.clone();
                let k = (base.experts.top_k / members).max(1);
                config.experts.members = members;
                config.experts.top_k = k;
                if k == 1 {
                    // The weight of one expert must depend on the gate, or that learns nothing.
                    config.router.normalize = false;
                    if config.router.kind == "topk_post" {
                        config.router.kind = "topk_pre".into();
                    }
                }
                let made = config.check().map_err(CompareError::from).and_then(|()| measure(&config));
                match made {
                    Err(e) => Err(e.to_string()),
                    Ok(f) if equality == Equality::Active && !equal(f.active as f64, target) => {
                        match with_experts(&config, target, of)? {
                            Some(config) => Ok((config, 1)),
                            None => Err("no width of experts makes its active parameters equal".into()),
                        }
                    }
                    Ok(_) => return fixed(config),
                }
            }
            Arm::Router(kind) => {
                let config = prepared(&configure(layers.clone().set(&format!("router.kind={kind}"))?)?)?;
                // A router with another number of experts per token gets them narrower or wider.
                match equal(measure(&config)?.flops_per_token as f64, r.flops_per_token as f64) {
                    true => return fixed(config),
                    false => match with_experts(&config, r.flops_per_token as f64, |f| f.flops_per_token)? {
                        Some(config) => return fixed(config),
                        None => Err("no width of experts makes its cost equal".into()),
                    },
                }
            }
        })
    }

    /// Puts an arm at an equality, with the tokens that follow.
    fn put(&mut self, arm: &Arm, equality: Equality, mut config: RunConfig, members: usize) -> Result<()> {
        let one = measure(&config)?;
        let m = members as u64;
        let footprint = Footprint {
            total: m * one.total,
            active: m * one.active,
            flops_per_token: m * one.flops_per_token,
        };
        let cost = footprint.flops_per_token as f64 / self.reference.flops_per_token as f64;
        let by_cost = matches!(equality, Equality::Flops | Equality::Time) && !equal(cost, 1.0);
        let tokens = if by_cost { whole_steps(&config, self.tokens as f64 / cost) } else { self.tokens };
        config.train.tokens = Some(tokens);
        config.check()?;
        let ratio = |a: u64, b: u64| a as f64 / b as f64;
        let r = &self.reference;
        let ratio = match equality {
            Equality::Flops => cost * ratio(tokens, self.tokens),
            Equality::Active => ratio(footprint.active, r.active),
            Equality::Total => ratio(footprint.total, r.total),
            Equality::Time => 1.0,
        };
        let same = |m: &Model| m.config == config && m.members == members;
        let model = self.models.iter().position(same).unwrap_or_else(|| {
            let arm = arm.clone();
            self.models.push(Model { name: String::new(), arm, config, members, tokens, footprint });
            self.models.len() - 1
        });
        self.places.push(Place { arm: arm.clone(), equality, model, ratio });
        Ok(())
    }

    /// Lets one model serve all equalities that it satisfies, drops those that nothing asks for any more, and names the rest.
    fn unite(&mut self) {
        for p in 0..self.places.len() {
            let place = self.places[p].clone();
            let serves = |m: &Model| {
                let (f, r) = (&m.footprint, &self.reference);
                let same_tokens = m.tokens == self.tokens;
                match place.equality {
                    Equality::Flops | Equality::Time => {
                        let all = 3.0 * r.flops_per_token as f64 * self.tokens as f64;
                        equal(m.training_flops(), all)
                    }
                    Equality::Active => same_tokens && equal(f.active as f64, r.active as f64),
                    Equality::Total => same_tokens && equal(f.total as f64, r.total as f64),
                }
            };
            let of_arm = |m: &usize| self.places.iter().any(|q| q.model == *m && q.arm == place.arm);
            let first = (0..place.model).find(|m| of_arm(m) && serves(&self.models[*m]));
            if let Some(first) = first {
                let m = &self.models[first];
                let of = |a: u64, b: u64| a as f64 / b as f64;
                self.places[p].ratio = match place.equality {
                    Equality::Flops => {
                        m.training_flops()
                            / (3.0 * self.reference.flops_per_token as f64 * self.tokens as f64)
                    }
                    Equality::Active => of(m.footprint.active, self.reference.active),
                    Equality::Total => of(m.footprint.total, self.reference.total),
                    Equality::Time => 1.0,
                };
                self.places[p].model = first;
            }
        }
        let used: Vec<bool> =
            (0..self.models.len()).map(|m| self.places.iter().any(|p| p.model == m)).collect();
        let new = |old: usize| used[..old].iter().filter(|u| **u).count();
        self.places.iter_mut().for_each(|p| p.model = new(p.model));
        let mut keep = used.iter();
        self.models.retain(|_| keep.next().copied().unwrap_or(false));
        // A dense model of both arms is the large one.
        for place in self.places.iter().filter(|p| p.arm == Arm::DenseTotal) {
            self.models[place.model].arm = Arm::DenseTotal;
        }
        let mut names: Vec<String> = Vec::new();
        for (m, model) in self.models.iter().enumerate() {
            let mut name = model.arm.to_string();
            if self.models.iter().filter(|other| other.arm == model.arm).count() > 1 {
                for equality in self.equalities_of(m) {
                    let part = format!("-{}", equality.name());
                    name += if name.ends_with(&part) { "" } else { &part };
                }
            }
            while names.contains(&name) {
                name += "-again";
            }
            names.push(name);
        }
        self.models.iter_mut().zip(names).for_each(|(model, name)| model.name = name);
    }

    /// Says of arms that come to a model of another one at an equality that they do.
    fn name_twins(&mut self) {
        let mut twins = Vec::new();
        for (p, place) in self.places.iter().enumerate() {
            let same = |q: &&Place| q.equality == place.equality && q.model == place.model;
            if let Some(twin) = self.places[..p].iter().find(same) {
                let why = format!("is the same model as {}", twin.arm);
                twins.push(Missing { arm: place.arm.clone(), equality: place.equality, why });
            }
        }
        self.missing.extend(twins);
    }

    /// Takes a model out, which did not come to an end.
    pub fn drop_model(&mut self, model: usize, why: &str) {
        let gone = self.places.iter().filter(|place| place.model == model);
        let missing =
            |place: &Place| Missing { arm: place.arm.clone(), equality: place.equality, why: why.to_owned() };
        self.missing.extend(gone.map(missing).collect::<Vec<_>>());
        self.places.retain(|place| place.model != model);
        self.places.iter_mut().filter(|place| place.model > model).for_each(|place| place.model -= 1);
        self.models.remove(model);
    }

    /// The equalities that a model serves, each once.
    pub fn equalities_of(&self, model: usize) -> impl Iterator<Item = Equality> {
        let serves = move |e: &Equality| self.places.iter().any(|p| p.model == model && p.equality == *e);
        Equality::ALL.into_iter().filter(serves)
    }

    /// The arm that all others are compared with.
    pub fn subject(&self) -> Option<&Arm> {
        self.places.first().map(|place| &place.arm)
    }

    /// The comparisons: at each equality, the first arm with every other one, as places in [`Plan::places`]. Arms that come to the same
    /// model are compared once.
    pub fn pairs(&self) -> Vec<(usize, usize)> {
        let mut pairs: Vec<(usize, usize)> = Vec::new();
        let Some(subject) = self.subject() else { return pairs };
        for equality in Equality::ALL {
            let at = |arm: &Arm| self.places.iter().position(|p| p.equality == equality && p.arm == *arm);
            let Some(a) = at(subject) else { continue };
            for (b, other) in self.places.iter().enumerate().filter(|(_, p)| p.equality == equality) {
                let known = pairs.iter().any(|(a2, b2)| {
                    let (p, q) = (&self.places[*a2], &self.places[*b2]);
                    p.equality == equality && q.model == other.model
                });
                if other.model != self.places[a].model && !known {
                    pairs.push((a, b));
                }
            }
        }
        pairs
    }

    /// Every run, in the order in which they are trained: all models with the first seed, then with the next.
    pub fn jobs(&self) -> Result<Vec<Job>> {
        let mut jobs: Vec<Job> = Vec::new();
        for &seed in &self.seeds {
            for (model, m) in self.models.iter().enumerate() {
                for member in 0..m.members {
                    let mut config = m.config.clone();
                    config.train.seed = seed.wrapping_add(MEMBER_SEEDS * member as u64);
                    let hash = hash_of(&config)?;
                    let part = if m.members > 1 { format!("-{member}") } else { String::new() };
                    // The text and the length belong to the name: a folder is never gone on with by another comparison's run.
                    let name = format!("{}{part}-{}-seed{seed}", m.name, &hash[..6]);
                    jobs.push(Job { hash, name, config, seed, model, member });
                }
            }
        }
        Ok(jobs)
    }
}
