"""What a check says: for people and bug reports as text, for programs as data."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from lrcnn_lightning.checking.comparison import Comparison
from lrcnn_lightning.config import format_count
from lrcnn_lightning.planning.plan import Plan

__all__ = ["CheckReport", "Run", "versions"]

_SHOWN = 20
"""Values that are not exact and are shown, at most; `CheckReport.comparisons` has all of them."""


def versions() -> dict[str, str]:
    """What a bug report has to say of the machine."""
    return {
        "lrcnn_lightning": metadata.version("lrcnn-lightning"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


@dataclass(frozen=True, eq=False)
class Run:
    """The module run row by row in one way.

    ``plan`` is that of its last training call, None if it made none. ``error`` is what the run raised and the plain
    one did not; ``notices`` is what it warned of; ``parts`` are what ran row by row where it could not as a whole.
    """

    name: str
    options: dict[str, Any]
    plan: Plan | None = None
    error: str | None = None
    notices: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def by_rows(self) -> bool:
        """Whether the module or parts of it ran row by row, and not all plainly."""
        return bool(self.parts) or (self.plan is not None and self.plan.mode != "plain")

    def __str__(self) -> str:
        if self.error is not None:
            return f"raises {self.error}"
        if self.parts:
            return f"ran by its parts: {', '.join(self.parts)}"
        if self.plan is None:
            return "ran plainly"
        if self.plan.mode == "plain":
            return "ran plainly, as was planned"
        segments = sum(not segment.plain for segment in self.plan.segments)
        counts = ((self.plan.rows, "row"), (segments, "segment"), (self.plan.chunks, "batch chunk"))
        return f"{self.plan.mode}, {', '.join(format_count(*count) for count in counts)}"


@dataclass(frozen=True, eq=False)
class CheckReport:
    """The result of `check`; ``print`` shows it.

    ``comparisons`` are sorted, the worst first. ``dtype`` is the type in which the module and the example ran, and
    ``precision`` the narrowest one in which something was computed.
    """

    module: str
    example: str
    steps: int
    loss: str
    dtype: str
    precision: str
    runs: tuple[Run, ...]
    comparisons: tuple[Comparison, ...]
    notices: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def exact(self) -> bool:
        """Whether every run ended, and everything that it shows equals what the plain run shows, up to rounding."""
        return all(run.error is None for run in self.runs) and all(item.exact for item in self.comparisons)

    @property
    def by_rows(self) -> bool:
        """Whether every run was row by row; what runs plainly is exact and saves nothing."""
        return all(run.by_rows for run in self.runs)

    @property
    def worst(self) -> Comparison | None:
        """The value that is missing, or off from the earliest step on, or has the largest error."""
        return next(iter(self.comparisons), None)

    @property
    def wrong(self) -> tuple[Comparison, ...]:
        """The values that are not exact, the worst first."""
        return tuple(item for item in self.comparisons if not item.exact)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data (JSON); what is infinite is written as text, and a plan by its numbers."""
        runs = [
            {
                "name": run.name,
                "options": {name: _plain(value) for name, value in run.options.items()},
                "by_rows": run.by_rows,
                "plan": None if run.plan is None else _numbers(run.plan),
                "error": run.error,
                "notices": list(run.notices),
            }
            for run in self.runs
        ]
        return {
            "exact": self.exact,
            "by_rows": self.by_rows,
            "module": self.module,
            "example": self.example,
            "steps": self.steps,
            "loss": self.loss,
            "dtype": self.dtype,
            "precision": self.precision,
            "versions": self.versions,
            "notices": list(self.notices),
            "runs": runs,
            "comparisons": [{name: _plain(value) for name, value in vars(item).items()} for item in self.comparisons],
        }

    def __str__(self) -> str:
        computed = "" if self.precision == self.dtype else f", computed in {self.precision} in part"
        lines = [
            f"lrcnn_lightning.check of {self.module}: {self._verdict}",
            f"  example    {self.example}",
            f"  compared   {format_count(self.steps, 'training step')} in {self.dtype}{computed}; loss: {self.loss}",
            f"  versions   {', '.join(f'{name} {version}' for name, version in self.versions.items())}",
            *(f"  run        {run.name}: {run}" for run in self.runs),
            *(f"  note       {text}" for text in self._notes()),
        ]
        wrong = self.wrong
        if wrong:
            more = "" if len(wrong) <= _SHOWN else f" {_SHOWN} of them, the others are in `comparisons`:"
            lines += ["", f"  not exact: {len(wrong)} of {len(self.comparisons)}, the worst first.{more}"]
            cells = [_cells(item) for item in wrong[:_SHOWN]]
            lines += _table(("run", "step", "what", "verdict", "error", "largest", "noise", ""), cells)
        if self.comparisons:
            lines += ["", *_table(("run", "what", "exact", "error", "largest", "noise", "of the worst"), self._kinds())]
        return "\n".join(lines)

    @property
    def _verdict(self) -> str:
        failed = [run.name for run in self.runs if run.error is not None]
        plain = [run.name for run in self.runs if not run.by_rows and run.error is None]
        texts = []
        if failed:
            texts.append(f"FAILS ({', '.join(failed)})")
        if self.wrong:
            texts.append(f"NOT EXACT ({len(self.wrong)} of {len(self.comparisons)} values)")
        elif self.comparisons:
            texts.append("exact")
        if plain:
            texts.append(f"nothing ran row by row ({', '.join(plain)})")
        return ", ".join(texts)

    def _notes(self) -> Iterator[str]:
        yield from self.notices
        by_text: dict[str, list[str]] = {}
        for run in self.runs:
            for text in run.notices:
                by_text.setdefault(text, []).append(run.name)
        yield from (f"{', '.join(names)}: {text}" for text, names in by_text.items())

    def _kinds(self) -> Iterator[Sequence[str]]:
        """A line for each run and kind of value: how many are exact, and the worst one."""
        groups: dict[tuple[str, str], list[Comparison]] = {}
        for run in self.runs:
            for item in self.comparisons:
                if item.run == run.name:
                    groups.setdefault((run.name, item.kind), []).append(item)
        for (run_name, kind), items in groups.items():
            _, _, _, _, error, largest, noise, _ = _cells(items[0])
            count = f"{sum(item.exact for item in items)} of {len(items)}"
            yield run_name, kind if kind.endswith("s") else f"{kind}s", count, error, largest, noise, items[0].name


def _cells(item: Comparison) -> tuple[str, ...]:
    errors = (f"{e:.1e}" if math.isfinite(e) else "-" for e in (item.error, item.largest))
    noise = "-" if item.noise is None else f"{item.noise:.1e}"
    return item.run, str(item.step), item.what, item.verdict, *errors, noise, item.detail


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Lines of text in columns."""
    everything = [head, *lines]
    widths = [max(len(cells[column]) for cells in everything) for column in range(len(head))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in everything
    ]


def _numbers(plan: Plan) -> dict[str, Any]:
    segments = sum(not segment.plain for segment in plan.segments)
    return {
        "mode": plan.mode,
        "rows": plan.rows,
        "segments": segments,
        "batch_chunks": plan.chunks,
        "peak_bytes": plan.peak_bytes,
        "plain_peak_bytes": plan.plain_peak_bytes,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, type(None))) else str(value)
