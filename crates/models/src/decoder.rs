//! The decoder: one for training and generation, built from a [`ModelSpec`] and the values of its parameters.

use crate::error::ModelError;
use crate::ops::{self, AttentionBlock, LayerCache, LossTerms};
use crate::params::{ParamKind, param_defs};
use crate::spec::{FfnSpec, MlpSpec, ModelSpec, MoeSpec, QkNorm};
use candle_core::{Device, Tensor};
use senmon_kernels::expert_mlp::Shape;
use senmon_kernels::gemm::{self, View};
use senmon_kernels::rotary::{Rope, inverse_frequencies};
use senmon_moe::layer::MoeParams;
use senmon_moe::{Ctx, MoeConfig, MoeLayer, Param, Routing, RoutingObserver, SelectionBias};
use std::collections::HashMap;
use std::sync::Arc;

type Result<T> = std::result::Result<T, ModelError>;

/// What becomes of a parameter in a decoder.
#[derive(Clone, Debug)]
pub enum Slot {
    /// A tensor; in training, a variable with a sink.
    Param(Param),
    /// State that is saved but has no gradient.
    State(SelectionBias),
}

/// A decoder-only transformer with its parameters.
#[derive(Debug)]
pub struct Decoder {
    spec: ModelSpec,
    slots: Vec<Slot>,
    embed: Param,
    layers: Vec<Layer>,
    final_norm: Param,
    head: Param,
}

#[derive(Debug)]
struct Layer {
    attention: AttentionBlock,
    ffn_norm: Param,
    ffn: Ffn,
}

#[derive(Debug)]
enum Ffn {
    Dense { up: Param, down: Param, shape: Shape },
    Moe(Box<MoeLayer>),
}

/// What a pass is told: see [`Ctx`] for the fields of the same name.
#[derive(Default)]
pub struct Pass<'a> {
    /// Training: noise is on and gradients can be taken.
    pub train: bool,
    /// The seed of the run.
    pub seed: u64,
    /// The micro-batch that this is.
    pub step: u64,
    /// Sees every routing.
    pub observer: Option<&'a mut dyn RoutingObserver>,
    /// The experts of an earlier pass, by layer, to be used again.
    pub forced: Option<&'a HashMap<usize, Vec<u32>>>,
}

/// Keys and values of one sequence.
#[derive(Clone, Debug, Default)]
pub struct Cache {
    layers: Vec<LayerCache>,
    len: usize,
}

