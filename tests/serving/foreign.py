"""A server of somebody else: text without an order, and now and then no answer at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def foreign(answer: Callable[[dict[str, Any]], Any], models: tuple[str, ...] = ("other",)) -> Iterator[str]:
    """
    Its address, in which `answer` makes, of what was posted, the choice; or a status to fail with; or `None`, to hang up.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, {"data": [{"id": name} for name in models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = answer(body)
            if isinstance(found, bytes):
                self.reply(200, found)
            elif isinstance(found, int):
                self.reply(found, {"error": {"message": "not now"}})
            elif found is not None:
                self.reply(200, {"choices": [found]})

        def reply(self, status, body):
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
