"""The frozen weights of a model spread over the processes of a run: each holds its part, and a block's
weights are whole only while it works (torch's FSDP2). What is trained is no part of these modules and stays
whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from align_cli.models.base import BaseModel


def shard_frozen(model: BaseModel) -> None:
    """Spread denoiser and text encoders; every process has to call them equally often from now on.

    The process group is there already. Text encoders on another device than the denoiser stay whole, as do
    those that rest on the CPU between calls.
    """
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    apart = model.offloaded or model.encoder_device != model.device
    modules = [model.denoiser, *([] if apart else model.encoders)]
    for module in modules:
        for p in module.parameters():
            p.data = p.data.contiguous()  # FSDP takes no other memory format; models here are channels-last
        for block in blocks(module):
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)


def blocks(module: nn.Module) -> Sequence[nn.Module]:
    """What repeats: the entries of the module lists that hold weights, outermost first come last. A single
    layer in such a list, bare or wrapped (`to_out` of an attention, the GEGLU of a feed-forward), stays with
    the block that it is a part of.
    """
    found = [
        child
        for part in module.modules()
        if isinstance(part, nn.ModuleList)
        for child in part
        if sum(any(True for _ in layer.parameters(recurse=False)) for layer in child.modules()) > 1
    ]
    return found[::-1]
