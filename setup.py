"""What pyproject.toml cannot say: which folders are packages (`recipes` is installed as `bilevel.recipes`), and how the
README reads away from the files beside it."""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def standalone(readme: str, release: str | None) -> str:
    """The README with each link to a file of the checkout led to `release`, the address of these files, or without one
    replaced by the link's text and the file's name."""

    def replaced(link: re.Match[str]) -> str:
        text, target = link.groups()
        if release:
            return f"[{text}]({release}/{target})"
        file = target.partition("#")[0]
        return text if text == file else f"{text} [{file}]"

    return re.sub(r"\[([^\]]+)\]\((?![a-z]+:)([^)\s]+)\)", replaced, readme)


project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
source = project["urls"].get("Source")

setup(
    packages=[
        *find_packages(include=["bilevel", "bilevel.*"]),
        *(f"bilevel.recipes.{name}" for name in find_packages("recipes")),
    ],
    package_dir={"bilevel.recipes": "recipes"},
    long_description=standalone(
        (HERE / "README.md").read_text(encoding="utf-8"), source and f"{source}/blob/v{project['version']}"
    ),
    long_description_content_type="text/markdown",
)
