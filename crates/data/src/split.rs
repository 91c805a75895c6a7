//! The held-out part: whole groups, so that nothing held out has a near copy in training.
//!
//! Two versions of a package share most of their text, and files of one folder quote each other: a split by file would
//! measure memory. So the text is grouped by package (without its version) or folder, and groups are held out in the order
//! of a hash of their names, until the wished fraction of the bytes is reached. A hash with a fixed salt, not the seed:
//! runs that differ in the seed stay comparable. Where one grouping leaves no useful choice the next finer one is
//! taken, and the report says which.

use std::collections::{HashMap, HashSet};

use crate::config::GroupRule;
use crate::domains::{self, Domains};
use crate::error::{DataError, Result};
use crate::source::{Corpus, Document, NO_LABEL};

/// Changing it changes every split.
const SALT: &[u8] = b"senmon held-out split 1";

/// Domains with at least this fraction of the bytes get held-out text of their own, where they have two groups.
const BIG_DOMAIN: f64 = 0.005;

/// Which documents are held out.
#[derive(Debug, Default)]
pub(crate) struct Split {
    /// [documents]
    pub(crate) held_out: Vec<bool>,
    pub(crate) groups: u64,
    pub(crate) groups_held_out: u64,
    /// For people.
    pub(crate) rule: String,
}

/// One way to group, from coarse to fine.
#[derive(Clone, Debug, PartialEq)]
enum Level {
    Column(String),
    Package,
    /// By so many folders below the one that all files share.
    Folder(usize),
    File,
}

impl Level {
    fn describe(&self, rows: bool, plain: bool) -> String {
        let row = |rule: &str| match (rows, plain) {
            (true, true) => format!("by {rule}; rows of tables each by itself"),
            (true, false) => "each row by itself".to_owned(),
            _ => format!("by {rule}"),
        };
        match self {
            Level::Column(name) => format!("by the column {name:?}"),
            Level::Package => row("package without its version, else by top folder"),
            Level::Folder(1) => row("top folder"),
            Level::Folder(depth) => row(&format!("folder, {depth} deep")),
            Level::File => row("file"),
        }
    }
}

/// Splits the documents of a corpus; where only the ends of files can be held out, cuts them off as documents of their own.
pub(crate) fn split(
    corpus: &mut Corpus,
    domains: &mut Domains,
    rule: &GroupRule,
    holdout: f64,
) -> Result<Split> {
    if holdout == 0.0 {
        return Ok(Split {
            held_out: vec![false; corpus.documents.len()],
            rule: "nothing held out".to_owned(),
            ..Split::default()
        });
    }
    let folders = domains::folders(corpus);
    let shared = domains::shared_prefix(&folders);
    let deepest = folders.iter().map(|f| f.len() - shared).max().unwrap_or(0);
    let mut levels: Vec<Level> = match rule {
        GroupRule::Column(name) => vec![Level::Column(name.clone())],
        GroupRule::Package => vec![Level::Package],
        GroupRule::Folder | GroupRule::File => Vec::new(),
    };
    if *rule != GroupRule::File {
        levels.extend((1..=deepest).map(Level::Folder));
    }
    levels.push(Level::File);
    let rows = corpus.documents.iter().any(|d| corpus.files[d.file as usize].rows);
    let plain = corpus.documents.iter().any(|d| !corpus.files[d.file as usize].rows);
    for (number, level) in levels.iter().enumerate() {
        let groups = group(corpus, domains, &folders, shared, level);
        let held = choose(&groups, domains.names.len(), holdout);
        let total: u64 = groups.iter().map(|g| g.bytes).sum();
        let bytes: u64 = groups.iter().zip(&held).filter(|(_, held)| **held).map(|(g, _)| g.bytes).sum();
        let fraction = bytes as f64 / total.max(1) as f64;
        // A few big groups leave no choice near the wished fraction; then finer groups do better.
        if fraction < holdout / 4.0 || fraction > (4.0 * holdout).max(0.2) {
            continue;
        }
        let mut held_out = vec![false; corpus.documents.len()];
        for (group, _) in groups.iter().zip(&held).filter(|(_, held)| **held) {
            for &document in &group.documents {
                held_out[document as usize] = true;
            }
        }
        let mut words = level.describe(rows, plain);
        if number > 0 {
            words.push_str("; coarser groups are too few");
        }
        return Ok(Split {
            held_out,
            groups: groups.len() as u64,
            groups_held_out: held.iter().filter(|&&h| h).count() as u64,
            rule: words,
        });
    }
    cut_ends(corpus, domains, holdout)
}

struct Group {
    /// Hash of its name with the salt: names its place in the order.
    id: u128,
    bytes: u64,
    /// (domain, bytes), few.
    domains: Vec<(u16, u64)>,
    documents: Vec<u32>,
}

