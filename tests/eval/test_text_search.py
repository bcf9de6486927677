"""Search by text on a set of five small movies, encoded by a model with both towers."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import sharding.__main__
from configs.load import load_config
from configs.schema import Config
from eval.__main__ import main
from eval.search_forms import search_folder
from eval.text_search import search_text
from sharding.features import open_features
from sharding.storage.local import DiskStorage
from tests.eval.conftest import BAD
from tests.sharding.servers import faulty_server, request

pytestmark = pytest.mark.slow

QUERIES = ["a car chase at night", "two people talk in a kitchen", "snow"]


def configure(encoded: Path, *overrides: str) -> Config:
    return load_config(encoded / "config.yaml", overrides)


def encode_text(encoded: Path, query: str) -> Any:
    """Encode a text with OpenCLIP alone."""
    model = open_clip.create_model(
        f"local-dir:{encoded / 'model'}", load_weights=False, pretrained_text=False
    )
    model.load_state_dict(torch.load(encoded / "model" / "weights.pt"))
    tokens = open_clip.get_tokenizer(f"local-dir:{encoded / 'model'}")([query])
    with torch.inference_mode():
        return model.eval().encode_text(tokens, normalize=True)[0].double().numpy()


def test_the_ranking_equals_encode_text_times_features(encoded: Path) -> None:
    features = open_features(configure(encoded).features_dir)
    rows = [(movie, features[movie]) for movie in features]
    shots = [(movie, int(shot)) for movie, own in rows for shot in own.shots_N]
    all_rows = np.concatenate([own.features_ND for _, own in rows]).astype(np.float64)
    all_rows /= np.linalg.norm(all_rows, axis=1, keepdims=True)
    for query in QUERIES:
        cosine = all_rows @ encode_text(encoded, query)
        ranked = [shots[place] for place in np.argsort(-cosine, kind="stable")]
        result = search_text(configure(encoded), query, top=99, with_stills=False)
        assert [(shot.movie, shot.shot) for shot in result.shots] == list(dict.fromkeys(ranked))
        assert len(result.shots) == 31
        assert result.shots[0].similarity == pytest.approx(cosine.max(), abs=1e-6)
    short = search_text(configure(encoded), QUERIES[-1], top=4, with_stills=False)
    assert short.shots == result.shots[:4]


def test_each_still_is_the_image_of_its_row(encoded: Path) -> None:
    result = search_text(configure(encoded), QUERIES[0], top=99, with_stills=True)
    assert result.notes == ()
    of_bad_movie = 0
    for shot, still in zip(result.shots, result.stills, strict=True):
        assert still is not None
        assert shot.image is not None
        names = sorted(path.name for path in (encoded / "dump" / shot.movie).iterdir())
        if shot.movie == "tt0000002":
            names.remove(BAD)  # it has no row
            of_bad_movie += shot.row > 6
        assert shot.image == names[shot.row]
        assert shot.image.startswith(f"shot_{shot.shot:04d}_")
        want = Image.open(encoded / "dump" / shot.movie / shot.image).convert("RGB")
        got = Image.open(io.BytesIO(still))
        assert got.size == want.size  # smaller than a thumbnail
        assert np.abs(np.asarray(got, float) - np.asarray(want, float)).mean() < 15
    assert of_bad_movie


def test_the_command_writes_a_table_a_page_and_the_data(
    encoded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(encoded / "config.yaml"), "--top", "5"]
    assert main(["search", QUERIES[0], *arguments]) == 0
    output = capsys.readouterr().out
    out = search_folder(configure(encoded).run_dir.parent, QUERIES[0])
    assert out == encoded / "root" / "runs" / "search" / "a-car-chase-at-night"
    assert output.endswith(f"page: {out / 'search.html'}\n")
    table = output.removesuffix(f"page: {out / 'search.html'}\n").splitlines()
    assert max(map(len, table)) <= 80
    data = json.loads((out / "search.json").read_text())
    assert (data["version"], data["query"], data["rows"]) == (1, QUERIES[0], 92)
    assert [shot["rank"] for shot in data["shots"]] == [1, 2, 3, 4, 5]
    for shot in data["shots"]:
        assert re.search(rf"{shot['movie']} +{shot['shot']} +", output)


def test_the_page_needs_no_network_and_describes_each_picture(
    encoded: Path, tmp_path: Path
) -> None:
    arguments = ["--config", str(encoded / "config.yaml"), "--top", "6", "--out", str(tmp_path)]
    assert main(["search", "a <b>night</b>", *arguments]) == 0
    page = (tmp_path / "search.html").read_text()
    pictures = re.findall(r'<img alt="Frame of tt\d+, shot \d+" src="data:image/jpeg;base64,', page)
    assert len(pictures) == page.count("<img") == 6
    assert not re.search(r'(src|href)="(?!data:)|url\(|<script|@import', page)
    assert "<b>night" not in page
    first = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])  # type: ignore[index]
    assert Image.open(io.BytesIO(first)).format == "JPEG"


def test_without_stills_the_page_contains_no_picture_and_states_why(
    encoded: Path, tmp_path: Path
) -> None:
    arguments = ["--config", str(encoded / "config.yaml"), "--out", str(tmp_path)]
    reasons = {
        ("--no-stills",): "No stills, by `--no-stills`.",
        ("encoder.frame_storage=temporary",): "No stills: the frame shards were temporary",
        (f"encoder.frames_url={tmp_path}/none",): "the frame set is missing or not sealed yet",
    }
    for words, reason in reasons.items():
        assert main(["search", "snow", *arguments, *words]) == 0
        page = (tmp_path / "search.html").read_text()
        assert "<img" not in page
        assert reason in page.replace("&#39;", "'")


def test_frames_that_the_features_were_not_made_from_give_no_stills(
    encoded: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    arguments = ["--config", str(encoded / "config.yaml"), f"data.root={root}"]
    assert sharding.__main__.main(["build", *arguments, "data.exclude=[tt0000001]"]) == 0
    config = configure(encoded, f"encoder.frames_url={root}/frames")
    (note,) = search_text(config, "snow", top=3, with_stills=True).notes
    assert re.match(r"No stills: .*: got frames \w{12}, want \w{12}, from which", note)


def test_a_set_on_a_server_gives_the_same_shots(encoded: Path) -> None:
    storage = DiskStorage(Path(configure(encoded).features_dir))
    want = search_text(configure(encoded), "snow", top=9, with_stills=False)
    with faulty_server() as url:
        for name in storage.names():
            request(f"{url}/bucket/both/{name}", "PUT", storage.read(name))
        config = configure(encoded, f"stream.features_url={url}/bucket/both")
        assert search_text(config, "snow", top=9, with_stills=False) == want


def test_a_search_that_is_not_possible_ends_with_one_line(
    encoded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(encoded / "config.yaml")]
    reasons = {
        ("  ",): "error: QUERY: got no words",
        ("snow", "encoder.pretrained=null"): "error: encoder.model: got ",
        ("snow", "encoder.name=other"): "the feature set is missing or not sealed yet",
    }
    for words, reason in reasons.items():
        assert main(["search", *words, *arguments]) != 0
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert reason in error


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("Two people: talking!", "two-people-talking"),
        ("../../etc", "etc"),
        ("猫と車", "猫と車"),
        ("???", "query"),
        ("very " * 30, "very-very-very-very-very-very-very-very"),
    ],
)
def test_the_folder_of_a_query_is_a_plain_name(query: str, name: str) -> None:
    assert search_folder(Path("runs"), query) == Path("runs", "search", name)
