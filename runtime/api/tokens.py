"""What texts and prompts are in tokens, under llama-server's names. Nothing is answered, and nothing is charged."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from litestar import Response, post
from litestar.datastructures import State

from edge.errors import InvalidRequest
from edge.store.manifest import ModelRef
from runtime import wire
from runtime.api.access import needs
from runtime.api.appliance import appliance_of
from runtime.api.call import Call, HttpRequest, Steps, start_all
from runtime.api.describe import exchanges
from runtime.api.embeddings import MAX_TEXTS, NoSampling
from runtime.api.guard import caller_of
from runtime.api.openai import MESSAGE_FIELDS, start_render, warning_headers, whole_answers
from runtime.api.openai_schema import ChatRequest, TokenCount
from runtime.api.parsing import check_items, parse_body


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """`POST /tokenize`."""

    content: str | list[str | TokenCount]
    """A text, or texts and token ids in a row."""
    model: str = ""
    add_special: bool = False
    """Also the tokens that the model wants around a text, such as BOS."""
    parse_special: bool = True
    """What spells a control token is one."""
    with_pieces: bool = False

    def parts(self) -> list[str | int]:
        """The content as a list.

        Raises:
            InvalidRequest: It has too many texts: each is tokenized by itself.
        """
        if isinstance(self.content, str):
            return [self.content]
        if sum(isinstance(part, str) for part in self.content) > MAX_TEXTS:
            raise InvalidRequest(f"'content' has more than {MAX_TEXTS:,} texts.", field="content", hint="Join them.")
        return self.content


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """`POST /detokenize`."""

    tokens: list[TokenCount]
    model: str = ""


class PromptRequest(ChatRequest, kw_only=True):
    """A conversation whose prompt is asked for. Fields that say how to answer it are read, without effect."""

    model: str = ""


class TokenPiece(msgspec.Struct, kw_only=True):
    """A token and what spells it: a text, or its bytes where these are none by themselves."""

    id: int
    piece: str | list[int]


class Tokens(msgspec.Struct, kw_only=True):
    """A content's tokens."""

    tokens: Sequence[int | TokenPiece]
    model: str
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


class Detokenized(msgspec.Struct, kw_only=True):
    """The text of tokens."""

    content: str
    model: str
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


class RenderedPrompt(msgspec.Struct, kw_only=True):
    """A conversation as the model reads it."""

    prompt: str
    model: str
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


class InputTokens(msgspec.Struct, kw_only=True):
    """How long a prompt is."""

    input_tokens: int
    model: str
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


async def model_or_default(http: HttpRequest, model: str) -> str:
    """The model that is meant; where a request names none, the default one, or else the only one there could be.

    Raises:
        InvalidRequest: It names none, and there are several or none.
    """
    if model:
        return model
    appliance, limits = appliance_of(http.app.state), caller_of(http.scope).limits
    stored = [m for m in await appliance.stored_models() if not m.is_adapter]
    usable = [str(m.ref) for m in stored if limits.may_use(str(m.ref))]
    loaded = [h.ref for h in appliance.pool.hosts() if h.state == "ready" and h.ref in usable]
    default = str(ModelRef.parse(appliance.settings.default_model))
    for names in ([default] if default in usable else [], loaded, usable):
        if len(names) == 1:
            return names[0]
    raise InvalidRequest("'model' is missing.", field="model", hint=f"Models here: {', '.join(usable) or 'none yet'}.")


async def rendered(
    http: HttpRequest, state: State, body: ChatRequest, *, as_text: bool = False
) -> tuple[Call, wire.Piece]:
    """The prompt of a conversation: its `tokens`, or its `text`.

    Raises:
        EdgeError: The model cannot be had, or the prompt cannot be made.
    """
    return await _answered(http, *await start_render(http, state, body, as_text=as_text))


