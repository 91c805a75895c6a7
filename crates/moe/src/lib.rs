//! Mixture-of-Experts layers for [candle](candle_core): routers, load balancing, and experts that cost only what is
//! active, with gradients, fast on CPUs.
//!
//! ```
//! use senmon_moe::{Ctx, MoeConfig, MoeLayer};
//! use senmon_moe::candle_core::{DType, Device, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let layer = MoeLayer::new(MoeConfig::new(64, 128, 8, 2), vb)?; // H 64, I 128, 8 experts, 2 per token
//! let x = Tensor::randn(0f32, 1.0, (4, 16, 64), &Device::Cpu)?; // [B, S, H]
//! let (y, routing) = layer.forward(&x, &mut Ctx::default())?;
//! assert_eq!(y.dims(), [4, 16, 64]);
//! assert_eq!(routing.load.iter().sum::<u32>(), 4 * 16 * 2);
//! # Ok(())
//! # }
//! ```
//!
//! The crate knows no whole model, no file and no process. Each heavy part is a candle op with its own backward over
//! `senmon-kernels` ([`ops`]); [`reference`](mod@reference) composes the same from stock candle ops, for tests and for devices that have no kernel.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod balance;
pub mod capacity;
pub mod config;
pub mod error;
pub mod layer;
pub mod ops;
pub mod packed;
pub mod param;
pub mod reference;
pub mod rng;
pub mod router;
pub mod stored;
pub mod tensor;

pub use candle_core;
pub use config::{BalanceConfig, RouterConfig};
pub use error::{MoeError, Result};
pub use layer::{Ctx, MoeConfig, MoeLayer, MoeParams, Routing, RoutingObserver, SelectionBias};
pub use packed::PackedWeight;
pub use param::{Param, Sink};
pub use stored::{Stored, StoredMatrix};
