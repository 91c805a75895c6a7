//! Senmon as a library: the crates that it is made of under one name, and the command line ([`cli`]), so that tests
//! reach all of it.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod cli;
pub mod commands;
pub mod failure;
pub mod ui;

pub use senmon_data as data;
pub use senmon_insight as insight;
pub use senmon_kernels as kernels;
pub use senmon_models as models;
pub use senmon_moe as moe;
pub use senmon_train as train;
