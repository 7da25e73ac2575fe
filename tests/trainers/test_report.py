"""report.html: the numbers are those of the run folder, the file stands alone, and what cannot be reported is said."""

from __future__ import annotations

import base64
import io
import itertools
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from trainers import crops
from trainers.charts import RIGHT, TOP, WIDTH, Level, Series, line_chart, log_ticks, number, styled, thin, ticks
from trainers.errors import InputError
from trainers.report import duration, quantity, signed, write_report
from trainers.results import at, flat, load_run

VOID = {"meta", "img", "input", "br", "line", "circle", "rect", "polyline", "polygon", "image"}


class Document(HTMLParser):
    """Checks that tags are balanced; gathers the text, the tables and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == name)

    def pictures(self, alt: str) -> list[str]:
        """The data URIs of the <img> with this alt text."""
        described = [value for tag, name, value in self.attributes if tag == "img" and name in ("src", "alt")]
        return [src for src, text in zip(described[::2], described[1::2], strict=True) if text == alt]


@pytest.fixture
def document(fake_run) -> Document:
    return Document(write_report(fake_run("facd")).read_text())


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_table_holds_the_numbers_of_the_run(document: Document) -> None:
    assert document.row("bicubic")[2:4] == ["29.87", "0.8912"]
    assert document.row("facd")[1:] == [
        "EDSR features 16, blocks 4, res_scale 1", "31.24", "0.9123", "+1.37", "28,163", "6.49 G", "60 s", "50.0",
    ]  # fmt: skip
    assert document.row("teacher")[2:7] == ["31.71", "0.9201", "+1.84", "180,000", "41 G"]
    assert document.row("tabby_cat") == ["tabby_cat", "31.37 0.8912", "32.74 0.9123", "33.21 0.9201"]


def test_headline_and_protocol(document: Document) -> None:
    assert "facd reaches 31.24 dB on photos: 1.37 dB above bicubic and 0.47 dB below its teacher." in document.text
    assert (
        "Protocol sr-y: Y of YCbCr (16 to 235), 8-bit rounding, without a border of scale pixels. Means"
        in document.text
    )
    assert "1280x720 output" in document.text
    assert "What distillation itself gained cannot be read from it" in document.text


def test_file_stands_alone(fake_run) -> None:
    report = write_report(fake_run("facd")).read_text()
    assert not [word for word in ("http:", "https:", "@import", "url(", "fetch(") if word in report]
    document = Document(report)
    for tag, name, value in document.attributes:
        assert tag not in ("link", "iframe", "object")
        if name in ("src", "href", "xlink:href", "srcset"):
            assert value.startswith("data:image/"), (tag, name, value[:60])


def test_text_is_escaped(fake_run) -> None:
    run = fake_run("facd", name="<b>&</b>")
    report = write_report(run).read_text()
    assert "<title>&lt;b&gt;&amp;&lt;/b&gt;</title>" in report
    assert "a &lt; b &amp; c" in report  # a comment of config.yaml


def test_crops_show_the_pixels_of_the_saved_images(fake_run) -> None:
    run = fake_run("facd")
    document = Document(write_report(run).read_text())
    images = run / "images" / "photos"
    gt, lq, student = (crops.read(images / f"tabby_cat_{kind}.png") for kind in ("gt", "lq", "student"))
    window = crops.worst_windows(crops.read(images / "tabby_cat_bicubic.png"), gt, 2)[0]
    assert (pixels(document.pictures("HR")[0]) == crops.cut(gt, window)).all()
    assert (pixels(document.pictures("facd")[0]) == crops.cut(student, window)).all()
    assert (pixels(document.pictures("LR")[0]) == crops.cut(lq, window, 2)).all()
    assert pixels(document.pictures("LR")[0]).shape == (24, 24, 3)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_crops_lie_on_the_grid_of_the_degraded_image(fake_run, scale: int) -> None:
    images = fake_run("facd", scale=scale) / "images" / "photos"
    gt, bicubic = (crops.read(images / f"mug_{kind}.png") for kind in ("gt", "bicubic"))
    for window in crops.worst_windows(bicubic, gt, scale):
        assert not any(value % scale for value in (window.top, window.left, window.size))
        assert window.top + window.size <= gt.shape[0]
        assert window.left + window.size <= gt.shape[1]


def test_a_task_that_keeps_the_size_is_compared_with_its_input(fake_run) -> None:
    run = fake_run(scale=1, task="denoise", protocol="denoise-rgb")
    document = Document(write_report(run).read_text())
    assert "1.37 dB above the input" in document.text
    assert document.row("input")[2:4] == ["29.87", "0.8912"]
    assert "denoising" in document.text
    assert document.pictures("LR") == document.pictures("bicubic") == []
    assert document.pictures("input")


def test_worst_windows_are_where_bicubic_errs_and_do_not_overlap() -> None:
    gt = np.zeros((200, 300, 3), np.uint8)
    bicubic = gt.copy()
    bicubic[20:30, 40:50] = 200
    bicubic[150:160, 250:260] = 90
    first, second = crops.worst_windows(bicubic, gt, 2)
    assert first.top <= 20
    assert first.top + first.size >= 30
    assert first.left <= 40
    assert first.left + first.size >= 50
    assert second.top > 100
    assert second.left > 200


@settings(max_examples=10)
@given(st.integers(40, 140), st.integers(40, 140), st.sampled_from([1, 2, 3, 4]), st.sampled_from([(1, 0), (0, -1)]))
@example(140, 110, 2, (1, 0))
@example(140, 110, 2, (-1, 0))
@example(110, 140, 2, (0, 1))
@example(110, 140, 2, (0, -1))
def test_windows_are_the_worst_that_do_not_overlap(height: int, width: int, scale: int, slope: tuple[int, int]) -> None:
    """Against a search over the whole grid, on errors that grow to one side; where no second fits beside the first there is none."""
    rows, columns = (np.arange(side // scale * scale) for side in (height, width))
    growing = 120 + 0.8 * (slope[0] * (rows - rows.mean())[:, None] + slope[1] * (columns - columns.mean())[None, :])
    noise = np.random.default_rng(0).integers(0, 40, (*growing.shape, 3))
    gt = (growing[:, :, None] + noise).clip(0, 255).astype(np.uint8)
    error = np.square(gt.astype(float)).mean(axis=2)
    size = min(crops.WINDOW, *gt.shape[:2]) // scale * scale
    places = itertools.product(*(range(0, side - size + 1, scale) for side in gt.shape[:2]))
    sums = {(top, left): error[top : top + size, left : left + size].sum() for top, left in places}
    found = crops.worst_windows(np.zeros_like(gt), gt, scale)
    for window in found:
        assert window.size == size
        assert sums[window.top, window.left] == pytest.approx(max(sums.values()))
        sums = {k: v for k, v in sums.items() if max(abs(k[0] - window.top), abs(k[1] - window.left)) >= size}
    assert len(found) == 2 or not sums


def test_error_map_is_amplified_and_black_where_images_agree() -> None:
    gt = np.full((4, 4, 3), 100, np.uint8)
    image = gt.copy()
    image[0, 0] = (103, 100, 97)
    assert crops.error_map(image, gt)[0, 0, 0] == 2 * crops.ERROR_GAIN
    assert crops.error_map(image, gt)[1:].max() == 0


def test_run_without_teacher_and_without_images(fake_run) -> None:
    run = fake_run("scratch", teacher=False)
    for image in (run / "images").rglob("*.png"):
        image.unlink()
    document = Document(write_report(run).read_text())
    assert "below its teacher" not in document.text
    assert "Crops" not in document.text
    assert "another seed would give a slightly different number" in document.text
    assert not any(row and row[0] == "teacher" for row in document.rows)


def test_options_of_every_kind_are_shown(fake_run) -> None:
    options = {"dim": 16, "blocks": [1, 1, 2, 3], "ffn_expansion": 2.0, "norm": "bias-free", "bias": False}
    student = {"arch": "restormer", "options": options, "params": 1_172_687, "macs": 73_000_000_000}
    document = Document(write_report(fake_run("scratch", teacher=False, student=student)).read_text())
    shown = "Restormer dim 16, blocks [1, 1, 2, 3], ffn_expansion 2, norm bias-free, bias False"
    assert any(shown in row for row in document.rows), document.rows


def test_several_validation_sets_each_have_columns_and_curves(fake_run) -> None:
    one = json.loads((fake_run("facd") / "result.json").read_text())["sets"]["photos"]
    run = fake_run("facd", folder="two", sets={"photos": one, "set5": one})
    document = Document(write_report(run).read_text())
    assert document.rows[0][2:6] == ["PSNR, photos (dB)", "SSIM, photos", "PSNR, set5 (dB)", "SSIM, set5"]
    assert "photos (2 images) and set5 (2 images)" in document.text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "result.json").unlink(), "kdtrain resume"),
        (lambda run: [f.unlink() for f in (run / "result.json", run / "config.yaml")], "is no run folder"),
        (lambda run: (run / "result.json").write_text("{"), "cannot be read as JSON"),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind"\n'), r"metrics\.jsonl:1: cannot be read"),
    ],
    ids=["unfinished", "no run", "broken result", "broken metrics"],
)
def test_what_is_no_finished_run_is_refused(fake_run, spoil, message: str) -> None:
    run = fake_run("facd")
    spoil(run)
    with pytest.raises(InputError, match=message):
        write_report(run)


def test_interrupted_run_is_refused(fake_run) -> None:
    with pytest.raises(InputError, match="status is 'interrupted'"):
        write_report(fake_run("facd", status="interrupted"))


# --- curves, and small words -------------------------------------------------------------------------------------------


def test_chart_puts_points_where_the_axes_say() -> None:
    chart = line_chart("t", "x", "y", [Series("a", [(0, 0), (50, 5), (100, 10)], 0, 0)], levels=[Level("top", 10)])
    document = Document(chart)
    points = next(value for tag, name, value in document.attributes if (tag, name) == ("polyline", "points"))
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points.split())
    assert x1 - x0 == x2 - x1 > 0
    assert y0 - y1 == y1 - y2 > 0  # upwards
    level = next(
        value for tag, name, value in document.attributes if (tag, name) == ("line", "y1") and float(value) == y2
    )
    assert level


def test_band_is_shaded_within_the_axes() -> None:
    line = Series("a", [(0, 1), (10, 2)], 0, 0, band=[(0, 0, 3), (10, 1, 9)])
    document = Document(line_chart("t", "x", "y", [line]))
    (corners,) = [value for tag, name, value in document.attributes if (tag, name) == ("polygon", "points")]
    heights = [float(corner.split(",")[1]) for corner in corners.split()]
    assert heights[0] < heights[3]  # there and back: the highest, then the lowest
    assert heights[1] < heights[2]
    assert min(heights) >= TOP  # the axis reaches to the top of the band


def test_many_curves_differ_in_colour_or_dash() -> None:
    assert len({styled(index) for index in range(36)}) == 36


def test_x_axis_ends_with_the_curve() -> None:
    document = Document(line_chart("t", "x", "y", [Series("a", [(100, 0), (1150, 1)], 0, 0)]))
    points = next(value for tag, name, value in document.attributes if (tag, name) == ("polyline", "points"))
    assert float(points.split()[-1].split(",")[0]) == WIDTH - RIGHT
    assert "1,000" in document.text
    assert "1,200" not in document.text


def test_chart_leaves_out_levels_and_bands_that_are_not_finite() -> None:
    band = [(0.0, 1.0, float("inf")), (1.0, 1.0, 2.0)]
    line = Series("a", [(0.0, 1.0), (1.0, 2.0)], 0, 0, band=band)
    chart = line_chart("t", "x", "y", [line], levels=[Level("perfect", float("inf")), Level("bicubic", 1.5)])
    assert "bicubic" in chart
    assert "perfect" not in chart
    assert "inf" not in chart


def test_chart_leaves_out_what_is_not_finite() -> None:
    assert line_chart("t", "x", "y", [Series("a", [(1.0, float("nan"))], 0, 0)]) == ""
    chart = line_chart(
        "t", "x", "y", [Series("a", [(1, 1.0), (2, float("inf")), (3, -1.0), (4, 100.0)], 0, 0)], log=True
    )
    assert 'data-x="1 4"' in chart


@pytest.mark.parametrize(("low", "high"), [(0, 3000), (29.87, 31.71), (-3, 0.2), (1e-6, 3e-6)])
def test_ticks_cover_the_range_with_round_numbers(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low
    assert marks[-1] >= high
    assert 4 <= len(marks) <= 9
    assert marks[-2] < high
    assert marks[1] > low


@pytest.mark.parametrize(("low", "high"), [(0.011, 0.7), (1e-5, 2.0), (0.9, 1.1)])
def test_log_ticks_cover_the_range(low: float, high: float) -> None:
    marks = log_ticks(low, high)
    assert marks[0] <= low
    assert marks[-1] >= high
    assert len(marks) >= 2


def test_thinning_keeps_both_ends() -> None:
    points = [(float(i), 0.0) for i in range(100_003)]
    kept = thin(points)
    assert len(kept) <= 402
    assert (kept[0], kept[-1]) == (points[0], points[-1])


def test_words_for_numbers() -> None:
    assert [signed(v) for v in (0.054, -0.054, 0.001, -0.001)] == ["+0.05", "−0.05", "0.00", "0.00"]
    assert [duration(v) for v in (41.6, 185, 3720)] == ["42 s", "3 min 05 s", "1 h 02 min"]
    assert [quantity(v) for v in (512, 93_300, 1.5e6, 4.1e10)] == ["512", "93.3 k", "1.5 M", "41 G"]
    assert [number(v) for v in (20000.0, 0.5, 1e-7)] == ["20,000", "0.5", "1e-07"]


def test_value_between_validations() -> None:
    points = [(10.0, 30.0), (20.0, 31.0)]
    assert at(points, 15) == 30.5
    assert at(points, 20) == 31.0
    assert at(points, 5) is None
    assert at(points, 21) is None


def test_run_reads_its_curves(fake_run) -> None:
    run = load_run(fake_run("facd"))
    assert run.names("losses") == ["pixel", "output", "contrast"]
    assert run.names("shares") == ["output", "contrast"]
    assert [x for x, _ in run.validation("photos", "step")] == [500, 1000, 1500, 2000, 2500, 3000]
    assert run.validation("photos", "seconds")[-1] == pytest.approx((60.0, 31.24))
    assert flat({"a": {"b": 1}, "c": 2}) == {"a.b": 1, "c": 2}


def test_report_lands_in_the_run_folder(fake_run) -> None:
    run: Path = fake_run("facd")
    assert write_report(run) == run / "report.html"
