"""DPT: the discriminator on given activations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import RobertaConfig, RobertaModel

from align_cli.grounding.boxes import to_corners
from align_cli.methods.dpt.config import DPTConfig
from align_cli.methods.dpt.discriminator import Discriminator
from golden_checks.lines import Kind, Line, close


def config_of(settings: dict[str, Any], **more: Any) -> DPTConfig:
    """The settings of a case in our words."""
    names = {
        "hidden_dim": "hidden_dim", "nheads": "num_heads", "dim_feedforward": "feedforward_dim",
        "enc_layers": "num_encoder_layers", "dec_layers": "num_decoder_layers", "pre_norm": "pre_norm",
        "position_embedding": "position", "num_queries_matching": "num_matching_queries",
        "num_queries_rec": "num_grounding_queries", "contrastive_hdim": "phrase_dim",
    }  # fmt: skip
    return DPTConfig(
        **{ours: settings[theirs] for theirs, ours in names.items() if theirs in settings}, **more
    )


def weights_of(x: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the discriminator, and of RoBERTa, by their official names."""
    own = {k.removeprefix("w."): v for k, v in x.items() if k.startswith("w.")}
    text = {k.removeprefix("text_encoder."): own.pop(k) for k in list(own) if k.startswith("text_encoder.")}
    return own, text


def discriminator_of(settings: dict[str, Any], own: dict[str, Tensor]) -> Discriminator:
    """With the weights of a case; all of them are used."""
    width = own["contrastive_align_projection_text.weight"].shape[1]
    made = Discriminator(
        config_of(settings),
        channels=[settings["feature_channels"]],
        text_dim=settings["clip_dim"],
        phrase_width=width,
    )
    made.load_state_dict(own)
    return made.requires_grad_(True)


def roberta_of(settings: dict[str, Any], weights: dict[str, Tensor]) -> RobertaModel:
    """The frozen RoBERTa of a case."""
    facts = {k: v for k, v in settings.items() if k != "position_offset"}
    found = RobertaModel(RobertaConfig(**facts), add_pooling_layer=False)
    used = {k: v for k, v in weights.items() if not k.startswith("pooler.") and "position_ids" not in k}
    found.load_state_dict(used, strict=False)
    missing = set(dict(found.named_parameters())) - set(used)
    if missing:
        raise ValueError(f"RoBERTa lacks {sorted(missing)[0]}")
    return found.eval()


@torch.no_grad()
def discriminator(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    x = load_file(folder / "tensors.safetensors")
    settings, tol = case["config"], case["tolerance"]
    own, text = weights_of(x)
    found = discriminator_of(settings, own)

    def line(name: str, value: Tensor) -> Line:
        return close(name, value, x[name], atol=tol["atol"], rtol=tol["rtol"])

    features, t = x["features"], x["timesteps"]
    height, width = features.shape[-2:]
    position = found.position_embedding(height, width)
    yield line("position_embedding", position.mT.unflatten(1, (height, width))[None])
    yield line("timestep_embedding", found.timestep_embedding(t))
    memory, _ = found.encode(features, t)
    yield line("encoder_memory", memory.mT.unflatten(2, (height, width)))
    states = found(features, t)
    yield line("decoder_states", states)
    yield line("q_emb_matching", found.matching(states))
    yield line("logit_scale", found.logit_scale.exp()[None])
    said = found.grounding(states)
    yield line("pred_logits", said.logits)
    yield line("pred_boxes", said.boxes)
    yield line("proj_queries", said.queries)
    roberta = roberta_of(settings["roberta"], text)
    read = roberta(x["input_ids"], attention_mask=x["attention_mask"]).last_hidden_state
    yield line("text_last_hidden", read)
    yield line("proj_tokens", found.phrase_tokens(read))
    yield line("postprocess_scores", said.scores)
    pixels = torch.tensor([640.0, 480.0, 640.0, 480.0])
    yield line("postprocess_boxes", to_corners(said.boxes) * pixels)


KINDS = [Kind("dpt", lambda _, case: case.get("case", "").startswith("adapter forward"), discriminator)]
