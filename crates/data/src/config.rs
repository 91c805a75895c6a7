//! The `[data]` table of a run configuration: what is read, how it is named, split and tokenized.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{DataError, Result};

/// The keys of `[data]`. Every key has a default; unknown keys are refused by name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Files and folders (read recursively, in sorted order).
    pub paths: Vec<PathBuf>,
    /// The rule that gives each document its domain.
    pub domains: DomainRule,
    /// The text column of `.jsonl` and `.parquet` files.
    pub column: String,
    /// A `tokenizer.json`, or a folder that holds one; without it a byte-level BPE is trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// Size of the vocabulary of a tokenizer trained here, special tokens included (at least 258).
    pub vocab: usize,
    /// Fraction of the bytes held out for evaluation, at least 0 (nothing held out) and at most 0.5.
    pub holdout: f64,
    /// What stays together on one side of the held-out split.
    pub group: GroupRule,
    /// Whether a document equal to an earlier one, byte for byte, is removed.
    pub dedupe: bool,
}

impl Default for DataConfig {
    fn default() -> Self {
        DataConfig {
            paths: Vec::new(),
            domains: DomainRule::Extension,
            column: "text".to_owned(),
            tokenizer: None,
            vocab: 4096,
            holdout: 0.02,
            group: GroupRule::Package,
            dedupe: true,
        }
    }
}

impl DataConfig {
    /// Checks the values that need no file.
    pub fn validate(&self) -> Result<()> {
        let bad = |key, value: String, expected: &str| {
            Err(DataError::BadValue { key, value, expected: expected.to_owned() })
        };
        if self.paths.is_empty() {
            return Err(DataError::NoPaths);
        }
        if !(0.0..=0.5).contains(&self.holdout) {
            return bad("data.holdout", self.holdout.to_string(), "must be between 0 and 0.5");
        }
        if self.tokenizer.is_none() && self.vocab < MIN_VOCAB {
            return bad(
                "vocab",
                self.vocab.to_string(),
                "must be at least 258: 256 bytes and 2 special tokens",
            );
        }
        if self.tokenizer.is_none() && self.vocab > MAX_VOCAB {
            return bad("data.vocab", self.vocab.to_string(), "must be at most 1048576");
        }
        if self.column.is_empty() {
            return bad("data.column", "\"\"".to_owned(), "must name the text column");
        }
        Ok(())
    }
}

/// 256 byte symbols and two special tokens.
pub(crate) const MIN_VOCAB: usize = 258;
pub(crate) const MAX_VOCAB: usize = 1 << 20;

/// The rule that gives each document its domain. Written as a string: `extension`, `folder`,
/// `column:NAME`, or the path of a rule file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DomainRule {
    /// The file's extension in lower case, `none` for a name without one.
    Extension,
    /// The first folder below the given path that not all files share.
    Folder,
    /// A column of `.jsonl` and `.parquet` rows; plain files go by extension.
    Column(String),
    /// A rule file, see [`crate::domains`].
    File(PathBuf),
}

/// What stays together on one side of the held-out split. Written as a string: `package`, `folder`,
/// `file`, or `column:NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupRule {
    /// A package without its version (`serde-1.0.219/…` → `serde`), else the folder.
    Package,
    /// The top folder below the given path, or the next deeper one if all files share it.
    Folder,
    /// Each file by itself.
    File,
    /// A column of `.jsonl` and `.parquet` rows; plain files go by package.
    Column(String),
}

impl FromStr for DomainRule {
    type Err = DataError;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "extension" => Ok(DomainRule::Extension),
            "folder" => Ok(DomainRule::Folder),
            "" => Err(DataError::BadValue {
                key: "data.domains",
                value: "\"\"".to_owned(),
                expected: "must be extension, folder, column:NAME or the path of a rule file".to_owned(),
            }),
            _ => Ok(match s.strip_prefix("column:") {
                Some(name) => DomainRule::Column(name.to_owned()),
                None => DomainRule::File(PathBuf::from(s)),
            }),
        }
    }
}

impl fmt::Display for DomainRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DomainRule::Extension => f.write_str("extension"),
            DomainRule::Folder => f.write_str("folder"),
            DomainRule::Column(name) => write!(f, "column:{name}"),
            DomainRule::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl FromStr for GroupRule {
    type Err = DataError;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "package" => Ok(GroupRule::Package),
            "folder" => Ok(GroupRule::Folder),
            "file" => Ok(GroupRule::File),
            _ => match s.strip_prefix("column:") {
                Some(name) if !name.is_empty() => Ok(GroupRule::Column(name.to_owned())),
                _ => Err(DataError::BadValue {
                    key: "data.group",
                    value: format!("{s:?}"),
                    expected: "must be package, folder, file or column:NAME".to_owned(),
                }),
            },
        }
    }
}

impl fmt::Display for GroupRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GroupRule::Package => f.write_str("package"),
            GroupRule::Folder => f.write_str("folder"),
            GroupRule::File => f.write_str("file"),
            GroupRule::Column(name) => write!(f, "column:{name}"),
        }
    }
}

macro_rules! serde_as_string {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
serde_as_string!(DomainRule);
serde_as_string!(GroupRule);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_a_default_and_unknown_keys_are_named() {
        let config: DataConfig = toml::from_str("paths = ['a']\ndomains = 'folder'\ngroup = 'file'").unwrap();
        assert_eq!(config.domains, DomainRule::Folder);
        assert_eq!(config.group, GroupRule::File);
        assert_eq!(config.vocab, DataConfig::default().vocab);
        let wrong = toml::from_str::<DataConfig>("pathz = ['a']").unwrap_err().to_string();
        assert!(wrong.contains("pathz"), "{wrong}");
        let wrong = toml::from_str::<DataConfig>("group = 'town'").unwrap_err().to_string();
        assert!(wrong.contains("town") && wrong.contains("package"), "{wrong}");
    }

    #[test]
    fn rules_survive_writing_and_reading() {
        for text in ["extension", "folder", "column:source", "rules/my.toml"] {
            assert_eq!(text.parse::<DomainRule>().unwrap().to_string(), text);
        }
        for text in ["package", "folder", "file", "column:repo"] {
            assert_eq!(text.parse::<GroupRule>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        let good = DataConfig { paths: vec!["x".into()], ..DataConfig::default() };
        good.validate().unwrap();
        for (config, word) in [
            (DataConfig { holdout: 0.9, ..good.clone() }, "holdout"),
            (DataConfig { holdout: f64::NAN, ..good.clone() }, "holdout"),
            (DataConfig { vocab: 100, ..good.clone() }, "vocab"),
            (DataConfig { column: String::new(), ..good.clone() }, "column"),
            (DataConfig { paths: vec![], ..good.clone() }, "no data given"),
        ] {
            let message = config.validate().unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }
}
