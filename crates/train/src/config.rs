//! What a run is: the tables of `senmon.toml`. [`crate::layers`] puts one together from a preset, a file and `--set`;
//! the whole of it goes into the run folder, and a resumed run reads it from there.

use std::path::PathBuf;

use senmon_data::{DataConfig, DomainRule};
use senmon_kernels::activation::Activation;
use senmon_models::spec::{AttentionSpec, FfnSpec, MlpSpec, ModelSpec, MoeSpec, QkNorm};
use senmon_moe::config::{BalanceConfig, Extras, RouterConfig};
use serde::{Deserialize, Serialize};

use crate::error::{Result, TrainError};
use crate::schedule::{Limits, Schedule, ScheduleKind, Warmup};

/// A whole run configuration. A key that is missing from a file has the value of the preset `nano`, or, where it may be
/// left out, none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// The decoder.
    pub model: ModelConfig,
    /// The experts of its MoE layers.
    pub experts: ExpertsConfig,
    /// How tokens choose experts.
    pub router: RouterConfig,
    /// How the load is kept even.
    pub balance: BalanceConfig,
    /// AdamW.
    pub optimizer: OptimizerConfig,
    /// The learning rate over time.
    pub schedule: ScheduleConfig,
    /// Batches, and when what happens.
    pub train: TrainConfig,
    /// What is read.
    pub data: DataConfig,
}

/// `[model]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// The preset that everything starts from ([`crate::presets::NAMES`]).
    pub preset: String,
    /// The layout to write, one of [`families`]; `auto` takes the first that says exactly what the model is. Naming
    /// one also sets what the family has only one way of.
    pub family: String,
    /// L.
    pub layers: usize,
    /// H.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// V; left out, it is that of the tokenizer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vocab: Option<usize>,
    /// Longest sequence that the positions are made for.
    pub max_positions: usize,
    /// ε of every norm.
    pub norm_eps: f64,
    /// Standard deviation of freshly drawn weights; left out, √(2 / 5H): 0.056 for H = 128, 0.02 for H = 1024 ("small init", Nguyen and
    /// Salazar 2019, 1910.05895). A constant 0.02 leaves narrow models on a plateau for their first hundreds of steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_std: Option<f64>,
    /// The head is the embedding.
    pub tie_embeddings: bool,
    /// Where queries and keys are normalised.
    pub qk_norm: QkNorm,
    /// Which attention projections have biases.
    pub biases: Biases,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// A token sees itself and this many minus one before it; left out (or 0), all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// What the layers' feed-forwards are.
    pub ffn: Ffn,
    /// Inner width of a dense feed-forward; left out, it is such that a dense layer costs what an MoE layer costs
    /// ([`crate::presets::width_near`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intermediate: Option<usize>,
}

/// `[model] ffn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ffn {
    /// Experts behind a router, in the layers that `[experts]` says.
    Moe,
    /// One MLP in every layer.
    Dense,
}

/// `[model] biases`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Biases {
    /// None.
    None,
    /// On the query, key and value projections.
    Qkv,
    /// On all four projections of the attention.
    All,
}

/// `[experts]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExpertsConfig {
    /// E, one number or one for each MoE layer.
    pub count: Count,
    /// K, experts per token.
    pub top_k: usize,
    /// I, the inner width of an expert.
    pub intermediate: usize,
    /// Shared experts, of the same width; every token passes them.
    pub shared: usize,
    /// What the shared experts give is multiplied by σ(x·w) (Qwen2-MoE).
    pub shared_gate: bool,
    /// A dense MLP of an expert's width beside the routed ones, both weighted by a learned softmax (PR-MoE).
    pub residual: bool,
    /// Routed experts work in a space of this width; 0 for that of the model.
    pub latent: usize,
    /// What comes out of the narrow space is divided by its root mean square.
    pub latent_norm: bool,
    /// Experts that give nothing.
    pub zero: usize,
    /// Experts that give back their input.
    pub identity: usize,
    /// Experts that mix their input with a learned vector.
    pub constant: usize,
    /// The experts are in so many parts, each of which predicts; the predictions are averaged (the efficient ensemble).
    pub members: usize,
    /// The non-linearity of experts and dense feed-forwards.
    pub activation: Activation,
    /// They have a gate projection.
    pub gated: bool,
    /// This many layers at the bottom are dense.
    pub first_dense: usize,
    /// Of the others, layer l (from 0) is an MoE layer if l + 1 is a multiple of this.
    pub every: usize,
}

