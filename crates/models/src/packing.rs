//! Which weights of a decoder are packed for fast products, and how.

use crate::decoder::Weight;
use crate::error::{ModelError, Result};
use crate::params::{ParamDef, param_defs};
use crate::spec::{FfnSpec, ModelSpec};
use senmon_kernels::blocks::ElementType;
use senmon_kernels::packed::Format;
use senmon_moe::packed::{PackedWeight, Plan};

/// How a decoder holds the weights that it multiplies with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Packing {
    /// As they are stored: each product decodes them to f32. The reference, and for models that are larger than memory.
    #[default]
    Exact,
    /// Packed in memory, with their elements as they are where those have a packed form. Activations are rounded to bf16 for
    /// weights in bf16, and to 8 bits for coded ones.
    Packed,
    /// Packed, and coded to a type where they are wider; the head to `Q6_K` where that is `Q4_K`.
    Coded(ElementType),
}

/// What packing a model would take.
pub struct Packings {
    /// A plan for each parameter that can be packed, in the order of [`param_defs`].
    plans: Vec<Option<Plan>>,
    /// For a head that is the embedding, which itself stays as it is.
    head: Option<Plan>,
    /// Bytes in memory of all of them.
    pub bytes: u64,
}

/// Rows of the matrices that a parameter is multiplied as (0: as it is stored), if its products can be with packed weights.
pub(crate) fn rows(spec: &ModelSpec, def: &ParamDef) -> Option<usize> {
    if !def.stays() {
        return None;
    }
    let layer = def.name.strip_prefix("layers.").and_then(|rest| {
        let (number, part) = rest.split_once('.')?;
        Some((spec.layers.get(number.parse::<usize>().ok()?)?, part))
    });
    let Some((ffn, part)) = layer else { return (def.name == "head").then_some(0) };
    match (part, ffn) {
        ("qkv" | "q" | "q_a" | "q_b" | "kv_a" | "out" | "latent.down" | "latent.up", _) => Some(0),
        ("gate_up", FfnSpec::Dense(mlp)) => Some(mlp.intermediate),
        ("experts.gate_up" | "residual.gate_up", FfnSpec::Moe(moe)) => Some(moe.expert.intermediate),
        ("shared.gate_up", FfnSpec::Moe(moe)) => Some(moe.shared().intermediate),
        ("down" | "experts.down" | "shared.down" | "residual.down", _) => {
            def.shape.iter().rev().nth(1).copied()
        }
        _ => None,
    }
}

/// The matrix of a router: it stays in f32, and is packed as that.
pub(crate) fn is_router(def: &ParamDef) -> bool {
    def.name.ends_with(".router") && def.shape.len() == 2
}

impl Packings {
    /// What packing `weights`, in the order of [`param_defs`], would take.
    pub fn plan(spec: &ModelSpec, weights: &[Weight], to: Option<ElementType>) -> Self {
        let defs = param_defs(spec);
        let plan = |name: &str, weight: &Weight, rows: usize| {
            let Weight::Stored(stored) = weight else { return None };
            let to = match (name, to) {
                ("head" | "embed", Some(ElementType::Q4K)) => Some(ElementType::Q6K),
                _ => to,
            };
            PackedWeight::plan(stored, rows, to)
        };
        let mut plans: Vec<Option<Plan>> = defs
            .iter()
            .zip(weights)
            .map(|(def, weight)| rows(spec, def).and_then(|rows| plan(&def.name, weight, rows)))
            .collect();
        // The two halves of an MLP are packed both or not at all.
        for first in 0..defs.len() {
            let Some(stem) = defs[first].name.strip_suffix("gate_up") else { continue };
            let second = defs.iter().position(|def| def.name.strip_suffix("down") == Some(stem));
            if let Some(second) = second.filter(|second| plans[first].is_none() != plans[*second].is_none()) {
                (plans[first], plans[second]) = (None, None);
            }
        }
        let embedding = defs.iter().position(|def| def.name == "embed").filter(|_| spec.tie_embeddings);
        let head = embedding.and_then(|at| plan("embed", &weights[at], 0));
        let columns = |def: &ParamDef| def.shape.last().copied().unwrap_or(0);
        let bytes = |plan: &Plan, def: &ParamDef| plan.bytes(columns(def)) as u64;
        let all = defs.iter().zip(&plans);
        let mut sum: u64 = all.filter_map(|(def, plan)| Some(bytes(plan.as_ref()?, def))).sum();
        if let (Some(at), Some(head)) = (embedding, &head) {
            sum += bytes(head, &defs[at]);
        }
        Self { plans, head, bytes: sum }
    }

    /// Packs them; a head that is the embedding comes by itself. Memory of files that they were read from is let go of as they
    /// are packed.
    pub fn pack(self, spec: &ModelSpec, weights: Vec<Weight>) -> Result<(Vec<Weight>, Option<PackedWeight>)> {
        let defs = param_defs(spec);
        if weights.len() != self.plans.len() || defs.first().is_none_or(|def| def.name != "embed") {
            return Err(ModelError::Internal { what: "the weights are not those of the plan".into() });
        }
        let head = match (&self.head, weights.first()) {
            (Some(plan), Some(Weight::Stored(stored))) => Some(PackedWeight::new(stored, plan)?),
            _ => None,
        };
        let packed = weights.into_iter().zip(self.plans).zip(&defs).map(|((weight, plan), def)| {
            Ok(match (weight, plan) {
                (Weight::Stored(stored), Some(plan)) => Weight::Packed(PackedWeight::new(&stored, &plan)?),
                (Weight::Values(values), _) if is_router(def) => {
                    Weight::Packed(PackedWeight::from_values(Format::F32, &def.shape, def.shape[0], &values)?)
                }
                (weight, _) => weight,
            })
        });
        Ok((packed.collect::<Result<_>>()?, head))
    }
}
