//! What the environment says: the server, the cache, the token, as Python's `huggingface_hub` reads it.

use crate::error::{HubError, Result};
use std::path::PathBuf;

/// The server where none is named.
const ENDPOINT: &str = "https://huggingface.co";

/// Where models come from, and where they are kept.
#[derive(Clone)]
pub struct Settings {
    /// The server, without a slash at the end: `HF_ENDPOINT`.
    pub endpoint: String,
    /// The folder of all repositories: `HF_HUB_CACHE`, or `hub` in `HF_HOME`.
    pub cache: PathBuf,
    /// What the server knows the user by: `HF_TOKEN`, or the file that logging in writes.
    pub token: Option<String>,
    /// Nothing is downloaded: `HF_HUB_OFFLINE`.
    pub offline: bool,
}

/// What is shown of it has no token.
impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Settings")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.is_some())
            .field("offline", &self.offline)
            .finish()
    }
}

impl Settings {
    /// As the environment says.
    pub fn from_env() -> Result<Self> {
        Self::read(|name| std::env::var(name).ok().filter(|value| !value.trim().is_empty()))
    }

    /// As `variable` says, which has the value of those that are set.
    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let path = |name: &str| variable(name).map(PathBuf::from);
        let home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .or_else(|| std::env::home_dir().map(|home| home.join(".cache/huggingface")));
        let cache = path("HF_HUB_CACHE").or_else(|| home.as_ref().map(|home| home.join("hub")));
        let cache = cache.ok_or_else(|| HubError::Variable {
            variable: "HF_HOME",
            what: "is not set, and there is no home folder: say where models are kept".into(),
        })?;
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let endpoint = endpoint.trim().trim_end_matches('/').to_owned();
        if !["https://", "http://"].iter().any(|scheme| endpoint.starts_with(scheme)) {
            return Err(HubError::Variable {
                variable: "HF_ENDPOINT",
                what: format!("{endpoint:?} is no address such as {ENDPOINT}"),
            });
        }
        let file = path("HF_TOKEN_PATH").or_else(|| home.map(|home| home.join("token")));
        let kept = || std::fs::read_to_string(file?).ok();
        let token = variable("HF_TOKEN").or_else(kept).map(|token| token.trim().to_owned());
        let token = token.filter(|token| !token.is_empty());
        if token.as_ref().is_some_and(|token| !token.bytes().all(|c| c.is_ascii_graphic())) {
            return Err(HubError::Variable {
                variable: "HF_TOKEN",
                what: "the token has characters that no token has".into(),
            });
        }
        let yes = |value: String| ["1", "ON", "YES", "TRUE"].contains(&value.trim().to_uppercase().as_str());
        let offline = variable("HF_HUB_OFFLINE").is_some_and(yes);
        Ok(Self { endpoint, cache, token, offline })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Settings> {
        Settings::read(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string())
        })
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        let cache = |variables: &[(&str, &str)]| read(variables).unwrap().cache;
        assert_eq!(cache(&[("HF_HOME", "/h")]), PathBuf::from("/h/hub"));
        assert_eq!(cache(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]), PathBuf::from("/c"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x")]), PathBuf::from("/x/huggingface/hub"));
    }

    #[test]
    fn the_token_is_of_the_variable_else_of_the_file() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().to_str().unwrap();
        let token = |more: &[(&str, &str)]| {
            read(&[&[("HF_HOME", folder)], more].concat()).map(|settings| settings.token)
        };
        assert_eq!(token(&[]).unwrap(), None);
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(token(&[]).unwrap().unwrap(), "hf_file");
        assert_eq!(token(&[("HF_TOKEN", "hf_variable")]).unwrap().unwrap(), "hf_variable");
        std::fs::write(home.path().join("other"), "hf_other").unwrap();
        let other = home.path().join("other").display().to_string();
        assert_eq!(token(&[("HF_TOKEN_PATH", &other)]).unwrap().unwrap(), "hf_other");
        let error = token(&[("HF_TOKEN", "a\r\nHost: b")]).unwrap_err();
        assert!(error.is_users_mistake() && error.to_string().contains("HF_TOKEN"));
        let shown = format!("{:?}", read(&[("HF_HOME", folder)]).unwrap());
        assert!(!shown.contains("hf_file"), "{shown}");
    }

    #[test]
    fn the_server_and_offline() {
        let home = ("HF_HOME", "/h");
        assert_eq!(read(&[home]).unwrap().endpoint, ENDPOINT);
        assert_eq!(read(&[home, ("HF_ENDPOINT", "http://m/x/")]).unwrap().endpoint, "http://m/x");
        assert!(read(&[home, ("HF_ENDPOINT", "huggingface.co")]).unwrap_err().is_users_mistake());
        for (value, expected) in [("1", true), ("true", true), ("0", false), ("no", false)] {
            assert_eq!(read(&[home, ("HF_HUB_OFFLINE", value)]).unwrap().offline, expected);
        }
    }
}
