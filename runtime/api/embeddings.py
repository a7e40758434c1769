"""Embeddings as OpenAI has them, and reranking as Jina and Cohere do."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Annotated, Literal, TypeVar

import msgspec
from litestar import Response, post
from litestar.datastructures import State
from typing_extensions import override

from edge.errors import InvalidRequest
from runtime import wire
from runtime.api.access import needs
from runtime.api.appliance import appliance_of
from runtime.api.call import Call, HttpRequest, start_all, usage_of
from runtime.api.describe import exchanges
from runtime.api.openai import warning_headers, whole_answers
from runtime.api.openai_schema import SamplingFields, TokenCount
from runtime.api.parsing import parse_body

T = TypeVar("T")

MAX_TEXTS = 2048
"""Of one request, as at OpenAI."""
ROWS_AT_ONCE = 32
Cut = Annotated[int, msgspec.Meta(ge=-1, le=1 << 24)]


class TextFields(msgspec.Struct, kw_only=True):
    """Fields that both share."""

    model: str
    truncate: bool | None = None
    """Cut the end off texts that are too long for the model; else they are an error."""
    truncate_prompt_tokens: Cut | None = None
    """The same, at this many tokens; -1 is what the model takes. As at vLLM."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=86400)] | None = None
    user: str | None = None

    @property
    def max_tokens(self) -> int:
        """Of a text; 0 is what the model takes."""
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequest("'truncate_prompt_tokens' is at least 1, or -1.", field="truncate_prompt_tokens")
        return max(0, self.truncate_prompt_tokens or 0)

    @property
    def cuts(self) -> bool:
        """Whether texts may be cut."""
        return bool(self.truncate) or self.truncate_prompt_tokens is not None


class EmbeddingRequest(TextFields, kw_only=True):
    """`POST /v1/embeddings`."""

    input: str | list[str | TokenCount | list[TokenCount]]
    """A text, a list of token ids, or a list of either."""
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] | None = None
    """Numbers to keep of each vector, which is then scaled to length 1 again."""

    def texts(self) -> list[str | list[int]]:
        """One entry for each vector.

        Raises:
            InvalidRequest: Nothing, too much, or a mixture.
        """
        if isinstance(self.input, str):
            return [self.input]
        texts = [item for item in self.input if not isinstance(item, int)]
        if self.input and not texts:
            return [[item for item in self.input if isinstance(item, int)]]
        if len({type(item) for item in self.input}) != 1:
            hint = "It is a text, a list of texts, a list of token ids, or a list of such lists; not empty."
            raise InvalidRequest("'input' is empty or mixes texts with tokens.", field="input", hint=hint)
        return _bounded(texts, "input")


class EmbeddingObject(msgspec.Struct, kw_only=True):
    """One vector."""

    object: str = "embedding"
    index: int
    embedding: msgspec.Raw
    """Numbers, or the base64 text of little-endian float32."""


class TextUsage(msgspec.Struct, kw_only=True):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, kw_only=True):
    """The vectors in the order of the texts."""

    object: str = "list"
    data: list[EmbeddingObject]
    model: str
    usage: TextUsage
    truncated: list[int] | msgspec.UnsetType = msgspec.UNSET
    """Indices of texts whose end was cut off."""
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


class Document(msgspec.Struct, kw_only=True):
    """A document as an object."""

    text: str


class RerankRequest(TextFields, kw_only=True):
    """`POST /v1/rerank`."""

    query: Annotated[str, msgspec.Meta(min_length=1)]
    documents: Annotated[list[str | Document], msgspec.Meta(min_length=1)]
    top_n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    return_documents: bool | None = None
    raw_scores: bool | None = None
    """The model's own numbers, instead of values between 0 and 1."""

    def texts(self) -> list[str]:
        """The documents."""
        texts = [document if isinstance(document, str) else document.text for document in self.documents]
        return _bounded(texts, "documents")


class RerankResult(msgspec.Struct, kw_only=True):
    """How well one document answers the query."""

    index: int
    relevance_score: float
    document: Document | msgspec.UnsetType = msgspec.UNSET


