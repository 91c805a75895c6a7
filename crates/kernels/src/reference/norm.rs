//! RMSNorm and LayerNorm over packed rows [N, width], in f64.

/// y [N, width] and the inverse root mean squares \[N\] of `x` [N, width].
pub fn rms_forward(width: usize, x: &[f64], weight: &[f64], eps: f64) -> (Vec<f64>, Vec<f64>) {
    let (mut y, mut inverses) = (Vec::new(), Vec::new());
    for x in x.chunks(width) {
        let inv = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / width as f64 + eps).sqrt();
        y.extend(x.iter().zip(weight).map(|(x, w)| x * inv * w));
        inverses.push(inv);
    }
    (y, inverses)
}

/// The gradients dx [N, width] and dweight \[width\].
pub fn rms_backward(width: usize, dy: &[f64], x: &[f64], weight: &[f64], eps: f64) -> (Vec<f64>, Vec<f64>) {
    let (mut dx, mut dweight) = (Vec::new(), vec![0.0; width]);
    for (dy, x) in dy.chunks(width).zip(x.chunks(width)) {
        let inv = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / width as f64 + eps).sqrt();
        let s: f64 = (0..width).map(|i| weight[i] * dy[i] * x[i]).sum::<f64>() / width as f64;
        for i in 0..width {
            dx.push(inv * (weight[i] * dy[i] - x[i] * inv * inv * s));
            dweight[i] += dy[i] * x[i] * inv;
        }
    }
    (dx, dweight)
}

fn mean_and_inverse(x: &[f64], eps: f64) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

/// y [N, width] of `x` [N, width].
pub fn layer_forward(width: usize, x: &[f64], weight: &[f64], bias: Option<&[f64]>, eps: f64) -> Vec<f64> {
    let mut y = Vec::new();
    for x in x.chunks(width) {
        let (mean, inv) = mean_and_inverse(x, eps);
        for i in 0..width {
            y.push((x[i] - mean) * inv * weight[i] + bias.map_or(0.0, |bias| bias[i]));
        }
    }
    y
}

/// The gradients dx [N, width], dweight \[width\] and dbias \[width\].
pub fn layer_backward(
    width: usize,
    dy: &[f64],
    x: &[f64],
    weight: &[f64],
    eps: f64,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut dx, mut dweight, mut dbias) = (Vec::new(), vec![0.0; width], vec![0.0; width]);
    let n = width as f64;
    for (dy, x) in dy.chunks(width).zip(x.chunks(width)) {
        let (mean, inv) = mean_and_inverse(x, eps);
        let g: f64 = (0..width).map(|i| weight[i] * dy[i]).sum::<f64>() / n;
        let gx: f64 = (0..width).map(|i| weight[i] * dy[i] * (x[i] - mean) * inv).sum::<f64>() / n;
        for i in 0..width {
            let normal = (x[i] - mean) * inv;
            dx.push(inv * (weight[i] * dy[i] - g - normal * gx));
            dweight[i] += dy[i] * normal;
            dbias[i] += dy[i];
        }
    }
    (dx, dweight, dbias)
}
