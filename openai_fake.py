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
- A sink: where the events go (a stream, a JSON body, a WebSocket, the log of a response in the background).
- `_Delivery`: calls the handler and carries its parts through an encoder into a sink, waiting where parts want time.
- An endpoint: one function per route; it returns JSON, or what sends itself, as a `_Delivery` does.
- `_Connection`: the bytes of one socket. `_Server`: the listener, and the threads. `FakeOpenAI`: the test's view.

To add a part, write one class in the section "What a handler answers": its text, what it is in Chat Completions, what
it is in Responses. To add an endpoint, write one function in the section "Endpoints".

Where a comment names the source of a fact, R is recordings of the API's answers (in the tests of public repositories),
P probes of the live API, S the public API reference and the types of openai-python 3.57, I public issue reports.
pytest: PYTEST_DONT_REWRITE (it takes a second, and the module may be imported before pytest loads it).
"""

# pyright: strict, reportPrivateUsage=false, reportMissingModuleSource=false, reportImplicitOverride=false

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
from collections import Counter, deque
from collections.abc import AsyncIterable, Awaitable, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from contextvars import Context
from dataclasses import KW_ONLY, MISSING, dataclass, field, fields, replace
from email.utils import formatdate
from enum import IntEnum
from functools import cached_property, lru_cache, partial
from http.server import ThreadingHTTPServer
from importlib import import_module
from importlib.machinery import PathFinder
from itertools import accumulate, chain, pairwise, starmap, takewhile
from socketserver import BaseRequestHandler, TCPServer
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypedDict, TypeVar, cast, get_args
from urllib.parse import parse_qs, unquote_to_bytes, urlsplit
from weakref import WeakSet

if TYPE_CHECKING:
    import argparse
    import asyncio
    import unittest
    from collections.abc import AsyncIterator
    from typing import NoReturn, TextIO, TypeAlias

    from typing_extensions import Self, Unpack
else:
    try:
        from typing_extensions import Self
    except ImportError:  # the copied file runs on a bare interpreter; only type checkers need the real one
        Self = Any

__all__ = [
    "APIError", "Answer", "Chunk", "ChunkChoice", "Completion", "CompletionChoice", "CustomToolCall", "Disconnect",
    "FakeOpenAI", "Finish", "Handler", "Item", "Message", "Options", "Pause", "Raw", "Reasoning", "Refusal",
    "Reply", "Request", "Script", "Stream", "StreamError", "Text", "Tool", "ToolCall", "Usage", "WebSearch", "auto",
    "echo", "main", "non_streaming_response", "rate_limit", "recorded", "start", "streaming_response",
    "text_chunks", "tool_call_chunk",
]  # fmt: skip
__version__ = "1.0.0"

_LOG = logging.getLogger("openai_fake")
_LOG.addHandler(logging.NullHandler())  # without it, logging's last resort would print warnings to stderr

_MAX_CHOICES = 8  # the API's bound of n (P)
_MAX_BODY = 64 << 20  # bytes, decoded; OpenAI documents 50 MB for a request with images
_MAX_INFLATED = 8 << 20  # bytes that any compressed body may be; beyond, 200 times itself, which Apache allows
_MAX_LINE = 64 << 10  # bytes of a request line; RFC 9112 3 asks for 8,000 at least
_MAX_HEAD = 128 << 10  # bytes of a request's head; Apache and nginx stop at 8 to 64 KiB, Go at 1 MiB
_MAX_DEPTH = 200  # of JSON in requests: Python gives up at 1,000 frames, and some code takes two or three a level
_MAX_CHUNK_LINE = 4 << 10  # bytes of a chunk's size with its extensions, or of a trailer; as Go has it
_MAX_FIELDS = 256  # header fields; Apache stops at 100
_BATCH = 64 << 10  # bytes gathered before a send, while more is known to follow
_FIRST_BATCH = 24 << 10  # so many at first: a long answer begins at once, a short one goes out in one piece
_RUN = 64  # deltas that are encoded together, before it is looked whether they fill a batch
_UNREAD = 128 << 10  # bytes that a socket holds for its client: in the usual megabytes, slow progress is not seen
_READ = 8 << 10  # bytes that a read makes room for: a head, and a small body
_HALF_CLOSED = 1.0  # seconds that a client which has sent FIN is still taken to wait for its JSON
_LONGEST = 3600.0  # seconds that a select waits: more than a month is an OverflowError
_LOOP_PATIENCE = 1.0  # seconds that a wait may block a running event loop: what is on its way has arrived by then
_STOP_SECONDS = 1.0  # what stop() waits for handlers that do not return
_AT_ONCE = 0.1  # seconds in which a handler answers at once, before a background response is told to be queued

_JSON: TypeAlias = "dict[str, Any]"


class _Clock:
    """The server's own clocks, taken once: the time that a test patches is the test's. freezegun patches modules."""

    monotonic = staticmethod(time.monotonic)
    perf_counter = staticmethod(time.perf_counter)
    time = staticmethod(time.time)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _default(value: object) -> NoReturn:
    raise TypeError(f"cannot be sent as JSON: {value!r} is of type {type(value).__name__}")


_quote: Callable[[str], str] = json.encoder.encode_basestring
_plain_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_default)
_make_encoder: Any = getattr(json.encoder, "c_make_encoder", None)  # PyPy has none
# markers, default, encoder, indent, separators, sort_keys, skipkeys, allow_nan; no markers: a cycle is a
# RecursionError, and threads may encode one object at a time.
_encode: Any = _make_encoder and _make_encoder(None, _default, _quote, None, ":", ",", False, False, False)


def _dumps(value: object) -> str:
    """Compact JSON that leaves non-ASCII alone, from CPython's C encoder made once, where there is one."""
    return "".join(_encode(value, 0)) if _encode else _plain_encoder.encode(value)


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


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):  # it could not be sent back
        raise ValueError(f"{text} is too large" if text[-1].isdigit() else f"{text} is not JSON")
    return number


_loads = json.JSONDecoder(parse_constant=_finite, parse_float=_finite).decode


def _own(value: Any) -> Any:
    """A copy of JSON for a reader, who may change it: the server goes on with its own."""
    return value if isinstance(value, (str, type(None))) else _loads(_dumps(value))


# ---- Errors ----------------------------------------------------------------------------------------------------------


