r"""Lightning strategies: the user's step runs with its convolutional modules row-wise, and nothing else changes.

    Trainer(strategy="lrcnn")                     one device
    Trainer(strategy="lrcnn_ddp", devices=2)      one process a device

A strategy is the natural place: it alone stands between the Trainer and the user's step, so a project changes one
argument. The chosen submodules' ``forward`` is replaced while a step runs and put back before the step returns.

``lightning.pytorch`` and ``pytorch_lightning`` are two libraries to Python, with a Trainer, base classes and a registry
each. Both get classes made from the source below:

    _Rowwise ----- _SingleDevice + SingleDeviceStrategy of each Lightning -> LRCNNStrategy
             \--- _Parallel     + DDPStrategy of each Lightning          -> LRCNNDDPStrategy

They are made, and their names registered, when that Lightning is imported, before or after this package: whoever uses
the engine alone does not wait for a library that takes longer to import than torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from abc import ABCMeta
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lrcnn_lightning.config import Mode, OnUnsupported, RowConfig, did_you_mean
from lrcnn_lightning.errors import ConfigError
from lrcnn_lightning.messages import needless_rows, path, summary
from lrcnn_lightning.plan.plan import Plan
from lrcnn_lightning.plan.saved import load_plans
from lrcnn_lightning.plan.search import usable_bytes
from lrcnn_lightning.rowwise import RowwiseSession

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
else:
    # What the classes below call on ``super()`` is Lightning's; see `_make`.
    Strategy = SingleDeviceStrategy = DDPStrategy = object

__all__ = ["NAMES", "LRCNNDDPStrategy", "LRCNNStrategy", "register"]

_NAMESPACES = {"lightning.pytorch.strategies": "lightning.pytorch", "pytorch_lightning.strategies": "pytorch_lightning"}
"""The module that holds the registry -> the Lightning that it belongs to; the preferred one first."""

NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "lrcnn": ("LRCNNStrategy", {}),
    "lrcnn_two_phase": ("LRCNNStrategy", {"mode": "two_phase"}),
    "lrcnn_overlap": ("LRCNNStrategy", {"mode": "overlap"}),
    "lrcnn_ddp": ("LRCNNDDPStrategy", {}),
    "lrcnn_ddp_two_phase": ("LRCNNDDPStrategy", {"mode": "two_phase"}),
    "lrcnn_ddp_overlap": ("LRCNNDDPStrategy", {"mode": "overlap"}),
}
"""Name in the Trainer -> class and options."""


_OPTIONS = (RowConfig.__doc__ or "").partition("    Args:\n")[2].partition("\n\n    Raises:")[0]
"""The options with their meaning, as `RowConfig` documents them; command lines show it."""


class _Rowwise(Strategy):
    __doc__ = f"""What both strategies do: run each of the user's steps row-wise.

    Args:
{_OPTIONS}
        plan: Saved plans by module name (``{{name: plan.to_dict()}}`` of ``strategy.plans``, perhaps edited), or a JSON
            file with them, to be used instead of planning.
        kwargs: Arguments of Lightning's own strategy.
    """

    _namespace: str
    """The Lightning whose base class this class has."""
    _kind: str
    """The key of the class in `_classes`; a subclass has that of its base."""
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
        on_unsupported: OnUnsupported = "error",
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
        self._arguments = dict(kwargs)
        self._check_names(kwargs)
        self._session: RowwiseSession | None = None
        self._plans: dict[str, Plan] = {}
        self._reported = False
        self._fits = False
        super().__init__(**kwargs)

    def _check_names(self, kwargs: Mapping[str, Any]) -> None:
        """A mistyped option would surface in another library as a ``TypeError``, for DDP only when training starts."""
        own = [field.name for field in fields(RowConfig)]
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
        for namespace, classes in _classes.items():
            family = sys.modules.get(f"{namespace}.accelerators")
            if family is None or not isinstance(accelerator, family.Accelerator) or namespace == self._namespace:
                continue
            target = classes[self._kind]
            if type(self) is not _classes[self._namespace][self._kind]:
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
        self._session = RowwiseSession(module, self._config, self._given, self._rank_zero("rank_zero_warn"))
        self._session.outside.start()
        if not self._session.forwards:
            self._rank_zero("rank_zero_warn")(
                f"strategy {type(self).__name__}: no submodule of {type(module).__name__} contains a convolution; "
                "everything runs as it would without the strategy"
            )
        self._reported = False
        self._fits = trainer.state.fn == "fit"
        if self._fits:
            self._plans = {}

    def _check(self, trainer: Trainer, module: nn.Module, session: RowwiseSession) -> None:
        """Raise for what cannot run row by row, before anything has been moved or wrapped."""
        _refuse_compiled(module, session)

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
        """Say once what runs row-wise: plans are made from the first batch, so not before the first step."""
        if self._reported or self._session is None or not self._session.plans:
            return
        self._reported = True
        plans = self._session.plans
        lines = [summary(name, self._session.forwards[name].module, plan) for name, plan in plans.items()]
        self._rank_zero("rank_zero_info")("\n  ".join(["row-wise training:", *lines]))
        needless = needless_rows(self._config, plans, usable_bytes(self.root_device))
        if needless is not None:
            self._rank_zero("rank_zero_warn")(needless)

    def _rank_zero(self, name: str) -> Callable[[str], None]:
        """Lightning's own logging on the first process."""
        function: Callable[[str], None] = getattr(
            importlib.import_module(f"{self._namespace}.utilities.rank_zero"), name
        )
        return function

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry no plans: they belong to the modules of this process."""
        return {**super().__getstate__(), "_session": None, "_plans": {}}


class _SingleDevice(_Rowwise, SingleDeviceStrategy):
    __doc__ = f"""Lightning strategy for one device: the user's steps run with their convolutional modules row-wise.

    The loss, the gradients, the buffers and the checkpoints are those of plain training, up to rounding; the activation
    memory is a fraction. Checkpoints move freely to and from any other strategy. What is called outside of the user's
    steps (``example_input_array``, callbacks that call the module) runs plain.

    Args:
{_OPTIONS}
        device: The device, such as ``"cuda:1"``; without it, that of the Trainer.
        kwargs: ``accelerator``, ``checkpoint_io`` and ``precision_plugin``, as for ``SingleDeviceStrategy``.

    Raises:
        ConfigError: an option does not exist or has a value that is not allowed; the Trainer has more than one device
            or node, or ``sync_batchnorm=True``; a module that is to run row-wise does not exist or is compiled.
    """

    strategy_name = "lrcnn"

    def __init__(self, *given: Any, device: str | int | torch.device | None = None, **kwargs: Any) -> None:
        _refuse_unnamed(type(self).__name__, given)
        super().__init__(**kwargs, device="cpu" if device is None else _indexed(torch.device(device)))
        self._device_is_given = device is not None
        self._arguments["device"] = device

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The device given to the constructor, in a list; empty where the Trainer chooses it.

        Lightning assigns the Trainer's devices to a strategy that has this attribute, and not to other strategies.
        """
        return [self.root_device] if self._device_is_given else []

    @parallel_devices.setter
    def parallel_devices(self, devices: Sequence[torch.device]) -> None:
        if len(devices) > 1:
            self._refuse(f"devices={len(devices)}", "devices=1")
        self._root_device = torch.device(devices[0])

    @property
    def num_nodes(self) -> int:
        """The number of nodes: one."""
        return 1

    @num_nodes.setter
    def num_nodes(self, count: int) -> None:
        if count > 1:
            self._refuse(f"num_nodes={count}", "num_nodes=1")

    @property
    def _layer_sync(self) -> None:
        """Lightning assigns what ``sync_batchnorm=True`` asks for."""
        return None

    @_layer_sync.setter
    def _layer_sync(self, layer_sync: object) -> None:
        if layer_sync is not None:
            self._refuse("sync_batchnorm=True", "sync_batchnorm=False")

    def _refuse(self, given: str, allowed: str) -> None:
        raise ConfigError(
            f"Trainer({given}): {type(self).__name__} runs on a single device (allowed: {allowed}); for several, use "
            'strategy="lrcnn_ddp" or LRCNNDDPStrategy with the same options'
        )


