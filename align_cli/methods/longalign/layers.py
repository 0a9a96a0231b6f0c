"""The layers of a UNet that LongAlign's LoRA adds to, in the order of the official files."""

from __future__ import annotations

from torch import nn

from align_cli.models.lora import Layer

OWNERS = frozenset({"ResnetBlock2D", "CrossAttention", "Attention", "GEGLU"})
"""Names of the classes of modules inside which every linear layer and convolution is adapted."""


def longalign_layers(unet: nn.Module) -> list[str]:
    """Names of the layers, in the order in which the modules were put into the UNet: in the one of diffusers,
    of each block attentions before residual blocks, and the middle block last. For `LoraTuning(targets=)`.

    Source: modules/lora.py of github.com/luping-liu/LongAlign, which walks the modules alike; its files hold
    no names, this order alone says what is what.
    """
    found = {
        f"{name}.{inner}": None
        for name, owner in unet.named_modules()
        if type(owner).__name__ in OWNERS
        for inner, layer in owner.named_modules()
        if isinstance(layer, Layer)
    }
    return list(found)
