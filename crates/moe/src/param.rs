//! Parameters, and the sinks that gather their gradients.
//!
//! candle's `GradStore` makes zeros and adds out of place, on one thread: for the weights of all experts that costs more
//! than the products. A parameter with a [`Sink`] gets its gradient added into a buffer that lives as long as the
//! training: it also serves accumulation over micro-batches. A parameter without one is an ordinary tensor whose
//! gradient comes back from `backward`.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor, Var, bail};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A weight tensor (f32, contiguous, on the CPU) and, in training, where its gradient goes.
#[derive(Clone, Debug)]
pub struct Param {
    name: Arc<str>,
    tensor: Tensor,
    sink: Option<Sink>,
}

impl Param {
    /// A tensor as it is: frozen, or a candle variable whose gradient `backward` returns.
    pub fn new(name: &str, tensor: Tensor) -> Self {
        Self { name: name.into(), tensor, sink: None }
    }

    /// A variable that starts from `values` and has a sink of zeros.
    pub fn trainable(name: &str, values: Vec<f32>, shape: &[usize]) -> Result<Self> {
        let sink = Sink(Arc::new(Mutex::new(vec![0.0; values.len()])));
        let tensor = Var::from_vec(values, shape, &candle_core::Device::Cpu)?.as_tensor().clone();
        Ok(Self { name: name.into(), tensor, sink: Some(sink) })
    }

    /// The name, as in the list of a model's parameters.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The values.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
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
        self.tensor.inplace_op1(&Update(std::cell::Cell::new(Some(change))))
    }

    /// Calls `f` with the values.
    pub fn read<R>(&self, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
        crate::tensor::read(&self.tensor, f)
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
