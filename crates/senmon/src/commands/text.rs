//! Texts made token by token: what `generate`, `chat` and the end of `train` share.

use crate::cli::TextArgs;
use crate::failure::{Failure, Result};
use crate::ui::INTERRUPTED;
use senmon_models::ModelError;
use senmon_models::decoder::{Decoder, Pass};
use senmon_models::penalties::{Penalties, log_probabilities};
use senmon_models::sampling::Sampling;
use senmon_models::spec::{FfnSpec, ModelSpec};
use senmon_models::text::{TextStream, Tokenizer, TokenizerSource, check_vocab, encode_prompt};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// How a generation ends that Ctrl-C ended.
pub(super) const INTERRUPTED_FINISH: &str = "interrupted";

/// What came of a generation.
pub(super) struct Generated {
    pub text: String,
    pub tokens: Vec<u32>,
    /// Of each token: its log-probability, and the likeliest tokens with theirs.
    pub logprobs: Vec<(f64, Vec<(u32, f64)>)>,
    pub prompt_tokens: usize,
    pub finish: &'static str,
    pub prefill_seconds: f64,
    pub decode_seconds: f64,
}

/// Continues `prompt` by up to `max_tokens`; `show` gets the prompt, and then the text as soon as it is certain.
pub(super) fn generate(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    prompt: &str,
    max_tokens: usize,
    sampling: &Sampling,
    penalties: &Penalties,
    logprobs: Option<usize>,
    stops: &[String],
    show: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Generated> {
    sampling.validate()?;
    let spec = decoder.spec();
    let mut prompt_tokens = encode_prompt(tokenizer, prompt)?;
    if prompt_tokens.is_empty() {
        // A model begins a text after what ends one.
        prompt_tokens.extend(spec.tokens.bos.or(spec.tokens.eos.first().copied()).or(Some(0)));
    }
    if prompt_tokens.len() >= spec.max_positions {
        return Err(Failure::mistake(format!(
            "the prompt has {} tokens, the model's context {}",
            prompt_tokens.len(),
            spec.max_positions
        )));
    }
    show(prompt)?;
    let context = prompt_tokens.len().saturating_add(max_tokens).min(spec.max_positions);
    let mut cache = decoder.cache(context)?;
    let room = spec.max_positions - prompt_tokens.len();
    let limits = Limits { max_tokens, logprobs, room, eos: &spec.tokens.eos, stops };
    go_on(tokenizer, (&prompt_tokens, &prompt_tokens), &limits, sampling, penalties, show, &mut |tokens| {
        Ok(decoder.logits(tokens, &mut cache, true, &mut Pass::default())?)
    })
}

/// Tokens of a prompt that pass through the model at once.
const PREFILL: usize = 512;

/// When a text ends, and what is wanted of it.
pub(super) struct Limits<'a> {
    pub max_tokens: usize,
    /// The log-probabilities of so many of the likeliest tokens are wanted at each place.
    pub logprobs: Option<usize>,
    /// Tokens that the context has room for.
    pub room: usize,
    pub eos: &'a [u32],
    pub stops: &'a [String],
}

