"""Suite `latent_map`: whether the student's map of latents says what the student says of them."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import latent_map

CONFIG = Path(__file__).parent.parent / "configs" / "fashion.py"


def test_the_summary_has_a_line_a_case_and_kind():
    def found(seed, kind, value):
        numbers = dict.fromkeys(latent_map.NUMBERS, value)
        return {"case": "a", "seed": seed, "kind": kind, **numbers}

    rows = [found(seed, kind, 0.5 + seed) for seed in (0, 1) for kind in ("id", "normal")]
    lines = latent_map.summary(rows).splitlines()
    assert len(lines) == 4
    spread = "1.0 ± 0.7"
    assert lines[2] == f"| a | id | 1.00 | {spread} | {spread} | 100.0 ± 70.7 | 100.0 ± 70.7 |"


@pytest.mark.slow
def test_maps_are_compared_with_the_student_on_decoded_latents(tmp_path, capsys):
    flags = [f"--config={CONFIG}", "--config.smoke=True", "--seeds=0"]
    names = ("random", "guided-stage2")
    rows = latent_map.run([*flags, f"--cases={','.join(names)}", f"--workdir={tmp_path}"])
    assert [(r["case"], r["kind"]) for r in rows] == [
        (name, kind) for name in names for kind in latent_map.KINDS
    ]
    for r in rows:
        assert np.isfinite([r[n] for n in latent_map.NUMBERS]).all() and abs(r["cosine"]) <= 1
        of_itself = r["auroc_map"], r["auroc_pixels"]
        assert r["kind"] != "id" or of_itself == (0.5, 0.5)
    assert "| guided-stage2 | outliers |" in capsys.readouterr().out
