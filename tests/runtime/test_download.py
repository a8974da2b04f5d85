"""Downloads, against a server on this machine that breaks, lies and stalls on demand."""

import hashlib
import http.server
import re
import threading
import time

import pytest

from cifar_jax.runtime.download import Unreachable, download
from cifar_jax.runtime.errors import UserError

CONTENT = bytes(range(256)) * 4000  # 1,024,000 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.ranges.append(self.headers.get("Range"))
        if server.status != 200:
            self.send_error(server.status)
            return
        if server.stall:
            server.release.wait(20)
            return
        start = 0
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if match and server.knows_ranges:
            start = int(match[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        # Breaks off after `portion` bytes: the connection closes before Content-Length.
        self.wfile.write(CONTENT[start : start + server.portion])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.ranges, server.status, server.stall = [], 200, False
        server.knows_ranges, server.portion = True, len(CONTENT)
        server.release = threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}/cifar.tar.gz"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


QUIET = {"progress": False, "remedy": "use --archive", "backoff_seconds": 0.001}


def fetch(server, path, **changes):
    options = {"size": len(CONTENT), "sha256": SHA256, **QUIET}
    return download(server.url, path, **options | changes)


def test_a_whole_file_arrives_and_is_not_fetched_twice(server, tmp_path):
    path = tmp_path / "deep" / "cifar.tar.gz"
    assert fetch(server, path) == path
    assert path.read_bytes() == CONTENT
    fetch(server, path)
    assert server.ranges == [None]
    assert [file.name for file in path.parent.iterdir()] == ["cifar.tar.gz"]


def test_a_breaking_connection_is_resumed_where_it_broke(server, tmp_path):
    server.portion = 300_000
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_a_later_call_continues_what_an_earlier_one_left(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:777_777])
    fetch(server, tmp_path / "file")
    assert server.ranges == ["bytes=777777-"]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.knows_ranges = False
    (tmp_path / "file.part").write_bytes(b"x" * 500)
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_no_progress_again_and_again_gives_up_and_keeps_what_came(server, tmp_path):
    server.portion = 0
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    with pytest.raises(UserError, match=r"broke off at 1,000 of 1,024,000.*continue"):
        fetch(server, tmp_path / "file", attempts=3)
    assert (tmp_path / "file.part").read_bytes() == CONTENT[:1000]
    assert not (tmp_path / "file").exists()


def test_another_hash_is_refused_and_removed(server, tmp_path):
    with pytest.raises(UserError, match=r"another hash"):
        fetch(server, tmp_path / "file", sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT) + 1])
def test_another_size_is_refused(server, tmp_path, size):
    with pytest.raises(UserError, match=r"another size.*1,024,000"):
        fetch(server, tmp_path / "file", size=size)
    assert list(tmp_path.iterdir()) == []


def test_the_size_may_come_from_the_server_and_the_hash_be_a_beginning(server, tmp_path):
    server.portion = 600_000
    fetch(server, tmp_path / "file", size=None, sha256=SHA256[:8])
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges == [None, None, "bytes=600000-"]


def test_a_whole_part_left_by_a_killed_process_is_taken(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    fetch(server, tmp_path / "file")
    assert server.ranges == []
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_an_answer_of_not_found_is_unreachable_at_once(server, tmp_path):
    server.status = 404
    with pytest.raises(Unreachable, match=r"404"):
        fetch(server, tmp_path / "file")


def test_a_silent_server_is_given_up_in_time(server, tmp_path):
    server.stall = True
    start = time.monotonic()
    with pytest.raises(Unreachable):
        fetch(server, tmp_path / "file", probe_seconds=0.3)
    assert time.monotonic() - start < 5


def test_a_closed_port_is_unreachable(server, tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    with pytest.raises(Unreachable, match=r"refused"):
        download(f"http://127.0.0.1:{port}/x", tmp_path / "file", size=1, sha256="0", **QUIET)


def test_only_web_addresses_are_taken(tmp_path):
    with pytest.raises(UserError, match=r"http"):
        download("file:///etc/hostname", tmp_path / "file", size=1, sha256="0", **QUIET)
