//! The command line as people and programs meet it: help, completions, the manual page, and results as JSON.

#![allow(clippy::unwrap_used)]

mod common;

use common::{CALM, Place, done, golden, json, number, printed};
use safetensors::SafeTensors;
use senmon::models::text::{encode, load_tokenizer};
use std::process::Command;

/// The verbs, and those of `bench`.
const VERBS: &[&str] = &[
    "train",
    "eval",
    "generate",
    "chat",
    "convert",
    "logits",
    "inspect",
    "bench",
    "bench layer",
    "bench train",
    "bench generate",
    "completions",
    "man",
];

#[test]
fn every_help_has_an_example() {
    let place = Place::new();
    let without = |verb: &&&str| !printed(place.senmon(&format!("{verb} --help"))).contains("Example");
    let missing: Vec<_> = [""].iter().chain(VERBS).filter(without).collect();
    assert!(missing.is_empty(), "without an example: {missing:?}");
}

#[test]
fn completions_name_every_verb() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = printed(place.senmon(&format!("completions {shell}")));
        for word in VERBS.iter().flat_map(|verb| verb.split(' ')).chain(["temperature", "resume"]) {
            assert!(script.contains(word), "{shell} does not complete {word}");
        }
    }
}

#[test]
fn the_manual_page_names_every_verb() {
    let place = Place::new();
    let page = printed(place.senmon("man"));
    assert!(page.contains(".TH senmon 1"));
    for verb in VERBS.iter().filter(|verb| !verb.contains(' ')) {
        assert!(page.contains(&format!(".SH \"SENMON {}\"", verb.to_uppercase())), "no section for {verb}");
    }
}

#[test]
fn the_manual_page_has_the_flags_of_every_verb() {
    let place = Place::new();
    let page = printed(place.senmon("man"));
    // A dash is escaped, lest it become a hyphen. The last two are of `bench layer` and of `bench train`.
    for flag in ["resume", "max-tokens", "temperature", "column", "experts", "layers"] {
        assert!(page.contains(&format!("\\-\\-{}", flag.replace('-', "\\-"))), "no --{flag}");
    }
}

