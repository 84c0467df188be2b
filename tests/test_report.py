"""Tables and the HTML report of a protocol run on small Gaussian features."""

import base64
import csv
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread

from oal_jax.errors import UserError
from oal_jax.evaluation import (
    Inputs,
    Row,
    bootstrap,
    evaluate,
    format_table,
    protocol,
    write_tables,
)
from oal_jax.evaluation.metrics import ood_metrics
from oal_jax.evaluation.search import Trial
from oal_jax.evaluation.tables import with_means
from oal_jax.report import figures, run_page
from oal_jax.report.run_page import ReportInputs, write_report
from oal_jax.runtime.artifacts import write_bytes
from oal_jax.scores import Head, Outputs

CLASSES, WIDTH = 4, 8
GROUPS = {"bag": "near", "sandal": "near", "digits": "far", "noise": "validation"}
SCORES = ["energy", "knn"]
COLUMNS = (
    "score,dataset,group,auroc,aupr_in,aupr_out,fpr_at_95_ood_tpr,fpr_at_95_id_tpr,id_accuracy"
)
VOID = {"meta", "img", "br", "path", "use", "rect"}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    means = 3 * np.eye(CLASSES, WIDTH, dtype=np.float32)
    head = Head(means.T, np.zeros(CLASSES, np.float32))

    def outputs(features):
        features = features.astype(np.float32)
        return Outputs(features @ head.kernel, features)

    def labelled(n):
        labels = rng.integers(0, CLASSES, n)
        return Inputs(outputs(means[labels] + rng.normal(size=(n, WIDTH))), labels=labels)

    sets = {
        name: Inputs(outputs(shift + rng.normal(size=(50, WIDTH))))
        for name, shift in {"digits": 0.0, "bag": 0.6, "noise": -0.5, "sandal": 0.9}.items()
    }
    return {
        "id_train": labelled(120),
        "id_val": labelled(60),
        "id_test": labelled(80),
        "ood": sets,
        "groups": GROUPS,
        "head": head,
    }


@pytest.fixture(scope="module")
def evaluation(data):
    return evaluate(SCORES, **data, params={"knn": {"k": 5}}, batch_size=64)


@pytest.fixture(scope="module")
def inputs(data, evaluation):
    rng = np.random.default_rng(1)
    steps = np.arange(1000)
    images = rng.integers(0, 256, (CLASSES, 3, 28, 28, 1), dtype=np.uint8)
    return ReportInputs(
        run_name="<script>alert('x')</script>",
        method="oal & more",
        seed=3,
        id_accuracy=91.5,
        date="2025-01-02",
        rows=evaluation.rows,
        config={"train": {"epochs": 5}, "note": "<b>bold</b>"},
        versions={"jax": "0.10.2"},
        validation_rows=evaluation.validation_rows,
        id_scores=evaluation.id_scores,
        ood_scores=evaluation.ood_scores,
        groups=GROUPS,
        thresholds=evaluation.thresholds,
        id_features=data["id_test"].outputs.features,
        id_labels=data["id_test"].labels,
        class_names=["coat", "shirt", "<i>", "boot & shoe"],
        ood_features={"bag": data["ood"]["bag"].outputs.features},
        outlier_features=rng.normal(size=(20, WIDTH)),
        losses={"cross-entropy": np.stack([steps, 1 / (1 + steps)], axis=1)},
        val_accuracy=np.array([[100, 50.0], [200, 75.0]]),
        id_samples=images,
        outlier_samples=images[::-1],
    )


