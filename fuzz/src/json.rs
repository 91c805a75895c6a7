//! JSON documents that are damaged in what they say: bytes choose a document, keys in it, and other values for them. Damage to
//! the text itself hardly ever leaves JSON.

use serde_json::{Value, json};

/// Documents, and what may be put into them.
pub struct Documents {
    documents: Vec<Value>,
    /// Every place that a document has, as a JSON pointer.
    places: Vec<String>,
    /// Values that sizes, counts and words break at, and every value that a document has somewhere.
    values: Vec<Value>,
}

/// Marks an input that is text instead of changes.
const TEXT: u8 = 255;
/// Bytes of a change: which place (two), which value (two).
const CHANGE: usize = 4;

impl Documents {
    /// Of these documents; `keys` are further ones that a reader knows.
    pub fn new(documents: Vec<Value>, keys: &[&str]) -> Self {
        assert!(documents.len() < usize::from(TEXT));
        let mut places: Vec<String> = keys.iter().map(|key| format!("/{key}")).collect();
        let mut values = vec![
            json!(null),
            json!(true),
            json!(false),
            json!(""),
            json!("x"),
            json!([]),
            json!({}),
            json!([[]]),
            json!(-1),
            json!(-0.0),
            json!(0.5),
            json!(1e-300),
            json!(1e300),
            json!(1.5e19),
        ];
        values.extend((0..64).flat_map(|bits| {
            let n = 1u64 << bits;
            [json!(n - 1), json!(n), json!(n + 1)]
        }));
        values.push(json!(u64::MAX));
        for document in &documents {
            collect(document, String::new(), &mut places, &mut values);
        }
        places.sort();
        places.dedup();
        Self { documents, places, values }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.documents.len()
    }

    /// Inputs to begin with: each document as it is, and as text.
    pub fn seeds(&self) -> Vec<Vec<u8>> {
        let whole = (0..self.documents.len()).map(|n| vec![n as u8]);
        let text = self.documents.iter().map(|document| {
            let mut input = vec![TEXT];
            input.extend(document.to_string().as_bytes());
            input
        });
        // Changes grow out of these.
        let changed = (0..self.documents.len()).map(|n| vec![n as u8, 1, 0, 1, 0, 7, 0, 40, 0]);
        whole.chain(text).chain(changed).collect()
    }

    /// What an input says: which document it is made of, and the document; none where it is text that is not JSON.
    pub fn of(&self, input: &[u8]) -> Option<(usize, Value)> {
        let (which, rest) = input.split_first()?;
        if *which == TEXT {
            return Some((0, serde_json::from_slice(rest).ok()?));
        }
        let which = usize::from(*which) % self.documents.len();
        let mut document = self.documents[which].clone();
        for change in rest.as_chunks::<CHANGE>().0 {
            let number = |at: usize| usize::from(change[at]) | usize::from(change[at + 1]) << 8;
            let place = &self.places[number(0) % self.places.len()];
            let value = &self.values[number(2) % self.values.len()];
            put(&mut document, place, value.clone());
        }
        Some((which, document))
    }
}

/// Puts a value at a place, if all but the last key of the place is there.
fn put(document: &mut Value, place: &str, value: Value) {
    if let Some(found) = document.pointer_mut(place) {
        *found = value;
        return;
    }
    let Some((above, key)) = place.rsplit_once('/') else { return };
    if let Some(map) = document.pointer_mut(above).and_then(Value::as_object_mut) {
        map.insert(key.replace("~1", "/").replace("~0", "~"), value);
    }
}

/// The places below one, and their values.
fn collect(value: &Value, place: String, places: &mut Vec<String>, values: &mut Vec<Value>) {
    if !place.is_empty() {
        places.push(place.clone());
        if !values.contains(value) {
            values.push(value.clone());
        }
    }
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let key = key.replace('~', "~0").replace('/', "~1");
                collect(value, format!("{place}/{key}"), places, values);
            }
        }
        Value::Array(list) => {
            for (at, value) in list.iter().enumerate().take(4) {
                collect(value, format!("{place}/{at}"), places, values);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_change_what_a_document_says() {
        let documents = Documents::new(vec![json!({ "a": { "b": [1, 2] } }), json!({ "c": 3 })], &["d"]);
        assert_eq!(documents.of(&[0]), Some((0, json!({ "a": { "b": [1, 2] } }))));
        // The places by name: /a, /a/b, /a/b/0, /a/b/1, /c, /d; the second value is `true`.
        assert_eq!(documents.of(&[0, 2, 0, 1, 0]), Some((0, json!({ "a": { "b": [true, 2] } }))));
        assert_eq!(documents.of(&[1, 5, 0, 1, 0, 4, 0, 0, 0]), Some((1, json!({ "c": null, "d": true }))));
        assert_eq!(documents.of(&[1, 1, 0, 1, 0]), Some((1, json!({ "c": 3 }))));
        assert_eq!(documents.of(b"\xff{\"e\": 1}"), Some((0, json!({ "e": 1 }))));
        assert_eq!(documents.of(b"\xff{"), None);
        assert_eq!(documents.of(&[]), None);
    }
}
