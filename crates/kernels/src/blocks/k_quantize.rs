//! Coding to Q4_K and Q6_K: the scale of each group by a search that minimises a weighted squared error.
//!
//! The scheme is ggml's: rounding with a few trial scales, for each the scale (and minimum) that fits the
//! rounded elements best by least squares. The scales are then rounded themselves, and the elements once more
//! with what became of them.
//!
//! All is inlined into one body for each level: without SSE4.1 rounding an element is a call.

use super::floats::{f16_to_f32, f32_to_f16, half_at};
use super::k::scale_and_min;
use super::pairs_mut;
use crate::by_level;

/// Groups whose elements are all nearer to zero than this are zeros.
const NEGLIGIBLE: f32 = 1e-15;

by_level! {
    /// To `Q4_K`.
    pub(super) fn to_q4_k(x: &[f32], out: &mut [u8]) {
        for (x, block) in pairs_mut::<256, 144>(x, out) {
            let groups = x.as_chunks::<32>().0;
            let fits = fits_with_min(groups);
            let largest = fits.iter().fold((0.0f32, 0.0f32), |m, fit| (m.0.max(fit.0), m.1.max(fit.1)));
            let by = (per(63.0, largest.0), per(63.0, largest.1));
            block.fill(0);
            block[..2].copy_from_slice(&f32_to_f16(largest.0 / 63.0).to_le_bytes());
            block[2..4].copy_from_slice(&f32_to_f16(largest.1 / 63.0).to_le_bytes());
            for (j, fit) in fits.iter().enumerate() {
                pack_scale_and_min(&mut block[4..16], j, level(by.0 * fit.0, 63), level(by.1 * fit.1, 63));
            }
            let (d, dmin) = (half_at(block, 0), half_at(block, 2));
            for (g, x) in groups.iter().enumerate() {
                let (scale, min) = scale_and_min(&block[4..16], g);
                let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
                for i in 0..32 {
                    let q = if scale == 0.0 { 0 } else { level((x[i] + min) / scale, 15) };
                    block[16 + g / 2 * 32 + i] |= q << (g % 2 * 4);
                }
            }
        }
    }
}

by_level! {
    /// To `Q6_K`.
    pub(super) fn to_q6_k(x: &[f32], out: &mut [u8]) {
        for (x, block) in pairs_mut::<256, 210>(x, out) {
            let groups = x.as_chunks::<16>().0;
            let scales = fits_around_zero(groups);
            block.fill(0);
            let largest = furthest(&scales);
            if largest.abs() < NEGLIGIBLE {
                continue;
            }
            // The largest scale becomes -128, whatever its sign.
            let by = -128.0 / largest;
            let half = f32_to_f16(1.0 / by);
            block[208..].copy_from_slice(&half.to_le_bytes());
            for (g, x) in groups.iter().enumerate() {
                let coded = (by * scales[g]).round_ties_even().clamp(-128.0, 127.0) as i8;
                block[192 + g] = coded as u8;
                let scale = f16_to_f32(half) * f32::from(coded);
                let (part, run, at) = (g / 8, g % 8 / 2, g % 2 * 16);
                for i in 0..16 {
                    // Where the scale is 0 all levels mean 0.
                    let q =
                        if scale == 0.0 { -32.0 } else { (x[i] / scale).round_ties_even().clamp(-32.0, 31.0) };
                    let q = (q as i8 + 32) as u8;
                    block[part * 64 + run % 2 * 32 + at + i] |= (q & 15) << (run / 2 * 4);
                    block[128 + part * 32 + at + i] |= q >> 4 << (run * 2);
                }
            }
        }
    }
}

/// Groups of a block of `Q4_K`: the search goes through all of them at once, a lane each, since the sums of one are a chain.
const LANES: usize = 8;
type Lanes = [f32; LANES];

