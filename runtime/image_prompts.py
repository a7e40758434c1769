"""Files of images to tiles in a prompt, on the text thread: looked at, decoded and cut, and not yet encoded."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from edge.errors import BackendError, ContextOverflow, InvalidImage, InvalidRequest, QueueFull
from edge.formats.images import check_image
from runtime.backends.base import Vision
from runtime.images import PlacedTile, Tile
from runtime.request import TokenId

DECODING_BYTES = 256 << 20
"""What decoding one image of the largest size takes for a moment: a progressive JPEG's coefficients, then the pixels
three times."""


class ImagePlacer:
    """Puts the images of requests between their texts.

    Args:
        vision: None for a model that reads text only.
        room_bytes: What tiles of all requests may take until they are encoded.
    """

    def __init__(self, vision: Vision | None, *, context_tokens: int, room_bytes: int) -> None:
        self._vision = vision
        self._context_tokens = context_tokens
        self._room_bytes = room_bytes
        self._waiting: weakref.WeakSet[Tile] = weakref.WeakSet()

    def place(
        self, images: Sequence[bytes], texts: Sequence[list[TokenId]]
    ) -> tuple[list[TokenId], tuple[PlacedTile, ...]]:
        """The prompt, and where in it which tiles are. There is a text before, between and behind the images.

        Raises:
            InvalidImage: A file is none that is read, too large or damaged.
            InvalidRequest: Together they take more than one request may.
            ContextOverflow: They do not fit the context.
            QueueFull: Images of others take all the room.
            BackendError: The model reads text only; who sent it here did not ask.
        """
        if self._vision is None:
            raise BackendError("The engine of a model without a projector was given an image.")
        tokens, tiles = list(texts[0]), list[PlacedTile]()
        for number, (data, text) in enumerate(zip(images, texts[1:], strict=True), 1):
            for part in self._read(self._vision, data, number):
                if isinstance(part, Tile):
                    tiles.append(PlacedTile(len(tokens), part))
                    tokens += part.ids
                else:
                    tokens += part
            tokens += text
            self._check_room(tiles, num_tokens=len(tokens))
        return tokens, tuple(tiles)

    def _read(self, vision: Vision, data: bytes, number: int) -> list[list[TokenId] | Tile]:
        try:
            check_image(data)
            return vision.read(data)
        except InvalidImage as e:
            raise InvalidImage(e.reason, number=number, field="messages", hint=e.hint) from e

    def _check_room(self, tiles: Sequence[PlacedTile], *, num_tokens: int) -> None:
        """After each image, so that no more is taken than one image too many."""
        if num_tokens > self._context_tokens:
            raise ContextOverflow(limit_tokens=self._context_tokens, prompt_tokens=num_tokens, completion_tokens=0)
        own = sum(t.tile.source_bytes for t in tiles)
        if own > self._room_bytes:
            raise InvalidRequest(
                f"The images take {own >> 20} MB before they are encoded, and {self._room_bytes >> 20} are allowed.",
                field="messages", hint="Send fewer or smaller ones.",
            )  # fmt: skip
        self._waiting.update(t.tile for t in tiles)
        if sum(t.source_bytes for t in self._waiting if t.source is not None) > self._room_bytes:
            raise QueueFull(retry_after_s=5)
