"""The plain run of a check, which everything is compared with, and how it was made possible.

Three things may be otherwise than the caller has them, and each is said: the example may be cut, the precision may be
the module's own instead of float64, and the module may run itself instead of a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrcnn_lightning.checking.comparison import Distance, Key, digits, distance, largest_of, size_of, what
from lrcnn_lightning.checking.example import Example
from lrcnn_lightning.checking.state import held_tensors
from lrcnn_lightning.checking.steps import Loss, Shown, Watch, run_steps
from lrcnn_lightning.checking.subject import Subject, twin, widened
from lrcnn_lightning.config import format_size
from lrcnn_lightning.graph import under_autocast
from lrcnn_lightning.monitor.measure import measure_fake
from lrcnn_lightning.planning.search import usable_bytes

__all__ = ["STEPS", "Baseline", "is_out_of_memory"]

STEPS = 2
"""Steps that a module runs: what the first one leaves in buffers and attributes, the second one reads."""
_LARGE = 256 * 2**20
"""Bytes of activation memory above which a plain step in float64 takes long."""
_SMALL = 2**17
"""Elements of an example below which its memory needs no measuring."""
_RATIO = 256
"""Bytes of activation memory for each byte of the example, where they cannot be measured."""
_SAMPLES = 2
"""Runs that measure the noise."""
_NOTHING = 1e-6
"""What is nothing beside the largest value of its kind."""
_NAMED = 5


@dataclass(frozen=True)
class Baseline:
    """Plain steps of a subject on an example.

    ``noise`` has, for each step and value, how far rounding alone moves it; None if that could not be measured.
    """

    subject: Subject
    example: Example
    loss: Loss | None
    shown: list[Shown]
    dtype: str
    precision: torch.dtype
    notices: tuple[str, ...]
    noise: list[dict[Key, Distance]] | None = None

    @classmethod
    def of(cls, module: nn.Module, example: Example, loss: Loss | None) -> Baseline:
        """The plain run that is nearest to what the caller has and can be made.

        Raises whatever the module raises for the example as it is.
        """
        subject, notices = _copied(module, example)
        for tried, cut in _affordable(subject, example):
            try:
                return cls._run(subject, tried, loss, (*notices, cut)).with_noise()
            except Exception as error:  # it, or the loss, may not take a smaller one
                if is_out_of_memory(error):
                    raise
        return cls._run(subject, example.with_data(0), loss, notices).with_noise()

    @classmethod
    def _run(cls, subject: Subject, example: Example, loss: Loss | None, notices: tuple[str, ...]) -> Baseline:
        """Plain steps of the subject, or else of one that is less than was wanted."""
        watch, reason = None, ""
        foreign = [] if subject.itself else list(held_tensors(subject.module))
        try:
            with subject.fresh() as module:
                watch = Watch(held_tensors(module), foreign)
                with watch:
                    shown = run_steps(module, example, loss, count=STEPS, wide=subject.wide)
        except Exception as error:
            if is_out_of_memory(error) or not (subject.wide or (watch is not None and watch.reads_foreign)):
                raise
            reason = f"{type(error).__name__}: {_first_line(error)}"
        if watch is not None and watch.reads_foreign:
            text = (
                "a function inside of it holds parameters of its own, which a copy would go on using, so it ran "
                "itself, in its own precision, and was put back"
            )
            return cls._run(Subject(subject.module, wide=False, itself=True), example, loss, (*notices, text))
        if reason:
            text = f"float64 is not possible ({reason}), so it ran in its own precision"
            return cls._run(replace(subject, wide=False), example, loss, (*notices, text))
        assert watch is not None
        dtype = "float64" if subject.wide else _own_dtype(subject.module, example)
        if not any("gradient" in kind for kind, _ in shown[0]):
            notices = (*notices, "nothing requires a gradient, so there is none to compare")
        return cls(subject, example, loss, shown, dtype, watch.narrowest, notices)

    def with_noise(self) -> Baseline:
        """The same with the noise: of a run that repeats it, and of runs that round parameters and arguments otherwise.

        What differs in the repetition, where nothing is rounded otherwise, depends on something that is not set back
        from run to run; no noise excuses it.
        """
        noise: list[dict[Key, Distance]] = [{} for _ in self.shown]
        unrepeated: dict[Key, None] = {}
        for sample in range(1 + _SAMPLES):
            try:
                with self.subject.fresh() as module:
                    again = run_steps(
                        module,
                        self.example,
                        self.loss,
                        count=STEPS,
                        wide=self.subject.wide,
                        rounded=(self.precision, sample) if sample else None,
                    )
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                text = (
                    f"it does not run with its parameters rounded otherwise ({_first_line(error)}): no noise is known"
                )
                return replace(self, notices=(*self.notices, text))
            for table, got, want in zip(noise, again, self.shown, strict=True):
                gaps = {key: distance(got.get(key), want.get(key)) for key in (*want, *got)}
                for key, gap in gaps.items():
                    most = table.get(key, Distance(0.0, 0.0))
                    table[key] = Distance(max(gap.norm, most.norm), max(gap.largest, most.largest))
                if sample == 0:
                    units = {kind: largest_of(want, kind) for kind in {kind for kind, _ in gaps}}
                    far = (k for k, gap in gaps.items() if _is_far(gap, want.get(k), units[k[0]], self.precision))
                    unrepeated.update(dict.fromkeys(far))
        if not unrepeated:
            return replace(self, noise=noise)
        named = ", ".join(what(*key) for key in list(unrepeated)[:_NAMED])
        more = f" and {len(unrepeated) - _NAMED} more" if len(unrepeated) > _NAMED else ""
        text = (
            f"plain runs do not agree with each other ({named}{more}): something beside the module, its arguments and "
            "the random generators decides, and is not set back from run to run: a global variable, a file, a clock"
        )
        held_to_nothing = [{k: gap for k, gap in table.items() if k not in unrepeated} for table in noise]
        return replace(self, noise=held_to_nothing, notices=(*self.notices, text))


def _is_far(gap: Distance, want: Any, unit: float, precision: torch.dtype) -> bool:
    """Whether two plain runs differ by more than the order in which a GPU adds."""
    return gap.largest > max(digits(precision) * size_of(want).largest, _NOTHING * unit)


def _copied(module: nn.Module, example: Example) -> tuple[Subject, tuple[str, ...]]:
    """The widest copies that can be made, or the module itself."""
    wide = not under_autocast(example.device)
    notices = () if wide else ("under autocast it ran in the types that autocast chooses",)
    try:
        twin(module, wide)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = (
            f"it cannot be copied ({type(error).__name__}: {_first_line(error)}), so it ran itself, in its own "
            "precision, and was put back"
        )
        return Subject(module, wide=False, itself=True), (*notices, text)
    return Subject(module, wide), notices


def _affordable(subject: Subject, example: Example) -> Iterator[tuple[Example, str]]:
    """Smaller examples with a sentence on each, if the example itself takes too much."""
    if example.elements < _SMALL:
        return
    limit = min(_LARGE, usable_bytes(example.device) // 2)
    peak = _plain_peak(subject, example)
    if peak <= limit:
        return
    for smaller in example.smaller(limit / peak):
        yield (
            smaller.with_data(0),
            f"the example was cut: at its own size ({example}) plain PyTorch would take {format_size(peak)} of "
            "activation memory",
        )


def _plain_peak(subject: Subject, example: Example) -> int:
    """Bytes of activation memory of a plain step; an estimate where it cannot be measured without data."""

    def without_data(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        dtype = widened(torch.empty(0, dtype=leaf.dtype)).dtype if subject.wide else leaf.dtype
        made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=dtype, device="meta")
        return made.requires_grad_(leaf.requires_grad)

    args, kwargs = example.structure.put_together([without_data(leaf) for leaf in example.leaves])
    try:
        with subject.fresh() as module:
            return measure_fake(module, *args, **kwargs).peak_bytes
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return _RATIO * 8 * example.elements


def _own_dtype(module: nn.Module, example: Example) -> str:
    tensors = (*held_tensors(module), *example.tensors)
    dtypes = [str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point() or t.is_complex()]
    return " and ".join(dict.fromkeys(dtypes)) or "float64"


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is an error that says that memory has run out, which is never caught."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
