"""Finding, reading and writing the weights of a hypernetwork."""

from typing import Final

DEFAULT_WEIGHTS: Final = "ghn3-cifar10"
"""The bundled weights that are used where none are named."""
