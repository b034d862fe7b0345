# openai_fake 1.0.0: a fake of OpenAI's API for tests, in one file. Home: https://pypi.org/project/openai-fake/
# SPDX-FileCopyrightText: 2026 The openai_fake authors
# SPDX-License-Identifier: MIT
# In another repository this is a copy. Do not edit it: report upstream. To update it, run in its folder:
#   pip install -qU --no-deps --target .new openai-fake && mv .new/openai_fake/__init__.py openai_fake.py && rm -r .new
# flake8: noqa
# ruff: noqa: PGH004
# pylint: skip-file
# mypy: disallow-any-expr=False, disallow-any-explicit=False, disallow-any-decorated=False, warn-unreachable=False
# mypy: disable-error-code="explicit-override,mutable-override"
"""A fake of OpenAI's API: one file that answers real HTTP, so that what calls OpenAI can be tested offline.

A handler, a plain Python function, says what the model answers, once. The server encodes it as whatever the
client asked for: Chat Completions or Responses, JSON or a stream of server-sent events.

>>> import json, urllib.request
>>> def handler(request):
...     return f"You said: {request.text}"
>>> with FakeOpenAI(handler) as server:
...     body = json.dumps({"model": "gpt-5.5", "messages": [{"role": "user", "content": "Hello"}]})
...     with urllib.request.urlopen(server.base_url + "/chat/completions", body.encode()) as reply:
...         json.load(reply)["choices"][0]["message"]["content"]
'You said: Hello'

The way of an answer, which the file follows from top to bottom:

    bytes -> Request -> handler(request) -> parts -> encoder -> events -> sink -> bytes

- `Request`: what the client sent. `_check_request` refuses what the API refuses.
- A part (`Text`, `ToolCall`, `Pause`, ...): a piece of what the model says, or a thing that happens on the wire.
- An encoder, one per API: folds parts into items, and tells the events that say them. It does no I/O.
- A sink: where the events go (a stream, a JSON body, the log of a response in the background).
- `_Answer`: calls the handler and carries its parts through an encoder into a sink, waiting where parts want time.
- An endpoint: one function per route; it returns JSON, or what sends itself, as an `_Answer` does.
- `_Connection`: the bytes of one socket. `_Server`: the listener, and the threads. `FakeOpenAI`: the test's view.

To add a part, write one class in the section "What a handler answers": its text, what it is in Chat Completions, what
it is in Responses. To add an endpoint, write one function in the section "Endpoints".

Where a comment names the source of a fact, R is recordings of the API's answers (in the tests of public repositories),
P probes of the live API, S the public API reference and the types of openai-python 3.57, I public issue reports.
pytest: PYTEST_DONT_REWRITE (it takes a second, and the module may be imported before pytest loads it).
"""

# pyright: strict, reportPrivateUsage=false, reportMissingModuleSource=false

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036  # a copied file meets any version
    raise ImportError("openai_fake needs Python 3.10 or newer; this is " + sys.version.split()[0])

import hashlib
import http
import json
import json.encoder
import logging
import math
import os
import queue
import random
import re
import select
import selectors
import socket
import struct
import threading
import time
import traceback
import warnings
import zlib
from binascii import b2a_base64
from collections import deque
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from email.utils import formatdate
from enum import IntEnum
from functools import lru_cache, partial
from http.server import ThreadingHTTPServer
from importlib import import_module
from importlib.machinery import PathFinder
from socketserver import BaseRequestHandler, TCPServer
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, NoReturn, TextIO, TypedDict, TypeVar, cast
from urllib.parse import parse_qs, unquote_to_bytes, urlsplit
from weakref import WeakSet

if TYPE_CHECKING:
    import argparse
    import asyncio
    import unittest
    from types import TracebackType
    from typing import TypeAlias

    from typing_extensions import Self, Unpack, override
else:
    try:
        from typing_extensions import Self, override
    except ImportError:  # the copied file runs on a bare interpreter; only type checkers need the real ones
        Self = Any

        def override(method):
            return method


__all__ = [
    "APIError",
    "Answer",
    "Chunk",
    "ChunkChoice",
    "Completion",
    "CompletionChoice",
    "CustomToolCall",
    "Disconnect",
    "FakeOpenAI",
    "Finish",
    "Handler",
    "Message",
    "Options",
    "Pause",
    "Raw",
    "Reasoning",
    "Refusal",
    "Reply",
    "Request",
    "Script",
    "Stream",
    "StreamError",
    "Text",
    "Tool",
    "ToolCall",
    "Usage",
    "WebSearch",
    "echo",
    "main",
    "non_streaming_response",
    "rate_limit",
    "start",
    "streaming_response",
    "text_chunks",
    "tool_call_chunk",
]
__version__ = "1.0.0"

_LOG = logging.getLogger("openai_fake")
_LOG.addHandler(logging.NullHandler())  # without it, logging's last resort would print warnings to stderr

_MAX_CHOICES = 8  # the API's bound of n (P)
_MAX_BODY = 64 << 20  # bytes, decoded; OpenAI documents 50 MB for a request with images
_MAX_LINE = 64 << 10  # bytes of a request line; RFC 9112 3 asks for 8,000 at least
_MAX_HEAD = 128 << 10  # bytes of a request's head; Apache and nginx stop at 8 to 64 KiB, Go at 1 MiB
_MAX_DEPTH = 200  # of JSON in requests: Python gives up at 1,000 frames, and some code takes two or three a level
_MAX_CHUNK_LINE = 4 << 10  # bytes of a chunk's size with its extensions, or of a trailer; as Go has it
_MAX_FIELDS = 256  # header fields; Apache stops at 100
_BATCH = 64 << 10  # bytes gathered before a send, while more is known to follow
_FIRST_BATCH = 8 << 10  # so many at first: the beginning of a long answer goes out at once, a short one in one piece
_RUN = 256  # Texts in a row that are encoded together; their events fill a batch
_READ = 8 << 10  # bytes that a read makes room for: a head, and a small body
_HALF_CLOSED = 1.0  # seconds that a client which has sent FIN is still taken to wait for its JSON
_LONGEST = 3600.0  # seconds that a select waits: more than a month is an OverflowError
_LOOP_PATIENCE = 1.0  # seconds that a wait may block a running event loop: what is on its way has arrived by then
_STOP_SECONDS = 1.0  # what stop() waits for handlers that do not return

_JSON: TypeAlias = "dict[str, Any]"


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _default(value: object) -> NoReturn:
    raise TypeError(f"cannot be sent as JSON: {value!r} is of type {type(value).__name__}")


def _make_dumps() -> Callable[[object], str]:
    """Compact JSON that leaves non-ASCII alone, from CPython's C encoder made once, where there is one."""
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    quote: Any = getattr(json.encoder, "encode_basestring", None)
    if make is None:  # PyPy
        return json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_default).encode
    # markers, default, encoder, indent, separators, sort_keys, skipkeys, allow_nan; no markers: a cycle is a
    # RecursionError, and threads may encode one object at a time.
    encode: Any = make(None, _default, quote, None, ":", ",", False, False, False)
    return lambda value: "".join(encode(value, 0))


_dumps = _make_dumps()
_quote: Callable[[str], str] = json.encoder.encode_basestring

# Line readers of clients split at U+0085, U+2028 and U+2029; a lone surrogate has no UTF-8 form.
_UNSENDABLE = re.compile("[\x85\u2028\u2029\ud800-\udfff]")


def _utf8(text: str) -> bytes:
    """The bytes of JSON text, with escapes for what must not or cannot be sent raw."""
    if text.isascii():
        return text.encode()
    return _UNSENDABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text).encode()


def _dict(value: Any) -> _JSON:
    """A JSON object, or an empty one in the place of anything else."""
    return cast(_JSON, value) if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    """A JSON array, or an empty one in the place of anything else."""
    return value if isinstance(value, list) else []  # pyright: ignore[reportUnknownVariableType]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # it could not be sent back
        raise ValueError(f"{text} is too large")
    return number


_loads = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite).decode


# ---- Errors ----------------------------------------------------------------------------------------------------------

_FIELD_NAME = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_FIELD_VALUE = r"[\t\x20-\x7e\xa0-\xff]*"


def _header_fields(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Header fields as given, refused where they could not go on the wire as one field each."""
    fields = dict(headers or {})
    for name, value in fields.items():
        if not re.fullmatch(_FIELD_NAME, name):
            raise ValueError(f"not a header field name: {name!r}")
        if name.lower() in ("content-length", "transfer-encoding"):
            raise ValueError(f"the server itself sets {name}; use Raw(...) or Disconnect() to break an answer")
        if not re.fullmatch(_FIELD_VALUE, value):
            raise ValueError(f"not a header field value, which is one line of Latin-1: {value!r} in {name!r}")
    return fields


class APIError(Exception):
    """An error of the API: a handler returns or raises it, and the client gets it with its HTTP status.

    The body is `{"error": {"message", "type", "param", "code"}}`. `type` defaults to what the API calls that
    status. `headers` are sent beside the usual ones. Raises ValueError for a status that is not an error's,
    and for headers that could not be sent.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if isinstance(status, str):
            raise TypeError(f"APIError takes the status first, then the message, not {status!r}, {message!r}")
        if not 400 <= status <= 599:
            raise ValueError(f"not the status of an error, which is 400 to 599: {status}")
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or ("server_error" if status >= 500 else "invalid_request_error")
        self.code = code
        self.param = param
        self.headers = _header_fields(headers)

    def __repr__(self) -> str:
        return f"APIError({self.status}, {self.message!r}, type={self.type!r}, code={self.code!r})"

    def _error(self) -> _JSON:
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}


def rate_limit(retry_after: float = 0.02) -> APIError:
    """The 429 of a rate limit, with the headers that clients read. `retry_after`: seconds.

    `retry-after-ms` says it exactly; `retry-after` in whole seconds, as RFC 9110 10.2.3 has it.
    """
    milliseconds = max(1, round(retry_after * 1000))
    return APIError(
        429,
        "Rate limit reached for gpt-4o in organization org-fake on requests per min (RPM): Limit 500, Used 500, "
        f"Requested 1. Please try again in {milliseconds}ms. "
        "Visit https://platform.openai.com/account/rate-limits to learn more.",
        type="requests",
        code="rate_limit_exceeded",
        headers={
            "retry-after": str(math.ceil(retry_after)),
            "retry-after-ms": str(milliseconds),
            "x-ratelimit-limit-requests": "500",
            "x-ratelimit-limit-tokens": "30000",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-remaining-tokens": "29990",
            "x-ratelimit-reset-requests": f"{milliseconds}ms",
            "x-ratelimit-reset-tokens": "20ms",
        },
    )


class _Gone(Exception):
    """The client has left, or the server is stopping: there is nobody to answer."""


def _check_fields(owner: object, **fields: tuple[object, type | tuple[type, ...]]) -> None:
    """Raises TypeError where a field is not of its type: the mistake shows where the value is made."""
    for name, (value, kind) in fields.items():
        if not isinstance(value, kind):
            wanted = kind.__name__ if isinstance(kind, type) else " or ".join(each.__name__ for each in kind)
            raise TypeError(f"{type(owner).__name__} wants {wanted} for {name}, not {value!r}")
        if kind in (int, _SECONDS) and not 0 <= cast(float, value) <= threading.TIMEOUT_MAX:
            raise ValueError(f"{type(owner).__name__} wants {name} of 0 or more, not {value!r}")


_WORD = (str, type(None))  # a string that may be left out
_NUMBER = (int, type(None))
_SECONDS = (int, float)


# ---- What the client sent --------------------------------------------------------------------------------------------


class _Headers(Mapping[str, str]):
    """Header fields by name, in any case; a field sent several times is joined with commas (RFC 9110 5.3)."""

    __slots__ = ("_fields",)

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._fields: dict[str, str] = {}
        for name, value in pairs:
            key = name.lower()
            self._fields[key] = f"{self._fields[key]}, {value}" if key in self._fields else value

    @override
    def __getitem__(self, name: str) -> str:
        return self._fields[name.lower()]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    @override
    def __len__(self) -> int:
        return len(self._fields)

    @override
    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._fields

    @override
    def __repr__(self) -> str:
        return f"Headers({self._fields!r})"


def _text_of(content: object) -> str:
    """All the text of a message's content: a string, or a list of content parts."""
    if isinstance(content, str):
        return content
    parts = (part if isinstance(part, str) else _dict(part).get("text") for part in _list(content))
    return "".join(part for part in parts if isinstance(part, str))


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation. `content` is as it came: a string, a list of content parts, or None.

    `tool_calls` are the calls that an assistant's message makes; `tool_call_id` names the call that a tool's
    message answers.
    """

    role: str
    content: Any = None
    tool_calls: tuple[ToolCall | CustomToolCall, ...] = ()
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """All the text of the content."""
        return _text_of(self.content)


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that the request offers, in one shape for both APIs. A hosted tool (`web_search`) has a type only."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool | None = None
    type: str = "function"


def _tool(value: object) -> Tool:
    tool = _dict(value)
    kind = _string(tool.get("type"))
    about = (_dict(tool.get(kind)) if kind in ("function", "custom") else {}) or tool  # Chat Completions nests it
    return Tool(
        _string(about.get("name")), about.get("description"), about.get("parameters"), about.get("strict"), type=kind
    )


def _chat_call(value: object) -> ToolCall | CustomToolCall | None:
    call = _dict(value)
    for key, kind, text in (("function", ToolCall, "arguments"), ("custom", CustomToolCall, "input")):
        if about := _dict(call.get(key)):
            return kind(_string(about.get("name")), _string(about.get(text)), id=_string(call.get("id")))
    return None


def _chat_messages(value: object) -> list[Message]:
    """The messages of a Chat Completions request."""
    messages: list[Message] = []
    for each in _list(value):
        sent = _dict(each)
        calls = sent.get("tool_calls")
        made = [call for each in _list(calls) if (call := _chat_call(each)) is not None] if calls else ()
        id = sent.get("tool_call_id")
        messages.append(
            Message(_string(sent.get("role")), sent.get("content"), tuple(made), id if isinstance(id, str) else None)
        )
    return messages


def _item_type(item: _JSON) -> Any:
    """The type of an input item; only messages and references may lack it (S)."""
    kind = item.get("type")
    return kind if kind is not None else "item_reference" if "id" in item and "role" not in item else "message"


def _items_messages(items: Iterable[object]) -> list[Message]:
    """The messages that a model sees in Responses items. Calls join the assistant's message before them."""
    messages: list[Message] = []
    for each in items:
        item = _dict(each)
        kind = _item_type(item)
        if kind == "message":
            messages.append(Message(_string(item.get("role")), item.get("content")))
        elif kind in ("function_call", "custom_tool_call"):
            make, key = (ToolCall, "arguments") if kind == "function_call" else (CustomToolCall, "input")
            call = make(_string(item.get("name")), _string(item.get(key)), id=_string(item.get("call_id")))
            if messages and messages[-1].role == "assistant":
                before = messages.pop()
                messages.append(Message("assistant", before.content, (*before.tool_calls, call)))
            else:
                messages.append(Message("assistant", None, (call,)))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            messages.append(Message("tool", item.get("output"), tool_call_id=_string(item.get("call_id"))))
    return messages


def _input_items(value: object) -> list[Any]:
    """A Responses request's `input` as a list of items."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": value}]}]
    return list(_list(value))


_NOT_JSON = {  # by whether it came to Chat Completions
    True: "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP "
    "library correctly. The OpenAI API expects a JSON payload, but what was sent was not valid JSON. If you have "
    "trouble figuring out how to fix this, please contact us through our help center at help.openai.com.)",
    False: "Invalid body: failed to parse JSON value. Please check the value to ensure it is valid JSON. (Common "
    "errors include trailing commas, missing closing brackets, missing quotation marks, etc.)",
}


def _too_deep(value: Any) -> bool:
    """Whether JSON is nested deeper than what follows it recursively can bear."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


_OWN_KEYS = frozenset(("model", "messages", "stream", "tools", "prompt", "input"))


class Request:
    """What the client asked, in one view of both APIs.

    `api` is "chat.completions", "responses", or "" for other endpoints. `body` is the JSON, decoded; `raw_body` the
    bytes (after Content-Encoding); `method`, `path`, `query` and `headers` (by name in any case) are the HTTP
    request's. A Request is kept in `server.requests` after its answer.
    """

    __slots__ = (
        "_body",
        "_connection",
        "_conversation",
        "_deployment",
        "_encoder",
        "_gone",
        "_messages",
        "_outcome",
        "_seconds",
        "_status",
        "api",
        "headers",
        "method",
        "path",
        "query",
        "raw_body",
    )

    def __init__(
        self, api: str, method: str, path: str, query: str, headers: Mapping[str, str], raw_body: bytes = b""
    ) -> None:
        self.api = api
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.raw_body = raw_body
        self._deployment: str | None = None  # Azure names the model in the path
        self._body: _JSON | None = None
        self._messages: list[Message] | None = None
        self._conversation: list[Any] | None = None  # Responses: stored turns and input, where they are not the input
        self._connection: _Connection | None = None
        self._gone = False
        # What became of it, for the transcript and the command line.
        self._status = 0  # 0: cut before any reply
        self._seconds = 0.0
        self._outcome = ""  # why the answer is not whole
        self._encoder: _Encoder | None = None  # what was said; the last few requests have it

    def _parse(self) -> _JSON:
        """The JSON object in the body. Raises APIError where there is none."""
        try:
            found: Any = _loads(self.raw_body.removeprefix(b"\xef\xbb\xbf").decode().strip(" \t\r\n"))
            if self.raw_body.count(b"{") + self.raw_body.count(b"[") > _MAX_DEPTH and _too_deep(found):
                raise RecursionError
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise APIError(400, _NOT_JSON[self.api == "chat.completions"])
        self._body = body = cast(_JSON, found)
        if self._deployment is not None and not body.get("model"):
            body["model"] = self._deployment
        return body

    @property
    def body(self) -> _JSON:
        """The JSON object that was sent; {} where there was none."""
        body = self._body
        if body is None:
            try:
                body = self._parse()
            except APIError:  # the client was told
                body = self._body = {}
        return body  # not the attribute: _forget() may clear it at any time

    def _forget(self) -> None:
        """Drops what can be made again from the bytes: the journal holds many requests."""
        if self._connection is not None:
            self._gone = self._connection.state is _State.GONE
        self._body = self._messages = self._connection = None

    @property
    def model(self) -> str:
        """The model that was asked for."""
        return _string(self.body.get("model"))

    @property
    def stream(self) -> bool:
        """Whether the client wants server-sent events."""
        return self.body.get("stream") is True

    @property
    def messages(self) -> list[Message]:
        """The conversation as the model sees it.

        For Responses: `instructions`, then the stored turns behind `previous_response_id`, then `input`.
        """
        messages = self._messages
        if messages is None:
            responses = self.api == "responses"
            messages = _items_messages(self._items) if responses else _chat_messages(self.body.get("messages"))
            self._messages = messages
        return messages

    @property
    def _items(self) -> list[Any]:
        instructions = self.body.get("instructions")
        if isinstance(instructions, str):
            instructions = [{"role": "system", "content": instructions}]
        items = _input_items(self.input) if self._conversation is None else self._conversation
        return [*_input_items(instructions), *items]

    @property
    def text(self) -> str:
        """The text of the last user message; "" where there is none."""
        for message in reversed(self.messages):
            if message.role == "user":
                return message.text
        return ""

    @property
    def tools(self) -> list[Tool]:
        """The tools that are offered, in one shape for both APIs."""
        return [_tool(tool) for tool in _list(self.body.get("tools"))]

    @property
    def prompt(self) -> Any:
        """`prompt`, as it came."""
        return self.body.get("prompt")

    @property
    def input(self) -> Any:
        """`input`, as it came."""
        return self.body.get("input")

    @property
    def options(self) -> dict[str, Any]:
        """Every key of the body that has no attribute of its own: `temperature`, `instructions`, ..."""
        return {key: value for key, value in self.body.items() if key not in _OWN_KEYS}

    @property
    def disconnected(self) -> bool:
        """Whether the client has left before its answer was whole."""
        connection = self._connection
        return self._gone if connection is None else connection.peer_gone()

    @property
    def _said(self) -> list[_Spoken]:
        """What the answer said, each part whole."""
        return [] if self._encoder is None else [item.whole for item in self._encoder.items]

    @override
    def __repr__(self) -> str:
        if not self.api:
            return f"<Request {self.method} {self.path}>"
        text = self.text if len(self.text) <= 40 else self.text[:39] + "…"
        return f"<Request {self.api} {self.model}{' stream' if self.stream else ''} {text!r}>"


def _estimate(items: Iterable[object]) -> int:
    """About how many tokens messages or items are: four characters each, and four for what is around a message."""
    tokens = 3
    for item in items:
        sent = cast(_JSON, item) if isinstance(item, dict) else {}
        content = sent.get("content")
        text = content if isinstance(content, str) else _text_of(content)
        for key in ("output", "arguments"):
            if key in sent:
                text += _text_of(sent[key])
        tokens += 4 + (len(text) + 3) // 4
    return tokens


# ---- What the API refuses --------------------------------------------------------------------------------------------
# Each parameter is one entry of `_CHAT` or `_RESPONSES`; the entries stand in the API's order of checks (P). Beside the
# marks of the module's docstring, I* is a public report that was not verified, B what this server could not bear.

# A rule looks at a value, its path ("tools[0].type") and the object that holds it, and raises APIError for a fault.
_Rule: TypeAlias = "Callable[[Any, str, dict[str, Any]], None]"

_KINDS: dict[type, str] = {
    dict: "an object", str: "a string", int: "an integer", float: "a decimal", bool: "a boolean", list: "an array",
    type(None): "null",
}  # fmt: skip


def _bad_request(message: str, param: str | None, code: str | None = None) -> APIError:
    return APIError(400, message, type="invalid_request_error", code=code, param=param)


def _missing(path: str) -> APIError:
    return _bad_request(f"Missing required parameter: '{path}'.", path, "missing_required_parameter")


def _outside(path: str, problem: str, expected: str, got: object, code: str) -> APIError:
    return _bad_request(f"Invalid '{path}': {problem}. Expected {expected}, but got {got} instead.", path, code)


def _unsupported(path: str, value: str, supported: Iterable[str]) -> APIError:
    *most, last = (f"'{name}'" for name in supported)
    listed = f"{', '.join(most)}{',' if len(most) > 1 else ''} and {last}" if most else last
    return _bad_request(f"Invalid value: '{value}'. Supported values are: {listed}.", path, "invalid_value")


def _anything(value: Any, path: str, holder: dict[str, Any]) -> None:
    """What no source constrains."""


def _either(expected: str, *rules: tuple[type, _Rule]) -> _Rule:
    """A value of one of these exact types (to the API a boolean is no integer), by its type's rule."""
    by_type = dict(rules)

    def rule(value: Any, path: str, holder: dict[str, Any]) -> None:
        further = by_type.get(value.__class__)
        if further is None:
            got = _KINDS.get(value.__class__, "an object")
            raise _bad_request(
                f"Invalid type for '{path}': expected {expected}, but got {got} instead.", path, "invalid_type"
            )
        further(value, path, holder)

    return rule


_boolean, _any_object = _either("a boolean", (bool, _anything)), _either("an object", (dict, _anything))


def _length(kind: str, low: int, high: int) -> _Rule:
    noun = kind.split()[1]

    def rule(value: Any, path: str, holder: dict[str, Any]) -> None:
        if len(value) < low:
            least = f"{kind} with minimum length {low}"
            raise _outside(path, f"empty {noun}", least, f"an empty {noun}", f"empty_{noun}")
        if len(value) > high:
            most, got = f"{kind} with maximum length {high}", f"{kind} with length {len(value)}"
            raise _outside(path, f"{noun} too long", most, got, f"{noun}_above_max_length")

    return rule


def _bounded_string(low: int = 0, high: int = sys.maxsize) -> _Rule:
    return _either("a string", (str, _length("a string", low, high)))


_any_string, _name = _either("a string", (str, _anything)), _bounded_string(low=1)  # empty: I* 'tools[0].function.name'


def _between(word: str, low: float, high: float) -> _Rule:
    def rule(value: Any, path: str, holder: dict[str, Any]) -> None:
        if value < low:
            raise _outside(path, f"{word} below minimum value", f"a value >= {low}", value, f"{word}_below_min_value")
        if value > high:
            raise _outside(path, f"{word} above maximum value", f"a value <= {high}", value, f"{word}_above_max_value")

    return rule


def _integer(low: float = -math.inf, high: float = math.inf) -> _Rule:
    return _either("an integer", (int, _between("integer", low, high)))


def _decimal(low: float, high: float) -> _Rule:
    between = _between("decimal", low, high)
    return _either("a decimal", (float, between), (int, between))


def _enum(*supported: str) -> _Rule:
    def rule(value: Any, path: str, holder: dict[str, Any]) -> None:
        if value not in supported:
            raise _unsupported(path, value, supported)

    return _either("a string", (str, rule))


def _array(of: _Rule, expected: str = "an array of objects", low: int = 0, high: int = sys.maxsize) -> _Rule:
    length = _length("an array", low, high)

    def rule(value: Any, path: str, holder: dict[str, Any]) -> None:
        length(value, path, holder)
        for i, member in enumerate(value):
            of(member, f"{path}[{i}]", holder)

    return _either(expected, (list, rule))


def _object(required: dict[str, _Rule], optional: dict[str, _Rule] | None = None) -> _Rule:
    """Required members may not be null; optional ones may, as clients send explicit nulls."""

    def rule(value: Any, path: str, holder: dict[str, Any]) -> None:
        for name, member in required.items():
            if name not in value:
                raise _missing(f"{path}.{name}")
            member(value[name], f"{path}.{name}", value)
        for name, member in (optional or {}).items():
            if value.get(name) is not None:
                member(value[name], f"{path}.{name}", value)

    return _either("an object", (dict, rule))


def _tagged(tag: str, cases: dict[str, _Rule], closed: bool = True) -> _Rule:
    """An object whose `tag` names its rule; a tag that isn't in `cases` passes unless `closed`."""
    tag_rule = _object({tag: _any_string})

    def rule(value: Any, path: str, holder: dict[str, Any]) -> None:
        tag_rule(value, path, holder)
        case = cases.get(value[tag])
        if case is not None:
            case(value, path, holder)
        elif closed:
            raise _unsupported(f"{path}.{tag}", value[tag], cases)

    return rule


def _map(of: _Rule, properties: int = sys.maxsize, name_length: int = sys.maxsize) -> _Rule:
    def rule(value: Any, path: str, holder: dict[str, Any]) -> None:
        if len(value) > properties:
            most, got = f"an object with at most {properties} properties", f"an object with {len(value)} properties"
            raise _outside(path, "too many properties", most, got, "object_above_max_properties")
        for name, member in value.items():
            if len(name) > name_length:  # the words are by analogy, the code is P
                most, got = f"a property name with maximum length {name_length}", f"one with length {len(name)}"
                raise _outside(path, "property name too long", most, got, "property_name_above_max_length")
            of(member, f"{path}.{name}", value)

    return _either("an object", (dict, rule))


def _string_or(*parts: tuple[type, _Rule]) -> _Rule:
    return _either("one of a string or array of objects", (str, _anything), *parts)  # P


def _is_simple(item: Any) -> bool:
    """Just a role and a text, as nearly all messages are: nothing more to look at."""
    return (
        item.__class__ is dict
        and len(item) == 2
        and item.get("role") in _SIMPLE_ROLES
        and item.get("content").__class__ is str
    )


# Chat's messages

