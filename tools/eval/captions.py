"""Caption files, and CIDEr, METEOR and ROUGE-L of captions made from pictures.

A candidate is what a captioning model says of a picture; the references are the prompt, or the people's captions of it.
CIDEr(-D) and ROUGE-L are pycocoevalcap's, pure Python. METEOR is nltk's; METEOR 1.5 and the PTB tokenizer of the COCO
server are pycocoevalcap's Java programs, used where asked for.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np

from common import EvalError

TOKENIZERS = ("plain", "ptb", "whitespace")
METEORS = ("nltk", "nltk-stems", "java")


def _json(path, text, what):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise EvalError(f"{what}: not JSON ({error.msg}, column {error.colno}); mend {path}") from error


def _read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise EvalError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise EvalError(f"{path} is not UTF-8 (byte {error.start}); convert it") from error


def _texts(path, where, value):
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise EvalError(f"{path}, {where}: the caption is {json.dumps(value)[:80]}, expected text or a list of texts")
    return values


def _read_lines(path, fields):
    """{id: [texts]} of a JSON-lines file; an id may come once. The text is the first of `fields` that is there."""
    found = {}
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number}"
        entry = _json(path, line, f"{path}, {where}")
        if not isinstance(entry, dict) or "id" not in entry:
            raise EvalError(f'{path}, {where}: no "id"; a line is {{"id": ..., "{fields[0]}": ...}}')
        text = next((entry[f] for f in fields if f in entry), None)
        if text is None:
            raise EvalError(f"{path}, {where}: none of {', '.join(fields)}; a line names its caption")
        key = str(entry["id"])
        if key in found:
            raise EvalError(f"{path}, {where}: id {key!r} a second time; ids are unique")
        found[key] = _texts(path, where, text)
    if not found:
        raise EvalError(f"{path} holds no captions")
    return found


def read_references(path):
    """{id: [captions]} of a manifest (JSON lines: id, prompt or captions) or of {"captions": {id: [captions]}}.

    The second is the form of the published 10 000 COCO captions (evaluation/MS-COCO_10K.json of MegaFusion).
    """
    path = Path(path)
    if path.suffix != ".json":
        return _read_lines(path, ("captions", "caption", "prompt"))
    whole = _json(path, _read_text(path), str(path))
    table = whole.get("captions") if isinstance(whole, dict) else None
    if not isinstance(table, dict) or not table:
        raise EvalError(f'{path} has no table "captions" of id to texts; a manifest ends in .jsonl')
    return {str(key): _texts(path, f"captions of {key}", value) for key, value in table.items()}


def read_candidates(path):
    """{id: caption} of a JSON-lines file (id, caption) or of a folder of ID.txt or MS_ID.txt, the published code's."""
    path = Path(path)
    if not path.is_dir():
        return {key: texts[0] for key, texts in _read_lines(path, ("caption", "captions")).items()}
    found = {}
    for file in sorted(path.glob("*.txt")):
        key = file.stem.removeprefix("MS_")
        if key in found:
            raise EvalError(f"{path} holds {key}.txt and MS_{key}.txt: two captions of one picture; remove one")
        found[key] = _texts(file, "the file", _read_text(file).strip())[0]
    if not found:
        raise EvalError(f"{path} holds no .txt files; one caption a picture, ID.txt")
    return found


def pair(references, candidates):
    """The ids of both, in the references' order; EvalError naming the first candidate without a reference."""
    for key in candidates:
        if key not in references:
            raise EvalError(f"candidate {key!r} has no reference caption; add it or remove the candidate")
    return [key for key in references if key in candidates]


def _need_java(what):
    if shutil.which("java") is None:
        raise EvalError(
            f"{what} needs Java, and there is no java on the PATH; install one (Debian: default-jre-headless)"
        )


def _plain(text):
    """Lower case; words with inner apostrophes and hyphens; clitics apart as in the Penn Treebank; no punctuation."""
    words = re.findall(r"[^\W_]+(?:['\u2019.-][^\W_]+)*", text.lower())
    parts = []
    for word in words:
        match = re.fullmatch(r"(.+?)(n't|['\u2019](?:s|re|ve|ll|d|m))", word)
        parts += match.groups() if match else [word]
    return " ".join(parts)


def tokenize(groups, tokenizer):
    """{id: [texts]} -> {id: [words with one space between]}."""
    if tokenizer == "ptb":
        _need_java("--tokenizer ptb")
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        flat = {key: [{"caption": " ".join(text.split())} for text in texts] for key, texts in groups.items()}
        with open(os.devnull, "w") as null, _stderr_to(null):
            return PTBTokenizer().tokenize(flat)
    do = {"plain": _plain, "whitespace": lambda text: " ".join(text.split())}[tokenizer]
    return {key: [do(text) for text in texts] for key, texts in groups.items()}


