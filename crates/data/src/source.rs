//! From paths to documents: what is read, what is skipped and why, and how a text is found again.
//!
//! Only places and hashes are kept, never the text itself: a corpus may be larger than memory.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;
use rayon::prelude::*;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};

use crate::cache;
use crate::error::{DataError, Result};
use crate::progress::Progress;

/// Longest document cut from a plain file, in bytes. Longer files become several documents, cut after a line: shards
/// then mix documents whatever the files' sizes.
pub(crate) const PIECE: usize = 1 << 20;

/// Which columns of tables matter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Columns<'a> {
    pub(crate) text: &'a str,
    pub(crate) domain: Option<&'a str>,
    pub(crate) group: Option<&'a str>,
}

/// A file that gave documents.
#[derive(Clone, Debug)]
pub(crate) struct SourceFile {
    /// As a person knows it.
    pub(crate) path: PathBuf,
    /// The JSON lines that a parquet file was turned into.
    spool: Option<PathBuf>,
    /// Position of the given path that it was found under.
    pub(crate) root: usize,
    /// Its path below the given path, with `/`; the file's name where the given path is the file itself.
    pub(crate) relative: String,
    /// Whether the user named the file itself.
    pub(crate) given: bool,
    /// Whether its documents are rows of a table.
    pub(crate) rows: bool,
}

/// A document: where its text is and what it is.
#[derive(Clone, Debug)]
pub(crate) struct Document {
    /// Position in [`Corpus::files`].
    pub(crate) file: u32,
    /// Where its bytes, or the line of its row, begin in the file, and their number.
    offset: u64,
    length: u64,
    /// Bytes of text.
    pub(crate) bytes: u64,
    /// Of the text.
    pub(crate) hash: [u8; 32],
    /// From the columns of its row: positions in [`Corpus::labels`], or [`NO_LABEL`].
    pub(crate) domain_label: u32,
    pub(crate) group_label: u32,
}

pub(crate) const NO_LABEL: u32 = u32::MAX;

/// All documents under some paths, in the order of the sorted paths.
#[derive(Clone, Debug, Default)]
pub(crate) struct Corpus {
    pub(crate) roots: Vec<PathBuf>,
    pub(crate) files: Vec<SourceFile>,
    pub(crate) documents: Vec<Document>,
    pub(crate) labels: Vec<String>,
    pub(crate) files_skipped: BTreeMap<String, u64>,
    pub(crate) rows_skipped: BTreeMap<String, u64>,
}

/// Reads texts of documents; keeps the last file open, as neighbours often share it.
pub(crate) struct TextReader<'a> {
    corpus: &'a Corpus,
    column: &'a str,
    open: Option<(u32, File)>,
    buffer: Vec<u8>,
}

impl<'a> TextReader<'a> {
    pub(crate) fn new(corpus: &'a Corpus, column: &'a str) -> Self {
        TextReader { corpus, column, open: None, buffer: Vec::new() }
    }

    /// The text of a document, the same as when the corpus was scanned, or [`DataError::Changed`].
    pub(crate) fn text(&mut self, document: &Document) -> Result<String> {
        let source = &self.corpus.files[document.file as usize];
        let path = source.spool.as_ref().unwrap_or(&source.path);
        let unreadable = |e| DataError::Unreadable { path: source.path.clone(), source: e };
        let changed = || DataError::Changed { path: source.path.clone() };
        if self.open.as_ref().is_none_or(|(file, _)| *file != document.file) {
            self.open = Some((document.file, File::open(path).map_err(unreadable)?));
        }
        let Some((_, file)) = &mut self.open else { return Err(changed()) };
        file.seek(SeekFrom::Start(document.offset)).map_err(unreadable)?;
        self.buffer.clear();
        file.take(document.length).read_to_end(&mut self.buffer).map_err(unreadable)?;
        let text = if source.rows {
            let columns = Columns { text: self.column, domain: None, group: None };
            parse_row(&self.buffer, columns).ok().and_then(|row| row.text).ok_or_else(changed)?
        } else {
            String::from_utf8(std::mem::take(&mut self.buffer)).map_err(|_| changed())?
        };
        if blake3::hash(text.as_bytes()).as_bytes() != &document.hash {
            return Err(changed());
        }
        Ok(text)
    }
}

