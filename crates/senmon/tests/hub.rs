//! Models by their names on the hub, from a hub on this machine: what is asked for, what lies in the cache, and what happens
//! when something breaks.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/hub.rs"]
mod server;

use common::{CALM, Place, done};
use safetensors::SafeTensors;
use server::{COMMIT, Faults, HubServer};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder of a golden model.
fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden").join(name)
}

const MIXTRAL: &str = "mixtral-top2";

/// A repository with a golden model in two shards, and with files that nobody should want.
fn sharded() -> BTreeMap<String, Vec<u8>> {
    let folder = golden(MIXTRAL);
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut names: Vec<_> = tensors.names().into_iter().map(str::to_owned).collect();
    names.sort();
    let (mut files, mut map) = (BTreeMap::new(), serde_json::Map::new());
    for (shard, names) in names.chunks(names.len().div_ceil(2)).enumerate() {
        let file = format!("model-0000{}-of-00002.safetensors", shard + 1);
        let part = names.iter().map(|name| (name.clone(), tensors.tensor(name).unwrap()));
        files.insert(file.clone(), safetensors::serialize(part, None).unwrap());
        map.extend(names.iter().map(|name| (name.clone(), file.clone().into())));
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map }).to_string();
    files.insert("model.safetensors.index.json".into(), index.into());
    for file in ["config.json", "generation_config.json"] {
        files.insert(file.into(), fs::read(folder.join(file)).unwrap());
    }
    for file in ["modeling_mine.py", "pytorch_model.bin", "README.md", "training_args.pt"] {
        files.insert(file.into(), b"import os".to_vec());
    }
    files
}

/// The binary, with a server and a cache of its own.
fn senmon(place: &Place, server: &HubServer, arguments: &str) -> Command {
    let mut command = place.senmon(arguments);
    for variable in ["HF_HUB_OFFLINE", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE"] {
        command.env_remove(variable);
    }
    for proxy in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"] {
        command.env_remove(proxy).env_remove(proxy.to_lowercase());
    }
    command.env("HF_ENDPOINT", &server.endpoint);
    command
}

fn inspect(place: &Place, server: &HubServer) -> Command {
    senmon(place, server, &format!("inspect owner/name --json {CALM}"))
}

/// Runs what must fail with this status and one line that has these words.
fn fails(mut command: Command, status: i32, words: &[&str]) -> String {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{command:?} said: {error}");
    assert!(error.starts_with("error: ") && error.lines().count() == 1, "not one line: {error}");
    for word in words {
        assert!(error.contains(word), "does not say {word:?}: {error}");
    }
    error
}

/// The folder of the repository in the cache.
fn cached(place: &Place) -> PathBuf {
    place.path("hf/hub/models--owner--name")
}

fn snapshot(place: &Place) -> PathBuf {
    cached(place).join("snapshots").join(COMMIT)
}

