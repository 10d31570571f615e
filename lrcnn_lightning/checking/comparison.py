r"""One value of a plain step beside that of a row-wise step, and the verdict on it.

A tensor has two errors, and both must be small: that of its norm, and that of its largest element. Each stands beside
the noise: how far the plain value itself moves when every parameter and input is changed by one unit in its last place.

             |got - want|               |rounded - want|
    error = --------------      noise = ----------------          | | the norm, or the largest element
                |want|                       |want|

Three kinds of values are told apart by their noise:

    it has digits           noise is below 1e-3         exact if error <= max(1e-9, 10 noise), else off
    it is zero but for      noise is above, and it is   exact if |got - want| is nothing beside them, too, else off:
    rounding                nothing beside the others   the bias before a BatchNorm has such a gradient
    rounding decides        noise is above              exact if error <= 1e-9, else not compared, because plain PyTorch
                                                        does not agree with itself

1e-9 is the promise for float64. Where a module computes in a narrower type, it is four roundings of that type. In half
precision values have digits up to a noise of 40 roundings, and from 1e-3 on three times the noise is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from lrcnn_lightning.fake import is_fake

__all__ = [
    "RELATIVE",
    "Comparison",
    "Distance",
    "Key",
    "Kind",
    "Shown",
    "Verdict",
    "compare",
    "digits",
    "distance",
    "largest_of",
    "size_of",
    "what",
]

Kind: TypeAlias = Literal[
    "random numbers",
    "input",
    "parameter",
    "buffer",
    "attribute",
    "form",
    "output",
    "loss",
    "gradient",
    "input gradient",
]
Key: TypeAlias = tuple[Kind, str]
Verdict: TypeAlias = Literal["exact", "off", "missing", "extra", "other shape", "other dtype", "not compared"]

_KINDS: tuple[Kind, ...] = get_args(Kind)
"""In the order in which one that is off may be the reason for the next."""

RELATIVE = 1e-9
"""The error that is promised in float64."""
_ROUNDINGS = 4
"""The error that is always allowed in a narrower type, in units of its last place."""
_NOISES = 10
_FEW_NOISES = 3
"""The errors that are allowed, in units of the noise: that is the largest of a few samples, and rows round otherwise.
The second one is where the noise is above `_DIGITS`, because its type has no more of them.
"""
_DIGITS = 1e-3
_LAST_DIGIT = 40
"""The noise from which on a value has no digits to compare; the second one in roundings of its type, if that is more.
"""
_NOTHING = 1000
"""What is nothing beside the largest value of its kind, in roundings of that value: a sum of many of its terms that
cancel. At most a hundredth."""


@dataclass(frozen=True)
class Comparison:
    """One value, compared.

    ``error`` is relative to the norm of the plain value and ``largest`` to its largest element; where a value is zero
    but for rounding, to those of the largest value of its kind. ``noise`` is the larger of the two that rounding alone
    makes. They are infinite for values that cannot be subtracted, and ``noise`` is None where it was not measured.
    ``step`` counts from 1; of several steps it is the first one that is not exact, or the one with the largest error.
    """

    kind: Kind
    name: str
    verdict: Verdict
    error: float = 0.0
    largest: float = 0.0
    noise: float | None = None
    detail: str = ""
    run: str = ""
    step: int = 1

    @property
    def exact(self) -> bool:
        """Whether the row-wise value is the plain one, up to rounding."""
        return self.verdict == "exact"

    @property
    def order(self) -> tuple[int, int, int, float]:
        """The place among others, the worst first: what is missing or of another form, then what is off, from the first
        step on and causes before effects, and then the rest by its error.
        """
        rank = {"off": 1, "not compared": 2, "exact": 3}.get(self.verdict, 0)
        cause = (0, 0) if self.exact else (self.step, _KINDS.index(self.kind))
        return rank, *cause, -max(self.error, self.largest)

    @property
    def what(self) -> str:
        """Kind and name: ``gradient 0.weight``."""
        return what(self.kind, self.name)

    def __str__(self) -> str:
        text = f"{self.what}, step {self.step}: {self.verdict}"
        if self.verdict == "off" and math.isfinite(self.error):
            text += f" by {self.error:.1e} of its norm, {self.largest:.1e} of its largest element"
        return f"{text} ({self.detail})" if self.detail else text


def what(kind: Kind, name: str) -> str:
    """Kind and name of a value; an output is named by its kind."""
    return name if name.startswith(kind) else f"{kind} {name}"


def digits(precision: torch.dtype) -> float:
    """The noise from which on a value that is computed in a type has no digits."""
    return max(_DIGITS, _LAST_DIGIT * torch.finfo(precision).eps)


class Distance(NamedTuple):
    """A size, or that of a difference: by the norm, and by the largest element."""

    norm: float
    largest: float


_FAR = Distance(math.inf, math.inf)


def distance(got: Any, want: Any) -> Distance:
    """How far two values of a step are apart; infinitely, if they are of different kinds, shapes or types."""
    if not isinstance(want, Tensor) or not isinstance(got, Tensor):
        if type(got) is type(want) and (got == want or (got != got and want != want)):
            return Distance(0.0, 0.0)
        if isinstance(want, float) and isinstance(got, float):
            apart = abs(got - want)
            return Distance(apart, apart) if math.isfinite(apart) else _FAR
        return _FAR
    if _without_data(got) or got.shape != want.shape or got.dtype != want.dtype:
        return _FAR
    if want.numel() == 0:
        return Distance(0.0, 0.0)
    mine, theirs = _real(got).to(want.device), _real(want)
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    gap = (mine.double() - theirs.double()).abs_().masked_fill_(same, 0)
    found = Distance(gap.norm().item(), gap.max().item())
    return _FAR if found.norm != found.norm else found


def size_of(value: Any) -> Distance:
    """The norm and the largest element of what is finite in a value."""
    if isinstance(value, float):
        return Distance(abs(value), abs(value)) if math.isfinite(value) else Distance(0.0, 0.0)
    if not isinstance(value, Tensor) or value.numel() == 0:
        return Distance(0.0, 0.0)
    finite = _real(value).double()
    finite = finite.masked_fill(~finite.isfinite(), 0)
    return Distance(finite.norm().item(), finite.abs().max().item())


def largest_of(values: Mapping[Key, Any], kind: Kind) -> float:
    """The largest element of all floating tensors of a kind; gradients of parameters and of inputs are one kind."""
    kinds = ("gradient", "input gradient") if "gradient" in kind else (kind,)
    return max(
        (size_of(value).largest for (of, _), value in values.items() if of in kinds and _rounds(value)), default=0
    )


class Shown(dict[Key, Any]):
    """The values of one step by kind and name. What is not there was not made, or not changed.

    ``unchanged`` has those attributes that were not, for a run in which rounding alone makes others of them.
    """

    def __init__(self, values: Mapping[Key, Any] | None = None) -> None:
        super().__init__(values or {})
        self.unchanged: dict[Key, Any] = {}


def _with_unchanged(key: Key, shown: Mapping[Key, Any]) -> Any:
    """A value of a step, or what it was before if the step did not change it; `_ABSENT_VALUE` if it is not known."""
    if key in shown:
        return shown[key]
    return shown.unchanged.get(key, _ABSENT_VALUE) if isinstance(shown, Shown) else _ABSENT_VALUE


_ABSENT_VALUE = object()


def compare(
    key: Key,
    got: Mapping[Key, Any],
    want: Mapping[Key, Any],
    noise: Distance | None = None,
    unit: float = 0.0,
    precision: torch.dtype = torch.float64,
) -> Comparison:
    """Compare the values under ``key`` of a row-wise and of a plain step.

    Args:
        key: Kind and name of the value.
        got: The values of the row-wise step.
        want: Those of the plain step.
        noise: What rounding alone does to the plain value; None if that is not known. Then nothing is allowed but
            `RELATIVE`, and values below that are compared as they are.
        unit: The largest element of all plain values of its kind (`largest_of`).
        precision: The narrowest floating type that the module computes in.
    """
    mine, theirs = _with_unchanged(key, got), _with_unchanged(key, want)
    if mine is _ABSENT_VALUE or theirs is _ABSENT_VALUE:
        verdict: Verdict = "missing" if key not in got else "extra"
        return Comparison(*key, verdict, math.inf, math.inf, detail=_ABSENT.get(key[0], ""))
    other = _of_another_form(mine, theirs)
    if other is not None:
        return Comparison(*key, other[0], math.inf, math.inf, detail=other[1])
    gap, size = distance(mine, theirs), size_of(theirs)
    if not _rounds(theirs):
        same = gap == (0.0, 0.0)
        detail = "" if same or isinstance(theirs, (Tensor, bytes)) else f"{mine!r}, plainly {theirs!r}"
        errors = [g / s if s else g for g, s in zip(gap, size, strict=True)]
        return Comparison(*key, "exact" if same else "off", errors[0], errors[1], detail=detail)
    if noise is None:
        errors = [g / s if s > RELATIVE else g for g, s in zip(gap, size, strict=True)]
        return Comparison(*key, "exact" if max(errors) < RELATIVE else "off", errors[0], errors[1])
    return _judged(key, gap, size, noise, (unit * math.sqrt(_numel(theirs)), unit), precision)


_ABSENT: dict[Kind, str] = {
    "gradient": "a gradient on one side only",
    "input gradient": "a gradient on one side only",
    "parameter": "changed by the step on one side only",
    "attribute": "changed by the step on one side only",
    "input": "changed in place on one side only",
}


def _judged(
    key: Key, gap: Distance, size: Distance, noise: Distance, units: Iterable[float], precision: torch.dtype
) -> Comparison:
    eps = torch.finfo(precision).eps
    relative = RELATIVE if precision is torch.float64 else _ROUNDINGS * eps
    nothing = min(_NOTHING * eps, 0.01)
    errors, noises, detail = [], [], ""
    verdicts: list[Verdict] = []
    for g, s, n, unit in zip(gap, size, noise, units, strict=True):
        scale, has_digits = s, n < digits(precision) * s
        noises_allowed = _NOISES if n < _DIGITS * s else _FEW_NOISES
        allowed = max(relative, noises_allowed * n / s) if has_digits else relative
        if not has_digits and g > relative * s and s <= nothing * unit:
            scale, has_digits, allowed = unit, True, nothing
            detail = "zero but for rounding; errors are of the largest of its kind"
        error = g / scale if scale else (g and math.inf)
        errors.append(error)
        noises.append(n / scale if scale else n)
        verdicts.append("exact" if error <= allowed else "off" if has_digits else "not compared")
    verdict: Verdict = "off" if "off" in verdicts else "not compared" if "not compared" in verdicts else "exact"
    if verdict == "not compared":
        detail = f"rounding alone changes it by {max(noises):.1e}"
    return Comparison(*key, verdict, errors[0], errors[1], max(noises), detail)


def _of_another_form(got: Any, want: Any) -> tuple[Verdict, str] | None:
    """The verdict on values that cannot be subtracted."""
    if not isinstance(got, Tensor) or not isinstance(want, Tensor):
        if type(got) is not type(want):
            return "off", f"of type {type(got).__name__}, plainly {type(want).__name__}"
        return None
    if _without_data(got):
        return "off", "a tensor without data"
    if got.shape != want.shape:
        return "other shape", f"{list(got.shape)}, plainly {list(want.shape)}"
    if got.dtype != want.dtype:
        return "other dtype", f"{_short(got.dtype)}, plainly {_short(want.dtype)}"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _without_data(tensor: Tensor) -> bool:
    return is_fake(tensor) or tensor.is_meta


def _rounds(value: Any) -> bool:
    """Whether a value is a result of roundings, and no count, choice or text."""
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, float)


def _numel(value: Any) -> int:
    return value.numel() * (2 if value.is_complex() else 1) if isinstance(value, Tensor) else 1


def _real(tensor: Tensor) -> Tensor:
    """A strided tensor of real numbers."""
    dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    return torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
