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

    /// The `index`-th number, uniform in (0, 1).
    fn open(self, index: u64) -> f64 {
        ((self.bits(index) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// The `index`-th number, normal of mean 0 and deviation 1 (Box and Muller 1958, each of their pairs used once).
    pub fn normal(self, index: u64) -> f64 {
        let (radius, angle) = (self.open(2 * index), self.open(2 * index + 1));
        (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
    }
}

/// What a random number of a routing is for: each purpose has numbers of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// The factor on the router's copy of its input.
    Jitter = 0x6a69,
    /// Noise on logits, or what decides on a second expert.
    Noise = 0x6e6f,
    /// The second pick of `sparsemixer`.
    Second = 0x7365,
    /// Whether the weight of a pick of `sparsemixer` is cut.
    Keep = 0x6b65,
    /// The order in which tokens are dropped.
    Drop = 0x6472,
    /// Experts drawn at random.
    Pick = 0x7069,
    /// Inner activations that are left out.
    Dropout = 0x646f,
}

/// The random numbers of one layer in one pass. The number of token t is the same however the tokens of an optimiser step are cut into
/// passes: it goes by the token's place in the step.
#[derive(Clone, Copy, Debug, Default)]
pub struct Draws<'a> {
    /// The seed of the run.
    pub seed: u64,
    /// The optimiser step.
    pub step: u64,
    /// The layer.
    pub layer: u64,
    /// Tokens of the step before those of this pass.
    pub first: u64,
    /// Tokens of one part of the pass, where it has every token several times (the members of an ensemble, each with numbers of its own); 0 for
    /// one part.
    pub part: usize,
    /// Numbers to take instead, \[T, width\] by purpose.
    pub given: &'a [(Purpose, &'a [f32])],
}

impl<'a> Draws<'a> {
    /// The numbers of token `token`, `width` of them.
    pub fn row(&self, purpose: Purpose, token: usize, width: usize) -> Row<'a> {
        let given = self.given.iter().find(|(of, _)| *of == purpose);
        let given = given.map(|(_, given)| given.get(token * width..(token + 1) * width).unwrap_or(&[]));
        let part = token.checked_div(self.part).unwrap_or(0) as u64;
        let token = token.checked_rem(self.part).unwrap_or(token) as u64;
        let stream = Stream::new(&[self.seed, self.step, self.layer, purpose as u64, part]);
        Row { given, stream, first: (self.first + token) * width as u64 }
    }
}

/// The random numbers of one token for one purpose.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    given: Option<&'a [f32]>,
    stream: Stream,
    first: u64,
}

impl Row<'_> {
    /// Number `column`: one that was given, or else what `make` makes of the stream at that place.
    fn number(&self, column: usize, make: impl FnOnce(Stream, u64) -> f32) -> f32 {
        match self.given {
            Some(given) => given.get(column).copied().unwrap_or(0.0),
            None => make(self.stream, self.first + column as u64),
        }
    }

    /// Uniform in \[0, 1).
    pub fn uniform(&self, column: usize) -> f32 {
        self.number(column, Stream::uniform)
    }

    /// Normal, of mean 0 and deviation 1.
    pub fn normal(&self, column: usize) -> f32 {
        self.number(column, |stream, index| stream.normal(index) as f32)
    }

    /// Exponential, of mean 1.
    pub fn exponential(&self, column: usize) -> f32 {
        self.number(column, |stream, index| -stream.open(index).ln() as f32)
    }

    /// Gumbel, standard.
    pub fn gumbel(&self, column: usize) -> f32 {
        self.number(column, |stream, index| -(-stream.open(index).ln()).ln() as f32)
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

    #[test]
    fn draws_have_their_means_and_variances_and_follow_the_token() {
        let draws = Draws { seed: 7, ..Draws::default() };
        let n = 100_000;
        let moments = |draw: &dyn Fn(usize) -> f32| {
            let mean = (0..n).map(|t| draw(t) as f64).sum::<f64>() / n as f64;
            (mean, (0..n).map(|t| (draw(t) as f64 - mean).powi(2)).sum::<f64>() / n as f64)
        };
        let wanted = [
            (moments(&|t| draws.row(Purpose::Noise, t, 1).normal(0)), 0.0, 1.0),
            (moments(&|t| draws.row(Purpose::Pick, t, 1).exponential(0)), 1.0, 1.0),
            // Euler's constant, and π²/6.
            (moments(&|t| draws.row(Purpose::Second, t, 1).gumbel(0)), 0.577_216, 1.644_934),
        ];
        for ((mean, variance), want_mean, want_variance) in wanted {
            assert!((mean - want_mean).abs() < 0.015 && (variance / want_variance - 1.0).abs() < 0.03);
        }
        let later = Draws { first: 10, ..draws };
        let at = |draws: &Draws, t| draws.row(Purpose::Drop, t, 4).uniform(2);
        assert_eq!(at(&later, 3), at(&draws, 13));
        assert_ne!(at(&draws, 3), at(&draws, 13));
        assert_ne!(at(&draws, 3), draws.row(Purpose::Pick, 3, 4).uniform(2));
        let given = Draws { given: &[(Purpose::Drop, &[0.0, 1.0, 2.0, 3.0])], ..draws };
        assert_eq!((at(&given, 0), at(&given, 1)), (2.0, 0.0));
    }
}
