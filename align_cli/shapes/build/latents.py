"""Scenes encoded once by the trained autoencoder, and captions encoded once by the frozen text tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from align_cli.shapes.world import Scene, render, sample_scenes

WEIGHTS = (0.2, 0.5, 0.15, 0.15)
NUM_SCENES = 40_000


class Latents:
    """Posterior mean and std of NUM_SCENES training scenes, scaled; made once and kept in a file."""

    def __init__(self, folder: Path, seed: int) -> None:
        rng = np.random.default_rng([seed, 3])
        self.scenes: list[Scene] = sample_scenes(NUM_SCENES, rng, weights=WEIGHTS, split="train")
        path = folder / "latents.pt"
        if not path.exists():
            torch.save(self._encode(AutoencoderKL.from_pretrained(folder / "vae").eval()), path)
        self.mean, self.std = torch.load(path, weights_only=True)

    @torch.no_grad()
    def _encode(self, vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
        means, stds = [], []
        for start in range(0, len(self.scenes), 250):
            x = (
                torch.from_numpy(render(self.scenes[start : start + 250])).permute(0, 3, 1, 2).float() / 127.5
                - 1
            )
            posterior = vae.encode(x).latent_dist
            means.append(posterior.mean * vae.config.scaling_factor)
            stds.append(posterior.std * vae.config.scaling_factor)
            if start % 10_000 == 0:
                print(f"latents {start}", flush=True)
        return torch.cat(means), torch.cat(stds)


class Captions:
    """Texts as the pipeline gives them to its text tower: padded to the token limit. Short texts are
    cached.
    """

    def __init__(self, folder: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tiny-clip")
        self.cache: dict[str, Tensor] = {}

    def ids(self, texts: list[str]) -> Tensor:
        """(B, L) int64 token ids."""
        new = sorted({t for t in texts if t not in self.cache})
        if new:
            ids = self.tokenizer(new, padding="max_length", truncation=True, return_tensors="pt").input_ids
            self.cache.update(zip(new, ids, strict=True))
        out = torch.stack([self.cache[t] for t in texts])
        if len(self.cache) > 50_000:
            self.cache.clear()
        return out
