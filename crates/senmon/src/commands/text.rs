//! Texts made token by token, one or several at once: what `generate`, `chat` and the end of `train` share.

use crate::failure::{Failure, Result};
use crate::ui::INTERRUPTED;
use senmon_insight::Recorder;
use senmon_models::decoder::{Cache, Decoder, Pass};
use senmon_models::penalties::{Penalties, log_probabilities};
use senmon_models::sampling::Sampling;
use senmon_models::text::{TextStream, Tokenizer, encode_prompt};
use senmon_moe::RoutingObserver;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// How a generation ends that Ctrl-C ended.
pub(super) const INTERRUPTED_FINISH: &str = "interrupted";

/// Tokens of a prompt that pass through the model at once: what a pass holds in memory grows with its tokens.
const PREFILL: usize = 512;

/// What came of a generation.
#[derive(Default)]
pub(super) struct Generated {
    pub text: String,
    pub tokens: Vec<u32>,
    /// Of each token: its log-probability, and the likeliest tokens with theirs.
    pub logprobs: Vec<(f64, Vec<(u32, f64)>)>,
    pub prompt_tokens: usize,
    pub finish: &'static str,
    pub prefill_seconds: f64,
    pub decode_seconds: f64,
    /// The token that was drawn last, which did not pass through the model; the end of a text may be one.
    pub last: Option<u32>,
}

/// How texts are made, and when they end.
pub(super) struct Manner<'a> {
    pub tokenizer: &'a Tokenizer,
    pub sampling: Sampling,
    pub penalties: Penalties,
    pub max_tokens: usize,
    /// The log-probabilities of so many of the likeliest tokens are wanted at each place.
    pub logprobs: Option<usize>,
    pub eos: &'a [u32],
    pub stops: &'a [String],
}

/// A text in the making.
pub(super) struct Text<'a> {
    manner: &'a Manner<'a>,
    /// Tokens that pass through the model first, and how many of them have.
    first: Vec<u32>,
    passed: usize,
    /// What penalties look at besides the text.
    said: Vec<u32>,
    /// Tokens that the context has room for after the first.
    room: usize,
    stream: TextStream<'a>,
    clock: Option<Instant>,
    done: Generated,
    ended: bool,
}

/// Tokens of a text that pass through the model next.
pub(super) struct Turn<'t> {
    pub text: usize,
    pub tokens: &'t [u32],
}

/// What is told of a text.
pub(super) enum News<'t> {
    /// More of it is certain.
    More(&'t str),
    /// It is at its end.
    End,
}

impl<'a> Text<'a> {
    /// A text after the tokens `first`; penalties look at `said` too.
    pub fn new(manner: &'a Manner<'a>, first: Vec<u32>, said: Vec<u32>, room: usize) -> Self {
        let done = Generated { prompt_tokens: first.len(), finish: "length", ..Generated::default() };
        let stream = TextStream::new(manner.tokenizer, manner.stops);
        Self { manner, first, passed: 0, said, room, stream, clock: None, done, ended: false }
    }

    /// What came of it.
    pub fn into_done(self) -> Generated {
        self.done
    }

    /// What passes through the model next.
    fn turn(&self) -> &[u32] {
        match self.first.get(self.passed..) {
            Some(rest) if !rest.is_empty() => &rest[..rest.len().min(PREFILL)],
            _ => self.done.last.as_slice(),
        }
    }

    /// Goes on with the logits \[V\] after its turn.
    fn take(&mut self, mut logits: Vec<f32>, tell: &mut dyn FnMut(News) -> Result<()>) -> Result<()> {
        if self.passed < self.first.len() {
            self.passed += self.turn().len();
            if self.passed < self.first.len() {
                return Ok(());
            }
            self.done.prefill_seconds = self.seconds();
        }
        if self.manner.max_tokens == 0 {
            return self.end("length", tell);
        }
        let (manner, done) = (self.manner, &mut self.done);
        let raw = manner.logprobs.map(|_| logits.clone());
        manner.penalties.apply(&mut logits, &self.said, &done.tokens);
        let Some(token) = manner.sampling.pick(&logits, done.tokens.len() as u64) else {
            return Err(Failure::other("the model's logits are not numbers"));
        };
        done.last = Some(token);
        if manner.eos.contains(&token) {
            return self.end("end of text", tell);
        }
        if let (Some(most), Some(raw)) = (manner.logprobs, raw) {
            done.logprobs.push(log_probabilities(&raw, token, most));
        }
        done.tokens.push(token);
        let new = self.stream.push(token)?;
        tell(News::More(&new))?;
        done.text.push_str(&new);
        if self.stream.stopped() {
            self.end("stop", tell)
        } else if self.done.tokens.len() > self.room {
            self.end("context full", tell)
        } else if self.done.tokens.len() == manner.max_tokens {
            self.end("length", tell)
        } else {
            Ok(())
        }
    }

    /// Seconds since the last time, or since the text began.
    fn seconds(&mut self) -> f64 {
        let now = Instant::now();
        self.clock.replace(now).map_or(0.0, |before| (now - before).as_secs_f64())
    }