@pytest.fixture(scope="module")
def full(data, inputs):
    """As `inputs`, and all that comes with csid sets, images and a search."""
    rng = np.random.default_rng(2)
    shifted = data["id_test"].outputs.features + 0.3
    csid = Inputs(Outputs(shifted @ data["head"].kernel, shifted), labels=data["id_test"].labels)
    sets = {**data, "ood": {**data["ood"], "fog": csid}, "groups": {**GROUPS, "fog": "csid"}}
    result = evaluate(SCORES, **sets, params={"knn": {"k": 5}}, batch_size=64)
    pictures = {
        name: run_page.extremes(
            result.ood_scores["energy"][name], rng.integers(0, 256, (50, 28, 28, 3), dtype=np.uint8)
        )
        for name in ("bag", "digits")
    }
    found = [
        interval
        for score in SCORES
        for interval in bootstrap.intervals(
            score, result.id_scores[score], result.ood_scores[score], GROUPS, resamples=20
        )
    ]
    trials = [
        Trial("knn", {"k": 5}, 91.25, chosen=True),
        Trial("knn", {"k": 500}, None, refusal="<k> is too large"),
    ]
    return inputs._replace(
        groups=sets["groups"],
        intervals=found,
        rejected=protocol.rejected(result),
        csid_rows=result.csid_rows,
        full_spectrum_rows=result.full_spectrum_rows,
        extremes=pictures,
        trials=trials,
    )


def test_rows_and_their_order(data, evaluation):
    expected = [(s, d) for s in SCORES for d in ("bag", "sandal", "digits")]
    expected += [(s, d) for s in SCORES for d in ("nearood", "farood")]
    assert [(row.score, row.dataset) for row in evaluation.rows] == expected
    validation = [(row.score, row.dataset) for row in evaluation.validation_rows]
    assert validation == [(s, "noise") for s in SCORES] + [(s, "valood") for s in SCORES]
    rows = {(row.score, row.dataset): row for row in evaluation.rows}
    metrics = ood_metrics(evaluation.id_scores["knn"], evaluation.ood_scores["knn"]["bag"])
    for name, value in metrics.items():
        assert getattr(rows["knn", "bag"], name) == pytest.approx(100 * value)
        mean = (getattr(rows["knn", "bag"], name) + getattr(rows["knn", "sandal"], name)) / 2
        assert getattr(rows["knn", "nearood"], name) == pytest.approx(mean)
    assert rows["knn", "farood"][3:] == pytest.approx(rows["knn", "digits"][3:])
    test = data["id_test"]
    accuracy = 100 * np.mean(test.outputs.logits.argmax(axis=1) == test.labels)
    assert [row.id_accuracy for row in evaluation.rows] == pytest.approx([accuracy] * 10)


def test_thresholds_keep_95_percent_of_validation(data, evaluation):
    logits = data["id_val"].outputs.logits.astype(np.float64)
    energy = -np.log(np.exp(logits).sum(axis=1))
    assert np.mean(energy <= evaluation.thresholds["energy"] + 1e-4) == pytest.approx(0.95)


def test_csv_files_exactly(tmp_path, evaluation):
    write_tables(tmp_path / "report", evaluation)
    names = [str(p.relative_to(tmp_path / "report")) for p in (tmp_path / "report").rglob("*.csv")]
    assert sorted(names) == ["ood.csv", "openood/energy.csv", "openood/knn.csv", "validation.csv"]
    for name, rows in (
        ("ood.csv", evaluation.rows),
        ("validation.csv", evaluation.validation_rows),
    ):
        lines = (tmp_path / "report" / name).read_bytes().decode().split("\n")
        assert lines[0] == COLUMNS and lines[-1] == ""
        assert len(lines) == len(rows) + 2
        for line, row in zip(lines[1:-1], rows, strict=True):
            assert re.fullmatch(r"\w+,\w+,(near|far|validation)(,\d+\.\d{4}){6}", line)
            assert line.split(",")[3] == f"{row.auroc:.4f}"


