"""Trains DFFormer, CDFFormer, GFFormer, ConvFormer and CAFormer of equal depth and width by one recipe on images that
come with packages, and tests them at the training size and at other sizes. Segments and detects digits with encoders
of DFFormer, CDFFormer and ConvFormer.

    python benchmarks/bench_accuracy.py [--only digits,dfformer] [--seeds N] [--workers N] [--output FOLDER]

Each training is written when it ends. After an interruption, the same command continues; it adds to the folder's
results of the same commit and machine. Seconds are processor time of one thread, on which other programs and the number
of workers have less influence than on wall-clock time.

Writes accuracy.json, with every training; accuracy.csv and accuracy.md, with means and standard deviations; and two
pictures. Needs mlxtend and what training needs: pip install '.[benchmarks]'.
"""

import argparse
import itertools
import math
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accuracy import dense
from accuracy.figures import learning_figure, sizes_figure
from accuracy.images import LICENCES, VIEWS
from accuracy.models import CHANGES, MODELS, SHAPE, STRIDES
from accuracy.training import PART, RECIPE, Case, Result, train
from common import earlier_run, names, provenance, write_csv, write_json

from dfformer.models.filter_resize import RULES

SEEDS = 5
CHANGED_ON = "digits"  # on which the changes are tried
SETS = {**LICENCES, **dict.fromkeys(dense.MEASURES, dense.LICENCE)}
QUICK = (Case("digits", "dfformer", 0), *(Case(name, "convformer", 0) for name in ("digits", *dense.MEASURES)))


def main(argv: Sequence[str] | None = None) -> None:
    words = [*SETS, *MODELS, *CHANGES]
    parser = argparse.ArgumentParser(description="Trains small models of equal depth and width on real images.")
    parser.add_argument("--only", type=names(words), default=words, help=f"of {'; '.join(words)}")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="trainings of each model on each set")
    parser.add_argument("--workers", type=int, default=2, help="number of processes, each with one thread")
    parser.add_argument("--quick", action="store_true", help="some models, a few steps, to try the benchmark")
    parser.add_argument("--output", type=Path, default=Path("build/bench_accuracy"), help="folder for the results")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    machine = provenance(1, "cpu", ["mlxtend", "scikit-image", "scikit-learn"])
    earlier = earlier_run(args.output / "accuracy.json", machine, ("machine", "commit", "torch", "timm"))
    results = [] if earlier is None else [Result(**row) for row in earlier["rows"]]
    content = {
        "machine": machine if earlier is None else earlier["machine"],
        "commands": [] if earlier is None else earlier["commands"],
        "recipe": RECIPE,
        "recipes of dense tasks": dense.RECIPES,
        "shape": SHAPE | {"strides": STRIDES},
        "licences": SETS,
        "part": PART,
    }
    content["commands"].append(
        shlex.join(["python", "benchmarks/bench_accuracy.py", *(sys.argv[1:] if argv is None else argv)])
    )
    done = {Case(r.images, r.model, r.seed) for r in results}
    todo = [case for case in (QUICK if args.quick else planned(args.only, args.seeds)) if case not in done]
    for result in _trained(todo, args.workers, args.quick):
        results.append(result)
        print(
            f"{result.images}, {result.model}, seed {result.seed}: {result.accuracy:.1f} %, {result.seconds:.0f} s",
            flush=True,
        )
        write_json(args.output / "accuracy.json", content | {"rows": [asdict(r) for r in results]})
    report(args.output, results)


def planned(only: Sequence[str], seeds: int) -> list[Case]:
    """Every case that ``only`` names, seed by seed; without a set or a model in it, all sets or all models."""
    sets = [name for name in SETS if name in only] or list(SETS)
    models = [name for name in (*MODELS, *CHANGES) if name in only] or list(MODELS)
    cases = [Case(*case) for case in itertools.product(sets, models, range(seeds))]
    cases = [case for case in cases if case.model in _models(case.images)]
    return sorted(cases, key=lambda case: (case.model in CHANGES, case.seed))


