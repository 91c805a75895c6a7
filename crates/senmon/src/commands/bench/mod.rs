//! `bench`: speed beside the machine's own limits, measured in the same run.

mod generate;
mod layer;
mod profile;
mod train;

pub(super) use generate::generate;
pub(super) use layer::layer;
pub(super) use train::train;

use crate::cli::{PrecisionArg, ProfileArgs};
use crate::failure::{Failure, Result};
use crate::ui::median;
use senmon_files::Pages;
use senmon_kernels::peak;
use senmon_kernels::profile::{Profile, record};
use senmon_kernels::simd::Level;
use senmon_moe::rng::Stream;
use serde::Serialize;
use std::time::Instant;

/// Bytes read by a measurement of bandwidth: far beyond any last cache.
const READ: usize = 512 << 20;

/// Memory to measure the bandwidth on: in large pages, as packed weights are, and written.
fn memory() -> Result<Pages> {
    let mut memory = Pages::zeroed(READ)
        .map_err(|e| Failure::mistake(format!("no memory to measure the bandwidth on: {e}")))?;
    memory.fill(1);
    Ok(memory)
}

/// The machine's limits, as measured between the runs.
struct Peaks {
    memory: Pages,
    precision: PrecisionArg,
    /// Operations per second in `precision`.
    flops: Vec<f64>,
    bandwidth: Vec<f64>,
}

impl Peaks {
    fn new(precision: PrecisionArg) -> Result<Self> {
        Ok(Self { memory: memory()?, precision, flops: Vec::new(), bandwidth: Vec::new() })
    }

    fn measure(&mut self) {
        let threads = rayon::current_num_threads();
        self.flops.push(match self.precision {
            PrecisionArg::F32 => peak::f32_flops(Level::current(), threads),
            PrecisionArg::Bf16 => peak::bf16_flops(Level::current(), threads),
        });
        self.bandwidth.push(peak::read_bandwidth(threads, &self.memory));
    }

    /// Operations per second.
    fn flops(&self) -> f64 {
        median(&self.flops)
    }

    fn words(&self) -> String {
        format!(
            "machine: {} threads, {}, {} peak {:.0} GFLOP/s, read bandwidth {:.1} GB/s",
            rayon::current_num_threads(),
            Level::current().name(),
            self.precision.name(),
            self.flops() / 1e9,
            median(&self.bandwidth) / 1e9
        )
    }
}

/// Times of one thing that was run several times.
#[derive(Serialize)]
struct Timing {
    name: String,
    /// E; 0 for a dense one.
    experts: usize,
    milliseconds: f64,
    lowest: f64,
    highest: f64,
    gflops: f64,
    of_peak: f64,
    /// Its time over that of the dense twin.
    to_dense: f64,
    /// Coefficient of variation of its experts' loads.
    load_cv: Option<f64>,
}

/// One thing to be timed.
struct Case {
    name: String,
    experts: usize,
    flops: f64,
    load_cv: Option<f64>,
    work: Box<dyn FnMut() -> Result<()>>,
    seconds: Vec<f64>,
}

impl Case {
    fn run(&mut self) -> Result<f64> {
        let start = Instant::now();
        (self.work)()?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// `dense` is the median time of the dense twin.
    fn timing(&self, peaks: &Peaks, dense: f64) -> Timing {
        let seconds = median(&self.seconds);
        Timing {
            name: self.name.clone(),
            experts: self.experts,
            milliseconds: 1e3 * seconds,
            lowest: 1e3 * self.seconds.iter().copied().fold(f64::INFINITY, f64::min),
            highest: 1e3 * self.seconds.iter().copied().fold(0.0, f64::max),
            gflops: self.flops / seconds / 1e9,
            of_peak: self.flops / seconds / peaks.flops(),
            to_dense: seconds / dense,
            load_cv: self.load_cv,
        }
    }
}

/// Runs all cases in turn, `runs` times after one that does not count, so that a machine that slows down slows all.
fn alternate(cases: &mut [Case], runs: usize, precision: PrecisionArg) -> Result<Peaks> {
    let mut peaks = Peaks::new(precision)?;
    for case in cases.iter_mut() {
        case.run()?;
    }
    for _ in 0..runs.max(1) {
        peaks.measure();
        for case in cases.iter_mut() {
            // The measurement before, and the other cases, have taken the caches.
            let seconds = case.run()?;
            case.seconds.push(seconds);
        }
    }
    Ok(peaks)
}

/// One run of each case, recorded, if that is wanted; the trace is written.
fn profiled(cases: &mut [Case], args: &ProfileArgs) -> Result<Vec<(String, Profile)>> {
    let Some(path) = &args.profile else { return Ok(Vec::new()) };
    let mut profiles = Vec::new();
    for case in cases.iter_mut() {
        let (done, profile) = record(|| case.run());
        done?;
        profiles.push((case.name.clone(), profile));
    }
    profile::write(path, &profiles)?;
    Ok(profiles)
}

/// Normally distributed numbers, always the same.
fn normal(name: u64, count: usize, deviation: f32) -> Vec<f32> {
    let stream = Stream::new(&[name]);
    (0..count as u64)
        .map(|i| {
            let radius = (-2.0 * (1.0 - stream.uniform(2 * i)).max(f32::MIN_POSITIVE).ln()).sqrt();
            deviation * radius * (std::f32::consts::TAU * stream.uniform(2 * i + 1)).cos()
        })
        .collect()
}

fn refuse_zero(sizes: &[(&str, usize)]) -> Result<()> {
    match sizes.iter().find(|(_, size)| *size == 0) {
        Some((flag, _)) => Err(Failure::mistake(format!("{flag} 0 must be at least 1"))),
        None => Ok(()),
    }
}
