//! A trace in a safetensors file: written whole, and read with nothing taken on trust.

use crate::error::{InsightError, Result, shown};
use crate::trace::{About, LayerTrace, Trace, name};
use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;

/// The columns of a trace, which are there once; the names of a layer's are followed by its number.
const COLUMNS: [&str; 8] =
    ["tokens", "sequence", "position", "targets", "predicted", "loss", "domains", "documents"];

/// Elements of a tensor to write.
enum Elements<'a> {
    U32(&'a [u32]),
    F32(&'a [f32]),
    U16(&'a [u16]),
    U8(&'a [u8]),
}

impl Elements<'_> {
    /// The name of the type in the file, the size of an element, and how many there are.
    fn kind(&self) -> (&'static str, usize, usize) {
        match self {
            Elements::U32(x) => ("U32", 4, x.len()),
            Elements::F32(x) => ("F32", 4, x.len()),
            Elements::U16(x) => ("U16", 2, x.len()),
            Elements::U8(x) => ("U8", 1, x.len()),
        }
    }

    fn write(&self, out: &mut dyn Write) -> std::io::Result<()> {
        /// Elements that are turned into bytes at once.
        const CHUNK: usize = 1 << 14;
        fn all<T: Copy, const B: usize>(
            x: &[T],
            bytes: impl Fn(T) -> [u8; B],
            out: &mut dyn Write,
        ) -> std::io::Result<()> {
            x.chunks(CHUNK).try_for_each(|part| {
                let part: Vec<u8> = part.iter().flat_map(|x| bytes(*x)).collect();
                out.write_all(&part)
            })
        }
        match self {
            Elements::U32(x) => all(x, u32::to_le_bytes, out),
            Elements::F32(x) => all(x, f32::to_le_bytes, out),
            Elements::U16(x) => all(x, u16::to_le_bytes, out),
            Elements::U8(x) => out.write_all(x),
        }
    }
}

impl Trace {
    /// Writes it to a file, whole or not at all. Equal traces have equal bytes.
    pub fn write(&self, path: &Path) -> Result<()> {
        self.validate().map_err(in_file(path))?;
        let write = |out: &mut dyn Write| self.write_to(out);
        senmon_files::write_whole(path, write).map_err(|source| InsightError::Io {
            action: "write",
            path: path.into(),
            source,
        })
    }

    /// Writes the bytes of a file of it, which must be sound ([`validate`](Self::validate)).
    pub fn write_to(&self, out: &mut dyn Write) -> std::io::Result<()> {
        let n = self.len();
        let mut tensors: Vec<(String, Elements, Vec<usize>)> = Vec::new();
        for (column, elements) in [
            ("tokens", Elements::U32(&self.tokens)),
            ("sequence", Elements::U32(&self.sequence)),
            ("position", Elements::U32(&self.position)),
            ("targets", Elements::U32(&self.targets)),
            ("predicted", Elements::U32(&self.predicted)),
            ("loss", Elements::F32(&self.loss)),
            ("domains", Elements::U16(&self.domains)),
        ] {
            tensors.push((column.into(), elements, vec![n]));
        }
        if !self.documents.is_empty() {
            tensors.push(("documents".into(), Elements::U32(&self.documents), vec![n]));
        }
        for (l, layer) in &self.layers {
            let shape = vec![n, layer.top_k];
            tensors.push((name("experts", *l), Elements::U16(&layer.experts), shape.clone()));
            tensors.push((name("weights", *l), Elements::F32(&layer.weights), shape.clone()));
            tensors.push((name("dropped", *l), Elements::U8(&layer.dropped), shape));
            if let (Some(logits), Some(count)) = (&layer.logits, layer.count) {
                tensors.push((name("logits", *l), Elements::F32(logits), vec![n, count]));
            }
        }
        // The widest first, so that each begins at a multiple of its width.
        tensors.sort_by_key(|(_, elements, _)| std::cmp::Reverse(elements.kind().1));
        let (mut header, mut at) = (Map::new(), 0);
        header.insert("__metadata__".into(), self.metadata());
        for (name, elements, shape) in &tensors {
            let (dtype, width, count) = elements.kind();
            let end = at + width * count;
            let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [at, end] });
            header.insert(name.clone(), entry);
            at = end;
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        tensors.iter().try_for_each(|(_, elements, _)| elements.write(out))
    }

    /// The metadata: texts by key.
    fn metadata(&self) -> Value {
        let layers: Vec<usize> = self.layers.keys().copied().collect();
        let mut metadata = Map::new();
        let mut set = |key: &str, text: String| metadata.insert(key.into(), text.into());
        set("model", self.about.model.clone());
        set("router", self.about.router.clone());
        set("domains", json!(self.about.domains).to_string());
        set("layers", json!(layers).to_string());
        if self.layers.values().any(|layer| layer.name.is_some()) {
            let name = |(l, layer): (&usize, &LayerTrace)| layer.name.clone().unwrap_or(l.to_string());
            set("names", json!(self.layers.iter().map(name).collect::<Vec<_>>()).to_string());
        }
        if let Some(counts) = self.layers.values().map(|layer| layer.count).collect::<Option<Vec<_>>>() {
            set("experts", json!(counts).to_string());
        }
        Value::Object(metadata)
    }

    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|source| InsightError::Io {
            action: "read",
            path: path.into(),
            source,
        })?;
        Self::from_bytes(&bytes).map_err(in_file(path))
    }

    /// The trace in the bytes of a file.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let no_file = |e: safetensors::SafeTensorError| {
            InsightError::trace(format!("is not a whole safetensors file: {}", shown(&e.to_string())))
        };
        let file = SafeTensors::deserialize(bytes).map_err(no_file)?;
        let metadata = SafeTensors::read_metadata(bytes).map_err(no_file)?.1;
        let about = About {
            model: text(&metadata, "model")?.to_owned(),
            router: text(&metadata, "router")?.to_owned(),
            domains: list(&metadata, "domains", "names", |name| name.as_str().map(str::to_owned))?,
        };
        let number = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
        let numbers: Vec<usize> = list(&metadata, "layers", "numbers", number)?;
        if !numbers.is_sorted_by(|a, b| a < b) {
            return Err(InsightError::trace("the metadata `layers` are not rising numbers"));
        }
        let of_layers = |key: &str| metadata.metadata().as_ref().is_some_and(|all| all.contains_key(key));
        let counts = match of_layers("experts") {
            true => Some(list(&metadata, "experts", "numbers", number)?),
            false => None,
        };
        let names = match of_layers("names") {
            true => Some(list(&metadata, "names", "names", |name| name.as_str().map(str::to_owned))?),
            false => None,
        };
        for (key, found) in
            [("experts", counts.as_ref().map(Vec::len)), ("names", names.as_ref().map(Vec::len))]
        {
            if let Some(found) = found.filter(|found| *found != numbers.len()) {
                let expected = numbers.len();
                let what = format!("the metadata `{key}` has {found} entries, there are {expected} layers");
                return Err(InsightError::trace(what));
            }
        }
        let mut known: BTreeSet<String> = COLUMNS.iter().map(|name| (*name).to_owned()).collect();
        let column = |name: &str, dtype: Dtype| match tensor(&file, name, dtype)? {
            (shape, bytes) if shape.len() == 1 => Ok(bytes),
            (shape, _) => Err(InsightError::tensor(name, format!("has shape {shape:?}, expected [N]"))),
        };
        let mut layers = BTreeMap::new();
        for (at, l) in numbers.into_iter().enumerate() {
            let (experts, weights, dropped) = (name("experts", l), name("weights", l), name("dropped", l));
            let (shape, ids) = tensor(&file, &experts, Dtype::U16)?;
            let &[_, top_k] = shape.as_slice() else {
                return Err(InsightError::tensor(&experts, format!("has shape {shape:?}, expected [N, K]")));
            };
            let same = |name: &str, dtype: Dtype| match tensor(&file, name, dtype)? {
                (found, bytes) if found == shape => Ok(bytes),
                (found, _) => {
                    let what = format!("has shape {found:?}, {experts} has {shape:?}");
                    Err(InsightError::tensor(name, what))
                }
            };
            let mut layer = LayerTrace {
                name: names.as_ref().map(|names| names[at].clone()).filter(|name| *name != l.to_string()),
                count: counts.as_ref().map(|counts| counts[at]),
                top_k,
                experts: u16s(ids),
                weights: f32s(same(&weights, Dtype::F32)?),
                dropped: same(&dropped, Dtype::U8)?.to_vec(),
                logits: None,
            };
            let logits = name("logits", l);
            if file.names().contains(&logits.as_str()) {
                let (shape, values) = tensor(&file, &logits, Dtype::F32)?;
                let &[_, count] = shape.as_slice() else {
                    let what = format!("has shape {shape:?}, expected [N, E]");
                    return Err(InsightError::tensor(&logits, what));
                };
                if layer.count.is_some_and(|known| known != count) {
                    let what = format!("has {count} experts, the metadata `experts` says otherwise");
                    return Err(InsightError::tensor(&logits, what));
                }
                (layer.count, layer.logits) = (Some(count), Some(f32s(values)));
            }
            known.extend([experts, weights, dropped, logits]);
            layers.insert(l, layer);
        }
        let trace = Self {
            about,
            tokens: u32s(column("tokens", Dtype::U32)?),
            sequence: u32s(column("sequence", Dtype::U32)?),
            position: u32s(column("position", Dtype::U32)?),
            targets: u32s(column("targets", Dtype::U32)?),
            predicted: u32s(column("predicted", Dtype::U32)?),
            loss: f32s(column("loss", Dtype::F32)?),
            domains: u16s(column("domains", Dtype::U16)?),
            documents: match file.names().contains(&"documents") {
                true => u32s(column("documents", Dtype::U32)?),
                false => Vec::new(),
            },
            layers,
        };
        if let Some(name) = file.names().into_iter().filter(|name| !known.contains(*name)).min() {
            return Err(InsightError::tensor(name, "is not part of a trace"));
        }
        trace.validate()?;
        Ok(trace)
    }
}

