"""On what kind of file system a folder lies, and what inotify may use of this machine."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Inotify reports what goes through this kernel. Behind these lies another one (a server, a virtual
# machine's host) that also writes, and of whose writing this kernel hears nothing.
_NETWORK_TYPES = frozenset(
    {
        "9p",
        "acfs",
        "afs",
        "autofs",  # not mounted yet: what will lie there is unknown, so the careful answer
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "davfs",
        "davfs2",
        "drvfs",
        "gfs2",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "nfsd",
        "ocfs2",
        "orangefs",
        "prl_fs",
        "pvfs2",
        "smb",
        "smb2",
        "smb3",
        "smbfs",
        "vboxsf",
        "virtiofs",
        "vmhgfs",
        "weka",
    }
)

# FUSE programs that only rearrange, encrypt or read a disk of this machine. `fuseblk` (NTFS, exFAT
# by FUSE) is a disk too, but has no program's name in its type.
_LOCAL_FUSE_TYPES = frozenset(
    {
        "fuse.bindfs",
        "fuse.cryfs",
        "fuse.encfs",
        "fuse.exfat",
        "fuse.fuse-overlayfs",
        "fuse.gocryptfs",
        "fuse.mergerfs",
        "fuse.ntfs-3g",
        "fuse.unionfs",
    }
)

_OCTAL_ESCAPE = re.compile(r"\\([0-7]{3})")
_INOTIFY_FOLDER = Path("/proc/sys/fs/inotify")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the mount table.

    Attributes:
        mount_point: absolute, without escapes; what is no UTF-8 is kept by surrogates.
        type: the kernel's name of the file system, such as `ext4` or `fuse.sshfs`.
    """

    mount_point: str
    type: str


@dataclass(frozen=True, slots=True)
class Filesystem:
    """What a folder lies on.

    Attributes:
        type: the kernel's name of it, or `unknown`.
        mount_point: where it is mounted.
        is_network: other machines (or the host of this virtual one) can write there, and locks and
            shared memory cannot be relied on.
        gives_events: inotify hears of every change there.
    """

    type: str
    mount_point: Path
    is_network: bool
    gives_events: bool


@dataclass(frozen=True, slots=True)
class InotifyLimits:
    """What the kernel grants.

    Attributes:
        max_user_watches: folders that all programs of one user may watch together.
        max_user_instances: queues that all programs of one user may open together.
        max_queued_events: events that wait in one queue before the kernel drops the next.
    """

    max_user_watches: int
    max_user_instances: int
    max_queued_events: int


def parse_mountinfo(text: str) -> list[Mount]:
    """Read the mount table; lines of another shape are left out.

    Args:
        text: of `/proc/self/mountinfo`, whose fields are described in proc_pid_mountinfo(5).

    Returns:
        The mounts in the order of the table, where of two at one place the later is on top.
    """
    mounts = []
    for line in text.split("\n"):
        # Optional fields, any number of them, end with a lone hyphen.
        before, hyphen, after = line.partition(" - ")
        fields, tail = before.split(" "), after.split(" ")
        if hyphen and len(fields) >= 6 and tail[0]:
            mounts.append(Mount(_unescape(fields[4]), _unescape(tail[0])))
    return mounts


def find_mount(mounts: Sequence[Mount], path: str) -> Mount | None:
    """Find the mount that a path lies on: the longest mount point above it, the last such one.

    Args:
        mounts: in the order of the mount table.
        path: absolute, links resolved.
    """
    found: Mount | None = None
    for mount in mounts:
        is_above = path == mount.mount_point or path.startswith(mount.mount_point.rstrip("/") + "/")
        if is_above and (found is None or len(mount.mount_point) >= len(found.mount_point)):
            found = mount
    return found


def is_network_type(type_name: str) -> bool:
    """Say whether a file system of this type can be written by another machine.

    An unknown FUSE program is taken for one that reaches out.
    """
    if type_name == "fuse" or type_name.startswith("fuse."):
        return type_name not in _LOCAL_FUSE_TYPES
    return type_name in _NETWORK_TYPES


def gives_events_type(type_name: str) -> bool:
    """Say whether inotify hears of every change on a file system of this type.

    Not so with any FUSE program, since the folder behind it can be changed behind its back;
    `fuseblk` is a disk, which is changed only through the mount.
    """
    if type_name == "fuse" or type_name.startswith("fuse."):
        return False
    return not is_network_type(type_name)


def filesystem_of(path: Path) -> Filesystem:
    """Say on what a file or folder lies; it need not exist.

    Off Linux, or where the mount table cannot be read, the answer is `unknown`, with events.
    """
    with contextlib.suppress(OSError):
        # An automount appears in the table only once somebody has walked into it.
        os.stat(f"{path}/.")  # noqa: PTH116 - pathlib drops the dot that makes it a walk
    resolved = os.path.realpath(path)
    mount = find_mount(_read_mounts(), resolved)
    if mount is None:
        return Filesystem("unknown", Path("/"), is_network=False, gives_events=True)
    return Filesystem(
        mount.type,
        Path(mount.mount_point),
        is_network=is_network_type(mount.type),
        gives_events=gives_events_type(mount.type),
    )


def inotify_limits() -> InotifyLimits | None:
    """Read the kernel's limits; None where there is no inotify."""
    try:
        return InotifyLimits(
            *(
                int((_INOTIFY_FOLDER / name).read_text(encoding="ascii"))
                for name in ("max_user_watches", "max_user_instances", "max_queued_events")
            )
        )
    except (OSError, ValueError):
        return None


def _unescape(field: str) -> str:
    # The kernel writes space, tab, newline, backslash and hash as octal numbers of one byte.
    return _OCTAL_ESCAPE.sub(lambda match: chr(int(match[1], 8)), field)


def _read_mounts() -> list[Mount]:
    if sys.platform != "linux":
        return []
    try:
        # Lines end with a line feed only: another separator inside a name must not split them.
        return parse_mountinfo(os.fsdecode(Path("/proc/self/mountinfo").read_bytes()))
    except OSError:
        return []
