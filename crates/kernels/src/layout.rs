//! Where the rows of a tensor lie in a buffer that holds more than that tensor.

/// Rows of `width` elements, `heads` of them side by side for each of `tokens` tokens.
///
/// In a buffer of stride s, row (t, h) begins at t·s + h·width. So a plain matrix [T, H] is `heads = 1`, and the
/// query heads of a fused buffer [T, (heads + 2·kv)·D] are `heads` rows of D at the stride of that buffer, which the
/// caller passes from its first element on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// T, the number of tokens.
    pub tokens: usize,
    /// Rows of each token.
    pub heads: usize,
    /// Elements of a row.
    pub width: usize,
}

impl Rows {
    /// One row of `width` per token.
    pub fn plain(tokens: usize, width: usize) -> Self {
        Self { tokens, heads: 1, width }
    }

    /// The number of rows: tokens · heads.
    pub fn count(&self) -> usize {
        self.tokens * self.heads
    }

    /// The first element of row `row` (token-major) at stride `stride`.
    #[inline(always)]
    pub(crate) fn at(&self, row: usize, stride: usize) -> usize {
        if self.heads == 1 {
            row * stride
        } else {
            (row / self.heads) * stride + (row % self.heads) * self.width
        }
    }

    /// Panics unless a buffer of `len` elements holds these rows at `stride` without overlap.
    pub(crate) fn check(&self, what: &str, len: usize, stride: usize) {
        let token = self.heads.checked_mul(self.width).expect("heads · width overflows");
        if self.tokens == 0 || token == 0 {
            return;
        }
        assert!(
            stride >= token || self.tokens == 1,
            "{what}: stride {stride} below a token's {token} elements"
        );
        let needed = (self.tokens - 1).checked_mul(stride).and_then(|n| n.checked_add(token));
        assert!(
            needed.is_some_and(|n| n <= len),
            "{what}: {len} elements do not hold {} tokens of {token} at stride {stride}",
            self.tokens
        );
    }
}

/// Elements that `rows` rows of `width` take, `stride` apart; none where that is no number.
pub(crate) fn extent(rows: usize, stride: usize, width: usize) -> Option<usize> {
    match (rows, width) {
        (0, _) | (_, 0) => Some(0),
        _ => (rows - 1).checked_mul(stride)?.checked_add(width),
    }
}
