//! The CLIP tokenizer against transformers' `CLIPTokenizer` (tools/oracle/tokenizer.py) and against broken files.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use megafuse::text::{ClipTokenizer, TokenizerFiles};
use serde::Deserialize;
use serde_json::{Value, json};

const VOCAB: &str = include_str!("data/tokenizer/vocab.json");
const MERGES: &str = include_str!("data/tokenizer/merges.txt");
const TOKENIZER: &str = include_str!("data/tokenizer/tokenizer.json");

#[derive(Deserialize)]
struct Expected {
    texts: Vec<String>,
    variants: Vec<Variant>,
}

#[derive(Deserialize)]
struct Variant {
    name: String,
    /// "files" (vocab.json, merges.txt), "json" (tokenizer.json), "json-old" (merges as strings).
    vocabulary: String,
    files: BTreeMap<String, Value>,
    max_length: usize,
    bos: u32,
    eos: u32,
    pad: u32,
    ids: Vec<Vec<u32>>,
    truncated: Vec<Option<String>>,
}

fn expected() -> Expected {
    serde_json::from_str(include_str!("data/tokenizer/expected.json")).unwrap()
}

fn write_vocabulary(folder: &Path, form: &str) {
    match form {
        "files" => {
            fs::write(folder.join("vocab.json"), VOCAB).unwrap();
            fs::write(folder.join("merges.txt"), MERGES).unwrap();
        }
        "json" => fs::write(folder.join("tokenizer.json"), TOKENIZER).unwrap(),
        "json-old" => {
            let mut tree: Value = serde_json::from_str(TOKENIZER).unwrap();
            for merge in tree["model"]["merges"].as_array_mut().unwrap() {
                *merge = format!("{} {}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap()).into();
            }
            fs::write(folder.join("tokenizer.json"), tree.to_string()).unwrap();
        }
        other => panic!("vocabulary {other}"),
    }
}

#[test]
fn ids_and_truncated_text_equal_transformers() {
    let expected = expected();
    for variant in &expected.variants {
        let folder = tempfile::tempdir().unwrap();
        write_vocabulary(folder.path(), &variant.vocabulary);
        for (name, value) in &variant.files {
            fs::write(folder.path().join(name), value.to_string()).unwrap();
        }
        let name = &variant.name;
        let tokenizer = ClipTokenizer::load(folder.path()).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(tokenizer.max_length(), variant.max_length, "{name}");
        let special = (tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id());
        assert_eq!(special, (variant.bos, variant.eos, variant.pad), "{name}: start, end, padding id");
        for ((text, ids), truncated) in expected.texts.iter().zip(&variant.ids).zip(&variant.truncated) {
            let got = tokenizer.encode(text).unwrap_or_else(|error| panic!("{name}: {text:?}: {error}"));
            assert_eq!(&got.ids, ids, "{name}: ids of {text:?}");
            assert_eq!(&got.truncated, truncated, "{name}: truncated part of {text:?}");
        }
    }
}

#[test]
fn files_in_memory_are_the_files_of_a_folder() {
    let files =
        TokenizerFiles { vocab: Some(VOCAB.as_bytes()), merges: Some(MERGES.as_bytes()), ..TokenizerFiles::default() };
    let tokenizer = ClipTokenizer::from_bytes(Path::new("embedded"), &files).unwrap();
    let expected = expected();
    let bare = expected.variants.iter().find(|variant| variant.name == "bare").unwrap();
    for (text, ids) in expected.texts.iter().zip(&bare.ids) {
        assert_eq!(&tokenizer.encode(text).unwrap().ids, ids, "{text:?}");
    }
}

fn load_with(files: &[(&str, &str)]) -> Result<ClipTokenizer, String> {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    ClipTokenizer::load(folder.path()).map_err(|error| error.to_string())
}

#[test]
fn a_length_that_is_not_set_is_that_of_the_text_encoder() {
    for config in [r#"{"model_max_length": 1000000000000000019884624838656}"#, "{}", r#"{"model_max_length": null}"#] {
        let files = [("vocab.json", VOCAB), ("merges.txt", MERGES), ("tokenizer_config.json", config)];
        let tokenizer = load_with(&files).unwrap();
        assert_eq!(tokenizer.max_length(), 77, "{config}");
        assert_eq!(tokenizer.fitted(714, 20).unwrap().max_length(), 20, "{config}");
    }
    let files =
        [("vocab.json", VOCAB), ("merges.txt", MERGES), ("tokenizer_config.json", r#"{"model_max_length": 16}"#)];
    let tokenizer = load_with(&files).unwrap();
    assert_eq!(tokenizer.clone().fitted(714, 77).unwrap().max_length(), 16);
    assert_eq!(tokenizer.fitted(714, 12).unwrap().max_length(), 12);
}

#[test]
fn a_token_without_an_embedding_is_an_error() {
    let tokenizer = load_with(&[("vocab.json", VOCAB), ("merges.txt", MERGES)]).unwrap();
    let error = tokenizer.fitted(713, 77).err().unwrap().to_string();
    assert!(error.contains("<|endoftext|>") && error.contains("713"), "{error}");
    let config = r#"{"added_tokens_decoder": {"714": {"content": "<new>", "special": true}}}"#;
    let files = [("vocab.json", VOCAB), ("merges.txt", MERGES), ("tokenizer_config.json", config)];
    let tokenizer = load_with(&files).unwrap().fitted(714, 77).unwrap();
    assert!(tokenizer.encode("a cat").is_ok());
    let error = tokenizer.encode("a <new> cat").unwrap_err().to_string();
    assert!(error.contains("<new>") && error.contains("714"), "{error}");
}

/// A file, its broken text, and what the error must name.
#[test]
fn broken_files_are_named() {
    let mut no_cat: BTreeMap<String, u32> = serde_json::from_str(VOCAB).unwrap();
    no_cat.remove("cat</w>").unwrap();
    let no_cat = json!(no_cat).to_string();
    let cases: [(&str, &str, &[&str]); 20] = [
        ("vocab.json", "{\"a\": 0, \"b\": 1", &["vocab.json", "complete"]),
        ("vocab.json", "[1, 2]", &["vocab.json", "expected a map"]),
        ("vocab.json", "{}", &["vocab.json", "empty"]),
        ("vocab.json", "{\"a\": -1}", &["vocab.json", "-1"]),
        ("vocab.json", "{\"a\": 1, \"b\": 1}", &["vocab.json", "\"a\"", "\"b\"", "same id 1"]),
        ("vocab.json", &no_cat, &["vocab.json", "cat</w>", "belong together"]),
        ("merges.txt", "#version: 0.2\na b c\n", &["merges.txt", "line 2", "a b c"]),
        ("merges.txt", "#version: 0.2\nab\n", &["merges.txt", "line 2"]),
        ("tokenizer_config.json", "", &["tokenizer_config.json", "complete"]),
        ("tokenizer_config.json", "3", &["tokenizer_config.json", "JSON object"]),
        ("tokenizer_config.json", r#"{"model_max_length": 1}"#, &["tokenizer_config.json", "model_max_length is 1"]),
        ("tokenizer_config.json", r#"{"model_max_length": "77"}"#, &["model_max_length is \"77\"", "whole number"]),
        ("tokenizer_config.json", r#"{"tokenizer_class": "T5Tokenizer"}"#, &["T5Tokenizer", "CLIPTokenizer"]),
        ("tokenizer_config.json", r#"{"padding_side": "up"}"#, &["padding_side", "\"up\"", "left"]),
        (
            "tokenizer_config.json",
            r#"{"pad_token": 3}"#,
            &["tokenizer_config.json", "pad_token is 3", "expected a text"],
        ),
        ("tokenizer_config.json", r#"{"bos_token": ""}"#, &["bos_token is empty"]),
        (
            "tokenizer_config.json",
            r#"{"added_tokens_decoder": {"5": {"content": "<new>"}}}"#,
            &["tokenizer_config.json", "<new>", "id 5", "714"],
        ),
        ("special_tokens_map.json", "{\"eos_token\": [1]}", &["special_tokens_map.json", "eos_token"]),
        ("tokenizer.json", "{\"version\": \"1.0\"}", &["tokenizer.json", "model"]),
        ("tokenizer.json", r#"{"model": {"type": "WordPiece"}}"#, &["tokenizer.json", "WordPiece", "BPE"]),
    ];
    for (name, text, wanted) in cases {
        let mut files = vec![("vocab.json", VOCAB), ("merges.txt", MERGES)];
        files.retain(|(present, _)| *present != name);
        files.push((name, text));
        let error = load_with(&files).err().unwrap_or_else(|| panic!("{name} {text:.40}: no error"));
        for part in wanted {
            assert!(error.contains(part), "{name} {text:.40}: {error:?} lacks {part:?}");
        }
    }
}

#[test]
fn missing_files_are_named() {
    let error = load_with(&[("vocab.json", VOCAB)]).err().unwrap();
    assert!(error.contains("merges.txt is missing"), "{error}");
    let error = load_with(&[("merges.txt", MERGES)]).err().unwrap();
    assert!(error.contains("vocab.json is missing") && error.contains("tokenizer.json"), "{error}");
    let error = ClipTokenizer::load(Path::new("/no/such/folder")).err().unwrap().to_string();
    assert!(error.contains("/no/such/folder") && error.contains("vocab.json"), "{error}");
    let error = load_with(&[("vocab.json", VOCAB), ("merges.txt", "\u{0}")]).err().unwrap();
    assert!(error.contains("line 1"), "{error}");
}
