"""Reference of all configuration keys: type, meaning, unit and default.

Each class is one section of the YAML file. A config is immutable. ``configs.load`` rejects unknown
keys and suggests the nearest valid one.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    model_validator,
)

from configs.renamed import without_removed_keys
from configs.schema_slurm import SlurmConfig
from configs.section import Few, NonNegativeInt, PositiveInt, Section
from configs.units import parse_bytes, parse_seconds

Size = Annotated[int, BeforeValidator(parse_bytes), Field(lt=2**63)]
"""Bytes. YAML accepts a number or text such as ``512MiB`` or ``2GB``."""

Seconds = Annotated[float, BeforeValidator(parse_seconds)]
"""Seconds. YAML accepts a number or text such as ``30s`` or ``5min``."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _checked_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        raise ValueError(f"got {value!r}, want up to 100 letters, digits, '.', '_' and '-'")
    return value


Name = Annotated[str, AfterValidator(_checked_name)]
"""Name of a folder: letters, digits, ``.``, ``_`` and ``-``, e.g. ``vit-b-32``."""

GENRES = (
    *("Drama", "Comedy", "Thriller", "Action", "Romance", "Horror", "Crime", "Documentary"),
    *("Adventure", "Sci-Fi", "Family", "Fantasy", "Mystery", "Biography", "Animation"),
    *("History", "Music", "War", "Sport", "Musical", "Western"),
)
"""The 21 genres of MovieNetPrediction in their published order."""


def _checked_genres(genres: tuple[str, ...]) -> tuple[str, ...]:
    if not genres or len(set(genres)) < len(genres):
        raise ValueError(f"got {list(genres)}, want at least one genre, each once")
    return genres


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]
"""List of names; YAML accepts a single one without brackets."""


def _checked_limit(value: object) -> object:
    value = _one_or_more(value)
    number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    ids = isinstance(value, list | tuple) and value and all(isinstance(id_, str) for id_ in value)
    if value is None or number or ids:
        return value
    raise ValueError(f"got {value!r}, want a number of movies from 1, or a list of ids")


class DataConfig(Section):
    """Locations of the movies, their labels and all results."""

    dump: str | None = None
    """Keyframes in MovieNet's layout: one tar or one folder of JPEGs per movie. Either a folder of
    these, or a zip or tar of them as downloaded, also in volumes (``movies.zip.001``), which is
    read in place. A path or a URL, e.g. ``movienet/240P`` or ``s3://bucket/240P``. Or a folder of
    videos (``tt0032138.mp4``), whose key frames are extracted; this needs the extra ``[video]``."""

    feature_arrays: str | None = None
    """Folder of existing features for ``movienet-shard import-features``: one ``.npy`` of shape
    ``[N, D]`` per movie."""

    feature_tars: str | None = None
    """External feature tars in WebDataset's format for ``movienet-shard index-tars``: a folder, a
    URL, a pattern such as ``https://host/features-{000..370}.tar``, or a ``.txt`` file that lists
    one tar per line."""

    feature_key: str | None = None
    """Extension under which a sample of ``feature_tars`` stores its ``[N, D]`` array, e.g.
    ``clip.npy``. Default: ``features.npy``, or the only two-dimensional array of a sample."""

    dedup: bool = False
    """On import, keep one row of each run of equal consecutive rows and drop rows of zeros."""

    metadata: str | None = None
    """Genres of the movies: a folder with one JSON file per movie that contains ``genres``, or a
    ``.json`` or ``.pkl`` file that maps movies to genres, or a ``.csv`` file with lines
    ``movie,genre|genre``."""

    split: str | None = None
    """JSON file with lists of movie ids under ``train``, ``val`` and ``test``. Or a fold such as
    ``fold:2/5``: all labelled movies are divided into 5 folds, fold 2 (counted from 0) is val and
    the others are train."""

    genres: Annotated[tuple[str, ...], AfterValidator(_checked_genres)] = GENRES
    """Genres to predict, in the order of the model's outputs."""

    root: str
    """Folder or URL under which frames, features and runs are stored, e.g. ``movienet-data`` or
    ``s3://bucket/movienet``. With a URL, set ``data.runs`` too."""

    runs: str | None = None
    """Folder of the runs, always on a file system. Default: ``ROOT/runs``."""

    limit: Annotated[int | tuple[str, ...] | None, BeforeValidator(_checked_limit)] = None
    """Use only this many movies, e.g. ``20``, or only these ids, e.g. ``[tt0032138, tt0047478]``.
    The results are stored in a separate root, ``ROOT/limit-…``, and in ``RUNS/limit-…``."""

    exclude: Names = ()
    """Movie ids to leave out, e.g. of corrupt tars. After the download is repaired, remove them
    from this list and add the movies with ``movienet-shard plan --extend``."""