/// For each group, scale and minimum of x ≈ scale · q - min with q from 0 to 15; neither is negative.
#[inline(always)]
fn fits_with_min(groups: &[[f32; 32]]) -> [(f32, f32); LANES] {
    let mut x = [[0.0; LANES]; 32];
    for (lane, group) in groups.iter().enumerate().take(LANES) {
        for (x, from) in x.iter_mut().zip(group) {
            x[lane] = *from;
        }
    }
    let (mut high, mut low, mut square) = (x[0], x[0], [0.0; LANES]);
    for x in &x {
        for l in 0..LANES {
            high[l] = high[l].max(x[l]);
            low[l] = low[l].min(x[l]);
            square[l] += x[l] * x[l];
        }
    }
    low = low.map(|low| low.min(0.0));
    // Large elements weigh more, but none weighs nothing.
    let spread = square.map(|square| (square / 32.0).sqrt());
    let mut weights = [[0.0; LANES]; 32];
    let (mut w, mut wx): (Lanes, Lanes) = ([0.0; LANES], [0.0; LANES]);
    for (weight, x) in weights.iter_mut().zip(&x) {
        for l in 0..LANES {
            weight[l] = spread[l] + x[l].abs();
            w[l] += weight[l];
            wx[l] += weight[l] * x[l];
        }
    }
    let (mut q, mut by) = ([[0.0; LANES]; 32], [0.0; LANES]);
    let (mut scale, mut offset) = ([0.0; LANES], low);
    for l in 0..LANES {
        by[l] = 15.0 / (high[l] - low[l]);
        scale[l] = 1.0 / by[l];
    }
    round_lanes(&x, &by, &low, &mut q);
    let mut least = errors(&x, &weights, &q, &scale, &offset);
    for step in 0..=20 {
        // From 14 to 16 steps between what 0 stands for so far and the highest element.
        for l in 0..LANES {
            by[l] = (-1.0 + 0.1 * step as f32 + 15.0) / (high[l] - offset[l]);
        }
        round_lanes(&x, &by, &offset, &mut q);
        let (mut wq, mut wqq, mut wqx) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for ((x, q), weight) in x.iter().zip(&q).zip(&weights) {
            for l in 0..LANES {
                let weighted = weight[l] * q[l];
                wq[l] += weighted;
                wqq[l] += weighted * q[l];
                wqx[l] += weighted * x[l];
            }
        }
        let (mut new_scale, mut new_offset, mut fits) = ([0.0; LANES], [0.0; LANES], [false; LANES]);
        for l in 0..LANES {
            let determinant = w[l] * wqq[l] - wq[l] * wq[l];
            fits[l] = determinant > 0.0;
            new_scale[l] = (w[l] * wqx[l] - wx[l] * wq[l]) / determinant;
            new_offset[l] = (wqq[l] * wx[l] - wq[l] * wqx[l]) / determinant;
            let above = new_offset[l] > 0.0;
            new_scale[l] = if above { wqx[l] / wqq[l] } else { new_scale[l] };
            new_offset[l] = if above { 0.0 } else { new_offset[l] };
        }
        let error = errors(&x, &weights, &q, &new_scale, &new_offset);
        for l in 0..LANES {
            let better = fits[l] & (error[l] < least[l]);
            least[l] = if better { error[l] } else { least[l] };
            scale[l] = if better { new_scale[l] } else { scale[l] };
            offset[l] = if better { new_offset[l] } else { offset[l] };
        }
    }
    // All elements alike: the minimum is all there is. Not negated: a minimum of zero has one sign.
    std::array::from_fn(|l| if high[l] == low[l] { (0.0, 0.0 - low[l]) } else { (scale[l], 0.0 - offset[l]) })
}

/// `level(by · (x - low), 15)` of each element.
#[inline(always)]
fn round_lanes(x: &[Lanes; 32], by: &Lanes, low: &Lanes, q: &mut [Lanes; 32]) {
    for (x, q) in x.iter().zip(q) {
        for l in 0..LANES {
            let near = (by[l] * (x[l] - low[l])).round_ties_even();
            // In this order NaN becomes 0.
            let near = if near > 0.0 { near } else { 0.0 };
            q[l] = if near < 15.0 { near } else { 15.0 };
        }
    }
}

/// Weighted squared errors of x ≈ scale · q + offset.
#[inline(always)]
fn errors(x: &[Lanes; 32], weights: &[Lanes; 32], q: &[Lanes; 32], scale: &Lanes, offset: &Lanes) -> Lanes {
    let mut sum = [0.0; LANES];
    for ((x, q), weight) in x.iter().zip(q).zip(weights) {
        for l in 0..LANES {
            let off = scale[l] * q[l] + offset[l] - x[l];
            sum[l] += weight[l] * (off * off);
        }
    }
    sum
}