async def _spelled(http: HttpRequest, state: State, message: wire.Spell, model: str) -> tuple[Call, wire.Piece]:
    fields = NoSampling(model=await model_or_default(http, model))
    calls = [Call(appliance_of(state), http, fields, operation="tokenize", max_tokens=0)]
    streams = await start_all(calls, http.receive, lambda i, _: msgspec.structs.replace(message, id=i))
    return await _answered(http, calls, streams)


async def _answered(http: HttpRequest, calls: list[Call], streams: list[Steps]) -> tuple[Call, wire.Piece]:
    await whole_answers(http, calls, streams)
    (call,) = calls
    assert call.last is not None, "an answer that ended well has a last piece"
    return call, call.last


def _pieces(last: wire.Piece) -> list[int | TokenPiece]:
    """Each token with what spells it."""
    found = zip(last.tokens or (), last.spellings or (), strict=True)
    return [TokenPiece(id=token, piece=_text_or_bytes(spelling)) for token, spelling in found]


def _text_or_bytes(spelling: bytes) -> str | list[int]:
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return list(spelling)


@post("/tokenize", opt=needs("chat") | exchanges(TokenizeRequest), status_code=200)
async def tokenize(request: HttpRequest, state: State) -> Response[Tokens]:
    """The tokens of a text, of a model of any kind."""
    body, warnings = parse_body(await request.body(), TokenizeRequest)
    message = wire.Spell(0, body.parts(), body.add_special, body.parse_special)
    call, last = await _spelled(request, state, message, body.model)
    # A list of pieces is long work for as many tokens as a text may have: others have a turn meanwhile.
    tokens = await asyncio.to_thread(_pieces, last) if body.with_pieces else list(last.tokens or ())
    told = Tokens(tokens=tokens, model=call.model, warnings=warnings or msgspec.UNSET)
    return Response(told, headers=warning_headers(warnings))


@post("/detokenize", opt=needs("chat") | exchanges(DetokenizeRequest), status_code=200)
async def detokenize(request: HttpRequest, state: State) -> Response[Detokenized]:
    """The text of tokens. Bytes that are no text become U+FFFD."""
    body, warnings = parse_body(await request.body(), DetokenizeRequest)
    message = wire.Spell(0, [*body.tokens], field="tokens")
    call, last = await _spelled(request, state, message, body.model)
    text = b"".join(last.spellings or ()).decode("utf-8", "replace")
    told = Detokenized(content=text, model=call.model, warnings=warnings or msgspec.UNSET)
    return Response(told, headers=warning_headers(warnings))


async def _prompt_request(http: HttpRequest) -> tuple[PromptRequest, list[str]]:
    content = await http.body()
    body, warnings = parse_body(content, PromptRequest)
    check_items(content, "messages", MESSAGE_FIELDS, frozenset({"function_call"}))
    body.model = await model_or_default(http, body.model)
    return body, warnings


@post("/apply-template", opt=needs("chat") | exchanges(PromptRequest), status_code=200)
async def apply_template(request: HttpRequest, state: State) -> Response[RenderedPrompt]:
    """A conversation's prompt as text."""
    body, warnings = await _prompt_request(request)
    call, last = await rendered(request, state, body, as_text=True)
    told = RenderedPrompt(prompt=last.text, model=call.model, warnings=warnings or msgspec.UNSET)
    return Response(told, headers=warning_headers(warnings))


@post("/v1/chat/completions/input_tokens", opt=needs("chat") | exchanges(PromptRequest), status_code=200)
async def input_tokens(request: HttpRequest, state: State) -> Response[InputTokens]:
    """How many tokens a conversation's prompt has."""
    body, warnings = await _prompt_request(request)
    call, last = await rendered(request, state, body)
    told = InputTokens(input_tokens=len(last.tokens or ()), model=call.model, warnings=warnings or msgspec.UNSET)
    return Response(told, headers=warning_headers(warnings))


HANDLERS = [tokenize, detokenize, apply_template, input_tokens]