class ShardingConfig(Section):
    """Layout and building of frame shards."""

    shard_bytes: Annotated[Size, Field(gt=0)] = 512 * 1024**2
    """Target bytes of images per shard, e.g. ``512MiB``. A larger movie gets a shard of its own."""

    max_bad_fraction: Fraction = 0.01
    """Largest fraction of images that may be rejected, of one movie or of the dump, before the
    stage fails. 0.01 is 1 %."""

    image_check: Literal["markers", "decode"] = "markers"
    """Validation of images: ``markers`` checks the first and last bytes of a JPEG, ``decode``
    decodes every pixel, which takes far longer. Changing it changes the plan."""

    workers: Few = 1
    """Processes that build or verify shards within one task. The bytes written do not depend on
    it. One is enough if the disk is the bottleneck."""


class StorageConfig(Section):
    """Access to object stores (``s3://``, ``gs://``, ``az://``, ``http(s)://``)."""

    endpoint_url: str | None = None
    """URL of the store, e.g. ``https://minio.example.org``. Default: the provider's; for S3 as for
    boto3, first from ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL`` or the profile."""

    region: str | None = None
    """Region of the bucket, e.g. ``eu-central-1``. Default: from the AWS profile or environment."""

    profile: str | None = None
    """Profile in ``~/.aws``, including SSO. Needs the extra ``[s3]``. Default: AWS's usual chain of
    credentials."""

    timeout: Annotated[Seconds, Field(gt=0)] = 120.0
    """Seconds before a read fails, all its retries included, or a write without progress. For
    example ``2min``."""

    max_in_flight: Few = 32
    """Concurrent requests of one process to one dataset. Each uses a thread."""


