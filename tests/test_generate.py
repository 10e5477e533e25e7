import math

import pytest
import torch
from torch import Tensor

from model_builder import ConfigurableGPT
from sft.attention import Documents
from sft.errors import UserError
from sft.generate import Generation, Sampling, generate, stream
from tests.tiny import tiny_model

NEVER: tuple[int, ...] = ()
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [3, 4], [20, 21, 22]]


def lively(**changes: object) -> ConfigurableGPT:
    model = tiny_model(**changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 if "norm" in name else 12.0)
    return model


def continued_without_cache(model: ConfigurableGPT, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "changes",
    [{}, {"position_encoding": "learned_absolute"}, {"num_key_value_heads": 4, "rope_layout": "interleaved"}],
)
def test_cached_logits_equal_uncached_ones_in_a_batch_of_uneven_prompts(changes: dict):
    model = lively(**changes).eval()
    rows = torch.randint(97, (3, 24), generator=torch.Generator().manual_seed(0))
    pads = torch.tensor([0, 5, 11])
    real = (torch.arange(24) >= pads[:, None]).int()
    cache, parts, seen = model.new_cache(), [], 0
    for count in (14, 1, 1, 4, 1, 3):  # a prompt, single tokens, and several at once
        seen += count
        documents = Documents(real[:, :seen], queries=count)
        parts.append(model.hidden_states(rows[:, seen - count : seen], documents=documents, cache=cache))
    cached = torch.cat(parts, dim=1) @ model.head_weight.T
    for row, pad in enumerate(pads.tolist()):
        alone = model(rows[row : row + 1, pad:])[0]
        assert alone.std() > 0.5
        assert (cached[row, pad:] - alone).abs().max() <= 3e-5


@pytest.mark.parametrize("changes", [{}, {"position_encoding": "learned_absolute"}])
def test_greedy_answers_are_those_of_the_model_called_again_and_again(changes: dict):
    model = lively(**changes)
    answers = generate(model, PROMPTS, max_new_tokens=20, stop_ids=NEVER)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer == Generation(continued_without_cache(model, prompt, 20), stopped=False)
    assert model.training  # as it was


def test_an_answer_ends_before_its_stop_id_while_the_others_go_on():
    model = lively()
    free = [answer.ids for answer in generate(model, PROMPTS, max_new_tokens=12, stop_ids=NEVER)]
    stops = {free[0][3], free[2][0]}
    answers = generate(model, PROMPTS, max_new_tokens=12, stop_ids=stops)
    assert answers[2] == Generation([], stopped=True)
    assert len(answers[0].ids) <= 3
    for whole, answer in zip(free, answers, strict=True):
        end = next((i for i, token in enumerate(whole) if token in stops), None)
        assert answer == Generation(whole[:end], stopped=end is not None)


def test_rows_that_have_stopped_are_computed_no_more(monkeypatch: pytest.MonkeyPatch):
    model = lively()
    free = [answer.ids for answer in generate(model, PROMPTS, max_new_tokens=12, stop_ids=NEVER)]
    widths: list[int] = []
    original = model.hidden_states

    def counting(ids: Tensor, *given: object, **named: object) -> Tensor:
        widths.append(ids.shape[0])
        return original(ids, *given, **named)

    monkeypatch.setattr(model, "hidden_states", counting)
    answers = generate(model, PROMPTS, max_new_tokens=12, stop_ids={ids[2] for ids in free[:4]})
    assert sum(widths) == sum(min(len(answer.ids) + 1, 12) for answer in answers)


def test_a_seed_fixes_the_draws_whatever_is_batched_together():
    model = lively()
    options = {"max_new_tokens": 10, "stop_ids": NEVER, "temperature": 1.0}
    state = torch.get_rng_state()
    first = generate(model, PROMPTS, **options, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == generate(model, PROMPTS, **options, seed=3)
    assert first == generate(model, PROMPTS, **options, seed=3, rows_at_once=2)
    assert first != generate(model, PROMPTS, **options, seed=4)


def test_streaming_gives_the_same_ids_one_by_one():
    model = lively()
    options = {"max_new_tokens": 10, "temperature": 0.8, "top_p": 0.9, "seed": 2}
    whole = generate(model, PROMPTS[:1], stop_ids=NEVER, **options)[0].ids
    assert list(stream(model, PROMPTS[0], stop_ids=NEVER, **options)) == whole
    stop = whole[4]
    end = whole.index(stop)
    assert list(stream(model, PROMPTS[0], stop_ids={stop}, **options)) == whole[: end + 1]


def frequencies(sampling: Sampling, logits: Tensor, draws: int = 40_000) -> Tensor:
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.bincount(sampling.choose(logits.expand(draws, -1), uniform), minlength=logits.shape[-1]) / draws


def test_draws_follow_the_tempered_probabilities():
    logits = torch.tensor([[2.0, -1.0, 0.5, 1.0, -math.inf]])
    for temperature in (0.5, 1.0, 2.0):
        expected = torch.softmax(logits[0] / temperature, dim=-1)
        measured = frequencies(Sampling(temperature=temperature), logits)
        assert (measured - expected).abs().max() < 0.01
        assert measured[4] == 0


def test_top_k_and_top_p_keep_only_the_likeliest():
    shares = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]])
    logits = shares.log()
    three = torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85
    two = torch.tensor([0, 0.4, 0, 0.3, 0]) / 0.7
    for sampling, expected in (
        (Sampling(temperature=1.0, top_k=3), three),
        (Sampling(temperature=1.0, top_k=99), shares[0]),
        (Sampling(temperature=1.0, top_p=0.75), three),  # 0.4 + 0.3 is not enough
        (Sampling(temperature=1.0, top_p=0.65), two),
        (Sampling(temperature=1.0, top_p=1e-6), torch.eye(5)[1]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.8), two),  # of the three that top_k leaves
        (Sampling(top_k=3), torch.eye(5)[1]),
    ):
        assert (frequencies(sampling, logits) - expected).abs().max() < 0.01, sampling


def test_learned_positions_end_an_answer_and_that_is_said():
    model = lively(position_encoding="learned_absolute", block_size=10)
    short, long, full = [1, 2, 3], [1] * 9, [2] * 10
    answers = generate(model, [short, long, full], max_new_tokens=20, stop_ids=NEVER)
    assert [len(answer.ids) for answer in answers] == [8, 2, 1]  # the last token needs no position
    assert all(answer.out_of_positions and not answer.stopped for answer in answers)
    assert not generate(model, [short], max_new_tokens=8, stop_ids=NEVER)[0].out_of_positions
    with pytest.raises(
        UserError, match="the model has 10 positions:\n  a prompt has 12 tokens\n  a prompt has 11 tokens"
    ):
        generate(model, [short, [1] * 12, [1] * 11], max_new_tokens=1, stop_ids=NEVER)


def test_rotary_positions_go_beyond_block_size():
    model = lively(block_size=4)
    assert len(generate(model, [[1, 2, 3]], max_new_tokens=20, stop_ids=NEVER)[0].ids) == 20
