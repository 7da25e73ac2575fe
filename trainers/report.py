"""report.html: what one run, or several side by side, found. One self-contained page: table, curves, crops, and how it was made."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers import crops, page
from trainers.charts import Level, Series, line_chart
from trainers.models import find
from trainers.results import Run, flat, load_run
from trainers.tasks import TASKS

REFERENCES = {"bicubic": "bicubic", "input": "the input", "teacher": "its teacher"}


def write_report(run_dir: Path) -> Path:
    """Writes <run_dir>/report.html from the other files of the run folder and returns its path.

    Raises:
        InputError: `run_dir` is no run folder, or its run is not done.
    """
    run = load_run(Path(run_dir))
    path = run.folder / "report.html"
    sections = body([run])
    path.write_text(
        page.page(run.result["name"], _kicker(run), headline(run), remarks(run), sections), encoding="utf-8"
    )
    return path


def headline(run: Run) -> str:
    """What the run reached, in one sentence, on its first validation set."""
    name = run.sets[0]
    own = run.psnr(name)
    gaps = [f"{gap(own - run.psnr(name, who))} {words}" for who, words in REFERENCES.items() if run.score(name, who)]
    return f"{run.label} reaches {own:.2f} dB on {name}: {' and '.join(gaps)}."


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


def body(runs: Sequence[Run]) -> list[str]:
    """The sections that a report of one run and a comparison have in common."""
    return [
        "<h2>Results</h2>" + results_table(runs),
        "<h2>Curves</h2>" + curves(runs),
        crops_section(runs),
        "<h2>Image by image</h2>" + "".join(per_image_table(runs, name) for name in runs[0].sets),
        "<h2>How this was made</h2>" + "".join(_making_of(run) for run in runs),
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


def count(run: Run, set_name: str) -> str:
    """How many images a set has: "2 images"."""
    number = len(run.result["sets"][set_name][run.baseline]["per_image"])
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


def with_teacher(runs: Sequence[Run]) -> Run | None:
    """The first run that has a teacher's score on the first set."""
    return next((run for run in runs if run.score(run.sets[0], "teacher")), None)


def results_table(runs: Sequence[Run]) -> str:
    """The baseline, students and teacher: PSNR and SSIM of every set, size and cost."""
    sets, first, baseline = runs[0].sets, runs[0], runs[0].baseline
    where = [f", {name}" if len(sets) > 1 else "" for name in sets]
    heads = ["", "network", *(h for w in where for h in (f"PSNR{w} (dB)", f"SSIM{w}")), f"gain over {baseline} (dB)"]
    heads += ["parameters", "MACs", "training time", "steps/s"]
    best = {name: max(run.psnr(name) for run in runs) for name in sets}
    top = max(run.psnr(sets[0], who) for run in runs for who in ("student", "teacher") if run.score(sets[0], who))
    span = max(top - first.psnr(sets[0], baseline), 1e-9)

    def row(run: Run, who: str, label: str, colour: int, cost: list[str]) -> list[str]:
        scores = [run.result["sets"][name][who] for name in sets]
        cells = []
        for name, score in zip(sets, scores, strict=True):
            bold = ' class="best"' if who == "student" and len(runs) > 1 and score["psnr"] == best[name] else ""
            cells += [f"<td{bold}>{score['psnr']:.2f}</td>", f"{score['ssim']:.4f}"]
        gain = scores[0]["psnr"] - run.psnr(sets[0], baseline)
        bar = f'<span class="bar" style="width: {90 * max(gain, 0) / span:.0f}px; background: var(--c{colour % 6})"></span>'
        return [
            label,
            cost[0],
            *cells,
            f'<td class="text">{signed(gain)}{bar}</td>' if who != baseline else "",
            *cost[1:],
        ]

    what = "interpolation" if baseline == "bicubic" else "as it is"
    rows = [row(first, baseline, baseline, 4, [f'<td class="text">{what}</td>', "", "", "", ""])]
    for index, run in enumerate(runs):
        student = run.result["student"]
        speed = f"{run.steps / run.seconds:.1f}" if run.seconds else ""
        size = [f"{student['params']:,}", quantity(student["macs"])]
        label = page.dot(index) + html.escape(run.label)
        rows.append(row(run, "student", label, index, [_network(student), *size, duration(run.seconds), speed]))
    if taught := with_teacher(runs):
        teacher = taught.result["teacher"]
        cost = [_network(teacher), f"{teacher['params']:,}", quantity(teacher["macs"]), "given", ""]
        rows.append(row(taught, "teacher", "teacher", 4, cost))
    return page.table(heads, rows) + _table_note(first)


def _table_note(run: Run) -> str:
    sets = " and ".join(f"{name} ({count(run, name)})" for name in run.sets)
    text = (
        f"Protocol {run.result['protocol_text'].rstrip('.')}. Means over {sets}. MACs: multiply-accumulates for a "
        f"{run.result['macs_for']}. Training time and steps per second leave out validation and saving. {_weights_measured(run)}"
    )
    return f'<p class="note">{html.escape(text)}</p>'


def _weights_measured(run: Run) -> str:
    decay = run.settings.get("train", {}).get("ema")
    which = f"the moving average of the weights (decay {decay:g})" if decay else "the weights"
    return f"A student is measured with {which} after its last step: no checkpoint was chosen by these images."