class EncoderConfig(Section):
    """The image encoder that computes the features, and its input."""

    name: Name
    """Name of the feature set, which is stored in ``ROOT/features/NAME``."""

    model: str = "ViT-B-32-quickgelu"
    """OpenCLIP model name, a JSON file that defines one, or a custom encoder: ``pkg.mod:Tower`` or
    ``./tower.py:Tower``. Files are relative to the config file."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of a custom encoder's constructor, e.g. ``{size: 224}``."""

    pretrained: str | None = "openai"
    """OpenCLIP tag or checkpoint file of any trainer. null: untrained weights from ``seed``."""

    pretrained_like: str | None = None
    """For a checkpoint of an OpenCLIP model: the tag with the same activation and preprocessing,
    e.g. ``openai``. A model in a JSON file specifies ``quick_gelu``, ``mean`` and ``std`` there."""

    weights_dir: str | None = None
    """Folder of fetched weights. Default: the cache of the Hugging Face hub."""

    seed: Seed = 0
    """Seed of untrained weights."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the encoder. ``auto``: bf16 on devices with fast bf16, else fp32."""

    reader: Literal["index", "webdataset"] = "index"
    """Reader of the frame shards: by their index, or with the ``webdataset`` library as a slower
    reference. Both return the same images."""

    normalize: bool = False
    """Store L2-normalised rows."""

    batch_size: PositiveInt = 256
    """Images per forward pass. It determines the last bit of the features, so the last batch is
    padded to this size."""

    compile: bool = False
    """Compile the encoder with ``torch.compile``, which takes minutes at the start. It determines
    the last bit of the features."""

    threads: Few = 4
    """CPU threads of the encoder's arithmetic. Fixed per feature set: it determines the last bit of
    the features."""

    decode_threads: Few | None = None
    """Threads per rank that decode JPEGs. Default: the value of ``threads``. It does not affect the
    features."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the encoder. ``auto``: a GPU if there is one."""

    max_bad_fraction: Fraction = 0.01
    """Largest fraction of a shard's images that may fail to decode before the shard fails."""

    frames_url: str | None = None
    """Folder or URL of the sealed frame set with ``frame_storage: persistent``, e.g.
    ``https://host/frames``. Default: ``ROOT/frames``."""

    frame_storage: Literal["persistent", "temporary"] = "persistent"
    """``persistent`` reads the sealed frame shards. ``temporary`` builds one frame shard at a time
    from ``data.dump`` and deletes it after encoding, so that no second copy of the dump is
    stored."""

    scratch_dir: str | None = None
    """Folder for ``frame_storage: temporary``, ideally on a local disk of the node. Default:
    ``SLURM_TMPDIR``, else the temporary folder (``TMPDIR``)."""

    scratch_bytes: Annotated[Size, Field(gt=0)] = 2 * 1024**3
    """Largest size of one rank's temporary frames, e.g. ``2GiB``: the current shard and, if it
    fits, the next one."""

    shutdown_grace: Annotated[Seconds, Field(ge=0)] = 20.0
    """Seconds that the current shard gets to finish after SIGTERM, SIGUSR1 or Ctrl-C. Otherwise it
    is dropped and encoded again by the next run. `accelerate launch` kills 30 s after SIGTERM."""

    @property
    def is_custom(self) -> bool:
        """Return whether ``model`` is a class of the user, which need not take ``pretrained``."""
        return ":" in self.model


