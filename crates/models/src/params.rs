//! The parameters of a decoder in memory.
//!
//! What is multiplied together lies together: queries, keys and values are one matrix, gate and up another, and the experts
//! of a layer one tensor each. How the tensors of a file lie in them says [`crate::names`].

use crate::spec::{FfnSpec, ModelSpec, NormKind, QkNorm};
use senmon_moe::layer::{ExtraInit, extra_defs};
use senmon_moe::rng::Stream;
use senmon_moe::router;

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

    /// A matrix that can stay as it is in a file. Routers compute in f32, and they and gates are small.
    pub fn stays(&self) -> bool {
        let small = [".router", ".shared.gate"].iter().any(|end| self.name.ends_with(end))
            || [".router_", ".residual.mix", ".constant."].iter().any(|part| self.name.contains(part));
        self.kind == ParamKind::Weight && self.shape.len() >= 2 && !small
    }

    /// It has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// All parameters of a model: embedding, layers bottom to top, norm, head.
pub fn param_defs(spec: &ModelSpec) -> Vec<ParamDef> {
    let mut defs = Vec::new();
    let mut add = |name: String, shape: &[usize], kind, init| {
        defs.push(ParamDef { name, shape: shape.to_vec(), kind, init });
    };
    use Init::{Ones, Zeros};
    use ParamKind::{Bias, Norm, State, Weight};
    let (h, a, normal) = (spec.hidden, &spec.attention, Init::Normal(spec.init_std));
    let (q, kv) = a.widths();
    let with_bias = spec.norm == NormKind::Layer;
    add("embed".into(), &[spec.vocab, h], Weight, normal);
    for (l, ffn) in spec.layers.iter().enumerate() {
        let name = |part: &str| format!("layers.{l}.{part}");
        add(name("attn_norm"), &[h], Norm, Ones);
        if with_bias {
            add(name("attn_norm_bias"), &[h], Bias, Zeros);
        }
        match &a.latent {
            None => {
                add(name("qkv"), &[q + 2 * kv, h], Weight, normal);
                if a.qkv_bias {
                    add(name("qkv_bias"), &[q + 2 * kv], Bias, Zeros);
                }
                let norms = match a.qk_norm {
                    QkNorm::None => None,
                    QkNorm::Head | QkNorm::HeadAfter => Some((a.head_dim, a.head_dim)),
                    QkNorm::Full => Some((q, kv)),
                };
                if let Some((q_width, k_width)) = norms {
                    add(name("q_norm"), &[q_width], Norm, Ones);
                    add(name("k_norm"), &[k_width], Norm, Ones);
                }
                if a.sinks {
                    add(name("sinks"), &[a.heads], Bias, Zeros);
                }
                add(name("out"), &[h, q], Weight, normal);
            }
            Some(latent) => {
                let c = latent.kv_rank;
                match latent.q_rank {
                    None => add(name("q"), &[q, h], Weight, normal),
                    Some(rank) => {
                        add(name("q_a"), &[rank, h], Weight, normal);
                        if a.qkv_bias {
                            add(name("q_a_bias"), &[rank], Bias, Zeros);
                        }
                        add(name("q_a_norm"), &[rank], Norm, Ones);
                        add(name("q_b"), &[q, rank], Weight, normal);
                    }
                }
                add(name("kv_a"), &[c + latent.rope, h], Weight, normal);
                if a.qkv_bias {
                    add(name("kv_a_bias"), &[c + latent.rope], Bias, Zeros);
                }
                add(name("kv_a_norm"), &[c], Norm, Ones);
                add(name("kv_b"), &[a.heads * (latent.nope + latent.value), c], Weight, normal);
                add(name("out"), &[h, a.heads * latent.value], Weight, normal);
            }
        }
        if a.out_bias {
            add(name("out_bias"), &[h], Bias, Zeros);
        }
        add(name("ffn_norm"), &[h], Norm, Ones);
        if with_bias {
            add(name("ffn_norm_bias"), &[h], Bias, Zeros);
        }
        match ffn {
            FfnSpec::Dense(mlp) => {
                add(name("gate_up"), &[mlp.pre(), h], Weight, normal);
                add(name("down"), &[h, mlp.intermediate], Weight, normal);
                if mlp.bias {
                    add(name("gate_up_bias"), &[mlp.pre()], Bias, Zeros);
                    add(name("down_bias"), &[h], Bias, Zeros);
                }
            }
            FfnSpec::Moe(moe) => {
                let (e, p, i) = (moe.experts, moe.expert.pre(), moe.expert.intermediate);
                let layer = moe.layer(h);
                let (columns, inner) = (router::columns(&moe.router, layer.choices()), layer.inner());
                let of_router = Init::Normal(spec.init_std * moe.router.init_scale);
                add(name("router"), &[columns, h], Weight, of_router);
                if moe.router_bias {
                    add(name("router_logits_bias"), &[columns], Bias, Zeros);
                }
                if router::kind(&moe.router.kind).is_ok_and(|kind| kind.selection_bias) {
                    add(name("router_bias"), &[layer.choices()], State, Zeros);
                }
                if router::kind(&moe.router.kind).is_ok_and(|kind| kind.by_token_id) {
                    add(name("router_table"), &[spec.vocab, moe.top_k], State, Zeros);
                }
                add(name("experts.gate_up"), &[e, p, inner], Weight, normal);
                add(name("experts.down"), &[e, inner, i], Weight, normal);
                if moe.expert.bias {
                    add(name("experts.gate_up_bias"), &[e, p], Bias, Zeros);
                    add(name("experts.down_bias"), &[e, inner], Bias, Zeros);
                }
                for extra in extra_defs(&layer) {
                    let init = match extra.init {
                        ExtraInit::Normal(times) => Init::Normal(spec.init_std * times),
                        ExtraInit::Zeros => Zeros,
                        ExtraInit::Ones => Ones,
                    };
                    let kind = if extra.shape.len() > 1 { Weight } else { Bias };
                    add(name(extra.name), &extra.shape, kind, init);
                }
                if moe.shared_intermediate > 0 {
                    let shared = moe.shared();
                    add(name("shared.gate_up"), &[shared.pre(), h], Weight, normal);
                    add(name("shared.down"), &[h, shared.intermediate], Weight, normal);
                    if shared.bias {
                        add(name("shared.gate_up_bias"), &[shared.pre()], Bias, Zeros);
                        add(name("shared.down_bias"), &[h], Bias, Zeros);
                    }
                }
                if moe.has_shared_gate() {
                    add(name("shared.gate"), &[1, h], Weight, normal);
                }
            }
        }
    }
    add("final_norm".into(), &[h], Norm, Ones);
    if with_bias {
        add("final_norm_bias".into(), &[h], Bias, Zeros);
    }
    if !spec.tie_embeddings {
        add("head".into(), &[spec.vocab, h], Weight, normal);
    }
    if spec.head_bias {
        add("head_bias".into(), &[spec.vocab], Bias, Zeros);
    }
    defs
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
                (0..def.len() as u64).into_par_iter().map(|i| (std * stream.normal(i)) as f32).collect()
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::test_spec;

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
