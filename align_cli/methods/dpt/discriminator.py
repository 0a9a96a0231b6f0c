"""DPT's discriminator: a small DETR that looks at one activation of the UNet.

Letters: B pictures, C h w activation, N = h w positions, d width of the discriminator, Q queries, Qm of them
for matching and Qr for boxes, D width of the pooled text, K classes, H width of the comparison with tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align_cli.errors import UserError
from align_cli.methods.dpt.config import DPTConfig, fused_shape
from align_cli.models.dropout import RowDropout

TOKENS = 256
"""Classes of a query: places of the expression's tokens, and no object (the last one)."""
START_SCALE = math.log(1 / 0.07)
"""logit_scale at the start."""
LEARNED_ROWS = 50
"""Rows and columns that learned positions reach."""

Drop = Callable[[Tensor], Tensor] | None
"""Dropout, or None."""


@dataclass
class Grounding:
    """What the grounding queries say, of the last layer.

    logits: (B, Qr, K). boxes: (B, Qr, 4) centres and sizes in (0, 1). queries: (B, Qr, H) unit vectors.
    """

    logits: Tensor
    boxes: Tensor
    queries: Tensor

    @property
    def scores(self) -> Tensor:
        """(B, Qr): 1 - P(no object)."""
        return 1 - self.logits.float().softmax(-1)[..., -1]


