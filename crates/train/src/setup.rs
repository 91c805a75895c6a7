//! How a run is put together: its folder, its text or batches, its model, its first checkpoint; or all of them as an
//! earlier process left them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use senmon_data::{DataConfig, Dataset, PAD, Progress as DataProgress, Report, TextTokenizer};
use senmon_models::checkpoint;
use senmon_models::decoder::Decoder;
use senmon_models::params::{initial_values, param_defs};
use senmon_models::spec::{FfnSpec, ModelSpec, SpecialTokens};
use senmon_moe::router::balanced_table;

use crate::alarms::{AlarmBounds, Alarms};
use crate::balancing::Balancing;
use crate::config::RunConfig;
use crate::error::{Result, TrainError};
use crate::eval::EvalText;
use crate::folder::{Checkpoint, RunFolder, write_whole};
use crate::layers::Layers;
use crate::state::{self, Progress};
use crate::step::{AdamW, MicroBatch};
use crate::trainer::{BatchSource, ReplaySource, Trainer};

/// Micro-batches over which tokens are counted for a table of token ids.
const COUNTED_BATCHES: u64 = 64;
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// A run that is ready, and what was found on the way.
pub struct Setup {
    /// The run.
    pub trainer: Trainer,
    /// Its tokenizer, where it has text.
    pub tokenizer: Option<TextTokenizer>,
    /// What is in its text.
    pub report: Option<Report>,
    /// What the user should know, one line each.
    pub notes: Vec<String>,
}

/// What can be set of a model that is given, besides its router: the layout to write.
const OF_TRAINING: &[&str] = &["model.family"];
/// What the router of a model that is given cannot be without other experts.
const OF_MODEL: &[&str] = &["model", "experts"];

/// The configuration of a run that begins: with `train.init`, the model is the given one; with `train.batches`, batches
/// have the file's sizes.
pub fn configure(mut layers: Layers) -> Result<RunConfig> {
    if let Some(init) = layers.text("train", "init") {
        let init = Path::new(&init);
        if let Some(key) = layers.says(OF_MODEL, OF_TRAINING) {
            return Err(TrainError::Conflict(format!(
                "{key} cannot be set with --init: the model is what {} says it is",
                init.display()
            )));
        }
        let (spec, family) = checkpoint::load_spec(init)?;
        // With another router it may be one that this layout cannot say.
        let family =
            if layers.says(&["router"], &["router.jitter"]).is_some() { "auto" } else { family.name };
        layers = layers.model(&spec, family)?;
    }
    if let Some(batches) = layers.text("train", "batches") {
        let (batch, sequence) = ReplaySource::shape_of(Path::new(&batches))?;
        let whole = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        layers =
            layers.set_value("train.batch", whole(batch))?.set_value("train.sequence", whole(sequence))?;
    }
    let config = layers.resolve()?;
    if config.train.batches.is_none() && config.data.paths.is_empty() {
        return Err(TrainError::Conflict("no text given: say --data PATH (files or folders)".into()));
    }
    Ok(config)
}

/// Begins a run in `out`: a folder that does not exist yet, or is empty. When it fails, nothing is left there.
pub fn create(config: RunConfig, out: &Path, cache: &Path, progress: &dyn DataProgress) -> Result<Setup> {
    let folder = RunFolder::create(out)?;
    match begin(config, &folder, cache, progress) {
        Ok(parts) => Ok(parts.with(folder)),
        Err(e) => {
            folder.abandon();
            Err(e)
        }
    }
}

