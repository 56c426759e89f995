"""What differs between the stores: how each is opened, listed, and told the kind of a file.

fsspec's own listings hold all that is below a prefix in memory, and its patterns take `*` and `[`
in keys for their own. So pages are asked for one by one, through each library's client.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from bcseg_batch.errors import SettingsError

PAGE_KEYS = 1000
"""Keys asked for at once: as many as S3 gives."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as a listing shows it.

    Attributes:
        key: its name in the bucket.
        size_bytes: its size.
        mtime_ns: when it was written, nanoseconds since the epoch.
        etag: differs where the content does; empty where the store gives none.
    """

    key: str
    size_bytes: int
    mtime_ns: int
    etag: str


@dataclass(frozen=True, slots=True)
class Page:
    """Some of the keys below a prefix, in order.

    Attributes:
        objects: the objects.
        folders: prefixes that end in the delimiter, where one was asked for.
        token: asks for the next page; None after the last.
    """

    objects: Sequence[StoredObject]
    folders: Sequence[str]
    token: str | None


@dataclass(frozen=True, slots=True)
class Dialect:
    """One kind of store.

    Attributes:
        module: the library that speaks to it; also the name of the extra's package.
        extra: of our package, which brings the library.
        credentials: where the library looks for credentials, for errors.
        open: gives fsspec's file system, not connected yet.
        page: lists: file system, bucket, prefix, delimiter, token, and the key after which to begin
            (empty for the first).
        head: looks at one object: file system, bucket, key.
        starts_after: whether `page` can begin in the middle.
        content_type: gives the arguments that tell the kind of a file on writing.
    """

    module: str
    extra: str
    credentials: str
    open: Callable[[Any], Any]
    page: Callable[..., Page]
    head: Callable[[Any, str, str], StoredObject]
    starts_after: bool
    content_type: Callable[[str], dict[str, Any]]

    def file_system(self) -> Any:
        """Give fsspec's file system.

        Raises:
            SettingsError: its library is not installed.
        """
        try:
            library = importlib.import_module(self.module)
        except ImportError as error:
            raise SettingsError(
                f"{self.extra}:// needs {self.module}, which is not installed: "
                f"pip install 'bcseg-batch[{self.extra}]'"
            ) from error
        return self.open(library)


def _ns(moment: datetime) -> int:
    """Give nanoseconds since the epoch, exactly: a float of seconds has too few digits."""
    since = moment.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 10**9 + since.microseconds * 1000


# No cache of instances (the environment may change) and none of listings (others write too).
_FRESH: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}


def _open_s3(s3fs: Any) -> Any:
    # botocore itself tries again as well: once is enough, and a dead store is told sooner.
    timeouts = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 1}}
    return s3fs.S3FileSystem(config_kwargs=timeouts, **_FRESH)


def _page_s3(
    fs: Any, bucket: str, prefix: str, *, delimiter: str, token: str | None, after: str
) -> Page:
    where = {"ContinuationToken": token} if token else {"StartAfter": after} if after else {}
    answer = fs.call_s3(
        "list_objects_v2",
        Bucket=bucket,
        Prefix=prefix,
        Delimiter=delimiter,
        MaxKeys=PAGE_KEYS,
        **where,
    )
    return Page(
        [
            StoredObject(o["Key"], o["Size"], _ns(o["LastModified"]), o.get("ETag", ""))
            for o in answer.get("Contents", ())
        ],
        [folder["Prefix"] for folder in answer.get("CommonPrefixes", ())],
        answer.get("NextContinuationToken") if answer.get("IsTruncated") else None,
    )


def _head_s3(fs: Any, bucket: str, key: str) -> StoredObject:
    o = fs.call_s3("head_object", Bucket=bucket, Key=key)
    return StoredObject(key, o["ContentLength"], _ns(o["LastModified"]), o.get("ETag", ""))


def _open_gs(gcsfs: Any) -> Any:
    return gcsfs.GCSFileSystem(**_FRESH)


def _page_gs(
    fs: Any, bucket: str, prefix: str, *, delimiter: str, token: str | None, after: str
) -> Page:
    answer = fs.call(
        "GET",
        "b/{}/o",
        bucket,
        prefix=prefix,
        delimiter=delimiter or None,
        pageToken=token,
        startOffset=after or None,
        maxResults=PAGE_KEYS,
        json_out=True,
    )
    return Page(
        [_object_gs(o) for o in answer.get("items", ())],
        answer.get("prefixes", ()),
        answer.get("nextPageToken"),
    )


def _head_gs(fs: Any, bucket: str, key: str) -> StoredObject:
    return _object_gs(fs.call("GET", "b/{}/o/{}", bucket, key, json_out=True))


def _object_gs(o: dict[str, Any]) -> StoredObject:
    written = datetime.fromisoformat(o["updated"])
    return StoredObject(o["name"], int(o["size"]), _ns(written), o.get("etag", ""))


def _open_az(adlfs: Any) -> Any:
    return adlfs.AzureBlobFileSystem(**_FRESH)


def _page_az(
    fs: Any, bucket: str, prefix: str, *, delimiter: str, token: str | None, after: str
) -> Page:
    from fsspec.asyn import sync  # noqa: PLC0415 - with the library itself, or not at all

    assert not after, "Azure's listings begin at the beginning"

    async def page() -> Page:
        async with fs.service_client.get_container_client(bucket) as container:
            asked = {"name_starts_with": prefix, "results_per_page": PAGE_KEYS}
            listing = (
                container.walk_blobs(delimiter=delimiter, **asked)
                if delimiter
                else container.list_blobs(**asked)
            )
            pages = listing.by_page(token)
            async for entries in pages:
                found = [entry async for entry in entries]
                objects = [
                    StoredObject(e.name, e.size, _ns(e.last_modified), e.etag)
                    for e in found
                    if getattr(e, "last_modified", None)
                ]
                folders = [e.name for e in found if not getattr(e, "last_modified", None)]
                return Page(objects, folders, pages.continuation_token or None)
        return Page((), (), None)

    found: Page = sync(fs.loop, page)
    return found


def _head_az(fs: Any, bucket: str, key: str) -> StoredObject:
    from fsspec.asyn import sync  # noqa: PLC0415 - as above

    async def head() -> StoredObject:
        async with fs.service_client.get_blob_client(bucket, key) as blob:
            o = await blob.get_blob_properties()
            return StoredObject(key, o.size, _ns(o.last_modified), o.etag)

    found: StoredObject = sync(fs.loop, head)
    return found


DIALECTS = {
    "s3": Dialect(
        "s3fs",
        "s3",
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role; "
        "AWS_ENDPOINT_URL for a store that is not Amazon's",
        _open_s3,
        _page_s3,
        _head_s3,
        starts_after=True,
        content_type=lambda kind: {"ContentType": kind},
    ),
    "gs": Dialect(
        "gcsfs",
        "gs",
        "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the "
        "machine's account",
        _open_gs,
        _page_gs,
        _head_gs,
        starts_after=True,
        content_type=lambda kind: {"content_type": kind},
    ),
    "az": Dialect(
        "adlfs",
        "az",
        "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with "
        "AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or the machine's identity",
        _open_az,
        _page_az,
        _head_az,
        starts_after=False,
        content_type=lambda kind: {"content_settings": {"content_type": kind}},
    ),
}
