//! A domain for each document: by extension, by folder, by a column, or by a rule file.
//!
//! A rule file is TOML,
//!
//! ```toml
//! default = "other"            # optional: what no rule matches
//! [[rule]]
//! match = [".md", "docs/"]     # one pattern, or a list of them
//! domain = "prose"
//! [[rule]]
//! match = "**/tests/*.rs"
//! domain = "tests"
//! ```
//!
//! or, with any other extension than `.toml`, lines of `PATTERN <tab> DOMAIN`, `#` beginning a comment. The first rule that
//! matches decides. A pattern that begins with `.` and has no `/` or `*` is an extension (`.rs`); one that ends in `/` is a
//! folder below the given path (`docs/`); any other is a glob (`*`, `**`, `?`, `[…]`, `{a,b}`), over the path below the given
//! path if it holds a `/`, else over the file's name.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use globset::{GlobBuilder, GlobMatcher};
use serde::Deserialize;

use crate::config::DomainRule;
use crate::error::{DataError, Result};
use crate::source::{Corpus, NO_LABEL, SourceFile};

/// Domains that keep their name; smaller ones are joined into [`OTHER`].
pub(crate) const NAMED_DOMAINS: usize = 31;
/// The domain of what no rule matches, and of the smallest domains together.
pub(crate) const OTHER: &str = "other";

/// Names of domains, largest first, and the domain of each document of a corpus.
#[derive(Debug, PartialEq)]
pub(crate) struct Domains {
    pub(crate) names: Vec<String>,
    /// [documents]
    pub(crate) of: Vec<u16>,
    /// Number of domains joined into [`OTHER`].
    pub(crate) joined: u64,
}

/// Gives every document its domain.
pub(crate) fn assign(corpus: &Corpus, rule: &DomainRule) -> Result<Domains> {
    let of_file: Vec<String> = match rule {
        DomainRule::Extension | DomainRule::Column(_) => corpus.files.iter().map(extension).collect(),
        DomainRule::Folder => {
            let folders = folders(corpus);
            let shared = shared_prefix(&folders);
            folders.iter().map(|f| f.get(shared).map_or_else(|| "top".to_owned(), Clone::clone)).collect()
        }
        DomainRule::File(path) => {
            let rules = RuleFile::read(path)?;
            corpus.files.iter().map(|f| rules.domain(&f.relative).to_owned()).collect()
        }
    };
    let by_column = matches!(rule, DomainRule::Column(_));
    let mut ids: HashMap<&str, usize> = HashMap::new();
    let mut sizes: Vec<(&str, u64)> = Vec::new();
    let first: Vec<usize> = corpus
        .documents
        .iter()
        .map(|d| {
            let name = match d.domain_label {
                label if by_column && label != NO_LABEL => corpus.labels[label as usize].as_str(),
                _ => of_file[d.file as usize].as_str(),
            };
            let id = *ids.entry(name).or_insert_with(|| {
                sizes.push((name, 0));
                sizes.len() - 1
            });
            sizes[id].1 += d.bytes;
            id
        })
        .collect();

    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by(|&a, &b| sizes[b].1.cmp(&sizes[a].1).then(sizes[a].0.cmp(sizes[b].0)));
    let mut names: Vec<String> = Vec::new();
    let mut new_id = vec![0u16; sizes.len()];
    let mut joined = 0;
    for old in order {
        let name = sizes[old].0;
        let fits = names.iter().filter(|n| *n != OTHER).count() < NAMED_DOMAINS;
        let name = if fits { name } else { OTHER };
        joined += u64::from(!fits && sizes[old].0 != OTHER);
        let position = names.iter().position(|n| n == name).unwrap_or_else(|| {
            names.push(name.to_owned());
            names.len() - 1
        });
        new_id[old] = position as u16;
    }
    Ok(Domains { of: first.into_iter().map(|old| new_id[old]).collect(), names, joined })
}

fn extension(file: &SourceFile) -> String {
    let extension = Path::new(&file.relative).extension();
    extension.map_or_else(|| "none".to_owned(), |e| e.to_string_lossy().to_lowercase())
}

/// The folders of each file, outermost first: below the given path, which comes first itself where there are several.
pub(crate) fn folders(corpus: &Corpus) -> Vec<Vec<String>> {
    let several = corpus.roots.len() > 1;
    corpus
        .files
        .iter()
        .map(|file| {
            let mut folders: Vec<String> = file.relative.split('/').map(str::to_owned).collect();
            folders.pop();
            if several && !file.given {
                folders.insert(0, root_name(&corpus.roots, file.root));
            }
            folders
        })
        .collect()
}

/// The last part of a given path, or all of it where two given paths end alike.
fn root_name(roots: &[std::path::PathBuf], root: usize) -> String {
    let name = roots[root].file_name();
    let alone = roots.iter().enumerate().all(|(i, r)| i == root || r.file_name() != name);
    match name {
        Some(name) if alone => name.to_string_lossy().into_owned(),
        _ => roots[root].display().to_string(),
    }
}

/// Number of leading folders that all files share.
pub(crate) fn shared_prefix(folders: &[Vec<String>]) -> usize {
    let Some(first) = folders.first() else { return 0 };
    folders
        .iter()
        .fold(first.len(), |shared, f| f.iter().zip(first).take(shared).take_while(|(a, b)| a == b).count())
}

enum Pattern {
    Extension(String),
    Folder(String),
    Name(GlobMatcher),
    Path(GlobMatcher),
}

