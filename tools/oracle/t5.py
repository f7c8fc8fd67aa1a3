"""Writes what tests/t5.rs and tests/t5_tokenizer.rs compare with: tests/data/t5/, small random T5 encoders with transformers'
outputs, sentencepiece tokenizers with transformers' ids, and the tensors of the published encoder
(tests/data/manifest/text_encoder_t5xxl.json).

    tools/oracle/venv tools/oracle/t5.py

A model's weights are described (drawn.py), but for `fp8`, which is a file of ComfyUI's kind. expected.safetensors of a model: ids
[N, L], lengths [N] (tokens before the padding, of models that are told so), hidden [N, L, C], computed in f64; its metadata has
the largest error of transformers' own run in f32 and in bf16.

tokenizer/: nfkc.model.gz has the published normaliser (nmt_nfkc, which alone is 240 KB), plain.model none. expected.json: texts; for
each tokenizer the ids of transformers' T5Tokenizer, which are the same from spiece.model and from tokenizer.json, the ids of the
sentencepiece library where they differ (`sentencepiece`), and ids and attention masks cut and padded to 16. NAME.tokenizer.json is
what T5Tokenizer saves, without the normaliser's table, which stands in the model file at `charsmap` (first byte, number).
"""

import base64
import gzip
import io
import json
import pathlib
import shutil
import tempfile

import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer

import drawn
import small_models
from drawn import TWIN, Described

DATA = pathlib.Path(__file__).resolve().parents[2] / "tests/data"

# Keys of config.json; ids [N, L]; tokens of each row before the padding, where the model is told; dtype of the weights.
CASES = {
    # The published shape of a layer: heads of d_kv side by side are not d_model.
    "plain": ({"vocab_size": 61, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 5}, (2, 11), None, torch.float32),
    # DeepFloyd IF: padding is masked; few buckets, so that distances share them.
    "masked": ({"vocab_size": 37, "d_model": 32, "d_kv": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2,
                "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}, (3, 33), [33, 1, 20], torch.float16),
    # Further apart than the last bucket begins; another eps.
    "long": ({"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 3, "layer_norm_epsilon": 1e-3},
             (1, 150), None, torch.float32),
    # The published width of a head; a whole prompt.
    "wide-head": ({"vocab_size": 40, "d_model": 20, "d_kv": 64, "d_ff": 56, "num_layers": 2, "num_heads": 1}, (2, 77), [9, 77], torch.bfloat16),
}
FP8 = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
PUBLISHED = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}

CORPUS = [
    "a photo of a red fox in the snow, early morning light",
    "an oil painting of a lighthouse at dusk, highly detailed, 8k",
    "two cats sitting on a wooden table beside a bowl of oranges",
    "a portrait of an old man with a long white beard, dramatic lighting",
    "the quick brown fox jumps over the lazy dog near the river bank",
    "a futuristic city with flying cars and neon signs, rainy night",
    "café crème à la française, élégant, déjà vu",
    "ein großer Baum im Garten, schöne Blätter über dem Fluß",
    "watercolor landscape with mountains, lake and a small boat",
    "studio photograph of a glass teapot filled with green tea",
    "1234567890 numbers, 3.14 and 2,718",
    "an astronaut riding a horse on mars; photo-realistic!",
]
CAPTIONS = pathlib.Path(__file__).resolve().parents[1] / "pocket/heldout.txt"

TEXTS = [
    "", " ", "   \t\n ", "a", "a photo of a red fox", "A Photo Of A RED Fox", "  leading and trailing  ", "two  spaces   three",
    "line\nbreak\r\nand\ttab", "comma,no space;semi:colon!", "(weights:1.2) [and] {braces} <tags>", "don't can't it's",
    "café crème", "cafe\u0301 cre\u0300me", "großer Fluß über", "日本語のテキスト", "中文 提示", "한국어 프롬프트", "привет мир", "مرحبا بالعالم",
    "हिन्दी में", "emoji 😀🚀 here", "👩‍👩‍👧‍👦 family", "🏳️‍🌈 flag", "zero\u200bwidth\u200djoin\ufeff", "soft\u00adhyphen", "nbsp\u00a0here\u3000wide",
    "ﬁne ﬂow ① ½ ™ ㎏", "ＦＵＬＬ　ｗｉｄｔｈ", "a\u0300\u0301\u0302 stacked", "e\u0301\u0300x", "\u1e9b\u0323", "İstanbul ıI", "Ω Ω K Å",
    "</s> in the middle </s>", "<pad>", "<unk> known", "<extra_id_0> and <extra_id_99>", "a<extra_id_1>b", "<extra_id_100>", "</s", "▁ lower block ▁x",
    "under▁score", "tab\tonly", "\x00null\x01\x02control\x7f", "\x85next\u2028line\u2029par", "3.14159 2,718 1/2", "x" * 40, "word " * 30,
    "a photo of a very long prompt that goes on and on with many words until it is far beyond sixteen tokens, naturally",
    "\ud7a3\u1100\u1161\u11a8", "ก็ ที่", "क्षि ज्ञ", "\U0001d573\U0001d58a\U0001d591\U0001d591\U0001d594", "𠮷野家", "…‥—–‘’“”", "~`@#$%^&*()_+-=",
]


def model_of(config, seed, dtype):
    model = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **config)).eval().requires_grad_(False)
    state = {name: small_models.draw(seed, f"text_encoder.{name}", tensor).to(dtype).float()
             for name, tensor in Described(model.state_dict()).state_dict().items()}
    model.load_state_dict(state | {TWIN: state["shared.weight"]})
    return model