_SIMPLE_ROLES = ("user", "assistant", "system", "developer")
_chat_parts: dict[str, _Rule] = {  # S, order I*
    "text": _object({"text": _any_string}),
    "image_url": _object({"image_url": _object({"url": _any_string})}),
    "input_audio": _object({"input_audio": _any_object}),
    "refusal": _object({"refusal": _any_string}),
    "audio": _any_object,
    "file": _object({"file": _any_object}),
}
_message_content = _string_or((list, _array(_tagged("type", _chat_parts))))
_chat_calls: dict[str, _Rule] = {  # S
    "function": _object({"id": _any_string, "function": _object({"name": _any_string, "arguments": _any_string})}),
    "custom": _object({"id": _any_string, "custom": _object({"name": _any_string, "input": _any_string})}),
}
_text_message = _object({"content": _message_content}, {"name": _any_string})
_calling_message = _object(
    {},
    {
        "content": _message_content,
        "name": _any_string,
        "refusal": _any_string,
        "tool_calls": _array(_tagged("type", _chat_calls), low=1),  # I*: Invalid 'messages[1].tool_calls': empty array.
        "function_call": _object({"name": _any_string, "arguments": _any_string}),
    },
)


def _assistant_message(value: Any, path: str, holder: dict[str, Any]) -> None:
    """S: an assistant's content may only lack where it said something else."""
    otherwise = ("tool_calls", "function_call", "refusal", "audio")
    rule = _text_message if all(value.get(name) is None for name in otherwise) else _calling_message
    rule(value, path, holder)


_roles: dict[str, _Rule] = {  # S, order I*
    "system": _text_message,
    "assistant": _assistant_message,
    "user": _text_message,
    "function": _object({"name": _any_string}, {"content": _message_content}),
    "tool": _object({"content": _message_content, "tool_call_id": _any_string}),
    "developer": _text_message,
}
_message_array = _array(_tagged("role", _roles), low=1)  # P, R (empty array)


def _messages(value: Any, path: str, holder: dict[str, Any]) -> None:
    if value is None:
        raise _missing(path)
    if value.__class__ is list and value and all(map(_is_simple, value)):
        return
    _message_array(value, path, holder)
    _pairing(value)


def _pairing(messages: list[Any]) -> None:
    """I: tool messages follow their call, and a call's answers come before anything else."""
    answered: dict[str, bool] = {}  # by the id of the last message's calls
    ended: list[Any] = [*messages, {"role": ""}]
    for index, message in enumerate(ended):
        if message["role"] == "tool":
            if message["tool_call_id"] not in answered:
                words = "messages with role 'tool' must be a response to a preceeding message with 'tool_calls'."
                raise _bad_request(f"Invalid parameter: {words}", f"messages.[{index}].role")
            answered[message["tool_call_id"]] = True
            continue
        if lacking := [call for call, done in answered.items() if not done]:
            raise _bad_request(
                "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
                f"'tool_call_id'. The following tool_call_ids did not have response messages: {', '.join(lacking)}",
                f"messages.[{min(index, len(messages) - 1)}].role",
            )
        calls = message.get("tool_calls") if message["role"] == "assistant" else None
        answered = {call["id"]: False for call in calls or ()}


# The Responses' input

_input_parts = ("input_text", "input_image", "output_text", "refusal", "input_file", "computer_screenshot")  # S, I*
_input_message = _object(
    {"content": _string_or((list, _array(_tagged("type", dict.fromkeys(_input_parts, _anything)))))}
)
_output_parts: dict[str, _Rule] = {"output_text": _anything, "refusal": _anything}  # I*, S
_output_message = _object({"content": _string_or((list, _array(_tagged("type", _output_parts))))})
_call_output = _object({"call_id": _any_string, "output": _string_or((list, _array(_any_object)))})
_item_roles: dict[str, _Rule] = {  # S
    "assistant": _output_message,
    "system": _input_message,
    "developer": _input_message,
    "user": _input_message,
}
_item_types: dict[str, _Rule] = {  # S; other types pass, as they grow
    "message": _tagged("role", _item_roles),
    "function_call": _object({"call_id": _any_string, "name": _any_string, "arguments": _any_string}),
    "function_call_output": _call_output,
    "custom_tool_call": _object({"call_id": _any_string, "name": _any_string, "input": _any_string}),
    "custom_tool_call_output": _call_output,
    "item_reference": _object({"id": _any_string}),
}
_typed_item = _tagged("type", _item_types, closed=False)


def _input_item(value: Any, path: str, holder: dict[str, Any]) -> None:
    if _is_simple(value):
        return
    if value.__class__ is dict and value.get("type") is None:
        value = {**value, "type": _item_type(value)}
    _typed_item(value, path, holder)


_item_array = _either("one of a string or array of input items", (str, _anything), (list, _array(_input_item)))  # P


def _input(value: Any, path: str, holder: dict[str, Any]) -> None:
    if value is not None:
        _item_array(value, path, holder)
        return
    instead = ("previous_response_id", "prompt", "conversation")  # S: each can stand for it
    if all(holder.get(name) is None for name in instead):
        raise _missing(path)


# Rules about more than one value


def _chat_model(value: Any, path: str, holder: dict[str, Any]) -> None:
    if value is None or value == "":
        raise _bad_request("you must provide a model parameter", None)
    if value.__class__ is not str:
        _any_string(value, path, holder)


def _responses_model(value: Any, path: str, holder: dict[str, Any]) -> None:
    if value is None:
        raise _missing(path)
    if value.__class__ is not str:
        _any_string(value, path, holder)


_stream_flags = _object({}, {"include_usage": _boolean, "include_obfuscation": _boolean})


def _stream_options(value: Any, path: str, holder: dict[str, Any]) -> None:
    if holder.get("stream") is not True:
        raise _bad_request("The 'stream_options' parameter is only allowed when 'stream' is enabled.", path)
    _stream_flags(value, path, holder)


_conversation_id = _either("one of a string or object", (str, _anything), (dict, _object({"id": _any_string})))


def _conversation_parameter(value: Any, path: str, holder: dict[str, Any]) -> None:
    if holder.get("previous_response_id") is not None:
        words = (
            "Mutually exclusive parameters: ''. Ensure you are only providing one of: 'pre..._id' or 'conversation'."
        )
        raise _bad_request(words, None, "mutually_exclusive_parameters")  # as the probe saw it, quotes and dots
    _conversation_id(value, path, holder)


def _moved(new: str) -> _Rule:
    def rule(value: Any, path: str, holder: dict[str, Any]) -> None:
        raise _bad_request(
            f"Unsupported parameter: '{path}'. In the Responses API, this parameter has moved to '{new}'. Try again "
            "with the new parameter. See the API documentation for more information: "
            "https://platform.openai.com/docs/api-reference/responses/create.",
            None,
            "unsupported_parameter",
        )

    return rule


# The tables

_EFFORTS = _enum("none", "minimal", "low", "medium", "high", "xhigh", "max")  # S
_VERBOSITIES = _enum("low", "medium", "high")  # P
_SERVICE_TIERS = ("auto", "default", "flex", "scale", "priority", "fast")  # S
_metadata = _map(_bounded_string(high=512), properties=16, name_length=64)  # P
_named = _object({"name": _name})
_chat_tools = {"function": _object({"function": _named}), "custom": _object({"custom": _named})}  # S, closed: I*
_chat_choices = {**_chat_tools, "allowed_tools": _object({"allowed_tools": _any_object})}  # S
_named_tools: dict[str, _Rule] = {"function": _named, "custom": _named}  # S; hosted tools pass, as they grow
_schema = _object({"name": _name, "schema": _any_object})
_formats: dict[str, _Rule] = {"json_object": _anything, "json_schema": _schema, "text": _anything}  # S
_chat_formats: dict[str, _Rule] = {**_formats, "json_schema": _object({"json_schema": _named})}  # S
_stop = _array(_any_string, "an array of strings", high=4)  # S: up to 4 sequences
_includes = (  # S
    "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs",
    "reasoning.encrypted_content", "message.output_text.logprobs",
)  # fmt: skip


def _choice(of: _Rule, *words: str) -> _Rule:
    return _either("one of a string or object", (str, _enum(*words)), (dict, of))


_CHAT: dict[str, _Rule] = {
    "model": _chat_model,  # P; B
    "messages": _messages,  # P, R, I; B
    "functions": _array(_named),  # S
    "function_call": _choice(_named, "none", "auto"),  # S
    "tools": _array(_tagged("type", _chat_tools), low=1),  # S; I*: Invalid 'tools': empty array.
    "tool_choice": _choice(_tagged("type", _chat_choices), "none", "auto", "required"),  # S
    "parallel_tool_calls": _boolean,  # S
    "max_completion_tokens": _integer(1),  # P
    "n": _integer(1, _MAX_CHOICES),  # P
    "temperature": _decimal(0, 2),  # R, P; S
    "top_p": _decimal(0, 1),  # S
    "presence_penalty": _decimal(-2, 2),  # S
    "frequency_penalty": _decimal(-2, 2),  # S
    "logprobs": _boolean,  # S
    "top_logprobs": _integer(0, 20),  # S
    "user": _any_string,  # S
    "seed": _integer(),  # S
    "moderation": _any_object,  # S
    "audio": _any_object,  # S
    "modalities": _array(_enum("text", "audio"), "an array of strings"),  # S
    "web_search_options": _any_object,  # S
    "prompt_cache_key": _any_string,  # S
    "prompt_cache_options": _any_object,  # S
    "prompt_cache_retention": _any_string,  # S; no enum: "in-memory" was once its spelling
    "safety_identifier": _bounded_string(high=128),  # S
    "response_format": _tagged("type", _chat_formats),  # S
    "service_tier": _enum(*_SERVICE_TIERS),  # S
    "max_tokens": _integer(1),  # S
    "reasoning_effort": _EFFORTS,  # S
    "logit_bias": _map(_decimal(-100, 100)),  # S
    "stop": _either("one of a string or array of strings", (str, _anything), (list, _stop)),  # S
    "stream": _boolean,  # B
    "stream_options": _stream_options,  # S
    "store": _boolean,  # S
    "metadata": _metadata,  # P
    "prediction": _any_object,  # S
    "verbosity": _VERBOSITIES,  # P
}

_RESPONSES: dict[str, _Rule] = {
    "model": _responses_model,  # P; B
    "messages": _moved("input"),  # P
    "response_format": _moved("text.format"),  # I*
    "reasoning_effort": _moved("reasoning.effort"),  # I*
    "moderation": _any_object,  # S
    "input": _input,  # P; B
    "include": _array(_enum(*_includes), "an array of strings"),  # S
    "tools": _array(_tagged("type", _named_tools, closed=False), "an array of tools"),  # P; S
    "metadata": _metadata,  # P
    "text": _object({}, {"format": _tagged("type", _formats), "verbosity": _VERBOSITIES}),  # S
    "temperature": _decimal(0, 2),  # R, P; S
    "top_p": _decimal(0, 1),  # S
    "tool_choice": _choice(_tagged("type", _named_tools, closed=False), "none", "auto", "required"),  # S
    "parallel_tool_calls": _boolean,  # S
    "stream": _boolean,  # B
    "stream_options": _stream_options,  # S
    "background": _boolean,  # S
    "max_output_tokens": _integer(16),  # P
    "max_tool_calls": _integer(),  # S
    "reasoning": _object({}, {"effort": _EFFORTS, "summary": _enum("auto", "concise", "detailed")}),  # S
    "user": _any_string,  # S
    "prompt_cache_key": _any_string,  # S
    "prompt_cache_options": _any_object,  # S
    "prompt_cache_retention": _any_string,  # S
    "safety_identifier": _bounded_string(high=128),  # S
    "truncation": _enum("auto", "disabled"),  # S
    "instructions": _any_string,  # S
    "store": _boolean,  # S
    "service_tier": _enum(*_SERVICE_TIERS, "ultrafast"),  # S
    "top_logprobs": _integer(0, 20),  # S
    **dict.fromkeys(("access_programs", "background_options", "context_management", "image"), _anything),  # S: known
    "conversation": _conversation_parameter,  # P
    "prompt": _object({"id": _any_string}),  # S
    "previous_response_id": _any_string,  # S
}


_ORDERS = {  # P. The rules; what is looked for before unknown parameters; and where null is as absent.
    "chat.completions": (_CHAT, ("model", "messages"), ("model", "messages")),
    "responses": (_RESPONSES, ("model",), ("model", "input")),
}


def _check_request(api: str, body: dict[str, Any], strict: bool) -> None:
    """Raises the first fault of a request, in the API's order of checks. `strict`: unknown parameters are faults."""
    rules, first, required = _ORDERS[api]
    for name in first:
        if (value := body.get(name)) is None or value == "":
            rules[name](value, name, body)
    if strict:
        for name in body:
            if name not in rules:
                raise _unknown_parameter(name, body, rules)
    for name, rule in rules.items():
        value = body.get(name)
        if value is not None or name in required:
            rule(value, name, body)


def _unknown_parameter(name: str, body: dict[str, Any], known: Iterable[str]) -> APIError:
    near = [(_distance(name, other), other) for other in known if other not in body and abs(len(other) - len(name)) < 3]
    distance, other = min(near, default=(3, ""))
    hint = f" Did you mean '{other}'?" if distance < 3 else ""
    return _bad_request(f"Unknown parameter: '{name}'.{hint}", name, "unknown_parameter")


def _distance(left: str, right: str) -> int:
    """Levenshtein's."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


_OPAQUE = ("item_reference", "compaction")  # these may stand for any item


class _ItemFacts(NamedTuple):
    """What the rules between input items look at; "" where the item does not say it."""

    type: str
    id: str
    call_id: str
    role: str


def _check_conversation(items: list[Any], start: int, reasons: bool = True) -> None:
    """Raises the first fault between input items: items[:start] are stored turns, the rest is the request's `input`.

    `reasons` tells whether the model reasons: only such a model puts reasoning before its web searches (R).
    """
    facts = [
        _ItemFacts(_string(_item_type(item)), *(_string(item.get(name)) for name in ("id", "call_id", "role")))
        for item in map(_dict, items)
    ]
    _check_ids(facts, start)
    if not any(item.type in _OPAQUE for item in facts):
        _check_calls(facts, start)
    _check_reasoning(facts, start, reasons)


def _check_ids(facts: list[_ItemFacts], start: int) -> None:
    """I: no id comes twice."""
    seen: set[str] = set()
    for index, item in enumerate(facts):
        if item.id in seen and index >= start:
            words = f"Duplicate item found with id {item.id}. Remove duplicate items from your input and try again."
            raise _bad_request(words, "input")
        if item.id:
            seen.add(item.id)


def _check_calls(facts: list[_ItemFacts], start: int) -> None:
    """I: every call has its output, and every new output its call."""
    called = {item.call_id for item in facts if item.type.endswith("_call")}
    answered = {item.call_id for item in facts if item.type.endswith("_call_output")}
    for item in facts[start:]:
        if item.type == "function_call_output" and item.call_id not in called:
            words = f"No tool call found for function call output with call_id {item.call_id}."
            raise _bad_request(words, "input")
    for item in facts:
        if item.type == "function_call" and item.call_id not in answered:
            raise _bad_request(f"No tool output found for function call {item.call_id}.", "input")


def _check_reasoning(facts: list[_ItemFacts], start: int, reasons: bool) -> None:
    """R, I*: a reasoning item goes with what the model said after it. What has no id is new: nothing belongs to it."""
    before = False  # whether reasoning has come since the user spoke
    for index, item in enumerate(facts):
        if item.type == "reasoning" or item.type in _OPAQUE:
            before = True
        elif item.role not in ("", "assistant"):
            before = False
        if index < start or not item.id:
            continue
        if item.type == "reasoning" and _ends_turn(facts, index):
            words = f"Item '{item.id}' of type 'reasoning' was provided without its required following item."
            raise _bad_request(words, "input")
        if item.type == "web_search_call" and reasons and not before:  # the API adds the missing item's id
            words = f"Item '{item.id}' of type 'web_search_call' was provided without its required 'reasoning' item."
            raise _bad_request(words, "input")


def _ends_turn(facts: list[_ItemFacts], index: int) -> bool:
    """Whether nothing of the model's follows an item."""
    if index + 1 == len(facts):
        return True
    after = facts[index + 1]
    return after.type.endswith("_output") or after.role not in ("", "assistant")


# ---- What a handler answers ------------------------------------------------------------------------------------------
# A part is a piece of what the model says, or a thing that happens on the wire. A fragment of a part is a part.
# To make one with a field of the wrong type raises TypeError, with a value that cannot be ValueError.

# Words with the space before them, as the models' own tokens are; a long word is several.
_TOKEN = re.compile(r"\s*(?:\w{1,16}|[^\w\s]{1,16})(?:\s+\Z)?|\s+\Z")


def _split_text(text: str) -> tuple[str, ...]:
    return tuple(_TOKEN.findall(text))


_split_short = lru_cache(4096)(_split_text)  # what a list of Texts or a generator gives is short, and comes again


def _tokens(text: str) -> tuple[str, ...]:
    """The word-sized pieces that a stream sends of a text; joined, they are the text."""
    return _split_short(text) if len(text) <= 32 else _split_text(text)


def _host(url: str) -> str:
    return url.partition("://")[2].partition("/")[0] or url


def _citations(text: str, sources: Sequence[str]) -> list[_JSON]:
    """url_citation annotations, Responses form: where the text names the source, else the whole text."""
    spans: list[tuple[int, int, str]] = []
    whole: list[tuple[int, int, str]] = []
    for url in sources:
        at = text.find(url)
        if at >= 0:
            spans.append((at + len(url), at, url))
        else:
            whole.append((len(text), 0, url))
    return [
        {"type": "url_citation", "end_index": end, "start_index": begin, "title": _host(url), "url": url}
        for end, begin, url in sorted(spans) + whole
    ]


class _Item:
    """One thing being said: the part that opened it, and the fragments it has grown by."""

    index = 0  # of a tool call, among its choice's
    id = ""  # Responses: the item's id
    call_id = ""
    sources: Sequence[str] = ()  # what a message after a web search cites
    cited = 0  # of them, in the stream so far
    opened = False  # Responses: the events before the first delta are sent
    form = ""  # of its delta events: see _Deltas
    status = "in_progress"

    def __init__(self, part: _Spoken, position: int) -> None:
        self.part = part
        self.pieces: list[str] = []
        self.entries: list[_JSON] = []  # logprobs, one a token, where they were asked for
        self.position = position  # output_index in Responses

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def join(self) -> None:
        """Makes one piece of all, on the thread that adds them: others may read `text` meanwhile, and only read."""
        self.pieces[:] = [self.text]

    @property
    def whole(self) -> _Spoken:
        return self.part._with(self.text)


class _Part:
    """A part of an answer."""

    __slots__ = ()

    def _act(self, answer: _Delivery) -> None:
        """Does what a part does that is not said by the model."""


class _Spoken(_Part):
    """A part that the model says. It has one string that grows (`_grows` names it) while a stream is sent."""

    __slots__ = ()
    _grows: ClassVar[str]
    _prefix: ClassVar[str]  # of the item's id in Responses
    _padded: ClassVar[bool] = True  # whether Responses obfuscates its deltas
    _in_chat: ClassVar[bool] = True  # whether Chat Completions has a place for it
    choice: int = 0

    def split(self) -> list[Self]:
        """The fragments that a stream sends: parts of the same kind, word-sized, the first with the name and id."""
        texts = self._fragments()
        return [self._with(texts[0]), *map(self._more, texts[1:])] if texts else [self]

    def merge(self, fragment: Self) -> Self:
        """The part that this one and the fragment after it make together.

        `functools.reduce(type(part).merge, part.split()) == part`, for every part. Raises ValueError for a
        fragment that is not this part's.
        """
        if not fragment._continues(self):
            raise ValueError(f"{fragment!r} does not go on with {self!r}")
        return self._with(self._string + fragment._string)

    @property
    def _string(self) -> str:
        return cast(str, getattr(self, self._grows))

    def _fragments(self) -> Sequence[str]:
        return _tokens(self._string)

    def _with(self, text: str) -> Self:
        """This part with another string."""
        return replace(self, **{self._grows: text})  # type: ignore[type-var]  # what is made are dataclasses

    def _more(self, text: str) -> Self:
        """A fragment that goes on with this part."""
        return self._with(text)

    def _continues(self, opened: _Spoken) -> bool:
        return type(opened) is type(self) and opened.choice == self.choice

    # Chat Completions: deltas, and the message's fields.

    def _chat_role(self, item: _Item) -> _JSON:
        """The delta that opens a choice."""
        return {"role": "assistant", "content": "", "refusal": None}

    def _chat_head(self, item: _Item) -> _JSON | None:
        """The delta that opens this part, where it needs one beside the role's."""
        return None

    def _chat_delta(self, item: _Item, text: str) -> _JSON:
        raise NotImplementedError

    def _chat_message(self, item: _Item, message: _JSON) -> None:
        """Writes a whole part into the message."""

    # Responses: the item, and the events between output_item.added and .done.

    def _item(self, item: _Item, encoder: _ResponsesEncoder, whole: bool) -> _JSON:
        """The item: whole, as in output_item.done and in the response, or nothing said, as in output_item.added."""
        raise NotImplementedError

    def _opening(self, item: _Item) -> list[tuple[str, _JSON]]:
        return []

    def _delta(self, item: _Item) -> tuple[str, _JSON]:
        """The type of the delta event, and the keys that are its own."""
        raise NotImplementedError

    def _closing(self, item: _Item) -> list[tuple[str, _JSON]]:
        return []


class _MessagePart(_Spoken):
    """What Text and Refusal share: a message item with one content part."""

    __slots__ = ()
    _prefix = "msg_"
    _grows = "text"
    _type: ClassVar[str]  # of the content part, and of its events
    _key: ClassVar[str]  # of the text in both
    text: str

    def __post_init__(self) -> None:
        if type(self.text) is not str or type(self.choice) is not int or self.choice < 0:  # thousands in a stream
            _check_fields(self, text=(self.text, str), choice=(self.choice, int))

    def _fragments(self) -> Sequence[str]:
        return _tokens(self.text) or ("",)  # an empty text is said too: mirascope waits for a delta

    def _item(self, item: _Item, encoder: _ResponsesEncoder, whole: bool) -> _JSON:
        content = [self._content_part(item)] if whole else []
        phase = {"phase": "final_answer"} if encoder.model.phase else {}
        status = item.status if whole else "in_progress"
        return {"id": item.id, "type": "message", "status": status, "content": content, **phase, "role": "assistant"}

    def _content_part(self, item: _Item, whole: bool = True) -> _JSON:
        raise NotImplementedError

    def _opening(self, item: _Item) -> list[tuple[str, _JSON]]:
        part = self._content_part(item, whole=False)
        return [("response.content_part.added", {"content_index": 0, "item_id": item.id, "part": part})]

    def _closing(self, item: _Item) -> list[tuple[str, _JSON]]:
        where = {"content_index": 0, "item_id": item.id}
        logprobs = {"logprobs": item.entries} if self._type == "output_text" else {}
        return [
            (f"response.{self._type}.done", {**where, **logprobs, self._key: item.text}),
            ("response.content_part.done", {**where, "part": self._content_part(item)}),
        ]


@dataclass(frozen=True, slots=True)
class Text(_MessagePart):
    """Text of the answer. A given Text is sent in word-sized deltas; several in a row are one text.

    `choice` is the index of the choice that says it (Chat Completions' n).
    """

    text: str
    _: KW_ONLY
    choice: int = 0

    _type = "output_text"
    _key = "text"

    def _chat_delta(self, item: _Item, text: str) -> _JSON:
        return {"content": text}

    def _chat_message(self, item: _Item, message: _JSON) -> None:
        text = item.text
        before = message["content"] or ""
        message["content"] = before + text
        for citation in _citations(text, item.sources) if item.sources else ():
            begin, end = citation["start_index"] + len(before), citation["end_index"] + len(before)
            source = {"end_index": end, "start_index": begin, "title": citation["title"], "url": citation["url"]}
            message["annotations"].append({"type": "url_citation", "url_citation": source})

    def _content_part(self, item: _Item, whole: bool = True) -> _JSON:
        text = item.text if whole else ""
        annotations = _citations(text, item.sources) if whole else []
        entries = item.entries if whole else []
        return {"type": "output_text", "annotations": annotations, "logprobs": entries, "text": text}

    def _delta(self, item: _Item) -> tuple[str, _JSON]:
        return "response.output_text.delta", {"content_index": 0, "logprobs": []}


@dataclass(frozen=True, slots=True)
class Refusal(_MessagePart):
    """The model refuses, in these words (`message.refusal`; a refusal content part in Responses)."""

    text: str
    _: KW_ONLY
    choice: int = 0

    _type = "refusal"
    _key = "refusal"

    def _chat_role(self, item: _Item) -> _JSON:
        return {"role": "assistant", "content": None, "refusal": ""}

    def _chat_delta(self, item: _Item, text: str) -> _JSON:
        return {"refusal": text}

    def _chat_message(self, item: _Item, message: _JSON) -> None:
        message["refusal"] = (message["refusal"] or "") + item.text

    def _content_part(self, item: _Item, whole: bool = True) -> _JSON:
        return {"type": "refusal", "refusal": item.text if whole else ""}

    def _delta(self, item: _Item) -> tuple[str, _JSON]:
        return "response.refusal.delta", {"content_index": 0}


@dataclass(frozen=True, slots=True)
class Reasoning(_Spoken):
    """The model thinks first: a reasoning item in Responses; in Chat Completions only tokens in the usage.

    `encrypted_content` is sent where the request includes `reasoning.encrypted_content`; made up if not given.
    """

    summary: str = ""
    _: KW_ONLY
    encrypted_content: str | None = None

    _grows = "summary"
    _prefix = "rs_"
    _in_chat = False

    def __post_init__(self) -> None:
        _check_fields(self, summary=(self.summary, str), encrypted_content=(self.encrypted_content, _WORD))

    def _continues(self, opened: _Spoken) -> bool:
        return isinstance(opened, Reasoning) and self.encrypted_content in (None, opened.encrypted_content)

    def _item(self, item: _Item, encoder: _ResponsesEncoder, whole: bool) -> _JSON:
        secret = {}
        if encoder.includes("reasoning.encrypted_content"):  # it differs each time it is sent (R)
            secret = {"encrypted_content": self.encrypted_content or encoder.secret(item)}
        summary = [{"type": "summary_text", "text": item.text}] if whole and item.pieces else []
        return {"id": item.id, "type": "reasoning", "content": [], **secret, "summary": summary}

    def _opening(self, item: _Item) -> list[tuple[str, _JSON]]:
        part = {"type": "summary_text", "text": ""}
        return [("response.reasoning_summary_part.added", {"item_id": item.id, "part": part, "summary_index": 0})]

    def _delta(self, item: _Item) -> tuple[str, _JSON]:
        return "response.reasoning_summary_text.delta", {"summary_index": 0}

    def _closing(self, item: _Item) -> list[tuple[str, _JSON]]:
        if not item.pieces:
            return []
        where = {"item_id": item.id, "summary_index": 0}
        return [
            ("response.reasoning_summary_text.done", {**where, "text": item.text}),
            ("response.reasoning_summary_part.done", {**where, "part": {"type": "summary_text", "text": item.text}}),
        ]


