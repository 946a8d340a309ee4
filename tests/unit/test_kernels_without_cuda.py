"""A build without CUDA kernels: CUDA tensors go through torch, and the user hears of it once.

There is no GPU here: a fake tensor (a shape and a device, no memory) asks for the way to go.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stage import kernels
from stage.kernels import boundary, generator, launch, reduce, slices


class Build:
    """What ``agora_kernels`` says of itself."""

    def __init__(self, has_cuda: bool, cuda_archs: tuple[int, ...] = ()) -> None:
        self.has_cuda = has_cuda
        self.cuda_archs = cuda_archs


@pytest.fixture
def forgetful() -> Iterator[None]:
    launch._has_kernels.cache_clear()
    yield
    launch._has_kernels.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_tensors_without_kernels_go_through_torch_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors that are treated as CUDA ones: the same results, and one warning for all calls."""
    torch.manual_seed(0)
    c, basis = torch.randn(5, 3), torch.linalg.qr(torch.randn(8, 3)).Q.contiguous()
    rows, flat = torch.randn(5, 8), torch.randn(7 * kernels.BLOCK)

    def everything() -> list[torch.Tensor]:
        ids, weights, total = torch.arange(5), flat.clone(), torch.zeros(100)
        packed = kernels.slice_pack(weights, 1, 3, 5)
        kernels.slice_merge(weights, packed, packed + 1, 1, 3, 5)
        kernels.reduce_add(total, flat[:100], 0.5)
        square = torch.outer(basis[:, 0], basis[:, 1])
        kernels.subspace_weights(square, basis)
        return [
            kernels.expand_rows(c, basis, rows), kernels.expand(c, basis, ids, 1, 0.5),
            kernels.project(rows, basis), kernels.project_difference(rows, rows + 1, basis),
            kernels.token_table(ids, 8, 1), kernels.random_normal(1, 2, 9, 0.5),
            packed, weights, total, kernels.reduce_finish(total, 2.0), square,
        ]  # fmt: skip

    expected = everything()
    monkeypatch.setattr(launch, "native", Build(has_cuda=False))
    with FakeTensorMode():
        elsewhere = torch.empty(3, device="cuda")
    for module in (boundary, generator, reduce, slices):
        monkeypatch.setattr(module, "compiled", lambda *_tensors: launch.compiled(elsewhere))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        plain = everything()
    for ours, theirs in zip(expected, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert len(heard) == 1
    assert "plain torch" in str(heard[0].message)
    assert "AGORA_CUDA_ARCHS" in str(heard[0].message)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize(
    ("card", "built", "runs"),
    [((9, 0), (80, 90), True), ((8, 6), (80,), True), ((12, 0), (90,), True), ((7, 5), (80, 90), False)],
)
def test_a_card_that_the_build_does_not_know(
    monkeypatch: pytest.MonkeyPatch, card: tuple[int, int], built: tuple[int, ...], runs: bool
) -> None:
    monkeypatch.setattr(launch, "native", Build(True, built))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: card)
    with FakeTensorMode():
        tensor = torch.empty(3, device="cuda:1")
    if runs:
        assert launch.compiled(tensor)
    else:
        with pytest.warns(RuntimeWarning, match="not for GPU 1"):
            assert not launch.compiled(tensor)
        assert not launch.compiled(tensor)


def test_the_cpu_is_never_asked() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch.compiled(torch.empty(3))
        assert not launch.compiled(torch.empty(3, dtype=torch.float64))
        assert not launch.compiled(torch.empty(3, device="meta"))
