//! Files read and written: what the `gguf` package for Python wrote, there and back, and files that are
//! damaged.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use senmon_gguf::{Array, ElementType, Gguf, GgufError, Value, Writer, split};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// What `check_container.py` gave the package to write.
fn golden_keys() -> Vec<(&'static str, Value)> {
    vec![
        ("general.architecture", "golden".into()),
        ("golden.u8", 255u8.into()),
        ("golden.i8", (-128i8).into()),
        ("golden.u16", 65535u16.into()),
        ("golden.i16", (-32768i16).into()),
        ("golden.u32", u32::MAX.into()),
        ("golden.i32", i32::MIN.into()),
        ("golden.f32", 0.15625f32.into()),
        ("golden.bool", true.into()),
        ("golden.string", "two lines\nand 日本語".into()),
        ("golden.u64", u64::MAX.into()),
        ("golden.i64", i64::MIN.into()),
        ("golden.f64", 0.1f64.into()),
        ("golden.u8s", vec![1u8, 2, 255].into()),
        ("golden.i8s", vec![-1i8, 127].into()),
        ("golden.u16s", vec![1u16, 65535].into()),
        ("golden.i16s", vec![-32768i16, 5].into()),
        ("golden.u32s", vec![0, u32::MAX].into()),
        ("golden.i32s", vec![-1i32, 1].into()),
        ("golden.f32s", vec![0.5f32, -2.25].into()),
        ("golden.bools", vec![true, false, true].into()),
        ("golden.strings", ["a", "", "ü"].map(str::to_owned).to_vec().into()),
        ("golden.u64s", vec![u64::MAX].into()),
        ("golden.i64s", vec![i64::MIN, 0].into()),
        ("golden.f64s", vec![0.1f64, 1e300].into()),
        ("golden.nested", Array::Array(vec![Array::I32(vec![1, 2]), Array::I32(vec![3])]).into()),
    ]
}

fn golden_tensors() -> Vec<(&'static str, Vec<usize>, ElementType)> {
    vec![
        ("token_embd.weight", vec![4, 256], ElementType::Q6K),
        ("blk.0.ffn_gate_exps.weight", vec![2, 3, 256], ElementType::Q4K),
        ("blk.0.ffn_up_exps.weight", vec![2, 3, 64], ElementType::Mxfp4),
        ("blk.0.attn_q.weight", vec![2, 64], ElementType::Q8_0),
        ("blk.0.attn_k.weight", vec![5, 32], ElementType::Q4_0),
        ("blk.0.attn_v.weight", vec![3, 7], ElementType::Bf16),
        ("blk.0.attn_output.weight", vec![2, 2, 2, 3], ElementType::F16),
        ("output_norm.weight", vec![9], ElementType::F32),
        ("blk.0.iq", vec![1, 256], ElementType::Iq4Xs),
    ]
}

/// The bytes of tensor i of the golden file.
fn counted(i: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|j| ((j * 7 + i) % 251) as u8).collect()
}

#[test]
fn a_file_of_the_python_package_is_read_whole() {
    let file = std::fs::read(golden("package.gguf")).unwrap();
    let gguf = Gguf::read(&file).unwrap();
    assert_eq!((gguf.version(), gguf.alignment()), (3, 32));
    let keys: Vec<_> = gguf.metadata().iter().map(|(key, value)| (key, value.clone())).collect();
    assert_eq!(keys, golden_keys());
    assert_eq!(gguf.tensors().len(), golden_tensors().len());
    for (i, (name, shape, ty)) in golden_tensors().into_iter().enumerate() {
        let tensor = gguf.tensor(name).unwrap();
        assert_eq!(tensor, &gguf.tensors()[i]);
        assert_eq!((&tensor.shape, tensor.element_type), (&shape, ty));
        let bytes = tensor.bytes(&file).unwrap();
        assert_eq!(bytes, counted(i, ty.row_bytes(shape.iter().product()).unwrap()), "{name}");
    }
}