def _header_fields(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Header fields as given, refused where they could not go on the wire as one field each."""
    fields = dict(headers or {})
    for name, value in fields.items():
        if not re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name):
            raise ValueError(f"not a header field name: {name!r}")
        if name.lower() in ("content-length", "transfer-encoding"):
            raise ValueError(f"the server itself sets {name}; use Raw(...) or Disconnect() to break an answer")
        if not re.fullmatch(r"[\t\x20-\x7e\xa0-\xff]*", value):
            raise ValueError(f"not a header field value, which is one line of Latin-1: {value!r} in {name!r}")
    return fields


class APIError(Exception):
    """An error of the API: a handler returns or raises it, and the client gets it with its HTTP status.

    The body is `{"error": {"message", "type", "param", "code"}}`. `type` defaults to what the API calls that status;
    `headers` are sent beside the usual ones. Raises ValueError for a status, or headers, that could not be sent.
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

    def __reduce__(self) -> Any:
        return type(self).__new__, (type(self), *self.args), self.__dict__

    def _shared(self) -> Self:
        """Itself without what it was raised through, which holds the request: it may be given again, and for ever."""
        self.__traceback__ = self.__context__ = self.__cause__ = None
        return self

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
            kinds = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join(each.__name__ for each in kinds if each is not type(None))
            raise TypeError(f"{type(owner).__name__} wants {wanted} for {name}, not {value!r}")
        most = threading.TIMEOUT_MAX if kind is _SECONDS else math.inf
        if kind in (int, _SECONDS) and not 0 <= cast(float, value or 0) <= most:
            raise ValueError(f"{type(owner).__name__} wants {name} of 0 or more, not {value!r}")


_WORD = (str, type(None))  # a string that may be left out
_NUMBER = (int, type(None))
_SECONDS = (int, float, type(None))


# ---- What the client sent --------------------------------------------------------------------------------------------


class _Headers(Mapping[str, str]):
    """Header fields by name, in any case; a field sent several times is joined with commas (RFC 9110 5.3)."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._fields: dict[str, str] = {}
        for name, value in pairs:
            key = name.lower()
            self._fields[key] = f"{self._fields[key]}, {value}" if key in self._fields else value

    def __getitem__(self, name: str) -> str:
        return self._fields[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"Headers({self._fields!r})"


def _text_of(content: object) -> str:
    """All the text of a message's content: a string, or a list of content parts."""
    if isinstance(content, str):
        return content
    return "".join(_string(part if isinstance(part, str) else _dict(part).get("text")) for part in _list(content))


def _last_text(items: list[Any]) -> str:
    sent = (each for each in map(_dict, reversed(items)) if each.get("role") == "user")
    return next((_text_of(each.get("content")) for each in sent), "")


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation. `content` is as it came: a string, a list of content parts, or None.

    `tool_calls`: what an assistant's message calls; `tool_call_id`: the call that a tool's message answers.
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
    others = {key: about.get(key) for key in ("description", "parameters", "strict")}
    return Tool(_string(about.get("name")), **others, type=kind)


def _chat_call(value: object) -> ToolCall | CustomToolCall | None:
    call = _dict(value)
    for make in (ToolCall, CustomToolCall):
        if about := _dict(call.get(make._key)):
            return make(_string(about.get("name")), _string(about.get(make._grows)), id=_string(call.get("id")))
    return None


def _chat_message(value: object) -> Message:
    sent = _dict(value)
    calls = tuple(call for call in map(_chat_call, _list(sent.get("tool_calls"))) if call is not None)
    id = sent.get("tool_call_id")
    return Message(_string(sent.get("role")), _own(sent.get("content")), calls, id if isinstance(id, str) else None)


def _item_type(item: _JSON) -> Any:
    """The type of an input item; only messages and references may lack it (S)."""
    kind = item.get("type")
    return kind if kind is not None else "item_reference" if "id" in item and "role" not in item else "message"


def _items_messages(items: Iterable[object]) -> list[Message]:
    """The messages that a model sees in Responses items. Calls join the assistant's message before them."""
    messages: list[Message] = []
    for item in map(_dict, items):
        kind = _string(_item_type(item))
        if kind == "message":
            messages.append(Message(_string(item.get("role")), _own(item.get("content"))))
        elif make := _CALL_TYPES.get(kind):
            call = make(_string(item.get("name")), _string(item.get(make._grows)), id=_string(item.get("call_id")))
            before = messages.pop() if messages and messages[-1].role == "assistant" else Message("assistant")
            messages.append(replace(before, tool_calls=(*before.tool_calls, call)))
        elif kind.removesuffix("_output") in _CALL_TYPES:
            messages.append(Message("tool", _own(item.get("output")), tool_call_id=_string(item.get("call_id"))))
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
    level, depth = [value], 0
    while level and depth < _MAX_DEPTH:
        inner = chain.from_iterable(_dict(each).values() or _list(each) for each in level)
        level, depth = [each for each in inner if each.__class__ in (dict, list)], depth + 1
    return bool(level)


def _prompts(value: Any) -> list[Any]:
    """The prompts of a Completions request, each a string or a list of tokens; 2,048 at most (B)."""
    prompts = _list(value) if isinstance(value, list) else [value]
    return [prompts] if prompts and all(type(each) is int for each in prompts) else prompts[:2048]


class Request:
    """What the client asked, in one view of all APIs.

    `api` is "chat.completions", "responses", "completions", or "" for other endpoints. `body` is the JSON, decoded;
    `raw_body` the bytes (after Content-Encoding); `method`, `path`, `query` and `headers` (by name in any case) are the
    HTTP request's. A Request is kept in `server.requests` after its answer. Each create on a WebSocket is one, with the
    body of the same POST.
    """

    _deployment: str | None = None  # Azure names the model in the path
    _resolved: list[Any] | None = None  # Responses: the input, where it referred to stored items
    _connection: _Connection | None = None
    _remembered: Mapping[str, _LaneTurn] = {}  # what its WebSocket may go on with
    _gone = False
    # What became of it, for the transcript and the command line.
    _status = 0  # 0: cut before any reply
    _seconds = 0.0
    _outcome = ""  # why the answer is not whole
    _said: Sequence[_Utterance] = ()
    _encoder: _Encoder | None = None  # that says it

    def __init__(
        self, api: str, method: str, path: str, query: str, headers: Mapping[str, str], raw_body: bytes = b""
    ) -> None:
        self.api = api
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.raw_body = raw_body
        self._before: _History = _NO_HISTORY  # Responses: what is stored from before the input
        self._note: _JSON = {}  # what the control routes tell beside

    def _parse(self) -> _JSON:
        """The JSON object in the body. Raises APIError where there is none."""
        data = self.raw_body
        try:
            found: Any = _loads(data.removeprefix(b"\xef\xbb\xbf").decode().strip(" \t\r\n"))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or (data.count(b"{") + data.count(b"[") > _MAX_DEPTH and _too_deep(found)):
            raise APIError(400, _NOT_JSON[self.api == "chat.completions"])
        body = cast(_JSON, found)
        if self._deployment is not None and not body.get("model"):
            body["model"] = self._deployment
        return body

    def _parsed(self) -> _JSON:
        try:
            return self._parse()
        except APIError:  # the client was told
            return {}

    @cached_property
    def body(self) -> _JSON:
        """The JSON object that was sent; {} where there was none. It is the reader's own."""
        return self._parsed()

    _json = cached_property(_parsed)  # the same, which is the server's own

    def _forget(self) -> None:
        """Drops what can be made again from the bytes: the journal holds many requests."""
        if self._connection is not None:
            self._gone = self._connection.state is _State.GONE
        for name in ("_json", "body", "messages", "_connection", "_remembered"):
            self.__dict__.pop(name, None)

    @property
    def model(self) -> str:
        """The model that was asked for."""
        return _string(self._json.get("model"))

    @property
    def stream(self) -> bool:
        """Whether the client wants server-sent events."""
        return self._json.get("stream") is True

    @cached_property
    def messages(self) -> list[Message]:
        """The conversation as the model sees it.

        For Responses: `instructions`, then the stored turns behind `previous_response_id`, then `input`. For
        Completions: one user message for each prompt.
        """
        if self.api == "responses":
            return _items_messages(self._items)
        if self.api == "completions":
            return [Message("user", each) for each in _prompts(self.prompt)]
        return [*map(_chat_message, _list(self._json.get("messages")))]

    @property
    def turn(self) -> int:
        """How many times the model has answered in this conversation before: 0 at first."""
        roles = ["", *(message.role for message in self.messages)]
        return sum(role == "assistant" != before for before, role in pairwise(roles))

    @property
    def tool_results(self) -> list[Message]:
        """The tools' messages since the model's last answer, in order."""
        since = takewhile(lambda message: message.role != "assistant", reversed(self.messages))
        return [message for message in since if message.role in ("tool", "function")][::-1]

    def _told(self) -> tuple[list[Any], list[Any]]:
        """Instructions, and input, as items."""
        instructions = self._json.get("instructions")
        if isinstance(instructions, str):
            instructions = [{"role": "system", "content": instructions}]
        items = _input_items(self._json.get("input")) if self._resolved is None else self._resolved
        return _input_items(instructions), items

    @property
    def _items(self) -> list[Any]:
        instructions, items = self._told()
        return [*instructions, *self._before, *items]

    @property
    def text(self) -> str:
        """The text of the last user message; "" where there is none."""
        if self.api == "completions":
            return _string(self.messages[-1].content) if self.messages else ""
        if self.api != "responses":
            return _last_text(_list(self._json.get("messages")))
        # The input nearly always has one: the turns before it, which may be many, are not gone through.
        return _last_text(self._told()[1]) or _last_text(self._items)

    @property
    def tools(self) -> list[Tool]:
        """The tools that are offered, in one shape for both APIs; after a namespace, those in it."""
        given = _list(self._json.get("tools"))
        return [_tool(_own(each)) for tool in given for each in (tool, *_list(_dict(tool).get("tools")))]

    def tool(self, name: str) -> Tool | None:
        """The tool of that name, or else of a name that ends so, as in "server__name"; None where none is offered."""
        ends = re.compile(f"(?:.*[^A-Za-z0-9])?{re.escape(name)}", re.DOTALL)
        found = [tool for tool in self.tools if ends.fullmatch(tool.name)]
        return min(found, key=lambda tool: tool.name != name, default=None)

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer is asked to fit; None where none is."""
        asked = _dict(self.body.get("response_format")).get("json_schema") or _dict(self.body.get("text")).get("format")
        schema = _dict(asked).get("schema")
        return _dict(schema) if isinstance(schema, dict) else None

    @property
    def form(self) -> dict[str, list[Any]]:
        """The fields of a multipart/form-data body, each a list as of parse_qs: of str, and of files' (name, bytes)."""
        kind = re.search(r'(?i)multipart/form-data;.*\bboundary="?([^";]+)', self.headers.get("content-type", ""))
        pieces = (b"\r\n" + self.raw_body).split(b"\r\n--" + kind[1].encode("latin-1")) if kind else []
        form: dict[str, list[Any]] = {}
        for piece in pieces[1:-1]:
            head, _, data = piece.partition(b"\r\n\r\n")
            told = dict(re.findall(r'\b(name|filename)="([^"]*)"', head.decode("utf-8", "replace")))
            value: Any = (told["filename"], data) if "filename" in told else data.decode("utf-8", "replace")
            form.setdefault(told.get("name", ""), []).append(value)
        return form

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
        own = ("model", "messages", "stream", "tools", "prompt", "input")
        return {key: value for key, value in self.body.items() if key not in own}

    @property
    def disconnected(self) -> bool:
        """Whether the client has left before its answer was whole."""
        connection = self._connection
        return self._gone if connection is None else connection.peer_gone()

    @property
    def status(self) -> int:
        """The HTTP status that it was answered with; 0 before, and where it was cut before any reply."""
        return self._status

    @property
    def answer(self) -> list[_Spoken]:
        """What the model has said to it, each part whole."""
        return [item.part._with(item.pieces) for item in self._said]

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
        text = sent.get("content")
        if type(text) is not str or len(sent) > 2:  # else nothing is beside the role
            text = "".join([_text_of(sent[key]) for key in ("content", "output", "arguments") if key in sent])
        tokens += 4 + (len(text) + 3) // 4
    return tokens


# ---- What the API refuses --------------------------------------------------------------------------------------------
# Each parameter is one entry of `_CHAT` or `_RESPONSES`; the entries stand in the API's order of checks (P). Beside the
# marks of the module's docstring, I* is a public report that was not verified, B what this server could not bear.

# A rule looks at a value, its path ("tools[0].type") and the request's body, and raises APIError for a fault. What else
# it has to know comes first: `partial` makes a rule of that.
_Rule: TypeAlias = "Callable[[Any, str, _JSON], None]"

_KINDS: dict[type, str] = {
    dict: "an object", str: "a string", int: "an integer", float: "a decimal", bool: "a boolean", list: "an array",
    type(None): "null",
}  # fmt: skip


def _bad_request(message: str, param: str | None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


def _missing(path: str) -> APIError:
    return _bad_request(f"Missing required parameter: '{path}'.", path, "missing_required_parameter")


def _outside(path: str, problem: str, expected: str, got: object, code: str) -> APIError:
    return _bad_request(f"Invalid '{path}': {problem}. Expected {expected}, but got {got} instead.", path, code)


def _unsupported(path: str, value: str, supported: Iterable[str]) -> APIError:
    *most, last = (f"'{name}'" for name in supported)
    listed = f"{', '.join(most)}{',' if len(most) > 1 else ''} and {last}" if most else last
    return _bad_request(f"Invalid value: '{value}'. Supported values are: {listed}.", path, "invalid_value")


def _anything(value: Any, path: str, body: _JSON) -> None:
    """What no source constrains."""


def _either(expected: str, by_type: dict[type, _Rule]) -> _Rule:
    """A value of one of these exact types (to the API a boolean is no integer), by its type's rule."""

    def rule(value: Any, path: str, body: _JSON) -> None:
        further = by_type.get(value.__class__)
        if further is None:
            words = f"Invalid type for '{path}': expected {expected}, but got {_KINDS[value.__class__]} instead."
            raise _bad_request(words, path, "invalid_type")
        further(value, path, body)

    return rule


_boolean, _any_object = _either("a boolean", {bool: _anything}), _either("an object", {dict: _anything})


def _length(kind: str, low: int, high: int, value: Any, path: str, body: _JSON) -> None:
    noun = kind.split()[1]
    if len(value) < low:
        expected = f"{kind} with minimum length {low}"
        raise _outside(path, f"empty {noun}", expected, f"an empty {noun}", f"empty_{noun}")
    if len(value) > high:
        expected, got = f"{kind} with maximum length {high}", f"{kind} with length {len(value)}"
        raise _outside(path, f"{noun} too long", expected, got, f"{noun}_above_max_length")


def _string_of(low: int, high: int = sys.maxsize) -> _Rule:
    return _either("a string", {str: partial(_length, "a string", low, high)})


_any_string, _name = _either("a string", {str: _anything}), _string_of(1)  # empty: I* 'tools[0].function.name'


def _number(kind: str, types: Iterable[type], low: float = -math.inf, high: float = math.inf) -> _Rule:
    noun = kind.split()[1]

    def rule(value: Any, path: str, body: _JSON) -> None:
        if value < low:
            raise _outside(path, f"{noun} below minimum value", f"a value >= {low}", value, f"{noun}_below_min_value")
        if value > high:
            raise _outside(path, f"{noun} above maximum value", f"a value <= {high}", value, f"{noun}_above_max_value")

    return _either(kind, dict.fromkeys(types, rule))


_integer, _decimal = partial(_number, "an integer", (int,)), partial(_number, "a decimal", (int, float))


def _enum(*supported: str) -> _Rule:
    def rule(value: Any, path: str, body: _JSON) -> None:
        if value not in supported:
            raise _unsupported(path, value, supported)

    return _either("a string", {str: rule})


def _array(of: _Rule, expected: str = "an array of objects", low: int = 0, high: int = sys.maxsize) -> _Rule:
    def rule(value: Any, path: str, body: _JSON) -> None:
        _length("an array", low, high, value, path, body)
        for i, member in enumerate(value):
            of(member, f"{path}[{i}]", body)

    return _either(expected, {list: rule})


def _object(required: dict[str, _Rule], **optional: _Rule) -> _Rule:
    """Required members may not be null; optional ones may, as clients send explicit nulls."""

    def rule(value: Any, path: str, body: _JSON) -> None:
        for name, member in required.items():
            if name not in value:
                raise _missing(f"{path}.{name}")
            member(value[name], f"{path}.{name}", body)
        for name, member in optional.items():
            if value.get(name) is not None:
                member(value[name], f"{path}.{name}", body)

    return _either("an object", {dict: rule})


def _strings(*names: str) -> _Rule:
    return _object(dict.fromkeys(names, _any_string))


def _tagged(tag: str, cases: dict[str, _Rule], closed: bool = True) -> _Rule:
    """An object whose `tag` names its rule; a tag that isn't in `cases` passes unless `closed`."""
    tag_rule = _object({tag: _enum(*cases) if closed else _any_string})

    def rule(value: Any, path: str, body: _JSON) -> None:
        tag_rule(value, path, body)
        cases.get(value[tag], _anything)(value, path, body)

    return rule


def _map(of: _Rule, most: float, longest: float, value: Any, path: str, body: _JSON) -> None:
    """An object of so many properties, with names of such a length."""
    if len(value) > most:
        expected, got = f"an object with at most {most} properties", f"an object with {len(value)} properties"
        raise _outside(path, "too many properties", expected, got, "object_above_max_properties")
    for name, member in value.items():
        if len(name) > longest:  # the words are by analogy, the code is P
            expected, got = f"a property name with maximum length {longest}", f"one with length {len(name)}"
            raise _outside(path, "property name too long", expected, got, "property_name_above_max_length")
        of(member, f"{path}.{name}", body)


def _string_or_parts(of: _Rule) -> _Rule:
    return _either("one of a string or array of objects", {str: _anything, list: _array(of)})  # P


def _string_or(of: _Rule, string: _Rule = _anything) -> _Rule:
    return _either("one of a string or object", {str: string, dict: of})


def _needed(rule: _Rule, instead: Iterable[str], value: Any, path: str, body: _JSON) -> None:
    """A parameter that may lack, or be null, only where another stands for it."""
    if value is not None:
        rule(value, path, body)
    elif all(body.get(name) is None for name in instead):
        raise _missing(path)


_PLAIN = ("user", "assistant", "system", "developer")  # roles


def _turns(further: _Rule, value: Any, path: str, body: _JSON) -> None:
    """A list by a further rule, unless all of it is just roles and texts, as nearly always: nothing more to look at."""
    plain = value.__class__ is list and all(
        type(turn) is dict and len(turn) == 2 and turn.get("role") in _PLAIN and type(turn.get("content")) is str
        for turn in value
    )
    if not (plain and value):
        further(value, path, body)


# Chat's messages

_chat_parts: dict[str, _Rule] = {  # S, order I*
    "text": _strings("text"),
    "image_url": _object({"image_url": _strings("url")}),
    "input_audio": _object({"input_audio": _any_object}),
    "refusal": _strings("refusal"),
    "audio": _any_object,
    "file": _object({"file": _any_object}),
}
_message_content = _string_or_parts(_tagged("type", _chat_parts))
_function_call = _strings("name", "arguments")
_chat_calls: dict[str, _Rule] = {  # S
    "function": _object({"id": _any_string, "function": _function_call}),
    "custom": _object({"id": _any_string, "custom": _strings("name", "input")}),
}
_calls = _array(_tagged("type", _chat_calls), low=1)  # I*: Invalid 'messages[1].tool_calls': empty array.
_text_message = _object({"content": _message_content}, name=_any_string)
_calling_message = _object(
    {}, content=_message_content, name=_any_string, refusal=_any_string, tool_calls=_calls, function_call=_function_call
)


def _assistant_message(value: Any, path: str, body: _JSON) -> None:
    """S: an assistant's content may only lack where it said something else."""
    otherwise = any(value.get(name) is not None for name in ("tool_calls", "function_call", "refusal", "audio"))
    (_calling_message if otherwise else _text_message)(value, path, body)


_roles: dict[str, _Rule] = {  # S, order I*
    "system": _text_message,
    "assistant": _assistant_message,
    "user": _text_message,
    "function": _object({"name": _any_string}, content=_message_content),
    "tool": _object({"content": _message_content, "tool_call_id": _any_string}),
    "developer": _text_message,
}
_message_array = _array(_tagged("role", _roles), low=1)  # P, R (empty array)


def _messages(value: Any, path: str, body: _JSON) -> None:
    """I: tool messages follow their call, and a call's answers come before anything else."""
    _message_array(value, path, body)
    waiting: dict[str, bool] = {}  # by the id of the last message's calls, whether it has no answer yet
    ended: list[Any] = [*value, {"role": ""}]
    for index, message in enumerate(ended):
        if message["role"] == "tool":
            if message["tool_call_id"] not in waiting:
                words = "messages with role 'tool' must be a response to a preceeding message with 'tool_calls'."
                raise _bad_request(f"Invalid parameter: {words}", f"messages.[{index}].role")
            waiting[message["tool_call_id"]] = False
        elif lacking := [call for call, waits in waiting.items() if waits]:
            raise _bad_request(
                "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
                f"'tool_call_id'. The following tool_call_ids did not have response messages: {', '.join(lacking)}",
                f"messages.[{min(index, len(value) - 1)}].role",
            )
        else:
            calls = message.get("tool_calls") if message["role"] == "assistant" else None
            waiting = {call["id"]: True for call in calls or ()}


# The Responses' input

_input_parts = ("input_text", "input_image", "output_text", "refusal", "input_file", "computer_screenshot")  # S, I*
_input_message = _object({"content": _string_or_parts(_object({"type": _enum(*_input_parts)}))})
_output_message = _object({"content": _string_or_parts(_object({"type": _enum("output_text", "refusal")}))})  # I*, S
_call_output = _object({"call_id": _any_string, "output": _string_or_parts(_any_object)})
_item_roles = {"assistant": _output_message, **dict.fromkeys(("system", "developer", "user"), _input_message)}  # S
_item_types: dict[str, _Rule] = {  # S; other types pass, as they grow
    "message": _tagged("role", _item_roles),
    "function_call": _strings("call_id", "name", "arguments"),
    "function_call_output": _call_output,
    "custom_tool_call": _strings("call_id", "name", "input"),
    "custom_tool_call_output": _call_output,
    "item_reference": _strings("id"),
}
_named_item, _typed_item = _object({}, id=_any_string), _tagged("type", _item_types, closed=False)


def _input_item(value: Any, path: str, body: _JSON) -> None:
    _named_item(value, path, body)
    _typed_item({**value, "type": _item_type(value)}, path, body)


_input_array = partial(_turns, _array(_input_item))
_input = _either("one of a string or array of input items", {str: _anything, list: _input_array})  # P

# Rules about more than one value


def _chat_model(value: Any, path: str, body: _JSON) -> None:
    if value in (None, ""):
        raise _bad_request("you must provide a model parameter", None)
    if type(value) is not str:
        _any_string(value, path, body)


def _stream_options(flags: _Rule, value: Any, path: str, body: _JSON) -> None:
    if body.get("stream") is not True:
        raise _bad_request("The 'stream_options' parameter is only allowed when 'stream' is enabled.", path)
    flags(value, path, body)


def _conversation_parameter(by_id: _Rule, value: Any, path: str, body: _JSON) -> None:
    if body.get("previous_response_id") is not None:
        words = "Mutually exclusive parameters: ''. Ensure you are only providing one of: "
        words += "'pre..._id' or 'conversation'."  # as the probe saw it, quotes and dots
        raise _bad_request(words, None, "mutually_exclusive_parameters")
    by_id(value, path, body)


def _check_closed(schema: Any, of: str, param: str, code: str | None, context: tuple[str, ...] = ()) -> None:
    """R, I*: in what is strict, objects are closed, and their properties all required."""
    node = _dict(schema)
    closed = node.get("additionalProperties") is False
    lacking = [name for name in _dict(node.get("properties")) if name not in _list(node.get("required"))]
    if (lacking or not closed) and (node.get("type") == "object" or not (context or "$ref" in node)):
        fault = "'additionalProperties' is required to be supplied and to be false."
        if closed:
            fault = "'required' is required to be supplied and to be an array including every key in properties. "
            fault += f"Missing '{lacking[0]}'."
        raise _bad_request(f"Invalid schema for {of}: In context={context!r}, {fault}", param, code)
    for key in filter(node.__contains__, ("properties", "$defs", "anyOf", "items")):
        inner = enumerate(node[key]) if isinstance(node[key], list) else _dict(node[key]).items()
        for name, each in [((), node[key])] if key == "items" else [((str(name),), each) for name, each in inner]:
            _check_closed(each, of, param, code, (*context, key, *name))


def _strict(form: _Rule, of: str, key: str, code: str | None, value: Any, path: str, body: _JSON) -> None:
    """A rule, and then the one that a schema is closed where it is strict."""
    form(value, path, body)
    if value.get("strict") is True:
        param = f"{path}.{key}" if code else of
        _check_closed(value.get(key), f"{of} '{value['name']}'", param, code)


def _moved(new: str, value: Any, path: str, body: _JSON) -> None:
    words = f"Unsupported parameter: '{path}'. In the Responses API, this parameter has moved to '{new}'. "
    words += "Try again with the new parameter. See the API documentation for more information: "
    words += "https://platform.openai.com/docs/api-reference/responses/create."
    raise _bad_request(words, None, "unsupported_parameter")


# The tables

_EFFORTS = _enum("none", "minimal", "low", "medium", "high", "xhigh", "max")  # S
_VERBOSITIES = _enum("low", "medium", "high")  # P
_TOOL_CHOICES = _enum("none", "auto", "required")  # S
_SERVICE_TIERS = ("auto", "default", "flex", "scale", "priority", "fast")  # S
_metadata = _either("an object", {dict: partial(_map, _string_of(0, 512), 16, 64)})  # P
_named = _object({"name": _name})
_function = partial(_strict, _named, "function", "parameters", "invalid_function_parameters")
_chat_tools = {"function": _object({"function": _function}), "custom": _object({"custom": _named})}  # S, closed: I*
_chat_choices = {**_chat_tools, "allowed_tools": _object({"allowed_tools": _any_object})}  # S
_tool_of = _tagged("type", {"function": _function, "custom": _named}, closed=False)  # S; hosted ones pass, as they grow
_schema_format = _object({"name": _name, "schema": _any_object})
_schema = partial(_strict, _schema_format, "response_format", "schema", "invalid_json_schema")
_formats: dict[str, _Rule] = {"json_object": _anything, "json_schema": _schema, "text": _anything}  # S
_chat_schema = partial(_strict, _named, "response_format", "schema", None)  # R: no code, and another param
_chat_formats: dict[str, _Rule] = {**_formats, "json_schema": _object({"json_schema": _chat_schema})}  # S
_includes = (  # S
    "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs",
    "reasoning.encrypted_content", "message.output_text.logprobs",
)  # fmt: skip

_CHAT: dict[str, _Rule] = {
    "model": _chat_model,  # P; B
    "messages": partial(_needed, partial(_turns, _messages), ()),  # P, R, I; B
    "functions": _array(_named),  # S
    "function_call": _string_or(_named, _enum("none", "auto")),  # S
    "tools": _array(_tagged("type", _chat_tools), low=1),  # S; I*: Invalid 'tools': empty array.
    "tool_choice": _string_or(_tagged("type", _chat_choices), _TOOL_CHOICES),  # S
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
    "safety_identifier": _string_of(0, 128),  # S
    "response_format": _tagged("type", _chat_formats),  # S
    "service_tier": _enum(*_SERVICE_TIERS),  # S
    "max_tokens": _integer(1),  # S
    "reasoning_effort": _EFFORTS,  # S
    "logit_bias": _either("an object", {dict: partial(_map, _decimal(-100, 100), math.inf, math.inf)}),  # S
    "stop": _either("one of a string or array of strings", {str: _anything, list: _array(_any_string, high=4)}),  # S
    "stream": _boolean,  # B
    "stream_options": partial(_stream_options, _object({}, include_usage=_boolean, include_obfuscation=_boolean)),  # S
    "store": _boolean,  # S
    "metadata": _metadata,  # P
    "prediction": _any_object,  # S
    "verbosity": _VERBOSITIES,  # P
}


def _as_in_chat(names: str) -> dict[str, _Rule]:
    return {name: _CHAT[name] for name in names.split()}


_RESPONSES: dict[str, _Rule] = {
    "model": partial(_needed, _any_string, ["prompt"]),  # P; B; R: a prompt has its own
    "messages": partial(_moved, "input"),  # P
    "response_format": partial(_moved, "text.format"),  # I*
    "reasoning_effort": partial(_moved, "reasoning.effort"),  # I*
    "moderation": _any_object,  # S
    "input": partial(_needed, _input, ["previous_response_id", "prompt", "conversation"]),  # P; B; S
    "include": _array(_enum(*_includes), "an array of strings"),  # S
    "tools": _array(_tool_of, "an array of tools"),  # P; S
    "metadata": _metadata,  # P
    "text": _object({}, format=_tagged("type", _formats), verbosity=_VERBOSITIES),  # S
    **_as_in_chat("temperature top_p"),
    "tool_choice": _string_or(_tool_of, _TOOL_CHOICES),  # S
    **_as_in_chat("parallel_tool_calls stream stream_options"),
    "background": _boolean,  # S
    "max_output_tokens": _integer(16),  # P
    "max_tool_calls": _integer(),  # S
    "reasoning": _object({}, effort=_EFFORTS, summary=_enum("auto", "concise", "detailed")),  # S
    **_as_in_chat("user prompt_cache_key prompt_cache_options prompt_cache_retention safety_identifier"),
    "truncation": _enum("auto", "disabled"),  # S
    "instructions": _any_string,  # S
    "store": _boolean,  # S
    "service_tier": _enum(*_SERVICE_TIERS, "ultrafast"),  # S
    "top_logprobs": _integer(0, 20),  # S
    **dict.fromkeys(("access_programs", "background_options", "context_management", "image"), _anything),  # S: known
    "client_metadata": _anything,  # R: Codex
    "conversation": partial(_conversation_parameter, _string_or(_strings("id"))),  # P
    "prompt": _strings("id"),  # S
    "previous_response_id": _any_string,  # S
}


def _token(value: Any, path: str, body: _JSON) -> None:
    if not 0 <= value <= 100257:  # R
        words = f"Invalid token in prompt: {value}. Minimum value is 0, maximum value is 100257 (inclusive)."
        raise _bad_request(words, None)


_tokens_array = _array(_either("an integer", {int: _token}))
_prompt = _either("a string or an array of integers", {str: _anything, int: _token, list: _tokens_array})
_COMPLETIONS: dict[str, _Rule] = {  # S; R
    **_as_in_chat("model temperature top_p presence_penalty frequency_penalty user seed logit_bias stop stream"),
    **_as_in_chat("stream_options"),
    "prompt": _either("one of a string or array", {str: _anything, list: _array(_prompt)}),
    "max_tokens": _integer(0), "n": _integer(1, 128), "best_of": _integer(0, 20), "logprobs": _integer(0, 5),
    "echo": _boolean, "suffix": _any_string,
}  # fmt: skip

_ANY_CHAT = r"(chatgpt|gpt-(3\.5-turbo(?!-instruct)|[456])|o[134]).*"
_INSTRUCT_MODELS = r"(gpt-3\.5-turbo-instruct|davinci-002|babbage-002).*"
_UNTAKEN = "Unsupported parameter: '{where}' is not supported with this model."
_EFFORT = "Unsupported value: '{value}' is not supported with the '{model}' model. Supported values are: "
_ELSEWHERE = "supported in the v1/{}completions endpoint. Did you mean to use v1/{}completions?"

# R. By API: models, what of a parameter they do not take, how that begins; status, param, code, and words.
_Refusal: TypeAlias = "tuple[str, str, str, str, int, str | None, str | None, str]"
_REFUSALS: dict[str, list[_Refusal]] = {
    "chat.completions": [
        (_INSTRUCT_MODELS, "model", "", "", 404, "model", None,
         "This is not a chat model and thus not " + _ELSEWHERE.format("chat/", "")),
        (r"gpt-3\.5-turbo-(16k-)?(0301|0613)", "model", "", "", 404, None, "model_not_found",
         "The model `{model}` has been deprecated, learn more here: https://platform.openai.com/docs/deprecations"),
        (r"(o[134]|gpt-[56])(?!.*chat).*", "max_tokens", "", "", 400, "{where}", "unsupported_parameter",
         _UNTAKEN + " Use 'max_completion_tokens' instead."),
        ("o1-mini.*|o3.*|o4-mini.*|gpt-5(-mini|-nano)?(-20.*)?", "stop", "", "", 400, "{where}",
         "unsupported_parameter", _UNTAKEN),
        ("gpt-4(?!.*search).*", "web_search_options", "", "", 400, "{where}", None,
         "Web search options not supported with this model."),
        ("o1-mini.*", "messages", "[].role", "(system|developer)", 400, "{where}", "unsupported_value",
         "Unsupported value: '{where}' does not support '{value}' with this model."),
        (f"(?!.*audio){_ANY_CHAT}", "messages", "[].content.[].type", "input_audio", 400, "{top}", "invalid_value",
         "Invalid '{top}'. Content blocks are expected to be either text or image_url type."),
        (".*", "messages", "[].content.[].image_url.url", "data:[^,]{0,99};base64,(?!iVBORw0KGgo|/9j/|R0lGOD|UklGR)",
         400, None, "invalid_image_format",
         ("You uploaded an unsupported image. Please make sure your image has of one the following formats: "
          "['png', 'jpeg', 'gif', 'webp'].")),
    ],
    "responses": [
        ("o[134].*|gpt-5-codex.*", "reasoning", "effort", "(none|minimal|xhigh|max)$", 400, "{where}",
         "unsupported_value", _EFFORT + "'low', 'medium', and 'high'."),
        ("gpt-5(-mini|-nano)?(-20.*)?", "reasoning", "effort", "(none|xhigh|max)$", 400, "{where}",
         "unsupported_value", _EFFORT + "'minimal', 'low', 'medium', and 'high'."),
        (".*", "input", "[].content.[].file_data", "data:(?P<kind>(audio|video)/[^;,]*)", 400, "{where}",
         "invalid_value",
         ("Invalid file data: '{where}'. Expected a base64-encoded data URL with a valid file MIME type (e.g. 'data:"
          "text/plain;base64,SGVsbG8sIFdvcmxkIQ=='), but got unsupported MIME type '{kind}'. Please see https://"
          "platform.openai.com/docs/assistants/tools/file-search#supported-files for supported file types.")),
        (".*", "input", "[].content.[].file_url", r".*\.(mp3|wav|m4a|ogg|flac|mp4|mov)(\?|$)", 400, "input",
         "unsupported_file", "The file type you uploaded is not supported. Please try again with a pdf"),
    ],
    "completions": [
        (_ANY_CHAT, "model", "", "", 404, "model", None,
         "This is a chat model and not " + _ELSEWHERE.format("", "chat/")),
        ("text-embedding-.*", "model", "", "", 403, None, None, "You are not allowed to sample from this model"),
    ],
    "embeddings": [
        (f"{_ANY_CHAT}|{_INSTRUCT_MODELS}", "model", "", "", 403, None, None,
         "You are not allowed to generate embeddings from this model"),
    ],
}  # fmt: skip


@lru_cache(64)
def _refusals(api: str, begin: str) -> list[_Refusal]:
    """What a model is refused; of its name the beginning, for what is cached must not be of any size."""
    return [refusal for refusal in _REFUSALS[api] if re.fullmatch(refusal[0], begin)]


def _found(value: Any, path: str, where: str) -> Iterator[tuple[str, Any]]:
    """The values at a path below a value, "[].role", and where they are."""
    key, _, rest = path.partition(".")
    if key == "[]":
        for at, each in enumerate(_list(value)):
            yield from _found(each, rest, f"{where}[{at}]")
    elif key:
        yield from _found(_dict(value).get(key), rest, f"{where}.{key}")
    elif value is not None:
        yield where, value


def _check_recorded(api: str, body: _JSON) -> None:
    """Raises what a model, or the API, does not take; other faults come later (R)."""
    model = _string(body.get("model"))
    turns: list[Any] = body.get("messages") or body.get("input", [])
    parts = type(turns) is list and any(type(each) is dict and type(each.get("content")) is list for each in turns)
    for _, name, path, begin, status, param, code, words in _refusals(api, model[:64]):
        if name in body and (parts or "content" not in path):
            for where, value in _found(body[name], path, name):
                if match := re.match(begin, _string(value)):
                    told = {"model": model, "where": where, "top": where.split(".")[0], "value": value}
                    told |= match.groupdict()
                    raise APIError(status, words.format(**told), param=param and param.format(**told), code=code)


_RULES = {"chat.completions": _CHAT, "responses": _RESPONSES, "completions": _COMPLETIONS}


def _check_request(api: str, body: _JSON, strict: bool) -> None:
    """Raises the first fault of a request, in the API's order of checks. `strict`: unknown parameters are faults."""
    rules = _RULES[api]
    for name in ("model", "messages") if api == "chat.completions" else ("model",):  # lacking, they are told first (P)
        if (value := body.get(name)) is None or value == "":
            rules[name](value, name, body)
    _check_recorded(api, body)
    for name in body if strict else ():
        if name not in rules:
            near = [each for each in rules if each not in body and abs(len(each) - len(name)) < 3]
            distance, other = min(((_distance(name, each), each) for each in near), default=(3, ""))
            hint = f" Did you mean '{other}'?" if distance < 3 else ""
            raise _bad_request(f"Unknown parameter: '{name}'.{hint}", name, "unknown_parameter")
    for name in filter({*body, "input"}.__contains__, rules):  # that may lack too, but later
        if (value := body.get(name)) is not None or name == "input":
            rules[name](value, name, body)


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


def _check_conversation(items: list[Any], start: int, reasons: bool = True, stored: bool = True) -> None:
    """Raises the first fault between input items: items[:start] are stored turns, the rest is the request's `input`.

    `reasons` tells whether the model reasons: only such a model puts reasoning before its web searches (R). `stored`:
    whether the response will be: then what belongs to reasoning must be named (R).
    """
    facts = [
        _ItemFacts(*map(_string, (_item_type(item), item.get("id"), item.get("call_id"), item.get("role"))))
        for item in map(_dict, items)
    ]
    seen = {item.id for item in facts[:start]}
    for item in facts[start:]:
        if item.id and item.id in seen:  # I
            words = f"Duplicate item found with id {item.id}. Remove duplicate items from your input and try again."
            raise _bad_request(words, "input")
        seen.add(item.id)
    if not any(item.type in _OPAQUE for item in facts):
        _check_calls(facts, start)
    if any(seen):  # what has no id is new: it belongs to no reasoning
        _check_reasoning(facts, start, reasons, stored)


def _check_calls(facts: list[_ItemFacts], start: int) -> None:
    """I: every call has its output, and every new output its call."""
    called = {item.call_id for item in facts if item.type.endswith("_call")}
    answered = {item.call_id for item in facts if item.type.endswith("_call_output")}
    for item in facts[start:]:
        if item.type == "function_call_output" and item.call_id not in called:
            raise _bad_request(f"No tool call found for function call output with call_id {item.call_id}.", "input")
    for item in facts:
        if item.type == "function_call" and item.call_id not in answered:
            raise _bad_request(f"No tool output found for function call {item.call_id}.", "input")


def _check_reasoning(facts: list[_ItemFacts], start: int, reasons: bool, stored: bool) -> None:
    """R, I*: a reasoning item goes with what the model said after it."""
    before = False  # whether reasoning has come since the user spoke
    for index, (item, after) in enumerate(pairwise([*facts, _ItemFacts("message", "", "", "user")])):
        if item.type == "reasoning" or item.type in _OPAQUE:
            before = True
        elif item.role not in ("", "assistant"):
            before = False
        # What follows is none of the model's, nor is a message without an id where it is to be stored.
        ends = after.role not in ("", "assistant") or after.type.endswith("_output")
        ends = ends or (stored and after.role == "assistant" and not after.id)
        lacks = "following" if item.type == "reasoning" and ends else ""
        if item.type == "web_search_call" and reasons and not before:
            lacks = "'reasoning'"  # to which the API adds the missing item's id
        if lacks and item.id and index >= start:
            words = f"Item '{item.id}' of type '{item.type}' was provided without its required {lacks} item."
            raise _bad_request(words, "input")


# ---- What a handler answers ------------------------------------------------------------------------------------------
# A part is a piece of what the model says, or a thing that happens on the wire. A fragment of a part is a part.
# To make one with a field of the wrong type raises TypeError, with a value that cannot be ValueError.

# Words with the space before them, as the models' own tokens are; a long word is several.
_TOKEN = re.compile(r"\s*(?:\w{1,16}|[^\w\s]{1,16})(?:\s+\Z)?|\s+\Z")
_short_tokens = lru_cache(4096)(_TOKEN.findall)  # short texts come again


def _tokens(text: str) -> Sequence[str]:
    """The word-sized pieces that a stream sends of a text; joined, they are the text."""
    return _short_tokens(text) if len(text) <= 32 else _TOKEN.findall(text)


class _Next(str):
    """A text that begins the next section of its part: of a Reasoning, the next summary."""

    __slots__ = ()


def _sections(pieces: Iterable[str]) -> list[str]:
    sections: list[list[str]] = [[]]
    for piece in pieces:
        if isinstance(piece, _Next):
            sections.append([])
        sections[-1].append(piece)
    return ["".join(section) for section in sections]


def _by_key(value: Mapping[str, Any]) -> _JSON:
    """`type` first, then the keys in alphabetical order, as the API sends tools, annotations and events (R)."""
    return {"type": value.get("type"), **{key: value[key] for key in sorted(value) if key != "type"}}


def _title(url: str) -> str:
    """A page's title made up from its URL: the last words of its path, or of its host."""
    path = url.partition("://")[2].partition("?")[0].rstrip("/")
    words = re.sub(r"\.\w+$|[-_+.]+", " ", path.rpartition("/")[2]).strip()
    return words[:1].upper() + words[1:] or url


def _citation(text: str, url: str) -> _JSON | None:
    """The url_citation of a source where the text names it: all of ` ([label](url))`, as the API writes it (R)."""
    begin = text.find(url)
    if begin < 0:
        return None
    end = begin + len(url)
    opening = text.rfind("([", 0, begin)
    if opening >= 0 and text[opening:begin].endswith("](") and text.startswith("))", end):
        begin, end = opening, end + 2
    return {"type": "url_citation", "end_index": end, "start_index": begin, "title": _title(url), "url": url}


class _Utterance:
    """One thing being said: the part that opened it, and the fragments it has grown by."""

    index = 0  # of a tool call, among its choice's
    id = ""  # Responses: the item's id
    call_id = ""
    legacy = False  # a call that answers `functions`
    section = 0  # that is being said
    sent = 0  # characters of a text, in the stream so far
    opened = False  # Responses: the events before the first delta are sent
    status = "in_progress"
    form: _Form | None = None  # of the delta events of its section

    def __init__(self, part: _Spoken, position: int) -> None:
        self.part = part
        self.pieces: list[str] = []
        self.entries: list[_JSON] = []  # logprobs, one a token, where they were asked for
        self.annotations: list[_JSON] = []
        self.cited = 0  # of them, in the stream so far
        self.sources: list[str] = []  # found by a web search, and not named in the text yet
        self.position = position  # output_index in Responses

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def join(self) -> None:
        """Makes few pieces of many, on the thread that adds them: others may read them meanwhile, and only read."""
        first, *others = _sections(self.pieces) if isinstance(self.part, Reasoning) else ["".join(self.pieces)]
        self.pieces[:] = [first, *map(_Next, others)]


# What a field may be, by its annotation.
_FIELD_KINDS: dict[str, type | tuple[type, ...]] = {
    "str": str, "int": int, "float": _SECONDS, "str | None": _WORD, "Mapping[str, Any] | None": (type(None), Mapping),
}  # fmt: skip


class _Part:
    """A part of an answer."""

    __slots__ = ()
    _kinds: ClassVar[Mapping[str, type | tuple[type, ...]]] = {}  # of its fields

    def __init_subclass__(cls) -> None:
        kinds = {name: _FIELD_KINDS[kind] for name, kind in cls.__annotations__.items() if kind in _FIELD_KINDS}
        cls._kinds = {**cls._kinds, **kinds}

    def __post_init__(self) -> None:
        _check_fields(self, **{name: (getattr(self, name), kind) for name, kind in self._kinds.items()})

    def _set(self, **fields: object) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        """What makes it: the fields that are not what they are by themselves."""
        shown: list[str] = []
        for each in sorted(fields(cast(Any, self)), key=lambda each: bool(each.kw_only)):
            value = getattr(self, each.name)
            if each.repr and value != each.default and (value or each.default_factory is MISSING):
                shown.append(f"{each.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _act(self, answer: _Delivery) -> None:
        """Does what a part does that is not said by the model."""


class _Spoken(_Part):
    """A part that the model says. It has one string that grows (`_grows` names it) while a stream is sent."""

    __slots__ = ()
    _grows: ClassVar[str]
    _prefix: ClassVar[str]  # of the item's id in Responses
    _padded: ClassVar[bool] = True  # whether Responses obfuscates its deltas
    _in_chat: bool = True  # whether Chat Completions has a place for it
    choice: int = 0

    def split(self) -> list[Self]:
        """The fragments that a stream sends: parts of the same kind, word-sized, the first with the name and id."""
        return list(self._cut(self._texts(cut=True)))

    def merge(self, fragment: Self) -> Self:
        """The part that this one and the fragment after it make together.

        `functools.reduce(type(part).merge, part.split()) == part`. Raises ValueError for a fragment of another part.
        """
        if not fragment._continues(self):
            raise ValueError(f"{fragment!r} does not go on with {self!r}")
        return self._gather(fragment)._with([*self._texts(), *fragment._texts()])

    def _gather(self, fragment: _Spoken) -> Self:
        """This part with what a fragment after it has beside its text."""
        return self

    def _texts(self, cut: bool = False) -> Sequence[str]:
        """Its text as a stream sends it: as it is given, or cut into words, as that of a part that is alone."""
        text = getattr(self, self._grows)
        return _tokens(text) if cut or not text else (text,)

    def _with(self, pieces: Sequence[str]) -> Self:
        """This part with another text."""
        return replace(self, **{self._grows: "".join(pieces)})  # type: ignore[type-var]  # what is made are dataclasses

    def _more(self, text: str) -> Self:
        """A fragment that goes on with this part."""
        return self._with([text])

    def _cut(self, texts: Sequence[str]) -> Sequence[Self]:
        """This part as fragments with these texts."""
        return [self._with(texts[:1]), *map(self._more, texts[1:])] if texts else [self]

    def _continues(self, opened: _Spoken) -> bool:
        """Whether it goes on with what this part opened."""
        return False

    # Chat Completions: deltas, and the message's fields.

    def _chat_role(self, item: _Utterance) -> _JSON:
        """The delta that opens a choice."""
        raise NotImplementedError

    def _chat_head(self, item: _Utterance) -> _JSON | None:
        """The delta that opens this part, where it needs one beside the role's."""
        return None

    def _chat_delta(self, item: _Utterance, text: str) -> _JSON:
        raise NotImplementedError

    def _chat_message(self, item: _Utterance, message: _JSON) -> None:
        """Writes a whole part into the message."""

    # Responses: the item, and the events between output_item.added and .done.

    def _item(self, item: _Utterance, encoder: _ResponsesEncoder, whole: bool) -> _JSON:
        """The item: whole, as in output_item.done and in the response, or nothing said, as in output_item.added."""
        raise NotImplementedError

    def _opening(self, item: _Utterance) -> _Events:
        """The events before the deltas of a section."""
        return []

    def _delta(self, item: _Utterance) -> tuple[str, _JSON]:
        raise NotImplementedError

    def _closing(self, item: _Utterance) -> _Events:
        """The events after the deltas of a section."""
        return []


_Events: TypeAlias = "list[tuple[str, _JSON]]"  # their types, and the keys that are their own


@dataclass(frozen=True, slots=True, repr=False)
class _MessagePart(_Spoken):
    """What Text and Refusal share: a message item with one content part."""

    text: str
    _: KW_ONLY
    choice: int = 0
    annotations: Sequence[Mapping[str, Any]] = field(default=(), init=False)  # of a Text
    logprobs: Sequence[Mapping[str, Any]] | None = None
    phase: str | None = None
    id: str | None = None

    _prefix = "msg_"
    _grows = "text"
    _type: ClassVar[str]  # of the content part, and of its events
    _key: ClassVar[str]  # of the text in both
    _chat_key: ClassVar[str]

    def __post_init__(self) -> None:
        if type(self.text) is not str or type(self.choice) is not int or self.choice < 0 or self.id is not None:
            _Part.__post_init__(self)  # thousands of a stream do without
        if self.annotations:
            self._set(annotations=tuple(map(_annotation, self.annotations)))
        if self.logprobs is not None:
            self._set(logprobs=tuple(map(_entry, self.logprobs)))
        if self.phase not in (None, "commentary", "final_answer"):
            raise ValueError(f"a phase is 'commentary' or 'final_answer', not {self.phase!r}")

    def _gather(self, fragment: _Spoken) -> Self:
        more = cast(_MessagePart, fragment)
        gathered = replace(self)
        logprobs = None if self.logprobs is None else (*self.logprobs, *(more.logprobs or ()))
        gathered._set(annotations=(*self.annotations, *more.annotations), logprobs=logprobs)
        return gathered

    def _texts(self, cut: bool = False) -> Sequence[str]:
        if not cut:
            return (self.text,)
        if self.logprobs is not None:
            tokens = [entry["token"] for entry in self.logprobs]
            return tokens if tokens and "".join(tokens) == self.text else (self.text,)
        texts: list[str] = []
        at = 0
        spans = [(each.get("start_index"), each.get("end_index")) for each in self.annotations]
        for begin, end in sorted((begin, end) for begin, end in spans if begin is not None and end is not None):
            if at <= begin < end <= len(self.text):  # the API does not split a citation (R)
                texts += [*_tokens(self.text[at:begin]), self.text[begin:end]]
                at = end
        return [*texts, *_tokens(self.text[at:])] or ("",)

    def _more(self, text: str) -> Self:
        return type(self)(text, choice=self.choice)

    def _cut(self, texts: Sequence[str]) -> Sequence[Self]:
        fragments = [self._with(texts[:1]), *map(self._more, texts[1:])]
        if self.logprobs is None or len(self.logprobs) != len(texts):
            return fragments
        return [replace(part, logprobs=[entry]) for part, entry in zip(fragments, self.logprobs, strict=True)]

    def _continues(self, opened: _Spoken) -> bool:
        if type(opened) is not type(self) or opened.choice != self.choice:
            return False
        return self.phase in (None, opened.phase) and self.id in (None, opened.id)

    def _chat_role(self, item: _Utterance) -> _JSON:
        return {"role": "assistant", "content": None, "refusal": None, self._chat_key: ""}

    def _chat_delta(self, item: _Utterance, text: str) -> _JSON:
        return {self._chat_key: text}

    def _chat_message(self, item: _Utterance, message: _JSON) -> None:
        before = message[self._chat_key] or ""
        message[self._chat_key] = before + item.text
        for each in item.annotations:
            if each["type"] == "url_citation":
                moved = {key: each.get(key, 0) + len(before) for key in ("end_index", "start_index")}
                told = {key: value for key, value in {**each, **moved}.items() if key != "type"}
                message["annotations"].append({"type": "url_citation", "url_citation": told})

    def _item(self, item: _Utterance, encoder: _ResponsesEncoder, whole: bool) -> _JSON:
        content = [self._content_part(item)] if whole else []
        if whole and item.entries and "logprobs" in content[0]:
            content[0]["logprobs"] = [_rounded(entry) for entry in item.entries]
        phase = self.phase or ("final_answer" if encoder.model.phase else None)
        status = item.status if whole else encoder.added_status
        told: _JSON = {"id": item.id, "type": "message", "status": status, "content": content}
        return {**told, **({"phase": phase} if phase else {}), "role": "assistant"}

    def _content_part(self, item: _Utterance, whole: bool = True) -> _JSON:
        return {"type": self._type, self._key: item.text if whole else ""}

    def _opening(self, item: _Utterance) -> _Events:
        part = self._content_part(item, whole=False)
        return [("response.content_part.added", {"content_index": 0, "item_id": item.id, "part": part})]

    def _delta(self, item: _Utterance) -> tuple[str, _JSON]:
        return f"response.{self._type}.delta", {"content_index": 0, "item_id": item.id}

    def _closing(self, item: _Utterance) -> _Events:
        return [
            (f"response.{self._type}.done", {**self._delta(item)[1], self._key: item.text}),
            ("response.content_part.done", {"content_index": 0, "item_id": item.id, "part": self._content_part(item)}),
        ]


def _annotation(given: Mapping[str, Any]) -> _JSON:
    """An annotation in the form of Responses; that of Chat Completions nests it."""
    kind = given.get("type")
    if not isinstance(kind, str):
        raise TypeError(f"an annotation is an object with a type, as url_citation, not {given!r}")
    inner = given.get(kind)
    return _by_key({"type": kind, **_dict(inner)} if isinstance(inner, dict) else given)


def _entry(given: Mapping[str, Any], top: bool = True) -> _JSON:
    """A logprobs entry with its keys in the order of Responses; Chat Completions has them otherwise."""
    token = given.get("token")
    if not isinstance(token, str):
        raise TypeError(f"an entry of logprobs has a token and a logprob, not {given!r}")
    data = given.get("bytes", list(token.encode("utf-8", "replace")))
    entry: _JSON = {"bytes": data, "logprob": given.get("logprob", 0.0), "token": token}
    return {**entry, "top_logprobs": [_entry(each, False) for each in given.get("top_logprobs", ())]} if top else entry


def _rounded(entry: _JSON) -> _JSON:
    """An entry as whole items have it (R)."""
    top = [{**other, "logprob": round(other["logprob"], 6)} for other in entry["top_logprobs"]]
    return {**entry, "logprob": round(entry["logprob"], 6), "top_logprobs": top}


@dataclass(frozen=True, slots=True, repr=False)
class Text(_MessagePart):
    """Text of the answer. One that is alone is sent in word-sized deltas; several in a row are one text, a delta each.

    - `choice`: the index of the choice that says it (Chat Completions' n).
    - `annotations`: objects as the API has them: url_citation, file_citation, ... A stream tells each where it belongs.
    - `logprobs`: entries with token, logprob, bytes and top_logprobs, sent if asked for; made up if not given.
    - `phase`: "commentary" or "final_answer"; the model's own if not given. `id`: the message's, in Responses. A Text
      with another phase or id than the one before it begins a new message.
    """

    _: KW_ONLY
    annotations: Sequence[Mapping[str, Any]] = ()

    _type = "output_text"
    _key = "text"
    _chat_key = "content"

    def _content_part(self, item: _Utterance, whole: bool = True) -> _JSON:
        annotations, text = ([*item.annotations], item.text) if whole else ([], "")
        return {"type": "output_text", "annotations": annotations, "logprobs": [], "text": text}

    def _delta(self, item: _Utterance) -> tuple[str, _JSON]:
        return "response.output_text.delta", {"content_index": 0, "item_id": item.id, "logprobs": item.entries}


class Refusal(_MessagePart):
    """The model refuses, in these words (`message.refusal`; a refusal content part in Responses).

    `logprobs`, `phase` and `id` as in Text.
    """

    __slots__ = ()
    _type = _key = _chat_key = "refusal"
    _padded = False


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Reasoning(_Spoken):
    """The model thinks first: a reasoning item in Responses; in Chat Completions only tokens in the usage.

    `Reasoning("...")` has one summary, `Reasoning("...", "...")` two. A Reasoning right after another goes on with its
    last summary; `Reasoning("", "...")` begins the next. `text` is what was thought (a reasoning_text), where a model
    shows it; `encrypted_content` is made up if not given; `id` is the item's, and one with another id a new item.
    """

    summaries: tuple[str, ...]
    encrypted_content: str | None
    text: str
    id: str | None

    _prefix = "rs_"
    _in_chat = False

    def __init__(
        self, *summaries: str, encrypted_content: str | None = None, text: str = "", id: str | None = None
    ) -> None:
        for summary in summaries:
            _check_fields(self, summary=(summary, str))
        self._set(summaries=summaries if any(summaries) else (), encrypted_content=encrypted_content, text=text, id=id)
        self.__post_init__()

    @property
    def summary(self) -> str:
        """All summaries, one below the other."""
        return "\n\n".join(self.summaries)

    def _texts(self, cut: bool = False) -> Sequence[str]:
        texts: list[str] = []
        for at, summary in enumerate(self.summaries):
            first, *others = (cut and _tokens(summary)) or (summary,)
            texts += [_Next(first) if at else first, *others]
        return texts

    def _with(self, pieces: Sequence[str]) -> Reasoning:
        return Reasoning(*_sections(pieces), encrypted_content=self.encrypted_content, text=self.text, id=self.id)

    def _more(self, text: str) -> Reasoning:
        return Reasoning(*_sections([text]))

    def _continues(self, opened: _Spoken) -> bool:
        if not isinstance(opened, Reasoning) or self.text:
            return False
        return self.encrypted_content in (None, opened.encrypted_content) and self.id in (None, opened.id)

    def _item(self, item: _Utterance, encoder: _ResponsesEncoder, whole: bool) -> _JSON:
        summaries = _sections(item.pieces) if whole and item.pieces else []
        return {
            "id": item.id,
            "type": "reasoning",
            "content": [{"type": "reasoning_text", "text": self.text}] if whole and self.text else [],
            "encrypted_content": self.encrypted_content or encoder.secret(item),  # it differs each time it is sent (R)
            "summary": [{"type": "summary_text", "text": text} for text in summaries],
        }

    def _thought(self, item: _Utterance) -> _Events:
        """The events of the text (S; none was recorded)."""
        where = {"content_index": 0, "item_id": item.id}
        part = {"type": "reasoning_text", "text": ""}
        return [
            ("response.content_part.added", {**where, "part": part}),
            *(("response.reasoning_text.delta", {**where, "delta": text}) for text in _tokens(self.text)),
            ("response.reasoning_text.done", {**where, "text": self.text}),
            ("response.content_part.done", {**where, "part": {**part, "text": self.text}}),
        ]

    def _opening(self, item: _Utterance) -> _Events:
        part = {"type": "summary_text", "text": ""}
        thought = self._thought(item) if self.text and item.section == 0 else []
        return [*thought, ("response.reasoning_summary_part.added", {**self._delta(item)[1], "part": part})]

    def _delta(self, item: _Utterance) -> tuple[str, _JSON]:
        return "response.reasoning_summary_text.delta", {"item_id": item.id, "summary_index": item.section}

    def _closing(self, item: _Utterance) -> _Events:
        if not item.pieces:
            return self._thought(item) if self.text else []
        where, text = self._delta(item)[1], _sections(item.pieces)[item.section]
        return [
            ("response.reasoning_summary_text.done", {**where, "text": text}),
            ("response.reasoning_summary_part.done", {**where, "part": {"type": "summary_text", "text": text}}),
        ]


@dataclass(frozen=True, slots=True, repr=False)
class _Call(_Spoken):
    """What ToolCall and CustomToolCall share. A call without a name goes on with the one before it."""

    name: str
    _: KW_ONLY
    id: str | None = None
    choice: int = 0
    namespace: str | None = None
    caller: Mapping[str, Any] | None = None

    _key: ClassVar[str]  # in Chat Completions: the call's type, and the key of its name and arguments
    _type: ClassVar[str]  # of the item in Responses

    def _more(self, text: str) -> Self:
        return replace(self._with([text]), name="")

    def _continues(self, opened: _Spoken) -> bool:
        if type(opened) is not type(self) or opened.choice != self.choice:
            return False
        return not self.name if None in (self.id, opened.id) else self.id == opened.id

    def _chat_call(self, item: _Utterance, text: str) -> _JSON:
        return {"id": item.call_id, "type": self._key, self._key: {"name": self.name, self._grows: text}}

    def _chat_role(self, item: _Utterance) -> _JSON:
        refusal = {} if item.legacy else {"refusal": None}
        return {"role": "assistant", "content": None, **self._chat_head(item), **refusal}

    def _chat_head(self, item: _Utterance) -> _JSON:
        call = {"index": item.index, **self._chat_call(item, "")}
        return {"function_call": {"name": self.name, "arguments": ""}} if item.legacy else {"tool_calls": [call]}

    def _chat_delta(self, item: _Utterance, text: str) -> _JSON:
        call = {"index": item.index, self._key: {self._grows: text}}
        return {"function_call": {"arguments": text}} if item.legacy else {"tool_calls": [call]}

    def _chat_message(self, item: _Utterance, message: _JSON) -> None:
        if item.legacy:
            message["function_call"] = {"name": self.name, "arguments": item.text}
        else:
            message["tool_calls"].append(self._chat_call(item, item.text))

    def _item(self, item: _Utterance, encoder: _ResponsesEncoder, whole: bool) -> _JSON:
        caller = None if self.caller is None else _by_key({"type": "program", **self.caller})
        keys: _JSON = {"call_id": item.call_id, "caller": caller, "name": self.name, "namespace": self.namespace}
        keys[self._grows] = item.text if whole else ""
        status = item.status if whole and not caller else "in_progress"  # what a program calls stays so (R)
        told = {key: keys[key] for key in sorted(keys) if keys[key] is not None}
        return {"id": item.id, "type": self._type, "status": status, **told}

    def _delta(self, item: _Utterance) -> tuple[str, _JSON]:
        return f"response.{self._type}_{self._grows}.delta", {}

    def _closing(self, item: _Utterance) -> _Events:
        return [(f"response.{self._type}_{self._grows}.done", {self._grows: item.text, "item_id": item.id})]


@dataclass(frozen=True, slots=True, init=False, repr=False)
class ToolCall(_Call):
    """The model calls a function. `arguments`: JSON text, sent as it is given, or a mapping; none are `{}`.

    `id` is the call's id (`call_...`), made up where it is not given. A live Stream can send the arguments piece by
    piece: `ToolCall("f", "")` opens the call, and one with the name "" goes on with the call before it. Responses also
    tells the `namespace` of the function, and the `caller`, as {"caller_id": "call_..."}: a program's.
    """

    arguments: str
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
        namespace: str | None = None,
        caller: Mapping[str, Any] | None = None,
    ) -> None:
        _check_fields(self, arguments=(arguments, (str, Mapping)))
        text = arguments if isinstance(arguments, str) else _dumps(dict(arguments))
        self._set(arguments=text, _ours=text is not arguments)
        _Call.__init__(self, name, id=id, choice=choice, namespace=namespace, caller=caller)

    def _spaced(self) -> ToolCall:
        """This call among several, whose arguments the API writes with spaces (R), unless the text was given."""
        if not self._ours:
            return self
        return replace(self, arguments=json.dumps(json.loads(self.arguments), ensure_ascii=False))


@dataclass(frozen=True, slots=True, repr=False)
class CustomToolCall(_Call):
    """The model calls a custom tool, whose input is free text. The other fields, and "" as a name: as in ToolCall."""

    input: str = ""

    _grows = "input"
    _prefix = "ctc_"
    _key = "custom"
    _type = "custom_tool_call"


class _Made(NamedTuple):
    """A value of an item that is made up where it is not given: random characters after a prefix."""

    prefix: str
    length: int
    hex: bool = False


_SECRET = _Made("gAAAAAB", 160)


class _ItemType(NamedTuple):
    """What the API does with items of a type (R). The keys of an item are `id`, `type`, `status`, then alphabetical."""

    prefix: str  # of the id
    keys: Mapping[str, Any] = {}  # that are there also where they are not given
    added: Mapping[str, Any] | None = {}  # by path, what output_item.added has instead; None: it has no such keys
    steps: str = ""  # the events of its own
    status: str | None = "completed"
    asked: tuple[str, str] = ("", "")  # the path of what only `include` asks for, and its name there


# In the steps of an item, `a` is the event response.TYPE.a; `b.delta < key` tells the key's text in one piece, and
# `b.delta << key` in many; `b.done = key` tells it whole. {end} is "failed" for an item that has failed.
# fmt: off
_CALLED: _JSON = {"call_id": _Made("call_", 24)}
_STAGES = "in_progress, searching, completed"
_ITEM_TYPES: dict[str, _ItemType] = {
    "apply_patch_call": _ItemType(
        "apc_", _CALLED, {"operation.diff": ""},
        "apply_patch_call_operation_diff.delta << operation.diff, "
        "apply_patch_call_operation_diff.done = operation.diff"),
    "apply_patch_call_output": _ItemType("apco_", _CALLED),
    "code_interpreter_call": _ItemType(
        "ci_", {"code": "", "container_id": _Made("cntr_", 48, hex=True), "outputs": []}, {"code": "", "outputs": []},
        "in_progress, code_interpreter_call_code.delta << code, code_interpreter_call_code.done = code, interpreting, "
        "completed", asked=("outputs", "code_interpreter_call.outputs")),
    "compaction": _ItemType("cmp_", {"encrypted_content": _SECRET}, status=None),
    "computer_call": _ItemType("cu_", {**_CALLED, "pending_safety_checks": []}),
    "file_search_call": _ItemType("fs_", {"queries": [], "results": []}, {"queries": [], "results": None}, _STAGES,
                                  asked=("results", "file_search_call.results")),
    "image_generation_call": _ItemType(
        "ig_", {}, None, "in_progress, generating, partial_image * partial_images, completed"),
    "local_shell_call": _ItemType("lsh_", _CALLED, {"action.command": []}),
    "mcp_approval_request": _ItemType("mcpr_", status=None),
    "mcp_call": _ItemType(
        "mcp_", {"approval_request_id": None, "arguments": "", "error": None, "output": None},
        {"arguments": "", "error": None, "output": None},
        "in_progress, mcp_call_arguments.delta < arguments, mcp_call_arguments.done = arguments, {end}"),
    "mcp_list_tools": _ItemType("mcpl_", {"tools": []}, {"tools": []}, "in_progress, {end}", status=None),
    "program": _ItemType("cm_", {**_CALLED, "fingerprint": _SECRET}, {"code": ""}, status=None),
    "program_output": _ItemType("cmo_", _CALLED, {"result": "", "status": "completed"}),
    "shell_call": _ItemType(
        "sh_", _CALLED, {"action": {"commands": [], "max_output_length": None, "timeout_ms": None}},
        "shell_call_command * action.commands"),
    "shell_call_output": _ItemType(
        "sho_", {**_CALLED, "max_output_length": None, "output": []}, {"output": [], "status": "completed"},
        "shell_call_output_content * output"),
    "tool_search_call": _ItemType("tsc_", {"call_id": None, "execution": "server"}, {"arguments": {}}),
    "tool_search_output": _ItemType("tso_", {"call_id": None, "execution": "server"}),
    "web_search_call": _ItemType("ws_", {}, {"action": {"type": "search"}}, _STAGES,
                                 asked=("action.sources", "web_search_call.action.sources")),
}
# fmt: on


def _at(value: Any, path: str) -> Any:
    """What is at a path in an object, as operation.diff; None where nothing is."""
    for key in path.split("."):
        value = _dict(value).get(key)
    return value


def _put(value: _JSON, path: str, new: Any) -> _JSON:
    """A copy of an object with something else at a path, if anything is there."""
    key, _, rest = path.partition(".")
    if key not in value:
        return value
    return {**value, key: _put(_dict(value[key]), rest, new) if rest else new}


def _joined(value: Any) -> str:
    """A text that may be given in the pieces that a stream sends of it."""
    return "".join(cast("Sequence[str]", value)) if isinstance(value, (list, tuple)) else value


def _pieces(value: Any, cut: bool = True) -> Sequence[Any]:
    """These pieces: as they are given, or word-sized where the text is to be cut."""
    if isinstance(value, (list, tuple)):
        return cast("Sequence[Any]", value)
    return _tokens(value) if cut and isinstance(value, str) else [value]


_IMAGE_KEYS = ("background", "output_format", "quality", "size")  # that each partial image tells


def _partial_image(fields: Mapping[str, Any], index: int, image: Any) -> Iterator[tuple[str, _JSON]]:
    shown = {key: fields[key] for key in _IMAGE_KEYS if key in fields}
    told = {"partial_image_b64": image} if isinstance(image, str) else _dict(image)
    yield "response.image_generation_call.partial_image", {**shown, **told, "partial_image_index": index}


def _shell_command(fields: Mapping[str, Any], index: int, command: Any) -> Iterator[tuple[str, _JSON]]:
    where = {"command_index": index, "item_id": None}  # these have no item_id (R)
    yield "response.shell_call_command.added", {**where, "command": ""}
    yield from (("response.shell_call_command.delta", {**where, "delta": text}) for text in _pieces(command))
    yield "response.shell_call_command.done", {**where, "command": _joined(command)}


def _shell_output(fields: Mapping[str, Any], index: int, output: Any) -> Iterator[tuple[str, _JSON]]:
    for stream in ("stdout", "stderr"):
        if text := _dict(output).get(stream):
            yield "response.shell_call_output_content.delta", {"command_index": index, "delta": {stream: text}}
    yield "response.shell_call_output_content.done", {"command_index": index, "output": list(fields["output"])}


_REPEATED_STEPS: dict[str, Callable[[Mapping[str, Any], int, Any], Iterator[tuple[str, _JSON]]]] = {
    "partial_image": _partial_image,
    "shell_call_command": _shell_command,
    "shell_call_output_content": _shell_output,
}


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Item(_Spoken):
    """Any output item of Responses, by its type and the API's own keys: `Item("mcp_call", name="search", ...)`.

    What is not given is made up where the API always has it (ids, `call_id`, `status`). Types that are known have their
    own events in a stream; others are added and done. A text that a stream sends in pieces (the code of
    code_interpreter_call, ...) may be a list of these pieces. Chat Completions has no place for items, but for one:
    `Item("audio", data=..., transcript=...)` is `message.audio` there, and nothing in Responses.
    """

    type: str
    fields: Mapping[str, Any]

    def __init__(self, type: str, **fields: Any) -> None:
        self._set(type=type, fields=fields)
        self.__post_init__()
        if type in ("message", "function_call", "custom_tool_call", "reasoning"):
            kinds = "Text, Refusal, ToolCall, CustomToolCall, Reasoning"
            raise ValueError(f"Item({type!r}): what the model says is {kinds}")

    def __hash__(self) -> int:
        return hash(self.type)  # the values of fields may be lists

    @property
    def _row(self) -> _ItemType:
        return _ITEM_TYPES.get(self.type, _ItemType("item_"))

    @property
    def _prefix(self) -> str:  # type: ignore[override]
        return self._row.prefix

    @property
    def _in_chat(self) -> bool:  # type: ignore[override]
        return self.type == "audio"

    @property
    def id(self) -> str | None:
        """The item's id, where it was given."""
        return self.fields.get("id")

    @property
    def searches(self) -> bool:
        """Whether this is a search of the web, as the API counts them."""
        return self.type == "web_search_call" and _at(self.fields, "action.type") in (None, "search")

    def _texts(self, cut: bool = False) -> Sequence[str]:
        return ()

    def _with(self, pieces: Sequence[str]) -> Self:
        return self

    def _item(self, item: _Utterance, encoder: _ResponsesEncoder, whole: bool) -> _JSON:
        row = self._row
        fields: _JSON = {**({"status": row.status} if row.status else {}), **row.keys, **self.fields}
        fields |= {key: encoder.made(item, key, value) for key, value in fields.items() if isinstance(value, _Made)}
        for sign, path in re.findall(r"([<*]) ([\w.]+)", row.steps):
            given = _at(fields, path)
            fields = _put(fields, path, [_joined(each) for each in given or ()] if sign == "*" else _joined(given))
        if not whole:
            for path, value in {"status": "in_progress", **(row.added or {})}.items():
                fields = _put(fields, path, value)
            if row.added is None:
                fields = {"status": fields["status"]}
        path, name = row.asked
        if path and name not in encoder.include:
            holder, _, key = path.rpartition(".")
            kept = {each: value for each, value in _dict(_at(fields, holder)).items() if each != key}
            fields = _put(fields, holder, kept) if holder else _put(fields, path, None)
        # `type` comes first in what is typed, but for arguments: these are the model's own.
        fields |= {key: _by_key(fields[key]) for key in fields.keys() - {"arguments"} if "type" in _dict(fields[key])}
        status = {"status": fields.pop("status")} if "status" in fields else {}
        others = {key: fields[key] for key in sorted(fields.keys() - {"id", "partial_images"})}
        return {"id": item.id, "type": self.type, **status, **others}

    def _steps(self) -> Iterator[tuple[str, _JSON]]:
        """The events of its own, as its row names them."""
        failed = self.fields.get("status") == "failed" or self.fields.get("error") is not None
        steps = self._row.steps.format(end="failed" if failed else "completed")
        for name, sign, path in re.findall(r"([\w.]+)(?: (\S+) ([\w.]+))?", steps):
            value = _at(self.fields, path)
            if not sign:
                yield f"response.{self.type}.{name}", {}
            elif sign == "*":
                for index, each in enumerate(value or ()):
                    yield from _REPEATED_STEPS[name](self.fields, index, each)
            elif sign == "=" and value is not None:  # a deleted file has no diff
                yield f"response.{name}", {path.rpartition(".")[2]: _joined(value)}
            elif value is not None:
                yield from ((f"response.{name}", {"delta": text}) for text in _pieces(value, sign == "<<"))

    def _closing(self, item: _Utterance) -> _Events:
        told = ((kind, {"item_id": item.id, **own}) for kind, own in self._steps())
        return [(kind, {key: value for key, value in each.items() if value is not None}) for kind, each in told]


class WebSearch(Item):
    """The model searches the web: a web_search_call item in Responses, nothing of its own in Chat Completions.

    `query` is one or several; `sources` are URLs. The text after it cites them: where it names them, best as
    `([label](url))`, or as a whole. Other actions are an Item: `Item("web_search_call", action={...})`. A model that
    reasons says a Reasoning first; who sends the items back without it gets the API's 400.
    """

    __slots__ = ()

    def __init__(self, query: str | Sequence[str], *, sources: Sequence[str] = (), id: str | None = None) -> None:
        queries = [query] if isinstance(query, str) else list(query)
        if isinstance(sources, str):
            raise TypeError(f"WebSearch wants a list of URLs for sources, not {sources!r}")
        _check_fields(self, id=(id, _WORD))
        for each in queries:
            _check_fields(self, query=(each, str))
        for url in sources:
            _check_fields(self, sources=(url, str))
        pages = [{"type": "url", "url": url} for url in sources]
        action = {"type": "search", "queries": queries, "query": queries[0], "sources": pages}
        super().__init__("web_search_call", **({} if id is None else {"id": id}), action=action)

    @property
    def query(self) -> str:
        """The first query."""
        return cast(str, self.fields["action"]["query"])

    @property
    def sources(self) -> tuple[str, ...]:
        """The URLs."""
        return tuple(page["url"] for page in self.fields["action"]["sources"])

    def __repr__(self) -> str:
        return f"WebSearch({self.query!r}, sources={self.sources!r}, id={self.id!r})"


_Reason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]


@dataclass(frozen=True, slots=True, repr=False)
class Finish(_Part):
    """Why the answer ends; without it "tool_calls" ("function_call" for `functions`) after a call, else "stop"."""

    reason: _Reason
    _: KW_ONLY
    choice: int = 0

    def __post_init__(self) -> None:
        if self.reason not in get_args(_Reason):
            raise ValueError(f"not a finish reason: {self.reason!r}; it is one of {', '.join(get_args(_Reason))}")
        _Part.__post_init__(self)

    def _act(self, answer: _Delivery) -> None:
        answer.encoder.finish[self.choice] = self.reason


@dataclass(frozen=True, slots=True, repr=False)
class Usage(_Part):
    """The tokens that the answer says it used. Without it they are estimated from the texts.

    `cached_tokens` are among the prompt's tokens, `reasoning_tokens` among the completion's. `details` are the others
    that the API tells of both: {"prompt": {"audio_tokens": 3}, "completion": {"accepted_prediction_tokens": 5}}.
    """

    prompt_tokens: int
    completion_tokens: int
    _: KW_ONLY
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])

    def __post_init__(self) -> None:
        _Part.__post_init__(self)
        for side, tokens in self.details.items():
            if side not in ("prompt", "completion"):
                raise ValueError(f'Usage has details of "prompt" and "completion", not {side!r}: {tokens!r}')

    @property
    def total_tokens(self) -> int:
        """The sum of both."""
        return self.prompt_tokens + self.completion_tokens

    def _act(self, answer: _Delivery) -> None:
        answer.encoder.usage = self


