"""Patterns of a run's state: what is like them, and what is said of what is not."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from energy_prior.training.state import (
    Each,
    Either,
    Given,
    Optional,
    Such,
    named_like,
    number,
    positive,
    random_stream,
    tensor,
    unlike,
    whole,
)

ONES = torch.ones(2, 3)
MASKED = torch.tensor([0.0, -math.inf])
STREAM = torch.Generator().get_state()
BROKEN = STREAM.clone()
BROKEN[:] = 255
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]

ALIKE: list[tuple[Any, Any]] = [
    (ONES, ONES * 3),
    (MASKED, MASKED),
    ([ONES, ONES], [ONES, ONES]),
    ((ONES,), [ONES]),
    ([], []),
    ({"a": ONES}, {"a": ONES}),
    ({"a": Optional(ONES)}, {}),
    ({"a": Optional(ONES)}, {"a": ONES}),
    (Given({"a": number}), {"a": 1, "b": "x"}),
    (Each(list, number), []),
    (Each(list, Each(dict, number), least=1), [{"a": 1.5, "b": math.nan}]),
    (Either(({}, {"a": number})), {}),
    (Either(({}, {"a": number})), {"a": 1}),
    (Either((None, "eager")), None),
    (Either((None, "eager")), "eager"),
    (number, -3),
    (number, math.inf),
    (positive, 0.1),
    (whole(), 0),
    (whole(3), 2),
    (tensor, ONES),
    (random_stream, STREAM),
]
UNLIKE: list[tuple[Any, Any, str]] = [
    (ONES, ONES[0], r"state is a tensor of torch.float32 and shape \(3,\) instead of a tensor of .* \(2, 3\)"),
    (ONES, ONES.double(), "state is a tensor of torch.float64"),
    (ONES, 1.0, "state is 1.0 instead of a tensor"),
    (ONES, ONES / 0, "state is not finite"),
    (ONES, ONES * math.nan, "state is not finite"),
    ([ONES, ONES], [ONES], "state is a list of 1 instead of a list of 2"),
    ([ONES], {"0": ONES}, "state is a dict of 1 instead of a list of 1"),
    ([ONES, ONES], [ONES, ONES[0]], "state/1 is a tensor"),
    ({"a": {"b": ONES}}, {"a": {"b": 3}}, "state/a/b is 3 instead of a tensor"),
    ({"a": ONES}, {}, "state lacks a"),
    ({"a": ONES}, {"a": ONES, "x" * 1000: 1}, "state has x{100}…, which is not expected"),
    ({"a": ONES}, [ONES], "state is a list of 1 instead of a dict"),
    ({"a": ONES}, None, "state is None instead of a dict"),
    ({"a": Optional(ONES)}, {"a": None}, "state/a is None instead of a tensor"),
    (Given({"a": number}), {"b": 1}, "state lacks a"),
    (Each(list, number), [1, "x"], "state/1 is 'x' instead of a number"),
    (Each(list, number, least=1), [], "state is a list of 0 instead of a list of at least 1"),
    (Each(dict, number), [1], "state is a list of 1 instead of a dict of at least 0"),
    (Each(dict, number), {"a": None}, "state/a is None instead of a number"),
    (Either((None, "eager")), "other", "state is 'other' instead of 'eager'"),
    (Either((None, "eager")), 3, "state is 3 instead of 'eager'"),
    (number, True, "state is True instead of a number"),
    (number, "1", "state is '1' instead of a number"),
    (number, ONES, "state is a tensor of torch.float32 .* instead of a number"),
    (positive, 0, "state is 0 instead of a finite number above 0"),
    (positive, math.inf, "state is inf instead of a finite number above 0"),
    (positive, math.nan, "state is nan instead of a finite number above 0"),
    (whole(), -1, "state is -1 instead of a whole number"),
    (whole(), 1.0, "state is 1.0 instead of a whole number"),
    (whole(), True, "state is True instead of a whole number"),
    (whole(3), 3, "state is 3 instead of a whole number"),
    (whole(), 10**6000 * 0 - 10**6000, "state is a int instead of a whole number"),
    (tensor, [1], "state is a list of 1 instead of a tensor"),
    (random_stream, ONES, "state is a tensor of .* instead of the state of a random stream"),
    (random_stream, STREAM[:-1], "state is a tensor of .* instead of the state of a random stream"),
    (random_stream, BROKEN, "state is a tensor of .* instead of the state of a random stream"),
    (random_stream, None, "state is None instead of the state of a random stream"),
    (Such(lambda v: False, "nothing"), "x" * 10_000, "state is 'x{99}… instead of nothing"),
    (ONES, DEEP, "state is a list of 1 instead of a tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("like", "got"), ALIKE, ids=range(len(ALIKE)))
def test_alike(like: Any, got: Any) -> None:
    assert unlike(got, like) is None


@pytest.mark.parametrize(("like", "got", "words"), UNLIKE, ids=range(len(UNLIKE)))
def test_unlike(like: Any, got: Any, words: str) -> None:
    fault = unlike(got, like)
    assert fault is not None
    assert len(fault) < 400
    assert re.match(words, fault), fault


def test_extra_states_may_be_of_any_shape() -> None:
    class Kept(nn.Module):
        def get_extra_state(self) -> Tensor:
            return torch.zeros(3)

        def set_extra_state(self, state: Tensor) -> None:
            pass

    like = named_like(nn.Sequential(Kept(), nn.Linear(1, 1)))
    assert unlike({"0._extra_state": torch.ones(7), "1.weight": torch.ones(1, 1), "1.bias": torch.ones(1)}, like) is None
    assert unlike({"0._extra_state": torch.ones(7), "1.weight": torch.ones(1, 2), "1.bias": torch.ones(1)}, like) is not None
