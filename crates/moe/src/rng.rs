//! Random numbers by counter: each is a function of where it is used, not of how many were drawn before.

/// The numbers of one place: a (seed, step, layer) of a run, say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(u64);

impl Stream {
    /// The stream of these coordinates.
    pub fn new(coordinates: &[u64]) -> Self {
        Self(
            coordinates
                .iter()
                .fold(0x5e_4d_0f_5e_4d, |state, &c| mix(state ^ mix(c.wrapping_add(0x9e37_79b9_7f4a_7c15)))),
        )
    }

    /// The `index`-th number, 64 bits.
    pub fn bits(self, index: u64) -> u64 {
        mix(self.0 ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// The `index`-th number, uniform in \[0, 1).
    pub fn uniform(self, index: u64) -> f32 {
        (self.bits(index) >> 40) as f32 / (1u64 << 24) as f32
    }
}

/// The finaliser of splitmix64 (Steele, Lea & Flood 2014), over one step of its counter.
fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_numbers_fill_the_interval_and_streams_differ() {
        let (a, b) = (Stream::new(&[1, 2, 3]), Stream::new(&[1, 3, 2]));
        let n = 100_000;
        let mean: f64 = (0..n).map(|i| a.uniform(i) as f64).sum::<f64>() / n as f64;
        let square: f64 = (0..n).map(|i| (a.uniform(i) as f64).powi(2)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.005 && (square - 1.0 / 3.0).abs() < 0.005);
        let together: f64 = (0..n).map(|i| (a.uniform(i) * b.uniform(i)) as f64).sum::<f64>() / n as f64;
        assert!((together - 0.25).abs() < 0.005);
    }
}
