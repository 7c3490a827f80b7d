"""The queue of negative keys: a ring buffer that is never cloned and never waits for the host."""

import torch
from torch import nn


class KeyQueue(nn.Module):
    """K keys in a preallocated ring (MoCo, He et al. 2020, section 3.2).

    It starts with random unit vectors, as the published code does.

    Attributes:
        keys: (K, dim) fp32 keys of unit length.
        pointer: 0-d int64 on the device, the row that the next key goes to.
        filled: 0-d int64 on the device, rows that hold real keys.
    """

    def __init__(self, size: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.keys: torch.Tensor
        self.pointer: torch.Tensor
        self.filled: torch.Tensor
        self.register_buffer("keys", random_units(size, dim, seed, dtype))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.keys)

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor, ok: torch.Tensor) -> None:
        """Replace the oldest rows by `keys`, in order, with an exact wrap at any batch size.

        Args:
            keys: (n, dim) new keys.
            ok: 0-d bool on the device; where False nothing changes, without asking the host.
        """
        added = len(keys)
        kept = keys[-len(self) :]  # of more keys than rows, the last stay
        first = self.pointer + (added - len(kept))
        rows = (first + torch.arange(len(kept), device=keys.device)) % len(self)
        self.keys[rows] = torch.where(ok, kept, self.keys[rows])
        moved = ok * added
        self.pointer.copy_((self.pointer + moved) % len(self))
        self.filled.copy_((self.filled + moved).clamp(max=len(self)))


def random_units(size: int, dim: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Return (size, dim) random rows of unit length."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, dim, generator=generator, dtype=dtype)
    return nn.functional.normalize(rows, dim=1)