class _Parallel(_Rowwise, DDPStrategy):
    __doc__ = f"""Lightning strategy for several devices: ``DDPStrategy`` with the user's steps run row-wise.

    The loss, the gradients, the buffers and the checkpoints are those of ``DDPStrategy``, up to rounding; the
    activation memory is a fraction. Checkpoints move freely to and from any other strategy.

    Args:
{_OPTIONS}
        kwargs: Arguments of ``DDPStrategy`` (``accelerator``, ``parallel_devices``, ``cluster_environment``,
            ``checkpoint_io``, ``precision_plugin``, ``process_group_backend``, ``start_method``, ...) and of
            ``DistributedDataParallel`` (``find_unused_parameters``, ``static_graph``, ...).

    Raises:
        ConfigError: an option does not exist or has a value that is not allowed; a module that is to run row-wise does
            not exist or is compiled.
    """

    strategy_name = "lrcnn_ddp"

    def __init__(self, *given: Any, **kwargs: Any) -> None:
        _refuse_unnamed(type(self).__name__, given)
        super().__init__(**kwargs)


def _refuse_unnamed(kind: str, given: Sequence[Any]) -> None:
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


def _indexed(device: torch.device) -> torch.device:
    """``cuda`` as ``cuda:0``: Lightning sets the current device by its index."""
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


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


