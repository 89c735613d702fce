"""Which folders are packages: `recipes` is installed as `bilevel.recipes`. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["bilevel", "bilevel.*"]),
        *(f"bilevel.recipes.{name}" for name in find_packages("recipes")),
    ],
    package_dir={"bilevel.recipes": "recipes"},
)
