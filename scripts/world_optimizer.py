"""Muon: momentum whose update of every weight matrix is made orthogonal (Jordan et al., 2024).

torch.optim.Muon takes matrices only and iterates in bfloat16, ten times slower than float32 on a CPU without bfloat16
arithmetic; this one takes convolutions as matrices (out, in * height * width) and iterates in the weights' own type.
"""

from collections.abc import Iterable

import torch
from torch.distributed import all_reduce, get_rank, get_world_size, is_initialized

# Coefficients of the quintic iteration that drives all singular values to about one.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """U V^T of the matrix U S V^T, nearly: its singular values end between 0.7 and 1.2.

    Each step is x <- (a + b g + c g^2) x with g = x x^T. A wide x is multiplied only once: the factors commute with
    g, so they and g are carried along as small square matrices.
    """
    a, b, c = QUINTIC
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    if x.shape[1] < 2 * x.shape[0]:
        for _ in range(steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.T if is_tall else x
    gram, product = x @ x.T, None
    for step in range(steps):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if step < steps - 1:
            gram = factor @ gram @ factor
    x = product @ x
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    """For weights of two and more dimensions. Nesterov momentum; decoupled weight decay; an update's root mean square
    is 0.2 lr, as AdamW's is, so that AdamW's rates carry over (arXiv:2502.16982, eq 4).

    In a process group every process must hold the same gradients: each orthogonalises its share of the weights.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            averages = [self._average(weight, group["momentum"]) for weight in weights]
            directions = [torch.zeros_like(weight) for weight in weights]
            for index in self._own(weights):
                direction = weights[index].grad.lerp(averages[index], group["momentum"])
                directions[index].view(len(direction), -1).copy_(orthogonalize(direction.flatten(1)))
            if is_initialized():
                directions = summed(directions)
            for weight, direction in zip(weights, directions, strict=True):
                longer = max(weight.flatten(1).shape)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(direction, alpha=-0.2 * group["lr"] * longer**0.5)

    def _average(self, weight: torch.Tensor, momentum: float) -> torch.Tensor:
        state = self.state[weight]
        if not state:
            state["average"] = torch.zeros_like(weight)
        return state["average"].lerp_(weight.grad, 1 - momentum)

    @staticmethod
    def _own(weights: list[torch.Tensor]) -> list[int]:
        """This process's share: the largest first, dealt out in turn."""
        order = sorted(range(len(weights)), key=lambda index: (-weights[index].numel(), index))
        return order[get_rank() :: get_world_size()] if is_initialized() else order


def summed(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors' sums over the processes, by one all-reduce."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
