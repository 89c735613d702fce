"""The command ``python -m bilevel.compare module:factory``."""

import argparse
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bilevel.compare.comparison import compare_solvers
from bilevel.compare.report import check_folder

_PROGRAM = "python -m bilevel.compare"
_DESCRIPTION = """\
Compare the solvers of a hypergradient's linear system on a problem of one's own: error against products and time, first
and later right-hand sides, eigenvalues, the noise of the batches, and advice in words.

The factory takes no argument and returns the arguments of bilevel.compare.compare_solvers in a dictionary:

  def make():
      return {"problem": ..., "upper": ..., "lower": ..., "upper_batches": [...], "lower_batches": [...]}
"""
_NEEDED = ("problem", "upper", "lower", "upper_batches", "lower_batches")


class SpecificationError(ValueError):
    """What was named on the command line, or what it made, cannot be compared."""


def main(arguments: list[str] | None = None) -> int:
    """Compare, print, and keep the report where that is asked for; the exit code, 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        if options.out is not None:
            check_folder(options.out, overwrite=options.force, remedy="give --force")
        case = make_case(options.factory)
        if options.seconds is not None:
            case = {**case, "seconds": options.seconds}
        report = _called("compare_solvers", lambda: compare_solvers(**case))
        print(report)
        if options.out is not None:
            for path in report.save(options.out, overwrite=options.force):
                print(path)
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except (SpecificationError, ValueError, OSError) as error:
        print(f"{_PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    return 0


def make_case(specification: str) -> dict[str, Any]:
    """What the factory ``module:name`` makes, the arguments of `compare_solvers`.

    Raises:
        SpecificationError: no such module or name, one that cannot be called, or one that makes something else.
    """
    module_name, colon, name = specification.partition(":")
    if not colon or not module_name or not name or module_name.endswith(".py") or "/" in module_name:
        raise SpecificationError(
            f"the problem is named as module:factory, such as my_problem:make for the function make in my_problem.py "
            f"of this folder; got {specification!r}"
        )
    factory = getattr(_module(module_name), name, None)
    if not callable(factory):
        raise SpecificationError(
            f"{module_name} has no function {name!r}; name one that takes no argument and returns a dictionary with "
            f"{', '.join(_NEEDED)}"
        )
    made = _called(specification, factory)
    if not isinstance(made, Mapping):
        raise SpecificationError(
            f"{specification} returned a {type(made).__name__}; it must return a dictionary with {', '.join(_NEEDED)}"
        )
    known = list(inspect.signature(compare_solvers).parameters)
    missing, unknown = [n for n in _NEEDED if n not in made], [n for n in made if n not in known]
    if missing or unknown:
        wrong = " and ".join(
            [f"has no {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(map(repr, unknown))}"] * bool(unknown)
        )
        raise SpecificationError(
            f"the dictionary of {specification} {wrong}; its keys are the arguments of compare_solvers: "
            f"{', '.join(known)}"
        )
    return dict(made)


def _module(name: str) -> Any:
    # As for `python -m`, the present folder comes first.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise SpecificationError(f"there is no module {name}, neither in this folder nor installed") from error
        raise SpecificationError(f"importing {name} failed: {error}{_place(error)}") from error
    except Exception as error:  # Whatever a module of the user's does.
        raise SpecificationError(f"importing {name} failed: {_shown(error)}{_place(error)}") from error


def _called(what: str, function: Callable[[], Any]) -> Any:
    """What the function returns; what it raises, in one sentence with the place."""
    try:
        return function()
    except Exception as error:  # Whatever a factory or an objective of the user's does.
        raise SpecificationError(f"{what} failed: {_shown(error)}{_place(error)}") from error


def _shown(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _place(error: Exception) -> str:
    """Where in the user's own files it was raised."""
    package = str(Path(__file__).resolve().parents[1])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _foreign(frame.filename, package)]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _foreign(filename: str, package: str) -> bool:
    return filename.startswith((package, "<")) or "site-packages" in filename or filename.startswith(sys.base_prefix)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("factory", metavar="module:factory", help="a function that makes the problem and its batches")
    parser.add_argument("--seconds", type=float, help="a budget of time (default: the factory's, else 60)")
    parser.add_argument("--out", metavar="FOLDER", help="write report.md, curves.json and picture.svg into this folder")
    parser.add_argument("--force", action="store_true", help="replace a report that is in the folder already")
    return parser
