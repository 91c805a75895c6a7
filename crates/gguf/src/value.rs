//! The values of metadata: numbers, truths, texts, and arrays of these and of arrays.

use std::fmt;

use crate::bytes::{Bad, Bytes};

/// The type of a value, with its number in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    const ALL: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::String,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    /// Its name, as the specification of GGUF has it.
    pub fn name(self) -> &'static str {
        match self {
            ValueType::U8 => "UINT8",
            ValueType::I8 => "INT8",
            ValueType::U16 => "UINT16",
            ValueType::I16 => "INT16",
            ValueType::U32 => "UINT32",
            ValueType::I32 => "INT32",
            ValueType::F32 => "FLOAT32",
            ValueType::Bool => "BOOL",
            ValueType::String => "STRING",
            ValueType::Array => "ARRAY",
            ValueType::U64 => "UINT64",
            ValueType::I64 => "INT64",
            ValueType::F64 => "FLOAT64",
        }
    }

    /// The type of that number.
    pub(crate) fn from_id(id: u32) -> Option<Self> {
        Self::ALL.get(id as usize).copied()
    }

    /// Bytes that a value of it takes at least.
    fn least_bytes(self) -> usize {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 | ValueType::String => 8,
            ValueType::Array => 12,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// Values of one type, one after another.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    /// Arrays, each of a type of its own. llama.cpp reads none of these.
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// One expression for whichever type an array has.
macro_rules! each_array {
    ($array:expr, $items:ident => $what:expr) => {
        match $array {
            Array::U8($items) => $what,
            Array::I8($items) => $what,
            Array::U16($items) => $what,
            Array::I16($items) => $what,
            Array::U32($items) => $what,
            Array::I32($items) => $what,
            Array::F32($items) => $what,
            Array::Bool($items) => $what,
            Array::String($items) => $what,
            Array::Array($items) => $what,
            Array::U64($items) => $what,
            Array::I64($items) => $what,
            Array::F64($items) => $what,
        }
    };
}

impl Value {
    /// Its type.
    pub fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::String(_) => ValueType::String,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// The integer, whatever its width.
    pub fn integer(&self) -> Option<i128> {
        Some(match self {
            Value::U8(x) => (*x).into(),
            Value::I8(x) => (*x).into(),
            Value::U16(x) => (*x).into(),
            Value::I16(x) => (*x).into(),
            Value::U32(x) => (*x).into(),
            Value::I32(x) => (*x).into(),
            Value::U64(x) => (*x).into(),
            Value::I64(x) => (*x).into(),
            _ => return None,
        })
    }

    /// What an error calls it: the type, for an array with that of its elements.
    pub(crate) fn described(&self) -> String {
        match self {
            Value::Array(array) => format!("an ARRAY of {} {}", array.len(), array.item_type()),
            other => other.value_type().name().to_owned(),
        }
    }
}

impl Array {
    /// The type of its elements.
    pub fn item_type(&self) -> ValueType {
        match self {
            Array::U8(_) => ValueType::U8,
            Array::I8(_) => ValueType::I8,
            Array::U16(_) => ValueType::U16,
            Array::I16(_) => ValueType::I16,
            Array::U32(_) => ValueType::U32,
            Array::I32(_) => ValueType::I32,
            Array::F32(_) => ValueType::F32,
            Array::Bool(_) => ValueType::Bool,
            Array::String(_) => ValueType::String,
            Array::Array(_) => ValueType::Array,
            Array::U64(_) => ValueType::U64,
            Array::I64(_) => ValueType::I64,
            Array::F64(_) => ValueType::F64,
        }
    }

    /// How many elements it has.
    pub fn len(&self) -> usize {
        each_array!(self, items => items.len())
    }

    /// True if it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The integers, whatever their width.
    pub fn integers(&self) -> Option<Vec<i128>> {
        Some(match self {
            Array::U8(x) => x.iter().map(|x| i128::from(*x)).collect(),
            Array::I8(x) => x.iter().map(|x| i128::from(*x)).collect(),
            Array::U16(x) => x.iter().map(|x| i128::from(*x)).collect(),
            Array::I16(x) => x.iter().map(|x| i128::from(*x)).collect(),
            Array::U32(x) => x.iter().map(|x| i128::from(*x)).collect(),
            Array::I32(x) => x.iter().map(|x| i128::from(*x)).collect(),
            Array::U64(x) => x.iter().map(|x| i128::from(*x)).collect(),
            Array::I64(x) => x.iter().map(|x| i128::from(*x)).collect(),
            _ => return None,
        })
    }
}

/// Why a value could not be read.
pub(crate) enum BadValue {
    /// It could not be taken from the bytes.
    Bytes(Bad),
    /// Another reason, for people.
    What(String),
}

impl From<Bad> for BadValue {
    fn from(bad: Bad) -> Self {
        BadValue::Bytes(bad)
    }
}

impl BadValue {
    pub(crate) fn what(self) -> String {
        match self {
            BadValue::Bytes(bad) => bad.what().to_owned(),
            BadValue::What(what) => what,
        }
    }
}

/// Arrays in arrays: a file may nest them as deeply as it is long, a stack may not.
const MAX_DEPTH: usize = 8;

fn value_type(bytes: &mut Bytes) -> Result<ValueType, BadValue> {
    let id = bytes.u32()?;
    ValueType::from_id(id).ok_or_else(|| BadValue::What(format!("has the unknown value type {id}")))
}

fn truth(bytes: &mut Bytes) -> Result<bool, BadValue> {
    match bytes.array()? {
        [0] => Ok(false),
        [1] => Ok(true),
        [other] => Err(BadValue::What(format!("is a BOOL of {other}, expected 0 or 1"))),
    }
}

/// Reads the type of a value and the value.
pub(crate) fn read(bytes: &mut Bytes) -> Result<Value, BadValue> {
    Ok(match value_type(bytes)? {
        ValueType::U8 => Value::U8(u8::from_le_bytes(bytes.array()?)),
        ValueType::I8 => Value::I8(i8::from_le_bytes(bytes.array()?)),
        ValueType::U16 => Value::U16(u16::from_le_bytes(bytes.array()?)),
        ValueType::I16 => Value::I16(i16::from_le_bytes(bytes.array()?)),
        ValueType::U32 => Value::U32(bytes.u32()?),
        ValueType::I32 => Value::I32(i32::from_le_bytes(bytes.array()?)),
        ValueType::F32 => Value::F32(f32::from_le_bytes(bytes.array()?)),
        ValueType::Bool => Value::Bool(truth(bytes)?),
        ValueType::String => Value::String(bytes.text()?.to_owned()),
        ValueType::Array => Value::Array(read_array(bytes, 1)?),
        ValueType::U64 => Value::U64(bytes.u64()?),
        ValueType::I64 => Value::I64(i64::from_le_bytes(bytes.array()?)),
        ValueType::F64 => Value::F64(f64::from_le_bytes(bytes.array()?)),
    })
}

fn read_array(bytes: &mut Bytes, depth: usize) -> Result<Array, BadValue> {
    let ty = value_type(bytes)?;
    let n = bytes.count(ty.least_bytes())?;
    /// Numbers of `N` bytes.
    fn numbers<const N: usize, T>(
        bytes: &mut Bytes,
        n: usize,
        from: fn([u8; N]) -> T,
    ) -> Result<Vec<T>, Bad> {
        Ok(bytes.take((n * N) as u64)?.as_chunks().0.iter().map(|b| from(*b)).collect())
    }
    Ok(match ty {
        ValueType::U8 => Array::U8(numbers(bytes, n, u8::from_le_bytes)?),
        ValueType::I8 => Array::I8(numbers(bytes, n, i8::from_le_bytes)?),
        ValueType::U16 => Array::U16(numbers(bytes, n, u16::from_le_bytes)?),
        ValueType::I16 => Array::I16(numbers(bytes, n, i16::from_le_bytes)?),
        ValueType::U32 => Array::U32(numbers(bytes, n, u32::from_le_bytes)?),
        ValueType::I32 => Array::I32(numbers(bytes, n, i32::from_le_bytes)?),
        ValueType::F32 => Array::F32(numbers(bytes, n, f32::from_le_bytes)?),
        ValueType::Bool => Array::Bool((0..n).map(|_| truth(bytes)).collect::<Result<_, _>>()?),
        ValueType::String => {
            Array::String((0..n).map(|_| Ok(bytes.text()?.to_owned())).collect::<Result<_, Bad>>()?)
        }
        ValueType::Array if depth == MAX_DEPTH => {
            return Err(BadValue::What(format!("has arrays in arrays more than {MAX_DEPTH} deep")));
        }
        ValueType::Array => {
            Array::Array((0..n).map(|_| read_array(bytes, depth + 1)).collect::<Result<_, _>>()?)
        }
        ValueType::U64 => Array::U64(numbers(bytes, n, u64::from_le_bytes)?),
        ValueType::I64 => Array::I64(numbers(bytes, n, i64::from_le_bytes)?),
        ValueType::F64 => Array::F64(numbers(bytes, n, f64::from_le_bytes)?),
    })
}

/// Appends a text with its length.
pub(crate) fn write_text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Appends the type of a value and the value.
pub(crate) fn write(value: &Value, out: &mut Vec<u8>) {
    out.extend((value.value_type() as u32).to_le_bytes());
    match value {
        Value::U8(x) => out.push(*x),
        Value::I8(x) => out.extend(x.to_le_bytes()),
        Value::U16(x) => out.extend(x.to_le_bytes()),
        Value::I16(x) => out.extend(x.to_le_bytes()),
        Value::U32(x) => out.extend(x.to_le_bytes()),
        Value::I32(x) => out.extend(x.to_le_bytes()),
        Value::F32(x) => out.extend(x.to_le_bytes()),
        Value::Bool(x) => out.push((*x).into()),
        Value::String(x) => write_text(x, out),
        Value::Array(x) => write_array(x, out),
        Value::U64(x) => out.extend(x.to_le_bytes()),
        Value::I64(x) => out.extend(x.to_le_bytes()),
        Value::F64(x) => out.extend(x.to_le_bytes()),
    }
}

fn write_array(array: &Array, out: &mut Vec<u8>) {
    out.extend((array.item_type() as u32).to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(x) => out.extend(x),
        Array::I8(x) => x.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::U16(x) => x.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::I16(x) => x.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::U32(x) => x.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::I32(x) => x.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::F32(x) => x.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::Bool(x) => out.extend(x.iter().map(|x| u8::from(*x))),
        Array::String(x) => x.iter().for_each(|x| write_text(x, out)),
        Array::Array(x) => x.iter().for_each(|x| write_array(x, out)),
        Array::U64(x) => x.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::I64(x) => x.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::F64(x) => x.iter().for_each(|x| out.extend(x.to_le_bytes())),
    }
}

/// How deep the arrays of a value are nested.
pub(crate) fn depth(value: &Value) -> usize {
    fn of(array: &Array) -> usize {
        match array {
            Array::Array(items) => 1 + items.iter().map(of).max().unwrap_or(0),
            _ => 1,
        }
    }
    match value {
        Value::Array(array) => of(array),
        _ => 0,
    }
}

/// The check of [`read`], for what is written.
pub(crate) fn too_deep(value: &Value) -> bool {
    depth(value) > MAX_DEPTH
}

/// Conversions into values, and arrays of them.
macro_rules! from {
    ($($name:ident $ty:ty),*) => {$(
        impl From<$ty> for Value {
            fn from(x: $ty) -> Self {
                Value::$name(x)
            }
        }

        impl From<Vec<$ty>> for Value {
            fn from(x: Vec<$ty>) -> Self {
                Value::Array(Array::$name(x))
            }
        }
    )*};
}

from!(U8 u8, I8 i8, U16 u16, I16 i16, U32 u32, I32 i32, F32 f32, Bool bool, String String, U64 u64, I64 i64, F64 f64);

impl From<Array> for Value {
    fn from(array: Array) -> Self {
        Value::Array(array)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Value::String(text.to_owned())
    }
}
