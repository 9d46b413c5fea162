"""`ghn-init predict` and `ghn-init inspect`."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ghn_init._errors import ModelSpecError
from ghn_init._graph.draw import format_of
from ghn_init._weights import DEFAULT_WEIGHTS
from ghn_init.cli import _options as opt  # noqa: TC001 (typer reads the annotations)
from ghn_init.cli._options import option
from ghn_init.cli._output import Steps, check_output, in_options, save, say, summary
from ghn_init.cli._values import Request, check_size, make_request

if TYPE_CHECKING:
    from ghn_init._graph.graph import Graph
    from ghn_init._writing.plan import Plan
    from ghn_init.cli._spec import FoundModel


def predict(
    spec: opt.Spec,
    *,
    settings: opt.Settings = None,
    output: Annotated[
        Path | None,
        option(
            "-o --output FILE",
            "Write the state dict to this file, which is replaced if it exists; by default NAME.safetensors "
            "in the current folder. With --max-shard-size it is a folder, by default NAME, that is new or "
            "empty.",
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        option(
            "SIZE",
            "Write a folder of files of at most this size, such as 5GB, tensor by tensor. A model that a "
            "class or function builds then takes memory for its largest tensor only.",
        ),
    ] = None,
    weights: opt.Weights = DEFAULT_WEIGHTS,
    head: opt.Head = "auto",
    scale: opt.Scale = "auto",
    frozen: opt.Frozen = "keep",
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    diversify: opt.Diversify = None,
    seed: opt.Seed = 0,
    strict: opt.Strict = False,
    input_shape: opt.InputShape = None,
    report: Annotated[
        Path | None,
        option(
            "FILE",
            "Write a page (HTML) to this file: what to expect, each layer's scale before and after, the "
            "graph and the plan.",
        ),
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Predict a model's weights and write them to NAME.safetensors (the default command)."""
    with Steps(total=6 + (report is not None)) as steps:
        with steps("starting"):
            request = make_request(
                spec, settings, weights, input_shape,
                head=head, include=include, exclude=exclude, diversify=diversify, seed=seed, strict=strict,
                scale=scale, frozen=frozen,
            )  # fmt: skip
            target = _target(output, request, max_shard_size)
            if report is not None:
                check_output(report, _inputs(request), hint="--report")
                if report.resolve() == target.resolve():
                    raise typer.BadParameter(f"{report} is where -o writes to", param_hint="--report")
        found, plan = _compile(request, steps, on_meta=max_shard_size is not None)
        page = None
        if report is not None:
            from ghn_init.cli._report import Page  # loads torch

            page = Page(plan, str(found.origin))  # it has to see the values before they are written
        if max_shard_size is None:
            with steps("writing the weights"):
                plan.apply()
            with steps(f"saving {target}"):
                opened, size = target, save(found.model, target)
        else:
            with steps(f"writing {target}"):
                opened = plan.save(target, max_shard_size=max_shard_size)
                size = sum(file.stat().st_size for file in target.iterdir())
        if report is not None and page is not None:
            with steps(f"reporting to {report}"):
                page.write(report, in_place=max_shard_size is None)
    if as_json:
        typer.echo(json.dumps({**_report(found, plan, steps), "file": str(opened), "bytes": size}))
    say(summary(found, plan, steps.milliseconds, opened, size))
    if report is not None:
        say(f"report: {report}")


def inspect(
    spec: opt.Spec,
    *,
    settings: opt.Settings = None,
    draw: Annotated[
        Path | None,
        option("FILE", "Draw the graph as .dot, or as .svg, .pdf or .png, which need graphviz."),
    ] = None,
    weights: opt.Weights = DEFAULT_WEIGHTS,
    head: opt.Head = "auto",
    scale: opt.Scale = "auto",
    frozen: opt.Frozen = "keep",
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    diversify: opt.Diversify = None,
    seed: opt.Seed = 0,
    strict: opt.Strict = False,
    input_shape: opt.InputShape = None,
    as_json: opt.Json = False,
) -> None:
    """Show a model's graph and what would be predicted; write nothing but the drawing asked for."""
    with Steps(total=4) as steps:
        with steps("starting"):
            request = make_request(
                spec, settings, weights, input_shape,
                head=head, include=include, exclude=exclude, diversify=diversify, seed=seed, strict=strict,
                scale=scale, frozen=frozen,
            )  # fmt: skip
            if draw is not None:
                check_output(draw, _inputs(request), hint="--draw")
                format_of(draw)
        found, plan = _compile(request, steps)
    if as_json:
        typer.echo(json.dumps({**_report(found, plan, steps), "graph": _graph_dict(plan.graph)}))
    else:
        typer.echo(_graph_text(plan.graph))
        typer.echo(str(plan))
    if draw is not None:
        plan.graph.draw(draw)
        say(f"drew {draw}")


