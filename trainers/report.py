"""report.html: what one run, or several side by side, found. One self-contained page: table, curves, crops, and how it was made."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trainers import crops, page
from trainers.charts import Level, Series, line_chart, styled
from trainers.files import replace_file
from trainers.models import find
from trainers.results import Arm, Run, difference, flat, load_run
from trainers.tasks import TASKS

REFERENCES = {"bicubic": "bicubic", "input": "the input", "teacher": "its teacher"}


def write_report(run_dir: Path) -> Path:
    """Writes <run_dir>/report.html from the other files of the run folder and returns its path.

    Raises:
        InputError: `run_dir` is no run folder, or its run is not done.
    """
    run = load_run(Path(run_dir))
    path = run.folder / "report.html"
    sections = body([Arm(run.method, (run,))])
    replace_file(path, page.page(run.result["name"], _kicker(run), headline(run), remarks(run), sections).encode())
    return path


def headline(run: Run) -> str:
    """What the run reached, in one sentence, on its first validation set."""
    name = run.sets[0]
    own = run.psnr(name)
    gaps = [
        f"{gap(difference(own, run.psnr(name, who)))} {words}"
        for who, words in REFERENCES.items()
        if run.score(name, who)
    ]
    return f"{run.method} reaches {own:.2f} dB on {name}: {' and '.join(gaps)}."


def remarks(run: Run) -> list[str]:
    """What the headline rests on and what it does not show."""
    basis = f"Mean PSNR over {count(run, run.sets[0])} by protocol {run.result['protocol']}; {budget(run)}."
    if run.method == "scratch":
        return [basis, f"One run with seed {run.result['seed']}: another seed would give a slightly different number."]
    alone = (
        f"One run with seed {run.result['seed']}. What distillation itself gained cannot be read from it: put it beside a scratch run "
        "of the same steps and data order with kdtrain compare."
    )
    return [basis, alone]


def body(arms: Sequence[Arm], more: Sequence[str] = (), refused: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """The sections that a report of one run and a comparison have in common.

    Args:
        arms: what is compared, or one run.
        more: further sections, HTML, to stand behind the results.
        refused: method -> why it is not applicable.
    """
    return [
        "<h2>Results</h2>" + results_table(arms, refused),
        *more,
        "<h2>Curves</h2>" + curves(arms),
        crops_section(arms),
        "<h2>Image by image</h2>" + "".join(per_image_table(arms, name) for name in arms[0].sets),
        "<h2>How this was made</h2>" + "".join(_making_of(arm) for arm in arms),
        "<footer>Written by kdtrain. Everything on this page is in this one file.</footer>",
    ]


# --- words -----------------------------------------------------------------------------------------------------------------------


def signed(value: float) -> str:
    """+0.05, −0.05, 0.00."""
    text = f"{value:+.2f}".replace("-", "−")
    return text[1:] if text[1:] == "0.00" else text


def gap(difference: float) -> str:
    """0.05 dB above, 0.05 dB below, level with."""
    size = f"{abs(difference):.2f}"
    return "level with" if size == "0.00" else f"{size} dB {'above' if difference > 0 else 'below'}"


def count(run: Run | Arm, set_name: str) -> str:
    """How many images a set has: "2 images"."""
    number = len(run.score(set_name, run.baseline)["per_image"])  # type: ignore[index]  # a baseline always has scores
    return f"{number} image{'s' if number != 1 else ''}"


def budget(run: Run) -> str:
    """Steps, batch, patch and time of a run."""
    result = run.result
    return (
        f"{run.steps:,} steps of {result['batch']} patches of {result['patch']} × {result['patch']} pixels, "
        f"{duration(run.seconds)} of training"
    )


def duration(seconds: float) -> str:
    """42 s, 3 min 05 s, 1 h 02 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def quantity(value: float) -> str:
    """93,300 -> "93.3 k"."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _kicker(run: Run) -> str:
    return f"{run.result['name']} · {task(run)} · method {run.method}"


def task(run: Run) -> str:
    """The task in words: "super-resolution ×2"."""
    words = TASKS[run.result["task"]].text
    return f"{words} ×{run.result['scale']}" if run.result["scale"] > 1 else words


def _network(description: dict[str, Any]) -> str:
    shown = {
        name: f"{value:g}" if isinstance(value, float) else value for name, value in description["options"].items()
    }
    options = ", ".join(f"{name} {value}" for name, value in shown.items() if name != "scale")
    return f'<td class="text">{html.escape(find(description["arch"]).title)} <small>{html.escape(options)}</small></td>'


# --- table -----------------------------------------------------------------------------------------------------------------------


def with_teacher(arms: Sequence[Arm]) -> Arm | None:
    """The first arm that has a teacher's score on the first set."""
    return next((arm for arm in arms if arm.score(arm.sets[0], "teacher")), None)