/// The files of the snapshot are those of the server, byte for byte.
fn assert_whole(place: &Place, files: &BTreeMap<String, Vec<u8>>) {
    let wanted = files.iter().filter(|(name, _)| name.ends_with(".json") || name.ends_with(".safetensors"));
    for (name, bytes) in wanted {
        assert!(fs::read(snapshot(place).join(name)).unwrap() == *bytes, "{name} has other bytes");
    }
    let left = fs::read_dir(cached(place).join("blobs")).unwrap().flatten();
    let left: Vec<_> = left.map(|file| file.path()).filter(|path| path.extension().is_some()).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

#[test]
fn a_sharded_model_is_fetched_once_and_only_what_it_needs() {
    let (place, server) = (Place::new(), HubServer::new(sharded()));
    let output = done(inspect(&place, &server));
    let local = format!("inspect {} --json {CALM}", golden(MIXTRAL).display());
    let expected = done(place.senmon(&local)).stdout;
    let field =
        |bytes: &[u8], name: &str| serde_json::from_slice::<serde_json::Value>(bytes).unwrap()[name].clone();
    for name in ["parameters", "family", "audit"] {
        assert!(!field(&expected, name).is_null(), "{name}");
        assert_eq!(field(&output.stdout, name), field(&expected, name), "{name}");
    }
    assert_whole(&place, &sharded());
    let asked = server.asked();
    assert_eq!(asked[0].path, "/api/models/owner/name/revision/main");
    for unwanted in [".py", ".bin", ".pt", "README"] {
        assert!(!asked.iter().any(|asked| asked.path.contains(unwanted)), "{unwanted} of {asked:?}");
    }
    let read = |path: &str| fs::read_to_string(cached(&place).join(path)).unwrap();
    assert_eq!(read("refs/main"), COMMIT);
    if cfg!(unix) {
        let link = fs::read_link(snapshot(&place).join("config.json")).unwrap();
        assert!(link.starts_with("../../blobs"), "{link:?}");
    }

    // The second time only what the branch is now is asked.
    done(inspect(&place, &server));
    let again = server.asked();
    assert_eq!(again.len(), 1, "{again:?}");
    assert!(again[0].path.starts_with("/api/"));
}

#[test]
fn a_revision_is_asked_for_by_its_name() {
    let (place, server) = (Place::new(), HubServer::new(sharded()));
    done(senmon(&place, &server, &format!("inspect owner/name@refs/pr/1 {CALM}")));
    assert_eq!(server.asked()[0].path, "/api/models/owner/name/revision/refs%2Fpr%2F1");
    assert!(cached(&place).join("refs/refs/pr/1").is_file());
}

#[test]
fn a_connection_that_breaks_is_gone_on_with() {
    let (place, server) = (Place::new(), HubServer::new(sharded()));
    server.fail(Faults { cuts: 1, cut_after: 1000, ..Faults::default() });
    done(inspect(&place, &server));
    assert!(server.asked().iter().any(|asked| asked.from == Some(1000)));
    assert_whole(&place, &sharded());
}

#[test]
fn a_download_that_failed_is_gone_on_with_by_the_next_command() {
    let (place, server) = (Place::new(), HubServer::new(sharded()));
    server.fail(Faults { cuts: usize::MAX, cut_after: 0, ..Faults::default() });
    fails(inspect(&place, &server), 1, &["owner/name", "broke off at byte 0", "again"]);
    // One connection gives 1000 bytes, those after it none.
    let partial = cached(&place).join("blobs");
    let partial = fs::read_dir(partial).unwrap().flatten().map(|file| file.path());
    let partial = partial.into_iter().find(|path| path.extension().is_some()).unwrap();
    fs::write(&partial, &sharded()["model-00001-of-00002.safetensors"][..1000]).unwrap();
    assert!(!snapshot(&place).join("model-00001-of-00002.safetensors").exists());
    assert!(!cached(&place).join("refs/main").exists());
    server.asked();
    server.fail(Faults::default());
    done(inspect(&place, &server));
    assert!(server.asked().iter().any(|asked| asked.from == Some(1000)));
    assert_whole(&place, &sharded());
}

#[test]
fn a_server_that_cannot_go_on_begins_again() {
    let (place, server) = (Place::new(), HubServer::new(sharded()));
    server.fail(Faults { cuts: 1, cut_after: 1000, no_ranges: true, ..Faults::default() });
    done(inspect(&place, &server));
    assert_whole(&place, &sharded());
}

#[test]
fn the_token_goes_to_the_hub_and_nowhere_else() {
    let (place, server) = (Place::new(), HubServer::new(sharded()));
    let mut command = inspect(&place, &server);
    command.env("HF_TOKEN", "hf_secret");
    done(command);
    let asked = server.asked();
    let (large, hub): (Vec<_>, Vec<_>) = asked.iter().partition(|asked| asked.path.starts_with("/large/"));
    assert!(!large.is_empty() && large.iter().all(|asked| asked.token.is_none()), "{large:?}");
    let sent = |token: &str| hub.iter().all(|asked| asked.token.as_deref() == Some(token));
    assert!(hub.len() > 5 && sent("Bearer hf_secret"), "{hub:?}");
}

#[test]
fn the_token_of_a_login_is_used() {
    let (place, server) = (Place::new(), HubServer::new(sharded()));
    fs::create_dir(place.path("hf")).unwrap();
    fs::write(place.path("hf/token"), "hf_login\n").unwrap();
    server.fail(Faults { files: Some(403), ..Faults::default() });
    let error = fails(inspect(&place, &server), 2, &["owner/name", "403", "licence"]);
    assert!(!error.contains("hf_login"));
    assert!(server.asked().iter().all(|asked| asked.token.as_deref() == Some("Bearer hf_login")));
}

#[test]
fn without_a_network_the_cache_is_enough() {
    let (place, server) = (Place::new(), HubServer::new(sharded()));
    let offline = |name: &str| place.senmon(&format!("inspect {name} {CALM}"));
    fails(offline("owner/name"), 2, &["owner/name", "no such path", "models--owner--name", "HF_HUB_OFFLINE"]);
    // A part of a model is not a model.
    server.fail(Faults { cuts: usize::MAX, cut_after: 0, ..Faults::default() });
    fails(inspect(&place, &server), 1, &[]);
    fails(senmon_offline_at(&place, COMMIT), 2, &["owner/name", "only a part", "missing", "HF_HUB_OFFLINE"]);
    server.fail(Faults::default());
    done(inspect(&place, &server));
    server.asked();
    done(offline("owner/name"));
    done(senmon_offline_at(&place, COMMIT));
    fails(offline("owner/name@other"), 2, &["owner/name@other", "HF_HUB_OFFLINE"]);
    fails(offline("owner/other"), 2, &["owner/other", "HF_HUB_OFFLINE"]);
    assert!(server.asked().is_empty());

    // A server that is not there: a port that was free a moment ago.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let unreachable = |name: &str| {
        let mut command = senmon(&place, &server, &format!("inspect {name} --threads 1"));
        command.env("HF_ENDPOINT", format!("http://{free}"));
        command
    };
    let output = done(unreachable("owner/name"));
    let note = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        note.contains("note: ") && note.contains("cannot be reached") && note.contains("cache"),
        "{note}"
    );
    fails(unreachable("owner/other"), 1, &["owner/other", "cannot be reached", "no such path"]);
}

