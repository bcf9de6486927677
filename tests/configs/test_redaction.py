from __future__ import annotations

import logging
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import DataError
from configs.load import dump_config, load_config
from configs.redaction import bare_url, has_secret, redact, redact_urls
from configs.runtime.cli import echo
from configs.runtime.hints import hint
from configs.runtime.logs import start_logging

SIGNED = "https://ada:pa55@host:8080/films/x.zip?X-Amz-Signature=5ec2et"
DIGEST = "0123456789ab"
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
        (
            f"s3://k:se/cret@bucket/a/features@{DIGEST}: got",
            f"s3://…@bucket/a/features@{DIGEST}: got",
        ),
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


@pytest.mark.parametrize(
    ("value", "redacted"),
    [
        ("s3://bucket/films", "s3://bucket/films"),
        ("s3://key:secret@bucket/films", "s3://bucket/films"),
        ("s3://key:sec/ret@bucket/films", "s3://bucket/films"),
        (f"s3://bucket/sets/features@{DIGEST}", f"s3://bucket/sets/features@{DIGEST}"),
        (f"s3://key:se@cret@bucket/features@{DIGEST}", f"s3://bucket/features@{DIGEST}"),
        (f"s3://key:se/cret@bucket/features@{DIGEST}", f"s3://bucket/features@{DIGEST}"),
        (f"https://host:9000/features@{DIGEST}?sig=a@b", f"https://host:9000/features@{DIGEST}"),
        ("https://host:9000/ViT-L-14@336px/set", "https://host:9000/ViT-L-14@336px/set"),
        ("https://host/f.json?X-Amz-Signature=1#x", "https://host/f.json"),
        ("https://host/f?mail=a@b", "https://host/f"),
        ("file:///home/ada/films", "file://…/films"),
        ("/home/ada/films", "…/films"),
        ("~/films", "…/films"),
        ("../films", "…/films"),
        ("data/films", "data/films"),
        ("training.models.lstm:MaskedLSTM", "training.models.lstm:MaskedLSTM"),
        ({"a": ["/x/y", 1, None, True]}, {"a": ["…/y", 1, None, True]}),
    ],
)
def test_redaction_keeps_the_name_of_the_data_and_drops_the_rest(
    value: object, redacted: object
) -> None:
    assert redact(value) == redacted


WORDS = st.text("abcXYZ019+/=_.~-", min_size=1).map(lambda text: f"SECRET{text}")


@given(WORDS, WORDS, st.sampled_from(["s3", "https", "gs"]))
def test_no_user_password_or_query_survives_redaction(
    user: str, password: str, scheme: str
) -> None:
    url = f"{scheme}://{user}:{password}@bucket/films?token={user}"
    assert redact({"nested": [f"see {url} there"]}) == {
        "nested": [f"see {scheme}://bucket/films there"]
    }
