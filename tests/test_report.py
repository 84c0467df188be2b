"""The page of a protocol run on small Gaussian features, and its pictures."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread

from oal_jax.config import Config
from oal_jax.evaluation import Inputs, bootstrap, evaluate, headline, protocol
from oal_jax.evaluation.search import Trial
from oal_jax.report import figures, run_page
from oal_jax.report.run_page import ReportInputs, write_report
from oal_jax.scores import Outputs

CLASSES, WIDTH = 4, 8
GROUPS = {"bag": "near", "sandal": "near", "digits": "far", "noise": "validation", "fog": "csid"}
SCORES = ["energy", "knn"]
VOID = {"meta", "img", "br", "path", "use", "rect"}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    means = 3 * np.eye(CLASSES, WIDTH, dtype=np.float32)

    def data(n, shift=0.0, known=True, pictured=False):
        labels = rng.integers(0, CLASSES, n)
        features = (known * means[labels] + shift + rng.normal(size=(n, WIDTH))).astype(np.float32)
        images = rng.integers(0, 256, (n, 28, 28, 3), dtype=np.uint8)
        return Inputs(
            Outputs(features @ means.T, features),
            images=(lambda: images) if pictured else None,
            labels=labels if known else None,
        )

    id_test = data(80, pictured=True)
    ood = {"bag": data(50, 0.6, False, True), "sandal": data(50, 0.9, False)}
    ood |= {
        "digits": data(50, 0, False, True),
        "noise": data(50, -0.5, False),
        "fog": data(60, 0.3),
    }
    result = evaluate(SCORES, data(120), data(60), id_test, ood, GROUPS, params={"knn": {"k": 5}})
    config = Config()
    config.data.root = "<b>bold</b>"
    images = rng.integers(0, 256, (CLASSES, 3, 28, 28, 1), dtype=np.uint8)
    log = [{"step": s, "loss": 1 / (1 + s), "grad_norm": 1.0} for s in range(0, 1000, 2)]
    log[-1] |= {"val_accuracy": 0.75}
    return ReportInputs(
        title="<script>alert('x')</script>",
        facts={"Method": "oal & more", "jax": "0.10.2"},
        config=config,
        class_names=["coat", "shirt", "<i>", "boot & shoe"],
        evaluation=result,
        headline=headline.choose(
            headline.validation_aurocs(result, GROUPS), ["<u> speaks against"]
        ),
        id_test=id_test,
        ood=ood,
        groups=GROUPS,
        intervals=[
            interval
            for score in SCORES
            for interval in bootstrap.intervals(
                score, result.id_scores[score], result.ood_scores[score], GROUPS, resamples=20
            )
        ],
        trials=[
            Trial("knn", {"k": 5}, 91.25, chosen=True),
            Trial("knn", {"k": 500}, None, refusal="<k> is too large"),
        ],
        log=log,
        outlier_features=rng.normal(size=(20, WIDTH)),
        samples={"In-distribution": images, "Decoded outliers": images[::-1]},
    )


@pytest.fixture(scope="module")
def page(inputs):
    return run_page.render(inputs)


class _Balanced(HTMLParser):
    """Fails on a tag that is closed out of order. Collects tags, attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
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


def _section(page, name):
    return page[page.index(f"<section id={name}>") :].partition("</section>")[0]


def test_sections_and_pictures(tmp_path, page, inputs):
    write_report(tmp_path / "report" / "index.html", inputs)
    assert [file.name for file in (tmp_path / "report").iterdir()] == ["index.html"]
    assert (tmp_path / "report" / "index.html").read_text() == page  # deterministic
    assert len(page) < 3e6
    assert re.findall(r"<section id=([\w-]+)>", page) == [
        "results", "score-distributions", "thresholds", "covariate-shift", "most-and-least-ood",
        "feature-space", "training", "samples", "validation-sets", "parameter-search",
        "configuration",
    ]  # fmt: skip
    seen = _parse(page).seen
    # Two overviews; two distributions and a bar chart per score; a projection; two curves.
    assert seen.count("svg") == 2 + 3 * len(SCORES) + 3
    # One strip per class and kind of samples; most and least of the three sets with images.
    assert seen.count("img") == 2 * CLASSES + 2 * 3


