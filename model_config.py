"""The shape of a model: one frozen description, named presets, and its exact parameter and FLOP counts."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sft.errors import UserError, listed
from sft.rotary import scaling_problems
from sft.settings_types import accepts, type_name

MOST_PARAMETERS = 10**12  # beyond what any device holds, and long before tensor sizes overflow


@dataclass(frozen=True, kw_only=True)
class ModelArchitectureConfig:
    """Everything that decides which tensors a model has and what it computes with them.

    A value that cannot be built raises UserError with every problem at once. Nothing is filled in: what None stands
    for is a property, so to_dict() gives back exactly what was asked for.
    """

    n_layer: int  # transformer blocks
    n_head: int  # query heads of each block
    n_embd: int  # width of the residual stream
    vocab_size: int  # rows of the embedding and of the head
    block_size: int  # tokens in the longest row; a hard limit only for learned positions
    num_key_value_heads: int | None = None  # heads of keys and values, 1 = multi-query; None = n_head
    head_dim: int | None = None  # size of one head; None = n_embd // n_head
    d_ff: int | None = None  # inner width of the feed-forward part; None = int(8 n_embd / 3) for swiglu, else 4 n_embd
    normalization: Literal["layernorm", "layernorm_nobias", "rmsnorm"] = "rmsnorm"
    norm_eps: float = 1e-6  # added to the variance inside each norm
    norm_position: Literal["pre", "post"] = "pre"  # x + f(norm(x)), or norm(x + f(x)); final_norm in both
    activation: Literal["gelu", "gelu_tanh", "silu", "relu", "leaky_relu"] = "silu"  # of a standard ffn; swiglu is silu
    ffn_type: Literal["standard", "swiglu"] = "swiglu"
    position_encoding: Literal["rope", "learned_absolute", "none"] = "rope"
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rope_layout: Literal["half", "interleaved"] = "half"  # pairs that turn together: (i, i + C/2) or (2i, 2i + 1)
    num_experts: int | None = (
        None  # feed-forward parts of a block to choose from, all swiglu; None = one for all tokens
    )
    num_experts_per_tok: int | None = None  # so many of them compute each token
    expert_d_ff: int | None = None  # inner width of an expert
    norm_topk_prob: bool = False  # the weights of a token's experts are divided by their sum
    dense_layers: tuple[int, ...] = ()  # blocks with one feed-forward part all the same, counted from 0
    router_aux_loss_coef: float = 0.0  # weight of the load-balancing loss, where training does not say another
    qk_norm: bool = False  # RMS norm of each query and key head, before the rotation
    rope_scaling: dict[str, Any] | None = None  # how wavelengths are stretched, as config.json says it: sft/rotary.py
    sliding_window: int | None = None  # tokens that a token sees, itself included; None = all before it
    sliding_layers: tuple[int, ...] | None = None  # the blocks that have the window, counted from 0; None = all
    bias: bool = False  # in the linear layers of the blocks; the head never has one
    qkv_bias: bool | None = None  # in the projections of queries, keys and values; None = bias
    attention_output_bias: bool | None = None  # in the output projection of attention; None = bias
    ffn_bias: bool | None = None  # in the feed-forward part; None = bias
    weight_tying: bool = False  # the head is the embedding
    dropout: float = 0.0  # of the embeddings, and wherever the next two are None
    attention_dropout: float | None = None  # of the attention probabilities
    residual_dropout: float | None = None  # of what each half of a block adds to the stream

    def __post_init__(self) -> None:
        if problems := _problems(self.to_dict()):
            raise listed("the architecture cannot be built:", problems)
        if parameter_count(self) > MOST_PARAMETERS:
            raise UserError(f"the architecture cannot be built: it has more than {MOST_PARAMETERS:,} parameters")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelArchitectureConfig:
        """The architecture that a plain dict describes; UserError names every unknown, missing or bad field."""
        if problems := _problems(values):
            raise listed("the architecture cannot be built:", problems)
        plain: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**plain)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them, that from_dict turns back into an equal architecture."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def key_heads(self) -> int:
        """Heads of keys and of values."""
        return self.n_head if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """Coordinates of one head."""
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim

    @property
    def ffn_width(self) -> int:
        """Inner width of the feed-forward part."""
        if self.d_ff is not None:
            return self.d_ff
        return 8 * self.n_embd // 3 if self.ffn_type == "swiglu" else 4 * self.n_embd

    def has_experts(self, block: int) -> bool:
        """Whether a block, counted from 0, is a mixture of experts."""
        return self.num_experts is not None and block not in self.dense_layers

    @property
    def expert_sizes(self) -> tuple[int, int, int]:
        """How many experts there are, how many of them a token has, and their inner width."""
        assert self.num_experts is not None
        assert self.num_experts_per_tok is not None
        assert self.expert_d_ff is not None
        return self.num_experts, self.num_experts_per_tok, self.expert_d_ff

    def window_of(self, block: int) -> int | None:
        """The sliding window of a block, counted from 0."""
        return self.sliding_window if self.sliding_layers is None or block in self.sliding_layers else None

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_attention_output_bias(self) -> bool:
        return self.bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def has_ffn_bias(self) -> bool:
        return self.bias if self.ffn_bias is None else self.ffn_bias

    @property
    def attention_dropout_rate(self) -> float:
        """The share of attention probabilities dropped in training."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def residual_dropout_rate(self) -> float:
        """The share of each block's additions dropped in training."""
        return self.dropout if self.residual_dropout is None else self.residual_dropout


