"""Which requests are answered: hosts and origins by name, checked before any route.

Every web page can make the browser it is open in send requests to this machine, so two things are asked of each. The
Host header has to name this studio: a site that points a name of its own at this machine (DNS rebinding) would
otherwise be one origin with it. And what a page sends has to come from a page of the studio; browsers name the page's
origin in Origin, or in Sec-Fetch-Site how it relates to the target (https://www.w3.org/TR/fetch-metadata). Programs,
such as gradio_client, send neither.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

LOOPBACK = ("localhost", "127.0.0.1", "::1")
ALL_ADDRESSES = ("0.0.0.0", "::")
PORTS = {"http": "80", "https": "443"}
# Pages of other origins can neither load anything of the studio as a picture or script nor show it in a frame, but for
# those of the sites that it was started with.
HEADERS = [(b"cross-origin-resource-policy", b"same-origin")]

_NETLOC = re.compile(r"(?:\[([0-9a-f:.]+)\]|([\w-]+(?:\.[\w-]+)*)\.?)(?::(\d{1,5}))?", re.ASCII)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class AllowedHosts:
    """The names of a studio that listens at `host`, with further ones that it was started with."""

    def __init__(self, host: str = LOOPBACK[1], further: Iterable[str] = (), frames: Iterable[str] = ()) -> None:
        host, own = host.strip("[]").lower(), socket.gethostname().lower()
        self.further = {name.lower().rstrip(".") for name in further}
        self.frames = sorted(f"https://{name.lower().rstrip('.')}" for name in frames)
        # A literal address is no name that somebody could point elsewhere: who reaches the studio by one of another
        # machine does so through address translation, as into a container.
        self.any_address = host in ALL_ADDRESSES
        others = {host, own, f"{own.partition('.')[0]}.local"} if host not in LOOPBACK else set[str]()
        self.names = {*LOOPBACK, *self.further, *others}

    def accepts(self, host: str) -> bool:
        """Whether a Host header names this studio; its port may be any, as behind a proxy or an SSH tunnel."""
        name, _ = _split(host) or ("", "")
        return name in self.names or (self.any_address and _is_address(name))

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What every answer says about pages of other sites."""
        if not self.frames:
            return [*HEADERS, (b"x-frame-options", b"SAMEORIGIN")]
        return [*HEADERS, (b"content-security-policy", f"frame-ancestors 'self' {' '.join(self.frames)}".encode())]

    def is_own(self, origin: str, host: str) -> bool:
        """Whether an Origin header is that of the studio's own pages, requested at `host`."""
        scheme, _, rest = origin.partition("://")
        page, target = _split(rest), _split(host)
        if scheme not in PORTS or page is None or target is None:
            return False  # "null", which sandboxed frames and files have, is nobody's
        ports = [port or PORTS[scheme] for _, port in (page, target)]
        return (page[0] == target[0] and ports[0] == ports[1]) or page[0] in self.further


def _split(netloc: str) -> tuple[str, str] | None:
    """Host name or address, and port; None for what is no such thing."""
    match = _NETLOC.fullmatch(netloc.lower())
    return (match[1] or match[2], match[3] or "") if match else None


def is_host_name(text: str) -> bool:
    """Whether `text` is a host name or an address, without scheme and port."""
    return (parts := _split(text)) is not None and not parts[1]


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


class RequestCheck:
    """The outermost ASGI application: refuses what is not meant for, or not sent by, this studio."""

    def __init__(self, app: App, hosts: AllowedHosts) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif reason := self.refusal(scope):
            await _refuse(scope, send, reason, self.hosts.headers())
        else:
            await self.app(scope, receive, _with_headers(send, self.hosts.headers()))

    def refusal(self, scope: Message) -> str:
        """Why a request is refused, in a sentence; empty for one that is answered."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts, origins = headers.get("host", []), headers.get("origin", [])
        if len(hosts) != 1 or not self.hosts.accepts(hosts[0]):
            name, _ = (_split(hosts[0]) if len(hosts) == 1 else None) or ("", "")
            return f"This studio is not called '{name}'; start it with --allowed-host {name or 'NAME'} if it should be."
        if not all(self.hosts.is_own(origin, hosts[0]) for origin in origins):
            return "Pages of other sites cannot use this studio."
        relations = {*headers.get("sec-fetch-site", [])} - {"same-origin", "none"}
        if relations and not origins and not _opens_page(scope, headers, framed=bool(self.hosts.frames)):
            return "Pages of other sites cannot use this studio; open it in a tab of its own."
        return ""


def _opens_page(scope: Message, headers: dict[str, list[str]], *, framed: bool) -> bool:
    """Whether somebody follows a link to the studio, which shows it in a tab and changes nothing.

    `framed`: or a page shows it in a frame; whose pages may do that, browsers read in the answer.
    """
    mode = [headers.get(f"sec-fetch-{part}") for part in ("mode", "dest")]
    front = scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and scope["path"] in ("", "/")
    return front and mode in ([["navigate"], ["document"]], *([[["navigate"], ["iframe"]]] if framed else []))


def _with_headers(send: Send, headers: list[tuple[bytes, bytes]]) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *headers]
        await send(message)

    return send_with_headers


async def _refuse(scope: Message, send: Send, reason: str, about: list[tuple[bytes, bytes]]) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"x-content-type-options", b"nosniff"), *about]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})


def checked_lifespan(hosts: AllowedHosts) -> Callable[[Any], Any]:
    """A lifespan for FastAPI that puts the check around everything, gradio's own middleware (CORS) included."""

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncGenerator[None]:
        app.middleware_stack = RequestCheck(app.middleware_stack, hosts)
        yield

    return lifespan
