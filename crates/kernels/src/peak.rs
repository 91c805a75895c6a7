//! What the machine can do at best, measured: the floors that timings are held against.

use crate::simd::Level;
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Floating-point operations per second of f32 multiply-adds in registers, on `threads` threads at once (each
/// multiply-add counts as two), with the instructions of `level`. Takes about 0.1 s.
pub fn f32_flops(level: Level, threads: usize) -> f64 {
    let level = level.min(Level::detected());
    together(threads, STEPS, |steps| multiply_adds(level, steps))
}

/// Rounds of a measurement of arithmetic.
const STEPS: usize = 40_000_000;

/// Operations per second of dot products of pairs of bf16 (each pair counts as four), as [`f32_flops`]; of f32 where the level has
/// none.
pub fn bf16_flops(level: Level, threads: usize) -> f64 {
    let level = level.min(Level::detected());
    #[cfg(target_arch = "x86_64")]
    if level.has_bf16_dots() {
        // SAFETY: the machine has the instructions.
        return together(threads, STEPS, |steps| unsafe { bf16_dots(steps) });
    }
    f32_flops(level, threads)
}

/// Operations per second of dot products of quads of 8 bits (each quad counts as eight), as [`f32_flops`].
pub fn int8_ops(level: Level, threads: usize) -> f64 {
    let level = level.min(Level::detected());
    #[cfg(target_arch = "x86_64")]
    if level.has_int8_dots() {
        // SAFETY: the machine has the instructions.
        return together(threads, STEPS, |steps| unsafe { int8_dots(steps) });
    }
    #[cfg(target_arch = "x86_64")]
    if level >= Level::Avx2 {
        // SAFETY: as above.
        return together(threads, STEPS, |steps| unsafe { int8_pairs(steps) });
    }
    f32_flops(level, threads)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16_dots(steps: usize) -> f64 {
    use std::arch::x86_64::*;
    let x = black_box(_mm512_set1_epi16(0x3f80));
    // SAFETY: both are 512 bits that may have any value.
    let x = unsafe { std::mem::transmute::<__m512i, __m512bh>(x) };
    let mut sums = [_mm512_setzero_ps(); 12];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, x, x);
        }
    }
    black_box(sums);
    (steps * 12 * 64) as f64
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn int8_dots(steps: usize) -> f64 {
    use std::arch::x86_64::*;
    let x = black_box(_mm512_set1_epi8(3));
    let mut sums = [_mm512_setzero_si512(); 12];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, x, x);
        }
    }
    black_box(sums);
    (steps * 12 * 128) as f64
}

/// Products of bytes joined in 16 bits and then in 32, as AVX2 has them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn int8_pairs(steps: usize) -> f64 {
    use std::arch::x86_64::*;
    let (x, ones) = (black_box(_mm256_set1_epi8(3)), black_box(_mm256_set1_epi16(1)));
    let mut sums = [_mm256_setzero_si256(); 8];
    for _ in 0..steps {
        for sum in &mut sums {
            let pairs = _mm256_maddubs_epi16(x, black_box(x));
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
        }
    }
    black_box(sums);
    (steps * 8 * 64) as f64
}

/// Bytes per second that `threads` threads read, each from its own part of `memory`.
///
/// It should be several times the last cache, have been written, and lie in large pages as weights do: with small ones a tenth less is
/// read.
pub fn read_bandwidth(threads: usize, memory: &[u8]) -> f64 {
    let part = memory.len() / threads.max(1);
    let next = AtomicUsize::new(0);
    together(threads, part, |bytes| {
        let index = next.fetch_add(1, Ordering::Relaxed) % threads.max(1);
        // The end of the part: what is read before the measurement has left the cache when it is read again.
        black_box(fold(Level::current(), &memory[index * part..][part - bytes..part]));
        bytes as f64
    })
}

