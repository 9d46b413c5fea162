"""Damage to weight files and configurations: an error of ours, or what was saved; no hang, no memory.

More examples: `pytest tests/test_damaged_files.py --hypothesis-profile=nightly`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import resource
import struct
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ghn_init import GHN, CheckpointError, ConfigError, GHNConfig, GHNInitError, load
from ghn_init._hypernetwork.config import PUBLISHED_FIELDS
from ghn_init._weights.directory import save
from ghn_init._weights.pickled_state import read_state

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TINY = GHNConfig.ghn2(3, hid=4, max_shape=(3, 4, 3, 3))

damage = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    st.tuples(st.just("flip at the start"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.just(0)),
    st.tuples(st.just("double"), st.floats(0, 1, exclude_max=True), st.just(0)),
)
"""What happens to a file: a changed byte, its end lost, a part of it twice."""


def damaged(content: bytes, how: str, where: float, mask: int) -> bytes:
    place = int(where * (min(len(content), 4000) if "start" in how else len(content)))
    if how == "cut":
        return content[:place]
    if how == "double":
        return content[:place] + content[place // 2 :]
    return content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]


@pytest.fixture(scope="module")
def sound() -> GHN:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        return GHN(TINY)


@pytest.fixture(scope="module")
def folder(sound: GHN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved weights as files and, for the properties to restore them from, in memory."""
    folder = tmp_path_factory.mktemp("damaged")
    save(sound, folder)
    config = {name: TINY.to_dict()[name] for name in PUBLISHED_FIELDS}
    document = {"state_dict": sound.state_dict(), "config": config, "epoch": 3, "optimzer": {}}
    torch.save(document, folder / "published.pt")
    torch.save(document, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "hub.pt").write_bytes(pickle.dumps(OrderedDict(sound.state_dict()), protocol=4))
    return folder


REFUSED, SAME = "refused", "loaded what was saved"


def outcome(path: Path, sound: GHN) -> str:
    """What becomes of loading `path`: REFUSED, by an error of ours, SAME, or how it differs."""
    try:
        loaded = load(path)
    except GHNInitError:
        return REFUSED
    if loaded.config != sound.config:
        return f"loaded {loaded.config}"
    values = loaded.state_dict()
    differing = [name for name, saved in sound.state_dict().items() if not torch.equal(values[name], saved)]
    return f"loaded other values of {differing}" if differing else SAME


@given(what=damage)
def test_damaged_safetensors_give_an_error_or_what_was_saved(
    folder: Path, sound: GHN, what: tuple[str, float, int]
) -> None:
    target = folder / "one"
    target.mkdir(exist_ok=True)
    content = damaged((folder / "model.safetensors").read_bytes(), *what)
    (target / "model.safetensors").write_bytes(content)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert outcome(target / "model.safetensors", sound) in (REFUSED, SAME)


@given(what=damage)
def test_a_damaged_configuration_gives_an_error_or_what_was_saved(
    folder: Path, sound: GHN, what: tuple[str, float, int]
) -> None:
    target = folder / "two"
    target.mkdir(exist_ok=True)
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (target / "config.json").write_bytes(damaged((folder / "config.json").read_bytes(), *what))
    assert outcome(target / "model.safetensors", sound) in (REFUSED, SAME)


@given(what=damage)
def test_a_damaged_published_file_is_refused_or_gives_what_it_held(
    folder: Path, sound: GHN, what: tuple[str, float, int]
) -> None:
    (folder / "three.pt").write_bytes(damaged((folder / "published.pt").read_bytes(), *what))
    assert outcome(folder / "three.pt", sound) in (REFUSED, SAME)


@given(what=damage)
def test_a_damaged_published_file_of_the_old_kind_is_refused_or_gives_finite_values(
    folder: Path, what: tuple[str, float, int]
) -> None:
    """Files of torch before 1.6 have no checksums: a changed number cannot be told; but it is finite."""
    (folder / "four.pt").write_bytes(damaged((folder / "old.pt").read_bytes(), *what))
    try:
        loaded = load(folder / "four.pt")
    except GHNInitError:
        return
    assert all(values.isfinite().all() for values in loaded.state_dict().values())


@given(what=damage)
def test_a_damaged_state_dict_of_the_hub_is_refused_or_loaded_as_finite_values(
    folder: Path, what: tuple[str, float, int]
) -> None:
    """These have no checksums either."""
    (folder / "six.pt").write_bytes(damaged((folder / "hub.pt").read_bytes(), *what))
    try:
        loaded = load(folder / "six.pt")
    except GHNInitError:
        return
    assert all(values.isfinite().all() for values in loaded.state_dict().values())


