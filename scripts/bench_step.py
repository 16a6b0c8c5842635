"""Times one distillation micro-batch: per stage, streaming against two-pass, and both peak memories.

    python scripts/bench_step.py --json                       # the shipped base on this machine
    python scripts/bench_step.py --geometry sd15 --dtype bf16  # random weights at real size (a GPU)

The last line of --json is one JSON object; `speedup` is two-pass seconds / streaming seconds, median of repeats,
for m = 1 with neither side guided. `predicted_speedup` follows from the measured stage times for the setting given
by --recipe-substeps, --recipe-guidance. Modes alternate in one process, so drift of the machine cancels.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any

import psutil
import torch
import typer

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


def build(geometry: str, dtype: torch.dtype, device: str, rank: int) -> tuple[Any, Any, Any]:
    """A pipeline (a shipped or local folder, or random weights of a geometry), its student call and teacher call."""
    from diffopd.adapters import STUDENT, AdapterSwitch, add_adapter, freeze
    from diffopd.drive import Call, denoiser_of, shell

    pipeline = random_pipeline(geometry) if geometry in GEOMETRIES else load(geometry)
    pipeline.unet.to(device, dtype)
    pipeline.vae.to(device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    freeze(pipeline)
    denoiser = denoiser_of(pipeline)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    teacher_parameters = add_adapter(denoiser, "teacher", rank=rank, lora_alpha=rank, target_modules=targets)
    for parameter in teacher_parameters.values():
        torch.nn.init.normal_(parameter.requires_grad_(False), std=0.02)
    add_adapter(denoiser, STUDENT, rank=rank, lora_alpha=rank, target_modules=targets)
    switch = AdapterSwitch(denoiser)
    switch.select(STUDENT)
    tokens = GEOMETRIES.get(geometry, {}).get("tokens", 16)
    width = denoiser.config.cross_attention_dim
    embeds = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    told = {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds), "output_type": "latent"}
    student = Call(pipeline, {**told, "guidance_scale": 1.0})
    teacher = Call(shell(pipeline), {**told, "guidance_scale": 1.0}, lambda: switch.bound("teacher"))
    return pipeline, student, teacher


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
    student: Any,
    teacher: Any,
    *,
    batch: int,
    steps: int,
    two_pass: bool,
    device: str,
    guidance: float = 1.0,
    substeps: int = 1,
) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """Seconds, seconds per stage and gradients of one micro-batch with its optimizer step."""
    from diffopd.adapters import STUDENT, adapter_parameters
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
    manner = Manner(get_objective("mean"), range(steps), substeps=substeps, two_pass=two_pass)
    watch = Watch(exact=True)
    start = time.perf_counter()
    supervise(
        told(student, latents=noise(0)),
        told(teacher, latents=noise(0), guidance_scale=guidance),
        manner=manner,
        noise=lambda index: noise(index + 1),
        backward=lambda loss: loss.mean().backward(),
        watch=watch,
    )
    gradients = [p.grad.detach().clone() for p in parameters]
    with watch("optimizer"):
        optimizer.step()
    return time.perf_counter() - start, dict(watch.seconds), gradients


def peak_memory(queue: Any, options: dict[str, Any], two_pass: bool) -> None:
    """In a process of its own: bytes that one micro-batch adds to the peak."""
    torch.set_num_threads(1)
    pipeline, student, teacher = build(options["geometry"], options["dtype"], options["device"], options["rank"])
    run = {k: options[k] for k in ("steps", "device")}
    one_step(student, teacher, batch=1, two_pass=two_pass, **run)  # libraries and caches are in place
    if options["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_step(student, teacher, batch=options["batch"], two_pass=two_pass, **run)
        queue.put(torch.cuda.max_memory_allocated() - before)
        return
    queue.put(resident_peak(lambda: one_step(student, teacher, batch=options["batch"], two_pass=two_pass, **run)))


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


def measured_peak(options: dict[str, Any], two_pass: bool) -> int:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak_memory, args=(queue, options, two_pass))
    process.start()
    value = queue.get(timeout=3600)
    process.join()
    return int(value)


def predicted(stages: dict[str, float], guidance: float, substeps: int) -> float:
    """Two-pass over streaming from stage times: the teacher's share grows with substeps and guidance."""
    teacher = stages["teacher"] * substeps * (2 if guidance > 1 else 1)
    streaming = teacher + sum(stages.get(k, 0.0) for k in ("student", "objective", "backward", "optimizer"))
    return (streaming + stages["rollout"]) / streaming


def main(
    geometry: Annotated[str, typer.Option(help="sd15, small, or a pipeline (shipped name, folder, hub id)")] = "emoji",
    batch: int = 16,
    steps: int = 4,
    rank: int = 32,
    repeats: int = 7,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one")] = "",
    recipe_substeps: int = 5,
    recipe_guidance: float = 2.0,
    threads: int = 1,
    as_json: Annotated[bool, typer.Option("--json", help="end with one line of JSON")] = False,
) -> None:
    """Time streaming against two-pass and print where the time goes."""
    torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype not in ("fp32", "bf16"):
        raise typer.BadParameter(f"--dtype {dtype!r}; allowed are fp32 and bf16")
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    _, student, teacher = build(geometry, kind, device, rank)
    run = {"batch": batch, "steps": steps, "device": device}
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
    options = {"geometry": geometry, "dtype": kind, "device": device, "rank": rank, "steps": steps, "batch": batch}
    result = {
        "geometry": geometry,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **{k: v for k, v in options.items() if k in ("steps", "batch", "rank")},
        "dtype": dtype,
        "streaming_seconds": median[False],
        "two_pass_seconds": median[True],
        "speedup": statistics.median(pairs),
        "speedup_range": [min(pairs), max(pairs)],
        "stage_seconds_streaming": stage_median[False],
        "stage_seconds_two_pass": stage_median[True],
        "predicted_speedup": predicted(stage_median[True], recipe_guidance, recipe_substeps),
        "predicted_for": {"substeps": recipe_substeps, "teacher_guidance": recipe_guidance},
        "gradient_difference": largest / scale,
        "peak_bytes_streaming": measured_peak(options, False),
        "peak_bytes_two_pass": measured_peak(options, True),
    }
    for name, value in result.items():
        print(f"{name:28} {value}", file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
