"""The sequence of meta-batches: networks drawn, their graphs written and batched, ahead of the compute.

Network i of the sequence is a function of the seed and i. A meta-batch is made of the next
networks that pass the filters; where it ends in the sequence is all that a checkpoint has to keep.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ghn_init._errors import TrainingError
from ghn_init._hypernetwork.batch import GraphBatch
from ghn_init.deepnets import Architecture, DeepNets1M, Stream, training_width
from ghn_init.training._ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from torch import nn

    from ghn_init._graph.graph import Graph
    from ghn_init.training._config import TrainConfig

T = TypeVar("T")

_WIDTHS = 1_000
"""The family of random streams that draws widths; the splits use small numbers."""

_NORMS = 1_001
"""That which draws the networks that lose their batch norms."""

_SHARES = 10_000
"""Shares are told apart to one in so many."""

_WINDOW = 32
"""Meta-batches that are sorted by cost together: of two processes each then waits for 6 % of its time."""

_NODE, _PARAMETER = 60_000, 9
"""Elements of feature maps, of all images together, that take as long as a node or a parameter does.

Of 130 steps of a GHN-3 T on 64 images of 16 x 16, one thread; the correlation with their CPU time is 0.97.
"""

_PATIENCE = 50
"""Windows in a row from which the filters may leave nothing before that is an error."""

_FULL_SIZE = 32
"""Side of images of full size, on which a network is measured to draw its width and to filter it."""

_GROWTH = 20
"""A curriculum's largest network at its end, as a multiple of that at its beginning: no limit in effect."""


@dataclass(frozen=True)
class Task:
    """One network of a meta-batch.

    Attributes:
        index: Its place in the sequence.
        architecture: What to build, with the width that was drawn.
    """

    index: int
    architecture: Architecture

    def build(self, num_classes: int, image_size: int) -> nn.Module:
        """The network on the meta device, without running statistics."""
        with torch.device("meta"):
            return self.architecture.build(num_classes, image_size, running_stats=False)

    def cost(self, config: TrainConfig, image_size: int) -> float:
        """What the time of its step goes by, in elements of feature maps."""
        architecture = self.architecture
        elements = architecture.activations() * config.batch_size * (image_size / _FULL_SIZE) ** 2
        params = architecture.num_params(config.ghn.num_classes, image_size)
        return elements + _NODE * architecture.num_nodes() + _PARAMETER * params

    def identity(self, num_classes: int, image_size: int) -> dict[str, Any]:
        """Its place and size, and what `Architecture.from_net_args` makes it from; JSON-ready."""
        architecture = self.architecture
        return {
            "index": self.index,
            "nodes": architecture.num_nodes(),
            "params": architecture.num_params(num_classes, image_size),
            "net_args": architecture.to_net_args(),
        }


@dataclass(frozen=True)
class MetaBatch:
    """The networks of one step.

    Attributes:
        tasks: Those of this process.
        graphs: Their graphs as arrays.
        group: Those of all processes, see `Ranks.share`.
        stop: Where the sequence goes on after them.
    """

    tasks: tuple[Task, ...]
    graphs: GraphBatch
    group: tuple[Task, ...]
    stop: int


