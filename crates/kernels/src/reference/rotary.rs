//! Rotary embedding of one head, in f64.

/// Rotates element i of `head` with element i + half by position · frequencies\[i\], half = frequencies.len().
pub fn rotate(head: &mut [f64], frequencies: &[f64], position: f64) {
    let half = frequencies.len();
    for i in 0..half {
        let (sin, cos) = (position * frequencies[i]).sin_cos();
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * cos - b * sin;
        head[i + half] = b * cos + a * sin;
    }
}