@dataclass(frozen=True, slots=True, repr=False)
class Pause(_Part):
    """Nothing happens for so many seconds. What was said before is on the wire by then; stop() ends the wait."""

    seconds: float

    def _act(self, answer: _Delivery) -> None:
        answer.pause(self.seconds)


@dataclass(frozen=True, slots=True, repr=False)
class Disconnect(_Part):
    """The server hangs up here: with a FIN, or a RST if `reset`. A stream has no terminator, a JSON body is cut."""

    _: KW_ONLY
    reset: bool = False

    def _act(self, answer: _Delivery) -> None:
        answer.cut(self.reset)


@dataclass(frozen=True, slots=True, repr=False)
class Raw(_Part):
    """These bytes, as they are, in the place of an event (or in the JSON body, which they are if nothing is said)."""

    data: bytes

    def __post_init__(self) -> None:
        _check_fields(self, data=(self.data, (bytes, bytearray, memoryview)))
        self._set(data=bytes(self.data))

    def _act(self, answer: _Delivery) -> None:
        answer.sink.raw(self.data)


@dataclass(frozen=True, slots=True, repr=False)
class StreamError(_Part):
    """The answer fails here. A stream gets the API's in-stream error; a request for JSON a 500 with these fields.

    Responses tells it twice, in an `error` event and in response.failed; `event=False` leaves the first out.
    """

    message: str
    _: KW_ONLY
    type: str = "server_error"
    code: str | None = None
    param: str | None = None
    event: bool = True

    def _act(self, answer: _Delivery) -> None:
        answer.encoder.error_event = self.event
        answer.fail(APIError(500, self.message, type=self.type, code=self.code, param=self.param))


@dataclass(frozen=True, slots=True, repr=False)
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


class Reply:
    """An answer with its envelope: what is said, and the id, model, time and headers around it.

    What is said may also be one whole answer, recorded or a Reply, which then has this envelope where one is given.
    `created` is in unix seconds. `extra` are top-level keys of the answer's JSON, in place of what the server says:
    `{"service_tier": "scale"}`, `{"store": False}`, `{"moderation": {...}}`. `ttft` and `itl` are the seconds before
    the first token and between tokens, in place of the server's. `only="stream"` or `only="json"` refuses the other
    kind of request with a 500. Raises TypeError for an id, model or time of another type, ValueError for headers that
    could not be sent.
    """

    def __init__(
        self,
        *parts: _Content | _Whole,
        id: str | None = None,
        model: str | None = None,
        created: int | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
        only: Literal["stream", "json"] | None = None,
        ttft: float | None = None,
        itl: float | None = None,
    ) -> None:
        if (id, model, created, ttft, itl) != (None,) * 5:  # seldom
            numbers = {"created": (created, _NUMBER), "ttft": (ttft, _SECONDS), "itl": (itl, _SECONDS)}
            _check_fields(self, id=(id, _WORD), model=(model, _WORD), **numbers)
        if only not in (None, "stream", "json"):
            raise ValueError(f"only is 'stream' or 'json', not {only!r}")
        self.parts: Sequence[Any] = parts
        self.id, self.model, self.created = id or None, model or None, created
        self.headers: Mapping[str, str] = _header_fields(headers) if headers else {}
        self.extra: Mapping[str, Any] = {**extra} if extra else {}
        self.only, self.ttft, self.itl = only, ttft, itl
        self._fragments = False  # whether all parts are fragments, sent as given
        if len(parts) == 1 and type(parts[0]) is str:
            return
        inner: Any = parts[0] if len(parts) == 1 else None
        if isinstance(inner, Mapping) or hasattr(inner, "model_dump"):
            inner = recorded(cast(object, inner))
        if isinstance(inner, (Reply, Completion)):  # its envelope holds where none is given
            self.id, self.model = self.id or inner.id or None, self.model or inner.model or None
            self.created = inner.created if created is None else created
        if isinstance(inner, Completion):
            self.created = self.created or created  # an empty one stands for the answer's own
        if isinstance(inner, Reply):
            self.parts, self._fragments = inner.parts, inner._fragments
            self.headers, self.extra = self.headers or inner.headers, {**inner.extra, **self.extra}
            return
        for part in parts:
            kind, known = type(part), (_Part, Stream, Completion, Iterable, AsyncIterable)
            if kind is not str and (not issubclass(kind, known) or issubclass(kind, (bytes, bytearray, Mapping))):
                raise TypeError(
                    f"{_short(repr(part))} is no answer; an answer is a str, a part, a list or generator of parts, "
                    f"a Stream, a Reply, a recorded answer or an APIError{_copy_hint(part)}"
                )

    def _known(self) -> list[_Part] | None:
        """The parts, where they are all known before anything is sent; None where they come in time."""
        known: list[_Part] = []
        for content in self.parts:
            if isinstance(content, str):
                known.append(Text(content))
            elif isinstance(content, _Part):
                known.append(content)
            elif isinstance(content, (list, tuple)):
                given = cast("Sequence[object]", content)
                known += [part if isinstance(part, _Part) else _part(part) for part in given]
            elif isinstance(content, Completion):
                known += content._parts()
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
    try:
        return Reply(answer)
    except (TypeError, ValueError) as error:
        raise TypeError(f"handler returned {type(answer).__name__}: {error}") from None


def _wait(changed: threading.Condition, ready: Callable[[], bool], timeout: float, call: str) -> bool:
    """Whether `ready` within so many seconds. Raises RuntimeError where this wait is itself what it waits for."""
    loop = getattr(sys.modules.get("asyncio"), "_get_running_loop", bool)()
    patience = min(timeout, _LOOP_PATIENCE) if loop else timeout
    with changed:
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

    It serves one request, which is `request` once it came; a second one is an error. A Stream that is never closed is
    an error when the server stops, unless the test was told that the client has left, or when its client has waited for
    the next part for `timeout` seconds (None: for ever). The waits block their thread: in a coroutine, `await
    asyncio.to_thread(stream.flush)`.
    """

    def __init__(self, *, timeout: float | None = 30.0) -> None:
        self._timeout = timeout
        self._queue: queue.SimpleQueue[_Part] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards the fields below, and tells when they change
        self.request: Request | None = None
        self._sent = 0  # parts, and the end
        self._taken = 0  # parts, by the answer
        self._written = 0  # of what was sent, on the wire
        self._ended = self._gone = self._noticed = False  # closed; its client has left; the test was told of that

    def send(self, *parts: _Sent) -> bool:
        """Sends parts, in order. Returns whether there is still a client: False once it has left, and drops them.

        Raises RuntimeError after `close` or `fail`, TypeError for what is not a part.
        """
        checked = [_part(part) for part in parts]
        with self._changed:
            if self._ended:
                raise RuntimeError("send() on a Stream that has ended: close() or fail() was called before")
            if self.disconnected:
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
        if not _wait(self._changed, lambda: self._gone or self._written >= self._sent, timeout, "stream.flush"):
            missing = self._sent - self._written
            why = "no request has come" if self.request is None else "the client does not read"
            raise TimeoutError(f"{missing} of {self._sent} parts are not on the wire after {timeout} s: {why}")
        return self._written >= self._sent or not self.disconnected

    def wait_request(self, timeout: float = 5.0) -> Request:
        """Waits for the request that this Stream answers. Raises TimeoutError after `timeout` seconds."""
        if not _wait(self._changed, lambda: self.request is not None, timeout, "stream.wait_request"):
            raise TimeoutError(f"no request came for this Stream in {timeout} s")
        return cast(Request, self.request)

    @property
    def disconnected(self) -> bool:
        """Whether the client has left before the end."""
        self._noticed = self._noticed or self._gone
        return self._gone

    def wait_disconnected(self, timeout: float = 5.0) -> bool:
        """Waits until the client has left. Returns False if it has not after `timeout` seconds, or never came."""
        return _wait(self._changed, lambda: self.disconnected, timeout, "stream.wait_disconnected")

    def _check_closed(self) -> None:
        if not self._ended and not self._noticed:
            raise RuntimeError(
                f"a Stream was never closed, for {self.request!r}: close() ends it; where the client is to leave "
                "first, look whether it has, by wait_disconnected() or `disconnected`"
            )

    def _serve(self, request: Request) -> None:
        with self._changed:
            if self.request is not None:
                raise RuntimeError(f"a Stream serves one request: it has served {self.request!r}, now came {request!r}")
            self.request = request
            self._changed.notify_all()

    def _on_wire(self, count: int) -> None:
        with self._changed:
            self._written = count
            self._changed.notify_all()

    def _left(self) -> None:
        with self._changed:
            self._gone = not (self._ended and self._written >= self._sent)
            self._changed.notify_all()


class Script:
    """A handler that gives one answer per request, in order. An answer that is a function is called as a handler.

    A request after the last answer is an error, and so are answers left when the server whose handler this is stops.
    `when` tells which requests it is for; the others, such as an agent's for a title, are answered with `otherwise`.
    """

    def __init__(
        self,
        *answers: Answer | Handler,
        when: Callable[[Request], object] | None = None,
        otherwise: Answer | Handler | None = None,
    ) -> None:
        if (when is None) != (otherwise is None):
            raise TypeError("a Script takes when=function and otherwise=answer together, or neither")
        for answer in answers if otherwise is None else (*answers, otherwise):
            if not (callable(answer) or isinstance(answer, (APIError, Mapping)) or hasattr(answer, "model_dump")):
                Reply(answer)  # raises TypeError for what is no answer
        self._answers, self._unused = answers, deque(answers)
        self._when, self._otherwise = when, otherwise

    def __call__(self, request: Request) -> Any:
        answer = self._otherwise
        if self._when is None or self._when(request):
            try:
                answer = self._unused.popleft()
            except IndexError:
                count = len(self._answers)
                hint = "; a list is one answer" if count == 1 and isinstance(self._answers[0], list) else ""
                words = f"the Script ends with answer {count}, and one more request came: {request!r}{hint}"
                raise AssertionError(words) from None
        return answer(request) if callable(answer) else answer

    def _check_used(self) -> None:
        if unused := tuple(self._unused):
            raise AssertionError(f"unused answers of the Script, {len(unused)} of {len(self._answers)}: {unused!r}")


def echo(request: Request) -> str:
    """The default handler: says the last user message again."""
    return request.text


# ---- Answers that are made up ----------------------------------------------------------------------------------------

_WORDS = "a quiet river carries bright leaves past old stones while warm light falls on every green field"
_DEEP = 4  # levels of a made-up value; below, only what the schema requires
_PRINTABLE = [*"a1A", *map(chr, range(32, 127)), "é"]
_LARGE = 10_000  # what is made up is no larger, in items or characters

# Keywords of JSON Schema that are not followed. SDKs emit none of them.
_UNFOLLOWED = {"not", "if", "contains", "patternProperties", "dependentRequired", "dependentSchemas", "$dynamicRef"}
_FORMATS = {
    "date-time": "2025-01-31T12:30:00Z", "date": "2025-01-31", "time": "12:30:00Z", "duration": "P1DT2H",
    "email": "ada@example.com", "hostname": "example.com", "uri": "https://example.com/", "url": "https://example.com/",
    "ipv4": "192.0.2.1", "ipv6": "2001:db8::1", "uuid": "123e4567-e89b-42d3-a456-426614174000",
}  # fmt: skip


class _Sample(NamedTuple):
    """Makes up values that fit a JSON Schema, as much of it as SDKs emit. Raises ValueError for what it cannot make."""

    root: Any
    rng: random.Random

    def instance(self, schema: Any) -> Any:
        """A value that fits. Raises ValueError where it cannot make one."""
        try:
            return self.make(schema)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # no schema, or one of huge numbers
            self.fail(schema, f"an instance ({error})")

    def make(self, schema: Any, depth: int = 0) -> Any:
        schema = _dict(schema)
        unfollowed = _UNFOLLOWED.intersection(schema)
        if unfollowed or depth > 32 or max(schema.get("minLength", 0), schema.get("minItems", 0)) > _LARGE:
            self.fail(schema, " and ".join(sorted(unfollowed)) or "a value so large")
        for key, pick in _CHOICES.items():
            if key in schema:
                rest = {name: value for name, value in schema.items() if name != key}
                return self.make(self.merged(rest, *pick(self, schema[key], depth)), depth + 1)
        if "const" in schema or "enum" in schema:
            return schema["const"] if "const" in schema else self.rng.choice(schema["enum"])
        kind = schema.get("type", next((kind for key, kind in _IMPLIED.items() if key in schema), "string"))
        if isinstance(kind, list):
            return self.make({"anyOf": [{**schema, "type": each} for each in cast("list[str]", kind)]}, depth)
        if kind not in _MAKERS:
            self.fail(schema, f"type {kind!r}")
        return _MAKERS[kind](self, schema, depth)

    def fail(self, schema: _JSON, what: str) -> NoReturn:
        raise ValueError(f"auto cannot make up {what}, for the schema {_short(schema)}; write a handler for it")

    def target(self, pointer: str, depth: int) -> list[Any]:
        """What a $ref points to: RFC 6901, in the same schema."""
        found: Any = self.root
        begin, *steps = pointer.split("/")
        for step in steps:
            name = unquote_to_bytes(step).decode().replace("~1", "/").replace("~0", "~")
            found = _list(found)[int(name)] if isinstance(found, list) else _dict(found).get(name)
        if begin != "#" or found is None:
            self.fail({"$ref": pointer}, "what is not in the schema")
        return [found]

    def merged(self, *schemas: Any) -> _JSON:
        """One schema that asks for what all of these do."""
        whole: _JSON = {}
        for schema in map(_dict, schemas):
            properties = {**_dict(whole.get("properties")), **_dict(schema.get("properties"))}
            required = [*_list(whole.get("required")), *_list(schema.get("required"))]
            whole |= schema
            whole |= {key: each for key, each in (("properties", properties), ("required", required)) if each}
        return whole

    def choose(self, options: list[Any], depth: int) -> list[Any]:
        """The first of some schemas that is not null; below, the first that ends."""
        late = ("null",) if depth < _DEEP else ("object", "array")
        return sorted(options, key=lambda each: each.get("type") in late or ("$ref" in each and depth >= _DEEP))[:1]

    def words(self, count: int) -> str:
        return " ".join(self.rng.choices(_WORDS.split(), k=count))

    def object(self, schema: _JSON, depth: int) -> _JSON:
        more, required = schema.get("additionalProperties"), _list(schema.get("required"))
        properties = dict.fromkeys(required, more) | _dict(schema.get("properties"))
        wanted = {name: each for name, each in properties.items() if depth < _DEEP or name in required}
        if not properties and isinstance(more, dict) and depth < _DEEP:  # a mapping
            wanted[self.make(schema.get("propertyNames", {}), depth + 1)] = more
        while len(wanted) < schema.get("minProperties", 0) <= _LARGE:
            wanted[f"key{len(wanted)}"] = more
        return {name: self.make(each, depth + 1) for name, each in wanted.items()}

    def array(self, schema: _JSON, depth: int) -> list[Any]:
        made = [self.make(each, depth + 1) for each in _list(schema.get("prefixItems"))]
        items, least = schema.get("items", {}), schema.get("minItems", 0)
        more = items is not False and "prefixItems" not in schema and depth < _DEEP
        count = min(schema.get("maxItems", _LARGE), max(least, self.rng.randint(1, 2) if more else 0))
        for _ in range(20 * count + 1):
            if len(made) >= count:
                return made
            value = self.make(items, depth + 1)
            if not (schema.get("uniqueItems") and value in made):
                made.append(value)
        return self.fail(schema, f"{count} different items")

    def number(self, schema: _JSON, depth: int) -> float:
        whole = schema.get("type") == "integer"
        step = schema.get("multipleOf", 1 if whole else 0.25)
        over, under = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
        low, high = max(schema.get("minimum", -math.inf), over), min(schema.get("maximum", math.inf), under)
        low = min(0, high - 100 * step) if low == -math.inf else low
        high = low + 100 * step if high == math.inf else high
        first, last = math.ceil(low / step), math.floor(high / step)
        first, last = first + (first * step <= over), last - (last * step >= under)
        if first <= last:
            value = self.rng.randint(first, last) * step
            return int(value) if whole else round(value, 10)
        if whole or "multipleOf" in schema or low >= high:
            self.fail(schema, "a number")
        return float(low + high) / 2

    def string(self, schema: _JSON, depth: int) -> str:
        least, most, form = schema.get("minLength", 0), schema.get("maxLength", _LARGE), schema.get("format", "")
        words = _FORMATS.get(form) or self.words(2 + least // 2)[: max(least, min(most, 40))].strip()
        texts = [words.ljust(least, "s"), *_FORMATS.values()]
        if "pattern" in schema:
            if form in _FORMATS:
                self.fail(schema, "a text of a format and a pattern")
            try:
                texts = [*_matching(schema["pattern"], least, min(most, _LARGE))]
            except (ValueError, re.error, RecursionError) as error:
                self.fail(schema, f"a text for its pattern ({error})")
        for text in texts:
            if least <= len(text) <= most:
                return text
        return self.fail(schema, "a text like that")


def _matching(pattern: str, least: int, most: int) -> Iterator[str]:
    """Texts that match a pattern, each with longer repeats than the one before. Raises ValueError where it cannot.

    By construction: to search them, with a pattern that a client sent, could take for ever.
    """
    parsed = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse").parse(pattern)
    compiler = import_module("re._compiler" if sys.version_info >= (3, 11) else "sre_compile")

    def text(tree: Any, more: int, first: bool, last: bool) -> str:
        made = ""
        for at, (code, value) in enumerate(tree):
            kind, begins, ends = str(code), first and not made, last and at == len(tree) - 1
            if kind == "IN":
                lows: list[Any] = [each[0] if isinstance(each, tuple) else each for _, each in value]
                own = [chr(each) for each in lows if type(each) is int]
                fitting = [*filter(compiler.compile(tree[at : at + 1]).match, (*own, *_PRINTABLE))]
                if not fitting:
                    raise ValueError("no printable character is in a class of it")
                made += fitting[0]
            elif kind in ("LITERAL", "NOT_LITERAL", "ANY"):
                made += chr(value) if kind == "LITERAL" else next(each for each in "ab" if value != ord(each))
            elif kind in ("MAX_REPEAT", "MIN_REPEAT"):
                made += text(value[2], more, False, False) * (value[0] + min(more, value[1] - value[0]))
            elif kind in ("SUBPATTERN", "BRANCH"):
                made += text(value[-1] if kind == "SUBPATTERN" else value[1][0], more, begins, ends)
            elif kind != "AT" or not {"AT_BEGINNING": begins, "AT_END": ends}.get(str(value)):
                raise ValueError(f"{kind.lower()} is in it")
        return made[: _LARGE + 1]  # of repeats in repeats, which may be too long to hold

    for more in (1, 0, *range(2, 21), least, most):
        yield text(parsed, min(more, 1_000), True, True)


_CHOICES: dict[str, Callable[[_Sample, Any, int], list[Any]]] = {
    "$ref": _Sample.target, "allOf": lambda _, schemas, depth: schemas, "anyOf": _Sample.choose, "oneOf": _Sample.choose
}  # fmt: skip
_MAKERS: dict[Any, Callable[[_Sample, _JSON, int], Any]] = {
    "object": _Sample.object, "array": _Sample.array, "string": _Sample.string, "number": _Sample.number,
    "integer": _Sample.number, "boolean": lambda sample, schema, depth: sample.rng.random() < 0.5,
    "null": lambda sample, schema, depth: None,
}  # fmt: skip
_IMPLIED = {"properties": "object", "items": "array", "minimum": "number", "maximum": "number"}  # by what has no type


def _wanted_tool(request: Request) -> Tool | None:
    """The tool to call: the first, or what tool_choice names. None once a tool has answered since the user spoke."""
    choice = request.options.get("tool_choice")
    spoke = next((each.role for each in reversed(request.messages) if each.role in ("user", "tool")), "")
    if choice == "none" or spoke == "tool":
        return None
    named = _dict(_dict(choice).get("allowed_tools")) or _dict(choice)
    names = {_tool(each).name for each in (choice, *_list(named.get("tools")))} - {""}
    tools = [tool for tool in request.tools if tool.type in ("function", "custom")]
    return next((tool for tool in tools if tool.name in names or not names), None)


def auto(request: Request, *, tokens: int = 32) -> list[Text | ToolCall | CustomToolCall | Finish]:
    """A handler that makes up what fits the request: a call of a tool, an instance of its JSON schema, or a text.

    It calls the first tool, or what `tool_choice` names; after the tool's result, or without tools, it says an instance
    of the request's `json_schema`, or a text of so many `tokens`. With the server's `seed`, the same request gets the
    same. A custom tool gets words, whatever its grammar. Raises ValueError for a schema that it cannot fit.
    """
    connection = request._connection
    seed = None if connection is None else connection.server.fake.seed
    rng = random.Random(None if seed is None else f"{seed} ".encode() + request.raw_body)
    tool = _wanted_tool(request)
    if tool is not None and tool.type == "custom":
        return [CustomToolCall(tool.name, _Sample(None, rng).words(4))]
    if tool is not None:
        schema = {"type": "object", **_dict(tool.parameters)}
        return [ToolCall(tool.name, _Sample(schema, rng).instance(schema))]
    options = request.options
    wanted = _dict(options.get("response_format") or _dict(options.get("text")).get("format"))
    if wanted.get("type") in ("json_schema", "json_object"):
        schema = _dict(wanted.get("json_schema", wanted)).get("schema", {"type": "object"})
        text = _dumps(_Sample(schema, rng).instance(schema))
    else:
        text = f"{_Sample(None, rng).words(max(1, tokens - 1))}.".capitalize()
    limits = [options.get(key) for key in ("max_completion_tokens", "max_tokens", "max_output_tokens")]
    limit = next((each for each in limits if isinstance(each, int)), sys.maxsize)
    pieces = _tokens(text)
    return [Text(text)] if len(pieces) <= limit else [Text("".join(pieces[:limit])), Finish("length")]


# ---- Chunks and completions ------------------------------------------------------------------------------------------
# The low level: the original's data, for who wants to say exactly what a chunk holds.


@dataclass(frozen=True, slots=True)
class ChunkChoice:
    """One choice of a Chunk: `delta` is its content, sent where it is not empty, and so are the others."""

    index: int = 0
    delta: str = ""
    tool_calls: Sequence[ToolCall] = ()
    finish_reason: _Reason | None = None


@dataclass(frozen=True, slots=True, repr=False)
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

    def __post_init__(self) -> None:
        """It is sent as it is given."""

    def _act(self, answer: _Delivery) -> None:
        answer.chunk(self)

    def _parts(self) -> list[_Part]:
        said = [_said([each.delta] if each.delta else [], each.tool_calls, each) for each in self.choices]
        return [*chain.from_iterable(said), *filter(None, [self.usage])]


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
        for each in self.choices:
            text, calls = each.message.text, each.message.tool_calls
            parts += _said([text] if text or not calls else [], calls, each)
        return [*parts, *filter(None, [self.usage])]


def _said(texts: list[str], calls: Sequence[_Call], choice: ChunkChoice | CompletionChoice) -> Iterator[_Part]:
    """The parts that say what a choice holds."""
    yield from (Text(text, choice=choice.index) for text in texts)
    yield from (replace(call, choice=choice.index) for call in calls)
    if choice.finish_reason:
        yield Finish(choice.finish_reason, choice=choice.index)


class _Dumps(Protocol):
    """An object of the official SDK, or another of pydantic's."""

    def model_dump(self, *, mode: str, exclude_unset: bool) -> dict[str, Any]: ...


_Sent: TypeAlias = str | _Part
_Content: TypeAlias = str | _Part | Stream | Completion | Iterable[_Sent] | AsyncIterable[_Sent]
_Whole: TypeAlias = Reply | Mapping[str, Any] | _Dumps  # one answer; the latter two as `recorded` takes them
Answer: TypeAlias = _Content | _Whole | APIError  # what a handler may return
Handler: TypeAlias = Callable[[Request], Answer | Awaitable[Answer]]


def streaming_response(*chunks: Chunk) -> Reply:
    """The answer made of these chunks; a request that does not stream gets a 500."""
    return Reply(list(chunks), only="stream")


def non_streaming_response(text: str) -> Reply:
    """The answer with this text, from gpt-4, which used 10 + 5 tokens; a request that streams gets a 500."""
    return Reply(text, Finish("stop"), Usage(10, 5), model="gpt-4", only="json")


def text_chunks(*deltas: str, index: int | None = None) -> list[Chunk]:
    """One chunk per delta, all with one id and time, for the choices 0, 1, 2, ...; or all for the choice `index`."""
    id, created = "chatcmpl-" + _Ids(random.getrandbits).alnum(29), int(_Clock.time())
    return [
        Chunk([ChunkChoice(number if index is None else index, delta)], id=id, created=created, model="gpt-4")
        for number, delta in enumerate(deltas)
    ]


def tool_call_chunk(name: str, arguments: str | Mapping[str, object]) -> Chunk:
    """A chunk that calls a function: choice 0, call index 0, id `call_...`."""
    call = ToolCall(name, arguments, id="call_" + _Ids(random.getrandbits).alnum(24))
    return replace(*text_chunks(""), choices=[ChunkChoice(tool_calls=[call])])


# ---- Answers in the API's own JSON -----------------------------------------------------------------------------------


def recorded(data: object) -> Reply:
    """An answer from the API's own JSON of either API: what was recorded is said again, in the form that is asked for.

    `data` is a chat.completion or a response, as a dict, as JSON text or bytes, or as the official SDK's object; or an
    event stream: the bytes that `curl -N` printed, or a list of its chunks or events, whose deltas are kept. Ids, model
    and time are the recorded ones; what echoes the request (tools, temperature, ...) is the new request's. Raises
    ValueError, which says where, for what cannot be said again.
    """
    value = _plain_json(data)
    try:
        if isinstance(value, list):
            events = [_dict(event) for event in _list(value)]
            chat = any("choices" in event or [*event] == ["error"] for event in events)
            return _recorded_chunks(events, "delta") if chat else _recorded_events(events)
        kind = _dict(value).get("object")
        if kind == "chat.completion":
            return _recorded_chunks([value], "message")
        if kind == "response":
            return _recorded_events([{"type": "response.completed", "response": value}])
        raise ValueError(f"it is no chat.completion, no response and no stream of either: {_short(repr(value))}")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        missing = "a key is missing: " if isinstance(error, KeyError) else ""
        raise ValueError(f"recorded(...) cannot say this again: {missing}{error}") from None


def _plain_json(data: Any) -> Any:
    """Dicts and lists, from text, bytes, or objects that have `model_dump`, as pydantic's have."""
    if isinstance(data, (bytes, bytearray)):
        data = data.decode()
    if isinstance(data, str):
        text = data.strip().removeprefix("\ufeff")
        if text[:1] in ("{", "["):
            return json.loads(text)
        lines = [line[5:].strip() for line in re.split(r"\r\n|\r|\n", text) if line.startswith("data:")]
        if not lines:
            raise ValueError(f"recorded(...) wants JSON or an event stream, not {_short(repr(data))}")
        try:
            return [json.loads(line) for line in lines if line != "[DONE]"]
        except ValueError as error:
            raise ValueError(f"recorded(...) got an event that is no JSON; is the stream cut off? {error}") from None
    if isinstance(data, (list, tuple)):
        return [_plain_json(each) for each in cast("Sequence[Any]", data)]
    return data.model_dump(mode="json", exclude_unset=True) if hasattr(data, "model_dump") else data


def _only(value: Any, known: str, path: str) -> _JSON:
    """A JSON object with no other keys than these that say something. Raises ValueError for others."""
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no object: {_short(repr(value))}")
    said = (*known.split(), "parsed", "parsed_arguments")  # these the SDK makes of what came
    for key, each in _dict(value).items():
        if key not in said and each not in (None, [], {}):
            raise ValueError(f"{path}.{key} is nothing that an answer is known to say: {_short(repr(each))}")
    return _dict(value)


def _recorded_usage(usage: Any, names: Sequence[str]) -> list[_Part]:
    """The Usage of a usage object, whose keys have these names: the prompt's tokens, and the completion's."""
    if usage is None:
        return []
    known = " ".join(f"{name}_tokens {name}_tokens_details" for name in names)
    told = _only(usage, f"total_tokens {known}", "usage")
    prompt, completion = (dict(_dict(told.get(f"{name}_tokens_details"))) for name in names)
    cached, reasoning = prompt.pop("cached_tokens", 0), completion.pop("reasoning_tokens", 0)
    tokens = told[f"{names[0]}_tokens"], told.get(f"{names[1]}_tokens", 0)
    details = {side: each for side, each in (("prompt", prompt), ("completion", completion)) if each}
    return [Usage(*tokens, cached_tokens=cached or 0, reasoning_tokens=reasoning or 0, details=details)]


_CHAT_KEYS = "id object created model choices usage service_tier system_fingerprint moderation obfuscation"
_MESSAGE_KEYS = "role content refusal annotations audio tool_calls function_call"


def _recorded_chunks(chunks: list[_JSON], holder: str) -> Reply:
    """Reads a stream of chunks, or a completion, which is one chunk with a "message" in the place of the "delta"."""
    envelope: _JSON = {}
    parts: list[_Part] = []
    audio: _JSON = {}
    for at, chunk in enumerate(chunks):
        path = f"chunk {at}" if holder == "delta" else "the completion"
        if "error" in chunk:
            parts.append(_recorded_error(chunk["error"], True))
            continue
        envelope |= {key: each for key, each in _only(chunk, _CHAT_KEYS, path).items() if envelope.get(key) is None}
        for number, choice in enumerate(_list(chunk.get("choices"))):
            where = f"{path}.choices[{number}]"
            _read_choice(_only(choice, f"index {holder} logprobs finish_reason", where), holder, parts, audio, where)
        parts += _recorded_usage(chunk.get("usage"), ("prompt", "completion"))
    if audio:
        parts.insert(0, Item("audio", **audio))
    kept = ("service_tier", "system_fingerprint", "moderation")
    extra = {key: each for key, each in envelope.items() if key in kept}
    reply = Reply(*parts, **{key: envelope.get(key) for key in ("id", "model", "created")}, extra=extra)
    reply._fragments = holder == "delta"
    return reply


def _read_choice(choice: _JSON, holder: str, parts: list[_Part], audio: _JSON, path: str) -> None:
    """Adds to the parts what the delta, or the message, of a choice says."""
    path = f"{path}.{holder}"
    delta, index = _only(choice.get(holder, {}), _MESSAGE_KEYS, path), choice.get("index", 0)
    opens = holder == "delta" and "role" in delta
    for key, say in (("content", Text), ("refusal", Refusal)):
        text = delta.get(key)
        if text or (text is not None and not opens):  # else it opens the choice, and says nothing yet
            logprobs = _dict(choice.get("logprobs")).get(key) or None
            parts.append(say(text, choice=index, logprobs=logprobs))
    if delta.get("annotations"):  # their places are in all that the choice has said
        at = next((at for at, each in enumerate(parts) if isinstance(each, Text) and each.choice == index), None)
        if at is None:
            raise ValueError(f"{path}.annotations come before any text")
        first = cast(Text, parts[at])
        parts[at] = replace(first, annotations=(*first.annotations, *map(_dict, _list(delta["annotations"]))))
    for key, value in _dict(delta.get("audio")).items():
        audio[key] = audio[key] + value if key in ("data", "transcript") and key in audio else value
    calls = _list(delta.get("tool_calls"))
    for call in [*calls, {"function": delta["function_call"]}] if delta.get("function_call") else calls:
        make = CustomToolCall if "custom" in call else ToolCall
        about = call.get(make._key)
        if not isinstance(about, dict):
            raise ValueError(f"{path}.tool_calls has what is no call: {_short(repr(call))}")
        name, text = _dict(about).get("name") or "", _dict(about).get(make._grows) or ""
        parts.append(make(name, text, id=call.get("id"), choice=index))
    if choice.get("finish_reason"):
        parts.append(Finish(choice["finish_reason"], choice=index))


def _recorded_error(error: Any, event: bool) -> StreamError:
    told = _dict(error)
    about: _JSON = {"type": told.get("type") or "server_error", "code": told.get("code"), "param": told.get("param")}
    return StreamError(_string(told.get("message")), **about, event=event)


def _response_reply(body: _JSON, parts: list[_Part]) -> Reply:
    """What surrounds the output of a response: why it ended, its usage, and what is not the request's echo."""
    reason = _dict(body.get("incomplete_details")).get("reason")
    if body.get("status") == "incomplete":
        finish = next((finish for finish, each in _INCOMPLETE.items() if each == reason), None)
        if finish is None:
            raise ValueError(f"incomplete_details.reason is not known: {reason!r}")
        parts = [*parts, Finish(cast(_Reason, finish))]
    if body.get("status") == "failed":
        parts = [*parts, _recorded_error(body.get("error"), False)]
    parts += _recorded_usage(body.get("usage"), ("input", "output"))
    # What the encoder knows better comes from the request, or from what is said; output_text is of the SDK's.
    kept = {"access_programs", "moderation", "service_tier", "store", "tool_usage"}
    echoed = {*_UNASKED, "output_text"} - kept
    extra = {key: value for key, value in body.items() if key not in echoed and value is not None}
    created = body.get("created_at")  # of the SDK a float
    return Reply(*parts, id=body.get("id"), model=body.get("model"), created=created and int(created), extra=extra)


def _recorded_item(value: Any, path: str) -> _Spoken:
    """The part that a whole output item is."""
    item = _dict(value)
    kind = item.get("type")
    if kind == "message":
        _only(item, "id type status content phase role", path)
        about: _JSON = {"id": item.get("id"), "phase": item.get("phase")}
        contents = _list(item.get("content"))
        if len(contents) != 1:
            raise ValueError(f"{path}.content has {len(contents)} parts, where the API's messages have one")
        content = _dict(contents[0])
        if content.get("type") == "refusal":
            return Refusal(content.get("refusal", ""), **about)
        _only(content, "type annotations logprobs text", f"{path}.content[0]")
        notes = content.get("annotations") or ()
        return Text(content.get("text", ""), annotations=notes, logprobs=content.get("logprobs") or None, **about)
    if kind == "reasoning":
        _only(item, "id type status content encrypted_content summary", path)
        summaries = [_dict(each).get("text", "") for each in _list(item.get("summary"))]
        thought = "".join(_dict(each).get("text", "") for each in _list(item.get("content")))
        return Reasoning(*summaries, encrypted_content=item.get("encrypted_content"), text=thought, id=item.get("id"))
    if kind in _CALL_TYPES:
        make = _CALL_TYPES[kind]
        about = {"id": item.get("call_id"), "namespace": item.get("namespace"), "caller": item.get("caller")}
        _only(item, f"id type status call_id name namespace caller {make._grows}", path)
        return make(item["name"], item[make._grows], **about)
    if not isinstance(kind, str):
        raise ValueError(f"{path} is no output item: {_short(repr(value))}")
    return Item(**item)


