"""Initialise any PyTorch network with weights that a graph hypernetwork predicts.

    model = ghn_init.predict(torchvision.models.resnet50(num_classes=10))

A page of names; the modules behind them load on first use, so that importing the package costs next to
nothing beside `import torch`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ghn_init import _threads as _threads  # counts forks from here on
from ghn_init._errors import (
    ArchitectureError,
    CheckpointError,
    ConfigError,
    DrawError,
    GHNInitError,
    GraphError,
    ModelSpecError,
    PredictError,
    RegistrationError,
    TraceError,
    TrainingError,
)

if TYPE_CHECKING:
    from ghn_init._graph.graph import Graph, Node
    from ghn_init._hypernetwork.batch import GraphBatch
    from ghn_init._hypernetwork.config import GHNConfig
    from ghn_init._meta.large_on_meta import large_on_meta
    from ghn_init._tracing.record import record
    from ghn_init._tracing.rules.registered import register
    from ghn_init._tracing.trace import trace
    from ghn_init._weights.ghn import GHN
    from ghn_init._weights.load import load
    from ghn_init._writing.batchnorm import calibrate_batchnorm
    from ghn_init._writing.embed import embed
    from ghn_init._writing.familiarity import OutOfDistributionWarning
    from ghn_init._writing.plan import Plan, plan, predict, predict_to

__version__ = "0.1.0"

__all__ = [
    "GHN",
    "ArchitectureError",
    "CheckpointError",
    "ConfigError",
    "DrawError",
    "GHNConfig",
    "GHNInitError",
    "Graph",
    "GraphBatch",
    "GraphError",
    "ModelSpecError",
    "Node",
    "OutOfDistributionWarning",
    "Plan",
    "PredictError",
    "RegistrationError",
    "TraceError",
    "TrainingError",
    "calibrate_batchnorm",
    "embed",
    "large_on_meta",
    "load",
    "plan",
    "predict",
    "predict_to",
    "record",
    "register",
    "trace",
]

_MODULE_OF = {
    "GHN": "_weights.ghn",
    "GHNConfig": "_hypernetwork.config",
    "Graph": "_graph.graph",
    "GraphBatch": "_hypernetwork.batch",
    "Node": "_graph.graph",
    "OutOfDistributionWarning": "_writing.familiarity",
    "Plan": "_writing.plan",
    "calibrate_batchnorm": "_writing.batchnorm",
    "embed": "_writing.embed",
    "large_on_meta": "_meta.large_on_meta",
    "load": "_weights.load",
    "plan": "_writing.plan",
    "predict": "_writing.plan",
    "predict_to": "_writing.plan",
    "record": "_tracing.record",
    "register": "_tracing.rules.registered",
    "trace": "_tracing.trace",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
