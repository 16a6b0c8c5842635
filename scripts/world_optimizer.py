"""Muon: momentum whose update of every weight matrix is made orthogonal (Jordan et al., 2024).

torch.optim.Muon takes matrices only and iterates in bfloat16, ten times slower than float32 on a CPU without bfloat16
arithmetic; this one takes convolutions as matrices (out, in * height * width) and iterates in the weights' own type.
"""

from collections.abc import Iterable

import torch

# Coefficients of the quintic iteration that drives all singular values to about one.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """U V^T of the matrix U S V^T, nearly: its singular values end between 0.7 and 1.2."""
    a, b, c = QUINTIC
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    """For weights of two and more dimensions. Nesterov momentum; decoupled weight decay; an update's root mean square
    is 0.2 lr, as AdamW's is, so that AdamW's rates carry over (arXiv:2502.16982, eq 4)."""

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_one(weight, group)

    def _step_one(self, weight: torch.Tensor, group: dict) -> None:
        state = self.state[weight]
        if not state:
            state["average"] = torch.zeros_like(weight)
        average = state["average"].lerp_(weight.grad, 1 - group["momentum"])
        direction = orthogonalize(weight.grad.lerp(average, group["momentum"]).flatten(1))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(direction.view_as(weight), alpha=-0.2 * group["lr"] * max(direction.shape) ** 0.5)
