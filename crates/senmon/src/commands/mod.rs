//! One file a verb.

mod bench;
mod chat;
mod compare;
mod convert;
mod eval;
mod generate;
mod hub;
mod insight;
mod inspect;
mod logits;
mod options;
mod prompts;
mod replay;
mod route;
mod routing;
mod text;
mod texts;
mod train;

use crate::cli::{Bench, Cli, Command, Common, ModelArgs};
use crate::failure::{Failure, Result};
use clap::CommandFactory;
use senmon_kernels::simd::Level;
use std::io::Write;
use std::path::Path;

/// Runs a command on a pool of the threads that it asks for.
pub fn run(cli: Cli) -> Result<()> {
    if let Ok(name) = std::env::var("SENMON_SIMD")
        && Level::from_name(&name).is_none()
    {
        return Err(Failure::mistake(format!(
            "SENMON_SIMD={name} is not known: avx512_bf16, avx512, avx2 or portable"
        )));
    }
    match cli.command {
        Command::Train(args) => train::run(*args),
        Command::Eval(args) => on_model(args, |args| (&mut args.from, &args.common), eval::run),
        Command::Chat(mut args) => {
            hub::find(&mut args.options.from.model, args.quiet)?;
            on_threads(args.threads.unwrap_or(0), || chat::run(args))?
        }
        Command::Generate(args) => {
            on_model(args, |args| (&mut args.options.from, &args.common), generate::run)
        }
        Command::Compare(args) => compare::run(*args),
        Command::Convert(args) => on_model(args, |args| (&mut args.from, &args.common), convert::run),
        Command::Logits(args) => on_model(args, |args| (&mut args.from, &args.common), logits::run),
        Command::Route(args) => on_pool(&args.common.clone(), || route::run(&args)),
        Command::Replay(args) => on_pool(&args.common.clone(), || replay::run(args)),
        Command::Inspect(args) => on_model(args, |args| (&mut args.from, &args.common), inspect::run),
        Command::Bench(Bench::Layer(args)) => on_pool(&args.common.clone(), || bench::layer(args)),
        Command::Bench(Bench::Generate(args)) => on_pool(&args.common.clone(), || bench::generate(args)),
        Command::Bench(Bench::Train(args)) => on_pool(&args.common.clone(), || bench::train(args)),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "senmon", &mut script);
            print(&String::from_utf8_lossy(&script))
        }
        Command::Man => {
            let mut page = Vec::new();
            render_man(&mut page).map_err(|e| Failure::other(e.to_string()))?;
            print(&String::from_utf8_lossy(&page))
        }
    }
}

/// The manual page, with a section for each verb.
fn render_man(page: &mut Vec<u8>) -> std::io::Result<()> {
    let mut command = Cli::command();
    command.build();
    clap_mangen::Man::new(command.clone()).render(page)?;
    render_verbs(page, "SENMON", &command)
}

fn render_verbs(page: &mut Vec<u8>, above: &str, command: &clap::Command) -> std::io::Result<()> {
    for verb in command.get_subcommands().filter(|verb| verb.get_name() != "help") {
        let name = format!("{above} {}", verb.get_name().to_uppercase());
        writeln!(page, ".SH \"{name}\"")?;
        let man = clap_mangen::Man::new(verb.clone());
        man.render_description_section(page)?;
        man.render_options_section(page)?;
        man.render_extra_section(page)?;
        render_verbs(page, &name, verb)?;
    }
    Ok(())
}

/// Runs `work` on as many threads as asked for, or one per core.
fn on_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> Result<R> {
    if threads > 4096 {
        return Err(Failure::mistake(format!("--threads {threads} is more than 4096")));
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    Ok(pool.map_err(|e| Failure::other(format!("no threads: {e}")))?.install(work))
}

fn on_pool(common: &Common, work: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    on_threads(common.threads.unwrap_or(0), work)?
}

/// Finds the model that a command is about, then runs it on a pool.
fn on_model<A: Send>(
    mut args: A,
    parts: impl FnOnce(&mut A) -> (&mut ModelArgs, &Common),
    work: impl FnOnce(A) -> Result<()> + Send,
) -> Result<()> {
    let (from, common) = parts(&mut args);
    let common = common.clone();
    hub::find(&mut from.model, common.quiet)?;
    on_pool(&common, || work(args))
}

/// A result, to standard output; a reader that went away is no failure.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::mistake(format!("cannot write: {e}")))
        }
        _ => Ok(()),
    }
}

/// A result as one JSON document.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Failure::other(e.to_string()))?;
    print(&format!("{text}\n"))
}

/// Refuses a place for a result that cannot take it.
fn check_out(path: &Path) -> Result<()> {
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() => {
            Err(Failure::mistake(format!("{} is no file that can be replaced", path.display())))
        }
        Ok(_) => Ok(()),
        Err(_) => match path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            Some(parent) if !parent.is_dir() => Err(Failure::mistake(format!(
                "there is no folder {} for {}",
                parent.display(),
                path.display()
            ))),
            _ => Ok(()),
        },
    }
}

/// A number with a suffix, or the user's mistake.
fn size(flag: &str, text: &str) -> Result<u64> {
    senmon_train::sizes::parse_size(text)
        .ok_or_else(|| Failure::mistake(format!("{flag} {text} is not a number such as 4096, 4k or 2M")))
}
