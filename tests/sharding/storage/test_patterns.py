from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from configs.errors import ConfigError, DataError
from sharding.storage.patterns import expand
from tests.sharding.servers import nginx


def test_braces_expand_to_zero_padded_numbers_and_to_words() -> None:
    assert expand("http://h/frames-{008..011}.tar") == [
        f"http://h/frames-{number}.tar" for number in ("008", "009", "010", "011")
    ]
    assert expand("s3://b/{x,y}/{1..2}.tar") == [
        *("s3://b/x/1.tar", "s3://b/x/2.tar", "s3://b/y/1.tar", "s3://b/y/2.tar"),
    ]
    assert expand("folder/one.tar") == ["folder/one.tar"]


def test_names_in_a_local_file_are_relative_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a.tar\n/b.tar\n")
    assert expand(str(tmp_path / "names.txt")) == [f"{tmp_path}/a.tar", "/b.tar"]
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    with pytest.raises(DataError, match="got an empty file of names"):
        expand(str(tmp_path / "empty.txt"))


@pytest.mark.parametrize("pattern", ["x-{9..3}.tar", "x-{}.tar", "x-{a}.tar"])
def test_a_brace_that_expands_to_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"want e\.g\. \{000\.\.370\}"):
        expand(pattern)


@pytest.mark.skipif(
    shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin") is None,
    reason="nginx is not installed",
)
def test_a_file_of_names_on_a_web_server_is_expanded(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "list.txt").write_text("# movies\ntt1.tar\n\nhttp://h/{a,b}.tar\n")
    with nginx(tmp_path / "nginx", tmp_path / "root") as url:
        expected = [f"{url}/tt1.tar", "http://h/a.tar", "http://h/b.tar"]
        assert expand(f"{url}/list.txt") == expected
