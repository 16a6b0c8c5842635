"""README's table of pipeline families, made of the results of tests/test_families.py. Run it after changing either.

Usage: scripts/families_table.py [--results JUNIT.xml ...]   (without files it runs the tests first)
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
BEGIN, END = "<!-- families -->", "<!-- /families -->"
COLUMNS = {  # column -> the words that its tests' names contain
    "driven": ("driven_call", "surveyed_shape", "idle_denoiser"),
    "taught": ("held_teacher", "equal_to_the_student", "guidance_on_one_side", "streaming", "twenty_updates"),
    "bf16": ("bf16_weights", "autocast"),
    "LoRA": ("exported_lora",),
    "export": ("exported_folder",),
}
Results = dict[tuple[str, str], bool]  # (family, column) -> whether all of its tests passed


def read_results(files: list[Path]) -> Results:
    """The contract's outcome in JUnit files, of a test that is in several the last; untested pairs are absent.

    Results of tests that have been renamed or removed since count for nothing.
    """
    from families import FAMILIES, REFUSED

    names = sorted([*FAMILIES, *REFUSED], key=len, reverse=True)
    contract = (ROOT / "tests" / "test_families.py").read_text(encoding="utf-8")
    passed = defaultdict(list)
    cases = {case.attrib["name"]: case for file in files for case in ElementTree.parse(file).iter("testcase")}
    for full_name, case in cases.items():
        title, _, identity = full_name.partition("[")
        if f"def {title}(" not in contract:
            continue
        family = next((name for name in names if identity.removesuffix("]").startswith(name)), None)
        outcome = not any(child.tag in ("failure", "error", "skipped") for child in case)
        for column, words in COLUMNS.items():
            if family and any(word in title for word in words):
                passed[family, column].append(outcome)
        if family in REFUSED and "cannot_be_taught" in title:
            passed[family, "taught"].append(outcome)
    return {pair: all(outcomes) for pair, outcomes in passed.items()}


def all_passed() -> Results:
    """The results of a green run."""
    from families import FAMILIES, REFUSED

    green = {(row.name, column): True for row in FAMILIES.values() for column in COLUMNS}
    for row in FAMILIES.values():
        if not row.targets:
            del green[row.name, "LoRA"]
    return green | {(name, "taught"): True for name in REFUSED}


def block(results: Results) -> str:
    """The table between its markers."""
    from families import FAMILIES, REFUSED

    head = ["family", "path", "denoiser", "guidance forms", *COLUMNS, "note"]
    lines = [BEGIN, f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(_cells(row, results))} |" for row in (*FAMILIES.values(), *REFUSED.values())]
    return "\n".join([*lines, END])


def _cells(row, results: Results) -> list[str]:
    from family_cast import cast_of

    from diffopd.drive import denoiser_of

    cast = cast_of(row.name)
    facts = [row.name, cast.survey.place.path.name, type(denoiser_of(cast.pipeline)).__name__, "; ".join(row.forms)]
    words = {True: "refused" if row.refusal else "yes", False: "**fails**", None: "-"}
    return [*facts, *(words[results.get((row.name, column))] for column in COLUMNS), row.note]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, nargs="+", help="JUnit files of tests/test_families.py")
    files = parser.parse_args().results
    with tempfile.TemporaryDirectory() as folder:
        if files is None:
            files = [Path(folder) / "results.xml"]
            command = [sys.executable, "-m", "pytest", "tests/test_families.py", f"--junitxml={files[0]}"]
            subprocess.run(command, cwd=ROOT, check=False)  # a failing test is a cell of the table
        table = block(read_results(files))
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if not re.search(f"{BEGIN}.*{END}", text, re.DOTALL):
        sys.exit(f"README.md has no {BEGIN} ... {END}: put the two markers where the table belongs.")
    readme.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: table, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
