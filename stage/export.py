"""The states of a run's stages, merged into one folder in Hugging Face's layout.

A stage's weights are the first third of its state (``stage.state``), so that third is read and verified,
from a replica's snapshot or from the checkpoint store. Stages save at moments of their own: of each, the
state nearest to the last step that all of them have is taken; steps further apart than ``max_stale_steps``,
which is how far behind a replica may be and still take part, are refused. Replicas of a stage are not
averaged: one of them is the model.

Weights are written tensor by tensor, straight from the state to the file, in files of at most
``SHARD_BYTES``, so memory does not grow with the model. The folder is written beside its place and renamed.
It has U, which depends on a LAPACK's last bit, and not the token table: see ``stage.exported``, the loader,
of which a copy goes with the weights. What is not written: the optimizer's moments; a run goes on from
checkpoints, not from an export.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol

import attrs
import torch
from torch import Tensor

from p2p.errors import LocalError
from stage import exported
from stage.checkpoints import CheckpointStore
from stage.config import ModelConfig
from stage.parameters import Layout, parameter_specs
from stage.snapshot import SnapshotFile
from stage.state import CHUNK, FLOAT_BYTES, SnapshotManifest
from stage.subspace import basis

SHARD_BYTES = 5_000_000_000
"""Largest file of weights, unless one tensor alone is larger."""
HEADER_ALIGN = 8
PIECE = 1 << 22
"""Numbers that are converted and written at a time."""

Dtype = Literal["fp32", "bf16"]
_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STORED = {"fp32": "F32", "bf16": "BF16"}


class Part(Protocol):
    """A state of a stage that could be exported."""

    @property
    def step(self) -> int: ...
    @property
    def where(self) -> str:
        """For people."""

    def weights(self, scratch: Path) -> Tensor:
        """All weights of the stage, flat, fp32, verified; ``scratch`` has room for them."""


@attrs.frozen
class LocalPart:
    """A replica's snapshot."""

    file: SnapshotFile

    @property
    def step(self) -> int:
        return self.file.manifest.step

    @property
    def where(self) -> str:
        return str(self.file.path)

    def weights(self, scratch: Path) -> Tensor:
        for index in weight_chunks(self.file.manifest):
            self.file.chunk(index)
        return self.file.mapped().vectors[0]


@attrs.frozen
class StoredPart:
    """A checkpoint in the run's store."""

    store: CheckpointStore
    manifest: SnapshotManifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def where(self) -> str:
        return f"{self.store.url}, step {self.step}"

    def weights(self, scratch: Path) -> Tensor:
        with ExitStack() as files:
            arriving = Arriving(self.manifest, scratch=scratch, files=files)
            self.store.fetch(arriving)
            return arriving.weights()


class Arriving:
    """The chunks of a state that hold weights, on their way to a file without a name."""

    def __init__(self, manifest: SnapshotManifest, *, scratch: Path, files: ExitStack) -> None:
        """``scratch``: the folder that has room for them; the file is closed with ``files``."""
        self.manifest = manifest
        try:
            file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115, it is files' to close
            self._file = files.enter_context(file).fileno()
        except OSError as error:
            raise LocalError(f"{scratch}: {error.strerror}") from None
        self.missing = set(weight_chunks(manifest))
        self._lock = threading.Lock()
        self.bytes_here = 0

    def take(self, index: int, data: bytes | bytearray | memoryview) -> bool:
        """Keep a chunk; False if it is not what the manifest says. On any thread. Raises LocalError."""
        if len(data) != self.manifest.chunk_size(index) or not self.manifest.verify_chunk(index, data):
            return False
        try:
            written = os.pwrite(self._file, data, index * CHUNK)
        except OSError as error:
            raise LocalError(f"no room for the weights: {error.strerror}") from None
        if written != len(data):
            raise LocalError("no room for the weights: the disk is full")
        with self._lock:
            if index in self.missing:
                self.missing.discard(index)
                self.bytes_here += len(data)
        return True

    def weights(self) -> Tensor:
        """All of them, flat, fp32; what was not verified is not in the file."""
        assert not self.missing
        mapped = mmap.mmap(self._file, self.manifest.floats * FLOAT_BYTES, access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapped, dtype=torch.float32)


