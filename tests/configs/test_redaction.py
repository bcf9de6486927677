from __future__ import annotations

import logging
import pickle

import pytest

from configs.errors import DataError
from configs.load import dump_config, load_config
from configs.redaction import bare_url, has_secret, redact_urls
from configs.runtime.cli import echo
from configs.runtime.hints import hint
from configs.runtime.logs import start_logging

SIGNED = "https://ada:pa55@host:8080/films/x.zip?X-Amz-Signature=5ec2et"
SHOWN = "https://…@host:8080/films/x.zip?…"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"got '{SIGNED}', want", f"got '{SHOWN}', want"),
        (f"{SIGNED}: not permitted: 403; a", f"{SHOWN}: not permitted: 403; a"),
        (f'{{"source": "{SIGNED}"}}', f'{{"source": "{SHOWN}"}}'),
        (f"{SIGNED} and {SIGNED}.", f"{SHOWN} and {SHOWN}."),
        ("https://token@host/{a,b}.tar", "https://…@host/{a,b}.tar"),
        ("https://ada:with/slash@and@host/x", "https://…@host/x"),
        ("s3://key:se/cret@bucket/why?.tar", "s3://…@bucket/why?.tar"),
    ],
)
def test_passwords_and_queries_of_urls_are_replaced(text: str, shown: str) -> None:
    assert redact_urls(text) == redact_urls(shown) == shown
    assert has_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/ViT-L-14@336px/set",
        "http://[::1]:80/a@b",
        "s3://bucket/what?/a#b",
        "is it on? ada:x@host",
        "https://host/frames-{000..370}.tar",
    ],
)
def test_other_text_is_unchanged(text: str) -> None:
    assert redact_urls(text) == text
    assert not has_secret(text)


def test_the_url_of_a_source_is_stored_without_secrets() -> None:
    assert bare_url(SIGNED) == "https://host:8080/films/x.zip"
    assert bare_url("s3://bucket/what?.tar") == "s3://bucket/what?.tar"


def test_errors_hints_results_and_stored_configurations_contain_no_secret(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = DataError(f"{SIGNED}: missing")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == f"{SHOWN}: missing"
    assert hint("movienet-shard build", f"data.dump={SIGNED}").endswith(f"'data.dump={SHOWN}'`")
    echo(SIGNED)
    assert capsys.readouterr().out == f"{SHOWN}\n"
    config = load_config("demo", [f"data.dump={SIGNED}"])
    assert config.data.dump == SIGNED
    assert "pa55" not in dump_config(config)
    assert "5ec2et" not in dump_config(config)


def test_log_lines_contain_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    start_logging()
    logging.getLogger("sharding").info("listing %s", SIGNED)
    assert capsys.readouterr().err.endswith(f"listing {SHOWN}\n")
