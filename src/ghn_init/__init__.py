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
    from ghn_init._batch import GraphBatch
    from ghn_init._batchnorm import calibrate_batchnorm
    from ghn_init._checkpoint import load
    from ghn_init._config import GHNConfig
    from ghn_init._familiarity import OutOfDistributionWarning
    from ghn_init._graph import Graph, Node
    from ghn_init._large_on_meta import large_on_meta
    from ghn_init._model import GHN
    from ghn_init._ops._registered import register
    from ghn_init._plan import Plan, plan
    from ghn_init._predict import predict, predict_to
    from ghn_init._trace import trace

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
    "large_on_meta",
    "load",
    "plan",
    "predict",
    "predict_to",
    "register",
    "trace",
]

_MODULE_OF = {
    "GHN": "_model",
    "GHNConfig": "_config",
    "Graph": "_graph",
    "GraphBatch": "_batch",
    "Node": "_graph",
    "OutOfDistributionWarning": "_familiarity",
    "Plan": "_plan",
    "calibrate_batchnorm": "_batchnorm",
    "large_on_meta": "_large_on_meta",
    "load": "_checkpoint",
    "plan": "_plan",
    "predict": "_predict",
    "predict_to": "_predict",
    "register": "_ops._registered",
    "trace": "_trace",
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
