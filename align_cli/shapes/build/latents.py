"""Scenes encoded once by the trained autoencoder, and captions encoded once by the frozen text tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

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
            x = torch.from_numpy(render(self.scenes[start : start + 250])).permute(0, 3, 1, 2).float() / 127.5 - 1
            posterior = vae.encode(x).latent_dist
            means.append(posterior.mean * vae.config.scaling_factor)
            stds.append(posterior.std * vae.config.scaling_factor)
            if start % 10_000 == 0:
                print(f"latents {start}", flush=True)
        return torch.cat(means), torch.cat(stds)


class Captions:
    """Hidden states of the frozen text tower, padded to the token limit as the pipeline pads; short texts are cached."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tiny-clip")
        self.tower: nn.Module = CLIPModel.from_pretrained(folder / "tiny-clip").text_model.eval().requires_grad_(False)
        self.cache: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """(B, L, D) float32."""
        new = sorted({t for t in texts if t not in self.cache})
        if new:
            ids = self.tokenizer(new, padding="max_length", truncation=True, return_tensors="pt").input_ids
            self.cache.update(zip(new, self.tower(ids).last_hidden_state, strict=True))
        out = torch.stack([self.cache[t] for t in texts])
        if len(self.cache) > 20_000:
            self.cache = {t: v for t, v in self.cache.items() if len(t) < 90}
        return out
