//! What the tests of several kernels share.

/// A small deterministic generator (SplitMix64).
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// `len` values of mean 0 and standard deviation about `scale`.
    pub(crate) fn vec(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.normal() * scale).collect()
    }

    fn normal(&mut self) -> f32 {
        let sum: f64 = (0..12).map(|_| self.bits() as f64 / u64::MAX as f64).sum();
        (sum - 6.0) as f32
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }
}

pub(crate) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x as f64).collect()
}

/// Asserts |got - want| ≤ tolerance · (1 + the largest |want|).
#[track_caller]
pub(crate) fn assert_close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    let scale = 1.0 + want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((*g as f64 - w).abs() <= tolerance * scale, "{what}[{i}] = {g}, not {w} (scale {scale})");
    }
}

/// Asserts |got - want| ≤ tolerance · size of each element by itself: `sizes` says how large the terms were that it is a sum
/// of, which may cancel.
#[track_caller]
pub(crate) fn assert_close_to_terms(what: &str, got: &[f32], want: &[f64], sizes: &[f64], tolerance: f64) {
    assert!(got.len() == want.len() && got.len() == sizes.len(), "{what}: lengths");
    for (i, ((g, w), size)) in got.iter().zip(want).zip(sizes).enumerate() {
        assert!((*g as f64 - w).abs() <= tolerance * size, "{what}[{i}] = {g}, not {w} (terms of {size})");
    }
}

/// The gradient of `f` at `x`, one coordinate after the other, by central differences in f64.
pub(crate) fn finite_differences(x: &[f32], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let mut x = wide(x);
    let h = 1e-5;
    (0..x.len())
        .map(|i| {
            let kept = x[i];
            x[i] = kept + h;
            let up = f(&x);
            x[i] = kept - h;
            let down = f(&x);
            x[i] = kept;
            (up - down) / (2.0 * h)
        })
        .collect()
}

pub(crate) fn weighted(y: &[f64], weights: &[f32]) -> f64 {
    y.iter().zip(weights).map(|(y, w)| y * *w as f64).sum()
}

pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Asserts that `f` gives the same bits on 1, 2 and 3 threads.
#[track_caller]
pub(crate) fn assert_same_on_any_threads(f: impl Fn() -> Vec<f32> + Sync) {
    let mut first: Option<Vec<u32>> = None;
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        let got = bits(&pool.install(&f));
        match &first {
            None => first = Some(got),
            Some(first) => assert!(*first == got, "{threads} threads give other bits than 1"),
        }
    }
}