class StreamConfig(Section):
    """Sampling and reading of feature shards during training."""

    reader: Literal["index", "webdataset"] = "index"
    """``index`` reads exactly the planned rows. ``webdataset`` reads the same shards with the
    webdataset library, for comparison: complete samples in approximately random order, slower."""

    features_url: str | None = None
    """Folder or URL of a sealed feature set, e.g. ``https://host/features/vit-b-32``. Default:
    ``ROOT/features/NAME`` with ``encoder.name``."""

    sampling: Literal["random_window", "uniform_windows", "full_movie", "random_frames"] = (
        "random_window"
    )
    """Rows read per movie. ``random_window``: consecutive rows from a random start.
    ``uniform_windows``: windows at equal distances from the first to the last row. ``full_movie``:
    all rows, padded to the longest movie of the batch. ``random_frames``: random rows, in order."""

    window: PositiveInt = 256
    """Rows per window (T), except with ``full_movie``. Shorter movies are padded and masked, never
    dropped."""

    stride: PositiveInt = 1
    """Use every k-th row. 2 skips every other row. The first row is random if the movie is longer
    than the window."""

    unit: Literal["frame", "shot"] = "frame"
    """Content of a row: one keyframe, or the mean over the keyframes of a shot."""

    windows_per_movie: Few = 1
    """Windows per movie and epoch. ``uniform_windows`` uses fewer if they would coincide."""

    bucket_batches: PositiveInt = 16
    """With ``full_movie``: number of global batches whose movies are sorted by length together, so
    that movies of similar length share a batch. 1: no sorting across batches."""

    global_batch: PositiveInt = 32
    """Windows per optimiser step, over all ranks and accumulation steps."""

    drop_last: bool = False
    """Drop the incomplete last global batch of an epoch instead of padding it with weight 0."""

    shuffle_block_shards: NonNegativeInt = 0
    """0: shuffle all movies. k: shuffle the shards, form blocks of k shards and shuffle the movies
    within each block, which reads fewer shards at a time."""

    seed: Seed = 0
    """Seed of the sampling order. The same seed gives the same global batches on any number of
    ranks."""

    prefetch: PositiveInt = 3
    """Batches to read ahead, per rank."""

    prefetch_bytes: Annotated[Size, Field(gt=0)] = 1024**3
    """Memory limit of the batches read ahead, per rank, e.g. ``1GiB``. One batch is always read
    ahead."""

    threads: Few = 4
    """Threads that read from a file system. An object store uses ``storage.max_in_flight``."""

    cache_dir: str = "auto"
    """Cache of complete shards on the node: ``off``, a folder, or ``auto``. ``auto`` caches a URL
    on the node's local disk (``SLURM_TMPDIR``, ``TMPDIR`` or ``/tmp``) and a folder not at all."""

    cache_bytes: Annotated[Size, Field(gt=0)] | None = None
    """Largest size of the cache, e.g. ``200GB``. Default: as much as leaves a tenth of the disk
    free."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.stride > 1 and (self.sampling == "random_frames" or self.unit == "shot"):
            other = "sampling: random_frames" if self.sampling == "random_frames" else "unit: shot"
            raise ValueError(f"stream.stride: got {self.stride} with {other}, want 1")
        return self


class ModelConfig(Section):
    """The model to train."""

    class_: str = Field("training.models.lstm:MaskedLSTM", alias="class")
    """Class of the model: ``pkg.mod:Net``, or ``./net.py:Net`` relative to the config file.
    ``movienet-train models`` lists the built-in ones."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the model's constructor, e.g. ``{hidden: 256, dropout: 0.3}``."""

    init_from: str | None = None
    """Initial weights: a run's folder, one of its checkpoints, or a file of weights of any trainer.
    Tensors with the same name and shape are loaded, all others are initialised as usual."""


