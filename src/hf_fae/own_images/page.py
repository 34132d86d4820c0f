"""A page about a finished run in one file: samples, reconstructions, curves and how to use the result."""

import base64
import html
import json
from pathlib import Path

from ..utils.atomic import atomic_write
from .plan import Plan
from .stages import Stage


__all__ = ["write_page"]

STYLE = """body { font-family: sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img, svg { max-width: 100%; height: auto } pre { background: #f3f3f3; padding: 1rem; overflow-x: auto }"""
WIDTH, HEIGHT, MARGIN = 640, 220, 50


def write_page(path: Path, plan: Plan, stages: list[Stage], command: str) -> None:
    """Write the page; images and curves of the stages are inside.

    Args:
        command: that samples from the result.
    """
    parts = [f"<h1>{html.escape(plan.notes[0])}</h1>", "<ul>", *(f"<li>{html.escape(n)}</li>" for n in plan.notes[1:])]
    parts += [
        f"<li>recipe {plan.recipe}, {plan.resolution} px, in {plan.mixed_precision} on {plan.device}</li>",
        "</ul>",
    ]
    parts += ["<h2>Use it</h2>", f"<pre>{html.escape(command)}</pre>"]
    for title, folder, name in (
        ("Samples", "generator", "samples"),
        ("Validation images, and below them their reconstructions", "pixels", "reconstructions"),
    ):
        found = sorted((path.parent / folder / "validation").glob(f"{name}-*.png"))
        if found:
            data = base64.b64encode(found[-1].read_bytes()).decode()
            parts += [f"<h2>{title}</h2>", f'<img alt="{name}" src="data:image/png;base64,{data}">']
    parts.append("<h2>Training</h2>")
    for stage in stages:
        log = stage.folder / "log.jsonl"
        if log.is_file():
            entries = [json.loads(line) for line in log.read_text().splitlines()]
            names = [
                name for name in ("loss", "validation/loss", "validation/psnr") if any(name in e for e in entries)
            ]
            for name in names:
                points = [(e["step"], e[name]) for e in entries if e.get(name) is not None]
                parts += [f"<h3>{stage.name}: {name}</h3>", _curve(points)]
    text = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>hf-fae train</title><style>{STYLE}</style>'
    atomic_write(path, f'<!doctype html>\n<html lang="en">{head}\n<body>\n{text}\n</body></html>\n')


def _curve(points):
    """An SVG of (step, value) pairs, with the ends of both axes labelled."""
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    first, last = min(steps), max(steps)
    places = [
        (
            MARGIN + (step - first) / (last - first or 1) * (WIDTH - 2 * MARGIN),
            HEIGHT - 30 - (value - low) / (high - low or 1) * (HEIGHT - 60),
        )
        for step, value in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="#2563eb"/>' for x, y in places[:: len(places) // 50 + 1]
    )
    labels = [(2, 30, f"{high:.3g}"), (2, HEIGHT - 30, f"{low:.3g}")]
    labels += [(MARGIN, HEIGHT - 8, f"step {first:,}"), (WIDTH - 2 * MARGIN, HEIGHT - 8, f"{last:,}")]
    texts = "".join(f'<text x="{x}" y="{y}" font-size="12">{text}</text>' for x, y, text in labels)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">'
        f'<polyline points="{line}" fill="none" stroke="#2563eb" stroke-width="1.5"/>{dots}{texts}</svg>'
    )