@given(content=st.binary(max_size=200), protocol=st.integers(2, 5))
def test_anything_after_the_start_of_a_pickle(folder: Path, content: bytes, protocol: int) -> None:
    (folder / "seven.pt").write_bytes(bytes([0x80, protocol]) + content)
    with pytest.raises(CheckpointError, match=r"seven\.pt: expected a"):
        load(folder / "seven.pt")


plain = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8)
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner))


@given(key=st.sampled_from([*TINY.to_dict(), "more"]), value=values)
def test_any_value_in_the_configuration_is_refused_or_changes_nothing(
    folder: Path, sound: GHN, key: str, value: Any
) -> None:
    target = folder / "five"
    target.mkdir(exist_ok=True)
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (target / "config.json").write_text(json.dumps(TINY.to_dict() | {key: value}))
    assert outcome(target / "model.safetensors", sound) in (REFUSED, SAME)


# Particular damage


def test_sound_files_load(folder: Path, sound: GHN) -> None:
    for path in (folder / name for name in ("model.safetensors", "published.pt", "old.pt", "hub.pt")):
        assert outcome(path, sound) == SAME


def test_a_changed_number_or_field_does_not_match_the_checksum(
    sound: GHN, tmp_path: Path, folder: Path
) -> None:
    save(sound, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"expected the checksum crc32:\w{8}, found crc32:\w{8}; the file"
    ):
        load(tmp_path)
    save(sound, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict() | {"rounds": 2}))
    with pytest.raises(CheckpointError, match="changed since they were saved"):
        load(tmp_path)


