//! How byte-level tokenizers cut text before they merge, by the names that GGUF has for it (`tokenizer.ggml.pre`). The
//! expressions are those of the `tokenizer.json` files that the models' authors published.

use serde_json::{Value, json};

/// A way to cut text.
#[derive(Debug)]
pub(super) struct Pre {
    /// Its names; the first is the one that is written.
    pub names: &'static [&'static str],
    /// Text is brought to this Unicode normal form first.
    pub normal: Option<&'static str>,
    /// The cuts, one after another.
    cuts: &'static [Cut],
    /// A piece that is a token is that token, whatever its merges.
    pub ignore_merges: bool,
    /// A text begins with the token for it, where the file does not say.
    pub begins: bool,
}

#[derive(Debug)]
enum Cut {
    /// What the expression matches stands alone.
    At(&'static str),
    /// Each digit stands alone.
    Digits,
    /// GPT-2's expression.
    Gpt2,
}

use Cut::{At, Digits, Gpt2};

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+";
const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";
const DEEPSEEK_PUNCTUATION: &str = r"\s?[!-/:-~！-／：-～‘-‟　-。]+";
const HAN: &str = "[一-龥ࠀ-一가-퟿]+";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";

const PLAIN: Pre = Pre { names: &[], normal: None, cuts: &[], ignore_merges: false, begins: false };

/// All that are known.
static ALL: &[Pre] = &[
    Pre {
        names: &["gpt-2", "phi-2", "mpt", "gigachat", "mellum", "modern-bert", "exaone4", "jais", "trillion"],
        cuts: &[Gpt2],
        ..PLAIN
    },
    Pre { names: &["olmo"], normal: Some("NFC"), cuts: &[Gpt2], ..PLAIN },
    Pre {
        names: &["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"],
        cuts: &[Digits, Gpt2],
        ..PLAIN
    },
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
        cuts: &[At(LLAMA3)],
        ignore_merges: true,
        begins: true,
        ..PLAIN
    },
    Pre { names: &["glm4", "glm5"], cuts: &[At(LLAMA3)], ignore_merges: true, ..PLAIN },
    Pre { names: &["dbrx", "smaug-bpe", "chatglm-bpe"], cuts: &[At(LLAMA3)], ..PLAIN },
    Pre { names: &["qwen2", "megrez"], normal: Some("NFC"), cuts: &[At(QWEN2)], ..PLAIN },
    Pre {
        names: &["stablelm2", "deepseek-r1-qwen", "hunyuan", "grok-2", "kormo", "solar-open"],
        cuts: &[At(QWEN2)],
        ..PLAIN
    },
    Pre { names: &["gpt-4o", "llama4", "kanana2", "minimax-m2"], cuts: &[At(GPT4O)], ..PLAIN },
    Pre { names: &["tekken"], cuts: &[At(TEKKEN)], ignore_merges: true, begins: true, ..PLAIN },
    Pre {
        names: &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
        cuts: &[At(r"\p{N}{1,3}"), At("[一-龥぀-ゟ゠-ヿ]+"), At(DEEPSEEK3)],
        ..PLAIN
    },
    Pre {
        names: &["deepseek-llm"],
        cuts: &[At("[\r\n]"), At(DEEPSEEK_LETTERS), At(DEEPSEEK_PUNCTUATION), At(r"\s+$"), At(HAN), Digits],
        ..PLAIN
    },
    Pre {
        names: &["deepseek-coder"],
        cuts: &[At("[\r\n]"), At(r"\s?\p{L}+"), At(r"\s?\p{P}+"), At(HAN), Digits],
        ..PLAIN
    },
    // What llama.cpp does where a converter did not know the tokenizer.
    Pre {
        names: &["default"],
        cuts: &[At(r"[\p{P}\$\+<=>\^~\|]+"), At(GPT2), At(r"\p{N}+"), At("[0-9][0-9][0-9]")],
        ..PLAIN
    },
];

/// The way of that name.
pub(super) fn named(name: &str) -> Option<&'static Pre> {
    ALL.iter().find(|pre| pre.names.contains(&name))
}

