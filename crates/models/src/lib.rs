//! Decoders from a [`spec::ModelSpec`], and the checkpoint layouts of the families that have them.

pub mod spec;