/// The groups of one level in the order of their ids.
fn group(
    corpus: &Corpus,
    domains: &Domains,
    folders: &[Vec<String>],
    shared: usize,
    level: &Level,
) -> Vec<Group> {
    let id = |kind: &str, name: &[u8]| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(SALT).update(kind.as_bytes()).update(b":").update(name);
        let mut id = [0; 16];
        hasher.finalize_xof().fill(&mut id);
        u128::from_le_bytes(id)
    };
    let below = |file: usize, depth: usize| {
        let folders = &folders[file][shared.min(folders[file].len())..];
        id("folder", folders[..depth.min(folders.len())].join("/").as_bytes())
    };
    let of_file: Vec<u128> = (0..corpus.files.len())
        .map(|file| {
            let source = &corpus.files[file];
            let itself = || id("file", format!("{}/{}", source.root, source.relative).as_bytes());
            match level {
                Level::Package | Level::Column(_) => match package_of(corpus, file) {
                    Some(package) => id("package", package.as_bytes()),
                    None if source.given => itself(),
                    None => below(file, 1),
                },
                Level::Folder(_) if source.given => itself(),
                Level::Folder(depth) => below(file, *depth),
                Level::File => itself(),
            }
        })
        .collect();
    let mut position: HashMap<u128, usize> = HashMap::new();
    let mut groups: Vec<Group> = Vec::new();
    for (number, document) in corpus.documents.iter().enumerate() {
        let file = document.file as usize;
        let id = match level {
            Level::Column(_) if document.group_label != NO_LABEL => {
                id("column", corpus.labels[document.group_label as usize].as_bytes())
            }
            _ if corpus.files[file].rows => id("row", &document.hash),
            _ => of_file[file],
        };
        let at = *position.entry(id).or_insert_with(|| {
            groups.push(Group { id, bytes: 0, domains: Vec::new(), documents: Vec::new() });
            groups.len() - 1
        });
        let group = &mut groups[at];
        group.bytes += document.bytes;
        group.documents.push(number as u32);
        let domain = domains.of[number];
        match group.domains.iter_mut().find(|(d, _)| *d == domain) {
            Some((_, bytes)) => *bytes += document.bytes,
            None => group.domains.push((domain, document.bytes)),
        }
    }
    groups.sort_by_key(|g| g.id);
    groups
}

/// Which groups are held out. Some are and some are not wherever there are two.
fn choose(groups: &[Group], domains: usize, holdout: f64) -> Vec<bool> {
    let mut held = vec![false; groups.len()];
    if groups.len() < 2 {
        return held;
    }
    let total: u64 = groups.iter().map(|g| g.bytes).sum();
    let target = holdout * total as f64;
    // [domains]
    let mut sizes = vec![(0u64, 0usize); domains];
    for (domain, bytes) in groups.iter().flat_map(|g| &g.domains) {
        sizes[*domain as usize].0 += bytes;
        sizes[*domain as usize].1 += 1;
    }
    let mut held_bytes = 0u64;
    let mut held_of = vec![0u64; domains];
    let hold = |at: usize, held_bytes: &mut u64, held_of: &mut Vec<u64>, held: &mut Vec<bool>| {
        held[at] = true;
        *held_bytes += groups[at].bytes;
        for (domain, bytes) in &groups[at].domains {
            held_of[*domain as usize] += bytes;
        }
    };
    // First, something of every big domain, from small groups if there are. The smallest domain comes first: its groups
    // hold some of the larger ones too, not the other way round.
    for domain in (0..domains).rev() {
        let (bytes, in_groups) = sizes[domain];
        if in_groups < 2 || (bytes as f64) < BIG_DOMAIN * total as f64 {
            continue;
        }
        let wanted = (holdout * bytes as f64).min(65_536.0);
        for largest in [target / 4.0, target / 2.0, target] {
            for at in 0..groups.len() {
                if held_of[domain] as f64 >= wanted {
                    break;
                }
                let group = &groups[at];
                let Some(&(_, gives)) = group.domains.iter().find(|(d, _)| *d as usize == domain) else {
                    continue;
                };
                let leaves_enough = (held_of[domain] + gives) * 2 <= bytes;
                let small =
                    group.bytes as f64 <= largest && (held_bytes + group.bytes) as f64 <= 1.5 * target;
                if !held[at] && leaves_enough && small {
                    hold(at, &mut held_bytes, &mut held_of, &mut held);
                }
            }
        }
    }
    // Then whatever comes next in the order, as far as it fits.
    for at in 0..groups.len() {
        if held_bytes as f64 >= 0.95 * target {
            break;
        }
        if !held[at] && (held_bytes + groups[at].bytes) as f64 <= 1.1 * target {
            hold(at, &mut held_bytes, &mut held_of, &mut held);
        }
    }
    if held_bytes == 0
        && let Some(smallest) = (0..groups.len()).min_by_key(|&at| (groups[at].bytes, groups[at].id))
    {
        held[smallest] = true;
    }
    held
}

