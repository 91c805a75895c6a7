//! temporary
use senmon_kernels::gemm::*;
use senmon_kernels::{peak, simd::Level};
use std::time::Instant;
fn main() {
    let threads: usize = std::env::args().nth(1).map_or(2, |s| s.parse().unwrap());
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
        for (m, n, k, at, bt, acc) in [
            (4096usize, 4096usize, 512usize, false, true, false), // up
            (4096, 512, 2048, false, true, false),                // down
            (4096, 512, 4096, false, false, false),               // dx
            (4096, 512, 4096, true, false, true),               // dw
            (1024, 2048, 512, false, true, false),
            (2048, 768, 256, false, true, false),
            (2048, 256, 1024, false, false, false),
            (1024, 256, 512, true, false, true),
        ] {
            let a = vec![1.0f32; m * k];
            let b = vec![1.0f32; n * k];
            let mut c = vec![0.0f32; m * n];
            let va = if at { View::rows(&a, m).t() } else { View::rows(&a, k) };
            let vb = if bt { View::rows(&b, k).t() } else { View::rows(&b, n) };
            let mut best = f64::INFINITY;
            let reps = (2e9 / (m * n * k) as f64).ceil() as usize;
            for _ in 0..5 {
                let t = Instant::now();
                for _ in 0..reps {
                    parallel(m, n, k, va, vb, &mut c, n, acc);
                }
                best = best.min(t.elapsed().as_secs_f64() / reps as f64);
            }
            let peak = (0..3).map(|_| peak::f32_flops(Level::current(), threads)).fold(0.0, f64::max);
            let f = 2.0 * (m * n * k) as f64 / best;
            println!("{m:5} {n:5} {k:5} at {at:5} bt {bt:5}: {:6.1} GFLOP/s {:4.1} % of {:.0}", f / 1e9, 100.0 * f / peak, peak / 1e9);
        }
    });
}
