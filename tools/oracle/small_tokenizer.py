"""A small CLIP tokenizer: the 256 byte symbols, each with and without the end-of-word mark, merges learned
from the text below, and the two special tokens at the end, as in the published vocabulary of 49408 entries.

The merges are learned here, by the usual counting of pairs, so that no published vocabulary is needed.
"""

import json
import pathlib
from collections import Counter

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"

TEXT = """
a photograph of an astronaut riding a horse on the moon , highly detailed , sharp focus , 4k , 8k
a painting of a small red house by the sea at sunset , oil on canvas , trending , masterpiece , best quality
an old man with a hat reading a newspaper in a cafe in paris , black and white photograph , 1950s
the quick brown fox jumps over the lazy dog and the other dogs were not amused by the fox
it 's a portrait of a woman wearing a green dress , soft light , studio lighting , bokeh , 35mm , f / 1.8
they 're in the mountains with snow and trees and a lake , wide angle landscape , hdr , ultra realistic
blurry , low quality , worst quality , bad anatomy , watermark , text , cropped , out of frame , jpeg artifacts
a cat sitting on a chair and a cat on the table and a dog under the table , cute , cartoon , illustration
the night sky over the city with neon lights , cyberpunk , rain , reflections on the street , cinematic
a castle on a hill , fantasy art , dragon flying in the distance , dramatic clouds , volumetric lighting
don 't show hands , i 'll take the one that we 've seen and i 'm sure you 'd like it
café crème déjà vu naïve façade jalapeño übergröße straße añejo piñata
кошка сидит на стуле и собака на столе кошка кошка
猫 が いる 猫 の 写真 東京 の 夜 東京 猫
"""


def byte_symbols():
    """byte -> printable character; the published table: printable latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable}
    table.update({b: chr(256 + i) for i, b in enumerate(others)})
    return table, printable + others


def learn_merges(count):
    table, _ = byte_symbols()
    words = Counter()
    for word in TEXT.split():
        symbols = [table[b] for b in word.lower().encode()]
        symbols[-1] += END_OF_WORD
        words[tuple(symbols)] += 1
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        merged = Counter()
        for word, n in words.items():
            out, i = [], 0
            while i < len(word):
                if word[i : i + 2] == best:
                    out.append(word[i] + word[i + 1])
                    i += 2
                else:
                    out.append(word[i])
                    i += 1
            merged[tuple(out)] += n
        words = merged
    return merges


def vocabulary(merges):
    table, order = byte_symbols()
    tokens = [table[b] for b in order]
    tokens += [t + END_OF_WORD for t in tokens]
    tokens += ["".join(m) for m in merges]
    tokens += [BOS, EOS]
    assert len(set(tokens)) == len(tokens)
    return {t: i for i, t in enumerate(tokens)}


def write(folder: pathlib.Path, *, merges: int, form: str, pad: str, max_length: int, added_tokens: str):
    """Writes a tokenizer/ folder and returns (vocabulary size, id of EOS, the pad token's id).

    form: "files" (vocab.json, merges.txt), "json" (tokenizer.json alone, merges as pairs) or
          "json-old" (tokenizer.json with merges as strings, as older versions wrote them).
    added_tokens: "dict" or "string": how tokenizer_config.json names the special tokens.
    """
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    merge_list = learn_merges(merges)
    vocab = vocabulary(merge_list)
    if form == "files":
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merge_list)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        fast = CLIPTokenizer(vocab=vocab, merges=[tuple(m) for m in merge_list], pad_token=pad)
        tree = json.loads(fast.backend_tokenizer.to_str())
        if form == "json-old":
            tree["model"]["merges"] = [" ".join(m) for m in tree["model"]["merges"]]
        (folder / "tokenizer.json").write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")

    def special(text):
        if added_tokens == "string":
            return text
        return {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    names = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
    config = {"add_prefix_space": False, **{k: special(v) for k, v in names.items()}, "do_lower_case": True}
    if added_tokens == "dict":
        for k in names:
            config[k] = {"__type": "AddedToken", **config[k]}
    config |= {"errors": "replace", "model_max_length": max_length, "pad_token": pad, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    specials = {k: special(v) for k, v in names.items()} | {"pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=2) + "\n")
    return len(vocab), vocab[EOS], vocab[pad]


# Texts a tokenizer gets wrong: each line is here for what it contains.
PROMPTS = [
    "",
    " ",
    "a photo of a cat",
    "A PHOTO of a CAT",
    "  a \t photo \n\n of   a\u00a0cat\u3000!  ",
    "a cat,a dog;a fox...(the castle) [red] {blue} <moon> 100% #1 @home & co. *bold* _under_ ~ ^ | \\ / + = ' \" `",
    "it's they're we've i'm you'd i'll don't can't 'til rock'n'roll o'clock IT'S I'M",
    "4k 8K 1950s 3.14159 1,000,000 2x4 mp3 f/1.8 35mm",
    "café crème DÉJÀ VU naïve Über straße ŒUVRE İstanbul",
    "cafe\u0301 e\u0301 A\u030a (decomposed)",
    "кошка и СОБАКА, Привет!",
    "猫の写真、東京の夜。 猫 한국어 العربية עברית हिन्दी ไทย",
    "emoji 😀🐱‍👤👩‍👩‍👧‍👦🇫🇷 ❤️ ☕",
    "a\u200bzero width\ufeff soft\u00adhyphen \u202eright to left",
    "½ ² ³ ① Ⅷ ٣ ७ ﬁ ﬂ",
    "control \u0001\u0002 \u007f \u0085 \u2028 line",
    "<|startoftext|> a cat <|endoftext|> a dog",
    "<|endoftext|>",
    "!!!!! ????? ,,,,, ..... -----",
    "! ! !",
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
    "a very long prompt, " * 40 + "the end",
    "word " * 75,
    "word " * 74 + "word",
    "x" * 300,
    "the quick brown fox jumps over the lazy dog",
    "\n\n\n",
    "tab\tseparated\tvalues\r\nwindows line",
    "snake_case camelCase kebab-case dot.case",
    "http://example.com/a?b=c&d=e#f user@example.com",
    "(masterpiece:1.2), [[low quality]], ((best)), a:b::c",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒎𝒂𝒕𝒉 ｆｕｌｌｗｉｄｔｈ ＡＢＣ",
    "Ǆ ǅ ǆ ẞ ß ﬀ Σίσυφος ΣΑΣ",
]
