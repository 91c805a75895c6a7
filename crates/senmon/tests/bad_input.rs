//! Mistakes of the user: each ends with 2 and one line that says what is wrong, and nothing half-written is left.

#![allow(clippy::unwrap_used)]

mod common;

use common::{BATCH, CALM, MODEL, Place, done, refused};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// All that is below a folder, with the bytes of files: what must not change.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let bytes = if path.is_dir() { None } else { Some(fs::read(&path).unwrap()) };
            if bytes.is_none() {
                folders.push(path.clone());
            }
            found.insert(path, bytes);
        }
    }
    found
}

/// Refuses any difference to what was there, by name.
fn assert_unchanged(folder: &Path, before: &BTreeMap<PathBuf, Option<Vec<u8>>>) {
    let after = contents(folder);
    let names = before.keys().chain(after.keys().filter(|path| !before.contains_key(*path)));
    let changed: Vec<_> = names.filter(|path| before.get(*path) != after.get(*path)).collect();
    assert!(changed.is_empty(), "changed, gone or new: {changed:?}");
}

/// Refuses files that were to be renamed when whole.
fn assert_no_leftovers(folder: &Path) {
    let temporary = |path: &&PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        [".writing-", ".publishing-", ".part-"].iter().any(|start| name.starts_with(start))
            || name.ends_with(".tmp")
    };
    let all = contents(folder);
    let left: Vec<_> = all.keys().filter(temporary).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

/// Cuts a file, and whatever is linked to it.
fn cut(path: &Path, length: u64) {
    fs::File::options().write(true).open(path).unwrap().set_len(length).unwrap();
}

