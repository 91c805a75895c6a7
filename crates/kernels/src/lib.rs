//! The arithmetic of Senmon on plain slices: it knows no tensor library, no model and no file.
//!
//! Every kernel is a safe function over `&[f32]` with a scalar twin in [`reference`] that a property test
//! holds it to. Kernels run on the rayon pool they are called from, and give the same bits for any number of
//! threads: work is cut over outputs, never over the length of a sum, or else in blocks whose size does not
//! depend on the number of threads and whose results are joined in a fixed order.

pub mod activation;
pub mod buffers;
pub mod dispatch;
pub mod expert_mlp;
pub mod gemm;
pub mod math;
pub mod peak;
pub mod pool;
pub mod simd;
