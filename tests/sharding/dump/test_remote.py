from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import ConfigError, DataError
from configs.schema import StorageConfig
from sharding.__main__ import main
from sharding.build import build_shards, publish_plan
from sharding.dump import remote
from sharding.dump.archives import Dump
from sharding.dump.remote import RemoteDump
from sharding.dump.scan import read_movies
from sharding.format.index import FrameIndex
from sharding.plan import make_plan
from sharding.seal import seal_frames
from sharding.storage.local import DiskStorage
from sharding.storage.memory import MemoryStorage
from sharding.storage.open import open_storage
from tests.sharding.films import film, write_tar
from tests.sharding.servers import nginx, request, s3_server

MOVIES = {f"tt{k}": film(f"tt{k}", shots=2 + k % 3, size=20_000) for k in range(4)}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("aws_login")]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for movie, files in MOVIES.items():
        write_tar(tmp_path / "tars", movie, files, prefix=f"{movie}/")
    return tmp_path / "tars"


def at(s3: str, location: str) -> RemoteDump:
    return RemoteDump(location, StorageConfig(endpoint_url=s3, region="us-east-1", timeout=20))


def built(dump: Dump) -> dict[str, bytes]:
    """Build a single shard: the planned size of a remote tar differs from that on disk."""
    storage = MemoryStorage()
    plan = make_plan(read_movies(dump), shard_bytes=10**9)
    publish_plan(storage, plan)
    build_shards(storage, dump, plan, range(len(plan.shards)), max_bad_fraction=0.0)
    seal_frames(storage, max_bad_fraction=0.0)
    suffixes = (".tar", ".index.npz", "manifest.json")
    return {name: storage.read(name) for name in storage.names() if name.endswith(suffixes)}


def upload(s3: str, location: str, files: dict[str, bytes]) -> RemoteDump:
    """Publish files in a new bucket; return them as a dump."""
    request(f"{s3}/{location.split('/')[2]}", "PUT")
    dump = at(s3, location)
    storage = open_storage(location, dump.config)
    for name, data in files.items():
        storage.publish(name, data, replace=True)
    return dump


def test_tars_on_s3_are_planned_by_size_and_give_the_same_shard(s3: str, tars: Path) -> None:
    files = {path.name: path.read_bytes() for path in tars.iterdir()}
    packed = gzip.compress(files.pop("tt1.tar"))
    more = {"tt1.tar.gz": packed, "README.txt": b"no movie"}
    dump = upload(s3, "s3://movies/240P/", files | more)
    movies = read_movies(dump)
    sizes = {name.removesuffix(".tar"): len(data) for name, data in files.items()}
    assert {m.movie: m.n_bytes for m in movies} == sizes | {"tt1": len(packed)}
    assert {m.images for m in movies} == {None}
    assert built(dump) == built(tars)


def test_a_prefix_of_loose_images_is_refused_by_name(s3: str) -> None:
    dump = upload(s3, "s3://loose/240P/tt1", {"shot_0000_img_0.jpg": b"image"})
    for location in (dump.location, "s3://loose/240P"):
        with pytest.raises(DataError, match=rf"{location}: got no \.tar.*loose images .* on disk"):
            read_movies(at(s3, location))


def test_a_dump_on_s3_is_read_by_worker_processes(s3: str, tars: Path, tmp_path: Path) -> None:
    dump = upload(s3, "s3://workers", {path.name: path.read_bytes() for path in tars.iterdir()})
    plan = make_plan(read_movies(dump), shard_bytes=200_000)
    assert len(plan.shards) > 1
    by_one, by_two = MemoryStorage(), DiskStorage(tmp_path / "frames")
    numbers = range(len(plan.shards))
    for storage, workers in ((by_one, 1), (by_two, 2)):
        build_shards(storage, dump, plan, numbers, max_bad_fraction=0.0, workers=workers)
    assert all(by_one.read(name) == by_two.read(name) for name in by_two.names())