def results_table(arms: Sequence[Arm], refused: Mapping[str, str]) -> str:
    """The baseline, students and teacher: PSNR and SSIM of every set, size and cost; then what is not applicable."""
    sets, first, baseline = arms[0].sets, arms[0], arms[0].baseline
    where = [f", {name}" if len(sets) > 1 else "" for name in sets]
    heads = ["", "network", *(h for w in where for h in (f"PSNR{w} (dB)", f"SSIM{w}")), f"gain over {baseline} (dB)"]
    heads += ["parameters", "MACs", "training time", "steps/s"]
    best = {name: max(arm.psnr(name) for arm in arms) for name in sets}
    tops = [arm.psnr(sets[0], who) for arm in arms for who in ("student", "teacher") if arm.score(sets[0], who)]
    gains = [difference(top, first.psnr(sets[0], baseline)) for top in tops]
    span = max([1e-9, *filter(math.isfinite, gains)])

    def row(arm: Arm, who: str, label: str, colour: int, cost: list[str]) -> list[str]:
        cells = []
        for name in sets:
            score = arm.score(name, who) or {}
            bold = ' class="best"' if who == "student" and len(arms) > 1 and score["psnr"] == best[name] else ""
            shown = with_spread(arm, name) if who == "student" else f"{score['psnr']:.2f}"
            cells += [f"<td{bold}>{shown}</td>", f"{score['ssim']:.4f}"]
        gain = difference(arm.psnr(sets[0], who), arm.psnr(sets[0], baseline))
        width = 90 * min(1.0, max(0.0, gain) / span)
        bar = f'<span class="bar" style="width: {width:.0f}px; background: var(--c{colour % 6})"></span>'
        gained = f'<td class="text">{signed(gain)}{bar}</td>' if who != baseline else ""
        return [label, cost[0], *cells, gained, *cost[1:]]

    what = "interpolation" if baseline == "bicubic" else "as it is"
    rows = [row(first, baseline, baseline, 4, [f'<td class="text">{what}</td>', "", "", "", ""])]
    for index, arm in enumerate(arms):
        student = arm.first.result["student"]
        speed = f"{arm.steps / arm.seconds:.1f}" if arm.seconds else ""
        size = [f"{student['params']:,}", quantity(student["macs"])]
        label = page.dot(index) + html.escape(arm.label)
        rows.append(row(arm, "student", label, index, [_network(student), *size, duration(arm.seconds), speed]))
    if taught := with_teacher(arms):
        teacher = taught.first.result["teacher"]
        cost = [_network(teacher), f"{teacher['params']:,}", quantity(teacher["macs"]), "given", ""]
        rows.append(row(taught, "teacher", "teacher", 4, cost))
    for method, reason in refused.items():
        told = f'<td class="text refused" colspan="{len(heads) - 1}">not applicable: {html.escape(reason)}</td>'
        rows.append([html.escape(method), told])
    return page.table(heads, rows) + _table_note(first)


def with_spread(arm: Arm, set_name: str) -> str:
    """31.24, or the mean over seeds and their standard deviation: 31.243 ± 0.012."""
    spread = arm.spread(set_name)
    mean = arm.psnr(set_name)
    return f"{mean:.2f}" if spread is None or math.isnan(spread) else f"{mean:.3f} ± {spread:.3f}"


