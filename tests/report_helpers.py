"""A results.json with pictures to make reports of: pictures of the shapes world, judged by its oracle, with
real statistics. The learned scorers' numbers are drawn from a generator: a report shows what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from align_cli.evaluation.stats import paired, rate
from align_cli.pictures import save_png
from align_cli.shapes.captions import Prompt, recaption
from align_cli.shapes.oracle import judge
from align_cli.shapes.world import render, sample_scenes

CHALLENGES = ("Basic", "Quantity", "Fine-grained detail", "Writing & Symbols")
METRICS = {
    "shapes": ["shapes/all", "shapes/object", "shapes/count"],
    "pickscore": ["pickscore"],
    "clip": ["clip"],
}
TRAINED_ON = {"aligned": ("clip",)}


def drawn(
    folder: Path, n: int = 30, arms: Sequence[str] = ("base", "aligned"), *, side: int = 32, seed: int = 0
) -> dict[str, Any]:
    """Results of n prompts, "drawn" by the world itself: an arm shows another scene than the one asked for
    less often, the later it stands. side: of the pictures, px.
    """
    rng = np.random.default_rng(seed)
    scenes = sample_scenes(n, rng, kinds=("single", "pair", "triple"), split="test")
    prompts = [recaption(scene, rng) for scene in scenes]
    right, wrong = render(scenes), render(scenes[1:] + scenes[:1])
    luck = rng.random(n)
    pictures = {
        arm: np.where((luck < 0.4 + 0.12 * a)[:, None, None, None], right, wrong)
        for a, arm in enumerate(arms)
    }
    return results_of(folder, prompts, pictures, side=side, seed=seed)


def results_of(
    folder: Path,
    prompts: Sequence[Prompt],
    pictures: Mapping[str, np.ndarray],
    *,
    side: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the pictures ((N, 32, 32, 3) uint8 per arm) below `folder` and return results.json, format 1."""
    rng = np.random.default_rng(seed + 1)
    arms, n = list(pictures), len(prompts)
    groups = [{"Category": p.kind, "Challenge": CHALLENGES[i % 4]} for i, p in enumerate(prompts)]
    every = _groups(groups)
    luck = rng.normal(0, 0.01, n)
    scores: dict[str, dict[str, np.ndarray]] = {m: {} for ms in METRICS.values() for m in ms}
    for arm in arms:
        exact = judge(pictures[arm], [p.spec for p in prompts])
        for name in ("all", "object", "count"):
            scores[f"shapes/{name}"][arm] = exact[name]
        scores["pickscore"][arm] = 20 + 1.5 * exact["facts"] + 40 * luck + rng.normal(0, 0.4, n)
        scores["clip"][arm] = 0.24 + 0.03 * exact["facts"] + luck + rng.normal(0, 0.004, n)
        for i, picture in enumerate(pictures[arm]):
            large = np.asarray(Image.fromarray(picture).resize((side, side))) if side != 32 else picture
            save_png(large, folder / f"images/{arm}/{i:05d}.png", {"prompt": prompts[i].text})
    return {
        "format": 1,
        "command": ["t2ialign", "eval", "my prompts.txt", "--adapter", "runs/a/adapter", "--vs", "base"],
        "created": "2026-11-22T10:11:12+00:00",
        "versions": {"t2ialign": "0.4.0", "torch": "2.13.0", "diffusers": "0.42.1"},
        "benchmark": {
            "name": "shapes",
            "source": "the shapes world, test split",
            "prompts": n,
            "fingerprint": "5f2c" * 16,
            "group_names": ["Category", "Challenge"],
        },
        "model": {"id": "tiny-sd15", "family": "sd15", "dtype": "float32", "device": "cpu"},
        "seed": seed,
        "per_prompt": 1,
        "unit": "prompts",
        "sample": {"sampler": "ddim", "steps": 20, "guidance": 4.0, "eta": 0.0},
        "seconds": {"draw": dict.fromkeys(arms, 12.5), "score": 1.25},
        "arms": [_arm(arm) for arm in arms],
        "baseline": arms[0],
        "scorers": [_scorer(name) for name in METRICS],
        "audit": [
            _audit("text encoder", "text_encoder", 0, n, prompts),
            _audit("scorer", "clip", 3, n, prompts),
        ],
        "means": [
            _mean(arm, m, group, values[rows])
            for m, by in scores.items()
            for arm, values in by.items()
            for group, rows in every
        ],
        "comparisons": [
            _comparison(arm, m, group, by[arms[0]][rows], by[arm][rows])
            for m, by in scores.items()
            for arm in arms[1:]
            for group, rows in every
        ],
        "drift": [_drift(arm, pictures[arms[0]], pictures[arm]) for arm in arms[1:]],
        "words": ["clip: rose, but aligned was trained on it", "shapes/all: see the interval"],
        "items": [
            {
                "id": f"p{i:04d}",
                "prompt": p.text,
                "groups": groups[i],
                "k": 0,
                "seed": 1000 + i,
                "images": {arm: f"images/{arm}/{i:05d}.png" for arm in arms},
                "scores": {
                    m: {arm: _plain(float(values[i])) for arm, values in by.items()}
                    for m, by in scores.items()
                },
            }
            for i, p in enumerate(prompts)
        ],
    }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _groups(groups: Sequence[Mapping[str, str]]) -> list[tuple[list[str] | None, np.ndarray]]:
    found: list[tuple[list[str] | None, np.ndarray]] = [(None, np.ones(len(groups), bool))]
    for key in groups[0]:
        for value in dict.fromkeys(g[key] for g in groups):
            found.append(([key, value], np.array([g[key] == value for g in groups])))
    return found


