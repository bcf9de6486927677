from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.load import PRESETS, dump_config, load_config
from configs.schema import Config
from tests.damage import damaged, reads_or_reports

MINIMAL: dict[str, Any] = {
    "version": 1,
    "data": {"root": "out"},
    "encoder": {"name": "tower"},
    "training": {"run_name": "first"},
}


def write(folder: Path, **sections: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | sections))
    return path


def error_line(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_minimal_file_gets_every_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    assert config.sharding.shard_bytes == 512 * 1024**2
    assert config.features_dir == config.features_url == "out/features/tower"
    assert config.run_dir == Path("out/runs/first")


@pytest.mark.parametrize("preset", ["demo", "movienet", "features", "original_lstm"])
def test_every_preset_loads_by_path_and_by_name(preset: str) -> None:
    by_path = load_config(PRESETS / f"{preset}.yaml")
    assert by_path == load_config(preset) == load_config(f"{preset}.yaml")


def test_a_file_of_the_user_is_preferred_to_a_preset_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (PRESETS / "demo.yaml").read_text().replace("root: demo-data", "root: mine")
    Path("demo.yaml").write_text(text)
    assert load_config("demo.yaml").root == "mine"
    assert load_config("demo").root == "demo-data"


def test_a_path_is_never_a_preset() -> None:
    assert "no file 'configs/dmo.yaml'; did you mean 'demo'?" in error_line(
        Path("configs/dmo.yaml")
    )


def test_the_tests_cover_every_preset() -> None:
    covered = {"demo", "movienet", "features", "original_lstm"}
    assert {file.stem for file in PRESETS.glob("*.yaml")} == covered


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"stream": {"windw": 3}}, "[stream]: unknown key 'windw'; did you mean 'window'?"),
        ({"strem": {"window": 3}}, "unknown key 'strem'; did you mean 'stream'?"),
        ({"stream": {"qqq": 3}}, "unknown key 'qqq'; valid keys: "),
        ({"stream": {"window": 0}}, "stream.window: got 0, want greater than 0"),
        ({"stream": {"window": "ten"}}, "stream.window: got 'ten', want an integer"),
        ({"stream": 3}, "stream: got 3, want a section of keys"),
        ({"sharding": {"shard_bytes": "2 XB"}}, "sharding.shard_bytes: got '2 XB', want bytes"),
        ({"sharding": {"shard_bytes": 0}}, "sharding.shard_bytes: got 0, want greater than 0"),
        ({"data": {"root": "r", "limit": {"a": 1}}}, "data.limit: got {'a': 1}, want a number of"),
        ({"data": {"root": "r", "limit": 0}}, "data.limit: got 0, want a number of movies from 1"),
        ({"data": {"root": "r", "limit": []}}, "data.limit: got [], want a number of movies"),
        ({"data": {"root": "r", "genres": []}}, "data.genres: got [], want at least one genre"),
        ({"data": {"root": "r", "genres": ["A", "A"]}}, "data.genres: got ['A', 'A'], want"),
        ({"tracking": {"wandb": False}}, "tracking.wandb: got False, want 'auto', 'online'"),
        ({"encoder": {}}, "encoder.name: missing, want a value"),
        ({"encoder": {"name": "../x"}}, "encoder.name: got '../x', want up to 100 letters, digits"),
        ({"version": 2}, "version: got 2, want 1"),
        ({"eval": {"seed": 2**64}}, "eval.seed: got 18446744073709551616, want less than"),
        ({"training": {"run_name": "r", "holdout": 0}}, "eval.checkpoint: got 'best' with"),
    ],
)
def test_an_invalid_file_is_reported_in_one_line_with_key_value_and_expectation(
    tmp_path: Path, sections: dict[str, Any], expected: str
) -> None:
    assert expected in error_line(write(tmp_path, **sections))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.lrr=1", "override 'training.lrr=1': unknown key 'lrr'; did you mean 'lr'?"),
        ("trainig.lr=1", "unknown key 'trainig'; did you mean 'training'?"),
        ("training.lr", "want KEY=VALUE"),
        ("training=3", "'training' is a section, want training.KEY=…"),
        ("training.lr.x=3", "'lr' is a value, not a section"),
        ("training.lr=[", "not YAML"),
        ("stream.windows_per_movie=100000", "windows_per_movie: got 100000, want less than"),
        ("training.lr=.inf", "training.lr: got inf, want a finite number"),
        ("stream.window=1000000000000", "stream.window: got 1000000000000, want less than or eq"),
        (
            f"stream.cache_bytes={'9' * 400}GB",
            "stream.cache_bytes: got 99999999999999999999…, want",
        ),
        ("training.lr=fast", "override 'training.lr=fast': training.lr: got 'fast', want a number"),
    ],
)
def test_an_invalid_override_is_reported_in_one_line(
    tmp_path: Path, override: str, expected: str
) -> None:
    assert expected in error_line(write(tmp_path), override)