/// The steps of the whole checkpoints of a run.
fn checkpoints(run: &Path) -> Vec<String> {
    let entries = fs::read_dir(run.join("checkpoints")).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A `train` that must be refused before it begins: the folder that it names by --out does not exist afterwards.
fn refused_at_the_start(place: &Place, arguments: &str, words: &[&str]) -> String {
    let error = refused(place.train(&format!("--out run {arguments}")), words);
    assert!(!place.path("run").exists(), "{arguments}: --out was left behind");
    error
}

// ------------------------------------------------------------------------------------------------------------- text

#[test]
fn text_that_is_not_there() {
    let place = Place::new();
    for arguments in ["--data nowhere", "--data text nowhere", "--data text/nowhere"] {
        refused_at_the_start(&place, arguments, &["nowhere", "no such file or folder", "data"]);
    }
    refused_at_the_start(&place, "", &["no text given", "--data"]);
}

#[test]
fn text_that_is_none() {
    let place = Place::new();
    fs::create_dir_all(place.path("binaries/below")).unwrap();
    fs::write(place.path("binaries/zeros"), [0; 500]).unwrap();
    fs::write(place.path("binaries/below/latin"), b"caf\xe9 au lait\n").unwrap();
    fs::write(place.path("binaries/empty.txt"), "").unwrap();
    fs::create_dir(place.path("hollow")).unwrap();
    refused_at_the_start(&place, "--data binaries", &["binaries", "no text", "binary", "UTF-8"]);
    refused_at_the_start(&place, "--data hollow", &["hollow", "no text", "no files"]);
    refused_at_the_start(&place, "--data binaries/empty.txt", &["binaries/empty.txt", "no text", "empty"]);
}

#[test]
fn text_that_is_too_little() {
    let place = Place::new();
    fs::write(place.path("short.txt"), "a line\nand another\n").unwrap();
    refused_at_the_start(&place, "--data short.txt", &["sequence of 32", "give more text"]);
}

#[cfg(unix)]
mod permission {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    use std::os::unix::process::CommandExt;

    /// Who has no rights; the name is `nobody` nearly everywhere.
    const NOBODY: u32 = 65534;

    fn allow(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// A place with a folder `own` that the user of the commands may write to.
    fn place() -> Place {
        let place = Place::new();
        fs::create_dir(place.path("own")).unwrap();
        if is_root(&place) {
            // Root reads everything, so the commands run as somebody else, who must reach the binary and the text.
            allow(&place.path(""), 0o755);
            fs::copy(env!("CARGO_BIN_EXE_senmon"), place.path("senmon")).unwrap();
            allow(&place.path("senmon"), 0o755);
            chown(place.path("own"), Some(NOBODY), Some(NOBODY)).unwrap();
        }
        place
    }

    fn is_root(place: &Place) -> bool {
        fs::metadata(place.path("text")).unwrap().uid() == 0
    }

    /// The same command as a user without rights.
    fn humble(place: &Place, command: Command) -> Command {
        let mut humble = match is_root(place) {
            true => {
                let mut humble = Command::new(place.path("senmon"));
                humble.uid(NOBODY).gid(NOBODY);
                humble
            }
            false => Command::new(command.get_program()),
        };
        humble.args(command.get_args()).current_dir(place.path("")).env_remove("SENMON_SIMD");
        humble.env("SENMON_CACHE", place.path("own/cache"));
        humble
    }

    fn train(place: &Place, arguments: &str) -> Command {
        humble(place, place.train(&format!("--out own/run {arguments}")))
    }

    #[test]
    fn text_that_may_not_be_read() {
        let place = place();
        fs::create_dir(place.path("locked")).unwrap();
        fs::write(place.path("locked/a.txt"), "some text\n".repeat(1000)).unwrap();
        fs::copy(place.path("locked/a.txt"), place.path("locked.txt")).unwrap();
        allow(&place.path("locked"), 0);
        allow(&place.path("locked.txt"), 0);
        for data in ["locked", "locked.txt", "locked/a.txt", "text locked.txt"] {
            let words = ["locked", "Permission denied", "check its permissions"];
            refused(train(&place, &format!("--data {data}")), &words);
            assert!(!place.path("own/run").exists(), "{data}");
        }
        // What proves that it was the permission.
        done(train(&place, "--data text"));
        allow(&place.path("locked"), 0o755);
    }

    #[test]
    fn a_folder_that_may_not_be_written() {
        let place = place();
        fs::create_dir(place.path("sealed")).unwrap();
        allow(&place.path("sealed"), 0o555);
        let sealed = |out: &str| humble(&place, place.train(&format!("--data text --out {out}")));
        refused(sealed("sealed/run"), &["cannot create", "sealed/run", "Permission denied"]);
        refused(sealed("sealed"), &["cannot write", "sealed", "Permission denied"]);
        assert_eq!(fs::read_dir(place.path("sealed")).unwrap().count(), 0);
        done(train(&place, "--data text"));
        let logits = format!("logits own/run --tokens 1 --out sealed/logits.safetensors {CALM}");
        refused(
            humble(&place, place.senmon(&logits)),
            &["cannot write", "sealed/logits", "Permission denied"],
        );
        assert_eq!(fs::read_dir(place.path("sealed")).unwrap().count(), 0);
        allow(&place.path("sealed"), 0o755);
    }

    #[test]
    fn a_model_that_may_not_be_read() {
        let place = place();
        done(train(&place, "--data text"));
        let words = ["cannot read", "own/run", "Permission denied"];
        let commands = [
            "generate own/run",
            "inspect own/run",
            "eval own/run",
            "train --init own/run --data text --steps 1 --out own/new",
        ];
        let tell = |file: &str| {
            allow(&place.path(file), 0);
            for command in commands {
                refused(humble(&place, place.senmon(&format!("{command} {CALM}"))), &words);
                assert!(!place.path("own/new").exists(), "{file}");
            }
        };
        tell("own/run/model.safetensors");
        tell("own/run");
        allow(&place.path("own/run"), 0o755);
    }

    #[test]
    fn a_configuration_that_may_not_be_read() {
        let place = place();
        done(train(&place, "--data text"));
        // It would say what text was held out: not to find it is another mistake than not to be allowed to read it.
        allow(&place.path("own/run/senmon.toml"), 0);
        let words = ["cannot read", "own/run/senmon.toml", "Permission denied"];
        refused(humble(&place, place.senmon(&format!("eval own/run {CALM}"))), &words);
        refused(
            humble(&place, place.senmon(&format!("train --resume --out own/run --steps 5 {CALM}"))),
            &words,
        );
        let train = place.train("--data text --out own/new --config own/run/senmon.toml");
        refused(humble(&place, train), &words);
        assert!(!place.path("own/new").exists());
    }
}

// -------------------------------------------------------------------------------------------------------- tokenizer

#[test]
fn a_tokenizer_that_is_none() {
    let place = Place::new();
    let files: [(&str, &[u8]); 4] = [
        ("prose.txt", b"a line\n"),
        ("other.json", b"{\"model\": 3}"),
        ("empty.json", b""),
        ("bytes.json", &[0xff; 99]),
    ];
    for (name, bytes) in files {
        fs::write(place.path(name), bytes).unwrap();
        let words = [name, "is not a tokenizer", "tokenizer.json"];
        refused_at_the_start(&place, &format!("--data text --tokenizer {name}"), &words);
    }
}

#[test]
fn a_tokenizer_that_is_not_there() {
    let place = Place::new();
    let error =
        refused_at_the_start(&place, "--data text --tokenizer nowhere.json", &["nowhere.json", "tokenizer"]);
    assert!(!error.contains("data.paths"), "the text is there: {error}");
}

// ---------------------------------------------------------------------------------------------------- configuration

/// `train` with this configuration and nothing else that could be wrong.
fn refused_configuration(toml: &str, words: &[&str]) {
    let place = Place::new();
    fs::write(place.path("mine.toml"), toml).unwrap();
    refused(
        place.senmon(&format!("train --out run --data text --config mine.toml --steps 3 {BATCH} {CALM}")),
        words,
    );
    assert!(!place.path("run").exists());
}

#[test]
fn a_configuration_with_an_unknown_key() {
    refused_configuration(
        "[experts]\ntop_kk = 3\n",
        &["mine.toml", "top_kk", "[experts]", "did you mean `top_k`?"],
    );
    refused_configuration("[model]\ntop_k = 3\n", &["mine.toml", "top_k", "did you mean", "[experts]"]);
}

#[test]
fn a_configuration_with_an_unknown_table() {
    refused_configuration("[expertz]\ntop_k = 3\n", &["mine.toml", "[expertz]", "did you mean `experts`?"]);
}

#[test]
fn a_configuration_with_more_experts_per_token_than_experts() {
    let words = ["experts.top_k = 9", "experts.count = 4"];
    refused_configuration("[experts]\ncount = 4\ntop_k = 9\n", &words);
}

#[test]
fn a_configuration_that_is_none() {
    refused_configuration("[experts\ntop_k = 3\n", &["mine.toml", "line 1"]);
    refused_configuration("[model]\nlayers = \"many\"\n", &["model.layers", "many"]);
    let place = Place::new();
    refused_at_the_start(&place, "--data text --config nowhere.toml", &["cannot read", "nowhere.toml"]);
    refused_at_the_start(
        &place,
        "--data text --set model.hiden=64",
        &["--set", "hiden", "did you mean `hidden`?"],
    );
}

// ------------------------------------------------------------------------------------------------------- vocabulary

#[test]
fn a_vocabulary_that_is_too_small() {
    let place = Place::new();
    let words = ["data.vocab = 300", "model.vocab = 280"];
    refused_at_the_start(&place, "--data text --set model.vocab=280", &words);
}

#[test]
fn a_tokenizer_with_more_tokens_than_the_model() {
    let place = Place::new();
    done(place.train("--data text --out small"));
    let larger = MODEL.replace("data.vocab=300", "data.vocab=350");
    done(place.senmon(&format!("train --data text --out large {larger} {BATCH} --steps 1 {CALM}")));
    let arguments =
        format!("--init small --tokenizer large/tokenizer.json --data text {BATCH} --steps 1 {CALM}");
    let words = ["large/tokenizer.json", "350", "300", "the model's own tokenizer"];
    refused(place.senmon(&format!("train --out run {arguments}")), &words);
    assert!(!place.path("run").exists());
}

#[test]
fn a_model_given_and_changed() {
    let place = Place::new();
    done(place.train("--data text --out small"));
    let arguments = format!("--init small --data text --set model.hidden=64 {BATCH} --steps 1 {CALM}");
    refused(place.senmon(&format!("train --out run {arguments}")), &["model.hidden", "--init", "small"]);
    assert!(!place.path("run").exists());
}

// ------------------------------------------------------------------------------------------------------------ --out

#[test]
fn a_folder_that_holds_a_run() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    let before = contents(&place.path("run"));
    refused(place.train("--data text --out run"), &["run", "already holds a run", "--resume", "--out"]);
    assert_unchanged(&place.path("run"), &before);
    done(place.senmon(&format!("train --resume --out run --steps 4 {CALM}")));
}

#[test]
fn a_folder_that_holds_other_files() {
    let place = Place::new();
    fs::create_dir(place.path("letters")).unwrap();
    fs::write(place.path("letters/dear.txt"), "Dear").unwrap();
    let before = contents(&place.path("letters"));
    refused(place.train("--data text --out letters"), &["letters", "not empty", "dear.txt", "--out"]);
    refused(place.train("--data text --out letters/dear.txt"), &["dear.txt", "not a folder", "--out"]);
    assert_unchanged(&place.path("letters"), &before);
}

#[test]
fn an_empty_folder_is_as_empty_after_a_refusal() {
    let place = Place::new();
    fs::create_dir(place.path("hollow")).unwrap();
    refused(place.train("--data nowhere --out hollow"), &["nowhere"]);
    assert_unchanged(&place.path("hollow"), &BTreeMap::new());
}

// ------------------------------------------------------------------------------------------------------ a full disk

#[cfg(unix)]
mod full_disk {
    use super::*;

    /// A command whose files cannot grow beyond so many bytes: writes fail as they do on a full disk, once the signal
    /// that comes first is ignored.
    fn on_full_disk(place: &Place, bytes: u64, command: Command) -> Command {
        let mut full = Command::new("sh");
        let limit = (bytes / block(place)).to_string();
        full.args(["-c", "trap '' XFSZ && ulimit -f \"$0\" && exec \"$@\"", &limit]);
        full.arg(command.get_program()).args(command.get_args()).current_dir(place.path(""));
        full.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .env_remove("SENMON_SIMD");
        full
    }

    /// Bytes of what `ulimit` counts: 512 or 1024, shells differ.
    fn block(place: &Place) -> u64 {
        let script = "trap '' XFSZ; ulimit -f 1; head -c 4096 /dev/zero > block 2> /dev/null";
        Command::new("sh").args(["-c", script]).current_dir(place.path("")).output().unwrap();
        fs::metadata(place.path("block")).unwrap().len()
    }

    /// Bytes of a file of a run.
    fn size(place: &Place, file: &str) -> u64 {
        fs::metadata(place.path(file)).unwrap().len()
    }

    #[test]
    fn at_the_start_of_a_run() {
        let place = Place::new();
        let train = |out: &str| place.train(&format!("--data text --out {out}"));
        // Without room for tokens.
        for bytes in [2048, 65536] {
            refused(on_full_disk(&place, bytes, train("run")), &["cannot write", "cache", "too large"]);
            assert!(!place.path("run").exists());
            assert_no_leftovers(&place.path("cache"));
        }
        // With tokens in the cache, and without room for what a run begins with.
        done(train("other"));
        fs::create_dir(place.path("hollow")).unwrap();
        for file in
            ["tokenizer.json", "model.safetensors", "checkpoints/step-00000000/state/optimizer.safetensors"]
        {
            let bytes = size(&place, &format!("other/{file}")) - 1024;
            let name = Path::new(file).file_name().unwrap().to_str().unwrap();
            for out in ["run", "hollow"] {
                refused(on_full_disk(&place, bytes, train(out)), &["cannot write", out, name, "too large"]);
                assert!(!place.path("run").exists());
                assert_unchanged(&place.path("hollow"), &BTreeMap::new());
            }
        }
        done(train("run"));
    }

    /// A rate of learning that does not depend on how long the run will be.
    const CONSTANT: &str = "--set schedule.kind=constant --set schedule.warmup=0";

    #[test]
    fn at_a_later_checkpoint() {
        let place = Place::new();
        done(place.train(&format!("--data text --out run {CONSTANT}")));
        let before = contents(&place.path("run/checkpoints"));
        let resume = format!("train --resume --out run --steps 9 {CALM}");
        for (file, number) in [("model.safetensors", 4), ("state/optimizer.safetensors", 5)] {
            let bytes = size(&place, &format!("run/checkpoints/step-00000003/{file}")) - 1024;
            let command = place.senmon(&format!("{resume} --set train.save_every={number}"));
            let words =
                ["cannot write", "run/checkpoints/", &format!("step-0000000{number}"), file, "too large"];
            refused(on_full_disk(&place, bytes, command), &words);
            assert_unchanged(&place.path("run/checkpoints"), &before);
            assert_no_leftovers(&place.path("run"));
            done(place.senmon(&format!("inspect run {CALM}")));
        }
        done(place.senmon(&resume));
        // As if it had never happened.
        let whole = format!("train --data text --out whole {MODEL} {BATCH} {CONSTANT} --steps 9 {CALM}");
        done(place.senmon(&whole));
        for file in ["model.safetensors", "checkpoints/step-00000009/state/optimizer.safetensors"] {
            let read = |run: &str| fs::read(place.path(run).join(file)).unwrap();
            assert!(read("run") == read("whole"), "{file} is another");
        }
    }

    #[test]
    fn between_checkpoints() {
        let place = Place::new();
        done(place.train("--data text --out other"));
        // Room for the checkpoints, not for what grows with every step.
        let room = size(&place, "other/checkpoints/step-00000003/state/optimizer.safetensors") + 2048;
        let long = format!("--steps 1000 --set train.save_every=50 {CALM}");
        let train = place.senmon(&format!("train --data text --out run {MODEL} {BATCH} {long}"));
        refused(on_full_disk(&place, room, train), &["cannot write", "run/metrics.jsonl", "too large"]);
        assert_no_leftovers(&place.path("run"));
        let newest = checkpoints(&place.path("run")).pop().unwrap();
        assert!(newest.as_str() > "step-00000099", "{newest}");
        done(place.senmon(&format!("train --resume --out run {CALM}")));
        assert_no_leftovers(&place.path("run"));
        let metrics = fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
        let lines = metrics.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let steps: Vec<u64> = lines
            .filter(|line| line.get("lr").is_some())
            .map(|line| line["step"].as_u64().unwrap())
            .collect();
        assert_eq!(steps, (1..=1000).collect::<Vec<_>>());
    }
}

// ------------------------------------------------------------------------------------------------- files cut short

/// A file of the newest checkpoint is cut: the resumption says so and what to do, and doing it helps.
fn refused_until_removed(file: &str, words: &[&str]) {
    let place = Place::new();
    done(place.train("--data text --out run --set train.save_every=1"));
    let newest = place.path("run/checkpoints/step-00000003");
    let length = fs::metadata(newest.join(file)).unwrap().len();
    let resume = format!("train --resume --out run --steps 5 {CALM}");
    for length in [length - 1, length / 2, 100, 0] {
        cut(&newest.join(file), length);
        let before = contents(&place.path("run"));
        let path = format!("run/checkpoints/step-00000003/{file}");
        refused(place.senmon(&resume), &[&[path.as_str()][..], words].concat());
        assert_unchanged(&place.path("run"), &before);
    }
    fs::remove_dir_all(&newest).unwrap();
    done(place.senmon(&resume));
    assert_eq!(checkpoints(&place.path("run")).last().unwrap(), "step-00000005");
    done(place.senmon(&format!("inspect run {CALM}")));
}

#[test]
fn a_checkpoint_with_a_model_cut_short() {
    refused_until_removed("model.safetensors", &["cut short", "remove this checkpoint"]);
}

#[test]
fn a_checkpoint_with_an_optimiser_cut_short() {
    refused_until_removed(
        "state/optimizer.safetensors",
        &["not a whole optimiser state", "remove this checkpoint"],
    );
}

#[test]
fn a_model_cut_short() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    let model = place.path("run/model.safetensors");
    let length = fs::metadata(&model).unwrap().len();
    for length in [length - 1, length / 2, 100, 5, 0] {
        cut(&model, length);
        for command in [
            "generate run --prompt fn",
            "inspect run",
            "eval run",
            "eval run --data text",
            "logits run --tokens 1 --out logits",
        ] {
            refused(place.senmon(&format!("{command} {CALM}")), &["run/model.safetensors", "cut short"]);
        }
        assert!(!place.path("logits").exists());
    }
}