/// The first name of each way.
pub(super) fn known() -> String {
    ALL.iter().map(|pre| pre.names[0]).collect::<Vec<_>>().join(", ")
}

impl Pre {
    /// The `pre_tokenizer` of a `tokenizer.json`.
    pub fn json(&self) -> Value {
        let byte_level = |regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex });
        let mut steps: Vec<Value> = self
            .cuts
            .iter()
            .map(|cut| match cut {
                At(expression) => json!({
                    "type": "Split", "pattern": { "Regex": expression }, "behavior": "Isolated", "invert": false,
                }),
                Digits => json!({ "type": "Digits", "individual_digits": true }),
                Gpt2 => byte_level(true),
            })
            .collect();
        if !matches!(self.cuts.last(), Some(Gpt2)) {
            steps.push(byte_level(false));
        }
        match <[Value; 1]>::try_from(steps) {
            Ok([one]) => one,
            Err(steps) => json!({ "type": "Sequence", "pretokenizers": steps }),
        }
    }

    /// The `normalizer` of a `tokenizer.json`.
    pub fn normalizer(&self) -> Value {
        self.normal.map_or(Value::Null, |form| json!({ "type": form }))
    }
}

/// What changes tokens in a part of a `tokenizer.json`: whether it keeps account of offsets does not, nor that it is a
/// sequence of one or of none.
fn essence(mut value: Value) -> Value {
    fn strip(value: &mut Value) {
        match value {
            Value::Object(map) => {
                map.remove("trim_offsets");
                // What older files leave unsaid.
                if map.get("type").is_some_and(|kind| kind == "ByteLevel") {
                    map.entry("use_regex").or_insert(Value::Bool(true));
                }
                map.values_mut().for_each(strip);
            }
            Value::Array(all) => all.iter_mut().for_each(strip),
            _ => {}
        }
    }
    strip(&mut value);
    let steps = ["pretokenizers", "normalizers"].into_iter().find_map(|list| value[list].as_array());
    match steps.map(Vec::as_slice) {
        Some([]) => Value::Null,
        Some([alone]) => alone.clone(),
        _ => value,
    }
}

/// The way in which a `tokenizer.json` cuts text, if GGUF has a name for it.
pub(super) fn of_json(tokenizer: &Value) -> Option<&'static Pre> {
    let normalizer = essence(tokenizer["normalizer"].clone());
    let cuts = essence(tokenizer["pre_tokenizer"].clone());
    let ignore = tokenizer["model"]["ignore_merges"].as_bool().unwrap_or(false);
    ALL.iter().find(|pre| {
        pre.ignore_merges == ignore && essence(pre.normalizer()) == normalizer && essence(pre.json()) == cuts
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper};

    #[test]
    fn every_way_is_found_again_by_its_name_and_by_its_json_and_cuts_text() {
        for pre in ALL {
            assert!(pre.names.iter().all(|name| std::ptr::eq(named(name).unwrap(), pre)));
            let json = json!({
                "normalizer": pre.normalizer(), "pre_tokenizer": pre.json(), "model": { "ignore_merges": pre.ignore_merges },
            });
            let found = of_json(&json).unwrap();
            assert!(found.json() == pre.json() && found.ignore_merges == pre.ignore_merges);
            let mut other = json.clone();
            if other["normalizer"].is_null() {
                other["normalizer"] = json!({ "type": "Sequence", "normalizers": [] });
            }
            other["pre_tokenizer"] = json!({ "type": "Sequence", "pretokenizers": [pre.json()] });
            assert!(std::ptr::eq(of_json(&other).unwrap(), found));
            let cut: PreTokenizerWrapper = serde_json::from_value(pre.json()).unwrap();
            let mut text = PreTokenizedString::from("it's 1234 Ünï 漢字\n\n  x = y;");
            cut.pre_tokenize(&mut text).unwrap();
            let pieces = text.get_splits(OffsetReferential::Original, OffsetType::Byte).len();
            assert!(pieces > 8, "{:?}: {pieces}", pre.names);
        }
        assert!(named("no-such").is_none());
    }
}
