//! Balancing by a state that moves once per optimiser step, from the whole global batch.

/// One step of the selection bias: b_i += rate · sign(mean(c) - c_i), from the counts `load` of a whole global batch; with
/// `recentre` the mean of b goes back to 0 (2408.15664).
pub fn step_bias(bias: &mut [f32], load: &[u64], rate: f64, recentre: bool) {
    let mean = load.iter().sum::<u64>() as f64 / load.len().max(1) as f64;
    for (b, &count) in bias.iter_mut().zip(load) {
        let gap = mean - count as f64;
        if gap != 0.0 {
            *b += (rate * gap.signum()) as f32;
        }
    }
    if recentre && !bias.is_empty() {
        let mean = bias.iter().map(|b| *b as f64).sum::<f64>() / bias.len() as f64;
        for b in bias.iter_mut() {
            *b -= mean as f32;
        }
    }
}

/// The least coefficient of `l1`, with which it starts too.
pub const LEAST_MULTIPLIER: f64 = 1e-8;

/// The coefficient of `l1` after a step in which the share `shut` of the gates was 0: times 1.2 where that is below `target`, divided by it where above
/// (ReMoE, 2412.14711).
pub fn step_multiplier(multiplier: f64, shut: f64, target: f64) -> f64 {
    let gap = target - shut;
    if gap == 0.0 { multiplier } else { (multiplier * 1.2f64.powf(gap.signum())).max(LEAST_MULTIPLIER) }
}

/// One update of the duals of an even assignment: with scores s \[T, E\] of a whole global batch, α_t = the (k+1)-th greatest of row t of s - β, then β_j = the
/// (kT/E + 1)-th greatest of column j of s - α. What is picked by s - β from the next step on: β is the selection bias with its sign turned.
pub fn quantile(scores: &[f32], experts: usize, top_k: usize, bias: &mut [f32]) {
    let tokens = scores.len() / experts.max(1);
    if tokens == 0 || top_k >= experts {
        return;
    }
    let mut row = Vec::with_capacity(experts);
    // The n-th greatest, n from 1.
    let greatest =
        |values: &mut [f32], n: usize| *values.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a)).1;
    let alpha: Vec<f32> = scores
        .chunks_exact(experts)
        .map(|s| {
            row.clear();
            row.extend(s.iter().zip(&*bias).map(|(s, b)| s + b));
            greatest(&mut row, top_k + 1)
        })
        .collect();
    let place = (top_k * tokens / experts + 1).min(tokens);
    let mut column = Vec::with_capacity(tokens);
    for (e, bias) in bias.iter_mut().enumerate() {
        column.clear();
        column.extend(alpha.iter().enumerate().map(|(t, alpha)| scores[t * experts + e] - alpha));
        *bias = -greatest(&mut column, place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    #[test]
    fn the_bias_goes_up_where_the_load_is_low() {
        let mut bias = vec![0.5, 0.0, 0.0];
        step_bias(&mut bias, &[10, 1, 4], 0.25, false);
        assert_eq!(bias, [0.25, 0.25, 0.25]);
        step_bias(&mut bias, &[10, 1, 1], 0.25, true);
        assert!(bias.iter().sum::<f32>().abs() < 1e-6 && bias[1] > bias[0]);
        step_bias(&mut bias, &[2, 2, 2], 0.25, false);
        assert!(bias[1] > bias[0]);
    }

    #[test]
    fn the_multiplier_follows_the_sparsity() {
        assert!((step_multiplier(1e-4, 0.5, 0.75) - 1.2e-4).abs() < 1e-12);
        assert!((step_multiplier(1.2e-4, 0.8, 0.75) - 1e-4).abs() < 1e-12);
        assert_eq!(step_multiplier(3.0, 0.75, 0.75), 3.0);
        assert_eq!(step_multiplier(LEAST_MULTIPLIER, 1.0, 0.5), LEAST_MULTIPLIER);
    }

    #[test]
    fn quantile_duals_even_out_a_lopsided_router() {
        let (tokens, experts, k) = (400, 8, 2);
        let stream = Stream::new(&[5]);
        let s: Vec<f32> =
            (0..tokens * experts).map(|i| stream.uniform(i as u64) + 0.15 * (i % experts) as f32).collect();
        let load = |bias: &[f32]| {
            let mut load = vec![0usize; experts];
            for row in s.chunks_exact(experts) {
                let mut order: Vec<usize> = (0..experts).collect();
                order.sort_by(|a, b| (row[*b] + bias[*b]).total_cmp(&(row[*a] + bias[*a])));
                order[..k].iter().for_each(|e| load[*e] += 1);
            }
            let mean = (tokens * k / experts) as f64;
            (load.iter().map(|n| (*n as f64 - mean).powi(2)).sum::<f64>() / experts as f64).sqrt() / mean
        };
        let mut bias = vec![0.0; experts];
        let before = load(&bias);
        for _ in 0..10 {
            quantile(&s, experts, k, &mut bias);
        }
        assert!(before > 0.5 && load(&bias) < 0.05, "{before} {}", load(&bias));
    }
}