_classes: dict[str, dict[str, Any]] = {}
"""Namespace -> name of a class -> the class; made at the first use of a namespace."""


def _make(namespace: str) -> dict[str, Any]:
    """The strategy classes of one Lightning."""
    if namespace in _classes:
        return _classes[namespace]
    library = importlib.import_module(f"{namespace}.strategies")
    if namespace in _classes:  # the import has come by here
        return _classes[namespace]
    prefix = "" if namespace == _preferred() else "PytorchLightning"
    distributed = torch.nn.parallel.DistributedDataParallel
    made: dict[str, Any] = {}
    for name, source, base, further in (
        ("LRCNNStrategy", _SingleDevice, library.SingleDeviceStrategy, ()),
        ("LRCNNDDPStrategy", _Parallel, library.DDPStrategy, (distributed.__init__,)),
    ):
        body = {
            "__doc__": source.__doc__,
            "__module__": __name__,
            "__qualname__": prefix + name,
            "_namespace": namespace,
            "_kind": name,
            "_base": base,
            "_passed_on": (base.__init__, *further),
        }
        made[name] = ABCMeta(name, (source, base), body)
    for other in _classes.values():
        for name in made:
            first, second = (made, other) if prefix == "" else (other, made)
            # A Trainer asks whether a strategy is one of its own library; `_join` makes it one.
            second[name]._base.register(first[name])
            first[name].register(second[name])
    _classes[namespace] = made
    return made


def _preferred() -> str:
    """The Lightning whose class goes by the plain name: the first one that is installed."""
    for namespace in _NAMESPACES.values():
        spec = importlib.util.find_spec(namespace.partition(".")[0])
        if spec is not None and spec.origin is not None:  # a folder of that name is no package
            return namespace
    raise ImportError("the strategies need Lightning; install lightning or pytorch-lightning")


def _register_names(library: ModuleType) -> None:
    for name, (kind, options) in NAMES.items():
        source = _make(_NAMESPACES[library.__name__])[kind]
        mode = options.get("mode", "auto")
        library.StrategyRegistry.register(
            name, source, description=f"{kind} with mode {mode!r}", override=True, **options
        )


class _RegisterOnImport(MetaPathFinder):
    """Registers the strategies in each Lightning once it has been imported.

    It finds nothing itself: it lets the other finders find the module that holds the registry, and adds a step to
    its execution.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _NAMESPACES:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _RegisterOnImport))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register_names(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register `NAMES` in each Lightning that has been imported, and in the others when they are.

    Doing so again changes nothing.
    """
    for name in _NAMESPACES:
        if hasattr(sys.modules.get(name), "StrategyRegistry"):
            _register_names(sys.modules[name])
    if not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())


if TYPE_CHECKING:

    class LRCNNStrategy(_SingleDevice): ...

    class LRCNNDDPStrategy(_Parallel): ...


def __getattr__(name: str) -> Any:
    """Make the classes when they are asked for; importing this file must not import Lightning."""
    kind = name.removeprefix("PytorchLightning")
    if kind in ("LRCNNStrategy", "LRCNNDDPStrategy"):
        namespace = _preferred() if kind == name else "pytorch_lightning"
        made = _make(namespace)[kind]
        if made.__qualname__ == name:
            return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
