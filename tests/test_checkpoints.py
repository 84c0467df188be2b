"""Checkpoints: damage of any file, saves that training goes on beside, interruptions."""

import contextlib
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from toy_training import PLAN, assert_same, fit, fresh, latest, rows

from oal_jax.errors import UserError
from oal_jax.training.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(state, logged rows) of a run that nothing stopped."""
    directory = tmp_path_factory.mktemp("straight")
    return fit(directory), rows(directory)


def truncate(checkpoint):
    """Halve the file of a checkpoint that holds the arrays."""
    largest = max((checkpoint / "default" / "d").iterdir(), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def test_a_damaged_checkpoint_falls_back_on_the_one_before(tmp_path, straight, caplog):
    fit(tmp_path, plan=PLAN._replace(epochs=3))
    truncate(tmp_path / "checkpoints" / "21")
    with caplog.at_level("WARNING", logger="absl"):
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        state = checkpoints.restore(fresh())
        checkpoints.close()
    assert int(state.step) == 14
    messages = [r.getMessage() for r in caplog.records]
    warnings = [message for message in messages if message.startswith("checkpoint ")]
    assert len(warnings) == 1 and "21 is damaged" in warnings[0] and "\n" not in warnings[0]
    # The damaged one is out of the way of the next save at its step.
    assert_same(tmp_path, fit(tmp_path), straight)
    assert latest(tmp_path) == 28


def test_when_no_checkpoint_can_be_read_nothing_is_thrown_away(tmp_path):
    fit(tmp_path)
    truncate(tmp_path / "checkpoints" / "21")
    truncate(tmp_path / "checkpoints" / "28")
    with pytest.raises(UserError, match="no checkpoint under"):
        fit(tmp_path)
    assert latest(tmp_path) == 28


def test_a_checkpoint_is_of_its_step_however_far_training_goes_on(tmp_path):
    # The state is donated to the next step while the save is under way.
    checkpoints = Checkpoints(tmp_path, keep=100)
    advance = jax.jit(
        lambda s: s.replace(step=s.step + 1, params=jax.tree.map(lambda p: p + 1, s.params)),
        donate_argnums=0,
    )
    zero = fresh().replace(params={"w": jnp.zeros((300, 1000))})
    state = jax.tree.map(jnp.copy, zero)
    for _ in range(3):
        state = advance(state)
        checkpoints.save(state)
        state = advance(advance(state))
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore(zero)
    checkpoints.close()
    assert int(restored.step) == 7
    assert np.unique(restored.params["w"]).tolist() == [7.0]


def test_an_interruption_in_a_save_waits_and_is_not_lost(tmp_path, monkeypatch):
    whole = ocp.CheckpointManager.save

    def swallowing(self, *arguments, **more):
        with contextlib.suppress(KeyboardInterrupt):  # as Orbax was seen to
            signal.raise_signal(signal.SIGINT)
        return whole(self, *arguments, **more)

    monkeypatch.setattr(ocp.CheckpointManager, "save", swallowing)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path)
    assert latest(tmp_path) == PLAN.steps_per_epoch
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_of_any_file_is_noticed_or_harmless(tmp_path, how):
    checkpoints = Checkpoints(tmp_path / "whole")
    for step in (1, 2):
        state = fresh().replace(step=jnp.int32(step), params={"w": jnp.full(5, float(step))})
        checkpoints.save(state)
    checkpoints.close()
    names = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole" / "2").rglob("*")]
    files = [name for name in names if (tmp_path / "whole" / name).is_file()]
    assert len(files) > 5
    for number, name in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        path = copy / name
        if not path.stat().st_size and how != "deleted":
            continue
        DAMAGES[how](path)
        checkpoints = Checkpoints(copy)
        restored = checkpoints.restore(state)
        checkpoints.close()
        step = int(restored.step)
        assert step == 1 or name.parts[1] in ("_CHECKPOINT_METADATA", "commit_success.txt"), name
        np.testing.assert_array_equal(restored.params["w"], float(step))


@pytest.mark.parametrize("text", ["{}", "[]", "3", "null", "[" * 100_000, '{"default/d/x": 1}'])
def test_forged_digests_do_not_vouch(tmp_path, text):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(fresh())
    checkpoints.close()
    (tmp_path / "0" / "digests.json").write_text(text)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        checkpoints.restore(fresh())
    checkpoints.close()
