"""Adapters for ComfyUI: LoRA as one file, whole modules as files of the folders that its loaders look into.

LoRA is called as kohya calls it, which ComfyUI reads on SD1.x, SD2.x and SDXL; on SD3 as OneTrainer does:
`lora_transformer_...`, `lora_te1_...` to `lora_te3_...`. Whole modules keep the keys of diffusers and
transformers: `detect_te_model` and `load_diffusion_model` of ComfyUI know them.

What was written is read again by `comfy_keys`, which walks the model as ComfyUI's key map does and shares
nothing with the names that were written. Source: comfy/lora.py (model_lora_keys_unet, model_lora_keys_clip,
load_lora) and comfy/sd.py of Comfy-Org/ComfyUI.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align_cli.errors import UserError
from align_cli.exporting import Job, Part, Report
from align_cli.exporting.compare import Largest, writing
from align_cli.exporting.kohya import FILE, save_kohya
from align_cli.exporting.lora import NAME, Modules, tried
from align_cli.exporting.pipelines import filled, write_parts
from align_cli.models.parts import LEVEL, is_flat
from align_cli.models.sources import TEXT_ENCODERS
from align_cli.models.states import LORA_A, LORA_B

FOLDERS = {True: "text_encoders", False: "diffusion_models"}
"""Whether it is a text encoder -> folder of ComfyUI's models/ that the file belongs into."""
LOADERS = {
    "text_encoder": "CLIPLoader (SDXL: DualCLIPLoader, SD3: TripleCLIPLoader)",
    "text_encoder_2": "DualCLIPLoader (SD3: TripleCLIPLoader)",
    "text_encoder_3": "TripleCLIPLoader",
    "unet": "Load Diffusion Model",
    "transformer": "Load Diffusion Model",
}
CLIP_LAYERS = ("mlp.fc1", "mlp.fc2", *(f"self_attn.{x}_proj" for x in ("k", "q", "v", "out")))
"""Layers of a CLIP block that ComfyUI takes LoRA for."""
MMDIT_LAYERS = (
    *(f"{attn}.{x}" for attn in ("attn", "attn2") for x in ("to_q", "to_k", "to_v", "to_out.0")),
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "norm1.linear",
    "norm1_context.linear", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip
"""Layers of a block of SD3 that ComfyUI takes LoRA for."""
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def write_comfyui(job: Job) -> Report:
    """LoRA (of all weights, too, if a rank is given) as one file, whole modules as one file each."""

    def as_lora(parts: Sequence[Part]) -> Report:
        return tried(job, parts, _save, _open, how="read as ComfyUI does")

    return write_parts(job, _write_whole, as_lora)


# ---------------------------------------------------------------- whole modules


def _write_whole(job: Job, part: Part) -> Report:
    module = filled(job, part)
    text = part.name in TEXT_ENCODERS
    level = LEVEL if is_flat(module) else ""
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    kept = module.state_dict().keys()
    state = {f"{level}{key}": x.detach().contiguous() for key, x in held.items() if key in kept}
    place = f"{FOLDERS[text]}/{part.name}.safetensors"
    path = job.folder / place
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        save_file(state, path, metadata={"format": "pt"})
    again = {key.removeprefix(level): x for key, x in load_file(path).items()}
    largest = Largest()
    largest.tensors({key: again[key] for key in part.state}, part.state)
    said = f"all weights of the {part.name}, for models/{FOLDERS[text]}; {LOADERS[part.name]} opens it"
    return Report(written={place: said}, check=[largest.line(f"{part.name} read again", job.dtype)])


# ---------------------------------------------------------------- LoRA


def _save(job: Job, parts: Sequence[Part], modules: Modules) -> dict[str, str]:
    said = save_kohya(job, parts, modules)
    return {FILE: f"{said} for models/loras; Load LoRA opens it"}


def _open(job: Job, parts: Sequence[Part], modules: Modules) -> None:
    """The file as ComfyUI reads it, on the modules. UserError for keys that it would not read."""
    found = read_lora(job, modules)
    for part in parts:
        layers = found.get(part.name, {})
        state = {}
        for layer, (a, b, alpha) in layers.items():
            state[layer + LORA_A], state[layer + LORA_B] = a, b * (alpha / len(a))
        options = LoraConfig(r=part.rank, lora_alpha=part.rank, target_modules=list(layers))
        inject_adapter_in_model(options, modules[part.name], adapter_name=NAME)
        set_peft_model_state_dict(modules[part.name], state, adapter_name=NAME)


def read_lora(job: Job, modules: Modules) -> dict[str, dict[str, tuple[Tensor, Tensor, float]]]:
    """Part -> layer of diffusers -> A, B and alpha, of the file in the folder of the job.

    Raises:
        UserError: a key that ComfyUI would leave unread.
    """
    left = load_file(job.folder / FILE)
    found: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {}
    for part, module in modules.items():
        for name, layer in comfy_keys(job.adapter.info.family, part, module):
            ends = [f"{name}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")]
            if ends[1] not in left:
                continue
            a, b, alpha = (left.pop(end) for end in ends)
            found.setdefault(part, {})[layer] = a, b, float(alpha)
    if left:
        raise UserError(
            f"ComfyUI has no name for {len(left)} keys of the LoRA, first {next(iter(left))}; take --to "
            "diffusers or --to peft"
        )
    return found


