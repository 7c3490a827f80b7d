# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""BatchNorm in groups on CUDA: a few launches a layer, whatever the number of groups.

torch has BatchNorm for one group at a time. On an H200, a ResNet-50 step with 8 groups launched
6,187 kernels, 5,000 of them for BatchNorm, and waited for the host to do so
(benchmarks/results/gpu-check_h200_2026-11-26.jsonl).

An activation is seen as (groups, rows, channels): channels-last, a row is a pixel of an image, and
the rows of a group lie in one piece. Sums are taken over splits of a group's rows, written down,
and added up in the order of the splits: no atomics, the same bits each time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

_ROWS, _CHANNELS = 32, 64  # of a tile: 16 values a thread, 128 bytes of bf16 in a row
_REDUCING, _WRITING = 1056, 4224  # programs: 8 and 32 for each of the 132 processors of an H100
_SPLITS = 128  # at most, so that one program adds them up

# One compilation for all layers: of the sizes only `channels` decides how wide loads are.
_compiled: Any = triton.jit(do_not_specialize=["rows", "groups", "share", "splits"])


@_compiled
def _moments(x, partial, rows, channels, groups, share, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sum up x - s and (x - s)^2 of a split, s being the first row of its group.

    About a value of the group itself nothing cancels where the mean is far from 0.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split, group = tl.program_id(1), tl.program_id(2)
    inside = channel < channels
    x += group.to(tl.int64) * rows * channels
    origin = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    first = tl.zeros((ROWS, CHANNELS), tl.float32)
    second = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, share, ROWS):
        row = split * share + start + tl.arange(0, ROWS)
        kept = (row < rows)[:, None] & inside[None, :]
        value = tl.load(x + row[:, None] * channels + channel[None, :], mask=kept, other=0.0)
        off = tl.where(kept, value.to(tl.float32) - origin[None, :], 0.0)
        first += off
        second += off * off
    at = partial + (split * groups + group) * channels + channel
    tl.store(at, tl.sum(first, axis=0), mask=inside)
    whole = tl.num_programs(1) * groups * channels
    tl.store(at + whole, tl.sum(second, axis=0), mask=inside)


