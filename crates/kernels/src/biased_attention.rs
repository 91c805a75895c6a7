//! Attention with a bias for each distance and without a scale, as T5 has it (1910.10683), in one direction, in both, or across.
//! Scores of a block of queries exist at once. Shapes: Sq queries, Sk keys, A = heads · D.

use crate::buffers::Buffer;
use crate::gemm::{View, serial};
use crate::pool::{self, Shared};
use crate::profile;

/// Queries of a task.
const BLOCK: usize = 64;

/// The bucket of the distance `key - query`: exact ones near by, logarithmic ones further off, one for all from `max_distance`
/// on. In both directions half of the buckets are for keys behind the query; else all are for keys before it.
pub fn bucket(distance: i64, both: bool, buckets: usize, max_distance: usize) -> usize {
    let (base, buckets, distance) = match both {
        true => (if distance > 0 { buckets / 2 } else { 0 }, buckets / 2, distance.unsigned_abs() as usize),
        false => (0, buckets, (-distance).max(0) as usize),
    };
    let exact = buckets / 2;
    if distance < exact {
        return base + distance;
    }
    let ratio = (distance as f32 / exact as f32).ln() / (max_distance as f32 / exact as f32).ln();
    base + (exact + (ratio * (buckets - exact) as f32) as usize).min(buckets - 1)
}

/// What the attention of a pass is made of.
pub struct Pass<'a> {
    /// Heads.
    pub heads: usize,
    /// D.
    pub head_dim: usize,
    /// Query i sees the keys up to `past + i`; `None`: all.
    pub past: Option<usize>,
    /// Bias \[heads\] by bucket \[buckets, heads\], and the bucket of a key's distance from a query.
    pub bias: Option<(&'a [f32], &'a (dyn Fn(i64) -> usize + Sync))>,
}

/// `out` \[Sq, A\] from `q` \[Sq, A\], `k` and `v` \[Sk, A\]. Each row is computed by itself, in one order: a query gets the same
/// bits alone as among others.
pub fn attend(pass: &Pass, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) {
    let _span = profile::span("attention");
    let (d, a) = (pass.head_dim, pass.heads * pass.head_dim);
    assert!(a > 0 && q.len() == out.len() && k.len() == v.len(), "q and out, k and v are of one size");
    let (queries, keys) = (q.len() / a, k.len() / a);
    if queries == 0 || keys == 0 {
        out.fill(0.0);
        return;
    }
    let blocks = queries.div_ceil(BLOCK);
    let out = Shared::new(out);
    pool::for_each(blocks * pass.heads, |task| {
        let (head, first) = (task % pass.heads, task / pass.heads * BLOCK);
        let rows = BLOCK.min(queries - first);
        let at = head * d;
        let mut scores = Buffer::stale(rows * keys);
        let (query, key) = (View::rows(&q[first * a + at..], a), View::rows(&k[at..], a).t());
        serial(rows, keys, d, query, key, &mut scores, keys, false);
        for (r, row) in scores.chunks_exact_mut(keys).enumerate() {
            let i = pass.past.unwrap_or(0) + first + r;
            let seen = pass.past.map_or(keys, |_| (i + 1).min(keys));
            if let Some((table, bucket)) = pass.bias {
                for (j, x) in row[..seen].iter_mut().enumerate() {
                    *x += table[bucket(j as i64 - i as i64) * pass.heads + head];
                }
            }
            let greatest = row[..seen].iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
            let mut sum = 0.0f32;
            for x in &mut row[..seen] {
                *x = (*x - greatest).exp();
                sum += *x;
            }
            row[..seen].iter_mut().for_each(|x| *x /= sum);
            row[seen..].fill(0.0);
        }
        let mut o = Buffer::stale(rows * d);
        serial(rows, d, keys, View::rows(&scores, keys), View::rows(&v[at..], a), &mut o, d, false);
        for (r, o) in o.chunks_exact(d).enumerate() {
            // SAFETY: a head's part of a row is one task's.
            unsafe { out.part((first + r) * a + at, d) }.copy_from_slice(o);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, assert_same_on_any_threads};

    #[test]
    fn rows_are_softmaxes_of_biased_scores() {
        let (heads, head_dim, queries, keys, buckets) = (3, 5, 70, 90, 8);
        let a = heads * head_dim;
        let mut random = Random(1);
        let (q, k, v) = (random.vec(queries * a, 1.0), random.vec(keys * a, 1.0), random.vec(keys * a, 1.0));
        let table = random.vec(buckets * heads, 1.0);
        for past in [None, Some(20)] {
            let of = |distance: i64| bucket(distance, past.is_none(), buckets, 12);
            for biased in [false, true] {
                let bias: Option<(&[f32], &(dyn Fn(i64) -> usize + Sync))> = biased.then_some((&table, &of));
                let mut want = vec![0.0f64; queries * a];
                for (i, h) in (0..queries).flat_map(|i| (0..heads).map(move |h| (i, h))) {
                    let at = past.unwrap_or(0) + i;
                    let scores: Vec<f64> = (0..past.map_or(keys, |_| at + 1))
                        .map(|j| {
                            let dot = (0..head_dim).map(|c| {
                                q[i * a + h * head_dim + c] as f64 * k[j * a + h * head_dim + c] as f64
                            });
                            let bias = if biased { table[of(j as i64 - at as i64) * heads + h] } else { 0.0 };
                            dot.sum::<f64>() + bias as f64
                        })
                        .collect();
                    let sum: f64 = scores.iter().map(|x| x.exp()).sum();
                    for (j, c) in (0..scores.len()).flat_map(|j| (0..head_dim).map(move |c| (j, c))) {
                        let part = scores[j].exp() / sum * v[j * a + h * head_dim + c] as f64;
                        want[i * a + h * head_dim + c] += part;
                    }
                }
                let run = || {
                    let mut out = vec![f32::NAN; queries * a];
                    attend(&Pass { heads, head_dim, past, bias }, &q, &k, &v, &mut out);
                    out
                };
                assert_close("out", &run(), &want, 1e-5);
                assert_same_on_any_threads(run);
                // A query alone, with just the keys that it sees.
                if past.is_some() {
                    let mut one = vec![0.0; a];
                    let pass = Pass { heads, head_dim, past: Some(20 + 33), bias };
                    attend(&pass, &q[33 * a..34 * a], &k[..54 * a], &v[..54 * a], &mut one);
                    assert_eq!(one, run()[33 * a..34 * a]);
                }
            }
        }
    }

    #[test]
    fn buckets_are_exact_then_logarithmic() {
        let before: Vec<usize> = (0..20).map(|d| bucket(-d, false, 8, 12)).collect();
        assert_eq!(before, [0, 1, 2, 3, 4, 4, 5, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]);
        assert_eq!(bucket(5, false, 8, 12), 0);
        let both: Vec<usize> = (-6..7).map(|d| bucket(d, true, 8, 12)).collect();
        assert_eq!(both, [3, 3, 2, 2, 2, 1, 0, 5, 6, 6, 6, 7, 7]);
    }
}
