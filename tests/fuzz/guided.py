"""``python -m tests.fuzz.guided NAME CORPUS [libFuzzer options]``: one parser under atheris."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["p2p", "agorad.authority", "stage"]):
    from tests.fuzz import targets


def main() -> None:
    name = sys.argv.pop(1)

    def one(data: bytes) -> None:
        targets.attempt(name, data)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
