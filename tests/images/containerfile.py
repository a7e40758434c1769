"""Rules that every Containerfile here obeys, and a reader simple enough to trust."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOOLS = (
    "build-essential binutils clang cmake cpp g++ gcc gfortran git make ninja-build pip python3-dev python3-pip "
    "python3-venv rustc /opt/tools/bin/pip"
)
_ADDRESS = re.compile(r"\w+://|\b(?:[a-z0-9-]+\.)+(?:com|dev|io|net|org)(?=[/:])")
_SECRET = re.compile(r"^(?:ARG|ENV) .*\b\w*(?:TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL|API_KEY)\w*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, continuation lines joined."""

    name: str
    rest: str
    stage: int


def read_instructions(text: str) -> list[Instruction]:
    """The instructions, each with the number of its stage (0 before the first FROM)."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found: list[Instruction] = []
    stage = 0
    for line in filter(None, (line.strip() for line in joined.splitlines())):
        name, _, rest = line.partition(" ")
        stage += name == "FROM"
        found.append(Instruction(name, rest.strip(), stage))
    return found


def lint(text: str) -> list[str]:
    """What is wrong with a Containerfile; nothing, if nothing is."""
    instructions = read_instructions(text)
    last = [i for i in instructions if i.stage == instructions[-1].stage]
    return [*_everywhere(instructions), *_final_stage(last)]


def _everywhere(instructions: list[Instruction]) -> Iterator[str]:
    for i in instructions:
        line = f"{i.name} {i.rest}"
        if i.name == "ADD":
            yield f"ADD may fetch and unpack; use COPY: {line}"
        if i.name != "HEALTHCHECK" and _ADDRESS.search(line):
            yield f"an address: {line}"
        if _SECRET.match(line):
            yield f"a secret would stay in the history: {line}"
        if (
            i.name == "COPY"
            and "--from" not in i.rest
            and re.search(r"(?:^|\s)(?:/etc|~|\.\./)", i.rest.rsplit(" ", 1)[0])
        ):
            yield f"a file of the host: {line}"
        if i.name == "RUN" and "apt-get install" in i.rest and "--no-install-recommends" not in i.rest:
            yield f"recommended packages come along: {line}"
        if i.name == "RUN" and re.search(r"\bpip\b", i.rest) and not _is_locked(i.rest):
            yield f"pip without a lock: {line}"


def _is_locked(run: str) -> bool:
    return "--no-deps" in run and ("--require-hashes" in run or "--no-index" in run)


def _final_stage(stage: list[Instruction]) -> Iterator[str]:
    by_name = {i.name: i.rest for i in stage}
    user = by_name.get("USER", "0").split(":")[0]
    if not user.isdigit() or int(user) < 1000:
        yield f"the user must be an unprivileged number, not '{user}'"
    if not re.match(r"(?:--\S+\s+)*CMD ", by_name.get("HEALTHCHECK", "")):
        yield "there is no health check"
    if not by_name.get("ENTRYPOINT", "").startswith("["):
        yield "ENTRYPOINT in exec form is missing; in shell form signals would not arrive"
    for i in stage:
        words = set(re.split(r"[\s;&|]+", i.rest)) if i.name == "RUN" else set[str]()
        if tools := words & set(_TOOLS.split()):
            yield f"tools of the build stage in the image: {', '.join(sorted(tools))}"
