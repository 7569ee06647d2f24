"""Data and models that come inside packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from molora.errors import UserError


def package_folder(module: str, requirement: str, *pip_options: str) -> Path:
    """Where the installed package that provides ``module`` lies, without importing it.

    ``requirement`` is ``name==version``, exactly: what is prepared must be the same bytes everywhere. Raises
    :class:`UserError` with the command that installs it, if it is missing or has another version.
    """
    name, _, wanted = requirement.partition("==")
    command = " ".join(["pip install", *pip_options, requirement])
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {name} is not installed; install it with: {command}")
    found = importlib.metadata.version(name)
    if found != wanted:
        raise UserError(f"the package {name} has version {found}, {wanted} is needed; install it with: {command}")
    return Path(spec.submodule_search_locations[0])
