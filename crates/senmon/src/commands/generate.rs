//! `generate`: a text continued, as it comes.

use super::{print, print_json};
use crate::cli::GenerateArgs;
use crate::failure::{Failure, Result};
use crate::ui::INTERRUPTED;
use senmon_models::ModelError;
use senmon_models::decoder::{Decoder, Pass};
use senmon_models::sampling::Sampling;
use senmon_models::spec::{FfnSpec, ModelSpec};
use senmon_models::text::{TextStream, Tokenizer, check_vocab, encode, load_tokenizer};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// How a generation ends that Ctrl-C ended.
const INTERRUPTED_FINISH: &str = "interrupted";

/// What came of a generation.
pub(super) struct Generated {
    pub text: String,
    pub tokens: Vec<u32>,
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
    stops: &[String],
    show: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Generated> {
    sampling.validate()?;
    let spec = decoder.spec();
    let mut prompt_tokens = encode(tokenizer, prompt)?;
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
    let started = Instant::now();
    let mut logits = decoder.logits(&prompt_tokens, &mut cache, true, &mut Pass::default())?;
    let prefill_seconds = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let mut stream = TextStream::new(tokenizer, stops);
    let (mut text, mut tokens, mut finish) = (String::new(), Vec::new(), "length");
    while tokens.len() < max_tokens {
        if INTERRUPTED.load(Ordering::Relaxed) {
            finish = INTERRUPTED_FINISH;
            break;
        }
        let Some(token) = sampling.pick(&logits, tokens.len() as u64) else {
            return Err(Failure::other("the model's logits are not numbers"));
        };
        if spec.tokens.eos.contains(&token) {
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
        if cache.len() >= spec.max_positions {
            finish = "context full";
            break;
        }
        if tokens.len() < max_tokens {
            logits = decoder.logits(&[token], &mut cache, true, &mut Pass::default())?;
        }
    }
    let rest = stream.finish()?;
    show(&rest)?;
    text.push_str(&rest);
    let (prompt_tokens, decode_seconds) = (prompt_tokens.len(), started.elapsed().as_secs_f64());
    Ok(Generated { text, tokens, prompt_tokens, finish, prefill_seconds, decode_seconds })
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

pub(super) fn run(args: GenerateArgs) -> Result<()> {
    let mut loaded = args.from.open()?;
    if let Some(k) = args.experts_per_token {
        loaded.spec = with_experts_per_token(loaded.spec, k)?;
    }
    let path = loaded.tokenizer.clone().ok_or_else(|| ModelError::File {
        path: args.from.model.clone(),
        what: "has no tokenizer.json: text cannot be made of its tokens".into(),
    })?;
    let tokenizer = load_tokenizer(&path)?;
    check_vocab(&tokenizer, &loaded.spec, &path)?;
    let decoder = Decoder::run(&loaded.spec, loaded.weights)?;
    let sampling =
        Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    crate::ui::catch_interrupts();
    let json = args.common.json;
    let mut show = |text: &str| if json || text.is_empty() { Ok(()) } else { print(text) };
    let done =
        generate(&decoder, &tokenizer, &args.prompt, args.max_tokens, &sampling, &args.stop, &mut show)?;
    let speed = |n: usize, seconds: f64| n as f64 / seconds.max(1e-9);
    let (prefill, decode) =
        (speed(done.prompt_tokens, done.prefill_seconds), speed(done.tokens.len(), done.decode_seconds));
    if json {
        return print_json(&serde_json::json!({
            "prompt": args.prompt,
            "text": done.text,
            "tokens": done.tokens,
            "finish": done.finish,
            "prompt_tokens": done.prompt_tokens,
            "prefill_tokens_per_second": prefill,
            "decode_tokens_per_second": decode,
        }));
    }
    print("\n")?;
    if !args.common.quiet {
        let (n, why) = (done.tokens.len(), done.finish);
        eprintln!(
            "[{n} tokens, {decode:.0} tokens/s; prompt of {} tokens, {prefill:.0} tokens/s; ended by {why}]",
            done.prompt_tokens
        );
    }
    if done.finish == INTERRUPTED_FINISH {
        return Err(Failure::interrupted("interrupted"));
    }
    Ok(())
}
