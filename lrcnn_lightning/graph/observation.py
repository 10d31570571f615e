"""What a module's Python code does beside tensor operations, observed while it is traced.

    reads        attributes of modules that are no parameters or buffers   ->  guards of the graph
    writes       attributes and buffers that the code sets                 ->  set again by every call
    and refused  containers, arrays and objects it changes in place, parameters and submodules that it sets, random
                 numbers of Python and NumPy

A trace keeps none of it: the code runs once, and later calls run its operations only.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn

from lrcnn_lightning.errors import CaptureError
from lrcnn_lightning.fake import is_fake
from lrcnn_lightning.graph.graph import Write
from lrcnn_lightning.graph.guards import Alike, Guard, Guards, compared
from lrcnn_lightning.graph.live import LiveTensors
from lrcnn_lightning.graph.state import MISSING, TABLES, PythonState, is_machinery, same_items
from lrcnn_lightning.graph.structure import CONSTANTS, take_apart

__all__ = ["Observation"]


@dataclass
class Observation:
    """One run of a module's code."""

    module: nn.Module
    live: LiveTensors
    recorder: nn.Module | None = None
    """What the trace itself keeps its attributes on."""
    reads: dict[tuple[int, str], Guard] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    written: list[Any] = field(default_factory=list)
    """The leaves of what is written."""
    memos: list[torch.Tensor] = field(default_factory=list)
    """Tensors that the code remembers for the next call: no harm if they do not depend on the data of this one."""

    @property
    def guards(self) -> Guards:
        """What the code read."""
        return Guards(tuple(self.reads.values()), tuple(self.held))

    @contextlib.contextmanager
    def observed(self, arguments: Any) -> Iterator[None]:
        """Observe what is run inside, and undo what it does to attributes, arguments and random states.

        Raises `CaptureError` for what later calls could not do again.
        """
        self.reads, self.held, self.writes, self.written, self.memos = {}, [], [], [], []
        paths = {child: path for path, child in self.module.named_modules()}
        with PythonState(self.module, arguments) as state:
            with self._recorded_reads(state):
                yield
            self._find_writes(paths, state)
            self._find_registrations(paths, state)
            self._find_changes(state)
            drawn = state.drawn()
            if drawn:
                raise CaptureError(
                    f"its forward draws random numbers from {' and '.join(drawn)}, which a captured graph would not "
                    "draw again; draw them with torch.rand, or outside of it and pass them as arguments"
                )

    def forget(self) -> None:
        """Let go of the tensors of the trace."""
        self.written, self.memos = [], []

    # ------------------------------------------------------------------ reads

    @contextlib.contextmanager
    def _recorded_reads(self, state: PythonState) -> Iterator[None]:
        """Note each attribute that is read, the outermost of those that are read for one another (properties)."""
        thread = threading.get_ident()
        under_way: list[list[tuple[nn.Module, str, Any]]] = []  # what each property that is being read reads itself

        def read(module: nn.Module, name: str) -> Any:
            if is_machinery(name) or name.startswith("__") or threading.get_ident() != thread:
                return object.__getattribute__(module, name)
            under_way.append([])
            found = under_way[-1]
            try:
                value = object.__getattribute__(module, name)
                own = name in object.__getattribute__(module, "__dict__")
                if own or not (isinstance(value, MethodType) or _holds_tensors(value)):
                    found = [(module, name, value)]  # else a method, or a property that computes with tensors
            finally:
                under_way.pop()
                if under_way:
                    under_way[-1].extend(found)
            if not under_way:
                for item in found:
                    self._note(*item, state)
            return value

        # Attributes are looked up on the class; only this thread's, and only for the time of the trace.
        nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del nn.Module.__getattribute__

    def _note(self, module: nn.Module, name: str, value: Any, state: PythonState) -> None:
        """Note what an attribute was before the code ran, unless the code itself has set it."""
        present = vars(module)
        written = name in present and state.attributes.get(module, present).get(name, MISSING) is not value
        if written or (id(module), name) in self.reads or module is self.recorder:
            return
        if isinstance(value, torch.Tensor) and self.live.place(value) is not None:
            self.reads[id(module), name] = Guard(module, name, Alike.of(value))
            return
        try:
            self.reads[id(module), name] = Guard(module, name, compared(value, self.held))
        except CaptureError as error:
            raise CaptureError(
                f"its forward reads {name!r} of {type(module).__name__}, of type {type(value).__name__}: {error}; copy "
                "what is needed of it to attributes that are numbers or strings"
            ) from error

    # ----------------------------------------------------------------- writes

    def _find_writes(self, paths: dict[nn.Module, str], state: PythonState) -> None:
        for child, path in paths.items():
            for name, value in vars(child).items():
                before = state.attributes[child].get(name, MISSING)
                if not is_machinery(name) and self.live.original(value) is not before:
                    self._write(path, name, value)

    def _find_registrations(self, paths: dict[nn.Module, str], state: PythonState) -> None:
        """Buffers that the code sets or registers. Parameters and submodules are not made anew by a graph."""
        for child, path in paths.items():
            unsaved = vars(child)["_non_persistent_buffers_set"]
            for table in TABLES:
                before, present = state.tables[child][table], vars(child)[table]
                for name in {*before, *present}:
                    value = present.get(name, MISSING)
                    if self.live.original(value) is before.get(name, MISSING):
                        continue
                    if table != "_buffers" or value is MISSING:
                        raise CaptureError(
                            f"its forward sets {_named(path, name)}, one of its {table[1:]}, which a captured graph "
                            "would not do again; do so outside of it"
                        )
                    self._write(path, name, value, buffer=name not in unsaved)

    def _write(self, path: str, name: str, value: Any, buffer: bool | None = None) -> None:
        leaves, structure = take_apart(value)
        unknown = [leaf for leaf in leaves if not isinstance(leaf, (*CONSTANTS, torch.Tensor))]
        if unknown:
            raise CaptureError(
                f"its forward sets {_named(path, name)} to something of type {type(unknown[0]).__name__}; "
                "allowed are tensors, numbers and strings, and containers of them"
            )
        self.writes.append(Write(path, name, structure, buffer))
        self.written += leaves

    def _find_changes(self, state: PythonState) -> None:
        """What the code changes inside of attributes, arguments, and outside of the module.

        What it sets anew is a write instead, and the container of before is as it was. New entries of attributes that
        are tensors are remembered for the next call (`memos`). So are new entries of a dict of a class or a file, which
        is a cache, as a set is one. Everything else would be lost.
        """
        for holder in state.holders:
            content, present = holder.content, self._originals(holder.present)
            if same_items(present, content):
                continue
            is_dict = isinstance(present, dict)
            new = [v for k, v in present.items() if k not in content or content[k] is not v] if is_dict else []
            if holder in state.variables:
                grown = is_dict and same_items({key: present.get(key) for key in content}, content)
                if grown or isinstance(present, set):
                    self.memos += filter(is_fake, new)
                    continue
            elif holder in state.contents and new and all(map(is_fake, new)):
                self.memos += new
                continue
            raise CaptureError(
                f"its forward changes {holder.name}, which a captured graph would not do again; return what is put "
                "there, or do so outside of the module"
            )

    def _originals(self, content: Any) -> Any:
        """The items of a container or an object, with live tensors in the place of their stand-ins."""
        if isinstance(content, dict):
            return {key: self.live.original(value) for key, value in content.items()}
        return list(map(self.live.original, content)) if isinstance(content, list) else content


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value)
    )


def _named(path: str, name: str) -> str:
    return repr(f"{path}.{name}" if path else name)
