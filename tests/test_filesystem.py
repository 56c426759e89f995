import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcseg_batch.intake.filesystem import (
    Mount,
    filesystem_of,
    find_mount,
    gives_events_type,
    inotify_limits,
    is_network_type,
    parse_mountinfo,
)

WORKSTATION = r"""22 27 0:21 / /proc rw,nosuid shared:12 - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
40 27 0:40 / /srv rw,relatime shared:20 master:3 propagate_from:2 - nfs4 nas:/export rw,vers=4.2
41 40 8:17 / /srv/local\040disk rw,relatime - xfs /dev/sdb1 rw
42 27 0:45 / /media/odd\134name\012two rw - fuse.sshfs me@host:/ rw,user_id=0
43 27 0:46 / /auto rw - autofs systemd-1 rw,fd=44
44 43 0:47 / /auto rw - cifs //nas/scans rw,vers=3.1.1
a line of another shape
"""
CONTAINER = r"""706 573 0:60 / / rw,relatime - overlay overlay rw,lowerdir=/a:/b,upperdir=/c
707 706 0:63 / /proc rw - proc proc rw
713 706 0:33 /data /in rw,nosuid - virtiofs share0 rw
"""


@pytest.mark.parametrize(
    ("text", "path", "type_name", "mount_point"),
    [
        (WORKSTATION, "/home/me", "ext4", "/"),
        (WORKSTATION, "/", "ext4", "/"),
        (WORKSTATION, "/srv", "nfs4", "/srv"),
        (WORKSTATION, "/srv/scans/today", "nfs4", "/srv"),
        (WORKSTATION, "/srvx", "ext4", "/"),
        (WORKSTATION, "/srv/local disk/a", "xfs", "/srv/local disk"),
        (WORKSTATION, "/media/odd\\name\ntwo/x", "fuse.sshfs", "/media/odd\\name\ntwo"),
        (WORKSTATION, "/auto/x", "cifs", "/auto"),  # mounted on top of its automount
        (CONTAINER, "/out", "overlay", "/"),
        (CONTAINER, "/in/x", "virtiofs", "/in"),
    ],
)
def test_a_path_lies_on_the_innermost_and_topmost_mount(text, path, type_name, mount_point):
    assert find_mount(parse_mountinfo(text), path) == Mount(mount_point, type_name)


def test_nothing_is_found_where_nothing_is_mounted():
    assert find_mount([], "/home") is None
    assert parse_mountinfo("") == []


@given(st.text())
def test_any_text_is_survived(text):
    assert all(mount.type for mount in parse_mountinfo(text))


@pytest.mark.parametrize(
    ("type_name", "is_network", "gives_events"),
    [
        ("ext4", False, True),
        ("xfs", False, True),
        ("btrfs", False, True),
        ("zfs", False, True),
        ("tmpfs", False, True),
        ("overlay", False, True),
        ("vfat", False, True),
        ("fuseblk", False, True),
        ("nfs", True, False),
        ("nfs4", True, False),
        ("cifs", True, False),
        ("smb3", True, False),
        ("9p", True, False),
        ("virtiofs", True, False),
        ("vboxsf", True, False),
        ("ceph", True, False),
        ("autofs", True, False),
        ("fuse", True, False),
        ("fuse.sshfs", True, False),
        ("fuse.rclone", True, False),
        ("fuse.mergerfs", False, False),
        ("fuse.fuse-overlayfs", False, False),
    ],
)
def test_types(type_name, is_network, gives_events):
    assert is_network_type(type_name) is is_network
    assert gives_events_type(type_name) is gives_events


def test_this_machine_is_read(tmp_path):
    if sys.platform != "linux":
        pytest.skip("there is no mount table")
    filesystem = filesystem_of(tmp_path / "not there yet")
    assert filesystem.type != "unknown"
    assert tmp_path.resolve().is_relative_to(filesystem.mount_point)
    # df reads the same by statfs, in its own way.
    asked = ["df", "--output=target", str(tmp_path)]
    answer = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert str(filesystem.mount_point) == answer.stdout.splitlines()[1]


def test_links_are_followed_to_what_they_lie_on(tmp_path):
    if sys.platform != "linux":
        pytest.skip("there is no mount table")
    link = tmp_path / "link"
    link.symlink_to("/proc/self")
    assert filesystem_of(link).type == "proc"


def test_an_awkward_mount_point_is_found(tmp_path):
    mounted = tmp_path / "two words\nand\\back#slash"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "none", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        filesystem = filesystem_of(mounted / "deep" / "er")
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
    assert (filesystem.type, filesystem.mount_point) == ("tmpfs", mounted)
    assert filesystem.gives_events
    assert not filesystem.is_network


def test_the_limits_are_those_of_the_kernel():
    if not Path("/proc/sys/fs/inotify").is_dir():
        assert inotify_limits() is None
        return
    limits = inotify_limits()
    assert limits is not None
    text = Path("/proc/sys/fs/inotify/max_user_watches").read_text(encoding="ascii")
    assert limits.max_user_watches == int(text)
    assert limits.max_user_instances > 0
    assert limits.max_queued_events > 0