/// For each group of a block of `Q6_K`, a lane each: scale of x ≈ scale · q with q from -32 to 31; it may be negative.
#[inline(always)]
fn fits_around_zero(groups: &[[f32; 16]]) -> [f32; 16] {
    type Lanes = [f32; 16];
    let mut x: [Lanes; 16] = [[0.0; 16]; 16];
    for (lane, group) in groups.iter().enumerate().take(16) {
        for (x, from) in x.iter_mut().zip(group) {
            x[lane] = *from;
        }
    }
    let mut furthest = [0.0f32; 16];
    for x in &x {
        for l in 0..16 {
            furthest[l] = if x[l].abs() > furthest[l].abs() { x[l] } else { furthest[l] };
        }
    }
    // The error is Σ w·x² - (Σ w·q·x)² / Σ w·q², with the weight x²: the greater the second, the better.
    let (mut scale, mut best) = ([0.0; 16], [0.0; 16]);
    for step in [0, -9, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9] {
        let by = furthest.map(|furthest| -(32.0 + 0.1 * step as f32) / furthest);
        let (mut qx, mut qq) = ([0.0; 16], [0.0; 16]);
        for x in &x {
            for l in 0..16 {
                let q = (by[l] * x[l]).round_ties_even().clamp(-32.0, 31.0);
                qx[l] += x[l] * x[l] * x[l] * q;
                qq[l] += x[l] * x[l] * q * q;
            }
        }
        for l in 0..16 {
            let better = match step {
                0 => qq[l] != 0.0,
                _ => (qq[l] > 0.0) & (qx[l] * qx[l] > best[l] * qq[l]),
            };
            scale[l] = if better { qx[l] / qq[l] } else { scale[l] };
            best[l] = if better { scale[l] * qx[l] } else { best[l] };
        }
    }
    std::array::from_fn(|l| if furthest[l].abs() < NEGLIGIBLE { 0.0 } else { scale[l] })
}

/// The first of the elements that are furthest from zero.
#[inline(always)]
fn furthest(x: &[f32]) -> f32 {
    x.iter().fold(0.0f32, |m, x| if x.abs() > m.abs() { *x } else { m })
}

/// `a / b`; 0 where `b` is not positive.
#[inline(always)]
fn per(a: f32, b: f32) -> f32 {
    if b > 0.0 { a / b } else { 0.0 }
}

/// The nearest integer from 0 to `most`, ties to even; 0 for NaN.
#[inline(always)]
fn level(x: f32, most: u8) -> u8 {
    (x.round_ties_even() as u8).min(most)
}

