"""The command line. Heavy libraries are imported inside the commands, so that help answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from diffopd import __version__
from diffopd.errors import UserError


class Commands(TyperGroup):
    """Commands whose user errors are shown in red without a traceback, exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error


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
    from diffopd.preflight import check
    from diffopd.recipe import read_recipe

    options = list(overrides or []) + ([f"output_dir={json.dumps(str(output_dir))}"] if output_dir else [])
    read = read_recipe(recipe, options)
    _quiet_libraries()
    parts = check(read, hash_weights=not dry_run)
    if dry_run:
        _show_plan(parts)
        return
    count = int(os.environ.get("WORLD_SIZE", processes))
    folder = _run_folder(read, parts.hashes, count)
    if count > 1 and "WORLD_SIZE" not in os.environ:
        from diffopd.launch import launch

        raise typer.Exit(launch(count, sys.argv[1:]))
    from diffopd.distill import distill as train

    ended = train(read, folder)
    if not ended:
        raise typer.Exit(130)  # as shells say of a command that Ctrl-C ended
    if _is_main():
        _finish(folder.path)


@app.command()
def teach(
    teacher: Annotated[str, typer.Argument(help="A shipped teacher, a teacher's folder, or a .toml file in one.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override, such as train.batch_size=8."),
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Run folder (default: runs/teach-NAME).")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Share the pictures of each update among processes.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved plan and stop.")] = False,
    write: Annotated[
        bool, typer.Option("--write", help="At the end put the weights, and their sha256, into the teacher's folder.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With --write: replace weights there.")] = False,
) -> None:
    """Make the weights that a teacher's folder describes (teach.toml), from pictures or from a reward."""
    from diffopd.teach_check import check_teach, render_teach
    from diffopd.teach_recipe import read_teach_recipe
    from diffopd.teach_write import check_writable, write_weights

    if overwrite and not write:
        raise UserError("--overwrite has no effect without --write. Give both, or neither.")
    options = list(overrides or []) + ([f"output_dir={json.dumps(str(output_dir))}"] if output_dir else [])
    read = read_teach_recipe(teacher, options)
    _quiet_libraries()
    if write:
        check_writable(read, overwrite=overwrite)
    found = check_teach(read, hash_weights=not dry_run)
    if dry_run:
        from rich.console import Console

        Console().print(render_teach(found))
        return
    count = int(os.environ.get("WORLD_SIZE", processes))
    folder = _run_folder(read, found.hashes, count)
    if count > 1 and "WORLD_SIZE" not in os.environ:
        from diffopd.launch import launch

        raise typer.Exit(launch(count, sys.argv[1:]))
    from diffopd.teach import teach as train

    if not train(read, folder):
        raise typer.Exit(130)
    if _is_main():
        made = write_weights(read, folder, overwrite=overwrite) if write else folder.latest_checkpoint()
        typer.echo(f"Done: the teacher's weights are in {made}.")


@app.command()
def evaluate(
    run: RunArgument,
    everything: Annotated[
        bool, typer.Option("--all", help="Measure base and teachers too, instead of taking their cards' scores.")
    ] = False,
) -> None:
    """Score base, teachers and student of a run again, on the same prompts and seeds."""
    from diffopd.run_folder import RunFolder

    path = RunFolder.open(run).path
    _quiet_libraries()
    from diffopd.evaluate import evaluate_run

    scores = evaluate_run(path, everything=everything)
    _show_scores(scores)


@app.command()
def export(run: RunArgument) -> None:
    """Write the student of a run as a stock diffusers folder and as LoRA, reloaded and compared."""
    from diffopd.run_folder import RunFolder

    path = RunFolder.open(run).path
    _quiet_libraries()
    from diffopd.export import export_run

    typer.echo(f"{export_run(path)}: a stock diffusers folder and, for a LoRA student, its LoRA; both were reloaded.")


@app.command()
def report(run: RunArgument) -> None:
    """Write report.html of a run, one self-contained page."""
    from diffopd.run_folder import RunFolder

    path = RunFolder.open(run).path
    from diffopd.report import write_report

    typer.echo(write_report(path))


@app.command()
def teachers() -> None:
    """List the shipped teachers and recipes."""
    from rich.console import Console
    from rich.table import Table

    from diffopd.data import read_prompts
    from diffopd.locate import recipe_names, shelf, teacher_names
    from diffopd.teacher import teacher_card

    table = Table("teacher", "form", "base", "guidance", "steps", "prompts (train, test)", "license", box=None)
    for name in teacher_names():
        card = teacher_card(name, shelf("teachers"))
        prompts = ", ".join(str(len(read_prompts(path))) for path in (card.prompts.train, card.prompts.test))
        numbers = (f"{card.guidance_scale:g}", str(card.num_inference_steps))
        table.add_row(name, card.form, card.base, *numbers, prompts, card.license)
    console = Console()
    console.print(table)
    console.print(f"\nrecipes: {', '.join(recipe_names())}")


def _show_scores(file: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("model", "steps", "cfg", "task", "score", "95 %", "of teacher"):
        table.add_column(title, no_wrap=True)
    for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
        low, high = row["interval"]
        share = f"{row['ratio']['value']:.2f}" if "ratio" in row else ""
        settings = (str(row["num_inference_steps"]), f"{row['guidance_scale']:g}")
        table.add_row(row["model"], *settings, row["task"], f"{row['score']:.3f}", f"{low:.2f} to {high:.2f}", share)
    Console().print(table)
    typer.echo(f"\n{file}")


def _show_plan(parts: Any) -> None:
    from rich.console import Console

    from diffopd.plan import make_plan, render

    Console().print(render(make_plan(parts)))


def _run_folder(recipe: Any, hashes: dict[str, str], processes: int) -> Any:
    """The main process checks and makes the folder; the others, if any, only know its path."""
    from diffopd.run_folder import RunFolder

    path = Path(recipe.output_dir)
    return RunFolder.create(path, recipe, hashes, processes) if _is_main() else RunFolder(path)


def _finish(run: Path) -> None:
    from diffopd.evaluate import evaluate_run
    from diffopd.export import export_run
    from diffopd.report import write_report

    evaluate_run(run)
    export_run(run)
    write_report(run)
    typer.echo(f"Done: {run / 'report.html'} shows what was learnt; {run / 'export'} loads in stock diffusers.")


def _is_main() -> bool:
    """Whether this is the only or the first of the processes that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


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
