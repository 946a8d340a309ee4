"""A model that a run has trained, in one process: what ``agoractl export`` writes, loaded and run.

A folder of it lies in Hugging Face's layout (``config.json``, ``model.safetensors`` or numbered parts of it
with an index, ``tokenizer.json``, ``generation_config.json``) and has a copy of this file in it. The file
needs torch alone, so that the folder stands for itself:

    import exported, torch
    model = exported.Model.load(".")
    model.logits(torch.tensor([list(b"def main")]))           # [1, 8, vocabulary]
    bytes(model.generate(list(b"def main"), most=64))         # a model over bytes

It computes what the stages of the run compute one after the other (``stage.model`` in the project, which is
the place to read about the model): h = c·Uᵀ + F[token], every branch's output divided by its length. Tensors
have the names that they have in the run; ``basis`` is U. The table F is not in the folder: at 128,256 tokens
of width 5120 it would be 2.6 GB that the run's seed and an integer generator give to the bit, a row
for each token that occurs.

``generate`` keeps keys and values of the layers, so a further token costs one pass of one token. A model was
trained on ``max_position_embeddings`` tokens and sees no more: when they are full, it goes on with the second
half of them, computed anew. Shapes: B sequences, T tokens, d width, k rank, V vocabulary.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MODEL_TYPE = "agora"
FORMAT = 1
HEADER_LIMIT = 100 << 20
"""Bytes of a safetensors header, as the format itself has it."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
LOGITS_CHUNK = 1 << 26
"""Most logits that ``loss`` has at a time: 268 MB in fp32."""

_TABLE = 0x544F4B5441424C45
"""The generator's stream of F."""
_UNIT = 1.0 / math.sqrt(21845.0)
_MASK = 0xFFFFFFFF


class BadModel(ValueError):  # noqa: N818, it names the folder's fault
    """The folder does not hold a model that this file can run; the message says why."""


