"""Data as programs take them: what is cut into batches, and what is passed whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from gumbo.errors import BadInput
from gumbo.inference.engine.rows import Rows, arguments_of, given_arguments

X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([5, 6, 7])
PAIR, TABLE, LIST = (X, Y), {"x": X}, [X, Y]
PACKED = pack_sequence([torch.ones(3), torch.ones(2)])


@pytest.mark.parametrize(
    ("data", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, Y), (X, Y), {}),
        ({"x": X, "y": Y}, (), {"x": X, "y": Y}),
        ((PAIR,), (PAIR,), {}),
        ((TABLE,), (TABLE,), {}),
        (LIST, (LIST,), {}),
        (PACKED, (PACKED,), {}),
        (None, (None,), {}),
        (3, (3,), {}),
        ((), (), {}),
    ],
)
def test_a_tuple_is_positional_a_mapping_keywords_and_all_else_the_one_argument(data, args, kwargs):
    positional, keywords = arguments_of(data)
    assert [id(value) for value in positional] == [id(value) for value in args]
    assert keywords == kwargs
    assert [id(value) for value in given_arguments((data,), {})[0]] == [id(value) for value in args]
    rows = Rows(data)
    again, same = arguments_of(rows.data)  # the form survives a transform
    assert [id(value) for value in again] == [id(value) for value in args] and same == keywords


def test_only_values_with_n_rows_are_cut():
    table, array = torch.eye(2), np.arange(3)
    data = (X, None, Y, table, 7, {"k": Y}, PACKED, torch.tensor(2.0), array, [Y])
    rows = Rows(data)
    assert len(rows) == 3 and not rows.whole
    batch = rows[torch.tensor([2, 0])]
    assert torch.equal(batch.args[0], X[[2, 0]]) and torch.equal(batch.args[2], Y[[2, 0]])
    assert batch.args[8].tolist() == [2, 0]
    for place in (1, 3, 4, 5, 6, 7, 9):
        assert batch.args[place] is data[place]
    assert len(batch) == 2
    # A value that is passed whole stays whole though a batch happens to have as many rows.
    again = batch[:1]
    assert len(again.args[0]) == 1 and again.args[3] is table
    assert len(rows.repeated(2).args[8]) == 6 and rows.repeated(2).args[3] is table


def test_positional_arguments_and_keywords_share_their_rows():
    rows = Rows.of((X,), {"y": Y, "n": 3})
    batch = rows[1:]
    assert len(batch) == 2 and batch.kwargs["y"].tolist() == [6, 7] and batch.kwargs["n"] == 3


def test_data_without_rows_are_one_batch():
    rows = Rows((PACKED, None)).check()
    assert rows.whole and len(rows) == 1
    assert rows[torch.tensor([0])].args[0] is PACKED
    assert isinstance(rows.to("cpu").args[0], PackedSequence)
    assert Rows(()).whole and Rows(torch.tensor(1.0)).whole


def test_several_arguments_are_the_programs_own():
    assert given_arguments(((1, 2), 3), {"n": 1}) == (((1, 2), 3), {"n": 1})
    assert given_arguments(({"x": 1},), {"y": 2}) == ((), {"x": 1, "y": 2})
    with pytest.raises(BadInput, match="'x' is given twice"):
        given_arguments(({"x": 1},), {"x": 2})


def test_bad_rows_are_refused_in_one_line():
    with pytest.raises(BadInput, match="data is empty"):
        Rows(torch.zeros(0, 2)).check()
    with pytest.raises(BadInput, match="argument 'x' holds NaN or infinity in 1 of 2 rows"):
        Rows({"x": torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])}).check()
    with pytest.raises(BadInput, match="argument 0 holds NaN"):
        Rows(np.array([0.0, np.inf])).check()
