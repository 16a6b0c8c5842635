"""README's table of pipeline families, made of the results of two files of tests. Run it after changing them.

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
CONTRACT = ("test_families.py", "test_export_families.py")
BEGIN, END = "<!-- families -->", "<!-- /families -->"
COLUMNS = {  # column -> the words that its tests' names contain
    "driven": ("driven_call", "surveyed_shape", "idle_denoiser"),
    "taught": ("held_teacher", "equal_to_the_student", "guidance_on_one_side", "streaming", "twenty_updates"),
    "bf16": ("bf16_weights", "autocast"),
    "LoRA": ("exported_lora", "own_lora_is_read_back"),
    "export": ("exported_folder", "every_form_of_a_family"),
}
Results = dict[tuple[str, str], bool]  # (family, column) -> whether all of its tests passed


def read_results(files: list[Path]) -> Results:
    """The contract's outcome in JUnit files, of a test that is in several the last; untested pairs are absent."""
    cases = [case for file in files for case in ElementTree.parse(file).iter("testcase")]
    failed = ("failure", "error", "skipped")
    return results_of({c.attrib["name"]: not any(child.tag in failed for child in c) for c in cases})


def results_of(outcomes: dict[str, bool]) -> Results:
    """The contract's outcome from those of its tests, name with parameters -> whether it passed; skipped is failed.

    Results of tests that have been renamed or removed since count for nothing.
    """
    from families import FAMILIES, REFUSED

    names = sorted([*FAMILIES, *REFUSED], key=len, reverse=True)
    contract = "".join((ROOT / "tests" / name).read_text(encoding="utf-8") for name in CONTRACT)
    passed = defaultdict(list)
    for full_name, outcome in outcomes.items():
        title, _, identity = full_name.partition("[")
        if f"def {title}(" not in contract:
            continue
        family = next((name for name in names if identity.removesuffix("]").startswith(name)), None)
        for column, words in COLUMNS.items():
            if family and any(word in title for word in words):
                passed[family, column].append(outcome)
        if family in REFUSED and "cannot_be_taught" in title:
            passed[family, "taught"].append(outcome)
    return {pair: all(outcomes) for pair, outcomes in passed.items()}


def differences(results: Results, readme: str) -> list[str]:
    """The rows that these results make and README does not have, and those that it has instead."""
    made = block(results).splitlines()
    found = re.search(f"{BEGIN}.*{END}", readme, re.DOTALL)
    there = found.group(0).splitlines() if found else []
    lines = [f"missing: {line}" for line in made if line not in there]
    return lines + [f"not a result: {line}" for line in there if line not in made]


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
    parser.add_argument("--results", type=Path, nargs="+", help=f"JUnit files of {' and '.join(CONTRACT)}")
    files = parser.parse_args().results
    with tempfile.TemporaryDirectory() as folder:
        if files is None:
            files = [Path(folder) / "results.xml"]
            tests = [f"tests/{name}" for name in CONTRACT]
            command = [sys.executable, "-m", "pytest", *tests, f"--junitxml={files[0]}"]
            subprocess.run(command, cwd=ROOT, check=False)  # a failing test is a cell of the table
        table = block(read_results(files))
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if not re.search(f"{BEGIN}.*{END}", text, re.DOTALL):
        sys.exit(f"README.md has no {BEGIN} ... {END}: put the two markers where the table belongs.")
    readme.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: table, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