class RerankList(msgspec.Struct, kw_only=True):
    """The documents, best first."""

    id: str
    object: str = "list"
    model: str
    results: list[RerankResult]
    usage: TextUsage
    truncated: list[int] | msgspec.UnsetType = msgspec.UNSET
    """Indices of documents whose end was cut off."""
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


class NoSampling(SamplingFields, kw_only=True):
    """What a call needs to know of a request, where nothing is drawn."""

    @override
    def num_logprobs(self) -> None:
        return None


def _bounded(texts: list[T], field: str) -> list[T]:
    if len(texts) > MAX_TEXTS:
        raise InvalidRequest(
            f"'{field}' has {len(texts):,} texts; one request takes {MAX_TEXTS:,}.", field=field, hint="Send several."
        )
    return texts


def _rows(data: bytes, count: int) -> list[bytes]:
    width = len(data) // count
    return [data[at : at + width] for at in range(0, len(data), width)]


def _floats(row: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(row) // 4}f", row))


async def written(rows: list[bytes], *, as_text: bool) -> list[EmbeddingObject]:
    """The vectors as JSON. Others have a turn in between: two thousand would hold them up for a fifth of a second."""
    data: list[EmbeddingObject] = []
    for index, row in enumerate(rows):
        if index % ROWS_AT_ONCE == 0:
            await asyncio.sleep(0)
        vector = base64.b64encode(row).decode("ascii") if as_text else _floats(row)
        data.append(EmbeddingObject(index=index, embedding=msgspec.Raw(msgspec.json.encode(vector))))
    return data


async def read_texts(
    http: HttpRequest, state: State, body: TextFields, message: wire.Embed
) -> tuple[Call, list[bytes], list[int] | msgspec.UnsetType]:
    """What became of each text, and which were cut."""
    fields = NoSampling(model=body.model, timeout_s=body.timeout_s)
    operation = "embeddings" if message.query is None else "rerank"
    call = Call(appliance_of(state), http, fields, operation=operation, max_tokens=0)
    streams = await start_all([call], http.receive, lambda i, _: msgspec.structs.replace(message, id=i))
    await whole_answers(http, [call], streams)
    data, truncated = call.rows()
    return call, _rows(data, len(message.texts)), list(truncated) or msgspec.UNSET


def _usage(call: Call) -> TextUsage:
    tokens = usage_of([call]).prompt_tokens
    return TextUsage(prompt_tokens=tokens, total_tokens=tokens)


@post("/v1/embeddings", opt=needs("embed") | exchanges(EmbeddingRequest), status_code=200)
async def embeddings(request: HttpRequest, state: State) -> Response[EmbeddingList]:
    """Make a vector of each text."""
    body, warnings = parse_body(await request.body(), EmbeddingRequest)
    message = wire.Embed(0, body.texts(), None, body.dimensions or 0, body.max_tokens, body.cuts)
    call, rows, truncated = await read_texts(request, state, body, message)
    answered = EmbeddingList(
        data=await written(rows, as_text=body.encoding_format == "base64"),
        model=call.model,
        usage=_usage(call),
        truncated=truncated,
        warnings=warnings or msgspec.UNSET,
    )
    return Response(answered, headers=warning_headers(warnings))


@post("/v1/rerank", opt=needs("embed") | exchanges(RerankRequest), status_code=200)
async def rerank(request: HttpRequest, state: State) -> Response[RerankList]:
    """Sort documents by how well they answer a query."""
    body, warnings = parse_body(await request.body(), RerankRequest)
    texts = body.texts()
    message = wire.Embed(
        0, [*texts], body.query, max_tokens=body.max_tokens, truncate=body.cuts, raw_scores=bool(body.raw_scores)
    )
    call, rows, truncated = await read_texts(request, state, body, message)
    scores = [_floats(row)[0] for row in rows]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n]
    results = [
        RerankResult(
            index=i,
            relevance_score=scores[i],
            document=Document(text=texts[i]) if body.return_documents else msgspec.UNSET,
        )
        for i in order
    ]
    answered = RerankList(
        id=call.id,
        model=call.model,
        results=results,
        usage=_usage(call),
        truncated=truncated,
        warnings=warnings or msgspec.UNSET,
    )
    return Response(answered, headers=warning_headers(warnings))


HANDLERS = [embeddings, rerank]