/// Says of an error which file it is about.
fn in_file(path: &Path) -> impl Fn(InsightError) -> InsightError {
    move |source| InsightError::File { path: path.into(), source: Box::new(source) }
}

/// A text of the metadata.
fn text<'a>(metadata: &'a Metadata, key: &str) -> Result<&'a str> {
    let found = metadata.metadata().as_ref().and_then(|all| all.get(key));
    found
        .map(String::as_str)
        .ok_or_else(|| InsightError::trace(format!("has no metadata `{key}`: it is no trace of routing")))
}

/// A list of the metadata, in JSON.
fn list<T>(metadata: &Metadata, key: &str, of: &str, one: impl Fn(&Value) -> Option<T>) -> Result<Vec<T>> {
    let text = text(metadata, key)?;
    let parsed: Option<Value> = serde_json::from_str(text).ok();
    let all = parsed.as_ref().and_then(Value::as_array).and_then(|all| all.iter().map(one).collect());
    all.ok_or_else(|| {
        InsightError::trace(format!("the metadata `{key}` is no JSON list of {of}: {}", shown(text)))
    })
}

/// Shape and bytes of a tensor that must be there with this type.
fn tensor<'a>(file: &SafeTensors<'a>, name: &str, dtype: Dtype) -> Result<(Vec<usize>, &'a [u8])> {
    let view = file.tensor(name).map_err(|_| InsightError::tensor(name, "is missing"))?;
    if view.dtype() != dtype {
        let what = format!("has type {:?}, expected {dtype:?}", view.dtype());
        return Err(InsightError::tensor(name, what));
    }
    Ok((view.shape().to_vec(), view.data()))
}

fn u32s(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn u16s(bytes: &[u8]) -> Vec<u16> {
    bytes.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes)).collect()
}
