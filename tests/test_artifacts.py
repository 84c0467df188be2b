"""What a stage leaves: whole files, manifests that vouch for them, and nobody's files deleted."""

import errno
import json
import os
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from oal_jax.data import manifest
from oal_jax.errors import UserError
from oal_jax.pretrained import diffusers_directory
from oal_jax.runtime import artifacts, profile, writing
from oal_jax.training.log import MetricsLog

INPUTS = {"config": {"a": 1, "b": [1, 2]}, "stages": {}}


def finished(directory, inputs=INPUTS, name="x.safetensors"):
    artifacts.begin(directory, inputs)
    path = directory / name
    artifacts.write_tensors(path, {"x": np.arange(6.0).reshape(2, 3)})
    artifacts.finish(directory, "stage", inputs, [path], 1.0)
    return path


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def full(_):
    """Stands for `os.fsync` on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.json"
    artifacts.write_json(path, {"old": 1})

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        artifacts.write_json(path, {"new": 2})
    assert artifacts.read_json(path) == {"old": 1}
    assert names(path.parent) == ["x.json"]


def test_readers_see_the_old_file_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with writing.whole_file(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(KeyboardInterrupt), writing.whole_file(path, "w") as file:
        file.write("cut short")
        raise KeyboardInterrupt
    assert path.read_text() == "new" and names(tmp_path) == ["x.txt"]


def test_a_device_is_written_to_and_stays_a_device(tmp_path):
    ours, theirs = os.openpty()  # a device that nobody else uses
    link = tmp_path / "link"
    link.symlink_to(os.ttyname(theirs))
    for path in (Path(os.ttyname(theirs)), link):
        artifacts.write_output(path, b"x")
        assert os.read(ours, 10) == b"x"
        assert stat.S_ISCHR(os.stat(path).st_mode)
    assert link.is_symlink() and names(tmp_path) == ["link"]
    os.close(ours)
    os.close(theirs)


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    artifacts.write_output(pipe, b"x")
    assert os.read(reader, 10) == b"x"
    os.close(reader)
    assert pipe.is_fifo() and names(tmp_path) == ["pipe"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_to_a_file_stays_and_the_file_is_replaced(tmp_path, exists):
    (tmp_path / "files").mkdir()
    (tmp_path / "link").symlink_to("files/real")
    if exists:
        (tmp_path / "files" / "real").write_text("old")
    artifacts.write_output(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "files" / "real").read_text() == "new"
    assert names(tmp_path / "files") == ["real"]


def test_a_standard_stream_is_written_to_wherever_it_goes(tmp_path):
    log = tmp_path / "log"
    log.write_text("before\n")
    code = "from pathlib import Path; from oal_jax.runtime import artifacts; print('first');"
    code += "artifacts.write_output(Path('/dev/stdout'), b'table\\n'); print('last')"
    with log.open("a") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    assert log.read_text() == "before\nfirst\ntable\nlast\n" and names(tmp_path) == ["log"]


def hold(lock):
    with writing.alone(lock, "busy"):
        return lock.read_text()


# Each writes below the folder of a run, which may be someone else's.
WRITERS = {
    "config.json": lambda path: artifacts.write_json(path, {"new": 1}),
    "x.safetensors": lambda path: artifacts.write_tensors(path, {"x": np.zeros(3)}),
    ".lock": lambda path: hold(path),
    "metrics.jsonl": lambda path: MetricsLog(path.parent, "train").close(),
    "vae.json": lambda path: diffusers_directory.write_json(path, {}),
    "SHA256SUMS": lambda path: manifest.write(path.parent),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ["{name}", "{name}.partial", "dangling"])
def test_links_below_a_run_never_lead_outside(tmp_path, name, kind):
    outside, run = tmp_path / "outside", tmp_path / "run"
    run.mkdir()
    (run / "other").write_text("x")
    if kind != "dangling":
        outside.write_text("theirs")
    (run / (name if kind == "dangling" else kind.format(name=name))).symlink_to(outside)
    with suppress(UserError):
        WRITERS[name](run / name)
    assert names(tmp_path) == (["outside", "run"] if kind != "dangling" else ["run"])
    assert kind == "dangling" or outside.read_text() == "theirs"


@pytest.mark.parametrize("name", WRITERS)
def test_pipes_below_a_run_are_refused_by_name(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=name):
        WRITERS[name](tmp_path / name)
    assert (tmp_path / name).is_fifo() and ".partial" not in str(names(tmp_path))


def test_links_beside_an_output_are_not_followed(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    for suffix in (".partial", ".tmp", ".lock"):
        (tmp_path / f"scores.csv{suffix}").symlink_to("theirs")
    artifacts.write_output(tmp_path / "scores.csv", b"new")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert (tmp_path / "scores.csv").read_bytes() == b"new"


def test_a_lock_keeps_what_its_file_holds(tmp_path):
    (tmp_path / "lock").write_text("kept")
    with writing.alone(tmp_path / "lock", "busy"), pytest.raises(UserError, match="busy"):
        hold(tmp_path / "lock")
    assert hold(tmp_path / "lock") == "kept"


def test_a_replaced_file_keeps_its_permissions_and_a_new_one_has_the_usual(tmp_path):
    private, new, usual = (tmp_path / name for name in ("private", "new", "usual"))
    usual.touch()
    private.touch(0o600)
    for path in (private, new):
        artifacts.write_output(path, b"x")
    mode = lambda path: stat.S_IMODE(path.stat().st_mode)
    assert mode(private) == 0o600 and mode(new) == mode(usual)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "x").touch()
    (tmp_path / "link").symlink_to("old")
    with pytest.raises(KeyboardInterrupt), writing.whole_folder(tmp_path / "link") as folder:
        (folder / "y").touch()
        raise KeyboardInterrupt
    assert names(tmp_path / "old") == ["x"] and names(tmp_path) == ["link", "old"]
    with writing.whole_folder(tmp_path / "link") as folder:
        (folder / "y").touch()
    assert names(tmp_path / "old") == ["y"] and names(tmp_path) == ["link", "old"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/x"), writing.whole_folder(tmp_path / "file/x"):
        pass


def test_a_place_where_no_file_can_be_is_refused_by_name(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "to_folder").symlink_to("folder")
    for name in ("folder", "to_folder", "file/x"):
        with pytest.raises(UserError, match=name):
            artifacts.write_bytes(tmp_path / name, b"")
    with pytest.raises(UserError, match="missing/x"), writing.whole_file(tmp_path / "missing/x"):
        pass
    assert names(tmp_path) == ["file", "folder", "to_folder"]


def test_tensors_round_trip_and_damage_is_told(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": np.arange(12, dtype=np.int32).reshape(3, 4).T, "b": np.float16([1.5])}
    artifacts.write_tensors(path, tensors)
    for name, value in artifacts.read_tensors(path).items():
        np.testing.assert_array_equal(value, tensors[name])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"x\.safetensors is damaged"):
        artifacts.read_tensors(path)
    path.unlink()
    with pytest.raises(UserError, match=r"x\.safetensors is missing"):
        artifacts.read_tensors(path)


def test_a_finished_stage_is_done_on_its_inputs_alone(tmp_path):
    stage = tmp_path / "stage"
    assert not artifacts.is_done(stage, INPUTS)
    path = finished(stage)
    assert artifacts.is_done(stage, INPUTS)
    assert not artifacts.is_done(stage, {**INPUTS, "config": {"a": 2, "b": [1, 2]}})
    manifest = artifacts.read_json(stage / artifacts.MANIFEST)
    entry = manifest["outputs"]["x.safetensors"]
    assert entry["sha256"] == artifacts.sha256(path)
    assert entry["tensors"] == {"x": ["F64", 2, 3]}
    assert artifacts.output_hashes(stage) == {"x.safetensors": entry["sha256"]}
    assert manifest["versions"]["jax"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: p.unlink(), "is missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:40]), "has 40 bytes instead of"),
        (flip, "has another sha256"),
    ],
)
def test_a_damaged_output_is_refused_by_name(tmp_path, damage, said):
    path = finished(tmp_path / "stage")
    damage(path)
    with pytest.raises(UserError, match=rf"x\.safetensors {said}"):
        artifacts.is_done(tmp_path / "stage", INPUTS)
    # With other inputs the stage runs again anyway: nothing to refuse.
    assert not artifacts.is_done(tmp_path / "stage", {"config": {}, "stages": {}})


WHOLE = {"stage": "features", "inputs": {}, "outputs": {}, "seconds": 1.0, "versions": {}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"inputs": {',
        "[" * 100_000,
        "[]",
        "{}",
        *map(
            json.dumps,
            (
                WHOLE | {"inputs": 3},
                WHOLE | {"outputs": []},
                WHOLE | {"outputs": {"x": {}}},
                WHOLE | {"outputs": {"../x": {"sha256": "", "bytes": 0}}},
                WHOLE | {"outputs": {"/etc/passwd": {"sha256": "", "bytes": 0}}},
                WHOLE | {"sha256": "0" * 64},
                WHOLE | {"sha257": artifacts.fingerprint(WHOLE)},
            ),
        ),
    ],
)
def test_a_damaged_or_foreign_manifest_is_refused(tmp_path, text):
    finished(tmp_path / "stage")
    (tmp_path / "stage" / artifacts.MANIFEST).write_text(text)
    for read in (
        lambda: artifacts.is_done(tmp_path / "stage", INPUTS),
        lambda: artifacts.output_hashes(tmp_path / "stage"),
        lambda: artifacts.copy_stage(tmp_path / "stage", tmp_path / "copy"),
    ):
        with pytest.raises(UserError, match=r"manifest\.json is damaged; delete"):
            read()


def test_a_flip_anywhere_in_a_manifest_is_refused(tmp_path):
    finished(tmp_path / "stage")
    path = tmp_path / "stage" / artifacts.MANIFEST
    whole, value = path.read_bytes(), json.loads(path.read_bytes())
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1
        path.write_bytes(data)
        try:
            same = json.loads(data) == value  # a space became another one
        except ValueError:
            same = False
        if not same:
            with pytest.raises(UserError, match=r"manifest\.json is damaged"):
                artifacts.output_hashes(tmp_path / "stage")


def test_begin_keeps_what_the_same_inputs_left(tmp_path):
    stage = tmp_path / "stage"
    artifacts.begin(stage, INPUTS)
    (stage / "checkpoint").write_text("half-way")
    artifacts.begin(stage, INPUTS)
    assert (stage / "checkpoint").read_text() == "half-way"
    assert not artifacts.is_done(stage, INPUTS)


def test_begin_deletes_what_other_inputs_left(tmp_path):
    stage = tmp_path / "stage"
    finished(stage)
    (stage / "checkpoints" / "3").mkdir(parents=True)
    (stage / "checkpoints" / "3" / "x").write_text("x")
    artifacts.begin(stage, {"config": {"a": 2}})
    assert names(stage) == ["started.json"]
    # Nor is anything taken for its own by a run of the first inputs.
    (stage / "checkpoint").write_text("of the second")
    artifacts.begin(stage, INPUTS)
    assert names(stage) == ["started.json"]


def test_a_deletion_cut_short_leaves_nothing_to_resume(tmp_path, monkeypatch):
    stage = tmp_path / "stage"
    artifacts.begin(stage, INPUTS)
    (stage / "checkpoints").mkdir()
    (stage / "checkpoints" / "x").write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr(artifacts.shutil, "rmtree", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            artifacts.begin(stage, {"config": {}})
    artifacts.begin(stage, INPUTS)
    assert names(stage) == ["started.json"]


def test_files_that_no_run_made_are_not_deleted(tmp_path):
    stage = tmp_path / "train"
    stage.mkdir()
    (stage / "photo.jpg").write_text("the user's own")
    with pytest.raises(UserError, match="holds files that no run made"):
        artifacts.begin(stage, INPUTS)
    finished(tmp_path / "other")
    with pytest.raises(UserError, match="holds files that no run made"):
        artifacts.copy_stage(tmp_path / "other", stage)
    assert names(stage) == ["photo.jpg"]
    (tmp_path / "report").write_text("a file")
    with pytest.raises(UserError, match="is a file in the place of"):
        artifacts.begin(tmp_path / "report", INPUTS)


def test_a_stage_that_is_a_link_is_never_emptied(tmp_path):
    outside = tmp_path / "outside"
    finished(outside)
    (outside / "theirs").write_text("theirs")
    (tmp_path / "train").symlink_to(outside)
    with pytest.raises(UserError, match="train is a link"):
        artifacts.begin(tmp_path / "train", {"config": {"a": 2}})
    (tmp_path / "profile").symlink_to(tmp_path)
    with pytest.raises(UserError, match="profile/outside is behind a link"):
        profile.trace(tmp_path / "profile" / "outside").__enter__()
    assert (outside / "theirs").read_text() == "theirs" and len(names(outside)) == 4


def test_a_link_in_a_stage_is_deleted_and_its_target_is_not(tmp_path):
    stage, outside = tmp_path / "stage", tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_text("x")
    finished(stage)
    (stage / "link").symlink_to(outside)
    artifacts.begin(stage, {})
    assert names(stage) == ["started.json"]
    assert (outside / "x").exists()


def test_a_copied_stage_is_done_and_a_torn_copy_is_not(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    finished(source)
    artifacts.copy_stage(source, target)
    assert artifacts.is_done(target, INPUTS)
    write = artifacts.write_bytes

    def stops_at_the_manifest(path, data):
        if path.name == artifacts.MANIFEST:
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_bytes", stops_at_the_manifest)
        with pytest.raises(KeyboardInterrupt):
            artifacts.copy_stage(source, target)
    assert not artifacts.is_done(target, INPUTS)
    artifacts.copy_stage(source, target)
    assert artifacts.is_done(target, INPUTS)


def test_json_of_an_output_is_hashed_as_it_is_on_disk(tmp_path):
    artifacts.begin(tmp_path / "s", INPUTS)
    path = tmp_path / "s" / "source.json"
    artifacts.write_json(path, {"b": 1, "a": [1, 2]})
    artifacts.finish(tmp_path / "s", "s", INPUTS, [path], 0.0)
    assert json.loads(path.read_text()) == {"a": [1, 2], "b": 1}
    assert artifacts.is_done(tmp_path / "s", INPUTS)
