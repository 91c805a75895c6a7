//! The split by group, measured on what batches and held-out windows really hold.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use senmon_data::{DataConfig, Dataset, DomainRule, GroupRule, Silent};

/// Text in which every line names its package.
fn text(package: &str, part: usize, lines: usize) -> String {
    (0..lines)
        .map(|i| format!("<{package}> part {part} has line {i} with {}\n", (i * 37 + part * 11) % 101))
        .collect()
}

fn put(dir: &Path, name: &str, content: &str) {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn open(dir: &Path, change: impl FnOnce(&mut DataConfig)) -> Dataset {
    let mut config =
        DataConfig { paths: vec![dir.to_owned()], vocab: 400, holdout: 0.1, ..DataConfig::default() };
    change(&mut config);
    let cache = tempfile::tempdir().unwrap();
    let data = Dataset::open(&config, cache.path(), &Silent).unwrap();
    // One batch makes the only shard, so that the cache may go.
    data.batch(0, 1, 16, 0).unwrap();
    data
}

/// The names between `<` and `>` in decoded windows.
fn names(data: &Dataset, windows: impl Iterator<Item = Vec<u32>>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for tokens in windows {
        let text = data.tokenizer().decode(&tokens).unwrap();
        for line in text.lines() {
            // Whole marks only: a window may begin or end inside one.
            if let Some((name, _)) = line.strip_prefix('<').and_then(|l| l.split_once('>')) {
                found.insert(name.to_owned());
            }
        }
    }
    found
}

fn sides(data: &Dataset) -> (BTreeSet<String>, BTreeSet<String>) {
    let held_out = names(data, data.held_out(40, None).unwrap().into_iter().map(|s| s.tokens));
    let training = names(data, (0..3000).map(|i| data.batch(i, 1, 40, 0).unwrap().tokens));
    (training, held_out)
}

#[test]
fn versions_of_one_package_are_on_one_side() {
    let dir = tempfile::tempdir().unwrap();
    for package in 0..20 {
        for version in 1..4 {
            for part in 0..3 {
                let name = format!("src/index-12ab/pkg{package}-1.0.{version}/src/file{part}.rs");
                put(dir.path(), &name, &text(&format!("pkg{package}"), part * 10 + version, 20));
            }
        }
    }
    let data = open(dir.path(), |_| ());
    assert_eq!(data.report().groups, 20);
    assert!(data.report().split_rule.contains("package"), "{}", data.report().split_rule);
    let (training, held_out) = sides(&data);
    assert!(!held_out.is_empty() && training.is_disjoint(&held_out), "{held_out:?}");
    assert_eq!(training.len() + held_out.len(), 20);
    // Another seed of batches or another vocabulary does not move the split.
    let again = open(dir.path(), |c| c.vocab = 300);
    assert_eq!(sides(&again).1, held_out);
}

#[test]
fn folders_are_groups_where_there_is_no_package_and_deeper_ones_if_need_be() {
    let dir = tempfile::tempdir().unwrap();
    for folder in 0..15 {
        for part in 0..4 {
            let name = format!("all/in/one/f{folder}/{part}.txt");
            put(dir.path(), &name, &text(&format!("f{folder}"), part, 25));
        }
    }
    for rule in [GroupRule::Package, GroupRule::Folder] {
        let data = open(dir.path(), |c| c.group = rule);
        assert_eq!(data.report().groups, 15, "{:?}", data.report());
        let (training, held_out) = sides(&data);
        assert!(!held_out.is_empty() && training.is_disjoint(&held_out));
    }
    // By file, asked for.
    let data = open(dir.path(), |c| c.group = GroupRule::File);
    assert_eq!(data.report().groups, 60);
    assert!(data.report().split_rule.contains("file"));
    // Two packages, one of them nearly everything: only folders below it leave a choice.
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "tiny-1.0/a.txt", &text("tiny", 0, 1));
    for folder in 0..20 {
        put(dir.path(), &format!("big-1.0/m{folder}/a.txt"), &text(&format!("m{folder}"), folder, 50));
    }
    let data = open(dir.path(), |_| ());
    assert!(data.report().split_rule.contains("2 deep"), "{}", data.report().split_rule);
}

#[test]
fn the_end_of_a_single_file_is_held_out() {
    let dir = tempfile::tempdir().unwrap();
    let all = text("only", 0, 2000);
    put(dir.path(), "only.txt", &all);
    let data = open(dir.path(), |_| ());
    let report = data.report();
    assert!(report.split_rule.contains("end of each file"), "{}", report.split_rule);
    assert_eq!(report.bytes as usize, all.len());
    let fraction = report.held_out_bytes as f64 / report.bytes as f64;
    assert!((0.08..0.12).contains(&fraction), "{fraction}");
    let windows = data.held_out(32, None).unwrap();
    let first = data.tokenizer().decode(&windows[0].tokens).unwrap();
    assert!(first.starts_with("<only>") && all.contains(&first), "cut at a line: {first}");
}

#[test]
fn text_too_short_to_split_is_told() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "a.txt", "x");
    let cache = tempfile::tempdir().unwrap();
    let config = DataConfig { paths: vec![dir.path().to_owned()], ..DataConfig::default() };
    let error = Dataset::open(&config, cache.path(), &Silent).unwrap_err().to_string();
    assert!(error.contains("cannot hold out") && error.contains("data.holdout = 0"), "{error}");
    let config = DataConfig { holdout: 0.0, ..config };
    let data = Dataset::open(&config, cache.path(), &Silent).unwrap();
    let error = data.batch(0, 1, 128, 0).unwrap_err().to_string();
    assert!(error.contains("needs at least 129 tokens"), "{error}");
    assert!(data.held_out(8, None).is_err());
}

