"""The running appliance through the clients that programs are written with. None of them finds another host."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from importlib import import_module
from typing import Annotated, Any

import anthropic
import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from tests.support import DEFAULT_MODEL, RunningAppliance

EMBEDDER = "minilm:l6-v2"
HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Name a colour."}]
ABOUT_ANNA = "Anna is 31 years old."
ANNA: list[ChatCompletionMessageParam] = [{"role": "user", "content": ABOUT_ANNA}]

# What libraries deprecate of each other is theirs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Person(pydantic.BaseModel):
    """A person."""

    model_config = pydantic.ConfigDict(extra="forbid")

    name: Annotated[str, pydantic.Field(max_length=12)]
    age: Annotated[int, pydantic.Field(ge=0, le=150)]


@pytest.fixture(autouse=True)
def nobody_else_is_asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Some of these libraries tell their makers how they are used, or fetch lists of prices."""
    found: list[object] = []
    resolve = socket.getaddrinfo

    def only_loopback(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in ("127.0.0.1", "localhost", b"127.0.0.1"):
            found.append(host)
            raise socket.gaierror(f"no test may ask {host!r}")
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", only_loopback)
    for name in ("LITELLM_LOCAL_MODEL_COST_MAP", "DO_NOT_TRACK", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "True")
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2", "LITELLM_TELEMETRY"):
        monkeypatch.setenv(name, "False")
    yield
    assert found == []


@pytest.fixture
def v1(appliance: RunningAppliance) -> str:
    """Where OpenAI's clients shall look."""
    return f"{appliance.url}/v1"


# ---------------------------------------------------------------- openai


@pytest.fixture
def client(v1: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=v1, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_openai_streams_as_it_answers(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=DEFAULT_MODEL, messages=HI, temperature=0, max_completion_tokens=4)
    with client.chat.completions.stream(
        model=DEFAULT_MODEL, messages=HI, temperature=0, max_completion_tokens=4, stream_options={"include_usage": True}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.current_completion_snapshot
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert final.usage is not None
    assert whole.usage is not None
    assert final.usage.completion_tokens == whole.usage.completion_tokens == 4
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)


def test_openai_parses_an_answer_into_a_class(client: openai.OpenAI) -> None:
    completion = client.chat.completions.parse(
        model=DEFAULT_MODEL, messages=ANNA, response_format=Person, temperature=0, max_completion_tokens=64
    )
    assert isinstance(completion.choices[0].message.parsed, Person)
    with client.chat.completions.stream(
        model=DEFAULT_MODEL, messages=ANNA, response_format=Person, temperature=0, max_completion_tokens=64
    ) as stream:
        streamed = stream.get_final_completion().choices[0].message.parsed
    assert streamed == completion.choices[0].message.parsed
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model=DEFAULT_MODEL, messages=ANNA, response_format=Person, max_completion_tokens=2
        )


def test_openai_has_vectors_and_models(client: openai.OpenAI) -> None:
    texts = ["a lighthouse", "a harbour"]
    as_text = client.embeddings.create(model=EMBEDDER, input=texts)  # the client asks for base64
    as_numbers = client.embeddings.create(model=EMBEDDER, input=texts, encoding_format="float")
    assert [d.index for d in as_text.data] == [0, 1]
    assert len(as_text.data[0].embedding) == len(as_numbers.data[0].embedding) == 384
    pairs = zip(as_text.data[1].embedding, as_numbers.data[1].embedding, strict=True)
    assert all(abs(a - b) < 1e-6 for a, b in pairs)
    assert DEFAULT_MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(DEFAULT_MODEL).object == "model"


def test_openai_continues_a_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=DEFAULT_MODEL, prompt="Once upon", max_tokens=4, temperature=0)
    chunks = client.completions.create(
        model=DEFAULT_MODEL, prompt="Once upon", max_tokens=4, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_openai_has_a_class_for_each_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="none:such", messages=HI)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=DEFAULT_MODEL, messages=HI, temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="maximum context length") as long:
        client.chat.completions.create(model=DEFAULT_MODEL, messages=HI, max_completion_tokens=10_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="edge_AAAA_wrong").models.list()


async def test_openai_asks_without_waiting(v1: str) -> None:
    async with openai.AsyncOpenAI(base_url=v1, api_key="none", max_retries=0, timeout=60) as client:
        whole = await client.chat.completions.create(
            model=DEFAULT_MODEL, messages=HI, temperature=0, max_completion_tokens=4
        )
        async with client.chat.completions.stream(
            model=DEFAULT_MODEL, messages=HI, temperature=0, max_completion_tokens=4
        ) as stream:
            text = "".join([event.delta async for event in stream if event.type == "content.delta"])
        models = [model.id async for model in client.models.list()]
    assert text == whole.choices[0].message.content
    assert EMBEDDER in models


