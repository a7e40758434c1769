"""Images in messages: what their URLs hold. Nothing is fetched."""

from __future__ import annotations

import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from edge.errors import InvalidImage, InvalidRequest
from edge.formats.images import MAX_IMAGE_BYTES
from runtime import wire
from runtime.api.openai_schema import ChatMessage, ImagePart
from runtime.api.tools import CallHistory

MAX_IMAGES = 16
"""Of one request."""
_DATA_URL = re.compile(r"data:[^,;]{0,100}(?:;[^,;]{0,100}){0,4};base64,", re.IGNORECASE)
_ROLES = {"developer": "system", "function": "tool"}


@dataclass(slots=True)
class Conversation:
    """Messages for the engine, and the files of their images."""

    messages: list[wire.ChatMessage] = field(default_factory=list[wire.ChatMessage])
    images: list[bytes] = field(default_factory=list[bytes])
    first_image: str = ""
    """Where the first image stands, as a JSON path; empty without one."""


def conversation_of(messages: Sequence[ChatMessage]) -> Conversation:
    """Messages as the engine takes them.

    Raises:
        InvalidImage: An image is not one in a data URL, or too large.
        InvalidRequest: There are too many, or arguments of a call are no JSON object or too large.
    """
    found, history = Conversation(), CallHistory()
    for i, message in enumerate(messages):
        path = f"messages[{i}]"
        if message.tool_calls and message.role != "assistant":
            field = f"{path}.tool_calls"
            raise InvalidRequest(f"'{field}': only messages of the assistant call tools.", field=field)
        found.messages.append(
            wire.ChatMessage(
                _ROLES.get(message.role, message.role), _content(found, message, path),
                history.read(message.tool_calls or (), f"{path}.tool_calls"), message.tool_call_id or "",
                (message.name or "") if message.role in ("tool", "function") else "",
                message.reasoning_content or message.reasoning or "",
            )
        )  # fmt: skip
    return found


def _content(found: Conversation, message: ChatMessage, path: str) -> str | list[str | int]:
    if not isinstance(message.content, list):
        return message.content or ""
    parts: list[str | int] = []
    for i, part in enumerate(message.content):
        if isinstance(part, ImagePart):
            where = f"{path}.content[{i}].image_url"
            parts.append(len(found.images))
            found.first_image = found.first_image or where
            if len(found.images) == MAX_IMAGES:
                raise InvalidRequest(f"There are more than {MAX_IMAGES} images in the request.", field=where)
            found.images.append(_file_of(part.url, where))
        else:
            parts.append(part.text)
    texts = [p for p in parts if isinstance(p, str)]
    return "".join(texts) if len(texts) == len(parts) else parts


def _file_of(url: str, where: str) -> bytes:
    """The bytes in a data URL (RFC 2397); what they are is not its word to say."""
    if (head := _DATA_URL.match(url)) is None:
        raise InvalidImage(
            "its URL is no data: URL in base64, and the appliance fetches nothing",
            field=where, hint="Send the file itself: data:image/png;base64,….",
        )  # fmt: skip
    if (len(url) - head.end()) * 3 // 4 > MAX_IMAGE_BYTES + 2:
        raise InvalidImage(f"it has more than {MAX_IMAGE_BYTES:,} bytes", field=where, hint="Send it smaller.")
    try:
        return binascii.a2b_base64(url[head.end() :].encode(), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as e:
        raise InvalidImage(f"its base64 is damaged ({e})", field=where) from e
