//! The parameters of an encoder-decoder, what their tensors are called, and the parameters in memory.

use super::config::{Seq2SeqSpec, StackSpec};
use crate::decoder::Weight;
use crate::error::{ModelError, Result};
use crate::names::{Order, Part};
use crate::params::{Init, ParamDef, ParamKind};
use crate::tensor_files::Files;
use senmon_moe::Param;
use std::collections::HashMap;

/// All parameters, and the tensors that they are made of.
pub(super) fn all(spec: &Seq2SeqSpec) -> (Vec<ParamDef>, Vec<Part>) {
    let (mut defs, mut parts) = (Vec::new(), Vec::new());
    let mut param = |name: String, shape: &[usize], kind: ParamKind, tensors: Vec<(String, Vec<usize>)>| {
        let mut offset = 0;
        for (tensor, shape) in tensors {
            let part = Part { tensor, shape, param: defs.len(), offset, order: Order::Straight, stack: None };
            offset += part.len();
            parts.push(part);
        }
        defs.push(ParamDef { name, shape: shape.to_vec(), kind, init: Init::Zeros });
    };
    let (h, a) = (spec.hidden, spec.heads * spec.head_dim);
    let (i, p, weight) = (spec.mlp.intermediate, spec.mlp.pre(), ParamKind::Weight);
    let one = |tensor: &str, shape: &[usize]| vec![(tensor.to_owned(), shape.to_vec())];
    param("shared".into(), &[spec.vocab, h], weight, one("shared.weight", &[spec.vocab, h]));
    let stacks = [("encoder", &spec.encoder), ("decoder", &spec.decoder)];
    for ((stack, layers), own_table) in stacks.into_iter().zip(spec.own_tables) {
        if own_table {
            let (shape, tensor) = ([spec.vocab, h], format!("{stack}.embed_tokens.weight"));
            param(format!("{stack}.embed"), &shape, weight, one(&tensor, &shape));
        }
        let table = format!("{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight");
        let shape = [spec.buckets, spec.heads];
        param(format!("{stack}.bias"), &shape, ParamKind::Bias, one(&table, &shape));
        for (l, sparse) in layers.sparse.iter().enumerate() {
            let name = |part: &str| format!("{stack}.{l}.{part}");
            let file = |n: usize, part: &str| format!("{stack}.block.{l}.layer.{n}.{part}.weight");
            let mut norm = |n: usize, part: &str| {
                param(name(part), &[h], ParamKind::Norm, one(&file(n, "layer_norm"), &[h]));
            };
            norm(0, "self.norm");
            let cross = stack == "decoder";
            if cross {
                norm(1, "cross.norm");
            }
            let last = 1 + usize::from(cross);
            norm(last, "ffn.norm");
            for (n, kind, block) in [(0, "SelfAttention", "self"), (1, "EncDecAttention", "cross")] {
                if n == 1 && !cross {
                    continue;
                }
                for part in ["q", "k", "v"] {
                    let tensor = file(n, &format!("{kind}.{part}"));
                    param(name(&format!("{block}.{part}")), &[a, h], weight, one(&tensor, &[a, h]));
                }
                let tensor = file(n, &format!("{kind}.o"));
                param(name(&format!("{block}.o")), &[h, a], weight, one(&tensor, &[h, a]));
            }
            if *sparse {
                let e = spec.experts;
                let expert = |e: usize, part: &str| file(last, &format!("mlp.experts.expert_{e}.{part}"));
                let each = |part: &str, shape: [usize; 2]| {
                    (0..e).map(|e| (expert(e, part), shape.to_vec())).collect::<Vec<_>>()
                };
                param(name("router"), &[e, h], weight, one(&file(last, "mlp.router.classifier"), &[e, h]));
                if spec.router_bias {
                    let bias = format!("{stack}.block.{l}.layer.{last}.mlp.router.classifier.bias");
                    param(name("router_bias"), &[e], ParamKind::Bias, one(&bias, &[e]));
                }
                param(name("experts.gate_up"), &[e, p, h], weight, each("wi", [p, h]));
                param(name("experts.down"), &[e, h, i], weight, each("wo", [h, i]));
                continue;
            }
            let block = if spec.switch { "mlp" } else { "DenseReluDense" };
            let up = match spec.mlp.gated {
                false => one(&file(last, &format!("{block}.wi")), &[i, h]),
                true => ["wi_0", "wi_1"]
                    .iter()
                    .map(|part| (file(last, &format!("{block}.{part}")), vec![i, h]))
                    .collect(),
            };
            param(name("gate_up"), &[p, h], weight, up);
            param(name("down"), &[h, i], weight, one(&file(last, &format!("{block}.wo")), &[h, i]));
        }
        let tensor = format!("{stack}.final_layer_norm.weight");
        param(format!("{stack}.norm"), &[h], ParamKind::Norm, one(&tensor, &[h]));
    }
    if spec.own_head {
        param("head".into(), &[spec.vocab, h], weight, one("lm_head.weight", &[spec.vocab, h]));
    }
    (defs, parts)
}