def test_openai_calls_tools(client: openai.OpenAI) -> None:
    tool: ChatCompletionToolParam = {
        "type": "function", "function": {"name": "keep", "strict": True, "parameters": Person.model_json_schema()},
    }  # fmt: skip
    answer = client.chat.completions.create(
        model=DEFAULT_MODEL,
        messages=ANNA,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_completion_tokens=96,
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "keep"
    assert Person.model_validate_json(call.function.arguments)


def test_openai_has_responses(client: openai.OpenAI) -> None:
    responses: Any = client.responses  # whose overloads no dict of fields satisfies
    ask: dict[str, Any] = {"model": DEFAULT_MODEL, "temperature": 0, "max_output_tokens": 16}
    whole = responses.create(input="Name a colour.", **ask)
    with responses.stream(input="Name a colour.", **ask) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == whole.output_text != ""
    again = responses.create(input="Another one.", previous_response_id=whole.id, **ask)
    assert again.previous_response_id == whole.id
    parsed = responses.parse(input=ABOUT_ANNA, text_format=Person, **{**ask, "max_output_tokens": 64})
    assert isinstance(parsed.output_parsed, Person)
    responses.delete(whole.id)
    with pytest.raises(openai.NotFoundError):
        responses.retrieve(whole.id)


# ---------------------------------------------------------------- anthropic


def test_anthropic_asks_streams_and_counts(appliance: RunningAppliance) -> None:
    hi: anthropic.types.MessageParam = {"role": "user", "content": "Name a colour."}
    greedy = {"extra_body": {"temperature": 0}}  # its client leaves it to who knows
    ask: dict[str, Any] = {"model": DEFAULT_MODEL, "messages": [hi], "max_tokens": 4, **greedy}
    with anthropic.Anthropic(base_url=appliance.url, api_key="none", max_retries=0, timeout=60) as opened:
        client: Any = opened
        whole = client.messages.create(**ask)
        with client.messages.stream(**ask) as stream:
            text = "".join(stream.text_stream)
        counted = client.messages.count_tokens(model=DEFAULT_MODEL, messages=[hi])
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**{**ask, "model": "none:such"})
        with pytest.raises(anthropic.BadRequestError, match="temperature"):
            client.messages.create(**{**ask, "extra_body": {"temperature": 9}})
    assert whole.content[0].type == "text"
    assert text == whole.content[0].text
    assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 4)
    assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)


# ---------------------------------------------------------------- litellm


@pytest.fixture
def litellm() -> Any:
    """Untyped, and slow to import: only here."""
    module: Any = import_module("litellm")
    module.telemetry = False
    module.suppress_debug_info = True
    return module


def test_litellm_asks_for_answers_streams_and_vectors(litellm: Any, v1: str) -> None:
    to: dict[str, Any] = {"api_base": v1, "api_key": "none", "num_retries": 0}
    ask = {"model": f"openai/{DEFAULT_MODEL}", "messages": HI, "max_tokens": 4, "temperature": 0, **to}
    whole = litellm.completion(**ask)
    chunks = list(litellm.completion(**ask, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 4
    found = litellm.embedding(model=f"openai/{EMBEDDER}", input=["a harbour"], encoding_format="float", **to)
    assert len(found.data[0]["embedding"]) == 384
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**{**ask, "max_tokens": 10_000})


# ---------------------------------------------------------------- langchain


def test_langchain_invokes_streams_and_has_structured_answers(v1: str) -> None:
    library = import_module("langchain_openai")
    model = library.ChatOpenAI(base_url=v1, api_key="none", model=DEFAULT_MODEL, temperature=0, max_tokens=4)
    whole = model.invoke("Name a colour.")
    assert whole.usage_metadata["output_tokens"] == 4
    assert "".join(chunk.content for chunk in model.stream("Name a colour.")) == whole.content
    longer = library.ChatOpenAI(base_url=v1, api_key="none", model=DEFAULT_MODEL, temperature=0, max_tokens=96)
    assert isinstance(longer.with_structured_output(Person, method="json_schema").invoke(ABOUT_ANNA), Person)
    bound = longer.bind_tools([Person], tool_choice="Person")
    assert [call["name"] for call in bound.invoke(ABOUT_ANNA).tool_calls] == ["Person"]
    embeddings = library.OpenAIEmbeddings(base_url=v1, api_key="none", model=EMBEDDER, check_embedding_ctx_length=False)
    assert len(embeddings.embed_query("a harbour")) == 384


# ---------------------------------------------------------------- instructor


def test_instructor_makes_a_class_of_an_answer(client: openai.OpenAI) -> None:
    library = import_module("instructor")
    for mode in (library.Mode.JSON_SCHEMA, library.Mode.JSON, library.Mode.TOOLS):
        patched = library.from_openai(client, mode=mode)
        person = patched.chat.completions.create(
            model=DEFAULT_MODEL, response_model=Person, messages=ANNA, max_tokens=96, temperature=0, max_retries=0
        )
        assert isinstance(person, Person)


# ---------------------------------------------------------------- pydantic-ai


async def test_pydantic_ai_runs_an_agent(v1: str) -> None:
    library, models = import_module("pydantic_ai"), import_module("pydantic_ai.models.openai")
    provider = import_module("pydantic_ai.providers.openai").OpenAIProvider(base_url=v1, api_key="none")
    model = models.OpenAIChatModel(DEFAULT_MODEL, provider=provider)
    agent = library.Agent(model, model_settings={"max_tokens": 4, "temperature": 0})
    whole = await agent.run("Name a colour.")
    async with agent.run_stream("Name a colour.") as run:
        assert await run.get_output() == whole.output
    for output in (library.NativeOutput(Person), library.ToolOutput(Person)):
        reader = library.Agent(model, output_type=output, retries=0)
        found = await reader.run(ABOUT_ANNA, model_settings={"max_tokens": 96, "temperature": 0})
        assert isinstance(found.output, Person)
    await provider.client.close()
