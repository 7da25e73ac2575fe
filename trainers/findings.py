"""What a comparison found, in numbers (comparison.json) and in the words that its report opens with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainers import report
from trainers.alike import BASELINES, differences
from trainers.fields import TEACHER
from trainers.paired import Paired, paired
from trainers.results import Arm, difference

if TYPE_CHECKING:
    from trainers.plan import Measured


def summary(arms: Sequence[Arm], refused: Mapping[str, str], costs: Mapping[str, Measured]) -> dict[str, Any]:
    """comparison.json: the numbers of the report, and the words that it opens with."""
    first = arms[0]
    result = first.first.result
    missing = [method for method in BASELINES if all(arm.method != method for arm in arms) and method not in refused]
    return {
        "headline": headline(arms),
        "remarks": remarks(arms, missing),
        "differences": differences(arms),
        "missing_baselines": missing,
        "not_applicable": dict(refused),
        **{key: result[key] for key in ("protocol", "protocol_text", "task", "scale")},
        "sets": {name: _scores(arms, name) for name in first.sets},
        "paired": {name: _all_paired(arms, name, None) for name in first.sets},
        "equal_seconds": shortest(arms),
        "paired_at_equal_seconds": {name: _all_paired(arms, name, shortest(arms)) for name in first.sets},
        "costs": {label: _cost(measured) for label, measured in costs.items()},
        "arms": {arm.label: _facts(arm) for arm in arms},
    }


def _scores(arms: Sequence[Arm], name: str) -> dict[str, Any]:
    first = arms[0]
    found: dict[str, Any] = {first.baseline: first.score(name, first.baseline)}
    for arm in arms:
        found[arm.label] = {**(arm.score(name) or {}), "deviation": arm.spread(name), "by_seed": arm.by_seed(name)}
        found[arm.label]["at_equal_seconds"] = arm.by_seed(name, shortest(arms))
    if taught := report.with_teacher(arms):
        found["teacher"] = taught.score(name, "teacher")
    return found


def _all_paired(arms: Sequence[Arm], name: str, seconds: float | None) -> dict[str, dict[str, Any]]:
    return {
        arm.label: {reference.label: found.plain() for reference, found in pairs}
        for arm, pairs in all_pairs(arms, name, seconds)
    }


def _cost(measured: Measured) -> dict[str, Any]:
    costs = measured.costs
    named = {"student": costs.student, **costs.teachers}
    return {
        "seconds_per_step": measured.seconds,
        "process_peak_bytes": measured.peak,
        "step_peak_bytes": costs.peak,
        "networks": {name: {"peak_bytes": cost.peak, "seconds": cost.seconds} for name, cost in named.items()},
        "terms": {name: {"peak_bytes": cost.peak, "seconds": cost.seconds} for name, cost in costs.terms.items()},
    }


def _facts(arm: Arm) -> dict[str, Any]:
    kept = ("method", "steps", "batch", "patch", "student", "teacher", "macs_for")
    own = {"folders": [str(run.folder) for run in arm.runs], "seeds": arm.seeds, "seconds": arm.seconds}
    return {**own, **{key: arm.first.result[key] for key in kept}}


# --- pairs -----------------------------------------------------------------------------------------------------------------------


def references(arms: Sequence[Arm]) -> list[Arm]:
    """The arms that others are judged by: scratch and output, one of each, from random weights where there is such a one."""
    sliced = [arm for arm in arms if arm.first.settings.get("student", {}).get("weights") == TEACHER]
    fresh_last = [*sliced, *reversed([arm for arm in arms if arm not in sliced])]
    found = {arm.method: arm for arm in fresh_last if arm.method in BASELINES}
    return [found[method] for method in BASELINES if method in found]


def all_pairs(arms: Sequence[Arm], name: str, seconds: float | None) -> list[tuple[Arm, list[tuple[Arm, Paired]]]]:
    """Each arm with each baseline before it and their seed-by-seed differences on a set; at the end, or after so many seconds."""
    judges = references(arms)
    found = []
    for arm in arms:
        before = judges[: judges.index(arm)] if arm in judges else judges
        pairs = [(judge, paired(arm.by_seed(name, seconds), judge.by_seed(name, seconds))) for judge in before]
        found.append((arm, [(judge, pair) for judge, pair in pairs if pair is not None]))
    return [(arm, pairs) for arm, pairs in found if pairs]


def shortest(arms: Sequence[Arm]) -> float:
    """Seconds of training after which the quickest run was done: all others had a value there too."""
    return min(run.validation(arm.sets[0], "seconds")[-1][0] for arm in arms for run in arm.runs)


# --- words -----------------------------------------------------------------------------------------------------------------------


def headline(arms: Sequence[Arm]) -> str:
    """Which arm ends highest on the first validation set, and by how much."""
    name = arms[0].sets[0]
    best, second, *_ = ranked = sorted(arms, key=lambda arm: -arm.psnr(name))
    reached = f"{best.psnr(name):.2f}"
    gaps = [report.gap(difference(best.psnr(name), arm.psnr(name))) for arm in ranked[1:]]
    over = (
        f"{report.gap(difference(best.psnr(name), best.psnr(name, best.baseline)))} {report.REFERENCES[best.baseline]}"
    )
    fewest = min(len(arm.seeds) for arm in arms)
    on = "With one seed" if fewest == 1 else f"Over {fewest} seeds"
    if len(arms) > 2:
        others = ", ".join(f"{gap} {arm.label}" for gap, arm in zip(gaps, ranked[1:], strict=True))
        return f"{on}, {best.label} ends highest on {name} with {reached} dB: {others}, {over}."
    if gaps == ["level with"]:
        return f"{on}, {best.label} and {second.label} end level on {name}: {reached} dB, {over}."
    return f"{on}, {best.label} ends {gaps[0]} {second.label} on {name}: {reached} against {second.psnr(name):.2f} dB, {over}."


def remarks(arms: Sequence[Arm], missing: Sequence[str]) -> list[str]:
    """What the headline rests on, whether seeds settle it, how it looks at equal time, and what it does not show."""
    first, name = arms[0], arms[0].sets[0]
    best, second, *_ = sorted(arms, key=lambda arm: -arm.psnr(name))
    images, others = ((arm.score(name) or {})["per_image"] for arm in (best, second))
    ahead = sum(images[image]["psnr"] > others[image]["psnr"] for image in images)
    taught = report.with_teacher(arms)
    found = [
        f"Mean PSNR over {report.count(first, name)} by protocol {first.first.result['protocol']}; "
        f"{first.baseline} {first.psnr(name, first.baseline):.2f} dB"
        + (f", teacher {taught.psnr(name, 'teacher'):.2f} dB. " if taught else ". ")
        + f"Each run: {report.budget(first.first)}. "
        + f"{best.label} is ahead of {second.label} on {ahead} of {report.count(first, name)}.",
        *verdicts(arms),
        equal_time(arms),
        seeds(arms),
        *(f"No {method} run is among these: {BASELINES[method]}." for method in missing),
    ]
    return [text for text in found if text]


def verdicts(arms: Sequence[Arm]) -> list[str]:
    """For each baseline: which arms are above and below it by more than the seeds explain. Nothing for a single seed."""
    name = arms[0].sets[0]
    pairs = [(judge, arm, pair) for arm, found in all_pairs(arms, name, None) for judge, pair in found if pair.n > 1]
    told = []
    for judge in references(arms):
        mine = [(arm, pair) for one, arm, pair in pairs if one is judge]
        if not mine:
            continue
        groups = {
            "above it": [_verdict(arm, pair) for arm, pair in mine if pair.settled and pair.mean > 0],
            "below it": [_verdict(arm, pair) for arm, pair in mine if pair.settled and pair.mean < 0],
            "not settled by these seeds": [_verdict(arm, pair) for arm, pair in mine if not pair.settled],
        }
        text = "; ".join(f"{what}: {', '.join(who)}" for what, who in groups.items() if who)
        told.append(f"Against {judge.label}, on {name}, {text}.")
    return told


def _verdict(arm: Arm, pair: Paired) -> str:
    assert pair.interval is not None  # more than one seed
    low, high = (f"{end:+.3f}".replace("-", "−") for end in pair.interval)
    return f"{arm.label} ({low} to {high} dB, n = {pair.n})"


def equal_time(arms: Sequence[Arm]) -> str:
    """Where every arm stood when the quickest run was done; "" when they took the same time."""
    name, end = arms[0].sets[0], shortest(arms)
    quickest = min(arms, key=lambda arm: arm.seconds)
    if all(arm.seconds < 1.02 * quickest.seconds for arm in arms):
        return ""
    stood = {arm.label: arm.by_seed(name, end) for arm in arms}
    told = ", ".join(
        f"{label} {'not yet validated' if not found else f'{sum(found.values()) / len(found):.2f} dB'}"
        for label, found in stood.items()
    )
    return (
        f"At equal training time ({report.duration(end)}, when {quickest.label} was done): {told}; between two validations the "
        "value is interpolated, and the slower runs were not yet at the end of their learning-rate schedule."
    )


def seeds(arms: Sequence[Arm]) -> str:
    """What is known of the spread over seeds."""
    if min(len(arm.seeds) for arm in arms) > 1:
        return (
            "Runs of one seed share initial weights and data order, so differences are taken seed by seed; intervals are 95 % t intervals "
            "of their mean, one for each pair and not corrected for how many pairs there are."
        )
    return (
        "One seed for a method at least: how much another seed would change is not known from these runs. Gains of 0.02 to 0.1 dB, as "
        "distillation gives at small budgets, are about as large as that; a claim needs three paired seeds at least."
    )