#[test]
fn overlap_counts_the_runs_that_training_holds() {
    let measure = |shared: bool| {
        let dir = tempfile::tempdir().unwrap();
        for package in 0..20 {
            let words = |from: usize| (0..400).map(|i| format!("w{} ", from + i)).collect::<String>();
            // Each its own words; and, if shared, as many that all have, apart by white space only.
            let mut body = words(package * 1000);
            if shared {
                body += &words(1_000_000).replace(' ', if package % 2 == 0 { "\n" } else { " \t" });
            }
            put(dir.path(), &format!("p{package}-1.0.0/a.txt"), &body);
        }
        open(dir.path(), |_| ()).report().clone()
    };
    let (apart, half) = (measure(false), measure(true));
    assert_eq!(apart.overlap, Some(0.0));
    assert_eq!(apart.overlap_sampled % (400 - 12), 0);
    let overlap = half.overlap.unwrap();
    assert!((overlap - 388.0 / 788.0).abs() < 1e-9, "{overlap}");
    assert!(half.to_string().contains("49.2 %"), "{half}");
}

#[test]
fn big_domains_are_held_out_too_and_small_ones_are_joined() {
    let dir = tempfile::tempdir().unwrap();
    for package in 0..50 {
        put(dir.path(), &format!("p{package}-1.0.0/a.rs"), &text(&format!("p{package}"), 0, 100));
        if package % 5 == 0 {
            put(dir.path(), &format!("p{package}-1.0.0/b.md"), &text(&format!("p{package}"), 1, 50));
        }
    }
    for extension in 0..60 {
        let name = format!("p{}-1.0.0/x.e{extension:02}", extension % 50);
        put(dir.path(), &name, &text(&format!("p{}", extension % 50), extension, 2));
    }
    let data = open(dir.path(), |c| c.holdout = 0.05);
    assert_eq!(data.domains().len(), 32);
    assert_eq!(data.domains()[..2], ["rs", "md"]);
    assert!(data.domains().iter().any(|d| d == "other"));
    assert_eq!(data.report().domains_joined, 62 - 31);
    for domain in &data.report().domains[..2] {
        assert!(domain.held_out_bytes > 0 && domain.train_bytes > 0, "{domain:?}");
    }
    // A cap on the tokens covers every domain that has a window, and no window mixes domains.
    let all = data.held_out(64, None).unwrap();
    let some = data.held_out(64, Some(64)).unwrap();
    let of =
        |windows: &[senmon_data::EvalSequence]| windows.iter().map(|w| w.domain).collect::<BTreeSet<u16>>();
    assert!(of(&some).is_superset(&BTreeSet::from([0, 1])), "{:?}", of(&some));
    assert!(some.iter().all(|w| all.contains(w)));
    assert_eq!(data.held_out(64, Some(64)).unwrap(), some);
    let names = |d: u16| names(&data, all.iter().filter(|w| w.domain == d).map(|w| w.tokens.clone()));
    assert!(names(1).is_subset(&names(0)));
}

#[test]
fn domains_by_folder_and_by_rule_file() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..10 {
        put(dir.path(), &format!("base/code/{i}.rs"), &text("c", i, 40));
        put(dir.path(), &format!("base/prose/{i}.md"), &text("p", i, 20));
        put(dir.path(), &format!("base/prose/{i}.rst"), &text("r", i, 10));
    }
    let data = open(dir.path(), |c| c.domains = DomainRule::Folder);
    assert_eq!(data.domains(), ["code", "prose"]);
    let rules = tempfile::tempdir().unwrap();
    put(rules.path(), "rules.tsv", ".rs\tprogram\n*.r?t\trest\nbase/prose/\twords\n");
    let path = rules.path().join("rules.tsv");
    let data = open(dir.path(), |c| c.domains = DomainRule::File(path));
    assert_eq!(data.domains(), ["program", "words", "rest"]);
}

#[test]
fn a_given_tokenizer_is_used_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..20 {
        put(dir.path(), &format!("p{i}-1.0.0/a.txt"), &text("x", i, 60));
    }
    let trained = open(dir.path(), |_| ());
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tokenizer.json"), trained.tokenizer().json()).unwrap();
    let given = open(dir.path(), |c| c.tokenizer = Some(folder.path().to_owned()));
    assert_eq!(given.tokenizer().json(), trained.tokenizer().json());
    assert_eq!(given.key(), trained.key(), "the same tokens, wherever the tokenizer is from");
    assert_eq!(given.batch(5, 2, 32, 1).unwrap(), trained.batch(5, 2, 32, 1).unwrap());
    assert!(given.report().tokenizer.contains("tokenizer.json"));
    // Bytes for bits per byte: all of a held-out window's text.
    for window in given.held_out(50, None).unwrap() {
        let bytes: u32 = window.tokens.iter().map(|&t| given.tokenizer().bytes_of_token(t)).sum();
        assert_eq!(bytes as usize, given.tokenizer().decode(&window.tokens).unwrap().len());
    }
}
