//! A browser's side of the live view: the page, its updates, its coming back, and who is let in.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use senmon_dashboard::{Address, Dashboard, DashboardError, Run};
use senmon_train::alarms::{Alarm, AlarmKind};
use senmon_train::jsonl::Jsonl;
use senmon_train::observer::{
    DomainEval, Ending, EvalRecord, LayerStats, Observer, RunInfo, StepRecord, Summary,
};
use senmon_train::schedule::Limits;
use serde_json::Value;

fn run() -> Run {
    Run {
        name: "runs/<b>a</b>".into(),
        facts: vec![("router".into(), "topk_pre".into())],
        layers: vec![(0, 4), (2, 2)],
    }
}

fn open(run: Run) -> Dashboard {
    let mut dashboard = preparing();
    dashboard.prepared(run);
    dashboard
}

fn preparing() -> Dashboard {
    Dashboard::open("0".parse::<Address>().unwrap().bind().unwrap(), run().name).unwrap()
}

fn info() -> RunInfo {
    RunInfo {
        parameters: 1_000_000,
        active_parameters: 500_000,
        training_tokens: None,
        tokens_per_step: 256,
        limits: Limits { steps: Some(20), ..Limits::default() },
        resumed_from: None,
        seconds_before: 0.0,
        threads: 2,
    }
}

fn step(step: u64) -> StepRecord {
    StepRecord {
        step,
        tokens: 256 * step,
        loss: 5.0 / step as f64,
        lr: 1e-3,
        grad_norm: 1.0,
        tokens_per_second: 1000.0,
        layers: vec![LayerStats::from_counts(0, &[4, 4, 4, 4], 0), LayerStats::from_counts(2, &[step, 1], 3)],
        ..StepRecord::default()
    }
}

fn eval(step: u64) -> EvalRecord {
    let domain = DomainEval { loss: 2.0, bits_per_byte: 1.5, tokens: 100 };
    EvalRecord {
        step,
        tokens: 256 * step,
        eval_loss: 2.0,
        bits_per_byte: 1.5,
        eval_tokens: 100,
        domains: [("rs".to_owned(), domain)].into(),
    }
}

fn alarm(step: u64) -> Alarm {
    Alarm {
        step,
        kind: AlarmKind::DeadExpert,
        layer: Some(2),
        experts: vec![1],
        message: "layer 2: expert 1 had no token for 100 steps".into(),
        remedy: "raise balance.aux".into(),
    }
}

fn request(dashboard: &Dashboard, path: &str, host: Option<&str>) -> BufReader<TcpStream> {
    let url = dashboard.url();
    let at = url.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(at).unwrap();
    // What does not come fails the test.
    stream.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
    let host = host.unwrap_or(at);
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").unwrap();
    BufReader::new(stream)
}

fn get(dashboard: &Dashboard, path: &str, host: Option<&str>) -> String {
    let mut text = String::new();
    request(dashboard, path, host).read_to_string(&mut text).unwrap();
    text
}

/// The address of a page's events, as its script finds it.
fn events_of(page: &str) -> String {
    let data = page.split("id=\"senmon-data\">").nth(1).unwrap().split("</script>").next().unwrap();
    let page: Value = serde_json::from_str(data).unwrap();
    page["live"].as_str().unwrap().to_owned()
}

/// A browser that listens.
struct Browser {
    stream: BufReader<TcpStream>,
    /// The blocks as it was last told of them.
    blocks: BTreeMap<String, Value>,
}

impl Browser {
    fn of(dashboard: &Dashboard) -> Self {
        let page = get(dashboard, "/", None);
        Self { stream: request(dashboard, &events_of(&page), None), blocks: BTreeMap::new() }
    }

    /// One that has heard that the run has come to a step; what it was told first may be a second old.
    fn at_step(dashboard: &Dashboard, step: u64) -> Self {
        let mut browser = Self::of(dashboard);
        let last = |block: &Value| {
            block["series"][0]["x"].as_array().unwrap().last().and_then(Value::as_f64).unwrap_or(0.0)
        };
        browser.wait("loss", |block| last(block) > step as f64 - 20.0);
        browser
    }

    /// The data of the next event; none at the end.
    fn next(&mut self) -> Option<Vec<Value>> {
        let mut line = String::new();
        while self.stream.read_line(&mut line).unwrap() > 0 {
            if let Some(data) = line.strip_prefix("data: ") {
                let new: Vec<Value> = serde_json::from_str(data).unwrap();
                self.blocks.extend(new.iter().map(|b| (b["id"].as_str().unwrap().to_owned(), b.clone())));
                return Some(new);
            }
            line.clear();
        }
        None
    }

    /// Reads on until it is told to load the page anew, to the end.
    fn reloads(mut self) -> bool {
        let mut rest = String::new();
        self.stream.read_to_string(&mut rest).unwrap();
        rest.contains("event: reload")
    }