def architecture_problems(model: str | Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a preset's name or some fields of an architecture, whatever the data will add to them."""
    if isinstance(model, str):
        if model not in PRESETS:
            yield f"no preset is called {reprlib.repr(model)}; there are {', '.join(PRESETS)}"
        return
    try:
        ModelArchitectureConfig.from_dict({"vocab_size": 1, "block_size": 1, **model})
    except UserError as error:
        yield str(error)


def parameter_count(config: ModelArchitectureConfig) -> int:
    """The exact number of trained values, those of all experts; a tied head counts once."""
    D, C = config.n_embd, config.head_size
    query_rows, key_rows = config.n_head * C, config.key_heads * C
    norm = {"layernorm": 2 * D, "layernorm_nobias": D, "rmsnorm": D}[config.normalization]
    attention = _attention_matrix_values(config) + (2 * C if config.qk_norm else 0)
    attention += query_rows + 2 * key_rows if config.has_qkv_bias else 0
    attention += D if config.has_attention_output_bias else 0
    ffn = sum(count * _ffn_values(config, experts) for experts, count in _kinds_of_blocks(config) if count)
    tables = config.vocab_size * D * (1 if config.weight_tying else 2)
    tables += config.block_size * D if config.position_encoding == "learned_absolute" else 0
    return tables + config.n_layer * (attention + 2 * norm) + ffn + norm


def forward_flops(config: ModelArchitectureConfig, *, tokens: int, attended_pairs: int, trained_tokens: int) -> int:
    """Floating-point operations of one forward: two for each multiply-add of each matrix product, nothing else.

    attended_pairs is the number of (query, key) pairs that the mask lets through, the sum of L(L+1)/2 over documents
    of L tokens (what a sliding window leaves out is counted, too); the head, and what the last block does after its
    attention, run on trained_tokens only. Of experts, those that are chosen count. A backward costs twice as much.
    """
    last = config.n_layer - 1
    output = config.n_head * config.head_size * config.n_embd
    after_attention = output + _ffn_matrix_values(config, config.has_experts(last))
    matrices = config.n_layer * _attention_matrix_values(config)
    matrices += sum(count * _ffn_matrix_values(config, experts) for experts, count in _kinds_of_blocks(config) if count)
    blocks = matrices * tokens - after_attention * (tokens - trained_tokens)
    attention = config.n_layer * 2 * config.n_head * config.head_size * attended_pairs  # scores, then mixed values
    head = config.vocab_size * config.n_embd * trained_tokens
    return 2 * (blocks + attention + head)


def _kinds_of_blocks(config: ModelArchitectureConfig) -> tuple[tuple[bool, int], tuple[bool, int]]:
    """How many blocks have experts, and how many have not."""
    with_experts = 0 if config.num_experts is None else config.n_layer - len(set(config.dense_layers))
    return (True, with_experts), (False, config.n_layer - with_experts)


def _attention_matrix_values(config: ModelArchitectureConfig) -> int:
    """The entries of the four projections of one block."""
    return (2 * config.n_head + 2 * config.key_heads) * config.head_size * config.n_embd  # q, output; k, v


def _ffn_values(config: ModelArchitectureConfig, has_experts: bool) -> int:
    """The trained values of a block's feed-forward part, or of its router and all of its experts."""
    if has_experts:
        experts, _, width = config.expert_sizes
        return experts * (config.n_embd + 3 * width * config.n_embd)
    biases = (2 * config.ffn_width if config.ffn_type == "swiglu" else config.ffn_width) + config.n_embd
    return _ffn_matrix_values(config, has_experts) + (biases if config.has_ffn_bias else 0)


def _ffn_matrix_values(config: ModelArchitectureConfig, has_experts: bool) -> int:
    """The entries of the feed-forward matrices that a token of a block passes through."""
    if has_experts:
        experts, per_token, width = config.expert_sizes
        return config.n_embd * (experts + per_token * 3 * width)
    return (3 if config.ffn_type == "swiglu" else 2) * config.ffn_width * config.n_embd


def _problems(values: Mapping[str, Any]) -> list[str]:
    """Everything that keeps `values` from being an architecture, one sentence each."""
    fields = {field.name: field for field in dataclasses.fields(ModelArchitectureConfig)}
    hints = typing.get_type_hints(ModelArchitectureConfig)
    problems = []
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            problems.append(f"unknown field {reprlib.repr(name)}" + (f"; did you mean {close[0]!r}?" if close else ""))
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            problems.append(f"{name} is missing")
        elif name in values and not accepts(hints[name], values[name]):
            problems.append(f"{name} must be {type_name(hints[name])}, not {reprlib.repr(values[name])}")
    # Ranges and contradictions are looked for only among values of the right type.
    sound = {name: values.get(name, field.default) for name, field in fields.items()}
    sound = {name: value for name, value in sound.items() if accepts(hints[name], value)}
    return [*problems, *_out_of_range(sound), *_contradictions(sound)]


def _out_of_range(values: Mapping[str, Any]) -> Iterator[str]:
    sizes = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "num_key_value_heads", "head_dim", "d_ff")
    others = ("sliding_window", "num_experts", "num_experts_per_tok", "expert_d_ff")
    for name in (*sizes, *others, "norm_eps", "rope_theta"):
        if values.get(name) is not None and not values[name] > 0:
            yield f"{name} must be above 0, not {values[name]!r}"
    for name in ("dropout", "attention_dropout", "residual_dropout"):
        if values.get(name) is not None and not 0 <= values[name] < 1:
            yield f"{name} must be at least 0 and below 1, not {values[name]!r}"
    if not values.get("router_aux_loss_coef", 0.0) >= 0:
        yield f"router_aux_loss_coef must be at least 0, not {values['router_aux_loss_coef']!r}"
    layers = values.get("n_layer", 0)
    for name in ("sliding_layers", "dense_layers"):
        if odd := [block for block in values.get(name) or () if not 0 <= block < layers]:
            yield f"{name} has {odd[0]}, but blocks are numbered from 0 to {layers - 1}"


