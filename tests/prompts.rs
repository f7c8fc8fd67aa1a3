//! Prompt syntax, chunks, learned words and emphasis against webui's and diffusers' behaviour over transformers
//! (tools/oracle/prompts.py).

#[path = "common/drawn.rs"]
mod drawn;

use std::fs;
use std::path::{Path, PathBuf};

use megafuse::models::{ClipOutput, ClipTextConfig, ClipTextModel, WeightStore};
use megafuse::text::{
    ClipSkip, ClipTokenizer, Encoder, LearnedWords, LongPrompt, Part, Prompt, Syntax, TextualInversion, emphasize,
    syntax_hint,
};
use megafuse::{DType, Device};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Case {
    model: String,
    syntax: String,
    long: String,
    learned: bool,
    text: String,
    ids: Vec<Vec<u32>>,
    weights: Vec<Vec<f32>>,
}

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

fn cases() -> Vec<Case> {
    serde_json::from_slice(&fs::read(data("prompts/cases.json")).unwrap()).unwrap()
}

fn syntax(case: &Case) -> Syntax {
    if case.syntax == "a1111" { Syntax::A1111 } else { Syntax::Plain }
}

fn long(case: &Case) -> LongPrompt {
    if case.long == "chunk" { LongPrompt::Chunk } else { LongPrompt::Truncate }
}

fn config_json(model: &str) -> Value {
    serde_json::from_slice(&fs::read(data(model).join("text_encoder/config.json")).unwrap()).unwrap()
}

fn width(model: &str) -> usize {
    config_json(model)["hidden_size"].as_u64().unwrap() as usize
}

fn learned(model: &str) -> LearnedWords {
    // The order in which the oracle gives rows to the words.
    let files = ["toy.safetensors", "toy cat.safetensors", "learned_embeds.safetensors"];
    let read = |name: &str| TextualInversion::read(&data("prompts").join(model).join(name)).unwrap();
    LearnedWords::new(&files.map(read), Encoder::Single, width(model)).unwrap()
}

fn tokenizer(model: &str, with_words: bool) -> ClipTokenizer {
    let vocab_size = config_json(model)["vocab_size"].as_u64().unwrap() as usize;
    let tokenizer = ClipTokenizer::load(&data(model).join("tokenizer")).unwrap().fitted(vocab_size, 77).unwrap();
    if with_words { tokenizer.with_learned_words(&learned(model)).unwrap() } else { tokenizer }
}

/// The model's text encoder with the learned rows at the end of its embedding table.
fn extended_encoder(model: &str) -> ClipTextModel {
    let config = ClipTextConfig::from_json("config.json", &config_json(model).to_string()).unwrap();
    let store =
        WeightStore::open(&drawn::folder(model).join("text_encoder"), "model", &Device::cpu(), DType::F32).unwrap();
    let words = learned(model);
    let (rows, [count, _]) = words.table();
    ClipTextModel::load(store, &config).unwrap().with_learned(rows, count).unwrap()
}

#[test]
fn ids_and_weights_equal_the_published_programs() {
    let cases = cases();
    assert!(cases.len() >= 25);
    for case in &cases {
        let what = format!("{} {} {} {:?}", case.model, case.syntax, case.long, case.text);
        let tokenizer = tokenizer(&case.model, case.learned);
        let got = tokenizer.encode_chunks(&Prompt::parse(&case.text, syntax(case)), long(case)).unwrap();
        assert_eq!(got.ids, case.ids, "ids of {what}");
        assert_eq!(got.weights, case.weights, "weights of {what}");
    }
}

