"""Times one distillation micro-batch: per stage, streaming against two-pass, and both peak memories.

    python scripts/bench_step.py --json                       # the main recipe on its base, on this machine
    python scripts/bench_step.py --geometry sd15 --dtype bf16  # random weights at real size (a GPU)

The last line of --json is one JSON object; `speedup` is two-pass seconds / streaming seconds, median of repeats,
for m = 1 with neither side guided. `predicted_speedup` follows from the measured stage times for the recipe's own
setting: its substeps and its teachers' guidance. Base, steps, batch, rank, LoRA targets and whether teachers are fused
copies are the recipe's too. Modes alternate in one process, so drift of the machine cancels.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import psutil
import torch
import typer

from diffopd.errors import UserError

GEOMETRIES: dict[str, dict[str, Any]] = {
    "sd15": {
        "unet": {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        "tokens": 77,
    },
    "small": {
        "unet": {
            "sample_size": 16,
            "block_out_channels": (64, 96, 128),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 128,
            "attention_head_dim": 8,
            "layers_per_block": 1,
        },
        "tokens": 16,
    },
}


@dataclass(frozen=True)
class Setting:
    """What is timed. substeps and teacher_guidance are those of the recipe, which only the prediction uses."""

    geometry: str
    batch: int
    steps: int
    rank: int
    target_modules: list[str] | str
    fuse_teachers: bool
    fuse_student: bool
    substeps: int
    teacher_guidance: list[float]


def setting_of(name: str, **given: Any) -> Setting:
    """The setting of a recipe; `given` values that are not None replace its own."""
    from diffopd.recipe import read_recipe
    from diffopd.teacher import teacher_card

    recipe = read_recipe(name)
    student, cards = recipe.student, [teacher_card(settings.name, recipe.path) for settings in recipe.teachers]
    told = [settings.guidance_scale for settings in recipe.teachers]
    own = {
        "geometry": student.pretrained_model_name_or_path,
        "batch": recipe.train.batch_size,
        "steps": student.num_inference_steps,
        "rank": student.rank,
        "target_modules": student.target_modules,
        "fuse_teachers": recipe.train.fuse_teachers,
        "fuse_student": recipe.train.fuse_student,
        "substeps": recipe.objective.substeps,
        "teacher_guidance": [c.guidance_scale if g is None else g for g, c in zip(told, cards, strict=True)],
    }
    return Setting(**own | {key: value for key, value in given.items() if value is not None})


def build(setting: Setting, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """The calls of a student and of a teacher whose adapter is random, on the setting's pipeline."""
    from diffopd.adapters import STUDENT, AdapterSwitch, add_adapter, freeze
    from diffopd.assemble import with_denoiser
    from diffopd.drive import Call, denoiser_of, shell
    from diffopd.load import fuse_adapter

    geometry = setting.geometry

    pipeline = random_pipeline(geometry) if geometry in GEOMETRIES else load(geometry)
    pipeline.unet.to(device, dtype)
    pipeline.vae.to(device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    freeze(pipeline)
    denoiser = denoiser_of(pipeline)
    of_teacher = with_denoiser(pipeline, copy.deepcopy(denoiser)) if setting.fuse_teachers else shell(pipeline)
    shape = {"rank": setting.rank, "lora_alpha": setting.rank, "target_modules": setting.target_modules}
    for parameter in add_adapter(denoiser_of(of_teacher), "teacher", **shape).values():
        torch.nn.init.normal_(parameter.requires_grad_(False), std=0.02)
    if setting.fuse_teachers:
        fuse_adapter(of_teacher)
    add_adapter(denoiser, STUDENT, **shape)
    switch = AdapterSwitch(denoiser)
    switch.select(STUDENT)
    tokens = GEOMETRIES[geometry]["tokens"] if geometry in GEOMETRIES else pipeline.tokenizer.model_max_length
    width = denoiser.config.cross_attention_dim
    embeds = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    told = {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds), "output_type": "latent"}
    student = Call(pipeline, {**told, "guidance_scale": 1.0})
    binding = nullcontext if setting.fuse_teachers else partial(switch.bound, "teacher")
    return student, Call(of_teacher, {**told, "guidance_scale": 1.0}, binding)


def load(name: str) -> Any:
    from diffopd.load import load_pipeline

    return load_pipeline(name)


