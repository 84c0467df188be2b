"""Suite `shortcuts`: what the default leaves out, and what that changes in the result.

    python -m benchmarks.run --suite shortcuts --output results.json [--seeds 0,1,2]
        [--cases views-all,views-2] [--workdir runs/shortcuts] [--config.a.b=VALUE ...]

`views-N`: the teacher's outputs on N augmented views an image are cached, and the student sees
those; `views-all`: the teacher runs anew in every step, on a new view an epoch, as published.
`dpm-20`, `dpm-10`: diffusion outliers by so many steps of DPM-Solver++; `pndm-50`: by the published
sampler's 50. None has outlier images. A row a case and seed; on the terminal, of either kind,
mean +- std over the seeds and the paired differences to the published form. Finished runs are
skipped.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import cases
from benchmarks.ablation import SCORE, summary
from benchmarks.cases import Case


def _sampled(sampler: str, steps: int) -> Case:
    changes = {"latents.sampler": sampler, "latents.steps": steps}
    return Case({"outliers.source": "diffusion"} | changes)


# The published form of each kind, and the shorter ones.
KINDS: Mapping[str, Mapping[str, Case]] = {
    "views-all": {
        "views-all": Case({"teacher.views": 0}),
        **{f"views-{n}": Case({"teacher.views": n}) for n in (1, 2, 4, 8)},
    },
    "pndm-50": {
        "pndm-50": _sampled("pndm", 50),
        "dpm-20": _sampled("dpm_solver_pp_2m", 20),
        "dpm-10": _sampled("dpm_solver_pp_2m", 10),
    },
}
CASES = {name: case for kind in KINDS.values() for name, case in kind.items()}


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Train and evaluate every case for every seed; print the tables; return the rows."""
    settings = {"evaluation.scores": [SCORE], "data.csid": ["none"], "outliers.image_share": 0.0}
    plan = cases.parse("shortcuts", CASES, argv, settings)
    rows, tables = cases.run("shortcuts", CASES, plan, lambda row: row.score == SCORE)
    for published, kind in KINDS.items():
        names = [name for name in plan.cases if name in kind]
        if names:
            print(summary(tables, names, plan.seeds, published), end="\n\n")
    return rows