class Model:
    """A loaded model. Weights are ``dtype``; what is between layers, sums of norms and logits are fp32."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """``tensors`` in one dtype, on one device. Raises BadModel if they are not the config's."""
        self.config = config
        try:
            self._d, self._heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            self._kv_heads, self._head_dim = int(config["num_key_value_heads"]), int(config["head_dim"])
            self._ffn, self.vocab = int(config["intermediate_size"]), int(config["vocab_size"])
            self._eps, self._k = float(config["rms_norm_eps"]), int(config["subspace_rank"])
            self.window = int(config["max_position_embeddings"])
            self._stages: list[int] = [int(count) for count in config["stage_layers"]]
            self._seed, self._scale = int(config["token_table_seed"]), float(config["token_table_scale"])
            self._constrained, self._free = config["variant"] == "constrained", bool(config["full_rank_tail"])
            theta = float(config["rope_theta"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadModel(f"config.json lacks a setting or has a wrong one: {error!r}") from None
        self._check(tensors)
        self._tensors = tensors
        self._dtype, self._device = tensors["out"].dtype, tensors["out"].device
        self._U = tensors["basis"].float()
        half = torch.arange(self._head_dim // 2, dtype=torch.float64) / (self._head_dim // 2)
        angle = torch.arange(self.window, dtype=torch.float64)[:, None] * theta**-half
        self._cos, self._sin = (part.float().to(self._device) for part in (angle.cos(), angle.sin()))

    @classmethod
    def load(
        cls, folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Model:
        """The model in a folder; ``dtype``: of its weights, else as they are stored. Raises BadModel."""
        config = read_config(folder)
        tensors = {name: tensor.to(device, dtype) for name, tensor in read_tensors(folder).items()}
        return cls(config, tensors)

    @property
    def end(self) -> int | None:
        """The token behind every document, where the run's text has one."""
        end = self.config.get("eos_token_id")
        return end if isinstance(end, int) else None

    @torch.no_grad()
    def logits(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """What follows each of the ``ids`` [B, T], T at most ``window``: [B, T, V], fp32.

        ``documents`` [B, T]: a number a token, where a sequence has several; they do not see each other.
        """
        return self._output(self._hidden(ids, documents, None))

    @torch.no_grad()
    def loss(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of each sequence in nats a token [B]: of ``ids`` [B, T+1] all but the first."""
        x, targets = self._hidden(ids[:, :-1], documents, None).flatten(0, 1), ids[:, 1:].reshape(-1)
        rows = max(1, LOGITS_CHUNK // self.vocab)
        parts = [
            F.cross_entropy(self._output(some), wanted, reduction="none")
            for some, wanted in zip(torch.split(x, rows), torch.split(targets, rows), strict=True)
        ]
        return torch.cat(parts).view(ids.shape[0], -1).mean(1)

    @torch.no_grad()
    def generate(
        self,
        ids: Sequence[int],
        *,
        most: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Up to ``most`` ids that go on behind ``ids``, one by one, until the end of the document.

        ``temperature`` 0 takes the likeliest token, else one is drawn, from all, from the ``top_k``
        likeliest, or from the likeliest that together have probability ``top_p``. The same ``seed`` draws
        the same. Raises BadModel for ids that the model does not have, or none.
        """
        if not ids:
            raise BadModel("there is nothing to go on from: the prompt has no token")
        if min(ids) < 0 or max(ids) >= self.vocab:
            raise BadModel(f"the prompt has an id that is not in [0, {self.vocab})")
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        known, new = list(ids), list(ids)
        cache = _Cache()
        for _ in range(most):
            if cache.length + len(new) > self.window:
                new, cache = known[-max(1, self.window // 2) :], _Cache()
            x = self._hidden(torch.tensor([new], device=self._device), None, cache)
            token = draw(self._output(x[0, -1]), temperature, top_k, top_p, generator)
            if token == self.end:
                return
            yield token
            known.append(token)
            new = [token]

    def _output(self, x: Tensor) -> Tensor:
        return (x @ self._tensors["out"].t()).float()

    def _hidden(self, ids: Tensor, documents: Tensor | None, cache: _Cache | None) -> Tensor:
        """What the output matrix reads, [B, T, d]."""
        length, past = ids.shape[1], 0 if cache is None else cache.length
        if length + past > self.window:
            raise BadModel(f"{length + past} tokens; this model was trained on sequences of {self.window}")
        table = self._table(ids)
        rotary, mask = self._positions(documents, past, length)
        c = F.embedding(ids, self._tensors["embed"]).float()
        layer = 0
        for stage, layers in enumerate(self._stages):
            wide = self._constrained or (self._free and stage == len(self._stages) - 1)
            state = c @ self._U.t() + table if wide else c
            for _ in range(layers):
                state = self._layer(layer, state, table, wide, rotary, mask, cache)
                layer += 1
            to_next = wide and stage < len(self._stages) - 1
            c = (state - table) @ self._U if to_next else state
        if cache is not None:
            cache.length += length
        return self._read(c, table, wide) * self._tensors["norm_out"]

    def _layer(
        self,
        layer: int,
        state: Tensor,
        table: Tensor,
        wide: bool,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: _Cache | None,
    ) -> Tensor:
        named, at = self._tensors, f"layers.{layer}."
        wo, w2 = ("wo", "w2") if wide else ("zo", "z2")
        x = self._read(state, table, wide)
        heads = self._attention(x @ named[at + "qkv"].t(), rotary, mask, cache, layer)
        state = self._write(state, heads @ named[at + wo].t())
        x = self._read(state, table, wide)
        inner = F.silu(x @ named[at + "gate"].t()) * (x @ named[at + "up"].t())
        return self._write(state, inner @ named[at + w2].t())

    def _read(self, state: Tensor, table: Tensor, wide: bool) -> Tensor:
        h = state if wide else state @ self._U.t() + table
        return (h * self._inverse_rms(h, self._d)).to(self._dtype)

    def _write(self, state: Tensor, z: Tensor) -> Tensor:
        z = z.float()
        return state + z * self._inverse_rms(z, self._d)

    def _inverse_rms(self, x: Tensor, width: int) -> Tensor:
        return (x.square().sum(-1, keepdim=True) / width + self._eps).rsqrt()

    def _attention(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: _Cache | None,
        layer: int,
    ) -> Tensor:
        heads = qkv.view(*qkv.shape[:2], -1, self._head_dim).transpose(1, 2)  # [B, H, T, head_dim]
        turned = self._heads + self._kv_heads
        qk = heads[:, :turned].float()
        qk = qk * self._inverse_rms(qk, self._head_dim)
        a, b = qk.chunk(2, dim=-1)
        cos, sin = rotary
        qk = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(qkv.dtype)
        q, k, v = qk[:, : self._heads], qk[:, self._heads :], heads[:, turned:]
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        causal = mask is None and q.shape[2] == k.shape[2]
        if mask is None and not causal and q.shape[2] > 1:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            mask = mask.tril(k.shape[2] - q.shape[2])
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self._heads != self._kv_heads
        )
        return out.transpose(1, 2).flatten(2)

    def _positions(
        self, documents: Tensor | None, past: int, length: int
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Rotary tables [.., T, head_dim/2]; with documents, who sees whom [B, 1, T, T]."""
        if documents is None:
            return (self._cos[past : past + length], self._sin[past : past + length]), None
        place = torch.arange(length, device=documents.device)
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        position = place - torch.where(begins, place, 0).cummax(dim=1).values
        mask = (documents[:, :, None] == documents[:, None, :]) & (place[:, None] >= place)
        return (self._cos[position][:, None], self._sin[position][:, None]), mask[:, None]

    def _table(self, ids: Tensor) -> Tensor:
        """F's rows for the ids, scaled, as the stages make them: [.., d], fp32."""
        unique, place = torch.unique(ids, return_inverse=True)
        rows = token_table(unique, self._d, self._seed, self._scale).to(self._dtype).float()
        return rows[place]

    def _check(self, tensors: dict[str, Tensor]) -> None:
        inner = self._heads * self._head_dim
        qkv, last = inner + 2 * self._kv_heads * self._head_dim, len(self._stages) - 1
        wanted = {
            "basis": (self._d, self._k),
            "embed": (self.vocab, self._k),
            "out": (self.vocab, self._d),
            "norm_out": (self._d,),
        }
        layer = 0
        for stage, count in enumerate(self._stages):
            wide = self._constrained or (self._free and stage == last)
            for _ in range(count):
                at, (wo, w2) = f"layers.{layer}.", ("wo", "w2") if wide else ("zo", "z2")
                wanted |= {at + "qkv": (qkv, self._d), at + wo: (self._d if wide else self._k, inner)}
                wanted |= {at + name: (self._ffn, self._d) for name in ("gate", "up")}
                wanted[at + w2] = (self._d if wide else self._k, self._ffn)
                layer += 1
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != wanted:
            apart = [name for name in sorted(wanted | found) if wanted.get(name) != found.get(name)]
            raise BadModel(
                f"the weights are not those of config.json: {apart[0]} is {found.get(apart[0])}, "
                f"and should be {wanted.get(apart[0])}"
            )


class _Cache:
    """Keys and values of the tokens so far, a layer each."""

    def __init__(self) -> None:
        self.length = 0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Those of a layer, with these behind them: [B, H, T, head_dim]."""
        if layer in self._kept:
            before = self._kept[layer]
            k, v = torch.cat((before[0], k), dim=2), torch.cat((before[1], v), dim=2)
        self._kept[layer] = k, v
        return k, v


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """A token by its logits [V]; see ``Model.generate``. Drawn on the CPU, whatever the device."""
    if temperature <= 0:
        return int(logits.argmax())
    ordered, ids = (logits.double().cpu() / temperature).sort(descending=True, stable=True)
    chances = ordered.softmax(0)
    kept = len(chances) if top_k <= 0 else min(top_k, len(chances))
    if top_p < 1:
        before = chances.cumsum(0) - chances
        kept = min(kept, max(1, int((before < top_p).sum())))
    chosen = torch.multinomial(chances[:kept], 1, generator=generator)
    return int(ids[chosen])


def token_table(ids: Tensor, d: int, seed: int, scale: float) -> Tensor:
    """Rows of scale·F for the ids [n]: [n, d], fp32, from Philox4x32-10 keyed by the seed, in int64."""
    row = ids.to(torch.int64).reshape(-1, 1)
    group = torch.arange((d + 3) // 4, device=ids.device).reshape(1, -1)
    shape = row.shape[0], group.shape[1]
    a, b = group.expand(shape), row.expand(shape)
    c, e = torch.full_like(a, _TABLE & _MASK), torch.full_like(a, _TABLE >> 32)
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, e = (q >> 32 & _MASK) ^ b ^ k0, q & _MASK, (p >> 32 & _MASK) ^ e ^ k1, p & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    words = torch.stack((a, b, c, e), dim=-1)
    total = (words & 255) + (words >> 8 & 255) + (words >> 16 & 255) + (words >> 24) - 510
    values = total.float() * torch.tensor(scale * _UNIT, dtype=torch.float32, device=total.device)
    return values.reshape(row.shape[0], -1)[:, :d]


def read_config(folder: str | Path) -> dict[str, Any]:
    """``config.json`` of a folder. Raises BadModel if it is none of ours."""
    path = Path(folder) / "config.json"
    config = _json(path)
    if config.get("model_type") != MODEL_TYPE:
        raise BadModel(
            f"{path} is of a model of type {config.get('model_type')!r}, this reads {MODEL_TYPE!r}"
        )
    if config.get("agora_format") != FORMAT:
        raise BadModel(
            f"{path} is of format {config.get('agora_format')!r}, this reads {FORMAT}; use the exported.py "
            "that lies beside it"
        )
    return config


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a folder by name, mapped from its safetensors files. Raises BadModel."""
    place = Path(folder)
    index = place / "model.safetensors.index.json"
    if not index.exists():
        return _read_file(place / "model.safetensors")
    named = _json(index).get("weight_map")
    if not isinstance(named, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in named.values()
    ):
        raise BadModel(f"{index} has no map of weights")
    found: dict[str, Tensor] = {}
    for file in sorted(set(named.values())):
        found |= _read_file(place / file)
    if missing := sorted(set(named) - set(found)):
        raise BadModel(f"{index} names {missing[0]}, which is in no file beside it")
    return found


def _read_file(path: Path) -> dict[str, Tensor]:
    """One safetensors file: 8 bytes of length, a JSON header, then the data."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            begin = file.read(8)
            length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else size
            if length > min(HEADER_LIMIT, size - 8):
                raise BadModel(f"{path} is no safetensors file, or is cut off")
            header = json.loads(file.read(length))
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise BadModel(f"{path}: {error.strerror}; a model is made with agoractl export") from None
    except ValueError as error:
        if isinstance(error, BadModel):
            raise
        raise BadModel(f"{path}: the header cannot be read") from None
    tensors = {}
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape = DTYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
            start, stop = (int(at) for at in entry["data_offsets"])
            count = math.prod(shape)
            if min(shape, default=1) < 1 or start < 0 or stop - start != count * dtype.itemsize:
                raise BadModel(f"{path}: {name} has not the bytes that its shape needs")
            if 8 + length + stop > size:
                raise BadModel(f"{path} is cut off: {name} ends behind its end")
            tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=8 + length + start).view(
                shape
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadModel):
            raise
        raise BadModel(f"{path}: the header names a tensor that cannot be read: {error!r}") from None
    return tensors


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise BadModel(f"{path}: {error.strerror}; a model is made with agoractl export") from None
    except ValueError:
        raise BadModel(f"{path} is not JSON") from None
    if not isinstance(value, dict):
        raise BadModel(f"{path} is not a table")
    return value