def _target(output: Path | None, request: Request, max_shard_size: str | None) -> Path:
    """The file to write, or the folder if it is to be in shards.

    Raises:
        typer.BadParameter: It cannot be there (exit status 2).
    """
    name = request.spec.name
    if max_shard_size is not None:
        check_size(max_shard_size)
        if str(output) == "-":
            raise typer.BadParameter("- is no folder", param_hint="-o")
        return output or Path(name)
    target = output or Path(f"{name}.safetensors")
    if os.path.isdir(target):  # noqa: PTH112 (Path's own fails where a name is too long)
        hint = "give a file, or --max-shard-size to fill a folder"
        raise typer.BadParameter(f"{target} is a folder; {hint}", param_hint="-o")
    if target.suffix in _OF_TORCH:
        hint = "it would be no file of torch.save; give a name that ends in .safetensors"
        raise typer.BadParameter(f"{target} would hold safetensors: {hint}", param_hint="-o")
    check_output(target, _inputs(request))
    return target


_OF_TORCH: Final = frozenset({".pt", ".pth", ".bin", ".ckpt"})
"""Suffixes of the files that `torch.save` makes, and `torch.load` reads."""


def _inputs(request: Request) -> list[Path]:
    """The files that a command reads, so that it does not write over them."""
    from ghn_init._weights.directory import CONFIG_FILE, WEIGHTS_FILE

    weights = Path(request.weights)
    return [Path(request.spec.source), weights, weights / WEIGHTS_FILE, weights / CONFIG_FILE]


def _compile(request: Request, steps: Steps, *, on_meta: bool = False) -> tuple[FoundModel, Plan]:
    """Load the GHN, make the model, and compute everything that would be written."""
    with steps("loading"):
        import torch

        import ghn_init
        from ghn_init._writing.familiarity import described
        from ghn_init.cli._spec import load_model

        ghn = ghn_init.load(request.weights)
    with steps(f"building {request.spec}"):
        torch.manual_seed(request.seed)  # what is kept starts the same every time, too
        found = _mostly_on_meta(request) if on_meta else load_model(request.spec, request.settings)
    with steps("predicting"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ghn_init.OutOfDistributionWarning)  # said in our own words
        plan = ghn_init.plan(found.model, ghn, **request.arguments)
    if plan.warned:
        say(f"warning: {in_options(described(found.name, plan.warned))}")
    return found, replace(plan, weights=request.weights)


def _mostly_on_meta(request: Request) -> FoundModel:
    """The model, its large tensors on the meta device; all of it in memory if it cannot be built so."""
    from ghn_init import large_on_meta
    from ghn_init.cli._spec import load_model

    try:
        return load_model(request.spec, request.settings, inside=large_on_meta())
    except ModelSpecError as error:
        found = load_model(request.spec, request.settings)
        say(f"{request.spec} is built in memory, because on the meta device: {error}")
        return found


def _report(found: FoundModel, plan: Plan, steps: Steps) -> dict[str, Any]:
    """What `--json` prints for both commands."""
    return {"spec": str(found.origin), **plan.to_dict(), "milliseconds": steps.milliseconds}


def _graph_dict(graph: Graph) -> dict[str, Any]:
    return {
        "nodes": [{"type": node.type, "param": node.param, "shape": node.shape} for node in graph.nodes],
        "edges": graph.edges,
    }


def _graph_text(graph: Graph) -> str:
    counts = Counter(node.type for node in graph.nodes)
    types = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    virtual = int((graph.distances > 1).sum())
    return (
        f"{graph.name}: {len(graph)} nodes ({types}), {len(graph.edges)} edges, {virtual} virtual edges, "
        f"depth {int(graph.depths.max())}"
    )
