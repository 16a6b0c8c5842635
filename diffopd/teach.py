"""Making a teacher: one loop, the estimator is the choice.

One update: prompts -> groups of pictures through the driven pipeline -> rewards, computed while the next pictures are
sampled -> advantages -> the estimator's loss at the states -> one reduction, one optimizer step (or a few, each on a
part). A supervised teacher takes given pictures instead of sampled ones. To resume, give the same command again.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch
from torch import Tensor

from diffopd import noise
from diffopd.adapters import autocast_forward, fused_forward
from diffopd.checkpoint import Trained, averaged, load_checkpoint
from diffopd.data_states import as_states, encode_images, encode_pictures
from diffopd.distill import INITIAL, learning_rate_factor, manner_of
from diffopd.drive import denoiser_of
from diffopd.errors import UserError
from diffopd.estimators import advantages, optimality
from diffopd.learning import Measures, learn, noisy_steps
from diffopd.loop import INTERRUPTED, new_trained, one_fold, refuse_non_finite_norm, run_updates
from diffopd.processes import on_this_gpu
from diffopd.run_folder import RunFolder
from diffopd.sampling import Sampled, gathered, joined, sample, score
from diffopd.supervise import NonFiniteLoss, Watch
from diffopd.teach_log import Round, TeachLog
from diffopd.teach_recipe import POLICY_GRADIENT, TeachRecipe
from diffopd.teach_run import TeachRun, assemble_run

LEARN = -1  # solver-step keys of the noise that pictures are noised with: -1, -2, ...; sampling has 0, 1, ...


def teach(recipe: TeachRecipe, folder: RunFolder) -> bool:
    """Run or resume a teach.toml in its folder: train, log, checkpoint; ends with a checkpoint.

    Returns whether the run came to its end (False after Ctrl-C).

    Raises UserError for anything wrong with the recipe's parts, for rewards or losses that are not finite, and for
    packages or weights of rewards that are missing, before training.
    """
    run = assemble_run(recipe)
    trained = trained_of(run)
    latest = folder.latest_checkpoint() if recipe.train.resume_from_checkpoint == "latest" else None
    if latest:
        load_checkpoint(latest, trained)
        follow(run, trained, finished=None)
    with ExitStack() as stack:
        dtype = torch.bfloat16 if recipe.train.mixed_precision == "bf16" else None
        calls = [call for call in (run.sides.student, run.sides.old, run.sides.base, run.watch.base) if call]
        for denoiser in {id(d): d for d in (denoiser_of(call.pipeline) for call in calls)}.values():
            stack.enter_context(autocast_forward(denoiser, dtype))
        if recipe.train.fuse_student:  # the old policy is folded by itself, the base has nothing to fold
            run.fold = stack.enter_context(fused_forward(denoiser_of(run.student.pipeline)))
        log = stack.enter_context(TeachLog(folder, recipe, trained.progress, is_main=run.processes.is_main))
        if recipe.train.validate_every and not trained.progress.update:
            log.validation(held_out(run, trained))
        reason = run_updates(run, trained, folder, log, one_round, held_out)
        if recipe.train.validate_every and reason != INTERRUPTED and not is_looked_at(run, trained, folder):
            log.validation(held_out(run, trained))  # at what was made
        log.stop(reason)
    run.processes.wait()
    return reason != INTERRUPTED


def trained_of(run: TeachRun) -> Trained:
    """What a checkpoint holds; the old policy is stored as distillation stores its self-teacher."""
    trained = new_trained(run)
    trained.self_teacher = run.follow[0] if run.follow else None
    return trained


def follow(run: TeachRun, trained: Trained, *, finished: int | None) -> None:
    """The old policy follows by DiffusionNFT's soft update, decay min(rate x finished updates, max).

    finished None only writes the average out, as after a resume.
    """
    if not run.follow:
        return
    average, written = run.follow
    if finished is not None:
        settings = run.recipe.estimator
        average.decay = min(settings.old_decay_rate * finished, settings.old_decay_max)
        average.update(trained.parameters)
    average.copy_to(written)


def held_out(run: TeachRun, trained: Trained) -> dict[str, float]:
    """The reward, the other tasks' scores, drift and diversity on held-out prompts, of the weights to deploy."""
    with averaged(trained), one_fold(run, Watch()):
        return run.watch.look()


def is_looked_at(run: TeachRun, trained: Trained, folder: RunFolder) -> bool:
    """Whether the held-out prompts have been scored at the present update: a look may have been broken off."""
    is_main, update = run.processes.is_main, trained.progress.update
    looks = (
        [row for row in folder.metrics() if row["kind"] == "held_out" and row["update"] == update] if is_main else []
    )
    return bool(run.processes.of_main(float(len(looks))))


