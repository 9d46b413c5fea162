"""Loading and saving: every source of weights, every kind of damage."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter, OrderedDict
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import ghn_init
from ghn_init import GHN, CheckpointError, ConfigError, GHNConfig, load
from ghn_init._hypernetwork.config import PUBLISHED_FIELDS
from ghn_init._weights import load as checkpoint
from ghn_init.cli import app

if TYPE_CHECKING:
    from collections.abc import Iterator

TINY = GHNConfig.ghn2(5, hid=4, max_shape=(3, 4, 3, 3), depth_buckets=4)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def equal(one: GHN, two: GHN) -> bool:
    states = one.state_dict(), two.state_dict()
    same = states[0].keys() == states[1].keys()
    return (
        one.config == two.config and same and all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    )


@pytest.fixture
def ghn() -> GHN:
    return GHN(TINY)


@pytest.fixture
def folder(ghn: GHN, tmp_path: Path) -> Path:
    ghn.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A small checkpoint in the published format."""
    config = GHNConfig.ghn2(5, hid=4, max_shape=(3, 4, 3, 3))
    values = {name: value for name, value in config.to_dict().items() if name in list(config.to_dict())[:8]}
    torch.save(
        {"state_dict": GHN(config).state_dict(), "config": values, "epoch": 3, "optimzer": {}},
        tmp_path / "published.pt",
    )
    return tmp_path / "published.pt"


# Where weights come from