    /// Reads on until a block is as `is` asks.
    fn wait(&mut self, id: &str, is: impl Fn(&Value) -> bool) -> Vec<Value> {
        let began = Instant::now();
        while let Some(blocks) = self.next() {
            assert!(began.elapsed() < Duration::from_secs(60), "block {id} does not become what it should");
            if blocks.iter().any(|block| block["id"] == id && is(block)) {
                return blocks;
            }
        }
        panic!("the events ended before block {id} was as it should be");
    }
}

#[test]
fn a_browser_sees_a_run_from_its_start_to_its_end() {
    let mut dashboard = preparing();
    let page = get(&dashboard, "/", None);
    assert!(page.starts_with("HTTP/1.1 200") && page.contains("cache-control: no-store"));
    assert!(page.contains("runs/&lt;b&gt;a&lt;/b&gt;") && !page.contains("<b>a</b>"));
    assert!(page.contains("being made ready") && !page.contains("id=\"heat\""));
    let browser = Browser::of(&dashboard);
    // What it has of the run goes into facts and sections, which no event can change.
    dashboard.prepared(run());
    assert!(browser.reloads());
    let browser = Browser::of(&dashboard);
    dashboard.started(&info()).unwrap();
    assert!(browser.reloads());

    let page = get(&dashboard, "/", None);
    assert!(page.contains("tokens a step") && page.contains("topk_pre"));
    let mut browser = Browser::of(&dashboard);
    let all = browser.next().unwrap();
    let ids: Vec<&str> = all.iter().map(|block| block["id"].as_str().unwrap()).collect();
    // Every block that can change stands in the page under the same name.
    assert!(ids.iter().all(|id| page.contains(&format!("id=\"{id}\""))), "{ids:?}");

    for number in 1..=10 {
        dashboard.step(&step(number)).unwrap();
    }
    let at = |text: &'static str| move |block: &Value| block["sentence"].to_string().contains(text);
    browser.wait("state", at("Step 10 of 20, 50 % of the run"));
    dashboard.evaluated(&eval(10)).unwrap();
    let changed = browser.wait("domains", |block| block["rows"][0][0] == "rs");
    // What has not changed is not sent again.
    assert!(!changed.iter().any(|block| block["id"] == "heat"), "{changed:?}");
    dashboard.alarm(&alarm(10)).unwrap();
    browser.wait("alarm", |block| block.to_string().contains("raise balance.aux"));

    let ending = Ending::Done;
    let summary =
        Summary { ending, steps: 10, tokens: 2560, seconds: 61.0, tokens_per_second: 1.0, eval: None };
    dashboard.finished(&summary).unwrap();
    drop(dashboard);
    browser.wait("state", at("The run is over after 10 steps and 1 min 1 s"));
    assert_eq!(browser.next(), None);
}

#[test]
fn one_that_comes_later_finds_everything() {
    let mut dashboard = open(run());
    dashboard.started(&info()).unwrap();
    drop(Browser::of(&dashboard));
    for number in 1..=5000 {
        dashboard.step(&step(number)).unwrap();
    }
    dashboard.evaluated(&eval(5000)).unwrap();
    dashboard.failed("the loss is not finite");
    let browser = Browser::at_step(&dashboard, 5000);
    let block = |id: &str| &browser.blocks[id];
    assert!(block("state").to_string().contains("the loss is not finite"));
    // From the first step to the last, in few points.
    let xs: Vec<f64> = serde_json::from_value(block("loss")["series"][0]["x"].clone()).unwrap();
    assert!(xs.len() <= 400 && xs[0] < 20.0 && *xs.last().unwrap() > 4980.0, "{xs:?}");
    // Layer 2 has two experts; the rest of its row is empty, and it is the least even one.
    let heat: Vec<Option<f64>> = serde_json::from_value(block("heat")["values"].clone()).unwrap();
    // Shares of an even one, which is another in each layer.
    assert_eq!(heat[..4], [Some(1.0); 4]);
    assert!(heat[4].unwrap() > 1.98 && heat[6..] == [None, None]);
    assert!(block("moves")["title"].as_str().unwrap().starts_with("Layer 2"));
    assert_eq!(block("moves")["rows"].as_array().unwrap().len(), 2);
}

