//! Plain slices of candle tensors on the CPU, for kernels.

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use senmon_kernels::buffers::Buffer;

/// The elements of a contiguous f32 argument of a custom op.
pub fn slice<'a>(what: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(data) = storage else {
        bail!("{what} must be f32, not {:?}", storage_dtype(storage))
    };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("{what} must be contiguous"),
    }
}

fn storage_dtype(storage: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}

/// Calls `read` with the elements of a f32 tensor on the CPU, copied first only when they are not contiguous.
pub fn read<R>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(read(slice("tensor", storage, layout)?)),
        _ => bail!("the kernels run on the CPU; the tensor is on {:?}", tensor.device().location()),
    }
}

/// As [`read`], for two tensors.
pub fn read2<R>(a: &Tensor, b: &Tensor, f: impl FnOnce(&[f32], &[f32]) -> R) -> Result<R> {
    read(a, |a| read(b, |b| f(a, b)))?
}

/// A tensor on the CPU that takes over `values`.
pub fn own(values: Vec<f32>, shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// Elements from which on the memory of a tensor is worth keeping: freed and asked for again it is cleared, or comes as fresh pages.
const LONG: usize = 1 << 15;

/// Keeps the memory of a tensor of f32 for the next [`Buffer`]. The tensor must be the last that looks at it; another that still did would
/// find it empty, which is an error with everything that reads it. One with a history, or a short one, is dropped as it is.
pub fn recycle(tensor: Tensor) -> Result<()> {
    struct Take;
    impl InplaceOp1 for Take {
        fn name(&self) -> &'static str {
            "recycle"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
            if let CpuStorage::F32(values) = storage {
                drop(Buffer::from(std::mem::take(values)));
            }
            Ok(())
        }
    }
    if tensor.track_op() || tensor.is_variable() || tensor.elem_count() < LONG {
        return Ok(());
    }
    tensor.inplace_op1(&Take)
}
