"""Rows of chunks against the tensor that they would be joined to."""

import pytest
import torch

from flowalign.conditions import cat_conditions
from flowalign.rows import Rows
from flowalign.types import Condition, Conditions
from tests.conditions import text_condition


def parts(dtype=torch.float32, sizes=(3, 1, 0, 4)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 2, 5, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_rows_in_any_order_and_with_repeats_are_those_of_the_joined_tensor(dtype):
    chunks = parts(dtype)
    rows, joined = Rows(chunks), torch.cat(chunks)
    assert rows.shape == joined.shape and rows.dtype == joined.dtype and len(rows) == len(joined) == 8
    generator = torch.Generator().manual_seed(1)
    for count in (0, 1, 5, 40):
        index, second = torch.randint(8, (count,), generator=generator), torch.randint(2, (count,), generator=generator)
        assert torch.equal(rows[index], joined[index])
        assert torch.equal(rows[index, second], joined[index, second])
        assert torch.equal(rows[index.reshape(1, -1)], joined[index.reshape(1, -1)])


def test_a_mask_a_slice_and_numbers_from_the_end_index_rows_too():
    chunks = parts()
    rows, joined = Rows(chunks), torch.cat(chunks)
    mask = torch.tensor([True, False, False, True, True, False, False, True])
    for index in (mask, slice(None), slice(2, 7), slice(1, None, 3), torch.tensor([-1, 0, -8])):
        assert torch.equal(rows[index], joined[index])
    for index in (5, (5, 1), (slice(2, 5), 1), (mask, 0), (torch.tensor([6, 1]), 1, 3)):
        assert torch.equal(rows[index], joined[index])


def test_what_is_gathered_is_a_copy_and_the_chunks_are_not():
    chunks = parts()
    rows = Rows([Rows(chunks[:2]), *chunks[2:]])
    rows[:].zero_()
    assert [part.data_ptr() for part in rows.parts] == [part.data_ptr() for part in chunks]
    assert torch.equal(rows[:], torch.cat(chunks)) and rows[:].any()


def test_a_row_that_is_not_there_is_an_error():
    with pytest.raises(IndexError):
        Rows(parts())[torch.tensor([8])]


@pytest.mark.parametrize("index", [[0, 1, 2, 3, 4], [4, 0, 3, 3], [2], []])
def test_conditions_of_chunks_give_what_the_joined_one_gives_with_the_used_prompts_alone(index: list[int]) -> None:
    def condition(rows: int, index_N: list[int], seed: int) -> Condition:
        own = torch.Generator().manual_seed(seed)
        tokens, pooled = torch.randn(rows, 3, 4, generator=own), torch.randn(rows, 2, generator=own)
        return text_condition(tokens, pooled, torch.tensor(index_N), torch.zeros(3, 4), torch.zeros(2))

    parts = condition(3, [2, 0, 2], 0), condition(2, [1, 1], 1)
    found, expected = (made.take(torch.tensor(index).long()) for made in (Conditions(parts), cat_conditions(parts)))
    assert len(found) == len(index) and len(Conditions(parts)) == 5
    assert all(torch.equal(a, b) for a, b in zip(found.expand().values(), expected.expand().values(), strict=True))
    assert found.num_prompts == len(set(expected.index_N.tolist()))