def random_pipeline(geometry: str) -> Any:
    """A stock StableDiffusionPipeline of random weights without text encoder; prompts come as embeddings."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        steps_offset=1,
        prediction_type="v_prediction",
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=32),
        unet=UNet2DConditionModel(**GEOMETRIES[geometry]["unet"]),
        scheduler=scheduler,
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def one_step(
    student: Any, teacher: Any, *, batch: int, steps: int, fuse_student: bool, two_pass: bool, device: str
) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """Seconds, seconds per stage and gradients of one micro-batch with its optimizer step."""
    from diffopd.adapters import STUDENT, adapter_parameters, fused_forward
    from diffopd.drive import denoiser_of, survey
    from diffopd.noise import draw
    from diffopd.objective import get_objective
    from diffopd.supervise import Manner, Watch, supervise

    def told(call: Any, **more: Any) -> Any:
        embeds = {k: call.arguments[k].expand(batch, -1, -1) for k in ("prompt_embeds", "negative_prompt_embeds")}
        return call.told(**embeds, num_inference_steps=steps, **more)

    shape = survey(told(student)).shape
    dtype = student.arguments["prompt_embeds"].dtype

    def noise(step: int) -> torch.Tensor:
        keys = {"run_seed": 0, "update": 0, "solver_step": step, "sample_indices": list(range(batch))}
        return draw(shape, **keys).to(device, dtype)

    parameters = list(adapter_parameters(denoiser_of(student.pipeline), STUDENT).values())
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    optimizer.zero_grad(set_to_none=True)
    manner = Manner(get_objective("mean"), range(steps), two_pass=two_pass)
    watch = Watch(exact=True)
    start = time.perf_counter()
    with ExitStack() as stack:
        if fuse_student:
            fold = stack.enter_context(fused_forward(denoiser_of(student.pipeline)))
            stack.enter_context(fold.once(watch("backward")))
        supervise(
            told(student, latents=noise(0)),
            told(teacher, latents=noise(0)),
            manner=manner,
            noise=lambda index: noise(index + 1),
            backward=lambda loss: loss.mean().backward(),
            watch=watch,
        )
    gradients = [p.grad.detach().clone() for p in parameters]
    with watch("optimizer"):
        optimizer.step()
    return time.perf_counter() - start, dict(watch.seconds), gradients


def peak_memory(sender: Any, setting: Setting, dtype: torch.dtype, device: str, two_pass: bool) -> None:
    """In a process of its own: bytes that one micro-batch adds to the peak."""
    torch.set_num_threads(1)
    student, teacher = build(setting, dtype, device)
    run = {"steps": setting.steps, "fuse_student": setting.fuse_student, "device": device, "two_pass": two_pass}
    one_step(student, teacher, batch=1, **run)  # libraries and caches are in place
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_step(student, teacher, batch=setting.batch, **run)
        sender.send(torch.cuda.max_memory_allocated() - before)
        return
    sender.send(resident_peak(lambda: one_step(student, teacher, batch=setting.batch, **run)))


def resident_peak(work: Callable[[], Any]) -> int:
    """Bytes by which the resident memory rises at most while `work` runs, looked at every millisecond."""
    process, done, seen = psutil.Process(), threading.Event(), []

    def look() -> None:
        while not done.is_set():
            seen.append(process.memory_info().rss)
            time.sleep(0.001)

    before, watcher = process.memory_info().rss, threading.Thread(target=look)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(0, max(seen) - before)


def measured_peak(*arguments: Any) -> int:
    """`peak_memory(sender, *arguments)` in a new process. Exits when that process dies."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=peak_memory, args=(sender, *arguments))
    process.start()
    sender.close()  # the child has the only other end: its death ends the pipe
    try:
        value = int(receiver.recv())
    except EOFError:
        process.join()
        sys.exit(f"The process that measures memory ended with exit code {process.exitcode} and no result.")
    process.join()
    return value


def predicted(stages: dict[str, float], setting: Setting) -> float:
    """Two-pass over streaming from stage times: the teacher's share grows with substeps and guidance."""
    forwards = statistics.mean(2 if scale > 1 else 1 for scale in setting.teacher_guidance)
    teacher = stages["teacher"] * setting.substeps * forwards
    streaming = teacher + sum(stages.get(k, 0.0) for k in ("student", "objective", "backward", "optimizer"))
    return (streaming + stages["rollout"]) / streaming


def main(
    recipe: Annotated[str, typer.Option(help="whose setting: a name or a file")] = "together",
    geometry: Annotated[str | None, typer.Option(help="sd15, small, or a pipeline, instead of the recipe's")] = None,
    batch: Annotated[int | None, typer.Option(help="instead of the recipe's")] = None,
    steps: Annotated[int | None, typer.Option(help="instead of the recipe's")] = None,
    rank: Annotated[int | None, typer.Option(help="instead of the recipe's")] = None,
    repeats: int = 7,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one")] = "",
    threads: int = 1,
    as_json: Annotated[bool, typer.Option("--json", help="end with one line of JSON")] = False,
) -> None:
    """Time streaming against two-pass and print where the time goes."""
    torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype not in ("fp32", "bf16"):
        raise typer.BadParameter(f"--dtype {dtype!r}; allowed are fp32 and bf16")
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    try:
        setting = setting_of(recipe, geometry=geometry, batch=batch, steps=steps, rank=rank)
    except UserError as error:
        raise typer.BadParameter(f"--recipe {recipe}: {error}") from error
    student, teacher = build(setting, kind, device)
    run = {"batch": setting.batch, "steps": setting.steps, "fuse_student": setting.fuse_student, "device": device}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    stages: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for repeat in range(repeats + 1):
        grads = {}
        for two_pass in (False, True):
            taken, stage, grads[two_pass] = one_step(student, teacher, two_pass=two_pass, **run)
            if repeat:  # the first pair warms up
                seconds[two_pass].append(taken)
                stages[two_pass].append(stage)
    largest = max(float((a - b).abs().max()) for a, b in zip(grads[False], grads[True], strict=True))
    scale = max(float(a.abs().max()) for a in grads[True])
    median = {mode: statistics.median(values) for mode, values in seconds.items()}
    pairs = [b / a for a, b in zip(seconds[False], seconds[True], strict=True)]
    stage_median = {
        mode: {k: statistics.median(s.get(k, 0.0) for s in stages[mode]) for k in stages[mode][0]}
        for mode in (False, True)
    }
    result = {
        "recipe": recipe,
        **asdict(setting),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": dtype,
        "streaming_seconds": median[False],
        "two_pass_seconds": median[True],
        "speedup": statistics.median(pairs),
        "speedup_range": [min(pairs), max(pairs)],
        "stage_seconds_streaming": stage_median[False],
        "stage_seconds_two_pass": stage_median[True],
        "predicted_speedup": predicted(stage_median[True], setting),
        "gradient_difference": largest / scale,
        "peak_bytes_streaming": measured_peak(setting, kind, device, False),
        "peak_bytes_two_pass": measured_peak(setting, kind, device, True),
    }
    for name, value in result.items():
        print(f"{name:28} {value}", file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
