"""The sequence of meta-batches: networks drawn, their graphs written and batched, ahead of the compute.

Network i of the sequence is a function of the seed and i. A meta-batch is made of the next
networks that pass the filters; where it ends in the sequence is all that a checkpoint has to keep.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ghn_init._errors import TrainingError
from ghn_init._hypernetwork.batch import GraphBatch
from ghn_init.deepnets import Architecture, DeepNets1M, Stream, training_width
from ghn_init.training._ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from torch import nn

    from ghn_init._graph.graph import Graph
    from ghn_init.training._config import TrainConfig

_WIDTHS = 1_000
"""The family of random streams that draws widths; the splits use small numbers."""

_WINDOW = 8
"""Meta-batches that are sorted by cost together."""

_PATIENCE = 50
"""Windows in a row from which the filters may leave nothing before that is an error."""

_FULL_SIZE = 32
"""Widths and filters go by a network's parameters on images of this side, whatever it is trained on."""

_GROWTH = 20
"""A curriculum's largest network at its end, as a multiple of that at its beginning: no limit in effect."""


@dataclass(frozen=True)
class Task:
    """One network of a meta-batch.

    Attributes:
        index: Its place in the sequence.
        architecture: What to build, with the width that was drawn.
        num_params: Its parameters, used or not.
    """

    index: int
    architecture: Architecture
    num_params: int

    @property
    def cost(self) -> int:
        """What its time goes by, roughly; no unit."""
        return self.architecture.activations()

    def build(self, num_classes: int, image_size: int) -> nn.Module:
        """The network on the meta device, without running statistics."""
        with torch.device("meta"):
            return self.architecture.build(num_classes, image_size, running_stats=False)


@dataclass(frozen=True)
class MetaBatch:
    """The networks of one step, their graphs as arrays, and where the sequence goes on after them."""

    tasks: tuple[Task, ...]
    graphs: GraphBatch
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
                    yield self._meta_batch(self.ranks.share(groups[turn]))
            self.position = (window + 1) * size
        raise TrainingError(
            f"{_PATIENCE * size} networks without a meta-batch that passes "
            f"max_nodes={self.config.max_nodes}, max_params={self.config.max_params:g} and the curriculum; "
            "expected wider limits"
        )

    def _groups(self, indices: range) -> list[list[Task]]:
        """The networks of a window that pass the filters, in meta-batches of similar cost."""
        many = self.config.meta_batch
        tasks = [task for index in indices if (task := self._task(index)) is not None]
        tasks = sorted(tasks[: len(tasks) // many * many], key=lambda task: task.cost)
        groups = [tasks[start : start + many] for start in range(0, len(tasks), many)]
        # By the place of one member in the sequence, which has nothing to do with its cost.
        return sorted(groups, key=lambda group: group[0].index)

    def tasks(self) -> Iterator[Task]:
        """The networks of the sequence that pass the filters, from its beginning."""
        return (task for index in itertools.count() if (task := self._task(index)) is not None)

    def graphs(self, count: int) -> list[Graph]:
        """Graphs of the first `count` of `tasks`."""
        return [self._graph(task) for task in itertools.islice(self.tasks(), count)]

    def _meta_batch(self, tasks: list[Task]) -> MetaBatch:
        batch = GraphBatch.from_graphs([self._graph(task) for task in tasks], self.config.ghn)
        return MetaBatch(tuple(tasks), batch, self.position)

    def _graph(self, task: Task) -> Graph:
        return task.architecture.graph(self.config.ghn.num_classes, self.image_size)

    def _task(self, index: int) -> Task | None:
        """Network `index` of the sequence, or None if a filter leaves it out."""
        config, architecture = self.config, self.networks[index]
        assert isinstance(architecture, Architecture)  # the training split has nothing else
        width, fc_dim = training_width(architecture, Stream(config.seed, _WIDTHS, index), _FULL_SIZE)
        architecture = replace(architecture, C=width, fc_dim=fc_dim)
        num_params = architecture.num_params(config.ghn.num_classes, _FULL_SIZE)
        if not architecture.supports(self.image_size):
            return None
        if config.max_params and num_params > config.max_params * 1e6:
            return None
        if architecture.num_nodes() > min(self._largest(index), config.max_nodes):
            return None
        return Task(index, architecture, num_params)

    def _largest(self, index: int) -> float:
        """Nodes of the largest network allowed at this place: grows geometrically over the curriculum."""
        if index >= self.config.curriculum:
            return float("inf")
        return self.config.curriculum_nodes * _GROWTH ** (index / self.config.curriculum)


class Prefetcher:
    """Makes `MetaBatches` in a second process, `config.prefetch` meta-batches ahead; or in this one.

    A context manager and an iterator. Order and content do not depend on the process.
    """

    def __init__(
        self, config: TrainConfig, image_size: int, start: int = 0, ranks: Ranks | None = None
    ) -> None:
        self._batches = MetaBatches(config, image_size, start, ranks)
        self._ahead = config.prefetch
        self._process: BaseProcess | None = None

    def __enter__(self) -> Prefetcher:
        if self._ahead:
            context = multiprocessing.get_context("spawn")
            self._receiver, sender = context.Pipe(duplex=False)
            arguments = (self._batches, sender, self._ahead)
            self._process = context.Process(target=_produce, args=arguments, daemon=True)
            self._process.start()
            sender.close()  # so that the other process holds the only one, and its end ends the pipe
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._receiver.close()

    def __iter__(self) -> Iterator[MetaBatch]:
        if self._process is None:
            yield from self._batches
        while True:
            yield self._next()

    def _next(self) -> MetaBatch:
        try:
            item = pickle.loads(self._receiver.recv_bytes())
        except (EOFError, OSError):  # it ended between messages or within one
            raise TrainingError(
                "the process that prepares networks died, perhaps for want of memory; "
                "start the same command again to go on from the checkpoint"
            ) from None
        if isinstance(item, BaseException):
            raise TrainingError(f"preparing networks failed: {item}") from item
        return item


def _produce(batches: MetaBatches, sender: Connection, ahead: int) -> None:
    """The second process: sends meta-batches, or the exception that ended it.

    Signals to the whole group of processes are for the training process, which ends this one.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    ready: queue.Queue[bytes | None] = queue.Queue(ahead)
    thread = threading.Thread(target=_send, args=(ready, sender), daemon=True)
    thread.start()
    try:
        for batch in batches:
            ready.put(pickle.dumps(batch))
    except Exception as error:  # noqa: BLE001 (handed over and raised in the training process)
        ready.put(pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}")))
    ready.put(None)
    thread.join()


def _send(ready: queue.Queue[bytes | None], sender: Connection) -> None:
    try:
        # As bytes: tensors through a multiprocessing queue would each take a file descriptor.
        while (data := ready.get()) is not None:
            sender.send_bytes(data)
    except OSError:
        os._exit(1)  # the training process was killed: do not outlive it
