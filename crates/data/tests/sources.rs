//! What is read, what is skipped and counted, and what each mistake says.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parquet::basic::{Compression, LogicalType, Repetition, Type as Physical};
use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;
use senmon_data::{
    DataConfig, DataError, Dataset, DomainRule, EvalSet, GroupRule, Progress, Silent, TextTokenizer,
};

/// A paragraph that no other number gives.
fn text(number: usize) -> String {
    (0..60).map(|line| format!("line {line} of text {number}: {}\n", (number * 31 + line * 7) % 97)).collect()
}

fn put(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, content).unwrap();
    path
}

fn config(paths: &[&Path]) -> DataConfig {
    DataConfig { paths: paths.iter().map(|p| p.to_path_buf()).collect(), vocab: 280, ..DataConfig::default() }
}

fn open(config: &DataConfig) -> Result<Dataset, DataError> {
    let cache = tempfile::tempdir().unwrap();
    Dataset::open(config, cache.path(), &Silent)
}

/// A message is one line that holds these words.
#[track_caller]
fn says(error: &DataError, words: &[&str]) {
    let message = error.to_string();
    assert!(!message.contains('\n'), "{message}");
    for word in words {
        assert!(message.contains(word), "no {word:?} in {message:?}");
    }
}

#[test]
fn what_is_not_text_is_skipped_and_counted_by_reason() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..12 {
        put(dir.path(), &format!("p{i}/a.rs"), text(i));
    }
    put(dir.path(), "p1/notes.md", text(100));
    put(dir.path(), "binary.png", b"\x89PNG\0\0");
    put(dir.path(), "latin.txt", b"caf\xe9 and more");
    put(dir.path(), "empty.rs", b"");
    put(dir.path(), "blank.rs", b" \n\t\n");
    put(dir.path(), "broken.parquet", b"PAR1 this is not parquet PAR1");
    put(dir.path(), ".git/HEAD", b"ref: refs/heads/main");
    let mut late = vec![b'a'; 3 << 20];
    late[(2 << 20) + 5] = 0;
    put(dir.path(), "late.txt", late);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("nowhere", dir.path().join("dangling")).unwrap();
        std::os::unix::fs::symlink("..", dir.path().join("p2/up")).unwrap();
        std::os::unix::fs::symlink("a.rs", dir.path().join("p3/again.rs")).unwrap();
        drop(std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap());
    }
    let data = open(&config(&[dir.path()])).unwrap();
    let report = data.report();
    let skipped = |why: &str| report.files_skipped.get(why).copied().unwrap_or(0);
    assert_eq!(skipped("binary"), 2, "{report:?}");
    assert_eq!(skipped("not UTF-8"), 1);
    assert_eq!(skipped("empty"), 2);
    assert_eq!(skipped("broken tables"), 1);
    if cfg!(unix) {
        assert_eq!(skipped("broken or circular links"), 2);
        assert_eq!(skipped("not regular files"), 1);
        assert_eq!(report.duplicates, 1, "a link to a file is the file again");
    }
    assert_eq!(report.documents, 13);
    let words = report.to_string();
    assert!(words.contains("2 binary") && words.contains("13 documents"), "{words}");
    let json = serde_json::to_value(report).unwrap();
    assert_eq!(json["files_skipped"]["binary"], 2);
}

#[test]
fn mistakes_about_paths_are_told_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    says(&open(&config(&[])).unwrap_err(), &["no data given"]);
    let none = dir.path().join("none");
    let error = open(&config(&[&none])).unwrap_err();
    assert!(matches!(error, DataError::NoSuchPath { .. }) && error.is_users_mistake());
    says(&error, &["no such file or folder", "none", "data.paths"]);
    let error = open(&config(&[dir.path()])).unwrap_err();
    assert!(matches!(error, DataError::NoText { .. }));
    says(&error, &["no text found", "no files"]);
    let binary = put(dir.path(), "x.bin", [0, 1, 2]);
    says(&open(&config(&[&binary])).unwrap_err(), &["no text found", "x.bin", "1 binary"]);
    let error = open(&DataConfig { holdout: -1.0, ..config(&[dir.path()]) }).unwrap_err();
    says(&error, &["data.holdout = -1"]);
    let tokenizer = put(dir.path(), "tok.json", "{}");
    let error = open(&DataConfig { tokenizer: Some(tokenizer), ..config(&[dir.path()]) }).unwrap_err();
    says(&error, &["tok.json", "not a tokenizer"]);
    let rules = DomainRule::File(dir.path().join("rules.toml"));
    put(dir.path(), "a.txt", text(1));
    says(&open(&DataConfig { domains: rules, ..config(&[dir.path()]) }).unwrap_err(), &["rules.toml"]);
}

