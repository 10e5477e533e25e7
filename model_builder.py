"""ConfigurableGPT: the model that a ModelArchitectureConfig describes, read from the whole down to its parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_config import ModelArchitectureConfig, parameter_count
from sft import recompute, saved_adapters
from sft.adapting import Adapted
from sft.attention import BackEnd, Documents, KeyValueCache, causal_attention, under_window
from sft.ema import Weights
from sft.errors import UserError
from sft.experts import MixtureOfExperts, Routing
from sft.feed_forward import build_feed_forward
from sft.linear import Linear
from sft.pretrained import open_pretrained
from sft.rms_norm import RMSNorm
from sft.rotary import Rotary, rotary_tables, rotate

# Shapes: B rows, T tokens, V vocabulary, D width, H query heads, G key heads, C head size.


class ConfigurableGPT(nn.Module):
    """A causal language model whose every choice comes from one config; freshly built, its weights are random.

    The loss is computed elsewhere, from hidden_states and head_weight. A tied head is the embedding's own parameter:
    state_dict() has it under both names, parameters() once.
    """

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        device = torch.get_default_device()
        with torch.device("meta"):  # so that PyTorch's own initialisation draws nothing and costs nothing
            self.token_embeddings = empty_embedding(config.vocab_size, config.n_embd)
            self.pos_encoding = LearnedPositions(config) if config.position_encoding == "learned_absolute" else None
            self.embedding_dropout = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(Block(config, place) for place in range(config.n_layer))
            self.final_norm = build_norm(config)
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.config = config
        self.activation_checkpointing: recompute.Recomputing = "none"  # what of a block the backward computes again
        self.attention: BackEnd = "sdpa"  # set_attention
        self.compiled = False
        self.adapted: Adapted | None = None  # what its adapters are, where it has some
        has_numbers = device.type != "meta"  # else there is nothing to draw, and hundreds of modules not to import
        if has_numbers:
            self.to_empty(device=device)
        self._tie_head()
        if has_numbers:
            self._initialise()

    def forward(self, ids: Tensor, positions: Tensor | None = None, documents: Documents | None = None) -> Tensor:
        """Logits (B, T, V) for ids (B, T)."""
        return F.linear(self.hidden_states(ids, positions, documents), self.head_weight)

    def hidden_states(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        cache: Sequence[KeyValueCache] | None = None,
        places: Tensor | None = None,
        routings: list[Routing] | None = None,
    ) -> Tensor:
        """What the head reads, (B, T, D), after the final norm.

        positions (B, T) count from 0 in each document, which is also what None means. With a cache, one entry per
        block, ids are the newest tokens of rows whose earlier ones it holds; documents then covers those too. With
        places (n,) in the flattened rows, of which some may be named twice, the result is (n, D), theirs alone: the
        last block has no other use for its output projection and its feed-forward part. To `routings` is added how
        each mixture of experts has spread the tokens, where the list is given all of them.
        """
        if positions is None:
            positions = documents.positions if documents is not None else self._counted(ids, cache)
        windowed = under_window(documents, ids, self.config.sliding_window, past=cache[0].length if cache else 0)
        for each in (documents, windowed):
            if each is not None:
                dropout = self.config.attention_dropout_rate if self.training else 0.0
                routed = self.config.num_experts is not None
                each.prepare(self.attention, dropout=dropout, compiled=self.compiled, routed=routed)
        x = self.token_embeddings(ids)
        if self.pos_encoding is not None:
            x = x + self.pos_encoding(positions)
        x = self.embedding_dropout(x)
        rotary = None
        if self.config.position_encoding == "rope":
            size, theta, scaling = self.config.head_size, self.config.rope_theta, self.config.rope_scaling
            rotary = rotary_tables(positions, head_size=size, theta=theta, scaling=scaling)
        recomputing = self.activation_checkpointing if self.training else "none"
        last = len(self.blocks) - 1
        if self.compiled and places is not None:
            torch._dynamo.maybe_mark_dynamic(places, 0)  # the number of trained tokens differs from batch to batch
        for i, block in enumerate(self.blocks):
            past = None if cache is None else cache[i]
            seen = documents if self.config.window_of(i) is None else windowed
            x, routing = block(x, rotary, seen, past, places if i == last else None, recomputing, routings is not None)
            if routings is not None and routing is not None:
                routings.append(routing)
        return self.final_norm(x)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix (V, D)."""
        return self.lm_head.weight

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding and of the head."""
        return self.config.vocab_size

    @property
    def position_limit(self) -> int | None:
        """The most tokens of a document that can be given a place; None where positions are computed, not looked up."""
        return self.config.block_size if self.pos_encoding is not None else None

    def new_cache(self) -> list[KeyValueCache]:
        """An empty cache for hidden_states."""
        return [KeyValueCache() for _ in self.blocks]

    def set_dropout(self, rate: float) -> None:
        """Use one rate for the embeddings, the attention probabilities and the residual additions."""
        self.config = dataclasses.replace(self.config, dropout=rate, attention_dropout=None, residual_dropout=None)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = rate
            elif isinstance(module, Attention):
                module.dropout = rate

    def set_attention(self, back_end: BackEnd) -> None:
        """Compute attention within documents by one back end in all blocks."""
        self.attention = back_end
        for module in self.modules():
            if isinstance(module, Attention):
                module.back_end = back_end

    def grow_vocabulary(self, size: int, say: Callable[[str], None] = print) -> None:
        """Give the embedding and the head `size` rows, each new one the mean of the old; says both parameter counts.

        New parameters take the place of the old, so this comes before the optimizer and any wrapper.
        """
        old = self.config
        assert size >= old.vocab_size, f"a vocabulary of {old.vocab_size} does not shrink to {size}"
        self.config = dataclasses.replace(old, vocab_size=size)
        self.token_embeddings.weight = _grown(self.token_embeddings.weight, size)
        self.token_embeddings.num_embeddings = size
        if not old.weight_tying:
            self.lm_head.weight = _grown(self.lm_head.weight, size)
        self.lm_head.out_features = size
        self._tie_head()
        counts = f"{parameter_count(old):,} -> {parameter_count(self.config):,} parameters"
        say(f"vocabulary {old.vocab_size:,} -> {size:,}: {counts}; new rows are the mean of the old")

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Have torch.compile translate each block at its first call; all blocks share what it learns."""
        self.compiled = True
        # Else blocks are cut where DDP's buckets of gradients end, and what lies on both sides of a cut is not fused.
        torch._dynamo.config.optimize_ddp = False
        for block in self.blocks:
            block.compile(backend=backend)

    @staticmethod
    def _counted(ids: Tensor, cache: Sequence[KeyValueCache] | None) -> Tensor:
        B, T = ids.shape
        past = cache[0].length if cache else 0
        return torch.arange(past, past + T, device=ids.device).expand(B, T)

    def _tie_head(self) -> None:
        if self.config.weight_tying:
            self.lm_head.weight = self.token_embeddings.weight

    @torch.no_grad()
    def _initialise(self) -> None:
        """GPT-2's start: normal 0.02, divided by sqrt(2 n_layer) for the 2 n_layer matrices that add to the stream."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            elif name.endswith(("c_proj.weight", "w_out.weight", "fc2.weight", "w_out")):
                parameter.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                parameter.normal_(0.0, 0.02)


def load_pretrained(
    path: str | PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    verify: bool = True,
    weights: Weights = "model",
) -> ConfigurableGPT:
    """The model that a checkpoint or a Hugging Face folder holds, exactly: nothing added, nothing left over.

    It comes in evaluation mode; a trainer calls train(). Weights are copied one at a time, so the peak is the model
    and one of its tensors. `verify` compares a checkpoint's checksums, which reads all of it once; of many processes
    one is enough. `weights`: of a run with ema_decay, those that were trained (what a resumed run goes on from), or
    "ema", their moving average (what its evaluations saw). Adapters come on their base, which `verify` proves to be
    theirs, and are not merged with it. Raises UserError for what cannot be read, with every tensor that does not fit.
    """
    source = open_pretrained(Path(path), verify=verify, weights=weights)
    if source.adapters is not None:
        base = saved_adapters.base_of(source, verify=verify)
        model = load_pretrained(base, device, dtype, verify=verify and source.is_of_unknown_base)
        saved_adapters.apply(source, model, base=base)
        return model.eval()
    try:
        config = ModelArchitectureConfig.from_dict(source.fields)
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from error
    with torch.device("meta"):
        model = ConfigurableGPT(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tensors = source.weights(shapes, device, dtype)
    if config.weight_tying:
        tensors["lm_head.weight"] = tensors["token_embeddings.weight"]
    model.load_state_dict(tensors, assign=True)
    model._tie_head()
    return model.eval()


class Block(nn.Module):
    """Attention, then the feed-forward part, each added to the stream before (post) or after (pre) its norm."""

    def __init__(self, config: ModelArchitectureConfig, place: int):
        super().__init__()
        self.norm_first = config.norm_position == "pre"
        self.norm1 = build_norm(config)
        self.attn = Attention(config)
        self.norm2 = build_norm(config)
        self.ffn = build_ffn(config, place)
        self.residual_dropout = nn.Dropout(config.residual_dropout_rate)
        self.adapters_draw = False  # dropout of their own

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        documents: Documents | None,
        cache: KeyValueCache | None,
        places: Tensor | None = None,
        recomputing: recompute.Recomputing = "none",
        counted: bool = False,
    ) -> tuple[Tensor, Routing | None]:
        """The stream after it, and how its experts, if any, were chosen: by all tokens where they are `counted`."""
        draws = self.residual_dropout.p > 0 or self.attn.dropout > 0 or self.adapters_draw
        inputs = x, rotary, documents, cache, places, counted
        return recompute.run(self._compute, *inputs, recomputing=recomputing, draws=draws)

    def _compute(
        self,
        x: Tensor,
        rotary: Rotary | None,
        documents: Documents | None,
        cache: KeyValueCache | None,
        places: Tensor | None,
        counted: bool,
    ) -> tuple[Tensor, Routing | None]:
        later = real = None
        if isinstance(self.ffn, MixtureOfExperts):
            real = None if documents is None else documents.real
            if counted:  # the router has to see all tokens
                places, later = None, places
        seen = self.attn(self.norm1(x) if self.norm_first else x, rotary, documents, cache, places)
        x = chosen(x, places) + self.residual_dropout(seen)
        if not self.norm_first:
            x = self.norm1(x)
        computed, routing = self._feed_forward(
            self.norm2(x) if self.norm_first else x, None if real is None else chosen(real, places)
        )
        x = x + self.residual_dropout(computed)
        return chosen(x if self.norm_first else self.norm2(x), later), routing

    def _feed_forward(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Routing | None]:
        if isinstance(self.ffn, MixtureOfExperts):
            return self.ffn(x, real)
        return self.ffn(x), None


class Attention(nn.Module):
    """Causal self-attention; with fewer key heads than query heads, each serves a group of them."""

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        D, H, G, C = config.n_embd, config.n_head, config.key_heads, config.head_size
        self.query_rows, self.key_rows, self.head_size = H * C, G * C, C
        self.grouped = G < H
        self.interleaved = config.rope_layout == "interleaved"
        self.dropout = config.attention_dropout_rate
        self.back_end: BackEnd = "sdpa"
        if self.grouped:
            self.c_q = Linear(D, H * C, bias=config.has_qkv_bias)
            self.c_kv = Linear(D, 2 * G * C, bias=config.has_qkv_bias)  # rows: keys, values
        else:
            self.c_attn = Linear(D, 3 * H * C, bias=config.has_qkv_bias)  # rows: queries, keys, values
        self.c_proj = Linear(H * C, D, bias=config.has_attention_output_bias)
        self.q_norm = RMSNorm(C, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(C, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        documents: Documents | None,
        cache: KeyValueCache | None,
        places: Tensor | None = None,
    ) -> Tensor:
        B, T, _ = x.shape
        if self.grouped:
            q, (k, v) = self.c_q(x), self.c_kv(x).split(self.key_rows, dim=-1)
        else:
            q, k, v = self.c_attn(x).split(self.query_rows, dim=-1)
        q = self.q_norm(q.view(B, T, -1, self.head_size))  # (B, T, H, C)
        k = self.k_norm(k.view(B, T, -1, self.head_size))  # (B, T, G, C)
        v = v.view(B, T, -1, self.head_size)
        if rotary is not None:
            q, k = (rotate(x, rotary, interleaved=self.interleaved) for x in (q, k))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or G, T, C)
        if cache is not None:
            k, v = cache.append(k, v)
        dropout = self.dropout if self.training else 0.0
        mixed = causal_attention(q, k, v, documents=documents, dropout=dropout, back_end=self.back_end)
        return self.c_proj(chosen(mixed.transpose(1, 2).reshape(B, T, self.query_rows), places))


class LearnedPositions(nn.Module):
    """A trained vector for each position of a document."""

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        self.wpe = empty_embedding(config.block_size, config.n_embd)

    def forward(self, positions: Tensor) -> Tensor:
        return self.wpe(positions)


def empty_embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding whose numbers are yet to be drawn."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def chosen(x: Tensor, places: Tensor | None) -> Tensor:
    """x (B, T, ...) at some places of its flattened rows, (n, ...); all of x where places is None."""
    return x if places is None else x.flatten(0, 1).index_select(0, places)


def build_ffn(config: ModelArchitectureConfig, place: int) -> nn.Module:
    """The feed-forward part of a block, counted from 0, that the config names."""
    if not config.has_experts(place):
        return build_feed_forward(
            config.n_embd,
            config.ffn_width,
            activation=None if config.ffn_type == "swiglu" else config.activation,
            bias=config.has_ffn_bias,
        )
    experts, per_token, width = config.expert_sizes
    return MixtureOfExperts(
        config.n_embd, experts=experts, chosen=per_token, inner_width=width, normalized=config.norm_topk_prob
    )


def build_norm(config: ModelArchitectureConfig) -> nn.Module:
    """The norm over the width that the config names."""
    if config.normalization == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.normalization == "layernorm")


def _grown(weight: Tensor, size: int) -> nn.Parameter:
    mean = weight.detach().mean(dim=0, keepdim=True, dtype=torch.promote_types(weight.dtype, torch.float32))
    new_rows = mean.to(weight.dtype).expand(size - weight.shape[0], -1)
    return nn.Parameter(torch.cat([weight.detach(), new_rows]), requires_grad=weight.requires_grad)