def _table_note(arm: Arm) -> str:
    result = arm.first.result
    sets = " and ".join(f"{name} ({count(arm, name)})" for name in arm.sets)
    seeds = f", and over seeds {', '.join(map(str, arm.seeds))} (± standard deviation)" if len(arm.seeds) > 1 else ""
    text = (
        f"Protocol {result['protocol_text'].rstrip('.')}. Means over {sets}{seeds}. MACs: multiply-accumulates for a "
        f"{result['macs_for']}. Training time and steps per second leave out validation and saving. {_weights_measured(arm.first)}"
    )
    return f'<p class="note">{html.escape(text)}</p>'


def _weights_measured(run: Run) -> str:
    decay = run.settings.get("train", {}).get("ema")
    which = f"the moving average of the weights (decay {decay:g})" if decay else "the weights"
    return f"A student is measured with {which} after its last step: no checkpoint was chosen by these images."


def per_image_table(arms: Sequence[Arm], set_name: str) -> str:
    """PSNR and SSIM of every image of one set."""
    columns = [(arms[0], arms[0].baseline, arms[0].baseline), *((arm, "student", arm.label) for arm in arms)]
    if taught := with_teacher(arms):
        columns.append((taught, "teacher", "teacher"))
    found = [(label, who, arm.score(set_name, who) or {}) for arm, who, label in columns]
    rows = []
    for image in found[0][2]["per_image"]:
        scores = [(who, score["per_image"][image]) for _, who, score in found]
        best = max(score["psnr"] for who, score in scores if who == "student")
        cells = [html.escape(image)]
        for who, score in scores:
            bold = ' class="best"' if who == "student" and len(arms) > 1 and score["psnr"] == best else ""
            cells.append(f"<td{bold}>{score['psnr']:.2f} <small>{score['ssim']:.4f}</small></td>")
        rows.append(cells)
    title = f"{set_name}: PSNR (dB) and, smaller, SSIM; protocol {arms[0].first.result['protocol']}"
    return f"<h3>{html.escape(title)}</h3>" + page.table(["image", *(label for label, *_ in found)], rows)


# --- curves ----------------------------------------------------------------------------------------------------------------------


def curves(arms: Sequence[Arm]) -> str:
    """Validation PSNR per step and per second, every loss, and how strong each weighted term's gradient is."""
    charts = []
    for name in arms[0].sets:
        levels = [Level(arms[0].baseline, arms[0].psnr(name, arms[0].baseline))]
        if taught := with_teacher(arms):
            levels.append(Level("teacher", taught.psnr(name, "teacher")))
        for axis, label in (("step", "training step"), ("seconds", "training time (s)")):
            lines = [
                Series(arm.label, arm.validation(name, axis), *styled(i), markers=True, band=arm.band(name, axis))
                for i, arm in enumerate(arms)
            ]
            shaded = ", shaded from the lowest to the highest seed" if any(line.band for line in lines) else ""
            title = f"Validation PSNR on {name} per {axis.removesuffix('s')}{shaded}"
            charts.append(line_chart(title, label, "PSNR (dB)", lines, levels=levels))
    for loss in dict.fromkeys(name for arm in arms for name in arm.names("losses")):
        lines = [
            Series(arm.label, points, *styled(i))
            for i, arm in enumerate(arms)
            if (points := arm.training("losses", loss))
        ]
        log = _spans_a_decade(lines)
        charts.append(line_chart(f"Loss term “{loss}”, before its weight", "training step", loss, lines, log=log))
    charts += [_shares(arm, alone=len(arms) == 1) for arm in arms]
    return f'<div class="charts">{"".join(charts)}</div>'


def _shares(arm: Arm, *, alone: bool) -> str:
    """How strong the gradient of each weighted term of one arm is."""
    lines = [
        Series(name, _percent(arm.training("shares", name)), *styled(term))
        for term, name in enumerate(arm.names("shares"))
    ]
    title = "Gradient of each weighted term, relative to the pixel term's" + ("" if alone else f": {arm.label}")
    return line_chart(title, "training step", "norm relative to pixel (%)", lines, log=_spans_a_decade(lines))


def _spans_a_decade(lines: Sequence[Series]) -> bool:
    heights = [y for line in lines for _, y in line.points if y > 0]
    return bool(heights) and max(heights) > 10 * min(heights)