@_compiled
def _statistics(
    x,
    partial,
    mean,
    invstd,
    rows,
    channels,
    groups,
    splits,
    eps,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Turn the moments of all splits into mean and 1 / standard deviation of a group."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    group = tl.program_id(1)
    inside = channel < channels
    split = tl.arange(0, SPLITS)
    kept = (split < splits)[:, None] & inside[None, :]
    at = partial + (split[:, None] * groups + group) * channels + channel[None, :]
    first = tl.sum(tl.load(at, mask=kept, other=0.0), axis=0) / rows
    second = tl.sum(tl.load(at + splits * groups * channels, mask=kept, other=0.0), axis=0) / rows
    x += group.to(tl.int64) * rows * channels
    origin = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    var = tl.maximum(second - first * first, 0.0)
    tl.store(mean + group * channels + channel, origin + first, mask=inside)
    tl.store(invstd + group * channels + channel, 1.0 / tl.sqrt(var + eps), mask=inside)


@_compiled
def _normalize(
    x,
    y,
    mean,
    invstd,
    weight,
    bias,
    running_mean,
    running_var,
    rows,
    channels,
    groups,
    share,
    momentum,
    eps,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Normalize a split; one program a channel block moves the running statistics."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split, group = tl.program_id(1), tl.program_id(2)
    inside = channel < channels
    center = tl.load(mean + group * channels + channel, mask=inside, other=0.0)
    scale = tl.load(invstd + group * channels + channel, mask=inside, other=0.0)
    scale *= tl.load(weight + channel, mask=inside, other=0.0)
    offset = tl.load(bias + channel, mask=inside, other=0.0)
    x += group.to(tl.int64) * rows * channels
    y += group.to(tl.int64) * rows * channels
    for start in range(0, share, ROWS):
        row = split * share + start + tl.arange(0, ROWS)
        kept = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * channels + channel[None, :]
        value = tl.load(x + at, mask=kept, other=0.0).to(tl.float32)
        out = (value - center[None, :]) * scale[None, :] + offset[None, :]
        tl.store(y + at, out.to(y.dtype.element_ty), mask=kept)
    if (split == 0) & (group == 0):
        means = tl.zeros((CHANNELS,), tl.float32)
        variances = tl.zeros((CHANNELS,), tl.float32)
        for other in range(groups):
            means += tl.load(mean + other * channels + channel, mask=inside, other=0.0)
            inverse = tl.load(invstd + other * channels + channel, mask=inside, other=1.0)
            variances += 1.0 / (inverse * inverse) - eps
        old = tl.load(running_mean + channel, mask=inside, other=0.0)
        tl.store(running_mean + channel, old + momentum * (means / groups - old), mask=inside)
        old = tl.load(running_var + channel, mask=inside, other=0.0)
        unbiased = variances / groups * (rows / (rows - 1.0))
        tl.store(running_var + channel, old + momentum * (unbiased - old), mask=inside)


@_compiled
def _products(
    x,
    grad,
    mean,
    invstd,
    partial,
    rows,
    channels,
    groups,
    share,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sum up the gradient, and the gradient times the normalized value, of a split."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split, group = tl.program_id(1), tl.program_id(2)
    inside = channel < channels
    center = tl.load(mean + group * channels + channel, mask=inside, other=0.0)
    scale = tl.load(invstd + group * channels + channel, mask=inside, other=0.0)
    x += group.to(tl.int64) * rows * channels
    grad += group.to(tl.int64) * rows * channels
    plain = tl.zeros((ROWS, CHANNELS), tl.float32)
    weighted = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, share, ROWS):
        row = split * share + start + tl.arange(0, ROWS)
        kept = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * channels + channel[None, :]
        slope = tl.load(grad + at, mask=kept, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=kept, other=0.0).to(tl.float32)
        plain += slope
        weighted += slope * (value - center[None, :])
    at = partial + (split * groups + group) * channels + channel
    tl.store(at, tl.sum(plain, axis=0), mask=inside)
    whole = tl.num_programs(1) * groups * channels
    tl.store(at + whole, tl.sum(weighted, axis=0) * scale, mask=inside)


@_compiled
def _totals(partial, total, channels, groups, splits, SPLITS: tl.constexpr, CHANNELS: tl.constexpr):
    """Add up both sums over the splits of a group; `total` is (2, groups, channels)."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    group = tl.program_id(1)
    inside = channel < channels
    split = tl.arange(0, SPLITS)
    kept = (split < splits)[:, None] & inside[None, :]
    at = partial + (split[:, None] * groups + group) * channels + channel[None, :]
    plain = tl.sum(tl.load(at, mask=kept, other=0.0), axis=0)
    weighted = tl.sum(tl.load(at + splits * groups * channels, mask=kept, other=0.0), axis=0)
    tl.store(total + group * channels + channel, plain, mask=inside)
    tl.store(total + (groups + group) * channels + channel, weighted, mask=inside)


@_compiled
def _gradient(
    x,
    grad,
    out,
    mean,
    invstd,
    weight,
    total,
    rows,
    channels,
    groups,
    share,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write the gradient of x: w / std * (dy - mean(dy) - normalized * mean(dy * normalized))."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split, group = tl.program_id(1), tl.program_id(2)
    inside = channel < channels
    here = group * channels + channel
    center = tl.load(mean + here, mask=inside, other=0.0)
    inverse = tl.load(invstd + here, mask=inside, other=0.0)
    plain = tl.load(total + here, mask=inside, other=0.0) / rows
    weighted = tl.load(total + groups * channels + here, mask=inside, other=0.0) / rows * inverse
    scale = inverse * tl.load(weight + channel, mask=inside, other=0.0)
    x += group.to(tl.int64) * rows * channels
    grad += group.to(tl.int64) * rows * channels
    out += group.to(tl.int64) * rows * channels
    for start in range(0, share, ROWS):
        row = split * share + start + tl.arange(0, ROWS)
        kept = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * channels + channel[None, :]
        slope = tl.load(grad + at, mask=kept, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=kept, other=0.0).to(tl.float32)
        moved = slope - plain[None, :] - (value - center[None, :]) * weighted[None, :]
        tl.store(out + at, (moved * scale[None, :]).to(out.dtype.element_ty), mask=kept)


class _Shape:
    """How an activation is divided among programs."""

    def __init__(self, x: torch.Tensor, size: int) -> None:
        self.groups, self.channels = len(x) // size, x.shape[1]
        self.rows = size * x.shape[2] * x.shape[3]
        self.blocks = -(-self.channels // _CHANNELS)

    def split(self, programs: int, most: int) -> tuple[int, int]:
        """Return the rows of a split, whole tiles, and the number of splits of a group."""
        wanted = min(most, max(1, programs // (self.groups * self.blocks)))
        share = -(-self.rows // (wanted * _ROWS)) * _ROWS
        return share, -(-self.rows // share)


class TritonBatchNorm(torch.autograd.Function):
    """BatchNorm of each group of `size` images, as `models.encoder._InGroups`.

    x is (n, C, H, W), channels-last and contiguous, bf16, fp16 or fp32, n a multiple of `size`;
    weight, bias and the running statistics are fp32, and the latter are moved once, by the mean
    over the groups.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        size: int,
        momentum: float,
        eps: float,
    ) -> torch.Tensor:
        """Return the normalized activation."""
        shape = _Shape(x, size)
        rows, channels, groups = shape.rows, shape.channels, shape.groups
        share, splits = shape.split(_REDUCING, _SPLITS)
        partial = torch.empty(2, splits, groups, channels, device=x.device)
        mean, invstd = torch.empty(2, groups, channels, device=x.device).unbind()
        y = torch.empty_like(x)
        _moments[shape.blocks, splits, groups](
            x, partial, rows, channels, groups, share, ROWS=_ROWS, CHANNELS=_CHANNELS
        )
        _statistics[shape.blocks, groups](
            *(x, partial, mean, invstd, rows, channels, groups, splits, eps),
            SPLITS=_SPLITS,
            CHANNELS=_CHANNELS,
        )
        share, splits = shape.split(_WRITING, rows)
        _normalize[shape.blocks, splits, groups](
            *(x, y, mean, invstd, weight, bias, running_mean, running_var),
            *(rows, channels, groups, share, momentum, eps),
            ROWS=_ROWS,
            CHANNELS=_CHANNELS,
        )
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.size = size
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of activation, weight and bias."""
        x, weight, mean, invstd = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        shape = _Shape(x, ctx.size)
        rows, channels, groups = shape.rows, shape.channels, shape.groups
        share, splits = shape.split(_REDUCING, _SPLITS)
        partial = torch.empty(2, splits, groups, channels, device=x.device)
        total = torch.empty(2, groups, channels, device=x.device)
        grad_x = torch.empty_like(x)
        _products[shape.blocks, splits, groups](
            *(x, grad, mean, invstd, partial, rows, channels, groups, share),
            ROWS=_ROWS,
            CHANNELS=_CHANNELS,
        )
        _totals[shape.blocks, groups](
            *(partial, total, channels, groups, splits), SPLITS=_SPLITS, CHANNELS=_CHANNELS
        )
        share, splits = shape.split(_WRITING, rows)
        _gradient[shape.blocks, splits, groups](
            *(x, grad, grad_x, mean, invstd, weight, total, rows, channels, groups, share),
            ROWS=_ROWS,
            CHANNELS=_CHANNELS,
        )
        grad_bias, grad_weight = total.sum(dim=1).unbind()
        return grad_x, grad_weight, grad_bias, None, None, None, None, None