def _mean(arm: str, metric: str, group: list[str] | None, values: np.ndarray) -> dict[str, Any]:
    asked = values[~np.isnan(values)]
    if metric.startswith("shapes"):
        found = rate(values)
        low, high = _plain(found.low), _plain(found.high)
    else:
        half = 1.96 * asked.std() / math.sqrt(max(1, len(asked)))
        low, high = asked.mean() - half, asked.mean() + half
    mean = float(asked.mean()) if len(asked) else None
    numbers = {"mean": mean, "low": low, "high": high, "n": len(asked), "clusters": len(asked)}
    return {"arm": arm, "metric": metric, "group": group, **numbers}


def _comparison(
    arm: str, metric: str, group: list[str] | None, base: np.ndarray, aligned: np.ndarray
) -> dict[str, Any]:
    p = paired(base, aligned, interval="bootstrap")
    moved = p.up + p.down
    floats = ("base", "aligned", "difference", "low", "high", "sign_p")
    numbers = {key: _plain(getattr(p, key)) for key in floats}
    counts = {key: getattr(p, key) for key in ("n", "clusters", "up", "down", "verdict")}
    return {
        "arm": arm,
        "metric": metric,
        "group": group,
        **numbers,
        **counts,
        "win_rate": p.up / moved if moved else None,
        "p_adjusted": min(1.0, 6 * p.sign_p),
        "held_out": metric not in TRAINED_ON.get(arm, ()),
    }


def _arm(name: str) -> dict[str, Any]:
    known = {"base": []}.get(name, [f"runs/{name}/adapter@0.5"])
    trained = list(TRAINED_ON.get(name, ()))
    return {"name": name, "adapters": known, "hashes": ["ab12" * 16 for _ in known], "trained_on": trained}


def _scorer(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "version": "ViT-L/14 openai",
        "source": f"openai/{name}",
        "preprocessing": "official: shorter side to 224, centre crop",
        "scale": "cosine",
        "dtype": "float32",
        "headline": METRICS[name][0],
        "metrics": METRICS[name],
    }


def _audit(what: str, name: str, cut: int, n: int, prompts: Sequence[Prompt]) -> dict[str, Any]:
    examples = [{"id": f"p{i:04d}", "lost": " ".join(prompts[i].text.split()[-3:])} for i in range(cut)]
    return {"what": what, "name": name, "arms": [], "limit": 77, "cut": cut, "of": n, "examples": examples}


def _drift(arm: str, base: np.ndarray, aligned: np.ndarray) -> dict[str, Any]:
    def saturation(x: np.ndarray) -> float:
        return float((x.max(-1).astype(float) - x.min(-1)).mean() / 255)

    def clipped(x: np.ndarray) -> float:
        return float(((x == 0) | (x == 255)).mean())

    return {
        "arm": arm,
        "feature_distance": 0.1234,
        "feature_of": "clip",
        "saturation": saturation(aligned),
        "saturation_base": saturation(base),
        "clipped": clipped(aligned),
        "clipped_base": clipped(base),
        "diversity": None,
        "diversity_base": None,
    }
