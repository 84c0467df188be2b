"""Suite `middle_stage`: is OOD told better in the middle of a training than at its end?

    python -m benchmarks.run --suite middle_stage --output results.json [--seeds 0,1,2]
        [--epochs 20] [--scores msp,energy,mahalanobis] [--workdir runs/middle_stage]
        [--config.a.b=VALUE ...]

So claims Unleashing Mask (arXiv 2306.03715): an intermediate stage is better than the final one,
because late training memorises atypical samples. Here every epoch of a plain training (`ce`) is
kept and measured: a row a seed and epoch (case "epoch"), and one a seed (case "constraint") with
the loss constraint that the method would estimate from the final model, the first epoch whose
training loss is below it, and the images that the paper calls atypical. The stage is chosen on the
validation OOD sets, so the near and far sets that it is judged on had no say in it. Pictures lie
beside the rows. Finished trainings are skipped, interrupted ones resumed.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from benchmarks import cases, middle_stage_figures
from benchmarks.cases import Case, columns, markdown, mean_of, spread
from benchmarks.run import row
from oal_jax import scores as post_hoc
from oal_jax.config import flatten, unflatten
from oal_jax.config.smoke import shrink
from oal_jax.data.sources import ImageSet
from oal_jax.errors import UserError
from oal_jax.evaluation import protocol
from oal_jax.methods import losses, masking
from oal_jax.runtime.keys import at_step, named
from oal_jax.stages import batches, estimate_loss, evaluate, train
from oal_jax.stages import run as pipeline
from oal_jax.stages.context import Context
from oal_jax.training.checkpoints import Checkpoints
from oal_jax.training.state import init_state

SUITE = "middle_stage"
SCORES = "msp,energy,mahalanobis"
METRICS = ("auroc", "fpr_at_95_ood_tpr", "fpr_at_95_id_tpr")
SHOWN = 16  # images of a kind in the picture
CASES = {
    "ce": Case(
        {
            "method.name": "ce",
            "data.csid": ("none",),
            "train.checkpoint_every": 1,
            "train.keep_checkpoints": 0,
        }
    )
}


class Images(NamedTuple):
    """All that an epoch is measured on."""

    id_train: ImageSet
    id_val: ImageSet
    id_test: ImageSet
    ood: dict[str, ImageSet]
    groups: dict[str, str]


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Train, and measure every epoch, for every seed; print the summary; return the rows."""
    parser = argparse.ArgumentParser(prog=f"benchmarks.run --suite {SUITE}")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--scores", default=SCORES)
    args, rest = parser.parse_known_args(argv)
    plan = cases.parse(SUITE, CASES, rest)
    scores = list(dict.fromkeys(args.scores.split(",")))
    post_hoc.needed(scores)  # an unknown one is told before any training
    rows = []
    for seed in plan.seeds:
        print(f"--- seed {seed}", flush=True)
        context = _trained(plan, seed, args.epochs)
        images = _images(context)
        epochs = _measure(context, images, scores, args.epochs)
        rows += epochs
        rows.append(_constraint(context, images.id_train, scores, epochs))
    print(summary(rows))
    return rows


def draw(rows: Sequence[Mapping[str, Any]], output: Path) -> list[Path]:
    """The pictures of the rows, beside `output`; the run of the first seed must still be there."""
    first = next(r for r in rows if r["case"] == "constraint")
    data = pipeline.resolve(Path(first["run"])).train_images()
    return [
        *middle_stage_figures.save(
            middle_stage_figures.curves(rows, best_epochs(rows)),
            output.with_name(f"{output.stem}_{SUITE}"),
            ("png", "svg"),
        ),
        *middle_stage_figures.save(
            middle_stage_figures.examples(first, data),
            output.with_name(f"{output.stem}_atypical"),
            ("png",),
        ),
    ]


