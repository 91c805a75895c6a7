//! The decoder: one for training and generation, built from a [`ModelSpec`] and the values of its parameters.

use crate::error::ModelError;
use crate::ops::{self, AttentionBlock, LatentBlock, LossTerms, Norm, Residual};
use crate::packing::{self, Packing, Packings};
use crate::params::{ParamDef, ParamKind, param_defs};
use crate::rope::Rotations;
use crate::spec::{FfnSpec, MlpSpec, ModelSpec, NormKind, NormPlace, QkNorm};
use candle_core::{Device, Tensor};
use senmon_kernels::expert_mlp::Shape;
use senmon_kernels::gemm::Precision;
use senmon_kernels::rotary::Rope;
use senmon_moe::layer::{MoeParams, Wants, extra_defs};
use senmon_moe::tensor::{reclaim, recycle};
use senmon_moe::{Ctx, MoeLayer, PackedWeight, Param, Routing, RoutingObserver, SelectionBias, Stored};
use std::collections::HashMap;
use std::sync::Arc;

mod cached;

pub use cached::Cache;

type Result<T> = std::result::Result<T, ModelError>;

/// What becomes of a parameter in a decoder.
#[derive(Clone, Debug)]
pub enum Slot {
    /// A tensor; in training, a variable with a sink.
    Param(Param),
    /// State that is saved but has no gradient.
    State(SelectionBias),
}

/// What a decoder is given for a parameter.
#[derive(Debug)]
pub enum Weight {
    /// Its values.
    Values(Vec<f32>),
    /// Matrices as they are stored; only matrices that are multiplied or looked up in.
    Stored(Stored),
    /// Matrices that are only multiplied, packed.
    Packed(PackedWeight),
}

impl Weight {
    /// The parameter `def`, without a gradient.
    pub(crate) fn frozen(self, def: &ParamDef) -> Result<Param> {
        let found = match &self {
            Weight::Values(values) if values.len() == def.len() => def.shape.clone(),
            Weight::Values(values) => vec![values.len()],
            Weight::Stored(stored) => stored.shape().to_vec(),
            Weight::Packed(packed) => packed.shape().to_vec(),
        };
        if found != def.shape {
            let what = format!("{} has shape {found:?}, expected {:?}", def.name, def.shape);
            return Err(ModelError::Internal { what });
        }
        Ok(match self {
            Weight::Stored(stored) => Param::stored(&def.name, stored),
            Weight::Packed(packed) => Param::packed(&def.name, packed),
            Weight::Values(values) => {
                Param::new(&def.name, Tensor::from_vec(values, def.shape.as_slice(), &Device::Cpu)?)
            }
        })
    }
}

/// A decoder-only transformer with its parameters.
#[derive(Debug)]
pub struct Decoder {
    spec: ModelSpec,
    slots: Vec<Slot>,
    embed: Param,
    layers: Vec<Layer>,
    final_norm: Norm,
    head: Param,
    head_bias: Option<Param>,
    rotations: Rotations,
}

#[derive(Debug)]
struct Layer {
    attention: Attention,
    residual: Residual,
    ffn: Ffn,
}

#[derive(Debug)]
enum Attention {
    Heads(Box<AttentionBlock>),
    Latent(Box<LatentBlock>),
}

#[derive(Debug)]
enum Ffn {
    Dense { up: Param, down: Param, biases: Option<Box<(Param, Param)>>, shape: Shape },
    Moe(Box<MoeLayer>),
}

/// What a pass is told: see [`Ctx`] for the fields of the same name.
#[derive(Default)]
pub struct Pass<'a> {
    /// Training: noise is on and gradients can be taken.
    pub train: bool,
    /// The seed of the run.
    pub seed: u64,
    /// The optimiser step that this is of.
    pub step: u64,
    /// Tokens of that step before those of this pass.
    pub first_token: u64,
    /// What only some losses need.
    pub wants: Wants,
    /// Sees every routing.
    pub observer: Option<&'a mut dyn RoutingObserver>,
    /// The experts of an earlier pass, by layer, to be used again.
    pub forced: Option<&'a HashMap<usize, Vec<u32>>>,
    /// An expert of a layer that is switched off; see [`Ctx::off`].
    pub off: Option<(usize, u32)>,
    /// In training, activations whose memory nobody needs once backward is through: see [`Pass::reclaim`].
    pub spent: Vec<Tensor>,
}