def _contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    heads, width, key_heads = values.get("n_head"), values.get("n_embd"), values.get("num_key_value_heads")
    if heads and key_heads and heads > 0 and key_heads > 0 and heads % key_heads:
        yield f"n_head {heads} must be a multiple of num_key_value_heads {key_heads}"
    size = values.get("head_dim")
    if size is None and "head_dim" in values and heads and width and heads > 0:
        if width % heads:
            yield f"n_embd {width} must be a multiple of n_head {heads}, or head_dim given"
        else:
            size = width // heads
    if size and values.get("position_encoding") == "rope" and size % 2:
        yield f"rotary positions need an even head size, not {size}"
    yield from scaling_problems(values.get("rope_scaling"))
    if values.get("rope_scaling") is not None and values.get("position_encoding") != "rope":
        yield "rope_scaling needs position_encoding 'rope'"
    if values.get("sliding_layers") is not None and values.get("sliding_window") is None:
        yield "sliding_layers needs sliding_window"
    yield from _contradictions_of_experts(values)


def _contradictions_of_experts(values: Mapping[str, Any]) -> Iterator[str]:
    experts, chosen = values.get("num_experts"), values.get("num_experts_per_tok")
    others = {"num_experts_per_tok": None, "expert_d_ff": None, "dense_layers": (), "router_aux_loss_coef": 0.0}
    if experts is None:
        if given := [name for name, unset in others.items() if values.get(name, unset) not in (unset, [])]:
            yield f"{given[0]} needs num_experts"
        return
    for name in ("num_experts_per_tok", "expert_d_ff"):
        if values.get(name) is None:
            yield f"num_experts needs {name}"
    if chosen is not None and chosen > experts:
        yield f"num_experts_per_tok {chosen} must be at most num_experts {experts}"
    if values.get("ffn_type") != "swiglu":
        yield "experts are swiglu: num_experts needs ffn_type 'swiglu'"
    if values.get("ffn_bias", None) or (values.get("ffn_bias") is None and values.get("bias")):
        yield "experts have no biases: num_experts needs ffn_bias False"