class _Call(_Spoken):
    """What ToolCall and CustomToolCall share. A call without a name goes on with the one before it."""

    __slots__ = ()
    _key: ClassVar[str]  # in Chat Completions: the call's type, and the key of its name and arguments
    _type: ClassVar[str]  # of the item in Responses
    name: str
    id: str | None

    def _more(self, text: str) -> Self:
        return replace(self, name="", **{self._grows: text})  # type: ignore[type-var]

    def _continues(self, opened: _Spoken) -> bool:
        if type(opened) is not type(self) or opened.choice != self.choice:
            return False
        if self.id is not None and opened.id is not None:
            return self.id == opened.id
        return not self.name

    def _chat_call(self, item: _Item, text: str) -> _JSON:
        return {"id": item.call_id, "type": self._key, self._key: {"name": self.name, self._grows: text}}

    def _chat_role(self, item: _Item) -> _JSON:
        call = {"index": item.index, **self._chat_call(item, "")}
        return {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None}

    def _chat_head(self, item: _Item) -> _JSON | None:
        return {"tool_calls": [{"index": item.index, **self._chat_call(item, "")}]}

    def _chat_delta(self, item: _Item, text: str) -> _JSON:
        return {"tool_calls": [{"index": item.index, self._key: {self._grows: text}}]}

    def _chat_message(self, item: _Item, message: _JSON) -> None:
        message.setdefault("tool_calls", []).append(self._chat_call(item, item.text))

    def _item(self, item: _Item, encoder: _ResponsesEncoder, whole: bool) -> _JSON:
        keys = {self._grows: item.text if whole else "", "call_id": item.call_id, "name": self.name}
        status = item.status if whole else "in_progress"
        return {"id": item.id, "type": self._type, "status": status, **dict(sorted(keys.items()))}

    def _delta(self, item: _Item) -> tuple[str, _JSON]:
        return f"response.{self._type}_{self._grows}.delta", {}

    def _closing(self, item: _Item) -> list[tuple[str, _JSON]]:
        return [(f"response.{self._type}_{self._grows}.done", {self._grows: item.text, "item_id": item.id})]


@dataclass(frozen=True, slots=True, init=False)
class ToolCall(_Call):
    """The model calls a function. `arguments`: JSON text, sent as it is given, or a mapping.

    `id` is the call's id (`call_...`), made up where it is not given. A live Stream can send the arguments piece by
    piece: `ToolCall("f", "")` opens the call, and one with the name "" goes on with the call before it.
    """

    name: str
    arguments: str
    id: str | None
    choice: int
    _ours: bool = field(init=False, repr=False, compare=False)  # the JSON is: its spaces may follow the API's habit

    _grows = "arguments"
    _prefix = "fc_"
    _key = "function"
    _type = "function_call"

    def __init__(  # by hand: `arguments` takes more than it is
        self,
        name: str,
        arguments: str | Mapping[str, object] = "{}",
        *,
        id: str | None = None,
        choice: int = 0,
    ) -> None:
        _check_fields(self, name=(name, str), arguments=(arguments, (str, Mapping)), id=(id, _WORD))
        _check_fields(self, choice=(choice, int))
        ours = not isinstance(arguments, str)
        text = arguments if isinstance(arguments, str) else _dumps(dict(arguments))
        for key, value in (("name", name), ("arguments", text), ("id", id), ("choice", choice), ("_ours", ours)):
            object.__setattr__(self, key, value)

    def _spaced(self) -> ToolCall:
        """This call among several, whose arguments the API writes with spaces (R), unless the text was given."""
        if not self._ours:
            return self
        return replace(self, arguments=json.dumps(json.loads(self.arguments), ensure_ascii=False))


@dataclass(frozen=True, slots=True)
class CustomToolCall(_Call):
    """The model calls a custom tool, whose input is free text. `id` and "" as a name: as in ToolCall."""

    name: str
    input: str = ""
    _: KW_ONLY
    id: str | None = None
    choice: int = 0

    _grows = "input"
    _prefix = "ctc_"
    _key = "custom"
    _type = "custom_tool_call"
    _padded = False

    def __post_init__(self) -> None:
        _check_fields(self, name=(self.name, str), input=(self.input, str), id=(self.id, _WORD))
        _check_fields(self, choice=(self.choice, int))


@dataclass(frozen=True, slots=True)
class WebSearch(_Spoken):
    """The model searches the web: a web_search_call item in Responses, nothing of its own in Chat Completions.

    `sources` are URLs. The text after it cites them: a url_citation where the text names the URL, else over all of it.
    A model that reasons says a Reasoning first; who sends the items back without it gets the API's 400.
    """

    query: str
    _: KW_ONLY
    sources: Sequence[str] = ()
    id: str | None = None

    _grows = "query"
    _prefix = "ws_"
    _in_chat = False

    def __post_init__(self) -> None:
        _check_fields(self, query=(self.query, str), id=(self.id, _WORD))
        if isinstance(self.sources, str):
            raise TypeError(f"WebSearch wants a list of URLs for sources, not {self.sources!r}")
        object.__setattr__(self, "sources", tuple(self.sources))
        for url in self.sources:
            _check_fields(self, sources=(url, str))

    def _fragments(self) -> Sequence[str]:
        return ()

    def _with(self, text: str) -> WebSearch:
        return self

    def _continues(self, opened: _Spoken) -> bool:
        return False

    def _item(self, item: _Item, encoder: _ResponsesEncoder, whole: bool) -> _JSON:
        action: _JSON = {"type": "search"}
        if whole:
            action.update(queries=[self.query], query=self.query)
        if whole and encoder.includes("web_search_call.action.sources"):
            action["sources"] = [{"type": "url", "url": url} for url in self.sources]
        status = "completed" if whole else "in_progress"
        return {"id": item.id, "type": "web_search_call", "status": status, "action": action}

    def _closing(self, item: _Item) -> list[tuple[str, _JSON]]:
        steps = ("in_progress", "searching", "completed")
        return [(f"response.web_search_call.{step}", {"item_id": item.id}) for step in steps]


_Reason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter"]
_REASONS = ("stop", "length", "tool_calls", "content_filter")


@dataclass(frozen=True, slots=True)
class Finish(_Part):
    """Why the answer ends. Without it: "tool_calls" where tools were called, else "stop"."""

    reason: _Reason
    _: KW_ONLY
    choice: int = 0

    def __post_init__(self) -> None:
        if self.reason not in _REASONS:
            raise ValueError(f"not a finish reason: {self.reason!r}; it is one of {', '.join(_REASONS)}")
        _check_fields(self, choice=(self.choice, int))

    def _act(self, answer: _Delivery) -> None:
        answer.encoder.finish[self.choice] = self.reason


@dataclass(frozen=True, slots=True)
class Usage(_Part):
    """The tokens that the answer says it used. Without it they are estimated from the texts.

    `cached_tokens` are among the prompt's tokens, `reasoning_tokens` among the completion's.
    """

    prompt_tokens: int
    completion_tokens: int
    _: KW_ONLY
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        _check_fields(self, prompt_tokens=(self.prompt_tokens, int), completion_tokens=(self.completion_tokens, int))
        _check_fields(self, cached_tokens=(self.cached_tokens, int), reasoning_tokens=(self.reasoning_tokens, int))

    @property
    def total_tokens(self) -> int:
        """The sum of both."""
        return self.prompt_tokens + self.completion_tokens

    def _act(self, answer: _Delivery) -> None:
        answer.encoder.usage = self


@dataclass(frozen=True, slots=True)
class Pause(_Part):
    """Nothing happens for so many seconds. What was said before is on the wire by then; stop() ends the wait."""

    seconds: float

    def __post_init__(self) -> None:
        _check_fields(self, seconds=(self.seconds, _SECONDS))

    def _act(self, answer: _Delivery) -> None:
        answer.pause(self.seconds)


@dataclass(frozen=True, slots=True)
class Disconnect(_Part):
    """The server hangs up here: with a FIN, or a RST if `reset`. A stream has no terminator, a JSON body is cut."""

    _: KW_ONLY
    reset: bool = False

    def _act(self, answer: _Delivery) -> None:
        answer.cut(self.reset)


@dataclass(frozen=True, slots=True)
class Raw(_Part):
    """These bytes, as they are, in the place of an event (or in the JSON body, which they are if nothing is said)."""

    data: bytes

    def __post_init__(self) -> None:
        _check_fields(self, data=(self.data, (bytes, bytearray, memoryview)))
        object.__setattr__(self, "data", bytes(self.data))

    def _act(self, answer: _Delivery) -> None:
        answer.sink.raw(self.data)


@dataclass(frozen=True, slots=True)
class StreamError(_Part):
    """The answer fails here. A stream gets the API's in-stream error; a request for JSON a 500 with these fields."""

    message: str
    _: KW_ONLY
    type: str = "server_error"
    code: str | None = None
    param: str | None = None

    def __post_init__(self) -> None:
        _check_fields(self, message=(self.message, str), type=(self.type, str))
        _check_fields(self, code=(self.code, _WORD), param=(self.param, _WORD))

    def _act(self, answer: _Delivery) -> None:
        answer.fail(APIError(500, self.message, type=self.type, code=self.code, param=self.param))


@dataclass(frozen=True, slots=True)
class _Failure(_Part):
    """An APIError at this place: itself, status and all, for a request for JSON; inside a stream its error."""

    error: APIError

    def _act(self, answer: _Delivery) -> None:
        answer.fail(self.error)


# ---- Whole answers, and answers in time ------------------------------------------------------------------------------


def _part(value: object) -> _Part:
    """A part, from what a handler may give for one. Raises TypeError for anything else."""
    if isinstance(value, _Part):
        return value
    if isinstance(value, str):
        return Text(value)
    raise TypeError(f"not a part of an answer: {value!r}; a part is a str, Text, ToolCall, ..." + _copy_hint(value))


def _copy_hint(value: object) -> str:
    """Words for a value whose class is of another copy of this module."""
    kind = type(value)
    if kind.__name__ not in __all__ or kind is globals()[kind.__name__]:
        return ""
    other = getattr(sys.modules.get(kind.__module__), "__file__", kind.__module__)
    return f"; it is of another copy of openai_fake, {other}, than this server, {__file__}: import one of them only"


def _is_content(value: object) -> bool:
    iterable = isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray, Mapping))
    return iterable or isinstance(value, (str, _Part, Stream, Completion, AsyncIterable))


def _check_content(value: object) -> None:
    """Raises TypeError for what is no answer."""
    if not _is_content(value):
        known = "a str, a part, a list or generator of parts, a Stream, a Reply or an APIError"
        raise TypeError(f"{_short(repr(value))} is no answer; an answer is {known}{_copy_hint(value)}")


class Reply:
    """An answer with its envelope: what is said, and the id, model, time and headers around it.

    `created` is in unix seconds. `ttft` and `itl` are the seconds before the first token and between tokens, in
    place of the server's. `only="stream"` or `only="json"` refuses the other kind of request with a 500. Raises
    TypeError for an id, model or time of another type, ValueError for headers that could not be sent.
    """

    def __init__(
        self,
        *parts: _Content,
        id: str | None = None,
        model: str | None = None,
        created: int | None = None,
        headers: Mapping[str, str] | None = None,
        only: Literal["stream", "json"] | None = None,
        ttft: float | None = None,
        itl: float | None = None,
    ) -> None:
        _check_fields(self, id=(id, _WORD), model=(model, _WORD), created=(created, _NUMBER))
        for part in parts:
            _check_content(part)
        if ttft is not None or itl is not None:
            _check_fields(self, ttft=(ttft or 0, _SECONDS), itl=(itl or 0, _SECONDS))
        if only not in (None, "stream", "json"):
            raise ValueError(f"only is 'stream' or 'json', not {only!r}")
        self.parts = parts
        self.id = id
        self.model = model
        self.created = created
        self.headers = _header_fields(headers) if headers else {}
        self.only = only
        self.ttft = ttft
        self.itl = itl

    def _known(self) -> list[_Part] | None:
        """The parts, where they are all known before anything is sent; None where they come in time."""
        known: list[_Part] = []
        for content in self.parts:
            if isinstance(content, (str, _Part)):
                known.append(_part(content))
            elif isinstance(content, Completion):
                known.extend(content._parts())
            elif isinstance(content, (list, tuple)):
                known.extend(map(_part, content))
            else:
                return None
        return known


def _reply(answer: Any) -> Reply:
    """The Reply that an answer is short for. Raises TypeError or ValueError for what is none; an APIError is raised."""
    if isinstance(answer, Reply):
        return answer
    if isinstance(answer, APIError):
        raise answer
    if answer is None:
        raise ValueError("handler returned empty response: None (forgot `return`?)")
    if isinstance(answer, Completion):
        return Reply(answer, id=answer.id or None, model=answer.model or None, created=answer.created or None)
    try:
        return Reply(answer)
    except TypeError as error:
        raise TypeError(f"handler returned {type(answer).__name__}: {error}") from None


def _wait(changed: threading.Condition, ready: Callable[[], bool], timeout: float, call: str) -> bool:
    """Whether `ready` within so many seconds. Raises RuntimeError where this wait is itself what it waits for."""
    loop = getattr(sys.modules.get("asyncio"), "_get_running_loop", bool)()
    patience = min(timeout, _LOOP_PATIENCE) if loop else timeout
    if not changed.wait_for(ready, patience) and patience < timeout:
        raise RuntimeError(
            f"{call}() blocks the event loop that runs on this thread, so that the loop's client cannot go on: "
            f"use `await asyncio.to_thread({call})`"
        )
    return ready()


_END: Any = object()  # in a Stream's queue: close() was called
_WAKE: Any = object()  # in a Stream's queue: look whether the client has left


class Stream:
    """A live answer: a test sends its parts, from any thread, while the client reads.

    It serves one request; a second one is an error. A Stream that is never closed is an error when the server stops,
    unless the test was told that the client has left, or when its client has waited for the next part for `timeout`
    seconds (None: for ever). The waits block their thread: in a coroutine, `await asyncio.to_thread(stream.flush)`.
    """

    def __init__(self, *, timeout: float | None = 30.0) -> None:
        self._timeout = timeout
        self._queue: queue.SimpleQueue[_Part] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards the fields below, and tells when they change
        self._request: Request | None = None
        self._sent = 0  # parts, and the end
        self._written = 0  # of them, on the wire
        self._ended = False
        self._gone = False
        self._noticed = False  # the test was told that the client has left

    def send(self, *parts: _Sent) -> bool:
        """Sends parts, in order. Returns whether there is still a client: False once it has left, and drops them.

        Raises RuntimeError after `close` or `fail`, TypeError for what is not a part.
        """
        checked = [_part(part) for part in parts]
        with self._changed:
            if self._ended:
                raise RuntimeError("send() on a Stream that has ended: close() or fail() was called before")
            if self._left_early():
                return False
            self._sent += len(checked)
            for part in checked:
                self._queue.put(part)
        return True

    def close(self) -> None:
        """Ends the answer properly. Closing again does nothing."""
        with self._changed:
            if not self._ended:
                self._ended = True
                self._sent += 1
                self._queue.put(_END)

    def fail(self, error: APIError | StreamError) -> None:
        """Ends the answer with an error inside the stream. Raises RuntimeError after `close` or `fail`."""
        self.send(_Failure(error) if isinstance(error, APIError) else error)
        self.close()

    def flush(self, timeout: float = 5.0) -> bool:
        """Waits until all that was sent is on the wire. Returns False if the client has left, and it is not.

        Raises TimeoutError after `timeout` seconds.
        """
        with self._changed:
            if not _wait(self._changed, lambda: self._gone or self._written >= self._sent, timeout, "stream.flush"):
                missing = self._sent - self._written
                why = "no request has come" if self._request is None else "the client does not read"
                raise TimeoutError(f"{missing} of {self._sent} parts are not on the wire after {timeout} s: {why}")
            return self._written >= self._sent or not self._left_early()

    @property
    def request(self) -> Request | None:
        """The request that this Stream answers; None until it came."""
        return self._request

    def wait_request(self, timeout: float = 5.0) -> Request:
        """Waits for the request that this Stream answers. Raises TimeoutError after `timeout` seconds."""
        with self._changed:
            if not _wait(self._changed, lambda: self._request is not None, timeout, "stream.wait_request"):
                raise TimeoutError(f"no request came for this Stream in {timeout} s")
            return cast(Request, self._request)

    @property
    def disconnected(self) -> bool:
        """Whether the client has left before the end."""
        return self._left_early()

    def wait_disconnected(self, timeout: float = 5.0) -> bool:
        """Waits until the client has left. Returns False if it has not after `timeout` seconds, or never came."""
        with self._changed:
            return _wait(self._changed, self._left_early, timeout, "stream.wait_disconnected")

    def _left_early(self) -> bool:
        """Whether the client has left, as the test is told."""
        self._noticed = self._noticed or self._gone
        return self._gone

    def _check_closed(self) -> None:
        if not self._ended and not self._noticed:
            raise RuntimeError(
                f"a Stream was never closed, for {self._request!r}: close() ends it; where the client is to leave "
                "first, look whether it has, by wait_disconnected() or `disconnected`"
            )

    def _serve(self, request: Request) -> None:
        with self._changed:
            if self._request is not None:
                raise RuntimeError(
                    f"a Stream serves one request: it has served {self._request!r}, now came {request!r}"
                )
            self._request = request
            self._changed.notify_all()

    def _on_wire(self, count: int) -> None:
        with self._changed:
            self._written = count
            self._changed.notify_all()

    def _left(self) -> None:
        with self._changed:
            if not (self._ended and self._written >= self._sent):
                self._gone = True
            self._changed.notify_all()


class Script:
    """A handler that gives one answer per request, in order. An answer that is a function is called as a handler.

    A request after the last answer is an error, and so are answers left when the server whose handler this is stops.
    """

    def __init__(self, *answers: Answer | Handler) -> None:
        for answer in answers:
            if not (callable(answer) or isinstance(answer, (Reply, APIError))):
                _check_content(answer)
        self._answers = answers
        self._next = 0
        self._lock = threading.Lock()  # guards _next: requests come on many threads

    def __call__(self, request: Request) -> Any:
        with self._lock:
            index, self._next = self._next, self._next + 1
        if index >= len(self._answers):
            hint = "; a list is one answer" if index == 1 and isinstance(self._answers[0], list) else ""
            raise AssertionError(f"the Script ends with answer {index}, and one more request came: {request!r}{hint}")
        answer = self._answers[index]
        return answer(request) if callable(answer) else answer

    def _check_used(self) -> None:
        unused, known = self._answers[self._next :], len(self._answers)
        if unused:
            raise AssertionError(f"unused answers of the Script, {len(unused)} of {known}: {unused!r}")


def echo(request: Request) -> str:
    """The default handler: says the last user message again."""
    return request.text


# ---- Chunks and completions ------------------------------------------------------------------------------------------
# The low level: the original's data, for who wants to say exactly what a chunk holds.


@dataclass(frozen=True, slots=True)
class ChunkChoice:
    """One choice of a Chunk: `delta` is its content, sent where it is not empty, and so are the others."""

    index: int = 0
    delta: str = ""
    tool_calls: Sequence[ToolCall] = ()
    finish_reason: _Reason | None = None


@dataclass(frozen=True, slots=True)
class Chunk(_Part):
    """One chat.completion.chunk, sent as it is given; in Responses and in JSON, the parts that it says.

    An empty `id` or `model`, and `created` (unix seconds) 0, stand for the answer's own.
    """

    choices: Sequence[ChunkChoice] = ()
    _: KW_ONLY
    id: str = ""
    created: int = 0
    model: str = ""
    usage: Usage | None = None

    def _act(self, answer: _Delivery) -> None:
        answer.chunk(self)

    def _parts(self) -> list[_Part]:
        parts: list[_Part] = []
        for choice in self.choices:
            if choice.delta:
                parts.append(Text(choice.delta, choice=choice.index))
            parts += [
                ToolCall(call.name, call.arguments, id=call.id, choice=choice.index) for call in choice.tool_calls
            ]
            if choice.finish_reason:
                parts.append(Finish(choice.finish_reason, choice=choice.index))
        return parts + ([self.usage] if self.usage else [])


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    """One choice of a Completion."""

    message: Message
    index: int = 0
    finish_reason: _Reason = "stop"


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole chat.completion. Empty `id`, `model` and `created` stand for the answer's own, as in Chunk."""

    choices: Sequence[CompletionChoice]
    _: KW_ONLY
    id: str = ""
    created: int = 0
    model: str = ""
    usage: Usage | None = None

    def _parts(self) -> list[_Part]:
        parts: list[_Part] = []
        for choice in self.choices:
            message = choice.message
            if message.text or not message.tool_calls:
                parts.append(Text(message.text, choice=choice.index))
            for call in message.tool_calls:
                text = call.arguments if isinstance(call, ToolCall) else call.input
                parts.append(type(call)(call.name, text, id=call.id, choice=choice.index))
            parts.append(Finish(choice.finish_reason, choice=choice.index))
        return parts + ([self.usage] if self.usage else [])


_Sent: TypeAlias = str | _Part
_Content: TypeAlias = str | _Part | Stream | Completion | Iterable[_Sent] | AsyncIterable[_Sent]
Answer: TypeAlias = _Content | Reply | APIError  # what a handler may return
Handler: TypeAlias = Callable[[Request], Answer | Awaitable[Answer]]


def streaming_response(*chunks: Chunk) -> Reply:
    """The answer made of these chunks; a request that does not stream gets a 500."""
    return Reply(list(chunks), only="stream")


def non_streaming_response(text: str) -> Reply:
    """The answer with this text, from gpt-4, which used 10 + 5 tokens; a request that streams gets a 500."""
    choice = CompletionChoice(Message("assistant", text))
    return Reply(Completion([choice], usage=Usage(10, 5)), model="gpt-4", only="json")


def text_chunks(*deltas: str, index: int | None = None) -> list[Chunk]:
    """One chunk per delta, all with one id and time, for the choices 0, 1, 2, ...; or all for the choice `index`."""
    id, created = "chatcmpl-" + _Ids(random.getrandbits).alnum(29), int(time.time())
    return [
        Chunk([ChunkChoice(number if index is None else index, delta)], id=id, created=created, model="gpt-4")
        for number, delta in enumerate(deltas)
    ]


def tool_call_chunk(name: str, arguments: str | Mapping[str, object]) -> Chunk:
    """A chunk that calls a function: choice 0, call index 0, id `call_...`."""
    ids = _Ids(random.getrandbits)
    call = ToolCall(name, arguments, id="call_" + ids.alnum(24))
    return Chunk(
        [ChunkChoice(tool_calls=[call])], id="chatcmpl-" + ids.alnum(29), created=int(time.time()), model="gpt-4"
    )


# ---- What both encoders share ----------------------------------------------------------------------------------------

_ALNUM = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_NO_SIGNS = bytes.maketrans(b"+/=\n", b"Qx7e")


class _Ids:
    """Random letters and digits, the same again from the same bits."""

    __slots__ = ("bits",)

    def __init__(self, bits: Callable[[int], int]) -> None:
        self.bits = bits

    def hex(self, count: int) -> str:
        return f"{self.bits(4 * count):0{count}x}"

    def alnum(self, count: int) -> str:
        size = count * 3 // 4 + 1
        return b2a_base64(self.bits(8 * size).to_bytes(size, "big")).translate(_NO_SIGNS)[:count].decode()


_POOL = "".join(random.Random(16).choices(_ALNUM, k=1024 + 16))


def _obfuscation(number: int, length: int) -> str:
    """The padding that hides the size of a delta: letters and digits, other ones for each event of a stream."""
    begin = number * 37 & 1023
    return _POOL[begin : begin + length]


class _Model(NamedTuple):
    """What the API's answers show of a model's family (R)."""

    logprobs: bool = False  # chat: the key is there, null, when nobody asked
    fingerprint: bool = False  # chat: fp_..., else null
    service_tier: bool = True
    forced_stop: bool = False  # chat: a forced call finishes with "stop"
    cache_writes: bool = False  # chat: usage tells cache_write_tokens
    effort: str | None = "medium"  # Responses: of a reasoning model; None for the others
    context: str | None = "current_turn"
    top_p: float = 1.0
    retention: str = "in_memory"
    phase: bool = False


_SNAPSHOTS = {
    "gpt-3.5-turbo": "gpt-3.5-turbo-0125",
    "gpt-4": "gpt-4-0613",
    "gpt-4.1": "gpt-4.1-2025-04-14",
    "gpt-4.1-mini": "gpt-4.1-mini-2025-04-14",
    "gpt-4.1-nano": "gpt-4.1-nano-2025-04-14",
    "gpt-4o": "gpt-4o-2024-08-06",
    "gpt-4o-mini": "gpt-4o-mini-2024-07-18",
    "gpt-5": "gpt-5-2025-08-07",
    "gpt-5-mini": "gpt-5-mini-2025-08-07",
    "gpt-5-nano": "gpt-5-nano-2025-08-07",
    "gpt-5-pro": "gpt-5-pro-2025-10-06",
    "gpt-5.1": "gpt-5.1-2025-11-13",
    "gpt-5.2": "gpt-5.2-2025-12-11",
    "gpt-5.4": "gpt-5.4-2026-03-05",
    "gpt-5.4-mini": "gpt-5.4-mini-2026-03-17",
    "gpt-5.5": "gpt-5.5-2026-04-23",
    "gpt-5.6": "gpt-5.6-sol",
    "o1-mini": "o1-mini-2024-09-12",
    "o3": "o3-2025-04-16",
    "o3-mini": "o3-mini-2025-01-31",
    "o4-mini": "o4-mini-2025-04-16",
}

_CLASSIC: dict[str, Any] = {"logprobs": True, "forced_stop": True, "effort": None, "context": None}
_AUDIO: dict[str, Any] = {"fingerprint": True, "effort": None, "context": None}
_SEARCH: dict[str, Any] = {**_AUDIO, "service_tier": False}
_LATE: dict[str, Any] = {"top_p": 0.98, "retention": "24h"}
# By the beginning of the name, first match; a model of an unknown name is like gpt-4o, but for forced calls.
_FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gpt-3.5", _CLASSIC),
    ("gpt-4o-audio", _AUDIO),
    ("gpt-4o-mini-audio", _AUDIO),
    ("gpt-audio", _AUDIO),
    ("gpt-4o-search", _SEARCH),
    ("gpt-4o-mini-search", _SEARCH),
    ("gpt-4o", {**_CLASSIC, "fingerprint": True}),
    ("gpt-4.1", {**_CLASSIC, "fingerprint": True}),
    ("gpt-4", _CLASSIC),
    ("gpt-5.6", {**_LATE, "context": "all_turns", "phase": True, "cache_writes": True}),
    ("gpt-5.5", {**_LATE, "phase": True}),
    ("gpt-5.4", {**_LATE, "effort": "none", "phase": True}),
    ("gpt-5.3-codex", {"phase": True}),
    ("gpt-5.2", {**_LATE, "effort": "none"}),
    ("gpt-5.1", {"effort": "none"}),
    ("gpt-5", {}),
    ("o3-mini", {"fingerprint": True}),
    ("o1", {}),
    ("o3", {}),
    ("o4", {}),
    ("", {**_CLASSIC, "fingerprint": True, "forced_stop": False}),
)


@lru_cache(256)
def _family(begin: str) -> _Model:
    return _Model(**next(traits for name, traits in _FAMILIES if begin.startswith(name)))


def _model(name: str) -> _Model:
    return _family(name[:24])  # what is cached must not be of any size


_TIERS = {"flex": "flex", "fast": "priority", "priority": "priority"}

_ALTERNATIVES = [
    f" {word}"
    for word in "the a and of to in that it is for on with as at by an be this from or".split()  # noqa: SIM905
]


def _logprobs(token: str, top: int) -> _JSON:
    """A token's entry in logprobs, Responses form. The numbers are plausible, and the same for the same token."""

    def entry(token: str, logprob: float) -> _JSON:
        return {"bytes": list(token.encode("utf-8", "replace")), "logprob": logprob, "token": token}

    logprob = -(zlib.crc32(token.encode("utf-8", "replace")) % 2500 + 1) / 1e4
    others = [other for other in _ALTERNATIVES if other != token][: max(0, top - 1)]
    ranked = [entry(token, logprob)] + [entry(other, -2.0 - place / 2) for place, other in enumerate(others)]
    return {**entry(token, logprob), "top_logprobs": ranked[:top]}