class TrainingConfig(Section):
    """Training, validation and checkpoints."""

    run_name: Name
    """Name of the run, which is stored in ``RUNS/RUN_NAME``. An existing run is resumed."""

    split: str | None = None
    """Split file that replaces the feature set's own split, or a fold such as ``fold:2/5`` of its
    train movies."""

    shuffle_frames: bool = False
    """Permute the rows of every movie, in training and scoring. The loss in mAP shows how much the
    model learns from the order of frames."""

    seed: Seed = 0
    """Seed of initial weights, dropout and augmentation."""

    epochs: PositiveInt = 25
    """Passes over the train movies."""

    optimizer: Literal["adamw", "adam"] = "adamw"
    """torch's optimiser of this name."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate, e.g. ``3e-4``."""

    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of the optimiser: decoupled with AdamW, an L2 penalty with Adam."""

    schedule: Literal["constant", "cosine", "step"] = "constant"
    """Learning rate after warm-up. ``cosine`` decays to zero. ``step`` multiplies by ``lr_gamma``
    every ``lr_step_epochs``."""

    lr_step_epochs: PositiveInt = 150
    """Epochs between two decays of the ``step`` schedule."""

    lr_gamma: PositiveFloat = 0.6
    """Factor of each decay of the ``step`` schedule."""

    warmup_steps: NonNegativeInt = 0
    """Optimiser steps of linear warm-up; 0: none."""

    clip_norm: NonNegativeFloat = 0.0
    """Largest gradient norm, e.g. ``1.0``; 0: no clipping."""

    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of an exponential moving average of the weights, e.g. ``0.999``. If set, the
    averaged weights are scored and exported; 0: no average."""

    patience: NonNegativeInt = 0
    """Stop after this many validations without a better mAP on the holdout; 0: never."""

    grad_accumulation: Few = 1
    """Forward passes per optimiser step."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Mixed precision of training; ``fp32``: none."""

    compile: bool = False
    """Run the model through ``torch.compile``, which needs a C++ compiler on the machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model. ``auto``: a GPU if there is one."""

    threads: Annotated[int, Field(ge=0, le=65_536)] = 0
    """CPU threads per rank for arithmetic. 0: one per million parameters of the model, at most
    ``OMP_NUM_THREADS`` or the number of cores."""

    lock_wait: Annotated[Seconds, Field(ge=0, lt=600)] = 300.0
    """Longest wait for an older life of the same Slurm job that still holds the run, in seconds."""

    expected_world_size: PositiveInt | None = None
    """Number of ranks to require, e.g. ``8``. Any other number is refused at the start. The option
    ``--expected-world-size`` overrides it. Default: accept any number."""

    loss: str = "bce"
    """``bce``; ``balanced_bce``: positives weighted by the square root of their rarity;
    ``weighted_bce``: genres weighted by their counts, as published; or a custom function,
    ``pkg.mod:function`` or ``./file.py:function`` relative to the config file."""

    feature_noise: NonNegativeFloat = 0.0
    """Standard deviation of Gaussian noise added to the rows, relative to the standard deviation of
    the train rows (one value for all features)."""

    frame_dropout: Fraction = 0.0
    """Probability that a row is masked in training."""

    feature_dropout: Fraction = 0.0
    """Probability that a feature is replaced by its mean over the train rows, in all rows of a
    window at once."""

    mixup: NonNegativeFloat = 0.0
    """Mix each window and its labels with those of another movie, with a weight drawn from
    Beta(a, a). The value is a, e.g. ``0.2``; 0: no mixing."""

    holdout: Fraction = 0.1
    """Fraction of the train movies that are not trained on. They select the best checkpoint. The
    val split never does."""

    threshold: Fraction | None = None
    """Probability from which a genre is predicted, the same for all genres. null: tuned by
    cross-validation over the holdout, for all genres and per genre, or 0.5 without a holdout."""

    monitor_split: str | None = "val"
    """Split that is scored and logged in addition to the holdout. It influences no decision.
    null: none."""

    validate_epochs: NonNegativeInt = 1
    """Epochs between two validations; 0: only after the last epoch."""

    checkpoint_steps: NonNegativeInt = 0
    """Steps between two checkpoints, in addition to those at each validation; 0: none."""

    checkpoint_minutes: NonNegativeFloat = 0.0
    """Minutes between two checkpoints, in addition to those at each validation; 0: none."""

    keep_checkpoints: PositiveInt = 1
    """Number of newest checkpoints to keep: ``last``, and ``step-…`` before it. ``best`` is always
    kept."""


