//! `bench generate`: a prompt at once and tokens one by one, of a model or of a random one of a known shape.

use super::profile;
use crate::cli::BenchGenerateArgs;
use crate::commands::{options, print, print_json};
use crate::failure::{Failure, Result};
use crate::ui::{median, peak_memory};
use senmon_kernels::packed::Format;
use senmon_kernels::peak;
use senmon_kernels::profile::record;
use senmon_kernels::simd::Level;
use senmon_models::decoder::{Decoder, Pass};
use senmon_models::params::param_defs;
use senmon_models::shapes;
use senmon_models::spec::{FfnSpec, ModelSpec};
use senmon_moe::rng::Stream;
use serde::Serialize;
use std::fmt::Write;
use std::time::Instant;

/// What was measured of one thing.
#[derive(Serialize)]
struct Speed {
    name: String,
    /// Tokens per second: the median, the slowest and the fastest run.
    tokens_per_second: f64,
    lowest: f64,
    highest: f64,
    /// Bytes of weights that were read per second, if each was read once a pass.
    gigabytes_per_second: f64,
    /// Part of the measured read bandwidth.
    of_bandwidth: f64,
    /// Operations of products with weights per second.
    gflops: f64,
    /// Part of the measured peak of such operations.
    of_peak: f64,
    /// Bytes of weights that a token needs.
    bytes_per_token: f64,
    /// Of several sequences at once: how many times as fast as one they could be, by the bytes of the experts that they touch
    /// together, and how many times they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    to_one: Option<(f64, f64)>,
}

/// One thing to be timed: tokens of a pass, passes, sequences.
struct Case {
    name: String,
    prompt: usize,
    steps: usize,
    sequences: usize,
    seconds: Vec<f64>,
    /// Experts of a layer that a pass touched, summed over passes and layers.
    touched: f64,
}

/// Counts the experts that each layer of a pass touches.
#[derive(Default)]
struct Touched(usize);

impl senmon_moe::RoutingObserver for Touched {
    fn routed(&mut self, _layer: usize, routing: &senmon_moe::Routing) {
        self.0 += routing.load.iter().filter(|load| **load > 0).count();
    }
}

pub(in crate::commands) fn generate(args: BenchGenerateArgs) -> Result<()> {
    super::refuse_zero(&[("--runs", args.runs), ("--prompt", args.prompt), ("--tokens", args.tokens)])?;
    args.batch.iter().try_for_each(|sequences| super::refuse_zero(&[("--batch", *sequences)]))?;
    let start = Instant::now();
    let (decoder, name) = decoder(&args)?;
    let loading = start.elapsed().as_secs_f64();
    let mut cases = vec![Case::new(format!("pp{}", args.prompt), args.prompt, 1, 1)];
    for &sequences in &args.batch {
        let name = match sequences {
            1 => format!("tg{}", args.tokens),
            _ => format!("tg{} × {sequences}", args.tokens),
        };
        cases.push(Case::new(name, 1, args.tokens, sequences));
    }
    let (mut bandwidth, mut flops) = (Vec::new(), Vec::new());
    let threads = rayon::current_num_threads();
    let weights = Weights::of(&decoder);
    let memory = super::memory()?;
    for run in 0..=args.runs {
        bandwidth.push(peak::read_bandwidth(threads, &memory));
        flops.push(weights.peak(threads));
        for case in &mut cases {
            let seconds = case.run(&decoder, run as u64)?;
            // The first does not count: memory is touched, threads wake.
            if run > 0 {
                case.seconds.push(seconds);
            } else {
                case.touched = 0.0;
            }
        }
    }
    let (bandwidth, flops) = (median(&bandwidth), median(&flops));
    let mut speeds: Vec<Speed> =
        cases.iter().map(|case| case.speed(&weights, args.runs as f64, bandwidth, flops)).collect();
    if let Some(one) = cases.iter().position(|case| case.prompt == 1 && case.sequences == 1) {
        let (bytes, rate) = (speeds[one].bytes_per_token, speeds[one].tokens_per_second);
        for (speed, case) in speeds.iter_mut().zip(&cases).filter(|(_, case)| case.sequences > 1) {
            debug_assert!(case.prompt == 1);
            speed.to_one = Some((bytes / speed.bytes_per_token, speed.tokens_per_second / rate));
        }
    }
    let mut profiles = Vec::new();
    if let Some(path) = &args.profile.profile {
        for case in &mut cases {
            let (seconds, profile) = record(|| case.run(&decoder, 0));
            seconds?;
            profiles.push((case.name.clone(), profile));
        }
        profile::write(path, &profiles)?;
    }
    if args.common.json {
        return print_json(&serde_json::json!({
            "model": name, "format": weights.name, "threads": threads, "simd": Level::current().name(),
            "read_gbs": bandwidth / 1e9, "peak_gflops": flops / 1e9, "runs": args.runs,
            "seconds_to_load": loading, "peak_memory_bytes": peak_memory(),
            "active_bytes_per_token": weights.fixed + weights.active, "cases": speeds,
            "profiles": profile::json(&profiles),
        }));
    }
    let mut out = format!(
        "machine: {threads} threads, {}, read bandwidth {:.1} GB/s, peak of {} {:.0} GOP/s\n\
         {name}: {}, {:.0} MB of weights a token, loaded in {loading:.1} s, {} runs\n\n\
         {:<14} {:>9}  {:>19}  {:>7}  {:>12}  {:>8}  {:>7}\n",
        Level::current().name(),
        bandwidth / 1e9,
        weights.operations,
        flops / 1e9,
        weights.name,
        (weights.fixed + weights.active) / 1e6,
        args.runs,
        "",
        "tokens/s",
        "lowest to highest",
        "GB/s",
        "of bandwidth",
        "GOP/s",
        "of peak"
    );
    for speed in &speeds {
        let range = format!("{:.1} to {:.1}", speed.lowest, speed.highest);
        let _ = writeln!(
            out,
            "{:<14} {:>9.1}  {range:>19}  {:>7.1}  {:>10.1} %  {:>8.1}  {:>5.1} %",
            speed.name,
            speed.tokens_per_second,
            speed.gigabytes_per_second,
            100.0 * speed.of_bandwidth,
            speed.gflops,
            100.0 * speed.of_peak
        );
    }
    for (speed, (could, are)) in speeds.iter().filter_map(|speed| Some((speed, speed.to_one?))) {
        let _ = writeln!(
            out,
            "{}: {are:.2} times one sequence; the experts that they touch together allow {could:.2}",
            speed.name
        );
    }
    out.push_str(&profile::words(&profiles, threads));
    print(&out)
}

