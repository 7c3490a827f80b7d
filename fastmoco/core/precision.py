"""What the numbers of a step are made of: the dtype of the network, and the loss scale of fp16."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def native_precision(device_type: str) -> str:
    """Return "bf16" where the device computes in it, else "fp16" on a GPU, "fp32" on a CPU.

    A CPU without instructions for bf16 emulates it: a training step took 10 times that of fp32.
    """
    if device_type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp16"
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, test, bool)() for test in tests) else "fp32"


@dataclass(frozen=True)
class Precision:
    """The dtypes of a run.

    Attributes:
        name: "bf16", "fp16", "fp32" or "fp64".
        device_type: "cpu" or "cuda".
    """

    name: str
    device_type: str

    @classmethod
    def of(cls, name: str, device_type: str) -> "Precision":
        """Return that of a recipe, where "auto" is `native_precision`."""
        return cls(native_precision(device_type) if name == "auto" else name, device_type)

    @property
    def weights(self) -> torch.dtype:
        """Of weights, queue, logits and loss: bf16 logits are off by 0.02 and more after / T."""
        return torch.float64 if self.name == "fp64" else torch.float32

    @property
    def comm_dtype(self) -> torch.dtype:
        """What a key view is cast to before ranks exchange it: what the network computes in."""
        return _COMPUTE.get(self.name, self.weights)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that the network computes in."""
        compute = _COMPUTE.get(self.name)
        return torch.autocast(self.device_type, compute, enabled=compute is not None)


class LossScale(nn.Module):
    """The factor that keeps fp16 gradients from vanishing (Micikevicius et al. 2018).

    Halved by a step with a non-finite gradient, doubled after `_PATIENCE` good ones, never below
    `FLOOR`. torch's GradScaler has no floor, and would have to be read back to be given one. In
    any other precision it is 1 for ever.

    Attributes:
        scale: 0-d fp32 on the device.
        good: 0-d int64, good steps in a row since it last changed.
    """

    FLOOR = 1.0
    _START, _PATIENCE = 2.0**16, 2000

    def __init__(self, precision: Precision) -> None:
        super().__init__()
        self.active = precision.name == "fp16"
        self.scale: torch.Tensor
        self.good: torch.Tensor
        self.register_buffer("scale", torch.tensor(self._START if self.active else 1.0))
        self.register_buffer("good", torch.zeros((), dtype=torch.int64))

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Return a loss whose gradients do not vanish in fp16."""
        return loss * self.scale if self.active else loss

    @torch.no_grad()
    def unscale_(self, gradients: list[torch.Tensor]) -> None:
        """Bring the gradients of a scaled loss back to their size."""
        if self.active:
            torch._foreach_mul_(gradients, 1 / self.scale)

    @torch.no_grad()
    def update(self, ok: torch.Tensor) -> None:
        """Adapt to whether the gradients of this step were finite, a 0-d bool."""
        if not self.active:
            return
        self.good.copy_((self.good + 1) * ok)
        grown = torch.where(self.good == self._PATIENCE, self.scale * 2, self.scale)
        self.scale.copy_(torch.where(ok, grown, (self.scale / 2).clamp(min=self.FLOOR)))
        self.good.copy_(self.good % self._PATIENCE)
