//! Parameters, and the sinks that gather their gradients.
//!
//! candle's `GradStore` makes zeros and adds out of place, on one thread: for the weights of all experts that costs more
//! than the products. A parameter with a [`Sink`] gets its gradient added into a buffer that lives as long as the
//! training: it also serves accumulation over micro-batches. A parameter without one is an ordinary tensor whose
//! gradient comes back from `backward`.

use crate::packed::PackedWeight;
use crate::stored::Stored;
use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor, Var, bail};
use senmon_kernels::elements::Matrix;
use senmon_kernels::gemm::Precision;
use senmon_kernels::packed::Format;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A weight tensor (f32, contiguous, on the CPU) and, in training, where its gradient goes; or one that stays as it is stored.
#[derive(Clone, Debug)]
pub struct Param {
    name: Arc<str>,
    values: Values,
    sink: Option<Sink>,
    precision: Precision,
}

#[derive(Clone, Debug)]
enum Values {
    Tensor(Tensor),
    Stored(Arc<Stored>),
    Packed(Arc<PackedWeight>),
}

impl Param {
    /// A tensor as it is: frozen, or a candle variable whose gradient `backward` returns.
    pub fn new(name: &str, tensor: Tensor) -> Self {
        Self { name: name.into(), values: Values::Tensor(tensor), sink: None, precision: Precision::F32 }
    }

    /// A weight as it is stored: frozen.
    pub fn stored(name: &str, stored: Stored) -> Self {
        Self {
            name: name.into(),
            values: Values::Stored(Arc::new(stored)),
            sink: None,
            precision: Precision::F32,
        }
    }

    /// A packed weight: frozen.
    pub fn packed(name: &str, packed: PackedWeight) -> Self {
        Self {
            name: name.into(),
            values: Values::Packed(Arc::new(packed)),
            sink: None,
            precision: Precision::F32,
        }
    }

    /// A variable that starts from `values` and has a sink of zeros.
    pub fn trainable(name: &str, values: Vec<f32>, shape: &[usize]) -> Result<Self> {
        let sink = Sink(Arc::new(Mutex::new(vec![0.0; values.len()])));
        let tensor = Var::from_vec(values, shape, &candle_core::Device::Cpu)?.as_tensor().clone();
        Ok(Self {
            name: name.into(),
            values: Values::Tensor(tensor),
            sink: Some(sink),
            precision: Precision::F32,
        })
    }

    /// The same with products of another precision: those of its values with activations, and those of its gradient. Values
    /// and gradient themselves stay f32; a stored or packed weight has its products by its type.
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// How exactly its products are computed, while it is a tensor.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// What the activations of its products are rounded to, but for codes of 8 bits: by its type where it is packed.
    pub fn precision_of_activations(&self) -> Precision {
        match self.as_packed().map(PackedWeight::format) {
            Some(Format::Bf16) => Precision::Bf16,
            Some(_) => Precision::F32,
            None => self.precision,
        }
    }

    /// The name, as in the list of a model's parameters.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The values; those of a stored or packed weight are decoded at the first call and kept.
    pub fn tensor(&self) -> &Tensor {
        match &self.values {
            Values::Tensor(tensor) => tensor,
            Values::Stored(stored) => stored.tensor(),
            Values::Packed(packed) => packed.tensor(),
        }
    }

    /// The shape.
    pub fn dims(&self) -> &[usize] {
        match &self.values {
            Values::Tensor(tensor) => tensor.dims(),
            Values::Stored(stored) => stored.shape(),
            Values::Packed(packed) => packed.shape(),
        }
    }

    /// The weight as it is stored, unless it is a tensor.
    pub fn as_stored(&self) -> Option<&Stored> {
        match &self.values {
            Values::Tensor(_) | Values::Packed(_) => None,
            Values::Stored(stored) => Some(stored),
        }
    }

    /// The packed weight, if it is one.
    pub fn as_packed(&self) -> Option<&PackedWeight> {
        match &self.values {
            Values::Packed(packed) => Some(packed),
            _ => None,
        }
    }

    /// Calls `f` with the matrices \[R, C\] of a weight \[.., R, C\], in their order; those of a stored one may be parts of them.
    pub fn matrices<T>(&self, f: impl FnOnce(&[Matrix]) -> T) -> Result<T> {
        match &self.values {
            Values::Stored(stored) => Ok(f(&stored.matrices())),
            Values::Tensor(_) | Values::Packed(_) => {
                let tensor = self.tensor();
                let dims = tensor.dims();
                let [.., rows, cols] = dims else { bail!("{}: {dims:?} is no matrix", self.name) };
                crate::tensor::read(tensor, |values| f(&Matrix::each(values, *rows, *cols)))
            }
        }
    }

    /// Where the gradient is gathered, in training.
    pub fn sink(&self) -> Option<&Sink> {
        self.sink.as_ref()
    }

    /// Changes the values in place (an optimiser step); no graph may still need the old ones.
    pub fn update(&self, change: impl FnOnce(&mut [f32])) -> Result<()> {
        struct Update<F>(std::cell::Cell<Option<F>>);
        impl<F: FnOnce(&mut [f32])> InplaceOp1 for Update<F> {
            fn name(&self) -> &'static str {
                "update"
            }
            fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
                let (CpuStorage::F32(data), Some((start, end))) = (storage, layout.contiguous_offsets())
                else {
                    bail!("a parameter is f32 and contiguous");
                };
                if let Some(change) = self.0.take() {
                    change(&mut data[start..end]);
                }
                Ok(())
            }
        }
        let Values::Tensor(tensor) = &self.values else { bail!("{}: such a weight is frozen", self.name) };
        tensor.inplace_op1(&Update(std::cell::Cell::new(Some(change))))
    }

    /// Calls `f` with the values.
    pub fn read<R>(&self, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
        crate::tensor::read(self.tensor(), f)
    }
}

/// A gradient that kernels add into, of the shape of its parameter.
#[derive(Clone, Debug)]
pub struct Sink(Arc<Mutex<Vec<f32>>>);

impl Sink {
    /// The gradient gathered so far; whoever takes it in zeroes it.
    pub fn lock(&self) -> MutexGuard<'_, Vec<f32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