class _Deltas:
    """Delta events in a row that differ in their text, padding and number alone, so that they encode fast.

    The first of an item is encoded with slots in their places; that frame is the form of all others.
    """

    __slots__ = ("first", "item", "make", "texts")

    def __init__(self, item: _Item, texts: Sequence[str], first: int, make: Callable[[str, str, Any], _JSON]) -> None:
        self.item = item
        self.texts = texts
        self.first = first  # number of the first event
        self.make = make  # (text, padding, number) -> event

    def events(self) -> list[_JSON]:
        """The events one by one."""
        return [
            self.make(text, _obfuscation(number, -len(text) & 15), number)
            for number, text in enumerate(self.texts, self.first)
        ]

    def frames(self, frame: Callable[[_Event], str]) -> Iterator[str]:
        """What `frame` gives for each of the events, at a fifth of the time."""
        form = self.item.form
        if not form:
            form = frame(self.make(*_SLOTS)).replace("%", "%%")
            form = form.replace(f'"{_SLOTS[0]}"', "%(text)s").replace(_SLOTS[1], "%(padding)s")
            self.item.form = form = form.replace(f'"{_SLOTS[2]}"', "%(number)d")
        for number, text in enumerate(self.texts, self.first):
            at = number * 37 & 1023
            padding = _POOL[at : at + (-len(text) & 15)]
            yield form % {"text": _quote(text), "padding": padding, "number": number}


_Event: TypeAlias = "_JSON | _Deltas | Literal['[DONE]']"

# What is encoded in the place of what differs; random, so that no text of a user can have it.
_SLOTS = tuple(f"slot {random.SystemRandom().getrandbits(64):x} {name}" for name in ("text", "padding", "number"))


class _Encoder:
    """One answer being encoded: folds parts into items, and tells the events of a stream. It does no I/O."""

    ended = False  # all is said
    id: str
    usage: Usage | None = None
    tokens = 0
    number = 0  # Responses: of the next event; Chat Completions: of the last that was padded
    n = 1  # choices
    parallel = False  # several calls are known to come
    logprobs = False
    top_logprobs = 0

    def __init__(self, request: Request, reply: Reply, ids: _Ids, created: int) -> None:
        self.request = request
        self.asked = request.body
        model = _string(self.asked.get("model"))
        self.ids = ids
        self.created = reply.created if reply.created is not None else created
        self.model = _model(reply.model or model)
        self.model_name = reply.model or _SNAPSHOTS.get(model, model)
        self.streams = self.asked.get("stream") is True  # whether events are told
        self.items: list[_Item] = []
        self.open: dict[int, _Item] = {}  # the item that each choice is saying
        self.finish: dict[int, str] = {}
        self.sources: list[str] = []  # found by web searches, and not cited yet

    def ask_logprobs(self, asked: bool) -> None:
        """Takes note of whether logprobs are asked for, and how many of other tokens."""
        top = self.asked.get("top_logprobs")
        self.logprobs = asked
        self.top_logprobs = min(top, 20) if type(top) is int and asked else 0

    def fold(self, part: _Spoken, texts: Sequence[str]) -> tuple[_Item, _Item | None, bool]:
        """Folds in a part that adds these texts. Returns its item, the item that it ended, and whether it is new."""
        item, ended, new = self.open.get(part.choice), None, False
        if item is None or not part._continues(item.part):
            item, ended, new = self._new_item(part), item, True
            if ended is not None:
                ended.status = "completed"
        if texts:
            item.pieces += texts
            self.tokens += len(texts)
            if self.logprobs and isinstance(part, _MessagePart):
                item.entries += [_logprobs(text, self.top_logprobs) for text in texts if text]
        return item, ended, new

    def _new_item(self, part: _Spoken) -> _Item:
        if isinstance(part, _Call) and not part.name:
            raise ValueError(f"{part!r} has no name, so it goes on with a call, but none is open")
        item = _Item(part, len(self.items))
        self.name_item(item)
        if isinstance(part, WebSearch):
            self.sources += part.sources
        elif isinstance(part, Text) and self.sources:
            item.sources, self.sources = self.sources, []
        self.items.append(item)
        self.open[part.choice] = item
        return item

    def name_item(self, item: _Item) -> None:
        """Gives an item its ids."""
        raise NotImplementedError

    def begin(self) -> list[_Event]:
        """The events before the first part, once: they are told by whatever comes first."""
        return []

    def say(self, part: _Spoken, texts: Sequence[str]) -> list[_Event]:
        """Folds in a part that adds these texts, and tells the events that say it."""
        raise NotImplementedError

    def chunk(self, chunk: Chunk) -> list[_Event]:
        """Folds in a Chunk that was given, and tells its events."""
        events: list[_Event] = []
        for part in chunk._parts():
            if isinstance(part, _Spoken):
                events += self.say(part, [part.text] if isinstance(part, Text) else part._fragments())
            elif isinstance(part, Finish):
                self.finish[part.choice] = part.reason
        self.usage = chunk.usage or self.usage
        return events

    def end(self) -> list[_Event]:
        """The events after the last part."""
        raise NotImplementedError

    def fail(self, error: APIError) -> list[_Event]:
        """The events of an answer that fails."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Nothing more will be said: the client has left, or the handler has failed."""

    def body(self) -> _JSON:
        """The JSON body: the fold of all that was said."""
        raise NotImplementedError

    def close_items(self) -> None:
        """All is said: gives the items that are still being said the status they end with."""
        self.ended = True
        cut = any(reason in _INCOMPLETE for reason in self.finish.values())
        for item in self.items:
            if len(item.pieces) > 1:
                item.join()
            if item.status == "in_progress":
                item.status = "incomplete" if cut else "completed"

    def tally(self) -> Usage:
        """The usage that was given, or an estimate."""
        if self.usage is not None:
            return self.usage
        thought, said = 0, self.tokens
        for item in self.items:
            thought += 64 * (type(item.part) is Reasoning)
            said += 4 * isinstance(item.part, _Call)
        return Usage(_estimate(self.prompt()), max(1, said + thought), reasoning_tokens=thought)

    def prompt(self) -> list[Any]:
        """What the model was told: messages, or items."""
        raise NotImplementedError


# ---- Chat Completions ------------------------------------------------------------------------------------------------


class _ChatEncoder(_Encoder):
    given = False  # all that was said are Chunks: nothing is added to them

    def __init__(self, request: Request, reply: Reply, ids: _Ids, created: int) -> None:
        super().__init__(request, reply, ids, created)
        asked, model = self.asked, self.model
        self.id = reply.id or ("chatcmpl-" + (ids.alnum(29) if model.service_tier else _uuid4(ids)))
        self.fingerprint = _fingerprint(self.model_name) if model.fingerprint else None
        tier = asked.get("service_tier") or "default"
        self.tier = {"service_tier": _TIERS.get(str(tier), "default")} if model.service_tier else {}
        n = asked.get("n")
        self.n = min(n, _MAX_CHOICES) if type(n) is int else 1
        if asked.get("logprobs") is True:
            self.ask_logprobs(True)
        options = _dict(asked.get("stream_options")) if self.streams else {}
        self.with_usage = bool(options.get("include_usage"))
        self.obfuscated = options.get("include_obfuscation") is not False
        self.started: set[int] = set()  # the choices whose role chunk is sent
        self.finished: set[int] = set()  # the choices that a Chunk has finished
        self.calls: dict[int, int] = {}  # how many calls each choice has made

    def prompt(self) -> list[Any]:
        return _list(self.asked.get("messages"))

    def name_item(self, item: _Item) -> None:
        part = item.part
        if isinstance(part, _Call):
            item.call_id = part.id or "call_" + self.ids.alnum(24)
            item.index = self.calls.get(part.choice, 0)
            self.calls[part.choice] = item.index + 1

    # Events

    def _chunk(
        self, choices: list[_JSON], padding: str | None = None, usage: _JSON | None = None, swapped: bool = False
    ) -> _JSON:
        event: _JSON = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model_name,
            **self.tier,
            "system_fingerprint": self.fingerprint,
        }
        if self.with_usage and swapped:  # of parallel calls, in all chunks before the finish chunk (R)
            event["usage"] = usage
        event["choices"] = choices
        if self.with_usage and not swapped:
            event["usage"] = usage
        if self.obfuscated:
            if padding is None:
                self.number += 1
                padding = _obfuscation(self.number, (self.number * 11 + 9) & 15)
            event["obfuscation"] = padding
        return event

    def _choice(
        self,
        choice: int,
        delta: _JSON,
        logprobs: _JSON | None = None,
        finish: str | None = None,
        padding: str | None = None,
    ) -> _JSON:
        entry: _JSON = {"index": choice, "delta": delta}
        if self.model.logprobs or self.logprobs:
            entry["logprobs"] = logprobs
        entry["finish_reason"] = finish
        return self._chunk([entry], padding, swapped=self.parallel and finish is None)

    def say(self, part: _Spoken, texts: Sequence[str]) -> list[_Event]:
        item, _, new = self.fold(part, texts)
        if not (self.streams and part._in_chat):
            return []
        # A text that goes on with what a Chunk said still needs its role; a call has been named.
        opens = new or (part.choice not in self.started and isinstance(part, _MessagePart))
        events = self._opening(item) if opens else []
        return events + self._deltas(item, texts) if texts else events

    def _opening(self, item: _Item) -> list[_Event]:
        part, choice = item.part, item.part.choice
        head = part._chat_head(item)
        if choice in self.started:
            return [] if head is None else [self._choice(choice, head)]
        self.started.add(choice)
        if head is not None and self.parallel:
            return [self._choice(choice, {"role": "assistant", "content": None}), self._choice(choice, head)]
        return [self._choice(choice, part._chat_role(item), self._no_logprobs(part))]

    def _no_logprobs(self, part: _Spoken) -> _JSON | None:
        if not self.logprobs or not isinstance(part, _MessagePart):
            return None
        return {"content": None, "refusal": []} if isinstance(part, Refusal) else {"content": [], "refusal": None}

    def _deltas(self, item: _Item, texts: Sequence[str]) -> list[_Event]:
        part, choice = item.part, item.part.choice
        if self.logprobs and isinstance(part, _MessagePart):
            kind = "refusal" if isinstance(part, Refusal) else "content"
            empty = {"content": None, "refusal": None}
            entries = [[_chat_logprobs(_logprobs(text, self.top_logprobs))] if text else [] for text in texts]
            return [
                self._choice(choice, part._chat_delta(item, text), {**empty, kind: entry})
                for text, entry in zip(texts, entries, strict=True)
            ]

        def make(text: str, padding: str, number: Any) -> _JSON:
            return self._choice(choice, part._chat_delta(item, text), padding=padding)

        first, self.number = self.number + 1, self.number + len(texts)
        return [_Deltas(item, texts, first, make)]

    def chunk(self, chunk: Chunk) -> list[_Event]:
        if not self.items:
            self.given = True
        choices = [self._given_choice(choice) for choice in chunk.choices]
        self.usage = chunk.usage or self.usage
        self._adopt(chunk)
        event: _JSON = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model_name,
            "choices": choices,
        }
        if chunk.usage:
            event["usage"] = self._usage()
        return [event]

    def _given_choice(self, choice: ChunkChoice) -> _JSON:
        delta: _JSON = {}
        if choice.delta:
            delta["content"] = choice.delta
            self.fold(Text(choice.delta, choice=choice.index), [choice.delta])
        calls: list[_JSON] = []
        for each in choice.tool_calls:
            call = replace(each, choice=choice.index)
            item, _, _ = self.fold(call, call._fragments())
            head = call._chat_call(item, call.arguments) if call.name else {"function": {"arguments": call.arguments}}
            calls.append({"index": item.index, **head})
        if calls:
            delta["tool_calls"] = calls
        if choice.finish_reason:
            self.finish[choice.index] = choice.finish_reason
            self.finished.add(choice.index)
        return {"index": choice.index, "delta": delta, "finish_reason": choice.finish_reason}

    def _adopt(self, chunk: Chunk) -> None:
        """Takes over what a Chunk says of the envelope."""
        before = self.id, self.created, self.model_name
        self.id = chunk.id or self.id
        self.created = chunk.created or self.created
        self.model_name = chunk.model or self.model_name
        if (self.id, self.created, self.model_name) != before:
            for item in self.open.values():
                item.form = ""  # it has the envelope as it was

    def end(self) -> list[_Event]:
        self.close_items()
        if self.given and not self.started:
            return ["[DONE]"]
        events: list[_Event] = []
        choices = self._spoken_choices()
        for choice in choices:
            if choice not in self.started:
                nothing = Text("", choice=choice)
                role = nothing._chat_role(_Item(nothing, 0))
                events.append(self._choice(choice, role, self._no_logprobs(nothing)))
        if any(item.sources for item in self.items):
            cited = {body["index"]: body["message"]["annotations"] for body in self._choices()}
            events += [self._choice(choice, {"annotations": each}) for choice, each in cited.items() if each]
        going = [choice for choice in choices if choice not in self.finished]
        events += [self._choice(choice, {}, finish=self._finish_reason(choice)) for choice in going]
        if self.with_usage:
            events.append(self._chunk([], usage=self._usage()))
        return [*events, "[DONE]"]

    def fail(self, error: APIError) -> list[_Event]:
        return [{"error": error._error()}]

    # The body

    def _finish_reason(self, choice: int) -> str:
        if choice in self.finish:
            return self.finish[choice]
        if choice not in self.calls:
            return "stop"
        forced = _dict(self.asked.get("tool_choice")).get("type") in ("function", "custom")
        return "stop" if forced and self.model.forced_stop else "tool_calls"

    def _spoken_choices(self) -> list[int]:
        return sorted({item.part.choice for item in self.items if item.part._in_chat} | set(self.finish)) or [0]

    def _choices(self) -> list[_JSON]:
        items: dict[int, list[_Item]] = {choice: [] for choice in self._spoken_choices()}
        for item in self.items:
            if item.part._in_chat:
                items[item.part.choice].append(item)
        return [self._whole_choice(choice, spoken) for choice, spoken in items.items()]

    def _whole_choice(self, choice: int, items: list[_Item]) -> _JSON:
        message: _JSON = {"role": "assistant", "content": None, "refusal": None, "annotations": []}
        if choice in self.calls:
            message = {"role": "assistant", "content": None, "tool_calls": [], "refusal": None, "annotations": []}
        logprobs: _JSON | None = None
        for item in items:
            item.part._chat_message(item, message)
            if self.logprobs and isinstance(item.part, _MessagePart):
                kind = "refusal" if isinstance(item.part, Refusal) else "content"
                logprobs = logprobs or {"content": None, "refusal": None}
                logprobs[kind] = (logprobs[kind] or []) + [_chat_logprobs(entry) for entry in item.entries]
        if choice not in self.calls and message["content"] is None and message["refusal"] is None:
            message["content"] = ""
        entry: _JSON = {"index": choice, "message": message}
        if self.logprobs or self.model.logprobs:
            entry["logprobs"] = logprobs
        entry["finish_reason"] = self._finish_reason(choice)
        return entry

    def _usage(self) -> _JSON:
        usage = self.tally()
        prompt: _JSON = {"cached_tokens": usage.cached_tokens}
        if self.model.cache_writes:
            prompt["cache_write_tokens"] = 0
        prompt["audio_tokens"] = 0
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
            "prompt_tokens_details": prompt,
            "completion_tokens_details": {
                "reasoning_tokens": usage.reasoning_tokens,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    def body(self) -> _JSON:
        self.close_items()
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model_name,
            "choices": self._choices(),
            "usage": self._usage(),
            **self.tier,
            "system_fingerprint": self.fingerprint,
        }


def _chat_logprobs(entry: _JSON) -> _JSON:
    """A logprobs entry in the order that Chat Completions has."""
    top = [{key: other[key] for key in ("token", "logprob", "bytes")} for other in entry["top_logprobs"]]
    return {"token": entry["token"], "logprob": entry["logprob"], "bytes": entry["bytes"], "top_logprobs": top}


def _fingerprint(model: str) -> str:
    return "fp_" + hashlib.sha256(model.encode("utf-8", "replace")).hexdigest()[:10]


def _uuid4(ids: _Ids) -> str:
    digits = ids.hex(32)
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


# ---- Responses -------------------------------------------------------------------------------------------------------

_NO_IMAGES = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "output_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "total_tokens": 0,
}
_WEB_SEARCH = {  # what a web_search tool echoes where the request is silent (R)
    "return_token_budget": "default",
    "search_content_types": ["text"],
    "search_context_size": "medium",
    "user_location": {"type": "approximate", "city": None, "country": "US", "region": None, "timezone": None},
}
_NOWHERE = {"type": "approximate", "city": None, "country": None, "region": None, "timezone": None}
_TOOL_DEFAULTS: dict[str, _JSON] = {
    "web_search": _WEB_SEARCH,
    "web_search_preview": _WEB_SEARCH,
    "file_search": {
        "filters": None,
        "max_num_results": 20,
        "ranking_options": {"ranker": "auto", "score_threshold": 0.0},
    },
    "mcp": {"allowed_tools": None, "headers": None, "server_description": None},
    "tool_search": {"description": None, "parameters": None},
}
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
_RESPONSE_ID = r"resp_[0-9a-f]{50}"


def _strict_schema(schema: Any) -> Any:
    """A function's parameters as the API echoes them when it turns `strict` on itself."""
    if isinstance(schema, list):
        return [_strict_schema(each) for each in _list(schema)]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict_schema(value) for key, value in _dict(schema).items()}
    if strict.get("type") == "object":
        strict["additionalProperties"] = False
        if isinstance(strict.get("properties"), dict):
            strict["required"] = list(strict["properties"])
    return strict


def _by_key(value: _JSON) -> _JSON:
    """`type` first, then the keys in alphabetical order, as the API sends tools and events."""
    return {"type": value.get("type"), **{key: value[key] for key in sorted(value) if key != "type"}}


def _tool_echo(value: object) -> object:
    tool = _dict(value)
    if tool.get("type") == "function":
        strict = tool.get("strict")
        parameters = tool.get("parameters")
        told = {**tool, "description": tool.get("description"), "output_schema": tool.get("output_schema")}
        told["parameters"] = _strict_schema(parameters) if strict is None else parameters
        told["strict"] = True if strict is None else strict
        return _by_key(told)
    defaults = _TOOL_DEFAULTS.get(_string(tool.get("type")), {})
    told = {**defaults, **{key: each for key, each in tool.items() if each is not None or key not in defaults}}
    if isinstance(told.get("user_location"), dict):
        told["user_location"] = {**_NOWHERE, **_dict(told["user_location"])}
    return _by_key(told)


def _text_echo(value: object) -> _JSON:
    asked = _dict(value)
    form = _dict(asked.get("format")) or {"type": "text"}
    if form.get("type") == "json_schema":
        strict = form.get("strict")
        form = {
            "type": "json_schema",
            "description": form.get("description"),
            "name": form.get("name"),
            "schema": form.get("schema"),
            "strict": True if strict is None else strict,
        }
    return {"format": form, "verbosity": asked.get("verbosity") or "medium"}


class _ResponsesEncoder(_Encoder):
    begun = False  # its first events are told

    def __init__(self, request: Request, reply: Reply, ids: _Ids, created: int) -> None:
        super().__init__(request, reply, ids, created)
        asked = self.asked
        # "0" and 15 digits that a response shares with its items, then the second it was made (R)
        self.shared = f"0{ids.hex(15)}00"
        self.id = reply.id or self._id("resp_")
        if reply.id and re.fullmatch(_RESPONSE_ID, reply.id):
            self.shared = reply.id[5:23]
        self.background = asked.get("background") is True
        self.streams = self.streams or self.background
        unpadded = _dict(asked.get("stream_options")).get("include_obfuscation") is False
        self.obfuscated = not (unpadded or self.background)
        self.include: list[Any] = _list(asked.get("include"))
        self.ask_logprobs("message.output_text.logprobs" in self.include or asked.get("logprobs") is True)
        self.status = "queued" if self.background else "in_progress"
        self.base = self._echo(asked)

    def prompt(self) -> list[Any]:
        return self.request._items

    def _id(self, prefix: str) -> str:
        return f"{prefix}{self.shared}{self.created & 0xFFFFFFFF:08x}{self.ids.hex(24)}"

    def name_item(self, item: _Item) -> None:
        part = item.part
        item.id = self._id(part._prefix)
        if isinstance(part, WebSearch) and part.id:
            item.id = part.id
        if isinstance(part, _Call):
            item.call_id = part.id or "call_" + self.ids.alnum(24)

    def includes(self, what: str) -> bool:
        return what in self.include

    def secret(self, item: _Item) -> str:
        """Made-up encrypted content: other letters each time it is sent (R)."""
        seed = f"{item.id} {self.number}".encode()
        digest = b"".join(hashlib.sha512(seed + bytes([part])).digest() for part in range(2))
        return "gAAAAAB" + b2a_base64(digest, newline=False).decode().replace("+", "-").replace("/", "_")

    def _echo(self, body: _JSON) -> _JSON:
        """The response object with what the request said, and the API's defaults where it said nothing."""
        model = self.model

        def told(key: str, default: Any = None) -> Any:
            value = body.get(key)
            return default if value is None else value

        def number(key: str, default: float) -> Any:
            value = told(key, default)
            return float(value) if type(value) is int else value  # the API's are floats: 1.0 (R)

        asked = _dict(body.get("reasoning"))
        reasoning: _JSON = {"context": model.context, "effort": asked.get("effort") or model.effort}
        if model.context is not None:
            reasoning["mode"] = "standard"
        reasoning["summary"] = asked.get("summary")
        conversation = told("conversation")
        if isinstance(conversation, str):
            conversation = {"id": conversation}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": "in_progress",
            "background": self.background,
            "billing": {"payer": "developer"},
            "completed_at": None,
            **({"conversation": conversation} if conversation is not None else {}),
            "error": None,
            "frequency_penalty": number("frequency_penalty", 0.0),
            "incomplete_details": None,
            "instructions": told("instructions"),
            "max_output_tokens": told("max_output_tokens"),
            "max_tool_calls": told("max_tool_calls"),
            "model": self.model_name,
            "moderation": told("moderation"),
            "output": [],
            "parallel_tool_calls": told("parallel_tool_calls", True),
            "presence_penalty": number("presence_penalty", 0.0),
            "previous_response_id": told("previous_response_id"),
            **({"prompt": body["prompt"]} if body.get("prompt") is not None else {}),
            "prompt_cache_key": told("prompt_cache_key"),
            **({"prompt_cache_options": body["prompt_cache_options"]} if told("prompt_cache_options") else {}),
            "prompt_cache_retention": told("prompt_cache_retention", model.retention),
            "reasoning": reasoning,
            "safety_identifier": told("safety_identifier"),
            "service_tier": told("service_tier", "auto"),
            "store": told("store", True),
            "temperature": number("temperature", 1.0),
            "text": _text_echo(body.get("text")),
            "tool_choice": told("tool_choice", "auto"),
            "tool_usage": {"image_gen": _NO_IMAGES, "web_search": {"num_requests": 0}},
            "tools": [_tool_echo(tool) for tool in _list(body.get("tools"))],
            "top_logprobs": told("top_logprobs", 0),
            "top_p": number("top_p", model.top_p),
            "truncation": told("truncation", "disabled"),
            "usage": None,
            "user": told("user"),
            "metadata": told("metadata", {}),
        }

    def _event(self, kind: str, fields: _JSON) -> _JSON:
        fields["sequence_number"] = self.number
        self.number += 1
        return {"type": kind, **{key: fields[key] for key in sorted(fields)}}

    def response(self, status: str) -> _JSON:
        """The response object as it stands, with that status."""
        response = {**self.base, "status": status}
        if status in ("queued", "in_progress"):
            del response["billing"]
            return response
        tier = response["service_tier"]
        response["service_tier"] = _TIERS.get(_string(tier), "default")
        if status == "completed":
            response["completed_at"] = self.created
        if status != "failed":
            response["output"] = self.output()
            response["usage"] = self._usage()
            searches = sum(1 for item in self.items if isinstance(item.part, WebSearch))
            response["tool_usage"] = {"image_gen": _NO_IMAGES, "web_search": {"num_requests": searches}}
        if status == "incomplete":
            reason = next(reason for reason in self.finish.values() if reason in _INCOMPLETE)
            response["incomplete_details"] = {"reason": _INCOMPLETE[reason]}
        return response

    def output(self) -> list[_JSON]:
        """The items, as they stand."""
        return [item.part._item(item, self, True) for item in self.items]

    def _usage(self) -> _JSON:
        usage = self.tally()
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cache_write_tokens": 0, "cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.total_tokens,
        }

    # Events

    def _lifecycle(self, status: str, kind: str | None = None) -> _JSON:
        self.status = status
        response = self.response(status)
        response.pop("billing", None)  # streams never have it (R)
        return self._event(f"response.{kind or status}", {"response": response})

    def begin(self) -> list[_Event]:
        if not self.streams:
            return []
        if not self.begun:
            self.begun = True
            return [self._lifecycle(self.status, "created"), self._lifecycle(self.status)]
        # Its first part ends the time in the queue.
        return [self._lifecycle("in_progress")] if self.status == "queued" else []

    def say(self, part: _Spoken, texts: Sequence[str]) -> list[_Event]:
        events = self.begin()
        item, ended, new = self.fold(part, texts)
        if not self.streams:
            return []
        if ended is not None:
            events += self._close(ended)
        if new:
            added = item.part._item(item, self, False)
            events.append(self._event("response.output_item.added", {"item": added, "output_index": item.position}))
        if texts:
            if not item.opened:
                item.opened = True
                events += self._placed(item, item.part._opening(item))
            events += self._deltas(item, texts)
        return events

    def _placed(self, item: _Item, events: list[tuple[str, _JSON]]) -> list[_Event]:
        return [self._event(kind, {**fields, "output_index": item.position}) for kind, fields in events]

    def _deltas(self, item: _Item, texts: Sequence[str]) -> list[_Event]:
        kind, fields = item.part._delta(item)
        fields.update(item_id=item.id, output_index=item.position)
        if (self.logprobs or item.sources) and isinstance(item.part, Text):
            return self._careful_deltas(item, texts, kind, fields)

        def make(text: str, padding: str, number: Any) -> _JSON:
            event = {**fields, "delta": text, "sequence_number": number}
            if self.obfuscated and item.part._padded:
                event["obfuscation"] = padding
            return {"type": kind, **{key: event[key] for key in sorted(event)}}

        first, self.number = self.number, self.number + len(texts)
        return [_Deltas(item, texts, first, make)]

    def _careful_deltas(self, item: _Item, texts: Sequence[str], kind: str, fields: _JSON) -> list[_Event]:
        """Deltas of a text with logprobs, or with citations between them."""
        events: list[_Event] = []
        item.join()
        before = item.text
        said = before[: len(before) - sum(map(len, texts))]
        for text in texts:
            event = {**fields, "delta": text}
            if self.logprobs:
                event["logprobs"] = [_logprobs(text, self.top_logprobs)] if text else []
            if self.obfuscated:
                event["obfuscation"] = _obfuscation(self.number, -len(text) & 15)
            events.append(self._event(kind, event))
            said += text
            found = [each for each in _citations(said, item.sources) if each["url"] in said]
            events += self._cite(item, found)
        return events

    def _cite(self, item: _Item, citations: list[_JSON]) -> list[_Event]:
        new = citations[item.cited :]
        fields = [{"annotation": each, "annotation_index": at} for at, each in enumerate(new, item.cited)]
        item.cited += len(new)
        where = {"content_index": 0, "item_id": item.id}
        return self._placed(item, [("response.output_text.annotation.added", {**each, **where}) for each in fields])

    def _close(self, item: _Item) -> list[_Event]:
        events = self._cite(item, _citations(item.text, item.sources)) if item.sources else []
        events += self._placed(item, item.part._closing(item))
        done = item.part._item(item, self, True)
        events.append(self._event("response.output_item.done", {"item": done, "output_index": item.position}))
        return events

    def end(self) -> list[_Event]:
        events = self.begin()
        going = [item for item in self.items if item.status == "in_progress"]
        self.close_items()
        for item in going:
            events += self._close(item)
        return [*events, self._lifecycle(self._final_status())]

    def _final_status(self) -> str:
        return "incomplete" if any(reason in _INCOMPLETE for reason in self.finish.values()) else "completed"

    def fail(self, error: APIError) -> list[_Event]:
        events = self.begin()
        self.base["error"] = {"code": error.code or error.type, "message": error.message}
        told = {"type": error.type, "code": error.code, "message": error.message, "param": error.param}
        return [*events, self._event("error", {"error": told}), self._lifecycle("failed")]

    def abandon(self) -> None:
        self.status = "cancelled"  # as the API calls it when a connection is closed

    def body(self) -> _JSON:
        self.close_items()
        self.status = self._final_status()
        return self.response(self.status)


