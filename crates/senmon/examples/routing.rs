//! Which experts does each token of a text go to? A model's routing, seen by an observer.
//!
//! MODEL is a folder in Hugging Face layout with a `tokenizer.json`: a run folder of `senmon train`, for example. A line a
//! token: its number, its text, and for each MoE layer its experts, the greatest weight first.
//!
//! ```text
//! cargo run --release -p senmon --example routing -- MODEL [TEXT]
//! ```

use senmon::models::checkpoint;
use senmon::models::decoder::{Decoder, Pass};
use senmon::models::text::{check_vocab, encode};
use senmon::moe::{Routing, RoutingObserver};
use std::path::PathBuf;

/// Keeps what the routers chose: the layer, K, and the experts \[T, K\].
#[derive(Default)]
struct Picks(Vec<(usize, usize, Vec<u32>)>);

impl RoutingObserver for Picks {
    fn routed(&mut self, layer: usize, routing: &Routing) {
        self.0.push((layer, routing.top_k, routing.experts.clone()));
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let model = PathBuf::from(arguments.next().ok_or("usage: routing MODEL [TEXT]")?);
    let text = arguments.next().unwrap_or_else(|| "fn main() { println!(\"{}\", 1 + 2); }".into());

    let loaded = checkpoint::load(&model)?;
    let source = loaded.tokenizer.ok_or("the model has no tokenizer.json")?;
    let tokenizer = source.load()?;
    check_vocab(&tokenizer, &loaded.spec, source.path())?;
    let tokens = encode(&tokenizer, &text)?;
    if tokens.is_empty() {
        return Err("the text has no tokens".into());
    }
    let decoder = Decoder::new(&loaded.spec, loaded.params, false)?;

    let mut picks = Picks::default();
    let mut pass = Pass { observer: Some(&mut picks), ..Pass::default() };
    decoder.logits(&tokens, &mut decoder.cache(tokens.len())?, true, &mut pass)?;
    if picks.0.is_empty() {
        return Err("the model is dense: no layer has a router".into());
    }

    print!("{:>5}  {:<16}", "token", "text");
    for (layer, ..) in &picks.0 {
        print!("  {:<12}", format!("layer {layer}"));
    }
    println!();
    for (t, &token) in tokens.iter().enumerate() {
        let text = tokenizer.decode(&[token], false).map_err(|e| e.to_string())?;
        print!("{t:>5}  {:<16}", format!("{text:?}"));
        for (_, top_k, experts) in &picks.0 {
            let chosen: Vec<String> = experts[t * top_k..][..*top_k].iter().map(u32::to_string).collect();
            print!("  {:<12}", chosen.join(" "));
        }
        println!();
    }
    Ok(())
}
