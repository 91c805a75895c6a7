//! Decoders from a [`spec::ModelSpec`], and the checkpoint layouts of the families that have them.
//!
//! A family is a file that maps `config.json` to the spec and back and names its tensors; the decoder is one for all, in
//! training and in generation. This crate prints nothing and opens no socket.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod audit;
pub mod chat;
pub mod checkpoint;
pub mod convert;
pub mod counts;
pub mod decoder;
pub mod error;
pub mod families;
pub mod files;
pub mod generation;
pub mod gguf;
pub mod identity;
pub mod inspect;
pub mod names;
pub mod ops;
pub mod packing;
pub mod params;
pub mod penalties;
pub mod rope;
pub mod sampling;
mod save;
pub mod seq2seq;
pub mod shapes;
mod sources;
pub mod spec;
mod tensor_files;
pub mod text;

pub use error::{ModelError, Result};
