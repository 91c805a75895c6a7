//! GGUF, the container that llama.cpp keeps models in: metadata by key, tensors by name.
//!
//! [`Gguf::read`] takes the bytes of a file, usually mapped, and says what is in it and where. The bytes need
//! not be trusted: nothing in them makes it panic or take more memory than a small multiple of their number.
//! Versions 2 and 3, little endian. [`split`] puts together what was written as several files; [`Writer`]
//! writes one.
//!
//! No error names the file: whoever opened it does.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod bytes;
mod error;
mod metadata;
mod read;
pub mod split;
mod value;
mod write;

pub use error::{GgufError, Result};
pub use metadata::{FromValue, Metadata};
pub use read::{Gguf, Tensor};
pub use senmon_kernels::blocks::ElementType;
pub use value::{Array, Value, ValueType};
pub use write::{TensorInfo, Writer};

/// The key of the alignment of tensors.
pub const ALIGNMENT_KEY: &str = "general.alignment";

/// The alignment of tensors in a file that does not say.
pub const DEFAULT_ALIGNMENT: u64 = 32;

/// Dimensions that a tensor can have at most.
pub const MAX_DIMS: usize = 4;