/// The exclusive or of all words of the whole pieces of 512 bytes. With intrinsics, because a plain loop is vectorised in some builds and
/// not in others.
fn fold(level: Level, memory: &[u8]) -> u64 {
    let pieces = memory.as_chunks::<512>().0;
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        #[target_feature(enable = "avx512f")]
        fn avx512(pieces: &[[u8; 512]]) -> u64 {
            let mut lanes = [_mm512_setzero_si512(); 8];
            for piece in pieces {
                for (i, lane) in lanes.iter_mut().enumerate() {
                    // SAFETY: eight lines are a piece.
                    let line = unsafe { _mm512_loadu_si512(piece.as_ptr().add(64 * i).cast()) };
                    *lane = _mm512_xor_si512(*lane, line);
                }
            }
            // SAFETY: both are plain bits of the same size.
            let words: [u64; 64] = unsafe { std::mem::transmute(lanes) };
            words.into_iter().fold(0, |a, b| a ^ b)
        }
        #[target_feature(enable = "avx2")]
        fn avx2(pieces: &[[u8; 512]]) -> u64 {
            let mut lanes = [_mm256_setzero_si256(); 16];
            for piece in pieces {
                for (i, lane) in lanes.iter_mut().enumerate() {
                    // SAFETY: sixteen halves of a line are a piece.
                    let half = unsafe { _mm256_loadu_si256(piece.as_ptr().add(32 * i).cast()) };
                    *lane = _mm256_xor_si256(*lane, half);
                }
            }
            // SAFETY: both are plain bits of the same size.
            let words: [u64; 64] = unsafe { std::mem::transmute(lanes) };
            words.into_iter().fold(0, |a, b| a ^ b)
        }
        match level.min(Level::detected()) {
            // SAFETY: the machine has the instructions.
            Level::Avx512 | Level::Avx512Bf16 => return unsafe { avx512(pieces) },
            // SAFETY: as above.
            Level::Avx2 => return unsafe { avx2(pieces) },
            Level::Portable => {}
        }
    }
    let _ = level;
    let words = pieces.iter().flat_map(|piece| piece.as_chunks::<8>().0);
    words.fold(0, |a, word| a ^ u64::from_ne_bytes(*word))
}

/// Runs `work(amount)` on all threads from the same moment: the sum of what it returns over the time until the last is done. Before, each
/// does a fifth of it, which does not count, so that the system can part threads that began on one processor.
fn together(threads: usize, amount: usize, work: impl Fn(usize) -> f64 + Sync) -> f64 {
    /// One less to wait for, also when `work` panics.
    struct Ready<'a>(&'a AtomicUsize);
    impl Drop for Ready<'_> {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }
    let waiting = AtomicUsize::new(threads);
    let runs: Vec<(Instant, Instant, f64)> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let ready = Ready(&waiting);
                    black_box(work(amount / 5));
                    drop(ready);
                    // Awake: a thread that slept would come late.
                    while waiting.load(Ordering::SeqCst) > 0 {
                        std::thread::yield_now();
                    }
                    let start = Instant::now();
                    let done = work(amount);
                    (start, Instant::now(), done)
                })
            })
            .collect();
        handles.into_iter().filter_map(|handle| handle.join().ok()).collect()
    });
    let (Some(start), Some(end)) = (runs.iter().map(|r| r.0).min(), runs.iter().map(|r| r.1).max()) else {
        return 0.0;
    };
    runs.iter().map(|r| r.2).sum::<f64>() / (end - start).as_secs_f64().max(1e-9)
}

/// `steps` rounds of twelve independent multiply-adds; returns the floating-point operations done.
fn multiply_adds(level: Level, steps: usize) -> f64 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        #[target_feature(enable = "avx512f")]
        fn avx512(steps: usize) -> f64 {
            let (x, y) = (black_box(_mm512_set1_ps(1.000_000_1)), black_box(_mm512_set1_ps(1e-9)));
            let mut sums = [x; 12];
            for _ in 0..steps {
                for sum in &mut sums {
                    *sum = _mm512_fmadd_ps(x, *sum, y);
                }
            }
            black_box(sums);
            (steps * 12 * 32) as f64
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2(steps: usize) -> f64 {
            let (x, y) = (black_box(_mm256_set1_ps(1.000_000_1)), black_box(_mm256_set1_ps(1e-9)));
            let mut sums = [x; 12];
            for _ in 0..steps {
                for sum in &mut sums {
                    *sum = _mm256_fmadd_ps(x, *sum, y);
                }
            }
            black_box(sums);
            (steps * 12 * 16) as f64
        }
        match level {
            // SAFETY: the level is the machine's.
            Level::Avx512 | Level::Avx512Bf16 => return unsafe { avx512(steps) },
            // SAFETY: as above.
            Level::Avx2 => return unsafe { avx2(steps) },
            Level::Portable => {}
        }
    }
    let _ = level;
    let (x, y) = (black_box(1.000_000_1f32), black_box(1e-9f32));
    let mut sums = [[x; 4]; 12];
    for _ in 0..steps {
        for sum in sums.iter_mut().flatten() {
            *sum = x * *sum + y;
        }
    }
    black_box(sums);
    (steps * 12 * 8) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_memory_is_read_at_every_level() {
        let memory: Vec<u8> =
            (0..3 * 512 + 5u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let words = memory[..3 * 512].as_chunks::<8>().0;
        let want = words.iter().fold(0, |a, word| a ^ u64::from_ne_bytes(*word));
        for level in Level::available() {
            assert_eq!(fold(level, &memory), want, "{level:?}");
        }
    }

    #[test]
    fn every_level_gives_a_figure() {
        for level in Level::available() {
            assert!(f32_flops(level, 1) > 1e7, "{level:?}");
            assert!(bf16_flops(level, 1) > 1e7 && int8_ops(level, 1) > 1e7, "{level:?}");
        }
        assert!(read_bandwidth(2, &vec![1; 1 << 24]) > 1e6);
    }
}
