//! The command line.

mod bench;

pub use bench::{Bench, BenchGenerateArgs, BenchLayerArgs, BenchTrainArgs, ProfileArgs};

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use senmon_kernels::blocks::{ElementType, can_quantize};
use senmon_kernels::gemm::Precision;
use senmon_models::audit::Audit;
use senmon_models::checkpoint::{self, Opened};
use std::path::PathBuf;

/// Trains, runs and explains Mixture-of-Experts language models on ordinary CPUs.
#[derive(Debug, Parser)]
#[command(
    name = "senmon",
    version,
    about,
    max_term_width = 100,
    after_help = "\
Examples:
  senmon train --data ~/.cargo/registry/src --minutes 3 --out runs/first
  senmon generate runs/first --prompt \"pub fn \"
  senmon inspect runs/first

Results go to standard output (with --json as one JSON document), talk to standard error.
Exit status: 0 done, 2 a mistake that you can put right, 130 ended by Ctrl-C, 1 anything else.
SENMON_SIMD=avx512_bf16|avx512|avx2|portable chooses the instruction set."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a language model on text, or go on with a run
    Train(Box<TrainArgs>),
    /// Loss, perplexity and bits per byte of a model, in total and by domain
    Eval(EvalArgs),
    /// Continue a text
    Generate(GenerateArgs),
    /// Talk with a chat model
    Chat(ChatArgs),
    /// The logits of given tokens, for comparisons with other programs
    Logits(LogitsArgs),
    /// The experts, weights and losses of given router logits, for comparisons with other programs
    Route(RouteArgs),
    /// What is in a model: parameters in total and active, experts, routers, memory; with text, what the router does with it
    #[command(after_help = "\
Examples:
  senmon inspect runs/first
  senmon inspect runs/first --data docs --trace routing.safetensors
  senmon inspect runs/first --report experts.html
  senmon inspect runs/first/checkpoints/step-00000250 --compare runs/first --data docs --report two.html")]
    Inspect(InspectArgs),
    /// A routing trace routed again: another k, a capacity, a placement of experts, a cache
    Replay(ReplayArgs),
    /// Whether experts pay on your text: MoE, dense models and ensembles at equal cost, with intervals and a verdict
    Compare(Box<CompareArgs>),
    /// Write a model in another layout or type: Hugging Face folders and GGUF
    Convert(ConvertArgs),
    /// Measure speed beside the machine's own limits
    #[command(
        subcommand,
        after_help = "\
Examples:
  senmon bench layer --experts 8,64
  senmon bench generate --shape olmoe-1b-7b --layers 4 --vocab 4096
  senmon bench train --threads 2 --json"
    )]
    Bench(Bench),
    /// Print a completion script for a shell
    #[command(
        after_help = "Example:\n  senmon completions bash > ~/.local/share/bash-completion/completions/senmon"
    )]
    Completions {
        /// Which shell.
        shell: Shell,
    },
    /// Print the manual page
    #[command(after_help = "Example:\n  senmon man > ~/.local/share/man/man1/senmon.1")]
    Man,
}

/// Flags that all commands share.
#[derive(Clone, Debug, Default, Args)]
pub struct Common {
    /// Threads to compute with [default: one per core]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Print the result as one JSON document
    #[arg(long)]
    pub json: bool,
    /// Say nothing but the result and errors
    #[arg(long, short)]
    pub quiet: bool,
}

/// `train`.
#[derive(Clone, Debug, Default, Args)]
#[command(after_help = "\
Examples:
  senmon train --data ~/text --minutes 10 --out runs/a            # the preset `nano`, 8 experts, 2 per token
  senmon train --data ~/text --preset tiny --tokens 20M --out runs/b --set router.kind=sigmoid_bias
  senmon train --data ~/text --set model.ffn=dense --steps 500 --out runs/dense
  senmon train --resume --out runs/a --tokens 40M                 # go on, and further than planned
  senmon train --init runs/a --data ~/notes --steps 200 --out runs/tuned

