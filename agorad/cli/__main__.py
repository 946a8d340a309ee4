"""``python -m agorad.cli``: the same as ``agoractl``."""

from agorad.cli import main

main()
