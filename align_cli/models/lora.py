"""A low-rank addition (LoRA) to layers of a frozen module: trained through hooks, or merged into its weights.

Letters: r rank, i inputs, o outputs of a layer; h w kernel of a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align_cli.errors import UserError
from align_cli.models.dropout import RowDropout
from align_cli.models.moving import moved_weights
from align_cli.models.states import LORA_A, LORA_B, check_state

ATTENTION = (
    "to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj", "q", "k", "v", "o",
)  # fmt: skip
"""Linear layers of attention in the denoisers of diffusers (of SD3 those of the picture's stream), in CLIP
and in T5."""

UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Those of UNets."""
JOINT_ATTENTION = (*UNET_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Those of SD3's transformer, of the picture's and of the text's stream."""

Layer = nn.Linear | nn.Conv2d


class LoraTuning:
    """A low-rank addition to linear layers and convolutions: y = W x + scale (alpha / rank) B A x.

    A is (r, i), of a convolution (r, i, h, w) with the layer's own stride, padding and dilation; B is (o, r),
    of a convolution (o, r, 1, 1), and starts at zero, so that training starts at the module itself. Keys of
    the state: "<layer>.lora_A.weight", "<layer>.lora_B.weight", as in peft.
    Source: Hu et al., arXiv 2106.09685; of convolutions github.com/cloneofsimo/lora.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        rank: int,
        alpha: float,
        targets: Sequence[str] | Callable[[nn.Module], Sequence[str]] = ATTENTION,
        init: str = "kaiming",
        rng: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> None:
        """targets: ends of the names of the layers, or a function that gives the names themselves, in order.
        init: of A, "kaiming" (uniform, as in peft) or "gauss" (N(0, 1 / rank^2), as in LongAlign). rng: a CPU
        generator for A, so that every machine starts the same. device: where the module works, which is not
        where it is if it is offloaded; None for the same.

        Raises:
            ValueError: no layer has such a name, or one that has is of a kind that takes no LoRA; unknown
            init.
        """
        if init not in ("kaiming", "gauss"):
            raise ValueError(f"init must be kaiming or gauss, got {init!r}")
        self.base = module
        self.layers = _named(module, targets) if callable(targets) else lora_layers(module, targets)
        if not self.layers:
            names = "by the function" if callable(targets) else ", ".join(targets)
            raise ValueError(f"no linear layer and no convolution is called {names}")
        self.factor = alpha / rank
        self.weights: dict[str, nn.Parameter] = {}
        self._dropout: RowDropout | None = None
        for name, layer in self.layers.items():
            if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
                raise ValueError(f"no LoRA for {name}: a convolution with groups, or not padded with zeros")
            o, i, *kernel = layer.weight.shape
            down = torch.empty(rank, i, *kernel)
            if init == "gauss":
                nn.init.normal_(down, std=1 / rank, generator=rng)
            else:
                nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=rng)
            place = device or layer.weight.device
            self.weights[name + LORA_A] = nn.Parameter(down.to(place))
            self.weights[name + LORA_B] = nn.Parameter(torch.zeros(o, rank, *[1] * len(kernel), device=place))

    def parameters(self) -> list[nn.Parameter]:
        return list(self.weights.values())

    def state(self) -> dict[str, Tensor]:
        return {k: p.detach().cpu().contiguous().clone() for k, p in self.weights.items()}

    def state_for(self, factor: float) -> dict[str, Tensor]:
        """The state of the same addition where alpha / rank is `factor`."""
        ratio = self.factor / factor
        return {k: x * ratio if k.endswith(LORA_B) else x for k, x in self.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        check_state({k: p.shape for k, p in self.weights.items()}, state)
        with torch.no_grad():
            for name, value in state.items():
                self.weights[name].copy_(value)

    @contextmanager
    def attached(self, scale: float = 1.0) -> Iterator[None]:
        """Inside, the layers give the sum; several of them add up. With gradient to A and B."""
        hooks = []
        try:
            for name, layer in self.layers.items() if scale else ():
                hooks.append(layer.register_forward_hook(self._adding(name, scale * self.factor)))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def dropping(
        self, rng: torch.Generator, p: float, *, rows: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[None]:
        """Inside, what `attached` adds goes through dropout; see `RowDropout` for p, rows, rank, world_size.

        rng: a CPU generator, from which torch's global one is seeded inside; outside that is as it was. The
        backward pass of what is checkpointed belongs inside too.
        """
        if p == 0:
            yield
            return
        dropout = RowDropout(p, rows, rank, world_size)
        seed = int(torch.randint(2**62, (), generator=rng))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            before, self._dropout = self._dropout, dropout
            try:
                yield
            finally:
                self._dropout = before

    @contextmanager
    def merged(self, scale: float = 1.0) -> Iterator[None]:
        """Inside, the layers' weights are W + scale (alpha / rank) B A, summed in float32 (float64 for
        float64) and rounded to their dtype: what `attached` does, without gradient and without its cost.
        Several add up, in any order, among each other and with the other ways.
        """
        with moved_weights(self.base, self.moved(scale)) if scale else nullcontext():
            yield

    @torch.no_grad()
    def moved(self, scale: float = 1.0) -> dict[str, Tensor]:
        """Parameter of the module -> what `merged` puts in its place."""
        found = {}
        for name, layer in self.layers.items():
            now = layer.weight.data
            a, b = (self.weights[name + end].to(now.device) for end in (LORA_A, LORA_B))
            wide = now.to(torch.promote_types(now.dtype, torch.float32))
            found[f"{name}.weight"] = (wide + scale * self.factor * change(a, b)).to(now.dtype)
        return found

    def _adding(self, name: str, factor: float) -> Any:
        a, b = self.weights[name + LORA_A], self.weights[name + LORA_B]

        def hook(layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            if not torch.is_autocast_enabled(x.device.type):
                x = x.to(a.dtype)
            more = _low_rank(layer, x, a, b) * factor
            if self._dropout is not None:
                more = self._dropout(more)
            return output + more.to(output.dtype)

        return hook


def change(a: Tensor, b: Tensor) -> Tensor:
    """B A as a change of the layer's weight: (o, i), of a convolution (o, i, h, w); float32."""
    return (b.float().flatten(1) @ a.float().flatten(1)).view(len(b), *a.shape[1:])


def lora_layers(module: nn.Module, targets: Sequence[str]) -> dict[str, Layer]:
    """Name -> layer of those linear layers and convolutions whose name is one of `targets`, or ends with a
    dot and one of them.
    """
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, Layer) and any(name == t or name.endswith(f".{t}") for t in targets)
    }


