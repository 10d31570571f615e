"""The conversion of any network: lean convolutions in place of its fully coupled ones."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any, Literal, cast

from torch import Tensor, nn

from lrcnn_lightning.errors import ConfigError
from lrcnn_lightning.models.lean.convolution import LeanConv2d
from lrcnn_lightning.models.lean.option import Stencil, check_choice, listed
from lrcnn_lightning.models.option import whole

__all__ = ["leanify"]

_IMAGE_CHANNELS = 4
"""Channels of an input that is taken for an image: grey, colours, and colours with a fourth channel."""


def leanify(
    module: nn.Module,
    *,
    stencil: Stencil = "5-point",
    group_size: int = 1,
    strided_stem: bool = False,
    keep: Collection[str] = (),
) -> nn.Module:
    """Copy a network with lean convolutions in place of its fully coupled spatial ones; the given one is not changed.

    A `torch.nn.Conv2d` is replaced if it has one group and a kernel of odd height and width, larger than 1 x 1, and
    if the lean one has fewer weights.  Stride, padding, padding mode, dilation, device, dtype, train or eval state, and
    whether there is a bias stay.  A kernel that is not 3 x 3 gets the stencil ``"full"``.  A convolution that is used
    in several places is replaced by one that is used in all of them.

    Left as they are: 1 x 1 and grouped convolutions, even kernels, subclasses of ``Conv2d`` (parametrised and lazy ones
    among them), convolutions whose weight or bias is computed (by pruning, weight norm or spectral norm), transposed
    convolutions, 1-D and 3-D ones, and the stem, see ``strided_stem``.

    The weights of the new convolutions are drawn anew, and require gradients: a trained network has to be trained
    again.  All other parameters and buffers keep their names and values.  Hooks on a replaced convolution are lost.  A
    lean convolution has no ``weight``: one whose ``weight`` is read by the code around it belongs into ``keep``.

    How much is saved hangs on the common divisor of a convolution's channels, see `LeanConv2d`: from 64 to 65 channels,
    two thirds of the weights stay.

    Args:
        module: any network, or a single convolution.
        stencil: ``"4-point"``, ``"5-point"`` or ``"full"``, see `LeanConv2d`.
        group_size: neighbouring channels that the spatial part couples; 1 is depthwise.  A convolution that it does not
            suit gets the largest smaller one: the largest divisor of the common divisor of its channels.
        strided_stem: replace the stem, too, if that saves weights.  The stem is the network's first ``Conv2d`` in the
            order of ``named_modules()``, if it strides and reads an image: at most four channels.  The 7 x 7 stem of a
            ResNet gets smaller only if its 3 and 64 channels have a common divisor, as 3 and 48 do.
        keep: names of submodules that stay as they are, with all that is in them.

    Returns:
        The copy.

    Raises:
        ConfigError: for an option that is not allowed, for an unknown name in ``keep``, if a convolution that would be
            replaced shares a parameter with another module, or if nothing can be replaced.

    Warns:
        UserWarning: if a replaced convolution was frozen, because the new one is not.
    """
    check_choice("leanify", "stencil", stencil, Stencil)
    group_size = whole("leanify", "group_size", group_size)
    names = dict(module.named_modules(remove_duplicate=False))
    if isinstance(keep, str) or any(name not in names for name in keep):
        given = [keep] if isinstance(keep, str) else [name for name in keep if name not in names]
        raise ConfigError(
            f"keep of leanify must be a list of names of submodules of {type(module).__name__} (given: "
            f"{listed(given)}); see named_modules(), the first are {listed(list(names)[1:6]) or 'none: it has none'}"
        )
    kept = {id(part) for name in keep for part in names[name].modules()}
    if not strided_stem:
        kept |= {id(part) for part in _strided_stem(module)}
    replaced: dict[str, nn.Conv2d] = {}
    for name, part in module.named_modules():
        if id(part) not in kept and _is_replaceable(part):
            assert isinstance(part, nn.Conv2d)
            if _weights(_lean_version(part, stencil, group_size, meta=True)) < _weights(part):
                replaced[name] = part
    if not replaced:
        raise ConfigError(
            f"leanify found nothing to replace in {type(module).__name__}: it takes torch.nn.Conv2d with an odd kernel "
            "larger than 1 x 1 and one group, where that saves weights, but not the strided stem (unless "
            "strided_stem=True) and nothing that is named in `keep`"
        )
    _check_not_tied(module, replaced)
    _warn_of_frozen(replaced)
    copies: dict[int, Any] = _computed_tensors(module)  # by identity, as ``deepcopy`` looks up what it has copied
    copies |= {id(part): _lean_version(part, stencil, group_size) for part in replaced.values()}
    result: nn.Module = copy.deepcopy(module, copies)
    return result


def _strided_stem(module: nn.Module) -> list[nn.Conv2d]:
    """The first convolution inside a network, if it strides over an image; empty if not."""
    # All kinds of convolution count: behind a stem that cannot be replaced, the second one is still no stem.
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    if first is None or first is module or first.stride == (1, 1) or first.in_channels > _IMAGE_CHANNELS:
        return []
    return [first]


def _is_replaceable(module: nn.Module) -> bool:
    """Whether a module is a fully coupled spatial convolution that can be made lean."""
    return (
        type(module) is nn.Conv2d
        and {"weight", "bias"} <= module._parameters.keys()  # else ``torch.nn.utils`` computes them
        and module.groups == 1
        and max(module.kernel_size) > 1
        and all(length % 2 for length in module.kernel_size)
    )


def _lean_version(convolution: nn.Conv2d, stencil: Stencil, group_size: int, *, meta: bool = False) -> LeanConv2d:
    """A lean convolution, with new weights, that fits where ``convolution`` is; ``meta``: one without data."""
    common = math.gcd(convolution.in_channels, convolution.out_channels)
    lean = LeanConv2d(
        convolution.in_channels,
        convolution.out_channels,
        cast("tuple[int, int]", convolution.kernel_size),
        cast("tuple[int, int]", convolution.stride),
        cast("tuple[int, int] | Literal['same', 'valid']", convolution.padding),
        cast("tuple[int, int]", convolution.dilation),
        stencil=stencil if convolution.kernel_size == (3, 3) else "full",
        group_size=max(size for size in range(1, min(group_size, common) + 1) if common % size == 0),
        bias=convolution.bias is not None,
        padding_mode=convolution.padding_mode,
        device="meta" if meta else convolution.weight.device,
        dtype=convolution.weight.dtype,
    )
    return lean.train(convolution.training)


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _check_not_tied(module: nn.Module, replaced: Mapping[str, nn.Conv2d]) -> None:
    """Raise an error if a convolution to be replaced shares a parameter, which its lean version could not."""
    owners: dict[int, list[tuple[str, str]]] = {}
    for name, part in module.named_modules():
        for kind, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((name, f"{name}.{kind}" if name else kind))
    for shared in owners.values():
        if len(shared) > 1 and any(name in replaced for name, _ in shared):
            raise ConfigError(
                f"{' and '.join(text for _, text in shared)} are one parameter of {type(module).__name__}, which "
                "leanify would make several: share the whole convolution, which stays shared, or name these modules "
                "in `keep`"
            )


def _warn_of_frozen(replaced: Mapping[str, nn.Conv2d]) -> None:
    """Say which convolutions were not trained and will be."""
    frozen = [name for name, part in replaced.items() if not all(p.requires_grad for p in part.parameters())]
    if frozen:
        more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
        warnings.warn(
            f"leanify replaces frozen convolutions by new ones with random weights, which are trained: "
            f"{', '.join(name or 'the module itself' for name in frozen[:3])}{more}; name them in `keep` to keep them "
            "and their weights",
            stacklevel=3,
        )


def _computed_tensors(module: nn.Module) -> dict[int, Any]:
    """Copies, by identity, of the tensors that modules compute for themselves, as by old weight norm and by pruning.

    ``deepcopy`` refuses tensors with a history.  A hook makes these anew before each use, so that values suffice.
    """
    found = (value for part in module.modules() for value in vars(part).values())
    return {id(value): value.detach().clone() for value in found if isinstance(value, Tensor) and not value.is_leaf}
