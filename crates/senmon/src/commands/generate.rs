//! `generate`: texts continued, as they come.

use super::options::{Choice, open_decoder, tokenizer_of};
use super::routing::{self, Routers, Shown};
use super::text::{Generated, INTERRUPTED_FINISH, Manner, News, Text, continue_all, make};
use super::{print, print_json, prompts};
use crate::cli::GenerateArgs;
use crate::failure::{Failure, Result};
use senmon_models::audit::Audit;
use senmon_models::seq2seq::{self, DecoderCache, Encoded};
use senmon_models::text::{Tokenizer, encode};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// What was made, how, and what the routers did.
struct Made {
    done: Vec<Generated>,
    choice: Choice,
    routing: Option<Shown>,
    /// Sequences of a trace for each text.
    sequences: u32,
}

/// Where news of texts goes.
type Tell<'a> = &'a mut dyn FnMut(usize, News) -> Result<()>;

/// How texts are made.
fn manner<'a>(
    args: &'a GenerateArgs,
    choice: &Choice,
    tokenizer: &'a Tokenizer,
    eos: &'a [u32],
) -> Manner<'a> {
    Manner {
        tokenizer,
        sampling: choice.sampling.clone(),
        penalties: choice.penalties.clone(),
        max_tokens: args.options.max_tokens,
        logprobs: args.logprobs,
        eos,
        stops: &args.options.stop,
    }
}

/// Texts of an encoder-decoder for the prompts.
fn of_encoder_decoder(args: &GenerateArgs, prompts: &[String], tell: Tell) -> Result<Made> {
    let options = &args.options;
    if options.experts_per_token.is_some() {
        return Err(Failure::mistake(
            "--experts-per-token: an encoder-decoder has one expert for each token",
        ));
    }
    let opened = seq2seq::open(&options.from.model, options.from.audit_or(Audit::Once))?;
    let (model, spec) = (&opened.model, opened.model.spec());
    let choice = Choice::new(options, &opened.generation, spec.vocab)?;
    let tokenizer = tokenizer_of(options, opened.tokenizer)?.load()?;
    let routers = Routers::of_encoder_decoder(spec);
    let mut recorder = routing::recorder(&args.routing, &routers)?;
    let manner = manner(args, &choice, &tokenizer, &spec.tokens.eos);
    let start = vec![spec.start];
    let first = if args.decoder_tokens.is_empty() { &start } else { &args.decoder_tokens };
    let mut encoder_tokens = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let mut tokens = encode(&tokenizer, prompt)?;
        // What is encoded ends.
        if let Some(eos) = spec.tokens.eos.first().filter(|eos| tokens.last() != Some(eos)) {
            tokens.push(*eos);
        }
        encoder_tokens.push(tokens);
    }
    let text = |tokens: &Vec<u32>| Text::new(&manner, first.clone(), tokens.clone(), usize::MAX);
    let mut texts: Vec<Text> = encoder_tokens.iter().map(text).collect();
    let mut states: BTreeMap<usize, (Encoded, DecoderCache)> = BTreeMap::new();
    make(&mut texts, args.batch, tell, &mut |turns| {
        states.retain(|n, _| turns.iter().any(|turn| turn.text == *n));
        let mut all = Vec::with_capacity(turns.len());
        for turn in turns {
            // The encoder's tokens are one sequence of a trace, the decoder's the next.
            let sequence = 2 * turn.text as u32;
            let (encoded, cache) = match states.entry(turn.text) {
                Entry::Occupied(state) => state.into_mut(),
                Entry::Vacant(state) => {
                    let tokens = &encoder_tokens[turn.text];
                    let observer = routing::watch(&mut recorder, sequence, tokens);
                    state.insert((model.encode(tokens, observer)?, model.cache()))
                }
            };
            let last_only = recorder.is_none();
            let observer = routing::watch(&mut recorder, sequence + 1, turn.tokens);
            let mut logits = model.logits(turn.tokens, encoded, cache, last_only, observer)?;
            if let Some(recorder) = &mut recorder {
                recorder.predicted(sequence + 1, &logits);
            }
            all.push(logits.split_off(logits.len() - spec.vocab));
        }
        Ok(all)
    })?;
    let done: Vec<Generated> = texts.into_iter().map(Text::into_done).collect();
    if let Some(recorder) = &mut recorder {
        for (n, done) in done.iter().enumerate() {
            done.last.iter().for_each(|token| recorder.follows(2 * n as u32 + 1, *token));
        }
    }
    let (folder, in_json) = (&options.from.model, args.common.json);
    let routing = routing::finish(&args.routing, recorder, &routers, folder, Some(&tokenizer), in_json)?;
    Ok(Made { done, choice, routing, sequences: 2 })
}

