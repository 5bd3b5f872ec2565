"""``python -m minicpm_lite.lab.press``: run stale notebooks, check gates, write students' copies, grade."""

import argparse
import sys
from pathlib import Path

from .execute import run
from .gates import problems
from .grade import SECONDS, grade, table, write_csv
from .nbgrader import nbgrader_copy
from .notebook import find
from .student import student_copy, write_student_copies


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks for; 0 if all went well."""
    parser = argparse.ArgumentParser(
        prog="python -m minicpm_lite.lab.press", description="Care for the book's notebooks."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser(
        "run", help="run the notebooks whose outputs are stale, in place, side by side"
    )
    runs.add_argument("--force", action="store_true", help="run the others too")
    checks = commands.add_parser("check", help="print everything that keeps a notebook from being committed")
    students = commands.add_parser("student", help="write copies without solutions and outputs")
    students.add_argument("out", type=Path, metavar="OUT", help="the folder to write to")
    students.add_argument("--nbgrader", action="store_true", help="with the marks of an nbgrader assignment")
    grades = commands.add_parser("grade", help="grade students' notebooks by the checks, shut in (Linux)")
    grades.add_argument(
        "folder", type=Path, metavar="FOLDER", help="the submissions, with folders in it or not"
    )
    grades.add_argument("--csv", type=Path, metavar="FILE", help="write verdicts, points and messages to it")
    grades.add_argument("--seconds", type=int, default=SECONDS, help="for each answer (default: %(default)s)")
    for command in (runs, checks, students, grades):
        command.add_argument(
            "notebooks",
            nargs="*",
            type=Path,
            default=[Path("notebooks")],
            metavar="NOTEBOOK",
            help="a notebook, or a folder of them (default: notebooks)",
        )
    options = parser.parse_args(arguments)
    try:
        paths = find(options.notebooks)
        if options.command == "run":
            return 0 if run(paths, options.force) else 1
        if options.command == "check":
            found = [f"{path}: {problem}" for path in paths for problem in problems(path)]
            print(
                "\n".join(found) or f"No problems in {len(paths)} notebook{'s' if len(paths) != 1 else ''}."
            )
            return 1 if found else 0
        if options.command == "grade":
            if options.csv and options.csv.is_dir():  # said before minutes of grading
                raise FileExistsError(f"--csv is {options.csv}, a folder; give the name of a file.")
            found = grade(options.folder, paths, options.seconds)
            print(table(found))
            if options.csv:
                write_csv(found, options.csv)
            return 0
        made = nbgrader_copy if options.nbgrader else student_copy
        for path in write_student_copies(paths, options.out, made):
            print(path)
        return 0
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
