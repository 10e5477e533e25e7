"""Rotary positions: each pair of a head's coordinates is turned by an angle that grows with the token's position."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Shapes: B rows, T tokens, C head size.
Rotary = tuple[Tensor, Tensor]  # cosines and sines, each (B, T, 1, C / 2) in fp32


# What rope_scaling may say beside rope_type, under the names of config.json: those that must be there come first.
SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def rotary_tables(
    positions: Tensor, *, head_size: int, theta: float, scaling: Mapping[str, Any] | None = None
) -> Rotary:
    """Cosines and sines of each position's angles, in fp32 whatever the model's dtype: half precision would misplace
    far tokens. They are computed anew for each forward, so there is no buffer to save, to move or to outgrow."""
    exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    frequencies, length = 1.0 / theta**exponents, 1.0
    if scaling is not None:
        frequencies, length = scaled(frequencies, scaling, theta=theta)
    angles = positions[..., None, None].float() * frequencies
    return (angles.cos(), angles.sin()) if length == 1.0 else (angles.cos() * length, angles.sin() * length)


def scaled(frequencies: Tensor, scaling: Mapping[str, Any], *, theta: float) -> tuple[Tensor, float]:
    """The frequencies (C / 2,) of a model whose context was extended, and by what its cosines and sines are multiplied.

    linear: positions are divided by `factor` (arXiv:2306.15595). llama3: long wavelengths are, short ones are not, and
    between them it changes smoothly (the code published with Llama 3.1). yarn: the same along the coordinates, and
    queries and keys grow with the logarithm of `factor` (arXiv:2309.00071, section 3).
    """
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequencies / factor, 1.0
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # over the original context
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / factor), 1.0
    stretched = _yarn_ramp(frequencies, scaling, theta=theta)
    return frequencies * (1 - stretched) + frequencies / factor * stretched, _yarn_length(scaling)


def _yarn_ramp(frequencies: Tensor, scaling: Mapping[str, Any], *, theta: float) -> Tensor:
    """(C / 2,): 0 where a coordinate turns more than beta_fast times in the original context, 1 where less than
    beta_slow times, and a straight line over the coordinates between."""
    pairs = len(frequencies)
    context = scaling["original_max_position_embeddings"]

    def coordinate(turns: float) -> float:
        return pairs * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    first, last = (coordinate(scaling.get(name) or usual) for name, usual in (("beta_fast", 32), ("beta_slow", 1)))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    places = torch.arange(pairs, dtype=torch.float32, device=frequencies.device)
    return ((places - first) / (last - first or 0.001)).clamp(0, 1)


def _yarn_length(scaling: Mapping[str, Any]) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def length(scale: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * scale * math.log(scaling["factor"]) + 1.0

    one, all_dimensions = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return length(one) / length(all_dimensions) if one and all_dimensions else length(1.0)


def scaling_problems(scaling: Mapping[str, Any] | None) -> Iterator[str]:
    """What keeps rope_scaling from being computed, one sentence each; None is no scaling."""
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if kind not in SCALINGS:
        yield f"rope_scaling has the rope_type {reprlib.repr(kind)}; known are {', '.join(SCALINGS)}"
        return
    needed, optional = SCALINGS[kind]
    if missing := [name for name in needed if scaling.get(name) is None]:
        yield f"rope_scaling {kind} lacks {', '.join(missing)}"
    if unread := sorted(scaling.keys() - {"rope_type", *needed, *optional}):
        yield f"rope_scaling {kind} has {', '.join(unread)}, which is not supported"
    numbers = {name: scaling[name] for name in (*needed, *optional) if scaling.get(name) is not None}
    truncate = numbers.pop("truncate", True)
    if not isinstance(truncate, bool):
        yield f"rope_scaling's truncate must be true or false, not {reprlib.repr(truncate)}"
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            yield f"rope_scaling's {name} must be a number above 0, not {reprlib.repr(value)}"
            return
    if kind == "llama3" and not missing and not numbers["low_freq_factor"] < numbers["high_freq_factor"]:
        yield "rope_scaling's low_freq_factor must be below its high_freq_factor"


def rotate(x: Tensor, rotary: Rotary, *, interleaved: bool) -> Tensor:
    """x (B, T, heads, C) with each pair of coordinates turned by its position's angle.

    Pairs are (i, i + C/2), or (2i, 2i + 1) where they are interleaved.
    """
    cos, sin = rotary
    if x.dtype == cos.dtype and not torch.compiler.is_compiling():
        return _Turn.apply(x, cos, sin, interleaved)
    a, b = _pairs(x, interleaved)
    turned = a * cos - b * sin, b * cos + a * sin
    return (torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)).to(x.dtype)


class _Turn(torch.autograd.Function):
    """The same with half as many passes over memory, and nothing kept but the tables: what is turned forward by an
    angle is turned back by it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turned(x, cos, sin, interleaved, direction=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, ctx.interleaved, direction=-1), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, direction: int) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (a, b), (to_a, to_b) = _pairs(x, interleaved), _pairs(out, interleaved)
    torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=to_b).addcmul_(a, sin, value=direction)
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second coordinates of all pairs, each (B, T, heads, C / 2)."""
    return x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)  # type: ignore[return-value]