impl Corpus {
    /// Cuts the last document of a plain file in two, so that the second part holds about `tail` bytes; at a line's end
    /// if there is one. Returns the two parts, or nothing if it cannot be cut.
    pub(crate) fn cut_tail(&self, document: &Document, tail: u64) -> Result<Option<[Document; 2]>> {
        if self.files[document.file as usize].rows {
            return Ok(None);
        }
        let text = TextReader::new(self, "").text(document)?;
        let mut at = text.len().saturating_sub(tail as usize);
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        // After the line that the wished place is in, unless the text ends there; else after the line before it.
        let end_of_line = text[at..].find('\n').map(|n| at + n + 1).filter(|&n| n < text.len());
        let at = end_of_line.or_else(|| text[..at].rfind('\n').map(|n| n + 1)).unwrap_or(at);
        let blank = |part: &str| part.trim().is_empty();
        if blank(&text[..at]) || blank(&text[at..]) {
            return Ok(None);
        }
        let part = |from: usize, to: usize| Document {
            offset: document.offset + from as u64,
            length: (to - from) as u64,
            bytes: (to - from) as u64,
            hash: *blake3::hash(&text.as_bytes()[from..to]).as_bytes(),
            ..document.clone()
        };
        Ok(Some([part(0, at), part(at, text.len())]))
    }
}

/// Why a file gave no document. The words stand in reports after a number.
mod reason {
    pub(super) const BINARY: &str = "binary";
    pub(super) const NOT_UTF8: &str = "not UTF-8";
    pub(super) const EMPTY: &str = "empty";
    pub(super) const UNREADABLE: &str = "unreadable";
    pub(super) const BROKEN_LINK: &str = "broken or circular links";
    pub(super) const SPECIAL: &str = "not regular files";
    pub(super) const BROKEN: &str = "broken tables";
    pub(super) const NO_COLUMN: &str = "without the text column";
    pub(super) const BAD_ROW: &str = "not JSON objects";
    pub(super) const NOT_TEXT: &str = "without text in the column";
}

/// Folders of version control: their text is not the user's.
const VERSION_CONTROL: [&str; 4] = [".git", ".hg", ".svn", ".jj"];

