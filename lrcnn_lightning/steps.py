"""The user's steps, run row by row: what the strategies for one device and for several have in common.

    training_step, backward, validation_step, test_step, predict_step
        forwards of the chosen modules replaced       -> `RowwiseSession.active`
        the user's step, by Lightning's own strategy
        forwards put back, whatever happened

Between the steps the module is as it was. Plans are made in the first step, and reported after it.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lrcnn_lightning.config import Mode, OnUnsupported, RowConfig, did_you_mean
from lrcnn_lightning.errors import ConfigError
from lrcnn_lightning.messages import needless_rows, never_called, path, summary
from lrcnn_lightning.planning.load import load_plans
from lrcnn_lightning.planning.plan import Plan
from lrcnn_lightning.planning.search import usable_bytes
from lrcnn_lightning.session import RowwiseSession

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.strategies import Strategy
else:
    # What the class below calls on ``super()`` is Lightning's; see `lrcnn_lightning.strategy`.
    Strategy = object

__all__ = ["CLASSES", "OPTIONS", "RowwiseSteps", "refuse_unnamed"]

CLASSES: dict[str, dict[str, Any]] = {}
"""Namespace -> name of a class -> the class; made at the first use of a namespace."""


OPTIONS = inspect.cleandoc(RowConfig.__doc__ or "").partition("Args:\n")[2].partition("\n\nRaises:")[0]
OPTIONS = textwrap.indent(OPTIONS, "    ")  # as Python before 3.13 leaves docstrings
OPTIONS += """
        plan: Saved plans by module name (``{name: plan.to_dict()}`` of ``strategy.plans``, perhaps edited), or a JSON
            file with them, to be used instead of planning."""
"""The options with their meaning, as `RowConfig` documents them; command lines show it."""


class RowwiseSteps(Strategy):
    __doc__ = f"""What both strategies do: run each of the user's steps row-wise.

    Args:
{OPTIONS}
        kwargs: Arguments of Lightning's own strategy.
    """

    _namespace: str
    """The Lightning whose base class this class has."""
    _kind: str
    """The key of the class in `CLASSES`; a subclass has that of its base."""
    _base: type
    """That base class."""
    _passed_on: tuple[Callable[..., Any], ...]
    """The functions that the remaining arguments end at, for their names."""

    def __init__(
        self,
        *,
        mode: Mode = "auto",
        rows: int | Literal["auto"] = "auto",
        segments: int | Literal["auto"] = "auto",
        batch_chunks: int | Literal["auto"] = "auto",
        memory_budget: int | str | None = "auto",
        max_overhead: float = 0.35,
        axis: int | Literal["auto"] = "auto",
        modules: str | Sequence[str] = "auto",
        on_unsupported: OnUnsupported = "warn",
        plan: dict[str, Any] | str | None = None,
        **kwargs: Any,
    ) -> None:
        self._given = {} if plan is None else load_plans(plan)
        self._config = RowConfig(
            mode=mode,
            rows=rows,
            segments=segments,
            batch_chunks=batch_chunks,
            memory_budget=memory_budget,
            max_overhead=max_overhead,
            axis=axis,
            modules=modules,
            on_unsupported=on_unsupported,
        )
        self._arguments = {**kwargs, "plan": plan}
        self._check_names(kwargs)
        self._session: RowwiseSession | None = None
        self._plans: dict[str, Plan] = {}
        self._reported: set[str] = set()
        """Modules of which the log has spoken."""
        self._stepped = False
        self._fits = False
        super().__init__(**kwargs)

    def _check_names(self, kwargs: Mapping[str, Any]) -> None:
        """A mistyped option would surface in another library as a ``TypeError``, for DDP only when training starts."""
        own = [*(field.name for field in fields(RowConfig)), "plan"]
        passed_on = {name for function in self._passed_on for name in inspect.signature(function).parameters}
        passed_on -= {"self", "kwargs", "module", "device_ids"}
        for name in kwargs:
            if name not in passed_on:
                raise ConfigError(
                    f"{type(self).__name__} has no option {name!r} (allowed: {', '.join(own)}, and the arguments of "
                    f"{self._base.__name__}){did_you_mean(name, [*own, *sorted(passed_on)])}"
                )

    @property
    def config(self) -> RowConfig:
        """The options of row-wise training."""
        return self._config

    @property
    def plans(self) -> dict[str, Plan]:
        """The plans by the name of their module (``""`` is the ``LightningModule`` itself), also after the run.

        Of the latest training step; for a module that ran without gradients only, of its latest call. Empty until the
        first step, and in the parent of processes that were spawned.
        """
        table = dict(self._plans)
        for name, plan in (self._session.plans if self._session is not None else {}).items():
            if plan.training or name not in table or not table[name].training:
                table[name] = plan
        return table

    @property
    def accelerator(self) -> Accelerator | None:
        """The accelerator, which the Trainer hands over first of all."""
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        self._join(accelerator)
        self._accelerator = accelerator

    def _join(self, accelerator: object) -> None:
        """Become the strategy of the Trainer's own Lightning, so that one class serves the Trainers of both.

        Nothing but the constructor has run before, so it is run again, in the other class.
        """
        for namespace, classes in CLASSES.items():
            family = sys.modules.get(f"{namespace}.accelerators")
            if family is None or not isinstance(accelerator, family.Accelerator) or namespace == self._namespace:
                continue
            target = classes[self._kind]
            if type(self) is not CLASSES[self._namespace][self._kind]:
                raise ConfigError(
                    f"{type(self).__name__} is a strategy of {self._namespace} and the Trainer is one of {namespace}; "
                    f"derive it from `lrcnn_lightning.strategy.{target.__qualname__}`"
                )
            options = {field.name: getattr(self._config, field.name) for field in fields(RowConfig)}
            options.update(self._arguments)
            self.__dict__.clear()
            self.__class__ = target
            target.__init__(self, **options)
            return

    def setup(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        self._check(trainer, module, RowwiseSession(module, self._config, self._given))
        super().setup(trainer)
        self._stop()  # of a run that was broken off
        # Anew, since precision plugins may have replaced submodules.
        config = self._planned_with()
        has_limit = not self._config.fits_free_memory
        self._session = RowwiseSession(module, config, self._given, self._rank_zero("rank_zero_warn"), has_limit)
        self._session.outside.start()
        if not self._session.forwards:
            self._rank_zero("rank_zero_warn")(
                f"strategy {type(self).__name__}: no submodule of {type(module).__name__} contains a convolution; "
                "everything runs as it would without the strategy"
            )
        self._reported = set()
        self._stepped = False
        self._fits = trainer.state.fn == "fit"
        if self._fits:
            self._plans = {}

    def _check(self, trainer: Trainer, module: nn.Module, session: RowwiseSession) -> None:
        """Raise for what cannot run row by row, before anything has been moved or wrapped."""
        _refuse_compiled(module, session)

    def _planned_with(self) -> RowConfig:
        """The options that plans are made with, once the module is on its device."""
        return self._config

    def teardown(self) -> None:
        self._plans = self.plans
        self._stop()
        super().teardown()

    def _stop(self) -> None:
        if self._session is not None:
            self._session.outside.stop()
        self._session = None

    @property
    def session(self) -> RowwiseSession | None:
        """The row-wise modules of the run, from its set-up to its end; ``None`` outside."""
        return self._session

    @contextmanager
    def row_by_row(self) -> Iterator[None]:
        """Context in which the modules run row-wise as in the user's steps, for callbacks that call them.

        >>> with trainer.strategy.row_by_row():     # doctest: +SKIP
        ...     maps = pl_module.backbone(images)   # N C H W
        """
        if self._session is None:
            raise ConfigError(
                f"{type(self).__name__}.row_by_row() was entered while no Trainer runs; allowed is from `setup` to "
                "`teardown`, for example in a callback; elsewhere, use lrcnn_lightning.rowwise(module)"
            )
        with self._session.active():
            yield

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        result = self._step(super().training_step, args, kwargs)
        self._report()
        return result

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        # A checkpointed part of the user's step calls its modules once more in the backward pass. That is the plugin's;
        # the hooks around it come between the steps.
        plugin = self.precision_plugin
        run = plugin.backward
        present = vars(plugin).get("backward")
        plugin.__dict__["backward"] = lambda *given, **named: self._step(run, given, named)
        try:
            return super().backward(*args, **kwargs)
        finally:
            del plugin.__dict__["backward"]
            if present is not None:
                plugin.__dict__["backward"] = present

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluated(self._step(super().validation_step, args, kwargs))

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluated(self._step(super().test_step, args, kwargs))

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluated(self._step(super().predict_step, args, kwargs))

    def _evaluated(self, result: Any) -> Any:
        """Report after an evaluation that stands alone; one inside of ``fit`` leaves that to the training step."""
        if not self._fits:
            self._report()
        return result

    def _step(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._session is None:
            return step(*args, **kwargs)
        with self._session.active():
            return step(*args, **kwargs)

    def _report(self) -> None:
        """Say once of each module what runs row-wise: plans are made from its first batch, so not before a step."""
        if self._session is None:
            return
        plans = self._session.plans
        new = [name for name in plans if name not in self._reported]
        if new:
            lines = [summary(name, self._session.forwards[name].module, plans[name]) for name in new]
            self._rank_zero("rank_zero_info")("\n  ".join(["row-wise training:", *lines]))
        if not self._stepped:
            text = needless_rows(self._config, plans, usable_bytes(self.root_device)) if plans else None
            text = text or never_called(self._session.idle)
            if text is not None:
                self._rank_zero("rank_zero_warn")(text)
        self._reported.update(new)
        self._stepped = True

    def _rank_zero(self, name: str) -> Callable[[str], None]:
        """Lightning's own logging on the first process."""
        function: Callable[[str], None] = getattr(
            importlib.import_module(f"{self._namespace}.utilities.rank_zero"), name
        )
        return function

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry no plans: they belong to the modules of this process."""
        return {**super().__getstate__(), "_session": None, "_plans": {}}


def refuse_unnamed(kind: str, given: Sequence[Any]) -> None:
    """Options have names: a ``TypeError`` would speak of a class that the user has never heard of."""
    if not given:
        return
    name = next(
        (option for option in ("mode", "rows") if _is_allowed(option, given[0])),
        "device" if isinstance(given[0], torch.device) else "mode",
    )
    raise ConfigError(
        f"{kind} takes options by name only (given without a name: {', '.join(map(repr, given))}; allowed: "
        f"{', '.join(field.name for field in fields(RowConfig))}); write for example {kind}({name}={given[0]!r})"
    )


def _is_allowed(option: str, value: object) -> bool:
    try:
        RowConfig.from_options(**{option: value})
    except ConfigError:
        return False
    return True


def _refuse_compiled(root: nn.Module, session: RowwiseSession) -> None:
    """Raise for what ``torch.compile`` has wrapped: inside compiled code a replaced ``forward`` is never seen."""
    from torch._dynamo import OptimizedModule

    def compiled(module: nn.Module) -> bool:
        return (
            isinstance(module, OptimizedModule)
            or getattr(module, "_compiled_call_impl", None) is not None
            or getattr(module, "_compiler_ctx", None) is not None
        )

    for name, forward in session.forwards.items():
        parts = name.split(".") if name else []
        around = [".".join(parts[:count]) for count in range(len(parts))]
        found = [outer for outer in around if compiled(root.get_submodule(outer))]
        found += [path(name, inner) for inner, child in forward.module.named_modules() if compiled(child)]
        if found:
            raise ConfigError(
                f"{found[0] or type(root).__name__} is compiled (torch.compile), and compiled code cannot run row by "
                "row: leave out torch.compile there, or name in `modules` only modules that are neither compiled nor "
                "inside a compiled one"
            )
