"""Adapters on one shared trunk: bound in under a millisecond, without peft's `set_adapter` side effects.

`set_adapter` rewrites requires_grad (it would make a teacher trainable and freeze the student) and costs about ten
milliseconds; here only peft's two routing attributes are switched, and a test holds them equal to `set_adapter`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffopd.drive import replaced_forward
from diffopd.errors import UserError

STUDENT = "student"
SELF_TEACHER = "ema"


class AdapterSwitch:
    """Says which adapter of a denoiser answers; None is the base with every adapter off."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]

    def select(self, name: str | None) -> None:
        """Route every layer to adapter `name`. Raises KeyError for a name that no layer has."""
        if name is not None and not any(name in layer.lora_A for layer in self._layers):
            known = sorted({n for layer in self._layers for n in layer.lora_A})
            raise KeyError(f"No adapter {name!r} on this denoiser; it has {known}.")
        for layer in self._layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]

    @contextmanager
    def bound(self, name: str | None) -> Iterator[None]:
        """Adapter `name` answers while open; what answered before does so again afterwards."""
        before = [(layer._disable_adapters, layer._active_adapter) for layer in self._layers]
        self.select(name)
        try:
            yield
        finally:
            for layer, (disabled, active) in zip(self._layers, before, strict=True):
                layer._disable_adapters, layer._active_adapter = disabled, active

    @contextmanager
    def averaged(self, names: Sequence[str]) -> Iterator[None]:
        """The average of several adapters answers while open: their deltas, each divided by their number."""
        with self.bound(names[0]):
            kept = [dict(layer.scaling) for layer in self._layers]
            for layer in self._layers:
                layer._active_adapter = list(names)
                for name in names:
                    layer.scaling[name] /= len(names)
            try:
                yield
            finally:
                for layer, scaling in zip(self._layers, kept, strict=True):
                    layer.scaling.update(scaling)


def freeze(pipeline: Any) -> None:
    """Every module of the pipeline frozen and in eval mode (a shared prompt graph would break later backwards)."""
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()


def add_adapter(
    denoiser: nn.Module, name: str, *, rank: int, lora_alpha: float, target_modules: Sequence[str] | str, seed: int = 0
) -> dict[str, nn.Parameter]:
    """A fresh LoRA (output zero) called `name`, in float32, a function of `seed`; returns its parameters by name.

    Raises ValueError (from peft) when no module matches `target_modules`, and UserError for a denoiser whose class
    takes no adapters in diffusers.
    """
    check_takes_adapters(denoiser)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(r=rank, lora_alpha=lora_alpha, init_lora_weights="gaussian", target_modules=targets)
    return add_configured(denoiser, name, config, seed=seed)


def add_configured(denoiser: nn.Module, name: str, config: LoraConfig, *, seed: int = 0) -> dict[str, nn.Parameter]:
    """A fresh adapter of this very config, otherwise as `add_adapter`."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
        denoiser.add_adapter(config, adapter_name=name)
    parameters = adapter_parameters(denoiser, name)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return parameters


def check_takes_adapters(denoiser: nn.Module) -> None:
    """Raise UserError for a denoiser whose class takes no adapters in diffusers."""
    if not hasattr(denoiser, "add_adapter"):
        raise UserError(
            f"{type(denoiser).__name__} takes no adapters in diffusers, so there is no LoRA for this family. Set "
            'student.train = "full", and give teachers of form "full".'
        )


def adapter_parameters(denoiser: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of adapter `name`, by their names in the denoiser."""
    own = re.compile(rf"\.lora_\w+\.{re.escape(name)}(\.|$)")  # a module may have the adapter's name, its tensors not
    return {key: p for key, p in denoiser.named_parameters() if own.search(key)}