#[cfg(unix)]
#[test]
fn a_given_folder_without_permission_is_an_error_and_a_nested_one_is_counted() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    for i in 0..12 {
        put(dir.path(), &format!("open/p{i}.txt"), text(i));
    }
    put(dir.path(), "shut/b.txt", text(50));
    let shut = dir.path().join("shut");
    fs::set_permissions(&shut, fs::Permissions::from_mode(0o000)).unwrap();
    // Whoever may read everything (root) sees no error to test.
    if fs::read_dir(&shut).is_err() {
        let error = open(&config(&[&shut])).unwrap_err();
        assert!(matches!(error, DataError::Unreadable { .. }));
        says(&error, &["cannot read", "shut", "permissions"]);
        assert_eq!(open(&config(&[dir.path()])).unwrap().report().files_skipped["unreadable"], 1);
    }
    fs::set_permissions(&shut, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn long_files_become_several_documents_and_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let lines: String =
        (0..30_000).map(|i| format!("this is line {i} of a long file, {}\n", i % 13)).collect();
    // Characters of three bytes without any line end: the cut may not fall inside one.
    let unbroken = "門".repeat(500_000);
    put(dir.path(), "lines.txt", &lines);
    put(dir.path(), "unbroken.md", &unbroken);
    let config = DataConfig { holdout: 0.0, dedupe: false, ..config(&[dir.path()]) };
    let report = open(&config).unwrap().report().clone();
    assert_eq!(report.bytes as usize, lines.len() + unbroken.len());
    assert_eq!(report.documents, 2 + 2, "{report:?}");
    assert!(report.files_skipped.is_empty());
}

#[test]
fn rows_of_json_lines_are_documents_and_bad_ones_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let mut lines = String::new();
    for i in 0..200 {
        let kind = if i % 4 == 0 { "prose" } else { "code" };
        lines +=
            &serde_json::json!({"id": i, "text": text(i), "meta": {"kind": kind}, "kind": kind}).to_string();
        lines += "\r\n";
    }
    lines += "{broken\n\n[1, 2]\n{\"text\": 5}\n{\"other\": \"x\"}\n{\"text\": \" \"}\n{\"text\": null}\n";
    lines += &serde_json::json!({ "text": text(3) }).to_string();
    let path = put(dir.path(), "rows.jsonl", &lines);
    let rule = DomainRule::Column("kind".to_owned());
    let cache = tempfile::tempdir().unwrap();
    let data =
        Dataset::open(&DataConfig { domains: rule, ..config(&[&path]) }, cache.path(), &Silent).unwrap();
    let report = data.report();
    assert_eq!((report.documents, report.duplicates), (200, 1), "{report:?}");
    assert_eq!(report.rows_skipped["not JSON objects"], 2);
    assert_eq!(report.rows_skipped["without text in the column"], 3);
    assert_eq!(report.rows_skipped["empty"], 1);
    assert_eq!(data.domains(), ["code", "prose"]);
    assert!(report.split_rule.contains("row"), "{}", report.split_rule);
    assert!(report.held_out_bytes > 0 && report.domains[0].train_bytes > 0);
    data.batch(0, 2, 64, 0).unwrap();

    let wrong = DataConfig { column: "content".to_owned(), ..config(&[&path]) };
    let error = open(&wrong).unwrap_err();
    assert!(matches!(error, DataError::NoColumn { .. }));
    says(&error, &["rows.jsonl", "content", "text", "data.column"]);
    put(dir.path(), "plain.txt", text(9));
    let report = open(&DataConfig { paths: vec![dir.path().to_owned()], ..wrong }).unwrap().report().clone();
    assert_eq!(
        report.files_skipped["without the text column"], 1,
        "a file found in a folder is only counted"
    );
}

