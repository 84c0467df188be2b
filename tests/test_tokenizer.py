"""CLIP's tokenizer from its files; tests/test_parity_diffusers.py compares it with another."""

import json

import numpy as np
import pytest

from oal_jax.errors import UserError
from oal_jax.generator import create, tokenizer


@pytest.fixture
def folder(tmp_path):
    create.write_tokenizer(tmp_path, ("cat", "pickup truck"), 16)
    return tmp_path


def pieces(words: tokenizer.Tokenizer, text: str) -> list[str]:
    return [words.model.id_to_token(i) for i in words.pieces(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The CAT", ["the</w>", "cat</w>"]),
        (" pickup\t\n truck ", ["pickup</w>", "truck</w>"]),
        ("cat's", ["cat</w>", "'", "s</w>"]),
        ("12", ["1</w>", "2</w>"]),
        ("!?", ["!", "?</w>"]),
        ("é", ["Ã", "©</w>"]),
        ("e\u0301", ["Ã", "©</w>"]),
        ("cat\u732bcat", ["cat</w>", "ç", "Į", "«</w>", "cat</w>"]),
        ("\x07", []),
    ],
)
def test_pieces(folder, text, expected):
    assert pieces(tokenizer.read(folder), text) == expected


def test_marks_and_padding(folder):
    words = tokenizer.read(folder)
    ids = words.encode(["a cat", ""], 6)
    assert ids.dtype == np.int32 and ids[:, 0].tolist() == [words.begin] * 2
    assert ids[1].tolist() == [words.begin] + [words.end] * 5
    with pytest.raises(UserError, match="'a a a a a' has 7 tokens"):
        words.encode(["a cat", "a a a a a"], 6)
    # v2 pads with "!".
    special = folder / "special_tokens_map.json"
    content = json.loads(special.read_text()) | {"pad_token": {"content": "!"}}
    special.write_text(json.dumps(content))
    words = tokenizer.read(folder)
    ids = words.encode([""], 4)[0].tolist()
    assert ids == [words.begin, words.end, *[words.model.token_to_id("!")] * 2]
    special.write_text(json.dumps(content | {"pad_token": "cats"}))
    with pytest.raises(UserError, match="pad_token 'cats'"):
        tokenizer.read(folder)


def test_tokenizer_json_in_place_of_both(folder):
    words = tokenizer.read(folder)
    words.model.save(str(folder / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    other = tokenizer.read(folder)
    assert other.pieces("The pickup 猫 cat") == words.pieces("The pickup 猫 cat")
    assert other[1:] == words[1:]


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_missing_and_damaged_files(folder, name):
    (folder / name).write_text("{}" if name == "merges.txt" else "[")
    with pytest.raises(UserError, match="not a CLIP tokenizer") as raised:
        tokenizer.read(folder)
    assert "\n" not in str(raised.value)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: no such file"):
        tokenizer.read(folder)
