"""An encoder whose vectors tell what they were made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge.errors import BackendError
from runtime.backends.base import ModelFacts
from runtime.backends.encoder import Encoder, EncoderCapabilities, EncoderText, Frame
from runtime.embedding import Embedded, EmbedSink
from runtime.engine import Failure
from runtime.request import RequestId
from runtime.tokenizer import Tokenizer
from tests.support import LetterTokenizer

WIDTH = 4


class CountingEncoder(Encoder):
    """The vector of a text is its sum, its length, where its second text begins, and 1.

    It checks what the real one would punish: more tokens or texts than a step may have.
    """

    def __init__(
        self, *, step_tokens: int = 16, step_texts: int = 4, text_tokens: int = 40, width: int = WIDTH
    ) -> None:
        self._capabilities = EncoderCapabilities(text_tokens, step_tokens, step_texts, width, is_ranker=False)
        self.steps: list[list[int]] = []
        self.fails = 0

    @property
    def capabilities(self) -> EncoderCapabilities:
        return self._capabilities

    @property
    def facts(self) -> ModelFacts:
        return ModelFacts("counting", "counting", 0, 0, 97, self._capabilities.max_text_tokens, None, "", "", ())

    @property
    def tokenizer(self) -> Tokenizer:
        return LetterTokenizer()

    @property
    def frame(self) -> Frame:
        return Frame((), (), ())

    @staticmethod
    def vector(text: EncoderText) -> list[float]:
        return [float(text.tokens.sum()), float(len(text.tokens)), float(text.second_at), 1.0]

    def encode(self, texts: Sequence[EncoderText]) -> NDArray[np.float32]:
        can = self._capabilities
        lengths = [len(text.tokens) for text in texts]
        assert 0 < len(texts) <= can.max_step_texts
        assert sum(lengths) <= can.max_step_tokens or len(texts) == 1
        assert max(lengths) <= can.max_text_tokens
        self.steps.append(lengths)
        if self.fails:
            self.fails -= 1
            raise BackendError("a step failed")
        return np.array([self.vector(text) for text in texts], np.float32)

    def set_threads(self, threads: int) -> None:
        pass

    def close(self) -> None:
        pass


class KeepingSink(EmbedSink):
    """Keeps every result."""

    def __init__(self) -> None:
        self.accepted: list[RequestId] = []
        self.done: dict[RequestId, Embedded] = {}
        self.failures: dict[RequestId, Failure] = {}

    def deliver(self, results: list[Embedded], failures: list[Failure]) -> None:
        for result in results:
            if result.rows is None:
                self.accepted.append(result.request_id)
            else:
                assert result.request_id not in self.done, "a result comes once"
                self.done[result.request_id] = result
        self.failures |= {failure.request_id: failure for failure in failures}

    def rows(self, request_id: int) -> NDArray[np.float32]:
        """What became of a request's texts."""
        rows = self.done[RequestId(request_id)].rows
        assert rows is not None
        return np.frombuffer(rows, "<f4").reshape(-1, WIDTH)
