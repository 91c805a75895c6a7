//! `chat`: a conversation with a model in the terminal.

use super::options::open_decoder;
use super::print;
use super::text::{Generated, Manner, News, Text, make};
use crate::cli::ChatArgs;
use crate::failure::{Failure, Result};
use crate::ui::{ANSWERING, INTERRUPTED};
use senmon_models::chat::{ChatTemplate, Message};
use senmon_models::decoder::{Cache, Decoder, Pass};
use senmon_models::text::{Tokenizer, encode};
use std::io::{BufRead, IsTerminal};
use std::sync::atomic::Ordering;

const HELP: &str = "\
/help            this
/system TEXT     begin again with this instruction; without TEXT, with none
/undo            take back the last question and its answer
/clear           begin again
/exit            end (as does the end of input)
Ctrl-C stops an answer; at a question it ends the program.";

/// The conversation so far, and what of it is in the cache.
struct Talk {
    messages: Vec<Message>,
    cache: Cache,
    /// The tokens whose keys and values the cache has.
    cached: Vec<u32>,
}

pub(super) fn run(args: ChatArgs) -> Result<()> {
    let options = &args.options;
    let template = match &args.template {
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .map_err(|e| Failure::mistake(format!("cannot read {}: {e}", path.display())))?;
            Some(ChatTemplate::new(path, text, serde_json::Map::new())?)
        }
        None => ChatTemplate::of_model(&options.from.model)?,
    };
    let template = template.ok_or_else(|| {
        Failure::mistake(format!(
            "{} has no chat template (in tokenizer_config.json, chat_template.jinja or GGUF): say --template FILE, or use \
             generate",
            options.from.model.display()
        ))
    })?;
    let (decoder, tokenizer, choice) = open_decoder(options)?;
    let spec = decoder.spec();
    let words = choice.words();
    let manner = Manner {
        tokenizer: &tokenizer,
        sampling: choice.sampling,
        penalties: choice.penalties,
        max_tokens: options.max_tokens,
        logprobs: None,
        eos: &spec.tokens.eos,
        stops: &options.stop,
    };
    crate::ui::catch_interrupts_of_answers();
    let context = args.context.unwrap_or(4096).min(spec.max_positions);
    let new = || -> Result<Talk> {
        let system = args.system.iter().map(|text| Message::new("system", text.as_str()));
        Ok(Talk { messages: system.collect(), cache: decoder.cache(context)?, cached: Vec::new() })
    };
    let mut talk = new()?;
    let terminal = std::io::stdin().is_terminal();
    if terminal && !args.quiet {
        eprintln!("[{words}; /help says what can be done]");
    }
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if terminal {
            eprint!("> ");
        }
        let Some(line) = lines.next() else { break };
        let line = line.map_err(|e| Failure::other(format!("cannot read the question: {e}")))?;
        let line = line.trim();
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        match command {
            "" => continue,
            "/exit" | "/quit" => break,
            "/help" => eprintln!("{HELP}"),
            "/clear" => talk = new()?,
            "/system" => {
                talk = new()?;
                talk.messages.clear();
                if !rest.trim().is_empty() {
                    talk.messages.push(Message::new("system", rest.trim()));
                }
            }
            "/undo" => {
                let last = talk.messages.iter().rposition(|message| message.role == "user");
                talk.messages.truncate(last.unwrap_or(talk.messages.len()));
            }
            command if command.starts_with('/') => eprintln!("{command} is not known; /help says what is"),
            _ => {
                talk.messages.push(Message::new("user", line));
                ANSWERING.store(true, Ordering::SeqCst);
                let answer = answer(&decoder, &tokenizer, &template, &mut talk, |prompt, same, step| {
                    let room = context.saturating_sub(prompt.len());
                    if room == 0 {
                        return Err(Failure::mistake(format!(
                            "the conversation of {} tokens fills the context of {context}: /clear or --context",
                            prompt.len()
                        )));
                    }
                    let mut show = |_: usize, news: News| match news {
                        News::More(text) if !text.is_empty() => print(text),
                        _ => Ok(()),
                    };
                    let mut text = [Text::new(&manner, prompt[same..].to_vec(), Vec::new(), room)];
                    make(&mut text, 1, &mut show, &mut |turns| {
                        turns.iter().map(|turn| step(turn.tokens)).collect()
                    })?;
                    let [text] = text;
                    Ok(text.into_done())
                });
                match answer {
                    Ok(()) => print("\n")?,
                    Err(failure) if terminal => {
                        talk.messages.pop();
                        eprintln!("{failure}");
                    }
                    Err(failure) => return Err(failure),
                }
                ANSWERING.store(false, Ordering::SeqCst);
                INTERRUPTED.store(false, Ordering::SeqCst);
            }
        }
    }
    Ok(())
}

/// The answer to the last message, over as much of the cache as the conversation still begins with.
fn answer(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    talk: &mut Talk,
    generate: impl FnOnce(&[u32], usize, &mut dyn FnMut(&[u32]) -> Result<Vec<f32>>) -> Result<Generated>,
) -> Result<()> {
    let prompt = encode(tokenizer, &template.render(&talk.messages, true)?)?;
    // The last token always passes: its logits are wanted.
    let same = talk.cached.iter().zip(&prompt).take_while(|(a, b)| a == b).count();
    let same = same.min(prompt.len().saturating_sub(1));
    let same = if talk.cache.truncate(same) { same } else { 0 };
    if same == 0 {
        talk.cache = decoder.cache(talk.cache.context())?;
    }
    talk.cached.truncate(same);
    let Talk { messages, cache, cached } = talk;
    let done = generate(&prompt, same, &mut |tokens| {
        let logits = decoder.logits(tokens, cache, true, &mut Pass::default())?;
        cached.extend_from_slice(tokens);
        Ok(logits)
    })?;
    messages.push(Message::new("assistant", done.text.trim()));
    Ok(())
}
