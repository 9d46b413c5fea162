"""`predict`, the one-line replacement for random initialisation, and `predict_to`, which writes to disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghn_init._writing.plan import ModelT, plan

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike
    from pathlib import Path

    from torch import nn

    from ghn_init._hypernetwork.model import GHN
    from ghn_init._writing.select import Diversify, Head


def predict(
    model: ModelT,
    weights: str | PathLike[str] | GHN = "ghn2-cifar10",
    *,
    example_input: object = None,
    head: Head = "auto",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    diversify: Diversify | None = None,
    seed: int = 0,
    strict: bool = False,
) -> ModelT:
    """Replace the parameters of `model`, in place, by those that a graph hypernetwork predicts.

    The same as `plan(...).apply()`; see `plan` for the arguments and `Plan.apply` for what is written. A
    failure leaves the model as it was. The same model, weights and seed give the same bits every time.

    Running statistics of batch norms are not predicted: train, or call `calibrate_batchnorm`.

    Returns:
        The same module.

    Raises:
        PredictError: See `plan` and `Plan.apply`.
        TraceError: The network could not be traced.
        CheckpointError: The weights could not be loaded.
    """
    return plan(
        model,
        weights,
        example_input=example_input,
        head=head,
        include=include,
        exclude=exclude,
        diversify=diversify,
        seed=seed,
        strict=strict,
    ).apply()


def predict_to(
    model: nn.Module,
    out_dir: str | PathLike[str],
    weights: str | PathLike[str] | GHN = "ghn2-cifar10",
    *,
    max_shard_size: int | str = "5GB",
    example_input: object = None,
    head: Head = "auto",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    diversify: Diversify | None = None,
    seed: int = 0,
    strict: bool = False,
) -> Path:
    """Write a sharded safetensors checkpoint of `model` with predicted parameters, tensor by tensor.

    The same as `plan(...).save(out_dir)`. With a model on the meta device this takes memory for its largest
    tensor, not for the model, so a network that does not fit into memory can be initialised. The values
    are those that `predict` with the same arguments gives; what is not predicted is initialised, or
    copied where the model is not on the meta device. The model is left as it is.

    Args:
        model: The network.
        out_dir: A folder that does not exist or is empty. It appears when it is complete; after a failure
            there is none.
        weights: See `plan`.
        max_shard_size: Of a file: bytes, or text such as "5GB". A larger tensor gets a file of its own.
        example_input: See `plan`.
        head: See `plan`.
        include: See `plan`.
        exclude: See `plan`.
        diversify: See `plan`.
        seed: See `plan`.
        strict: See `plan`.

    Returns:
        What to open: `out_dir/model.safetensors`, or `out_dir/model.safetensors.index.json` beside several
        files. `huggingface_hub.load_torch_model(model, out_dir)` loads both, and transformers'
        `from_pretrained(out_dir)`, for whose models the folder gets a `config.json`. Tied tensors are
        stored once: load them with `strict=False`.

    Raises:
        PredictError: See `plan`; or `out_dir` is not empty or cannot be written, the state dict holds more
            than tensors, the model is sharded over processes, or a tensor of a meta model that is not
            predicted cannot be initialised.
        TraceError: The network could not be traced.
        CheckpointError: The weights could not be loaded.
    """
    return plan(
        model,
        weights,
        example_input=example_input,
        head=head,
        include=include,
        exclude=exclude,
        diversify=diversify,
        seed=seed,
        strict=strict,
    ).save(out_dir, max_shard_size=max_shard_size)