def _qwen3(n_layer: int, n_embd: int, n_head: int, d_ff: int, *, tied: bool) -> ModelArchitectureConfig:
    return ModelArchitectureConfig(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        num_key_value_heads=8,
        head_dim=128,
        d_ff=d_ff,
        vocab_size=151_936,
        block_size=40_960,
        rope_theta=1_000_000.0,
        qk_norm=True,
        weight_tying=tied,
    )


def _gpt2(n_layer: int, n_embd: int, n_head: int) -> ModelArchitectureConfig:
    return ModelArchitectureConfig(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        vocab_size=50_257,
        block_size=1024,
        normalization="layernorm",
        norm_eps=1e-5,
        activation="gelu_tanh",
        ffn_type="standard",
        position_encoding="learned_absolute",
        bias=True,
        weight_tying=True,
    )


def _llama2(n_layer: int, n_embd: int, n_head: int, d_ff: int, *, key_heads: int) -> ModelArchitectureConfig:
    return ModelArchitectureConfig(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        num_key_value_heads=key_heads,
        d_ff=d_ff,
        vocab_size=32_000,
        block_size=4096,
        norm_eps=1e-5,
    )


def _llama3(n_layer: int, n_embd: int, n_head: int, d_ff: int) -> ModelArchitectureConfig:
    base = _llama2(n_layer, n_embd, n_head, d_ff, key_heads=8)
    return dataclasses.replace(base, vocab_size=128_256, block_size=8192, rope_theta=500_000.0)


PRESETS: dict[str, ModelArchitectureConfig] = {
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12288, tied=False),
    "qwen3-14b": _qwen3(40, 5120, 40, 17408, tied=False),
    "qwen3-32b": _qwen3(64, 5120, 64, 25600, tied=False),
    "sft-qwen3-1.8b": ModelArchitectureConfig(
        n_layer=24,
        n_head=16,
        n_embd=2048,
        num_key_value_heads=8,
        d_ff=6144,
        vocab_size=151_669,
        block_size=2048,
        rope_theta=1_000_000.0,
    ),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "llama-2-7b": _llama2(32, 4096, 32, 11008, key_heads=32),
    "llama-2-13b": _llama2(40, 5120, 40, 13824, key_heads=40),
    "llama-2-70b": _llama2(80, 8192, 64, 28672, key_heads=8),
    "llama-3-8b": _llama3(32, 4096, 32, 14336),
    "llama-3-70b": _llama3(80, 8192, 64, 28672),
}
