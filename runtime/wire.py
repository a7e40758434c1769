"""Messages between the front process and a worker: msgpack frames over a Unix socket, one struct each.

A frame is its length in four bytes, little-endian, then one message. Both ends are of one version: the front starts
its workers.
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

from runtime.request import Adapter, Constraint, Echo, Pin, SamplingParams, TokenLogprob

MAX_FRAME_BYTES = 256 << 20
_HEADER = struct.Struct("<I")


class Message(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Base of all messages."""


# ---------------------------------------------------------------- front to worker


class ToolCall(msgspec.Struct, array_like=True, frozen=True):
    """A call of a tool by the model. `arguments` is a JSON text."""

    id: str
    name: str
    arguments: str


class Tool(msgspec.Struct, array_like=True, frozen=True):
    """What the model may call. `parameters` is a JSON schema, as JSON text."""

    name: str
    description: str
    parameters: str


class ChatMessage(msgspec.Struct, array_like=True, frozen=True):
    """One message of a conversation."""

    role: str
    content: str | list[str | int]
    """A text; or texts and the numbers of images, counted through the conversation."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    """Of a tool's result: the call it answers."""
    name: str = ""
    """Of a tool's result: the tool."""
    reasoning: str = ""


class Generate(Message, frozen=True):
    """Answer a conversation, or continue a text or tokens. `max_tokens` 0 means as many as fit.

    With `pin`, what conversations that begin with these messages share is computed and pinned under that name.
    """

    id: int
    messages: list[ChatMessage] | None
    prompt: str | list[int] | None
    params: SamplingParams
    max_tokens: int
    stop: list[str]
    ignore_eos: bool = False
    return_tokens: bool = False
    constraint: Constraint | None = None
    adapters: tuple[Adapter, ...] = ()
    tenant: str = ""
    cache_key: str = ""
    priority: int = 0
    pin: str = ""
    images: tuple[bytes, ...] = ()
    """Files, as they came; nobody has looked into them."""
    cuts_max_tokens: bool = False
    """Where `max_tokens` exceeds what is left of the context, that is what it means."""
    is_raw: bool = False
    """What spells a control token in `prompt` is one: who asks wrote the whole prompt, markers and all."""
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    """``none``, ``auto``, ``required``, or ``=NAME``."""
    parallel_tools: bool = True
    template_options: str = ""
    """Further variables of the chat template, a JSON object."""
    suffix: str | None = None
    """What follows the answer: it fills in the middle between `prompt` and this."""
    echoes: bool = False
    """Give `prompt` back before the answer; with log-probabilities, the figures of its tokens too."""
    answers: bool = True
    """Else `prompt` is computed, and nothing is added to it."""
    truncates: bool = False
    """Leave out the oldest of what does not fit, rather than refuse it."""


class Embed(Message, frozen=True):
    """Make a vector of each text or token list; or, with a query, judge how well each text answers it.

    `dimensions` 0 keeps all; `max_tokens` 0 means what the model takes; `truncate` cuts what is longer.
    """

    id: int
    texts: list[str | list[int]]
    query: str | None = None
    dimensions: int = 0
    max_tokens: int = 0
    truncate: bool = False
    raw_scores: bool = False


class Render(Message, frozen=True):
    """Tell the prompt of a request, which is not answered: its tokens, or the text that the template makes."""

    id: int
    asked: Generate
    as_text: bool = False


class Spell(Message, frozen=True):
    """Tell the tokens of texts and token ids in a row, and what spells each. With `add_special` the first text has
    what the model wants around it; with `parse_special`, what spells a control token is one."""

    id: int
    content: list[str | int]
    add_special: bool = False
    parse_special: bool = False
    field: str = "content"
    """What the request calls `content`."""


class Cancel(Message, frozen=True):
    """Drop a request; nothing more is sent for it."""

    id: int


class Hold(Message, frozen=True):
    """Compute no more of a request until told to go on: its answer is not being read."""

    id: int
    is_held: bool


class AskPins(Message, frozen=True):
    """Tell what is pinned, after `remove`, where it is given, was let go."""

    id: int
    remove: str = ""


class Stop(Message, frozen=True):
    """End the process after the current step."""


class Load(Message, frozen=True):
    """The first message: what to open and how. Zeros let the worker choose."""

    path: str
    ref: str
    threads: int
    num_slots: int
    step_tokens: int
    context_tokens: int
    max_queue: int
    state_bytes: int = 0
    reserved_bytes: int = 0
    """Memory that looks free but is for models that are being loaded now."""
    speculation: str = "auto"
    token_interval_ms: int = 0
    decode_threads: int = 0
    ubatch_tokens: int = 0
    flash_attention: bool | None = None
    home: str = ""
    weights_digest: str = ""
    state_disk_bytes: int = 0
    draft: str = ""
    """The name of a smaller model that guesses; empty without one."""
    draft_path: str = ""
    draft_problem: str = ""
    """Why there is no such file."""
    projector: str = ""
    """What encodes images for the model; empty for text alone."""
    pooling: str = ""
    """Of a model that makes embeddings or scores; empty for one that makes text."""
    template: str = ""
    """A chat template in the place of the file's own."""
    template_digest: str = ""
    """What the file's own has to be, where its manifest says so."""