impl Cache {
    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nothing is in the cache.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

/// The routing of one MoE layer.
pub type LayerRouting = (usize, Routing);

impl Decoder {
    /// A decoder from the values of [`param_defs`], in their order; `trainable` gives each a sink for its gradient.
    pub fn new(spec: &ModelSpec, values: Vec<Vec<f32>>, trainable: bool) -> Result<Self> {
        spec.validate()?;
        let defs = param_defs(spec);
        if defs.len() != values.len() {
            let what = format!("{} parameters were given, the model has {}", values.len(), defs.len());
            return Err(ModelError::Internal { what });
        }
        let mut slots = Vec::with_capacity(defs.len());
        let mut by_name = HashMap::new();
        for (index, (def, values)) in defs.iter().zip(values).enumerate() {
            let expected = def.shape.iter().product::<usize>();
            if values.len() != expected {
                let what = format!("{} has {} values, expected {expected}", def.name, values.len());
                return Err(ModelError::Internal { what });
            }
            slots.push(match def.kind {
                ParamKind::State => Slot::State(SelectionBias::new(values)),
                _ if trainable => Slot::Param(Param::trainable(&def.name, values, &def.shape)?),
                _ => {
                    let tensor = Tensor::from_vec(values, def.shape.as_slice(), &Device::Cpu)?;
                    Slot::Param(Param::new(&def.name, tensor))
                }
            });
            by_name.insert(def.name.clone(), index);
        }
        let find = |name: &str| by_name.get(name).map(|index| &slots[*index]);
        let optional = |name: &str| match find(name) {
            Some(Slot::Param(param)) => Some(param.clone()),
            _ => None,
        };
        let get = |name: &str| {
            optional(name).ok_or_else(|| ModelError::Internal { what: format!("no parameter {name}") })
        };
        let a = &spec.attention;
        let rope =
            Arc::new(Rope::new(&inverse_frequencies(a.rope_theta, a.head_dim), spec.max_positions, 1.0));
        let mut layers = Vec::with_capacity(spec.layers.len());
        for (l, ffn) in spec.layers.iter().enumerate() {
            let name = |part: &str| format!("layers.{l}.{part}");
            let attention = AttentionBlock {
                spec: a.clone(),
                hidden: spec.hidden,
                eps: spec.norm_eps as f32,
                rope: rope.clone(),
                norm: get(&name("attn_norm"))?,
                qkv: get(&name("qkv"))?,
                qkv_bias: optional(&name("qkv_bias")),
                qk_norm: match a.qk_norm {
                    QkNorm::None => None,
                    _ => Some((get(&name("q_norm"))?, get(&name("k_norm"))?)),
                },
                out: get(&name("out"))?,
                out_bias: optional(&name("out_bias")),
            };
            let ffn = match ffn {
                FfnSpec::Dense(mlp) => Ffn::Dense {
                    up: get(&name("gate_up"))?,
                    down: get(&name("down"))?,
                    shape: shape(spec.hidden, mlp),
                },
                FfnSpec::Moe(moe) => {
                    let params = MoeParams {
                        router: get(&name("router"))?,
                        selection_bias: match find(&name("router_bias")) {
                            Some(Slot::State(bias)) => Some(bias.clone()),
                            _ => None,
                        },
                        gate_up: get(&name("experts.gate_up"))?,
                        down: get(&name("experts.down"))?,
                        shared: match moe.shared_intermediate {
                            0 => None,
                            _ => Some((get(&name("shared.gate_up"))?, get(&name("shared.down"))?)),
                        },
                    };
                    Ffn::Moe(Box::new(MoeLayer::from_params(moe_config(spec.hidden, moe), params)?))
                }
            };
            layers.push(Layer { attention, ffn_norm: get(&name("ffn_norm"))?, ffn });
        }
        let embed = get("embed")?;
        let head = if spec.tie_embeddings { embed.clone() } else { get("head")? };
        let final_norm = get("final_norm")?;
        Ok(Self { spec: spec.clone(), slots, embed, layers, final_norm, head })
    }

    /// What the decoder is made of.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The parameters, in the order of [`param_defs`].
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The selection biases of the MoE layers that have one.
    pub fn selection_biases(&self) -> impl Iterator<Item = (usize, &SelectionBias)> {
        self.layers.iter().enumerate().filter_map(|(l, layer)| match &layer.ffn {
            Ffn::Moe(moe) => moe.params().selection_bias.as_ref().map(|bias| (l, bias)),
            Ffn::Dense { .. } => None,
        })
    }

    /// A copy of all values, in the order of [`param_defs`].
    pub fn values(&self) -> Result<Vec<Vec<f32>>> {
        self.slots
            .iter()
            .map(|slot| match slot {
                Slot::Param(param) => Ok(param.read(<[f32]>::to_vec)?),
                Slot::State(bias) => Ok(bias.values()),
            })
            .collect()
    }

    /// The normed residual stream \[B·S, H\] of `tokens` \[B, S\], each sequence from position 0, and what the routers did.
    pub fn forward(
        &self,
        tokens: &[u32],
        batch: usize,
        pass: &mut Pass,
    ) -> Result<(Tensor, Vec<LayerRouting>)> {
        let mut routings = Vec::new();
        let mut x = ops::embed(&self.embed, &tokens.into())?;
        for (l, layer) in self.layers.iter().enumerate() {
            x = layer.attention.forward(&x, batch)?;
            x = self.ffn(l, &x, pass, &mut routings)?;
            if !pass.train {
                x = x.detach();
            }
        }
        Ok((ops::rms_norm(&x, &self.final_norm, self.spec.norm_eps as f32)?, routings))
    }

