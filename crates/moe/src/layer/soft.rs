//! Soft MoE: experts work on slots that are means of tokens.

use super::route::{dispatch, together};
use super::{Ctx, MoeLayer, Routing};
use crate::error::{MoeError, Result};
use crate::ops;
use crate::router::{mix, soft_slots};
use candle_core::Tensor;

impl MoeLayer {
    /// `y` \[T, L\] of `x` \[T, H\] and `inner` \[T, L\].
    pub(super) fn soft(&self, x: &Tensor, inner: &Tensor, ctx: &Ctx) -> Result<(Tensor, Routing)> {
        let (tokens, width) = inner.dims2()?;
        let mut together = together(&self.config, tokens, ctx.sequences.max(1));
        if !ctx.train && together > 0 && !tokens.is_multiple_of(together) {
            // A text is as long as it is.
            together = tokens;
        }
        if together == 0 || !tokens.is_multiple_of(together) {
            let expected = format!("[a multiple of {together}, {width}], the tokens that are mixed together");
            return Err(MoeError::Shape {
                what: "the input of the layer",
                found: vec![tokens, width],
                expected,
            });
        }
        let unit = |x: &Tensor| -> candle_core::Result<Tensor> {
            x.broadcast_div(&x.sqr()?.sum_keepdim(1)?.maximum(1e-12f32)?.sqrt()?)
        };
        let phi = unit(&ops::watched(&self.params.router)?)?;
        let mut logits = unit(x)?.matmul(&phi.t()?)?;
        if let Some(scale) = self.params.extra("router_scale") {
            logits = logits.broadcast_mul(&ops::watched(scale)?)?;
        }
        let routed = self.route_all(x, &logits, ctx)?;
        let (groups, s) = (tokens / together, soft_slots(&self.config.router));
        let (spread, combine) = mix(&logits, groups, ctx.mask)?;
        let all = self.config.experts * s;
        let slots =
            spread.transpose(1, 2)?.contiguous()?.matmul(&inner.reshape((groups, together, width))?)?;
        let experts: Vec<u32> = (0..groups * all).map(|slot| (slot % all / s) as u32).collect();
        let dispatch = dispatch(&experts, 1, &self.config)?;
        let out = self.outputs(&slots.reshape((groups * all, width))?, &dispatch, 1, ctx)?;
        let y = combine.matmul(&out.reshape((groups, all, width))?)?;
        Ok((y.reshape((tokens, width))?, routed.routing))
    }
}
