"""Subcommands of ``bissl`` besides the stages: one module each, with ``main(arguments) -> exit code``.

`arguments` are those after the subcommand's name. What is wrong with them, with data or with a run is raised as
ConfigError, DataError or ArtifactError; `main.py` prints the message and ends with exit code 2.
"""
