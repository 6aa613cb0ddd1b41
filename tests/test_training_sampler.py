import numpy as np
import pytest
import torch

from MMCLIP.training.sampler import MMCLIPBatchSampler


class Rows:
    """So many rows, in an epoch."""

    def __init__(self, number: int, epoch: int = 0):
        self.number, self.epoch = number, epoch

    def __len__(self):
        return self.number


def batches(number: int, batch_size: int, num_processes: int = 1, epoch: int = 0, **options) -> list[list[list[int]]]:
    """For each process its batches."""
    samplers = [
        MMCLIPBatchSampler(Rows(number, epoch), batch_size, 3, num_processes, rank, **options)
        for rank in range(num_processes)
    ]
    found = [list(sampler) for sampler in samplers]
    assert all(len(part) == len(sampler) for part, sampler in zip(found, samplers, strict=True))
    return found


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    first, second = (sum(batches(11, 4, epoch=epoch)[0], []) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(11)) and first != second
    assert first == torch.randperm(11, generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize(
    ("number", "first", "last"),
    [(16, [2, 2], [2, 2]), (21, [2, 2, 2], [2, 2, 1]), (19, [2, 3], [2, 2]), (5, [2], [1])],
    ids=["even", "an uneven rest", "a rest too small to go round", "less than a batch"],
)
def test_processes_share_out_the_batches_of_one_and_no_row_is_lost_or_repeated(number, first, last):
    parts = batches(number, 2, num_processes=4)
    assert [len(batch) for batch in parts[0]] == first and [len(batch) for batch in parts[-1]] == last
    together = [row for step in range(len(first)) for part in parts for row in part[step]]
    assert together == sum(batches(number, 8)[0], [])


def test_an_incomplete_batch_is_dropped_on_request():
    parts = batches(19, 2, num_processes=4, drop_last=True)
    assert [[len(batch) for batch in part] for part in parts] == [[2, 2]] * 4


def test_batches_by_length_hold_texts_of_like_length_and_still_every_row():
    lengths = np.random.default_rng(0).integers(10, 200, 400)
    grouped = batches(400, 8, text_lengths=lengths)[0]
    drawn = batches(400, 8)[0]

    def padding(rows: list[list[int]]) -> float:
        return sum(lengths[batch].max() * len(batch) for batch in rows) / lengths.sum() - 1

    assert sorted(sum(grouped, [])) == list(range(400)) and padding(grouped) < 0.1 < 0.5 < padding(drawn)
    means = [lengths[batch].mean() for batch in grouped]
    assert np.corrcoef(means, np.arange(len(means)))[0, 1] < 0.6, "short and long batches are mixed over the epoch"
    assert batches(400, 8, text_lengths=lengths, epoch=1)[0] != grouped


def test_rows_that_get_a_prompt_are_spread_over_batches_by_length():
    lengths = np.where(np.arange(400) % 4 == 0, -1, np.random.default_rng(0).integers(10, 200, 400))
    shares = [np.mean([row % 4 == 0 for row in batch]) for batch in batches(400, 20, text_lengths=lengths)[0]]
    assert 0 < min(shares) and max(shares) < 0.7
    assert sorted(sum(batches(40, 8, text_lengths=np.full(40, -1))[0], [])) == list(range(40))


def test_rows_that_do_not_go_round_are_an_error_that_says_what_to_change():
    with pytest.raises(ValueError, match="3 training rows make no batch of 4, one row for each of the processes"):
        MMCLIPBatchSampler(Rows(3), 2, num_processes=4)
    with pytest.raises(ValueError, match="6 training rows make no batch of 8, `per_device_train_batch_size` times"):
        MMCLIPBatchSampler(Rows(6), 4, num_processes=2, drop_last=True)