/// Also with clip skip 2, where the file has it.
#[test]
fn emphasized_embeddings_equal_torch() {
    let encoders = ["sd15", "sd21"].map(|model| (model, extended_encoder(model)));
    let bytes = fs::read(data("prompts/embeddings.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut skipped = 0;
    for (i, case) in cases().iter().enumerate() {
        let encoder = &encoders.iter().find(|(model, _)| *model == case.model).unwrap().1;
        let tokenizer = tokenizer(&case.model, case.learned);
        let chunks = tokenizer.encode_chunks(&Prompt::parse(&case.text, syntax(case)), long(case)).unwrap();
        let width = width(&case.model);
        for (hidden, name) in [(1, i.to_string()), (2, format!("{i}.skip2"))] {
            let Ok(want) = file.tensor(&name) else { continue };
            skipped += usize::from(hidden == 2);
            let output = ClipOutput { hidden, ..ClipOutput::LAST };
            let mut got = encoder.forward(&chunks.ids, output).unwrap().hidden.to_f32_vec().unwrap();
            for (chunk, weights) in got.chunks_exact_mut(77 * width).zip(&chunks.weights) {
                emphasize(chunk, [77, width], weights).unwrap();
            }
            let want: Vec<f32> = want.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            assert_eq!(got.len(), want.len(), "{:?}", case.text);
            // The factor mean / mean' is a quotient of sums that may nearly cancel; torch takes them in f32.
            let largest = want.iter().fold(1.0_f32, |m, v| m.max(v.abs()));
            for (j, (got, want)) in got.iter().zip(&want).enumerate() {
                let text = &case.text;
                assert!((got - want).abs() <= 1e-5 * largest, "{name} {text:?}[{j}] = {got}, torch has {want}");
            }
        }
    }
    assert_eq!(skipped, 3);
}

#[test]
fn plain_and_truncated_is_encode() {
    #[derive(Deserialize)]
    struct Expected {
        texts: Vec<String>,
    }
    let expected: Expected = serde_json::from_slice(&fs::read(data("tokenizer/expected.json")).unwrap()).unwrap();
    for model in ["sd15", "sd21"] {
        let tokenizer = tokenizer(model, false);
        for text in &expected.texts {
            let want = tokenizer.encode(text).unwrap();
            let got = tokenizer.encode_chunks(&Prompt::parse(text, Syntax::Plain), LongPrompt::Truncate).unwrap();
            assert_eq!((&got.ids, &got.truncated), (&vec![want.ids], &want.truncated), "{model} {text:?}");
            assert!(got.weights[0].iter().all(|&w| w == 1.0) && got.weights[0].len() == 77);
        }
    }
}

#[test]
fn what_is_cut_off_names_learned_words() {
    let tokenizer = tokenizer("sd15", true);
    let text = format!("{}toy cat dog", "cat ".repeat(75));
    let got = tokenizer.encode_chunks(&Prompt::parse(&text, Syntax::A1111), LongPrompt::Truncate).unwrap();
    assert_eq!(got.truncated.as_deref(), Some("toy cat dog"));
    assert_eq!(got.learned, ["toy cat"]);
}

#[test]
fn an_added_chunk_is_the_empty_prompt() {
    for model in ["sd15", "sd21"] {
        let tokenizer = tokenizer(model, false);
        let mut chunks = tokenizer.encode_chunks(&Prompt::parse("a cat", Syntax::A1111), LongPrompt::Chunk).unwrap();
        tokenizer.pad_chunks(&mut chunks, 2);
        assert_eq!(chunks.ids[1], tokenizer.encode("").unwrap().ids);
        assert_eq!(chunks.weights, vec![[&[1.0; 77][..]].concat(); 2]);
        tokenizer.pad_chunks(&mut chunks, 1);
        assert_eq!(chunks.ids.len(), 2);
    }
}

#[test]
fn a_break_inside_brackets_breaks() {
    let text = |text: &str, weight| Part::Text { text: text.into(), weight };
    let got = Prompt::parse("(a BREAK b:1.5) c", Syntax::A1111).parts;
    assert_eq!(got, [text("a", 1.5), Part::Break, text("b", 1.5), text(" c", 1.0)]);
}

#[test]
fn what_has_no_effect_is_a_warning() {
    let cases: [(&str, &[&str]); 9] = [
        ("a <lora:x:0.8> cat", &["<lora:x:0.8> was taken out"]),
        ("[a|b] cat", &["[a|b]: alternation"]),
        ("[a:b:0.5] [x:3] cat", &["[a:b:0.5]: prompt editing", "[x:3]: prompt editing"]),
        ("[a:b:c] (a:1.2) [(a:1.2)] a|b", &[]),
        ("a AND b", &["AND: composing"]),
        ("BAND ANDes A_AND", &[]),
        (r"\[a|b\] [c]", &[]),
        ("(a:1.2.3) cat", &["1.2.3 is not a weight"]),
        ("(a:99999999) <b>", &["99999999 is not a weight"]),
    ];
    for (text, wanted) in cases {
        let got = Prompt::parse(text, Syntax::A1111).warnings;
        assert_eq!(got.len(), wanted.len(), "{text}: {got:?}");
        for (got, wanted) in got.iter().zip(wanted) {
            assert!(got.contains(wanted), "{text}: {got:?} lacks {wanted:?}");
        }
        assert!(Prompt::parse(text, Syntax::Plain).warnings.is_empty());
    }
}

#[test]
fn a_hint_names_the_syntax_that_plain_reads_as_words() {
    let cases = [
        ("a (red:1.4) ball", Some("(red:1.4)")),
        ("a (very (red: 1.4 )) ball", Some("(red: 1.4 )")),
        ("((red)) ball", Some("((")),
        ("ball BREAK blue", Some("BREAK")),
        ("ball <lora:x:0.8>", Some("<lora:x:0.8>")),
        ("a photo (black and white), 16:9, BREAKING news <new>", None),
        ("猫 (é:x) (ratio 16:9 :) <a b:c> <:", None),
    ];
    for (text, want) in cases {
        assert_eq!(syntax_hint(text).as_deref(), want, "{text}");
    }
}

#[test]
fn odd_texts_are_read_without_a_panic() {
    let pieces = ["(", ")", "[", "]", ":", "1.5", "\\", "BREAK", "<", ">", "é", "猫", " ", "|", "AND", "-", "toy", "İ"];
    let tokenizer = tokenizer("sd15", true);
    let mut state = 1_u64;
    for _ in 0..2000 {
        let mut text = String::new();
        for _ in 0..12 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            text.push_str(pieces[(state >> 33) as usize % pieces.len()]);
        }
        syntax_hint(&text);
        for syntax in [Syntax::Plain, Syntax::A1111] {
            for long in [LongPrompt::Truncate, LongPrompt::Chunk] {
                let got = tokenizer.encode_chunks(&Prompt::parse(&text, syntax), long).unwrap();
                assert!(got.ids.iter().all(|row| row.len() == 77), "{text}");
                assert!(got.weights.iter().all(|row| row.len() == 77), "{text}");
            }
        }
    }
}

fn tensor_file(tensors: &[(&str, Dtype, &[usize], &[f32])]) -> Vec<u8> {
    let bytes = |dtype: &Dtype, values: &[f32]| -> Vec<u8> {
        match dtype {
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
            _ => values.iter().map(|v| *v as u8).collect(),
        }
    };
    let stored: Vec<_> =
        tensors.iter().map(|(key, dtype, shape, values)| (*key, *dtype, *shape, bytes(dtype, values))).collect();
    let views = stored
        .iter()
        .map(|(key, dtype, shape, values)| (*key, TensorView::new(*dtype, shape.to_vec(), values).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

fn read(name: &str, bytes: &[u8]) -> Result<TextualInversion, String> {
    TextualInversion::from_bytes(Path::new(name), bytes).map_err(|error| error.to_string())
}

#[test]
fn files_of_learned_words_are_read() {
    let one = tensor_file(&[("<x>", Dtype::BF16, &[2], &[1.5, -2.0])]);
    let words = LearnedWords::new(&[read("a.safetensors", &one).unwrap()], Encoder::Single, 2).unwrap();
    assert_eq!(words.words(), [("<x>".to_string(), 1)]);
    assert_eq!(words.table(), (&[1.5, -2.0][..], [1, 2]));

    let l = ("clip_l", Dtype::F32, &[1, 2][..], &[1.0, 2.0][..]);
    let g = ("clip_g", Dtype::F32, &[2, 3][..], &[3.0, 4.0, 5.0, 6.0, 7.0, 8.0][..]);
    let sdxl = read("dir/Bad Hands.v2.safetensors", &tensor_file(&[g, l])).unwrap();
    assert_eq!(sdxl.word(), "Bad Hands.v2");
    let table = |encoder, width| LearnedWords::new(std::slice::from_ref(&sdxl), encoder, width);
    assert_eq!(table(Encoder::ClipL, 2).unwrap().table(), (&[1.0, 2.0][..], [1, 2]));
    assert_eq!(table(Encoder::ClipG, 3).unwrap().table().1, [2, 3]);
    let error = table(Encoder::Single, 2).unwrap_err().to_string();
    assert!(error.contains("SDXL") && error.contains("Bad Hands.v2"), "{error}");
}

/// As torch.save wrote them: of webui, of the first code, whose vectors are in a module, and of diffusers.
#[test]
fn files_of_learned_words_that_torch_wrote_are_read() {
    let all: Vec<f32> = (0..8).map(|i| i as f32 / 8.0).collect();
    let cases = [
        ("webui.pt", "webui", 2, &all[..]),
        ("parameters.pt", "parameters", 2, &all),
        ("diffusers.bin", "<toy>", 1, &[0.0, 1.0, 2.0, 3.0]),
    ];
    for (name, word, rows, values) in cases {
        let file = TextualInversion::read(&data("pickles").join(name)).unwrap();
        let words = LearnedWords::new(std::slice::from_ref(&file), Encoder::Single, 4).unwrap();
        assert_eq!((words.words(), words.table()), (&[(word.to_string(), rows)][..], (values, [rows, 4])), "{name}");
        if name == "webui.pt" {
            let bytes = tensor_file(&[("emb_params", Dtype::F32, &[2, 4], values)]);
            assert_eq!(read("webui.safetensors", &bytes).unwrap().digest(), file.digest());
        }
    }
}

#[test]
fn broken_files_of_learned_words_are_named() {
    let f32s = Dtype::F32;
    let cases: [(&str, Vec<u8>, &[&str]); 8] = [
        ("x.safetensors", b"\x80\x02}q".to_vec(), &["x.safetensors", "not a complete"]),
        ("x.safetensors", tensor_file(&[]), &["no tensor"]),
        (
            "x.safetensors",
            tensor_file(&[("a", f32s, &[1], &[1.0]), ("b", f32s, &[1], &[1.0])]),
            &["2 tensors (a, b)", "has one"],
        ),
        (
            "x.safetensors",
            tensor_file(&[("emb_params", f32s, &[1, 2], &[1.0, f32::NAN])]),
            &["emb_params", "not finite"],
        ),
        ("x.safetensors", tensor_file(&[("emb_params", f32s, &[0, 2], &[])]), &["emb_params", "shape [0, 2]"]),
        ("x.safetensors", tensor_file(&[("emb_params", f32s, &[1, 1, 1], &[1.0])]), &["shape [1, 1, 1]"]),
        ("x.safetensors", tensor_file(&[("emb_params", Dtype::U8, &[1], &[1.0])]), &["U8", "F32"]),
        ("x.safetensors", tensor_file(&[(" ", f32s, &[1], &[1.0])]), &["word is empty"]),
    ];
    for (name, bytes, wanted) in cases {
        let error = read(name, &bytes).unwrap_err();
        for part in wanted {
            assert!(error.contains(part), "{error:?} lacks {part:?}");
        }
    }
    let error = read("a.pt", b"PK\x03\x04").unwrap_err();
    assert!(error.contains("a.pt") && error.contains("no directory of a zip archive"), "{error}");
    // One that would run a command, in PyTorch's older form, and a network's checkpoint.
    let older = [&b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."[..], b"\x80\x02M\xe9\x03.", b"\x80\x02}."].concat();
    let error = read("a.pt", &[&older[..], b"cnt\nsystem\nU\x04true\x85R.", b"\x80\x02]."].concat()).unwrap_err();
    assert!(error.contains("would call nt.system"), "{error}");
    let error = TextualInversion::read(&data("pickles/older.pth")).unwrap_err().to_string();
    assert!(error.contains("14 tensors (bf16, channels_last, columns, empty, ...)"), "{error}");
    let good = read("dir/Toy.safetensors", &tensor_file(&[("emb_params", f32s, &[1, 2], &[1.0, 2.0])])).unwrap();
    let same = read("other/toy.safetensors", &tensor_file(&[("emb_params", f32s, &[1, 2], &[1.0, 2.0])])).unwrap();
    let error = LearnedWords::new(&[good.clone(), same], Encoder::Single, 2).unwrap_err().to_string();
    assert!(error.contains("other/toy.safetensors") && error.contains("dir/Toy.safetensors"), "{error}");
    let error = LearnedWords::new(std::slice::from_ref(&good), Encoder::Single, 768).unwrap_err().to_string();
    assert!(error.contains("have 2 values") && error.contains("768"), "{error}");
    let error = LearnedWords::new(&[good], Encoder::ClipG, 2).unwrap_err().to_string();
    assert!(error.contains("clip_l and clip_g"), "{error}");
}

#[test]
fn a_word_of_more_vectors_than_a_prompt_holds_is_refused() {
    let file = read("x.safetensors", &tensor_file(&[("emb_params", Dtype::F32, &[6, 1], &[1.0; 6])])).unwrap();
    let words = LearnedWords::new(&[file], Encoder::Single, 1).unwrap();
    let load = || ClipTokenizer::load(&data("sd15/tokenizer")).unwrap();
    let error = load().fitted(814, 7).unwrap().with_learned_words(&words).err().unwrap().to_string();
    assert!(error.contains("6 vectors") && error.contains("room for 5"), "{error}");
    let error = load().with_learned_words(&words).err().unwrap().to_string();
    assert!(error.contains("vocab_size"), "{error}");
}

#[test]
fn emphasis_checks_its_shape_and_restores_the_mean() {
    let mut values = [1.0, 2.0, 3.0, 4.0];
    emphasize(&mut values, [2, 2], &[1.0, 3.0]).unwrap();
    // 1, 2, 9, 12 has the mean 6; the old mean is 2.5.
    let want = [1.0, 2.0, 9.0, 12.0].map(|v: f32| v * 2.5 / 6.0);
    assert!(values.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-6), "{values:?}");
    let error = emphasize(&mut values, [2, 2], &[1.0]).unwrap_err().to_string();
    assert!(error.contains("[2, 2]"), "{error}");
    let mut zeros = [1.0, -1.0];
    emphasize(&mut zeros, [2, 1], &[2.0, 2.0]).unwrap();
    assert_eq!(zeros, [2.0, -2.0]);
}

#[test]
fn clip_skip_counts_from_the_last_layer() {
    assert_eq!(ClipSkip::new(1, 12).unwrap().layers_run(12), 12);
    assert_eq!(ClipSkip::new(2, 12).unwrap().layers_run(12), 11);
    assert_eq!(ClipSkip::new(12, 12).unwrap().layers_run(12), 1);
    for n in [0, 13] {
        let error = ClipSkip::new(n, 12).unwrap_err().to_string();
        assert!(error.contains("clip skip") && error.contains("1 (the last layer) to 12"), "{error}");
    }
}