/// Goes on with the run in `folder` from its newest checkpoint; `config` is its configuration, changed where the user
/// said so.
pub fn resume(
    config: RunConfig,
    folder: RunFolder,
    cache: &Path,
    progress: &dyn DataProgress,
) -> Result<Setup> {
    let Some(checkpoint) = folder.newest()? else {
        // The process was killed before the first checkpoint.
        return Ok(begin(config, &folder, cache, progress)?.with(folder));
    };
    let setup = go_on(config, folder.root(), &checkpoint, cache, progress)?.with(folder);
    let Trainer { config, folder, progress, .. } = &setup.trainer;
    if setup.trainer.is_over() {
        return Err(TrainError::IsDone {
            path: folder.root().to_owned(),
            step: progress.step,
            tokens: progress.tokens,
        });
    }
    // Only what goes on is written down.
    folder.write_config(config)?;
    state::publish(&checkpoint.path, folder.root())?;
    Ok(setup)
}

/// All of a run but its folder.
struct Parts {
    config: RunConfig,
    fed: Fed,
    decoder: Decoder,
    adamw: AdamW,
    balancing: Balancing,
    progress: Progress,
    alarms: Alarms,
    extra: Vec<PathBuf>,
    notes: Vec<String>,
}

impl Parts {
    fn with(self, folder: RunFolder) -> Setup {
        let trainer = Trainer {
            config: self.config,
            folder,
            decoder: self.decoder,
            adamw: self.adamw,
            balancing: self.balancing,
            progress: self.progress,
            alarms: self.alarms,
            source: self.fed.source,
            eval: self.fed.eval,
            extra: self.extra,
        };
        Setup { trainer, tokenizer: self.fed.tokenizer, report: self.fed.report, notes: self.notes }
    }
}

/// What a run is fed.
struct Fed {
    source: Box<dyn BatchSource>,
    eval: Option<(EvalText, EvalText)>,
    tokenizer: Option<TextTokenizer>,
    report: Option<Report>,
    key: String,
    /// How often each token occurs in what is trained on, where a router asks; else nothing.
    token_counts: Vec<u64>,
}

/// A new run.
fn begin(
    mut config: RunConfig,
    folder: &RunFolder,
    cache: &Path,
    progress: &dyn DataProgress,
) -> Result<Parts> {
    // What is wrong with a model is told before minutes of reading text.
    let start = config.train.init.as_deref().map(checkpoint::load).transpose()?;
    let own = start.as_ref().and_then(|model| model.tokenizer.as_ref());
    let own = own.map(|tokenizer| tokenizer.file()).transpose()?;
    if config.data.tokenizer.is_none() && config.train.batches.is_none() {
        if let (Some(init), None) = (&config.train.init, &own) {
            return Err(TrainError::Conflict(format!(
                "{} has no tokenizer: say --tokenizer FILE",
                init.display()
            )));
        }
        config.data.tokenizer = own.clone();
    }
    let limit = start.as_ref().map(|model| model.spec.vocab);
    let fed = feed(&mut config, limit, cache, progress)?;
    let spec = match &start {
        Some(model) => model.spec.clone(),
        None => config.model_spec()?,
    };
    let spec = complete(spec, &config, fed.tokenizer.as_ref());
    config.make_paths_absolute()?;
    let mut notes = Vec::new();
    let mut values = match start {
        Some(model) => start_from(model, &spec, config.train.seed, &mut notes),
        None => initial_values(&spec, config.train.seed),
    };
    fill_tables(&spec, &mut values, &fed.token_counts);
    let decoder = Decoder::train_in(&spec, values, config.train.precision.into())?;
    // A layout that cannot say the model is refused now, not at the first checkpoint.
    senmon_models::families::config_json(&spec, &config.model.family)?;

    // From here on the folder holds a run: killed at any moment, it begins again or goes on.
    folder.write_config(&config)?;
    let mut extra = Vec::new();
    let root = folder.root();
    let written = match (&fed.tokenizer, &own) {
        (Some(tokenizer), _) => Some((tokenizer.json().to_owned(), tokenizer_config(tokenizer, &config))),
        (None, Some(path)) => {
            let json = std::fs::read_to_string(path).map_err(TrainError::io("read", path))?;
            Some((json, std::fs::read_to_string(path.with_file_name(TOKENIZER_CONFIG)).ok()))
        }
        (None, None) => None,
    };
    if let Some((json, described)) = written {
        write_whole(&root.join(TOKENIZER), json.as_bytes())?;
        extra.push(root.join(TOKENIZER));
        if let Some(described) = described {
            write_whole(&root.join(TOKENIZER_CONFIG), described.as_bytes())?;
            extra.push(root.join(TOKENIZER_CONFIG));
        }
    }
    let progress = Progress {
        step: 0,
        tokens: 0,
        seconds: 0.0,
        evaluated: 0,
        simd: state::simd(config.train.precision.into()),
        from_init: config.train.init.is_some(),
        spec: spec.clone(),
        data: fed.key.clone(),
    };
    let adamw = AdamW::new(&decoder);
    let balancing = Balancing::new(&config);
    let alarms = Alarms::new(AlarmBounds::default(), &config);
    notes.extend(config.warnings());
    state::save(folder, &decoder, &adamw, &balancing, &progress, &alarms, &config.model.family, &extra)?;
    Ok(Parts { config, fed, decoder, adamw, balancing, progress, alarms, extra, notes })
}

