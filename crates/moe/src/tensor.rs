//! Plain slices of candle tensors on the CPU, for kernels.

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Shape, Storage, Tensor, bail};
use senmon_kernels::buffers::Buffer;

/// The elements of a contiguous f32 argument of a custom op.
pub fn slice<'a>(what: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(data) = storage else {
        bail!("{what} must be f32, not {:?}", storage_dtype(storage))
    };
    match layout.contiguous_offsets() {
        Some((start, end)) => match data.get(start..end) {
            Some(elements) => Ok(elements),
            None => bail!("{what} has given its memory away"),
        },
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
pub fn own(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// `tensor` in another shape. Where it has that shape, itself: candle makes a step of the graph of each reshape, and adds its gradient
/// into fresh zeros.
pub fn shaped(tensor: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    if *tensor.shape() == shape { Ok(tensor.clone()) } else { tensor.reshape(shape) }
}

/// Elements from which on the memory of a tensor is worth keeping: freed and asked for again it is cleared, or comes as fresh pages.
const LONG: usize = 1 << 15;

/// Keeps the memory of a tensor of f32 for the next [`Buffer`]. The tensor must be the last that looks at it: for another that still did,
/// [`slice()`] is an error. One with a history, or a short one, is dropped as it is.
pub fn recycle(tensor: Tensor) -> Result<()> {
    if tensor.track_op() { Ok(()) } else { reclaim(tensor) }
}

/// As [`recycle`], also of a tensor with a history: for when backward has been through it.
pub fn reclaim(tensor: Tensor) -> Result<()> {
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
    if tensor.is_variable() || tensor.elem_count() < LONG {
        return Ok(());
    }
    tensor.inplace_op1(&Take)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    #[test]
    fn memory_is_kept_of_what_nobody_looks_at() {
        let len = LONG + 12_345;
        let tensor = own(vec![3.0; len], len).unwrap();
        let other = tensor.clone();
        let at = read(&tensor, |x| x.as_ptr() as usize).unwrap();
        recycle(tensor).unwrap();
        let again = Buffer::exact(len);
        assert_eq!((again.as_ptr() as usize, again[len - 1]), (at, 3.0));
        let error = read(&other, |x| x.len()).unwrap_err().to_string();
        assert!(error.contains("given its memory away"), "{error}");

        // What a gradient may still need stays, and so does what is short.
        let var = Var::from_vec(vec![1.0f32; len], len, &Device::Cpu).unwrap();
        let twice = (var.as_tensor() * 2.0).unwrap();
        recycle(twice.clone()).unwrap();
        assert_eq!(read(&twice, |x| (x.len(), x[7])).unwrap(), (len, 2.0));
        reclaim(twice.clone()).unwrap();
        assert!(read(&twice, <[f32]>::len).is_err());
        assert_eq!(Buffer::exact(len)[7], 2.0);
        let short = own(vec![1.0; 8], 8).unwrap();
        recycle(short.clone()).unwrap();
        assert_eq!(read(&short, <[f32]>::len).unwrap(), 8);
    }
}