fn senmon_offline_at(place: &Place, commit: &str) -> Command {
    place.senmon(&format!("inspect owner/name@{commit} {CALM}"))
}

#[test]
fn what_a_server_refuses_is_one_line() {
    let (place, server) = (Place::new(), HubServer::new(sharded()));
    let listing = |status| Faults { listing: Some(status), ..Faults::default() };
    let files = |status| Faults { files: Some(status), ..Faults::default() };
    for (faults, status, words) in [
        (listing(404), 2, &["owner/name", "no such path", "no such model", "check the name"][..]),
        (listing(401), 2, &["owner/name", "401", "HF_TOKEN", "licence"]),
        (listing(403), 2, &["owner/name", "403", "HF_TOKEN"]),
        (listing(429), 1, &["429", "wait"]),
        (listing(503), 1, &["api/models/owner/name", "503"]),
        (files(401), 2, &["owner/name", "401", "HF_TOKEN", "licence"]),
        (files(500), 1, &["config.json", "500"]),
    ] {
        server.fail(faults);
        fails(inspect(&place, &server), status, words);
    }
    assert!(!snapshot(&place).exists());
}

#[test]
fn names_and_settings_that_cannot_be() {
    let (place, server) = (Place::new(), HubServer::new(sharded()));
    let with = |name: &str| senmon(&place, &server, &format!("inspect {name} {CALM}"));
    fails(with("owner/name@../../x"), 2, &["owner/name@../../x", "branch, tag or commit"]);
    fails(with("owner/name:"), 2, &["owner/name:", "GGUF"]);
    fails(with("a/b/c"), 2, &["a/b/c", "no such"]);
    fails(with("../b"), 2, &["../b", "no such"]);
    fails(with("models/gone.gguf"), 2, &["models/gone.gguf"]);
    assert!(server.asked().is_empty());
    let mut command = with("owner/name");
    command.env("HF_ENDPOINT", "hub.example");
    fails(command, 2, &["HF_ENDPOINT", "hub.example"]);
    // A folder of this name is what is meant.
    let folder = place.path("owner/name");
    fs::create_dir_all(&folder).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(golden(MIXTRAL).join(file), folder.join(file)).unwrap();
    }
    done(with("owner/name"));
    assert!(server.asked().is_empty());
}

#[test]
fn a_hostile_repository_reaches_nothing_outside() {
    for (file, shown) in [("../x.safetensors", "../x"), ("/tmp/x.safetensors", "/tmp/x"), ("a.bin", "a.bin")]
    {
        let (place, server) = (Place::new(), HubServer::new(sharded()));
        server.put(file, "x");
        let index = serde_json::json!({ "weight_map": { "lm_head.weight": file } }).to_string();
        server.put("model.safetensors.index.json", index);
        fails(inspect(&place, &server), 2, &["owner/name", "lm_head.weight", shown, "beside it"]);
        assert!(!server.asked().iter().any(|asked| asked.path.ends_with(shown)));
        assert!(!cached(&place).join("refs/main").exists());
    }
    for etag in ["../../../../escaped", ".hidden", "a/b", ""] {
        let (place, server) = (Place::new(), HubServer::new(sharded()));
        server.fail(Faults { etag: Some(etag.into()), ..Faults::default() });
        fails(inspect(&place, &server), 1, &["config.json", "ETag"]);
        assert!(!place.path("hf/hub").exists());
    }
}