/// An earlier run.
fn go_on(
    mut config: RunConfig,
    root: &Path,
    from: &Checkpoint,
    cache: &Path,
    progress: &dyn DataProgress,
) -> Result<Parts> {
    let resumed = state::load(from, config.train.precision.into(), |saved| {
        let spec = if saved.from_init { saved.spec.clone() } else { config.model_spec()? };
        Ok(ModelSpec { tokens: saved.spec.tokens.clone(), ..complete(spec, &config, None) })
    })?;
    let mut notes = config.warnings();
    let tokenizer = from.path.join(TOKENIZER);
    let given = config.data.tokenizer.clone();
    if tokenizer.is_file() {
        config.data.tokenizer = Some(tokenizer.clone());
    }
    let fed = feed(&mut config, Some(resumed.progress.spec.vocab), cache, progress)?;
    config.data.tokenizer = given;
    if fed.key != resumed.progress.data {
        notes.push(
            "the text is not what it was when this run was saved: from here it trains on what is there now"
                .into(),
        );
    }
    let simd = state::simd(config.train.precision.into());
    if resumed.progress.simd != simd {
        notes.push(format!(
            "this run was computed with {} and goes on with {simd}: the last bits will differ from those of a run on one of them",
            resumed.progress.simd
        ));
    }
    config.make_paths_absolute()?;
    // They stay in the run folder; this checkpoint will be removed.
    let names = [TOKENIZER, TOKENIZER_CONFIG].into_iter().filter(|name| from.path.join(name).is_file());
    let extra = names.map(|name| root.join(name)).collect();
    let progress = Progress { simd, data: fed.key.clone(), ..resumed.progress };
    let (decoder, adamw, alarms) = (resumed.decoder, resumed.adamw, resumed.alarms);
    let mut balancing = Balancing::new(&config);
    balancing.restore(resumed.multiplier);
    Ok(Parts { config, fed, decoder, adamw, balancing, progress, alarms, extra, notes })
}

