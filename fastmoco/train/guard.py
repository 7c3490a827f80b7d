"""A step with a non-finite number leaves nothing behind.

One bad batch would otherwise stay: in the queue for K / batch steps, in the running statistics for
good. The check needs no vote: a non-finite value on one rank makes the averaged gradient non-finite
on all. Nothing here waits for the device except `Guard.check`, which is called on logged steps.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from fastmoco.errors import DivergedError
from fastmoco.models.encoder import batch_norms


@torch.no_grad()
def finite(gradients: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether the gradients' norm is finite (0-d bool), and the norm (0-d)."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return torch.isfinite(norm), norm


class Guard(nn.Module):
    """Counts skipped steps on the device.

    Attributes:
        skipped: 0-d int64, skipped steps of the run.
        in_a_row: 0-d int64, the current streak; `longest` the longest since the last check.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self.skipped: torch.Tensor
        self.in_a_row: torch.Tensor
        self.longest: torch.Tensor
        for name in ("skipped", "in_a_row", "longest"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def count(self, ok: torch.Tensor) -> None:
        """Count one step."""
        bad = (~ok).long()
        self.skipped += bad
        self.in_a_row.copy_((self.in_a_row + bad) * bad)
        torch.maximum(self.longest, self.in_a_row, out=self.longest)

    def check(self) -> int:
        """Return the number of skipped steps of the run.

        Raises:
            DivergedError: the limit or more in a row since the last check.
        """
        longest = int(self.longest)
        self.longest.zero_()
        if longest >= self._limit:
            raise DivergedError(
                f"{longest} steps in a row gave a non-finite gradient: lower the learning rate, or "
                "runtime.precision=bf16 if it is fp16."
            )
        return int(self.skipped)


class RunningStatistics:
    """The BatchNorm running statistics of several modules in one flat tensor.

    One tensor is one copy to save, one to restore and one to average over the ranks.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        norms = [norm for module in modules for norm in batch_norms(module)]
        places = [(n, name) for n in norms for name in ("running_mean", "running_var")]
        buffers: list[torch.Tensor] = [getattr(norm, name) for norm, name in places]
        # One number more: networks without BatchNorm have none.
        unused = next(modules[0].parameters()).new_zeros(1)
        self.flat = torch.cat([*buffers, unused])
        views = torch.split(self.flat, [len(b) for b in [*buffers, unused]])[:-1]
        for (norm, name), view in zip(places, views, strict=True):
            setattr(norm, name, view)

    def saved(self) -> torch.Tensor:
        """Return a copy to go back to."""
        return self.flat.clone()

    def restore_unless(self, ok: torch.Tensor, saved: torch.Tensor) -> None:
        """Go back to a copy where `ok` (0-d bool) is False."""
        self.flat.copy_(torch.where(ok, self.flat, saved))

    def over(self, parts: int) -> Iterator[int]:
        """Count the parts of a batch, whose networks together move the statistics once."""
        if parts == 1:
            yield 0
            return
        before, total = self.saved(), torch.zeros_like(self.flat)
        for part in range(parts):
            self.flat.copy_(before)
            yield part
            total += self.flat
        self.flat.copy_(total / parts)
