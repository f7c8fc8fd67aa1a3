//! T5's tokenizer against transformers (tools/oracle/t5.py), on sentencepiece models of their own: the ids of nasty texts, and files
//! that are damaged or of another kind.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use megafuse::text::{T5Tokenizer, T5TokenizerFiles};
use serde::Deserialize;
use tokenizers::normalizers::Precompiled;

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

#[derive(Deserialize)]
struct Texts {
    texts: Vec<String>,
    tokenizers: BTreeMap<String, Ids>,
}

#[derive(Deserialize)]
struct Ids {
    ids: Vec<Vec<u32>>,
    sentencepiece: BTreeMap<usize, Vec<u32>>,
    cut: Vec<Vec<u32>>,
    masks: Vec<Vec<u32>>,
    charsmap: Option<[usize; 2]>,
}

fn texts() -> Texts {
    serde_json::from_str(&fs::read_to_string(data("t5/tokenizer/expected.json")).unwrap()).unwrap()
}

/// A sentencepiece model.
fn pieces(name: &str) -> Vec<u8> {
    match fs::read(data(&format!("t5/tokenizer/{name}.model"))) {
        Ok(bytes) => bytes,
        Err(_) => {
            let file = fs::File::open(data(&format!("t5/tokenizer/{name}.model.gz"))).unwrap();
            let mut bytes = Vec::new();
            flate2::read::GzDecoder::new(file).read_to_end(&mut bytes).unwrap();
            bytes
        }
    }
}

/// The same as `tokenizer.json`.
fn json(name: &str, ids: &Ids) -> Vec<u8> {
    let text = fs::read_to_string(data(&format!("t5/tokenizer/{name}.tokenizer.json"))).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    if let Some([first, count]) = ids.charsmap {
        json["normalizer"]["precompiled_charsmap"] = base64(&pieces(name)[first..][..count]).into();
    }
    serde_json::to_vec(&json).unwrap()
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |bytes: &[u8]| {
        let bits = bytes.iter().enumerate().fold(0, |bits, (i, &byte)| bits | u32::from(byte) << (16 - 8 * i));
        let digits = (0..4).map(move |i| DIGITS[(bits >> (18 - 6 * i)) as usize % 64] as char);
        digits.take(bytes.len() + 1).chain("==".chars().skip(bytes.len() - 1)).collect::<Vec<_>>()
    };
    bytes.chunks(3).flat_map(group).collect()
}

fn of_pieces(bytes: &[u8]) -> megafuse::Result<T5Tokenizer> {
    T5Tokenizer::from_bytes(Path::new("tokenizer_3"), &T5TokenizerFiles { pieces: Some(bytes), ..Default::default() })
}

fn of_json(bytes: &[u8]) -> megafuse::Result<T5Tokenizer> {
    T5Tokenizer::from_bytes(
        Path::new("tokenizer_3"),
        &T5TokenizerFiles { tokenizer: Some(bytes), ..Default::default() },
    )
}

#[test]
fn ids_equal_transformers_from_either_file() {
    let all = texts();
    for (name, want) in &all.tokenizers {
        let tokenizers = [of_pieces(&pieces(name)).unwrap(), of_json(&json(name, want)).unwrap()];
        for (tokenizer, file) in tokenizers.iter().zip(["spiece.model", "tokenizer.json"]) {
            assert_eq!((tokenizer.pad_id(), tokenizer.eos_id()), (0, 1));
            for (i, text) in all.texts.iter().enumerate() {
                let whole = tokenizer.encode(text, want.ids[i].len()).unwrap();
                assert_eq!(whole.ids, want.ids[i], "{name} {file}: {text:?}");
                assert_eq!((whole.length, &whole.truncated), (want.ids[i].len(), &None), "{name} {file}: {text:?}");
                let cut = tokenizer.encode(text, 16).unwrap();
                assert_eq!(cut.ids, want.cut[i], "{name} {file}: {text:?}");
                assert_eq!(cut.length as u32, want.masks[i].iter().sum::<u32>(), "{name} {file}: {text:?}");
                assert_eq!(cut.truncated.is_some(), want.ids[i].len() > 16, "{name} {file}: {text:?}");
            }
        }
    }
    // The sentencepiece library reads some of these texts otherwise; this follows the other one.
    assert!(all.tokenizers["nfkc"].sentencepiece.len() >= 6);
}

#[test]
fn what_does_not_fit_is_told() {
    let tokenizer = of_pieces(&pieces("nfkc")).unwrap();
    let text = "a photo of a red fox in the snow";
    let cut = tokenizer.encode(text, 9).unwrap();
    assert_eq!(cut.ids.last(), Some(&tokenizer.eos_id()));
    let rest = cut.truncated.unwrap();
    assert!(text.ends_with(&rest) && rest.contains("snow") && !rest.contains("photo"), "{rest:?}");
    assert_eq!(tokenizer.encode(text, 1).unwrap().ids, [1]);
    assert!(tokenizer.encode(text, 0).unwrap_err().to_string().contains("length is 0"));
}

