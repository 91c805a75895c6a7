//! The encoder and the decoder.

use super::config::{Seq2SeqSpec, StackSpec};
use super::parts::Params;
use crate::error::{ModelError, Result};
use crate::ops::{self, Norm};
use candle_core::Tensor;
use senmon_kernels::biased_attention::{self, attend, bucket};
use senmon_kernels::buffers::Buffer;
use senmon_kernels::expert_mlp::Shape;
use senmon_moe::layer::MoeParams;
use senmon_moe::ops::{biased_mlp, product, product_into};
use senmon_moe::tensor::{own, read};
use senmon_moe::{Ctx, MoeConfig, MoeLayer, Param, RouterConfig, RoutingObserver};

/// An encoder-decoder with its parameters.
#[derive(Debug)]
pub struct Seq2Seq {
    spec: Seq2SeqSpec,
    head: Param,
    encoder: Stack,
    decoder: Stack,
}

#[derive(Debug)]
struct Stack {
    /// \[V, H\].
    embed: Param,
    /// \[buckets, heads\].
    bias: Param,
    layers: Vec<Layer>,
    norm: Norm,
}

#[derive(Debug)]
struct Layer {
    own: Attention,
    cross: Option<Attention>,
    norm: Norm,
    ffn: Ffn,
}

#[derive(Debug)]
struct Attention {
    norm: Norm,
    q: Param,
    k: Param,
    v: Param,
    o: Param,
}

#[derive(Debug)]
enum Ffn {
    Dense { up: Param, down: Param, shape: Shape },
    Moe(Box<MoeLayer>),
}

/// What the decoder sees of an encoded text: keys and values of each layer, \[S, A\].
#[derive(Clone, Debug)]
pub struct Encoded {
    layers: Vec<(Vec<f32>, Vec<f32>)>,
}

/// Keys and values of the decoded tokens so far, of each layer.
#[derive(Clone, Debug)]
pub struct DecoderCache {
    layers: Vec<(Vec<f32>, Vec<f32>)>,
    len: usize,
}

impl DecoderCache {
    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nothing is in the cache.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Tells an observer of routings which layers are meant: those of the decoder come after the encoder's.
pub type Observer<'a> = Option<&'a mut dyn RoutingObserver>;

impl Seq2Seq {
    pub(super) fn new(spec: Seq2SeqSpec, params: &Params) -> Result<Self> {
        let head = params.get(if spec.own_head { "head" } else { "shared" })?;
        let encoder = Stack::new(&spec, "encoder", &spec.encoder, params)?;
        let decoder = Stack::new(&spec, "decoder", &spec.decoder, params)?;
        Ok(Self { spec, head, encoder, decoder })
    }

    /// What the model is made of.
    pub fn spec(&self) -> &Seq2SeqSpec {
        &self.spec
    }

    fn known(&self, tokens: &[u32]) -> Result<()> {
        let vocab = self.spec.vocab;
        match tokens.iter().find(|token| **token as usize >= vocab) {
            Some(token) => {
                let what = format!("token {token} is not in the model's vocabulary of {vocab}");
                Err(ModelError::Option { what })
            }
            None if tokens.is_empty() => Err(ModelError::Option { what: "there are no tokens".into() }),
            None => Ok(()),
        }
    }

    /// Encodes `tokens` \[S\].
    pub fn encode(&self, tokens: &[u32], mut observer: Observer) -> Result<Encoded> {
        self.known(tokens)?;
        let mut x = ops::embed(&self.encoder.embed, &tokens.into())?;
        for (l, layer) in self.encoder.layers.iter().enumerate() {
            x = self.attend(&self.encoder, &layer.own, &x, None)?;
            x = layer.ffn(&x, l, &mut observer)?;
        }
        let x = self.encoder.norm.apply(&x)?;
        let layers = read(&x, |x| -> Result<Vec<_>> {
            let cross = self.decoder.layers.iter().filter_map(|layer| layer.cross.as_ref());
            cross.map(|a| Ok((product(x, &a.k)?.into_vec(), product(x, &a.v)?.into_vec()))).collect()
        })??;
        Ok(Encoded { layers })
    }

    /// A cache for one decoded text.
    pub fn cache(&self) -> DecoderCache {
        DecoderCache { layers: vec![Default::default(); self.decoder.layers.len()], len: 0 }
    }

    /// The logits of decoder tokens \[S\], which follow what is in the cache: \[S, V\], or those of the last alone. An expert's
    /// capacity counts the tokens of this call.
    pub fn logits(
        &self,
        tokens: &[u32],
        encoded: &Encoded,
        cache: &mut DecoderCache,
        last_only: bool,
        mut observer: Observer,
    ) -> Result<Vec<f32>> {
        self.known(tokens)?;
        let mut x = ops::embed(&self.decoder.embed, &tokens.into())?;
        let past = cache.len;
        for (l, layer) in self.decoder.layers.iter().enumerate() {
            x = self.attend(&self.decoder, &layer.own, &x, Some((&mut cache.layers[l], past)))?;
            if let Some(cross) = &layer.cross {
                x = self.cross(cross, &x, &encoded.layers[l])?;
            }
            x = layer.ffn(&x, self.encoder.layers.len() + l, &mut observer)?;
        }
        cache.len += tokens.len();
        let first = if last_only { tokens.len() - 1 } else { 0 };
        let x = x.narrow(0, first, tokens.len() - first)?.contiguous()?;
        let mut x = self.decoder.norm.apply(&x)?;
        if self.spec.scale_output {
            x = (x * (self.spec.hidden as f64).powf(-0.5))?;
        }
        let mut logits = vec![0.0; (tokens.len() - first) * self.spec.vocab];
        read(&x, |x| product_into(x, &self.head, &mut logits, false))??;
        Ok(logits)
    }

