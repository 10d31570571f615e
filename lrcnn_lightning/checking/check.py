"""``check(module, example)``: a module run plainly and row by row, and everything that the two show compared.

plain              want        copy of the module, in float64
plain, rounded     noise       the same with every parameter and input moved by one unit in the last place, twice
two_phase          got         copies of the module, row by row
overlap            got
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lrcnn_lightning.checking.baseline import STEPS, Baseline, is_out_of_memory
from lrcnn_lightning.checking.chance import unchanged_generators
from lrcnn_lightning.checking.comparison import Comparison, Distance, Key, compare, largest_of
from lrcnn_lightning.checking.example import Example
from lrcnn_lightning.checking.report import CheckReport, Run
from lrcnn_lightning.checking.state import held_tensors
from lrcnn_lightning.checking.steps import Loss, Shown, run_steps
from lrcnn_lightning.checking.subject import put_back_afterwards
from lrcnn_lightning.errors import ConfigError, InputError
from lrcnn_lightning.rowwise import rowwise

__all__ = ["check", "compared", "examine"]

_ROWS = 4
_PLANNING = ("rows", "segments", "batch_chunks", "memory_budget", "max_overhead", "plan")


def check(module: nn.Module, example: Any, loss: Loss | None = None, **options: Any) -> CheckReport:
    """Run ``module`` plainly and row by row, compare everything that a training step shows, and print the result.

    Outputs, the loss, each parameter's and each input's gradient, each buffer, attributes, random numbers, and what the
    module changes of its parameters and inputs, over two steps. The module and the example are not changed: copies run,
    in float64 if they can. Code outside of the module that its forward or its hooks call runs, too.

    Args:
        module: The module, row-wise already or not, in the train or eval state that is to be checked.
        example: A tensor (``N C H W`` or another map), a tuple of arguments or a dict of keyword arguments. Tensors on
            the ``meta`` device stand for random data. One that plain PyTorch would need much memory for is cut to a
            smaller size, and the report says so.
        loss: Of the module's output, a scalar; if None, a random weighted sum of every output plus half its squares.
        options: The fields of `RowConfig`, or a ``plan`` as `rowwise` takes it. Without a mode both are checked, and
            without any number four rows in the plan of least memory.

    Returns:
        A report. ``report.exact`` says whether all is well, and ``print(report)`` is what a bug report should contain.

    Raises:
        ConfigError: an option is not allowed.
        InputError: there is no tensor in the example, or the module has no data.
        Exception: whatever the module or the loss raises plainly.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    >>> check(net, torch.randn(2, 3, 32, 32)).exact    # N C H W; doctest: +ELLIPSIS
    lrcnn_lightning.check of Sequential: exact
    ...
    True
    """
    report = examine(module, example, loss, **options)
    print(report)
    return report


def examine(module: nn.Module, example: Any, loss: Loss | None = None, **options: Any) -> CheckReport:
    """The report of `check`, without printing it."""
    if not isinstance(module, nn.Module):
        raise ConfigError(f"check() takes a torch.nn.Module, given was {type(module).__name__}")
    if any(tensor.is_meta for tensor in held_tensors(module)):
        raise InputError(
            f"{type(module).__name__} is on the meta device, where nothing has data to compare; allowed are modules "
            "with data: initialise it, for example by module.to_empty(device='cpu') and module.load_state_dict(...)"
        )
    rowwise(nn.Identity(), **options)  # raises for options that are not allowed
    # Code inside may hold on to the caller's own module, and a copy of it would run on that.
    with unchanged_generators(), put_back_afterwards(module):
        baseline = Baseline.of(module, Example.of(module, example), loss)
        runs: list[Run] = []
        comparisons: list[Comparison] = []
        for name, tried in _runs(options, baseline.example):
            run, shown = _run(baseline, name, tried, options)
            runs.append(run)
            comparisons += _worst_of_steps(name, shown, baseline)
    return CheckReport(
        module=f"{type(module).__name__} in {'training' if module.training else 'eval'} mode",
        example=str(baseline.example),
        steps=STEPS,
        loss="a random weighted sum of every output plus half its squares" if loss is None else "as given",
        dtype=baseline.dtype,
        precision=str(baseline.precision).removeprefix("torch."),
        runs=tuple(runs),
        comparisons=tuple(sorted(comparisons, key=lambda item: item.order)),
        notices=(*baseline.notices, *_of_masks(comparisons)),
    )


def _runs(options: Mapping[str, Any], example: Example) -> Iterator[tuple[str, dict[str, Any]]]:
    """The ways to run the module by rows, by name: with the options as they are, where these say enough."""
    options = {"on_unsupported": "warn", **options}
    if not any(name in options for name in _PLANNING):
        options |= {"rows": min(_ROWS, example.longest), "max_overhead": math.inf}
    if "plan" in options:
        yield "plan", options
    elif options.get("mode", "auto") != "auto":
        yield options["mode"], options
    else:
        for mode in ("two_phase", "overlap"):
            yield mode, {**options, "mode": mode}


def _run(baseline: Baseline, name: str, options: dict[str, Any], wanted: Mapping[str, Any]) -> tuple[Run, list[Shown]]:
    """Run the module by rows; an error that it does not raise plainly is a result.

    What a plan has to say of options that nobody ``wanted`` is no matter.
    """
    said: list[str] = []
    with baseline.subject.fresh() as module:
        forward = rowwise(module, **options).__dict__["forward"]
        forward.notify = said.append
        error, shown = None, []
        try:
            shown = run_steps(module, baseline.example, baseline.loss, count=STEPS, wide=baseline.subject.wide)
        except ConfigError:
            raise
        except Exception as raised:
            if is_out_of_memory(raised):
                raise
            error = f"{type(raised).__name__}: {raised}"
        plan = forward.training_plan or forward.plan
        plans = [plan, *(part.plan for part in forward.parts)]
        notes = (note for made in plans if made is not None for note in made.notes)
        beside = tuple(note.text for note in notes if note.option not in wanted)
        notices = tuple(text for text in dict.fromkeys(said) if not text.endswith(beside))
        return Run(name, options, plan, error, notices, tuple(part.name for part in forward.parts)), shown


def compared(
    got: Shown, want: Shown, noise: Mapping[Key, Distance] | None = None, precision: torch.dtype = torch.float64
) -> list[Comparison]:
    """Every value that one of two steps shows, compared; ``noise`` is what rounding alone does to the plain ones."""
    units = {kind: largest_of(want, kind) for kind in {kind for kind, _ in want}} if noise is not None else {}
    return [
        compare(key, got, want, None if noise is None else noise.get(key), units.get(key[0], 0.0), precision)
        for key in dict.fromkeys((*want, *got))
    ]


def _worst_of_steps(name: str, shown: Sequence[Shown], baseline: Baseline) -> list[Comparison]:
    """A comparison for each value of a run: the first step that is not exact, or that with the largest error."""
    worst: dict[Key, Comparison] = {}
    for step, got in enumerate(shown):
        noise = None if baseline.noise is None else baseline.noise[step]
        for item in compared(got, baseline.shown[step], noise, baseline.precision):
            placed = replace(item, run=name, step=step + 1)
            known = worst.setdefault((item.kind, item.name), placed)
            worst[item.kind, item.name] = min(known, placed, key=lambda each: each.order)
    return list(worst.values())


def _of_masks(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """That random numbers of a GPU are no reason for alarm."""
    if any(item.kind == "random numbers" and "cuda" in item.name and not item.exact for item in comparisons):
        yield (
            "on a GPU rows draw other random numbers than plain PyTorch, of the same distribution, so that nothing "
            "behind a dropout is equal: check the module on the CPU, or with its dropouts in eval mode"
        )