def comfy_keys(family: str, part: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """(what ComfyUI calls a layer in a file of LoRA, its name in diffusers or transformers)."""
    linear = [name for name, x in module.named_modules() if isinstance(x, nn.Linear | nn.Conv2d)]
    if part == "unet":
        for layer in linear:  # ComfyUI takes the names of diffusers, too
            yield "lora_unet_" + _flat(layer), layer
        for path, layer in _sgm_paths(module):
            yield "lora_unet_" + _flat(path), layer
    elif part == "transformer":
        for layer in linear:
            if layer.startswith("transformer_blocks.") and layer.split(".", 2)[2] in MMDIT_LAYERS:
                yield "lora_transformer_" + _flat(layer), layer
    elif part == TEXT_ENCODERS[2]:
        for layer in linear:
            yield "lora_te3_" + _flat(layer), layer
    else:
        numbers = {
            "text_encoder": ["1", ""] if family in ("sd15", "sd21") else ["1"],
            "text_encoder_2": ["2"],
        }
        level = "" if is_flat(module) else LEVEL
        for layer in linear:
            words = layer.removeprefix(level).split(".", 3)
            if words[:2] == ["encoder", "layers"] and words[3] in CLIP_LAYERS:
                for number in numbers[part]:
                    yield f"lora_te{number}_text_model_encoder_layers_{words[2]}_{_flat(words[3])}", layer


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _sgm_paths(unet: nn.Module) -> Iterator[tuple[str, str]]:
    """(path in the original code, layer of diffusers), counted off block by block."""
    net: Any = unet
    yield from _inside(net, "input_blocks.0.0", "conv_in")
    place = 1
    for level, block in enumerate(net.down_blocks):
        root = f"down_blocks.{level}"
        for i in range(len(block.resnets)):
            yield from _pair(net, root, i, f"input_blocks.{place}", hasattr(block, "attentions"))
            place += 1
        if block.downsamplers is not None:
            yield f"input_blocks.{place}.0.op", f"{root}.downsamplers.0.conv"
            place += 1
    for number, layer in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield from _inside(net, f"middle_block.{number}", f"mid_block.{layer}")
    place = 0
    for level, block in enumerate(net.up_blocks):
        root, attends = f"up_blocks.{level}", hasattr(block, "attentions")
        for i in range(len(block.resnets)):
            yield from _pair(net, root, i, f"output_blocks.{place}", attends)
            if i + 1 == len(block.resnets) and block.upsamplers is not None:
                yield f"output_blocks.{place}.{1 + attends}.conv", f"{root}.upsamplers.0.conv"
            place += 1
    yield "out.2", "conv_out"
    for mine, theirs in (("time_embedding", "time_embed"), ("add_embedding", "label_emb.0")):
        for number in (1, 2):
            yield f"{theirs}.{2 * number - 2}", f"{mine}.linear_{number}"


def _pair(net: Any, root: str, i: int, path: str, attends: bool) -> Iterator[tuple[str, str]]:
    yield from _inside(net, f"{path}.0", f"{root}.resnets.{i}")
    if attends:
        yield from _inside(net, f"{path}.1", f"{root}.attentions.{i}")


def _inside(net: Any, path: str, root: str) -> Iterator[tuple[str, str]]:
    """Layers of one module, itself if it is one."""
    for name, _ in net.get_submodule(root).named_modules():
        inner = RESNET.get(name, name) if ".resnets." in root else name
        yield f"{path}.{inner}".rstrip("."), f"{root}.{name}".rstrip(".")