// --------------------------------------------------------------------------------------------------------- --resume

/// A `train --resume --out run` that must be refused and leave the run as it is.
fn refused_to_resume(place: &Place, arguments: &str, words: &[&str]) {
    let before = contents(&place.path("run"));
    refused(place.senmon(&format!("train --resume --out run {arguments} {CALM}")), words);
    assert_unchanged(&place.path("run"), &before);
}

#[test]
fn a_checkpoint_of_another_shape() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    refused_to_resume(
        &place,
        "--steps 5 --set model.hidden=64",
        &["run/checkpoints/", "hidden", "32", "64", "--out"],
    );
    refused_to_resume(&place, "--steps 5 --set model.layers=2", &["layers", "1", "2", "--out"]);
}

#[test]
fn a_checkpoint_with_other_experts() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    refused_to_resume(
        &place,
        "--steps 5 --set experts.count=8",
        &["run/checkpoints/", "experts", "4", "8", "--out"],
    );
    refused_to_resume(&place, "--steps 5 --set experts.intermediate=24", &["expert", "16", "24", "--out"]);
}

#[test]
fn no_run_to_resume() {
    let place = Place::new();
    let resume = |out: &str| place.senmon(&format!("train --resume --out {out} {CALM}"));
    refused(resume("run"), &["run holds no run to resume", "no such folder"]);
    assert!(!place.path("run").exists());
    let before = contents(&place.path("text"));
    refused(resume("text"), &["text holds no run to resume", "senmon.toml"]);
    assert_unchanged(&place.path("text"), &before);
}