/// The model, and what to call it.
fn decoder(args: &BenchGenerateArgs) -> Result<(Decoder, String)> {
    let fits = |spec: &ModelSpec| {
        let (longest, most) = (args.prompt.max(args.tokens), spec.max_positions);
        match longest > most {
            true => {
                Err(Failure::mistake(format!("{longest} tokens are more than the model's {most} positions")))
            }
            false => Ok(()),
        }
    };
    match (&args.model, &args.shape) {
        (Some(model), None) => {
            let opened = senmon_models::checkpoint::open(model, senmon_models::audit::Audit::Once)?;
            fits(&opened.spec)?;
            let decoder = options::decoder(&args.compute, &opened.spec, opened.weights)?;
            Ok((decoder, model.display().to_string()))
        }
        (None, Some(_)) if args.compute.exact => {
            Err(Failure::mistake("--shape makes packed weights: --exact is for models"))
        }
        (None, Some(shape)) => {
            let spec = shapes::shape(shape, args.layers, args.vocab)?;
            fits(&spec)?;
            let ty = args.compute.quantize.unwrap_or(senmon_kernels::blocks::ElementType::Bf16);
            let format =
                Format::of(ty).ok_or_else(|| Failure::mistake(format!("{ty} has no packed form")))?;
            let decoder = Decoder::run(&spec, shapes::random_weights(&spec, format, 0)?)?;
            Ok((decoder, format!("{shape} of {} layers, random", spec.layers.len())))
        }
        _ => Err(Failure::mistake("bench generate needs a model or --shape NAME, one of the two")),
    }
}

/// Bytes of weights that a token needs.
struct Weights {
    name: String,
    operations: &'static str,
    int8: bool,
    bf16: bool,
    /// Those that every token needs, the head among them.
    fixed: f64,
    /// Those of its experts.
    active: f64,
    /// Those of one expert, mean over the layers that have some.
    expert: f64,
    /// Operations of products of a token: without the head, and of the head.
    body: f64,
    head: f64,
}