class Discriminator(nn.Module):
    """Source: models/model.py (DiffQformerCombined), transformer.py, position_encoding.py and
    timestep_encoding.py of github.com/LgQu/DPT-T2I, whose parameter names these are.
    """

    def __init__(
        self, config: DPTConfig, *, channels: Sequence[int], text_dim: int, phrase_width: int, seed: int = 0
    ) -> None:
        """channels: of the activations, in their order. text_dim: D. phrase_width: of RoBERTa's states."""
        super().__init__()
        c, d = config, config.hidden_dim
        self.config = config
        self._drop: RowDropout | None = None
        fused = fused_shape(c.feature)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if fused:
                self.fusion_proj = nn.ModuleList([nn.Conv2d(n, fused[0], 1) for n in channels])
            self.input_proj = nn.Conv2d(fused[0] if fused else sum(channels), d, 1)
            self.position_embedding = (
                LearnedPositions(d // 2) if c.position == "learned" else SinePositions(d // 2)
            )
            self.timestep_embedding = TimestepCode(d)
            self.transformer = Transformer(c)
            self.query_embed = nn.Embedding(c.num_matching_queries + c.num_grounding_queries, d)
            self.map_to_clip = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, text_dim))
            self.logit_scale = nn.Parameter(torch.tensor(START_SCALE))
            self.class_embed = nn.Linear(d, TOKENS)
            self.bbox_embed = MLP([d, d, d, 4])
            self.contrastive_align_projection_image = nn.Linear(d, c.phrase_dim)
        self.read_phrases_of(phrase_width, seed)

    def read_phrases_of(self, width: int, seed: int) -> None:
        """Make room for states of another RoBERTa; a new one starts at random."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed + 1)
            made = nn.Linear(width, self.config.phrase_dim)
        self.contrastive_align_projection_text = made.to(self.logit_scale.device)

    @contextmanager
    def dropping(self, dropout: RowDropout | None) -> Iterator[None]:
        """Inside, dropout is at work; None: not."""
        before, self._drop = self._drop, dropout
        try:
            yield
        finally:
            self._drop = before

    def features(self, seen: Mapping[str, Tensor]) -> Tensor:
        """(B, C', h, w) of the activations: one, several side by side, or all fused.

        Raises:
            UserError: several of different sizes are to stand side by side.
        """
        weight, fused = self.input_proj.weight, fused_shape(self.config.feature)
        maps = [x.to(weight.dtype) for x in seen.values()]
        if not fused:
            sizes = {name: f"{x.shape[-2]} x {x.shape[-1]}" for name, x in seen.items()}
            if len(set(sizes.values())) > 1:
                each = ", ".join(f"{name} is {size}" for name, size in sizes.items())
                raise UserError(
                    f"dpt.feature {self.config.feature} joins blocks of different sizes: {each}; take others "
                    "or all-C-S, which resizes them"
                )
            return torch.cat(maps, dim=1)
        side = fused[1]
        parts = [
            project(F.interpolate(x, size=(side, side)))
            for project, x in zip(self.fusion_proj, maps, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def encode(self, features: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Memory (B, N, d) of the encoder, and the code (B, N, d) of position and noise level that goes with
        it. features: (B, C', h, w). t: (B,) timesteps.
        """
        x = self.input_proj(features)
        code = self.position_embedding(*x.shape[-2:]) + self.timestep_embedding(t)[:, None]
        memory: Tensor = self.transformer.encoder(x.flatten(2).mT, code, self._drop)
        return memory, code

    def forward(self, features: Tensor, t: Tensor) -> Tensor:
        """States (layers, B, Q, d) of all queries, those for matching first."""
        memory, code = self.encode(features, t)
        query = self.query_embed.weight.expand(len(memory), -1, -1)
        states: Tensor = self.transformer.decoder(memory, code, query, self._drop)
        return states

    def matching(self, states: Tensor) -> Tensor:
        """(layers, B, Qm, D), not normalised. The losses and scores are of the first layer."""
        found: Tensor = self.map_to_clip(states[:, :, : self.config.num_matching_queries])
        return found

    def grounding(self, states: Tensor) -> Grounding:
        """Classes, boxes and vectors of the grounding queries in the last layer."""
        x = states[-1][:, self.config.num_matching_queries :]
        return Grounding(
            self.class_embed(x),
            self.bbox_embed(x).sigmoid(),
            F.normalize(self.contrastive_align_projection_image(x).float(), dim=-1),
        )

    def phrase_tokens(self, states: Tensor) -> Tensor:
        """(B, L, H) unit vectors of RoBERTa's states (B, L, width)."""
        weight = self.contrastive_align_projection_text.weight
        return F.normalize(self.contrastive_align_projection_text(states.to(weight.dtype)).float(), dim=-1)


class MLP(nn.Module):
    """Linear layers with ReLU between them. widths: of input, layers, output."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(i, o) for i, o in pairwise(widths)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        found: Tensor = self.layers[-1](x)
        return found


# ---------------------------------------------------------------- codes of place and noise level


class SinePositions(nn.Module):
    """Sines of the row, then of the column, `n` channels each, of periods up to 10000."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.place = nn.Buffer(torch.zeros(()), persistent=False)

    def forward(self, height: int, width: int) -> Tensor:
        """(height * width, 2 n), row by row."""
        k = torch.arange(self.n, device=self.place.device)
        period = 10000 ** (2 * (k // 2).float() / self.n)

        def axis(count: int) -> Tensor:
            at = torch.arange(1, count + 1, device=k.device).float() / (count + 1e-6) * 2 * math.pi
            angle = at[:, None] / period
            return torch.where(k % 2 == 0, angle.sin(), angle.cos())

        return _grid(axis(height), axis(width), rows_first=True)


class LearnedPositions(nn.Module):
    """A table for columns, whose code comes first, and one for rows, `n` channels each."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.row_embed, self.col_embed = nn.Embedding(LEARNED_ROWS, n), nn.Embedding(LEARNED_ROWS, n)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, height: int, width: int) -> Tensor:
        """(height * width, 2 n), row by row.

        Raises:
            UserError: more rows or columns than the tables have.
        """
        if max(height, width) > LEARNED_ROWS:
            raise UserError(
                f"dpt.position learned reaches {LEARNED_ROWS} rows and columns, and dpt.feature is {height} "
                f"x {width} in these pictures; take another feature, or position sine"
            )
        return _grid(self.row_embed.weight[:height], self.col_embed.weight[:width], rows_first=False)


def _grid(rows: Tensor, columns: Tensor, *, rows_first: bool) -> Tensor:
    """(h, n) and (w, n) -> (h w, 2 n)."""
    h, w = len(rows), len(columns)
    down, across = rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1)
    parts = (down, across) if rows_first else (across, down)
    return torch.cat(parts, dim=-1).flatten(0, 1)


class TimestepCode(nn.Module):
    """Sinusoid of the timestep, cosines first, through two linear layers with SiLU between."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.half_width = d // 2
        self.time_embedding = nn.ModuleDict(
            {"linear_1": nn.Linear(d, 4 * d), "linear_2": nn.Linear(4 * d, d)}
        )

    def forward(self, t: Tensor) -> Tensor:
        """t: (B,) -> (B, d)."""
        weight: Tensor = self.get_parameter("time_embedding.linear_1.weight")
        k = torch.arange(self.half_width, device=weight.device)
        angle = t.to(weight.device).float()[:, None] * torch.exp(-math.log(10000) * k / self.half_width)
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1).to(weight.dtype)
        found: Tensor = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](wave)))
        return found


