"""The embedding engine's laws, on an encoder that tells what it was given."""

from __future__ import annotations

import threading

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import BackendError, ContextOverflow, InvalidRequest, QueueFull
from runtime import wire
from runtime.backends.encoder import EncoderText
from runtime.embedding import MAX_WAITING_BYTES, EmbedEngine, EmbedRequest, normalized, scores
from runtime.packing import Packer, Place
from runtime.request import RequestId
from runtime.texts import TextMaker
from tests.runtime.encoders import WIDTH, CountingEncoder, KeepingSink
from tests.support import wait_until

Lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def text(*tokens: int) -> EncoderText:
    return EncoderText(np.array(tokens, np.int32))


def request(number: int, *lengths: int) -> EmbedRequest:
    return EmbedRequest(RequestId(number), [text(*range(n)) for n in lengths])


# ---------------------------------------------------------------- packing


@given(requests=st.lists(Lengths, min_size=1, max_size=8), step_tokens=st.integers(1, 50), step_texts=st.integers(1, 9))
def test_every_text_is_taken_once_within_the_limits(
    requests: list[list[int]], step_tokens: int, step_texts: int
) -> None:
    packer = Packer(step_tokens, step_texts)
    for number, lengths in enumerate(requests):
        packer.add(RequestId(number), lengths)
    taken: list[Place] = []
    while places := packer.next_step():
        sizes = [requests[p.request_id][p.index] for p in places]
        assert len(places) <= step_texts
        assert len(places) == 1 or sum(sizes) <= step_tokens
        taken += places
    everything = {Place(RequestId(r), i) for r, lengths in enumerate(requests) for i in range(len(lengths))}
    assert len(taken) == len(everything)
    assert set(taken) == everything
    assert packer.num_requests == packer.num_tokens == 0


@given(archive=st.lists(st.integers(1, 16), min_size=50, max_size=200), before=st.integers(0, 10), size=Lengths)
def test_a_late_request_gets_its_share(archive: list[int], before: int, size: list[int]) -> None:
    """Beside one that asked for much, it waits for no more than as many tokens of it as it has itself, and a step."""
    packer = Packer(16, 4)
    big, small = RequestId(1), RequestId(2)
    packer.add(big, archive)
    for _ in range(before):
        packer.next_step()
    packer.add(small, size)
    left, foreign = len(size), 0
    while left:
        places = packer.next_step()
        left -= sum(p.request_id == small for p in places)
        foreign += sum(archive[p.index] for p in places if p.request_id == big)
    assert foreign <= sum(size) + 16 * (len(size) + 1)


@given(requests=st.lists(Lengths, min_size=2, max_size=5), cancelled=st.integers(0, 4), after=st.integers(0, 3))
def test_a_cancelled_request_is_never_taken(requests: list[list[int]], cancelled: int, after: int) -> None:
    packer = Packer(16, 4)
    for number, lengths in enumerate(requests):
        packer.add(RequestId(number), lengths)
    for _ in range(after):
        packer.next_step()
    packer.cancel(RequestId(cancelled))
    while places := packer.next_step():
        assert all(p.request_id != cancelled for p in places)


# ---------------------------------------------------------------- the engine


@given(requests=st.lists(Lengths, min_size=1, max_size=6), cancelled=st.sets(st.integers(0, 5)))
def test_each_request_gets_its_own_vectors_in_order(requests: list[list[int]], cancelled: set[int]) -> None:
    encoder, sink = CountingEncoder(), KeepingSink()
    engine = EmbedEngine(encoder, sink, max_queue=10)
    made = [request(number, *lengths) for number, lengths in enumerate(requests)]
    for one in made:
        engine.submit(one)
    engine.advance()
    before = set(sink.done)
    for number in cancelled:
        engine.cancel(RequestId(number))
    while engine.advance():
        pass
    for one in made:
        if one.id in cancelled and one.id not in before:
            assert one.id not in sink.done
        else:
            expected = normalized(np.array([encoder.vector(t) for t in one.texts], np.float32))
            np.testing.assert_allclose(sink.rows(one.id), expected, rtol=1e-5)
    assert not sink.failures
    assert engine.stats().queues.num_waiting == engine.stats().queues.num_running == 0


def test_texts_of_several_requests_share_a_step() -> None:
    encoder, sink = CountingEncoder(), KeepingSink()
    engine = EmbedEngine(encoder, sink, max_queue=10)
    for number in range(4):
        engine.submit(request(number, 4))
    engine.advance()
    assert encoder.steps == [[4, 4, 4, 4]]
    assert set(sink.done) == {0, 1, 2, 3}


def test_a_question_waits_one_step_beside_an_archive() -> None:
    encoder, sink = CountingEncoder(), KeepingSink()
    engine = EmbedEngine(encoder, sink, max_queue=10)
    engine.submit(request(1, *[8] * 1000))
    engine.advance()
    engine.submit(request(2, 3))
    engine.advance()
    assert 2 in sink.done
    assert 1 not in sink.done


