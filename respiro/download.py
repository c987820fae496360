"""Fetch published files: resumable, checked, and never half-written under the final name."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import IO, Any, cast
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, OpenerDirector, Request, build_opener

import platformdirs
from filelock import FileLock
from tqdm import tqdm

from respiro import __version__
from respiro.errors import DownloadError

__all__ = ["cache_folder", "disk_errors", "fetch", "file_sha256", "locked"]

_BLOCK = 1 << 16
_TIMEOUT = 30.0  # seconds without a byte
_WAITS = (1.0, 2.0, 4.0)  # seconds before each further attempt
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class _DroppedError(Exception):
    """The transfer ended early; another attempt may finish it."""


def fetch(
    url: str,
    path: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
    verify_tls: bool = True,
    progress: bool = True,
) -> Path:
    """Download *url* to *path* unless it is already there, and return the path.

    The bytes go to ``<path>.part`` and are renamed once they are complete, so *path* is never half a file. A part that
    an earlier call left behind is continued where the server allows it and still has the same file, else the download
    starts afresh. Dropped connections are tried again a few times. Of several processes or threads that fetch one
    *path*, one downloads and the others wait for it; the file ``<path>.lock`` stays.

    Args:
        url: An ``http`` or ``https`` address; redirects are followed, though never from ``https`` to ``http``.
        path: Where the file is to be. A file already there is taken as it is if size and digests fit or are unknown.
        sha256: Published digest in hexadecimal, or its beginning of at least 8 digits where no more is published (as
            in the file names of torch hub).
        md5: Published digest in hexadecimal. It finds damage, but no malice: for files without a published SHA-256.
        size: Published size in bytes.
        verify_tls: Check the server's certificate. Switch it off only for a server whose broken certificate you know,
            and preferably together with *sha256*.
        progress: Show a progress bar.

    Raises:
        DownloadError: If the file cannot be had (refused, timed out, certificate not trusted), arrives truncated or
            different from what was published, or cannot be written.
        ValueError: If *url* is not an ``http`` or ``https`` address, or a digest not as many hexadecimal digits.
    """
    if urlsplit(url).scheme not in {"http", "https"}:
        raise ValueError(f"url must start with 'http://' or 'https://', got {url!r}")
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{8,64}", sha256):
        raise ValueError(f"sha256 must be 8 to 64 hexadecimal digits, got {sha256!r}")
    if md5 is not None and not re.fullmatch("[0-9a-fA-F]{32}", md5):
        raise ValueError(f"md5 must be 32 hexadecimal digits, got {md5!r}")
    path = Path(path)
    digests = {name: digest.lower() for name, digest in (("sha256", sha256), ("md5", md5)) if digest}
    if _difference(path, digests, size):
        with locked(path):
            if difference := _difference(path, digests, size):  # else whoever held the lock has fetched it
                there = f" {path} is there, but {difference}." if path.is_file() else ""
                try:
                    _download(_Part(path, url), digests, size, verify_tls, progress)
                except DownloadError as error:
                    raise DownloadError(f"{error}{there}") from error
    return path


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return *cache_dir*, by default the environment variable ``RESPIRO_CACHE``, else the user's cache folder."""
    return Path(cache_dir or os.environ.get("RESPIRO_CACHE") or platformdirs.user_cache_dir("respiro")).expanduser()


def file_sha256(path: Path) -> str:
    """Return the digest of a file, in hexadecimal."""
    return _digest(path, "sha256")