def per_image_table(runs: Sequence[Run], set_name: str) -> str:
    """PSNR and SSIM of every image of one set."""
    columns = [(runs[0], runs[0].baseline, runs[0].baseline), *((run, "student", run.label) for run in runs)]
    if taught := with_teacher(runs):
        columns.append((taught, "teacher", "teacher"))
    rows = []
    for image in runs[0].result["sets"][set_name][runs[0].baseline]["per_image"]:
        scores = [run.result["sets"][set_name][who]["per_image"][image] for run, who, _ in columns]
        best = max(s["psnr"] for s, (_, who, _) in zip(scores, columns, strict=True) if who == "student")
        cells = [html.escape(image)]
        for score, (_, who, _) in zip(scores, columns, strict=True):
            bold = ' class="best"' if who == "student" and len(runs) > 1 and score["psnr"] == best else ""
            cells.append(f"<td{bold}>{score['psnr']:.2f} <small>{score['ssim']:.4f}</small></td>")
        rows.append(cells)
    title = f"{set_name}: PSNR (dB) and, smaller, SSIM; protocol {runs[0].result['protocol']}"
    return f"<h3>{html.escape(title)}</h3>" + page.table(["image", *(label for *_, label in columns)], rows)


# --- curves ----------------------------------------------------------------------------------------------------------------------


def curves(runs: Sequence[Run]) -> str:
    """Validation PSNR per step and per second, every loss, and how strong each weighted term's gradient is."""
    charts = []
    for name in runs[0].sets:
        levels = [Level(runs[0].baseline, runs[0].psnr(name, runs[0].baseline))]
        if taught := with_teacher(runs):
            levels.append(Level("teacher", taught.psnr(name, "teacher")))
        for axis, label in (("step", "training step"), ("seconds", "training time (s)")):
            lines = [Series(r.label, r.validation(name, axis), i, i, markers=True) for i, r in enumerate(runs)]
            title = f"Validation PSNR on {name} per {axis.removesuffix('s')}"
            charts.append(line_chart(title, label, "PSNR (dB)", lines, levels=levels))
    for loss in dict.fromkeys(name for run in runs for name in run.names("losses")):
        lines = [
            Series(run.label, points, i, i) for i, run in enumerate(runs) if (points := run.training("losses", loss))
        ]
        log = _spans_a_decade(lines)
        charts.append(line_chart(f"Loss term “{loss}”, before its weight", "training step", loss, lines, log=log))
    terms = list(dict.fromkeys(name for run in runs for name in run.names("shares")))
    lines = [
        Series(
            name if len(runs) == 1 else f"{run.label}: {name}",
            _percent(run.training("shares", name)),
            colour=term if len(runs) == 1 else i,
            dash=term,
        )
        for i, run in enumerate(runs)
        for term, name in enumerate(terms)
    ]
    title = "Gradient of each weighted term, relative to the pixel term's"
    log = _spans_a_decade(lines)
    charts.append(line_chart(title, "training step", "norm relative to pixel (%)", lines, log=log))
    return f'<div class="charts">{"".join(charts)}</div>'


def _spans_a_decade(lines: Sequence[Series]) -> bool:
    heights = [y for line in lines for _, y in line.points if y > 0]
    return bool(heights) and max(heights) > 10 * min(heights)


def _percent(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, 100 * y) for x, y in points]


# --- crops -----------------------------------------------------------------------------------------------------------------------


def crops_section(runs: Sequence[Run]) -> str:
    """LR | baseline | students | teacher | HR of every saved image; "" when no images were saved."""
    blocks = [
        _image_block(runs, name, image)
        for name in runs[0].sets
        for image in runs[0].result["sets"][name][runs[0].baseline]["per_image"]
        if all((run.folder / "images" / name / f"{image}_student.png").is_file() for run in runs)
    ]
    if not blocks:
        return ""
    worst = "that bicubic restores worst" if runs[0].baseline == "bicubic" else "in which the input is worst"
    note = (
        f"The two windows of each image are those {worst}: the choice does not depend on any method. One pixel "
        "of HR is shown as three by three. PSNR is that of the whole image."
    )
    box = '<input type="checkbox" id="errors">'
    switch = f"<label>{box} show the error against HR instead (mean over channels, × {crops.ERROR_GAIN})</label>"
    return f'<h2>Crops</h2><p class="note">{note}</p>{switch}{"".join(blocks)}'


def _image_block(runs: Sequence[Run], set_name: str, image: str) -> str:
    folder, scale = runs[0].folder / "images" / set_name, int(runs[0].result["scale"])
    baseline = runs[0].baseline
    gt, lq, worse = (crops.read(folder / f"{image}_{kind}.png") for kind in ("gt", "lq", baseline))
    restored = [(baseline, worse, runs[0].score(set_name, baseline))]
    for run in runs:
        own = crops.read(run.folder / "images" / set_name / f"{image}_student.png")
        restored.append((run.label, own, run.score(set_name)))
    taught = with_teacher(runs)
    if taught and (path := taught.folder / "images" / set_name / f"{image}_teacher.png").is_file():
        restored.append(("teacher", crops.read(path), taught.score(set_name, "teacher")))
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


def _making_of(run: Run) -> str:
    facts = {"run folder": str(run.folder), "command": run.command, **flat(run.environment)}
    rows = [[html.escape(name), html.escape(str(value))] for name, value in facts.items() if value != ""]
    parts = (
        page.table(["environment", ""], rows)
        + f"<h3>config.yaml</h3><pre>{html.escape((run.folder / 'config.yaml').read_text())}</pre>"
    )
    return page.folded(f"{run.label}: environment and full configuration", parts)