def test_a_full_queue_is_an_answer() -> None:
    sink = KeepingSink()
    engine = EmbedEngine(CountingEncoder(), sink, max_queue=2)
    for number in range(2):
        engine.submit(request(number, *[8] * 4))
    with pytest.raises(QueueFull):
        engine.submit(request(2, 8))
    engine.advance()
    assert sink.accepted == [0, 1]
    engine.cancel(RequestId(0))
    engine.advance()
    engine.submit(request(3, 8))


def test_the_queue_is_full_by_bytes_before_any_is_looked_at() -> None:
    """Texts of one token each are small, but their vectors are not; and the engine may be in a step of seconds."""
    encoder, texts = CountingEncoder(width=1024), [text(1)] * 2048
    engine, most = EmbedEngine(encoder, KeepingSink(), max_queue=1000), MAX_WAITING_BYTES // (2048 * 1024 * 4)

    def fill() -> int:
        for number in range(most + 1):
            try:
                engine.submit(EmbedRequest(RequestId(number), texts))
            except QueueFull:
                return number
        return most + 1

    num_taken = fill()
    assert 1 < num_taken <= most
    for number in range(num_taken):
        engine.cancel(RequestId(number))
    engine.advance()
    assert fill() == num_taken


def test_a_failed_step_fails_its_requests_and_no_others() -> None:
    encoder, sink = CountingEncoder(), KeepingSink()
    engine = EmbedEngine(encoder, sink, max_queue=10)
    encoder.fails = 1
    engine.submit(request(1, 8, 8))
    engine.submit(request(2, 8, 8))
    engine.advance()
    engine.submit(request(3, 8))
    while engine.advance():
        pass
    assert set(sink.failures) == {1, 2}
    assert set(sink.done) == {3}


def test_failing_again_and_again_ends_the_engine() -> None:
    encoder, sink = CountingEncoder(), KeepingSink()
    engine = EmbedEngine(encoder, sink, max_queue=10)
    encoder.fails = 3
    for number in range(2):
        engine.submit(request(number, 16))
        engine.advance()
    engine.submit(request(9, 16))
    with pytest.raises(BackendError):
        engine.advance()
    assert set(sink.failures) == {0, 1, 9}


def test_it_runs_on_a_thread_until_stopped() -> None:
    sink = KeepingSink()
    engine = EmbedEngine(CountingEncoder(), sink, max_queue=10)
    thread = threading.Thread(target=engine.run)
    thread.start()
    engine.submit(request(1, 3, 4, 5))
    wait_until(lambda: 1 in sink.done)
    engine.stop()
    thread.join(10)
    assert not thread.is_alive()


def test_vectors_have_length_one_also_when_cut() -> None:
    vectors = np.array([[3, 4, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], np.float32)
    np.testing.assert_allclose(normalized(vectors)[:2], [[0.6, 0.8, 0, 0], [0, 0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(normalized(vectors, 2), axis=1), [1, 0, 1], atol=1e-6)


def test_scores_are_probabilities_unless_asked_for_raw() -> None:
    values = np.array([[-200.0], [0.0], [3.0]], np.float32)
    assert scores(values, raw=True).ravel().tolist() == [-200.0, 0.0, 3.0]
    np.testing.assert_allclose(scores(values, raw=False).ravel(), [0, 0.5, 0.95257413], atol=1e-6)
    np.testing.assert_allclose(scores(np.array([[0.7, 0.3]], np.float32), raw=False), [[0.7]], atol=1e-6)


# ---------------------------------------------------------------- texts


def letters(n: int) -> str:
    return chr(0x4E00 + 1) * n


def make(*texts: str | list[int], **more: int | bool) -> EmbedRequest:
    message = wire.Embed(1, list(texts))
    return TextMaker(CountingEncoder()).request(msgspec.structs.replace(message, **more))


def test_a_long_text_is_an_error_or_cut_and_said() -> None:
    with pytest.raises(ContextOverflow, match=r"'input\[1\]' has 41") as caught:
        make(letters(40), letters(41))
    assert caught.value.field == "input[1]"
    made = make(letters(40), letters(41), truncate=True)
    assert [len(t.tokens) for t in made.texts] == [40, 40]
    assert made.truncated == (1,)
    made = make(letters(3), letters(9), truncate=True, max_tokens=5)
    assert [len(t.tokens) for t in made.texts] == [3, 5]
    assert made.truncated == (1,)


def test_a_text_of_megabytes_is_not_tokenized_to_the_end() -> None:
    made = make(letters(1 << 20), truncate=True)
    assert (len(made.texts[0].tokens), made.truncated) == (40, (0,))


UNREADABLE: list[tuple[str | list[int], dict[str, int], str]] = [
    ("", {}, "input[0]"),
    ([], {}, "input[0]"),
    ([97], {}, "input"),
    ("一", {"dimensions": 5}, "dimensions"),
]


@pytest.mark.parametrize(("text", "more", "field"), UNREADABLE)
def test_what_cannot_be_read_is_refused(text: str | list[int], more: dict[str, int], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make(text, **more)
    assert caught.value.field == field


def test_as_many_dimensions_as_there_are() -> None:
    assert make([1, 2], dimensions=WIDTH).dimensions == WIDTH
