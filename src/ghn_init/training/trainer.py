"""Training a GHN: meta-batches of networks on batches of images (arXiv 2110.13100, section 4)."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, replace
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ghn_init._errors import ConfigError, TrainingError
from ghn_init._files import write_bytes
from ghn_init._threads import drawing_from
from ghn_init._weights.ghn import GHN
from ghn_init.training import _checkpoint
from ghn_init.training._checkpoint import Checkpoint
from ghn_init.training._config import TrainConfig
from ghn_init.training._curve import draw_curve
from ghn_init.training._engine import Engine, Result, fast_precision
from ghn_init.training._log import Log, Record, summary_writer
from ghn_init.training._meta_batches import MetaBatch, MetaBatches, ahead
from ghn_init.training._optimizer import make_optimizer
from ghn_init.training._output import only_writer, writing
from ghn_init.training._ranks import Ranks
from ghn_init.training._run import Clock, RunOptions, State, Termination
from ghn_init.training._scaled_init import init_for_training
from ghn_init.training._schedule import learning_rate, progress
from ghn_init.training._validation import Validation
from ghn_init.training.data import Images, Normalisation, augment, batch_indices, check_side, generator, sized

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


_LOST = 50
"""Steps in a row without a finite loss or gradient after which the weights are taken for lost."""

_LARGE = 2.0
"""Times the loss of guessing, log(classes), above which the log names a network."""

_WHITENED = 5_000
"""Training images, about, from which the filters of a GHN with `whitening` are taken."""


class Batch(NamedTuple):
    """Augmented and normalised images, (B, 3, H, W) float, their labels, (B,), and soft targets, if any."""

    images: Tensor
    labels: Tensor
    targets: Tensor | None


class Trainer:
    """One training run; takes up the newest checkpoint in `options.output` if there is one.

    Where torch.distributed has a default group, this process is one of the run's.

    Args:
        config: What to train, and how.
        images: Training images, hold-out already taken off.
        validation: Held-out images for quick validations.
        options: Where to keep it.
        start: Weights to start from instead of random ones; a checkpoint goes before them.

    Raises:
        TrainingError: Weights to start from, images or number of processes that do not fit the
            configuration; a checkpoint there that is damaged or belongs to another configuration.
    """

    def __init__(
        self,
        config: TrainConfig,
        images: Images,
        validation: Images,
        options: RunOptions,
        *,
        start: GHN | None = None,
    ) -> None:
        self.config, self.images, self.options = config, images, options
        self.ranks = Ranks.current()
        self._check()
        self.normalise = Normalisation.of(images)
        self.ghn = self._first_weights(start).to(self.ranks.device)
        self.average = {name: value.detach().clone() for name, value in self.ghn.named_parameters()}
        self.optimizer = make_optimizer(self.ghn, config, self.ranks)
        self.engine = Engine(self.precision, config.label_smoothing)
        self.state = State()
        self._start = start.digest() if start else None
        self._skipped_in_a_row = 0
        self._whole = True
        self.validation = Validation(
            validation,
            self.normalise,
            options.validation_networks,
            options.validation_images,
            self.image_size,
        )
        if (path := _checkpoint.newest(options.output)) is not None:
            self._resume(path)

    def _check(self) -> None:
        config, classes, world = self.config, self.images.classes, self.ranks.world
        if self.options.tensorboard:
            summary_writer()  # raises now rather than at the first line
        if len(self.images) < config.batch_size:
            raise TrainingError(
                f"{len(self.images)} training images; expected at least batch_size={config.batch_size}"
            )
        if len(classes) != config.ghn.num_classes:
            raise TrainingError(
                f"{len(classes)} classes of images; the GHN is configured for {config.ghn.num_classes} "
                f"(ghn.num_classes={len(classes)} is one for these images, which begins anew)"
            )
        check_side(self.images, self.image_size)
        if config.soft_labels and self.images.soft is None:
            raise TrainingError(
                f"soft_labels={config.soft_labels} and images without any; make them with `ghn-init teach` "
                "and give them with --soft-labels"
            )
        if config.meta_batch % world:
            raise TrainingError(
                f"meta_batch={config.meta_batch} networks cannot be shared evenly by {world} processes"
            )

    def _first_weights(self, start: GHN | None) -> GHN:
        config = self.config
        if start is not None:
            theirs, wanted = start.config.to_dict(), config.ghn.to_dict()
            if other := [f"{name}={theirs[name]}" for name in wanted if theirs[name] != wanted[name]]:
                raise TrainingError(
                    f"weights to start from are of a GHN with {', '.join(other)}; expected {config.ghn}; "
                    "leave the GHN's configuration out, and it is theirs"
                )
            return copy.deepcopy(start).requires_grad_(True).train()
        with drawing_from(config.seed):  # so that all processes have the same weights
            ghn = GHN(config.ghn)
        if config.scaled_init:
            graphs = MetaBatches(config, self.image_size).graphs(config.scaled_init)
            init_for_training(ghn, graphs, seed=config.seed)
        few = self.images.pixels[:: max(len(self.images) // _WHITENED, 1)]
        ghn.whiten(sized(self.normalise(few), self.image_size))
        return ghn

    @property
    def image_size(self) -> int:
        """Side of the images that networks see."""
        return self.config.image_size or self.images.size

    @property
    def precision(self) -> torch.dtype:
        """The type in which networks run."""
        wanted = self.config.precision
        return fast_precision(self.ranks.device) if wanted == "auto" else getattr(torch, wanted)

    @property
    def done(self) -> float:
        """The fraction of the run that is over."""
        return progress(self.config, self.state.step, self.state.seconds)

    def run(self, on_step: Callable[[Record], None] | None = None) -> bool:
        """Train until the run is over, or `time_limit` is, or SIGTERM or Ctrl-C ask for an end.

        Args:
            on_step: Called after every step.

        Returns:
            True if the run is over: the weights are exported and, where matplotlib is installed, the learning
            curve is drawn. False if it waits to be resumed.

        Raises:
            TrainingError: Another run writes to the output folder, or has gone on there since this trainer
                was made; it cannot be written. Many steps in a row without a finite loss; another rank died.
            Exception: Whatever else ends a step. After every error a checkpoint of the last whole step is
                written if that is possible: not where an update of the weights was interrupted.
        """
        with only_writer(self.options.output) if self.ranks.first else nullcontext():
            self._check_step()
            try:
                self._run(on_step or (lambda _: None))
            except Exception:
                with suppress(Exception):  # the first error is the one to show, whatever comes of this
                    self.save()
                raise
            self.save()
            if self.done < 1:
                return False
            if self.ranks.first:
                self.export(self.options.output / "ghn")
                if find_spec("matplotlib"):  # of the `train` extra; a run without it is none the worse
                    draw_curve(self.options.output)
            return True

    def _check_step(self) -> None:
        """See that all processes are at the step of the newest checkpoint, or beyond it."""
        mine, output = self.state.step, self.options.output
        if not self._whole:
            raise TrainingError(
                f"an error within an update of the weights left this trainer after half of step {mine + 1}; "
                "make a new one, which takes up the newest checkpoint"
            )
        if self.ranks.first and (path := _checkpoint.newest(output)) and _checkpoint.step_of(path) > mine:
            raise TrainingError(
                f"{path}: another run has written it since this one took up step {mine}; start again to go "
                "on from there, or give another output folder"
            )
        step = self.ranks.gather([mine])[0][0]
        if step != mine:
            raise TrainingError(
                f"process {self.ranks.rank} found a checkpoint of step {mine} in {output}, the first process "
                f"one of step {step:.0f}; expected a folder that all processes see"
            )

    def _run(self, on_step: Callable[[Record], None]) -> None:
        options, state, first = self.options, self.state, self.ranks.first
        before, saved, validated, begun = state.seconds, 0.0, 0.0, state.step
        folder = options.output if first else None
        log = Log(folder, options.log_every, resume_at=state.step, tensorboard=options.tensorboard)
        made = iter(MetaBatches(self.config, self.image_size, state.position, self.ranks))
        batches = ahead(made, self.config.prefetch)
        with log, closing(batches), Clock() as clock, Termination() as termination:
            stop = False
            while self.done < 1 and not stop:
                record = self.step(batch := next(batches))
                told = self.ranks.gather([clock(), termination.asked, *record.losses])
                # All processes go by the first one's clock, or they would not stop at the same step.
                elapsed, asked = told[0][:2]
                stop = bool(asked) or (options.time_limit is not None and elapsed >= options.time_limit)
                state.seconds = before + elapsed
                record = replace(record, seconds=state.seconds, done=self.done)
                log.step(record, self._large(batch, [losses for _, _, *losses in told]) if first else [])
                on_step(record)
                now = clock()
                if now - saved >= options.save_every:
                    self.save()
                    saved = now
                if first and options.validate_every and now - validated >= options.validate_every:
                    log.write(self._validate())
                    validated = clock()
            if first and self.done >= 1 and not (state.step == begun and log.validated):
                log.write(self._validate())

    def step(self, batch: MetaBatch) -> Record:
        """One meta-batch of networks, each on a batch of images, one update of the GHN."""
        config, state, started = self.config, self.state, time.monotonic()
        lr = learning_rate(config, state.step, state.seconds)
        predicted = self.ghn(batch.graphs)
        batches = self._batches(state.step)
        results = self._run_networks(batch, predicted, batches)
        kept = [(params, result) for params, result in zip(predicted, results, strict=True) if result.sound]
        figures = torch.tensor([
            sum(result.loss for _, result in kept),
            sum(result.correct for _, result in kept) / config.batch_size,
            len(kept),
        ])  # fmt: skip
        norm = self._update(
            [(params, result.gradients) for params, result in kept], len(results), lr, figures
        )
        # Means over the processes: without a network that was kept there is no loss, which is NaN here.
        loss, accuracy = (figures[:2] / figures[2]).tolist()
        networks, world = len(results) * self.ranks.world, self.ranks.world
        state.step, state.position, state.networks = state.step + 1, batch.stop, state.networks + networks
        state.dropped += networks - round(figures[2].item() * world)
        self._whole = True
        self._note_skipped(norm is None)
        return Record(
            step=state.step, loss=loss, accuracy=accuracy, lr=lr, grad_norm=norm, skipped=state.skipped,
            dropped=state.dropped, seconds=state.seconds, step_seconds=time.monotonic() - started,
            networks=networks, losses=tuple(result.loss for result in results), done=self.done,
        )  # fmt: skip

    def _large(self, batch: MetaBatch, losses: list[list[float]]) -> list[dict[str, Any]]:
        """The networks of the last step whose loss is large or not finite, from every process's losses."""
        classes, world = self.config.ghn.num_classes, self.ranks.world
        return [
            {
                "step": self.state.step,
                "loss": loss if math.isfinite(loss) else None,
                **task.identity(classes, self.image_size),
            }
            for rank, theirs in enumerate(losses)
            for task, loss in zip(Ranks(rank, world).share(batch.group), theirs, strict=True)
            if not loss <= _LARGE * math.log(classes)
        ]

    def _batches(self, step: int) -> list[Batch]:
        """What each of this process's networks sees in a step."""
        many = self.config.meta_batch
        places = self.ranks.share(range(many))
        if self.config.images == "shared":
            return [self._batch(step)] * len(places)
        return [self._batch(step * many + place) for place in places]

    def _batch(self, number: int) -> Batch:
        """Batch `number` of the run: augmented anew each time, with no image twice in an epoch."""
        config, device = self.config, self.ranks.device
        batch = self.images.take(batch_indices(len(self.images), config.batch_size, number, config.seed))
        rng = generator(config.seed, "augmentation", number)
        x = self.normalise(augment(batch.pixels, rng, config.crop_padding).to(device))
        targets = batch.targets(config.soft_labels).to(device) if config.soft_labels else None
        return Batch(sized(x, self.image_size), batch.labels.to(device), targets)

    def _run_networks(
        self, batch: MetaBatch, predicted: list[dict[str, Tensor]], batches: list[Batch]
    ) -> list[Result]:
        results: list[Result] = []
        for task, params, seen in zip(batch.tasks, predicted, batches, strict=True):
            network = task.build(self.config.ghn.num_classes, self.image_size)
            results.append(
                self.engine.run(network, params, seen.images, seen.labels, task.index, seen.targets)
            )
        return results

    def _update(
        self,
        kept: list[tuple[dict[str, Tensor], dict[str, Tensor]]],
        networks: int,
        lr: float,
        figures: Tensor,
    ) -> float | None:
        """Backward through the GHN and an optimizer step; the gradient's norm, or None if none was made.

        Gradients and `figures` (the number of networks that were kept last) are averaged over the processes,
        so that all of them come to the same decision: no step where no network is left or the GHN's gradient
        is not finite.

        Args:
            kept: Predicted parameters and their gradients, of the networks whose gradients are sound.
            networks: How many there were: those that are left out lessen the step.
            lr: Learning rate.
            figures: Averaged in place.
        """
        pairs = [
            (params[name], self._contribution(params[name], grad, networks))
            for params, grads in kept
            for name, grad in grads.items()
        ]
        self.optimizer.zero_grad(set_to_none=True)
        if pairs:
            torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])
        for parameter in self.ghn.parameters():
            if parameter.grad is None:  # no network of this step used it
                parameter.grad = torch.zeros_like(parameter)
        self.ranks.average([figures, *(p.grad for p in self.ghn.parameters() if p.grad is not None)])
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.ghn.parameters() if p.grad is not None])
        if not (norm.isfinite() and figures[-1]):
            return None
        if 0 < self.config.clip < norm:
            torch.nn.utils.clip_grads_with_norm_(self.ghn.parameters(), self.config.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # From here until the step is counted, weights, optimizer and average are those of no step: an update
        # may end halfway, as Muon's does where the process with which it exchanges matrices is lost.
        self._whole = False
        self.optimizer.step()
        self._average()
        return norm.item()

    def _contribution(self, tensor: Tensor, grad: Tensor, networks: int) -> Tensor:
        """What a predicted parameter contributes to the gradient of a mean over networks, decay included."""
        grad = grad.to(tensor.dtype)
        if decay := 2 * self.config.param_decay:
            grad = torch.add(grad, tensor.detach(), alpha=decay)
        return grad if networks == 1 else grad / networks

    def _average(self) -> None:
        """Moving average of the weights; its decay grows to `ema` so that the first weights fade."""
        taken = self.state.step - self.state.skipped
        decay = min(self.config.ema, (1 + taken) / (10 + taken))
        values = [self.average[name] for name, _ in self.ghn.named_parameters()]
        get_ema_multi_avg_fn(decay)(values, [p.detach() for p in self.ghn.parameters()], None)

    def _note_skipped(self, skipped: bool) -> None:
        state = self.state
        state.skipped += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row >= _LOST:
            raise TrainingError(
                f"{_LOST} steps in a row, up to step {state.step}, without a network whose loss and "
                "gradients are finite; start again from an earlier checkpoint or from other weights, with a "
                "lower learning rate or a longer warm-up"
            )

    def averaged(self) -> GHN:
        """The GHN with the moving average of the weights, or a copy of it without an average."""
        ghn = copy.deepcopy(self.ghn)
        if self.config.ema:
            ghn.load_state_dict(self.average, strict=False)  # it has the parameters, a network's buffers stay
        return ghn.eval()

    def _validate(self) -> dict[str, Any]:
        return {"step": self.state.step, **self.validation(self.averaged(), self.precision)}

    def save(self) -> None:
        """Write a checkpoint if this is the run's first process, and is after a step, not within one.

        Raises:
            TrainingError: It cannot be written.
        """
        if not (self.ranks.first and self.state.step and self._whole):
            return
        tensors = {
            "weights": self.ghn.state_dict(),
            "optimizer": _checkpoint.optimizer_tensors(self.optimizer),
        }
        if self.config.ema:
            tensors["average"] = self.average
        state = {
            "config": self.config.to_dict(), "state": asdict(self.state), "data": self._data,
            "start": self._start,
        }  # fmt: skip
        _checkpoint.save(self.options.output, self.state.step, Checkpoint(tensors, state))

    @cached_property
    def _data(self) -> dict[str, str]:
        """Digests of what it trains on; none of soft labels that have no share in the targets."""
        found, soft = {"images": self.images.digest()}, self.images.soft
        if self.config.soft_labels and soft is not None:
            found["soft labels"] = hashlib.blake2b(soft.contiguous().numpy().data, digest_size=12).hexdigest()
        return found

    def _resume(self, path: Path) -> None:
        saved = _checkpoint.load(path)
        try:
            theirs = TrainConfig.from_dict(saved.state["config"]).to_dict()
            mine = self.config.to_dict()
            # A second thread changes when the work is done, not what is done; nor does a run's length, where
            # the rate does not go by it.
            free = {"prefetch", *(("steps", "duration") if self.config.schedule == "constant" else ())}
            different = [name for name in theirs if name not in free and mine[name] != theirs[name]]
            if different:
                raise TrainingError(
                    f"{path}: was trained with other values of {', '.join(different)}; "
                    "give the same, or another output folder"
                )
            first = saved.state.get("start", self._start)  # earlier versions did not write it
            if self._start is not None and first != self._start:
                begun = "others" if first else "random ones"
                raise TrainingError(
                    f"{path}: its weights to start from were {begun}; give the same, or another output folder"
                )
            self._start = first
            data = saved.state.get("data", self._data)  # nor this
            if others := [name for name, digest in self._data.items() if data.get(name) != digest]:
                raise TrainingError(
                    f"{path}: was trained on other {' and '.join(others)}; give the same, or another output "
                    "folder"
                )
            self.ghn.load_state_dict(dict(saved.tensors["weights"]))
            if self.config.ema:
                for name, value in self.average.items():
                    value.copy_(saved.tensors["average"][name])
            _checkpoint.restore_optimizer(self.optimizer, saved.tensors["optimizer"])
            self.state = State(**saved.state["state"])
        except (KeyError, TypeError, ValueError, RuntimeError, ConfigError) as error:
            raise TrainingError(f"{path}: not a complete training checkpoint ({error})") from error

    def export(self, folder: Path) -> None:
        """Write the trained GHN with `save_pretrained`, and figures of the run beside it."""
        self.averaged().save_pretrained(folder)
        figures = {
            "config": self.config.to_dict(),
            "precision": str(self.precision).removeprefix("torch."),
            "steps": self.state.step,
            "skipped": self.state.skipped,
            "dropped": self.state.dropped,
            "networks": self.state.networks,
            "seconds": round(self.state.seconds, 1),
            "mean": self.normalise.mean,
            "std": self.normalise.std,
        }
        path = folder / "training.json"
        with writing(path):
            write_bytes(path, (json.dumps(figures, indent=2) + "\n").encode())
