"""What a function's name says of it: whether it reads, makes, moves or changes values, for instance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

PLAIN: Final = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point",
    "is_complex", "get_device", "element_size", "storage_offset", "data_ptr",
    "__len__", "__repr__", "__format__", "__hash__", "is_same_size",
})  # fmt: skip
"""Functions that read what a tensor is and make none: called as they are."""

READING: Final = frozenset({
    "item", "tolist", "is_nonzero", "__bool__", "__int__", "__float__", "__index__", "__complex__", "numpy",
    "__array__", "__contains__", "equal", "allclose",
})  # fmt: skip
"""Functions that read a tensor's values and make none."""

OF_GRADIENTS: Final = frozenset({
    "requires_grad_", "retain_grad", "register_hook", "register_post_accumulate_grad_hook",
})  # fmt: skip
"""Functions that say what becomes of gradients: there are none, and the model's tensors are the user's."""

DEVICE_MOVES: Final = frozenset({"cpu", "cuda", "xpu", "mps"})

ELEMENTWISE: Final = (
    "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu", "elu", "selu", "celu",
    "leaky_relu", "mish", "rrelu", "sigmoid", "tanh", "softplus", "dropout", "dropout1d", "dropout2d",
    "dropout3d", "alpha_dropout", "feature_alpha_dropout", "relu_", "relu6_", "hardtanh_", "hardswish_",
    "hardsigmoid_", "silu_", "elu_", "leaky_relu_", "rrelu_", "sigmoid_", "tanh_", "dropout_",
    "normalize", "roll", "clamp", "clamp_", "masked_fill", "masked_fill_",
)  # fmt: skip
"""Functions whose output is like their first argument and has no node: activations, dropout, masks."""


def _arithmetic(operator: str, *methods: str) -> frozenset[str]:
    """All names of one operation: its methods, those that change the first operand, and its operators."""
    operators = (f"__{form}{operator}__" for form in ("", "r", "i"))
    return frozenset((*methods, *(f"{method}_" for method in methods), *operators))


ADDING: Final = _arithmetic("add", "add")

SUBTRACTING: Final = _arithmetic("sub", "sub", "subtract") | {"rsub"}

MULTIPLYING: Final = _arithmetic("mul", "mul", "multiply")

DIVIDING: Final = _arithmetic("truediv", "div", "divide", "true_divide") - {"__rtruediv__"}
"""Divisions of the first operand; torch calls `1 / x` by `__rdiv__`."""

JOINING: Final = frozenset({"cat", "concat", "concatenate"})

STANDARDISING: Final = frozenset({"batch_norm", "layer_norm", "instance_norm"})

RESCALING: Final = STANDARDISING | MULTIPLYING | DIVIDING | SUBTRACTING | {
    "normalize", "sign", "tanh", "softmax", "pow", "__pow__", "clamp", "clamp_", "clip", "hardtanh",
    "__rdiv__",
}  # fmt: skip
"""Functions behind which a weight has another scale than the parameter that it is made of."""

DISTORTING: Final = frozenset({
    "exp", "exp2", "expm1", "log", "log2", "log1p", "softplus", "logsigmoid", "abs", "absolute", "__abs__",
    "square", "pow", "__pow__", "__rpow__", "sqrt", "rsqrt", "reciprocal", "__rdiv__", "sigmoid",
    "hardsigmoid", "softmax", "log_softmax", "gumbel_softmax", "relu", "relu6", "leaky_relu", "elu", "selu",
    "celu", "gelu", "silu", "mish", "hardswish", "threshold", "sin", "cos", "erf",
})  # fmt: skip
"""Functions that a parameter goes through which is not the weight itself, but its logarithm, say."""

MEASURING: Final = frozenset({
    "sum", "nansum", "cumsum", "prod", "einsum", "mean", "nanmean", "norm", "vector_norm", "matrix_norm",
    "linalg_norm", "linalg_vector_norm", "var", "std", "max", "min", "amax", "amin", "median", "quantile",
    "logsumexp", "topk", "kthvalue", "sort", "argsort", "argmax", "argmin", "gt", "ge", "lt", "le", "eq",
    "ne", "__gt__", "__ge__", "__lt__", "__le__", "__eq__", "__ne__", "greater", "less", "isfinite",
})  # fmt: skip
"""Functions that say something of a weight, to scale or mask it with, whatever it went through for that."""

