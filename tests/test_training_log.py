"""What a run leaves for people to look at: its learning curve, and event files for TensorBoard."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest
from typer.testing import CliRunner

from ghn_init._errors import TrainingError
from ghn_init.training._curve import PICTURE, Axis, Point, draw_curve, picture, read_curves
from ghn_init.training._log import LOG, TENSORBOARD, Log, Record
from ghn_init.training.commands import app
from training_runs import tiny_config, tiny_trainer

if TYPE_CHECKING:
    from pathlib import Path

SVG = "{http://www.w3.org/2000/svg}"


def step_line(step: int, seconds: float, loss: float | None = 2.0, accuracy: float | None = 0.2) -> str:
    return json.dumps({"step": step, "seconds": seconds, "loss": loss, "accuracy": accuracy})


def validation_line(step: int, mean: float, error: float) -> str:
    return json.dumps({"step": step, "validation": mean, "standard_error": error})


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


def texts(svg: ET.Element) -> list[str]:
    return [entry.text or "" for entry in svg.iter(f"{SVG}text")]


def test_curves_are_read_from_the_log(folder: Path) -> None:
    loss, accuracy, validation = read_curves(folder / LOG).values()
    assert loss == [Point(60, 2.3), Point(180, 1.9), Point(240, 1.8)]
    assert [point.value for point in accuracy] == pytest.approx([10, 30, 35])
    assert validation == [Point(180, 25, 1.5), Point(240, 30, 2)]


def test_the_picture_has_a_panel_for_every_curve(folder: Path) -> None:
    path = draw_curve(folder)
    assert path == folder / PICTURE
    svg = ET.fromstring(path.read_text())
    lines = svg.findall(f"{SVG}polyline")
    assert len(lines) == 3
    loss = [tuple(map(float, pair.split(","))) for pair in lines[0].attrib["points"].split()]
    assert [y for _, y in loss] == sorted(y for _, y in loss)  # it falls: pixels grow downwards
    assert loss[1][0] - loss[0][0] == pytest.approx(2 * (loss[2][0] - loss[1][0]), abs=0.2)
    titles = [text for text in texts(svg) if "training" in text or "validation" in text]
    assert titles == [*read_curves(folder / LOG), "minutes of training"]
    assert len(svg.findall(f"{SVG}circle")) == 2  # the validations


def test_error_bars_are_standard_errors() -> None:
    points = [Point(60, 20.0, 3.0), Point(120, 30.0, 1.0)]
    svg = ET.fromstring(picture({"validation": points}))
    bars = [entry for entry in svg.findall(f"{SVG}line") if entry.attrib["stroke"] != "#dddddd"]
    longs = [abs(float(bar.attrib["y2"]) - float(bar.attrib["y1"])) for bar in bars]
    assert longs[0] == pytest.approx(3 * longs[1], abs=0.3)


def test_long_runs_have_few_points_and_hours(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text("\n".join(step_line(10 * k, 10.0 * k, float(k % 2)) for k in range(1, 2401)))
    loss = read_curves(tmp_path / LOG)["training loss"]
    assert len(loss) == 400
    assert all(point.value == pytest.approx(0.5) for point in loss)
    assert loss[-1].seconds == 24_000
    assert "hours of training" in texts(
        ET.fromstring(draw_curve(tmp_path, tmp_path / "a" / "b.svg").read_text())
    )


def test_a_step_of_far_greater_loss_does_not_flatten_the_others() -> None:
    points = [Point(60.0 * k, 1000.0 if k == 50 else 2 - k / 100) for k in range(100)]
    svg = ET.fromstring(picture({"training loss": points}))
    (line,) = svg.findall(f"{SVG}polyline")
    heights = [float(pair.split(",")[1]) for pair in line.attrib["points"].split()]
    assert heights[95] - heights[5] > 150
    # It is drawn at the panel's upper end, and leaves room for the title.
    assert heights[50] == min(heights) >= 34


def test_a_single_point_is_a_dot() -> None:
    svg = ET.fromstring(picture({"training loss": [Point(0.0, 2.0)], "validation": []}))
    assert len(svg.findall(f"{SVG}circle")) == 1
    assert len(svg.findall(f"{SVG}polyline")) == 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (1.63, 4.3, [2, 3, 4]),
        (33.1, 37.2, [34, 35, 36, 37]),
        (-3, 6, [-2, 0, 2, 4, 6]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert Axis(low, high, 0, 100).ticks(5) == pytest.approx(expected)


def test_runs_without_a_log_are_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="expected the output folder of `ghn-init train`"):
        draw_curve(tmp_path)
    (tmp_path / LOG).write_text("")
    with pytest.raises(TrainingError, match="has no steps yet"):
        draw_curve(tmp_path)


def test_the_command_draws_a_run(folder: Path) -> None:
    done = CliRunner().invoke(app(), ["curve", str(folder), "-o", str(folder / "mine.svg")])
    assert (done.exit_code, done.stdout.strip()) == (0, str(folder / "mine.svg"))
    assert (folder / "mine.svg").read_text().startswith("<svg")


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
    with pytest.raises(TrainingError, match=r"--tensorboard: .* pip install 'ghn-init\[tensorboard\]'"):
        tiny_trainer(tmp_path, tensorboard=True)


def test_a_run_leaves_a_picture_and_events(tmp_path: Path) -> None:
    def loss_of(line: str) -> Any:
        return json.loads(line).get("loss")

    assert tiny_trainer(tmp_path, tiny_config(steps=2), tensorboard=True).run()
    lines = (tmp_path / LOG).read_text().splitlines()
    assert [value for _, value in events(tmp_path, "loss")] == pytest.approx(
        [loss for line in lines if (loss := loss_of(line)) is not None]
    )
    assert len(ET.fromstring((tmp_path / PICTURE).read_text()).findall(f"{SVG}polyline")) == 3
