r"""Server-sent events, from bytes as they arrive to the payloads of their `data:` lines.

Owns the cutting, and nothing of what is in a payload. Cut at \n on bytes, never by `splitlines`: U+2028 and U+0085 are legal
inside JSON and would tear it. A payload that arrives in two pieces comes out once, when it is whole.

    feed(b'data: {"a"')  -> []        feed(b': 1}\n\n: ping\n')  -> ['{"a": 1}']
"""

from __future__ import annotations


class EventReader:
    """One stream. A comment, which servers send as a ping, is skipped, and so is every other field."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[str]:
        """The payloads that this piece completes, in order."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return [line.removeprefix(b"data:").strip().decode() for line in lines if line.startswith(b"data:")]
