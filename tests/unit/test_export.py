"""An exported model is the chained stages' model: same numbers, from a folder that stands for itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from agorad import run as manifests
from agorad.cli import agoractl
from agorad.text import text_of
from p2p.errors import LocalError
from p2p.identity import Identity
from stage import export, exported, kernels
from stage.chained import Chain
from stage.checkpoints import CheckpointStore, Line
from stage.config import ModelConfig, TrainingConfig
from stage.data import Row, Source
from stage.data.tokens import Tokenizer, Tokens
from stage.export import LocalPart, StoredPart, Text
from stage.model import document_index
from stage.snapshot import SnapshotStore

torch.set_num_threads(1)  # OpenMP spins while it waits, and other tests need the cores

MODEL = ModelConfig(d=32, k=8, heads=4, kv_heads=2, head_dim=8, ffn=48, seq=16, layers=(1, 2, 1), f_scale=3.0)
TRAINING = TrainingConfig(seed=(1 << 62) + 5, lr=2e-2, warmup_steps=2, total_steps=12, target_batch=4)
FORMS = {
    "subspace": MODEL,
    "wide-tail": attrs.evolve(MODEL, full_rank_tail=True),
    "constrained": attrs.evolve(MODEL, variant="constrained", full_rank_tail=True, kv_heads=4),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("text")
    for number in range(120):
        (folder / f"{number}.txt").write_text(f"line {number} of a text\n")
    return Source(folder, MODEL.seq, TRAINING.seed)


def train(model: ModelConfig, source: Source, steps: int = 3) -> Chain:
    chain = Chain(model, TRAINING)
    for step in range(steps):
        for number in range(TRAINING.target_batch):
            chain.microbatch(source.row(0, TRAINING.target_batch * step + number))
        chain.step(step + 1)
    return chain


def save(chain: Chain, folder: Path, step: int = 3) -> list[LocalPart]:
    """The stages' snapshots, a node's state folder each."""
    parts = []
    for index, optimizer in enumerate(chain.optimizers):
        store = SnapshotStore(folder / f"worker-{index}" / "snapshots")
        held = optimizer.hold(step)
        store.save(held)
        held.release()
        parts.append(LocalPart(store.all()[-1]))
    return parts


def tensors(row: Row) -> tuple[Tensor, Tensor]:
    ids = torch.frombuffer(bytearray(row.ids), dtype=torch.int32).long()
    return ids[None], document_index(row.starts, len(ids) - 1)[None]


def chained_logits(chain: Chain, ids: Tensor, documents: Tensor | None = None) -> Tensor:
    """[B, T, V] from [B, T+1], stage after stage."""
    state: Any = None
    with torch.no_grad():
        for stage, weights in zip(chain.stages, chain.weights, strict=True):
            out = stage.forward(weights.named(), ids, state, docs=documents)
            state = out
        return out.x @ chain.weights[-1].named()["out"].t()


def agoractl_says(*words: str) -> Any:
    return CliRunner().invoke(agoractl, words)


def refusal(*words: str) -> str:
    done = agoractl_says(*words)
    assert isinstance(done.exception, LocalError), done.output
    return str(done.exception)


@pytest.fixture(scope="module")
def a_run(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a demo's: manifest and state folders."""
    folder = tmp_path_factory.mktemp("run")
    operator = Identity.generate()
    info = manifests.RunInfo(name="r", id="r", operator=operator.peer_id)
    manifest = manifests.Manifest(run=info, model=MODEL, training=TRAINING).signed(operator)
    manifests.save(manifest, folder / "run.toml")
    save(train(MODEL, source), folder)
    return folder


