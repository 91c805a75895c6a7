//! Training of language models with and without experts: what a run is ([`config`]), how it is put together
//! ([`layers`]), what it tells ([`observer`]) and what it leaves behind ([`folder`]).
//!
//! This crate prints nothing. Progress goes to observers, and those that show something are handed what they write to.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod ablation;
pub mod alarms;
pub mod balancing;
mod check;
pub mod config;
pub mod error;
pub mod eval;
pub mod folder;
pub mod jsonl;
pub mod layers;
pub mod likeness;
pub mod observer;
pub mod presets;
pub mod recent;
pub mod route;
pub mod schedule;
pub mod setup;
pub mod sizes;
pub mod state;
pub mod step;
pub mod tensorboard;
pub mod terminal;
pub mod tracing;
pub mod trainer;

pub use config::RunConfig;
pub use error::{Result, TrainError};
pub use layers::Layers;
