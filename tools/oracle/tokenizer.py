"""Writes tests/data/tokenizer/: a small vocabulary in CLIP's format and, for every generation of tokenizer files, the
ids that transformers' CLIPTokenizer gives to texts that tokenizers get wrong, with the text that diffusers reports as
truncated.

    python tools/oracle/tokenizer.py          (needs transformers; see requirements.txt)
"""

import json
import pathlib
import shutil
import tempfile

from small_tokenizer import BOS, EOS, PROMPTS, learn_merges, vocabulary
from transformers import CLIPTokenizer

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/data/tokenizer"

# Beside small_tokenizer's: special tokens in every disguise, white space, case, lengths at the limit.
MORE = [
    "<|STARTOFTEXT|> a <|EndOfText|> b",
    "a<|endoftext|>b<|startoftext|>c",
    "< | endoftext | > <|endoftext <|endoftext|",
    "a!b !!c! ! !",
    "<new> a <NEW> <newer> x<new>y <plain> <PLAIN> <word>s a <word> b",
    "\u1680\u2000\u2009\u2028\u2029\u202f\u205f\u3000 a \u180e\u200b\u2060 b \x1c\x1d\x1e\x1f c \x0b\x0c d \x85 e",
    "\x00 nul \x07 bell \x1b[31m red",
    "\ud7ff \ue000 \ufffd \uffff \U0001f600 \U0010ffff \U000e0041",
    "'S 'LL 'Re n't ''s '' 's's",
    "a1b22c333 1st 2nd ½a 10² x₂ ⅷ 一二三 ١٢٣",
    "ﷺ ǰ ΐ ŉ ẖ և ﬃ İI ıi ſ K Å Ω",
    "q\u0323\u0307 q\u0307\u0323 \u1e9b\u0323 가각 \u1100\u1161 \u0958 ा ◌́",
    "🏳️‍🌈 👍🏽 🇩🇪 1️⃣ ©️ ™ → ∑ ≠ ♥ ░▒▓ 中a中b",
    "ไทย עִבְרִית العَرَبِيَّة हिन्दी தமிழ் မြန်မာ ខ្មែរ",
    "a" * 77,
    "a " * 13,
    "a " * 14,
    "a " * 15,
    "a " * 75 + "b",
    "a " * 76 + "café 猫 don't <|endoftext|> END",
]


def special(text, normalized=True, **more):
    return {"content": text, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False, **more}


def added(text, **more):
    return {"__type": "AddedToken", **special(text, **more)}


def variants(vocab):
    base = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "tokenizer_class": "CLIPTokenizer"}
    roles = ("bos_token", BOS), ("eos_token", EOS), ("unk_token", EOS)
    as_objects = {role: special(text) for role, text in roles}
    as_added = {role: added(text) for role, text in roles}
    as_strings = dict(roles)
    n = len(vocab)
    # As published: Stable Diffusion 1.5 (objects, padding with EOS), 2.1 (padding with "!").
    yield "sd15", "files", {
        "tokenizer_config.json": {**base, **as_added, "model_max_length": 77, "pad_token": EOS},
        "special_tokens_map.json": {**as_objects, "pad_token": EOS},
    }
    yield "sd21", "files", {
        "tokenizer_config.json": {**base, **as_added, "model_max_length": 77, "pad_token": "!"},
        "special_tokens_map.json": {**as_objects, "pad_token": "!"},
    }
    # As newer versions write them: added_tokens_decoder; special_tokens_map.json does not count then.
    decoder = {"0": special("!", normalized=False, special=True)}
    decoder |= {str(vocab[t]): special(t, special=True) for t in (BOS, EOS)}
    yield "decoder", "files", {
        "tokenizer_config.json": {**base, **as_strings, "added_tokens_decoder": decoder, "model_max_length": 16, "pad_token": "!"},
        "special_tokens_map.json": {"pad_token": EOS},
    }
    # A text encoder that learned new words (textual inversion): some special, some not.
    new = {
        str(vocab[EOS]): special(EOS, special=True),
        str(n): special("<new>", normalized=False, special=True),
        str(n + 1): special("<plain>", special=False),
        str(n + 2): {**special("<word>", special=False), "single_word": True, "lstrip": True, "rstrip": True},
    }
    yield "new-words", "files", {
        "tokenizer_config.json": {**base, **as_strings, "added_tokens_decoder": new, "model_max_length": 16, "pad_token": EOS},
    }
    yield "added-tokens-file", "files", {
        "tokenizer_config.json": {**base, **as_added, "model_max_length": 16, "pad_token": EOS},
        "special_tokens_map.json": {**as_objects, "pad_token": EOS, "additional_special_tokens": ["<new>"]},
        "added_tokens.json": {"<new>": n, "<plain>": n + 1},
    }
    # Strings alone; the only vocabulary in tokenizer.json, new and old form.
    yield "json", "json", {
        "tokenizer_config.json": {**base, **as_strings, "model_max_length": 16, "pad_token": EOS},
        "special_tokens_map.json": {**as_strings, "pad_token": EOS},
    }
    yield "json-old", "json-old", {
        "tokenizer_config.json": {**as_added, "model_max_length": 16, "pad_token": "!", "padding_side": "left"},
    }
    # No config at all: the class's defaults, 77 by the caller.
    yield "bare", "files", {}


def write_vocabulary(folder, form, vocab, merges):
    if form == "files":
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    fast = CLIPTokenizer(vocab=vocab, merges=[tuple(m) for m in merges])
    tree = json.loads(fast.backend_tokenizer.to_str())
    if form == "json-old":
        tree["model"]["merges"] = [" ".join(m) for m in tree["model"]["merges"]]
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")


def encode(tokenizer, text, length):
    """Ids and what diffusers' StableDiffusionPipeline.encode_prompt logs as truncated."""
    ids = tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids
    whole = tokenizer(text, padding="longest").input_ids
    if len(whole) >= len(ids) and whole != ids:
        return ids, tokenizer.batch_decode([whole[length - 1 : -1]])[0]
    return ids, None


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    merges = learn_merges(200)
    vocab = vocabulary(merges)
    for form in "files", "json":
        write_vocabulary(OUT, form, vocab, merges)
    texts = PROMPTS + MORE
    out = []
    for name, form, files in variants(vocab):
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            write_vocabulary(folder, form, vocab, merges)
            for file, value in files.items():
                (folder / file).write_text(json.dumps(value), encoding="utf-8")
            tokenizer = CLIPTokenizer.from_pretrained(str(folder))
            length = min(tokenizer.model_max_length, 77)
            cases = [encode(tokenizer, text, length) for text in texts]
        out.append({
            "name": name, "vocabulary": form, "files": files, "max_length": length,
            "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id,
            "ids": [ids for ids, _ in cases], "truncated": [text for _, text in cases],
        })
    with open(OUT / "expected.json", "w", encoding="ascii") as file:
        json.dump({"texts": texts, "variants": out}, file, separators=(",", ":"))
        file.write("\n")
    print(OUT, sum(f.stat().st_size for f in OUT.iterdir()), "bytes")


if __name__ == "__main__":
    main()
