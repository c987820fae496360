from __future__ import annotations

import hashlib
import shutil
import ssl
import stat
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from respiro import download
from respiro.datasets._unpack import unpack_zip
from respiro.download import cache_folder, fetch
from respiro.errors import DownloadError

BODY = bytes(range(256)) * 2000
DIGEST = hashlib.sha256(BODY).hexdigest()
MD5 = hashlib.md5(BODY).hexdigest()


@dataclass
class Site:
    """What the server offers, how it misbehaves, and what it was asked."""

    body: bytes = BODY
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"one"'})
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)  # send only so many bytes, for the next requests
    status: list[int] = field(default_factory=list)  # answer so to the next requests
    asked: list[str | None] = field(default_factory=list)  # the Range headers that came
    location: str | None = None
    hang: threading.Event | None = None
    meddle: list[Path] = field(
        default_factory=list
    )  # append to these files, once they are there, for the next requests
    url: str = ""


def append_to(path: Path) -> None:
    """Write to a file as soon as it is there, as a program does that knows nothing of the lock."""
    deadline = time.monotonic() + 5
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    with path.open("ab") as file:
        file.write(b"not of this file")


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append(self.headers["Range"])
            if site.hang is not None:
                site.hang.wait(5)
                return
            if site.location is not None and self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", site.location)
                self.end_headers()
                return
            if site.status and (code := site.status.pop(0)) != 200:
                self.send_error(code)
                return
            self._send_body()

        def _send_body(self) -> None:
            begin = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if self.headers["Range"] else 0
            if not site.ranges or self.headers["If-Range"] not in (None, *site.headers.values()):
                begin = 0
            if begin >= len(site.body) and begin:
                self.send_error(416)
                return
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(site.body) - 1}/{len(site.body)}")
            self.send_header("Content-Length", str(len(site.body) - begin))
            for name, value in site.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if site.meddle:
                append_to(site.meddle.pop())
            self.wfile.write(site.body[begin : begin + site.cuts.pop(0) if site.cuts else None])

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(site))
    site.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield site
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setenv("no_proxy", "*")


