"""The process in which a chat template of unknown origin renders conversations: what `edge.formats.template` starts."""

from __future__ import annotations

import asyncio
import resource
import signal
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from edge.errors import EdgeError, InvalidRequest, UnsupportedFormat
from edge.formats.template import HARMFUL, UNFIT, fault_of
from runtime.chat import ChatTemplate
from runtime.wire import ChatMessage, Tool, ToolCall

CPU_S, CPU_STARTS = 0.8, 6
"""What the template may take: so long, or on a slow machine as often the time that this process took to start. The
longest that models bring take as long as the start, which is 0.1 s on a fast machine."""
MAX_MEMORY_BYTES = 256 << 20
MAX_TEXT_CHARS = 1 << 20
"""Of what it makes of a few words."""
_SAID = "lighthouse"
_HINT = "Templates are Jinja, as models bring them (tokenizer.chat_template); Go templates are not read."


async def check_template(source: str) -> None:
    """Have a template render a conversation.

    Raises:
        InvalidRequest: It does not compile, refuses the conversation, leaves out what the user said, or takes too much.
    """
    if fault := await asyncio.to_thread(fault_of, source):
        raise InvalidRequest(f"The chat template is refused: {fault.reason}.", field="template", hint=_HINT)


def main() -> None:
    """`python -m runtime.template_check`: read a template; exit 0, or say what is wrong with it."""
    source = sys.stdin.buffer.read().decode("utf-8", "replace")
    _limit()
    try:
        template = ChatTemplate(source, markers=())
        text = template.render([ChatMessage("user", _SAID)])
        texts = [text, *_with_tools(template)]
    except EdgeError as e:
        said = e.message.removeprefix("The model's chat template ")
        _end(HARMFUL if _is_harmful(e) else UNFIT, f"it {said}")
    if max(map(len, texts)) > MAX_TEXT_CHARS:
        _end(HARMFUL, f"it makes {max(map(len, texts)):,} characters of a few words")
    if _SAID not in text:
        _end(UNFIT, "it leaves out what the user says")


def _limit() -> None:
    """Have the kernel end this process where the template takes too much. It can write no file and start no process."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, max(CPU_S, CPU_STARTS * time.process_time()))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    for none_of in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
        resource.setrlimit(none_of, (0, 0))


def _end(code: int, reason: str) -> NoReturn:
    sys.stdout.buffer.write(reason.rstrip(".").encode("utf-8", "replace"))
    sys.stdout.flush()
    sys.exit(code)


def _is_harmful(error: EdgeError) -> bool:
    """Whether it is the template that is at fault, and not the conversation that it will not have."""
    from jinja2.exceptions import SecurityError

    cause = error.__cause__
    reaches_out = isinstance(cause, SecurityError) and "'_" in str(cause)  # lists have no `append` in the sandbox, too
    return isinstance(error, UnsupportedFormat) or isinstance(cause, MemoryError) or reaches_out


def _with_tools(template: ChatTemplate) -> Iterator[str]:
    """Have it render tools, a call and its result, and thinking: it may refuse them, but has to come to an end.

    Raises:
        InvalidRequest: It takes too much memory, or reaches for Python.
    """
    call = ToolCall("call_0a1b2c3d", "find", '{"what":"light"}')
    messages = [
        ChatMessage("user", _SAID), ChatMessage("assistant", "Yes.", tool_calls=(call,), reasoning="Well."),
        ChatMessage("tool", "Here.", tool_call_id=call.id, name=call.name),
    ]  # fmt: skip
    for num in (1, 2, 3):
        try:
            yield template.render(messages[:num], tools=[Tool("find", "Finds.", '{"type":"object","properties":{}}')])
        except InvalidRequest as e:
            if _is_harmful(e):
                raise


if __name__ == "__main__":
    main()
