"""A real S3 server on this machine, which can die and come back with what it has."""

from __future__ import annotations

import socket
from typing import Any

import boto3
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

BUCKET = "box"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    # No other source of credentials of the machine that runs the tests.
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class S3Server:
    """moto's server, in a thread; what it holds lives as long as this process."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()
        self._client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="somebody",
            aws_secret_access_key="secret",
        )

    def start(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        self._server.stop()

    def empty(self) -> None:
        """Begin with an empty bucket."""
        for backend in s3_backends.values():
            for region in backend.values():
                region.reset()
        self._client.create_bucket(Bucket=BUCKET)

    def close(self) -> None:
        self._client.close()
        self.stop()

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def put_within(self, key: str, data: bytes) -> None:
        """Put an object with no request: quickly, and with keys that no client sends."""
        backends = (b for account in s3_backends.values() for b in account.values())
        holder = next(backend for backend in backends if BUCKET in backend.buckets)
        holder.put_object(BUCKET, key, data)

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=key)

    def head(self, key: str) -> dict[str, Any]:
        answer: dict[str, Any] = self._client.head_object(Bucket=BUCKET, Key=key)
        return answer

    def tree(self, prefix: str) -> dict[str, bytes]:
        """Give every object below a prefix with its content."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix=prefix + "/"
        )
        keys = [found["Key"] for page in pages for found in page.get("Contents", ())]
        return {
            key[len(prefix) + 1 :]: self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            for key in keys
        }