/// Opens the text or the batches. `vocab` is the model's, where it is there already.
fn feed(
    config: &mut RunConfig,
    vocab: Option<usize>,
    cache: &Path,
    progress: &dyn DataProgress,
) -> Result<Fed> {
    if let Some(path) = config.train.batches.clone() {
        let vocab = match vocab {
            Some(vocab) => vocab,
            None => config.model_spec()?.vocab,
        };
        let source = ReplaySource::open(&path, vocab)?;
        (config.train.batch, config.train.sequence) = source.shape();
        config.check()?;
        let bytes: Vec<u8> = source.tokens().iter().flat_map(|token| token.to_le_bytes()).collect();
        let key = format!("batches {}", blake3::hash(&bytes).to_hex());
        let mut token_counts = vec![0; vocab];
        source.tokens().iter().for_each(|token| token_counts[*token as usize] += 1);
        return Ok(Fed {
            source: Box::new(source),
            eval: None,
            tokenizer: None,
            report: None,
            key,
            token_counts,
        });
    }
    let data = Dataset::open(&config.data, cache, progress)?;
    let tokens = data.tokenizer().vocab_size();
    match vocab {
        Some(vocab) if tokens > vocab => {
            return Err(TrainError::Conflict(format!(
                "{} has {tokens} tokens and the model a vocabulary of {vocab}: take the model's own tokenizer",
                data.tokenizer().source()
            )));
        }
        Some(_) => {}
        None => config.fit_tokenizer(tokens)?,
    }
    let t = &config.train;
    let eval = match config.data.holdout > 0.0 {
        true => {
            let some = (t.eval_tokens > 0).then_some(t.eval_tokens as usize);
            Some((EvalText::held_out(&data, t.sequence, some)?, EvalText::held_out(&data, t.sequence, None)?))
        }
        false => None,
    };
    let (report, tokenizer) = (data.report().clone(), data.tokenizer().clone());
    let key = data.key().to_owned();
    let source = Windows { data, batch: t.batch, sequence: t.sequence, seed: t.seed };
    // Text that is too short for a window is told now.
    source.micro_batch(0)?;
    let by_id = senmon_moe::router::kind(&config.router.kind).is_ok_and(|kind| kind.by_token_id);
    let mut token_counts = vec![0; if by_id { tokens } else { 0 }];
    for index in 0..if by_id { COUNTED_BATCHES } else { 0 } {
        source.micro_batch(index)?.tokens.iter().for_each(|token| token_counts[*token as usize] += 1);
    }
    let (tokenizer, report) = (Some(tokenizer), Some(report));
    Ok(Fed { source: Box::new(source), eval, tokenizer, report, key, token_counts })
}

/// The values of `spec` from a model whose router may be another: parameters of the same name and shape are kept, the others begin anew.
fn start_from(
    model: checkpoint::Checkpoint,
    spec: &ModelSpec,
    seed: u64,
    notes: &mut Vec<String>,
) -> Vec<Vec<f32>> {
    if model.spec.layers == spec.layers {
        return model.params;
    }
    let defs = param_defs(spec);
    let found = param_defs(&model.spec).into_iter().map(|def| (def.name, def.shape)).zip(model.params);
    let mut found: HashMap<(String, Vec<usize>), Vec<f32>> = found.collect();
    let mut anew = Vec::new();
    let values = defs
        .iter()
        .zip(initial_values(spec, seed))
        .map(|(def, fresh)| {
            found.remove(&(def.name.clone(), def.shape.clone())).unwrap_or_else(|| {
                anew.push(def.name.as_str());
                fresh
            })
        })
        .collect();
    let kinds = |spec: &ModelSpec| spec.first_moe().map_or_else(String::new, |moe| moe.router.kind.clone());
    let names = |names: &[&str]| match names {
        [] => "nothing".to_owned(),
        names if names.len() <= 4 => names.join(", "),
        names => format!("{} and {} more", names[..3].join(", "), names.len() - 3),
    };
    let mut gone: Vec<&str> = found.keys().map(|(name, _)| name.as_str()).collect();
    gone.sort_unstable();
    notes.push(format!(
        "the router goes from {:?} to {:?}: {} of {} parameters are kept; anew: {}; left out: {}",
        kinds(&model.spec),
        kinds(spec),
        defs.len() - anew.len(),
        defs.len(),
        names(&anew),
        names(&gone)
    ));
    values
}

/// Makes the tables of routers that go by token ids, where they are still empty: balanced by how often each token occurs.
fn fill_tables(spec: &ModelSpec, values: &mut [Vec<f32>], counts: &[u64]) {
    for (def, values) in param_defs(spec).iter().zip(values) {
        let Some(layer) = def.name.strip_suffix(".router_table") else { continue };
        let layer: Option<usize> = layer.strip_prefix("layers.").and_then(|layer| layer.parse().ok());
        let Some(FfnSpec::Moe(moe)) = layer.and_then(|layer| spec.layers.get(layer)) else { continue };
        if values.iter().all(|expert| *expert == 0.0) {
            let mut counts = counts.to_vec();
            counts.resize(spec.vocab, 0);
            *values = balanced_table(&counts, moe.experts, moe.top_k);
        }
    }
}