_CALL_TYPES: dict[Any, type[ToolCall | CustomToolCall]] = {each._type: each for each in (ToolCall, CustomToolCall)}
# Events that repeat what others say, or only tell how far an item has come.
_REPEATS = re.compile(
    r"response\.(created|queued|in_progress|completed|incomplete|failed|reasoning_text\.delta"
    r"|(content_part|reasoning_summary_part|shell_call_command)\.added"
    r"|\w+\.(done|in_progress|searching|generating|interpreting|completed|failed))"
)


def _streamed_item(item: _JSON, events: list[_JSON], done: _Spoken | None) -> list[Any]:
    """The parts of an item of a stream, which is given as it was told last: its fragments, as the events have them."""
    if isinstance(done, Item):
        return [_in_pieces(done, events)]
    if not events:
        return [] if done is None else [done]
    if item["type"] == "message":
        item = {**item, "content": [{"type": events[0]["type"].split(".")[1]}]}  # as it opens
    opening: Any = _recorded_item(item, "output_item.added")
    if isinstance(opening, Item):  # it was never done, and cannot be said in part
        return []
    parts: list[Any] = []
    section = None
    for event in events:
        if "annotation" in event:  # of what was said before it
            last = parts.pop() if parts else opening
            parts.append(replace(last, annotations=(*last.annotations, event["annotation"])))
            continue
        begins = bool(parts) and event.get("summary_index") != section
        section = event.get("summary_index")
        text = _Next(event["delta"]) if begins else event["delta"]
        part = opening._more(text) if parts else opening._with([text])
        parts.append(replace(part, logprobs=event["logprobs"]) if event.get("logprobs") else part)
    return parts


def _in_pieces(item: Item, events: list[_JSON]) -> Item:
    """An item with its texts in the pieces that a stream told."""
    told: dict[str, list[_JSON]] = {}  # by the event's name
    for event in events:
        told.setdefault(event["type"].split(".")[1], []).append(event)
    fields = dict(item.fields)
    for name, path in re.findall(r"(\w+)\.delta <<? ([\w.]+)", item._row.steps):
        if name in told:
            fields = _put(fields, path, [event["delta"] for event in told[name]])
    if commands := told.get("shell_call_command"):
        count = len(fields["action"]["commands"])
        pieces = [[each["delta"] for each in commands if each.get("command_index") == at] for at in range(count)]
        fields = _put(fields, "action.commands", pieces)
    if images := told.get("image_generation_call"):
        keys = (*_IMAGE_KEYS, "partial_image_b64")
        fields["partial_images"] = [{key: image[key] for key in keys if key in image} for image in images]
    return Item(item.type, **fields)


def _recorded_events(events: list[_JSON]) -> Reply:
    """Reads a stream of events; a response is a stream of the one that has it."""
    # By output_index: as they were told last, what events say of them, and what they are once they are done.
    items: dict[Any, tuple[_JSON, list[_JSON], _Spoken | None]] = {}
    response: _JSON = {}
    errors: list[_Part] = []
    for at, event in enumerate(events):
        kind, index = _string(event.get("type")), event.get("output_index")
        response = event.get("response") or response
        if kind == "response.output_item.added":
            items[event["output_index"]] = event["item"], [], None
        elif kind == "response.output_item.done":
            told = items[index][1] if index in items else []
            items[event["output_index"]] = event["item"], told, _recorded_item(event["item"], f"event {at}.item")
        elif kind == "error":
            errors.append(_recorded_error(event.get("error", event), True))
        elif not _REPEATS.fullmatch(kind):
            if index not in items or not kind.endswith((".delta", ".annotation.added", ".partial_image")):
                raise ValueError(f"event {at} is of a type that is not known here: {kind!r}")
            items[index][1].append(event)
    parts: list[_Part] = [part for index in sorted(items) for part in _streamed_item(*items[index])]
    if not items:
        parts += [_recorded_item(item, f"output[{at}]") for at, item in enumerate(_list(response.get("output")))]
    reply = _response_reply(response, [*parts, *errors])
    reply._fragments = bool(items)
    return reply


# ---- What both encoders share ----------------------------------------------------------------------------------------

_NO_SIGNS = bytes.maketrans(b"+/=\n", b"Qx7e")


@dataclass(slots=True)
class _Ids:
    """Random letters and digits, the same again from the same bits."""

    bits: Callable[[int], int]

    def hex(self, count: int) -> str:
        return f"{self.bits(4 * count):0{count}x}"

    def alnum(self, count: int) -> str:
        size = count * 3 // 4 + 1
        return b2a_base64(self.bits(8 * size).to_bytes(size, "big")).translate(_NO_SIGNS)[:count].decode()

    def uuid4(self) -> str:
        digits = self.hex(32)
        return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


_ALNUM = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_POOL = "".join(random.Random(16).choices(_ALNUM, k=1024 + 16))


def _obfuscation(number: int, length: int) -> str:
    """The padding that hides the size of a delta: letters and digits, other ones for each event of a stream."""
    begin = number * 37 & 1023
    return _POOL[begin : begin + length]


class _Model(NamedTuple):
    """What the API's answers show of a model's family (R)."""

    logprobs: bool = False  # chat: the key is there, null, when nobody asked
    fingerprint: str | None = None  # chat: "fp_" for fp_..., "" or null
    service_tier: bool = True
    forced_stop: bool = False  # chat: a forced call finishes with "stop"
    cache_writes: bool = False  # chat: usage tells cache_write_tokens
    audio: bool = False  # chat: usage tells text and image tokens
    effort: str | None = "medium"  # Responses: of a reasoning model; None for the others
    context: str | None = "current_turn"
    top_p: float = 1.0
    retention: str | None = "in_memory"
    phase: bool = False
    programs: bool = False  # Responses tells access_programs


# The dated model that an alias stands for; a name with a dash at its end is the alias's with that added (R).
_ALIASES = """
        gpt-3.5-turbo -0125; gpt-4 -0613; gpt-4-turbo-preview gpt-4-0125-preview; gpt-4.5-preview -2025-02-27;
        gpt-4-vision-preview gpt-4-1106-vision-preview; gpt-4.1 -2025-04-14; gpt-4.1-mini -2025-04-14;
        gpt-4.1-nano -2025-04-14; gpt-4o -2024-08-06; gpt-4o-audio-preview -2025-06-03; gpt-4o-mini -2024-07-18;
        gpt-4o-mini-audio-preview -2024-12-17; gpt-4o-mini-search-preview -2025-03-11;
        gpt-4o-search-preview -2025-03-11; gpt-5 -2025-08-07; gpt-5-mini -2025-08-07; gpt-5-nano -2025-08-07;
        gpt-5-pro -2025-10-06; gpt-5.1 -2025-11-13; gpt-5.2 -2025-12-11; gpt-5.4 -2026-03-05; gpt-5.4-mini -2026-03-17;
        gpt-5.4-nano -2026-03-17; gpt-5.5 -2026-04-23; gpt-5.6 -sol; gpt-audio -2025-08-28; gpt-audio-mini -2025-12-15;
        computer-use-preview -2025-03-11; o1-mini -2024-09-12; o3 -2025-04-16; o3-mini -2025-01-31; o4-mini -2025-04-16
"""
_PAIRS = (pair.split() for pair in _ALIASES.split(";"))
_SNAPSHOTS = {alias: alias + name if name.startswith("-") else name for alias, name in _PAIRS}

_CLASSIC = _Model(logprobs=True, forced_stop=True, effort=None, context=None)
_OMNI = _CLASSIC._replace(fingerprint="fp_")
_LATE = _Model(top_p=0.98, retention="24h", phase=True)
_LATEST = _LATE._replace(context="all_turns", cache_writes=True)
# By the beginning of the name, first match; a model of an unknown name is like gpt-4o, but for forced calls.
_FAMILIES = {
    r"gpt-(4o-|4o-mini-)?audio": _Model(fingerprint="fp_", audio=True, effort=None, context=None),
    r"gpt-4o-(mini-)?search": _Model(fingerprint="", service_tier=False, effort=None, context=None),
    r"gpt-4(o|\.1)": _OMNI,
    r"gpt-(3\.5|4)": _CLASSIC,
    r"gpt-6": _LATEST._replace(programs=True),
    r"gpt-5\.6": _LATEST,
    r"gpt-5\.5|gpt-5\.3-codex": _LATE,
    r"gpt-5\.4": _LATE._replace(effort="none"),
    r"gpt-5\.2": _LATE._replace(effort="none", phase=False),
    r"gpt-5\.1-codex-max": _Model(top_p=0.985, effort="none"),
    r"gpt-5\.1": _Model(effort="none"),
    r"computer-use": _Model(retention=None),
    r"o3-mini": _Model(fingerprint="fp_"),
    r"gpt-5|o[134]": _Model(),
    r"": _OMNI._replace(forced_stop=False),
}


@lru_cache(256)
def _family(begin: str) -> _Model:
    """A model's family; of a name its first 24 characters, for what is cached must not be of any size."""
    return next(model for pattern, model in _FAMILIES.items() if re.match(pattern, begin))


_TIERS = {"flex": "flex", "fast": "priority", "priority": "priority"}

_ALTERNATIVES = re.findall(r" \w+", " the a and of to in that it is for on with as at by an be this from or")


def _logprobs(token: str, top: int) -> _JSON:
    """A token's entry in logprobs, made up: plausible numbers, the same for the same token."""
    logprob = -(zlib.crc32(token.encode("utf-8", "replace")) % 2500 + 1) / 1e4
    others = enumerate(other for other in _ALTERNATIVES if other != token)
    ranked = [(token, logprob), *((other, -2.0 - place / 2) for place, other in others)]
    tops = [{"token": token, "logprob": logprob} for token, logprob in ranked[: max(0, top)]]
    return _entry({"token": token, "logprob": logprob, "top_logprobs": tops})


# What is encoded in the place of what differs; random, so that no text of a user can have it.
_SLOTS = [f"slot {random.SystemRandom().getrandbits(64):x}" for _ in range(6)]


class _Form:
    """A delta event with slots in the places where those of its item differ: the pieces between these are the same."""

    pieces: tuple[str, str, str, str] | None = None  # before the text, the padding, and the number, and after it

    def __init__(self, event: _JSON | str, padded: bool, numbered: bool) -> None:
        self.event = event
        self.mask = 15 if padded else 0  # of the padding's length
        self.numbered = numbered

    def cut(self, render: Callable[[_Event], str]) -> tuple[str, str, str, str]:
        """Renders the event, once, and cuts it at its slots."""
        text, padding, number, *_ = _SLOTS
        before, _, after = render(self.event).partition(f'"{text}"')
        middle, _, last = after.partition(f'"{number}"')
        middle, _, between = middle.partition(padding)
        self.pieces = before, middle, between, last
        return self.pieces


class _Deltas(NamedTuple):
    """Delta events in a row that differ in their text, padding and number alone, so that they encode fast."""

    form: _Form
    texts: Sequence[str]
    first: int  # number of the first event

    def frames(self, render: Callable[[_Event], str]) -> list[str]:
        """What `render` gives for each of the events, at a fifth of the time that it would take."""
        form, number, frames = self.form, self.first, list[str]()
        before, middle, between, last = form.pieces or form.cut(render)
        mask, numbered = form.mask, form.numbered
        for text in self.texts:
            at = number * 37 & 1023  # the padding is that of _obfuscation(number, -len(text) & mask)
            told = number if numbered else ""
            frames.append(f"{before}{_quote(text)}{middle}{_POOL[at : at + (-len(text) & mask)]}{between}{told}{last}")
            number += 1
        return frames


def _deltas(form: _Form, texts: Sequence[str], first: int) -> Iterator[_Deltas]:
    """Deltas of any number of texts: some at a time, so that it can be looked whether they fill a batch."""
    for at in range(0, len(texts), _RUN):
        yield _Deltas(form, texts[at : at + _RUN], first + at)


_Event: TypeAlias = "_JSON | str | _Deltas"  # an object, or its JSON; [DONE]
_Encoder: TypeAlias = "_ChatEncoder | _ResponsesEncoder"


class _Fold:
    """What an encoder has of all that was said: parts, folded into items. It does no I/O."""

    ended = False  # all is said
    status = "in_progress"
    id: str
    usage: Usage | None = None
    number: int = 0  # Responses: of the next event; Chat Completions: of the last that was padded
    n = 1  # choices
    parallel = False  # several calls are known to come
    legacy = False  # calls answer `functions`
    logprobs = False  # they are asked for
    error_event = True  # Responses: an error is told before response.failed
    _top: ClassVar = ("top_logprobs", 20)  # what asks for logprobs of other tokens, and how many there are at most

    def __init__(self, request: Request, reply: Reply, ids: _Ids, created: int) -> None:
        self.request = request
        self.asked = request._json
        model = self.asked.get("model")
        if type(model) is not str or not model:
            model = "gpt-4o" if self.asked.get("prompt") else ""  # the prompt's own
        self.ids = ids
        self.extra = reply.extra
        self.created = reply.created if reply.created is not None else created
        self.model = _family((reply.model or model)[:24])
        self.model_name = reply.model or _SNAPSHOTS.get(model, model)
        self.streams = self.asked.get("stream") is True  # whether events are told
        self.items: list[_Utterance] = []
        self.open: dict[int, _Utterance] = {}  # the item that each choice is saying
        self.calls: dict[int, int] = {}  # how many calls each choice has made
        self.finish: dict[int, str] = {}
        self.sources: list[str] = []  # found by web searches, before the text that may cite them

    def fold(self, part: _Spoken, texts: Sequence[str]) -> tuple[_Utterance, _Utterance | None]:
        """Folds in a part that adds these texts. Returns its item, and the one that its choice was saying before."""
        before = self.open.get(part.choice)
        if before is not None and part._continues(before.part):
            item = before
        else:
            if isinstance(part, _Call) and not part.name:
                raise ValueError(f"{part!r} has no name, so it goes on with a call, but none is open")
            item = self.open[part.choice] = _Utterance(part, len(self.items))
            self.name_item(item)
            self.items.append(item)
            if isinstance(part, WebSearch):
                self.sources += part.sources
            elif self.sources and isinstance(part, Text):
                item.sources, self.sources = self.sources, []
            if before is not None:
                self._finish(before, "completed")
        if texts:
            item.pieces += texts
            if isinstance(part, _MessagePart):
                if self.logprobs:
                    item.entries += [entry for entries in self.entries(part, texts) for entry in entries]
                if part.annotations or item.sources:
                    self._annotate(item, part)
        return item, before

    def name_item(self, item: _Utterance) -> None:
        """Gives an item its ids."""
        part = item.part
        if isinstance(part, _Call):
            item.call_id = part.id or "call_" + self.ids.alnum(24)
            item.legacy = self.legacy
            item.index = self.calls.get(part.choice, 0)
            self.calls[part.choice] = item.index + 1

    def entries(self, part: _MessagePart, texts: Sequence[str]) -> list[list[_JSON]]:
        """The logprobs entries of each text: the part's own, or made up."""
        if part.logprobs is None:
            name, most = self._top
            top = self.asked.get(name)
            count = min(top, most) if type(top) is int else 0
            return [[_logprobs(text, count)] if text else [] for text in texts]
        given = [*map(_dict, part.logprobs)]
        return [[entry] for entry in given] if len(given) == len(texts) else [given, *([] for _ in texts)][: len(texts)]

    def _annotate(self, item: _Utterance, part: _MessagePart) -> None:
        """Adds a part's annotations to its item, and the sources that its text has come to name."""
        item.annotations += map(_dict, part.annotations)
        item.join()
        cited = [_citation(item.text, url) for url in item.sources]
        item.annotations += sorted(filter(None, cited), key=lambda citation: citation["end_index"])
        item.sources = [url for url, citation in zip(item.sources, cited, strict=True) if citation is None]

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
                events += self.say(part, part._texts())
            elif isinstance(part, Finish):
                self.finish[part.choice] = part.reason
        self.usage = chunk.usage or self.usage
        return events

    def abandon(self) -> None:
        """Nothing more will be said: the client has left, or the handler has failed."""
        self.status = "cancelled"  # as the API calls it when a connection is closed

    def body(self) -> _JSON:
        """The JSON body: the fold of all that was said."""
        raise NotImplementedError

    def json(self) -> str:
        """The JSON body as text."""
        return _dumps(self.body())

    def close_items(self) -> list[_Utterance]:
        """All is said: ends the items that are still being said, and returns them."""
        self.ended = True
        self.status = "completed" if _INCOMPLETE.keys().isdisjoint(self.finish.values()) else "incomplete"
        going = [item for item in self.items if item.status == "in_progress"]
        for item in going:
            self._finish(item, self.status)
        return going

    def _finish(self, item: _Utterance, status: str) -> None:
        item.status = status
        if len(item.pieces) > 1:
            item.join()
        for url in item.sources:  # that the text does not name: they stand for all of it
            whole = {"end_index": len(item.text), "start_index": 0, "title": _title(url), "url": url}
            item.annotations.append({"type": "url_citation", **whole})
        item.sources = []

    def count_tokens(self) -> tuple[int, int, int]:
        """About how many tokens the prompt was, the completion is, and of that the reasoning."""
        thought = said = 0
        for item in self.items:
            said += len(_tokens(item.text)) + 4 * isinstance(item.part, _Call)
            thought += 64 * (type(item.part) is Reasoning)
        return self.prompt_tokens(), max(1, said + thought), thought

    def tally(self) -> Usage:
        """The usage that was given, or an estimate."""
        if self.usage is not None:
            return self.usage
        prompt, completion, thought = self.count_tokens()
        return Usage(prompt, completion, reasoning_tokens=thought)

    def prompt_tokens(self) -> int:
        """About how many tokens the model was told."""
        messages: list[Any] = self.asked.get("messages", [])
        return _estimate(messages if type(messages) is list else ())


# ---- Chat Completions ------------------------------------------------------------------------------------------------

_UNUSED = {"audio_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}


@lru_cache(64)
def _fingerprint(begin: str) -> str:
    return hashlib.sha256(begin.encode("utf-8", "replace")).hexdigest()[:10]


class _ChatEncoder(_Fold):
    """Chat Completions: events are chunks, and the body has a message for each choice."""

    given = False  # all that was said are Chunks: nothing is added to them
    start = ""  # of all chunks, as JSON

    def __init__(self, request: Request, reply: Reply, ids: _Ids, created: int) -> None:
        super().__init__(request, reply, ids, created)
        asked, model, extra = self.asked, self.model, self.extra
        self.id = reply.id or ("chatcmpl-" + (ids.alnum(29) if model.service_tier else ids.uuid4()))
        kind, created = "chat.completion.chunk", self.created
        self.head: _JSON = {"id": self.id, "object": kind, "created": created, "model": self.model_name}
        fingerprint, tier = model.fingerprint, _TIERS.get(str(asked.get("service_tier")), "default")
        if fingerprint:
            fingerprint += _fingerprint(self.model_name[:64])
        self.tail: _JSON = {"service_tier": tier, "system_fingerprint": fingerprint}
        if extra:
            self.tail |= {key: extra[key] for key in self.tail if key in extra}
        if not (model.service_tier or "service_tier" in extra):
            del self.tail["service_tier"]
        self.legacy = bool(asked.get("functions")) and not asked.get("tools")
        n = asked.get("n")
        self.n = min(n, _MAX_CHOICES) if type(n) is int else 1
        self.logprobs = asked.get("logprobs") is True
        options = _dict(asked.get("stream_options")) if self.streams else {}
        self.with_usage = bool(options.get("include_usage"))
        self.obfuscated = options.get("include_obfuscation") is not False
        self.started: set[int] = set()  # the choices whose role chunk is sent
        self.finished: set[int] = set()  # the choices that a Chunk has finished

    # Events

    def _chunk(self, choices: list[_JSON], usage: _JSON | None = None) -> str:
        """A chunk as JSON: what is the same in all of them is encoded once."""
        if not self.start:
            self.start = _dumps({**self.head, **self.tail})[:-1]
        first = ',"usage":null' if self.with_usage and self.parallel else ""
        last = f',"usage":{_dumps(usage)}' if self.with_usage and not self.parallel else ""
        return f'{self.start}{first},"choices":{_dumps(choices)}{last}}}'

    def _choice(self, choice: int, delta: _JSON, logprobs: _JSON | None = None, finish: str | None = None) -> str:
        entry: _JSON = {"index": choice, "delta": delta}
        if self.model.logprobs or self.logprobs:
            entry["logprobs"] = logprobs
        entry["finish_reason"] = finish
        return self._chunk([entry])

    def _pad(self, chunk: str, padding: str) -> str:
        return f'{chunk[:-1]},"obfuscation":"{padding}"}}' if self.obfuscated else chunk

    def _padded(self, chunks: list[str]) -> list[_Event]:
        padded: list[_Event] = []
        for chunk in chunks:
            self.number += self.obfuscated
            padded.append(self._pad(chunk, _obfuscation(self.number, (self.number * 11 + 9) & 15)))
        return padded

    def say(self, part: _Spoken, texts: Sequence[str]) -> list[_Event]:
        item, before = self.fold(part, texts)
        if not (self.streams and part._in_chat):
            return []
        opened, choice = item.part, part.choice
        # A text that goes on with what a Chunk said still needs its role; a call has been named.
        opens = item is not before or (choice not in self.started and isinstance(part, _MessagePart))
        chunks = self._opening(item) if opens else []
        if self.logprobs and isinstance(part, _MessagePart):
            for text, entries in zip(texts, self.entries(part, texts), strict=True):
                chunks.append(self._choice(choice, opened._chat_delta(item, text), _chat_logprobs((part, entries))))
            texts = ()
        events = self._padded(chunks) if chunks else []
        if texts:
            if item.form is None:
                chunk = self._pad(self._choice(choice, opened._chat_delta(item, _SLOTS[0])), _SLOTS[1])
                item.form = _Form(chunk, self.obfuscated, False)
            events += _deltas(item.form, texts, self.number + 1)
            self.number += len(texts)
        return events

    def _opening(self, item: _Utterance) -> list[str]:
        part, choice = item.part, item.part.choice
        begun, head = choice in self.started, part._chat_head(item)
        self.started.add(choice)
        deltas: Iterable[_JSON]
        if isinstance(part, Item):  # audio
            deltas = _audio_deltas(_audio(part, self))
        elif begun:
            deltas = [] if head is None else [head]
        elif head is not None and self.parallel:
            deltas = [{"role": "assistant", "content": None}, head]
        else:
            deltas = [part._chat_role(item)]
        logprobs = _chat_logprobs((part, [])) if self.logprobs else None
        return [self._choice(choice, delta, logprobs) for delta in deltas]

    def chunk(self, chunk: Chunk) -> list[_Event]:
        self.given = self.given or not self.items
        choices: list[_JSON] = []
        for choice in chunk.choices:
            delta: _JSON = {}
            if choice.delta:
                delta["content"] = choice.delta
                self.fold(Text(choice.delta, choice=choice.index), [choice.delta])
            for each in choice.tool_calls:
                call = replace(each, choice=choice.index)
                item, _ = self.fold(call, call._texts())
                text = each.arguments
                told = call._chat_call(item, text) if each.name else {"function": {"arguments": text}}
                delta.setdefault("tool_calls", []).append({"index": item.index, **told})
            if choice.finish_reason:
                self.finish[choice.index] = choice.finish_reason
                self.finished.add(choice.index)
            choices.append({"index": choice.index, "delta": delta, "finish_reason": choice.finish_reason})
        self.usage = chunk.usage or self.usage
        # What a Chunk says of the envelope holds from now on.
        self.id = chunk.id or self.id
        self.created = chunk.created or self.created
        self.model_name = chunk.model or self.model_name
        head = {**self.head, "id": self.id, "created": self.created, "model": self.model_name}
        if head != self.head:
            self.head, self.start = head, ""
            for item in self.open.values():
                item.form = None  # it has the envelope as it was
        return [{**self.head, "choices": choices, **({"usage": self._usage()} if chunk.usage else {})}]

    def end(self) -> list[_Event]:
        self.close_items()
        if self.given and not self.started:
            return ["[DONE]"]
        chunks: list[str] = []
        spoken = self._spoken()
        for choice in spoken:
            if choice not in self.started:
                chunks += self._opening(_Utterance(Text("", choice=choice), 0))
        if any(item.annotations for item in self.items):
            for body in starmap(self._whole_choice, spoken.items()):
                if cited := body["message"]["annotations"]:
                    chunks.append(self._choice(body["index"], {"annotations": cited}))
        self.parallel = False  # from the finish chunk on, usage is last again (R)
        going = [choice for choice in spoken if choice not in self.finished]
        chunks += [self._choice(choice, {}, finish=self._finish_reason(choice)) for choice in going]
        if self.with_usage:
            chunks.append(self._chunk([], usage=self._usage()))
        events = self._padded(chunks)
        if moderation := self._moderation():
            events.append(f"{self._pad(self._chunk([]), '')[:-1]},{_dumps(moderation)[1:]}")
        for item in self.items:
            if isinstance(item.part, Item) and item.part._in_chat:
                expires: _JSON = {"audio": {"expires_at": _audio(item.part, self)["expires_at"]}}
                events += self._padded([self._chunk([{"index": item.part.choice, "delta": expires}])])
        return [*events, "[DONE]"]

    def fail(self, error: APIError) -> list[_Event]:
        return [{"error": error._error()}]

    # The body

    def _finish_reason(self, choice: int) -> str:
        if choice in self.finish:
            return self.finish[choice]
        if choice not in self.calls:
            return "stop"
        if self.legacy:
            return "function_call"
        forced = _dict(self.asked.get("tool_choice")).get("type") in ("function", "custom")
        return "stop" if forced and self.model.forced_stop else "tool_calls"

    def _spoken(self) -> dict[int, list[_Utterance]]:
        """The items of each choice, in order; one choice at least."""
        spoken: dict[int, list[_Utterance]] = {choice: [] for choice in self.finish}
        for item in self.items:
            if item.part._in_chat:
                spoken.setdefault(item.part.choice, []).append(item)
        return dict(sorted(spoken.items())) or {0: []}

    def _whole_choice(self, choice: int, items: list[_Utterance]) -> _JSON:
        calls: _JSON = {"function_call" if self.legacy else "tool_calls": []} if choice in self.calls else {}
        content = None if items else ""
        message: _JSON = {"role": "assistant", "content": content, **calls, "refusal": None, "annotations": []}
        for item in items:
            if isinstance(item.part, Item):
                message["audio"] = _audio(item.part, self)
                message["annotations"] = message.pop("annotations")  # after it
            else:
                item.part._chat_message(item, message)
        entry: _JSON = {"index": choice, "message": message}
        if self.logprobs:
            said = [(item.part, item.entries) for item in items]
            entry["logprobs"] = _chat_logprobs(*said or [(Text(""), [])])
        elif self.model.logprobs:
            entry["logprobs"] = None
        entry["finish_reason"] = self._finish_reason(choice)
        return entry

    def _usage(self) -> _JSON:
        usage = self.tally()
        writes = {"cache_write_tokens": 0} if self.model.cache_writes else {}
        prompt: _JSON = {"cached_tokens": usage.cached_tokens, **writes, "audio_tokens": 0}
        completion: _JSON = {"reasoning_tokens": usage.reasoning_tokens, **_UNUSED}
        if self.model.audio:
            prompt.update(text_tokens=usage.prompt_tokens, image_tokens=0)
            completion["text_tokens"] = usage.completion_tokens
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {**prompt, **usage.details.get("prompt", {})},
            "completion_tokens_details": {**completion, **usage.details.get("completion", {})},
        }

    def _moderation(self) -> _JSON:
        """The key of moderation, where the request asks for it."""
        given, asked = self.extra.get("moderation"), self.asked.get("moderation")
        if given is None and not (asked and isinstance(asked, dict)):
            return {}
        result = _moderation_result(_dict(asked))
        results = {"type": "moderation_results", "model": result["model"], "results": [result]}
        return {"moderation": given or {"input": results, "output": results}}

    def body(self) -> _JSON:
        self.close_items()
        return {
            **self.head,
            "object": "chat.completion",
            "choices": [*starmap(self._whole_choice, self._spoken().items())],
            **self._moderation(),
            "usage": self._usage(),
            **self.tail,
        }

    def json(self) -> str:
        self.close_items()
        item = self.items[0] if len(self.items) == 1 else None
        more = (
            self.finish or self.usage or self.extra or self.logprobs or self.model.audio or self.asked.get("moderation")
        )
        if item is None or type(item.part) is not Text or item.part.choice or item.annotations or more:
            return _dumps(self.body())
        told = (self.id, self.model_name, self.created, item.part.choice)
        if (*map(type, told),) != (str, str, int, int):  # a Chunk may say anything, and False is no 0
            return _dumps(self.body())
        prompt, completion, _ = self.count_tokens()
        text = "".join(item.pieces)
        values = (_quote(self.id), self.created, _quote(text), prompt, completion, prompt + completion)
        return _text_form(self) % values


def _text_form(encoder: _ChatEncoder) -> str:
    """The JSON of one plain text, with %s for id, time, text and tokens: all else comes from the model and the tier."""
    kind = (encoder.model_name, id(encoder.model), *encoder.tail.values())  # the model is one of _FAMILIES
    form = _TEXT_FORMS.get(kind)
    if form is None:
        name, created, text, *tokens = _SLOTS
        body: _JSON = {**encoder.body(), "id": name, "created": created}
        body["choices"][0]["message"]["content"] = text
        body["usage"] |= zip(("prompt_tokens", "completion_tokens", "total_tokens"), tokens, strict=True)
        form = _dumps(body).replace("%", "%%")
        for slot in _SLOTS:
            form = form.replace(f'"{slot}"', "%s")
        if len(form) < 4096 and len(_TEXT_FORMS) < 64:  # the names of models are the client's
            _TEXT_FORMS[kind] = form
    return form


_TEXT_FORMS: dict[tuple[Any, ...], str] = {}


def _audio(part: Item, encoder: _ChatEncoder) -> _JSON:
    """A message's audio, with what was not given."""
    id = "audio_" + hashlib.sha256(encoder.id.encode("utf-8", "replace")).hexdigest()[:32]
    told = {"id": id, "data": "", "expires_at": encoder.created + 3600, "transcript": "", **part.fields}
    return {key: _joined(told[key]) if key in ("data", "transcript") else told[key] for key in told}


def _audio_deltas(audio: _JSON) -> Iterator[_JSON]:
    """The deltas of audio: its transcript, and its sound in pieces of 25,600 characters (R)."""
    first, *texts = _tokens(audio["transcript"]) or ("",)
    begins = range(0, len(audio["data"]) or 1, 25_600)
    sound, *sounds = (audio["data"][begin : begin + 25_600] for begin in begins)
    yield {"role": "assistant", "refusal": None}
    yield {"content": None, "audio": {"id": audio["id"], "transcript": first}}
    yield from ({"audio": {"transcript": text}} for text in texts)
    yield {"role": "assistant", "content": None, "refusal": None, "audio": {"id": audio["id"], "data": sound}}
    yield from ({"audio": {"data": sound}} for sound in sounds)


def _chat_logprobs(*said: tuple[_Spoken, list[_JSON]]) -> _JSON | None:
    """The logprobs of what was said, by its kind, their keys in the order of Chat Completions; None for no message."""

    def told(entry: _JSON) -> _JSON:
        return {key: entry[key] for key in ("token", "logprob", "bytes")}

    kinds: dict[str, list[_JSON]] = {}
    for part, entries in said:
        if isinstance(part, _MessagePart):
            ordered = kinds.setdefault("refusal" if isinstance(part, Refusal) else "content", [])
            ordered += [{**told(each), "top_logprobs": [*map(told, each["top_logprobs"])]} for each in entries]
    return {"content": None, "refusal": None, **kinds} if kinds else None


_MODERATED = (
    "harassment", "harassment/threatening", "sexual", "hate", "hate/threatening", "illicit", "illicit/violent",
    "self-harm/intent", "self-harm/instructions", "self-harm", "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip
_UNFLAGGED: _JSON = {  # what moderation finds, unless the handler says otherwise
    "flagged": False,
    "categories": dict.fromkeys(_MODERATED, False),
    "category_scores": dict.fromkeys(_MODERATED, 1e-06),
    "category_applied_input_types": {name: ["text"] for name in _MODERATED},
}


def _moderation_result(asked: _JSON) -> _JSON:
    model = _string(asked.get("model")) or "omni-moderation-latest"
    return {"type": "moderation_result", "model": model, **_UNFLAGGED}


# ---- Responses -------------------------------------------------------------------------------------------------------

_NO_IMAGES = {
    "input_tokens": 0, "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0, "output_tokens_details": {"image_tokens": 0, "text_tokens": 0}, "total_tokens": 0,
}  # fmt: skip
_NOWHERE = {"type": "approximate", "city": None, "country": None, "region": None, "timezone": None}
_RANKED = {"ranker": "auto", "score_threshold": 0.0}
_SEARCHED = {"search_context_size": "medium", "user_location": {**_NOWHERE, "country": "US"}}
# What the echo of a tool tells where the request is silent (R); `...` stands for what it never tells.
_TOOL_DEFAULTS: dict[str, _JSON] = {
    "custom": {"description": None, "format": {"type": "text"}},
    "file_search": {"filters": None, "max_num_results": 20, "ranking_options": _RANKED},
    "function": {"description": None, "output_schema": None, "parameters": None},
    "image_generation": dict.fromkeys(("background", "moderation", "quality", "size"), "auto")
    | dict.fromkeys(("action", "input_fidelity", "input_image_mask", "partial_images"), ...)
    | {"model": "gpt-image-1", "n": 1, "output_compression": 100, "output_format": "png"},
    "mcp": {"allowed_tools": None, "headers": None, "require_approval": "always", "server_description": None},
    "tool_search": {"description": None, "parameters": None},
    "web_search": {"return_token_budget": "default", "search_content_types": ["text"], **_SEARCHED}
    | {"external_web_access": ...},
    "web_search_preview": _SEARCHED,
}
_TOOL_ORDER = {"programmatic_tool_calling": 0, "function": 1, "custom": 3, "tool_search": 4, "namespace": 5}  # else 2
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


def _strict_schema(schema: Any) -> Any:
    """A function's parameters as the API echoes them when it turns `strict` on itself."""
    if isinstance(schema, list):
        return [*map(_strict_schema, _list(schema))]
    strict = {key: _strict_schema(value) for key, value in _dict(schema).items()}
    if strict.get("type") == "object":
        strict.setdefault("additionalProperties", False)
        if isinstance(strict.get("properties"), dict):
            strict["required"] = list(strict["properties"])
    return strict if isinstance(schema, dict) else schema


def _tool_echo(value: object) -> _JSON:
    tool = _dict(value)
    kind = _string(tool.get("type"))
    defaults = _TOOL_DEFAULTS.get(kind, {})
    asked = {key: each for key, each in tool.items() if each is not None or key not in defaults}
    told = {key: each for key, each in {**defaults, **asked}.items() if defaults.get(key) is not ...}
    if isinstance(told.get("user_location"), dict):
        told["user_location"] = {**_NOWHERE, **_dict(told["user_location"])}
    if kind == "function":
        told["description"] = told["description"] or None
        if "strict" not in tool:
            told["parameters"] = _strict_schema(told["parameters"])
        told["strict"] = bool(tool.get("strict", True))
    if kind == "mcp":
        _echo_mcp(told)
    if kind == "custom":
        told["format"] = _by_key(_dict(told["format"]))
    if kind == "namespace":
        told["tools"] = [_tool_echo(each) for each in _list(told.get("tools"))]
    return _by_key(told)


def _echo_mcp(told: _JSON) -> None:
    if "authorization" in told:
        told["authorization"] = "<redacted>"
    if isinstance(told["headers"], dict):
        told["headers"] = dict.fromkeys(_dict(told["headers"]), "<redacted>")
    if isinstance(told["allowed_tools"], dict):
        told["allowed_tools"] = {"read_only": None, **told["allowed_tools"]}
    if isinstance(asked := told["require_approval"], dict):
        told["require_approval"] = {
            when: {"read_only": None, **asked[when]} if when in asked else None for when in ("always", "never")
        }


def _own_namespace(function: _JSON) -> _JSON:
    tools = [{key: value for key, value in function.items() if key != "defer_loading"}]
    return {"type": "namespace", "description": function["description"], "name": function.get("name"), "tools": tools}


def _tools_echo(body: _JSON, late: bool) -> list[_JSON]:
    """The tools as the response tells them: in the API's order, and as the input has found them (R).

    A deferred function that a tool search in the input has found is a namespace of its own, and so is what the input's
    additional_tools bring; `late` models have these as they are.
    """
    items = [_dict(item) for item in _list(body.get("input"))]

    def brought(kind: str) -> list[Any]:
        return [tool for item in items if item.get("type") == kind for tool in _list(item.get("tools"))]

    found = {_dict(tool).get("name") for tool in brought("tool_search_output")}

    def is_found(tool: _JSON) -> bool:
        return bool(tool.get("defer_loading")) and tool.get("name") in found

    told = sorted(map(_tool_echo, _list(body.get("tools"))), key=is_found)
    for tool in told:
        if tool["type"] == "namespace":  # what was found in it stands beside it
            tool["tools"] += [own for each in filter(is_found, tool["tools"]) for own in _own_namespace(each)["tools"]]
    told = [_own_namespace(tool) if is_found(tool) else tool for tool in told]
    added = [_tool_echo(tool) for tool in brought("additional_tools")]
    told += added if late else [_own_namespace(tool) for tool in added if tool["type"] == "function"]
    return sorted(told, key=lambda tool: _TOOL_ORDER.get(tool["type"], 2))


def _text_echo(value: object) -> _JSON:
    asked = _dict(value)
    form = _dict(asked.get("format")) or {"type": "text"}
    if form.get("type") == "json_schema":
        named = {key: form.get(key) for key in ("type", "description", "name")}
        schema = {key: each for key, each in _dict(form.get("schema")).items() if key != "$schema"}
        form = {**named, "schema": schema, "strict": True if form.get("strict") is None else form["strict"]}
    return {"format": form, "verbosity": asked.get("verbosity") or "medium"}


def _prompt_echo(value: object) -> _JSON:
    prompt = {key: _dict(value).get(key) for key in ("id", "variables", "version")}
    if isinstance(prompt["variables"], dict):
        prompt["variables"] = {
            name: {"type": "input_text", "text": each} if isinstance(each, str) else each
            for name, each in _dict(prompt["variables"]).items()
        }
    return prompt


def _decimal_echo(value: Any) -> Any:
    """The API's are floats: 1.0 (R)."""
    return float(value) if type(value) is int and value.bit_length() < 1024 else value


# What a response says where the request is silent, in the API's order; `...` stands for nothing.
_UNASKED: _JSON = {
    "id": "", "object": "response", "created_at": 0, "status": "in_progress",
    "access_programs": {"cyber": "standard"}, "background": False, "billing": {"payer": "developer"},
    "completed_at": None, "conversation": ..., "error": None, "frequency_penalty": 0.0, "incomplete_details": None,
    "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "model": "", "moderation": None,
    "output": [], "parallel_tool_calls": True, "presence_penalty": 0.0, "previous_response_id": None, "prompt": ...,
    "prompt_cache_key": None, "prompt_cache_options": ..., "prompt_cache_retention": None, "reasoning": None,
    "safety_identifier": None, "service_tier": "auto", "store": True, "temperature": 1.0, "text": _text_echo(None),
    "tool_choice": "auto", "tool_usage": {"image_gen": _NO_IMAGES, "web_search": {"num_requests": 0}}, "tools": [],
    "top_logprobs": 0, "top_p": 1.0, "truncation": "disabled", "usage": None, "user": None, "metadata": {},
}  # fmt: skip
# The form in which it echoes what the request says, where that is another.
_ECHOES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "temperature", "top_p"), _decimal_echo),
    "conversation": lambda asked: {"id": asked} if isinstance(asked, str) else asked,
    "prompt": _prompt_echo,
    "prompt_cache_options": lambda asked: asked or ...,
    "service_tier": lambda asked: "priority" if asked == "fast" else asked,
    "text": _text_echo,
    "tool_choice": lambda asked: _by_key(_dict(asked)) if _dict(asked) else asked,
}
# What a response tells only when it is over; `extra` changes the others from the beginning.
_FINAL = {"billing", "completed_at", "error", "incomplete_details", "moderation", "service_tier", "tool_usage", "usage"}
_OWN = {"id", "object", "created_at", "status", "background", "model", "output", "reasoning", "tools", *_FINAL}
_ASKED = _UNASKED.keys() - _OWN | {"service_tier"}
_WITH_METADATA = ("message", "reasoning", "function_call", "web_search_call")