def most_rank(module: nn.Module, targets: Sequence[str] = ATTENTION) -> int:
    """The largest rank that a change of these layers can have; 0 without such a layer."""
    layers = lora_layers(module, targets).values()
    return max((min(layer.weight.flatten(1).shape) for layer in layers), default=0)


def attention_layers(denoiser: nn.Module) -> list[str]:
    """Names of all linear layers of attention: UNET_ATTENTION of a UNet, JOINT_ATTENTION of a transformer,
    without the text's queries in a block that gives no text: nothing reads what they find.
    """
    blocks: Any = getattr(denoiser, "transformer_blocks", None)
    if blocks is None:
        return list(lora_layers(denoiser, UNET_ATTENTION))
    idle = {
        f"transformer_blocks.{k}.attn.add_q_proj" for k, block in enumerate(blocks) if block.context_pre_only
    }
    return [name for name in lora_layers(denoiser, JOINT_ATTENTION) if name not in idle]


def attention_lora(denoiser: nn.Module, rank: int, *, seed: int, setting: str, model: str) -> LoraTuning:
    """LoRA on all attention of the denoiser of `model`; alpha = rank, A from N(0, 1 / rank^2), as CoMat and
    DPT.

    Raises:
        UserError: about `setting`, for a rank that no change of these layers can have.
    """
    if rank > (most := most_rank(denoiser, attention_layers(denoiser))):
        part = "transformer" if hasattr(denoiser, "transformer_blocks") else "unet"
        raise UserError(
            f"{setting} must be at most {most}, the smaller side of the largest layer of the {part} of "
            f"{model}, got {rank}"
        )
    rng = torch.Generator().manual_seed(seed)
    return LoraTuning(denoiser, rank=rank, alpha=rank, targets=attention_layers, init="gauss", rng=rng)


def _named(module: nn.Module, targets: Callable[[nn.Module], Sequence[str]]) -> dict[str, Layer]:
    there, found = dict(module.named_modules()), {}
    for name in targets(module):
        layer = there.get(name)
        if not isinstance(layer, Layer):
            raise ValueError(f"no linear layer and no convolution is called {name}")
        found[name] = layer
    return found


def _low_rank(layer: Layer, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(F.linear(x, a), b)
    return F.conv2d(F.conv2d(x, a, None, layer.stride, layer.padding, layer.dilation), b)