# ---------------------------------------------------------------- worker to front


class Loading(Message, frozen=True):
    """Progress of a load, 0 to 1."""

    fraction: float
    promised_bytes: int = 0
    """As in a `Heartbeat`, once the cells are there."""


class Budgets(msgspec.Struct, array_like=True, frozen=True):
    """What a model may take beside its weights, in bytes."""

    cells: int
    states: int
    disk: int
    """Of these, on the disk."""
    adapters: int


class Ready(Message, frozen=True):
    """The model can answer."""

    description: str
    architecture: str
    num_parameters: int
    context_tokens: int
    num_cells: int
    num_slots: int
    vocab_size: int
    has_chat_template: bool
    build: str
    load_s: float
    draft: str = ""
    """The model that guesses for it."""
    draft_problem: str = ""
    """Why none does, where one should."""
    template_variables: tuple[str, ...] = ()
    """What its chat template looks for beside messages and tools."""
    thinks: bool = False
    """Whether its template knows thinking before an answer."""
    cells_reason: str = ""
    """Why it has so many cells."""
    budgets: Budgets | None = None
    """None where it has no cells."""


class CallDelta(msgspec.Struct, array_like=True, frozen=True):
    """What a step gave the call `index` of an answer: id and name once, at its beginning, then arguments bit by bit."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class Piece(msgspec.Struct, array_like=True, frozen=True):
    """What one step gave one request; the last one says why it ended and how long things took."""

    id: int
    text: str
    num_output: int
    num_prompt: int
    num_cached: int
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    queue_s: float = 0.0
    prefill_s: float = 0.0
    total_s: float = 0.0
    tokens: tuple[int, ...] | None = None
    """Of prompt and answer, for who asked for them; or what a `Render` or `Spell` asked for."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    rows: bytes | None = None
    """What became of the texts of an `Embed`: float32, little-endian, one row after the other."""
    truncated: tuple[int, ...] = ()
    """Indices of texts that were cut."""
    calls: tuple[CallDelta, ...] = ()
    reasoning: str = ""
    """What the model thought before it answered."""
    num_reasoning: int = 0
    """Tokens of thinking so far, of `num_output`."""
    echo: Echo | None = None
    num_accepted: int = 0
    """Guesses that proved right; like those below, on the last piece."""
    num_rejected: int = 0
    num_dropped: int = 0
    """Tokens that were left out of the prompt."""
    stop: str = ""
    """The stop string that ended the answer; empty where it ended otherwise."""
    spellings: tuple[bytes, ...] | None = None
    """What spells each of the `tokens`, for a `Spell`."""


class Failed(msgspec.Struct, array_like=True, frozen=True):
    """A request, or with id 0 the load, ended with an error."""

    id: int
    code: str
    message: str
    hint: str | None = None
    field: str | None = None
    retry_after_s: float | None = None
    missing_bytes: int = 0
    """Of what did not fit."""


class Step(Message, frozen=True):
    """All that one engine step gave."""

    pieces: list[Piece]
    failures: list[Failed]


class Pins(Message, frozen=True):
    """The answer to `AskPins`. `is_removed`: whether what was to be let go was there."""

    id: int
    pins: list[Pin]
    is_removed: bool


class Heartbeat(Message, frozen=True):
    """Counters, each second."""

    steps: int
    waiting: int
    running: int
    preemptions: int
    cells_used: int
    prompt_tokens: int
    output_tokens: int
    memory_bytes: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    drafted_by_model: int = 0
    """Of these, what a draft model guessed."""
    accepted_by_model: int = 0
    promised_bytes: int = 0
    """Memory that looks free but is for cells that nobody used yet."""


Ask = Generate | Embed | Render | Spell
"""What can be asked of a model."""
ToWorker = Load | Ask | Cancel | Hold | AskPins | Stop
ToFront = Loading | Ready | Step | Pins | Heartbeat

_encoder = msgspec.msgpack.Encoder()
to_worker_decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
to_front_decoder: msgspec.msgpack.Decoder[ToFront] = msgspec.msgpack.Decoder(ToFront)


def encode_frame(message: ToWorker | ToFront) -> bytes:
    """A message with its length in front."""
    body = _encoder.encode(message)
    return _HEADER.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """Length of the frame that a header of `HEADER_BYTES` announces.

    Raises:
        ValueError: It is longer than any frame may be.
    """
    length: int = _HEADER.unpack(header)[0]
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes")
    return length


HEADER_BYTES = _HEADER.size
