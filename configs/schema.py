"""Every parameter of every stage, typed, with its meaning and unit.

The classes are the sections of the one YAML file. They are frozen: nothing changes a config after
``configs.load`` has made it. Unknown keys are refused there, with the nearest valid name.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from configs.units import parse_bytes, parse_seconds

Size = Annotated[int, BeforeValidator(parse_bytes)]
"""Bytes; YAML may say ``512MiB`` or ``2GB``."""

Seconds = Annotated[float, BeforeValidator(parse_seconds)]
"""Seconds; YAML may say ``30s`` or ``5min``."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""A name that becomes a folder: letters, digits, ``.``, ``_``, ``-``."""

GENRES = (
    *("Drama", "Comedy", "Thriller", "Action", "Romance", "Horror", "Crime", "Documentary"),
    *("Adventure", "Sci-Fi", "Family", "Fantasy", "Mystery", "Biography", "Animation"),
    *("History", "Music", "War", "Sport", "Musical", "Western"),
)
"""The 21 genres of MovieNetPrediction, in its order."""


def _checked_genres(genres: tuple[str, ...]) -> tuple[str, ...]:
    if not genres or len(set(genres)) < len(genres):
        raise ValueError(f"got {list(genres)}, want at least one genre, each once")
    return genres


def _checked_limit(value: object) -> object:
    number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    ids = isinstance(value, list | tuple) and value and all(isinstance(id_, str) for id_ in value)
    if value is None or number or ids:
        return value
    raise ValueError(f"got {value!r}, want a number of films from 1, or a list of ids")


class Section(BaseModel):
    """One section of the YAML file."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        populate_by_name=True,
    )


class DataConfig(Section):
    """Where the films, their labels and everything that is made of them lie."""

    dump: str | None = None
    """Keyframes in MovieNet's layout, one tar or one folder of JPEGs a movie: a folder of these,
    or a zip or tar of them as it was delivered, also in parts; nothing is unpacked."""

    feature_arrays: str | None = None
    """Folder of ready-made features, one ``[N, D]`` ``.npy`` a movie, for ``import-features``."""

    feature_tars: str | None = None
    """Feature tars that others wrote in webdataset's form, for ``index``: a folder or URL, a
    pattern such as ``https://host/features-{000..370}.tar``, or a ``.txt`` of names."""

    feature_key: str | None = None
    """Field of these tars that holds the ``[N, D]`` ``.npy``; default ``features.npy``, or the only
    one of two axes."""

    dedup: bool = False
    """On import, keep each run of equal rows once and drop zero rows."""

    metadata: str | None = None
    """Folder of one JSON a movie with ``genres``; or a ``.pkl`` or ``.json`` file mapping a movie
    id to its genres."""

    split: str | None = None
    """JSON file with the lists ``train``, ``val``, ``test`` of movie ids, or ``fold:2/5``: of five
    folds of all labelled movies, counted from 0, fold 2 is val and the others are train."""

    genres: Annotated[tuple[str, ...], AfterValidator(_checked_genres)] = GENRES
    """The vocabulary, in the order of the model's outputs."""

    root: str
    """Folder or URL, e.g. ``s3://bucket/films``, under which frames, features and (in a folder)
    runs are published."""

    runs: str | None = None
    """Folder of the runs; default ``ROOT/runs``. Always a file system."""

    limit: Annotated[int | tuple[str, ...] | None, BeforeValidator(_checked_limit)] = None
    """Only this many films, or these ids: the whole road on a few, in a root of its own."""

    exclude: tuple[str, ...] = ()
    """Ids of films to leave out, e.g. of damaged tars until they are fetched again: taken off this
    list, ``sharding plan --extend`` adds them."""


class ShardingConfig(Section):
    """How frame shards are cut and built."""

    shard_bytes: Annotated[Size, Field(gt=0)] = 512 * 1024**2
    """Wanted bytes of images a shard; a larger movie has a shard to itself."""

    max_bad_fraction: Fraction = 0.01
    """Share of images of a movie or of the dump that may be rejected before the stage stops."""

    image_check: Literal["markers", "decode"] = "markers"
    """How images are judged: ``markers`` looks at both ends of the JPEG, ``decode`` at every
    pixel, which takes far longer. It is part of the plan."""

    workers: PositiveInt = 1
    """Processes that build or verify shards within a task; the bytes are the same for any number.
    One is enough where the disk is the limit."""


class StorageConfig(Section):
    """How object stores are reached (``s3://``, ``gs://``, ``az://``, ``http(s)://``)."""

    endpoint_url: str | None = None
    """Address of an S3-compatible store, e.g. ``https://minio.example.org``; default: AWS."""

    region: str | None = None
    """Region of the bucket; default: that of the AWS profile or environment."""

    profile: str | None = None
    """Profile of ``~/.aws``, SSO included; needs the extra ``[s3]``. Default: the usual chain."""

    timeout: Annotated[Seconds, Field(gt=0)] = 120.0
    """Longest time for one read with all its tries, or without progress of a write, in seconds."""

    max_in_flight: PositiveInt = 32
    """Requests that one process has under way at once on one set; each is a thread's."""


