//! A Mixture-of-Experts layer inside a candle model written by hand, trained by candle's own AdamW.
//!
//! The task: y = x·A or y = x·B, whichever the sign of the first coordinate says. The layer is all that is not linear in
//! the model; its routing holds the losses that keep the load of the experts even.
//!
//! ```text
//! cargo run --release -p senmon --example moe_layer
//! ```

use candle_core::{DType, Device, Tensor};
use candle_nn::{AdamW, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap, linear, loss};
use senmon::moe::{BalanceConfig, Ctx, MoeConfig, MoeLayer, Result, Routing, balance};

struct Model {
    enter: Linear,
    moe: MoeLayer,
    leave: Linear,
}

impl Model {
    fn new(vb: VarBuilder) -> Result<Self> {
        let moe = MoeLayer::new(MoeConfig::new(32, 64, 8, 2), vb.pp("moe"))?; // H 32, I 64, 8 experts, 2 per token
        Ok(Self { enter: linear(8, 32, vb.pp("enter"))?, moe, leave: linear(32, 8, vb.pp("leave"))? })
    }

    /// `x` [T, 8] → [T, 8], and what the router did.
    fn forward(&self, x: &Tensor, ctx: &mut Ctx) -> Result<(Tensor, Routing)> {
        let h = self.enter.forward(x)?; // [T, 32]
        let (y, routing) = self.moe.forward(&h, ctx)?;
        Ok((self.leave.forward(&(h + y)?)?, routing))
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let normal = |rows| Tensor::randn(0f32, 1.0, (rows, 8), &Device::Cpu);
    let (x, a, b) = (normal(1024)?, normal(8)?, normal(8)?);
    let side = x.narrow(1, 0, 1)?.gt(0f32)?.broadcast_as(x.shape())?;
    let target = side.where_cond(&x.matmul(&a)?, &x.matmul(&b)?)?;

    let (vars, balancing) = (VarMap::new(), BalanceConfig { aux: 0.1, ..BalanceConfig::default() });
    let model = Model::new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    let mut adamw = AdamW::new(vars.all_vars(), ParamsAdamW { lr: 1e-2, ..ParamsAdamW::default() })?;
    for step in 0..=200 {
        let (y, routing) = model.forward(&x, &mut Ctx { train: true, step, ..Ctx::default() })?;
        let error = loss::mse(&y, &target)?;
        let terms = balance::losses(std::slice::from_ref(&routing), &balancing)?;
        let total = terms.iter().try_fold(error.clone(), |sum, t| sum + (&t.value * t.coefficient)?)?;
        adamw.backward_step(&total)?;
        if step % 40 == 0 {
            println!("step {step:>3}: loss {:>7.4}, load {:?}", error.to_scalar::<f32>()?, routing.load);
        }
    }
    Ok(())
}