#[test]
fn a_run_and_all_that_is_asked_of_it() {
    let place = Place::new();
    // Talk goes elsewhere, also where nobody asks for silence.
    let talkative = |command: &str| place.senmon(&command.replace("--quiet", ""));
    let mut command = place.train("--data text --out run --json");
    command.args(["--set", "train.save_every=1"]);
    let run = json(command);
    assert_eq!(run["out"], "run");
    assert_eq!((number(&run, "/steps"), number(&run, "/tokens")), (3.0, 192.0));
    let (all, active) = (number(&run, "/parameters"), number(&run, "/active_parameters"));
    assert!(0.0 < active && active < all && all < 30_000.0, "{active} of {all}");
    if cfg!(target_os = "linux") {
        let memory = number(&run, "/peak_memory_bytes");
        assert!((1e6..4e9).contains(&memory), "{memory}");
    }
    let load = &run["load"];
    assert_eq!((load.as_array().unwrap().len(), number(load, "/0/layer")), (1, 0.0));
    let shares: Vec<f64> = load[0]["load"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    assert!(shares.len() == 4 && (shares.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{shares:?}");
    // The logarithm of 300 tokens is 5.7; three steps change little.
    let loss = number(&run, "/eval/eval_loss");
    assert!((4.0..6.5).contains(&loss), "{loss}");

    // The same text, the same model.
    let eval = json(talkative(&format!("eval run --json {CALM}")));
    assert!((number(&eval, "/loss") - loss).abs() < 1e-9, "{eval:#}");
    assert!((number(&eval, "/perplexity") / loss.exp() - 1.0).abs() < 1e-9);
    assert_eq!(number(&eval, "/bits_per_byte"), number(&run, "/eval/bits_per_byte"));
    let domains = eval["domains"].as_object().unwrap();
    assert_eq!(domains.keys().collect::<Vec<_>>(), ["md", "rs"]);
    let tokens: f64 = domains.values().map(|domain| number(domain, "/tokens")).sum();
    assert!(tokens > 1000.0 && tokens == number(&eval, "/tokens"), "{eval:#}");

    let inspect = json(talkative(&format!("inspect run --json {CALM}")));
    assert_eq!((number(&inspect, "/parameters"), number(&inspect, "/active_parameters")), (all, active));
    assert_eq!((number(&inspect, "/layers/0/experts"), number(&inspect, "/layers/0/top_k")), (4.0, 2.0));
    assert_eq!((number(&inspect, "/hidden"), number(&inspect, "/vocab")), (32.0, 300.0));
    assert!(number(&inspect, "/audit/tensors") > 10.0 && inspect["audit"]["unused"] == serde_json::json!([]));
    assert_eq!(inspect["family"], run["family"]);
}

#[test]
fn a_text_depends_on_the_seed_alone() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    let command = |flags: &str| place.senmon(&format!("generate run --prompt token -n 40 {flags} {CALM}"));
    let generate = |flags: &str| json(command(&format!("{flags} --json")));
    let one = generate("--seed 1");
    assert_eq!(one["prompt"], "token");
    assert!(number(&one, "/prompt_tokens") >= 1.0 && number(&one, "/decode_tokens_per_second") > 0.0);
    let tokens: Vec<u64> = one["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect();
    assert!(!tokens.is_empty() && tokens.len() <= 40 && tokens.iter().all(|t| *t < 300), "{tokens:?}");
    assert!(tokens.len() == 40 || one["finish"] == "end of text", "{one:#}");
    let same = generate("--seed 1");
    assert_eq!((&one["text"], &one["tokens"]), (&same["text"], &same["tokens"]));
    assert_ne!(one["tokens"], generate("--seed 2")["tokens"]);
    // The likeliest token needs no drawing.
    let greedy = generate("--temperature 0 --seed 1");
    assert_eq!(greedy["tokens"], generate("--temperature 0 --seed 2")["tokens"]);
    assert_ne!(greedy["tokens"], one["tokens"]);
    // For people it is the same text, after the prompt.
    assert_eq!(printed(command("--seed 1")), format!("token{}\n", one["text"].as_str().unwrap()));
}

#[test]
fn logits_are_those_that_generation_goes_by() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    let greedy =
        json(place.senmon(&format!("generate run --prompt token -n 8 --temperature 0 --json {CALM}")));
    let added: Vec<u32> = serde_json::from_value(greedy["tokens"].clone()).unwrap();
    let tokenizer = load_tokenizer(&place.path("run/tokenizer.json")).unwrap();
    let prompt = encode(&tokenizer, "token").unwrap();
    assert_eq!((added.len(), number(&greedy, "/prompt_tokens")), (8, prompt.len() as f64), "{greedy:#}");
    let text: Vec<u32> = prompt.iter().chain(&added).copied().collect();
    let ids: Vec<String> = text.iter().map(u32::to_string).collect();
    let command =
        |flags: &str| place.senmon(&format!("logits run --tokens {} {flags} {CALM}", ids.join(",")));
    let said = json(command("--out logits --json"));
    assert_eq!(said, serde_json::json!({ "out": "logits", "shape": [text.len(), 300] }));
    let bytes = std::fs::read(place.path("logits")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.names(), ["logits"]);
    let view = file.tensor("logits").unwrap();
    assert_eq!(view.shape(), [text.len(), 300]);
    let logits: Vec<f32> =
        view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    assert!(logits.iter().all(|x| x.is_finite()));
    let likeliest = |row: &[f32]| (0..300u32).max_by(|a, b| row[*a as usize].total_cmp(&row[*b as usize]));
    // Each token that was added is the likeliest after those before it.
    let rows = logits.chunks_exact(300).skip(prompt.len() - 1);
    assert_eq!(rows.take(8).filter_map(likeliest).collect::<Vec<_>>(), added);
    // Without --json the file is all there is.
    assert_eq!(printed(command("--out again")), "");
    assert!(std::fs::read(place.path("again")).unwrap() == bytes);
}

#[test]
fn every_value_is_looked_at_once_and_again_when_the_file_changes() {
    let place = Place::new();
    let model = golden(&place, "mixtral-top2");
    let logits = |flags: &str| {
        let out = place.path("logits.safetensors");
        place.senmon(&format!("logits {} --tokens 1,2 --out {} {flags}", model.display(), out.display()))
    };
    let audits = || std::fs::read_dir(place.path("cache/audits")).map_or(0, Iterator::count);
    done(logits("--audit structure"));
    assert_eq!(audits(), 0);
    done(logits(""));
    done(logits(""));
    assert_eq!(audits(), 1);
    // The last value becomes no number.
    let file = model.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&file, &bytes).unwrap();
    for flags in ["", "--audit full"] {
        let output = logits(flags).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("is NaN") && said.contains("model.safetensors"), "{said}");
    }
    done(logits("--audit structure"));
}

#[test]
fn a_checkpoint_says_what_stays_in_its_files() {
    let place = Place::new();
    let inspect =
        |name: &str| json(place.senmon(&format!("inspect {} --json", golden(&place, name).display())));
    let plain = inspect("mixtral-top2");
    // All but norms and routers lie in the file.
    assert!(number(&plain, "/memory/mapped") > 20.0 * number(&plain, "/memory/held"));
    // The experts of gpt-oss lie across in the file.
    let turned = inspect("gpt_oss-sinks-window-yarn");
    assert!(number(&turned, "/memory/held") > number(&turned, "/memory/mapped") / 2.0);
    let text =
        printed(place.senmon(&format!("inspect {} --audit structure", place.path("mixtral-top2").display())));
    assert!(text.contains("in the files") && !text.contains("finite"), "{text}");
}

