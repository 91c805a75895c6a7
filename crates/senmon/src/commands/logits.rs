//! `logits`: the door for oracles.

use super::routing::{self, Routers, Shown};
use super::{check_out, print_json};
use crate::cli::LogitsArgs;
use crate::failure::{Failure, Result};
use safetensors::tensor::{Dtype, TensorView};
use senmon_insight::Recorder;
use senmon_models::audit::Audit;
use senmon_models::decoder::{Decoder, Pass};
use senmon_models::packing::Packing;
use senmon_models::text::TokenizerSource;
use senmon_models::{files, seq2seq};

/// The logits, of how many tokens they are, and what the routers did.
struct Found {
    logits: Vec<f32>,
    rows: usize,
    routing: Option<Shown>,
    /// Sequences in the trace.
    sequences: u32,
}

pub(super) fn run(args: LogitsArgs) -> Result<()> {
    let of_decoder = seq2seq::family_of(&args.from.model)?.is_some();
    if !of_decoder && !args.decoder_tokens.is_empty() {
        return Err(Failure::mistake("--decoder-tokens is for encoder-decoders; the model is a decoder"));
    }
    let found = if of_decoder { of_encoder_decoder(&args)? } else { decoder(&args)? };
    let (rows, vocab) = (found.rows, found.logits.len() / found.rows.max(1));
    let bytes: Vec<u8> = found.logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![rows, vocab], &bytes);
    let file = view.and_then(|view| safetensors::serialize([("logits", view)], None));
    let file = file.map_err(|e| Failure::other(e.to_string()))?;
    files::write_whole(&args.out, |w| w.write_all(&file))?;
    if args.common.json {
        let mut document = serde_json::json!({ "out": args.out, "shape": [rows, vocab] });
        if let Some(shown) = &found.routing {
            document["routing"] = routing::document(&shown.trace, 0..found.sequences);
        }
        print_json(&document)?;
    }
    if let Some(table) = found.routing.and_then(|shown| shown.table) {
        eprint!("{table}");
    }
    Ok(())
}

fn check_tokens(tokens: &[u32], vocab: usize) -> Result<()> {
    match tokens.iter().find(|token| **token as usize >= vocab) {
        Some(token) => {
            Err(Failure::mistake(format!("token {token} is not in the model's vocabulary of {vocab}")))
        }
        None => Ok(()),
    }
}

/// What was recorded; with the texts of tokens, where there is a tokenizer.
fn finish(
    args: &LogitsArgs,
    recorder: Option<Recorder>,
    routers: &Routers,
    tokenizer: Option<TokenizerSource>,
) -> Result<Option<Shown>> {
    let tokenizer = tokenizer.filter(|_| recorder.is_some()).map(|from| from.load()).transpose()?;
    let (folder, in_json) = (&args.from.model, args.common.json);
    routing::finish(&args.routing, recorder, routers, folder, tokenizer.as_ref(), in_json)
}

fn decoder(args: &LogitsArgs) -> Result<Found> {
    let loaded = args.from.open()?;
    check_out(&args.out)?;
    check_tokens(&args.tokens, loaded.spec.vocab)?;
    let (n, most) = (args.tokens.len(), loaded.spec.max_positions);
    if n > most {
        return Err(Failure::mistake(format!("{n} tokens are more than the {most} positions of the model")));
    }
    let routers = Routers::of_decoder(&loaded.spec);
    let mut recorder = routing::recorder(&args.routing, &routers)?;
    let packing = if args.packed { Packing::Packed } else { Packing::Exact };
    let decoder = Decoder::run_as(&loaded.spec, loaded.weights, packing)?;
    let mut cache = decoder.cache(n)?;
    let mut pass = Pass { observer: routing::watch(&mut recorder, 0, &args.tokens), ..Pass::default() };
    let logits = decoder.logits(&args.tokens, &mut cache, false, &mut pass)?;
    recorder.iter_mut().for_each(|recorder| recorder.predicted(0, &logits));
    let routing = finish(args, recorder, &routers, loaded.tokenizer)?;
    Ok(Found { logits, rows: n, routing, sequences: 1 })
}

fn of_encoder_decoder(args: &LogitsArgs) -> Result<Found> {
    if args.packed {
        return Err(Failure::mistake("--packed: encoder-decoders multiply in f32"));
    }
    let opened = seq2seq::open(&args.from.model, args.from.audit_or(Audit::Once))?;
    let (model, spec) = (&opened.model, opened.model.spec());
    check_out(&args.out)?;
    let start = [spec.start];
    let tokens = if args.decoder_tokens.is_empty() { &start[..] } else { &args.decoder_tokens };
    check_tokens(&args.tokens, spec.vocab)?;
    check_tokens(tokens, spec.vocab)?;
    let routers = Routers::of_encoder_decoder(spec);
    let mut recorder = routing::recorder(&args.routing, &routers)?;
    let encoded = model.encode(&args.tokens, routing::watch(&mut recorder, 0, &args.tokens))?;
    let observer = routing::watch(&mut recorder, 1, tokens);
    let logits = model.logits(tokens, &encoded, &mut model.cache(), false, observer)?;
    recorder.iter_mut().for_each(|recorder| recorder.predicted(1, &logits));
    let routing = finish(args, recorder, &routers, opened.tokenizer)?;
    Ok(Found { logits, rows: tokens.len(), routing, sequences: 2 })
}