class EncoderConfig(Section):
    """Which image tower makes the features, and how it is fed."""

    name: Name
    """Name of the feature set: it lies in ``ROOT/features/NAME``."""

    model: str = "ViT-B-32-quickgelu"
    """OpenCLIP model name; a JSON file that defines one; or an own encoder, ``pkg.mod:Tower`` or
    ``./tower.py:Tower``. Files are relative to the config file."""

    options: dict[str, Any] = {}
    """Keyword arguments of an own encoder's constructor."""

    pretrained: str | None = "openai"
    """OpenCLIP tag or local checkpoint; null means untrained weights from ``seed``."""

    pretrained_like: str | None = None
    """For a checkpoint of an OpenCLIP model: the tag whose activation and preprocessing it has. A
    model in a JSON file states ``quick_gelu``, ``mean`` and ``std`` itself."""

    weights_dir: str | None = None
    """Folder where fetched weights are looked for; default: the hub's own cache."""

    seed: Seed = 0
    """Seed of untrained weights."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the tower; ``auto`` is bf16 where the device does it well, else fp32."""

    preprocess: Literal["fast", "exact"] = "fast"
    """``exact`` equals OpenCLIP's pixels bit for bit; ``fast`` stays within 2/255 of them."""

    reader: Literal["index", "webdataset"] = "index"
    """How shards are read: by their index, or by the ``webdataset`` library, the slower reference;
    the pictures are the same."""

    normalize: bool = False
    """Store L2-normalised rows."""

    batch_size: PositiveInt = 256
    """Frames a forward pass; fixed, the last batch is padded, since it decides the last bit."""

    compile: bool = False
    """Compile the tower with ``torch.compile``: minutes at the start; it decides the last bit."""

    threads: PositiveInt = 4
    """Arithmetic threads of a tower on the CPU; fixed for a set, since they decide the last bit."""

    decode_threads: PositiveInt | None = None
    """Decode threads of one rank; default: as many as ``threads``. They change no bit."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the tower runs."""

    max_bad_fraction: Fraction = 0.01
    """Share of images of a shard that may be undecodable before the shard fails."""

    frames_url: str | None = None
    """Folder or URL of the sealed frame set, for ``frame_storage: persistent``, e.g. on an
    HTTP server; default ``ROOT/frames``."""

    frame_storage: Literal["persistent", "temporary"] = "persistent"
    """``persistent`` reads the sealed frame shards; ``temporary`` builds each from
    ``data.dump`` when its turn comes and removes it once it is encoded: no second copy of the
    dump is stored."""

    scratch_dir: str | None = None
    """Folder for ``frame_storage: temporary``, best on a disk of the node; default: the
    temporary folder (``TMPDIR``)."""

    scratch_bytes: Annotated[Size, Field(gt=0)] = 2 * 1024**3
    """Most bytes that one rank holds in scratch: the shard in hand and, if it fits, the next."""

    shutdown_grace: Annotated[Seconds, Field(ge=0)] = 20.0
    """Time that the shard in hand has after SIGTERM, SIGUSR1 or Ctrl-C; one that needs longer is
    dropped, and encoded again by the next run. `accelerate launch` kills 30 s after SIGTERM."""


