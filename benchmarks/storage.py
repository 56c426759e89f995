"""How fast `process-dir` is out of and into a store of objects, beside folders.

    python benchmarks/storage.py [--images 24] [--rounds 3] [--json FILE]

In turn: folders, and a bucket of moto's S3 server in a process of its own on this machine. That
server is written for tests: it is slow, takes processor time from the run beside it, and has none
of the delay of a network. The ratio tells what the requests cost on this side, and is no forecast.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
from harness import Report, command, in_turn, ratios, run, write_photographs

_START_S = 60.0


@contextmanager
def s3_server() -> Iterator[None]:
    """Run moto's server, and lead the environment to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        deadline_s = time.monotonic() + _START_S
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if time.monotonic() > deadline_s or server.poll() is not None:
                raise SystemExit("moto's server does not start")
            time.sleep(0.05)
        yield
    finally:
        server.terminate()
        server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="the shipped one where left out")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path, help="write the figures there too; - prints them")
    options = parser.parse_args()
    report = Report("storage", vars(options))
    model = [] if options.model is None else ["--model", options.model]
    with tempfile.TemporaryDirectory(dir=options.folder) as name, s3_server():
        source = Path(name, "in")
        store = boto3.client("s3")
        store.create_bucket(Bucket="photographs")
        for path in write_photographs(source, options.images):
            store.upload_file(str(path), "photographs", path.name)
        rounds = iter(range(10**6))

        def folders() -> float:
            arguments = ["process-dir", source, Path(name, f"out{next(rounds)}"), *model]
            return options.images / run([command(), *arguments]).wall_s

        def buckets() -> float:
            bucket = f"results{next(rounds)}"
            store.create_bucket(Bucket=bucket)
            arguments = ["process-dir", "s3://photographs", f"s3://{bucket}", *model]
            return options.images / run([command(), *arguments]).wall_s

        per_s = in_turn({"folders": folders, "s3": buckets}, options.rounds)
    report.parts["images per second, start and end included"] = per_s
    report.add(ratios("process-dir s3 / folders", per_s["s3"], per_s["folders"]))
    report.finish(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
