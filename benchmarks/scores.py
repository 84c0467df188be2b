"""Suite `scores`: post-hoc scores and metrics, ours and those of pytorch-ood and scikit-learn.

    python -m benchmarks.run --suite scores --output results.json [--frameworks jax,torch]
        [--cases knn,vim] [--runs 5] [--train 50000] [--test 10000] [--width 512]

Fit on 50,000 x 512 features of ten classes, score 10,000 x 512, from NumPy arrays to NumPy scores.
The two libraries take turns within a run, after one round that does not count (compilation). The
row of each of our cases has `peak_over_inputs`: the growth of the resident memory of a fresh
process over its inputs, these included. Without pytorch-ood (extra `bench`) our half runs alone.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import timing
from benchmarks.plots import draw as draw
from benchmarks.run import row
from oal_jax import scores as post_hoc
from oal_jax.errors import UserError
from oal_jax.evaluation.metrics import ood_metrics

SCORES = ("energy", "knn", "mahalanobis", "vim", "gram")
CASES = (*SCORES, "metrics")
_CLASSES = 10
_METRIC_SCORES = 100_000


class Inputs(NamedTuple):
    """What both libraries are given: arrays of the host."""

    train: post_hoc.Outputs
    labels: np.ndarray
    test: post_hoc.Outputs
    head: post_hoc.Head


def make_inputs(train: int, test: int, width: int) -> Inputs:
    """Features as a ReLU network gives them: of rank below the width, never negative."""
    rng = np.random.default_rng(0)
    mix = (rng.normal(size=(width // 4, width)) / np.sqrt(width)).astype(np.float32)
    means = rng.normal(size=(_CLASSES, width // 4)).astype(np.float32)
    kernel = (rng.normal(size=(width, _CLASSES)) / np.sqrt(width)).astype(np.float32)

    def draw(n):
        labels = rng.integers(0, _CLASSES, n)
        z = means[labels] + rng.normal(size=(n, width // 4)).astype(np.float32)
        noise = rng.normal(size=(n, width)).astype(np.float32)
        features = np.maximum(z @ mix + noise / 10, 0)
        return post_hoc.Outputs(features @ kernel, features), labels

    (train_outputs, labels), (test_outputs, _) = draw(train), draw(test)
    head = post_hoc.Head(kernel, np.zeros(_CLASSES, np.float32))
    return Inputs(train_outputs, labels, test_outputs, head)


def ours(case: str, inputs: Inputs) -> Callable[[], Any]:
    """The job of a case in this library."""
    if case == "metrics":
        return lambda: ood_metrics(*_metric_scores())
    score = post_hoc.make(case)

    def job():
        train, test = inputs.train, inputs.test
        if case == "gram":  # part of the job: the other library gets maps, and sums them itself
            train, test = _with_grams(train), _with_grams(test)
        state = post_hoc.fit(score, train, inputs.labels, inputs.head)
        return post_hoc.apply(score, state, test)

    return job


def _with_grams(outputs: post_hoc.Outputs) -> post_hoc.Outputs:
    def forward(features):
        maps = [features[:, None, None, :]]
        return post_hoc.summarise(features[:, :1], None, maps, ("grams",))

    grams = post_hoc.compute(forward, outputs.features, fields=("grams",)).grams
    return outputs._replace(grams=grams)


def theirs(case: str, inputs: Inputs) -> Callable[[], Any]:
    """The same job in pytorch-ood, or in scikit-learn."""
    if case == "metrics":
        return _sklearn_metrics
    import torch
    from pytorch_ood.detector import KNN, EnergyBased, Gram, Mahalanobis, ViM

    def tensor(x):
        return torch.from_numpy(np.ascontiguousarray(x))

    train, labels = tensor(inputs.train.features), tensor(inputs.labels)
    test, logits = tensor(inputs.test.features), tensor(inputs.test.logits)
    weight, bias = tensor(inputs.head.kernel.T), tensor(inputs.head.bias)
    if case == "energy":
        return lambda: EnergyBased(None).predict_logits(logits).numpy()
    if case == "gram":
        identity = torch.nn.Identity()
        head = torch.nn.Linear(*inputs.head.kernel.shape)

        def job():
            detector = Gram(head, [identity], _CLASSES, list(range(1, 6)))
            batches = zip(train.split(512), labels.split(512), strict=True)
            detector.fit([(x[:, :, None], y) for x, y in batches])
            return torch.cat(
                [
                    detector.predict_structured(z, [x[:, :, None]])
                    for z, x in zip(logits.split(512), test.split(512), strict=True)
                ]
            ).numpy()

        head.forward = lambda x: x[:, :_CLASSES, 0]  # its logits are not used when it is fitted
        return job
    detector = {
        "knn": lambda: KNN(None, k=50),
        "mahalanobis": lambda: Mahalanobis(None),
        "vim": lambda: ViM(None, d=train.shape[1] // 2, w=weight, b=bias),
    }[case]
    return lambda: detector().fit_features(train, labels).predict_features(test).numpy()


def _metric_scores() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    half = _METRIC_SCORES // 2
    return rng.normal(size=half), rng.normal(1, 1, size=half)


def _sklearn_metrics() -> list[float]:
    from sklearn.metrics import auc, precision_recall_curve, roc_auc_score, roc_curve

    id_scores, ood_scores = _metric_scores()
    scores = np.concatenate([id_scores, ood_scores])
    is_ood = np.repeat([0, 1], [len(id_scores), len(ood_scores)])
    area = roc_auc_score(is_ood, scores)
    fpr, tpr, _ = roc_curve(is_ood, scores)
    precision, recall, _ = precision_recall_curve(is_ood, scores)
    out = auc(recall, precision)
    precision, recall, _ = precision_recall_curve(1 - is_ood, -scores)
    return [area, fpr[np.argmax(tpr >= 0.95)], out, auc(recall, precision)]


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Time every case in turns; print the ratios; return the rows."""
    parser = argparse.ArgumentParser(prog="benchmarks.run --suite scores")
    parser.add_argument("--frameworks", default="jax,torch")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--runs", type=int, default=5)
    for name, size in (("train", 50_000), ("test", 10_000), ("width", 512)):
        parser.add_argument(f"--{name}", type=int, default=size)
    args = parser.parse_args(argv)
    cases = args.cases.split(",")
    for case in cases:
        if case not in CASES:
            raise UserError(f"case '{case}' is unknown; known: {', '.join(CASES)}")
    frameworks = args.frameworks.split(",")
    needed = {"pytorch_ood", "torch", "sklearn"}
    missing = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    if "torch" in frameworks and missing:
        print(f'{", ".join(missing)} missing (pip install ".[bench]"): our half runs alone')
        frameworks = ["jax"]
    size = (args.train, args.test, args.width)
    inputs = make_inputs(*size)
    rows = []
    for case in cases:
        jobs = {"jax": ours(case, inputs)}
        if "torch" in frameworks:
            jobs["torch"] = theirs(case, inputs)
        seconds = _in_turns(jobs, args.runs)
        memory = {} if case == "metrics" else {"peak_over_inputs": _peak_over_inputs(case, size)}
        for framework, times in seconds.items():
            more = memory if framework == "jax" else {"libraries": _libraries()}
            rows.append(row("scores", case, times, framework=framework, **more))
        print(_line(case, seconds, memory), flush=True)
    return rows