def test_saved_weights_come_back(ghn: GHN, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    for source in (folder, str(folder), folder / "model.safetensors"):
        loaded = load(source)
        assert equal(loaded, ghn)
        assert not loaded.training
        assert all(values.requires_grad for values in loaded.parameters())
    assert equal(GHN.from_pretrained(folder), ghn)
    assert load(ghn) is ghn


def test_saving_over_weights_leaves_no_trace_of_them(ghn: GHN, folder: Path) -> None:
    other = GHN(GHNConfig.mlp(3, hid=8))
    other.save_pretrained(folder)
    assert equal(load(folder), other)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    assert not equal(load(folder), ghn)


def test_saved_files_can_be_read_by_whom_the_umask_says(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    modes = {file.name: file.stat().st_mode for file in folder.iterdir() if file.is_file()}
    assert {"model.safetensors", "config.json"} <= set(modes)
    assert set(modes.values()) == {(tmp_path / "plain").stat().st_mode}


def test_model_card_says_what_was_saved(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "library_name: ghn-init" in card
    assert "for 5 classes" in card
    assert 'weights="hf://org/repo"' in card


def test_model_card_names_the_repository_where_it_is_known(ghn: GHN, tmp_path: Path) -> None:
    ghn.save_pretrained(tmp_path, repo_id="me/mine")
    assert 'weights="hf://me/mine"' in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("my own")
    ghn.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own"


def test_a_model_card_that_cannot_be_written_is_an_error_of_ours(ghn: GHN, tmp_path: Path) -> None:
    (tmp_path / "README.md").symlink_to(tmp_path / "gone" / "card.md")
    with pytest.raises(CheckpointError, match=r"README\.md cannot be written: No such file.*; remove"):
        ghn.save_pretrained(tmp_path)


def test_loaded_model_saves_and_loads_again(ghn: GHN, folder: Path, tmp_path: Path) -> None:
    GHN.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert equal(load(tmp_path / "again"), ghn)


def test_a_published_file_gives_its_weights(published: Path) -> None:
    loaded = load(published)
    state = torch.load(published, weights_only=True)["state_dict"]
    assert loaded.config == GHNConfig.ghn2(5, hid=4, max_shape=(3, 4, 3, 3))
    assert all(torch.equal(values, state[name]) for name, values in loaded.state_dict().items())


def test_the_reference_file_gives_its_weights(shared: Path) -> None:
    assert load(shared / "parity" / "ghn2_cifar10_random.pt").config == GHNConfig.ghn2()


def test_bundled_weights_are_found_by_their_name(
    ghn: GHN, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "weights" / "mine")
    monkeypatch.setattr(checkpoint, "_bundled_folder", lambda: tmp_path / "weights")
    assert checkpoint.bundled_names() == ["mine"]
    assert equal(load("mine"), ghn)
    with pytest.raises(CheckpointError, match=r"'yours': no such weights; expected a bundled name \(mine\)"):
        load("yours")


def test_loading_leaves_the_random_state_alone(folder: Path) -> None:
    state = torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_weights_become_float32(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({name: values.half() for name, values in state.items()}, folder / "model.safetensors")
    loaded = load(folder)
    assert {values.dtype for values in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.embed.weight, state["embed.weight"].half().float())


def test_weights_go_to_the_device_asked_for(folder: Path) -> None:
    assert load(folder, device="meta").device.type == "meta"


# Damage


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file; expected model\.safetensors and"):
        load(folder)
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        GHN.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_weights_are_refused(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: expected a whole safetensors file, found"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", CheckpointError, r"config\.json: expected JSON, found"),
        ("[1]", CheckpointError, r"config\.json: expected a JSON object, found list"),
        ('{"hidden": 3}', ConfigError, r"config\.json: GHN configuration: unknown key hidden; expected"),
        ('{"hid": "x"}', ConfigError, r"config\.json: GHN configuration: hid='x'; expected an integer"),
    ],
)
def test_a_bad_configuration_is_refused(
    folder: Path, text: str, error: type[Exception], message: str
) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(error, match=message):
        load(folder)


def test_all_wrong_tensors_are_listed(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["embed.weight"] = torch.zeros(3, 4)
    state["ln.bias"][1] = torch.nan
    state["ln.weight"] = torch.zeros(4, dtype=torch.int64)
    state["surplus"] = state.pop("gnn.gru.bias_hh")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    for part in (
        "model.safetensors", "gnn.gru.bias_hh is missing", "surplus is unknown",
        "ln.weight is no tensor of floats", "embed.weight is (3, 4), expected (15, 4)",
        "ln.bias has values that are not finite",
    ):  # fmt: skip
        assert part in str(caught.value)


def test_weights_of_another_configuration_are_refused(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"ve": False, "depth_buckets": 0}))
    with pytest.raises(CheckpointError, match=r"use the configuration that they were trained with"):
        load(folder)


class Payload:
    """Unpickling this would call a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("unpickled",))


def test_files_that_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Payload(), "config": {}}, "evil.pt")
    with pytest.raises(
        CheckpointError, match=r"evil\.pt: .* needs code to be run to read it, which is refused"
    ) as raised:
        load("evil.pt")
    assert "(it calls posix.mkdir)" in str(raised.value) or os.name != "posix"
    assert "weights_only" not in str(raised.value)
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken zip"])
def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "thing.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"thing\.pt: expected a checkpoint"):
        load(tmp_path / "thing.pt")


@pytest.mark.parametrize("keep", [100, -100])
def test_a_truncated_published_file_is_refused(published: Path, keep: int) -> None:
    published.write_bytes(published.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"published\.pt: expected a checkpoint .* damaged"):
        load(published)


def test_a_published_file_with_a_bad_configuration_is_refused(published: Path) -> None:
    found = torch.load(published, weights_only=True)
    torch.save(torch.zeros(3), published)
    with pytest.raises(CheckpointError, match=r"expected a dictionary with state_dict and .*, found Tensor"):
        load(published)
    torch.save({**found, "config": {**found["config"], "ve": 3}}, published)
    with pytest.raises(ConfigError, match=r"published\.pt: GHN configuration: ve=3"):
        load(published)
    del found["config"]["hid"]
    torch.save(found, published)
    with pytest.raises(ConfigError, match=r"published\.pt: .* lacks hid"):
        load(published)


def test_things_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="weights of type int; expected a name, a path or a GHN"):
        load(3)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no such weights"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"^weights='': the name is empty; expected a bundled name"):
        load("")
    for address in ("hf://", "hf://org", "hf://org/repo/more", "hf://org/repo@"):
        with pytest.raises(CheckpointError, match="expected hf://org/repo or hf://org/repo@revision"):
            load(address)


# The hub, served from this machine


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face hub that downloads files: one repository, two names and revisions."""

    asked: ClassVar[list[str]] = []

    def __init__(self, *args: Any, folder: Path, **kwargs: Any) -> None:
        self.folder = folder
        super().__init__(*args, **kwargs)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.asked.append(self.path)
        file = self.folder / self.path.rpartition("/")[2]
        known = any(
            self.path.startswith(f"/{repo}/resolve/{revision}/")
            for repo in ("org/repo", "SamsungSAILMontreal/ghn3")
            for revision in ("main", "v1", COMMIT)
        )
        content = file.read_bytes() if known and file.is_file() else b""
        error = "" if content else "EntryNotFound" if known else "RepoNotFound"
        self.send(content, file=file.name, error=error, body=body)

    def send(self, content: bytes, *, file: str, error: str = "", body: bool = True) -> None:
        self.send_response(404 if error else 200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{len(content)}-{file}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Be silent."""


@pytest.fixture
def hub(folder: Path) -> Iterator[str]:
    Hub.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder=folder))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def in_new_process(code: str, home: Path, endpoint: str, **environment: str) -> str:
    """Run code in a process whose hub is `endpoint`, which huggingface_hub reads when it is imported."""
    source = Path(ghn_init.__file__).parent.parent
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    variables = kept | {
        "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environment,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=600, check=False
    )
    return done.stdout + done.stderr


LOAD = """
import ghn_init
for address in {addresses!r}:
    try:
        ghn = ghn_init.load(address)
        print(address, "gives", float(ghn.embed.weight.detach().double().sum()))
    except ghn_init.CheckpointError as error:
        print(address, "fails:", error)
"""


PATIENT = "import ghn_init._weights.hub as hub\nassert hub.PATIENCE\nhub.PATIENCE = 1.0\n"
"""Code that makes the hub be given up after a second."""


@pytest.fixture(params=["stalls", "hangs up"])
def silent_hub(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[str]]]:
    """The address of a server that takes connections and never answers, and the connections that it took."""
    taken: list[str] = []
    over = threading.Event()

    class Silent(BaseRequestHandler):
        def handle(self) -> None:
            taken.append(request.param)
            if request.param == "stalls":
                over.wait(600)

    class Server(ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", taken
        over.set()
        server.shutdown()


def test_a_hub_that_does_not_answer_is_asked_once_and_then_its_cache(
    hub: str, silent_hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, taken = silent_hub
    load_it = PATIENT + LOAD.format(addresses=["hf://org/repo"])
    found = in_new_process(load_it, tmp_path / "home", address)
    assert re.match(r"hf://org/repo fails: hf://org/repo: expected .* found \w+: .* check its name", found)
    assert len(taken) == 1
    fetched = in_new_process(load_it, tmp_path / "home", hub)
    assert "gives" in fetched
    assert in_new_process(load_it, tmp_path / "home", address).splitlines()[0] == fetched.splitlines()[0]
    assert len(taken) == 2


class Stalling(Hub):
    """A hub that says nothing of a file, or says how long it is and then sends nothing or half of it."""

    over = threading.Event()

    def __init__(self, *args: Any, folder: Path, sends: str, **kwargs: Any) -> None:
        self.sends = sends
        super().__init__(*args, folder=folder, **kwargs)

    def answer(self, *, body: bool) -> None:
        if not self.path.endswith(".safetensors") or (self.sends != "nothing" and not body):
            super().answer(body=body)
            return
        self.asked.append(self.path)
        if self.sends != "nothing":
            content = (self.folder / "model.safetensors").read_bytes()
            self.send(content, file="model.safetensors", body=False)
            self.wfile.write(content[: len(content) // 2 if self.sends == "half" else 0])
        self.over.wait(600)


@pytest.mark.parametrize("sends", ["nothing", "headers", "half"])
def test_a_download_that_stalls_ends_in_an_error_that_says_so(
    folder: Path, tmp_path: Path, sends: str
) -> None:
    Stalling.over.clear()
    Hub.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Stalling, folder=folder, sends=sends)) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        code = PATIENT + LOAD.format(addresses=["hf://org/repo"])
        found = in_new_process(code, tmp_path / "home", address, HF_HUB_DOWNLOAD_TIMEOUT="1")
        Stalling.over.set()
        server.shutdown()
    assert re.fullmatch(
        r"hf://org/repo fails: hf://org/repo: .*found ReadTimeout: .*, the connection.*\n", found
    )
    asked = ["/org/repo/resolve/main/model.safetensors"]
    assert Hub.asked == (asked if sends == "nothing" else 3 * asked)  # HEAD twice, then GET once


def test_a_repository_is_asked_for_its_two_files_and_nothing_else(hub: str, tmp_path: Path) -> None:
    assert "gives" in in_new_process(LOAD.format(addresses=["hf://org/repo"]), tmp_path / "home", hub)
    weights, config = (f"/org/repo/resolve/main/{name}" for name in ("model.safetensors", "config.json"))
    assert Counter(Hub.asked) == {weights: 3, config: 2}  # what they are, then their contents


def test_weights_come_from_the_hub_and_then_from_its_cache(ghn: GHN, hub: str, tmp_path: Path) -> None:
    total = float(ghn.embed.weight.detach().double().sum())
    addresses = ["hf://org/repo", "hf://org/repo@v1", "hf://org/other"]
    found = in_new_process(LOAD.format(addresses=addresses), tmp_path / "home", hub)
    assert f"hf://org/repo gives {total}" in found
    assert f"hf://org/repo@v1 gives {total}" in found
    assert "hf://org/other fails: hf://org/other: expected a repository with model.safetensors and" in found
    assert "/org/repo/resolve/v1/config.json" in Hub.asked
    # Once more without a connection: what was fetched is found in the cache.
    nowhere = "http://127.0.0.1:9"
    offline = in_new_process(LOAD.format(addresses=addresses), tmp_path / "home", nowhere, HF_HUB_OFFLINE="1")
    assert f"hf://org/repo gives {total}" in offline
    assert "hf://org/other fails: hf://org/other: expected" in offline
    assert "HF_HUB_OFFLINE" in offline


def test_a_published_file_on_the_hub_is_loaded(hub: str, folder: Path, tmp_path: Path) -> None:
    original = GHN(GHNConfig.ghn3("t", 5, hid=8, layers=2, heads=2, max_shape=(3, 4, 4, 4)))
    (folder / "ghn3tm8.pt").write_bytes(pickle.dumps(OrderedDict(original.state_dict()), protocol=4))
    (folder / "model.safetensors").unlink()
    code = """
import ghn_init, torch
for address in ("ghn3tm8.pt", "ghn3tm8.pt@v1", "other/ghn3tm8.pt"):
    layer = torch.nn.Conv2d(3, 8, 3)
    ghn_init.predict(layer, weights=f"hf://SamsungSAILMontreal/ghn3/{address}", head="predict")
    print(address, "gives", float(layer.weight.detach().double().sum()))
for address in ("hf://SamsungSAILMontreal/ghn3", "hf://SamsungSAILMontreal/ghn3/no.pt"):
    try:
        ghn_init.load(address)
    except ghn_init.CheckpointError as error:
        print(error)
"""
    layer = ghn_init.predict(torch.nn.Conv2d(3, 8, 3), original.eval(), head="predict")
    total = float(layer.weight.detach().double().sum())
    online = in_new_process(code, tmp_path / "home", hub)
    offline = in_new_process(code, tmp_path / "home", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    for found in (online, offline):
        for address in ("ghn3tm8.pt", "ghn3tm8.pt@v1", "other/ghn3tm8.pt"):
            assert f"{address} gives {total}" in found, found
    assert "expected a repository with model.safetensors and config.json" in online
    assert "a published file there is hf://SamsungSAILMontreal/ghn3/FILE.pt" in online
    assert "hf://SamsungSAILMontreal/ghn3: expected a repository with no.pt" in online
    asked = [path for path in Hub.asked if path.endswith("ghn3tm8.pt")]
    assert {path.split("/resolve/")[1] for path in asked} >= {
        "main/ghn3tm8.pt", "v1/ghn3tm8.pt", "main/other/ghn3tm8.pt",
    }  # fmt: skip


def test_from_pretrained_reads_the_hub(ghn: GHN, hub: str, tmp_path: Path) -> None:
    code = """
import ghn_init
for options in ({}, {"revision": "v1"}, {"local_files_only": True}, {"force_download": True}):
    ghn = ghn_init.GHN.from_pretrained("org/repo", **options)
    print(options, float(ghn.embed.weight.detach().double().sum()))
try:
    ghn_init.GHN.from_pretrained("org/other")
except ghn_init.CheckpointError as error:
    print(error)
"""
    found = in_new_process(code, tmp_path / "home", hub)
    total = float(ghn.embed.weight.detach().double().sum())
    assert found.count(str(total)) == 4, found
    assert "hf://org/other: expected a repository with" in found


def test_a_repository_without_weights_is_refused(hub: str, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    found = in_new_process(LOAD.format(addresses=["hf://org/repo"]), tmp_path / "home", hub)
    assert "hf://org/repo fails: hf://org/repo: expected a repository with model.safetensors" in found


def test_loose_loading_is_refused(folder: Path) -> None:
    with pytest.raises(TypeError, match="strict"):
        GHN.from_pretrained(folder, strict=False)  # type: ignore[call-arg]


def test_pushing_uploads_the_saved_files(ghn: GHN, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    uploaded: dict[str, Any] = {}

    class Api:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> huggingface_hub.RepoUrl:
            return huggingface_hub.RepoUrl(f"https://huggingface.co/org/{repo_id}")

        def upload_folder(self, *, folder_path: Path, repo_id: str, **_: Any) -> str:
            uploaded[repo_id] = load(folder_path), sorted(path.name for path in Path(folder_path).iterdir())
            assert f'weights="hf://{repo_id}"' in (folder_path / "README.md").read_text()
            return "commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert ghn.push_to_hub("repo") == "commit"  # the hub puts the user's name before it
    loaded, names = uploaded["org/repo"]
    assert equal(loaded, ghn)
    assert names == ["README.md", "config.json", "model.safetensors"]


class Refusing(BaseHTTPRequestHandler):
    """A hub that lets nobody write; a repository's name says what it answers."""

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        status = next(status for status in (401, 403, 404) if str(status).encode() in asked)
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.send_error(403)

    def log_message(self, *_: Any) -> None:
        """Be silent."""


PUSH = """
import ghn_init
ghn = ghn_init.GHN(ghn_init.GHNConfig.mlp(3, hid=4, max_shape=(3, 4, 3, 3)))
for repo in ("me/401", "me/403", "me/404", "me/bad name"):
    try:
        ghn.push_to_hub(repo, token="x")
    except ghn_init.CheckpointError as error:
        print(repo, "fails:", error)
"""


@pytest.mark.parametrize("up", [True, False])
def test_what_cannot_be_uploaded_is_an_error_with_the_remedy(tmp_path: Path, up: bool) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port if up else 9}"
        found = in_new_process(PUSH, tmp_path / "home", address)
        server.shutdown()
    lines = found.splitlines()
    assert len(lines) == 4, found
    for line, name in zip(lines, ("me/401", "me/403", "me/404", "me/bad name"), strict=True):
        assert line.startswith(f"{name} fails: hf://{name}: expected a repository to upload to, found ")
        assert "check its name, that the token may write to it (`hf auth login`, HF_TOKEN), and" in line
    assert up or re.search(r"found Connect(ion)?Error: ", lines[0])


def test_local_weights_need_no_hub(folder: Path) -> None:
    code = (
        f"import sys, ghn_init; ghn_init.load({str(folder)!r}); "
        "print('loaded', [name for name in ('huggingface_hub', 'torchvision') if name in sys.modules])"
    )
    assert "loaded []" in in_new_process(code, folder, "http://127.0.0.1:9")


# Published files of every kind, and what `convert` makes of them

PUBLISHED = {
    "ghn2-cifar10": (GHNConfig.ghn2(), 1_620_764, "GHN-2 for 10 classes, tensors up to 64x64x11x11"),
    "ghn1-cifar10": (GHNConfig.ghn1(), 1_620_668, "GHN-1 for 10 classes, tensors up to 64x64x11x11"),
    "mlp-cifar10": (GHNConfig.mlp(), 1_614_396, "MLP for 10 classes, tensors up to 64x64x11x11"),
    "ghn2-imagenet": (GHNConfig.imagenet(), 2_319_720, "GHN-2 for 1000 classes, tensors up to 64x64x16x16"),
    "ghn1-imagenet": (
        GHNConfig.ghn1(1000, max_shape=(64, 64, 16, 16)), 2_319_624,
        "GHN-1 for 1000 classes, tensors up to 64x64x16x16",
    ),
    "mlp-imagenet": (
        GHNConfig.mlp(1000, max_shape=(64, 64, 16, 16)), 2_313_352,
        "MLP for 1000 classes, tensors up to 64x64x16x16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_kind_loads_converts_and_predicts(name: str, tmp_path: Path) -> None:
    config, parameters, described = PUBLISHED[name]
    original = GHN(config)
    values = {key: value for key, value in config.to_dict().items() if key in PUBLISHED_FIELDS}
    published = tmp_path / f"{name}.pt"
    torch.save(
        {"state_dict": original.state_dict(), "config": values | {"max_shape": config.max_shape}, "epoch": 3},
        published,
    )
    done = CliRunner().invoke(app, ["convert", str(published), str(tmp_path / "out")])
    assert done.exit_code == 0, done.stderr
    assert done.stderr == f"{published}: {described}, {parameters:,} parameters; saved {tmp_path / 'out'}\n"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    read, converted = load(published), load(tmp_path / "out")
    assert equal(read, original)
    assert equal(converted, original)
    layer = torch.nn.Conv2d(3, 8, 3)
    same = [ghn_init.predict(layer, ghn, head="predict").weight.clone() for ghn in (read, converted)]
    assert torch.equal(*same)


def test_converting_a_damaged_file_writes_nothing(published: Path, tmp_path: Path) -> None:
    published.write_bytes(published.read_bytes()[:5000])
    done = CliRunner().invoke(app, ["convert", str(published), str(tmp_path / "out")])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"ghn-init: error: {published}: expected a checkpoint")
    assert not (tmp_path / "out").exists()


def test_converting_to_where_nothing_can_be_written(published: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = CliRunner().invoke(app, ["convert", str(published), str(tmp_path / "file" / "out")])
    assert done.exit_code == 1
    assert "cannot be written" in done.stderr