/// What one file gave.
enum Scan {
    Documents {
        documents: Vec<Document>,
        labels: Vec<String>,
        rows_skipped: BTreeMap<String, u64>,
    },
    Skipped(&'static str),
    /// A table without the text column, with the columns that it has.
    NoColumn(String),
}

/// Finds and hashes all documents under `paths`. Parquet files are turned into JSON lines in `spool_dir`, once per
/// content. The result does not depend on the number of threads.
pub(crate) fn scan(
    paths: &[PathBuf],
    columns: Columns<'_>,
    spool_dir: &Path,
    progress: &dyn Progress,
) -> Result<Corpus> {
    let mut corpus = Corpus { roots: paths.to_vec(), ..Corpus::default() };
    progress.stage("finding files", None);
    let candidates = find_files(paths, &mut corpus.files_skipped, progress)?;
    progress.stage("reading files", Some(candidates.len() as u64));
    let scans: Vec<(SourceFile, Scan)> = candidates
        .into_par_iter()
        .map(|mut file| {
            if progress.cancelled() {
                return Err(DataError::Cancelled);
            }
            let scan = scan_file(&mut file, columns, spool_dir)?;
            progress.advance(1);
            Ok((file, scan))
        })
        .collect::<Result<_>>()?;

    let mut no_column = None;
    let mut label_ids: HashMap<String, u32> = HashMap::new();
    for (file, scan) in scans {
        match scan {
            Scan::Skipped(why) => count(&mut corpus.files_skipped, why, 1),
            Scan::NoColumn(found) => {
                count(&mut corpus.files_skipped, reason::NO_COLUMN, 1);
                let error = || DataError::NoColumn {
                    path: file.path.clone(),
                    column: columns.text.to_owned(),
                    found: found.clone(),
                };
                if file.given {
                    return Err(error());
                }
                no_column.get_or_insert_with(error);
            }
            Scan::Documents { documents, labels, rows_skipped } => {
                for (why, n) in rows_skipped {
                    count(&mut corpus.rows_skipped, &why, n);
                }
                let ids: Vec<u32> = labels
                    .into_iter()
                    .map(|label| {
                        let next = corpus.labels.len() as u32;
                        *label_ids.entry(label).or_insert_with_key(|label| {
                            corpus.labels.push(label.clone());
                            next
                        })
                    })
                    .collect();
                let global = |local: u32| ids.get(local as usize).copied().unwrap_or(NO_LABEL);
                let position = corpus.files.len() as u32;
                corpus.documents.extend(documents.into_iter().map(|d| Document {
                    file: position,
                    domain_label: global(d.domain_label),
                    group_label: global(d.group_label),
                    ..d
                }));
                corpus.files.push(file);
            }
        }
    }
    if corpus.documents.is_empty() {
        return Err(no_column.unwrap_or_else(|| no_text(&corpus)));
    }
    Ok(corpus)
}

fn no_text(corpus: &Corpus) -> DataError {
    let paths: Vec<String> = corpus.roots.iter().map(|p| p.display().to_string()).collect();
    let mut why: Vec<String> = corpus.files_skipped.iter().map(|(why, n)| format!("{n} {why}")).collect();
    why.extend(corpus.rows_skipped.iter().map(|(why, n)| format!("{n} rows {why}")));
    let why = if why.is_empty() { "no files".to_owned() } else { why.join(", ") };
    DataError::NoText { paths: paths.join(", "), why }
}

fn count(counts: &mut BTreeMap<String, u64>, why: &str, n: u64) {
    *counts.entry(why.to_owned()).or_default() += n;
}

/// All regular files under the paths, sorted within each, each once.
fn find_files(
    paths: &[PathBuf],
    skipped: &mut BTreeMap<String, u64>,
    progress: &dyn Progress,
) -> Result<Vec<SourceFile>> {
    if paths.is_empty() {
        return Err(DataError::NoPaths);
    }
    let mut seen = HashSet::new();
    let mut files = Vec::new();
    for (root, given) in paths.iter().enumerate() {
        let unreadable = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => DataError::NoSuchPath { path: given.clone() },
            _ => DataError::Unreadable { path: given.clone(), source },
        };
        let metadata = fs::metadata(given).map_err(unreadable)?;
        if metadata.is_dir() {
            fs::read_dir(given).map_err(unreadable)?;
        } else if metadata.is_file() {
            File::open(given).map_err(unreadable)?;
        }
        let walk = walkdir::WalkDir::new(given).follow_links(true).sort_by_file_name();
        let wanted = |entry: &walkdir::DirEntry| {
            entry.depth() == 0
                || !(entry.file_type().is_dir()
                    && entry.file_name().to_str().is_some_and(|name| VERSION_CONTROL.contains(&name)))
        };
        for entry in walk.into_iter().filter_entry(wanted) {
            if progress.cancelled() {
                return Err(DataError::Cancelled);
            }
            let entry = match entry {
                Ok(entry) => entry,
                Err(e) => {
                    let missing = e.io_error().is_some_and(|e| e.kind() == io::ErrorKind::NotFound);
                    let link = e.loop_ancestor().is_some() || missing;
                    count(skipped, if link { reason::BROKEN_LINK } else { reason::UNREADABLE }, 1);
                    continue;
                }
            };
            if entry.file_type().is_dir() {
                continue;
            }
            // A pipe or a device could block for ever.
            if !entry.file_type().is_file() {
                count(skipped, reason::SPECIAL, 1);
                continue;
            }
            let given_itself = entry.depth() == 0;
            let path = entry.into_path();
            if !seen.insert(path.clone()) {
                continue;
            }
            let below =
                if given_itself { path.file_name().map(Path::new) } else { path.strip_prefix(given).ok() };
            let relative = below.unwrap_or(&path).components();
            let relative: Vec<_> = relative.map(|c| c.as_os_str().to_string_lossy()).collect();
            files.push(SourceFile {
                relative: relative.join("/"),
                path,
                spool: None,
                root,
                given: given_itself,
                rows: false,
            });
        }
    }
    Ok(files)
}