/// `[experts] count`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a number of experts, or a list with one number for each MoE layer")]
pub enum Count {
    /// The same in every MoE layer.
    Same(usize),
    /// One number for each MoE layer, bottom to top.
    PerLayer(Vec<usize>),
}

/// `[optimizer]`: AdamW.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// The greatest learning rate.
    pub lr: f64,
    /// Decay of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, on tensors of two and more dimensions.
    pub weight_decay: f64,
    /// Greatest norm of the gradient; 0 for no clipping.
    pub clip: f64,
}

/// `[schedule]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleConfig {
    /// The form.
    pub kind: ScheduleKind,
    /// Steps of warm-up, or below 1 the fraction of the run.
    pub warmup: f64,
    /// The learning rate at the end; left out, a tenth of `optimizer.lr`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_lr: Option<f64>,
    /// Fraction of the run that `wsd` spends going down.
    pub decay: f64,
}

/// `[train]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// B, sequences per micro-batch.
    pub batch: usize,
    /// S, tokens per sequence.
    pub sequence: usize,
    /// Micro-batches per optimiser step.
    pub accumulate: usize,
    /// Ends after this many optimiser steps. Of several ends the first counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Ends after this many tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Ends after this many minutes of training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minutes: Option<f64>,
    /// Everything random follows from it.
    pub seed: u64,
    /// Threads; 0 for one per core.
    pub threads: usize,
    /// How exactly weights are multiplied with activations and gradients.
    pub precision: Precision,
    /// Evaluates after so many steps; 0 only at the end.
    pub eval_every: u64,
    /// Held-out tokens of an evaluation during the run; 0 for all. The last one takes all.
    pub eval_tokens: u64,
    /// Writes the routing of a fixed part of the held-out text after so many steps, before the first and after the last; 0 never.
    pub trace_every: u64,
    /// Tokens of that part.
    pub trace_tokens: u64,
    /// Saves after so many steps; 0 only at the end.
    pub save_every: u64,
    /// Checkpoints kept, the newest ones.
    pub keep: usize,
    /// The model that the run starts from, a folder in Hugging Face layout; left out, it starts from random weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// Trains on just the batches of this file ([`crate::trainer::ReplaySource`]) rather than on text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batches: Option<PathBuf>,
}

/// `train.precision`: what both sides of the products with weights, and of those within attention, are rounded to. Weights themselves,
/// gradients, the state of the optimiser, routers, norms, softmax, the loss and all sums are f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Not at all.
    #[default]
    F32,
    /// To bf16.
    Bf16,
}

impl From<Precision> for senmon_kernels::gemm::Precision {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::Bf16,
        }
    }
}

/// The layouts of `model.family`: `auto`, and those that models are written in.
pub fn families() -> impl Iterator<Item = &'static str> {
    std::iter::once("auto").chain(senmon_models::families::FAMILIES.iter().map(|family| family.name))
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            preset: "nano".into(),
            family: "auto".into(),
            layers: 4,
            hidden: 128,
            heads: 4,
            kv_heads: 2,
            head_dim: 32,
            vocab: Some(4096),
            max_positions: 2048,
            norm_eps: 1e-6,
            init_std: None,
            tie_embeddings: true,
            qk_norm: QkNorm::Head,
            biases: Biases::None,
            rope_theta: 10_000.0,
            window: None,
            ffn: Ffn::Moe,
            intermediate: None,
        }
    }
}