A text file or folder of any kind will do; .jsonl and .parquet files have their text in --column.
Ctrl-C saves the run and says how to go on.")]
pub struct TrainArgs {
    /// Files and folders with text, code, .jsonl or .parquet
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// The folder of the run
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Go on with the run in --out
    #[arg(long)]
    pub resume: bool,
    /// Size of the model: nano, tiny or small (1, 5, 30 million active parameters)
    #[arg(long, value_name = "NAME", conflicts_with = "resume")]
    pub preset: Option<String>,
    /// A run configuration in TOML
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Set a key of the run configuration
    #[arg(long, value_name = "TABLE.KEY=VALUE")]
    pub set: Vec<String>,
    /// End after so many minutes of training
    #[arg(long, value_name = "N")]
    pub minutes: Option<f64>,
    /// End after so many optimiser steps (4k, 2M, ...)
    #[arg(long, value_name = "N")]
    pub steps: Option<String>,
    /// End after so many tokens (500k, 20M, ...)
    #[arg(long, value_name = "N")]
    pub tokens: Option<String>,
    /// Start from a model: a folder, a .gguf file, or owner/name of the Hugging Face hub
    #[arg(long, value_name = "MODEL", conflicts_with = "resume")]
    pub init: Option<PathBuf>,
    /// Train on just these batches, in order: tensor `tokens` [N, B, S+1] of a safetensors file
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    pub batches: Option<PathBuf>,
    /// What a document's domain is: extension, folder, or a file of rules
    #[arg(long, value_name = "RULE")]
    pub domains: Option<String>,
    /// The text column of .jsonl and .parquet files
    #[arg(long, value_name = "NAME")]
    pub column: Option<String>,
    /// A tokenizer.json to use, rather than to train one
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Everything random follows from it
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Write the routing of a fixed part of the held-out text every N steps, to traces/ in the run's folder
    #[arg(long, value_name = "N")]
    pub trace_every: Option<u64>,
    /// Serve a page that shows the run as it goes, to this machine alone: at PORT or HOST:PORT, by default 127.0.0.1:7878 or
    /// the next port that is free. Where it is, is said even with --quiet
    #[arg(long, value_name = "ADDR", num_args = 0..=1)]
    pub dashboard: Option<Option<String>>,
    /// What products with weights, and those of attention, are rounded to; all else stays f32
    #[arg(long, value_name = "HOW", value_enum)]
    pub precision: Option<PrecisionArg>,
    /// Shared flags.
    #[command(flatten)]
    pub common: Common,
}

/// `--precision`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PrecisionArg {
    /// Not rounded.
    F32,
    /// To bf16, products about twice as fast where the processor has fast dot products of it (AVX-512 BF16 on AMD).
    Bf16,
}

impl PrecisionArg {
    /// The value of `train.precision`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

impl From<PrecisionArg> for Precision {
    fn from(precision: PrecisionArg) -> Self {
        match precision {
            PrecisionArg::F32 => Self::F32,
            PrecisionArg::Bf16 => Self::Bf16,
        }
    }
}

/// Which model, and how well it is looked at before it is used.
#[derive(Clone, Debug, Args)]
pub struct ModelArgs {
    /// A folder, a .gguf file, or a name of the Hugging Face hub: owner/name, owner/name@revision, owner/name:Q4_K_M
    pub model: PathBuf,
    /// What is checked: full, every value (else only at the first use of a model); structure, names, shapes and types
    #[arg(long, value_name = "HOW", value_enum)]
    pub audit: Option<AuditArg>,
}

/// `5=-1.5`.
fn token_bias(text: &str) -> Result<(u32, f32), String> {
    let parsed = text
        .split_once('=')
        .and_then(|(id, bias)| Some((id.trim().parse().ok()?, bias.trim().parse().ok()?)));
    parsed.ok_or_else(|| "expected ID=NUMBER, as in 5=-1.5".to_owned())
}

/// `--audit`.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum AuditArg {
    /// Every value.
    Full,
    /// Names, shapes and types.
    Structure,
}

impl ModelArgs {
    /// What is checked where the user says nothing: `otherwise`.
    pub fn audit_or(&self, otherwise: Audit) -> Audit {
        match self.audit {
            None => otherwise,
            Some(AuditArg::Full) => Audit::Full,
            Some(AuditArg::Structure) => Audit::Structure,
        }
    }