/// With one file, or a few big ones, only parts of files can be held out: the end of each.
fn cut_ends(corpus: &mut Corpus, domains: &mut Domains, holdout: f64) -> Result<Split> {
    let mut file_bytes: HashMap<u32, u64> = HashMap::new();
    for document in &corpus.documents {
        *file_bytes.entry(document.file).or_default() += document.bytes;
    }
    let mut documents: Vec<Document> = Vec::new();
    let (mut of, mut held_out) = (Vec::new(), Vec::new());
    let (mut any, mut cut_bytes) = (false, 0);
    for (number, document) in corpus.documents.iter().enumerate() {
        let last = corpus.documents.get(number + 1).is_none_or(|next| next.file != document.file);
        let tail = holdout * file_bytes[&document.file] as f64;
        let tail = (tail as u64).min(document.bytes / 2).max(1);
        let parts = if last { corpus.cut_tail(document, tail)? } else { None };
        match parts {
            Some([head, tail]) => {
                cut_bytes += tail.bytes;
                any = true;
                documents.extend([head, tail]);
                held_out.extend([false, true]);
                of.extend([domains.of[number]; 2]);
            }
            None => {
                documents.push(document.clone());
                held_out.push(false);
                of.push(domains.of[number]);
            }
        }
    }
    if !any || cut_bytes == 0 {
        let reason = "the text is too short or has only one row".to_owned();
        return Err(DataError::CannotSplit { reason });
    }
    corpus.documents = documents;
    domains.of = of;
    let held = held_out.iter().filter(|&&h| h).count() as u64;
    Ok(Split {
        groups: held_out.len() as u64,
        groups_held_out: held,
        held_out,
        rule: "the end of each file; there are too few files to hold any out whole".to_owned(),
    })
}

/// Takes the held-out documents that training has too out of both parts' way: they leave the held-out part. Returns the
/// documents to remove. Only for corpora with duplicates.
pub(crate) fn straddlers(corpus: &Corpus, held_out: &[bool]) -> Vec<bool> {
    let of_side = |side: bool| corpus.documents.iter().zip(held_out).filter(move |(_, held)| **held == side);
    let training: HashSet<[u8; 32]> = of_side(false).map(|(d, _)| d.hash).collect();
    corpus.documents.iter().zip(held_out).map(|(d, held)| *held && training.contains(&d.hash)).collect()
}

/// The package that a file belongs to: the first folder of its path named NAME-VERSION, else the given path itself.
fn package_of(corpus: &Corpus, file: usize) -> Option<String> {
    let source = &corpus.files[file];
    let mut folders: Vec<&str> = source.relative.split('/').collect();
    folders.pop();
    let given = corpus.roots[source.root].file_name().map(|n| n.to_string_lossy().into_owned());
    let inner = folders.into_iter().find_map(package_name).map(str::to_owned);
    inner.or_else(|| given.filter(|_| !source.given).as_deref().and_then(package_name).map(str::to_owned))
}

/// `serde-1.0.219` → `serde`; also `foo_1.2.3`, `foo@v1.2.3`, `foo-v2.0-rc.1`. None for a name without a version.
fn package_name(folder: &str) -> Option<&str> {
    folder.char_indices().find_map(|(at, c)| {
        if at == 0 || !matches!(c, '-' | '_' | '@') {
            return None;
        }
        let version = &folder[at + 1..];
        let version = version.strip_prefix('v').unwrap_or(version);
        let digits = version.bytes().take_while(u8::is_ascii_digit).count();
        let minor = version.as_bytes().get(digits) == Some(&b'.')
            && version.as_bytes().get(digits + 1).is_some_and(u8::is_ascii_digit);
        (digits > 0 && minor).then(|| &folder[..at])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_lose_their_version() {
        for (folder, package) in [
            ("serde-1.0.219", Some("serde")),
            ("serde_json-1.0.1", Some("serde_json")),
            ("foo_1.2.3", Some("foo")),
            ("windows_x86_64_gnu-0.52.6", Some("windows_x86_64_gnu")),
            ("toml-1.2.2+spec-1.1.0", Some("toml")),
            ("pkg@v1.2.3", Some("pkg")),
            ("a-v2.0-rc.1", Some("a")),
            ("index.example.org-1949cf8c6b5b557f", None),
            ("utf-8", None),
            ("src", None),
            ("-1.2", None),
            ("é-1.0", Some("é")),
        ] {
            assert_eq!(package_name(folder), package, "{folder}");
        }
    }

    #[test]
    fn the_choice_keeps_near_the_fraction_and_reaches_every_big_domain() {
        let groups: Vec<Group> = (0..200u64)
            .map(|i| {
                let bytes = 1000 + (i * 7919) % 9000;
                let minor = if i % 10 == 0 { 1 } else { 0 };
                Group {
                    id: u128::from(crate::hash::mix(i)),
                    bytes,
                    domains: vec![(0, bytes - bytes / 5), (minor, bytes / 5)],
                    documents: vec![],
                }
            })
            .collect();
        let held = choose(&groups, 2, 0.05);
        let total: u64 = groups.iter().map(|g| g.bytes).sum();
        let sum: u64 = groups.iter().zip(&held).filter(|(_, h)| **h).map(|(g, _)| g.bytes).sum();
        let fraction = sum as f64 / total as f64;
        assert!((0.03..0.08).contains(&fraction), "{fraction}");
        assert!(groups.iter().zip(&held).any(|(g, h)| *h && g.domains[1].0 == 1));
        let two = &groups[..2];
        assert_eq!(choose(two, 2, 0.01).iter().filter(|h| **h).count(), 1, "both parts have something");
    }
}
