"""Models of the Hugging Face hub, from a local server that imitates it and from the cache.

Each call is a process of its own, since huggingface_hub reads its environment once.
"""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from small_stable_diffusion import SHIPPED

from oal_jax.config import Config, hub_names
from oal_jax.config.rules import validate
from oal_jax.errors import UserError
from oal_jax.generator import stable_diffusion as stable
from oal_jax.pretrained import diffusers_directory, hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = f"hub:org/small-sd@{COMMIT}"
SNAPSHOT = Path("models--org--small-sd", "snapshots", COMMIT)
# Other files of real repositories.
IGNORED = (
    *("v1-4.ckpt", "v1-4.safetensors", "README.md", "safety_checker/model.safetensors"),
    *("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"),
    *("unet/diffusion_pytorch_model.non_ema.safetensors", "text_encoder/pytorch_model.bin"),
    *("vae/diffusion_flax_model.msgpack", "feature_extractor/preprocessor_config.json"),
)
# Repositories that the server refuses: status and the hub's error code.
REFUSED = {
    "org/gated": (403, "GatedRepo"),
    "org/nowhere": (404, "RepoNotFound"),
    "org/other-commit": (404, "RevisionNotFound"),
    "org/broken": (503, ""),
}
READ = sorted(p.relative_to(SHIPPED).as_posix() for p in SHIPPED.rglob("*") if p.is_file())

_LOCATE = """
import sys
from oal_jax.errors import UserError
from oal_jax.pretrained import hub
for name in sys.argv[1:]:
    try:
        print(hub.locate(name))
    except UserError as error:
        print("UserError", error)
"""


