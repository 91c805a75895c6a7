//! Mixture-of-Experts layers for candle.

pub mod config;
pub use candle_core;