#[test]
fn the_writer_writes_the_bytes_of_the_python_package() {
    let mut writer = Writer::new();
    for (key, value) in golden_keys() {
        writer.set(key, value).unwrap();
    }
    for (name, shape, ty) in golden_tensors() {
        writer.tensor(name, &shape, ty).unwrap();
    }
    let (mut file, mut i) = (Vec::new(), 0);
    let written = writer.write(&mut file, |tensor, out| {
        i += 1;
        // In pieces, as a converter would.
        counted(i - 1, tensor.bytes).chunks(100).try_for_each(|piece| out.write_all(piece))
    });
    assert_eq!(written.unwrap(), file.len() as u64);
    assert!(file == std::fs::read(golden("package.gguf")).unwrap());
}

#[test]
fn every_element_type_is_written_and_read_at_any_alignment() {
    for alignment in [1u32, 8, 64, 4096] {
        let mut writer = Writer::new();
        writer.set("general.alignment", alignment).unwrap();
        for (n, ty) in ElementType::ALL.into_iter().enumerate() {
            writer.tensor(ty.name(), &[1 + n % 3, 3 * ty.block_len()], ty).unwrap();
        }
        let (mut file, mut i) = (Vec::new(), 0);
        let written = writer.write(&mut file, |tensor, out| {
            i += 1;
            out.write_all(&counted(i - 1, tensor.bytes))
        });
        assert_eq!(written.unwrap(), file.len() as u64);
        let gguf = Gguf::read(&file).unwrap();
        assert_eq!(gguf.alignment(), alignment.into());
        assert_eq!(gguf.tensors().len(), writer.tensors().len());
        for (i, (tensor, info)) in gguf.tensors().iter().zip(writer.tensors()).enumerate() {
            assert_eq!((&tensor.name, &tensor.shape), (&info.name, &info.shape));
            assert_eq!(tensor.element_type, info.element_type);
            assert!(tensor.range.start.is_multiple_of(alignment as usize));
            assert_eq!(tensor.bytes(&file).unwrap(), counted(i, info.bytes));
        }
    }
}

#[test]
fn the_writer_refuses_what_could_not_be_read() {
    let error = |change: fn(&mut Writer) -> Result<(), GgufError>| {
        let mut writer = Writer::new();
        writer.set("a", 1u8).unwrap().tensor("t", &[32], ElementType::Q8_0).unwrap();
        change(&mut writer).unwrap_err().to_string()
    };
    assert_eq!(error(|w| w.set("a", 2u8).map(drop)), "key a: is set twice");
    assert_eq!(error(|w| w.set("", 2u8).map(drop)), "key \"\": has 0 bytes, expected 1 to 65535");
    assert!(error(|w| w.set("general.alignment", 48u32).map(drop)).ends_with("a power of two"));
    assert!(error(|w| w.set("general.alignment", 64u64).map(drop)).ends_with("a power of two"));
    let deep = (0..9).fold(Array::U8(vec![]), |inner, _| Array::Array(vec![inner]));
    assert!(matches!(Writer::new().set("a", deep), Err(GgufError::Key { .. })));
    assert_eq!(error(|w| w.tensor("t", &[1], ElementType::F32).map(drop)), "tensor t: is named twice");
    assert!(
        error(|w| w.tensor("u", &[2, 33], ElementType::Q8_0).map(drop))
            .contains("whole blocks of 32 for Q8_0")
    );
    assert!(error(|w| w.tensor("u", &[1, 1, 1, 1, 1], ElementType::F32).map(drop)).contains("at most 4"));
    assert!(error(|w| w.tensor("u", &[3, 0], ElementType::F32).map(drop)).contains("none 0"));
    assert!(
        error(|w| w.tensor("u", &[usize::MAX, 2], ElementType::F32).map(drop)).contains("more than memory")
    );
    assert!(
        error(|w| w.tensor(&"n".repeat(64), &[1], ElementType::F32).map(drop)).contains("expected 1 to 63")
    );
    // Too few and too many bytes for a tensor.
    let few = error(|w| w.write(Vec::new(), |_, out| out.write_all(&[0; 33])).map(drop));
    assert_eq!(few, "tensor t: 1 of 34 bytes were not written");
    let many = error(|w| w.write(Vec::new(), |_, out| out.write_all(&[0; 35])).map(drop));
    assert_eq!(many, "cannot write: 1 bytes more than the tensor has");
}