fn scan_file(file: &mut SourceFile, columns: Columns<'_>, spool_dir: &Path) -> Result<Scan> {
    let extension = file.path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    let scanned = match extension.as_str() {
        "jsonl" | "ndjson" => {
            file.rows = true;
            scan_rows(&file.path, columns)
        }
        "parquet" => {
            file.rows = true;
            match spool_parquet(&file.path, columns, spool_dir) {
                Ok(Spool::File(spool)) => {
                    let scanned = scan_rows(&spool, columns);
                    file.spool = Some(spool);
                    scanned
                }
                Ok(Spool::NoColumn(found)) => Ok(Scan::NoColumn(found)),
                Err(SpoolError::Parquet) => Ok(Scan::Skipped(reason::BROKEN)),
                Err(SpoolError::Source(e)) => Err(e),
                Err(SpoolError::Cache(e)) => return Err(e),
            }
        }
        _ => scan_text(&file.path),
    };
    // A source that cannot be read is one file fewer, not the end.
    Ok(scanned.unwrap_or(Scan::Skipped(reason::UNREADABLE)))
}

/// A plain text file as one document, or several of at most [`PIECE`] bytes.
fn scan_text(path: &Path) -> io::Result<Scan> {
    let mut file = File::open(path)?;
    let mut documents = Vec::new();
    let mut buffer: Vec<u8> = Vec::new();
    let mut offset = 0u64;
    loop {
        let missing = PIECE - buffer.len();
        let read = (&mut file).take(missing as u64).read_to_end(&mut buffer)?;
        let last = read < missing;
        let end = if last { buffer.len() } else { piece_end(&buffer) };
        let piece = &buffer[..end];
        if piece.contains(&0) {
            return Ok(Scan::Skipped(reason::BINARY));
        }
        let Ok(text) = std::str::from_utf8(piece) else {
            return Ok(Scan::Skipped(reason::NOT_UTF8));
        };
        if !text.trim().is_empty() {
            documents.push(Document {
                file: 0,
                offset,
                length: end as u64,
                bytes: end as u64,
                hash: *blake3::hash(piece).as_bytes(),
                domain_label: NO_LABEL,
                group_label: NO_LABEL,
            });
        }
        if last {
            break;
        }
        offset += end as u64;
        buffer.drain(..end);
    }
    if documents.is_empty() {
        return Ok(Scan::Skipped(reason::EMPTY));
    }
    Ok(Scan::Documents { documents, labels: Vec::new(), rows_skipped: BTreeMap::new() })
}

/// Where to cut a full buffer: after its last line, else before the character that may be incomplete.
fn piece_end(buffer: &[u8]) -> usize {
    if let Some(newline) = buffer.iter().rposition(|&b| b == b'\n') {
        return newline + 1;
    }
    let floor = buffer.len().saturating_sub(4);
    let start = (floor..buffer.len()).rev().find(|&i| buffer[i] & 0xC0 != 0x80);
    // Nothing but continuation bytes is not UTF-8, which the check that follows says.
    start.filter(|&i| i > 0).unwrap_or(buffer.len())
}

/// The columns of one row that matter.
#[derive(Default)]
struct Row {
    text: Option<String>,
    has_column: bool,
    domain: Option<String>,
    group: Option<String>,
}

/// Reads the wanted fields of a JSON object and skips the rest without building it.
struct RowVisitor<'a>(Columns<'a>);

impl<'de> Visitor<'de> for RowVisitor<'_> {
    type Value = Row;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Row, A::Error> {
        let mut row = Row::default();
        let label = |value: &serde_json::Value| match value {
            serde_json::Value::Null => None,
            serde_json::Value::String(s) => Some(s.clone()),
            other => Some(other.to_string()),
        };
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            let is = |name: Option<&str>| name == Some(&*key);
            let (text, domain, group) = (key == self.0.text, is(self.0.domain), is(self.0.group));
            if !(text || domain || group) {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let value: serde_json::Value = map.next_value()?;
            if domain {
                row.domain = label(&value);
            }
            if group {
                row.group = label(&value);
            }
            if text {
                row.has_column = true;
                if let serde_json::Value::String(s) = value {
                    row.text = Some(s);
                }
            }
        }
        Ok(row)
    }
}

impl<'de> DeserializeSeed<'de> for RowVisitor<'_> {
    type Value = Row;
    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> std::result::Result<Row, D::Error> {
        d.deserialize_map(self)
    }
}

