"""From a model id to a complete, verified folder: the real clients against a hub on loopback."""

from __future__ import annotations

import datetime
import errno
import json
import logging
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import COMMIT, SHARD, Hub, checkpoint, litter, names
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumpd
from langchain_core.runnables import ConfigurableField

from gemma2_stream import ChatGemma2, Gemma2LLM
from gemma2_stream import hub as hub_module
from gemma2_stream.errors import (
    CheckpointError,
    ChecksumError,
    DownloadError,
    ModelAccessError,
    ModelNotFoundError,
    ParameterError,
)
from gemma2_stream.hub import resolve
from gemma2_stream.hub_clients import may_send_token

# modelscope_hub reads these once, at import; a dead hub would take half a minute otherwise.
os.environ.setdefault("MODELSCOPE_DOWNLOAD_MAX_RETRIES", "0")
os.environ.setdefault("MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS", "1")

MODELSCOPE = "LLM-Research/gemma-2-2b-it"
HUGGINGFACE = "google/gemma-2-2b-it"
SECRET = "hf_secret0123456789"
OWN = ("huggingface.co", "modelscope.cn")
both = pytest.mark.parametrize("model", [MODELSCOPE, HUGGINGFACE], ids=["modelscope", "hf"])


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's, and a token that must not get out in any test."""
    for name in tuple(os.environ):
        if name.startswith(("HF_", "TRANSFORMERS_")) or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", SECRET)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(checkpoint() | litter()) as server:
        point_to(server.url, monkeypatch)
        yield server
    assert not [r for r in server.requests if SECRET in f"{r.path} {r.headers}"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)


# --- complete ------------------------------------------------------------------------------------


@both
def test_only_what_a_checkpoint_needs_arrives(model: str, hub: Hub, cache: Path) -> None:
    folder = resolve(model, cache_dir=cache)
    assert names(folder) == sorted(checkpoint())
    assert all((folder / name).read_bytes() == body for name, body in checkpoint().items())
    assert cache in folder.parents


@both
def test_a_hostile_listing_writes_nothing_outside(model: str, hub: Hub, cache: Path) -> None:
    resolve(model, cache_dir=cache)
    assert not list(cache.parent.rglob("evil*"))
    assert not [r for r in hub.requests if "evil" in r.path]


@both
def test_the_second_use_asks_nothing(model: str, hub: Hub, cache: Path) -> None:
    first = resolve(model, cache_dir=cache)
    hub.requests.clear()
    assert resolve(model, cache_dir=cache) == first
    assert resolve(model, cache_dir=cache, local_files_only=True) == first
    assert hub.requests == []


@both
def test_without_weights_all_else_arrives(model: str, hub: Hub, cache: Path) -> None:
    """And is asked for once; who wants the weights later gets them."""
    folder = resolve(model, cache_dir=cache, weights=False)
    asked = len(hub.requests)
    assert not list(folder.glob("*.safetensors"))
    assert {"config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert resolve(model, cache_dir=cache, weights=False) == folder
    assert len(hub.requests) == asked
    assert (resolve(model, cache_dir=cache) / SHARD).is_file()


def test_whoever_has_the_weights_asks_nothing_without(hub: Hub, cache: Path) -> None:
    folder = resolve(HUGGINGFACE, cache_dir=cache)
    asked = len(hub.requests)
    assert resolve(HUGGINGFACE, cache_dir=cache, weights=False) == folder
    assert len(hub.requests) == asked


def test_a_folder_without_weights_needs_the_rest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"it lacks tokenizer\.json"):
        resolve(tmp_path, weights=False)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert resolve(tmp_path, weights=False) == tmp_path


@both
def test_refresh_fetches_what_has_changed_and_no_more(model: str, hub: Hub, cache: Path) -> None:
    resolve(model, cache_dir=cache)
    hub.requests.clear()
    hub.commits = ["beef" * 10]
    hub.files[SHARD] = hub.files[SHARD][::-1]
    folder = resolve(model, cache_dir=cache, refresh=True)
    assert (folder / SHARD).read_bytes() == hub.files[SHARD]
    assert len(hub.asked(SHARD)) == 1
    assert hub.asked("tokenizer.json") == []