/// Writes a parquet file with an optional text and a required group column, in row groups of 10.
fn parquet_file(path: &Path, rows: &[(Option<String>, String)], compression: Compression, annotated: bool) {
    let column = |name: &str, repetition| {
        let builder = Type::primitive_type_builder(name, Physical::BYTE_ARRAY).with_repetition(repetition);
        let kind = annotated.then_some(LogicalType::String);
        Arc::new(builder.with_logical_type(kind).build().unwrap())
    };
    let fields = vec![column("content", Repetition::OPTIONAL), column("repo", Repetition::REQUIRED)];
    let schema = Arc::new(Type::group_type_builder("rows").with_fields(fields).build().unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut writer = SerializedFileWriter::new(fs::File::create(path).unwrap(), schema, properties).unwrap();
    for rows in rows.chunks(10) {
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let texts: Vec<ByteArray> = rows.iter().filter_map(|r| r.0.as_deref()).map(ByteArray::from).collect();
        let levels: Vec<i16> = rows.iter().map(|r| i16::from(r.0.is_some())).collect();
        let ColumnWriter::ByteArrayColumnWriter(typed) = column.untyped() else { panic!("a text column") };
        typed.write_batch(&texts, Some(&levels), None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let repos: Vec<ByteArray> = rows.iter().map(|r| ByteArray::from(r.1.as_str())).collect();
        let ColumnWriter::ByteArrayColumnWriter(typed) = column.untyped() else { panic!("a text column") };
        typed.write_batch(&repos, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn parquet_is_read_by_column_in_common_compressions() {
    let rows: Vec<(Option<String>, String)> =
        (0..60).map(|i| ((i % 20 != 7).then(|| text(i)), format!("repo{}", i % 12))).collect();
    let kinds = [
        (Compression::UNCOMPRESSED, true),
        (Compression::SNAPPY, true),
        (Compression::ZSTD(Default::default()), true),
        (Compression::GZIP(Default::default()), false),
        (Compression::LZ4_RAW, true),
        (Compression::BROTLI(Default::default()), true),
    ];
    let mut keys = Vec::new();
    for (compression, annotated) in kinds {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.parquet");
        parquet_file(&path, &rows, compression, annotated);
        let config = DataConfig {
            column: "content".to_owned(),
            group: GroupRule::Column("repo".to_owned()),
            holdout: 0.1,
            ..config(&[&path])
        };
        let cache = tempfile::tempdir().unwrap();
        let data = Dataset::open(&config, cache.path(), &Silent).unwrap();
        let report = data.report();
        assert_eq!((report.documents, report.groups), (57, 12), "{compression} {report:?}");
        assert_eq!(report.rows_skipped["without text in the column"], 3);
        assert!(report.split_rule.contains("repo"), "{}", report.split_rule);
        let batch = data.batch(0, 2, 100, 0).unwrap();
        assert_eq!(
            Dataset::open(&config, cache.path(), &Silent).unwrap().batch(0, 2, 100, 0).unwrap(),
            batch
        );
        keys.push(data.key().to_owned());
        let error = open(&DataConfig { column: "body".to_owned(), ..config }).unwrap_err();
        says(&error, &["rows.parquet", "body", "content, repo"]);
    }
    assert!(keys.iter().all(|key| *key == keys[0]), "the text decides, not how it is packed");
}

#[test]
fn cut_parquet_files_are_skipped_wherever_they_are_cut() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.parquet");
    let rows: Vec<_> = (0..20).map(|i| (Some(text(i)), "r".to_owned())).collect();
    parquet_file(&path, &rows, Compression::SNAPPY, true);
    let whole = fs::read(&path).unwrap();
    put(dir.path(), "a.txt", text(1));
    let config = DataConfig { column: "content".to_owned(), ..config(&[dir.path()]) };
    for part in 0..8 {
        fs::write(&path, &whole[..whole.len() * part / 8]).unwrap();
        let report = open(&config).unwrap().report().clone();
        assert_eq!(report.files_skipped["broken tables"], 1);
    }
    for at in (0..whole.len()).step_by(whole.len() / 40) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        fs::write(&path, bytes).unwrap();
        open(&config).unwrap();
    }
}

#[test]
fn exact_duplicates_are_removed_and_counted_or_kept() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..20 {
        put(dir.path(), &format!("p{i}/own.txt"), text(i));
        put(dir.path(), &format!("p{i}/LICENSE"), text(1000));
    }
    let report = open(&config(&[dir.path()])).unwrap().report().clone();
    assert_eq!((report.documents, report.duplicates), (21, 19));
    assert_eq!(report.duplicate_bytes as usize, 19 * text(1000).len());
    let kept = open(&DataConfig { dedupe: false, holdout: 0.2, ..config(&[dir.path()]) }).unwrap();
    let kept = kept.report();
    assert_eq!(kept.duplicates, 0);
    assert!(kept.straddlers >= 1, "copies of training text leave the held-out part: {kept:?}");
    assert_eq!(kept.documents + kept.straddlers, 40);
}

/// Cancels when a stage of this name begins.
struct CancelAt(&'static str, AtomicBool);

impl Progress for CancelAt {
    fn stage(&self, name: &str, _total: Option<u64>) {
        self.1.fetch_or(name == self.0, Ordering::Relaxed);
    }
    fn advance(&self, _n: u64) {}
    fn cancelled(&self) -> bool {
        self.1.load(Ordering::Relaxed)
    }
}

#[test]
fn opening_can_be_cancelled_in_every_stage() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..20 {
        put(dir.path(), &format!("p{i}/own.txt"), text(i));
    }
    for stage in ["finding files", "reading files", "measuring overlap", "training the tokenizer"] {
        let cache = tempfile::tempdir().unwrap();
        let progress = CancelAt(stage, AtomicBool::new(false));
        let error = Dataset::open(&config(&[dir.path()]), cache.path(), &progress).unwrap_err();
        assert!(matches!(error, DataError::Cancelled), "{stage}: {error}");
    }
}

#[test]
fn a_cache_that_cannot_be_written_is_told() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "a.txt", text(1));
    let file = put(dir.path(), "file", "in the way");
    let error = Dataset::open(&config(&[dir.path()]), &file.join("cache"), &Silent).unwrap_err();
    assert!(matches!(error, DataError::Cache { .. }));
    says(&error, &["data cache", "file"]);
}

