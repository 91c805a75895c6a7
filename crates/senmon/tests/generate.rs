//! `generate` from outside: routing shown and saved, defaults that a model's makers advise, several prompts at once.

#![allow(clippy::unwrap_used)]

mod common;

use common::{CALM, Place, done, golden, json, number, printed};
use senmon::insight::{EMPTY, NONE, Trace};
use serde_json::{Value, json};
use std::process::{Command, Stdio};

/// A place with a run.
fn with_run() -> Place {
    let place = Place::new();
    done(place.train("--data text --out run"));
    place
}

/// `generate` with these flags.
fn generate(place: &Place, flags: &str) -> Command {
    place.senmon(&format!("generate run -n 6 {flags} --threads 1"))
}

/// Standard output and standard error of what must succeed.
fn both(command: Command) -> (String, String) {
    let output = done(command);
    (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// What a command says when it is refused.
fn refused(mut command: Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && said.lines().count() == 1, "{said}");
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    said
}

fn ids(json: &Value) -> Vec<u32> {
    serde_json::from_value(json.clone()).unwrap()
}

#[test]
fn packed_and_exact_products_give_the_same_text() {
    let place = with_run();
    let text = |flags: &str| json(generate(&place, &format!("--prompt fn --temperature 0 --json {flags}")));
    let (packed, exact) = (text(""), text("--exact"));
    // A run's weights are in f32: both ways have the same bits.
    assert_eq!((&packed["tokens"], &packed["text"]), (&exact["tokens"], &exact["text"]));
    // Coded weights are others; a text comes all the same.
    for ty in ["q8_0", "q4_0"] {
        assert_eq!(ids(&text(&format!("--quantize {ty}"))["tokens"]).len(), 6, "{ty}");
    }
}

#[test]
fn the_speed_of_a_model_is_measured_beside_the_machine() {
    let place = with_run();
    let said = json(place.senmon(
        "bench generate run --prompt 16 --tokens 4 --batch 1,3 --runs 1 --quantize q8_0 --json --threads 1",
    ));
    let cases = said["cases"].as_array().unwrap();
    let names: Vec<&str> = cases.iter().map(|case| case["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["pp16", "tg4", "tg4 × 3"]);
    for case in cases {
        for figure in ["tokens_per_second", "gigabytes_per_second", "of_bandwidth", "gflops", "of_peak"] {
            assert!(case[figure].as_f64().is_some_and(|x| x > 0.0 && x.is_finite()), "{figure}: {case}");
        }
    }
    assert!(number(&said, "/read_gbs") > 0.0 && number(&said, "/peak_gflops") > 0.0);
    // The widths of the run are whole blocks of 32, but for that of its experts.
    assert!(said["format"].as_str().unwrap().contains("Q8_0"), "{said}");
}

#[test]
fn the_experts_of_every_token_are_shown_and_saved() {
    let place = with_run();
    let text = "--prompt token --temperature 0";
    let document = json(generate(&place, &format!("{text} --json --show-routing --routing-logits")));
    let routing = &document["routing"];
    let (tokens, made) = (ids(&routing["tokens"]), ids(&document["tokens"]));
    let prompt = number(&document, "/prompt_tokens") as usize;
    // All but the last token passed through the model; that one is a target.
    assert_eq!((tokens.len(), &tokens[prompt..]), (prompt + 5, &made[..5]));
    let targets = ids(&routing["targets"]);
    assert_eq!((&targets[..targets.len() - 1], targets.last()), (&tokens[1..], made.last()));
    // The likeliest token was taken.
    assert_eq!(ids(&routing["predicted"])[prompt - 1..], made);
    let layer = &routing["layers"][0];
    assert_eq!((number(layer, "/layer"), layer["experts"].as_array().unwrap().len()), (0.0, tokens.len()));
    assert_eq!(layer["logits"][0].as_array().unwrap().len(), 4);

    // The same in a file, and nothing of it elsewhere.
    let (said, talk) = both(generate(&place, &format!("{text} --quiet --show-routing=trace.safetensors")));
    assert_eq!((said, talk), (format!("token{}\n", document["text"].as_str().unwrap()), String::new()));
    let trace = Trace::read(&place.path("trace.safetensors")).unwrap();
    assert_eq!((&trace.tokens, &trace.targets), (&tokens, &targets));
    assert_eq!((trace.about.router.as_str(), &trace.about.domains), ("topk_pre", &vec!["text".to_owned()]));
    assert_eq!((trace.about.model.len(), trace.sequence), (64, vec![0; tokens.len()]));
    assert_eq!((trace.layers[&0].count, trace.layers[&0].top_k), (Some(4), 2));
    assert!(trace.layers[&0].logits.is_none() && trace.loss.iter().all(|loss| loss.is_finite()));
    let experts: Vec<u16> =
        serde_json::from_value::<Vec<Vec<u16>>>(layer["experts"].clone()).unwrap().concat();
    assert_eq!(trace.layers[&0].experts, experts);

    // `logits` of these tokens has the same routing.
    let list: Vec<String> = tokens.iter().map(u32::to_string).collect();
    let logits = format!("logits run --tokens {} --out logits --json {CALM}", list.join(","));
    let again = json(place.senmon(&format!("{logits} --show-routing --routing-logits")));
    assert_eq!(again["routing"]["layers"], routing["layers"]);
    assert_eq!(again["routing"]["loss"][0], routing["loss"][0]);
    assert!(again["routing"]["targets"][tokens.len() - 1].is_null());
    assert!(json(place.senmon(&logits)).get("routing").is_none());

    // For people: a line a token, with its text.
    let (said, table) = both(generate(&place, &format!("{text} --quiet --show-routing")));
    assert_eq!(said, format!("token{}\n", document["text"].as_str().unwrap()));
    assert!(table.lines().next().unwrap().contains("layer 0"), "{table}");
    assert_eq!(table.lines().count(), 1 + tokens.len(), "{table}");
    let (first, second) = (&layer["experts"][0][0], &layer["experts"][0][1]);
    let line = table.lines().nth(1).unwrap();
    assert!(line.contains(&format!("{first}:0.")) && line.contains(&format!("{second}:0.")), "{line}");
    assert!(table.lines().all(|line| line.chars().count() <= 100), "{table}");
}

#[test]
fn routing_that_cannot_be_shown_is_refused() {
    let place = with_run();
    done(place.train("--data text --out dense --set model.ffn=dense"));
    let said = refused(place.senmon("generate dense --prompt fn -n 2 --show-routing"));
    assert!(said.contains("--show-routing") && said.contains("no experts"), "{said}");
    let said = refused(generate(&place, "--prompt fn --show-routing=text"));
    assert!(said.contains("text is no file"), "{said}");
    let said = refused(generate(&place, "--prompt fn --quiet --show-routing=nowhere/t.safetensors --json"));
    assert!(said.contains("no folder nowhere") && said.contains("nowhere/t.safetensors"), "{said}");
}

#[test]
fn the_routing_of_an_encoder_decoder_has_two_sequences() {
    let place = Place::new();
    let model = golden(&place, "switch_transformers-drops-head");
    let run = |flags: &str| {
        let tokens: Vec<String> = (2..26).map(|token| token.to_string()).collect();
        let (model, tokens) = (model.display(), tokens.join(","));
        place.senmon(&format!("logits {model} --tokens {tokens} --decoder-tokens 0,5,6 --out l {flags}"))
    };
    done(run("--show-routing=trace"));
    let trace = Trace::read(&place.path("trace")).unwrap();
    assert_eq!(trace.sequence, [vec![0; 24], vec![1; 3]].concat());
    assert!(trace.predicted[..24].iter().all(|token| *token == NONE));
    let names: Vec<_> = trace.layers.values().map(|layer| layer.name.clone().unwrap()).collect();
    assert!(names.iter().any(|name| name.starts_with("encoder.")), "{names:?}");
    assert!(names.iter().any(|name| name.starts_with("decoder.")), "{names:?}");
    let encoder = trace.layers.values().find(|layer| layer.dropped.contains(&1)).expect("a drop");
    assert!(encoder.experts[24..].iter().all(|expert| *expert == EMPTY));
    let (_, table) = both(run("--show-routing"));
    assert!(
        table.contains("sequence 1") && table.contains("dropped") && table.contains("decoder."),
        "{table}"
    );
}

#[test]
fn what_a_models_makers_advise_is_the_default() {
    let place = with_run();
    let advise = |text: Value| {
        std::fs::write(place.path("run/generation_config.json"), text.to_string()).unwrap();
    };
    let run = |flags: &str| json(generate(&place, &format!("--prompt token --seed 4 --json {flags}")));
    let own = run("");
    assert_eq!(own["sampling"]["temperature"], 0.8);
    assert_eq!(
        (&own["sampling"]["top_p"], &own["sampling"]["generation_config"]),
        (&json!(0.95), &json!(false))
    );
    let greedy = run("--temperature 0");
    advise(json!({ "do_sample": false, "temperature": 0.9 }));
    let advised = run("");
    assert_eq!((&advised["tokens"], &advised["sampling"]["temperature"]), (&greedy["tokens"], &json!(0.0)));
    assert_eq!(advised["sampling"]["generation_config"], true);
    // A flag goes before it.
    assert_eq!(run("--temperature 0.8")["tokens"], own["tokens"]);
    advise(
        json!({ "do_sample": true, "temperature": 1.5, "top_k": 3, "top_p": 1.0, "repetition_penalty": 1.5 }),
    );
    let advised = run("");
    assert_eq!(
        advised["tokens"],
        run("--temperature 1.5 --top-k 3 --top-p 1 --repetition-penalty 1.5")["tokens"]
    );
    assert_ne!(advised["tokens"], run("--repetition-penalty 1 --top-k 0")["tokens"]);
    assert_eq!(
        (&advised["sampling"]["top_k"], &advised["sampling"]["repetition_penalty"]),
        (&json!(3), &json!(1.5))
    );
    let (_, line) = both(generate(&place, "--prompt token"));
    assert!(
        line.contains("temperature 1.5, top-k 3, repetition penalty 1.5, with generation_config.json"),
        "{line}"
    );
    // `chat` goes by it too.
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    std::fs::write(place.path("run/chat_template.jinja"), template).unwrap();
    std::fs::write(place.path("question"), "token\n").unwrap();
    let chat = |flags: &str| {
        let mut command = place.senmon(&format!("chat run -n 6 --quiet {flags}"));
        command.stdin(std::fs::File::open(place.path("question")).unwrap());
        printed(command)
    };
    let cold = chat("--temperature 0 --repetition-penalty 1");
    advise(json!({ "do_sample": false }));
    assert_eq!(chat("--seed 1"), cold);
    advise(json!({ "temperature": -1 }));
    let said = refused(generate(&place, "--prompt fn"));
    assert!(said.contains("generation_config.json") && said.contains("temperature"), "{said}");
    let help = printed(place.senmon("generate --help"));
    assert!(help.matches("generation_config.json").count() >= 5, "{help}");
}

const PROMPTS: [&str; 5] = ["token", "the router", "fn", "let mut value of the expert", "impl gate"];

#[test]
fn each_of_several_texts_is_the_one_it_is_alone() {
    let place = with_run();
    std::fs::write(place.path("prompts.txt"), PROMPTS.join("\n\n")).unwrap();
    let rows = PROMPTS.map(|prompt| json!({ "id": 1, "prompt": prompt }).to_string());
    std::fs::write(place.path("prompts.jsonl"), rows.join("\n")).unwrap();
    let alone: Vec<Value> = PROMPTS
        .iter()
        .map(|prompt| {
            let mut command = generate(&place, "--seed 7 --json --show-routing --stop router");
            command.args(["--prompt", prompt]);
            json(command)
        })
        .collect();
    assert!(alone.iter().any(|one| one["tokens"] != alone[0]["tokens"]));
    let same = |found: &Value| {
        let found = found.as_array().unwrap();
        assert_eq!(found.len(), alone.len());
        for (found, alone) in found.iter().zip(&alone) {
            for key in ["prompt", "text", "tokens", "finish", "prompt_tokens", "sampling"] {
                assert_eq!(found[key], alone[key], "{key}");
            }
            for key in ["tokens", "targets", "predicted", "loss", "layers"] {
                assert_eq!(found["routing"][key], alone["routing"][key], "{key}");
            }
        }
    };
    let flags = "--seed 7 --json --show-routing --stop router";
    for (file, batch) in [("prompts.txt", 1), ("prompts.txt", 2), ("prompts.jsonl", 3), ("prompts.jsonl", 8)]
    {
        same(&json(generate(&place, &format!("{flags} --prompts {file} --batch {batch}"))));
    }
    let mut command = generate(&place, flags);
    command.args(PROMPTS.iter().flat_map(|prompt| ["--prompt", prompt]));
    same(&json(command));
    let mut command = generate(&place, &format!("{flags} --prompts -"));
    command.stdin(Stdio::from(std::fs::File::open(place.path("prompts.txt")).unwrap()));
    same(&json(command));
    // One prompt of a file is a list, too.
    std::fs::write(place.path("one.txt"), "token\n").unwrap();
    let one = json(generate(&place, "--prompts one.txt --json"));
    assert_eq!(one.as_array().map(Vec::len), Some(1));
}

#[test]
fn several_texts_come_whole_and_in_order() {
    let place = with_run();
    std::fs::write(place.path("prompts.txt"), PROMPTS.join("\n")).unwrap();
    // The stop string lets some texts end before others.
    let flags = "--prompts prompts.txt --batch 2 --temperature 1 --top-p 1 --stop e";
    let documents = json(generate(&place, &format!("{flags} --json")));
    let documents = documents.as_array().unwrap();
    let expected: String = documents
        .iter()
        .map(|one| format!("{}{}\n", one["prompt"].as_str().unwrap(), one["text"].as_str().unwrap()))
        .collect();
    let (said, talk) = both(generate(&place, flags));
    assert_eq!(said, expected);
    let lines: Vec<&str> = talk.lines().collect();
    assert_eq!(lines[..5], [1, 2, 3, 4, 5].map(|n| format!("[prompt {n} of 5]")), "{talk}");
    assert!(lines.len() == 6 && lines[5].contains("5 prompts"), "{talk}");
    assert_eq!(both(generate(&place, &format!("{flags} --quiet"))), (expected, String::new()));
}

#[test]
fn prompts_that_are_none_are_refused() {
    let place = with_run();
    std::fs::write(place.path("empty.txt"), "\n  \n").unwrap();
    std::fs::write(place.path("rows.jsonl"), "{\"prompt\": \"fn\"}\n{\"text\": \"fn\"}\n").unwrap();
    std::fs::write(place.path("broken.jsonl"), "{\"prompt\": \"fn\"}\n\nfn\n").unwrap();
    std::fs::write(place.path("bytes.txt"), b"caf\xe9\n").unwrap();
    std::fs::write(place.path("long.txt"), format!("fn\n{}\n", "word".repeat(3000))).unwrap();
    for (flags, words) in [
        ("--prompts nowhere.txt", &["cannot read", "nowhere.txt"][..]),
        ("--prompts empty.txt", &["empty.txt", "no prompts"]),
        ("--prompts rows.jsonl", &["rows.jsonl", "line 2", "prompt"]),
        ("--prompts broken.jsonl", &["broken.jsonl", "line 3", "not JSON"]),
        ("--prompts bytes.txt", &["bytes.txt", "cannot read"]),
        ("--prompts long.txt", &["prompt 2", "context 2048"]),
        ("--prompt fn --batch 0", &["--batch 0", "at least 1"]),
    ] {
        let said = refused(generate(&place, flags));
        assert!(words.iter().all(|word| said.contains(word)), "{flags}: {said}");
    }
}

#[test]
fn texts_of_an_encoder_decoder_are_those_they_are_alone() {
    let place = Place::new();
    let model = golden(&place, "switch_transformers-drops-head");
    // A word for each of its 64 tokens.
    let vocab: serde_json::Map<String, Value> = (0..64).map(|id| (format!("w{id}"), id.into())).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [], "pre_tokenizer": { "type": "WhitespaceSplit" }, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "w0" },
    });
    std::fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let words =
        |range: std::ops::Range<usize>| range.map(|id| format!("w{id}")).collect::<Vec<_>>().join(" ");
    let prompts = [words(2..26), words(5..9), words(30..50)];
    let run = |prompts: &[String], flags: &str| {
        let flags = format!("-n 5 --seed 3 --json --show-routing {flags}");
        let mut command =
            place.senmon(&format!("generate switch_transformers-drops-head {flags} --threads 1"));
        command.args(prompts.iter().flat_map(|prompt| ["--prompt", prompt]));
        json(command)
    };
    let together = run(&prompts, "--batch 2");
    let mut dropped = false;
    for (found, prompt) in together.as_array().unwrap().iter().zip(&prompts) {
        let alone = run(std::slice::from_ref(prompt), "");
        assert_eq!((&found["tokens"], &found["text"]), (&alone["tokens"], &alone["text"]));
        assert_eq!(found["routing"]["layers"], alone["routing"]["layers"]);
        // The encoder's tokens, then the decoder's.
        let sequence = ids(&alone["routing"]["sequence"]);
        assert!(sequence.is_sorted() && sequence.first() == Some(&0) && sequence.last() == Some(&1));
        dropped |= alone["routing"]["layers"].to_string().contains("true");
    }
    assert!(dropped, "{together:#}");
}