@both
def test_it_says_what_is_loaded_from_where_to_where(
    model: str, hub: Hub, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    resolve(model, cache_dir=cache)
    out, err = capfd.readouterr()
    assert out == ""
    assert f"gemma2_stream: {model} (0.00 GB) from {hub.url} to {cache}\n" in err


@both
def test_a_revision_is_asked_for_by_name(model: str, hub: Hub, cache: Path) -> None:
    folder = resolve(model, revision="v1", cache_dir=cache)
    assert any("v1" in r.path for r in hub.requests)
    hub.requests.clear()
    assert resolve(model, revision="v1", cache_dir=cache) == folder
    assert hub.requests == []


def test_modelscopes_old_folder_is_used_for_what_it_was_verified_as(hub: Hub, cache: Path) -> None:
    old = cache / "hub" / "models" / MODELSCOPE
    old.mkdir(parents=True)
    for name, body in checkpoint().items():
        (old / name).write_bytes(body)
    assert resolve(MODELSCOPE, cache_dir=cache) == old
    assert hub.asked(SHARD) == []
    asked = len(hub.requests)
    resolve(MODELSCOPE, cache_dir=cache)
    assert len(hub.requests) == asked
    resolve(MODELSCOPE, cache_dir=cache, revision="v1")  # the old layout has one folder for all
    assert len(hub.requests) > asked


def test_source_overrules_the_owner(hub: Hub, cache: Path) -> None:
    resolve(HUGGINGFACE, source="modelscope", cache_dir=cache)
    assert all(r.path.startswith("/api/v1/") for r in hub.requests)


def test_the_clients_own_cache_folders_are_the_default(hub: Hub, tmp_path: Path) -> None:
    code = "import sys; from gemma2_stream.hub import resolve; print(*map(resolve, sys.argv[1:]))"
    places = {"HF_HOME": str(tmp_path / "a"), "MODELSCOPE_CACHE": str(tmp_path / "b")}
    command = [sys.executable, "-c", code, HUGGINGFACE, MODELSCOPE]
    root = str(Path(hub_module.__file__).parents[1])
    environ = os.environ | places | {"PYTHONPATH": root}
    run = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [
        f"{tmp_path}/a/hub/models--google--gemma-2-2b-it/snapshots/{COMMIT}",
        f"{tmp_path}/b/models/LLM-Research--gemma-2-2b-it/snapshots/master",
    ]
    assert SECRET not in run.stderr


# --- interrupted ---------------------------------------------------------------------------------


@both
def test_a_broken_transfer_goes_on_where_it_stopped(model: str, hub: Hub, cache: Path) -> None:
    hub.files |= checkpoint(weights=12_000_000)  # Hugging Face's client writes steps of 10 MiB
    hub.cut[SHARD] = 11_000_000
    with pytest.raises(DownloadError, match="run the same command again") as caught:
        resolve(model, cache_dir=cache)
    assert caught.value.__cause__ is not None
    hub.down.clear()
    hub.requests.clear()
    folder = resolve(model, cache_dir=cache)
    assert (folder / SHARD).read_bytes() == hub.files[SHARD]
    (again,) = hub.asked(SHARD)
    assert again.headers["Range"].startswith("bytes=1")
    assert int(again.headers["Range"][6:-1]) >= 10_000_000


@both
@pytest.mark.parametrize("kind", [Gemma2LLM, ChatGemma2])
def test_a_broken_transfer_is_taken_up_again_max_retries_times(
    kind: type[Gemma2LLM | ChatGemma2], model: str, hub: Hub, cache: Path
) -> None:
    """So often and no more: one failure beyond it is the caller's, who can begin again."""
    hub.busy[SHARD] = 5
    with pytest.raises(DownloadError, match="broke off"):
        _ = kind(model, cache_dir=cache, max_retries=2).engine
    assert len(hub.asked(SHARD)) == 3
    with pytest.raises(CheckpointError):  # complete, and what arrived are no weights
        _ = kind(model, cache_dir=cache, max_retries=2).engine
    assert len(hub.asked(SHARD)) == 6
    assert len(hub.asked("tokenizer.json")) == 1


@both
def test_nothing_but_a_broken_transfer_is_tried_again(model: str, hub: Hub, cache: Path) -> None:
    """A refusal is final; and without `max_retries` so is a break."""
    hub.status = 403
    with pytest.raises(ModelAccessError):
        resolve(model, cache_dir=cache, max_retries=3)
    assert len(hub.requests) == 1
    hub.status, hub.silent = None, True
    hub.requests.clear()
    with pytest.raises(DownloadError):
        resolve(model, cache_dir=cache)
    once = len(hub.requests)
    with pytest.raises(DownloadError):
        resolve(model, cache_dir=cache, max_retries=2)
    assert len(hub.requests) == once + 3 * once


@pytest.mark.parametrize("wrong", [-1, 1.5, "often"])
@pytest.mark.parametrize("kind", [Gemma2LLM, ChatGemma2])
def test_max_retries_is_a_whole_number(kind: type, wrong: object) -> None:
    """Said by the constructor, with the value."""
    with pytest.raises(ParameterError, match=f"max_retries={wrong!r}"):
        kind("demo", max_retries=wrong)


@both
def test_a_partial_file_that_is_too_long_is_begun_anew(model: str, hub: Hub, cache: Path) -> None:
    part = partial(model, hub, cache)
    part.parent.mkdir(parents=True)
    part.write_bytes(hub.files[SHARD] * 2)
    assert (resolve(model, cache_dir=cache) / SHARD).read_bytes() == hub.files[SHARD]


@both
def test_two_at_once_fetch_it_once(model: str, hub: Hub, cache: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: resolve(model, cache_dir=cache), range(2))
    assert first == second
    assert len(hub.asked(SHARD)) == 1


def test_a_branch_that_moves_meanwhile(hub: Hub, cache: Path) -> None:
    hub.commits = ["a" * 40, "b" * 40]
    folder = resolve(HUGGINGFACE, cache_dir=cache)
    assert folder.name == "b" * 40
    assert (folder / "config.json").read_bytes() == checkpoint()["config.json"].upper()


def test_large_files_can_be_resumed_even_where_xet_is_offered(hub: Hub, cache: Path) -> None:
    """Xet's own transfers cannot, so nothing goes by them."""
    hub.xet = True
    folder = resolve(HUGGINGFACE, cache_dir=cache)
    assert (folder / SHARD).read_bytes() == hub.files[SHARD]
    assert not [r for r in hub.requests if "xet" in r.path]


@both
def test_a_lost_shard_is_fetched_again_and_nothing_else(model: str, hub: Hub, cache: Path) -> None:
    folder = resolve(model, cache_dir=cache)
    lost = folder / SHARD
    lost.resolve().unlink()
    lost.unlink(missing_ok=True)
    hub.requests.clear()
    with pytest.raises(DownloadError, match=SHARD):
        resolve(model, cache_dir=cache, local_files_only=True)
    assert resolve(model, cache_dir=cache) == folder
    assert lost.read_bytes() == hub.files[SHARD]
    assert hub.asked("tokenizer.json") == []


def test_a_refresh_that_broke_off_is_no_checkpoint(hub: Hub, cache: Path) -> None:
    resolve(MODELSCOPE, cache_dir=cache)
    hub.files[SHARD] = hub.files[SHARD][::-1]
    hub.down.add(SHARD)
    with pytest.raises(DownloadError):
        resolve(MODELSCOPE, cache_dir=cache, refresh=True)
    with pytest.raises(DownloadError, match="broke off"):
        resolve(MODELSCOPE, cache_dir=cache, local_files_only=True)


@both
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(model: str, hub: Hub, cache: Path) -> None:
    hub.files |= checkpoint(weights=2_000_000)
    hub.down.add(SHARD)
    with pytest.raises(DownloadError):
        resolve(model, cache_dir=cache)
    hub.down.clear()
    part = partial(model, hub, cache)
    part.unlink(missing_ok=True)
    part.symlink_to("/dev/full")
    with pytest.raises(DownloadError, match=r"disk that holds .* is full") as caught:
        resolve(model, cache_dir=cache)
    assert getattr(caught.value.__cause__, "errno", errno.ENOSPC) == errno.ENOSPC


def partial(model: str, hub: Hub, cache: Path) -> Path:
    if model == MODELSCOPE:
        folder = cache / "models/LLM-Research--gemma-2-2b-it/snapshots/master"
        return folder / f"{SHARD}.incomplete"
    return cache / f"models--google--gemma-2-2b-it/blobs/{hub.sha256(SHARD)}.incomplete"


# --- damaged -------------------------------------------------------------------------------------


@both
def test_a_damaged_file_is_removed_and_fetched_again(model: str, hub: Hub, cache: Path) -> None:
    hub.spoil.add(SHARD)
    with pytest.raises(ChecksumError, match="run the same command again") as caught:
        resolve(model, cache_dir=cache)
    assert SHARD in str(caught.value)
    assert hub.sha256(SHARD)[:16] in str(caught.value)
    assert not [p for p in cache.rglob("*") if p.name == SHARD or hub.sha256(SHARD) == p.name]
    hub.spoil.clear()
    assert (resolve(model, cache_dir=cache) / SHARD).read_bytes() == hub.files[SHARD]


@both
def test_small_files_are_verified_too(model: str, hub: Hub, cache: Path) -> None:
    hub.spoil.add("tokenizer_config.json")
    with pytest.raises(ChecksumError, match="'tokenizer_config"):
        resolve(model, cache_dir=cache)


def test_what_another_program_downloaded_is_verified(hub: Hub, cache: Path) -> None:
    hub.spoil.add(SHARD)
    huggingface_hub.snapshot_download(
        HUGGINGFACE,
        cache_dir=cache,
        endpoint=hub.url,
        token=False,
        allow_patterns=list(checkpoint()),
    )
    with pytest.raises(ChecksumError):
        resolve(HUGGINGFACE, cache_dir=cache)


@pytest.mark.parametrize("name", [SHARD, "tokenizer_config.json"])
def test_what_lies_damaged_in_modelscopes_cache_is_not_used(
    name: str, hub: Hub, cache: Path
) -> None:
    """As another program, or a failing disk, may have left it: of the right size."""
    folder = resolve(MODELSCOPE, cache_dir=cache)
    (folder / ".gemma2_stream.json").unlink()
    (folder / name).write_bytes(hub.files[name][:-1] + b"?")
    try:
        folder = resolve(MODELSCOPE, cache_dir=cache)
    except ChecksumError:
        folder = resolve(MODELSCOPE, cache_dir=cache)
    assert (folder / name).read_bytes() == hub.files[name]


# --- refused, missing, dead ----------------------------------------------------------------------


@both
def test_a_missing_model_names_the_other_hub(model: str, hub: Hub, cache: Path) -> None:
    missing = model.replace("2b", "3b")
    other = "huggingface" if model == MODELSCOPE else "modelscope"
    with pytest.raises(ModelNotFoundError, match=f"{missing}.*source='{other}'") as caught:
        resolve(missing, cache_dir=cache)
    assert caught.value.__cause__ is not None


@both
def test_a_missing_revision_is_named(model: str, hub: Hub, cache: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="revision 'v9'"):
        resolve(model, revision="v9", cache_dir=cache)


@both
def test_a_gated_model_says_where_the_licence_is(model: str, hub: Hub, cache: Path) -> None:
    hub.gated = True
    with pytest.raises(ModelAccessError, match=f"licence at https://[a-z./]*{model}") as caught:
        resolve(model, cache_dir=cache)
    assert "never sent to a mirror" in str(caught.value)
    assert ("'LLM-Research/gemma-2-2b-it' on ModelScope" in str(caught.value)) == (
        model == HUGGINGFACE
    )


@both
@pytest.mark.parametrize("status", [401, 403])
def test_unauthorised(status: int, model: str, hub: Hub, cache: Path) -> None:
    hub.status = status
    with pytest.raises(ModelAccessError, match=f"refuses '{model}'"):
        resolve(model, cache_dir=cache)


@both
def test_a_broken_hub(model: str, hub: Hub, cache: Path) -> None:
    hub.status = 500
    with pytest.raises(DownloadError, match="run the same command again"):
        resolve(model, cache_dir=cache)


@both
def test_what_is_no_hub(model: str, hub: Hub, cache: Path) -> None:
    hub.page = b"<html>Log in to the hotel's network</html>"
    with pytest.raises(DownloadError, match=f"check the network and the endpoint {hub.url}"):
        resolve(model, cache_dir=cache)


@both
def test_a_hub_that_closes_without_an_answer(model: str, hub: Hub, cache: Path) -> None:
    hub.silent = True
    with pytest.raises(DownloadError, match="check the network"):
        resolve(model, cache_dir=cache)


@both
def test_a_hub_that_is_not_there(model: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound:  # bound and not listening: every connection is refused
        bound.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{bound.getsockname()[1]}", monkeypatch)
        with pytest.raises(DownloadError, match="check the network"):
            resolve(model, cache_dir=cache)


@both
def test_a_complete_copy_is_offered_when_the_hub_is_dead(model: str, hub: Hub, cache: Path) -> None:
    folder = resolve(model, cache_dir=cache)
    (folder / ".gemma2_stream.json").unlink()  # as if another program had fetched it
    hub.silent = True
    with pytest.raises(DownloadError, match="local_files_only=True uses it"):
        resolve(model, cache_dir=cache)
    assert resolve(model, cache_dir=cache, local_files_only=True) == folder


@both
def test_offline_with_nothing_in_the_cache(model: str, hub: Hub, cache: Path) -> None:
    with pytest.raises(DownloadError, match="gemma2-stream download"):
        resolve(model, cache_dir=cache, local_files_only=True)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_by_environment(
    name: str, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
        resolve(HUGGINGFACE, cache_dir=cache)
    assert hub.requests == []


@both
def test_a_repository_without_safetensors(model: str, hub: Hub, cache: Path) -> None:
    hub.files = {n: b for n, b in litter().items() if not n.endswith(".safetensors")}
    with pytest.raises(CheckpointError, match=f"'{model}' holds no"):
        resolve(model, cache_dir=cache)


# --- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "own"),
    [
        ("https://huggingface.co", True),
        ("https://HuggingFace.co/", True),
        ("https://modelscope.cn", True),
        ("https://www.modelscope.cn", True),
        ("https://modelscope.ai", True),
        ("http://huggingface.co", False),
        ("https://hf-mirror.com", False),
        ("https://huggingface.co.evil.com", False),
        ("https://huggingface.co@evil.com", False),
        ("https://evil.com\\@huggingface.co", False),
        ("https://evil.com/huggingface.co", False),
        ("https://user:password@huggingface.co", False),
        ("http://127.0.0.1:1", False),
        ("", False),
    ],
)
def test_who_may_see_a_token(endpoint: str, own: bool) -> None:
    assert may_send_token(endpoint) is own


@both
def test_a_mirror_sees_no_token(
    model: str,
    hub: Hub,
    cache: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The environment has a token, and so has the saved login."""
    from modelscope_hub import HubConfig

    HubConfig(token="").save_token(SECRET)
    capfd.readouterr()
    caplog.set_level(logging.DEBUG)
    resolve(model, cache_dir=cache)
    assert len(hub.requests) > len(checkpoint())
    assert not [r for r in hub.requests if r.headers["Authorization"] or r.headers["Cookie"]]
    hub.status = 403
    with pytest.raises(ModelAccessError) as caught:
        resolve(model, cache_dir=cache, refresh=True)
    out, err = capfd.readouterr()
    errors = [caught.value, caught.value.__cause__]
    assert SECRET not in "".join(map(repr, errors)) + "".join(map(str, errors))
    assert SECRET not in out + err + caplog.text


@both
def test_an_endpoint_with_a_password_is_shown_without(
    model: str, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(hub.url.replace("//", "//user:pass@word@"), monkeypatch)
    hub.status = 403
    with pytest.raises(ModelAccessError) as caught:
        resolve(model, cache_dir=cache)
    assert f"({hub.url})" in str(caught.value)
    assert "word" not in str(caught.value)


@both
def test_the_hub_itself_sees_the_token_and_its_cdn_does_not(
    model: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Through a proxy that plays https://huggingface.co, https://modelscope.cn and their CDN."""
    certificate = tmp_path / "certificate.pem"
    tls = authority(certificate, ["huggingface.co", "modelscope.cn", "cdn.example"])
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.setenv(name, str(certificate))
    caplog.set_level(logging.DEBUG)
    with Hub(checkpoint(), tls=tls, cdn="https://cdn.example") as hub:
        monkeypatch.setenv("HTTPS_PROXY", hub.url)
        huggingface_hub.close_session()  # its session has read the environment already
        folder = resolve(model, cache_dir=cache)
        huggingface_hub.close_session()
    assert (folder / SHARD).read_bytes() == hub.files[SHARD]
    to_cdn = [str(r.headers) for r in hub.requests if r.headers["Host"] == "cdn.example"]
    to_hub = [r.headers["Authorization"] for r in hub.requests if r.headers["Host"] in OWN]
    assert len(to_cdn) == 3
    assert SECRET not in "".join(to_cdn)
    assert len(to_cdn) + len(to_hub) == len(hub.requests)
    assert f"Bearer {SECRET}" in to_hub
    assert SECRET not in "".join(capfd.readouterr()) + caplog.text


KEY = "hf_given9876543210"


@both
@pytest.mark.parametrize("kind", [Gemma2LLM, ChatGemma2])
def test_an_api_key_goes_before_the_environments_and_to_the_hub_itself_only(
    kind: type[Gemma2LLM | ChatGemma2],
    model: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Through the models themselves: not to the CDN, a log, or an error."""
    certificate = tmp_path / "certificate.pem"
    tls = authority(certificate, ["huggingface.co", "modelscope.cn", "cdn.example"])
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.setenv(name, str(certificate))
    caplog.set_level(logging.DEBUG)
    with Hub(checkpoint(), tls=tls, cdn="https://cdn.example") as hub:
        monkeypatch.setenv("HTTPS_PROXY", hub.url)
        huggingface_hub.close_session()
        with pytest.raises(CheckpointError) as caught:  # what arrives are no weights
            _ = kind(model, api_key=KEY, cache_dir=cache).engine
        huggingface_hub.close_session()
    to_cdn = [str(r.headers) for r in hub.requests if r.headers["Host"] == "cdn.example"]
    to_hub = [r.headers["Authorization"] for r in hub.requests if r.headers["Host"] in OWN]
    assert len(to_cdn) == 3
    assert KEY not in "".join(to_cdn)
    assert f"Bearer {KEY}" in to_hub
    assert f"Bearer {SECRET}" not in to_hub
    assert KEY not in "".join(capfd.readouterr()) + caplog.text + repr(caught.value)


@both
@pytest.mark.parametrize("kind", [Gemma2LLM, ChatGemma2])
def test_a_mirror_sees_no_api_key(
    kind: type[Gemma2LLM | ChatGemma2], model: str, hub: Hub, cache: Path
) -> None:
    """Though it was given with the model."""
    with pytest.raises(CheckpointError):
        _ = kind(model, api_key=KEY, cache_dir=cache).engine
    assert len(hub.requests) > len(checkpoint())
    assert not [r for r in hub.requests if KEY in f"{r.path} {r.headers}"]
    assert not [r for r in hub.requests if r.headers["Authorization"] or r.headers["Cookie"]]


@pytest.mark.parametrize("kind", [Gemma2LLM, ChatGemma2])
def test_an_api_key_is_in_no_repr_trace_or_cache_key(kind: type[Gemma2LLM | ChatGemma2]) -> None:
    """What LangChain prints, sends to a tracer, saves, or looks an answer up by."""
    lookups, traced = InMemoryCache(), Traced()
    model = kind("demo", api_key=KEY, max_new_tokens=1, cache=lookups)
    model.invoke("Hello", {"callbacks": [traced]})
    configured = model.configurable_fields(max_new_tokens=ConfigurableField(id="length"))
    configured.with_config(configurable={"length": 2}).invoke("Hello", {"callbacks": [traced]})
    assert len(traced.told) == len(lookups._cache) == 2
    shown = [model, configured, traced.told, lookups._cache, dumpd(model), model.model_dump()]
    shown += [model._identifying_params, model._get_ls_params(), model.__dict__]
    assert KEY not in "".join(map(repr, shown)) + str(model) + json.dumps(dumpd(configured))
    assert model.api_key is not None
    assert model.api_key.get_secret_value() == KEY


class Traced(BaseCallbackHandler):
    """All that a tracer is told at the start of a run."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def on_llm_start(self, *args: object, **kwargs: object) -> None:
        self.told.append((args, kwargs))

    def on_chat_model_start(self, *args: object, **kwargs: object) -> None:
        self.told.append((args, kwargs))


def authority(path: Path, hosts: list[str]) -> ssl.SSLContext:
    """A certificate for `hosts` that signs itself, at `path` for whoever is to trust it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, hosts[0])])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(h) for h in hosts]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private = path.with_suffix(".key")
    private.write_bytes(key.private_bytes(pem, *plain))
    path.write_bytes(certificate.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, private)
    return context


# --- names ---------------------------------------------------------------------------------------


def test_demo_is_inside_the_package() -> None:
    assert resolve("demo") == Path(hub_module.__file__).parent / "demo"


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "model"
    folder.mkdir(parents=True)
    for name, body in checkpoint().items():
        (folder / name).write_bytes(body)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(folder) == resolve(str(folder)) == folder
    assert resolve("org/model") == Path("org/model")  # a folder goes before an id
    assert resolve("./org/model") == Path("org/model")
    assert resolve("~/org/model") == folder
    (folder / SHARD).unlink()
    with pytest.raises(CheckpointError, match=SHARD):
        resolve(folder)


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none", "C:\\none", "a\\b", "../x/y"])
def test_a_missing_folder_is_shown(name: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["", "gemma", "a/b/c", "a b/c", "owner/", "-a/b", "a/..", "я/b"])
def test_what_is_no_model_is_shown(name: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(name)
    assert repr(name) in str(caught.value)
    assert "'demo', a folder, a ModelScope id" in str(caught.value)


def test_the_nearest_known_model_is_offered() -> None:
    with pytest.raises(ModelNotFoundError, match="'LLM-Research/gemma-2-9b-it' or 'google/gemma-"):
        resolve("Gemma2-9b-it")


def test_source_is_one_of_two() -> None:
    with pytest.raises(ParameterError, match=r"'github'.*'modelscope' or 'huggingface'"):
        resolve(HUGGINGFACE, source="github")


@pytest.mark.parametrize("name", ["a--b/c", "a/b..c"])
def test_an_id_that_the_client_refuses(name: str, hub: Hub, cache: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=name):
        resolve(name, cache_dir=cache)


def test_the_import_is_cheap() -> None:
    code = "import gemma2_stream.hub, json, sys; print(json.dumps(list(sys.modules)))"
    root = str(Path(hub_module.__file__).parents[1])
    environ = os.environ | {"PYTHONPATH": root}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    heavy = {"torch", "transformers", "modelscope", "modelscope_hub", "huggingface_hub"}
    assert heavy.isdisjoint(json.loads(run.stdout))