@contextmanager
def autocast_forward(denoiser: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast around each forward of the denoiser alone; its weight cache never outlives a forward.

    A cache that spans an adapter or EMA swap serves stale weights, so none does. dtype None changes nothing.
    """
    if dtype is None:
        yield
        return
    original: Callable[..., Any] = denoiser.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        device_type = next(denoiser.parameters()).device.type  # asked here: an offloaded denoiser comes and goes
        with torch.autocast(device_type, dtype=dtype):
            return original(*args, **kwargs)

    with replaced_forward(denoiser, forward):
        yield


class _Inner(nn.Module):
    """A denoiser behind its own forward, so that torch can replace the denoiser's weights for one call."""

    def __init__(self, denoiser: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.denoiser, self._forward = denoiser, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


class Fold:
    """The active adapters folded into the weights: W + scaling B A, by layer.

    Outside `once` every forward folds anew. Within, all forwards of one set of adapters share one fold: each backward
    leaves its gradient at the folded weights, and the end sends their sum through the fold to the adapters.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._layers = {name: m for name, m in denoiser.named_modules() if isinstance(m, BaseTunerLayer)}
        self._kept: dict[Any, tuple[dict[str, Tensor], dict[str, Tensor]]] | None = None

    def weights(self) -> dict[str, Tensor]:
        """layer -> folded weight, for the layers on which an adapter answers."""
        if self._kept is None:
            return self._folded()
        key = tuple((tuple(active), *(layer.scaling[n] for n in active)) for layer, active in self._active())
        if key not in self._kept:
            with torch.enable_grad():
                folded = self._folded()
            self._kept[key] = folded, {n: w.detach().requires_grad_(w.requires_grad) for n, w in folded.items()}
        return self._kept[key][1]

    @contextmanager
    def once(self, last: AbstractContextManager[Any] | None = None) -> Iterator[None]:
        """Fold once while open; the adapters' gradients are whole when it closes. Change no weight in between.

        last: what to have open during the backward through the fold (a stage that is timed).
        """
        self._kept = {}
        try:
            yield
            with last or nullcontext():
                for folded, leaves in self._kept.values():
                    reached = [name for name, leaf in leaves.items() if leaf.grad is not None]
                    torch.autograd.backward([folded[n] for n in reached], [leaves[n].grad for n in reached])
        finally:
            self._kept = None

    def _folded(self) -> dict[str, Tensor]:
        folded = {}
        for (name, layer), (_, active) in zip(self._layers.items(), self._active(), strict=True):
            if active:
                folded[name] = layer.base_layer.weight + sum(layer.get_delta_weight(n) for n in active)
        return folded

    def _active(self) -> list[tuple[BaseTunerLayer, list[str]]]:
        return [(layer, _active(layer)) for layer in self._layers.values()]


@contextmanager
def fused_forward(denoiser: nn.Module) -> Iterator[Fold]:
    """Each forward of the denoiser folds its active adapters into the weights first: W + scaling B A, with gradients.

    The adapters' exact function. A branch beside every convolution costs as much again as a small network; folding
    costs one product of B and A per layer, whatever the batch, and under `Fold.once` it is paid once for many
    forwards. Not for checkpointed forwards: they would be computed again without the adapters.
    """
    switch, inner, fold = AdapterSwitch(denoiser), _Inner(denoiser, denoiser.forward), Fold(denoiser)

    def forward(*args: Any, **kwargs: Any) -> Any:
        weights = {f"denoiser.{name}.base_layer.weight": weight for name, weight in fold.weights().items()}
        with switch.bound(None):
            return torch.func.functional_call(inner, weights, args, kwargs)

    with replaced_forward(denoiser, forward):
        yield fold


def _active(layer: BaseTunerLayer) -> list[str]:
    return [] if layer._disable_adapters else [name for name in layer._active_adapter if name in layer.lora_A]


class Average:
    """Exponential moving average of parameters, kept in float32.

    decay d: average <- d average + (1 - d) parameter, after each optimizer step.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, nn.Parameter]) -> None:
        """One step of the average towards the present parameters."""
        for name, value in self.values.items():
            value.lerp_(parameters[name].detach().float(), 1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, parameters: dict[str, nn.Parameter]) -> None:
        """Write the averages into `parameters`."""
        for name, value in self.values.items():
            parameters[name].copy_(value)

    @contextmanager
    def applied(self, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
        """The averages stand in for the parameters while open. Never open it with a graph alive."""
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        self.copy_to(parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    parameters[name].copy_(value)
