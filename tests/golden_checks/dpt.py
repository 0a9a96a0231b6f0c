"""DPT: boxes, matching, targets, and the losses of grounding and of matching."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import RobertaTokenizerFast

from align_cli import losses
from align_cli.diffusion.process import NoiseProcess
from align_cli.grounding import boxes, matching
from align_cli.grounding.targets import Targets, make_targets
from golden_checks.lines import Kind, Line, close, same

SCHEDULE = re.compile(r"(\w+) ([\d.]+)\.\.([\d.]+), (\d+) steps")


def box_maths(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    """Both conversions and both overlaps; boxes without area against themselves are NaN."""
    x, near = load_file(folder / "tensors.safetensors"), partial(close, **case["tolerance"])
    a, b = boxes.to_corners(x["a_cxcywh"]), boxes.to_corners(x["b_cxcywh"])
    yield near("a_xyxy", a, x["a_xyxy"])
    yield near("b_xyxy", b, x["b_xyxy"])
    yield near("a_back", boxes.to_centres(x["a_xyxy"]), x["a_back"])
    overlap, union = boxes.iou(a, b)
    yield near("iou", overlap, x["iou"])
    yield near("union", union, x["union"])
    yield near("giou", boxes.giou(a, b), x["giou"])
    flat = boxes.to_corners(x["degenerate_cxcywh"])
    overlap, union = boxes.iou(flat, flat)
    yield near("degenerate_iou", overlap, x["degenerate_iou"])
    yield near("degenerate_union", union, x["degenerate_union"])
    yield near("degenerate_giou", boxes.giou(flat, flat), x["degenerate_giou"])


def matcher(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    """The costs of each picture, and the pairs chosen."""
    tensors, near = load_file(folder / "tensors.safetensors"), partial(close, **case["tolerance"])
    for name, facts in case["config"].items():
        x = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
        targets = _targets(x)
        logits, found = x["pred_logits"], x["pred_boxes"]
        weights = _weights(facts["cost_class"], facts["cost_bbox"], facts["cost_giou"])
        for i, block in enumerate(matching.costs(logits, found, targets, **weights)):
            yield near(f"{name}.cost.{i}", block, x[f"cost.{i}"])
        for i, pairs in enumerate(matching.match(logits, found, targets, **weights)):
            yield same(f"{name}.pred_idx.{i}", pairs.queries.tolist(), x[f"pred_idx.{i}"].tolist())
            yield same(f"{name}.tgt_idx.{i}", pairs.targets.tolist(), x[f"tgt_idx.{i}"].tolist())


def criterion(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    """From expressions and spans to the losses of grounding and their gradients."""
    x, near = load_file(folder / "tensors.safetensors"), partial(close, **case["tolerance"])
    config = case["config"]
    words = RobertaTokenizerFast.from_pretrained(folder.parent / "tokenizer")
    encoding = words(case["captions"], padding="longest", return_tensors="pt")
    for name in ("input_ids", "attention_mask"):
        yield same(name, encoding[name].tolist(), x[name].tolist())
    sizes = x["target_sizes"].tolist()
    targets = make_targets(
        encoding, x["target_boxes"].split(sizes), case["tokens_positive"], config["num_classes"] + 1
    )
    yield near("positive_map", targets.classes, x["positive_map"])
    normalised = targets.classes / (targets.classes.sum(-1, keepdim=True) + 1e-6)
    yield near("positive_map_per_item", normalised, x["positive_map_per_item"])

    logits, found, queries, tokens = leaves = [
        x[name].requires_grad_() for name in ("pred_logits", "pred_boxes", "proj_queries", "proj_tokens")
    ]
    cost = config["matcher_costs"]
    matches = matching.match(logits, found, targets, **_weights(cost["cls"], cost["bbox"], cost["giou"]))
    for i, pairs in enumerate(matches):
        yield same(f"match.pred.{i}", pairs.queries.tolist(), x[f"match.pred.{i}"].tolist())
        yield same(f"match.tgt.{i}", pairs.targets.tolist(), x[f"match.tgt.{i}"].tolist())
    positive = matching.matched_tokens(matches, targets, queries.shape[1])
    yield same("align_map", positive.int().tolist(), x["align_map"].int().tolist())

    given = (matches, targets, max(sum(sizes), 1))
    values = {
        "loss_ce": losses.soft_token_loss(logits, *given, config["eos_coef"]),
        **dict(zip(("loss_bbox", "loss_giou"), losses.box_losses(found, *given), strict=True)),
        "loss_contrastive_align": losses.align_loss(queries, tokens, *given, config["temperature"]),
    }
    total = sum((weight * values[name] for name, weight in config["weights"].items()), torch.zeros(()))
    for name, value in {**values, "total": total}.items():
        yield near(name, value, x[name])
    yield near("cardinality_error", losses.cardinality_error(logits, targets), x["cardinality_error"])
    total.backward()
    for name, leaf in zip(("pred_logits", "pred_boxes", "proj_queries", "proj_tokens"), leaves, strict=True):
        assert leaf.grad is not None
        yield near(f"grad_{name}", leaf.grad, x[f"grad_{name}"])


def itm_loss(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    """Both directions of matching, and the denoising errors."""
    x = load_file(folder / "tensors.safetensors")
    near = partial(close, **case["tolerance"]["float32"])
    names = ("img_cond_different_txt", "different_img_cond_same_txt", "all_txt", "logit_scale_param")
    own, others, texts, log_scale = leaves = [x[name].requires_grad_() for name in names]
    total = torch.zeros(())
    for name, embeddings, against in (("t2i", others, texts[:, :1]), ("i2t", own, texts)):
        each = torch.stack([losses.matching_logits(one, against) for one in embeddings.split(1, 2)], -1)
        yield near(f"sim_{name}_all_queries", each, x[f"sim_{name}_all_queries"])
        yield same(f"max_query_{name}", each.argmax(-1).tolist(), x[f"max_query_{name}"].tolist())
        logits = losses.matching_logits(embeddings, against)
        yield near(f"sim_{name}", logits, x[f"sim_{name}"])
        loss = losses.matching_loss(logits, log_scale[0])
        yield near(f"loss_{name}", loss, x[f"loss_{name}"])
        half = losses.matching_logits(embeddings.half(), against.half())
        rounded = losses.matching_loss(half, log_scale[0].half())
        tolerance = case["tolerance"]["half"]["atol"]
        yield close(f"loss_{name}_half", rounded, x[f"loss_{name}_half"], atol=tolerance, rtol=0.0)
        total = total + loss
    total.backward()
    for name, leaf in zip(names, leaves, strict=True):
        assert leaf.grad is not None
        yield near(f"grad_{name}", leaf.grad, x[f"grad_{name}"])

    curve, first, last, steps = SCHEDULE.fullmatch(case["config"]["mse_schedule"]).groups()
    schedule = {"beta_start": float(first), "beta_end": float(last), "beta_schedule": curve}
    process = NoiseProcess.from_scheduler_config({**schedule, "num_train_timesteps": int(steps)})
    abar = process.alphas_cumprod[x["mse_timesteps"]]
    snr = abar / (1 - abar)
    yield near("snr", snr, x["snr"])
    for name in sorted(x):
        if name == "mse_plain" or name.startswith("mse_minsnr"):
            gamma = float(name.removeprefix("mse_minsnr")) if name != "mse_plain" else 0.0
            yield near(name, losses.snr_weighted_error(x["mse_pred"], x["mse_target"], snr, gamma), x[name])


def _targets(x: dict[str, Tensor]) -> Targets:
    """Targets of a case that has no expressions."""
    classes, counts = x["positive_map"], x["target_sizes"].tolist()
    return Targets(x["target_boxes"], counts, classes, torch.zeros(len(classes), 0, dtype=torch.bool))


def _weights(classes: float, box: float, giou: float) -> dict[str, float]:
    return {"class_weight": classes, "box_weight": box, "giou_weight": giou}


def tensor_named(ending: str) -> Callable[[Path, dict[str, Any]], bool]:
    """Cases that have a tensor whose name ends so."""
    return lambda _, case: any(name.endswith(ending) for name in case.get("tensors", ()))


KINDS = [
    Kind("dpt", tensor_named("a_cxcywh"), box_maths),
    Kind("dpt", tensor_named(".tgt_idx.0"), matcher),
    Kind("dpt", tensor_named("positive_map_per_item"), criterion),
    Kind("dpt", tensor_named("sim_t2i_all_queries"), itm_loss),
]