impl Pass<'_> {
    /// Gives the memory of activations to the next pass. For when backward is through, and nothing else of the pass is looked at; a pass that
    /// is dropped without it frees them.
    pub fn reclaim(&mut self) -> Result<()> {
        self.spent.drain(..).try_for_each(|tensor| Ok(reclaim(tensor)?))
    }
}

/// Sets the random numbers of a second pass apart from those of the first.
const SECOND_PASS: u64 = 0x7468_6f72;

/// The routing of one MoE layer.
pub type LayerRouting = (usize, Routing);

impl Decoder {
    /// A decoder from the values of [`param_defs`], in their order; `trainable` gives each a sink for its gradient.
    pub fn new(spec: &ModelSpec, values: Vec<Vec<f32>>, trainable: bool) -> Result<Self> {
        let trained = trainable.then_some(Precision::F32);
        Self::build(spec, values.into_iter().map(Weight::Values).collect(), None, trained)
    }

    /// As [`Decoder::new`] to be trained, with products of another precision; routers, norms and all that is no product of a
    /// weight stay f32.
    pub fn train_in(spec: &ModelSpec, values: Vec<Vec<f32>>, precision: Precision) -> Result<Self> {
        Self::build(spec, values.into_iter().map(Weight::Values).collect(), None, Some(precision))
    }

    /// A decoder that runs with weights as they are stored.
    pub fn run(spec: &ModelSpec, weights: Vec<Weight>) -> Result<Self> {
        Self::build(spec, weights, None, None)
    }

    /// A decoder whose weights are packed first, as far as they can be, if it is wanted.
    pub fn run_as(spec: &ModelSpec, weights: Vec<Weight>, packing: Packing) -> Result<Self> {
        let to = match packing {
            Packing::Exact => return Self::run(spec, weights),
            Packing::Packed => None,
            Packing::Coded(to) => Some(to),
        };
        spec.validate()?;
        let (weights, head) = Packings::plan(spec, &weights, to).pack(spec, weights)?;
        Self::build(spec, weights, head, None)
    }

