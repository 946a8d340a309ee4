"""What is asked of whom during a download: every chunk comes, whoever goes, stalls or lies."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.errors import RemoteError
from stage.download import AHEAD, LIES, Download


def asked(download: Download[str], donor: str) -> list[int]:
    found = []
    while (index := download.ask(donor)) is not None:
        found.append(index)
    return found


def test_chunks_are_asked_in_order_and_a_few_ahead() -> None:
    download: Download[str] = Download(range(AHEAD + 2))
    assert asked(download, "a") == list(range(AHEAD))
    assert asked(download, "b") == [AHEAD, AHEAD + 1, 0, 1], "nothing is left but what the other owes"
    download.came("a", 0, good=True)
    assert download.left == AHEAD + 1
    with pytest.raises(RemoteError, match="not asked"):
        download.came("a", 0, good=True)
    with pytest.raises(RemoteError, match="not asked"):
        download.came("stranger", 2, good=True)


def test_what_a_donor_owes_when_it_goes_is_asked_of_another() -> None:
    download: Download[str] = Download(range(8))
    assert asked(download, "a") == [0, 1, 2, 3]
    assert asked(download, "b") == [4, 5, 6, 7]
    download.came("b", 4, good=True)
    download.gone("a")
    assert sorted([download.ask("b"), *(download.ask("c") for _ in range(4))]) == [0, 1, 2, 3, 5]


def test_a_bad_chunk_is_asked_again_and_a_liar_is_done_with() -> None:
    download: Download[str] = Download(range(6))
    for lie in range(LIES):
        index = download.ask("a")
        assert index == 0
        if lie < LIES - 1:
            download.came("a", index, good=False)
        else:
            with pytest.raises(RemoteError, match=f"{LIES} chunks are not"):
                download.came("a", index, good=False)
    download.gone("a")
    for index in range(6):
        assert download.ask("b") == index
        download.came("b", index, good=True)
    assert download.complete


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 30), st.randoms(use_true_random=False))
def test_all_chunks_come_whatever_happens(chunks: int, random: Any) -> None:
    download: Download[str] = Download(range(chunks))
    donors = {"honest": [], "a": [], "b": []}  # type: dict[str, list[int]]
    had: set[int] = set()
    for _ in range(10_000):
        if download.complete:
            break
        donor = random.choice(sorted(donors))
        owed = donors[donor]
        owed += asked(download, donor)
        assert len(owed) <= AHEAD
        assert len(set(owed)) == len(owed)
        what = random.random()
        if donor != "honest" and what < 0.05:
            del donors[donor]
            download.gone(donor)
        elif owed and (donor == "honest" or what < 0.7):
            index = owed.pop(random.randrange(len(owed)))
            good = donor == "honest" or random.random() < 0.7
            had |= {index} if good else set()
            try:
                download.came(donor, index, good=good)
            except RemoteError:
                del donors[donor]
                download.gone(donor)
    assert download.complete
    assert had == set(range(chunks))