# ---- HTTP: what is sent ----------------------------------------------------------------------------------------------

_VERSION = b"openai-version: 2020-10-01\r\n"
_USUAL = _VERSION + b"openai-organization: org-fake\r\nopenai-project: proj_fake\r\n"  # the API's own (R)
_GATEWAY = b"vary: Origin\r\n"  # sends no version and no time
_RATE_LIMITS = (
    b"x-ratelimit-limit-requests: 10000\r\n"
    b"x-ratelimit-limit-tokens: 2000000\r\n"
    b"x-ratelimit-remaining-requests: 9999\r\n"
    b"x-ratelimit-remaining-tokens: 1999985\r\n"
    b"x-ratelimit-reset-requests: 6ms\r\n"
    b"x-ratelimit-reset-tokens: 0s\r\n"
)
_ON_REPLIES = _USUAL + _RATE_LIMITS
_CORS = b"access-control-allow-origin: *\r\naccess-control-expose-headers: *\r\n"
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}
_STATUS_LINES[413] = b"HTTP/1.1 413 Content Too Large\r\n"  # RFC 9110's name; Python has it since 3.13
_STATUS_LINES[529] = b"HTTP/1.1 529 Overloaded\r\n"


def _with_fields(top: bytes, fields: Mapping[str, str]) -> bytes:
    """A head with these fields; they take the place of fields of the same name."""
    names = {name.lower().encode() for name in fields}
    lines = [line for line in top.split(b"\r\n")[:-1] if line.partition(b":")[0] not in names]
    lines += [f"{name}: {value}".encode("latin-1") for name, value in fields.items()]
    return b"\r\n".join(lines) + b"\r\n"


@lru_cache(2)
def _date_field(second: int) -> bytes:
    """The Date field, made once a second."""
    return f"date: {formatdate(second, usegmt=True)}\r\n".encode()


def _sse(event: _Event) -> str:
    """An event as a server-sent event; Responses' name their type."""
    if isinstance(event, str):
        return f"data: {event}\n\n"
    kind = cast(_JSON, event).get("type")
    data = _dumps(event)
    return f"data: {data}\n\n" if kind is None else f"event: {kind}\ndata: {data}\n\n"


def _frames(events: Iterable[_Event]) -> Iterator[bytes]:
    """Events as the bytes of server-sent events, one each."""
    for event in events:
        if isinstance(event, _Deltas):
            yield from map(_utf8, event.frames(_sse))
        else:
            yield _utf8(_sse(event))


def _http_chunk(data: bytes) -> bytes:
    """A chunk of the chunked transfer coding (RFC 9112 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


_LAST_CHUNK = b"0\r\n\r\n"
_EVENTS = "text/event-stream; charset=utf-8"


# ---- Answering: from the handler to a sink ---------------------------------------------------------------------------


_T = TypeVar("_T")


class _Waiter:
    """Where the thread of an answer waits: for time, for a Stream, for a coroutine. Nothing else here blocks.

    Every wait ends when the server stops, and when the client leaves (`connection` is None where there is none).
    """

    wake: Callable[[], object] | None = None  # ends the wait that goes on; other threads call it
    readable = False  # the loop saw something arrive from the client
    watched = False
    cancelled = False
    given_up = math.inf  # when a client that has sent FIN is no more taken to wait for its JSON
    loop: asyncio.AbstractEventLoop | None = None

    def __init__(self, server: _Server, connection: _Connection | None, streams: bool) -> None:
        self.server = server
        self.connection = connection
        self.streams = streams  # a client that half-closed has left a stream, but still waits for JSON

    def enter(self, wake: Callable[[], object]) -> None:
        """A wait begins, or may: from now on `wake` is called when something has happened."""
        self.wake = wake  # before the flags are looked at: who sets them later finds it
        if not self.watched:
            self.watched = True
            self.server.waiters.add(self)
            self._watch()

    def _watch(self) -> None:
        if self.connection is not None:
            self.server.watch(self.connection.sock, self)

    def notice(self) -> None:
        """Called by the server's loop: the client's socket has something to read, and is not watched any more."""
        self.readable = True
        wake = self.wake
        if wake is not None:
            wake()

    def patience(self) -> float:
        """For how many seconds the client may still be waiting. Raises _Gone where it is not, or the server stops."""
        if self.server.stopping or self.cancelled:
            raise _Gone
        connection = self.connection
        if connection is None:
            return math.inf
        if self.readable:
            self.readable = False
            if connection.read_ahead():
                self._watch()
        if not connection.gone:
            return math.inf
        if self.streams:
            raise _Gone
        now = time.monotonic()
        self.given_up = min(self.given_up, now + _HALF_CLOSED)
        if now >= self.given_up:
            raise _Gone
        return self.given_up - now

    def get(self, source: queue.SimpleQueue[_T], timeout: float | None = None) -> _T:
        """What comes next in a queue. Raises _Gone where the client has left, queue.Empty after the timeout."""
        self.enter(lambda: source.put(_WAKE))
        due = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            rest = min(self.patience(), due - time.monotonic(), _LONGEST)
            try:
                value = source.get(timeout=max(0.0, rest))
            except queue.Empty:
                if time.monotonic() >= due:
                    raise
                continue
            if value is not _WAKE:
                return value

    def sleep(self, seconds: float) -> None:
        """Waits. Raises _Gone where the client of a stream has left; who has half-closed gets its JSON, just sooner."""
        alarm: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.enter(lambda: alarm.put(None))
        due = time.monotonic() + seconds
        while self.patience() == math.inf and (rest := due - time.monotonic()) > 0:
            with suppress(queue.Empty):
                alarm.get(timeout=min(rest, _LONGEST))

    def steps(self, coming: AsyncIterator[_T]) -> Generator[_T]:
        """What an asynchronous iterator gives, all of it run in one task of this answer's own event loop."""
        import asyncio

        loop = self.loop
        if loop is None:
            loop = self.loop = asyncio.new_event_loop()
        given: list[_T] = []  # by the task, and not taken yet
        resume, closing = asyncio.Event(), False

        async def work() -> None:
            try:
                async for value in coming:
                    given.append(value)
                    loop.stop()  # the thread takes it
                    await resume.wait()
                    resume.clear()
                    if closing:
                        return
            finally:
                close = getattr(coming, "aclose", None)
                if close is not None:
                    await close()

        task = loop.create_task(work())
        task.add_done_callback(lambda task: loop.stop())
        cancelled: list[bool] = []

        def look() -> None:  # on the loop's thread, which may read ahead
            try:
                patience = self.patience()
            except _Gone:
                if not cancelled:  # once: what the coroutine still does in `finally` is let be
                    cancelled.append(True)
                    task.cancel()
            else:
                if patience != math.inf:
                    loop.call_later(patience, look)

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed: there is nothing left to cancel
                loop.call_soon_threadsafe(look)

        try:
            while True:
                self.enter(wake)
                wake()
                loop.run_forever()
                if not given:
                    break
                yield given.pop()
                resume.set()
            if task.cancelled():
                self.patience()  # raises _Gone; else the coroutine was cancelled by its own code
            task.result()
        finally:
            closing = True
            cancelled.append(True)
            resume.set()
            if not task.done() and not self.server.stopping:
                loop.call_later(_STOP_SECONDS, loop.stop)
                loop.run_forever()
            if task.done() and not task.cancelled():
                task.exception()  # looked at: asyncio would log it else

    def run(self, awaitable: Awaitable[_T]) -> _T:
        """The result of a coroutine, run on this answer's own event loop."""

        async def once() -> AsyncIterator[_T]:
            yield await awaitable

        steps = self.steps(once())
        try:
            return next(steps)
        finally:
            steps.close()

    def end(self) -> None:
        """The answer is over."""
        if self.watched:
            self.wake = None
            self.server.waiters.discard(self)
            if self.connection is not None:
                self.server.unwatch(self.connection.sock)
        if self.loop is not None:
            import asyncio

            with suppress(Exception):
                tasks = asyncio.all_tasks(self.loop)  # that the handler started, and left
                for task in tasks:
                    task.cancel()
                if tasks:
                    self.loop.run_until_complete(asyncio.wait(tasks, timeout=_STOP_SECONDS))
                self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()


class _Sink:
    """Where the events of an answer go."""

    @property
    def begun(self) -> bool:
        """Whether the client was told something: an error comes too late for a status."""
        return False

    def write(self, events: Sequence[_Event]) -> None:
        raise NotImplementedError

    def open(self) -> None:
        """The parts come from a Stream: the client may know that the answer has begun."""

    def flush(self) -> None:
        """Sends what is gathered: what comes next may take its time."""

    def raw(self, data: bytes) -> None:
        """These bytes, as they are."""

    def cut(self, reset: bool) -> None:
        """Hangs up after what was sent."""

    def end(self) -> None:
        """All is said."""
        raise NotImplementedError

    def fail(self, error: APIError) -> None:
        """The answer ends with an error, in the API's way."""
        raise NotImplementedError

    def break_off(self, error: APIError) -> None:
        """The handler failed in the middle: the client is told, but the answer is cut, not ended."""
        self.fail(error)


class _StreamSink(_Sink):
    """Server-sent events on a connection. What is known to follow is gathered; nothing waits to be gathered."""

    def __init__(self, encoder: _Encoder, connection: _Connection, reply: Reply) -> None:
        self.encoder = encoder
        self.connection = connection
        self.reply = reply
        self.pending: list[bytes] = []
        self.size = 0
        self.limit = _FIRST_BATCH

    @property
    def begun(self) -> bool:
        return self.connection.headed

    def write(self, events: Sequence[_Event]) -> None:
        for frame in _frames(events):
            self._add(frame)
            if self.size >= self.limit:
                self.flush()
                self.limit = _BATCH

    def _add(self, data: bytes) -> None:
        self.pending.append(_http_chunk(data) if self.connection.http11 else data)
        self.size += len(data)

    def flush(self, last: bool = False) -> None:
        if self.pending:
            pending, self.pending, self.size = self.pending, [], 0
            if not self.connection.headed:
                pending.insert(0, self.connection.head(200, _EVENTS, _ON_REPLIES, self.reply.headers))
            self.connection.send(b"".join(pending), last)

    def open(self) -> None:
        self.write(self.encoder.begin())
        if not self.connection.headed:
            self.pending.append(b"")  # a Chat Completions stream has nothing to say yet but its head
        self.flush()

    def raw(self, data: bytes) -> None:
        self.write(self.encoder.begin())
        if data:  # an empty chunk would be the last
            self._add(data)
        self.flush()

    def cut(self, reset: bool) -> None:
        self.flush()
        self.connection.hang_up(reset)

    def end(self) -> None:
        self.write(self.encoder.end())
        self._finish()

    def fail(self, error: APIError) -> None:
        self.write(self.encoder.fail(error))
        self._finish()

    def break_off(self, error: APIError) -> None:
        with suppress(_Gone):
            self.write(self.encoder.fail(error))
            self.flush()
        self.connection.hang_up(False)

    def _finish(self) -> None:
        if self.connection.http11:
            self.pending.append(_LAST_CHUNK)
        self.flush(last=True)


class _BodySink(_Sink):
    """A JSON body, sent when all is said. Raw bytes and a cut fall between its parts, which have equal shares of it."""

    def __init__(self, encoder: _Encoder, connection: _Connection, reply: Reply) -> None:
        self.encoder = encoder
        self.connection = connection
        self.reply = reply
        self.said = 0
        self.insertions: list[tuple[int, bytes]] = []  # after how many parts, what

    def write(self, events: Sequence[_Event]) -> None:
        self.said += 1

    def raw(self, data: bytes) -> None:
        self.insertions.append((self.said, data))

    def fail(self, error: APIError) -> None:
        raise error

    def cut(self, reset: bool) -> None:
        if self.said or self.insertions:
            self._send(self.said)
        self.connection.hang_up(reset)

    def end(self) -> None:
        self._send(self.said + 1)

    def _send(self, shares: int) -> None:
        body = _utf8(_dumps(self.encoder.body())) if self.said or not self.insertions else b""
        length, pieces, at = len(body), [b""], 0
        for said, data in (*self.insertions, (shares, b"")):
            share = len(body) * said // (self.said + 1)
            pieces += [body[at:share], data]
            length += len(data)
            at = share
        pieces[0] = self.connection.head(200, "application/json", _ON_REPLIES, self.reply.headers, length)
        self.connection.send(b"".join(pieces), last=shares > self.said)


_OPEN_TOOLS = ("mcp", "namespace", "tool_search")  # types of tools that stand for others, whose names are not known


class _Delivery:
    """One answer on its way: calls the handler, and carries its parts through an encoder into a sink."""

    encoder: _Encoder
    sink: _Sink
    waiter: _Waiter
    ttft = itl = 0.0  # seconds before the first token, and between tokens
    over = False  # a Disconnect or a StreamError has ended the answer, with parts perhaps left

    def __init__(
        self,
        fake: FakeOpenAI,
        request: Request,
        make: type[_ChatEncoder | _ResponsesEncoder],
        store: Callable[[Any, _Log | None], None] | None = None,
    ) -> None:
        self.fake = fake
        self.request = request
        self.streamed = request.stream
        self.make = make
        self.store = store  # keeps what will be said
        self.streams: list[Stream] = []  # that the answer is made of

    def send(self, connection: _Connection) -> None:
        """Answers on a connection. What goes wrong before anything is sent is raised."""
        streamed = self.streamed
        self.waiter = _Waiter(connection.server, connection, streamed)
        try:
            reply = self._ask()
            self._begin(reply, None)
            self.sink = (_StreamSink if streamed else _BodySink)(self.encoder, connection, reply)
            self._carry(reply)
        finally:
            self.waiter.end()

    def in_background(self) -> _JSON | _Replay:
        """Answers at once that the response is queued, and makes it on a thread of its own."""
        server = self.fake._running()
        self.waiter = _Waiter(server, None, True)
        log = _Log(self.waiter)
        self._begin(Reply(), log)
        self.sink = _LogSink(self.encoder, log)
        self.sink.write(self.encoder.begin())
        queued = cast(_ResponsesEncoder, self.encoder).response("queued")
        server.run(lambda: self._work(log))
        return _Replay(log, 0) if self.streamed else queued

    def _work(self, log: _Log) -> None:
        try:
            self._carry(None)
        except _Gone:
            pass
        finally:
            log.end()
            self.waiter.end()

    def _ask(self) -> Reply:
        """What the handler answers. Raises what it raises, and ValueError or TypeError for no fitting answer."""
        answer: Any = self.fake.handler(self.request)
        if type(answer) is not str and hasattr(answer, "__await__"):
            answer = self.waiter.run(answer)
        reply = _reply(answer)
        if reply.only == "json" and self.streamed:
            raise ValueError("handler returned non-streaming response for streaming request")
        if reply.only == "stream" and not self.streamed:
            raise ValueError("handler returned streaming response for non-streaming request")
        self.ttft = self.fake.ttft if reply.ttft is None else reply.ttft
        self.itl = self.fake.itl if reply.itl is None else reply.itl
        return reply

    def _begin(self, reply: Reply, log: _Log | None) -> None:
        self.encoder = self.make(self.request, reply, self.fake._ids(), int(self.fake.clock()))
        if log is None:
            self.request._encoder = self.encoder
        if self.store is not None:
            self.store(self.encoder, log)

    def _carry(self, reply: Reply | None) -> None:
        """Says all parts. An error that comes too late for a status is told in the stream."""
        try:
            self._say_all(self._ask() if reply is None else reply)
        except BaseException as error:
            self.encoder.abandon()
            if isinstance(error, _Gone) or not self.sink.begun:
                raise
            if isinstance(error, APIError):
                self._fail(error)
            else:  # the handler's own, or what can't be encoded
                message = self.request._outcome = self.fake._keep_error(error, self.request)
                self.sink.break_off(APIError(500, message))
        finally:
            for stream in self.streams:
                self._conclude(stream)

    def _say_all(self, reply: Reply) -> None:
        for content in reply.parts:  # all of them now: the client may leave before their turn comes
            if isinstance(content, Stream):
                content._serve(self.request)
                self.streams.append(content)
                with self.fake._arrived:
                    self.fake._streams.add(content)
        known = reply._known()
        if known is not None and (len(known) > 1 or self.encoder.n > 1):
            known = _arranged(known, self.encoder)
        parts = self._coming(reply.parts) if known is None else _runs(known)
        told = False
        try:
            for part, texts in parts:
                told = True
                if isinstance(part, _Call) and part.name:
                    self._check_call(part.name)
                if not isinstance(part, _Spoken):
                    part._act(self)
                elif self.ttft or self.itl:
                    self._say_slowly(part, texts)
                else:
                    self.sink.write(self.encoder.say(part, texts))
                if self.over:
                    return
        finally:
            parts.close()
        if not told and not self.streams:
            raise ValueError("handler returned empty response: no part in it")
        self.sink.end()

    def _check_call(self, name: str) -> None:
        """Warns of a call that a model could not make, once per tool; raises ValueError where the server is strict."""
        tools, choice = self.request.tools, self.request.body.get("tool_choice")
        offered = {tool.name for tool in tools if tool.name}
        offered |= {_string(_dict(each).get("name")) for each in _list(self.request.body.get("functions"))}
        chosen = _tool(choice)
        if name not in offered and not any(tool.type in _OPEN_TOOLS for tool in tools):
            fault = f"which the request did not offer; it offered: {', '.join(sorted(offered)) or 'none'}"
        elif choice == "none" or (chosen.type in ("function", "custom") and chosen.name != name):
            fault = f"against the request's tool_choice: {_dumps(choice)}"
        else:
            return
        if self.fake.strict:
            raise ValueError(f"the handler called the tool {name!r}, {fault}")
        if name not in self.fake._warned:
            self.fake._warned.add(name)
            warnings.warn(f"the handler called the tool {name!r}, {fault}", stacklevel=2)

    def _say_slowly(self, part: _Spoken, texts: Sequence[str]) -> None:
        pieces = [(part, texts[:1]), *((part._more(text), (text,)) for text in texts[1:])]
        for piece, text in pieces:
            self._pace()
            self.sink.write(self.encoder.say(piece, text))

    def _pace(self) -> None:
        """Waits for the time of the next token."""
        seconds, self.ttft = self.ttft or self.itl, 0.0
        if seconds:
            self.pause(seconds)

    # What parts do that are not said.

    def chunk(self, chunk: Chunk) -> None:
        self._pace()
        self.sink.write(self.encoder.chunk(chunk))

    def pause(self, seconds: float) -> None:
        self.sink.flush()
        self.waiter.sleep(seconds)

    def cut(self, reset: bool) -> None:
        if self.waiter.connection is None:  # in the background nobody is connected
            return
        self.over = True
        self.request._outcome = "cut"
        self.sink.cut(reset)
        self.encoder.abandon()

    def fail(self, error: APIError) -> None:
        self.over = True
        self._fail(error)

    def _fail(self, error: APIError) -> None:
        self.request._outcome = error.message
        self.sink.fail(error)

    # Where parts come from.

    def _coming(self, contents: Iterable[_Content]) -> Generator[tuple[_Part, Sequence[str]]]:
        for content in contents:
            for part in self._source(content):
                yield part, part._fragments() if isinstance(part, _Spoken) else ()

    def _source(self, content: Any) -> Iterator[_Part]:
        if isinstance(content, Stream):
            return self._live(content)
        if isinstance(content, (str, _Part)):
            return iter([_part(content)])
        if isinstance(content, Completion):
            return iter(content._parts())
        if isinstance(content, AsyncIterable):
            return self._generated(self.waiter.steps(aiter(cast(Any, content))))
        return self._generated(iter(content))

    def _generated(self, parts: Iterator[Any]) -> Iterator[_Part]:
        """The parts of a generator: each is on the wire before the next is asked for."""
        waiter = self.waiter
        if waiter.streams:
            waiter.enter(bool)  # from now on it is seen between two parts that the client has left
        try:
            for part in parts:
                yield _part(part)
                self.sink.flush()
                waiter.patience()
        finally:
            close = getattr(parts, "close", None)
            if close is not None:
                with suppress(BaseException):  # it may ignore GeneratorExit, or raise: the answer is over
                    close()

    def _live(self, stream: Stream) -> Iterator[_Part]:
        """The parts of a Stream, as the test sends them."""
        taken = 0
        self.sink.open()
        while True:
            try:
                part = stream._queue.get_nowait()
            except queue.Empty:
                self.sink.flush()
                stream._on_wire(taken)
                try:
                    part = self.waiter.get(stream._queue, stream._timeout)
                except queue.Empty:
                    raise TimeoutError(
                        f"a Stream was sent nothing for {stream._timeout} s: close() ends it, "
                        "Stream(timeout=None) waits"
                    ) from None
            if part is _END:
                return
            if part is not _WAKE:
                taken += 1
                yield part

    def _conclude(self, stream: Stream) -> None:
        """Tells a Stream that its answer is over."""
        waiter = self.waiter
        gone = waiter.connection is not None and waiter.connection.gone
        if not gone and not waiter.server.stopping:
            stream._on_wire(stream._sent)
            with self.fake._arrived:
                self.fake._streams.discard(stream)
        elif not gone:
            self.fake._interrupted.append(stream)
        stream._left()


def _arranged(parts: list[_Part], encoder: _Encoder) -> list[_Part]:
    """The parts of an answer that is known: as they are, but repeated for n, and parallel calls as the API has them."""
    calls: dict[int, int] = {}
    for part in parts:
        if isinstance(part, _Call) and part.name:
            calls[part.choice] = calls.get(part.choice, 0) + 1
    if max(calls.values(), default=0) > 1:
        encoder.parallel = True
        if isinstance(encoder, _ChatEncoder):
            parts = [part._spaced() if isinstance(part, ToolCall) else part for part in parts]
    if encoder.n > 1 and not any(getattr(part, "choice", 0) or isinstance(part, Chunk) for part in parts):
        parts = list(_repeated(parts, encoder.n))
    return parts


def _repeated(parts: list[_Part], n: int) -> Iterator[_Part]:
    """What was said once, said by n choices at a time: their tokens interleave (R)."""
    for part in parts:
        if isinstance(part, Finish) or (isinstance(part, _Spoken) and part._in_chat):
            for fragment in part.split() if isinstance(part, _Spoken) else [part]:
                yield from (replace(cast(Any, fragment), choice=choice) for choice in range(n))
        else:
            yield part


def _runs(parts: Iterable[_Part]) -> Generator[tuple[_Part, Sequence[str]]]:
    """Each part with its texts; Texts of one choice in a row go together, as many as are encoded together."""
    run: list[Text] = []
    for part in (*parts, None):
        if run and (type(part) is not Text or part.choice != run[0].choice or len(run) == _RUN):
            yield run[0], [text for each in run for text in each._fragments()]
            run = []
        if type(part) is Text:
            run.append(part)
        elif part is not None:
            yield part, part._fragments() if isinstance(part, _Spoken) else ()


class _Log:
    """The events of a response that is made in the background, for who follows it."""

    def __init__(self, waiter: _Waiter) -> None:
        self.waiter = waiter
        self.lock = threading.Lock()  # guards the fields below
        self.events: list[_Event] = []
        self.over = False
        self.followers: list[queue.SimpleQueue[Any]] = []
        self.cancelled = False

    def add(self, events: Sequence[_Event]) -> None:
        """Appends events, unless the response was cancelled."""
        with self.lock:
            if self.over:
                return
            for event in events:
                self.events.extend(event.events() if isinstance(event, _Deltas) else [event])
            self._wake_followers()

    def end(self) -> None:
        with self.lock:
            self.over = True
            self._wake_followers()

    def _wake_followers(self) -> None:
        for follower in self.followers:
            follower.put(None)

    def cancel(self) -> None:
        """Stops the answer, if it is not over."""
        with self.lock:
            if self.over:
                return
            self.over = self.cancelled = True
            self._wake_followers()
        self.waiter.cancelled = True
        wake = self.waiter.wake
        if wake is not None:
            wake()


class _LogSink(_Sink):
    """The log of a response in the background: there is no wire, and nobody to hang up on."""

    @property
    def begun(self) -> bool:
        return True

    def __init__(self, encoder: _Encoder, log: _Log) -> None:
        self.encoder = encoder
        self.log = log

    def write(self, events: Sequence[_Event]) -> None:
        if self.log.cancelled:
            raise _Gone
        self.log.add(events)

    def end(self) -> None:
        self.write(self.encoder.end())

    def fail(self, error: APIError) -> None:
        self.write(self.encoder.fail(error))


class _Replay:
    """Streams a log's events, from a sequence number on, as they come."""

    def __init__(self, log: _Log, begin: int) -> None:
        self.log = log
        self.begin = begin

    def send(self, connection: _Connection) -> None:
        """Answers on a connection."""
        waiter = _Waiter(connection.server, connection, True)
        coming: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with self.log.lock:
            self.log.followers.append(coming)
        try:
            connection.send(connection.head(200, _EVENTS, _ON_REPLIES))
            self._follow(connection, waiter, coming)
        finally:
            with self.log.lock:
                self.log.followers.remove(coming)
            waiter.end()

    def _follow(self, connection: _Connection, waiter: _Waiter, coming: queue.SimpleQueue[Any]) -> None:
        log, at, over = self.log, self.begin, False
        while not over:
            with log.lock:
                events, over = log.events[at:], log.over
            at += len(events)
            frames = list(_frames(events))
            if connection.http11:
                frames = [*map(_http_chunk, frames), *([_LAST_CHUNK] if over else [])]
            if frames:
                connection.send(b"".join(frames), last=over)
            if not over:
                waiter.get(coming)


# ---- Endpoints -------------------------------------------------------------------------------------------------------
# An endpoint takes the server, the request and the values of its path. It returns JSON, or what sends itself on the
# connection: an _HTTPResponse, a _Delivery, a _Replay.

_Endpoint: TypeAlias = "Callable[..., Any]"
_ENDPOINTS: dict[str, _Endpoint] = {}


def _endpoint(route: str) -> Callable[[_Endpoint], _Endpoint]:
    def register(function: _Endpoint) -> _Endpoint:
        _ENDPOINTS[route] = function
        return function

    return register


class _Route(NamedTuple):
    """Where a request goes."""

    endpoint: _Endpoint
    values: tuple[str, ...]  # of the {names} in the path
    api: str = ""
    deployment: str | None = None  # Azure's


_APIS = {"POST /chat/completions": "chat.completions", "POST /responses": "responses"}
_PREFIX = r"(?s:(?:/openai/deployments/([^/]+)|/openai/v1|/openai|/v1)?(/.*))"


def _values(template: list[str], segments: list[str]) -> tuple[str, ...] | None:
    """The values of the {names} in a route's path; None where a path is not of this route.

    `{name}` is one segment of a path; `{name*}` is the rest of it: a model's name may have slashes.
    """
    if template[-1].endswith("*}") and len(segments) > len(template):
        last = len(template) - 1
        segments = [*segments[:last], "/".join(segments[last:])]
    if len(segments) != len(template):
        return None
    values: list[str] = []
    for name, segment in zip(template, segments, strict=True):
        if name.startswith("{") and segment:
            values.append(segment)
        elif name != segment:
            return None
    return tuple(values)