    /// `head`: what a tied head multiplies with instead of the embedding; `trained`: with gradients, and how exactly.
    fn build(
        spec: &ModelSpec,
        values: Vec<Weight>,
        head: Option<PackedWeight>,
        trained: Option<Precision>,
    ) -> Result<Self> {
        spec.validate()?;
        if trained.is_some()
            && let Some(part) = untrained(spec)
        {
            return Err(ModelError::Option { what: format!("a model with {part} can be run, not trained") });
        }
        let defs = param_defs(spec);
        if defs.len() != values.len() {
            let what = format!("{} parameters were given, the model has {}", values.len(), defs.len());
            return Err(ModelError::Internal { what });
        }
        let mut slots = Vec::with_capacity(defs.len());
        let mut by_name = HashMap::new();
        for (index, (def, values)) in defs.iter().zip(values).enumerate() {
            slots.push(match (def.kind, values) {
                (ParamKind::State, Weight::Values(values)) => Slot::State(SelectionBias::new(values)),
                (_, Weight::Values(values)) if trained.is_some() && values.len() == def.len() => {
                    let multiplied = packing::rows(spec, def).is_some() || def.name == "embed";
                    let precision = trained.filter(|_| multiplied).unwrap_or_default();
                    Slot::Param(Param::trainable(&def.name, values, &def.shape)?.with_precision(precision))
                }
                (_, weight) => Slot::Param(weight.frozen(def)?),
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
        let turned = a.latent.as_ref().map_or(a.head_dim, |latent| latent.rope);
        let rotations = Rotations::new(&a.rope, a.rope_theta, turned, spec.max_positions);
        let eps = spec.norm_eps as f32;
        let norm = |name: &str| -> Result<Norm> {
            Ok(Norm { weight: get(name)?, bias: optional(&format!("{name}_bias")), eps })
        };
        let residual = |name: &str| -> Result<Residual> {
            Ok(Residual { norm: norm(name)?, place: spec.norm_place, scale: spec.scales.residual as f32 })
        };
        let mut layers = Vec::with_capacity(spec.layers.len());
        for (l, ffn) in spec.layers.iter().enumerate() {
            let name = |part: &str| format!("layers.{l}.{part}");
            let inner = a.latent.as_ref().map_or(eps, |latent| latent.norm_eps as f32);
            let plain =
                |name: &str| -> Result<Norm> { Ok(Norm { weight: get(name)?, bias: None, eps: inner }) };
            let attention = match &a.latent {
                None => Attention::Heads(Box::new(AttentionBlock {
                    spec: a.clone(),
                    window: a.window_of(l),
                    hidden: spec.hidden,
                    residual: residual(&name("attn_norm"))?,
                    qkv: get(&name("qkv"))?,
                    qkv_bias: optional(&name("qkv_bias")),
                    qk_norm: match a.qk_norm {
                        QkNorm::None => None,
                        _ => Some((get(&name("q_norm"))?, get(&name("k_norm"))?)),
                    },
                    sinks: optional(&name("sinks")),
                    out: get(&name("out"))?,
                    out_bias: optional(&name("out_bias")),
                })),
                Some(latent) => Attention::Latent(Box::new(LatentBlock {
                    spec: latent.clone(),
                    heads: a.heads,
                    scale: a.score_scale(),
                    residual: residual(&name("attn_norm"))?,
                    q: match latent.q_rank {
                        None => (get(&name("q"))?, None),
                        Some(_) => {
                            let second = (plain(&name("q_a_norm"))?, get(&name("q_b"))?);
                            (get(&name("q_a"))?, Some(second))
                        }
                    },
                    q_bias: optional(&name("q_a_bias")),
                    kv_a: get(&name("kv_a"))?,
                    kv_bias: optional(&name("kv_a_bias")),
                    out_bias: optional(&name("out_bias")),
                    kv_a_norm: plain(&name("kv_a_norm"))?,
                    kv_b: get(&name("kv_b"))?,
                    out: get(&name("out"))?,
                })),
            };
            let ffn = match ffn {
                FfnSpec::Dense(mlp) => Ffn::Dense {
                    up: get(&name("gate_up"))?,
                    down: get(&name("down"))?,
                    biases: optional(&name("gate_up_bias")).zip(optional(&name("down_bias"))).map(Box::new),
                    shape: shape(spec.hidden, mlp),
                },
                FfnSpec::Moe(moe) => {
                    let config = moe.layer(spec.hidden);
                    let state = |name: &str| match find(name) {
                        Some(Slot::State(state)) => Some(state.clone()),
                        _ => None,
                    };
                    let params = MoeParams {
                        table: state(&name("router_table")),
                        extras: extra_defs(&config)
                            .into_iter()
                            .map(|def| Ok((def.name, get(&name(def.name))?)))
                            .collect::<Result<_>>()?,
                        router_bias: optional(&name("router_logits_bias")),
                        selection_bias: state(&name("router_bias")),
                        expert_biases: optional(&name("experts.gate_up_bias"))
                            .zip(optional(&name("experts.down_bias"))),
                        shared: optional(&name("shared.gate_up")).zip(optional(&name("shared.down"))),
                        shared_biases: optional(&name("shared.gate_up_bias"))
                            .zip(optional(&name("shared.down_bias"))),
                        shared_gate: optional(&name("shared.gate")),
                        ..MoeParams::new(
                            get(&name("router"))?,
                            get(&name("experts.gate_up"))?,
                            get(&name("experts.down"))?,
                        )
                    };
                    Ffn::Moe(Box::new(MoeLayer::from_params(config, params)?))
                }
            };
            layers.push(Layer { attention, residual: residual(&name("ffn_norm"))?, ffn });
        }
        let embed = get("embed")?;
        let head = match head {
            Some(head) => Param::packed("head", head),
            None if spec.tie_embeddings => embed.clone(),
            None => get("head")?,
        };
        let (final_norm, head_bias) = (norm("final_norm")?, optional("head_bias"));
        Ok(Self { spec: spec.clone(), slots, embed, layers, final_norm, head, head_bias, rotations })
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
        self.moe_layers().filter_map(|(l, moe)| moe.params().selection_bias.as_ref().map(|bias| (l, bias)))
    }

    /// The MoE layers.
    pub fn moe_layers(&self) -> impl Iterator<Item = (usize, &MoeLayer)> {
        self.layers.iter().enumerate().filter_map(|(l, layer)| match &layer.ffn {
            Ffn::Moe(moe) => Some((l, &**moe)),
            Ffn::Dense { .. } => None,
        })
    }

    /// A copy of all values, in the order of [`param_defs`].
    pub fn values(&self) -> Result<Vec<Vec<f32>>> {
        self.slots
            .iter()
            .map(|slot| match slot {
                Slot::Param(param) => Ok(param.read(<[f32]>::to_vec)?),
                Slot::State(state) => Ok(state.values().to_vec()),
            })
            .collect()
    }

    /// The first layer whose experts are in several members, and how many: from there on every token is there once for each.
    fn members_from(&self) -> Option<(usize, usize)> {
        let members = self.spec.members();
        let first = self.spec.layers.iter().position(|layer| matches!(layer, FfnSpec::Moe(_)))?;
        (members > 1).then_some((first, members))
    }

    /// The normed residual stream \[B·S, H\] of `tokens` \[B, S\], each sequence from position 0, and what the routers did. An ensemble has that of all
    /// tokens for each member, one member after another.
    pub fn forward(
        &self,
        tokens: &[u32],
        batch: usize,
        pass: &mut Pass,
    ) -> Result<(Tensor, Vec<LayerRouting>)> {
        let mut routings = Vec::new();
        let mut x = self.embed(tokens)?;
        let rope = self.rope(tokens.len() / batch.max(1))?;
        let (mut tokens, mut batch) = (std::borrow::Cow::Borrowed(tokens), batch);
        for (l, layer) in self.layers.iter().enumerate() {
            if let Some((_, members)) = self.members_from().filter(|(first, _)| *first == l) {
                x = cached::repeated(&x, members)?;
                (tokens, batch) = (tokens.repeat(members).into(), batch * members);
            }
            x = match &layer.attention {
                Attention::Heads(block) => block.forward(&x, batch, &rope)?,
                Attention::Latent(block) => block.forward(&x, batch, &rope)?,
            };
            pass.spent.extend(pass.train.then(|| x.clone()));
            x = self.ffn(l, &x, &tokens, batch, pass, &mut routings)?;
            match pass.train {
                true => pass.spent.push(x.clone()),
                false => x = x.detach(),
            }
        }
        Ok((self.final_norm.apply(&x)?, routings))
    }

    /// Embeddings of `tokens`: \[T, H\].
    fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        let x = ops::embed(&self.embed, &tokens.into())?;
        Ok(if self.spec.scales.embedding == 1.0 { x } else { (x * self.spec.scales.embedding)? })
    }

    /// The rotations of a context of `context` tokens.
    fn rope(&self, context: usize) -> Result<Arc<Rope>> {
        let most = self.rotations.positions();
        if context > most {
            let what = format!("{context} tokens are more than the model's {most} positions");
            return Err(ModelError::Option { what });
        }
        Ok(self.rotations.table(context))
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
        let (mut x, routings) = self.forward(tokens, batch, pass)?;
        if self.spec.scales.logits != 1.0 {
            x = (x * self.spec.scales.logits)?;
        }
        if let Some((_, members)) = self.members_from() {
            // Each member learns to predict; what is predicted is their mean.
            let targets = targets.repeat(members);
            let loss = ops::lm_loss(&x, &self.head, &targets, upstream)?;
            return Ok((if upstream.is_some() { loss } else { loss.of_mean(members)? }, routings));
        }
        let Some(bias) = &self.head_bias else {
            return Ok((ops::lm_loss(&x, &self.head, targets, upstream)?, routings));
        };
        // A bias is one more column of the head, which always meets 1 (times the factor on the logits).
        let head = Tensor::cat(&[self.head.tensor(), &bias.tensor().unsqueeze(1)?], 1)?;
        let ones = Tensor::full(self.spec.scales.logits as f32, (x.dim(0)?, 1), x.device())?;
        let x = Tensor::cat(&[&x, &ones], 1)?;
        Ok((ops::lm_loss(&x, &Param::new("head", head), targets, upstream)?, routings))
    }

    /// The loss of two passes of the same tokens that draw other experts, mean of both, and how far apart their predictions are
    /// ([`ops::consistency`]), which enters what is minimised with the factor `distance`.
    pub fn loss_of_two(
        &self,
        tokens: &[u32],
        targets: &[u32],
        batch: usize,
        upstream: f32,
        distance: f32,
        pass: &mut Pass,
    ) -> Result<(Tensor, Tensor, Vec<LayerRouting>)> {
        if self.head_bias.is_some() || self.spec.scales.logits != 1.0 {
            let what =
                "two passes of one model are compared without a bias and a factor on its logits".into();
            return Err(ModelError::Option { what });
        }
        let (x, routings) = self.forward(tokens, batch, pass)?;
        let (step, first_token, wants) = (pass.step, pass.first_token, pass.wants);
        let seed = pass.seed ^ SECOND_PASS;
        let mut other = Pass { train: pass.train, seed, step, first_token, wants, ..Pass::default() };
        let (y, _) = self.forward(tokens, batch, &mut other)?;
        let one = ops::lm_loss(&x, &self.head, targets, Some(0.5 * upstream))?;
        let two = ops::lm_loss(&y, &self.head, targets, Some(0.5 * upstream))?;
        let mean = ((one.mean + two.mean)? * 0.5)?;
        Ok((mean, ops::consistency(&x, &y, &self.head, distance)?, routings))
    }

    /// The feed-forward of layer `l` with its norm and residual sum.
    fn ffn(
        &self,
        l: usize,
        x: &Tensor,
        tokens: &[u32],
        sequences: usize,
        pass: &mut Pass,
        routings: &mut Vec<LayerRouting>,
    ) -> Result<Tensor> {
        let layer = &self.layers[l];
        let before = layer.residual.place == NormPlace::Before;
        let h = if before { layer.residual.norm.apply(x)? } else { x.clone() };
        pass.spent.extend((pass.train && before).then(|| h.clone()));
        // What follows is the sum alone.
        let onto = (before && layer.residual.scale == 1.0).then_some(x);
        let y = match &layer.ffn {
            Ffn::Dense { up, down, biases, shape } => {
                senmon_moe::ops::biased_mlp(&h, up, down, biases.as_deref(), *shape, onto)?
            }
            Ffn::Moe(moe) => {
                let mut ctx = Ctx {
                    train: pass.train,
                    seed: pass.seed,
                    step: pass.step,
                    first_token: pass.first_token,
                    layer: l,
                    sequences,
                    mask: None,
                    token_ids: Some(tokens),
                    wants: pass.wants,
                    forced: pass.forced.and_then(|forced| forced.get(&l)).map(Vec::as_slice),
                    off: pass.off.filter(|(layer, _)| *layer == l).map(|(_, expert)| expert),
                    observer: match &mut pass.observer {
                        Some(observer) => Some(&mut **observer),
                        None => None,
                    },
                };
                let (y, routing) = moe.forward_onto(&h, onto, &mut ctx)?;
                routings.push((l, routing));
                y
            }
        };
        if before {
            recycle(h)?;
        }
        if onto.is_some() {
            return Ok(y);
        }
        let mut y = if before { y } else { layer.residual.norm.apply(&y)? };
        if layer.residual.scale != 1.0 {
            y = (y * layer.residual.scale as f64)?;
        }
        Ok(senmon_moe::ops::added(y, Some(x))?)
    }
}

/// The shape of an MLP's kernels.
fn shape(hidden: usize, mlp: &MlpSpec) -> Shape {
    Shape { hidden, intermediate: mlp.intermediate, activation: mlp.activation, gated: mlp.gated }
}

/// What of a model has no gradients, if anything.
fn untrained(spec: &ModelSpec) -> Option<&'static str> {
    let a = &spec.attention;
    let biased = |layer: &FfnSpec| match layer {
        FfnSpec::Dense(mlp) => mlp.bias,
        FfnSpec::Moe(moe) => moe.expert.bias || moe.router_bias || moe.shared_bias,
    };
    [
        (spec.norm == NormKind::Layer, "LayerNorm"),
        (spec.norm_place == NormPlace::After, "norms after its blocks"),
        (spec.head_bias, "a bias on its head"),
        (spec.scales.residual != 1.0, "a factor on its residual sums"),
        (a.latent.is_some(), "latent attention"),
        (a.sinks, "attention sinks"),
        (a.qk_norm == QkNorm::HeadAfter, "norms of queries and keys after the rotation"),
        (spec.layers.iter().any(biased), "biases on its MLPs, experts or routers"),
    ]
    .into_iter()
    .find_map(|(has, part)| has.then_some(part))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::initial_values;
    use crate::spec::test_spec;

    #[test]
    fn what_has_no_gradients_is_refused_by_name() {
        let mut spec = test_spec(2);
        spec.attention.sinks = true;
        let values = initial_values(&spec, 0);
        let text = Decoder::new(&spec, values, true).unwrap_err().to_string();
        assert!(text.contains("attention sinks") && text.contains("not trained"), "{text}");
    }
}
