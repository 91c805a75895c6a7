//! Whether a Mixture of Experts pays on given text: the same text, budget and seeds for a model with experts, dense models
//! and ensembles, at several meanings of "equal cost", and what can be claimed of the difference.
//!
//! The files read in the order of the work: [`plan`] makes the models that a comparison needs (with [`sizes`]), [`run`] trains
//! them and keeps what they measured as [`record`]s, [`statistics`] has the intervals (over [`student`]), [`analysis`] the
//! comparisons, [`verdict`] the words; [`page`] and [`files`] write them down. [`sweep`] searches a shape rather than
//! comparing kinds. `docs/compare.md` has the formulas, and what they cannot say.
//!
//! This crate prints nothing: [`run::Watch`] is told how it goes.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod analysis;
pub mod error;
pub mod files;
pub mod heldout;
pub mod page;
pub mod plan;
pub mod record;
pub mod run;
pub mod sizes;
pub mod statistics;
pub mod student;
pub mod sweep;
pub mod verdict;

pub use error::{CompareError, Result};
