"""What the output of an fx node carries, as far as a GHN's graph goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True, slots=True)
class Flow:
    """A tensor that depends on the network's input.

    Attributes:
        sources: The graph nodes whose outputs it carries, ascending. Operations that have no node
            pass their inputs' sources on: that is how they are removed and their neighbours linked.
        role: "", or the part of an operation written by hand that it is. Of attention: "scores" (query
            times key) or "attention" (scores after the softmax). Of a normalisation: "square", "mean",
            "moment" (the mean of squares, or what is computed from it), "batch moment" (over the
            examples too), "normalised" (divided by a moment).
    """

    sources: tuple[int, ...]
    role: str = ""


@dataclass(frozen=True, slots=True)
class Derived:
    """A tensor computed from parameters and constants alone.

    Attributes:
        params: The parameters' names.
        shifted: A number was added, as in (1 + weight): the parameter is not the weight itself.
        rescaled: Those of the parameters whose scale is not that of the tensor, because they were multiplied,
            standardised or the like, with the root mean square that they have now; None where it is unknown.
        distorted: Those that are not the weight itself, but its logarithm, say, with the last function that
            they went through.
        measure: What it says of the parameters' values, if that is all it does: their "variance", their
            "deviation", the "inverse" of that, or anything else, their "size".
    """

    params: tuple[str, ...]
    shifted: bool = False
    rescaled: Mapping[str, float | None] = field(default_factory=dict)
    distorted: Mapping[str, str] = field(default_factory=dict)
    measure: str = ""


CONSTANT: Final = Derived(())
"""What a tensor carries that depends on neither the input nor a parameter."""

Carried = Flow | Derived


def merged(values: Iterable[Carried]) -> Carried:
    """What the result of an operation on such tensors carries."""
    varying = [value for value in values if value is not CONSTANT]
    if len(varying) == 1:
        return varying[0]
    sources: set[int] = set()
    params: dict[str, None] = {}
    roles: set[str] = set()
    shifted, rescaled, distorted = False, dict[str, float | None](), dict[str, str]()
    for value in varying:
        if isinstance(value, Flow):
            sources.update(value.sources)
            roles.add(value.role)
        else:
            params.update(dict.fromkeys(value.params))
            shifted = shifted or value.shifted
            rescaled |= value.rescaled
            distorted |= value.distorted
    if roles:
        return Flow(tuple(sorted(sources)), _common_role(roles))
    return Derived(tuple(params), shifted, rescaled, distorted) if params else CONSTANT


def _common_role(roles: set[str]) -> str:
    """Parts of an attention stay what they are beside anything else; other roles only among their own."""
    for role in ("scores", "attention"):
        if role in roles:
            return role
    return roles.pop() if len(roles) == 1 else ""
