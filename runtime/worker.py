"""The process around one engine. Started by exec with a socket to its parent, gone when the parent is.

Three threads: the main one owns the backend and runs the engine; one reads messages and does the text work (chat
template, tokens), so that a huge prompt delays no step; one sends counters each second.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edge.errors import (
    BackendError,
    ContextOverflow,
    DoesNotFit,
    EdgeError,
    InvalidModelFile,
    InvalidRequest,
    QueueFull,
)
from edge.formats.gguf import read_gguf
from edge.formats.lora import check_finite, read_lora
from edge.formats.template import digest_of
from edge.hardware.memory import available_bytes, cpu_quota, data_bytes, usable_cores
from edge.native.malloc import give_large_blocks_back
from runtime import wire
from runtime.adapters import adapter_set
from runtime.backends.base import Backend
from runtime.blackbox import BlackBox
from runtime.chat import CHATML, encode_prompt, split_images, without_breaks
from runtime.continuation import Continuer, Prompt
from runtime.dialogues import Dialogues, num_chars, parts_of
from runtime.embedding import Embedded, EmbedEngine, EmbedSink
from runtime.engine import Delta, Engine, Failure, Sink
from runtime.governor import Governor
from runtime.grammar import Grammar, Grammars
from runtime.image_prompts import DECODING_BYTES, ImagePlacer
from runtime.images import shown_ids
from runtime.lengths import Ruler
from runtime.penalties import find_breakers
from runtime.radix import common_prefix
from runtime.request import NO_BREAKERS, Adapter, AdapterSet, Breakers, Pin, Request, RequestId, SamplingParams
from runtime.speculate import AdaptiveSpeculator
from runtime.spelling import Speller
from runtime.state_dirs import states_root
from runtime.state_files import StateFiles, open_states
from runtime.states import MIN_STATE_TOKENS
from runtime.texts import TextMaker
from runtime.tool_parser import AnswerReader
from runtime.tool_prompts import Dialogue
from runtime.truncation import cut_conversation

if TYPE_CHECKING:
    from runtime.backends.llama_cpp import LlamaBackend
    from runtime.drafter import ModelDrafter

log = logging.getLogger("edge.worker")

HEARTBEAT_S = 1.0
PERSIST_S = 3.0
"""How long a worker that ends may write states; the front waits for it a little longer."""
MAX_DISK_BYTES = 1 << 30
"""What states take on the disk without being told."""
UNSTATED_TOKENS = 512
"""What is left free for an answer that may be as long as it likes, where a conversation is cut; at most a quarter of
the context."""
MAX_WAITING_IMAGE_BYTES = 512 << 20
"""What images that wait for the encoder may take, as far as there is memory."""
MAX_GROWTH_BYTES = 1 << 30
"""Memory of its own that a worker may take beyond what it has after the load and what saved states and adapters may
take; or half of what is left, where that is less, so that a request that eats memory meets this limit and not the
kernel's."""
MIN_GROWTH_BYTES = 128 << 20
MAX_FILES = 256
OOM_SCORE = 500
"""Half of the machine's memory on top of its own use: the kernel ends a worker, not the front, which can say so."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Connection:
    """Frames over the socket to the front. `send` may be called by any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = sock.makefile("rb")
        self._lock = threading.Lock()

    def send(self, message: wire.ToFront) -> None:
        """Send one message. A front that is gone ends the process."""
        frame = wire.encode_frame(message)
        try:
            with self._lock:
                self._sock.sendall(frame)
        except OSError:
            os._exit(0)

    def receive(self) -> wire.ToWorker | None:
        """The next message; None when the front is gone."""
        header = self._reader.read(wire.HEADER_BYTES)
        if len(header) < wire.HEADER_BYTES:
            return None
        body = self._reader.read(wire.frame_length(header))
        return wire.to_worker_decoder.decode(body)


def failed(request_id: int, error: EdgeError) -> wire.Failed:
    """An error as the front will see it."""
    return wire.Failed(
        request_id,
        error.code,
        error.message,
        error.hint,
        error.field if isinstance(error, InvalidRequest) else None,
        error.retry_after_s if isinstance(error, QueueFull) else None,
        error.missing_bytes if isinstance(error, DoesNotFit) else 0,
    )


