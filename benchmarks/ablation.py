"""Suite `ablation`: OAL's forms and every outlier source on the embedded data, paired by seed.

    python -m benchmarks.run --suite ablation --output results.json [--seeds 0,1,2]
        [--cases kd,oal-random] [--workdir runs/ablation] [--config.a.b=VALUE ...]

All cases train the same number of steps on the same images. A row a case and seed, with every
metric of every OOD set; on the terminal mean +- std over the seeds, and the paired differences
to `kd`. Finished runs are skipped, so an interrupted suite goes on where it was.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks import cases
from benchmarks.cases import Case, Tables, columns, markdown, mean_of, spread

SCORE = "energy"
BASELINE = "kd"


def _oal(source: str = "knn", micl: str = "energy", image_share: float = 0.0) -> Case:
    outliers = {"outliers.source": source, "outliers.image_share": image_share}
    return Case({"method.name": "oal", "method.micl": micl, **outliers})


CASES = {
    "ce": Case({"method.name": "ce"}),
    "kd": Case({"method.name": "kd"}),
    "oal-reference": _oal(micl="reference"),
    "oal-alternate": _oal(micl="alternate"),
    "oal-knn": _oal("knn"),
    "oal-diffusion": _oal("diffusion"),
    "oal-random": _oal("random"),
    "oal-random-shapes": _oal("random", image_share=0.125),
    "oal-none-shapes": _oal("none", image_share=0.125),
    "pixel": Case({"method.name": "pixel"}),
}


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Train and evaluate every case for every seed; print the tables; return the rows."""
    plan = cases.parse("ablation", CASES, argv)
    rows, tables = cases.run("ablation", CASES, plan, lambda row: row.score == SCORE)
    print(summary(tables, plan.cases, plan.seeds))
    return rows


def summary(
    tables: Tables, names: Sequence[str], seeds: Sequence[int], baseline: str = BASELINE
) -> str:
    """Markdown: mean +- std of AUROC, FPR95, accuracy; then paired differences to a case."""
    sets = columns(tables[names[0], seeds[0]])
    metrics = {
        "FPR95 (OOD), all": "fpr_at_95_ood_tpr",
        "FPR95 (ID), all": "fpr_at_95_id_tpr",
        "ID acc": "id_accuracy",
    }
    lines = [
        [
            name,
            *(spread([mean_of(tables[name, s], m, "auroc") for s in seeds]) for m in sets.values()),
            *(
                spread([mean_of(tables[name, s], sets["all"], metric) for s in seeds])
                for metric in metrics.values()
            ),
        ]
        for name in names
    ]
    title = f"AUROC of the score `{SCORE}`, mean ± std over seeds {seeds}"
    text = [title, "", markdown(["case", *sets, *metrics], lines)]
    if baseline in names:
        differences = []
        for name in names:
            cells = []
            for members in sets.values():
                d = [
                    mean_of(tables[name, s], members, "auroc")
                    - mean_of(tables[baseline, s], members, "auroc")
                    for s in seeds
                ]
                cells.append(f"{spread(d, '+')} ({' '.join(f'{x:+.1f}' for x in d)})")
            if name != baseline:
                differences.append([name, *cells])
        text += ["", f"AUROC minus `{baseline}` of the same seed: mean ± std (each seed)", ""]
        text.append(markdown(["case", *sets], differences))
    return "\n".join(text)