class MetaBatches:
    """Meta-batches from network `start` of the sequence on, for networks on images of `image_size`.

    Of every meta-batch a process builds only its share.
    """

    def __init__(
        self, config: TrainConfig, image_size: int, start: int = 0, ranks: Ranks | None = None
    ) -> None:
        self.config, self.image_size, self.position = config, image_size, start
        self.ranks = ranks or Ranks()
        self.networks = DeepNets1M("train", seed=config.seed)

    def __iter__(self) -> Iterator[MetaBatch]:
        """Meta-batches, window by window.

        Networks that are run side by side should take equally long, so each window of it is
        sorted by cost and cut into meta-batches, which then come in an order of their own. Position
        `window * size + n` stands for the n-th meta-batch of a window.
        """
        size = _WINDOW * self.config.meta_batch
        fruitless = 0
        while fruitless < _PATIENCE:
            window, done = divmod(self.position, size)
            groups = self._groups(range(window * size, (window + 1) * size))
            fruitless += 1
            for turn in range(done, len(groups)):
                last = turn == len(groups) - 1
                self.position = (window + 1) * size if last else window * size + turn + 1
                if sum(task.architecture.num_nodes() for task in groups[turn]) <= self.config.max_nodes:
                    fruitless = 0
                    yield self._meta_batch(groups[turn])
            self.position = (window + 1) * size
        raise TrainingError(
            f"{_PATIENCE * size} networks without a meta-batch that passes "
            f"max_nodes={self.config.max_nodes}, max_params={self.config.max_params:g} and the curriculum; "
            f"expected wider limits, or fewer networks a step than meta_batch={self.config.meta_batch}"
        )

    def _groups(self, indices: range) -> list[list[Task]]:
        """The networks of a window that pass the filters, in meta-batches of similar cost."""
        many = self.config.meta_batch
        tasks = [task for index in indices if (task := self._task(index)) is not None]
        tasks = tasks[: len(tasks) // many * many]
        tasks.sort(key=lambda task: task.cost(self.config, self.image_size))
        groups = [tasks[start : start + many] for start in range(0, len(tasks), many)]
        # By the place of one member in the sequence, which has nothing to do with its cost.
        return sorted(groups, key=lambda group: group[0].index)

    def tasks(self) -> Iterator[Task]:
        """The networks of the sequence that pass the filters, from its beginning."""
        return (task for index in itertools.count() if (task := self._task(index)) is not None)

    def graphs(self, count: int) -> list[Graph]:
        """Graphs of the first `count` of `tasks`."""
        return [self._graph(task) for task in itertools.islice(self.tasks(), count)]

    def _meta_batch(self, group: list[Task]) -> MetaBatch:
        tasks = self.ranks.share(group)
        try:
            batch = GraphBatch.from_graphs([self._graph(task) for task in tasks], self.config.ghn)
        except Exception as error:  # so that the run ends with a checkpoint, whatever it is
            indices = ", ".join(str(task.index) for task in tasks)
            raise TrainingError(
                f"networks {indices} of the sequence of seed {self.config.seed} cannot be prepared: "
                f"{type(error).__name__}: {error}"
            ) from error
        return MetaBatch(tuple(tasks), batch, tuple(group), self.position)

    def _graph(self, task: Task) -> Graph:
        return task.architecture.graph(self.config.ghn.num_classes, self.image_size)

    def _task(self, index: int) -> Task | None:
        """Network `index` of the sequence, or None if a filter leaves it out."""
        config, architecture = self.config, self.networks[index]
        assert isinstance(architecture, Architecture)  # the training split has nothing else
        width, fc_dim = training_width(architecture, Stream(config.seed, _WIDTHS, index), _FULL_SIZE)
        norm = None if self._loses_norms(index) else architecture.norm
        architecture = replace(architecture, C=width, fc_dim=fc_dim, norm=norm)
        num_params = architecture.num_params(config.ghn.num_classes, _FULL_SIZE)
        fits = (
            architecture.supports(self.image_size)
            and num_params <= 1e6 * (config.max_params or math.inf)
            and architecture.num_nodes() <= min(self._largest(index), config.max_nodes)
        )
        return Task(index, architecture) if fits else None

    def _loses_norms(self, index: int) -> bool:
        share = round(self.config.norm_free * _SHARES)
        return share > 0 and Stream(self.config.seed, _NORMS, index).chance(share, _SHARES)

    def _largest(self, index: int) -> float:
        """Nodes of the largest network allowed at this place: grows geometrically over the curriculum."""
        if index >= self.config.curriculum:
            return math.inf
        return self.config.curriculum_nodes * _GROWTH ** (index / self.config.curriculum)


def ahead(items: Iterator[T], count: int) -> Generator[T, None, None]:
    """The same items in the same order, `count` of them made ahead in a thread, or none.

    To be closed at the end, which ends the thread. An exception is raised where its item would have come.
    """
    if not count:
        yield from items
        return
    executor = ThreadPoolExecutor(1)
    try:
        coming = deque(executor.submit(next, items) for _ in range(count))
        while True:
            coming.append(executor.submit(next, items))
            yield coming.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)
