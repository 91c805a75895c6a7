//! The token embedding.

use super::add_gradient;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use senmon_kernels::buffers::Buffer;
use senmon_kernels::embedding;
use senmon_moe::Param;
use senmon_moe::tensor::{own, read, slice};
use std::sync::Arc;

/// The rows of `table` \[V, H\] at `tokens` \[T\]: \[T, H\].
pub fn embed(table: &Param, tokens: &Arc<[u32]>) -> Result<Tensor> {
    let &[vocab, hidden] = table.dims() else { bail!("{}: {:?} is no table", table.name(), table.dims()) };
    if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab) {
        bail!("token {token} is not in a vocabulary of {vocab}");
    }
    if table.as_stored().is_some() {
        let mut x = Buffer::exact(tokens.len() * hidden).into_vec();
        table.matrices(|parts| {
            for (token, out) in tokens.iter().zip(x.chunks_exact_mut(hidden.max(1))) {
                let mut row = *token as usize;
                for part in parts {
                    if row < part.rows {
                        part.row(row, out);
                        break;
                    }
                    row -= part.rows;
                }
            }
        })?;
        return own(x, (tokens.len(), hidden));
    }
    table.tensor().apply_op1(Embed { table: table.clone(), tokens: tokens.clone() })
}

struct Embed {
    table: Param,
    tokens: Arc<[u32]>,
}

impl CustomOp1 for Embed {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(&self, table: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, hidden) = l.shape().dims2()?;
        let mut x = Buffer::exact(self.tokens.len() * hidden).into_vec();
        embedding::forward(slice("embedding", table, l)?, hidden, &self.tokens, &mut x);
        Ok((CpuStorage::F32(x), (self.tokens.len(), hidden).into()))
    }

    fn bwd(&self, table: &Tensor, _x: &Tensor, dx: &Tensor) -> Result<Option<Tensor>> {
        let (_, hidden) = table.dims2()?;
        read(dx, |dx| {
            add_gradient(&self.table, |sink| {
                if let Some(sink) = sink {
                    embedding::backward(dx, hidden, &self.tokens, sink);
                }
            });
        })?;
        Ok(None)
    }
}