def _texts(content: str | list[str | int]) -> list[str]:
    return [content] if isinstance(content, str) else [part for part in content if isinstance(part, str)]


def _from_user(text: str) -> wire.ChatMessage:
    return wire.ChatMessage("user", text)


def _piece(d: Delta) -> wire.Piece:
    if d.finish_reason is None or d.timings is None:
        return wire.Piece(
            d.request_id, d.text, d.num_output, d.num_prompt, d.num_cached, logprobs=d.logprobs, echo=d.echo
        )
    t = d.timings
    reason = "stop" if d.finish_reason == "stop" else "length"
    return wire.Piece(
        d.request_id, d.text, d.num_output, d.num_prompt, d.num_cached, reason, t.queue_s, t.prefill_s, t.total_s,
        d.tokens, d.logprobs, echo=d.echo, num_accepted=d.num_accepted, num_rejected=d.num_rejected,
        num_dropped=d.num_dropped, stop=d.stop,
    )  # fmt: skip


def read_piece(piece: wire.Piece, reader: AnswerReader) -> wire.Piece:
    """What a step gave, with thoughts and calls apart from the text."""
    reading = reader.push(piece.text)
    reason = piece.finish_reason
    if reason is not None:
        last = reader.finish()
        reading.text += last.text
        reading.reasoning += last.reasoning
        reason = "tool_calls" if reader.has_begun and reason == "stop" else reason
    return msgspec.structs.replace(
        piece, text=reading.text, reasoning=reading.reasoning, calls=tuple(reading.calls), finish_reason=reason,
        num_reasoning=reader.count_reasoning(piece.num_output),
    )  # fmt: skip


class SocketSink(Sink):
    """Sends each step's results as one frame."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._readers: dict[int, AnswerReader] = {}

    def expect(self, request_id: int, reader: AnswerReader) -> None:
        """Have an answer read that is about to be asked for."""
        self._readers[request_id] = reader

    def drop(self, request_id: int) -> None:
        """Forget an answer that nobody wants any more."""
        self._readers.pop(request_id, None)

    def deliver(self, deltas: list[Delta], failures: list[Failure]) -> None:
        """Take the results of a step."""
        pieces = list(map(self._read, deltas))
        for failure in failures:
            self.drop(failure.request_id)
        self._connection.send(wire.Step(pieces, [failed(f.request_id, f.error) for f in failures]))

    def _read(self, delta: Delta) -> wire.Piece:
        reader = self._readers.get(delta.request_id)
        if delta.finish_reason is not None:
            self.drop(delta.request_id)
        return _piece(delta) if reader is None else read_piece(_piece(delta), reader)


class VectorSink(EmbedSink):
    """Sends what an embedding step finished as one frame."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def deliver(self, results: list[Embedded], failures: list[Failure]) -> None:
        """Take the results of a step."""
        pieces = [_vectors(r) for r in results]
        self._connection.send(wire.Step(pieces, [failed(f.request_id, f.error) for f in failures]))


def _vectors(r: Embedded) -> wire.Piece:
    if r.timings is None:
        return wire.Piece(r.request_id, "", 0, r.num_tokens, 0)
    t = r.timings
    return wire.Piece(
        r.request_id, "", 0, r.num_tokens, 0, "stop", t.queue_s, t.prefill_s, t.total_s, rows=r.rows,
        truncated=r.truncated,
    )  # fmt: skip