#[test]
fn parts_are_read_on_their_own_and_weighted() {
    let tokenizer = of_pieces(&pieces("nfkc")).unwrap();
    let (encoding, weights) = tokenizer.encode_parts(&[("a photo", 1.0), ("of a fox", 1.5)], 12).unwrap();
    let first = tokenizer.encode("a photo", 12).unwrap();
    let second = tokenizer.encode("of a fox", 12).unwrap();
    let (a, b) = (first.length - 1, second.length - 1);
    assert_eq!(encoding.ids[..a], first.ids[..a]);
    assert_eq!(encoding.ids[a..a + b], second.ids[..b]);
    assert_eq!((encoding.length, encoding.ids.len(), weights.len()), (a + b + 1, 12, 12));
    let want: Vec<f32> = (0..12).map(|i| if (a..a + b).contains(&i) { 1.5 } else { 1.0 }).collect();
    assert_eq!(weights, want);
}

/// tokenizer_config.json may say how special tokens are found in a text.
#[test]
fn flags_of_special_tokens_are_read() {
    let plain = pieces("plain");
    let read = |config: &str| {
        let files = T5TokenizerFiles { pieces: Some(&plain), config: Some(config.as_bytes()), ..Default::default() };
        T5Tokenizer::from_bytes(Path::new("tokenizer_3"), &files)
    };
    let id = of_pieces(&plain).unwrap().encode("<extra_id_0>", 2).unwrap().ids[0];
    let token = |id: u32, strip: bool| {
        format!(
            r#"{{"added_tokens_decoder": {{"{id}": {{"content": "<extra_id_0>", "lstrip": {strip}, "rstrip": {strip}, "special": true}}}}}}"#
        )
    };
    let [kept, stripped] =
        [false, true].map(|strip| read(&token(id, strip)).unwrap().encode("a <extra_id_0> b", 9).unwrap());
    assert_eq!(kept.ids, stripped.ids, "spaces are no tokens of their own");
    let error = read(&token(id - 1, false)).map(drop).unwrap_err().to_string();
    assert!(error.contains("added_tokens_decoder") && error.contains("<extra_id_0>"), "{error}");
    let error = read(r#"{"tokenizer_class": "CLIPTokenizer"}"#).map(drop).unwrap_err().to_string();
    assert!(error.contains("CLIPTokenizer") && error.contains("T5Tokenizer"), "{error}");
    let error = read(r#"{"eos_token": "</end>"}"#).map(drop).unwrap_err().to_string();
    assert!(error.contains("</end>") && error.contains("spiece.model"), "{error}");
    let error = read(r#"{"extra_ids": -1}"#).map(drop).unwrap_err().to_string();
    assert!(error.contains("extra_ids"), "{error}");
    let without = read(r#"{"extra_ids": 0}"#).unwrap().encode("<extra_id_0>", 40).unwrap();
    assert!(without.length > 3 && without.ids.iter().all(|&id| id < 200), "it is text then");
}

#[test]
fn ids_beyond_the_text_encoder_are_named() {
    let tokenizer = of_pieces(&pieces("plain")).unwrap();
    let error = tokenizer.clone().fitted(1).map(drop).unwrap_err().to_string();
    assert!(error.contains("vocab_size is 1"), "{error}");
    let error = tokenizer.fitted(60).unwrap().encode("<extra_id_0>", 5).unwrap_err().to_string();
    assert!(error.contains("<extra_id_0>") && error.contains("vocab_size is 60"), "{error}");
}

#[test]
fn folders_without_a_tokenizer_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = T5Tokenizer::load(&folder.path().join("tokenizer_3")).map(drop).unwrap_err().to_string();
    assert!(error.contains("no such folder") && error.contains("spiece.model"), "{error}");
    let error = T5Tokenizer::load(folder.path()).map(drop).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json and spiece.model are missing"), "{error}");
    fs::write(folder.path().join("spiece.model"), pieces("plain")).unwrap();
    let ids = T5Tokenizer::load(folder.path()).unwrap().encode("a photo", 8).unwrap();
    fs::write(folder.path().join("tokenizer.json"), json("plain", &texts().tokenizers["plain"])).unwrap();
    fs::remove_file(folder.path().join("spiece.model")).unwrap();
    assert_eq!(T5Tokenizer::load(folder.path()).unwrap().encode("a photo", 8).unwrap(), ids);

    let file = folder.path().join("sd3.safetensors");
    let error = T5Tokenizer::beside(&file, "tokenizer_3").map(drop).unwrap_err().to_string();
    assert!(error.contains("sd3.safetensors: a single file") && error.contains("folder tokenizer_3"), "{error}");
    fs::create_dir(folder.path().join("tokenizer_3")).unwrap();
    fs::rename(folder.path().join("tokenizer.json"), folder.path().join("tokenizer_3/tokenizer.json")).unwrap();
    assert_eq!(T5Tokenizer::beside(&file, "tokenizer_3").unwrap().encode("a photo", 8).unwrap(), ids);
}

/// Protobuf messages that stand one after the other are one: what is appended overwrites.
#[test]
fn sentencepiece_models_of_other_kinds_are_refused() {
    let cases: [(&[u8], &str); 5] = [
        (&[0x12, 2, 0x18, 2], "model_type"),
        (&[0x12, 3, 0x98, 2, 1], "byte_fallback"),
        (&[0x1a, 2, 0x18, 0], "add_dummy_prefix"),
        (&[0x1a, 2, 0x20, 0], "remove_extra_whitespaces"),
        (&[0x1a, 2, 0x28, 0], "escape_whitespaces"),
    ];
    let plain = pieces("plain");
    for (more, wanted) in cases {
        let error = of_pieces(&[&plain, more].concat()).map(drop).unwrap_err().to_string();
        assert!(error.contains(wanted) && error.contains("spiece.model"), "{error:?} lacks {wanted:?}");
    }
    for bytes in [&b"version https://git-lfs.github.com/spec/v1\n"[..], b"", &plain[..plain.len() / 2]] {
        let error = of_pieces(bytes).map(drop).unwrap_err().to_string();
        assert!(error.contains("sentencepiece") && error.contains("again"), "{error}");
    }
}

#[test]
fn tokenizer_json_of_another_kind_is_refused() {
    let json: serde_json::Value = serde_json::from_slice(&json("plain", &texts().tokenizers["plain"])).unwrap();
    let fails = |change: &dyn Fn(&mut serde_json::Value), wanted: &str| {
        let mut json = json.clone();
        change(&mut json);
        let error = of_json(&serde_json::to_vec(&json).unwrap()).map(drop).unwrap_err().to_string();
        assert!(error.contains(wanted) && error.contains("tokenizer.json"), "{error:?} lacks {wanted:?}");
    };
    fails(&|json| json["model"]["type"] = "BPE".into(), "model.type");
    fails(&|json| json["model"] = 1.into(), "model is not an object");
    fails(&|json| json["model"]["vocab"] = serde_json::json!({"a": 1}), "model.vocab");
    fails(&|json| json["model"]["unk_id"] = 100_000.into(), "unk_id");
    let table = |text: &str| serde_json::json!({"type": "Precompiled", "precompiled_charsmap": text});
    fails(&|json| json["normalizer"] = table("?"), "precompiled_charsmap");
    fails(
        &|json| json["normalizer"] = serde_json::json!({"type": "Sequence", "normalizers": [table("AAAA")]}),
        "damaged",
    );
    let error = of_json(b"{\"model\"").map(drop).unwrap_err().to_string();
    assert!(error.contains("complete"), "{error}");
}

/// The library that reads the normaliser's table indexes its trie without looking: a damaged one must be found before.
#[test]
fn damaged_tables_of_the_normaliser_never_crash() {
    let (bytes, all) = (pieces("nfkc"), texts());
    let [first, count] = all.tokenizers["nfkc"].charsmap.unwrap();
    let trie = u32::from_le_bytes(*bytes[first..].first_chunk().unwrap()) as usize;
    let mut random = common::Random::new(5);
    let (mut refused, mut would_crash) = (0, 0);
    for round in 0..40 {
        let mut damaged = bytes.clone();
        for _ in 0..1 << (round % 10) {
            damaged[first + 4 + (random.uniform() * (trie - 1) as f64) as usize] = (random.uniform() * 255.0) as u8;
        }
        let of_library = Precompiled::from(&damaged[first..][..count]).unwrap();
        let crashes = std::panic::catch_unwind(|| {
            all.texts.iter().for_each(|text| drop(of_library.normalize_string(text)));
        });
        would_crash += usize::from(crashes.is_err());
        match of_pieces(&damaged) {
            Ok(tokenizer) => all.texts.iter().for_each(|text| drop(tokenizer.encode(text, 77))),
            Err(error) => {
                assert!(error.to_string().contains("damaged"), "{error}");
                refused += 1;
            }
        }
    }
    println!("{refused} of 40 refused; the library crashes on these texts with {would_crash}");
    assert!(would_crash > 0 && refused >= would_crash && refused < 40, "{refused}, {would_crash}");
}
