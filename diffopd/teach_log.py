"""What teaching says while it trains: reward, advantage signal and estimator in metrics.jsonl, reward on the bar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance
from typing import Any

import torch
from torch import Tensor

from diffopd.learning import Measures
from diffopd.log import TrainingLog
from diffopd.processes import Processes
from diffopd.supervise import Watch

BLOCK = 10  # updates whose mean reward is compared
CLEARLY = 3.0  # standard errors of such a difference, by how the first updates scatter
MATTERS = 0.1  # of the spread of single pictures' rewards


@dataclass(frozen=True)
class Fall:
    """A run whose reward ended below where it began: means of the first, the last and the best `BLOCK` updates.

    until: the update at which the best ones ended.
    """

    first: float
    last: float
    best: float
    until: int

    def __str__(self) -> str:
        best = f"best in updates {self.until - BLOCK + 1} to {self.until}, {self.best:.4g}"
        return f"the reward of its last {BLOCK} updates is {self.last:.4g}, of its first {self.first:.4g} ({best})"


def fall_of(rows: Sequence[Mapping[str, Any]]) -> Fall | None:
    """Whether a run ended clearly worse than it began, by the rewards that it trained on.

    `rows` are those of metrics.jsonl. None where it did not, where there are fewer than two blocks of updates to tell,
    and for a run without rewards.
    """
    updates = [row for row in rows if row["kind"] == "update" and "reward" in row]
    rewards = [row["reward"] for row in updates]
    if len(rewards) < 2 * BLOCK:
        return None
    means = [fmean(rewards[end - BLOCK : end]) for end in range(BLOCK, len(rewards) + 1)]
    noise = CLEARLY * math.sqrt(2 * variance(rewards[:BLOCK]) / BLOCK)
    if means[0] - means[-1] <= max(noise, MATTERS * fmean(row["reward_std"] for row in updates)):
        return None
    best = max(range(len(means)), key=means.__getitem__)
    return Fall(means[0], means[-1], means[best], updates[best + BLOCK - 1]["update"])


@dataclass
class Round:
    """The numbers of one update, of all processes: means over pictures, over states where an estimator gave them.

    informative: the share of prompts whose pictures differ in reward; the others teach nothing.
    """

    values: dict[str, float] = field(default_factory=dict)
    grad_norm: float = 0.0

    @classmethod
    def of_rewards(cls, rewards: Tensor, groups: Sequence[int]) -> Round:
        """What the rewards (N,) alone say."""
        by_group: dict[int, list[float]] = {}
        for group, reward in zip(groups, rewards.tolist(), strict=True):
            by_group.setdefault(group, []).append(reward)
        differ = [max(held) > min(held) for held in by_group.values()]
        return cls(
            {
                "reward": float(rewards.mean()),
                "reward_std": float(rewards.std(correction=0)),
                "informative": sum(differ) / len(differ),
            }
        )

    def measured(self, measures: Measures, processes: Processes) -> Round:
        """With what the estimator reported, summed over processes (a process without pictures reports nothing)."""
        names = ("loss", "from_base", "ratio", "clipped")
        flat = [float(measures.sums.get(name, 0.0)) for name in names]
        flat += [float(measures.counts.get(name, 0)) for name in names]
        sums = processes.sum(torch.tensor(flat, dtype=torch.float64)).tolist()
        for place, name in enumerate(names):
            if sums[len(names) + place]:
                self.values[name] = sums[place] / sums[len(names) + place]
        return self


class TeachLog(TrainingLog):
    """The training log of a run that makes a teacher."""

    title = "teach"

    def update(self, losses: Round, learning_rate: float, watch: Watch) -> None:
        """One finished update: a row in metrics.jsonl, the bar moves."""
        self._write(
            kind="update",
            update=self._progress.update,
            seconds=round(self._progress.seconds, 3),
            **losses.values,
            grad_norm=losses.grad_norm,
            learning_rate=learning_rate,
            images=self._progress.images,
            network_calls=dict(watch.evaluations),
            stage_seconds={stage: round(value, 4) for stage, value in watch.seconds.items()},
        )
        shown = "reward" if "reward" in losses.values else "loss"
        self._show({shown: losses.values[shown]})

    def validation(self, per_teacher: dict[str, float]) -> None:
        """What the held-out prompts say, see `reward_watch`."""
        self._write(
            kind="held_out",
            update=self._progress.update,
            seconds=round(self._progress.seconds, 3),
            images=self._progress.images,
            **per_teacher,
        )
        self._say("held-out " + " ".join(f"{name} {value:.4f}" for name, value in per_teacher.items()))