/// Texts of a decoder after the prompts.
fn of_decoder(args: &GenerateArgs, prompts: &[String], tell: Tell) -> Result<Made> {
    if !args.decoder_tokens.is_empty() {
        return Err(Failure::mistake("--decoder-tokens is for encoder-decoders; the model is a decoder"));
    }
    let options = &args.options;
    let (decoder, tokenizer, choice) = open_decoder(options)?;
    let routers = Routers::of_decoder(decoder.spec());
    let mut recorder = routing::recorder(&args.routing, &routers)?;
    let manner = manner(args, &choice, &tokenizer, &decoder.spec().tokens.eos);
    let done = continue_all(&decoder, &manner, prompts, args.batch, recorder.as_mut(), tell)?;
    let (folder, in_json) = (&options.from.model, args.common.json);
    let routing = routing::finish(&args.routing, recorder, &routers, folder, Some(&tokenizer), in_json)?;
    Ok(Made { done, choice, routing, sequences: 1 })
}

pub(super) fn run(args: GenerateArgs) -> Result<()> {
    crate::ui::catch_interrupts();
    if args.batch == 0 {
        return Err(Failure::mistake("--batch 0 must be at least 1"));
    }
    let mut prompts = args.prompt.clone();
    if let Some(path) = &args.prompts {
        prompts.extend(prompts::of_file(path)?);
    }
    if prompts.is_empty() {
        prompts.push(String::new());
    }
    // A file is answered by a list, however long.
    let (count, list) = (prompts.len(), prompts.len() > 1 || args.prompts.is_some());
    let (json, quiet) = (args.common.json, args.common.quiet);
    // The texts of a list come whole, in order: what ends before its turn waits.
    let (mut waiting, mut next): (BTreeMap<usize, String>, usize) = (BTreeMap::new(), 0);
    let mut ended = vec![false; count];
    let mut tell = |n: usize, news: News| -> Result<()> {
        match news {
            _ if json => {}
            News::More(text) if !list => {
                if !text.is_empty() {
                    print(text)?;
                }
            }
            News::More(text) => waiting.entry(n).or_default().push_str(text),
            News::End => ended[n] = true,
        }
        while list && ended.get(next) == Some(&true) {
            if !quiet {
                eprintln!("[prompt {} of {count}]", next + 1);
            }
            print(&format!("{}\n", waiting.remove(&next).unwrap_or_default()))?;
            next += 1;
        }
        Ok(())
    };
    let made = match seq2seq::family_of(&args.options.from.model)? {
        Some(_) => of_encoder_decoder(&args, &prompts, &mut tell)?,
        None => of_decoder(&args, &prompts, &mut tell)?,
    };
    if json {
        let mut all: Vec<Value> = (0..count).map(|n| document(&args, &prompts[n], &made, n)).collect();
        return match (list, all.pop()) {
            (false, Some(one)) => print_json(&one),
            (_, last) => {
                all.extend(last);
                print_json(&all)
            }
        };
    }
    if !list {
        print("\n")?;
    }
    if let Some(table) = made.routing.as_ref().and_then(|shown| shown.table.as_ref()) {
        eprint!("{table}");
    }
    if !quiet {
        eprintln!("{}", ending(&made));
    }
    if made.done.iter().any(|done| done.finish == INTERRUPTED_FINISH) {
        return Err(Failure::interrupted("interrupted"));
    }
    Ok(())
}

/// The line at the end.
fn ending(made: &Made) -> String {
    let words = made.choice.words();
    let tokens = |of: &dyn Fn(&Generated) -> usize| made.done.iter().map(of).sum::<usize>();
    let (prompt, n) = (tokens(&|done| done.prompt_tokens), tokens(&|done| done.tokens.len()));
    match made.done.as_slice() {
        [done] => {
            let (prefill, decode) = speeds(done);
            let why = done.finish;
            format!(
                "[{n} tokens, {decode:.0} tokens/s; prompt of {prompt} tokens, {prefill:.0} tokens/s; ended by {why}; \
                 {words}]"
            )
        }
        all => format!("[{n} tokens after {} prompts of {prompt} tokens; {words}]", all.len()),
    }
}

/// Tokens per second of the prompt and of the text.
fn speeds(done: &Generated) -> (f64, f64) {
    let speed = |n: usize, seconds: f64| n as f64 / seconds.max(1e-9);
    (speed(done.prompt_tokens, done.prefill_seconds), speed(done.tokens.len(), done.decode_seconds))
}

/// One text, for a program.
fn document(args: &GenerateArgs, prompt: &str, made: &Made, n: usize) -> Value {
    let (done, (prefill, decode)) = (&made.done[n], speeds(&made.done[n]));
    let likeliest = |list: &[(u32, f64)]| -> Vec<Value> {
        list.iter().map(|(token, p)| json!({ "token": token, "logprob": p })).collect()
    };
    let logprobs: Option<Vec<_>> = args.logprobs.map(|_| {
        let each = done.tokens.iter().zip(&done.logprobs);
        each.map(|(token, (p, top))| json!({ "token": token, "logprob": p, "top": likeliest(top) })).collect()
    });
    let mut document = json!({
        "logprobs": logprobs,
        "prompt": prompt,
        "text": done.text,
        "tokens": done.tokens,
        "finish": done.finish,
        "prompt_tokens": done.prompt_tokens,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "sampling": made.choice.json(),
    });
    if let Some(shown) = &made.routing {
        let first = n as u32 * made.sequences;
        document["routing"] = routing::document(&shown.trace, first..first + made.sequences);
    }
    document
}