#[test]
fn a_run_that_is_done() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    refused_to_resume(&place, "", &["run is done", "3 steps", "--steps"]);
    refused_to_resume(&place, "--steps 2", &["run is done", "3 steps", "--steps"]);
}

#[test]
fn a_run_that_is_done_keeps_its_configuration() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    let toml = || fs::read_to_string(place.path("run/senmon.toml")).unwrap();
    let before = toml();
    let resume = format!("train --resume --out run --set optimizer.lr=1e-5 {CALM}");
    refused(place.senmon(&resume), &["run is done"]);
    assert!(toml() == before, "what was refused is in senmon.toml");
}

#[test]
fn a_resumption_with_other_text() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    refused_to_resume(&place, "--steps 5 --data text", &["--data", "--resume", "--init run"]);
}

// ------------------------------------------------------------------------------------------------- single arguments

#[test]
fn a_token_beyond_the_vocabulary() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    for tokens in ["300", "5,300,7", "4294967295"] {
        let command = format!("logits run --tokens {tokens} --out logits.safetensors {CALM}");
        refused(
            place.senmon(&command),
            &["token", tokens.split(',').nth(1).unwrap_or(tokens), "vocabulary of 300"],
        );
        assert!(!place.path("logits.safetensors").exists());
    }
}

#[test]
fn a_temperature_below_zero() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    for temperature in ["--temperature=-1", "--temperature -1", "--temperature nan", "--temperature inf"] {
        refused(place.senmon(&format!("generate run {temperature} {CALM}")), &["temperature", "0 or more"]);
    }
}

