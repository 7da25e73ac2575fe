"""The frame of a report: one HTML page with its style and its few lines of script inside, and tables.

Nothing is loaded from anywhere: the page works from a mail attachment, offline, in light and dark mode, and on paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

# Okabe and Ito's palette for the colour-blind, in the order that keeps neighbours apart; lighter in dark mode.
STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --soft: #5b6470; --line: #d9dde3; --wash: #f4f6f8; --warn: #fff4e0; --edge: #c77700;
  --c0: #0072b2; --c1: #d55e00; --c2: #00855f; --c3: #b0528a; --c4: #5b6470; --c5: #8a6d00;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --ink: #e8eaed; --soft: #a2abb6; --line: #343a42; --wash: #1d2126; --warn: #33290f; --edge: #e69f00;
    --c0: #56b4e9; --c1: #ff8b3d; --c2: #35c99b; --c3: #e58fc0; --c4: #a2abb6; --c5: #f0e442;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 40px 28px 64px; max-width: 1280px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
header { border-bottom: 1px solid var(--line); padding-bottom: 18px; }
.kicker { margin: 0; color: var(--soft); font-size: 13px; letter-spacing: .04em; }
h1 { margin: 6px 0 10px; max-width: 38em; font-size: 27px; line-height: 1.25; font-weight: 650; text-wrap: balance; }
header p { max-width: 66em; margin: 6px 0 0; }
h2 { margin: 40px 0 12px; font-size: 19px; font-weight: 650; }
h3 { margin: 26px 0 8px; font-size: 15px; font-weight: 650; }
p.note { margin: 8px 0; max-width: 76em; font-size: 13.5px; color: var(--soft); }
.warning { background: var(--warn); border-left: 4px solid var(--edge); padding: 10px 16px; margin: 18px 0 0; }
.warning ul { margin: 4px 0 0; padding-left: 20px; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 6px 14px; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 4px; }
th.text, td.text { text-align: left; }
td.text { white-space: normal; max-width: 220px; line-height: 1.3; }
td.refused { max-width: none; color: var(--soft); }
thead th { border: solid var(--ink); border-width: 2px 0 1px; font-weight: 600; vertical-align: bottom; }
tbody td { border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 2px solid var(--ink); }
td.best { font-weight: 700; }
td small { color: var(--soft); }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 8px; }
.bar { display: inline-block; height: 9px; border-radius: 2px; margin-left: 10px; vertical-align: middle; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 26px 34px; }
figure { margin: 0; position: relative; break-inside: avoid; }
figcaption { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; color: var(--soft); min-height: 22px; }
.swatch { width: 30px; height: 8px; margin-right: 6px; vertical-align: middle; }
.plot { display: block; width: 100%; height: auto; touch-action: pan-y; }
.plot text { font-family: inherit; font-size: 12px; fill: var(--soft); }
.plot .grid { stroke: var(--line); }
.plot .axis, .plot .rule { stroke: var(--soft); }
.plot .level { stroke: var(--soft); stroke-dasharray: 3 4; }
.tip {
  position: absolute; pointer-events: none; white-space: pre; padding: 4px 8px; font-size: 12.5px; background: var(--paper);
  border: 1px solid var(--line); border-radius: 4px; box-shadow: 0 2px 8px rgb(0 0 0 / .18); font-variant-numeric: tabular-nums;
}

.crops { display: flex; flex-wrap: wrap; gap: 10px; margin: 8px 0 14px; break-inside: avoid; }
.crop { width: 144px; font-size: 12.5px; line-height: 1.35; }
.crop img, .crop svg { display: block; width: 144px; height: 144px; margin-bottom: 4px; background: var(--wash); }
.crop img { image-rendering: pixelated; }
.crop b { font-weight: 600; }
.crop span { color: var(--soft); }
.crop img.error { display: none; }
body:has(#errors:checked) .crop img.error { display: block; }
body:has(#errors:checked) .crop img.error + img { display: none; }
label { font-size: 13.5px; color: var(--soft); }

details { border: 1px solid var(--line); border-radius: 6px; padding: 8px 14px; margin: 10px 0; }
summary { cursor: pointer; font-weight: 600; }
details td:last-child { text-align: left; white-space: normal; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--wash); padding: 12px 14px; border-radius: 4px; font-size: 12.5px; line-height: 1.45; }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; }

@media print {
  * { print-color-adjust: exact; }
  body { padding: 0; font-size: 12px; }
  h1 { font-size: 20px; }
  h2 { margin-top: 22px; }
  h2, h3, p.note { break-after: avoid; }
  .charts { grid-template-columns: 1fr 1fr; gap: 16px; }
  .crop, .crop img, .crop svg { width: 84px; }
  .crop img, .crop svg { height: 84px; }
  p.note, .legend, .crop, figcaption { font-size: 10.5px; }
  .scroll { overflow: visible; }
  th, td { padding: 4px 6px; }
  table { font-size: 9.5px; }
  .bar { max-width: 40px; }
  label { display: none; }
}
"""

