"""Unpack an archive so that nothing half-written, and nothing outside the folder, is left behind."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from respiro.download import disk_errors, locked
from respiro.errors import DownloadError

__all__ = ["unpack_zip"]

_ASIDE = ".respiro-unpack"


def unpack_zip(path: str | os.PathLike[str], folder: str | os.PathLike[str], progress: bool = True) -> None:
    """Unpack a zip archive into *folder*, which may already hold other files.

    Everything is unpacked and checked (CRC) in a temporary folder and moved only then. Files of the same name are
    replaced, but those with the same content are left as they are: whoever reads them is not disturbed. A second
    process that unpacks into *folder* waits for the first.

    Args:
        path: The archive.
        folder: Where its contents go; made if necessary.
        progress: Show a progress bar.

    Raises:
        DownloadError: If the archive is damaged, encrypted, larger than the free space, or holds a name that leads out
            of *folder* or a link (nothing is written then), or if *folder* cannot be written.
    """
    path, folder = Path(path), Path(folder)
    try:
        with disk_errors(path), zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                _check_member(member, path)
            with locked(folder / _ASIDE):
                _unpack(archive, folder, path, progress)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise DownloadError(f"{path} cannot be unpacked: {error}. Remove it and download it again.") from error


def _check_member(member: zipfile.ZipInfo, path: Path) -> None:
    # Backslashes and colons are separators and drives on some systems; no published archive needs them.
    name = PurePosixPath(member.filename)
    leads_out = name.is_absolute() or ".." in name.parts or "\\" in member.filename or ":" in member.filename
    kind = stat.S_IFMT(member.external_attr >> 16)
    if leads_out or not name.parts or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "leads out of the folder it is unpacked to" if leads_out else "is neither a file nor a folder"
        raise DownloadError(f"{path} is not unpacked: its member {member.filename!r} {what}. Nothing was written.")


def _check_space(members: list[zipfile.ZipInfo], folder: Path, path: Path) -> None:
    needed, free = sum(member.file_size for member in members), shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(f"{path} needs {needed / 1e9:.2f} GB in {folder}, which has {free / 1e9:.2f} GB free.")


def _unpack(archive: zipfile.ZipFile, folder: Path, path: Path, progress: bool) -> None:
    # Inside `folder`, hence on its file system even where it is a mount point: moving is renaming.
    aside = folder / _ASIDE
    shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed: a living one would hold the lock
    members = [member for member in archive.infolist() if not _is_there(member, folder)]
    _check_space(members, folder, path)
    aside.mkdir()
    try:
        for member in tqdm(members, desc="unpack", unit="file", disable=not progress):
            target = aside / member.filename
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)  # reading to the end checks the CRC
        for entry in sorted(aside.iterdir()):
            _move(entry, folder / entry.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_there(member: zipfile.ZipInfo, folder: Path) -> bool:
    target = folder / member.filename
    if member.is_dir():
        return target.is_dir()
    if not target.is_file() or target.stat().st_size != member.file_size:
        return False
    checksum = 0
    with target.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum == member.CRC


def _move(source: Path, target: Path) -> None:
    """Rename *source* to *target*; where both are folders, merge."""
    if source.is_dir() and target.is_dir():
        for entry in sorted(source.iterdir()):
            _move(entry, target / entry.name)
    else:
        source.replace(target)