def _models(images: str) -> list[str]:
    """Those that are compared on a set of images."""
    return [*dense.MODELS] if images in dense.MEASURES else [*MODELS, *(CHANGES if images == CHANGED_ON else ())]


def _trained(cases: Sequence[Case], workers: int, quick: bool) -> Iterator[Result]:
    """The results as they come, in any order."""
    run = partial(_train, brief=quick)
    if workers == 1 or len(cases) < 2:
        torch.set_num_threads(1)
        yield from map(run, cases)
        return
    with torch.multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap_unordered(run, cases)


def _train(case: Case, brief: bool) -> Result:
    return dense.train(case, brief) if case.images in dense.MEASURES else train(case, brief)


def report(folder: Path, results: Sequence[Result]) -> None:
    rows = summary(results)
    titles = dict.fromkeys(itertools.chain.from_iterable(rows))
    write_csv(folder / "accuracy.csv", list(titles), rows)
    (folder / "accuracy.md").write_text(markdown(rows), encoding="utf-8")
    compared = [r for r in results if r.model in MODELS]
    figures = {
        "accuracy": (learning_figure, compared),
        "accuracy_sizes": (sizes_figure, [r for r in compared if r.sizes]),
    }
    for name, (figure, shown) in figures.items():
        if shown:
            figure(shown).savefig(folder / f"{name}.png", dpi=110)


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each set and model: means over seeds, and the standard deviation of the accuracy."""
    rows = []
    for images, model in itertools.product(SETS, (*MODELS, *CHANGES)):
        found = [r for r in results if (r.images, r.model) == (images, model)]
        if not found:
            continue
        accuracies = [r.accuracy for r in found]
        first = found[0]
        rows.append(
            {
                "images": images,
                "model": model,
                "seeds": len(found),
                "parameters": first.parameters,
                "mflops": round(first.mflops, 3),
                "seconds": round(statistics.mean(r.seconds for r in found), 1),
                "accuracy": round(statistics.mean(accuracies), 2),
                "deviation": round(statistics.stdev(accuracies), 2) if len(found) > 1 else math.nan,
                "part 1": round(statistics.mean(r.curve[-1][-1] for r in found), 2),
            }
            | {key: round(statistics.mean(r.sizes[key] for r in found), 2) for key in first.sizes}
        )
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The tables of a summary: accuracy and cost, then other sizes."""
    lines = ["# Accuracy of small models on real images\n", "Written by `benchmarks/bench_accuracy.py`.\n"]
    for images in dict.fromkeys(row["images"] for row in rows):
        found = [row for row in rows if row["images"] == images]
        lines += [f"## {images}\n", f"{SETS[images]}.\n"]
        lines += _table(
            [
                "model",
                "seeds",
                f"{dense.MEASURES.get(images, 'accuracy')}, %",
                "parameters (thousands)",
                "Mflop",
                "seconds of training",
            ],
            [
                [
                    row["model"],
                    row["seeds"],
                    f"{row['accuracy']:.1f} ± {row['deviation']:.1f}",
                    f"{row['parameters'] / 1e3:.0f}",
                    f"{row['mflops']:.2f}",
                    f"{row['seconds']:.0f}",
                ]
                for row in found
            ],
        )
        views = list(dict.fromkeys(" ".join(k.split()[:2]) for row in found for k in row if k.split()[0] in VIEWS))
        if not views:
            continue
        lines += _table(
            ["at other sizes, %", "1", *views],
            [
                [f"{row['model']} {rule}".strip(), f"{row['part 1']:.0f}"]
                + [f"{row[f'{view} {rule}'.strip()]:.0f}" for view in views]
                for row in found
                for rule in (RULES if f"{views[0]} {RULES[0]}" in row else ("",))
            ],
        )
    return "\n".join(lines)


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [titles, ["---"] * len(titles), *rows]
    return [*("| " + " | ".join(map(str, row)) + " |" for row in cells), ""]


if __name__ == "__main__":
    main()
