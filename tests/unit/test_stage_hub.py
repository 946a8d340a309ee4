"""A data set of the hub, from a real HTTP server that speaks the hub's routes and breaks off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from p2p.errors import LocalError
from stage.data import Source
from stage.data import hub as hub_module
from stage.data.files import Unavailable
from stage.data.hub import KEPT, Dataset, HubFiles
from tests.hubs import REPO, Hub, fill, serving


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(hub_module, "PAUSE_S", 0.01)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 512)  # less is not kept
    made = Hub()
    fill(made, tmp_path)
    with serving(made):
        yield made


def files_of(hub: Hub, folder: Path, text: str = REPO) -> HubFiles:
    return HubFiles(text, folder, "text", endpoint=hub.endpoint)


def fetched(hub: Hub) -> list[str]:
    return [asked.rpartition("/")[2] for asked in hub.asked if asked.startswith("GET /datasets")]


def test_files_are_fetched_one_at_a_time_and_few_are_kept(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    source = Source(files_of(hub, folder), 64, 5)
    assert fetched(hub) == []
    assert "5 files" in source.describe()
    rows: list[bytes] = []
    for position in range(8000):
        row = source.row(0, position).ids
        if source.cursor(0, position).lap:
            break
        rows.append(row)
        assert len(list(folder.glob("data/*.parquet"))) <= KEPT
    assert len(set(rows)) == len(rows) > 800
    assert len(set(fetched(hub)[:5])) == 5


def test_a_trainer_that_starts_again_needs_no_hub_for_what_it_has(hub: Hub, tmp_path: Path) -> None:
    first = Source(files_of(hub, tmp_path / "hub"), 64, 5)
    wanted = [first.row(0, position) for position in range(20)]
    asked = len(hub.asked)
    again = Source(files_of(hub, tmp_path / "hub"), 64, 5)
    assert [again.row(0, position) for position in range(20)] == wanted
    assert again.fingerprint == first.fingerprint
    assert len(hub.asked) == asked


def test_a_broken_transfer_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    size = len(hub.files["data/train-00000.parquet"])
    hub.cut = [size // 2, size // 4]
    Source(files_of(hub, tmp_path / "hub"), 64, 5).row(0, 0)
    assert hub.cut == []
    assert hub.sent < 1.3 * size, "what was there was not sent again"


def test_a_hub_that_is_busy_is_asked_again_and_then_given_up(hub: Hub, tmp_path: Path) -> None:
    catalog = files_of(hub, tmp_path / "hub")
    hub.fail = [503, 503]
    Source(catalog, 64, 5).row(0, 0)
    hub.fail = [503] * 1000
    with pytest.raises(Unavailable, match="data set owner/corpus"):
        files_of(hub, tmp_path / "other")
    hub.fail = []
    files_of(hub, tmp_path / "other")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("owner/nothing", "has no data set"),
        ("owner/corpus@v9", "has no data set"),
        ("owner/corpus/none", "no parquet"),
    ],
)
def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(LocalError, match=words):
        files_of(hub, tmp_path / "hub", text)
    assert not (tmp_path / "hub").exists()


def test_a_data_set_that_wants_a_token(hub: Hub, tmp_path: Path) -> None:
    hub.fail = [403]
    with pytest.raises(LocalError, match="set HF_TOKEN"):
        files_of(hub, tmp_path / "hub")


def test_a_column_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    source = Source(HubFiles(REPO, tmp_path / "hub", "body", endpoint=hub.endpoint), 64, 5)
    with pytest.raises(LocalError, match="has no column 'body'"):
        source.row(0, 0)


@pytest.mark.parametrize(
    "text", ["", "corpus", "a/../b", "a/b@", "a/b c", "/", "https://hub/a/b", "a/..", "a/b@../x"]
)
def test_names_of_no_data_set(text: str) -> None:
    with pytest.raises(LocalError, match="names no data set"):
        Dataset.parse(text)


def test_names_of_data_sets() -> None:
    assert Dataset.parse("a/b") == Dataset("a/b", "", "main")
    assert Dataset.parse("a/b/data/CC-MAIN-2024-10") == Dataset("a/b", "data/CC-MAIN-2024-10", "main")
    assert Dataset.parse("a/b@refs/convert/parquet") == Dataset("a/b", "", "refs/convert/parquet")
