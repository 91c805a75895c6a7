//! What the tensors of a GGUF file are called, and where each lies in the parameters. The experts of a layer are stacked in
//! one tensor for each of gate, up and down.

use super::arch::{Arch, RopeOrder};
use crate::names::{Order, Part};
use crate::params::param_defs;
use crate::spec::{FfnSpec, MlpSpec, ModelSpec, QkNorm};
use std::collections::HashMap;

/// The tensors of a GGUF file with this model.
///
/// Where the architecture turns the rows of queries and keys ([`RopeOrder::Turned`]) and the specification does not say that
/// neighbours turn together, they are brought into the order of the family.
pub fn parts(spec: &ModelSpec, arch: &Arch) -> Vec<Part> {
    let defs = param_defs(spec);
    let index: HashMap<&str, usize> =
        defs.iter().enumerate().map(|(index, def)| (def.name.as_str(), index)).collect();
    let mut parts = Vec::new();
    let mut put = |tensor: String, shape: &[usize], param: String, offset, order, stack| {
        if let Some(&param) = index.get(param.as_str()) {
            parts.push(Part { tensor, shape: shape.to_vec(), stack, param, offset, order });
        }
    };
    let (h, a, straight) = (spec.hidden, &spec.attention, Order::Straight);
    let (q, kv) = a.widths();
    let heads = match arch.rope == RopeOrder::Turned && !a.rope.neighbours {
        true => Order::HeadsByTurns(a.head_dim),
        false => straight,
    };
    put("token_embd.weight".into(), &[spec.vocab, h], "embed".into(), 0, straight, None);
    for (l, ffn) in spec.layers.iter().enumerate() {
        let mut all = |tensor: &str, shape: &[usize], param: &str, offset, order, stack| {
            put(format!("blk.{l}.{tensor}"), shape, format!("layers.{l}.{param}"), offset, order, stack);
        };
        let mut add = |tensor: &str, shape: &[usize], param: &str| {
            all(tensor, shape, param, 0, straight, None);
        };
        for (tensor, param) in [("attn_norm", "attn_norm"), (arch.ffn_norm, "ffn_norm")] {
            add(&format!("{tensor}.weight"), &[h], param);
            add(&format!("{tensor}.bias"), &[h], &format!("{param}_bias"));
        }
        add("attn_output.bias", &[h], "out_bias");
        match &a.latent {
            None => {
                for (tensor, rows) in [("q_norm", q), ("k_norm", kv)] {
                    let width = if a.qk_norm == QkNorm::Full { rows } else { a.head_dim };
                    add(&format!("attn_{tensor}.weight"), &[width], tensor);
                }
                add("attn_sinks.weight", &[a.heads], "sinks");
                add("attn_output.weight", &[h, q], "out");
                let mut row = 0;
                for (tensor, rows, order) in [("q", q, heads), ("k", kv, heads), ("v", kv, straight)] {
                    all(&format!("attn_{tensor}.weight"), &[rows, h], "qkv", row * h, order, None);
                    all(&format!("attn_{tensor}.bias"), &[rows], "qkv_bias", row, order, None);
                    row += rows;
                }
            }
            Some(latent) => {
                let (c, rank) = (latent.kv_rank, latent.q_rank.unwrap_or(0));
                add("attn_q.weight", &[q, h], "q");
                add("attn_q_a.weight", &[rank, h], "q_a");
                add("attn_q_a_norm.weight", &[rank], "q_a_norm");
                add("attn_q_b.weight", &[q, rank], "q_b");
                add("attn_kv_a_mqa.weight", &[c + latent.rope, h], "kv_a");
                add("attn_kv_a_norm.weight", &[c], "kv_a_norm");
                add("attn_output.weight", &[h, a.heads * latent.value], "out");
                // Of each head first what keys are made with, turned, then what values are made with.
                let rows = latent.nope + latent.value;
                for head in 0..a.heads {
                    let (first, stack) = (head * rows * c, Some((head, a.heads)));
                    let keys = &[c, latent.nope];
                    all("attn_k_b.weight", keys, "kv_b", first, Order::Turned, stack);
                    let first = first + latent.nope * c;
                    all("attn_v_b.weight", &[latent.value, c], "kv_b", first, straight, stack);
                }
            }
        }
        let mut mlp = |suffix: &str, [pre, out]: [&str; 2], spec: &MlpSpec, experts: Option<usize>| {
            let (i, p) = (spec.intermediate, spec.pre());
            for e in 0..experts.unwrap_or(1) {
                let stack = experts.map(|count| (e, count));
                let matrices = [
                    ("gate", i, h, pre, e * p),
                    ("up", i, h, pre, e * p + p - i),
                    ("down", h, i, out, e * h),
                ];
                for (part, rows, cols, param, first) in matrices {
                    if part == "gate" && !spec.gated {
                        continue;
                    }
                    let (tensor, bias) = (format!("ffn_{part}{suffix}"), format!("{param}_bias"));
                    all(&format!("{tensor}.weight"), &[rows, cols], param, first * cols, straight, stack);
                    all(&format!("{tensor}.bias"), &[rows], &bias, first, straight, stack);
                }
            }
        };
        match ffn {
            FfnSpec::Dense(dense) => mlp("", ["gate_up", "down"], dense, None),
            FfnSpec::Moe(moe) => {
                let e = moe.experts;
                mlp("_exps", ["experts.gate_up", "experts.down"], &moe.expert, Some(e));
                mlp("_shexp", ["shared.gate_up", "shared.down"], &moe.shared(), None);
                let mut add = |tensor: &str, shape: &[usize], param: &str| {
                    all(tensor, shape, param, 0, straight, None);
                };
                add("ffn_gate_inp.weight", &[e, h], "router");
                add("ffn_gate_inp.bias", &[e], "router_logits_bias");
                add("exp_probs_b.bias", &[e], "router_bias");
                // One row, and no matrix in the file.
                add("ffn_gate_inp_shexp.weight", &[h], "shared.gate");
            }
        }
    }
    put("output_norm.weight".into(), &[h], "final_norm".into(), 0, straight, None);
    put("output_norm.bias".into(), &[h], "final_norm_bias".into(), 0, straight, None);
    put("output.weight".into(), &[spec.vocab, h], "head".into(), 0, straight, None);
    put("output.bias".into(), &[spec.vocab], "head_bias".into(), 0, straight, None);
    parts
}
