"""Fetching against a server on this computer that lies, breaks off and stalls on request: what ends at its
final name is whole, or it is not there."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limited import enough_memory
from PIL import Image

from refseg_nb.data import fetch as module
from refseg_nb.data.fetch import (
    Dropped,
    FetchError,
    FileSpec,
    ImageSpec,
    Manifest,
    Mismatch,
    Part,
    RetryPolicy,
    SetSpec,
    Unavailable,
    Unpack,
    body_range,
    check_image,
    check_space,
    download,
    fetch,
    fetch_images,
    image_names,
    load_manifest,
    may_continue,
    missing_images,
    range_request,
    receive,
    safe_member,
    unpack,
    validator_of,
    verify,
    with_retries,
)
from refseg_nb.data.refer import PUBLISHED, ImageInfo, Refer, write_refer
from refseg_nb.errors import MissingExtra

CONTENT = np.random.default_rng(0).bytes(100_000)
OTHER = np.random.default_rng(1).bytes(100_000)
QUICK = RetryPolicy(timeout=10, attempts=3, pause=0.005)
HASTY = RetryPolicy(timeout=0.5, attempts=3, pause=0.005)  # where a server stalls
SHA = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves `files`; `moods[path]` is a list of how the next answers misbehave; `log` holds (path, Range
    header) of each request."""

    def __init__(self):
        self.files, self.moods, self.log, self.closed = {}, {}, [], threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                outer.log.append((self.path, self.headers.get("Range")))
                mood, *values = (
                    outer.moods[self.path].pop(0) if outer.moods.get(self.path) else "fine"
                ).split()
                try:
                    self.answer(mood, values, outer.files.get(self.path))
                except (BrokenPipeError, ConnectionResetError):
                    pass

            def answer(self, mood, values, data):
                if mood.isdigit() or data is None and mood != "redirect":
                    self.send_response(int(mood) if mood.isdigit() else 404)
                    for value in values:
                        self.send_header("Retry-After", value)
                    self.send_header("Content-Length", "5")
                    self.end_headers()
                    return self.wfile.write(b"sorry")
                if mood == "redirect":
                    self.send_response(302)
                    self.send_header("Location", values[0])
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                if mood in ("html", "hidden-html"):
                    data = b"<!DOCTYPE html>\n<html>Sign in to download</html>"
                if mood == "other":
                    data = OTHER[: len(data)]
                etag = f'"{hashlib.md5(data).hexdigest()}"'
                asked, wanted = self.headers.get("Range"), self.headers.get("If-Range")
                if (
                    mood in ("no-ranges", "html")
                    or "no-ranges" in values
                    or asked
                    and wanted
                    and wanted != etag
                    and mood != "ignores-if-range"
                ):
                    asked = None
                first = int(asked[6:-1]) if asked else 0
                if asked and first >= len(data):
                    self.send_response(416)
                    self.send_header(
                        "Content-Range", f"bytes */{len(data) + (7 if mood == 'wrong-416' else 0)}"
                    )
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                body = data[first:]
                self.send_response(206 if asked else 200)
                if asked and mood != "no-content-range":
                    shift = 5 if mood == "wrong-206" else 0
                    self.send_header("Content-Range", f"bytes {first - shift}-{len(data) - 1}/{len(data)}")
                length = len(body) + {"says-more": 1000, "says-less": -1000}.get(mood, 0)
                if mood not in ("no-length", "chunked"):
                    self.send_header("Content-Length", str(length))
                if mood == "chunked":
                    self.send_header("Transfer-Encoding", "chunked")
                if "identity" not in self.headers.get("Accept-Encoding", ""):
                    mood = "gzip"
                if mood == "gzip":
                    self.send_header("Content-Encoding", "gzip")
                if mood == "html":
                    self.send_header("Content-Type", "text/html; charset=utf-8")
                if mood not in ("no-etag", "weak"):
                    self.send_header("ETag", etag)
                if mood == "weak":
                    self.send_header("ETag", "W/" + etag)
                self.end_headers()
                if mood == "cut":
                    body = body[: int(values[0])]
                if mood == "no-length" and values:
                    body = body[: int(values[0])]
                if mood == "stall":
                    self.wfile.write(body[: int(values[0])])
                    self.wfile.flush()
                    return outer.closed.wait(2)
                if mood == "drip":
                    for at in range(0, len(body), 20_000):
                        self.wfile.write(body[at : at + 20_000])
                        self.wfile.flush()
                        time.sleep(float(values[0]))
                    return
                if mood == "chunked":
                    for at in range(0, len(body), 30_000):
                        piece = body[at : at + 30_000]
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                        if values:
                            return
                    return self.wfile.write(b"0\r\n\r\n")
                self.wfile.write(body)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def asked(self, path="/a.bin"):
        """The Range headers of the requests for a path since the last call."""
        log, self.log[:] = list(self.log), []
        return [asked for where, asked in log if where == path]


@pytest.fixture
def server():
    server = Server()
    server.files["/a.bin"] = CONTENT
    yield server
    server.closed.set()
    server.http.shutdown()
    server.http.server_close()


def spec_of(server, *paths, name="a.bin", **more):
    return FileSpec(
        name,
        name,
        tuple(
            path if "://" in path or ":" in path[:8] else server.url + path for path in paths or ("/a.bin",)
        ),
        **more,
    )


def all_files(folder):
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and ".fetch" not in path.parts
    )


# ---------------------------------------------------------------- what to ask, and where the answer begins
@pytest.mark.parametrize(
    "status,headers,have,want",
    [
        (200, {"Content-Length": "9"}, 0, (0, 9)),
        (200, {"Content-Length": "9"}, 5, (0, 9)),
        (200, {}, 5, (0, None)),
        (200, {"Content-Length": "-1"}, 0, (0, None)),
        (200, {"Content-Length": "9" * 5000}, 0, (0, None)),
        (206, {"Content-Range": "bytes 5-8/9"}, 5, (5, 9)),
        (206, {"Content-Range": "bytes 5-8/*"}, 5, (5, None)),
        (206, {"Content-Range": "bytes 4-8/9"}, 5, None),
        (206, {}, 5, None),
        (206, {"Content-Range": "5-8/9"}, 5, None),
        (206, {"Content-Range": "bytes 5-8/9" + "9" * 20}, 5, None),
        (416, {"Content-Range": "bytes */5"}, 5, (5, 5)),
        (416, {"Content-Range": "bytes */4"}, 5, None),
        (416, {}, 5, None),
    ],
)
def test_where_an_answer_begins(status, headers, have, want):
    if want:
        assert body_range(status, headers, have) == want
    else:
        with pytest.raises(Dropped, match=f"from {have} on, the server answered {status}"):
            body_range(status, headers, have)


def test_what_is_asked():
    assert (
        range_request(0, '"v"') == {}
        and range_request(7) == {"Range": "bytes=7-"}
        and range_request(7, '"v"') == {"Range": "bytes=7-", "If-Range": '"v"'}
    )
    assert (
        validator_of({"ETag": '"v"', "Last-Modified": "x"}) == '"v"'
        and validator_of({"ETag": 'W/"v"'}) is None
        and validator_of({}) is None
    )


def test_a_part_without_a_readable_note_is_of_unknown_origin(tmp_path):
    part = Part(tmp_path / "a")
    part.begin("http://x/a", '"v"')
    part.path.write_bytes(b"12345")
    assert (
        part.have == 5
        and part.origin == {"url": "http://x/a", "validator": '"v"'}
        and may_continue(part, "http://x/a", False)
    )
    for damage in (b"{", b"[]", b"\xff"):
        part.note.write_bytes(damage)
        assert (
            part.origin == {}
            and not may_continue(part, "http://x/a", False)
            and may_continue(part, "http://x/a", True)
        )
    part.discard()
    assert all_files(tmp_path) == [] and not may_continue(part, "http://x/a", True)


# ---------------------------------------------------------------- one address, every misbehaviour
GOOD = [
    "fine",
    "cut 40000",
    "cut 0",
    "no-ranges",
    "no-length",
    "chunked",
    "stall 30000",
    "503",
    "429 0",
    "408",
    "no-etag",
    "weak",
    "cut 40000 no-ranges",
    "chunked short",
]


@pytest.mark.parametrize(
    "known",
    [{"sha256": SHA}, {"size": len(CONTENT)}, {"sha256": SHA, "size": len(CONTENT)}, {}],
    ids=["hash", "size", "both", "nothing"],
)
@pytest.mark.parametrize("mood", GOOD)
def test_what_mends_itself_ends_whole(server, tmp_path, mood, known):
    server.moods["/a.bin"] = [mood, "fine"]
    url, found, problems = download(
        spec_of(server, **known), tmp_path / "a.bin", HASTY if "stall" in mood else QUICK
    )
    assert (
        (tmp_path / "a.bin").read_bytes() == CONTENT and all_files(tmp_path) == ["a.bin"] and problems == []
    )
    assert found == f"sha256:{SHA}" and url == server.url + "/a.bin"


