//! The metadata of a file: values by key, in the order of the file.

use std::collections::HashMap;

use crate::error::{GgufError, Result};
use crate::value::{Array, Value};

/// Values by key, in the order in which they stand in the file.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

impl PartialEq for Metadata {
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries
    }
}

impl Metadata {
    /// Adds a key; gives it back if it is there already.
    pub(crate) fn add(&mut self, key: String, value: Value) -> std::result::Result<(), String> {
        if self.index.contains_key(&key) {
            return Err(key);
        }
        self.index.insert(key.clone(), self.entries.len());
        self.entries.push((key, value));
        Ok(())
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keys and values in the order of the file.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|i| &self.entries[*i].1)
    }

    /// The value of a key that may be absent: `find::<u32>("llama.expert_count")`. That it is of another type
    /// is an error.
    pub fn find<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match T::from_value(value) {
            Ok(x) => Ok(Some(x)),
            Err(found) => Err(GgufError::key(key, format!("is {found}, expected {}", T::EXPECTED))),
        }
    }

    /// The value of a key that must be there.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T> {
        self.find(key)?.ok_or_else(|| GgufError::key(key, format!("is missing, expected {}", T::EXPECTED)))
    }
}

/// What a value can be asked for as. Integers of any width will do for each other as long as they fit, and so
/// will the two widths of floats.
pub trait FromValue<'a>: Sized {
    /// For errors: what was expected.
    const EXPECTED: &'static str;

    /// The value as this type, or what it is instead.
    fn from_value(value: &'a Value) -> std::result::Result<Self, String>;
}

macro_rules! integers {
    ($($ty:ident $expected:literal $many:literal),*) => {$(
        impl FromValue<'_> for $ty {
            const EXPECTED: &'static str = $expected;

            fn from_value(value: &Value) -> std::result::Result<Self, String> {
                let x = value.integer().ok_or_else(|| value.described())?;
                $ty::try_from(x).map_err(|_| x.to_string())
            }
        }

        impl FromValue<'_> for Vec<$ty> {
            const EXPECTED: &'static str = $many;

            fn from_value(value: &Value) -> std::result::Result<Self, String> {
                let Value::Array(array) = value else {
                    return Err(value.described());
                };
                let items = array.integers().ok_or_else(|| value.described())?;
                let fit = |x: i128| $ty::try_from(x).map_err(|_| format!("an ARRAY with {x}"));
                items.into_iter().map(fit).collect()
            }
        }
    )*};
}

integers!(
    u16 "an integer from 0 to 65535" "an array of integers from 0 to 65535",
    u32 "an integer from 0 to 2^32 - 1" "an array of integers from 0 to 2^32 - 1",
    u64 "an integer from 0 to 2^64 - 1" "an array of integers from 0 to 2^64 - 1",
    usize "an integer that is not negative" "an array of integers that are not negative",
    i32 "an integer from -2^31 to 2^31 - 1" "an array of integers from -2^31 to 2^31 - 1",
    i64 "an integer from -2^63 to 2^63 - 1" "an array of integers from -2^63 to 2^63 - 1"
);

impl FromValue<'_> for f64 {
    const EXPECTED: &'static str = "a FLOAT32 or FLOAT64";

    fn from_value(value: &Value) -> std::result::Result<Self, String> {
        match value {
            Value::F32(x) => Ok((*x).into()),
            Value::F64(x) => Ok(*x),
            other => Err(other.described()),
        }
    }
}

impl FromValue<'_> for f32 {
    const EXPECTED: &'static str = <f64 as FromValue>::EXPECTED;

    fn from_value(value: &Value) -> std::result::Result<Self, String> {
        f64::from_value(value).map(|x| x as f32)
    }
}

impl FromValue<'_> for bool {
    const EXPECTED: &'static str = "a BOOL";

    fn from_value(value: &Value) -> std::result::Result<Self, String> {
        match value {
            Value::Bool(x) => Ok(*x),
            other => Err(other.described()),
        }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const EXPECTED: &'static str = "a STRING";

    fn from_value(value: &'a Value) -> std::result::Result<Self, String> {
        match value {
            Value::String(x) => Ok(x),
            other => Err(other.described()),
        }
    }
}

impl<'a> FromValue<'a> for &'a Array {
    const EXPECTED: &'static str = "an ARRAY";

    fn from_value(value: &'a Value) -> std::result::Result<Self, String> {
        match value {
            Value::Array(x) => Ok(x),
            other => Err(other.described()),
        }
    }
}

macro_rules! slices {
    ($($name:ident $ty:ty, $expected:literal);*) => {$(
        impl<'a> FromValue<'a> for &'a [$ty] {
            const EXPECTED: &'static str = $expected;

            fn from_value(value: &'a Value) -> std::result::Result<Self, String> {
                match value {
                    Value::Array(Array::$name(x)) => Ok(x),
                    other => Err(other.described()),
                }
            }
        }
    )*};
}

slices!(String String, "an ARRAY of STRING"; F32 f32, "an ARRAY of FLOAT32"; Bool bool, "an ARRAY of BOOL");
