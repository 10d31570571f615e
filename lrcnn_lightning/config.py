"""Every option of row-wise training, once: its values, its default, its unit and its check.

``rowwise``, ``plan``, the Lightning strategies and the command line all take the fields of :class:`RowConfig` as
keyword options, so an option means the same and fails with the same words wherever it was written.  This file imports
neither torch nor Lightning nor Hydra: reading a configuration must be possible where none of them is needed.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal
from typing import Any, Literal, TypeAlias

from lrcnn_lightning.errors import ConfigError

__all__ = [
    "Mode",
    "OnUnsupported",
    "RowConfig",
    "did_you_mean",
    "format_count",
    "format_size",
    "parse_size",
    "strategy_defaults",
]

Mode: TypeAlias = Literal["auto", "two_phase", "overlap"]
OnUnsupported: TypeAlias = Literal["error", "warn"]

_IN_STRATEGIES = "in strategies"
"""Of an option, in the metadata of its field: its default where a strategy asks."""

_MODES = ("auto", "two_phase", "overlap")
_ON_UNSUPPORTED = ("error", "warn")
_PAPER_NAMES = {"2ps": "two_phase", "2ps_h": "two_phase", "overl": "overlap", "overl_h": "overlap"}

_UNITS = {
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgtp", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgtp", start=1)},
}
# Two digits of exponent are plenty for bytes, and keep a slip of the finger from building a number of many megabytes.
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d*)?(?:e[+-]?\d{1,2})?)\s*(?P<unit>[a-z]*)", re.IGNORECASE | re.ASCII)
_PERCENT = 10
"""From this overhead on a percentage was probably meant."""
_SIZE_EXAMPLES = '"6GiB", "512 MB", "1.5GiB" or "1e9"'


def parse_size(text: str) -> int:
    """Read a size in bytes, such as ``"6GiB"``, ``"512 MB"``, ``"1e9"`` or ``"123B"``.

    Decimal units (kB, MB, GB, TB, PB) are powers of 1000, binary units (KiB, MiB, GiB, TiB, PiB) powers of 1024; no
    unit means bytes.  Case and the space before the unit do not matter.  A fraction of a byte is cut off.  A bare
    ``"6G"`` is refused, because it means 1000 to some and 1024 to others.

    Raises:
        ConfigError: the text is not a size, its unit is unknown, or it comes to less than one byte.
    """
    if not isinstance(text, str):
        raise ConfigError(f"a size is a text such as {_SIZE_EXAMPLES} (given: {_shown(text)})")
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"not a size (given: {text!r}); write for example {_SIZE_EXAMPLES}")
    unit = match["unit"].lower() or "b"
    if unit not in _UNITS:
        letter = unit[0].upper()
        bare = unit in ("k", "m", "g", "t", "p")
        hint = f"; write {letter}iB (1024) or {letter}B (1000)" if bare else ""
        raise ConfigError(
            f"unknown unit of size {match['unit']!r} (given: {text!r}){hint}; allowed: B, KB to PB, KiB to PiB, "
            f"for example {_SIZE_EXAMPLES}"
        )
    size = int(Decimal(match["number"]) * _UNITS[unit])
    if size < 1:
        raise ConfigError(f"a size must be at least one byte (given: {text!r}); write for example {_SIZE_EXAMPLES}")
    return size


def format_size(size: float) -> str:
    """Write a number of bytes for people, in binary units: ``1610612736`` becomes ``"1.50 GiB"``."""
    if abs(size) < 1024:
        return f"{size:.0f} B"
    units = ("KiB", "MiB", "GiB", "TiB", "PiB")
    value, unit = size / 1024, 0
    while abs(round(value, 2)) >= 1024 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.2f} {units[unit]}"


def format_count(number: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def did_you_mean(given: object, allowed: Iterable[str]) -> str:
    """The end of an error message: ``'; did you mean "two_phase"?'`` for a near miss, nothing for anything else."""
    if not isinstance(given, str):
        return ""
    names = list(allowed)
    written = given.strip().lower().replace("-", "_").replace(" ", "_")
    by_paper = _PAPER_NAMES.get(written)
    if by_paper in names:
        return f'; did you mean "{by_paper}"?'
    close = difflib.get_close_matches(written, names, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


@dataclass(frozen=True)
class RowConfig:
    """The options of row-wise training.

    Values are checked when the object is made, so a configuration that exists is valid.  ``modules`` is normalised to
    ``"auto"`` or a tuple of names and ``max_overhead`` to a float; everything else is kept as it was written, so that
    a saved configuration reads like the one that the user wrote.

    The annotations are exact, for type checkers and for ``jsonargparse``.  OmegaConf 2.3 knows neither literals nor a
    union with a list in it, so the Hydra schema is a class of its own, declared more loosely; the check is this one's.

    Args:
        mode: How the rows that two neighbouring slabs share are obtained. ``"two_phase"``: handed over from one row to
            the next; ``"overlap"``: computed again; ``"auto"``: the planner chooses, stage by stage.
        rows: Rows in every stage, a positive int (a stage with lower maps has fewer), or ``"auto"``.
        segments: Stretches of the network between feature maps that are kept for the backward pass, a positive int,
            or ``"auto"``.
        batch_chunks: Parts into which the batch is divided, a positive int, or ``"auto"``. Exact with BatchNorm, too.
        memory_budget: Activation memory to fit in, as bytes (a positive int) or a size such as ``"6GiB"``: the fastest
            plan that fits. ``None``: the least memory within ``max_overhead``. ``"auto"``: what the device has free,
            or, with an explicit ``mode``, as ``None``.
        max_overhead: Predicted extra time that the planner may spend when no budget forces more, as a fraction of the
            time of plain training: at least 0, where ``0.35`` is 35 % more and ``inf`` (``.inf`` in YAML) any amount.
        axis: Dimension of the input along which rows are cut (2 is the height of ``N C H W``; negative counts from the
            end), or ``"auto"``: the longest spatial axis.
        modules: Names of the submodules to run row-wise, as in ``named_modules()``; one name, several, or ``"auto"``:
            the outermost submodules that contain a convolution and can be captured. Strategies only.
        on_unsupported: What becomes of a module that cannot run row by row. ``"warn"`` (the default of the strategies):
            it runs by its parts, or plainly, with one warning; ``"error"`` (that of ``rowwise``): an error is raised.

    Raises:
        ConfigError: a value is not allowed; the message names the option, what was given, what is allowed, and what
            to do.
    """

    mode: Mode = "auto"
    rows: int | Literal["auto"] = "auto"
    segments: int | Literal["auto"] = "auto"
    batch_chunks: int | Literal["auto"] = "auto"
    memory_budget: int | str | None = "auto"
    max_overhead: float = 0.35
    axis: int | Literal["auto"] = "auto"
    modules: str | Sequence[str] = "auto"
    on_unsupported: OnUnsupported = field(default="error", metadata={_IN_STRATEGIES: "warn"})

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, _MODES)
        for option in ("rows", "segments", "batch_chunks"):
            _check_count(option, getattr(self, option))
        _check_budget(self.memory_budget)
        object.__setattr__(self, "max_overhead", _checked_overhead(self.max_overhead))
        _check_axis(self.axis)
        object.__setattr__(self, "modules", _checked_modules(self.modules))
        _check_choice("on_unsupported", self.on_unsupported, _ON_UNSUPPORTED)

    @classmethod
    def from_options(cls, **options: Any) -> RowConfig:
        """Make a configuration from keyword options, as ``rowwise`` and the strategies receive them.

        Raises:
            ConfigError: an option does not exist (a ``TypeError`` would not say which ones do), or its value is not
                allowed.
        """
        names = [field.name for field in fields(cls)]
        unknown = [name for name in options if name not in names]
        if unknown:
            shown = ", ".join(repr(name) for name in unknown)
            raise ConfigError(
                f"unknown {'option' if len(unknown) == 1 else 'options'} {shown} (allowed: {', '.join(names)})"
                f"{did_you_mean(unknown[0], names)}"
            )
        return cls(**options)

    @property
    def budget_bytes(self) -> int | Literal["auto"] | None:
        """``memory_budget`` in bytes; ``None`` and ``"auto"`` as they are."""
        budget = self.memory_budget
        if budget is None or isinstance(budget, int):
            return budget
        return "auto" if budget == "auto" else parse_size(budget)

    @property
    def chooses_freely(self) -> bool:
        """Whether mode, rows, segments and chunks are all left to the planner."""
        return not self.given_choices

    @property
    def given_choices(self) -> tuple[str, ...]:
        """What is not left to the planner, as it was written: ``("mode='overlap'", "rows=4")``."""
        choices = ("mode", "rows", "segments", "batch_chunks")
        return tuple(f"{name}={value!r}" for name in choices if (value := getattr(self, name)) != "auto")

    @property
    def fits_free_memory(self) -> bool:
        """Whether the budget is what the device has free."""
        return self.memory_budget == "auto" and self.chooses_freely

    @property
    def module_names(self) -> tuple[str, ...] | None:
        """``modules`` as a tuple of names; ``None`` where the package chooses (``"auto"``)."""
        return None if self.modules == "auto" else tuple(self.modules)


def strategy_defaults() -> dict[str, Any]:
    """The options with their defaults in the Lightning strategies and on the command line.

    One is another than in `RowConfig`: a strategy must not end a training that plain PyTorch does not end, while
    whoever calls ``rowwise`` on a module wants to know that it cannot run so.
    """
    return {option.name: option.metadata.get(_IN_STRATEGIES, option.default) for option in fields(RowConfig)}


def _shown(value: object) -> str:
    """A value with its type, for a message: ``'8' (str)``."""
    return f"{value!r} ({type(value).__name__})"


def _is_integer(value: object) -> bool:
    """Whether a value is an int proper; ``True`` is one to Python, but as a number of rows it is a mistake."""
    return isinstance(value, int) and not isinstance(value, bool)


def _integer_hint(option: str, value: object) -> str:
    """What to write instead of a text or a float that holds a whole number."""
    if isinstance(value, str):
        try:
            return f"; drop the quotes: {option}={int(value)}"
        except ValueError:
            return did_you_mean(value, ["auto"])
    if isinstance(value, float) and value.is_integer():
        return f"; write {option}={int(value)}"
    return ""


def _check_choice(option: str, value: object, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        choices = ", ".join(f'"{choice}"' for choice in allowed)
        raise ConfigError(f"{option} must be one of {choices} (given: {_shown(value)}){did_you_mean(value, allowed)}")


def _check_count(option: str, value: object) -> None:
    if isinstance(value, str) and value == "auto":
        return
    if not _is_integer(value):
        raise ConfigError(
            f'{option} must be "auto" or a positive int (given: {_shown(value)}){_integer_hint(option, value)}'
        )
    if isinstance(value, int) and value < 1:
        raise ConfigError(
            f'{option} must be "auto" or a positive int (given: {value}); use {option}=1 for an undivided run, '
            'or "auto" to let the planner choose'
        )


def _check_budget(value: object) -> None:
    kinds = 'memory_budget must be None, "auto", a positive int (bytes) or a size'
    allowed = f"{kinds} such as {_SIZE_EXAMPLES}"
    if value is None or value == "auto":
        return
    if isinstance(value, str):
        try:
            parse_size(value)
        except ConfigError as error:
            raise ConfigError(f"{kinds}: {error}{did_you_mean(value, ['auto'])}") from None
        return
    if not _is_integer(value):
        raise ConfigError(f"{allowed} (given: {_shown(value)}){_integer_hint('memory_budget', value)}")
    if isinstance(value, int) and value < 1:
        raise ConfigError(f"{allowed} (given: {value}); use None for the least memory within max_overhead")


def _checked_overhead(value: object) -> float:
    allowed = "max_overhead must be a number of at least 0, a fraction of the time of plain training (0.35 is 35 %)"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{allowed} (given: {_shown(value)}){_fraction_hint(value)}")
    if math.isnan(value) or value < 0:
        raise ConfigError(f"{allowed} (given: {value}); use 0 to spend no extra time")
    if _PERCENT <= value < math.inf:
        warnings.warn(
            f"max_overhead={value:g} allows {100 * value:g} % of extra time; write max_overhead={value / 100:g} for "
            f"{value:g} %, or inf (.inf in YAML) for any amount",
            stacklevel=2,
        )
    return float(value)


def _fraction_hint(value: object) -> str:
    """What to write instead of a text that holds a number, or a percentage."""
    if not isinstance(value, str):
        return ""
    text = value.strip()
    try:
        if text.endswith("%"):
            return f"; write max_overhead={float(Decimal(text[:-1].strip()) / 100):g}"
        return f"; drop the quotes: max_overhead={float(text):g}"
    except (ArithmeticError, ValueError):
        return "; write for example max_overhead=0.35"


def _check_axis(value: object) -> None:
    allowed = 'axis must be "auto" or an int, a spatial dimension of the input'
    if isinstance(value, str) and value == "auto":
        return
    if not _is_integer(value):
        raise ConfigError(f"{allowed} (given: {_shown(value)}){_integer_hint('axis', value)}")
    if value == 0:
        raise ConfigError(f"{allowed} (given: 0, the batch axis); divide the batch with batch_chunks instead")


def _checked_modules(value: object) -> str | tuple[str, ...]:
    allowed = 'modules must be "auto", the name of a submodule, or a sequence of names'
    if isinstance(value, str):
        if value == "auto":
            return value
        names: tuple[object, ...] = (value,)
    elif isinstance(value, Iterable) and not isinstance(value, (Mapping, bytes)):
        # Any iterable: a list from YAML arrives as a container of the configuration library, not as a list.
        names = tuple(value)
    else:
        raise ConfigError(f"{allowed} (given: {_shown(value)})")
    checked: list[str] = []
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(f"{allowed} (given: {list(names)!r}, in which {_shown(name)} is not a name)")
        if not name.strip():
            raise ConfigError(f"{allowed} (given: {list(names)!r}, with an empty name); see named_modules()")
        if name == "auto":
            raise ConfigError(f'{allowed} (given: {list(names)!r}); "auto" stands alone: modules="auto"')
        if name in checked:
            raise ConfigError(f"{allowed} (given: {list(names)!r}, with {name!r} twice); name each submodule once")
        checked.append(name)
    if not checked:
        raise ConfigError(f'{allowed} (given: an empty sequence); use "auto" to let the package choose')
    return tuple(checked)