def weight_chunks(manifest: SnapshotManifest) -> range:
    """The chunks of a state that hold its weights: the last of them may hold something else too."""
    return range(-(-manifest.floats * FLOAT_BYTES // CHUNK))


def choose(candidates: Sequence[Sequence[Part]], most_apart: int) -> list[Part]:
    """One state of each stage, as near to the last common step as there is. LocalError if they do not fit."""
    lacking = [str(stage) for stage, parts in enumerate(candidates) if not parts]
    if lacking:
        stages = f"stage {lacking[0]}" if len(lacking) == 1 else f"stages {', '.join(lacking)}"
        raise LocalError(
            f"no state of {stages} was found; name a folder of a node that has one with --state, or let the "
            "run write checkpoints (checkpoint.store)"
        )
    common = min(max(part.step for part in parts) for parts in candidates)
    chosen = [min(parts, key=lambda part: (abs(part.step - common), -part.step)) for parts in candidates]
    steps = [part.step for part in chosen]
    if max(steps) - min(steps) > most_apart:
        said = ", ".join(f"{step} (stage {stage})" for stage, step in enumerate(steps))
        raise LocalError(
            f"the stages' states are of steps {said}, further apart than this run's "
            f"training.max_stale_steps = {most_apart}; name newer states with --state"
        )
    return chosen


@attrs.frozen(kw_only=True)
class Text:
    """How the run's text becomes tokens, as the folder says it."""

    tokenizer: bytes | None = None
    """Of a tokenizer.json; None: tokens are bytes."""
    end: int | None = 0
    """The token behind a document; over bytes it is a NUL."""


@attrs.frozen(kw_only=True)
class Written:
    """What ``write`` has made."""

    folder: Path
    steps: tuple[int, ...]
    """Of each stage."""
    parameters: int
    bytes: int
    """Of all files."""


def write(
    folder: Path,
    parts: Sequence[Part],
    model: ModelConfig,
    seed: int,
    *,
    run: str,
    text: Text,
    dtype: Dtype = "fp32",
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write the model of these states, one a stage. LocalError; nothing half-written is left.

    ``seed``: of the run. ``force``: replace an exported model that lies there.
    """
    check_place(folder, force)
    part = folder.with_name(f".{folder.name}.agora-part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if part.exists():
            shutil.rmtree(part)
        part.mkdir()
        try:
            parameters = _weights(part, parts, model, seed, dtype, shard_bytes)
            steps = tuple(chosen.step for chosen in parts)
            _documents(part, config(model, seed, run=run, steps=steps, text=text, dtype=dtype), text)
            size = 0
            for path in part.iterdir():
                size += path.stat().st_size
                _flush(path)
            _flush(part)
            _take_place(part, folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except OSError as error:
        raise LocalError(f"the model was not written to {folder}: {error.strerror or error}") from None
    return Written(folder=folder, steps=steps, parameters=parameters, bytes=size)


def check_place(folder: Path, force: bool) -> None:
    """LocalError unless a model may be written there."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not force:
        raise LocalError(f"{folder} exists; name another folder, or replace the model in it with --force")
    try:
        exported.read_config(folder)
    except exported.BadModel:
        raise LocalError(
            f"{folder} is no exported model, so --force does not replace it; name another"
        ) from None


def config(
    model: ModelConfig, seed: int, *, run: str, steps: Sequence[int], text: Text, dtype: Dtype
) -> dict[str, Any]:
    """``config.json``: usual names where there are such, else ours."""
    stored = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    return {
        "architectures": ["AgoraForCausalLM"],
        "model_type": exported.MODEL_TYPE,
        "agora_format": exported.FORMAT,
        "dtype": stored,
        "torch_dtype": stored,
        "hidden_size": model.d,
        "num_hidden_layers": sum(model.layers),
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn,
        "vocab_size": model.vocab,
        "max_position_embeddings": model.seq,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.eps,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": text.end,
        "tokens": "bytes" if text.tokenizer is None else "tokenizer",
        "subspace_rank": model.k,
        "variant": model.variant,
        "full_rank_tail": model.full_rank_tail,
        "stage_layers": list(model.layers),
        "token_table_seed": seed,
        "token_table_scale": model.f_scale,
        "run": run,
        "steps": list(steps),
    }


def byte_tokenizer() -> dict[str, Any]:
    """A ``tokenizer.json`` whose ids are the bytes of the text, in UTF-8."""
    # The library writes bytes as printable characters: those that are, as themselves, the others from 256 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(256 + number): byte for number, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "vocab": dict(sorted(letters.items(), key=lambda item: item[1])), "merges": [],
        },
    }  # fmt: skip


@attrs.frozen
class _Tensor:
    name: str
    shape: tuple[int, ...]
    numel: int


def _weights(
    folder: Path, parts: Sequence[Part], model: ModelConfig, seed: int, dtype: Dtype, shard_bytes: int
) -> int:
    """Write all tensors; how many trained parameters they have."""
    U = basis(model.d, model.k, seed)
    named = [_Tensor("basis", tuple(U.shape), U.numel())]
    for stage in range(model.stages):
        named += [_Tensor(spec.name, spec.shape, spec.numel) for spec in parameter_specs(model, stage)]
    files = _files(named, _TORCH[dtype].itemsize, shard_bytes)
    names = _names(len(files))
    values = _values(folder, parts, model, U)
    for name, tensors in zip(names, files, strict=True):
        _write_file(folder / name, tensors, values, dtype)
    if len(files) > 1:
        total = sum(tensor.numel for tensor in named) * _TORCH[dtype].itemsize
        where = {tensor.name: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)
    return sum(tensor.numel for tensor in named) - U.numel()


def _files(tensors: Iterable[_Tensor], itemsize: int, most: int) -> list[list[_Tensor]]:
    files: list[list[_Tensor]] = [[]]
    room = most
    for tensor in tensors:
        size = tensor.numel * itemsize
        if files[-1] and size > room:
            files.append([])
            room = most
        files[-1].append(tensor)
        room -= size
    return files


def _names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _values(
    scratch: Path, parts: Sequence[Part], model: ModelConfig, U: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the order in which it is written; one stage's state is open at a time."""
    yield "basis", U.float()
    for stage, part in enumerate(parts):
        layout = Layout.of(parameter_specs(model, stage))
        views = layout.views(part.weights(scratch)[: layout.size])
        for spec in parameter_specs(model, stage):
            yield spec.name, views[spec.name]


def _write_file(
    path: Path, tensors: Sequence[_Tensor], values: Iterator[tuple[str, Tensor]], dtype: Dtype
) -> None:
    """One safetensors file of the next ``tensors`` of ``values``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        end = at + tensor.numel * _TORCH[dtype].itemsize
        header[tensor.name] = {
            "dtype": _STORED[dtype], "shape": list(tensor.shape), "data_offsets": [at, end]
        }  # fmt: skip
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGN)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            name, value = next(values)
            assert (name, value.numel()) == (tensor.name, tensor.numel)
            for piece in torch.split(value.reshape(-1), PIECE):
                file.write(piece.to(_TORCH[dtype]).contiguous().view(torch.uint8).numpy().data)


def _documents(folder: Path, settings: dict[str, Any], text: Text) -> None:
    _write_json(folder / "config.json", settings)
    _write_json(folder / "generation_config.json", {"eos_token_id": text.end})
    if text.tokenizer is None:
        _write_json(folder / "tokenizer.json", byte_tokenizer())
    else:
        (folder / "tokenizer.json").write_bytes(text.tokenizer)
    shutil.copyfile(exported.__file__, folder / "exported.py")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _take_place(part: Path, folder: Path) -> None:
    """Rename, so that a whole model lies there at any moment but the one between two renames."""
    old = folder.with_name(f".{folder.name}.agora-old")
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        folder.rename(old)
    try:
        part.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
