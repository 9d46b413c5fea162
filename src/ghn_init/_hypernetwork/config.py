"""The frozen configuration of a graph hypernetwork.

The first eight fields are those of a published GHN-2, `layers` and `heads` those that a GHN-3 has besides;
the others are extensions whose defaults mean "as published", so that a published configuration describes the
published model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal

from ghn_init._errors import ConfigError, listing, shown, shown_names

if TYPE_CHECKING:
    from collections.abc import Mapping

CIFAR10_SHAPE: Final = (64, 64, 11, 11)
"""Largest decoded tensor (O, I, K, K) of the models for CIFAR-10 (arXiv 2110.13100, appendix B)."""

IMAGENET_SHAPE: Final = (64, 64, 16, 16)
"""Largest decoded tensor (O, I, K, K) of the models for ImageNet."""

_INTEGERS: Final = {
    "num_classes": (1, 1_000_000), "hid": (4, 65_536), "depth_buckets": (0, 65_536), "rounds": (1, 1_000),
    "layers": (1, 1_000), "heads": (1, 1_024), "widest": (0, 1_000_000),
}  # fmt: skip
"""The range of every integer. The upper ends are far beyond use; past them a file's claim is not believed."""

_LONGEST_SIDE: Final = 4096
"""The largest size in a `max_shape` that is believed."""

_LARGEST_FACTOR: Final = 1_000
"""The largest `whitening` that is believed, far beyond use."""

_BOOLEANS: Final = ("weight_norm", "ve", "layernorm", "skip", "identity", "aligned")
_CHOICES: Final = {"hypernet": ("gatedgnn", "transformer", "mlp"), "decoder": ("conv",)}

