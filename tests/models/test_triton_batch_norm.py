"""BatchNorm in groups by Triton, run by its interpreter, against torch's of each group in fp64."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="no Triton here")

# Images, channels, height, width, group; mean and deviation of the values.
SHAPES = [
    (8, 64, 5, 7, 4, 0.0, 1.0),
    (6, 40, 3, 3, 2, 50.0, 0.1),  # channels no power of two, far from 0
    (4, 130, 9, 9, 4, -1.0, 2.0),  # one group, three blocks of channels
    (32, 8, 16, 16, 8, 0.5, 1.0),  # several splits of a group
]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def reference(x, grad, weight, bias, size, momentum, eps):
    """Return output, gradients and running statistics, from torch's BatchNorm in fp64."""
    x, weight, bias = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    outs, means, variances = [], [], []
    for part in x.split(size):
        mean, var = torch.zeros(x.shape[1]).double(), torch.ones(x.shape[1]).double()
        outs.append(F.batch_norm(part, mean, var, weight, bias, True, momentum, eps))
        means.append(mean)
        variances.append(var)
    out = torch.cat(outs)
    out.backward(grad.double())
    running = torch.stack(means).mean(0), torch.stack(variances).mean(0)
    return out.detach(), x.grad, weight.grad, bias.grad, *running


def compare(device: str) -> None:
    from fastmoco.models.triton_batch_norm import TritonBatchNorm

    for number, (n, c, h, w, size, mean, std) in enumerate(SHAPES):
        for dtype, tolerance in TOLERANCE.items():
            torch.manual_seed(number)
            x = (mean + std * torch.randn(n, c, h, w)).to(device, dtype)
            x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
            grad = torch.randn(n, c, h, w).to(device, dtype)
            affine = torch.rand(2, c).add(0.5).to(device)
            weight, bias = (row.clone().requires_grad_() for row in affine)
            running = torch.zeros(c, device=device), torch.ones(c, device=device)
            out = TritonBatchNorm.apply(x, weight, bias, *running, size, 0.1, 1e-5)
            assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == dtype
            out.backward(grad)
            found = (out.detach(), x.grad, weight.grad, bias.grad, *running)
            wanted = reference(*(t.cpu() for t in (x, grad, weight, bias)), size, 0.1, 1e-5)
            for what, a, b in zip(
                ["y", "dx", "dw", "db", "mean", "var"], found, wanted, strict=True
            ):
                error = float((a.cpu().double() - b).abs().max() / b.abs().max())
                bound = tolerance if what in ("y", "dx") else 1e-4
                assert error <= bound, (number, dtype, what, error)


def test_it_is_torchs_batch_norm_of_each_group() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.gpu
def test_it_is_torchs_on_a_gpu() -> None:
    compare("cuda")


if __name__ == "__main__":
    compare("cpu")