#[test]
fn a_probability_beyond_one() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    for top_p in ["2", "0"] {
        refused(
            place.senmon(&format!("generate run --top-p {top_p} {CALM}")),
            &["top-p", top_p, "at most 1"],
        );
    }
}

#[test]
fn a_prompt_is_not_printed_before_a_refusal() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    refused(place.senmon(&format!("generate run --prompt fn --top-p 2 {CALM}")), &["top-p"]);
    let long = "word".repeat(3000);
    refused(place.senmon(&format!("generate run --prompt {long} {CALM}")), &["prompt", "context 2048"]);
}

#[test]
fn a_measurement_of_nothing() {
    let place = Place::new();
    for (bench, flags) in [
        ("layer", &["tokens", "hidden", "intermediate", "top-k", "runs"][..]),
        (
            "train",
            &[
                "hidden",
                "layers",
                "heads",
                "vocab",
                "experts",
                "top-k",
                "intermediate",
                "batch",
                "sequence",
                "runs",
            ],
        ),
        ("generate none", &["prompt", "tokens", "batch", "runs"]),
    ] {
        for flag in flags {
            let command = format!("bench {bench} --{flag} 0 {CALM}");
            refused(place.senmon(&command), &[&format!("--{flag} 0"), "at least 1"]);
        }
    }
}