GHN3_SIZES: Final = {"t": (64, 3, 8), "s": (128, 5, 16), "l": (256, 12, 16), "xl": (384, 24, 16)}
"""`hid`, `layers` and `heads` of the published GHN-3s: T/m8, S/m8, L/m8 and XL/m16 (arXiv 2303.04143)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GHNConfig:
    """What a GHN is made of.

    Attributes:
        max_shape: Largest tensor that the convolutional decoder makes, (O, I, K, K).
        num_classes: Width of the classifier that the decoder makes.
        hypernet: The graph network: "gatedgnn", "transformer" for a GHN-3, "mlp" for the baseline that sees
            no edges.
        decoder: "conv", the only published one.
        weight_norm: Normalise predicted parameters by their fan-in (GHN-2).
        ve: Virtual edges (GHN-2).
        layernorm: LayerNorm after the gated network (GHN-2).
        hid: Width d of the node features, a multiple of 4.
        depth_buckets: Rows of each of the two embeddings of a node's depth below the input and height
            above the output; 0: none. Even, because half of them are exact.
        rounds: Number T of times the gated network goes forth and back over the graph.
        skip: Add a node's features before any message to those that the decoders get.
        layers: Layers of the transformer.
        heads: Attention heads of each of its layers, a divisor of `hid`.
        identity: Add the identity on channels to predicted weights, half mirrored, so that all networks
            begin as nearly the same function; see `_hypernetwork/priors.py`.
        whitening: Add filters that whiten the training images' patches, times this, to the first convolution
            of networks on three channels; 0: none. The filters are stored with the weights.
        aligned: Channels keep their places in decoded blocks through concatenations, and all places have the
            same share in a sum, so that weights of any width fit together; see `_hypernetwork/channels.py`.
        widest: Layers of more channels are predicted as those of so many: they are shown with that size, and
            copies of a block are averaged beyond it; 0: as published. Every size has an embedding of its own,
            and those that training hardly meets are noise; see `batch.share_of_copies`.

    Raises:
        ConfigError: A value that no GHN can be built from.
    """

    max_shape: tuple[int, int, int, int] = CIFAR10_SHAPE
    num_classes: int = 10
    hypernet: str = "gatedgnn"
    decoder: Literal["conv"] = "conv"
    weight_norm: bool = True
    ve: bool = True
    layernorm: bool = True
    hid: int = 32
    depth_buckets: int = 0
    rounds: int = 1
    skip: bool = False
    layers: int = 3
    heads: int = 8
    identity: bool = False
    whitening: float = 0.0
    aligned: bool = False
    widest: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_shape", _checked_shape(self.max_shape))
        for name, (least, most) in _INTEGERS.items():
            value = getattr(self, name)
            if not _is_int(value) or value < least:
                raise ConfigError(f"GHN configuration: {name}={shown(value)}; expected an integer >= {least}")
            if value > most:
                raise ConfigError(f"GHN configuration: {name} is too large; expected at most {most:,}")
        for name in _BOOLEANS:
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"GHN configuration: {name}={shown(value)}; expected true or false")
        object.__setattr__(self, "whitening", _checked_factor(self.whitening))
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"GHN configuration: {name}={shown(value)}; expected one of {choices}")
        if self.hid % 4:
            raise ConfigError(
                f"GHN configuration: hid={self.hid}; expected a multiple of 4 (four shape parts)"
            )
        if self.depth_buckets % 2:
            raise ConfigError(
                f"GHN configuration: depth_buckets={self.depth_buckets}; expected an even number"
            )
        if self.transformer and self.hid % self.heads:
            raise ConfigError(
                f"GHN configuration: heads={self.heads} for hid={self.hid}; expected a divisor of hid"
            )

    @classmethod
    def ghn2(cls, num_classes: int = 10, **overrides: Any) -> GHNConfig:
        """GHN-2 of Knyazev et al. 2021 for CIFAR-10 (1,620,764 parameters)."""
        return cls.from_dict({"num_classes": num_classes, **overrides})

    @classmethod
    def ghn1(cls, num_classes: int = 10, **overrides: Any) -> GHNConfig:
        """GHN-1 of Zhang et al. 2019 as Knyazev et al. 2021 trained it: the bare gated network."""
        plain = {"weight_norm": False, "ve": False, "layernorm": False}
        return cls.from_dict({"num_classes": num_classes, **plain, **overrides})

    @classmethod
    def mlp(cls, num_classes: int = 10, **overrides: Any) -> GHNConfig:
        """The baseline of Knyazev et al. 2021 that maps each node on its own and sees no edges."""
        return cls.from_dict({"num_classes": num_classes, "hypernet": "mlp", **overrides})

    @classmethod
    def imagenet(cls, **overrides: Any) -> GHNConfig:
        """GHN-2 with a thousand classes and kernels up to 16 x 16 (2,319,720 parameters)."""
        return cls.from_dict({"num_classes": 1000, "max_shape": IMAGENET_SHAPE, **overrides})

    @classmethod
    def ghn3(
        cls, size: Literal["t", "s", "l", "xl"] = "t", num_classes: int = 1000, **overrides: Any
    ) -> GHNConfig:
        """GHN-3 of Knyazev et al. 2023 in one of its published sizes (T has 6,906,632 parameters).

        Raises:
            ConfigError: A size that was not published.
        """
        if size not in GHN3_SIZES:
            raise ConfigError(f"GHN-3 of size {size!r}; expected one of {', '.join(GHN3_SIZES)}")
        hid, layers, heads = GHN3_SIZES[size]
        values = {"num_classes": num_classes, "hid": hid, "layers": layers, "heads": heads}
        shape = (hid, hid, *IMAGENET_SHAPE[2:])
        return cls.from_dict({"hypernet": "transformer", "max_shape": shape, **values, **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GHNConfig:
        """The configuration with these fields and the defaults for the others.

        Raises:
            ConfigError: Names the keys that are no fields.
        """
        known = {field.name for field in fields(cls)}
        if unknown := shown_names(set(values) - known):
            raise ConfigError(
                f"GHN configuration: unknown key{'s' * (len(unknown) > 1)} {listing(unknown)}; "
                f"expected {', '.join(sorted(known))}"
            )
        return cls(**values)

    @classmethod
    def from_published(cls, values: Mapping[str, Any], *, transformer: bool = False) -> GHNConfig:
        """The configuration in a published `.pt` file.

        Files of GHN-2's code have the eight published fields. Those of GHN-3's have three more, of which a
        GHN-2 reads none, and defaults of their own for what is missing; `hypernet` means nothing where the
        tensors are a transformer's.

        Args:
            values: The configuration as it is in the file.
            transformer: The file's tensors are a transformer's, so this is a GHN-3.

        Raises:
            ConfigError: Names the keys that are missing or unknown, or that contradict the tensors.
        """
        known = (*PUBLISHED_FIELDS, *GHN3_FIELDS)
        required = ("max_shape", "num_classes", "hid") if transformer else PUBLISHED_FIELDS
        if missing := [name for name in required if name not in values]:
            raise ConfigError(f"GHN configuration: published file lacks {', '.join(missing)}")
        if unknown := shown_names(set(values) - set(known)):
            raise ConfigError(f"GHN configuration: published file has unknown {listing(unknown)}")
        if not transformer:
            return cls.from_dict({name: values[name] for name in PUBLISHED_FIELDS})
        if values.get("is_ghn2", False) is not False:
            raise ConfigError(
                f"GHN configuration: published file has is_ghn2={shown(values['is_ghn2'])} and a "
                "transformer's tensors; expected is_ghn2 to be absent or false"
            )
        missing_mean = dict.fromkeys(("weight_norm", "ve", "layernorm"), False)
        given = {name: value for name, value in values.items() if name != "is_ghn2"}
        return cls.from_dict(missing_mean | given | {"hypernet": "transformer"})

    @property
    def transformer(self) -> bool:
        """Whether this is a GHN-3: a transformer, whose nodes and kernels are treated as it was published."""
        return self.hypernet == "transformer"

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self) | {"max_shape": list(self.max_shape)}


PUBLISHED_FIELDS: Final = tuple(field.name for field in fields(GHNConfig))[:8]
"""The fields of a published configuration, in its order."""

GHN3_FIELDS: Final = ("layers", "heads", "is_ghn2")
"""What the configurations of GHN-3's code have besides."""


@lru_cache(maxsize=32)
def channel_sizes(num_classes: int) -> tuple[int, ...]:
    """The sizes that the channel embedding knows; its last row, after these, is the dummy."""
    coarse = {*range(8, 57, 8), *range(64, 4081, 16), *range(4096, 8193, 32)}
    return tuple(sorted({1, 3, num_classes} | coarse))


@lru_cache(maxsize=32)
def spatial_sizes(largest: int) -> tuple[int, ...]:
    """The kernel sizes that the spatial embedding knows for K = `largest`, without the dummy."""
    return tuple(sorted({*range(1, max(12, largest), 2), 14, 16}))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_factor(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _LARGEST_FACTOR:
        raise ConfigError(
            f"GHN configuration: whitening={shown(value)}; expected a number from 0 to {_LARGEST_FACTOR:,}"
        )
    return float(value)


def _checked_shape(shape: object) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, list | tuple) else ()
    if len(sizes) != 4 or not all(_is_int(size) and size > 0 for size in sizes) or sizes[2] != sizes[3]:
        raise ConfigError(
            f"GHN configuration: max_shape={shown(shape)}; expected four sizes (O, I, K, K) > 0"
        )
    if max(sizes) > _LONGEST_SIDE:
        raise ConfigError(
            f"GHN configuration: max_shape has sizes past {_LONGEST_SIDE:,}, which are too large"
        )
    return sizes
