"""Finding architectures: measuring them, predicting their properties from embeddings, ranking many.

After Knyazev et al. 2021 (arXiv 2110.13100, section 5.3). Not loaded by `import ghn_init`; fitting regressors
needs the `search` extra.
"""

from __future__ import annotations

from ghn_init.search._embeddings import embed_architectures
from ghn_init.search._kendall import Correlation, correlation
from ghn_init.search._measure import Candidate, Measurer, candidates, measure
from ghn_init.search._picture import draw_properties
from ghn_init.search._properties import PROPERTIES, Fitted, Properties, fit_properties
from ghn_init.search._rank import Ranked, rank
from ghn_init.search._recipe import Measurement, Recipe
from ghn_init.search._records import Header, MeasurementFile, Records, read_records

__all__ = [
    "PROPERTIES",
    "Candidate",
    "Correlation",
    "Fitted",
    "Header",
    "Measurement",
    "MeasurementFile",
    "Measurer",
    "Properties",
    "Ranked",
    "Recipe",
    "Records",
    "candidates",
    "correlation",
    "draw_properties",
    "embed_architectures",
    "fit_properties",
    "measure",
    "rank",
    "read_records",
]
