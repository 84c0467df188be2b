"""What vouches for a finished run: an edited config and a damaged log are noticed."""

import json
import shutil

import pytest

import oal_jax
from oal_jax.errors import UserError
from oal_jax.stages import run as pipeline


@pytest.fixture
def copy(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("key", "value"), [("evaluation.keep_id", 0.5), ("student.width", 4), ("seed", 7)]
)
def test_an_edited_config_is_refused_with_its_key_and_both_values(copy, key, value):
    path = copy / "config.json"
    flat = json.loads(path.read_text())
    path.write_text(json.dumps(flat | {key: value}))
    with pytest.raises(UserError) as refused:
        oal_jax.load(copy)
    for part in (str(path), key, repr(value), repr(flat[key])):
        assert part in str(refused.value)


@pytest.mark.parametrize("how", ["cut", "emptied", "deleted"])
def test_a_damaged_log_comes_back(copy, how, capsys):
    path = copy / "metrics.jsonl"
    whole = path.read_bytes()
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2] if how == "cut" else b"")
    pipeline.run(pipeline.resolve(copy).config, copy)
    assert path.read_bytes() == whole
    assert "metrics.jsonl" in capsys.readouterr().out
