"""Report of the defects of a dump, from its listings, metadata and split.

There are three verdicts. ``clean``: no defect. ``usable``: individual movies, images, genres or
members are affected, and each of them is named; repair or exclude them. ``unusable``: training is
impossible, because no movie has an intact image or a genre of the vocabulary, no labelled movie is
in train, or the dump, the metadata or the split cannot be read at all.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from configs.units import format_bytes
from sharding.dump.video import is_video
from sharding.format.encoding import canonical_json
from sharding.format.names import frame_name

if TYPE_CHECKING:
    from sharding.dump.sources import Image, SkippedMember

IMAGES_PER_SHOT = 3
"""Key frames per shot in MovieNet."""

SHORT_IMAGES = 9
"""A movie with fewer images is abnormally short, regardless of the others."""

SHORT_SHARE = 0.1
"""A movie with fewer images than this fraction of the median is abnormally short."""

EXIT_CODES = {"clean": 0, "usable": 3, "unusable": 4}
"""Exit code of each verdict."""

EMPTY = "empty"
"""Reason of a zero-byte image."""

_MAX_NAMES = 3
_WIDTH = 80

_OUTCOMES = (
    ("archive", "will not be read; unpack {them}", ("unsupported",)),
    ("movie", "will be left out, without images", ("without_images", "missing")),
    (
        "movie",
        "will lack JPEGs that are ignored because of their names; rename the files",
        ("misnamed_images",),
    ),
    ("image", "will be left out", ("unreadable_images", "empty_images", "undecodable_images")),
    (
        "movie",
        "will be in no split, so neither trained on nor scored",
        ("extra", "without_metadata", "null_genres", "only_unknown_genres"),
    ),
    (
        "genre",
        "will be ignored; to train on {them}, add {them} to data.genres",
        ("unknown_genres",),
    ),
)
"""What happens to the names of findings without action: noun, outcome, kinds of findings.