class StreamConfig(Section):
    """How training reads feature shards."""

    reader: Literal["index", "webdataset"] = "index"
    """``index`` reads what the plan names, exactly; ``webdataset`` runs the same shards through the
    webdataset library: whole samples in about random order, slower, for comparison."""

    features_url: str | None = None
    """Folder or URL of a sealed feature set; default ``ROOT/features/NAME`` of ``encoder.name``."""

    sampling: Literal["random_window", "uniform_windows", "full_movie", "random_frames"] = (
        "random_window"
    )
    """What is read of a movie: a ``random_window``, ``uniform_windows`` from its first to its
    last row, the ``full_movie`` (padded to the longest of its batch), or ``random_frames`` in
    their order."""

    window: PositiveInt = 256
    """Rows of a window (T), but for whole movies. Shorter ones are padded and masked, never
    dropped."""

    stride: PositiveInt = 1
    """Every k-th frame; where the movie leaves a choice, the first is drawn at random."""

    unit: Literal["frame", "shot"] = "frame"
    """What a row stands for: a key frame, or the mean over the key frames of a shot."""

    windows_per_movie: PositiveInt = 1
    """Windows of each movie an epoch; with ``uniform_windows`` fewer where they would coincide."""

    bucket_batches: PositiveInt = 16
    """With ``full_movie``: so many global batches are sorted by length together, so that movies of
    about one length meet in a batch. 1: only what chance brings together."""

    global_batch: PositiveInt = 32
    """Windows of one optimiser step, over all ranks and accumulation steps."""

    drop_last: bool = False
    """Drop the last short global batch of an epoch instead of padding it with weight 0."""

    shuffle_block_shards: NonNegativeInt = 0
    """0: one permutation of all movies. k: permute shards, group k, permute movies in a group."""

    seed: Seed = 0
    """Seed of the order; the same seed gives the same global batches on any number of ranks."""

    prefetch: PositiveInt = 3
    """Batches read ahead."""

    prefetch_bytes: Annotated[Size, Field(gt=0)] = 1024**3
    """Most memory of batches read ahead, in each rank; one always is."""

    threads: PositiveInt = 4
    """Reading threads; from an object store there are as many as ``storage.max_in_flight``."""

    cache_dir: str = "auto"
    """Where whole shards are kept on the node: ``off``, a folder, or ``auto``: for a URL the node's
    own disk (``SLURM_TMPDIR``, ``TMPDIR`` or ``/tmp``), for a folder none."""

    cache_bytes: Annotated[Size, Field(gt=0)] | None = None
    """Room of the cache, never exceeded; default: what leaves a tenth of its disk free."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.stride > 1 and (self.sampling == "random_frames" or self.unit == "shot"):
            other = "sampling: random_frames" if self.sampling == "random_frames" else "unit: shot"
            raise ValueError(f"stream.stride: got {self.stride} with {other}, want 1")
        return self


class ModelConfig(Section):
    """Which model is trained."""

    class_: str = Field("training.models.lstm:MaskedLSTM", alias="class")
    """``pkg.mod:Net`` or ``./net.py:Net`` (relative to the config file)."""

    options: dict[str, Any] = {}
    """Keyword arguments of the model's constructor."""

    init_from: str | None = None
    """Weights to begin with: a run's folder, a checkpoint in it, or a ``.safetensors`` file. What
    has the same name and shape is taken, the rest begins fresh."""


class TrainingConfig(Section):
    """The training run."""

    run_name: Name
    """Name of the run: it lies in ``RUNS/RUN``. An existing run is resumed."""

    split: str | None = None
    """Split file that overrides the labels' own; or ``fold:2/5``: folds of their train movies."""

    shuffle_frames: bool = False
    """Permute the frames of every movie, in training and scoring: what is lost is what order
    was worth."""

    seed: Seed = 0
    """Seed of initial weights, dropout and augmentation."""

    epochs: PositiveInt = 25
    """Passes over the train movies."""

    optimizer: Literal["adamw", "adam"] = "adamw"
    """torch's optimiser of that name."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate."""

    weight_decay: NonNegativeFloat = 0.1
    """Decoupled for AdamW."""

    schedule: Literal["constant", "cosine", "step"] = "constant"
    """``step`` multiplies by ``gamma`` every ``step_epochs``; ``cosine`` ends at zero."""

    lr_step_epochs: PositiveInt = 150
    """Epochs between two drops of the ``step`` schedule."""

    lr_gamma: PositiveFloat = 0.6
    """Factor of the ``step`` schedule."""

    warmup_steps: NonNegativeInt = 0
    """Optimiser steps of linear warm-up."""

    clip_norm: NonNegativeFloat = 0.0
    """Largest gradient norm; 0 means no clipping."""

    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay a step of a moving average of the weights, which is then what is scored; 0: none."""

    patience: NonNegativeInt = 0
    """Validations without a better mAP on the holdout after which training ends; 0: never."""

    grad_accumulation: PositiveInt = 1
    """Forward passes an optimiser step."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Mixed precision of Accelerate; fp32 means none."""

    compile: bool = False
    """Run the model through ``torch.compile``; needs a C++ compiler on the machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model is trained."""

    threads: NonNegativeInt = 0
    """Arithmetic threads of a rank on the CPU; 0 leaves torch's choice."""

    expected_world_size: PositiveInt | None = None
    """Refuse to run on another number of ranks; as ``--expected-world-size``."""

    loss: str = "bce"
    """``bce``; ``balanced_bce`` (positives weighted by the square root of their rarity);
    ``weighted_bce`` (genres weighted by their counts, as published); or a function of one's own,
    ``pkg.mod:function`` or ``./file.py:function`` (relative to the config file)."""

    feature_noise: NonNegativeFloat = 0.0
    """Standard deviation of Gaussian noise on the rows, as a multiple of the rows' own."""

    frame_dropout: Fraction = 0.0
    """Chance that a row is hidden from the model in training."""

    feature_dropout: Fraction = 0.0
    """Chance that a feature is replaced by its train mean, in all rows of a window alike."""

    mixup: NonNegativeFloat = 0.0
    """Mix each window and its labels with another movie's by a share from Beta(a, a); 0: not."""

    holdout: Fraction = 0.1
    """Share of the train movies kept aside; the best checkpoint is chosen on it, never on val."""

    threshold: Fraction | None = None
    """Probability from which a genre is predicted, one for all; null: that of the highest micro-F1
    on the holdout, or 0.5 without one."""

    monitor_split: str | None = "val"
    """Split that is scored and logged beside the holdout; nothing is chosen on it."""

    validate_epochs: NonNegativeInt = 1
    """Epochs between two validations; 0: only at the end."""

    checkpoint_steps: NonNegativeInt = 0
    """Steps between two checkpoints beside those at each validation; 0: none."""

    checkpoint_minutes: NonNegativeFloat = 0.0
    """Minutes after which a checkpoint is due beside those; 0: none."""

    keep_checkpoints: PositiveInt = 1
    """Newest checkpoints that stay: ``last``, and before it ``step-…``. ``best`` stays anyway."""


