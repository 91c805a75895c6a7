//! Prints the statistics of a trace as JSON, with the options of a JSON text if one is given:
//!
//!     cargo run --release -p senmon-insight --example statistics -- TRACE '{"ranks": [4], "shuffles": 10}'

use senmon_insight::{Trace, statistics};
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("expected the file of a trace")?;
    let options: statistics::Options = serde_json::from_str(&args.next().unwrap_or("{}".into()))?;
    let found = statistics::of(&Trace::read(Path::new(&path))?, &options)?;
    println!("{}", serde_json::json!({ "options": options, "statistics": found }));
    Ok(())
}