#[test]
fn values_are_asked_for_by_type_and_errors_name_the_key() {
    let file = std::fs::read(golden("package.gguf")).unwrap();
    let (metadata, _) = Gguf::read(&file).unwrap().into_parts();
    assert_eq!(metadata.require::<u64>("golden.u8").unwrap(), 255);
    assert_eq!(metadata.require::<i64>("golden.i8").unwrap(), -128);
    assert_eq!(metadata.require::<usize>("golden.u64").unwrap() as u64, u64::MAX);
    assert_eq!(metadata.require::<f64>("golden.f32").unwrap(), 0.15625);
    assert_eq!(metadata.require::<f32>("golden.f64").unwrap(), 0.1);
    assert!(metadata.require::<bool>("golden.bool").unwrap());
    assert_eq!(metadata.require::<&str>("general.architecture").unwrap(), "golden");
    assert_eq!(metadata.require::<&[String]>("golden.strings").unwrap(), ["a", "", "ü"]);
    assert_eq!(metadata.require::<Vec<i64>>("golden.i8s").unwrap(), [-1, 127]);
    assert_eq!(metadata.require::<&[f32]>("golden.f32s").unwrap(), [0.5, -2.25]);
    assert_eq!(metadata.require::<&Array>("golden.nested").unwrap().len(), 2);
    assert_eq!(metadata.find::<u32>("golden.nothing").unwrap(), None);
    let error = |e: Result<u32, GgufError>| e.unwrap_err().to_string();
    assert_eq!(
        error(metadata.require("golden.nothing")),
        "key golden.nothing: is missing, expected an integer from 0 to 2^32 - 1"
    );
    assert_eq!(
        error(metadata.require("golden.i8")),
        "key golden.i8: is -128, expected an integer from 0 to 2^32 - 1"
    );
    assert_eq!(
        error(metadata.require("golden.strings")),
        "key golden.strings: is an ARRAY of 3 STRING, expected an integer from 0 to 2^32 - 1"
    );
    assert!(
        metadata.require::<Vec<u32>>("golden.i32s").unwrap_err().to_string().contains("an ARRAY with -1")
    );
    assert!(
        metadata.find::<&str>("golden.u8").unwrap_err().to_string().ends_with("is UINT8, expected a STRING")
    );
}

/// A file put together by hand, so that it can be wrong.
#[derive(Clone)]
struct Raw(Vec<u8>);

impl Raw {
    fn header(tensors: u64, keys: u64) -> Self {
        Raw([b"GGUF".as_slice(), &3u32.to_le_bytes(), &tensors.to_le_bytes(), &keys.to_le_bytes()].concat())
    }

    fn u32(mut self, x: u32) -> Self {
        self.0.extend(x.to_le_bytes());
        self
    }

