//! Attention by its definition, in f64: softmax of all scores a query sees, times the values.

use crate::attention::Heads;

/// The probabilities of query `i` of head `head` over the keys it sees, with the first of them.
fn probabilities(
    h: Heads,
    x: &[f64],
    stride: usize,
    k: usize,
    b: usize,
    head: usize,
    i: usize,
) -> (usize, Vec<f64>) {
    let d = h.head_dim;
    let kv = head / (h.heads / h.kv_heads);
    let from = h.window.map_or(0, |window| (i + 1).saturating_sub(window));
    let q = &x[(b * h.keys + i) * stride + head * d..][..d];
    let scores: Vec<f64> = (from..=i)
        .map(|j| {
            let key = &x[(b * h.keys + j) * stride + k + kv * d..][..d];
            q.iter().zip(key).map(|(a, b)| a * b).sum::<f64>() * h.scale as f64
        })
        .collect();
    let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = scores.iter().map(|s| (s - greatest).exp()).collect();
    let sum: f64 = exp.iter().sum();
    (from, exp.iter().map(|e| e / sum).collect())
}

/// `out` \[B·S, heads·D\] from rows of queries, keys (from column `k` on) and values (from column `v` on).
pub fn forward(h: Heads, x: &[f64], stride: usize, k: usize, v: usize) -> Vec<f64> {
    let d = h.head_dim;
    let mut out = vec![0.0; h.batch * h.keys * h.heads * d];
    for b in 0..h.batch {
        for head in 0..h.heads {
            let kv = head / (h.heads / h.kv_heads);
            for i in 0..h.keys {
                let (from, p) = probabilities(h, x, stride, k, b, head, i);
                for (j, p) in p.iter().enumerate() {
                    for c in 0..d {
                        out[((b * h.keys + i) * h.heads + head) * d + c] +=
                            p * x[(b * h.keys + from + j) * stride + v + kv * d + c];
                    }
                }
            }
        }
    }
    out
}

/// The gradient of `x` for that of the output, by the chain rule written out.
pub fn backward(h: Heads, x: &[f64], stride: usize, k: usize, v: usize, d_out: &[f64]) -> Vec<f64> {
    let d = h.head_dim;
    let mut dx = vec![0.0; x.len()];
    for b in 0..h.batch {
        for head in 0..h.heads {
            let kv = head / (h.heads / h.kv_heads);
            for i in 0..h.keys {
                let (from, p) = probabilities(h, x, stride, k, b, head, i);
                let g = &d_out[((b * h.keys + i) * h.heads + head) * d..][..d];
                let value = |j: usize, c: usize| (b * h.keys + from + j) * stride + v + kv * d + c;
                let dp: Vec<f64> =
                    (0..p.len()).map(|j| (0..d).map(|c| g[c] * x[value(j, c)]).sum()).collect();
                let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
                for j in 0..p.len() {
                    let ds = p[j] * (dp[j] - mean) * h.scale as f64;
                    for c in 0..d {
                        let query = (b * h.keys + i) * stride + head * d + c;
                        let key = (b * h.keys + from + j) * stride + k + kv * d + c;
                        dx[value(j, c)] += p[j] * g[c];
                        dx[query] += ds * x[key];
                        dx[key] += ds * x[query];
                    }
                }
            }
        }
    }
    dx
}