/// Goes on after `first`, token by token (`prompt` is what penalties look at besides); `step` gives the logits of the last of the tokens it is given, which follow those of
/// before.
pub(super) fn go_on(
    tokenizer: &Tokenizer,
    (first, prompt): (&[u32], &[u32]),
    limits: &Limits,
    sampling: &Sampling,
    penalties: &Penalties,
    show: &mut dyn FnMut(&str) -> Result<()>,
    step: &mut dyn FnMut(&[u32]) -> Result<Vec<f32>>,
) -> Result<Generated> {
    let started = Instant::now();
    // A long prompt in parts: what a pass holds in memory grows with its tokens.
    let mut logits = Vec::new();
    for part in first.chunks(PREFILL) {
        logits = step(part)?;
    }
    let prefill_seconds = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let mut stream = TextStream::new(tokenizer, limits.stops);
    let (mut text, mut tokens, mut finish) = (String::new(), Vec::new(), "length");
    let mut logprobs = Vec::new();
    while tokens.len() < limits.max_tokens {
        if INTERRUPTED.load(Ordering::Relaxed) {
            finish = INTERRUPTED_FINISH;
            break;
        }
        let raw = limits.logprobs.map(|_| logits.clone());
        penalties.apply(&mut logits, prompt, &tokens);
        let Some(token) = sampling.pick(&logits, tokens.len() as u64) else {
            return Err(Failure::other("the model's logits are not numbers"));
        };
        if let (Some(most), Some(raw)) = (limits.logprobs, raw) {
            logprobs.push(log_probabilities(&raw, token, most));
        }
        if limits.eos.contains(&token) {
            logprobs.truncate(tokens.len());
            finish = "end of text";
            break;
        }
        tokens.push(token);
        let new = stream.push(token)?;
        show(&new)?;
        text.push_str(&new);
        if stream.stopped() {
            finish = "stop";
            break;
        }
        if tokens.len() > limits.room {
            finish = "context full";
            break;
        }
        if tokens.len() < limits.max_tokens {
            logits = step(&[token])?;
        }
    }
    let rest = stream.finish()?;
    show(&rest)?;
    text.push_str(&rest);
    let decode_seconds = started.elapsed().as_secs_f64();
    Ok(Generated {
        text,
        tokens,
        logprobs,
        prompt_tokens: first.len(),
        finish,
        prefill_seconds,
        decode_seconds,
    })
}

pub(super) fn sampling(args: &TextArgs) -> Sampling {
    Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        seed: args.seed,
    }
}

/// Penalties and biases, checked for a vocabulary of `vocab`.
pub(super) fn penalties(args: &TextArgs, vocab: usize) -> Result<Penalties> {
    let penalties = Penalties {
        repetition: args.repetition_penalty,
        presence: args.presence_penalty,
        frequency: args.frequency_penalty,
        bias: args.logit_bias.iter().copied().collect(),
    };
    penalties.validate(vocab)?;
    Ok(penalties)
}

pub(super) fn tokenizer_of(args: &TextArgs, found: Option<TokenizerSource>) -> Result<TokenizerSource> {
    Ok(found.ok_or_else(|| ModelError::File {
        path: args.from.model.clone(),
        what: "has no tokenizer: text cannot be made of its tokens".into(),
    })?)
}

/// The decoder in a folder, with what the options change of it, and its tokenizer.
pub(super) fn open_decoder(args: &TextArgs) -> Result<(Decoder, Tokenizer)> {
    let mut loaded = args.from.open()?;
    if let Some(k) = args.experts_per_token {
        loaded.spec = with_experts_per_token(loaded.spec, k)?;
    }
    // Chat models often say only beside the model what ends a turn.
    for eos in &loaded.generation.eos {
        if !loaded.spec.tokens.eos.contains(eos) {
            loaded.spec.tokens.eos.push(*eos);
        }
    }
    let source = tokenizer_of(args, loaded.tokenizer)?;
    let tokenizer = source.load()?;
    check_vocab(&tokenizer, &loaded.spec, source.path())?;
    Ok((Decoder::run(&loaded.spec, loaded.weights)?, tokenizer))
}

/// The model with another number of experts for each token.
fn with_experts_per_token(mut spec: ModelSpec, k: usize) -> Result<ModelSpec> {
    let mut found = false;
    for layer in &mut spec.layers {
        let FfnSpec::Moe(moe) = layer else { continue };
        found = true;
        if k == 0 || k > moe.experts {
            let experts = moe.experts;
            return Err(Failure::mistake(format!(
                "--experts-per-token {k} must be from 1 to the model's {experts} experts"
            )));
        }
        moe.top_k = k;
    }
    if !found {
        return Err(Failure::mistake(format!("--experts-per-token {k}: the model has no experts")));
    }
    spec.validate()?;
    Ok(spec)
}