impl Pattern {
    fn parse(text: &str) -> std::result::Result<Self, String> {
        let glob = |text: &str| {
            let glob = GlobBuilder::new(text).literal_separator(true).build();
            glob.map(|g| g.compile_matcher()).map_err(|e| format!("pattern {text:?}: {}", e.kind()))
        };
        match text {
            "" => Err("an empty pattern".to_owned()),
            _ if text.starts_with('.') && !text.contains(['/', '*']) => {
                Ok(Pattern::Extension(text[1..].to_lowercase()))
            }
            _ if text.ends_with('/') => Ok(Pattern::Folder(text.trim_start_matches("./").to_owned())),
            _ if text.contains('/') => Ok(Pattern::Path(glob(text.trim_start_matches("./"))?)),
            _ => Ok(Pattern::Name(glob(text)?)),
        }
    }

    fn matches(&self, relative: &str) -> bool {
        let name = relative.rsplit('/').next().unwrap_or(relative);
        match self {
            Pattern::Extension(e) => {
                Path::new(name).extension().is_some_and(|found| found.to_string_lossy().to_lowercase() == *e)
            }
            Pattern::Folder(folder) => relative.starts_with(folder.as_str()),
            Pattern::Name(glob) => glob.is_match(name),
            Pattern::Path(glob) => glob.is_match(relative),
        }
    }
}

/// A domain rule file, read.
struct RuleFile {
    rules: Vec<(Pattern, String)>,
    default: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TomlRules {
    default: Option<String>,
    #[serde(default)]
    rule: Vec<TomlRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TomlRule {
    #[serde(rename = "match")]
    patterns: OneOrMany,
    domain: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl RuleFile {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => {
                DataError::NoSuchFile { path: path.to_owned(), key: "data.domains" }
            }
            _ => DataError::Unreadable { path: path.to_owned(), source },
        })?;
        let toml = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("toml"));
        let rules = if toml { Self::from_toml(&text) } else { Self::from_tsv(&text) };
        let wrong = |reason| DataError::RuleFile { path: path.to_owned(), reason };
        let rules = rules.map_err(wrong)?;
        if rules.rules.is_empty() {
            return Err(wrong("it has no rule".to_owned()));
        }
        Ok(rules)
    }

    fn from_toml(text: &str) -> std::result::Result<Self, String> {
        let parsed: TomlRules = toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(1, |s| text[..s.start.min(text.len())].matches('\n').count() + 1);
            format!("line {line}: {}", e.message())
        })?;
        let mut rules = Vec::new();
        for rule in parsed.rule {
            let patterns = match rule.patterns {
                OneOrMany::One(pattern) => vec![pattern],
                OneOrMany::Many(patterns) => patterns,
            };
            for pattern in patterns {
                rules.push((Pattern::parse(&pattern)?, rule.domain.clone()));
            }
        }
        Ok(RuleFile { rules, default: parsed.default.unwrap_or_else(|| OTHER.to_owned()) })
    }

    fn from_tsv(text: &str) -> std::result::Result<Self, String> {
        let mut rules = Vec::new();
        for (number, line) in text.lines().enumerate() {
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            let at = |reason: &str| format!("line {}: {reason}", number + 1);
            let (pattern, domain) =
                line.split_once('\t').ok_or_else(|| at("expected PATTERN, a tab, DOMAIN"))?;
            let domain = domain.trim();
            if domain.is_empty() {
                return Err(at("the domain is empty"));
            }
            rules.push((Pattern::parse(pattern.trim()).map_err(|e| at(&e))?, domain.to_owned()));
        }
        Ok(RuleFile { rules, default: OTHER.to_owned() })
    }

    fn domain(&self, relative: &str) -> &str {
        let found = self.rules.iter().find(|(pattern, _)| pattern.matches(relative));
        found.map_or(&self.default, |(_, domain)| domain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_rule_that_matches_decides_in_both_forms() {
        let toml = r#"
            default = "rest"
            [[rule]]
            match = [".MD", "docs/"]
            domain = "prose"
            [[rule]]
            match = "**/tests/*.rs"
            domain = "tests"
            [[rule]]
            match = "*.{rs,toml}"
            domain = "code"
        "#;
        let tsv = "# comment\n.md\tprose\ndocs/\tprose\n**/tests/*.rs\ttests\n*.{rs,toml}\tcode\n";
        for (rules, rest) in
            [(RuleFile::from_toml(toml).unwrap(), "rest"), (RuleFile::from_tsv(tsv).unwrap(), OTHER)]
        {
            for (path, domain) in [
                ("README.md", "prose"),
                ("a/b/x.Md", "prose"),
                ("docs/api.rs", "prose"),
                ("a/docs/api.rs", "code"),
                ("x/tests/t.rs", "tests"),
                ("tests/t.rs", "tests"),
                ("x/tests/deep/t.rs", "code"),
                ("Cargo.toml", "code"),
                ("LICENSE", rest),
            ] {
                assert_eq!(rules.domain(path), domain, "{path}");
            }
        }
    }

    #[test]
    fn wrong_rule_files_say_where() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text, words) in [
            ("a.toml", "[[rule]]\nmatch = 'x'\n", "domain"),
            ("b.toml", "\n[[rules]]\n", "line 2"),
            ("c.tsv", "*.rs code\n", "line 1"),
            ("d.tsv", "ok\tx\n[a\tcode\n", "line 2"),
            ("e.tsv", "", "no rule"),
        ] {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            let error = RuleFile::read(&path).err().unwrap().to_string();
            assert!(error.contains(words) && error.contains(name), "{error}");
        }
        assert!(matches!(RuleFile::read(&dir.path().join("none")), Err(DataError::NoSuchFile { .. })));
    }

    #[test]
    fn the_shared_prefix_ends_where_files_part() {
        let f = |path: &str| path.split('/').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(shared_prefix(&[f("a/b/c"), f("a/b/d"), f("a/b")]), 2);
        assert_eq!(shared_prefix(&[f("a"), f("b")]), 0);
        assert_eq!(shared_prefix(&[]), 0);
    }
}
