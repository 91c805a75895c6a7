//! Fuzzing as tests, on the stable toolchain: damaged inputs for what reads files.
//!
//! A target is a function that must neither panic nor take long, whatever the bytes. It returns a word for
//! what came of them, say an error without its numbers; an input with a new word is kept and damaged further,
//! which stands in for the coverage that an instrumented build would measure.
//!
//! Without environment variables a fixed number of inputs is tried, always the same. `SENMON_FUZZ_SECONDS`
//! tries for so long instead, from a seed that is printed; `SENMON_FUZZ_SEED` sets it. An input that fails is
//! written to a file whose path is in the panic; put into `regressions/TARGET` it is tried first from then
//! on.

mod json;

pub use json::Documents;

use std::collections::HashSet;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Inputs that are kept at most: the seeds, and what brought new words.
const MAX_KEPT: usize = 4096;

/// Bytes of an input at most, unless a seed has more.
const MAX_LEN: usize = 64 << 10;

/// No input may take longer, on a machine that has other things to do too: each is at most some 64 KiB.
const MAX_TIME: Duration = Duration::from_secs(5);

/// Tries `target` on the files of `regressions/NAME`, on `seeds`, then on what becomes of these: `inputs` of
/// them, or as many as `SENMON_FUZZ_SECONDS` has time for. Panics at the first input that fails.
pub fn fuzz(name: &str, seeds: &[Vec<u8>], inputs: usize, target: impl Fn(&[u8]) -> String) {
    let seconds = number("SENMON_FUZZ_SECONDS");
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64);
    let seed = number("SENMON_FUZZ_SEED").unwrap_or(if seconds.is_some() { clock } else { 1 });
    let mut random = Random(seed);
    let mut words = HashSet::new();
    let mut kept: Vec<Vec<u8>> = regressions(name);
    kept.extend(seeds.iter().cloned());
    for input in &kept {
        words.insert(attempt(name, seed, input, &target));
    }
    if kept.is_empty() {
        kept.push(Vec::new());
    }
    let longest = kept.iter().map(Vec::len).max().unwrap_or(0).max(MAX_LEN);
    let (start, mut tried) = (Instant::now(), 0);
    while seconds.map_or(tried < inputs, |seconds| start.elapsed().as_secs() < seconds) {
        let mut input = kept[random.below(kept.len())].clone();
        for _ in 0..1 + random.below(4) {
            let other = &kept[random.below(kept.len())];
            damage(&mut input, other, &mut random);
        }
        input.truncate(longest);
        if words.insert(attempt(name, seed, &input, &target)) && kept.len() < MAX_KEPT {
            kept.push(input);
        }
        tried += 1;
    }
    println!(
        "{name}: {tried} inputs in {:.1} s from seed {seed}, {} kept, {} different outcomes",
        start.elapsed().as_secs_f64(),
        kept.len(),
        words.len()
    );
}

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    match value.parse() {
        Ok(n) => Some(n),
        Err(_) => panic!("{variable} = {value:?}: expected an integer that is not negative"),
    }
}

/// The content of the files in `regressions/NAME`, by name.
fn regressions(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions").join(name);
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = files.map(|file| file.path()).collect();
    paths.sort();
    paths
        .iter()
        .map(|path| std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
        .collect()
}

/// Runs the target on one input; when it fails, keeps the input and says where.
fn attempt(name: &str, seed: u64, input: &[u8], target: impl Fn(&[u8]) -> String) -> u64 {
    let start = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| target(input)));
    let late = start.elapsed() > MAX_TIME;
    let hasher = BuildHasherDefault::<DefaultHasher>::default();
    match outcome {
        Ok(word) if !late => hasher.hash_one(word),
        outcome => {
            let path =
                std::env::temp_dir().join(format!("senmon-fuzz-{name}-{:016x}", hasher.hash_one(input)));
            let saved = match std::fs::write(&path, input) {
                Ok(()) => format!("is in {}", path.display()),
                Err(e) => format!("cannot be written to {}: {e}", path.display()),
            };
            let what = if outcome.is_err() { "panics" } else { "takes too long" };
            panic!("{name}: an input of {} bytes, from seed {seed}, {what}; it {saved}", input.len());
        }
    }
}

/// Changes an input in one place, or cuts it, or puts a part of it or of another elsewhere.
fn damage(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    if input.is_empty() {
        input.extend(random.part(other));
        input.push(random.next() as u8);
        return;
    }
    let at = random.below(input.len());
    match random.below(10) {
        0 => input[at] ^= 1 << random.below(8),
        1 => input[at] = random.next() as u8,
        // Numbers of four and of eight bytes: small, around powers of two, around the length.
        2..=5 => {
            let n = random.number(input.len());
            let width = [1, 2, 4, 8][random.below(4)];
            // Numbers stand anywhere, but most often where they would in an array of them.
            let at = if random.below(2) == 0 { at } else { at / width * width };
            for (byte, new) in input[at..].iter_mut().zip(&n.to_le_bytes()[..width]) {
                *byte = *new;
            }
        }
        6 => input.truncate(at),
        7 => {
            let end = at + random.below((input.len() - at).min(64) + 1);
            input.drain(at..end);
        }
        8 => {
            let part = random.part(other).to_vec();
            input.splice(at..at, part);
        }
        _ => {
            let part = random.part(other).to_vec();
            let end = (at + part.len()).min(input.len());
            input.splice(at..end, part);
        }
    }
}

/// Random numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// A number that lengths, counts and places break at.
    fn number(&mut self, len: usize) -> u64 {
        let near = (self.below(5) as u64).wrapping_sub(2);
        match self.below(4) {
            0 => self.below(64) as u64,
            1 => (1u64 << self.below(64)).wrapping_add(near),
            2 => (len as u64).wrapping_add(near),
            _ => self.next(),
        }
    }

    /// A part of some bytes, more often a short one.
    fn part<'a>(&mut self, of: &'a [u8]) -> &'a [u8] {
        let from = self.below(of.len() + 1);
        let most = if self.below(4) == 0 { of.len() } else { 32 };
        &of[from..][..self.below((of.len() - from).min(most) + 1)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bug_behind_two_lengths_is_found_kept_and_named() {
        // The input grows towards the bug only because new outcomes are kept.
        let target = |input: &[u8]| {
            let prefix = input.iter().zip(b"bug").take_while(|(a, b)| a == b).count();
            assert!(prefix < 3);
            prefix.to_string()
        };
        let failed = catch_unwind(|| fuzz("itself", &[b"no".to_vec()], 1_000_000, target));
        let message = failed.expect_err("the bug is found");
        let message = message.downcast_ref::<String>().expect("a message");
        let path = message.rsplit_once("it is in ").expect("a path").1;
        let kept = std::fs::read(path).expect("the input");
        assert!(kept.starts_with(b"bug"), "{message}");
        std::fs::remove_file(path).expect("it can be removed");
    }
}
