//! The reader of GGUF: any bytes are a file or an error of one line; what is read can be written and read
//! again.

#![allow(clippy::unwrap_used)]

use senmon_fuzz::fuzz;
use senmon_gguf::{Array, ElementType, Gguf, GgufError, Tensor, Value, Writer, split};

/// An error without its numbers and names.
fn word(error: &GgufError) -> String {
    let text = error.to_string();
    assert!(!text.is_empty() && text.lines().count() == 1 && text.len() < 2000, "{text:?}");
    let (kind, what) = match error {
        GgufError::Key { what, .. } => ("key", what),
        GgufError::Tensor { what, .. } => ("tensor", what),
        GgufError::File { what } => ("file", what),
        other => return format!("{other:?}"),
    };
    // The first words say which error it is; names come later.
    let plain = what.chars().filter(|c| c.is_ascii_lowercase() || *c == ' ').take(24);
    [kind, " "].into_iter().map(str::to_owned).chain(plain.map(String::from)).collect()
}

/// What must hold of a file that was read.
fn check(gguf: &Gguf, file: &[u8]) {
    let mut ranges: Vec<_> = Vec::new();
    for tensor in gguf.tensors() {
        let bytes = tensor.bytes(file).expect("it lies in the file");
        let elements = tensor.shape.iter().product();
        assert_eq!(tensor.element_type.row_bytes(elements), Some(bytes.len()));
        assert_eq!(gguf.tensor(&tensor.name), Some(tensor));
        if !bytes.is_empty() {
            assert!((tensor.range.start as u64).is_multiple_of(gguf.alignment()));
            ranges.push(tensor.range.clone());
        }
    }
    ranges.sort_by_key(|range| range.start);
    assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
    let metadata = gguf.metadata();
    for (key, value) in metadata.iter() {
        assert!(metadata.get(key).is_some());
        let asked = [
            metadata.require::<u32>(key).err(),
            metadata.require::<i64>(key).err(),
            metadata.require::<f32>(key).err(),
            metadata.require::<bool>(key).err(),
            metadata.require::<&str>(key).err(),
            metadata.require::<&[String]>(key).err(),
            metadata.require::<Vec<u64>>(key).err(),
            metadata.require::<&Array>(key).err(),
        ];
        asked.iter().flatten().for_each(|e| drop(word(e)));
        assert!(asked.iter().any(Option::is_none) || matches!(value, Value::U64(_) | Value::I64(_)));
    }
}

/// Writes it again, as far as the writer takes it.
fn rewrite(gguf: &Gguf, file: &[u8]) -> Option<Vec<u8>> {
    let mut writer = Writer::new();
    for (key, value) in gguf.metadata().iter() {
        writer.set(key, value.clone()).ok()?;
    }
    for tensor in gguf.tensors() {
        writer.tensor(&tensor.name, &tensor.shape, tensor.element_type).ok()?;
    }
    // Padding as wide as memory is a file that nobody writes.
    if gguf.alignment() > 1 << 16 {
        return None;
    }
    let mut out = Vec::new();
    let written = writer.write(&mut out, |info, out| {
        out.write_all(gguf.tensor(&info.name).and_then(|tensor| tensor.bytes(file)).unwrap_or_default())
    });
    assert_eq!(written.unwrap(), out.len() as u64);
    Some(out)
}

fn read(file: &[u8]) -> String {
    let gguf = match Gguf::read(file) {
        Ok(gguf) => gguf,
        Err(e) => return word(&e),
    };
    check(&gguf, file);
    let joined =
        split::join(vec![gguf.clone()]).map_or_else(|e| word(&e), |joined| joined.tensors.len().to_string());
    if let Some(again) = rewrite(&gguf, file) {
        let back = Gguf::read(&again).expect("what was written can be read");
        check(&back, &again);
        let same = |a: &Tensor, b: &Tensor| {
            (&a.name, &a.shape, a.element_type, a.bytes(file))
                == (&b.name, &b.shape, b.element_type, b.bytes(&again))
        };
        assert!(gguf.tensors().len() == back.tensors().len());
        assert!(gguf.tensors().iter().zip(back.tensors()).all(|(a, b)| same(a, b)));
        // Bytes rather than values: a number that is none is not equal to itself.
        assert!(rewrite(&back, &again).expect("it was written before") == again);
    }
    let kinds = gguf.metadata().iter().fold(0, |kinds, (_, value)| kinds | 1 << (value.value_type() as u32));
    let types = gguf.tensors().iter().fold(0, |types, tensor| types | 1u64 << tensor.element_type.ggml_id());
    format!("{joined} {kinds:b} {types:b}")
}

/// A few files, short so that damage meets every field.
fn seeds() -> Vec<Vec<u8>> {
    let write = |writer: &Writer| {
        let mut file = Vec::new();
        writer.write(&mut file, |tensor, out| out.write_all(&vec![0x11; tensor.bytes])).unwrap();
        file
    };
    let mut keys = Writer::new();
    keys.set("a", 1u8).unwrap().set("b", "text").unwrap().set("c", vec![1u32, 2]).unwrap();
    keys.set("d", ["x", "y"].map(str::to_owned).to_vec()).unwrap().set("e", true).unwrap();
    keys.set("f", Array::Array(vec![Array::U8(vec![1]), Array::Array(vec![])]))
        .unwrap()
        .set("g", f64::NAN)
        .unwrap();
    let mut tensors = Writer::new();
    tensors.set("general.alignment", 8u32).unwrap();
    for (name, shape, ty) in [
        ("a", vec![2, 3], ElementType::F32),
        ("b", vec![2, 32], ElementType::Q8_0),
        ("c", vec![256], ElementType::Q4K),
        ("d", vec![], ElementType::F16),
    ] {
        tensors.tensor(name, &shape, ty).unwrap();
    }
    let mut part = Writer::new();
    part.set("split.no", 0u16)
        .unwrap()
        .set("split.count", 1u16)
        .unwrap()
        .set("split.tensors.count", 0i32)
        .unwrap();
    let golden = include_bytes!("../../crates/gguf/tests/golden/package.gguf").to_vec();
    vec![write(&Writer::new()), write(&keys), write(&tensors), write(&part), golden]
}

#[test]
fn any_bytes_are_a_file_or_an_error_of_one_line() {
    fuzz("gguf", &seeds(), 150_000, read);
}
