"""Whether a chat template works, found out in a process of its own.

Templates come from anywhere. Jinja's sandbox keeps them from Python, not from taking all memory or running for ever,
and constant expressions are computed while it compiles: so nothing that is to go on serving compiles one.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import sys

from edge.errors import EdgeError, InvalidRequest
from runtime.chat import ChatTemplate
from runtime.wire import ChatMessage, Tool, ToolCall

TIMEOUT_S = 10.0
MAX_CPU_S = 2
MAX_MEMORY_BYTES = 1 << 30
_SAID = "lighthouse"
_HINT = "Templates are Jinja, as models bring them (tokenizer.chat_template); Go templates are not read."


async def check_template(source: str) -> None:
    """Have a template render a conversation.

    Raises:
        InvalidRequest: It does not compile, refuses the conversation, leaves out what the user said, or takes too much.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "runtime.template_check", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(TIMEOUT_S):
            answer, _ = await process.communicate(source.encode("utf-8", "replace"))
    except TimeoutError as e:
        raise InvalidRequest("The chat template does not come to an end.", field="template", hint=_HINT) from e
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    if process.returncode:
        reason = answer.decode("utf-8", "replace")[:500] or "The chat template takes too much time or memory."
        raise InvalidRequest(reason, field="template", hint=_HINT)


def main() -> None:
    """`python -m runtime.template_check`: read a template, exit 0, or say what is wrong with it and exit 1."""
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    try:
        template = ChatTemplate(sys.stdin.read(), markers=())
        text = template.render([ChatMessage("user", _SAID)])
        _try_tools(template)
    except EdgeError as e:
        sys.stdout.write(e.message)
        sys.exit(1)
    if _SAID not in text:
        sys.stdout.write("The chat template leaves out what the user says.")
        sys.exit(1)


def _try_tools(template: ChatTemplate) -> None:
    """Have it render tools, a call and its result, and thinking: it may refuse them, but has to come to an end.

    Raises:
        InvalidRequest: It takes too much memory.
    """
    call = ToolCall("call_0a1b2c3d", "find", '{"what":"light"}')
    messages = [
        ChatMessage("user", _SAID), ChatMessage("assistant", "Yes.", tool_calls=(call,), reasoning="Well."),
        ChatMessage("tool", "Here.", tool_call_id=call.id, name=call.name),
    ]  # fmt: skip
    for num in (1, 2, 3):
        try:
            template.render(messages[:num], tools=[Tool("find", "Finds.", '{"type":"object","properties":{}}')])
        except InvalidRequest as e:
            if isinstance(e.__cause__, MemoryError):
                raise


if __name__ == "__main__":
    main()
