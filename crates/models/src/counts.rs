//! What a model has and costs: parameters, bytes, operations.

use crate::spec::{FfnSpec, LIMIT, MlpSpec, ModelSpec, MoeSpec, NormKind, QkNorm};
use senmon_moe::layer::extra_defs;
use senmon_moe::router;
use serde::Serialize;

/// What a model has and costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Parameters, each counted once (a tied head is the embedding), selection biases included.
    pub total: u64,
    /// Parameters that one token meets: norms, attention, router, K of E experts, shared experts, last norm and head. The
    /// embedding table is not among them, since a token reads one row of it; a head tied to it is.
    pub active: u64,
    /// Parameters of the embedding table, V · H.
    pub embedding: u64,
    /// Bytes of all parameters in f32.
    pub bytes: u64,
}

impl ModelSpec {
    /// Parameters and bytes of a model that is valid.
    pub fn counts(&self) -> Counts {
        let (total, active) = self.parameters_and_active();
        let total = total as u64;
        Counts {
            total,
            active: active as u64,
            embedding: (self.vocab * self.hidden) as u64,
            bytes: 4 * total,
        }
    }

    /// Floating-point operations of a forward pass per token of a sequence of `context` tokens (a multiplication and an
    /// addition are two): all matrix products of the layers, the head, and the products of attention, averaged over the
    /// sequence. A step of training takes three times as many.
    pub fn flops_per_token(&self, context: usize) -> u64 {
        let (h, a) = (self.hidden as u128, &self.attention);
        let context = context.clamp(1, LIMIT) as u128;
        let heads = a.heads as u128;
        // Widths of a head's score and of its value: latent attention works on the narrow vector itself.
        let (score, value, projections) = match &a.latent {
            None => {
                let d = a.head_dim as u128;
                (d, d, self.attention_matrices())
            }
            Some(l) => {
                let c = l.kv_rank as u128;
                (c + l.rope as u128, c, self.attention_matrices())
            }
        };
        // Token t sees min(t + 1, window) tokens: their mean is that of a triangle and a band.
        let attention = |layer: usize| {
            let window = a.window_of(layer).map_or(context, |window| (window as u128).min(context));
            let seen = window * (window + 1) / 2 + (context - window) * window;
            2 * projections + 2 * heads * (score + value) * seen / context
        };
        // From the first layer with members on, every token is there once for each of them.
        let members = self.members() as u128;
        let first = self.layers.iter().position(|layer| matches!(layer, FfnSpec::Moe(_))).unwrap_or(0);
        let layers: u128 = self
            .layers
            .iter()
            .enumerate()
            .map(|(l, layer)| match layer {
                FfnSpec::Dense(mlp) => attention(l) + 2 * mlp.parameters(self.hidden),
                FfnSpec::Moe(moe) => attention(l) + moe.flops_per_token(self.hidden) as u128,
            })
            .zip(0..)
            .map(|(cost, l)| if l >= first { cost * members } else { cost })
            .sum();
        u64::try_from(layers + 2 * members * h * self.vocab as u128).unwrap_or(u64::MAX)
    }

    /// All parameters, and those that one token meets; each factor is checked before, so that nothing here overflows.
    pub(crate) fn parameters_and_active(&self) -> (u128, u128) {
        let (h, v, a) = (self.hidden as u128, self.vocab as u128, &self.attention);
        let d = a.head_dim as u128;
        let (q, kv) = (a.heads as u128 * d, a.kv_heads as u128 * d);
        let norm = if self.norm == NormKind::Layer { 2 * h } else { h };
        let attention = 2 * norm
            + self.attention_matrices()
            + match &a.latent {
                Some(l) => {
                    let (c, rank) = (l.kv_rank as u128, l.q_rank.unwrap_or(0) as u128);
                    c + rank + if a.qkv_bias { c + l.rope as u128 + rank } else { 0 }
                }
                None if a.qkv_bias => q + 2 * kv,
                None => 0,
            }
            + if a.out_bias { h } else { 0 }
            + if a.sinks { a.heads as u128 } else { 0 }
            + match a.qk_norm {
                QkNorm::None => 0,
                QkNorm::Head | QkNorm::HeadAfter => 2 * d,
                QkNorm::Full => q + kv,
            };
        let head = norm + v * h + if self.head_bias { v } else { 0 };
        let (mut total, mut active) = (head + if self.tie_embeddings { 0 } else { v * h }, head);
        for layer in &self.layers {
            if let FfnSpec::Moe(moe) = layer
                && router::kind(&moe.router.kind).is_ok_and(|kind| kind.by_token_id)
            {
                // The table of token ids, of which a token reads a row.
                total += v * moe.top_k as u128;
            }
            let (all, met) = layer.parameters(self.hidden);
            total += attention + all;
            active += attention + met;
        }
        (total, active)
    }

