//! Statistics of a trace, each beside what it would be by chance.
//!
//! [`of`] computes all that need one trace; [`saturation`] compares two, [`cosines`] and [`expert_similarity`] compare weights, and [`cost`] says
//! what a placement costs. `docs/insight.md` has the formulas and their sources. The same trace, options and seed give the same bits on any
//! number of threads.

mod alike;
mod batches;
pub(crate) mod cache;
mod coactivation;
pub(crate) mod confidence;
pub(crate) mod load;
pub(crate) mod numbers;
mod paths;
pub(crate) mod placement;
mod repeats;
mod saturation;
mod similarity;
pub(crate) mod specialization;
pub(crate) mod view;
mod vocabulary;

pub use alike::{Alike, Outputs};
pub use batches::Batch;
pub use cache::Cache;
pub use coactivation::{Coactivation, Pair};
pub use confidence::Confidence;
pub use load::{DEAD, Load};
pub use numbers::{Distribution, Figure, Information};
pub use paths::{Path, Paths, Transition};
pub use placement::{Cost, HeldOut, Placement, Suggestion, cost};
pub use repeats::{Repeat, Repeats};
pub use saturation::{Saturation, saturation};
pub use similarity::{MATCHED_EXACTLY, Mlp, cosines, expert_similarity};
pub use specialization::{Positions, Specialization};
pub use view::MOST_EXPERTS;
pub use vocabulary::{ByIds, Vocabulary};

use crate::error::{InsightError, Result};
use crate::trace::Trace;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use view::Layer;

/// The most shuffles.
const MOST_SHUFFLES: usize = 10_000;

/// What statistics are to look at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// The seed of shuffles.
    pub seed: u64,
    /// Shuffles, where chance is found by them.
    pub shuffles: usize,
    /// Occurrences from which on an id counts in [`Vocabulary`].
    pub min_occurrences: u64,
    /// Layers of more experts than this have no tables of experts by experts.
    pub matrices_up_to: usize,
    /// Pairs of experts in [`Coactivation::pairs`].
    pub pairs: usize,
    /// Layers of a path, where there are as many; whole paths are looked at besides.
    pub path_layers: usize,
    /// Paths in [`Paths::frequent`].
    pub paths: usize,
    /// Numbers of ranks to place experts over; none larger than the number of experts is tried.
    pub ranks: Vec<usize>,
    /// What a unit of imbalance weighs in a placement, against the traffic that chance gives.
    pub balance: f64,
    /// Tokens that a placement is sought with, at most; what it costs is said of all.
    pub placement_tokens: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seed: 0,
            shuffles: 5,
            min_occurrences: 10,
            matrices_up_to: 128,
            pairs: 20,
            path_layers: 3,
            paths: 10,
            ranks: vec![2, 4, 8],
            balance: 1.0,
            placement_tokens: 8192,
        }
    }
}

impl Options {
    /// Checks the ranges.
    pub fn validate(&self) -> Result<()> {
        if let Some(ranks) = self.ranks.iter().find(|ranks| **ranks == 0 || **ranks > MOST_EXPERTS) {
            return Err(InsightError::trace(format!("{ranks} ranks: expected 1 to {MOST_EXPERTS}")));
        }
        if self.shuffles > MOST_SHUFFLES {
            return Err(InsightError::trace(format!(
                "shuffles = {}: expected {MOST_SHUFFLES} at most",
                self.shuffles
            )));
        }
        if !self.balance.is_finite() || self.balance < 0.0 {
            return Err(InsightError::trace(format!("balance = {}: expected 0 or more", self.balance)));
        }
        Ok(())
    }
}

/// What there is to say of one trace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Statistics {
    /// A hash of the model.
    pub model: String,
    /// The kind of its routers.
    pub router: String,
    /// The names of the domains: \[D\].
    pub domains: Vec<String>,
    /// Tokens of the trace.
    pub tokens: u64,
    /// Texts of the trace.
    pub texts: u64,
    /// The mean of the losses that are numbers, in nats per token.
    pub loss: Option<f64>,
    /// Each layer, by rising number.
    pub layers: Vec<LayerStatistics>,
    /// Each layer to the next, where some token has a first choice in both.
    pub transitions: Vec<Transition>,
    /// Paths through [`Options::path_layers`] layers that follow each other, and through all layers.
    pub paths: Vec<Paths>,
}

