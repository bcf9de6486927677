from __future__ import annotations

import pytest

from configs.errors import ConfigError
from sharding.storage.location import ObjectLocation
from sharding.storage.open import open_storage


@pytest.mark.parametrize(
    ("url", "line"),
    [("ftp://h/x", "got a URL of ftp://, want s3://"), ("s3://", "no bucket or host")],
)
def test_an_unsupported_url_is_refused(url: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        open_storage(url)


def test_only_urls_of_web_servers_are_percent_decoded() -> None:
    bucket = ObjectLocation.parse("s3://bucket//movies/x/")
    assert (bucket.bucket, bucket.prefix, bucket.is_http) == ("bucket", "movies/x", False)
    assert bucket.key("a%20b") == "movies/x/a%20b"
    server = ObjectLocation.parse("https://host:8000")
    assert (server.bucket, server.prefix, server.is_http) == ("host:8000", "", True)
    assert server.key("a%20b") == "a b"