Movies at which a stage stops come first.
"""

_USED = ("twice", "joined_tars", "thin_shots", "odd_members", "short_movies")
"""Kinds of findings that leave out no movie and no image."""

Details = Mapping[str, str | int | None]
"""Reason or number per affected name."""


@dataclass(frozen=True)
class Contents:
    """Contents of one source of a movie."""

    source: str
    """Tar, folder or archive member, relative to the dump."""

    images: int = 0
    shots: int = 0
    n_bytes: int = 0
    """Total size of the images."""

    thin: Mapping[int, int] = field(default_factory=dict)
    """Number of images of each shot with fewer than ``IMAGES_PER_SHOT``."""

    bad: Mapping[str, str] = field(default_factory=dict)
    """Reason for each corrupt image, by its name in a frame shard."""

    lost: Mapping[str, str] = field(default_factory=dict)
    """Reason for each member that is named like an image, but cannot be read."""

    misnamed: tuple[str, ...] = ()
    """JPEGs that are ignored because of their names."""

    skipped: Mapping[str, str] = field(default_factory=dict)
    """Reason for each other member that is not an image of a shot."""

    joined: int = 0
    """Number of tars that follow the first one in the same file."""

    folder: bool = False
    """Whether the source is a folder of files, not an archive."""

    error: str = ""
    """Reason why the source cannot be read; empty if it can."""


@dataclass(frozen=True)
class CheckedMovie:
    """One movie of the dump with the contents of its sources."""

    movie: str
    """Id of the movie."""

    chosen: Contents
    """The source that a build uses."""

    others: tuple[Contents, ...] = ()
    """Unused sources of the same movie."""

    @property
    def n_good(self) -> int:
        """Number of images without a known defect."""
        return self.chosen.images - len(self.chosen.bad)

    @property
    def n_bad(self) -> int:
        """Number of images with a known defect, or that cannot be read."""
        return len(self.chosen.bad) + len(self.chosen.lost)


@dataclass(frozen=True)
class Facts:
    """Metadata and split of the movies."""

    vocabulary: tuple[str, ...]

    genres: Mapping[str, Sequence[str]] | None = None
    """Genres per movie, empty if missing or null; None if there is no metadata."""

    damaged: Mapping[str, str] = field(default_factory=dict)
    """Reason for each movie whose own metadata file cannot be read."""

    split: Mapping[str, str] | None = None
    """Split per movie; None if the split is computed from the labels."""

    is_complete: bool = True
    """False if ``data.limit`` selects movies: then absent movies do not count as missing."""


@dataclass(frozen=True)
class Finding:
    """One kind of defect and the names it affects."""

    key: str
    text: str
    items: Details | None
    """Affected names; None if this kind was not checked."""

    @property
    def count(self) -> int:
        """Number of affected names."""
        return len(self.items or ())

    def names(self) -> str:
        """Return the first few names with their numbers."""
        first = list((self.items or {}).items())[:_MAX_NAMES]
        names = [f"{name} ({n})" if isinstance(n, int) else name for name, n in first]
        return ", ".join([*names, "…"] if self.count > _MAX_NAMES else names)


@dataclass(frozen=True)
class Report:
    """Result of a check."""

    totals: Mapping[str, int]
    """Movies, shots, images and bytes that a build would use."""

    median_images: float
    findings: tuple[Finding, ...]
    unusable: tuple[str, ...]
    """Reasons why no training is possible, one line each."""

    decoded: bool
    """Whether every image was decoded."""

    stops: tuple[str, ...] = ()
    """Ids of the movies at which a stage stops until they are repaired or excluded."""

    @property
    def verdict(self) -> str:
        """``clean``, ``usable`` or ``unusable``."""
        if self.unusable:
            return "unusable"
        return "usable" if any(finding.items for finding in self.findings) else "clean"

    @property
    def exit_code(self) -> int:
        """Exit code of the command."""
        return EXIT_CODES[self.verdict]

    def to_bytes(self) -> bytes:
        """Return ``check.json``: every name of every finding; null for unchecked kinds."""
        return canonical_json(
            {
                "version": 1,
                "verdict": self.verdict,
                "unusable": list(self.unusable),
                "decoded": self.decoded,
                "stops": list(self.stops),
                "totals": dict(self.totals),
                "median_images": self.median_images,
                "findings": {
                    finding.key: None if finding.items is None else dict(finding.items)
                    for finding in self.findings
                },
            }
        )


def contents(
    source: str, images: Sequence[Image], skipped: Iterable[SkippedMember], *, folder: bool = False
) -> Contents:
    """Return the contents of a source according to its listing."""
    per_shot = Counter(image.shot for image in images)
    members = sorted(skipped)
    return Contents(
        source=source,
        images=len(images),
        shots=len(per_shot),
        n_bytes=sum(image.size for image in images),
        thin={shot: n for shot, n in sorted(per_shot.items()) if n < IMAGES_PER_SHOT},
        bad={image.member: EMPTY for image in images if not image.size},
        lost={member.member: member.reason for member in members if member.is_lost},
        misnamed=tuple(member.member for member in members if member.is_misnamed),
        skipped={
            member.member: member.reason
            for member in members
            if not (member.is_lost or member.is_misnamed)
        },
        folder=folder,
    )


def choose_source(movie: str, sources: Iterable[Contents]) -> CheckedMovie:
    """Return a movie with the source that a build uses: no video, most images, then archives."""
    ordered = sorted(
        sources,
        key=lambda listed: (
            is_video(listed.source),
            -listed.images,
            listed.folder,
            listed.source,
        ),
    )
    return CheckedMovie(movie, ordered[0], tuple(ordered[1:]))


def short_limit(images: Iterable[int]) -> float:
    """Return the number of images below which a movie is abnormally short.

    Args:
        images: Number of images per movie; zeros are ignored.
    """
    return max(SHORT_IMAGES, SHORT_SHARE * _median(images))


def judge(
    movies: Sequence[CheckedMovie],
    facts: Facts,
    *,
    unusable: Sequence[str] = (),
    unsupported: Sequence[str] = (),
    decoded: bool = False,
    max_bad_fraction: float = 0.01,
) -> Report:
    """Return the report of a dump.

    Args:
        movies: Movies of the dump, in any order.
        facts: Metadata and split.
        unusable: Errors of inputs that could not be read at all, one line each.
        unsupported: Archives of formats that are not read.
        decoded: Whether every image was decoded.
        max_bad_fraction: Fraction of a movie's images that may be bad.
    """
    movies = sorted(movies, key=lambda movie: movie.movie)
    built = [movie for movie in movies if movie.chosen.images]
    totals = {
        "movies": len(built),
        "shots": sum(movie.chosen.shots for movie in built),
        "images": sum(movie.chosen.images for movie in built),
        "bytes": sum(movie.chosen.n_bytes for movie in built),
    }
    findings = (
        Finding("unsupported", "archives of unknown format", dict.fromkeys(unsupported)),
        *_of_sources(movies),
        *_of_split(built, facts),
        *_of_genres(built, facts),
        *_of_images(movies, decoded=decoded, max_bad_fraction=max_bad_fraction),
    )
    return Report(
        totals=totals,
        median_images=_median(movie.chosen.images for movie in built),
        findings=findings,
        # Without any movie, the error that hides them is the only reason.
        unusable=(*unusable, *(_nothing_usable(movies, facts) if movies or not unusable else ())),
        decoded=decoded,
        stops=tuple(
            movie.movie
            for movie in movies
            if _stops(movie, max_bad_fraction) or movie.movie in facts.damaged
        ),
    )


def _stops(movie: CheckedMovie, max_bad_fraction: float) -> bool:
    """Return whether planning or building stops at a movie."""
    unreadable = any(source.error for source in (movie.chosen, *movie.others))
    return unreadable or _too_many_bad(movie, max_bad_fraction)


def _too_many_bad(movie: CheckedMovie, max_bad_fraction: float) -> bool:
    return movie.n_bad > max_bad_fraction * (movie.chosen.images + len(movie.chosen.lost))


def _of_sources(movies: Sequence[CheckedMovie]) -> Iterator[Finding]:
    sources = [source for movie in movies for source in (movie.chosen, *movie.others)]
    unreadable = {source.source: source.error for source in sources if source.error}
    yield Finding("unreadable", "unreadable sources", unreadable)
    empty = [movie.movie for movie in movies if not movie.chosen.images and not movie.chosen.error]
    yield Finding("without_images", "movies without an image", dict.fromkeys(empty))
    misnamed = {movie.movie: why for movie in movies if (why := _misnamed(movie.chosen))}
    yield Finding("misnamed_images", "movies with misnamed JPEGs", misnamed)
    twice = {
        movie.movie: f"using {_with_images(movie.chosen)}, not "
        + ", ".join(map(_with_images, movie.others))
        for movie in movies
        if movie.others
    }
    yield Finding("twice", "movies with several sources", twice)
    joined = {source.source: source.joined + 1 for source in sources if source.joined}
    yield Finding("joined_tars", "tars joined by cat (tars)", joined)


def _of_split(built: Sequence[CheckedMovie], facts: Facts) -> Iterator[Finding]:
    missing: Details | None = None
    extra: Details | None = None
    if facts.split is not None:
        ids = {movie.movie for movie in built}
        # With ``data.limit`` most movies of the split are absent on purpose.
        if facts.is_complete:
            missing = {m: split for m, split in sorted(facts.split.items()) if m not in ids}
        extra = dict.fromkeys(sorted(ids - set(facts.split)))
    yield Finding("missing", "split movies without images", missing)
    yield Finding("extra", "movies in no split", extra)


def _of_genres(built: Sequence[CheckedMovie], facts: Facts) -> Iterator[Finding]:
    absent: Details | None = None
    null: Details | None = None
    outside: Details | None = None
    unknown: Details | None = None
    if facts.genres is not None:
        read = {
            movie.movie: facts.genres.get(movie.movie)
            for movie in built
            if movie.movie not in facts.damaged
        }
        absent = dict.fromkeys(movie for movie, genres in read.items() if genres is None)
        null = dict.fromkeys(movie for movie, genres in read.items() if genres == ())
        named = {movie: set(genres or ()) for movie, genres in read.items()}
        outside = {
            movie: ", ".join(sorted(genres))
            for movie, genres in named.items()
            if genres and not genres & set(facts.vocabulary)
        }
        counts = Counter(genre for genres in named.values() for genre in genres)
        unknown = {genre: n for genre, n in sorted(counts.items()) if genre not in facts.vocabulary}
    yield Finding("damaged_metadata", "unreadable metadata files", dict(facts.damaged))
    yield Finding("without_metadata", "movies without metadata", absent)
    yield Finding("null_genres", "movies with null genres", null)
    yield Finding("only_unknown_genres", "movies without a known genre", outside)
    yield Finding("unknown_genres", "unknown genres (movies)", unknown)


def _of_images(
    movies: Sequence[CheckedMovie], *, decoded: bool, max_bad_fraction: float
) -> Iterator[Finding]:
    built = [movie for movie in movies if movie.chosen.images]
    lost = {f"{one.movie}/{m}": why for one in movies for m, why in one.chosen.lost.items()}
    yield Finding("unreadable_images", "images that cannot be read", lost)
    thin = {
        f"{movie.movie}/shot_{shot:04d}": n
        for movie in built
        for shot, n in movie.chosen.thin.items()
    }
    yield Finding("thin_shots", f"shots with fewer than {IMAGES_PER_SHOT} images", thin)
    bad = {f"{one.movie}/{m}": reason for one in built for m, reason in one.chosen.bad.items()}
    zero = dict.fromkeys(name for name, reason in bad.items() if reason == EMPTY)
    yield Finding("empty_images", "zero-byte images", zero)
    # Other defects are found only by reading the images.
    broken = {name: reason for name, reason in bad.items() if reason != EMPTY} if decoded else None
    yield Finding("undecodable_images", "undecodable images", broken)
    over = {movie.movie: movie.n_bad for movie in movies if _too_many_bad(movie, max_bad_fraction)}
    yield Finding("too_many_bad", f"movies over {max_bad_fraction:.1%} bad images", over)
    skipped = {f"{one.movie}/{m}": why for one in built for m, why in one.chosen.skipped.items()}
    yield Finding("odd_members", "members that are not images", skipped)
    limit = short_limit(movie.chosen.images for movie in built)
    short = {movie.movie: movie.chosen.images for movie in built if movie.chosen.images < limit}
    yield Finding("short_movies", f"movies with fewer than {limit:g} images", short)


def _nothing_usable(movies: Sequence[CheckedMovie], facts: Facts) -> Iterator[str]:
    good = {movie.movie for movie in movies if movie.n_good > 0}
    if not good:
        yield "no movie has an intact image" + _main_reason(movies)
    if facts.genres is None:
        return
    vocabulary = set(facts.vocabulary)
    labelled = {m for m in good if vocabulary.intersection(facts.genres.get(m) or ())}
    if good and not labelled:
        yield "no movie with images has a genre of data.genres"
    trained = {m for m in labelled if facts.split is None or facts.split.get(m) == "train"}
    if labelled and not trained:
        yield "no movie with images and genres is in train"


def _main_reason(movies: Sequence[CheckedMovie]) -> str:
    """Return the most frequent reason why a source or an image cannot be used; may be empty."""
    sources = [movie.chosen for movie in movies]
    reasons = Counter(
        reason
        for source in sources
        for reason in (
            source.error,
            _misnamed(source),
            *source.bad.values(),
            *source.lost.values(),
        )
        if reason
    )
    return "".join(f" ({reason})" for reason, _ in reasons.most_common(1))


def _misnamed(source: Contents) -> str:
    """Return how many JPEGs are ignored because of their names; empty if none is."""
    if not source.misnamed:
        return ""
    first = source.misnamed[0].rpartition("/")[2]
    return f"{len(source.misnamed):,} named like {first}, want {frame_name(0, 0)}"


def _with_images(source: Contents) -> str:
    return f"{source.source} ({'unreadable' if source.error else source.images})"


def _median(images: Iterable[int]) -> float:
    counts = [n for n in images if n]
    return float(median(counts)) if counts else 0.0


# --- table ----------------------------------------------------------------------------------------


def render_table(report: Report) -> str:
    """Return a report as text of 80 columns: count and first names of each kind of defect."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("finding", no_wrap=True)
    table.add_column("count", justify="right")
    table.add_column("first names", overflow="fold")
    for finding in report.findings:
        count = "–" if finding.items is None else f"{finding.count:,}"
        table.add_row(finding.text, count, finding.names())
    text = StringIO()
    # A fixed width and no colours: the table is the same on every terminal and in a file.
    console = Console(file=text, width=_WIDTH, color_system=None, highlight=False, markup=False)
    console.print(table)
    rows = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join([_headline(report), "", *rows, "", *_verdict(report)])