    /// Opens the model to run it.
    pub fn open(&self) -> senmon_models::Result<Opened> {
        checkpoint::open(&self.model, self.audit_or(Audit::Once))
    }
}

/// `eval`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  senmon eval runs/first                      # on the held-out part of the text it was trained on
  senmon eval runs/first --data ~/other-text --domains folder")]
pub struct EvalArgs {
    /// The model.
    #[command(flatten)]
    pub from: ModelArgs,
    /// The text.
    #[command(flatten)]
    pub text: WindowsArgs,
    /// Windows at once
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub batch: usize,
    /// Shared flags.
    #[command(flatten)]
    pub common: Common,
}

/// Text to run through a model, in windows.
#[derive(Clone, Debug, Args)]
pub struct WindowsArgs {
    /// Text to run through the model [default: the held-out part of the run's own]
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// What a document's domain is: extension, folder, or a file of rules
    #[arg(long, value_name = "RULE", default_value = "extension")]
    pub domains: String,
    /// The text column of .jsonl and .parquet files
    #[arg(long, value_name = "NAME", default_value = "text")]
    pub column: String,
    /// Tokens of a window [default: what the run was trained with, else 256]
    #[arg(long, value_name = "N")]
    pub sequence: Option<usize>,
    /// Tokens at most, spread over the domains (500k, 2M, ...; 0 for all) [default: 1M to evaluate, 32k to look at routing]
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<String>,
}

/// What texts are made with.
#[derive(Clone, Debug, Args)]
pub struct TextArgs {
    /// The model.
    #[command(flatten)]
    pub from: ModelArgs,
    /// Tokens to add at most
    #[arg(long, short = 'n', value_name = "N", default_value_t = 200)]
    pub max_tokens: usize,
    /// 0 takes the likeliest token, 1 the model's own distribution [default: what generation_config.json says, 0 where its
    /// do_sample is false, else 0.8]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Only the likeliest so many tokens; 0 for all [default: what generation_config.json says, else 0]
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together have this probability [default: what generation_config.json says, else 0.95]
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Only tokens with at least this part of the likeliest one's probability; 0 for all [default: what generation_config.json
    /// says, else 0]
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,
    /// Divides the logits of tokens that were there before, in prompt or text; 1 for none [default: what
    /// generation_config.json says, else 1]
    #[arg(long, value_name = "F")]
    pub repetition_penalty: Option<f32>,
    /// Taken from the logits of tokens that the text has
    #[arg(long, value_name = "F", default_value_t = 0.0, allow_negative_numbers = true)]
    pub presence_penalty: f32,
    /// Taken from the logits of tokens, for each time that the text has them
    #[arg(long, value_name = "F", default_value_t = 0.0, allow_negative_numbers = true)]
    pub frequency_penalty: f32,
    /// Added to the logit of a token; -inf rules it out
    #[arg(long, value_name = "ID=F", value_parser = token_bias, allow_hyphen_values = true)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Everything random follows from it
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// End before this text
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Experts that each token uses, instead of the model's own number
    #[arg(long, value_name = "K")]
    pub experts_per_token: Option<usize>,
    /// How products are made.
    #[command(flatten)]
    pub compute: ComputeArgs,
}

/// Whether the experts of tokens are shown.
#[derive(Clone, Debug, Args)]
pub struct RoutingArgs {
    /// The experts of every token in every layer: a table on standard error, or with --json in the document; with =FILE a
    /// trace in a safetensors file
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    pub show_routing: Option<Option<PathBuf>>,
    /// With --show-routing: the logits of all routers too, in the trace or the document
    #[arg(long, requires = "show_routing")]
    pub routing_logits: bool,
}

/// `generate`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  senmon generate runs/first --prompt \"pub fn \"
  senmon generate runs/first --prompt \"# \" --max-tokens 100 --temperature 0 --stop $'\\n\\n'
  senmon generate runs/first --prompt \"fn \" --show-routing=trace.safetensors
  senmon generate runs/first --prompts questions.jsonl --batch 16 --json")]
