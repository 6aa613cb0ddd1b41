"""Which rows make up each batch: drawn anew in each epoch, shared out over the processes, on request by length."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from ..data.dataset import MMCLIPDataset


BATCHES_SORTED_TOGETHER = 50  # so many are drawn at random before their rows are sorted by length


class MMCLIPBatchSampler(Sampler[list[int]]):
    """Row numbers of this process for each batch of `dataset.epoch`.

    The batch that counts has `batch_size` rows in each of `num_processes` processes; together they hold the same rows
    in the same order as one process with the whole batch would. The last batch of an epoch is shared out as evenly as
    it goes, nothing is repeated, and rows too few to go round join the batch before; with `drop_last` it is left out.

    With `text_lengths` (n,), of any unit, batches hold texts of like length, which saves padding. It makes the texts of
    a batch more alike than chance would, as short reports are mostly normal ones. Rows of length -1, which get a prompt
    in place of a report, are spread evenly. Raises ValueError where not even one batch can be shared out.
    """

    def __init__(
        self,
        dataset: MMCLIPDataset,
        batch_size: int,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        drop_last: bool = False,
        text_lengths: np.ndarray | None = None,
    ):
        needed = num_processes * (batch_size if drop_last else 1)
        if len(dataset) < needed:
            raise ValueError(
                f"{len(dataset)} training rows make no batch of {needed}, "
                + ("`per_device_train_batch_size` times" if drop_last else "one row for each of the")
                + " processes. Lower it, start fewer processes, or leave out `dataloader_drop_last`."
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index
        self.drop_last = drop_last
        self.text_lengths = text_lengths

    def __len__(self) -> int:
        whole, rest = divmod(len(self.dataset), self.batch_size * self.num_processes)
        return whole + int(not self.drop_last and (rest >= self.num_processes or not whole))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches():
            yield batch.tensor_split(self.num_processes)[self.process_index].tolist()

    def _batches(self) -> list[torch.Tensor]:
        """The rows of each batch over all processes."""
        generator = torch.Generator().manual_seed(self.seed + self.dataset.epoch)
        order = torch.randperm(len(self.dataset), generator=generator)
        total = self.batch_size * self.num_processes
        if self.text_lengths is not None:
            order = self._by_length(order, total, generator)
        batches = list(order.split(total))
        if len(batches) > len(self):
            rest = batches.pop()
            if not self.drop_last:
                batches[-1] = torch.cat([batches[-1], rest])
        return batches

    def _by_length(self, order: torch.Tensor, total: int, generator: torch.Generator) -> torch.Tensor:
        lengths = torch.as_tensor(np.asarray(self.text_lengths))[order]
        known = lengths[lengths >= 0]
        if len(known):
            drawn = known[torch.randint(len(known), (len(order),), generator=generator)]
            lengths = torch.where(lengths < 0, drawn, lengths)
        whole, parts = len(order) // total * total, []
        for start in range(0, whole, BATCHES_SORTED_TOGETHER * total):
            part = slice(start, min(start + BATCHES_SORTED_TOGETHER * total, whole))
            batches = order[part][lengths[part].argsort(stable=True)].view(-1, total)
            batches = batches[torch.randperm(len(batches), generator=generator)]
            parts.append(batches[:, torch.randperm(total, generator=generator)].flatten())  # no process has the longest
        return torch.cat([*parts, order[whole:]])
