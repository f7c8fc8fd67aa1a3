//! Token ids of texts that tokenizers get wrong, for every form of tokenizer files.

use megafuse::text::ClipTokenizer;

use crate::files::{self, MODELS, SDXL_MODELS, data};

#[test]
fn token_ids() {
    let mut results = Vec::new();
    let second = SDXL_MODELS.map(|model| (model, "tokenizer_2", "tokens_2"));
    let first = MODELS.into_iter().chain(SDXL_MODELS).map(|model| (model, "tokenizer", "tokens"));
    for (model, folder, key) in first.chain(second) {
        let tokens = &files::json(format!("{model}/oracle.json"))[key];
        let tokenizer = ClipTokenizer::load(&data(model).join(folder)).unwrap();
        assert_eq!(tokenizer.max_length() as u64, tokens["max_length"].as_u64().unwrap(), "{model}");
        for case in tokens["prompts"].as_array().unwrap() {
            let prompt = case["prompt"].as_str().unwrap();
            let want: Vec<u64> = case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
            let got: Vec<u64> = tokenizer.encode(prompt).unwrap().ids.iter().map(|&id| id.into()).collect();
            results.push(match got == want {
                true => Ok(()),
                false => Err(format!("{model} {folder} {prompt:?}:\n  got  {got:?}\n  want {want:?}")),
            });
        }
    }
    files::all_passed(results);
}
