//! What the tensors of a checkpoint are called, and where each lies in the parameters.
//!
//! Every tensor of a file is a contiguous range of one parameter ([`Part`]), in a few families after a change of order:
//! loading, saving and the audit walk the same list.

use crate::params::param_defs;
use crate::spec::{FfnSpec, MlpSpec, ModelSpec, QkNorm};
use senmon_moe::layer::extra_defs;
use senmon_moe::router;
use std::collections::HashMap;

/// A tensor of a checkpoint: `shape`'s elements of parameter `param` from `offset` on.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Its name in the file.
    pub tensor: String,
    /// Its shape in the file; where the tensor is a stack, that of the one of them that this is.
    pub shape: Vec<usize>,
    /// Which of how many of the same shape, where the tensor of the file is a stack of them.
    pub stack: Option<(usize, usize)>,
    /// Index into [`param_defs`].
    pub param: usize,
    /// First element.
    pub offset: usize,
    /// The order of its elements in the file.
    pub order: Order,
}

impl Part {
    /// Elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// It has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The shape of the whole tensor in the file.
    pub fn whole_shape(&self) -> Vec<usize> {
        self.stack.iter().map(|(_, count)| *count).chain(self.shape.iter().copied()).collect()
    }
}

/// How the elements of a tensor in a file lie, compared with the parameter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// The same.
    #[default]
    Straight,
    /// \[E, A, B\] in the file, \[E, B, A\] here.
    Turned,
    /// As `Turned`, where row 2j of B rows is row j here and row 2j + 1 is row B/2 + j: gate and up by turns.
    TurnedByTurns,
    /// \[E, B\], by turns.
    ByTurns,
    /// \[R, C\] or \[R\], where in each `n` rows row 2j is row j here and row 2j + 1 is row n/2 + j: the heads of queries and
    /// keys whose neighbours turn together.
    HeadsByTurns(usize),
}

impl Order {
    /// Where element `at` of a tensor of the file, of shape `shape`, lies in its part of the parameter.
    pub(crate) fn place(self, shape: &[usize], at: usize) -> usize {
        let last = shape.last().copied().unwrap_or(1).max(1);
        let unturn = |b: usize| b / 2 + b % 2 * (last / 2);
        match self {
            Order::Straight => at,
            Order::ByTurns => at / last * last + unturn(at % last),
            Order::HeadsByTurns(_) => {
                let cols = if shape.len() < 2 { 1 } else { last };
                self.row(at / cols) * cols + at % cols
            }
            Order::Turned | Order::TurnedByTurns => {
                let a_count = shape[shape.len() - 2];
                let (row, b) = (at / last, at % last);
                let (e, a) = (row / a_count, row % a_count);
                let b = if self == Order::TurnedByTurns { unturn(b) } else { b };
                (e * last + b) * a_count + a
            }
        }
    }

    /// Where row `row` of the file is, if only rows change their places.
    pub(crate) fn row(self, row: usize) -> usize {
        match self {
            Order::HeadsByTurns(n) => row / n * n + row % n / 2 + row % 2 * (n / 2),
            _ => row,
        }
    }

    /// Rows stay whole.
    pub(crate) fn keeps_rows(self) -> bool {
        matches!(self, Order::Straight | Order::HeadsByTurns(_))
    }

    /// The elements of the file in the order of the parameter.
    pub fn read(self, shape: &[usize], file: &[f32], param: &mut [f32]) {
        file.iter().enumerate().for_each(|(at, x)| param[self.place(shape, at)] = *x);
    }

    /// The elements of the parameter in the order of the file.
    pub fn write(self, shape: &[usize], param: &[f32], file: &mut [f32]) {
        file.iter_mut().enumerate().for_each(|(at, x)| *x = param[self.place(shape, at)]);
    }
}