#[test]
fn given_text_is_evaluated_whole_by_domain() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..30 {
        put(dir.path(), &format!("{i}.rs"), text(i));
    }
    put(dir.path(), "a.md", text(77));
    put(dir.path(), "tiny.toml", "a = 1");
    let tokenizer = TextTokenizer::train((0..30).map(text), 300, "test").unwrap();
    let evaluate = |sequence, cap| {
        let paths = [dir.path().to_owned()];
        EvalSet::from_paths(&paths, &DomainRule::Extension, "text", &tokenizer, sequence, cap, &Silent)
    };
    let all = evaluate(50, None).unwrap();
    assert_eq!(all.domains, ["rs", "md", "toml"]);
    assert_eq!(all.report.documents, 32);
    assert_eq!(all.report.held_out_bytes, all.report.bytes);
    let tokens: usize = (0..30).map(|i| tokenizer.encode(&text(i)).unwrap().len() + 1).sum();
    assert_eq!(all.sequences.iter().filter(|s| s.domain == 0).count(), (tokens - 1) / 50);
    assert!(all.sequences.iter().all(|s| s.tokens.len() == 51 && s.domain < 2));
    // A capped set begins as the whole one does, in each domain.
    let some = evaluate(50, Some(600)).unwrap();
    assert_eq!(some.sequences.len(), 12);
    for domain in [0, 1] {
        let of = |set: &EvalSet| -> Vec<Vec<u32>> {
            set.sequences.iter().filter(|s| s.domain == domain).map(|s| s.tokens.clone()).collect()
        };
        assert!(!of(&some).is_empty() && of(&all).starts_with(&of(&some)));
    }
    says(&evaluate(1_000_000, None).unwrap_err(), &["1000001 tokens"]);
}