def write_config(folder, config):
    folder.mkdir(parents=True)
    known = {"architectures": ["T5EncoderModel"], "model_type": "t5", "feed_forward_proj": "gated-gelu"}
    (folder / "config.json").write_text(json.dumps(known | config, indent=1) + "\n")


def encode(model, ids, lengths):
    mask = None if lengths is None else (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    if mask is None:
        mask = torch.ones_like(ids)
    return model(input_ids=ids, attention_mask=mask).last_hidden_state.float()


@torch.no_grad()
def write_case(name, seed, config, shape, lengths, dtype):
    folder = DATA / "t5" / name
    write_config(folder, config)
    model = model_of(config, seed, dtype)
    drawn.write(folder, "model", Described(model.state_dict()), seed, "text_encoder", dtype)
    ids = torch.randint(0, config["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))
    lengths = None if lengths is None else torch.tensor(lengths)
    single = encode(model, ids, lengths)
    low = encode(model.bfloat16(), ids, lengths)
    hidden = encode(model_of(config, seed, dtype).double(), ids, lengths)
    tensors = {"ids": ids.int(), "hidden": hidden}
    if lengths is not None:
        tensors["lengths"] = lengths.int()
    worst = {label: float((got - hidden).abs().max()) for label, got in (("f32", single), ("bf16", low))}
    save_file(tensors, folder / "expected.safetensors", metadata={"errors": json.dumps(worst)})
    print(name, list(hidden.shape), float(hidden.abs().max()), worst)


@torch.no_grad()
def write_fp8():
    """As ComfyUI stores it: matrices in E4M3, cast (`model.safetensors`) or with a scale each (`scaled.safetensors`)."""
    folder = DATA / "t5" / "fp8"
    write_config(folder, FP8)
    ids = torch.randint(0, FP8["vocab_size"], (1, 9), generator=torch.Generator().manual_seed(9))
    expected = {"ids": ids.int()}
    for stem, key in ("model", "hidden"), ("scaled", "hidden_scaled"):
        model = model_of(FP8, 9, torch.float32)
        state, stored = model.state_dict(), {}
        for name, tensor in Described(model.state_dict()).state_dict().items():
            matrix = tensor.ndim == 2 and "relative" not in name and (stem == "model" or name != "shared.weight")
            if not matrix:
                stored[name] = state[name] = tensor.half() if stem == "scaled" else tensor.to(torch.float8_e4m3fn)
                state[name] = state[name].float()
                continue
            scale = tensor.abs().max() / 448 if stem == "scaled" else torch.tensor(1.0)
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            state[name] = stored[name].float() * scale
            if stem == "scaled":
                stored[name.removesuffix("weight") + "scale_weight"] = scale.reshape(1).float()
        if stem == "scaled":
            stored["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
        stored[TWIN] = stored["shared.weight"].clone()
        state[TWIN] = state["shared.weight"]
        save_file(stored, folder / f"{stem}.safetensors")
        model.load_state_dict(state)
        expected[key] = encode(model.double(), ids, None)
    save_file(expected, folder / "expected.safetensors")
    print("fp8", float((expected["hidden"] - expected["hidden_scaled"]).abs().max()))


def write_manifest():
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **PUBLISHED))
    keys = sorted([name, list(tensor.shape)] for name, tensor in Described(model.state_dict()).state_dict().items())
    count = sum(p.numel() for p in model.parameters())
    lines = ",\n".join(json.dumps(k) for k in keys)
    config = json.dumps({"model_type": "t5", "feed_forward_proj": "gated-gelu", **PUBLISHED})
    path = DATA / "manifest/text_encoder_t5xxl.json"
    path.write_text(f'{{"config": {config},\n"parameters": {count},\n"tensors": [\n{lines}\n]}}\n')
    print("manifest", count, len(keys))


def train(rule, size):
    out = io.BytesIO()
    lines = CORPUS * 20 + CAPTIONS.read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=size, model_type="unigram", normalization_rule_name=rule,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )
    return out.getvalue()


def write_tokenizers():
    folder = DATA / "t5" / "tokenizer"
    folder.mkdir(parents=True)
    expected = {"texts": TEXTS, "tokenizers": {}}
    for name, rule, size in ("nfkc", "nmt_nfkc", 400), ("plain", "identity", 250):
        bytes_ = train(rule, size)
        if name == "nfkc":
            (folder / "nfkc.model.gz").write_bytes(gzip.compress(bytes_, 9, mtime=0))
        else:
            (folder / "plain.model").write_bytes(bytes_)
        with tempfile.TemporaryDirectory() as scratch:
            pieces = pathlib.Path(scratch) / "pieces"
            pieces.mkdir()
            (pieces / "spiece.model").write_bytes(bytes_)
            (pieces / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}))
            fast = T5Tokenizer.from_pretrained(pieces)
            whole = pathlib.Path(scratch) / "whole"
            fast.save_pretrained(whole)
            (whole / "spiece.model").unlink(missing_ok=True)
            again = T5Tokenizer.from_pretrained(whole)
            slow = sentencepiece.SentencePieceProcessor(model_proto=bytes_)
            ids = [fast(text).input_ids for text in TEXTS]
            assert ids == [again(text).input_ids for text in TEXTS]
            differ = {str(i): found for i, text in enumerate(TEXTS) if (found := slow.encode(text) + [1]) != ids[i]}
            cut = fast(TEXTS, padding="max_length", max_length=16, truncation=True)
            assert cut.input_ids == again(TEXTS, padding="max_length", max_length=16, truncation=True).input_ids
            saved = json.loads((whole / "tokenizer.json").read_text())
            print(name, len(bytes_), len(saved["model"]["vocab"]), len(fast), "differ:", [TEXTS[int(i)] for i in differ])
            place = None
            if name == "nfkc":
                table = base64.b64decode(saved["normalizer"].pop("precompiled_charsmap"))
                place = [bytes_.index(table), len(table)]
            (folder / f"{name}.tokenizer.json").write_text(json.dumps(saved, separators=(",", ":")) + "\n")
            expected["tokenizers"][name] = {
                "ids": ids, "sentencepiece": differ, "cut": cut.input_ids, "masks": cut.attention_mask, "charsmap": place,
            }
    (folder / "expected.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")


def main():
    torch.set_num_threads(1)
    shutil.rmtree(DATA / "t5", ignore_errors=True)
    for seed, (name, case) in enumerate(CASES.items()):
        write_case(name, 300 + seed, *case)
    write_fp8()
    write_manifest()
    write_tokenizers()


if __name__ == "__main__":
    main()