def one_round(run: TeachRun, trained: Trained, watch: Watch) -> Round:
    """Pictures of one update, their advantages, and the optimizer steps on them.

    Raises UserError at the first reward, loss or gradient that is not finite; the optimizer has not moved by it.
    """
    update, recipe = trained.progress.update, run.recipe
    mine = list(run.processes.rows(recipe.num_pictures))
    if recipe.is_supervised:
        batch, good, record = given_pictures(run, update, mine, watch), torch.zeros(len(mine)), Round()
    else:
        batch, rewards = sampled_pictures(run, update, mine, watch)
        groups = [number // recipe.group_size for number in range(recipe.num_pictures)]
        settings = recipe.estimator
        found = advantages(rewards, groups, std=settings.advantage_std, clip=settings.advantage_clip)
        record = Round.of_rewards(rewards, groups)
        good = optimality(found, clip=settings.advantage_clip) if settings.name == "nft" else found
        good = good[mine]
    measures = Measures()
    for step in range(recipe.sampling.optimizer_steps):
        record.grad_norm = optimizer_step(run, trained, batch, good, step, measures, watch)
    trained.progress.images += recipe.num_pictures
    follow(run, trained, finished=update + 1)
    return record.measured(measures, run.processes)


def sampled_pictures(run: TeachRun, update: int, mine: list[int], watch: Watch) -> tuple[Sampled | None, Tensor]:
    """This process's pictures, and the rewards of all processes' (num_pictures,), scored beside the sampling."""
    recipe = run.recipe
    policy = recipe.estimator.name in POLICY_GRADIENT
    manner = manner_of(recipe, run.walk.num_visits, update, 0) if policy else None
    parts, futures = [], []
    with ThreadPoolExecutor(1, thread_name_prefix="reward", initializer=on_this_gpu()) as scorer, one_fold(run, watch):
        for numbers in run.batches(mine):
            rows = [run.row(update, number) for number in numbers]

            def drawn(index: int, numbers: list[int] = numbers) -> Tensor:
                return run.noise(update, index + 1, numbers)

            part, images = sample(
                run.sides.old or run.sides.student,
                rows,
                numbers,
                latents=run.noise(update, INITIAL, numbers),
                noise=drawn,
                manner=manner,
                watch=watch,
            )
            parts.append(part)
            futures.append(scorer.submit(score, run.reward, images, rows))
        with watch("reward"):  # what of it was not hidden behind the sampling
            own = gathered(futures)
    rewards = torch.zeros(recipe.num_pictures, dtype=torch.float64)
    rewards[mine] = own
    return (joined(parts) if parts else None), run.processes.sum(rewards)


def given_pictures(run: TeachRun, update: int, mine: list[int], watch: Watch) -> Sampled | None:
    """This process's training pictures as latents, drawn by the recipe's function or read from its rows' files."""
    if not mine:
        return None
    rows = [run.row(update, number) for number in mine]
    with watch("pictures"):
        latents = torch.cat([encoded(run, update, numbers) for numbers in run.batches(mine)])
    if latents.shape[1:] != run.walk.shape:
        raise UserError(
            f"Training pictures become latents of shape {tuple(latents.shape[1:])}, but this pipeline walks on "
            f"{run.walk.shape}. Give pictures of the size that it draws."
        )
    return Sampled(rows, mine, latents, latents)


def encoded(run: TeachRun, update: int, numbers: list[int]) -> Tensor:
    """Latents (B, ...) of one batch of training pictures."""
    rows = [run.row(update, number) for number in numbers]
    if run.pictures is None:
        return as_states(run.student.pipeline, encode_pictures(run.student.pipeline, rows))
    seeds = [noise.hash_of(run.recipe.seed, update, number) for number in numbers]
    images = run.pictures([row.prompt for row in rows], [row.metadata for row in rows], seeds)
    if len(images) != len(rows):
        raise UserError(f"pictures = {run.recipe.pictures!r} gave {len(images)} pictures for {len(rows)} rows.")
    sizes = list(dict.fromkeys(f"{image.width} x {image.height}" for image in images))
    if len(sizes) > 1:
        raise UserError(
            f"pictures = {run.recipe.pictures!r} gave pictures of {' and '.join(sizes)} pixels. Give all of the "
            "size that the pipeline draws."
        )
    return as_states(run.student.pipeline, encode_images(run.student.pipeline, images))


def optimizer_step(
    run: TeachRun, trained: Trained, batch: Sampled | None, good: Tensor, step: int, measures: Measures, watch: Watch
) -> float:
    """One optimizer step on every optimizer_steps-th picture of the update; returns the gradient's norm."""
    recipe, update, train = run.recipe, trained.progress.update, run.recipe.train
    parts = recipe.sampling.optimizer_steps
    trained.optimizer.zero_grad(set_to_none=True)
    places = [i for i, number in enumerate(batch.numbers) if number % parts == step] if batch else []
    count = len(range(step, recipe.num_pictures, parts))
    with one_fold(run, watch):
        for chosen in run.batches(places):
            learn_part(run, update, step, batch.part(chosen), good[chosen], count, measures, watch)
    with watch("optimizer"):
        run.processes.sum_gradients(trained.parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(trained.parameters.values(), train.max_grad_norm)
        refuse_non_finite_norm(norm, [recipe.card.name], update)
        for group in trained.optimizer.param_groups:
            group["lr"] = train.learning_rate * learning_rate_factor(recipe, trained.progress)
        trained.optimizer.step()
        if trained.average:
            trained.average.update(trained.parameters)
    return float(norm)


def learn_part(
    run: TeachRun, update: int, step: int, part: Sampled, good: Tensor, count: int, measures: Measures, watch: Watch
) -> None:
    """Back one micro-batch of an update's optimizer step `step`, which is on `count` pictures."""
    among = noisy_steps(part) if part.taken else None  # a random query that drew only others would teach nothing
    try:
        learn(
            run.sides,
            part,
            good.to(run.device),
            settings=run.recipe.estimator,
            manner=manner_of(run.recipe, run.walk.num_visits, update, step, among=among),
            start=run.walk,
            noise=lambda index: run.noise(update, LEARN - index, part.numbers),
            backward=lambda loss: (loss.sum() / count).backward(),
            measures=measures,
            watch=watch,
        )
    except NonFiniteLoss as error:
        raise UserError(
            f"The loss of estimator {run.recipe.estimator.name!r} is not finite at update {update}, step "
            f"{error.index} (sigma {error.sigma:.4f}). Nothing was written after the last checkpoint. Lower "
            "learning_rate, or use mixed_precision = 'no'."
        ) from error
