//! Writes a small GGUF file with every type of value and of element that Senmon codes to: `write_sample
//! PATH`.
//!
//! `tools/gguf/check_container.py` holds what it wrote against the `gguf` package for Python.

use std::fs::File;
use std::io::BufWriter;
use std::process::ExitCode;

use senmon_gguf::{Array, ElementType, GgufError, Value, Writer};
use senmon_kernels::blocks::{can_quantize, quantize};

/// Element i of a tensor: the script computes the same.
fn element(i: usize) -> f32 {
    ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0
}

fn write(path: &str) -> Result<u64, GgufError> {
    let mut file = Writer::new();
    file.set("general.architecture", "sample")?
        .set("general.alignment", Value::U32(64))?
        .set("sample.u8", 200u8)?
        .set("sample.i8", -100i8)?
        .set("sample.u16", 60000u16)?
        .set("sample.i16", -30000i16)?
        .set("sample.u32", 4_000_000_000u32)?
        .set("sample.i32", -2_000_000_000i32)?
        .set("sample.f32", 0.1f32)?
        .set("sample.bool", true)?
        .set("sample.string", "mixture of 専門家")?
        .set("sample.u64", u64::MAX)?
        .set("sample.i64", i64::MIN)?
        .set("sample.f64", 0.1f64)?
        .set("sample.strings", ["a", "", "日本"].map(str::to_owned).to_vec())?
        .set("sample.floats", vec![1.5f32, -2.0])?
        .set("sample.integers", vec![-1i32, 2, 3])?
        .set("sample.bools", vec![true, false])?
        .set("sample.none", Array::U16(Vec::new()))?;
    for ty in ElementType::ALL.into_iter().filter(|ty| can_quantize(*ty)) {
        file.tensor(&format!("matrix.{ty}"), &[3, 256], ty)?;
    }
    file.tensor("vector", &[5], ElementType::F32)?;
    file.tensor("cube", &[2, 3, 4], ElementType::F16)?;
    file.write(BufWriter::new(File::create(path)?), |tensor, out| {
        let x: Vec<f32> = (0..tensor.shape.iter().product()).map(element).collect();
        let mut bytes = vec![0; tensor.bytes];
        quantize(tensor.element_type, &x, &mut bytes);
        out.write_all(&bytes)
    })
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [path] = args.as_slice() else {
        eprintln!("usage: write_sample PATH");
        return ExitCode::from(2);
    };
    match write(path) {
        Ok(bytes) => {
            println!("{path}: {bytes} bytes");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("{path}: {e}");
            ExitCode::FAILURE
        }
    }
}