def names(folder: Path) -> list[str]:
    """What lies in a folder; lock files may stay."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def leave_part(site: Site, path: Path) -> None:
    """Stop a download half-way, as a lost connection does."""
    site.cuts = [1000, 0, 0, 0]
    with pytest.raises(DownloadError):
        fetch(f"{site.url}/a", path, progress=False)
    assert path.with_name("a.zip.part").stat().st_size >= 1000
    site.cuts, site.asked = [], []


def test_fetch_writes_the_file_and_nothing_else(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = fetch(f"{site.url}/a", tmp_path / "new" / "a.zip", sha256=DIGEST.upper(), size=len(BODY))
    assert path.read_bytes() == BODY
    assert names(path.parent) == ["a.zip"]
    assert "a.zip" in capsys.readouterr().err


def test_a_complete_file_is_not_asked_for_again(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(BODY)
    for known in ({}, {"size": len(BODY)}, {"sha256": DIGEST}, {"md5": MD5.upper()}, {"sha256": DIGEST, "md5": MD5}):
        fetch(f"{site.url}/a", tmp_path / "a.zip", progress=False, **known)
    assert site.asked == []


def test_a_file_that_does_not_fit_is_replaced(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"old")
    assert fetch(f"{site.url}/a", tmp_path / "a.zip", size=len(BODY), progress=False).read_bytes() == BODY


def test_a_dropped_connection_is_continued(site: Site, tmp_path: Path) -> None:
    site.cuts = [1000, 500]
    path = fetch(f"{site.url}/a", tmp_path / "a.zip", sha256=DIGEST, progress=False)
    assert path.read_bytes() == BODY
    assert site.asked == [None, "bytes=1000-", "bytes=1500-"]


@pytest.mark.parametrize(
    "headers",
    [{"ETag": '"one"'}, {"Last-Modified": "Mon, 02 May 2022 00:00:00 GMT"}, {"ETag": 'W/"weak"'}, {}],
    ids=["etag", "last-modified", "weak-etag", "length-only"],
)
def test_a_later_call_goes_on_where_the_last_stopped(site: Site, tmp_path: Path, headers: dict[str, str]) -> None:
    site.headers = headers
    leave_part(site, tmp_path / "a.zip")
    assert fetch(f"{site.url}/a", tmp_path / "a.zip", progress=False).read_bytes() == BODY
    assert site.asked == ["bytes=1000-"]
    assert names(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("headers", [{"ETag": '"two"'}, {}], ids=["etag", "length-only"])
def test_a_file_that_changed_meanwhile_is_fetched_afresh(site: Site, tmp_path: Path, headers: dict[str, str]) -> None:
    site.headers = site.headers if headers else {}
    leave_part(site, tmp_path / "a.zip")
    site.headers, site.body = headers, BODY[::-1] + b"longer"
    assert fetch(f"{site.url}/a", tmp_path / "a.zip", progress=False).read_bytes() == site.body


def test_a_server_without_ranges_is_read_from_the_start(site: Site, tmp_path: Path) -> None:
    leave_part(site, tmp_path / "a.zip")
    site.ranges = False
    assert fetch(f"{site.url}/a", tmp_path / "a.zip", sha256=DIGEST, progress=False).read_bytes() == BODY


@pytest.mark.parametrize("part", [BODY, BODY + b"more"], ids=["whole", "too-long"])
def test_a_part_as_long_as_the_file_is_fetched_afresh(site: Site, tmp_path: Path, part: bytes) -> None:
    leave_part(site, tmp_path / "a.zip")
    (tmp_path / "a.zip.part").write_bytes(part)
    assert fetch(f"{site.url}/a", tmp_path / "a.zip", progress=False).read_bytes() == BODY


def test_a_part_of_another_address_or_with_a_broken_note_is_not_used(site: Site, tmp_path: Path) -> None:
    leave_part(site, tmp_path / "a.zip")
    fetch(f"{site.url}/other", tmp_path / "a.zip", progress=False)
    (tmp_path / "b.part").write_bytes(b"something")
    (tmp_path / "b.part.json").write_text("[")
    fetch(f"{site.url}/b", tmp_path / "b", progress=False)
    assert site.asked == [None, None]


def test_a_truncated_body_is_an_error(site: Site, tmp_path: Path) -> None:
    site.ranges, site.cuts = False, [100] * 4
    with pytest.raises(DownloadError, match=rf"ended after 100 of {len(BODY)} bytes \(4 attempts\).*by hand"):
        fetch(f"{site.url}/a", tmp_path / "a.zip", progress=False)
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"sha256": "0" * 64}, f"sha256 is {DIGEST}, published is {'0' * 64}"),
        ({"md5": "0" * 32}, f"md5 is {MD5}, published is {'0' * 32}"),
        ({"sha256": DIGEST, "md5": "0" * 32}, f"md5 is {MD5}"),
        ({"size": 5}, "offers 512000 bytes"),
    ],
    ids=["sha256", "md5", "one-of-two", "size"],
)
def test_another_file_than_published_is_removed(
    site: Site, tmp_path: Path, expected: dict[str, str | int], message: str
) -> None:
    with pytest.raises(DownloadError, match=message):
        fetch(f"{site.url}/a", tmp_path / "a.zip", progress=False, **expected)
    assert names(tmp_path) == []


@pytest.mark.parametrize("digits", [8, 12, 64])
def test_the_beginning_of_a_digest_is_enough(site: Site, tmp_path: Path, digits: int) -> None:
    path = fetch(f"{site.url}/a", tmp_path / "a.zip", sha256=DIGEST[:digits].upper(), progress=False)
    fetch(f"{site.url}/a", path, sha256=DIGEST[:digits], progress=False)
    assert len(site.asked) == 1
    other = ("0" if DIGEST[0] != "0" else "1") + DIGEST[1:digits]
    with pytest.raises(DownloadError, match=f"sha256 is {DIGEST}, published is {other};"):
        fetch(f"{site.url}/a", path, sha256=other, progress=False)


@pytest.mark.parametrize("sha256", ["", "1234567", "0" * 65, "not-a-digest"], ids=["empty", "short", "long", "letters"])
def test_what_is_no_digest_is_refused(sha256: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"sha256 must be 8 to 64 hexadecimal digits, got '{sha256}'"):
        fetch("https://example.org/a", tmp_path / "a.zip", sha256=sha256)


@pytest.mark.parametrize("md5", ["", "0" * 31, "0" * 64, "g" * 32], ids=["empty", "short", "long", "letters"])
def test_what_is_no_md5_is_refused(md5: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"md5 must be 32 hexadecimal digits, got '{md5}'"):
        fetch("https://example.org/a", tmp_path / "a.zip", md5=md5)


def test_two_that_fetch_one_file_at_once_fetch_it_once(site: Site, tmp_path: Path) -> None:
    start = threading.Barrier(4)

    def one(_: int) -> bytes:
        start.wait(5)
        return fetch(f"{site.url}/a", tmp_path / "a.zip", progress=False).read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == [BODY] * 4
    assert site.asked == [None]
    assert names(tmp_path) == ["a.zip"]


def test_a_part_that_something_else_wrote_to_is_fetched_afresh(site: Site, tmp_path: Path) -> None:
    site.meddle = [tmp_path / "a.zip.part"]
    assert fetch(f"{site.url}/a", tmp_path / "a.zip", progress=False).read_bytes() == BODY
    assert site.asked == [None, None]


def test_a_missing_file_is_an_error_at_once(site: Site, tmp_path: Path) -> None:
    site.status = [404]
    with pytest.raises(DownloadError, match=r"answers 404 Not Found.*curl -L"):
        fetch(f"{site.url}/a", tmp_path / "a.zip", progress=False)
    assert len(site.asked) == 1


def test_a_busy_server_is_asked_again(site: Site, tmp_path: Path) -> None:
    site.status = [503, 429, 200]
    assert fetch(f"{site.url}/a", tmp_path / "a.zip", progress=False).read_bytes() == BODY


def test_silence_ends_in_an_error(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_TIMEOUT", 0.1)
    site.hang = threading.Event()
    with pytest.raises(DownloadError, match="timed out"):
        fetch(f"{site.url}/a", tmp_path / "a.zip", progress=False)
    site.hang.set()


def test_an_unreachable_server_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="refused"):
        fetch("http://127.0.0.1:9/a", tmp_path / "a.zip", progress=False)


def test_redirects_are_followed_to_http_only(site: Site, tmp_path: Path) -> None:
    site.location = f"{site.url}/a"
    assert fetch(f"{site.url}/moved", tmp_path / "a.zip", progress=False).read_bytes() == BODY
    site.location = "ftp://127.0.0.1/a"
    with pytest.raises(DownloadError, match="redirects to 'ftp"):
        fetch(f"{site.url}/moved", tmp_path / "b.zip", progress=False)


@pytest.mark.parametrize("url", ["ftp://example.org/a", "file:///etc/passwd", "a.zip"])
def test_other_schemes_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must start with 'http://'"):
        fetch(url, tmp_path / "a.zip")


def test_a_file_that_differs_and_cannot_be_fetched_is_named(site: Site, tmp_path: Path) -> None:
    """Put there by hand, say, on a computer without a network."""
    path = tmp_path / "a.zip"
    path.write_bytes(b"another")
    site.status += [404]
    with pytest.raises(DownloadError, match=r"answers 404.*a\.zip is there, but sha256 is [0-9a-f]{64}, published is"):
        fetch(f"{site.url}/a", path, sha256=DIGEST, progress=False)
    assert path.read_bytes() == b"another"


def test_a_disk_error_is_named(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match="cannot write or read"):
        fetch(f"{site.url}/a", tmp_path / "file" / "a.zip", progress=False)
    (tmp_path / "a.zip.part").mkdir()
    with pytest.raises(DownloadError, match=r"a\.zip\.part"):
        fetch(f"{site.url}/a", tmp_path / "a.zip", progress=False)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_that_nobody_signed_is_refused_unless_told(site: Site, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(site))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    url = f"https://127.0.0.1:{server.server_port}/a"
    with pytest.raises(DownloadError, match=r"certificate of 127\.0\.0\.1.*curl -L.*verify_tls=False"):
        fetch(url, tmp_path / "a.zip", progress=False)
    assert not (tmp_path / "a.zip").exists()
    assert fetch(url, tmp_path / "a.zip", verify_tls=False, progress=False).read_bytes() == BODY
    server.shutdown()
    server.server_close()


def test_the_cache_is_where_the_argument_the_variable_or_the_system_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("RESPIRO_CACHE", str(tmp_path / "variable"))
    assert cache_folder(tmp_path / "argument") == tmp_path / "argument"
    assert cache_folder("~/mine") == tmp_path / "home" / "mine"
    assert cache_folder() == tmp_path / "variable"
    monkeypatch.delenv("RESPIRO_CACHE")
    assert cache_folder().name == "respiro"
    assert cache_folder().is_relative_to(tmp_path)


def make_zip(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def test_unpack_merges_into_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "mine").write_text("stays")
    (folder / "sub" / "a.txt").write_text("old")
    unpack_zip(make_zip(tmp_path / "a.zip", ("sub/a.txt", b"new"), ("sub/empty/", b""), ("b.txt", b"b")), folder)
    assert names(folder) == ["b.txt", "sub"]
    assert names(folder / "sub") == ["a.txt", "empty", "mine"]
    assert (folder / "sub" / "a.txt").read_text() == "new"
    assert stat.S_IMODE((folder / "sub" / "empty").stat().st_mode) & 0o500 == 0o500


def test_two_that_unpack_one_archive_unpack_it_once(tmp_path: Path) -> None:
    folder, content = tmp_path / "data", bytes(range(256)) * 4000
    archive = make_zip(tmp_path / "a.zip", *((f"sub/{number}", content) for number in range(20)))
    start = threading.Barrier(3)

    def one(_: int) -> dict[str, int]:
        start.wait(5)
        unpack_zip(archive, folder, progress=False)
        return {path.name: path.stat().st_ino for path in (folder / "sub").iterdir()}

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(one, range(3))
    assert len(first) == 20
    assert others == [first, first]  # nobody replaced what another may be reading
    assert names(folder) == ["sub"]


def test_unpack_repairs_what_differs_and_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", ("good", b"good"), ("bad", b"fine"), ("short", b"long"), ("folder/", b""))
    (tmp_path / "data" / ".respiro-unpack" / "sub").mkdir(parents=True)
    (tmp_path / "data" / ".respiro-unpack" / "half").write_bytes(b"half")
    for name, content in (("good", b"good"), ("bad", b"evil"), ("short", b"lo")):
        (tmp_path / "data" / name).write_bytes(content)
    before = (tmp_path / "data" / "good").stat()
    unpack_zip(archive, tmp_path / "data", progress=False)
    assert names(tmp_path / "data") == ["bad", "folder", "good", "short"]
    assert [(tmp_path / "data" / name).read_bytes() for name in ("bad", "short")] == [b"fine", b"long"]
    after = (tmp_path / "data" / "good").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize(
    "name",
    ["/etc/evil", "../evil", "a/../../evil", "..\\evil", "C:\\evil", "C:evil", link("a/link")],
    ids=["absolute", "parent", "hidden-parent", "backslash", "drive", "drive-relative", "symlink"],
)
def test_unpack_refuses_what_leads_out(tmp_path: Path, name: str | zipfile.ZipInfo) -> None:
    archive = make_zip(tmp_path / "a.zip", ("good", b"good"), (name, b"/etc/passwd"))
    with pytest.raises(DownloadError, match="is not unpacked: its member"):
        unpack_zip(archive, tmp_path / "data")
    assert names(tmp_path) == ["a.zip"]


def flip(content: bytes) -> bytes:
    position = content.index(b"\x78\x56\x34\x12") if b"\x78\x56\x34\x12" in content else 40
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [flip, lambda content: content[: len(content) // 2], lambda content: b"<html>busy</html>", lambda content: b""],
    ids=["flipped-byte", "truncated", "html", "empty"],
)
def test_unpack_leaves_nothing_of_a_damaged_archive(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    archive = make_zip(tmp_path / "a.zip", ("first", b"fine" * 99), ("second", bytes(range(256))))
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(DownloadError, match=r"a\.zip cannot be unpacked.*download it again"):
        unpack_zip(archive, tmp_path / "data", progress=False)
    assert not (tmp_path / "data").exists() or names(tmp_path / "data") == []


def test_unpack_names_a_missing_archive_and_a_blocked_folder(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"missing\.zip"):
        unpack_zip(tmp_path / "missing.zip", tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match="cannot write or read"):
        unpack_zip(make_zip(tmp_path / "a.zip", ("a", b"a")), tmp_path / "file")


def test_unpack_refuses_what_does_not_fit_on_the_disk(tmp_path: Path) -> None:
    claimed = 0xFFFFFFFE
    members = shutil.disk_usage(tmp_path).free // claimed + 2
    archive = make_zip(tmp_path / "a.zip", *((f"{number}", b"a") for number in range(members)))
    directory = archive.read_bytes().split(b"PK\x01\x02")
    claims = [entry[:20] + claimed.to_bytes(4, "little") + entry[24:] for entry in directory[1:]]
    archive.write_bytes(b"PK\x01\x02".join([directory[0], *claims]))
    with pytest.raises(DownloadError, match="GB free"):
        unpack_zip(archive, tmp_path / "data", progress=False)
    assert names(tmp_path / "data") == []