    /// Attention of a stack to itself; with a cache, of a decoder.
    fn attend(
        &self,
        stack: &Stack,
        block: &Attention,
        x: &Tensor,
        cache: Option<(&mut (Vec<f32>, Vec<f32>), usize)>,
    ) -> Result<Tensor> {
        let (spec, both) = (&self.spec, cache.is_none());
        let of = |distance: i64| bucket(distance, both, spec.buckets, spec.max_distance);
        let y = read(x, |x| -> Result<Vec<f32>> {
            let h = block.norm.run(x)?;
            let (q, k, v) = (product(&h, &block.q)?, product(&h, &block.k)?, product(&h, &block.v)?);
            let mut o = Buffer::stale(q.len());
            stack.bias.read(|table| {
                let bias: Option<(&[f32], &(dyn Fn(i64) -> usize + Sync))> = Some((table, &of));
                let (heads, head_dim) = (spec.heads, spec.head_dim);
                match cache {
                    None => {
                        let pass = biased_attention::Pass { heads, head_dim, past: None, bias };
                        attend(&pass, &q, &k, &v, &mut o);
                    }
                    Some(((keys, values), past)) => {
                        keys.truncate(past * heads * head_dim);
                        values.truncate(past * heads * head_dim);
                        keys.extend_from_slice(&k);
                        values.extend_from_slice(&v);
                        let pass = biased_attention::Pass { heads, head_dim, past: Some(past), bias };
                        attend(&pass, &q, keys, values, &mut o);
                    }
                }
            })?;
            finish(x, &o, block)
        })??;
        Ok(own(y, x.shape())?)
    }

    /// Attention of the decoder to an encoded text.
    fn cross(&self, block: &Attention, x: &Tensor, (k, v): &(Vec<f32>, Vec<f32>)) -> Result<Tensor> {
        let y = read(x, |x| -> Result<Vec<f32>> {
            let q = product(&block.norm.run(x)?, &block.q)?;
            let mut o = Buffer::stale(q.len());
            let (heads, head_dim) = (self.spec.heads, self.spec.head_dim);
            let pass = biased_attention::Pass { heads, head_dim, past: None, bias: None };
            attend(&pass, &q, k, v, &mut o);
            finish(x, &o, block)
        })??;
        Ok(own(y, x.shape())?)
    }
}

/// `x` + out(`o`).
fn finish(x: &[f32], o: &[f32], block: &Attention) -> Result<Vec<f32>> {
    let mut y = product(o, &block.o)?;
    senmon_kernels::residual::add_to(&mut y, x);
    Ok(y.into_vec())
}

impl Stack {
    fn new(spec: &Seq2SeqSpec, stack: &str, layers: &StackSpec, params: &Params) -> Result<Self> {
        let norm = |name: &str| -> Result<Norm> {
            Ok(Norm { weight: params.get(name)?, bias: None, eps: spec.norm_eps as f32 })
        };
        let attention = |name: &str| -> Result<Attention> {
            let get = |part: &str| params.get(&format!("{name}.{part}"));
            let norm = norm(&format!("{name}.norm"))?;
            Ok(Attention { norm, q: get("q")?, k: get("k")?, v: get("v")?, o: get("o")? })
        };
        let mut made = Vec::with_capacity(layers.len());
        for (l, sparse) in layers.sparse.iter().enumerate() {
            let name = |part: &str| format!("{stack}.{l}.{part}");
            let ffn = match sparse {
                false => Ffn::Dense {
                    up: params.get(&name("gate_up"))?,
                    down: params.get(&name("down"))?,
                    shape: Shape {
                        hidden: spec.hidden,
                        intermediate: spec.mlp.intermediate,
                        activation: spec.mlp.activation,
                        gated: spec.mlp.gated,
                    },
                },
                true => {
                    let config = MoeConfig {
                        activation: spec.mlp.activation,
                        gated: spec.mlp.gated,
                        router_bias: spec.router_bias,
                        sequence_capacity: Some(spec.capacity),
                        router: RouterConfig { kind: "switch".into(), ..RouterConfig::default() },
                        ..MoeConfig::new(spec.hidden, spec.mlp.intermediate, spec.experts, 1)
                    };
                    let params = MoeParams {
                        router_bias: params.maybe(&name("router_bias")),
                        ..MoeParams::new(
                            params.get(&name("router"))?,
                            params.get(&name("experts.gate_up"))?,
                            params.get(&name("experts.down"))?,
                        )
                    };
                    Ffn::Moe(Box::new(MoeLayer::from_params(config, params)?))
                }
            };
            let cross = (stack == "decoder").then(|| attention(&name("cross"))).transpose()?;
            made.push(Layer { own: attention(&name("self"))?, cross, norm: norm(&name("ffn.norm"))?, ffn });
        }
        let bias = params.get(&format!("{stack}.bias"))?;
        let embed = match params.maybe(&format!("{stack}.embed")) {
            Some(own) => own,
            None => params.get("shared")?,
        };
        Ok(Self { embed, bias, layers: made, norm: norm(&format!("{stack}.norm"))? })
    }
}

impl Layer {
    /// The feed-forward with its norm and residual sum.
    fn ffn(&self, x: &Tensor, layer: usize, observer: &mut Observer) -> Result<Tensor> {
        let h = self.norm.apply(x)?;
        let y = match &self.ffn {
            Ffn::Dense { up, down, shape } => biased_mlp(&h, up, down, None, *shape, Some(x))?,
            Ffn::Moe(moe) => {
                let observer = observer.as_mut().map(|observer| &mut **observer as &mut dyn RoutingObserver);
                moe.forward_onto(&h, Some(x), &mut Ctx { layer, observer, ..Ctx::default() })?.0
            }
        };
        Ok(y.detach())
    }
}