def _ordered(told: _JSON, first: Sequence[str]) -> _JSON:
    """In the API's order: these keys first, the others by the alphabet, the metadata at the end (R)."""
    keys = (*first, *sorted(told.keys() - {*first, "metadata"}), "metadata")
    return {key: told[key] for key in keys if key in told}


class _ResponsesEncoder(_Fold):
    begun = False  # its first events are told

    def __init__(self, request: Request, reply: Reply, ids: _Ids, created: int) -> None:
        super().__init__(request, reply, ids, created)
        asked = self.asked
        # "0" and 15 digits that a response shares with its items, then the second it was made (R)
        self.shared = f"0{ids.hex(15)}00"
        self.id = reply.id or self._id("resp_")
        if reply.id and re.fullmatch("resp_[0-9a-f]{50}", reply.id):
            self.shared = reply.id[5:23]
        self.background = asked.get("background") is True
        self.streams = self.streams or self.background
        unpadded = _dict(asked.get("stream_options")).get("include_obfuscation") is False
        self.obfuscated = not (unpadded or self.background)
        self.include: list[Any] = _list(asked.get("include"))
        self.logprobs = "message.output_text.logprobs" in self.include or asked.get("logprobs") is True
        self.status = "queued" if self.background else "in_progress"
        reasoning = _dict(asked.get("reasoning"))
        self.added_status = "completed" if reasoning.get("mode") == "pro" else "in_progress"  # in output_item.added (R)
        self.base = self._echo(asked, reasoning)

    def prompt_tokens(self) -> int:
        instructions, items = self.request._told()
        return _estimate([*instructions, *items]) + self.request._before.tokens()

    def _id(self, prefix: str) -> str:
        return f"{prefix}{self.shared}{self.created & 0xFFFFFFFF:08x}{self.ids.hex(24)}"

    def name_item(self, item: _Utterance) -> None:
        item.id = self._id(item.part._prefix)
        if isinstance(item.part, _Call):
            super().name_item(item)
        elif given := getattr(item.part, "id", None):
            item.id = given

    def made(self, item: _Utterance, key: str, value: _Made) -> str:
        """A value of an item that was not given: the same each time, but for secrets."""
        if value is _SECRET:
            return self.secret(item)
        seed = int.from_bytes(hashlib.sha256(f"{item.id} {key}".encode("utf-8", "replace")).digest(), "big")
        ids = _Ids(random.Random(seed).getrandbits)
        return value.prefix + (ids.hex(value.length) if value.hex else ids.alnum(value.length))

    def secret(self, item: _Utterance) -> str:
        """Made-up encrypted content: other letters each time it is sent (R)."""
        seed = f"{item.id} {self.number}".encode("utf-8", "replace")
        digest = b"".join(hashlib.sha512(seed + bytes([part])).digest() for part in range(2))
        return "gAAAAAB" + b2a_base64(digest, newline=False).decode().replace("+", "-").replace("/", "_")

    def _echo(self, body: _JSON, reasoning: _JSON) -> _JSON:
        """The response object with what the request said, and the API's defaults where it said nothing."""
        model = self.model
        told = _UNASKED | {"id": self.id, "created_at": self.created, "background": self.background}
        told |= {"model": self.model_name, "prompt_cache_retention": model.retention, "top_p": model.top_p}
        for key in _ASKED & body.keys():
            if (asked := body[key]) is not None:
                told[key] = _ECHOES[key](asked) if key in _ECHOES else asked
        if not model.programs:
            del told["access_programs"]
        context, summary = reasoning.get("context"), reasoning.get("summary")
        told["reasoning"] = {
            "context": model.context if context in (None, "auto") else context,
            "effort": reasoning.get("effort") or model.effort,
            **({"mode": reasoning.get("mode") or "standard"} if model.effort is not None else {}),
            "summary": "detailed" if summary == "auto" else summary,
        }
        if body.get("tools") or isinstance(body.get("input"), list):
            told["tools"] = _tools_echo(body, late=model.context == "all_turns")
        return {key: value for key, value in told.items() if value is not ...}

    def response(self, status: str) -> _JSON:
        """The response object as it stands, with that status."""
        response = {**self.base, "status": status}
        over = status in ("completed", "incomplete")
        if status in ("queued", "in_progress"):
            del response["billing"]
        if status == "completed":
            response["completed_at"] = self.created
        if status == "incomplete":
            reason = next(filter(_INCOMPLETE.get, self.finish.values()))
            response["incomplete_details"] = {"reason": _INCOMPLETE[reason]}
        if over:
            response["service_tier"] = _TIERS.get(_string(response["service_tier"]), "default")
            if moderation := _dict(self.asked.get("moderation")):
                result = _by_key(_moderation_result(moderation))
                response["moderation"] = {"input": result, "output": result}
        if over or status == "cancelled":
            response["output"] = self.output()
            response["usage"] = self._usage()
            searches = sum(isinstance(item.part, Item) and item.part.searches for item in self.items)
            response["tool_usage"] = {"image_gen": _NO_IMAGES, "web_search": {"num_requests": searches}}
        if self.extra:
            skipped = {"system_fingerprint"} if over else {"system_fingerprint", *_FINAL}  # the first is Chat's
            given = {key: value for key, value in self.extra.items() if key not in skipped}
            response = _ordered({**response, **given}, ("id", "object", "created_at", "status"))
        return response

    def output(self) -> list[_JSON]:
        """The items, as they stand."""
        return [self.item(item, True) for item in self.items]

    def item(self, item: _Utterance, whole: bool) -> _JSON:
        """An item: whole, or as it is added."""
        told = item.part._item(item, self, whole)
        metadata = self.asked.get("client_metadata")
        if isinstance(metadata, dict) and told["type"] in _WITH_METADATA:  # Codex sends it, and gets it so
            turn = {"turn_id": _dict(metadata).get("turn_id") or _Ids(random.Random(self.id).getrandbits).uuid4()}
            told |= {"internal_chat_message_metadata_passthrough": turn, "metadata": turn}
            return _ordered(told, ("id", "type", "status"))
        return told

    def _usage(self) -> _JSON:
        usage = self.tally()
        prompt, completion = (usage.details.get(side, {}) for side in ("prompt", "completion"))
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cache_write_tokens": 0, "cached_tokens": usage.cached_tokens, **prompt},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens, **completion},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    # Events

    def _event(self, kind: str, fields: _JSON, item: _Utterance | None = None) -> _JSON:
        event = {**fields, "sequence_number": self.number}
        if item is not None:
            event["output_index"] = item.position
            padded = self.obfuscated and item.part._padded and kind != "response.reasoning_text.delta"  # none is known
            if padded and isinstance(delta := fields.get("delta"), str):
                event["obfuscation"] = _obfuscation(self.number, -len(delta) & 15)
        self.number += 1
        return {"type": kind, **{key: event[key] for key in sorted(event)}}

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
        item, before = self.fold(part, texts)
        if not self.streams:
            return []
        if item is not before:
            if before is not None:
                events += self._close(before)
            events.append(self._event("response.output_item.added", {"item": self.item(item, False)}, item))
        nexts = [at for at, text in enumerate(texts) if at and isinstance(text, _Next)]
        for begin, end in pairwise((0, *nexts, len(texts))):
            events += self._grow(item, part, texts[begin:end])
        return events

    def _grow(self, item: _Utterance, part: _Spoken, texts: Sequence[str]) -> list[_Event]:
        """The events of texts within a section, which is the next one if the first of them says so."""
        events: list[_Event] = []
        if not texts:
            return events
        if item.opened and isinstance(texts[0], _Next):
            events += [self._event(kind, fields, item) for kind, fields in item.part._closing(item)]
            item.section += 1
            item.opened, item.form = False, None
        if not item.opened:
            item.opened = True
            events += [self._event(kind, fields, item) for kind, fields in item.part._opening(item)]
        said = [text for text in texts if text]  # an empty one has no delta (R)
        if isinstance(part, Text) and (self.logprobs or item.annotations or item.sources):
            kind, fields = part._delta(item)
            for text, entries in zip(said, self.entries(part, said), strict=True):
                told = {"delta": text, **({"logprobs": entries} if self.logprobs else {})}
                events.append(self._event(kind, {**fields, "item_id": item.id, **told}, item))
                item.sent += len(text)
                events += self._annotations(item, item.sent)
        elif said:
            if item.form is None:
                kind, fields = item.part._delta(item)
                text, padding, number, *_ = _SLOTS
                fields.update(type=kind, item_id=item.id, output_index=item.position, delta=text)
                padded = {"obfuscation": padding} if self.obfuscated and item.part._padded else {}
                item.form = _Form(_by_key({**fields, **padded, "sequence_number": number}), bool(padded), True)
            events += _deltas(item.form, said, self.number)
            self.number += len(said)
            item.sent += sum(map(len, said))
        return events

    def _annotations(self, item: _Utterance, sent: float) -> list[_Event]:
        """The annotations whose place has come, in a text of which so much is sent."""
        events: list[_Event] = []
        for annotation in item.annotations[item.cited :]:
            place: float = annotation.get("index") or annotation.get("end_index") or 0
            if annotation["type"] == "container_file_citation":  # these come after the text (R)
                place = math.inf
            if place > sent:
                break
            told = {"annotation": annotation, "annotation_index": item.cited, "content_index": 0, "item_id": item.id}
            events.append(self._event("response.output_text.annotation.added", told, item))
            item.cited += 1
        return events

    def _close(self, item: _Utterance) -> list[_Event]:
        events = self._annotations(item, math.inf)
        events += [self._event(kind, fields, item) for kind, fields in item.part._closing(item)]
        return [*events, self._event("response.output_item.done", {"item": self.item(item, True)}, item)]

    def end(self) -> list[_Event]:
        events = self.begin()
        for item in self.close_items():
            events += self._close(item)
        return [*events, self._lifecycle(self.status)]

    def fail(self, error: APIError) -> list[_Event]:
        events = self.begin()
        self.base["error"] = {"code": error.code or error.type, "message": error.message}
        if self.error_event:
            events.append(self._event("error", {"error": _by_key(error._error())}))
        return [*events, self._lifecycle("failed")]

    def body(self) -> _JSON:
        self.close_items()
        return self.response(self.status)


# ---- Completions (legacy) --------------------------------------------------------------------------------------------

_INSTRUCT = {f"{name}-002": f"{name}:2023-07-21-v2" for name in ("davinci", "babbage")}  # R
_INSTRUCT["gpt-3.5-turbo-instruct"] = "gpt-3.5-turbo-instruct:20230824-v2"


class _CompletionsEncoder(_ChatEncoder):
    """Chat's answer, told as texts. Its choices are n for the first prompt, then n for the next."""

    _top = ("logprobs", 5)

    def __init__(self, request: Request, reply: Reply, ids: _Ids, created: int) -> None:
        super().__init__(request, reply, ids, created)
        self.id = reply.id or "cmpl-" + ids.alnum(29)
        self.model_name = _INSTRUCT.get(self.model_name, self.model_name)
        self.head = {"id": self.id, "object": "text_completion", "created": self.created}
        n = self.asked.get("n")
        self.n = len(_prompts(self.asked.get("prompt"))) * (min(n, 128) if type(n) is int else 1)
        self.logprobs = type(self.asked.get("logprobs")) is int
        self.obfuscated = False
        self.ends: dict[int, int] = {}  # how long each choice's text with logprobs is so far

    def prompt_tokens(self) -> int:
        prompts = _prompts(self.asked.get("prompt"))
        return _estimate({"content": "four" * len(_list(each)) if isinstance(each, list) else each} for each in prompts)

    def say(self, part: _Spoken, texts: Sequence[str]) -> list[_Event]:
        if not isinstance(part, _MessagePart):  # there is no place for others
            return []
        self.started.add(part.choice)
        plain = replace(part, annotations=()) if isinstance(part, Text) else part
        return super().say(plain, [text for text in texts if text])

    chunk, json = _Fold.chunk, _Fold.json  # a Chunk is what it says

    def _told(self, choice: _JSON, said: _JSON) -> _JSON:
        """A choice of Chat's that said this, as a choice of Completions."""
        index, reason, logprobs = choice["index"], choice["finish_reason"], None
        if entries := _list(_dict(choice.get("logprobs")).get("content")):
            tokens: list[str] = [entry["token"] for entry in entries]
            *offsets, self.ends[index] = accumulate(map(len, tokens), initial=self.ends.get(index, 0))
            numbers = [entry["logprob"] for entry in entries]
            tops = [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries]
            logprobs = {"text_offset": offsets, "token_logprobs": numbers, "tokens": tokens, "top_logprobs": tops}
        text = said.get("content") or said.get("refusal") or ""
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}

    def _chunk(self, choices: list[_JSON], usage: _JSON | None = None) -> str:
        told = [self._told(choice, choice["delta"]) for choice in choices]
        if not choices:
            return _dumps({**self.head, "model": self.model_name, "usage": usage, "choices": told})
        last = {"usage": None} if self.with_usage else {}
        return _dumps({**self.head, "choices": told, "model": self.model_name, **last})

    def _usage(self) -> _JSON:
        return {key: count for key, count in super()._usage().items() if not key.endswith("_details")}

    def body(self) -> _JSON:
        self.close_items()
        choices = [self._told(body, body["message"]) for body in starmap(self._whole_choice, self._spoken().items())]
        return {**self.head, "model": self.model_name, "choices": choices, "usage": self._usage()}


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


@lru_cache(64)
def _fixed_fields(status: int, content_type: str, usual: bytes, cors: bool, closes: bool) -> bytes:
    """The beginning of an answer's head: what is the same in all answers of a kind."""
    line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status
    told = _CORS * cors + b"connection: close\r\n" * closes
    return b"%bcontent-type: %b\r\n%b" % (line, content_type.encode(), usual + told)


@lru_cache(2)
def _date_field(second: int) -> bytes:
    """The Date field, made once a second."""
    return f"date: {formatdate(second, usegmt=True)}\r\n".encode()


def _sse(event: _Event) -> str:
    """An event as a server-sent event; Responses' name their type."""
    if isinstance(event, str):
        return f"data: {event}\n\n"
    kind, data = cast(_JSON, event).get("type"), _dumps(event)
    return f"data: {data}\n\n" if kind is None else f"event: {kind}\ndata: {data}\n\n"


def _texts(event: _Event, render: Callable[[_Event], str] = _sse) -> list[str]:
    """The texts of an event, which may stand for several, as server-sent events unless said otherwise."""
    return event.frames(render) if isinstance(event, _Deltas) else [render(event)]


def _sse_bytes(texts: list[str], chunked: bool) -> bytes:
    """The bytes of server-sent events, each in an HTTP chunk of its own."""
    whole = "".join([f"{len(text):x}\r\n{text}\r\n" for text in texts] if chunked else texts)
    if whole.isascii():  # characters are bytes
        return whole.encode()
    data = map(_utf8, texts)
    return b"".join(map(_http_chunk, data) if chunked else data)


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

    wake: Callable[[], object] = bool  # ends the wait that goes on; other threads call it
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
            if self.connection is not None and self.connection.websocket is None:  # whose own thread reads, and tells
                self.server.watch(self.connection.sock, self)

    def notice(self) -> None:
        """Called by the server's loop: the client's socket has something to read, and is not watched any more."""
        self.readable = True
        self.wake()

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
                self.server.watch(connection.sock, self)
        if not connection.gone:
            return math.inf
        now = _Clock.monotonic()
        self.given_up = min(self.given_up, now + _HALF_CLOSED)
        if self.streams or now >= self.given_up:
            raise _Gone
        return self.given_up - now

    def get(self, source: queue.SimpleQueue[_T], timeout: float | None = None) -> _T:
        """What comes next in a queue. Raises _Gone where the client has left, queue.Empty after the timeout."""
        self.enter(lambda: source.put(_WAKE))
        due = math.inf if timeout is None else _Clock.monotonic() + timeout
        value: _T = _WAKE
        while value is _WAKE:
            rest = min(self.patience(), due - _Clock.monotonic(), _LONGEST)
            try:
                value = source.get(timeout=max(0.0, rest))
            except queue.Empty:
                if _Clock.monotonic() >= due:
                    raise
        return value

    def sleep(self, seconds: float) -> None:
        """Waits. Raises _Gone where the client of a stream has left; who has half-closed gets its JSON, just sooner."""
        alarm: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.enter(lambda: alarm.put(None))
        due = _Clock.monotonic() + seconds
        while self.patience() == math.inf and (rest := due - _Clock.monotonic()) > 0:
            with suppress(queue.Empty):
                alarm.get(timeout=min(rest, _LONGEST))

    def steps(self, coming: AsyncIterator[_T]) -> Generator[_T]:
        """What an asynchronous iterator gives, all of it run in one task of this answer's own event loop."""
        import asyncio

        loop = self.loop
        if loop is None:
            loop = self.loop = asyncio.new_event_loop()
            loop.time = _Clock.monotonic  # type: ignore[method-assign]  # its own looks time.monotonic up
        given: list[_T] = []  # by the task, and not taken yet
        resume, leaving, over = asyncio.Event(), False, False

        def halt(*_: object) -> None:
            if not over:  # else it would end what comes after
                loop.stop()

        async def work() -> None:
            try:
                async for value in coming:
                    given.append(value)
                    halt()  # the thread takes it
                    await resume.wait()
                    resume.clear()
                    if leaving:
                        return
            finally:
                if (close := getattr(coming, "aclose", None)) is not None:
                    await close()

        def look() -> None:  # on the loop's thread, which may read ahead
            nonlocal leaving
            try:
                patience = self.patience()
            except _Gone:
                if not leaving:  # once: what the coroutine still does in `finally` is let be
                    leaving = True
                    task.cancel()
            else:
                if patience != math.inf:
                    loop.call_later(patience, look)

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed: there is nothing left to cancel
                loop.call_soon_threadsafe(look)

        task = loop.create_task(work())
        task.add_done_callback(halt)
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
            leaving = over = True
            resume.set()
            if not task.done() and not self.server.stopping:
                loop.run_until_complete(asyncio.wait([task], timeout=_STOP_SECONDS))
            if task.done() and not task.cancelled():
                task.exception()  # looked at: asyncio would log it else

    def run(self, awaitable: Awaitable[_T]) -> _T:
        """The result of a coroutine, run on this answer's own event loop."""

        async def once() -> AsyncIterator[_T]:
            yield await awaitable

        with closing(self.steps(once())) as steps:
            return next(steps)

    def end(self) -> None:
        """The answer is over."""
        if self.watched:
            self.wake = bool
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
    """Where the events of an answer go: to the client of a connection, unless said otherwise."""

    def __init__(self, encoder: _Encoder, connection: _Connection, reply: Reply) -> None:
        self.encoder = encoder
        self.connection = connection
        self.reply = reply

    @property
    def begun(self) -> bool:
        """Whether the client was told something: an error comes too late for a status."""
        return self.connection.headed

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
        self.write(self.encoder.end())
        self._finish()

    def fail(self, error: APIError) -> None:
        """The answer ends with an error, in the API's way."""
        self.write(self.encoder.fail(error))
        self._finish()

    def _finish(self) -> None:
        """All is written."""

    def break_off(self, error: APIError) -> None:
        """The handler failed in the middle: the client is told, but the answer is cut, not ended."""
        self.fail(error)


class _StreamSink(_Sink):
    """Server-sent events on a connection. What is known to follow is gathered; nothing waits to be gathered."""

    def __init__(self, encoder: _Encoder, connection: _Connection, reply: Reply) -> None:
        super().__init__(encoder, connection, reply)
        self.pending: list[bytes] = []
        self.size = 0
        self.limit = _FIRST_BATCH
        self.render: Callable[[_Event], str] = _sse

    def write(self, events: Sequence[_Event]) -> None:
        for event in events:
            data = self._pack(_texts(event, self.render))
            self.pending.append(data)
            self.size += len(data)
            if self.size >= self.limit:
                self.flush()
                self.limit = _BATCH

    def flush(self, last: bool = False) -> None:
        if self.pending:
            pending, self.pending, self.size = self.pending, [], 0
            if self.connection.state < _State.SENDING:
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
            self.pending.append(self._wrap(data))
        self.flush()

    def _pack(self, texts: list[str]) -> bytes:
        return _sse_bytes(texts, self.connection.http11)

    def _wrap(self, data: bytes) -> bytes:
        return _http_chunk(data) if self.connection.http11 else data

    def cut(self, reset: bool) -> None:
        self.flush()
        self.connection.hang_up(reset)

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

    said = 0
    insertions: Sequence[tuple[int, bytes]] = ()  # after how many parts, what

    def write(self, events: Sequence[_Event]) -> None:
        self.said += 1

    def raw(self, data: bytes) -> None:
        self.insertions = (*self.insertions, (self.said, data))

    def fail(self, error: APIError) -> None:
        raise error

    def cut(self, reset: bool) -> None:
        if self.said or self.insertions:
            self.end(self.said)
        self.connection.hang_up(reset)

    def end(self, shares: int | None = None) -> None:
        """Sends the JSON; of its shares, one a part and one for the end, only so many where it is cut."""
        body = _utf8(self.encoder.json()) if self.said or not self.insertions else b""
        length, pieces, at = len(body), [b""], 0
        for said, data in (*self.insertions, (self.said + 1 if shares is None else shares, b"")):
            share = len(body) * said // (self.said + 1)
            pieces += [body[at:share], data]
            length += len(data)
            at = share
        pieces[0] = self.connection.head(200, "application/json", _ON_REPLIES, self.reply.headers, length)
        self.connection.send(b"".join(pieces), last=shares is None)


class _Delivery:
    """One answer on its way: calls the handler, and carries its parts through an encoder into a sink.

    To make one raises APIError for a request that is refused.
    """

    encoder: _Encoder
    sink: _Sink
    waiter: _Waiter
    make_sink: Callable[[Any, _Connection, Reply], _Sink] | None = None  # other than a connection's own
    store: Callable[[Any, _Log | None], object] | None = None  # keeps what the encoder will have said
    log: _Log | None = None  # in the background
    ttft = itl = 0.0  # seconds before the first token, and between tokens
    over = False  # a Disconnect or a StreamError has ended the answer, with parts perhaps left

    def __init__(
        self, fake: FakeOpenAI, request: Request, make: type[_ChatEncoder | _ResponsesEncoder | _CompletionsEncoder]
    ) -> None:
        self.fake = fake
        self.request = request
        self.make = make
        self.body = request._json = request._parse()
        if fake.validate:
            _check_request(request.api, self.body, fake.strict)
        self.streamed = self.body.get("stream") is True
        self.handler: Callable[[Request], Any] = fake.handler
        self.streams: list[Stream] = []  # that the answer is made of

    def send(self, connection: _Connection) -> None:
        """Answers on a connection. What goes wrong before anything is sent is raised."""
        self.waiter = _Waiter(connection.server, connection, self.streamed)
        try:
            reply = self._ask()
            encoder = self._begin(reply)
            self.request._encoder, self.request._said = encoder, encoder.items
            make_sink = self.make_sink or (_StreamSink if self.streamed else _BodySink)
            self.sink = make_sink(encoder, connection, reply)
            self._carry(reply)
        finally:
            self.waiter.end()

    def in_background(self) -> _JSON | _Replay:
        """Answers at once that the response is queued, and makes it on a thread of its own.

        A handler that answers at once too says the id, the model and the time, as for any other answer.
        """
        server = self.fake._running()
        self.waiter = _Waiter(server, None, True)
        self.sink = self.log = log = _Log(self.waiter)
        asked: queue.SimpleQueue[Reply | BaseException] = queue.SimpleQueue()
        begun: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def work() -> None:
            answer: Reply | BaseException
            try:
                answer = self._ask()
            except BaseException as error:
                answer = error
            asked.put(answer)
            try:
                if begun.get():
                    self._carry(answer)
            except _Gone:
                pass
            finally:
                log.close()
                self.waiter.end()

        server.run(work)
        reply: Reply | BaseException = Reply()
        with suppress(queue.Empty):
            reply = asked.get(timeout=_AT_ONCE)
        try:
            log.encoder = encoder = self._begin(reply if isinstance(reply, Reply) else Reply())
            log.write(encoder.begin())
            queued = cast(_ResponsesEncoder, encoder).response("queued")
        except BaseException:
            begun.put(False)
            raise
        begun.put(True)
        return _Replay(log, 0) if self.streamed else queued

    def _ask(self) -> Reply:
        """What the handler answers. Raises what it raises, and ValueError or TypeError for no fitting answer."""
        answer: Any = self.handler(self.request)
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

    def _begin(self, reply: Reply) -> _Encoder:
        self.encoder = self.make(self.request, reply, self.fake._ids(), int(self.fake.clock()))
        if self.store is not None:
            self.store(self.encoder, self.log)
        return self.encoder

    def _carry(self, reply: Reply | BaseException) -> None:
        """Says all parts. An error that comes too late for a status is told in the stream."""
        try:
            if isinstance(reply, BaseException):
                raise reply
            self._say_all(reply)
        except BaseException as error:
            self.encoder.abandon()
            if isinstance(error, _Gone) or not self.sink.begun:
                raise
            if isinstance(error, APIError):
                self.request._outcome = error.message
                self.sink.fail(error._shared())
            else:  # the handler's own, or what can't be encoded
                message = self.request._outcome = self.fake._keep_error(error, self.request)
                self.sink.break_off(APIError(500, message))
        finally:
            for stream in self.streams:
                self._conclude(stream)
            if self.log is not None:
                self.request._said = self.encoder.items

    def _say_all(self, reply: Reply) -> None:
        for content in reply.parts:  # all of them now: the client may leave before their turn comes
            if isinstance(content, Stream):
                content._serve(self.request)
                self.streams.append(content)
                with self.fake._lock:
                    self.fake._streams.add(content)
        known = reply._known()
        if known is not None and (len(known) > 1 or self.encoder.n > 1):
            known = _arranged(known, self.encoder)
        cut = self.encoder.streams or self.encoder.logprobs or bool(self.ttft or self.itl)
        parts = self._coming(reply.parts) if known is None else _runs(known, reply._fragments, cut)
        told = False
        try:
            for part, texts in parts:
                told = True
                if isinstance(part, _Call) and part.name:
                    self._check_call(part.name)
                if not isinstance(part, _Spoken):
                    part._act(self)
                elif self.ttft or self.itl:
                    for fragment in part._cut(texts):
                        self._pace()
                        self.sink.write(self.encoder.say(fragment, fragment._texts()))
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
        open_ones = ("mcp", "namespace", "tool_search")  # they stand for others, whose names are not known
        if name not in offered and not any(tool.type in open_ones for tool in tools):
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
        if self.log is None:  # in the background nobody is connected
            self.over = True
            self.request._outcome = "cut"
            self.sink.cut(reset)
            self.encoder.abandon()

    def fail(self, error: APIError) -> None:
        self.over = True
        self.request._outcome = error.message
        self.sink.fail(error)

    # Where parts come from.

    def _coming(self, contents: Iterable[Any]) -> Generator[tuple[_Part, Sequence[str]]]:
        """The parts of an answer of which some come in time, each with its texts."""
        for content in contents:
            alone = isinstance(content, (str, _Part, Completion))
            parts: Iterable[_Part]
            if isinstance(content, Stream):
                parts = self._live(content)
            elif isinstance(content, AsyncIterable):
                parts = self._generated(self.waiter.steps(aiter(cast(Any, content))))
            elif alone:
                parts = Reply(content)._known() or ()
            else:
                parts = self._generated(iter(content))
            for part in parts:
                if isinstance(part, _Spoken):
                    yield part, part._texts(cut=alone)
                else:
                    yield part, ()

    def _generated(self, parts: Iterator[Any]) -> Iterator[_Part]:
        """The parts of a generator: each is on the wire before the next is asked for."""
        if self.waiter.streams:
            self.waiter.enter(bool)  # from now on it is seen between two parts that the client has left
        try:
            for part in parts:
                yield _part(part)
                self.sink.flush()
                self.waiter.patience()
        finally:
            with suppress(BaseException):  # close() may ignore GeneratorExit, or raise: the answer is over
                getattr(parts, "close", bool)()

    def _live(self, stream: Stream) -> Iterator[_Part]:
        """The parts of a Stream, as the test sends them."""
        self.sink.open()
        while True:
            try:
                part = stream._queue.get_nowait()
            except queue.Empty:
                self.sink.flush()
                stream._on_wire(stream._taken)
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
                stream._taken += 1
                yield part

    def _conclude(self, stream: Stream) -> None:
        """Tells a Stream that its answer is over."""
        waiter = self.waiter
        gone = waiter.connection is not None and waiter.connection.state is _State.GONE
        if not gone and stream._taken == stream._sent - stream._ended and not waiter.server.stopping:
            stream._on_wire(stream._sent)
            with self.fake._lock:
                self.fake._streams.discard(stream)
        elif not gone and not self.over:
            self.fake._interrupted.append(stream)
        stream._left()


def _arranged(parts: list[_Part], encoder: _Encoder) -> list[_Part]:
    """The parts of an answer that is known: as they are, but repeated for n, and parallel calls as the API has them."""
    calls = [at for at, part in enumerate(parts) if isinstance(part, _Call)]
    named = [call.choice for at in calls if (call := cast(_Call, parts[at])).name]
    if len(named) > len(set(named)):
        encoder.parallel = True
        if isinstance(encoder, _ChatEncoder):
            parts = [part._spaced() if isinstance(part, ToolCall) else part for part in parts]
    if encoder.model.phase and named:  # what is said before a call is commentary (R)
        last = calls[-1]
        parts = [
            replace(part, phase="commentary") if isinstance(part, Text) and part.phase is None and at < last else part
            for at, part in enumerate(parts)
        ]
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


def _runs(parts: Sequence[_Part], given: bool, cut: bool) -> Generator[tuple[_Part, Sequence[str]]]:
    """Each part with its texts. One that is alone in its item is cut into words; fragments of one are sent as given.

    Texts in a row go together: they encode faster so. `given`: all are fragments; not `cut`: nobody sees deltas.
    """
    opened: dict[int, _Spoken] = {}  # by choice: the part that opened the item that is being said
    at = 0
    while at < len(parts):
        part, begin = parts[at], at
        at += 1
        if not isinstance(part, _Spoken):
            yield part, ()
            continue
        before = opened.get(part.choice)
        goes_on = before is not None and part._continues(before)
        if not goes_on:
            opened[part.choice] = part
        if type(part) is Text and not (part.annotations or part.logprobs):
            for each in parts[at : begin + _RUN]:  # no call for each: there may be thousands
                if type(each) is not Text or each.choice != part.choice:
                    break
                if (
                    each.annotations or each.logprobs or each.phase or each.id is not None
                ):  # with one of these it stands alone
                    break
                at += 1
        if at - begin > 1:
            yield part, [cast(Text, each).text for each in parts[begin:at]]
        else:
            yield part, part._texts(cut=cut and not (given or goes_on or _is_continued(part, parts, at)))


def _is_continued(part: _Spoken, parts: Sequence[_Part], at: int) -> bool:
    """Whether the next part of the same choice goes on with a part."""
    for index in range(at, len(parts)):
        later = parts[index]
        if isinstance(later, _Spoken) and later.choice == part.choice:
            return later._continues(part)
    return False


class _News:
    """What others follow: they look again whenever there is news."""

    def __init__(self) -> None:
        self.followers: set[queue.SimpleQueue[Any]] = set()

    def wake(self) -> None:
        for follower in tuple(self.followers):
            follower.put(None)

    def follow(self, waiter: _Waiter, look: Callable[[], float | None]) -> None:
        """Calls `look` now, when there is news, and after the seconds that it returned; None ends it."""
        news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.followers.add(news)
        try:
            while (seconds := look()) is not None:
                with suppress(queue.Empty):
                    waiter.get(news, seconds)
        finally:
            self.followers.discard(news)
            waiter.end()


class _Log(_Sink, _News):
    """The events of a response that is made in the background, for who follows it: there is no wire."""

    over = False
    cancelled = False

    @property
    def begun(self) -> bool:
        return True

    def __init__(self, waiter: _Waiter) -> None:
        _News.__init__(self)
        self.waiter = waiter
        self.texts: list[str] = []  # of its events
        self.lock = threading.Lock()  # guards events, over and cancelled while they change

    def write(self, events: Sequence[_Event]) -> None:
        with self.lock:
            if self.over:  # cancelled
                raise _Gone
            for event in events:
                self.texts += _texts(event)
        self.wake()

    def close(self, cancelled: bool = False) -> None:
        """Nothing more will be written."""
        with self.lock:
            if self.over:
                return
            self.over, self.cancelled = True, cancelled
        self.wake()
        self.waiter.cancelled = True
        self.waiter.wake()


class _Replay(NamedTuple):
    """Streams a log's events, from a sequence number on, as they come."""

    log: _Log
    begin: int

    def send(self, connection: _Connection) -> None:
        at = self.begin

        def look() -> float | None:
            nonlocal at
            over = self.log.over  # before the texts: then these are all
            texts = self.log.texts[at:]
            at += len(texts)
            data = _sse_bytes(texts, connection.http11)
            if over and connection.http11:
                data += _LAST_CHUNK
            if data:
                connection.send(data, last=over)
            return None if over else _LONGEST

        connection.send(connection.head(200, _EVENTS, _ON_REPLIES))
        self.log.follow(_Waiter(connection.server, connection, True), look)


# ---- Endpoints -------------------------------------------------------------------------------------------------------
# An endpoint takes the server, the request and the values of its path. It returns JSON, or what sends itself on the
# connection: an _HTTPResponse, a _Delivery, a _Replay, a _WebSocket.

_Endpoint: TypeAlias = "Callable[..., Any]"
_ENDPOINTS: dict[str, _Endpoint] = {}


def _endpoint(route: str, table: dict[str, _Endpoint] = _ENDPOINTS) -> Callable[[_Endpoint], _Endpoint]:
    def register(function: _Endpoint) -> _Endpoint:
        table[route] = function
        return function

    return register


class _Route(NamedTuple):
    """Where a request goes."""

    endpoint: _Endpoint
    values: tuple[str, ...]  # of the {names} in the path
    api: str = ""
    deployment: str | None = None  # Azure's
    control: bool = False  # of the fake's own


_APIS = {f"POST /{api.replace('.', '/')}": api for api in ("chat.completions", "responses", "completions")}
_PREFIX = r"(?s:(?:/openai/deployments/([^/]+)|/openai/v1|/openai|/v1)?(/.*))"


@lru_cache(256)
def _route_pattern(path: str) -> str:
    """The pattern of a route's path: `{name}` is one segment, `{name*}` the rest: a model's name may have slashes."""
    names = r"(?<=/)\\{[^/]*?(\\\*)?\\}(?![^/])"
    return "(?s:" + re.sub(names, lambda match: "(.+)" if match[1] else "([^/]+)", re.escape(path)) + ")"


class _Router:
    """Finds the route of a request among "METHOD /path" names: the first that fits."""

    def __init__(self, endpoints: Mapping[str, _Endpoint]) -> None:
        self.endpoints = endpoints
        self.known: dict[tuple[str, str], _Route] = {}  # of names without {}, so that it stays small

    def find(self, method: str, path: str) -> _Route:
        """HEAD is served as GET; every path also under /v1 and in Azure's form."""
        route = self.known.get((method, path))
        if route is not None:
            return route
        match = re.fullmatch(_PREFIX, path)
        deployment, rest = match.groups() if match else (None, path)
        route = self._search("GET" if method == "HEAD" else method, rest)
        if deployment is not None:
            return route._replace(deployment=deployment)
        if f"{method} {rest}" in self.endpoints:
            self.known[method, path] = route
        return route

    def _search(self, method: str, path: str) -> _Route:
        allowed: set[str] = set()
        for name, endpoint in self.endpoints.items():
            served, _, template = name.partition(" ")
            match = re.fullmatch(_route_pattern(template), path)
            if match is None:
                continue
            values = match.groups()
            if served == method:
                return _Route(endpoint, values, _APIS.get(name, ""), control=endpoint is _CONTROLS.get(name))
            if not values or not values[-1].isalpha():  # a word where an id belongs is a route that is not there
                allowed |= {served, "HEAD"} if served == "GET" else {served}
        return _Route(_not_served, (", ".join(sorted(allowed)), f"{method} {path}"))


def _not_served(fake: FakeOpenAI, request: Request, allowed: str, asked: str) -> NoReturn:
    if allowed:
        words = f"Not allowed to {request.method} on {request.path}. "
        words += "(HINT: Perhaps you meant to use a different HTTP method?)"
        raise APIError(405, words, headers={"allow": allowed})
    nearest = min(fake._router.endpoints, key=lambda name: _distance(name, asked[:99]))
    words = f"Unknown route: {request.method} {request.path}. The nearest that is served is {nearest}; all are in the "
    words += 'README\'s table of endpoints, and FakeOpenAI(routes={"METHOD /path": function}) adds others.'
    raise APIError(404, words)