    /// The loss of `targets` \[B, S\] after `tokens` \[B, S\]; `upstream` as in [`ops::lm_loss`].
    pub fn loss(
        &self,
        tokens: &[u32],
        targets: &[u32],
        batch: usize,
        upstream: Option<f32>,
        pass: &mut Pass,
    ) -> Result<(LossTerms, Vec<LayerRouting>)> {
        let (x, routings) = self.forward(tokens, batch, pass)?;
        Ok((ops::lm_loss(&x, &self.head, targets, upstream)?, routings))
    }

    /// A cache for one sequence.
    pub fn cache(&self) -> Cache {
        Cache { layers: vec![LayerCache::default(); self.layers.len()], len: 0 }
    }

    /// The logits of `tokens` \[S\], which follow what is in the cache: \[S, V\], or those of the last token alone.
    pub fn logits(
        &self,
        tokens: &[u32],
        cache: &mut Cache,
        last_only: bool,
        pass: &mut Pass,
    ) -> Result<Vec<f32>> {
        let (hidden, vocab) = (self.spec.hidden, self.spec.vocab);
        let mut routings = Vec::new();
        let mut x = ops::embed(&self.embed, &tokens.into())?;
        for (l, layer) in self.layers.iter().enumerate() {
            x = layer.attention.forward_cached(&x, &mut cache.layers[l], cache.len)?;
            x = self.ffn(l, &x, pass, &mut routings)?.detach();
        }
        cache.len += tokens.len();
        let first = if last_only { tokens.len().saturating_sub(1) } else { 0 };
        let x = x.narrow(0, first, tokens.len() - first)?;
        let x = ops::rms_norm(&x.contiguous()?, &self.final_norm, self.spec.norm_eps as f32)?;
        let rows = tokens.len() - first;
        let mut logits = vec![0.0; rows * vocab];
        senmon_moe::tensor::read2(&x, self.head.tensor(), |x, head| {
            let (a, b) = (View::rows(x, hidden), View::rows(head, hidden).t());
            gemm::parallel(rows, vocab, hidden, a, b, &mut logits, vocab, false);
        })?;
        Ok(logits)
    }

    /// The feed-forward of layer `l` with its norm and residual sum.
    fn ffn(&self, l: usize, x: &Tensor, pass: &mut Pass, routings: &mut Vec<LayerRouting>) -> Result<Tensor> {
        let layer = &self.layers[l];
        let h = ops::rms_norm(x, &layer.ffn_norm, self.spec.norm_eps as f32)?;
        let y = match &layer.ffn {
            Ffn::Dense { up, down, shape } => senmon_moe::ops::mlp(&h, up, down, *shape)?,
            Ffn::Moe(moe) => {
                let mut ctx = Ctx {
                    train: pass.train,
                    seed: pass.seed,
                    step: pass.step,
                    layer: l,
                    mask: None,
                    forced: pass.forced.and_then(|forced| forced.get(&l)).map(Vec::as_slice),
                    observer: match &mut pass.observer {
                        Some(observer) => Some(&mut **observer),
                        None => None,
                    },
                };
                let (y, routing) = moe.forward(&h, &mut ctx)?;
                routings.push((l, routing));
                y
            }
        };
        Ok(ops::residual(x, &y)?)
    }
}

/// The shape of an MLP's kernels.
fn shape(hidden: usize, mlp: &MlpSpec) -> Shape {
    Shape { hidden, intermediate: mlp.intermediate, activation: mlp.activation, gated: mlp.gated }
}

/// The configuration of an MoE layer.
fn moe_config(hidden: usize, moe: &MoeSpec) -> MoeConfig {
    MoeConfig {
        hidden,
        experts: moe.experts,
        top_k: moe.top_k,
        intermediate: moe.expert.intermediate,
        activation: moe.expert.activation,
        gated: moe.expert.gated,
        shared_intermediate: moe.shared_intermediate,
        router: moe.router.clone(),
    }
}