/// Why a tensor that is no part may be there.
pub(super) fn explanation(spec: &Seq2SeqSpec, name: &str) -> Option<&'static str> {
    match name {
        "encoder.embed_tokens.weight" if !spec.own_tables[0] => Some("the embedding, again"),
        "decoder.embed_tokens.weight" if !spec.own_tables[1] => Some("the embedding, again"),
        "lm_head.weight" if !spec.own_head => Some("the head, which is the embedding"),
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight" => {
            Some("a bias that attention to the encoder does not have")
        }
        _ => None,
    }
}

fn same(files: &Files, name: &str, size: usize) -> Result<bool> {
    let (mut other, mut shared) = (vec![0.0; size], vec![0.0; size]);
    files.decode(name, &mut other)?;
    files.decode("shared.weight", &mut shared)?;
    Ok(other == shared)
}

/// The model has a tensor of its own for what may be the shared embedding: the file has one, and it is another.
pub(super) fn has_own(spec: &Seq2SeqSpec, files: &Files, name: &str) -> Result<bool> {
    let shape = [spec.vocab, spec.hidden];
    let is = |name: &str| files.tensors.get(name).is_some_and(|entry| entry.shape == shape);
    Ok(is(name) && is("shared.weight") && !same(files, name, spec.vocab * spec.hidden)?)
}

/// The layer of a parameter that holds experts' matrices, in words, and the elements that one expert has in it.
pub(super) fn of_experts(def: &ParamDef) -> Option<(String, usize)> {
    let (layer, _) = def.name.split_once(".experts.")?;
    Some((layer.to_owned(), def.len() / def.shape.first().copied().unwrap_or(1).max(1)))
}

/// The parameters by name.
#[derive(Debug, Default)]
pub struct Params(HashMap<String, Param>);

impl Params {
    /// The parameters `defs` made of `weights`.
    pub(super) fn new(defs: &[ParamDef], weights: Vec<Weight>) -> Result<Self> {
        let param = |(def, weight): (&ParamDef, Weight)| -> Result<(String, Param)> {
            Ok((def.name.clone(), weight.frozen(def)?))
        };
        Ok(Self(defs.iter().zip(weights).map(param).collect::<Result<_>>()?))
    }

    /// A parameter that must be there.
    pub(super) fn get(&self, name: &str) -> Result<Param> {
        self.maybe(name).ok_or_else(|| ModelError::Internal { what: format!("no parameter {name}") })
    }

    /// A parameter that may be there.
    pub(super) fn maybe(&self, name: &str) -> Option<Param> {
        self.0.get(name).cloned()
    }
}

impl StackSpec {
    /// Layers.
    pub fn len(&self) -> usize {
        self.sparse.len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.sparse.is_empty()
    }
}