class PromptMaker:
    """Requests off the wire to requests of the engine.

    Args:
        image_bytes: What images may take until they are encoded, of all requests together.
        template: A chat template in the place of the file's own.
        template_digest: What the file's own has to be; empty where nobody said.

    Raises:
        InvalidModelFile: It is another.
        UnsupportedFormat: It does not compile.
    """

    def __init__(
        self, backend: Backend, *, image_bytes: int = 0, template: str = "", template_digest: str = ""
    ) -> None:
        facts = backend.facts
        if template_digest and digest_of(facts.chat_template or "") != template_digest:
            raise InvalidModelFile("The weight file", "its chat template is not the one that the manifest names")
        self._tokenizer = backend.tokenizer
        self._context_tokens = backend.capabilities.context_tokens
        self._vocab_size = facts.vocab_size
        self.dialogues = Dialogues(backend, template or facts.chat_template or CHATML)
        self._bos = facts.bos
        self._ruler = Ruler(backend.tokenizer, limit_tokens=self._context_tokens, field="messages")
        self._continuer = Continuer(
            backend.tokenizer, bos=facts.bos, vocab_size=facts.vocab_size, context_tokens=self._context_tokens
        )
        self._breakers_of: dict[tuple[str, ...], Breakers] = {}
        self._grammars = Grammars(backend.tokenizer, facts.vocab_size)
        self._sound_adapters: set[str] = set()
        self._images = ImagePlacer(backend.vision, context_tokens=self._context_tokens, room_bytes=image_bytes)

    def request(self, message: wire.Generate) -> tuple[Request, AnswerReader | None]:
        """The tokens and limits of one request, and who reads its answer.

        Raises:
            InvalidRequest: The prompt is empty, a token id is unknown, the template refuses the messages, or the
                constraint cannot be compiled.
            ContextOverflow: The prompt, or the prompt and `max_tokens`, exceed the context.
            InvalidModelFile: An adapter's file is damaged.
        """
        prompt, dialogue = self._prompt(message)
        tokens = prompt.tokens
        if not tokens:
            raise InvalidRequest("The prompt is empty.", field="prompt", hint="Send at least one character.")
        room = self._context_tokens - len(tokens)
        max_tokens = message.max_tokens or max(room, 1)
        if message.cuts_max_tokens:
            max_tokens = min(max_tokens, max(room, 1))
        if not message.answers:
            max_tokens = 0
        if max_tokens > room:
            raise ContextOverflow(
                limit_tokens=self._context_tokens, prompt_tokens=len(tokens), completion_tokens=max_tokens,
                field="prompt" if message.messages is None else "messages",
            )  # fmt: skip
        request = Request(
            RequestId(message.id), tuple(tokens), max_tokens, message.params, tuple(message.stop), message.ignore_eos,
            message.return_tokens, self._breakers(message.params), tenant=message.tenant, cache_key=message.cache_key,
            grammar=self._grammar(message, dialogue), adapters=self._checked(message.adapters),
            priority=message.priority, pin=message.pin, tiles=prompt.tiles, echo=prompt.echo,
            num_dropped=prompt.num_dropped, spelled=self.dialogues.spelled(dialogue) if dialogue else {},
        )  # fmt: skip
        return request, self.dialogues.reader(dialogue, message) if dialogue else None

    def _grammar(self, message: wire.Generate, dialogue: Dialogue | None) -> Grammar | None:
        constraint = self.dialogues.constraint(dialogue, message) if dialogue else message.constraint
        if constraint is None:
            return None
        try:
            return self._grammars.compile(constraint, message.tenant)
        except InvalidRequest:
            for part in parts_of(constraint, message):  # of several, the one that is at fault says so
                self._grammars.check(part)
            raise

    def render(self, message: wire.Render) -> wire.Piece:
        """What a request's prompt is.

        Raises:
            InvalidRequest, ContextOverflow: As `request`.
        """
        if message.as_text:
            text = without_breaks(self._dialogue(message.asked).text)
            return wire.Piece(message.id, text, 0, 0, 0, "stop")
        prompt, _ = self._prompt(message.asked)
        return wire.Piece(message.id, "", 0, 0, 0, "stop", tokens=shown_ids(prompt.tokens))

    def _breakers(self, params: SamplingParams) -> Breakers:
        """The tokens of the sequence breakers; those of the last request are kept, since few ask for others."""
        if not params.dry_multiplier:
            return NO_BREAKERS
        texts = params.dry_sequence_breakers
        if texts not in self._breakers_of:
            self._breakers_of = {texts: find_breakers(texts, self._tokenizer, self._pieces)}
        return self._breakers_of[texts]

    @cached_property
    def _pieces(self) -> list[bytes]:
        return [self._tokenizer.piece(t) for t in range(self._vocab_size)]

    def _checked(self, adapters: tuple[Adapter, ...]) -> AdapterSet:
        """The adapters as a set; each file's numbers are looked at once, before native code reads them."""
        for adapter in adapters:
            if adapter.digest not in self._sound_adapters:
                check_finite(read_lora(read_gguf(Path(adapter.path), what="The adapter"), what="The adapter"))
                self._sound_adapters.add(adapter.digest)
        return adapter_set(adapters)

    def _prefix(self, message: wire.Generate) -> list[int]:
        """What all conversations that begin with these messages share: where two part whose users write otherwise."""
        one, other = (
            self._tokens(msgspec.structs.replace(message, messages=[*(message.messages or ()), _from_user(text)]))
            for text in ("a", "1")
        )
        prefix = one[: common_prefix(one, other, limit=len(one))]
        if len(prefix) < MIN_STATE_TOKENS:
            raise InvalidRequest(
                f"What such conversations share is {len(prefix)} tokens: that is computed as fast as it is restored.",
                field="system", hint=f"Pin prompts of at least {MIN_STATE_TOKENS} tokens.",
            )  # fmt: skip
        return prefix

    def _prompt(self, message: wire.Generate) -> tuple[Prompt, Dialogue | None]:
        if message.pin:
            return Prompt(self._prefix(message)), None
        room, num_dropped = self._context_tokens - self._num_reserved(message), 0
        if message.messages is None:
            return self._continuer.prompt(message, room=room), None
        if message.truncates:
            message, num_dropped = self._cut(message, room)
        dialogue = self._dialogue(message)
        if not message.images:
            return Prompt(encode_prompt(self._tokenizer, dialogue.text), num_dropped=num_dropped), dialogue
        texts = split_images(dialogue.text, num_images=len(message.images))
        parts = [encode_prompt(self._tokenizer, text, is_first=not i) for i, text in enumerate(texts)]
        return Prompt(*self._images.place(message.images, parts)), dialogue

    def _num_reserved(self, message: wire.Generate) -> int:
        """Tokens that are to be left for the answer, where a prompt is cut for it."""
        if message.max_tokens and not message.cuts_max_tokens:
            return message.max_tokens
        return min(message.max_tokens or UNSTATED_TOKENS, self._context_tokens // 4) if message.answers else 0

    def _cut(self, message: wire.Generate, room: int) -> tuple[wire.Generate, int]:
        """A conversation without its oldest messages, and how many tokens went."""
        if message.images:
            raise InvalidRequest(
                "'truncation' is not done for conversations with images.", field="truncation", hint="Leave it out."
            )
        kept, num_dropped = cut_conversation(
            message.messages or [], lambda left: self._tokens(msgspec.structs.replace(message, messages=left)),
            room=room, limit=self._context_tokens,
        )  # fmt: skip
        return msgspec.structs.replace(message, messages=kept), num_dropped

    def _dialogue(self, message: wire.Generate) -> Dialogue:
        messages = message.messages or []
        if len(messages) > self._context_tokens:  # each takes a token at least
            raise ContextOverflow(
                limit_tokens=self._context_tokens, prompt_tokens=len(messages), completion_tokens=0
            )  # fmt: skip
        self._ruler.check_size(
            num_chars(message), max((t for m in messages for t in _texts(m.content)), key=len, default="")
        )
        dialogue = self.dialogues.of(message)
        self._ruler.check(dialogue.text)
        if self._bos and dialogue.text.startswith(self._bos) and self._adds_bos():
            return replace(dialogue, text=dialogue.text[len(self._bos) :])
        return dialogue

    def _tokens(self, message: wire.Generate) -> list[int]:
        return encode_prompt(self._tokenizer, self._dialogue(message).text)

    def _adds_bos(self) -> bool:
        """Whether the tokenizer puts BOS in front itself, so that a template's own would stand there twice."""
        return bool(self._tokenizer.encode("", add_special=True, parse_special=False))


class Worker:
    """One model, its engine and its connection."""

    def __init__(self, connection: Connection, box: BlackBox) -> None:
        self._connection = connection
        self._sink = SocketSink(connection)
        self._box = box
        self._serving: Engine | EmbedEngine
        self._speller: Speller
        self._take: Callable[[wire.Ask], None]
        self._promised_bytes: Callable[[], int] = lambda: 0

    def serve(self, load: wire.Load) -> None:
        """Load the model, say so, and answer until told to stop. A load that fails is told and ends the process."""
        started = time.monotonic()
        if load.pooling:
            self._serve_encoder(load, started)
            return
        from runtime.backends.llama_cpp import reason_for_cells

        try:
            files = _state_files(load)
            backend = self._open(load, disk_bytes=_disk_bytes(load) if files else 0)
            self._prompts = PromptMaker(
                backend, image_bytes=self._image_bytes, template=load.template, template_digest=load.template_digest
            )
        except EdgeError as e:
            self._connection.send(wire.Step([], [failed(0, e)]))
            sys.exit(1)
        drafter, problem = self._open_drafter(load, backend)
        self._tell_promised()
        self._engine = Engine(
            backend, self._sink, max_queue=load.max_queue, governor=_governor(load), observer=self._box,
            speculator=AdaptiveSpeculator(drafter) if load.speculation == "auto" else None,
            token_interval_s=load.token_interval_ms / 1000, disk=files,
        )  # fmt: skip
        self._serving, self._take = self._engine, self._generate
        if files is not None:
            self._adopt(files)
        can, facts = backend.capabilities, backend.facts
        self._speller = Speller(backend.tokenizer, vocab_size=facts.vocab_size, context_tokens=can.context_tokens)
        self._connection.send(
            wire.Ready(
                facts.description, facts.architecture, facts.num_parameters, can.context_tokens, can.num_cells,
                can.num_slots, facts.vocab_size, bool(load.template or facts.chat_template), _build(),
                time.monotonic() - started, load.draft if drafter is not None else "", problem,
                self._prompts.dialogues.variables, self._prompts.dialogues.thinks,
                reason_for_cells(can.num_cells, asked=load.context_tokens, trained=facts.trained_context_tokens),
                wire.Budgets(
                    can.num_cells * can.states.cell_bytes, can.states.memory_bytes, can.states.disk_bytes,
                    can.adapter_bytes,
                ),
            )
        )  # fmt: skip
        limit_memory(self._budget_bytes, promised_bytes=self._promised_bytes())
        self._start_threads()
        self._engine.run()
        if files is not None:
            self._engine.persist()
            files.close(timeout_s=PERSIST_S)
        if drafter is not None:
            drafter.close()
        backend.close()

    def _serve_encoder(self, load: wire.Load, started: float) -> None:
        """The same for a model that makes embeddings or scores."""
        from runtime.backends.llama_encoder import LlamaEncoder, LlamaOptions

        options = LlamaOptions(
            threads=load.threads or usable_cores(),
            num_slots=0,
            step_tokens=0,
            context_tokens=load.context_tokens,
            available_bytes=available_bytes() - load.reserved_bytes,
        )
        try:
            backend = LlamaEncoder(Path(load.path), options, on_progress=self._reporter())
        except EdgeError as e:
            self._connection.send(wire.Step([], [failed(0, e)]))
            sys.exit(1)
        engine = EmbedEngine(
            backend, VectorSink(self._connection), max_queue=load.max_queue, governor=_governor(load),
            observer=self._box,
        )  # fmt: skip
        texts = TextMaker(backend)

        def take(message: wire.Ask) -> None:
            if isinstance(message, wire.Embed):
                engine.submit(texts.request(message))
            else:
                raise InvalidRequest("This model makes no text.", field="model")

        self._serving, self._take = engine, take
        can, facts = backend.capabilities, backend.facts
        self._speller = Speller(backend.tokenizer, vocab_size=facts.vocab_size, context_tokens=can.max_text_tokens)
        self._connection.send(
            wire.Ready(
                facts.description, facts.architecture, facts.num_parameters, can.max_text_tokens, 0,
                can.max_step_texts, facts.vocab_size, False, _build(), time.monotonic() - started,
            )
        )  # fmt: skip
        limit_memory(0)
        self._start_threads()
        engine.run()
        backend.close()

    def _start_threads(self) -> None:
        gc.freeze()  # what the start made stays: later collections need not look at it
        gc.enable()
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _adopt(self, files: StateFiles) -> None:
        for found in sorted(files.open(), key=lambda f: not f.pin):  # where the budget shrank, pins come first
            if not self._engine.adopt(found.tokens, found.scope, uses=found.uses, pin=found.pin):
                if found.pin:
                    log.warning("the pinned prefix %s has no room any more and is removed", found.pin)
                files.remove(found.scope, found.tokens)

    def _open_drafter(self, load: wire.Load, backend: LlamaBackend) -> tuple[ModelDrafter | None, str]:
        """The draft model, in memory that is left; or why the model is served without one."""
        from runtime.backends.llama_draft import open_drafter

        if not load.draft_path:
            return None, load.draft_problem
        # The model's weights are pages of a file that still count as available, and most of its cells are unused.
        room = available_bytes() - load.reserved_bytes - self._budget_bytes - Path(load.path).stat().st_size
        room -= backend.promised_bytes()
        try:
            threads = load.threads or usable_cores()
            return open_drafter(Path(load.draft_path), backend, threads=threads, available_bytes=max(0, room)), ""
        except EdgeError as e:
            log.warning("%s is served without its draft model %s: %s", load.ref, load.draft, e.message)
            return None, e.message

    def _open(self, load: wire.Load, *, disk_bytes: int) -> LlamaBackend:
        from runtime.backends.llama_cpp import UBATCH_TOKENS, LlamaBackend, LlamaOptions

        options = LlamaOptions(
            threads=load.threads or usable_cores(),
            num_slots=load.num_slots,
            step_tokens=max(load.step_tokens, load.num_slots),
            context_tokens=load.context_tokens,
            available_bytes=available_bytes() - load.reserved_bytes,
            state_bytes=load.state_bytes or available_bytes() // 16,
            adapter_bytes=available_bytes() // 8,
            decode_threads=load.decode_threads,
            ubatch_tokens=load.ubatch_tokens or UBATCH_TOKENS,
            flash_attention=load.flash_attention,
            state_disk_bytes=disk_bytes,
            projector=Path(load.projector) if load.projector else None,
            projector_id=Path(load.projector).name,
        )
        self._image_bytes = min(MAX_WAITING_IMAGE_BYTES, available_bytes() // 8) if load.projector else 0
        self._budget_bytes = options.state_bytes + options.adapter_bytes
        if load.projector:
            self._budget_bytes += self._image_bytes + DECODING_BYTES
        backend = LlamaBackend(Path(load.path), options, on_progress=self._reporter())
        self._promised_bytes = backend.promised_bytes
        self._tell_promised()
        return backend

    def _tell_promised(self) -> None:
        """Before the first heartbeat does: meanwhile another model may be loaded."""
        self._connection.send(wire.Loading(1.0, self._promised_bytes()))

    def _reporter(self) -> Callable[[float], None]:
        """Tells the front how far a load is, each twentieth."""
        last = 0.0

        def report(fraction: float) -> None:
            nonlocal last
            if fraction - last >= 0.05:
                last = fraction
                self._connection.send(wire.Loading(fraction))

        return report

    def _read(self) -> None:
        while (message := self._connection.receive()) is not None:
            match message:
                case wire.Generate() | wire.Embed() | wire.Render() | wire.Spell():
                    self._submit(message)
                case wire.Cancel():
                    self._sink.drop(message.id)
                    self._serving.cancel(RequestId(message.id))
                case wire.Hold():
                    if isinstance(self._serving, Engine):
                        self._serving.hold(RequestId(message.id), is_held=message.is_held)
                case wire.AskPins():
                    self._ask_pins(message)
                case wire.Stop():
                    self._serving.stop()
                case wire.Load():
                    raise BackendError("A worker loads one model only.")
        os._exit(0)  # the front is gone, and with it everybody who could want an answer

    def _generate(self, message: wire.Ask) -> None:
        match message:
            case wire.Generate():
                request, reader = self._prompts.request(message)
                if reader is not None:
                    self._sink.expect(message.id, reader)
                self._engine.submit(request)
            case wire.Render():
                self._connection.send(wire.Step([self._prompts.render(message)], []))
            case _:
                raise InvalidRequest("This model makes no embeddings.", field="model")

    def _submit(self, message: wire.Ask) -> None:
        self._box.begin_text(message.id)
        try:
            if isinstance(message, wire.Spell):
                self._connection.send(wire.Step([self._speller.spell(message)], []))
            else:
                self._take(message)
        except EdgeError as e:
            self._connection.send(wire.Step([], [failed(message.id, e)]))
        except RecursionError:
            deep = InvalidRequest("The request is nested too deeply.", hint="Send it flatter.")
            self._connection.send(wire.Step([], [failed(message.id, deep)]))
        self._box.end_text()

    def _ask_pins(self, message: wire.AskPins) -> None:
        if isinstance(self._serving, Engine):
            self._serving.ask_pins(partial(self._send_pins, message.id), remove=message.remove)
        else:
            self._send_pins(message.id, [], False)  # who makes no text has no use for prefixes

    def _send_pins(self, request_id: int, pins: list[Pin], is_removed: bool) -> None:
        self._connection.send(wire.Pins(request_id, pins, is_removed))

    def _beat(self) -> None:
        page = resource.getpagesize()
        steps, promised = -1, 0
        while True:
            stats = self._serving.stats()
            if stats.steps != steps:
                steps, promised = stats.steps, self._promised_bytes()
            resident = int(Path("/proc/self/statm").read_text("ascii").split()[1]) * page
            q = stats.queues
            self._connection.send(
                wire.Heartbeat(
                    stats.steps, q.num_waiting, q.num_running, q.num_preemptions, q.cells_used,
                    stats.prompt_tokens, stats.output_tokens, resident,
                    stats.speculation.num_drafted, stats.speculation.num_accepted,
                    stats.speculation.num_drafted_by_model, stats.speculation.num_accepted_by_model, promised,
                )
            )  # fmt: skip
            time.sleep(HEARTBEAT_S)


def _governor(load: wire.Load) -> Governor:
    return Governor(max_threads=load.threads or usable_cores(), cores=len(os.sched_getaffinity(0)), quota=cpu_quota())


def _state_files(load: wire.Load) -> StateFiles | None:
    """Where states of this model outlive the process; None where they do not."""
    from runtime.backends.llama_cpp import STATE_LAYOUT

    if load.state_disk_bytes == 0:
        return None
    home = Path(load.home)
    try:
        return open_states(
            states_root(home),
            home / "state.key",
            weights_digest=load.weights_digest,
            build=_build(),
            settings=f"{STATE_LAYOUT}, flash attention {load.flash_attention}",
        )
    except OSError as e:
        log.warning("states are not kept on the disk: %s", e)
        return None


def _disk_bytes(load: wire.Load) -> int:
    if load.state_disk_bytes > 0:
        return load.state_disk_bytes
    return min(MAX_DISK_BYTES, shutil.disk_usage(load.home).free // 20)


def _build() -> str:
    from edge.native.llama import build_info

    return build_info()


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel end this process when its parent ends, also by SIGKILL (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)


def limit_process() -> None:
    """Few files, no core dumps, and first in the kernel's line when memory runs out."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    path = Path("/proc/self/oom_score_adj")
    try:
        path.write_text(str(max(OOM_SCORE, int(path.read_text("ascii")))), "ascii")
    except OSError as e:  # a container may hide it; the kernel then chooses by size, which is the worker too
        log.warning("the kernel was not told to end this process first: %s", e)


def limit_memory(budget_bytes: int, *, promised_bytes: int = 0) -> None:
    """Bound what the process may take from now on (RLIMIT_DATA: not the weights, which are mapped from their file).

    Args:
        promised_bytes: Of what it has already, what is not resident yet, so that it looks free.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    room_bytes = (available_bytes() - promised_bytes) // 2
    most = data_bytes() + budget_bytes + min(MAX_GROWTH_BYTES, max(MIN_GROWTH_BYTES, room_bytes))
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _die(args: threading.ExceptHookArgs) -> None:
    """A thread that ends by surprise would leave the process deaf or silent: the front restarts it instead."""
    log.critical("thread failed", exc_info=args.exc_value)
    os._exit(70)


def main() -> None:
    """Serve on an inherited socket; see :mod:`runtime.start`."""
    fd, box_fd, parent = (int(arg) for arg in sys.argv[1:4])
    die_with_parent(parent)
    limit_process()
    give_large_blocks_back()
    for asked in (signal.SIGINT, signal.SIGTERM):  # a terminal or a service manager signals us too; the front drains
        signal.signal(asked, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    threading.excepthook = _die
    sys.setswitchinterval(0.001)  # the engine's thread gets the interpreter back within a millisecond
    connection = Connection(socket.socket(fileno=fd))
    first = connection.receive()
    if not isinstance(first, wire.Load):
        sys.exit(2)
    Worker(connection, BlackBox(box_fd)).serve(first)
