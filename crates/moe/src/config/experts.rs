//! What of `[experts]` is beyond plain ones.

use serde::{Deserialize, Serialize};

/// What a layer has beyond routed experts that are all alike, and shared ones.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Extras {
    /// Experts that give nothing (MoE++, 2410.07348). Their ids follow those of the real experts.
    pub zero: usize,
    /// Experts that give back their input (MoE++; LongCat-Flash). Their ids follow those of the zero experts.
    pub identity: usize,
    /// Experts that give α₁x + α₂v, α = softmax(W x) (MoE++). Their ids come last.
    pub constant: usize,
    /// One dense MLP of an expert's width beside the routed ones, both weighted by a learned softmax (DeepSpeed's PR-MoE,
    /// 2201.05596).
    pub residual: bool,
    /// Routed experts work in a space of this width, which all share the way into and out of; 0 for that of the model.
    pub latent: usize,
    /// What comes out of the narrow space is divided by its root mean square.
    pub latent_norm: bool,
    /// The experts are in so many parts, each of which sees all tokens; the predictions of the parts are averaged (the efficient
    /// ensemble, 2110.03360). 0 and 1 for one.
    pub members: usize,
}

impl Extras {
    /// Experts that compute nothing: ids from E on.
    pub fn special(&self) -> usize {
        self.zero.saturating_add(self.identity).saturating_add(self.constant)
    }

    /// Something is done to what the experts give.
    pub(crate) fn follow_experts(&self) -> bool {
        self.identity > 0 || self.constant > 0 || self.residual || self.latent > 0
    }
}