    fn end(&mut self, finish: &'static str, tell: &mut dyn FnMut(News) -> Result<()>) -> Result<()> {
        let rest = self.stream.finish()?;
        tell(News::More(&rest))?;
        self.done.text.push_str(&rest);
        self.done.finish = finish;
        self.ended = true;
        let seconds = self.seconds();
        match self.passed < self.first.len() {
            true => self.done.prefill_seconds = seconds,
            false => self.done.decode_seconds = seconds,
        }
        tell(News::End)
    }
}

/// Makes texts, at most `most` at once: those that are at their end leave, others join. `step` gives for each turn the logits
/// of its last token; turns come in the order of the texts. A text comes out as it does alone.
pub(super) fn make(
    texts: &mut [Text],
    most: usize,
    tell: &mut dyn FnMut(usize, News) -> Result<()>,
    step: &mut dyn FnMut(&[Turn]) -> Result<Vec<Vec<f32>>>,
) -> Result<()> {
    let (mut active, mut waiting): (Vec<usize>, _) = (Vec::new(), 0..texts.len());
    loop {
        let free = most.saturating_sub(active.len());
        for n in waiting.by_ref().take(free) {
            texts[n].clock = Some(Instant::now());
            active.push(n);
        }
        if active.is_empty() {
            return Ok(());
        }
        if INTERRUPTED.load(Ordering::Relaxed) {
            return active
                .into_iter()
                .chain(waiting)
                .try_for_each(|n| texts[n].end(INTERRUPTED_FINISH, &mut |news| tell(n, news)));
        }
        let turns: Vec<Turn> = active.iter().map(|n| Turn { text: *n, tokens: texts[*n].turn() }).collect();
        let logits = step(&turns)?;
        for (n, logits) in active.iter().zip(logits) {
            texts[*n].take(logits, &mut |news| tell(*n, news))?;
        }
        active.retain(|n| !texts[*n].ended);
    }
}

/// Continues `prompts` by a decoder, at most `most` at once. A recorder sees text n as sequence n.
pub(super) fn continue_all(
    decoder: &Decoder,
    manner: &Manner,
    prompts: &[String],
    most: usize,
    mut recorder: Option<&mut Recorder>,
    tell: &mut dyn FnMut(usize, News) -> Result<()>,
) -> Result<Vec<Generated>> {
    let spec = decoder.spec();
    let (mut texts, mut contexts) = (Vec::with_capacity(prompts.len()), Vec::with_capacity(prompts.len()));
    for (n, prompt) in prompts.iter().enumerate() {
        let mut tokens = encode_prompt(manner.tokenizer, prompt)?;
        if tokens.is_empty() {
            // A model begins a text after what ends one.
            tokens.extend(spec.tokens.bos.or(spec.tokens.eos.first().copied()).or(Some(0)));
        }
        let (length, most) = (tokens.len(), spec.max_positions);
        if length >= most {
            let which = if prompts.len() > 1 { format!("prompt {}", n + 1) } else { "the prompt".into() };
            return Err(Failure::mistake(format!("{which} has {length} tokens, the model's context {most}")));
        }
        contexts.push(length.saturating_add(manner.max_tokens).min(most));
        texts.push(Text::new(manner, tokens.clone(), tokens, most - length));
    }
    for (n, prompt) in prompts.iter().enumerate() {
        tell(n, News::More(prompt))?;
    }
    let mut caches: BTreeMap<usize, Cache> = BTreeMap::new();
    make(&mut texts, most, tell, &mut |turns| {
        caches.retain(|n, _| turns.iter().any(|turn| turn.text == *n));
        for turn in turns {
            if let Entry::Vacant(cache) = caches.entry(turn.text) {
                cache.insert(decoder.cache(contexts[turn.text])?);
            }
        }
        let tokens: Vec<&[u32]> = turns.iter().map(|turn| turn.tokens).collect();
        let mut group: Vec<&mut Cache> = caches.values_mut().collect();
        let Some(recorder) = &mut recorder else {
            return Ok(decoder.logits_batch(&tokens, &mut group, true, &mut Pass::default())?);
        };
        recorder.pass(&turns.iter().map(|turn| (turn.text as u32, turn.tokens)).collect::<Vec<_>>());
        let observer: &mut dyn RoutingObserver = &mut **recorder;
        let mut pass = Pass { observer: Some(observer), ..Pass::default() };
        let all = decoder.logits_batch(&tokens, &mut group, false, &mut pass)?;
        let each = turns.iter().zip(all).map(|(turn, mut logits)| {
            recorder.predicted(turn.text as u32, &logits);
            logits.split_off(logits.len() - spec.vocab)
        });
        Ok(each.collect())
    })?;
    let done: Vec<Generated> = texts.into_iter().map(Text::into_done).collect();
    if let Some(recorder) = recorder {
        for (n, done) in done.iter().enumerate() {
            done.last.iter().for_each(|token| recorder.follows(n as u32, *token));
        }
    }
    Ok(done)
}
