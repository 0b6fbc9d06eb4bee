"""What a server answers if something is wrong, in the format of the OpenAI API."""

from __future__ import annotations

from typing import Any


KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """
    Something that ends a request.

    Args:
        status (`int`): HTTP status.
        message (`str`): what was wrong, what was found, and what to do.
        param (`str`, *optional*): the field of the request.
        code (`str`, *optional*): a name for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON object that says so."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        param = None if self.param is None else _sendable(self.param)
        return {"error": {"message": _sendable(self.message), "type": kind, "param": param, "code": self.code}}


def _sendable(text: str) -> str:
    """A text without halves of surrogate pairs, which a client may have sent in JSON and UTF-8 does not have."""
    return text.encode("utf-8", "replace").decode()


def refused(param: str, message: str, code: str | None = None) -> ApiError:
    """The error for a field whose value is not accepted."""
    return ApiError(400, f"`{param}`: {message}", param, code)
