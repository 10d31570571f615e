"""Reading what a trace recorded: a `Trace` -> `Graph`.

The switches that the code set (``no_grad``, ``autocast``) are noted on each node.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from lrcnn_lightning.errors import CaptureError
from lrcnn_lightning.graph.custom_functions import CustomFunction
from lrcnn_lightning.graph.graph import Context, Graph, Node, Ref, Value, ValueKind
from lrcnn_lightning.graph.hooks import HookCall
from lrcnn_lightning.graph.tracing import MODULE, Trace
from lrcnn_lightning.graph.views import base_of, views_of, written_argument

__all__ = ["read"]


def read(recorded: GraphModule, trace: Trace, inputs: list[tuple[int, str]]) -> Graph:
    """The graph of a trace; ``inputs``: place among the flat arguments, and name, of each tensor."""
    return _Reader(recorded, trace).graph(inputs)


class _Reader:
    """Reads recorded nodes into values and nodes."""

    def __init__(self, recorded: GraphModule, trace: Trace) -> None:
        self.recorded, self.trace = recorded, trace
        self.values: list[Value] = []
        self.nodes: list[Node] = []
        self.constants: dict[str, Tensor] = {}
        self.context = Context()
        self._outer: dict[FxNode, Context] = {}
        """The node that entered an autocast -> what was in force before."""

    def graph(self, inputs: list[tuple[int, str]]) -> Graph:
        environment: dict[FxNode, Any] = {}
        places = iter(inputs)
        outputs: Any = ()
        for node in self.recorded.graph.nodes:
            if node.op == "placeholder":
                place, name = next(places)
                environment[node] = self._value(name, node.meta["val"], ValueKind.INPUT, place)
            elif node.op == "get_attr" and node.users:
                environment[node] = self._attribute(node)
            elif node.op == "call_function":
                environment[node] = self._call(node, environment)
            elif node.op == "output":
                outputs = torch.fx.node.map_arg(node.args[0], lambda n: environment[n])
        tensors = iter(outputs)
        trace = self.trace
        self._refuse_writes()
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in trace.leaves]
        writes, guards = tuple(trace.observation.writes), trace.observation.guards
        return Graph(
            tuple(self.values),
            tuple(self.nodes),
            tuple(leaves),
            trace.structure,
            self.constants,
            writes,
            guards,
            trace.arguments,
        )

    def _refuse_writes(self) -> None:
        """Raise for a write to a tensor that is no part of the module, which may be another one at the next call, and
        for one to a map that hooks were shown, since they would not see it.
        """
        others = {live.source for live in self.trace.live if not live.owned} | {
            value.source for value in self.values if value.kind is ValueKind.CONSTANT
        }
        view: dict[int, Node] = {}
        seen: dict[int, str] = {}
        for node in self.nodes:
            if isinstance(node.op, HookCall):
                seen.update(dict.fromkeys((*map(partial(base_of, view), node.inputs), *node.outputs), node.op.path))
            written = written_argument(node)
            if written is not None:
                value = self.values[base_of(view, written.index)]
                if value.index in seen:
                    raise CaptureError(
                        f"a hook of {seen[value.index]!r} is shown a map that {node.op} at {node.module or 'the top'} "
                        "changes in place afterwards; let that operation run out of place (inplace=False)"
                    )
                if value.kind is not ValueKind.COMPUTED and value.source in others:
                    raise CaptureError(
                        f"{node.op} at {node.module or 'the top'} changes a tensor of shape {list(value.shape)} that "
                        "is not part of the module, which a captured graph would not look up again; make it a buffer"
                    )
            view.update(views_of(node))

    def _value(self, name: str, fake: Tensor, kind: ValueKind, source: str | int | None = None) -> Ref:
        if not all(isinstance(size, int) for size in fake.shape):
            raise CaptureError(f"the shape of {name!r} depends on data: {tuple(fake.shape)}")
        index = len(self.values)
        value = Value(index, name, tuple(fake.shape), fake.dtype, fake.device, kind, source, fake.stride())
        self.values.append(value)
        return Ref(index)

    def _attribute(self, node: FxNode) -> Ref:
        """A live tensor, or a constant that the code made."""
        live = self.trace.attributes.get(str(node.target))
        if live is not None:
            if live.held:
                self.constants[live.source] = live.tensor
            return self._value(live.source.replace(".", "_").replace(" ", "_"), live.fake, live.kind, live.source)
        constant = getattr(self.recorded, str(node.target))
        if not isinstance(constant, Tensor):
            raise CaptureError(f"its code makes {node.target}, of type {type(constant).__name__}")
        if constant.requires_grad:
            raise CaptureError(
                f"it makes the tensor {node.target!r}, which requires a gradient; pass it as an argument"
            )
        key = f"constant_{len(self.constants)}"
        self.constants[key] = constant
        return self._value(node.name, constant, ValueKind.CONSTANT, key)

    def _call(self, node: FxNode, environment: dict[FxNode, Any]) -> Any:
        args: Any = torch.fx.node.map_arg(node.args, lambda n: environment[n])
        kwargs: Any = torch.fx.node.map_arg(node.kwargs, lambda n: environment[n])
        if node.target is operator.getitem:
            return args[0][args[1]]
        if self._switched(node, args):
            return None
        module = node.target.path if isinstance(node.target, HookCall) else node.meta.get(MODULE, "")
        if not isinstance(node.target, (torch._ops.OpOverload, CustomFunction, HookCall)):
            raise CaptureError(f"{node.target} at {module or 'the top'} is not an ATen operation")
        is_overload = isinstance(node.target, torch._ops.OpOverload)
        name = str(node.target.name()) if is_overload else str(node.target)  # type: ignore[union-attr]
        if name.startswith("aten::_assert") or name == "aten::sym_constrain_range_for_size":
            return None
        fake = node.meta.get("val")
        if isinstance(fake, Tensor):
            result: Any = self._value(node.name, fake, ValueKind.COMPUTED)
            outputs: tuple[int, ...] = (result.index,)
        elif isinstance(fake, (list, tuple)):
            result = [
                self._value(f"{node.name}_{i}", item, ValueKind.COMPUTED) if isinstance(item, Tensor) else item
                for i, item in enumerate(fake)
            ]
            outputs = tuple(item.index if isinstance(item, Ref) else -1 for item in result)
            if -1 in outputs:
                raise CaptureError(f"{name} at {module or 'the top'} returns something that is no tensor")
        else:
            raise CaptureError(
                f"{name} at {module or 'the top'} turns a tensor into a Python value, so what follows depends on data"
            )
        self.nodes.append(Node(node.name, node.target, _plain(args), _plain(kwargs), outputs, module, self.context))
        return result

    def _switched(self, node: FxNode, args: tuple[Any, ...]) -> bool:
        """Whether a node sets a switch, which is then set for those that follow."""
        target = node.target
        if target is torch._C._set_grad_enabled:
            self.context = Context(bool(args[0]), self.context.autocast)
        elif target is torch.amp.autocast_mode._enter_autocast:
            self._outer[node] = self.context
            device, dtype, enabled = args[:3]
            self.context = Context(self.context.grad, (device, dtype, enabled))
        elif target is torch.amp.autocast_mode._exit_autocast:
            self.context = Context(self.context.grad, self._outer[node.args[0]].autocast)  # type: ignore[index]
        else:
            return False
        return True


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