impl Weights {
    fn of(decoder: &Decoder) -> Self {
        let spec = decoder.spec();
        let defs = param_defs(spec);
        let (mut fixed, mut active, mut body, mut names) = (0.0, 0.0, 0.0, Vec::new());
        let (mut expert, mut layers) = (0.0, 0.0);
        for (def, slot) in defs.iter().zip(decoder.slots()) {
            let senmon_models::decoder::Slot::Param(param) = slot else { continue };
            let bytes = match (param.as_packed(), param.as_stored()) {
                (Some(packed), _) => {
                    names.push(format!("{:?}", packed.format()));
                    packed.bytes() as f64
                }
                (None, Some(stored)) => {
                    stored.parts().iter().map(|part| part.range.len()).sum::<usize>() as f64
                }
                (None, None) => 4.0 * def.len() as f64,
            };
            let layer = def.name.strip_prefix("layers.").and_then(|rest| rest.split_once('.'));
            match layer.and_then(|(l, part)| Some((spec.layers.get(l.parse::<usize>().ok()?)?, part))) {
                Some((FfnSpec::Moe(moe), part)) if part.starts_with("experts.") => {
                    let share = moe.top_k as f64 / moe.experts as f64;
                    active += bytes * share;
                    expert += bytes / moe.experts as f64;
                    layers += if part == "experts.down" { 1.0 } else { 0.0 };
                    body += 2.0 * def.len() as f64 * share;
                }
                _ if def.name == "embed" => {}
                _ => {
                    fixed += bytes;
                    let matrix = def.shape.len() >= 2 && def.name != "head";
                    body += if matrix { 2.0 * def.len() as f64 } else { 0.0 };
                }
            }
        }
        names.sort();
        names.dedup();
        let has = |what: &[&str]| names.iter().any(|name| what.contains(&name.as_str()));
        let int8 = has(&["Q8_0", "Q4_0", "Q4K", "Q6K", "Mxfp4"]);
        let bf16 = has(&["Bf16"]) && !int8;
        Self {
            name: if names.is_empty() { "as stored".into() } else { names.join(", ") },
            operations: if int8 {
                "8 bits"
            } else if bf16 {
                "bf16"
            } else {
                "f32"
            },
            int8,
            bf16,
            fixed,
            active,
            expert: expert / f64::max(layers, 1.0),
            body,
            head: 2.0 * (spec.vocab * spec.hidden) as f64,
        }
    }

    /// Operations per second at best.
    fn peak(&self, threads: usize) -> f64 {
        let level = Level::current();
        match (self.int8, self.bf16) {
            (true, _) => peak::int8_ops(level, threads),
            (_, true) => peak::bf16_flops(level, threads),
            _ => peak::f32_flops(level, threads),
        }
    }
}

impl Case {
    fn new(name: String, prompt: usize, steps: usize, sequences: usize) -> Self {
        Self { name, prompt, steps, sequences, seconds: Vec::new(), touched: 0.0 }
    }

    /// Tokens that one run makes or reads.
    fn tokens(&self) -> f64 {
        (self.prompt * self.steps * self.sequences) as f64
    }

    /// Runs it once, on random tokens from an empty context.
    fn run(&mut self, decoder: &Decoder, run: u64) -> Result<f64> {
        let stream = Stream::new(&[run]);
        let vocab = decoder.spec().vocab as u64;
        let mut caches = (0..self.sequences)
            .map(|_| decoder.cache(self.prompt * self.steps))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        let mut touched = Touched::default();
        let start = Instant::now();
        for step in 0..self.steps {
            let draw =
                |s: usize, i: usize| (stream.bits(((step * 4096 + s) * 65_536 + i) as u64) % vocab) as u32;
            let tokens: Vec<Vec<u32>> =
                (0..self.sequences).map(|s| (0..self.prompt).map(|i| draw(s, i)).collect()).collect();
            let tokens: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
            let mut caches: Vec<_> = caches.iter_mut().collect();
            let mut pass = Pass { observer: Some(&mut touched), ..Pass::default() };
            decoder.logits_batch(&tokens, &mut caches, true, &mut pass)?;
        }
        self.touched += touched.0 as f64;
        Ok(start.elapsed().as_secs_f64())
    }

    fn speed(&self, w: &Weights, runs: f64, bandwidth: f64, flops: f64) -> Speed {
        let tokens = self.tokens();
        let rate = |seconds: f64| tokens / seconds;
        let seconds = median(&self.seconds);
        let bytes = w.fixed * self.steps as f64 + w.expert * self.touched / runs;
        let operations = w.body * tokens + w.head * (self.steps * self.sequences) as f64;
        Speed {
            name: self.name.clone(),
            tokens_per_second: rate(seconds),
            lowest: rate(self.seconds.iter().copied().fold(0.0, f64::max)),
            highest: rate(self.seconds.iter().copied().fold(f64::INFINITY, f64::min)),
            gigabytes_per_second: bytes / seconds / 1e9,
            of_bandwidth: bytes / seconds / bandwidth,
            gflops: operations / seconds / 1e9,
            of_peak: operations / seconds / flops,
            bytes_per_token: bytes / tokens,
            to_one: None,
        }
    }
}
