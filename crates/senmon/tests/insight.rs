//! What `inspect` says of a text's routing, and `replay` of a trace: files, figures that agree with each other, and mistakes.

#![allow(clippy::unwrap_used)]

mod common;

use common::{CALM, Place, json, number, refused};
use senmon_insight::Trace;
use serde_json::Value;

#[test]
fn a_text_is_looked_at_and_routed_again() {
    let place = Place::new();
    let mut train = place.train("--data text --out run --json --trace-every 2");
    train.args(["--set", "train.trace_tokens=64"]);
    json(train);
    for step in [0, 2, 3] {
        let trace = Trace::read(&place.path(format!("run/traces/step-{step:08}.safetensors"))).unwrap();
        assert_eq!(trace.len(), 64);
    }

    let inspect = format!("inspect run --max-tokens 512 --trace t.safetensors --report r.html --json {CALM}");
    let said = json(place.senmon(&inspect));
    let statistics = &said["routing"]["statistics"];
    assert_eq!(
        (number(statistics, "/tokens"), statistics["domains"].clone()),
        (512.0, serde_json::json!(["rs", "md"]))
    );
    assert_eq!(number(statistics, "/layers/0/load/assignments"), 1024.0);
    let checked = said.pointer("/routing/checked/0").unwrap().as_array().unwrap();
    assert_eq!(checked.len(), 4);
    assert!(checked.iter().all(|expert| expert.pointer("/ablation/all/count").unwrap() == 512));
    let trace = Trace::read(&place.path("t.safetensors")).unwrap();
    assert_eq!((trace.len(), trace.about.router.as_str()), (512, "topk_pre"));
    let page = std::fs::read_to_string(place.path("r.html")).unwrap();
    assert!(page.contains("What the experts of run do") && page.contains("When routing settled"));
    assert!(page.contains("default-src 'none'") && !page.contains("src=\"http"), "a page fetches nothing");

    assert!(page.contains("Experts alike"));
    let bare =
        format!("inspect run --max-tokens 64 --report bare.html --no-ablation --no-likeness --json {CALM}");
    let bare = json(place.senmon(&bare));
    assert!(bare.pointer("/routing/checked").is_none_or(Value::is_null));
    assert!(!std::fs::read_to_string(place.path("bare.html")).unwrap().contains("Experts alike"));
    refused(place.senmon(&format!("inspect run --no-likeness {CALM}")), &["--no-likeness", "--data"]);

    // As recorded, nothing changes: the loads are those of the trace, and so is the loss.
    let again = json(place.senmon(&format!("replay t.safetensors --model run --json {CALM}")));
    assert_eq!(again.pointer("/layers/0/counts"), statistics.pointer("/layers/0/load/counts"));
    assert_eq!(number(&again, "/loss/recorded"), number(&again, "/loss/replayed"));
    let one =
        json(place.senmon(&format!("replay t.safetensors --top-k 1 --cache 2 --model run --json {CALM}")));
    assert_eq!(number(&one, "/layers/0/assignments"), 512.0);
    assert_ne!(number(&one, "/loss/recorded"), number(&one, "/loss/replayed"));
    assert!(number(&one, "/layers/0/cache/rate/value") > 0.0);
    let three = json(place.senmon(&format!("replay t.safetensors --top-k 3 --model run --json {CALM}")));
    assert_eq!(number(&three, "/layers/0/assignments"), 1536.0);
    let tight =
        format!("replay t.safetensors --capacity 0.5 --together 64 --drop gate --model run --json {CALM}");
    let tight = json(place.senmon(&tight));
    assert!(number(&tight, "/layers/0/dropped") > 400.0);

    let ranks =
        format!("replay t.safetensors --ranks 2 --placement suggested --placement-out p.json --json {CALM}");
    let suggested = json(place.senmon(&ranks));
    let read =
        json(place.senmon(&format!("replay t.safetensors --ranks 2 --placement p.json --json {CALM}")));
    let cost = |said: &Value| number(said, "/layers/0/ranks/sent_per_token/value");
    assert_eq!(cost(&suggested), cost(&read));
    let contiguous = json(place.senmon(&format!("replay t.safetensors --ranks 2 --json {CALM}")));
    assert!(cost(&suggested) <= cost(&contiguous) + 0.2);

    // Two moments of the run on the same text.
    let two = format!(
        "inspect run/checkpoints/step-00000000 --compare run --data text --max-tokens 256 --report two.html --json {CALM}"
    );
    let two = json(place.senmon(&two));
    assert_eq!(number(&two, "/first/tokens"), number(&two, "/second/tokens"));
    assert!(number(&two, "/agreement/0/experts/value") > 0.4);
    assert!(std::fs::read_to_string(place.path("two.html")).unwrap().contains("Experts in common"));
    refused(place.senmon(&format!("inspect run --compare run --trace x.safetensors {CALM}")), &["--compare"]);

    // The table, for people.
    let output =
        place.senmon(&format!("inspect run --max-tokens 512 --trace u.safetensors {CALM}")).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("512 tokens of 16 texts in 2 domains") && text.contains("load CV"), "{text}");
    let output = place.senmon(&format!("replay t.safetensors --ranks 2 --cache 1 {CALM}")).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("imbalance") && text.contains("cache hits"), "{text}");

    refused(place.senmon(&format!("replay t.safetensors --top-k 9 {CALM}")), &["9 per token", "4 experts"]);
    refused(place.senmon(&format!("replay t.safetensors --top-k 0 {CALM}")), &["top_k = 0"]);
    refused(place.senmon(&format!("replay t.safetensors --capacity -1 {CALM}")), &["capacity factor"]);
    refused(place.senmon(&format!("replay t.safetensors --placement suggested {CALM}")), &["--ranks"]);
    refused(place.senmon(&format!("replay t.safetensors --ranks 3 --placement p.json {CALM}")), &["ranks"]);
    refused(place.senmon(&format!("replay t.safetensors --ranks 2 --placement r.html {CALM}")), &["r.html"]);
    refused(place.senmon(&format!("replay run/config.json {CALM}")), &["config.json"]);
    refused(place.senmon(&format!("replay nowhere.safetensors {CALM}")), &["nowhere.safetensors"]);
    refused(place.senmon(&format!("replay t.safetensors --model text {CALM}")), &["text"]);
    refused(place.senmon(&format!("inspect run --report no/such/r.html {CALM}")), &["no/such"]);
    refused(place.senmon(&format!("inspect run --data nothing --trace v.safetensors {CALM}")), &["nothing"]);
    assert!(!place.path("v.safetensors").exists());
}

#[test]
fn a_dense_model_has_no_experts_to_look_at() {
    let place = Place::new();
    json(place.train("--data text --out dense --json --set model.ffn=dense"));
    refused(place.senmon(&format!("inspect dense --report r.html {CALM}")), &["no experts"]);
    assert!(!place.path("r.html").exists());
    let error = place.train("--data text --out other --set model.ffn=dense --trace-every 1");
    refused(error, &["train.trace_every", "no experts"]);
}