pub struct GenerateArgs {
    /// What texts are made with.
    #[command(flatten)]
    pub options: TextArgs,
    /// A text to continue; several are continued at once
    #[arg(long, short, value_name = "TEXT")]
    pub prompt: Vec<String>,
    /// More of them: a file with one a line, or a .jsonl whose lines have a "prompt"; - for standard input
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Texts at once, at most
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub batch: usize,
    /// Whether the experts of tokens are shown.
    #[command(flatten)]
    pub routing: RoutingArgs,
    /// With --json: the log-probability of every token, and those of the likeliest so many
    #[arg(long, value_name = "N", requires = "json")]
    pub logprobs: Option<usize>,
    /// Token ids that the decoder of an encoder-decoder begins with [default: the one that its texts begin with]
    #[arg(long, value_name = "IDS", value_delimiter = ',', num_args = 1..)]
    pub decoder_tokens: Vec<u32>,
    /// Shared flags.
    #[command(flatten)]
    pub common: Common,
}

/// `chat`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Example:
  senmon chat ~/models/OLMoE-1B-7B-Instruct --system \"Answer in one sentence.\"")]
pub struct ChatArgs {
    /// What texts are made with.
    #[command(flatten)]
    pub options: TextArgs,
    /// An instruction before the first question
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// A chat template in Jinja, instead of the model's own
    #[arg(long, value_name = "FILE")]
    pub template: Option<PathBuf>,
    /// Tokens of a conversation, at most [default: 4096, or the model's own length where that is less]
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// Threads to compute with [default: one per core]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Say nothing but the answers and errors
    #[arg(long, short)]
    pub quiet: bool,
}

/// `compare`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Every arm is trained on the same text with the same seeds, and compared with the first one. --out gets compare.html, compare.csv and
compare.json (sweep.* of a sweep). Ctrl-C saves; the same command goes on. docs/compare.md says what is equal and what is claimed.

Examples:
  senmon compare --data ~/text --out runs/compare --tokens 2M
  senmon compare --data ~/text --out runs/compare --minutes 5 --arms moe,dense --equal flops,time --plan
  senmon compare --data ~/text --out runs/routers --tokens 2M --arms moe --routers sigmoid_bias,switch --equal flops
  senmon compare --data ~/text --out runs/sweep --tokens 2M --sweep experts=4,8,16 top_k=1,2,4")]
pub struct CompareArgs {
    /// Files and folders with text, code, .jsonl or .parquet
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// The folder of the comparison; what is done there is not done again
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Size of the model with experts: nano, tiny or small
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// Its configuration in TOML
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Set a key of its configuration, and so of all arms
    #[arg(long, value_name = "TABLE.KEY=VALUE")]
    pub set: Vec<String>,
    /// Tokens that the model with experts is trained on (500k, 20M, ...) [default: those of the preset]
    #[arg(long, value_name = "N", conflicts_with = "minutes")]
    pub tokens: Option<String>,
    /// The same as the minutes that they take on this machine, by the speed of a few steps
    #[arg(long, value_name = "N")]
    pub minutes: Option<f64>,
    /// Runs of each arm, paired by their seeds; fewer than 2 give no interval
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub seeds: usize,
    /// What is compared, with the first: moe, dense, dense-total (as many parameters in all), ensemble, efficient-ensemble
    #[arg(
        long,
        value_name = "ARMS",
        conflicts_with = "sweep",
        value_delimiter = ',',
        default_value = "moe,dense,dense-total,ensemble,efficient-ensemble"
    )]
    pub arms: Vec<String>,
    /// What is equal: training flops, active parameters, total parameters, wall time
    #[arg(
        long,
        value_name = "WHAT",
        conflicts_with = "sweep",
        value_delimiter = ',',
        default_value = "flops,active,total,time"
    )]
    pub equal: Vec<String>,
    /// Kinds of router, each an arm
    #[arg(long, value_name = "KINDS", conflicts_with = "sweep", value_delimiter = ',')]
    pub routers: Vec<String>,
    /// Members of the ensembles
    #[arg(long, value_name = "N", conflicts_with = "sweep", default_value_t = 2)]
    pub members: usize,
    /// Instead of arms: search these shapes by successive halving (experts, top_k, width, shared, layers, hidden, router, lr, size, or
    /// table.key)
    #[arg(long, value_name = "KEY=A,B,…", num_args = 1..)]
    pub sweep: Vec<String>,
    /// Say what would be trained, and train nothing
    #[arg(long)]
    pub plan: bool,
    /// What a document's domain is: extension, folder, or a file of rules
    #[arg(long, value_name = "RULE")]
    pub domains: Option<String>,
    /// The text column of .jsonl and .parquet files
    #[arg(long, value_name = "NAME")]
    pub column: Option<String>,
    /// A tokenizer.json to use, rather than to train one
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Shared flags.
    #[command(flatten)]
    pub common: Common,
}

