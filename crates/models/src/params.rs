//! The parameters of a decoder in memory, and how the tensors of a checkpoint lie in them.
//!
//! In memory, what is multiplied together lies together: queries, keys and values are one matrix, gate and up another, and
//! the experts of a layer one tensor each. Every tensor of a file is a contiguous range of one of them ([`Part`]): loading,
//! saving and the audit walk the same list.

use crate::spec::{FfnSpec, MlpSpec, ModelSpec, QkNorm};
use senmon_moe::rng::Stream;
use senmon_moe::router;
use std::collections::HashMap;

/// What a parameter is to an optimiser.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamKind {
    /// A matrix.
    Weight,
    /// The weight of a norm.
    Norm,
    /// A bias.
    Bias,
    /// Saved with the model, but without a gradient.
    State,
}

/// What a fresh parameter starts from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// A normal distribution of this standard deviation.
    Normal(f64),
    /// 1.
    Ones,
    /// 0.
    Zeros,
}

/// A parameter in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamDef {
    /// `layers.3.qkv`.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What it is.
    pub kind: ParamKind,
    /// What it starts from.
    pub init: Init,
}

impl ParamDef {
    /// Elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// It has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A tensor of a checkpoint: `shape`'s elements of parameter `param` from `offset` on.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Its name in the file.
    pub tensor: String,
    /// Its shape in the file.
    pub shape: Vec<usize>,
    /// Index into [`param_defs`].
    pub param: usize,
    /// First element.
    pub offset: usize,
}

/// P, rows of the first matrix of an MLP.
fn pre(mlp: &MlpSpec) -> usize {
    if mlp.gated { 2 * mlp.intermediate } else { mlp.intermediate }
}

/// All parameters of a model: embedding, layers bottom to top, norm, head.
pub fn param_defs(spec: &ModelSpec) -> Vec<ParamDef> {
    let mut defs = Vec::new();
    let mut add = |name: String, shape: &[usize], kind, init| {
        defs.push(ParamDef { name, shape: shape.to_vec(), kind, init });
    };
    use ParamKind::{Bias, Norm, State, Weight};
    let (h, a, normal) = (spec.hidden, &spec.attention, Init::Normal(spec.init_std));
    let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
    add("embed".into(), &[spec.vocab, h], Weight, normal);
    for (l, ffn) in spec.layers.iter().enumerate() {
        let name = |part: &str| format!("layers.{l}.{part}");
        add(name("attn_norm"), &[h], Norm, Init::Ones);
        add(name("qkv"), &[q + 2 * kv, h], Weight, normal);
        if a.qkv_bias {
            add(name("qkv_bias"), &[q + 2 * kv], Bias, Init::Zeros);
        }
        let norms = match a.qk_norm {
            QkNorm::None => None,
            QkNorm::Head => Some((a.head_dim, a.head_dim)),
            QkNorm::Full => Some((q, kv)),
        };
        if let Some((q_width, k_width)) = norms {
            add(name("q_norm"), &[q_width], Norm, Init::Ones);
            add(name("k_norm"), &[k_width], Norm, Init::Ones);
        }
        add(name("out"), &[h, q], Weight, normal);
        if a.out_bias {
            add(name("out_bias"), &[h], Bias, Init::Zeros);
        }
        add(name("ffn_norm"), &[h], Norm, Init::Ones);
        match ffn {
            FfnSpec::Dense(mlp) => {
                add(name("gate_up"), &[pre(mlp), h], Weight, normal);
                add(name("down"), &[h, mlp.intermediate], Weight, normal);
            }
            FfnSpec::Moe(moe) => {
                let e = moe.experts;
                add(name("router"), &[e, h], Weight, Init::Normal(spec.init_std * moe.router.init_scale));
                if router::kind(&moe.router.kind).is_ok_and(|kind| kind.selection_bias) {
                    add(name("router_bias"), &[e], State, Init::Zeros);
                }
                add(name("experts.gate_up"), &[e, pre(&moe.expert), h], Weight, normal);
                add(name("experts.down"), &[e, h, moe.expert.intermediate], Weight, normal);
                if moe.shared_intermediate > 0 {
                    let shared = moe.shared();
                    add(name("shared.gate_up"), &[pre(&shared), h], Weight, normal);
                    add(name("shared.down"), &[h, shared.intermediate], Weight, normal);
                }
            }
        }
    }
    add("final_norm".into(), &[h], Norm, Init::Ones);
    if !spec.tie_embeddings {
        add("head".into(), &[spec.vocab, h], Weight, normal);
    }
    defs
}

/// How a family names the tensors of its MoE layers; all others have the same names in every family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoeNames {
    /// The block within a layer: `mlp`, or `block_sparse_moe`.
    pub block: &'static str,
    /// Gate, up and down projection of an expert.
    pub expert: [&'static str; 3],
}

/// `mlp.experts.3.gate_proj`.
pub const MLP_NAMES: MoeNames = MoeNames { block: "mlp", expert: ["gate_proj", "up_proj", "down_proj"] };