def _percent(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, 100 * y) for x, y in points]


# --- crops -----------------------------------------------------------------------------------------------------------------------


def crops_section(arms: Sequence[Arm]) -> str:
    """LR | baseline | students | teacher | HR of every saved image; "" when no images were saved."""
    first = arms[0]
    blocks = [
        _image_block(arms, name, image)
        for name in first.sets
        for image in first.first.result["sets"][name][first.baseline]["per_image"]
        if all((arm.first.folder / "images" / name / f"{image}_student.png").is_file() for arm in arms)
    ]
    if not blocks:
        return ""
    worst = "that bicubic restores worst" if first.baseline == "bicubic" else "in which the input is worst"
    seed = f" Students are those of seed {first.seeds[0]}." if any(len(arm.seeds) > 1 for arm in arms) else ""
    note = (
        f"The two windows of each image are those {worst}: the choice does not depend on any method. One pixel "
        f"of HR is shown as three by three. PSNR is that of the whole image.{seed}"
    )
    box = '<input type="checkbox" id="errors">'
    switch = f"<label>{box} show the error against HR instead (mean over channels, × {crops.ERROR_GAIN})</label>"
    return f'<h2>Crops</h2><p class="note">{note}</p>{switch}{"".join(blocks)}'


def _image_block(arms: Sequence[Arm], set_name: str, image: str) -> str:
    first = arms[0].first
    folder, scale, baseline = first.folder / "images" / set_name, int(first.result["scale"]), first.baseline
    gt, lq, worse = (crops.read(folder / f"{image}_{kind}.png") for kind in ("gt", "lq", baseline))
    restored = [(baseline, worse, first.score(set_name, baseline))]
    for arm in arms:
        own = crops.read(arm.first.folder / "images" / set_name / f"{image}_student.png")
        restored.append((arm.label, own, arm.first.score(set_name)))
    taught = with_teacher(arms)
    if taught and (path := taught.first.folder / "images" / set_name / f"{image}_teacher.png").is_file():
        restored.append(("teacher", crops.read(path), taught.first.score(set_name, "teacher")))
    rows = []
    for window in crops.worst_windows(worse, gt, scale):
        truth = crops.cut(gt, window)
        cells = [_cell(crops.locator(gt, window), "where", f"{gt.shape[1]} × {gt.shape[0]}")]
        if scale > 1:
            cells.append(_cell(_picture(crops.cut(lq, window, scale), "LR"), "LR", f"1/{scale} of the size"))
        for label, pixels, score in restored:
            patch = crops.cut(pixels, window)
            error = _picture(crops.error_map(patch, truth), f"error of {label}", "error")
            psnr = score["per_image"][image]["psnr"] if score else float("nan")
            cells.append(_cell(error + _picture(patch, label), label, f"{psnr:.2f} dB"))
        cells.append(_cell(_picture(truth, "HR"), "HR", "ground truth"))
        rows.append(f'<div class="crops">{"".join(cells)}</div>')
    return f"<h3>{html.escape(image)}</h3>{''.join(rows)}"


def _picture(pixels: crops.Pixels, alt: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<img{name} src="{crops.embed(pixels)}" alt="{html.escape(alt)}">'


def _cell(picture: str, label: str, fact: str) -> str:
    return f'<div class="crop">{picture}<b>{html.escape(label)}</b><br><span>{html.escape(fact)}</span></div>'


# --- how it was made -------------------------------------------------------------------------------------------------------------


def _making_of(arm: Arm) -> str:
    run = arm.first
    others = {f"run folder, seed {other.seed}": str(other.folder) for other in arm.runs[1:]}
    facts = {"run folder": str(run.folder), **others, "command": run.command, **flat(run.environment)}
    rows = [[html.escape(name), html.escape(str(value))] for name, value in facts.items() if value != ""]
    parts = (
        page.table(["environment", ""], rows)
        + f"<h3>config.yaml</h3><pre>{html.escape((run.folder / 'config.yaml').read_text())}</pre>"
    )
    return page.folded(f"{arm.label}: environment and full configuration", parts)
