"""The command line. Heavy libraries are imported inside the commands, so that help answers at once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from diffopd import __version__
from diffopd.errors import UserError, suggestion
from diffopd.interrupt import lost_interrupts_come_again


class Commands(TyperGroup):
    """Commands whose user errors, and the system's on a file, are shown in red without a traceback, exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with lost_interrupts_come_again():
                return super().invoke(ctx)
        except UserError as error:
            typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error
        except OSError as error:
            if error.filename is None:  # not of a file of the user's
                raise
            typer.secho(f"Error: {error.filename}: {error.strerror}.", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:  # before the work in a run folder (_at_work)
            raise _interrupted("Nothing was written.") from error


MADE_ANEW = "The training stands as it was; the same command begins its part anew."

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="On-policy distillation of diffusion models: several teachers, one few-step student.",
)
RunArgument = Annotated[Path, typer.Argument(help="A run folder, such as runs/together.")]


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """On-policy distillation of diffusion models: several teachers, one few-step student."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def distill(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or the path of a .toml file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override, such as train.batch_size=8."),
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Run folder (default: the recipe's output_dir).")] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Train in this many processes; each adds its own batch to an update.")
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved plan and stop.")] = False,
) -> None:
    """Train a student, evaluate and export it, write the report. To resume, give the same command again."""
    from diffopd.recipe import read_recipe

    read = read_recipe(recipe, _options(overrides, output_dir))
    if dry_run:
        _show_plan(read, processes)
        _check_folder(read, processes)
        return
    with _at_work(read.output_dir) as lock:
        _train(read, processes, lock)


@app.command()
def tune(
    recipe: Annotated[
        str | None, typer.Argument(help="A shipped tuning recipe's name, or the path of a .toml file.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A few-step pipeline: shelf name, folder or hub id.")] = None,
    images: Annotated[
        str | None, typer.Option(help="A folder of pictures with captions (.txt or metadata.jsonl), or a .jsonl file.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="d-opsd (default), or to compare with it: sft, dreambooth.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override, such as context.kind=enhanced_prompt."),
    ] = None,
    instance_prompt: Annotated[
        str | None, typer.Option(help="One prompt for all pictures, instead of captions.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Run folder (default: runs/ and the name).")] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Train in this many processes; each adds its own batch to an update.")
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the pictures, print the plan and stop.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Train even if its context does not help the teacher.")
    ] = False,
) -> None:
    """Teach a few-step model new pictures so that it keeps its few steps. To resume, give the same command again."""
    from diffopd.features import check_features
    from diffopd.run_folder import has_begun
    from diffopd.tune import TASK, prepare, task_written
    from diffopd.tune_facts import facts
    from diffopd.tune_recipe import UNUSED, quoted, read_tune_recipe

    options = _options(overrides, output_dir)
    options += [f"images.instance_prompt={quoted(instance_prompt)}"] if instance_prompt is not None else []
    if method is not None and method not in UNUSED:
        raise UserError(f"--method {method}: there is no such method.{suggestion(method, list(UNUSED))}")
    options += [f"method={quoted(method)}"] if method is not None else []
    asked = read_tune_recipe(recipe, model, images, options)
    _quiet_libraries()
    if dry_run:
        import tempfile

        with tempfile.TemporaryDirectory() as place:
            tuning = prepare(asked, Path(place) / TASK, shipped=True)
            with task_written(tuning):
                _show_facts(facts(tuning))
                _show_plan(tuning.recipe, processes)
        # The task's place is part of the recipe, so where a run has begun it is made anew, of the run's own folder.
        begun = has_begun(Path(asked.output_dir))
        _check_folder(prepare(asked, shipped=True).recipe if begun else tuning.recipe, processes)
        return
    check_features(asked)
    tuning = prepare(asked)
    with _at_work(tuning.recipe.output_dir) as lock, task_written(tuning):
        _show_facts(facts(tuning))
        from diffopd.looks import begin_looking
        from diffopd.prior import draw_prior

        draw_prior(tuning, typer.echo)
        _train(tuning.recipe, processes, lock, begin_looking(tuning, force=force))


@app.command()
def teach(
    teacher: Annotated[str, typer.Argument(help="A shipped teacher, a teacher's folder, or a .toml file in one.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override, such as train.batch_size=8."),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Run folder (default: runs/teach-NAME, or -NAME-FILE).")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Share the pictures of each update among processes.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved plan and stop.")] = False,
    write: Annotated[
        bool, typer.Option("--write", help="At the end put the weights, and their sha256, into the teacher's folder.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With --write: replace weights there.")] = False,
    checkpoint: Annotated[
        int | None, typer.Option(min=1, help="With --write: the weights of this update instead of the last.")
    ] = None,
) -> None:
    """Make the weights that a teacher's folder describes (teach.toml), from pictures or from a reward."""
    from diffopd.run_folder import has_begun
    from diffopd.teach_check import check_teach, open_pictures, render_teach, try_teach_rewards
    from diffopd.teach_recipe import read_teach_recipe
    from diffopd.teach_write import check_writable, fallen, write_weights

    if overwrite and not write:
        raise UserError("--overwrite has no effect without --write. Give both, or neither.")
    if checkpoint is not None and not write:
        raise UserError("--checkpoint has no effect without --write. Give both, or neither.")
    options = list(overrides or []) + ([f"output_dir={json.dumps(str(output_dir))}"] if output_dir else [])
    read = read_teach_recipe(teacher, options)
    _quiet_libraries()
    if write:
        check_writable(read, overwrite=overwrite)
    found = check_teach(read, hash_weights=not dry_run)
    if dry_run:
        from rich.console import Console

        open_pictures(found)
        Console().print(render_teach(found, processes))
        _check_folder(read, processes)
        return
    with _at_work(read.output_dir) as lock:
        count = int(os.environ.get("WORLD_SIZE", processes))
        if _scores_here(count) and not has_begun(Path(read.output_dir)):
            open_pictures(found)
            try_teach_rewards(found)
        folder = _run_folder(read, found.hashes, count)
        if count > 1 and "WORLD_SIZE" not in os.environ:
            from diffopd.launch import launch

            raise typer.Exit(launch(count, sys.argv[1:], lock))
        from diffopd.teach import teach as train

        if not train(read, folder):
            raise typer.Exit(130)
        if _is_main():
            written = write_weights(read, folder, number=checkpoint, overwrite=overwrite) if write else None
            typer.echo(f"Done: the teacher's weights are in {written or folder.latest_checkpoint()}.")
            if not write and (why := fallen(read, folder)):
                typer.secho(f"Warning: {why}", fg=typer.colors.YELLOW, err=True)


