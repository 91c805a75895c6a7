//! The heavy parts of a decoder as candle ops with gradients, over `senmon-kernels`. Weights of a block are captured
//! parameters with sinks: one op takes the residual stream and gives it back, so few edges pass through candle.

mod attention;
mod consistency;
mod embedding;
mod latent;
mod loss;
mod norm;

pub use attention::{AttentionBlock, Continued, LayerCache, Residual};
pub use consistency::consistency;
pub use embedding::embed;
pub use latent::LatentBlock;
pub use loss::{LossTerms, lm_loss};
pub use norm::Norm;

use candle_core::{Result, bail};
use senmon_moe::Param;

/// Runs `add` on the sink of a parameter; a frozen parameter has none and gets nothing.
fn add_gradient<R>(param: &Param, add: impl FnOnce(Option<&mut [f32]>) -> R) -> R {
    match param.sink() {
        Some(sink) => add(Some(&mut sink.lock())),
        None => add(None),
    }
}

/// What forward kept, or the error that a second backward deserves.
fn taken<T>(saved: &std::sync::Mutex<Option<T>>, op: &str) -> Result<T> {
    match saved.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
        Some(saved) => Ok(saved),
        None => bail!("{op}: backward a second time; the activations were freed by the first"),
    }
}
