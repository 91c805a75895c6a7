//! The arithmetic of Senmon on plain slices: it knows no tensor library, no model and no file.
//!
//! Every kernel is a safe function over `&[f32]` that a property test holds to a scalar twin
//! ([`reference`](mod@reference)). Kernels run on as many threads as the rayon pool has that they are called from, and give the same bits for any
//! number of threads: work is cut over outputs, never over the length of a sum, or else in blocks whose size does not
//! depend on the number of threads and whose results are joined in a fixed order.

pub mod activation;
pub mod attention;
pub mod biased_attention;
pub mod blocks;
pub mod buffers;
pub mod cross_entropy;
pub mod dispatch;
pub mod elements;
pub mod embedding;
pub mod expert_mlp;
pub mod gemm;
mod lanes;
pub mod layout;
pub mod math;
pub mod norm;
pub mod optimizer;
pub mod packed;
pub mod peak;
pub mod pool;
pub mod process;
pub mod profile;
pub mod reference;
pub mod residual;
pub mod rotary;
pub mod simd;
mod team;
#[cfg(test)]
mod testing;