HOMOGENEOUS: Final = frozenset({
    "relu", "leaky_relu", "rrelu", "prelu", "dropout", "dropout1d", "dropout2d", "dropout3d", "neg",
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t",
    "swapaxes", "swapdims", "movedim", "moveaxis", "contiguous", "clone", "detach", "float", "half",
    "bfloat16", "double", "expand", "repeat", "repeat_interleave", "tile", "chunk", "split",
    "tensor_split", "unbind", "stack", "__getitem__", "select", "narrow", "index_select", "roll", "flip",
    "pad", "interpolate", "upsample", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "mean",
    "sum", "amax", "cat", "concat", "concatenate", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d",
    "adaptive_max_pool2d", "_max_pool2d", "_adaptive_max_pool2d", "max_pool2d_with_indices",
    "adaptive_max_pool2d_with_indices",
})  # fmt: skip
"""Functions that pass a positive factor of their input on: what they give is as many times larger."""

CASTING: Final = frozenset({"to", "type_as"})

LENDING: Final = CASTING | {"view_as", "reshape_as", "expand_as", "resize_as_"}
"""Functions of their first argument alone: another tensor lends its shape or dtype, not its values."""

FROM_NOTHING: Final = frozenset({
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
    "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor",
})  # fmt: skip
"""Functions that take a shape from their tensor argument, not its values."""

FILLED: Final = frozenset({
    "ones", "zeros", "full", "ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full",
})  # fmt: skip
"""Constants that code may go on to read, if they are small: masks above all."""

HOST_FACTORIES: Final = frozenset({"arange", "linspace", "tensor", "as_tensor", "eye", "scalar_tensor"})
"""Small constants that code may go on to read: made on the CPU even where it asks for x.device."""

OF_LENGTHS: Final = frozenset({"_pack_padded_sequence", "_pad_packed_sequence"})
"""Functions that get lengths or counts, values on the CPU, beside activations."""

_CHANGING_OPERATORS: Final = frozenset({
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__imatmul__", "__itruediv__", "__idiv__",
    "__ifloordiv__", "__imod__", "__ipow__", "__ilshift__", "__irshift__", "__iand__", "__ixor__", "__ior__",
})  # fmt: skip

RESHAPING: Final = frozenset({
    "unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "resize_", "resize_as_", "set_",
    "as_strided_",
})  # fmt: skip
"""Functions that change the shape of their first argument."""


@dataclass(frozen=True, slots=True)
class Sort:
    """What a function's name says of it: in which of the sets above it is."""

    name: str  # without that of an overload, as in `torch.ops.aten.add.Tensor`
    plain: bool
    reading: bool
    made: bool  # a constant: it is in `FROM_NOTHING` or `FILLED`
    shaped: bool  # in `FROM_NOTHING`
    filled: bool
    host: bool
    moves: bool
    casts: bool  # in `CASTING`
    lent: bool  # in `LENDING`
    reshapes: bool
    lengths: bool
    changes: bool  # its first argument, see `is_in_place`


@lru_cache(maxsize=4096)
def sort_of(called: str) -> Sort:
    """What the name `called` says: one look instead of a dozen, for every call."""
    name = called.partition(".")[0]
    return Sort(
        name=name,
        plain=name in PLAIN,
        reading=name in READING,
        made=name in FROM_NOTHING or name in FILLED,
        shaped=name in FROM_NOTHING,
        filled=name in FILLED,
        host=name in HOST_FACTORIES,
        moves=name in DEVICE_MOVES,
        casts=name in CASTING,
        lent=name in LENDING,
        reshapes=name in RESHAPING,
        lengths=name in OF_LENGTHS,
        changes=is_in_place(name),
    )


def is_in_place(name: str) -> bool:
    """Whether a function of this name changes its first argument: `add_`, `__iadd__`, `__setitem__`."""
    return name in _CHANGING_OPERATORS if name.endswith("__") else name.endswith("_")


def is_on_meta(device: object) -> bool:
    """Whether `device`, an argument of the user's, is the meta device."""
    return device is not None and torch.device(device).type == "meta"  # type: ignore[arg-type]


def without_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `Tensor.to` without the device: recorded tensors never leave meta."""
    dtype = kwargs.get("dtype")
    for arg in (*args[1:], kwargs.get("other")):
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, Tensor):
            dtype = arg.dtype
    return (args[0], dtype if dtype is not None else args[0].dtype), {}