    fn u64(mut self, x: u64) -> Self {
        self.0.extend(x.to_le_bytes());
        self
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn text(self, text: &str) -> Self {
        self.u64(text.len() as u64).raw(text.as_bytes())
    }

    fn tensor(self, name: &str, ne: &[u64], ty: u32, offset: u64) -> Self {
        let dims = self.text(name).u32(ne.len() as u32);
        ne.iter().fold(dims, |raw, n| raw.u64(*n)).u32(ty).u64(offset)
    }

    fn data(mut self, bytes: usize) -> Self {
        let start = self.0.len().next_multiple_of(32);
        self.0.resize(start + bytes, 0);
        self
    }

    fn error(&self) -> String {
        let error = Gguf::read(&self.0).unwrap_err().to_string();
        assert!(!error.contains('\n') && error.len() < 300, "{error}");
        error
    }
}

#[test]
fn damage_is_named() {
    let one = |raw: Raw| raw.error();
    let key = || Raw::header(0, 1).text("k");
    assert_eq!(one(Raw(b"GG".to_vec())), "it is not a GGUF file: it has fewer than 4 bytes");
    assert_eq!(
        one(Raw(b"\x08\0\0\0{\"__metadata__\"".to_vec())),
        "it is not a GGUF file: begins with \"\\x08\\x00\\x00\\x00\", expected \"GGUF\""
    );
    assert!(one(Raw(b"tjgg".to_vec())).contains("before GGUF"));
    assert_eq!(one(Raw(b"GGUF\x03\0".to_vec())), "the file ends within its header: it is cut short");
    assert!(one(Raw(b"GGUF\0\0\0\x03".to_vec())).contains("big endian"));
    assert!(one(Raw(b"GGUF\x01\0\0\0".to_vec())).contains("version 1,"));
    assert!(one(Raw(b"GGUF\x04\0\0\0".to_vec())).contains("version 4,"));
    // Counts and lengths beyond the file, in each place that has one.
    assert!(one(Raw::header(u64::MAX, 0)).contains("18446744073709551615 tensors"));
    assert!(one(Raw::header(0, 1 << 40)).contains("1099511627776 keys"));
    let padding = [0; 64];
    assert!(
        one(Raw::header(0, 1).u64(u64::MAX).raw(&padding))
            .starts_with("the name of key 1 of 1: the file ends")
    );
    assert!(
        one(Raw::header(1, 0).u64(1 << 33).raw(&padding)).starts_with("the name of tensor 1: the file ends")
    );
    assert!(one(key().u32(8).u64(1 << 60).raw(&padding)).starts_with("key k: the file ends in the middle"));
    for ty in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12] {
        for count in [65, 1 << 20, 1 << 61, u64::MAX] {
            let error = one(key().u32(9).u32(ty).u64(count).raw(&padding));
            assert!(error.starts_with("key k: the file ends in the middle"), "{ty} × {count}: {error}");
        }
    }
    // Values and keys that cannot be.
    assert_eq!(one(key().u32(13).raw(&padding)), "key k: has the unknown value type 13");
    assert_eq!(one(key().u32(9).u32(99).raw(&padding)), "key k: has the unknown value type 99");
    assert_eq!(one(key().u32(7).raw(&[2])), "key k: is a BOOL of 2, expected 0 or 1");
    assert!(one(key().u32(8).u64(2).raw(b"\xff\xfe")).contains("not UTF-8"));
    assert!(one(Raw::header(0, 1).u64(1).raw(b"\xff").raw(&padding)).contains("not UTF-8"));
    assert_eq!(one(Raw::header(0, 1).text("").u32(0).raw(&padding)), "key 1 of 1 has no name");
    assert_eq!(
        one(Raw::header(0, 2).text("k").u32(0).raw(&[1]).text("k").u32(0).raw(&[1])),
        "key k: is there twice"
    );
    let deep = (0..100_000).fold(key().u32(9), |raw, _| raw.u32(9).u64(1));
    assert!(one(deep).contains("more than 8 deep"));
    assert!(one(Raw::header(0, 1).text("a\nb").u32(77).raw(&padding)).starts_with("key a\\nb: "));
    assert!(one(Raw::header(0, 1).text(&"x".repeat(1000)).u32(77)).contains("xxx...: has"));
    // The alignment.
    for bad in [0, 3, 48] {
        let error = one(Raw::header(0, 1).text("general.alignment").u32(4).u32(bad));
        assert_eq!(error, format!("key general.alignment: is {bad}, expected a power of two"));
    }
    assert!(
        one(Raw::header(0, 1).text("general.alignment").u32(8).text("32")).contains("is STRING, expected")
    );
}

