"""CIDEr, METEOR and ROUGE-L against their formulas written out; caption files; what the published code computes."""

import json
import math
import shutil
import unittest
from collections import Counter

import numpy as np
from helpers import TempCase, run_score

import captions

REFERENCES = {
    "a": ["a red ball on a grey ground", "one ball that is red"],
    "b": ["two large blue cubes at the top", "two cubes"],
    "c": ["a small white cone in the centre of a sand ground"],
}
CANDIDATES = {
    "a": "a red ball on a black ground",
    "b": "three large blue cubes",
    "c": "a small white cone in the centre",
}


def cider_d(references, candidates):
    """CIDEr-D of every picture, Vedantam et al. 2015, section 7, in plain f64 loops."""

    def grams(text, n):
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    def idf(gram, n):
        seen = sum(any(gram in grams(r, n) for r in refs) for refs in references.values())
        return math.log(len(references)) - math.log(max(1, seen))

    scores = []
    for key, refs in references.items():
        total = 0.0
        for n in (1, 2, 3, 4):
            c = {g: k * idf(g, n) for g, k in grams(candidates[key], n).items()}
            for ref in refs:
                r = {g: k * idf(g, n) for g, k in grams(ref, n).items()}
                norms = math.sqrt(sum(v * v for v in c.values())) * math.sqrt(sum(v * v for v in r.values()))
                dot = sum(min(v, r.get(g, 0.0)) * r.get(g, 0.0) for g, v in c.items())
                # the library counts a caption's length in its pairs of words
                length = len(candidates[key].split()) - len(ref.split())
                total += math.exp(-(length**2) / (2 * 6.0**2)) * (dot / norms if norms else 0.0) / len(refs)
        scores.append(10.0 * total / 4)
    return scores


def meteor_2005(matches, chunks, words, reference_words):
    p, r = matches / words, matches / reference_words
    return 10 * p * r / (r + 9 * p) * (1 - 0.5 * (chunks / matches) ** 3)


class Metrics(TempCase):
    def test_cider_as_its_formula(self):
        mean, each = captions.cider(REFERENCES, CANDIDATES)
        want = cider_d(REFERENCES, CANDIDATES)
        np.testing.assert_allclose(each, want, rtol=1e-12)
        self.assertAlmostEqual(mean, np.mean(want), delta=1e-12)

    def test_cider_of_the_references_themselves_is_ten(self):
        references = {"a": ["red balls roll far away"], "b": ["blue cubes stand very still"]}
        self.assertAlmostEqual(
            captions.cider(references, {k: v[0] for k, v in references.items()})[0], 10.0, delta=1e-9
        )

    def test_rouge_l_by_hand(self):
        # longest common subsequence "a red ball on a ground": 6 of 7 words both ways; "ball" alone in the second
        mean, each = captions.rouge_l({"a": REFERENCES["a"]}, {"a": CANDIDATES["a"]})
        self.assertAlmostEqual(each[0], 6 / 7, delta=1e-12)
        each = captions.rouge_l({"b": REFERENCES["b"][:1]}, {"b": CANDIDATES["b"]})[1]
        p, r = 3 / 4, 3 / 7
        self.assertAlmostEqual(each[0], (1 + 1.44) * p * r / (r + 1.44 * p), delta=1e-12)

    def test_meteor_by_hand(self):
        got = captions.meteor({"a": REFERENCES["a"][:1]}, {"a": CANDIDATES["a"]})[0]
        self.assertAlmostEqual(got, meteor_2005(6, 2, 7, 7), delta=1e-12)
        got = captions.meteor({"b": ["two balls rolling"]}, {"b": "two ball rolls"})[0]  # stems
        self.assertAlmostEqual(got, meteor_2005(3, 1, 3, 3), delta=1e-12)
        self.assertEqual(captions.meteor({"a": ["red ball"]}, {"a": "blue cube"})[0], 0.0)

    def test_meteor_takes_the_best_reference(self):
        got = captions.meteor({"a": ["nothing alike", "one ball"]}, {"a": "one ball"})[0]
        self.assertAlmostEqual(got, meteor_2005(2, 1, 2, 2), delta=1e-12)

    def test_published_code(self):
        """As evaluation/evluation.py: pooled share of n-grams, BLEU-4 over characters."""
        from nltk.translate.bleu_score import sentence_bleu

        got = captions.published_code({"a": ["a b c d e"]}, {"a": "a b c x"})
        self.assertAlmostEqual(got["cider"], (3 + 2 + 1 + 0) / 10, delta=1e-12)
        self.assertAlmostEqual(got["rouge"], sentence_bleu(["a b c d e"], "a b c x"), delta=1e-12)
        self.assertNotIn("meteor", got)
        got = captions.published_code({"a": ["on and on"]}, {"a": "on on on"})
        self.assertAlmostEqual(got["cider"], 2 / 6, delta=1e-12)  # a word twice there counts twice

    @unittest.skipIf(shutil.which("java") is None, "no java")
    def test_java_programs(self):
        tokens = captions.tokenize({"x": ["A Red ball, isn't it?", "second"], "y": ["third one."]}, "ptb")
        self.assertEqual(tokens, {"x": ["a red ball is n't it", "second"], "y": ["third one"]})
        self.assertAlmostEqual(captions.meteor({"a": ["a red ball"]}, {"a": "a red ball"}, "java")[0], 1.0, delta=1e-9)