def test_page_fetches_nothing_and_runs_nothing(page):
    parser = _parse(page)
    assert not {"script", "link", "iframe"} & set(parser.seen)
    assert "http" not in page and "@import" not in page
    for name, value in parser.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/png;base64,", "#"))


def test_strings_are_escaped(page):
    for tag in ("<script", "<b>bold", "<i>", "<k>", "<u>"):
        assert tag not in page
    text = "".join(_parse(page).text)
    for string in ("<script>alert('x')", "<b>bold</b>", "boot & shoe", "oal & more", "<k> is too"):
        assert string in text


def test_numbers_of_all_tables(page, inputs):
    result = inputs.evaluation
    for name, rows in {
        "results": result.rows,
        "validation-sets": result.validation_rows,
        "covariate-shift": result.full_spectrum_rows,
    }.items():
        section = _section(page, name)
        for row in rows:
            title = {"nearood": "mean, near-OOD", "farood": "mean, far-OOD"}
            title = title.get(row.dataset, row.dataset).replace("valood", "mean, validation")
            assert title in section and f"{row.score}</th>" in section
            assert re.search(rf'<td class="first (best)?">{row.auroc:.2f}</td>', section)
    for row in result.csid_rows:
        cells = f"<td>{row.dataset}</td><td>{row.id_accuracy:.2f}</td><td>{row.rejected:.2f}</td>"
        assert cells in _section(page, "covariate-shift")
    for shares in protocol.rejected(result).values():
        cells = "".join(f"<td>{value:.2f}</td>" for value in shares.values())
        assert cells in _section(page, "thresholds")
    assert "<td class=best>91.25</td>" in _section(page, "parameter-search")
    for text in ("train.epochs", "0.10.2", "threshold", "mapped outliers", "75", "0.95"):
        assert text in page
    # Tables scroll on their own where they are wider than a phone.
    assert page.count("<table") == page.count("<div class=scroll")


def test_the_headline_is_on_top_with_its_reason_and_warnings(page, inputs):
    chosen, top = inputs.headline, page.partition("<main>")[0]
    near = {row.score: row.auroc for row in inputs.evaluation.rows if row.dataset == "nearood"}
    assert f"<b>{chosen.score}</b>: {chosen.reason}" in top
    assert f"{near[chosen.score]:.2f}" in top and "&lt;u&gt; speaks against" in top


def test_the_headline_is_the_first_row_of_every_table(inputs):
    for score in SCORES:
        chosen = inputs.headline._replace(score=score)
        page = run_page.render(inputs._replace(headline=chosen))
        for name in ("results", "thresholds", "covariate-shift", "validation-sets"):
            for body in _section(page, name).split("<tbody>")[1:]:
                assert re.search(r"<tr><th>(\w+)</th>", body)[1] == score


def test_small_test_sets_are_named(page):
    assert "ID test 80, bag 50, sandal 50, digits 50" in _section(page, "results")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-1.2345, "-1.23"),
        (735.4, "735"),
        (999.7, "1000"),
        (73512.0, "73512"),
        (735120.0, "7.35e5"),
        (-1.234e12, "-1.23e12"),
        (2e-5, "2.00e-5"),
        (np.inf, "inf"),
    ],
)
def test_numbers_below_images_are_short(value, text):
    assert run_page.short(value) == text


def test_a_heavy_tail_leaves_the_id_scores_their_bins():
    rng = np.random.default_rng(0)
    known, tail = rng.normal(10, 1, 500), np.exp(rng.normal(10, 5, 500))
    chart = figures.histograms(known, {"far": tail}, 12.0, "mahalanobis")
    assert ">threshold<" in chart and "stroke-dasharray" in chart
    ticks = [float(x) for x in re.findall(r">(\d+)</text>", chart)]
    assert ticks and max(ticks) < 50  # the axis ends near the ID scores


def test_best_values_are_marked_by_column(page, inputs):
    means = [row for row in inputs.evaluation.rows if row.dataset == "nearood"]
    low = min(round(row.fpr_at_95_ood_tpr, 2) for row in means)
    high = max(round(row.auroc, 2) for row in means)
    table = _section(page, "results").partition("<h3>")[0]
    assert f'<td class="first best">{high:.2f}</td>' in table
    assert f'<td class="best">{low:.2f}</td>' in table


