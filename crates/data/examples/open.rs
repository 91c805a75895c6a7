//! Opens a data set, tells what was found, and times it: `cargo run --release -p senmon-data --example open -- CACHE PATH…`

use std::path::PathBuf;
use std::time::Instant;

use senmon_data::{DataConfig, Dataset, Silent};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let cache = PathBuf::from(arguments.next().ok_or("usage: open CACHE PATH…")?);
    let config = DataConfig { paths: arguments.map(PathBuf::from).collect(), ..DataConfig::default() };
    let start = Instant::now();
    let data = Dataset::open(&config, &cache, &Silent)?;
    println!("{}\nopened in {:.2} s, key {}", data.report(), start.elapsed().as_secs_f64(), data.key());
    let start = Instant::now();
    let held_out = data.held_out(256, Some(200_000))?;
    println!("{} held-out windows in {:.2} s", held_out.len(), start.elapsed().as_secs_f64());
    for index in [0, 1, 1000] {
        let start = Instant::now();
        let batch = data.batch(index, 16, 256, 0)?;
        println!("batch {index}: {} tokens in {:.4} s", batch.tokens.len(), start.elapsed().as_secs_f64());
    }
    Ok(())
}
