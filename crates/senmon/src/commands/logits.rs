//! `logits`: the door for oracles.

use super::print_json;
use crate::cli::LogitsArgs;
use crate::failure::{Failure, Result};
use safetensors::tensor::{Dtype, TensorView};
use senmon_models::decoder::{Decoder, Pass};
use senmon_models::files;

pub(super) fn run(args: LogitsArgs) -> Result<()> {
    let loaded = args.from.open()?;
    if std::fs::metadata(&args.out).is_ok_and(|found| !found.is_file()) {
        return Err(Failure::mistake(format!("{} is no file that can be replaced", args.out.display())));
    }
    let vocab = loaded.spec.vocab;
    if let Some(token) = args.tokens.iter().find(|token| **token as usize >= vocab) {
        return Err(Failure::mistake(format!("token {token} is not in the model's vocabulary of {vocab}")));
    }
    let most = loaded.spec.max_positions;
    if args.tokens.len() > most {
        let n = args.tokens.len();
        return Err(Failure::mistake(format!("{n} tokens are more than the {most} positions of the model")));
    }
    let decoder = Decoder::run(&loaded.spec, loaded.weights)?;
    let mut cache = decoder.cache(args.tokens.len())?;
    let logits = decoder.logits(&args.tokens, &mut cache, false, &mut Pass::default())?;
    let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![args.tokens.len(), vocab], &bytes);
    let file = view.and_then(|view| safetensors::serialize([("logits", view)], None));
    let file = file.map_err(|e| Failure::other(e.to_string()))?;
    files::write_whole(&args.out, |w| w.write_all(&file))?;
    if args.common.json {
        print_json(&serde_json::json!({ "out": args.out, "shape": [args.tokens.len(), vocab] }))?;
    }
    Ok(())
}