#[test]
fn an_encoder_decoder_has_tokens_of_its_decoder() {
    let place = Place::new();
    let model = golden(&place, "switch_transformers-within-capacity");
    let run = |flags: &str| {
        let out = place.path("logits.safetensors");
        let mut command =
            place.senmon(&format!("logits {} --tokens 5,6,7 --out {}", model.display(), out.display()));
        command.args(flags.split_whitespace()).arg("--json");
        command
    };
    assert_eq!(json(run(""))["shape"], serde_json::json!([1, 64]));
    assert_eq!(json(run("--decoder-tokens 0,3,4"))["shape"], serde_json::json!([3, 64]));
    let fails = |mut command: Command, part: &str| {
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && said.contains(part), "{said}");
    };
    fails(run("--decoder-tokens 64"), "64");
    fails(place.senmon(&format!("inspect {}", model.display())), "encoder-decoder");
    let plain = golden(&place, "mixtral-top2");
    let out = place.path("l.safetensors");
    let wrong = format!("logits {} --tokens 1 --decoder-tokens 1 --out {}", plain.display(), out.display());
    fails(place.senmon(&wrong), "--decoder-tokens");
}

#[test]
fn another_number_of_experts_is_one_that_the_model_has() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    let run = |k: usize| {
        place.senmon(&format!("generate run --prompt fn -n 4 --temperature 0 --json --experts-per-token {k}"))
    };
    assert_eq!(json(run(1))["tokens"].as_array().map(Vec::len), Some(4));
    for k in [0, 99] {
        let output = run(k).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && said.contains("--experts-per-token"), "{said}");
    }
}

#[test]
fn tokens_are_ruled_out_and_their_probabilities_told() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    let run = |flags: &str| {
        json(place.senmon(&format!("generate run --prompt fn -n 6 --temperature 0 --json {flags}")))
    };
    let plain = run("--logprobs 3");
    let first = &plain["logprobs"][0];
    assert_eq!(plain["logprobs"].as_array().map(Vec::len), plain["tokens"].as_array().map(Vec::len));
    // Without penalties the likeliest token is taken, and its probability is the first of the list.
    assert_eq!(
        (&first["token"], &first["logprob"]),
        (&first["top"][0]["token"], &first["top"][0]["logprob"])
    );
    assert!(number(&plain, "/logprobs/0/top/0/logprob") >= number(&plain, "/logprobs/0/top/1/logprob"));
    let out = first["token"].as_u64().unwrap();
    let without = run(&format!("--logit-bias {out}=-inf --logprobs 1"));
    assert_ne!(without["tokens"][0], plain["tokens"][0]);
    // What is told is the model's own distribution.
    assert_eq!(without["logprobs"][0]["top"][0], first["top"][0]);
    // A heavy penalty lets no token come twice.
    let once = run("--frequency-penalty 1000");
    let tokens: Vec<u64> = once["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect();
    assert_eq!(tokens.iter().collect::<std::collections::BTreeSet<_>>().len(), tokens.len());
    for (flags, part) in [
        ("--logit-bias 5", "5"),
        ("--logit-bias 99999999=1", "99999999"),
        ("--min-p 2", "min-p"),
        ("--repetition-penalty 0", "repetition-penalty"),
    ] {
        let output = place.senmon(&format!("generate run --prompt fn {flags}")).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && said.contains(part), "{said}");
    }
}

#[test]
fn a_conversation_goes_on_and_goes_back() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    let talk = |lines: &str| {
        let questions = place.path("questions");
        std::fs::write(&questions, lines).unwrap();
        let mut command = place.senmon("chat run -n 5 --temperature 1 --top-p 1 --quiet");
        command.stdin(std::fs::File::open(&questions).unwrap()).output().unwrap()
    };
    let without = talk("fn\n");
    let said = String::from_utf8(without.stderr).unwrap();
    assert!(without.status.code() == Some(2) && said.contains("no chat template"), "{said}");
    let template = "{% for m in messages %}{{ m.role[0] + ': ' + m.content + '; ' }}{% endfor %}\
                    {% if add_generation_prompt %}a: {% endif %}";
    std::fs::write(place.path("run/chat_template.jinja"), template).unwrap();
    let answers = |lines: &str| {
        let output = talk(lines);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        (String::from_utf8(output.stdout).unwrap(), said)
    };
    let (one, _) = answers("let mut\n");
    let (two, _) = answers("let mut\nthe router\n");
    assert!(!one.trim().is_empty() && two.starts_with(&one) && two.len() > one.len(), "{one:?} {two:?}");
    // Taken back, the second answer comes again; begun again, the first.
    let (again, _) = answers("let mut\nthe router\n/undo\nthe router\n/clear\nlet mut\n");
    assert_eq!(again, format!("{two}{}{one}", &two[one.len()..]));
    let (_, said) = answers("/nothing\n/help\n/exit\nlet mut\n");
    assert!(said.contains("/nothing is not known") && said.contains("/undo"), "{said}");
}
