"""Reading what ``torch.export`` made of a module: an exported program -> `Graph`.

Nested graphs (``no_grad``, ``autocast``) are written inline, with the switch noted on each node.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.utils._pytree import tree_flatten

from lrcnn_lightning.errors import CaptureError
from lrcnn_lightning.graph.graph import Context, Graph, Node, Ref, Value, ValueKind
from lrcnn_lightning.graph.leaks import Leaks
from lrcnn_lightning.graph.observation import Observation
from lrcnn_lightning.graph.structure import Structure

__all__ = ["Reader", "Results"]

_SPECIAL_INPUTS = {
    InputKind.PARAMETER: ValueKind.PARAMETER,
    InputKind.BUFFER: ValueKind.BUFFER,
    InputKind.CONSTANT_TENSOR: ValueKind.CONSTANT,
}


class Results:
    """What the module returned in the trace: its structure, and the leaves that are no tensors; and what its code did
    beside that. After the leaves come those of attributes that it sets, then tensors that it remembers (``memos``).
    """

    leaves: list[Any]
    structure: Structure
    memos: int

    def __init__(self, module: nn.Module, leaks: Leaks) -> None:
        self.observation, self.leaks = Observation(module), leaks
        self.stderr = sys.stderr


class Reader:
    """Reads an exported program into values and nodes."""

    def __init__(
        self, program: torch.export.ExportedProgram, places: Sequence[tuple[int, str]], results: Results, prefix: str
    ) -> None:
        self.program, self.places, self.results = program, places, results
        self.prefix = prefix
        """Of the names of submodules, parameters and buffers."""
        self.values: list[Value] = []
        self.nodes: list[Node] = []
        self.constants: dict[str, torch.Tensor] = {}

    def graph(self) -> Graph:
        environment: dict[FxNode, Any] = {}
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        position = 0
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            spec = specs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                fake = node.meta.get("val")
                if isinstance(fake, torch.Tensor):
                    place, name = self.places[position]
                    environment[node] = self._value(name, fake, ValueKind.INPUT, place)
                else:
                    environment[node] = fake
                position += 1
            elif spec.kind in _SPECIAL_INPUTS:
                kind = _SPECIAL_INPUTS[spec.kind]
                target = spec.target if spec.target is None else self._name(spec.target)
                environment[node] = self._value(node.name, node.meta["val"], kind, target)
                if kind is ValueKind.CONSTANT and spec.target is not None and target is not None:
                    self.constants[target] = self.program.constants[spec.target]
            else:
                raise CaptureError(f"its input {node.name!r} is of kind {spec.kind.name}, which has no row-wise form")
        outputs = self._inline(self.program.graph_module, environment, Context(), "")
        tensors = iter(outputs)
        leaves = [next(tensors) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.results.leaves]
        writes, guards = tuple(self.results.observation.writes), self.results.observation.guards
        for key, constant in self.constants.items():
            if constant.requires_grad:
                raise CaptureError(f"it reads the tensor {key!r}, which requires a gradient; pass it as an argument")
        structure = self.results.structure
        return Graph(tuple(self.values), tuple(self.nodes), tuple(leaves), structure, self.constants, writes, guards)

    def _name(self, traced: str) -> str:
        """The name of a submodule, parameter or buffer in the module itself."""
        return traced.removeprefix(self.prefix).removeprefix(".") if self.prefix else traced

    def _value(self, name: str, fake: torch.Tensor, kind: ValueKind, source: str | int | None = None) -> Ref:
        shape = []
        for size in fake.shape:
            if not isinstance(size, int):
                raise CaptureError(f"the shape of {name!r} depends on data: {tuple(fake.shape)}")
            shape.append(size)
        index = len(self.values)
        strides = None if kind is ValueKind.COMPUTED else tuple(fake.stride())
        self.values.append(Value(index, name, tuple(shape), fake.dtype, fake.device, kind, source, strides))
        return Ref(index)

    def _inline(self, module: GraphModule, environment: dict[FxNode, Any], context: Context, path: str) -> Any:
        """Append the nodes of ``module`` and return what it returns, as refs."""
        for node in module.graph.nodes:
            if node.op == "get_attr":
                environment[node] = self._attribute(module, node)
            elif node.op == "call_function":
                environment[node] = self._call(module, node, environment, context, path)
            elif node.op == "output":
                return torch.fx.node.map_arg(node.args[0], lambda n: environment[n])
        raise CaptureError("the capture has no output")

    def _attribute(self, module: GraphModule, node: FxNode) -> Any:
        target: Any = module
        for part in str(node.target).split("."):
            target = getattr(target, part)
        if isinstance(target, torch.Tensor):
            key = f"constant_{len(self.constants)}"
            self.constants[key] = target
            return self._value(node.name, target, ValueKind.CONSTANT, key)
        return target

    def _call(
        self, module: GraphModule, node: FxNode, environment: dict[FxNode, Any], context: Context, path: str
    ) -> Any:
        def plain(tree: Any) -> Any:
            return torch.fx.node.map_arg(tree, lambda n: environment[n])

        args, kwargs = plain(node.args), plain(node.kwargs)
        stack = node.meta.get("nn_module_stack") or {}
        module_path = self._name(next(reversed(stack.values()))[0]) if stack else path
        if node.target is operator.getitem:
            return args[0][args[1]]
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._nested(node.target, args, context, module_path)
        if not isinstance(node.target, torch._ops.OpOverload):
            if not any(isinstance(leaf, Ref) for leaf in tree_flatten((args, kwargs))[0]):
                return node.target(*args, **kwargs)  # type: ignore[operator]  # arithmetic on sizes
            raise CaptureError(f"{node.target} at {module_path or 'the top'} is not an ATen operation")
        name = str(node.target.name())  # type: ignore[no-untyped-call]
        if name.startswith("aten::_assert") or name == "aten::sym_constrain_range_for_size":
            return None
        fake = node.meta.get("val")
        if isinstance(fake, torch.Tensor):
            result: Any = self._value(node.name, fake, ValueKind.COMPUTED)
            outputs: tuple[int, ...] = (result.index,)
        elif isinstance(fake, (list, tuple)):
            result = [
                self._value(f"{node.name}_{i}", item, ValueKind.COMPUTED) if isinstance(item, torch.Tensor) else item
                for i, item in enumerate(fake)
            ]
            outputs = tuple(item.index if isinstance(item, Ref) else -1 for item in result)
            if -1 in outputs:
                raise CaptureError(f"{name} at {module_path or 'the top'} returns something that is no tensor")
        else:
            raise CaptureError(
                f"{name} at {module_path or 'the top'} turns a tensor into a Python value, "
                "so the control flow depends on data"
            )
        self.nodes.append(Node(node.name, node.target, _plain(args), _plain(kwargs), outputs, module_path, context))
        return result

    def _nested(self, target: Any, args: Any, context: Context, path: str) -> Any:
        """Write the graph inside ``no_grad`` or ``autocast`` inline."""
        name = str(target)
        if name == "wrap_with_set_grad_enabled":
            enabled, inner, *operands = args
            context = Context(context.grad and bool(enabled), context.autocast)
        elif name == "wrap_with_autocast":
            device, dtype, enabled, _cache, inner, *operands = args
            context = Context(context.grad, (device, dtype, enabled))
        else:
            raise CaptureError(f"{name} at {path or 'the top'} is data-dependent control flow")
        placeholders = [node for node in inner.graph.nodes if node.op == "placeholder"]
        return self._inline(inner, dict(zip(placeholders, operands, strict=True)), context, path)


def _plain(tree: Any) -> Any:
    """Immutable fx containers -> plain lists, tuples and dicts."""
    if isinstance(tree, Ref):
        return tree
    if isinstance(tree, tuple):
        return tuple(_plain(item) for item in tree)
    if isinstance(tree, list):
        return [_plain(item) for item in tree]
    if isinstance(tree, dict):
        return {key: _plain(item) for key, item in tree.items()}
    return tree
