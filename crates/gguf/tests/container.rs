//! Files written and read again, and files that are broken: each an error, never a panic.

#![allow(clippy::unwrap_used)]

use senmon_gguf::{Array, ElementType, Gguf, Value, Writer};

/// Numbers that follow from a seed.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

fn values() -> Vec<(&'static str, Value)> {
    vec![
        ("general.architecture", Value::String("llama".into())),
        ("a.u8", Value::U8(7)),
        ("a.i16", Value::I16(-3)),
        ("a.u64", Value::U64(u64::MAX)),
        ("a.f32", Value::F32(0.5)),
        ("a.f64", Value::F64(-1e300)),
        ("a.bool", Value::Bool(true)),
        ("a.texts", Value::Array(Array::String(vec!["ä".into(), String::new(), "z".into()]))),
        ("a.i32s", Value::Array(Array::I32(vec![1, -2, 3]))),
        ("a.nested", Value::Array(Array::Array(vec![Array::U8(vec![1]), Array::Bool(vec![])]))),
    ]
}

/// A file with every element type.
fn file(alignment: Option<u32>) -> (Vec<u8>, Vec<(String, Vec<usize>, ElementType, Vec<u8>)>) {
    let mut writer = Writer::new();
    for (key, value) in values() {
        writer.set(key, value).unwrap();
    }
    if let Some(alignment) = alignment {
        writer.set("general.alignment", Value::U32(alignment)).unwrap();
    }
    let mut state = 1;
    let mut tensors = Vec::new();
    for (n, ty) in ElementType::ALL.iter().copied().enumerate() {
        let shape = vec![1 + n % 3, 2 * ty.block_len()];
        let name = format!("blk.{n}.weight");
        writer.tensor(&name, &shape, ty).unwrap();
        let bytes = shape[0] * ty.row_bytes(shape[1]).unwrap();
        let data: Vec<u8> = (0..bytes).map(|_| random(&mut state) as u8).collect();
        tensors.push((name, shape, ty, data));
    }
    let mut out = Vec::new();
    let written = writer.write(&mut out, |info, to| {
        to.write_all(&tensors.iter().find(|(name, ..)| *name == info.name).unwrap().3)
    });
    assert_eq!(written.unwrap() as usize, out.len());
    (out, tensors)
}

#[test]
fn what_was_written_is_read() {
    for alignment in [None, Some(8), Some(256)] {
        let (bytes, tensors) = file(alignment);
        let read = Gguf::read(&bytes).unwrap();
        assert_eq!((read.version(), read.alignment()), (3, alignment.map_or(32, u64::from)));
        for (key, value) in values() {
            assert_eq!(read.metadata().get(key), Some(&value), "{key}");
        }
        assert_eq!(read.tensors().len(), tensors.len());
        for (tensor, (name, shape, ty, data)) in read.tensors().iter().zip(&tensors) {
            assert_eq!((&tensor.name, &tensor.shape, tensor.element_type), (name, shape, *ty));
            assert_eq!(tensor.bytes(&bytes), Some(&data[..]), "{name}");
            assert!((tensor.range.start as u64).is_multiple_of(read.alignment()));
            assert_eq!(read.tensor(name), Some(tensor));
        }
    }
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    let (bytes, _) = file(None);
    // What is behind the last tensor only fills up.
    let last = Gguf::read(&bytes).unwrap().tensors().iter().map(|tensor| tensor.range.end).max().unwrap();
    for end in (0..last).step_by(3) {
        let text = Gguf::read(&bytes[..end]).unwrap_err().to_string();
        assert!(!text.is_empty() && !text.contains('\n'), "{text}");
    }
}

/// Bytes changed at random, most of them in the header, where all is decided.
#[test]
fn no_bytes_make_it_panic_or_take_memory() {
    let (bytes, tensors) = file(None);
    let header = bytes.len() - tensors.iter().map(|tensor| tensor.3.len()).sum::<usize>();
    let mut state = 7;
    let mut refused = 0;
    for _ in 0..20_000 {
        let mut broken = bytes.clone();
        for _ in 0..1 + random(&mut state) % 4 {
            let at = random(&mut state) as usize % header;
            match random(&mut state) % 3 {
                0 => broken[at] ^= 1 << (random(&mut state) % 8),
                1 => broken[at] = 0xff,
                // A length or a count that is absurd.
                _ => broken[at..(at + 8).min(header)].fill(random(&mut state) as u8),
            }
        }
        match Gguf::read(&broken) {
            Ok(read) => {
                for tensor in read.tensors() {
                    assert!(tensor.range.end <= broken.len());
                }
            }
            Err(e) => {
                refused += 1;
                let text = e.to_string();
                assert!(!text.is_empty() && !text.contains('\n'), "{text:?}");
            }
        }
    }
    assert!(refused > 5_000, "{refused}");
}

#[test]
fn what_cannot_be_read_is_not_written() {
    let mut writer = Writer::new();
    writer.set("a", Value::U8(1)).unwrap();
    assert!(writer.set("a", Value::U8(2)).is_err());
    assert!(writer.set("general.alignment", Value::U32(24)).is_err());
    writer.tensor("w", &[2, 32], ElementType::Q8_0).unwrap();
    assert!(writer.tensor("w", &[2, 32], ElementType::Q8_0).is_err());
    let text = writer.tensor("v", &[2, 33], ElementType::Q8_0).unwrap_err().to_string();
    assert!(text.contains('v') && text.contains("32"), "{text}");
    // A tensor whose bytes are too few, or too many.
    for bytes in [67, 69] {
        assert!(writer.write(Vec::new(), |_, to| to.write_all(&vec![0; bytes])).is_err(), "{bytes}");
    }
}

#[test]
fn split_files_are_joined_by_their_names_and_keys() {
    use senmon_gguf::split::{file_name, join, parse_name, siblings};
    let name = file_name("model", 1, 3);
    assert_eq!(parse_name(&name), Some(("model", 1, 3)), "{name}");
    assert_eq!(parse_name("model.gguf"), None);
    let dir = tempfile::tempdir().unwrap();
    let part = |n: u16, tensors: i32| {
        let mut writer = Writer::new();
        writer.set("split.no", Value::U16(n)).unwrap();
        writer.set("split.count", Value::U16(2)).unwrap();
        writer.set("split.tensors.count", Value::I32(tensors)).unwrap();
        writer.tensor(&format!("t{n}"), &[1, 4], ElementType::F32).unwrap();
        let mut out = Vec::new();
        writer.write(&mut out, |_, to| to.write_all(&[0; 16])).unwrap();
        Gguf::read(&out).unwrap()
    };
    let joined = join(vec![part(0, 2), part(1, 2)]).unwrap();
    assert_eq!(joined.tensors.len(), 2);
    assert!(join(vec![part(1, 2), part(0, 2)]).is_err(), "in the wrong order");
    assert!(join(vec![part(0, 2)]).is_err(), "one is missing");
    assert!(join(vec![part(0, 3), part(1, 3)]).is_err(), "a tensor is missing");
    let [first, second] = [0, 1].map(|n| dir.path().join(file_name("m", n, 2)));
    std::fs::write(&second, "x").unwrap();
    let text = siblings(&second).unwrap_err().to_string();
    assert!(text.contains("m-00001-of-00002.gguf"), "{text}");
    std::fs::write(&first, "x").unwrap();
    assert_eq!(siblings(&second).unwrap(), [first, second]);
}