#[test]
fn tensors_that_cannot_be_are_named() {
    let one = |ne: &[u64], ty, offset| Raw::header(1, 0).tensor("t", ne, ty, offset).data(64).error();
    assert_eq!(one(&[1; 5], 0, 0), "tensor t: has 5 dimensions, expected at most 4");
    assert_eq!(one(&[256], 16, 0), "tensor t: has elements of type IQ2_XXS, which Senmon does not read");
    assert_eq!(one(&[256], 26, 0), "tensor t: has elements of type I32, which Senmon does not read");
    assert_eq!(one(&[256], 999, 0), "tensor t: has elements of the unknown type 999");
    assert_eq!(
        one(&[33, 2], 8, 0),
        "tensor t: has shape [2, 33], expected rows of whole blocks of 32 for Q8_0"
    );
    assert!(one(&[1 << 40, 1 << 40], 0, 0).contains("[1099511627776, 1099511627776], more than memory"));
    assert!(one(&[u64::MAX], 0, 0).contains("more than memory"));
    assert_eq!(one(&[4], 0, 8), "tensor t: begins at 8, expected a multiple of the alignment 32");
    assert_eq!(
        one(&[17], 0, 0),
        "tensor t: has 68 bytes from 64 on, the file has 128: it is cut short or damaged"
    );
    assert!(one(&[1], 0, u64::MAX - 31).contains("cut short or damaged"));
    assert!(one(&[1 << 61], 8, 1 << 62).contains("cut short or damaged"));
    let two = |a: &str, b: &str, offset| {
        Raw::header(2, 0).tensor(a, &[16], 0, 0).tensor(b, &[4], 0, offset).data(96)
    };
    assert_eq!(two("a", "a", 64).error(), "tensor a: is there twice");
    assert_eq!(two("a", "b", 32).error(), "tensor b: shares bytes with tensor a: the file is damaged");
    assert_eq!(two("a", "b", 0).error(), "tensor b: shares bytes with tensor a: the file is damaged");
    assert_eq!(Gguf::read(&two("a", "b", 64).0).unwrap().tensors().len(), 2);
    // Tensors of nothing share no bytes with others.
    let empty = Raw::header(2, 0).tensor("a", &[16], 0, 0).tensor("b", &[4, 0], 0, 32).data(64);
    assert_eq!(Gguf::read(&empty.0).unwrap().tensor("b").unwrap().shape, [0, 4]);
    // A number without dimensions.
    let scalar = Raw::header(1, 0).tensor("a", &[], 0, 0).data(4);
    assert!(Gguf::read(&scalar.0).unwrap().tensor("a").unwrap().shape.is_empty());
    // As above but with the alignment that makes the beginning of tensors overflow.
    let far = Raw::header(1, 1).text("general.alignment").u32(10).u64(1 << 63);
    assert!(far.tensor("t", &[1], 0, 0).data(64).error().contains("cut short or damaged"));
}

#[test]
fn a_file_that_is_cut_anywhere_is_an_error_of_one_line() {
    let file = std::fs::read(golden("package.gguf")).unwrap();
    let last = Gguf::read(&file).unwrap().tensors().iter().map(|tensor| tensor.range.end).max().unwrap();
    for len in 0..last {
        let error = Gguf::read(&file[..len]).unwrap_err().to_string();
        assert!(error.lines().count() == 1 && (len < 4 || error.contains("cut short")), "{len}: {error}");
    }
    // The padding behind the last tensor may be missing.
    assert!(Gguf::read(&file[..last]).is_ok());
}

#[test]
fn version_2_is_read_like_version_3() {
    let mut file = std::fs::read(golden("package.gguf")).unwrap();
    let three = Gguf::read(&file).unwrap();
    file[4] = 2;
    let two = Gguf::read(&file).unwrap();
    assert_eq!((two.version(), two.tensors()), (2, three.tensors()));
}

fn read_all(paths: &[PathBuf]) -> Vec<Gguf> {
    paths.iter().map(|path| Gguf::read(&std::fs::read(path).unwrap()).unwrap()).collect()
}

