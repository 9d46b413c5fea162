"""Training a GHN: meta-batches of networks on batches of images (arXiv 2110.13100, section 4)."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ghn_init._errors import TrainingError
from ghn_init._model import GHN
from ghn_init.training import _checkpoint
from ghn_init.training._config import TrainConfig
from ghn_init.training._engine import Engine, Job
from ghn_init.training._log import Log, Record
from ghn_init.training._ranks import Ranks
from ghn_init.training._schedule import learning_rate, progress
from ghn_init.training._stream import MetaBatch, Prefetcher
from ghn_init.training._validation import Validation
from ghn_init.training.data import Images, Normalisation, augment, batch_indices, generator, halve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CHECKPOINT = "checkpoint.pt"
_FIRST_STEPS = 100
"""Steps before the fraction of skipped ones is judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a run is kept and watched; none of it changes its result.

    Attributes:
        output: Folder for checkpoint, log and weights.
        time_limit: Seconds after which this part of the run stops cleanly, to be resumed; None: no limit.
        save_every: Seconds between checkpoints.
        validate_every: Seconds between quick validations; 0: none but the last.
        validation_networks: Held-out architectures of a quick validation.
        validation_images: Validation images of a quick validation.
        log_every: Steps between lines of the log.
    """

    output: Path
    time_limit: float | None = None
    save_every: float = 60.0
    validate_every: float = 300.0
    validation_networks: int = 12
    validation_images: int = 320
    log_every: int = 10


@dataclass
class State:
    """What changes during a run, beside weights and optimizer.

    Attributes:
        step: Optimizer steps tried, skipped ones included.
        skipped: Steps that were not taken because loss or gradient were not finite.
        position: Place in the stream of networks after the last step.
        seconds: Time spent training, over all parts of the run.
        networks: (network, batch) pairs run.
    """

    step: int = 0
    skipped: int = 0
    position: int = 0
    seconds: float = 0.0
    networks: int = 0


class Trainer:
    """One training run; takes up the checkpoint in `options.output` if there is one.

    Args:
        config: What to train, and how.
        images: Training images, hold-out already taken off.
        validation: Held-out images for quick validations.
        options: Where to keep it.

    Raises:
        TrainingError: The checkpoint there is damaged or belongs to another configuration.
    """

    def __init__(self, config: TrainConfig, images: Images, validation: Images, options: RunOptions) -> None:
        if len(images) < config.batch_size:
            raise TrainingError(
                f"{len(images)} training images; expected at least batch_size={config.batch_size}"
            )
        if len(images.classes) != config.ghn.num_classes:
            raise TrainingError(
                f"{len(images.classes)} classes of images; the GHN is configured for {config.ghn.num_classes}"
            )
        self.config, self.images, self.options = config, images, options
        self.ranks = Ranks.current()
        if config.meta_batch % self.ranks.world:
            raise TrainingError(
                f"meta_batch={config.meta_batch} networks cannot be shared evenly "
                f"by {self.ranks.world} processes"
            )
        self.normalise = Normalisation.of(images)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.ghn = GHN(config.ghn)
        self.average = {name: value.detach().clone() for name, value in self.ghn.state_dict().items()}
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        self.optimizer = kind(self.ghn.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.state = State()
        self.validation = Validation(
            validation, self.normalise, options.validation_networks, options.validation_images
        )
        if self.checkpoint.exists():
            self._resume()

    @property
    def checkpoint(self) -> Path:
        """Where the state of the run is kept."""
        return self.options.output / CHECKPOINT

    @property
    def done(self) -> float:
        """The fraction of the run that is over."""
        return progress(self.config, self.state.step, self.state.seconds)

    def run(self, on_step: Callable[[Record], None] | None = None) -> bool:
        """Train until the run is over or `time_limit` is.

        Args:
            on_step: Called after every step.

        Returns:
            True if the run is over: the weights are exported. False if it waits to be resumed.

        Raises:
            TrainingError: Too many steps without a finite loss, or the preparing process died.
        """
        config, options = self.config, self.options
        started, before = time.monotonic(), self.state.seconds
        saved = validated = started
        engine = Engine(config.workers, getattr(torch, config.precision), config.label_smoothing)
        prefetcher = Prefetcher(config, self.images.size, self.state.position, self.ranks)
        lead = self.ranks.rank == 0  # the one process that validates and writes
        folder = options.output if lead else options.output / f"rank{self.ranks.rank}"
        with Log(folder, options.log_every, resume_at=self.state.step) as log, engine, prefetcher:
            batches = iter(prefetcher)
            while self.done < 1:
                # All processes go by the first one's clock, or they would not stop at the same step.
                (elapsed,) = self.ranks.agree([time.monotonic() - started])
                self.state.seconds = before + elapsed
                if options.time_limit is not None and elapsed >= options.time_limit:
                    break
                record = self.step(engine, next(batches))
                log.step(record)
                if on_step is not None:
                    on_step(record)
                now = time.monotonic()
                if lead and now - saved >= options.save_every:
                    self.save()
                    saved = now
                if lead and options.validate_every and now - validated >= options.validate_every:
                    log.write(self._validate(engine))
                    validated = time.monotonic()
            if lead and self.done >= 1:
                log.write(self._validate(engine))
        over = self.done >= 1
        if lead:
            self.save()
            if over:
                self.export(options.output / "ghn")
        return over

    def step(self, engine: Engine, batch: MetaBatch) -> Record:
        """One meta-batch of networks on one batch of images, one update of the GHN."""
        config, state, started = self.config, self.state, time.monotonic()
        lr = learning_rate(config, state.step, self.done)
        predicted = self.ghn(batch.graphs)
        images, labels = self._batch(state.step)
        jobs = self._jobs(batch, predicted, images)
        results = engine.run(jobs, labels)
        loss = sum(result.loss for result in results) / len(results)
        correct = sum(result.correct for result in results) / (len(results) * len(labels))
        figures = torch.tensor([loss, correct])
        norm = self._update(predicted, [result.gradients for result in results], lr, figures)
        loss, correct = figures.tolist()
        state.step, state.position = state.step + 1, batch.stop
        state.networks += len(results) * self.ranks.world
        if norm is None:
            state.skipped += 1
            self._check_skipped()
        return Record(
            step=state.step, loss=loss, accuracy=correct, lr=lr, grad_norm=norm, skipped=state.skipped,
            seconds=state.seconds, step_seconds=time.monotonic() - started,
            networks=len(results) * self.ranks.world,
            done=self.done,
        )  # fmt: skip

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Augmented and normalised images of a step, (B, 3, H, W) float, and their labels."""
        config = self.config
        batch = self.images.take(batch_indices(len(self.images), config.batch_size, step, config.seed))
        pixels = augment(batch.pixels, generator(config.seed, "augmentation", step))
        return self.normalise(pixels), batch.labels

    def _jobs(self, batch: MetaBatch, predicted: list[dict[str, Tensor]], images: Tensor) -> list[Job]:
        small = halve(images) if self.done < self.config.small_images else images
        jobs: list[Job] = []
        for task, params in zip(batch.tasks, predicted, strict=True):

            def build(task: Any = task) -> torch.nn.Module:
                return task.build(self.config.ghn.num_classes, self.images.size)

            pixels = small if task.any_size else images
            jobs.append(Job(build, params, pixels, task.index, task.cost * pixels.shape[-1] ** 2))
        return jobs

    def _update(
        self,
        predicted: list[dict[str, Tensor]],
        gradients: list[dict[str, Tensor]],
        lr: float,
        figures: Tensor,
    ) -> float | None:
        """Backward through the GHN and an optimizer step; the gradient's norm, or None if not finite.

        Gradients, and `figures` with them, are averaged over the processes of the run.
        """
        pairs = [
            (params[name], grad.to(params[name].dtype) / len(predicted))
            for params, grads in zip(predicted, gradients, strict=True)
            for name, grad in grads.items()
        ]
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])
        for parameter in self.ghn.parameters():
            if parameter.grad is None:  # no network of this step used it
                parameter.grad = torch.zeros_like(parameter)
        self.ranks.average([figures, *(p.grad for p in self.ghn.parameters() if p.grad is not None)])
        norm = torch.nn.utils.clip_grad_norm_(self.ghn.parameters(), self.config.clip or float("inf"))
        if not torch.isfinite(norm):
            return None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self._average()
        return norm.item()

    @torch.no_grad()
    def _average(self) -> None:
        """Moving average of the weights; its decay grows to `ema` so that the first weights fade."""
        taken = self.state.step - self.state.skipped
        decay = min(self.config.ema, (1 + taken) / (10 + taken))
        values = [self.average[name] for name, _ in self.ghn.named_parameters()]
        get_ema_multi_avg_fn(decay)(values, [p.detach() for p in self.ghn.parameters()], None)

    def _check_skipped(self) -> None:
        state, limit = self.state, self.config.skip_limit
        if state.skipped > limit * max(state.step, _FIRST_STEPS):
            self.save()
            raise TrainingError(
                f"{state.skipped} of {state.step} steps had a loss that is not finite, "
                f"more than {limit:.0%}; lower the learning rate or lengthen the warm-up"
            )

    def averaged(self) -> GHN:
        """The GHN with the moving average of the weights, or a copy of it without an average."""
        ghn = GHN(self.config.ghn)
        ghn.load_state_dict(self.average if self.config.ema else self.ghn.state_dict())
        return ghn.eval()

    def _validate(self, engine: Engine) -> dict[str, Any]:
        return {"step": self.state.step, **self.validation(self.averaged(), engine)}

    def save(self) -> None:
        """Write the checkpoint."""
        _checkpoint.save(
            self.checkpoint,
            {
                "config": self.config.to_dict(),
                "ghn": self.ghn.state_dict(),
                "average": self.average if self.config.ema else {},
                "optimizer": self.optimizer.state_dict(),
                "state": {name: getattr(self.state, name) for name in State.__dataclass_fields__},
            },
        )

    def _resume(self) -> None:
        saved = _checkpoint.load(self.checkpoint)
        theirs = TrainConfig.from_dict(saved["config"])
        # How the work is spread over threads and processes may differ from part to part of a run.
        alike = replace(self.config, workers=theirs.workers, prefetch=theirs.prefetch)
        if alike != theirs:
            mine = alike.to_dict()
            different = [name for name, value in theirs.to_dict().items() if mine[name] != value]
            raise TrainingError(
                f"{self.checkpoint}: was trained with other values of {', '.join(different)}; "
                "give the same, or another output folder"
            )
        self.ghn.load_state_dict(saved["ghn"])
        self.average = saved["average"] or self.average
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = State(**saved["state"])

    def export(self, folder: Path) -> None:
        """Write the trained GHN with `save_pretrained`, and figures of the run beside it."""
        import json

        self.averaged().save_pretrained(folder)
        figures = {
            "config": self.config.to_dict(),
            "steps": self.state.step,
            "skipped": self.state.skipped,
            "networks": self.state.networks,
            "seconds": round(self.state.seconds, 1),
            "mean": self.normalise.mean,
            "std": self.normalise.std,
        }
        (folder / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
