"""Moderation in OpenAI's shape, by whatever classifier is configured; without one the answer is 501, and never that a
text is harmless."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator
from typing import Annotated

import msgspec
from litestar import Response, post
from litestar.datastructures import State

from edge.errors import BackendError, ClassifierBusy, EdgeError, InvalidRequest, ModerationUnavailable
from runtime.api.access import needs
from runtime.api.call import HttpRequest
from runtime.api.describe import exchanges
from runtime.api.openai import warning_headers
from runtime.api.openai_schema import ImagePart, TextPart
from runtime.api.parsing import parse_body
from runtime.api.threads import BackgroundThreads
from runtime.moderation import CATEGORIES, Category, Classifier, Judgement, load_classifier

log = logging.getLogger("edge.moderation")

MAX_TEXTS = 2048
MAX_AT_ONCE = 2
MAX_HELD = 16
"""Requests that are being judged, or wait."""
JUDGE_S = 60.0
BUSY_RETRY_S = 10.0


class ModerationRequest(msgspec.Struct, kw_only=True):
    """`POST /v1/moderations`."""

    input: str | list[str | TextPart | ImagePart]
    """A text, or a list of texts or of parts with one."""
    model: Annotated[str, msgspec.Meta(max_length=400)] | None = None
    """The classifier's name; there is one, and another name is listed among the warnings."""

    def texts(self) -> list[str]:
        """What is to be judged.

        Raises:
            InvalidRequest: Nothing, too much, or an image.
        """
        if isinstance(self.input, str):
            return [self.input]
        if not 0 < len(self.input) <= MAX_TEXTS:
            raise InvalidRequest(f"'input' has 1 to {MAX_TEXTS:,} texts, not {len(self.input):,}.", field="input")
        return [_text(part, i) for i, part in enumerate(self.input)]


class Moderation(msgspec.Struct, kw_only=True):
    """The judgement of one text."""

    flagged: bool
    categories: dict[Category, bool]
    category_scores: dict[Category, float]
    category_applied_input_types: dict[Category, list[str]]
    """``["text"]``, or an empty list for a category that the classifier does not look at."""


class ModerationList(msgspec.Struct, kw_only=True):
    """The judgements in the order of the texts."""

    id: str
    model: str
    results: list[Moderation]
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


class Moderator:
    """The classifier of the settings, loaded when it is first wanted."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._threads = BackgroundThreads(MAX_AT_ONCE, name="moderation")
        self._loading: asyncio.Task[Classifier] | None = None

    async def classifier(self) -> Classifier:
        """The classifier.

        Raises:
            ModerationUnavailable: There is none.
            ClassifierBusy: It is not loaded yet.
        """
        if self._loading is None:
            self._loading = asyncio.create_task(self._threads.run(lambda: load_classifier(self._name)))
        try:
            async with _in_time():
                return await asyncio.shield(self._loading)
        except ModerationUnavailable:
            self._loading = None  # another time it may be there
            raise

    async def judge(self, texts: list[str]) -> list[Judgement]:
        """A judgement for each text.

        Raises:
            ModerationUnavailable: There is no classifier.
            ClassifierBusy: It does not answer in time, or has too much to do.
            BackendError: It failed.
        """
        classifier = await self.classifier()
        if self._threads.num_held >= MAX_HELD:
            raise ClassifierBusy(retry_after_s=BUSY_RETRY_S)
        async with _in_time():
            judgements = await self._threads.run(lambda: _judged(classifier, texts))
        if len(judgements) != len(texts):
            raise BackendError(f"The classifier judged {len(judgements)} of {len(texts)} texts.")
        return judgements


@contextlib.asynccontextmanager
async def _in_time() -> AsyncGenerator[None]:
    try:
        async with asyncio.timeout(JUDGE_S):
            yield
    except TimeoutError as e:
        raise ClassifierBusy(retry_after_s=BUSY_RETRY_S) from e


def _judged(classifier: Classifier, texts: list[str]) -> list[Judgement]:
    try:
        return [*classifier.judge(texts)]
    except EdgeError:
        raise
    except Exception as e:  # whatever somebody else's code raises
        log.exception("the classifier %s failed", classifier.name)
        raise BackendError(f"The classifier failed: {type(e).__name__}.", hint="The log says how.") from e


def _text(part: str | TextPart | ImagePart, index: int) -> str:
    if isinstance(part, ImagePart):
        raise InvalidRequest("Images are not judged by this version.", field=f"input[{index}].type", hint="Send texts.")
    return part if isinstance(part, str) else part.text


def _moderation(judgement: Judgement) -> Moderation:
    return Moderation(
        flagged=bool(judgement.flagged),
        categories={c: c in judgement.flagged for c in CATEGORIES},
        category_scores={c: judgement.scores.get(c, 0.0) for c in CATEGORIES},
        category_applied_input_types={c: ["text"] if c in judgement.scores else [] for c in CATEGORIES},
    )


@post(
    "/v1/moderations",
    opt=needs("chat") | exchanges(ModerationRequest, errors=(ModerationUnavailable, ClassifierBusy)),
    status_code=200,
)
async def moderations(request: HttpRequest, state: State) -> Response[ModerationList]:
    """Judge texts."""
    body, warnings = parse_body(await request.body(), ModerationRequest)
    texts = body.texts()
    moderator: Moderator = state.moderator
    classifier = await moderator.classifier()
    if body.model not in (None, classifier.name):
        warnings.append(f"'model' was ignored: texts are judged by {classifier.name}")
    results = [_moderation(j) for j in await moderator.judge(texts)]
    answer = ModerationList(
        id=f"modr-{secrets.token_hex(12)}", model=classifier.name, results=results, warnings=warnings or msgspec.UNSET
    )
    return Response(answer, headers=warning_headers(warnings))


HANDLERS = [moderations]
