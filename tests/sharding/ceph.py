"""A real S3 server: the gateway of Ceph, with one monitor and one storage daemon in memory."""

from __future__ import annotations

import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.sharding.servers import free_port

PROGRAMS = (
    "ceph-mon",
    "ceph-osd",
    "ceph",
    "radosgw",
    "radosgw-admin",
    "monmaptool",
    "ceph-authtool",
)
START_SECONDS = 120
CLUSTER, DISK = "3f1a9d0e-5f3c-4b52-9c3e-0d6a4f0c1b2a", "7c0b7a44-9d0b-4a53-8a55-6f0f3b8f2d1e"

SETTINGS = """[global]
fsid = {cluster}
mon_host = [v2:127.0.0.1:{port}/0]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
keyring = {folder}/keyring
osd_objectstore = memstore
memstore_device_bytes = 1073741824
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_data = {folder}/mon
osd_data = {folder}/osd
rgw_data = {folder}/rgw
run_dir = {folder}
admin_socket =
log_file = {folder}/$name.log
mon_cluster_log_file = {folder}/cluster.log
"""


def has_ceph() -> bool:
    """Return whether all programs are installed (Debian: radosgw, ceph-mon, ceph-osd)."""
    return all(shutil.which(program) for program in PROGRAMS)


@contextmanager
def ceph_server(folder: Path, access_key: str, secret_key: str) -> Iterator[str]:
    """Start the daemons in a new folder and yield the server's URL; stop them at the end."""
    for part in ("mon", "osd", "rgw"):
        (folder / part).mkdir(parents=True)
    monitor, gateway = free_port(), free_port()
    settings, places = folder / "ceph.conf", folder / "monitors"
    settings.write_text(SETTINGS.format(cluster=CLUSTER, port=monitor, folder=folder))

    def run(program: str, *options: str) -> None:
        command = [program, "--conf", str(settings), *options]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"

    run("monmaptool", "--create", "--fsid", CLUSTER, "--addv", "a",
        f"[v2:127.0.0.1:{monitor}/0]", str(places))  # fmt: skip
    keyring = str(folder / "keyring")
    for name in ("mon.", "client.admin", "osd.0"):
        caps = ["--cap", "mon", "allow *", "--cap", "osd", "allow *"]
        create = [] if Path(keyring).exists() else ["--create-keyring"]
        run("ceph-authtool", keyring, *create, "--gen-key", "--name", name, *caps)
    run("ceph-mon", "--mkfs", "--id", "a", "--monmap", str(places), "--keyring", keyring)
    with ExitStack() as daemons:

        def start(program: str, *options: str) -> None:
            command = [program, "--conf", str(settings), "--foreground", *options]
            daemon = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            daemons.callback(daemon.wait)
            daemons.callback(daemon.kill)

        start("ceph-mon", "--id", "a")
        run("ceph", "osd", "new", DISK)
        run("ceph-osd", "--mkfs", "--id", "0", "--osd-uuid", DISK)
        start("ceph-osd", "--id", "0")
        keys = ["--access-key", access_key, "--secret-key", secret_key]
        run("radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test", *keys)
        frontend = f"beast endpoint=127.0.0.1:{gateway}"
        start("radosgw", "--id", "admin", "--rgw-frontends", frontend)
        url = f"http://127.0.0.1:{gateway}"
        _wait_for(url)
        yield url


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _responds(url):
        assert time.monotonic() < deadline, f"{url}: no S3 server"
        time.sleep(0.2)


def _responds(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310  # our own server
            return True
    except OSError:
        return False