@pytest.mark.parametrize(
    "known",
    [{"sha256": SHA}, {"sha256": SHA, "size": len(CONTENT)}, {"size": len(CONTENT)}],
    ids=["hash", "both", "size"],
)
@pytest.mark.parametrize(
    "mood,says",
    [
        ("404", "HTTP 404 Not Found"),
        ("403", "HTTP 403 Forbidden"),
        ("410", "HTTP 410 Gone"),
        ("500", r"HTTP 500 Internal Server Error \(3 tries\)"),
        ("html", "answers with a web page"),
        ("hidden-html", "web page|offers 47 bytes|offers 48 bytes"),
        ("gzip", "encoding not asked for"),
        ("says-less", "sha256 begins with|offers 99,000 bytes, the file has 100,000"),
        ("says-more", "offers 101,000 bytes|broke off"),
        ("cut 0", r"broke off \(3 tries\)"),
        ("stall 0", "no byte for 0.5 seconds"),
        ("cut 0 no-ranges", r"broke off \(3 tries\)"),
        ("redirect ftp://127.0.0.1/a.bin", "InvalidSchema"),
        ("redirect /a.bin", "Exceeded 10 redirects"),
        ("redirect /page", "answers with a web page"),
        ("redirect file:///etc/passwd", "InvalidSchema"),
    ],
)
def test_what_does_not_mend_is_said_in_one_line_and_leaves_no_file(server, tmp_path, mood, says, known):
    server.files["/page"] = b""
    server.moods |= {"/a.bin": [mood] * 40, "/page": ["html"] * 9}
    with pytest.raises(Unavailable, match=says) as caught:
        download(spec_of(server, **known), tmp_path / "a.bin", HASTY if "stall" in mood else QUICK)
    assert "\n" not in str(caught.value) and not (tmp_path / "a.bin").exists()
    server.moods.clear()
    # whatever was left behind does no harm to the next try
    download(spec_of(server, **known), tmp_path / "a.bin", QUICK)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and all_files(tmp_path) == ["a.bin"]


def test_another_file_of_the_same_size_is_thrown_away(server, tmp_path):
    server.moods["/a.bin"] = ["other"] * 9
    with pytest.raises(
        Unavailable,
        match=(
            "sha256 begins with .* expected is .*: it is damaged or another file; what came from 127.0.0.1"
            " was thrown away"
        ),
    ):
        download(spec_of(server, sha256=SHA), tmp_path / "a.bin", QUICK)
    assert all_files(tmp_path) == [] and len(server.asked()) == 1


def test_no_server_at_all(tmp_path):
    with pytest.raises(
        Unavailable, match=r"http://127.0.0.1:9/a: the connection failed or broke off \(3 tries\)"
    ):
        download(FileSpec("a", "a", ("http://127.0.0.1:9/a",)), tmp_path / "a", QUICK)
    with pytest.raises(Unavailable, match="a: no address is known"):
        download(FileSpec("a", "a"), tmp_path / "a", QUICK)


def test_plain_http_behind_https_is_refused_where_nothing_verifies(tmp_path):
    class Session:
        def get(self, url, **more):
            answer = SimpleNamespace(
                status_code=200,
                headers={"Content-Length": "3"},
                url="http://elsewhere/a",
                iter_content=lambda n: [b"abc"],
            )
            return type("Answer", (), {"__enter__": lambda self: answer, "__exit__": lambda *a: None})()

    part = Part(tmp_path / "a")
    with pytest.raises(Unavailable, match=r"leads to plain http \(elsewhere\)"):
        receive(Session(), "https://safe/a", part)
    receive(Session(), "https://safe/a", part, size=3)
    assert part.path.read_bytes() == b"abc"


# ---------------------------------------------------------------- going on
def interrupted(server, dest, mood="cut 50000", **known):
    """A first run that ends early."""
    server.moods["/a.bin"] = [mood, "404"]
    with pytest.raises(Unavailable):
        download(spec_of(server, **known), dest, QUICK)
    have = Part(dest).have
    assert 0 < have <= 50_000 and not dest.exists()
    server.asked()
    return have


@pytest.mark.parametrize(
    "known", [{"sha256": SHA}, {"size": len(CONTENT)}, {}], ids=["hash", "size", "nothing"]
)
def test_a_second_run_asks_for_the_rest_only(server, tmp_path, known):
    have = interrupted(server, tmp_path / "a.bin", **known)
    download(spec_of(server, **known), tmp_path / "a.bin", QUICK)
    assert (
        server.asked() == [f"bytes={have}-"]
        and (tmp_path / "a.bin").read_bytes() == CONTENT
        and all_files(tmp_path) == ["a.bin"]
    )


def test_ten_drops_in_one_run_are_no_failure_while_bytes_arrive(server, tmp_path):
    server.moods["/a.bin"] = ["cut 17000"] * 5 + ["stall 17000"]
    download(spec_of(server), tmp_path / "a.bin", HASTY)
    offsets = [int(asked[6:-1]) for asked in server.asked()[1:]]
    assert (
        (tmp_path / "a.bin").read_bytes() == CONTENT
        and offsets == sorted(offsets)
        and len(set(offsets)) == len(offsets) >= 5
    )


def test_a_server_without_ranges_that_always_breaks_off_is_given_up(server, tmp_path):
    server.moods["/a.bin"] = ["cut 50000 no-ranges"] * 40
    with pytest.raises(Unavailable, match=r"broke off \(3 tries\)"):
        download(spec_of(server), tmp_path / "a.bin", QUICK)
    assert len(server.asked()) == 4 and not (tmp_path / "a.bin").exists()  # the first try gained something


@pytest.mark.parametrize(
    "known,asks",
    [({"size": len(CONTENT)}, [None, "bytes=60000-"]), ({"sha256": SHA}, [None])],
    ids=["size", "hash"],
)
def test_an_end_that_comes_too_early_without_a_word(server, tmp_path, known, asks):
    """No length is stated, and the connection closes as if all had been sent: only size or hash can tell."""
    server.moods["/a.bin"] = ["no-length 60000"] * 2
    if "size" in known:
        download(spec_of(server, **known), tmp_path / "a.bin", QUICK)
    else:
        with pytest.raises(Unavailable, match="sha256 begins with"):
            download(spec_of(server, **known), tmp_path / "a.bin", QUICK)
    assert server.asked() == asks and all_files(tmp_path) == (["a.bin"] if "size" in known else [])


