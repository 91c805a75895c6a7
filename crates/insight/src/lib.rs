//! What routers did: the routing of texts, token by token and layer by layer, recorded ([`Recorder`]), and kept in files
//! ([`Trace`]).
//!
//! The crate sees routers through [`senmon_moe::RoutingObserver`]; it knows no whole model, and trains none.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod error;
mod file;
pub mod recorder;
pub mod replay;
pub mod report;
pub mod statistics;
pub mod trace;
pub mod words;

pub use error::{InsightError, Result};
pub use recorder::Recorder;
pub use trace::{About, EMPTY, LayerTrace, NONE, Trace};
