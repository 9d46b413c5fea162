"""Outputs of torch functions while a forward pass is recorded, where torch need not be asked or cannot know.

Most functions run on meta tensors. Of those here the output's shape is known from the arguments' shapes,
faster than from a meta kernel (`shapes`); or it depends on values, of which nobody knows, and is assumed
(`choices`).
"""

from __future__ import annotations

from ghn_init._tracing.outputs import choices, sequences, shapes  # noqa: F401  # they fill OUTPUTS
from ghn_init._tracing.outputs.call import OUTPUTS

__all__ = ["OUTPUTS"]