/// What only the tokenizer and the configuration know of a model: its special tokens, and how its router is to be.
fn complete(mut spec: ModelSpec, config: &RunConfig, tokenizer: Option<&TextTokenizer>) -> ModelSpec {
    // A model whose router nobody changes keeps it, layer by layer.
    let first = spec.first_moe().map(|moe| moe.router.clone());
    let kept = first.is_some_and(|first| first == config.router);
    for layer in spec.layers.iter_mut().filter(|_| !kept) {
        if let FfnSpec::Moe(moe) = layer {
            let slots = moe.router.slots;
            moe.router = config.router.clone();
            if moe.router.kind == "soft" && moe.router.slots == 0 {
                moe.router.slots =
                    if slots > 0 { slots } else { config.train.sequence.div_ceil(moe.experts.max(1)) };
            }
        }
    }
    if let Some(eos) = tokenizer.and_then(TextTokenizer::eos)
        && spec.tokens.eos.is_empty()
    {
        let pad = tokenizer.and_then(|t| t.inner().token_to_id(PAD));
        // As in the training stream, a text begins after what ended another.
        spec.tokens = SpecialTokens { bos: Some(eos), eos: vec![eos], pad };
    }
    spec
}

/// A `tokenizer_config.json`, so that other programs know the class and the special tokens.
fn tokenizer_config(tokenizer: &TextTokenizer, config: &RunConfig) -> Option<String> {
    let beside = config.data.tokenizer.as_ref().map(|path| match path.is_dir() {
        true => path.join(TOKENIZER_CONFIG),
        false => path.with_file_name(TOKENIZER_CONFIG),
    });
    if let Some(text) = beside.and_then(|path| std::fs::read_to_string(path).ok()) {
        return Some(text);
    }
    let eos = tokenizer.inner().id_to_token(tokenizer.eos()?)?;
    let mut described = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": false,
        "model_max_length": config.model.max_positions,
    });
    if tokenizer.inner().token_to_id(PAD).is_some() {
        described["pad_token"] = PAD.into();
    }
    Some(format!("{described:#}\n"))
}

/// Windows of a data set.
struct Windows {
    data: Dataset,
    batch: usize,
    sequence: usize,
    seed: u64,
}

impl BatchSource for Windows {
    fn micro_batch(&self, index: u64) -> Result<MicroBatch> {
        let batch = self.data.batch(index, self.batch, self.sequence, self.seed)?;
        Ok(MicroBatch { tokens: batch.tokens, batch: self.batch })
    }
}

impl EvalText {
    /// The held-out windows of a data set: `max_tokens` of them over all domains, or all.
    pub fn held_out(data: &Dataset, sequence: usize, max_tokens: Option<usize>) -> Result<Self> {
        let windows = data.held_out(sequence, max_tokens)?;
        Ok(Self {
            documents: windows.iter().map(|w| w.document).collect(),
            windows: windows.into_iter().map(|w| (w.tokens, w.domain)).collect(),
            domains: data.domains().to_vec(),
            bytes_of_token: data.tokenizer().bytes_of_tokens().to_vec(),
        })
    }
}

/// The held-out part of the text that a run was trained on, in the tokens of `tokenizer`.
pub fn held_out_of(
    data: &DataConfig,
    tokenizer: PathBuf,
    sequence: usize,
    max_tokens: Option<usize>,
    cache: &Path,
    progress: &dyn DataProgress,
) -> Result<EvalText> {
    let data = DataConfig { tokenizer: Some(tokenizer), ..data.clone() };
    EvalText::held_out(&Dataset::open(&data, cache, progress)?, sequence, max_tokens)
}