impl Default for ExpertsConfig {
    fn default() -> Self {
        Self {
            count: Count::Same(8),
            top_k: 2,
            intermediate: 128,
            shared: 0,
            shared_gate: false,
            residual: false,
            latent: 0,
            latent_norm: false,
            zero: 0,
            identity: 0,
            constant: 0,
            members: 1,
            activation: Activation::Silu,
            gated: true,
            first_dense: 0,
            every: 1,
        }
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self { lr: 3e-3, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, clip: 1.0 }
    }
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self { kind: ScheduleKind::Cosine, warmup: 0.05, min_lr: None, decay: 0.2 }
    }
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            batch: 16,
            sequence: 256,
            accumulate: 1,
            steps: None,
            tokens: Some(20_000_000),
            minutes: None,
            seed: 0,
            threads: 0,
            precision: Precision::F32,
            eval_every: 250,
            eval_tokens: 65_536,
            trace_every: 0,
            trace_tokens: 8192,
            save_every: 250,
            keep: 3,
            init: None,
            batches: None,
        }
    }
}

impl RunConfig {
    /// Reads a whole configuration as [`RunConfig::to_toml`] wrote it. `origin` names it in errors. What a preset says
    /// today plays no part.
    pub fn from_toml(origin: &str, text: &str) -> Result<Self> {
        let table = crate::layers::parse_table(origin, text)?;
        let config = crate::layers::typed(table)?;
        config.check()?;
        Ok(config)
    }

    /// The whole configuration, every key that has a value.
    pub fn to_toml(&self) -> Result<String> {
        let body = toml::to_string(self).map_err(|e| {
            TrainError::Conflict(format!(
                "the configuration cannot be written: {}",
                crate::layers::one_line(e)
            ))
        })?;
        Ok(format!("# The whole configuration of this run; `--resume` goes on with it.\n\n{body}"))
    }

    /// What the model is made of.
    ///
    /// The special tokens are not filled in: the tokenizer knows them. Fails where the vocabulary is still unknown
    /// ([`RunConfig::fit_tokenizer`]).
    pub fn model_spec(&self) -> Result<ModelSpec> {
        let m = &self.model;
        let vocab = m.vocab.ok_or_else(|| {
            TrainError::Conflict(
                "model.vocab is not known before the tokenizer is read: set model.vocab".into(),
            )
        })?;
        let mut counts = self.expert_counts()?.into_iter();
        let dense = || {
            let intermediate = m.intermediate.unwrap_or_else(|| self.twin_width());
            Ok(FfnSpec::Dense(self.mlp(intermediate)))
        };
        let layers = (0..m.layers)
            .map(|layer| match self.is_moe(layer).then(|| counts.next()).flatten() {
                None => dense(),
                Some(experts) => Ok(FfnSpec::Moe(self.moe_spec(experts))),
            })
            .collect::<Result<Vec<_>>>()?;
        let attention = AttentionSpec {
            qkv_bias: m.biases != Biases::None,
            out_bias: m.biases == Biases::All,
            qk_norm: m.qk_norm,
            window: m.window,
            rope_theta: m.rope_theta,
            ..AttentionSpec::plain(m.heads, m.kv_heads, m.head_dim)
        };
        Ok(ModelSpec {
            max_positions: m.max_positions,
            norm_eps: m.norm_eps,
            tie_embeddings: m.tie_embeddings,
            init_std: m.init_std.unwrap_or_else(|| (2.0 / (5.0 * m.hidden.max(1) as f64)).sqrt()),
            ..ModelSpec::plain(vocab, m.hidden, attention, layers)
        })
    }

    /// Takes note of the tokenizer's size: fills in `model.vocab` where it was left out, and refuses a tokenizer with
    /// more tokens than the model has.
    pub fn fit_tokenizer(&mut self, tokens: usize) -> Result<()> {
        match self.model.vocab {
            None => {
                self.model.vocab = Some(tokens);
                Ok(())
            }
            Some(vocab) if tokens > vocab => Err(TrainError::Conflict(format!(
                "the tokenizer has {tokens} tokens and the model's vocabulary {vocab}: set model.vocab = {tokens}, \
                 or take the model's own tokenizer"
            ))),
            Some(_) => Ok(()),
        }
    }

    /// Makes all paths absolute, so that the run can be resumed from any folder.
    pub fn make_paths_absolute(&mut self) -> Result<()> {
        let absolute = |path: &mut PathBuf| {
            *path = std::path::absolute(&*path).map_err(TrainError::io("find", path.clone()))?;
            Ok::<_, TrainError>(())
        };
        self.data.paths.iter_mut().try_for_each(absolute)?;
        self.data.tokenizer.iter_mut().try_for_each(absolute)?;
        self.train.init.iter_mut().chain(&mut self.train.batches).try_for_each(absolute)?;
        if let DomainRule::File(path) = &mut self.data.domains {
            absolute(path)?;
        }
        Ok(())
    }