def _trained(plan: cases.Plan, seed: int, epochs: int) -> Context:
    """The context of the finished training of a seed."""
    small = plan.base.smoke
    changes = dict(CASES["ce"].changes) | {"seed": seed, "train.epochs": epochs}
    # The pipeline's own `smoke` would leave one epoch of as many as were asked for.
    base = flatten(shrink(plan.base) if small else plan.base)
    workdir = plan.workdir / f"seed{seed}"
    pipeline.run(unflatten(base | changes | {"smoke": False}), workdir, only="train")
    context = pipeline.resolve(workdir)
    return context._replace(config=unflatten(flatten(context.config) | {"smoke": small}))


def _images(context: Context) -> Images:
    groups = evaluate.groups(context)
    for group in ("near", "far", "validation"):
        if group not in groups.values():
            raise UserError(f"config data.{group} has no sets; suite {SUITE} compares by them")
    splits = {name: "validation" if g == "validation" else "test" for name, g in groups.items()}
    return Images(
        context.train_images(),
        context.images("validation"),
        context.images("test"),
        {name: context.images(split, name) for name, split in splits.items()},
        groups,
    )


def _measure(
    context: Context, images: Images, scores: Sequence[str], epochs: int
) -> list[dict[str, Any]]:
    """A row an epoch: accuracy, training loss, metrics of every score and group of sets."""
    rows = []
    net = train.student(context.config, len(images.id_train.class_names))
    states = _states(context, net, images.id_train, epochs)
    for epoch, (step, variables) in enumerate(states, 1):
        start = time.perf_counter()
        found = measure(net, variables, images, scores, context.config.evaluation.batch_size)
        seconds = time.perf_counter() - start
        more = {"seed": context.config.seed, "epoch": epoch, "step": step, **found}
        rows.append(row(SUITE, "epoch", [seconds], **more))
        auroc = " ".join(f"{s} {found['metrics'][s]['all']['auroc']:.1f}" for s in scores)
        print(
            f"epoch {epoch}: accuracy {found['id_accuracy']:.1f}, training loss"
            f" {found['train_loss']:.3f}, AUROC {auroc} ({seconds:.1f} s)",
            flush=True,
        )
    return rows