@contextlib.contextmanager
def _stderr_to(file):
    """File descriptor 2 goes to `file`: the Java tokenizer reports its speed there."""
    saved = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def cider(references, candidates):
    """(mean, per picture) of CIDEr-D, Vedantam et al. 2015, arXiv:1411.5726; 10 is the most. Tokenized input.

    Word weights come from these references: the figure is of this set of pictures, and 0 for a single one.
    """
    from pycocoevalcap.cider.cider import Cider

    mean, each = Cider().compute_score(references, {k: [v] for k, v in candidates.items()})
    return float(mean), np.asarray(each)


def rouge_l(references, candidates):
    """(mean, per picture) of ROUGE-L, Lin 2004, beta 1.2, as the COCO server. Tokenized input."""
    from pycocoevalcap.rouge.rouge import Rouge

    mean, each = Rouge().compute_score(references, {k: [v] for k, v in candidates.items()})
    return float(mean), np.asarray(each)


class _NoWordnet:
    """Stands for WordNet where synonyms are left out."""

    def synsets(self, _word):
        return []


def open_wordnet(path):
    """nltk's WordNet reader over a folder: nltk_data, its corpora, or wordnet itself; a .zip beside is found too."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    where = "WordNet 3.0 as nltk publishes it (package wordnet of nltk_data: corpora/wordnet.zip)"
    if path is None:
        raise EvalError(f"METEOR of nltk needs --wordnet FOLDER: {where}; or --meteor nltk-stems, without synonyms")
    path = Path(path)
    for folder in (path, path / "wordnet", path / "corpora" / "wordnet"):
        if (folder / "data.noun").is_file():
            return WordNetCorpusReader(nltk.data.FileSystemPathPointer(str(folder.resolve())), None)
    for archive in (path, path / "wordnet.zip", path / "corpora" / "wordnet.zip"):
        if archive.is_file() and archive.suffix == ".zip":
            return WordNetCorpusReader(nltk.data.ZipFilePathPointer(str(archive.resolve()), "wordnet/"), None)
    raise EvalError(f"--wordnet {path} holds no data.noun and no wordnet.zip; get {where}")


def meteor(references, candidates, how="nltk-stems", wordnet=None):
    """(mean, per picture) of METEOR, Banerjee and Lavie 2005. Tokenized input.

    nltk, nltk-stems: the 2005 formula (alpha 0.9, beta 3, gamma 0.5), exact and stemmed matches; nltk synonyms too.
    java: METEOR 1.5 (Denkowski and Lavie 2014), the COCO server's: other weights, paraphrases; its mean is that of the
    whole corpus.
    """
    if how == "java":
        _need_java("--meteor java")
        from pycocoevalcap.meteor.meteor import Meteor

        scorer = Meteor()
        mean, each = scorer.compute_score(references, {k: [v] for k, v in candidates.items()})
        return float(mean), np.asarray(each)
    from nltk.translate.meteor_score import meteor_score

    net = _NoWordnet() if how == "nltk-stems" else open_wordnet(wordnet)
    each = np.array(
        [meteor_score([r.split() for r in references[k]], candidates[k].split(), wordnet=net) for k in references]
    )
    return float(each.mean()), each


def published_code(references, candidates, wordnet=None):
    """What evaluation/evluation.py of the published MegaFusion code calls by the metrics' names, on raw text.

    First reference only, words between spaces. Its CIDEr is the share of the candidate's 1- to 4-grams found in the
    reference, without weights; its ROUGE is BLEU-4 over characters; its METEOR is nltk's. Means over pictures.
    """
    from collections import Counter

    from nltk.translate.bleu_score import sentence_bleu

    def grams(text):
        words = text.split()
        return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))

    shares, characters = [], []
    for key, candidate in candidates.items():
        mine, theirs = grams(candidate), grams(references[key][0])
        shares.append((mine & theirs).total() / mine.total())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nltk warns of every missing 4-gram
            characters.append(sentence_bleu([references[key][0]], candidate))
    out = {"cider": float(np.mean(shares)), "rouge": float(np.mean(characters))}
    if wordnet is not None:
        first = {k: [" ".join(v[0].split())] for k, v in references.items() if k in candidates}
        same = {k: " ".join(candidates[k].split()) for k in first}
        out["meteor"] = meteor(first, same, "nltk", wordnet)[0]
    return out
