from __future__ import annotations

import pytest

from configs.errors import ConfigError
from sharding.storage.location import ObjectLocation
from sharding.storage.open import open_storage


@pytest.mark.parametrize(
    ("url", "line"),
    [("ftp://h/x", "got a URL of ftp://, want s3://"), ("s3://", "no bucket or host")],
)
def test_a_url_of_another_kind_is_refused(url: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        open_storage(url)


def test_a_key_is_literal_and_a_path_on_a_web_server_is_percent_encoded() -> None:
    bucket = ObjectLocation.parse("s3://bucket//films/x/")
    assert (bucket.bucket, bucket.prefix, bucket.is_http) == ("bucket", "films/x", False)
    assert bucket.key("a%20b") == "films/x/a%20b"
    server = ObjectLocation.parse("https://host:8000")
    assert (server.bucket, server.prefix, server.is_http) == ("host:8000", "", True)
    assert server.key("a%20b") == "a b"