@pytest.mark.parametrize(
    ("override", "value"),
    [("training.lr=3e-4", 3e-4), ("training.lr=0.5", 0.5), ("training.lr=2", 2.0)],
)
def test_overrides_are_yaml_in_which_3e_minus_4_is_a_number(
    tmp_path: Path, override: str, value: float
) -> None:
    assert load_config(write(tmp_path), [override]).training.lr == value


def test_off_is_text_and_false_is_a_boolean(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["tracking.wandb=off", "stream.drop_last=true"])
    assert (config.tracking.wandb, config.stream.drop_last) == ("off", True)


@pytest.mark.parametrize(
    ("override", "place", "expected"),
    [
        ("training.run_name=20261125", ("training", "run_name"), "20261125"),
        ("training.run_name=007", ("training", "run_name"), "007"),
        ("training.run_name=3e563", ("training", "run_name"), "3e563"),
        ("training.run_name=1234e56", ("training", "run_name"), "1234e56"),
        ("training.run_name=1_0.50", ("training", "run_name"), "1_0.50"),
        ("encoder.name=2026-11-25", ("encoder", "name"), "2026-11-25"),
        ("tracking.tags=[2026, v1]", ("tracking", "tags"), ("2026", "v1")),
        ("tracking.tags=1.0", ("tracking", "tags"), ("1.0",)),
        ("data.exclude=[1917, 007, tt1]", ("data", "exclude"), ("1917", "007", "tt1")),
        ("data.exclude=1917", ("data", "exclude"), ("1917",)),
        ("data.exclude=tt1", ("data", "exclude"), ("tt1",)),
        ("data.limit=[1917]", ("data", "limit"), ("1917",)),
        ("data.limit=tt1", ("data", "limit"), ("tt1",)),
        ("data.limit=20", ("data", "limit"), 20),
        ("slurm.account=0123", ("slurm", "account"), "0123"),
        ("model.options.hidden=64", ("model", "options"), {"hidden": 64}),
        ("model.options.p=1e-3", ("model", "options"), {"p": 0.001}),
    ],
)
def test_numbers_are_text_where_a_key_takes_text(
    tmp_path: Path, override: str, place: tuple[str, str], expected: object
) -> None:
    section, key = place
    config = load_config(write(tmp_path), [override])
    assert getattr(getattr(config, section), key) == expected
    key_in_file, _, text = override.partition("=")
    lines = "".join(f"{'  ' * k}{word}:\n" for k, word in enumerate(key_in_file.split(".")))
    in_file = yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != section})
    rest = {k: v for k, v in MINIMAL.get(section, {}).items() if k != key}
    path = tmp_path / "written.yaml"
    path.write_text(
        f"{in_file}{lines.rstrip()} {text}\n" + "".join(f"  {k}: {v}\n" for k, v in rest.items())
    )
    assert load_config(path) == config


