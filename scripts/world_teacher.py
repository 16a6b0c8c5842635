"""The embedded world's prompts, and teachers: the base specialised to one task."""

import hashlib
import json
import re
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from world_data import (
    Pool,
    world_prompts,
)
from world_models import (
    ROOT,
    Base,
    add_lora,
    build_scheduler,
    world,
)
from world_training import Output, cosine, log_row, set_rate, update_average, velocity_loss


def prompts(teachers: Annotated[Path, typer.Option(help="the shelf")] = ROOT / "teachers") -> None:
    """Writes teachers/<task>/prompts: train.jsonl, test.jsonl (held out) and, for style, unseen.jsonl."""
    for task in world.TASKS:
        folder = teachers / task / "prompts"
        folder.mkdir(parents=True, exist_ok=True)
        files = {"train": world_prompts(task, held_out=False), "test": world_prompts(task, held_out=True)}
        if task == "style":
            files["test"] *= -(-1000 // len(files["test"]))  # few wordings: each comes again with other noise
            pairs = [{"thing": thing, "manner": manner} for thing, manner in world.UNSEEN_PAIRS]
            files["unseen"] = [{"prompt": text, **pair} for pair in pairs for text in world.captions(task, pair)]
        for name, rows in files.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            num_prompts = len({row["prompt"] for row in rows})
            typer.echo(f"{folder / name}.jsonl: {len(rows)} rows, {num_prompts} different prompts")


def teacher(
    task: Annotated[str, typer.Argument(help="composition, text or style")],
    output: Output,
    seconds: Annotated[float, typer.Option(help="training time")] = 600.0,
    form: Annotated[str, typer.Option(help="lora or full")] = "lora",
    rank: int = 32,
    learning_rate: float = 2e-3,
    batch: int = 32,
    save_every: Annotated[int, typer.Option(help="updates between saves of the average so far")] = 500,
    pipeline: Annotated[Path, typer.Option(help="the base")] = ROOT / "pipelines" / "emoji",
    destination: Annotated[Path | None, typer.Option(help="default: teachers/<task>")] = None,
    begin_from: Annotated[Path | None, typer.Option(help="go on from the adapter in this folder")] = None,
) -> None:
    """Specialises the base to one task on clean captions of it and writes the teacher's weights."""
    from diffusers import StableDiffusionPipeline

    if task not in world.TASKS or form not in ("lora", "full"):
        raise typer.BadParameter(f"got task {task!r}, form {form!r}; allowed are {world.TASKS} and ('lora', 'full')")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
    pipe.text_encoder.requires_grad_(False)
    pipe.unet.train().requires_grad_(form == "full")
    folder = destination or ROOT / "teachers" / task
    if form == "lora" and begin_from:
        pipe.load_lora_weights(begin_from, weight_name="pytorch_lora_weights.safetensors", adapter_name="default")
        for name, parameter in pipe.unet.named_parameters():
            parameter.requires_grad_(".lora_" in name)
    elif form == "lora":
        add_lora(pipe.unet, rank)
    model = Base(pipe.text_encoder, pipe.unet)
    pool, scheduler = Pool(output, pipe.tokenizer), build_scheduler()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    forward = with_fused_adapter(model) if form == "lora" else model
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    start, update, total = time.time(), 0, 0.0
    while (progress := (time.time() - start) / seconds) < 1:
        rng = np.random.default_rng([14 if begin_from else 13, world.TASKS.index(task), update])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        set_rate(optimizer, learning_rate * min(1, (update + 1) / 50) * cosine(progress))
        latents, tokens = pool.draw(batch, rng, {task: 1.0}, wrong=0.0)
        loss = velocity_loss(forward, scheduler, latents, tokens, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        update += 1
        total += float(loss.detach())
        update_average(average, parameters, min(0.995, update / (update + 10)))
        if update % 100 == 0:
            row = {
                "update": update,
                "pictures": update * batch,
                "seconds": progress * seconds,
                "loss": total / 100,
            }
            log_row(output, f"teacher-{task}", form=form, **row)
            total = 0.0
        if update % save_every == 0:
            save_average(pipe, form, parameters, average, folder)
    save_average(pipe, form, parameters, average, folder)


def with_fused_adapter(model: Base) -> Callable[..., torch.Tensor]:
    """The model's forward with W + scale B A in place of W: the adapter's exact function at the cost of the plain net.

    A branch beside every convolution costs as much again as a small net itself.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from diffopd.adapters import AdapterSwitch

    AdapterSwitch(model.unet).select(None)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}

    def forward(*arguments: torch.Tensor) -> torch.Tensor:
        fused = {}
        for name, layer in layers.items():
            weight = layer.base_layer.weight
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            delta = layer.scaling["default"] * (up.flatten(1) @ down.flatten(1)).view_as(weight)
            fused[f"{name}.base_layer.weight"] = weight + delta
        return torch.func.functional_call(model, fused, arguments)

    return forward


@torch.no_grad()
def save_average(
    pipe: Any, form: str, parameters: list[torch.Tensor], average: list[torch.Tensor], folder: Path
) -> None:
    """Saves the teacher with its averaged weights and puts the current ones back."""
    current = [parameter.clone() for parameter in parameters]
    torch._foreach_copy_(parameters, average)
    save_teacher(pipe, form, folder)
    torch._foreach_copy_(parameters, current)


def save_teacher(pipe: Any, form: str, folder: Path) -> None:
    """Writes fp16 weights: pytorch_lora_weights.safetensors with its metadata, or the folder unet."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    if form == "full":
        deepcopy(pipe.unet).half().save_pretrained(folder / "unet")
        return
    adapter = get_peft_model_state_dict(pipe.unet)
    settings = pipe.unet.peft_config["default"].to_dict()  # without it lora_alpha would be lost
    layers = {key: value.half().contiguous() for key, value in adapter.items()}
    pipe.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=settings)
    weights = folder / "pytorch_lora_weights.safetensors"
    weights.chmod(0o644)
    digest, card = hashlib.sha256(weights.read_bytes()).hexdigest(), folder / "teacher.toml"
    if card.exists():
        card.write_text(re.sub(r'(?m)^sha256 = ".*"', f'sha256 = "{digest}"', card.read_text()))
    typer.echo(f"{weights}: sha256 {digest}")