def _in_turns(jobs: dict[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(runs + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _libraries() -> dict[str, str]:
    return {n: importlib.metadata.version(n) for n in ("torch", "pytorch-ood", "scikit-learn")}


def _line(case: str, seconds: dict[str, list[float]], memory: dict[str, float]) -> str:
    ratios = ""
    if "torch" in seconds:
        pairs = [t / j for j, t in zip(seconds["jax"], seconds["torch"], strict=True)]
        ratios = f"  {np.median(pairs):6.1f}x ({min(pairs):.1f} to {max(pairs):.1f})"
    peak = "".join(f"  peak {value:.2f} x inputs" for value in memory.values())
    times = "  ".join(f"{name} {np.median(s):8.4f} s" for name, s in seconds.items())
    return f"{case:12s} {times}{ratios}{peak}"


def _peak_over_inputs(case: str, size: tuple[int, int, int]) -> float:
    """Growth of the resident memory by the job, inputs included, over the bytes of the inputs."""
    code = f"from benchmarks.scores import measure_memory; measure_memory({case!r}, {size!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return round(json.loads(done.stdout.splitlines()[-1]), 2)


def measure_memory(case: str, size: tuple[int, int, int]) -> None:
    """Print `peak_over_inputs` of a case; in a process of its own, since the peak never falls."""
    inputs = make_inputs(*size)
    ours(case, inputs)()  # what libraries and compilation need does not count
    used = sum(x.nbytes for x in (*inputs.train[:2], *inputs.test[:2]))
    gc.collect()
    print(json.dumps((used + timing.peak_growth(ours(case, inputs))) / used))
