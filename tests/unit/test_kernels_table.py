"""The generator: known answers, equality to the reference to the bit, and what the numbers look like."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import agora_kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage import kernels
from stage.kernels import reference

SEED = 0x0123456789ABCDEF
CPU = torch.device("cpu")


@pytest.fixture(params=agora_kernels.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = agora_kernels.instruction_set()
    agora_kernels.use_instruction_set(request.param)
    yield request.param
    agora_kernels.use_instruction_set(before)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (1 << 64) - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: int, answer: tuple[int, int, int, int]
) -> None:
    """Vectors of the Random123 library."""
    assert agora_kernels.philox(*counter, key) == answer
    assert reference.philox(counter, key) == answer


GOLDEN_ROW = [
    1.0148812532424927,
    -0.060892876237630844,
    0.757777988910675,
    -0.5345041155815125,
    -0.2706350088119507,
    -0.6833533644676208,
]


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


def test_golden_values(instruction_set: str) -> None:
    """These must never change: a run's weights and token table are derived, not stored."""
    values = kernels.random_normal(SEED, 42, 1000, 0.02)
    table = kernels.token_table(torch.tensor([0, 1, 255, 128255, (1 << 32) - 1]), 70, SEED, 0.1)
    assert digest(values) == "ceda097446a25d9e"
    assert digest(table) == "21ae012c6072aac8"
    assert kernels.token_table(torch.tensor([3]), 6, SEED).flatten().tolist() == GOLDEN_ROW


@pytest.mark.parametrize("n", [1, 3, 4, 63, 64, 65, 4095, 4096, 4097, 40001])
def test_normal_equals_reference(instruction_set: str, n: int) -> None:
    assert torch.equal(kernels.random_normal(SEED, 9, n, 0.3), reference.random_normal(SEED, 9, n, 0.3, CPU))


@given(
    seed=st.integers(0, (1 << 64) - 1),
    ids=st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=5),
    d=st.integers(1, 150),
    scale=st.floats(-100, 100),
)
@settings(max_examples=60, deadline=None)
def test_table_equals_reference(seed: int, ids: list[int], d: int, scale: float) -> None:
    tokens = torch.tensor(ids)
    assert torch.equal(
        kernels.token_table(tokens, d, seed, scale), reference.token_table(tokens, d, seed, scale)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_rounded_once(instruction_set: str, dtype: torch.dtype) -> None:
    tokens = torch.tensor([[3, 128255], [0, (1 << 32) - 1]])
    for d in (1, 30, 512, 531):
        table = kernels.token_table(tokens, d, SEED, 0.1, dtype=dtype)
        assert table.shape == (2, 2, d)
        assert torch.equal(table, kernels.token_table(tokens, d, SEED, 0.1).to(dtype))


def test_distribution() -> None:
    x = kernels.random_normal(SEED, 1, 1 << 20, 1.0).double()
    assert abs(float(x.mean())) < 0.005
    assert abs(float(x.std()) - 1) < 0.005
    assert abs(float((x**4).mean()) - 2.7) < 0.03  # excess kurtosis -0.3
    assert float(x.abs().max()) <= 510 / 21845**0.5 + 1e-6
    neighbours = float((x[:-1] * x[1:]).mean())
    assert abs(neighbours) < 0.005


def test_streams_seeds_and_rows_differ() -> None:
    a = kernels.random_normal(1, 1, 256, 1.0)
    for other in (kernels.random_normal(1, 2, 256, 1.0), kernels.random_normal(2, 1, 256, 1.0)):
        assert abs(float(a @ other)) / 256 < 0.3
    rows = kernels.token_table(torch.arange(64), 1024, 5)
    gram = rows @ rows.T / 1024
    assert float((gram - torch.eye(64)).abs().max()) < 0.2


def test_threads_do_not_change_values() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = kernels.random_normal(SEED, 3, 200_000, 1.0)
        torch.set_num_threads(3)
        assert torch.equal(one, kernels.random_normal(SEED, 3, 200_000, 1.0))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: kernels.random_normal(-1, 0, 4, 1.0), ValueError, "seed"),
        (lambda: kernels.random_normal(1 << 64, 0, 4, 1.0), ValueError, "seed"),
        (lambda: kernels.random_normal(1, 0, 0, 1.0), ValueError, "positive"),
        (lambda: kernels.random_normal(1, 0, 4, float("nan")), ValueError, "finite"),
        (lambda: kernels.token_table(torch.tensor([1.0]), 4, 1), TypeError, "int64"),
        (lambda: kernels.token_table(torch.tensor([-1]), 4, 1), ValueError, "token ids"),
        (lambda: kernels.token_table(torch.tensor([1 << 32]), 4, 1), ValueError, "token ids"),
        (lambda: kernels.token_table(torch.tensor([1]), 0, 1), ValueError, "d must"),
        (lambda: kernels.token_table(torch.empty(0, dtype=torch.int64), 4, 1), ValueError, "empty"),
        (lambda: agora_kernels.normal(bytearray(15), 4, 1, 1, 1.0, 1), ValueError, "15 bytes"),
        (lambda: agora_kernels.normal(bytes(16), 4, 1, 1, 1.0, 1), BufferError, "writable"),
        (lambda: agora_kernels.normal(0, 4, 1, 1, 1.0, 1), ValueError, "null"),
        (lambda: agora_kernels.use_instruction_set("z80"), ValueError, "z80"),
    ],
)
def test_misuse_is_named(call: object, error: type[Exception], words: str) -> None:
    assert callable(call)
    with pytest.raises(error, match=words):
        call()
