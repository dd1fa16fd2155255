"""A model hub on a local port, for the real client: repositories that are folders."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "0" * 40  # what every branch and tag means


@contextlib.contextmanager
def fake_hub(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve ``organisation/name`` and ``datasets/organisation/name``. Gives its address, and the paths asked for."""
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self) -> bytes:
            asked.append(self.path)
            content, status = b"", 404
            for name, folder in repositories.items():
                api = f"/api/{name if name.startswith('datasets/') else f'models/{name}'}"
                files = sorted(path for path in folder.rglob("*") if path.is_file())
                names = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
                if self.path.startswith(f"{api}/revision/"):
                    about = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in names]}
                    content, status = json.dumps(about).encode(), 200
                elif self.path.startswith(f"{api}/tree/"):
                    tree = [{"type": "file", "path": file, "oid": file, "size": size} for file, size in names.items()]
                    content, status = json.dumps(tree).encode(), 200
                elif self.path.startswith(f"/{name}/resolve/"):
                    file = folder / self.path.removeprefix(f"/{name}/resolve/").partition("/")[2]
                    if file.is_file():
                        content, status = file.read_bytes(), 200
            self.send_response(status)
            self.send_header("ETag", f'"{abs(hash(self.path.rpartition("/")[2])):x}"')
            # A commit is itself; a branch is the latest.
            revision = self.path.partition("/resolve/")[2].partition("/")[0]
            self.send_header("X-Repo-Commit", revision if len(revision) == 40 else COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            return content

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.wfile.write(self.answer())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
