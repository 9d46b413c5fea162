"""What a run leaves for people to look at: its learning curve, and event files for TensorBoard."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest
import torch
from typer.testing import CliRunner

from ghn_init._errors import TrainingError
from ghn_init._hypernetwork.batch import GraphBatch
from ghn_init.cli import app
from ghn_init.deepnets import Architecture
from ghn_init.training._curve import PICTURE, Point, draw_curve, picture, read_curves
from ghn_init.training._log import LOG, TENSORBOARD, Log, Record
from ghn_init.training._meta_batches import MetaBatches, Task
from ghn_init.training._ranks import Ranks
from training_runs import tiny_config, tiny_trainer

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes


def step_line(step: int, seconds: float, loss: float | None = 2.0, accuracy: float | None = 0.2) -> str:
    return json.dumps({"step": step, "seconds": seconds, "loss": loss, "accuracy": accuracy})


def validation_line(step: int, mean: float, error: float) -> str:
    return json.dumps({"step": step, "validation": mean, "standard_error": error})


def points_of(panel: Axes) -> list[tuple[float, float]]:
    """What the panel's line goes through."""
    return [(float(x), float(y)) for x, y in panel.lines[0].get_xydata()]


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run that is still going on: a step without a finite loss, a torn last line."""
    lines = [
        step_line(10, 60.0, 2.3, 0.1), step_line(20, 120.0, None, None), step_line(30, 180.0, 1.9, 0.3),
        validation_line(30, 25.0, 1.5), step_line(40, 240.0, 1.8, 0.35), validation_line(40, 30.0, 2.0),
        '{"step": 50, "sec',
    ]  # fmt: skip
    (tmp_path / LOG).write_text("\n".join(lines))
    return tmp_path


def test_curves_are_read_from_the_log(folder: Path) -> None:
    loss, accuracy, validation = read_curves(folder / LOG).values()
    assert loss == [Point(60, 2.3), Point(180, 1.9), Point(240, 1.8)]
    assert [point.value for point in accuracy] == pytest.approx([10, 30, 35])
    assert validation == [Point(180, 25, 1.5), Point(240, 30, 2)]


def test_the_picture_has_a_panel_for_every_curve(folder: Path) -> None:
    curves = read_curves(folder / LOG)
    panels = picture(curves).axes
    assert [panel.get_title(loc="left") for panel in panels] == list(curves)
    assert [panel.get_xlabel() for panel in panels] == ["", "", "minutes of training"]
    for panel, points in zip(panels, curves.values(), strict=True):
        assert points_of(panel) == [(point.seconds / 60, point.value) for point in points]


def test_a_run_is_drawn_into_its_folder_or_elsewhere(folder: Path) -> None:
    assert draw_curve(folder) == folder / PICTURE
    assert ET.fromstring((folder / PICTURE).read_text()).tag == "{http://www.w3.org/2000/svg}svg"
    assert draw_curve(folder, folder / "a" / "b.png").read_bytes().startswith(b"\x89PNG")


def test_error_bars_are_standard_errors() -> None:
    (panel,) = picture({"validation": [Point(60, 20.0, 3.0), Point(120, 30.0, 1.0)]}).axes
    (bars,) = panel.collections
    ends = [tuple(segment[:, 1]) for segment in bars.get_segments()]
    assert ends == [(17.0, 23.0), (29.0, 31.0)]


def test_long_runs_have_few_points_and_hours(tmp_path: Path) -> None:
    steps = (step_line(10 * k, 10.0 * k, float(k % 2)) for k in range(1, 2401))
    (tmp_path / LOG).write_text("".join(f"{line}\n" for line in steps))
    curves = read_curves(tmp_path / LOG)
    loss = curves["training loss"]
    assert len(loss) == 400
    assert all(point.value == pytest.approx(0.5) for point in loss)
    assert loss[-1].seconds == 24_000
    panels = picture(curves).axes
    assert panels[-1].get_xlabel() == "hours of training"
    assert points_of(panels[0])[-1][0] == pytest.approx(24_000 / 3600)


def test_a_step_of_far_greater_loss_does_not_flatten_the_others() -> None:
    points = [Point(60.0 * k, 1000.0 if k == 50 else 2 - k / 100) for k in range(100)]
    low, high = picture({"training loss": points}).axes[0].get_ylim()
    assert low < 1.03
    assert 1.97 < high < 2.1
    assert points[50].value > high


def test_a_single_point_is_a_dot() -> None:
    (panel,) = picture({"training loss": [Point(0.0, 2.0)], "validation": []}).axes
    assert panel.lines[0].get_marker() == "o"
    assert points_of(panel) == [(0.0, 2.0)]


def test_without_matplotlib_the_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TrainingError, match=r"matplotlib.* pip install matplotlib"):
        draw_curve(folder)


def test_a_format_that_cannot_be_drawn_is_told(folder: Path) -> None:
    with pytest.raises(TrainingError, match=r"curve\.gifx: cannot be drawn: .* ends in \.svg"):
        draw_curve(folder, folder / "curve.gifx")
    with pytest.raises(TrainingError, match="cannot be written: it is a folder"):
        draw_curve(folder, make_folder(folder / "curve.png"))


def test_runs_without_a_log_are_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="expected the output folder of `ghn-init train`"):
        draw_curve(tmp_path)
    (tmp_path / LOG).write_text("")
    with pytest.raises(TrainingError, match="has no steps yet"):
        draw_curve(tmp_path)


@pytest.mark.parametrize(
    "line", ['{"a": 1}', '{"step": 1, "loss": 2.0}', '{"step": 1, "validation": 3.0}', '{"step": "one"}',
             '{"step": 1, "loss": "low", "accuracy": 0.1}'],
)  # fmt: skip
def test_a_log_of_something_else_is_told(line: str, tmp_path: Path) -> None:
    (tmp_path / LOG).write_text('{"step": 1, "validation": 3.0, "standard_error": 0.1}\n' + line + "\n")
    with pytest.raises(TrainingError, match=r"line 2: .*; expected the log of `ghn-init train`"):
        draw_curve(tmp_path)
    with pytest.raises(TrainingError, match=r"line 2: .*; expected the log of `ghn-init train`"):
        Log(tmp_path, 10, resume_at=1)


def test_the_command_draws_a_run(folder: Path) -> None:
    done = CliRunner().invoke(app, ["curve", str(folder), "-o", str(folder / "mine.svg")])
    assert (done.exit_code, done.stdout.strip()) == (0, str(folder / "mine.svg"))
    assert (folder / "mine.svg").read_text().startswith("<?xml")


# Networks of large loss


def test_networks_of_large_loss_are_named_so_that_they_are_built_again(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, tiny_config(steps=2), log_every=2)
    with torch.no_grad():  # classifiers' weights become large, and with them the outputs
        trainer.ghn.decoder.class_layer_predictor[1].weight.mul_(30)
    predictor = copy.deepcopy(trainer.ghn)
    sequence = MetaBatches(trainer.config, trainer.image_size).tasks()
    tasks = {task.index: task for task in itertools.islice(sequence, 16)}
    assert trainer.run()
    line = json.loads((tmp_path / LOG).read_text().splitlines()[0])
    first = [entry for entry in line["largest"] if entry["step"] == 1]
    assert first
    for entry in first:
        architecture = Architecture.from_net_args(entry["net_args"])
        assert architecture == tasks[entry["index"]].architecture
        assert (entry["nodes"], entry["params"]) == (
            architecture.num_nodes(),
            architecture.num_params(10, 16),
        )
        graph = architecture.graph(10, trainer.image_size)
        (params,) = predictor(GraphBatch.from_graphs([graph], trainer.config.ghn))
        network = Task(entry["index"], architecture).build(10, trainer.image_size)
        result = trainer.engine.run(network, params, *trainer._batch(0)[:2], entry["index"])
        assert entry["loss"] == pytest.approx(result.loss, rel=1e-3)
        assert entry["loss"] > 2 * math.log(10)


def test_networks_of_all_processes_are_named_and_others_are_not(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, tiny_config(meta_batch=4))
    trainer.ranks = Ranks(0, 2)
    batch = next(iter(MetaBatches(trainer.config, 16, ranks=trainer.ranks)))
    indices = [task.index for task in batch.group]
    assert [task.index for task in batch.tasks] == indices[::2]
    found = trainer._large(batch, [[4.0, 5.0], [math.nan, 4.6]])
    assert [(entry["index"], entry["loss"]) for entry in found] == [(indices[2], 5.0), (indices[1], None)]


def test_a_line_counts_networks_of_large_loss_and_names_the_largest(tmp_path: Path) -> None:
    with Log(tmp_path, every=2) as log:
        for step in range(1, 5):
            losses = [5.0, None, 9.0, 7.0] if step == 2 else [6.0] if step == 1 else []
            log.step(record(step, 2.0), [{"loss": loss} for loss in losses])
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["large"] for line in lines] == [5, 0]
    assert [[entry["loss"] for entry in line["largest"]] for line in lines] == [[None, 9, 7], []]


# TensorBoard


def events(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of a series in the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / TENSORBOARD))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def record(step: int, loss: float) -> Record:
    return Record(
        step=step, loss=loss, accuracy=0.5, lr=1e-3, grad_norm=None, skipped=0, seconds=float(step),
        step_seconds=1.0, networks=2, done=0.1,
    )  # fmt: skip


def test_tensorboard_has_the_numbers_of_the_log(tmp_path: Path) -> None:
    with Log(tmp_path, every=2, tensorboard=True) as log:
        for step in range(1, 5):
            log.step(record(step, float(step)))
        log.write({"step": 4, "validation": 30.5, "accuracies": [30.0, 31.0]})
    assert events(tmp_path, "loss") == [(2, 1.5), (4, 3.5)]
    assert events(tmp_path, "validation") == [(4, 30.5)]


def test_a_resumed_run_replaces_what_it_does_again(tmp_path: Path) -> None:
    for resume_at, shift in ((0, 0.0), (2, 10.0)):
        with Log(tmp_path, every=1, resume_at=resume_at, tensorboard=True) as log:
            for step in range(resume_at + 1, 5):
                log.step(record(step, step + shift))
    assert events(tmp_path, "loss") == [(1, 1), (2, 2), (3, 13), (4, 14)]


def test_without_tensorboard_a_run_says_so_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match=r"--tensorboard: .* pip install tensorboard"):
        tiny_trainer(tmp_path, tensorboard=True)


def test_a_run_leaves_a_picture_and_events(tmp_path: Path) -> None:
    def loss_of(line: str) -> Any:
        return json.loads(line).get("loss")

    assert tiny_trainer(tmp_path, tiny_config(steps=2), tensorboard=True).run()
    lines = (tmp_path / LOG).read_text().splitlines()
    assert [value for _, value in events(tmp_path, "loss")] == pytest.approx(
        [loss for line in lines if (loss := loss_of(line)) is not None]
    )
    assert ET.fromstring((tmp_path / PICTURE).read_text()).tag.endswith("svg")
