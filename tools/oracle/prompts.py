"""Writes tests/data/prompts/: ids, weights and embeddings of prompts as AUTOMATIC1111's webui and diffusers make them,
over transformers' CLIPTextModel and the small models of tests/data/sd15 and tests/data/sd21.

    python tools/oracle/prompts.py          (needs torch, transformers, safetensors; see requirements.txt)
"""

import json
import pathlib
import re
import shutil

import torch
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

import drawn

DATA = pathlib.Path(__file__).resolve().parents[2] / "tests/data"
OUT = DATA / "prompts"
ROOM, BACKTRACK = 75, 20
BREAK = object()

LONG = "a red cat, a blue dog and the green house on a hill in the snow with many small birds, "
WORDS = {"toy": 2, "toy cat": 3, "<one>": 1}  # vectors per learned word

# model, syntax, long prompts, learned words?, prompt
CASES = [
    ("sd15", "plain", "truncate", False, "a (red:1.4) cat [dog] BREAK <lora:x:1>"),
    ("sd15", "plain", "truncate", False, LONG * 6),
    ("sd15", "plain", "chunk", False, LONG * 6),
    ("sd15", "plain", "chunk", False, ""),
    ("sd15", "a1111", "chunk", False, "a (red) cat, ((blue)) dog, [green] [[hill]]"),
    ("sd15", "a1111", "chunk", False, "a (red:1.4) (blue:.5) (cat:-1) (dog: 2 ) (bird:0)"),
    ("sd15", "a1111", "chunk", False, "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))). "),
    ("sd15", "a1111", "chunk", False, r"\(literal\] \\ b\ad \[ (\(in\):1.5)"),
    ("sd15", "a1111", "chunk", False, "(open (twice [and once"),
    ("sd15", "a1111", "chunk", False, "closed) only] :1.2) a:b (x:y) ()"),
    ("sd15", "a1111", "chunk", False, "red cat BREAK blue (dog:1.2)BREAK  BREAKFAST a_BREAK"),
    ("sd15", "a1111", "chunk", False, "BREAK"),
    ("sd15", "a1111", "chunk", False, ""),
    ("sd15", "a1111", "chunk", False, LONG * 3 + "(" + LONG * 3 + ":1.3) end"),
    ("sd15", "a1111", "chunk", False, "cat " * 75),
    ("sd15", "a1111", "chunk", False, "cat " * 76),
    ("sd15", "a1111", "chunk", False, "cat " * 74 + ", dog"),
    ("sd15", "a1111", "chunk", False, "cat " * 55 + ", " + "dog " * 30),
    ("sd15", "a1111", "chunk", False, "cat " * 53 + ", " + "dog " * 30),
    ("sd15", "a1111", "chunk", False, "<lora:x:0.8>a red <hypernet:some thing>cat <notatag> <:x> <y:>"),
    ("sd15", "a1111", "chunk", False, "[red|blue] cat [dog:bird:0.5] AND (hill:1.1)"),
    ("sd15", "a1111", "truncate", False, LONG * 4 + "(" + LONG * 2 + ":0.7)"),
    ("sd15", "a1111", "chunk", True, "a (Toy:1.3) toy cat, <one> toys TOY CAT toy"),
    ("sd15", "a1111", "chunk", True, "cat " * 74 + "toy, dog"),
    ("sd15", "plain", "truncate", True, "a toy and <one>, toys"),
    ("sd15", "plain", "truncate", True, "cat " * 74 + "Toy dog"),
    ("sd21", "a1111", "chunk", False, "a (red:1.4) cat"),
    ("sd21", "a1111", "chunk", False, "a cat <|endoftext|> (b:1.5)"),
    ("sd21", "a1111", "chunk", False, LONG * 3 + "(the end:1.21)"),
    ("sd21", "a1111", "chunk", True, "(<one>:0.8) toy"),
]
# Their embeddings one layer earlier, through the final norm, are kept too.
SKIPPED = {4, 13, 26}


def attention(text):
    """[text or BREAK, weight] in order."""
    text = re.sub(r"<\w+:[^>]+>", "", text)
    out, stacks = [], {"(": [], "[": []}

    def close(kind, factor):
        for item in out[stacks[kind].pop() :]:
            item[1] = item[1] * factor if item[0] is not BREAK else None

    lexer = re.compile(r"\\(?P<escaped>[()\[\]\\]?)|(?P<open>[(\[])|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|(?P<close>[)\]])|(?P<text>[^\\()\[\]:]+|:)")
    for m in lexer.finditer(text):
        if m["escaped"] is not None:
            out.append([m["escaped"], 1.0])
        elif m["open"]:
            stacks[m["open"]].append(len(out))
        elif m["weight"] and stacks["("]:
            close("(", float(m["weight"]))
        elif m["close"] == ")" and stacks["("]:
            close("(", 1.1)
        elif m["close"] == "]" and stacks["["]:
            close("[", 1 / 1.1)
        else:
            for i, piece in enumerate(re.split(r"\s*\bBREAK\b\s*", m[0])):
                out += ([[BREAK, None]] if i else []) + [[piece, 1.0]]
    while stacks["("]:
        close("(", 1.1)
    while stacks["["]:
        close("[", 1 / 1.1)
    merged = []
    for piece, weight in out or [["", 1.0]]:
        if merged and piece is not BREAK and merged[-1][1] == weight:
            merged[-1][0] += piece
        else:
            merged.append([piece, weight])
    return merged


