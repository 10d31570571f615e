"""BatchNorm over the batches of several processes: the moments of each are merged by Chan's formula.

    process 0   rows -> moments ---+                    +--> normalise, rows
    process 1   rows -> moments ---+-- merge_processes -+--> normalise, rows
                    n, mean, var        one all-gather       N, Mean, Var of all

Backward, the gradients of Mean and Var are summed over the processes (one all-reduce), since the loss of each depends
on them:

    Mean = sum_i n_i m_i / N           dm_i = n_i/N dMean + 2 n_i/N (m_i - Mean) dVar
    Var  = sum_i n_i (v_i + (m_i - Mean)^2) / N      dv_i = n_i/N dVar

Every merge reads the count of the one before it. So all processes merge in the order of the graph, whatever their
plans are, and backward in the reverse order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import distributed_c10d

from lrcnn_lightning.graph import CUMULATIVE, SYNC_BATCH_NORM, Node, Ref
from lrcnn_lightning.rules.expansion import Builder, expands
from lrcnn_lightning.rules.moments import moments
from lrcnn_lightning.rules.normalisation import emit_normalise, update_statistics
from lrcnn_lightning.rules.rule import Operator

__all__ = ["merge_processes"]


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, variance: Tensor, count: int, name: str, after: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
        group = resolve(name)
        channels = mean.numel()
        counted = torch.full((1,), count, dtype=torch.float64, device=mean.device)
        mine = torch.cat([mean.double(), variance.double(), counted])
        all_of_them = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(all_of_them, mine, group=group)
        table = torch.stack(all_of_them)
        means, variances, counts = table[:, :channels], table[:, channels:-1], table[:, -1:]
        total = counts.sum()
        merged = (means * counts).sum(0) / total
        spread = ((variances + (means - merged) ** 2) * counts).sum(0) / total
        ctx.save_for_backward(mean.double() - merged, count / total)
        ctx.group = group
        ctx.mark_non_differentiable(total)
        return merged.to(mean.dtype), spread.to(mean.dtype), total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, for_mean: Tensor, for_variance: Tensor, _: Any) -> tuple[Any, ...]:
        deviation, share = ctx.saved_tensors
        both = torch.stack([for_mean, for_variance]).double()
        distributed.all_reduce(both, group=ctx.group)
        for_mine = share * both[0] + 2 * share * deviation * both[1]
        dtype = for_mean.dtype
        return for_mine.to(dtype), (share * both[1]).to(dtype), None, None, None


def _merge_processes(
    mean: Tensor, variance: Tensor, count: int, group: str, after: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count (``[C]``, ``[C]``, ``[]``) of what all processes of a group have together."""
    result: tuple[Tensor, Tensor, Tensor] = _Merge.apply(mean, variance, count, group, after)  # type: ignore[no-untyped-call]
    return result


merge_processes = Operator("merge_processes", _merge_processes, effect=True)


@expands(SYNC_BATCH_NORM)
def expand_sync_batch_norm(builder: Builder, node: Node) -> bool:
    """``sync_batch_norm(x, weight, bias, running_mean, running_var, momentum, eps, group)``."""
    x, weight, bias, running_mean, running_variance, momentum, eps, group = node.args
    value = builder.values[x.index]
    channels = value.shape[1]
    count = value.elements // channels
    dtype = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype

    def vector(part: str, shape: tuple[int, ...] = (channels,), dtype: torch.dtype = dtype) -> Ref:
        return builder.value(f"{node.name}_{part}", shape, dtype, value.device)

    own = [vector("own_mean"), vector("own_variance")]
    merged = [vector("mean"), vector("variance"), vector("count", (), torch.float64)]
    before = next((Ref(n.outputs[2]) for n in reversed(builder.nodes) if n.op is merge_processes), None)
    builder.emit(node, moments, (x, None), tuple(ref.index for ref in own), "moments")
    builder.emit(node, merge_processes, (*own, count, group, before), tuple(ref.index for ref in merged), "merge")
    emit_normalise(builder, node, x, merged[:2], (weight, bias), eps, node.outputs[0])
    if isinstance(running_mean, Ref):
        args: tuple[Any, ...] = (*merged[:2], running_mean, running_variance, momentum, merged[2])
        if momentum == CUMULATIVE:
            args = (*args, builder.batches_of(node, running_mean))
        builder.emit(node, update_statistics, args, (), "statistics")
    return True