class EvalConfig(Section):
    """How a model is scored and reported."""

    split: str = "val"
    """Split that is scored."""

    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint is scored; a run without a holdout has only ``last``."""

    windows: PositiveInt | Literal["whole"] = 4
    """Evenly spaced windows a movie, averaged in logits; fewer where they would coincide. Or the
    ``whole`` movie at once, as always where ``stream.sampling`` is ``full_movie``."""

    batch_size: PositiveInt = 64
    """Windows a forward pass."""

    bootstrap: NonNegativeInt = 1000
    """Resamplings of the movies for intervals; 0: none."""

    seed: Seed = 0
    """Seed of the resampling."""


class TrackingConfig(Section):
    """Where metrics go beside ``metrics.jsonl``. A missing or failing wandb never stops a run."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """``auto``: online with an API key, offline without."""

    project: str = "movienet-stream"
    """wandb project."""

    entity: str | None = None
    """wandb team or user; default: the key's own."""

    group: str | None = None
    """wandb group; default: the run's name."""

    tags: tuple[str, ...] = ()
    """wandb tags."""

    upload: Literal["metrics", "report"] = "metrics"
    """``report``: `eval report` also uploads its page, with titles and paths, as an artifact."""

    tensorboard: bool = False
    """Write event files to ``RUN/tensorboard`` too; needs the extra ``[tensorboard]``."""

    timeout: Seconds = 60.0
    """Longest wait for wandb's start and for its end, each, in seconds."""


class Config(Section):
    """One run, from dump to report."""

    version: Literal[1]
    """Version of this schema."""

    data: DataConfig
    sharding: ShardingConfig = ShardingConfig()
    storage: StorageConfig = StorageConfig()
    encoder: EncoderConfig
    stream: StreamConfig = StreamConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig
    eval: EvalConfig = EvalConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def root(self) -> str:
        """Root of this run's data: ``data.root``, or a folder in it when ``data.limit`` is set."""
        limit = self.data.limit
        if limit is None:
            return self.data.root
        if isinstance(limit, int):
            return f"{self.data.root}/limit-{limit}"
        digest = hashlib.sha256("\n".join(sorted(limit)).encode()).hexdigest()[:8]
        return f"{self.data.root}/limit-{len(limit)}-{digest}"

    @property
    def frames_dir(self) -> str:
        """Where frame shards are published."""
        return f"{self.root}/frames"

    @property
    def frames_url(self) -> str:
        """Where the frame set is read: ``encoder.frames_url``, or where it is published."""
        return self.encoder.frames_url or self.frames_dir

    @property
    def features_dir(self) -> str:
        """Where the feature set is published."""
        return f"{self.root}/features/{self.encoder.name}"

    @property
    def features_url(self) -> str:
        """Where the feature set is read: ``stream.features_url``, or where it is published."""
        return self.stream.features_url or self.features_dir

    @property
    def run_dir(self) -> Path:
        """Folder of the training run."""
        return Path(self.data.runs or f"{self.root}/runs") / self.training.run_name

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if "://" in self.data.root and self.data.runs is None:
            raise ValueError(
                f"data.runs: got null with data.root {self.data.root}, want a folder: runs stay on "
                "a file system"
            )
        if self.data.runs is not None and "://" in self.data.runs:
            raise ValueError(
                f"data.runs: got {self.data.runs}, want a folder: runs stay on a file system"
            )
        if self.training.patience and self.training.holdout == 0:
            raise ValueError(
                f"training.patience: got {self.training.patience} with training.holdout 0, want a "
                "holdout such as 0.1: when to stop is decided on it"
            )
        if self.eval.checkpoint == "best" and self.training.holdout == 0:
            raise ValueError(
                "eval.checkpoint: got 'best' with training.holdout 0, want 'last': "
                "without a holdout there is no best checkpoint"
            )
        return self