/// `convert`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  senmon convert runs/first first.gguf                     # for llama.cpp; what it computes stays the same
  senmon convert ~/models/OLMoE-1B-7B olmoe.gguf --type q4_k
  senmon convert olmoe.gguf olmoe-again --type bf16        # and back, a folder for transformers

What stays in its type stays in its bits. A layout that cannot say a model is refused with the field it has no word for.")]
pub struct ConvertArgs {
    /// The model.
    #[command(flatten)]
    pub from: ModelArgs,
    /// Where to write it: a name that ends in .gguf, or a folder that is not there yet
    pub out: PathBuf,
    /// Type of the matrices: keep, f32, f16, bf16, or for GGUF q8_0 or q4_k
    #[arg(long = "type", value_name = "TYPE", default_value = "keep")]
    pub types: String,
    /// The Hugging Face family of a folder
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub family: String,
    /// Shared flags.
    #[command(flatten)]
    pub common: Common,
}

/// `logits`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Example:
  senmon logits runs/first --tokens 5,17,3 --out logits.safetensors   # tensor `logits` [S, V] f32")]
pub struct LogitsArgs {
    /// The model.
    #[command(flatten)]
    pub from: ModelArgs,
    /// Token ids, separated by commas
    #[arg(long, value_name = "IDS", value_delimiter = ',', num_args = 1.., required = true)]
    pub tokens: Vec<u32>,
    /// Token ids of the decoder of an encoder-decoder [default: the one that its texts begin with]
    #[arg(long, value_name = "IDS", value_delimiter = ',', num_args = 1..)]
    pub decoder_tokens: Vec<u32>,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Multiply as `generate` does, with packed weights and rounded activations [default: in f32, with weights as they are stored]
    #[arg(long)]
    pub packed: bool,
    /// Whether the experts of tokens are shown.
    #[command(flatten)]
    pub routing: RoutingArgs,
    /// Shared flags.
    #[command(flatten)]
    pub common: Common,
}

/// `route`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Routes as the MoE layers of a run of this configuration do. FILE holds `logits` [T, E] f32, and where the router asks for them `bias` [E],
`token_ids` [T] u32, `noise` [T, E] (the random numbers to take), `noise_std` [T, E], `mask` [T] (0 for padding) and `sequences` [1]. What is
written holds `experts` [T, K] i32 (-1 where there is none), `weights` [T, K] f32 and `load` [E] i32; --json tells the losses and the drops.

Examples:
  senmon route --set experts.count=8 --set router.capacity=1.0 --logits z.safetensors --train --out routing.safetensors --json
  senmon route --config run.toml --logits z.safetensors --out routing.safetensors")]
pub struct RouteArgs {
    /// A TOML file; its tables experts, router and balance matter here
    #[arg(long, value_name = "FILE")]
    pub config: Vec<PathBuf>,
    /// One key of the configuration
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// The logits, and what else the router asks for
    #[arg(long, value_name = "FILE")]
    pub logits: PathBuf,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Routes as in training: with noise, `capacity` and what else is only there
    #[arg(long)]
    pub train: bool,
    /// Shared flags.
    #[command(flatten)]
    pub common: Common,
}