#[test]
fn a_measurement_of_no_experts() {
    let place = Place::new();
    for experts in ["0", "8,0"] {
        let command =
            format!("bench layer --tokens 8 --hidden 8 --intermediate 8 --runs 1 --experts {experts} {CALM}");
        refused(place.senmon(&command), &["--experts 0", "at least 1"]);
    }
}

#[test]
fn a_measurement_of_no_model() {
    let place = Place::new();
    for (flags, words) in [
        ("", &["a model or --shape"][..]),
        ("run --shape olmoe-1b-7b", &["a model or --shape"]),
        ("--shape olmo", &["olmo", "olmoe-1b-7b", "mixtral-8x7b"]),
        ("--shape olmoe-1b-7b --layers 0", &["layers", "0"]),
        ("--shape olmoe-1b-7b --exact", &["--exact", "--shape"]),
        ("--shape olmoe-1b-7b --layers 1 --prompt 5000", &["5000", "4096"]),
        ("none", &["none"]),
    ] {
        refused(place.senmon(&format!("bench generate {flags} {CALM}")), words);
    }
}

#[test]
fn a_type_that_nothing_is_coded_to() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    let mut command = place.senmon(&format!("generate run --quantize q5_k {CALM}"));
    let said = String::from_utf8(command.output().unwrap().stderr).unwrap();
    assert!(said.contains("q8_0") && said.contains("mxfp4"), "{said}");
    let both = place.senmon(&format!("generate run --quantize q8_0 --exact {CALM}")).output().unwrap();
    assert_eq!(both.status.code(), Some(2));
}

