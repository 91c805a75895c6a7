//! Chat templates: a conversation written as the text that a chat model was trained on, by the Jinja template beside it
//! (`chat_template.jinja`, or `chat_template` in `tokenizer_config.json`).

use crate::error::{ModelError, Result};
use crate::files::is_file;
use crate::gguf;
use crate::tensor_files::read_json;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value as Jinja};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// What one side said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// "system", "user" or "assistant".
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// The template of a model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Where it comes from.
    path: PathBuf,
    /// The special tokens that templates write, by their names in `tokenizer_config.json`.
    tokens: Map<String, Value>,
}

/// What a template sees.
#[derive(Serialize)]
struct Values {
    #[serde(flatten)]
    tokens: Map<String, Value>,
    messages: Vec<Message>,
    add_generation_prompt: bool,
}

/// The work that a template may do for one conversation: an instruction each, and 64 bytes of what it makes. So no template goes
/// on for ever, and none makes more than 256 MiB.
const FUEL: u64 = 4 << 20;
/// Macros within macros, and the like, of a template.
const MAX_RECURSION: usize = 100;
/// Name of the template within its environment.
const NAME: &str = "chat";

impl ChatTemplate {
    /// The template of a model, a folder or a GGUF file, if it has one.
    pub fn of_model(path: &Path) -> Result<Option<Self>> {
        let Some((from, text, tokens)) = text_of(path)? else { return Ok(None) };
        Self::new(&from, text, tokens).map(Some)
    }

    /// A template from its text.
    pub fn new(path: &Path, text: String, tokens: Map<String, Value>) -> Result<Self> {
        let mut environment = Environment::new();
        // As transformers sets Jinja up.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| broken(path, &e))?);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(MAX_RECURSION);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> std::result::Result<Jinja, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| today(&format));
        environment.add_template_owned(NAME, text).map_err(|e| broken(path, &e))?;
        Ok(Self { environment, path: path.into(), tokens })
    }

    /// The conversation as text; with `answer`, up to where the model's answer begins.
    pub fn render(&self, messages: &[Message], answer: bool) -> Result<String> {
        let template = self.environment.get_template(NAME).map_err(|e| broken(&self.path, &e))?;
        let values = Values {
            tokens: self.tokens.clone(),
            messages: messages.to_vec(),
            add_generation_prompt: answer,
        };
        let values = Jinja::from(Serde(values));
        template.render(values).map_err(|e| broken(&self.path, &e))
    }
}

/// The template of a model: where it is, its text, and the special tokens that templates write.
pub(crate) fn text_of(path: &Path) -> Result<Option<(PathBuf, String, Map<String, Value>)>> {
    if gguf::is_gguf(path) {
        let found = gguf::chat_template(path)?;
        return Ok(found.map(|(text, tokens)| (path.into(), text, tokens)));
    }
    let (config, file) = (path.join("tokenizer_config.json"), path.join("chat_template.jinja"));
    let json = if is_file(&config)? { read_json(&config)? } else { Value::Null };
    let mut tokens = Map::new();
    for key in ["bos_token", "eos_token", "pad_token", "unk_token"] {
        // A token, or a description of one.
        let token = json.get(key).map(|token| token.get("content").unwrap_or(token));
        if let Some(Value::String(token)) = token {
            tokens.insert(key.into(), token.as_str().into());
        }
    }
    if is_file(&file)? {
        let text = std::fs::read_to_string(&file).map_err(ModelError::io("read", &file))?;
        return Ok(Some((file, text, tokens)));
    }
    let text = match json.get("chat_template") {
        Some(Value::String(text)) => Some(text.clone()),
        // Several by name: the default one.
        Some(Value::Array(all)) => {
            let named = |name: &str| all.iter().find(|one| one["name"] == name);
            let chosen = named("default").or(all.first());
            chosen.and_then(|one| one["template"].as_str()).map(str::to_owned)
        }
        _ => None,
    };
    Ok(text.map(|text| (config, text, tokens)))
}

fn broken(path: &Path, error: &minijinja::Error) -> ModelError {
    let said = error.to_string();
    ModelError::File {
        path: path.into(),
        what: format!("has a chat template that fails: {}", said.lines().next().unwrap_or_default()),
    }
}