def _headline(report: Report) -> str:
    totals = report.totals
    return (
        f"movies {totals['movies']:,}   shots {totals['shots']:,}   images {totals['images']:,}   "
        f"bytes {format_bytes(totals['bytes'])}\nmedian {report.median_images:,g} images per movie"
    )


def _verdict(report: Report) -> Iterator[str]:
    yield from (f"unusable: {reason}" for reason in report.unusable)
    if report.verdict == "usable":
        yield "usable with findings; without action:"
        for line in _outcomes(report):
            yield from textwrap.wrap(
                line, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False
            )
    if report.verdict == "clean":
        yield "clean"
    if any(finding.items is None for finding in report.findings):
        yield "–: not checked"
    if not report.decoded:
        yield "images were listed, not decoded; pass `--decode` to read and decode them"


def _outcomes(report: Report) -> Iterator[str]:
    """Yield what happens to affected movies, images and genres without action, one line each."""
    if report.stops:
        names = dict.fromkeys(report.stops)
        yield _outcome(
            "movie",
            "will stop the build or the seal of the features; repair or exclude {them}",
            names,
        )
    findings = {finding.key: finding.items or {} for finding in report.findings}
    for noun, outcome, keys in _OUTCOMES:
        names = {name: why for key in keys for name, why in findings[key].items()}
        if names:
            yield _outcome(noun, outcome, names)
    used = [f.text for f in report.findings if f.items and f.key in _USED]
    if used:
        yield f"used as they are, or ignored: {', '.join(used)}"


def _outcome(noun: str, outcome: str, names: Details) -> str:
    subject = f"this {noun}" if len(names) == 1 else f"these {len(names):,} {noun}s"
    outcome = outcome.format(them="it" if len(names) == 1 else "them")
    reasons = [f"{name} ({why})" if isinstance(why, str) else name for name, why in names.items()]
    listed = ", ".join(reasons[:_MAX_NAMES]) + (", …" if len(reasons) > _MAX_NAMES else "")
    return f"{subject} {outcome}: {listed}"