def _digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)  # else some systems refuse md5
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` about *path* into a :class:`DownloadError`."""
    try:
        yield
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(
            f"cannot write or read {path}: {error.strerror or error}; name a folder that can be written"
        ) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep every other process and thread that asks the same off *path*; makes its folder if necessary.

    The lock is the file ``<path>.lock``, which stays: to remove it while others wait for it would let two of them in.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            yield


def _download(part: _Part, digests: Mapping[str, str], size: int | None, verify_tls: bool, progress: bool) -> None:
    opener = build_opener(_Redirects(), HTTPSHandler(context=_tls_context(verify_tls)))
    for wait in (*_WAITS, None):
        try:
            _transfer(opener, part, size, progress)
            break
        except DownloadError:
            raise
        except (_DroppedError, http.client.HTTPException, OSError) as error:
            if (final := _final(error, part)) is not None:
                raise final from error
            if wait is None:
                what = f"{str(error) or type(error).__name__} ({len(_WAITS) + 1} attempts)"
                raise DownloadError(f"{part.url}: {what}. {part.how_to_go_on}") from error
            time.sleep(wait)
    if difference := _difference(part.file, digests, size):
        part.forget()
        raise DownloadError(
            f"{part.url}: {difference}; the file was removed. The published file may have been replaced, or something "
            f"on the way answered in its place. {part.by_hand}"
        )
    with disk_errors(part.path):
        part.file.replace(part.path)
        part.forget()


class _Part:
    """What has arrived of a file so far, and a note beside it of which version of the file that is."""

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.url = path, url
        self.file = path.with_name(path.name + ".part")
        self.note = path.with_name(path.name + ".part.json")
        self.by_hand = f"To fetch it by hand: curl -L -o '{path}' '{url}', or a browser; then start again."
        self.how_to_go_on = f"Start again to go on from what is in {self.file}. {self.by_hand}"

    def known(self) -> dict[str, Any]:
        """Return the note if there is a part that can be continued, else an empty one."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            some = self.file.stat().st_size > 0 and note["url"] == self.url
            resumable = some and (note["validator"] or note["total"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return dict(note) if resumable else {}

    def start(self, headers: Message, total: int | None) -> None:
        """Begin from nothing, and note what tells this version of the file from another."""
        tag = headers.get("ETag", "")
        strong = tag and not tag.startswith("W/")  # If-Range takes no weak tag
        note = {"url": self.url, "validator": tag if strong else headers.get("Last-Modified"), "total": total}
        with disk_errors(self.file):
            self.file.write_bytes(b"")
            self.note.write_text(json.dumps(note), encoding="utf-8")

    def forget(self) -> None:
        """Remove the part and its note."""
        self.file.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


class _Redirects(HTTPRedirectHandler):
    """Follow redirects, except to another scheme than http(s) or from https back to http."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> Request | None:
        allowed = {"https"} if req.type == "https" else {"http", "https"}
        if urlsplit(newurl).scheme not in allowed:
            raise DownloadError(f"{req.full_url} redirects to {newurl!r}, which is not {' or '.join(sorted(allowed))}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _tls_context(verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _transfer(opener: OpenerDirector, part: _Part, size: int | None, progress: bool) -> None:
    """One attempt: continue the part, or start it, and read to the end."""
    known = part.known()
    begin = part.file.stat().st_size if known else 0
    headers = {"User-Agent": f"respiro/{__version__}"}
    if begin:
        headers["Range"] = f"bytes={begin}-"
        if known["validator"]:
            headers["If-Range"] = known["validator"]
    with opener.open(Request(part.url, headers=headers), timeout=_TIMEOUT) as opened:
        response = cast(http.client.HTTPResponse, opened)
        first, total = _extent(response)
        if first != (begin if response.status == 206 else 0) or (first and known["total"] not in (None, total)):
            part.forget()
            raise _DroppedError("the file changed after its first part was fetched")
        if size is not None and total not in (None, size):
            part.forget()
            raise DownloadError(
                f"{part.url}: the server offers {total} bytes, the published file has {size}. {part.by_hand}"
            )
        if first == 0:
            part.start(response.headers, total)
        _copy(response, part.file, first, total, progress)
    with disk_errors(part.file):
        done = part.file.stat().st_size
    if total is not None and done > total:  # a program that knows nothing of our lock wrote to it as well
        part.forget()
        raise _DroppedError(f"{part.file} has {done} bytes, the file {total}")
    if total is not None and done < total:
        raise _DroppedError(f"the connection ended after {done} of {total} bytes")


def _copy(response: http.client.HTTPResponse, target: Path, begin: int, total: int | None, progress: bool) -> None:
    """Append the body to *target*, which has *begin* bytes of *total* so far."""
    with disk_errors(target):
        file = target.open("ab")
    bar = tqdm(total=total, initial=begin, unit="B", unit_scale=True, desc=target.stem, disable=not progress)
    with file, bar:
        # read1 hands over what has come, so that a dropped connection loses nothing.
        while block := response.read1(_BLOCK):
            with disk_errors(target):
                file.write(block)
                file.flush()
            bar.update(len(block))


def _extent(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Return the position of the first byte that comes, -1 if the server does not say, and the size of the file."""
    if response.status == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        return (int(span[1]), None if span[2] == "*" else int(span[2])) if span else (-1, None)
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _final(error: Exception, part: _Part) -> DownloadError | None:
    """Return the error to end with, or None where another attempt may succeed."""
    cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return DownloadError(
            f"{part.url}: the certificate of {urlsplit(part.url).netloc} cannot be verified ({cause.verify_message}), "
            f"and nothing was downloaded. Check the clock and the certificates of this computer. {part.by_hand} "
            f"Pass verify_tls=False to download without the check."
        )
    if isinstance(error, HTTPError):
        error.close()
        if error.code == 416:  # the part is as long as the file, or longer
            part.forget()
        elif error.code not in _BUSY:
            return DownloadError(f"{error.url}: the server answers {error.code} {error.reason}. {part.by_hand}")
    return None


def _difference(path: Path, digests: Mapping[str, str], size: int | None) -> str | None:
    """Say how a file differs from what was published, or return None."""
    if not path.is_file():
        return "there is no file"
    with disk_errors(path):
        found_size = path.stat().st_size
        if size is not None and found_size != size:
            return f"{found_size} bytes arrived, the published file has {size}"
        for name, published in digests.items():
            if not (digest := _digest(path, name)).startswith(published):
                return f"{name} is {digest}, published is {published}"
    return None