def test_a_zip_on_s3_gives_the_same_shard_as_on_disk(s3: str, tars: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    of_tars = Path(shutil.make_archive(str(tmp_path / "tars"), "zip", tars))
    for movie, files in MOVIES.items():
        for name, data in files.items():
            (images / movie).mkdir(parents=True, exist_ok=True)
            (images / movie / name).write_bytes(data)
    of_images = Path(shutil.make_archive(str(tmp_path / "images"), "zip", images))
    zips = {path.name: path.read_bytes() for path in (of_tars, of_images)}
    location = upload(s3, "s3://zips/a", zips).location
    expected = built(tars)
    assert built(at(s3, f"{location}/tars.zip")) == expected
    assert built(at(s3, f"{location}/images.zip")) == expected


def test_a_tar_replaced_after_the_plan_is_refused(s3: str, tars: Path) -> None:
    dump = upload(s3, "s3://changed", {path.name: path.read_bytes() for path in tars.iterdir()})
    plan = make_plan(read_movies(dump), shard_bytes=10**9)
    write_tar(tars, "tt0", film("other", shots=2, size=20_000), prefix="tt0/")
    upload(s3, dump.location, {"tt0.tar": (tars / "tt0.tar").read_bytes()})
    remote._storage.cache_clear()  # as in another process: this one has cached the version
    with pytest.raises(DataError, match=r"s3://changed/tt0\.tar: changed since it was planned"):
        build_shards(MemoryStorage(), dump, plan, [0], max_bad_fraction=0.0)


@pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="no nginx")
def test_tars_on_an_http_server_are_listed_by_a_pattern_or_a_file(
    s3: str, tars: Path, tmp_path: Path
) -> None:
    expected = built(tars)
    with nginx(tmp_path / "nginx", tars) as url:
        assert built(at(s3, f"{url}/tt{{0..3}}.tar")) == expected
        names = tmp_path / "names.txt"
        names.write_text("# movies\n" + "".join(f"{url}/tt{k}.tar\n" for k in range(4)))
        assert built(at(s3, str(names))) == expected
        with pytest.raises(DataError, match=r"tt4\.tar"):
            read_movies(at(s3, f"{url}/tt{{0..4}}.tar"))
        with pytest.raises(DataError, match="an HTTP server does not list its files"):
            read_movies(at(s3, url))
    names.write_text("tt0.tar\n")
    with pytest.raises(ConfigError, match=r"got '.*tt0\.tar', want URLs of tars or zips"):
        read_movies(at(s3, str(names)))


@pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="no nginx")
def test_signed_urls_and_passwords_reach_no_file_and_no_line(
    tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "users").write_text("ada:{PLAIN}5ec2et\n")
    settings = f"""
        location /signed/ {{ alias {tars}/; if ($arg_sig != "5ec2et") {{ return 403; }} }}
        location /login/ {{ alias {tars}/; auth_basic x; auth_basic_user_file {tmp_path}/users; }}
    """
    results = tmp_path / "results"
    with nginx(tmp_path / "nginx", tars, settings) as url:
        (tmp_path / "urls.txt").write_text(
            "".join(f"{url}/signed/tt{k}.tar?sig=5ec2et\n" for k in range(3))
        )
        login = url.replace("http://", "http://ada:5ec2et@") + "/login/tt{0..3}.tar"
        config = tmp_path / "config.yaml"
        for dump, code in (
            (login, 0),
            (f"{tmp_path}/urls.txt", 0),
            (login.replace("..3", "..4"), 1),
        ):
            root = results / str(code) / dump.rpartition("/")[2]
            config.write_text(
                f"version: 1\ndata: {{dump: '{dump}', root: '{root}'}}\nencoder: {{name: x}}\n"
                "storage: {timeout: 60}\ntraining: {run_name: x}\n"
            )
            assert main(["build", "--config", str(config)]) == code
            assert main(["plan", "--print-config", "--config", str(config)]) == 0
    lines = "".join(capsys.readouterr())
    assert "no file tt4.tar" in lines
    assert "5ec2et" not in lines
    files = [path for path in results.rglob("*") if path.is_file()]
    assert any(path.name == "plan.json" for path in files)
    assert all(b"5ec2et" not in path.read_bytes() for path in files)


@pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="no nginx")
@pytest.mark.parametrize("packed", [False, True])
def test_a_remote_movie_is_downloaded_once_per_check_and_once_per_build(
    tmp_path: Path, packed: bool
) -> None:
    folder, images = tmp_path / "tars", film("tt1", shots=40, images=3, size=30_000)
    write_tar(folder, "tt1", images, prefix="tt1/")
    if packed:
        data = (folder / "tt1.tar").read_bytes()
        (folder / "tt1.tar.gz").write_bytes(gzip.compress(data))
        (folder / "tt1.tar").unlink()
    (path,) = folder.iterdir()
    size = path.stat().st_size
    assert size > 50 * remote._MIN_READ_BYTES
    config = tmp_path / "config.yaml"

    def sent() -> int:
        return sum(map(int, (tmp_path / "nginx" / "sent").read_text().split()))

    with nginx(tmp_path / "nginx", folder) as url:
        config.write_text(
            f"version: 1\ndata: {{dump: '{url}/{path.name}', root: {tmp_path}/root}}\n"
            "encoder: {name: x}\ntraining: {run_name: x}\n"
        )
        assert main(["check", "--quiet", "--decode", "--config", str(config)]) == 4  # no metadata
        assert sent() < 1.2 * size
        before = sent()
        assert main(["build", "--quiet", "--config", str(config)]) == 0
        assert sent() - before < 1.2 * size
    assert main(["verify", "--quiet", "--config", str(config)]) == 0
    index = FrameIndex.from_bytes(
        (tmp_path / "root" / "frames" / "frames-00000.index.npz").read_bytes(), "index"
    )
    assert len(index) == len(images)
