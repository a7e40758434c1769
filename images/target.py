"""The table of hardware targets that images are built for."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edge.errors import ConfigError, RecipeError

TARGETS_FILE = Path(__file__).with_name("targets.toml")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")

Line = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]+\Z")]
ImageName = Annotated[str, msgspec.Meta(max_length=255, pattern=r"^[a-z0-9][a-z0-9._:/@-]*\Z")]
# They travel through a shell variable and CMake's own splitting at blanks, so nothing in them may need quoting.
CMakeOption = Annotated[str, msgspec.Meta(max_length=200, pattern=r"^-D[A-Z][A-Z0-9_]*=[A-Za-z0-9_./+-]*\Z")]


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A named build profile: one row of ``images/targets.toml``.

    Attributes:
        containerfile: The recipe's path, relative to the root of the project.
        base: Base image in a registry.
        suite: Debian suite of the base; what it is made from where no registry is in reach.
        smoke_model: The model that a finished image is tried with.
        max_compressed_mb: Upper limit of the layers as a registry holds them (gzip), without a model; megabytes.
    """

    summary: Line
    containerfile: Annotated[str, msgspec.Meta(pattern=r"^images/[a-z0-9_-]+/Containerfile\Z")]
    base: ImageName
    suite: Annotated[str, msgspec.Meta(pattern=r"^[a-z]{2,20}\Z")]
    architecture: Literal["amd64", "arm64"]
    accelerator: Literal["cpu"]
    cmake_args: Annotated[tuple[CMakeOption, ...], msgspec.Meta(max_length=64)]
    smoke_model: Line
    max_compressed_mb: Annotated[int, msgspec.Meta(gt=0, le=10_000)]


def parse_targets(text: str, *, what: str = "targets.toml") -> Mapping[str, Target]:
    """The targets in `text`, by name, in its order.

    Raises:
        ConfigError: Not TOML, an unknown or missing key, or a value that breaks its rule.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{what} is not TOML: {e}.") from e
    return {_check_name(name, what): _read_row(name, row, what) for name, row in table.items()}


def _check_name(name: str, what: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{what}: '{name}' is no name of a target.", hint="Use a-z, 0-9, '-', '_' and '.'.")
    return name


def _read_row(name: str, row: object, what: str) -> Target:
    try:
        return msgspec.convert(row, type=Target)
    except msgspec.ValidationError as e:
        raise ConfigError(f"{what}: the target '{name}' cannot be used: {e}.") from e


@cache
def load_targets(path: Path = TARGETS_FILE) -> Mapping[str, Target]:
    """The targets of the table that comes with this version."""
    return parse_targets(path.read_text("utf-8"), what=str(path))


def get_target(name: str) -> Target:
    """One target by name.

    Raises:
        RecipeError: There is no such target.
    """
    targets = load_targets()
    if name not in targets:
        raise RecipeError(f"There is no target '{name}'.", hint=f"Targets: {', '.join(targets)}.")
    return targets[name]