class _Router:
    """Finds the route of a request among "METHOD /path" names: the first that fits."""

    def __init__(self, endpoints: Mapping[str, _Endpoint]) -> None:
        self.names = tuple(endpoints)
        self.table = [
            (name, method, path.split("/"), endpoint)
            for name, endpoint in endpoints.items()
            for method, _, path in (name.partition(" "),)
        ]
        self.fixed = {name: self._search(*name.split(" ", 1)) for name in endpoints if "{" not in name}

    def find(self, method: str, path: str) -> _Route:
        """HEAD is served as GET; every path also under /v1 and in Azure's form."""
        match = re.fullmatch(_PREFIX, path)
        deployment, rest = match.groups() if match else (None, path)
        method = "GET" if method == "HEAD" else method
        route = self.fixed.get(f"{method} {rest}") or self._search(method, rest)
        return route if deployment is None else route._replace(deployment=deployment)

    def _search(self, method: str, path: str) -> _Route:
        allowed: set[str] = set()
        segments = path.split("/")
        for name, served, template, endpoint in self.table:
            values = _values(template, segments)
            if values is None:
                continue
            if served == method:
                return _Route(endpoint, values, _APIS.get(name, ""))
            allowed |= {served, "HEAD"} if served == "GET" else {served}
        if allowed:
            return _Route(_wrong_method, (", ".join(sorted(allowed)),))
        return _Route(_unknown_route, ())


@lru_cache(1)
def _usual_router() -> _Router:
    return _Router(_ENDPOINTS)


def _wrong_method(fake: FakeOpenAI, request: Request, allowed: str) -> NoReturn:
    raise APIError(
        405,
        f"Not allowed to {request.method} on {request.path}. (HINT: Perhaps you meant to use a different HTTP method?)",
        headers={"allow": allowed},
    )


def _unknown_route(fake: FakeOpenAI, request: Request) -> NoReturn:
    served = ", ".join(sorted(fake._router.names, key=lambda route: route.split(" ")[::-1]))
    raise APIError(404, f"Unknown route: {request.method} {request.path}. Served, also under /v1: {served}.")


def _check_model(fake: FakeOpenAI, request: Request) -> None:
    name = request.model
    if name in fake._model_names():
        return
    if request.api == "responses":
        raise APIError(400, f"The requested model '{name}' does not exist.", param="model", code="model_not_found")
    text = f"The model `{name}` does not exist or you do not have access to it."
    raise APIError(404, text, code="model_not_found")


def _checked_body(fake: FakeOpenAI, request: Request) -> _JSON:
    """The body of a request for an answer. Raises APIError where it is refused."""
    body = request._parse()
    if fake.validate:
        _check_request(request.api, body, fake.strict)
    return body


@_endpoint("POST /chat/completions")
def _create_chat_completion(fake: FakeOpenAI, request: Request) -> _Delivery:
    body = _checked_body(fake, request)
    if fake.strict:
        _check_model(fake, request)
    if body.get("store") is not True:
        return _Delivery(fake, request, _ChatEncoder)

    def store(encoder: _ChatEncoder, log: _Log | None) -> None:
        fake._remember(fake._chats, encoder.id, _StoredChat(request, encoder))

    return _Delivery(fake, request, _ChatEncoder, store)


class _StoredChat:
    """A chat completion that is kept because the request said `store: true`."""

    def __init__(self, request: Request, encoder: _ChatEncoder) -> None:
        self.request = request
        self.encoder = encoder
        self.metadata: Any = request.body.get("metadata") or {}

    def body(self) -> _JSON:
        return {**self.encoder.body(), "metadata": self.metadata}


def _digits(text: str, default: int) -> int:
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else default


def _query(request: Request) -> dict[str, str]:
    """The query's parameters; the last where one came several times."""
    return {key: values[-1] for key, values in parse_qs(request.query).items()}


def _listing(request: Request, items: Sequence[_JSON], order: str) -> _JSON:
    """A page of a list: `limit`, `order` and `after` as the query says."""
    query = _query(request)
    ordered = list(items) if query.get("order", order) == "asc" else list(items)[::-1]
    ids = [item.get("id") for item in ordered]
    if "after" in query and query["after"] in ids:
        ordered = ordered[ids.index(query["after"]) + 1 :]
    limit = max(1, min(_digits(query.get("limit", ""), 20), 100))
    page = ordered[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0].get("id") if page else None,
        "last_id": page[-1].get("id") if page else None,
        "has_more": len(ordered) > limit,
    }


def _stored_chat(fake: FakeOpenAI, id: str) -> _StoredChat:
    chat = fake._chats.get(id)
    if chat is None or not chat.encoder.ended:
        raise APIError(404, f"Chat completion with id '{id}' not found.")
    return chat


@_endpoint("GET /chat/completions")
def _list_chats(fake: FakeOpenAI, request: Request) -> _JSON:
    model = parse_qs(request.query).get("model")
    chats = [(chat.request.model, chat.body()) for chat in tuple(fake._chats.values()) if chat.encoder.ended]
    bodies = [body for asked, body in chats if model is None or asked in model or body["model"] in model]
    return _listing(request, bodies, "asc")


