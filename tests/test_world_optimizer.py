"""Muon's step: orthogonal updates, however a weight's shape is multiplied and however many processes share the work."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

FILE = Path(__file__).resolve().parents[1] / "scripts" / "world_optimizer.py"


def _load():
    spec = importlib.util.spec_from_file_location("world_optimizer", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


optimizer = _load()


def _iterated(matrix):
    """The quintic iteration as published, in float64."""
    a, b, c = optimizer.QUINTIC
    x = matrix.double().T if matrix.shape[0] > matrix.shape[1] else matrix.double()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@pytest.mark.parametrize("shape", [(64, 576), (96, 128), (512, 128), (128, 96), (4, 576)])
def test_a_wide_matrix_is_iterated_like_any_other(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix = matrix * torch.logspace(0, -5, shape[1])
    result = optimizer.orthogonalize(matrix)
    torch.testing.assert_close(result.double(), _iterated(matrix), rtol=0, atol=2e-5)


def test_singular_values_end_near_one():
    matrix = torch.randn(32, 288, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(optimizer.orthogonalize(matrix))
    assert 0.6 < float(values.min()) and float(values.max()) < 1.3


def _steps():
    """Weights after three steps on fixed gradients."""
    generator = torch.Generator().manual_seed(2)
    weights = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((8, 4, 3, 3), (6, 9), (5, 5))]
    muon = optimizer.Muon(weights, lr=0.1)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        muon.step()
    return [weight.detach() for weight in weights]


def _process(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(_steps(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_share_the_work_and_end_where_one_does(tmp_path):
    multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        for weight, alone in zip(torch.load(tmp_path / f"{rank}.pt"), _steps(), strict=True):
            torch.testing.assert_close(weight, alone)
