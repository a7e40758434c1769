"""Requests that harm the worker, for tests of the fence around it.

A process of the product whose PYTHONPATH names this directory runs this file first. In a worker, a stop string chooses
the harm; in every other process nothing is changed.
"""

from __future__ import annotations

import os
import struct
import sys
import time

if "runtime.start" in sys.orig_argv:
    import numpy as np
    from numpy.typing import NDArray

    from runtime.backends.llama_cpp import LlamaBackend
    from runtime.backends.llama_vision import LlamaVision
    from runtime.batch import Batch
    from runtime.images import Tile
    from runtime.request import TokenId
    from runtime.sequence import Sequence

    _eaten: list[bytearray] = []
    _decode = LlamaBackend.decode

    def _eat() -> None:
        """Take memory until there is none."""
        while True:
            block = bytearray(64 << 20)
            block[::4096] = b"x" * len(block[::4096])
            _eaten.append(block)

    def _harm(sequence: Sequence) -> None:
        for word in sequence.request.stop:
            kind, _, at = word.partition("@")
            if sequence.num_output < int(at or 0):
                continue
            if kind == "bomb:abort":
                os.abort()
            elif kind == "bomb:hang":
                time.sleep(1000)
            elif kind == "bomb:eat":
                _eat()

    def _harmful_decode(self: LlamaBackend, batch: Batch) -> NDArray[np.float32]:
        for chunk in batch.chunks:
            _harm(chunk.sequence)
        return _decode(self, batch)

    LlamaBackend.decode = _harmful_decode

    _read, _encode = LlamaVision.read, LlamaVision.encode
    _doomed: list[object] = []

    def _harmful_read(self: LlamaVision, data: bytes) -> list[list[TokenId] | Tile]:
        """A PNG of 13 by 17 pixels ends the decoder, one of 13 by 19 the encoder."""
        if data[16:24] == struct.pack(">II", 13, 17):
            os.abort()
        parts = _read(self, data)
        if data[16:24] == struct.pack(">II", 13, 19):
            _doomed.extend(parts)
        return parts

    def _harmful_encode(self: LlamaVision, tile: Tile) -> None:
        if any(tile is doomed for doomed in _doomed):
            os.abort()
        _encode(self, tile)

    LlamaVision.read, LlamaVision.encode = _harmful_read, _harmful_encode

    # A model whose name begins with `sick` is: `sick:load-abort`, `sick:load-hang`, `sick:slow`, and from its 21st step
    # on `sick:abort`, `sick:hang` and `sick:nan`.
    from runtime import wire
    from runtime.worker import Worker

    _serve = Worker.serve
    _steps = 0

    def _sick_serve(self: Worker, load: wire.Load) -> None:
        name, _, harm = load.ref.partition(":")
        if name == "sick":
            if harm == "load-abort":
                os.abort()
            if harm == "load-hang":
                time.sleep(1000)
            _sickness.append(harm)
            LlamaBackend.decode = _sick_decode
        _serve(self, load)

    _sickness: list[str] = []

    def _sick_decode(self: LlamaBackend, batch: Batch) -> NDArray[np.float32]:
        global _steps
        _steps += 1
        (harm,) = _sickness
        if harm == "slow":
            time.sleep(0.7)
        if _steps > 20 and harm == "abort":
            os.abort()
        if _steps > 20 and harm == "hang":
            time.sleep(1000)
        scores = _harmful_decode(self, batch)
        return scores * np.float32("nan") if _steps > 20 and harm == "nan" else scores

    Worker.serve = _sick_serve