class EvalConfig(Section):
    """Scoring and report."""

    split: str = "val"
    """Split to score."""

    allow_train: bool = False
    """Score movies that the run was trained on, and state so on top of the report. By default such
    a split is refused."""

    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint to score. A run without a holdout has only ``last``."""

    windows: Few | Literal["whole"] = 4
    """Windows per movie at equal distances, whose logits are averaged; fewer if they would
    coincide. ``whole``: the complete movie in one pass, as always with
    ``stream.sampling: full_movie``."""

    batch_size: PositiveInt = 64
    """Windows per forward pass."""

    prompts: str | None = None
    """File of prompts for the zero-shot baseline: one template with ``{genre}`` per line, and lines
    ``Sci-Fi = science fiction``. Default: ``eval/prompts.txt``."""

    bootstrap: NonNegativeInt = 1000
    """Bootstrap samples of the movies for 95 % intervals; 0: no intervals."""

    seed: Seed = 0
    """Seed of the bootstrap."""


class TrackingConfig(Section):
    """Metrics in addition to ``metrics.jsonl``. A missing or failing wandb never stops a run."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """``auto``: as set by ``WANDB_MODE``, ``WANDB_DISABLED``, `wandb offline` or `wandb disabled`,
    else online with an API key and offline without."""

    project: str | None = None
    """wandb project. Default: ``WANDB_PROJECT``, else ``movienet-stream``."""

    entity: str | None = None
    """wandb team or user. Default: ``WANDB_ENTITY``, else that of the API key."""

    group: str | None = None
    """wandb group. Default: ``WANDB_RUN_GROUP``, else ``training.run_name``."""

    tags: Names | None = None
    """wandb tags, e.g. ``[baseline, clip]``. Default: ``WANDB_TAGS``."""

    upload: Literal["metrics", "report"] = "metrics"
    """``report``: `movienet-eval report` also uploads its page as an artifact, including movie
    titles and paths."""

    tensorboard: bool = False
    """Also write event files to ``RUN/tensorboard``. Needs the extra ``[tensorboard]``."""

    timeout: Seconds = 60.0
    """Seconds to wait for wandb at its start, and again at its end."""


class Config(Section):
    """Configuration of all stages, from the dump to the report."""

    version: Literal[1]
    """Version of this schema. Required."""

    data: DataConfig
    sharding: ShardingConfig = ShardingConfig()
    storage: StorageConfig = StorageConfig()
    encoder: EncoderConfig
    stream: StreamConfig = StreamConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig
    eval: EvalConfig = EvalConfig()
    tracking: TrackingConfig = TrackingConfig()
    slurm: SlurmConfig = SlurmConfig()

    @model_validator(mode="before")
    @classmethod
    def _of_an_older_version(cls, tree: Any) -> Any:
        """Ignore removed keys, which every stored configuration contains."""
        return without_removed_keys(tree)[0]

    @property
    def root(self) -> str:
        """Root of the data: ``data.root``, or a folder in it if ``data.limit`` is set."""
        return "/".join(filter(None, (self.data.root, self.limit_folder)))

    @property
    def limit_folder(self) -> str | None:
        """Name of the folders of this ``data.limit`` in ``data.root`` and ``data.runs``."""
        limit = self.data.limit
        if limit is None:
            return None
        if isinstance(limit, int):
            return f"limit-{limit}"
        digest = hashlib.sha256("\n".join(sorted(limit)).encode()).hexdigest()[:8]
        return f"limit-{len(limit)}-{digest}"

    @property
    def frames_dir(self) -> str:
        """Folder or URL to which frame shards are written."""
        return f"{self.root}/frames"

    @property
    def frames_url(self) -> str:
        """Folder or URL from which frames are read: ``encoder.frames_url``, else ``frames_dir``."""
        return self.encoder.frames_url or self.frames_dir

    @property
    def features_dir(self) -> str:
        """Folder or URL to which the feature set is written."""
        return f"{self.root}/features/{self.encoder.name}"

    @property
    def features_url(self) -> str:
        """Folder or URL of features to read: ``stream.features_url``, else ``features_dir``."""
        return self.stream.features_url or self.features_dir

    @property
    def run_dir(self) -> Path:
        """Folder of the training run."""
        if self.data.runs is None:
            return Path(self.root) / "runs" / self.training.run_name
        return Path(self.data.runs) / (self.limit_folder or "") / self.training.run_name

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if "://" in self.data.root and self.data.runs is None:
            raise ValueError(
                f"data.runs: got null with data.root {self.data.root}, want a folder: runs need a "
                "file system"
            )
        if self.data.runs is not None and "://" in self.data.runs:
            raise ValueError(
                f"data.runs: got {self.data.runs}, want a folder: runs need a file system"
            )
        if self.training.patience and self.training.holdout == 0:
            raise ValueError(
                f"training.patience: got {self.training.patience} with training.holdout 0, want a "
                "holdout such as 0.1, whose mAP decides when to stop"
            )
        if self.eval.checkpoint == "best" and self.training.holdout == 0:
            raise ValueError(
                "eval.checkpoint: got 'best' with training.holdout 0, want 'last', or a holdout "
                "such as 0.1 that selects the best checkpoint"
            )
        return self
