"""Result rows: means, CSV files in both layouts, the table for the terminal."""

import csv
import re

import numpy as np
import pytest

from oal_jax.errors import UserError
from oal_jax.evaluation import tables
from oal_jax.evaluation.tables import OPENOOD, Row

COLUMNS = (
    "score,dataset,group,auroc,aupr_in,aupr_out,fpr_at_95_ood_tpr,fpr_at_95_id_tpr,id_accuracy"
)
HEADER = "dataset,FPR@95,AUROC,AUPR_IN,AUPR_OUT,ACC\n"


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    sets = {"digits": "far", "bag": "near", "noise": "far", "sandal": "near"}
    single = [
        Row(score, name, group, *map(float, rng.uniform(0, 100, 5)), 91.5)
        for score in ("energy", "knn")
        for name, group in sets.items()
    ]
    return tables.with_means(single, ("near", "far", "validation"))


def test_means_are_unweighted_and_empty_groups_have_none(rows):
    assert [row.dataset for row in rows[8:]] == ["nearood", "farood"] * 2
    near = [row[3:] for row in rows if (row.score, row.group) == ("knn", "near")]
    np.testing.assert_allclose(near[-1], np.mean(near[:-1], axis=0))
    assert [row.dataset for row in rows if tables.is_mean(row)] == ["nearood", "farood"] * 2


def test_csv_is_exact_and_read_back(tmp_path, rows):
    path = tmp_path / "folder" / "ood.csv"
    tables.write_csv(path, rows)
    first, *lines, last = path.read_bytes().decode().split("\n")
    assert first == COLUMNS and last == "" and len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert re.fullmatch(r"\w+,\w+,(near|far)(,\d+\.\d{4}){6}", line)
        assert line.startswith(f"{row.score},{row.dataset},{row.group},{row.auroc:.4f},")
    for read, row in zip(tables.read_csv(path), rows, strict=True):
        assert read[:3] == row[:3] and read[3:] == pytest.approx(row[3:], abs=1e-4)


def test_cells_that_are_no_floats(tmp_path):
    tables.write_csv(tmp_path / "a.csv", [("a,b", None, 3, True, 0.5)], tuple("vwxyz"))
    assert (tmp_path / "a.csv").read_text() == 'v,w,x,y,z\n"a,b",,3,True,0.5000\n'


NAMES = [
    *("=1+1", "+1-1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1", "'=1", "''", "-", '="a",b'),
    *("a;=1", "a\t=1", "a,-b", "a\n@b", "a;'=1", 'a;"=1"', "a; =1", 'x","=1', "a;b"),
    *("plain", "a=b", "1e5", "-1.5", "+7", "-inf", " -1", "-1 ", "", "caf\xe9", "it's"),
]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_is_a_formula_and_all_read_back(tmp_path, name):
    row = Row(name, f"x{name}", name, *[-1.5] * 6)
    tables.write_csv(tmp_path / "ood.csv", [row])
    assert tables.read_csv(tmp_path / "ood.csv") == [row]
    _, _, text = (tmp_path / "ood.csv").read_bytes().decode().partition("\n")
    for separator in ",;\t":  # a spreadsheet takes one of these, by country
        for cells in csv.reader(re.split(r"[\r\n]+", text), delimiter=separator):
            formulas = [c for c in cells if c.strip().startswith(tuple("=+-@\uff1d"))]
            assert all(re.match(r"[-+](\d|inf)[\d.]*(,|$)", cell) for cell in formulas), formulas


def test_files_that_are_no_ood_csv(tmp_path):
    with pytest.raises(UserError, match="ood.csv is missing"):
        tables.read_csv(tmp_path / "ood.csv")
    (tmp_path / "ood.csv").write_text("score,auroc\nknn,1\n")
    with pytest.raises(UserError, match=r"ood.csv .* columns"):
        tables.read_csv(tmp_path / "ood.csv")


def test_openood_layout(tmp_path, rows):
    tables.write_openood(tmp_path / "knn.csv", rows, "knn")
    with (tmp_path / "knn.csv").open() as file:
        header, *lines = csv.reader(file)
    assert ",".join(header) + "\n" == HEADER
    order = ["bag", "sandal", "nearood", "digits", "noise", "farood"]
    assert [line[0] for line in lines] == order
    by_set = {row.dataset: row for row in rows if row.score == "knn"}
    for line in lines:
        row = by_set[line[0]]
        expected = [
            row.fpr_at_95_ood_tpr, row.auroc, row.aupr_in, row.aupr_out, row.id_accuracy
        ]  # fmt: skip
        assert line[1:] == [f"{value:.2f}" for value in expected]
    read = tables.read_openood(tmp_path / "knn.csv")
    assert [row.dataset for row in read] == order
    for row in read:
        for field in OPENOOD.values():
            assert getattr(row, field) == pytest.approx(
                getattr(by_set[row.dataset], field), abs=5e-3
            )


def test_published_files(tmp_path):
    path = tmp_path / "ebo.csv"
    path.write_text(
        "\ufeff,FPR@95, AUROC,AUPR_IN,AUPR_OUT,CCR_4,ACC\n\n"
        "cifar100,66.60 ± 4.46,86.36 ± 0.58,80,90,1,95.06\nTIN ,56.08,88.8,1,2,3,95.06\n"
    )
    first, second = tables.read_openood(path)
    assert first[:2] == ("", "cifar100") and second.dataset == "TIN"
    assert [getattr(first, field) for field in OPENOOD.values()] == [66.6, 86.36, 80, 90, 95.06]
    assert np.isnan(first.fpr_at_95_id_tpr)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column"),
        ("dataset,AUROC\n", "no column FPR@95"),
        ("set,FPR@95,AUROC,AUPR_IN,AUPR_OUT,ACC\na,1,2,3,4,5\n", "no column dataset"),
        (HEADER, "no lines"),
        (HEADER + "a,1,2,3,4\n", "line 2"),
        (HEADER + "a,1,2,3,4,5\nb,1,2,x,4,5\n", "line 3"),
    ],
)
def test_bad_published_files(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=rf"a\.csv.*{message}"):
        tables.read_openood(tmp_path / "a.csv")


@pytest.mark.parametrize("width", [30, 60, 200])
def test_text_table_is_aligned_and_complete(rows, width):
    text = tables.format_table(rows, width)
    _, *blocks = text.split("\n\n")
    for block in blocks:
        assert len({len(line) for line in block.strip("\n").split("\n")}) == 1
    if width > 30:
        assert max(map(len, text.split("\n"))) <= width
    assert text.index("nearood") < text.index("farood") < text.index("bag")
    assert text.count("91.50") == 2
    for row in rows:
        assert text.count(f"{row.auroc:.2f} / {row.fpr_at_95_ood_tpr:.2f}") == 1
    assert tables.format_table([])
