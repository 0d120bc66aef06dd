"""The order of the examples in which the processes of a run have equally much to do.

Processes wait for each other in every batch, and examples differ in length: with GSM8K's pairs, 8 processes
of 8 pairs each wait for 14 % of the time. Masks and loss do not depend on who computes an example, so the
examples of an optimizer step may be dealt out freely. Only their order inside the step changes: which step an
example belongs to is the same with and without it, and for any number of processes.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import Sampler


def balance(costs: Sequence[int], num_groups: int) -> list[list[int]]:
    """Deal items into groups of equal size so that the largest sum of costs is small.

    Longest processing time first (Graham 1969, with equal counts): from the largest item down, each goes to
    the group with the smallest sum that has room. Then items of the heaviest group are exchanged while its
    sum and the other's both end below what it was.

    Args: costs: at least 0, a multiple of num_groups of them.
    Returns: num_groups lists of indices, each with the largest cost first. A pure function of the costs.
    Errors: ValueError if the items do not divide into groups of one size.
    """
    if num_groups < 1 or len(costs) % num_groups:
        raise ValueError(f"{len(costs)} items do not divide into {num_groups} groups of one size")
    size = len(costs) // num_groups
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    room = [(0, number) for number in range(num_groups if size else 0)]
    sums = [0] * num_groups
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        _, number = heapq.heappop(room)
        groups[number].append(item)
        sums[number] += costs[item]
        if len(groups[number]) < size:
            heapq.heappush(room, (sums[number], number))
    for _ in range(len(costs)):
        heaviest = max(range(num_groups), key=sums.__getitem__)
        if not _exchange(costs, groups, sums, heaviest):
            break
    return [sorted(group, key=lambda item: (-costs[item], item)) for group in groups]


def _exchange(costs: Sequence[int], groups: list[list[int]], sums: list[int], heaviest: int) -> bool:
    """Swap the one pair of items that lowers the larger of two sums most; whether there was one."""
    best, found = sums[heaviest], None
    for other, group in enumerate(groups):
        if other == heaviest:
            continue
        for i, mine in enumerate(groups[heaviest]):
            for j, theirs in enumerate(group):
                moved = costs[mine] - costs[theirs]
                larger = max(sums[heaviest] - moved, sums[other] + moved)
                if moved > 0 and larger < best:
                    best, found = larger, (other, i, j)
    if found is None:
        return False
    other, i, j = found
    moved = costs[groups[heaviest][i]] - costs[groups[other][j]]
    groups[heaviest][i], groups[other][j] = groups[other][j], groups[heaviest][i]
    sums[heaviest] -= moved
    sums[other] += moved
    return True


class BalancedSampler(Sampler[int]):
    """The indices of another sampler, rearranged inside each optimizer step for `num_processes`.

    As accelerate deals them out (batch by batch of the sampler, in turn over the processes), all processes
    get examples of nearly equal total cost in every batch. The longest examples of a step come in its first
    batch, whose processes are then all long: one that is longer than a mean batch cannot be balanced by short
    ones. An epoch that does not fill its last batches is filled up from its beginning, as accelerate does.

    Args:
        sampler: gives the order of an epoch; `set_epoch` is passed on to it, if it has one.
        costs_of_epoch: epoch -> the cost of each example, an integer such as its packed tokens.
        batch_size: examples per process and batch; num_batches: batches per optimizer step.
        drop_last: leave out what does not fill a batch of all processes, instead of filling it up.
    """

    def __init__(
        self,
        sampler: Sampler[int],
        costs_of_epoch: Callable[[int], Sequence[int]],
        *,
        batch_size: int,
        num_processes: int,
        num_batches: int,
        drop_last: bool = False,
    ):
        self.sampler, self.costs_of_epoch = sampler, costs_of_epoch
        self.batch_size, self.num_processes, self.num_batches = batch_size, num_processes, num_batches
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    @property
    def _global_batch(self) -> int:
        return self.batch_size * self.num_processes

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self._global_batch)
        return self._global_batch * (whole + (rest > 0 and not self.drop_last))

    def __iter__(self) -> Iterator[int]:
        costs = self.costs_of_epoch(self.epoch)
        self.set_epoch(self.epoch)  # a sampler may count the epochs that it gave
        order = list(self.sampler)
        order += [order[index % len(order)] for index in range(len(self) - len(order))]
        window = self._global_batch * self.num_batches
        for start in range(0, len(self), window):
            yield from self._rearranged(order[start : min(start + window, len(self))], costs)

    def _rearranged(self, window: list[int], costs: Sequence[int]) -> Iterator[int]:
        # By length first: a batch of alike lengths is balanced better than a mixed one.
        ordered = sorted(range(len(window)), key=lambda place: (-costs[window[place]], place))
        for start in range(0, len(window), self._global_batch):
            batch = [window[place] for place in ordered[start : start + self._global_batch]]
            for group in balance([costs[index] for index in batch], self.num_processes):
                yield from (batch[place] for place in group)