#[test]
fn split_files_are_found_and_joined_from_any_of_them() {
    for n in 1..=3 {
        let paths = split::siblings(&golden(&format!("split-0000{n}-of-00003.gguf"))).unwrap();
        let joined = split::join(read_all(&paths)).unwrap();
        assert_eq!(joined.metadata.require::<u32>("golden.block_count").unwrap(), 5);
        let found: Vec<_> =
            joined.tensors.iter().map(|(file, tensor)| (*file, tensor.name.as_str())).collect();
        let want =
            [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4)].map(|(file, i)| (file, format!("blk.{i}.weight")));
        assert_eq!(found, want.iter().map(|(file, name)| (*file, name.as_str())).collect::<Vec<_>>());
        for (i, (file, tensor)) in joined.tensors.iter().enumerate() {
            let bytes = std::fs::read(&paths[*file]).unwrap();
            assert_eq!(tensor.bytes(&bytes).unwrap(), (i as f32).to_le_bytes().repeat(6));
        }
    }
    let whole = split::siblings(&golden("package.gguf")).unwrap();
    assert_eq!(whole, [golden("package.gguf")]);
    assert_eq!(split::join(read_all(&whole)).unwrap().tensors.len(), golden_tensors().len());
}

#[test]
fn split_files_that_do_not_belong_together_are_refused() {
    let paths = split::siblings(&golden("split-00001-of-00003.gguf")).unwrap();
    let error = |order: &[usize]| {
        let paths: Vec<_> = order.iter().map(|i| paths[*i].clone()).collect();
        split::join(read_all(&paths)).unwrap_err().to_string()
    };
    assert_eq!(error(&[0, 2, 1]), "file 2 of 3: key split.no: is 2, expected 1: files are misnamed");
    assert_eq!(error(&[0, 1]), "file 1 of 2: key split.count: is 3, there are 2 files");
    assert!(error(&[0]).starts_with("key split.count: is 3, there are 1 files: it must be named like"));
    assert_eq!(error(&[]), "no files were given");
    // One that is missing is named, wherever one begins.
    let dir = tempfile::tempdir().unwrap();
    for i in [0, 2] {
        std::fs::copy(&paths[i], dir.path().join(paths[i].file_name().unwrap())).unwrap();
    }
    let missing = split::siblings(&dir.path().join("split-00003-of-00003.gguf")).unwrap_err().to_string();
    assert!(
        missing.starts_with("no such file: ")
            && missing.contains("split-00002-of-00003.gguf (a model in 3 files")
    );
    // Files of two models, and tensors that are lost or there twice.
    let part = |number: u16, tensors: u32, names: &[&str]| {
        let mut writer = Writer::new();
        writer.set("split.no", number).unwrap().set("split.count", 2u16).unwrap();
        writer.set("split.tensors.count", tensors as i32).unwrap();
        for name in names {
            writer.tensor(name, &[1], ElementType::F32).unwrap();
        }
        let mut file = Vec::new();
        writer.write(&mut file, |_, out| out.write_all(&[0; 4])).unwrap();
        Gguf::read(&file).unwrap()
    };
    let join = |files| split::join(files).unwrap_err().to_string();
    assert_eq!(
        join(vec![part(0, 2, &["a"]), part(1, 3, &["b"])]),
        "file 2 of 2: key split.tensors.count: is 3, in file 1 it is 2: they are of two models"
    );
    assert_eq!(
        join(vec![part(0, 3, &["a"]), part(1, 3, &["b"])]),
        "key split.tensors.count: is 3, there are 2 tensors"
    );
    assert_eq!(
        join(vec![part(0, 2, &["a"]), part(1, 2, &["a"])]),
        "file 2 of 2: tensor a: is in an earlier file too"
    );
}

#[test]
fn names_of_split_files_are_taken_apart_and_put_together() {
    assert_eq!(split::parse_name("a-b-00002-of-00011.gguf"), Some(("a-b", 1, 11)));
    assert_eq!(split::file_name("a-b", 1, 11), "a-b-00002-of-00011.gguf");
    for name in [
        "a.gguf",
        "a-00000-of-00003.gguf",
        "a-00004-of-00003.gguf",
        "a-1-of-3.gguf",
        "a-00001-of-00003.safetensors",
        "a-0000x-of-00003.gguf",
        "-of-.gguf",
        "00001-of-00003.gguf",
    ] {
        assert_eq!(split::parse_name(name), None, "{name}");
    }
}
