"""The command tools/eval/score: published metrics of folders of pictures and caption files."""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may go to the network
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import captions
import pictures
from common import INCEPTION_FILE, EvalError, fail_clearly, write_whole

EXAMPLES = """
inputs decide what is measured:
  --generated, --inception            IS
  ... and --real                      FID_r, KID_r: against real pictures (a folder, or an .npz of --save-features)
  ... and --base                      FID_b, KID_b: against pictures made at the model's own size
  ... and --crop-size                 the same on crops: FID_crop, KID_crop
  --generated, --clip, --captions     CLIP-T
  --captions, --candidates            CIDEr, METEOR, ROUGE-L

examples:
  tools/eval/score --generated out/1024 --real coco/val --base out/512 --captions prompts.jsonl \\
      --inception pt_inception-2015-12-05-6726825d.pth --clip clip-vit-base-patch32 --json scores.json
  tools/eval/score --captions MS-COCO_10K.json --candidates captions/ --tokenizer ptb --meteor java

docs/evaluation.md has the definitions. The first run installs the environment (tools/eval/setup); later ones need no
network, ever.
"""


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="tools/eval/score",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--generated", metavar="DIR", help="pictures to judge, one a caption, named by their ids")
    add("--real", metavar="DIR|NPZ", help="real pictures")
    add("--base", metavar="DIR|NPZ", help="pictures of the same model at its own size")
    add("--captions", metavar="FILE", help='prompts or references: a manifest .jsonl, or .json with a table "captions"')
    add(
        "--candidates",
        metavar="DIR|FILE",
        help="captions made from the pictures: ID.txt files, or .jsonl of id, caption",
    )
    add("--inception", metavar="FILE", help="InceptionV3 weights, pt_inception-2015-12-05-6726825d.pth")
    add("--clip", metavar="DIR", help="CLIP model directory, such as clip-vit-base-patch32")
    add("--wordnet", metavar="DIR", help="WordNet for METEOR of nltk (nltk_data, or wordnet.zip)")
    group = parser.add_argument_group("definitions")
    add = group.add_argument
    add("--resize", default="published", choices=("published", "torch", "clean", "tensorflow"),
        help="before InceptionV3 (default: published, torch for FID and IS, clean for KID, as that code)")  # fmt: skip
    add("--layer", default="2048", choices=("64", "192", "768", "2048"), help="features of InceptionV3 (default: 2048)")
    add("--crop-size", type=int, metavar="N", help="side of square crops in pixels; adds the crop forms")
    add("--crops", type=int, default=10, metavar="N", help="crops a picture (default: 10)")
    add("--kid-subsets", type=int, default=100, metavar="N", help="random subsets of KID (default: 100)")
    add("--kid-subset-size", type=int, default=1000, metavar="N", help="pictures in each (default: 1000)")
    add("--is-splits", type=int, default=10, metavar="N", help="splits of IS (default: 10)")
    add("--tokenizer", default="plain", choices=("plain", "ptb", "whitespace"),
        help="of captions: plain (no Java), ptb (the COCO server's, Java), whitespace (default: plain)")  # fmt: skip
    add("--meteor", default="nltk-stems", choices=("nltk", "nltk-stems", "java"),
        help="nltk: with WordNet's synonyms; nltk-stems: without; java: METEOR 1.5 (default: nltk-stems)")  # fmt: skip
    add("--references", default="all", choices=("all", "first"), help="reference captions used (default: all)")
    add("--published-code", action="store_true", help="also what the published code calls CIDEr, METEOR and ROUGE")
    add("--any-size", action="store_true", help="pictures of --generated or --base may differ in size")
    add("--allow-missing", action="store_true", help="judge what is there of --captions' pictures or candidates")
    add("--allow-few", action="store_true", help="FID with fewer pictures than features (a singular covariance)")
    group = parser.add_argument_group("machine and output")
    add = group.add_argument
    add("--device", default="cpu", help="torch device of the networks (default: cpu)")
    add("--batch", type=int, default=16, metavar="N", help="pictures at once (default: 16)")
    add("--threads", type=int, metavar="N", help="torch threads (default: torch's)")
    add("--seed", type=int, default=0, metavar="N", help="of crops (default: 0)")
    add("--cache", metavar="DIR", help="keep features there and use them again while nothing has changed")
    add("--save-features", metavar="NPZ", help="also write the features of --generated (with --resize of one kind)")
    add("--json", metavar="FILE", help="write the results as JSON; - for standard output in place of the text")
    add("--quiet", action="store_true", help="no progress on standard error")
    args = parser.parse_args(arguments)
    for name in ("crop_size", "crops", "kid_subsets", "is_splits", "batch", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise EvalError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if args.kid_subset_size < 2:
        raise EvalError(f"--kid-subset-size {args.kid_subset_size} must be at least 2")
    check_inputs(args)
    return args


def check_inputs(args):
    """EvalError for a combination that measures nothing or less than it names."""
    if not args.generated and not args.candidates:
        raise EvalError("nothing to judge: give --generated, --candidates or both (--help has examples)")
    for name in ("real", "base", "clip", "inception", "save_features", "crop_size"):
        if getattr(args, name) and not args.generated:
            raise EvalError(f"--{name.replace('_', '-')} needs --generated, the pictures to judge")
    for name in ("real", "base", "crop_size", "save_features"):
        if getattr(args, name) and not args.inception:
            raise EvalError(f"--{name.replace('_', '-')} needs --inception FILE: {INCEPTION_FILE}")
    if args.generated and not args.inception and not args.clip:
        raise EvalError("--generated needs --inception (FID, KID, IS), --clip (CLIP-T) or both")
    if args.crop_size and not (args.real or args.base):
        raise EvalError(f"--crop-size {args.crop_size} needs --real or --base, whose crops are compared with")
    if (args.clip or args.candidates) and not args.captions:
        raise EvalError(f"{'--clip' if args.clip else '--candidates'} needs --captions, the prompts or references")
    if args.captions and not (args.clip or args.candidates):
        raise EvalError("--captions needs --clip (CLIP-T) or --candidates (CIDEr, METEOR, ROUGE-L)")
    if args.save_features and args.resize == "published":
        raise EvalError("--save-features needs --resize torch, clean or tensorflow: a file holds features of one kind")


def check_complete(args, references, there, what, where, notes):
    """Captions without a picture or candidate: an EvalError, or with --allow-missing a note."""
    there = set(there)
    missing = [key for key in references if key not in there]
    if missing and not args.allow_missing:
        raise EvalError(
            f"{len(missing)} of the {len(references)} captions have no {what} in {where}, the first is {missing[0]!r}; "
            "make them, or give --allow-missing"
        )
    if missing:
        notes.append(f"{len(missing)} of {len(references)} captions have no {what} and are left out")


def reporter(args, what):
    """Progress on standard error, at most a line a second."""
    import time

    last = [0.0]

    def report(done, of):
        now = time.monotonic()
        if not args.quiet and (done == of or now - last[0] > 1.0):
            last[0] = now
            end = "\n" if done == of else ""
            print(f"\r{what}: {done} of {of}", end=end, file=sys.stderr, flush=True)

    return report


def open_source(args, name):
    """Folder, or path of an .npz, of --generated, --real or --base."""
    value = getattr(args, name)
    if name != "generated" and value.endswith(".npz"):
        if not Path(value).is_file():
            raise EvalError(f"--{name} {value}: no such file")
        return Path(value)
    folder = pictures.list_folder(value)
    if name != "real" and not args.any_size:  # real pictures come in many sizes
        pictures.check_equal_sizes(folder)
    return folder


def enough_for_fid(name, count, width, allow_few):
    if count < 2 or (count <= width and not allow_few):
        raise EvalError(
            f"{name} has {count} pictures or crops: FID needs more than {width}, the features of --layer, for a "
            "covariance of full rank; make more, or give --allow-few and compare equal counts only"
        )


def enough_for_kid(name, count, size):
    if count < size:
        raise EvalError(
            f"{name} has {count} pictures or crops, KID draws subsets of {size}: make more, or give a smaller "
            "--kid-subset-size"
        )


def check_counts(args, sources):
    """What fid() and kid() and inception_score() would refuse, before an hour of InceptionV3."""
    for source in sources.values():
        if isinstance(source, pictures.Folder) and (args.real or args.base):
            for count in (len(source), len(source) * args.crops if args.crop_size else len(source)):
                enough_for_fid(source.path, count, int(args.layer), args.allow_few)
                enough_for_kid(source.path, count, args.kid_subset_size)
    if args.layer == "2048" and len(sources["generated"]) < args.is_splits:
        few_for_is(sources["generated"].path, len(sources["generated"]), args.is_splits)


def few_for_is(name, count, splits):
    raise EvalError(f"{name} has {count} pictures, fewer than --is-splits {splits}; make more, or give fewer splits")


def fid(a, b, allow_few):
    """FID of two FeatureSets by torch-fidelity, on f64 features."""
    import torch
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    width = a.features.shape[1]
    for x in (a, b):
        enough_for_fid(x.folder, len(x.features), width, allow_few)
    stats = [fid_features_to_statistics(torch.from_numpy(x.features.astype("float64"))) for x in (a, b)]
    return fid_statistics_to_metric(*stats, verbose=False)[KEY_METRIC_FID]


def kid(a, b, subsets, size):
    """{mean, std, all}: KID by torch-fidelity over random subsets, and over all pairs at once as nicefid."""
    import torch
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    import distances

    for x in (a, b):
        enough_for_kid(x.folder, len(x.features), size)
    both = [torch.from_numpy(x.features.astype("float64")) for x in (a, b)]
    found = kid_features_to_metric(*both, kid_subsets=subsets, kid_subset_size=size, rng_seed=2020, verbose=False)
    return {
        "mean": found[KEY_METRIC_KID_MEAN],
        "std": found[KEY_METRIC_KID_STD],
        "all": distances.kernel_distance(a.features, b.features),
    }


def inception_score(found, splits):
    """{mean, std} of IS (Salimans et al. 2016, arXiv:1606.03498) by torch-fidelity."""
    import torch
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if found.pictures < splits:
        few_for_is(found.folder, found.pictures, splits)
    out = isc_features_to_metric(torch.from_numpy(found.logits), splits=splits, shuffle=True, rng_seed=2020)
    return {"mean": out[KEY_METRIC_ISC_MEAN], "std": out[KEY_METRIC_ISC_STD]}


def score_pictures(args, sources, results, notes):
    """FID, KID and IS, into `results`."""
    from inception import Inception, features_of

    network = Inception(args.inception, args.layer, args.device, args.batch)
    check_counts(args, sources)
    if not network.published:
        notes.append(
            f"the InceptionV3 weights are not the published file (sha256 {network.sha256[:8]}...): {INCEPTION_FILE}"
        )
    fid_resize, kid_resize = ("torch", "clean") if args.resize == "published" else (args.resize, args.resize)
    results["definitions"]["inception"] = network.key() | {
        "fid_resize": fid_resize, "kid_resize": kid_resize, "kid_subsets": args.kid_subsets,
        "kid_subset_size": args.kid_subset_size,
    }  # fmt: skip
    known = {}

    def features(name, how, crops=None):
        at = (name, how, crops)
        if at not in known:
            what = f"InceptionV3, {name}, {how}{', crops' if crops else ''}"
            known[at] = features_of(sources[name], network, how, crops, args.cache, reporter(args, what))
        return known[at]

    def compare(name, label, crops=None):
        a, b = (features(n, fid_resize, crops) for n in ("generated", name))
        results["metrics"][f"fid_{label}"] = fid(a, b, args.allow_few)
        a, b = (features(n, kid_resize, crops) for n in ("generated", name))
        results["metrics"][f"kid_{label}"] = kid(a, b, args.kid_subsets, args.kid_subset_size)

    for name, label in (("real", "r"), ("base", "b")):
        if name in sources:
            compare(name, label)
    if args.crop_size:
        crops = pictures.Crops(args.crop_size, args.crops, args.seed)
        results["definitions"]["crops"] = crops.name()
        for name, label in (("real", "crop_r"), ("base", "crop_b")):
            if name in sources:
                compare(name, label, crops)
    if args.layer == "2048":
        results["metrics"]["is"] = inception_score(features("generated", fid_resize), args.is_splits)
        results["definitions"]["inception"]["is_splits"] = args.is_splits
    if args.save_features:
        features("generated", fid_resize).save(args.save_features)


def score_captions(args, references, results, notes):
    """CIDEr, METEOR and ROUGE-L, into `results`."""
    candidates = captions.read_candidates(args.candidates)
    ids = captions.pair(references, candidates)
    check_complete(args, references, candidates, "candidate caption", args.candidates, notes)
    texts = {key: references[key][:1] if args.references == "first" else references[key] for key in ids}
    gold = captions.tokenize(texts, args.tokenizer)
    said = {k: v[0] for k, v in captions.tokenize({key: [candidates[key]] for key in ids}, args.tokenizer).items()}
    empty = next((key for key in ids if not said[key].strip()), None)
    if empty is not None:
        raise EvalError(f"candidate {empty!r} ({candidates[empty][:40]!r}) has no words; mend or remove it")
    if len(ids) == 1:
        notes.append("CIDEr of one picture is 0: its word weights come from how many pictures a word is said of")
    metrics = results["metrics"]
    metrics["cider"] = captions.cider(gold, said)[0]
    metrics["meteor"] = captions.meteor(gold, said, args.meteor, args.wordnet)[0]
    metrics["rouge_l"] = captions.rouge_l(gold, said)[0]
    if args.published_code:
        wordnet = args.wordnet if args.meteor == "nltk" else None
        found = captions.published_code(texts, {key: candidates[key] for key in ids}, wordnet)
        metrics["published_code"] = found
    results["counts"]["candidates"] = len(ids)
    results["definitions"]["captions"] = {
        "tokenizer": args.tokenizer, "meteor": args.meteor, "references": args.references,
    }  # fmt: skip


def as_text(results):
    """The results as a table for people."""
    lines = []
    for name, value in results["metrics"].items():
        parts = value if isinstance(value, dict) else {"": value}
        for part, number in parts.items():
            lines.append(f"{name + (' ' + part if part else ''):22}{number:.6g}")
    lines += [f"{'pictures, ' + name:22}{count}" for name, count in results["counts"].items()]
    lines += [f"note: {note}" for note in results["notes"]]
    return "\n".join(lines) + "\n"


def main(arguments=None):
    args = parse(arguments)
    results = {"metrics": {}, "counts": {}, "definitions": {}, "notes": []}
    notes = results["notes"]
    sources = {name: open_source(args, name) for name in ("generated", "real", "base") if getattr(args, name)}
    references = captions.read_references(args.captions) if args.captions else None
    if references is not None and "generated" in sources:
        check_complete(args, references, sources["generated"].ids(), "picture", sources["generated"].path, notes)
    import torch  # seconds; after the errors that need none

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise EvalError(f"--device {args.device}: torch cannot use it ({reason}); cpu always works") from error
    results["definitions"]["threads"] = torch.get_num_threads()
    for name, source in sources.items():
        results["counts"][name] = len(source) if isinstance(source, pictures.Folder) else str(source)
    if args.inception:
        score_pictures(args, sources, results, notes)
    if args.clip:
        from clip_score import Clip, clip_t

        clip = Clip(args.clip, args.device, args.batch)
        values, cut = clip_t(sources["generated"], references, clip, reporter(args, "CLIP, generated"))
        results["metrics"]["clip_t"] = float(values.mean())
        results["definitions"]["clip"] = {"weights_sha256": clip.sha256}
        if cut:
            notes.append(
                f"{cut} of {len(values)} captions are longer than CLIP's {clip.text_length} tokens and were cut"
            )
    if args.candidates:
        score_captions(args, references, results, notes)
    text = json.dumps(results, indent=2, sort_keys=True) + "\n"
    if args.json and args.json != "-":
        write_whole(args.json, text)
    print(text if args.json == "-" else as_text(results), end="")
    return 0


if __name__ == "__main__":
    fail_clearly("tools/eval/score", main)