def _states(
    context: Context, net: Any, data: ImageSet, epochs: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, variables of the student) at the end of every epoch."""
    config = context.config
    arrays = batches.make_arrays(context, data)
    method = train.make_method(context, net, data.image_shape, arrays, data.examples)
    plan = train.make_plan(config, len(data.images))
    key = named(context.key, "student")
    groups = list(jax.eval_shape(method.init, key)[0])
    like = init_state(method, train.make_optimizer(config, groups, plan.steps), key)
    with closing(Checkpoints(context.directory("train") / train.CHECKPOINTS, keep=0)) as kept:
        for step in range(
            plan.steps_per_epoch, epochs * plan.steps_per_epoch + 1, plan.steps_per_epoch
        ):
            state = kept.restore_step(step, like)
            yield step, train.student_variables(method.finish(state.params), state.model_state)


def measure(
    net: Any, variables: dict[str, Any], images: Images, scores: Sequence[str], batch_size: int
) -> dict[str, Any]:
    """What a model is worth: percent but for `train_loss`, in nats.

    The training loss is that of the images as they are, in evaluation mode; means over sets are
    unweighted, and those of "all" over near and far sets.
    """
    wanted = post_hoc.needed(scores)
    forward = evaluate.make_forward(net, variables, wanted)

    def inputs(data: ImageSet, labelled: bool = True) -> protocol.Inputs:
        outputs = post_hoc.compute(forward, _unit(data), batch_size, wanted)
        return protocol.Inputs(outputs, lambda: data.images, data.labels if labelled else None)

    id_train, id_test = inputs(images.id_train), inputs(images.id_test)
    found = protocol.evaluate(
        scores,
        id_train,
        inputs(images.id_val),
        id_test,
        {name: inputs(data, labelled=False) for name, data in images.ood.items()},
        images.groups,
        post_hoc.Head(*(np.asarray(variables["params"]["fc"][k]) for k in ("kernel", "bias"))),
        forward,
        batch_size=batch_size,
    )
    table = found.rows + found.validation_rows
    sets = {group: columns(table)[group] for group in ("near", "far", "all", "validation")}
    return {
        "id_accuracy": protocol.accuracy(id_test),
        "train_loss": float(np.mean(_losses(id_train.outputs.logits, images.id_train.labels))),
        "metrics": {
            score: {
                group: {
                    metric: mean_of([r for r in table if r.score == score], members, metric)
                    for metric in METRICS
                }
                for group, members in sets.items()
            }
            for score in scores
        },
    }


def _constraint(
    context: Context, data: ImageSet, scores: Sequence[str], epochs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A row: the constraint as stage `estimate_loss` would find it for the final model, and more.

    That is the mean cross-entropy of augmented images under random masks; training losses of the
    epochs are compared with it.
    """
    start = time.perf_counter()
    config, key = context.config, named(context.key, "estimate_loss")
    m = config.method
    net = train.student(config, len(data.class_names))
    variables = train.student_variables(*train.load(context))
    mean_loss = estimate_loss.make_mean_loss(context, net, data)

    @jax.jit
    def masked(key, params):
        return masking.apply_masks(params, masking.init_scores(key, params), m.estimate_keep)

    def logits(variables):
        # With the fields of the epochs, so that it is the program compiled for them.
        wanted = post_hoc.needed(scores)
        forward = evaluate.make_forward(net, variables, wanted)
        batch = config.evaluation.batch_size
        return post_hoc.compute(forward, _unit(data), batch, wanted).logits

    per_mask, under_masks = [], []
    for i in range(m.n_masks):
        damaged = variables | {"params": masked(at_step(key, "mask", i), variables["params"])}
        per_mask.append(mean_loss(damaged))
        under_masks.append(logits(damaged))
    constraint = float(np.mean(per_mask))
    found = {
        "constraint": constraint,
        "std": float(np.std(per_mask, ddof=1)) if m.n_masks > 1 else 0.0,
        "per_mask": per_mask,
        "crossing_epoch": crossing(epochs, constraint),
        "run": str(context.workdir),
        **pick(logits(variables), np.stack(under_masks), data.labels, SHOWN, config.seed),
    }
    seconds = time.perf_counter() - start
    return row(SUITE, "constraint", [seconds], seed=config.seed, **found)


def crossing(epochs: Sequence[Mapping[str, Any]], constraint: float) -> int | None:
    """The first epoch whose training loss is below the constraint; None if there is none."""
    below = [r["epoch"] for r in epochs if r["train_loss"] < constraint]
    return min(below, default=None)


