"""Training data: files or a data set of the hub, as rows of token ids that are named by (shard, position).

Reading order: ``rows`` (a row, a block of them, what is held out), ``tokens`` (documents become ids),
``files`` (what lies on disk), ``parquet``, ``catalog`` (files become blocks), ``source`` (blocks become
shards and positions). No torch; pyarrow and tokenizers are imported only where they are needed.
"""

from stage.data.rows import Row
from stage.data.source import Cursor, Source
from stage.data.tokens import Tokens

__all__ = ["Cursor", "Row", "Source", "Tokens"]
