"""How the step's cost grows, drawn: `python -m benches.plots` writes results/step_scaling_{l0,d_sae,batch}.svg.

From results/cpu/step_scaling.json, which `python -m benches.step_scaling` writes: times as multiples of the bare encoder product's,
dashed at 1. SVG by hand, since nothing else here needs a plotting package.
"""

import json
import math
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 40, WIDTH - 16, 44, HEIGHT - 48  # of the area within the axes
COLOURS = {"sparse": "#0b6e4f", "dense": "#b23a48"}
NAMES = {"l0": "active latents per input (L0)", "d_sae": "latents (d_sae)", "batch": "batch"}
Point = dict[str, Any]


def text(x: float, y: float, words: object, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float, stroke: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke={stroke}/>'


def near(l0: float) -> int:
    """The power of 2 that was asked for; what is measured is a little off it."""
    return 2 ** round(math.log2(l0))


def plot(sweep: str, points: list[Point], fixed: str) -> str:
    """x is log2, from 0.2 below the first point to 0.2 above the last; y is linear from 0."""
    paths = [path for path in COLOURS if path in points[0]]
    low, high = (math.log2(near(point[sweep])) for point in (points[0], points[-1]))
    top = math.ceil(max(point[path] for point in points for path in paths))

    def x(value: float) -> float:
        return LEFT + (math.log2(value) - low + 0.2) / (high - low + 0.4) * (RIGHT - LEFT)

    def y(value: float) -> float:
        return BOTTOM - value / top * (BOTTOM - TOP)

    legend = [*((path, f'"{COLOURS[path]}"') for path in paths), ("product", '"#555" stroke-dasharray="4 3"')]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 16, "one training step / the bare encoder product", "start"),
        text((LEFT + RIGHT) / 2, HEIGHT - 12, f"{NAMES[sweep]}; {fixed}"),
    ]
    for value in range(top + 1):
        parts += [
            line(LEFT, y(value), RIGHT, y(value), '"#ddd"'),
            text(LEFT - 6, y(value) + 4, value, "end"),
        ]
    for value in (near(point[sweep]) for point in points):
        parts += [line(x(value), BOTTOM, x(value), BOTTOM + 4, '"black"'), text(x(value), BOTTOM + 17, value)]
    parts.append(line(LEFT, y(1), RIGHT, y(1), legend[-1][1]))
    for start, (name, stroke) in zip(range(LEFT, RIGHT, 90), legend, strict=False):
        parts += [line(start, 30, start + 20, 30, stroke), text(start + 25, 34, name, "start")]
    for path in paths:
        spots = " ".join(f"{x(point[sweep]):.1f},{y(point[path]):.1f}" for point in points)
        parts.append(f'<polyline points="{spots}" fill="none" stroke="{COLOURS[path]}" stroke-width="2"/>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    report = json.loads((RESULTS / "cpu" / "step_scaling.json").read_text(encoding="utf-8"))
    for sweep in NAMES:
        first = report[sweep][0] | {"l0": near(report[sweep][0]["l0"])}
        fixed = [f"{size} {first[size]}" for size in ("batch", "d_in", "d_sae", "l0") if size != sweep]
        file = RESULTS / f"step_scaling_{sweep}.svg"
        file.write_text(plot(sweep, report[sweep], ", ".join(fixed)), encoding="utf-8")


if __name__ == "__main__":
    main()
