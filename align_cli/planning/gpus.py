"""GPUs by name: memory, and peak FLOPs of dense matrix products. No torch.

Source: NVIDIA's data sheets, without sparsity, with accumulation in float32 where the sheet tells them apart:
A100 80 GB SXM, H100 SXM, H200 SXM, L40S, Tesla V100 SXM2 and T4; for RTX 3090 and 4090 the whitepapers of the
Ampere GA102 and Ada GPU architectures (their half precision with float32 accumulation is half of that with
float16).
"""

from __future__ import annotations

from dataclasses import dataclass

from align_cli.errors import UserError, unknown


@dataclass(frozen=True)
class Gpu:
    """name. memory: bytes. fp32, tf32, half: peak TFLOPs; tf32 0 where there is none. bf16: whether half is
    for bfloat16, too.
    """

    name: str
    memory: int
    fp32: float
    tf32: float
    half: float
    bf16: bool = True

    def tflops(self, precision: str, *, tf32: bool = False) -> float:
        """Peak of a precision. UserError for bf16 on a GPU that has none."""
        if precision == "bf16" and not self.bf16:
            raise UserError(f"--gpu {self.name} has no bfloat16; plan with train.precision fp16 or fp32")
        if precision in ("fp16", "bf16"):
            return self.half
        return self.tf32 or self.fp32 if tf32 else self.fp32


_GB = 10**9
_GIB = 2**30
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40GB", 40 * _GIB, 19.5, 156, 312),
        Gpu("A100-80GB", 80 * _GIB, 19.5, 156, 312),
        Gpu("H100-SXM", 80 * _GIB, 67, 494.5, 989.5),
        Gpu("H200", 141 * _GB, 67, 494.5, 989.5),
        Gpu("L40S", 48 * _GIB, 91.6, 183, 362),
        Gpu("RTX-4090", 24 * _GIB, 82.6, 82.6, 165.2),
        Gpu("RTX-3090", 24 * _GIB, 35.6, 35.6, 71),
        Gpu("V100-32GB", 32 * _GIB, 15.7, 0, 125, bf16=False),
        Gpu("T4", 16 * _GIB, 8.1, 0, 65, bf16=False),
    )
}


def gpu_named(name: str) -> Gpu:
    """Whatever the spelling: "4090", "A100-80gb". UserError listing the names."""

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    found = [gpu for known, gpu in GPUS.items() if plain(known) == plain(name)]
    found = found or [gpu for known, gpu in GPUS.items() if (plain(name) or "?") in plain(known)]
    if len(found) == 1:
        return found[0]
    raise unknown("GPU", name, GPUS)