def test_a_length_that_is_too_large_is_mended_by_the_next_answer(server, tmp_path):
    server.moods["/a.bin"] = ["says-more"]
    download(spec_of(server, sha256=SHA), tmp_path / "a.bin", QUICK)
    assert len(server.asked()) == 2 and (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("mood", ["fine", "ignores-if-range"])
@pytest.mark.parametrize(
    "known",
    [{"sha256": hashlib.sha256(OTHER).hexdigest()}, {"size": len(CONTENT)}, {}],
    ids=["hash", "size", "nothing"],
)
def test_a_file_that_changed_between_the_parts_is_never_glued(server, tmp_path, mood, known):
    interrupted(server, tmp_path / "a.bin", **known)
    server.files["/a.bin"] = OTHER
    server.moods["/a.bin"] = [mood, "fine"]
    download(spec_of(server, **known), tmp_path / "a.bin", QUICK)
    assert (tmp_path / "a.bin").read_bytes() == OTHER and all_files(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("first", ["no-etag", "weak"])
def test_without_version_and_hash_it_begins_anew(server, tmp_path, first):
    part = Part(tmp_path / "a.bin")
    part.begin(server.url + "/a.bin", None)
    part.path.write_bytes(OTHER[:50_000])
    download(spec_of(server, size=len(CONTENT)), tmp_path / "a.bin", QUICK)
    assert server.asked() == [None] and (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("mood", ["wrong-206", "no-content-range", "no-ranges"])
def test_a_server_that_mistakes_ranges(server, tmp_path, mood):
    have = interrupted(server, tmp_path / "a.bin")
    server.moods["/a.bin"] = [mood, "fine"]
    download(spec_of(server), tmp_path / "a.bin", QUICK)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.asked() == ([f"bytes={have}-"] if mood == "no-ranges" else [f"bytes={have}-", None])


@pytest.mark.parametrize(
    "extra,mood,asks",
    [
        (0, "fine", ["bytes=100000-"]),
        (0, "wrong-416", ["bytes=100000-", None]),
        (9, "fine", ["bytes=100009-", None]),
    ],
)
def test_416(server, tmp_path, extra, mood, asks):
    """The part is the whole file already; or longer than the file is now."""
    part = Part(tmp_path / "a.bin")
    part.begin(server.url + "/a.bin", f'"{hashlib.md5(CONTENT).hexdigest()}"')
    part.path.write_bytes(CONTENT + bytes(extra))
    server.moods["/a.bin"] = [mood]
    download(spec_of(server), tmp_path / "a.bin", QUICK)
    assert server.asked() == asks and (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_whole_part_of_known_size_is_only_verified(server, tmp_path):
    part = Part(tmp_path / "a.bin")
    part.begin(server.url + "/a.bin", None)
    part.path.write_bytes(CONTENT)
    download(spec_of(server, size=len(CONTENT), sha256=SHA), tmp_path / "a.bin", QUICK)
    assert server.asked() == [] and all_files(tmp_path) == ["a.bin"]


CHILD = """
import sys
from pathlib import Path
from refseg_nb.data.fetch import FileSpec, download
print("begin", flush=True)
download(FileSpec("a.bin", "a.bin", (sys.argv[1],)), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "Ctrl-C"])
def test_a_killed_program_goes_on_where_it_was(server, tmp_path, kill):
    server.moods["/a.bin"] = ["drip 0.4"]
    code = (
        CHILD
        if kill == signal.SIGKILL
        else "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)" + CHILD
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, server.url + "/a.bin", str(tmp_path / "a.bin")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    part = Part(tmp_path / "a.bin")
    for _ in range(600):
        if part.have >= 32_768:
            break
        time.sleep(0.05)
    child.send_signal(kill)
    child.communicate(timeout=30)
    assert child.returncode != 0 and not (tmp_path / "a.bin").exists() and 32_768 <= part.have < 100_000
    assert part.path.read_bytes() == CONTENT[: part.have]
    have = part.have
    server.asked()
    download(spec_of(server), tmp_path / "a.bin", QUICK)
    assert (
        server.asked() == [f"bytes={have}-"]
        and (tmp_path / "a.bin").read_bytes() == CONTENT
        and all_files(tmp_path) == ["a.bin"]
    )


def test_patience_counts_only_tries_that_gained_nothing(monkeypatch):
    waits, steps = [], iter([1, 2, 2, 3, 3, 3, 3])
    monkeypatch.setattr(module.time, "sleep", waits.append)
    have = [0]

    def action():
        have[0] = next(steps)
        raise Dropped("gone", wait=7 if have[0] == 1 else 0)

    with pytest.raises(Unavailable, match=r"gone \(3 tries\)"):
        with_retries(action, RetryPolicy(attempts=3, pause=1), lambda: have[0])
    assert waits == [7, 1, 2, 1, 2, 4] and have == [3]


# ---------------------------------------------------------------- mirrors
def test_the_next_address_takes_over(server, tmp_path):
    bad = {
        "/gone": "404",
        "/forbidden": "403",
        "/broken": "500",
        "/page": "html",
        "/long": "fine",
        "/stalls": "stall 0",
        "/other": "other",
    }
    server.files |= {path: CONTENT + b"x" if path == "/long" else CONTENT for path in bad}
    server.moods = {path: [mood] * 9 for path, mood in bad.items()}
    url, _, problems = download(
        spec_of(server, *bad, "/a.bin", size=len(CONTENT), sha256=SHA), tmp_path / "a.bin", HASTY
    )
    assert (
        url.endswith("/a.bin")
        and (tmp_path / "a.bin").read_bytes() == CONTENT
        and all_files(tmp_path) == ["a.bin"]
    )
    expected = [
        "404",
        "403",
        "500",
        "web page",
        "offers 100,001 bytes, the file has 100,000",
        "no byte for",
        "thrown away",
    ]
    for problem, says in zip(problems, expected, strict=True):
        assert says in problem and "\n" not in problem


def test_a_known_hash_lets_a_mirror_finish_what_another_began(server, tmp_path):
    server.files["/b.bin"] = CONTENT
    server.moods["/a.bin"] = ["cut 50000", "404"]
    download(spec_of(server, "/a.bin", "/b.bin", sha256=SHA), tmp_path / "a.bin", QUICK)
    first, second, third = server.log
    assert third[0] == "/b.bin" and third[1] == second[1] and (tmp_path / "a.bin").read_bytes() == CONTENT


def test_the_note_names_the_mirror_that_came_last(server, tmp_path):
    server.files["/b.bin"] = CONTENT
    server.moods = {"/a.bin": ["cut 50000", "404"], "/b.bin": ["cut 30000", "404"]}
    with pytest.raises(Unavailable):
        download(spec_of(server, "/a.bin", "/b.bin", sha256=SHA), tmp_path / "a.bin", QUICK)
    part = Part(tmp_path / "a.bin")
    assert (
        part.origin == {"url": server.url + "/b.bin", "validator": f'"{hashlib.md5(CONTENT).hexdigest()}"'}
        and part.path.read_bytes() == CONTENT[: part.have]
    )


def test_without_a_hash_a_mirror_begins_anew(server, tmp_path):
    server.files["/b.bin"] = OTHER
    server.moods["/a.bin"] = ["cut 50000", "404"]
    download(spec_of(server, "/a.bin", "/b.bin", size=len(CONTENT)), tmp_path / "a.bin", QUICK)
    assert server.log[-1] == ("/b.bin", None) and (tmp_path / "a.bin").read_bytes() == OTHER


def test_a_wrong_mixture_is_noticed_and_the_address_asked_again_from_the_start(server, tmp_path):
    part = Part(tmp_path / "a.bin")
    part.begin("http://dead/a.bin", '"v"')
    part.path.write_bytes(OTHER[:50_000])
    _, _, problems = download(spec_of(server, sha256=SHA), tmp_path / "a.bin", QUICK)
    assert (
        server.asked() == ["bytes=50000-", None]
        and len(problems) == 1
        and (tmp_path / "a.bin").read_bytes() == CONTENT
    )


def test_the_address_of_the_part_is_asked_first(server, tmp_path):
    server.files["/b.bin"] = CONTENT
    part = Part(tmp_path / "a.bin")
    part.begin(server.url + "/b.bin", f'"{hashlib.md5(CONTENT).hexdigest()}"')
    part.path.write_bytes(CONTENT[:70_000])
    download(spec_of(server, "/a.bin", "/b.bin"), tmp_path / "a.bin", QUICK)
    assert server.log == [("/b.bin", "bytes=70000-")]


def test_google_drive_needs_gdown_and_uses_it(server, tmp_path, monkeypatch):
    spec = spec_of(server, "gdrive:abc_1-2", sha256=SHA)
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(MissingExtra, match=r"needs the package gdown.*refseg_nb\[drive\]"):
        download(spec, tmp_path / "a.bin", QUICK)
    two = spec_of(server, "gdrive:abc_1-2", "/nothing", sha256=SHA)
    with pytest.raises(Unavailable, match="gdrive:abc_1-2: Google Drive needs the package gdown"):
        download(two, tmp_path / "a.bin", QUICK)

    def answers(content, error=None):
        def get(id, output, quiet):
            assert id == "abc_1-2"
            if error:
                raise error
            if content is not None:
                Path(output).write_bytes(content)
            return output if content is not None else None

        monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace(download=get))

    for content, error, says in [
        (None, None, "gdown got nothing"),
        (None, RuntimeError("quota\nexceeded"), r"gdown failed \(RuntimeError: quota\)"),
        (b"<html>virus scan", None, "a web page has arrived"),
        (OTHER, None, "thrown away"),
    ]:
        answers(content, error)
        with pytest.raises(Unavailable, match=says):
            download(spec, tmp_path / "a.bin", QUICK)
        assert all_files(tmp_path) == []
    answers(CONTENT)
    assert (
        download(spec, tmp_path / "a.bin", QUICK)[0] == "gdrive:abc_1-2"
        and (tmp_path / "a.bin").read_bytes() == CONTENT
    )


# ---------------------------------------------------------------- is it the file?
def zip_of(members, path=None, method=zipfile.ZIP_DEFLATED):
    target = path or io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path or target.getvalue()


def test_verify_against_hashlib(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(CONTENT)
    md5 = hashlib.md5(CONTENT).hexdigest()
    for known in ({"sha256": SHA}, {"sha256_prefix": SHA[:8]}, {}, {"sha256": SHA, "md5": md5}):
        assert verify(path, FileSpec("x.bin", "x.bin", **known)) == f"sha256:{SHA}"
    assert verify(path, FileSpec("x.bin", "x.bin", md5=md5)) == f"md5:{md5}"
    for known in ({"sha256": SHA[:-1] + "z"}, {"md5": "0" * 32}, {"sha256_prefix": "0" * 8}):
        with pytest.raises(Mismatch, match="x.bin: its (sha256|md5) begins with"):
            verify(path, FileSpec("x.bin", "x.bin", **known))
    with pytest.raises(Mismatch, match="x.bin: has 100,000 bytes, expected are 5"):
        verify(path, FileSpec("x.bin", "x.bin", size=5))


def tar_bytes(members, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


QUERIES = json.dumps({"1_1": ["sky", "the sky"], "1_2": ["house"]}).encode()
ZIP = zip_of({"refs.txt": b"the tall chimney " * 50}, method=zipfile.ZIP_STORED)
TAR = tar_bytes({"mask/1_1.mat": OTHER})


@pytest.mark.parametrize(
    "name,content,ok",
    [
        ("a.zip", ZIP, True),
        ("a.zip", ZIP[:-30], False),
        ("a.zip", ZIP[:60] + b"!" + ZIP[61:], False),
        ("a.zip", b"PK\x03\x04", False),
        ("a.zip", CONTENT, False),
        ("a.tar.gz", TAR, True),
        ("a.tar.gz", TAR[:-3000], False),
        ("a.tar.gz", CONTENT, False),
        ("a.json", QUERIES, True),
        ("a.json", QUERIES[:-3], False),
        ("a.json", b'{"1_1": ["sky"]}', False),
        ("a.json", b"[1]", False),
        ("a.pth", b"PK\x03\x04" + CONTENT, True),
        ("a.pth.tar", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + CONTENT, True),
        ("a.pth.tar", CONTENT, False),
        ("a.pth", ZIP, True),
        ("a.pth", ZIP[:60] + b"!" + ZIP[61:], False),
        ("a.zip", b"\xef\xbb\xbf \n<HTML>", False),
        ("a.bin", b"<!doctype HTML>", False),
        ("a.zip", zip_of({"z": bytes(10**7)}), False),
    ],
)
def test_what_can_be_said_without_a_hash(tmp_path, name, content, ok):
    path = tmp_path / "file.part"
    path.write_bytes(content)
    spec = FileSpec(name, name, counts=(2, 3) if name.endswith("json") else None)
    if ok:
        verify(path, spec)
    else:
        with pytest.raises(Mismatch, match=f"^{name}: .*") as caught:
            verify(path, spec)
        assert "\n" not in str(caught.value)


def test_torch_files_are_recognised(tmp_path):
    import torch

    for new in (True, False):
        torch.save(
            {"state_dict": {"w": torch.arange(5)}}, tmp_path / "w.pth.tar", _use_new_zipfile_serialization=new
        )
        verify(tmp_path / "w.pth.tar", FileSpec("w.pth.tar", "w.pth.tar"))


# ---------------------------------------------------------------- archives
@pytest.mark.parametrize(
    "name",
    [
        "../a",
        "a/../../b",
        "/a",
        "//a",
        "a/..",
        "..",
        "a\\..\\b",
        "\\a",
        "C:/a",
        "c:a",
        "a\x00b",
        "a\nb",
        "a\x1b[2J",
        "a\udc80",
    ],
)
def test_unsafe_names(name):
    with pytest.raises(FetchError, match="the member .* leads out of the folder, or has a name") as caught:
        safe_member(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name,safe",
    [
        ("a", "a"),
        ("./a//b/", "a/b"),
        ("refs(unc).p", "refs(unc).p"),
        ("..a/b..", "..a/b.."),
        ("./", ""),
        ("Bäume/ö.jpg", "Bäume/ö.jpg"),
    ],
)
def test_safe_names(name, safe):
    assert safe_member(name) == safe


def planted_zips(folder):
    yield "slip", zip_of({"a.json": "1", "../escaped": "x"}, folder / "slip.zip"), "leads out"
    yield "absolute", zip_of({"/tmp/escaped-by-refseg-test": "x"}, folder / "absolute.zip"), "leads out"
    yield "backslash", zip_of({"..\\escaped": "x"}, folder / "backslash.zip"), "leads out"
    yield "bomb", zip_of({"zeros": bytes(30_000_000)}, folder / "bomb.zip"), "would unpack to 30.0 MB"
    yield "twins", zip_of({"A": "1", "a": "2"}, folder / "twins.zip"), "two members would become 'a'"
    yield "doubled twins", zip_of({"x/into/a": "1", "into/a": "2"}, folder / "d.zip"), "two members"
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    yield "link", zip_of({link: "/etc/passwd"}, folder / "link.zip"), "link or a device"
    data = bytearray(zip_of({"a": "secret"}, method=zipfile.ZIP_STORED))
    for at in (data.index(b"PK\x03\x04") + 6, data.index(b"PK\x01\x02") + 8):
        data[at] |= 1
    (folder / "locked.zip").write_bytes(data)
    yield "encrypted", folder / "locked.zip", "encrypted"
    data = bytearray(zip_of({"a": b"x" * 900, "b": b"y" * 900}, method=zipfile.ZIP_STORED))
    data[1200] ^= 1
    (folder / "flipped.zip").write_bytes(data)
    yield "checksum", folder / "flipped.zip", "cannot be unpacked"
    (folder / "cut.zip").write_bytes(zip_of({"a": OTHER})[:-50])
    yield "cut", folder / "cut.zip", "cannot be unpacked"
    (folder / "text.zip").write_bytes(b"no archive")
    yield "text", folder / "text.zip", "cannot be unpacked"
    yield "file and folder", zip_of({"a": "1", "a/b": "2"}, folder / "fold.zip"), "cannot be unpacked"


def planted_tars(folder):
    def tar(name, *infos, mode="w"):
        with tarfile.open(folder / name, mode) as archive:
            for info in infos:
                archive.addfile(info, io.BytesIO(bytes(info.size)))
        return folder / name

    def info(name, kind=tarfile.REGTYPE, link="", size=0):
        made = tarfile.TarInfo(name)
        made.type, made.linkname, made.size = kind, link, size
        return made

    yield "slip", tar("slip.tar", info("a"), info("../escaped")), "leads out"
    yield "absolute", tar("abs.tar", info("/tmp/escaped-by-refseg-test")), "leads out"
    yield (
        "symlink",
        tar("sym.tar", info("out", tarfile.SYMTYPE, ".."), info("out/escaped", size=3)),
        "link or a device",
    )
    yield (
        "symlink inside",
        tar("sym2.tar", info("a", size=3), info("b", tarfile.SYMTYPE, "a")),
        "link or a device",
    )
    yield "hardlink", tar("hard.tar", info("passwd", tarfile.LNKTYPE, "/etc/passwd")), "link or a device"
    yield "device", tar("dev.tar", info("null", tarfile.CHRTYPE)), "link or a device"
    yield "fifo", tar("fifo.tar", info("pipe", tarfile.FIFOTYPE)), "link or a device"
    yield "bomb", tar("bomb.tar.gz", info("zeros", size=30_000_000), mode="w:gz"), "would unpack to 30.0 MB"
    yield "twins", tar("twins.tar", info("a"), info("A")), "two members"
    (folder / "cut.tar.gz").write_bytes(tar_bytes({"a": CONTENT})[:-5000])
    yield "cut", folder / "cut.tar.gz", "cannot be unpacked"


@pytest.mark.parametrize("planted", [planted_zips, planted_tars])
def test_planted_archives_leave_nothing_behind(tmp_path, planted):
    (tmp_path / "archives").mkdir()
    (tmp_path / "target").mkdir()
    for what, path, says in planted(tmp_path / "archives"):
        with pytest.raises(FetchError, match=says) as caught:
            unpack(path, tmp_path / "target" / "into")
        assert path.name in str(caught.value) and "\n" not in str(caught.value), what
        assert isinstance(caught.value, Mismatch) or what in ("file and folder", "cut"), what
        assert list((tmp_path / "target").iterdir()) == [] and not (tmp_path / "escaped").exists(), what
        assert not os.path.exists("/tmp/escaped-by-refseg-test")


@pytest.mark.parametrize("pack", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("prefix", ["", "refcoco/", "refcoco/refcoco/", "./data/refcoco/"])
def test_whatever_folder_they_are_in_members_come_out_flat(tmp_path, pack, prefix):
    members = {
        f"{prefix}instances.json": b"{}",
        f"{prefix}refs(unc).p": CONTENT,
        f"{prefix}readme.txt": b"no",
        f"__MACOSX/{prefix}._instances.json": b"no",
    }
    path = tmp_path / f"a.{pack}"
    path.write_bytes(
        zip_of(members) if pack == "zip" else tar_bytes(members, "w:gz" if pack == "tar.gz" else "w")
    )
    assert unpack(path, tmp_path / "refcoco", ("instances.json", "refs(*).p")) == [
        "instances.json",
        "refs(unc).p",
    ]
    assert (
        all_files(tmp_path) == [path.name, "refcoco/instances.json", "refcoco/refs(unc).p"]
        and (tmp_path / "refcoco/refs(unc).p").read_bytes() == CONTENT
    )
    unpack(path, tmp_path / "refcoco", ("instances.json",))  # the same again is no conflict


def test_what_lacks_a_member_says_what_it_has(tmp_path):
    zip_of({"data/one.txt": "1", "data/two.txt": "2"}, tmp_path / "a.zip")
    with pytest.raises(
        FetchError, match="a.zip: holds no instances.json; it holds data/one.txt, data/two.txt"
    ):
        unpack(tmp_path / "a.zip", tmp_path / "r", ("instances.json",))
    assert not (tmp_path / "r").exists()


def test_your_own_files_stay(tmp_path):
    zip_of({"a": "theirs", "b": "new"}, tmp_path / "x.zip")
    (tmp_path / "into").mkdir()
    (tmp_path / "into" / "a").write_text("mine")
    with pytest.raises(
        FetchError, match="x.zip: a is in into/ already and differs from the archive's: move it away"
    ):
        unpack(tmp_path / "x.zip", tmp_path / "into")
    assert all_files(tmp_path) == ["into/a", "x.zip"] and (tmp_path / "into" / "a").read_text() == "mine"
    unpack(tmp_path / "x.zip", tmp_path / "into", wanted={"a"}, overwrite=True)
    assert (tmp_path / "into" / "a").read_text() == "theirs" and all_files(tmp_path) == ["into/a", "x.zip"]


def test_unpacking_that_is_killed_leaves_nothing_in_the_target_and_is_cleaned_up(tmp_path):
    zip_of({"a": "1", "b": "2"}, tmp_path / "x.zip")
    code = (
        "import os, shutil; from refseg_nb.data import fetch\n"
        "real, calls = shutil.copyfileobj, []\n"
        "def copy(*a): real(*a); calls.append(1); len(calls) == 2 and os._exit(9)\n"
        "fetch.shutil.copyfileobj = copy\n"
        f"fetch.unpack({str(tmp_path / 'x.zip')!r}, {str(tmp_path / 'into')!r})"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        == 9
    )
    assert not (tmp_path / "into").exists() and len(list(tmp_path.iterdir())) == 2
    unpack(tmp_path / "x.zip", tmp_path / "into")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["into", "x.zip"]


def test_no_room_to_unpack(tmp_path, monkeypatch):
    zip_of({"a": CONTENT}, tmp_path / "x.zip")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(FetchError, match="x.zip: unpacks to 100.0 kB, 1.0 kB are free"):
        unpack(tmp_path / "x.zip", tmp_path / "into")


ARCHIVES = [
    zip_of({"into/a.json": "{}" * 40, "into/b/c": "x" * 300}),
    tar_bytes({"into/a.json": b"{}" * 40, "into/b/c": b"x" * 300}, "w"),
    TAR,
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(ARCHIVES),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=3)), max_size=3),
    st.floats(0, 1),
)
def test_fuzz_archives(tmp_path, content, damages, keep):
    """Damaged anywhere, cut anywhere: only the module's own error comes out, and nothing appears outside of
    the folder, nor a part of it."""
    content = bytearray(content)
    for at, junk in damages:
        content[(i := int(at * len(content))) : i + len(junk)] = junk
    if keep < 0.3:
        content = content[: int(keep * 3 * len(content))]
    shutil.rmtree(tmp_path / "target", ignore_errors=True)
    (tmp_path / "target").mkdir()
    (tmp_path / "x").write_bytes(content)
    try:
        placed = unpack(tmp_path / "x", tmp_path / "target" / "into")
    except FetchError as error:
        enough_memory(error)
        assert str(error).startswith("x: ") and str(error).isprintable()
        placed = []
    assert all_files(tmp_path) == sorted([f"target/into/{name}" for name in placed] + ["x"])


# ---------------------------------------------------------------- the package's manifest
@pytest.fixture(scope="module")
def book():
    return load_manifest()


def test_every_hash_of_the_manifest_is_whole(book):
    hashed = [spec for spec in book.files.values() if spec.hash]
    assert len(hashed) == 5
    for spec in hashed:
        for value, digits in ((spec.sha256, 64), (spec.md5, 32), (spec.sha256_prefix, 8)):
            assert value is None or len(value) == digits and set(value) <= set("0123456789abcdef"), spec.name


def test_every_file_can_be_verified_cited_and_had_by_hand(book):
    for spec in book.files.values():
        assert spec.by_hand and spec.cite and spec.licence and "\n" not in spec.by_hand, spec.name
        assert "{to}" in spec.by_hand or spec.first_use, spec.name
        for url in spec.urls:
            assert url.startswith(("https://", "gdrive:")) or spec.size or spec.hash or spec.checked_by, url
            if not url.startswith("gdrive:"):
                assert url.rsplit("/", 1)[1] == spec.name
    assert {spec.name for spec in book.files.values()} == {
        name for wanted in book.sets.values() for name in wanted.files
    } | {"train2014.zip"}


def test_the_manifest_agrees_with_the_rest_of_the_package(book, monkeypatch, tmp_path):
    from torchtext.vocab import GloVe
    from torchvision.models import ResNet101_Weights

    from refseg_nb.data import words
    from refseg_nb.data.refer import image_folder_of
    from refseg_nb.models import backbones

    assert book.files["resnet101-63fe2227.pth"].urls == (ResNet101_Weights.IMAGENET1K_V1.url,)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    voc = book.files[backbones.VOC_CHECKPOINT]
    assert module._base(voc.base, tmp_path) / voc.to == backbones._hub(backbones.VOC_CHECKPOINT)
    monkeypatch.setenv("HOME", str(tmp_path))
    glove = book.files["glove.840B.300d.zip"]
    target = module._base(glove.base, tmp_path) / glove.to
    target.parent.mkdir(parents=True)
    target.touch()
    assert words._locate("glove.840B.300d", tmp_path / ".cache" / "refseg_nb" / "vectors") == target
    assert {url.rsplit("/", 1)[1] for url in glove.urls} == {GloVe.url["840B"].rsplit("/", 1)[1]}
    for name in ("refcoco", "refcoco+", "refcocog"):
        spec = book.files[f"{name}.zip"]
        assert {partition for data, partition in PUBLISHED if data == name} == set(
            spec.unpack.partitions
        ) and spec.unpack.into == name
        assert {f"refs({partition}).p" for partition in spec.unpack.partitions} | {"instances.json"} == set(
            spec.unpack.members
        )
        assert book.images[book.sets[name].images].folder == image_folder_of(name)
    assert book.sets["refcoco"].image_count == sum(row[0] for row in PUBLISHED["refcoco", "unc"].values())
    assert book.sets["refcocog"].image_count == sum(row[0] for row in PUBLISHED["refcocog", "umd"].values())
    assert book.files["saiapr_tc-12.zip"].unpack.into == image_folder_of("refclef")


GOOD_FILE = {"to": "a.zip", "licence": "-", "cite": "-", "by_hand": "-"}


@pytest.mark.parametrize(
    "more,says",
    [
        ({"sha256": "7f92"}, "sha256 has 4 characters, not 64"),
        ({"md5": "Z" * 32}, "md5 has 32 characters"),
        ({"sha256_prefix": "abc"}, "at least 8"),
        ({"urls": ["ftp://x/a"]}, "neither"),
        ({"urls": ["file:///etc/passwd"]}, "neither"),
        ({"urls": ["https://"]}, "neither"),
        ({"urls": ["gdrive:a/b"]}, "neither"),
        ({"urls": ["http://x/a.zip"]}, "plain http"),
        ({"urls": ["http://[x/a.zip"]}, "neither"),
        ({"to": "../a"}, "not a path below"),
        ({"to": "/a"}, "not a path below"),
        ({"to": ""}, "not a path below"),
        ({"unpack": {"into": "a/../.."}}, "not a path below"),
        ({"unpack": {}}, "missing 1 required .* 'into'"),
        ({"unpack": {"into": "a", "limit": 1}}, "unknown key 'limit'"),
        ({"unpack": 3}, "unpack cannot be 3"),
        ({"base": "home"}, "base is 'home'"),
        ({"size": "5"}, "size cannot be '5'"),
        ({"size": True}, "size cannot be True"),
        ({"urls": [3]}, r"urls cannot be \[3\]"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"by_hand": ""}, "must be there"),
    ],
)
def test_bad_manifests_are_refused_with_the_place(tmp_path, more, says):
    def toml(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
        return json.dumps(value)

    path = tmp_path / "m.toml"
    path.write_text(
        '[files."a.zip"]\n' + "\n".join(f"{key} = {toml(value)}" for key, value in (GOOD_FILE | more).items())
    )
    with pytest.raises(FetchError, match=rf"m.toml: files.a.zip.*{says}"):
        load_manifest(path)


@pytest.mark.parametrize(
    "text,says",
    [
        ("[files", "not readable as TOML"),
        ("[stuff]", "unknown table 'stuff'"),
        ("[sets.a]\nfiles = ['x']", "sets.a: there is no file 'x'"),
        ("[sets.a]\nfiles = []\nimages = 'x'", "there are no images 'x'"),
        ("[sets]\na = 3", "sets.a is int, not a table"),
        ("sets = 3", "unknown table 'sets'"),
        ("[files.'a b']\nto = 'a'", "a name has only"),
        ("[images.'../c']\nfolder='f'\nfile_name=''\nurls=[]\narchive=''\ncount=1", "a name has only"),
        (
            "[images.c]\nfolder = 'f'\nfile_name = '../%012d.jpg'\nurls = []\narchive = 'x'\ncount = 1",
            "file_name is",
        ),
        (
            "[images.c]\nfolder = 'f'\nfile_name = 'C_%012d.jpg'\nurls = []\narchive = 'x'\ncount = 1",
            "there is no file 'x'",
        ),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, says):
    (tmp_path / "m.toml").write_text(text)
    with pytest.raises(FetchError, match=f"m.toml.*{says}"):
        load_manifest(tmp_path / "m.toml")


def test_needs_on_one_disk_are_added(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * 10**9))
    check_space({tmp_path / "a" / "b": 6 * 10**9, tmp_path: 4 * 10**9})
    with pytest.raises(FetchError, match="12.00 GB are needed, 10.00 GB are free"):
        check_space({tmp_path / "a" / "b": 6 * 10**9, tmp_path / "c": 6 * 10**9})


# ---------------------------------------------------------------- pictures
def jpeg(rng, w=48, h=36, mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def pictures(server):
    """Ten pictures in COCO's naming on the server, and what instances.json says of them."""
    rng = np.random.default_rng(3)
    infos = [ImageInfo(id, f"COCO_train2014_{id:012d}.jpg", 36, 48) for id in range(9, 99, 9)]
    data = {info.file_name: jpeg(rng, mode="L" if i == 2 else "RGB") for i, info in enumerate(infos)}
    server.files |= {f"/train2014/{name}": content for name, content in data.items()}
    spec = ImageSpec(
        "toy",
        "images/mscoco/images/train2014",
        "COCO_train2014_%012d.jpg",
        (server.url + "/train2014/",),
        "train2014.zip",
        len(infos),
        by_hand="Put them into {into}, or {to}.",
    )
    return SimpleNamespace(infos=infos, data=data, wanted={info.file_name: info for info in infos}, spec=spec)


HOSTILE = [
    (9, "../../etc/passwd"),
    (9, "/etc/passwd"),
    (9, "COCO_train2014_000000000010.jpg"),
    (9, "COCO_train2014_9.jpg"),
    (9, ""),
    (9, "COCO_val2014_000000000009.jpg"),
    (9, "COCO_train2014_000000000009.jpg\n"),
    (9, "COCO_train2014_000000000009.jpg/../x"),
    (9, "COCO_train2014_00000000000９.jpg"),
    (-9, "COCO_train2014_-00000000009.jpg"),
    (10**12, f"COCO_train2014_{10**12}.jpg"),
]


@pytest.mark.parametrize("id,name", HOSTILE)
def test_hostile_file_names(pictures, id, name):
    good, bad = image_names(pictures.spec, [ImageInfo(id, name, 9, 9)])
    assert good == {} and str(id) in bad[name] and bad[name].isprintable()


def test_pictures_are_read_to_their_last_block(pictures):
    for name, data in pictures.data.items():
        check_image(io.BytesIO(data), pictures.wanted[name])
    info, data = pictures.infos[0], pictures.data[pictures.infos[0].file_name]
    png = io.BytesIO()
    Image.new("RGB", (48, 36)).save(png, "PNG")
    for cut in (0, 2, 300, len(data) // 2, len(data) - 100):
        with pytest.raises(Mismatch, match="not a whole JPEG"):
            check_image(io.BytesIO(data[:cut]), info)
    with pytest.raises(Mismatch, match="not a whole JPEG"):
        check_image(io.BytesIO(png.getvalue()), info)
    with pytest.raises(Mismatch, match="is 48 x 36 pixels, instances.json says 36 x 48"):
        check_image(io.BytesIO(data), replace(info, width=36, height=48))


def test_each_failure_is_listed_and_the_second_run_asks_only_for_those(server, pictures, tmp_path):
    names = list(pictures.data)
    bad = {0: "404", 1: "html", 2: "other", 3: "stall 0", 4: "says-less"}
    mend = {5: ["500"], 6: ["cut 800"], 7: ["503 0", "408"]}
    server.moods = {f"/train2014/{names[i]}": [mood] * 9 for i, mood in bad.items()} | {
        f"/train2014/{names[i]}": moods for i, moods in mend.items()
    }
    verified = {}
    failed = fetch_images(pictures.spec, pictures.wanted, tmp_path, verified, HASTY, workers=3)
    assert sorted(failed) == sorted(names[i] for i in bad) and all(
        "\n" not in why and name in why for name, why in failed.items()
    )
    assert all_files(tmp_path) == sorted(set(names) - set(failed)) == sorted(verified)
    for name in verified:
        assert (tmp_path / name).read_bytes() == pictures.data[name]
    server.moods.clear()
    server.log.clear()
    left = missing_images(pictures.wanted, tmp_path, verified)
    assert not fetch_images(
        pictures.spec, {name: pictures.wanted[name] for name in left}, tmp_path, verified, QUICK
    )
    assert sorted(path for path, _ in server.log) == sorted(f"/train2014/{name}" for name in failed)
    assert missing_images(pictures.wanted, tmp_path, {}) == []


def test_a_dead_server_is_not_asked_for_every_picture(server, pictures, tmp_path):
    server.files.clear()
    failed = fetch_images(pictures.spec, pictures.wanted, tmp_path, {}, QUICK, workers=2, give_up=3)
    assert (
        len(failed) == 10
        and len(server.log) < 10
        and any("3 in a row had failed" in why for why in failed.values())
    )


def test_a_picture_longer_than_its_pixels_is_cut_off(server, pictures, tmp_path):
    name = next(iter(pictures.data))
    server.files[f"/train2014/{name}"] = pictures.data[name] + bytes(10**6)
    failed = fetch_images(pictures.spec, {name: pictures.wanted[name]}, tmp_path, {}, QUICK)
    assert "longer than such an image can be" in failed[name] and all_files(tmp_path) == []


def test_another_address_for_pictures(server, pictures, tmp_path):
    spec = replace(pictures.spec, urls=(server.url + "/gone/", *pictures.spec.urls))
    assert (
        fetch_images(spec, pictures.wanted, tmp_path, {}, QUICK) == {}
        and missing_images(pictures.wanted, tmp_path, {}) == []
    )


def test_checked_pictures_are_not_decoded_again(pictures, tmp_path, monkeypatch):
    for name, data in pictures.data.items():
        (tmp_path / name).write_bytes(data)
    verified = {}
    assert missing_images(pictures.wanted, tmp_path, verified) == [] and len(verified) == 10
    calls = []
    monkeypatch.setattr(module, "check_image", lambda path, info: calls.append(path.name))
    changed = list(pictures.data)[4]
    os.utime(tmp_path / changed, ns=(1, 1))
    missing_images(pictures.wanted, tmp_path, verified)
    assert calls == [changed]


# ---------------------------------------------------------------- all of it, in the real formats
@pytest.fixture
def world(server, pictures, tmp_path, monkeypatch):
    """RefCOCO in small: annotations in a zip, single pictures, and all of them in a zip of their own."""
    refs = [
        {
            "ref_id": i,
            "ann_id": i,
            "image_id": info.image_id,
            "category_id": 1,
            "split": "train",
            "file_name": f"COCO_train2014_{info.image_id:012d}_{i}.jpg",
            "sent_ids": [i],
            "sentences": [
                {"sent_id": i, "sent": "the house", "raw": "The house", "tokens": ["the", "house"]}
            ],
        }
        for i, info in enumerate(pictures.infos)
    ]
    triangle = {"category_id": 1, "iscrowd": 0, "segmentation": [[2, 2, 20, 2, 20, 20]]}
    instances = {
        "images": [
            {"id": x.image_id, "file_name": x.file_name, "height": x.height, "width": x.width}
            for x in pictures.infos
        ],
        "annotations": [{"id": i, "image_id": x.image_id} | triangle for i, x in enumerate(pictures.infos)],
        "categories": [{"id": 1, "name": "house"}],
    }
    folder = write_refer(tmp_path / "made" / "refcoco", refs, instances, "unc")
    monkeypatch.setitem(PUBLISHED, ("refcoco", "unc"), {"train": (10, 10, 10)})
    members = {f"refcoco/{path.name}": path.read_bytes() for path in folder.iterdir()}
    annotations = zip_of(members)
    everything = zip_of(
        {f"train2014/{name}": data for name, data in pictures.data.items()}
        | {"train2014/COCO_train2014_000000000001.jpg": CONTENT}
    )
    server.files |= {"/refcoco.zip": annotations, "/train2014.zip": everything}
    terms = {
        "licence": "research use",
        "cite": "Yu et al.",
        "by_hand": "Get it from a friend, and put it at {to}, or its contents into {into}.",
    }
    files = [
        FileSpec(
            "refcoco.zip",
            "downloads/refcoco.zip",
            (server.url + "/gone.zip", server.url + "/refcoco.zip"),
            size=len(annotations),
            sha256=hashlib.sha256(annotations).hexdigest(),
            **terms,
            unpack=Unpack("refcoco", ("instances.json", "refs(unc).p"), 5, partitions=("unc",)),
        ),
        FileSpec(
            "train2014.zip",
            "downloads/train2014.zip",
            (server.url + "/train2014.zip",),
            size=len(everything),
            md5=hashlib.md5(everything).hexdigest(),
            unpack=Unpack("images/mscoco/images/train2014", ("COCO_train2014_*.jpg",)),
            **terms,
        ),
    ]
    manifest = Manifest(
        {spec.name: spec for spec in files},
        {"toy": pictures.spec},
        {"refcoco": SetSpec("refcoco", ("refcoco.zip",), "toy", 10)},
    )
    return SimpleNamespace(
        server=server,
        pictures=pictures,
        manifest=manifest,
        root=tmp_path / "data",
        members=members,
        instances=instances,
        refs=refs,
        get=lambda **more: fetch(
            "refcoco",
            tmp_path / "data",
            **({"manifest": manifest, "progress": False, "retry": QUICK} | more),
        ),
    )


def statuses(report):
    return {item.name: item.status for item in report.items}


def test_everything_arrives_and_is_read_by_the_reader(world):
    report = world.get()
    assert report.ok and statuses(report) == {"refcoco.zip": "fetched", "images": "fetched"}
    assert (
        "unc): every count is the published one" in report.items[0].detail
        and report.items[1].detail == "10 of 10 whole, 10 of them fetched now"
    )
    assert "gone.zip: HTTP 404" in report.items[0].problems[
        0
    ] and "Licence: research use. Cite: Yu et al." in str(report)
    refer = Refer(world.root, "refcoco")
    assert len(refer.samples("train")) == 10
    for image_id in refer.images:
        assert refer.load_image(image_id).size == (48, 36)
    again = json.loads(json.dumps(report.record()))
    assert (
        again["ok"] is True
        and again["items"][0]["hash"].startswith("sha256:")
        and again["items"][0]["url"].endswith("/refcoco.zip")
    )


def test_a_second_run_asks_nobody_hashes_nothing_and_decodes_nothing(world, monkeypatch):
    world.get()
    world.server.log.clear()
    for name in ("verify", "check_image", "unpack"):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("not needed"))
    report = world.get()
    assert (
        report.ok
        and set(statuses(report).values()) == {"there"}
        and world.server.log == []
        and report.needed == 0
        and "verified before" in str(report)
    )
    (world.root / "downloads" / "refcoco.zip").unlink()
    assert world.get().ok and world.server.log == []


def test_what_was_changed_or_lost_since_is_noticed(world):
    world.get()
    world.server.log.clear()
    lost = list(world.pictures.data)[3]
    (world.root / world.pictures.spec.folder / lost).unlink()
    (world.root / world.pictures.spec.folder / list(world.pictures.data)[5]).write_bytes(b"damaged")
    (world.root / "refcoco" / "refs(unc).p").unlink()
    report = world.get()
    assert report.ok and sorted(path for path, _ in world.server.log) == sorted(
        f"/train2014/{list(world.pictures.data)[i]}" for i in (3, 5)
    )
    assert len(Refer(world.root, "refcoco").refs) == 10


def test_a_file_that_changed_since_it_was_verified_is_verified_again(server, tmp_path):
    book = Manifest({"a.bin": spec_of(server, sha256=SHA)}, {}, {"a": SetSpec("a", ("a.bin",))})
    get = lambda: fetch("a", tmp_path, manifest=book, progress=False, retry=QUICK)
    assert get().ok and get().items[0].detail == "verified before"
    os.utime(tmp_path / "a.bin", ns=(1, 1))
    assert get().items[0].detail == "was there; verified" and get().items[0].detail == "verified before"
    (tmp_path / "a.bin").write_bytes(OTHER)
    assert (
        statuses(get()) == {"a.bin": "fetched"}
        and (tmp_path / "a.bin").read_bytes() == CONTENT
        and (tmp_path / "a.bin.wrong").read_bytes() == OTHER
    )
    # the manifest has a newer version of the file
    spec = replace(book.files["a.bin"], sha256=hashlib.sha256(OTHER).hexdigest())
    server.files["/a.bin"] = OTHER
    assert statuses(
        fetch("a", tmp_path, manifest=replace(book, files={"a.bin": spec}), progress=False, retry=QUICK)
    ) == {"a.bin": "fetched"}
    assert (tmp_path / "a.bin").read_bytes() == OTHER


def test_a_dry_run_asks_nobody_and_writes_nothing(world):
    plan = world.get(dry_run=True)
    assert (
        world.server.log == []
        and not world.root.exists()
        and statuses(plan) == {"refcoco.zip": "planned", "images": "planned"}
        and plan.ok
    )
    annotations, everything = world.manifest.files.values()
    assert plan.needed == 6 * annotations.size + 10 * everything.size // 10
    world.get(images="none")
    assert world.get(dry_run=True).items[0].status == "there" and "10 are missing" in str(
        world.get(dry_run=True)
    )
    assert world.get(dry_run=True, images="none").needed == 0


def test_zip_brings_the_needed_pictures_and_all_brings_all(world):
    extra = world.root / world.pictures.spec.folder / "COCO_train2014_000000000001.jpg"
    report = world.get(images="zip")
    assert (
        report.ok
        and statuses(report) == {"refcoco.zip": "fetched", "train2014.zip": "fetched", "images": "fetched"}
        and not extra.exists()
    )
    assert (
        not any(path.startswith("/train2014/") for path, _ in world.server.log)
        and len(all_files(extra.parent)) == 10
    )
    (extra.parent / list(world.pictures.data)[0]).write_bytes(b"damaged")
    world.server.log.clear()
    assert world.get(images="zip").ok and world.server.log == []  # mended from the archive, which is there
    (extra.parent / list(world.pictures.data)[0]).unlink()
    assert world.get(images="all").ok and extra.exists() and world.server.log == []


def test_all_are_unpacked_also_where_the_needed_ones_are_there(world):
    world.get()
    manifest = replace(world.manifest, images={"toy": replace(world.pictures.spec, count=11)})
    extra = world.root / world.pictures.spec.folder / "COCO_train2014_000000000001.jpg"
    assert "1 are missing" in str(world.get(images="all", manifest=manifest, dry_run=True))
    assert world.get(images="all", manifest=manifest).ok and extra.read_bytes() == CONTENT
    world.server.log.clear()
    (world.root / "downloads" / "train2014.zip").unlink()
    assert world.get(images="all", manifest=manifest).ok and world.server.log == []


def test_damaged_notes_are_no_trouble(world):
    world.get()
    for note in (world.root / ".fetch").glob("*.json"):
        for damage in (b"", b"[]", b'{"hash": 3, "unpacked": 5, "stamp": "x"}'):
            note.write_bytes(damage)
            assert world.get().ok


def test_a_zip_that_is_not_needed_is_not_fetched(world):
    world.get()
    world.server.log.clear()
    assert world.get(images="zip").ok and world.server.log == []


def test_what_cannot_be_had_is_one_paragraph_and_the_rest_goes_on(world):
    world.server.files.pop("/refcoco.zip")
    report = world.get()
    assert not report.ok and statuses(report) == {"refcoco.zip": "missing", "images": "missing"}
    paragraphs, root = [line for line in str(report).splitlines() if line.startswith("By hand: ")], world.root
    assert paragraphs == [
        f"By hand: Get it from a friend, and put it at {root / 'downloads/refcoco.zip'}, or its contents into"
        f" {root / 'refcoco'}."
    ]
    assert "not begun" in report.items[1].problems[0] and report.record()["ok"] is False
    world.server.files["/refcoco.zip"] = zip_of(world.members)
    world.server.moods = {f"/train2014/{name}": ["404"] for name in list(world.pictures.data)[:8]}
    report = world.get()
    assert not report.ok and statuses(report) == {"refcoco.zip": "fetched", "images": "missing"}
    assert (
        "2 of 10 whole" in str(report)
        and "- and 2 more" in str(report)
        and "By hand: Put them into" in str(report)
        and len(report.items[1].problems) == 8
    )
    assert world.get().ok


def test_files_put_there_by_hand_are_verified_and_accepted(world):
    dest = world.root / "downloads" / "refcoco.zip"
    dest.parent.mkdir(parents=True)
    dest.write_bytes(world.server.files["/refcoco.zip"])
    folder = world.root / world.pictures.spec.folder
    folder.mkdir(parents=True)
    for name, data in list(world.pictures.data.items())[:9]:
        (folder / name).write_bytes(data)
    report = world.get()
    assert report.ok and statuses(report) == {"refcoco.zip": "there", "images": "fetched"}
    assert [path for path, _ in world.server.log] == [f"/train2014/{list(world.pictures.data)[9]}"]


def test_a_wrong_file_by_hand_is_moved_aside(world):
    dest = world.root / "downloads" / "refcoco.zip"
    dest.parent.mkdir(parents=True)
    dest.write_bytes(b"<html>")
    assert "planned" in statuses(world.get(dry_run=True)).values() and dest.exists()
    report = world.get(images="none")
    assert (
        report.ok
        and "a web page has arrived" in report.items[0].problems[0]
        and (dest.parent / "refcoco.zip.wrong").read_bytes() == b"<html>"
    )
    assert hashlib.sha256(dest.read_bytes()).hexdigest() == world.manifest.files["refcoco.zip"].sha256


@pytest.mark.parametrize("inside", ["", "refcoco", "refcoco/refcoco"])
def test_unpacked_annotations_by_hand_are_counted_and_accepted(world, inside):
    folder = world.root / "refcoco" / inside
    folder.mkdir(parents=True)
    for name, data in world.members.items():
        (folder / name.split("/")[1]).write_bytes(data)
    report = world.get(images="none")
    assert (
        report.ok
        and statuses(report) == {"refcoco.zip": "there"}
        and world.server.log == []
        and "every count is the published one" in str(report)
    )
    assert all_files(world.root) == ["refcoco/instances.json", "refcoco/refs(unc).p"]
    assert "verified before" in str(world.get(images="none"))


def test_a_part_of_the_annotations_is_refused_and_left_alone(world):
    write_refer(world.root / "refcoco", world.refs[:4], world.instances, "unc")
    before = (world.root / "refcoco" / "refs(unc).p").read_bytes()
    report = world.get(images="none")
    assert (
        not report.ok
        and "only a part of the published data set" in str(report)
        and "move refcoco/ away" in str(report)
        and world.server.log == []
    )
    assert (world.root / "refcoco" / "refs(unc).p").read_bytes() == before


def test_a_planted_archive_is_refused_by_fetch_as_well(world):
    planted = zip_of(world.members | {"../../escaped": "x"})
    world.server.files["/refcoco.zip"] = planted
    spec = replace(world.manifest.files["refcoco.zip"], size=None, sha256=None)
    report = world.get(
        manifest=replace(world.manifest, files=world.manifest.files | {"refcoco.zip": spec}), images="none"
    )
    assert (
        not report.ok
        and "leads out of the folder" in str(report)
        and all_files(world.root) == ["downloads/refcoco.zip.wrong"]
    )
    assert not (world.root / "refcoco").exists() and "By hand" in str(report)
    world.server.files["/refcoco.zip"] = zip_of(world.members)
    assert world.get(
        manifest=replace(world.manifest, files=world.manifest.files | {"refcoco.zip": spec}), images="none"
    ).ok


def test_there_must_be_room_before_anybody_is_asked(world, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    with pytest.raises(
        FetchError, match=r"data: 0.00 GB are needed, 0.00 GB are free on its disk; nothing was fetched"
    ):
        world.get()
    assert world.server.log == [] and all_files(world.root) == []


def test_a_file_of_unknown_size_is_compared_with_the_room_when_the_server_tells_it(
    server, tmp_path, monkeypatch
):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    with pytest.raises(FetchError, match="a.bin: 100.0 kB are to come, 5.0 kB are free"):
        download(spec_of(server), tmp_path / "a.bin", QUICK)


def test_a_full_disk_is_said_and_the_part_is_kept(world, monkeypatch):
    real = module.receive

    def full(session, url, part, **more):
        real(session, url, part, **more) if "gone" in url else part.begin(url, None)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "receive", full)
    report = world.get(images="none")
    assert not report.ok and "No space left on device" in str(report)


def test_two_at_a_time_are_refused(world):
    (world.root / ".fetch").mkdir(parents=True)
    with FileLock(world.root / ".fetch" / "lock"):
        with pytest.raises(FetchError, match="another fetch is at work"):
            world.get()
        assert world.get(dry_run=True).items  # a plan disturbs nobody
    assert world.get().ok


def test_killed_between_download_and_unpacking(world, monkeypatch):
    """The archive is there and noted; the next run only unpacks."""

    def die(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "unpack", die)
        with pytest.raises(KeyboardInterrupt):
            world.get()
    world.server.log.clear()
    report = world.get(images="none")
    assert (
        report.ok
        and world.server.log == []
        and statuses(report) == {"refcoco.zip": "there"}
        and len(Refer(world.root, "refcoco").refs) == 10
    )


def test_ctrl_c_among_the_pictures_keeps_those_that_arrived(world, monkeypatch):
    real, calls = module.check_image, []

    def check(source, info):
        calls.append(info)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(source, info)

    monkeypatch.setattr(module, "check_image", check)
    with pytest.raises(KeyboardInterrupt):
        world.get(workers=1)
    monkeypatch.setattr(module, "check_image", real)
    arrived = [path.name for path in (world.root / world.pictures.spec.folder).iterdir()]
    assert len(arrived) >= 4 and all(name in world.pictures.data for name in arrived)
    # as a SIGKILL leaves it
    (world.root / world.pictures.spec.folder / ".COCO_train2014_000000000009.jpg.abc.tmp").write_bytes(
        b"half"
    )
    world.server.log.clear()
    report = world.get()
    assert (
        report.ok
        and len(world.server.log) == 10 - len(arrived)
        and len(list((world.root / world.pictures.spec.folder).iterdir())) == 10
    )


def test_hostile_names_are_counted_as_missing_and_never_asked(world):
    world.instances["images"][0]["file_name"] = "../../../up.jpg"
    write_refer(world.root / "refcoco", world.refs, world.instances, "unc")
    report = world.get()
    assert (
        not report.ok
        and "'../../../up.jpg' is not the name of image 9" in str(report)
        and "9 of 10 whole" in str(report)
    )
    assert not any("up.jpg" in path for path, _ in world.server.log)


def test_progress_is_shown_and_can_be_silent(world, capsys):
    world.get(progress=True)
    captured = capsys.readouterr()
    assert (
        captured.out == ""
        and "of disk are needed" in captured.err
        and "refcoco.zip" in captured.err
        and "images, 10 of 10" in captured.err
    )
    world.get()
    assert capsys.readouterr() == ("", "")


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="nothing is known of 'coco'; there are refcoco, refcoco.*backbones"):
        fetch("coco", tmp_path)
    with pytest.raises(ValueError, match="images is 'needed', 'zip', 'all' or 'none', not 'some'"):
        fetch("refcoco", tmp_path, images="some")
    assert all_files(tmp_path) == []


def test_the_other_sets(server, tmp_path, monkeypatch, book):
    """GloVe, backbones, ReferIt and RefCLEF: the real manifest's records with this server's addresses and
    stand-ins of these formats."""
    import torch

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home" / "torch"))
    for library in ("gdown", "timm", "transformers"):
        monkeypatch.setitem(sys.modules, library, None)
    torch.save({"state_dict": {"w": torch.arange(3)}}, tmp_path / "w.pth")
    queries = {"1_1": ["sky"], "1_2": ["the red house", "house"]}
    pickled = b"\x80\x02]q\x00."
    contents = {
        name: (
            (tmp_path / "w.pth").read_bytes()
            if ".pth" in name
            else (
                json.dumps(queries).encode()
                if name.endswith(".json")
                else (
                    zip_of({"glove.840B.300d.txt": "the 1 2 3\n"})
                    if "glove" in name
                    else (
                        zip_of({"saiapr_tc-12/00/images/1.jpg": b"1", "saiapr_tc-12/00/images/2.jpg": b"2"})
                        if "saiapr" in name
                        else zip_of(
                            {
                                "refclef/instances.json": "{}",
                                "refclef/refs(unc).p": pickled,
                                "refclef/refs(berkeley).p": pickled,
                            }
                        )
                    )
                )
            )
        )
        for name in book.files
    }
    files = {}
    for name, spec in book.files.items():
        server.files[f"/{name}"] = contents[name]
        digest = hashlib.sha256(contents[name]).hexdigest()
        files[name] = replace(
            spec,
            urls=tuple(url if url.startswith("gdrive") else server.url + f"/{name}" for url in spec.urls),
            size=spec.size and len(contents[name]),
            counts=spec.counts and (2, 3),
            sha256_prefix=spec.sha256_prefix and digest[:8],
            unpack=spec.unpack and replace(spec.unpack, count=spec.unpack.count and 2),
        )
    get = lambda name, **more: fetch(
        name, tmp_path / "data", manifest=replace(book, files=files), progress=False, retry=QUICK, **more
    )

    assert get("glove").ok and (tmp_path / "home/.cache/refseg_nb/vectors/glove.840B.300d.zip").is_file()
    report = get("backbones")
    assert (
        report.ok
        and statuses(report)["bert-base-uncased"] == "first use"
        and (tmp_path / "home/torch/hub/checkpoints/deeplab-resnet.pth.tar").is_file()
    )
    report = get("refclef")
    assert (
        report.ok
        and "2 files in images/saiapr_tc-12/" in str(report)
        and (tmp_path / "data/images/saiapr_tc-12/00/images/2.jpg").read_bytes() == b"2"
    )
    report = get("referit")
    assert (
        not report.ok
        and [item.name for item in report.items if item.status == "missing"] == ["referitdata.tar.gz"]
        and str(report).count("By hand:") == 1
    )
    assert (
        json.loads((tmp_path / "data/referit/splits/referit/referit_query_val.json").read_text()) == queries
    )
    assert get("referit", images="none").ok
    (tmp_path / "data/downloads/referitdata.tar.gz").write_bytes(
        tar_bytes({"referit/images/1.jpg": b"1", "referit/mask/1_1.mat": b"m"})
    )
    assert get("referit").ok and (tmp_path / "data/referit/mask/1_1.mat").read_bytes() == b"m"
    for name in ("glove", "backbones", "refclef", "referit"):
        assert get(name).ok
    server.files["/referit_query_val.json"] = b'{"1_1": []}'
    (tmp_path / "data/referit/splits/referit/referit_query_val.json").unlink()
    report = get("referit")
    assert not report.ok and "has 1 regions and 0 expressions, expected are 2 and 3" in str(report)


def test_real_manifest_plans(tmp_path, monkeypatch, book):
    """The plans of all sets, without a connection."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in book.sets:
        plan = fetch(name, tmp_path / "data", dry_run=True)
        assert plan.items and json.dumps(plan.record()) and str(plan)
    assert all_files(tmp_path) == []
    size = book.files["refcoco.zip"].size
    assert fetch("refcoco", tmp_path, dry_run=True).needed == 6 * size + 19_994 * 13_510_573_713 // 82_783
    assert (
        fetch("refcoco", tmp_path, images="zip", dry_run=True).needed
        == 6 * size + 13_510_573_713 + 19_994 * 13_510_573_713 // 82_783
    )


def test_libraries_fetch_what_they_keep_themselves(tmp_path, monkeypatch, book):
    """timm and transformers put weights into their own caches; stand-ins for the two, with a connection and
    without."""
    import types

    asked = []

    class Auto:
        @staticmethod
        def from_pretrained(name, **more):
            asked.append((name, more))

    def create_model(name, pretrained):
        asked.append((name, pretrained))
        raise RuntimeError("no connection")

    for name, parts in (
        ("timm", {"create_model": create_model}),
        ("transformers", {"AutoModel": Auto, "AutoTokenizer": Auto}),
    ):
        module = types.ModuleType(name)
        module.__spec__, module.__dict__["__name__"] = object(), name
        for key, value in parts.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
    names = ["swin_base_patch4_window12_384.ms_in22k", "bert-base-uncased"]
    small = replace(book, sets={"backbones": replace(book.sets["backbones"], files=tuple(names))})
    report = fetch("backbones", tmp_path, manifest=small, progress=False)
    assert statuses(report) == dict(zip(names, ("missing", "fetched"))) and not report.ok
    assert asked == [
        (names[0], True),
        (names[1], {}),
        (names[1], {"use_safetensors": True}),
    ], "weights are read from safetensors, never from a pickle"
    assert "no connection" in str(report) and "copy the folder that timm keeps" in str(report)
