//! Windows, shards and the cache, with shards small enough that a little text fills many.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

/// Writes `files` files of made-up code in two languages, deterministic.
fn corpus(dir: &Path, files: u64, words: u64) -> DataConfig {
    for file in 0..files {
        let mut text = String::new();
        for word in 0..words {
            let x = mix_all(&[file, word]);
            text.push_str(
                ["fn ", "let ", "value", "(x)", " = ", ";\n", "struct ", "impl "][(x % 8) as usize],
            );
            if x.is_multiple_of(5) {
                text.push_str(&format!("name{} ", x / 64 % 300));
            }
        }
        let extension = if file % 4 == 0 { "md" } else { "rs" };
        let folder = dir.join(format!("package{}-1.{file}.0", file % 10));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("file{file}.{extension}")), text).unwrap();
    }
    DataConfig { paths: vec![dir.to_owned()], vocab: 300, ..DataConfig::default() }
}

struct Made {
    text: tempfile::TempDir,
    cache: tempfile::TempDir,
    config: DataConfig,
}

impl Made {
    fn new(files: u64, words: u64) -> Made {
        let (text, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let config = corpus(text.path(), files, words);
        Made { text, cache, config }
    }

    fn open(&self) -> Dataset {
        Dataset::open_with(&self.config, self.cache.path(), &Silent, 10_000).unwrap()
    }

    /// The shard files in the cache, sorted.
    fn shard_files(&self) -> Vec<PathBuf> {
        let sets = fs::read_dir(self.cache.path().join("tokens")).unwrap();
        let mut files: Vec<PathBuf> = sets
            .flat_map(|set| fs::read_dir(set.unwrap().path()).unwrap())
            .map(|file| file.unwrap().path())
            .collect();
        files.sort();
        files
    }
}

#[test]
fn an_epoch_has_every_token_but_a_remainder_as_target_once() {
    let made = Made::new(40, 600);
    let data = made.open();
    assert!(data.shards.count() > 5, "{} shards", data.shards.count());
    for (sequence, seed) in [(7, 0), (64, 1), (100, u64::MAX)] {
        for epoch in [0, 3] {
            for shard in 0..data.shards.count() {
                let tokens = data.shards.length(shard).unwrap();
                let mut seen = vec![0; tokens as usize];
                for window in 0..windows_of(tokens, sequence) {
                    let place = Place { epoch, turn: 0, window };
                    let start = window_start(place, shard, tokens, sequence, seed);
                    for target in start + 1..start + 1 + sequence as u64 {
                        seen[target as usize] += 1;
                    }
                }
                assert!(seen.iter().all(|&n| n <= 1));
                let missed = seen.iter().filter(|&&n| n == 0).count();
                assert!(missed <= sequence, "{missed} of {tokens} are no target with S = {sequence}");
            }
        }
    }
}

#[test]
fn epochs_go_through_all_windows_and_differ_in_order() {
    let made = Made::new(40, 600);
    let data = made.open();
    let sequence = 32;
    let per_epoch: u64 =
        (0..data.shards.count()).map(|s| windows_of(data.shards.length(s).unwrap(), sequence)).sum();
    let epoch = |number: u64, seed| -> Vec<Vec<u32>> {
        (0..per_epoch)
            .map(|i| data.batch(number * per_epoch + i, 1, sequence, seed).unwrap().tokens)
            .collect()
    };
    let (first, second, other) = (epoch(0, 5), epoch(1, 5), epoch(0, 6));
    assert_ne!(first, second);
    assert_ne!(first, other);
    let count = |rows: &[Vec<u32>]| {
        let mut counts: HashMap<u32, i64> = HashMap::new();
        rows.iter().flatten().for_each(|&t| *counts.entry(t).or_default() += 1);
        counts
    };
    let (a, b) = (count(&first), count(&second));
    let different: i64 = a.iter().map(|(t, n)| (n - b.get(t).unwrap_or(&0)).abs()).sum();
    let total: i64 = a.values().sum();
    assert!(different * 20 < total, "two epochs have nearly the same tokens: {different} of {total} differ");
}

#[test]
fn batches_do_not_depend_on_order_of_asking_threads_or_a_cache() {
    let made = Made::new(40, 600);
    let data = made.open();
    let expected: Vec<Batch> = (0..150).map(|i| data.batch(i, 3, 50, 9).unwrap()).collect();
    assert!(expected.iter().all(|b| b.tokens.len() == 3 * 51 && b.domains.len() == 3));
    assert!(expected.iter().flat_map(|b| &b.domains).any(|&d| d == 1), "both domains come");
    let vocab = data.tokenizer().vocab_size() as u32;
    assert!(expected.iter().flat_map(|b| &b.tokens).all(|&t| t < vocab));
    for threads in [1, 2, 3] {
        let cache = tempfile::tempdir().unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let other = Dataset::open_with(&made.config, cache.path(), &Silent, 10_000).unwrap();
            assert_eq!(other.key(), data.key());
            assert_eq!(other.report(), data.report());
            for i in [149, 3, 77, 0, 148, 77] {
                assert_eq!(other.batch(i, 3, 50, 9).unwrap(), expected[i as usize], "{threads} threads, {i}");
            }
        });
    }
    // B rows from one index on are the rows of smaller batches.
    let rows: Vec<u32> = (0..3).flat_map(|i| data.batch(30 + i, 1, 50, 9).unwrap().tokens).collect();
    assert_eq!(rows, data.batch(10, 3, 50, 9).unwrap().tokens);
}

