"""Whether a chat template works and does no harm, found out in a process of its own.

Templates come from anywhere. Jinja's sandbox keeps them from Python, not from taking all memory or running for ever,
and constant expressions are computed while it compiles: so nothing that is to go on serving compiles an unknown one.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass

from edge.errors import ToolMissing

TIMEOUT_S = 20.0
"""For the process with its start; the template itself has much less."""
MAX_TEMPLATE_BYTES = 1 << 20
UNFIT, HARMFUL = 3, 4
"""Exit codes of the process: it refuses a conversation, or is not to be let near a server. Its words are on stdout."""


@dataclass(frozen=True, slots=True)
class TemplateFault:
    """What is wrong with a chat template."""

    reason: str
    """As the end of a sentence about it."""
    is_harmful: bool
    """It does not compile, reaches for Python, or takes too much; otherwise it only refuses a plain conversation."""


def digest_of(template: str) -> str:
    """What pins a template in a manifest: its digest as the store writes digests."""
    return f"sha256:{hashlib.sha256(template.encode('utf-8', 'replace')).hexdigest()}"


def fault_of(template: str) -> TemplateFault | None:
    """Have a template render conversations. Blocks, twenty seconds at most: call it from a thread.

    Raises:
        ToolMissing: No process can be started.
    """
    source = template.encode("utf-8", "replace")
    if len(source) > MAX_TEMPLATE_BYTES:
        return TemplateFault(f"it is longer than {MAX_TEMPLATE_BYTES:,} bytes", True)
    # By name, because the renderer is the worker's own and the store lies below it.
    command = [sys.executable, "-P", "-m", "runtime.template_check"]
    try:
        done = subprocess.run(
            command, input=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return TemplateFault("it does not come to an end", True)
    except OSError as e:
        raise ToolMissing(f"Python cannot be started to try a chat template: {e}.", hint="Is memory left?") from e
    if done.returncode == 0:
        return None
    words = done.stdout.decode("utf-8", "replace")[:500] if done.returncode in (UNFIT, HARMFUL) else ""
    said = "".join(c if c.isprintable() else "?" for c in words)  # some of them are the template's own
    return TemplateFault(said or "it takes too much time or memory", done.returncode != UNFIT)