@_endpoint("GET /chat/completions/{id}")
def _get_chat(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    return _stored_chat(fake, id).body()


@_endpoint("POST /chat/completions/{id}")
def _update_chat(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    chat = _stored_chat(fake, id)
    chat.metadata = request._parse().get("metadata") or {}
    return chat.body()


@_endpoint("DELETE /chat/completions/{id}")
def _delete_chat(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    _stored_chat(fake, id)
    fake._chats.pop(id, None)
    return {"object": "chat.completion.deleted", "id": id, "deleted": True}


@_endpoint("GET /chat/completions/{id}/messages")
def _chat_messages_of(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    messages: list[_JSON] = _list(_stored_chat(fake, id).request.body.get("messages"))
    return _listing(request, [{"id": f"{id}-{at}", **_dict(each)} for at, each in enumerate(messages)], "asc")


class _StoredResponse:
    """A response that can be asked for, gone on with, and, if it runs in the background, followed."""

    def __init__(self, encoder: _ResponsesEncoder, history: list[Any], items: list[Any], log: _Log | None) -> None:
        self.encoder = encoder
        self.history = history
        self.input = [_stored_item(item, self.encoder._id) for item in items]
        self.log = log  # in the background

    def over(self) -> bool:
        return self.encoder.status in ("completed", "incomplete")

    def conversation(self) -> list[Any]:
        """All items, up to the end of this response."""
        return [*self.history, *self.input, *self.encoder.output()]

    def body(self) -> _JSON:
        cancelled = self.log is not None and self.log.cancelled
        return self.encoder.response("cancelled" if cancelled else self.encoder.status)


_ITEM_PREFIXES = {"function_call": "fc_", "function_call_output": "fc_", "reasoning": "rs_", "custom_tool_call": "ctc_"}


def _stored_item(item: Any, new_id: Callable[[str], str]) -> Any:
    """An input item as the API lists it: with an id, a status, and content parts."""
    stored: _JSON = {**_dict(item), "type": _item_type(_dict(item))}
    if isinstance(stored.get("content"), str) and stored["type"] == "message":
        kind = "output_text" if stored.get("role") == "assistant" else "input_text"
        stored["content"] = [{"type": kind, "text": stored["content"]}]
    id = stored.pop("id", None)
    if id is None:
        id = new_id(_ITEM_PREFIXES.get(str(stored["type"]), "msg_"))
    return {"id": id, **({"status": "completed"} if stored["type"] == "message" else {}), **stored}


def _history(fake: FakeOpenAI, request: Request, body: _JSON) -> list[Any]:
    """The stored items before this request's input. Raises APIError for what is not stored."""
    conversation, previous = body.get("conversation"), body.get("previous_response_id")
    if isinstance(conversation, dict):
        conversation = _dict(conversation).get("id")
    if isinstance(conversation, str):
        if (kept := fake._conversations.get(conversation)) is not None:
            return kept.items()
        if fake.validate:
            raise APIError(404, f"Conversation with id '{conversation}' not found.")
    if isinstance(previous, str):
        if (stored := fake._responses.get(previous)) is not None:
            return stored.conversation()
        if fake.validate:
            raise APIError(
                400,
                f"Previous response with id '{previous}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
    return []


def _resolved(fake: FakeOpenAI, items: list[Any]) -> list[Any]:
    """Input items with those that they refer to in the place of references."""
    references = [_item_type(_dict(item)) == "item_reference" for item in items]
    if not any(references):
        return items
    stored: dict[str, Any] = {
        str(_dict(item).get("id")): item
        for response in tuple(fake._responses.values())
        for item in (*response.input, *response.encoder.output())
    }
    pairs = zip(items, references, strict=True)
    return [stored.get(str(item.get("id")), item) if refers else item for item, refers in pairs]


@_endpoint("POST /responses")
def _create_response(fake: FakeOpenAI, request: Request) -> Any:
    body = _checked_body(fake, request)
    history = _history(fake, request, body)
    items = _input_items(body.get("input"))
    resolved = _resolved(fake, items)
    if history or resolved is not items:
        request._conversation = [*history, *resolved]
    if fake.validate:
        reasons = _model(request.model).effort is not None
        _check_conversation([*history, *resolved], len(history), reasons)
    if fake.strict:
        _check_model(fake, request)
    background = body.get("background") is True

    def store(encoder: _ResponsesEncoder, log: _Log | None) -> None:
        stored = _StoredResponse(encoder, history, resolved, log)
        fake._remember(fake._responses, encoder.id, stored)
        conversation = encoder.base.get("conversation")
        kept = fake._conversations.get(str(conversation.get("id"))) if conversation else None
        if kept is not None:
            kept.responses.append(stored)

    stores = background or body.get("store") is not False
    delivery = _Delivery(fake, request, _ResponsesEncoder, store if stores else None)
    return delivery.in_background() if background else delivery


def _stored_response(fake: FakeOpenAI, id: str) -> _StoredResponse:
    stored = fake._responses.get(id)
    if stored is None:
        raise APIError(404, f"Response with id '{id}' not found.")
    return stored


@_endpoint("GET /responses/{id}")
def _get_response(fake: FakeOpenAI, request: Request, id: str) -> Any:
    stored = _stored_response(fake, id)
    query = _query(request)
    if query.get("stream") != "true" or request.method == "HEAD":
        return stored.body()
    if stored.log is None:
        raise APIError(400, "This response cannot be streamed because it was not created with background=true.")
    return _Replay(stored.log, _digits(query.get("starting_after", ""), -1) + 1)


@_endpoint("DELETE /responses/{id}")
def _delete_response(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    _stored_response(fake, id)
    fake._responses.pop(id, None)
    return {"id": id, "object": "response.deleted", "deleted": True}


@_endpoint("GET /responses/{id}/input_items")
def _input_items_of(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    stored = _stored_response(fake, id)
    return _listing(request, [*stored.history, *stored.input], "desc")


@_endpoint("POST /responses/{id}/cancel")
def _cancel_response(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    stored = _stored_response(fake, id)
    if stored.log is None:
        raise APIError(400, "Cannot cancel a synchronous response.")
    stored.log.cancel()
    return stored.body()


@_endpoint("POST /responses/input_tokens")
def _count_tokens(fake: FakeOpenAI, request: Request) -> _JSON:
    body = request._parse()
    history = _history(fake, request, body)
    items = [{"content": body.get("instructions")}] if body.get("instructions") else []
    tokens = _estimate([*items, *history, *_input_items(body.get("input"))])
    return {"object": "response.input_tokens", "input_tokens": tokens}


class _Conversation:
    """A conversation object: items that were put in, and the responses made in it."""

    def __init__(self, created: int, metadata: Any, items: list[Any]) -> None:
        self.created = created
        self.metadata = metadata
        self.added = items
        self.responses: list[_StoredResponse] = []

    def items(self) -> list[Any]:
        return [
            *self.added,
            *(item for each in self.responses if each.over() for item in (*each.input, *each.encoder.output())),
        ]

    def body(self, id: str) -> _JSON:
        return {"id": id, "object": "conversation", "created_at": self.created, "metadata": self.metadata}


def _conversation_of(fake: FakeOpenAI, id: str) -> _Conversation:
    conversation = fake._conversations.get(id)
    if conversation is None:
        raise APIError(404, f"Conversation with id '{id}' not found.")
    return conversation


@_endpoint("POST /conversations")
def _create_conversation(fake: FakeOpenAI, request: Request) -> _JSON:
    body = request._parse() if request.raw_body else {}
    ids = fake._ids()
    items = [_stored_item(item, lambda prefix: prefix + ids.hex(50)) for item in _input_items(body.get("items"))]
    id = "conv_" + ids.hex(48)
    conversation = _Conversation(int(fake.clock()), body.get("metadata") or {}, items)
    fake._remember(fake._conversations, id, conversation)
    return conversation.body(id)


@_endpoint("GET /conversations/{id}")
def _get_conversation(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    return _conversation_of(fake, id).body(id)


@_endpoint("POST /conversations/{id}")
def _update_conversation(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    conversation = _conversation_of(fake, id)
    conversation.metadata = request._parse().get("metadata") or {}
    return conversation.body(id)


@_endpoint("DELETE /conversations/{id}")
def _delete_conversation(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    _conversation_of(fake, id)
    fake._conversations.pop(id, None)
    return {"id": id, "object": "conversation.deleted", "deleted": True}


@_endpoint("GET /conversations/{id}/items")
def _conversation_items(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    return _listing(request, _conversation_of(fake, id).items(), "desc")


def _model_object(id: str) -> _JSON:
    return {"id": id, "object": "model", "created": 1715367049, "owned_by": "system"}


@_endpoint("GET /models")
def _list_models(fake: FakeOpenAI, request: Request) -> _JSON:
    return {"object": "list", "data": [_model_object(id) for id in fake._model_names()]}


@_endpoint("GET /models/{id*}")
def _get_model(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    if id not in fake._model_names():
        raise APIError(404, f"The model '{id}' does not exist", param="model", code="model_not_found")
    return _model_object(id)


_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def _embedding(text: str, dimensions: int) -> list[float]:
    """A unit vector, the same on every machine: feature hashing of the words, so who shares words is near.

    Each word adds its length, for short ones say little, with a sign to each of 15 places.
    """
    sums = [0] * dimensions
    for word in _WORDS.findall(text.lower()) or [text]:
        digest = hashlib.shake_256(word.encode("utf-8", "surrogatepass")).digest(60)
        for number in struct.unpack("<15I", digest):
            sums[(number >> 1) % dimensions] += len(word) if number & 1 else -len(word)
    if not any(sums):
        sums[0] = 1
    length = math.sqrt(sum(number * number for number in sums))
    return [round(number / length, 8) for number in sums]


@_endpoint("POST /embeddings")
def _create_embeddings(fake: FakeOpenAI, request: Request) -> _JSON:
    body = request._parse()
    model, given, dimensions = body.get("model"), body.get("input"), body.get("dimensions")
    if not isinstance(model, str) or not model:
        raise APIError(400, "you must provide a model parameter")
    if fake.strict:
        _check_model(fake, request)
    if not isinstance(given, (str, list)) or given in ("", []):
        raise APIError(400, "Missing required parameter: 'input'.", param="input", code="missing_required_parameter")
    inputs: list[Any] = [given] if isinstance(given, str) else _list(given)
    if all(isinstance(each, int) for each in inputs):  # one text, as tokens
        inputs = [inputs]
    if dimensions is None:
        dimensions = 3072 if model == "text-embedding-3-large" else 1536
    elif type(dimensions) is not int or dimensions < 1:
        raise APIError(400, f"{dimensions} is less than the minimum of 1 - 'dimensions'")
    data: list[_JSON] = []
    for index, each in enumerate(inputs):
        text = each if isinstance(each, str) else _dumps(each)
        if fake.embeddings is None:
            vector: Any = _embedding(text, min(dimensions, 3072))
        else:
            vector = [float(number) for number in fake.embeddings(text)]
        if body.get("encoding_format") == "base64":
            vector = b2a_base64(struct.pack(f"<{len(vector)}f", *vector), newline=False).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    tokens = sum(len(each) // 4 + 1 if isinstance(each, str) else len(_list(each)) for each in inputs)
    name = "text-embedding-ada-002-v2" if model == "text-embedding-ada-002" else model
    return {"object": "list", "data": data, "model": name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


_MODERATION = [
    "harassment",
    "harassment/threatening",
    "sexual",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm/intent",
    "self-harm/instructions",
    "self-harm",
    "sexual/minors",
    "violence",
    "violence/graphic",
]


@_endpoint("POST /moderations")
def _create_moderation(fake: FakeOpenAI, request: Request) -> _JSON:
    """Nothing is ever flagged; a test that wants it flagged gives its own route."""
    body = request._parse()
    given = _list(body.get("input"))
    texts = len(given) if all(isinstance(each, str) for each in given) else 1  # content parts are one input
    result = {
        "flagged": False,
        "categories": dict.fromkeys(_MODERATION, False),
        "category_scores": dict.fromkeys(_MODERATION, 1e-06),
        "category_applied_input_types": {name: ["text"] for name in _MODERATION},
    }
    model = _string(body.get("model")) or "omni-moderation-latest"
    id = "modr-" + fake._ids().alnum(29)
    return {"id": id, "model": model, "results": [result] * max(1, texts)}


# ---- HTTP: what arrives ----------------------------------------------------------------------------------------------
# BaseHTTPRequestHandler's own parsing lets smuggled requests through (gh-114782, gh-150499, gh-142533) and is slow, so
# heads and bodies are read here, by RFC 9112, strictly. None of this sees a socket: `_read_request` is a generator that
# reads from a buffer, and yields where it needs more bytes. Every pattern is linear in what it looks at.


class _Refused(Exception):
    """What arrived is not an HTTP request that can be answered; the connection ends with this status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class _Head(NamedTuple):
    """The head of a request, checked."""

    method: str
    path: str  # as it came, without the query
    query: str
    route: str  # the path, percent-decoded once
    headers: _Headers
    http11: bool
    keep_alive: bool
    length: int  # of the body; -1 where it is chunked
    expects: bool  # waits for 100 Continue
    coding: str  # Content-Encoding


_REQUEST_LINE = rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])"
_FIELD = rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([\t\x20-\x7e\x80-\xff]*)"
_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%!$&'()*+,;=-]*)(?::[0-9]*)?"
_LENGTH = r"[0-9]{1,18}"
_CHUNK_SIZE = rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?"
_BAD_PERCENT = r"%(?![0-9A-Fa-f]{2})"
_BEGINNING = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]*(?: [\x21-\x7e]*(?: [HTP/0-9.]*)?)?"
_BARE = re.compile(rb"(?<!\r)\n|\r(?!\n)")


def _request_line(line: bytes) -> tuple[str, str, bool]:
    """Method, target, and whether it is HTTP/1.1."""
    if len(line) > _MAX_LINE:
        raise _Refused(414, f"The request line is longer than {_MAX_LINE} bytes.")
    match = re.fullmatch(_REQUEST_LINE, line)
    if match is None:
        raise _Refused(400, "The request line is not 'METHOD TARGET HTTP/1.1'.")
    if match[3] != b"1" or match[4] not in b"01":
        raise _Refused(505, "The server speaks HTTP/1.1 and HTTP/1.0 only.")
    return match[1].decode(), match[2].decode(), match[4] == b"1"


def _target(method: str, target: str) -> tuple[str, str, str]:
    """Path and query as they came, and the path decoded."""
    if target.startswith("/"):
        path, _, query = target.partition("?")
    elif target == "*" and method == "OPTIONS":
        path, query = target, ""
    elif target.lower().startswith(("http://", "https://")):
        try:
            url = urlsplit(target)
            if not url.hostname or url.port == 0 or not re.fullmatch(_HOST, url.netloc.rpartition("@")[2]):
                raise ValueError  # Python 3.10 takes [zz] for an address
        except ValueError:
            raise _Refused(400, "The request target is not a valid URL.") from None
        path, query = url.path or "/", url.query
    else:
        raise _Refused(400, "The request target is neither a path nor a URL.")
    path = path.partition("#")[0]
    if re.search(_BAD_PERCENT, path):
        raise _Refused(400, "The request target has a '%' that is not followed by two hexadecimal digits.")
    try:
        return path, query, unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        raise _Refused(400, "The path is not UTF-8.") from None


def _field_pairs(lines: list[bytes]) -> list[tuple[str, str]]:
    if len(lines) > _MAX_FIELDS:
        raise _Refused(431, f"The request has more than {_MAX_FIELDS} header fields.")
    fields: list[tuple[str, str]] = []
    for line in lines:
        match = re.fullmatch(_FIELD, line)
        if match is None:
            raise _Refused(400, "A header line is not 'Name: value', or has a control character.")
        fields.append((match[1].decode().lower(), match[2].strip(b" \t").decode("latin-1")))
    return fields


def _parse_head(head: bytes) -> _Head:
    """A request's head, from the request line to the empty line, without the CR LF that ends that."""
    line, _, rest = head.partition(b"\r\n")
    method, target, http11 = _request_line(line)
    path, query, route = _target(method, target)
    fields = _field_pairs(rest.split(b"\r\n")[:-1] if rest else [])
    values: dict[str, list[str]] = {}
    for name, value in fields:
        values.setdefault(name, []).append(value)
    hosts = values.get("host", [])
    if len(hosts) > 1 or (http11 and not hosts) or not all(re.fullmatch(_HOST, host) for host in hosts):
        raise _Refused(400, "The request needs one valid Host header field.")
    tokens = {token.strip().lower() for value in values.get("connection", ()) for token in value.split(",")}
    keep_alive = "close" not in tokens and (http11 or "keep-alive" in tokens)
    expectations = [value.lower() for value in values.get("expect", ())] if http11 else []
    length = _body_length(values, http11)
    if expectations not in ([], ["100-continue"]):
        raise _Refused(417, "The only expectation that is met is 100-continue.")
    coding = ",".join(values.get("content-encoding", ())).strip().lower()
    headers = _Headers(fields)
    return _Head(method, path, query, route, headers, http11, keep_alive, length, bool(expectations), coding)


_parse_known_head = lru_cache(128)(_parse_head)  # a client's heads are the same again and again


def _body_length(values: dict[str, list[str]], http11: bool) -> int:
    lengths, codings = values.get("content-length"), values.get("transfer-encoding")
    if codings is not None:
        if lengths is not None or not http11:
            raise _Refused(400, "Transfer-Encoding goes with HTTP/1.1 and without Content-Length.")
        if [coding.lower() for coding in codings] != ["chunked"]:
            raise _Refused(501, "The only transfer coding that is understood is chunked.")
        return -1
    if lengths is None:
        return 0
    if len(set(lengths)) > 1 or not re.fullmatch(_LENGTH, lengths[0]):
        raise _Refused(400, "Content-Length is not one number.")
    if int(lengths[0]) > _MAX_BODY:
        raise _too_large()
    return int(lengths[0])


def _too_large() -> _Refused:
    return _Refused(413, f"The request body is larger than {_MAX_BODY} bytes.")


class _State(IntEnum):
    """Where a connection stands. The order is that of an answer's way, and of what cannot be taken back."""

    IDLE = 0  # between requests
    HEAD = 1  # in the head of a request
    BODY = 2
    ANSWERING = 3  # the request is whole; nothing of the answer is sent
    SENDING = 4  # the head of the answer is
    CLOSING = 5  # we hang up after what is sent
    RESETTING = 6  # we hang up with a RST
    GONE = 7  # the client has closed or reset


class _Inbox:
    """What has come from a client and is not read yet, and the head of the request that is being read."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.ended = False  # nothing will follow
        self.head: _Head | None = None

    def take(self, count: int) -> bytes:
        taken = bytes(self.data[:count])
        del self.data[:count]  # at the front of a bytearray this copies nothing
        return taken


_Reading: TypeAlias = "Generator[_State | None, None, _T]"  # yields where it waits; None: for 100 Continue first


def _read_request(inbox: _Inbox) -> _Reading[bytes]:
    """Reads a request: its head, kept in the inbox, and its body, which is returned.

    Raises _Refused for what is no request, EOFError where the client closes in the middle.
    """
    head = yield from _read_head(inbox)
    if head.length == 0:
        return b""
    if head.expects and not inbox.data:
        yield None
    return (yield from _read_chunks(inbox) if head.length < 0 else _exactly(inbox, head.length))


def _more(inbox: _Inbox, state: _State) -> _Reading[None]:
    if inbox.ended:
        raise EOFError
    yield state


def _read_head(inbox: _Inbox) -> _Reading[_Head]:
    inbox.head = None
    data = inbox.data
    skipped, seen = 0, 0  # empty lines; bytes of the head that are known to be right so far
    while True:
        while seen == 0 and data.startswith(b"\r\n"):  # RFC 9112 2.2
            del data[:2]
            skipped += 1
            if skipped > 4:
                raise _Refused(400, "Too many empty lines before a request.")
        end = data.find(b"\r\n\r\n", max(0, seen - 3))
        if 0 <= end <= _MAX_HEAD - 2:
            head = inbox.take(end + 2)
            del data[:2]
            inbox.head = parsed = _parse_known_head(head) if len(head) <= 4096 else _parse_head(head)
            return parsed
        if data and bytes(data) != b"\r":
            seen = _check_beginning(data[: end + 2] if end >= 0 else data, seen)
        yield from _more(inbox, _State.HEAD if data else _State.IDLE)


def _check_beginning(data: bytearray, seen: int) -> int:
    """Refuses the beginning of a head as early as it is known to be wrong: the rest may never come.

    data[:seen] was looked at before; returns how much is looked at now.
    """
    end = len(data) - data.endswith(b"\r")  # the LF may be on its way
    if data.find(b"\r\n", 0, seen) < 0:
        line, crlf, _ = bytes(data[:end]).partition(b"\r\n")
        if crlf or len(line) > _MAX_LINE:
            _request_line(line)
        if not re.fullmatch(_BEGINNING, line):
            raise _Refused(400, "The request line is not 'METHOD TARGET HTTP/1.1'.")
    if _BARE.search(data, seen, end):
        raise _Refused(400, "A line of the head does not end with CR LF.")
    if data.count(b"\r\n") > _MAX_FIELDS + 1:
        raise _Refused(431, f"The request has more than {_MAX_FIELDS} header fields.")
    if len(data) > _MAX_HEAD:
        raise _Refused(431, f"The head of the request is larger than {_MAX_HEAD} bytes.")
    return end


def _exactly(inbox: _Inbox, count: int) -> _Reading[bytes]:
    while len(inbox.data) < count:
        yield from _more(inbox, _State.BODY)
    return inbox.take(count)


def _read_line(inbox: _Inbox) -> _Reading[bytes]:
    """A line of the chunked coding, without its CR LF."""
    while (end := inbox.data.find(b"\n", 0, _MAX_CHUNK_LINE)) < 0:
        if len(inbox.data) > _MAX_CHUNK_LINE:
            raise _Refused(400, f"A line of the chunked body is longer than {_MAX_CHUNK_LINE} bytes.")
        yield from _more(inbox, _State.BODY)
    line = inbox.take(end + 1)
    if not line.endswith(b"\r\n"):
        raise _Refused(400, "A line of the chunked body does not end with CR LF.")
    return line[:-2]


def _read_chunks(inbox: _Inbox) -> _Reading[bytes]:
    """A body in the chunked coding (RFC 9112 7.1), without its trailers."""
    body = bytearray()
    while True:
        match = re.fullmatch(_CHUNK_SIZE, (yield from _read_line(inbox)))
        if match is None:
            raise _Refused(400, "The size of a chunk is not a hexadecimal number.")
        size = int(match[1], 16)
        if len(body) + size > _MAX_BODY:
            raise _too_large()
        if size == 0:
            break
        body += yield from _exactly(inbox, size)
        if (yield from _exactly(inbox, 2)) != b"\r\n":
            raise _Refused(400, "A chunk is not as long as it says.")
    trailers: list[bytes] = []
    while line := (yield from _read_line(inbox)):
        trailers.append(line)
        if len(trailers) > _MAX_FIELDS:
            break
    _field_pairs(trailers)
    return bytes(body)


def _decoded(body: bytes, coding: str) -> bytes:
    """A body without its Content-Encoding. Raises APIError, as the connection stays in step."""
    if coding in ("", "identity"):
        return body
    if coding == "zstd":
        try:
            decoder: Any = import_module("compression.zstd").ZstdDecompressor()  # Python 3.14
        except ImportError:
            raise APIError(415, "Unsupported Content-Encoding: 'zstd'.") from None
        return _inflate(body, decoder.decompress, lambda: bool(decoder.eof))
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise APIError(415, f"Unsupported Content-Encoding: {coding!r}. Use gzip, deflate or none.")
    # RFC 9110 8.4.1.2: deflate is zlib's format, but some send it bare, which does not begin with 0x?8
    bare = coding == "deflate" and (body[:1] or b"\0")[0] & 15 != 8
    zlib_decoder: Any = zlib.decompressobj(31 if coding != "deflate" else -15 if bare else 15)

    return _inflate(body, zlib_decoder.decompress, lambda: zlib_decoder.eof and not zlib_decoder.unused_data)


def _inflate(body: bytes, decompress: Callable[[bytes, int], bytes], whole: Callable[[], bool]) -> bytes:
    try:
        data = decompress(body, _MAX_BODY + 1)
    except Exception:  # zlib.error, ZstdError
        data, whole = b"", lambda: False
    if len(data) > _MAX_BODY:
        raise APIError(413, f"The request body is larger than {_MAX_BODY} bytes when it is decoded.")
    if not whole():
        raise APIError(400, "The request body is not what its Content-Encoding says.")
    return data


# ---- HTTP: connections and the server --------------------------------------------------------------------------------


class _HTTPResponse(NamedTuple):
    """A whole HTTP response, 200 unless said otherwise, that no encoder makes: body, status, more header fields."""

    body: bytes
    content_type: str = "application/json"
    status: int = 200
    headers: Mapping[str, str] = {}

    def send(self, connection: _Connection) -> None:
        """Answers on a connection."""
        connection.send_whole(self.body, self.status, self.content_type, fields=self.headers)


class _Connection(BaseRequestHandler):
    """One client's connection: reads requests, one after another, and answers them in order."""

    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]  # typeshed's is the base class's

    def setup(self) -> None:
        self.sock: socket.socket = self.request  # socketserver calls it so
        self.inbox = _Inbox()
        self.state = _State.IDLE
        self.deadline = math.inf  # when the server's loop ends what this connection waits for
        self.http11 = True
        self.asked: Request  # what is being answered
        self.started = 0.0  # since when
        self.server.connections.add(self)

    def handle(self) -> None:
        """Answers requests until the connection ends."""
        try:
            if not _INHERITS or self.sock.gettimeout() is not None:
                self.sock.settimeout(None)
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not self.server.stopping and self.state < _State.CLOSING:
                self._serve_one()
        except (_Gone, OSError):
            pass
        except Exception:
            _LOG.exception("a connection failed in the server itself")

    def finish(self) -> None:
        self.server.connections.discard(self)
        with suppress(OSError):
            if self.state is _State.RESETTING:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.sock.close()
            elif not self.gone:  # not only close(): a forked child may hold a copy
                self.sock.shutdown(socket.SHUT_WR)

    # Reading.

    @property
    def gone(self) -> bool:
        """Whether the client has closed or reset."""
        return self.state is _State.GONE

    def _read(self) -> bytes:
        """Reads a request, and returns its body; the head is in the inbox."""
        if not self.inbox.data:
            self._receive(_State.IDLE)
        reading = _read_request(self.inbox)
        while True:
            try:
                waits = next(reading)
            except StopIteration as end:
                return cast(bytes, end.value)
            if waits is None:
                self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            else:
                self._receive(waits)

    def _receive(self, state: _State) -> None:
        """Reads more into the inbox. The time for it runs from the beginning of the state."""
        if state is not self.state or self.deadline == math.inf:
            self.state = state
            self.deadline = time.monotonic() + self.server.limits[state]
        data = self.sock.recv(_BATCH if state is _State.BODY else _READ)
        self.inbox.data += data
        self.inbox.ended = not data

    def read_ahead(self) -> bool:
        """Reads what has arrived behind the request that is being answered. Returns whether the client is still there.

        One that sends without end what nobody will read is as good as gone.
        """
        try:
            if not _DONT_WAIT and not select.select([self.sock], [], [], 0)[0]:
                return True
            data = self.sock.recv(_BATCH, _DONT_WAIT)
        except BlockingIOError:
            return True
        except (OSError, ValueError):
            data = b""
        self.inbox.data += data
        if not data or len(self.inbox.data) > _MAX_HEAD + _MAX_BODY:
            self.state = _State.GONE
        return not self.gone

    def peer_gone(self) -> bool:
        """Whether the client has closed, seen without reading."""
        if not self.gone:
            try:
                readable = _DONT_WAIT or select.select([self.sock], [], [], 0)[0]
                if readable and not self.sock.recv(1, socket.MSG_PEEK | _DONT_WAIT):
                    self.state = _State.GONE
            except BlockingIOError:
                pass
            except (OSError, ValueError):
                self.state = _State.GONE
        return self.gone

    # Sending.

    @property
    def headed(self) -> bool:
        """Whether the head of the answer is sent, or none will be."""
        return self.state >= _State.SENDING

    def send(self, data: bytes, last: bool = False) -> None:
        """Sends all of it. Raises _Gone where the client is gone, or reads nothing for too long.

        `last`: the answer ends with it; who has read that finds its request no more in flight.
        """
        if self.state < _State.SENDING:
            self.state = _State.SENDING
        if last:
            self.server.fake._depart(self.asked)
        try:
            sent = self.sock.send(data, _DONT_WAIT)
            if sent == len(data):
                return
        except BlockingIOError:
            sent = 0
        except OSError:
            self.state = _State.GONE
            raise _Gone from None
        rest = memoryview(data)[sent:]
        try:
            while rest:  # in pieces: who reads steadily may take its time
                self.deadline = time.monotonic() + self.server.limits[_State.SENDING]
                rest = rest[self.sock.send(rest[:_BATCH]) :]
        except OSError:
            self.state = _State.GONE
            raise _Gone from None
        finally:
            self.deadline = math.inf

    def hang_up(self, reset: bool) -> None:
        """Ends the connection after what is sent."""
        if not self.gone:
            self.state = _State.RESETTING if reset else _State.CLOSING

    def head(
        self, status: int, content_type: str, usual: bytes, fields: Mapping[str, str] = {}, length: int | None = None
    ) -> bytes:
        """The head of an answer, with that length, or of a stream, whose end tells its length."""
        fake, asked = self.server.fake, self.inbox.head
        self.asked._status = status
        if length is None and not self.http11:
            self.hang_up(False)  # the end of the connection ends the stream
        line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status
        head = b"%bcontent-type: %b\r\n%b" % (line, content_type.encode(), usual)
        if fake.cors:
            head += _CORS
        if asked is None or not asked.keep_alive or self.state >= _State.CLOSING:
            head += b"connection: close\r\n"
        head += _date_field(int(time.time())) + b"x-request-id: req_%b\r\n" % fake._ids().hex(32).encode()
        if usual != _GATEWAY:
            head += b"openai-processing-ms: %d\r\n" % ((time.perf_counter() - self.started) * 1000)
        if fields:
            head = _with_fields(head, fields)
        if length is not None:
            return head + (b"\r\n" if status == 204 else b"content-length: %d\r\n\r\n" % length)
        return head + (b"transfer-encoding: chunked\r\n\r\n" if self.http11 else b"\r\n")

    def send_whole(
        self, body: bytes, status: int, content_type: str, usual: bytes = _USUAL, fields: Mapping[str, str] = {}
    ) -> None:
        """Sends an answer that is known."""
        head = self.head(status, content_type, usual, fields, len(body))
        self.send(head if self.asked.method == "HEAD" or status == 204 else head + body, last=True)

    def _send_error(self, error: APIError) -> None:
        """Answers with an error of the API, in the form of who sends it there: the gateway or the application."""
        status, request = error.status, self.asked
        responses = request.api == "responses"
        unknown_model = error.code == "model_not_found" and error.param is None
        gateway = not responses and (status == 401 or (status == 404 and unknown_model))
        if gateway:
            usual = _GATEWAY
        elif status == 401:
            usual = _VERSION
        else:
            usual = _USUAL + (_RATE_LIMITS if request.api == "chat.completions" else b"")
        fields = dict(error.headers)
        if status == 401 and responses:
            fields.setdefault("www-authenticate", 'Bearer realm="OpenAI API"')
        content_type = "application/json; charset=utf-8" if gateway else "application/json"
        self.send_whole(_utf8(_dumps({"error": error._error()})), status, content_type, usual, fields)
        request._outcome = request._outcome or error.message

    # One request and its answer.

    def _serve_one(self) -> None:
        self.state, self.deadline = _State.IDLE, math.inf
        try:
            raw_body = self._read()
        except EOFError:
            refused = self._end_of_input()
            if refused is None:
                self.state = _State.GONE
                return
            self._refuse(refused)
        except _Refused as refused:
            self._refuse(refused)
        else:
            self.state, self.deadline = _State.ANSWERING, math.inf
            self._answer(cast(_Head, self.inbox.head), raw_body)

    def _end_of_input(self) -> _Refused | None:
        """What a client is told whose input ended, or was ended by the server's loop, in the middle of a request."""
        expired = time.monotonic() >= self.deadline
        if self.inbox.head is None:
            return _Refused(408, "The request did not arrive in time.") if expired and self.inbox.data else None
        if expired:
            return _Refused(408, "The request did not arrive in time.")
        return _Refused(400, "The connection was closed before the request body was whole.")

    def _refuse(self, refused: _Refused) -> None:
        self.state, self.deadline = _State.CLOSING, math.inf
        self.started = time.perf_counter()
        head = self.inbox.head
        method, path = (head.method, head.path) if head is not None else ("", "")
        self.asked = Request("", method, path, "", {})
        with suppress(_Gone):
            self._send_error(APIError(refused.status, refused.message))
        self.server.fake._note(self.asked)
        self.server.fake._ended(self.asked, self.started)
        self._linger()

    def _linger(self) -> None:
        """Reads what the client still sends, for a while: closing at once would reset, and destroy the reply."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            end = time.monotonic() + 1.0
            while (rest := end - time.monotonic()) > 0:
                self.sock.settimeout(rest)
                if not self.sock.recv(_BATCH):
                    break

    def _answer(self, head: _Head, raw_body: bytes) -> None:
        fake = self.server.fake
        self.started = time.perf_counter()
        self.http11 = head.http11
        route = fake._router.find(head.method, head.route)
        self.asked = request = Request(route.api, head.method, head.path, head.query, head.headers, raw_body)
        request._connection = self
        request._deployment = route.deployment
        fake._arrive(request)
        try:
            if head.coding:
                request.raw_body = _decoded(raw_body, head.coding)
            if fake.api_key is not None:
                fake._check_key(request)
            answer = route.endpoint(fake, request, *route.values)
            if isinstance(answer, dict):
                answer = _HTTPResponse(_utf8(_dumps(cast(_JSON, answer))))
            answer.send(self)
        except APIError as error:
            self._send_error(error)
        except _Gone:
            request._outcome = request._outcome or "client left"
            self.hang_up(False)
            _LOG.info("%s %s: the client left, the answer stopped", head.method, head.path)
        except BaseException as error:  # the handler's fault: or else this server's own
            message = fake._keep_error(error, request)
            self._send_error(APIError(500, message, headers={"x-should-retry": "false"}))
        finally:
            fake._ended(request, self.started)
            request._forget()
        if not head.keep_alive and self.state < _State.CLOSING:
            self.state = _State.CLOSING


_LIMITS = {  # seconds that a connection may take: for reading in each state, and for a write that makes no progress
    _State.IDLE: 60.0,
    _State.HEAD: 10.0,
    _State.BODY: 20.0,
    _State.SENDING: 20.0,
}
_INHERITS = sys.platform == "linux"  # accepted sockets: TCP_NODELAY from the listener, and no O_NONBLOCK
_DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)  # Windows has none: there a slow client is waited for in send()


class _Server(ThreadingHTTPServer):
    """The listener, its loop, and the threads that connections run on, which are used again."""

    request_queue_size = 1024  # a backlog of 5, the default, stalls connects for a second
    allow_reuse_address = os.name == "posix"  # elsewhere it lets two servers share a port
    allow_reuse_port = False
    sweep = 0.5  # seconds between looks at the deadlines

    def __init__(self, fake: FakeOpenAI, host: str, port: int) -> None:
        self.fake = fake
        self.limits = dict(_LIMITS)
        self.stopping = False
        self.connections: set[_Connection] = set()
        self.waiters: set[_Waiter] = set()
        self.threads: set[threading.Thread] = set()
        self.jobs: queue.SimpleQueue[tuple[socket.socket, Any] | None] = queue.SimpleQueue()
        self.sockets: set[socket.socket] = set()  # of all connections, also of those that wait for a thread
        self.idle = 0  # threads that wait for a job that nobody was promised
        self.lock = threading.Lock()  # guards idle and threads
        self.address_family, address = _address(host, port)
        super().__init__(address, _Connection)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own asks for the host's name, which can take half a minute
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def start(self) -> None:
        """Starts the loop's thread."""
        self.socket.setblocking(False)
        with suppress(OSError):
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.waker, self.alarm = socket.socketpair()
        self.waker.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.socket, selectors.EVENT_READ)
        self.selector.register(self.waker, selectors.EVENT_READ)
        self.thread = threading.Thread(target=self.serve_forever, name="openai_fake", daemon=True)
        try:
            self.thread.start()
        except BaseException:
            for each in (self.selector, self.waker, self.alarm):
                each.close()
            raise

    @override
    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """The loop: accepts, tells waiters that their client did something, and looks at deadlines."""
        select, listener, waker = self.selector.select, self.socket, self.waker
        sweep, resume = math.inf, math.inf
        while True:
            now = time.monotonic()
            sweep = min(sweep, now + self.sweep) if self.sockets else math.inf
            until = min(sweep, resume)
            events = select(None if until == math.inf else min(max(0.0, until - now), _LONGEST))
            if self.stopping:
                return
            for key, _ in events:
                if key.fileobj is listener:
                    if not self._accept():
                        self.selector.unregister(listener)
                        resume = time.monotonic() + 0.1  # out of descriptors: try again when some may be free
                elif key.fileobj is waker:
                    waker.recv(4096)
                else:
                    self.unwatch(cast(socket.socket, key.fileobj))
                    key.data.notice()
            now = time.monotonic()
            if now >= sweep:
                sweep = math.inf
                self._sweep(now)
            if now >= resume:
                resume = math.inf
                self.selector.register(listener, selectors.EVENT_READ)

    def _accept(self) -> bool:
        """Accepts one connection; False if that is not possible now. Another that waits is told by the next select."""
        try:
            sock, address = self.socket.accept()
        except (BlockingIOError, ConnectionError):
            return True
        except OSError:
            return self.stopping
        self.sockets.add(sock)
        self.process_request(sock, address)
        return True

    def _sweep(self, now: float) -> None:
        for connection in tuple(self.connections):
            if now >= connection.deadline:
                reads = connection.state < _State.ANSWERING  # a read sees the end; a blocked write must see more
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RD if reads else socket.SHUT_RDWR)

    def watch(self, sock: socket.socket, waiter: _Waiter) -> None:
        """Calls waiter.notice() once, when the socket has something to read."""
        with suppress(ValueError, KeyError, OSError, RuntimeError):  # it is closed, or watched already
            self.selector.register(sock, selectors.EVENT_READ, waiter)
        if not _SELECTS_LIVE:
            self.wake()

    def unwatch(self, sock: socket.socket) -> None:
        """Before the socket is closed: its descriptor is used again, and a forked child may keep it open."""
        with suppress(ValueError, KeyError, OSError, RuntimeError):  # selectors looks for a closed one in a loop
            self.selector.unregister(sock)

    def wake(self) -> None:
        """Makes the loop look around."""
        with suppress(OSError):
            self.alarm.send(b"!")

    @override
    def process_request(self, request: Any, client_address: Any) -> None:
        """Gives a connection to a thread that waits, or to a new one."""
        with self.lock:
            if self.idle:
                self.idle -= 1
                self.jobs.put((request, client_address))
                return
        try:
            self._start(self._work, "openai_fake connection")
        except RuntimeError:  # no more threads: this connection is lost, the server is not
            self.shutdown_request(request)
        else:
            self.jobs.put((request, client_address))

    def _start(self, work: Callable[[], None], name: str) -> None:
        """Starts a thread that stop() waits for. Raises RuntimeError where there can be no more threads."""

        def run() -> None:
            try:
                work()
            finally:
                with self.lock:
                    self.threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=name, daemon=True)
        with self.lock:  # whoever finds it in `threads` can join it
            thread.start()
            self.threads.add(thread)

    def _work(self) -> None:
        """A connection thread: takes jobs until none has come for a second."""
        while True:
            try:
                job = self.jobs.get(timeout=1.0)
            except queue.Empty:
                with self.lock:
                    if self.idle:  # else a job is on its way
                        self.idle -= 1
                        return
                continue
            if job is None:
                return
            self.process_request_thread(*job)
            with self.lock:
                self.idle += 1

    def run(self, function: Callable[[], None]) -> None:
        """Runs a function on a thread of its own, that stop() waits for."""
        self._start(function, "openai_fake background")

    @override
    def shutdown_request(self, request: Any) -> None:
        self.sockets.discard(request)
        self.close_request(request)  # its handler has shut it down

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        _LOG.exception("a connection failed in the server itself")

    def stop(self) -> list[threading.Thread]:
        """Stops, within a second or so. Returns the threads that did not end."""
        for waiter in tuple(self.waiters):
            if waiter.connection is not None:
                waiter.connection.peer_gone()  # as long as it can be seen who has hung up
        self.stopping = True
        self.wake()
        current = threading.current_thread()
        if self.thread is not current:
            self.thread.join()
        with suppress(OSError):  # shutdown, not only close: a forked child may hold a copy
            self.socket.shutdown(socket.SHUT_RDWR)
        self.server_close()
        for sock in tuple(self.sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for waiter in tuple(self.waiters):
            wake = waiter.wake
            if wake is not None:
                wake()
        with self.lock:
            threads = tuple(self.threads)
        for _ in threads:
            self.jobs.put(None)
        end = time.monotonic() + _STOP_SECONDS
        for thread in threads:
            if thread is not current:
                thread.join(max(0.0, end - time.monotonic()))
        self.selector.close()
        self.waker.close()
        self.alarm.close()
        return [thread for thread in threads if thread is not current and thread.is_alive()]


# whether a socket may be registered while another thread selects
_SELECTS_LIVE = hasattr(selectors, "EpollSelector") or hasattr(selectors, "KqueueSelector")


def _address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """Family and address to bind; names are looked up, addresses are not, and IPv4 comes first."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):
            socket.inet_pton(family, host)
            return family, (host, port)
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    return family, address


# ---- The server that tests use ---------------------------------------------------------------------------------------


class Options(TypedDict, total=False):
    """The keywords of FakeOpenAI and `start`, for who hands them on: `**options: Unpack[Options]`."""

    host: str
    port: int
    api_key: str | None
    validate: bool
    strict: bool
    ttft: float
    itl: float
    models: Sequence[str] | None
    routes: Mapping[str, Callable[[Request], object]] | None
    keep: int | None
    cors: bool
    seed: int | None
    clock: Callable[[], float]
    embeddings: Callable[[str], Sequence[float]] | None


class FakeOpenAI:
    """A server that answers like OpenAI's API, with what `handler` says. Use it in `with`, or `start` and `stop` it.

    - `host`, `port`: where to listen; port 0 is any free one.
    - `api_key`: when it is set, requests with another key, or none, get the API's 401.
    - `validate`: refuse what the real API refuses; `strict`: also parameters and models that it does not know.
    - `ttft`, `itl`: seconds to the first token, and between tokens.
    - `models`: what GET /models lists.
    - `routes`: more endpoints, or others: `{"POST /audio/speech": function}`; a function takes the Request and returns
      what is sent as JSON, or bytes, or an APIError. A {name} in a route stands for any one segment of the path.
    - `keep`: how many requests are kept in `requests`, answers with `store`, and `errors`, the first; None keeps all.
    - `cors`: answer browsers of any origin.
    - `seed`, `clock`: ids and times come from them, and are the same in every run. `clock` returns unix seconds.
    - `embeddings`: takes a text and returns its vector; without it, texts that share words are near each other.

    What went wrong in the fake so far is in `errors`; `stop` raises the first. Raises TypeError for a handler that is
    not callable, ValueError for a route that is not "METHOD /path".
    """

    _server: _Server | None = None
    _count = 0

    def __init__(
        self,
        handler: Handler = echo,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        validate: bool = True,
        strict: bool = False,
        ttft: float = 0.0,
        itl: float = 0.0,
        models: Sequence[str] | None = None,
        routes: Mapping[str, Callable[[Request], object]] | None = None,
        keep: int | None = None,
        cors: bool = False,
        seed: int | None = None,
        clock: Callable[[], float] = time.time,
        embeddings: Callable[[str], Sequence[float]] | None = None,
    ) -> None:
        if not callable(handler):
            raise TypeError(
                f"a handler is a function that takes a Request, not {handler!r}; Script(...) makes one of answers"
            )
        _check_fields(self, host=(host, str), port=(port, int), api_key=(api_key, _WORD), keep=(keep, _NUMBER))
        _check_fields(self, ttft=(ttft, _SECONDS), itl=(itl, _SECONDS))
        if isinstance(models, str):
            raise TypeError(f"FakeOpenAI wants a list of names for models, not {models!r}")
        self.handler = handler
        self.host = host
        self.port = port
        self.api_key = api_key
        self.validate = validate
        self.strict = strict
        self.ttft = ttft
        self.itl = itl
        self.models = models
        self.cors = cors
        self.seed = seed
        self.clock = clock
        self.embeddings = embeddings
        self.errors: list[BaseException] = []
        self._warned: set[str] = set()  # tools that were called, but not offered
        own = {_route_name(name): _own_route(each) for name, each in (routes or {}).items()}
        if cors:
            own["OPTIONS /{path*}"] = _preflight
        others = {name: each for name, each in _ENDPOINTS.items() if name not in own}
        self._router = _Router({**own, **others}) if own else _usual_router()
        self._keep = keep
        self._journal: deque[Request] = deque(maxlen=keep)
        self._arrived = threading.Condition()  # guards _waiting, _count, _streams; tells that a request came
        self._waiting = 0
        self._flying: dict[int, Request] = {}
        self._recent: deque[Request] = deque(maxlen=19)  # the last: their answers are kept, for the transcript
        self._streams: WeakSet[Stream] = WeakSet()  # that did not end; what nobody holds, nobody can close
        self._interrupted: list[Stream] = []  # of them, those that stop() cut: held, so that they are told
        self._observe: Callable[[Request], None] | None = None
        self._unseeded = _Ids(random.Random().getrandbits)
        self._numbers = iter(range(sys.maxsize))
        # Three stores without a lock: each access is one operation of a dict, or goes over a copy.
        self._responses: dict[str, _StoredResponse] = {}
        self._chats: dict[str, _StoredChat] = {}
        self._conversations: dict[str, _Conversation] = {}
        self._stopping = threading.Lock()  # taken by the first stop()
        self._pid = 0

    # For tests.

    def start(self) -> Self:
        """Starts the server. Raises OSError where it can't listen, RuntimeError when it was started before."""
        if self._server is not None:
            raise RuntimeError("the server was started before; a FakeOpenAI is started once")
        server = _Server(self, self.host, self.port)
        try:
            server.start()
        except BaseException:
            server.server_close()
            raise
        self._server = server
        self._pid = os.getpid()
        return self

    def stop(self) -> None:
        """Stops the server: cuts all connections, and frees the port, its threads and descriptors.

        Then raises the first of `errors`, unless an exception is being handled already. Can be called again, from any
        thread, and from a handler.
        """
        __tracebackhide__ = True  # pytest shows no frame that has it
        failing = sys.exc_info()[1]
        if (error := self._stop(None if failing is None else partial(_tell, failing))) is not None:
            raise error

    def _stop(self, tell: Callable[[str], object] | None) -> BaseException | None:
        """Stops. What went wrong is returned; or, where the test has failed already, `tell` gets it as a text."""
        server = self._server
        if server is None or self._pid != os.getpid() or not self._stopping.acquire(blocking=False):
            return None  # in a forked child the server is the parent's
        for thread in server.stop():
            _LOG.warning("stopped, but a handler still runs on %s", thread.name)
        return self._verdict(tell)

    def _verdict(self, tell: Callable[[str], object] | None) -> BaseException | None:
        checks = [self.handler._check_used] if isinstance(self.handler, Script) else []
        with self._arrived:
            checks += [stream._check_closed for stream in self._streams]
        for check in checks:
            try:
                check()
            except (AssertionError, RuntimeError) as error:
                error.__context__ = None  # the test's own failure
                self.errors.append(error)
        errors = tuple(self.errors)
        text = self.transcript() + "".join(f"\nAnother error: {_short(repr(error))}" for error in errors[1:6])
        if tell is not None:
            first = ("".join(traceback.format_exception(_cut(error))).rstrip() for error in errors[:1])
            tell("\nThe fake had failed before:\n".join([text, *first]))
            return None
        return _raisable(errors[0], text) if errors else None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        if (failure := self._stop(None if error is None else partial(_tell, error))) is not None:
            raise failure

    @property
    def url(self) -> str:
        """The root: http://HOST:PORT."""
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self._running().server_port}"

    @property
    def base_url(self) -> str:
        """What clients take as base URL: `url` and /v1."""
        return self.url + "/v1"

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables that point OpenAI's clients here, and keep them from asking a proxy for it."""
        direct = ["127.0.0.1", "localhost", str(urlsplit(self.url).hostname)]
        names = ("no_proxy", "NO_PROXY")  # some clients read the one, some the other
        direct += [name for each in names for name in os.environ.get(each, "").split(",") if name]
        proxies = dict.fromkeys(names, ",".join(dict.fromkeys(direct)))
        return {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_KEY": self.api_key or "sk-fake", **proxies}

    @property
    def requests(self) -> list[Request]:
        """Every request so far, also those that were refused; the last `keep` of them."""
        return list(self._journal)

    @property
    def in_flight(self) -> list[Request]:
        """The requests that are being answered now."""
        return list(self._flying.values())

    def wait_for_requests(self, n: int, timeout: float = 5.0) -> list[Request]:
        """Waits until `n` requests have come, and returns them all. Raises TimeoutError after `timeout` seconds."""
        with self._arrived:
            self._waiting += 1
            try:
                if not _wait(self._arrived, lambda: self._count >= n, timeout, "server.wait_for_requests"):
                    raise TimeoutError(f"{self._count} of {n} requests came in {timeout} s")
            finally:
                self._waiting -= 1
        return self.requests

    def transcript(self) -> str:
        """The last requests and what was answered, a line each; 20 lines at most."""
        requests = tuple(self._recent)
        if not requests:
            return "No request came to the fake."
        lines = ["The last requests to the fake, and its answers:"]
        for request in requests:
            said = ", ".join(_short(repr(part)) for part in request._said[:4])
            unsaid = "no answer yet" if id(request) in self._flying else "cut"
            lines.append(f"  {request!r} -> {request._status or unsaid} {_short(request._outcome) or said}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        where = "not started" if self._server is None else self.base_url
        return f"<FakeOpenAI {where}, {self._count} requests>"

    # For the server.

    def _running(self) -> _Server:
        if self._server is None:
            raise RuntimeError("the server is not started: use it in `with`, or call start()")
        return self._server

    def _ids(self) -> _Ids:
        if self.seed is None:
            return self._unseeded
        return _Ids(random.Random(f"{self.seed} {next(self._numbers)}").getrandbits)

    def _model_names(self) -> Sequence[str]:
        if self.models is not None:
            return self.models
        return sorted({*_SNAPSHOTS, *_SNAPSHOTS.values(), *_OTHER_MODELS})

    def _remember(self, store: dict[str, Any], id: str, value: object) -> None:
        store[id] = value
        if self._keep is not None and len(store) > (keep := max(1, self._keep)):
            for old in tuple(store)[:-keep]:  # a copy, and pop: other threads add and delete at the same time
                store.pop(old, None)

    def _arrive(self, request: Request) -> None:
        self._journal.append(request)
        self._flying[id(request)] = request
        self._note(request)
        with self._arrived:
            self._count += 1
            if self._waiting:
                self._arrived.notify_all()

    def _note(self, request: Request) -> None:
        if len(self._recent) == self._recent.maxlen:
            with suppress(IndexError):
                self._recent[0]._encoder = None
        self._recent.append(request)

    def _depart(self, request: Request) -> None:
        self._flying.pop(id(request), None)

    def _check_key(self, request: Request) -> None:
        if request.method == "OPTIONS":
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key = request.headers.get("api-key", "") if not key or scheme.lower() != "bearer" else key.strip()
        if key == self.api_key:
            return
        if key:
            shown = key if len(key) <= 12 else key[:8] + "*" * (len(key) - 12) + key[-4:]
            text = f"Incorrect API key provided: {shown}. "
            text += "You can find your API key at https://platform.openai.com/account/api-keys."
            raise APIError(401, text, code="invalid_api_key")
        if request.api == "responses":
            raise APIError(401, "Missing bearer or basic authentication in header")
        raise APIError(401, _NO_KEY)

    def _keep_error(self, error: BaseException, request: Request) -> str:
        """Keeps what went wrong for the test. Returns what the client is told."""
        if self._keep is None or len(self.errors) < max(1, self._keep):  # a traceback holds its request
            self.errors.append(error)
        try:
            text = str(error)
        except BaseException:
            text = "(and its str() raised as well)"
        message = text
        if not text.startswith("handler returned"):
            message = f"handler raised {type(error).__name__}: {text}{_place(error)}"
        _LOG.info("%s %s: %s", request.method, request.path, message)
        return message

    def _ended(self, request: Request, started: float) -> None:
        request._seconds = time.perf_counter() - started
        self._flying.pop(id(request), None)
        if self._observe is not None:
            with suppress(Exception):
                self._observe(request)
        if request not in tuple(self._recent):  # many came since: it is no more of the last
            request._encoder = None


_NOT_USERS = re.compile(  # where code is that is not the user's; a dataclass's __init__ is of <string>
    rf"{re.escape(__file__)}\Z|{re.escape(os.path.dirname(os.__file__))}[\\/]|.*[\\/](site|dist)-packages[\\/]|<(string|frozen)"
)


def _place(error: BaseException) -> str:
    """The innermost of the user's own lines that an error passed; "" where it passed none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not _NOT_USERS.match(frame.filename):
            return f" ({os.path.basename(frame.filename)}:{frame.lineno} in {frame.name})"
    return ""


def _cut(error: BaseException) -> BaseException:
    """An error whose traceback begins at the handler: without the frames of this file above it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return error.with_traceback(trace)


def _tell(error: BaseException, text: str) -> None:
    """Adds a text that is shown with an error's traceback: under it, or above it where Python has no notes."""
    if type(error).__name__ in ("SkipTest", "Skipped", "XFailed"):  # unittest's and pytest's: no failures
        return
    if sys.version_info >= (3, 11):
        error.add_note(text)
        return
    first = error
    while (before := first.__cause__ or (None if first.__suppress_context__ else first.__context__)) is not None:
        first = before
    first.__cause__ = Exception(text)


_OTHER_MODELS = ("text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002", "omni-moderation-latest")

_NO_KEY = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY), or as the password field (with blank username) if you're accessing the API "
    "from your browser and are prompted for a username and password. You can obtain an API key from "
    "https://platform.openai.com/account/api-keys."
)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:99] + "…"


def _raisable(error: BaseException, text: str) -> BaseException:
    """The error that fails a test, with a text that is shown under its traceback."""
    error = _cut(error)
    if isinstance(error, (SystemExit, KeyboardInterrupt, GeneratorExit)) or type(error).__name__ == "CancelledError":
        told = RuntimeError(f"handler raised {type(error).__name__}: {error}")  # itself would end the whole test run
        told.__cause__ = error
        error = told
    _tell(error, text)
    return error


def _route_name(name: str) -> str:
    """The name without the /v1 that every path may have. Raises ValueError for one that no request could match."""
    if not re.fullmatch(r"[A-Z]+ /\S*", name):
        raise ValueError(f'a route is "METHOD /path", as in "POST /audio/speech", not {name!r}')
    return name.replace(" /v1/", " /", 1)


def _own_route(function: Callable[[Request], object]) -> _Endpoint:
    """An endpoint from a user's function."""
    if not callable(function):
        raise TypeError(f"a route is served by a function that takes a Request, not by {function!r}")

    def endpoint(fake: FakeOpenAI, request: Request, *values: str) -> Any:
        waiter = _Waiter(fake._running(), None, False)
        try:
            result: Any = function(request)
            if hasattr(result, "__await__"):
                result = waiter.run(result)
            if isinstance(result, APIError):
                raise result
            if result is None:
                raise TypeError(f"the route {request.method} {request.path} returned None (forgot `return`?)")
            if isinstance(result, bytes):
                return _HTTPResponse(result, "application/octet-stream")
            return _HTTPResponse(_utf8(_dumps(result)))
        finally:
            waiter.end()

    return endpoint


def _preflight(fake: FakeOpenAI, request: Request, path: str) -> _HTTPResponse:
    headers = {
        "access-control-allow-methods": "GET, POST, PUT, PATCH, DELETE, OPTIONS",
        "access-control-allow-headers": request.headers.get("access-control-request-headers", "*"),
        "access-control-max-age": "86400",
    }
    return _HTTPResponse(b"", status=204, headers=headers)


def start(
    test: unittest.TestCase | type[unittest.TestCase], handler: Handler = echo, **options: Unpack[Options]
) -> FakeOpenAI:
    """Starts a server for a test, or, given a TestCase class, for its tests; it is stopped at cleanup.

    What went wrong in the fake fails the test then. A test that has failed already is told it, and the transcript, in
    its one report. Options: FakeOpenAI's. Raises TypeError for what is no test.
    """
    add: Any = getattr(test, "addClassCleanup" if isinstance(test, type) else "addCleanup", None)
    if add is None:
        raise TypeError(f"start() takes the test first, as in start(self, handler); what came is {test!r}")
    server = FakeOpenAI(handler, **options).start()
    add(server.stop) if isinstance(test, type) else add(_stop_after, test, server)
    return server


def _stop_after(test: Any, server: FakeOpenAI) -> None:
    """Stops the server of a test. What went wrong is its failure, or is told in the failure that it has."""
    outcome: Any = getattr(test, "_outcome", None)  # private, from 3.10 to 3.14; there is no public way
    if (error := server._stop(_teller(test, outcome))) is None:
        return
    if outcome is None:
        raise error
    # Not raised: the report would have the frames of this file above the handler's.
    failure = type(error), error, error.__traceback__
    method = getattr(test, test._testMethodName)
    if any(getattr(each, "__unittest_expecting_failure__", False) for each in (test, method)):
        outcome.expectedFailure = failure
        return
    outcome.success = False
    if hasattr(outcome, "errors"):  # before 3.11
        outcome.errors.append((test, failure))
    else:
        add = outcome.result.addFailure if isinstance(error, test.failureException) else outcome.result.addError
        add(test, failure)


def _teller(test: object, outcome: Any) -> Callable[[str], object] | None:
    """What adds a text to the report of a test that has failed, or was skipped; None where it has not so far."""
    result: Any = getattr(outcome, "result", None)
    skipped = [*getattr(outcome, "skipped", ()), *getattr(result, "skipped", ())]
    if getattr(outcome, "expectedFailure", None) or any(each is test for each, _ in skipped):
        return bool  # nobody reads it
    raised = [info[1] for each, info in getattr(outcome, "errors", ()) if info and _is_of(each, test)]  # before 3.11
    raised += [info.value for info in getattr(result, "_excinfo", None) or ()]  # pytest
    if raised:
        return partial(_tell, raised[0])
    lists: list[list[tuple[object, str]]] = [getattr(result, name, []) for name in ("failures", "errors")]
    for reports in lists:
        for index, (each, report) in enumerate(reports):
            if _is_of(each, test):
                return lambda text: reports.__setitem__(index, (each, f"{report}{text}\n"))
    return None


def _is_of(each: object, test: object) -> bool:
    return each is test or getattr(each, "test_case", None) is test  # a subtest's


def pytest_configure(config: Any) -> None:
    """Called by pytest where this module is one of its plugins: gives tests the fixture `fake_openai`."""
    pytest: Any = import_module("pytest")
    fakes: dict[Any, list[FakeOpenAI]] = {}  # by the test that they serve

    def fake_openai(request: Any) -> Iterator[Callable[..., FakeOpenAI]]:
        """Starts servers for a test: `fake_openai(handler, **options)`. What goes wrong in them fails the test."""
        servers = fakes.setdefault(request.node, [])

        def serve(handler: Handler = echo, **options: Unpack[Options]) -> FakeOpenAI:
            servers.append(FakeOpenAI(handler, **options).start())
            return servers[-1]

        yield serve
        late = [error for server in servers if (error := server._stop(None)) is not None]
        if late and request.node in fakes:
            raise late[0]

    def pytest_runtest_makereport(item: Any, call: Any) -> None:
        info = (getattr(item, "_excinfo", None) or [call.excinfo])[0]  # a TestCase's, or a function's
        for server in fakes.get(item, ()) if info or call.when == "call" else ():
            if (error := server._verdict(info and partial(_tell, info.value))) is not None:
                info = call.excinfo = pytest.ExceptionInfo.from_exception(error)
        if info or call.when == "teardown":
            fakes.pop(item, None)  # it has failed, and fails no second time

    plugin: Any = ModuleType("openai_fake_fixture")
    plugin.fake_openai = pytest.fixture(fake_openai)
    plugin.pytest_runtest_makereport = pytest.hookimpl(tryfirst=True)(pytest_runtest_makereport)
    config.pluginmanager.register(plugin)


# ---- Command line ----------------------------------------------------------------------------------------------------
# `python -m openai_fake`. First what it shows, as functions that only make text; then the terminal; then the
# handlers that it offers; `main` last. What only the command line needs is imported where it is used: tests import
# this module a great deal more often than they run it.

# What a terminal would obey, or could not encode: controls but tab and newline, line separators, changes of
# direction (CVE-2021-42574), lone surrogates.
_UNSAFE = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
_HUES = {2: "32", 4: "33"}  # SGR colours by the hundreds of a status: green, yellow; red for the rest
_SHOWN = 2_000  # characters of one message that --verbose shows; a prompt may be megabytes
_BACKLOG = 1_000  # pieces of output that wait for a slow reader; beyond that, they are dropped
_TICK = 0.1  # seconds between looks at whether a client has left; a person does not notice
_SETTINGS = ("host", "port", "api_key", "ttft", "itl", "models", "cors")  # options that are the server's own


def _safe(text: str, limit: int = _SHOWN) -> str:
    """`text` as a terminal can be given it: escaped where it would be obeyed, cut off where it is long."""
    left_out = len(text) - limit
    shown = re.sub(_UNSAFE, lambda match: match[0].encode("unicode_escape").decode(), text[:limit])
    return shown + (f"... ({left_out:,} more characters)" if left_out > 0 else "")


def _safe_line(text: str, limit: int = 300) -> str:
    return _safe(text, limit).replace("\n", "\\n").replace("\t", "\\t")


def _painted(text: str, colour: str, wanted: bool) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if wanted else text


def _request_words(request: Request) -> str:
    return f"{request.api} {_safe_line(request.model, 60)} {'stream' if request.stream else 'json'}"


def _log_line(request: Request, clock: str, colour: bool = False) -> str:
    """One request in one line: time, API, model, stream, status, duration, tokens, and what went wrong."""
    what = _request_words(request) if request.api else _safe_line(f"{request.method} {request.path}", 100)
    hue = _HUES.get(request._status // 100, "31")
    status = _painted(str(request._status or "---"), hue, colour)
    columns = [f"{clock} {what:<40}", status, f"{request._seconds:6.3f} s"]
    if request._encoder is not None and request._status == 200:
        usage = request._encoder.tally()
        columns.append(f"{usage.prompt_tokens}+{usage.completion_tokens} tokens")
    if request._outcome:
        columns.append(_painted(_safe_line(request._outcome, 120), "31", colour))
    return "  ".join(columns) + "\n"


# Label and text of a part. One that is not here shows its repr.
_SPOKEN: dict[type[object], Callable[[Any], tuple[str, str]]] = {
    Text: lambda part: ("answer", part.text),
    Refusal: lambda part: ("refusal", part.text),
    Reasoning: lambda part: ("reasoning", part.summary),
    ToolCall: lambda part: ("call", f"{part.name}({part.arguments})"),
    CustomToolCall: lambda part: ("call", f"{part.name}({part.input})"),
    WebSearch: lambda part: ("search", part.query),
}


def _paragraph(mark: str, label: str, text: str) -> str:
    """A label and, beside it, a text of any number of lines."""
    return f"{mark:>3} {_safe_line(label, 12):<10} " + _safe(text).replace("\n", "\n" + " " * 15) + "\n"


def _answer_text(parts: Sequence[object], mark: str = "<") -> str:
    spoken = [_SPOKEN.get(type(part), lambda part: (type(part).__name__, repr(part)))(part) for part in parts]
    return "".join(_paragraph(mark, label, text) for label, text in spoken)


def _shown_conversation(messages: Sequence[Message]) -> str:
    shown: list[str] = []
    for message in messages:
        if message.text or not message.tool_calls:
            shown.append(_paragraph(">", message.role, message.text))
        shown.append(_answer_text(message.tool_calls, ">"))
    return "".join(shown)


def _banner(base_url: str, environ: Mapping[str, str], model: str, api_key: str | None) -> str:
    """The URL first, then what to paste into a shell."""
    import shlex

    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]}, ensure_ascii=False)
    curl = ["curl", f"{base_url}/chat/completions", "-H", "Content-Type: application/json"]
    curl += ["-H", f"Authorization: Bearer {api_key}"] if api_key else []
    exports = "".join(f"  export {name}={shlex.quote(value)}\n" for name, value in environ.items() if "OPENAI" in name)
    return f"openai_fake listens on {base_url}\n\n{exports}  {shlex.join([*curl, '-d', body])}\n\nCtrl-C ends it.\n"


class _Console:
    """Standard output, written by a thread of its own: one that nobody reads must not hold up an answer."""

    def __init__(self, stream: TextIO | None) -> None:
        self.colour = stream is not None and stream.isatty() and not os.environ.get("NO_COLOR")
        self._encoding = (stream and stream.encoding) or "utf-8"
        # Below the buffers: they have a lock that the interpreter takes as it ends, and would then wait for the
        # thread, which waits for a reader. `stream` is None where the shell closed it (>&-).
        buffer: Any = getattr(stream, "buffer", None)
        self._raw: Any = getattr(buffer, "raw", buffer)
        self._pieces: queue.Queue[str | threading.Event] = queue.Queue(_BACKLOG)
        if self._raw is not None:
            threading.Thread(target=self._run, name="openai_fake console", daemon=True).start()

    def write(self, text: str) -> None:
        with suppress(queue.Full):
            self._pieces.put_nowait(text)

    def flush(self, timeout: float = 0.5) -> None:
        """Wait until all is written, or until it seems that nobody reads it."""
        written = threading.Event()
        with suppress(queue.Full):
            self._pieces.put_nowait(written)
            written.wait(timeout if self._raw is not None else 0)

    def _run(self) -> None:
        while True:
            piece = self._pieces.get()
            if isinstance(piece, threading.Event):
                piece.set()
                continue
            data = memoryview(piece.encode(self._encoding, "backslashreplace"))
            with suppress(OSError, ValueError):  # the reader has left; the service goes on
                while data:
                    data = data[self._raw.write(data) or len(data) :]  # None: it would block, and is dropped


class _ShownServer(FakeOpenAI):
    """Shows each exchange as it ends: a line or, when verbose, also what was said and where a handler failed."""

    def __init__(self, console: _Console, handler: Callable[[Request], Any], verbose: bool, **settings: Any) -> None:
        super().__init__(handler, **settings)
        self._console, self._verbose = console, verbose
        self._observe = self._show

    def _show(self, request: Request) -> None:
        text = _log_line(request, time.strftime("%H:%M:%S"), self._console.colour)
        if self._verbose:
            text += _shown_conversation(request.messages) if request.api else ""
            text += _answer_text(request._said)
            text += self._new_failures()
        self._console.write(text)

    def _new_failures(self) -> str:
        """The errors that are not shown yet. They are dropped: their tracebacks hold requests."""
        shown: list[str] = []
        with suppress(IndexError):
            while True:
                error = self.errors.pop(0)
                shown.append(_safe("".join(traceback.format_exception(error)), 10 * _SHOWN))
        return "".join(shown)


def _error_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


class _NamedHandler:
    """The handler that --handler names, loaded again whenever its file has changed."""

    def __init__(self, target: str, console: _Console) -> None:
        self._source, _, self._name = target.rpartition(":")
        if not (self._source and self._name):
            raise ValueError("expected FILE.py:NAME or module:NAME")
        # Bytecode is matched by size and whole seconds: it would hide an edit made soon after another.
        sys.dont_write_bytecode = True
        sys.path.append(os.path.dirname(os.path.abspath(self._source)))  # its neighbours can be imported
        self._console = console
        self._lock = threading.Lock()  # guards all below: one request loads, those beside it wait
        self._module: Any = None
        self._function = self._load()
        self._seen = self._stat()
        self._error = ""

    def __call__(self, request: Request) -> Any:
        with self._lock:
            seen = self._stat()
            if seen not in (None, self._seen):
                self._seen = seen
                self._reload()
            function, error = self._function, self._error
        if error:
            raise APIError(500, error, headers={"x-should-retry": "false"})
        return function(request)

    def _reload(self) -> None:
        try:
            self._function, self._error = self._load(), ""
        except (Exception, SystemExit) as error:
            self._error = f"{self._source} has changed and cannot be loaded: {_error_words(error)}"
        self._console.write(_safe_line(self._error or f"{self._source} has changed and was loaded again") + "\n")

    def _load(self) -> Callable[[Request], Any]:
        import importlib.util

        if not self._source.endswith(".py"):
            self._module = importlib.reload(self._module) if self._module else importlib.import_module(self._source)
        else:
            # The name is ours: the file's own could be that of a module of the standard library.
            spec = importlib.util.spec_from_file_location("openai_fake_handler", self._source)
            assert spec is not None and spec.loader is not None  # so it is for .py
            self._module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(self._module)
        function: Callable[[Request], Any] | None = getattr(self._module, self._name, None)
        if not callable(function):
            raise TypeError(f"it has no function {self._name}")
        return function

    def _stat(self) -> tuple[int, int] | None:
        """What an edit changes; None while an editor is replacing the file, and for a module that has none."""
        try:
            status = os.stat(self._module.__file__)
        except (OSError, TypeError, AttributeError):
            return None
        return status.st_mtime_ns, status.st_size


class _Turn:
    """One request that a person answers."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.stream = Stream(timeout=None)  # a person may think for long
        # What the handler returns: the stream at the first thing said; or an error, whose status the reply then has.
        self.begun: queue.SimpleQueue[Stream | APIError] = queue.SimpleQueue()
        self.said = False
        self.over = False

    def left(self) -> bool:
        return self.request.disconnected or self.stream.disconnected

    def say(self, *parts: Text | ToolCall | Disconnect) -> None:
        if not self.said:
            self.begun.put(self.stream)
        self.said = True
        self.stream.send(*parts)

    def end(self, *last: Disconnect) -> None:
        self.over = True
        self.say(*last)
        self.stream.close()

    def fail(self, error: APIError) -> None:
        self.over = True
        if self.said:
            self.stream.fail(error)
        else:
            self.begun.put(error)


def _type_call(turn: _Turn, rest: str) -> None:
    name, _, arguments = rest.partition(" ")
    if not name:
        raise ValueError
    turn.say(ToolCall(name, arguments.strip() or "{}"))


def _type_error(turn: _Turn, rest: str) -> None:
    number, _, message = rest.partition(" ")
    status = int(number)
    if not 400 <= status <= 599:
        raise ValueError
    turn.fail(APIError(status, message or "An error typed at the terminal."))


# What each does (ValueError: that does not fit the usage), its usage, and its help.
_COMMANDS: dict[str, tuple[Callable[[_Turn, str], None], str, str]] = {
    "/end": (lambda turn, rest: turn.end(), "/end", "ends the answer"),
    "/call": (_type_call, "/call NAME JSON", "calls a tool"),
    "/error": (_type_error, "/error STATUS MESSAGE", "fails, with that status while nothing is said"),
    "/hangup": (lambda turn, rest: turn.end(Disconnect()), "/hangup", "drops the connection"),
}
_HELP = "Each line that you type is streamed to the client at once. A line that begins with // says /.\n" + "".join(
    f"  {usage:<22} {effect}\n" for _, usage, effect in _COMMANDS.values()
)


class _Operator:
    """The handler of --interactive: a person at the terminal is the model, for one conversation at a time."""

    def __init__(self, console: _Console, stdin: TextIO | None) -> None:
        self._console, self._stdin = console, stdin
        self._turns: queue.SimpleQueue[_Turn] = queue.SimpleQueue()
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None: the input has ended
        self._ended = False

    def start(self) -> None:
        self._console.write(_HELP)
        for target in (self._read, self._run):
            threading.Thread(target=target, name="openai_fake operator", daemon=True).start()

    def __call__(self, request: Request) -> Stream | APIError:
        turn = _Turn(request)
        self._turns.put(turn)
        while True:
            try:
                return turn.begun.get(timeout=_TICK)
            except queue.Empty:
                if request.disconnected:
                    return turn.stream

    def _read(self) -> None:
        # A file of its own, without a buffer: a lock held here can abort the interpreter's end.
        if self._stdin is not None:  # None: the shell closed it (<&-)
            with suppress(OSError), open(self._stdin.fileno(), "rb", buffering=0, closefd=False) as raw:
                for line in raw:
                    self._lines.put(line.decode(errors="replace").rstrip("\r\n"))
        self._lines.put(None)

    def _run(self) -> None:
        while True:
            turn = self._turns.get()
            if not (self._ended or turn.left()):
                self._console.write(f"\n{_request_words(turn.request)}\n{_shown_conversation(turn.request.messages)}< ")
            while not turn.over:
                self._step(turn)

    def _step(self, turn: _Turn) -> None:
        """One line of input at most."""
        if turn.left():
            self._console.write("\nThe client has left.\n")
            turn.end()
            return
        try:
            line = None if self._ended else self._lines.get(timeout=_TICK)
        except queue.Empty:
            return
        if line is not None:
            self._obey(turn, line)
            return
        if not self._ended:
            self._console.write("\nThe input has ended: from now on, requests get a 503.\n")
        self._ended = True
        if turn.said:
            turn.end()
        else:
            turn.fail(APIError(503, "Nobody is at the terminal.", headers={"x-should-retry": "false"}))

    def _obey(self, turn: _Turn, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word in _COMMANDS:
            run, usage, _ = _COMMANDS[word]
            try:
                run(turn, rest.strip())
            except ValueError:
                self._console.write(f"usage: {usage}\n")
        elif line.startswith("/") and not line.startswith("//"):
            self._console.write(_HELP)
        else:
            turn.say(Text(line.removeprefix("/") + "\n"))
        self._console.write("" if turn.over else "< ")


def _parser() -> argparse.ArgumentParser:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:  # one line, where argparse prints the usage too
            self.exit(2, f"openai_fake: {_safe_line(message)} (--help lists the options)\n")

    def port(text: str) -> int:
        if not (text.isdecimal() and int(text) <= 65535):
            raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
        return int(text)

    def seconds(text: str) -> float:
        if not 0 <= float(text) <= threading.TIMEOUT_MAX:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
        return float(text)

    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",") if name.strip()]

    parser = Parser(
        prog="python -m openai_fake",
        description="A server that answers like OpenAI's API. Unless told otherwise, it repeats what the user said.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"openai_fake {__version__}")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=port, default=8080, help="%(default)s; 0: any free one; a busy one is an error")
    answers = parser.add_mutually_exclusive_group()
    answers.add_argument("--reply", metavar="TEXT", help="answer TEXT, always")
    answers.add_argument(
        "--handler",
        metavar="FILE.py:NAME",
        help="answer what this function returns (or module:NAME); loaded again when its file changes",
    )
    answers.add_argument("--interactive", action="store_true", help="you are the model: type the answers")
    parser.add_argument("--ttft", type=seconds, default=0.0, metavar="SECONDS", help="time to the first token")
    parser.add_argument("--itl", type=seconds, default=0.0, metavar="SECONDS", help="time between tokens")
    parser.add_argument("--api-key", metavar="KEY", help="refuse other keys than this")
    parser.add_argument("--cors", action="store_true", help="let web pages of any origin call")
    parser.add_argument("--models", type=names, metavar="NAME,NAME", help="what GET /v1/models lists")
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("--quiet", action="store_true", help="no line per request")
    loudness.add_argument("--verbose", action="store_true", help="show conversations, answers and tracebacks")
    return parser


def _chosen_handler(options: argparse.Namespace, console: _Console) -> Callable[[Request], Any]:
    if options.interactive:
        return _Operator(console, sys.stdin)
    if options.handler is not None:
        return _NamedHandler(options.handler, console)
    if options.reply is not None:
        return lambda request: Text(options.reply)
    return echo


def _find_this(name: str, path: Sequence[str] | None, target: object = None) -> Any:
    """An import hook: this very module, wherever its file is imported from again, as tests.vendor.openai_fake."""
    spec: Any = PathFinder.find_spec(name, path)
    if spec is None or os.path.realpath(spec.origin or "") != os.path.realpath(__file__):
        return None
    spec.loader = SimpleNamespace(create_module=partial(sys.modules.get, "__main__"), exec_module=bool)
    return spec


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted: `python -m openai_fake`. What cannot be done is one line and exit status 2."""
    import signal

    if __name__ == "__main__":
        # A handler's file imports openai_fake: it must get these classes, not a second copy of them.
        sys.modules["openai_fake"] = sys.modules[__name__]
        sys.meta_path.insert(0, cast(Any, SimpleNamespace(find_spec=_find_this)))
    parser = _parser()
    options = parser.parse_args(argv)
    console = _Console(sys.stdout)
    try:
        handler = _chosen_handler(options, console)
    except BaseException as error:  # whatever the handler's file does as it is loaded, Ctrl-C meanwhile too
        parser.error(f"--handler {options.handler}: {_error_words(error)}")
    settings: dict[str, Any] = {name: getattr(options, name) for name in _SETTINGS}
    settings["keep"] = 1_000  # the journal of a service must not grow for ever
    interrupts: queue.SimpleQueue[int] = queue.SimpleQueue()  # its put() is reentrant; an Event's set() is not
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: interrupts.put(number))
    try:
        if options.quiet:
            server = FakeOpenAI(handler, **settings)
        else:
            server = _ShownServer(console, handler, options.verbose, **settings)
        server.start()
    except (OSError, ValueError) as error:
        parser.error(f"cannot listen on {options.host} port {options.port}: {error}")
    console.write(_banner(server.base_url, server.environ, (options.models or ["gpt-5.5"])[0], options.api_key))
    if isinstance(handler, _Operator):
        handler.start()
    console.flush()
    while True:
        with suppress(queue.Empty):
            interrupts.get(timeout=0.5)  # Windows runs no signal handler while this waits
            break
    with suppress(BaseException):  # the errors that it raises were shown as they happened
        server.stop()
    console.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