def pick(
    logits: Float[np.ndarray, "n c"],
    under_masks: Float[np.ndarray, "m n c"],
    labels: Int[np.ndarray, " n"],
    count: int,
    seed: int,
) -> dict[str, list[dict[str, Any]]]:
    """Atypical and typical training images, of those that are classified right without a mask.

    Atypical: the highest cross-entropy, averaged over the masks. Typical: drawn from the half with
    the lowest. `prediction` is that of the mean probabilities under the masks; where few images are
    right, fewer than `count` are given.
    """
    loss = np.mean([_losses(z, labels) for z in under_masks], axis=0)
    prediction = np.mean(jax.nn.softmax(under_masks, axis=-1), axis=0).argmax(-1)
    right = np.flatnonzero(logits.argmax(-1) == labels)
    order = right[np.argsort(loss[right], kind="stable")]
    half = order[: len(order) // 2]
    count = min(count, len(half))
    typical = np.random.default_rng(seed).choice(half, count, replace=False)

    def described(indices):
        return [
            {
                "index": int(i),
                "label": int(labels[i]),
                "prediction": int(prediction[i]),
                "loss": float(loss[i]),
            }
            for i in indices
        ]

    return {"atypical": described(order[::-1][:count]), "typical": described(typical)}


def best_epochs(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], int]:
    """(score, seed) to the epoch of the highest mean AUROC over the validation sets; the first."""
    epochs = [r for r in rows if r["case"] == "epoch"]
    found = {}
    for score in epochs[0]["metrics"]:
        for seed in dict.fromkeys(r["seed"] for r in epochs):
            own = [r for r in epochs if r["seed"] == seed]
            best = max(own, key=lambda r: r["metrics"][score]["validation"]["auroc"])
            found[score, seed] = best["epoch"]
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: what the middle stage has above the last epoch, and whether it is better."""
    at = {(r["seed"], r["epoch"]): r for r in rows if r["case"] == "epoch"}
    ends = [r for r in rows if r["case"] == "constraint"]
    seeds, last = [r["seed"] for r in ends], max(epoch for _, epoch in at)
    best = best_epochs(rows)
    crossed = {r["seed"]: r["crossing_epoch"] for r in ends if r["crossing_epoch"] is not None}
    lines, verdicts = [], []
    for score in dict.fromkeys(score for score, _ in best):

        def auroc(seed, epoch, group, score=score):
            return at[seed, epoch]["metrics"][score][group]["auroc"]

        def gains(group, chosen, auroc=auroc):
            return [auroc(s, e, group) - auroc(s, last, group) for s, e in chosen.items()]

        chosen = {s: best[score, s] for s in seeds}
        accuracy = [at[s, chosen[s]]["id_accuracy"] - at[s, last]["id_accuracy"] for s in seeds]
        lines.append(
            [
                score,
                *(spread([auroc(s, last, group) for s in seeds]) for group in ("near", "far")),
                " ".join(str(epoch) for epoch in chosen.values()),
                *(_paired(gains(group, chosen)) for group in ("near", "far", "all")),
                _paired(accuracy),
                *(_paired(gains(group, crossed)) for group in ("near", "far")),
            ]
        )
        verdicts.append(verdict(score, gains("all", chosen)))
    head = [
        *("score", "AUROC near, last", "AUROC far, last", "best epoch"),
        *("best − last, near", "best − last, far", "best − last, all", "best − last, ID acc"),
        *("crossing − last, near", "crossing − last, far"),
    ]
    constraints = []
    for r in ends:
        when = f"epoch {crossed[r['seed']]}" if r["seed"] in crossed else "never"
        constraints.append(f"seed {r['seed']}: {r['constraint']:.4f} ± {r['std']:.4f}, {when}")
    return "\n".join(
        [
            f"AUROC of the stage that the validation OOD sets choose, and of epoch {last}, the"
            f" last: mean ± std over seeds {seeds} (each seed)",
            "",
            markdown(head, lines),
            "",
            "Constraint (± std of a mask), and the first epoch whose training loss is below it: "
            + "; ".join(constraints),
            "",
            *verdicts,
        ]
    )


def verdict(score: str, gains: Sequence[float]) -> str:
    """Whether the middle stage is better, from the gain in AUROC of every seed over all sets."""
    number = f"AUROC over near and far sets {_paired(gains)}"
    seeds = f"all {len(gains)} seeds" if len(gains) > 1 else "the one seed"
    if all(gain > 0 for gain in gains):
        return f"`{score}`: the middle stage is better than the end on {seeds} ({number})."
    if all(gain <= 0 for gain in gains):
        return f"`{score}`: the middle stage is not better than the end on {seeds} ({number})."
    wins = sum(gain > 0 for gain in gains)
    return (
        f"`{score}`: undecided, the middle stage is better than the end on {wins} of"
        f" {len(gains)} seeds ({number})."
    )


def _paired(values: Sequence[float]) -> str:
    """Mean ± std, and each seed's; of a single seed its value; a dash where no seed has one."""
    each = " ".join(f"{v:+.1f}" for v in values)
    return f"{spread(values, '+')} ({each})" if len(values) > 1 else each or "–"


def _unit(data: ImageSet) -> np.ndarray:
    return data.images / np.float32(255)


def _losses(logits: np.ndarray, labels: np.ndarray) -> Float[np.ndarray, " n"]:
    return np.asarray(losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels)), np.float64)