def test_an_override_can_set_one_option_of_a_model(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["model.options.hidden=64", "model.class=a.b:Net"])
    assert config.model.options == {"hidden": 64}
    assert config.model.class_ == "a.b:Net"


def test_features_url_changes_where_features_are_read_and_not_where_they_are_written(
    tmp_path: Path,
) -> None:
    config = load_config(write(tmp_path), ["stream.features_url=shared"])
    assert (config.features_url, config.features_dir) == ("shared", "out/features/tower")


def test_data_limit_gives_the_run_a_separate_root(tmp_path: Path) -> None:
    path = write(tmp_path)
    few = load_config(path, ["data.limit=20"])
    some = load_config(path, ["data.limit=[tt2, tt1]"])
    assert few.frames_dir == "out/limit-20/frames"
    assert some.root == load_config(path, ["data.limit=[tt1, tt2]"]).root
    assert len({few.root, some.root, load_config(path).root}) == 3


def test_data_limit_gives_the_run_a_separate_folder_wherever_runs_are(tmp_path: Path) -> None:
    path = write(tmp_path)
    for runs, words in (("out/{}runs", ()), ("mine/{}", ("data.runs=mine",))):
        complete, few = (load_config(path, [*words, *more]) for more in ((), ("data.limit=20",)))
        name = complete.training.run_name
        assert complete.run_dir == Path(runs.format("")) / name
        assert few.run_dir == Path(runs.format("limit-20/")) / name


def test_the_path_of_a_model_file_is_relative_to_the_config_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, model={"class": "./net.py:Net"}))
    assert config.model.class_ == f"{tmp_path.resolve()}/net.py:Net"


def test_a_repeated_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("version: 1\ndata: {root: a, root: b}\n")
    assert "key 'root' appears twice in the section at line 2" in error_line(path)


def test_for_a_missing_file_the_nearest_preset_is_suggested() -> None:
    assert "did you mean 'demo'?" in error_line(Path("dmo.yaml"))


def test_a_file_that_is_not_yaml_is_reported_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: [1,\nb: }")
    assert "not YAML: while parsing a flow node" in error_line(path)
    assert error_line(path).endswith("found '}' at line 2, column 4")
    path.write_bytes(b"\xff\xfe")
    assert "not UTF-8 text" in error_line(path)


def test_a_config_is_immutable(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        config.training.epochs = 3  # type: ignore[misc]


@pytest.mark.slow
@given(
    lr=st.floats(1e-9, 1e3),
    shard_bytes=st.integers(1, 2**50),
    limit=st.none() | st.integers(1, 9) | st.tuples(st.text("abc", min_size=1)),
    options=st.dictionaries(st.text("abc", min_size=1), st.floats(-9, 9) | st.text(max_size=3)),
)
def test_the_resolved_copy_loads_back_to_an_equal_config(
    lr: float, shard_bytes: int, limit: Any, options: dict[str, Any], tmp_path_factory: Any
) -> None:
    tree = MINIMAL | {
        "data": {"root": "out", "limit": limit},
        "sharding": {"shard_bytes": shard_bytes},
        "model": {"options": options},
        "training": {"run_name": "first", "lr": lr},
    }
    config = Config.model_validate(tree)
    path = tmp_path_factory.mktemp("copy") / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.slow
def test_a_file_may_have_more_than_a_megabyte(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text() + "# " + "x" * 1024**2)
    assert load_config(path).training.run_name == "first"


def test_a_damaged_file_is_read_or_a_one_line_error(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"

    @settings(max_examples=30)
    @given(damaged(Path("configs/demo.yaml").read_bytes()))
    def check(corrupt: bytes) -> None:
        path.write_bytes(corrupt)
        assert reads_or_reports(lambda: load_config(path))

    check()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a: " + "[" * 3000, "a: !!timestamp x", "a: 1" + "0" * 5000])
def test_yaml_that_crashes_its_parser_is_a_one_line_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config.yaml: corrupt \(.*\); want YAML"):
        load_config(tmp_path / "config.yaml")