/// `inspect`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:\n  senmon inspect runs/first")]
pub struct InspectArgs {
    /// The model.
    #[command(flatten)]
    pub from: ModelArgs,
    /// The text.
    #[command(flatten)]
    pub text: WindowsArgs,
    /// Run the text through the model and write the routing of each token, a safetensors file
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Write a page about router and experts, one HTML file: load, words for experts, domains, text by expert, memory
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Put another model, or another checkpoint of a run, beside it on the same text; --report writes the page of the two
    #[arg(long, value_name = "MODEL")]
    pub compare: Option<PathBuf>,
    /// Do not switch experts off one after another to check what they are for (with --report or --json, as many passes over the text
    /// as there are experts)
    #[arg(long)]
    pub no_ablation: bool,
    /// Do not compare what experts give for the same tokens, and their weights (with --report or --json)
    #[arg(long)]
    pub no_likeness: bool,
    /// Shared flags.
    #[command(flatten)]
    pub common: Common,
}

/// `replay`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
The choices are the recorded ones: with fewer experts a token keeps its first, with more it takes those of its next logits. What that
would have done to later layers only --model tells.

Examples:
  senmon replay routing.safetensors --top-k 1 --model runs/first
  senmon replay routing.safetensors --capacity 1.25 --together 4096 --drop priority
  senmon replay routing.safetensors --ranks 4 --placement suggested --placement-out placement.json
  senmon replay routing.safetensors --cache 16")]
pub struct ReplayArgs {
    /// What `inspect --trace`, `train --trace-every` or `--show-routing=FILE` wrote
    pub trace: PathBuf,
    /// Experts per token [default: as recorded]
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// An expert takes at most FACTOR times an even share of the tokens [default: all that come]
    #[arg(long, value_name = "FACTOR", allow_negative_numbers = true)]
    pub capacity: Option<f64>,
    /// Tokens that are routed together, for --capacity; 0 for all
    #[arg(long, value_name = "T", default_value_t = 0, requires = "capacity")]
    pub together: usize,
    /// Who is left out of an expert that is full
    #[arg(long, value_name = "RULE", value_enum, default_value = "position", requires = "capacity")]
    pub drop: DropArg,
    /// Ranks that experts and texts are spread over
    #[arg(long, value_name = "R")]
    pub ranks: Option<usize>,
    /// Which rank has which expert: contiguous, suggested (little traffic, even loads), or a file of --placement-out [default: contiguous]
    #[arg(long, value_name = "HOW")]
    pub placement: Option<String>,
    /// Write the placement, JSON
    #[arg(long, value_name = "FILE")]
    pub placement_out: Option<PathBuf>,
    /// Experts of a layer that a cache has room for
    #[arg(long, value_name = "N")]
    pub cache: Option<usize>,
    /// Run the texts through the model with the new choices, and tell the loss
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Shared flags.
    #[command(flatten)]
    pub common: Common,
}

/// `--drop`.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum DropArg {
    /// The last: all first choices come before any second, then tokens in their order.
    Position,
    /// The last tokens, whatever choice of theirs it was.
    Token,
    /// As position, with tokens in the order of their greatest weights.
    Priority,
    /// Those of the least weights.
    Gate,
    /// By lot.
    Random,
}

impl From<DropArg> for senmon_insight::replay::Drop {
    fn from(drop: DropArg) -> Self {
        match drop {
            DropArg::Position => Self::Position,
            DropArg::Token => Self::Token,
            DropArg::Priority => Self::Priority,
            DropArg::Gate => Self::Gate,
            DropArg::Random => Self::Random,
        }
    }
}

/// How products with a model's weights are made.
#[derive(Clone, Debug, Default, Args)]
pub struct ComputeArgs {
    /// Code weights that are wider to this type when they are loaded: q8_0, q6_k, q4_k, q4_0 or mxfp4
    #[arg(long, value_name = "TYPE", value_parser = coded_type)]
    pub quantize: Option<ElementType>,
    /// Multiply in f32 with weights as they are stored: slower; the reference, and for models larger than memory
    #[arg(long, conflicts_with = "quantize")]
    pub exact: bool,
}

/// A type that weights can be coded to at load.
fn coded_type(text: &str) -> Result<ElementType, String> {
    let types = ElementType::ALL.into_iter().filter(|ty| ty.block_len() > 1 && can_quantize(*ty));
    let found = ElementType::from_name(text).filter(|ty| types.clone().any(|one| one == *ty));
    found.ok_or_else(|| {
        let names: Vec<String> = types.map(|ty| ty.name().to_lowercase()).collect();
        format!("expected one of {}", names.join(", "))
    })
}