/// Today's date by a few of `strftime`'s letters; others stay as they are.
fn today(format: &str) -> String {
    let seconds =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (year, month, day) = civil(seconds as i64 / 86_400);
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let name = MONTHS[month as usize - 1];
    format
        .replace("%Y", &year.to_string())
        .replace("%m", &format!("{month:02}"))
        .replace("%d", &format!("{day:02}"))
        .replace("%B", name)
        .replace("%b", &name[..3])
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
fn civil(days: i64) -> (i64, i64, i64) {
    // Years begin in March here, so that a leap day is the last of its year; eras are of 400 years.
    let days = days + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In the manner of ChatML, with what templates use of Python.
    const CHATML: &str = "{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
<|im_start|>system
You help.<|im_end|>
    {% endif %}
{{ '<|im_start|>' + message.role + '\n' + message['content'].strip() + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}";

    fn template(text: &str) -> ChatTemplate {
        let tokens = serde_json::json!({ "bos_token": "<s>", "eos_token": "</s>" });
        ChatTemplate::new(Path::new("t.jinja"), text.into(), tokens.as_object().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_conversation_is_written_as_the_template_says() {
        let talk = [Message::new("user", " Hello \n"), Message::new("assistant", "Yes?")];
        let text = template(CHATML).render(&talk[..1], true).unwrap();
        assert_eq!(
            text,
            "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        );
        let mistral = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]\
                       {% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}";
        assert_eq!(template(mistral).render(&talk, false).unwrap(), "<s>[INST]  Hello \n [/INST]Yes?</s>");
    }

    #[test]
    fn templates_that_refuse_or_fail_say_why() {
        let refuses = template(
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}",
        );
        let text = refuses.render(&[Message::new("system", "x")], true).unwrap_err().to_string();
        assert!(text.contains("no system here") && text.contains("t.jinja"), "{text}");
        let text =
            ChatTemplate::new(Path::new("t.jinja"), "{% if %}".into(), Map::new()).unwrap_err().to_string();
        assert!(text.contains("t.jinja") && !text.contains('\n'), "{text}");
    }

    #[test]
    fn a_template_that_would_not_end_ends() {
        let doubles = "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}";
        for hostile in [
            doubles,
            "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}",
            "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
            "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
            "{{ 'a' * 9999999999 }}",
            "{{ ('a' * 9999999).replace('a', 'a' * 9999999) }}",
            "{{ '%B' * 99999 | length }}{{ strftime_now('%B' * 9999999) | length }}{{ ('b' * 9999999) | center(9999999999) }}",
        ] {
            let start = std::time::Instant::now();
            let error = template(hostile).render(&[Message::new("user", "x")], true).unwrap_err().to_string();
            assert!(error.contains("t.jinja") && error.lines().count() == 1, "{error}");
            assert!(start.elapsed().as_secs() < 10, "{hostile}");
        }
        // A long conversation is far from that.
        let talk = vec![Message::new("user", "word ".repeat(500)); 1000];
        assert!(template(CHATML).render(&talk, true).unwrap().len() > 2_400_000);
    }

    #[test]
    fn templates_are_found_where_models_have_them() {
        let dir = tempfile::tempdir().unwrap();
        assert!(ChatTemplate::of_model(dir.path()).unwrap().is_none());
        let config =
            |json: Value| std::fs::write(dir.path().join("tokenizer_config.json"), json.to_string()).unwrap();
        let render = || {
            let template = ChatTemplate::of_model(dir.path()).unwrap().unwrap();
            template.render(&[Message::new("user", "x")], true).unwrap()
        };
        config(serde_json::json!({ "chat_template": "{{ eos_token }}a", "eos_token": { "content": "E" } }));
        assert_eq!(render(), "Ea");
        let several =
            serde_json::json!([{ "name": "tool", "template": "t" }, { "name": "default", "template": "d" }]);
        config(serde_json::json!({ "chat_template": several }));
        assert_eq!(render(), "d");
        std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages | tojson }}").unwrap();
        assert_eq!(render(), r#"[{"role": "user", "content": "x"}]"#);
    }

    #[test]
    fn days_have_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_782), (2026, 11, 25));
        assert_eq!(today("%Y").len(), 4);
        assert_eq!(today("%H"), "%H");
    }
}
