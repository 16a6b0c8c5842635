"""The papers' claims on the embedded world: runs, tables and plots.

    python scripts/reproduce.py --claims 1,2,3,4,5 --seeds 0,1,2 --output runs/reproduce
    python scripts/reproduce.py --quick --results quick-results    does everything run? (two updates of two pictures)
    python scripts/reproduce.py --list                             the commands that would be run

The same command goes on where it was: finished runs and scores are kept, an unfinished run is resumed. Pages go to
docs/results, with the command, seeds, versions and machine that made them. Claims: 1 methods, 2 gradients, 3 choices
(3-solvers: the part without training), 4 fine-tuning (300 updates, whatever --seconds says), 5 teachers from rewards
(5-kl: GRPO's optimizer steps and its KL, one at a time).
"""

from pathlib import Path
from typing import Annotated

import typer
from reproduce_claims import CLAIMS
from reproduce_pages import check_plotting, given_arguments, made_by, write
from reproduce_runs import Setup
from reproduce_scores import Scorer, quiet

from diffopd.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def main(
    claims: Annotated[str, typer.Option(help="which, with commas")] = "1,2,3,4,5",
    seeds: Annotated[str, typer.Option(help="with commas")] = "0,1,2",
    seconds: Annotated[float, typer.Option(help="of training, of every method and seed")] = 600.0,
    prompts: Annotated[int, typer.Option(help="held-out prompts of a task")] = 150,
    output: Annotated[Path, typer.Option(help="folder of runs and scores")] = Path("runs/reproduce"),
    results: Annotated[Path, typer.Option(help="folder of the pages")] = ROOT / "docs" / "results",
    trained_on: Annotated[str, typer.Option(help="the machine of the trainings, for the page, if not this one")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="tiny settings: does everything run?")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="trainings at a time, each with one thread (claims 1, 3, 5)")] = 1,
    any_seconds: Annotated[bool, typer.Option("--any-seconds", help="runs that ended count, however long")] = False,
    listing: Annotated[bool, typer.Option("--list", help="print the commands and stop")] = False,
) -> None:
    """Run what is not finished, then write the pages."""
    asked = claims.split(",")
    for claim in asked:
        if claim not in CLAIMS:
            raise typer.BadParameter(f"--claims {claim!r}; there are {', '.join(CLAIMS)}")
    if quick and results.resolve() == ROOT / "docs" / "results":
        raise typer.BadParameter("--quick measures nothing: give another --results than docs/results")
    setup = Setup(
        output, tuple(map(int, seeds.split(","))), seconds, prompts, quick, listing, jobs, any_seconds=any_seconds
    )
    quiet()
    if not listing:
        check_plotting()
        output.mkdir(parents=True, exist_ok=True)
    scorer = Scorer(setup)
    for claim in asked:
        page = CLAIMS[claim](setup, scorer)
        if page:
            print(write(page, results, made_by(given_arguments(), setup.seeds, trained_on)))


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        raise SystemExit(f"Error: {error}") from error
