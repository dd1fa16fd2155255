"""Results of requests that brought an id, kept in the run folder so that asking again never trains again.

One journal line a result (``seal_nb.runs.Journal``: locked to one server, on the disk before the client
hears of it); memory holds where each is, not what it says. Where the disk refuses (full), the result is kept
in memory, the trouble is shown in the status, and writing is tried again. A run folder is one model's. A
result belongs to an id *and* a content: an id that comes back with another request is refused.
"""

import json
import logging
import time
from pathlib import Path

from seal_nb.errors import ProtocolError, RunMismatch
from seal_nb.runs import Journal, read_json, write_json

log = logging.getLogger(__name__)


class Results:
    """Replies by request id. ``trouble`` says why something is not on the disk; "" if all is."""

    def __init__(self, path: Path, *, lock_wait_s: float = 10.0) -> None:
        self._journal = _open(path, lock_wait_s)
        self._model_file = path.with_name("model.json")
        self._unsaved: dict[str, tuple[str, bytes]] = {}  # content and reply
        self.unsaved_bytes = 0
        self.trouble = ""

    def __len__(self) -> int:
        return len(self._journal) + len(self._unsaved)

    @property
    def n_unsaved(self) -> int:
        return len(self._unsaved)

    def claim(self, model_id: str) -> None:
        """This run folder is that model's. Raises RunMismatch if it holds another one's results."""
        kept = read_json(self._model_file)["model_id"] if self._model_file.exists() else model_id
        if kept != model_id and len(self._journal):
            raise RunMismatch(
                f"{self._model_file.parent} holds results of model {kept!r}, the workers have {model_id!r}; "
                "give this server another run_dir"
            )
        try:
            write_json(self._model_file, {"model_id": model_id})
        except OSError as error:
            log.error("%s cannot be written (%s)", self._model_file, error)

    def get(self, request_id: str, content: str) -> bytes | None:
        """The reply once given to this request. Raises ProtocolError if the id was another request's."""
        if request_id in self._unsaved:
            kept_content, reply = self._unsaved[request_id]
        elif request_id in self._journal:
            kept = self._journal.get(request_id)
            kept_content, reply = kept["content"], json.dumps(kept["reply"]).encode()
        else:
            return None
        check_same(request_id, kept_content, content)
        return reply

    def put(self, request_id: str, content: str, reply: bytes) -> None:
        self._unsaved[request_id] = (content, reply)
        self.unsaved_bytes += len(reply)
        self.save()

    def save(self) -> bool:
        """Write what is not written yet; False (and ``trouble``) where the disk refuses."""
        for request_id in list(self._unsaved):
            try:
                content, reply = self._unsaved[request_id]
                self._journal.append(request_id, {"content": content, "reply": json.loads(reply)})
            except OSError as error:
                if not self.trouble:
                    log.error(
                        "results cannot be written (%s); kept in memory and tried again: free space", error
                    )
                self.trouble = f"{self.n_unsaved} results are not on the disk: {error}"
                return False
            self.unsaved_bytes -= len(reply)
            del self._unsaved[request_id]
        self.trouble = ""
        return True

    def close(self) -> None:
        self._journal.close()


def check_same(request_id: str, kept_content: str, content: str) -> None:
    """Raises ProtocolError if an id is used for a second, different request."""
    if kept_content != content:
        raise ProtocolError(
            f"field 'request_id' is {request_id!r}, which belongs to a different request; "
            "take a new id, or send exactly the earlier request",
            field="request_id",
        )


def _open(path: Path, lock_wait_s: float) -> Journal:
    """The journal, once an earlier server has let go of it. Raises RunMismatch where it does not."""
    deadline = time.monotonic() + lock_wait_s
    while True:
        try:
            return Journal(path, in_memory=False)
        except RunMismatch:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
