//! What is in a model: parameters in total and active, experts, routers, memory, layer by layer.

use crate::params::param_defs;
use crate::spec::{FfnSpec, ModelSpec, QkNorm};
use serde::Serialize;
use std::fmt::Write;

/// A description of a model, for programs and (by [`Description::table`]) for people.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Description {
    /// The layout.
    pub family: String,
    /// Parameters, each counted once.
    pub parameters: u64,
    /// Parameters that one token meets: K of E experts, all else but the embedding table (a tied head counts).
    pub active_parameters: u64,
    /// Bytes of the parameters as f32: what training holds them in.
    pub bytes: u64,
    /// Bytes to run one sequence as long as the model can: parameters, keys and values.
    pub bytes_at_full_context: u64,
    /// Floating-point operations of a forward pass per token, averaged over a sequence of `flops_context` tokens.
    pub flops_per_token: u64,
    /// Tokens of the sequence that `flops_per_token` is for: the longest, but at most 2048.
    pub flops_context: usize,
    /// Bytes of keys and values per token of context.
    pub cache_bytes_per_token: u64,
    /// V, rows of the embedding.
    pub vocab: usize,
    /// H.
    pub hidden: usize,
    /// Longest sequence.
    pub max_positions: usize,
    /// The head is the embedding.
    pub tie_embeddings: bool,
    /// Heads, key-value heads, head width, and what is special.
    pub attention: String,
    /// Each layer.
    pub layers: Vec<LayerDescription>,
}

/// A layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerDescription {
    /// From 0.
    pub layer: usize,
    /// "dense" or "moe".
    pub kind: &'static str,
    /// E; 1 for dense.
    pub experts: usize,
    /// K; 1 for dense.
    pub top_k: usize,
    /// I, the inner width of an expert or of the dense MLP.
    pub intermediate: usize,
    /// Inner width of the shared experts together.
    pub shared_intermediate: usize,
    /// The router, in words.
    pub router: String,
    /// Parameters of the layer, attention included.
    pub parameters: u64,
    /// Their bytes as f32.
    pub bytes: u64,
    /// Of these, those that one token meets.
    pub active_parameters: u64,
}

/// Describes a model.
pub fn describe(spec: &ModelSpec, family: &str) -> Description {
    // Of each layer: all parameters, those of experts, and those of a table of token ids.
    let mut sums = vec![[0, 0, 0]; spec.layers.len()];
    for def in param_defs(spec) {
        let of_layer = def.name.strip_prefix("layers.").and_then(|rest| rest.split_once('.'));
        let Some((layer, part)) = of_layer else { continue };
        if let Some([all, experts, ids]) = layer.parse().ok().and_then(|layer: usize| sums.get_mut(layer)) {
            *all += def.len() as u64;
            *experts += if part.starts_with("experts.") { def.len() as u64 } else { 0 };
            *ids += if part == "router_table" { def.len() as u64 } else { 0 };
        }
    }
    let a = &spec.attention;
    let layers: Vec<LayerDescription> = spec
        .layers
        .iter()
        .enumerate()
        .map(|(layer, ffn)| {
            let [parameters, experts, ids] = sums[layer];
            match ffn {
                FfnSpec::Dense(mlp) => LayerDescription {
                    layer,
                    kind: "dense",
                    experts: 1,
                    top_k: 1,
                    intermediate: mlp.intermediate,
                    shared_intermediate: 0,
                    router: String::new(),
                    parameters,
                    bytes: 4 * parameters,
                    active_parameters: parameters,
                },
                FfnSpec::Moe(moe) => LayerDescription {
                    layer,
                    kind: "moe",
                    experts: moe.experts,
                    top_k: moe.top_k,
                    intermediate: moe.expert.intermediate,
                    shared_intermediate: moe.shared_intermediate,
                    router: router(moe),
                    parameters,
                    bytes: 4 * parameters,
                    active_parameters: parameters - experts - ids + experts / moe.experts as u64 * moe.met(),
                },
            }
        })
        .collect();
    let counts = spec.counts();
    // From its first layer with experts on, an ensemble has keys and values for each member.
    let moe = |layer: &FfnSpec| matches!(layer, FfnSpec::Moe(_));
    let first = spec.layers.iter().position(moe).unwrap_or(spec.layers.len());
    let caches = first + (spec.layers.len() - first) * spec.members();
    let cache_bytes_per_token = 4 * caches as u64 * a.cached() as u64;
    let flops_context = spec.max_positions.min(2048);
    let mut attention = format!("{} heads, {} key-value heads, width {}", a.heads, a.kv_heads, a.head_dim);
    match a.qk_norm {
        QkNorm::None => {}
        QkNorm::Head => attention.push_str(", normed per head"),
        QkNorm::Full => attention.push_str(", normed over all heads"),
        QkNorm::HeadAfter => attention.push_str(", normed per head after the rotation"),
    }
    match (a.qkv_bias, a.out_bias) {
        (false, false) => {}
        (true, false) => attention.push_str(", biases on q, k, v"),
        (false, true) => attention.push_str(", bias on the output"),
        (true, true) => attention.push_str(", biases"),
    }
    if let Some(window) = a.window {
        let _ = write!(attention, ", window {window}");
    }
    Description {
        family: family.to_owned(),
        parameters: counts.total,
        active_parameters: counts.active,
        bytes: counts.bytes,
        bytes_at_full_context: cache_bytes_per_token
            .saturating_mul(spec.max_positions as u64)
            .saturating_add(counts.bytes),
        flops_per_token: spec.flops_per_token(flops_context),
        flops_context,
        cache_bytes_per_token,
        vocab: spec.vocab,
        hidden: spec.hidden,
        max_positions: spec.max_positions,
        tie_embeddings: spec.tie_embeddings,
        attention,
        layers,
    }
}

