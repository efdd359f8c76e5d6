"""The memory format of a model: channels last, except where the CPU's convolutions are wrong in it."""

import os
import platform

import torch
from torch import nn


def choose(net: nn.Module, accelerator: str) -> tuple[torch.memory_format, str]:
    """Choose the memory format of a net and its images.

    oneDNN computes the weight gradient of some convolutions in channels last wrongly, or hangs, on x86 processors
    without AVX-512 (oneDNN issue 6035): kernel 1x1, a stride, and fewer than 8 input channels.

    Args:
        net: The model.
        accelerator: Lightning's name of the device that trains it.

    Returns:
        The format, and a line that says why it is contiguous, or "".
    """
    on_gpu = accelerator not in ("cpu", "auto") or (accelerator == "auto" and torch.cuda.is_available())
    layers = [name for name, layer in net.named_modules() if _is_affected(layer)]
    if on_gpu or not layers or _has_avx512():
        return torch.channels_last, ""
    return torch.contiguous_format, (
        f"contiguous instead of channels last: without AVX-512, as here, oneDNN's gradient of {layers[0]} "
        "(1x1, strided, fewer than 8 input channels) is wrong in channels last"
    )


def _is_affected(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv2d):
        return False
    return set(layer.kernel_size) == {1} and max(layer.stride) > 1 and layer.in_channels // layer.groups < 8


def _has_avx512() -> bool:
    """Whether oneDNN uses AVX-512 here; True on processors that are not x86, of which nothing wrong is known."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return True
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    is_allowed = limit.upper().startswith(("AVX512", "AVX10", "DEFAULT", "ALL"))
    return is_allowed and torch.backends.cpu.get_cpu_capability() == "AVX512"
