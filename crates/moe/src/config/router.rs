//! `[router]`.

use serde::{Deserialize, Serialize};

/// How tokens choose experts (`[router]`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouterConfig {
    /// The kind, by its name in `router::KINDS`.
    pub kind: String,
    /// Divide the weights of the picked experts by their sum, for the kinds where that is a choice.
    pub normalize: bool,
    /// Factor on the weights (`routed_scaling_factor` of DeepSeek).
    pub scale: f64,
    /// The experts are in this many groups of equal size, of which a token may use [`top_groups`](Self::top_groups).
    pub groups: usize,
    /// Groups that a token may use.
    pub top_groups: usize,
    /// What becomes of the scores of the other groups.
    pub group_mask: GroupMask,
    /// In training, the router's copy of its input is multiplied by U(1 - jitter, 1 + jitter).
    pub jitter: f64,
    /// What `noisy_topk` adds to the logits in training.
    pub noise: Noise,
    /// Standard deviation of `noise = "fixed"`; 0 is 1/E.
    pub noise_std: f64,
    /// Factor on the standard deviation that the router's weights start from.
    pub init_scale: f64,
    /// `softmax_bias` divides its weights by their sum, or by this where the sum is less.
    pub least_sum: f64,
    /// ε of `sparsemixer`: logits within 2ε of the greatest, in parts of it, share the softmax.
    pub sparsemixer_eps: f64,
    /// `top_p` takes the fewest experts whose probabilities sum to this.
    pub p: f64,
    /// `relu` is led to this share of gates at 0; 0 is 1 - K/E.
    pub target_sparsity: f64,
    /// How `gshard` comes by its second expert.
    pub second: Second,
    /// `gshard` keeps the second expert with probability min(1, g₂ / this): 0.5 in GShard, 0.2 in Mesh TensorFlow.
    pub second_threshold: f64,
    /// Weights are normalised over what is left after drops (DeepSpeed), not before.
    pub normalize_after_drop: bool,
    /// Slots of an expert of `soft`; 0 is what makes as many slots as tokens of a sequence of training.
    pub slots: usize,
    /// What `random` does when not training.
    pub random_eval: RandomEval,
    /// What the experts of `hash` are weighted by.
    pub hash_score: HashScore,
    /// `depth` learns to tell which tokens are taken from each alone, and goes by that when not training: it is causal then.
    pub predictor: bool,
    /// Factor on the even share of an expert's tokens, beyond which it takes none in training; 0 for no bound. For `expert_choice`
    /// and `depth` it is what they take, with 0 as 1 and 1/8.
    pub capacity: f64,
    /// The same when not training.
    pub eval_capacity: f64,
    /// An expert takes this many at least, whatever the factor says.
    pub min_capacity: usize,
    /// Tokens that a capacity is of, one group after another; 0 is all tokens of a pass.
    pub group_size: usize,
    /// Who is left out when an expert is full.
    pub drop: Drop,
    /// In training, this share of the experts' inner activations is set to 0 (Switch Transformer: 0.4 when fine-tuning).
    pub expert_dropout: f64,
    /// Lets a language model have a router that looks at later tokens.
    pub allow_noncausal: bool,
}

/// What becomes of the scores of groups that a token may not use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupMask {
    /// They are out.
    #[default]
    Inf,
    /// They count as 0, and win where all others are below it (some families' code in transformers).
    Zero,
}

/// The standard deviation of the noise on logits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Noise {
    /// softplus(x·W), W learned from 0 (Shazeer 2017).
    #[default]
    Learned,
    /// One number (V-MoE: 1/E).
    Fixed,
}

/// How `gshard` comes by its second expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Second {
    /// The second greatest, kept with a probability that grows with its gate (GShard).
    #[default]
    Threshold,
    /// The greatest of the logits with Gumbel noise, without the first (DeepSpeed).
    Gumbel,
    /// The second greatest, always.
    Greedy,
}

/// What `random` does when not training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RandomEval {
    /// The mean over all experts.
    #[default]
    Mean,
    /// K experts drawn by the token's id, the same at each occurrence.
    Random,
}

/// What the experts of `hash` are weighted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HashScore {
    /// All alike, 1/K (Hash Layers).
    #[default]
    None,
    /// The softmax of the logits, over the sum of the picked when `normalize`.
    Softmax,
    /// Their sigmoid, likewise.
    Sigmoid,
    /// The root of their softplus, likewise (DeepSeek-V4).
    SqrtSoftplus,
}

/// Who is left out when an expert is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Drop {
    /// The last: all first choices come before any second, then tokens in their order (GShard, Switch).
    #[default]
    Position,
    /// The last tokens, whatever choice of theirs it was (what DeepSpeed's `topkgating` and Megatron-Core call position).
    Token,
    /// As `position`, with tokens in the order of their greatest scores (V-MoE).
    Priority,
    /// The least weights (Megatron-Core's `probs`, DeepSpeed's `topkgating`).
    Gate,
    /// Whoever has the least random number (DeepSpeed's random token selection).
    Random,
}

impl RouterConfig {
    /// What a token meets when not training, in the plainest words: what is only of training is left at its defaults, and a kind that differs from a
    /// plain one in training alone is that one.
    pub fn at_inference(&self, top_k: usize) -> Self {
        let plain = Self::default();
        let (kind, normalize) = match self.kind.as_str() {
            // A learned deviation is a parameter: leaving the kind would leave it out.
            "noisy_topk" if self.noise == Noise::Fixed => ("topk_post", self.normalize),
            "gshard" => ("topk_pre", self.normalize),
            "sinkhorn" if top_k > 1 => ("topk_pre", false),
            kind => (kind, self.normalize),
        };
        let bounded =
            self.eval_capacity > 0.0 || crate::router::kind(kind).is_ok_and(|kind| kind.own_capacity);
        Self {
            kind: kind.into(),
            normalize,
            jitter: plain.jitter,
            noise: if kind == "noisy_topk" { self.noise } else { plain.noise },
            noise_std: plain.noise_std,
            init_scale: plain.init_scale,
            target_sparsity: plain.target_sparsity,
            second: plain.second,
            second_threshold: plain.second_threshold,
            expert_dropout: plain.expert_dropout,
            allow_noncausal: plain.allow_noncausal,
            capacity: if bounded { self.capacity } else { plain.capacity },
            drop: if bounded { self.drop } else { plain.drop },
            min_capacity: if bounded { self.min_capacity } else { plain.min_capacity },
            group_size: if bounded { self.group_size } else { plain.group_size },
            normalize_after_drop: bounded && self.normalize_after_drop,
            ..self.clone()
        }
    }
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            kind: "topk_pre".into(),
            normalize: true,
            scale: 1.0,
            groups: 1,
            top_groups: 1,
            group_mask: GroupMask::Inf,
            jitter: 0.0,
            noise: Noise::Learned,
            noise_std: 0.0,
            init_scale: 1.0,
            least_sum: 1e-12,
            sparsemixer_eps: 0.01,
            p: 0.4,
            target_sparsity: 0.0,
            second: Second::Threshold,
            second_threshold: 0.5,
            normalize_after_drop: false,
            slots: 0,
            random_eval: RandomEval::Mean,
            hash_score: HashScore::None,
            predictor: false,
            capacity: 0.0,
            eval_capacity: 0.0,
            min_capacity: 0,
            group_size: 0,
            drop: Drop::Position,
            expert_dropout: 0.0,
            allow_noncausal: false,
        }
    }
}
