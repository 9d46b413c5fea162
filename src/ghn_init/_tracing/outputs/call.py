"""One call of a torch function while it is recorded, and the table of outputs that are known without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ghn_init._tracing.arguments import keyword

if TYPE_CHECKING:
    from ghn_init._tracing.kernels import Memo

Output = Callable[["Call"], Any]

OUTPUTS: Final[dict[str, Output]] = {}
"""The torch function's `__name__` -> what gives its output, on meta."""


@dataclass(frozen=True, slots=True)
class Known:
    """An output that depends on the input, and whose values can be relied on where it is on the CPU."""

    output: Any


@dataclass(slots=True)
class Call:
    """One call of a torch function, its tensors on meta; `varies` if any of them depends on the input."""

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    memo: Memo
    varies: bool

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """The argument at position `index` or of this keyword, see `keyword`."""
        return self.args[index] if index < len(self.args) else keyword(self.kwargs, name, default)

    def run(self) -> Any:
        """The function's own result on meta tensors."""
        return self.memo.run(self.func, self.name, self.args, self.kwargs)


def output_of(*names: str) -> Callable[[Output], Output]:
    """Decorator: this gives the output of the torch functions called `names`."""

    def register(function: Output) -> Output:
        OUTPUTS.update(dict.fromkeys(names, function))
        return function

    return register