/// The tensors of a checkpoint, each with its place.
pub fn parts(spec: &ModelSpec, names: MoeNames) -> Vec<Part> {
    let defs = param_defs(spec);
    let index: HashMap<&str, usize> =
        defs.iter().enumerate().map(|(index, def)| (def.name.as_str(), index)).collect();
    let mut parts = Vec::new();
    let mut add = |tensor: String, shape: &[usize], param: &str, offset: usize| {
        if let Some(&param) = index.get(param) {
            parts.push(Part { tensor, shape: shape.to_vec(), param, offset });
        }
    };
    let (h, a) = (spec.hidden, &spec.attention);
    let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
    add("model.embed_tokens.weight".into(), &[spec.vocab, h], "embed", 0);
    for (l, ffn) in spec.layers.iter().enumerate() {
        let file = |part: &str| format!("model.layers.{l}.{part}");
        let name = |part: &str| format!("layers.{l}.{part}");
        add(file("input_layernorm.weight"), &[h], &name("attn_norm"), 0);
        let mut row = 0;
        for (part, rows) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
            add(file(&format!("self_attn.{part}.weight")), &[rows, h], &name("qkv"), row * h);
            add(file(&format!("self_attn.{part}.bias")), &[rows], &name("qkv_bias"), row);
            row += rows;
        }
        for (part, rows) in [("q_norm", q), ("k_norm", kv)] {
            let width = if a.qk_norm == QkNorm::Full { rows } else { a.head_dim };
            add(file(&format!("self_attn.{part}.weight")), &[width], &name(part), 0);
        }
        add(file("self_attn.o_proj.weight"), &[h, q], &name("out"), 0);
        add(file("self_attn.o_proj.bias"), &[h], &name("out_bias"), 0);
        add(file("post_attention_layernorm.weight"), &[h], &name("ffn_norm"), 0);
        let mut mlp =
            |prefix: &str, [gate, up, down]: [&str; 3], into: [&str; 2], spec: &MlpSpec, expert: usize| {
                let i = spec.intermediate;
                let first = expert * pre(spec) * h;
                let tensor = |part: &str| file(&format!("{prefix}.{part}.weight"));
                if spec.gated {
                    add(tensor(gate), &[i, h], &name(into[0]), first);
                    add(tensor(up), &[i, h], &name(into[0]), first + i * h);
                } else {
                    add(tensor(up), &[i, h], &name(into[0]), first);
                }
                add(tensor(down), &[h, i], &name(into[1]), expert * h * i);
            };
        match ffn {
            FfnSpec::Dense(dense) => mlp("mlp", MLP_NAMES.expert, ["gate_up", "down"], dense, 0),
            FfnSpec::Moe(moe) => {
                for e in 0..moe.experts {
                    let prefix = format!("{}.experts.{e}", names.block);
                    mlp(&prefix, names.expert, ["experts.gate_up", "experts.down"], &moe.expert, e);
                }
                let shared = moe.shared();
                let prefix = format!("{}.shared_experts", names.block);
                mlp(&prefix, MLP_NAMES.expert, ["shared.gate_up", "shared.down"], &shared, 0);
                add(file(&format!("{}.gate.weight", names.block)), &[moe.experts, h], &name("router"), 0);
                let bias = file(&format!("{}.gate.e_score_correction_bias", names.block));
                add(bias, &[moe.experts], &name("router_bias"), 0);
            }
        }
    }
    add("model.norm.weight".into(), &[h], "final_norm", 0);
    add("lm_head.weight".into(), &[spec.vocab, h], "head", 0);
    parts
}

/// Fresh values for [`param_defs`], in their order: each number is a function of the seed, its parameter's name and its place.
pub fn initial_values(spec: &ModelSpec, seed: u64) -> Vec<Vec<f32>> {
    use rayon::prelude::*;
    param_defs(spec)
        .par_iter()
        .map(|def| match def.init {
            Init::Ones => vec![1.0; def.len()],
            Init::Zeros => vec![0.0; def.len()],
            Init::Normal(std) => {
                let name =
                    def.name.bytes().fold(0u64, |hash, b| hash.wrapping_mul(0x100_0000_01b3) ^ u64::from(b));
                let stream = Stream::new(&[seed, name]);
                (0..def.len() as u64).into_par_iter().map(|i| (std * normal(stream, i)) as f32).collect()
            }
        })
        .collect()
}

/// The `index`-th normal number of a stream (Box & Muller).
fn normal(stream: Stream, index: u64) -> f64 {
    let unit = |bits: u64| ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    let (radius, angle) = (unit(stream.bits(2 * index)), unit(stream.bits(2 * index + 1)));
    (-2.0 * radius.ln()).sqrt() * (2.0 * std::f64::consts::PI * angle).cos()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::test_spec;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_parts_of_a_checkpoint_tile_every_parameter(seed: u64) {
            let spec = test_spec(seed);
            let defs = param_defs(&spec);
            let mut covered: Vec<Vec<(usize, usize)>> = vec![Vec::new(); defs.len()];
            let mut names = std::collections::HashSet::new();
            for part in parts(&spec, MLP_NAMES) {
                prop_assert!(names.insert(part.tensor.clone()), "{} twice", part.tensor);
                covered[part.param].push((part.offset, part.shape.iter().product()));
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
    fn fresh_values_are_normal_and_repeat() {
        let mut spec = test_spec(1);
        spec.vocab = 500;
        spec.hidden = 64;
        let values = initial_values(&spec, 7);
        let n = values[0].len() as f64;
        let mean = values[0].iter().map(|v| *v as f64).sum::<f64>() / n;
        let std = (values[0].iter().map(|v| (*v as f64 - mean).powi(2)).sum::<f64>() / n).sqrt();
        assert!(mean.abs() < 1e-3 && (std / spec.init_std - 1.0).abs() < 0.02, "{mean} {std}");
        assert_eq!(values, initial_values(&spec, 7));
        assert_ne!(values[0], initial_values(&spec, 8)[0]);
    }
}
