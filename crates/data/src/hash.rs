//! Small deterministic hashes and permutations. Nothing here depends on the platform, the thread or the time.

/// SplitMix64's output function: every bit of the result depends on every bit of `x`.
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// One number from several.
pub(crate) fn mix_all(parts: &[u64]) -> u64 {
    parts.iter().fold(0x5345_4E4D_4F4E, |h, &part| mix(h ^ mix(part)))
}

/// Where a keyed permutation of `0..n` sends `i`: random access without holding the permutation.
///
/// A Feistel network over the next even power of two, walked until the value is in range (at most four steps on average).
pub(crate) fn permute(i: u64, n: u64, key: u64) -> u64 {
    debug_assert!(i < n);
    if n <= 1 {
        return 0;
    }
    let bits = u64::BITS - (n - 1).leading_zeros();
    let half = bits.div_ceil(2);
    let mask = (1u64 << half) - 1;
    let mut x = i;
    loop {
        let (mut left, mut right) = (x >> half, x & mask);
        for round in 0..6 {
            (left, right) = (right, left ^ (mix(key ^ mix(right ^ (round << 48))) & mask));
        }
        x = (left << half) | right;
        if x < n {
            return x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn permutations_reach_every_place_once(n in 1u64..600, key: u64) {
            let mut seen: Vec<u64> = (0..n).map(|i| permute(i, n, key)).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn keys_give_different_orders() {
        let order = |key| (0..100).map(|i| permute(i, 100, key)).collect::<Vec<_>>();
        assert_ne!(order(1), order(2));
        let fixed = order(1).iter().enumerate().filter(|&(i, &x)| i as u64 == x).count();
        assert!(fixed < 10, "{fixed} fixed points");
    }
}