# The values under the pointer: of each curve, the point nearest to it along the x axis.
SCRIPT = """
document.querySelectorAll("figure").forEach(figure => {
  const [plot, rule, tip] = [".plot", ".rule", ".tip"].map(name => figure.querySelector(name));
  const curves = [...plot.querySelectorAll("polyline")].map(line => ({
    label: line.dataset.label, xs: line.dataset.x.split(" "), ys: line.dataset.y.split(" "),
    places: line.getAttribute("points").split(" ").map(point => Number(point.split(",")[0])),
  }));
  plot.addEventListener("pointerleave", () => { tip.hidden = true; rule.setAttribute("visibility", "hidden"); });
  plot.addEventListener("pointermove", event => {
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(plot.getScreenCTM().inverse()).x;
    const nearest = curves.map(({ places }) =>
      places.reduce((best, place, i) => Math.abs(place - x) < Math.abs(places[best] - x) ? i : best, 0));
    tip.textContent = curves.map(({ label, xs, ys }, i) => {
      const [place, value] = [xs, ys].map(list => Number(list[nearest[i]]).toLocaleString("en", { maximumSignificantDigits: 5 }));
      return `${label}: ${value} at ${place}`;
    }).join("\\n");
    ["x1", "x2"].forEach(end => rule.setAttribute(end, curves[0].places[nearest[0]]));
    rule.setAttribute("visibility", "visible");
    tip.hidden = false;
    const box = figure.getBoundingClientRect(), left = event.clientX - box.left;
    tip.style.top = `${event.clientY - box.top + 16}px`;
    tip.style.left = `${left > box.width / 2 ? Math.max(0, left - tip.offsetWidth - 12) : left + 12}px`;
  });
});
"""


def page(title: str, kicker: str, headline: str, remarks: Sequence[str], sections: Sequence[str]) -> str:
    """The whole document. `title`, `kicker`, `headline` and `remarks` are text; `sections` are HTML."""
    lines = "".join(f"<p>{escape(remark)}</p>" for remark in remarks)
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"{viewport}\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(headline)}</h1>{lines}</header>\n'
        + "\n".join(part for part in sections if part)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table. `heads` are text; a cell is HTML, its content or a whole <td>. A column with a <td class="text"> is aligned left.

    The last cell of a row may span the columns that the row lacks.
    """
    cells = [[cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row] for row in rows]
    kinds = [
        ' class="text"' if any('<td class="text"' in row[i] for row in cells if i < len(row)) else ""
        for i in range(len(heads))
    ]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(heads, kinds, strict=True))
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def dot(colour: int) -> str:
    """A spot in a series' colour."""
    return f'<span class="dot" style="background: var(--c{colour % 6})"></span>'


def warning(text: str, items: Sequence[str]) -> str:
    """A box that cannot be overlooked; "" without items."""
    if not items:
        return ""
    listed = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<div class="warning" role="note">{escape(text)}<ul>{listed}</ul></div>'


def folded(summary: str, content: str) -> str:
    """A part that is closed until someone opens it; `content` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"