# ---------------------------------------------------------------- transformer


class Transformer(nn.Module):
    """Encoder and decoder of DETR; every matrix starts Xavier-uniform."""

    def __init__(self, config: DPTConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)


class Encoder(nn.Module):
    def __init__(self, c: DPTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([EncoderLayer(c) for _ in range(c.num_encoder_layers)])
        self.norm = nn.LayerNorm(c.hidden_dim) if c.pre_norm else nn.Identity()

    def forward(self, x: Tensor, code: Tensor, drop: Drop) -> Tensor:
        """x, code: (B, N, d) -> (B, N, d)."""
        for layer in self.layers:
            x = layer(x, code, drop)
        found: Tensor = self.norm(x)
        return found


class Decoder(nn.Module):
    def __init__(self, c: DPTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DecoderLayer(c) for _ in range(c.num_decoder_layers)])
        self.norm = nn.LayerNorm(c.hidden_dim)

    def forward(self, memory: Tensor, code: Tensor, query: Tensor, drop: Drop) -> Tensor:
        """memory, code: (B, N, d). query: (B, Q, d), the places of queries whose content starts at zero.
        Returns (layers, B, Q, d), each layer's states after the norm.
        """
        x, states = torch.zeros_like(query), []
        for layer in self.layers:
            x = layer(x, memory, code, query, drop)
            states.append(self.norm(x))
        return torch.stack(states)


class Attention(nn.Module):
    """Multi-head attention with torch's packed parameters; dropout on its weights as `drop` says."""

    def __init__(self, c: DPTConfig) -> None:
        super().__init__()
        d = c.hidden_dim
        self.heads = c.num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d, d))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d))
        self.out_proj = nn.Linear(d, d)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, drop: Drop) -> Tensor:
        """(B, Q, d), (B, N, d), (B, N, d) -> (B, Q, d)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        if drop is None:
            found = F.scaled_dot_product_attention(q, k, v)
        else:
            found = drop((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)) @ v
        out: Tensor = self.out_proj(found.transpose(1, 2).flatten(2))
        return out


class _Layer(nn.Module):
    """What both kinds of layers share: residual branches, each with its norm after it or before it."""

    def __init__(self, c: DPTConfig, norms: int) -> None:
        super().__init__()
        d = c.hidden_dim
        self.pre_norm = c.pre_norm
        self.self_attn = Attention(c)
        self.linear1, self.linear2 = nn.Linear(d, c.feedforward_dim), nn.Linear(c.feedforward_dim, d)
        for i in range(1, norms + 1):
            self.add_module(f"norm{i}", nn.LayerNorm(d))

    def branch(self, x: Tensor, number: int, work: Callable[[Tensor], Tensor], drop: Drop) -> Tensor:
        norm = self.get_submodule(f"norm{number}")
        if self.pre_norm:
            return x + _dropped(work(norm(x)), drop)
        found: Tensor = norm(x + _dropped(work(x), drop))
        return found

    def feedforward(self, x: Tensor, drop: Drop) -> Tensor:
        found: Tensor = self.linear2(_dropped(self.linear1(x).relu(), drop))
        return found


def _dropped(x: Tensor, drop: Drop) -> Tensor:
    return x if drop is None else drop(x)


class EncoderLayer(_Layer):
    def __init__(self, c: DPTConfig) -> None:
        super().__init__(c, norms=2)

    def forward(self, x: Tensor, code: Tensor, drop: Drop) -> Tensor:
        """The code is added to queries and keys alone."""
        x = self.branch(x, 1, lambda s: self.self_attn(s + code, s + code, s, drop), drop)
        return self.branch(x, 2, lambda s: self.feedforward(s, drop), drop)


class DecoderLayer(_Layer):
    def __init__(self, c: DPTConfig) -> None:
        super().__init__(c, norms=3)
        self.multihead_attn = Attention(c)

    def forward(self, x: Tensor, memory: Tensor, code: Tensor, query: Tensor, drop: Drop) -> Tensor:
        x = self.branch(x, 1, lambda s: self.self_attn(s + query, s + query, s, drop), drop)
        x = self.branch(x, 2, lambda s: self.multihead_attn(s + query, memory + code, memory, drop), drop)
        return self.branch(x, 3, lambda s: self.feedforward(s, drop), drop)
