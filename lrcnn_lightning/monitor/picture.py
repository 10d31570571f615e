"""The picture of a measured step: live activation memory over its operations, beside plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrcnn_lightning.config import format_size
from lrcnn_lightning.monitor.meter import StepMemory

__all__ = ["draw"]

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))

_POINTS = 4000
"""Points of a curve that are drawn at most; of a longer one, the highest in each stretch."""


def draw(path: Path, run: StepMemory, plain: StepMemory | None, predicted: int | None, batch: int) -> None:
    """Write the picture; the format follows the file's ending.

    Args:
        path: The file.
        run: The measured step, with its timeline.
        plain: The same modules run plainly; ``None`` where there is nothing to compare with.
        predicted: What the plans predict, in bytes, or ``None``.
        batch: The number of the measured batch, from 1 on.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    highest = max(1, *(step.peak_bytes for step in (run, plain) if step is not None))
    unit, scale = next((name, size) for name, size in _UNITS if highest >= size)
    top = max(run.timeline, default=0)
    if plain is not None:
        note = "the modules that run row-wise, without the loss and other layers"
        # The backward pass of rows begins earlier, as it computes again: the words at its mark, the higher one, pass
        # above the other line.
        label = f"plain PyTorch, at least: peak {format_size(plain.peak_bytes)}\n({note})"
        _curve(axis, plain, scale, "tab:orange", label, 1.03 * highest / scale)
    whole = "\n(the whole step, the loss and other layers included)" if predicted is not None else ""
    label = f"this run, batch {batch}, measured: peak {format_size(top)}{whole}"
    _curve(axis, run, scale, "tab:blue", label, 1.11 * highest / scale)
    if predicted is not None:
        axis.axhline(
            predicted / scale,
            color="black",
            linestyle="--",
            linewidth=1,
            label=f"predicted by the plan, for the modules that run row-wise alone: peak {format_size(predicted)}",
        )
    axis.set_xlim(0, 100)
    axis.set_ylim(bottom=0, top=1.75 * highest / scale)
    axis.set_xlabel("operations of one training step, from its first (0 %) to the end of the backward pass (100 %)")
    axis.set_ylabel(f"live activation memory, {unit}")
    axis.legend(loc="upper left", fontsize=9)
    title = "Activation memory over one training step"
    if predicted is None:
        title += " of plain PyTorch"
    elif plain is not None and top:
        ratio = plain.peak_bytes / top
        title += f": {ratio:.1f} times less than plain PyTorch" if ratio >= 1 else ": plain PyTorch takes less"
    axis.set_title(title)
    figure.savefig(path, dpi=130)


def _curve(axis: Any, step: StepMemory, scale: int, colour: str, label: str, mark: float) -> None:
    """One filled curve, with a mark above all curves, at the height ``mark``, where its backward pass begins."""
    count = max(len(step.timeline), 1)
    stride = -(-count // _POINTS)
    highest = [max(step.timeline[i : i + stride]) / scale for i in range(0, len(step.timeline), stride)]
    places = [100 * min(i + stride, count) / count for i in range(0, len(step.timeline), stride)]
    axis.fill_between([0, *places], [0, *highest], color=colour, alpha=0.25, linewidth=0)
    axis.plot([0, *places], [0, *highest], color=colour, linewidth=1.2, label=f"{label}, {count} operations")
    if 0 < step.backward_start < count:
        x = 100 * step.backward_start / count
        axis.plot([x, x], [0, mark], color=colour, linestyle=":", linewidth=1.2)
        axis.text(x, mark, " backward pass begins", color=colour, fontsize=8)
