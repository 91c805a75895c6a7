//! The routing of texts: for every token its experts in each MoE layer, what followed it, and how likely the model held that.
//!
//! In a safetensors file, N tokens of all texts one after another, K experts per token, E experts of a layer:
//!
//! | tensor | shape | what |
//! |---|---|---|
//! | `tokens`, `sequence`, `position` | \[N\] u32 | the token, its text, its place there |
//! | `targets`, `predicted` | \[N\] u32 | the token that followed; the likeliest by the model. 4294967295: none |
//! | `loss` | \[N\] f32 | -ln p(target); NaN where there is no target, or nothing was predicted |
//! | `domains` | \[N\] u16 | index into the names of domains |
//! | `documents` | \[N\] u32 | the document that the text is from, where texts may be parts of documents |
//! | `experts.{l}` | \[N, K\] u16 | the experts of MoE layer l; 65535: an empty slot; E and above: experts that compute nothing |
//! | `weights.{l}` | \[N, K\] f32 | what their outputs are multiplied with; 0 in an empty slot |
//! | `dropped.{l}` | \[N, K\] u8 | 1 where a capacity took the slot's expert away |
//! | `logits.{l}` | \[N, E\] f32 | the router's, where they were asked for; NaN for tokens that the layer did not see |
//!
//! Metadata: `model` (a hash), `router` (its kind), and as JSON lists `domains` (names), `layers` (the numbers l), `names` of the
//! layers where they are not their numbers (`encoder.1`), `experts` (E of each, where it is known).

use crate::error::{InsightError, Result};
use std::collections::BTreeMap;

/// The id of an empty slot.
pub const EMPTY: u16 = u16::MAX;
/// The id of a token that is not there.
pub const NONE: u32 = u32::MAX;

/// What a trace is of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// A hash of the model.
    pub model: String,
    /// The kind of its routers.
    pub router: String,
    /// The names of the domains.
    pub domains: Vec<String>,
}

/// The routing of texts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// What it is of.
    pub about: About,
    /// \[N\].
    pub tokens: Vec<u32>,
    /// The text of each token: \[N\].
    pub sequence: Vec<u32>,
    /// Its place in its text: \[N\].
    pub position: Vec<u32>,
    /// The token that followed, or [`NONE`]: \[N\].
    pub targets: Vec<u32>,
    /// The token that the model held likeliest, or [`NONE`]: \[N\].
    pub predicted: Vec<u32>,
    /// -ln p(target): \[N\].
    pub loss: Vec<f32>,
    /// \[N\].
    pub domains: Vec<u16>,
    /// The document that each token's text is from, \[N\]; nothing where every text is a document. Texts of one document are alike: what
    /// counts independent samples counts documents.
    pub documents: Vec<u32>,
    /// The MoE layers, by number.
    pub layers: BTreeMap<usize, LayerTrace>,
}

/// The routing of one layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerTrace {
    /// What it is called, where that is not its number.
    pub name: Option<String>,
    /// E, where it is known.
    pub count: Option<usize>,
    /// K.
    pub top_k: usize,
    /// Expert of each slot, or [`EMPTY`]: \[N, K\].
    pub experts: Vec<u16>,
    /// Weight of each slot: \[N, K\].
    pub weights: Vec<f32>,
    /// 1 where a capacity took the slot's expert: \[N, K\].
    pub dropped: Vec<u8>,
    /// The router's logits: \[N, E\].
    pub logits: Option<Vec<f32>>,
}

/// What the tensors of layer `l` are called.
pub(crate) fn name(part: &str, l: usize) -> String {
    format!("{part}.{l}")
}

impl Trace {
    /// N.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The document of a token.
    pub fn document(&self, row: usize) -> u32 {
        self.documents.get(row).copied().unwrap_or(self.sequence[row])
    }

    /// There are no tokens.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Checks that its parts fit.
    pub fn validate(&self) -> Result<()> {
        let n = self.len();
        let long = |name: &str, found: usize, expected: usize| match found == expected {
            true => Ok(()),
            false => Err(InsightError::tensor(name, format!("has {found} elements, expected {expected}"))),
        };
        long("sequence", self.sequence.len(), n)?;
        long("position", self.position.len(), n)?;
        long("targets", self.targets.len(), n)?;
        long("predicted", self.predicted.len(), n)?;
        long("loss", self.loss.len(), n)?;
        long("domains", self.domains.len(), n)?;
        if !self.documents.is_empty() {
            long("documents", self.documents.len(), n)?;
        }
        let names = self.about.domains.len();
        if let Some(at) = self.domains.iter().position(|domain| usize::from(*domain) >= names) {
            let what = format!("element {at} is domain {}, there are {names} names", self.domains[at]);
            return Err(InsightError::tensor("domains", what));
        }
        self.layers.iter().try_for_each(|(l, layer)| layer.validate(*l, n, &long))
    }
}

impl LayerTrace {
    fn validate(
        &self,
        l: usize,
        tokens: usize,
        long: &dyn Fn(&str, usize, usize) -> Result<()>,
    ) -> Result<()> {
        let experts = name("experts", l);
        if self.top_k == 0 {
            return Err(InsightError::tensor(&experts, "has no slots, K is at least 1"));
        }
        let slots = tokens
            .checked_mul(self.top_k)
            .ok_or_else(|| InsightError::tensor(&experts, format!("{tokens} times {}", self.top_k)))?;
        long(&experts, self.experts.len(), slots)?;
        long(&name("weights", l), self.weights.len(), slots)?;
        long(&name("dropped", l), self.dropped.len(), slots)?;
        let each = self.experts.iter().zip(&self.weights).zip(&self.dropped).enumerate();
        for (slot, ((expert, weight), dropped)) in each {
            let (token, empty) = (slot / self.top_k, *expert == EMPTY);
            if !weight.is_finite() || empty && *weight != 0.0 {
                let why = if empty { "of an empty slot, which has 0" } else { "which is no number" };
                let what = format!("token {token} has the weight {weight} {why}");
                return Err(InsightError::tensor(&name("weights", l), what));
            }
            if *dropped > 1 || *dropped == 1 && !empty {
                let why = if empty { "expected 0 or 1" } else { "but its slot has an expert" };
                let what = format!("token {token} has {dropped}, {why}");
                return Err(InsightError::tensor(&name("dropped", l), what));
            }
        }
        match (&self.logits, self.count) {
            (None, _) => Ok(()),
            (Some(_), None) => {
                let what = "the layer's number of experts is not known";
                Err(InsightError::tensor(&name("logits", l), what))
            }
            (Some(logits), Some(count)) => {
                long(&name("logits", l), logits.len(), tokens.saturating_mul(count))
            }
        }
    }
}
