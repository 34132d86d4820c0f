"""Which precision a machine is fast in."""

import torch


__all__ = ["has_fast_bf16"]


def has_fast_bf16() -> bool:
    """Whether bf16 autocast is a speed-up: on a CPU without bf16 instructions it is a slow-down."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
