//! Times packed kernels.
use senmon_kernels::activation::Activation;
use senmon_kernels::dispatch::Dispatch;
use senmon_kernels::expert_mlp::Shape;
use senmon_kernels::packed::*;
use senmon_kernels::peak;
use senmon_kernels::simd::Level;
use std::time::Instant;

fn med(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

fn main() {
    let arg: Vec<String> = std::env::args().collect();
    let threads: usize = arg.get(1).map_or(2, |x| x.parse().unwrap());
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().unwrap();
    let level = Level::current();
    let only = arg.get(2).cloned();
    for (name, h, i, e, k) in
        [("olmoe", 2048, 1024, 64, 8), ("mixtral", 2048, 4096, 8, 2), ("qwen3", 2048, 768, 128, 8)]
    {
        if arg.get(4).is_some_and(|x| x != name) {
            continue;
        }
        for format in Format::ALL {
            if only.as_ref().is_some_and(|o| !format!("{format:?}").eq_ignore_ascii_case(o)) {
                continue;
            }
            let (ub, db) = (format.bytes(i, h), format.bytes(h, i));
            let size = 2 * ub + db;
            let mut data = vec![0u8; size * e + 64];
            let off = data.as_ptr().align_offset(64);
            let mut s = 1u64;
            for x in data.chunks_exact_mut(8) {
                s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                x.copy_from_slice(&((s >> 3) & 0x3f3f3f3f3f3f3f3f).to_le_bytes());
            }
            let data = &data[off..];
            let experts: Vec<Expert> = (0..e)
                .map(|j| {
                    let d = &data[j * size..][..size];
                    Expert {
                        gate: Some(Packed::new(format, i, h, &d[..ub])),
                        up: Packed::new(format, i, h, &d[ub..2 * ub]),
                        down: Packed::new(format, h, i, &d[2 * ub..]),
                    }
                })
                .collect();
            let shape = Shape { hidden: h, intermediate: i, activation: Activation::Silu, gated: true };
            let ts: Vec<usize> = arg.get(3).map_or(vec![1, 8, 32, 512], |x| vec![x.parse().unwrap()]);
            for t in ts {
                let mut r = 12345u64;
                let mut picks = vec![];
                let mut times = vec![];
                let mut bws = vec![];
                let runs =
                    if t == 512 { std::env::var("RUNS").map_or(5, |x| x.parse().unwrap()) } else { 30 };
                let mut distinct = 0;
                for run in 0..runs + 2 {
                    picks.clear();
                    for _ in 0..t {
                        let mut got: Vec<u32> = vec![];
                        while got.len() < k {
                            r = r.wrapping_mul(6364136223846793005).wrapping_add(1);
                            let x = ((r >> 33) % e as u64) as u32;
                            if !got.contains(&x) {
                                got.push(x);
                            }
                        }
                        picks.extend(got);
                    }
                    let d = Dispatch::new(&picks, k, e).unwrap();
                    distinct = d.touched().count();
                    let x: Vec<f32> =
                        (0..t * h).map(|j| ((j * 7919 % 1000) as f32 - 500.0) / 500.0).collect();
                    let g = vec![0.125f32; t * k];
                    let mut y = vec![0.0; t * h];
                    let s = Instant::now();
                    mlp(level, &d, shape, &x, &experts, MlpBiases::default(), Some(&g), &mut y);
                    let dt = s.elapsed().as_secs_f64();
                    if run >= 2 {
                        times.push(dt);
                        bws.push(distinct as f64 * size as f64 / dt / 1e9);
                    }
                }
                let m = med(times);
                println!(
                    "{name} {format:?} T={t}: {:.3} ms, {:.1} GB/s of {} experts, {:.0} GFLOP/s",
                    m * 1e3,
                    med(bws),
                    distinct,
                    6.0 * (t * k * h * i) as f64 / m / 1e9
                );
            }
            println!("   read bandwidth {:.1} GB/s", peak::read_bandwidth(threads, 512 << 20) / 1e9);
        }
    }
}
