//! The flags of `bench`.

use super::{Common, ComputeArgs, PrecisionArg};
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// `bench`.
#[derive(Clone, Debug, Subcommand)]
pub enum Bench {
    /// One MoE layer, forward and backward with gradients of weights, beside a dense twin and the machine's peak
    #[command(after_help = "Example:\n  senmon bench layer --threads 2 --experts 8,64")]
    Layer(BenchLayerArgs),
    /// Training steps of a whole model, beside a dense twin and the machine's peak
    #[command(after_help = "Example:\n  senmon bench train --threads 2 --json")]
    Train(BenchTrainArgs),
    /// A prompt at once and tokens one by one, of a model or of a random one of a known shape, beside bandwidth and peak
    #[command(after_help = "\
Examples:
  senmon bench generate runs/first
  senmon bench generate --shape olmoe-1b-7b --layers 4 --vocab 4096 --quantize q4_k --batch 1,8,32")]
    Generate(BenchGenerateArgs),
}

/// `bench generate`.
#[derive(Clone, Debug, Args)]
pub struct BenchGenerateArgs {
    /// A folder or a .gguf file
    pub model: Option<PathBuf>,
    /// Instead of a model: random weights in the shape of olmoe-1b-7b, mixtral-8x7b, mixtral-2k (H 2048, I 4096) or
    /// qwen3-30b-a3b, in bf16 or the type of --quantize
    #[arg(long, value_name = "NAME")]
    pub shape: Option<String>,
    /// Layers of the shape [default: its own]
    #[arg(long, value_name = "N", requires = "shape")]
    pub layers: Option<usize>,
    /// Vocabulary of the shape [default: its own]
    #[arg(long, value_name = "N", requires = "shape")]
    pub vocab: Option<usize>,
    /// How products are made.
    #[command(flatten)]
    pub compute: ComputeArgs,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub prompt: usize,
    /// Tokens that are made one by one
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub tokens: usize,
    /// Sequences that tokens are made for at once, each number measured
    #[arg(long, value_delimiter = ',', default_values_t = [1])]
    pub batch: Vec<usize>,
    /// Runs of each
    #[arg(long, default_value_t = 5)]
    pub runs: usize,
    /// Where the time goes.
    #[command(flatten)]
    pub profile: ProfileArgs,
    /// Shared flags.
    #[command(flatten)]
    pub common: Common,
}

/// `bench layer`.
#[derive(Clone, Debug, Args)]
pub struct BenchLayerArgs {
    /// T
    #[arg(long, default_value_t = 4096)]
    pub tokens: usize,
    /// H
    #[arg(long, default_value_t = 512)]
    pub hidden: usize,
    /// I, the inner width of an expert
    #[arg(long, default_value_t = 1024)]
    pub intermediate: usize,
    /// E, each measured
    #[arg(long, value_delimiter = ',', default_values_t = [8, 64])]
    pub experts: Vec<usize>,
    /// K
    #[arg(long, default_value_t = 2)]
    pub top_k: usize,
    /// Runs of each
    #[arg(long, default_value_t = 7)]
    pub runs: usize,
    /// What products with weights are rounded to
    #[arg(long, value_name = "HOW", value_enum, default_value = "f32")]
    pub precision: PrecisionArg,
    /// Where the time goes.
    #[command(flatten)]
    pub profile: ProfileArgs,
    /// Shared flags.
    #[command(flatten)]
    pub common: Common,
}

/// `--profile`, where speed is measured.
#[derive(Clone, Debug, Args)]
pub struct ProfileArgs {
    /// Also tell where the time of one run goes, and write it as a trace for chrome://tracing or ui.perfetto.dev
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
}

/// `bench train`.
#[derive(Clone, Debug, Args)]
pub struct BenchTrainArgs {
    /// H
    #[arg(long, default_value_t = 256)]
    pub hidden: usize,
    /// L
    #[arg(long, default_value_t = 4)]
    pub layers: usize,
    /// Heads
    #[arg(long, default_value_t = 4)]
    pub heads: usize,
    /// V
    #[arg(long, default_value_t = 4096)]
    pub vocab: usize,
    /// E
    #[arg(long, default_value_t = 8)]
    pub experts: usize,
    /// K
    #[arg(long, default_value_t = 2)]
    pub top_k: usize,
    /// I
    #[arg(long, default_value_t = 512)]
    pub intermediate: usize,
    /// B
    #[arg(long, default_value_t = 8)]
    pub batch: usize,
    /// S
    #[arg(long, default_value_t = 256)]
    pub sequence: usize,
    /// Steps of each, after two that do not count
    #[arg(long, default_value_t = 15)]
    pub runs: usize,
    /// What products with weights, and those of attention, are rounded to
    #[arg(long, value_name = "HOW", value_enum, default_value = "f32")]
    pub precision: PrecisionArg,
    /// Where the time goes.
    #[command(flatten)]
    pub profile: ProfileArgs,
    /// Shared flags.
    #[command(flatten)]
    pub common: Common,
}
