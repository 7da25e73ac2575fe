"""The tables that only a comparison has: paired differences and costs, as HTML for its report, and a summary in Markdown to paste."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trainers import page, report
from trainers.findings import all_pairs, shortest
from trainers.paired import Paired
from trainers.results import Arm

if TYPE_CHECKING:
    from trainers.footprint import Cost
    from trainers.plan import Measured

MIB = 2**20


def sections(arms: Sequence[Arm], costs: Mapping[str, Measured]) -> list[str]:
    """HTML: differences to the baselines seed by seed, at equal steps and at equal seconds; and what a step costs."""
    return [pairs_section(arms), costs_section(costs)]


def pairs_section(arms: Sequence[Arm]) -> str:
    """Differences to scratch and to output, paired by seed; "" without such a pair."""
    end = shortest(arms)
    parts = []
    for name in arms[0].sets:
        for when, seconds in (("after the last step", None), (f"after {report.duration(end)} of training", end)):
            rows = [
                [html.escape(arm.label), f'<td class="text">{html.escape(judge.label)}</td>', *_paired_cells(pair)]
                for arm, pairs in all_pairs(arms, name, seconds)
                for judge, pair in pairs
            ]
            if rows:
                heads = [
                    "",
                    "against",
                    "difference (dB)",
                    "± sd",
                    "95 % interval",
                    "n",
                    "seeds that agree",
                    "seed by seed",
                ]
                parts.append(f"<h3>{html.escape(name)}, {when}</h3>" + page.table(heads, rows))
    if not parts:
        return ""
    note = (
        "PSNR of a method minus that of the baseline with the same seed, which has the same initial weights and the same data in the same "
        "order. The interval is a t interval of the mean difference; bold where it leaves 0 out. A single seed has neither "
        "spread nor interval, and no claim follows from it."
    )
    return "<h2>Paired differences</h2>" + "".join(parts) + f'<p class="note">{note}</p>'


def _paired_cells(pair: Paired) -> list[str]:
    bold = ' class="best"' if pair.settled else ""
    each = ", ".join(f"{seed}: {decibels(difference)}" for seed, difference in pair.differences.items())
    agree = f"{pair.agree} of {pair.n}" if pair.n > 1 else "–"
    deviation = "–" if pair.deviation is None else f"{pair.deviation:.3f}"
    return [
        f"<td{bold}>{decibels(pair.mean)}</td>",
        deviation,
        interval(pair),
        str(pair.n),
        agree,
        f"<small>{each}</small>",
    ]


def decibels(value: float) -> str:
    """+0.054, −0.054."""
    return f"{value:+.3f}".replace("-", "−")


def interval(pair: Paired) -> str:
    """+0.010 to +0.090, or a dash for a single seed."""
    return "–" if pair.interval is None else " to ".join(map(decibels, pair.interval))


def costs_section(costs: Mapping[str, Measured]) -> str:
    """Seconds and peak bytes of a step: of the networks and of each loss term; "" where nothing was measured."""
    if not costs:
        return ""
    terms = list(dict.fromkeys(name for measured in costs.values() for name in measured.costs.terms))
    heads = ["", "step (ms)", "process peak (MiB)", "student", "teachers", *terms]
    rows = []
    for label, measured in costs.items():
        teachers = "<br>".join(_cost(cost) for cost in measured.costs.teachers.values())
        cells = [_cost(measured.costs.terms[name]) if name in measured.costs.terms else "" for name in terms]
        whole = [f"{1e3 * measured.seconds:,.1f}", f"{measured.peak / MIB:,.0f}"]
        rows.append([html.escape(label), *whole, _cost(measured.costs.student), teachers, *cells])
    note = (
        "One optimiser step on one micro-batch of noise, in a process of its own, measured once with the kdops backend. Networks and "
        "loss terms: milliseconds of forward and backward, and below them the peak of live tensors that are this part's, in MiB. "
        "What two terms share is counted for the first."
    )
    return f'<h2>Cost of a step</h2>{page.table(heads, rows)}<p class="note">{note}</p>'


def _cost(cost: Cost) -> str:
    return f"{1e3 * cost.seconds:,.1f} ms<br><small>{cost.peak / MIB:,.1f} MiB</small>"


# --- Markdown --------------------------------------------------------------------------------------------------------------------


def markdown(
    arms: Sequence[Arm], refused: Mapping[str, str], costs: Mapping[str, Measured], words: Sequence[str]
) -> str:
    """comparison.md: the headline and its remarks, and one table for each validation set."""
    tables = [_markdown_table(arms, name, refused, costs) for name in arms[0].sets]
    return "\n\n".join([*words, *tables]) + "\n"


def _markdown_table(arms: Sequence[Arm], name: str, refused: Mapping[str, str], costs: Mapping[str, Measured]) -> str:
    end = shortest(arms)
    pairs = {arm.label: found for arm, found in all_pairs(arms, name, None)}
    judges = list(dict.fromkeys(judge.label for found in pairs.values() for judge, _ in found))
    heads = [name, "seeds", "PSNR (dB)", "SSIM", *(f"against {label} (dB), 95 % interval, agree" for label in judges)]
    heads += [f"PSNR after {report.duration(end)}", "step (ms)", "largest term (MiB)"]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for who, arm, label in _frame(arms):
        score = arm.score(name, who) or {}
        rows.append([label, "", f"{score['psnr']:.2f}", f"{score['ssim']:.4f}", *[""] * (len(heads) - 4)])
    for arm in arms:
        score, found = arm.score(name) or {}, {judge.label: pair for judge, pair in pairs.get(arm.label, [])}
        stood = arm.by_seed(name, end)
        cells = [arm.label, ", ".join(map(str, arm.seeds)), report.with_spread(arm, name), f"{score['ssim']:.4f}"]
        cells += [_markdown_pair(found[judge]) if judge in found else "" for judge in judges]
        cells.append(f"{sum(stood.values()) / len(stood):.2f}" if stood else "not yet validated")
        rows.append([*cells, *_markdown_cost(costs.get(arm.label))])
    rows += [[method, *[""] * (len(heads) - 2), f"not applicable: {reason}"] for method, reason in refused.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _frame(arms: Sequence[Arm]) -> list[tuple[str, Arm, str]]:
    taught = report.with_teacher(arms)
    return [(arms[0].baseline, arms[0], arms[0].baseline), *([("teacher", taught, "teacher")] if taught else [])]


def _markdown_pair(pair: Paired) -> str:
    if pair.interval is None:
        return f"{decibels(pair.mean)}, n = 1"
    return f"{decibels(pair.mean)}, {interval(pair)}, {pair.agree} of {pair.n}"


def _markdown_cost(measured: Measured | None) -> list[str]:
    if measured is None:
        return ["", ""]
    name, cost = max(measured.costs.terms.items(), key=lambda term: term[1].peak)
    return [f"{1e3 * measured.seconds:,.1f}", f"{name} {cost.peak / MIB:,.1f}"]