#[test]
fn lengths_and_hashes_are_checked() {
    for (faults, words) in [
        (Faults { longer: -10, ..Faults::default() }, &["more than"][..]),
        (Faults { longer: 10, ..Faults::default() }, &["broke off", "all"]),
        (Faults { flipped: true, ..Faults::default() }, &["SHA-256", "again"]),
    ] {
        let (place, server) = (Place::new(), HubServer::new(sharded()));
        server.fail(faults);
        fails(inspect(&place, &server), 1, &[&["model-00001-of-00002.safetensors"], words].concat());
        assert!(!snapshot(&place).join("model-00001-of-00002.safetensors").exists());
        server.fail(Faults::default());
        done(inspect(&place, &server));
        assert_whole(&place, &sharded());
    }
}

#[test]
fn weights_that_can_hold_programs_are_refused() {
    let mut files = sharded();
    files.retain(|name, _| !name.contains("safetensors"));
    let (place, server) = (Place::new(), HubServer::new(files));
    fails(inspect(&place, &server), 2, &["owner/name", "pytorch_model.bin", "safetensors"]);
    assert_eq!(server.asked().len(), 1);
}

#[test]
fn a_model_that_cannot_be_run_is_refused_before_its_tensors_are_fetched() {
    let (place, server) = (Place::new(), HubServer::new(sharded()));
    server.put("config.json", r#"{"model_type": "mixtrol"}"#);
    fails(inspect(&place, &server), 2, &["config.json", "mixtrol", "mixtral"]);
    assert!(!server.asked().iter().any(|asked| asked.path.contains("safetensors")));
    // Code that a configuration names is not fetched, and does not matter.
    let config = fs::read_to_string(golden(MIXTRAL).join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["auto_map"] = serde_json::json!({ "AutoModelForCausalLM": "modeling_mine.Mine" });
    let (place, server) = (Place::new(), HubServer::new(sharded()));
    server.put("config.json", config.to_string());
    done(inspect(&place, &server));
    assert!(!server.asked().iter().any(|asked| asked.path.contains(".py")));
}

#[test]
fn a_gguf_model_is_chosen_by_a_part_of_its_name() {
    let place = Place::new();
    for ty in ["f32", "f16"] {
        done(place.senmon(&format!("convert {} {ty}.gguf --type {ty} {CALM}", golden(MIXTRAL).display())));
    }
    let file = |name: &str| fs::read(place.path(name)).unwrap();
    let (f32, f16) = (file("f32.gguf"), file("f16.gguf"));
    let server = HubServer::new(BTreeMap::from([("m-F32.gguf".into(), f32), ("m-F16.gguf".into(), f16)]));
    let with = |name: &str| senmon(&place, &server, &format!("inspect {name} {CALM}"));
    fails(with("owner/name"), 2, &["several GGUF models", "m-F16", "m-F32", "owner/name:"]);
    fails(with("owner/name:q4_k_m"), 2, &["q4_k_m", "m-F16"]);
    server.asked();
    done(with("owner/name:f16"));
    assert!(!server.asked().iter().any(|asked| asked.path.contains("F32")));
    assert!(snapshot(&place).join("m-F16.gguf").is_file());
    done(place.senmon(&format!("inspect owner/name:f16 {CALM}")));
}

#[test]
fn a_model_of_the_hub_is_gone_on_with_and_writes_text() {
    let place = Place::new();
    done(place.train("--data text --out first"));
    let names = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    let file = |name: &str| (name.to_owned(), fs::read(place.path("first").join(name)).unwrap());
    let server = HubServer::new(names.map(file).into());
    let sized = format!("{} --steps 2 {CALM}", common::BATCH);
    done(senmon(&place, &server, &format!("train --init owner/name --data text --out second {sized}")));
    let config = fs::read_to_string(place.path("second/senmon.toml")).unwrap();
    assert!(config.contains(COMMIT), "{config}");
    let text = |name: &str| {
        let arguments = format!("generate {name} --prompt fn --max-tokens 8 --seed 3 {CALM}");
        done(senmon(&place, &server, &arguments)).stdout
    };
    assert_eq!(text("owner/name"), text("first"));
}

#[test]
#[cfg(unix)]
fn a_full_disk_is_one_line() {
    let (place, server) = (Place::new(), HubServer::new(sharded()));
    server.put("model-00001-of-00002.safetensors", vec![0; 300_000]);
    let whole = inspect(&place, &server);
    // A limit on the size of files stands for the full disk.
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' XFSZ && ulimit -f 64 && exec \"$0\" \"$@\""]);
    command.arg(whole.get_program()).args(whole.get_args()).current_dir(place.path("."));
    for (variable, value) in whole.get_envs() {
        match value {
            Some(value) => command.env(variable, value),
            None => command.env_remove(variable),
        };
    }
    fails(command, 2, &["cannot write", "incomplete"]);
    assert!(!snapshot(&place).join("model-00001-of-00002.safetensors").exists());
}
