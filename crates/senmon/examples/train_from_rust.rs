//! Training from Rust: a configuration, a run, an observer of one's own, and text from the model that came of it.
//!
//! Trains a tiny model on the files and folders that are given (without any, on the source code of Senmon's crates) for
//! about half a minute, in a folder that is removed at the end.
//!
//! ```text
//! cargo run --release -p senmon --example train_from_rust -- [PATH...]
//! ```

use senmon::data::Silent;
use senmon::models::decoder::{Decoder, Pass};
use senmon::models::sampling::Sampling;
use senmon::models::text::{TextStream, Tokenizer, encode};
use senmon::train::observer::{EvalRecord, Observer, StepRecord};
use senmon::train::setup::{self, Setup};
use senmon::train::{Layers, Result};
use std::sync::atomic::AtomicBool;

/// Prints every 20th step, and evaluations. The trainer itself prints nothing.
struct Printer;

impl Observer for Printer {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        if record.step.is_multiple_of(20) {
            let cv = record.layers.iter().map(|layer| layer.load_cv).fold(0.0, f64::max);
            println!(
                "step {:>3}: loss {:.3}, {:.0} tokens/s, greatest load CV {cv:.2}",
                record.step, record.loss, record.tokens_per_second
            );
        }
        Ok(())
    }

    fn evaluated(&mut self, record: &EvalRecord) -> Result<()> {
        println!("held out: loss {:.3}, {:.3} bits per byte", record.eval_loss, record.bits_per_byte);
        Ok(())
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut paths: Vec<String> = std::env::args().skip(1).collect();
    if paths.is_empty() {
        paths.push(concat!(env!("CARGO_MANIFEST_DIR"), "/..").into());
    }
    // As from a preset, a file and `--set`: what is left unsaid follows from what is said.
    let layers = Layers::new()
        .preset("nano")
        .set("model.layers=2")?
        .set("data.vocab=1024")?
        .set("train.batch=8")?
        .set("train.sequence=128")?
        .set("train.steps=200")?
        .set_value("data.paths", paths)?;
    let config = setup::configure(layers)?;

    // The text is found, split, tokenized; the model drawn; a first checkpoint written.
    let folder = tempfile::tempdir()?;
    let (out, cache) = (folder.path().join("run"), folder.path().join("cache"));
    let Setup { mut trainer, tokenizer, report, notes } = setup::create(config, &out, &cache, &Silent)?;
    if let Some(report) = report {
        println!("{report}");
    }
    for note in notes {
        println!("note: {note}");
    }

    // All work runs on the rayon pool of the caller: here the global one, a thread for each core.
    let interrupted = AtomicBool::new(false);
    let summary = trainer.run(&mut Printer, &interrupted)?;
    println!("{} steps, {} tokens, {:.0} s", summary.steps, summary.tokens, summary.seconds);

    let tokenizer = tokenizer.ok_or("a run on text has a tokenizer")?;
    let prompt = "pub fn ";
    println!("\n{prompt}{}", generate(&trainer.decoder, tokenizer.inner(), prompt, 60)?);
    Ok(())
}

/// Up to `count` tokens after `prompt`, one at a time over a cache of keys and values.
fn generate(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    prompt: &str,
    count: usize,
) -> senmon::models::Result<String> {
    let sampling = Sampling { temperature: 0.7, ..Sampling::default() };
    let mut stream = TextStream::new(tokenizer, &[]);
    let mut text = String::new();
    let mut next = encode(tokenizer, prompt)?;
    let mut cache = decoder.cache(next.len() + count)?;
    for index in 0..count as u64 {
        let logits = decoder.logits(&next, &mut cache, true, &mut Pass::default())?; // [1, V]: of the last token
        let Some(token) = sampling.pick(&logits, index) else { break };
        if decoder.spec().tokens.eos.contains(&token) {
            break;
        }
        text.push_str(&stream.push(token)?);
        next = vec![token];
    }
    text.push_str(&stream.finish()?);
    Ok(text)
}