def test_files_without_a_checksum_load(sound: GHN, tmp_path: Path) -> None:
    save(sound, tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    assert outcome(tmp_path / "model.safetensors", sound) == SAME


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_unusable_types_are_named(sound: GHN, tmp_path: Path, dtype: torch.dtype) -> None:
    save(sound, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["ln.weight"] = state["ln.weight"].to(dtype)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"ln\.weight is no tensor of floats"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_tensors_in_unusable_forms_are_named(folder: Path, tmp_path: Path) -> None:
    document = torch.load(folder / "published.pt", weights_only=True)
    sparse = document["state_dict"]["embed.weight"].to_sparse()
    for form in (sparse, torch.zeros(15, 4, device="meta"), [1.0]):
        document["state_dict"]["embed.weight"] = form
        torch.save(document, tmp_path / "odd.pt")
        with pytest.raises(CheckpointError, match=r"embed\.weight is no tensor of floats"):
            load(tmp_path / "odd.pt")


def test_half_precision_sums_do_not_overflow(sound: GHN, tmp_path: Path) -> None:
    save(sound, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["embed.weight"] = torch.full((15, 4), 6e4, dtype=torch.float16)
    save_file(state, tmp_path / "model.safetensors")
    assert float(load(tmp_path).embed.weight.detach()[0, 0]) == 60_000
    state["embed.weight"] = torch.full((15, 4), 1e300, dtype=torch.float64)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"embed\.weight has values that are not finite"):
        load(tmp_path)


CLAIMS = {
    "num_classes": 10**12, "hid": 4 * 10**15, "depth_buckets": 2 * 10**15, "rounds": 10**12,
    "max_shape": [10**9, 10**9, 10**12, 10**12],
}  # fmt: skip


@pytest.mark.parametrize("key", CLAIMS)
def test_sizes_beyond_reason_are_refused(sound: GHN, tmp_path: Path, key: str) -> None:
    save(sound, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict() | {key: CLAIMS[key]}))
    with pytest.raises(ConfigError, match=rf"config\.json: GHN configuration: {key} .*too large"):
        load(tmp_path)


def shared(container: Callable[[Any], Any]) -> Any:
    """A container with twenty levels, each there twice in the one above: a million times in the first."""
    value = container([])
    for _ in range(20):
        value = container([value, value])
    return value


SHARING: dict[str, Callable[[Any], Any]] = {
    "list": list,
    "tuple": tuple,
    "OrderedDict": lambda items: OrderedDict(enumerate(items)),
    "Namespace": lambda items: argparse.Namespace(items=items),
}


@pytest.mark.parametrize("kind", SHARING)
@pytest.mark.parametrize("key", ["max_shape", "num_classes", "hypernet", "ve", "a_key"])
def test_values_that_share_their_items_are_not_written_out(key: str, kind: str, tmp_path: Path) -> None:
    config = {name: TINY.to_dict()[name] for name in PUBLISHED_FIELDS} | {key: shared(SHARING[kind])}
    torch.save({"state_dict": GHN(TINY).state_dict(), "config": config}, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=rf"{key}") as raised:
        load(tmp_path / "x.pt")
    assert len(str(raised.value)) < len(str(tmp_path)) + 400


@pytest.mark.parametrize("where", ["file", "config", "state_dict"])
def test_names_that_share_their_items_are_not_written_out(where: str, tmp_path: Path) -> None:
    config = {name: TINY.to_dict()[name] for name in PUBLISHED_FIELDS}
    parts: dict[str, dict[Any, Any]] = {"state_dict": dict(GHN(TINY).state_dict()), "config": config}
    document = {} if where == "file" else parts
    (document if where == "file" else parts[where])[shared(tuple)] = 3
    torch.save(document, tmp_path / "x.pt")
    with pytest.raises(GHNInitError, match=r"\(\.\.\.\)") as raised:
        load(tmp_path / "x.pt")
    assert len(str(raised.value)) < len(str(tmp_path)) + 900


@pytest.mark.parametrize(
    ("value", "found"), [(1 << 20_000, "<int>"), ("x" * 10**6, r"'x+\.\.\.x+'")], ids=["integer", "text"]
)
def test_a_long_value_is_cut(value: Any, found: str) -> None:
    with pytest.raises(ConfigError, match=f"hypernet={found}; expected one of") as raised:
        GHNConfig(hypernet=value)
    assert len(str(raised.value)) < 300


def test_the_largest_sizes_take_no_memory(sound: GHN, tmp_path: Path) -> None:
    save(sound, tmp_path)
    largest = {"num_classes": 10**6, "hid": 65_536, "max_shape": [4096] * 4}
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict() | largest))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="not the weights of a GHN with its configuration"):
        load(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_brackets_without_end_are_no_configuration(sound: GHN, tmp_path: Path) -> None:
    save(sound, tmp_path)
    (tmp_path / "config.json").write_text("[" * 60_000)
    with pytest.raises(CheckpointError, match=r"config\.json: expected JSON, found"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[" * 70_000)
    with pytest.raises(CheckpointError, match=r"configuration of at most 65,536 bytes, found a larger file"):
        load(tmp_path)


def test_a_larger_model_is_not_read(sound: GHN, tmp_path: Path) -> None:
    save(sound, tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1 << 40)  # takes no disk
    with pytest.raises(
        CheckpointError, match=r"for this configuration, found 1,099,511,627,776; these are not"
    ):
        load(tmp_path)


def test_a_header_that_lies_about_its_length(sound: GHN, tmp_path: Path) -> None:
    save(sound, tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    for length in (0, 1, 10**9, 2**63 - 1, 2**64 - 1):
        (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + content[8:])
        with pytest.raises(CheckpointError, match="expected a whole safetensors file, found"):
            load(tmp_path)


def test_a_file_that_inflates_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * 10**7)
    with pytest.raises(CheckpointError, match=r"\(10,000,000 bytes packed into [\d,]+\); it is"):
        load(tmp_path / "bomb.pt")


# State dicts in a pickle stream, made to harm


class Calls:
    """Unpickling this would call a function with these arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def storage(content: bytes) -> Calls:
    return Calls(torch.storage._load_from_bytes, content)


def in_legacy_form(values: Any) -> bytes:
    file = io.BytesIO()
    torch.save(values, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def tensor(*arguments: Any) -> Calls:
    return Calls(torch._utils._rebuild_tensor_v2, *arguments, False, OrderedDict())


FOUR = torch.zeros(4).__reduce_ex__(2)[1][0].__reduce__()[1][0]
"""What pickle writes of four numbers' storage."""

HOSTILE = {
    "a function": (Calls(os.mkdir, "unpickled"), "the name posix.mkdir"),
    "a function of torch": (Calls(torch.load, "x.pt"), "the name torch.serialization.load"),
    "a function in a tensor's values": (
        storage(in_legacy_form(Calls(os.mkdir, "unpickled"))), "values need code to be run",
    ),
    "values of another form": (storage(pickle.dumps(Calls(os.mkdir, "unpickled"))), "in another form than"),
    "no storage": (storage(in_legacy_form(torch.zeros(4))), "a Tensor in place of a tensor's values"),
    "beyond the storage": (tensor(storage(FOUR), 0, (5,), (1,)), "reaches beyond its values"),
    "far beyond it": (tensor(storage(FOUR), 1 << 70, (1 << 70,), (1,)), "reaches beyond its values|LONG1"),
    "sizes without steps": (tensor(storage(FOUR), 0, (2, 2), (1,)), "a tensor of no size"),
    "before it": (tensor(storage(FOUR), -1, (4,), (1,)), "a tensor of no size"),
    "sizes that are none": (tensor(storage(FOUR), 0, ("2",), (1,)), "a tensor of no size"),
    "no values": (tensor("abc", 0, (4,), (1,)), "a tensor without values"),
    "arguments for a dictionary": (Calls(OrderedDict, [("a", 1)]), "OrderedDict with 1 arguments|EMPTY_LIST"),
    "an object": (object(), "the name builtins.object|copyreg"),
    "a list": ([1], "the instruction EMPTY_LIST"),
    "a float": (1.5, "the instruction BINFLOAT"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_streams_that_want_more_than_tensors_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    value, reason = HOSTILE[name]
    for protocol in (3, 4):
        (tmp_path / "evil.pt").write_bytes(pickle.dumps(OrderedDict(a=value), protocol=protocol))
        with pytest.raises(CheckpointError, match=rf"evil\.pt: .* which is refused \(.*({reason})"):
            load(tmp_path / "evil.pt")
    assert not (tmp_path / "unpickled").exists()


STREAMS = {
    "the largest place in the memo": (b"}r" + struct.pack("<I", 2**32 - 1) + b".", "found"),
    "bytes that are not there": (b"\x8e" + struct.pack("<Q", 2**40) + b".", "refused"),
    "text that is not there": (b"X" + struct.pack("<I", 2**32 - 1) + b".", "refused"),
    "an empty stack": (b"R.", "an instruction without its values"),
    "no mark": (b"}u.", "refused"),
    "entries of a tuple": (b")X\x01\x00\x00\x00aNs.", "something else than a dictionary of names"),
    "a number for a name": (b"}K\x01Ns.", "something else than a dictionary of names"),
    "a string that is called": (b"X\x17\x00\x00\x00collections.OrderedDict)R.", "something else than a name"),
    "an unknown place in the memo": (b"h\x07.", "refused"),
    "a name of tuples that share their items": (
        b")" + 20 * b"q\x01h\x01\x86" + b"q\x01h\x01\x93.", "a name that is no text",
    ),
    "another instruction": (b"(lp0\n.", "the instruction LIST"),
    "no end": (b"}", "refused"),
    "a number alone": (b"K\x01.", "it holds a int, no dictionary"),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_impossible_streams_are_refused_and_take_no_memory(name: str, tmp_path: Path) -> None:
    content, reason = STREAMS[name]
    (tmp_path / "evil.pt").write_bytes(b"\x80\x02" + content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path / "evil.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_tensor_is_used_once(tmp_path: Path) -> None:
    """The same bytes twice would be the same tensor, which the writers never make."""
    once = storage(FOUR)
    state = OrderedDict(a=tensor(once, 0, (4,), (1,)), b=tensor(once, 0, (4,), (1,)))
    (tmp_path / "x.pt").write_bytes(pickle.dumps(state, protocol=4))
    with pytest.raises(CheckpointError, match=r"x\.pt: expected a configuration or the tensors of a GHN"):
        load(tmp_path / "x.pt")  # one storage, two tensors: that is read
    content = pickle.dumps(OrderedDict(a=FOUR, b=storage(FOUR)), protocol=4)
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="a tensor's values in another form"):
        load(tmp_path / "x.pt")


def test_tensors_that_claim_more_memory_than_the_file_has_are_refused(sound: GHN, tmp_path: Path) -> None:
    large = torch.zeros(1).expand(15, 10**6)
    state = OrderedDict(sound.state_dict()) | {"embed.weight": large}
    (tmp_path / "x.pt").write_bytes(pickle.dumps(state, protocol=4))
    torch.save(state, tmp_path / "y.pt")
    for name in ("x.pt", "y.pt"):
        with pytest.raises(CheckpointError, match=r"tensors of at most [\d,]+ bytes, .*, found 6\d,\d+,\d+"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    "start", [b"\x78\x9c", b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\x00", b"\x5d\x00", b'\x04"M\x18']
)
def test_compressed_files_are_told_as_such(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(start + bytes(100))
    with pytest.raises(CheckpointError, match=r"x\.pt: expected .* found a compressed file; read it with"):
        load(tmp_path / "x.pt")


def test_reading_a_stream_takes_little_more_than_its_tensors(tmp_path: Path) -> None:
    state = OrderedDict((f"t{index}", torch.ones(1_000_000)) for index in range(25))
    (tmp_path / "x.pt").write_bytes(pickle.dumps(state, protocol=4))
    read_state(tmp_path / "x.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = [read_state(tmp_path / "x.pt") for _ in range(2)]
    assert len(kept[1]) == 25
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 160_000  # 100 MB more, not 200