/// How the experts of a layer are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Experts {
    /// A tensor for each matrix of each expert, under `experts.{e}`: gate, up, down.
    Each([&'static str; 3]),
    /// Two tensors for all of them: \[E, P, H\] and \[E, H, I\].
    Fused([&'static str; 2]),
    /// As transformers has gpt-oss: \[E, H, P\], gate and up by turns, \[E, I, H\], and biases.
    FusedTurned([&'static str; 2]),
}

/// How a family names its tensors. The names of a layer follow `model.layers.{l}.`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    /// The norms before (or after) attention and feed-forward.
    pub norms: [&'static str; 2],
    /// The norm of the last layer's output.
    pub final_norm: &'static str,
    /// The output projection of attention.
    pub out: &'static str,
    /// The norms of queries and keys.
    pub qk_norms: [&'static str; 2],
    /// The MLP of a dense layer.
    pub dense: &'static str,
    /// The block that the experts are in.
    pub block: &'static str,
    /// Within the block.
    pub experts: Experts,
    /// The router's matrix within the block; its bias is beside it.
    pub router: &'static str,
    /// The bias of the selection, within the block.
    pub selection_bias: &'static str,
    /// It is \[1, E\] in the file.
    pub selection_bias_rows: bool,
    /// The shared experts, within the block or (with a dot in front) within the layer.
    pub shared: &'static str,
    /// The shared experts' gate and up are one tensor, with these names: both, down.
    pub shared_fused: Option<[&'static str; 2]>,
    /// The gate of the shared experts, within the block.
    pub shared_gate: &'static str,
}

/// The names of the projections of a dense MLP.
const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// The names that most families have: `mlp.experts.3.gate_proj`, `mlp.gate`, `mlp.shared_experts`.
pub const PLAIN: Names = Names {
    norms: ["input_layernorm", "post_attention_layernorm"],
    final_norm: "model.norm",
    out: "self_attn.o_proj",
    qk_norms: ["self_attn.q_norm", "self_attn.k_norm"],
    dense: "mlp",
    block: "mlp",
    experts: Experts::Each(PROJECTIONS),
    router: "gate",
    selection_bias: "gate.e_score_correction_bias",
    selection_bias_rows: false,
    shared: "shared_experts",
    shared_fused: None,
    shared_gate: "shared_expert_gate",
};

/// The tensors of a checkpoint, each with its place.
pub fn parts(spec: &ModelSpec, names: &Names) -> Vec<Part> {
    let defs = param_defs(spec);
    let index: HashMap<&str, usize> =
        defs.iter().enumerate().map(|(index, def)| (def.name.as_str(), index)).collect();
    let mut parts = Vec::new();
    let mut put = |tensor: String, shape: &[usize], param: &str, offset: usize, order: Order| {
        if let Some(&param) = index.get(param) {
            parts.push(Part { tensor, shape: shape.to_vec(), stack: None, param, offset, order });
        }
    };
    let (h, a, straight) = (spec.hidden, &spec.attention, Order::Straight);
    let (q, kv) = a.widths();
    put("model.embed_tokens.weight".into(), &[spec.vocab, h], "embed", 0, straight);
    for (l, ffn) in spec.layers.iter().enumerate() {
        let file = |part: &str| format!("model.layers.{l}.{part}");
        let name = |part: &str| format!("layers.{l}.{part}");
        let mut add = |tensor: &str, shape: &[usize], param: &str, offset: usize| {
            put(file(tensor), shape, &name(param), offset, straight);
        };
        let [attn_norm, ffn_norm] = names.norms;
        add(&format!("{attn_norm}.weight"), &[h], "attn_norm", 0);
        add(&format!("{attn_norm}.bias"), &[h], "attn_norm_bias", 0);
        match &a.latent {
            None => {
                let mut row = 0;
                for (part, rows) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
                    add(&format!("self_attn.{part}.weight"), &[rows, h], "qkv", row * h);
                    add(&format!("self_attn.{part}.bias"), &[rows], "qkv_bias", row);
                    row += rows;
                }
                for ((tensor, param), rows) in
                    names.qk_norms.into_iter().zip(["q_norm", "k_norm"]).zip([q, kv])
                {
                    let width = if a.qk_norm == QkNorm::Full { rows } else { a.head_dim };
                    add(&format!("{tensor}.weight"), &[width], param, 0);
                }
                add("self_attn.sinks", &[a.heads], "sinks", 0);
                add(&format!("{}.weight", names.out), &[h, q], "out", 0);
            }
            Some(latent) => {
                let (c, rank) = (latent.kv_rank, latent.q_rank.unwrap_or(0));
                add("self_attn.q_proj.weight", &[q, h], "q", 0);
                add("self_attn.q_a_proj.weight", &[rank, h], "q_a", 0);
                add("self_attn.q_a_proj.bias", &[rank], "q_a_bias", 0);
                add("self_attn.kv_a_proj_with_mqa.bias", &[c + latent.rope], "kv_a_bias", 0);
                add("self_attn.q_a_layernorm.weight", &[rank], "q_a_norm", 0);
                add("self_attn.q_b_proj.weight", &[q, rank], "q_b", 0);
                add("self_attn.kv_a_proj_with_mqa.weight", &[c + latent.rope, h], "kv_a", 0);
                add("self_attn.kv_a_layernorm.weight", &[c], "kv_a_norm", 0);
                let rows = a.heads * (latent.nope + latent.value);
                add("self_attn.kv_b_proj.weight", &[rows, c], "kv_b", 0);
                add(&format!("{}.weight", names.out), &[h, a.heads * latent.value], "out", 0);
            }
        }
        add(&format!("{}.bias", names.out), &[h], "out_bias", 0);
        add(&format!("{ffn_norm}.weight"), &[h], "ffn_norm", 0);
        add(&format!("{ffn_norm}.bias"), &[h], "ffn_norm_bias", 0);
        let mut mlp = |prefix: &str,
                       [gate, up, down]: [&str; 3],
                       into: [&str; 2],
                       spec: &MlpSpec,
                       expert: usize,
                       h: usize| {
            let (i, p) = (spec.intermediate, spec.pre());
            let first = expert * p * h;
            let tensor = |part: &str| format!("{prefix}.{part}.weight");
            if spec.bias {
                let bias = |part: &str| format!("{prefix}.{part}.bias");
                let [pre, out] = into.map(|into| format!("{into}_bias"));
                if spec.gated {
                    add(&bias(gate), &[i], &pre, expert * p);
                }
                add(&bias(up), &[i], &pre, expert * p + if spec.gated { i } else { 0 });
                add(&bias(down), &[h], &out, expert * h);
            }
            if spec.gated {
                add(&tensor(gate), &[i, h], into[0], first);
                add(&tensor(up), &[i, h], into[0], first + i * h);
            } else {
                add(&tensor(up), &[i, h], into[0], first);
            }
            add(&tensor(down), &[h, i], into[1], expert * h * i);
        };
        let moe = match ffn {
            FfnSpec::Dense(dense) => {
                mlp(names.dense, PROJECTIONS, ["gate_up", "down"], dense, 0, h);
                continue;
            }
            FfnSpec::Moe(moe) => moe,
        };
        let layer = moe.layer(h);
        let within = |part: &str| match part.strip_prefix('.') {
            Some(of_layer) => of_layer.to_owned(),
            None => format!("{}.{part}", names.block),
        };
        if let Experts::Each(projections) = names.experts {
            for e in 0..moe.experts {
                let prefix = within(&format!("experts.{e}"));
                let into = ["experts.gate_up", "experts.down"];
                mlp(&prefix, projections, into, &moe.expert, e, layer.inner());
            }
        }
        let (shared, prefix) = (moe.shared(), within(names.shared));
        match names.shared_fused {
            None => mlp(&prefix, PROJECTIONS, ["shared.gate_up", "shared.down"], &shared, 0, h),
            Some([both, down]) => {
                add(&format!("{prefix}.{both}.weight"), &[shared.pre(), h], "shared.gate_up", 0);
                add(&format!("{prefix}.{down}.weight"), &[h, shared.intermediate], "shared.down", 0);
            }
        }
        add(&format!("{}.weight", within(names.shared_gate)), &[1, h], "shared.gate", 0);
        let (choices, columns) = (layer.choices(), router::columns(&moe.router, layer.choices()));
        add(&format!("{}.weight", within(names.router)), &[columns, h], "router", 0);
        add(&format!("{}.bias", within(names.router)), &[columns], "router_logits_bias", 0);
        let rows = if names.selection_bias_rows { &[1, choices][..] } else { &[choices] };
        add(&within(names.selection_bias), rows, "router_bias", 0);
        // What no other project has keeps the names that it has in memory.
        add(&within("router_table"), &[spec.vocab, moe.top_k], "router_table", 0);
        for extra in extra_defs(&layer) {
            add(&within(extra.name), &extra.shape, extra.name, 0);
        }
        let (e, p, i) = (moe.experts, moe.expert.pre(), moe.expert.intermediate);
        match names.experts {
            Experts::Each(_) => {}
            Experts::Fused([up, down]) => {
                add(&within(up), &[e, p, h], "experts.gate_up", 0);
                add(&within(down), &[e, h, i], "experts.down", 0);
            }
            Experts::FusedTurned([up, down]) => {
                let gated = moe.expert.gated;
                let (turned, bias) = match gated {
                    true => (Order::TurnedByTurns, Order::ByTurns),
                    false => (Order::Turned, straight),
                };
                let mut put = |tensor: &str, shape: &[usize], param: &str, order: Order| {
                    put(file(&within(tensor)), shape, &name(param), 0, order);
                };
                put(up, &[e, h, p], "experts.gate_up", turned);
                put(&format!("{up}_bias"), &[e, p], "experts.gate_up_bias", bias);
                put(down, &[e, i, h], "experts.down", Order::Turned);
                put(&format!("{down}_bias"), &[e, h], "experts.down_bias", straight);
            }
        }
    }
    put(format!("{}.weight", names.final_norm), &[h], "final_norm", 0, straight);
    put(format!("{}.bias", names.final_norm), &[h], "final_norm_bias", 0, straight);
    put("lm_head.weight".into(), &[spec.vocab, h], "head", 0, straight);
    put("lm_head.bias".into(), &[spec.vocab], "head_bias", 0, straight);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{odd_spec, test_spec};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_parts_of_a_checkpoint_tile_every_parameter(seed: u64, odd: bool) {
            let spec = if odd { odd_spec(seed) } else { test_spec(seed) };
            let turned = Names { experts: Experts::FusedTurned(["experts.a", "experts.b"]), ..PLAIN };
            let biased = spec.layers.iter().any(|l| matches!(l, FfnSpec::Moe(moe) if moe.expert.bias));
            let defs = param_defs(&spec);
            let mut covered: Vec<Vec<(usize, usize)>> = vec![Vec::new(); defs.len()];
            let mut names = std::collections::HashSet::new();
            for part in parts(&spec, if biased { &turned } else { &PLAIN }) {
                prop_assert!(names.insert(part.tensor.clone()), "{} twice", part.tensor);
                covered[part.param].push((part.offset, part.len()));
            }
            for (def, ranges) in defs.iter().zip(&mut covered) {
                ranges.sort();
                let mut end = 0;
                for (offset, len) in ranges.iter() {
                    prop_assert_eq!(*offset, end, "{}", def.name);
                    end += len;
                }
                prop_assert_eq!(end, def.len(), "{}", def.name);
            }
        }
    }

    #[test]
    fn orders_are_what_they_say_and_come_back() {
        // [E 1, A 2, B 4]: rows of A in the file.
        let file = [0.0, 10.0, 1.0, 11.0, 0.5, 10.5, 1.5, 11.5];
        let read = |order: Order, shape: &[usize]| {
            let (mut param, mut back) = ([9.0; 8], [9.0; 8]);
            order.read(shape, &file, &mut param);
            order.write(shape, &param, &mut back);
            assert_eq!(back, file);
            param
        };
        assert_eq!(read(Order::Straight, &[1, 2, 4]), file);
        assert_eq!(read(Order::Turned, &[1, 2, 4]), [0.0, 0.5, 10.0, 10.5, 1.0, 1.5, 11.0, 11.5]);
        assert_eq!(read(Order::TurnedByTurns, &[1, 2, 4]), [0.0, 0.5, 1.0, 1.5, 10.0, 10.5, 11.0, 11.5]);
        assert_eq!(read(Order::ByTurns, &[2, 4]), [0.0, 1.0, 10.0, 11.0, 0.5, 1.5, 10.5, 11.5]);
        // Two heads of four rows of one element, then one head of four rows of two.
        assert_eq!(read(Order::HeadsByTurns(4), &[8]), [0.0, 1.0, 10.0, 11.0, 0.5, 1.5, 10.5, 11.5]);
        assert_eq!(read(Order::HeadsByTurns(4), &[4, 2]), [0.0, 10.0, 0.5, 10.5, 1.0, 11.0, 1.5, 11.5]);
    }
}
