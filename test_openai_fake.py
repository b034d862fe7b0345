"""What openai_fake promises, one law a test. In the module's order: the purest first, the real client last."""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import contextvars
import copy
import doctest
import errno
import functools
import gc
import gzip
import http.client
import importlib
import importlib.metadata
import inspect
import io
import itertools
import json
import logging
import math
import operator
import os
import pickle
import pydoc
import queue
import random
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import tracemalloc
import typing
import unittest
import urllib.error
import urllib.request
import warnings
import weakref
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar, cast
from unittest import mock

import openai_fake
from openai_fake import (
    APIError,
    Chunk,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CustomToolCall,
    Disconnect,
    FakeOpenAI,
    Finish,
    Item,
    Message,
    Pause,
    Raw,
    Reasoning,
    Refusal,
    Reply,
    Request,
    Script,
    Stream,
    StreamError,
    Text,
    Tool,
    ToolCall,
    Usage,
    WebSearch,
    auto,
    echo,
    main,
    non_streaming_response,
    rate_limit,
    recorded,
    start,
    streaming_response,
    text_chunks,
    tool_call_chunk,
)

WAIT = 10.0  # seconds that a test waits for what must come; it never waits for time to pass
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # a client that makes its own loads certificates, for 20 ms
HAS_OPENAI = find_spec("openai") is not None
HAS_HYPOTHESIS = find_spec("hypothesis") is not None
HAS_RUFF = find_spec("ruff") is not None
needs_openai = unittest.skipUnless(HAS_OPENAI, "the openai package is not installed")
needs_hypothesis = unittest.skipUnless(HAS_HYPOTHESIS, "the hypothesis package is not installed")
needs_websockets = unittest.skipUnless(find_spec("websockets"), "the websockets package is not installed")


def chat(text: str = "Hi", **options: Any) -> dict[str, Any]:
    """A Chat Completions body."""
    return {"model": "gpt-4o", "messages": [{"role": "user", "content": text}], **options}


def responses(text: str = "Hi", **options: Any) -> dict[str, Any]:
    """A Responses body."""
    return {"model": "gpt-4o", "input": text, **options}


PATHS = {"chat.completions": "/v1/chat/completions", "responses": "/v1/responses"}
BODIES: dict[str, Callable[..., dict[str, Any]]] = {"chat.completions": chat, "responses": responses}


def http_bytes(body: Any, path: str = PATHS["chat.completions"], method: str = "POST", *fields: str) -> bytes:
    """A request as raw bytes; `body` is JSON, bytes, or None."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: test", *fields, f"Content-Length: {len(data)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


# What stays private: all that these tests look at inside the module, a name a line, and why.
_PARAMETERS = {api: openai_fake._RULES[api] for api in ("chat.completions", "responses")}  # name -> check
_unchecked = openai_fake._anything
_Part = openai_fake._Part  # README's tables name each
_ENDPOINTS = openai_fake._ENDPOINTS  # and each of these
_MAX_BODY = (openai_fake, "_MAX_BODY")  # set lower: 64 MiB take long
_SLEEP = (openai_fake._Waiter, "sleep")  # what is waited for, without waiting
_log_line = openai_fake._log_line  # what the terminal shows, without a process each
_answer_text = openai_fake._answer_text
_banner = openai_fake._banner
_Inbox, _read_request, _Refused = (
    openai_fake._Inbox,
    openai_fake._read_request,
    openai_fake._Refused,
)  # without a socket


def _refusal(check: Callable[..., None], *arguments: Any) -> APIError | None:
    try:
        check(*arguments)
    except APIError as error:
        return error
    return None


def _fault(api: str, body: dict[str, Any], strict: bool) -> APIError | None:
    """What is refused: ten thousand bodies, without a request each."""
    return _refusal(openai_fake._check_request, api, body, strict)


def _conversation_fault(*arguments: Any) -> APIError | None:
    return _refusal(openai_fake._check_conversation, *arguments)


class _Impatient(queue.SimpleQueue[Any]):
    """For what waits a second for a job that may come, and does not here."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        return super().get(block, timeout and 0.02)


def _hurry(server: FakeOpenAI, *states: str) -> None:
    """Shortens the deadlines of connections, which are no options: they are longer than a test may take."""
    server._running().jobs = _Impatient()
    server._running().sweep = 0.02
    for state in states:
        server._running().limits[openai_fake._State[state]] = 0.1


def setUpModule() -> None:
    """A loop in debug mode (-X dev) says on stderr what took 0.1 s, as a client's first import may.

    The suite's handlers call tools that its requests do not offer.
    """
    warnings.filterwarnings("ignore", "the handler called the tool")
    logger = logging.getLogger("asyncio")
    unittest.addModuleCleanup(logger.setLevel, logger.level)
    logger.setLevel(logging.ERROR)
    unittest.addModuleCleanup(gc.unfreeze)  # what LeakTest froze


class Wire:
    """A raw connection to a fake: sends bytes, and reads answers off the wire."""

    def __init__(self, server: FakeOpenAI) -> None:
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        self.sock = socket.create_connection((host.strip("[]"), int(port)), timeout=WAIT)
        self.buffer = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *error: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> Wire:
        self.sock.sendall(data)
        return self

    def more(self) -> bool:
        """Reads more into the buffer; False at the end of the connection (a reset counts)."""
        try:
            data = self.sock.recv(65536)
        except ConnectionError:
            data = b""
        self.buffer += data
        return bool(data)

    def until(self, mark: bytes) -> bytes:
        """Reads up to and with a mark."""
        while mark not in self.buffer:
            if not self.more():
                raise AssertionError(f"the connection ended before {mark!r} came, after {self.buffer!r}")
        at = self.buffer.index(mark) + len(mark)
        data, self.buffer = self.buffer[:at], self.buffer[at:]
        return data

    def rest(self) -> bytes:
        """Reads to the end of the connection."""
        while self.more():
            pass
        data, self.buffer = self.buffer, b""
        return data

    def exactly(self, count: int) -> bytes:
        while len(self.buffer) < count and self.more():
            pass
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def answer(self) -> Answer:
        """Reads one whole answer, unchunked; a 100 before it is skipped."""
        head = self.until(b"\r\n\r\n").decode("latin-1")
        if " 100 " in head.partition("\r\n")[0]:
            return self.answer()
        line, *lines = head.rstrip("\r\n").split("\r\n")
        if not line.startswith("HTTP/1.1 "):
            raise AssertionError(f"what came where an answer begins: {line!r}")
        fields = {name.lower(): value for name, _, value in (each.partition(": ") for each in lines)}
        if fields.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.until(b"\r\n"), 16):
                body += self.exactly(size)
                self.until(b"\r\n")
            self.until(b"\r\n")
        elif " 204 " in line:
            body = b""
        elif "content-length" in fields:
            body = self.exactly(int(fields["content-length"]))
        else:
            body = self.rest()
        return Answer(int(line.split()[1]), fields, body)


class Answer:
    """An answer off the wire."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The data of each server-sent event: JSON, or the text of [DONE]."""
        datas = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [data if data == "[DONE]" else json.loads(data) for data in datas]


def call(server: FakeOpenAI, body: Any, path: str = "", method: str = "POST", *fields: str) -> Answer:
    """One request on a connection of its own. Without a path, the one that the body's keys are of."""
    if not path:
        path = PATHS["responses" if isinstance(body, dict) and "input" in body else "chat.completions"]
    with Wire(server) as wire:
        return wire.send(http_bytes(body, path, method, *fields)).answer()


def always(answer: Any) -> Callable[[Request], Any]:
    """A handler that gives this answer."""
    return lambda request: answer


def spoken(api: str, answer: Any, **options: Any) -> Any:
    """The JSON that a handler with this answer gives."""
    with FakeOpenAI(always(answer)) as server:
        return call(server, BODIES[api](**options)).json


def streamed(api: str, answer: Any, **options: Any) -> list[Any]:
    """The events that a handler with this answer gives."""
    with FakeOpenAI(always(answer)) as server:
        return call(server, BODIES[api](stream=True, **options)).events


# ---- Parts, encoders, bytes on the wire ------------------------------------------------------------------------------


CLOCK = 1_750_000_000
SPEECH = 'é "quoted" \\ \t\n</b> \x00\x85\u2028\u2029 \ud800 日本語 😀 naïve-word ' + "x" * 40
# A part of every kind that is said, and of those whose splitting is peculiar.
SPOKEN: dict[str, Any] = {
    "text": Text("Hello there, big world."),
    "empty text": Text(""),
    "odd text": Text(SPEECH, choice=2),
    "refusal": Refusal("I can't do that."),
    "empty refusal": Refusal(""),
    "reasoning": Reasoning("First think, then speak.", encrypted_content="secret"),
    "silent reasoning": Reasoning(),
    "call": ToolCall("weather", {"city": "Köln", "days": [1, 2]}, id="call_1"),
    "call without id": ToolCall("weather", '{"city": "Paris"}', choice=1),
    "call without arguments": ToolCall("now"),
    "custom call": CustomToolCall("run", "print('hi there')", id="call_2"),
    "custom call without input": CustomToolCall("run"),
    "search": WebSearch("what is new", sources=["https://a.example/1", "https://b.example"], id="ws_1"),
}


def seeded(api: str, answer: Any, **options: Any) -> Answer:
    """The answer of a fake whose ids and clock are the same each time."""
    with FakeOpenAI(always(answer), seed=7, clock=lambda: CLOCK) as server:
        return call(server, BODIES[api](**options))


def both(api: str, answer: Any, **options: Any) -> tuple[Any, list[Any]]:
    """One answer as JSON, and as the events of a stream."""
    usage = {"stream_options": {"include_usage": True}} if api == "chat.completions" else {}
    return seeded(api, answer, **options).json, seeded(api, answer, stream=True, **usage, **options).events


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice('ab é\n\t"\\\u2028\x85\ud800😀日.,') for _ in range(rng.randrange(40)))


def random_answer(rng: random.Random) -> list[Any]:
    """Some parts of any kind, in any order."""
    makers: list[Callable[[], Any]] = [
        lambda: Text(random_text(rng), choice=rng.randrange(2)),
        lambda: Text(random_text(rng)),
        lambda: Refusal(random_text(rng)),
        lambda: Reasoning(random_text(rng)),
        lambda: ToolCall("f", {"a": random_text(rng)}, choice=rng.randrange(2)),
        lambda: ToolCall("g", random_text(rng), id=f"call_{rng.random()}"),
        lambda: CustomToolCall("h", random_text(rng)),
        lambda: WebSearch(random_text(rng), sources=["https://a.example", "é"][: rng.randrange(3)]),
    ]
    parts = [rng.choice(makers)() for _ in range(rng.randrange(1, 6))]
    ends = [Finish("stop"), Finish("length"), Finish("content_filter"), Usage(3, 4, cached_tokens=1)]
    return parts + rng.sample(ends, rng.randrange(2))


def merged(part: Any) -> Any:
    first, *rest = part.split()
    return reduce(lambda whole, fragment: whole.merge(fragment), rest, first)


class PartsAlgebraTest(unittest.TestCase):
    def test_merging_the_fragments_gives_the_part_back(self) -> None:
        """For every kind of part: what split() yields, merged in order, is the part."""
        for name, part in SPOKEN.items():
            with self.subTest(name=name):
                self.assertEqual(merged(part), part)

    def test_fragments_are_parts_of_the_same_kind(self) -> None:
        """A fragment of a part is a part, of its kind and of its choice."""
        for name, part in SPOKEN.items():
            with self.subTest(name=name):
                self.assertEqual({(type(each), each.choice) for each in part.split()}, {(type(part), part.choice)})

    def test_random_texts_split_into_words_and_merge_back(self) -> None:
        """Any text's fragments are not empty, hold at most one word of 16 characters, and join to the text."""
        rng = random.Random(1)
        for text in ["x" * 40, "é" * 17, "?!" * 20, *(random_text(rng) for _ in range(500))]:
            with self.subTest(text=text):
                pieces = [part.text for part in Text(text).split()]
                self.assertEqual("".join(pieces), text)
                self.assertTrue(all(pieces) or not text)
                self.assertLessEqual(max(len(piece.strip()) for piece in pieces), 16)
                self.assertFalse([piece for piece in pieces if len(piece.split()) > 1])

    @needs_hypothesis
    def test_any_text_of_any_kind_splits_and_merges_back(self) -> None:
        """The law of split and merge, for texts that hypothesis thinks of."""
        from hypothesis import given, settings
        from hypothesis import strategies as st

        calls: list[Callable[[str], Any]] = [lambda text: ToolCall("f", text), lambda text: CustomToolCall("f", text)]
        makers: list[Callable[[str], Any]] = [Text, Refusal, Reasoning, *calls]

        @settings(deadline=None, database=None)
        @given(st.sampled_from(makers), st.text(st.characters()))
        def law(make: Callable[[str], Any], text: str) -> None:
            part = make(text)
            self.assertEqual(merged(part), part)

        law()

    def test_a_foreign_fragment_does_not_merge(self) -> None:
        """merge() refuses a fragment of another kind, choice or call."""
        for name, part, fragment in (
            ("kind", Text("a"), Refusal("b")),
            ("choice", Text("a"), Text("b", choice=1)),
            ("call", ToolCall("f", id="call_1"), ToolCall("f", id="call_2")),
            ("named call", ToolCall("f"), ToolCall("g")),
            ("search", WebSearch("a"), WebSearch("b")),
            ("thought", Reasoning("a", encrypted_content="x"), Reasoning("b", encrypted_content="y")),
        ):
            with self.subTest(name=name), self.assertRaises(ValueError):
                part.merge(fragment)  # type: ignore[arg-type]

    def test_a_mistake_surfaces_where_the_part_is_made(self) -> None:
        """A part of the wrong type or value is a TypeError or ValueError in the line that makes it."""
        make: Any
        for name, error, make in (
            ("Text of bytes", TypeError, lambda: Text(b"a")),  # type: ignore[arg-type]
            ("Text of None", TypeError, lambda: Text(None)),  # type: ignore[arg-type]
            ("choice", TypeError, lambda: Text("a", choice="0")),  # type: ignore[arg-type]
            ("negative choice", ValueError, lambda: Text("a", choice=-1)),
            ("Refusal", TypeError, lambda: Refusal(1)),  # type: ignore[arg-type]
            ("Reasoning", TypeError, lambda: Reasoning(None)),  # type: ignore[arg-type]
            ("encrypted content", TypeError, lambda: Reasoning("a", encrypted_content=b"a")),  # type: ignore[arg-type]
            ("name", TypeError, lambda: ToolCall(None)),  # type: ignore[arg-type]
            ("arguments", TypeError, lambda: ToolCall("f", ["a"])),  # type: ignore[arg-type]
            ("arguments not JSON", TypeError, lambda: ToolCall("f", {"a": object()})),
            ("arguments NaN", ValueError, lambda: ToolCall("f", {"a": float("nan")})),
            ("call's choice", TypeError, lambda: ToolCall("f", choice="0")),  # type: ignore[arg-type]
            ("id", TypeError, lambda: ToolCall("f", id=1)),  # type: ignore[arg-type]
            ("input", TypeError, lambda: CustomToolCall("f", {"a": 1})),  # type: ignore[arg-type]
            ("custom call's choice", TypeError, lambda: CustomToolCall("f", choice="0")),  # type: ignore[arg-type]
            ("query", TypeError, lambda: WebSearch(None)),  # type: ignore[arg-type]
            ("sources", TypeError, lambda: WebSearch("q", sources=[1])),  # type: ignore[list-item]
            ("sources a string", TypeError, lambda: WebSearch("q", sources="https://a.example")),
            ("search's id", TypeError, lambda: WebSearch("q", id=1)),  # type: ignore[arg-type]
            ("reason", ValueError, lambda: Finish("done")),  # type: ignore[arg-type]
            ("finish's choice", TypeError, lambda: Finish("stop", choice="0")),  # type: ignore[arg-type]
            ("tokens", TypeError, lambda: Usage(1.5, 2)),  # type: ignore[arg-type]
            ("negative tokens", ValueError, lambda: Usage(-1, 2)),
            ("negative pause", ValueError, lambda: Pause(-1)),
            ("pause NaN", ValueError, lambda: Pause(float("nan"))),
            ("pause of words", TypeError, lambda: Pause("1")),  # type: ignore[arg-type]
            ("raw text", TypeError, lambda: Raw("a")),  # type: ignore[arg-type]
            ("error's message", TypeError, lambda: StreamError(1)),  # type: ignore[arg-type]
        ):
            with self.subTest(name=name), self.assertRaises(error):
                make()
        self.assertEqual(Usage(10**12, 2).total_tokens, 10**12 + 2)  # only seconds are bounded above

    def test_a_part_shows_what_makes_it(self) -> None:
        """Its repr has what is not so by itself: what was left out, and what is private, is not shown."""
        for shown in ("ToolCall(name='f', arguments='{}')", "CustomToolCall(name='f', input='a', choice=1)",
                      "Text(text='a', phase='commentary')", "Refusal(text='a', id='msg_1')",
                      "Usage(prompt_tokens=1, completion_tokens=2)"):  # fmt: skip
            self.assertEqual(repr(eval(shown)), shown)

    def test_parts_are_values(self) -> None:
        """Parts are frozen, hashable, and equal where they say the same."""
        for name, part in SPOKEN.items():
            with self.subTest(name=name), self.assertRaises(AttributeError):
                self.assertEqual(hash(part), hash(part))
                setattr(part, next(iter(part.__dataclass_fields__)), "other")


# ---- Chat Completions ----

CHAT_CALL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {}}}
# Asked model: its name in answers, then whether `logprobs` is there unasked, fingerprint, service tier, cache writes.
CHAT_FAMILIES: dict[str, tuple[str, bool, bool, bool, bool]] = {
    "gpt-3.5-turbo": ("gpt-3.5-turbo-0125", True, False, True, False),
    "gpt-4": ("gpt-4-0613", True, False, True, False),
    "gpt-4o": ("gpt-4o-2024-08-06", True, True, True, False),
    "gpt-4o-mini": ("gpt-4o-mini-2024-07-18", True, True, True, False),
    "gpt-4o-2024-11-20": ("gpt-4o-2024-11-20", True, True, True, False),
    "gpt-4.1": ("gpt-4.1-2025-04-14", True, True, True, False),
    "gpt-4.1-nano": ("gpt-4.1-nano-2025-04-14", True, True, True, False),
    "gpt-5": ("gpt-5-2025-08-07", False, False, True, False),
    "gpt-5-pro": ("gpt-5-pro-2025-10-06", False, False, True, False),
    "gpt-5.1": ("gpt-5.1-2025-11-13", False, False, True, False),
    "gpt-5.2": ("gpt-5.2-2025-12-11", False, False, True, False),
    "gpt-5.4": ("gpt-5.4-2026-03-05", False, False, True, False),
    "gpt-5.4-mini": ("gpt-5.4-mini-2026-03-17", False, False, True, False),
    "gpt-5.5": ("gpt-5.5-2026-04-23", False, False, True, False),
    "gpt-5.6": ("gpt-5.6-sol", False, False, True, True),
    "o1-mini": ("o1-mini-2024-09-12", False, False, True, False),
    "o3": ("o3-2025-04-16", False, False, True, False),
    "o3-mini": ("o3-mini-2025-01-31", False, True, True, False),
    "o4-mini": ("o4-mini-2025-04-16", False, False, True, False),
    "gpt-4o-audio-preview": ("gpt-4o-audio-preview-2025-06-03", False, True, True, False),
    "gpt-4o-mini-audio-preview": ("gpt-4o-mini-audio-preview-2024-12-17", False, True, True, False),
    "gpt-4o-search-preview": ("gpt-4o-search-preview-2025-03-11", False, False, False, False),
    "gpt-4o-mini-search-preview": ("gpt-4o-mini-search-preview-2025-03-11", False, False, False, False),
}
PARALLEL = [ToolCall("f", {"a": 1, "b": [2]}, id="call_1"), ToolCall("g", {}, id="call_2")]
# Each kind of answer in Chat Completions: an answer, and what is asked.
CHAT_CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": ("Hello big world", {}),
    "two texts": (["Hi", "there"], {}),
    "length": (["Hello", Finish("length")], {}),
    "length at once": (Finish("length"), {}),
    "content filter": (["No", Finish("content_filter")], {}),
    "one tool call": (ToolCall("f", {"a": 1}, id="call_1"), {}),
    "custom call": (CustomToolCall("run", "ls", id="call_1"), {}),
    "parallel calls": ([ToolCall("f", "1", id="call_1"), ToolCall("g", "2", id="call_2")], {}),
    "text and call": (["Hi", ToolCall("f", "1", id="call_1")], {}),
    "refusal": (Refusal("No way"), {}),
    "n > 1": ("Hello world", {"n": 2}),
    "usage": ("Hi", {"stream_options": {"include_usage": True}}),
    "reasoning": ([Reasoning("Hm"), "Hi"], {}),
    "nothing said": (Reasoning("Hm"), {}),
    "error": (["Hi", StreamError("Broke", code="oops")], {}),
}


def transcripts(text: str, **short: str) -> dict[str, list[str]]:
    """The cases of a text: a name, a colon, and what is sent, with dots between; `short` are its abbreviations."""
    for name, line in short.items():
        text = text.replace(f"${name}", line)
    cases = (case.partition(": ") for case in re.split(r"\n(?! )", text.strip()))
    return {name: re.split(r"\s+·\s+", lines) for name, _, lines in cases}


# The stream of each: choice, delta, finish reason.
CHAT_TRANSCRIPTS = transcripts(
    """
text: $ROLE · 0 {"content":"Hello"} · 0 {"content":" big"} · 0 {"content":" world"} · 0 {} stop · [DONE]
two texts: $ROLE · 0 {"content":"Hi"} · 0 {"content":"there"} · 0 {} stop · [DONE]
length: $ROLE · 0 {"content":"Hello"} · 0 {} length · [DONE]
length at once: $ROLE · 0 {} length · [DONE]
content filter: $ROLE · 0 {"content":"No"} · 0 {} content_filter · [DONE]
one tool call: 0 {"role":"assistant","content":null,"tool_calls":[{"index":0,$CALL1}],"refusal":null}
    · 0 {"tool_calls":[{"index":0,"function":{"arguments":"{\\""}}]}
    · 0 {"tool_calls":[{"index":0,"function":{"arguments":"a"}}]}
    · 0 {"tool_calls":[{"index":0,"function":{"arguments":"\\":"}}]}
    · 0 {"tool_calls":[{"index":0,"function":{"arguments":"1"}}]}
    · 0 {"tool_calls":[{"index":0,"function":{"arguments":"}"}}]} · 0 {} tool_calls · [DONE]
custom call: 0 {"role":"assistant","content":null,"tool_calls":[{"index":0,$CUSTOM}],"refusal":null}
    · 0 {"tool_calls":[{"index":0,"custom":{"input":"ls"}}]} · 0 {} tool_calls · [DONE]
parallel calls: 0 {"role":"assistant","content":null}
    · 0 {"tool_calls":[{"index":0,$CALL1}]} · 0 {"tool_calls":[{"index":0,"function":{"arguments":"1"}}]}
    · 0 {"tool_calls":[{"index":1,$CALL2}]} · 0 {"tool_calls":[{"index":1,"function":{"arguments":"2"}}]}
    · 0 {} tool_calls · [DONE]
text and call: $ROLE · 0 {"content":"Hi"} · 0 {"tool_calls":[{"index":0,$CALL1}]}
    · 0 {"tool_calls":[{"index":0,"function":{"arguments":"1"}}]} · 0 {} tool_calls · [DONE]
refusal: 0 {"role":"assistant","content":null,"refusal":""} · 0 {"refusal":"No"} · 0 {"refusal":" way"}
    · 0 {} stop · [DONE]
n > 1: $ROLE · 0 {"content":"Hello"} · 1 {"role":"assistant","content":"","refusal":null} · 1 {"content":"Hello"}
    · 0 {"content":" world"} · 1 {"content":" world"} · 0 {} stop · 1 {} stop · [DONE]
usage: $ROLE · 0 {"content":"Hi"} · 0 {} stop · usage · [DONE]
reasoning: $ROLE · 0 {"content":"Hi"} · 0 {} stop · [DONE]
nothing said: $ROLE · 0 {} stop · [DONE]
error: $ROLE · 0 {"content":"Hi"}
    · {"error":{"message":"Broke","type":"server_error","param":null,"code":"oops"}}
""",
    ROLE='0 {"role":"assistant","content":"","refusal":null}',
    CALL1='"id":"call_1","type":"function","function":{"name":"f","arguments":""}',
    CALL2='"id":"call_2","type":"function","function":{"name":"g","arguments":""}',
    CUSTOM='"id":"call_1","type":"custom","custom":{"name":"run","input":""}',
)


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def chat_line(chunk: Any) -> str:
    """A chunk as a line of a transcript."""
    if chunk == "[DONE]" or "error" in chunk:
        return chunk if isinstance(chunk, str) else compact(chunk)
    if not chunk["choices"]:
        return "usage" if chunk["usage"]["total_tokens"] else "nothing"
    (choice,) = chunk["choices"]
    return " ".join([str(choice["index"]), compact(choice["delta"]), choice["finish_reason"] or ""]).strip()


class ChatJSONTest(unittest.TestCase):
    def test_the_completion_has_the_keys_and_values_of_its_models_family(self) -> None:
        """Key order, snapshot name, logprobs, fingerprint, service tier and usage details: as of each family."""
        for model, (snapshot, logprobs, fingerprint, tier, writes) in CHAT_FAMILIES.items():
            with self.subTest(name=model):
                body = spoken("chat.completions", "Hi", model=model)
                keys = ["id", "object", "created", "model", "choices", "usage"]
                self.assertEqual(list(body), [*keys, *["service_tier"] * tier, "system_fingerprint"])
                self.assertEqual(body["model"], snapshot)
                self.assertEqual(body.get("service_tier"), "default" if tier else None)
                none = "^None$" if tier else "^$"
                self.assertRegex(str(body["system_fingerprint"]), "^fp_[0-9a-f]{10}$" if fingerprint else none)
                (choice,) = body["choices"]
                self.assertEqual(list(choice), ["index", "message", *["logprobs"] * logprobs, "finish_reason"])
                self.assertIsNone(choice.get("logprobs"))
                prompt = ["cached_tokens", *["cache_write_tokens"] * writes, "audio_tokens"]
                prompt += ["text_tokens", "image_tokens"] * ("audio" in model)
                self.assertEqual(list(body["usage"]["prompt_tokens_details"]), prompt)

    def test_the_message_says_each_kind_as_the_api_does(self) -> None:
        """role, content, [tool_calls], refusal, annotations: null and absent where the API has them so."""
        call1 = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
        spaced1 = {**call1, "function": {"name": "f", "arguments": '{"a": 1, "b": [2]}'}}
        spaced2 = {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}}
        custom = {"id": "call_1", "type": "custom", "custom": {"name": "run", "input": "ls"}}
        rows: tuple[tuple[str, Any, dict[str, Any], str], ...] = (
            ("text", "Hi", {"content": "Hi", "refusal": None}, "stop"),
            ("several texts", ["a ", "b"], {"content": "a b", "refusal": None}, "stop"),
            ("refusal", Refusal("No"), {"content": None, "refusal": "No"}, "stop"),
            ("call", ToolCall("f", {"a": 1}, id="call_1"),
             {"content": None, "tool_calls": [call1], "refusal": None}, "tool_calls"),
            ("parallel calls are spaced", PARALLEL,
             {"content": None, "tool_calls": [spaced1, spaced2], "refusal": None}, "tool_calls"),
            ("custom call", CustomToolCall("run", "ls", id="call_1"),
             {"content": None, "tool_calls": [custom], "refusal": None}, "tool_calls"),
            ("length", ["Hi", Finish("length")], {"content": "Hi", "refusal": None}, "length"),
            ("length at once", Finish("length"), {"content": "", "refusal": None}, "length"),
            ("filtered", Finish("content_filter"), {"content": "", "refusal": None}, "content_filter"),
        )  # fmt: skip
        for name, answer, message, reason in rows:
            with self.subTest(name=name):
                (choice,) = spoken("chat.completions", answer)["choices"]
                want: Any = {"role": "assistant", **message, "annotations": []}
                self.assertEqual((compact(choice["message"]), choice["finish_reason"]), (compact(want), reason))

    def test_parallel_arguments_given_as_text_stay_as_they_are(self) -> None:
        """Only JSON that is the fake's own follows the API's habit of spaces."""
        (choice,) = spoken("chat.completions", [ToolCall("f", '{"a":1}'), ToolCall("g", {"a": 1})])["choices"]
        told = [each["function"]["arguments"] for each in choice["message"]["tool_calls"]]
        self.assertEqual(told, ['{"a":1}', '{"a": 1}'])

    def test_parallel_calls_are_spaced_in_every_choice(self) -> None:
        """The habit of spaces holds for n > 1 too."""
        for choice in spoken("chat.completions", PARALLEL, n=2)["choices"]:
            told = [each["function"]["arguments"] for each in choice["message"]["tool_calls"]]
            self.assertEqual(told, ['{"a": 1, "b": [2]}', "{}"])

    def test_a_forced_call_finishes_as_its_models_family_does(self) -> None:
        """A named tool_choice ends with "stop" on gpt-3.5/4/4o; every other call with "tool_calls"."""
        named: Any = {"type": "function", "function": {"name": "f"}}
        some = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}
        for model, choice, reason in (
            ("gpt-4o", named, "stop"), ("gpt-4", named, "stop"), ("gpt-3.5-turbo", named, "stop"),
            ("gpt-5-mini", named, "tool_calls"), ("gpt-4o", "required", "tool_calls"), ("gpt-4o", "auto", "tool_calls"),
            ("gpt-4o", some, "tool_calls"),
        ):  # fmt: skip
            with self.subTest(name=f"{model} {choice}"):
                asked: dict[str, Any] = {"model": model, "tools": [CHAT_CALL], "tool_choice": choice}
                body, events = both("chat.completions", ToolCall("f"), **asked)
                self.assertEqual(body["choices"][0]["finish_reason"], reason)
                self.assertEqual(events[-3]["choices"][0]["finish_reason"], reason)

    def test_citations_are_annotations_of_the_message(self) -> None:
        """What a search found is cited by url, title, and place in the whole content, of a later text too."""
        search = WebSearch("q", sources=["http://b.c/d"])
        message = spoken("chat.completions", ["Oh. ", ToolCall("f"), search, "See http://b.c/d!"])["choices"][0][
            "message"
        ]
        cited = {"end_index": 20, "start_index": 8, "title": "D", "url": "http://b.c/d"}
        self.assertEqual(message["content"][8:20], cited["url"])
        self.assertEqual(compact(message["annotations"]), compact([{"type": "url_citation", "url_citation": cited}]))

    def test_n_choices_have_one_usage(self) -> None:
        """n > 1: choices 0..n-1 with what was said, one usage."""
        body = spoken("chat.completions", [Reasoning("hm"), "Hi"], n=3)
        self.assertEqual([each["index"] for each in body["choices"]], [0, 1, 2])
        self.assertEqual({each["message"]["content"] for each in body["choices"]}, {"Hi"})

    def test_usage_is_told_in_the_apis_form(self) -> None:
        """Given tokens are told as they are; estimated ones are never 0; the total is the sum."""
        usage = spoken("chat.completions", ["Hi", Usage(5, 7, cached_tokens=2, reasoning_tokens=3)])["usage"]
        self.assertEqual(compact(usage), compact({
            "prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 2, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 3, "audio_tokens": 0, "accepted_prediction_tokens": 0,
                                          "rejected_prediction_tokens": 0},
        }))  # fmt: skip
        usage = spoken("chat.completions", ["Hi", Usage(5, 7)])["usage"]
        self.assertEqual([usage[f"{of}_tokens_details"][what] for of, what in (("prompt", "cached_tokens"),
                          ("completion", "reasoning_tokens"))], [0, 0])  # fmt: skip
        usage = spoken("chat.completions", "Hi")["usage"]
        self.assertTrue(usage["prompt_tokens"] and usage["completion_tokens"])
        self.assertEqual(usage["total_tokens"], usage["prompt_tokens"] + usage["completion_tokens"])

    def test_the_service_tier_is_the_one_that_served(self) -> None:
        """auto and default are served by "default", fast and priority by "priority", flex by "flex"."""
        for asked, served in (("auto", "default"), ("default", "default"), ("flex", "flex"), ("priority", "priority")):
            with self.subTest(name=asked):
                body, events = both("chat.completions", "Hi", service_tier=asked)
                self.assertEqual((body["service_tier"], events[0]["service_tier"]), (served, served))


class ChatStreamTest(unittest.TestCase):
    def test_each_case_streams_as_recorded(self) -> None:
        """The golden transcript of every case: role chunk, tool heads, deltas, finish chunks last, usage, [DONE]."""
        for name, (answer, options) in CHAT_CASES.items():
            with self.subTest(name=name):
                lines = [chat_line(chunk) for chunk in streamed("chat.completions", answer, **options)]
                self.assertEqual(lines, CHAT_TRANSCRIPTS[name])

    def test_each_chunk_has_its_keys_in_order(self) -> None:
        """id ... choices, [usage], [obfuscation]; before the finish of parallel calls usage comes before choices."""
        head = ["id", "object", "created", "model", "service_tier", "system_fingerprint"]
        for name, answer, usage, obfuscation in (
            ("text", "Hi there", True, True), ("no usage", "Hi", False, True), ("bare", "Hi", False, False),
            ("usage only", "Hi", True, False), ("parallel", PARALLEL, True, True),
            ("parallel, no usage", PARALLEL, False, True), ("n", "Hi", True, True),
            ("refusal", Refusal("No"), True, True),
        ):  # fmt: skip
            with self.subTest(name=name):
                asked: dict[str, Any] = {"n": 2} if name == "n" else {}
                asked["stream_options"] = {"include_usage": usage, "include_obfuscation": obfuscation}
                *chunks, done = streamed("chat.completions", answer, **asked)
                self.assertEqual(done, "[DONE]")
                last = next(at for at, each in enumerate(chunks) if each["choices"][0]["finish_reason"])
                for at, chunk in enumerate(chunks):
                    middle = ["choices", *["usage"] * usage]
                    if "parallel" in name and at < last:
                        middle.reverse()
                    self.assertEqual(list(chunk), [*head, *middle, *["obfuscation"] * obfuscation])
                    for choice in chunk["choices"]:
                        self.assertEqual(list(choice), ["index", "delta", "logprobs", "finish_reason"])

    def test_chunks_agree_on_the_envelope_of_their_models_family(self) -> None:
        """id, created, model, tier and fingerprint are constant, and the JSON answer's; logprobs as there."""
        for model, (_, logprobs, _, tier, _) in CHAT_FAMILIES.items():
            with self.subTest(name=model):
                body, (*chunks, _) = both("chat.completions", "Hi there", model=model)
                for chunk in chunks:
                    self.assertEqual("service_tier" in chunk, tier)
                    for key in ["id", "created", "model", *["service_tier"] * tier, "system_fingerprint"]:
                        self.assertEqual(chunk[key], body[key])
                    self.assertTrue(all(("logprobs" in choice) == logprobs for choice in chunk["choices"]))

    def test_usage_is_null_until_the_last_chunk(self) -> None:
        """include_usage: null on every chunk, then one without choices that has the JSON answer's usage."""
        body, (*chunks, last, _) = both("chat.completions", ["Hi", ToolCall("f")])
        self.assertEqual([chunk["usage"] for chunk in chunks], [None] * len(chunks))
        self.assertEqual((last["choices"], last["usage"]), ([], body["usage"]))

    def test_obfuscation_is_short_letters_and_digits(self) -> None:
        """Every chunk has 0 to 15 of them, not always as many, and others than the chunk before it."""
        pads = [chunk["obfuscation"] for chunk in streamed("chat.completions", "The quick brown fox jumps")[:-1]]
        self.assertTrue(all(re.fullmatch("[A-Za-z0-9]{0,15}", pad) for pad in pads), pads)
        self.assertGreater(len({len(pad) for pad in pads}), 2)
        begins = [pad[:4] for pad in pads if len(pad) >= 4]
        self.assertEqual(len(set(begins)), len(begins), pads)

    def test_chunks_among_parts_agree_on_the_envelope(self) -> None:
        """A Chunk's id holds from there on; what it finished is not finished again."""
        ending = Chunk([ChunkChoice(finish_reason="stop")], id="x")
        *chunks, _ = streamed("chat.completions", ["Hi", Chunk([ChunkChoice(delta=" you")], id="x"), " there", ending])
        self.assertEqual([chunk["id"] == "x" for chunk in chunks], [False, False, *[True] * (len(chunks) - 2)])
        self.assertEqual([bool(chunk["choices"][0]["finish_reason"]) for chunk in chunks].count(True), 1)

    def test_a_chunk_says_what_is_not_empty(self) -> None:
        """An empty delta is no text, and a call without a name goes on with the one before, in all encodings."""
        calls = [ToolCall("f", '{"a"', id="call_1"), ToolCall("", ":1}")]
        chunks = [Chunk([ChunkChoice(tool_calls=[each])]) for each in calls]
        *told, _ = streamed("chat.completions", chunks)
        begun = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
        more = {"index": 0, "function": {"arguments": ":1}"}}
        deltas = [each["choices"][0]["delta"] for each in told[:2]]
        self.assertEqual(list(map(compact, deltas)), [compact({"tool_calls": [each]}) for each in (begun, more)])
        message = spoken("chat.completions", chunks)["choices"][0]["message"]
        self.assertEqual((message["content"], message["tool_calls"][0]["function"]["arguments"]), (None, '{"a":1}'))
        (item,) = spoken("responses", chunks)["output"]
        self.assertEqual((item["type"], item["arguments"]), ("function_call", '{"a":1}'))

    def test_a_replys_model_is_the_family_too(self) -> None:
        """Reply(model=...) answers as that model's family does."""
        body = spoken("chat.completions", Reply("Hi", model="gpt-5"))
        self.assertEqual((body["model"], body["system_fingerprint"]), ("gpt-5", None))
        self.assertNotIn("logprobs", body["choices"][0])

    def test_a_generators_calls_stream_with_a_head_each(self) -> None:
        """Calls that are not known beforehand still have an id, type and name once, and an index each."""
        with FakeOpenAI(lambda request: iter([ToolCall("f", "1"), ToolCall("g", "2")])) as server:
            *chunks, _ = call(server, chat(stream=True)).events
        calls = [each for chunk in chunks for each in chunk["choices"][0]["delta"].get("tool_calls", ())]
        self.assertEqual([(each["index"], each["function"].get("name"), "id" in each) for each in calls],
                         [(0, "f", True), (0, None, False), (1, "g", True), (1, None, False)])  # fmt: skip


# ---- Responses ----

RESPONSE_KEYS = """id object created_at status background billing completed_at conversation error frequency_penalty
incomplete_details instructions max_output_tokens max_tool_calls model moderation output parallel_tool_calls
presence_penalty previous_response_id prompt prompt_cache_key prompt_cache_options prompt_cache_retention reasoning
safety_identifier service_tier store temperature text tool_choice tool_usage tools top_logprobs top_p truncation usage
user metadata""".split()  # noqa: SIM905
OPTIONAL_KEYS = {"conversation", "prompt", "prompt_cache_options"}
NO_IMAGES = {"input_tokens": 0, "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}, "output_tokens": 0,
             "output_tokens_details": {"image_tokens": 0, "text_tokens": 0}, "total_tokens": 0}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "object": "response", "created_at": CLOCK, "status": "completed", "background": False,
    "billing": {"payer": "developer"}, "completed_at": CLOCK, "error": None, "frequency_penalty": 0.0,
    "incomplete_details": None, "instructions": None, "max_output_tokens": None, "max_tool_calls": None,
    "model": "gpt-4o-2024-08-06", "moderation": None, "parallel_tool_calls": True, "presence_penalty": 0.0,
    "previous_response_id": None, "prompt_cache_key": None, "prompt_cache_retention": "in_memory",
    "reasoning": {"context": None, "effort": None, "summary": None}, "safety_identifier": None,
    "service_tier": "default", "store": True, "temperature": 1.0,
    "text": {"format": {"type": "text"}, "verbosity": "medium"}, "tool_choice": "auto",
    "tool_usage": {"image_gen": NO_IMAGES, "web_search": {"num_requests": 0}}, "tools": [], "top_logprobs": 0,
    "top_p": 1.0, "truncation": "disabled", "user": None, "metadata": {},
}  # fmt: skip
# Model: effort, context, top_p, prompt_cache_retention, whether messages have a phase (None, context: no reasoning).
FAMILIES: dict[str, tuple[str | None, str | None, float, str, bool]] = {
    "gpt-4o": (None, None, 1.0, "in_memory", False),
    "gpt-4.1": (None, None, 1.0, "in_memory", False),
    "gpt-5": ("medium", "current_turn", 1.0, "in_memory", False),
    "gpt-5-mini": ("medium", "current_turn", 1.0, "in_memory", False),
    "gpt-5-nano": ("medium", "current_turn", 1.0, "in_memory", False),
    "o3": ("medium", "current_turn", 1.0, "in_memory", False),
    "o4-mini": ("medium", "current_turn", 1.0, "in_memory", False),
    "gpt-5.1": ("none", "current_turn", 1.0, "in_memory", False),
    "gpt-5.2": ("none", "current_turn", 0.98, "24h", False),
    "gpt-5.4": ("none", "current_turn", 0.98, "24h", True),
    "gpt-5.4-mini": ("none", "current_turn", 0.98, "24h", True),
    "gpt-5.5": ("medium", "current_turn", 0.98, "24h", True),
    "gpt-5.6": ("medium", "all_turns", 0.98, "24h", True),
}
EVENT_KEYS = {
    **dict.fromkeys(("created", "queued", "in_progress", "completed", "incomplete", "failed"),
                    "response sequence_number"),
    **dict.fromkeys(("output_item.added", "output_item.done"), "item output_index sequence_number"),
    **dict.fromkeys(("content_part.added", "content_part.done"),
                    "content_index item_id output_index part sequence_number"),
    "output_text.delta": "content_index delta item_id logprobs obfuscation output_index sequence_number",
    "output_text.done": "content_index item_id logprobs output_index sequence_number text",
    "output_text.annotation.added":
        "annotation annotation_index content_index item_id output_index sequence_number",
    "refusal.delta": "content_index delta item_id output_index sequence_number",
    "refusal.done": "content_index item_id output_index refusal sequence_number",
    "function_call_arguments.delta": "delta item_id obfuscation output_index sequence_number",
    "function_call_arguments.done": "arguments item_id output_index sequence_number",
    "custom_tool_call_input.delta": "delta item_id obfuscation output_index sequence_number",
    "custom_tool_call_input.done": "input item_id output_index sequence_number",
    **dict.fromkeys(("reasoning_summary_part.added", "reasoning_summary_part.done"),
                    "item_id output_index part sequence_number summary_index"),
    "reasoning_summary_text.delta": "delta item_id obfuscation output_index sequence_number summary_index",
    "reasoning_summary_text.done": "item_id output_index sequence_number summary_index text",
    **dict.fromkeys(("web_search_call.in_progress", "web_search_call.searching", "web_search_call.completed"),
                    "item_id output_index sequence_number"),
    "error": "error sequence_number",
}  # fmt: skip
EVERY_ITEM = [Reasoning("hm"), WebSearch("q"), Text("Hi"), ToolCall("f", {"a": 1}), CustomToolCall("g", "x")]
EMPTY: dict[str, Any] = {"status": "in_progress", "content": [], "summary": [], "arguments": "", "input": "",
                         "action": {"type": "search"}}  # fmt: skip
ITEM_KEYS = {
    "message": "id type status content role",
    "function_call": "id type status arguments call_id name",
    "custom_tool_call": "id type status call_id input name",
    "reasoning": "id type content encrypted_content summary",
    "web_search_call": "id type status action",
}
# Each kind of answer in Responses.
RESPONSE_CASES: dict[str, Any] = {
    "text": "Hi",
    "reasoning, no summary": [Reasoning(), "Hi"],
    "function call": ToolCall("f", "12"),
    "call without arguments": ToolCall("f"),
    "custom call": CustomToolCall("f", "ls"),
    "reasoning and call": [Reasoning(), ToolCall("f", "1")],
    "parallel calls": [ToolCall("f", "1"), ToolCall("g", "2")],
    "reasoning with summary": [Reasoning("So it"), "Hi"],
    "web search": [WebSearch("news", sources=["http://a", "http://b"]), "See http://a now"],
    "refusal": Refusal("No"),
    "incomplete": ["Hi", Finish("length")],
    "filtered": ["Hi", Finish("content_filter")],
    "error": StreamError("Broke"),
    "error in a message": ["Hi", StreamError("Broke")],
}
# The stream of each after created, in_progress: + is output_item.added, - is output_item.done.
RESPONSE_TRANSCRIPTS = transcripts(
    """
text: $MESSAGE0 · -0 message completed · completed
reasoning, no summary: +0 reasoning · -0 reasoning · $MESSAGE1 · -1 message completed · completed
function call: +0 function_call · function_call_arguments.delta 0 '12' · function_call_arguments.done 0 '12'
    · -0 function_call completed · completed
call without arguments: +0 function_call · function_call_arguments.delta 0 '{}' · function_call_arguments.done 0 '{}'
    · -0 function_call completed · completed
custom call: +0 custom_tool_call · custom_tool_call_input.delta 0 'ls' · custom_tool_call_input.done 0 'ls'
    · -0 custom_tool_call completed · completed
reasoning and call: +0 reasoning · -0 reasoning · +1 function_call · function_call_arguments.delta 1 '1'
    · function_call_arguments.done 1 '1' · -1 function_call completed · completed
parallel calls: +0 function_call · function_call_arguments.delta 0 '1' · function_call_arguments.done 0 '1'
    · -0 function_call completed · +1 function_call · function_call_arguments.delta 1 '2'
    · function_call_arguments.done 1 '2' · -1 function_call completed · completed
reasoning with summary: +0 reasoning · reasoning_summary_part.added 0 summary_text
    · reasoning_summary_text.delta 0 'So' · reasoning_summary_text.delta 0 ' it'
    · reasoning_summary_text.done 0 'So it' · reasoning_summary_part.done 0 summary_text · -0 reasoning
    · $MESSAGE1 · -1 message completed · completed
web search: +0 web_search_call · web_search_call.in_progress 0 · web_search_call.searching 0
    · web_search_call.completed 0 · -0 web_search_call completed · +1 message · content_part.added 1 output_text
    · output_text.delta 1 'See' · output_text.delta 1 ' http' · output_text.delta 1 '://' · output_text.delta 1 'a'
    · output_text.annotation.added 1 0 http://a · output_text.delta 1 ' now'
    · output_text.annotation.added 1 1 http://b · output_text.done 1 'See http://a now'
    · content_part.done 1 output_text · -1 message completed · completed
refusal: +0 message · content_part.added 0 refusal · refusal.delta 0 'No' · refusal.done 0 'No'
    · content_part.done 0 refusal · -0 message completed · completed
incomplete: $MESSAGE0 · -0 message incomplete · incomplete
filtered: $MESSAGE0 · -0 message incomplete · incomplete
error: error · failed
error in a message: +0 message · content_part.added 0 output_text · output_text.delta 0 'Hi' · error · failed
""",
    MESSAGE0="+0 message · content_part.added 0 output_text · output_text.delta 0 'Hi' · output_text.done 0 'Hi' · "
    "content_part.done 0 output_text",
    MESSAGE1="+1 message · content_part.added 1 output_text · output_text.delta 1 'Hi' · output_text.done 1 'Hi' · "
    "content_part.done 1 output_text",
)


def response_line(event: Any) -> str:
    """An event as a line of a transcript."""
    kind = event["type"].removeprefix("response.")
    item, place = event.get("item"), str(event.get("output_index", ""))
    if item is not None:
        ended = item.get("status", "") if kind.endswith("done") else ""
        return f"{'-' if kind.endswith('done') else '+'}{place} {item['type']} {ended}".strip()
    told = [event[key] for key in ("delta", "text", "arguments", "input", "refusal") if key in event]
    said = repr(told[0]) if told else event.get("part", {}).get("type", "")
    if "annotation" in event:
        said = f"{event['annotation_index']} {event['annotation']['url']}"
    return f"{kind} {place} {said}".strip()


class ResponsesJSONTest(unittest.TestCase):
    def test_the_whole_object_has_its_defaults_in_order(self) -> None:
        """A plain request gets every key, in the API's order, with the API's defaults; no output_text, no input."""
        body = seeded("responses", ["Hi", Usage(5, 2, cached_tokens=1)]).json
        self.assertEqual(list(body), [key for key in RESPONSE_KEYS if key not in OPTIONAL_KEYS])
        id, (item,), usage = body.pop("id"), body.pop("output"), body.pop("usage")
        self.assertEqual(compact(body), compact(DEFAULTS))
        part: Any = {"type": "output_text", "annotations": [], "logprobs": [], "text": "Hi"}
        self.assertEqual(compact(item), compact({"id": item["id"], "type": "message", "status": "completed",
                                                 "content": [part], "role": "assistant"}))  # fmt: skip
        self.assertEqual(compact(usage), compact({
            "input_tokens": 5, "input_tokens_details": {"cache_write_tokens": 0, "cached_tokens": 1},
            "output_tokens": 2, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 7}))  # fmt: skip
        self.assertEqual(id[:23].removeprefix("resp_"), item["id"][:22].removeprefix("msg_"))

    def test_defaults_are_those_of_the_models_family(self) -> None:
        """Effort, context, mode, top_p, cache retention, and the phase of a message, for each family."""
        for model, (effort, context, top_p, retention, phase) in FAMILIES.items():
            with self.subTest(name=model):
                body = spoken("responses", "Hi", model=model)
                reasoning: Any = {"context": context, "effort": effort, "mode": "standard", "summary": None}
                if context is None:
                    del reasoning["mode"]
                self.assertEqual(compact(body["reasoning"]), compact(reasoning))
                self.assertEqual((body["top_p"], body["prompt_cache_retention"]), (top_p, retention))
                keys = ["id", "type", "status", "content", *["phase"] * phase, "role"]
                self.assertEqual(list(body["output"][0]), keys)
                self.assertEqual(body["output"][0].get("phase"), "final_answer" if phase else None)
                self.assertEqual(body["model"], CHAT_FAMILIES.get(model, (model + "-2025-08-07",))[0])

    def test_what_was_asked_is_echoed(self) -> None:
        """Every parameter that the response has a key for comes back in the API's form."""
        schema = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"type": "string"}}}}}
        inner = {
            "type": "object",
            "properties": {"b": {"type": "string"}},
            "additionalProperties": False,
            "required": ["b"],
        }
        strict = {"type": "object", "properties": {"a": inner}, "additionalProperties": False, "required": ["a"]}
        function: Any = {"type": "function", "name": "f", "parameters": schema}
        place = {"type": "approximate", "city": None, "country": "US", "region": None, "timezone": None}
        shape: Any = {"type": "json_schema", "name": "s", "schema": schema}
        rows: tuple[tuple[str, Any, Any], ...] = (
            ("instructions", "Be short", ...), ("max_output_tokens", 50, ...), ("max_tool_calls", 3, ...),
            ("metadata", {"b": "1", "a": "2"}, ...), ("parallel_tool_calls", False, ...),
            ("prompt_cache_key", "k", ...),
            ("safety_identifier", "s", ...), ("store", False, ...), ("truncation", "auto", ...), ("user", "u", ...),
            ("top_logprobs", 2, ...), ("temperature", 0.5, ...), ("temperature", 1, 1.0), ("temperature", 0, 0.0),
            ("top_p", 0.5, ...), ("top_p", 1, 1.0), ("prompt_cache_retention", "24h", ...),
            ("service_tier", "flex", ...), ("service_tier", "priority", ...),
            ("reasoning", {"effort": "low", "summary": "auto"},
             {"context": "current_turn", "effort": "low", "mode": "standard", "summary": "detailed"}),
            ("text", {"verbosity": "low"}, {"format": {"type": "text"}, "verbosity": "low"}),
            ("text", {"format": {"type": "json_object"}}, {"format": {"type": "json_object"}, "verbosity": "medium"}),
            ("text", {"format": shape}, {"format": {"type": "json_schema", "description": None, "name": "s",
                                                    "schema": schema, "strict": True}, "verbosity": "medium"}),
            ("text", {"format": {**shape, "strict": False, "description": "d"}},
             {"format": {"type": "json_schema", "description": "d", "name": "s", "schema": schema, "strict": False},
              "verbosity": "medium"}),
            ("tools", [function], [{"type": "function", "description": None, "name": "f", "output_schema": None,
                                    "parameters": strict, "strict": True}]),
            ("tools", [{**function, "strict": False, "description": "d"}],
             [{"type": "function", "description": "d", "name": "f", "output_schema": None, "parameters": schema,
               "strict": False}]),
            ("tools", [{"type": "web_search"}],
             [{"type": "web_search", "return_token_budget": "default", "search_content_types": ["text"],
               "search_context_size": "medium", "user_location": place}]),
            ("tools", [{"type": "web_search", "user_location": {"type": "approximate", "country": "FR"}}],
             [{"type": "web_search", "return_token_budget": "default", "search_content_types": ["text"],
               "search_context_size": "medium", "user_location": {**place, "country": "FR"}}]),
            ("tools", [{"type": "file_search", "vector_store_ids": ["vs_1"], "max_num_results": 3}],
             [{"type": "file_search", "filters": None, "max_num_results": 3,
               "ranking_options": {"ranker": "auto", "score_threshold": 0.0}, "vector_store_ids": ["vs_1"]}]),
            ("tools", [{"type": "mcp", "server_label": "l", "server_url": "http://a", "require_approval": "never"}],
             [{"type": "mcp", "allowed_tools": None, "headers": None, "require_approval": "never",
               "server_description": None, "server_label": "l", "server_url": "http://a"}]),
            ("tools", [{"type": "tool_search"}], [{"type": "tool_search", "description": None, "parameters": None}]),
        )  # fmt: skip
        server = start(self, lambda request: "Hi")
        for key, asked, told in rows:
            with self.subTest(name=key, asked=asked):
                body = call(server, {**responses(model="gpt-5"), key: asked}).json
                self.assertEqual(compact(body[key]), compact(asked if told is ... else told))
        for choice in ("required", {"type": "function", "name": "f"}):
            with self.subTest(name="tool_choice", asked=choice):
                self.assertEqual(spoken("responses", "Hi", tools=[function], tool_choice=choice)["tool_choice"], choice)

    def test_optional_keys_come_in_their_place(self) -> None:
        """conversation, prompt and prompt_cache_options are told only where they were asked for, in their place."""
        asked: dict[str, Any] = {
            "conversation": {"id": "conv_1"},
            "prompt": {"id": "pmpt_1"},
            "prompt_cache_options": {"mode": "x"},
        }
        with FakeOpenAI(lambda request: "Hi", validate=False) as server:
            body = call(server, responses(**asked)).json
        self.assertEqual(list(body), RESPONSE_KEYS)
        asked["prompt"].update(variables=None, version=None)
        self.assertEqual({key: body[key] for key in asked}, asked)

    def test_each_item_has_its_keys_in_order(self) -> None:
        """The output items of every kind, reasoning without a status, calls with two ids."""
        output = spoken("responses", [*EVERY_ITEM, Refusal("No")])["output"]
        self.assertEqual([" ".join(item) for item in output], [ITEM_KEYS[item["type"]] for item in output])
        reasoning, search, _, function, custom, refusal = output
        self.assertEqual((reasoning["content"], reasoning["summary"]), ([], [{"type": "summary_text", "text": "hm"}]))
        self.assertEqual(compact(search["action"]), '{"type":"search","queries":["q"],"query":"q"}')
        self.assertEqual((function["arguments"], custom["input"]), ('{"a":1}', "x"))
        self.assertEqual(refusal["content"], [{"type": "refusal", "refusal": "No"}])
        self.assertEqual(spoken("responses", Reasoning())["output"][0]["summary"], [])

    def test_parallel_arguments_stay_compact(self) -> None:
        """Responses writes arguments compactly, of several calls too."""
        self.assertEqual(
            [item["arguments"] for item in spoken("responses", PARALLEL)["output"]], ['{"a":1,"b":[2]}', "{}"]
        )

    def test_what_is_included_is_told_only_then(self) -> None:
        """action.sources are there with `include`, and not without; encrypted_content always."""
        search = WebSearch("q", sources=["http://a"])
        answer = [Reasoning("a", encrypted_content="given"), search, Reasoning(), "Hi"]
        plain = spoken("responses", answer)["output"]
        self.assertNotIn("sources", plain[1]["action"])
        self.assertEqual(plain[0]["encrypted_content"], "given")
        include = ["reasoning.encrypted_content", "web_search_call.action.sources"]
        given, searched, made, _ = spoken("responses", answer, include=include)["output"]
        self.assertEqual(list(given), ["id", "type", "content", "encrypted_content", "summary"])
        self.assertEqual(given["encrypted_content"], "given")
        self.assertRegex(made["encrypted_content"], r"^gAAAAAB[\w-]{40,}=*$")
        self.assertEqual(compact(searched["action"]["sources"]), '[{"type":"url","url":"http://a"}]')

    def test_citations_are_where_the_text_names_the_source(self) -> None:
        """A url_citation spans the URL in the text, or all of `([label](url))`; where there is none, all of it."""
        (labelled,) = spoken("responses", [WebSearch("q", sources=["http://a"]), "So ([a](http://a))."])["output"][1][
            "content"
        ]
        self.assertEqual([labelled["annotations"][0][key] for key in ("start_index", "end_index")], [3, 18])
        body = spoken("responses", [WebSearch("q", sources=["http://b.c/d", "http://a"]), "See http://a!"])
        (part,) = body["output"][1]["content"]
        self.assertEqual(compact(part["annotations"]), compact([
            {"type": "url_citation", "end_index": 12, "start_index": 4, "title": "A", "url": "http://a"},
            {"type": "url_citation", "end_index": 13, "start_index": 0, "title": "D", "url": "http://b.c/d"},
        ]))  # fmt: skip
        self.assertEqual(body["tool_usage"]["web_search"], {"num_requests": 1})

    def test_an_incomplete_response_tells_why(self) -> None:
        """length and content_filter: status, details, no completion time, but usage and the item so far."""
        rows: Any = (("length", "max_output_tokens"), ("content_filter", "content_filter"))
        for reason, told in rows:
            with self.subTest(name=reason):
                body = spoken("responses", ["Hi", Finish(reason)])
                self.assertEqual((body["status"], body["completed_at"]), ("incomplete", None))
                self.assertEqual((body["incomplete_details"], body["error"]), ({"reason": told}, None))
                self.assertEqual(body["output"][0]["status"], "incomplete")
                self.assertGreater(body["usage"]["total_tokens"], 0)


class ResponsesStreamTest(unittest.TestCase):
    def test_each_case_streams_as_recorded(self) -> None:
        """The golden transcript of every case, between response.created and the lifecycle event that ends it."""
        for name, answer in RESPONSE_CASES.items():
            with self.subTest(name=name):
                lines = [response_line(event) for event in streamed("responses", answer)]
                self.assertEqual(lines, ["created", "in_progress", *RESPONSE_TRANSCRIPTS[name]])

    def test_each_event_has_its_keys_in_order(self) -> None:
        """Every event of every case has `type`, then the table's keys; numbers without gaps; padding to 16."""
        for name, answer in RESPONSE_CASES.items():
            for obfuscated in (True, False):
                with self.subTest(name=name, obfuscated=obfuscated):
                    events = streamed("responses", answer, stream_options={"include_obfuscation": obfuscated})
                    self.assertEqual([event["sequence_number"] for event in events], list(range(len(events))))
                    for event in events:
                        keys = EVENT_KEYS[event["type"].removeprefix("response.")].split()
                        keys = keys if obfuscated else [key for key in keys if key != "obfuscation"]
                        self.assertEqual(list(event), ["type", *keys])
                        if "obfuscation" in event:
                            self.assertRegex(event["obfuscation"], "^[A-Za-z0-9]{0,15}$")
                            self.assertEqual((len(event["delta"]) + len(event["obfuscation"])) % 16, 0)

    def test_a_background_stream_is_queued_first_and_unpadded(self) -> None:
        """background: created and queued with status "queued", then in_progress; no obfuscation."""
        events = streamed("responses", "Hi", background=True)
        lines = [response_line(event) for event in events]
        self.assertEqual(lines, ["created", "queued", "in_progress", *RESPONSE_TRANSCRIPTS["text"]])
        self.assertEqual([event["response"]["status"] for event in events[:3]], ["queued", "queued", "in_progress"])
        self.assertFalse([event for event in events if "obfuscation" in event])

    def test_items_begin_empty_and_keep_their_identity(self) -> None:
        """output_item.added has all keys of the item, nothing said, status in_progress; events name its id."""
        events = streamed("responses", EVERY_ITEM)
        added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        self.assertEqual([list(item) for item in added], [list(item) for item in done])
        for before, after in zip(added, done, strict=True):
            for key, value in before.items():
                if key == "encrypted_content":
                    self.assertNotEqual(value, after[key], "each place has another")
                    continue
                same = after[key] if key in ("id", "type", "call_id", "name", "role") else EMPTY[key]
                self.assertEqual(value, same)
        for event in events:
            if "item_id" in event:
                self.assertEqual(event["item_id"], added[event["output_index"]]["id"])

    def test_lifecycle_objects_show_the_state_so_far(self) -> None:
        """No stream has billing; created and in_progress have no output, usage or end, and the tier "auto"."""
        keys = [key for key in RESPONSE_KEYS if key not in {*OPTIONAL_KEYS, "billing"}]
        for name, answer, status in (("completed", "Hi", "completed"), ("failed", StreamError("Broke"), "failed"),
                                     ("incomplete", Finish("length"), "incomplete")):  # fmt: skip
            with self.subTest(name=name):
                created, going, *_, last = (
                    each.get("response") for each in seeded("responses", answer, stream=True).events
                )
                self.assertEqual(created, going)
                self.assertEqual([list(created), list(last)], [keys, keys])
                want = {
                    **DEFAULTS,
                    "status": "in_progress",
                    "completed_at": None,
                    "service_tier": "auto",
                    "usage": None,
                }
                want.pop("billing")
                self.assertEqual({key: created[key] for key in want}, want)
                self.assertEqual((created["output"], last["id"], last["status"]), ([], created["id"], status))
                self.assertEqual(last["completed_at"], CLOCK if status == "completed" else None)

    def test_encrypted_content_differs_each_time_it_is_sent(self) -> None:
        """With include it is in the added item, the done item and the response, another one at each place."""
        events = streamed("responses", [Reasoning("a"), "Hi"], include=["reasoning.encrypted_content"])
        items = [*[event["item"] for event in events if "item" in event][:2], events[-1]["response"]["output"][0]]
        self.assertEqual(len({item["encrypted_content"] for item in items}), 3)

    def test_an_error_in_the_stream_has_the_real_nested_form(self) -> None:
        """StreamError: the event `error`, nested, then response.failed with code and message, and nothing else."""
        *_, error, failed = streamed("responses", ["Hi", StreamError("Broke", type="t", code="c", param="p")])
        told = {"type": "t", "code": "c", "message": "Broke", "param": "p"}
        self.assertEqual(
            compact(error), compact({"type": "error", "error": told, "sequence_number": error["sequence_number"]})
        )
        self.assertEqual(compact(failed["response"]["error"]), '{"code":"c","message":"Broke"}')
        self.assertEqual((failed["response"]["output"], failed["response"]["usage"]), ([], None))

    def test_a_stream_error_in_a_json_answer_is_a_500(self) -> None:
        """A request for JSON gets the StreamError's fields as an error answer, in both APIs."""
        for api in PATHS:
            with self.subTest(name=api):
                answer = seeded(api, ["Hi", StreamError("Broke", type="t", code="c", param="p")])
                self.assertEqual((answer.status, compact(answer.json)),
                                 (500, '{"error":{"message":"Broke","type":"t","param":"p","code":"c"}}'))  # fmt: skip


# ---- What both share ----


class UsageTest(unittest.TestCase):
    def test_estimates_grow_with_what_was_asked_and_said(self) -> None:
        """A longer prompt has more prompt tokens, a longer answer more of its own, however the answer is given."""
        for api, prompt, said in (
            ("chat.completions", "prompt_tokens", "completion_tokens"),
            ("responses", "input_tokens", "output_tokens"),
        ):
            for answer in (str, lambda text: [text], lambda text: iter([text])):
                with self.subTest(api=api, answer=answer("Hi")):
                    told: list[tuple[int, int]] = []
                    for text in ("Hi", "Hi there, you " * 9):
                        usage = spoken(api, answer(text), text=text)["usage"]
                        told.append((usage[prompt], usage[said]))
                    (prompt1, said1), (prompt2, said2) = told
                    self.assertTrue(prompt1 < prompt2 and said1 < said2, told)


class IdsTest(unittest.TestCase):
    def test_ids_have_their_real_form(self) -> None:
        """Each id has the prefix, the alphabet and the length that the API's have."""
        completion = seeded("chat.completions", ToolCall("f")).json
        search = seeded("chat.completions", "Hi", model="gpt-4o-search-preview").json
        answer = seeded("responses", [Reasoning(), WebSearch("q"), "Hi", ToolCall("f"), CustomToolCall("g")])
        body, shared = answer.json, answer.json["id"][5:23]
        items = dict(zip(("rs", "ws", "msg", "fc", "ctc"), body["output"], strict=True))
        rest = f"{shared}{CLOCK:08x}[0-9a-f]{{24}}"
        rows = [
            ("completion", "chatcmpl-[A-Za-z0-9]{29}", completion["id"]),
            (
                "search model",
                "chatcmpl-[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
                search["id"],
            ),
            ("call", "call_[A-Za-z0-9]{24}", completion["choices"][0]["message"]["tool_calls"][0]["id"]),
            ("response", f"resp_0[0-9a-f]{{15}}0[01]{CLOCK:08x}[0-9a-f]{{24}}", body["id"]),
            ("request", "req_[0-9a-f]{32}", answer.headers["x-request-id"]),
            *((prefix, f"{prefix}_{rest}", item["id"]) for prefix, item in items.items()),
            *(("call id", "call_[A-Za-z0-9]{24}", items[each]["call_id"]) for each in ("fc", "ctc")),
        ]
        for name, pattern, id in rows:
            with self.subTest(name=name):
                self.assertRegex(id, f"^{pattern}$")
        self.assertEqual(len({id for _, _, id in rows}), len(rows))

    def test_seed_and_clock_make_answers_reproducible(self) -> None:
        """The same seed and clock give the same bytes, request after request; another seed other ids."""

        def answers(seed: int | None) -> list[bytes]:
            with FakeOpenAI(
                lambda request: [Reasoning(), "Hi", ToolCall("f")], seed=seed, clock=lambda: CLOCK
            ) as server:
                return [
                    call(server, BODIES[api](stream=stream)).body for api in PATHS for stream in (False, True, False)
                ]

        first = answers(1)
        self.assertEqual(first, answers(1))
        self.assertEqual(len(set(first)), len(first))
        self.assertFalse(set(first) & set(answers(2)))
        self.assertTrue(all(str(CLOCK).encode() in each for each in first))
        self.assertNotEqual(answers(None), answers(None))


def as_sent(value: Any) -> bytes:
    """The bytes of JSON: compact, UTF-8, and escapes where some reader would take them for the end of a line."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[\x85\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text).encode()


class BytesTest(unittest.TestCase):
    def test_json_is_compact_raw_utf8_with_escapes_where_needed(self) -> None:
        """No spaces, no \\u but for U+0085, U+2028, U+2029 and lone surrogates; it decodes to what was said."""
        for api in PATHS:
            with self.subTest(name=api):
                answer = seeded(api, SPEECH)
                self.assertEqual(answer.body, as_sent(answer.json))
                self.assertIn("日本語 😀", answer.body.decode())
                where = answer.json["output"][0]["content"][0]["text"] if api == "responses" else None
                self.assertEqual(where or answer.json["choices"][0]["message"]["content"], SPEECH)

    def test_streams_are_framed_as_the_apis(self) -> None:
        """Chat: data lines, then [DONE]. Responses: an `event:` line that is the type, a data line, no [DONE].
        Each event is an HTTP chunk, with none in HTTP/1.0, and its JSON as any other, whatever it says.
        """
        answers: dict[str, Any] = {
            "text": [Text(SPEECH)],
            "parts": [part for part in SPOKEN.values() if not part.choice],
            "choices": [*SPOKEN.values()],
            "long": [Text("word " * 300), ToolCall("f", {"a": SPEECH * 2}), CustomToolCall("g", SPEECH)],
        }
        for (name, answer), api, obfuscated in itertools.product(answers.items(), PATHS, (True, False)):
            chat_only = {"include_usage": True} if api == "chat.completions" else {}
            body = BODIES[api](stream=True, stream_options={"include_obfuscation": obfuscated, **chat_only})
            data = http_bytes(body, PATHS[api], "POST", "Connection: close")
            with self.subTest(name=name, api=api, obfuscated=obfuscated):
                told: list[bytes] = []
                for version in (b"HTTP/1.1", b"HTTP/1.0"):
                    server = start(self, always(answer), seed=7, clock=lambda: CLOCK)
                    with Wire(server) as wire:
                        told.append(wire.send(data.replace(b"HTTP/1.1", version, 1)).rest())
                *frames, _ = pieces(told[0])
                chunks = b"".join(b"%x\r\n%b\r\n" % (len(frame), frame) for frame in frames) + b"0\r\n\r\n"
                self.assertEqual([each.partition(b"\r\n\r\n")[2] for each in told], [chunks, b"".join(frames)])
                if api == "chat.completions":
                    self.assertEqual(frames.pop(), b"data: [DONE]\n\n")
                for frame in frames:
                    event = json.loads(frame.partition(b"data: ")[2])
                    line = f"event: {event['type']}\n".encode() if api == "responses" else b""
                    self.assertEqual(frame, line + b"data: " + as_sent(event) + b"\n\n")

    def test_a_string_says_what_a_list_of_it_says(self) -> None:
        """Byte for byte, in JSON and stream, on any model, also when the same request comes again."""
        rows: tuple[dict[str, Any], ...] = (
            {},
            {"service_tier": "flex"},
            {"n": 2},
            {"stream": True},
            {"stream": True, "stream_options": {"include_usage": True}},
        )
        texts = ("Hi there", "", SPEECH, "100% %s", '{"created":1000000000}')
        models = ("gpt-5.6", "gpt-4o-search-preview", "a%b %s")
        pairs = [*((text, "gpt-4o") for text in texts), *((SPEECH, model) for model in models)]
        for (text, model), options in itertools.product(pairs, rows):
            with self.subTest(text=text, model=model, **options):
                told: list[list[bytes]] = []
                for answer in (text, [text], [Text(text)]):
                    with FakeOpenAI(Script(answer, answer), seed=7, clock=lambda: CLOCK) as server:
                        told.append([call(server, chat(model=model, **options)).body for _ in range(2)])
                self.assertEqual(told[0], told[1])
                self.assertEqual(told[2], told[1])


def folded_chat(chunks: list[Any]) -> dict[int, Any]:
    """The choices that the chunks of a stream make together."""
    choices: dict[int, Any] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            message = choices.setdefault(choice["index"], {"content": None, "refusal": None, "calls": {}, "notes": []})
            for key in ("content", "refusal"):
                if delta.get(key) is not None:
                    message[key] = (message[key] or "") + delta[key]
            for told in delta.get("tool_calls", ()):
                whole = message["calls"].setdefault(told["index"], {"text": "", **told})
                kind = "function" if "function" in told else "custom"
                whole["text"] += told[kind]["arguments" if kind == "function" else "input"]
            message["notes"] += delta.get("annotations", ())
            message["finish"] = choice["finish_reason"] or message.get("finish")
    return choices


def folded_response(events: list[Any]) -> list[Any]:
    """The output that the events of a stream make together: the added items, grown by each delta."""
    output: list[Any] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        item: Any = output[event["output_index"]] if "item_id" in event else None
        if kind == "output_item.added":
            output.append(event["item"])
        elif kind == "content_part.added":
            item["content"].append(event["part"])
        elif kind == "reasoning_summary_part.added":
            item["summary"].append(event["part"])
        elif kind == "output_text.annotation.added":
            item["content"][0]["annotations"].append(event["annotation"])
        elif kind.endswith(".delta"):
            held = {"output_text": "content", "refusal": "content", "reasoning_summary_text": "summary"}.get(kind[:-6])
            target = item[held][0] if held else item
            key = {"custom_tool_call_input": "input", "function_call_arguments": "arguments", "refusal": "refusal"}
            target[key.get(kind[:-6], "text")] += event["delta"]
            if event.get("logprobs"):
                target["logprobs"] += event["logprobs"]
        elif kind == "output_item.done":
            done = event["item"]
            output[event["output_index"]].update({key: done[key] for key in ("status", "action") if key in done})
    return output


def told_once(item: Any) -> Any:
    """An item without what differs wherever it is told: secrets, and how many digits a logprob has."""
    text = json.dumps({key: value for key, value in item.items() if key != "encrypted_content"})
    return json.loads(text, parse_float=lambda digits: round(float(digits), 6))


class FoldLawTest(unittest.TestCase):
    """The JSON body is the fold of the stream."""

    def check_chat(self, answer: list[Any], **options: Any) -> None:
        body, (*chunks, usage, _) = both("chat.completions", answer, **options)
        folded = folded_chat(chunks)
        self.assertEqual(sorted(folded), [choice["index"] for choice in body["choices"]])
        for choice in body["choices"]:
            message, whole = choice["message"], folded[choice["index"]]
            self.assertEqual((whole["content"], whole["refusal"]), (message["content"], message["refusal"]))
            self.assertEqual((whole["notes"], whole["finish"]), (message["annotations"], choice["finish_reason"]))
            calls = [
                {"id": each["id"], "type": each["type"], each["type"]: {**each[each["type"]],
                 "arguments" if each["type"] == "function" else "input": each["text"]}}
                for _, each in sorted(whole["calls"].items())
            ]  # fmt: skip
            self.assertEqual(calls, message.get("tool_calls", []))
        self.assertEqual(usage["usage"], body["usage"])
        self.assertEqual({chunk["id"] for chunk in chunks}, {body["id"]})

    def check_responses(self, answer: list[Any], **options: Any) -> None:
        body, events = both("responses", answer, **options)
        done = {each["output_index"]: each["item"] for each in events if each["type"] == "response.output_item.done"}
        last = events[-1]["response"]
        self.assertEqual(events[-1]["type"], f"response.{body['status']}")
        output = [told_once(item) for item in last["output"]]
        self.assertEqual(
            {**last, "billing": body["billing"], "output": output},
            {**body, "output": [*map(told_once, body["output"])]},
        )
        self.assertEqual([told_once(item) for _, item in sorted(done.items())], output)
        self.assertEqual([told_once(item) for item in folded_response(events)], output)
        for event in events:
            if event["type"].endswith("done") and "part" in event:
                item = output[event["output_index"]]
                part = (item.get("content") or item["summary"])[event.get("summary_index", 0)]
                self.assertEqual(event["part"], {**part, "logprobs": []} if "logprobs" in part else part)

    def test_every_kind_of_part_folds_to_its_json(self) -> None:
        """For each kind, in both APIs, also with logprobs and all that can be included."""
        include = ["message.output_text.logprobs", "web_search_call.action.sources"]
        for name, part in SPOKEN.items():
            with self.subTest(name=name):
                self.check_chat([part])
                self.check_responses([part])
                self.check_responses([part, "See https://a.example/1."], include=include)

    def test_random_answers_fold_to_their_json(self) -> None:
        """For answers of random parts, in both APIs."""
        for seed in range(25):
            answer = random_answer(random.Random(seed))
            with self.subTest(seed=seed, answer=answer):
                self.check_chat(answer)
                self.check_responses(answer)

    def test_n_choices_fold_to_their_json(self) -> None:
        """Answers said by several choices too."""
        self.check_chat(["Hello there", ToolCall("f", {"a": 1}), ToolCall("g", {"b": 2}), Finish("stop")], n=3)

    def test_generators_say_what_lists_say(self) -> None:
        """An answer in time folds to the JSON of the same answer known at once; its deltas are what it gave."""
        parts = [Reasoning("hm"), Text("Hello "), Text("there"), ToolCall("f", {"a": 1}, id="call_1")]
        for api in PATHS:
            with self.subTest(api=api):
                known, coming = (seeded(api, answer).body for answer in (parts, iter(parts)))
                self.assertEqual(known, coming)
                self.assertEqual(text_deltas(api, streamed(api, iter(parts))), ["Hello ", "there"])


class LogprobsTest(unittest.TestCase):
    TEXT = "Héllo, wide 😀 world"

    def check(self, entries: list[Any], keys: list[str], top: int) -> None:
        """One entry a token, with plausible numbers."""
        self.assertEqual("".join(entry["token"] for entry in entries), self.TEXT)
        self.assertGreater(len(entries), 3)
        for entry in entries:
            self.assertEqual(list(entry), keys)
            self.assertEqual(len(entry["top_logprobs"]), top)
            numbers = [each["logprob"] for each in entry["top_logprobs"]]
            self.assertEqual(numbers, sorted(numbers, reverse=True))
            self.assertEqual(entry["top_logprobs"][:1], [{key: entry[key] for key in keys[:3]}][:top])
            for each in (entry, *entry["top_logprobs"]):
                self.assertTrue(-20 < each["logprob"] <= 0)
                self.assertEqual(bytes(each["bytes"]).decode(), each["token"])

    def test_entries_without_a_text(self) -> None:
        """A Text with entries and nothing else has no delta, and a stream goes on after it."""
        nothing = Text("", logprobs=[{"token": "", "logprob": -0.5}])
        for api, asked in (("responses", {"include": ["message.output_text.logprobs"]}), ("chat.completions", {})):
            with self.subTest(name=api):
                self.assertIn('"x"', json.dumps(streamed(api, [nothing, "x"], logprobs=True, **asked)))

    def test_chat_tells_them_in_json_and_stream(self) -> None:
        """content has an entry per token; the role chunk none, the finish chunk null; gpt-5 has the key too then."""
        for model in ("gpt-4o", "gpt-5.1"):
            with self.subTest(name=model):
                asked = {"model": model, "logprobs": True, "top_logprobs": 3}
                body, (role, *chunks, finish, _, _) = both("chat.completions", self.TEXT, **asked)
                told = body["choices"][0]["logprobs"]
                self.assertEqual((list(told), told["refusal"]), (["content", "refusal"], None))
                self.check(told["content"], ["token", "logprob", "bytes", "top_logprobs"], 3)
                self.assertEqual(role["choices"][0]["logprobs"], {"content": [], "refusal": None})
                self.assertIsNone(finish["choices"][0]["logprobs"])
                parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
                self.assertEqual([entry for part in parts for entry in part["content"]], told["content"])
                self.assertEqual([part["refusal"] for part in parts], [None] * len(parts))

    def test_a_refusals_are_told_as_its_own(self) -> None:
        """A refusal's entries are under `refusal`, and content is null."""
        body, (role, *chunks, _, _, _) = both("chat.completions", Refusal(self.TEXT), logprobs=True)
        told = body["choices"][0]["logprobs"]
        self.assertIsNone(told["content"])
        self.check(told["refusal"], ["token", "logprob", "bytes", "top_logprobs"], 0)
        self.assertEqual(role["choices"][0]["logprobs"], {"content": None, "refusal": []})
        self.assertEqual(
            [each for chunk in chunks for each in chunk["choices"][0]["logprobs"]["refusal"]], told["refusal"]
        )

    def test_responses_tells_them_where_included(self) -> None:
        """include message.output_text.logprobs: in the part, the done event, and each delta; else []."""
        asked: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
        body, events = both("responses", self.TEXT, **asked)
        told = body["output"][0]["content"][0]["logprobs"]
        self.check([{key: each[key] for key in ("token", "logprob", "bytes", "top_logprobs")} for each in told],
                   ["token", "logprob", "bytes", "top_logprobs"], 2)  # fmt: skip
        self.assertEqual({tuple(each) for each in told}, {("bytes", "logprob", "token", "top_logprobs")})
        deltas = [each["logprobs"] for each in events if each["type"] == "response.output_text.delta"]
        self.assertEqual([entry for part in deltas for entry in part], told)
        (done,) = [each["logprobs"] for each in events if each["type"] == "response.output_text.done"]
        self.assertEqual(done, told)
        self.assertEqual(spoken("responses", self.TEXT)["output"][0]["content"][0]["logprobs"], [])


SHELL = {"commands": ["ls -la", "echo hi"], "max_output_length": None, "timeout_ms": None}
URL = "https://a.example/good-page"
LISTED: dict[str, Any] = {"annotations": None, "description": "d", "input_schema": {}, "name": "n"}
FOUND = {"attributes": {}, "file_id": "f", "filename": "n", "score": 0.5, "text": "t"}
EXITED = {"outcome": {"type": "exit", "exit_code": 0}, "stderr": "", "stdout": "hi\n"}
IMAGE = {"background": "opaque", "output_format": "png", "quality": "low", "size": "1024x1024"}

PARTIAL = "background item_id output_format partial_image_b64 partial_image_index quality size"

# Each type of item: the part, the keys of the whole item, what `added` has in place of its own, and its own events with
# their keys, as recorded. `*` is an event that comes again and again.
ITEMS: dict[str, tuple[Item, str, dict[str, Any], list[str]]] = {
    "mcp_list_tools": (
        Item("mcp_list_tools", server_label="s", tools=[LISTED]),
        "id type server_label tools",
        {"tools": []},
        ["mcp_list_tools.in_progress item_id", "mcp_list_tools.completed item_id"],
    ),
    "mcp_call": (
        Item("mcp_call", name="n", arguments='{"a": 1}', output="o", server_label="s"),
        "id type status approval_request_id arguments error name output server_label",
        {"arguments": "", "output": None},
        [
            "mcp_call.in_progress item_id",
            "mcp_call_arguments.delta delta item_id obfuscation",
            "mcp_call_arguments.done arguments item_id",
            "mcp_call.completed item_id",
        ],
    ),
    "mcp_call that failed": (
        Item("mcp_call", name="n", arguments="{}", error={"message": "m", "type": "http_error"}, status="failed"),
        "id type status approval_request_id arguments error name output",
        {"arguments": "", "error": None},
        [
            "mcp_call.in_progress item_id",
            "mcp_call_arguments.delta delta item_id obfuscation",
            "mcp_call_arguments.done arguments item_id",
            "mcp_call.failed item_id",
        ],
    ),
    "mcp_approval_request": (
        Item("mcp_approval_request", name="n", arguments="{}", server_label="s"),
        "id type arguments name server_label",
        {},
        [],
    ),
    "image_generation_call": (
        Item("image_generation_call", **IMAGE, result="aGk=", partial_images=[{**IMAGE, "partial_image_b64": "aGE="}]),
        "id type status background output_format quality result size",
        {},
        [
            "image_generation_call.in_progress item_id",
            "image_generation_call.generating item_id",
            f"image_generation_call.partial_image {PARTIAL}",
            "image_generation_call.completed item_id",
        ],
    ),
    "code_interpreter_call": (
        Item("code_interpreter_call", code="print(1)", outputs=[{"type": "logs", "logs": "1"}]),
        "id type status code container_id outputs",
        {"code": "", "outputs": None},
        [
            "code_interpreter_call.in_progress item_id",
            "code_interpreter_call_code.delta delta item_id obfuscation *",
            "code_interpreter_call_code.done code item_id",
            "code_interpreter_call.interpreting item_id",
            "code_interpreter_call.completed item_id",
        ],
    ),
    "file_search_call": (
        Item("file_search_call", queries=["q"], results=[FOUND]),
        "id type status queries results",
        {"queries": [], "results": None},
        [f"file_search_call.{stage} item_id" for stage in ("in_progress", "searching", "completed")],
    ),
    "tool_search_call": (
        Item("tool_search_call", arguments={"paths": ["a"]}),
        "id type status arguments call_id execution",
        {"arguments": {}},
        [],
    ),
    "tool_search_output": (
        Item("tool_search_output", tools=[{"type": "function", "name": "f"}]),
        "id type status call_id execution tools",
        {},
        [],
    ),
    "apply_patch_call": (
        Item("apply_patch_call", operation={"path": "a.txt", "type": "update_file", "diff": "@@\n-old\n+new\n"}),
        "id type status call_id operation",
        {"operation": {"type": "update_file", "diff": "", "path": "a.txt"}},
        [
            "apply_patch_call_operation_diff.delta delta item_id obfuscation *",
            "apply_patch_call_operation_diff.done diff item_id",
        ],
    ),
    "apply_patch_call that deletes": (
        Item("apply_patch_call", operation={"type": "delete_file", "path": "a.txt"}),
        "id type status call_id operation",
        {},
        [],
    ),
    "shell_call": (
        Item("shell_call", action=SHELL, environment={"type": "local"}),
        "id type status action call_id environment",
        {"action": {"commands": [], "max_output_length": None, "timeout_ms": None}},
        [
            "shell_call_command.added command command_index",
            "shell_call_command.delta command_index delta obfuscation *",
            "shell_call_command.done command command_index",
        ]
        * 2,
    ),
    "shell_call_output": (
        Item("shell_call_output", output=[EXITED]),
        "id type status call_id max_output_length output",
        {"output": [], "status": "completed"},
        [
            "shell_call_output_content.delta command_index delta item_id",
            "shell_call_output_content.done command_index item_id output",
        ],
    ),
    "local_shell_call": (
        Item("local_shell_call", action={"type": "exec", "command": ["ls"], "env": {}}),
        "id type status action call_id",
        {"action": {"type": "exec", "command": [], "env": {}}},
        [],
    ),
    "computer_call": (
        Item("computer_call", action={"y": 2, "x": 1, "type": "click", "button": "left"}),
        "id type status action call_id pending_safety_checks",
        {},
        [],
    ),
    "compaction": (Item("compaction", encrypted_content="gAAAAA"), "id type encrypted_content", {}, []),
    "program": (Item("program", code="x()"), "id type call_id code fingerprint", {"code": ""}, []),
    "program_output": (
        Item("program_output", result="r"),
        "id type status call_id result",
        {"result": "", "status": "completed"},
        [],
    ),
    "web_search_call": (
        WebSearch(["cats", "dogs"], sources=[URL]),
        "id type status action",
        {"action": {"type": "search"}},
        [f"web_search_call.{stage} item_id" for stage in ("in_progress", "searching", "completed")],
    ),
    "web_search_call that opens a page": (
        Item("web_search_call", action={"url": URL, "type": "open_page"}),
        "id type status action",
        {"action": {"type": "search"}},
        [f"web_search_call.{stage} item_id" for stage in ("in_progress", "searching", "completed")],
    ),
    "of next year": (Item("dream", b=[1], a={"c": None}), "id type status a b", {}, []),
}


class ItemsTest(unittest.TestCase):
    def test_every_type_streams_as_its_row_says(self) -> None:
        """Added, its own events, done: with the keys that were recorded; the JSON has the item that was done."""
        for name, (part, keys, added, steps) in ITEMS.items():
            with self.subTest(name=name):
                body, events = both("responses", [part])
                events = [event for event in events if "response" not in event]
                first, *own, last = events
                self.assertEqual(
                    [first["type"], last["type"]], ["response.output_item.added", "response.output_item.done"]
                )
                self.assertEqual(" ".join(last["item"]), keys)
                for key, value in added.items():
                    self.assertEqual(first["item"][key], value)
                told = [f"{each['type'][9:]} {' '.join(key for key in each if key not in ENVELOPE)}" for each in own]
                self.assertEqual(
                    [line for line, _ in itertools.groupby(told)], [step.removesuffix(" *") for step in steps]
                )
                self.assertEqual({**body["output"][0], **SECRETS}, {**last["item"], **SECRETS})

    def test_added_tells_an_image_by_its_status_alone(self) -> None:
        """An image that is being made has no other keys than id, type and status."""
        _, events = both("responses", [ITEMS["image_generation_call"][0]])
        (added,) = [event["item"] for event in events if event["type"] == "response.output_item.added"]
        self.assertEqual(" ".join(added), "id type status")

    def test_what_is_included_is_told_only_then(self) -> None:
        """Results and outputs are null, and the sources of a search left out, unless `include` names them."""
        for type, key, include in (
            ("file_search_call", "results", "file_search_call.results"),
            ("code_interpreter_call", "outputs", "code_interpreter_call.outputs"),
        ):
            with self.subTest(name=type):
                part = ITEMS[type][0]
                self.assertIsNone(spoken("responses", [part])["output"][0][key])
                self.assertEqual(spoken("responses", [part], include=[include])["output"][0][key], part.fields[key])

    def test_a_text_may_be_given_in_the_pieces_that_a_stream_sends(self) -> None:
        """The item has the whole text, the stream these deltas."""
        for name, part, kind, deltas in (
            (
                "code",
                Item("code_interpreter_call", code=["im", "port os"]),
                "code_interpreter_call_code",
                ["im", "port os"],
            ),
            ("command", Item("shell_call", action={"commands": [["l", "s"]]}), "shell_call_command", ["l", "s"]),
        ):
            with self.subTest(name=name):
                body, events = both("responses", [part])
                self.assertEqual([e["delta"] for e in events if e["type"] == f"response.{kind}.delta"], deltas)
                self.assertIn("".join(deltas), json.dumps(body["output"][0]))

    def test_what_is_not_given_is_made_up(self) -> None:
        """Ids with the prefix of their type, call ids, containers: the same in a stream's events and its response."""
        for name, prefix in (("mcp_call", "mcp_"), ("shell_call", "sh_"), ("program_output", "cmo_")):
            self.assertRegex(spoken("responses", [ITEMS[name][0]])["output"][0]["id"], rf"^{prefix}[0-9a-f]{{50}}$")
        _, events = both("responses", [ITEMS["code_interpreter_call"][0]])
        places = [event["item"]["container_id"] for event in events if "item" in event]
        places += [event["response"]["output"][0]["container_id"] for event in events[-1:]]
        self.assertEqual(len(set(places)), 1)
        self.assertRegex(places[0], r"^cntr_[0-9a-f]{48}$")

    def test_what_the_model_says_is_no_item(self) -> None:
        """Messages, calls and reasoning have parts of their own."""
        for type in ("message", "function_call", "custom_tool_call", "reasoning"):
            self.assertRaisesRegex(ValueError, "Text", Item, type)

    def test_in_chat_an_item_is_nothing(self) -> None:
        """Chat Completions has no place for items."""
        body = spoken("chat.completions", [ITEMS["mcp_call"][0], "Done."])
        self.assertEqual(body["choices"][0]["message"]["content"], "Done.")


ENVELOPE = ("type", "output_index", "sequence_number")
SECRETS = {"encrypted_content": "", "fingerprint": ""}  # these differ each time they are sent


class MoreOfPartsTest(unittest.TestCase):
    """What recordings show beside texts and calls."""

    def test_what_is_given_is_sent_as_given(self) -> None:
        """Fragments of one item are a delta each, from a list, a generator or a Stream; a part that is alone is cut."""
        stream = Stream()
        stream.send("I'm", "not cut")
        stream.close()
        rows: dict[str, tuple[Any, list[str]]] = {
            "list": ([Text("It"), Text("'s one")], ["It", "'s one"]),
            "strings": (["It", "'s one"], ["It", "'s one"]),
            "generator": (iter(["It's not cut"]), ["It's not cut"]),
            "stream": (stream, ["I'm", "not cut"]),
            "alone": ([Text("It is cut")], ["It", " is", " cut"]),
            "alone beside others": ([Reasoning("So it is."), Text("It is cut")], ["It", " is", " cut"]),
            "refusal": ([Refusal("I can"), Refusal("not do")], ["I can", "not do"]),
            "call": ([ToolCall("f", '{"a'), ToolCall("", '": 1}')], ['{"a', '": 1}']),
            "reasoning": ([Reasoning("So it"), Reasoning(" is.")], ["So it", " is."]),
        }
        for name, (answer, deltas) in rows.items():
            with self.subTest(name=name):
                kinds = ("output_text", "refusal", "function_call_arguments", "reasoning_summary_text")
                kind = {"refusal": kinds[1], "call": kinds[2], "reasoning": kinds[3]}.get(name, kinds[0])
                events = streamed("responses", answer)
                self.assertEqual([e["delta"] for e in events if e["type"] == f"response.{kind}.delta"], deltas)

    def test_reasoning_has_any_number_of_summaries(self) -> None:
        """Each has its events, strictly one after another."""
        body, events = both("responses", [Reasoning("One.", "Two.", "Three."), "Done."])
        self.assertEqual([each["text"] for each in body["output"][0]["summary"]], ["One.", "Two.", "Three."])
        told = [(e["type"].split("_")[-1], e["summary_index"]) for e in events if "summary_index" in e]
        steps = ("part.added", "text.delta", "text.delta", "text.done", "part.done")
        self.assertEqual(told, [(step, index) for index in range(3) for step in steps])

    def test_reasoning_that_begins_with_the_next_summary(self) -> None:
        """Its first summary is empty, in the events as in the item, however it comes: nothing is told as another."""
        for answer in ([Reasoning("", "So")], iter([Reasoning("", "So")]), [Reasoning(), Reasoning("", "So")]):
            events = streamed("responses", answer)
            done = [event["text"] for event in events if event["type"] == "response.reasoning_summary_text.done"]
            self.assertEqual(done, ["", "So"])
            self.assertEqual([each["text"] for each in events[-1]["response"]["output"][0]["summary"]], done)

    def test_reasoning_may_show_its_text(self) -> None:
        """The text of a Reasoning is a reasoning_text, told before its summaries."""
        body, events = both("responses", [Reasoning("Sum.", text="All thoughts.")])
        self.assertEqual(body["output"][0]["content"], [{"type": "reasoning_text", "text": "All thoughts."}])
        kinds = [event["type"][9:] for event in events if "item_id" in event]
        self.assertEqual(
            kinds[:2] + kinds[3:5],
            ["content_part.added", "reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done"],
        )

    def test_every_reasoning_item_has_encrypted_content(self) -> None:
        """As given, or made up; asked for or not."""
        for part in (Reasoning(), Reasoning("So.", encrypted_content="secret")):
            (item,) = spoken("responses", [part])["output"]
            self.assertEqual(item["encrypted_content"], part.encrypted_content or item["encrypted_content"])
            self.assertTrue(item["encrypted_content"])

    def test_messages_in_a_row(self) -> None:
        """A Text with another phase or id begins a message; one without goes on."""
        parts = [
            Text("Wait", phase="commentary"),
            Text(" a bit."),
            Text("Done.", phase="final_answer"),
            Text("Yes.", id="msg_x"),
        ]
        output = spoken("responses", parts)["output"]
        told = [(item.get("phase"), item["content"][0]["text"]) for item in output]
        self.assertEqual(told, [("commentary", "Wait a bit."), ("final_answer", "Done."), (None, "Yes.")])
        self.assertEqual(output[2]["id"], "msg_x")
        self.assertEqual(spoken("chat.completions", parts)["choices"][0]["message"]["content"], "Wait a bit.Done.Yes.")

    def test_what_is_said_before_a_call_is_commentary(self) -> None:
        """On models that tell phases."""
        parts = [Text("Let me see."), ToolCall("f")]
        self.assertEqual(spoken("responses", parts, model="gpt-5.4")["output"][0]["phase"], "commentary")
        self.assertEqual(spoken("responses", parts[:1], model="gpt-5.4")["output"][0]["phase"], "final_answer")
        self.assertNotIn("phase", spoken("responses", parts, model="gpt-4o")["output"][0])

    def test_namespace_and_caller_of_calls(self) -> None:
        """Both are keys of the item; what a program calls stays in progress."""
        (item,) = spoken("responses", [ToolCall("f", namespace="n", caller={"caller_id": "call_1"})])["output"]
        self.assertEqual(" ".join(item), "id type status arguments call_id caller name namespace")
        self.assertEqual(item["caller"], {"type": "program", "caller_id": "call_1"})
        self.assertEqual(item["status"], "in_progress")
        call: Any = ToolCall("f", id="call_1", namespace="n")
        whole = Completion([CompletionChoice(Message("assistant", tool_calls=(call,)))])
        for answer in (whole, Chunk([ChunkChoice(tool_calls=[call])])):
            self.assertEqual(spoken("responses", answer)["output"][0]["namespace"], "n")

    def test_annotations_come_where_they_belong(self) -> None:
        """A url_citation after the delta that ends it, a file_citation before the character it names, files last."""
        cited = f"Rain ([a]({URL})). Bring a coat."
        begin, end = cited.index("(["), cited.index("))") + 2
        web = {"type": "url_citation", "end_index": end, "start_index": begin, "title": "T", "url": URL}
        file = {"type": "file_citation", "file_id": "f", "filename": "n", "index": 4}
        made = {
            "type": "container_file_citation",
            "container_id": "c",
            "end_index": 0,
            "file_id": "f",
            "start_index": 0,
        }
        for name, text, annotation, before in (
            ("url", cited, web, f"([a]({URL}))"),
            ("file", "Rain.", file, "Rain"),
            ("container", "See the file", made, " file"),
        ):
            with self.subTest(name=name):
                body, events = both("responses", [Text(text, annotations=[annotation])])
                self.assertEqual(body["output"][0]["content"][0]["annotations"], [annotation])
                kinds = [event["type"] for event in events]
                at = kinds.index("response.output_text.annotation.added")
                self.assertEqual(events[at - 1]["delta"], before.strip() if name == "url" else before)
                self.assertEqual(events[at]["annotation"], annotation)
        message = spoken("chat.completions", [Text(cited, annotations=[web, file])])["choices"][0]["message"]
        nested = {key: value for key, value in web.items() if key != "type"}
        self.assertEqual(message["annotations"], [{"type": "url_citation", "url_citation": nested}])

    def test_logprobs_are_the_handlers_where_it_gives_them(self) -> None:
        """One entry a delta, in the key order of each API; whole items round them."""
        given: list[dict[str, Any]] = [
            {"token": token, "logprob": -0.123456789, "bytes": None, "top_logprobs": []} for token in ("It", "'s")
        ]
        text = Text("It's", logprobs=given)
        chunks = streamed("chat.completions", [text], logprobs=True)
        told = [chunk["choices"][0]["logprobs"]["content"] for chunk in chunks[1:-2]]
        self.assertEqual(told, [[entry] for entry in given])
        body, events = both("responses", [text], include=["message.output_text.logprobs"])
        self.assertEqual([e["delta"] for e in events if e["type"].endswith("text.delta")], ["It", "'s"])
        self.assertEqual(body["output"][0]["content"][0]["logprobs"][0]["logprob"], -0.123457)
        self.assertEqual(spoken("responses", [text])["output"][0]["content"][0]["logprobs"], [])
        self.assertEqual(len(spoken("chat.completions", [Text("", logprobs=[])], n=2)["choices"]), 2)
        chunks = streamed("chat.completions", [Refusal("It's", logprobs=given)], logprobs=True)
        self.assertEqual([chunk["choices"][0]["logprobs"]["refusal"] for chunk in chunks[1:-2]], [[e] for e in given])

    def test_usage_tells_its_details(self) -> None:
        """Beside what the API always tells."""
        usage = Usage(9, 8, details={"prompt": {"audio_tokens": 3}, "completion": {"accepted_prediction_tokens": 5}})
        told = spoken("chat.completions", ["x", usage])["usage"]
        self.assertEqual(told["prompt_tokens_details"]["audio_tokens"], 3)
        self.assertEqual(told["completion_tokens_details"]["accepted_prediction_tokens"], 5)
        self.assertRaisesRegex(ValueError, "prompt", Usage, 1, 2, details={"input": {}})

    def test_functions_are_answered_by_a_function_call(self) -> None:
        """A request of the time before tools gets message.function_call, and its finish reason."""
        asked = {"functions": [{"name": "f"}]}
        body, chunks = both("chat.completions", [ToolCall("f", {"a": 1})], **asked)
        choice = body["choices"][0]
        self.assertEqual(" ".join(choice["message"]), "role content function_call refusal annotations")
        self.assertEqual(choice["message"]["function_call"], {"name": "f", "arguments": '{"a":1}'})
        self.assertEqual(choice["finish_reason"], "function_call")
        deltas = deltas_of(chunks)
        self.assertEqual(
            deltas[0], {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}}
        )
        self.assertEqual("".join(delta["function_call"]["arguments"] for delta in deltas[1:-1]), '{"a":1}')
        custom = spoken("chat.completions", [CustomToolCall("f", "x")], **asked)["choices"][0]["message"]
        self.assertEqual(custom["function_call"], {"name": "f", "arguments": "x"})

    def test_moderation_is_told_where_it_is_asked_for(self) -> None:
        """In each API's form; nothing is flagged unless the answer says so."""
        asked = {"moderation": {"model": "omni-moderation-latest"}}
        chat = spoken("chat.completions", "Hi", **asked)
        self.assertEqual(
            " ".join(chat), "id object created model choices moderation usage service_tier system_fingerprint"
        )
        self.assertEqual(" ".join(chat["moderation"]["input"]), "type model results")
        response = spoken("responses", "Hi", **asked)["moderation"]["output"]
        self.assertEqual(
            [response["type"], response["flagged"], len(response["categories"])], ["moderation_result", False, 13]
        )
        self.assertIsNone(spoken("responses", "Hi")["moderation"])
        self.assertEqual(spoken("chat.completions", Reply("Hi", extra={"moderation": 1}), **asked)["moderation"], 1)
        last = streamed("chat.completions", "Hi", **asked)[-2]
        self.assertEqual((last["choices"], " ".join(last)[-22:]), ([], "obfuscation moderation"))

    def test_audio_of_a_chat_message(self) -> None:
        """message.audio in JSON; in a stream transcript, sound, and after all the time when it expires."""
        parts = [Item("audio", data="AAAA", transcript="Sure thing")]
        body, chunks = both("chat.completions", parts, model="gpt-audio")
        message = body["choices"][0]["message"]
        self.assertEqual(" ".join(message), "role content refusal audio annotations")
        self.assertEqual([message["audio"]["data"], message["content"]], ["AAAA", None])
        audio = [delta["audio"] for delta in deltas_of(chunks) if "audio" in delta]
        self.assertEqual("".join(each.get("transcript", "") for each in audio), "Sure thing")
        self.assertEqual("".join(each.get("data", "") for each in audio), "AAAA")
        self.assertEqual(audio[-1], {"expires_at": message["audio"]["expires_at"]})
        self.assertEqual(body["usage"]["prompt_tokens_details"]["text_tokens"], body["usage"]["prompt_tokens"])

    def test_extra_keys_are_the_answers_own(self) -> None:
        """What a Reply says of the envelope stands in its place, in JSON and streams."""
        extra = {"service_tier": "scale", "store": False, "new_key": 1}
        body, events = both("responses", Reply("Hi", extra=extra))
        self.assertEqual([body[key] for key in extra], list(extra.values()))
        self.assertEqual(list(body)[-1], "metadata")
        self.assertEqual([events[0]["response"][key] for key in extra], ["auto", False, 1])
        chat = spoken("chat.completions", Reply("Hi", extra={"system_fingerprint": "fp_x", "service_tier": "scale"}))
        self.assertEqual([chat["system_fingerprint"], chat["service_tier"]], ["fp_x", "scale"])

    def test_a_failure_may_come_without_the_error_event(self) -> None:
        """response.failed alone."""
        kinds = [event["type"] for event in streamed("responses", ["x", StreamError("no", event=False)])]
        self.assertEqual((kinds[-1], "error" in kinds), ("response.failed", False))


class EchoTest(unittest.TestCase):
    """What a response tells again of its request, where it is not just the same."""

    def test_tools(self) -> None:
        """The API's defaults, redactions and omissions, by type."""
        nowhere = {"type": "approximate", "city": None, "country": "US", "region": None, "timezone": None}
        schema: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "object", "properties": {}}}}
        strict = {"type": "object", "properties": {"a": {**schema["properties"]["a"], "additionalProperties": False,
                  "required": []}}, "additionalProperties": False, "required": ["a"]}  # fmt: skip
        function = {"type": "function", "description": None, "name": "f", "output_schema": None}
        listed = {"always": {"tool_names": ["a"]}}
        rows: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
            ({"type": "function", "name": "f", "parameters": schema, "description": ""},
             {**function, "parameters": strict, "strict": True}),
            ({"type": "function", "name": "f", "parameters": schema, "strict": None},
             {**function, "parameters": schema, "strict": False}),
            ({"type": "custom", "name": "c"},
             {"type": "custom", "description": None, "format": {"type": "text"}, "name": "c"}),
            ({"type": "web_search", "external_web_access": True},
             {"type": "web_search", "return_token_budget": "default", "search_content_types": ["text"],
              "search_context_size": "medium", "user_location": nowhere}),
            ({"type": "web_search_preview"},
             {"type": "web_search_preview", "search_context_size": "medium", "user_location": nowhere}),
            ({"type": "image_generation", "partial_images": 2, "size": "1024x1024"},
             {"type": "image_generation", "background": "auto", "model": "gpt-image-1", "moderation": "auto", "n": 1,
              "output_compression": 100, "output_format": "png", "quality": "auto", "size": "1024x1024"}),
            ({"type": "mcp", "server_label": "s", "server_url": "u", "authorization": "secret", "headers": {"a": "b"},
              "allowed_tools": {"tool_names": ["a"]}, "require_approval": listed},
             {"type": "mcp", "allowed_tools": {"read_only": None, "tool_names": ["a"]}, "authorization": "<redacted>",
              "headers": {"a": "<redacted>"},
              "require_approval": {"always": {"read_only": None, "tool_names": ["a"]}, "never": None},
              "server_description": None, "server_label": "s", "server_url": "u"}),
            ({"type": "code_interpreter", "container": {"type": "auto"}},
             {"type": "code_interpreter", "container": {"type": "auto"}}),
        )  # fmt: skip
        for asked, told in rows:
            with self.subTest(name=asked["type"]):
                self.assertEqual(compact(spoken("responses", "Hi", tools=[asked])["tools"]), compact([told]))

    def test_the_order_of_tools(self) -> None:
        """programmatic_tool_calling, functions, hosted tools, custom ones, tool_search, namespaces."""
        asked = ("namespace", "tool_search", "custom", "web_search", "function", "programmatic_tool_calling")
        tools = [{"type": kind, "name": "n", "tools": []} for kind in asked]
        told = spoken("responses", "Hi", tools=tools)["tools"]
        self.assertEqual([tool["type"] for tool in told], list(reversed(asked)))

    def test_deferred_functions(self) -> None:
        """One that a tool search in the input has found is a namespace of its own; additional_tools are told too."""
        function = {"type": "function", "name": "f", "description": "d", "strict": True, "parameters": {}}
        deferred = {**function, "defer_loading": True}
        inside = {"type": "namespace", "name": "n", "description": "d", "tools": [deferred]}
        found = {"type": "tool_search_output", "call_id": None, "execution": "server", "tools": [function]}
        more = {"type": "additional_tools", "role": "developer", "tools": [function]}
        user = {"role": "user", "content": "Hi"}
        rows: tuple[tuple[str, list[Any], list[Any], str, list[str]], ...] = (
            ("plain", [deferred], [user], "gpt-5.4", ["function f"]),
            ("found", [deferred], [found, user], "gpt-5.4", ["namespace f[f]"]),
            ("found in a namespace", [inside], [found, user], "gpt-5.4", ["namespace n[f f]"]),
            ("added", [], [more, user], "gpt-5.4", ["namespace f[f]"]),
            ("added, late models", [], [more, user], "gpt-5.6", ["function f"]),
        )
        for name, tools, items, model, want in rows:
            with self.subTest(name=name), FakeOpenAI(always("Hi"), validate=False) as server:
                told = call(server, {"model": model, "input": items, "tools": tools}).json["tools"]
                lines = [f"{each['type']} {each['name']}" for each in told]
                inner = [" ".join(tool["name"] for tool in each.get("tools", ())) for each in told]
                self.assertEqual(
                    [f"{line}[{names}]" if names else line for line, names in zip(lines, inner, strict=True)], want
                )

    def test_other_keys(self) -> None:
        """reasoning, text.format, prompt, service tiers, tool_choice, access_programs."""
        form = {"type": "json_schema", "name": "n", "schema": {"$schema": "x", "type": "object"}}
        rows: tuple[tuple[str, dict[str, Any], str, Any], ...] = (
            ("pro", {"reasoning": {"mode": "pro", "context": "auto"}}, "reasoning",
             {"context": "current_turn", "effort": "medium", "mode": "pro", "summary": None}),
            ("schema", {"text": {"format": form}}, "text",
             {"format": {"type": "json_schema", "description": None, "name": "n", "schema": {"type": "object"},
                         "strict": True},
              "verbosity": "medium"}),
            ("prompt", {"prompt": {"id": "p", "variables": {"a": "b"}}}, "prompt",
             {"id": "p", "variables": {"a": {"type": "input_text", "text": "b"}}, "version": None}),
            ("fast", {"service_tier": "fast"}, "service_tier", "priority"),
            ("tool_choice", {"tool_choice": {"name": "f", "type": "function"}}, "tool_choice",
             {"type": "function", "name": "f"}),
            ("access_programs", {"model": "gpt-6-astra"}, "access_programs", {"cyber": "standard"}),
        )  # fmt: skip
        for name, asked, key, told in rows:
            with self.subTest(name=name), FakeOpenAI(always("Hi")) as server:
                body = call(server, {"model": "gpt-5", "input": "Hi", **asked}).json
                self.assertEqual(compact(body[key]), compact(told))
        created, *_, last = streamed("responses", "Hi", service_tier="fast")
        self.assertEqual([created["response"]["service_tier"], last["response"]["service_tier"]], ["priority"] * 2)
        failed = streamed("responses", [StreamError("no")])[-1]
        self.assertEqual(failed["response"]["service_tier"], "auto")

    def test_items_of_a_request_with_client_metadata(self) -> None:
        """As Codex sends it: they tell the turn, metadata last."""
        metadata = {"client_metadata": {"turn_id": "t"}}
        (item,) = spoken("responses", [ToolCall("f")], **metadata)["output"]
        keys = "id type status arguments call_id internal_chat_message_metadata_passthrough name metadata"
        self.assertEqual(" ".join(item), keys)
        self.assertEqual(item["metadata"], {"turn_id": "t"})

    def test_a_background_response_has_the_envelope_of_its_reply(self) -> None:
        """id, model and time, where the handler answers at once; a slow one does not hold up the client."""
        reply = Reply("Hi", id="resp_x", model="m", created=5)
        queued = spoken("responses", reply, background=True)
        self.assertEqual([queued[key] for key in ("id", "model", "created_at", "status")], ["resp_x", "m", 5, "queued"])
        released = threading.Event()

        def slow(request: Request) -> str:
            released.wait(WAIT)
            return "Hi"

        with FakeOpenAI(slow) as server:
            self.assertEqual(call(server, responses(background=True)).json["status"], "queued")
            released.set()


class RecordedTest(unittest.TestCase):
    """What the fake sends, read back, is said again the same."""

    INCLUDE = ("message.output_text.logprobs", "web_search_call.action.sources", "code_interpreter_call.outputs",
               "file_search_call.results")  # fmt: skip
    OPTIONS: ClassVar[dict[str, dict[str, Any]]] = {
        "chat.completions": {"model": "gpt-5.4", "stream_options": {"include_usage": True}, "logprobs": True},
        "responses": {"model": "gpt-5.4", "include": [*INCLUDE]},
    }

    def setUp(self) -> None:
        self.server = start(self, clock=lambda: CLOCK)

    def sent(self, api: str, answer: Any, stream: bool) -> bytes:
        options = dict(self.OPTIONS[api])
        if not stream:
            options.pop("stream_options", None)
        self.server.handler = always(answer)
        return call(self.server, BODIES[api](stream=stream, **options)).body

    @staticmethod
    def plain(data: bytes) -> str:
        """What is sent, without what is made up anew each time: ids, secrets, padding."""
        ids = r'"(?:id|item_id|call_id|container_id)":"[a-z]+[_-][^"]*"'
        return re.sub(rf'{ids}|gAAAAAB[^"]*|"obfuscation":"[^"]*"', "", data.decode())

    def check(self, answer: Any) -> None:
        choices = any(
            getattr(part, "choice", 0) for part in answer
        )  # these interleave in Responses, as nothing real does
        for api, stream in itertools.product(("chat.completions",) if choices else PATHS, (False, True)):
            with self.subTest(api=api, stream=stream):
                sent = self.sent(api, answer, stream)
                self.assertEqual(self.plain(self.sent(api, recorded(sent), stream)), self.plain(sent))

    def test_it_may_be_said_any_number_of_times(self) -> None:
        """A recorded answer is an answer like others: it may be shared."""
        for api, stream in itertools.product(PATHS, (False, True)):
            again = recorded(self.sent(api, [Reasoning("a", "b"), "Hello there", ToolCall("f", {"a": 1})], stream))
            self.assertEqual(*(self.plain(self.sent(api, again, stream)) for _ in range(2)))

    def test_every_kind_of_part(self) -> None:
        """For each kind, alone and before a text, in both APIs, JSON and stream."""
        parts = {**SPOKEN, **{name: row[0] for name, row in ITEMS.items()}}
        parts["thoughts"] = Reasoning("One two", "three four", text="All of it", encrypted_content="s")
        parts["commentary"] = Text("Wait a bit", phase="commentary")
        parts["audio"] = Item("audio", id="audio_1", data="QUJD" * 20, transcript="One two three", expires_at=4)
        for name, part in parts.items():
            with self.subTest(name=name):
                self.check([part, "After it."])
        self.check([parts["call"], Finish("length")])

    def test_random_answers(self) -> None:
        """Also of many parts; a choice is Chat Completions' alone."""
        for seed in range(25):
            rng = random.Random(seed)
            with self.subTest(seed=seed):
                self.check(random_answer(rng) or "x")

    def test_choices(self) -> None:
        """Several choices are read as such."""
        answer = [Text("One", choice=0), Text("Two", choice=1), Finish("length", choice=1)]
        again = recorded(self.sent("chat.completions", answer, False))
        told = (self.sent("chat.completions", each, True) for each in (again, answer))
        self.assertEqual(*map(self.plain, told))

    def test_deltas_are_kept(self) -> None:
        """A recorded stream is said again with its own deltas; what was recorded whole is cut into words."""
        for api in PATHS:
            sent = self.sent(api, iter(["It's", " not", " cut here."]), True)
            body = spoken(api, "One two")
            with self.subTest(api=api):
                self.assertEqual(text_deltas(api, streamed(api, recorded(sent))), ["It's", " not", " cut here."])
                self.assertEqual(text_deltas(api, streamed(api, recorded(body))), ["One", " two"])

    def test_a_stream_that_failed(self) -> None:
        """What was said before the error, whole or in part, is said again, and the error as it was told."""
        for said in (
            [],
            ["Let me see"],
            [Reasoning("One two", "three")],
            [ToolCall("f", {"a": 1})],
            [Refusal("No way")],
        ):
            for api, error in itertools.product(PATHS, (StreamError("bad", code="c"), StreamError("bad", event=False))):
                with self.subTest(api=api, said=said, error=error):
                    sent = self.sent(api, [*said, error], True)
                    self.assertEqual(self.plain(self.sent(api, recorded(sent), True)), self.plain(sent))

    def test_an_item_that_was_never_done(self) -> None:
        """Of an item of a stream that broke off, texts and calls are said as far as they came, others not at all."""
        call: dict[str, Any] = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": ""}
        for item, name, said in (
            ({"type": "message", "id": "msg_1", "content": []}, "output_text", ["One", " two"]),
            (call, "function_call_arguments", ["One", " two"]),
            ({"type": "code_interpreter_call", "id": "ci_1", "code": ""}, "code_interpreter_call_code", []),
        ):
            added = {"type": "response.output_item.added", "output_index": 0, "item": item}
            deltas = [{"type": f"response.{name}.delta", "output_index": 0, "delta": text} for text in ("One", " two")]
            with self.subTest(name=name):
                parts: Any = recorded([added, *deltas]).parts
                self.assertEqual([getattr(part, part._grows) for part in parts], said)

    def test_every_form_of_it(self) -> None:
        """Bytes, text, dicts, lists of events, objects with model_dump: returned as they are, or by `recorded`."""
        for api in PATHS:
            body = self.sent(api, "Hello there", False)
            stream = self.sent(api, "Hello there", True)
            events = [json.loads(line[6:]) for line in stream.decode().splitlines() if line.startswith("data: {")]
            value = json.loads(body)
            dumping = SimpleNamespace(model_dump=lambda value=value, **options: value)
            for name, answer in {
                "bytes": recorded(body),
                "text": recorded(body.decode()),
                "stream": recorded(stream),
                "events": recorded(events),
                "dict": value,
                "object": dumping,
                "reply": recorded(dumping),
                "dict in a Reply": Reply(value, headers={"x-a": "b"}),
                "recorded in a Reply": Reply(recorded(stream), model="other"),
            }.items():
                with self.subTest(api=api, name=name):
                    self.assertEqual(text_in(api, spoken(api, answer)), "Hello there")

    def test_one_api_may_answer_for_the_other(self) -> None:
        """A recorded completion can be said as a response, and the other way round."""
        for api, other in itertools.permutations(PATHS):
            sent = self.sent(api, ["Let me see.", ToolCall("f", {"a": 1})], False)
            told = json.dumps(spoken(other, recorded(sent)))
            self.assertIn('"Let me see."', told)
            self.assertIn('"f"', told)

    def test_ids_model_and_time_are_the_recorded_ones(self) -> None:
        """The envelope is the recording's, the echo is of the request that is answered now."""
        content = [{"type": "output_text", "annotations": [], "text": "Hi"}]
        message = {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": content}
        body = {"id": "resp_1", "object": "response", "created_at": 5, "status": "completed", "model": "gpt-x"}
        body.update(output=[message], temperature=0.1)
        told = spoken("responses", body, temperature=0.7)
        self.assertEqual(
            [told["id"], told["created_at"], told["model"], told["temperature"]], ["resp_1", 5, "gpt-x", 0.7]
        )
        self.assertEqual(told["output"][0]["id"], "msg_1")

    def test_what_cannot_be_said_is_told(self) -> None:
        """Nothing is left out in silence: the message says what, and where."""
        message = {"role": "assistant", "content": "Hi", "new_key": {"a": 1}}
        chat = {"object": "chat.completion", "choices": [{"index": 0, "message": message}]}
        event = {"type": "response.dream.told", "output_index": 0}
        added = {"type": "response.output_item.added", "output_index": 0, "item": {"type": "message"}}
        item = {"type": "message", "role": "assistant", "content": []}
        for value, words in (
            (chat, r"the completion\.choices\[0\]\.message\.new_key"),
            ([{"choices": [{"index": 0, "delta": message}]}], r"chunk 0\.choices\[0\]\.delta\.new_key"),
            ([event], "event 0 .*response.dream.told"),
            ([added, event], "event 1 .*response.dream.told"),
            ({"object": "response", "output": [item]}, r"output\[0\]\.content has 0 parts"),
            ({"object": "response", "output": [5]}, r"output\[0\]"),
            ({"object": "list"}, "no chat.completion"),
            ({}, "no chat.completion"),
            ("hello", "JSON or an event stream"),
            ({"object": "chat.completion", "choices": 5, "usage": {"prompt_tokens": "x"}}, "usage|prompt_tokens"),
            ({"object": "response", "output": [{"type": "function_call"}]}, "a key is missing: 'name'"),
        ):
            with self.subTest(value=value):
                self.assertRaisesRegex(ValueError, words, recorded, value)


def deltas_of(chunks: list[Any]) -> list[Any]:
    """The deltas of all choices."""
    return [choice["delta"] for chunk in chunks if chunk != "[DONE]" for choice in chunk["choices"]]


def text_deltas(api: str, events: list[Any]) -> list[str]:
    if api == "responses":
        return [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    return [text for delta in deltas_of(events) if (text := delta.get("content"))]


class HeadersTest(unittest.TestCase):
    LIMITS = tuple(
        f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
    )
    USUAL = ("openai-version", "openai-processing-ms")
    ORG = ("openai-organization", "openai-project")

    def test_answers_have_the_headers_that_their_sender_gives(self) -> None:
        """Content type, request id, version, organization, limits, www-authenticate: as the API sends them."""
        plain, utf8, sse = "application/json", "application/json; charset=utf-8", "text/event-stream; charset=utf-8"
        key = "Authorization: Bearer sk-1"
        bad = "Authorization: Bearer sk-2"
        usual, all_, gate = self.USUAL + self.ORG, self.USUAL + self.ORG + self.LIMITS, ("vary",)
        chat_, responses_ = PATHS["chat.completions"], PATHS["responses"]
        rows: tuple[tuple[str, Any, str, str, str, int, str, tuple[str, ...]], ...] = (
            ("chat", chat(), chat_, "POST", key, 200, plain, all_),
            ("chat stream", chat(stream=True), chat_, "POST", key, 200, sse, all_),
            ("responses", responses(), responses_, "POST", key, 200, plain, all_),
            ("responses stream", responses(stream=True), responses_, "POST", key, 200, sse, all_),
            ("chat 400", chat(n=0), chat_, "POST", key, 400, plain, all_),
            ("responses 400", responses(max_output_tokens=0), responses_, "POST", key, 400, plain, usual),
            ("chat 401", chat(), chat_, "POST", bad, 401, utf8, gate),
            ("chat no key", chat(), chat_, "POST", "X-A: b", 401, utf8, gate),
            ("responses 401", responses(), responses_, "POST", bad, 401, plain, (*self.USUAL, "www-authenticate")),
            ("chat 404", chat(model="nope"), chat_, "POST", key, 404, utf8, gate),
            ("embeddings 404", {"model": "nope", "input": "a"}, "/v1/embeddings", "POST", key, 404, utf8, gate),
            ("models 404", None, "/v1/models/nope", "GET", key, 404, plain, usual),
            ("response 404", None, "/v1/responses/resp_1", "GET", key, 404, plain, usual),
        )  # fmt: skip
        watched = {*all_, "vary", "www-authenticate"}
        with FakeOpenAI(lambda request: "Hi", api_key="sk-1", strict=True) as server:
            for name, body, path, method, field, status, kind, fields in rows:
                with self.subTest(name=name):
                    answer = call(server, body, path, method, field)
                    self.assertEqual((answer.status, answer.headers["content-type"]), (status, kind))
                    self.assertRegex(answer.headers["x-request-id"], "^req_[0-9a-f]{32}$")
                    self.assertEqual(sorted(watched & set(answer.headers)), sorted(fields))
                    if status >= 400:
                        self.assertEqual(list(answer.error), ["message", "type", "param", "code"])
                    if "openai-version" in answer.headers:
                        self.assertEqual(answer.headers["openai-version"], "2020-10-01")
                        self.assertTrue(answer.headers["openai-processing-ms"].isdigit())
                    for each in set(self.LIMITS) & set(answer.headers):
                        self.assertRegex(answer.headers[each], r"^(\d+m)?[\d.]+m?s$" if "reset" in each else r"^\d+$")

    def test_rate_limits_tell_when_to_retry(self) -> None:
        """rate_limit() is the API's 429, with both headers that clients read, and the x-ratelimit ones."""
        rows = ((0.02, "1", "20"), (1.5, "2", "1500"), (30, "30", "30000"))
        for api, (seconds, whole, milliseconds) in itertools.product(PATHS, rows):
            with self.subTest(name=api, seconds=seconds):
                answer = seeded(api, rate_limit(seconds))
                self.assertEqual((answer.status, answer.error["code"]), (429, "rate_limit_exceeded"))
                told = answer.headers
                self.assertEqual((told["retry-after"], told["retry-after-ms"]), (whole, milliseconds))
                self.assertEqual(told["x-ratelimit-remaining-requests"], "0")
                for name in itertools.product(("limit", "remaining", "reset"), ("requests", "tokens")):
                    self.assertIn("x-ratelimit-" + "-".join(name), told)


def deltas(answer: Answer) -> list[Any]:
    """What the chunks of a whole stream say."""
    *chunks, done = answer.events
    assert done == "[DONE]"
    return [chunk["choices"][0]["delta"] for chunk in chunks]


def content(answer: Answer) -> Any:
    """The text of a chat completion, or the status of what is none."""
    return answer.json["choices"][0]["message"]["content"] if answer.status == 200 else answer.status


class RowsOfTheOriginalTest(unittest.TestCase):
    """Every row of the original's table; a docstring, or the name of a subtest, names it."""

    def only_fault(self, handler: Callable[[Request], Any], body: dict[str, Any]) -> str:
        """The words of the 500 that this handler gives, which the server keeps too."""
        server = FakeOpenAI(handler).start()
        try:
            got = call(server, body)
        finally:
            with self.assertRaises(Exception) as caught:
                server.stop()
        self.assertEqual((got.status, got.headers["x-should-retry"]), (500, "false"))
        self.assertIn(str(caught.exception), got.error["message"])
        return str(got.error["message"])

    def test_new_open_ai(self) -> None:
        """NewOpenAI(t, handler): start() has a base URL, and is closed at cleanup."""

        class Inner(unittest.TestCase):
            def runTest(self) -> None:  # noqa: N802
                self.server = start(self, lambda request: "Hi")
                self.answer = call(self.server, chat())

        inner = Inner()
        result = unittest.TestResult()
        inner.run(result)
        self.assertTrue(result.wasSuccessful(), result.errors)
        self.assertEqual(inner.answer.status, 200)
        self.assertRegex(inner.server.base_url, r"^http://127\.0\.0\.1:\d+/v1$")
        with self.assertRaises(OSError):
            Wire(inner.server)

    def test_post_chat_completions_and_responses(self) -> None:
        """POST /chat/completions, POST /responses: one handler for both, also under /v1."""
        server = start(self, lambda request: f"by {request.api}")
        for path in PATHS.values():
            for each in (path, path.removeprefix("/v1")):
                with self.subTest(name=each):
                    body = chat() if "chat" in path else responses()
                    self.assertIn(b"by " + (b"chat.completions" if "chat" in path else b"responses"),
                                  call(server, body, each).body)  # fmt: skip

    def test_request_decoded(self) -> None:
        """Request decoded to model, messages, stream, tools, prompt; unknown keys are kept in options."""
        server = start(self, lambda request: "Hi")
        call(server, chat("Hello", stream=True, tools=[CHAT_CALL], prompt="p", temperature=0.5, shoe_size=43))
        (request,) = server.requests
        self.assertEqual((request.model, request.messages, request.stream, request.tools, request.prompt),
                         ("gpt-4o", [Message("user", "Hello")], True, [Tool("f", parameters={})], "p"))  # fmt: skip
        self.assertEqual(request.options, {"temperature": 0.5, "shoe_size": 43})

    def test_requests_kept(self) -> None:
        """Last request kept, safely across threads: server.requests has them all."""
        server = start(self, lambda request: "Hi")
        threads = [threading.Thread(target=call, args=(server, chat(str(number)))) for number in range(8)]
        for thread in threads:
            thread.start()
        kept = server.wait_for_requests(8, WAIT)
        for thread in threads:
            thread.join(WAIT)
        self.assertEqual(sorted(request.text for request in kept), list("01234567"))

    def test_body_that_is_not_json(self) -> None:
        """Body that is not JSON: 400, with OpenAI's error body."""
        server = start(self, lambda request: "Hi")
        for path in PATHS.values():
            with self.subTest(name=path):
                answer = call(server, b"{not json", path)
                self.assertEqual((answer.status, answer.error["type"]), (400, "invalid_request_error"))

    def test_errors_of_a_handler(self) -> None:
        """The original's errors of a handler are a 500 in the original's words, in both APIs."""
        chunks = streaming_response(*text_chunks("Hi"))
        nothing: tuple[Any, ...] = (None, [], Reply(), streaming_response())
        rows: tuple[tuple[str, Any, bool], ...] = (
            *(("handler returned empty response", each, True) for each in nothing),
            ("handler returned non-streaming response for streaming request", non_streaming_response("Hi"), True),
            ("handler returned streaming response for non-streaming request", chunks, False),
        )
        for (words, answer, stream), (api, body) in itertools.product(rows, BODIES.items()):
            with self.subTest(name=words, answer=answer, api=api):
                self.assertEqual(self.only_fault(always(answer), body(stream=stream)).partition(":")[0], words)

    def test_chunks_while_the_client_reads(self) -> None:
        """Chunks come from a channel while the client reads; closing it ends the stream."""
        stream = Stream()
        server = start(self, lambda request: stream)
        with Wire(server) as wire:
            wire.send(http_bytes(chat(stream=True)))
            for delta in ("one", "two"):
                self.assertTrue(stream.send(Chunk([ChunkChoice(delta=delta)])))
                wire.until(f'"content":"{delta}"'.encode())
            stream.close()
            wire.until(b"data: [DONE]\n\n")
            wire.until(b"\r\n0\r\n\r\n")

    def test_client_gone(self) -> None:
        """Client gone: stop, log at INFO on logger openai_fake, tell the Stream and the generator."""
        stream, closed = Stream(), threading.Event()

        def forever(request: Request) -> Iterator[str]:
            try:
                while True:
                    yield "word "
            finally:
                closed.set()

        server = start(self, Script(stream, forever))
        with self.assertLogs("openai_fake", "INFO") as logs:
            waits: list[Callable[[float], bool]] = [stream.wait_disconnected, closed.wait]
            for wait in waits:
                with Wire(server) as wire:
                    wire.send(http_bytes(chat(stream=True))).until(b"\r\n\r\n")
                self.assertTrue(wait(WAIT))
            server.stop()
        self.assertEqual([record.levelname for record in logs.records], ["INFO"] * 2)
        self.assertIn("client left", logs.output[0])
        self.assertFalse(stream.send("more"))

    def test_chat_sse(self) -> None:
        """Chat SSE: delta content, delta tool_calls, finish_reason only when set; a Chunk is sent as given; [DONE]."""
        chunks = [
            Chunk([ChunkChoice(0, "Hi"), ChunkChoice(1, "Ho")], id="x", created=5, model="m"),
            Chunk([ChunkChoice(tool_calls=[ToolCall("f", "{}", id="call_1")])]),
            Chunk([ChunkChoice(finish_reason="tool_calls")], usage=Usage(1, 2)),
        ]
        head = {"id": "x", "object": "chat.completion.chunk", "created": 5, "model": "m"}
        made = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        *told, done = streamed("chat.completions", chunks)
        self.assertEqual((done, told[2].pop("usage")["total_tokens"]), ("[DONE]", 3))
        choices: list[Any] = [
            [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None},
             {"index": 1, "delta": {"content": "Ho"}, "finish_reason": None}],
            [{"index": 0, "delta": {"tool_calls": [made]}, "finish_reason": None}],
            [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}],
        ]  # fmt: skip
        self.assertEqual(list(map(compact, told)), [compact({**head, "choices": each}) for each in choices])

    def test_responses_sse(self) -> None:
        """Responses SSE: item added once per output, text deltas, text done, item done, completed."""
        events = streamed("responses", text_chunks("one", "two"))
        kinds = [event["type"].removeprefix("response.") for event in events]
        for kind in ("output_item.added", "output_text.delta", "output_text.done", "output_item.done"):
            self.assertEqual(kinds.count(kind), 2)
        self.assertEqual(kinds[-1], "completed")
        self.assertEqual(
            [event["text"] for event in events if event["type"] == "response.output_text.done"], ["one", "two"]
        )

    def test_every_choice_is_an_output_item(self) -> None:
        """Chat JSON; Responses JSON with every choice as a message output item, tool calls too."""
        chosen = [CompletionChoice(Message("assistant", "a")), CompletionChoice(Message("assistant", "b"), 1),
                  CompletionChoice(Message("assistant", None, (ToolCall("f", "{}"),)), 2, "tool_calls")]  # fmt: skip
        answer = Completion(chosen, id="x", created=5, model="m", usage=Usage(1, 2))
        completion = spoken("chat.completions", answer)
        self.assertEqual([completion[key] for key in ("id", "created", "model")], ["x", 5, "m"])
        self.assertEqual([each["message"]["content"] for each in completion["choices"]], ["a", "b", None])
        self.assertEqual([each["finish_reason"] for each in completion["choices"]], ["stop", "stop", "tool_calls"])
        output = spoken("responses", answer)["output"]
        self.assertEqual([item["type"] for item in output], ["message", "message", "function_call"])

    def test_encoding_failure(self) -> None:
        """Encoding failure fails the test."""

        def handler(request: Request) -> Reply:
            bad: dict[str, Any] = {request.options["user"]: object()}
            return Reply("Hi", **bad)

        for api, body in BODIES.items():
            for key in ("id", "model", "created"):
                for stream in (False, True):
                    with self.subTest(name=key, api=api, stream=stream):
                        self.assertIn("object", self.only_fault(handler, body(user=key, stream=stream)))

    def test_answers(self) -> None:
        """The original's kinds of answers and its helpers, each by its name there, and what the client gets of it."""
        done = Completion([CompletionChoice(Message("assistant", "Hi"))])
        chunks, both = text_chunks("Hi", index=0), text_chunks("a", "b", index=0)
        rows: tuple[tuple[str, Any, bool, int, Callable[[Answer], Any], Any], ...] = (
            ("a response is streaming chunks", Reply(*chunks, only="stream"), True, 200, deltas, [{"content": "Hi"}]),
            ("or a completion", Reply(done, only="json"), False, 200, content, "Hi"),
            ("or an error", APIError(418, "No"), False, 418, lambda answer: answer.error["message"], "No"),
            ("chunks fold: 'both streaming and non-streaming' cannot be written", both, False, 200, content, "ab"),
            *((f"error body {status}", APIError(status, "No", type="t"), stream, status,
               lambda answer: [answer.error[key] for key in ("type", "message")], ["t", "No"])
              for status in (400, 418, 500, 503, 599) for stream in (False, True)),
            ("the 429 helper", rate_limit(), True, 429, lambda answer: answer.error["code"], "rate_limit_exceeded"),
            ("OpenAIStreamingResponse", streaming_response(*text_chunks("a", "b")), True, 200, deltas,
             [{"content": "a"}, {"content": "b"}]),
            ("OpenAINonStreamingResponse", non_streaming_response("Hi"), False, 200,
             lambda answer: [answer.json["model"], content(answer), answer.json["choices"][0]["finish_reason"],
                             *list(answer.json["usage"].values())[:3]], ["gpt-4", "Hi", "stop", 10, 5, 15]),
        )  # fmt: skip
        for name, answer, stream, status, view, expected in rows:
            with self.subTest(name=name, stream=stream):
                told = seeded("chat.completions", answer, stream=stream)
                self.assertEqual((told.status, view(told)), (status, expected))

    def test_open_ai_text_chunks(self) -> None:
        """OpenAITextChunks(deltas...): one chunk per delta, choices 0, 1, 2, ...; same id and time; index=0: in one."""
        chunks = text_chunks("a", "b", "c")
        self.assertEqual([each.choices for each in chunks], [[ChunkChoice(at, text)] for at, text in enumerate("abc")])
        self.assertEqual(len({(each.id, each.created, each.model) for each in chunks}), 1)
        self.assertRegex(chunks[0].id, "^chatcmpl-[A-Za-z0-9]{29}$")
        self.assertEqual([each.choices[0].index for each in text_chunks("a", "b", index=0)], [0, 0])

    def test_open_ai_tool_call_chunk(self) -> None:
        """OpenAIToolCallChunk(name, arguments): choice 0, call index 0, id call_..."""
        (chunk, _) = streamed("chat.completions", tool_call_chunk("f", {"a": 1}))
        (made,) = chunk["choices"][0]["delta"]["tool_calls"]
        self.assertEqual((chunk["choices"][0]["index"], made["index"]), (0, 0))
        self.assertEqual(made["function"], {"name": "f", "arguments": '{"a":1}'})
        self.assertRegex(made["id"], "^call_[A-Za-z0-9]{24}$")

    def test_data_types(self) -> None:
        """Choices, tool calls, usage, completion, message, tool as data: frozen dataclasses, equal by value."""
        makers: tuple[Callable[[], Any], ...] = (
            ChunkChoice, lambda: ToolCall("f"), lambda: Usage(1, 2), lambda: Completion([]), lambda: Message("user"),
            lambda: Tool("f"), Chunk, lambda: CompletionChoice(Message("user")),
        )  # fmt: skip
        for make in makers:
            with self.subTest(name=type(make()).__name__):
                self.assertEqual(make(), make())
                with self.assertRaises(AttributeError):
                    setattr(make(), next(iter(make().__dataclass_fields__)), 1)
        self.assertEqual(Usage(1, 2).total_tokens, 3)


# ---- What the API refuses --------------------------------------------------------------------------------------------


HELLO = [{"role": "user", "content": "hello"}]
CHAT_TOOL_CALL = {"id": "call_a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CHAT_TOOL_CALL]}
ANSWER = {"role": "tool", "tool_call_id": "call_a", "content": "1"}
MOVED = (
    "Unsupported parameter: '{}'. In the Responses API, this parameter has moved to '{}'. Try again with the new "
    "parameter. See the API documentation for more information: "
    "https://platform.openai.com/docs/api-reference/responses/create."
)
UNPAIRED = "Invalid parameter: messages with role 'tool' must be a response to a preceeding message with 'tool_calls'."
UNANSWERED = (
    "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'. "
    "The following tool_call_ids did not have response messages: "
)
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 7, 10**30, 1.5, -0.0, float("nan"), float("inf"), "", "x", "\ud800", [], {}, [None],
    [[]], [{}], ["x"], {"type": None}, {"type": []}, {"type": {}}, {"type": "function"}, {"type": "x", "id": {}},
    {"role": []}, {"role": "assistant", "tool_calls": 7}, {"role": "tool", "tool_call_id": []}, {"": None},
    {"type": "function_call", "call_id": []}, {"type": "message", "role": {}, "content": {}},
]  # fmt: skip


def typed(path: str, expected: str, got: str) -> tuple[str, str, str]:
    return f"Invalid type for '{path}': expected {expected}, but got {got} instead.", path, "invalid_type"


def missing(path: str) -> tuple[str, str, str]:
    return f"Missing required parameter: '{path}'.", path, "missing_required_parameter"


def outside(path: str, problem: str, expected: str, got: object, code: str) -> tuple[str, str, str]:
    return f"Invalid '{path}': {problem}. Expected {expected}, but got {got} instead.", path, code


def empty_array(path: str) -> tuple[str, str, str]:
    return outside(path, "empty array", "an array with minimum length 1", "an empty array", "empty_array")


def above(path: str, noun: str, high: object, got: object) -> tuple[str, str, str]:
    return outside(path, f"{noun} above maximum value", f"a value <= {high}", got, f"{noun}_above_max_value")


def below(path: str, noun: str, low: object, got: object) -> tuple[str, str, str]:
    return outside(path, f"{noun} below minimum value", f"a value >= {low}", got, f"{noun}_below_min_value")


def not_among(path: str, got: str, *supported: str) -> tuple[str, str, str]:
    words = [f"'{word}'" for word in supported]
    listed = " and ".join(words) if len(words) == 2 else ", ".join(words[:-1]) + ", and " + words[-1]
    return f"Invalid value: '{got}'. Supported values are: {listed}.", path, "invalid_value"


def by_user(*parts: object) -> list[object]:
    return [{"role": "user", "content": list(parts)}]


CONTENT_PARTS = ("text", "image_url", "input_audio", "refusal", "audio", "file")
ROLES = ("system", "assistant", "user", "function", "tool", "developer")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
STRINGS = "one of a string or array of objects"
NO_STREAM = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
LONG_VALUE = outside(
    "metadata.k",
    "string too long",
    "a string with maximum length 512",
    "a string with length 513",
    "string_above_max_length",
)
MANY_KEYS = outside(
    "metadata",
    "too many properties",
    "an object with at most 16 properties",
    "an object with 17 properties",
    "object_above_max_properties",
)

LONG_ID = outside(
    "safety_identifier",
    "string too long",
    "a string with maximum length 128",
    "a string with length 129",
    "string_above_max_length",
)
OBJECTS = ("moderation", "audio", "web_search_options", "prompt_cache_options")

# parameter, a value that is refused, how, and the nearest value that isn't (added to a valid body)
CHAT_RULES: list[tuple[str, Any, tuple[str, Any, Any], Any]] = [
    ("model", None, ("you must provide a model parameter", None, None), "m"),
    ("model", "", ("you must provide a model parameter", None, None), "m"),
    ("model", 7, typed("model", "a string", "an integer"), "7"),
    ("messages", None, missing("messages"), HELLO),
    ("messages", "hi", typed("messages", "an array of objects", "a string"), HELLO),
    ("messages", {}, typed("messages", "an array of objects", "an object"), HELLO),
    ("messages", [], empty_array("messages"), HELLO),
    ("messages", ["hi"], typed("messages[0]", "an object", "a string"), HELLO),
    ("messages", [{"content": "hi"}], missing("messages[0].role"), HELLO),
    ("messages", [{"role": 7, "content": "hi"}], typed("messages[0].role", "a string", "an integer"), HELLO),
    ("messages", [{"role": "bot", "content": "hi"}], not_among("messages[0].role", "bot", *ROLES), HELLO),
    ("messages", [*HELLO, {"role": "user"}], missing("messages[1].content"), [*HELLO, *HELLO]),
    ("messages", [{"role": "user", "content": None}], typed("messages[0].content", STRINGS, "null"), HELLO),
    ("messages", [{"role": "user", "content": 1.5}], typed("messages[0].content", STRINGS, "a decimal"), HELLO),
    ("messages", by_user("hi"), typed("messages[0].content[0]", "an object", "a string"), by_user()),
    (
        "messages",
        by_user({"text": "hi"}),
        missing("messages[0].content[0].type"),
        by_user({"type": "text", "text": "hi"}),
    ),
    (
        "messages",
        by_user({"type": "x"}),
        not_among("messages[0].content[0].type", "x", *CONTENT_PARTS),
        by_user({"type": "audio"}),
    ),
    (
        "messages",
        by_user({"type": "text"}),
        missing("messages[0].content[0].text"),
        by_user({"type": "text", "text": ""}),
    ),
    (
        "messages",
        by_user({"type": "image_url", "image_url": "u"}),
        typed("messages[0].content[0].image_url", "an object", "a string"),
        by_user({"type": "image_url", "image_url": {"url": "u"}}),
    ),
    ("messages", [{"role": "assistant"}], missing("messages[0].content"), [{"role": "assistant", "refusal": "no"}]),
    (
        "messages",
        [{"role": "assistant", "content": "", "tool_calls": []}],
        empty_array("messages[0].tool_calls"),
        [{"role": "assistant", "content": "", "tool_calls": None}],
    ),
    (
        "messages",
        [{**CALLED, "tool_calls": [{"id": "call_a", "function": {}}]}, ANSWER],
        missing("messages[0].tool_calls[0].type"),
        [CALLED, ANSWER],
    ),
    (
        "messages",
        [{**CALLED, "tool_calls": [{**CHAT_TOOL_CALL, "function": {"arguments": ""}}]}, ANSWER],
        missing("messages[0].tool_calls[0].function.name"),
        [{**CALLED, "tool_calls": [{**CHAT_TOOL_CALL, "function": {"arguments": "", "name": ""}}]}, ANSWER],
    ),
    (
        "messages",
        [{**CALLED, "tool_calls": [{"type": "function", "function": CHAT_TOOL_CALL["function"]}]}],
        missing("messages[0].tool_calls[0].id"),
        [CALLED, ANSWER],
    ),
    (
        "messages",
        [CALLED, {"role": "tool", "content": "1"}],
        missing("messages[1].tool_call_id"),
        [CALLED, {**ANSWER, "content": [{"type": "text", "text": "1"}]}],
    ),
    ("messages", [*HELLO, ANSWER], (UNPAIRED, "messages.[1].role", None), [*HELLO, CALLED, ANSWER]),
    ("messages", [CALLED, ANSWER, *HELLO, ANSWER], (UNPAIRED, "messages.[3].role", None), [CALLED, ANSWER, ANSWER]),
    ("messages", [CALLED, *HELLO], (UNANSWERED + "call_a", "messages.[1].role", None), [CALLED, ANSWER, *HELLO]),
    ("messages", [*HELLO, CALLED], (UNANSWERED + "call_a", "messages.[1].role", None), [*HELLO, CALLED, ANSWER]),
    (
        "messages",
        [
            {
                **CALLED,
                "tool_calls": [CHAT_TOOL_CALL, {**CHAT_TOOL_CALL, "id": "call_b"}, {**CHAT_TOOL_CALL, "id": "call_c"}],
            },
            ANSWER,
            *HELLO,
        ],
        (UNANSWERED + "call_b, call_c", "messages.[2].role", None),
        [
            {**CALLED, "tool_calls": [CHAT_TOOL_CALL, {**CHAT_TOOL_CALL, "id": "b"}]},
            {**ANSWER, "tool_call_id": "b"},
            ANSWER,
            *HELLO,
        ],
    ),
    ("functions", [{}], missing("functions[0].name"), [{"name": "f"}]),
    ("function_call", "x", not_among("function_call", "x", "none", "auto"), {"name": "f"}),
    ("tools", {}, typed("tools", "an array of objects", "an object"), None),
    ("tools", [], empty_array("tools"), None),
    ("tools", [{"type": "function"}], missing("tools[0].function"), None),
    (
        "tools",
        [{"type": "function", "function": {}}],
        missing("tools[0].function.name"),
        [{"type": "function", "function": {"name": "__mirascope_x y"}}],
    ),
    (
        "tools",
        [{"type": "function", "function": {"name": ""}}],
        outside(
            "tools[0].function.name",
            "empty string",
            "a string with minimum length 1",
            "an empty string",
            "empty_string",
        ),
        [{"type": "custom", "custom": {"name": "c"}}],
    ),
    ("tools", [{"type": "web_search"}], not_among("tools[0].type", "web_search", "function", "custom"), None),
    ("tool_choice", "any", not_among("tool_choice", "any", "none", "auto", "required"), "none"),
    (
        "tool_choice",
        {"type": "function", "function": {}},
        missing("tool_choice.function.name"),
        {"type": "function", "function": {"name": "f"}},
    ),
    ("parallel_tool_calls", 1, typed("parallel_tool_calls", "a boolean", "an integer"), True),
    ("max_completion_tokens", 0, below("max_completion_tokens", "integer", 1, 0), 1),
    ("n", 0, below("n", "integer", 1, 0), 1),
    ("n", 9, above("n", "integer", 8, 9), 8),
    ("n", True, typed("n", "an integer", "a boolean"), 1),
    ("n", 1.5, typed("n", "an integer", "a decimal"), None),
    ("temperature", -1, below("temperature", "decimal", 0, -1), 0),
    ("temperature", 2.1, above("temperature", "decimal", 2, 2.1), 2),
    ("temperature", "1", typed("temperature", "a decimal", "a string"), 1.0),
    ("top_p", 1.1, above("top_p", "decimal", 1, 1.1), 1),
    ("presence_penalty", -3, below("presence_penalty", "decimal", -2, -3), -2),
    ("frequency_penalty", 3, above("frequency_penalty", "decimal", 2, 3), 2),
    ("logprobs", 5, typed("logprobs", "a boolean", "an integer"), True),
    ("top_logprobs", 21, above("top_logprobs", "integer", 20, 21), 20),
    ("user", 7, typed("user", "a string", "an integer"), "7"),
    ("seed", "7", typed("seed", "an integer", "a string"), -7),
    ("modalities", ["video"], not_among("modalities[0]", "video", "text", "audio"), ["text", "audio"]),
    ("response_format", {}, missing("response_format.type"), {"type": "text"}),
    (
        "response_format",
        {"type": "json"},
        not_among("response_format.type", "json", "json_object", "json_schema", "text"),
        {"type": "json_object"},
    ),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {}},
        missing("response_format.json_schema.name"),
        {"type": "json_schema", "json_schema": {"name": "n"}},
    ),
    (
        "service_tier",
        "best",
        not_among("service_tier", "best", "auto", "default", "flex", "scale", "priority", "fast"),
        "fast",
    ),
    ("max_tokens", 0, below("max_tokens", "integer", 1, 0), 1),
    ("reasoning_effort", "huge", not_among("reasoning_effort", "huge", *EFFORTS), "xhigh"),
    ("logit_bias", {"50256": -101}, below("logit_bias.50256", "decimal", -100, -101), {"50256": -100}),
    ("stop", 7, typed("stop", "one of a string or array of strings", "an integer"), "END"),
    (
        "stop",
        list("abcde"),
        outside(
            "stop",
            "array too long",
            "an array with maximum length 4",
            "an array with length 5",
            "array_above_max_length",
        ),
        list("abcd"),
    ),
    ("stream", "true", typed("stream", "a boolean", "a string"), False),
    ("stream_options", {"include_usage": True}, (NO_STREAM, "stream_options", None), None),
    ("store", 1, typed("store", "a boolean", "an integer"), True),
    ("metadata", {"k": "v" * 513}, LONG_VALUE, {"k": "v" * 512}),
    ("metadata", {str(i): "v" for i in range(17)}, MANY_KEYS, {str(i): "v" for i in range(16)}),
    (
        "metadata",
        {"k" * 65: "v"},
        outside(
            "metadata",
            "property name too long",
            "a property name with maximum length 64",
            "one with length 65",
            "property_name_above_max_length",
        ),
        {"k" * 64: "v"},
    ),
    ("prediction", "x", typed("prediction", "an object", "a string"), {"type": "content", "content": "x"}),
    ("verbosity", "bogus", not_among("verbosity", "bogus", "low", "medium", "high"), "low"),
    *((name, 7, typed(name, "an object", "an integer"), {}) for name in OBJECTS),
    *((name, 7, typed(name, "a string", "an integer"), "7") for name in ("prompt_cache_key", "prompt_cache_retention")),
    ("safety_identifier", "x" * 129, LONG_ID, "x" * 128),
]
INCLUDES = (
    *("file_search_call.results", "web_search_call.results", "web_search_call.action.sources"),
    *("message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs"),
    *("reasoning.encrypted_content", "message.output_text.logprobs"),
)
INPUT_KINDS = "one of a string or array of input items"
INPUT_PARTS = ("input_text", "input_image", "output_text", "refusal", "input_file", "computer_screenshot")
MOVED_EFFORT = (MOVED.format("reasoning_effort", "reasoning.effort"), None, "unsupported_parameter")
RESPONSES_RULES: list[tuple[str, Any, tuple[str, Any, Any], Any]] = [
    ("model", None, missing("model"), "m"),
    ("model", 7, typed("model", "a string", "an integer"), "m"),
    ("messages", HELLO, (MOVED.format("messages", "input"), None, "unsupported_parameter"), None),
    ("response_format", {}, (MOVED.format("response_format", "text.format"), None, "unsupported_parameter"), None),
    ("reasoning_effort", "low", MOVED_EFFORT, None),
    ("input", None, missing("input"), "hi"),
    ("input", 7, typed("input", INPUT_KINDS, "an integer"), []),
    ("input", {}, typed("input", INPUT_KINDS, "an object"), HELLO),
    ("input", ["hi"], typed("input[0]", "an object", "a string"), HELLO),
    ("input", [{"content": "hi"}], missing("input[0].role"), HELLO),
    (
        "input",
        [{"role": "tool", "content": "hi"}],
        not_among("input[0].role", "tool", "assistant", "system", "developer", "user"),
        HELLO,
    ),
    ("input", [{"type": "message", "role": "user"}], missing("input[0].content"), [{"type": "message", **HELLO[0]}]),
    (
        "input",
        by_user({"type": "text", "text": "hi"}),
        not_among("input[0].content[0].type", "text", *INPUT_PARTS),
        by_user({"type": "input_text", "text": "hi"}),
    ),
    (
        "input",
        [{"role": "assistant", "content": [{"type": "input_text", "text": "hi"}]}],
        not_among("input[0].content[0].type", "input_text", "output_text", "refusal"),
        [{"role": "assistant", "content": [{"type": "output_text", "text": "hi"}]}],
    ),
    (
        "input",
        [{"type": "function_call", "name": "f", "arguments": "{}"}],
        missing("input[0].call_id"),
        [{"type": "function_call", "name": "f", "arguments": "{}", "call_id": "call_a"}],
    ),
    (
        "input",
        [{"type": "function_call_output", "call_id": "call_a"}],
        missing("input[0].output"),
        [{"type": "function_call_output", "call_id": "call_a", "output": []}],
    ),
    ("input", [{"type": "item_reference"}], missing("input[0].id"), [{"id": "msg_a"}]),
    ("include", ["x"], not_among("include[0]", "x", *INCLUDES), []),
    ("include", "x", typed("include", "an array of strings", "a string"), ["reasoning.encrypted_content"]),
    ("tools", {}, typed("tools", "an array of tools", "an object"), []),
    ("tools", [{"name": "f"}], missing("tools[0].type"), [{"type": "web_search"}]),
    ("tools", [{"type": "function"}], missing("tools[0].name"), [{"type": "function", "name": "final_result"}]),
    ("tools", [{"type": "custom"}], missing("tools[0].name"), [{"type": "custom", "name": "Person"}]),
    ("metadata", {"k": 1}, typed("metadata.k", "a string", "an integer"), {"k": "1"}),
    ("text", "x", typed("text", "an object", "a string"), {}),
    (
        "text",
        {"format": {"type": "json_schema", "schema": {}}},
        missing("text.format.name"),
        {"format": {"type": "json_schema", "schema": {}, "name": "n"}, "verbosity": None},
    ),
    ("text", {"verbosity": "x"}, not_among("text.verbosity", "x", "low", "medium", "high"), {"verbosity": "low"}),
    ("temperature", 3, above("temperature", "decimal", 2, 3), 2),
    ("top_p", -0.5, below("top_p", "decimal", 0, -0.5), 0.5),
    ("tool_choice", {"type": "function"}, missing("tool_choice.name"), {"type": "function", "name": "f"}),
    ("stream", 1, typed("stream", "a boolean", "an integer"), True),
    ("stream_options", {"include_obfuscation": False}, (NO_STREAM, "stream_options", None), None),
    ("background", "x", typed("background", "a boolean", "a string"), False),
    ("max_output_tokens", 15, below("max_output_tokens", "integer", 16, 15), 16),
    ("reasoning", {"effort": "x"}, not_among("reasoning.effort", "x", *EFFORTS), {"effort": None, "summary": "auto"}),
    ("truncation", "x", not_among("truncation", "x", "auto", "disabled"), "auto"),
    ("instructions", 7, typed("instructions", "a string", "an integer"), "7"),
    ("top_logprobs", -1, below("top_logprobs", "integer", 0, -1), 0),
    ("prompt", {}, missing("prompt.id"), {"id": "pmpt_a"}),
    ("conversation", 7, typed("conversation", "one of a string or object", "an integer"), {"id": "conv_a"}),
    ("previous_response_id", 7, typed("previous_response_id", "a string", "an integer"), "resp_a"),
    ("parallel_tool_calls", "x", typed("parallel_tool_calls", "a boolean", "a string"), True),
    ("max_tool_calls", 1.0, typed("max_tool_calls", "an integer", "a decimal"), 1),
    ("service_tier", 7, typed("service_tier", "a string", "an integer"), "ultrafast"),
    *((name, 7, typed(name, "an object", "an integer"), {}) for name in ("prompt_cache_options", "moderation")),
    ("user", 7, typed("user", "a string", "an integer"), "7"),
    ("store", 1, typed("store", "a boolean", "an integer"), True),
    *((name, 7, typed(name, "a string", "an integer"), "7") for name in ("prompt_cache_key", "prompt_cache_retention")),
    ("safety_identifier", "x" * 129, LONG_ID, "x" * 128),
]
VALID_BODIES: dict[str, dict[str, Any]] = {
    "chat.completions": {"model": "m", "messages": HELLO},
    "responses": {"model": "m", "input": "hello"},
}


def fault_facts(fault: APIError | None) -> tuple[str, Any, Any] | None:
    if fault is None:
        return None
    assert (fault.status, fault.type, fault.headers) == (400, "invalid_request_error", {})
    return fault.message, fault.param, fault.code


def call_item(id: str | None = None, call_id: str = "call_a") -> dict[str, Any]:
    return {"type": "function_call", "id": id, "call_id": call_id, "name": "f", "arguments": "{}"}


def output_item(call_id: str = "call_a") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": "1"}


class ValidationTest(unittest.TestCase):
    def test_each_rule(self) -> None:
        """Each rule refuses the smallest fault with the API's words, and not the nearest body without it."""
        for api, cases in (("chat.completions", CHAT_RULES), ("responses", RESPONSES_RULES)):
            for name, bad, expected, good in cases:
                with self.subTest(api=api, name=name, bad=bad):
                    self.assertEqual(fault_facts(_fault(api, {**VALID_BODIES[api], name: bad}, False)), expected)
                    self.assertEqual(fault_facts(_fault(api, {**VALID_BODIES[api], name: bad}, True)), expected)
                    self.assertIsNone(fault_facts(_fault(api, {**VALID_BODIES[api], name: good}, True)))

    def test_missing(self) -> None:
        """A required parameter that is absent is named; what can stand for the Responses' input may replace it."""
        no_model = ("you must provide a model parameter", None, None)
        self.assertEqual(fault_facts(_fault("chat.completions", {"messages": HELLO}, False)), no_model)
        self.assertEqual(fault_facts(_fault("chat.completions", {"model": "m"}, False)), missing("messages"))
        self.assertEqual(fault_facts(_fault("responses", {"input": "hi"}, False)), missing("model"))
        self.assertEqual(fault_facts(_fault("responses", {"model": "m"}, False)), missing("input"))
        stand_ins: list[dict[str, Any]] = [
            {"previous_response_id": "resp_a"},
            {"prompt": {"id": "p"}},
            {"conversation": "c"},
        ]
        for instead in stand_ins:
            self.assertIsNone(_fault("responses", {"model": "m", **instead}, True))

    def test_stream_options(self) -> None:
        """Stream options need `stream: true`, and their flags are booleans."""
        for api, body in VALID_BODIES.items():
            with self.subTest(name=api):
                options = {"stream_options": {"include_obfuscation": False}}
                self.assertIsNone(_fault(api, {**body, **options, "stream": True}, True))
                fault = _fault(api, {**body, **options, "stream": False}, True)
                self.assertEqual(fault_facts(fault), (NO_STREAM, "stream_options", None))
                odd = {"stream": True, "stream_options": {"include_usage": 1}}
                expected = typed("stream_options.include_usage", "a boolean", "an integer")
                self.assertEqual(fault_facts(_fault(api, {**body, **odd}, True)), expected)

    def test_conversation_or_previous_response(self) -> None:
        """A conversation and a previous response exclude one another."""
        body = {**VALID_BODIES["responses"], "conversation": "conv_a", "previous_response_id": "resp_a"}
        words = "Ensure you are only providing one of: 'pre..._id' or 'conversation'."
        expected = (f"Mutually exclusive parameters: ''. {words}", None, "mutually_exclusive_parameters")
        self.assertEqual(fault_facts(_fault("responses", body, False)), expected)
        self.assertIsNone(_fault("responses", {**body, "previous_response_id": None}, False))

    def test_unknown_parameters(self) -> None:
        """Unknown parameters pass unless strict; then the nearest free name within two edits is offered."""
        for api, name, hint in (
            ("chat.completions", "foo", ""),
            ("chat.completions", "storre", " Did you mean 'store'?"),
            ("chat.completions", "temperatrue", " Did you mean 'temperature'?"),
            ("chat.completions", "modle", ""),  # `model` is there
            ("chat.completions", "m" * 10**6, ""),
            ("responses", "max_tokens", ""),
            ("responses", "seed", ""),
            ("responses", "include_", " Did you mean 'include'?"),
        ):
            with self.subTest(api=api, name=name[:20]):
                body = {**VALID_BODIES[api], name: 7}
                self.assertIsNone(_fault(api, body, False))
                expected = (f"Unknown parameter: '{name}'.{hint}", name, "unknown_parameter")
                self.assertEqual(fault_facts(_fault(api, body, True)), expected)

    def test_order_of_checks(self) -> None:
        """Of all faults the first in the API's order is told, however the body orders its keys."""
        sevens = {
            "chat.completions": "functions function_call tools tool_choice parallel_tool_calls user moderation "
            "response_format service_tier reasoning_effort logit_bias stop stream stream_options store metadata "
            "prediction verbosity",
            "responses": "moderation input include tools metadata text stream stream_options background reasoning user "
            "truncation instructions store service_tier",
        }
        for api, names in sevens.items():
            ordered = names.split()
            for first, name in enumerate(ordered):
                rest = ordered[first:]
                for shuffled in (rest, rest[::-1], random.Random(first).sample(rest, len(rest))):
                    with self.subTest(api=api, name=name):
                        fault = _fault(api, {**VALID_BODIES[api], **dict.fromkeys(shuffled, 7)}, False)
                        self.assertEqual(fault and fault.param, name)
        numbers = "max_completion_tokens n temperature top_p presence_penalty frequency_penalty top_logprobs max_tokens"
        for first, name in enumerate(ordered := numbers.split()):
            bad = dict.fromkeys(reversed(ordered[first:]), -9)
            fault = _fault("chat.completions", {**VALID_BODIES["chat.completions"], **bad}, False)
            self.assertEqual(fault and fault.param, name)
        bad = {"foo": 1, "n": 0}
        few: dict[str | None, dict[str, Any]] = {
            None: {"model": "", "messages": []},
            "messages": {"model": "m"},
            "foo": {"model": "m", "messages": []},
        }
        for param, body in few.items():
            fault = _fault("chat.completions", {**bad, **body}, True)
            self.assertEqual(fault and fault.param, param)
        fault = _fault("responses", {"foo": 1, "model": "m"}, True)
        self.assertEqual(fault and fault.param, "foo", "an unknown parameter comes before a missing input")

    def test_never_raises(self) -> None:
        """No JSON value in any place raises; the answer is None or a 400 whose texts are strings."""
        chance = random.Random(1)

        def odd(depth: int) -> Any:
            names = ("type", "role", "content", "id", "call_id", "tool_calls", "tool_call_id", "function", "name")
            if depth and chance.random() < 0.5:
                return {chance.choice(names): odd(depth - 1) for _ in range(3)}
            return [odd(depth - 1) for _ in range(2)] if depth and chance.random() < 0.5 else chance.choice(ODD_VALUES)

        for api, valid in VALID_BODIES.items():
            for name in _PARAMETERS[api]:
                for strange in (*ODD_VALUES, *([item] for item in ODD_VALUES), *(odd(4) for _ in range(20))):
                    with self.subTest(api=api, name=name, value=strange):
                        fault = _fault(api, {**valid, name: strange}, chance.random() < 0.5)
                        if fault is not None:
                            self.assertEqual(fault.status, 400)
                            self.assertIsInstance(fault.message, str)
        for _ in range(1000):
            items = [odd(2) for _ in range(4)]
            _conversation_fault(items, chance.randrange(5))

    def test_clients_bodies(self) -> None:
        """What real clients send is accepted, odd as it looks, with a null for any optional parameter."""
        nulls: dict[str, dict[str, Any]] = {
            api: {name: None for name in _PARAMETERS[api] if name not in body} for api, body in VALID_BODIES.items()
        }
        part = {"type": "text", "text": "hi"}
        bodies: list[tuple[str, str, dict[str, Any]]] = [
            ("explicit nulls", "chat.completions", nulls["chat.completions"]),
            ("explicit nulls", "responses", nulls["responses"]),
            ("llama-index", "chat.completions", {"tool_choice": "none", "tools": None}),
            ("langchain-js", "responses", {"text": {}}),
            ("agents", "responses", {"include": [], "tools": [], "tool_choice": "auto"}),
            ("smolagents", "chat.completions", {"stop": ["Observation:"], "messages": by_user(part)}),
            ("azure-like content", "chat.completions", {"messages": [{"role": "system", "content": [part]}, *HELLO]}),
            ("continued round", "responses", {"input": [output_item()], "previous_response_id": "resp_a"}),
            ("other servers' extras", "chat.completions", {"top_k": 5, "repetition_penalty": 1.1}),
            ("other servers' extras", "responses", {"n": 3, "seed": 1, "stop": "x", "max_tokens": 1}),
            ("audio", "chat.completions", {"audio": {"voice": "x"}, "modalities": ["audio"], "web_search_options": {}}),
            ("new items", "responses", {"input": [{"type": "shell_call_output", "call_id": "x", "output": []}]}),
            ("empty tool output", "chat.completions", {"messages": [*HELLO, CALLED, {**ANSWER, "content": ""}]}),
            ("extra message keys", "chat.completions", {"messages": [{**HELLO[0], "cache_control": {}}]}),
        ]  # fmt: skip
        for name, api, body in bodies:
            with self.subTest(name=name, api=api):
                self.assertIsNone(fault_facts(_fault(api, {**VALID_BODIES[api], **body}, False)))

    def test_conversation(self) -> None:
        """Input items belong together: outputs with calls, reasoning with what follows, each id once."""
        one = {"role": "user", "content": "hi"}
        told = {"type": "message", "role": "assistant", "id": "msg_a", "content": "ok"}
        thought: dict[str, Any] = {"type": "reasoning", "id": "rs_a", "summary": []}
        search = {"type": "web_search_call", "id": "ws_a", "status": "completed"}
        nameless: dict[str, Any] = {"type": "reasoning", "summary": []}
        uncalled = "No tool call found for function call output with call_id call_a."
        unanswered = "No tool output found for function call call_a."
        twice = "Duplicate item found with id msg_a. Remove duplicate items from your input and try again."
        lone = "Item 'rs_a' of type 'reasoning' was provided without its required following item."
        unreasoned = "Item 'ws_a' of type 'web_search_call' was provided without its required 'reasoning' item."
        cases: list[tuple[str, list[Any], int, str, list[Any]]] = [
            ("no call", [one, output_item()], 0, uncalled, [one, call_item(), output_item()]),
            ("another's output", [call_item(), output_item(), call_item("b", "call_b"), output_item("call_c")], 0,
             uncalled.replace("call_a", "call_c"),
             [call_item(), output_item(), call_item("b", "call_b"), output_item("call_b")]),
            ("no output", [one, call_item()], 0, unanswered, [one, call_item(), output_item()]),
            ("stored call", [one, call_item(), one], 2, unanswered, [one, call_item(), output_item()]),
            ("twice", [told, one, told], 0, twice, [told, one, {**told, "id": None}]),
            ("stored twice", [one, told, told], 2, twice, [one, told, {**told, "id": "msg_b"}]),
            ("lone at the end", [one, thought], 0, lone, [one, nameless]),
            ("lone before user", [thought, one], 0, lone, [thought, told, one]),
            ("lone before output", [call_item(), thought, output_item()], 0, lone,
             [thought, call_item(), output_item()]),
            ("unreasoned", [one, search, told], 0, unreasoned, [one, thought, search, told]),
            ("reasoned before", [thought, told, one, search], 0, unreasoned, [thought, search, {**search, "id": "b"}]),
            ("unreasoned", [search], 0, unreasoned, [{"type": "web_search_call"}]),
            ("unreasoned", [search], 0, unreasoned, [{"type": "item_reference", "id": "rs_a"}, search]),
        ]  # fmt: skip
        for name, bad, begin, words, good in cases:
            with self.subTest(name=name):
                self.assertEqual(fault_facts(_conversation_fault(bad, begin)), (words, "input", None))
                self.assertIsNone(fault_facts(_conversation_fault(good, min(begin, 1))))
        stored: list[tuple[str, list[Any]]] = [
            ("a reference may be the call", [{"type": "item_reference", "id": "fc_a"}, output_item()]),
            ("an untyped reference too", [{"id": "fc_a"}, output_item()]),
            ("a compaction may hold it", [{"type": "compaction", "id": "cmp_a"}, output_item()]),
            ("nothing", []),
        ]
        for name, items in stored:
            with self.subTest(name=name):
                self.assertIsNone(fault_facts(_conversation_fault(items, 0)))
        self.assertIsNone(_conversation_fault([told, told, thought], 3), "stored turns were accepted once")
        self.assertIsNone(_conversation_fault([one, search, told], 0, False))

    def test_every_parameter(self) -> None:
        """The tables above have a case for every parameter that the module checks."""
        for api, cases in (("chat.completions", CHAT_RULES), ("responses", RESPONSES_RULES)):
            checks = _PARAMETERS[api]
            checked = {name for name, check in checks.items() if check is not _unchecked}
            self.assertEqual(checked, {name for name, *_ in cases})


class RefusalTest(unittest.TestCase):
    def test_refused(self) -> None:
        """What is refused never reaches the handler, is an HTTP error though it asked for a stream, and is kept."""
        handler = mock.Mock()
        with FakeOpenAI(handler) as server:
            for api, path in PATHS.items():
                bodies: list[Any] = [BODIES[api](temperature=3, stream=True), {"stream": True}, [], "x"]
                for body in bodies:
                    with self.subTest(name=f"{api} {body!r}"):
                        answer = call(server, body, path)
                        self.assertEqual((answer.status, answer.headers["content-type"]), (400, "application/json"))
                        self.assertEqual(answer.error["type"], "invalid_request_error")
                        self.assertEqual(server.requests[-1].raw_body, json.dumps(body).encode())
            self.assertEqual(len(server.requests), 8)
        handler.assert_not_called()

    def test_validate_off(self) -> None:
        """With validate=False the handler gets what the API would refuse; only a body that is no JSON object is not."""
        unknown = {"previous_response_id": "resp_x", "conversation": "conv_x"}
        with FakeOpenAI(lambda request: "ok", validate=False) as server:
            for path, body in (
                (PATHS["chat.completions"], {}),
                (PATHS["chat.completions"], chat(temperature=3, messages=[ANSWER], top_k=5)),
                (PATHS["responses"], {}),
                (PATHS["responses"], responses(input=[output_item()], messages=[])),
                *((PATHS["responses"], responses(**{name: id})) for name, id in unknown.items()),
                (PATHS["responses"], responses(**unknown)),
            ):
                with self.subTest(name=repr(body)):
                    self.assertEqual(call(server, body, path).status, 200)
            self.assertEqual(call(server, b"{").status, 400)

    def test_strict(self) -> None:
        """strict=True refuses unknown parameters and models too; by default both are let through."""
        no_model = "The model `m` does not exist or you do not have access to it."
        cases: list[tuple[str, dict[str, Any], int, tuple[str, Any, Any]]] = [
            ("chat.completions", {"foo": 5}, 400, ("Unknown parameter: 'foo'.", "foo", "unknown_parameter")),
            ("responses", {"foo": 5}, 400, ("Unknown parameter: 'foo'.", "foo", "unknown_parameter")),
            ("chat.completions", {"model": "m"}, 404, (no_model, None, "model_not_found")),
            ("responses", {"model": "m"}, 400, ("The requested model 'm' does not exist.", "model", "model_not_found")),
        ]
        with FakeOpenAI(strict=True) as strict, FakeOpenAI() as lenient, FakeOpenAI(strict=True, models=["m"]) as own:
            for api, more, status, expected in cases:
                with self.subTest(name=f"{api} {more}"):
                    body = {**BODIES[api](), **more}
                    answer = call(strict, body)
                    told = tuple(answer.error[key] for key in ("message", "param", "code"))
                    self.assertEqual((answer.status, told), (status, expected))
                    self.assertEqual([call(lenient, body).status, call(strict, BODIES[api]()).status], [200, 200])
                    self.assertEqual(call(own, {**body, "model": "m"}).status, 400 if "foo" in more else 200)

    def test_state(self) -> None:
        """What is not stored, and items that do not belong together over stored turns, are the API's refusals."""
        with FakeOpenAI(lambda request: ToolCall("f", {}, id="call_a")) as server:
            first = call(server, responses()).json["id"]
            cases: list[tuple[str, dict[str, Any], int, str, str | None]] = [
                ("unknown response", {"previous_response_id": "resp_x"}, 400,
                 "Previous response with id 'resp_x' not found.", "previous_response_not_found"),
                ("unknown conversation", {"conversation": "conv_x"}, 404,
                 "Conversation with id 'conv_x' not found.", None),
                ("stored call unanswered", {"previous_response_id": first}, 400,
                 "No tool output found for function call call_a.", None),
                ("another's output", {"previous_response_id": first, "input": [output_item("call_b")]}, 400,
                 "No tool call found for function call output with call_id call_b.", None),
            ]  # fmt: skip
            for name, more, status, message, code in cases:
                with self.subTest(name=name):
                    answer = call(server, responses() | more)
                    self.assertEqual((answer.status, answer.error["message"]), (status, message))
                    self.assertEqual(answer.error["code"], code)
            more = {"previous_response_id": first, "input": [output_item()]}
            self.assertEqual(call(server, responses() | more).status, 200)


PNG = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAA"
LOOSE: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}}
CLOSED: dict[str, Any] = {**LOOSE, "additionalProperties": False, "required": ["a", "b"]}
UNCLOSED = "'additionalProperties' is required to be supplied and to be false."
LACKING = "'required' is required to be supplied and to be an array including every key in properties. Missing 'b'."
MIME = (
    "Invalid file data: 'input[0].content[0].file_data'. Expected a base64-encoded data URL with a valid file MIME "
    "type (e.g. 'data:text/plain;base64,SGVsbG8sIFdvcmxkIQ=='), but got unsupported MIME type 'audio/mpeg'. Please see "
    "https://platform.openai.com/docs/assistants/tools/file-search#supported-files for supported file types."
)


def strict_function(schema: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}


def by_part(part: Any) -> list[Any]:
    return [{"role": "user", "content": [part]}]


class RecordedRefusalTest(unittest.TestCase):
    """Refusals that were recorded, with the nearest body that is taken."""

    chat: ClassVar[list[tuple[dict[str, Any], int, str, str | None, str | None, dict[str, Any]]]] = [
        ({"model": "davinci-002"}, 404, ("This is not a chat model and thus not supported in the v1/chat/completions "
         "endpoint. Did you mean to use v1/completions?"), "model", None, {"model": "davinci"}),
        ({"model": "gpt-3.5-turbo-0613"}, 404, ("The model `gpt-3.5-turbo-0613` has been deprecated, learn more here: "
         "https://platform.openai.com/docs/deprecations"), None, "model_not_found", {"model": "gpt-3.5-turbo-0125"}),
        ({"model": "gpt-5-nano", "max_tokens": 0, "messages": [{"role": "user", "content": None}]}, 400,
         "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
         "max_tokens", "unsupported_parameter", {"model": "gpt-4o", "max_tokens": 1}),
        ({"model": "gpt-5-mini", "stop": "x"}, 400, "Unsupported parameter: 'stop' is not supported with this model.",
         "stop", "unsupported_parameter", {"model": "gpt-4.1", "stop": "x"}),
        ({"web_search_options": {}}, 400, "Web search options not supported with this model.", "web_search_options",
         None, {"model": "gpt-4o-search-preview", "web_search_options": {}}),
        ({"model": "o1-mini", "messages": [{"role": "system", "content": "x"}]}, 400,
         "Unsupported value: 'messages[0].role' does not support 'system' with this model.", "messages[0].role",
         "unsupported_value", {"messages": [{"role": "system", "content": "x"}]}),
        ({"messages": by_part({"type": "input_audio", "input_audio": {}})}, 400,
         "Invalid 'messages[0]'. Content blocks are expected to be either text or image_url type.", "messages[0]",
         "invalid_value",
         {"model": "gpt-4o-audio-preview", "messages": by_part({"type": "input_audio", "input_audio": {}})}),
        ({"messages": by_part({"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}})}, 400,
         ("You uploaded an unsupported image. Please make sure your image has of one the following formats: "
         "['png', 'jpeg', 'gif', 'webp']."), None, "invalid_image_format",
         {"messages": by_part({"type": "image_url", "image_url": {"url": PNG}})}),
        ({"tools": [strict_function(LOOSE)]}, 400, f"Invalid schema for function 'f': In context=(), {UNCLOSED}",
         "tools[0].function.parameters", "invalid_function_parameters", {"tools": [strict_function(CLOSED)]}),
        ({"tools": [strict_function(None)]}, 400, f"Invalid schema for function 'f': In context=(), {UNCLOSED}",
         "tools[0].function.parameters", "invalid_function_parameters",
         {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": LOOSE}}},
         400, f"Invalid schema for response_format 'n': In context=(), {UNCLOSED}", "response_format", None,
         {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": False, "schema": LOOSE}}}),
    ]  # fmt: skip
    responses: ClassVar[list[tuple[dict[str, Any], int, str, str | None, str | None, dict[str, Any]]]] = [
        ({"text": {"format": {"type": "json_schema", "name": "n", "strict": True, "schema": LOOSE}}}, 400,
         f"Invalid schema for response_format 'n': In context=(), {UNCLOSED}", "text.format.schema",
         "invalid_json_schema", {"text": {"format": {"type": "json_schema", "name": "n", "schema": LOOSE}}}),
        ({"tools": [{"type": "function", "name": "f", "strict": True, "parameters": {**CLOSED, "required": ["a"]}}]},
         400, f"Invalid schema for function 'f': In context=(), {LACKING}", "tools[0].parameters",
         "invalid_function_parameters", {"tools": [{"type": "function", "name": "f", "parameters": LOOSE}]}),
        ({"model": "o4-mini", "reasoning": {"effort": "minimal"}}, 400, ("Unsupported value: 'minimal' is not "
         "supported with the 'o4-mini' model. Supported values are: 'low', 'medium', and 'high'."), "reasoning.effort",
         "unsupported_value", {"model": "gpt-5", "reasoning": {"effort": "minimal"}}),
        ({"input": by_part({"type": "input_file", "file_url": "https://a.example/x.mp3?y"})}, 400,
         "The file type you uploaded is not supported. Please try again with a pdf", "input", "unsupported_file",
         {"input": by_part({"type": "input_file", "file_url": "https://a.example/x.pdf"})}),
        ({"input": by_part({"type": "input_file", "file_data": "data:audio/mpeg;base64,AAAA"})}, 400, MIME,
         "input[0].content[0].file_data", "invalid_value",
         {"input": by_part({"type": "input_file", "file_data": "data:application/pdf;base64,AAAA"})}),
    ]  # fmt: skip

    def test_each(self) -> None:
        """Each is refused with its status, words, param and code, in a stream too; the nearest body is taken."""
        with FakeOpenAI(lambda request: "ok") as server:
            for api, cases in (("chat.completions", self.chat), ("responses", self.responses)):
                for bad, status, words, param, code, good in cases:
                    with self.subTest(name=f"{api} {bad}"):
                        answer = call(server, {**BODIES[api](), **bad, "stream": True}, PATHS[api])
                        told = tuple(answer.error[key] for key in ("message", "param", "code"))
                        self.assertEqual((answer.status, told), (status, (words, param, code)))
                        self.assertEqual(call(server, {**BODIES[api](), **good}, PATHS[api]).status, 200)
            answer = get(server, "/embeddings", "POST", {"model": "gpt-4o", "input": "x"})
            words = "You are not allowed to generate embeddings from this model"
            self.assertEqual((answer.status, answer.error["message"], answer.error["param"]), (403, words, None))

    def test_closed_schemas(self) -> None:
        """A strict schema is closed all the way down, and the fault says where it is not."""
        nested = {"type": "array", "items": {"anyOf": [{"type": "null"}, LOOSE]}}
        for name, schema, context in (
            ("root", LOOSE, "()"),
            ("property", {**CLOSED, "properties": {"a": {}, "b": LOOSE}}, "('properties', 'b')"),
            ("deep", {**CLOSED, "properties": {"a": nested}}, "('properties', 'a', 'items', 'anyOf', '1')"),
            ("definition", {**CLOSED, "$defs": {"D": LOOSE}}, "('$defs', 'D')"),
        ):
            with self.subTest(name=name):
                fault = _fault("chat.completions", chat(tools=[strict_function(schema)]), False)
                words = f"Invalid schema for function 'f': In context={context}, {UNCLOSED}"
                self.assertEqual(fault and fault.message, words)
        for schema in ({"$ref": "#/$defs/D", "$defs": {"D": CLOSED}}, {**CLOSED, "properties": {"a": 7}, "items": []}):
            self.assertIsNone(_fault("chat.completions", chat(tools=[strict_function(schema)]), False))

    def test_a_prompt_has_its_model(self) -> None:
        """With a stored prompt the model may be absent: the answer names one."""
        with FakeOpenAI(lambda request: "ok") as server:
            made = call(server, {"input": "Hi", "prompt": {"id": "pmpt_1"}}).json
            self.assertEqual((made["status"], made["model"]), ("completed", "gpt-4o-2024-08-06"))

    def test_reasoning_belongs_to_what_is_named(self) -> None:
        """Reasoning with an id needs a message with one after it, if the response is stored."""
        thought: dict[str, Any] = {"type": "reasoning", "id": "rs_a", "summary": []}
        nameless = [USER, thought, {"role": "assistant", "content": "ok"}, USER]
        named = [USER, thought, {"type": "message", "role": "assistant", "id": "msg_a", "content": "ok"}, USER]
        with FakeOpenAI(lambda request: "ok") as server:
            answer = call(server, responses(input=nameless))
            words = "Item 'rs_a' of type 'reasoning' was provided without its required following item."
            self.assertEqual((answer.status, answer.error["message"]), (400, words))
            self.assertEqual(call(server, responses(input=nameless, store=False)).status, 200)
            self.assertEqual(call(server, responses(input=named)).status, 200)

    def test_searches_without_reasoning(self) -> None:
        """A web search needs its reasoning where the model reasons, at the effort that is asked for."""
        search = {"type": "web_search_call", "id": "ws_a", "status": "completed"}
        for model, effort, status in (("gpt-5", None, 400), ("gpt-5.2", None, 200), ("gpt-5.2", "low", 400),
                                      ("gpt-5.6", "none", 200), ("gpt-4o", None, 200)):  # fmt: skip
            with self.subTest(name=f"{model} {effort}"), FakeOpenAI(lambda request: "ok") as server:
                body = responses(model=model, input=[USER, search, USER], reasoning={"effort": effort})
                self.assertEqual(call(server, body).status, status)


# ---- What was asked, state, and the small endpoints ------------------------------------------------------------------


CITY = '{"city":"Paris"}'
CALLS = (ToolCall("weather", CITY, id="call_a"), CustomToolCall("note", "hm", id="call_b"))
CALL_ITEMS = [
    {"type": "function_call", "call_id": "call_a", "name": "weather", "arguments": CITY},
    {"type": "custom_tool_call", "call_id": "call_b", "name": "note", "input": "hm"},
]
USER = {"role": "user", "content": "Rain?"}
BILLING = {"billing": {"payer": "developer"}}  # in JSON alone (R)
PINNED = {
    73: -0.25819889,
    282: -0.25819889,
    478: -0.25819889,
    493: 0.25819889,
    521: -0.25819889,
    896: -0.25819889,
    977: 0.25819889,
    1033: -0.25819889,
    1207: 0.25819889,
    1266: -0.25819889,
    1286: 0.25819889,
    1304: -0.25819889,
    1340: -0.25819889,
    1419: -0.25819889,
    1452: -0.25819889,
}  # where the vector of "hello" is not zero, on every machine
NAMES = """
    FakeOpenAI start main  Request Message Tool  Reply Stream Script APIError rate_limit echo recorded auto
    Text Refusal Reasoning ToolCall CustomToolCall WebSearch Item Finish Usage  Pause Disconnect Raw StreamError
    Chunk ChunkChoice Completion CompletionChoice streaming_response non_streaming_response text_chunks tool_call_chunk
    Answer Handler Options
"""  # the public names


def asked(api: str, **body: Any) -> Request:
    """A request with this body, as a handler gets it."""
    return Request(api, "POST", PATHS[api], "", {}, json.dumps(body).encode())


def lines(request: Request) -> list[tuple[str, str]]:
    """Who said what in the conversation of a request."""
    return [(message.role, message.text) for message in request.messages]


def get(server: FakeOpenAI, path: str, method: str = "GET", body: Any = None) -> Answer:
    return call(server, body, "/v1" + path, method)


def in_background(server: FakeOpenAI) -> str:
    """Begins a response in the background. Returns its path."""
    return "/responses/" + str(call(server, responses(background=True)).json["id"])


class RequestTest(unittest.TestCase):
    def test_one_view(self) -> None:
        """A conversation with tool calls is the same list of messages in both APIs."""
        said = {"role": "assistant", "content": "Let me look."}
        calls = [
            {"id": "call_a", "type": "function", "function": {"name": "weather", "arguments": CITY}},
            {"id": "call_b", "type": "custom", "custom": {"name": "note", "input": "hm"}},
        ]
        messages = [
            {"role": "system", "content": "Be brief."},
            USER,
            {**said, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "call_a", "content": "21"},
            {"role": "tool", "tool_call_id": "call_b", "content": [{"type": "text", "text": "ok"}]},
        ]
        outputs = [
            {"type": "function_call_output", "call_id": "call_a", "output": "21"},
            {"type": "custom_tool_call_output", "call_id": "call_b", "output": [{"type": "text", "text": "ok"}]},
        ]
        for request in (
            asked("chat.completions", messages=messages),
            asked("responses", instructions="Be brief.", input=[USER, said, *CALL_ITEMS, *outputs]),
        ):
            with self.subTest(name=request.api):
                expected = [("system", "Be brief."), ("user", "Rain?"), ("assistant", "Let me look.")]
                self.assertEqual(lines(request), [*expected, ("tool", "21"), ("tool", "ok")])
                self.assertEqual([message.tool_calls for message in request.messages], [(), (), CALLS, (), ()])
                self.assertEqual([each.tool_call_id for each in request.messages[3:]], ["call_a", "call_b"])
                self.assertEqual(request.text, "Rain?")

    def test_input_forms(self) -> None:
        """Each form of Responses input is the messages that a model sees."""
        thought: dict[str, Any] = {"type": "reasoning", "id": "rs_a", "summary": []}
        parts = [{"type": "input_text", "text": "a"}, {"type": "input_image"}, {"type": "input_text", "text": "b"}]
        forms: list[tuple[str, Any, list[tuple[str, str, int]]]] = [
            ("text", "Hi", [("user", "Hi", 0)]),
            ("no type", [{"role": "developer", "content": "Hi"}], [("developer", "Hi", 0)]),
            ("null type", [{**USER, "type": None}], [("user", "Rain?", 0)]),
            ("parts", [{"type": "message", "role": "user", "content": parts}], [("user", "ab", 0)]),
            ("calls are one message", [USER, thought, *CALL_ITEMS], [("user", "Rain?", 0), ("assistant", "", 2)]),
            ("call after text", [{"role": "assistant", "content": "a"}, CALL_ITEMS[1]], [("assistant", "a", 1)]),
            ("nothing", None, []),
        ]
        for name, given, expected in forms:
            with self.subTest(name=name):
                messages = asked("responses", input=given).messages
                self.assertEqual([(each.role, each.text, len(each.tool_calls)) for each in messages], expected)

    def test_tools_are_flat(self) -> None:
        """Tools have one shape for both APIs, and hosted ones a type only."""
        about = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
        expected = [Tool("f", "d", {"type": "object"}, True), Tool("c", type="custom")]
        nested = [{"type": "function", "function": about}, {"type": "custom", "custom": {"name": "c"}}]
        flat = [{"type": "function", **about}, {"type": "custom", "name": "c"}, {"type": "web_search"}]
        self.assertEqual(asked("chat.completions", tools=nested).tools, expected)
        self.assertEqual(asked("responses", tools=flat).tools, [*expected, Tool("", type="web_search")])

    def test_options(self) -> None:
        """`options` keeps each key that has no attribute of its own, and only those."""
        own: dict[str, Any] = {"model": "m", "messages": [], "stream": True, "tools": []}
        own.update(prompt={"id": "p"}, input="Hi")
        request = asked("responses", **own, temperature=0, top_k=5, instructions="Be brief.")
        self.assertEqual(request.options, {"temperature": 0, "top_k": 5, "instructions": "Be brief."})
        self.assertEqual((request.prompt, request.input, request.stream), ({"id": "p"}, "Hi", True))

    def test_odd_values(self) -> None:
        """Values of the wrong type are never an exception in the view; they are as absent."""
        values: list[Any] = [7, "x", {}, [7, None, "x", {}, {"type": []}, {"role": 7, "tool_calls": [7, {}]}]]
        for odd in values:
            for api in PATHS:
                with self.subTest(name=f"{api} {odd!r}"):
                    request = asked(api, **dict.fromkeys(("model", "messages", "tools", "stream", "instructions"), odd))
                    self.assertEqual((request.stream, request.text), (False, ""))
                    self.assertEqual([type(tool) for tool in request.tools], [Tool] * len(request.tools))
                    self.assertLess(len(repr(request)), 100)

    def test_repr(self) -> None:
        """A request prints its API, model, mode and the beginning of its text, on one short line."""
        long = asked("responses", model="gpt-4o", input="a\n" + "b" * 10**6, stream=True)
        self.assertEqual(repr(long), rf"<Request responses gpt-4o stream 'a\n{'b' * 37}…'>")
        self.assertEqual(repr(asked("chat.completions", **chat())), "<Request chat.completions gpt-4o 'Hi'>")
        self.assertEqual(repr(Request("", "GET", "/v1/models", "", {})), "<Request GET /v1/models>")

    def test_journal(self) -> None:
        """What a handler saw of a request, the HTTP of it too, is what the test sees after the answer."""
        seen: list[Any] = []

        def facts(request: Request) -> Any:
            view = (request.api, request.model, request.messages, request.tools, request.options, repr(request))
            http = (request.method, request.path, request.query, dict(request.headers), request.raw_body)
            return *view, request.body, *http

        def handler(request: Request) -> str:
            seen.append(facts(request))
            return "ok"

        with FakeOpenAI(handler) as server:
            raw = json.dumps(responses(), indent=3).encode()
            first = call(server, raw, "/v1/responses?a=1&b", "POST", "X-Twice: 1", "x-twice: 2").json
            call(server, chat(tools=[{"type": "function", "function": {"name": "f"}}], stream=True))
            call(server, responses("And?", previous_response_id=first["id"], instructions="Be brief."))
            requests = server.requests
        self.assertEqual([facts(request) for request in requests], seen)
        self.assertEqual([role for role, _ in lines(requests[2])], ["system", "user", "assistant", "user"])
        self.assertEqual((requests[0].path, requests[0].query, requests[0].raw_body), ("/v1/responses", "a=1&b", raw))
        self.assertEqual((requests[0].headers["X-TWICE"], requests[0].headers.get("x-other")), ("1, 2", None))

    def test_paths(self) -> None:
        """Both APIs are served with /v1, without, and in Azure's forms, where the path may name the model."""
        with FakeOpenAI() as server:
            for api, path in PATHS.items():
                for prefix in ("/v1", "", "/openai/v1", "/openai", "/openai/deployments/my%20gpt"):
                    with self.subTest(name=prefix + path):
                        body = BODIES[api]()
                        model = "my gpt" if "deployments" in prefix else body["model"]
                        if "deployments" in prefix:
                            del body["model"]
                        answer = call(server, body, prefix + path.removeprefix("/v1") + "?api-version=1")
                        request = server.requests[-1]
                        self.assertEqual((answer.status, request.api, request.model), (200, api, model))


class StateTest(unittest.TestCase):
    def test_stored(self) -> None:
        """What is stored is fetched as it was made, deleted once, and then a 404 that names it, whatever is asked."""
        response = (
            "Response with id 'ID' not found.",
            '{"id":"ID","object":"response.deleted","deleted":true}',
            "GET /input_items POST /cancel",
        )
        rows: tuple[tuple[str, Any, str, str, str], ...] = (
            ("/responses", responses(), *response),
            ("/responses", responses(stream=True), *response),
            ("/chat/completions", chat(store=True), "Completion ID not found",
             '{"object":"chat.completion.deleted","id":"ID","deleted":true}', "POST / GET /messages"),
            ("/conversations", {"items": [USER]}, "Conversation with id 'ID' not found.",
             '{"id":"ID","object":"conversation.deleted","deleted":true}', "POST / GET /items"),
        )  # fmt: skip
        server = start(self, echo)
        for where, body, kind, deleted, more in rows:
            with self.subTest(name=kind, body=body):
                answer = get(server, where, "POST", body)
                made = answer.events[-1]["response"] if body.get("stream") else answer.json
                path = f"{where}/{made['id']}"
                got = get(server, path).json
                same = ("id", "created", "model") if "completions" in where else made  # the rest of a chat is less
                self.assertEqual({key: got[key] for key in same}, {key: made[key] for key in same})
                self.assertEqual(get(server, path, "DELETE").body.decode(), deleted.replace("ID", made["id"]))
                ways = ("GET / DELETE / " + more).split()
                for method, rest in zip(ways[::2], ways[1::2], strict=True):
                    answer = get(server, path + rest.rstrip("/"), method, {} if method == "POST" else None)
                    words = kind.replace("ID", made["id"])
                    self.assertEqual((answer.status, answer.error["message"]), (404, words))

    def test_stored_where_asked_for(self) -> None:
        """A response is stored unless told otherwise, a chat completion where asked for; only in the background
        can one be followed and cancelled.
        """
        server = start(self, echo)
        rows = ((responses(), 200), (responses(store=False), 404), (chat(), 404), (chat(store=True), 200))
        for body, status in rows:
            with self.subTest(name=body):
                path = "/responses/" if "input" in body else "/chat/completions/"
                path += call(server, body).json["id"]
                self.assertEqual(get(server, path).status, status)
        path = "/responses/" + call(server, responses()).json["id"]
        answers = get(server, path + "?stream=true"), get(server, path + "/cancel", "POST")
        self.assertEqual([answer.status for answer in answers], [400, 400])

    def test_input_items(self) -> None:
        """Input items have ids and content parts, come last first, and in pages as asked."""
        items = [{"role": "user", "content": "a"}, {"role": "user", "id": None, "content": "c"}]
        items.insert(1, {"role": "assistant", "id": "msg_b", "content": "b"})
        with FakeOpenAI() as server:
            path = f"/responses/{call(server, responses(input=items)).json['id']}/input_items?"
            data = get(server, path).json["data"]
            told = [(part["type"], part["text"]) for item in data for part in item["content"]]
            self.assertEqual(told, [("input_text", "c"), ("output_text", "b"), ("input_text", "a")])
            self.assertEqual(data[1]["id"], "msg_b")
            self.assertTrue(all(item["id"].startswith("msg_") for item in data))
            for query, expected in (
                ("order=asc", data[::-1]),
                ("limit=2", data[:2]),
                ("limit=100", data),
                ("after=msg_b", data[2:]),
                ("order=asc&after=msg_b", data[:1]),
            ):
                with self.subTest(name=query):
                    page = get(server, path + query).json
                    self.assertEqual((page["data"], page["has_more"]), (expected, query == "limit=2"))
                    self.assertEqual((page["first_id"], page["last_id"]), (expected[0]["id"], expected[-1]["id"]))

    def test_stored_items(self) -> None:
        """An input item is listed with id, type, status and then what it came with; a message's text as a part."""
        said, thought = [{"type": "input_text", "text": "Rain?"}], {"type": "reasoning", "summary": []}
        done = {"status": "completed"}
        rows: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "msg": (USER, {"type": "message", **done, "content": said, "role": "user"}),
            "fc": (CALL_ITEMS[0], {"type": "function_call", **done, **dict(sorted(CALL_ITEMS[0].items())[:3])}),
            "rs": (thought, thought),
        }
        with FakeOpenAI(validate=False) as server:
            for prefix, (given, listed) in rows.items():
                with self.subTest(name=prefix):
                    made = call(server, responses(input=[given])).json
                    (item,) = get(server, f"/responses/{made['id']}/input_items").json["data"]
                    self.assertRegex(item["id"], f"^{prefix}_[0-9a-zA-Z]+$")
                    self.assertEqual(compact(item), compact({"id": item["id"], **listed}))

    def test_chain(self) -> None:
        """Behind previous_response_id stand all turns before, tool rounds too, without their instructions."""
        with FakeOpenAI(Script([Reasoning("hm"), CALLS[0]], "21 degrees", "Warm")) as server:
            first = call(server, responses("Weather?", instructions="Be brief.")).json
            output = [{"type": "function_call_output", "call_id": "call_a", "output": "21"}]
            second = call(server, responses(input=output, previous_response_id=first["id"])).json
            call(server, responses("Warm?", previous_response_id=second["id"], instructions="Be kind."))
            request = server.requests[-1]
        expected = [("system", "Be kind."), ("user", "Weather?"), ("assistant", ""), ("tool", "21")]
        self.assertEqual(lines(request), [*expected, ("assistant", "21 degrees"), ("user", "Warm?")])
        self.assertEqual((request.text, request.messages[2].tool_calls), ("Warm?", CALLS[:1]))
        self.assertEqual(second["previous_response_id"], first["id"])

    def test_references(self) -> None:
        """A reference stands for the stored item, with or without its type, and still does a turn later."""
        with FakeOpenAI(lambda request: "ok") as server:
            item = call(server, responses("first")).json["output"][0]["id"]
            for reference in ({"type": "item_reference", "id": item}, {"id": item}):
                with self.subTest(name=repr(list(reference))):
                    made = call(server, responses(input=[reference, USER])).json
                    expected = [("assistant", "ok"), ("user", "Rain?")]
                    self.assertEqual(lines(server.requests[-1]), expected)
                    call(server, responses("And?", previous_response_id=made["id"]))
                    self.assertEqual(lines(server.requests[-1]), [*expected, ("assistant", "ok"), ("user", "And?")])

    def test_background(self) -> None:
        """A background response is queued, in progress once its Stream says something, and completed at its end."""
        stream = Stream()
        with FakeOpenAI(lambda request: stream) as server:
            made = call(server, responses(background=True)).json
            path = "/responses/" + made["id"]
            self.assertEqual([made["status"], get(server, path).json["status"]], ["queued", "queued"])
            self.assertEqual(stream.wait_request(WAIT).text, "Hi")
            stream.send("Hel")
            self.assertTrue(stream.flush(WAIT))
            self.assertEqual(get(server, path).json["status"], "in_progress")
            stream.send("lo")
            stream.close()
            last = get(server, path + "?stream=true").events[-1]  # which come until it is over
            done = get(server, path).json
        self.assertEqual((done["status"], done["output"][0]["content"][0]["text"]), ("completed", "Hello"))
        self.assertEqual((last["type"], {**last["response"], **BILLING}), ("response.completed", done))

    def test_resume(self) -> None:
        """The events of a background response can be read from any number on, while it runs and after."""
        stream = Stream()
        with FakeOpenAI(lambda request: stream) as server, Wire(server) as first, Wire(server) as second:
            first.send(http_bytes(responses(background=True, stream=True), PATHS["responses"]))
            created = json.loads(first.until(b"\n\n").split(b"data: ")[1])
            path = f"/responses/{created['response']['id']}?stream=true"
            stream.send("Hello")
            first.until(b"response.output_text.delta")
            second.send(http_bytes(None, f"/v1{path}&starting_after=2", "GET"))
            self.assertNotIn(b"response.in_progress", second.until(b"response.output_text.delta"))
            stream.send(" world")
            stream.close()
            for wire in (first, second):
                wire.until(b"event: response.completed")
            events = get(server, path).events
            self.assertEqual([event["sequence_number"] for event in events], list(range(len(events))))
            for after in (0, 3, len(events) - 1, len(events), 100_000):
                with self.subTest(after=after):
                    rest = get(server, f"{path}&starting_after={after}").events
                    self.assertEqual(rest, events[after + 1 :])

    def test_failed_background(self) -> None:
        """What fails in the background is a failed response to the client, and an error to the test."""

        def parts(request: Request) -> Iterator[str]:
            yield "Hel"
            raise ValueError("no more")

        with FakeOpenAI(parts) as server:
            path = in_background(server)
            self.assertEqual(get(server, path + "?stream=true").events[-1]["type"], "response.failed")
            failed = get(server, path).json
            self.assertEqual((failed["status"], failed["error"]["code"]), ("failed", "server_error"))
            self.assertIn("no more", failed["error"]["message"])
            self.assertEqual([str(error) for error in server.errors], ["no more"])
            server.errors.clear()

    def test_unsendable_background(self) -> None:
        """What cannot be sent as JSON fails the response where it is said, and is no error of who asks for it."""
        with FakeOpenAI(lambda request: ["a", Item("thing", x=object())]) as server:
            path = in_background(server)
            self.assertEqual(get(server, path + "?stream=true").events[-1]["type"], "response.failed")
            self.assertEqual(get(server, path).json["status"], "failed")
            self.assertEqual([type(error) for error in server.errors], [TypeError])
            server.errors.clear()

    def test_cancel(self) -> None:
        """To cancel a background response tells its Stream, keeps what was said, and may be done again."""
        stream = Stream()
        with FakeOpenAI(lambda request: stream) as server:
            path = in_background(server)
            stream.send("Hel")
            stream.flush(WAIT)
            cancelled = get(server, path + "/cancel", "POST").json
            self.assertTrue(stream.wait_disconnected(WAIT))
            self.assertFalse(stream.send("lo"))
            self.assertEqual([get(server, path + "/cancel", "POST").json, get(server, path).json], [cancelled] * 2)
        self.assertEqual((cancelled["status"], cancelled["output"][0]["content"][0]["text"]), ("cancelled", "Hel"))

    def test_cancel_what_is_over(self) -> None:
        """To cancel a background response that is complete or has failed changes nothing."""
        for answer, end in ((["Hi"], "completed"), (StreamError("Broke"), "failed")):
            with self.subTest(name=end), FakeOpenAI(always(answer)) as server:
                path = in_background(server)
                self.assertEqual(get(server, path + "?stream=true").events[-1]["type"], "response." + end)
                done = get(server, path).json
                self.assertEqual(done["status"], end)
                self.assertEqual([get(server, path + "/cancel", "POST").json, get(server, path).json], [done] * 2)

    def test_paced_background(self) -> None:
        """In the background `itl` holds back each token too; a pace is a lower bound, on any machine."""
        with FakeOpenAI(lambda request: "one two three", itl=0.03) as server:
            began = time.monotonic()
            events = get(server, in_background(server) + "?stream=true").events
            self.assertGreaterEqual(time.monotonic() - began, 0.09)
        deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
        self.assertEqual(deltas, ["one", " two", " three"])

    def test_cancel_generator(self) -> None:
        """A cancelled response asks its generator for no more, and stays cancelled."""
        go, over, went_on = threading.Event(), threading.Event(), threading.Event()

        def parts(request: Request) -> Iterator[str]:
            try:
                yield "a"
                go.wait(WAIT)
                yield "b"
                went_on.set()
            finally:
                over.set()

        with FakeOpenAI(parts) as server:
            path = in_background(server)
            get(server, path + "/cancel", "POST")
            go.set()
            self.assertTrue(over.wait(WAIT))
            self.assertEqual((went_on.is_set(), get(server, path).json["status"]), (False, "cancelled"))

    def test_input_tokens(self) -> None:
        """Tokens are counted over input, instructions and stored turns: more text, more tokens."""
        with FakeOpenAI() as server:
            more: dict[str, Any] = {"instructions": "Be brief."}
            chained = {**more, "previous_response_id": call(server, responses()).json["id"]}
            bodies = (responses(), responses("Hi there, you"), responses("Hi there, you", **more))
            answers = [
                get(server, "/responses/input_tokens", "POST", body).json
                for body in (*bodies, responses("Hi there, you", **chained))
            ]
            counts = [answer["input_tokens"] for answer in answers]
            self.assertEqual(counts, sorted(set(counts)))
            self.assertEqual({answer["object"] for answer in answers}, {"response.input_tokens"})

    def test_stored_chats(self) -> None:
        """Chat completions with `store: true` can be listed by model, order and page, and updated."""
        with FakeOpenAI() as server:
            made = call(server, chat("one", store=True, metadata={"a": "1"})).json
            other = call(server, chat("two", store=True, model="gpt-4", stream=True)).events[0]
            call(server, chat("three", stream=True))
            path = "/chat/completions/" + made["id"]
            for query, expected in (
                ("", [other, made]),  # the newest first
                ("?model=gpt-4", [other]),
                ("?model=gpt-4o-2024-08-06", [made]),
                ("?order=asc&limit=1", [made]),
                ("?after=" + other["id"], [made]),
                ("?metadata[a]=1", [made]),
                ("?metadata%5Ba%5D=2", []),
            ):
                with self.subTest(name=query):
                    page = get(server, "/chat/completions" + query).json
                    self.assertEqual([each["id"] for each in page["data"]], [each["id"] for each in expected])
                    self.assertEqual(list(page), ["object", "data", "first_id", "last_id", "has_more"])
            messages = get(server, path + "/messages").json["data"]
            self.assertEqual([(each["role"], each["content"]) for each in messages], [("user", "one")])
            updated = get(server, path, "POST", {"metadata": {"b": "2"}}).json
            self.assertEqual((updated["metadata"], get(server, path).json), ({"b": "2"}, updated))
            gone = {"object": "chat.completion.deleted", "id": made["id"], "deleted": True}
            self.assertEqual(get(server, path, "DELETE").json, gone)
            for method, rest in (("GET", ""), ("POST", ""), ("DELETE", ""), ("GET", "/messages")):
                words = {"message": f"Completion {made['id']} not found", "type": "invalid_request_error"}
                answer = get(server, path + rest, method, {})
                expected_error = {**words, "param": "completion_id", "code": "not_found"}
                self.assertEqual((answer.status, answer.error), (404, expected_error))

    def test_a_stored_chat_is_listed_as_recorded(self) -> None:
        """A stored chat is what was asked and what was said, with the keys, order and defaults of the API's."""
        asked: dict[str, Any] = {
            "temperature": 0.5,
            "user": "me",
            "seed": 7,
            "tools": [CHAT_CALL],
            "tool_choice": "auto",
        }
        call_made = ToolCall("f", {}, id="call_1")
        with FakeOpenAI(lambda request: call_made, clock=lambda: CLOCK) as server:
            made = call(server, chat(store=True, **asked)).json
            plain = call(server, chat(store=True)).json
            stored = get(server, "/chat/completions/" + made["id"]).json
            bare = get(server, "/chat/completions/" + plain["id"]).json
        keys = (
            "object id model created request_id tool_choice usage seed top_p temperature presence_penalty "
            "frequency_penalty system_fingerprint input_user service_tier tools metadata choices response_format"
        )
        self.assertEqual([list(stored), list(bare)], [keys.split()] * 2)
        self.assertEqual(list(stored["usage"]), ["total_tokens", "completion_tokens", "prompt_tokens"])
        told = {"content": None, "role": "assistant", "tool_calls": made["choices"][0]["message"]["tool_calls"]}
        [choice] = stored["choices"]
        self.assertEqual(list(choice), ["index", "message", "finish_reason", "logprobs"])
        self.assertEqual(choice["message"], {**told, "function_call": None})
        self.assertEqual({**{key: stored[key] for key in asked if key in stored}, "user": stored["input_user"]}, asked)
        defaults = {"top_p": 1.0, "temperature": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        nulls = dict.fromkeys(("tool_choice", "tools", "input_user", "response_format"))
        self.assertEqual({key: bare[key] for key in (*defaults, *nulls)}, {**defaults, **nulls})
        self.assertEqual((type(bare["seed"]), bare["request_id"][:4], bare["metadata"]), (int, "req_", {}))

    def test_stored_messages(self) -> None:
        """A stored chat's messages are its request's, with their texts, content parts and names, in pages."""
        image = {"url": "https://a.example/x.png"}
        parts = [{"type": "text", "text": "What"}, {"type": "image_url", "image_url": image}]
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "name": "Ann", "content": parts}]
        with FakeOpenAI(lambda request: "ok") as server:
            id = call(server, chat(messages=messages, store=True)).json["id"]
            path = f"/chat/completions/{id}/messages"
            page = get(server, path).json
            self.assertEqual(list(page), ["object", "data", "first_id", "last_id", "has_more"])
            empty = dict.fromkeys(("type", "text", "image_url", "input_audio", "file"))
            expected = [
                {"id": f"{id}-0", "role": "system", "content": "Be brief.", "content_parts": None, "name": None},
                {"id": f"{id}-1", "role": "user", "content": "What", "name": "Ann", "content_parts": [
                    {**empty, "type": "text", "text": "What"}, {**empty, "type": "image_url", "image_url": image}]},
            ]  # fmt: skip
            self.assertEqual(page["data"], expected)
            self.assertEqual(list(page["data"][1]), ["id", "role", "content", "content_parts", "name"])
            self.assertEqual(get(server, path + f"?order=desc&after={id}-1").json["data"], expected[:1])
            end: dict[str, Any] = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
            self.assertEqual(get(server, path + f"?after={id}-1").json, end)

    def test_updates_need_metadata(self) -> None:
        """An update that says no metadata is refused and erases nothing; null says that there are none."""
        with FakeOpenAI() as server:
            chat_id = call(server, chat(store=True, metadata={"a": "1"})).json["id"]
            conversation = get(server, "/conversations", "POST", {"metadata": {"a": "1"}}).json["id"]
            for path in (f"/chat/completions/{chat_id}", f"/conversations/{conversation}"):
                with self.subTest(name=path):
                    answer = get(server, path, "POST", {"meta": {}})
                    self.assertEqual((answer.status, answer.error["param"]), (400, "metadata"))
                    self.assertEqual(answer.error["code"], "missing_required_parameter")
                    self.assertEqual(get(server, path, "POST", {"metadata": {"a": 1}}).status, 400)
                    self.assertEqual(get(server, path).json["metadata"], {"a": "1"})
                    self.assertEqual(get(server, path, "POST", {"metadata": None}).json["metadata"], {})

    def test_conversations(self) -> None:
        """A conversation is its own items and then its responses' turns, until it is deleted."""
        with FakeOpenAI(lambda request: "ok") as server:
            made = get(server, "/conversations", "POST", {"items": [USER], "metadata": {"a": "1"}}).json
            path = "/conversations/" + made["id"]
            self.assertEqual((made["metadata"], get(server, path).json), ({"a": "1"}, made))
            for conversation in (made["id"], {"id": made["id"]}):
                call(server, responses("And?", conversation=conversation))
            texts = ["Rain?", "And?", "ok", "And?"]
            self.assertEqual([text for _, text in lines(server.requests[-1])], texts)
            items = get(server, path + "/items?order=asc").json["data"]
            self.assertEqual([item["content"][0]["text"] for item in items], [*texts, "ok"])
            self.assertEqual(get(server, path, "POST", {"metadata": {"b": "2"}}).json["metadata"], {"b": "2"})
            get(server, path, "DELETE")
            answer = call(server, responses(conversation=made["id"]))
            self.assertEqual((answer.status, answer.error["code"]), (404, None))

    def test_conversation_items(self) -> None:
        """Items are put into a conversation at its end, fetched, and taken out, a response's too."""
        with FakeOpenAI(lambda request: "ok") as server:
            made = get(server, "/conversations", "POST", {"items": [USER]}).json
            path = f"/conversations/{made['id']}/items"
            call(server, responses("And?", conversation=made["id"]))
            added = get(server, path, "POST", {"items": [{"role": "user", "content": "Later"}, output_item()]}).json
            self.assertEqual(list(added), ["object", "data", "first_id", "has_more", "last_id"])
            later, output = added["data"]
            content = [{"type": "input_text", "text": "Later"}]
            told = {"id": later["id"], "type": "message", "status": "completed", "content": content, "role": "user"}
            self.assertEqual(list(later.items()), list(told.items()))
            self.assertEqual(list(output), ["id", "type", "status", "call_id", "output"])
            self.assertEqual(get(server, f"{path}/{later['id']}").json, later)
            silent = {"id": "cmp_1", "type": "compaction", "encrypted_content": "x"}  # has no status
            self.assertEqual(get(server, path, "POST", {"items": [silent]}).json["data"], [silent])
            get(server, path + "/cmp_1", "DELETE")
            listed = get(server, path + "?order=asc").json["data"]
            self.assertEqual(listed[-2:], [later, output])
            self.assertEqual([item["content"][0]["text"] for item in listed[:-1]], ["Rain?", "And?", "ok", "Later"])
            for item in (listed[2], listed[0]):
                self.assertEqual(get(server, f"{path}/{item['id']}", "DELETE").json, made)
            left = [item["id"] for item in get(server, path + "?order=asc").json["data"]]
            self.assertEqual(left, [item["id"] for item in (listed[1], later, output)])
            for method, id in (("GET", listed[0]["id"]), ("DELETE", "msg_x")):
                self.assertEqual(get(server, f"{path}/{id}", method).status, 404)
            for body, param in (({}, "items"), ({"items": 7}, "items"), ({"items": [{"role": "x"}]}, "items[0].role")):
                answer = get(server, path, "POST", body)
                self.assertEqual((answer.status, answer.error["param"]), (400, param))

    def test_compact(self) -> None:
        """To compact gives the user's messages, stored ones too, and one compaction item, which can be gone on with."""
        said = {"role": "assistant", "content": "Hello"}
        with FakeOpenAI(lambda request: "ok") as server:
            first = call(server, responses("one")).json["id"]
            more = {"model": "gpt-5.4", "input": [said, USER], "previous_response_id": first}
            made = get(server, "/responses/compact", "POST", more).json
            self.assertEqual(list(made), ["id", "object", "created_at", "output", "usage"])
            self.assertEqual(made["object"], "response.compaction")
            told = [(item["type"], item.get("role"), (item.get("content") or [{}])[0].get("text"))
                    for item in made["output"]]  # fmt: skip
            expected = [("message", "user", "one"), ("message", "user", "Rain?"), ("compaction", None, None)]
            self.assertEqual(told, expected)
            compaction = made["output"][-1]
            self.assertEqual(list(compaction), ["id", "type", "encrypted_content"])
            self.assertRegex(compaction["id"] + " " + compaction["encrypted_content"], "^cmp_.* gAAAAA")
            self.assertEqual(call(server, responses(input=[*made["output"], USER])).status, 200)
            for body, param in (({"input": "x"}, "model"), ({"model": "m"}, "input")):
                answer = get(server, "/responses/compact", "POST", body)
                self.assertEqual((answer.status, answer.error["param"]), (400, param))

    def test_compaction_trigger(self) -> None:
        """An input that ends in a compaction trigger is answered by one compaction item; the handler is not asked."""
        handler = mock.Mock()
        given = [USER, {"type": "compaction_trigger"}]
        with FakeOpenAI(handler) as server:
            [item] = call(server, responses(input=given)).json["output"]
            self.assertEqual((item["type"], list(item)), ("compaction", ["id", "type", "encrypted_content"]))
            events = call(server, responses(input=given, stream=True)).events
        kinds = ["created", "in_progress", "output_item.added", "output_item.done", "completed"]
        self.assertEqual([event["type"] for event in events], ["response." + kind for kind in kinds])
        self.assertEqual([each["type"] for each in events[-1]["response"]["output"]], ["compaction"])
        handler.assert_not_called()

    def test_failed_turn(self) -> None:
        """A turn that failed is no part of its conversation: the client will send it again."""

        def parts(request: Request) -> Iterator[str]:
            yield "ok"
            if len(server.requests) == 2:
                raise rate_limit()

        with FakeOpenAI(parts) as server:
            made = get(server, "/conversations", "POST", {}).json
            statuses = [call(server, responses(conversation=made["id"])).status for _ in range(3)]
            self.assertEqual(statuses, [429, 200, 200])
            self.assertEqual(lines(server.requests[-1]), [("user", "Hi"), ("assistant", "ok"), ("user", "Hi")])

    def test_odd_state(self) -> None:
        """With validate=False no body, odd as it is, ends a connection without an answer."""
        reference = {"type": "item_reference", "id": "x"}
        with FakeOpenAI(lambda request: "ok", validate=False) as server:
            for name, body in (
                ("id of a reference", responses(input=[{**reference, "id": []}])),
                ("id", responses(input=[{**USER, "id": {}}])),
                ("reference to odd ids", responses(input=[reference])),
                ("conversation", responses(conversation={"id": []}, previous_response_id={})),
                *((f"conversation {odd}", responses(conversation=odd)) for odd in ([1], 5, True, {"id": 7}, {})),
            ):
                with self.subTest(name=name):
                    self.assertEqual(call(server, body).status, 200)
            made = call(server, chat(store=True, messages=["x", 7])).json
            self.assertEqual(get(server, f"/chat/completions/{made['id']}/messages").status, 200)
            for path in ("/embeddings", "/conversations"):
                with self.subTest(name=path):
                    answer = get(server, path, "POST", b'{"model": "m", "input": [1e999], "metadata": {"a": 1e999}}')
                    self.assertIn(answer.status, (200, 400))


class EndpointTest(unittest.TestCase):
    def test_models(self) -> None:
        """GET /models lists what the server was given, or OpenAI's; each can be fetched, others are 404."""
        given = ["m", "org/m", "ft:gpt-4o:org::1"]
        for models, some in ((None, ["gpt-4o", "gpt-4o-2024-08-06", "text-embedding-3-small"]), (given, given)):
            with self.subTest(name=repr(models)), FakeOpenAI(models=models) as server:
                listed = {model["id"]: model for model in get(server, "/models").json["data"]}
                for id in some:
                    self.assertEqual(listed[id].keys(), {"id", "object", "created", "owned_by"})
                    for path in ("/models/" + id, "/models/" + id.replace("/", "%2F")):
                        self.assertEqual(get(server, path).json, listed[id])
                answer = get(server, "/models/nope")
                self.assertEqual((answer.status, answer.error["code"]), (404, "model_not_found"))
                self.assertEqual(answer.error["message"], "The model 'nope' does not exist")

    def embed(self, server: FakeOpenAI, input: Any, **options: Any) -> Any:
        return get(server, "/embeddings", "POST", {"model": "text-embedding-3-small", "input": input, **options}).json

    def test_embeddings(self) -> None:
        """Embeddings are unit vectors, equal for equal texts and different for others, in any run and version."""
        with FakeOpenAI() as server:
            data = self.embed(server, ["hello", "world", "hello", ""])["data"]
        vectors = [each["embedding"] for each in data]
        self.assertEqual([each["index"] for each in data], [0, 1, 2, 3])
        self.assertEqual((vectors[0], len({tuple(vector) for vector in vectors})), (vectors[2], 3))
        self.assertEqual({index: number for index, number in enumerate(vectors[0]) if number}, PINNED)
        for vector in vectors:
            self.assertEqual(len(vector), 1536)
            self.assertAlmostEqual(math.hypot(*vector), 1, places=6)

    def test_embeddings_mean_something(self) -> None:
        """Texts that share words are nearer than texts that do not, in any language, however long the others are."""
        texts = {
            "Where does Alice live?": ("Alice lives in Paris, and works there.", "The invoice is due on Friday."),
            "refund policy": ("Our REFUND policy: thirty days.", "Our shipping times: three days."),
            "パリの天気": ("今日のパリは晴れ", "請求書の期限"),
        }
        with FakeOpenAI() as server:
            for query, others in texts.items():
                asked, near, far = (each["embedding"] for each in self.embed(server, [query, *others])["data"])
                with self.subTest(name=query):
                    similar, other = (sum(map(operator.mul, asked, each)) for each in (near, far))
                    self.assertGreater(similar, 0.2)
                    self.assertLess(other, 0.15)

    def test_long_words_say_more(self) -> None:
        """A text that shares one long word is nearer than one that shares two short ones."""
        texts = ["Is the invoice due?", "Invoice number nine", "The sun is up"]
        with FakeOpenAI() as server:
            asked, near, far = (each["embedding"] for each in self.embed(server, texts)["data"])
        self.assertGreater(sum(map(operator.mul, asked, near)), sum(map(operator.mul, asked, far)) + 0.1)

    def test_embeddings_can_be_given(self) -> None:
        """`embeddings` takes a text and returns its vector, which is sent as it is; its mistakes are the fake's."""
        with FakeOpenAI(embeddings=lambda text: [len(text), 0.5]) as server:
            self.assertEqual(
                [each["embedding"] for each in self.embed(server, ["ab", "abc"])["data"]], [[2, 0.5], [3, 0.5]]
            )
            packed = self.embed(server, "ab", encoding_format="base64")["data"][0]["embedding"]
            self.assertEqual(base64.b64decode(packed), struct.pack("<2f", 2, 0.5))
        with forgiven(echo, embeddings=untyped(lambda text: None)) as server:
            self.assertEqual(get(server, "/embeddings", "POST", {"model": "m", "input": "x"}).status, 500)

    def test_embedding_options(self) -> None:
        """`dimensions`, base64 and the model do what they say; a list of tokens is one text."""
        with FakeOpenAI() as server:
            floats = self.embed(server, "hello", dimensions=5)["data"][0]["embedding"]
            packed = self.embed(server, "hello", dimensions=5, encoding_format="base64")["data"][0]["embedding"]
            self.assertEqual(base64.b64decode(packed), struct.pack("<5f", *floats))
            self.assertEqual([len(self.embed(server, given)["data"]) for given in ([1, 2, 3], [[1, 2], [3]])], [1, 2])
            large, old = (self.embed(server, "x", model="text-embedding-" + name) for name in ("3-large", "ada-002"))
            self.assertEqual((len(large["data"][0]["embedding"]), old["model"]), (3072, "text-embedding-ada-002-v2"))
            refused: dict[str, dict[str, Any]] = {
                "you must provide a model parameter": {"model": None},
                "Missing required parameter: 'input'.": {"input": []},
                "-1 is less than the minimum of 1 - 'dimensions'": {"dimensions": -1},
            }
            for words, options in refused.items():
                with self.subTest(name=words):
                    self.assertEqual(self.embed(server, **{"input": "x", **options})["error"]["message"], words)

    def test_moderations(self) -> None:
        """Moderations flag nothing: one result for each text, in all 13 categories."""
        with FakeOpenAI() as server:
            for given, count in (("x", 1), (["x", "y"], 2), ([{"type": "text", "text": "x"}], 1)):
                with self.subTest(name=repr(given)):
                    results = get(server, "/moderations", "POST", {"input": given}).json["results"]
                    self.assertEqual(get(server, "/moderations", "POST", {}).error["param"], "input")
                    told = [(each["flagged"], len(each["categories"])) for each in results]
                    self.assertEqual(told, [(False, 13)] * count)

    def test_own_routes(self) -> None:
        """A route of one's own answers with JSON, bytes or an APIError, and may replace a built-in one."""

        def refuse(request: Request) -> None:
            raise APIError(409, "raised")

        routes: dict[str, Callable[[Request], object]] = {
            "POST /files": lambda request: {"got": request.body["a"], "path": request.path},
            "POST /v1/audio/speech": lambda request: b"\x00\xff",
            "GET /returned/{id}": lambda request: APIError(418, request.path),
            "GET /raised": refuse,
            "GET /v1/models": lambda request: [],
            "POST /chat/completions": lambda request: request.text,
        }
        with FakeOpenAI(routes=routes) as server:
            cases: list[tuple[str, str, int, Any]] = [
                ("POST", "/files", 200, {"got": 1, "path": "/v1/files"}),
                ("GET", "/models", 200, []),
                ("POST", "/chat/completions", 200, "Hi"),
                ("GET", "/returned/7", 418, "/v1/returned/7"),
                ("GET", "/raised", 409, "raised"),
            ]
            for method, path, status, expected in cases:
                with self.subTest(name=path):
                    answer = get(server, path, method, {"a": 1, **chat()})
                    told = answer.json if status == 200 else answer.error["message"]
                    kind = answer.headers["content-type"].partition(";")[0]
                    self.assertEqual((answer.status, kind, told), (status, "application/json", expected))
            answer = get(server, "/audio/speech", "POST", {})
            self.assertEqual((answer.headers["content-type"], answer.body), ("application/octet-stream", b"\x00\xff"))

    def test_annotations_come_with_their_text(self) -> None:
        """An annotation is told before the texts that come after its own."""
        note = {"type": "url_citation", "start_index": 10, "end_index": 14, "url": "https://a.example/", "title": "A"}
        parts = [Text("0123456789"), Text("cite", annotations=[note]), Text("AAAAA"), Text("BBBBB")]
        with FakeOpenAI(always(parts)) as server:
            events = call(server, responses(stream=True), PATHS["responses"]).events
        told = [each["type"] for each in events if each["type"].endswith(("text.delta", "annotation.added"))]
        kinds = ["response.output_text.delta", "response.output_text.annotation.added"]
        self.assertEqual([kinds.index(each) for each in told], [0, 0, 1, 0, 0])

    def test_what_a_route_may_return(self) -> None:
        """A route returns JSON, bytes, or what comes in pieces; with a status and headers before it, in any type."""

        async def later(request: Request) -> AsyncIterator[str]:
            yield "é"
            yield "!"

        csv, events = {"content-type": "text/csv"}, "text/event-stream; charset=utf-8"
        table: dict[str, tuple[Any, int, str, bytes]] = {
            "JSON": ({"a": 1}, 200, "application/json", b'{"a":1}'),
            "str": ("é", 200, "application/json", '"é"'.encode()),
            "tuple": ((1, 2, 3), 200, "application/json", b"[1,2,3]"),
            "bytes": (b"\xff", 200, "application/octet-stream", b"\xff"),
            "text": ((201, csv, "a,é"), 201, "text/csv", "a,é".encode()),
            "JSON with a status": ((202, {"x-a": "b"}, []), 202, "application/json", b"[]"),
            "typed bytes": ((200, csv, b"a"), 200, "text/csv", b"a"),
            "iterator": (iter(["data: a\n\n", b"", b"\xff"]), 200, events, b"data: a\n\n\xff"),
            "typed iterator": ((206, csv, iter(["a", "b"])), 206, "text/csv", b"ab"),
            "async iterator": (later(Request("", "GET", "/", "", {})), 200, events, "é!".encode()),
            "nothing": (iter(()), 200, events, b""),
        }
        for name, (result, status, content_type, body) in table.items():
            with self.subTest(name=name), FakeOpenAI(routes={"GET /x": always(result)}) as server:
                answer = get(server, "/x")
                told = (answer.status, answer.headers["content-type"], answer.body)
                self.assertEqual(told, (status, content_type, body))

    def test_head_of_a_route(self) -> None:
        """HEAD asks a route as GET does, and has no body, in pieces or not; the connection goes on."""
        routes: dict[str, Callable[[Request], object]] = {
            "GET /pieces": lambda request: (201, {"content-type": "text/csv"}, iter(["a"])),
            "GET /whole": lambda request: b"ab",
        }
        with FakeOpenAI(routes=routes) as server, Wire(server) as wire:
            for path, status, more in (("/pieces", 201, b"text/csv"), ("/whole", 200, b"content-length: 2\r\n")):
                with self.subTest(name=path):
                    wire.send(http_bytes(None, path, "HEAD"))
                    head = wire.until(b"\r\n\r\n")
                    self.assertIn(f" {status} ".encode(), head)
                    self.assertIn(more, head)

    def test_a_route_in_pieces_is_live(self) -> None:
        """Each piece of a route is on the wire before the next is asked for; when the client leaves, it is closed."""
        go, closed = threading.Event(), threading.Event()

        def pieces(request: Request) -> Iterator[bytes]:
            try:
                yield b"one"
                go.wait(WAIT)
                while True:
                    yield b"more"
            finally:
                closed.set()

        with FakeOpenAI(routes={"GET /x": pieces}) as server:
            with Wire(server) as wire:
                wire.send(http_bytes(None, "/x", "GET")).until(b"one")
                go.set()
                wire.until(b"more")
            self.assertTrue(closed.wait(WAIT))

    def test_a_route_that_fails_late(self) -> None:
        """A route that raises after its first piece is cut, not ended, and is an error to the test."""

        def pieces(request: Request) -> Iterator[bytes]:
            yield b"one"
            raise ValueError("no more")

        with FakeOpenAI(routes={"GET /x": pieces}) as server, Wire(server) as wire:
            body = wire.send(http_bytes(None, "/x", "GET")).rest()
            self.assertTrue(body.endswith(b"one\r\n"), body)
            self.assertEqual([str(error) for error in server.errors], ["no more"])
            server.errors.clear()

    def test_routes_take_their_time(self) -> None:
        """`ttft` holds for routes, too."""
        with FakeOpenAI(routes={"GET /x": lambda request: b"x"}, ttft=0.05) as server:
            began = time.monotonic()
            self.assertEqual(get(server, "/x").body, b"x")
            self.assertGreaterEqual(time.monotonic() - began, 0.05)

    def test_form(self) -> None:
        """A multipart body is read as its fields: texts, and files with their names and bytes as they are."""
        boundary = "x--y"
        data = bytes(range(256)) + b"\r\n--x\r\n\r\n"
        fields = [
            ('name="purpose"', "bätch".encode()),
            ('name="file"; filename="a b.png"\r\nContent-Type: image/png', data),
            ('name="tag[]"', b"1"),
            ('filename="c"; name="tag[]"', b""),
        ]
        body = b"".join(
            f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n"
            for head, content in fields
        )
        expected = {"purpose": ["bätch"], "file": [("a b.png", data)], "tag[]": ["1", ("c", b"")]}
        for name, kind, form in (
            ("quoted", f'multipart/form-data; charset=utf-8; boundary="{boundary}"', expected),
            ("bare", f"Multipart/Form-Data; boundary={boundary}", expected),
            ("JSON", "application/json", {}),
        ):
            with self.subTest(name=name):
                request = Request(
                    "", "POST", "/files", "", {"content-type": kind}, body + f"--{boundary}--\r\n".encode()
                )
                self.assertEqual(request.form, form)

    def test_delete_models(self) -> None:
        """A model that is listed, or fine-tuned, is deleted, and then is unknown as others are."""
        with FakeOpenAI(models=["m", "n"]) as server:
            for id in ("m", "ft:gpt-4o-mini:acme::x"):
                gone = {"id": id, "object": "model", "deleted": True, "owned_by": "openai-internal"}
                self.assertEqual(get(server, "/models/" + id, "DELETE").json, gone)
            answer = get(server, "/models/m", "DELETE")
            self.assertEqual((answer.status, answer.error["code"]), (404, "model_not_found"))
            self.assertEqual([each["id"] for each in get(server, "/models").json["data"]], ["n"])

    def test_models_of_today(self) -> None:
        """GET /models and `strict` know the models that real requests name."""
        names = "gpt-5.6-terra gpt-4o-2024-11-20 gpt-5.4-nano gpt-5-codex o3-pro gpt-6-astra gpt-audio-1.5 gpt-4o"
        with FakeOpenAI(strict=True) as server:
            listed = {each["id"] for each in get(server, "/models").json["data"]}
            self.assertEqual(set(names.split()) - listed, set())
            for body in (chat(model="gpt-5.6-terra"), responses(client_metadata={"turn_id": "x"})):
                self.assertEqual(call(server, body).status, 200)
            self.assertEqual(call(server, {"input": "Hi", "prompt": {"id": "p"}}).status, 200)

    def test_failing_route(self) -> None:
        """A failing function of a route is a 500 that is not retried, and an error to the test."""
        failing: dict[str, Callable[[Request], object]] = {"raises": lambda _: 1 / 0, "not JSON": lambda _: object()}
        for name, function in failing.items():
            with self.subTest(name=name), FakeOpenAI(routes={"GET /x": function}) as server:
                answer = get(server, "/x")
                self.assertEqual((answer.status, answer.headers["x-should-retry"]), (500, "false"))
                self.assertEqual(len(server.errors), 1)
                server.errors.clear()

    def test_own_bug(self) -> None:
        """What the fake itself cannot do is a 500 to the client and an error to the test, never a cut connection."""
        with FakeOpenAI(models=[object()]) as server:  # type: ignore[list-item]
            self.assertEqual(get(server, "/models").status, 500)
            self.assertIsInstance(server.errors.pop(), TypeError)

    def test_bad_route(self) -> None:
        """A route that no request could ask for is refused when the server is made."""
        for name in ("/x", "get /x", "GET x", "GET  /x", "GET", ""):
            with self.subTest(name=name), self.assertRaises(ValueError):
                FakeOpenAI(routes={name: lambda request: None})

    def test_unknown_route(self) -> None:
        """What is not served is a 404 that names the nearest; a wrong method is a 405 that names the right ones."""
        with FakeOpenAI(routes={"POST /files": lambda request: None}) as server:
            for asked, nearest in (
                ("POST /respones", "POST /responses"),
                ("POST /chat/completion", "POST /chat/completions"),
                ("POST /fils", "POST /files"),
                ("POST /responses/cancel", "POST /responses"),  # no id: it is not the method that is wrong
                ("GET /" + "x" * 50_000, "GET /"),
            ):
                with self.subTest(name=asked[:30]):
                    answer = get(server, asked.partition(" ")[2], asked.partition(" ")[0], {})
                    self.assertEqual(answer.status, 404)
                    self.assertIn(asked.replace(" ", " /v1"), answer.error["message"])
                    self.assertIn(f"nearest that is served is {nearest}", answer.error["message"])
            for method, path, allowed in (
                ("PUT", "/models", "GET, HEAD"),
                ("PUT", "/responses", "GET, HEAD, POST"),
                ("PATCH", "/responses/resp_x", "DELETE, GET, HEAD"),
                ("OPTIONS", "/chat/completions", "GET, HEAD, POST"),
            ):
                with self.subTest(name=path):
                    answer = get(server, path, method)
                    self.assertEqual((answer.status, answer.headers["allow"]), (405, allowed))
                    self.assertIn(f"Not allowed to {method} on /v1{path}.", answer.error["message"])

    def test_head(self) -> None:
        """HEAD is GET without the body, also where GET is a stream."""
        with FakeOpenAI() as server, Wire(server) as wire:
            for path in ("/models", "/models/nope", in_background(server) + "?stream=true"):
                with self.subTest(name=path):
                    wire.send(http_bytes(None, "/v1" + path, "HEAD") + http_bytes(None, "/v1" + path, "GET"))
                    head = wire.until(b"\r\n\r\n").lower()
                    answer = wire.answer()
                    self.assertIn(f"http/1.1 {answer.status} ".encode(), head)
                    if "content-length" in answer.headers:
                        self.assertIn(f"content-length: {len(answer.body)}\r\n".encode(), head)


class CompletionsTest(unittest.TestCase):
    """Legacy POST /completions, from the same handler."""

    def ask(self, answer: Any, **body: Any) -> Answer:
        with FakeOpenAI(lambda request: answer, seed=1, clock=lambda: CLOCK) as server:
            return get(server, "/completions", "POST", {"model": "davinci-002", "prompt": "Say this", **body})

    def test_json(self) -> None:
        """The body is the API's, key by key; what is no text is left out."""
        made = self.ask(["Hello ", Reasoning("hm"), ToolCall("f", {}), "you"]).json
        choice = {"text": "Hello you", "index": 0, "logprobs": None, "finish_reason": "stop"}
        usage = {"prompt_tokens": 9, "completion_tokens": made["usage"]["completion_tokens"]}
        usage["total_tokens"] = sum(usage.values())
        self.assertRegex(made["id"], "^cmpl-[A-Za-z0-9]{29}$")
        expected = {"id": made["id"], "object": "text_completion", "created": CLOCK, "model": "davinci:2023-07-21-v2"}
        expected |= {"choices": [choice], "usage": usage}
        self.assertEqual(list(made.items()), list(expected.items()))
        self.assertEqual(self.ask(["a", Finish("length")]).json["choices"][0]["finish_reason"], "length")
        self.assertEqual(self.ask(ToolCall("f", {})).json["choices"][0], {**choice, "text": ""})
        self.assertEqual(self.ask(Refusal("No.")).json["choices"][0]["text"], "No.")

    def test_the_body_is_the_fold_of_the_stream(self) -> None:
        """Texts, log probabilities, finish reasons and usage of a stream are, together, those of the body."""
        answers: dict[str, Any] = {
            "text": "Hello there, you",
            "choices": [Text("a b"), Text("c", choice=1), Finish("length", choice=1)],
            "chunks": [Chunk([ChunkChoice(delta="a")]), Chunk([ChunkChoice(delta="b", finish_reason="length")])],
            "nothing": "",
            "what has no place": [
                WebSearch("q", sources=["https://a.example"]),
                "a",
                Item("audio", data="", transcript="b"),
            ],
            "annotations": Text("a", annotations=[{"type": "url_citation", "url": "u", "title": "t"}]),
            "logprobs": Text("a b", logprobs=[{"token": token, "logprob": -0.5} for token in ("a", " b")]),
        }
        for (name, answer), more in itertools.product(answers.items(), ({}, {"logprobs": 2}, {"n": 2})):
            with self.subTest(name=name, more=more):
                whole = self.ask(answer, **more).json
                options = {"stream": True, "stream_options": {"include_usage": True}}
                *events, usage, done = self.ask(answer, **more, **options).events
                self.assertEqual((done, usage["choices"], usage["usage"]), ("[DONE]", [], whole["usage"]))
                self.assertEqual(list(usage)[3:], ["model", "usage", "choices"])
                self.assertEqual({tuple(event) for event in events}, {(*list(usage)[:3], "choices", "model", "usage")})
                folded: dict[int, Any] = {}
                for [choice] in (event["choices"] for event in events):
                    so_far = folded.setdefault(choice["index"], {**choice, "text": ""})
                    so_far["text"] += choice["text"]
                    so_far["finish_reason"] = choice["finish_reason"]
                    if choice["logprobs"] and so_far["logprobs"] is not choice["logprobs"]:
                        for key, values in choice["logprobs"].items():
                            so_far["logprobs"][key] = so_far["logprobs"][key] + values
                self.assertEqual(list(folded.values()), whole["choices"])
                if more == {"logprobs": 2} and whole["choices"][0]["text"]:
                    told = whole["choices"][0]["logprobs"]
                    self.assertEqual(list(told), ["text_offset", "token_logprobs", "tokens", "top_logprobs"])
                    self.assertEqual({len(each) for each in told["top_logprobs"]}, {0 if name == "logprobs" else 2})

    def test_prompts(self) -> None:
        """Each prompt is a user message and has n choices, in order; a list of integers is one prompt."""
        for name, prompt, messages, count in (
            ("one", "a", ["a"], 2),
            ("two", ["a", "b"], ["a", "b"], 4),
            ("tokens", [1, 2, 3], [[1, 2, 3]], 2),
            ("two of tokens", [[1], [2, 3]], [[1], [2, 3]], 4),
        ):
            with self.subTest(name=name), FakeOpenAI(lambda request: "x y") as server:
                made = get(server, "/completions", "POST", {"model": "davinci-002", "prompt": prompt, "n": 2}).json
                told = [(choice["index"], choice["text"]) for choice in made["choices"]]
                self.assertEqual(told, [(index, "x y") for index in range(count)])
                [request] = server.requests
                self.assertEqual([message.content for message in request.messages], messages)
                self.assertEqual((request.api, request.prompt), ("completions", prompt))

    def test_refused(self) -> None:
        """What Completions refuses is refused in its words; what it takes, and strict too, passes."""
        cases: list[tuple[dict[str, Any], int, str, str | None]] = [
            ({"model": None}, 400, "you must provide a model parameter", None),
            ({"model": "gpt-4o"}, 404, ("This is a chat model and not supported in the v1/completions endpoint. "
             "Did you mean to use v1/chat/completions?"), "model"),
            ({"model": "text-embedding-3-small"}, 403, "You are not allowed to sample from this model", None),
            ({"max_tokens": -1}, 400, ("Invalid 'max_tokens': integer below minimum value. Expected a value >= 0, "
             "but got -1 instead."), "max_tokens"),
            ({"prompt": [1, 123456]}, 400, ("Invalid token in prompt: 123456. Minimum value is 0, maximum value is "
             "100257 (inclusive)."), None),
            ({"prompt": {}}, 400, ("Invalid type for 'prompt': expected one of a string or array, but got an object "
             "instead."), "prompt"),
        ]  # fmt: skip
        for body, status, words, param in cases:
            with self.subTest(name=repr(body)):
                answer = self.ask("x", **body)
                told = (answer.status, answer.error["message"], answer.error["param"])
                self.assertEqual(told, (status, words, param))
        taken = {"best_of": 1, "echo": True, "suffix": "x", "logprobs": 5, "max_tokens": 0, "stop": ["x"], "user": "u"}
        with FakeOpenAI(strict=True) as server:
            body = {"model": "gpt-3.5-turbo-instruct", "prompt": "x", **taken}
            self.assertEqual(get(server, "/completions", "POST", body).status, 200)
            self.assertEqual(get(server, "/completions", "POST", {**body, "foo": 1}).status, 400)

    def test_wire_acts(self) -> None:
        """Pace, errors and cuts are those of the other streams."""
        self.assertEqual(self.ask(rate_limit()).status, 429)
        events = self.ask(["a", StreamError("broken")], stream=True).events
        self.assertEqual((events[0]["choices"][0]["text"], events[1]["error"]["message"]), ("a", "broken"))
        began = time.monotonic()
        self.ask(Reply("one two", ttft=0.03, itl=0.02), stream=True)
        self.assertGreaterEqual(time.monotonic() - began, 0.05)


class JournalTest(unittest.TestCase):
    """What handlers ask of a request, and what became of it."""

    def test_tool_results_and_turn(self) -> None:
        """`tool_results` are the tools' messages since the last answer; `turn` counts the answers before."""
        called = [{**call_item(), "id": "fc_1"}, call_item("fc_2", "call_b")]
        said = {"role": "assistant", "content": "Both."}
        outputs = [output_item(), output_item("call_b")]
        chat_called: Any = {"role": "assistant", "tool_calls": CALLED["tool_calls"]}
        for name, request, results, turn in (
            ("first", asked("responses", **responses()), [], 0),
            ("results", asked("responses", input=[USER, *called, *outputs]), ["call_a", "call_b"], 1),
            ("a text before", asked("responses", input=[USER, said, *called, *outputs]), ["call_a", "call_b"], 1),
            ("answered", asked("responses", input=[USER, *called, *outputs, said, USER]), [], 2),
            ("chat", asked("chat.completions", messages=[USER, chat_called, ANSWER]), [ANSWER["tool_call_id"]], 1),
            ("no body", Request("", "GET", "/", "", {}), [], 0),
        ):
            with self.subTest(name=name):
                self.assertEqual([result.tool_call_id for result in request.tool_results], results)
                self.assertEqual(request.turn, turn)

    def test_schema(self) -> None:
        """`schema` is what structured output is asked for, in either API; None where none is."""
        schema = {"type": "object", "properties": {}}
        text = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        for name, request, expected in (
            ("responses", asked("responses", text=text), schema),
            ("chat", asked("chat.completions", **chat(response_format=form)), schema),
            ("text", asked("responses", text={"format": {"type": "text"}}), None),
            ("JSON", asked("chat.completions", **chat(response_format={"type": "json_object"})), None),
            ("odd", asked("chat.completions", response_format=7, text=[]), None),
            ("none", asked("responses", **responses()), None),
        ):
            with self.subTest(name=name):
                self.assertEqual(request.schema, expected)

    def test_tools_by_name(self) -> None:
        """tool() finds a tool by its name, or by the end of a prefixed one; a namespace's tools are among all."""
        inner = [{"type": "function", "name": "read"}, {"type": "function", "name": "mcp__files-write"}]
        given = [{"type": "namespace", "name": "files", "tools": inner}, {"type": "function", "name": "x_read"}]
        request = asked("responses", **responses(tools=given))
        self.assertEqual([tool.name for tool in request.tools], ["files", "read", "mcp__files-write", "x_read"])
        for name, found in (
            ("read", "read"), ("write", "mcp__files-write"), ("files-write", "mcp__files-write"), ("rite", None),
            ("x_read", "x_read"), ("", None), ("(", None),
        ):  # fmt: skip
            with self.subTest(name=name):
                tool = request.tool(name)
                self.assertEqual(tool and tool.name, found)

    def test_what_became_of_it(self) -> None:
        """`status` and `answer` tell what a request got, as long as it is kept, in each API and in the background."""
        said = [Text("Hello"), ToolCall("f", {"a": 1}, id="call_1")]
        with FakeOpenAI(lambda request: rate_limit() if request.text == "no" else said) as server:
            call(server, chat())
            call(server, responses(stream=True))
            get(server, "/completions", "POST", {"model": "davinci-002", "prompt": "x"})
            get(server, in_background(server) + "?stream=true")
            call(server, chat("no"))
            call(server, chat(n=0))
            for _ in range(20):
                get(server, "/models")
            told = [(request.status, request.answer) for request in server.requests[:7]]
            self.assertTrue(all(request._encoder is None for request in server.requests[:7]))
        self.assertEqual(told[:3], [(200, said), (200, said), (200, said[:1])])  # Completions has no calls
        self.assertEqual([answer for _, answer in told[3:5]], [said, []])  # the background's, and who followed it
        self.assertEqual(told[5:], [(429, []), (400, [])])

    def test_side_requests(self) -> None:
        """A Script answers the requests that it is for, in order; all others get `otherwise`, and use nothing up."""
        title: Callable[[Request], bool] = lambda request: "title" not in request.text  # noqa: E731
        shouting: Callable[[Request], str] = lambda request: request.text.upper()  # noqa: E731
        answers: tuple[tuple[Any, str], ...] = (("A title", "A title"), (shouting, "A TITLE?"))
        for otherwise, expected in answers:
            with FakeOpenAI(Script("one", "two", when=title, otherwise=otherwise)) as server:
                texts = [text_in("responses", call(server, responses(text)).json)
                         for text in ("a", "a title?", "b", "a title?")]  # fmt: skip
                self.assertEqual(texts, ["one", expected, "two", expected])
        halves: tuple[dict[str, Any], ...] = ({"when": title}, {"otherwise": "x"})
        for half in halves:
            with self.assertRaisesRegex(TypeError, "together"):
                Script("x", **half)


class KeyTest(unittest.TestCase):
    def test_wrong_key(self) -> None:
        """A wrong key is the API's 401, which hides the middle of what has more than 12 characters."""
        with FakeOpenAI(api_key="sk-right") as server:
            for key, shown in (
                ("sk-wrong-1", "sk-wrong-1"),
                ("x" * 12, "x" * 12),
                ("sk-abcdefwxyz", "sk-abcde*wxyz"),
                ("sk-proj-" + "a" * 40 + "wxyz", "sk-proj-" + "*" * 40 + "wxyz"),
            ):
                for api, path in PATHS.items():
                    for field in (f"Authorization: Bearer {key}", f"api-key: {key}"):
                        with self.subTest(name=f"{api} {field}"):
                            answer = call(server, BODIES[api](), path, "POST", field)
                            self.assertEqual((answer.status, answer.error["code"]), (401, "invalid_api_key"))
                            words = "You can find your API key at https://platform.openai.com/account/api-keys."
                            words = f"Incorrect API key provided: {shown}. {words}"
                            self.assertEqual(answer.error["message"], words)

    def test_no_key(self) -> None:
        """Without a key, each API says so in its own words, and the handler is not asked."""
        handler = mock.Mock()
        with FakeOpenAI(handler, api_key="sk-right") as server:
            for fields in ((), ("Authorization: Bearer",), ("Authorization: Basic sk-right",)):
                for api, words, realm in (
                    ("chat.completions", "You didn't provide an API key. ", None),
                    ("responses", "Missing bearer or basic authentication in header", 'Bearer realm="OpenAI API"'),
                ):
                    with self.subTest(name=f"{api} {fields}"):
                        answer = call(server, BODIES[api](), PATHS[api], "POST", *fields)
                        self.assertEqual((answer.status, answer.error["code"]), (401, None))
                        self.assertTrue(answer.error["message"].startswith(words))
                        self.assertEqual(answer.headers.get("www-authenticate"), realm)
            self.assertEqual((get(server, "/models").status, len(server.requests)), (401, 7))
        handler.assert_not_called()

    def test_right_key(self) -> None:
        """The right key lets in, as a bearer's or Azure's; a server without `api_key` lets in all."""
        for key, fields in (
            ("k", ["authorization: bearer k"]),
            ("k", ["API-Key: k"]),
            (None, []),
            (None, ["Authorization: Bearer x"]),
        ):
            with self.subTest(name=f"{key} {fields}"), FakeOpenAI(api_key=key) as server:
                self.assertEqual(call(server, chat(), "", "POST", *fields).status, 200)


class CORSTest(unittest.TestCase):
    def test_preflight(self) -> None:
        """With `cors` a browser may ask with any method and header, and needs no key to ask whether it may."""
        fields = ("Origin: http://a", "Access-Control-Request-Headers: authorization,x-a")
        with FakeOpenAI(cors=True, api_key="k") as server, Wire(server) as wire:
            answer = wire.send(http_bytes(None, PATHS["responses"], "OPTIONS", *fields)).answer()
            self.assertEqual(wire.send(http_bytes(responses(), PATHS["responses"])).answer().status, 401)
        self.assertEqual((answer.status, answer.body), (204, b""))
        self.assertNotIn("content-length", answer.headers)  # RFC 9110 8.6, and nothing but the next answer follows
        self.assertEqual(answer.headers["access-control-max-age"], "86400")
        self.assertEqual(answer.headers["access-control-allow-origin"], "*")
        self.assertEqual(answer.headers["access-control-allow-headers"], "authorization,x-a")
        self.assertIn("POST", answer.headers["access-control-allow-methods"])

    def test_only_when_asked_for(self) -> None:
        """Every answer, a stream or a refusal too, lets browsers read it with `cors`, and none without."""
        for cors in (True, False):
            with FakeOpenAI(cors=cors, api_key="k") as server:
                for name, body, key in (
                    ("JSON", chat(), "k"),
                    ("stream", responses(stream=True), "k"),
                    ("refused", {"input": 7}, "k"),
                    ("no key", chat(), "x"),
                ):
                    with self.subTest(name=name, cors=cors):
                        headers = call(server, body, "", "POST", "Origin: http://a", "api-key: " + key).headers
                        self.assertEqual(headers.get("access-control-allow-origin"), "*" if cors else None)


class OptionsTest(unittest.TestCase):
    def test_keep(self) -> None:
        """`keep` bounds the journal and what is stored; counting goes on."""
        with FakeOpenAI(keep=2) as server:
            ids = [call(server, responses(text)).json["id"] for text in "abc"]
            self.assertEqual([request.text for request in server.requests], ["b", "c"])
            self.assertEqual(len(server.wait_for_requests(3, WAIT)), 2)
            self.assertEqual([get(server, "/responses/" + id).status for id in ids], [404, 200, 200])

    def test_environ(self) -> None:
        """`environ` is what points OpenAI's clients here, with the key that is asked for."""
        with FakeOpenAI(api_key="sk-mine") as server, FakeOpenAI() as other:
            environ = server.environ
            self.assertEqual((environ["OPENAI_BASE_URL"], environ["OPENAI_API_KEY"]), (server.base_url, "sk-mine"))
            self.assertTrue(other.environ["OPENAI_API_KEY"])

    def test_environ_goes_round_proxies(self) -> None:
        """With a proxy in the environment, `environ` keeps clients of the fake from it, and drops no exception."""
        proxies = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "NO_PROXY": "a.example"}
        with mock.patch.dict(os.environ, proxies), FakeOpenAI() as server:
            self.assertIn("a.example", server.environ["NO_PROXY"].split(","))
            os.environ.update(server.environ)
            with urllib.request.urlopen(os.environ["OPENAI_BASE_URL"] + "/models", timeout=WAIT) as answer:
                self.assertEqual(answer.status, 200)

    def test_hosts(self) -> None:
        """`url` can be asked, whatever the form of the host; `base_url` is it and /v1."""
        hosts = {"127.0.0.1": "127.0.0.1", "localhost": "localhost", "": "127.0.0.1", "0.0.0.0": "127.0.0.1"}
        if socket.has_ipv6 and Path("/proc/net/if_inet6").exists():
            hosts["::1"] = "[::1]"
        for host, shown in hosts.items():
            with self.subTest(name=host), FakeOpenAI(host=host) as server:
                self.assertRegex(server.url, rf"^http://{re.escape(shown)}:\d+$")
                self.assertEqual(server.base_url, server.url + "/v1")
                self.assertEqual(call(server, chat()).status, 200)

    def test_misuse(self) -> None:
        """A server that is started twice, asked for its URL too early, or given no function, says what to do."""
        server = FakeOpenAI()
        with self.assertRaisesRegex(RuntimeError, "not started"):
            print(server.base_url)
        self.assertIn("not started", repr(server))
        with server:
            self.assertIn(server.base_url, repr(server))
            with self.assertRaisesRegex(RuntimeError, "started once"):
                server.start()
        with self.assertRaisesRegex(RuntimeError, "started once"):
            server.start()
        with self.assertRaisesRegex(TypeError, "Script"):
            FakeOpenAI("Hi")  # type: ignore[arg-type]

    def test_mistakes_are_refused_where_they_are_made(self) -> None:
        """Each is a TypeError or ValueError at once, that says what came and what was expected; types say so, too."""
        make: Any
        FakeOpenAI(lambda request: 5)  # type: ignore[arg-type, return-value]  # types alone can tell before it is asked
        FakeOpenAI(lambda request: [5])  # type: ignore[list-item]
        route: Any = {"GET /x": 5}
        for name, words, make in (
            ("port", "wants int for port, not '8080'", lambda: FakeOpenAI(port="8080")),  # type: ignore[arg-type]
            ("host", "wants str for host, not None", lambda: FakeOpenAI(host=None)),  # type: ignore[arg-type]
            ("keep", "wants int for keep, not '1'", lambda: FakeOpenAI(keep="1")),  # type: ignore[arg-type]
            ("models", "wants a list of names for models, not 'gpt-4o'", lambda: FakeOpenAI(models="gpt-4o")),
            ("negative ttft", "wants ttft of 0 or more, not -1", lambda: FakeOpenAI(ttft=-1)),
            ("ttft", "wants int or float for ttft, not 'x'", lambda: FakeOpenAI(ttft="x")),  # type: ignore[arg-type]
            ("itl", "wants itl of 0 or more, not nan", lambda: FakeOpenAI(itl=math.nan)),
            ("Reply's itl", "Reply wants itl of 0 or more, not -1", lambda: Reply("a", itl=-1)),
            ("Script", "5 is no answer; an answer is a str, ", lambda: Script(5)),  # type: ignore[arg-type]
            ("Script of None", "None is no answer; ", lambda: Script("a", None)),  # type: ignore[arg-type]
            ("Reply", "5 is no answer; ", lambda: Reply(5)),  # type: ignore[arg-type]
            (
                "route",
                "a route is served by a function that takes a Request, not by 5",
                lambda: FakeOpenAI(routes=route),
            ),
            ("order", "APIError takes the status first, then the message", lambda: APIError("Too many", 429)),  # type: ignore[arg-type]
            ("no test", r"takes the test first, as in start\(self, handler\)", lambda: start(echo)),  # type: ignore[arg-type]
        ):
            with self.subTest(name=name), self.assertRaisesRegex((TypeError, ValueError), words):
                make()

    def test_mistakes_of_a_handler_say_what_to_do(self) -> None:
        """What a handler returns by mistake is told with what was probably meant."""
        for name, handler, words in (
            ("None", lambda request: None, "handler returned empty response: None (forgot `return`?)"),
            ("nothing", lambda request: [], "handler returned empty response: no part in it"),
            (
                "a dict",
                lambda request: {"a": 1},
                "handler returned dict: recorded(...) cannot say this again: it is no chat.",
            ),
            ("bytes", lambda request: b"a", "handler returned bytes: b'a' is no answer; an answer is a str, "),
            ("an object", lambda request: SimpleNamespace(a=1), "handler returned SimpleNamespace: namespace(a=1) is"),
        ):
            with self.subTest(name=name), forgiven(untyped(handler)) as server:
                self.assertIn(words, call(server, chat()).error["message"])
        with forgiven(echo, routes={"GET /x": lambda request: None}) as server:
            self.assertIn("the route GET /v1/x returned None (forgot `return`?)", get(server, "/x").error["message"])
        with forgiven(Script(["a", "b"])) as server:
            call(server, chat())
            for _ in range(2):  # each request too many is told the same
                message = call(server, chat()).error["message"]
                self.assertRegex(message, r"ends with answer 1, .*a list is one answer")


class OfferedToolsTest(unittest.TestCase):
    """A call that a model could not make is let through, but told."""

    def warned(self, answers: list[Any], *bodies: dict[str, Any]) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with FakeOpenAI(Script(*answers)) as server:
                for body in bodies:
                    self.assertEqual(call(server, body).status, 200)
        return [str(each.message) for each in caught]

    def test_a_tool_that_was_not_offered(self) -> None:
        """It is a warning that names what was offered, once per tool and server."""
        offers: list[Any] = [{"type": "function", "function": {"name": "g", "parameters": {}}}]
        told = "the handler called the tool 'f', which the request did not offer; it offered: "
        calls = [ToolCall("f"), [ToolCall("f"), ToolCall("g")]]
        self.assertEqual(self.warned(calls, chat(tools=offers), chat(tools=offers)), [told + "g"])
        self.assertEqual(self.warned([CustomToolCall("f", "x")], responses()), [told + "none"])
        self.assertEqual(self.warned([ToolCall("g")], chat(tools=offers)), [])
        self.assertEqual(self.warned([ToolCall("g")], responses(tools=[{"type": "function", "name": "g"}])), [])
        hidden = {"type": "mcp", "server_label": "m", "server_url": "https://a.example", "require_approval": "never"}
        self.assertEqual(self.warned([ToolCall("f")], responses(tools=[hidden])), [])

    def test_a_call_against_tool_choice(self) -> None:
        """A call where none, or another, was chosen is a warning; one that follows the choice is not."""
        tools = [{"type": "function", "name": name} for name in "fg"]
        for choice, fine in (
            ("none", False),
            ({"type": "function", "name": "g"}, False),
            ({"type": "function", "name": "f"}, True),
            ("required", True),
        ):
            with self.subTest(choice=choice):
                told = self.warned([ToolCall("f")], responses(tools=tools, tool_choice=choice))
                self.assertEqual(told == [], fine)
                self.assertEqual([each.split(":")[0][-11:] for each in told], [] if fine else ["tool_choice"])

    def test_strict(self) -> None:
        """A strict server takes it for a mistake of the handler."""
        with forgiven(always(ToolCall("f")), strict=True) as server:
            answer = call(server, chat())
            self.assertEqual((answer.status, len(server.errors)), (500, 1))
            self.assertIn("the handler called the tool 'f'", answer.error["message"])


class ModuleTest(unittest.TestCase):
    def test_all(self) -> None:
        """`__all__` is the API of the design, and all that the module defines without an underscore."""
        self.assertEqual(sorted(openai_fake.__all__), sorted(NAMES.split()))
        public = {name: each for name, each in vars(openai_fake).items() if not name.startswith("_")}
        defined = {name for name, each in public.items() if getattr(each, "__module__", "") == "openai_fake"}
        aliases, hook = {"Answer", "Handler"}, {"pytest_configure"}
        self.assertEqual(defined - hook | aliases, set(openai_fake.__all__))
        self.assertRegex(openai_fake.__version__, r"^\d+\.\d+\.\d+$")

    def test_docstrings(self) -> None:
        """Every public class, function, method and property has a docstring."""
        for name in openai_fake.__all__:
            public = getattr(openai_fake, name)
            if name in ("Answer", "Handler"):
                continue
            with self.subTest(name=name):
                self.assertTrue(public.__doc__)
                self.assertNotRegex(public.__doc__, rf"^{name}\(")  # which a dataclass makes up
            for key, member in vars(public).items() if isinstance(public, type) else ():
                if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                    with self.subTest(name=f"{name}.{key}"):
                        self.assertTrue(inspect.getdoc(member) or inspect.getdoc(getattr(public, key)))

    def test_help_shows_the_api(self) -> None:
        """help(openai_fake) tells of the public names, and of no private class or function."""
        shown = pydoc.plain(pydoc.render_doc(openai_fake))
        self.assertEqual(re.findall(r"^    (?:class _\w+|_[a-z]\w* ?[(=])", shown, re.MULTILINE), [])
        for name in openai_fake.__all__:
            self.assertRegex(shown, rf"(?m)^    (class )?{name}\b")

    def test_options_are_known_at_run_time(self) -> None:
        """`Options` has FakeOpenAI's keywords, and it and the aliases can be looked into where code runs."""
        keywords = list(inspect.signature(FakeOpenAI).parameters)[1:]
        self.assertEqual(list(typing.get_type_hints(openai_fake.Options)), keywords)
        self.assertEqual(openai_fake.Answer | None, typing.Optional[openai_fake.Answer])  # noqa: UP045
        self.assertEqual(typing.get_args(openai_fake.Handler)[0], [Request])

    def test_a_header_for_copies(self) -> None:
        """The first lines say what a copied file must: name, version, home, licence, how to update."""
        head = Path(openai_fake.__file__).read_text("utf-8").partition('"""')[0]
        self.assertTrue(head.startswith(f"# openai_fake {openai_fake.__version__}: "))
        for word in ("https://", "SPDX-License-Identifier: MIT", "SPDX-FileCopyrightText: ", "Do not edit", "update"):
            self.assertIn(word, head)

    @unittest.skipUnless(HAS_RUFF, "ruff is not installed")
    def test_lint_without_the_header(self) -> None:
        """The lines that keep a host project's linters off do not keep ours off: without them, ruff finds nothing."""
        source = re.sub(r"(?m)^# (flake8|ruff): noqa.*\n", "", Path(openai_fake.__file__).read_text("utf-8"))
        command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", "openai_fake.py", "-"]
        done = subprocess.run(
            command, input=source, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=60, check=False
        )
        self.assertEqual((done.returncode, done.stdout), (0, "All checks passed!\n"))

    def test_an_old_python_is_told(self) -> None:
        """An import by Python 3.9 is an ImportError that says 3.10."""
        source = Path(openai_fake.__file__).read_text("utf-8")
        beginning = source[: source.index("\nimport ", source.index("raise ImportError"))]  # the rest takes a while
        with mock.patch.object(sys, "version_info", (3, 9)), self.assertRaisesRegex(ImportError, "3.10 or newer"):
            exec(compile(beginning, "openai_fake.py", "exec", dont_inherit=True), {})


@needs_openai
class OfficialStateTest(unittest.TestCase):
    def client(self, handler: Callable[[Request], Any], **options: Any) -> Any:
        import openai

        http = openai.DefaultHttpxClient(verify=NO_TLS)
        base_url = start(self, handler, **options).base_url
        client = openai.OpenAI(base_url=base_url, api_key="test", max_retries=0, http_client=http)
        self.addCleanup(client.close)
        return client

    def test_responses(self) -> None:
        """The official client chains, fetches, lists the input of, counts and deletes responses."""
        import openai

        client = self.client(echo)
        first = client.responses.create(model="gpt-4o", input="one")
        second = client.responses.create(model="gpt-4o", input="two", previous_response_id=first.id)
        self.assertEqual(client.responses.retrieve(second.id).output_text, "two")
        items = client.responses.input_items.list(second.id, order="asc", limit=1)  # one a page
        self.assertEqual([item.content[0].text for item in items], ["one", "one", "two"])
        self.assertGreater(client.responses.input_tokens.count(model="gpt-4o", input="one").input_tokens, 0)
        client.responses.delete(first.id)
        with self.assertRaises(openai.NotFoundError):
            client.responses.retrieve(first.id)

    def test_background(self) -> None:
        """The official client follows a background response, resumes it, and cancels one."""
        stream, other = Stream(), Stream()
        client = self.client(Script(stream, other))
        made = client.responses.create(model="gpt-4o", input="Hi", background=True)
        stream.send("Hello")
        stream.close()
        events = list(client.responses.retrieve(made.id, stream=True))
        self.assertEqual(events[-1].response.output_text, "Hello")
        resumed = client.responses.retrieve(made.id, stream=True, starting_after=2)
        self.assertEqual([event.sequence_number for event in resumed], list(range(3, len(events))))
        made = client.responses.create(model="gpt-4o", input="Hi", background=True)
        self.assertEqual(client.responses.cancel(made.id).status, "cancelled")
        self.assertTrue(other.wait_disconnected(WAIT))

    def test_chats_and_conversations(self) -> None:
        """The official client keeps chat completions and conversations."""
        client = self.client(echo)
        ask = [{"role": "user", "content": "Hi"}]
        made = client.chat.completions.create(model="gpt-4o", messages=ask, store=True)
        self.assertEqual([each.id for each in client.chat.completions.list(model="gpt-4o")], [made.id])
        stored = client.chat.completions.retrieve(made.id).choices[0].message
        self.assertEqual((stored.role, stored.content), ("assistant", "Hi"))
        self.assertEqual([each.content for each in client.chat.completions.messages.list(made.id)], ["Hi"])
        self.assertEqual(client.chat.completions.update(made.id, metadata={"a": "1"}).metadata, {"a": "1"})
        self.assertTrue(client.chat.completions.delete(made.id).deleted)
        conversation = client.conversations.create(items=ask)
        client.responses.create(model="gpt-4o", input="And?", conversation=conversation.id)
        items = client.conversations.items.list(conversation.id, order="asc")
        self.assertEqual([item.content[0].text for item in items], ["Hi", "And?", "And?"])
        [item] = client.conversations.items.create(conversation.id, items=ask).data
        self.assertEqual(client.conversations.items.retrieve(item.id, conversation_id=conversation.id), item)
        client.conversations.items.delete(item.id, conversation_id=conversation.id)
        self.assertEqual(len(list(client.conversations.items.list(conversation.id))), 3)
        self.assertTrue(client.conversations.delete(conversation.id).deleted)
        kinds = [item.type for item in client.responses.compact(model="gpt-4o", input="Hi").output]
        self.assertEqual(kinds, ["message", "compaction"])

    def test_completions(self) -> None:
        """The official client reads legacy completions, whole and streamed."""
        client = self.client(lambda request: "One two")
        ask = {"model": "gpt-3.5-turbo-instruct", "prompt": ["a", "b"]}
        self.assertEqual([each.text for each in client.completions.create(**ask).choices], ["One two"] * 2)
        texts = ["", ""]
        for chunk in client.completions.create(**ask, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        self.assertEqual(texts, ["One two"] * 2)

    def test_files_and_speech(self) -> None:
        """The official client's uploads are read as a form, and its speech is streamed, by routes of one's own."""

        def upload(request: Request) -> dict[str, Any]:
            [(name, data)], [purpose] = request.form["file"], request.form["purpose"]
            return {"id": "file-1", "object": "file", "filename": name, "bytes": len(data), "purpose": purpose}

        def speak(request: Request) -> Any:
            return 200, {"content-type": "audio/mpeg"}, iter([b"RI", b"FF"])

        client = self.client(echo, routes={"POST /files": upload, "POST /audio/speech": speak})
        made = client.files.create(file=("a.bin", bytes(range(256))), purpose="batch")
        self.assertEqual((made.filename, made.bytes, made.purpose), ("a.bin", 256, "batch"))
        with client.audio.speech.with_streaming_response.create(model="m", voice="v", input="x") as speech:
            self.assertEqual((speech.headers["content-type"], speech.read()), ("audio/mpeg", b"RIFF"))

    def test_small_endpoints(self) -> None:
        """The official client reads models, embeddings, moderations, a route of one's own, and a wrong key's 401."""
        import openai

        routes: dict[str, Callable[[Request], object]] = {"POST /audio/speech": lambda request: b"RIFF"}
        client = self.client(echo, routes=routes, models=["org/m"])
        self.assertEqual([client.models.retrieve(each.id).id for each in client.models.list()], ["org/m"])
        ask = {"model": "text-embedding-3-small", "input": "hello"}
        packed = client.embeddings.create(**ask).data[0].embedding  # base64, unless told otherwise
        floats = client.embeddings.create(**ask, encoding_format="float").data[0].embedding
        self.assertLess(math.dist(packed, floats), 1e-6)
        self.assertFalse(client.moderations.create(input="x").results[0].flagged)
        self.assertEqual(client.audio.speech.create(model="m", voice="v", input="x").content, b"RIFF")
        with self.assertRaisesRegex(openai.AuthenticationError, "Incorrect API key provided: test"):
            self.client(echo, api_key="sk-right").models.list()


# ---- HTTP: hostile, broken and unusual input; connections; lifecycle -------------------------------------------------


TINY = 1 << 20  # the limit of bodies in WireTableTest
FDS = Path("/proc/self/fd")


def resources() -> tuple[int, int]:
    """How many threads and descriptors there are."""
    return threading.active_count(), len(os.listdir(FDS)) if FDS.exists() else 0


class LeakTest(unittest.TestCase):
    """After each test no thread or descriptor is left, and nothing was written to stderr or logged as an error."""

    def setUp(self) -> None:
        gc.freeze()  # what is there already is not looked through again: that of the official client takes 0.1 s
        self.addCleanup(self.assert_back_to, resources())
        stderr = mock.patch("sys.stderr", io.StringIO())
        written = stderr.start()
        self.addCleanup(lambda: self.assertEqual(written.getvalue(), "", "on stderr"))
        self.addCleanup(stderr.stop)
        self.addCleanup(gc.collect)
        logs: Any = self.assertNoLogs("openai_fake", "ERROR")
        logs.__enter__()
        self.addCleanup(logs.__exit__, None, None, None)

    def assert_back_to(self, baseline: tuple[int, int]) -> None:
        """Waits until there are no more threads and descriptors than that."""
        self.eventually(lambda: resources()[0] <= baseline[0] and resources()[1] <= baseline[1], f"back to {baseline}")

    def eventually(self, condition: Callable[[], bool], what: str = "") -> None:
        """Waits for what tells nobody that it comes."""
        tick, end = threading.Event(), time.monotonic() + WAIT
        while not condition():
            self.assertLess(time.monotonic(), end, f"{what}: threads and descriptors are {resources()}")
            tick.wait(0.01)

    def assert_error(self, answer: Answer) -> None:
        """An answer is an error in OpenAI's shape."""
        self.assertEqual(set(answer.error), {"message", "type", "param", "code"})
        if answer.status >= 500:
            self.assertEqual(answer.error["type"], "server_error")
        self.assertEqual(len(answer.body), int(answer.headers["content-length"]))

    def assert_works(self, server: FakeOpenAI) -> None:
        """A good request on a fresh connection gets its answer."""
        self.assertEqual(call(server, None, "/v1/models", "GET").status, 200)


@contextlib.contextmanager
def faulty(handler: Callable[[Request], Any], **options: Any) -> Iterator[FakeOpenAI]:
    """A server whose handler's faults are looked at, and don't fail the test."""
    server = FakeOpenAI(handler, **options).start()
    try:
        yield server
    finally:
        server.errors.clear()
        server.stop()


def got(target: str = "/v1/models", *fields: str, version: str = "1.1", method: str = "GET") -> bytes:
    """A request without a body."""
    return "\r\n".join([f"{method} {target} HTTP/{version}", "Host: test", *fields, "", ""]).encode("latin-1")


def posted(body: bytes, *fields: str) -> bytes:
    """A request with this body and no framing but these fields'."""
    return got("/v1/chat/completions", *fields, method="POST") + body


def in_chunks(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return posted(b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in chunks) + end, CHUNKED)


def coded(coding: str, body: bytes) -> bytes:
    return posted(body, f"Content-Encoding: {coding}", f"Content-Length: {len(body)}")


CHUNKED = "Transfer-Encoding: chunked"
CHAT = json.dumps(chat()).encode()
LENGTH = f"Content-Length: {len(CHAT)}"
GOOD = posted(CHAT, LENGTH)
FLOW = http_bytes(chat(stream=True))
STREAMED = [(chat(stream=True), PATHS["chat.completions"]), (responses(stream=True), PATHS["responses"])]
ASKED = [*STREAMED, (chat(), PATHS["chat.completions"]), (responses(), PATHS["responses"])]
BARE_DEFLATE = zlib.compress(CHAT)[2:-4]
DEEP = b"[" * 100_000 + b"]" * 100_000

# What the tables are made of; | stands between them.
BAD_LINES = (
    b"GET  /v1/models HTTP/1.1|GET\t/v1/models HTTP/1.1| GET /v1/models HTTP/1.1|GET /v1/models|"
    b"GET /v1/models HTTP/1.1 |GET /v1/models http/1.1|GET /v1/models HTTP/1|GET|G(T / HTTP/1.1|"
    b"GET /v1/models HTTP/1.10|GET /v1/models HTTP/01.1|GET /v1 models HTTP/1.1|GET /\xa0 HTTP/1.1|"
    b"GET /v1/\x0bmodels HTTP/1.1|GET\x85/v1/models HTTP/1.1|GET /\0 HTTP/1.1|GET /\x7f HTTP/1.1|"
    b"GET /v1/mod\rels HTTP/1.1|\x16\x03\x01\x02\0\x01\0\x01\xfc|GET * HTTP/1.1|\nGET / HTTP/1.1|"
    b"CONNECT test:80 HTTP/1.1|GET v1/models HTTP/1.1|GET http://[::1/v1/models HTTP/1.1|GET http:// HTTP/1.1|"
    b"GET http://test:x/v1/models HTTP/1.1|GET http://[zz]/v1/models HTTP/1.1|GET /v1/%zz HTTP/1.1|GET /% HTTP/1.1|"
    b"GET /v1/models%4 HTTP/1.1|GET /%ff HTTP/1.1"
).split(b"|")
BAD_FIELDS = (
    b"no colon|: empty|X y: 1|X : 1| X: folded|X: 1\r\n folded|X: 1\r\n\tfolded|X: a\rb|X: a\nY: b|X: a\0b|X: a\x7fb|"
    b"X: a\x0bb|X\xa0: 1|X\0: 1|Host: test|Host: other|\rX: 1|X: 1\r|(X): 1"
).split(b"|")
BAD_HOSTS = [b"a b", b"a/b", b"[::1", b"a:b", b"a@b", b"[zz]", b"a:1:2", b"\xe9"]
BAD_LENGTHS = ["-1", "-0", "+5", "0x5", "5.0", "1_0", "5, 6", "5, 5", "", "5 5", "9" * 19, "\u00b2", "\u00d9\u00a5"]
BAD_SIZES = [b"", b"x", b"-5", b"+5", b"0x5", b"5_", b" 5", b"1" * 16, b"5;\0", b"5;a\rb", b"5;" + b"a" * 4096]
BAD_CODINGS = ["gzip", "gzip, chunked", "chunked, gzip", "chunked, chunked", f"chunked\r\n{CHUNKED}", "xchunked", ""]
BAD_JSON = [
    *b'|{|{"model":|[]|1|"x"|null|{"a": NaN}|{"a": Infinity}|{"a": "\xff"}|{"a": "\n"}|{\'a\': 1}'.split(b"|"),
    *(CHAT + b"x", CHAT + CHAT, DEEP, b'{"a":' + DEEP + b"}"),
    *(CHAT.decode().encode(coding) for coding in ("utf-16", "utf-32", "utf-16-be", "utf-32-le")),
]


# What ends the connection: status -> name -> what is sent.
REFUSED: dict[int, dict[str, bytes]] = {
    400: {
        **{f"line {line!r}": line + b"\r\nHost: test\r\n\r\n" for line in BAD_LINES},
        **{f"field {field!r}": got()[:-2] + field + b"\r\n\r\n" for field in BAD_FIELDS},
        **{f"host {host!r}": b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n" for host in BAD_HOSTS},
        **{f"length {length!r}": posted(CHAT, f"Content-Length: {length}") for length in BAD_LENGTHS},
        **{f"chunk size {size[:20]!r}": posted(size + b"\r\nabcde\r\n0\r\n\r\n", CHUNKED) for size in BAD_SIZES},
        "no host": b"GET / HTTP/1.1\r\n\r\n",
        "five empty lines": b"\r\n" * 5 + got(),
        "bare line feeds": got().replace(b"\r", b""),
        "two lengths": posted(CHAT, LENGTH, "Content-Length: 1"),
        "coding and length": posted(b"0\r\n\r\n", CHUNKED, LENGTH),
        "coding in 1.0": posted(b"0\r\n\r\n", CHUNKED).replace(b"/1.1", b"/1.0", 1),
        "chunk shorter than it says": posted(b"5\r\nabc\r\n0\r\n\r\n", CHUNKED),
        "chunk longer than it says": posted(b"2\r\nabcde\r\n0\r\n\r\n", CHUNKED),
        "chunk after a bare line feed": posted(b"5\nabcde\r\n0\r\n\r\n", CHUNKED),
        "trailer without colon": in_chunks(CHAT, end=b"0\r\nno colon\r\n\r\n"),
    },
    413: {
        "length": posted(b"", f"Content-Length: {TINY + 1}"),
        "huge length": posted(b"", "Content-Length: " + "9" * 18),
        "chunk": posted(b"%x\r\n" % (TINY + 1), CHUNKED),
        "chunks": posted((b"1000\r\n" + b" " * 0x1000 + b"\r\n") * (TINY // 0x1000 + 1), CHUNKED),
    },
    414: {"line": got("/" + "a" * (65 << 10)), "line without end": b"GET /" + b"a" * (65 << 10)},
    417: {
        "expectation": posted(CHAT, LENGTH, "Expect: 200-ok"),
        "two": posted(CHAT, LENGTH, "Expect: 100-continue, x"),
    },
    431: {
        "257 fields": got("/v1/models", *["A: b"] * 256),
        "257 fields without end": got("/v1/models", *["A: b"] * 256)[:-2],
        "fields": got("/v1/models", *["A: b"] * 257),
        "fields without end": got("/v1/models", *["A: b"] * 300)[:-2],
        "head": got("/v1/models", *[f"A: {'b' * 8000}"] * 17),
        "head without end": got("/v1/models", f"A: {'b' * (129 << 10)}")[:-4],
        "trailers": in_chunks(CHAT, end=b"0\r\n" + b"A: b\r\n" * 300 + b"\r\n"),
    },
    501: {f"coding {coding!r}": posted(b"0\r\n\r\n", f"Transfer-Encoding: {coding}") for coding in BAD_CODINGS},
    505: {version: got(version=version) for version in ("2.0", "0.9", "1.2", "3.0")}
    | {"preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"},
}

# What leaves the connection open.
ANSWERED: dict[int, dict[str, bytes]] = {
    200: {
        "four empty lines": b"\r\n" * 4 + got(),
        "long line": got("/v1/models?" + "a" * 8000),
        "long value": got("/v1/models", f"A: {'b' * 8192}"),
        "256 fields": got("/v1/models", *["A: b"] * 255),
        "absolute form": got("http://other:1/v1/models"),
        "percent": got("/v1/%6dodels"),
        "query": got("/v1/models?a=%zz&b=//../"),
        "odd values": got("/v1/models", "A:\tb\tc\t", "B: \xe9", "C:"),
        "1.0, kept alive": got("/v1/models", "Connection: keep-alive", version="1.0"),
        "request in a GET's body": http_bytes(b"BAD\r\n\r\n", "/v1/models", "GET"),
        "chunked": in_chunks(CHAT[:5], CHAT[5:]),
        "bytes as chunks": in_chunks(*(CHAT[at : at + 1] for at in range(len(CHAT)))),
        "chunk extensions": posted(b'%X;a=b;c="d"\r\n%b\r\n000;e\r\n\r\n' % (len(CHAT), CHAT), CHUNKED.swapcase()),
        "trailers": in_chunks(CHAT, end=b"0\r\nA: b\r\nContent-Length: 5\r\n\r\n"),
        "gzip": coded("gzip", gzip.compress(CHAT)),
        "x-gzip": coded("X-GZIP", gzip.compress(CHAT)),
        "deflate": coded("deflate", zlib.compress(CHAT)),
        "bare deflate": coded("deflate", BARE_DEFLATE),
        "any type": posted(CHAT, LENGTH, "Content-Type: text/plain"),
        "expectation of a body that is here": posted(CHAT, LENGTH, "Expect: 100-Continue"),
        "duplicate keys": http_bytes(b'{"model": 1,' + CHAT[1:]),
    },
    400: {
        **{f"JSON {body[:20]!r} of {len(body)}": http_bytes(body) for body in BAD_JSON},
        "gzip cut": coded("gzip", gzip.compress(CHAT)[:-9]),
        "gzip corrupt": coded("gzip", b"\x1f\x8bnonsense"),
        "not gzip": coded("gzip", CHAT),
        "deflate cut": coded("deflate", zlib.compress(CHAT)[:-5]),
    },
    403: {"/": got("/")},  # the page is shown at a loopback Host only
    404: {path: got(path) for path in ("/v2/models", "//v1/models", "/v1//models", "/v1/x/../models")},
    405: {
        "PUT": http_bytes(CHAT, "/v1/responses", "PUT"),
        "POST": http_bytes(CHAT, "/v1/models"),
        "DELETE": http_bytes(CHAT, "/v1/chat/completions", "DELETE"),
    },
    413: {
        "gzip": coded("gzip", gzip.compress(b" " * (TINY + 1))),
        "zlib": coded("deflate", zlib.compress(b" " * 9 * TINY)),
    },
    415: {coding: coded(coding, CHAT) for coding in ("br", "gzip, gzip", "compress", "*")},
}

# What several requests on one connection get; a last 0 is the end of the connection.
PIPELINES: dict[str, tuple[bytes, list[int]]] = {
    "in order": (got() + GOOD + got("/nothing") + got(), [200, 200, 404, 200]),
    "body too short": (posted(CHAT, "Content-Length: 10"), [400, 400, 0]),
    "nothing after a fatal error": (GOOD + b"BAD\r\n\r\n" + GOOD, [200, 400, 0]),
    "nothing after close": (got("/v1/models", "Connection: x, Close") + GOOD, [200, 0]),
    "close in a second field": (got("/v1/models", "Connection: keep-alive", "Connection: close") + GOOD, [200, 0]),
    "nothing after 1.0": (got(version="1.0") + GOOD, [200, 0]),
    "1.0 without keep-alive": (got("/v1/models", "Connection: x", version="1.0") + GOOD, [200, 0]),
}

# What is sent before the client half-closes, and what it gets; 0 is the end of the connection alone.
CUT: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 0),
    "line": (got()[:20], 0),
    "head without its empty line": (got()[:-2], 0),
    "length": (posted(CHAT, f"Content-Length: {len(CHAT) + 1}"), 400),
    "chunk": (in_chunks(CHAT, end=b"5\r\nab"), 400),
    "last chunk": (in_chunks(CHAT, end=b""), 400),
    "end of trailers": (in_chunks(CHAT, end=b"0\r\n"), 400),
    "whole request": (GOOD, 200),
}


class ReaderTest(unittest.TestCase):
    """The reader of requests, which sees no socket: fed with bytes, it says where it waits, and what it has read."""

    @staticmethod
    def read(*pieces: bytes) -> tuple[list[str], Any]:
        """The states in which it waited, and the body, or the exception."""
        inbox, states = _Inbox(), list[str]()
        rest = list(pieces)
        try:
            for state in _read_request(inbox):
                states.append("100" if state is None else state.name)
                if state is not None:
                    if not rest:
                        raise EOFError
                    inbox.data += rest.pop(0)
        except (EOFError, _Refused) as error:
            return states, error
        return states, inbox.body

    def test_states(self) -> None:
        """It waits between requests, in the head, and in the body, and asks for 100 Continue where that is wanted."""
        expecting = posted(b"{}", "Content-Length: 2", "Expect: 100-continue").removesuffix(b"{}")
        head, body = b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n", b"{}"
        for name, pieces, states in (
            ("whole", (head + body,), ["IDLE"]),
            ("apart", (head, body), ["IDLE", "BODY"]),
            ("empty lines", (b"\r\n\r\n", head[:9], head[9:] + body), ["IDLE", "IDLE", "HEAD"]),
            (
                "bytes",
                tuple(bytes([byte]) for byte in head + body),
                ["IDLE", *["HEAD"] * (len(head) - 1), *["BODY"] * 2],
            ),
            ("expecting", (expecting, body), ["IDLE", "100", "BODY"]),
        ):
            with self.subTest(name=name):
                self.assertEqual(self.read(*pieces), (states, b"{}"))

    def test_end_of_input(self) -> None:
        """The end of the input before a request is whole is an EOFError, wherever it comes."""
        data = in_chunks(b"hello")
        for length in range(len(data)):
            with self.subTest(length=length):
                self.assertIsInstance(self.read(data[:length])[1] if length else self.read()[1], EOFError)
        self.assertEqual(self.read(data)[1], b"hello")


class WireTableTest(LeakTest):
    """Raw bytes, and what each must get."""

    def setUp(self) -> None:
        super().setUp()
        limit = mock.patch.object(*_MAX_BODY, TINY)
        limit.start()
        self.addCleanup(limit.stop)
        self.server = start(self, keep=1)

    def check(self, data: bytes, statuses: list[int], most: int) -> None:
        """Sends in so many pieces and then byte by byte, and compares the answers; what must stay open must work."""
        step = len(data) // most + 1
        cuts = [*range(0, len(data), step), *(range(len(data) - 8, len(data)) if most > 1 else ()), len(data)]
        with Wire(self.server) as wire:
            wire.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(ConnectionError):  # it was answered, and closed, before all was sent
                for at, end in itertools.pairwise(sorted(cuts)):
                    wire.send(data[at:end])
            answers = [wire.answer() for _ in filter(None, statuses)]
            self.assertEqual([answer.status for answer in answers], [*filter(None, statuses)])
            for answer in answers:
                if answer.status >= 400:
                    self.assert_error(answer)
                self.assertEqual("allow" in answer.headers, answer.status == 405)
            self.assertEqual(answers[-1].headers.get("connection") == "close", not statuses[-1])
            if statuses[-1]:
                self.assertEqual(wire.send(GOOD).answer().status, 200)
            else:
                self.assertEqual(wire.rest(), b"")
        self.assert_works(self.server)

    def check_all(self, most: int) -> None:
        """Checks all tables, sending each row in about so many pieces at most."""
        for table, end in ((REFUSED, [0]), (ANSWERED, [])):
            for status, rows in table.items():
                for name, data in rows.items():
                    with self.subTest(name=name, status=status):
                        self.check(data, [status, *end], most)
        for name, (data, statuses) in PIPELINES.items():
            with self.subTest(name=name):
                self.check(data, statuses, most)

    def test_each_request_gets_its_status_and_connection_state(self) -> None:
        """Every row of the tables, sent at once."""
        self.check_all(1)

    def test_delivery_in_pieces_changes_nothing(self) -> None:
        """Every row, byte by byte; the long ones in two hundred pieces, and the last bytes one by one."""
        self.check_all(200)

    def test_a_request_that_ends_early_is_never_carried_out(self) -> None:
        """FIN inside the head closes; inside the body it is a 400; after a whole request it changes nothing."""
        for name, (data, status) in CUT.items():
            with self.subTest(name=name), Wire(self.server) as wire:
                wire.send(data).sock.shutdown(socket.SHUT_WR)
                if status:
                    self.assertEqual(wire.answer().status, status)
                self.assertEqual(wire.rest(), b"")
                self.assertEqual(len(self.server.requests), int(status == 200))

    def test_continue_comes_where_a_body_is_awaited(self) -> None:
        """After it the answer, whatever it is, has a head of its own; in 1.0 there is none."""
        expect, continued = "Expect: 100-CONTINUE", b"HTTP/1.1 100 Continue\r\n\r\n"
        body = FLOW.partition(b"\r\n\r\n")[2]
        rows: dict[str, tuple[bytes, bytes, bytes, int]] = {
            "length": (posted(b"", LENGTH, expect), continued, CHAT, 200),
            "chunked": (posted(b"", CHUNKED, expect), continued, in_chunks(CHAT).partition(b"\r\n\r\n")[2], 200),
            "stream": (posted(b"", f"Content-Length: {len(body)}", expect), continued, body, 200),
            "bad JSON": (posted(b"", "Content-Length: 1", expect), continued, b"{", 400),
            "too big": (posted(b"", f"Content-Length: {TINY + 1}", expect), b"", b"", 413),
            "empty": (posted(b"", "Content-Length: 0", expect), b"", b"", 400),
            "1.0": (posted(b"", LENGTH, expect).replace(b"/1.1", b"/1.0", 1), b"", CHAT, 200),
        }
        for name, (head, first, rest, status) in rows.items():
            with self.subTest(name=name), Wire(self.server) as wire:
                wire.send(head)
                self.assertEqual(wire.exactly(len(first)), first)
                self.assertEqual(wire.send(rest).answer().status, status)

    def test_a_refusal_reaches_a_client_that_is_still_uploading(self) -> None:
        """413 comes before the body is read, and no reset destroys it."""
        with Wire(self.server) as wire:
            wire.send(posted(b" " * 8 * TINY, f"Content-Length: {8 * TINY}"))
            self.assertEqual(wire.answer().status, 413)

    def test_odd_values_are_never_a_server_error(self) -> None:
        """Whatever JSON the values are, the answer is below 500."""
        odd: list[Any] = [None, True, 0, -1, 1.5, 10**400, "", "x", [], [1], [[]], {}, {"a": 1}, [None], "\ud800"]
        keys = "model messages input stream n stop max_tokens tools tool_choice response_format text stream_options"
        for key in f"{keys} metadata instructions previous_response_id reasoning conversation include".split():
            for number, value in enumerate(odd):
                for body, path in ((chat(), PATHS["chat.completions"]), (responses(), PATHS["responses"])):
                    with self.subTest(name=key, number=number, path=path):
                        answer = call(self.server, {**body, key: value}, path)
                        self.assertLess(answer.status, 500)

    def test_deep_json_is_never_a_server_error(self) -> None:
        """However deep values are nested, and wherever, the answer is below 500."""
        schema = {"type": "json_schema", "name": "s", "schema": "DEEP"}
        form, kinds = (
            {"type": "json_schema", "json_schema": schema},
            [{"type": "function", "name": "f", "parameters": "DEEP"}],
        )
        bodies = [chat(metadata="DEEP"), chat(tools=[{"type": "function", "function": kinds[0]}]), chat(stop="DEEP")]
        bodies += [
            chat(response_format=form),
            chat(messages=["DEEP"]),
            responses(tools=kinds),
            responses(metadata="DEEP"),
        ]
        bodies += [
            {**responses(), "text": {"format": schema}},
            responses(reasoning="DEEP"),
            {"model": "m", "input": ["DEEP"]},
        ]
        for depth in (300, 500, 900, 970, 3000, 9000):
            for number, body in enumerate(bodies):
                with self.subTest(depth=depth, number=number):
                    data = json.dumps(body).encode().replace(b'"DEEP"', b'{"a":' * depth + b"1" + b"}" * depth)
                    path = PATHS["responses" if "input" in body else "chat.completions"]
                    self.assertLess(call(self.server, data, path).status, 500)

    def test_text_is_utf8_and_what_utf8_lacks_is_escaped(self) -> None:
        """Replies are UTF-8; lone surrogates and line separators are escaped; all of it comes back as it was."""
        text = "é 😀 \0 \ud800 \u0085 \u2028 \u2029"
        answer = call(self.server, chat(text))
        self.assertEqual(answer.json["choices"][0]["message"]["content"], text)
        self.assertIn("é 😀 \\u0000 \\ud800 \\u0085 \\u2028 \\u2029".encode(), answer.body)

    def test_mutated_requests_are_answered_or_refused(self) -> None:
        """Random damage to good requests gets an answer or a close, never a failure."""
        rng = random.Random(6)
        seeds = (GOOD, FLOW, in_chunks(CHAT), coded("gzip", gzip.compress(CHAT)), got() + GOOD, http_bytes(responses()))
        bits = b'\r\n|\r|\n|\0| |:|0|\xff|"|%|{|[|}|\\ud800|Content-Length: 1\r\n|chunked|1.0|null'.split(b"|")
        for number in range(300):
            data = bytearray(rng.choice(seeds))
            for _ in range(rng.randint(1, 4)):
                begin = rng.randrange(len(data))
                data[begin : begin + rng.choice((0, 0, 1, 1, 5))] = rng.choice([*bits, rng.randbytes(1)])
            with self.subTest(number=number, data=bytes(data)), Wire(self.server) as wire:
                with contextlib.suppress(ConnectionError):
                    wire.send(bytes(data)).sock.shutdown(socket.SHUT_WR)
                for status in re.findall(rb"HTTP/1.1 (5..) [A-Z]", wire.rest()):
                    self.assertIn(status, (b"501", b"505"))
        self.assert_works(self.server)


def endless(ended: threading.Event) -> Iterator[str]:
    """Parts without end."""
    try:
        while True:
            yield "x" * 10_000
    finally:
        ended.set()


def silent(request: Request) -> Stream:
    return Stream()


def reset(sock: socket.socket) -> None:
    """Closes with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class ConnectionTest(LeakTest):
    """Clients that leave, stall, trickle and crowd."""

    def test_who_wakes_from_a_pause_does_not_wait_for_handlers_that_block(self) -> None:
        """Twenty generators, each held after its Pause until all twenty are there."""
        together = threading.Barrier(20)

        def handler(request: Request) -> Iterator[Pause | str]:
            yield Pause(0.001)
            together.wait(WAIT)
            yield "Hello"

        server = start(self, handler)
        ended: list[Any] = []
        callers = [
            threading.Thread(target=lambda: ended.append(call(server, chat(stream=True)).events[-1])) for _ in range(20)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(WAIT)
        self.assertEqual(ended, ["[DONE]"] * 20)

    def test_answers_are_not_held_back(self) -> None:
        """What is small is sent at once, also behind what was not acknowledged yet: Nagle's algorithm is off."""
        with FakeOpenAI() as server, Wire(server) as wire:
            wire.send(GOOD).answer()
            [connection] = server._running().connections
            self.assertTrue(connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    def test_streams_to_http_1_0_end_with_the_connection(self) -> None:
        """HTTP/1.0 knows no chunks: not even with keep-alive."""
        with FakeOpenAI() as server, Wire(server) as wire:
            data = FLOW.replace(b"HTTP/1.1", b"HTTP/1.0\r\nConnection: keep-alive", 1)
            answer = wire.send(data).answer()
            self.assertNotIn("transfer-encoding", answer.headers)
            self.assertEqual((answer.events[-1], wire.rest()), ("[DONE]", b""))

    def test_deadlines(self) -> None:
        """A request that has begun must arrive in time, or gets 408; an idle connection is closed."""
        rows: dict[str, tuple[bytes, list[int]]] = {
            "idle": (b"", []),
            "kept": (got(), [200]),
            "line": (b"G", [408]),
            "head": (GOOD + got()[:-2], [200, 408]),
            "body": (posted(b"{", LENGTH), [408]),
            "chunk": (in_chunks(end=b"5\r\na"), [408]),
        }
        with FakeOpenAI() as server, contextlib.ExitStack() as stack:
            _hurry(server, "IDLE", "HEAD", "BODY")
            wires = {name: stack.enter_context(Wire(server)).send(data) for name, (data, _) in rows.items()}
            for name, (_, statuses) in rows.items():
                with self.subTest(name=name):
                    self.assertEqual([wires[name].answer().status for _ in statuses], statuses)
                    self.assertEqual(wires[name].rest(), b"")

    def test_a_client_that_reads_nothing_is_given_up(self) -> None:
        """A write that is blocked for too long ends the stream."""
        ended = threading.Event()
        with FakeOpenAI(lambda request: endless(ended)) as server:
            _hurry(server, "SENDING")
            with Wire(server) as wire:
                wire.send(FLOW)
                self.assertTrue(ended.wait(WAIT))

    def test_the_default_timeout_of_sockets_is_not_the_servers(self) -> None:
        """socket.setdefaulttimeout() cuts no slow client, and no silent stream."""
        stream = Stream()
        self.addCleanup(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(0.01)
        with FakeOpenAI(lambda request: stream) as server, Wire(server) as wire:
            wire.send(FLOW[:20])
            self.assertRaises(TimeoutError, server.wait_for_requests, 1, 0.05)
            wire.send(FLOW[20:]).until(b"\r\n\r\n")
            self.assertFalse(stream.wait_disconnected(0.05))
            stream.send("Hi")
            stream.close()
            wire.until(b"[DONE]")

    def test_stuck_clients_do_not_slow_others(self) -> None:
        """With 150 clients in the middle of a request, another is served at once."""
        with FakeOpenAI() as server, contextlib.ExitStack() as stack:
            for part in (got()[:-2], posted(b"{", LENGTH), b"") * 50:
                stack.enter_context(Wire(server)).send(part)
            self.assert_works(server)

    def test_bodies_of_64_mib_are_let_in(self) -> None:
        """A body of so many bytes is awaited, and one of a byte more refused."""
        for more, line in ((0, b"HTTP/1.1 100 "), (1, b"HTTP/1.1 413 ")):
            with self.subTest(more=more), FakeOpenAI() as server, Wire(server) as wire:
                wire.send(posted(b"", f"Content-Length: {(64 << 20) + more}", "Expect: 100-continue"))
                self.assertEqual(wire.exactly(len(line)), line)

    def test_announced_bodies_take_no_memory(self) -> None:
        """What a client says it will send is not allocated before it comes."""
        with FakeOpenAI() as server, Wire(server) as wire:
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            wire.send(posted(b"{" * 70_000, "Content-Length: 60000000")).sock.shutdown(socket.SHUT_WR)
            self.assertEqual(wire.answer().status, 400)
            self.assertLess(tracemalloc.get_traced_memory()[1], 30_000_000)

    def test_large_bodies_work(self) -> None:
        """A body of 8 MB is answered."""
        with FakeOpenAI(lambda request: str(len(request.messages[0].text))) as server:
            self.assertIn(b'"8000000"', call(server, chat("x" * 8_000_000)).body)

    def test_a_half_closed_client_gets_its_whole_json(self) -> None:
        """FIN after a complete request that is not streamed does not cost the reply."""

        def pausing(request: Request) -> Iterator[Any]:
            yield Pause(0.001)
            self.eventually(lambda: request.disconnected)
            yield from ("a", Pause(0.001), "b")

        async def waiting(request: Request) -> str:
            await asyncio.to_thread(self.eventually, lambda: request.disconnected)
            return "ab"

        def live(request: Request) -> Stream:
            def feed() -> None:
                self.eventually(lambda: request.disconnected)
                stream.send("a", "b")
                stream.close()

            stream = Stream()
            threading.Thread(target=feed).start()
            return stream

        for handler in (pausing, waiting, live):
            for body, path in ASKED[2:]:
                with (
                    self.subTest(name=handler.__name__, path=path),
                    FakeOpenAI(handler) as server,
                    Wire(server) as wire,
                ):
                    wire.send(http_bytes(body, path)).sock.shutdown(socket.SHUT_WR)
                    answer = wire.answer()
                    self.assertEqual((answer.status, wire.rest()), (200, b""))
                    self.assertIn(b'"ab"', answer.body)

    def test_a_request_sent_behind_another_does_not_disturb_it(self) -> None:
        """What arrives while an answer waits is answered after it."""

        def pausing(request: Request) -> Iterator[Any]:
            yield from ("Hi", Pause(0.02), " there")

        async def asynchronous(request: Request) -> Any:
            yield "Hi"
            await asyncio.sleep(0.02)
            yield " there"

        async def waiting(request: Request) -> str:
            await asyncio.sleep(0.02)
            return "Hi there"

        for handler in (pausing, asynchronous, waiting):
            for body, path in ASKED:
                with (
                    self.subTest(name=handler.__name__, body=body),
                    FakeOpenAI(handler) as server,
                    Wire(server) as wire,
                ):
                    wire.send(http_bytes(body, path))
                    server.wait_for_requests(1, WAIT)
                    answer = wire.send(got()).answer()
                    self.assertIn(b" there", answer.body)
                    self.assertEqual(wire.answer().json["object"], "list")

    def test_leaving_is_noticed_while_nothing_is_sent(self) -> None:
        """FIN, RST, and either behind bytes that nobody reads, end a silent stream; its generator is closed once."""
        leave: dict[str, tuple[bytes, Callable[[socket.socket], None]]] = {
            "FIN": (b"", lambda sock: sock.close()),
            "half a FIN": (b"", lambda sock: sock.shutdown(socket.SHUT_WR)),
            "RST": (b"", reset),
            "FIN after bytes": (GOOD, lambda sock: sock.close()),
            "FIN after many bytes": (b"x" * 300_000, lambda sock: sock.close()),
        }

        def pausing(request: Request) -> Iterator[Any]:
            try:
                yield from ("Hi", Pause(3600), "never")
            finally:
                ended.put("pausing")

        async def asynchronous(request: Request) -> Any:
            try:
                yield "Hi"
                await asyncio.sleep(3600)
            finally:
                ended.put("asynchronous")

        def live(request: Request) -> Stream:
            stream = Stream()
            stream.send("Hi")
            threading.Thread(target=lambda: ended.put("live" if stream.wait_disconnected(WAIT) else "never")).start()
            return stream

        for handler in (pausing, asynchronous, live):
            for name, (last, act) in leave.items():
                ended: queue.SimpleQueue[str] = queue.SimpleQueue()
                with self.subTest(name=name, handler=handler.__name__), faulty(handler) as server:
                    with Wire(server) as wire, mock.patch.object(openai_fake, "_HALF_CLOSED", 3600):
                        wire.send(FLOW).until(b"Hi")
                        act(wire.send(last).sock)
                        self.assertEqual(ended.get(timeout=WAIT), handler.__name__)
                    self.eventually(lambda server=server: not server.in_flight)  # type: ignore[misc]
                    self.assertEqual((ended.empty(), server.errors), (True, []))

    def test_abandoned_streams_leave_nothing(self) -> None:
        """200 silent streams whose clients leave: all threads and descriptors are free while the server goes on."""
        with FakeOpenAI(silent) as server:
            _hurry(server)
            baseline = resources()
            wires = [Wire(server).send(FLOW) for _ in range(200)]
            for wire in wires:
                wire.until(b"\r\n\r\n")
            self.assertEqual(len(server.in_flight), 200)
            for number, wire in enumerate(wires):
                (reset if number % 2 else socket.socket.close)(wire.sock)
            self.assert_back_to(baseline)
            self.assertEqual(server.in_flight, [])


class Rude(BaseException):
    """What pytest.fail() raises is like this: not an Exception."""

    def __str__(self) -> str:
        raise ValueError("no text either")


def raising(error: BaseException) -> dict[str, Callable[[Request], Any]]:
    """Handlers of each kind that raise it before they say anything."""

    def function(request: Request) -> Any:
        raise error

    async def coroutine(request: Request) -> Any:
        raise error

    def generator(request: Request) -> Any:
        yield from function(request)

    async def async_generator(request: Request) -> Any:
        yield await coroutine(request)

    handlers = {each.__name__: each for each in (function, coroutine, generator, async_generator)}
    return {**handlers, "iterable": lambda request: type("Iterable", (), {"__iter__": function})()}


class HandlerFaultTest(LeakTest):
    """Handlers that raise, hang, and return nonsense."""

    def check_500(self, handler: Callable[[Request], Any], *words: str) -> list[BaseException]:
        """Every kind of request gets a 500 with these words, and the connection goes on."""
        with faulty(handler) as server, Wire(server) as wire:
            for number, (body, path) in enumerate(ASKED, 1):
                with self.subTest(words=words, body=body):
                    answer = wire.send(http_bytes(body, path)).answer()
                    self.assertEqual((answer.status, answer.headers.get("x-should-retry")), (500, "false"))
                    self.assert_error(answer)
                    for word in words:
                        self.assertIn(word, answer.error["message"])
                    self.assertEqual(len(server.errors), number)
            self.assertEqual(wire.send(got()).answer().status, 200)
            return list(server.errors)

    def test_a_part_that_cannot_be_shown(self) -> None:
        """Whatever the repr() of a part does, the transcript is told, and the server stops."""

        class Odd:
            def __repr__(self) -> str:
                raise SystemExit(3)

        for value in (10**6000, Odd()):
            with self.subTest(type=type(value)):
                with FakeOpenAI(always([Item("x_call", a=value), "Hi"])) as server:
                    call(server, chat())
                self.assertIn("Item", server.transcript())

    def test_references_to_items_of_a_conversation(self) -> None:
        """An item_reference stands for what is in a conversation, as for what a stored response has."""
        with FakeOpenAI() as server:
            body = {"items": [{"role": "user", "content": "Blue?", "id": "msg_a"}]}
            self.assertEqual(call(server, body, "/v1/conversations").status, 200)
            call(server, responses(input=[{"type": "item_reference", "id": "msg_a"}]), PATHS["responses"])
            self.assertEqual(server.requests[-1].messages[-1].text, "Blue?")

    def test_ids_that_are_no_strings(self) -> None:
        """An item whose id is no string is refused, wherever it may stand; unchecked, it gets an id of its own."""
        item = {"type": "function_call", "id": [], "call_id": "c", "name": "f", "arguments": "{}"}
        for validate in (True, False):
            with self.subTest(validate=validate), FakeOpenAI(validate=validate) as server:
                made = call(server, {}, "/v1/conversations").json["id"]
                for body, path, param in (
                    (responses(input=[item, {"role": "user", "content": "Hi"}]), PATHS["responses"], "input[0].id"),
                    ({"items": [item]}, "/v1/conversations", "items[0].id"),
                    ({"items": [item]}, f"/v1/conversations/{made}/items", "items[0].id"),
                ):
                    answer = call(server, body, path)
                    if validate:
                        self.assertEqual((answer.status, answer.error["param"]), (400, param))
                    else:
                        self.assertEqual(answer.status, 200)
                self.assertEqual(get(server, f"/conversations/{made}/items").status, 200)

    def test_whatever_is_raised_is_a_500_that_names_it(self) -> None:
        """BaseException included; the test sees the same exception; the connection goes on."""
        kinds: tuple[type[BaseException], ...] = (
            *(
                ValueError,
                KeyboardInterrupt,
                SystemExit,
                GeneratorExit,
                BrokenPipeError,
                ConnectionResetError,
                TimeoutError,
            ),
            *(EOFError, RecursionError, MemoryError, Rude),
        )
        for kind, name in itertools.product(kinds, raising(Rude())):
            with self.subTest(kind=kind, name=name):
                error = kind("its text")
                text = "str() raised" if kind is Rude else "its text"
                self.assertEqual({*self.check_500(raising(error)[name], kind.__name__, text)}, {error})

    def test_a_handler_that_cancels_itself_is_a_500(self) -> None:
        """A CancelledError of a handler's own is its mistake: nobody has left."""

        async def cancelled(request: Request) -> str:
            raise asyncio.CancelledError

        async def cancels(request: Request) -> str:
            task: Any = asyncio.current_task()
            task.cancel()
            await asyncio.Event().wait()
            return "never"

        async def generator(request: Request) -> AsyncIterator[str]:
            yield await cancels(request)

        for handler in (cancelled, cancels, generator):
            with self.subTest(name=handler.__name__):
                errors = self.check_500(handler, "CancelledError")
                self.assertEqual([type(error) for error in errors], [asyncio.CancelledError] * len(ASKED))

    def test_nonsense_is_a_500(self) -> None:
        """None, a wrong type, junk in a list."""
        for value in (
            None,
            5,
            b"x",
            object(),
            [],
            [1],
            [None],
            ["x", 1],
            [["x"]],
            Text,
            {"a": 1},
            ValueError("x"),
            float("nan"),
        ):
            with self.subTest(value=value):
                self.check_500(lambda request, value=value: value)  # type: ignore[misc]

    def test_a_failing_clock_is_a_500(self) -> None:
        """What the user gave the server besides a handler is no better than a handler."""
        clock = mock.Mock(side_effect=ValueError("its text"))
        server = FakeOpenAI(clock=clock).start()
        self.addCleanup(server.stop)
        self.addCleanup(server.errors.clear)
        self.assertEqual(call(server, chat()).status, 500)

    def test_a_fault_after_the_head_is_one_event_and_a_cut(self) -> None:
        """The stream tells the error, has no terminator, and the connection ends."""

        def sync(last: Any) -> Iterator[Any]:
            yield "Hi"
            if isinstance(last, BaseException):
                raise last
            yield last

        async def asynchronous(last: Any) -> Any:
            for part in sync(last):
                yield part

        for last in (None, 5, ["x"], ZeroDivisionError("text"), Rude(), SystemExit(1)):
            for make in (sync, asynchronous):
                for body, path in STREAMED:
                    handler: Any = lambda request, make=make, last=last: make(last)  # noqa: E731
                    with self.subTest(last=type(last), make=make.__name__, path=path), faulty(handler) as server:
                        with Wire(server) as wire:
                            data = wire.send(http_bytes(body, path)).rest()
                        self.assertEqual(len(server.errors), 1)
                        self.assertRegex(data, rb'data: {"error":|event: (response\.failed|error)\n')
                        self.assertNotRegex(data, rb"\[DONE\]|response\.completed|\r\n0\r\n\r\n")

    def test_a_generator_that_does_not_close_well_is_left_alone(self) -> None:
        """It may raise in close(), or ignore it; that is nobody's fault."""

        def raises(request: Request) -> Iterator[Any]:
            try:
                yield from ("Hi", Pause(3600))
            finally:
                raise Rude

        def ignores(request: Request) -> Iterator[Any]:
            with contextlib.suppress(GeneratorExit):
                yield from ("Hi", Pause(3600))
            yield "more"

        for handler in (raises, ignores):
            with self.subTest(name=handler.__name__), FakeOpenAI(handler) as server:
                with Wire(server) as wire:
                    wire.send(FLOW).until(b"Hi")
                self.eventually(lambda server=server: not server.in_flight)  # type: ignore[misc]
                self.assert_works(server)

    def test_a_handler_that_never_returns_holds_only_its_request(self) -> None:
        """Others are served, and stop() does not wait for it."""
        held, returned = threading.Event(), threading.Event()
        self.addCleanup(held.set)

        def handler(request: Request) -> str:
            held.wait(WAIT)
            returned.set()
            return "too late"

        server = FakeOpenAI(handler).start()
        with Wire(server) as wire, mock.patch.object(openai_fake, "_STOP_SECONDS", 0.05):
            wire.send(GOOD)
            server.wait_for_requests(1, WAIT)
            self.assert_works(server)
            server.stop()
            self.assertFalse(returned.is_set())
            self.assertEqual(wire.rest(), b"")

    def test_bad_header_fields_are_refused_where_they_are_set(self) -> None:
        """CR, LF, NUL, text beyond Latin-1 and names that are no tokens never reach the wire."""
        fields = [("a", value) for value in ("b\r\nc: d", "b\n", "\r", "\0", "\u2028", "\x7f")]
        for name, value in (*fields, *((name, "b") for name in ("", "a b", "a:", "a\r\n", "\xe9"))):
            with self.subTest(name=name, value=value):
                self.assertRaises(ValueError, Reply, "Hi", headers={name: value})
                self.assertRaises(ValueError, APIError, 400, "message", headers={name: value})

    def test_fields_of_a_handler_do_not_break_the_framing(self) -> None:
        """Framing fields are refused where they are set, or replaced: an answer has one framing."""
        for name, value in (("Content-Length", "3"), ("Transfer-Encoding", "gzip")):
            for make in (
                lambda **headers: Reply("Hi", **headers),
                lambda **headers: APIError(400, "message", **headers),
            ):
                with self.subTest(name=name), contextlib.suppress(ValueError):
                    answer = make(headers={name: value})
                    for body, path in ASKED:
                        with FakeOpenAI(always(answer)) as server, Wire(server) as wire:
                            head = wire.send(http_bytes(body, path)).until(b"\r\n\r\n").lower()
                            self.assertEqual(len(re.findall(b"\r\n(?:content-length|transfer-encoding):", head)), 1)

    def test_text_cannot_forge_events(self) -> None:
        """What looks like the end of an event, or of a chunk, is text."""
        text = "a\n\ndata: [DONE]\n\nevent: forged\r\ndata: {}\r\n\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"
        for body, path in STREAMED:
            with self.subTest(path=path), FakeOpenAI(lambda request: text) as server:
                answer = call(server, body)
                deltas = [
                    each["choices"][0]["delta"].get("content") or "" for each in answer.events if "choices" in each
                ]
                deltas += [each["delta"] for each in answer.events if "delta" in each]
                self.assertEqual("".join(deltas), text)
                self.assertEqual(answer.events.count("[DONE]"), int("messages" in body))


PRELUDE = """
import errno, os, socket, sys, threading, time
from openai_fake import FakeOpenAI, Stream

def ask(stream=True):
    sock = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10)
    sock.sendall(FLOW if stream else GOOD)
    return sock

server = FakeOpenAI(lambda request: Stream() if request.stream else "Hi").start()
"""


def python(script: str) -> subprocess.CompletedProcess[str]:
    """Runs a script with a server in a process of its own, which must be over in time."""
    environ = {**os.environ, "PYTHONPATH": str(Path(openai_fake.__file__).parent)}
    script = f"FLOW, GOOD = {FLOW!r}, {GOOD!r}{PRELUDE}{script}"
    command = [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT, env=environ, check=False)


class LifecycleTest(LeakTest):
    """Starting, stopping, never stopping, and what processes and systems do in between."""

    def test_stop_can_be_called_again_and_from_any_thread(self) -> None:
        """Only the first call stops, and raises what went wrong; the others do nothing."""

        def stop() -> None:
            try:
                server.stop()
                outcomes.put("")
            except ZeroDivisionError:
                outcomes.put("raised")

        outcomes: queue.SimpleQueue[str] = queue.SimpleQueue()
        server = FakeOpenAI(lambda request: str(1 // 0)).start()
        call(server, chat())
        for _ in range(8):
            threading.Thread(target=stop).start()
        self.assertEqual(sorted(outcomes.get(timeout=WAIT) for _ in range(8)), [""] * 7 + ["raised"])

    def test_stop_can_be_called_from_a_handler(self) -> None:
        """It returns there, and all clients' connections end."""

        def handler(request: Request) -> str:
            server.stop()
            stopped.set()
            return "too late"

        async def coroutine(request: Request) -> str:
            return handler(request)

        def generator(request: Request) -> Iterator[str]:
            yield handler(request)

        for each in (handler, coroutine, generator):
            stopped = threading.Event()
            server = FakeOpenAI(each).start()
            with self.subTest(name=each.__name__), Wire(server) as wire, Wire(server) as idle:
                wire.send(FLOW)
                self.assertTrue(stopped.wait(WAIT))
                self.assertEqual((wire.rest(), idle.rest()), (b"", b""))

    def test_stop_cuts_whatever_goes_on(self) -> None:
        """Whatever a connection does, nothing of it runs on; streams are cut without their terminator."""

        def pausing(request: Request) -> Iterator[Any]:
            yield from ("Hi", Pause(3600))

        async def sleeping(request: Request) -> None:
            await asyncio.sleep(3600)

        def babbling(request: Request) -> Iterator[str]:
            return endless(threading.Event())

        rows: dict[str, tuple[Callable[[Request], Any], bytes, bytes]] = {
            "idle": (echo, b"", b""),
            "kept": (echo, GOOD, b"}"),
            "half a head": (echo, got()[:-2], b""),
            "half a body": (echo, posted(b"{", LENGTH), b""),
            "refused": (echo, b"BAD\r\n\r\n", b"}"),
            "silent": (pausing, FLOW, b"Hi"),
            "silent JSON": (pausing, GOOD, b""),
            "coroutine": (sleeping, FLOW, b""),
            "endless": (babbling, FLOW, b"xxx"),
            "endless JSON": (babbling, GOOD, b""),
        }
        for name, (handler, data, mark) in rows.items():
            with self.subTest(name=name):
                baseline, server = resources(), FakeOpenAI(handler).start()
                with Wire(server) as wire:
                    wire.send(data)
                    wire.until(mark)
                    self.assert_works(server)
                    with self.assertNoLogs("openai_fake", "WARNING"):  # that a thread still runs
                        server.stop()
                    self.assertNotRegex(wire.rest(), rb"\[DONE\]|\r\n0\r\n\r\n")
                    self.assertRaises(ConnectionRefusedError, Wire, server)
                self.assertEqual(server.errors, [])
                self.assert_back_to(baseline)

    def test_the_same_port_binds_at_once(self) -> None:
        """Stopped servers free their port, also when connections were open."""
        port = 0
        for _ in range(30):
            server = FakeOpenAI(port=port).start()
            with Wire(server) as wire:
                self.assertEqual(wire.send(got()).answer().status, 200)
                port = int(server.url.rpartition(":")[2])
                server.stop()

    def test_a_busy_port_is_an_error_of_the_caller(self) -> None:
        """OSError from start(), at once; the first server goes on, and the second can start later."""
        with FakeOpenAI() as server:
            second = FakeOpenAI(port=int(server.url.rpartition(":")[2]))
            with self.assertRaises(OSError) as caught:
                second.start()
            self.assertEqual(caught.exception.errno, errno.EADDRINUSE)
            self.assert_works(server)
        with second:
            self.assert_works(second)

    def test_loopback_in_all_its_names(self) -> None:
        """IPv6 and names work; literals are bound without a look-up, and nothing asks for the host's name."""
        for host in ("127.0.0.1", "localhost", "::1"):
            names = {"getfqdn", *(() if host == "localhost" else ("getaddrinfo",))}
            with self.subTest(name=host), contextlib.ExitStack() as stack:
                for name in names:
                    stack.enter_context(mock.patch(f"socket.{name}", side_effect=AssertionError))
                try:
                    server = FakeOpenAI(host=host).start()
                except OSError as error:
                    self.skipTest(f"{host}: {error}")
                stack.close()
                self.addCleanup(server.stop)
                self.assert_works(server)

    def test_a_thread_that_cannot_start_costs_one_connection(self) -> None:
        """Its client sees the end; the next is served. At the start of the server, the caller sees the error."""
        failing = mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread"))
        with FakeOpenAI() as server:
            with failing, Wire(server) as wire:
                self.assertEqual(wire.rest(), b"")
            self.assert_works(server)
        with failing:
            self.assertRaises(RuntimeError, FakeOpenAI().start)

    def test_a_background_response_without_a_thread_is_an_error(self) -> None:
        """The client gets a 500, and the server stops as ever."""
        failing = mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread"))
        with faulty(echo) as server, Wire(server) as wire:
            wire.send(got()).answer()
            with failing:
                wire.send(http_bytes(responses(background=True), PATHS["responses"]))
                self.assertEqual(wire.answer().status, 500)

    def test_a_process_that_never_stops_its_server_leaves(self) -> None:
        """With its own exit code and its own words, whatever is open."""
        for last, code, words in (
            ("sys.exit(3)", 3, ""),
            ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
            ("", 0, ""),
        ):
            with self.subTest(name=last):
                done = python(
                    f"socks = [ask() for _ in range(9)]\nfor sock in socks: sock.recv(1); sock.detach()\n{last}"
                )
                self.assertEqual((done.returncode, done.stderr[done.stderr.rfind("Zero") :]), (code, words))
                self.assertEqual(done.stderr.count("Traceback"), int(bool(words)))

    @unittest.skipUnless(hasattr(os, "fork"), "needs os.fork")
    def test_a_forked_child_does_no_harm(self) -> None:
        """Its exit leaves the server alone; after stop() clients see the end though the child holds copies."""
        done = python("""
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
client = ask()
client.recv(1)
if not (child := os.fork()):
    server.stop()
    sys.exit(5)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
with ask(stream=False) as sock:
    assert b"200 OK" in sock.recv(999)
end, begin = os.pipe()
if not (child := os.fork()):
    os.close(begin)
    os.read(end, 1)
    os._exit(0)
os.close(end)
try:
    server.stop()
except RuntimeError:
    print("never closed")
while client.recv(9999):
    pass
client.close()
try:
    ask()
except ConnectionRefusedError:
    print("refused")
os.close(begin)
os.waitpid(child, 0)
""")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "never closed\nrefused\n", ""))

    @unittest.skipUnless(find_spec("resource"), "needs resource.setrlimit")
    def test_exhausted_descriptors_are_survived(self) -> None:
        """While there are none, nothing spins or dies; when there are some, who waited is served."""
        done = python("""
import resource
socks = [socket.socket() for _ in range(3)]
resource.setrlimit(resource.RLIMIT_NOFILE, (60, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
files = []
try:
    while True:
        files.append(os.dup(1))
except OSError as error:
    assert error.errno == errno.EMFILE
for sock in socks:
    sock.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    sock.sendall(GOOD)
    sock.settimeout(0.2)
began = time.process_time()
try:
    socks[0].recv(1)
except socket.timeout:
    print("waits", time.process_time() - began < 0.1)
for file in files:
    os.close(file)
for sock in socks:
    sock.settimeout(10)
    print(sock.recv(12))
    sock.close()
server.stop()
""")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(done.stdout, "waits True\n" + "b'HTTP/1.1 200'\n" * 3)

    def test_importing_starts_nothing(self) -> None:
        """No thread, no event loop's machinery, nothing of pytest, no output."""
        script = (
            "import sys, threading, openai_fake; print(threading.active_count(), {'asyncio', 'pytest'} & "
            "{*sys.modules})"
        )
        environ = {**os.environ, "PYTHONPATH": str(Path(openai_fake.__file__).parent)}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, check=False)
        self.assertEqual((done.stdout, done.stderr), ("1 set()\n", ""))


# ---- Time and trouble: live streams, faults, and the real client -----------------------------------------------------


# ---- Nothing hangs it, nothing leaks, no test trick breaks it --------------------------------------------------------


LINEAR = 9.0  # how many times as much four times the work may cost: 4 where it is linear, 16 where quadratic


def is_linear(work: Callable[[int], object], n: int) -> bool:
    """Whether 4n cost about four times the CPU seconds of n, in the best of some tries."""

    def seconds(n: int) -> float:
        began = time.thread_time()
        work(n)
        return max(time.thread_time() - began, 1e-4)

    return any(seconds(4 * n) / seconds(n) < LINEAR for _ in range(5))


AWKWARD = [b" ", b"\t", b"1", b":", b"%", b"a", b"%41", b",", b";", b"[", b".", b"a ", b" :", b'"', b"\xe9", b"-_"]
# Where 64 kB of something can stand in a request; a line of the chunked coding ends at 4 kB.
PLACES: dict[str, tuple[bytes, bytes]] = {
    "value": (b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX: a", b"b\r\n\r\n"),
    "value, refused at its end": (b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX: a", b"b\0\r\n\r\n"),
    "name": (b"GET /v1/models HTTP/1.1\r\nHost: a\r\n", b"X: a\r\n\r\n"),
    "host": (b"GET /v1/models HTTP/1.1\r\nHost: a", b"b\r\n\r\n"),
    "host, refused at its end": (b"GET /v1/models HTTP/1.1\r\nHost: [", b"@\r\n\r\n"),
    "method": (b"G", b" /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"),
    "target": (b"GET /a", b"b HTTP/1.1\r\nHost: a\r\n\r\n"),
    "absolute target": (b"GET http://a", b"b/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    "query": (b"GET /v1/models?a=", b"b HTTP/1.1\r\nHost: a\r\n\r\n"),
    "connection": (b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: a", b"b\r\n\r\n"),
    "length": (b"GET /v1/models HTTP/1.1\r\nHost: a\r\nContent-Length: 1", b"2\r\n\r\n"),
    "coding": (b"GET /v1/models HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: c", b"d\r\n\r\n"),
    "chunk line": (in_chunks(b"", end=b"") + b"1;", b"\r\na\r\n0\r\n\r\n"),
    "chunk size": (in_chunks(b"", end=b"") + b"1", b"\r\na\r\n0\r\n\r\n"),
    "trailer": (in_chunks(b"", end=b"0\r\nX: a"), b"b\r\n\r\n"),
    "line without end": (b"GET /a", b""),
}


class TextFormTest(unittest.TestCase):
    """The JSON of one plain text is made from a form, and is what the body says, whatever surrounds the text."""

    def test_json_is_the_body(self) -> None:
        """For odd texts, ids, times, models and indexes, the first time and the next, one after the other."""
        told: list[tuple[Text, dict[str, Any]]] = [
            (Text("plain"), {}),
            (Text("100 %s, \u2028 and \ud800"), {}),
            (Text("a", choice=cast(Any, False)), {}),
            (Text("b", choice=1), {}),
            (Text(""), {}),
            (Text("c"), {"id": "%d", "model": "%s"}),
            (Text("d"), {"model": 'm" %% \\'}),
            (Text("e"), {"model": "gpt-4o-audio-preview"}),
            (Text("f"), {"created": cast(Any, True)}),
            (Text("g"), {"created": 0}),
            (Text("h"), {"extra": {"service_tier": "scale", "x": 1}}),
            (Text("i", annotations=[{"type": "url_citation", "url": "u", "start_index": 0, "end_index": 1}]), {}),
        ]
        for part, envelope in [*told, *told]:
            with self.subTest(part=part, **envelope):
                request, ids = asked("chat.completions", **chat()), openai_fake._Ids(random.getrandbits)
                encoder = openai_fake._ChatEncoder(request, Reply("", **envelope), ids, CLOCK)
                encoder.say(part, [part.text])
                self.assertEqual(encoder.json(), openai_fake._dumps(encoder.body()))

    def test_a_chunk_says_any_envelope(self) -> None:
        """What a Chunk says of id, time and model is told as it is, also where it is of another type."""
        for envelope in ({"created": "x"}, {"created": True}, {"id": 5}, {"model": [5]}):
            made = Chunk([ChunkChoice(0, "a")], **cast(Any, envelope))
            with self.subTest(**envelope), FakeOpenAI(always(made)) as server:
                told = call(server, chat()).json
                self.assertEqual({key: told[key] for key in envelope}, envelope)


class WorkTest(unittest.TestCase):
    """What comes from outside costs what its length says, whatever it is: never the square of it."""

    def test_heads_and_chunks(self) -> None:
        """64 kB of any character in any place of a request cost about four times what 16 kB do."""
        for place, (before, after) in PLACES.items():
            for filler in AWKWARD:
                with self.subTest(name=place, filler=filler):

                    def read(n: int, data: tuple[bytes, bytes, bytes] = (before, filler, after)) -> None:
                        ReaderTest.read(data[0] + data[1] * (n // len(data[1])) + data[2])

                    self.assertTrue(is_linear(read, 16_000))

    def test_answers_that_alternate(self) -> None:
        """An answer of texts and calls in turn costs what its length says, as JSON and as a stream."""
        for api in PATHS:
            for stream in (False, True):

                def answer(n: int, api: str = api, stream: bool = stream) -> None:
                    request = asked(api, **BODIES[api](stream=stream))
                    make = openai_fake._ChatEncoder if api == "chat.completions" else openai_fake._ResponsesEncoder
                    encoder = make(request, Reply(), openai_fake._Ids(random.getrandbits), CLOCK)
                    parts: list[Any] = [Text("word "), ToolCall("f", "{}")] * n
                    for part, texts in openai_fake._runs(openai_fake._arranged(parts, encoder), False, True):
                        list(map(openai_fake._texts, encoder.say(cast(Any, part), texts)))
                    openai_fake._dumps(encoder.body()) if not stream else list(map(openai_fake._texts, encoder.end()))

                with self.subTest(name=api, stream=stream):
                    self.assertTrue(is_linear(answer, 250))

    def test_a_page_of_many_chats(self) -> None:
        """A page of stored chats builds what is on it, not all that is stored."""
        with FakeOpenAI() as server:
            for _ in range(30):
                call(server, chat(store=True))
            with mock.patch.object(
                openai_fake._ChatEncoder, "body", autospec=True, side_effect=openai_fake._ChatEncoder.body
            ) as body:
                page = get(server, "/chat/completions?limit=3").json
        self.assertEqual((len(page["data"]), page["has_more"], body.call_count), (3, True, 3))

    def test_a_clock_is_called_once(self) -> None:
        """One answer, of any kind, asks the clock what time it is once."""
        clock = mock.Mock(return_value=CLOCK)
        with FakeOpenAI(lambda request: ["Hi", ToolCall("f", {})], clock=clock) as server:
            for api in PATHS:
                for options in ({}, {"stream": True}, {"store": True}):
                    call(server, BODIES[api](**options))
                    self.assertEqual(clock.call_count, 1, (api, options))
                    clock.reset_mock()

    def test_unknown_paths_do_not_slow_the_known(self) -> None:
        """A route is found in the same way after any number of unknown paths: nothing is kept of them."""
        with FakeOpenAI() as server:
            before = {name: len(value) for name, value in vars(server._router).items()}
            for number in range(50):
                server._router.find("GET", f"/{number}")
            self.assertEqual({name: len(value) for name, value in vars(server._router).items()}, before)


class InputBoundsTest(unittest.TestCase):
    def test_too_many_inputs(self) -> None:
        """Embeddings and moderations take 1 to 2,048 inputs; more are refused in the API's words."""
        words = "Invalid 'input': array too long. Expected an array with maximum length 2048, but got an array"
        with FakeOpenAI() as server:
            for path in ("/embeddings", "/moderations"):
                body = {"model": "text-embedding-3-small", "dimensions": 1, "input": ["a"] * 2049}
                error = get(server, path, "POST", body).error
                self.assertEqual((error["param"], error["code"]), ("input", "array_above_max_length"))
                self.assertIn(words, error["message"])
                self.assertEqual(get(server, path, "POST", {**body, "input": ["a"] * 2048}).status, 200)

    def test_a_small_gzip_is_not_a_large_body(self) -> None:
        """A compressed body may be 8 MiB, or 200 times what came; one that is more costs no memory."""
        self.assertEqual(openai_fake._MAX_INFLATED, 8 << 20)
        bomb = zlib.compress(b'{"a":[' + b"0," * (300 << 10) + b"0]}")
        with FakeOpenAI() as server, mock.patch.object(openai_fake, "_MAX_INFLATED", 80 << 10):
            for coding, body, status in (
                ("deflate", bomb, 413),
                ("gzip", gzip.compress(json.dumps(chat("x" * (70 << 10))).encode()), 200),
                ("gzip", gzip.compress(json.dumps(chat(random.Random(1).randbytes(60 << 10).hex())).encode(), 1), 200),
            ):
                with Wire(server) as wire:
                    wire.send(http_bytes(body, PATHS["chat.completions"], "POST", f"Content-Encoding: {coding}"))
                    self.assertEqual(wire.answer().status, status)

    def test_zstd(self) -> None:
        """What Python can decode is decoded; what follows the end of a compressed body is refused, not dropped."""
        stand_in = SimpleNamespace(ZstdDecompressor=lambda: zlib.decompressobj(31))  # Python has its own since 3.14
        with mock.patch.dict(sys.modules, {"compression.zstd": stand_in}), FakeOpenAI() as server:
            whole = gzip.compress(json.dumps(chat("Hello")).encode())
            for body, status in ((whole, 200), (whole[:-1], 400), (whole + whole, 400)):
                with Wire(server) as wire:
                    wire.send(http_bytes(body, PATHS["chat.completions"], "POST", "Content-Encoding: zstd"))
                    self.assertEqual(wire.answer().status, status)

    def test_huge_integers(self) -> None:
        """An integer of 400 digits where a decimal is meant is refused as one too large, or is sent back: no 500."""
        huge = 10**400
        for validate, expected in ((True, 400), (False, 200)):
            with FakeOpenAI(validate=validate) as server:
                for api, names in {"chat.completions": ("temperature", "top_p"), "responses": ("temperature",)}.items():
                    for name in names:
                        self.assertEqual(call(server, BODIES[api](**{name: huge})).status, expected, (api, name))
                for name in ("presence_penalty", "frequency_penalty"):
                    self.assertEqual(call(server, {**responses(), name: huge}).status, 200, name)

    def test_pages(self) -> None:
        """`limit` is 1 to 100, `order` asc or desc, and `after` in the list: else the page is refused."""
        with FakeOpenAI() as server:
            ids = [call(server, chat(store=True)).json["id"] for _ in range(3)]
            for query, param in (
                ("limit=0", "limit"),
                ("limit=101", "limit"),
                ("limit=-1", "limit"),
                ("limit=x", "limit"),
                ("order=up", "order"),
                ("after=chatcmpl-foreign", "after"),
            ):
                with self.subTest(name=query):
                    answer = get(server, "/chat/completions?" + query)
                    self.assertEqual((answer.status // 100, answer.error["param"]), (4, param))
            get(server, "/chat/completions/" + ids[1], "DELETE")
            self.assertEqual(get(server, "/chat/completions?after=" + ids[1]).status, 404)
            page = get(server, "/chat/completions?order=asc&after=" + ids[0]).json["data"]
            self.assertEqual([each["id"] for each in page], ids[2:])

    def test_metadata_of_updates(self) -> None:
        """What the API refuses as metadata is refused in updates too."""
        with FakeOpenAI() as server:
            conversation = get(server, "/conversations", "POST", {}).json["id"]
            chat_id = call(server, chat(store=True)).json["id"]
            for path in ("/conversations", f"/conversations/{conversation}", f"/chat/completions/{chat_id}"):
                for bad in ({"a": "x" * 513}, {"b" * 65: ""}, {str(n): "" for n in range(17)}, {"a": 1}, "x"):
                    self.assertEqual(get(server, path, "POST", {"metadata": bad}).status, 400, (path, bad))
                self.assertEqual(get(server, path, "POST", {"metadata": {"a": "b"}}).json["metadata"], {"a": "b"})


class SharedAnswersTest(unittest.TestCase):
    """An answer is a value: given many times, copied, pickled, it keeps nothing of who asked."""

    def test_no_request_is_kept(self) -> None:
        """An answer that is returned, raised or sent again and again keeps no request alive, nor the server."""
        error, cause = rate_limit(), KeyError("x")

        def raising(request: Request) -> str:
            raise error

        def chained(request: Request) -> str:
            try:
                raise cause
            except KeyError as caught:
                raise error from caught

        def generating(request: Request) -> Iterator[str]:
            yield "Hi"
            raise error

        def failing(request: Request) -> Stream:
            stream = Stream()
            stream.fail(error)
            return stream

        async def coroutine(request: Request) -> APIError:
            raise error

        reply, parts = Reply("Hi", Usage(1, 2)), ["Hi", ToolCall("f", {})]
        kinds: dict[str, Callable[[Request], Any]] = {"returned": lambda request: error, "reply": lambda request: reply}
        kinds |= {"list": lambda request: parts, "raised": raising, "chained": chained, "generator": generating}
        kinds |= {"stream": failing, "coroutine": coroutine}
        for name, handler in kinds.items():
            seen: list[weakref.ref[Any]] = []

            class Marker:
                pass

            def marked(request: Request, handler: Any = handler, seen: Any = seen, make: Any = Marker) -> Any:
                marker = make()  # a Request has slots, and no weak references: what its frame holds is as good
                seen.append(weakref.ref(marker))
                return handler(request)

            with self.subTest(name=name):
                gc.freeze()
                server = FakeOpenAI(marked, keep=0).start()
                server_seen = weakref.ref(server)
                for api in PATHS:
                    for stream in (False, True):
                        call(server, BODIES[api](stream=stream))
                server.stop()
                del server
                cause.__traceback__ = None
                gc.collect()
                self.assertEqual([each() for each in seen], [None] * 4)
                self.assertIsNone(server_seen())
                self.assertIsNone(error.__traceback__)

    def test_copies(self) -> None:
        """Answers can be copied and pickled, and say the same then."""
        error = rate_limit()
        error.code = "mine"
        for copied in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
            self.assertEqual((repr(copied), str(copied), copied.headers), (repr(error), str(error), error.headers))
            self.assertIs(type(copied), APIError)
        reply = Reply("Hi", ToolCall("f", {}), id="a", headers={"x": "y"})
        for again in (copy.copy(reply), copy.deepcopy(reply), pickle.loads(pickle.dumps(reply))):
            self.assertEqual(vars(again), vars(reply))

    def test_waits_are_finite(self) -> None:
        """A time to wait that is none is refused where it is given: to a Reply, to the server, and later."""
        server = FakeOpenAI(ttft=1, itl=0.5)
        for bad, raises in ((math.nan, ValueError), (math.inf, ValueError), (-1, ValueError), ("x", TypeError)):
            for name in ("ttft", "itl"):
                for make in (Reply, FakeOpenAI, functools.partial(setattr, server, name)):
                    with self.subTest(name=name, bad=bad), self.assertRaisesRegex(raises, name):
                        make(bad) if isinstance(make, functools.partial) else cast(Any, make)(**{name: bad})
        self.assertEqual((server.ttft, server.itl), (1, 0.5))

    def test_changed_headers(self) -> None:
        """Headers that were changed after they were given are checked again: a bad one is a 500, never on the wire."""

        def bad(answer: Any) -> Any:
            answer.headers["x"] = "a\r\ny: b"
            return answer

        def raising(request: Request) -> str:
            raise bad(APIError(400, "no"))

        handlers: list[Callable[[Request], Any]] = [lambda request: bad(Reply("Hi")), raising]
        for handler in (*handlers, lambda request: bad(APIError(400, "no"))):
            for api in PATHS:
                for stream in (False, True):
                    with faulty(handler) as server:
                        answer = call(server, BODIES[api](stream=stream))
                        self.assertEqual((answer.status, "y" in answer.headers), (500, False))
                        self.assertIn("not a header field value", str(server.errors[0]))


class PatchedTimeTest(LeakTest):
    """Time that a test patches is the test's: the server neither waits for it nor uses it up."""

    def test_patched_clocks(self) -> None:
        """With time.monotonic, time.time and perf_counter that stand still or give out, all answers come as ever."""

        async def sleeping(request: Request) -> list[Any]:
            await asyncio.sleep(0.001)
            return ["Hi", Pause(0.001)]

        handlers: list[Callable[[Request], Any]] = [sleeping, lambda request: Reply("Hi you", ttft=0.001, itl=0.001)]
        for side_effect in (lambda: 0.0, [1.0, 2.0]):
            for handler in handlers:
                clocks = [mock.Mock(side_effect=side_effect) for _ in range(3)]
                with (
                    mock.patch("time.monotonic", clocks[0]),
                    mock.patch("time.perf_counter", clocks[1]),
                    mock.patch("time.time", clocks[2]),
                    FakeOpenAI(handler) as server,
                ):
                    told = [call(server, body, path).status for body, path in ASKED]
                self.assertEqual((told, [clock.call_count for clock in clocks]), ([200] * 4, [0] * 3))

    def test_no_clock_is_found_in_the_module(self) -> None:
        """freezegun replaces the clocks that modules have as attributes: this one has none of its own there."""
        real = {time.monotonic, time.perf_counter, time.time}
        self.assertEqual([name for name, value in vars(openai_fake).items() if callable(value) and value in real], [])


class PatchedThreadsTest(LeakTest):
    def test_what_cannot_be_supported_refuses_to_start(self) -> None:
        """Where gevent or eventlet has replaced sockets or threads, start() says so, and nothing is left."""
        for module in ("gevent._socket3", "eventlet.greenio.base"):
            for name in ("socket.socket", "threading.get_ident"):
                green = mock.Mock(spec=[], __module__=module)
                refusal = self.assertRaisesRegex(RuntimeError, rf"not .*{module}.*python -m openai_fake")
                with self.subTest(name=name, module=module), mock.patch(name, green), refusal:
                    FakeOpenAI().start()

    @unittest.skipUnless(find_spec("gevent"), "gevent is not installed")
    def test_gevent(self) -> None:
        """After gevent's monkey.patch_all(), before the import or after it, start() refuses."""
        for order in ("monkey.patch_all(); import openai_fake", "import openai_fake; monkey.patch_all()"):
            done = python(f"from gevent import monkey; {order}\nopenai_fake.FakeOpenAI().start()")
            self.assertIn("RuntimeError: the server needs real sockets and threads", done.stderr)


class KeepTest(unittest.TestCase):
    """`keep` bounds all that is kept, by one rule."""

    def test_what_is_kept(self) -> None:
        """Of requests, stored answers, turns of conversations, errors and last exchanges there are `keep` at most."""

        def failing(request: Request) -> str:
            if request.text == "bad":
                raise ZeroDivisionError
            return "Hi"

        for keep in (0, 1, 3):
            with self.subTest(name=keep), faulty(failing, keep=keep) as s:
                conversation = get(s, "/conversations", "POST", {}).json["id"]
                for _ in range(6):
                    call(s, responses(conversation=conversation))
                    call(s, chat(store=True))
                    call(s, chat("bad"))
                    get(s, "/conversations", "POST", {})
                stores = (s._responses, s._chats, s._conversations, s._histories, s.errors)
                self.assertEqual([len(store) for store in stores], [max(1, keep)] * 5)
                self.assertEqual((len(s.requests), len(s._recent)), (keep, keep))

    def test_a_conversation_keeps_its_last_turns(self) -> None:
        """Of a conversation, and of a chain, the last `keep` turns are there; deleted responses count as well."""
        with FakeOpenAI(keep=3) as server:
            conversation = get(server, "/conversations", "POST", {}).json["id"]
            id = None
            for turn in range(6):
                call(server, responses(f"turn {turn}", conversation=conversation))
            told = get(server, f"/conversations/{conversation}/items?order=asc").json["data"]
            self.assertEqual([item["content"][0]["text"] for item in told[::2]], ["turn 3", "turn 4", "turn 5"])
            for turn in range(6):
                old, id = id, call(server, responses(f"link {turn}", previous_response_id=id)).json["id"]
                if old is not None:
                    get(server, "/responses/" + old, "DELETE")
            texts = [message.text for message in server.requests[-2].messages if message.role == "user"]
        self.assertEqual(texts, ["link 3", "link 4", "link 5"])

    def test_a_chain_costs_what_it_holds(self) -> None:
        """A chain of n turns holds each item once: four times the turns are four times the memory, and the time."""

        def grown(turns: int, **first: Any) -> tuple[int, float]:
            with FakeOpenAI(lambda request: "Hi") as server, Wire(server) as wire:
                path, more, began = PATHS["responses"], first, 0.0
                tracemalloc.start()
                for _ in range(turns):
                    id = wire.send(http_bytes(responses(**more), path)).answer().json["id"]
                    more = first or {"previous_response_id": id}
                    began = began or time.process_time()
                size = tracemalloc.get_traced_memory()[0]
                tracemalloc.stop()
                return size, time.process_time() - began

        (small, quick), (large, slow) = grown(60), grown(240)
        self.assertLess(large / small, LINEAR)
        self.assertLess(slow / quick, LINEAR)

    def test_names_of_any_size(self) -> None:
        """Nothing is kept of names, however long, once the server is gone."""
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        before = tracemalloc.get_traced_memory()[0]
        with FakeOpenAI(keep=1) as server:
            for number in range(20):
                call(server, chat(model=f"gpt-{number}" + "x" * 300_000))
        del server
        gc.collect()
        self.assertLess(tracemalloc.get_traced_memory()[0] - before, 600_000)


class ReaderChangesTest(unittest.TestCase):
    def test_what_a_reader_changes_is_its_own(self) -> None:
        """A handler or a test that changes what a request holds changes no answer, no other request, and no store."""
        content = [{"type": "input_text", "text": "Hi"}]
        body = responses(
            include=["reasoning.encrypted_content"],
            metadata={"a": "b"},
            tools=[{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        )
        body["input"] = [{"type": "message", "role": "user", "content": content}]

        def vandal(request: Request) -> str:
            for message in request.messages:
                message.content[0]["text"] = "changed"
            request.body["include"].append("message.output_text.logprobs")
            request.body["metadata"]["a"] = "changed"
            request.body["input"][0]["content"].append("changed")
            request.input.clear()
            request.options["metadata"].clear()
            cast(Any, request.tools[0].parameters)["type"] = "changed"
            request.messages.clear()
            return "Hello"

        def told(handler: Any) -> list[bytes]:
            with FakeOpenAI(handler, seed=1, clock=lambda: CLOCK) as server:
                first = call(server, body)
                second = call(server, {**body, "previous_response_id": first.json["id"]})
                for request in server.requests:
                    with contextlib.suppress(IndexError):
                        vandal(request)
                items = get(server, f"/responses/{second.json['id']}/input_items")
                stored = get(server, f"/responses/{first.json['id']}")
                return [each.body for each in (first, second, items, stored)]

        self.assertEqual(told(vandal), told(lambda request: "Hello"))


class OneTaskTest(LeakTest):
    """A handler's coroutines and generators run as in any program: in one task, with one context, of one request."""

    def test_context_variables(self) -> None:
        """What a generator sets it finds, and can reset; the next request on the connection does not see it."""
        variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

        async def generator(request: Request) -> AsyncIterator[str]:
            found = variable.get()
            token = variable.set("set")
            try:
                yield found + " "
                await asyncio.sleep(0)
                yield variable.get()
            finally:
                variable.reset(token)

        def plain(request: Request) -> str:
            found = variable.get()
            variable.set("left behind")
            return found

        def stepping(request: Request) -> Iterator[str]:
            yield variable.get() + " "
            variable.set("set")
            yield variable.get()

        async def coroutine(request: Request) -> str:
            return plain(request)

        handlers: dict[str, tuple[Any, str]] = {
            "async generator": (generator, "unset set"),
            "generator": (stepping, "unset set"),
            "function": (plain, "unset"),
            "coroutine": (coroutine, "unset"),
        }
        for name, (handler, expected) in handlers.items():
            with self.subTest(name=name), FakeOpenAI(handler) as server, Wire(server) as wire:
                for api in PATHS:
                    for _ in range(2):
                        body = wire.send(http_bytes(BODIES[api](), PATHS[api])).answer().json
                        self.assertEqual(text_in(api, body), expected)
                        events = wire.send(http_bytes(BODIES[api](stream=True), PATHS[api])).answer().events
                        self.assertEqual(text_streamed(api, events), expected)

    def test_scopes_around_steps(self) -> None:
        """Timeouts and task groups may stand around a yield: every step, and the end, is in the task of the first."""

        async def generator(request: Request) -> AsyncIterator[str]:
            task = asyncio.current_task()
            try:
                if sys.version_info >= (3, 11):
                    async with asyncio.timeout(WAIT), asyncio.TaskGroup() as group:
                        told = group.create_task(asyncio.sleep(0.001, "a"))
                        yield "b"
                        yield await told
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(0.001):
                                yield "c"
                                await asyncio.Event().wait()
                yield "d"
            finally:
                ended.put(asyncio.current_task() is task)

        ended: queue.SimpleQueue[bool] = queue.SimpleQueue()
        with FakeOpenAI(generator) as server:
            for body, path in ASKED:
                self.assertEqual(call(server, body, path).status, 200)
                self.assertTrue(ended.get(timeout=WAIT))
            self.assertIn("bacd" if sys.version_info >= (3, 11) else "d", call(server, chat()).body.decode())

    @unittest.skipUnless(find_spec("anyio"), "anyio is not installed")
    def test_anyio(self) -> None:
        """anyio's task groups and cancel scopes, which belong to a task, work around a yield."""
        import anyio

        async def generator(request: Request) -> AsyncIterator[str]:
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep, 0.001)
                with anyio.move_on_after(0.001):
                    yield "a"
                    await anyio.sleep(WAIT)
                yield "b"

        with FakeOpenAI(generator) as server:
            for body, path in ASKED:
                self.assertEqual(call(server, body, path).status, 200)

    def test_a_client_that_leaves(self) -> None:
        """The coroutine of an answer whose client leaves is cancelled, of JSON as of a stream."""

        async def endless(request: Request) -> str:
            came.put(None)
            try:
                await asyncio.Event().wait()
            finally:
                ended.put(type(sys.exc_info()[1]))
            return ""

        came: queue.SimpleQueue[None] = queue.SimpleQueue()
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with FakeOpenAI(endless) as server, mock.patch.object(openai_fake, "_HALF_CLOSED", 0.01):
            for body, path in ASKED:
                for leave in (socket.socket.close, reset):
                    with Wire(server) as wire:
                        wire.send(http_bytes(body, path))
                        came.get(timeout=WAIT)
                        leave(wire.sock)
                    self.assertIs(ended.get(timeout=WAIT), asyncio.CancelledError)


class PatienceTest(LeakTest):
    def test_a_body_that_is_steadily_read_is_not_cut(self) -> None:
        """The limit of a write is for one that makes no progress: a body may take many times as long."""
        now, limit = 0.0, openai_fake._LIMITS[openai_fake._State.SENDING]
        with (
            mock.patch.object(openai_fake._Clock, "monotonic", lambda: now),
            FakeOpenAI(lambda request: "x" * (3 << 20)) as server,
            Wire(server) as wire,
        ):
            wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)  # else much of it has come unread
            wire.send(http_bytes(chat(), PATHS["chat.completions"], "POST", "Connection: close"))
            taken, seen = 0, math.inf
            while wire.more():
                taken, wire.buffer = taken + len(wire.buffer), b""
                for connection in tuple(server._running().connections):
                    if connection.deadline != seen:  # a part was written: now it takes a while
                        seen, now = connection.deadline, now + 0.6 * limit
                        server._running()._sweep(now)
        self.assertGreater(taken, 3 << 20)
        self.assertGreater(now, 3 * limit)

    def test_a_long_request_behind_a_waiting_answer(self) -> None:
        """A client that has sent its next request, of whatever length, has not left."""
        for size in (1 << 10, 200 << 10, 8 << 20):
            streams = [Stream(), Stream()]
            with self.subTest(size=size), FakeOpenAI(Script(*streams)) as server, Wire(server) as wire:
                wire.send(FLOW)
                streams[0].wait_request(WAIT)
                wire.send(http_bytes(chat("x" * size)))
                streams[0].send("Hello")
                streams[0].flush(WAIT)
                self.assertFalse(streams[0].disconnected)
                streams[0].close()
                streams[1].send("again")
                streams[1].close()
                self.assertEqual([wire.answer().status for _ in range(2)], [200, 200])
                self.assertEqual(len(cast(Request, streams[1].request).text), size)

    def test_parts_that_were_never_sent(self) -> None:
        """flush() is False for what stands behind a Disconnect or a StreamError, and True for what was sent."""
        for last in (Disconnect(), Disconnect(reset=True), StreamError("no")):
            rows: list[tuple[list[Any], bool]] = [([], True), (["never"], False), ([Pause(0), "never"], False)]
            for rest, expected in rows:
                for body, path in ASKED:
                    stream = Stream()
                    with self.subTest(last=last, rest=rest), FakeOpenAI(always(stream)) as server:
                        stream.send("Hi", last, *rest)
                        stream.close()
                        with Wire(server) as wire:
                            wire.send(http_bytes(body, path, "POST", "Connection: close")).rest()
                            self.assertIs(stream.flush(WAIT), expected)

    def test_an_interrupted_stop_can_be_finished(self) -> None:
        """Where a signal's exception breaks stop() off, wherever, the next one does the rest: nothing is left."""
        owners: dict[str, Any] = {"wake": openai_fake._Server, "server_close": openai_fake._Server}
        owners |= {"join": threading.Thread, "shutdown": socket.socket, "peer_gone": openai_fake._Connection}
        threads, _ = resources()
        for name, owner in owners.items():
            real: Any = getattr(owner, name)

            def interrupted(*arguments: Any, real: Any = real, **options: Any) -> Any:
                if threading.current_thread() is threading.main_thread():
                    raise KeyboardInterrupt
                return real(*arguments, **options)

            server = FakeOpenAI(lambda request: Stream(timeout=None)).start()
            with self.subTest(name=name), Wire(server) as wire:
                wire.send(FLOW).until(b"\r\n\r\n")
                self.eventually(functools.partial(bool, server._running().waiters), "a stream that waits")
                with mock.patch.object(owner, name, interrupted), self.assertRaises(KeyboardInterrupt):
                    server.stop()
                with self.assertRaisesRegex(RuntimeError, "never closed"):
                    server.stop()
                self.assertNotIn(b"[DONE]", wire.rest())
                server.stop()
                self.assert_back_to((threads, 10**6))

    def test_errors_that_cannot_be_told(self) -> None:
        """An error whose str() and repr() raise fails its answer, in the background too; stop() can raise it."""

        class Mute(Exception):
            def __str__(self) -> str:
                raise SystemExit

            __repr__ = __str__

        def handler(request: Request) -> str:
            raise Mute

        server = FakeOpenAI(handler).start()
        paths = [in_background(server) for _ in range(2)]
        self.eventually(lambda: {get(server, path).json["status"] for path in paths} == {"failed"})
        self.assertEqual(call(server, chat()).status, 500)
        with self.assertRaises(Mute):
            server.stop()


class PagesTest(unittest.TestCase):
    """What a web page in a browser can do with a fake, which is nothing, unless `cors`."""

    def test_the_journal_under_every_prefix(self) -> None:
        """The control routes are for pages of this machine under any prefix, whatever `cors` says."""
        with controlled(cors=True) as server:
            for prefix in ("", "/v1", "/openai/v1"):
                for field in ("Host: evil.example", "Host: 127.0.0.1\r\nOrigin: https://evil.example"):
                    with self.subTest(prefix=prefix, field=field), Wire(server) as wire:
                        sent = http_bytes(None, f"{prefix}/_fake/requests", "GET").replace(
                            b"Host: test", field.encode()
                        )
                        self.assertIn(wire.send(sent).answer().status, (403, 404))

    def test_an_own_route_is_no_control_route(self) -> None:
        """A user's route at a path of the control routes asks for the key, and is in the journal."""
        with FakeOpenAI(api_key="k", routes={"GET /": lambda request: "mine"}) as server, Wire(server) as wire:
            sent = http_bytes(None, "/", "GET", "Authorization: Bearer x").replace(b"Host: test", b"Host: localhost")
            self.assertEqual(wire.send(sent).answer().status, 401)
            self.assertEqual(len(server.requests), 1)

    def test_origins(self) -> None:
        """A page of a loopback origin may call, and what is no page; any other gets 403, and no handler is called."""
        own = (
            "http://localhost",
            "http://localhost:3000",
            "https://127.0.0.1:8443",
            "http://[::1]:80",
            "http://127.1.2.3",
        )
        foreign: tuple[str, ...] = (
            "https://evil.example",
            "null",
            "http://localhost.evil.example",
            "http://127.0.0.1.evil.example",
        )
        foreign += ("file://", "http://evil.example:80", "http://localhost@evil.example", "http://10.0.0.1", "")
        handler = mock.Mock(return_value="Hi")
        for cors in (False, True):
            with FakeOpenAI(handler, cors=cors) as server:
                for origin in (*own, *foreign):
                    allowed = cors or origin in own
                    handler.reset_mock()
                    for body, path in ASKED:
                        fields = ("Content-Type: text/plain", f"Origin: {origin}")
                        status = call(server, body, path, "POST", *fields).status
                        self.assertEqual(status, 200 if allowed else 403, (origin, cors))
                    self.assertEqual(handler.called, allowed)
                    for method, path in (("GET", "/v1/chat/completions"), ("GET", "/v1/responses/x")):
                        refused = call(server, None, path, method, f"Origin: {origin}").status == 403
                        self.assertEqual(refused, not allowed)

    def test_hosts(self) -> None:
        """What shows the journal wants a Host that leads here, on a loopback listener; others may say any."""
        near = ("localhost", "LOCALHOST:80", "127.0.0.1:1", "127.0.0.2", "[::1]:8080")
        far = ("evil.example", "evil.example:80", "localhost.evil.example", "10.0.0.1", "[::2]", "")
        for listen, cors in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", False), ("127.0.0.1", True)):
            with FakeOpenAI(host=listen, cors=cors) as server:
                for host in (*near, *far):
                    shown = host in near or listen == "0.0.0.0"
                    for path in ("/_fake/requests", "/"):
                        with Wire(server) as wire:
                            wire.send(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                            self.assertEqual(wire.answer().status == 403, not shown, (listen, host, path))
                    with Wire(server) as wire:
                        status = wire.send(FLOW.replace(b"Host: test", b"Host: " + host.encode())).answer().status
                        self.assertEqual(status, 200)

    def test_cors_can_be_set(self) -> None:
        """An option that is set later counts from the next request on, also for a browser that asks first."""
        with FakeOpenAI() as server:
            for cors, status in ((False, 403), (True, 204), (False, 403)):
                server.cors = cors
                answer = call(server, None, PATHS["responses"], "OPTIONS", "Origin: http://a.example")
                self.assertEqual(answer.status, status)


class LaterOptionsTest(unittest.TestCase):
    def test_a_misspelled_option(self) -> None:
        """An option that there is not is refused, as the constructor does; a subclass has what it likes."""
        with self.assertRaisesRegex(AttributeError, "no option 'tfft'"):
            cast(Any, FakeOpenAI()).tfft = 0.1
        own = cast(Any, type("Own", (FakeOpenAI,), {}))()
        own.tfft = 0.1
        self.assertEqual(own.tfft, 0.1)

    def test_options_set_later(self) -> None:
        """Each option, set on a running server, works from the next request on, or is refused with AttributeError."""
        rows: dict[str, tuple[Any, Callable[[FakeOpenAI], object], object]] = {
            "handler": (lambda request: "new", lambda server: call(server, chat()).body.count(b'"new"'), 1),
            "api_key": ("k", lambda server: call(server, chat()).status, 401),
            "validate": (False, lambda server: call(server, chat(temperature=9)).status, 200),
            "strict": (True, lambda server: call(server, chat(colour=9)).status, 400),
            "models": (["m"], lambda server: [each["id"] for each in get(server, "/models").json["data"]], ["m"]),
            "clock": (lambda: 7, lambda server: call(server, chat()).json["created"], 7),
            "ttft": (0.05, lambda server: server.ttft, 0.05),
            "itl": (0.05, lambda server: server.itl, 0.05),
            "cors": (True, lambda server: "access-control-allow-origin" in call(server, chat()).headers, True),
            "seed": (1, lambda server: server.seed, 1),
            "embeddings": (lambda text: [1], lambda server: server.embeddings is None, False),
        }  # fmt: skip
        for name, (value, found, expected) in rows.items():
            with self.subTest(name=name), FakeOpenAI() as server:
                self.assertNotEqual(found(server), expected)
                setattr(server, name, value)
                self.assertEqual(found(server), expected)
        options = set(inspect.signature(FakeOpenAI).parameters)
        with FakeOpenAI() as server:
            for name in sorted(options - set(rows)):
                with self.subTest(name=name), self.assertRaisesRegex(AttributeError, f"{name} can't be set"):
                    setattr(server, name, 1)


class ForgedLogTest(unittest.TestCase):
    def test_a_traceback_does_not_look_like_the_log(self) -> None:
        """No line of what a handler raised begins as a line of the log does: it is indented."""
        shown: list[str] = []
        console = cast(Any, SimpleNamespace(colour=False, write=shown.append))

        def handler(request: Request) -> str:
            raise ValueError("x\n12:00:00 chat.completions gpt-4o json    200  0.001 s\n\r12:00:01")

        with FakeOpenAI(handler) as server:
            server._observe = openai_fake._observer(console, server, True, "text")
            call(server, chat())
        self.assertIn("12:00:00 chat.completions gpt-4o", "".join(shown))
        self.assertNotRegex("".join(shown), r"(?m)^12:00:0")


def untyped(value: Any) -> Any:
    """What no type checker would let through."""
    return value


def text_in(api: str, body: Any) -> str:
    """The text of a JSON answer."""
    if api == "chat.completions":
        return str(body["choices"][0]["message"]["content"])
    return "".join(part["text"] for item in body["output"] for part in item["content"])


def text_streamed(api: str, events: list[Any]) -> str:
    """The text of a stream's deltas."""
    if api == "chat.completions":
        deltas = [event["choices"][0]["delta"] for event in events if isinstance(event, dict) and event.get("choices")]
        return "".join(delta.get("content") or "" for delta in deltas)
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


def everything(server: FakeOpenAI, api: str, **options: Any) -> bytes:
    """All the bytes of an answer, up to the end of the connection."""
    with Wire(server) as wire:
        return wire.send(http_bytes(BODIES[api](**options), PATHS[api], "POST", "Connection: close")).rest()


def pieces(data: bytes) -> list[bytes]:
    """The chunks in the bytes of a chunked answer; the last is empty where the answer is whole."""
    rest, found = data.partition(b"\r\n\r\n")[2], []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        found.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    return found


def error_in(data: bytes) -> Any:
    """The error that the events of a stream tell."""
    events = [event for event in Answer(200, {}, data).events if event != "[DONE]"]
    return next(event["error"] for event in events if event.get("error"))


@contextlib.contextmanager
def forgiven(handler: Any, **options: Any) -> Iterator[FakeOpenAI]:
    """A fake whose errors are expected."""
    with FakeOpenAI(handler, **options) as server:
        yield server
        server.errors.clear()


@contextlib.contextmanager
def asking(server: FakeOpenAI, api: str = "chat.completions", **options: Any) -> Iterator[Wire]:
    """A connection on which a request is sent."""
    with Wire(server) as wire:
        yield wire.send(http_bytes(BODIES[api](**options), PATHS[api]))


def a_broken_handler(request: Request) -> str:
    raise ZeroDivisionError("of the handler") from LookupError("the cause")


def an_asserting_handler(request: Request) -> str:
    raise AssertionError("the wrong prompt")


def an_exiting_handler(request: Request) -> str:
    raise SystemExit(3)


def an_unencodable_answer(request: Request) -> Any:
    return ToolCall("f", {"x": object()})


Case = type[unittest.TestCase]


def run_inner(case: Case) -> tuple[int, int, str]:
    """What unittest says of a test class: how many failures, how many errors, and their texts."""
    result = unittest.TextTestRunner(stream=io.StringIO()).run(unittest.defaultTestLoader.loadTestsFromTestCase(case))
    return len(result.failures), len(result.errors), "\n".join(text for _, text in result.failures + result.errors)


def cases(make: Callable[[], Any], requests: int, fails: bool) -> list[Case]:
    """Test classes that use a fake in each of the ways there are; their bodies fail by themselves, or do not."""

    def body(test: unittest.TestCase, server: FakeOpenAI) -> None:
        for _ in range(requests):
            call(server, chat("a question"))
        if fails:
            test.fail("the body's own")

    class Started(unittest.TestCase):
        def test(self) -> None:
            body(self, start(self, make()))

    class Awaited(unittest.IsolatedAsyncioTestCase):
        async def test(self) -> None:
            body(self, start(self, make()))

    class Entered(unittest.TestCase):
        def test(self) -> None:
            with FakeOpenAI(make()) as server:
                body(self, server)

    class Stopped(unittest.TestCase):
        def test(self) -> None:
            server = FakeOpenAI(make()).start()
            try:
                body(self, server)
            finally:
                server.stop()

    class OfClass(unittest.TestCase):
        server: FakeOpenAI

        @classmethod
        def setUpClass(cls) -> None:
            cls.server = start(cls, make())

        def test(self) -> None:
            body(self, self.server)

    return [Started, Awaited, Entered, Stopped, OfClass]


class FailingFakeTest(unittest.TestCase):
    """What goes wrong in a fake fails its test, and hides nothing."""

    # how the fake fails: the handler, how many requests, (failures, errors), words of the report
    faults: ClassVar[dict[str, tuple[Callable[[], Any], int, tuple[int, int], tuple[str, ...]]]] = {
        "raised": (lambda: a_broken_handler, 1, (0, 1), ("in a_broken_handler", "of the handler", "the cause")),
        "asserted": (lambda: an_asserting_handler, 1, (1, 0), ("in an_asserting_handler", "the wrong prompt")),
        "exited": (lambda: an_exiting_handler, 1, (0, 1), ("in an_exiting_handler", "SystemExit: 3")),
        "ran out": (lambda: Script("one"), 2, (1, 0), ("the Script ends with answer 1, and one more request came",)),
        "left over": (lambda: Script("one", "two"), 1, (1, 0), ("unused answers of the Script, 1 of 2", "'two'")),
        "not encodable": (lambda: an_unencodable_answer, 1, (0, 1), ("in an_unencodable_answer", "object at")),
        "no answer": (lambda: always(3), 1, (0, 1), ("handler returned int",)),
        "no part": (lambda: always(["fine", 3]), 1, (0, 1), ("not a part of an answer: 3",)),
    }

    def test_the_reason_is_there_before_the_answer(self) -> None:
        """A transcript that is made as soon as an error is read tells its reason."""
        reasons: list[str] = []
        send = openai_fake._Connection.send_whole

        def look(connection: openai_fake._Connection, *arguments: Any) -> None:
            reasons.append(connection.asked._outcome)
            send(connection, *arguments)

        with (
            mock.patch.object(openai_fake._Connection, "send_whole", look),
            FakeOpenAI(always(APIError(400, "No."))) as s,
        ):
            call(s, chat())
        self.assertEqual(reasons, ["No."])

    def test_a_failing_fake_fails_its_test(self) -> None:
        """Whatever went wrong in the fake is the test's failure or error, with its traceback and a transcript."""
        for name, (make, requests, counts, words) in self.faults.items():
            for case in cases(make, requests, fails=False):
                with self.subTest(name=name, case=case.__name__):
                    failures, errors, text = run_inner(case)
                    expected = (0, 1) if case.__name__ == "OfClass" else counts  # unittest: a class has only errors
                    self.assertEqual((failures, errors), expected)
                    for word in (*words, "The last requests to the fake, and its answers", "a question"):
                        self.assertIn(word, text)

    def test_a_fake_hides_no_failure_of_the_test(self) -> None:
        """A test whose body failed keeps that one failure; in its report is also what went wrong in the fake."""
        for name, (make, requests, _, words) in self.faults.items():
            for case in cases(make, requests, fails=True)[:-1]:
                with self.subTest(name=name, case=case.__name__):
                    failures, errors, text = run_inner(case)
                    self.assertEqual((failures, errors), (1, 0))
                    self.assertEqual(text.count("AssertionError: the body's own"), 1)
                    for word in (*words, "The last requests to the fake", "a question"):
                        self.assertIn(word, text)
                    self.assertEqual(text.count(", in a_broken_handler\n"), name == "raised", text)

    def test_a_sound_fake_fails_nothing(self) -> None:
        """Errors that a handler means, and a client that leaves, are no mistakes of the fake."""
        left = Stream()
        with FakeOpenAI(Script(rate_limit(), left, "the end")) as server:
            call(server, chat())
            with asking(server, stream=True) as wire:
                wire.until(b"\r\n\r\n")
            left.wait_disconnected(WAIT)
            call(server, chat())
        self.assertEqual(server.errors, [])

    def test_all_errors_are_kept(self) -> None:
        """`errors` holds each mistake in order, while the server goes on; the first is raised, and names the others."""
        answers = Script(a_broken_handler, "fine", an_asserting_handler)
        with self.assertRaises(ZeroDivisionError) as raised, FakeOpenAI(answers) as server:
            self.assertEqual([call(server, chat()).status for _ in range(3)], [500, 200, 500])
            self.assertEqual([type(error) for error in server.errors], [ZeroDivisionError, AssertionError])
        self.assertIs(raised.exception, server.errors[0])
        report = "".join(traceback.format_exception(raised.exception))
        self.assertIn("Another error: AssertionError: the wrong prompt", report)

    def test_the_client_is_told_to_give_up(self) -> None:
        """The client gets a 500 in the API's shape, with the words of the error, and is told not to retry."""
        for api, handler in itertools.product(PATHS, (a_broken_handler, an_exiting_handler)):
            with self.subTest(name=api, handler=handler.__name__), forgiven(handler) as server:
                answer = call(server, BODIES[api]())
                self.assertEqual((answer.status, answer.headers["x-should-retry"]), (500, "false"))
                self.assertEqual(list(answer.error), ["message", "type", "param", "code"])
                self.assertRegex(answer.error["message"], "handler raised (ZeroDivisionError: of the|SystemExit: 3)")
                self.assertEqual(answer.error["type"], "server_error")


def ask(server: FakeOpenAI) -> str:
    """What a client that lets a 500 through gets: urllib's HTTPError, or the text."""
    data = json.dumps(chat("a question")).encode()
    try:
        # an opener of its own: urlopen's keeps the proxies of whoever asked first
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(server.base_url + "/chat/completions", data, timeout=WAIT) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])
    except urllib.error.HTTPError as error:
        error.close()
        raise


def result_of(case: Case) -> tuple[unittest.TestResult, str]:
    """What unittest says of a test class, and the text of all its reports."""
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    return result, "\n".join(text for _, text in (*result.failures, *result.errors, *result.expectedFailures))


def tried(body: Callable[[Any], object]) -> tuple[unittest.TestResult, str]:
    """What unittest says of a test with this body."""
    return result_of(type("Case", (unittest.TestCase,), {"test": body}))


class ReportTest(unittest.TestCase):
    """The report of a failing test tells by itself what went wrong in its fake."""

    def red(self, outcome: tuple[unittest.TestResult, str]) -> str:
        """The report of the one failure or error that there is."""
        result, text = outcome
        self.assertEqual((len(result.failures) + len(result.errors), len(result.skipped)), (1, 0), text)
        return text

    def test_the_handlers_traceback_is_shown_once(self) -> None:
        """Whether the client's error fails the test or is caught, its report has the handler's traceback, once."""

        def with_start(test: Any) -> None:
            ask(start(test, a_broken_handler))

        def with_start_caught(test: Any) -> None:
            with contextlib.suppress(OSError):
                ask(start(test, a_broken_handler))

        def with_with(test: Any) -> None:
            with FakeOpenAI(a_broken_handler) as server:
                ask(server)

        def with_stop(test: Any) -> None:
            server = FakeOpenAI(a_broken_handler).start()
            try:
                ask(server)
            finally:
                server.stop()

        async def a_coroutine(request: Request) -> Any:
            return a_broken_handler(request)

        def with_coroutine(test: Any) -> None:
            with contextlib.suppress(OSError):
                ask(start(test, a_coroutine))

        for body in (with_start, with_start_caught, with_with, with_stop, with_coroutine):
            with self.subTest(name=body.__name__):
                text = self.red(tried(body))
                self.assertEqual(text.count(", in a_broken_handler\n"), 1, text)
                self.assertEqual(text.count("ZeroDivisionError: of the handler\n"), 1, text)
                self.assertNotIn(f'"{openai_fake.__file__}"', text)

    def test_the_client_is_told_the_users_line(self) -> None:
        """The 500 names the innermost line of the user's own code: not the standard library's, not a generated one."""

        def parsing(request: Request) -> Any:
            json.loads("{")

        def failing(request: Request) -> Any:
            self.fail("never")

        def making(request: Request) -> Any:
            return Message()  # type: ignore[call-arg]

        def late(request: Request) -> Any:
            yield Text(untyped(5))

        for handler in (parsing, failing, making, late):
            with self.subTest(name=handler.__name__), forgiven(handler) as server:
                line = handler.__code__.co_firstlineno + 1
                told = call(server, chat()).error["message"]
                self.assertIn(f"({os.path.basename(__file__)}:{line} in {handler.__name__})", told)

    def test_every_failure_shows_the_transcript(self) -> None:
        """An ordinary failure shows what was asked and answered, or that nothing was."""

        def unequal(test: Any) -> None:
            test.assertEqual(ask(start(test, always("x"))), "y")

        def unasked(test: Any) -> None:
            start(test, always("x"))
            test.fail()

        def in_a_subtest(test: Any) -> None:
            server = start(test, always("x"))
            with test.subTest(i=1):
                test.assertEqual(ask(server), "y")

        asked = "<Request chat.completions gpt-4o 'a question'> -> 200 Text(text='x')\n"
        for body, words in ((unequal, asked), (unasked, "No request came to the fake.\n"), (in_a_subtest, asked)):
            with self.subTest(name=body.__name__):
                self.assertIn(words, self.red(tried(body)))

    def test_two_faults_are_one_entry(self) -> None:
        """A handler's error and a Script that is not used up are told in one report, in the body's if that fails."""
        for fails in (False, True):

            def body(test: Any, fails: bool = fails) -> None:
                with contextlib.suppress(OSError):
                    ask(start(test, Script(a_broken_handler, "b")))
                if fails:
                    test.fail("the body's own")

            with self.subTest(fails=fails):
                text = self.red(tried(body))
                self.assertEqual("the body's own" in text, fails)
                self.assertIn("ZeroDivisionError: of the handler", text)
                self.assertIn("unused answers of the Script, 1 of 2: ('b',)", text)

    def test_skips_and_expected_failures_stay_what_they_are(self) -> None:
        """A test that is skipped, or expected to fail, is that, whatever its fake says; a failing fake counts."""

        def skipped(test: Any) -> None:
            start(test, Script("a", "b"))
            test.skipTest("x")

        def skipped_in_with(test: Any) -> None:
            with FakeOpenAI(Script("a", "b")):
                test.skipTest("x")

        @unittest.expectedFailure
        def expected(test: Any) -> None:
            start(test, Script("a", "b"))
            test.fail()

        @unittest.expectedFailure
        def expected_of_the_fake(test: Any) -> None:
            start(test, Script("a", "b"))

        @unittest.expectedFailure
        def unexpected(test: Any) -> None:
            ask(start(test, Script("a")))

        for body, counts in (
            (skipped, (1, 0, 0)),
            (skipped_in_with, (1, 0, 0)),
            (expected, (0, 1, 0)),
            (expected_of_the_fake, (0, 1, 0)),
            (unexpected, (0, 0, 1)),
        ):
            with self.subTest(name=body.__name__):
                result, text = tried(body)
                self.assertEqual((result.failures, result.errors), ([], []), text)
                self.assertEqual(
                    (len(result.skipped), len(result.expectedFailures), len(result.unexpectedSuccesses)), counts
                )

    def test_a_failure_is_its_own_tests(self) -> None:
        """A test that runs again is not taken for failed because it failed before."""
        runs = iter((True, False))

        def body(test: Any) -> None:
            start(test, Script("a"))
            if next(runs):
                test.fail("the first")

        case: Any = type("Case", (unittest.TestCase,), {"test": body})
        result = unittest.TestResult()
        unittest.TestSuite([case("test"), case("test")]).run(result)
        self.assertEqual(len(result.failures), 2)

    def test_a_stream_left_open_fails_though_the_client_left(self) -> None:
        """Closing the client first hides no Stream that was never closed; a test that looks whether it left knows."""

        def body(test: Any, looks: str = "") -> None:
            stream = Stream()
            server = start(test, lambda request: stream)
            wire = Wire(server)
            test.addCleanup(wire.sock.close)
            stream.send("Hi")
            wire.send(http_bytes(chat(stream=True))).until(b"Hi")
            if looks:
                wire.sock.close()
            if looks == "wait_disconnected":
                test.assertTrue(stream.wait_disconnected(WAIT))
            while looks == "send" and stream.send("more"):
                pass

        self.assertIn("a Stream was never closed", self.red(tried(body)))
        self.assertIn("a Stream was never closed", self.red(tried(lambda test: body(test, "not"))))
        for looks in ("wait_disconnected", "send"):
            with self.subTest(name=looks):
                self.assertTrue(tried(lambda test, looks=looks: body(test, looks))[0].wasSuccessful())  # type: ignore[misc]

    def test_transcript(self) -> None:
        """`transcript()` tells at any time the last exchanges, in 20 lines at most, each short."""
        stream = Stream()
        with FakeOpenAI(lambda request: stream if request.text == "wait" else "x" * 500) as server:
            self.assertEqual(server.transcript(), "No request came to the fake.")
            for number in range(30):
                call(server, chat(f"question {number}\n" * 99))
            with asking(server, api="responses", text="wait"):
                server.wait_for_requests(31, WAIT)
                lines = server.transcript().splitlines()
                stream.close()
        self.assertEqual((len(lines), lines[-1]), (20, "  <Request responses gpt-4o 'wait'> -> no answer yet "))
        self.assertIn("question 29", lines[-2])
        self.assertLess(max(map(len, lines)), 250)


# Without hypothesis's plugin, whose import takes most of a second.
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
PYTEST += ["-W", "error::pytest.PytestAssertRewriteWarning"]
PYTEST_CASES = """
import asyncio, json, unittest, urllib.request
import pytest
from openai_fake import FakeOpenAI, Script, Stream, start

def ask(server):
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "a question"}]}).encode()
    with urllib.request.urlopen(server.base_url + "/chat/completions", body) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]

def broken(request):
    raise ZeroDivisionError("of the handler")

def test_passed(fake_openai):
    assert ask(fake_openai(lambda request: "x")) == ask(fake_openai(lambda request: "x")) == "x"

def test_failed_plain(fake_openai):
    assert ask(fake_openai(lambda request: "x")) == "y"

def test_failed_handler(fake_openai):
    ask(fake_openai(broken))

def test_failed_caught(fake_openai):
    with pytest.raises(OSError):
        ask(fake_openai(broken))

def test_failed_both(fake_openai):
    ask(fake_openai(Script(broken, "b")))

def test_failed_left(fake_openai):
    fake_openai(Script("a"))

def test_failed_options(fake_openai):
    fake_openai(lambda request: "x", ttft=-1)

def test_skipped(fake_openai):
    fake_openai(Script("a"))
    pytest.skip("x")

@pytest.mark.xfail
def test_xfailed(fake_openai):
    fake_openai(Script("a"))

@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_failed_anyio(fake_openai, anyio_backend):
    with pytest.raises(OSError):
        await asyncio.to_thread(ask, fake_openai(broken))

@pytest.mark.asyncio
async def test_failed_asyncio(fake_openai):
    with pytest.raises(OSError):
        await asyncio.to_thread(ask, fake_openai(broken))

@pytest.fixture
def app(fake_openai):
    return ask(fake_openai(broken))

def test_error_setup(app):
    pass

@pytest.fixture
def late(fake_openai):
    server = fake_openai(broken)
    yield
    with pytest.raises(OSError):
        ask(server)

def test_error_teardown(late):
    pass

def test_failed_before_teardown(late):
    assert not "the body's own"

class TestUnittest(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def made(self, fake_openai):
        self.fake_openai = fake_openai

    def test_failed_of_start(self):
        start(self, Script("a", "b"))
        self.fail("the body's own")

    def test_failed_of_fixture(self):
        self.fake_openai(broken)
        self.fail("the body's own")

    def test_failed_in_with(self):
        with FakeOpenAI(broken) as server:
            ask(server)

    def test_failed_alone(self):
        with self.assertRaises(OSError):
            ask(start(self, broken))

    def test_skipped(self):
        start(self, Script("a", "b"))
        self.skipTest("x")

    @unittest.expectedFailure
    def test_xfailed(self):
        start(self, Script("a", "b"))
        self.fail()
"""


@unittest.skipUnless(find_spec("pytest"), "pytest is not installed")
class PytestTest(unittest.TestCase):
    """Under pytest: the fixture of the file, and the same reports."""

    def pytest(self, *arguments: str, conftest: str = "") -> tuple[int, str]:
        """Runs the cases in a folder of their own. Returns the exit status, and what was printed."""
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        Path(folder, "conftest.py").write_text(conftest, "utf-8")
        Path(folder, "test_cases.py").write_text(PYTEST_CASES, "utf-8")
        Path(folder, "pytest.ini").write_text("[pytest]\nmarkers =\n    anyio\n    asyncio\n", "utf-8")
        where = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(openai_fake.__file__))}
        command = [*PYTEST, "-rA", *arguments]
        missing = [
            name for name in ("anyio", "asyncio") if not find_spec("pytest_asyncio" if name == "asyncio" else name)
        ]
        command += ["-k", " and ".join(f"not test_failed_{name}" for name in missing)] if missing else []
        done = subprocess.run(
            command, cwd=folder, env=where, capture_output=True, text=True, timeout=WAIT * 6, check=False
        )
        return done.returncode, done.stdout + done.stderr

    def check_outcomes(self, text: str) -> None:
        """Each case ends as its name says, in one entry."""
        names = re.findall(r"^(FAILED|ERROR|XFAIL) test_cases\.py::([\w:]+)", text, re.MULTILINE)
        self.assertGreater(len(names), 12, text)
        self.assertEqual(len(names), len(set(names)), text)
        for outcome, name in names:
            self.assertIn({"FAILED": "_failed", "ERROR": "_error", "XFAIL": "_xfailed"}[outcome], name, text)
        self.assertNotRegex(text, r"(?m)^SKIPPED .*: x\n(No request|The last)")
        self.assertRegex(text, r"\d+ failed, 2 passed, 2 skipped,( \d deselected,)? 2 xfailed, 2 errors in")

    def test_each_case_is_one_entry(self) -> None:
        """What fails is one entry, with the handler's traceback once and the transcript; skips stay skips."""
        status, text = self.pytest("-p", "openai_fake", "-p", "no:randomly", "-p", "no:xdist")
        self.assertEqual(status, 1)
        self.check_outcomes(text)
        reports = dict(
            re.findall(
                r"^_+ (?:ERROR at \w+ of )?([\w.]+) _+$(.*?)(?=^_+ [\w. ]+ _+$|^=)", text, re.MULTILINE | re.DOTALL
            )
        )
        self.assertIn("No request came to the fake.", reports["test_failed_left"])
        self.assertIn("'a question'> -> 200 Text(text='x')", reports["test_failed_plain"])
        self.assertIn("unused answers of the Script, 1 of 2", reports["test_failed_both"])
        for name in ("handler", "caught", "both"):
            with self.subTest(name=name):
                report = reports["test_failed_" + name]
                self.assertEqual(report.count("def broken(request)") + report.count(", in broken\n"), 1, report)
                self.assertNotIn(openai_fake.__file__, report.replace("The fake had", ""))
        for name in ("of_start", "of_fixture"):
            report = reports["TestUnittest.test_failed_" + name]
            self.assertIn("the body's own", report)
            self.assertIn("No request came to the fake.", report)

    @unittest.skipUnless(find_spec("xdist") and find_spec("pytest_randomly"), "xdist and randomly are not installed")
    def test_side_by_side_in_any_order(self) -> None:
        """With xdist and in random order, the outcomes are the same."""
        self.check_outcomes(self.pytest("-n", "2", "--tb=no", conftest='pytest_plugins = ["openai_fake"]')[1])


def fed(*parts: Any) -> Stream:
    """A Stream that is over."""
    stream = Stream()
    stream.send(*parts)
    stream.close()
    return stream


def arguments_in(body: Any) -> list[str]:
    """The arguments of each call in a body of either API."""
    if "choices" in body:
        return [each["function"]["arguments"] for each in body["choices"][0]["message"]["tool_calls"]]
    return [each["arguments"] for each in body["output"]]


def hello_scripted(request: Request) -> Any:
    return Script(Script(hello_later))(request)


async def hello_later(request: Request) -> str:
    await asyncio.sleep(0)
    return "Hello you"


async def hello_generated(request: Request) -> AsyncIterator[str | Text]:
    yield "Hello "
    await asyncio.sleep(0)
    yield Text("you")


async def a_generator_later(request: Request) -> Any:
    return hello_generated(request)


class AnswersTest(unittest.TestCase):
    """Every way to answer says the same, in both APIs, as JSON and as a stream."""

    ways: ClassVar[dict[str, Callable[[Request], Any]]] = {
        "str": lambda request: "Hello you",
        "part": lambda request: Text("Hello you"),
        "list": lambda request: ["Hello ", Text("you")],
        "tuple": lambda request: ("Hello ", Text("you")),
        "generator": lambda request: (part for part in ("Hello ", Text("you"))),
        "Stream": lambda request: fed("Hello ", Text("you")),
        "Reply": lambda request: Reply("Hello ", ["you"]),
        "Reply of all kinds": lambda request: Reply("He", iter(["llo"]), fed(" "), [Text("you")]),
        "Chunk": lambda request: Chunk([ChunkChoice(delta="Hello you")]),
        "Chunks": lambda request: [Chunk([ChunkChoice(delta=text)]) for text in ("Hello ", "you")],
        "Completion": lambda request: Completion([CompletionChoice(Message("assistant", "Hello you"))]),
        "coroutine function": hello_later,
        "async generator": hello_generated,
        "coroutine of an async generator": a_generator_later,
        "Reply of an async generator": lambda request: Reply(hello_generated(request)),
        "handler in a Script in a Script": hello_scripted,
        "mixed with wire acts": lambda request: [Pause(0), "Hello ", Pause(0), "you"],
    }

    def test_every_way_says_the_same(self) -> None:
        """What a handler answers, in whatever form, comes out as its text in all four encodings."""
        for (name, handler), api in itertools.product(self.ways.items(), PATHS):
            with self.subTest(name=name, api=api), FakeOpenAI(handler) as server:
                self.assertEqual(text_in(api, call(server, BODIES[api]()).json), "Hello you")
                events = call(server, BODIES[api](stream=True)).events
                self.assertEqual(text_streamed(api, events), "Hello you")

    def test_a_time_of_zero(self) -> None:
        """The time 0 of a Reply, or a recording, is a time; that of a Completion stands for the answer's own."""
        self.assertEqual(Reply(Reply("x", created=0)).created, 0)
        self.assertIsNone(Reply(Completion([CompletionChoice(Message("assistant", "x"))], created=0)).created)

    def test_an_empty_id_is_an_id(self) -> None:
        """A Text with the id "" begins a message of its own, in a list as in a generator."""
        for parts in (["a", Text("b", id="")], iter(["a", Text("b", id="")])):
            with FakeOpenAI(always(parts)) as server:
                self.assertEqual(len(call(server, responses("Hi")).json["output"]), 2)

    def test_a_reply_has_its_envelope(self) -> None:
        """A Reply's id, model, time and headers are the answer's, in all four encodings; so are a Completion's."""
        headers = {"X-Own": "yes", "openai-version": "mine"}
        said = Completion([CompletionChoice(Message("assistant", "Hi"))], id="my-id", model="my-model", created=7)
        replies = (Reply("Hi", id="my-id", model="my-model", created=7, headers=headers), Reply(said, headers=headers))
        for reply, api, stream in itertools.product(replies, PATHS, (False, True)):
            with self.subTest(name=api, stream=stream), FakeOpenAI(always(reply)) as server:
                answer = call(server, BODIES[api](stream=stream))
                body = answer.events[0] if stream else answer.json
                body = body.get("response", body)
                created = body["created" if api == "chat.completions" else "created_at"]
                self.assertEqual((body["id"], body["model"], created), ("my-id", "my-model", 7))
                self.assertEqual((answer.headers["x-own"], answer.headers["openai-version"]), ("yes", "mine"))

    def test_only_refuses_the_other_kind(self) -> None:
        """A Reply with `only` is a 500 in the original's words for the other kind of request."""
        words = {
            ("json", True): "handler returned non-streaming response for streaming request",
            ("stream", False): "handler returned streaming response for non-streaming request",
        }
        for only, stream, api in itertools.product(("json", "stream"), (False, True), PATHS):
            with self.subTest(name=only, stream=stream, api=api):
                with forgiven(always(Reply("Hi", only=untyped(only)))) as server:
                    answer = call(server, BODIES[api](stream=stream))
                expected = words.get((only, stream))
                self.assertEqual(answer.status, 500 if expected else 200)
                if expected:
                    self.assertEqual(answer.error["message"], expected)

    def test_an_error_is_an_answer(self) -> None:
        """An APIError, returned or raised, anywhere before the head, is what the client gets, and no mistake."""
        error = APIError(418, "I am a teapot", type="teapot", code="short", param="stout", headers={"x-tea": "green"})

        def raised(request: Request) -> Any:
            raise error

        async def raised_later(request: Request) -> Any:
            raise error

        def generated(request: Request) -> Any:
            yield raised(request)

        async def generated_later(request: Request) -> Any:
            yield raised(request)

        ways = (always(error), raised, raised_later, generated, generated_later, Script(*[error] * 4))
        for handler in ways:
            with FakeOpenAI(handler) as server:
                for api, stream in itertools.product(PATHS, (False, True)):
                    with self.subTest(name=getattr(handler, "__name__", "Script"), api=api, stream=stream):
                        answer = call(server, BODIES[api](stream=stream))
                        self.assertEqual((answer.status, answer.headers["x-tea"]), (418, "green"))
                        told = {"message": "I am a teapot", "type": "teapot", "param": "stout", "code": "short"}
                        self.assertEqual(answer.error, told)
                        self.assertNotIn("x-should-retry", answer.headers)

    wrong: ClassVar[dict[str, tuple[Callable[[], Any], str]]] = {
        "None": (lambda: None, "handler returned empty response"),
        "empty list": (list, "handler returned empty response"),
        "empty generator": (lambda: iter(()), "handler returned empty response"),
        "empty Reply": (Reply, "handler returned empty response"),
        "int": (lambda: 3, "handler returned int"),
        "dict": (lambda: {"a": 1}, "handler returned dict"),
        "bytes": (lambda: b"no", "handler returned bytes"),
        "an error of another kind": (lambda: ValueError("x"), "handler returned ValueError"),
        "list of junk": (lambda: ["fine", 3], "not a part of an answer: 3"),
        "generator of junk": (lambda: iter([3]), "not a part of an answer: 3"),
        "Reply of junk": (lambda: Reply([untyped(3)]), "not a part of an answer: 3"),
    }

    def test_what_is_no_answer_is_the_fake_s_mistake(self) -> None:
        """Anything else is a 500 that says what came, before anything is sent, and is recorded."""
        for (name, (make, words)), api, stream in itertools.product(self.wrong.items(), PATHS, (False, True)):
            with self.subTest(name=name, api=api, stream=stream), forgiven(always(make())) as server:
                answer = call(server, BODIES[api](stream=stream))
                self.assertEqual((answer.status, answer.headers.get("x-should-retry")), (500, "false"))
                self.assertIn(words, answer.error["message"])
                self.assertEqual(len(server.errors), 1)


ENDS = {"chat.completions": b"data: [DONE]\n\n", "responses": b"event: response.completed\n"}


def fits(value: Any, schema: Any, root: Any) -> bool:
    """Whether a value fits a JSON Schema: a second opinion, by the specification's words."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        target = root
        for step in schema["$ref"].split("/")[1:]:
            target = target[step]
        if not fits(value, target, root):
            return False
    kinds = schema.get("type", [])
    types: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    types |= {"integer": int, "number": (int, float)}
    size = len(value) if isinstance(value, (str, list, dict)) else 0
    known: dict[str, Callable[[Any], Any]] = {
        "type": lambda kind: any(
            isinstance(value, types[each]) and (each == "boolean") == isinstance(value, bool)
            for each in ([kinds] if isinstance(kinds, str) else kinds)
        ),
        "const": lambda const: value == const,
        "enum": lambda values: value in values,
        "allOf": lambda schemas: all(fits(value, each, root) for each in schemas),
        "anyOf": lambda schemas: any(fits(value, each, root) for each in schemas),
        "oneOf": lambda schemas: sum(fits(value, each, root) for each in schemas) == 1,
    }
    if isinstance(value, str):
        known["pattern"] = lambda pattern: re.search(pattern, value)
        known["minLength"], known["maxLength"] = lambda least: size >= least, lambda most: size <= most
        known["format"] = lambda name: re.search(FORMS.get(name, ""), value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        known["minimum"], known["maximum"] = lambda least: value >= least, lambda most: value <= most
        known["exclusiveMinimum"], known["exclusiveMaximum"] = lambda over: value > over, lambda under: value < under
        known["multipleOf"] = lambda step: abs(value / step - round(value / step)) < 1e-9
    if isinstance(value, list):
        prefix = schema.get("prefixItems", [])
        known["minItems"], known["maxItems"] = lambda least: size >= least, lambda most: size <= most
        known["uniqueItems"] = lambda unique: len({json.dumps(each) for each in value}) == size
        known["items"] = lambda items: all(fits(each, items, root) for each in value[len(prefix) :])
        known["prefixItems"] = lambda items: all(fits(*pair, root) for pair in zip(value, items, strict=False))
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        known["required"] = lambda names: set(names) <= set(value)
        known["properties"] = lambda each: all(fits(value[name], each[name], root) for name in value if name in each)
        known["additionalProperties"] = lambda more: all(
            fits(value[name], more, root) for name in value if name not in properties
        )
        known["propertyNames"] = lambda names: all(fits(name, names, root) for name in value)
        known["minProperties"] = lambda least: size >= least
    return all(known[key](schema[key]) for key in schema if key in known)


FORMS = {
    "date-time": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$",
    "date": r"^\d{4}-\d\d-\d\d$",
    "email": "^[^@ ]+@[^@ ]+$",
    "uuid": "^[0-9a-f]{8}-[0-9a-f]{4}-[1-8][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$",
    "ipv4": r"^\d+\.\d+\.\d+\.\d+$",
    "uri": "^https?://[^ ]+$",
}
NODE = {
    "type": "object",
    "properties": {
        "value": {"type": "integer"},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
    },
    "required": ["value", "next", "children"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "empty": {},
    "only properties": {"properties": {"a": {"type": "string"}, "b": {"items": {"type": "null"}}}},
    "strict object": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["c", "f"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "const": {"const": {"a": [1]}},
    "nullable": {"type": ["integer", "null"], "minimum": 3},
    "tree": {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    "itself": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
    "itself, or not": {"type": "object", "properties": {"next": {"$ref": "#"}}},
    "all of": {"allOf": [{"type": "object", "required": ["a"]}, {"properties": {"a": {"type": "boolean"}}}]},
    "one of": {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]},
    "mapping": {"type": "object", "additionalProperties": {"type": "number"}, "minProperties": 3},
    "names": {"type": "object", "additionalProperties": True, "propertyNames": {"enum": ["a", "b"]}},
    "required, not described": {"type": "object", "required": ["a"], "additionalProperties": {"type": "integer"}},
    "tuple": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "minItems": 2, "maxItems": 2},
    "set": {
        "type": "array",
        "items": {"type": "integer", "minimum": 1, "maximum": 5},
        "minItems": 5,
        "uniqueItems": True,
    },
    "many": {"type": "array", "items": {"type": "boolean"}, "minItems": 100},
    "none": {"type": "array", "maxItems": 0},
    "integer range": {"type": "integer", "exclusiveMinimum": 6, "exclusiveMaximum": 8},
    "integer from above": {"type": "integer", "maximum": -3},
    "narrow": {"type": "number", "exclusiveMinimum": 0.1, "maximum": 0.2},
    "steps": {"type": "number", "multipleOf": 0.01, "minimum": 1, "maximum": 2},
    "length": {"type": "string", "minLength": 100, "maxLength": 101},
    "short": {"type": "string", "maxLength": 1},
    "digits": {"type": "string", "pattern": r"^\d{8}$"},
    "code": {"type": "string", "pattern": "^[A-Z]{3}$", "minLength": 3},
    "anchored branches": {"type": "string", "pattern": "^(?:(foo)$|(bar)$)"},
    "several classes": {"type": "string", "pattern": r"^(?:EU|US)-[A-Z]{2}[^A-Z\s]\d{2,}[\w.]?é*$", "minLength": 12},
    "slashes": {"$ref": "#/$defs/a~1b%25/0", "$defs": {"a/b%": [{"type": "boolean"}]}},
    **{name: {"type": "string", "format": name} for name in (*FORMS, "no-such-format")},
}


class AutoTest(unittest.TestCase):
    def test_samples_fit(self) -> None:
        """What is made up for a schema fits it, with any seed."""
        for name, schema in SCHEMAS.items():
            for seed in range(10):
                with self.subTest(name=name, seed=seed):
                    value = openai_fake._Sample(schema, random.Random(seed)).make(schema)
                    fitting = name == "slashes" or fits(value, schema, schema)
                    self.assertTrue(fitting, value)
                    json.dumps(value, allow_nan=False)

    def test_cannot(self) -> None:
        """What it cannot make up it names, with the schema."""
        for name, schema, said in (
            ("keyword", {"type": "string", "not": {"const": ""}}, "not"),
            ("pattern", {"type": "string", "pattern": "^a(?!a)a$"}, "assert_not"),
            ("no pattern", {"type": "string", "pattern": r"\p{L}"}, "bad escape"),
            ("begins late", {"type": "string", "pattern": "a^"}, "at is in it"),
            ("ends early", {"type": "string", "pattern": "(a$)b"}, "at is in it"),
            (
                "slow pattern",
                {"type": "string", "pattern": r"^(\w+\s?)+!$", "minLength": 40, "maxLength": 41},
                "like that",
            ),
            ("no choice", {"enum": []}, "instance"),
            ("no step", {"type": "integer", "multipleOf": 0}, "instance"),
            ("huge", {"type": "number", "minimum": 1e308, "exclusiveMaximum": 1.7e308}, "instance"),
            ("format of a kind", {"type": "string", "format": []}, "instance"),
            ("type", {"type": "date"}, "'date'"),
            ("reference", {"$ref": "other.json#/a"}, "other.json"),
            ("needs itself", {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "large"),
            ("empty range", {"type": "integer", "minimum": 3, "maximum": 2}, "number"),
            ("too many", {"type": "array", "minItems": 10**9}, "large"),
            ("not so many", {"type": "array", "items": {"type": "null"}, "minItems": 2, "uniqueItems": True}, "2"),
        ):
            with self.subTest(name=name), self.assertRaisesRegex(ValueError, re.escape(said)):
                openai_fake._Sample(schema, random.Random(1)).instance(schema)

    def test_tools(self) -> None:
        """It calls the first tool, or the forced one, with arguments that fit; not one that has answered already."""
        names = ("first", "second")
        parameters, tools = SCHEMAS["strict object"], list[Any]()
        for api in PATHS:
            flat = [{"type": "function", "name": name, "parameters": parameters} for name in names]
            nested = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in names]
            tools = nested if api == "chat.completions" else flat
            forced = {"type": "function", "function": {"name": "second"}, "name": "second"}
            some: dict[str, Any] = {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", **forced}],
            }
            cases: tuple[tuple[str, Any, str | None], ...] = (
                ("nothing said", None, "first"),
                ("required", "required", "first"),
                ("forced", forced, "second"),
                ("allowed", {**some, "allowed_tools": some}, "second"),
                ("none", "none", None),
            )
            for name, choice, expected in cases:
                with self.subTest(name=name, api=api):
                    [part] = auto(asked(api, **BODIES[api](tools=tools, tool_choice=choice)))
                    self.assertEqual(part.name if isinstance(part, ToolCall) else None, expected)
                    if isinstance(part, ToolCall):
                        self.assertTrue(fits(json.loads(part.arguments), parameters, parameters))
        told = [*chat()["messages"], {"role": "tool", "tool_call_id": "1", "content": "21"}]
        self.assertIsInstance(auto(asked("chat.completions", **chat(tools=tools, messages=told)))[0], Text)
        again = [*told, {"role": "user", "content": "And now?"}]
        self.assertIsInstance(auto(asked("chat.completions", **chat(tools=tools, messages=again)))[0], ToolCall)

    def test_custom_tool(self) -> None:
        """A custom tool gets a text."""
        [part] = auto(asked("responses", **responses(tools=[{"type": "custom", "name": "run"}])))
        self.assertIsInstance(part, CustomToolCall)

    def test_formats(self) -> None:
        """A request for JSON gets an instance of its schema."""
        schema = SCHEMAS["strict object"]
        given = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        with FakeOpenAI(auto) as server:
            message = call(server, chat(response_format=given)).json["choices"][0]["message"]["content"]
            self.assertTrue(fits(json.loads(message), schema, schema))
            text = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
            output = call(server, {**responses(), "text": text}).json["output"][0]["content"][0]["text"]
            self.assertTrue(fits(json.loads(output), schema, schema))
            loose = call(server, chat("JSON, please", response_format={"type": "json_object"})).json
            self.assertIsInstance(json.loads(loose["choices"][0]["message"]["content"]), dict)

    def test_text(self) -> None:
        """Else it is a text of so many tokens, or of what the request limits them to."""
        for tokens in (2, 32, 500):
            usage = spoken("chat.completions", auto(asked("chat.completions", **chat()), tokens=tokens))["usage"]
            self.assertEqual(usage["completion_tokens"], tokens)
        with FakeOpenAI(auto) as server:
            body = call(server, chat(max_completion_tokens=5)).json
            self.assertEqual((body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]), (5, "length"))
            self.assertEqual(call(server, responses(max_output_tokens=16)).json["status"], "incomplete")

    def test_seed(self) -> None:
        """With a seed, the same request gets the same answer, in any order; with another seed, or none, another."""

        def answers(texts: str, **options: Any) -> dict[str, Any]:
            with FakeOpenAI(auto, **options) as server:
                return {text: call(server, chat(text)).json["choices"][0]["message"]["content"] for text in texts}

        first = answers("abc", seed=1)
        self.assertEqual(answers("cba", seed=1), first)
        self.assertEqual(len({*first.values(), *answers("abc", seed=2).values(), *answers("abc").values()}), 9)

    @needs_openai
    def test_official_client(self) -> None:
        """What it makes up for a model of pydantic's is one."""
        import datetime
        import enum

        import openai
        import pydantic

        class Unit(enum.Enum):
            C = "c"
            F = "f"

        class Day(pydantic.BaseModel):
            date: datetime.date
            high: float = pydantic.Field(ge=-50, lt=60)
            unit: Unit

        class Report(pydantic.BaseModel):
            city: str = pydantic.Field(pattern="^[A-Z]", min_length=1)
            days: list[Day] = pydantic.Field(min_length=2)
            link: pydantic.HttpUrl
            note: str | None
            inner: Report | None

        with FakeOpenAI(auto) as server, openai.OpenAI(base_url=server.base_url, api_key="k") as client:
            for _ in range(20):
                asking: Any = [{"role": "user", "content": "Hi"}]
                parsed = client.chat.completions.parse(model="gpt-4o", messages=asking, response_format=Report)
                self.assertIsInstance(parsed.choices[0].message.parsed, Report)
                answer = client.responses.parse(model="gpt-4o", input="Hi", text_format=Report)
                self.assertIsInstance(answer.output_parsed, Report)


class LiveStreamTest(unittest.TestCase):
    """A Stream is driven from the test, while the client reads."""

    def test_what_is_flushed_is_on_the_wire(self) -> None:
        """After flush() the client can read every part sent; close() ends the answer properly."""
        for api in PATHS:
            stream = Stream()
            with self.subTest(name=api), FakeOpenAI(always(stream)) as server:
                with asking(server, api, stream=True) as wire:
                    wire.until(b"\r\n\r\n")  # the head comes before any part
                    for word in ("one", "two", "three"):
                        self.assertTrue(stream.send(word))
                        self.assertTrue(stream.flush(WAIT))
                        wire.sock.setblocking(False)  # it is there, or the read fails
                        wire.until(f'"{word}"'.encode())
                        wire.sock.settimeout(WAIT)
                    stream.close()
                    stream.close()
                    wire.until(ENDS[api])
                    wire.until(b"0\r\n\r\n")
                self.assertFalse(stream.disconnected)

    def test_a_call_s_arguments_come_fragment_by_fragment(self) -> None:
        """Half-sent arguments are on the wire as they are, and together they are the call."""
        fragments = ToolCall("get_weather", '{"city": "Paris"}', id="call_1").split()
        self.assertGreater(len(fragments), 2)
        for api in PATHS:
            stream = Stream()
            with self.subTest(name=api), FakeOpenAI(always(stream)) as server:
                with asking(server, api, stream=True) as wire:
                    for fragment in fragments:
                        stream.send(fragment)
                        stream.flush(WAIT)
                        wire.until(json.dumps(fragment.arguments).encode())
                    stream.close()
                    rest = wire.until(b"0\r\n\r\n")
                self.assertIn(b'"finish_reason":"tool_calls"' if api == "chat.completions" else b'"call_1"', rest)

    def test_a_stream_answers_a_request_for_json(self) -> None:
        """A request that does not stream waits for the Stream's end, and gets all of it as JSON."""
        for api in PATHS:
            stream = Stream()
            with self.subTest(name=api), FakeOpenAI(always(stream)) as server, asking(server, api) as wire:
                self.assertEqual(stream.wait_request(WAIT).api, api)
                stream.send("one ", "two")
                self.assertTrue(stream.flush(WAIT))
                stream.close()
                self.assertEqual(text_in(api, wire.answer().json), "one two")

    def test_a_stream_knows_its_request(self) -> None:
        """`request` is the request that a Stream serves: None before, and waited for with a TimeoutError."""
        stream = Stream()
        self.assertIsNone(stream.request)
        with self.assertRaisesRegex(TimeoutError, "no request came for this Stream in 0.0 s"):
            stream.wait_request(0.0)
        stream.send("early")
        with self.assertRaisesRegex(TimeoutError, "1 of 1 parts are not on the wire after 0.0 s: no request has come"):
            stream.flush(0.0)
        stream.close()
        with FakeOpenAI(always(stream)) as server:
            call(server, chat("me", stream=True))
            self.assertIs(stream.request, server.requests[0])
            self.assertIs(stream.wait_request(0.0), server.requests[0])
            self.assertTrue(stream.flush(WAIT))

    def test_fail_ends_the_stream_with_the_error(self) -> None:
        """fail() tells the client the error inside the stream, without the terminator; it is no mistake of the fake."""
        for api, error in itertools.product(PATHS, (rate_limit(), StreamError("Rate limit", type="requests"))):
            stream = Stream()
            with self.subTest(name=api), FakeOpenAI(always(stream)) as server:
                stream.send("one")
                stream.fail(untyped(error))
                told = pieces(everything(server, api, stream=True))
                self.assertEqual(told[-1], b"")
                told_error = error_in(b"".join(told))
                self.assertTrue(told_error["message"].startswith("Rate limit"))
                self.assertEqual(told_error["type"], "requests")
                self.assertNotIn(ENDS[api], b"".join(told))

    def test_fail_answers_a_request_for_json_with_the_error(self) -> None:
        """Where nothing is sent yet, the APIError of fail() is the whole answer, with its own status and headers."""
        for api in PATHS:
            stream = Stream()
            stream.send("one")
            stream.fail(rate_limit())
            with self.subTest(name=api), FakeOpenAI(always(stream)) as server:
                answer = call(server, BODIES[api]())
                self.assertEqual((answer.status, answer.headers["retry-after-ms"]), (429, "20"))

    def test_a_wait_that_blocks_its_own_loop_says_so(self) -> None:
        """A wait on the thread of the loop that must go on for it to end fails soon, and names the way that awaits."""
        stream = Stream()
        waits: dict[str, Callable[[float], object]] = {
            "stream.wait_request": stream.wait_request,
            "stream.flush": stream.flush,
            "stream.wait_disconnected": stream.wait_disconnected,
            "server.wait_for_requests": lambda timeout: server.wait_for_requests(1, timeout),
        }

        async def blocked(wait: Callable[[float], object]) -> None:
            wait(3600.0)

        async def awaited() -> None:
            asked = asyncio.to_thread(call, server, chat(stream=True))
            answer, *_ = await asyncio.gather(asked, asyncio.to_thread(stream.wait_request, WAIT), closing())
            self.assertEqual(answer.status, 200)
            self.assertTrue(stream.flush(WAIT))  # it has ended: nothing blocks

        async def closing() -> None:
            await asyncio.to_thread(server.wait_for_requests, 1, WAIT)
            await asyncio.to_thread(stream.flush, WAIT)
            stream.close()

        stream.send("Hi")
        with FakeOpenAI(lambda request: stream) as server, mock.patch.object(openai_fake, "_LOOP_PATIENCE", 0.01):
            for name, wait in waits.items():
                with self.subTest(name=name):
                    words = rf"{name}\(\) blocks the event loop .* use `await asyncio.to_thread\({name}\)`"
                    with self.assertRaisesRegex(RuntimeError, words):
                        asyncio.run(blocked(wait))
            asyncio.run(awaited())

    def test_a_call_opens_and_its_arguments_follow(self) -> None:
        """A ToolCall says {} where no arguments are given; "" opens a call whose arguments come piece by piece."""
        for api in PATHS:
            for said, arguments in (
                ([ToolCall("f")], "{}"),
                ([ToolCall("f", "")], ""),
                ([ToolCall("f", ""), ToolCall("", '{"a"'), ToolCall("", ": 1}")], '{"a": 1}'),
            ):
                with self.subTest(name=api, arguments=arguments), FakeOpenAI(Script(fed(*said))) as server:
                    self.assertEqual(arguments_in(call(server, BODIES[api]()).json), [arguments])

    def test_misuse_is_a_clear_error(self) -> None:
        """Sending what is no part, or after the end, raises where it happens."""
        stream = Stream()
        with self.assertRaisesRegex(TypeError, "not a part of an answer: 3"):
            stream.send("a", untyped(3))
        stream.close()
        for name, misuse in (("send", lambda: stream.send("x")), ("fail", lambda: stream.fail(rate_limit()))):
            with self.subTest(name=name), self.assertRaisesRegex(RuntimeError, "a Stream that has ended"):
                misuse()

    def test_a_second_request_is_an_error(self) -> None:
        """A Stream that is given to a second request is a mistake of the fake, and the client is told."""
        for streams in (True, False):
            stream = fed("one")
            with self.subTest(name=streams), forgiven(always(stream)) as server:
                call(server, chat(stream=True))
                answer = call(server, chat(stream=streams))
                self.assertEqual(answer.status, 500)
                self.assertIn("a Stream serves one request", answer.error["message"])
                self.assertIn("a Stream serves one request", str(server.errors[0]))

    def test_a_stream_never_closed_is_an_error(self) -> None:
        """Who stops the server while a client still waits on an open Stream is told that it was never closed."""
        for api, streams in itertools.product(PATHS, (True, False)):
            stream = Stream()
            server = FakeOpenAI(always(stream)).start()
            with self.subTest(name=api, stream=streams), asking(server, api, stream=streams) as wire:
                stream.send("one")
                stream.flush(WAIT)
                with self.assertRaisesRegex(RuntimeError, "a Stream was never closed"):
                    server.stop()
                self.assertNotIn(ENDS[api], wire.rest())
                self.assertTrue(stream.disconnected)

    def test_a_client_that_left_is_noticed(self) -> None:
        """The Stream of a client that closed or reset its connection says so, drops what is sent, and fails nothing."""
        for api, reset, talking in itertools.product(PATHS, (False, True), (False, True)):
            stream = Stream()
            with self.subTest(name=api, reset=reset), FakeOpenAI(always(stream)) as server:
                with asking(server, api, stream=True) as wire:
                    wire.until(b"\r\n\r\n")
                    if talking:
                        stream.send("one")
                        wire.until(b"one")
                    self.assertFalse(stream.wait_disconnected(0.0))
                    if reset:
                        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.assertTrue(stream.wait_disconnected(WAIT))
                self.assertTrue(stream.disconnected)
                self.assertFalse(stream.send("nobody reads this"))
                stream.close()
                self.assertFalse(stream.flush(0.0))
                self.assertEqual(call(server, b"{", PATHS[api]).status, 400)

    def test_streams_are_released_in_any_order(self) -> None:
        """Several streams are open at once; each ends when it is closed, and in_flight names those that have not."""
        streams = [Stream() for _ in range(3)]
        with FakeOpenAI(Script(*streams)) as server, contextlib.ExitStack() as stack:
            wires: list[Wire] = []
            for number in range(3):
                wires.append(stack.enter_context(asking(server, text=str(number), stream=True)))
                server.wait_for_requests(number + 1, WAIT)
                streams[number].wait_request(WAIT)
            for number in (1, 2, 0):
                self.assertIn(streams[number].request, server.in_flight)
                streams[number].send(f"to {number}")
                streams[number].close()
                events = wires[number].answer().events
                self.assertEqual(text_streamed("chat.completions", events), f"to {number}")
                self.assertNotIn(streams[number].request, server.in_flight)
            self.assertEqual(server.in_flight, [])

    def test_wait_for_requests(self) -> None:
        """wait_for_requests(n) gives the requests once n have come; a TimeoutError says how many did."""
        with FakeOpenAI() as server:
            with self.assertRaisesRegex(TimeoutError, "0 of 1 requests came in 0.0 s"):
                server.wait_for_requests(1, 0.0)
            caller = threading.Thread(target=lambda: [call(server, chat(text)) for text in ("a", "b")])
            caller.start()
            self.assertEqual([request.text for request in server.wait_for_requests(2, WAIT)], ["a", "b"])
            caller.join(WAIT)


class GeneratorTest(unittest.TestCase):
    """A generator lives as long as its client reads."""

    def test_a_generator_is_closed_when_its_client_leaves(self) -> None:
        """`finally` runs as soon as the client has left: during a Pause, a wait, or between parts without end."""

        def parts(seen: queue.Queue[str], *parts: Any) -> Iterator[Any]:
            try:
                yield "one"
                for part in parts:
                    seen.put("waits")
                    yield part
                while True:
                    yield "without end"
            finally:
                seen.put("closed")

        def paused(seen: queue.Queue[str]) -> Iterator[Any]:
            return parts(seen, Pause(600))

        async def paused_later(seen: queue.Queue[str]) -> Any:
            for part in parts(seen, Pause(600)):
                yield part

        async def waiting(seen: queue.Queue[str]) -> Any:
            try:
                yield "one"
                seen.put("waits")
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                seen.put("closed")
                raise

        for generator, api in itertools.product((parts, paused, paused_later, waiting), PATHS):
            seen: queue.Queue[str] = queue.Queue()
            held = generator(seen)  # it is closed, not only forgotten
            with self.subTest(name=generator.__name__, api=api), FakeOpenAI(always(held)) as server:
                with asking(server, api, stream=True) as wire:
                    wire.until(b"one")
                    if generator is not parts:
                        self.assertEqual(seen.get(timeout=WAIT), "waits")
                self.assertEqual(seen.get(timeout=WAIT), "closed")
                self.assertEqual(server.errors, [])

    def test_a_handler_may_look_whether_its_client_has_left(self) -> None:
        """`request.disconnected` turns true for a generator that is busy, which is not resumed after its next part."""
        seen: queue.Queue[str] = queue.Queue()

        def busy(request: Request) -> Iterator[str]:
            try:
                yield "one"
                seen.put("busy")
                while not request.disconnected:
                    pass
                seen.put("looked")
                yield "two"
                seen.put("resumed")
            finally:
                seen.put("closed")

        with FakeOpenAI(busy) as server:
            with asking(server, stream=True) as wire:
                wire.until(b"one")
                self.assertEqual(seen.get(timeout=WAIT), "busy")
                self.assertTrue(seen.empty())
            self.assertEqual([seen.get(timeout=WAIT) for _ in range(2)], ["looked", "closed"])

    def test_a_mistake_in_the_middle_cuts_the_stream(self) -> None:
        """The client of a generator that raises or yields junk gets an error event, and no terminator."""

        def raising(request: Request) -> Iterator[Any]:
            yield "one"
            raise KeyError("gone")

        async def raising_later(request: Request) -> Any:
            yield "one"
            raise KeyError("gone")

        async def junk_later(request: Request) -> Any:
            yield "one"
            yield 3

        def junk(request: Request) -> Iterator[Any]:
            yield "one"
            yield 3

        for api, handler in itertools.product(PATHS, (raising, raising_later, junk, junk_later)):
            with self.subTest(name=handler.__name__, api=api), forgiven(untyped(handler)) as server:
                told = pieces(everything(server, api, stream=True))
                words = "KeyError: 'gone'" if "raising" in handler.__name__ else "TypeError: not a part of an answer: 3"
                self.assertIn(b"one", b"".join(told))
                error = error_in(b"".join(told))
                self.assertTrue(error["message"].startswith(f"handler raised {words}"))
                order = "message type param code" if api == "chat.completions" else "type code message param"
                self.assertEqual(" ".join(error), order)
                self.assertEqual([error[key] for key in ("type", "param", "code")], ["server_error", None, None])
                self.assertNotEqual(told[-1], b"")
                self.assertNotIn(ENDS[api], b"".join(told))
                self.assertEqual(len(server.errors), 1)
                self.assertEqual(call(server, BODIES[api]()).status, 500)  # nothing of it is sent as JSON


class WireActTest(unittest.TestCase):
    """What happens on the wire, as parts of an answer."""

    raws: ClassVar[dict[str, tuple[bytes, ...]]] = {
        "malformed JSON": (b"data: {broken\n\n",),
        "comment": (b": are you there\n\n",),
        "CRLF": (b'data: {"a": 1}\r\n\r\n',),
        "half a character": (b'data: "\xc3', b'\xa9"\n\n'),
        "several events": (b"data: 1\n\ndata: 2\n\ndata: 3\n\n",),
        "byte by byte": tuple(bytes([byte]) for byte in b"data: slow\n\n"),
    }

    def test_raw_bytes_are_sent_as_they_are(self) -> None:
        """Each Raw is a write of its own, byte for byte, between the events of the answer."""
        sent: list[bytes] = []

        def spied(method: Callable[..., Any]) -> Any:
            def spy(sock: socket.socket, data: Any, *flags: int) -> Any:
                sent.append(bytes(data))
                return method(sock, data, *flags)

            return spy

        spies: Any = {name: spied(getattr(socket.socket, name)) for name in ("send", "sendall")}
        for (name, raws), api in itertools.product(self.raws.items(), PATHS):
            parts = ["one", *map(Raw, raws), "two"]
            spy = mock.patch.multiple(socket.socket, **spies)
            with self.subTest(name=name, api=api), spy, FakeOpenAI(always(parts)) as server:
                sent.clear()
                told = pieces(everything(server, api, stream=True))
                at = told.index(raws[0])
                self.assertEqual(told[at : at + len(raws)], list(raws))
                self.assertIn(b"one", b"".join(told[:at]))
                self.assertIn(b"two", b"".join(told[at + len(raws) :]))
                self.assertIn(ENDS[api], b"".join(told))
                self.assertEqual(told[-1], b"")
                for raw in raws:
                    self.assertTrue(any(each.endswith(raw + b"\r\n") for each in sent))

    def test_disconnect_cuts_here(self) -> None:
        """After Disconnect the connection ends, with a FIN or a RST, and nothing after it is sent."""
        for api, reset, stream in itertools.product(PATHS, (False, True), (False, True)):
            parts = ["one", Disconnect(reset=reset), "two"]
            with self.subTest(name=api, reset=reset, stream=stream), FakeOpenAI(always(parts)) as server:
                with asking(server, api, stream=stream) as wire:
                    head = wire.until(b"\r\n\r\n")
                    with self.assertRaises(ConnectionResetError) if reset else contextlib.nullcontext():
                        while data := wire.sock.recv(65536):
                            wire.buffer += data
                self.assertNotIn(b"two", wire.buffer)
                self.assertNotIn(ENDS[api], wire.buffer)
                if stream:
                    self.assertIn(b"one", wire.buffer)
                else:
                    length = int(re.findall(rb"content-length: (\d+)", head)[0])
                    self.assertTrue(0 < len(wire.buffer) < length)

    def test_a_cut_response_is_stored_as_cancelled(self) -> None:
        """What was cut is no complete response, and can be asked for."""
        for stream in (True, False):
            answer = always(Reply("one", Disconnect(), id="resp_cut"))
            with self.subTest(stream=stream), FakeOpenAI(answer) as server:
                everything(server, "responses", stream=stream)
                status, end = "", time.monotonic() + WAIT  # its end comes before the server is done with it
                while status != "cancelled" and time.monotonic() < end:
                    status = get(server, "/responses/resp_cut").json["status"]
                self.assertEqual(status, "cancelled")

    def test_disconnect_first_sends_nothing(self) -> None:
        """An answer that begins with Disconnect is no byte at all."""
        for api, reset, stream in itertools.product(PATHS, (False, True), (False, True)):
            ending = self.assertRaises(ConnectionResetError) if reset else contextlib.nullcontext()
            handler = always(Disconnect(reset=reset))
            with (
                self.subTest(name=api, reset=reset, stream=stream),
                FakeOpenAI(handler) as server,
                ending,
                asking(server, api, stream=stream) as wire,
            ):
                self.assertEqual(wire.sock.recv(1), b"")

    def test_a_stream_error_ends_the_answer(self) -> None:
        """StreamError is the API's error event in a stream, and a 500 with its fields as JSON."""
        error = StreamError("Overloaded", type="overloaded_error", code="busy", param="p")
        fields = {"message": "Overloaded", "type": "overloaded_error", "param": "p", "code": "busy"}
        for api in PATHS:
            with self.subTest(name=api), FakeOpenAI(always(["one", error, "two"])) as server:
                answer = call(server, BODIES[api](stream=True))
                self.assertEqual(error_in(answer.body), fields)
                self.assertEqual(text_streamed(api, answer.events), "one")
                self.assertNotIn(ENDS[api], answer.body)
                whole = call(server, BODIES[api]())
                self.assertEqual((whole.status, whole.error), (500, fields))

    def test_acts_in_a_json_answer(self) -> None:
        """A JSON body may be slow, be other bytes, or have another content type."""
        slept: list[float] = []
        sleep = mock.patch.object(*_SLEEP, lambda waiter, seconds: slept.append(seconds))
        for api in PATHS:
            answers = (["one", Pause(7), "two"], Raw(b"{broken"), Reply("one", headers={"Content-Type": "text/html"}))
            with self.subTest(name=api), sleep, FakeOpenAI(Script(*untyped(answers))) as server:
                self.assertEqual(text_in(api, call(server, BODIES[api]()).json), "onetwo")
                self.assertEqual(call(server, BODIES[api]()).body, b"{broken")
                self.assertEqual(call(server, BODIES[api]()).headers["content-type"], "text/html")
        self.assertEqual(slept, [7, 7])

    def test_a_pause_comes_after_what_was_said(self) -> None:
        """What was said before a Pause is on the wire of a stream while it lasts."""
        for api in PATHS:
            parts = ["one", Pause(600), "two"]
            with self.subTest(name=api), FakeOpenAI(always(parts)) as server, asking(server, api, stream=True) as wire:
                wire.until(b"one")

    def test_a_json_answer_arrives_whole(self) -> None:
        """Nothing of it is on the wire while a Pause lasts, so that a client's own time limit works."""
        released, asked = threading.Event(), threading.Event()

        def sleep(waiter: Any, seconds: float) -> None:
            asked.set()
            released.wait(WAIT)

        with mock.patch.object(*_SLEEP, sleep):
            for api in PATHS:
                asked.clear()
                released.clear()
                with (
                    self.subTest(name=api),
                    FakeOpenAI(always(["one", Pause(600), "two"])) as server,
                    asking(server, api) as wire,
                ):
                    self.assertTrue(asked.wait(WAIT))
                    wire.sock.settimeout(0)
                    self.assertRaises(BlockingIOError, wire.sock.recv, 1)
                    wire.sock.settimeout(WAIT)
                    released.set()
                    self.assertIn("two", text_in(api, wire.answer().json))

    def test_stop_interrupts_every_wait(self) -> None:
        """stop() does not wait for a Pause, a slow token, a Stream or a coroutine, and cuts their answers."""

        async def later(request: Request) -> str:
            waits.set()
            await asyncio.sleep(600)
            return "never"

        def pausing(request: Request) -> Iterator[Any]:
            waits.set()
            yield Pause(600)

        def slow(request: Request) -> Any:
            waits.set()
            return Reply("one two", ttft=600)

        for handler, stream in itertools.product((later, pausing, slow), (False, True)):
            waits = threading.Event()
            with self.subTest(name=handler.__name__, stream=stream):
                server = FakeOpenAI(untyped(handler)).start()
                with asking(server, stream=stream) as wire:
                    self.assertTrue(waits.wait(WAIT))
                    with self.assertNoLogs("openai_fake", "WARNING"):  # that a thread still runs
                        server.stop()
                    self.assertEqual(wire.rest(), b"")


class PaceTest(unittest.TestCase):
    """ttft and itl, seen by what the server would have slept."""

    def slept(self, options: dict[str, float], reply: Reply, **request: Any) -> list[float]:
        """What was slept before an answer."""
        times: list[float] = []
        sleep = mock.patch.object(*_SLEEP, lambda waiter, seconds: times.append(seconds))
        with sleep, FakeOpenAI(always(reply), **untyped(options)) as server:
            for api in PATHS:
                self.assertEqual(call(server, BODIES[api](**request)).status, 200)
        self.assertEqual(times[: len(times) // 2], times[len(times) // 2 :])
        return times[: len(times) // 2]

    def test_a_stream_waits_before_each_token(self) -> None:
        """ttft before the first token, itl before each other; a Reply's own are in place of the server's."""
        pace = {"ttft": 5.0, "itl": 2.0}
        cases: dict[str, tuple[dict[str, float], Reply, list[float]]] = {
            "none": ({}, Reply("one two three"), []),
            "of the server": (pace, Reply("one two three"), [5, 2, 2]),
            "of the reply": ({}, Reply("one two three", ttft=5, itl=2), [5, 2, 2]),
            "both": (pace, Reply("one two three", ttft=3, itl=1), [3, 1, 1]),
            "half": (pace, Reply("one two three", itl=1), [5, 1, 1]),
            "none of the reply": (pace, Reply("one two three", ttft=0, itl=0), []),
            "over several parts": (pace, Reply("one two", ToolCall("f", "{}")), [5, 2, 2]),
        }
        for name, (options, reply, expected) in cases.items():
            with self.subTest(name=name):
                self.assertEqual(self.slept(options, reply, stream=True), expected)
                self.assertAlmostEqual(sum(self.slept(options, reply)), sum(expected))

    def test_nothing_is_sent_before_the_first_token(self) -> None:
        """With ttft, not even the head of a stream is on the wire before its time."""
        asks: list[Wire] = []
        readable: list[Any] = []

        def sleep(waiter: Any, seconds: float) -> None:
            readable.append(select.select([asks[-1].sock], [], [], 0)[0])

        with mock.patch.object(*_SLEEP, sleep), FakeOpenAI(ttft=5.0) as server:
            for api in PATHS:
                with Wire(server) as wire:
                    asks.append(wire)
                    wire.send(http_bytes(BODIES[api](stream=True), PATHS[api])).until(ENDS[api])
        self.assertEqual(readable, [[], []])


class Driven:
    """An async thing for synchronous code: what it gives is awaited, iterated and entered on a loop of the test's."""

    def __init__(self, thing: Any, run: Callable[[Any], Any]) -> None:
        self.thing, self.run = thing, run

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.thing, name)
        is_async = type(value).__module__.startswith("openai.resources") or inspect.ismethod(value) or callable(value)
        return Driven(value, self.run) if is_async else value

    def __call__(self, *values: Any, **options: Any) -> Any:
        result = self.thing(*values, **options)
        result = self.run(result) if inspect.isawaitable(result) else result
        return Driven(result, self.run) if hasattr(result, "__aiter__") or hasattr(result, "__aenter__") else result

    def __iter__(self) -> Iterator[Any]:
        iterator = aiter(self.thing)
        with contextlib.suppress(StopAsyncIteration):
            while True:
                yield self.run(anext(iterator))

    def __enter__(self) -> Any:
        return Driven(self.run(self.thing.__aenter__()), self.run)

    def __exit__(self, *error: Any) -> None:
        self.run(self.thing.__aexit__(*error))


ASKED_LIVE: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hi"}]}
ASKED_INPUT: dict[str, Any] = {"model": "gpt-4o", "input": "Hi"}
ASK: dict[str, Callable[[Any], Any]] = {
    "chat.completions": lambda client: client.chat.completions.create(**ASKED_LIVE).choices[0].message.content,
    "responses": lambda client: client.responses.create(**ASKED_INPUT).output_text,
}
OPEN: dict[str, Callable[[Any], Any]] = {
    "chat.completions": lambda client: client.chat.completions.create(**ASKED_LIVE, stream=True),
    "responses": lambda client: client.responses.create(**ASKED_INPUT, stream=True),
}
TEXT: dict[str, Callable[[Any], str]] = {
    "chat.completions": lambda event: (event.choices[0].delta.content or "") if event.choices else "",
    "responses": lambda event: event.delta if event.type == "response.output_text.delta" else "",
}


def city_model() -> Any:
    """What users ask for as structured output."""
    from pydantic import create_model

    return create_model("City", name=(str, ...))


def overloaded() -> APIError:
    return APIError(503, "The server is overloaded or not ready yet.", headers={"retry-after-ms": "1"})


def chat_agent(client: Any) -> Any:
    """Runs tools until none is called, as users write it; a tool's output is its name and arguments."""
    messages: list[Any] = [{"role": "user", "content": "How warm is it?"}]
    while True:
        message = client.chat.completions.create(model="gpt-4o", messages=messages).choices[0].message
        if not message.tool_calls:
            return message.content
        messages.append(message)
        for call in message.tool_calls:
            said = call.function.name + call.function.arguments
            messages.append({"role": "tool", "tool_call_id": call.id, "content": said})


def responses_agent(client: Any) -> Any:
    """The same in the Responses API."""
    items: list[Any] = [{"role": "user", "content": "How warm is it?"}]
    while True:
        answer = client.responses.create(model="gpt-4o", input=items)
        calls = [item for item in answer.output if item.type == "function_call"]
        if not calls:
            return answer.output_text
        items += answer.output
        for call in calls:
            said = call.name + call.arguments
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": said})


def with_each_client(test: Callable[[Any, str, Any], None]) -> Callable[[Any], None]:
    """A test for both APIs and both official clients; it gets the API, and a function that connects a client."""

    @functools.wraps(test)
    def tests(self: Any) -> None:
        for kind, api in itertools.product(("sync", "async"), PATHS):
            with self.subTest(name=kind, api=api), contextlib.ExitStack() as stack:
                test(self, api, functools.partial(self.connected, stack, kind))

    return tests


@needs_openai
class OfficialClientTest(unittest.TestCase):
    """The official client, sync and async, in both APIs, takes everything for the real thing."""

    def connected(self, stack: contextlib.ExitStack, kind: str, handler: Any, retries: int = 0, **options: Any) -> Any:
        """A fake, and a client of it, until the end of the subtest."""
        import openai

        server = stack.enter_context(FakeOpenAI(handler, **options))
        settings: dict[str, Any] = {"base_url": server.base_url, "api_key": "test", "timeout": WAIT}
        settings["max_retries"] = retries
        if kind == "sync":
            client: Any = openai.OpenAI(http_client=openai.DefaultHttpxClient(verify=NO_TLS), **settings)
        else:
            loop = asyncio.new_event_loop()
            stack.callback(loop.close)
            stack.callback(lambda: loop.run_until_complete(loop.shutdown_asyncgens()))
            http = openai.DefaultAsyncHttpxClient(verify=NO_TLS)
            client = Driven(openai.AsyncOpenAI(http_client=http, **settings), loop.run_until_complete)
        stack.callback(client.close)
        return server, client

    @with_each_client
    def test_create(self, api: str, connect: Any) -> None:
        """create() gives the answer, with its usage, its request id, and a Reply's headers beside it."""
        _, client = connect(always(Reply("Hello ", "you", Usage(7, 5), headers={"x-own": "yes"})))
        self.assertEqual(ASK[api](client), "Hello you")
        if api == "chat.completions":
            raw = client.chat.completions.with_raw_response.create(**ASKED_LIVE)
        else:
            raw = client.responses.with_raw_response.create(**ASKED_INPUT)
        answer = raw.parse()
        self.assertEqual((answer.usage.total_tokens, raw.headers["x-own"]), (12, "yes"))
        self.assertRegex(answer._request_id, "^req_[0-9a-f]{32}$")
        self.assertEqual((raw.request_id, raw.headers["x-request-id"]), (answer._request_id, answer._request_id))

    @with_each_client
    def test_create_streaming(self, api: str, connect: Any) -> None:
        """create(stream=True) gives the deltas of the answer."""
        _, client = connect(always("Hello you there"))
        deltas = [text for event in OPEN[api](client) if (text := TEXT[api](event))]
        self.assertEqual(deltas, ["Hello", " you", " there"])

    @with_each_client
    def test_stream_helper(self, api: str, connect: Any) -> None:
        """.stream() accumulates text and tool calls into a final answer, and parses it."""
        city = city_model()
        _, client = connect(Script('{"name": "Paris"}', [Text("Let me see."), ToolCall("f", {"x": 1})]))
        if api == "chat.completions":
            with client.chat.completions.stream(**ASKED_LIVE, response_format=city) as stream:
                self.assertIn("content.delta", [event.type for event in stream])
                self.assertEqual(stream.get_final_completion().choices[0].message.parsed, city(name="Paris"))
            with client.chat.completions.stream(**ASKED_LIVE) as stream:
                message = stream.get_final_completion().choices[0].message
            self.assertEqual((message.content, message.tool_calls[0].function.arguments), ("Let me see.", '{"x":1}'))
            return
        with client.responses.stream(**ASKED_INPUT, text_format=city) as stream:
            self.assertIn("response.output_text.delta", [event.type for event in stream])
            self.assertEqual(stream.get_final_response().output_parsed, city(name="Paris"))
        with client.responses.stream(**ASKED_INPUT) as stream:
            answer = stream.get_final_response()
        self.assertEqual((answer.output_text, answer.output[1].arguments), ("Let me see.", '{"x":1}'))

    @with_each_client
    def test_parse(self, api: str, connect: Any) -> None:
        """.parse() asks for a schema and gets its object."""
        city = city_model()
        server, client = connect(always('{"name": "Paris"}'))
        if api == "chat.completions":
            parsed = client.chat.completions.parse(**ASKED_LIVE, response_format=city).choices[0].message.parsed
        else:
            parsed = client.responses.parse(**ASKED_INPUT, text_format=city).output_parsed
        self.assertEqual(parsed, city(name="Paris"))
        key = "response_format" if api == "chat.completions" else "text"
        self.assertIn("City", json.dumps(server.requests[0].options[key]))

    @with_each_client
    def test_a_tool_loop_of_two_rounds(self, api: str, connect: Any) -> None:
        """A caller that runs tools until none is called sees two rounds of calls, then the answer."""
        first = [ToolCall("celsius", city) for city in ("(Paris)", "(Rome)")]
        last: Callable[[Request], str] = lambda request: request.messages[-1].text  # noqa: E731
        server, client = connect(Script(first, ToolCall("mean", "(21, 23)"), last))
        agent = chat_agent if api == "chat.completions" else responses_agent
        self.assertEqual(agent(client), "mean(21, 23)")
        said = [[message.text for message in request.messages if message.role == "tool"] for request in server.requests]
        rounds = [["celsius(Paris)", "celsius(Rome)"], ["mean(21, 23)"]]
        self.assertEqual(said, [[], rounds[0], rounds[0] + rounds[1]])

    @with_each_client
    def test_retries(self, api: str, connect: Any) -> None:
        """429, 503, then success: the client retries as told, and the fake sees it count."""
        server, client = connect(Script(rate_limit(0.001), overloaded(), "At last"), retries=2)
        self.assertEqual(ASK[api](client), "At last")
        counts = [request.headers["x-stainless-retry-count"] for request in server.requests]
        self.assertEqual(counts, ["0", "1", "2"])

    @with_each_client
    def test_errors(self, api: str, connect: Any) -> None:
        """Each status is the exception of the client that it is for the real API, with type, code and param."""
        import openai

        kinds: dict[int, type[openai.APIStatusError]] = {
            400: openai.BadRequestError,
            401: openai.AuthenticationError,
            403: openai.PermissionDeniedError,
            404: openai.NotFoundError,
            409: openai.ConflictError,
            422: openai.UnprocessableEntityError,
            429: openai.RateLimitError,
            500: openai.InternalServerError,
            503: openai.InternalServerError,
            529: openai.InternalServerError,
        }
        _, client = connect(Script(*(APIError(status, "No.", type="t", code="c", param="p") for status in kinds)))
        for status, kind in kinds.items():
            with self.assertRaises(kind) as raised:
                ASK[api](client)
            error = raised.exception
            self.assertEqual((error.status_code, error.type, error.code, error.param), (status, "t", "c", "p"))

    @with_each_client
    def test_a_failing_fake_is_not_retried(self, api: str, connect: Any) -> None:
        """A client that would retry gives up at once where the handler failed."""
        import openai

        server, client = connect(a_broken_handler, retries=1)
        for ask in (ASK, OPEN):
            with self.assertRaisesRegex(openai.InternalServerError, "handler raised ZeroDivisionError"):
                ask[api](client)
        self.assertEqual(len(server.requests), 2)
        server.errors.clear()

    @with_each_client
    def test_errors_inside_a_stream(self, api: str, connect: Any) -> None:
        """An error after the head raises APIError in the client, after the text before it."""
        import openai

        def broken(request: Request) -> Iterator[str]:
            yield "one"
            raise KeyError("gone")

        failed = Stream()
        failed.send("one")
        failed.fail(rate_limit())
        server, client = connect(Script(["one", StreamError("Overloaded")], failed, broken))
        for words in ("Overloaded", "Rate limit reached", "handler raised KeyError"):
            text = ""
            with self.assertRaisesRegex(openai.APIError, words):
                for event in OPEN[api](client):
                    text += TEXT[api](event)
            self.assertEqual(text, "one")
        server.errors.clear()

    @with_each_client
    def test_refusal(self, api: str, connect: Any) -> None:
        """A refusal is in the place where the client looks for it."""
        _, client = connect(always(Refusal("I won't.")))
        if api == "chat.completions":
            message = client.chat.completions.create(**ASKED_LIVE).choices[0].message
            self.assertEqual((message.content, message.refusal), (None, "I won't."))
        else:
            content = client.responses.create(**ASKED_INPUT).output[0].content[0]
            self.assertEqual((content.type, content.refusal), ("refusal", "I won't."))

    @with_each_client
    def test_length(self, api: str, connect: Any) -> None:
        """An answer that is cut by its length is LengthFinishReasonError in chat, and incomplete in Responses."""
        import openai

        _, client = connect(always(['{"na', Finish("length")]))
        if api == "chat.completions":
            with self.assertRaises(openai.LengthFinishReasonError):
                client.chat.completions.parse(**ASKED_LIVE, response_format=city_model())
            with (
                self.assertRaises(openai.LengthFinishReasonError),
                client.chat.completions.stream(**ASKED_LIVE) as stream,
            ):
                stream.get_final_completion()
        else:
            answer = client.responses.create(**ASKED_INPUT)
            self.assertEqual((answer.status, answer.incomplete_details.reason), ("incomplete", "max_output_tokens"))
            self.assertEqual([event.type for event in OPEN[api](client)][-1], "response.incomplete")

    @with_each_client
    def test_choices_and_logprobs(self, api: str, connect: Any) -> None:
        """n choices come where n are asked for, and the logprobs of each token where they are."""
        _, client = connect(always("Hello you"))
        if api == "chat.completions":
            choices = client.chat.completions.create(**ASKED_LIVE, n=3, logprobs=True, top_logprobs=1).choices
            self.assertEqual([choice.message.content for choice in choices], ["Hello you"] * 3)
            logprobs = choices[2].logprobs.content
        else:
            include = ["message.output_text.logprobs"]
            answer = client.responses.create(**ASKED_INPUT, include=include, top_logprobs=1)
            logprobs = answer.output[0].content[0].logprobs
        self.assertEqual("".join(entry.token for entry in logprobs), "Hello you")
        self.assertTrue(all(entry.logprob <= 0 for entry in logprobs))

    @with_each_client
    def test_a_live_stream(self, api: str, connect: Any) -> None:
        """On one thread: the test sends a part, the client reads it, until the client leaves."""
        stream = Stream()
        server, client = connect(always(stream))
        opened = OPEN[api](client)
        texts = (text for event in opened if (text := TEXT[api](event)))
        for word in ("one", "two"):
            stream.send(word)
            self.assertEqual(next(texts), word)
        self.assertEqual(server.in_flight, [stream.request])
        opened.close()
        self.assertTrue(stream.wait_disconnected(WAIT))
        self.assertFalse(stream.send("three"))

    @with_each_client
    def test_wire_acts(self, api: str, connect: Any) -> None:
        """The client reads over comments, line ends and split characters, and sees what is broken as broken."""
        import openai

        events = {
            "chat.completions": {"choices": [{"index": 0, "delta": {"content": "é"}}]},
            "responses": {"type": "response.output_text.delta", "delta": "é"},
        }
        frame = f"data: {json.dumps(events[api], ensure_ascii=False)}\n\n".encode()
        whole: dict[str, list[Raw]] = {
            "byte by byte": [Raw(bytes([byte])) for byte in frame],
            "CRLF and a comment": [Raw(b": hello\r\n\r\n" + frame.replace(b"\n", b"\r\n"))],
            "several in one write": [Raw(frame * 2)],
        }
        cuts: list[Any] = [["one", Disconnect()], ["one", Disconnect(reset=True)], Raw(b"data: {broken\n\n")]
        _, client = connect(Script(*whole.values(), *cuts, Disconnect(), Disconnect(reset=True)))
        for name in whole:
            text = "".join(map(TEXT[api], OPEN[api](client)))
            self.assertEqual(text, "éé" if name.startswith("several") else "é")
        for expected in (Exception, Exception, json.JSONDecodeError):
            with self.assertRaises(expected):
                list(OPEN[api](client))
        for _ in range(2):
            with self.assertRaises(openai.APIConnectionError):
                ASK[api](client)

    @with_each_client
    def test_a_slow_answer_times_out(self, api: str, connect: Any) -> None:
        """A client that runs out of patience has left: its error is a timeout, and the answer ends."""
        import openai

        ended = threading.Event()

        def handler(request: Request) -> Iterator[Any]:
            try:
                yield Pause(600)
            finally:
                ended.set()

        _, client = connect(handler)
        with self.assertRaises(openai.APITimeoutError):
            OPEN[api](client.with_options(timeout=openai.Timeout(WAIT, read=0.05)))
        self.assertTrue(ended.wait(WAIT))

    @with_each_client
    def test_after_stop(self, api: str, connect: Any) -> None:
        """A stopped fake is a connection error."""
        import openai

        server, client = connect(echo)
        self.assertEqual(ASK[api](client), "Hi")
        server.stop()
        with self.assertRaises(openai.APIConnectionError):
            ASK[api](client)

    @with_each_client
    def test_models(self, api: str, connect: Any) -> None:
        """models.list() gives what the fake has, by default and by its option."""
        _, client = connect(echo)
        self.assertIn("gpt-4o", [model.id for model in client.models.list()])
        _, client = connect(echo, models=["mine", "yours"])
        self.assertEqual([model.id for model in client.models.list()], ["mine", "yours"])
        self.assertEqual(client.models.retrieve("mine").id, "mine")


@needs_openai
class AsyncTest(unittest.IsolatedAsyncioTestCase):
    """The async client in an event loop that the fake shares with nobody."""

    async def asyncSetUp(self) -> None:
        import openai

        self.streams = [Stream() for _ in range(3)]
        self.server = start(self, lambda request: self.streams[int(request.text)])
        self.client = openai.AsyncOpenAI(base_url=self.server.base_url, api_key="test", max_retries=0, timeout=WAIT)
        self.addAsyncCleanup(self.client.close)

    async def read(self, number: int) -> str:
        stream = await self.client.responses.create(model="gpt-4o", input=str(number), stream=True)
        return "".join([TEXT["responses"](event) async for event in stream])

    async def test_tasks_are_released_in_any_order(self) -> None:
        """Tasks that read at once end in the order in which the test closes their Streams."""
        tasks = [asyncio.create_task(self.read(number)) for number in range(3)]
        ended: list[str] = []
        for number in (2, 0, 1):
            self.streams[number].send(f"to {number}")
            self.streams[number].close()
            ended.append(await asyncio.wait_for(tasks[number], WAIT))
            self.assertEqual(sum(task.done() for task in tasks), len(ended))
        self.assertEqual(ended, ["to 2", "to 0", "to 1"])

    async def test_a_cancelled_task_has_left(self) -> None:
        """Cancelling the task that reads is a client that leaves."""
        task = asyncio.create_task(self.read(0))
        await asyncio.to_thread(self.streams[0].wait_request, WAIT)
        self.streams[0].send("one")
        task.cancel()
        self.assertTrue(await asyncio.to_thread(self.streams[0].wait_disconnected, WAIT))
        self.assertTrue(task.done())


# ---- HTTP: WebSocket -------------------------------------------------------------------------------------------------

MASK = b"\x37\xfa\x21\x3d"
TEXT_FRAME, BINARY_FRAME, CLOSE_FRAME, PING_FRAME, PONG_FRAME = 1, 2, 8, 9, 10
HANDSHAKE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}


def handshake(path: str = "/v1/responses", **changes: str | None) -> bytes:
    """The bytes that open a WebSocket; None leaves a field out."""
    fields = {**HANDSHAKE, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return got(path, *(f"{name}: {value}" for name, value in fields.items() if value is not None))


def client_frame(opcode: int, data: bytes = b"", final: int = 1, mask: bytes = MASK) -> bytes:
    """A frame as a client sends it."""
    size = len(data)
    rest = struct.pack("!H", size) if size < 1 << 16 else struct.pack("!Q", size)
    length = bytes([128 | size]) if size < 126 else bytes([254 if size < 1 << 16 else 255]) + rest
    masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data)) if mask != b"\0\0\0\0" else data
    return bytes([final << 7 | opcode]) + length + mask + masked


class Socket(Wire):
    """A raw WebSocket to a fake."""

    def __init__(self, server: FakeOpenAI, behind: bytes = b"", **changes: Any) -> None:
        super().__init__(server)
        self.send(handshake(**changes) + behind)
        self.head = self.until(b"\r\n\r\n")

    def __enter__(self) -> Socket:
        return self

    def say(self, event: Any) -> Socket:
        self.send(client_frame(TEXT_FRAME, json.dumps(event).encode()))
        return self

    def create(self, text: Any = "Hi", **options: Any) -> Socket:
        return self.say({"type": "response.create", **responses(text, **options)})

    def frame(self) -> tuple[int, bytes]:
        """Opcode and data of the next frame; (0, b"") at the end of the connection."""
        head = self.exactly(2)
        if len(head) < 2:
            return 0, b""
        size = head[1] if head[1] < 126 else int.from_bytes(self.exactly(2 if head[1] == 126 else 8), "big")
        return head[0] & 15, self.exactly(size)

    def event(self) -> Any:
        opcode, data = self.frame()
        if opcode != TEXT_FRAME:
            raise AssertionError(f"expected an event, not {opcode} {data!r}")
        return json.loads(data)

    def events(self, lane: str | None = None) -> list[Any]:
        """The events of a lane, to the end of its response; those of others are dropped."""
        events: list[Any] = []
        while not events or events[-1]["type"] not in ("response.completed", "response.failed", "error"):
            event = self.event()
            events += [event] if event.get("stream_id") == lane else []
        return events

    def closed(self) -> tuple[int, bytes]:
        """The code of the Close that comes next, and all that follows it."""
        opcode, data = self.frame()
        if opcode != CLOSE_FRAME:
            raise AssertionError(f"expected a Close, not {opcode} {data!r}")
        return int.from_bytes(data[:2], "big"), self.rest()


def call_seeded(answer: Any) -> list[Any]:
    """The events of this answer as an SSE stream, of a fake whose ids and clock are the same each time."""
    return seeded("responses", answer, stream=True).events


def said_in(event: Any) -> str:
    return "".join(part["text"] for item in event["response"]["output"] for part in item["content"])


HALVES = client_frame(TEXT_FRAME, b"Hel", 0), client_frame(0, b"lo")
# Bytes of a client, and what they are: opcodes and data, then the code of the Close if they are wrong.
FRAMES: dict[str, tuple[bytes, list[tuple[int, bytes]], int | None]] = {
    "text": (client_frame(TEXT_FRAME, "é".encode()), [(1, "é".encode())], None),
    "of 126": (client_frame(TEXT_FRAME, b"x" * 126), [(1, b"x" * 126)], None),
    "of 70,000": (client_frame(BINARY_FRAME, b"\xff" * 70_000), [(2, b"\xff" * 70_000)], None),
    "empty": (client_frame(TEXT_FRAME), [(1, b"")], None),
    "in two": (HALVES[0] + HALVES[1], [(1, b"Hello")], None),
    "with an empty end": (HALVES[0] + client_frame(0, b""), [(1, b"Hel")], None),
    "ping between": (HALVES[0] + client_frame(PING_FRAME, b"?") + HALVES[1], [(9, b"?"), (1, b"Hello")], None),
    "character in two": (client_frame(TEXT_FRAME, b"\xc3", 0) + client_frame(0, b"\xa9"), [(1, "é".encode())], None),
    "pong": (client_frame(PONG_FRAME, b"\xff"), [(10, b"\xff")], None),
    "close": (client_frame(CLOSE_FRAME, b"\x03\xe8bye"), [(8, b"\x03\xe8bye")], None),
    "close without a code": (client_frame(CLOSE_FRAME), [(8, b"")], None),
    "close of an application": (client_frame(CLOSE_FRAME, b"\x0f\xa0"), [(8, b"\x0f\xa0")], None),
    "unmasked": (b"\x81\x02Hi", [], 1002),
    **{f"reserved bit {bit:x}": (bytes([0x81 | bit, 0x80]) + MASK, [], 1002) for bit in (0x10, 0x20, 0x40)},
    **{f"opcode {opcode}": (client_frame(opcode), [], 1002) for opcode in (3, 7, 11, 15)},
    "fragmented ping": (client_frame(PING_FRAME, b"", 0), [], 1002),
    "long ping": (client_frame(PING_FRAME, b"x" * 126), [], 1002),
    "continuation of nothing": (HALVES[1], [], 1002),
    "continuation of what has ended": (HALVES[0] + HALVES[1] * 2, [(1, b"Hello")], 1002),
    "message inside another": (HALVES[0] * 2, [], 1002),
    "top bit": (b"\x81\xff\x80" + b"\0" * 7, [], 1002),
    "too long": (b"\x81\xff" + struct.pack("!Q", openai_fake._MAX_BODY + 1), [], 1009),
    "too long together": (HALVES[0] + b"\x80\xff" + struct.pack("!Q", openai_fake._MAX_BODY - 2), [], 1009),
    "not UTF-8": (client_frame(TEXT_FRAME, b"\xff"), [], 1007),
    "surrogate": (client_frame(TEXT_FRAME, b"\xed\xa0\x80"), [], 1007),
    "close not UTF-8": (client_frame(CLOSE_FRAME, b"\x03\xe8\xff"), [], 1007),
    "close of one byte": (client_frame(CLOSE_FRAME, b"\x03"), [], 1002),
    **{
        f"close {code}": (client_frame(CLOSE_FRAME, code.to_bytes(2, "big")), [], 1002)
        for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000)
    },
}


class FrameReaderTest(unittest.TestCase):
    """The reader of frames, which sees no socket."""

    @staticmethod
    def read(*pieces: bytes) -> tuple[list[tuple[int, bytes]], int | None]:
        """The messages, and the code of the Close that answers what is wrong."""
        inbox, messages, rest = openai_fake._Inbox(), list[tuple[int, bytes]](), list(pieces)
        try:
            for step in openai_fake._read_messages(inbox):
                if isinstance(step, tuple):
                    messages.append(step)
                elif not rest:
                    return messages, None
                else:
                    inbox.data += rest.pop(0)
        except openai_fake._Closing as closing:
            return messages, int.from_bytes(closing.frame[2:4], "big")
        raise AssertionError("the reader ended by itself")

    def test_frames(self) -> None:
        """What is right is read, what is wrong has its code, and bytes that come one by one are the same."""
        for name, (data, messages, code) in FRAMES.items():
            with self.subTest(name=name):
                self.assertEqual(self.read(data), (messages, code))
                step = len(data) // 1_000 + 1
                self.assertEqual(
                    self.read(*(data[at : at + step] for at in range(0, len(data), step))), (messages, code)
                )

    @needs_websockets
    def test_second_opinion(self) -> None:
        """The websockets package reads the same, and takes the frames of the server for right."""
        from websockets.frames import Frame
        from websockets.protocol import Protocol, Side

        for name, (data, messages, code) in FRAMES.items():
            with self.subTest(name=name):
                other = Protocol(Side.SERVER, max_size=openai_fake._MAX_BODY)
                other.receive_data(data)
                frames = [event for event in other.events_received() if isinstance(event, Frame)]
                if code is None:
                    self.assertEqual(
                        b"".join(frame.data for frame in frames if frame.opcode in (0, 1, 2)),
                        b"".join(data for opcode, data in messages if opcode in (1, 2)),
                    )
                elif (
                    code != 1007 and name != "top bit"
                ):  # its checks of text are above, and such a length is just too big
                    self.assertEqual(other.close_sent.code if other.close_sent else None, code)
        for size in (0, 125, 126, 65535, 65536):
            reader = Protocol(Side.CLIENT, max_size=None)
            reader.receive_data(openai_fake._frame(TEXT_FRAME, b"x" * size))
            self.assertEqual([len(event.data) for event in reader.events_received()], [size])  # type: ignore[union-attr]


class HandshakeTest(LeakTest):
    """What opens a WebSocket, and what does not."""

    def test_accepted(self) -> None:
        """The accept value is RFC 6455's, fields are in any case and list, in every form of the path."""
        rows: dict[str, dict[str, Any]] = {
            "plain": {},
            "cases": {"Upgrade": "WebSocket", "Connection": "keep-alive, UPGRADE"},
            "lists": {"Upgrade": "foo,  websocket", "Sec_WebSocket_Extensions": "permessage-deflate"},
            "root": {"path": "/responses"},
            "query": {"path": "/v1/responses?a=b"},
            "Azure": {"path": "/openai/v1/responses"},
        }
        with FakeOpenAI() as server:
            for name, changes in rows.items():
                with self.subTest(name=name), Socket(server, **changes) as sock:
                    self.assertTrue(sock.head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n"), sock.head)
                    self.assertIn(b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n", sock.head)
                    self.assertNotIn(b"extensions", sock.head)
                    self.assertEqual(said_in(sock.create("Hi").events()[-1]), "Hi")

    def test_refused(self) -> None:
        """Anything else is 426, on a connection that stays open; so is an upgrade to another path."""
        rows: dict[str, bytes] = {
            "plain GET": got("/v1/responses"),
            "HEAD": got("/v1/responses", method="HEAD"),
            "version": handshake(Sec_WebSocket_Version="8"),
            "no version": handshake(Sec_WebSocket_Version=None),
            "no key": handshake(Sec_WebSocket_Key=None),
            "short key": handshake(Sec_WebSocket_Key="dGhlIHNhbXBsZQ=="),
            "no upgrade": handshake(Upgrade=None),
            "another upgrade": handshake(Upgrade="h2c"),
            "no connection": handshake(Connection="keep-alive"),
            "another path": handshake("/v1/chat/completions"),
            "a path that is not": handshake("/v1/realtime"),
        }
        with FakeOpenAI() as server:
            for name, data in rows.items():
                with self.subTest(name=name), Wire(server) as wire:
                    wire.send(data)
                    if name == "HEAD":
                        self.assertIn(b" 426 ", wire.until(b"\r\n\r\n"))
                    else:
                        answer = wire.answer()
                        self.assertEqual((answer.status, answer.headers["upgrade"]), (426, "websocket"))
                        self.assertEqual(answer.headers["sec-websocket-version"], "13")
                        self.assert_error(answer)
                    self.assertEqual(wire.send(got()).answer().status, 200)
            self.assertEqual(len(server.requests), 2 * len(rows))

    def test_another_protocol_is_let_be(self) -> None:
        """Who offers h2c, as curl does, is answered in HTTP/1.1."""
        with FakeOpenAI() as server, Wire(server) as wire:
            data = got("/v1/models", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c")
            self.assertEqual(wire.send(data).answer().status, 200)

    def test_key(self) -> None:
        """The key is checked before anything is opened."""
        with FakeOpenAI(api_key="sk-right") as server:
            with Wire(server) as wire:
                self.assertEqual(wire.send(handshake()).answer().status, 401)
            with Socket(server, Authorization="Bearer sk-right") as sock:
                self.assertEqual(said_in(sock.create().events()[-1]), "Hi")


class WebSocketTest(LeakTest):
    """Responses over a WebSocket."""

    def test_events_are_those_of_a_stream(self) -> None:
        """Every kind of answer gives the events of the SSE stream, as bare JSON; a lane's have its name."""
        for name, answer in {**SPOKEN, "error": ["a", StreamError("no")], "every item": EVERY_ITEM}.items():
            expected = call_seeded(answer)
            for lane in (None, "a-1"):
                with (
                    self.subTest(name=name, lane=lane),
                    FakeOpenAI(always(answer), seed=7, clock=lambda: CLOCK) as server,
                ):
                    with Socket(server) as sock:
                        sock.create(**({"stream_id": lane} if lane else {}))
                        events = [sock.event() for _ in expected]
                    self.assertEqual({event.pop("stream_id", None) for event in events}, {lane})
                    self.assertEqual(events, expected)

    def test_creates_are_requests(self) -> None:
        """The journal and the handler see each create as the POST of a stream, and nothing else."""
        with FakeOpenAI(strict=True) as server, Socket(server) as sock:
            sock.create("one", stream_id="a", instructions="Be.", stream_options={"include_obfuscation": False}).events(
                "a"
            )
            sock.create("", input=5).events()
            [request, refused] = server.requests
            self.assertEqual(
                (request.api, request.path, request.text, request.stream), ("responses", "/v1/responses", "one", True)
            )
            self.assertEqual(json.loads(request.raw_body)["instructions"], "Be.")
            self.assertEqual([*request.options], ["instructions", "stream_options"])
            self.assertEqual((refused._status, server.in_flight, server.wait_for_requests(2)[1]), (400, [], refused))

    def test_what_comes_with_the_handshake_is_read(self) -> None:
        """A client need not wait for the 101."""
        frame = client_frame(TEXT_FRAME, json.dumps({"type": "response.create", **responses("early")}).encode())
        with FakeOpenAI() as server, Socket(server, frame) as sock:
            self.assertEqual(said_in(sock.events()[-1]), "early")

    def test_errors(self) -> None:
        """What is wrong with a message is an error event with its status, and the connection goes on."""

        def handler(request: Request) -> Any:
            if request.text == "limit":
                return rate_limit()
            if request.text == "generator":
                return (1 // len(part) for part in [""])
            raise ValueError("oops")

        create: dict[str, Any] = {"type": "response.create", **responses()}
        rows: dict[str, tuple[bytes, int, Any, Any]] = {
            "no JSON": (client_frame(TEXT_FRAME, b"{"), 400, None, None),
            "no object": (client_frame(TEXT_FRAME, b"[]"), 400, None, None),
            "too deep": (client_frame(TEXT_FRAME, DEEP), 400, None, None),
            "binary": (client_frame(BINARY_FRAME, b"{}"), 400, None, None),
            **{
                name: (client_frame(TEXT_FRAME, json.dumps(event).encode()), status, code, param)
                for name, event, status, code, param in (
                    ("no type", {}, 400, "invalid_value", "type"),
                    ("type", {"type": ["response.create"]}, 400, "invalid_value", "type"),
                    (
                        "no input",
                        {"type": "response.create", "model": "gpt-4o"},
                        400,
                        "missing_required_parameter",
                        "input",
                    ),
                    ("background", {**create, "background": True}, 400, "unsupported_parameter", "background"),
                    ("lane", {**create, "stream_id": "a b"}, 400, "invalid_stream_id", "stream_id"),
                    ("empty lane", {**create, "stream_id": ""}, 400, "invalid_stream_id", "stream_id"),
                    ("lane of a list", {**create, "stream_id": ["a"]}, 400, "invalid_stream_id", "stream_id"),
                    ("long lane", {**create, "stream_id": "a" * 257}, 400, "invalid_stream_id", "stream_id"),
                    (
                        "previous",
                        {**create, "previous_response_id": "resp_x"},
                        400,
                        "previous_response_not_found",
                        "previous_response_id",
                    ),
                    ("limit", {**create, "input": "limit"}, 429, "rate_limit_exceeded", None),
                    ("handler", {**create, "stream_id": "a" * 256}, 500, None, None),
                    ("generator, before it says anything", {**create, "input": "generator"}, 500, None, None),
                )
            },
        }
        with forgiven(handler) as server, Socket(server) as sock:
            for name, (frame, status, code, param) in rows.items():
                with self.subTest(name=name):
                    sock.send(frame)
                    event = sock.event()
                    found = (event["type"], event["status"], event["error"]["code"], event["error"]["param"])
                    self.assertEqual(found, ("error", status, code, param))
                    self.assertEqual(set(event["error"]) - {"headers"}, {"type", "code", "message", "param"})
                    if name == "limit":
                        self.assertEqual(event["error"]["headers"]["retry-after-ms"], "20")
            self.assertEqual(len(server.errors), 2)

    def test_a_fault_in_the_middle_ends_its_response_only(self) -> None:
        """A handler that raises late fails its response in the API's way; other lanes, and the connection, go on."""
        stream = Stream()

        def handler(request: Request) -> Any:
            return stream if request.text == "live" else broken()

        def broken() -> Iterator[Any]:
            yield "Hel"
            raise ValueError("oops")

        with forgiven(handler) as server, Socket(server) as sock:
            sock.create("live", stream_id="live")
            stream.send("a")
            self.assertEqual([event["type"] for event in sock.create("b").events()][-1], "error")
            self.assertEqual(sock.event()["type"], "response.failed")
            stream.close()
            self.assertEqual(said_in(sock.events("live")[-1]), "a")

    def test_memory(self) -> None:
        """A connection goes on with its own responses, stored or not; others only with what is stored."""
        with FakeOpenAI(lambda request: f"{len(request.messages)}") as server, Socket(server) as sock:
            first = sock.create(store=False).events()[-1]["response"]["id"]
            second = sock.create(store=False, previous_response_id=first, stream_id="b").events("b")[-1]
            self.assertEqual(said_in(second), "3")
            self.assertEqual(get(server, f"/responses/{first}").status, 404)
            self.assertEqual(call(server, responses(previous_response_id=first)).status, 400)
            with Socket(server) as other:
                self.assertEqual(
                    other.create(previous_response_id=first).event()["error"]["code"], "previous_response_not_found"
                )
            stored = call(server, responses()).json["id"]
            self.assertEqual(said_in(sock.create(previous_response_id=stored).events()[-1]), "3")

    def test_a_failed_continuation_forgets_its_parent(self) -> None:
        """An error on the parent's own lane takes it from the connection's memory; one of a fork does not."""
        fail = {"text": {"format": {"type": "x"}}}
        for name, options, stored, found in (
            ("same lane", fail, False, False),
            ("same lane, stored", fail, True, True),
            ("fork", {**fail, "stream_id": "b"}, False, True),
        ):
            with self.subTest(name=name), FakeOpenAI() as server, Socket(server) as sock:
                id = sock.create(store=stored).events()[-1]["response"]["id"]
                sock.create(previous_response_id=id, **options)
                self.assertEqual(sock.event()["type"], "error")
                self.assertEqual(sock.create(previous_response_id=id).events()[-1]["type"] != "error", found)

    def test_memory_is_bounded(self) -> None:
        """`keep` is also what a connection remembers."""
        with FakeOpenAI(keep=2) as server, Socket(server) as sock:
            ids = [sock.create(store=False).events()[-1]["response"]["id"] for _ in range(3)]
            kept = [sock.create(previous_response_id=id, store=False).events()[-1]["type"] for id in (ids[0], ids[2])]
            self.assertEqual(kept, ["error", "response.completed"])

    def test_warm_up(self) -> None:
        """`generate: false` asks no handler, says nothing, and can be gone on with."""
        with FakeOpenAI(Script(lambda request: f"{len(request.messages)}")) as server, Socket(server) as sock:
            events = sock.create("Listen", generate=False).events()
            self.assertEqual([event["type"][9:] for event in events], ["created", "in_progress", "completed"])
            response = events[-1]["response"]
            self.assertEqual((response["output"], response["usage"]["output_tokens"]), ([], 0))
            self.assertEqual(said_in(sock.create(previous_response_id=response["id"]).events()[-1]), "2")

    def test_a_lane_is_first_in_first_out(self) -> None:
        """A create waits for the one before it on its lane, and for none on another."""
        streams = {name: Stream() for name in ("a1", "a2", "b1")}
        with FakeOpenAI(lambda request: streams[request.text]) as server, Socket(server) as sock:
            for name in streams:
                sock.create(name, stream_id=name[0])
            streams["b1"].wait_request(WAIT)
            self.assertEqual((len(server.wait_for_requests(3, WAIT)), streams["a2"].request), (3, None))
            streams["b1"].send("B")
            streams["b1"].close()
            self.assertEqual(said_in(sock.events("b")[-1]), "B")
            for name in ("a1", "a2"):
                streams[name].send(name)
                streams[name].close()
                self.assertEqual(said_in(sock.events("a")[-1]), name)

    def test_sixteen_at_a_time(self) -> None:
        """A connection has 16 responses active; a place that is free goes to who waits."""
        streams: queue.SimpleQueue[Stream] = queue.SimpleQueue()

        def handler(request: Request) -> Stream:
            streams.put(stream := Stream())
            return stream

        with FakeOpenAI(handler) as server, Socket(server) as sock:
            for number in range(18):
                sock.create(stream_id=f"lane{number}")
            active = [streams.get(timeout=WAIT) for _ in range(16)]
            server.wait_for_requests(18, WAIT)
            self.assertTrue(streams.empty())
            for stream in active[:2]:
                stream.send("x")
                stream.close()
            active += [streams.get(timeout=WAIT) for _ in range(2)]
            for stream in active[2:]:
                stream.send("x")
                stream.close()
            ended = 0
            while ended < 18:
                ended += sock.event()["type"] == "response.completed"

    def test_thirty_two_names(self) -> None:
        """The 33rd name of a lane is refused; the lane without a name does not count, and known names go on."""
        with FakeOpenAI() as server, Socket(server) as sock:
            sock.create().events()
            for number in range(32):
                self.assertEqual(
                    sock.create(stream_id=str(number)).events(str(number))[-1]["type"], "response.completed"
                )
            event = sock.create(stream_id="more").event()
            self.assertEqual((event["error"]["code"], event["stream_id"]), ("websocket_stream_limit_reached", "more"))
            self.assertEqual(sock.create(stream_id="0").events("0")[-1]["type"], "response.completed")
            self.assertEqual(sock.create().events()[-1]["type"], "response.completed")

    def test_steering(self) -> None:
        """Accepted input makes a successor when the response ends; it has the settings of its parent, and its lane."""
        stream = Stream()
        answers = Script(
            stream, lambda request: f"{request.options['instructions']} {[m.text for m in request.messages]}"
        )
        with FakeOpenAI(answers) as server, Socket(server) as sock:
            sock.create("one", stream_id="a", instructions="Be.")
            stream.send("Hm")
            id = sock.event()["response"]["id"]
            for text in ("left", "right"):
                sock.say({"type": "response.steer", "previous_response_id": id, "input": text})
            kinds = [(event := sock.event())["type"] for _ in range(6)]
            self.assertEqual((kinds.count("response.steer.accepted"), event["stream_id"]), (2, "a"))
            stream.close()
            self.assertEqual(said_in(sock.events("a")[-1]), "Hm")
            successor = sock.events("a")[-1]["response"]
            self.assertEqual(successor["previous_response_id"], id)
            self.assertEqual(said_in({"response": successor}), "Be. ['Be.', 'one', 'Hm', 'left', 'right']")
            self.assertEqual(len(server.requests), 2)

    def test_steering_waits_for_tools(self) -> None:
        """After a call accepted input waits, and goes before the outputs that the client then sends."""
        stream = Stream()
        calls = [ToolCall("f", {}, id="call_a"), CustomToolCall("g", "x", id="call_b")]
        answers = Script(stream, lambda request: str([message.role for message in request.messages]))
        with FakeOpenAI(answers) as server, Socket(server) as sock:
            sock.create("one")
            id = sock.event()["response"]["id"]
            sock.say({"type": "response.steer", "previous_response_id": id, "input": "left"})
            while (accepted := sock.event())["type"] != "response.steer.accepted":
                pass
            stream.send(*calls)
            stream.close()
            sock.events()
            pending = sock.event()
            self.assertEqual((pending["type"], pending["steer"]), ("response.steer.pending", accepted["steer"]))
            stubs = [
                {"type": "function_call_output", "call_id": "call_a", "name": "f"},
                {"type": "custom_tool_call_output", "call_id": "call_b"},
            ]
            self.assertEqual(pending["required_input"], stubs)
            outputs = [{**stub, "output": "ok"} for stub in stubs]
            self.assertEqual(
                said_in(sock.create("", input=outputs, previous_response_id=id).events()[-1]),
                "['user', 'assistant', 'user', 'tool', 'tool']",
            )

    def test_steering_that_fails(self) -> None:
        """What cannot be steered is told why, with the input that it gave."""
        stream = Stream()
        with FakeOpenAI(lambda request: stream if request.text == "live" else "Hi") as server, Socket(server) as sock:
            ended = sock.create().events()[-1]["response"]["id"]
            conversation = get(server, "/conversations", "POST", {}).json["id"]
            bound = sock.create("live", conversation=conversation).event()["response"]["id"]
            sock.event()
            for id, given, code in (
                ("resp_x", "left", "response_not_found"),
                (ended, "left", "response_already_completed"),
                (ended, [], "invalid_input"),
                (ended, None, "invalid_input"),
                (ended, [{"role": "system", "content": "x"}], "invalid_input"),
                (bound, "left", "steering_not_supported"),
            ):
                with self.subTest(code=code, given=given):
                    event = sock.say({"type": "response.steer", "previous_response_id": id, "input": given}).event()
                    self.assertEqual((event["type"], event["error"]["code"]), ("response.steer.failed", code))
                    self.assertEqual(event["steer"], {"input": given, "previous_response_id": id})
            stream.send("Hi")
            stream.close()
            self.assertEqual(sock.events()[-1]["type"], "response.completed")

    def test_steering_of_what_fails(self) -> None:
        """Accepted input comes back when the response fails."""
        stream = Stream()
        with FakeOpenAI(always(stream)) as server, Socket(server) as sock:
            id = sock.create().event()["response"]["id"]
            sock.say({"type": "response.steer", "previous_response_id": id, "input": "left"})
            while (accepted := sock.event())["type"] != "response.steer.accepted":
                pass
            stream.fail(StreamError("no"))
            while (event := sock.event())["type"] != "response.steer.failed":
                pass
            self.assertEqual(event["error"]["code"], "response_not_active")
            self.assertEqual(event["steer"]["id"], accepted["steer"]["id"])
            self.assertEqual(event["steer"]["input"][0]["content"], [{"type": "input_text", "text": "left"}])

    # The wire

    def test_ping_and_close(self) -> None:
        """A ping is answered with its bytes, also between fragments and in a response; a Close with its code."""
        for name, data, code in (("code", b"\x0f\xa0bye", 4000), ("no code", b"", 0)):
            stream = Stream()
            with self.subTest(name=name), FakeOpenAI(lambda request: stream) as server, Socket(server) as sock:  # noqa: B023
                sock.create().event()
                self.assertEqual(sock.event()["type"], "response.in_progress")
                half = client_frame(TEXT_FRAME, b"{", 0)
                sock.send(half + client_frame(PING_FRAME, b"\xff?") + client_frame(0, b"}") + client_frame(PONG_FRAME))
                self.assertEqual((sock.frame(), sock.event()["type"]), ((PONG_FRAME, b"\xff?"), "error"))
                sock.send(client_frame(CLOSE_FRAME, data))
                self.assertEqual(sock.closed(), (code, b""))
                self.assertTrue(stream.wait_disconnected(WAIT))

    def test_bad_frames(self) -> None:
        """What breaks the protocol closes the connection with its code, and ends what streams."""
        for name, (data, messages, code) in FRAMES.items():
            if code is not None and not messages:
                stream = Stream()
                with self.subTest(name=name), FakeOpenAI(always(stream)) as server, Socket(server) as sock:
                    sock.create().event()
                    self.assertEqual(sock.event()["type"], "response.in_progress")
                    sock.send(data)
                    self.assertEqual(sock.closed(), (code, b""))
                    self.assertTrue(stream.wait_disconnected(WAIT))

    def test_wire_acts(self) -> None:
        """Raw is a message as it is; Disconnect ends the connection, with RST if asked, and all that streams on it."""
        for reset_it in (False, True):
            stream = Stream()

            def handler(request: Request, stream: Stream = stream, reset_it: bool = reset_it) -> Any:
                return stream if request.text == "live" else ["a", Pause(0), Raw(b"{no"), Disconnect(reset=reset_it)]

            with self.subTest(reset=reset_it), FakeOpenAI(handler) as server, Socket(server) as sock:
                sock.create("live", stream_id="b")
                stream.wait_request(WAIT)
                sock.create("cut")
                while (frame := sock.frame())[1] != b"{no":
                    self.assertEqual(frame[0], TEXT_FRAME)
                if reset_it:
                    with self.assertRaises(ConnectionResetError):
                        sock.sock.recv(1)
                else:
                    self.assertEqual(sock.rest(), b"")
                self.assertTrue(stream.wait_disconnected(WAIT))

    def test_leaving_is_noticed(self) -> None:
        """FIN, RST and a Close end all that streams; generators are closed once, and what waits is not begun."""
        leave: dict[str, Callable[[Socket], object]] = {
            "FIN": lambda sock: sock.sock.close(),
            "half a FIN": lambda sock: sock.sock.shutdown(socket.SHUT_WR),
            "RST": lambda sock: reset(sock.sock),
            "Close": lambda sock: sock.send(client_frame(CLOSE_FRAME)),
        }
        for name, act in leave.items():
            ended: queue.SimpleQueue[str] = queue.SimpleQueue()

            def pausing(request: Request, ended: queue.SimpleQueue[str] = ended) -> Iterator[Any]:
                try:
                    yield from ("Hi", Pause(3600), "never")
                finally:
                    ended.put(request.text)

            with self.subTest(name=name), faulty(pausing) as server, Socket(server) as sock:
                for text in ("a", "b", "c"):
                    sock.create(text, stream_id=text if text != "c" else "b")
                server.wait_for_requests(3, WAIT)
                begun: set[Any] = set()
                while len(begun) < 2:
                    event = sock.event()
                    begun |= {event["stream_id"]} if event["type"] == "response.output_text.delta" else set()
                act(sock)
                self.assertEqual({ended.get(timeout=WAIT), ended.get(timeout=WAIT)}, {"a", "b"})
                self.eventually(lambda server=server: not server.in_flight)  # type: ignore[misc]
                self.assertEqual((ended.empty(), server.errors), (True, []))
                self.assertTrue(server.requests[0].disconnected)

    def test_a_client_that_does_not_read(self) -> None:
        """It blocks its own connection only; stop() frees it."""
        ended = threading.Event()
        server = FakeOpenAI(lambda request: endless(ended) if request.text == "endless" else "Hi")
        with server, Socket(server) as sock, Socket(server) as other:
            sock.create("endless").create("more", stream_id="b")
            server.wait_for_requests(2, WAIT)
            self.assertEqual(said_in(other.create().events()[-1]), "Hi")
            self.assert_works(server)
            with self.assertNoLogs("openai_fake", "WARNING"):  # that a thread still runs
                server.stop()
            self.assertTrue(ended.is_set())

    def test_leaving_is_noticed_in_a_blocked_write(self) -> None:
        """Who closes, and does not read, has left as well."""
        for name, act in (("RST", reset), ("half a FIN", lambda sock: sock.shutdown(socket.SHUT_WR))):
            ended = threading.Event()

            def handler(request: Request, ended: threading.Event = ended) -> Iterator[Any]:
                try:
                    yield Raw(b"x" * 20_000_000)  # more than fits into the buffers
                finally:
                    ended.set()

            with self.subTest(name=name), FakeOpenAI(handler) as server, Socket(server) as sock:
                sock.create()
                [connection] = server._running().connections
                self.eventually(lambda: connection.deadline < connection.until, "a blocked write")  # noqa: B023
                act(sock.sock)
                self.assertTrue(ended.wait(WAIT))

    def test_nothing_follows_a_close(self) -> None:
        """A Close comes whole between the messages of a stream, is the last frame, and reaches who is still sending."""
        for name, data, code in (
            ("closes", client_frame(CLOSE_FRAME, b"\x03\xe8"), 1000),
            ("breaks the protocol", client_frame(3) + b"x" * 5_000_000, 1002),
        ):
            ended = threading.Event()
            with self.subTest(name=name), FakeOpenAI(always(endless(ended))) as server, Socket(server) as sock:
                sock.create()
                server.wait_for_requests(1, WAIT)
                sender = threading.Thread(target=lambda: sock.sock.sendall(data))  # noqa: B023
                sender.start()
                while (frame := sock.frame())[0] == TEXT_FRAME:
                    pass
                self.assertEqual((frame[0], frame[1][:2], sock.rest()), (CLOSE_FRAME, code.to_bytes(2, "big"), b""))
                sender.join(WAIT)
                self.assertTrue(ended.wait(WAIT))

    def test_a_disconnect_of_a_stream_is_on_the_wire(self) -> None:
        """As in a stream over HTTP: the test's Stream was sent whole."""
        stream = Stream()
        with FakeOpenAI(always(stream)) as server, Socket(server) as sock:
            sock.create()
            stream.send("a", Disconnect())
            stream.close()
            sock.rest()
            self.assertEqual((stream.flush(WAIT), stream.disconnected), (True, False))

    def test_what_was_cut_is_not_in_flight(self) -> None:
        """Who sees the end of the connection finds its request no more in flight."""
        gate = threading.Event()
        with FakeOpenAI(always(["a", Disconnect()])) as server, Socket(server) as sock:
            ended = server._ended

            def late(request: Request, began: float) -> None:
                if request.text:
                    gate.wait(WAIT)
                ended(request, began)

            with mock.patch.object(server, "_ended", late):
                sock.create().rest()
                self.assertEqual(server.in_flight, [])
                gate.set()

    def test_a_blocked_write_is_given_up(self) -> None:
        """A write that makes no progress for too long ends the connection."""
        ended = threading.Event()
        with FakeOpenAI(lambda request: endless(ended)) as server:
            server._running().limits[openai_fake._State.SENDING] = 0.1
            server._running().sweep = 0.02
            with Socket(server) as sock:
                sock.create()
                self.assertTrue(ended.wait(WAIT))

    def test_stop_says_so(self) -> None:
        """stop() closes with 1001, whether a response streams or not."""
        with FakeOpenAI(silent) as server, Socket(server) as idle, Socket(server) as live:
            live.create().event()
            live.event()
            server.errors.clear()
            with contextlib.suppress(RuntimeError):  # the Stream was never closed
                server.stop()
            self.assertEqual((idle.closed(), live.closed()), ((1001, b""), (1001, b"")))

    def test_the_time_of_a_connection_is_limited(self) -> None:
        """After 60 minutes a connection is told to connect again, and closed; until then it may be idle."""
        now = 0.0
        with (
            mock.patch.object(openai_fake._Clock, "monotonic", lambda: now),
            FakeOpenAI(always(["Hi", Raw(b"x" * 8_000_000)])) as server,  # more than fits into the buffers
            Socket(server) as sock,
        ):
            [connection] = server._running().connections
            for now in (0.0, 3599.0, 3600.0):
                self.eventually(lambda: connection.deadline == 3600)
                server._running()._sweep(now)
                if now < 3600:
                    sock.create()
                    while b'"response.completed"' not in sock.frame()[1]:
                        pass
            event = sock.event()
            self.assertEqual((event["status"], event["error"]["code"]), (400, "websocket_connection_limit_reached"))
            self.assertEqual(sock.closed(), (1000, b""))

    def test_one_byte_at_a_time(self) -> None:
        """A client that trickles gets the same."""
        with FakeOpenAI() as server, Socket(server) as sock:
            for byte in client_frame(TEXT_FRAME, json.dumps({"type": "response.create", **responses()}).encode()):
                sock.send(bytes([byte]))
            self.assertEqual(said_in(sock.events()[-1]), "Hi")

    def test_many_silent_sockets(self) -> None:
        """100 silent sockets with a response each: others are served, and all threads are gone after the clients."""
        with FakeOpenAI(silent) as server:
            _hurry(server)
            baseline = resources()
            socks = [Socket(server).create() for _ in range(100)]
            server.wait_for_requests(100, WAIT)
            self.assert_works(server)
            for number, sock in enumerate(socks):
                (reset if number % 2 else socket.socket.close)(sock.sock)
            self.assert_back_to(baseline)
            self.assertEqual((server.in_flight, server.errors), ([], []))


@needs_openai
@needs_websockets
class OfficialWebSocketTest(unittest.TestCase):
    """The official client's connect(), sync and async, takes it for the real thing."""

    def test_sync(self) -> None:
        """Turns in a chain on one connection, errors as events, and a response that is steered."""
        import openai

        server = start(self, lambda request: f"{len(request.messages)}")
        with (
            openai.OpenAI(base_url=server.base_url, api_key="test") as client,
            client.responses.connect() as connection,
        ):
            previous: dict[str, Any] = {}
            for text in ("1", "3", "5"):
                connection.response.create(model="gpt-4o", input="Hi", store=False, **previous)
                event: Any = next(each for each in connection if each.type == "response.completed")
                self.assertEqual(event.response.output_text, text)
                previous = {"previous_response_id": event.response.id}
            connection.response.create(model="gpt-4o", input="Hi", previous_response_id="resp_x")
            event = connection.recv()
            self.assertEqual(
                (event.type, event.status, event.error.code), ("error", 400, "previous_response_not_found")
            )
            connection.response.steer(input="Hi", previous_response_id="resp_x")
            event = connection.recv()
            self.assertEqual((event.type, event.error.code), ("response.steer.failed", "response_not_found"))

    def test_async_lanes(self) -> None:
        """The session helper collects the responses of lanes that run at the same time."""
        import openai
        from openai.lib.responses_websocket import AsyncResponsesWebSocketSession, ResponsesWebSocketLimits

        together = threading.Barrier(2)

        def handler(request: Request) -> str:
            together.wait(WAIT)
            return request.text

        limits = ResponsesWebSocketLimits(8, 128, 512, 1 << 20, 1 << 20)

        async def talk(server: FakeOpenAI) -> list[str]:
            asyncio.get_running_loop().slow_callback_duration = WAIT  # the client imports much of itself at first use
            async with (
                openai.AsyncOpenAI(base_url=server.base_url, api_key="test") as client,
                client.responses.connect() as connection,
                AsyncResponsesWebSocketSession(connection, limits=limits) as session,
            ):
                lanes = [session.lane(name) for name in ("a", "b")]
                for lane, text in zip(lanes, ("one", "two"), strict=True):
                    await lane.send({"type": "response.create", "model": "gpt-4o", "input": text})
                return [(await lane.get_final_response()).output_text for lane in lanes]

        server = start(self, handler)
        self.assertEqual(asyncio.run(talk(server)), ["one", "two"])


# ---- The command line ------------------------------------------------------------------------------------------------


COMMAND = [sys.executable, "-X", "dev", "-m", "openai_fake"]
DIRECTORY = os.path.dirname(os.path.abspath(openai_fake.__file__))
SETTINGS = ("NO_COLOR", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE")  # of the environment, that would change a result
PATIENCE = 10.0  # seconds for what should come at once; a wait that lasts this long is a failure
POSIX = unittest.skipIf(sys.platform == "win32", "POSIX signals, pipes and terminals")
_T = TypeVar("_T")


def within(seconds: float, function: Callable[..., _T], *arguments: Any) -> _T:
    """What the function returns, or queue.Empty when that takes too long."""
    results: queue.Queue[_T] = queue.Queue()
    threading.Thread(target=lambda: results.put(function(*arguments)), daemon=True).start()
    return results.get(timeout=seconds)


class Program:
    """The command line in a process of its own; it ends with the test."""

    def __init__(self, test: unittest.TestCase, *arguments: str, stdout: int = subprocess.PIPE, **env: str) -> None:
        environ = {name: value for name, value in os.environ.items() if name not in SETTINGS} | env
        self.start(test, [*COMMAND, "--port", "0", *arguments], DIRECTORY, stdout, environ)

    def start(
        self, test: unittest.TestCase, command: list[str], folder: str, stdout: int, environ: dict[str, str]
    ) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, bufsize=0, cwd=folder, env=environ, stdin=pipe, stdout=stdout, stderr=pipe
        )
        test.addCleanup(self._end)
        self.stdin: Any = self.process.stdin
        self.stdout: Any = self.process.stdout

    def url(self) -> str:
        return self.line().split()[-1]

    def line(self) -> str:
        line: bytes = within(PATIENCE, self.stdout.readline)
        return line.decode()

    def until(self, text: str) -> str:
        """The first line from here on that has the text in it."""
        while text not in (line := self.line()):
            if not line:
                raise AssertionError(f"the output ended before {text!r}")
        return line

    def type(self, *lines: str) -> None:
        for line in lines:
            self.stdin.write(f"{line}\n".encode())

    def interrupt(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def _end(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


class Main(Program):
    """The command line on a thread of this process, with pipes for standard streams: its words in less time."""

    def __init__(self, test: unittest.TestCase, *arguments: str) -> None:
        (theirs_in, ours_in), (ours_out, theirs_out) = os.pipe(), os.pipe()
        self.stdin, self.stdout = open(ours_in, "wb", buffering=0), open(ours_out, "rb", buffering=0)  # noqa: SIM115
        self.theirs = open(theirs_in, encoding="utf-8"), open(theirs_out, "w", encoding="utf-8")  # noqa: SIM115
        self.signals: dict[int, Callable[[int, object], object]] = {}
        self.thread = threading.Thread(target=main, args=(["--port", "0", *arguments],), daemon=True)
        with (
            mock.patch.multiple(sys, stdin=self.theirs[0], stdout=self.theirs[1], path=[*sys.path]),
            mock.patch("sys.dont_write_bytecode", True),
            mock.patch("signal.signal", self.signals.__setitem__),
        ):
            self.thread.start()
            test.addCleanup(self._end)
            test.addCleanup(sys.modules.pop, "openai_fake_handler", None)
            self.first = self.line()

    def url(self) -> str:
        return self.first.split()[-1]

    def interrupt(self, number: int = signal.SIGTERM) -> int:
        self.signals[number](number, None)
        self.thread.join(PATIENCE)
        return 1 if self.thread.is_alive() else 0

    def rest(self) -> str:
        """What it still says, to its end."""
        self.interrupt()
        self.theirs[1].close()
        rest: bytes = within(PATIENCE, self.stdout.read)
        return rest.decode()

    def _end(self) -> None:
        self.interrupt()
        self.stdin.close()
        for thread in threading.enumerate():
            if thread.name == "openai_fake input":  # it reads from what is closed next
                thread.join(PATIENCE)
        for stream in (self.stdout, *self.theirs):
            stream.close()


def left(*arguments: str) -> tuple[Any, str, str]:
    """The exit status of a command that does not serve, and what it wrote to stdout and stderr."""
    streams = io.StringIO(), io.StringIO()
    with (
        mock.patch.multiple(sys, path=[*sys.path], dont_write_bytecode=True),
        mock.patch("signal.signal"),
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
    ):
        try:
            main(arguments)
        except SystemExit as error:
            return error.code, streams[0].getvalue(), streams[1].getvalue()
    raise AssertionError("it serves")


class Caller:
    """Chat requests over one connection."""

    def __init__(self, test: unittest.TestCase, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition("/")[0].rpartition(":")
        self.connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
        test.addCleanup(self.connection.close)

    def send(self, text: str = "Hello", *, stream: bool = False) -> None:
        body = {"model": "gpt-4o", "stream": stream, "messages": [{"role": "user", "content": text}]}
        self.connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})

    def receive(self) -> tuple[int, Any]:
        response = self.connection.getresponse()
        return response.status, json.loads(response.read())

    def events(self) -> Iterator[Any]:
        """The events of a streamed answer, as they come."""
        response = self.connection.getresponse()
        with response:
            while line := response.readline():
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])
                elif line.startswith(b"data: [DONE]"):
                    return

    def said(self, text: str = "Hello") -> str:
        self.send(text)
        status, body = self.receive()
        return body["choices"][0]["message"]["content"] if status == 200 else f"{status} {body['error']['message']}"


def contents(events: Iterator[Any], end: str) -> str:
    """The text of a stream, read until it ends so."""
    text = ""
    while not text.endswith(end):
        delta = next(events)["choices"][0]["delta"]
        text += delta.get("content") or ""
    return text


@contextlib.contextmanager
def controlled(handler: Any = echo, **options: Any) -> Iterator[FakeOpenAI]:
    """A server with the control routes, as the command line makes it."""
    server = FakeOpenAI(handler, **options)
    openai_fake._Control(server)
    with server:
        yield server
        server.errors.clear()


def control(server: FakeOpenAI, line: str, body: Any = None, *fields: str) -> Answer:
    """One request to a control route, with the Host that a client on this machine sends."""
    method, path = line.split(" ")
    with Wire(server) as wire:
        return wire.send(http_bytes(body, path, method, *fields).replace(b"Host: test", b"Host: localhost:1")).answer()


def listed(server: FakeOpenAI, line: str, *fields: str) -> list[Any]:
    data: list[Any] = control(server, line, None, *fields).json["data"]
    return data


class ControlTest(LeakTest):
    def test_only_served(self) -> None:
        """A server that a test starts has no control routes."""
        with FakeOpenAI() as server:
            for route in openai_fake._CONTROLS:
                with self.subTest(name=route):
                    self.assertEqual(control(server, route).status, 404)

    def test_parts_as_json(self) -> None:
        """A part as JSON, queued, is that part."""
        acts = [
            Finish("length"),
            Usage(1, 2),
            Pause(0.5),
            Disconnect(reset=True),
            StreamError("No.", code="a"),
            Disconnect(),
        ]
        for part in (*SPOKEN.values(), *acts):
            with self.subTest(part=part):
                value = json.loads(json.dumps(openai_fake._part_json(part)))
                self.assertEqual(openai_fake._queued_answer([value]), [part])
                self.assertEqual(openai_fake._queued_answer(value), [part])

    def test_answers(self) -> None:
        """Queued answers are given in order: strings, lists of parts, errors, and OpenAI's own JSON."""
        said = [Text("Hm."), ToolCall("f", {"a": 1})]
        error = {"status": 429, "error": {"message": "Slow down.", "code": "c"}, "headers": {"retry-after": "3"}}
        parts = ["A", {"type": "ToolCall", "name": "f", "arguments": {"a": 1}}]
        queued = ["One", parts, error, spoken("chat.completions", said), spoken("responses", said)]
        with controlled() as server:
            self.assertEqual(control(server, "POST /_fake/answers", queued).json, {"queued": 5})
            self.assertEqual(content(call(server, chat())), "One")
            message = call(server, chat()).json["choices"][0]["message"]
            self.assertEqual((message["content"], message["tool_calls"][0]["function"]["name"]), ("A", "f"))
            slow = call(server, chat())
            self.assertEqual((slow.status, slow.error["message"], slow.error["code"]), (429, "Slow down.", "c"))
            self.assertEqual(slow.headers["retry-after"], "3")
            for _ in range(2):
                message = call(server, chat()).json["choices"][0]["message"]
                self.assertEqual((message["content"], message["tool_calls"][0]["function"]["name"]), ("Hm.", "f"))
            self.assertEqual(control(server, "POST /_fake/answers", "Just one").json, {"queued": 1})
            self.assertEqual(call(server, responses()).json["output"][0]["content"][0]["text"], "Just one")

    def test_no_answers(self) -> None:
        """What is no answer is refused whole, with why."""
        with controlled() as server:
            for name, body, said in (
                ("not JSON", b"{", "JSONDecodeError"),
                ("number", ["a", 7], "7|int"),
                ("null", None, "Expecting value"),
                ("unknown part", [[{"type": "Txt", "text": "a"}]], "Txt"),
                ("unknown field", [[{"type": "Text", "txt": "a"}]], "txt"),
                ("wrong type", [[{"type": "Text", "text": 7}]], "7"),
                ("status", [{"error": {"message": "a"}, "status": 200}], "200"),
                ("other JSON", [{"object": "list"}], "no chat.completion"),
                ("too deep", b"[" * 100_000, "RecursionError"),
            ):
                with self.subTest(name=name):
                    answer = control(server, "POST /_fake/answers", body)
                    self.assertEqual(answer.status, 400)
                    self.assertRegex(answer.error["message"], said)
            self.assertEqual(content(call(server, chat("Echo"))), "Echo")

    def test_ran_out(self) -> None:
        """After the last queued answer a request fails at once; once the queue is deleted, the handler answers."""
        with controlled() as server:
            control(server, "POST /_fake/answers", ["One"])
            self.assertEqual(content(call(server, chat())), "One")
            last = call(server, chat())
            self.assertEqual((last.status, last.headers["x-should-retry"]), (500, "false"))
            control(server, "DELETE /_fake/answers")
            self.assertEqual(content(call(server, chat("Echo"))), "Echo")

    def test_sessions(self) -> None:
        """A session, by header or key, has answers and requests of its own; who names none sees all."""
        with controlled() as server:
            one, other = "x-fake-session: one", "Authorization: Bearer other"
            control(server, "POST /_fake/answers", ["For one"], one)
            control(server, "POST /_fake/answers", ["For other"], other)
            control(server, "POST /_fake/answers", ["For all", "And again"])
            self.assertEqual(content(call(server, chat(), "", "POST", other)), "For other")
            self.assertEqual(content(call(server, chat(), "", "POST", other, one)), "For one")
            self.assertEqual(content(call(server, chat(), "", "POST", "api-key: third")), "For all")
            self.assertEqual(call(server, chat(), "", "POST", one).status, 500)
            numbers = {
                session: [each["number"] for each in listed(server, "GET /_fake/requests", *fields)]
                for session, fields in {"": (), "one": (one,), "other": (other,)}.items()
            }
            self.assertEqual(numbers, {"": [1, 2, 3, 4], "one": [2, 4], "other": [1]})
            self.assertEqual([each["kind"] for each in listed(server, "GET /_fake/errors", one)], ["ran_out"])
            self.assertEqual([each["kind"] for each in listed(server, "GET /_fake/errors")], ["ran_out", "left_over"])
            for line in ("DELETE /_fake/answers", "DELETE /_fake/requests"):
                self.assertEqual(control(server, line, None, one).status, 200)
            self.assertEqual(content(call(server, chat(), "", "POST", one)), "And again")
            self.assertEqual([each["number"] for each in listed(server, "GET /_fake/requests")], [1, 3, 5])
            for line in ("DELETE /_fake/answers", "DELETE /_fake/requests"):
                control(server, line)
            self.assertEqual(listed(server, "GET /_fake/requests") + listed(server, "GET /_fake/errors"), [])

    def test_journal(self) -> None:
        """A request is told with what it held and what became of it, but never a key."""
        key = "Authorization: Bearer sk-very-secret-key"
        with controlled(always(ToolCall("f"))) as server:
            tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}}}}}]
            call(
                server, chat("Hi", tools=tools), "/v1/chat/completions?a=1", "POST", key, "api-key: sk-very-secret-key"
            )
            [entry] = listed(server, "GET /_fake/requests")
            expected = {
                "number": 1, "method": "POST", "path": "/v1/chat/completions", "query": "a=1", "status": 200,
                "api": "chat.completions", "model": "gpt-4o", "stream": False, "outcome": "answered", "asked": True,
                "body": chat("Hi", tools=tools), "tools": ["f(a)"],
                "messages": [{"role": "user", "text": "Hi", "attached": [], "calls": []}],
            }  # fmt: skip
            self.assertEqual({name: entry.get(name) for name in expected}, expected)
            self.assertEqual([part["type"] for part in entry["answer"]], ["ToolCall", "Usage"])
            self.assertAlmostEqual(entry["time"], time.time(), delta=WAIT)
            self.assertGreater(entry["seconds"], 0)
            self.assertEqual(entry["headers"]["content-length"], str(len(json.dumps(entry["body"]))))
            self.assertNotIn("secret", control(server, "GET /_fake/requests").body.decode())
        with controlled(api_key="right") as server:
            call(server, chat(), "", "POST", "Authorization: Bearer wrong")
            told = [control(server, f"GET /_fake/{name}").body.decode() for name in ("requests", "errors")]
            self.assertNotIn("Bearer", "".join(told))
            self.assertNotIn("wrong.", "".join(told))

    def test_not_in_the_journal(self) -> None:
        """Control requests are no requests: neither kept, nor counted, nor shown."""
        with controlled() as server:
            for route in (*openai_fake._CONTROLS, "GET /v1/_fake/requests"):
                if "events" not in route:
                    control(server, route)
            self.assertEqual((server.requests, listed(server, "GET /_fake/requests")), ([], []))
            self.assertEqual(server.transcript(), "No request came to the fake.")

    def test_wait(self) -> None:
        """`wait` blocks until so many came, also while they are answered; after `timeout` it is a 504."""
        stream = Stream()
        with controlled(always(stream)) as server, Wire(server) as wire:
            line = "GET /_fake/requests?wait=1&timeout=10"
            wire.send(http_bytes(None, line.split()[1], "GET").replace(b"Host: test", b"Host: localhost"))
            with asking(server):
                [entry] = wire.answer().json["data"]
                self.assertEqual((entry["outcome"], entry["seconds"], entry["asked"]), ("in flight", None, True))
                stream.close()
            late = control(server, "GET /_fake/requests?wait=2&timeout=0.01")
            self.assertEqual((late.status, late.error["message"]), (504, "1 of 2 requests came in 0.01 s."))

    def test_waits_that_are_no_numbers(self) -> None:
        """A wait or a timeout that is no number is a 400 that names it."""
        with controlled() as server:
            for name, text in (("wait", "x"), ("wait", "-1"), ("wait", "1.5"), ("timeout", "x"), ("timeout", "-1")):
                with self.subTest(name=name, text=text):
                    answer = control(server, f"GET /_fake/requests?{name}={text}")
                    self.assertEqual((answer.status, answer.error["param"]), (400, name))

    def test_settled(self) -> None:
        """Who has read a whole answer finds its request answered: one that is just ending is waited for."""
        gate = threading.Event()
        with controlled() as server:
            ended, control_ = server._ended, cast(Any, server._control)
            follow = control_.follow

            def late(*arguments: Any) -> None:
                gate.wait(WAIT)
                ended(*arguments)

            def opening(waiter: Any, look: Callable[[], Any]) -> None:
                if look() is not None:
                    gate.set()
                follow(waiter, look)

            with mock.patch.object(server, "_ended", late), mock.patch.object(control_, "follow", opening):
                try:
                    call(server, chat())
                    self.assertEqual(listed(server, "GET /_fake/requests")[0]["outcome"], "answered")
                finally:
                    gate.set()

    def test_errors(self) -> None:
        """What went wrong is told by kind; an error that was the wanted answer is none."""

        def handler(request: Request) -> Any:
            raise {"bug": ZeroDivisionError("oh"), "wanted": rate_limit()}[request.text]

        with controlled(handler) as server:
            call(server, chat("bug"))
            call(server, chat("wanted"))
            call(server, chat(messages=[]))
            get(server, "/nothing")
            call(server, {"model": "m"}, PATHS["responses"])
            control(server, "POST /_fake/answers", ["a", "b"])
            told = [(each["kind"], each["number"]) for each in listed(server, "GET /_fake/errors")]
        self.assertEqual(told, [("failed", 1), ("refused", 3), ("refused", 4), ("refused", 5), ("left_over", None)])

    def test_other_sites(self) -> None:
        """Pages of other origins get a 403, and on loopback a Host that is another's; with `cors` too."""
        for cors in (False, True):
            with controlled(cors=cors) as server:
                for name, host, origin, status in (
                    ("localhost", "localhost:8080", None, 200),
                    ("address", "127.0.0.1", None, 200),
                    ("other address", "127.9.9.9:1", "http://localhost:3000", 200),
                    ("IPv6", "[::1]:8080", "http://[::1]:8080", 200),
                    ("any case", "LOCALHOST", "https://LocalHost", 200),
                    ("rebound", "evil.example", None, 403),
                    ("rebound port", "evil.example:80", None, 403),
                    ("begins like it", "localhost.evil.example", None, 403),
                    ("ends like it", "evil-localhost", None, 403),
                    ("looks like it", "127.0.0.1.evil.example", None, 403),
                    ("other origin", "localhost", "http://evil.example", 403),
                    ("origin like it", "localhost", "http://localhost.evil.example", 403),
                    ("no origin", "localhost", "null", 403),
                ):
                    with self.subTest(name=name, cors=cors):
                        fields = [f"Origin: {origin}"] if origin else []
                        for route in ("GET /", "GET /_fake/requests", "POST /_fake/answers"):
                            method, path = route.split()
                            body = http_bytes(["a"] if method == "POST" else None, path, method, *fields)
                            with Wire(server) as wire:
                                sent = body.replace(b"Host: test", f"Host: {host}".encode())
                                self.assertEqual(wire.send(sent).answer().status, status)
        with controlled(host="0.0.0.0") as server:
            self.assertEqual(call(server, None, "/", "GET").status, 200)

    def test_keys(self) -> None:
        """Looking needs no key; queueing and deleting need the server's, which is no session then."""
        with controlled(api_key="k") as server:
            for route in openai_fake._CONTROLS:
                if "events" not in route:
                    with self.subTest(name=route):
                        reads = route.startswith("GET")
                        self.assertEqual(control(server, route, ["a"]).status, 200 if reads else 401)
                        self.assertEqual(control(server, route, ["a"], "api-key: k").status, 200)
            control(server, "POST /_fake/answers", ["Mine"])
            control(server, "POST /_fake/answers", ["Mine"], "api-key: k", "x-fake-session: mine")
            fields = ("api-key: k", "x-fake-session: mine")
            self.assertEqual(content(call(server, chat(), "", "POST", *fields)), "Mine")

    def test_events(self) -> None:
        """The events tell each request as it comes, its text as it is streamed, and its end; the old ones first."""
        stream = Stream()
        with controlled(Script("Old", stream)) as server:
            call(server, chat("Old one"))
            with Wire(server) as wire:
                wire.send(http_bytes(None, "/_fake/events", "GET").replace(b"Host: test", b"Host: localhost"))

                def until(words: str) -> Any:
                    """The next event that has these words."""
                    while words not in (event := wire.until(b"\n\n").decode()):
                        pass
                    return json.loads(event.partition("data: ")[2])

                self.assertEqual(until('"text":"Old"')["number"], 1)
                with asking(server) as asker:
                    came = until('"number":2')
                    self.assertEqual((came["messages"][0]["text"], came["answer"]), ("Hi", []))
                    for text in ("So ", "far"):
                        stream.send(text)
                        came = until(text + '"')
                        self.assertEqual((came["outcome"], came["seconds"]), ("in flight", None))
                    stream.close()
                    asker.answer()
                    came = until('"outcome":"answered"')
                    self.assertEqual((came["number"], came["status"], came["answer"][0]["text"]), (2, 200, "So far"))

    def test_an_end_that_is_just_being_noted(self) -> None:
        """The events tell the usage of each request, also where they were looked at in the middle of its end."""
        gate = threading.Event()
        with controlled() as server, Wire(server) as wire:
            end = cast(Any, server._control).end
            server._observe = lambda request: end(request) if gate.wait(WAIT) else None
            wire.send(http_bytes(None, "/_fake/events", "GET").replace(b"Host: test", b"Host: localhost"))
            call(server, chat())
            self.eventually(lambda: server.requests[0]._seconds > 0)
            call(server, chat())  # makes them look
            for said in (b'"outcome":"answered"', b'"Usage"'):
                while not (said in (event := wire.until(b"\n\n")) and b'"number":1' in event):
                    pass
                gate.set()

    def test_stop(self) -> None:
        """stop() ends who follows or waits."""
        wires: list[Wire] = []
        with self.assertNoLogs("openai_fake", "WARNING"), controlled() as server:  # that a thread still runs
            for path in ("/_fake/events", "/_fake/requests?wait=1&timeout=60"):
                wires.append(Wire(server))
                wires[-1].send(http_bytes(None, path, "GET").replace(b"Host: test", b"Host: localhost"))
            wires[0].until(b"\r\n\r\n")
        for wire in wires:
            with wire:
                self.assertNotIn(b'"data"', wire.rest())

    def test_keep(self) -> None:
        """Sessions are bounded as all that is kept."""
        with controlled(keep=3) as server:
            for number in range(10):
                control(server, "POST /_fake/answers", ["a"], f"x-fake-session: {number}")
            self.assertEqual([*server._control.queues], ["7", "8", "9"])  # type: ignore[union-attr]


class Browser:
    """A headless Chromium, driven through pipes: each command, and each answer, is JSON that ends with a NUL."""

    def __init__(self, test: unittest.TestCase, path: str) -> None:
        (theirs, self.write), (self.read, back) = os.pipe(), os.pipe()
        profile = tempfile.mkdtemp()
        test.addCleanup(shutil.rmtree, profile, ignore_errors=True)
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
        ]
        begin = f"import os, sys; os.dup2({theirs}, 3); os.dup2({back}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        command = [sys.executable, "-c", begin, path, *options]
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(theirs, back), **quiet)
        os.close(theirs)
        os.close(back)
        test.addCleanup(self.end)
        self.buffer, self.number, self.session = b"", 0, ""
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def tell(self, method: str, **params: Any) -> Any:
        """Gives a command, and returns its result; events between are skipped."""
        self.number += 1
        where = {"sessionId": self.session} if self.session else {}
        os.write(
            self.write, json.dumps({"id": self.number, "method": method, "params": params, **where}).encode() + b"\0"
        )
        while True:
            message, nul, rest = self.buffer.partition(b"\0")
            if not nul:
                data = within(3 * PATIENCE, os.read, self.read, 1 << 20)
                if not data:
                    raise AssertionError("the browser has ended")
                self.buffer += data
                continue
            self.buffer, answer = rest, json.loads(message)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise AssertionError(answer["error"])
                return answer["result"]

    def evaluate(self, source: str) -> Any:
        result = self.tell("Runtime.evaluate", expression=source, awaitPromise=True, returnByValue=True)["result"]
        return result.get("value", result)

    def until(self, condition: str) -> None:
        """Waits until an expression is true, looking after each change of the page."""
        look = f"const look = () => ({condition}) && resolve(true)"
        watch = "new MutationObserver(look).observe(document, {subtree: true, childList: true, characterData: true})"
        give_up = f"setTimeout(() => resolve(document.body.innerText), {PATIENCE * 1000})"
        found = self.evaluate(f"new Promise(resolve => {{ {look}; {watch}; look(); {give_up} }})")
        if found is not True:
            raise AssertionError(f"never was {condition}, but: {found}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")


class PageTest(unittest.TestCase):
    def test_no_external_file(self) -> None:
        """The page is one file, and its policy lets it load nothing from elsewhere."""
        with controlled() as server:
            answer = control(server, "GET /")
        self.assertEqual((answer.status, answer.headers["content-type"]), (200, "text/html; charset=utf-8"))
        self.assertIn("default-src 'none'", answer.headers["content-security-policy"])
        self.assertNotRegex(answer.body.decode(), r"(?:src|href)=(?!\"data:)|https?://|innerHTML")
        self.assertLessEqual(answer.body.count(b"\n"), 150)

    @unittest.skipUnless(CHROMIUM and sys.platform != "win32", "there is no Chromium")
    def test_in_a_browser(self) -> None:
        """The page shows requests as they come, the newest first, and text as it is streamed, in light and dark."""
        stream, evil = Stream(), "<img src=x onerror=document.title='evil'>"
        with controlled(Script("First answer", stream, [Reasoning("Why?"), ToolCall("f", {"a": 1})])) as server:
            browser = Browser(self, CHROMIUM)
            browser.tell("Page.navigate", url=server.url + "/")
            browser.until("document.querySelector('[role=status]')?.textContent === 'live'")
            call(server, chat("First question"))
            browser.until("document.querySelector('main').innerText.includes('First answer')")
            tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}}}}}]
            with asking(server, text=evil, tools=tools):
                browser.until("document.querySelector('main').innerText.includes('f(a)')")
                stream.send("So far")
                browser.until("document.querySelector('main .live')?.innerText.includes('So far')")
                stream.send(", so good")
                browser.until("document.querySelector('main .live')?.innerText.includes('So far, so good')")
                stream.close()
                browser.until("!document.querySelector('main .live')")
            call(server, responses("Last question"))
            browser.until("document.querySelector('main').innerText.includes('f({\"a\":1})')")
            self.assertIn("Why?", browser.evaluate("document.querySelector('main').innerText"))
            rows = browser.evaluate("[...document.querySelectorAll('nav button')].map(row => row.innerText)")
            for row, said in zip(rows, ("Last question", evil, "First question"), strict=True):
                self.assertIn(said, row)
                self.assertIn("200", row)
            self.assertEqual(browser.evaluate("document.title"), "openai_fake")
            browser.evaluate("document.querySelector('nav button:last-child').click()")
            browser.until("document.querySelector('main').innerText.includes('First answer')")
            command = browser.evaluate("curl(all.get(1))")
            if shutil.which("curl"):
                server.handler = always("Again")
                done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=PATIENCE, check=True)
                self.assertEqual(json.loads(done.stdout)["choices"][0]["message"]["content"], "Again")
                self.assertEqual(server.requests[-1].body, server.requests[0].body)
            colours = set()
            for scheme in ("light", "dark"):
                browser.tell("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                colours.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
                if path := os.environ.get("SCREENSHOTS"):
                    shot = base64.b64decode(browser.tell("Page.captureScreenshot")["data"])
                    Path(path, f"{scheme}.png").write_bytes(shot)
            self.assertEqual(len(colours), 2)


class CommandLineTest(unittest.TestCase):
    def test_banner(self) -> None:
        """The first line ends with the base URL; the environment variables to export follow."""
        program = Program(self)
        url = program.url()
        self.assertRegex(url, r"^http://127\.0\.0\.1:\d+/v1$")
        self.assertEqual(program.until("OPENAI_BASE_URL").strip(), f"export OPENAI_BASE_URL={url}")
        self.assertIn("export OPENAI_API_KEY=", program.line())
        self.assertEqual(Caller(self, url).said("Hello"), "Hello")

    @POSIX
    @unittest.skipUnless(shutil.which("curl"), "curl is not installed")
    def test_curl_line(self) -> None:
        """The curl line works as it is pasted, with a key to give too."""
        for arguments in ((), ("--api-key", "it's a $key"), ("--models", "llama, mistral")):
            with self.subTest(arguments=arguments):
                line = Main(self, *arguments).until("curl")
                pasted = subprocess.run(line, shell=True, capture_output=True, timeout=PATIENCE, check=True).stdout
                self.assertEqual(json.loads(pasted)["choices"][0]["message"]["content"].strip(), "Hello!")

    @POSIX
    def test_signals(self) -> None:
        """SIGINT and SIGTERM end it, quietly, with requests under way too."""
        rows: list[tuple[signal.Signals, tuple[str, ...]]]
        rows = [(signal.SIGINT, ()), (signal.SIGTERM, ()), (signal.SIGTERM, ("--interactive",))]
        for number, arguments, program in [(*row, Program(self, *row[1])) for row in rows]:
            with self.subTest(signal=number.name, arguments=arguments):
                Caller(self, program.url()).send()
                program.until("chat.completions gpt-4o")
                self.assertEqual(program.interrupt(number), 0)
                self.assertEqual(within(PATIENCE, program.process.communicate)[1], b"")

    def test_bad_options(self) -> None:
        """What cannot be done is one line on stderr, which names it, and exit status 2."""
        files = {
            "handlers": "import sys\nnumber = 1\nif 'x' in sys.argv: raise OSError('two\\nlines')\n",
            "broken": "def answer(:\n",
            "leaving": "raise SystemExit(0)\n",
            "faulty": "def answer(request): ...\n\n1 // 0\n",
        }
        with tempfile.TemporaryDirectory() as directory, socket.create_server(("127.0.0.1", 0)) as busy:
            for name, source in files.items():
                Path(directory, f"{name}.py").write_text(source, "utf-8")
            handlers, port = f"{directory}/handlers.py", str(busy.getsockname()[1])
            cases = {
                "unknown option": (["--prot", "1"], "--prot"),
                "port not a number": (["--port", "http"], "'http'"),
                "port too high": (["--port", "65536"], "'65536'"),
                "port in use": (["--port", port], port),
                "no such host": (["--port", "0", "--host", "256.0.0.0.1"], "256.0.0.0.1"),
                "negative seconds": (["--itl", "-1"], "'-1'"),
                "seconds not a number": (["--ttft", "nan"], "'nan'"),
                "two answers": (["--reply", "a", "--interactive"], "--interactive"),
                "two answers, one of them auto": (["--auto", "--reply", "a"], "--reply"),
                "handler without a name": (["--handler", handlers], "FILE.py:NAME"),
                "no such file": (["--handler", f"{directory}/none.py:answer"], "none.py"),
                "no such module": (["--handler", "no_such_module:answer"], "no_such_module"),
                "no such name": (["--handler", f"{handlers}:nobody"], "nobody"),
                "not a function": (["--handler", f"{handlers}:number"], "number"),
                "syntax error": (["--handler", f"{directory}/broken.py:answer"], "SyntaxError"),
                "exits": (["--handler", f"{directory}/leaving.py:answer"], "SystemExit"),
                "fails, and where": (
                    ["--handler", f"{directory}/faulty.py:answer"],
                    "ZeroDivisionError: integer division or modulo by zero (faulty.py:3",
                ),
                "no place to dump": (["--dump", f"{directory}/no/such/file"], "No such file or directory"),
                "no error": (["--error-rate", "200=1"], "'200=1'"),
                "no rate": (["--error-rate", "429=two"], "429=two"),
                "no format": (["--log", "xml"], "xml"),
            }
            self.addCleanup(sys.modules.pop, "openai_fake_handler", None)
            for name, (arguments, named) in cases.items():
                with self.subTest(name=name):
                    status, out, told = left(*arguments)
                    self.assertEqual((status, out, told.count("\n")), (2, "", 1))
                    self.assertIn(named, told)

    def test_version(self) -> None:
        """--version prints the name and the version."""
        self.assertEqual(left("--version"), (0, f"openai_fake {openai_fake.__version__}\n", ""))

    def test_reply(self) -> None:
        """--reply answers that text, whatever was said."""
        caller = Caller(self, Main(self, "--reply", "No.").url())
        self.assertEqual([caller.said("Yes?"), caller.said("Why?")], ["No.", "No."])

    def test_recorded_reply(self) -> None:
        """--reply @FILE answers what was recorded in the file, and says what cannot be said again."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "answer")
            with FakeOpenAI(always("Recorded.")) as server:
                path.write_bytes(call(server, responses(stream=True), PATHS["responses"]).body)
            self.assertEqual(Caller(self, Main(self, "--reply", f"@{path}").url()).said("Yes?"), "Recorded.")
            path.write_text("{}")
            for data, words in ((f"@{path}", "it is no chat.completion"), (f"@{path}.not", "No such file")):
                status, _, told = left("--reply", data)
                self.assertEqual(status, 2)
                self.assertIn(words, told)

    def test_lines(self) -> None:
        """Each request is a line; --verbose adds the conversation and the answer, --quiet shows neither."""
        for option in ("--cors", "--verbose", "--quiet"):
            with self.subTest(option=option):
                program = Main(self, "--reply", "Fine.", option)
                Caller(self, program.url()).said("How are you?")
                if option != "--quiet":
                    program.until("chat.completions gpt-4o")
                rest = program.rest()
                self.assertNotIn("gpt-4o", rest)
                self.assertEqual("How are you?" in rest and "Fine." in rest, option == "--verbose")

    def test_errors_shown(self) -> None:
        """A handler that raises is named in the request's line; --verbose shows where it did."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "handlers.py")
            path.write_text("def answer(request):\n    return 1 // 0\n", "utf-8")
            program = Main(self, "--verbose", "--handler", f"{path}:answer")
            self.assertIn("ZeroDivisionError", Caller(self, program.url()).said())
            self.assertIn("ZeroDivisionError", program.until("  500  "))
            program.until("handlers.py")
            program.until("1 // 0")

    def test_handler_reload(self) -> None:
        """A handler's file is loaded again when it changes, which is said; one that cannot be is a 500 with why."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "json.py")  # a name of the standard library's: it must not take its place
            neighbour = Path(directory, "neighbour_of_handler.py")
            neighbour.write_text("from openai_fake import Text\n", "utf-8")
            source = "import neighbour_of_handler as n\nasync def answer(request): return n.Text({!r})\n"

            def edit(text: str, tick: int) -> None:
                path.write_text(text, "utf-8")
                os.utime(path, ns=(tick, tick))  # all within one second; and no clock's tick is too coarse for them

            edit(source.format("one"), 1)
            program = Program(self, "--handler", f"{path}:answer")
            caller = Caller(self, program.url())
            self.assertEqual(caller.said(), "one")
            edit(source.format("two"), 2)
            self.assertEqual(caller.said(), "two")
            self.assertIn("json.py", program.until("loaded again"))
            edit("def answer(:", 3)
            for _ in range(2):
                self.assertRegex(caller.said(), "^500 .*SyntaxError")
            self.assertIn("SyntaxError", program.until("cannot be loaded"))
            edit(source.format("four"), 4)
            self.assertEqual(caller.said(), "four")
            path.unlink()
            self.assertEqual(caller.said(), "four")

    def test_handler_of_module(self) -> None:
        """--handler module:name imports from the current directory, and reloads."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "handlers_of_test.py")
            path.write_text("def answer(request): return 'one'\n", "utf-8")
            program = Program(self, "--handler", "handlers_of_test:answer", PYTHONPATH=directory)
            caller = Caller(self, program.url())
            self.assertEqual(caller.said(), "one")
            path.write_text("def answer(request): return 'another'\n", "utf-8")
            self.assertEqual(caller.said(), "another")

    def test_help_fits_a_screen(self) -> None:
        """--help is no longer than a terminal, nor wider, and names every option."""
        lines = left("--help")[1].splitlines()
        self.assertLessEqual((len(lines), max(map(len, lines))), (23, 80))  # the 24th has the prompt
        for each in openai_fake._parser()._actions:
            self.assertIn(each.option_strings[-1], "\n".join(lines))

    def test_auto(self) -> None:
        """--auto answers texts of --tokens; with --seed it answers the same again, ids too."""
        said: list[Any] = []
        for _ in range(2):
            caller = Caller(self, Main(self, "--auto", "--tokens", "7", "--seed", "3").url())
            caller.send()
            said.append(caller.receive()[1])
        self.assertEqual(said[0]["usage"]["completion_tokens"], 7)
        self.assertEqual([{**each, "created": 0} for each in said], [{**said[0], "created": 0}] * 2)

    def test_strictness(self) -> None:
        """--strict refuses an unknown model, --no-validate not even an unknown role."""
        for arguments, model, role, status in (
            (["--strict"], "none-such", "user", 404),
            ([], "none-such", "user", 200),
            ([], "gpt-4o", "clown", 400),
            (["--no-validate"], "gpt-4o", "clown", 200),
        ):
            with self.subTest(arguments=arguments, model=model, role=role):
                caller = Caller(self, Main(self, *arguments).url())
                body = {"model": model, "messages": [{"role": role, "content": "Hi"}]}
                caller.connection.request("POST", "/v1/chat/completions", json.dumps(body))
                self.assertEqual(caller.receive()[0], status)

    def test_error_rate(self) -> None:
        """--error-rate fails so many requests, and with --seed the same ones."""
        told = []
        for _ in range(2):
            caller = Caller(self, Main(self, "--error-rate", "429=0.3,500=0.2", "--seed", "5").url())
            told.append([caller.said()[:3] for _ in range(60)])
        self.assertEqual(told[0], told[1])
        self.assertEqual(set(told[0]), {"429", "500", "Hel"})
        self.assertGreater(told[0].count("429"), 6)

    def test_dump(self) -> None:
        """--dump appends a line for each exchange: what was asked and answered, without the key."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "dump.jsonl")
            path.write_text("{}\n", "utf-8")
            program = Main(self, "--reply", "Fine.", "--dump", str(path))
            caller = Caller(self, program.url())
            for text in ("How are you?", "And\u2028now?"):
                caller.said(text)
            program.interrupt()
            _, first, second, *_ = path.read_text("utf-8").split("\n")
        self.assertEqual(json.loads(first)["body"]["messages"][0]["content"], "How are you?")
        self.assertEqual(json.loads(first)["answer"][0], {"type": "Text", "text": "Fine."})
        self.assertEqual(json.loads(second)["messages"][0]["text"], "And\u2028now?")

    def test_log_json(self) -> None:
        """--log json makes each line JSON that a terminal obeys nothing of; with --verbose it has all."""
        for arguments in ((), ("--verbose",)):
            with self.subTest(arguments=arguments):
                program = Main(self, "--log", "json", *arguments)
                Caller(self, program.url()).said("Hi\u009b")
                line = program.until('"method"')
                told = json.loads(line)
                self.assertTrue(line.isascii())
                self.assertEqual((told["model"], told["status"], told["outcome"]), ("gpt-4o", 200, "answered"))
                self.assertEqual("body" in told, bool(arguments))

    @unittest.skipUnless(hasattr(socket, "SO_REUSEPORT"), "this system cannot share a port")
    def test_reuse_port(self) -> None:
        """With --reuse-port several processes listen on one port; without, the second is refused."""
        port = Main(self, "--reuse-port").url().rsplit(":", 1)[1].removesuffix("/v1")
        self.assertIn(port, left("--port", port)[2])
        self.assertEqual(Main(self, "--reuse-port", "--port", port).url(), f"http://127.0.0.1:{port}/v1")

    def test_verbose_request(self) -> None:
        """--verbose shows tools, options, and images and files by their size."""
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 4000}}
        linked = {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}
        file = {"type": "file", "file": {"file_data": "data:application/pdf;base64," + "A" * 40, "filename": "a.pdf"}}
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}, "b": {}}}}}]
        messages = [{"role": "user", "content": [{"type": "text", "text": "See"}, image, linked, file]}]
        shown = openai_fake._shown_request(
            asked("chat.completions", model="m", messages=messages, tools=tools, temperature=0.5)
        )
        for words in (
            "user       See\n",
            "[image_url: 4,065 characters]",
            "[image_url: 66 characters]",
            "[file: 126 characters]",
            "tools      f(a, b)",
            "options    temperature=0.5",
        ):
            self.assertIn(words, shown)
        parts = [{"type": "input_image", "image_url": "data:image/png;base64," + "A" * 4000}]
        shown = openai_fake._shown_request(asked("responses", **responses(input=[{"role": "user", "content": parts}])))
        self.assertIn("[input_image: 4,059 characters]", shown)

    @POSIX
    def test_output_never_read(self) -> None:
        """A reader that stops reading its output holds up neither the answers nor the end."""
        # In hundreds: more lines than a pipe holds, and more than that and what is kept for it.
        for make, hundreds in ((Main, 6), (Program, 16)):
            with self.subTest(hundreds=hundreds):
                program = make(self, "--log", "json")
                with Wire(cast(FakeOpenAI, SimpleNamespace(url=program.url().removesuffix("/v1")))) as wire:
                    for _ in range(hundreds):
                        wire.send(got() * 100)
                        self.assertEqual({wire.answer().status for _ in range(100)}, {200})
                self.assertEqual(program.interrupt(), 0)

    @POSIX
    def test_output_broken(self) -> None:
        """A reader that has left harms nothing."""
        program = Program(self)
        caller = Caller(self, program.url())
        program.stdout.close()
        for _ in range(3):
            self.assertEqual(caller.said(), "Hello")
        self.assertEqual(program.interrupt(), 0)
        self.assertEqual(within(PATIENCE, program.process.stderr.read), b"")  # type: ignore[union-attr]

    @POSIX
    def test_output_closed(self) -> None:
        """It serves when it was started with no standard streams at all."""
        port = 0
        while not port:  # it cannot say which it got; one that no system gives by itself will still be free then
            with (
                contextlib.suppress(OSError),
                socket.create_server(("127.0.0.1", random.randrange(10_000, 30_000))) as free,
            ):
                port = free.getsockname()[1]
        process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *COMMAND, "--port", str(port)], cwd=DIRECTORY
        )
        self.addCleanup(process.wait, PATIENCE)
        self.addCleanup(process.kill)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionRefusedError):
                self.assertEqual(Caller(self, f"http://127.0.0.1:{port}").said(), "Hello")
                break
        self.assertLess(time.monotonic(), deadline)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(PATIENCE), 0)

    @POSIX
    def test_colour(self) -> None:
        """There is colour on a terminal, unless NO_COLOR is set, and never in a pipe."""
        import pty

        for environ, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
            with self.subTest(environ=environ):
                ours, theirs = pty.openpty()
                program = Program(self, stdout=theirs, **environ)
                os.close(theirs)
                program.stdout = open(ours, "rb", buffering=0)  # noqa: SIM115
                self.addCleanup(program.stdout.close)
                Caller(self, program.url()).said()
                self.assertEqual("\x1b[" in program.until("chat.completions gpt-4o"), coloured)
        program = Main(self)
        Caller(self, program.url()).said()
        self.assertNotIn("\x1b", program.until("chat.completions gpt-4o"))


# The path and the names of a module are as they were before it was imported.
FORGET = """import sys
for name in [*sys.modules]:
    if name.split(".")[0] == "tests":
        del sys.modules[name]
"""


class CopiesTest(unittest.TestCase):
    """A vendored copy, and more than one copy in a process."""

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        vendor = self.folder / "tests" / "vendor"
        vendor.mkdir(parents=True)
        shutil.copy(openai_fake.__file__, vendor / "openai_fake.py")

    def test_a_command_serves_the_handler_its_own_classes(self) -> None:
        """Whatever the path by which the command was started and the handler imports it, there is one copy."""
        imports = {
            "from": "from tests.vendor import openai_fake",
            "names": "from tests.vendor.openai_fake import ToolCall\nimport sys\nopenai_fake = sys.modules['__main__']",
            "import": "import tests.vendor.openai_fake\nopenai_fake = tests.vendor.openai_fake",
            "top": "import openai_fake",
        }
        commands = (["-m", "tests.vendor.openai_fake"], ["tests/vendor/openai_fake.py"])
        environ = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        path = self.folder / "answers.py"

        def write(number: int, lines: str) -> None:
            path.write_text(f"{FORGET}{lines}\n\ndef answer(request):\n    return openai_fake.ToolCall('f')\n", "utf-8")
            os.utime(path, ns=(number, number))  # so it is loaded again

        for command in commands:
            write(0, "import openai_fake")
            program = Program.__new__(Program)
            whole = [sys.executable, *command, "--port", "0", "--handler", "answers.py:answer"]
            program.start(self, whole, str(self.folder), subprocess.PIPE, environ)
            url = program.url() + "/responses"
            for number, (name, lines) in enumerate(imports.items(), 1):
                with self.subTest(command=command, name=name):
                    write(number, lines)
                    with urllib.request.urlopen(url, json.dumps(responses()).encode(), timeout=WAIT) as answer:
                        self.assertEqual(arguments_in(json.load(answer)), ["{}"])

    def test_two_copies_are_told(self) -> None:
        """A part of another copy of the module is no answer, and the message names both files."""
        with mock.patch.object(sys, "path", [str(self.folder), *sys.path]):
            other: Any = importlib.import_module("tests.vendor.openai_fake")
        self.addCleanup(lambda: [sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "tests"])
        for answer in (other.ToolCall("f"), [other.Text("a")], other.Reply("a"), other.Stream()):
            with self.subTest(answer=type(answer)), forgiven(always(answer)) as server:
                message = call(server, chat()).error["message"]
                self.assertIn(f"of another copy of openai_fake, {other.__file__}, ", message)
                self.assertIn(openai_fake.__file__, message)


class InteractiveTest(unittest.TestCase):
    def setUp(self) -> None:
        self.program = Main(self, "--interactive")
        self.url = self.program.url()
        self.caller = Caller(self, self.url)
        self.program.until("/hangup")  # the help, its last line

    def test_streamed_lines(self) -> None:
        """The conversation is shown, and each line that is typed reaches the client at once."""
        self.caller.send("How are you?", stream=True)
        self.program.until("How are you?")
        events = self.caller.events()
        for line in ("Fine.", "", "And you?", "//end"):
            self.program.type(line)
            self.assertEqual(contents(events, line.replace("//", "/") + "\n"), line.replace("//", "/") + "\n")
        self.program.type("/end")
        self.assertEqual([event for event in events if "error" in event], [])
        self.program.until("  200  ")

    def test_whole_answer(self) -> None:
        """A request that is not streamed gets all at /end; lines typed ahead are for it."""
        self.program.type("One", "Two", "/end")
        self.assertEqual(self.caller.said(), "One\nTwo\n")

    def test_call(self) -> None:
        """/call calls a tool, with what follows its name as the arguments."""
        self.caller.send()
        self.program.type("/call", '/call get_weather {"city": "Paris"}', "/end")
        self.program.until("usage: /call NAME JSON")
        call = self.caller.receive()[1]["choices"][0]["message"]["tool_calls"][0]["function"]
        self.assertEqual((call["name"], json.loads(call["arguments"])), ("get_weather", {"city": "Paris"}))

    def test_error_first(self) -> None:
        """/error before anything is said is a reply of that status."""
        self.program.type("/error", "/error x", "/error 200 fine", "/error 429 Slow down.")
        self.assertEqual(self.caller.said(), "429 Slow down.")

    def test_error_later(self) -> None:
        """/error once something was said is an error in the stream."""
        self.caller.send(stream=True)
        self.program.type("So")
        events = self.caller.events()
        contents(events, "So\n")
        self.program.type("/error 500 Out of words.")
        self.assertIn("Out of words.", [event["error"]["message"] for event in events if "error" in event])

    def test_hangup(self) -> None:
        """/hangup drops the connection with no reply."""
        for stream in (False, True):
            with self.subTest(stream=stream), self.assertRaises((http.client.RemoteDisconnected, ConnectionError)):
                self.program.type("/hangup")
                caller = Caller(self, self.url)
                caller.send(stream=stream)
                caller.connection.getresponse()

    def test_client_leaves(self) -> None:
        """A client that leaves while one types gives the terminal to the next, which is said."""
        self.caller.send("First", stream=True)
        self.program.until("First")
        self.program.type("So")
        contents(self.caller.events(), "So\n")
        self.caller.connection.close()
        self.program.until("client has left")
        self.program.type("2", "/end")
        self.assertEqual(Caller(self, self.url).said(), "2\n")

    def test_background_cancelled(self) -> None:
        """A background response that is cancelled, even before anything was said, gives up the terminal too."""
        body = responses("First", background=True)
        self.caller.connection.request("POST", "/v1/responses", json.dumps(body))
        made = self.caller.receive()[1]
        self.program.until("> user")
        self.caller.connection.request("POST", f"/v1/responses/{made['id']}/cancel")
        self.assertEqual(self.caller.receive()[1]["status"], "cancelled")
        self.program.until("client has left")
        self.program.type("2", "/end")
        self.assertEqual(self.caller.said(), "2\n")

    def test_unknown_command(self) -> None:
        """A command that there is not shows those that there are."""
        self.caller.send()
        self.program.type("/quit")
        self.program.until("/end")
        self.program.type("/end")
        self.caller.receive()

    def test_input_ends(self) -> None:
        """When the input ends, so does the answer, with what was said; later requests get a 503."""
        self.caller.send()
        self.program.type("So far")
        self.program.stdin.close()
        self.assertEqual(self.caller.receive()[1]["choices"][0]["message"]["content"], "So far\n")
        self.assertIn("503 ", self.caller.said())

    def test_no_newline(self) -> None:
        """A line that ends with a backslash is sent without its newline."""
        self.program.type("One, \\", "two", "/end")
        self.assertEqual(self.caller.said(), "One, two\n")

    def test_broken_call(self) -> None:
        """/call with broken JSON is refused, with where it is broken; a custom tool's input may be anything."""
        body = chat(tools=[{"type": "custom", "custom": {"name": "run"}}])
        self.caller.connection.request("POST", "/v1/chat/completions", json.dumps(body))
        self.program.type('/call get_weather {"city": ', "/call run {print", "/end")
        self.assertIn("char 8", self.program.until("usage: /call NAME JSON"))
        [call] = self.caller.receive()[1]["choices"][0]["message"]["tool_calls"]
        self.assertEqual(call["custom"], {"name": "run", "input": "{print"})

    def test_finish(self) -> None:
        """/finish ends the answer for that reason; one that there is not is refused."""
        self.caller.send()
        self.program.type("So", "/finish never", "/finish length")
        self.program.until("usage: /finish REASON")
        self.assertEqual(self.caller.receive()[1]["choices"][0]["finish_reason"], "length")

    def test_refuse(self) -> None:
        """/refuse answers with a refusal."""
        self.program.type("/refuse Not that.")
        self.caller.send()
        self.assertEqual(self.caller.receive()[1]["choices"][0]["message"]["refusal"], "Not that.")

    def test_others_wait(self) -> None:
        """One conversation has the terminal; who waits for it is told, and shown with its tools when its turn comes."""
        self.caller.send("First")
        self.program.until("First")
        second = Caller(self, self.url)
        body = chat("Second", tools=[{"type": "function", "function": {"name": "f"}}], temperature=0.5)
        second.connection.request("POST", "/v1/chat/completions", json.dumps(body))
        self.program.until("waits: 1 before it")
        self.program.type("1", "/end")
        self.assertEqual(self.caller.receive()[1]["choices"][0]["message"]["content"], "1\n")
        self.program.until("Second")
        self.program.until("f()")
        self.program.until("temperature=0.5")
        self.program.type("2", "/end")
        self.assertEqual(second.receive()[1]["choices"][0]["message"]["content"], "2\n")

    def test_all_typed_before(self) -> None:
        """A file of lines answers one request after the other, also when the input has ended long since."""
        self.program.type("1", "/end", "2", "/end")
        self.program.stdin.close()
        self.program.until("The input has ended")
        self.assertEqual([self.caller.said() for _ in range(3)], ["1\n", "2\n", "503 Nobody is at the terminal."])


@POSIX
@unittest.skipUnless(find_spec("readline"), "there is no readline")
class TerminalTest(unittest.TestCase):
    """--interactive on a terminal: what is on the screen, by what was written to it."""

    def setUp(self) -> None:
        import pty

        self.keys, theirs = pty.openpty()
        self.addCleanup(os.close, self.keys)
        self.modes = self.terminal_modes()
        environ = {**os.environ, "TERM": "dumb", "NO_COLOR": "1"}
        command = [*COMMAND, "--port", "0", "--interactive"]
        self.process = subprocess.Popen(command, cwd=DIRECTORY, env=environ, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.addCleanup(self.process.wait, PATIENCE)
        self.addCleanup(self.process.kill)
        self.shown = ""
        self.url = self.until("/v1\r\n").split()[-1]
        self.caller = Caller(self, self.url)
        self.until("drops the connection\r\n")
        self.until("< ")  # what is typed from here on is edited

    def terminal_modes(self) -> Any:
        import termios

        return termios.tcgetattr(self.keys)[:4]

    def type(self, text: str) -> None:
        os.write(self.keys, text.encode())

    def until(self, text: str) -> str:
        """What is written up to and with a text."""
        while text not in self.shown:
            self.shown += within(PATIENCE, os.read, self.keys, 4096).decode()
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def test_editing(self) -> None:
        """Lines are edited, and come again with the arrow up."""
        self.type("Hellp\x7fo\r/end\r")
        self.assertEqual(self.caller.said(), "Hello\n")
        self.type("\x1b[A\x1b[A, again\r/end\r")
        self.assertEqual(self.caller.said(), "Hello, again\n")

    def test_log_line(self) -> None:
        """A log line goes where the prompt was, and the prompt comes below it with what is typed so far."""
        self.type("Half a")
        self.until("Half a")
        self.caller.connection.request("GET", "/v1/models")
        self.caller.receive()
        line = self.until("GET /v1/models")
        self.assertIn("\r\x1b[K", line)
        self.until("< Half a")
        self.type(" line\r/end\r")
        self.assertEqual(self.caller.said(), "Half a line\n")

    def test_client_leaves(self) -> None:
        """A line that was being typed as the client left is not the beginning of the next answer."""
        self.caller.send("First", stream=True)
        self.until("First")
        self.type("So\r")
        contents(self.caller.events(), "So\n")
        self.until("So")
        self.until("< ")  # what is typed from here on is edited
        self.type("For the fi")
        self.until("For the fi")
        self.caller.connection.close()
        self.until("The client has left.")
        self.type("rst\r")
        self.until("not sent")
        self.type("For the second\r/end\r")
        self.assertEqual(Caller(self, self.url).said("Second"), "For the second\n")

    def test_interrupt(self) -> None:
        """SIGINT and SIGTERM end it while one types, quietly, and the terminal is as it was."""
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(signal=number.name):
                if number == signal.SIGTERM:
                    self.setUp()
                self.type("Half a")
                self.until("Half a")
                self.process.send_signal(number)
                self.assertEqual(self.process.wait(PATIENCE), 0)
                self.assertEqual(self.terminal_modes(), self.modes)
                self.assertNotIn("Traceback", self.shown)


class ShownTextTest(unittest.TestCase):
    @staticmethod
    def asked(**changes: Any) -> Any:
        """A request that was answered."""
        encoder = SimpleNamespace(tally=lambda: openai_fake.Usage(9, 2))
        told = {"method": "POST", "path": "/v1/responses", "api": "responses", "model": "gpt-4o", "stream": True}
        became = {"_status": 200, "_seconds": 0.0123, "_encoder": encoder, "_outcome": ""}
        return SimpleNamespace(**{**told, **became, **changes})

    def test_log_line(self) -> None:
        """A line has time, API, model, stream, status, duration, tokens, and what went wrong."""
        cases: dict[str, tuple[dict[str, Any], str]] = {
            "whole": ({}, "12:00:00 responses gpt-4o stream 200 0.012 s 9+2 tokens"),
            "json": (
                {"api": "chat.completions", "model": "m", "stream": False},
                "12:00:00 chat.completions m json 200 0.012 s 9+2 tokens",
            ),
            "other": (
                {"api": "", "_encoder": None, "method": "GET", "path": "/v1/models"},
                "12:00:00 GET /v1/models 200 0.012 s",
            ),
            "cut": (
                {"_status": 0, "_outcome": "client left"},
                "12:00:00 responses gpt-4o stream --- 0.012 s client left",
            ),
        }
        for name, (changes, expected) in cases.items():
            with self.subTest(name=name):
                line = _log_line(self.asked(**changes), "12:00:00")
                self.assertTrue(line.endswith("\n"))
                self.assertEqual(" ".join(line.split()), expected)

    def test_colours(self) -> None:
        """A status is green, yellow or red by its hundreds, and red where none was sent."""
        for status, colour in ((200, "32"), (404, "33"), (500, "31"), (0, "31")):
            with self.subTest(status=status):
                line = _log_line(self.asked(_status=status), "12:00:00", True)
                self.assertIn(f"\x1b[{colour}m{status or '---'}\x1b[0m", line)

    def test_untrusted(self) -> None:
        """What a client sent cannot move the cursor, colour, ring, reverse or break the output."""
        hostile = "a\x1b[2J\x07\r\x9b\u202e\u2028\x00\x7f\ud800\nb"
        shown = [
            _log_line(self.asked(model=hostile, _outcome=hostile), "12:00:00"),
            _log_line(self.asked(api="", path=hostile, method=hostile), "12:00:00"),
            self.shown(self.message(hostile, hostile, hostile)),
            _answer_text([openai_fake.Text(hostile), openai_fake.ToolCall(hostile, hostile, id="1")]),
        ]
        for text in shown:
            with self.subTest(text=text):
                self.assertEqual(text.replace("\n", "").strip(), "".join(filter(str.isprintable, text)).strip())
        self.assertEqual([text.count("\n") for text in shown[:2]], [1, 1])

    def test_long_texts(self) -> None:
        """A text of any length shows its beginning, and how much is left out."""
        text = self.shown(self.message("user", "x" * 1_000_000))
        self.assertLess(len(text), 3_000)
        self.assertIn("(998,000 more characters)", text)

    def test_conversation(self) -> None:
        """A message shows its role and its text, with its lines one below the other, and its calls."""
        messages = [self.message("user", "Rain\nin Paris?"), self.message("assistant", "", "{}")]
        self.assertEqual(
            self.shown(*messages),
            "  > user       Rain\n               in Paris?\n  > call       get_weather({})\n",
        )

    def test_answer(self) -> None:
        """Every kind of part is shown; one that has no words of its own by its repr."""
        parts = [openai_fake.Reasoning("Hm."), openai_fake.Text("Yes."), openai_fake.Disconnect()]
        lines = _answer_text(parts).splitlines()
        self.assertEqual([line.split()[1] for line in lines], ["reasoning", "answer", "disconnect"])

    def test_banner_quoting(self) -> None:
        """What a shell would take apart is quoted."""
        text = _banner("http://[::1]:80/v1", {"OPENAI_API_KEY": "a b"}, "it's", None)
        self.assertIn("'http://[::1]:80/v1/chat/completions'", text)
        self.assertIn("export OPENAI_API_KEY='a b'", text)
        self.assertTrue(text.startswith("openai_fake listens on http://[::1]:80/v1\n"))

    @staticmethod
    def message(role: str, text: str, arguments: str | None = None) -> Any:
        calls = [] if arguments is None else [openai_fake.ToolCall("get_weather", arguments, id="call_1")]
        return SimpleNamespace(role=role, text=text, content=text, tool_calls=calls, tool_call_id=None)

    @staticmethod
    def shown(*messages: Any) -> str:
        request: Any = SimpleNamespace(messages=messages, options={}, tools=[])
        return openai_fake._shown_request(request)


# ---- The README and the docstrings -----------------------------------------------------------------------------------


README = Path(__file__).with_name("README.md").read_text("utf-8")
HAS_PYTEST = find_spec("pytest") is not None
OPENAI = int(importlib.metadata.version("openai").split(".")[0]) if HAS_OPENAI else 0
needs_openai_3 = unittest.skipUnless(OPENAI >= 3, "openai 3 or newer is not installed")


def fenced(language: str) -> list[str]:
    """The README's blocks of a language; a Python one after as many empty lines as there are lines before it."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return ["\n" * (language == "python") * README[: each.start(1)].count("\n") + each[1] for each in found]


def table(heading: str) -> list[list[str]]:
    """The rows of the table under a heading, without its head; a cell that is all code, without its backquotes."""
    section = re.split(r"^#+ ", README.split(f"\n### {heading}\n")[1], flags=re.MULTILINE)[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip("`") for cell in row] for row in rows[2:]]


class ReadmeBlocksTest(unittest.TestCase):
    """What the README shows is what happens."""

    @staticmethod
    def names_of(block: str, **names: Any) -> dict[str, Any]:
        """The names that there are after a block; before it there are those given."""
        names["__name__"] = "readme"
        exec(compile(block, "README.md", "exec", dont_inherit=True), names)
        return names

    def test_python_compiles(self) -> None:
        """Every Python block is Python."""
        for block in fenced("python"):
            compile(block, "README.md", "exec")

    @needs_openai_3
    def test_python_runs(self) -> None:
        """Every Python block but the recipes' common lines holds tests, and they pass."""
        first, common, *recipes = fenced("python")
        self.assertIn("class FakeCase", common)
        shared = self.names_of(common)
        for block in (first, *recipes):
            if "import pytest" in block or ("responses.connect()" in block and not find_spec("websockets")):
                continue
            names = self.names_of(block, **(shared if block != first else {}))
            with self.subTest(name=re.findall(r"class (\w+)\((?:\w+\.)?\w*TestCase|class (\w+)\(FakeCase", block)):
                suite = unittest.TestSuite()
                for case in names.values():
                    if isinstance(case, type) and issubclass(case, unittest.TestCase):
                        suite.addTest(unittest.defaultTestLoader.loadTestsFromTestCase(case))
                result = unittest.TestResult()
                suite.run(result)
                self.assertEqual([text for _, text in (*result.errors, *result.failures)], [])
                self.assertGreater(result.testsRun, 0)

    @needs_openai_3
    @unittest.skipUnless(HAS_PYTEST, "pytest is not installed")
    def test_pytest_recipe_runs(self) -> None:
        """The pytest recipe passes under pytest, without a warning that the module was imported before."""
        _, common, *recipes = fenced("python")
        [recipe] = [block for block in recipes if "import pytest" in block]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "test_recipe.py").write_text(common + recipe, "utf-8")
            where = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(openai_fake.__file__))}
            done = subprocess.run(
                [*PYTEST, "-q", folder], env=where, capture_output=True, text=True, timeout=60, check=False
            )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    @needs_openai_3
    def test_what_a_test_pays_runs(self) -> None:
        """The script that tells what a test pays prints a line for each way."""
        [script] = fenced("py")
        self.assertIn("range(150)", script)
        names: dict[str, Any] = {}
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(script.replace("range(150)", "range(1)"), names)
        names["CLIENT"].close()
        ways = ["a_client_of_its_own", "one_client_for_all", "one_server_too", "a_mock_transport"]
        self.assertEqual(re.findall(r"^(\w+): [\d.]+ ms$", printed.getvalue(), re.MULTILINE), ways)

    @unittest.skipUnless(shutil.which("node"), "node is not installed")
    def test_node_runs(self) -> None:
        """The tests in JavaScript pass under Node."""
        [script] = fenced("js")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "example.test.mjs")
            path.write_text(script, "utf-8")
            where = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": DIRECTORY}
            command = ["node", "--test", str(path)]
            done = subprocess.run(command, env=where, capture_output=True, text=True, timeout=60, check=False)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertRegex(done.stdout, r"pass [1-9]")

    def test_streams_are_as_shown(self) -> None:
        """Both streams of the console block are what the server sends; `…` stands for anything."""
        [console] = fenced("console")
        shown = re.findall(r"^\$ curl -N \S+?(/v1\S+) -d '(.*?)'\n(.*?)(?=^\$|\Z)", console, re.DOTALL | re.MULTILINE)
        self.assertEqual([path for path, _, _ in shown], [*PATHS.values()])
        for path, body, output in shown:
            with self.subTest(name=path), FakeOpenAI() as server:
                sent = call(server, body.encode(), path).body.decode()
                pattern = ".*?".join(map(re.escape, output.strip().split("…")))
                self.assertIsNotNone(re.fullmatch(pattern, sent.strip(), re.DOTALL), sent)

    def test_banner_is_as_shown(self) -> None:
        """The command that serves prints what the README says."""
        self.assertIn("python -m openai_fake\n", fenced("sh"))
        shown, _ = fenced("text")
        environ = {"OPENAI_BASE_URL": "http://127.0.0.1:8080/v1", "OPENAI_API_KEY": "sk-fake"}
        self.assertEqual(shown, openai_fake._banner(environ["OPENAI_BASE_URL"], environ, "gpt-5.5", None))

    def test_report_is_as_shown(self) -> None:
        """The report of a failing test is what the README says."""

        def body(test: Any) -> None:
            server = start(test, always("Hello"))
            said = call(server, chat(model="gpt-5.5")).json["choices"][0]["message"]["content"]
            test.assertEqual(said, "Goodbye")

        _, shown = fenced("text")
        _, report = tried(body)
        lines = [line for line in report.splitlines() if line and line[0] not in "-+?"]
        if sys.version_info >= (3, 11):
            self.assertIn(shown.rstrip(), "\n".join(lines))

    def test_docstring_runs(self) -> None:
        """The examples of the module's docstrings are true."""
        failed, attempted = doctest.testmod(openai_fake)
        self.assertEqual(failed, 0)
        self.assertGreater(attempted, 0)


class ReadmeTablesTest(unittest.TestCase):
    """What the README lists is what there is: no more, no less."""

    def test_endpoints(self) -> None:
        """The table of endpoints has the routes of the module."""
        self.assertCountEqual([row[0] for row in table("Endpoints")], _ENDPOINTS)

    def test_control_routes(self) -> None:
        """The table of control routes has those of the module."""
        section = README.split("| Control route |")[1].split("\n\n")[0]
        self.assertCountEqual(re.findall(r"^\| `(.*?)` ", section, re.MULTILINE), openai_fake._CONTROLS)

    def test_options(self) -> None:
        """The table of options has FakeOpenAI's keywords in their order, and their defaults."""
        parameters = list(inspect.signature(FakeOpenAI).parameters.values())[1:]
        shown = [(name, eval(default, {"time": time})) for name, default, _ in table("Options")]
        self.assertEqual(shown, [(each.name, each.default) for each in parameters])

    def test_command_line(self) -> None:
        """The table of the command line has the parser's options, with what they take."""
        options: list[str] = []
        for each in openai_fake._parser()._actions:
            takes = f" {each.metavar or each.dest.upper()}" if each.nargs is None else ""
            options.append(each.option_strings[-1] + takes)
        self.assertCountEqual([row[0] for row in table("Command line")], options)

    def test_parts(self) -> None:
        """The tables of parts and wire acts have every part there is, with its signature."""
        shown = {ast.unparse(ast.parse(f"def {row[0]}: ...")) for row in (*table("Parts"), *table("Wire acts"))}
        public = {name: getattr(openai_fake, name) for name in openai_fake.__all__}
        classes = [each for each in public.values() if isinstance(each, type) and issubclass(each, openai_fake._Part)]
        made = set()
        for each in classes:
            bare = [one.replace(annotation=one.empty) for one in inspect.signature(each).parameters.values()]
            signature = str(inspect.Signature(bare)).replace("<factory>", "{}")
            made.add(ast.unparse(ast.parse(f"def {each.__name__}{signature}: ...")))
        self.assertEqual(shown, made)

    def test_attributes(self) -> None:
        """The tables of the request and the server name what they have; the request's, all of it."""
        asked = {name for row in table("The request") for name in re.findall(r"\w+", row[0])}
        self.assertEqual(asked, {name for name in dir(Request("", "", "", "", {})) if not name.startswith("_")})
        named = {name for row in table("The server") for name in re.findall(r"\w+", re.sub(r"\(.*?\)", "", row[0]))}
        options = inspect.signature(FakeOpenAI).parameters
        known = {name for name in dir(FakeOpenAI) if not name.startswith("_") and name not in options}
        self.assertEqual(named, known | {"errors"})


if __name__ == "__main__":
    unittest.main()