@app.command()
def evaluate(
    run: RunArgument,
    everything: Annotated[
        bool, typer.Option("--all", help="Measure base and teachers too, instead of taking their cards' scores.")
    ] = False,
) -> None:
    """Score base, teachers and student of a run again, on the same prompts and seeds."""
    from diffopd.run_folder import RunFolder

    folder = RunFolder.open(run)
    folder.refuse_untrained()
    _quiet_libraries()
    from diffopd.evaluate import evaluate_run
    from diffopd.preflight import check_unchanged

    with _at_work(folder.path, MADE_ANEW):
        check_unchanged(folder, teachers=True)
        scores = evaluate_run(folder.path, everything=everything)
    _show_scores(scores)
    typer.echo(f"\n{scores}")


class Format(StrEnum):
    """The forms of an export."""

    diffusers = "diffusers"
    lora = "lora"
    kohya = "kohya"
    single_file = "single-file"


@app.command()
def export(
    run: RunArgument,
    formats: Annotated[
        list[Format] | None,
        typer.Option("--format", help="May be given several times (default: diffusers, and lora for a LoRA student)."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the export to this repository.")
    ] = None,
) -> None:
    """Write the student of a run for stock clients: each form is reloaded and compared before it counts."""
    from diffopd.run_folder import RunFolder

    folder = RunFolder.open(run)
    folder.refuse_untrained()
    _quiet_libraries()
    from diffopd.export import export_run
    from diffopd.hub import check_push
    from diffopd.preflight import check_unchanged

    if push_to_hub:
        check_push(push_to_hub)
    with _at_work(folder.path, MADE_ANEW):
        check_unchanged(folder, teachers=False)
        target = export_run(folder.path, [str(name) for name in formats or []], tell=typer.echo, push_to=push_to_hub)
    typer.echo(f"{target / 'README.md'} says how to load each.")


@app.command()
def report(run: RunArgument) -> None:
    """Write report.html of a run, one self-contained page; of what is there so far, also while it trains."""
    from diffopd.run_folder import RunFolder

    path = RunFolder.open(run).path
    from diffopd.report import write_report

    typer.echo(write_report(path))


@app.command()
def teachers() -> None:
    """List the shipped teachers and recipes."""
    from diffopd.data import read_prompts
    from diffopd.locate import recipe_names, shelf, teacher_names, tune_recipe_names
    from diffopd.teacher import teacher_card

    for name in teacher_names():
        card = teacher_card(name, shelf("teachers"))
        train, test = (len(read_prompts(path)) for path in (card.prompts.train, card.prompts.test))
        typer.echo(
            f"{name}\n    {card.form} on {card.base}\n    guidance {card.guidance_scale:g}, "
            f"{card.num_inference_steps} steps, {train} prompts to train, {test} to test\n    license: {card.license}"
        )
    typer.echo(f"\nrecipes: {', '.join(recipe_names())}\ntuning recipes: {', '.join(tune_recipe_names())}")


def _show_scores(file: Path, model: str | None = None) -> None:
    """A table of 80 columns; model: of this one alone."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("model", "steps", "guidance", "task", "score", "95 %", "of teacher"):
        table.add_column(title, no_wrap=True)
    for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
        if model not in (None, row["model"]):
            continue
        low, high = row["interval"]
        share = f"{row['ratio']['value']:.2f}" if "ratio" in row else ""
        settings = (str(row["num_inference_steps"]), f"{row['guidance_scale']:g}")
        table.add_row(row["model"], *settings, row["task"], f"{row['score']:.3f}", f"{low:.2f}-{high:.2f}", share)
    Console().print(table)


def _options(overrides: list[str] | None, output_dir: Path | None) -> list[str]:
    return list(overrides or []) + ([f"output_dir={json.dumps(str(output_dir))}"] if output_dir else [])


@contextmanager
def _at_work(folder: Path | str, kept: str = "") -> Iterator[int | None]:
    """A checked run folder, this process's own while open; those that work for another process have its lock.

    Ctrl-C that nothing else has taken, and a full disk, are told with what of the run stands, or with `kept`.
    """
    from diffopd.disk import DiskError, is_full, reason
    from diffopd.launch import LAUNCHED
    from diffopd.lock import at_work
    from diffopd.run_folder import RunFolder

    held = RunFolder.at(folder)
    is_guest = LAUNCHED in os.environ or not _is_main()
    warn = partial(typer.secho, fg=typer.colors.YELLOW, err=True)
    try:
        with nullcontext() if is_guest else at_work(held.path, warn) as lock:
            yield lock
    except KeyboardInterrupt as error:
        raise _interrupted(kept or held.kept()) from error
    except DiskError as error:
        told = kept or held.kept()
        raise (error if told in str(error) else UserError(f"{error} {told}")) from error
    except Exception as error:
        if isinstance(error, UserError) or not is_full(error):
            raise
        raise UserError(
            f"{held.path}: the disk takes no more ({reason(error)}). Make room on it. {kept or held.kept()}"
        ) from error


def _interrupted(kept: str) -> typer.Exit:
    """How a command that Ctrl-C ended exits; the first process says so."""
    if _is_main():
        typer.secho(f"\nInterrupted. {kept}", fg=typer.colors.YELLOW, err=True)
    return typer.Exit(130)


def _train(recipe: Any, processes: int, lock: int | None, begin: Any = None) -> None:
    """Check a recipe, run it to its end in this many processes, evaluate, export, report."""
    from diffopd.preflight import check, try_rewards
    from diffopd.run_folder import has_begun

    _quiet_libraries()
    parts = check(recipe, hash_weights=True)
    count = int(os.environ.get("WORLD_SIZE", processes))
    if _is_finished(recipe, parts.hashes, count):
        return
    if _scores_here(count) and not has_begun(Path(recipe.output_dir)):
        try_rewards(parts)
    folder = _run_folder(recipe, parts.hashes, count)
    if count > 1 and "WORLD_SIZE" not in os.environ:
        from diffopd.launch import launch

        raise typer.Exit(launch(count, sys.argv[1:], lock))
    from diffopd.distill import distill as train

    ended = train(recipe, folder, begin)
    if not ended:
        raise typer.Exit(130)  # as shells say of a command that Ctrl-C ended
    if _is_main():
        _finish(folder.path)


def _show_plan(recipe: Any, processes: int) -> None:
    from rich.console import Console

    from diffopd.plan import make_plan, render
    from diffopd.preflight import check

    _quiet_libraries()
    Console().print(render(make_plan(check(recipe), processes)))


def _check_folder(recipe: Any, processes: int) -> None:
    """Refuse after a plan the output folder that the run would refuse, as far as that is known without hashes."""
    from diffopd.run_folder import RunFolder

    RunFolder.check(recipe.output_dir, recipe, {}, processes)


def _show_facts(lines: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    for name, value in lines:
        table.add_row(name, Text(value))  # a path may have brackets, which are markup to rich
    if _is_main():
        Console().print(table)


def _run_folder(recipe: Any, hashes: dict[str, str], processes: int) -> Any:
    """The main process checks and makes the folder; the others, if any, only know its path."""
    from diffopd.run_folder import RunFolder

    path = Path(recipe.output_dir)
    return RunFolder.create(path, recipe, hashes, processes) if _is_main() else RunFolder(path)


def _is_finished(recipe: Any, hashes: dict[str, str], processes: int) -> bool:
    """Whether this very run was brought to its end before; says so then. Refuses another recipe's folder."""
    from diffopd.run_folder import RunFolder

    path = Path(recipe.output_dir)
    if not RunFolder(path).is_finished(recipe):
        return False
    RunFolder.check(path, recipe, hashes, processes)
    if _is_main():
        longer = "raise train.max_train_steps or train.max_train_seconds"
        if recipe.train.lr_scheduler != "constant":
            longer = f"begin anew with --output-dir (its {recipe.train.lr_scheduler} schedule has run out)"
        typer.echo(
            f"{path} is finished and nothing has changed: {path / 'report.html'} shows what was learnt; "
            f"{path / 'export'} loads in stock diffusers. To train longer, {longer}; "
            "`diffopd evaluate`, `export` and `report` make their part again."
        )
    return True


def _finish(run: Path) -> None:
    from diffopd.evaluate import evaluate_run
    from diffopd.export import export_run
    from diffopd.report import write_report
    from diffopd.run_folder import RunFolder

    collapsed = RunFolder.open(run).collapsed()
    try:
        _show_scores(evaluate_run(run), "student")
        if not collapsed:
            export_run(run, tell=typer.echo)
    except UserError as error:
        again = ", ".join(f"`diffopd {part} {run}`" for part in ("evaluate", "export", "report"))
        raise UserError(f"{error} The training is done and saved: mend this, then {again}.") from error
    write_report(run)
    if collapsed:
        raise UserError(
            f"Not exported: {collapsed}. {run / 'report.html'} shows it. Begin anew with another setting and "
            f"--output-dir; `diffopd export {run}` would export what there is all the same."
        )
    RunFolder.open(run).finish()
    typer.echo(f"Done: {run / 'report.html'} shows what was learnt; {run / 'export'} loads in stock diffusers.")


def _is_main() -> bool:
    """Whether this is the only or the first of the processes that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _scores_here(count: int) -> bool:
    """Whether this is the first of the `count` processes that train, not one that only starts them."""
    return _is_main() and (count == 1 or "WORLD_SIZE" in os.environ)


def _quiet_libraries() -> None:
    """Progress bars and notes of the libraries stay off; ours say what happens."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for logging in (of_diffusers, of_transformers):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(app())
