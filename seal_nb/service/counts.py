"""How often each content was answered: what keeps three repeats of one published request three trainings.

A published request has neither id nor seed, so its seed comes from the server's seed, its content and a
number: the smallest one under which this content was not answered yet and is not in work. The numbers
answered survive a restart, in a file of 20-byte entries (16 of the content's hash, 4 of the number),
appended before the reply is sent. A request with an id does not count here. Memory: about 100 bytes for each
different content, and nothing for its repeats.
"""

import struct
from pathlib import Path

ENTRY = struct.Struct("<16sI")


class AnswerCounts:
    """Numbers answered and in work, by content. The file may be lost: seeds then start again at 0."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._answered: dict[bytes, int] = {}  # all numbers below this one
        self._beyond: dict[bytes, set[int]] = {}  # answered out of order
        self._in_work: dict[bytes, set[int]] = {}
        raw = path.read_bytes() if path.exists() else b""
        self._size = len(raw) - len(raw) % ENTRY.size  # a torn last entry is dropped
        for content, number in ENTRY.iter_unpack(raw[: self._size]):
            self._mark(content, number)
        self._unsaved = b""
        self._file = path.open("ab", buffering=0)
        self._file.truncate(self._size)

    def take(self, content: str) -> int:
        """The next number of this content; it is in work until ``answered`` or ``dropped``."""
        key = _key(content)
        taken = self._in_work.setdefault(key, set())
        beyond = self._beyond.get(key, ())
        number = self._answered.get(key, 0)
        while number in taken or number in beyond:
            number += 1
        taken.add(number)
        return number

    def answered(self, content: str, number: int) -> None:
        """Raises OSError where the disk is full; the number counts all the same, and is written with the
        next one.
        """
        self.dropped(content, number)
        self._mark(_key(content), number)
        self._unsaved += ENTRY.pack(_key(content), number)
        try:
            written = 0
            while written < len(self._unsaved):
                written += self._file.write(self._unsaved[written:])
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size, self._unsaved = self._size + len(self._unsaved), b""

    def dropped(self, content: str, number: int) -> None:
        """Not answered after all (an error, a cancel): the number is free again."""
        numbers = self._in_work[_key(content)]
        numbers.discard(number)
        if not numbers:
            del self._in_work[_key(content)]

    @property
    def n_unsaved(self) -> int:
        return len(self._unsaved) // ENTRY.size

    def close(self) -> None:
        self._file.close()

    def _mark(self, key: bytes, number: int) -> None:
        beyond = self._beyond.setdefault(key, set())
        beyond.add(number)
        low = self._answered.get(key, 0)
        while low in beyond:
            beyond.remove(low)
            low += 1
        self._answered[key] = low
        if not beyond:
            del self._beyond[key]


def _key(content: str) -> bytes:
    return bytes.fromhex(content)[:16]
