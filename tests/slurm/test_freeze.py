from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import load_config
from slurm.freeze import freeze


@pytest.mark.parametrize("url", ["https://ada:5ec2et@host/set", "https://host/set?sig=5ec2et"])
def test_a_secret_of_a_url_is_not_frozen_into_a_file(tmp_path: Path, url: str) -> None:
    config = load_config("demo", [f"stream.features_url={url}"])
    with pytest.raises(
        ConfigError, match=r"stream\.features_url: got a URL with a password"
    ) as got:
        freeze(config, tmp_path)
    assert "5ec2et" not in str(got.value)
    assert list(tmp_path.iterdir()) == []