#[test]
fn a_resumed_run_shows_what_came_before() {
    let folder = tempfile::tempdir().unwrap();
    let metrics = folder.path().join("metrics.jsonl");
    let mut file = Jsonl::create(&metrics).unwrap();
    for number in 1..=3 {
        file.step(&step(number)).unwrap();
    }
    file.evaluated(&eval(3)).unwrap();
    file.alarm(&alarm(3)).unwrap();
    let mut dashboard = open(run());
    dashboard.remember(&metrics, &|| false).unwrap();
    dashboard.started(&RunInfo { resumed_from: Some(3), ..info() }).unwrap();
    assert!(get(&dashboard, "/", None).contains("Step 3 of 20, 15 % of the run"));
    dashboard.step(&step(4)).unwrap();
    let mut browser = Browser::of(&dashboard);
    browser.wait("state", |block| block["sentence"].to_string().contains("Step 4 of"));
    let block = |id: &str| &browser.blocks[id];
    assert_eq!(block("loss")["series"][0]["x"], serde_json::json!([1, 2, 3, 4]));
    assert_eq!(block("loss")["series"][1]["x"], serde_json::json!([3]));
    assert_eq!(block("all-alarms")["rows"].as_array().unwrap().len(), 1);
    assert!(block("state").to_string().contains("Step 3 is saved."));
}

#[test]
fn a_history_that_cannot_be_read_leaves_what_came_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let metrics = folder.path().join("metrics.jsonl");
    let mut file = Jsonl::create(&metrics).unwrap();
    file.step(&step(1)).unwrap();
    drop(file);
    let mut text = std::fs::read_to_string(&metrics).unwrap();
    text.push_str("{\"step\": 2}\n");
    std::fs::write(&metrics, text).unwrap();
    let mut dashboard = open(run());
    assert!(dashboard.remember(&metrics, &|| false).unwrap_err().to_string().contains("line 2"));
    let all = Browser::of(&dashboard).next().unwrap();
    let loss = all.iter().find(|block| block["id"] == "loss").unwrap();
    assert_eq!(loss["series"][0]["x"], serde_json::json!([1]));
}

#[test]
fn speed_is_tokens_over_time() {
    let mut dashboard = open(run());
    dashboard.started(&info()).unwrap();
    // Equal tokens at 1000 and at 100 a second: 2 / (1/1000 + 1/100) = 182 a second.
    dashboard.step(&step(1)).unwrap();
    dashboard.step(&StepRecord { tokens_per_second: 100.0, ..step(2) }).unwrap();
    let all = Browser::of(&dashboard).next().unwrap();
    let figures = all.iter().find(|block| block["id"] == "figures").unwrap();
    let speed =
        figures["figures"].as_array().unwrap().iter().find(|f| f["caption"] == "tokens per second").unwrap();
    assert!((speed["value"].as_f64().unwrap() - 2.0 / (0.001 + 0.01)).abs() < 1e-6, "{speed}");
    let curve = all.iter().find(|block| block["id"] == "speed").unwrap();
    assert_eq!(curve["series"][0]["y"], serde_json::json!([1000, 100]));
}

#[test]
fn a_page_is_made_once_a_second_however_many_ask() {
    let mut dashboard = open(run());
    dashboard.started(&info()).unwrap();
    let pages: Vec<String> = (1..=20)
        .map(|number| {
            dashboard.step(&step(number)).unwrap();
            get(&dashboard, "/", None)
        })
        .collect();
    // Made of the first step, or where this machine was slow of a few more; but the newest comes by an event.
    let of_step = |page: &String| page.split("Step ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    let different: BTreeSet<String> = pages.iter().map(of_step).collect();
    assert!(different.len() < 10, "{different:?}");
    Browser::of(&dashboard).wait("state", |block| block["sentence"].to_string().contains("Step 20 of"));
}

#[test]
fn a_dense_run_has_no_load() {
    let mut dashboard = open(Run { layers: Vec::new(), ..run() });
    dashboard.started(&info()).unwrap();
    dashboard.step(&StepRecord { layers: Vec::new(), ..step(1) }).unwrap();
    let page = get(&dashboard, "/", None);
    assert!(page.starts_with("HTTP/1.1 200") && !page.contains("id=\"heat\""));
}

#[test]
fn only_this_machine_by_its_own_name() {
    let everyone = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    assert!(matches!(Dashboard::open(everyone, "a"), Err(DashboardError::Exposed(_))));
    let dashboard = open(run());
    for path in ["/", "/events"] {
        assert!(get(&dashboard, path, Some("evil.example")).starts_with("HTTP/1.1 403"), "{path}");
    }
    assert!(get(&dashboard, "/", Some("localhost")).starts_with("HTTP/1.1 200"));
    assert!(get(&dashboard, "/metrics.jsonl", None).starts_with("HTTP/1.1 404"));
}

#[test]
fn a_page_of_another_run_loads_this_one() {
    let mut first = open(run());
    first.started(&info()).unwrap();
    let events = events_of(&get(&first, "/", None));
    let second = open(run());
    let mut text = String::new();
    request(&second, &events, None).read_to_string(&mut text).unwrap();
    assert!(text.contains("event: reload") && text.matches("data:").count() == 1, "{text}");
}
