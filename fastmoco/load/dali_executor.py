"""The DALI graph: decode once, draw every view from numbers that come in as inputs.

One function builds it for both devices. None of DALI's own random operators takes part, so the
graph has no state: what a batch looks like depends on its inputs alone.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali import math as dmath
from nvidia.dali import types as T
from nvidia.dali.pipeline import Pipeline

from fastmoco.errors import UsageError
from fastmoco.load.executor import (
    DecodedBatch,
    EnabledOps,
    EncodedBatch,
    PipelineSpec,
    Settings,
    Source,
)
from fastmoco.load.view_params import ViewParams, color_maps

_KEPT = 2  # batches whose kernels may still be queued when the next one is asked for
_CROP = ((T.FLOAT, 1), (T.FLOAT, 1), (T.INT32, 0))
_COLOUR = ((T.FLOAT, 2), (T.FLOAT, 0))
_BLUR = ((T.BOOL, 0), (T.FLOAT, 0))
_SOLARIZE = ((T.BOOL, 0),)


def inputs(numbers: ViewParams, stages: EnabledOps) -> list[np.ndarray[Any, Any]]:
    """Return a view's numbers in the order in which the graph takes them."""
    start = numbers.crop[:, :2].astype(np.float32)
    end = start + numbers.crop[:, 2:].astype(np.float32)
    feed: list[np.ndarray[Any, Any]] = [start, end, numbers.flip.astype(np.int32)]
    if stages.color:
        feed += color_maps(numbers)
    if stages.blur:
        feed += [numbers.blur, numbers.sigma]
    if stages.solarize:
        feed += [numbers.solarize]
    return feed


def _kinds(stages: EnabledOps) -> tuple[tuple[Any, int], ...]:
    """Return the dtype and rank of each of a view's `inputs`."""
    chosen = (_COLOUR, stages.color), (_BLUR, stages.blur), (_SOLARIZE, stages.solarize)
    return _CROP + tuple(kind for kinds, wanted in chosen if wanted for kind in kinds)


def build(
    feed: Callable[[Any], list[Any]],
    look: PipelineSpec,
    *,
    batch: int,
    threads: int,
    prefetch: int,
    device: str,
    device_id: int | None,
    decoder: str,
    hw_decoder_load: float,
) -> Pipeline:
    """Build the pipeline: one NHWC batch a view, FLOAT on CPU and FLOAT16 on GPU, normalized.

    Args:
        feed: called with DALI's BatchInfo; returns the encoded images, then each view's `inputs`.
        look: what the views need.
        batch: samples a batch, at the most.
        threads: worker threads.
        prefetch: batches made ahead.
        device: "cpu" or "gpu".
        device_id: of the GPU; None builds a graph that can be serialized without one.
        decoder: "cpu", or "mixed" where the device is "gpu".
        hw_decoder_load: share of the images for the JPEG engine of the GPU.
    """
    kinds = [(T.UINT8, 1), *(kind for stages in look.views for kind in _kinds(stages))]

    @pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
    def graph() -> Any:
        encoded, *numbers = fn.external_source(
            source=feed,
            num_outputs=len(kinds),
            dtype=[dtype for dtype, _ in kinds],
            ndim=[ndim for _, ndim in kinds],
            batch=True,
            batch_info=True,
        )
        # Python's own decoders do not rotate by EXIF either; the packer has baked it in.
        images = fn.decoders.image(
            encoded,
            device=decoder,
            output_type=T.RGB,
            adjust_orientation=False,
            hw_decoder_load=hw_decoder_load,
            jpeg_fancy_upsampling=True,  # as on the CPU
        )
        if device == "gpu":
            images = images.gpu()
        taken = iter(numbers)
        return tuple(_view(images, taken, stages, look, device) for stages in look.views)

    return graph(
        batch_size=batch,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
    )


def _view(
    images: Any, taken: Iterator[Any], stages: EnabledOps, look: PipelineSpec, device: str
) -> Any:
    start, end, flip = next(taken), next(taken), next(taken)
    side = float(look.size)
    view = fn.resize(images, size=[side, side], roi_start=start, roi_end=end, antialias=True)
    if stages.color:
        view = _color(view, next(taken), next(taken))
    if stages.blur:
        view = _blur(view, next(taken), next(taken))
    if stages.solarize:
        view = _solarize(view, next(taken))
    return fn.crop_mirror_normalize(
        view,
        mirror=flip,
        mean=[255 * m for m in look.mean],
        std=[255 * s for s in look.std],
        dtype=T.FLOAT16 if device == "gpu" else T.FLOAT,
        output_layout="HWC",
    )


