//! The token embedding: rows of a table, and the gradient that goes back to them.

use crate::dispatch::Dispatch;
use crate::pool::{self, Shared};
use crate::profile;

/// Rows of a task.
const BLOCK: usize = 64;

/// `x` \[T, H\] = the rows of `table` \[V, H\] at `tokens` \[T\]. Panics at a token that the table does not have.
pub fn forward(table: &[f32], hidden: usize, tokens: &[u32], x: &mut [f32]) {
    let _span = profile::span("embedding");
    assert_eq!(x.len(), tokens.len() * hidden, "x is [T, H]");
    let x = Shared::new(x);
    pool::for_each(tokens.len().div_ceil(BLOCK), |block| {
        for t in block * BLOCK..((block + 1) * BLOCK).min(tokens.len()) {
            // SAFETY: each row is one task's.
            let row = unsafe { x.part(t * hidden, hidden) };
            row.copy_from_slice(&table[tokens[t] as usize * hidden..][..hidden]);
        }
    });
}

/// Adds each row of `dx` \[T, H\] to its token's row of `d_table` \[V, H\], in the order of the tokens. Panics at a token
/// that the table does not have.
pub fn backward(dx: &[f32], hidden: usize, tokens: &[u32], d_table: &mut [f32]) {
    let _span = profile::span("embedding");
    assert_eq!(dx.len(), tokens.len() * hidden, "dx is [T, H]");
    if hidden == 0 || tokens.is_empty() {
        return;
    }
    let vocab = d_table.len() / hidden;
    let by_token = Dispatch::new(tokens, 1, vocab);
    let by_token = by_token.expect("every token has a row in the table");
    let touched: Vec<usize> = by_token.touched().collect();
    let d_table = Shared::new(d_table);
    pool::for_each(touched.len().div_ceil(BLOCK), |block| {
        for &token in &touched[block * BLOCK..((block + 1) * BLOCK).min(touched.len())] {
            // SAFETY: each token is one task's.
            let row = unsafe { d_table.part(token * hidden, hidden) };
            for place in by_token.rows_of(token) {
                let t = by_token.token_of_row[place] as usize;
                for (sum, d) in row.iter_mut().zip(&dx[t * hidden..][..hidden]) {
                    *sum += d;
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_same_on_any_threads};

    #[test]
    fn rows_go_out_and_come_back() {
        let (vocab, hidden) = (7, 5);
        let mut random = Random(1);
        let table = random.vec(vocab * hidden, 1.0);
        let tokens: Vec<u32> = (0..200).map(|_| random.below(vocab) as u32).collect();
        let mut x = vec![f32::NAN; 200 * hidden];
        forward(&table, hidden, &tokens, &mut x);
        let dx = random.vec(x.len(), 1.0);
        let mut want = vec![1.0f32; table.len()];
        for (t, token) in tokens.iter().enumerate() {
            for c in 0..hidden {
                assert_eq!(x[t * hidden + c], table[*token as usize * hidden + c]);
                want[*token as usize * hidden + c] += dx[t * hidden + c];
            }
        }
        assert_same_on_any_threads(|| {
            let mut got = vec![1.0; want.len()];
            backward(&dx, hidden, &tokens, &mut got);
            assert_eq!(got, want);
            got
        });
    }
}
