//! `convert`, and models in GGUF wherever a model is taken.

#![allow(clippy::unwrap_used)]

mod common;

use common::{BATCH, CALM, Place, done};
use serde_json::Value;
use std::fs;

const TEMPLATE: &str = "{% for m in messages %}{{ m.role[0] + ': ' + m.content + '; ' }}{% endfor %}\
                        {% if add_generation_prompt %}a: {% endif %}";

/// A trained run with a chat template, in GGUF and back in a folder.
fn converted() -> Place {
    let place = Place::new();
    done(place.train("--data text --out run"));
    fs::write(place.path("run/chat_template.jinja"), TEMPLATE).unwrap();
    done(place.senmon(&format!("convert run m.gguf {CALM}")));
    done(place.senmon(&format!("convert m.gguf folder {CALM}")));
    place
}

#[test]
fn a_run_is_the_same_model_in_gguf_and_back() {
    let place = converted();
    let said = |command: &str| {
        let output = done(place.senmon(command));
        String::from_utf8(output.stdout).unwrap()
    };
    let models = ["run", "m.gguf", "folder"];
    let texts =
        models.map(|model| said(&format!("generate {model} --prompt router -n 30 --temperature 1 --quiet")));
    assert!(texts[0].len() > 30);
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:#?}");
    let losses = models.map(|model| {
        let json = said(&format!("eval {model} --data text --sequence 32 --json --quiet"));
        serde_json::from_str::<Value>(&json).unwrap()["bits_per_byte"].clone()
    });
    assert!(losses[0].is_number() && losses.iter().all(|loss| *loss == losses[0]), "{losses:?}");
    let answers = models.map(|model| {
        let questions = place.path("questions");
        fs::write(&questions, "let mut\nthe router\n").unwrap();
        let mut chat = place.senmon(&format!("chat {model} -n 5 --temperature 0 --quiet"));
        let output = chat.stdin(fs::File::open(&questions).unwrap()).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    });
    assert!(answers[0].len() > 4 && answers.iter().all(|text| *text == answers[0]), "{answers:#?}");
    // Trained on, it is a family's again.
    done(place.senmon(&format!("train --init m.gguf --data text --out further {BATCH} --steps 3 {CALM}")));
    assert!(said("inspect further").contains("qwen3_moe"));
    let json: Value = serde_json::from_str(&said("inspect m.gguf --json")).unwrap();
    assert_eq!(json["family"], "qwen3moe (GGUF)");
    assert!(json["memory"]["mapped"].as_u64().unwrap() > 0);
}

#[test]
fn a_type_is_written_and_told() {
    let place = converted();
    for (ty, bytes_of_32) in [("f32", 128), ("f16", 64), ("bf16", 64), ("q8_0", 34)] {
        let out = done(place.senmon(&format!("convert run {ty}.gguf --type {ty} --json {CALM}"))).stdout;
        let json: Value = serde_json::from_slice(&out).unwrap();
        assert!(json["types"][ty.to_uppercase()].as_u64().unwrap() > 5, "{json}");
        let size = fs::metadata(place.path(format!("{ty}.gguf"))).unwrap().len();
        assert!(
            size > json["bytes"].as_u64().unwrap() && json["bytes"].as_u64().unwrap() > 300 * bytes_of_32
        );
        done(place.senmon(&format!("generate {ty}.gguf --prompt fn -n 3 --quiet")));
    }
    // Rows of 32 and 16 are no blocks of 256: what was done instead is said.
    let output = done(place.senmon("convert run q4_k.gguf --type q4_k --threads 1"));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("no whole blocks of Q4_K"), "{said}");
    let out = String::from_utf8(output.stdout).unwrap();
    assert!(out.contains("q4_k.gguf: qwen3moe (GGUF)") && out.contains("Q8_0"), "{out}");
}

#[test]
fn what_cannot_be_converted_is_one_line_and_nothing_is_left() {
    let place = converted();
    fs::write(place.path("text.gguf"), "not a model").unwrap();
    let cases: &[(&str, &[&str])] = &[
        ("convert run q.gguf --type q5_9", &["--type q5_9", "q8_0"]),
        ("convert run m.gguf", &["m.gguf", "is there already"]),
        ("convert run out --type q8_0", &["Q8_0", ".gguf"]),
        ("convert run out --family mixtra", &["mixtra", "mixtral"]),
        ("convert run out --family mixtral", &["mixtral", "cannot say this model"]),
        ("convert none.gguf out", &["none.gguf"]),
        ("convert text.gguf out", &["text.gguf", "not a GGUF file"]),
        ("convert text out", &["text", "config.json is missing"]),
        ("generate text.gguf --prompt a", &["text.gguf", "not a GGUF file"]),
        ("inspect text.gguf", &["text.gguf", "not a GGUF file"]),
        ("train --init text.gguf --data text --out other --steps 1", &["text.gguf"]),
    ];
    for (command, words) in cases {
        let output = place.senmon(command).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && said.lines().count() == 1, "{command}: {said}");
        assert!(words.iter().all(|word| said.contains(word)), "{command}: {said}");
    }
    for name in ["q.gguf", "out", "other"] {
        assert!(!place.path(name).exists(), "{name}");
    }
    // A model that no architecture of GGUF has, by its field.
    done(place.train("--data text --out gelu --set experts.activation=gelu"));
    let output = place.senmon("convert gelu s.gguf").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && said.contains("cannot say this model"), "{said}");
}