/// The inverse of [`scale_and_min`], into bytes that are 0.
#[inline(always)]
fn pack_scale_and_min(packed: &mut [u8], j: usize, scale: u8, min: u8) {
    if j < 4 {
        packed[j] |= scale;
        packed[j + 4] |= min;
    } else {
        packed[j + 4] |= scale & 15 | (min & 15) << 4;
        packed[j - 4] |= scale >> 4 << 6;
        packed[j] |= min >> 4 << 6;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Level;
    use crate::testing::Random;

    /// As [`fits_with_min`], one group after another.
    fn fit_with_min(x: &[f32; 32]) -> (f32, f32) {
        let high = x.iter().fold(x[0], |m, x| m.max(*x));
        let low = x.iter().fold(x[0], |m, x| m.min(*x)).min(0.0);
        if high == low {
            return (0.0, 0.0 - low);
        }
        // Large elements weigh more, but none weighs nothing.
        let square: f32 = x.iter().map(|x| x * x).fold(0.0, |sum, x| sum + x);
        let spread = (square / 32.0).sqrt();
        let weight = |x: f32| spread + x.abs();
        let (mut w, mut wx) = (0.0f32, 0.0f32);
        for &x in x {
            w += weight(x);
            wx += weight(x) * x;
        }
        let round = |by: f32, low: f32| x.map(|x| f32::from(level(by * (x - low), 15)));
        let error = |scale: f32, offset: f32, q: &[f32; 32]| {
            x.iter().zip(q).fold(0.0, |sum, (&x, q)| {
                let off = scale * q + offset - x;
                sum + weight(x) * (off * off)
            })
        };
        let plain = 15.0 / (high - low);
        let mut best = (1.0 / plain, low);
        let mut least = error(best.0, best.1, &round(plain, low));
        for step in 0..=20 {
            // From 14 to 16 steps between what 0 stands for so far and the highest element.
            let q = round((-1.0 + 0.1 * step as f32 + 15.0) / (high - best.1), best.1);
            let (mut wq, mut wqq, mut wqx) = (0.0f32, 0.0f32, 0.0f32);
            for (&x, &q) in x.iter().zip(&q) {
                let weighted = weight(x) * q;
                wq += weighted;
                wqq += weighted * q;
                wqx += weighted * x;
            }
            let determinant = w * wqq - wq * wq;
            if determinant > 0.0 {
                let mut scale = (w * wqx - wx * wq) / determinant;
                let mut offset = (wqq * wx - wq * wqx) / determinant;
                if offset > 0.0 {
                    (scale, offset) = (wqx / wqq, 0.0);
                }
                let error = error(scale, offset, &q);
                if error < least {
                    (least, best) = (error, (scale, offset));
                }
            }
        }
        (best.0, 0.0 - best.1)
    }

    /// As [`fits_around_zero`], one group after another.
    fn fit_around_zero(x: &[f32; 16]) -> f32 {
        let furthest = furthest(x);
        if furthest.abs() < NEGLIGIBLE {
            return 0.0;
        }
        // Σ w·q·x and Σ w·q², with the weight x².
        let sums = |by: f32| {
            x.iter().fold((0.0f32, 0.0f32), |sums, x| {
                let q = (by * x).round_ties_even().clamp(-32.0, 31.0);
                (sums.0 + x * x * x * q, sums.1 + x * x * q * q)
            })
        };
        // The error is Σ w·x² - (Σ w·q·x)² / Σ w·q²: the greater the second, the better.
        let (qx, qq) = sums(-32.0 / furthest);
        let mut scale = if qq == 0.0 { 0.0 } else { qx / qq };
        let mut best = scale * qx;
        for step in (-9..=9).filter(|step| *step != 0) {
            let (qx, qq) = sums(-(32.0 + 0.1 * step as f32) / furthest);
            if qq > 0.0 && qx * qx > best * qq {
                scale = qx / qq;
                best = scale * qx;
            }
        }
        scale
    }

    /// 64 blocks of all sizes, and all of one sign, alike, of whole numbers, or with something that is not finite now and then.
    fn blocks() -> Vec<f32> {
        (0..64)
            .flat_map(|block| {
                let values = Random(block).vec(256, 10f32.powi(block as i32 % 9 - 4));
                values.into_iter().enumerate().map(move |(i, x)| match (block % 7, i / 32) {
                    (0, _) => x.abs(),
                    (1, 2) => -0.25,
                    (1, 3) => 0.0,
                    (2, 5) => x.round(),
                    (3, 1) if i % 32 == 7 => f32::NAN,
                    (3, 4) if i % 32 == 9 => f32::INFINITY,
                    _ => x,
                })
            })
            .collect()
    }

    #[test]
    fn groups_side_by_side_fit_as_one_by_one() {
        for block in blocks().as_chunks::<256>().0 {
            let groups = block.as_chunks::<32>().0;
            for (found, x) in fits_with_min(groups).iter().zip(groups) {
                let plain = fit_with_min(x);
                assert_eq!(found.0.to_bits(), plain.0.to_bits(), "{x:?}");
                assert_eq!(found.1.to_bits(), plain.1.to_bits(), "{x:?}");
            }
            let groups = block.as_chunks::<16>().0;
            for (found, x) in fits_around_zero(groups).iter().zip(groups) {
                assert_eq!(found.to_bits(), fit_around_zero(x).to_bits(), "{x:?}");
            }
        }
    }

    #[test]
    fn every_level_codes_alike() {
        let x = blocks();
        let coded = |level: Level| {
            let (mut q4, mut q6) = (vec![0; 64 * 144], vec![0; 64 * 210]);
            to_q4_k(level, &x, &mut q4);
            to_q6_k(level, &x, &mut q6);
            (q4, q6)
        };
        for level in Level::available() {
            assert!(coded(level) == coded(Level::Portable), "{level:?}");
        }
    }
}