def _api_key(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return request.headers.get("api-key", "") if not key or scheme.lower() != "bearer" else key.strip()


def _check_model(fake: FakeOpenAI, request: Request) -> None:
    """Where the server is strict: raises APIError for a model that it does not know."""
    name = request.model
    if name in fake._model_names() or (not name and request.prompt is not None):
        return
    if request.api == "responses":
        raise APIError(400, f"The requested model '{name}' does not exist.", param="model", code="model_not_found")
    text = f"The model `{name}` does not exist or you do not have access to it."
    raise APIError(404, text, code="model_not_found")


@_endpoint("POST /chat/completions")
@_endpoint("POST /completions")
def _create_completion(fake: FakeOpenAI, request: Request) -> _Delivery:
    chat = request.api == "chat.completions"
    delivery = _Delivery(fake, request, _ChatEncoder if chat else _CompletionsEncoder)
    if fake.strict:
        _check_model(fake, request)
    if chat and delivery.body.get("store") is True:
        delivery.store = lambda encoder, _: fake._remember(fake._chats, encoder.id, _StoredChat(request, encoder))
    return delivery


class _StoredChat:
    """A chat completion that is kept because the request said `store: true`."""

    def __init__(self, request: Request, encoder: _ChatEncoder) -> None:
        self.request = request
        self.encoder = encoder
        self.metadata: Any = request._json.get("metadata") or {}
        self.request_id = "req_" + encoder.ids.hex(32)
        self.seed = encoder.ids.bits(63)  # there is one, also unasked (R)

    def body(self) -> _JSON:
        """As the API lists it: with what was asked, and less of what was said than the answer had (R)."""
        told, asked = self.encoder.body(), self.request.body
        for choice in told["choices"]:
            kept = {key: choice["message"].get(key) for key in ("content", "role", "tool_calls", "function_call")}
            choice |= {"message": kept, "logprobs": choice.pop("logprobs", None)}
        usage = {key: told["usage"][key] for key in ("total_tokens", "completion_tokens", "prompt_tokens")}
        own = {"request_id": self.request_id, "input_user": asked.get("user"), "metadata": self.metadata}
        set = {key: value for key, value in asked.items() if key in _STORED_CHAT and value is not None}
        object = {"object": "chat.completion", "usage": usage}
        return {**_STORED_CHAT, "seed": self.seed, **set, **told, **object, **own}


_STORED_CHAT: _JSON = {  # its keys, in order, and what they are unasked (R)
    "object": "", "id": "", "model": "", "created": 0, "request_id": "", "tool_choice": None, "usage": None, "seed": 0,
    "top_p": 1.0, "temperature": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "system_fingerprint": None,
    "input_user": None, "service_tier": None, "tools": None, "metadata": None, "choices": None, "response_format": None,
}  # fmt: skip


def _query(request: Request) -> dict[str, str]:
    """The query's parameters; the last where one came several times."""
    return {key: values[-1] for key, values in parse_qs(request.query).items()}


_LIMIT, _ORDER = _integer(1, 100), _enum("asc", "desc")  # S: of lists
_INPUTS = partial(_length, "an array", 1, 2048)  # S: of embeddings; B: of moderations


def _listing(request: Request, items: Mapping[str, Any], order: str, last: str = "last_id") -> _JSON:
    """A page of a list, by id: `limit`, `order` and `after` as the query says; the key `last` comes last."""
    query: dict[str, Any] = {"limit": "20", "order": order, **_query(request)}
    if re.fullmatch("-?[0-9]{1,18}", query["limit"]):
        query["limit"] = int(query["limit"])
    _LIMIT(query["limit"], "limit", query)
    _ORDER(query["order"], "order", query)
    ids = list(items) if query["order"] == "asc" else list(items)[::-1]
    if (after := query.get("after", "")) and after not in items:
        raise APIError(404, f"There is no item with id '{after}' in this list.", param="after")
    begin = ids.index(after) + 1 if after else 0
    page = ids[begin : begin + query["limit"]]
    first_id, last_id = (page[0], page[-1]) if page else (None, None)
    listing: _JSON = {"object": "list", "data": [items[id] for id in page], "first_id": first_id, "last_id": last_id}
    listing["has_more"] = len(ids) > begin + query["limit"]
    listing[last] = listing.pop(last)  # it depends on the list (R)
    return listing


def _kept(store: Mapping[str, _T], kind: str, id: str) -> _T:
    """What is stored by that id. Raises APIError where nothing is."""
    if (found := store.get(id)) is None:
        raise APIError(404, f"{kind} with id '{id}' not found.")
    return found


def _new_metadata(fake: FakeOpenAI, body: _JSON) -> Any:
    """The metadata that a request says. Raises APIError for what the API refuses."""
    metadata: Any = body.get("metadata") or {}
    if fake.validate:
        _metadata(metadata, "metadata", body)
    return metadata


def _stored_chat(fake: FakeOpenAI, id: str) -> _StoredChat:
    chat = fake._chats.get(id)
    if chat is None or not chat.encoder.ended:
        raise APIError(404, f"Completion {id} not found", param="completion_id", code="not_found")
    return chat


@_endpoint("GET /chat/completions")
def _list_chats(fake: FakeOpenAI, request: Request) -> _JSON:
    query = _query(request)
    wanted = {key[9:-1]: value for key, value in query.items() if key.startswith("metadata[")}
    chats = {
        id: chat
        for id, chat in tuple(fake._chats.items())
        if chat.encoder.ended
        and query.get("model", chat.encoder.model_name) in (chat.request.model, chat.encoder.model_name)
        and wanted.items() <= {key: str(value) for key, value in chat.metadata.items()}.items()
    }
    listing = _listing(request, chats, "desc", "has_more")
    return listing | {"data": [chat.body() for chat in listing["data"]]}


@_endpoint("GET /chat/completions/{id}/messages")
def _chat_messages_of(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    kinds, stored = ("type", "text", "image_url", "input_audio", "file"), dict[str, _JSON]()
    for at, message in enumerate(map(_dict, _list(_stored_chat(fake, id).request._json.get("messages")))):
        content, parts = message.get("content"), None
        if isinstance(content, list):
            parts = [{kind: part.get(kind) for kind in kinds} for part in map(_dict, _list(content))]
            content = _text_of(_list(content))
        told = {"id": f"{id}-{at}", "role": message.get("role"), "content": content, "content_parts": parts}
        stored[f"{id}-{at}"] = {**told, "name": message.get("name")}
    return _listing(request, stored, "asc", "has_more")


class _History:
    """The items up to one response, linked to those before it: a chain of n turns holds each once."""

    def __init__(self, before: _History | None, said: Callable[[], list[Any]]) -> None:
        self.before = before
        self.said: Callable[[], list[Any]] = said  # by this turn
        self.told = before.tokens() if before is not None else 0  # tokens, before this turn

    def __iter__(self) -> Iterator[Any]:
        turns: list[_History] = [self]
        while (before := turns[-1].before) is not None:
            turns.append(before)
        for turn in reversed(turns):
            yield from turn.said()

    def tokens(self) -> int:
        """About how many tokens the items are."""
        said = self.said()
        return self.told + _estimate(said) - _estimate(()) if said else self.told


_NO_HISTORY = _History(None, list)


@dataclass(eq=False)
class _StoredResponse:
    """A response that can be asked for, gone on with, and, if it runs in the background, followed."""

    encoder: _ResponsesEncoder
    input: list[Any]  # as the API lists it
    log: _Log | None  # in the background
    history: _History = _NO_HISTORY  # up to the end of this response

    def said(self) -> list[Any]:
        """The items that it adds to what was before."""
        return [*self.input, *self.encoder.output()]

    def body(self) -> _JSON:
        cancelled = self.log is not None and self.log.cancelled
        return self.encoder.response("cancelled" if cancelled else self.encoder.status)


_ITEM_PREFIXES = {"function_call": "fc_", "function_call_output": "fc_", "reasoning": "rs_", "custom_tool_call": "ctc_"}


def _stored_item(item: Any, new_id: Callable[[str], str]) -> Any:
    """An input item as the API lists it: with an id, a status, and content parts."""
    sent = _dict(item)
    stored: _JSON = {**sent, "type": _item_type(sent)}
    if isinstance(stored.get("content"), str) and stored["type"] == "message":
        kind = "output_text" if stored.get("role") == "assistant" else "input_text"
        stored["content"] = [{"type": kind, "text": stored["content"]}]
    id = stored.pop("id", None)
    if not isinstance(id, str):
        id = new_id(_ITEM_PREFIXES.get(str(stored["type"]), "msg_"))
    told = {"id": id, "type": stored.pop("type")}
    if str(told["type"]).endswith(("message", "_call", "_output")):  # others have none (R)
        told["status"] = stored.pop("status", None) or "completed"
    return {**told, **dict(sorted(stored.items()))}


def _history(fake: FakeOpenAI, request: Request, body: _JSON) -> _History:
    """What is stored from before this request's input. Raises APIError for what is not stored."""
    conversation, previous = body.get("conversation"), body.get("previous_response_id")
    if isinstance(conversation, dict):
        conversation = _dict(conversation).get("id")
    if isinstance(conversation, str) and (fake.validate or conversation in fake._conversations):
        return _conversation_of(fake, conversation).last
    if isinstance(previous, str):
        if (stored := request._remembered.get(previous) or fake._responses.get(previous)) is not None:
            return stored.history
        if fake.validate:
            words = f"Previous response with id '{previous}' not found."
            raise _bad_request(words, "previous_response_id", "previous_response_not_found")
    return _NO_HISTORY


def _check_turn(before: _History, items: list[Any], reasons: bool, stored: bool) -> None:
    """Raises the first fault between the input and what was before, which was checked when it was new."""
    if not any(_dict(item).get("id") for item in items):
        with suppress(APIError):  # its last turn is nearly always enough, however long the chain is
            last = before.said()
            return _check_conversation([*last, *items], len(last), reasons, stored)
    past = list(before)
    return _check_conversation([*past, *items], len(past), reasons, stored)


def _resolved(fake: FakeOpenAI, items: list[Any]) -> list[Any]:
    """Input items with those that they refer to in the place of references."""
    references = [_item_type(_dict(item)) == "item_reference" for item in items]
    if not any(references):
        return items
    responses = tuple(fake._responses.values())
    stored: dict[str, Any] = {str(item.get("id")): item for response in responses for item in response.said()}
    for conversation in tuple(fake._conversations.values()):
        stored |= conversation.items()
    pairs = zip(items, references, strict=True)
    return [stored.get(str(item.get("id")), item) if refers else item for item, refers in pairs]


@_endpoint("POST /responses")
def _create_response(fake: FakeOpenAI, request: Request) -> Any:
    delivery = _Delivery(fake, request, _ResponsesEncoder)
    body = delivery.body
    request._before = before = _history(fake, request, body)
    items = _input_items(body.get("input"))
    resolved = _resolved(fake, items)
    if resolved is not items:
        request._resolved = resolved
    if fake.validate:
        effort = _dict(body.get("reasoning")).get("effort") or _family(_string(body.get("model"))[:24]).effort
        _check_turn(before, resolved, effort not in (None, "none"), body.get("store") is not False)
    if fake.strict:
        _check_model(fake, request)
    background = body.get("background") is True

    def store(encoder: _ResponsesEncoder, log: _Log | None) -> None:  # does not know the delivery: no cycle
        kept = fake._conversations.get(str(_dict(encoder.base.get("conversation")).get("id")))
        stored = _StoredResponse(encoder, [_stored_item(item, encoder._id) for item in resolved], log)
        if kept is None:
            stored.history = _History(before, stored.said)
        else:  # a conversation gets nothing of it before it is over
            stored.history = kept.add(lambda: stored.said() if encoder.status in ("completed", "incomplete") else [])
        fake._remember(fake._responses, encoder.id, stored)
        fake._remember(fake._histories, id(stored.history), stored.history)

    if background or body.get("store") is not False:
        delivery.store = store
    if items and _item_type(_dict(items[-1])) == "compaction_trigger":
        delivery.handler = Script(Item("compaction"))
    return delivery.in_background() if background else delivery


def _stored_response(fake: FakeOpenAI, id: str) -> _StoredResponse:
    return _kept(fake._responses, "Response", id)


@_endpoint("GET /responses/{id}")
def _get_response(fake: FakeOpenAI, request: Request, id: str) -> Any:
    stored = _stored_response(fake, id)
    query = _query(request)
    if query.get("stream") != "true" or request.method == "HEAD":
        return stored.body()
    if stored.log is None:
        raise APIError(400, "This response cannot be streamed because it was not created with background=true.")
    after = query.get("starting_after", "")
    return _Replay(stored.log, int(after) + 1 if re.fullmatch("[0-9]{1,9}", after) else 0)


@_endpoint("GET /responses/{id}/input_items")
def _input_items_of(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    stored = _stored_response(fake, id)
    before = stored.history.before or _NO_HISTORY
    return _listing(request, {item["id"]: item for item in (*before, *stored.input)}, "desc")


@_endpoint("POST /responses/{id}/cancel")
def _cancel_response(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    stored = _stored_response(fake, id)
    if stored.log is None:
        raise APIError(400, "Cannot cancel a synchronous response.")
    stored.log.close(cancelled=True)
    return stored.body()


@_endpoint("POST /responses/compact")
def _compact_conversation(fake: FakeOpenAI, request: Request) -> _JSON:
    body = request._parse()
    for name in ("model", "input") if fake.validate else ():
        _RESPONSES[name](body.get(name), name, body)
    request._before = _history(fake, request, body)
    items = [*request._before, *_input_items(body.get("input"))]
    encoder = _ResponsesEncoder(request, Reply(), fake._ids(), int(fake.clock()))
    encoder.say(Item("compaction"), ())
    users = [_stored_item(item, encoder._id) for item in items if _dict(item).get("role") == "user"]
    told = {"id": encoder.id, "object": "response.compaction", "created_at": encoder.created}
    return {**told, "output": [*users, *encoder.output()], "usage": encoder._usage()}


@_endpoint("POST /responses/input_tokens")
def _count_tokens(fake: FakeOpenAI, request: Request) -> _JSON:
    body = request._parse()
    before = _history(fake, request, body)
    items = [{"content": body.get("instructions")}] if body.get("instructions") else []
    tokens = _estimate([*items, *_input_items(body.get("input"))]) + before.tokens()
    return {"object": "response.input_tokens", "input_tokens": tokens}


@dataclass(eq=False)
class _Conversation:
    """A conversation object: items that were put in, and the responses made in it."""

    id: str
    created: int
    metadata: Any
    lock: threading.Lock = field(default_factory=threading.Lock)  # guards last: several responses may begin at a time
    last: _History = _NO_HISTORY
    deleted: set[str] = field(default_factory=set[str])  # ids of items

    def add(self, said: Callable[[], list[Any]]) -> _History:
        """Adds a turn that says these items, without those that were deleted."""
        with self.lock:
            self.last = _History(self.last, lambda: [item for item in said() if item["id"] not in self.deleted])
            return self.last

    def items(self) -> dict[str, Any]:
        """All items, by id."""
        return {str(item["id"]): item for item in self.last}

    def body(self) -> _JSON:
        return {"id": self.id, "object": "conversation", "created_at": self.created, "metadata": self.metadata}


def _conversation_of(fake: FakeOpenAI, id: str) -> _Conversation:
    return _kept(fake._conversations, "Conversation", id)


def _new_items(fake: FakeOpenAI, body: _JSON) -> list[Any]:
    """The items that a body puts into a conversation."""
    items, ids = body.get("items"), fake._ids()
    if fake.validate and items is not None:
        _array(_input_item, "an array of input items", high=20)(items, "items", body)  # S
    return [_stored_item(item, lambda prefix: prefix + ids.hex(50)) for item in _list(items)]


@_endpoint("POST /conversations")
def _create_conversation(fake: FakeOpenAI, request: Request) -> _JSON:
    body = request._parse() if request.raw_body else {}
    items = _new_items(fake, body)
    id = "conv_" + fake._ids().hex(48)
    conversation = _Conversation(id, int(fake.clock()), _new_metadata(fake, body))
    conversation.add(lambda: items)
    fake._remember(fake._conversations, id, conversation)
    return conversation.body()


@_endpoint("GET /conversations/{id}/items")
def _conversation_items(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    return _listing(request, _conversation_of(fake, id).items(), "desc")


@_endpoint("POST /conversations/{id}/items")
def _add_items(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    conversation, body = _conversation_of(fake, id), request._parse()
    if body.get("items") is None:
        raise _missing("items")
    items = _new_items(fake, body)
    conversation.add(lambda: items)
    return _listing(request, {item["id"]: item for item in items}, "asc")


@_endpoint("GET /conversations/{id}/items/{item_id}")
def _get_item(fake: FakeOpenAI, request: Request, id: str, item_id: str) -> _JSON:
    return _dict(_kept(_conversation_of(fake, id).items(), "Item", item_id))


@_endpoint("DELETE /conversations/{id}/items/{item_id}")
def _delete_item(fake: FakeOpenAI, request: Request, id: str, item_id: str) -> _JSON:
    conversation = _conversation_of(fake, id)
    _kept(conversation.items(), "Item", item_id)
    conversation.deleted.add(item_id)
    return conversation.body()


def _stored_routes(path: str, kind: str, find: Callable[[FakeOpenAI, str], Any], store: str) -> None:
    """What is stored is fetched, updated and deleted in one way."""

    def get(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
        return cast(_JSON, find(fake, id).body())

    def update(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
        stored, body = find(fake, id), request._parse()
        if "metadata" not in body:  # what is there would be lost
            raise _missing("metadata")
        stored.metadata = _new_metadata(fake, body)
        return cast(_JSON, stored.body())

    def delete(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
        find(fake, id)
        getattr(fake, store).pop(id, None)
        gone = {"object": f"{kind}.deleted", "id": id}
        return {**(gone if store == "_chats" else {"id": id, **gone}), "deleted": True}

    for method, function in (("GET", get), ("POST", update), ("DELETE", delete)):
        if store != "_responses" or method == "DELETE":
            _endpoint(f"{method} {path}/{{id}}")(function)


_stored_routes("/chat/completions", "chat.completion", _stored_chat, "_chats")
_stored_routes("/conversations", "conversation", _conversation_of, "_conversations")
_stored_routes("/responses", "response", _stored_response, "_responses")


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


@_endpoint("DELETE /models/{id*}")
def _delete_model(fake: FakeOpenAI, request: Request, id: str) -> _JSON:
    if not id.startswith("ft:"):  # a fine-tuned one, which the fake need not know
        _get_model(fake, request, id)
    fake.models = [name for name in fake._model_names() if name != id]
    return {"id": id, "object": "model", "deleted": True, "owned_by": "openai-internal"}


_WORD_PATTERN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def _embedding(text: str, dimensions: int) -> list[float]:
    """A unit vector, the same on every machine: feature hashing of the words, so who shares words is near.

    Each word adds its length, for short ones say little, with a sign to each of 15 places.
    """
    sums = [0] * dimensions
    for word, times in Counter(_WORD_PATTERN.findall(text.lower()) or [text]).items():
        digest = hashlib.shake_256(word.encode("utf-8", "surrogatepass")).digest(60)
        for number in struct.unpack("<15I", digest):
            sums[(number >> 1) % dimensions] += times * (len(word) if number & 1 else -len(word))
    if not any(sums):
        sums[0] = 1
    length = math.sqrt(sum(number * number for number in sums))
    return [round(number / length, 8) for number in sums]


@_endpoint("POST /embeddings")
def _create_embeddings(fake: FakeOpenAI, request: Request) -> _HTTPResponse:
    body = request._parse()
    model, given, dimensions = body.get("model"), body.get("input"), body.get("dimensions")
    if not isinstance(model, str) or not model:
        raise APIError(400, "you must provide a model parameter")
    if fake.strict:
        _check_model(fake, request)
    if fake.validate:
        _check_recorded("embeddings", body)
    if not isinstance(given, (str, list)) or given in ("", []):
        raise _missing("input")
    inputs: list[Any] = [given] if isinstance(given, str) else _list(given)
    if all(isinstance(each, int) for each in inputs):  # one text, as tokens
        inputs = [inputs]
    _INPUTS(inputs, "input", {})
    if dimensions is None:
        dimensions = 3072 if model == "text-embedding-3-large" else 1536
    elif type(dimensions) is not int or dimensions < 1:
        raise APIError(400, f"{dimensions} is less than the minimum of 1 - 'dimensions'")
    embed = fake.embeddings or partial(_embedding, dimensions=min(dimensions, 3072))
    data: list[str] = []  # encoded one by one: the encoder lets no other thread run
    for index, each in enumerate(inputs):
        text = each if isinstance(each, str) else _dumps(each)
        vector: Any = [*map(float, embed(text))]
        if body.get("encoding_format") == "base64":
            vector = b2a_base64(struct.pack(f"<{len(vector)}f", *vector), newline=False).decode()
        place = {"embedding": vector, "index": index} if "-3-" in model else {"index": index, "embedding": vector}  # R
        data.append(_dumps({"object": "embedding", **place}))
    tokens = sum(len(each) // 4 + 1 if isinstance(each, str) else len(_list(each)) for each in inputs)
    name = "text-embedding-ada-002-v2" if model == "text-embedding-ada-002" else model
    rest = _dumps({"model": name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    return _HTTPResponse(_utf8(f'{{"object":"list","data":[{",".join(data)}],{rest[1:]}'))


@_endpoint("POST /moderations")
def _create_moderation(fake: FakeOpenAI, request: Request) -> _JSON:
    """Nothing is ever flagged; a test that wants it flagged gives its own route."""
    body = request._parse()
    if body.get("input") is None:
        raise _missing("input")
    given = _list(body["input"]) or [""]
    _INPUTS(given, "input", {})
    texts = len(given) if all(isinstance(each, str) for each in given) else 1  # content parts are one input
    model = _string(body.get("model")) or "omni-moderation-latest"
    return {"id": "modr-" + fake._ids().alnum(29), "model": model, "results": [_UNFLAGGED] * texts}


# ---- Control routes --------------------------------------------------------------------------------------------------
# What a server that is served from the command line answers to tests in other languages, and to its page: they queue
# answers, and look at requests. Each session has its own; the header x-fake-session names it, or else the API key.

_CONTROLS: dict[str, _Endpoint] = {}
_HIDDEN = ("authorization", "api-key", "proxy-authorization", "cookie")  # header fields that are never shown
_GLANCE = 0.1  # seconds between looks at an answer under way; a person does not notice
_RAN_OUT = "No queued answer is left for this request. POST /_fake/answers queues more; DELETE ends the queue."
_QUEUED = (Text, Refusal, Reasoning, ToolCall, CustomToolCall, WebSearch, Finish, Usage, Pause, Disconnect, StreamError)
_PARTS: dict[str, Callable[..., _Part]] = {kind.__name__: kind for kind in _QUEUED}


def _part_json(part: Any) -> _JSON:
    """A part as JSON, as `_queued_part` takes it: its type, and the fields that say something."""
    if isinstance(part, WebSearch):
        return {"type": "WebSearch", "query": part.query, "sources": part.sources, "id": part.id}
    if isinstance(part, Item):
        return {"type": part.type, **part.fields}
    given = {each.name: getattr(part, each.name) for each in fields(part) if each.init and each.name != "type"}
    said = {name: value for name, value in given.items() if value not in (None, ()) and (name, value) != ("choice", 0)}
    return {"type": type(part).__name__, **said}


def _queued_part(part: _JSON) -> _Part:
    """A part from its class's name and fields, or an output item from its keys."""
    name = part.pop("type")
    if name in _PARTS:
        return _PARTS[name](*part.pop("summaries", ()), **part)
    if not name.islower():
        raise ValueError(f"no part is named {name!r}")
    return Item(name, **part)


def _queued_answer(value: Any) -> Any:
    """The answer that JSON stands for. Raises AttributeError, KeyError, TypeError or ValueError for what is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return [each if isinstance(each, str) else _queued_part(dict(each)) for each in _list(value)]
    if "object" in value:
        return recorded(value)
    if "error" in value:
        known = {name: value["error"].get(name) for name in ("type", "code", "param")}
        return APIError(value.get("status", 500), value["error"]["message"], **known, headers=value.get("headers"))
    return [_queued_part(dict(value))]


def _attached(message: Message) -> list[str]:
    """What a message holds beside text, images and files: the kind, and how large it is as JSON."""
    parts = [part for part in map(_dict, _list(message.content)) if "text" not in part]
    return [f"[{part.get('type')}: {len(_dumps(part)):,} characters]" for part in parts]


def _tool_words(request: Request) -> list[str]:
    """The tools that are offered, as name(parameter, parameter)."""
    names = [(tool.name or tool.type, _dict(_dict(tool.parameters).get("properties"))) for tool in request.tools]
    return [f"{name}({', '.join(parameters)})" for name, parameters in names]


def _became(request: Request) -> _JSON:
    """What became of a request so far. `time` is in unix seconds; `seconds` is what it took, None: it still takes."""
    outcome = "wrong or missing API key" if request._status == 401 else request._outcome  # whose words show the key
    return {
        **{name: getattr(request, name) for name in ("method", "path", "query", "api", "model", "stream")},
        "status": request._status or None,
        "seconds": round(request._seconds, 6) or None,
        "outcome": (outcome or "answered") if request._seconds else "in flight",
        "answer": [*map(_part_json, request.answer)],
        **request._note,
    }


def _journal_entry(request: Request) -> _JSON:
    """All of it but keys, with the conversation and the tools in one form for both APIs."""
    messages = [
        {"role": one.role, "text": one.text, "attached": _attached(one), "calls": [*map(_part_json, one.tool_calls)]}
        for one in request.messages
    ]
    headers = {name: value for name, value in request.headers.items() if name not in _HIDDEN}
    told = {"headers": headers, "body": request.body, "messages": messages, "tools": _tool_words(request)}
    entry = _became(request) | told
    if request._seconds:
        request._forget()
    return entry


class _Control(_News):
    """What is queued for the sessions of a server, and who follows its requests."""

    def __init__(self, fake: FakeOpenAI) -> None:
        super().__init__()
        self.fake = fake
        self.handler, fake.handler = fake.handler, self.answer
        self.lock = threading.Lock()  # guards who queues and who deletes; taking an answer is one operation
        self.queues: dict[str, deque[Any]] = {}  # by session
        self.numbers = iter(range(1, sys.maxsize))
        self.watchers: list[Callable[[Request], object]] = []  # called with each that has ended
        fake._control, fake._observe = self, self.end
        fake._router = _Router({**_CONTROLS, **fake._router.endpoints})

    def session(self, request: Request) -> str:
        key = _api_key(request) if self.fake.api_key is None else ""  # else all have the same
        return request.headers.get("x-fake-session", key)

    def begin(self, request: Request) -> None:
        request._note = {"number": next(self.numbers), "time": _Clock.time(), "asked": False}

    def end(self, request: Request) -> None:
        usage = [request._encoder.tally()] if request._encoder is not None and request._status == 200 else []
        request._note["answer"] = [_part_json(part) for part in (*request.answer, *usage)]
        self.wake()
        for watcher in self.watchers:
            watcher(request)

    def answer(self, request: Request) -> Any:
        """The handler. Where nothing is queued, for the session or without one, the server's own is asked."""
        request._note["asked"] = True
        queued = self.queues.get(self.session(request), self.queues.get(""))
        if queued is None:
            return self.handler(request)
        with suppress(IndexError):
            return queued.popleft()
        raise APIError(500, _RAN_OUT, headers={"x-should-retry": "false"})

    def of(self, session: str) -> list[Request]:
        """The requests of a session; all, where none is named."""
        return [each for each in self.fake.requests if session in ("", self.session(each))]

    def settled(self, asking: Request, wanted: int = 0, seconds: float = 1.0) -> list[Request]:
        """The session's requests, once so many came, and none has its whole answer but is not yet noted as over."""
        due, session = _Clock.monotonic() + seconds, self.session(asking)

        def look() -> float | None:
            found, rest = self.of(session), due - _Clock.monotonic()
            ending = any(not each._seconds and id(each) not in self.fake._flying for each in found)
            return rest if rest > 0 and (ending or len(found) < wanted) else None

        self.follow(_Waiter(self.fake._running(), asking._connection, False), look)
        return self.of(session)

    def send(self, connection: _Connection) -> None:
        """Streams the requests on a connection, those that came before first, and what becomes of them."""
        told: dict[int, _JSON] = {}  # {}: it is over

        def look() -> float:
            before, texts = told.copy(), list[str]()
            told.clear()
            for each in self.fake.requests:
                number, over = each._note["number"], "answer" in each._note
                last = before.get(number)
                became = _became(each) if last != {} else {}
                if became != last:
                    texts.append(_sse(became if last else _journal_entry(each)))
                told[number] = {} if over else became
            if texts:
                connection.send(_sse_bytes(texts, connection.http11))
            return _GLANCE if self.fake._flying else _LONGEST

        connection.send(connection.head(200, _EVENTS, _USUAL))
        self.follow(_Waiter(connection.server, connection, True), look)


def _checked(fake: FakeOpenAI, request: Request) -> tuple[_Control, str]:
    """The control, and the session that is asked for. Who only looks needs no key."""
    if fake.api_key is not None and request.method not in ("GET", "HEAD"):
        fake._check_key(request)
    control = cast(_Control, fake._control)
    return control, control.session(request)


@_endpoint("POST /_fake/answers", _CONTROLS)
def _queue_answers(fake: FakeOpenAI, request: Request) -> _JSON:
    control, session = _checked(fake, request)
    try:
        sent: Any = _loads(request.raw_body.decode())
        answers = [_queued_answer(each) for each in (_list(sent) if isinstance(sent, list) else [sent])]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        words = "Expected JSON: a list of answers, each a string, a list of parts, or OpenAI's own JSON; it raised"
        raise APIError(400, f"{words} {type(error).__name__}: {error}") from None
    with control.lock:
        queued = control.queues.get(session, deque())
        queued += answers
        fake._remember(control.queues, session, queued)
    return {"queued": len(answers)}


@_endpoint("DELETE /_fake/answers", _CONTROLS)
@_endpoint("DELETE /_fake/requests", _CONTROLS)
def _reset(fake: FakeOpenAI, request: Request) -> _JSON:
    """Ends the queues, or forgets the requests, of a session; of all, where none is named."""
    control, session = _checked(fake, request)
    if request.path.endswith("answers"):
        with control.lock:
            control.queues = {name: rest for name, rest in control.queues.items() if session not in ("", name)}
    else:
        for each in control.of(session):
            with suppress(ValueError):  # the journal is full, and has dropped it meanwhile
                fake._journal.remove(each)
    return {"deleted": True}


@_endpoint("GET /_fake/requests", _CONTROLS)
def _get_requests(fake: FakeOpenAI, request: Request) -> _JSON:
    """Those that came, the oldest first. With ?wait=N, once N have, or a 504 after ?timeout=SECONDS."""
    asked = {"wait": "0", "timeout": "5", **_query(request)}
    for name, form in (("wait", "[0-9]{1,9}"), ("timeout", r"[0-9]{1,9}(\.[0-9]{0,9})?")):
        if not re.fullmatch(form, asked[name]):
            raise APIError(400, f"Expected a number for '{name}', not {asked[name]!r}.", param=name)
    wanted, seconds = int(asked["wait"]), float(asked["timeout"])
    found = cast(_Control, fake._control).settled(request, wanted, seconds)
    if len(found) < wanted:
        raise APIError(504, f"{len(found)} of {wanted} requests came in {seconds:g} s.")
    return {"object": "list", "data": [*map(_journal_entry, found)]}


@_endpoint("GET /_fake/errors", _CONTROLS)
def _get_errors(fake: FakeOpenAI, request: Request) -> _JSON:
    """What went wrong: `ran_out`, `refused` (the client's mistake), `failed` (the handler's), `left_over`."""
    control, session = _checked(fake, request)
    found: list[_JSON] = []
    for each in control.settled(request):
        if each._outcome.startswith("handler "):
            kind = "failed"
        elif each._outcome == _RAN_OUT:
            kind = "ran_out"
        elif each._status >= 400 and not each._note["asked"]:
            kind = "refused"
        else:  # an error may be the answer that was wanted
            continue
        found.append({"kind": kind, "number": each._note["number"], "message": _became(each)["outcome"]})
    if left := sum(len(queued) for name, queued in tuple(control.queues.items()) if session in ("", name)):
        found.append({"kind": "left_over", "number": None, "message": f"{left} queued answers were not used"})
    return {"object": "list", "data": found}


@_endpoint("GET /_fake/events", _CONTROLS)
def _get_events(fake: FakeOpenAI, request: Request) -> Any:
    return fake._control if request.method == "GET" else _HTTPResponse(b"", _EVENTS)


@_endpoint("GET /", _CONTROLS)
def _get_page(fake: FakeOpenAI, request: Request) -> _HTTPResponse:
    return _HTTPResponse(_PAGE.encode(), "text/html; charset=utf-8", headers={"content-security-policy": _POLICY})


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
_PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>openai_fake</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; --back: #fff; --soft: #f4f4f6; --line: #dddde3; --text: #1c1c20; --dim: #66666f;
    --mark: #0b63ce; --good: #157347; --warn: #8a5a00; --bad: #b42318 }
  @media (prefers-color-scheme: dark) { :root { --back: #17171a; --soft: #212126; --line: #36363d; --text: #ececf0;
    --dim: #a0a0ab; --mark: #6cb2ff; --good: #5fce95; --warn: #e5b454; --bad: #ff8a80 } }
  * { box-sizing: border-box; border: 0 solid var(--line) }
  body { margin: 0; height: 100vh; display: grid; grid: auto 1fr / minmax(12rem, 24rem) 1fr; color: var(--text);
    background: var(--back); font: 14px/1.45 system-ui, sans-serif }
  header { grid-column: 1 / 3; padding: .6rem 1rem; border-bottom-width: 1px; display: flex; gap: 1rem }
  nav, main { overflow: auto } main { padding: 1rem 1.25rem } nav { border-right-width: 1px; background: var(--soft) }
  nav button { display: grid; grid-template-columns: 1fr auto; gap: 0 .75rem; width: 100%; padding: .5rem 1rem;
    border-bottom-width: 1px; background: none; color: inherit; font: inherit; text-align: left }
  nav button[aria-current=true] { background: var(--back); box-shadow: inset 3px 0 var(--mark) }
  nav span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
  .dim, h2 { color: var(--dim) } .good { color: var(--good) } .warn { color: var(--warn) } .bad { color: var(--bad) }
  h1 { font-size: 1.1rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: .8rem; margin: 1.25rem 0 .25rem }
  .part { display: grid; grid-template-columns: 6rem 1fr; gap: .75rem; padding: .35rem 0; border-top-width: 1px }
  pre { margin: 0; font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
  .live > :last-child pre::after { content: "▍"; color: var(--mark) } .copy { float: right; padding: .3rem .7rem }
</style>
<header><b>openai_fake</b><span class="dim" role="status">connecting</span></header>
<nav aria-label="Requests, the newest first"></nav><main></main>
<script>
  const [list, main, state] = ["nav", "main", "[role=status]"].map(name => document.querySelector(name))
  const all = new Map()  // requests by number, each with its row
  let picked = null  // the number that was clicked; else the newest is shown
  function make(tag, className, ...children) {
    const made = Object.assign(document.createElement(tag), {className})
    made.append(...children)
    return made
  }
  const hue = each => !each.status ? "warn" : each.status < 400 ? "good" : each.status < 500 ? "warn" : "bad"
  const seconds = each => each.seconds === null ? "…" : `${each.seconds.toFixed(3)} s`
  const part = (label, text) => make("div", "part", make("span", "dim", label), make("pre", "", text))
  const titled = (title, parts) => parts.length ? [make("h2", "", title), ...parts] : []
  function said({type, ...fields}) {  // a part of an answer: its texts, or else all of its fields
    if ("name" in fields) return part("call", `${fields.name}(${fields.arguments ?? fields.input ?? ""})`)
    const texts = [...(fields.summaries ?? []), fields.text ?? fields.query ?? JSON.stringify(fields)]
    return part(type.toLowerCase(), texts.filter(Boolean).join("\n"))
  }
  function curl({method, path, query, body}) {
    const quoted = text => "'" + text.replaceAll("'", "'\\''") + "'"
    const json = `-H 'content-type: application/json' -d ${quoted(JSON.stringify(body))}`
    return `curl -NX ${method} ${quoted(location.origin + path + (query && "?" + query))} ` +
      `-H "authorization: Bearer $OPENAI_API_KEY" ${method === "POST" ? json : ""}`
  }
  function drawRow(each) {
    const asked = each.messages.findLast(message => message.role === "user")?.text
    each.row.replaceChildren(
      make("span", "", each.model || `${each.method} ${each.path}`), make("span", hue(each), each.status ?? "…"),
      make("span", "dim", asked || each.api || each.path), make("span", "dim", seconds(each)))
  }
  function drawDetail() {
    const each = all.get(picked) ?? all.get(Math.max(...all.keys()))
    for (const other of all.values()) other.row.setAttribute("aria-current", other === each)
    if (!each) return main.replaceChildren("No request has come yet.")
    const copy = make("button", "copy", "copy as curl")
    copy.onclick = () => navigator.clipboard.writeText(curl(each)).then(() => copy.textContent = "copied")
    const used = each.answer.find(({type}) => type === "Usage"), answered = each.answer.filter(each => each !== used)
    const facts = [each.model, new Date(each.time * 1000).toLocaleTimeString(), each.api, each.stream && "stream",
      seconds(each), used && `${used.prompt_tokens}+${used.completion_tokens} tokens`]
    const conversation = each.messages.flatMap(({role, text, attached, calls}) =>
      [...(text || attached.length ? [part(role, [text, ...attached].join("\n"))] : []), ...calls.map(said)])
    main.replaceChildren(copy,
      make("h1", "", `${each.method} ${each.path} `, make("span", hue(each), each.status ?? "…")),
      make("div", "dim", facts.filter(Boolean).join(" · ")),
      ...titled("Tools", each.tools.map(tool => make("pre", "", tool))),
      ...titled("Conversation", conversation), make("h2", "", "Answer"),
      make("section", each.seconds === null ? "live" : "", ...answered.map(said)),
      make("p", "bad", each.seconds && each.outcome !== "answered" ? each.outcome : ""))
  }
  const events = new EventSource("/_fake/events")
  events.onopen = () => { all.clear(); list.replaceChildren(); state.textContent = "live"; drawDetail() }
  events.onerror = () => state.textContent = "not connected"
  events.onmessage = ({data}) => {
    const news = JSON.parse(data), each = all.get(news.number) ?? {row: make("button", "")}
    if (!each.number) list.prepend(each.row)
    each.row.onclick = () => { picked = picked === news.number ? null : news.number; drawDetail() }
    all.set(news.number, Object.assign(each, news))
    if (all.size > 500) list.lastChild.remove(), all.delete(all.keys().next().value)
    drawRow(each)
    if (picked === null || picked === each.number) drawDetail()
  }
</script>
"""


# ---- HTTP: what arrives ----------------------------------------------------------------------------------------------
# BaseHTTPRequestHandler's own parsing lets smuggled requests through (gh-114782, gh-150499, gh-142533) and is slow, so
# heads and bodies are read here, by RFC 9112, strictly. None of this sees a socket: `_read_request` is a generator that
# reads from a buffer, and yields where it needs more bytes. Every pattern is linear in what it looks at.


class _Refused(APIError):
    """What arrived is not an HTTP request that can be answered; the connection ends with this status."""


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
    guarded: bool  # a page asks, or the journal's own pages are asked for: not everybody may


_REQUEST_LINE = rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])"
_FIELD = rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([\t\x20-\x7e\x80-\xff]*)"
_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%!$&'()*+,;=-]*)(?::[0-9]*)?"
_CHUNK_SIZE = rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?"
_BAD_PERCENT = r"%(?![0-9A-Fa-f]{2})"
_BEGINNING = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]*(?: [\x21-\x7e]*(?: [HTP/0-9.]*)?)?"
_BARE = re.compile(rb"(?<!\r)\n|\r(?!\n)")
_TOO_LARGE = f"The request body is larger than {_MAX_BODY} bytes."


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
    if target.startswith("/") or (target == "*" and method == "OPTIONS"):
        path, _, query = target.partition("?")
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
    headers = _Headers(fields)
    values = headers._fields
    if (http11 and "host" not in values) or not re.fullmatch(_HOST, values.get("host", "")):  # two have a space
        raise _Refused(400, "The request needs one valid Host header field.")
    tokens = [token.strip() for token in values.get("connection", "").lower().split(",")]
    keep_alive = "close" not in tokens and (http11 or "keep-alive" in tokens)
    expects = http11 and "expect" in values
    length = _body_length(fields, values, http11)
    if expects and values["expect"].lower() != "100-continue":
        raise _Refused(417, "The only expectation that is met is 100-continue.")
    coding = ",".join([value for name, value in fields if name == "content-encoding"]).strip().lower()
    guarded = "origin" in values or route == "/" or route.startswith("/_fake")
    return _Head(method, path, query, route, headers, http11, keep_alive, length, expects, coding, guarded)


_parse_known_head = lru_cache(128)(_parse_head)  # a client's heads are the same again and again


def _body_length(fields: list[tuple[str, str]], values: dict[str, str], http11: bool) -> int:
    lengths = {value for name, value in fields if name == "content-length"}
    if "transfer-encoding" in values:
        if lengths or not http11:
            raise _Refused(400, "Transfer-Encoding goes with HTTP/1.1 and without Content-Length.")
        if values["transfer-encoding"].lower() != "chunked":
            raise _Refused(501, "The only transfer coding that is understood is chunked.")
        return -1
    if len(lengths) > 1 or not all(re.fullmatch("[0-9]{1,18}", length) for length in lengths):
        raise _Refused(400, "Content-Length is not one number.")
    length = int(lengths.pop()) if lengths else 0
    if length > _MAX_BODY:
        raise _Refused(413, _TOO_LARGE)
    return length


class _State(IntEnum):
    """Where a connection stands. The order is that of an answer's way, and of what cannot be taken back."""

    IDLE = 0  # between requests
    HEAD = 1  # in the head of a request
    BODY = 2
    ANSWERING = 3  # the request is whole; nothing of the answer is sent
    SENDING = 4  # the head of the answer is
    WEBSOCKET = 5  # frames go both ways
    CLOSING = 6  # we hang up after what is sent
    RESETTING = 7  # we hang up with a RST
    GONE = 8  # the client has closed or reset


@dataclass
class _Inbox:
    """What has come from a client and is not read yet, and the request that is being read."""

    data: bytearray = field(default_factory=bytearray)
    head: _Head | None = None
    body: bytes = b""

    def take(self, count: int) -> bytes:
        taken = bytes(self.data[:count])
        del self.data[:count]  # at the front of a bytearray this copies nothing
        return taken


_Reading: TypeAlias = "Generator[_State | None, None, _T]"  # yields where it waits; None: for 100 Continue first


def _read_request(inbox: _Inbox) -> _Reading[None]:
    """Reads a request: its head, then its body, which stay in the inbox. Raises _Refused for what is none."""
    inbox.head, inbox.body, data = None, b"", inbox.data
    skipped, seen = 0, 0  # empty lines; bytes of the head that are known to be right so far
    while True:
        while seen == 0 and data.startswith(b"\r\n"):  # RFC 9112 2.2
            del data[:2]
            skipped += 1
            if skipped > 4:
                raise _Refused(400, "Too many empty lines before a request.")
        end = data.find(b"\r\n\r\n", max(0, seen - 3))
        if 0 <= end <= _MAX_HEAD - 2:
            break
        if len(data) > 1 or (data and data[0] != 13):  # a lone CR may begin an empty line
            seen = _check_beginning(data[: end + 2] if end >= 0 else data, seen)
        yield _State.HEAD if data else _State.IDLE
    taken = inbox.take(end + 2)
    del data[:2]
    inbox.head = head = _parse_known_head(taken) if len(taken) <= 4096 else _parse_head(taken)
    if head.length:
        if head.expects and not data:
            yield None
        inbox.body = yield from _read_chunks(inbox) if head.length < 0 else _exactly(inbox, head.length)


def _check_beginning(data: bytearray, seen: int) -> int:
    """Refuses the beginning of a head as early as it is known to be wrong: the rest may never come.

    data[:seen] was looked at before; returns how much is looked at now.
    """
    end = len(data) - data.endswith(b"\r")  # the LF may be on its way
    if data.find(b"\r\n", 0, seen) < 0:
        crlf = data.find(b"\r\n", seen - 1 if seen else 0, end)
        line = bytes(data[: end if crlf < 0 else crlf])
        if crlf >= 0 or end > _MAX_LINE:
            _request_line(line)
        elif seen < _READ and not re.fullmatch(_BEGINNING, line[:_READ]):  # it may come by byte
            raise _Refused(400, "The request line is not 'METHOD TARGET HTTP/1.1'.")
    if _BARE.search(data, seen, end):
        raise _Refused(400, "A line of the head does not end with CR LF.")
    if data.find(b"\n", seen) >= 0 and data.count(b"\r\n") > _MAX_FIELDS + 1:
        raise _Refused(431, f"The request has more than {_MAX_FIELDS} header fields.")
    if len(data) > _MAX_HEAD + (2 if data.endswith(b"\r\n\r") else 0):  # what ends the head does not count
        raise _Refused(431, f"The head of the request is larger than {_MAX_HEAD} bytes.")
    return end


def _exactly(inbox: _Inbox, count: int) -> _Reading[bytes]:
    while len(inbox.data) < count:
        yield _State.BODY
    return inbox.take(count)


def _read_line(inbox: _Inbox) -> _Reading[bytes]:
    """A line of the chunked coding, without its CR LF."""
    while (end := inbox.data.find(b"\n", 0, _MAX_CHUNK_LINE)) < 0:
        if len(inbox.data) > _MAX_CHUNK_LINE:
            raise _Refused(400, f"A line of the chunked body is longer than {_MAX_CHUNK_LINE} bytes.")
        yield _State.BODY
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
            raise _Refused(413, _TOO_LARGE)
        if size == 0:
            break
        body += yield from _exactly(inbox, size)
        if (yield from _exactly(inbox, 2)) != b"\r\n":
            raise _Refused(400, "A chunk is not as long as it says.")
    trailers: list[bytes] = []
    while len(trailers) <= _MAX_FIELDS and (line := (yield from _read_line(inbox))):
        trailers.append(line)
    _field_pairs(trailers)
    return bytes(body)


def _decoded(body: bytes, coding: str) -> bytes:
    """A body without its Content-Encoding. Raises APIError, as the connection stays in step."""
    if coding in ("", "identity"):
        return body
    decoder: Any
    if coding == "zstd":
        try:
            decoder = import_module("compression.zstd").ZstdDecompressor()  # Python 3.14
        except ImportError:
            raise APIError(415, "Unsupported Content-Encoding: 'zstd'.") from None
    elif coding == "deflate":  # zlib's format (RFC 9110 8.4.1.2), but some send it bare, which does not begin with 0x?8
        decoder = zlib.decompressobj(15 if (body[:1] or b"\0")[0] & 15 == 8 else -15)
    elif coding in ("gzip", "x-gzip"):
        decoder = zlib.decompressobj(31)
    else:
        raise APIError(415, f"Unsupported Content-Encoding: {coding!r}. Use gzip, deflate or none.")
    most = min(_MAX_BODY, max(_MAX_INFLATED, 200 * len(body)))
    data = b""
    with suppress(Exception):  # zlib.error, ZstdError: then it is not at its end
        data = decoder.decompress(body, most + 1)
    if len(data) > most:
        raise APIError(413, f"The request body of {len(body)} bytes is larger than {most} bytes when it is decoded.")
    if not decoder.eof or decoder.unused_data:
        raise APIError(400, "The request body is not what its Content-Encoding says.")
    return data


# ---- HTTP: WebSocket -------------------------------------------------------------------------------------------------
# Responses over a WebSocket (RFC 6455). The reader of frames is a generator over the inbox, as that of requests is. The
# connection's own thread reads; what it is asked to create runs in lanes, on threads of theirs.

_TEXT, _BINARY, _CLOSE, _PING, _PONG = 1, 2, 8, 9, 10  # opcodes; 0 goes on with a message
_CODES = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}  # of a Close (RFC 6455 7.4)
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 1.3
_MAX_ACTIVE = 16  # responses that a connection makes at the same time; more wait (S)
_MAX_LANES = 32  # names of lanes that a connection may use (S)
_STUBS = {"function_call": ("call_id", "name"), "custom_tool_call": ("call_id",)}  # what names the output of a call (S)
_LANE_FAULT = "Invalid 'stream_id': expected 1 to 256 characters of A to Z, a to z, 0 to 9, '_', '.' and '-'."
_LANES_FAULT = f"A connection may use {_MAX_LANES} distinct stream_ids."
_TOO_OLD = "Responses websocket connection limit reached (60 minutes). Create a new websocket connection to continue."


def _frame(opcode: int, data: bytes) -> bytes:
    """A message in one frame; a server does not mask."""
    size = len(data)
    if size < 126:
        return bytes((128 | opcode, size)) + data
    long = size >= 1 << 16
    return struct.pack("!BBQ" if long else "!BBH", 128 | opcode, 126 + long, size) + data


class _Closing(Exception):
    """The WebSocket ends with this code (RFC 6455 7.4); 1005 is none."""

    def __init__(self, code: int, reason: str = "") -> None:
        self.frame = _frame(_CLOSE, b"" if code == 1005 else code.to_bytes(2, "big") + reason.encode())


def _read_messages(inbox: _Inbox) -> Generator[_State | tuple[int, bytes] | None]:
    """Yields opcode and data of messages, and of control frames among them; a state where it waits. Raises _Closing."""
    begun, fragments = 0, bytearray()  # opcode and data of the message that is being read
    while True:
        first, second = yield from _exactly(inbox, 2)
        final, opcode, length = first >> 7, first & 15, second & 127
        control = opcode >= _CLOSE
        for wrong, reason in (
            (first & 0x70, "A reserved bit is set, but no extension was agreed on."),
            (opcode not in (0, _TEXT, _BINARY, _CLOSE, _PING, _PONG), f"The opcode {opcode} is reserved."),
            (second < 128, "A client's frame must be masked."),
            (control and (length > 125 or not final), "A control frame is one frame of at most 125 bytes."),
            (not control and bool(opcode) == bool(begun), "A message begins in another, or goes on before it began."),
        ):
            if wrong:
                raise _Closing(1002, reason)
        if length > 125:
            length = int.from_bytes((yield from _exactly(inbox, 2 if length == 126 else 8)), "big")
        if length >> 63:
            raise _Closing(1002, "The highest bit of a length is set.")
        if not control and len(fragments) + length > _MAX_BODY:
            raise _Closing(1009, f"The message is larger than {_MAX_BODY} bytes.")
        mask = (yield from _exactly(inbox, 4)) * (length // 4 + 1)
        masked = int.from_bytes((yield from _exactly(inbox, length)), "big")
        data = (masked ^ int.from_bytes(mask[:length], "big")).to_bytes(length, "big")
        if not control:
            begun = begun or opcode
            fragments += data
            if not final:
                continue
            opcode, data, begun, fragments = begun, bytes(fragments), 0, bytearray()
        if opcode == _CLOSE and data and int.from_bytes(data[:2], "big") not in _CODES:
            raise _Closing(1002, "A Close frame begins with a code that may not be sent.")
        try:
            if opcode in (_TEXT, _CLOSE):
                data[0 if opcode == _TEXT else 2 :].decode()
        except UnicodeDecodeError:
            raise _Closing(1007, "The text is not UTF-8.") from None
        yield opcode, data


def _names(headers: Mapping[str, str], field: str, token: str) -> bool:
    return token in re.split(r"[\t ]*,[\t ]*", headers.get(field, "").lower())


def _upgrade_required() -> APIError:
    text = "Expected the handshake of a WebSocket, version 13, on /v1/responses; use POST for an answer over HTTP."
    return APIError(426, text, headers={"upgrade": "websocket", "sec-websocket-version": "13"})


@dataclass(eq=False)
class _LaneTurn:
    """A response that a lane is to make, makes, or has made, which its connection remembers."""

    lane: Any  # None has no name
    request: Request
    warms: bool = False  # makes nothing, but can be gone on with
    fault: APIError | None = None  # with what the client said of the lane
    encoder: _ResponsesEncoder = field(init=False)
    history: _History = _NO_HISTORY  # up to the end of this response
    ended: bool = False
    steers: list[tuple[_JSON, list[Any]]] = field(default_factory=list[Any])  # input that waits for the end

    def steered(self) -> list[Any]:
        """The input that has waited."""
        steers, self.steers = self.steers, []
        return [item for _, items in steers for item in items]

    def routed(self, event: _Event) -> str:
        """An event as JSON, with the name of its lane."""
        return _dumps(event if self.lane is None else {**cast(_JSON, event), "stream_id": self.lane})


class _MessageSink(_StreamSink):
    """Messages of a WebSocket: each event is one, as bare JSON; so are the bytes of a Raw."""

    def __init__(self, websocket: _WebSocket, turn: _LaneTurn, reply: Reply) -> None:
        super().__init__(turn.encoder, websocket.connection, reply)
        self.websocket = websocket
        self.request = turn.request
        self.render = turn.routed

    @property
    def begun(self) -> bool:
        return self.request._status == 200

    def _pack(self, texts: list[str]) -> bytes:
        return b"".join(self._wrap(_utf8(text)) for text in texts)

    def _wrap(self, data: bytes) -> bytes:
        return _frame(_TEXT, data)

    def flush(self, last: bool = False) -> None:
        pending, self.pending, self.size = self.pending, [], 0
        if pending:
            self.request._status = 200
            self.websocket.push(b"".join(pending))

    def cut(self, reset: bool) -> None:
        super().cut(reset)
        self.websocket.fake._flying.pop(id(self.request), None)
        with suppress(OSError):
            self.connection.sock.shutdown(socket.SHUT_RD)  # the connection's thread sees it, and ends

    def break_off(self, error: APIError) -> None:
        self.fail(error)  # other lanes go on

    def _finish(self) -> None:
        self.websocket.fake._flying.pop(id(self.request), None)
        self.flush()


class _WebSocket:
    """The WebSocket of a connection: reads what the client wants, and answers in lanes."""

    def __init__(self, fake: FakeOpenAI, request: Request) -> None:
        """The endpoint. Raises APIError for what is no handshake (RFC 6455 4.2)."""
        self.fake = fake
        self.connection = connection = cast("_Connection", request._connection)
        headers = request.headers
        key, version = headers.get("sec-websocket-key", ""), headers.get("sec-websocket-version")
        fits = re.fullmatch("[A-Za-z0-9+/]{22}==", key) and version == "13"  # a key of 16 bytes
        if not (fits and connection.http11 and _names(headers, "connection", "upgrade")):
            raise _upgrade_required()
        self.accept = b2a_base64(hashlib.sha1(key.encode() + _GUID).digest(), newline=False)
        self.turns: dict[str, _LaneTurn] = {}  # by id, stored or not; each access is one operation
        self.sending = threading.Lock()  # guards the writing side: frames go out whole
        self.lock = threading.Lock()  # guards the fields below, and `ended` and `steers` of turns
        self.lanes: set[str | None] = set()  # that were used
        self.busy: set[str | None] = set()  # of them, those that are being served
        self.waiting: list[_LaneTurn] = []

    def send(self, connection: _Connection) -> None:
        """Accepts, and serves until one side closes."""
        connection.asked._status, last = 101, b""
        head = b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: %b\r\n" % self.accept
        connection.send(_STATUS_LINES[101] + head + _date_field(int(_Clock.time())) + b"\r\n")
        connection.websocket, connection.state = self, _State.WEBSOCKET
        connection.until = connection.deadline = _Clock.monotonic() + connection.server.limits[_State.WEBSOCKET]
        try:
            self._serve()
        except _Closing as closing:
            last = closing.frame
        except (_Gone, EOFError, OSError):
            if connection.state not in (_State.CLOSING, _State.RESETTING):  # which a Disconnect made it
                connection.state = _State.GONE
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)  # ends a write that is blocked
        with self.sending, suppress(_Gone):  # also waits for who sends just now: then the socket is closed
            if last and not connection.gone:
                connection.send(last)
                connection.state = _State.GONE
        for waiter in tuple(connection.server.waiters):
            if waiter.connection is connection:
                waiter.wake()
        if last:
            connection._linger()

    def push(self, frames: bytes) -> None:
        """Sends whole frames. Raises _Gone where one side has closed."""
        with self.sending:
            if self.connection.gone or self.connection.server.stopping:
                raise _Gone
            self.connection.send(frames)

    def go_away(self) -> None:
        """Says that the server stops, unless a write is blocked, which has a deadline of its own."""
        if self.connection.deadline == self.connection.until and self.sending.acquire(timeout=0.05):
            with suppress(OSError):
                self.connection.sock.send(_Closing(1001, "The server stops.").frame, _DONT_WAIT)
            self.sending.release()

    def _serve(self) -> None:
        connection = self.connection
        for step in _read_messages(connection.inbox):
            if isinstance(step, tuple):
                self._take(*step)
            elif data := connection.sock.recv(_BATCH):
                connection.inbox.data += data
            elif _Clock.monotonic() >= connection.until:  # the server's loop has ended the input
                self._refuse(APIError(400, _TOO_OLD, code="websocket_connection_limit_reached"))
                raise _Closing(1000)
            else:
                raise EOFError

    def _take(self, opcode: int, data: bytes) -> None:
        if opcode == _CLOSE:
            raise _Closing(int.from_bytes(data[:2], "big") if data else 1005)
        if opcode == _PING:
            self.push(_frame(_PONG, data))
        elif opcode != _PONG:
            try:
                if opcode == _BINARY:
                    raise APIError(400, "Expected JSON in a text message, but got a binary message.")
                event = Request("responses", "", "", "", {}, data)._parse()
                kinds = {"response.create": self._create, "response.steer": self._steer}
                kind = str(event.get("type"))
                if kind not in kinds:
                    raise _unsupported("type", kind, kinds)
                kinds[kind](event)
            except APIError as error:
                self._refuse(error)

    def _create(self, event: _JSON) -> None:
        lane, generate, _ = (event.pop(name, None) for name in ("stream_id", "generate", "type"))
        with self.lock:
            parent = self.turns.get(_string(event.get("previous_response_id")))
            if parent is not None and parent.ended and parent.lane == lane and parent.steers:
                event["input"] = [*parent.steered(), *_input_items(event.get("input"))]
            turn = _LaneTurn(lane, self._request(event), generate is False)
            if lane is not None and not re.fullmatch("[A-Za-z0-9_.-]{1,256}", _string(lane)):
                turn.fault = APIError(400, _LANE_FAULT, param="stream_id", code="invalid_stream_id")
            elif len(self.lanes | {None, lane}) > 1 + _MAX_LANES:
                turn.fault = APIError(400, _LANES_FAULT, param="stream_id", code="websocket_stream_limit_reached")
            else:
                self.lanes.add(lane)
                self.waiting.append(turn)
        if turn.fault is not None:
            self._respond(turn)
        elif lane not in self.busy:  # else the thread that serves it goes on with this
            try:
                self.connection.server.run(self._work)
            except RuntimeError:
                raise _Closing(1011, "The server has no more threads.") from None

    def _work(self) -> None:
        """A thread: answers as long as there is something that may begin, which is one response in each lane."""
        while True:
            with self.lock:
                turn = next((turn for turn in self.waiting if turn.lane not in self.busy), None)
                if turn is None or len(self.busy) == _MAX_ACTIVE:
                    return
                self.waiting.remove(turn)
                self.busy.add(turn.lane)
            self._respond(turn)
            with self.lock:
                self.waiting[:0] = self._successors(turn)
                self.busy.discard(turn.lane)

    def _request(self, body: _JSON) -> Request:
        """The request that has come with this body, as if it were that of a POST for a stream."""
        opened, raw_body = self.connection.asked, _utf8(_dumps({**body, "stream": True}))
        request = Request("responses", opened.method, opened.path, opened.query, opened.headers, raw_body)
        request._connection, request._deployment, request._remembered = self.connection, opened._deployment, self.turns
        self.fake._arrive(request)
        return request

    def _respond(self, turn: _LaneTurn) -> None:
        fake, request, began = self.fake, turn.request, _Clock.perf_counter()
        parent = self.turns.get(_string(request._json.get("previous_response_id")))

        def make_sink(encoder: _ResponsesEncoder, connection: _Connection, reply: Reply) -> _Sink:
            turn.encoder = encoder
            items = request._told()[1]
            turn.history = _History(request._before, lambda: [*items, *encoder.output()])
            fake._remember(self.turns, encoder.id, turn)
            return _MessageSink(self, turn, reply)

        try:
            if self.connection.gone:
                raise _Gone
            if turn.fault is not None:
                raise turn.fault
            if request._json.get("background") is True:
                words = "Not supported over WebSocket: 'background'."
                raise APIError(400, words, param="background", code="unsupported_parameter")
            delivery: _Delivery = _create_response(fake, request)
            if turn.warms:
                delivery.handler = lambda request: Usage(_estimate(request._items), 0)
            delivery.make_sink = make_sink
            delivery.send(self.connection)
        except APIError as error:
            self._refuse(error, turn)
        except _Gone:
            request._outcome = request._outcome or "client left"
            _LOG.info("%s %s: the client left, the answer stopped", request.method, request.path)
        except BaseException as error:  # the handler's fault: or else this server's own
            self._refuse(APIError(500, fake._keep_error(error, request)), turn)
        finally:
            if request._outcome and parent is not None and parent.lane == turn.lane:  # a fork's failure spares it (S)
                self.turns.pop(parent.encoder.id, None)
            fake._ended(request, began)
            request._forget()

    def _steer(self, event: _JSON) -> None:
        id, given = _string(event.get("previous_response_id")), event.get("input")
        items, turn = [_dict(item) for item in _input_items(given)], self.turns.get(id)
        by_user = [_item_type(item) == "message" and item.get("role") == "user" for item in items]
        with self.lock:
            for wrong, code, message in (
                (turn is None, "response_not_found", f"Response with id '{id}' not found on this connection."),
                (not items or not all(by_user), "invalid_input", "Expected input of text, or of messages by the user."),
                (turn and turn.ended, "response_already_completed", f"The response '{id}' has ended."),
                (turn and turn.encoder.base.get("conversation"), "steering_not_supported", "It is of a conversation."),
            ):
                if wrong:
                    self._fail_steer(turn, {"input": given, "previous_response_id": id}, code, message)
                    return
            steer = {"id": f"steer_{self.fake._ids().hex(48)}", "previous_response_id": id}
            self._tell_steer("accepted", turn, steer)
            cast(_LaneTurn, turn).steers.append((steer, items))

    def _successors(self, turn: _LaneTurn) -> list[_LaneTurn]:
        """What steering makes of a response that has ended: one that goes on with it, or none. Needs the lock."""
        turn.ended = True
        if not turn.steers or self.connection.gone:
            return []
        encoder = turn.encoder
        if encoder.status not in ("completed", "incomplete"):
            for steer, items in turn.steers:
                self._fail_steer(turn, {**steer, "input": items}, "response_not_active", "The response failed.")
            turn.steers = []
        elif calls := [item for item in encoder.output() if item["type"] in _STUBS]:  # it waits for their outputs
            stubs = [
                {"type": f"{call['type']}_output", **{key: call[key] for key in _STUBS[call["type"]]}} for call in calls
            ]
            for steer, _ in turn.steers:
                self._tell_steer("pending", turn, steer, reason="waiting_for_required_input", required_input=stubs)
        else:
            body = {**encoder.asked, "input": turn.steered(), "previous_response_id": encoder.id}
            return [_LaneTurn(turn.lane, self._request(body))]
        return []

    def _fail_steer(self, turn: _LaneTurn | None, steer: _JSON, code: str, message: str) -> None:
        error = {"code": code, "message": message, "type": "invalid_request_error"}
        self._tell_steer("failed", turn, steer, error=error)

    def _tell_steer(self, kind: str, turn: _LaneTurn | None, steer: _JSON, **fields: Any) -> None:
        number = 0 if turn is None else turn.encoder.number
        self._tell({"type": f"response.steer.{kind}", **fields, "sequence_number": number, "steer": steer}, turn)

    def _refuse(self, error: APIError, turn: _LaneTurn | None = None) -> None:
        """Sends an error in the place of an answer."""
        told = error._error() | ({"headers": error.headers} if error.headers else {})
        if turn is not None:
            turn.request._status, turn.request._outcome = error.status, error.message
            self.fake._flying.pop(id(turn.request), None)
        self._tell({"type": "error", "status": error.status, "error": told}, turn)

    def _tell(self, event: _JSON, turn: _LaneTurn | None) -> None:
        """Sends an event of the connection's own, if the client is still there."""
        with suppress(_Gone):
            self.push(_frame(_TEXT, _utf8(_dumps(event) if turn is None else turn.routed(event))))


_endpoint("GET /responses")(_WebSocket)


# ---- HTTP: connections and the server --------------------------------------------------------------------------------


class _HTTPResponse(NamedTuple):
    """A whole HTTP response, 200 unless said otherwise, that no encoder makes: body, status, more header fields."""

    body: bytes
    content_type: str = "application/json"
    status: int = 200
    headers: Mapping[str, str] = {}

    def send(self, connection: _Connection) -> None:
        """Answers on a connection."""
        connection.send_whole(self.body, self.status, self.content_type, _USUAL, self.headers)


class _Connection(BaseRequestHandler):
    """One client's connection: reads requests, one after another, and answers them in order."""

    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]  # typeshed's is the base class's

    def setup(self) -> None:
        self.sock: socket.socket = self.request  # socketserver calls it so
        self.inbox = _Inbox()
        self.state = _State.IDLE
        self.deadline = math.inf  # when the server's loop ends what this connection waits for
        self.websocket: _WebSocket | None = None
        self.until = math.inf  # when a WebSocket's time is over
        self.http11 = True
        self.asked: Request  # what is being answered
        self.started = 0.0  # since when
        self.server.connections.add(self)

    def handle(self) -> None:
        """Answers requests until the connection ends."""
        try:
            self.sock.settimeout(None)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not self.server.stopping and self.state < _State.CLOSING:
                self._serve_one()
        except (_Gone, OSError):
            pass

    def finish(self) -> None:
        self.server.connections.discard(self)
        with suppress(OSError):
            if self.state is _State.RESETTING:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.sock.close()
            elif self.state is not _State.GONE:  # not only close(): a forked child may hold a copy
                self.sock.shutdown(socket.SHUT_WR)

    # Reading.

    @property
    def gone(self) -> bool:
        """Whether the client has closed or reset; in a WebSocket, whether any side has."""
        return self.state >= (_State.GONE if self.websocket is None else _State.CLOSING)

    def _read(self) -> None:
        """Reads a request into the inbox. Raises _Refused for what is none, EOFError where the input ends."""
        for state in _read_request(self.inbox):
            if state is None:
                self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                continue
            if state is not self.state or self.deadline == math.inf:  # the time runs from the beginning of the state
                self.state = state
                self.deadline = _Clock.monotonic() + self.server.limits[state]
            data = self.sock.recv(_BATCH if state is _State.BODY else _READ)
            if not data:
                raise EOFError
            self.inbox.data += data

    def _glance(self, size: int, flags: int = 0) -> bytes | None:
        """What has come, without waiting for it: b"" where the client has closed or reset, None where nothing has."""
        try:
            if _DONT_WAIT or select.select([self.sock], [], [], 0)[0]:
                return self.sock.recv(size, flags | _DONT_WAIT)
        except BlockingIOError:
            pass
        except (OSError, ValueError):
            return b""
        return None

    def read_ahead(self) -> bool:
        """Reads what has come behind the request that is being answered. Returns whether the client is there still."""
        data = self._glance(_BATCH)
        self.inbox.data += data or b""
        if data == b"" or len(self.inbox.data) > _MAX_HEAD + _MAX_BODY:  # sends without end what nobody will read
            self.state = _State.GONE
        return not self.gone

    def peer_gone(self) -> bool:
        """Whether the client has closed, seen without reading."""
        if not self.gone and self._glance(1, socket.MSG_PEEK) == b"":
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
            self.server.fake._flying.pop(id(self.asked), None)
        try:
            try:
                sent = self.sock.send(data, _DONT_WAIT)
            except BlockingIOError:
                sent = 0
            rest = memoryview(data)[sent:] if sent < len(data) else None
            while rest:  # in pieces: who reads steadily may take its time
                self.deadline = _Clock.monotonic() + self.server.limits[_State.SENDING]
                rest = rest[self.sock.send(rest[:_BATCH]) :]
        except OSError:
            self.state = _State.GONE
            raise _Gone from None
        finally:
            self.deadline = self.until

    def hang_up(self, reset: bool) -> None:
        """Ends the connection after what is sent."""
        self.state = max(self.state, _State.RESETTING if reset else _State.CLOSING)

    def head(
        self, status: int, content_type: str, usual: bytes, fields: Mapping[str, str] = {}, length: int | None = None
    ) -> bytes:
        """The head of an answer, with that length, or of a stream, whose end tells its length."""
        fake, asked = self.server.fake, self.inbox.head
        fields = fields and _header_fields(fields)  # again: those of a Reply may have been changed
        self.asked._status = status
        if length is None and not self.http11:
            self.hang_up(False)  # the end of the connection ends the stream
        closes = asked is None or not asked.keep_alive or self.state >= _State.CLOSING
        head = _fixed_fields(status, content_type, usual, fake.cors, closes) + _date_field(int(_Clock.time()))
        head += b"x-request-id: req_%032x\r\n" % fake._ids().bits(128)
        if usual != _GATEWAY:
            head += b"openai-processing-ms: %d\r\n" % ((_Clock.perf_counter() - self.started) * 1000)
        if fields:
            head = _with_fields(head, fields)
        if length is not None:
            return head + (b"\r\n" if status == 204 else b"content-length: %d\r\n\r\n" % length)
        return head + (b"transfer-encoding: chunked\r\n\r\n" if self.http11 else b"\r\n")

    def send_whole(self, body: bytes, status: int, content_type: str, usual: bytes, fields: Mapping[str, str]) -> None:
        """Sends an answer that is known."""
        head = self.head(status, content_type, usual, fields, len(body))
        self.send(head if self.asked.method == "HEAD" or status == 204 else head + body, last=True)

    def _send_error(self, error: APIError) -> None:
        """Answers with an error of the API, in the form of who sends it there: the gateway or the application."""
        try:
            fields = _header_fields(error.headers)  # again: they may have been changed
        except (TypeError, ValueError) as wrong:
            self._send_fault(wrong)
            return
        status, request, content_type = error.status, self.asked, "application/json"
        unknown_model = status == 404 and error.code == "model_not_found" and error.param is None
        usual = _ON_REPLIES if request.api == "chat.completions" else _USUAL
        if request.api != "responses" and (status == 401 or unknown_model):
            usual, content_type = _GATEWAY, "application/json; charset=utf-8"
        elif status == 401:
            usual = _VERSION
            fields.setdefault("www-authenticate", 'Bearer realm="OpenAI API"')
        request._outcome = request._outcome or error.message  # before its client can look
        self.send_whole(_utf8(_dumps({"error": error._error()})), status, content_type, usual, fields)

    def _send_fault(self, error: BaseException) -> None:
        """Answers with what the handler did wrong, and keeps it for the test."""
        message = self.server.fake._keep_error(error, self.asked)
        self._send_error(APIError(500, message, headers={"x-should-retry": "false"}))

    # One request and its answer.

    def _serve_one(self) -> None:
        self.state, self.deadline = _State.IDLE, math.inf
        try:
            self._read()
        except EOFError:
            if _Clock.monotonic() >= self.deadline and (self.inbox.head is not None or self.inbox.data):
                self._refuse(_Refused(408, "The request did not arrive in time."))  # the server's loop ended the input
            elif self.inbox.head is not None:
                self._refuse(_Refused(400, "The connection was closed before the request body was whole."))
            else:
                self.state = _State.GONE
        except _Refused as refused:
            self._refuse(refused)
        else:
            self.state, self.deadline = _State.ANSWERING, math.inf
            # in a context of its own: what a handler sets ends with it
            Context().run(self._answer, cast(_Head, self.inbox.head), self.inbox.body)

    def _refuse(self, refused: _Refused) -> None:
        self.state, self.deadline = _State.CLOSING, math.inf
        self.started = _Clock.perf_counter()
        head = self.inbox.head
        method, path = (head.method, head.path) if head is not None else ("", "")
        self.asked = Request("", method, path, "", {})
        with suppress(_Gone):
            self._send_error(refused)
        self.server.fake._recent.append(self.asked)
        self.server.fake._ended(self.asked, self.started)
        self._linger()

    def _linger(self) -> None:
        """Reads what the client still sends, for a while: closing at once would reset, and destroy the reply."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            end = _Clock.monotonic() + 1.0
            while (rest := end - _Clock.monotonic()) > 0:
                self.sock.settimeout(rest)
                if not self.sock.recv(_BATCH):
                    break

    def _answer(self, head: _Head, raw_body: bytes) -> None:
        fake = self.server.fake
        self.started = _Clock.perf_counter()
        self.http11 = head.http11
        route = fake._router.find(head.method, head.route)
        self.asked = request = Request(route.api, head.method, head.path, head.query, head.headers, raw_body)
        request._connection = self
        request._deployment = route.deployment
        opens = head.method == "GET" and _names(head.headers, "upgrade", "websocket")
        if not (opens or route.control):  # of a WebSocket the creates are what the client asks
            fake._arrive(request)
        try:
            if head.coding:
                request.raw_body = _decoded(raw_body, head.coding)
            if head.guarded or route.control:
                fake._check_page(request, "/" if route.control else head.route)
            if fake.api_key is not None and not route.control:
                fake._check_key(request)
            if opens != (route.endpoint is _WebSocket):
                raise _upgrade_required()
            endpoint = _preflight if fake.cors and head.method == "OPTIONS" else route.endpoint
            answer = endpoint(fake, request, *route.values)
            if isinstance(answer, dict):
                answer = _HTTPResponse(_utf8(_dumps(cast(_JSON, answer))))
            answer.send(self)
        except APIError as error:
            if opens:
                fake._arrive(request)
            self._send_error(error._shared())
        except _Gone:
            request._outcome = request._outcome or "client left"
            self.hang_up(False)
            _LOG.info("%s %s: the client left, the answer stopped", head.method, head.path)
        except BaseException as error:  # the handler's fault: or else this server's own
            self._send_fault(error)
        finally:
            if not route.control:
                fake._ended(request, self.started)
            request._forget()
        if not head.keep_alive:
            self.hang_up(False)


# seconds that a connection may take: for reading in each state, for a write that makes no progress, as a WebSocket (S)
_LIMITS = {_State.IDLE: 60.0, _State.HEAD: 10.0, _State.BODY: 20.0, _State.SENDING: 20.0, _State.WEBSOCKET: 3600.0}
_DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)  # Windows has none: there a slow client is waited for in send()


class _Server(ThreadingHTTPServer):
    """The listener, its loop, and the threads that connections run on, which are used again. To make one starts it."""

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
        self.threads: WeakSet[threading.Thread] = WeakSet()  # those that run hold themselves
        self.jobs: queue.SimpleQueue[tuple[socket.socket, Any] | None] = queue.SimpleQueue()
        self.sockets: set[socket.socket] = set()  # of all connections, also of those that wait for a thread
        self.idle = threading.Semaphore(0)  # counts the threads that wait for a job, and were promised none
        self.lock = threading.Lock()  # guards threads
        self.address_family, address = _address(host, port)
        self.waker, self.alarm = socket.socketpair()
        self.selector = selectors.DefaultSelector()
        super().__init__(address, _Connection)
        self.socket.setblocking(False)
        self.waker.setblocking(False)
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD)
        self.selector.register(self.socket, selectors.EVENT_READ)
        self.selector.register(self.waker, selectors.EVENT_READ)
        self.thread = threading.Thread(target=self.serve_forever, name="openai_fake", daemon=True)
        try:
            self.thread.start()
        except BaseException:
            self.server_close()
            raise

    def server_bind(self) -> None:
        if self.fake._reuse_port:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        TCPServer.server_bind(self)  # HTTPServer's own asks for the host's name, which can take half a minute
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """The loop: accepts, tells waiters that their client did something, and looks at deadlines."""
        listener, sweep = self.socket, math.inf
        while not self.stopping:  # before the select: its wake-up may have been read together with another
            now = _Clock.monotonic()
            if self.sockets:
                sweep = min(sweep, now + self.sweep)
            for key, _ in self.selector.select(None if sweep == math.inf else max(0.0, sweep - now)):
                if key.fileobj is listener:
                    if not self._accept():
                        self.selector.unregister(listener)
                        sweep = _Clock.monotonic() + 0.1  # out of descriptors: try again when some may be free
                elif key.fileobj is self.waker:
                    self.waker.recv(4096)
                else:
                    self.unwatch(cast(socket.socket, key.fileobj))
                    key.data.notice()
            now = _Clock.monotonic()
            if now >= sweep:
                sweep = math.inf
                self._sweep(now)
                with suppress(KeyError):  # it is there
                    self.selector.register(listener, selectors.EVENT_READ)

    def _accept(self) -> bool:
        """Accepts one connection, for a thread that waits or a new one; False if that is not possible now."""
        try:
            sock, address = self.socket.accept()  # one: the next select tells of others
        except (BlockingIOError, ConnectionError):
            return True
        except OSError:
            return self.stopping
        self.sockets.add(sock)
        try:
            if not self.idle.acquire(blocking=False):
                self.run(self._work, "openai_fake connection")
        except RuntimeError:  # no more threads: this connection is lost, the server is not
            self.shutdown_request(sock)
        else:
            self.jobs.put((sock, address))
        return True

    def _sweep(self, now: float) -> None:
        for connection in tuple(self.connections):
            if now >= connection.deadline:
                # a read sees the end; a blocked write, which has a deadline of its own, must see more
                reads = connection.state < _State.ANSWERING or connection.deadline == connection.until
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

    def run(self, function: Callable[[], None], name: str = "openai_fake background") -> None:
        """Runs a function on a thread that stop() waits for. Raises RuntimeError where there can be no more threads."""
        thread = threading.Thread(target=function, name=name, daemon=True)
        with self.lock:  # whoever finds it in `threads` can join it
            thread.start()
            self.threads.add(thread)

    def _work(self) -> None:
        """A connection thread: takes jobs until none has come for a second."""
        while True:
            try:
                job = self.jobs.get(timeout=1.0)
            except queue.Empty:
                if self.idle.acquire(blocking=False):  # else a job is on its way
                    return
                continue
            if job is None:
                return
            self.process_request_thread(*job)
            self.idle.release()

    def shutdown_request(self, request: Any) -> None:
        self.sockets.discard(request)
        self.close_request(request)  # its handler has shut it down

    def handle_error(self, request: Any, client_address: Any) -> None:
        _LOG.exception("a connection failed in the server itself")

    def server_close(self) -> None:
        super().server_close()
        for each in (self.selector, self.waker, self.alarm):
            each.close()

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
        for connection in tuple(self.connections):
            if connection.websocket is not None:
                connection.websocket.go_away()
        for sock in tuple(self.sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for waiter in tuple(self.waiters):
            waiter.wake()
        with self.lock:
            others = [thread for thread in self.threads if thread is not current]
        end = _Clock.monotonic() + _STOP_SECONDS
        for _ in (current, *others):
            self.jobs.put(None)
        for thread in others:
            thread.join(max(0.0, end - _Clock.monotonic()))
        return [thread for thread in others if thread.is_alive()]


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


@dataclass(eq=False)
class FakeOpenAI:
    """A server that answers like OpenAI's API, with what `handler` says. Use it in `with`, or `start` and `stop` it.

    - `host`, `port`: where to listen; port 0 is any free one.
    - `api_key`: when it is set, requests with another key, or none, get the API's 401.
    - `validate`: refuse much of what the real API refuses; `strict`: also parameters and models that it does not know.
    - `ttft`, `itl`: seconds to the first token, and between tokens; to and between the pieces of a route, too.
    - `models`: what GET /models lists.
    - `routes`: more endpoints, or others: `{"POST /audio/speech": function}`. A function takes the Request and returns
      what is sent as JSON, or bytes, or an iterator of bytes or str that is sent as it comes, or one of these with a
      status and headers, `(201, {"content-type": "text/csv"}, "a,b")`, or an APIError. A {name} is any one segment.
    - `keep`: how many are kept of each: requests, stored answers, turns, and `errors`, the first; None keeps all.
    - `cors`: answer browsers of any origin; without it those of other sites get a 403.
    - `seed`, `clock`: ids and times come from them, and are the same in every run. `clock` returns unix seconds.
    - `embeddings`: takes a text and returns its vector; without it, texts that share words are near each other.

    Options can be set later, but for host, port, routes and keep. What went wrong in the fake so far is in `errors`;
    `stop` raises the first. Raises TypeError for what is no handler, ValueError for a route that is not "METHOD /path".
    """

    handler: Handler = echo
    _: KW_ONLY
    host: str = "127.0.0.1"
    port: int = 0
    api_key: str | None = None
    validate: bool = True
    strict: bool = False
    ttft: float = 0.0
    itl: float = 0.0
    models: Sequence[str] | None = None
    routes: Mapping[str, Callable[[Request], object]] | None = None
    keep: int | None = None
    cors: bool = False
    seed: int | None = None
    clock: Callable[[], float] = time.time
    embeddings: Callable[[str], Sequence[float]] | None = None
    _server: _Server | None = field(default=None, init=False)
    _control: _Control | None = field(default=None, init=False)
    _reuse_port: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not callable(self.handler):
            raise TypeError(
                f"a handler is a function that takes a Request, not {self.handler!r}; Script(...) makes one of answers"
            )
        _check_fields(self, host=(self.host, str), port=(self.port, int))
        _check_fields(self, api_key=(self.api_key, _WORD), keep=(self.keep, _NUMBER))
        if isinstance(self.models, str):
            raise TypeError(f"FakeOpenAI wants a list of names for models, not {self.models!r}")
        self.errors: list[BaseException] = []
        self._warned: set[str] = set()  # tools that were called, but not offered
        own = _own_routes(self.routes or {})
        self._router = _Router({**own, **_ENDPOINTS, **own})  # they come first, and win
        self._journal: deque[Request] = deque(maxlen=self.keep)
        self._count = 0
        self._lock = threading.Lock()  # guards _count and _streams
        self._arrived = threading.Condition(self._lock)  # tells that a request came
        self._flying: dict[int, Request] = {}
        self._recent: deque[Request] = deque(maxlen=19 if self.keep is None else min(19, self.keep))  # for transcript()
        self._streams: WeakSet[Stream] = WeakSet()  # that did not end; what nobody holds, nobody can close
        self._interrupted: list[Stream] = []  # of them, those that stop() cut: held, so that they are told
        self._observe: Callable[[Request], None] | None = None
        self._unseeded = _Ids(random.Random().getrandbits)
        self._numbers = iter(range(sys.maxsize))
        # Stores without a lock: each access is one operation of a dict, or goes over a copy.
        self._responses: dict[str, _StoredResponse] = {}
        self._histories: dict[int, _History] = {}  # of stored responses, also of those that were deleted
        self._chats: dict[str, _StoredChat] = {}
        self._conversations: dict[str, _Conversation] = {}
        self._stopping = threading.Lock()  # taken, for ever, by the first stop() that came to its end

    # For tests.

    def __setattr__(self, name: str, value: Any) -> None:
        """Options may be set at any time, and count from the next request on, but for those that are refused here."""
        fixed = ("keep", "routes") if self._server is None else ("keep", "routes", "host", "port")
        if name in fixed and name in self.__dict__:
            raise AttributeError(f"{name} can't be set; it is said when the server is made: FakeOpenAI({name}=...)")
        known = name.startswith("_") or name in (*self.__dataclass_fields__, "errors")
        if not known and type(self) is FakeOpenAI:  # a subclass may have its own
            raise AttributeError(f"FakeOpenAI has no option {name!r}")
        if name in ("ttft", "itl"):
            _check_fields(self, **{name: (value, _SECONDS)})
        super().__setattr__(name, value)

    def start(self) -> Self:
        """Starts the server. Raises OSError where it can't listen, RuntimeError when it was started before."""
        if self._server is not None:
            raise RuntimeError("the server was started before; a FakeOpenAI is started once")
        patcher = f"{socket.socket.__module__} {threading.get_ident.__module__}"
        if "gevent" in patcher or "eventlet" in patcher:
            raise RuntimeError(f"the server needs real sockets and threads, not {patcher}: run `python -m openai_fake`")
        self._pid = os.getpid()
        self._server = _Server(self, self.host, self.port)
        return self

    def stop(self) -> None:
        """Stops the server: cuts all connections, and frees the port, its threads and descriptors.

        Then raises the first of `errors`, unless an exception is being handled already. Can be called again, from any
        thread, and from a handler.
        """
        __tracebackhide__ = True  # pytest shows no frame that has it
        self.__exit__(*sys.exc_info())

    def _stop(self, tell: Callable[[str], object] | None) -> BaseException | None:
        """Stops. What went wrong is returned; or, where the test has failed already, `tell` gets it as a text."""
        server = self._server
        if server is None or self._pid != os.getpid() or self._stopping.locked():
            return None  # in a forked child the server is the parent's
        running = server.stop()  # where a signal's exception breaks it off, the next stop() does it all again
        if not self._stopping.acquire(blocking=False):
            return None
        for thread in running:
            _LOG.warning("stopped, but a handler still runs on %s", thread.name)
        return self._verdict(tell)

    def _verdict(self, tell: Callable[[str], object] | None) -> BaseException | None:
        checks = [self.handler._check_used] if isinstance(self.handler, Script) else []
        with self._arrived:
            checks += [stream._check_closed for stream in self._streams]
        for check in checks:
            try:
                check()
            except (AssertionError, RuntimeError) as fault:
                fault.__context__ = None  # the test's own failure
                self.errors.append(fault)
        errors = [_from_handler(self.errors[0]), *self.errors[1:6]] if self.errors else []
        text = self.transcript() + "".join(f"\nAnother error: {_short(_error_words(error))}" for error in errors[1:])
        if tell is not None:
            first = ("".join(traceback.format_exception(error)).rstrip() for error in errors[:1])
            tell("\nWhat went wrong in the fake:\n".join([text, *first]))
            return None
        if not errors:
            return None
        error = errors[0]
        ends = isinstance(error, (SystemExit, KeyboardInterrupt, GeneratorExit))  # the whole test run
        if ends or type(error).__name__ == "CancelledError":
            error = RuntimeError(f"handler raised {_error_words(error)}")
            error.__cause__ = errors[0]
        _add_text(error, text)
        return error

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        __tracebackhide__ = True
        if (failure := self._stop(None if error is None else partial(_add_text, error))) is not None:
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
        if not _wait(self._arrived, lambda: self._count >= n, timeout, "server.wait_for_requests"):
            raise TimeoutError(f"{self._count} of {n} requests came in {timeout} s")
        return self.requests

    def transcript(self) -> str:
        """The last requests and what was answered, a line each; 20 lines at most."""
        requests = tuple(self._recent)
        if not requests:
            return "No request came to the fake." if self.keep != 0 else "No request is kept: keep=0."
        lines = ["The last requests to the fake, and its answers:"]
        for request in requests:
            said = ", ".join(map(_short, request.answer[:4]))
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
        seed = self.seed
        return self._unseeded if seed is None else _Ids(random.Random(f"{seed} {next(self._numbers)}").getrandbits)

    def _model_names(self) -> Sequence[str]:
        return sorted({*_SNAPSHOTS, *_SNAPSHOTS.values(), *_OTHER_MODELS}) if self.models is None else self.models

    def _remember(self, store: dict[Any, Any], id: object, value: object) -> None:
        """One rule for all that is kept: of each, the last `keep`. What is stored is the last one at least."""
        store[id] = value
        if self.keep is not None and len(store) > (keep := max(1, self.keep)):
            for old in tuple(store)[:-keep]:  # a copy, and pop: other threads add and delete at the same time
                if isinstance(dropped := store.pop(old, None), _History):
                    dropped.before, dropped.said = None, list

    def _arrive(self, request: Request) -> None:
        if self._control is not None:
            self._control.begin(request)
        self._journal.append(request)
        self._flying[id(request)] = request
        self._recent.append(request)
        if self._control is not None:
            self._control.wake()
        with self._lock:
            self.__dict__["_count"] += 1  # not through __setattr__, which is for the options
            self._arrived.notify_all()

    def _check_page(self, request: Request, path: str) -> None:
        """Refuses other sites' web pages, unless `cors`; what shows the journal, also to a page of a name that was made
        to lead here (DNS rebinding)."""
        fields = request.headers
        shows = path == "/" or path.startswith("/_fake")
        own = "origin" not in fields or re.fullmatch("https?://" + _LOOPBACK, fields["origin"].lower())
        if not own and (shows or not self.cors):
            words = f"Pages of {fields['origin']} may not call this fake, unless it is made with cors=True (or --cors)."
            raise APIError(403, "This is for pages of this machine only." if shows else words)
        local = shows and str(self._running().server_address[0]).startswith(("127.", "::1"))
        if local and not re.fullmatch(_LOOPBACK, host := fields.get("host", "").lower()):
            raise APIError(403, f"This is shown at a loopback address or localhost only, not at {host!r}.")

    def _check_key(self, request: Request) -> None:
        key = _api_key(request)
        if request.method == "OPTIONS" or key == self.api_key:
            return
        if not key:
            missing = "Missing bearer or basic authentication in header"
            raise APIError(401, missing if request.api == "responses" else _NO_KEY)
        shown = key if len(key) <= 12 else key[:8] + "*" * (len(key) - 12) + key[-4:]
        text = f"Incorrect API key provided: {shown}. "
        text += "You can find your API key at https://platform.openai.com/account/api-keys."
        raise APIError(401, text, code="invalid_api_key")

    def _keep_error(self, error: BaseException, request: Request) -> str:
        """Keeps what went wrong for the test. Returns what the client is told."""
        if self.keep is None or len(self.errors) < max(1, self.keep):  # a traceback holds its request
            self.errors.append(error)
        try:
            message = str(error)
        except BaseException:
            message = "(and its str() raised as well)"
        if not message.startswith("handler returned"):
            message = f"handler raised {type(error).__name__}: {message}{_place(error)}"
        _LOG.info("%s %s: %s", request.method, request.path, message)
        return message

    def _ended(self, request: Request, started: float) -> None:
        request._seconds = _Clock.perf_counter() - started
        self._flying.pop(id(request), None)
        if self._observe is not None:
            with suppress(Exception):
                self._observe(request)
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


def _from_handler(error: BaseException) -> BaseException:
    """An error whose traceback begins at the handler: without the frames of this file above it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return error.with_traceback(trace)


def _add_text(error: BaseException, text: str) -> None:
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


_LOOPBACK = r"(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]*)?"
# What GET /models and `strict` know beside _SNAPSHOTS (S, R), in any order.
_OTHER_MODELS = """
    gpt-6-astra gpt-6.2-astra gpt-6.1-sol gpt-6.2-sol gpt-6.1-terra gpt-6-sol gpt-6-luna gpt-5.6-terra gpt-5.6-luna
    gpt-5.5-pro gpt-5.5-pro-2026-04-23 gpt-5.4-pro gpt-5.3-codex gpt-5.3-chat-latest gpt-5.2-pro gpt-5.2-pro-2025-12-11
    gpt-5.2-codex gpt-5.2-chat-latest gpt-5.1-codex gpt-5.1-codex-mini gpt-5.1-codex-max gpt-5.1-mini
    gpt-5.1-chat-latest gpt-5-codex gpt-5-chat-latest gpt-5-search-api codex-mini-latest gpt-audio-1.5
    gpt-4o-2024-11-20 gpt-4o-2024-05-13 chatgpt-4o-latest o1 o1-2024-12-17 o1-pro o1-pro-2025-03-19 o3-pro
    o3-pro-2025-06-10 o3-deep-research o3-deep-research-2025-06-26 o4-mini-deep-research
    o4-mini-deep-research-2025-06-26 gpt-4-turbo gpt-4-turbo-2024-04-09 gpt-4-1106-preview gpt-3.5-turbo-1106
    gpt-3.5-turbo-16k gpt-3.5-turbo-instruct davinci-002 babbage-002 text-embedding-3-small text-embedding-3-large
    text-embedding-ada-002 omni-moderation-latest omni-moderation-2024-09-26
""".split()  # noqa: SIM905

_NO_KEY = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY), or as the password field (with blank username) if you're accessing the API "
    "from your browser and are prompted for a username and password. You can obtain an API key from "
    "https://platform.openai.com/account/api-keys."
)


def _short(value: object) -> str:
    """A value, or a text, in one short line; also a value whose repr() raises."""
    try:
        line = " ".join((value if isinstance(value, str) else repr(value)).split())
    except BaseException as error:
        return f"<{type(value).__name__} whose repr() raises {type(error).__name__}>"
    return line if len(line) <= 100 else line[:99] + "…"


def _own_routes(routes: Mapping[str, Callable[[Request], object]]) -> dict[str, _Endpoint]:
    """Endpoints from a user's functions, by their names without the /v1 that every path may have."""
    endpoints: dict[str, _Endpoint] = {}
    for name, function in routes.items():
        if not re.fullmatch(r"[A-Z]+ /\S*", name):
            raise ValueError(f'a route is "METHOD /path", as in "POST /audio/speech", not {name!r}')
        if not callable(function):
            raise TypeError(f"a route is served by a function that takes a Request, not by {function!r}")
        endpoints[name.replace(" /v1/", " /", 1)] = _OwnRoute(function)
    return endpoints


@dataclass(frozen=True)
class _OwnRoute:
    """The endpoint that a user's function is: it is its own answer, as it finds the request at the connection."""

    function: Callable[[Request], object]

    def __call__(self, fake: FakeOpenAI, request: Request, *values: str) -> _OwnRoute:
        return self

    def send(self, connection: _Connection) -> None:
        """Answers on a connection; what an iterator gives, piece by piece."""
        fake, request = connection.server.fake, connection.asked
        waiter = _Waiter(connection.server, connection, False)
        pieces: Any = ()
        try:
            result: Any = self.function(request)
            if hasattr(result, "__await__"):
                result = waiter.run(result)
            if isinstance(result, APIError):
                raise result
            if result is None:
                raise TypeError(f"the route {request.method} {request.path} returned None (forgot `return`?)")
            status, headers, body = _own_answer(result)
            if fake.ttft:
                waiter.sleep(fake.ttft)
            if isinstance(body, bytes) or request.method == "HEAD":
                whole = body if isinstance(body, bytes) else b""
                return connection.send_whole(whole, status, "application/octet-stream", _USUAL, headers)
            waiter.streams = True
            waiter.enter(bool)
            pieces = waiter.steps(body) if hasattr(body, "__anext__") else body
            connection.send(connection.head(status, _EVENTS, _USUAL, headers))
            for at, piece in enumerate(pieces):
                if at and fake.itl:
                    waiter.sleep(fake.itl)
                if data := piece.encode() if isinstance(piece, str) else piece:  # an empty chunk would be the last
                    connection.send(_http_chunk(data) if connection.http11 else data)
                waiter.patience()
            connection.send(_LAST_CHUNK if connection.http11 else b"", last=True)
        except BaseException as error:
            if isinstance(error, _Gone) or not connection.headed:
                raise
            request._outcome = fake._keep_error(error, request)
            connection.hang_up(False)  # too late for a status
        finally:
            if hasattr(pieces, "close"):
                pieces.close()
            waiter.end()


def _own_answer(result: Any) -> tuple[int, dict[str, str], Any]:
    """Status, headers, and bytes or an iterator, from what a route may return."""
    headed = type(result) is tuple and [type(each) for each in cast(Any, result)[:2]] == [int, dict]
    status, headers, body = cast(Any, result if headed else (200, {}, result))
    if isinstance(body, bytes) or hasattr(body, "__next__") or hasattr(body, "__anext__"):
        return status, headers, body
    typed = "content-type" in map(str.lower, headers)
    headers = headers if typed else {**headers, "content-type": "application/json"}
    return status, headers, body.encode() if isinstance(body, str) and typed else _utf8(_dumps(body))


def _preflight(fake: FakeOpenAI, request: Request, *values: str) -> _HTTPResponse:
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
    add(_stop_after, test, server)
    return server


def _stop_after(test: Any, server: FakeOpenAI) -> None:
    """Stops the server of a test, or class. What went wrong is its failure, or is told in the failure that it has."""
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
    else:
        outcome.success = False
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
        return partial(_add_text, raised[0])
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
            if (error := server._verdict(info and partial(_add_text, info.value))) is not None:
                info = call.excinfo = pytest.ExceptionInfo.from_exception(error)
        if info or call.when == "teardown":
            fakes.pop(item, None)  # it has failed, and fails no second time

    plugin: Any = ModuleType("openai_fake_fixture")
    plugin.fake_openai = pytest.fixture(fake_openai)
    plugin.pytest_runtest_makereport = pytest.hookimpl(tryfirst=True)(pytest_runtest_makereport)
    if not config.pluginmanager.has_plugin(plugin.__name__):  # another copy of this file may be installed
        config.pluginmanager.register(plugin)


# ---- Command line ----------------------------------------------------------------------------------------------------
# `python -m openai_fake`: what it shows, the terminal, the handlers that it offers, `main`. What only this needs is
# imported where it is used: tests import this module a great deal more often than they run it.

# What a terminal would obey, or could not encode: controls but tab and newline, line separators, changes of
# direction (CVE-2021-42574), lone surrogates.
_UNSAFE = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
_HUES = {2: "32", 4: "33"}  # SGR colours by the hundreds of a status: green, yellow; red for the rest
_SHOWN = 2_000  # characters of one message that --verbose shows; a prompt may be megabytes
_BACKLOG = 1_000  # pieces of output that wait for a slow reader; beyond that, they are dropped
_PROMPT = "< "


def _safe(text: str, limit: int = _SHOWN) -> str:
    """`text` as a terminal can be given it: escaped where it would be obeyed, cut off where it is long."""
    left_out = len(text) - limit
    shown = re.sub(_UNSAFE, lambda match: match[0].encode("unicode_escape").decode(), text[:limit])
    return shown + (f"... ({left_out:,} more characters)" if left_out > 0 else "")


def _safe_line(text: str, limit: int = 300) -> str:
    return _safe(text, limit).replace("\n", "\\n").replace("\t", "\\t")


def _request_words(request: Request) -> str:
    return f"{request.api} {_safe_line(request.model, 60)} {'stream' if request.stream else 'json'}"


def _log_line(request: Request, clock: str, colour: bool = False) -> str:
    """One request in one line: time, API, model, stream, status, duration, tokens, and what went wrong."""
    what = _request_words(request) if request.api else _safe_line(f"{request.method} {request.path}", 100)
    paint = "\x1b[{0}m{1}\x1b[0m" if colour else "{1}"
    status = paint.format(_HUES.get(request._status // 100, "31"), request._status or "---")
    columns = [f"{clock} {what:<40}", status, f"{request._seconds:6.3f} s"]
    if request._encoder is not None and request._status == 200:
        usage = request._encoder.tally()
        columns.append(f"{usage.prompt_tokens}+{usage.completion_tokens} tokens")
    if request._outcome:
        columns.append(paint.format("31", _safe_line(request._outcome, 120)))
    return "  ".join(columns) + "\n"


_LABELS: dict[type[object], str] = {Text: "answer", ToolCall: "call", CustomToolCall: "call", WebSearch: "search"}


def _paragraph(mark: str, label: str, text: str) -> str:
    """A label and, beside it, a text of any number of lines."""
    return f"{mark:>3} {_safe_line(label, 12):<10} " + _safe(text).replace("\n", "\n" + " " * 15) + "\n"


def _answer_text(parts: Sequence[object], mark: str = "<") -> str:
    shown: list[str] = []
    for part in parts:
        text = getattr(part, part._grows) if isinstance(part, (_MessagePart, _Call)) else repr(part)
        if isinstance(part, _Call):
            text = f"{part.name}({text})"
        elif isinstance(part, Item):
            text = part.query if isinstance(part, WebSearch) else f"{part.type} {_dumps(part.fields)}"
        elif isinstance(part, Reasoning):
            text = part.summary
        shown.append(_paragraph(mark, _LABELS.get(type(part), type(part).__name__.lower()), text))
    return "".join(shown)


def _shown_request(request: Request) -> str:
    """What was asked: the conversation, the tools, the options."""
    shown: list[str] = []
    for message in request.messages:
        text = "\n".join(each for each in (message.text, *_attached(message)) if each)
        if text or not message.tool_calls:
            shown.append(_paragraph(">", message.role, text))
        shown.append(_answer_text(message.tool_calls, ">"))
    options = [f"{name}={_dumps(value)}" for name, value in request.options.items()]
    more = {"tools": ", ".join(_tool_words(request)), "options": ", ".join(options)}
    return "".join([*shown, *(_paragraph(">", label, text) for label, text in more.items() if text)])


def _banner(base_url: str, environ: Mapping[str, str], model: str, api_key: str | None) -> str:
    """The URL first, then what to paste into a shell."""
    import shlex

    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]}, ensure_ascii=False)
    key = ["-H", f"Authorization: Bearer {api_key}"] if api_key else []
    curl = ["curl", f"{base_url}/chat/completions", "-H", "Content-Type: application/json", *key, "-d", body]
    exports = "".join(f"  export {name}={shlex.quote(value)}\n" for name, value in environ.items() if "OPENAI" in name)
    shows = f"{base_url.removesuffix('v1')} shows what comes. Ctrl-C ends it."
    return f"openai_fake listens on {base_url}\n\n{exports}  {shlex.join(curl)}\n\n{shows}\n"


class _Console:
    """Standard output, written by a thread of its own: one that nobody reads must not hold up an answer."""

    def __init__(self, stream: TextIO | None) -> None:
        self.terminal = stream is not None and stream.isatty()
        self.colour = self.terminal and not os.environ.get("NO_COLOR")
        self._encoding = (stream and stream.encoding) or "utf-8"
        # Below the buffers: they have a lock that the interpreter takes as it ends, and would then wait for the
        # thread, which waits for a reader. `stream` is None where the shell closed it (>&-).
        buffer: Any = getattr(stream, "buffer", None)
        self._raw: Any = getattr(buffer, "raw", buffer)
        self._pieces: queue.Queue[str | None] = queue.Queue(_BACKLOG)
        self.typed: Callable[[], str] | None = None  # what is typed so far, where lines are edited at a prompt
        self._thread = threading.Thread(target=self._run, name="openai_fake console", daemon=True)
        self._thread.start()

    def write(self, text: str | None) -> None:
        with suppress(queue.Full):
            self._pieces.put_nowait(text)

    def close(self) -> None:
        """Waits until all is written, or until it seems that nobody reads it."""
        typed, self.typed = self.typed, None
        self.write("\n" if typed is not None else "")
        self.write(None)
        self._thread.join(0.5)

    def _run(self) -> None:
        while self._raw is not None and (piece := self._pieces.get()) is not None:
            if (typed := self.typed) is not None:  # the piece goes where the prompt is, and the prompt below
                piece = f"\r\x1b[K{piece}{_PROMPT}{typed()}"
            data = memoryview(piece.encode(self._encoding, "backslashreplace"))
            with suppress(OSError, ValueError):  # the reader has left; the service goes on
                while data:
                    data = data[self._raw.write(data) or len(data) :]  # None: it would block, and is dropped


def _observer(console: _Console, fake: FakeOpenAI, verbose: bool, log: str) -> Callable[[Request], None]:
    """What shows each request as it ends: a line, or all of it when verbose; or the same as JSON."""

    def show(request: Request) -> None:
        text = _log_line(request, time.strftime("%H:%M:%S"), console.colour)
        if log == "json":
            told = _journal_entry(request) if verbose else {k: v for k, v in _became(request).items() if k != "answer"}
            text = json.dumps(told) + "\n"  # ASCII: a terminal obeys none of it
        elif verbose:
            text += _shown_request(request) if request.api else ""
            text += _answer_text(request.answer)
            with suppress(IndexError):
                while True:  # they are dropped: their tracebacks hold requests
                    trace = _safe("".join(traceback.format_exception(fake.errors.pop(0))), 10 * _SHOWN)
                    text += trace.rstrip("\n").replace("\n", "\n    ") + "\n"  # no line of it looks like the log's
        console.write(text)

    return show


def _dumper(path: str) -> Callable[[Request], object]:
    """What appends each request to a file as it ends, as a line of JSON. Raises ArgumentTypeError where it cannot."""
    import argparse

    def dump(line: bytes) -> None:
        with open(path, "ab", buffering=0) as file:  # each line is one write, which no other can split
            file.write(line)

    try:
        dump(b"")
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return lambda request: dump(_utf8(_dumps(_journal_entry(request))) + b"\n")


def _error_words(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip() + _place(error)  # also where its str() raises


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
        self._function: Callable[[Request], Any] = self._load()
        self._seen = self._stat()

    def __call__(self, request: Request) -> Any:
        with self._lock:
            if (seen := self._stat()) not in (None, self._seen):
                self._seen, told = seen, f"{self._source} has changed and was loaded again"
                try:
                    self._function = self._load()
                except (Exception, SystemExit) as error:
                    told = f"{self._source} has changed and cannot be loaded: {_error_words(error)}"
                    broken = APIError(500, told, headers={"x-should-retry": "false"})
                    self._function = lambda request: broken
                self._console.write(_safe_line(told) + "\n")
            function = self._function
        return function(request)

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
        with suppress(OSError, TypeError, AttributeError):
            status = os.stat(self._module.__file__)
            return status.st_mtime_ns, status.st_size
        return None


class _Turn:
    """One request that a person answers, from the terminal's thread."""

    shown = said = over = False

    def __init__(self, request: Request) -> None:
        import asyncio

        self.asked = request
        self.loop = asyncio.get_running_loop()  # the answer's, which also notices that the client has left
        self.parts: asyncio.Queue[_Part | APIError | None] = asyncio.Queue()  # None: the end

    def say(self, *parts: _Part | APIError | None) -> None:
        self.said = True
        for part in parts:
            with suppress(RuntimeError):  # the loop is closed: the client has just left
                self.loop.call_soon_threadsafe(self.parts.put_nowait, part)

    def end(self, *last: _Part | APIError) -> None:
        self.over = True
        self.say(*last, None)


def _type_call(turn: _Turn, rest: str) -> None:
    name, _, arguments = rest.partition(" ")
    if not name:
        raise ValueError("a call has a name")
    if any(tool.type == "custom" and tool.name == name for tool in turn.asked.tools):
        turn.say(CustomToolCall(name, arguments))
    else:
        _loads(arguments or "{}")
        turn.say(ToolCall(name, arguments or "{}"))


def _type_error(turn: _Turn, rest: str) -> None:
    number, _, message = rest.partition(" ")
    if not number.isdecimal():
        raise ValueError(f"not a status: {number!r}")
    turn.end(APIError(int(number), message or "An error typed at the terminal."))


# What each does (ValueError: that does not fit the usage), its usage, and its help.
_COMMANDS: dict[str, tuple[Callable[[_Turn, str], None], str, str]] = {
    "/end": (lambda turn, rest: turn.end(), "/end", "ends the answer"),
    "/finish": (lambda turn, rest: turn.end(Finish(cast(Any, rest))), "/finish REASON", "ends it for length, ..."),
    "/call": (_type_call, "/call NAME JSON", "calls a tool"),
    "/refuse": (lambda turn, rest: turn.end(Refusal(rest)), "/refuse TEXT", "refuses, and ends the answer"),
    "/error": (_type_error, "/error STATUS MESSAGE", "fails, with that status while nothing is said"),
    "/hangup": (lambda turn, rest: turn.end(Disconnect()), "/hangup", "drops the connection"),
}
_HELP = (
    "Each line that you type is streamed to the client at once, with its newline unless it ends with \\.\n"
    "A line that begins with // says /.\n"
) + "".join(f"  {usage:<22} {effect}\n" for _, usage, effect in _COMMANDS.values())


class _Operator:
    """The handler of --interactive: a person at the terminal is the model, for one conversation at a time."""

    def __init__(self, console: _Console, stdin: TextIO | None) -> None:
        self._console, self._stdin = console, stdin
        # A line that was typed; a request that has come, and again when it is over; None: the input has ended.
        self._events: queue.SimpleQueue[str | _Turn | None] = queue.SimpleQueue()

    def start(self) -> None:
        self._console.write(_HELP)
        for work, name in ((self._read, "openai_fake input"), (self._run, "openai_fake operator")):
            threading.Thread(target=work, name=name, daemon=True).start()

    async def __call__(self, request: Request) -> AsyncIterator[_Part]:
        turn = _Turn(request)
        self._events.put(turn)
        try:
            yield Pause(0.0)  # an answer with no part at all would be an error
            while (part := await turn.parts.get()) is not None:
                if isinstance(part, APIError):
                    raise part
                yield part
        finally:
            self._events.put(turn)

    def _run(self) -> None:
        """Gives the terminal to one request after the other, and obeys what is typed."""
        turns: list[_Turn] = []  # the first has the terminal, the others wait
        ahead: deque[str] = deque()  # lines typed while nobody waited
        stale = ended = False  # the line being typed was for a client that has left; the input has ended
        while True:
            event = self._events.get()
            if event is None:
                ended = True
                self._console.write("The input has ended: from now on, requests get a 503.\n")
            elif isinstance(event, str) and stale:
                stale = False
                self._console.write("That was not sent: its client has left.\n")
            elif isinstance(event, str):
                ahead.append(event)
            elif event not in turns:
                turns.append(event)
                if len(turns) > 1:
                    self._console.write(f"{_request_words(event.asked)} waits: {len(turns) - 1} before it\n")
            else:
                if event is turns[0] and not event.over:
                    stale = bool(self._console.typed and self._console.typed())
                    self._console.write("The client has left.\n")
                turns.remove(event)
            while turns and not (turn := turns[0]).over:
                if not turn.shown:
                    turn.shown = True
                    self._console.write(f"\n{_request_words(turn.asked)}\n{_shown_request(turn.asked)}")
                elif ahead:
                    self._obey(turn, ahead.popleft())
                elif ended and turn.said:
                    turn.end()
                elif ended:
                    turn.end(APIError(503, "Nobody is at the terminal.", headers={"x-should-retry": "false"}))
                else:
                    break

    def _read(self) -> None:
        """Reads what is typed, until the input ends."""
        if self._stdin is not None and self._stdin.isatty() and self._console.terminal:
            prompt = _PROMPT
            with suppress(ImportError):
                import readline  # input() then edits lines, and has a history

                self._console.typed = readline.get_line_buffer
                if "libedit" not in str(readline.__doc__):  # which would show what is between \x01 and \x02
                    readline.parse_and_bind("set enable-bracketed-paste off")  # nobody would end it
                    prompt = f"\r\x01\x1b[K\x02{_PROMPT}"
                import atexit
                import termios

                # Gives the terminal back as it was: who edits a line there never ends.
                atexit.register(termios.tcsetattr, self._stdin, termios.TCSANOW, termios.tcgetattr(self._stdin))
            with suppress(EOFError):
                while True:
                    self._events.put(input(prompt))
            self._console.typed = None
        elif self._stdin is not None:  # None: the shell closed it (<&-)
            # A file of its own, without a buffer: a lock held here can abort the interpreter's end.
            with suppress(OSError), open(self._stdin.fileno(), "rb", buffering=0, closefd=False) as raw:
                for line in raw:
                    self._events.put(line.decode(errors="replace").rstrip("\r\n"))
        self._events.put(None)

    def _obey(self, turn: _Turn, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word in _COMMANDS:
            run, usage, _ = _COMMANDS[word]
            try:
                run(turn, rest.strip())
            except ValueError as error:
                self._console.write(f"{_safe_line(str(error))}; usage: {usage}\n")
        elif line.startswith("/") and not line.startswith("//"):
            self._console.write(f"There is no command {_safe_line(word)}.\n{_HELP}")
        else:
            text = line.removeprefix("/")
            turn.say(Text(text[:-1] if text.endswith("\\") else text + "\n"))


# What --help shows, and what there is: the parser has the options that stand here.
_USAGE = """\
usage: python -m openai_fake [OPTION]...

A server that answers like OpenAI's API. It repeats what the user said, or says
  --reply TEXT                this, always; @FILE: the recorded answer in a file
  --handler FILE.py:NAME      what this function returns; loaded again when changed
  --interactive               what you type
  --auto, --tokens N          what fits the tools and schemas; texts of N tokens

  --host HOST, --port PORT    where to listen (127.0.0.1, 8080); port 0: any free one
  --reuse-port                so that several processes can listen on one port
  --api-key KEY               refuse other keys than this
  --cors                      let web pages of any origin call
  --models NAME,NAME          what GET /v1/models lists
  --strict, --no-validate     refuse unknown parameters and models, too; nothing
  --ttft SECONDS              time to the first token
  --itl SECONDS               time between tokens
  --error-rate STATUS=RATE    fail so many of the requests: 429=0.1,500=0.01
  --seed SEED                 make ids, and all that is random, the same each time
  --dump FILE.jsonl           append each request and its answer
  --log FORMAT                of the line per request: text, or json
  --quiet, --verbose          no such line; conversations and tracebacks, too
  --version, --help
"""


def _parser() -> argparse.ArgumentParser:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:  # one line, where argparse prints the usage too
            self.exit(2, f"openai_fake: {_safe_line(message)} (--help lists the options)\n")

        def format_help(self) -> str:
            return _USAGE

    def port(text: str) -> int:
        if not (text.isdecimal() and int(text) <= 65535):
            raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
        return int(text)

    def seconds(text: str) -> float:
        if not 0 <= float(text) <= threading.TIMEOUT_MAX:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
        return float(text)

    def reply(text: str) -> Text | Reply:
        if not text.startswith("@"):
            return Text(text)
        try:
            with open(text[1:], "rb") as file:
                return recorded(file.read())
        except (OSError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{text}: {error}") from None

    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",") if name.strip()]

    def rates(text: str) -> dict[int, float]:
        found: dict[int, float] = {}
        with suppress(ValueError):
            found = {int(status): float(rate) for status, _, rate in (each.partition("=") for each in names(text))}
        if not found or not all(400 <= status <= 599 and 0 <= rate <= 1 for status, rate in found.items()):
            raise argparse.ArgumentTypeError(f"{text!r} is not STATUS=RATE, as in 429=0.1")
        return found

    parser = Parser(prog="python -m openai_fake", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"openai_fake {__version__}")
    one, other = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    groups = dict.fromkeys(("reply", "handler", "interactive", "auto"), one) | {"quiet": other, "verbose": other}
    types: dict[str, Any] = {"PORT": port, "SECONDS": seconds, "N": int, "SEED": int, "NAME,NAME": names}
    types |= {"TEXT": reply, "STATUS=RATE": rates, "FILE.jsonl": _dumper}
    for name, takes in re.findall(r"  ?--(?!version|help)([a-z-]+)(?: ([A-Z](?:\S*[^\s,])?))?", _USAGE):
        choices = ("text", "json") if takes == "FORMAT" else None
        more: _JSON = {"metavar": takes, "type": types.get(takes, str), "choices": choices}
        more = more if takes else {"action": "store_true"}
        groups.get(name, parser).add_argument(f"--{name}", **more)
    parser.set_defaults(host="127.0.0.1", port=8080, tokens=32, ttft=0.0, itl=0.0, error_rate={}, log="text")
    return parser


def _failing(handler: Handler, rates: Mapping[int, float], rng: random.Random) -> Handler:
    """A handler that fails at these rates, by status."""

    def answer(request: Request) -> Any:
        drawn = rng.random()
        for status, rate in rates.items():
            if drawn < rate:
                raise rate_limit() if status == 429 else APIError(status, f"One of --error-rate {status}={rate}.")
            drawn -= rate
        return handler(request)

    return answer


def _chosen_handler(options: argparse.Namespace, console: _Console) -> Callable[[Request], Any]:
    if options.interactive:
        return _Operator(console, sys.stdin)
    if options.handler is not None:
        return _NamedHandler(options.handler, console)
    if options.reply is not None:
        return lambda request: options.reply
    return partial(auto, tokens=options.tokens) if options.auto else echo


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
    settings: _JSON = {name: each for name, each in vars(options).items() if name in Options.__annotations__}
    settings |= {"validate": not options.no_validate, "keep": 1_000}  # the journal of a service must not grow for ever
    interrupts: queue.SimpleQueue[int] = queue.SimpleQueue()  # its put() is reentrant; an Event's set() is not
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: interrupts.put(number))
    try:
        server = FakeOpenAI(_failing(handler, options.error_rate, random.Random(options.seed)), **settings)
        server._reuse_port = options.reuse_port
        control = _Control(server)
        control.watchers += [] if options.quiet else [_observer(console, server, options.verbose, options.log)]
        control.watchers += [options.dump] if options.dump else []
        server.start()
    except (OSError, ValueError) as error:
        parser.error(f"cannot listen on {options.host} port {options.port}: {error}")
    console.write(_banner(server.base_url, server.environ, (options.models or ["gpt-5.5"])[0], options.api_key))
    if isinstance(handler, _Operator):
        handler.start()
    while True:
        with suppress(queue.Empty):
            interrupts.get(timeout=0.5)  # Windows runs no signal handler while this waits
            break
    with suppress(BaseException):  # the errors that it raises were shown as they happened
        server.stop()
    console.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