def test_no_validation_file_without_validation_sets(tmp_path, data):
    few = {**data, "ood": {"bag": data["ood"]["bag"]}}
    write_tables(tmp_path, evaluate(["msp"], **few))
    (file,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    assert [row["dataset"] for row in rows] == ["bag", "nearood"]


def test_means_are_unweighted_and_skip_empty_groups():
    rows = [Row("s", "a", "near", *range(6)), Row("s", "b", "near", *range(2, 8))]
    means = with_means(rows, ("near", "far"))[2:]
    assert means == [Row("s", "nearood", "near", 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": {**GROUPS, "bag": "middle"}}, "'bag' needs a group"),
        ({"groups": {}}, "needs a group"),
        ({"score_names": ["msp", "msp"]}, "listed twice"),
        ({"score_names": ["mps"]}, "did you mean 'msp'"),
        ({"params": {"knn": {"k": 3}}}, "not evaluated"),
    ],
)
def test_mistakes_are_one_line(data, change, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate(**{"score_names": ["msp"], **data, **change})
    assert "\n" not in str(error.value)


def test_a_set_must_not_be_called_like_a_mean(data):
    clash = {**data, "ood": {"farood": data["ood"]["bag"]}, "groups": {"farood": "near"}}
    with pytest.raises(UserError, match="mean row"):
        evaluate(["msp"], **clash)


def test_nan_names_score_and_set(data):
    bag = data["ood"]["bag"].outputs
    bad = bag.logits.copy()
    bad[0, 0] = np.nan
    broken = {**data, "ood": {**data["ood"], "bag": Inputs(bag._replace(logits=bad))}}
    with pytest.raises(UserError, match="msp: the logits of bag"):
        evaluate(["msp"], **broken)


@pytest.mark.parametrize("width", [30, 60, 200])
def test_text_table_is_aligned_and_complete(evaluation, width):
    text = format_table(evaluation.rows, width)
    title, *blocks = text.split("\n\n")
    for block in blocks:
        assert len({len(line) for line in block.strip("\n").split("\n")}) == 1
    if width > 30:
        assert max(map(len, text.split("\n"))) <= width
    assert text.index("nearood") < text.index("farood") < text.index("bag")
    for row in evaluation.rows:
        assert f"{row.auroc:.2f} / {row.fpr_at_95_ood_tpr:.2f}" in text


class _Balanced(HTMLParser):
    """Fails on a tag that is closed out of order; collects tags and attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _parse(page):
    parser = _Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_report_has_every_section_and_fetches_nothing(tmp_path, inputs):
    write_report(tmp_path / "report" / "index.html", inputs)
    assert [p.name for p in (tmp_path / "report").iterdir()] == ["index.html"]
    page = (tmp_path / "report" / "index.html").read_text()
    assert len(page) < 3e6
    parser = _parse(page)
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "Results", "Score distributions", "Feature space", "Training", "Samples",
        "Validation sets", "Configuration",
    ]  # fmt: skip
    # Two overviews, two charts a score, one projection, two curves; a strip a class and kind.
    assert parser.seen.count("svg") == 2 + 2 * len(SCORES) + 3
    assert parser.seen.count("img") == 2 * CLASSES
    assert not {"script", "link", "iframe"} & set(parser.seen)
    assert "http" not in page and "@import" not in page
    for name, value in parser.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/png;base64,", "#"))
    text = "".join(parser.text)
    for row in inputs.rows:
        assert row.dataset in text and f"{row.auroc:.2f}" in text
    for expected in ("train.epochs", "0.10.2", "threshold", "mapped outliers", "cross-entropy"):
        assert expected in text


def test_report_escapes_strings(inputs):
    page = run_page.render(inputs)
    assert "<script" not in page and "<b>bold" not in page and "<i>" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)" in page
    assert "boot &amp; shoe" in page and "oal &amp; more" in page


def test_report_of_everything(full):
    page = run_page.render(full)
    parser = _parse(page)
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "Results", "Score distributions", "Thresholds", "Covariate shift", "Most and least OOD",
        "Feature space", "Training", "Samples", "Validation sets", "Parameter search",
        "Configuration",
    ]  # fmt: skip
    assert parser.seen.count("svg") == 2 + 3 * len(SCORES) + 3
    assert parser.seen.count("img") == 2 * CLASSES + 4
    assert "<k>" not in page and "&lt;k&gt; is too large" in page
    # Every image has its ood_score below it.
    block = page[page.index("id=most-and-least-ood") : page.index("id=feature-space")]
    shown = re.findall(r"<span>(-?[\d.e+-]+)</span>", block)
    expected = [
        f"{value:.3g}"
        for pictures in full.extremes.values()
        for value in (*pictures.most_scores, *pictures.least_scores)
    ]
    assert shown == expected
    for row in full.csid_rows:
        assert f"<td>{row.id_accuracy:.2f}</td><td>{row.rejected:.2f}</td>" in page
    # Nothing but tables, which scroll on their own, may be wider than a phone.
    assert page.count("<table") == page.count("<div class=scroll")


def test_table_of_shares_called_ood(full):
    page = run_page.render(full)
    section = page[page.index("id=thresholds") : page.index("id=covariate-shift")]
    for shares in full.rejected.values():
        cells = "".join(f"<td>{value:.2f}</td>" for value in shares.values())
        assert cells in section
    assert section.count("<svg") == len(SCORES)


def test_extremes_are_the_ends_of_the_order():
    scores = np.array([0.5, 3.0, -1.0, 2.0, 0.0, 1.0])
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    found = run_page.extremes(scores, images, count=2)
    assert found.most.ravel().tolist() == [1, 3] and found.most_scores.tolist() == [3.0, 2.0]
    assert found.least.ravel().tolist() == [2, 4] and found.least_scores.tolist() == [-1.0, 0.0]
    assert len(run_page.extremes(scores, images).most) == 3  # none is shown as both
    assert len(run_page.extremes(scores[:1], images[:1]).most) == 1


def test_names_with_dollars_are_no_formulas():
    chart = figures.shares({"a$b$c": 50.0}, {}, 5.0, "energy")
    assert "a$b$c" in chart


def test_report_is_deterministic(inputs):
    assert run_page.render(inputs) == run_page.render(inputs)


def test_sections_without_data_are_left_out(inputs):
    bare = ReportInputs(*inputs[: ReportInputs._fields.index("validation_rows")])
    page = run_page.render(bare)
    _parse(page)
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Results", "Configuration"]
    assert not re.search(r"\bNone\b", page)
    assert page.count("</svg>") == 2  # all scores at a glance, which needs the rows alone
    _parse(run_page.render(bare._replace(rows=[])))


def test_large_inputs_stay_small(inputs):
    rng = np.random.default_rng(0)
    big = inputs._replace(
        id_scores={"energy": rng.normal(size=200_000)},
        ood_scores={"energy": {"bag": rng.normal(size=200_000)}},
        id_features=rng.normal(size=(20_000, 64)),
        id_labels=rng.integers(0, 200, 20_000),
        class_names=[f"class {i}" for i in range(200)],
        ood_features={"bag": rng.normal(size=(20_000, 64))},
        outlier_features=rng.normal(size=(20_000, 64)),
        losses={"loss": rng.normal(size=(100_000, 2))},
        id_samples=rng.integers(0, 256, (200, 9, 60, 60, 3), dtype=np.uint8),
        outlier_samples=rng.integers(0, 256, (9, 8, 48, 48, 3), dtype=np.uint8),
    )
    page = run_page.render(big)
    assert len(page) < 3e6
    assert "190 more classes" in page


def test_strips_are_the_pixels():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    for channels in (3, 1):
        decoded = _decode(figures.strip(images[..., :channels]))
        row = np.concatenate(list(images[..., :channels]), axis=1)
        np.testing.assert_array_equal(decoded, row if channels == 3 else row[:, :, 0])
    halved = _decode(figures.strip(images[:, :4, :4], size=2))
    first = images[0, :2, :2].reshape(4, 3).mean(axis=0)
    np.testing.assert_allclose(halved[0, 0], first, atol=0.51)
    with pytest.raises(ValueError, match="uint8"):
        figures.strip(images.astype(np.float32))


def _decode(uri):
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return np.rint(imread(io.BytesIO(data)) * 255).astype(np.uint8)


def test_pca_finds_the_axes():
    rng = np.random.default_rng(0)
    scales = np.array([1.0, 9.0, 0.1, 4.0])
    mean, axes = figures.pca(7 + scales[None, :] * rng.normal(size=(5000, 4)))
    np.testing.assert_allclose(mean, 7, atol=1)
    np.testing.assert_allclose(axes, np.eye(4)[:, [1, 3]], atol=0.1)
    assert figures.pca(np.ones((1, 1)))[1].shape == (1, 2)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    write_bytes(path, b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