class Tokens(TempCase):
    def test_plain(self):
        texts = ["A Red ball, isn't it?  (It's.)", "well-known, 3.5 cm; don't!", "caf\u00e9 \u2014 'quoted'"]
        want = ["a red ball is n't it it 's", "well-known 3.5 cm do n't", "caf\u00e9 quoted"]
        self.assertEqual(captions.tokenize({"x": texts}, "plain")["x"], want)


class Files(TempCase):
    def write(self, name, text):
        path = self.dir / name
        path.write_text(text)
        return path

    def test_both_forms_of_references(self):
        lines = self.write(
            "p.jsonl", '{"id": "7", "prompt": "a ball", "seed": 1}\n\n{"id": 8, "captions": ["x", "y"]}\n'
        )
        self.assertEqual(captions.read_references(lines), {"7": ["a ball"], "8": ["x", "y"]})
        table = self.write("coco.json", json.dumps({"captions": {"385150": ["one", "two"]}}))
        self.assertEqual(captions.read_references(table), {"385150": ["one", "two"]})

    def test_candidates_of_a_folder(self):
        self.write("MS_1.txt", "a ball\n")
        self.write("2.txt", "a cube")
        self.assertEqual(captions.read_candidates(self.dir), {"1": "a ball", "2": "a cube"})
        self.write("1.txt", "a cone")
        with self.refused("1.txt and MS_1.txt"):
            captions.read_candidates(self.dir)

    def test_errors_name_file_and_line(self):
        for text, parts in (
            ('{"id": 1, "prompt": "x"}\n{', ["line 2", "not JSON"]),
            ('{"prompt": "x"}', ["line 1", 'no "id"']),
            ('{"id": 1}', ["line 1", "prompt"]),
            ('{"id": 1, "prompt": "x"}\n{"id": "1", "prompt": "y"}', ["line 2", "'1' a second time"]),
            ('{"id": 1, "prompt": ""}', ["line 1", '""']),
            ("\n", ["holds no captions"]),
        ):
            with self.refused("bad.jsonl", *parts):
                captions.read_references(self.write("bad.jsonl", text))
        with self.refused("cannot read", "none.jsonl"):
            captions.read_references(self.dir / "none.jsonl")
        with self.refused('no table "captions"'):
            captions.read_references(self.write("x.json", "[]"))
        with self.refused("no .txt"):
            captions.read_candidates(self.write("x.txt", "x").rename(self.dir / "y.md").parent)
        with self.refused("'z' has no reference"):
            captions.pair({"a": ["x"]}, {"z": "x"})

    def test_wordnet_and_its_absence(self):
        with self.refused("--wordnet FOLDER", "wordnet.zip", "nltk-stems"):
            captions.meteor({"a": ["x"]}, {"a": "x"}, "nltk")
        with self.refused(f"--wordnet {self.dir}", "data.noun"):
            captions.open_wordnet(self.dir)

    def test_command(self):
        references = self.write("r.json", json.dumps({"captions": REFERENCES | {"d": ["unused"]}}))
        lines = [json.dumps({"id": k, "caption": v.upper() + "."}) for k, v in CANDIDATES.items()]
        said = self.write("c.jsonl", "\n".join(lines))
        with self.refused("1 of the 4 captions have no candidate caption", "'d'", "--allow-missing"):
            run_score("--captions", references, "--candidates", said)
        found = run_score("--captions", references, "--candidates", said, "--published-code", "--allow-missing")
        self.assertAlmostEqual(found["metrics"]["cider"], np.mean(cider_d(REFERENCES, CANDIDATES)), delta=1e-12)
        self.assertAlmostEqual(found["metrics"]["rouge_l"], captions.rouge_l(REFERENCES, CANDIDATES)[0], delta=1e-12)
        self.assertAlmostEqual(found["metrics"]["meteor"], captions.meteor(REFERENCES, CANDIDATES)[0], delta=1e-12)
        self.assertEqual(found["counts"], {"candidates": 3})
        self.assertIn("1 of 4 captions", found["notes"][0])
        self.write("c.jsonl", '{"id": "a", "caption": "..."}')
        with self.refused("'a'", "no words"):
            run_score("--captions", references, "--candidates", said, "--allow-missing")


if __name__ == "__main__":
    unittest.main()
