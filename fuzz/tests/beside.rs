//! What lies beside a model: `generation_config.json`, `tokenizer_config.json` and chat templates. Whatever they say, the
//! defaults are read and a conversation is written, or there is an error of one line; a template that would not end, ends.

#![allow(clippy::unwrap_used)]

mod common;

use common::{documents, golden, outcome, word};
use senmon_fuzz::{Documents, fuzz};
use senmon_models::chat::{ChatTemplate, Message};
use senmon_models::generation::GenerationDefaults;
use serde_json::json;
use std::path::Path;

/// Templates in the ways that models write them.
const TEMPLATES: [&str; 5] = [
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nx<|im_end|>\n\
     {% endif %}{{ '<|im_start|>' + message.role + '\n' + message['content'].strip() + '<|im_end|>' + '\n' }}\
     {%- endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{{ bos_token }}{% set ns = namespace(found=false, n=0) %}{%- for m in messages[1:] | list -%}\
     {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}\
     {% set ns.found = true %}{% set ns.n = ns.n + m.content | length %}[INST] {{ m.content | trim | upper }} [/INST]{% endfor %}\
     {{ ns.n ~ eos_token }}",
    "{% macro turn(m, depth=0) %}{{ m.role.title() }}: {{ m.content.split(' ') | join('_') }}{% if depth < 3 %}\
     {{ turn(m, depth + 1) }}{% endif %}{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}\
     {{ strftime_now('%d %B %Y') }}",
    "{% set all = [] %}{% for m in messages | reverse %}{% set all = all + [m] %}{{ all | tojson(indent=2) }}\
     {{ m.content.replace('a', 'bb').startswith('x') }}{{ range(10) | map('string') | join(',') }}{% break %}{% endfor %}",
    "{%- if tools is defined and tools is not none %}{{ tools | tojson }}{% else %}{{ messages | map(attribute='content') | join(' ') }}\
     {{ '%s-%d' | format('a', 3) }}{{ 'x' * 20 }}{{ ('a' if add_generation_prompt else 'b') ~ messages | length }}{% endif %}",
];

fn talk() -> Vec<Message> {
    let said = [("system", "Be short."), ("user", "a b\n c "), ("assistant", "Yes é 日."), ("user", "")];
    said.iter().map(|(role, content)| Message::new(role, *content)).collect()
}

/// A conversation by a template, whichever way it goes.
fn render(template: &ChatTemplate) -> String {
    let whole = template.render(&talk(), true);
    let empty = template.render(&[], false);
    let kind = |rendered: &senmon_models::Result<String>| match rendered {
        Ok(text) if text.is_empty() => "nothing".to_owned(),
        Ok(text) => format!("text {}", text.len().ilog2()),
        Err(e) => template_word(e),
    };
    format!("{} {}", kind(&whole), kind(&empty))
}

/// What a template fails of.
fn template_word(error: &senmon_models::ModelError) -> String {
    word(error);
    let text = error.to_string();
    let what = text.split_once("that fails: ").map_or(&*text, |(_, what)| what);
    what.chars().filter(|c| c.is_ascii_lowercase() || *c == ' ').take(40).collect()
}

#[test]
fn any_template_ends() {
    let seeds: Vec<Vec<u8>> = TEMPLATES.iter().map(|text| text.as_bytes().to_vec()).collect();
    let tokens = json!({ "bos_token": "<s>", "eos_token": "</s>" });
    let target = |input: &[u8]| {
        let text = String::from_utf8_lossy(input).into_owned();
        let tokens = tokens.as_object().unwrap().clone();
        match ChatTemplate::new(Path::new("chat_template.jinja"), text, tokens) {
            Ok(template) => render(&template),
            Err(e) => template_word(&e),
        }
    };
    for seed in &seeds {
        assert!(target(seed).starts_with("text"), "{}", target(seed));
    }
    fuzz("template", &seeds, 20_000, target);
}

#[test]
fn any_defaults_of_generation_are_read_or_refused() {
    let folders = golden(&[""]);
    let mut all = documents(&folders, "generation_config.json");
    all.dedup();
    all.push(
        json!({ "do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2] }),
    );
    let documents = Documents::new(all, &["do_sample", "temperature", "top_k", "top_p", "eos_token_id"]);
    let place = tempfile::tempdir().unwrap();
    let target = |input: &[u8]| {
        let Some((_, value)) = documents.of(input) else { return "no JSON".to_owned() };
        std::fs::write(place.path().join("generation_config.json"), value.to_string()).unwrap();
        outcome(&GenerationDefaults::of_folder(place.path()), "read")
    };
    fuzz("generation", &documents.seeds(), 10_000, target);
}

#[test]
fn any_tokenizer_configuration_has_a_template_or_none() {
    let token = json!({ "content": "<s>", "lstrip": false, "special": true });
    let all = vec![
        json!({ "bos_token": "<s>", "eos_token": token, "chat_template": TEMPLATES[0], "model_max_length": 4096 }),
        json!({ "unk_token": null, "chat_template": [
            { "name": "default", "template": TEMPLATES[1] }, { "name": "tool_use", "template": TEMPLATES[3] },
        ] }),
        json!({ "pad_token": token }),
    ];
    let documents =
        Documents::new(all, &["chat_template", "bos_token", "eos_token", "pad_token", "unk_token"]);
    let place = tempfile::tempdir().unwrap();
    let target = |input: &[u8]| {
        let Some((_, value)) = documents.of(input) else { return "no JSON".to_owned() };
        std::fs::write(place.path().join("tokenizer_config.json"), value.to_string()).unwrap();
        match ChatTemplate::of_model(place.path()) {
            Ok(Some(template)) => render(&template),
            Ok(None) => "none".to_owned(),
            Err(e) => template_word(&e),
        }
    };
    fuzz("tokenizer_config", &documents.seeds(), 10_000, target);
}
