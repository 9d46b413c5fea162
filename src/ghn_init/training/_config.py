"""The frozen configuration of a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Literal

from ghn_init._errors import ConfigError
from ghn_init._hypernetwork.config import GHNConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

_AT_LEAST: Final = {
    "seed": 0,
    "lr": 0.0, "weight_decay": 0.0, "clip": 0.0, "warmup": 0, "meta_batch": 1, "batch_size": 2,
    "max_nodes": 1, "max_params": 0.0, "curriculum": 0, "curriculum_nodes": 1, "image_size": 0,
    "scaled_init": 0, "prefetch": 0, "param_decay": 0.0, "crop_padding": 0,
}  # fmt: skip
_LARGEST_SEED: Final = 2**63 - 1

_TYPES: Final[Mapping[str, Any]] = {
    "int": int, "int | None": int | None, "float": float | int, "float | None": float | int | None,
    "GHNConfig": GHNConfig,
}  # fmt: skip
"""What the fields' annotations mean; those of choices are checked by themselves."""

_FRACTIONS: Final = ("label_smoothing", "soft_labels", "ema", "norm_free")
_CHOICES: Final = {
    "optimizer": ("adam", "adamw", "muon"),
    "schedule": ("constant", "step", "cosine", "linear"),
    "precision": ("auto", "float32", "bfloat16"),
    "images": ("shared", "own"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What a training run does; with the images it determines the result of a run of `steps`.

    Attributes:
        ghn: What is trained.
        seed: Seed of the GHN's first weights, the architectures, the images' order and augmentation.
        steps: Length of the run in optimizer steps; None: `duration` rules.
        duration: Length of the run in seconds of training, over all its parts; None: `steps` rules.
        optimizer: "adam" (L2 penalty, as published), "adamw", or "muon" (orthogonalised momentum for
            matrices, Adam for the rest).
        lr: Largest learning rate.
        weight_decay: L2 penalty or decoupled decay.
        clip: Largest norm of the GHN's gradient.
        warmup: Steps over which the learning rate rises linearly.
        schedule: Learning rate over the run: "constant", "step" (divided by 10 after 2/3 and 5/6 of it,
            as published), "cosine" or "linear" to zero.
        meta_batch: Networks of one step.
        batch_size: Images that a network sees in one step.
        images: Whether all networks of a step see the same ones ("shared", as published), or each its "own":
            then the same work sees `meta_batch` times as many, and the gradient has less noise.
        image_size: Side of the images in pixels: 0 or the images' own, or half of it (averages of 2 x 2).
            Widths and filters go by what a network is on 32 x 32 images all the same.
        crop_padding: Zeros around an image, in pixels of its own size, before it is cropped at random.
        scaled_init: Networks of the sequence on which the GHN's first weights are scaled so that predicted
            networks start with the activations of well initialised ones; 0: torch's default weights.
        param_decay: Weight of the sum of squares of the predicted parameters, added to the loss of every
            network (arXiv 2303.04143, section 4.3).
        label_smoothing: Label smoothing of the loss, see `torch.nn.functional.cross_entropy`.
        soft_labels: Share of the teacher's probabilities in the targets, where the images have them.
        ema: Decay of the moving average of the GHN's weights; 0: none.
        precision: Type of the networks' activations and weights; "auto": bfloat16 on a GPU and on processors
            that compute in it, else float32. The GHN itself stays in float32.
        max_nodes: Networks of more nodes are skipped, and meta-batches that have more in all.
        max_params: Networks of more parameters, in millions at the width drawn, are skipped; 0: none.
        curriculum: Over this many first architectures the largest size allowed grows from
            `curriculum_nodes` to no limit; 0: no curriculum.
        curriculum_nodes: Nodes of the largest network that a curriculum begins with.
        norm_free: Share of the networks that are trained without their batch norms, whatever their size;
            DeepNets-1M's training split has a few small ones without.
        prefetch: Meta-batches that a second thread prepares ahead; 0: none.

    Raises:
        ConfigError: A value that no run can have.
    """

    ghn: GHNConfig = field(default_factory=GHNConfig)
    seed: int = 0
    steps: int | None = None
    duration: float | None = None
    optimizer: Literal["adam", "adamw", "muon"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 1e-5
    clip: float = 5.0
    warmup: int = 100
    schedule: Literal["constant", "step", "cosine", "linear"] = "cosine"
    meta_batch: int = 8
    batch_size: int = 64
    images: Literal["shared", "own"] = "shared"
    image_size: int = 0
    crop_padding: int = 4
    scaled_init: int = 0
    param_decay: float = 0.0
    label_smoothing: float = 0.0
    soft_labels: float = 0.0
    ema: float = 0.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    max_nodes: int = 2200
    max_params: float = 0.0
    curriculum: int = 0
    curriculum_nodes: int = 60
    norm_free: float = 0.0
    prefetch: int = 3

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not isinstance(value, _TYPES.get(str(entry.type), object)) or isinstance(value, bool):
                raise ConfigError(f"training: {entry.name}={value!r}; expected {entry.type}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"training: {entry.name}={value!r}; expected a finite number")
        for name, least in _AT_LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"training: {name}={getattr(self, name)!r}; expected at least {least}")
        if self.seed > _LARGEST_SEED:
            raise ConfigError(f"training: seed={self.seed}; expected at most {_LARGEST_SEED}")
        for name in _FRACTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"training: {name}={getattr(self, name)!r}; expected 0 to 1")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"training: {name}={value!r}; expected one of {choices}")
        self._check_length()

    def _check_length(self) -> None:
        if (self.steps is None) == (self.duration is None):
            raise ConfigError(
                f"training: steps={self.steps}, duration={self.duration}; give exactly one of them "
                "(--steps 10000 or --duration 2h)"
            )
        if (self.steps or self.duration or 0) <= 0:
            raise ConfigError("training: a run of no length; expected steps or duration above 0")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration with these fields and defaults for the others; `ghn` may be a dictionary.

        Raises:
            ConfigError: Names the keys that are no fields.
        """
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"training: unknown {', '.join(unknown)}; expected {', '.join(sorted(known))}")
        values = dict(values)
        if isinstance(ghn := values.get("ghn", {}), dict):
            values["ghn"] = GHNConfig.from_dict(ghn)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self) | {"ghn": self.ghn.to_dict()}
