//! `logits`: the door for oracles.

use super::print_json;
use crate::cli::LogitsArgs;
use crate::failure::{Failure, Result};
use safetensors::tensor::{Dtype, TensorView};
use senmon_models::audit::Audit;
use senmon_models::decoder::{Decoder, Pass};
use senmon_models::{files, seq2seq};

pub(super) fn run(args: LogitsArgs) -> Result<()> {
    let of_decoder = seq2seq::family_of(&args.from.model)?.is_some();
    if !of_decoder && !args.decoder_tokens.is_empty() {
        return Err(Failure::mistake("--decoder-tokens is for encoder-decoders; the model is a decoder"));
    }
    let (logits, rows) =
        if of_decoder { of_encoder_decoder(&args)? } else { (decoder(&args)?, args.tokens.len()) };
    let vocab = logits.len() / rows.max(1);
    let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![rows, vocab], &bytes);
    let file = view.and_then(|view| safetensors::serialize([("logits", view)], None));
    let file = file.map_err(|e| Failure::other(e.to_string()))?;
    files::write_whole(&args.out, |w| w.write_all(&file))?;
    if args.common.json {
        print_json(&serde_json::json!({ "out": args.out, "shape": [rows, vocab] }))?;
    }
    Ok(())
}

/// Refuses a place for the result that cannot take it.
fn check_out(args: &LogitsArgs) -> Result<()> {
    match std::fs::metadata(&args.out) {
        Ok(found) if !found.is_file() => {
            Err(Failure::mistake(format!("{} is no file that can be replaced", args.out.display())))
        }
        _ => Ok(()),
    }
}

fn check_tokens(tokens: &[u32], vocab: usize) -> Result<()> {
    match tokens.iter().find(|token| **token as usize >= vocab) {
        Some(token) => {
            Err(Failure::mistake(format!("token {token} is not in the model's vocabulary of {vocab}")))
        }
        None => Ok(()),
    }
}

fn decoder(args: &LogitsArgs) -> Result<Vec<f32>> {
    let loaded = args.from.open()?;
    check_out(args)?;
    check_tokens(&args.tokens, loaded.spec.vocab)?;
    let (n, most) = (args.tokens.len(), loaded.spec.max_positions);
    if n > most {
        return Err(Failure::mistake(format!("{n} tokens are more than the {most} positions of the model")));
    }
    let decoder = Decoder::run(&loaded.spec, loaded.weights)?;
    let mut cache = decoder.cache(n)?;
    Ok(decoder.logits(&args.tokens, &mut cache, false, &mut Pass::default())?)
}

/// The logits of the decoder's tokens, and how many these are.
fn of_encoder_decoder(args: &LogitsArgs) -> Result<(Vec<f32>, usize)> {
    let model = seq2seq::open(&args.from.model, args.from.audit_or(Audit::Once))?.model;
    check_out(args)?;
    let start = [model.spec().start];
    let tokens = if args.decoder_tokens.is_empty() { &start[..] } else { &args.decoder_tokens };
    check_tokens(&args.tokens, model.spec().vocab)?;
    check_tokens(tokens, model.spec().vocab)?;
    let encoded = model.encode(&args.tokens, None)?;
    Ok((model.logits(tokens, &encoded, &mut model.cache(), false, None)?, tokens.len()))
}
