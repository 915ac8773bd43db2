"""Data as programs take them: what is cut into batches, and what is passed whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from gumbo.errors import BadInput
from gumbo.guides import NormalGuide, amortize
from gumbo.inference import evaluate, fit
from gumbo.inference.engine.rows import Rows, arguments_of, given_arguments
from gumbo.models import GaussianVAE

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


ARRAY = np.arange(6.0).reshape(3, 2)


@pytest.mark.parametrize("given", [ARRAY.astype(">f4"), ARRAY[::-1][::-1], np.asfortranarray(ARRAY), ARRAY[::-1]])
def test_an_array_is_read_in_any_byte_order_and_direction(given):
    rows = Rows({"x": given}).check()
    (array,), _ = given_arguments((given,), {})
    for value in (rows.kwargs["x"], rows[torch.tensor([0, 1, 2])].kwargs["x"], array):
        assert torch.equal(torch.as_tensor(value).double(), torch.tensor(given.tolist(), dtype=torch.float64))


def test_a_mapped_file_that_torch_cannot_read_is_refused_in_one_line(tmp_path):
    ARRAY.astype(">f8").tofile(tmp_path / "x")
    for dtype, step in ((">f8", 1), ("<f8", -1)):
        with pytest.raises(BadInput, match="^data: argument 0 is a memory-mapped array of .f8 with strides.*a copy"):
            Rows(np.memmap(tmp_path / "x", dtype, "r", shape=(3, 2))[::step])


def test_a_masked_array_is_refused_where_its_mask_hides_something():
    Rows(np.ma.masked_array(ARRAY, mask=False)).check()
    for call in (Rows, lambda data: given_arguments((data,), {})):
        with pytest.raises(BadInput, match=r"^data: argument 0 is a masked array, whose mask would be lost; pass"):
            call(np.ma.masked_array(ARRAY, mask=ARRAY > 4))


class Table:
    """What tables of other libraries have."""

    def to_numpy(self):
        return ARRAY


def test_a_table_alone_is_refused_and_beside_rows_it_is_passed_whole():
    with pytest.raises(
        BadInput, match=r"^train: argument 0 is a \w+ Table, of which no batch .*pass .to_numpy\(.float32.\)$"
    ):
        Rows(Table(), "train").check()
    table = Table()
    assert Rows((X, table)).check()[:2].args[1] is table


@pytest.mark.parametrize("kind", ["f4", ">f4", "f8", "i8", "?"])
def test_programs_receive_an_array_of_numbers_as_a_tensor_of_its_type(kind):
    array = ARRAY.astype(kind)
    (found,) = Rows(array).args
    assert isinstance(found, torch.Tensor) and found.tolist() == array.tolist()
    assert found.dtype == torch.from_numpy(ARRAY.astype(kind.strip(">"))).dtype
    words = np.array(["a"] * len(X))
    assert Rows((X, words)).args[1] is words


def test_arrays_train_the_programs_of_the_collection_and_make_a_guide():
    x = (np.random.default_rng(0).random((12, 1, 2, 2)) < 0.4).astype("float32")
    model = GaussianVAE((1, 2, 2), latent_dim=2, hidden=(3,))
    guides = [NormalGuide(model), amortize(model, x, quiet=True)]
    for guide in guides:
        fit(model, guide, x, epochs=1, progress=False)
        assert evaluate(model, guide, x, num_samples=2) == evaluate(model, guide, torch.tensor(x), num_samples=2)
    with pytest.raises(BadInput, match="^amortize: argument 0 is a test_rows Table"):
        amortize(model, Table(), quiet=True)


def test_rows_lose_their_gradients_and_what_learns_is_refused():
    leaf = X.clone().requires_grad_()
    kept = torch.nn.Parameter(torch.ones(5))
    rows = Rows((leaf, kept)).without_gradients()
    assert not rows.args[0].requires_grad and rows.args[1] is kept
    for learned in (torch.nn.Parameter(X.clone()), 2 * leaf):
        with pytest.raises(BadInput, match=r"^data: argument 'x' requires gradients.*pass x.detach\(\)$"):
            Rows({"x": learned}).without_gradients()