class Model:
    def __init__(self, name):
        self.tokenizer = CLIPTokenizer.from_pretrained(DATA / name / "tokenizer")
        self.encoder = CLIPTextModel.from_pretrained(drawn.folder(DATA / name / "text_encoder"), torch_dtype=torch.float32).eval()
        t = self.tokenizer
        self.start, self.end, self.pad = t.bos_token_id, t.eos_token_id, t.pad_token_id
        self.comma = t.get_vocab().get(",</w>")
        self.vocab = self.encoder.config.vocab_size
        table = self.encoder.get_input_embeddings()
        g = torch.Generator().manual_seed(11)
        extra = torch.randn(sum(WORDS.values()), table.weight.shape[1], generator=g).half().float()
        self.first = {}
        for word, count in WORDS.items():
            self.first[word] = sum(WORDS[w] for w in self.first)
        self.vectors = {w: extra[self.first[w] : self.first[w] + n] for w, n in WORDS.items()}
        bigger = torch.nn.Embedding(self.vocab + len(extra), table.weight.shape[1])
        bigger.weight.data = torch.cat([table.weight.data, extra])
        self.encoder.set_input_embeddings(bigger)

    def plain(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def run_of(self, word):
        return list(range(self.vocab + self.first[word], self.vocab + self.first[word] + WORDS[word]))

    def webui_units(self, text, learned):
        """Runs of ids that stay together: a token, or a learned word's rows where its own tokens stand."""
        ids, known = self.plain(text), []
        if learned:
            known = sorted(((self.plain(w), w) for w in WORDS), key=lambda pair: -len(pair[0]))
        i = 0
        while i < len(ids):
            hit = next((pair for pair in known if ids[i : i + len(pair[0])] == pair[0]), None)
            yield self.run_of(hit[1]) if hit else [ids[i]]
            i += len(hit[0]) if hit else 1

    def diffusers_units(self, text, learned):
        if not learned:
            yield from ([i] for i in self.plain(text))
            return
        tokenizer = CLIPTokenizer.from_pretrained(self.tokenizer.name_or_path)
        from transformers import AddedToken

        tokenizer.add_tokens([AddedToken(w, single_word=w.isalpha(), normalized=True) for w in WORDS])
        ids = {tokenizer.convert_tokens_to_ids(w): w for w in WORDS}
        for i in tokenizer(text, add_special_tokens=False).input_ids:
            yield self.run_of(ids[i]) if i in ids else [i]

    def chunks(self, text, syntax, long, learned):
        parts = attention(text) if syntax == "a1111" else [[text, 1.0]]
        units = self.webui_units if syntax == "a1111" else self.diffusers_units
        done, row, comma = [], [], None
        for piece, weight in parts:
            if piece is BREAK:
                if long == "chunk":
                    done.append(row)
                    row, comma = [], None
                continue
            for run in units(piece, learned):
                run = [(i, weight) for i in run]
                if long == "truncate":
                    row += run
                    continue
                if run[0][0] == self.comma:
                    comma = len(row)
                elif len(row) == ROOM and comma is not None and len(row) - comma <= BACKTRACK:
                    done.append(row[: comma + 1])
                    row, comma = row[comma + 1 :], None
                if len(row) + len(run) > ROOM:
                    done.append(row)
                    row, comma = [], None
                row = row + run
        if row or not done:
            done.append(row)
        ids, weights = [], []
        for row in done:
            row = row[:ROOM]
            line = [self.start, *(i for i, _ in row), self.end]
            line += [self.end if syntax == "a1111" else self.pad] * (ROOM + 2 - len(line))
            if syntax == "a1111":
                at = line.index(self.end)
                line[at + 1 :] = [self.pad] * (ROOM + 1 - at)
            ids.append(line)
            weights.append([1.0, *(w for _, w in row)] + [1.0] * (ROOM + 1 - len(row)))
        return ids, weights

    @torch.no_grad()
    def embed(self, ids, weights, skip):
        """[chunks * 77, C]"""
        rows = []
        text_model = getattr(self.encoder, "text_model", self.encoder)
        for line, weight in zip(ids, weights):
            out = self.encoder(input_ids=torch.tensor([line]), output_hidden_states=True)
            z = out.last_hidden_state if skip == 1 else text_model.final_layer_norm(out.hidden_states[-skip])
            before = z.mean()
            z = z * torch.tensor([weight])[..., None]
            rows.append((z * (before / z.mean()))[0])
        return torch.cat(rows)


def main():
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    models = {name: Model(name) for name in ("sd15", "sd21")}
    cases, tensors = [], {}
    for i, (name, syntax, long, learned, text) in enumerate(CASES):
        model = models[name]
        ids, weights = model.chunks(text, syntax, long, learned)
        weights = [torch.tensor(w).tolist() for w in weights]
        cases.append({"model": name, "syntax": syntax, "long": long, "learned": learned, "text": text, "ids": ids, "weights": weights})
        tensors[f"{i}"] = model.embed(ids, weights, 1)
        if i in SKIPPED:
            tensors[f"{i}.skip2"] = model.embed(ids, weights, 2)
    (OUT / "cases.json").write_text(json.dumps(cases, separators=(",", ":")))
    save_file({k: v.contiguous() for k, v in tensors.items()}, OUT / "embeddings.safetensors")
    for name, model in models.items():
        (OUT / name).mkdir()
        for word, vectors in model.vectors.items():
            if word.startswith("<"):  # as diffusers writes them
                save_file({word: vectors[0].contiguous()}, OUT / name / "learned_embeds.safetensors")
            else:
                save_file({"emb_params": vectors.half().contiguous()}, OUT / name / f"{word}.safetensors")


if __name__ == "__main__":
    main()