fn router(moe: &crate::spec::MoeSpec) -> String {
    let r = &moe.router;
    let mut text = r.kind.clone();
    if matches!(
        r.kind.as_str(),
        "topk_pre" | "sigmoid_bias" | "softmax_bias" | "sqrt_softplus" | "top_p" | "hierarchical"
    ) {
        text.push_str(if r.normalize { ", normalized" } else { ", not normalized" });
    }
    if r.scale != 1.0 {
        let _ = write!(text, ", scale {}", r.scale);
    }
    if r.groups > 1 {
        let _ = write!(text, ", {} of {} groups", r.top_groups, r.groups);
    }
    let of_kind = ["expert_choice", "depth"].contains(&r.kind.as_str());
    for capacity in [r.eval_capacity, if of_kind { r.capacity } else { 0.0 }].into_iter().filter(|c| *c > 0.0)
    {
        let _ = write!(text, ", capacity {capacity}");
    }
    if r.kind == "soft" {
        let _ = write!(text, ", {} slots an expert", r.slots.max(1));
    }
    if r.kind == "depth" && r.predictor {
        text.push_str(", predictor");
    }
    if r.kind == "hash" && r.hash_score != senmon_moe::config::HashScore::None {
        text.push_str(", weighed by scores");
    }
    let x = &moe.extras;
    for (what, count) in [("zero", x.zero), ("identity", x.identity), ("constant", x.constant)] {
        if count > 0 {
            let _ = write!(text, ", {count} {what}");
        }
    }
    if x.residual {
        text.push_str(", residual");
    }
    if x.latent > 0 {
        let _ = write!(text, ", latent width {}", x.latent);
    }
    if x.members > 1 {
        let _ = write!(text, ", {} members", x.members);
    }
    text
}

/// 1234567 as "1.23 M".
pub fn short(n: u64) -> String {
    match n {
        0..1_000 => n.to_string(),
        1_000..1_000_000 => format!("{:.1} k", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} M", n as f64 / 1e6),
        _ => format!("{:.2} G", n as f64 / 1e9),
    }
}

impl Description {
    /// For people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let mut line = |what: &str, value: String| {
            let _ = writeln!(out, "{what:<12} {value}");
        };
        line("family", self.family.clone());
        line(
            "parameters",
            format!(
                "{} in total, {} active per token",
                short(self.parameters),
                short(self.active_parameters)
            ),
        );
        line(
            "memory",
            format!(
                "{}B as f32, as in training, and {}B of keys and values per token of context: {}B at {} tokens",
                short(self.bytes),
                short(self.cache_bytes_per_token),
                short(self.bytes_at_full_context),
                self.max_positions
            ),
        );
        line(
            "work",
            format!("{}FLOP per token at {} tokens", short(self.flops_per_token), self.flops_context),
        );
        let head = if self.tie_embeddings { "head tied to the embedding" } else { "head of its own" };
        line("tokens", format!("vocabulary {}, up to {} positions, {head}", self.vocab, self.max_positions));
        line("width", self.hidden.to_string());
        line("attention", self.attention.clone());
        let _ = writeln!(
            out,
            "\nlayer  kind   experts  top-k  width  shared  parameters      active     bytes  router"
        );
        for l in &self.layers {
            let _ = writeln!(
                out,
                "{:>5}  {:<5}  {:>7}  {:>5}  {:>5}  {:>6}  {:>10}  {:>10}  {:>8}  {}",
                l.layer,
                l.kind,
                l.experts,
                l.top_k,
                l.intermediate,
                l.shared_intermediate,
                short(l.parameters),
                short(l.active_parameters),
                short(l.bytes),
                l.router
            );
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::test_spec;

    #[test]
    fn a_description_counts_what_the_specification_counts() {
        for spec in (0..300).map(test_spec).chain(crate::spec::menu()) {
            let (description, counts) = (describe(&spec, "senmon"), spec.counts());
            let total: u64 = param_defs(&spec).iter().map(|def| def.len() as u64).sum();
            assert_eq!((description.parameters, counts.total), (total, total), "{spec:?}");
            let outside = (spec.hidden + spec.vocab * spec.hidden) as u64;
            let layers: u64 = description.layers.iter().map(|l| l.active_parameters).sum();
            assert_eq!(counts.active, layers + outside, "{spec:?}");
            assert!(description.table().lines().count() > spec.layers.len());
        }
    }
}