class _Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def _answer(self) -> bytes:
        path = self.path.partition("?")[0]
        repository = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        headers, body, status = {}, b"", 200
        if repository in REFUSED:
            status, code = REFUSED[repository]
            headers = {"X-Error-Code": code} if code else {}
        elif "/tree/" in path:  # versions 2 of huggingface_hub list files by it
            files = [{"type": "file", "path": n, "size": 1, "oid": n} for n in (*READ, *IGNORED)]
            body = json.dumps(files).encode()
        elif path.startswith("/api/models/"):
            files = [{"rfilename": name} for name in (*READ, *IGNORED)]
            answer = {"id": repository, "sha": COMMIT, "siblings": files}
            body = json.dumps(answer).encode()
        else:
            name = path.split(f"/resolve/{COMMIT}/")[1]
            body = (SHIPPED / name).read_bytes() if name in READ else b"not to be fetched"
            headers = {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": COMMIT}
            if self.command == "GET":
                self.server.fetched.append(name)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        return body

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as running:
        running.fetched = []
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def address(server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def locate(cache: Path, endpoint: str, *names: str, **more: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(cache.parent), "HF_HUB_CACHE": str(cache)}
    environment |= {"HF_ENDPOINT": endpoint, "NO_PROXY": "*", **more}
    run = subprocess.run(
        [sys.executable, "-c", _LOCATE, *names],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.splitlines()


def test_fetches_the_files_that_are_read_once(server, tmp_path):
    cache = tmp_path / "cache"
    first, second = locate(cache, address(server), MODEL, MODEL)
    assert Path(first) == Path(second) == cache / SNAPSHOT
    names = sorted(p.relative_to(first).as_posix() for p in Path(first).rglob("*") if p.is_file())
    assert names == sorted(server.fetched) == READ
    assert all(Path(first, name).read_bytes() == (SHIPPED / name).read_bytes() for name in READ)
    stable.check(Path(first))

    # An interrupted download is completed.
    Path(first, "vae", "config.json").unlink()
    shutil.rmtree(cache / "models--org--small-sd" / "blobs")
    for name in READ:
        target = Path(first, name)
        target.unlink(missing_ok=True)
        if not name.startswith("vae/"):
            shutil.copy(SHIPPED / name, target)
    server.fetched.clear()
    locate(cache, address(server), MODEL)
    assert sorted(server.fetched) == [name for name in READ if name.startswith("vae/")]


def test_refusals_of_the_hub_are_one_line(server, tmp_path):
    names = [f"hub:{repository}@{COMMIT}" for repository in REFUSED]
    lines = locate(tmp_path / "cache", address(server), *names)
    assert len(lines) == len(names) and all(line.startswith("UserError hub:") for line in lines)
    for line, word in zip(lines, ("licence", "no such", "no such", "HTTP 503"), strict=True):
        assert word in line


def test_a_cached_model_needs_no_network(tmp_path):
    """Offline by choice, and without a connection; another model is one line."""
    cache = tmp_path / "cache"
    shutil.copytree(SHIPPED, cache / SNAPSHOT)
    other = f"hub:org/other@{COMMIT}"
    cached, missing = locate(cache, "http://127.0.0.1:9", MODEL, other, HF_HUB_OFFLINE="1")
    assert Path(cached) == cache / SNAPSHOT
    assert other in missing and str(cache) in missing and "HF_HUB_OFFLINE" in missing
    cached, missing = locate(cache, "http://127.0.0.1:9", MODEL, other)
    assert Path(cached) == cache / SNAPSHOT
    assert other in missing and "Connection refused" in missing


@pytest.mark.slow
def test_the_command_exits_with_one_line_and_status_2(tmp_path):
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "oal_jax.main", "--config", "configs/fashion.py"]
    flags = ["--stage", "generator", f"--config.generator.directory={MODEL}"]
    run = subprocess.run(
        [*command, "--workdir", str(tmp_path / "run"), *flags],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and MODEL in run.stderr


@pytest.mark.parametrize(
    "name",
    [
        *("hub:", "hub:small-sd", "hub:org/small-sd", "hub:org/small-sd@main"),
        *(f"hub:org/small-sd@{COMMIT[:-1]}", f"hub:../x/y@{COMMIT}", f"hub:org@{COMMIT}"),
    ],
)
def test_a_name_without_a_commit_is_refused(name):
    config = Config()
    config.generator.directory = name
    with pytest.raises(UserError, match="hub:ORG/NAME@COMMIT"):
        validate(config)


def test_names_and_paths():
    assert hub_names.parse("~/models/sd") is None and hub_names.parse("") is None
    assert str(hub_names.parse(MODEL)) == MODEL
    assert hub.locate("~/models") == Path.home() / "models"


def test_needed_files():
    needed = diffusers_directory.needed
    assert needed((*READ, *IGNORED), "here") == READ
    unet = "unet/diffusion_pytorch_model"
    without = [name for name in READ if name != f"{unet}.safetensors"]
    half = [f"{unet}.fp16.safetensors", f"{unet}.bin"]
    assert f"{unet}.fp16.safetensors" in needed([*without, *half], "here")
    shards = [f"{unet}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    sharded = [*shards, f"{unet}.safetensors.index.json"]
    others = [f"{unet}.fp16-00001-of-00002.safetensors", f"{unet}.safetensors.index.fp16.json"]
    assert set(needed([*without, *sharded, *others], "here")) == {*without, *sharded}
    assert set(needed([*without, *others], "here")) == {*without, *others}
    with pytest.raises(UserError, match=r"pickled.*pretrained.convert --input \S+\.bin --output"):
        needed([*without, f"{unet}.bin"], "here")
    with pytest.raises(UserError, match=r"no tokenizer/vocab\.json"):
        needed([name for name in READ if "vocab" not in name], "here")
    other = [name for name in READ if "vocab" not in name and "merges" not in name]
    assert "tokenizer/tokenizer.json" in needed([*other, "tokenizer/tokenizer.json"], "here")
    for folder, model in {"transformer": "Diffusion 3", "text_encoder_2": "XL"}.items():
        with pytest.raises(UserError, match=model):
            needed([*READ, f"{folder}/config.json"], "here")