def _color(view: Any, matrix: Any, gray_share: Any) -> Any:
    """Apply an affine map of the colors, see `color_maps`, and clamp to 0..255."""
    gray = fn.color_space_conversion(view, image_type=T.RGB, output_type=T.GRAY)
    mean_gray = fn.reductions.mean(gray, axes=[0, 1, 2])
    # FLOAT: rounding to uint8 between operators is the slow part on CPU.
    turned = fn.coord_transform(view, M=matrix, dtype=T.FLOAT)
    # min and max take half the time of clamp on CPU.
    return dmath.min(dmath.max(turned + mean_gray * gray_share, 0.0), 255.0)


def _blur(view: Any, blurred: Any, sigma: Any) -> Any:
    # A statement, since DALI compiles it; by predicate, since DALI refuses sigma = 0.
    if blurred:  # noqa: SIM108
        soft = fn.gaussian_blur(view, sigma=sigma)
    else:
        soft = view
    return soft


def _solarize(view: Any, solarized: Any) -> Any:
    levels = fn.cast(view, dtype=T.FLOAT)
    if solarized:  # noqa: SIM108
        turned = levels + (levels >= 128.0) * (255.0 - 2.0 * levels)
    else:
        turned = levels
    return turned


def to_torch(output: Any) -> torch.Tensor:
    """Return a pipeline output as an NCHW channels-last tensor on the same memory.

    Safe with DALI's default (dynamic) executor, whose outputs are reference counted.
    """
    return torch.utils.dlpack.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)


def render(
    source: Source, look: PipelineSpec, batch: int, settings: Settings
) -> Iterator[DecodedBatch]:
    """Draw batches ahead of their use; see `work.Executor`.

    Raises:
        UsageError: the driver is too old for this DALI.
    """
    pending: deque[EncodedBatch] = deque()  # handed to the pipeline, not yet given out

    def feed(info: Any) -> list[Any]:
        work = source(info.iteration)
        if work is None:
            raise StopIteration
        pending.append(work)
        views = zip(work.numbers, look.views, strict=True)
        return [work.images, *(x for numbers, stages in views for x in inputs(numbers, stages))]

    on_gpu = settings.device.type == "cuda"
    pipeline = build(
        feed,
        look,
        batch=batch,
        threads=settings.threads,
        prefetch=settings.prefetch,
        device="gpu" if on_gpu else "cpu",
        device_id=(settings.device.index or 0) if on_gpu else None,
        decoder="mixed" if on_gpu and settings.decode != "cpu" else "cpu",
        hw_decoder_load=settings.hw_decoder_load,
    )
    try:
        pipeline.build()
    except RuntimeError as error:
        if "driver version is insufficient" not in str(error):  # CUDA's words
            raise
        raise UsageError(
            "The NVIDIA driver is too old for this DALI: update it (580 or newer for CUDA 13), or "
            "`pip uninstall nvidia-dali-cuda130` and `pip install 'fastmoco[cuda12]'`, or set "
            "runtime.executor=fused."
        ) from error
    kept: deque[tuple[torch.cuda.Event, DecodedBatch]] = deque()
    while (outputs := _next(pipeline, settings.device)) is not None:
        rendered = DecodedBatch(pending.popleft(), tuple(to_torch(output) for output in outputs))
        yield rendered
        if on_gpu:
            # DALI draws into the memory of a batch once nobody holds it, in the order of its own
            # stream: not before the kernels that torch has queued on the batch are done.
            kept.append((torch.cuda.current_stream(settings.device).record_event(), rendered))
            if len(kept) > _KEPT:
                kept[0][0].synchronize()
                kept.popleft()


def _next(pipeline: Pipeline, device: torch.device) -> Any:
    # It is torch's stream that waits for the batch; without one, the host would.
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        return pipeline.run(stream)
    except StopIteration:
        return None