/// What there is to say of one layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerStatistics {
    /// Its number.
    pub layer: usize,
    /// What it is called, where that is not its number.
    pub name: Option<String>,
    /// E.
    pub experts: usize,
    /// K, the slots of a token.
    pub top_k: usize,
    /// What each expert does.
    pub load: Load,
    /// How sure the router is.
    pub confidence: Confidence,
    /// Experts that are used together.
    pub coactivation: Coactivation,
    /// Domains and experts.
    pub domains: Specialization,
    /// Ids of tokens and experts.
    pub vocabulary: Vocabulary,
    /// Places in texts and experts.
    pub positions: Positions,
    /// Whether tokens have the experts of those before them.
    pub repeats: Repeats,
    /// Experts of batches of 1, 2, 4, ... texts.
    pub batches: Vec<Batch>,
    /// Caches of 1, 2, ... E experts.
    pub cache: Cache,
    /// Experts over ranks.
    pub placement: Vec<Suggestion>,
}

/// Suggested placements of each layer's experts, by number, over each of [`Options::ranks`].
pub fn placements(trace: &Trace, options: &Options) -> Result<Vec<(usize, Vec<Suggestion>)>> {
    options.validate()?;
    let texts = view::texts(trace);
    let of = |layer: &Layer| Ok((layer.number, placement::of(layer, &texts, trace.len(), options)?));
    view::layers(trace)?.par_iter().map(of).collect()
}

/// The statistics of a trace.
pub fn of(trace: &Trace, options: &Options) -> Result<Statistics> {
    options.validate()?;
    let layers = view::layers(trace)?;
    let texts = view::texts(trace);
    let neighbours: Vec<(usize, usize)> = view::neighbours(trace, &texts).collect();
    let blocks = specialization::blocks(trace, &texts);
    let one = |layer: &Layer| -> Result<LayerStatistics> {
        Ok(LayerStatistics {
            layer: layer.number,
            name: layer.trace.name.clone(),
            experts: layer.experts,
            top_k: layer.trace.top_k,
            load: load::of(layer),
            confidence: confidence::of(layer),
            coactivation: coactivation::of(layer, options),
            domains: specialization::of_domains(trace, layer, &blocks, options),
            vocabulary: vocabulary::of(trace, layer, options),
            positions: specialization::of_positions(trace, layer),
            repeats: repeats::of(trace, layer, &neighbours, options),
            batches: batches::of(layer, &texts, trace.len()),
            cache: cache::of(layer, &texts, trace.len(), options),
            placement: placement::of(layer, &texts, trace.len(), options)?,
        })
    };
    let each: Result<Vec<LayerStatistics>> = layers.par_iter().map(one).collect();
    let transitions: Vec<Transition> = layers
        .par_windows(2)
        .map(|pair| paths::transition(trace, &pair[0], &pair[1], options))
        .filter(|transition| transition.tokens > 0)
        .collect();
    let all: Vec<&Layer> = layers.iter().collect();
    let length = options.path_layers.clamp(1, all.len().max(1));
    let mut windows: Vec<&[&Layer]> = all.windows(length).collect();
    if length < all.len() {
        windows.push(&all);
    }
    let losses: Vec<f64> = trace.loss.iter().map(|x| f64::from(*x)).filter(|x| x.is_finite()).collect();
    Ok(Statistics {
        model: trace.about.model.clone(),
        router: trace.about.router.clone(),
        domains: trace.about.domains.clone(),
        tokens: trace.len() as u64,
        texts: texts.len() as u64,
        loss: numbers::ratio(losses.iter().sum(), losses.len() as f64),
        layers: each?,
        transitions,
        paths: windows
            .par_iter()
            .map(|layers| paths::through(layers, options))
            .filter(|paths| paths.tokens > 0)
            .collect(),
    })
}