#[test]
fn an_instruction_set_that_is_none() {
    let place = Place::new();
    for command in ["train --data text --out run", "inspect run", "bench layer"] {
        let mut command = place.senmon(&format!("{command} {CALM}"));
        command.env("SENMON_SIMD", "nonsense");
        refused(command, &["SENMON_SIMD=nonsense", "avx512_bf16", "avx512,", "avx2", "portable"]);
    }
    assert!(!place.path("run").exists());
}

#[test]
fn too_many_threads() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    for command in [
        "train --data text --out new --steps 1",
        "train --resume --out run --steps 4",
        "generate run",
        "eval run",
        "inspect run",
        "logits run --tokens 1 --out logits",
        "bench layer",
        "bench train",
    ] {
        let command = place.senmon(&format!("{command} --quiet --threads 100000"));
        refused(command, &["threads", "100000", "4096"]);
    }
    assert!(!place.path("new").exists() && !place.path("logits").exists());
}

#[test]
fn a_number_that_is_none() {
    let place = Place::new();
    for (flag, value) in [("--steps", "abc"), ("--steps", "1.5"), ("--steps", ""), ("--tokens", "2Q")] {
        let mut command = place.senmon(&format!("train --data text --out run {CALM} {flag}"));
        command.arg(value);
        refused(command, &[flag, value, "4k"]);
    }
    refused(
        place.senmon(&format!("train --data text --out run {MODEL} --steps 0 {CALM}")),
        &["train.steps", "at least 1"],
    );
    assert!(!place.path("run").exists());
}

#[test]
fn an_evaluation_without_text() {
    let place = Place::new();
    done(place.train("--data text --out run"));
    fs::create_dir(place.path("model")).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(place.path("run").join(file), place.path("model").join(file)).unwrap();
    }
    refused(place.senmon(&format!("eval model {CALM}")), &["model is no run folder", "--data"]);
    refused(place.senmon(&format!("eval text {CALM}")), &["text", "holds no model", "config.json"]);
    refused(place.senmon(&format!("eval nowhere {CALM}")), &["nowhere", "no such folder"]);
    refused(
        place.senmon(&format!("eval model --data nowhere {CALM}")),
        &["nowhere", "no such file or folder"],
    );
    done(place.senmon(&format!("eval model --data text {CALM}")));
}
