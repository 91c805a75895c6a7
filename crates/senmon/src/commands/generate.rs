//! `generate`: a text continued, as it comes.

use super::text::{
    Generated, INTERRUPTED_FINISH, Limits, generate, go_on, open_decoder, penalties, sampling, tokenizer_of,
};
use super::{print, print_json};
use crate::cli::GenerateArgs;
use crate::failure::{Failure, Result};
use senmon_models::audit::Audit;
use senmon_models::seq2seq;
use senmon_models::text::encode;

/// A text of an encoder-decoder for the prompt.
fn of_encoder_decoder(args: &GenerateArgs, show: &mut dyn FnMut(&str) -> Result<()>) -> Result<Generated> {
    let options = &args.options;
    if options.experts_per_token.is_some() {
        return Err(Failure::mistake(
            "--experts-per-token: an encoder-decoder has one expert for each token",
        ));
    }
    let sampling = sampling(options);
    sampling.validate()?;
    let opened = seq2seq::open(&options.from.model, options.from.audit_or(Audit::Once))?;
    let tokenizer = tokenizer_of(options, opened.tokenizer)?.load()?;
    let (model, spec) = (&opened.model, opened.model.spec());
    let mut prompt = encode(&tokenizer, &args.prompt)?;
    // What is encoded ends.
    if let Some(eos) = spec.tokens.eos.first().filter(|eos| prompt.last() != Some(eos)) {
        prompt.push(*eos);
    }
    let start = [spec.start];
    let first = if args.decoder_tokens.is_empty() { &start[..] } else { &args.decoder_tokens };
    let (encoded, mut cache) = (model.encode(&prompt, None)?, model.cache());
    let limits = Limits {
        max_tokens: options.max_tokens,
        logprobs: args.logprobs,
        room: usize::MAX,
        eos: &spec.tokens.eos,
        stops: &options.stop,
    };
    let penalties = penalties(options, spec.vocab)?;
    go_on(&tokenizer, (first, &prompt), &limits, &sampling, &penalties, show, &mut |tokens| {
        Ok(model.logits(tokens, &encoded, &mut cache, true, None)?)
    })
}

/// A text of a decoder after the prompt.
fn of_decoder(args: &GenerateArgs, show: &mut dyn FnMut(&str) -> Result<()>) -> Result<Generated> {
    if !args.decoder_tokens.is_empty() {
        return Err(Failure::mistake("--decoder-tokens is for encoder-decoders; the model is a decoder"));
    }
    let options = &args.options;
    let (decoder, tokenizer) = open_decoder(options)?;
    let (sampling, penalties) = (sampling(options), penalties(options, decoder.spec().vocab)?);
    let (most, prompt, stops) = (options.max_tokens, &args.prompt, &options.stop);
    generate(&decoder, &tokenizer, prompt, most, &sampling, &penalties, args.logprobs, stops, show)
}

pub(super) fn run(args: GenerateArgs) -> Result<()> {
    crate::ui::catch_interrupts();
    let json = args.common.json;
    let mut show = |text: &str| if json || text.is_empty() { Ok(()) } else { print(text) };
    let done = match seq2seq::family_of(&args.options.from.model)? {
        Some(_) => of_encoder_decoder(&args, &mut show)?,
        None => of_decoder(&args, &mut show)?,
    };
    let speed = |n: usize, seconds: f64| n as f64 / seconds.max(1e-9);
    let (prefill, decode) =
        (speed(done.prompt_tokens, done.prefill_seconds), speed(done.tokens.len(), done.decode_seconds));
    if json {
        let likeliest = |list: &[(u32, f64)]| -> Vec<serde_json::Value> {
            list.iter().map(|(token, p)| serde_json::json!({ "token": token, "logprob": p })).collect()
        };
        let logprobs: Option<Vec<_>> = args.logprobs.map(|_| {
            let each = done.tokens.iter().zip(&done.logprobs);
            each.map(|(token, (p, top))| {
                serde_json::json!({ "token": token, "logprob": p, "top": likeliest(top) })
            })
            .collect()
        });
        return print_json(&serde_json::json!({
            "logprobs": logprobs,
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