@pytest.fixture(scope="module")
def a_model(a_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("models") / "model"
    done = agoractl_says("export", str(a_run), "--to", str(to))
    assert done.exit_code == 0, done.output
    return to


@pytest.fixture(scope="module", params=FORMS)
def trained(
    request: pytest.FixtureRequest, source: Source, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Chain, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    chain = train(FORMS[request.param], source)
    export.write(
        folder / "model", save(chain, folder), FORMS[request.param], TRAINING.seed, run="r", text=Text()
    )
    return chain, folder / "model"


def test_logits_and_evaluation_loss_are_those_of_the_stages(
    trained: tuple[Chain, Path], source: Source
) -> None:
    chain, folder = trained
    model = exported.Model.load(folder)
    rows = source.held_out(8)
    assert any(row.starts for row in rows), "rows of several documents are among them"
    for row in rows:
        ids, documents = tensors(row)
        wanted = chained_logits(chain, ids, documents)
        assert (model.logits(ids[:, :-1], documents) - wanted).abs().max() < 1e-5
        assert float(model.loss(ids, documents)) == pytest.approx(chain.evaluate(row), abs=1e-5)
    whole = torch.cat([tensors(row)[0] for row in rows])
    assert (model.logits(whole[:, :-1]) - chained_logits(chain, whole)).abs().max() < 1e-5


def test_greedy_generation_is_the_argmax_of_a_full_recomputation(trained: tuple[Chain, Path]) -> None:
    chain, folder = trained
    model = exported.Model.load(folder)
    model.config["eos_token_id"] = None
    prompt = list(b"line 3 ")
    made = list(model.generate(prompt, most=MODEL.seq + 20))
    assert len(made) == MODEL.seq + 20
    known, begin = list(prompt), 0
    for token in made:
        if len(known) - begin > MODEL.seq:  # full: it goes on with the second half
            begin = len(known) - MODEL.seq // 2
        ids = torch.tensor([[*known[begin:], 0]])
        logits = chained_logits(chain, ids)[0, -1]
        assert float(logits.max() - logits[token]) < 1e-5
        known.append(token)


def test_drawing_repeats_with_its_seed_and_keeps_to_its_bounds(a_model: Path) -> None:
    model = exported.Model.load(a_model)

    def made(seed: int, **how: Any) -> list[int]:
        return list(model.generate(list(b"line"), most=8, temperature=1.0, seed=seed, **how))

    assert made(1) == made(1)
    assert len({tuple(made(seed)) for seed in range(4)}) > 1
    assert made(7, top_k=1) == list(model.generate(list(b"line"), most=8))
    assert made(7, top_p=1e-9) == made(7, top_k=1)
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    generator = torch.Generator().manual_seed(0)

    def seen(top_k: int, top_p: float) -> list[float]:
        drawn = [exported.draw(logits, 1.0, top_k, top_p, generator) for _ in range(1000)]
        return [drawn.count(token) / 1000 for token in range(4)]

    assert seen(0, 1.0) == pytest.approx([0.5, 0.2, 0.2, 0.1], abs=0.08)
    assert seen(2, 1.0) == pytest.approx([5 / 7, 2 / 7, 0, 0], abs=0.08)
    assert seen(0, 0.75) == pytest.approx([5 / 9, 2 / 9, 2 / 9, 0], abs=0.08)


@pytest.mark.long
def test_the_folder_stands_for_itself(a_model: Path, source: Source, tmp_path: Path) -> None:
    """Its own loader, without this project, gives the same loss; the format's own library reads it."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(a_model, moved)
    row = source.held_out(1)[0]
    ids = torch.frombuffer(bytearray(row.ids), dtype=torch.int32).tolist()
    code = (
        "import sys, torch; sys.path.insert(0, '.'); import exported\n"
        "assert not {'stage', 'p2p', 'agorad', 'agora_kernels'} & set(sys.modules)\n"
        f"print(float(exported.Model.load('.').loss(torch.tensor([{ids}]))))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=moved, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    here = exported.Model.load(a_model).loss(torch.tensor([ids]))
    assert float(done.stdout) == pytest.approx(float(here), abs=1e-5)
    official = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
    theirs = official.load_file(a_model / "model.safetensors")
    ours = exported.read_tensors(a_model)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_the_token_table_is_the_kernels_to_the_bit() -> None:
    ids = torch.tensor([0, 1, 255, 128_255, (1 << 24) - 1])
    for seed, d, scale in ((0, 8, 1.0), (TRAINING.seed, 32, 3.0), ((1 << 63) - 1, 12, 0.3)):
        ours = exported.token_table(ids, d, seed, scale)
        assert torch.equal(ours, kernels.token_table(ids, d, seed, scale))


def test_bytes_are_a_tokenizer_that_the_library_reads() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer.from_str(json.dumps(export.byte_tokenizer()))
    text = "def é(x):\n\treturn '한 \x00\x7f'  # \N{GRINNING FACE}\n"
    assert library.encode(text).ids == list(text.encode())
    assert library.decode(list(text.encode())) == text


def test_many_files_and_half_the_size(source: Source, tmp_path: Path) -> None:
    chain = train(MODEL, source, steps=1)
    parts = save(chain, tmp_path)
    whole = export.write(tmp_path / "a", parts, MODEL, 5, run="r", text=Text())
    cut = export.write(tmp_path / "b", parts, MODEL, 5, run="r", text=Text(), shard_bytes=16_000)
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    one, many = exported.read_tensors(tmp_path / "a"), exported.read_tensors(tmp_path / "b")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert (
        whole.parameters
        == cut.parameters
        == sum(spec.numel for weights in chain.weights for spec in weights.layout.specs)
    )
    half = export.write(tmp_path / "c", parts, MODEL, 5, run="r", text=Text(), dtype="bf16")
    assert half.bytes < 0.6 * whole.bytes
    ids = torch.arange(16)[None]
    exact = exported.Model.load(tmp_path / "a").logits(ids)
    low = exported.Model.load(tmp_path / "c").logits(ids)
    assert 0 < float((low - exact).norm() / exact.norm()) < 0.05
    files[1].unlink()
    with pytest.raises(exported.BadModel, match=r"model-00002-of-.*No such file"):
        exported.read_tensors(tmp_path / "b")


def test_states_of_nearby_steps_are_merged_and_others_are_not(source: Source, tmp_path: Path) -> None:
    chain = Chain(MODEL, TRAINING)
    at = {step: save(chain, tmp_path / str(step), step) for step in (10, 14, 20)}
    chosen = export.choose(
        [[at[10][0], at[20][0]], [at[14][1]], [at[10][2], at[14][2], at[20][2]]], most_apart=5
    )
    assert [part.step for part in chosen] == [10, 14, 14]
    with pytest.raises(LocalError, match=r"steps 20 \(stage 0\), 14 \(stage 1\), 14 .*max_stale_steps = 5"):
        export.choose([[at[20][0]], [at[14][1]], [at[14][2]]], most_apart=5)
    with pytest.raises(LocalError, match="no state of stages 0, 2 was found"):
        export.choose([[], [at[14][1]], []], most_apart=5)


def test_a_checkpoint_is_read_as_far_as_its_weights(source: Source, tmp_path: Path) -> None:
    chain, writer = train(MODEL, source, steps=1), Identity.generate()
    parts: list[StoredPart] = []
    for stage, part in enumerate(save(chain, tmp_path / "nodes")):
        store = CheckpointStore(str(tmp_path / "store"), "r", stage)
        store.save(part.file.readable, part.file.manifest, writer, Line(), keep=1)
        parts.append(StoredPart(store, part.file.manifest))
        assert torch.equal(parts[-1].weights(tmp_path), chain.weights[stage].flat)
    data = tmp_path / "store" / "r" / "stage-1" / f"{3:012d}.state"
    with data.open("r+b") as file:
        file.write(b"x")
    with pytest.raises(LocalError, match="damaged"):
        export.write(tmp_path / "m", parts, MODEL, 5, run="r", text=Text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nodes", "store"], "nothing half-written"


def test_from_a_folder_to_text_in_two_commands(a_run: Path, tmp_path: Path) -> None:
    to = str(tmp_path / "model")
    done = agoractl_says("export", str(a_run), "--to", to, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["run"], document["steps"], document["folder"]) == ("r", [3, 3, 3], to)
    assert document["bytes"] == sum(path.stat().st_size for path in Path(to).iterdir())
    assert "exists" in refusal("export", str(a_run), "--to", to)
    nodes = [word for stage in range(3) for word in ("--state", str(a_run / f"worker-{stage}"))]
    again = agoractl_says("export", str(a_run / "run.toml"), *nodes, "--to", to, "--force")
    assert again.exit_code == 0, again.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    ask = ("generate", "line 7 ä", "--model", to, "--max-tokens", "12", "--seed", "5", "--json")
    made = [json.loads(agoractl_says(*ask).stdout) for _ in range(2)]
    assert made[0]["text"] == made[1]["text"]
    assert 0 < made[0]["tokens"] <= 12
    printed = agoractl_says(*ask[:-1])
    assert printed.stdout == "line 7 ä" + made[0]["text"] + "\n"


def streamed(kind: str, tokenizer: Path, prompt: str, ids: list[int]) -> list[str]:
    encode, decode = text_of(Tokens() if kind == "bytes" else Tokenizer(tokenizer))
    encode(prompt)
    return [*map(decode, ids), decode(None)]


def test_characters_come_whole_whatever_their_tokens() -> None:
    text = "aé한\N{GRINNING FACE}\n"
    pieces = streamed("bytes", Path("none"), "x", list(text.encode()))
    assert "".join(pieces) == text
    assert all(piece in ("", *text) for piece in pieces)
    assert streamed("bytes", Path("none"), "", [0xED, 0x95])[-1] == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("kind", ["ByteLevel", "Metaspace"])
def test_text_of_a_tokenizer_streams_as_it_decodes_at_once(kind: str, source: Source, tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library, path = tokenizers.Tokenizer(models.BPE()), tmp_path / "tokenizer.json"
    library.pre_tokenizer = getattr(pre_tokenizers, kind)()
    library.decoder = getattr(decoders, kind)()
    known = pre_tokenizers.ByteLevel.alphabet() if kind == "ByteLevel" else list("éß")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=known)
    library.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 3], trainer)
    library.save(str(path))
    prompt, rest = "the quick", " brown fox  jumps éß"
    ids = library.encode(prompt + rest, add_special_tokens=False).ids
    prompted = library.encode(prompt, add_special_tokens=False).ids
    assert ids[: len(prompted)] == prompted
    pieces = streamed("tokenizer", path, prompt, ids[len(prompted) :])
    assert "".join(pieces) == rest
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    text = Text(tokenizer=path.read_bytes(), end=library.token_to_id("<|endoftext|>"))
    model = attrs.evolve(MODEL, vocab=library.get_vocab_size())
    parts = save(Chain(model, TRAINING), tmp_path)
    export.write(tmp_path / "model", parts, model, TRAINING.seed, run="r", text=text)
    ask = ("generate", prompt, "--model", str(tmp_path / "model"), "--max-tokens", "6", "--json")
    document = json.loads(agoractl_says(*ask).stdout)
    assert document["text"]
    assert document["tokens"] == 6 or document["end"] == "document"


def test_what_cannot_be_exported_is_said_in_a_sentence(a_run: Path, tmp_path: Path) -> None:
    run, to = str(a_run / "run.toml"), str(tmp_path / "model")
    one = str(a_run / "worker-1")
    assert "stages 0, 2" in refusal("export", run, "--state", one, "--to", to)
    assert "has no snapshot of a stage" in refusal("export", run, "--state", str(tmp_path), "--to", to)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").touch()
    assert "is no exported model" in refusal("export", str(a_run), "--to", str(other), "--force")
    assert "--tokenizer is set" in refusal("export", str(a_run), "--to", to, "--tokenizer", "t.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def damaged(model: Path, to: Path, how: str) -> Path:
    shutil.copytree(model, to)
    weights, settings = to / "model.safetensors", json.loads((to / "config.json").read_text())
    match how:
        case "no config":
            (to / "config.json").unlink()
        case "another type":
            (to / "config.json").write_text('{"model_type": "llama"}')
        case "newer":
            (to / "config.json").write_text(json.dumps(settings | {"agora_format": 2}))
        case "a setting is missing":
            del settings["subspace_rank"]
            (to / "config.json").write_text(json.dumps(settings))
        case "another shape":
            (to / "config.json").write_text(json.dumps(settings | {"intermediate_size": 64}))
        case "no weights":
            weights.unlink()
        case "cut off":
            weights.write_bytes(weights.read_bytes()[:-7])
        case "no safetensors":
            weights.write_bytes(b"\xff" * 100)
        case "empty":
            weights.write_bytes(b"")
        case "no header":
            weights.write_bytes((4).to_bytes(8, "little") + b"1234" + bytes(100))
    return to


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("no config", "config.json: No such file"),
        ("another type", "of type 'llama'"),
        ("newer", "format 2"),
        ("a setting is missing", "subspace_rank"),
        ("another shape", "layers.0.gate is"),
        ("no weights", "model.safetensors: No such file"),
        ("cut off", "ends behind its end"),
        ("no safetensors", "no safetensors file"),
        ("empty", "no safetensors file"),
        ("no header", "header names a tensor"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_in_a_sentence(
    how: str, says: str, a_model: Path, tmp_path: Path
) -> None:
    said = refusal("generate", "x", "--model", str(damaged(a_model, tmp_path / "bad", how)))
    assert says in said
    assert "\n" not in said