#[test]
fn a_resumed_run_goes_on_from_the_cache() {
    let made = Made::new(40, 600);
    let data = made.open();
    let expected = data.batch(40, 4, 32, 0).unwrap();
    let before: Vec<_> =
        made.shard_files().iter().map(|f| fs::metadata(f).unwrap().modified().unwrap()).collect();
    drop(data);
    assert_eq!(made.open().batch(40, 4, 32, 0).unwrap(), expected);
    let after: Vec<_> =
        made.shard_files().iter().map(|f| fs::metadata(f).unwrap().modified().unwrap()).collect();
    assert_eq!(before, after[..before.len()], "nothing was made again");
}

#[test]
fn shards_are_made_when_needed_and_one_ahead() {
    let made = Made::new(40, 600);
    let data = made.open();
    assert!(made.shard_files().is_empty(), "opening tokenizes nothing");
    data.batch(0, 2, 32, 0).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while made.shard_files().iter().filter(|f| f.extension().is_some()).count() < 2
        && Instant::now() < deadline
    {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(made.shard_files().len(), 2, "the one needed and the one after it");
}

#[test]
fn damaged_shards_are_made_again() {
    let made = Made::new(20, 400);
    let expected: Vec<Batch> = {
        let data = made.open();
        (0..240).map(|i| data.batch(i, 2, 32, 0).unwrap()).collect()
    };
    let files = made.shard_files();
    assert!(files.len() > 2);
    let whole: Vec<Vec<u8>> = files.iter().map(|f| fs::read(f).unwrap()).collect();
    let damage: [(&str, fn(&mut Vec<u8>)); 5] = [
        ("cut", |b| b.truncate(b.len() - 100)),
        ("emptied", |b| b.clear()),
        ("a bit of a token turned", |b| *b.last_mut().unwrap() ^= 1),
        ("a bit of the length turned", |b| b[17] ^= 1),
        ("a huge length", |b| b[23] = 0xFF),
    ];
    for (what, damage) in damage {
        for (file, whole) in files.iter().zip(&whole) {
            let mut bytes = whole.clone();
            damage(&mut bytes);
            fs::write(file, bytes).unwrap();
        }
        let data = made.open();
        for (i, batch) in expected.iter().enumerate() {
            assert_eq!(&data.batch(i as u64, 2, 32, 0).unwrap(), batch, "{what}");
        }
        drop(data);
        for (file, whole) in files.iter().zip(&whole) {
            assert_eq!(&fs::read(file).unwrap(), whole, "{what}");
        }
    }
}

#[test]
fn several_at_once_may_use_one_cache() {
    let made = Made::new(30, 400);
    let expected = {
        let cache = tempfile::tempdir().unwrap();
        Dataset::open_with(&made.config, cache.path(), &Silent, 10_000).unwrap().batch(30, 2, 32, 0).unwrap()
    };
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(made.open().batch(30, 2, 32, 0).unwrap(), expected));
        }
    });
    assert!(made.shard_files().iter().all(|f| f.extension().is_some_and(|e| e == "tokens")));
}

#[test]
fn a_source_that_changed_meanwhile_is_told() {
    let made = Made::new(20, 400);
    let data = made.open();
    for package in fs::read_dir(made.text.path()).unwrap() {
        for file in fs::read_dir(package.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            let text = fs::read_to_string(&path).unwrap().replace("fn", "gn");
            fs::write(path, text).unwrap();
        }
    }
    let error = data.batch(0, 1, 32, 0).unwrap_err();
    assert!(matches!(error, DataError::Changed { .. }), "{error}");
    assert!(made.shard_files().is_empty());
}

#[test]
fn wrong_sizes_are_errors() {
    let made = Made::new(10, 100);
    let data = made.open();
    for (batch, sequence) in [(0, 8), (8, 0)] {
        assert!(matches!(data.batch(0, batch, sequence, 0), Err(DataError::BadValue { .. })));
    }
    assert!(matches!(data.batch(u64::MAX, 2, 8, 0), Err(DataError::BadValue { .. })));
    data.batch(u64::MAX, 1, 8, 0).unwrap();
    for sequence in [1_000_000, usize::MAX - 1, usize::MAX] {
        let error = data.batch(0, 2, sequence, 0).unwrap_err();
        assert!(matches!(error, DataError::TooSmall { .. }), "{error}");
        assert!(data.held_out(sequence, None).is_err());
    }
    assert!(matches!(data.held_out(0, None), Err(DataError::BadValue { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn windows_lie_in_their_shard_and_do_not_overlap(
        tokens in 2u64..5000, sequence in 1usize..400, seed: u64, epoch in 0u64..1000, shard in 0usize..50
    ) {
        let count = windows_of(tokens, sequence);
        let mut starts: Vec<u64> = (0..count)
            .map(|window| window_start(Place { epoch, turn: 0, window }, shard, tokens, sequence, seed))
            .collect();
        starts.sort_unstable();
        prop_assert!(starts.windows(2).all(|w| w[1] - w[0] == sequence as u64));
        if let (Some(first), Some(last)) = (starts.first(), starts.last()) {
            prop_assert!(*first < sequence as u64 && last + (sequence as u64) < tokens);
        }
    }
}

/// For any documents: the majority by ranges is the one counted token by token.
#[test]
fn the_majority_domain_is_the_one_of_most_targets() {
    let made = Made::new(30, 60);
    let data = made.open();
    for shard in 0..data.shards.count() {
        let tokens = data.shards.get(shard).unwrap();
        let each: Vec<u16> = (0..tokens.len()).map(|t| tokens.majority(t, 1)).collect();
        for start in (0..tokens.len().saturating_sub(90)).step_by(37) {
            let count = |domain| each[start..start + 90].iter().filter(|&&d| d == domain).count();
            let found = tokens.majority(start, 90);
            assert!(count(found) >= count(1 - found), "{start}");
        }
    }
}