    /// The learning rate's schedule.
    pub fn schedule(&self) -> Schedule {
        let s = &self.schedule;
        let warmup = if s.warmup < 1.0 { Warmup::Fraction(s.warmup) } else { Warmup::Steps(s.warmup as u64) };
        Schedule {
            kind: s.kind,
            lr: self.optimizer.lr,
            min_lr: s.min_lr.unwrap_or(self.optimizer.lr / 10.0),
            warmup,
            decay: s.decay,
            // Minutes may end the run earlier: then the steps say nothing of its progress.
            total_steps: if self.train.minutes.is_some() {
                None
            } else {
                self.limits().total_steps(self.tokens_per_step())
            },
        }
    }

    /// When the run ends.
    pub fn limits(&self) -> Limits {
        Limits { steps: self.train.steps, tokens: self.train.tokens, minutes: self.train.minutes }
    }

    /// Tokens of one optimiser step.
    pub fn tokens_per_step(&self) -> u64 {
        let t = &self.train;
        (t.batch as u64).saturating_mul(t.sequence as u64).saturating_mul(t.accumulate as u64)
    }

    /// True if layer `layer` (from 0) has experts.
    pub fn is_moe(&self, layer: usize) -> bool {
        self.model.ffn == Ffn::Moe
            && layer >= self.experts.first_dense
            && (layer + 1).is_multiple_of(self.experts.every.max(1))
    }

    /// E of each MoE layer, bottom to top.
    pub fn expert_counts(&self) -> Result<Vec<usize>> {
        let layers = (0..self.model.layers).filter(|&l| self.is_moe(l)).count();
        match &self.experts.count {
            Count::Same(count) => Ok(vec![*count; layers]),
            Count::PerLayer(counts) if self.model.ffn == Ffn::Dense || counts.len() == layers => {
                Ok(counts.iter().copied().take(layers).collect())
            }
            Count::PerLayer(counts) => Err(TrainError::Conflict(format!(
                "experts.count lists {} numbers and the model has {layers} MoE layers: give one for each",
                counts.len()
            ))),
        }
    }

    /// A layer of `experts` experts.
    pub(crate) fn moe_spec(&self, experts: usize) -> MoeSpec {
        let e = &self.experts;
        let mut router = self.router.clone();
        if router.kind == "soft" && router.slots == 0 {
            // As many slots as tokens, as the paper has it.
            router.slots = self.train.sequence.div_ceil(experts.max(1));
        }
        MoeSpec {
            shared_intermediate: e.shared.saturating_mul(e.intermediate),
            shared_gate: e.shared_gate && e.shared > 0,
            router,
            extras: Extras {
                zero: e.zero,
                identity: e.identity,
                constant: e.constant,
                residual: e.residual,
                latent: e.latent,
                latent_norm: e.latent_norm,
                members: if e.members > 1 { e.members } else { 0 },
            },
            ..MoeSpec::plain(experts, e.top_k, self.mlp(e.intermediate))
        }
    }

    fn mlp(&self, intermediate: usize) -> MlpSpec {
        MlpSpec { intermediate, activation: self.experts.activation, gated: self.experts.gated, bias: false }
    }

    /// The width of a dense feed-forward that costs what an MoE layer of `[experts]` costs.
    pub(crate) fn twin_width(&self) -> usize {
        let counts = match &self.experts.count {
            Count::Same(count) => vec![*count],
            Count::PerLayer(counts) => counts.clone(),
        };
        let flops = |count: &usize| self.moe_spec(*count).flops_per_token(self.model.hidden);
        let mean = counts.iter().map(flops).sum::<f64>() / counts.len().max(1) as f64;
        let matrices = if self.experts.gated { 3.0 } else { 2.0 };
        crate::presets::width_near(mean / (2.0 * matrices * self.model.hidden.max(1) as f64))
    }

    /// True if some layer is dense.
    pub(crate) fn has_dense(&self) -> bool {
        (0..self.model.layers).any(|l| !self.is_moe(l))
    }
}
