"""State dicts that joblib wrote, as the files of GHN-3 on the Hugging Face hub: read without running code.

Such a file is one pickle, and unpickling can call anything that it names. So Python's unpickler
is not used: `pickletools` takes it apart, and of its instructions only those are followed that build
strings, numbers, tuples and dictionaries, and calls of three names, for which there are stand-ins below.
Memory stays in proportion to the file: the bytes of a tensor are let go once the tensor is made.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import TYPE_CHECKING, Any, Final

import torch

from ghn_init._errors import CheckpointError, first_line

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

LEGACY: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""What files that `torch.save` wrote before torch 1.6 begin with."""

_LARGEST: Final = 1 << 34
"""Bytes of a file that is read; the largest published one has 2.6 billion."""

_ORDERED_DICT: Final = "collections.OrderedDict"
_STORAGE: Final = "torch.storage._load_from_bytes"
_TENSOR: Final = "torch._utils._rebuild_tensor_v2"

_VALUES: Final = frozenset({
    "BINBYTES", "BINBYTES8", "BININT", "BININT1", "BININT2", "BINUNICODE", "LONG1", "SHORT_BINBYTES",
    "SHORT_BINUNICODE",
})  # fmt: skip
"""Instructions that push what stands in the file."""

_CONSTANTS: Final = {"NEWTRUE": True, "NEWFALSE": False, "NONE": None}
_TUPLES: Final = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _RefusedError(ValueError):
    """The file wants something that a state dict has no need of."""


class _Name(str):
    """A name that may be called; no string of the file is one."""

    __slots__ = ()


class _Gone:
    """In place of bytes in the memo: each is used once, and kept it would double the memory."""


_MARK: Final = object()


def read_state(path: Path) -> dict[str, Any]:
    """Read a state dict that joblib, or pickle, wrote without compression.

    Raises:
        CheckpointError: The file is damaged, something else, or would run code.
    """
    size = path.stat().st_size
    if size > _LARGEST:
        raise CheckpointError(f"{path}: expected at most {_LARGEST:,} bytes, found {size:,}")
    try:
        with path.open("rb") as file:
            found = _Machine().run(file)
        if not isinstance(found, dict):
            raise _RefusedError(f"it holds a {type(found).__name__}, no dictionary")
    # A pickle can be wrong in many ways, and torch promises nothing for what it reads.
    except Exception as error:
        raise CheckpointError(
            f"{path}: expected a checkpoint of plain tensors, written by torch.save or joblib, found a file "
            "that is damaged or that needs code to be run to read it, which is refused "
            f"({first_line(error)}); save only state_dict and config with torch.save, or fetch the file again"
        ) from error
    return found


class _Machine:
    """Follows the instructions of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: Any) -> Any:
        for instruction, argument, _ in pickletools.genops(file):
            if instruction.name == "STOP":
                return self.stack.pop()
            self.follow(instruction.name, argument)
        raise _RefusedError("the pickle has no end")

    def follow(self, name: str, argument: Any) -> None:
        """Follow one instruction; most push one value."""
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[len(stack) - count :] = [tuple(self.top(count))]
        elif name == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("SETITEM", "SETITEMS"):
            self.set_items(self.since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            parts = argument.split(" ") if name == "GLOBAL" else [stack.pop(-2), stack.pop()]
            stack.append(_known(parts))
        elif name == "REDUCE":
            called, arguments = self.top(2)
            stack[-2:] = [_call(called, arguments)]
        elif name == "BUILD":  # the attributes of an OrderedDict, which say nothing about the tensors
            stack.pop()
        else:
            self.remember(name, argument)

    def remember(self, name: str, argument: Any) -> None:
        """Follow an instruction about the memo, or one that is not needed."""
        if name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            (value,) = self.top(1)
            place = len(self.memo) if name == "MEMOIZE" else argument
            self.memo[place] = _Gone() if isinstance(value, bytes) else value
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name not in ("PROTO", "FRAME"):
            raise _RefusedError(f"the instruction {name}")

    def top(self, count: int) -> list[Any]:
        """The last values of the stack."""
        if len(self.stack) < count:
            raise _RefusedError("an instruction without its values")
        return self.stack[len(self.stack) - count :]

    def since_mark(self) -> list[Any]:
        """Take the values after the last mark off the stack, and the mark."""
        values: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def set_items(self, items: list[Any]) -> None:
        """Put key, value, key, value, ... into the dictionary on the stack."""
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2 or not all(isinstance(k, str) for k in items[::2]):
            raise _RefusedError("entries of something else than a dictionary of names")
        target.update(zip(items[::2], items[1::2], strict=True))


def _known(parts: list[Any]) -> _Name:
    """The name that a module's and a function's make together."""
    # What is no text is not written out: tuples that share their items would be endless.
    if not all(isinstance(part, str) for part in parts):
        raise _RefusedError("a name that is no text")
    name = ".".join(parts)
    if name not in (_ORDERED_DICT, _STORAGE, _TENSOR):
        raise _RefusedError(f"the name {name[:100]}")
    return _Name(name)


def _call(name: object, arguments: object) -> Any:
    """What a call gives: a dictionary, a storage or a tensor."""
    if not isinstance(name, _Name) or not isinstance(arguments, tuple):
        raise _RefusedError("a call of something else than a name")
    if name == _ORDERED_DICT and not arguments:
        return {}
    if name == _STORAGE and len(arguments) == 1:
        return _storage(arguments[0])
    if name == _TENSOR and len(arguments) >= 4:
        return _tensor(*arguments[:4])
    raise _RefusedError(f"{name} with {len(arguments)} arguments")


def _storage(content: object) -> torch.storage.TypedStorage:
    """The values that `torch.save` wrote into `content` in its form before torch 1.6."""
    if not isinstance(content, bytes) or not content.startswith(LEGACY):
        raise _RefusedError("a tensor's values in another form than torch.save's")
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose message recommends to read the file unsafely
        raise _RefusedError("a tensor's values need code to be run") from None
    if not isinstance(found, torch.storage.TypedStorage):
        raise _RefusedError(f"a {type(found).__name__} in place of a tensor's values")
    return found


def _tensor(storage: object, offset: object, size: object, stride: object) -> Tensor:
    """A view of a storage that does not reach beyond it: torch would make the storage larger."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise _RefusedError("a tensor without values")
    if not isinstance(offset, int) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise _RefusedError("a tensor of no size")
    if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride)):
        raise _RefusedError("a tensor of no size")
    bare = storage._untyped_storage  # noqa: SLF001 (`untyped()` warns)
    reach = offset + 1 + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    if reach * storage.dtype.itemsize > bare.nbytes() or 0 in size:
        raise _RefusedError("a tensor that reaches beyond its values")
    values = torch.empty(0, dtype=storage.dtype)
    return values.set_(bare, offset, size, stride)  # pyright: ignore[reportArgumentType, reportCallIssue]