    /// Elements of the matrices of an attention.
    fn attention_matrices(&self) -> u128 {
        let (h, a) = (self.hidden as u128, &self.attention);
        let heads = a.heads as u128;
        let (q, kv) = (heads * a.head_dim as u128, (a.kv_heads * a.head_dim) as u128);
        match &a.latent {
            None => 2 * h * q + 2 * h * kv,
            Some(l) => {
                let c = l.kv_rank as u128;
                let queries = match l.q_rank {
                    Some(rank) => rank as u128 * (h + q),
                    None => h * q,
                };
                let keys = h * (c + l.rope as u128) + c * heads * (l.nope + l.value) as u128;
                queries + keys + h * heads * l.value as u128
            }
        }
    }
}

impl FfnSpec {
    /// Parameters behind the norm for a residual stream of width `hidden`: all, and those that one token meets.
    pub fn parameters(&self, hidden: usize) -> (u128, u128) {
        match self {
            FfnSpec::Dense(mlp) => (mlp.parameters(hidden), mlp.parameters(hidden)),
            FfnSpec::Moe(moe) => {
                let layer = moe.layer(hidden);
                let (e, choices) = (moe.experts as u128, layer.choices() as u128);
                let k = moe.met() as u128;
                let columns = router::columns(&moe.router, layer.choices()) as u128;
                let biased = router::kind(&moe.router.kind).is_ok_and(|kind| kind.selection_bias);
                let h = hidden as u128;
                let extras = extra_defs(&layer);
                let every = columns * h
                    + if biased { choices } else { 0 }
                    + if moe.router_bias { columns } else { 0 }
                    + extras
                        .iter()
                        .map(|def| def.shape.iter().map(|n| *n as u128).product::<u128>())
                        .sum::<u128>()
                    + moe.shared().parameters(hidden)
                    + if moe.has_shared_gate() { h } else { 0 };
                let one = moe.expert.parameters(layer.inner());
                (every + e * one, every + k * one)
            }
        }
    }
}

impl MoeSpec {
    /// Experts that one token meets, by all members of an ensemble.
    pub(crate) fn met(&self) -> u64 {
        let width = router::width(&self.router, self.experts, self.top_k).ceil() as u64;
        width * self.extras.members.max(1) as u64
    }

    /// Floating-point operations of a forward pass per token in a residual stream of width `hidden`: products of the router, the experts that a
    /// token meets, the shared ones, and what stands beside them.
    pub fn flops_per_token(&self, hidden: usize) -> f64 {
        let layer = self.layer(hidden);
        let weights = |mlp: &MlpSpec, width: usize| {
            let matrices = if mlp.gated { 3.0 } else { 2.0 };
            matrices * width as f64 * mlp.intermediate as f64
        };
        let met =
            router::width(&self.router, self.experts, self.top_k) * weights(&self.expert, layer.inner());
        let columns = router::columns(&self.router, layer.choices()) as f64;
        let matrices = extra_defs(&layer).into_iter().filter(|def| def.shape.len() > 1);
        let beside: f64 = matrices.map(|def| def.shape.iter().map(|n| *n as f64).product::<f64>()).sum();
        2.0 * (met + weights(&self.shared(), hidden) + hidden as f64 * columns + beside)
    }
}

impl MlpSpec {
    /// Parameters for a residual stream of width `hidden`.
    pub fn parameters(&self, hidden: usize) -> u128 {
        let matrices = if self.gated { 3 } else { 2 };
        let h = hidden as u128;
        let biases = if self.bias && self.intermediate > 0 { self.pre() as u128 + h } else { 0 };
        matrices * h * self.intermediate as u128 + biases
    }
}

#[cfg(test)]
mod tests {
    use crate::spec::plain;

    #[test]
    fn counts_and_work_by_hand() {
        let spec = plain();
        let counts = spec.counts();
        // Norms, q and out, k and v.
        let attention = 2 * 16 + 2 * 16 * 32 + 2 * 16 * 16;
        let (dense, every) = (3 * 16 * 12, 8 * 16 + 3 * 16 * 5);
        assert_eq!(counts.embedding, 1600);
        assert_eq!(counts.total, 2 * attention + dense + every + 8 * dense + 16 + 2 * 1600);
        assert_eq!(counts.active, 2 * attention + dense + every + 2 * dense + 16 + 1600);
        assert_eq!(counts.bytes, 4 * counts.total);
        // The norms are no products; a token of three sees two on average, 2 · 2 · 32 operations each.
        let products = counts.active - 2 * 2 * 16 - 16;
        assert_eq!(spec.flops_per_token(3), 2 * products + 2 * 2 * 4 * 32);
        let mut windowed = spec.clone();
        windowed.attention.window = Some(2);
        // 1 + 2 + 2 + 2 tokens seen by four.
        assert_eq!(windowed.flops_per_token(4), 2 * products + 2 * 4 * 32 * 7 / 4);
    }
}