def test_extreme_images_have_their_ood_score(page, inputs):
    shown = re.findall(r"<span>(-?[\d.e+-]+)</span>", _section(page, "most-and-least-ood"))
    result, expected = inputs.evaluation, []
    score = inputs.headline.score
    for scores in (
        result.id_scores,
        *({s: v[n] for s, v in result.ood_scores.items()} for n in ("bag", "digits")),
    ):
        order = np.sort(scores[score])
        expected += [f"{value:.3g}" for value in (*order[::-1][:8], *order[:8])]
    assert shown == expected


def test_extremes_are_the_ends_of_the_order():
    scores = np.array([0.5, 3.0, -1.0, 2.0, 0.0, 1.0])
    rows = run_page.extreme_rows(scores, 2)
    assert rows["most"].tolist() == [1, 3] and rows["least"].tolist() == [2, 4]
    rows = run_page.extreme_rows(scores, 8)
    assert sorted([*rows["most"], *rows["least"]]) == list(range(6))  # no image in both
    assert len(run_page.extreme_rows(scores[:1], 8)["most"]) == 1


@pytest.mark.parametrize("ood", [("bag",), ("noise",), ()])
def test_sections_without_data_are_left_out(inputs, ood):
    def bare(data):
        return data._replace(images=None, outputs=data.outputs._replace(features=None))

    sets = {name: bare(inputs.ood[name]) for name in ood}
    known = bare(inputs.id_test)
    result = evaluate(["msp"], known, known, known, sets, GROUPS)
    chosen = headline.choose(headline.validation_aurocs(result, GROUPS))
    page = run_page.render(
        ReportInputs("run", {}, Config(), inputs.class_names, result, chosen, known, sets, GROUPS)
    )
    _parse(page)
    expected = {
        ("bag",): ["results", "score-distributions", "thresholds", "configuration"],
        ("noise",): ["validation-sets", "score-distributions", "thresholds", "configuration"],
        (): ["thresholds", "configuration"],
    }
    assert re.findall(r"<section id=([\w-]+)>", page) == expected[ood]
    assert not re.search(r"\b(None|nan)\b", page)


def test_large_inputs_stay_small(inputs):
    rng = np.random.default_rng(0)

    def large(n, known=True):
        features = rng.normal(size=(n, 64)).astype(np.float32)
        logits = np.zeros((n, 200), np.float32)
        labels = rng.integers(0, 200, n) if known else None
        return Inputs(Outputs(logits, features), labels=labels)

    scores = {"energy": rng.normal(size=200_000)}
    page = run_page.render(
        inputs._replace(
            headline=headline.Headline("energy", 91.0, None, None),
            evaluation=inputs.evaluation._replace(
                id_scores=scores,
                id_val_scores=scores,
                ood_scores={"energy": {"bag": rng.normal(size=200_000)}},
                csid_scores={"energy": {}},
                thresholds={"energy": 1.0},
            ),
            id_test=large(20_000),
            ood={"bag": large(20_000, known=False)},
            class_names=[f"class {i}" for i in range(200)],
            outlier_features=rng.normal(size=(20_000, 64)),
            log=[{"step": i, "loss": x} for i, x in enumerate(rng.normal(size=100_000))],
            samples={"ID": rng.integers(0, 256, (200, 9, 60, 60, 3), dtype=np.uint8)},
        )
    )
    assert len(page) < 3e6
    assert "190 more classes" in page


def test_strips_are_the_pixels():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    opaque = np.concatenate([images, np.full((3, 4, 5, 1), 9, np.uint8)], axis=-1)
    assert figures.strip(opaque) == figures.strip(images)
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


def test_dollars_in_names_are_no_formulas():
    assert "a$b$c" in figures.shares({"a$b$c": 50.0}, {}, 5.0, "energy")


def test_pca_finds_the_axes():
    rng = np.random.default_rng(0)
    scales = np.array([1.0, 9.0, 0.1, 4.0])
    mean, axes = figures.pca(7 + scales[None, :] * rng.normal(size=(5000, 4)))
    np.testing.assert_allclose(mean, 7, atol=1)
    np.testing.assert_allclose(axes, np.eye(4)[:, [1, 3]], atol=0.1)
    assert figures.pca(np.ones((1, 1)))[1].shape == (1, 2)
