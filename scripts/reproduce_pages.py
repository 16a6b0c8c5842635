"""Results as a page: markdown with tables, the same numbers as JSON, plots as PNG, and what made them."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffopd import __version__
from diffopd.errors import UserError
from diffopd.run_folder import RunFolder, atomic_write

PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy")
COLORS = ("#3366cc", "#dc3912", "#ff9900", "#109618", "#990099", "#0099c6", "#dd4477", "#795548")
BESIDE = (8.4, 4.0)  # inches of a plot with its legend beside it
Line = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Table:
    """One table; a cell is text, or a number that is shown to three digits."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def markdown(self) -> str:
        """As GitHub shows it."""
        lines = [self.header, ["---"] * len(self.header), *([_shown(cell) for cell in row] for row in self.rows)]
        return f"{self.caption}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Plot:
    """One picture: draw(axes) fills a matplotlib axes. size: inches."""

    name: str
    caption: str
    draw: Callable[[Any], None]
    size: tuple[float, float] = (6.4, 4.0)


@dataclass
class Page:
    """What one claim's measurement says. runs: the folders of the trainings that it is about."""

    name: str
    title: str
    text: str
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    data: Any = None
    runs: Sequence[Path] = ()


def check_plotting() -> None:
    """Before anything is run. Raises UserError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("the plots are drawn with matplotlib. Install diffopd[reproduce].") from error


def made_by(arguments: Sequence[str], seeds: Sequence[int], trained_on: str = "") -> dict[str, Any]:
    """Command, seeds, versions and machine; trained_on: where the trainings were run, if elsewhere."""
    return {
        "command": shlex.join(["python", "scripts/reproduce.py", *arguments]),
        "seeds": list(seeds),
        "versions": {"python": platform.python_version(), "diffopd": __version__, **{n: version(n) for n in PACKAGES}},
        "machine": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used"
        + (f"; trained on {trained_on}" if trained_on else ""),
    }


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def write(page: Page, folder: Path, made: dict[str, Any]) -> Path:
    """NAME.md, NAME.json and NAME-*.png in `folder`; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# {page.title}", page.text.strip()]
    for plot in page.plots:
        file = f"{page.name}-{plot.name}.png"
        _draw(plot, folder / file)
        parts.append(f"![{plot.caption}]({file})\n\n{plot.caption}")
    parts += [table.markdown() for table in page.tables]
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    parts.append(f"Made by `{made['command']}`, seeds {made['seeds']}; {versions}; {made['machine']}.")
    made = made | {"trainings": trained_with(page.runs)}
    if made["trainings"]:
        parts[-1] += f" Trained with {' and with '.join(made['trainings'])}."
    tables = [{"caption": t.caption, "header": list(t.header), "rows": [list(r) for r in t.rows]} for t in page.tables]
    stored = {"made_by": made, "tables": tables, "data": page.data}
    atomic_write(folder / f"{page.name}.json", json.dumps(stored, indent=1) + "\n")
    return atomic_write(folder / f"{page.name}.md", "\n\n".join(parts) + "\n")


def trained_with(runs: Sequence[Path]) -> list[str]:
    """The libraries of these runs, each set of versions once."""
    found = [", ".join(f"{name} {number}" for name, number in RunFolder(run).versions().items()) for run in runs]
    return sorted(set(found))


def _draw(plot: Plot, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=plot.size, layout="constrained")
    axes.grid(alpha=0.25)
    plot.draw(axes)
    figure.savefig(file, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def lines(
    series: dict[str, Line], x: str, y: str, *, log_y: bool = False, each: Mapping[str, Sequence[Line]] | None = None
) -> Callable[[Any], None]:
    """A drawing of named lines with dots, the legend beside it. each: thin lines in the color of a name."""

    def draw(axes: Any) -> None:
        for (label, points), color in zip(series.items(), COLORS * len(series), strict=False):
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label, color=color)
            for thin in (each or {}).get(label, ()):
                axes.plot(*zip(*thin, strict=True), linewidth=0.7, alpha=0.5, color=color)
        axes.set(xlabel=x, ylabel=y, yscale="log" if log_y else "linear")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return draw


def dots(series: dict[str, Sequence[tuple[float, float]]], x: str, y: str) -> Callable[[Any], None]:
    """A drawing of named points."""

    def draw(axes: Any) -> None:
        marks = "osD^vP*Xph"
        for number, (label, points) in enumerate(series.items()):
            look = {"color": COLORS[number % len(COLORS)], "marker": marks[number % len(marks)]}
            axes.scatter(*zip(*points, strict=True), label=label, s=28, **look)
        axes.set(xlabel=x, ylabel=y)
        axes.legend(frameon=False, fontsize="small")

    return draw


def sheet(rows: dict[str, np.ndarray]) -> Callable[[Any], None]:
    """A drawing of rows of pictures (H, W, 3), each with its name before it."""

    def draw(axes: Any) -> None:
        axes.imshow(np.concatenate(list(rows.values())), interpolation="nearest")
        height = len(next(iter(rows.values())))
        axes.set_yticks([(number + 0.5) * height for number in range(len(rows))], list(rows))
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.set_frame_on(False)

    return draw


def spread(values: Sequence[float]) -> str:
    """Mean over seeds, with their range where there are several."""
    mean = sum(values) / len(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"


def _shown(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def given_arguments() -> list[str]:
    """What this process was started with."""
    return sys.argv[1:]
