//! The name of a model: `owner/name`, perhaps with a revision, or with what tells its GGUF file from others.

use crate::error::{HubError, Result};
use std::fmt;
use std::path::{Component, Path};

/// A model of the hub, and which of its versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// `owner/name`.
    pub repository: String,
    /// A branch, a tag or a commit.
    pub revision: Option<String>,
    /// A part of the name of a GGUF file.
    pub file: Option<String>,
}

/// Most characters of an owner or a name, as the hub has it.
const MAX_LEN: usize = 96;

impl Name {
    /// `text` has the form of a name: two words with a slash between. A path may have it too; then the path is meant.
    pub fn looks_like(text: &str) -> bool {
        let (repository, ..) = split(text);
        let words: Vec<&str> = repository.split('/').collect();
        words.len() == 2 && words.iter().all(|word| is_word(word))
    }

    /// Reads `owner/name`, `owner/name@revision`, `owner/name:FILE` or `owner/name@revision:FILE`.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |what: &str| HubError::Name { name: text.into(), what: what.into() };
        let (repository, revision, file) = split(text);
        if !Self::looks_like(text) {
            return Err(wrong("a name is owner/name, of letters, digits, '-', '_' and '.'"));
        }
        if revision.is_some_and(|revision| !is_revision(revision)) {
            return Err(wrong("what follows '@' is no branch, tag or commit"));
        }
        if file.is_some_and(str::is_empty) {
            return Err(wrong("what follows ':' is a part of the name of a GGUF file, such as Q4_K_M"));
        }
        Ok(Self {
            repository: repository.into(),
            revision: revision.map(str::to_owned),
            file: file.map(str::to_owned),
        })
    }

    /// The revision, or the branch that is meant where none is said.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.repository)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        if let Some(file) = &self.file {
            write!(f, ":{file}")?;
        }
        Ok(())
    }
}

/// Repository, revision and file; a revision has no colon.
fn split(text: &str) -> (&str, Option<&str>, Option<&str>) {
    let (text, file) = match text.split_once(':') {
        Some((text, file)) => (text, Some(file)),
        None => (text, None),
    };
    match text.split_once('@') {
        Some((repository, revision)) => (repository, Some(revision), file),
        None => (text, None, file),
    }
}

/// An owner or a name as the hub has them: neither "." nor "..", and nothing that a folder of the cache could mistake.
fn is_word(word: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let inner = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    word.len() <= MAX_LEN
        && word.chars().all(plain)
        && inner(word.chars().next())
        && inner(word.chars().last())
        && !word.contains("..")
        && !word.contains("--")
}

/// A branch, a tag, a commit, or `refs/pr/1`: what can be a file in `refs` of the cache, and nowhere else.
fn is_revision(revision: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./+".contains(c);
    revision.chars().all(plain) && is_inside(revision)
}

/// A relative path that stays in the folder it is relative to, on every system.
pub(crate) fn is_inside(path: &str) -> bool {
    let plain = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.ends_with('.');
    path.split('/').all(plain)
        && !path.contains(['\\', ':'])
        && !path.chars().any(char::is_control)
        && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

/// A commit: forty digits.
pub(crate) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|c| c.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_a_revision_and_a_file() {
        let name = |repository: &str, revision: Option<&str>, file: Option<&str>| Name {
            repository: repository.into(),
            revision: revision.map(str::to_owned),
            file: file.map(str::to_owned),
        };
        for (text, expected) in [
            ("allenai/OLMoE-1B-7B-0924", name("allenai/OLMoE-1B-7B-0924", None, None)),
            ("a/b@v1.0", name("a/b", Some("v1.0"), None)),
            ("a/b@refs/pr/1", name("a/b", Some("refs/pr/1"), None)),
            ("a/b:Q4_K_M", name("a/b", None, Some("Q4_K_M"))),
            ("a/b@main:q8_0", name("a/b", Some("main"), Some("q8_0"))),
        ] {
            let parsed = Name::parse(text).unwrap();
            assert_eq!(parsed, expected);
            assert_eq!(parsed.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in [
            "", "a", "/a", "a/", "a/b/c", "../a", "a/..", "./a", "~/a", "a b/c", "a--b/c", "a/b..c", "-a/b",
            "a/.b",
        ] {
            assert!(!Name::looks_like(text), "{text}");
            assert!(Name::parse(text).is_err(), "{text}");
        }
        for text in ["a/b@", "a/b@../c", "a/b@/c", "a/b@c/../../d", "a/b@c\\d", "a/b@.c", "a/b:", "a/b@c d"] {
            assert!(Name::looks_like(text), "{text}");
            assert!(Name::parse(text).unwrap_err().is_users_mistake(), "{text}");
        }
    }

    #[test]
    fn paths_that_leave_their_folder_are_known() {
        for path in ["a", "a.safetensors", "a/b.gguf", "a b/c-00001-of-00002.gguf"] {
            assert!(is_inside(path), "{path}");
        }
        for path in ["", "/a", "../a", "a/../b", "a//b", "a/", ".a", "a/.b", "C:a", "a\\b", "a\nb", "..", "."]
        {
            assert!(!is_inside(path), "{path}");
        }
    }
}
