"""Post-hoc scores and metrics, against pytorch-ood and scikit-learn.

    python -m benchmarks.run --suite scores --output results.json [--frameworks jax,torch]
        [--cases knn,vim] [--runs 5] [--train 50000] [--test 10000] [--width 512]

Fits on 50,000 features of width 512 in ten classes and scores 10,000, from NumPy arrays to NumPy
scores. `metrics` computes AUROC, AUPR and FPR95 of 100,000 scores. JAX rows have
`peak_over_inputs`: the growth of a fresh process's resident memory, inputs included, over the bytes
of the inputs. The other libraries run on the CPU.
"""

import gc
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import timing
from benchmarks.plots import draw as draw
from benchmarks.run import choose
from benchmarks.timing import Job
from oal_jax import scores as post_hoc
from oal_jax.evaluation.metrics import ood_metrics

CASES = ("energy", "knn", "mahalanobis", "vim", "gram", "metrics")
_CLASSES = 10
_METRIC_SCORES = 100_000


class Inputs(NamedTuple):
    """Host arrays that both libraries get."""

    train: post_hoc.Outputs
    labels: np.ndarray
    test: post_hoc.Outputs
    head: post_hoc.Head


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Time every case, print ratios, and return the rows."""
    parser = timing.make_parser("scores", __doc__, twin=False)
    parser.add_argument("--cases", default=",".join(CASES))
    for name, size in (("train", 50_000), ("test", 10_000), ("width", 512)):
        parser.add_argument(f"--{name}", type=int, default=size)
    args = parser.parse_args(argv)
    names = choose("case", args.cases, CASES)
    timing.settle(args, ("pytorch_ood", "torch", "sklearn"))
    args.device = "cpu"  # of the other libraries
    size = (args.train, args.test, args.width)
    inputs = make_inputs(*size)
    rows = []
    for name in names:
        jobs = []
        if "jax" in args.frameworks:
            jobs.append(Job(name, "jax", ours(name, inputs), fields=_memory(name, size)))
        if "torch" in args.frameworks:
            library = "scikit-learn" if name == "metrics" else "pytorch-ood"
            jobs.append(Job(name, "torch", theirs(name, inputs), fields={"library": library}))
        rows += timing.measure("scores", jobs, args)
    return rows


def make_inputs(train: int, test: int, width: int) -> Inputs:
    """Features like a ReLU network's: of lower rank than their width, and not negative."""
    rng = np.random.default_rng(0)
    mix = (rng.normal(size=(width // 4, width)) / np.sqrt(width)).astype(np.float32)
    means = rng.normal(size=(_CLASSES, width // 4)).astype(np.float32)
    kernel = (rng.normal(size=(width, _CLASSES)) / np.sqrt(width)).astype(np.float32)

    def sample(n: int) -> tuple[post_hoc.Outputs, np.ndarray]:
        labels = rng.integers(0, _CLASSES, n)
        z = means[labels] + rng.normal(size=(n, width // 4)).astype(np.float32)
        noise = rng.normal(size=(n, width)).astype(np.float32)
        features = np.maximum(z @ mix + noise / 10, 0)
        return post_hoc.Outputs(features @ kernel, features), labels

    (train_outputs, labels), (test_outputs, _) = sample(train), sample(test)
    head = post_hoc.Head(kernel, np.zeros(_CLASSES, np.float32))
    return Inputs(train_outputs, labels, test_outputs, head)


def ours(case: str, inputs: Inputs) -> Callable[[], Any]:
    """The work of a case in this library."""
    if case == "metrics":
        return lambda: ood_metrics(*_metric_scores())
    score = post_hoc.make(case)

    def job() -> np.ndarray:
        train, test = inputs.train, inputs.test
        if case == "gram":  # timed, because pytorch-ood computes its sums in `fit` too
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
    """The same work in pytorch-ood or scikit-learn."""
    if case == "metrics":
        return _sklearn_metrics
    import torch
    from pytorch_ood.detector import KNN, EnergyBased, Gram, Mahalanobis, ViM

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x))

    train, labels = tensor(inputs.train.features), tensor(inputs.labels)
    test, logits = tensor(inputs.test.features), tensor(inputs.test.logits)
    weight, bias = tensor(inputs.head.kernel.T), tensor(inputs.head.bias)
    if case == "energy":
        return lambda: EnergyBased(None).predict_logits(logits).numpy()
    if case == "gram":
        head = torch.nn.Linear(*inputs.head.kernel.shape)
        head.forward = lambda x: x[:, :_CLASSES, 0]  # `fit` ignores these logits

        def job() -> np.ndarray:
            detector = Gram(head, [torch.nn.Identity()], _CLASSES, list(range(1, 6)))
            batches = zip(train.split(512), labels.split(512), strict=True)
            detector.fit([(x[:, :, None], y) for x, y in batches])
            pairs = zip(logits.split(512), test.split(512), strict=True)
            scores = [detector.predict_structured(z, [x[:, :, None]]) for z, x in pairs]
            return torch.cat(scores).numpy()

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
    aupr_out = auc(recall, precision)
    precision, recall, _ = precision_recall_curve(1 - is_ood, -scores)
    return [area, fpr[np.argmax(tpr >= 0.95)], aupr_out, auc(recall, precision)]


def _memory(case: str, size: tuple[int, int, int]) -> dict[str, float]:
    if case == "metrics":
        return {}
    code = f"from benchmarks.scores import measure_memory; measure_memory({case!r}, {size!r})"
    output = timing.python(["-c", code])
    return {"peak_over_inputs": round(json.loads(output.splitlines()[-1]), 2)}


def measure_memory(case: str, size: tuple[int, int, int]) -> None:
    """Print `peak_over_inputs` of a case. Needs a process of its own: the peak never falls."""
    inputs = make_inputs(*size)
    job = ours(case, inputs)
    job()  # memory of libraries and compilation does not count
    used = sum(x.nbytes for x in (*inputs.train[:2], *inputs.test[:2]))
    gc.collect()
    print(json.dumps((used + timing.peak_growth(job)) / used))