fn parse_row(line: &[u8], columns: Columns<'_>) -> serde_json::Result<Row> {
    let mut json = serde_json::Deserializer::from_slice(line);
    let row = RowVisitor(columns).deserialize(&mut json)?;
    json.end()?;
    Ok(row)
}

/// What one line of a table is.
enum Line {
    Document { document: Document, domain: Option<String>, group: Option<String> },
    Skipped { why: &'static str, has_column: bool, is_object: bool },
    Blank,
}

/// A file of JSON lines, one document a row.
fn scan_rows(path: &Path, columns: Columns<'_>) -> io::Result<Scan> {
    const BLOCK: usize = 8 << 20;
    let mut reader = BufReader::with_capacity(1 << 20, File::open(path)?);
    let mut documents = Vec::new();
    let mut rows_skipped = BTreeMap::new();
    let mut labels: Vec<String> = Vec::new();
    let mut label_ids: HashMap<String, u32> = HashMap::new();
    let mut intern = |label: Option<String>| match label {
        None => NO_LABEL,
        Some(label) => *label_ids.entry(label).or_insert_with_key(|label| {
            labels.push(label.clone());
            labels.len() as u32 - 1
        }),
    };
    let (mut has_column, mut lines) = (false, 0u64);
    let mut found: BTreeSet<String> = BTreeSet::new();
    let mut offset = 0u64;
    let mut block: Vec<u8> = Vec::new();
    loop {
        block.clear();
        (&mut reader).take(BLOCK as u64).read_to_end(&mut block)?;
        if block.is_empty() {
            break;
        }
        if block.last() != Some(&b'\n') {
            reader.read_until(b'\n', &mut block)?;
        }
        // (offset in the block, line), [lines of the block]
        let mut spans: Vec<(usize, &[u8])> = Vec::new();
        let mut start = 0;
        for line in block.split_inclusive(|&b| b == b'\n') {
            spans.push((start, line));
            start += line.len();
        }
        let parsed: Vec<Line> =
            spans.par_iter().map(|&(start, line)| scan_line(line, offset + start as u64, columns)).collect();
        for (line, (_, bytes)) in parsed.into_iter().zip(&spans) {
            match line {
                Line::Blank => {}
                Line::Document { mut document, domain, group } => {
                    lines += 1;
                    has_column = true;
                    document.domain_label = intern(domain);
                    document.group_label = intern(group);
                    documents.push(document);
                }
                Line::Skipped { why, has_column: has, is_object } => {
                    lines += 1;
                    has_column |= has;
                    count(&mut rows_skipped, why, 1);
                    if is_object && !has && found.len() < 32 {
                        let keys: Option<serde_json::Map<String, serde_json::Value>> =
                            serde_json::from_slice(bytes).ok();
                        found.extend(keys.into_iter().flat_map(|m| m.into_iter().map(|(key, _)| key)));
                    }
                }
            }
        }
        offset += block.len() as u64;
    }
    if lines == 0 {
        return Ok(Scan::Skipped(reason::EMPTY));
    }
    if !has_column && !found.is_empty() {
        let found: Vec<String> = found.into_iter().take(12).collect();
        return Ok(Scan::NoColumn(found.join(", ")));
    }
    Ok(Scan::Documents { documents, labels, rows_skipped })
}

fn scan_line(line: &[u8], offset: u64, columns: Columns<'_>) -> Line {
    if line.trim_ascii().is_empty() {
        return Line::Blank;
    }
    let Ok(row) = parse_row(line, columns) else {
        return Line::Skipped { why: reason::BAD_ROW, has_column: false, is_object: false };
    };
    match row.text {
        Some(text) if !text.trim().is_empty() => Line::Document {
            document: Document {
                file: 0,
                offset,
                length: line.len() as u64,
                bytes: text.len() as u64,
                hash: *blake3::hash(text.as_bytes()).as_bytes(),
                domain_label: NO_LABEL,
                group_label: NO_LABEL,
            },
            domain: row.domain,
            group: row.group,
        },
        Some(_) => Line::Skipped { why: reason::EMPTY, has_column: true, is_object: true },
        None => Line::Skipped { why: reason::NOT_TEXT, has_column: row.has_column, is_object: true },
    }
}

enum Spool {
    File(PathBuf),
    NoColumn(String),
}

enum SpoolError {
    /// The file is not parquet, or broken.
    Parquet,
    /// The file cannot be read.
    Source(io::Error),
    /// The cache cannot be written.
    Cache(DataError),
}

/// Turns the wanted columns of a parquet file into JSON lines. Row groups are compressed and long, and a shuffled read
/// would decode a whole one for each document; lines can be found by offset.
fn spool_parquet(
    path: &Path,
    columns: Columns<'_>,
    spool_dir: &Path,
) -> std::result::Result<Spool, SpoolError> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"senmon-spool-1");
    for name in [Some(columns.text), columns.domain, columns.group] {
        let name = name.unwrap_or("");
        hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
    }
    let file = File::open(path).map_err(SpoolError::Source)?;
    hasher.update_reader(&file).map_err(SpoolError::Source)?;
    let spool = spool_dir.join(format!("{}.jsonl", hasher.finalize().to_hex()));
    if spool.is_file() {
        return Ok(Spool::File(spool));
    }
    // The reader of a third party meets files of unknown origin here: whatever it does, this is a broken file.
    let opened = std::panic::catch_unwind(|| {
        let file = File::open(path).ok()?;
        let reader = SerializedFileReader::new(file).ok()?;
        let schema = reader.metadata().file_metadata().schema().clone();
        Some((reader, schema))
    });
    let (reader, schema) = opened.ok().flatten().ok_or(SpoolError::Parquet)?;
    let wanted = |name: &str| [Some(columns.text), columns.domain, columns.group].contains(&Some(name));
    let fields: Vec<_> = schema.get_fields().iter().filter(|f| wanted(f.name())).cloned().collect();
    if !fields.iter().any(|f| f.name() == columns.text) {
        let found: Vec<&str> = schema.get_fields().iter().map(|f| f.name()).collect();
        return Ok(Spool::NoColumn(found.join(", ")));
    }
    let projection = Type::group_type_builder(schema.name())
        .with_fields(fields)
        .build()
        .map_err(|_| SpoolError::Parquet)?;
    cache::folder(spool_dir).map_err(SpoolError::Cache)?;
    let mut broken = false;
    let written = cache::write_whole(&spool, |out| {
        let filled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| -> io::Result<bool> {
            let Ok(rows) = reader.get_row_iter(Some(projection)) else { return Ok(false) };
            for row in rows {
                let Ok(row) = row else { return Ok(false) };
                let mut line = serde_json::Map::new();
                for (name, field) in row.get_column_iter() {
                    line.insert(name.clone(), json_of(field));
                }
                serde_json::to_writer(&mut *out, &line)?;
                out.write_all(b"\n")?;
            }
            Ok(true)
        }));
        match filled {
            Ok(Ok(true)) => Ok(()),
            Ok(Err(e)) => Err(e),
            Ok(Ok(false)) | Err(_) => {
                broken = true;
                Err(io::Error::other("the parquet file is broken"))
            }
        }
    });
    match written {
        Ok(()) => Ok(Spool::File(spool)),
        Err(_) if broken => Err(SpoolError::Parquet),
        Err(e) => Err(SpoolError::Cache(e)),
    }
}

/// Text columns are not always annotated as such, so bytes that are UTF-8 count as text.
fn json_of(field: &Field) -> serde_json::Value {
    match field {
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(_) => serde_json::Value::Null,
        },
        Field::Str(text) => text.as_str().into(),
        Field::Bool(x) => (*x).into(),
        Field::Byte(x) => (*x).into(),
        Field::Short(x) => (*x).into(),
        Field::Int(x) => (*x).into(),
        Field::Long(x) => (*x).into(),
        Field::UByte(x) => (*x).into(),
        Field::UShort(x) => (*x).into(),
        Field::UInt(x) => (*x).into(),
        Field::ULong(x) => (*x).into(),
        // Nothing else is a text or names a group.
        _ => serde_json::Value::Null,
    }
}

/// Removes documents equal to an earlier one; (their number, their bytes).
pub(crate) fn remove_duplicates(corpus: &mut Corpus) -> (u64, u64) {
    let mut seen = HashSet::with_capacity(corpus.documents.len());
    let (mut number, mut bytes) = (0, 0);
    corpus.documents.retain(|document| {
        let first = seen.insert(document.hash);
        if !first {
            number += 1;
            bytes += document.bytes;
        }
        first
    });
    (number, bytes)
}
