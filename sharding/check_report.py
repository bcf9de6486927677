"""What is wrong with a dump, from what its listings, metadata and split say.

Three verdicts: ``clean`` means nothing at all was found. ``usable`` means that single movies,
images, genres or members are affected, each of them named: repair them or leave them out.
``unusable`` means that there is nothing to go on with: no movie with a whole image, no movie with a
genre of the vocabulary, no labelled movie in train, or a dump, metadata or split that cannot be
read as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from configs.units import format_bytes
from sharding.format.encoding import canonical_json

if TYPE_CHECKING:
    from sharding.dump.sources import Image, SkippedMember

IMAGES_A_SHOT = 3
"""Key frames of a shot in MovieNet."""

SHORT_IMAGES = 9
"""A movie of fewer images is abnormally short, whatever the others are."""

SHORT_SHARE = 0.1
"""A movie of a smaller share of the median's images is abnormally short."""

EXIT_CODES = {"clean": 0, "usable": 3, "unusable": 4}
"""Exit code of each verdict."""

EMPTY = "empty"
"""Why a zero-byte image is bad."""

_NAMED = 3
_WIDTH = 100

Details = Mapping[str, str | int | None]
"""What was found, by name; the detail is a reason or a number."""


@dataclass(frozen=True)
class Contents:
    """What one source of a movie holds."""

    source: str
    """Its tar, folder or member, relative to the dump."""

    images: int = 0
    shots: int = 0
    n_bytes: int = 0
    """Of its images."""

    thin: Mapping[int, int] = field(default_factory=dict)
    """Images of each shot that has fewer than ``IMAGES_A_SHOT``."""

    bad: Mapping[str, str] = field(default_factory=dict)
    """Images that are not whole, by their name in a frame shard, and why."""

    odd: Mapping[str, str] = field(default_factory=dict)
    """Members that are no image of a shot, and why."""

    folder: bool = False
    """A folder of files, and no archive."""

    error: str = ""
    """Why the source cannot be read; empty if it can."""


@dataclass(frozen=True)
class Film:
    """One movie of the dump."""

    movie: str
    """Its id."""

    taken: Contents
    """The source that is built."""

    others: tuple[Contents, ...] = ()
    """Further sources of the same movie."""

    @property
    def n_good(self) -> int:
        """Images that are whole, as far as was looked."""
        return self.taken.images - len(self.taken.bad)


@dataclass(frozen=True)
class Facts:
    """What is said of the movies beside their images."""

    vocabulary: tuple[str, ...]

    genres: Mapping[str, Sequence[str]] | None = None
    """By movie, empty where missing or null; None: there is no metadata."""

    damaged: Mapping[str, str] = field(default_factory=dict)
    """Movies whose own metadata file cannot be read, and why."""

    split: Mapping[str, str] | None = None
    """By movie; None: the split is made of the labels."""

    whole: bool = True
    """False if ``data.limit`` leaves movies out, so that no movie can be told to be missing."""


@dataclass(frozen=True)
class Finding:
    """One kind of defect."""

    key: str
    text: str
    items: Details | None
    """None: nobody looked."""

    @property
    def count(self) -> int:
        """How many."""
        return len(self.items or ())

    def names(self) -> str:
        """Return the first few names, with their numbers."""
        shown = list((self.items or {}).items())[:_NAMED]
        words = [f"{name} ({n})" if isinstance(n, int) else name for name, n in shown]
        return ", ".join([*words, "…"] if self.count > _NAMED else words)


@dataclass(frozen=True)
class Report:
    """What a check found."""

    totals: Mapping[str, int]
    """Movies, shots, images and bytes that would be built."""

    median_images: float
    findings: tuple[Finding, ...]
    unusable: tuple[str, ...]
    """Why there is nothing to go on with, one line each."""

    decoded: bool
    """Whether every image was decoded."""

    @property
    def verdict(self) -> str:
        """``clean``, ``usable`` or ``unusable``."""
        if self.unusable:
            return "unusable"
        return "usable" if any(finding.items for finding in self.findings) else "clean"

    @property
    def exit_code(self) -> int:
        """Of the command."""
        return EXIT_CODES[self.verdict]

    def to_bytes(self) -> bytes:
        """Return ``check.json``: every name of every finding; null where nobody looked."""
        return canonical_json(
            {
                "version": 1,
                "verdict": self.verdict,
                "unusable": list(self.unusable),
                "decoded": self.decoded,
                "totals": dict(self.totals),
                "median_images": self.median_images,
                "findings": {
                    finding.key: None if finding.items is None else dict(finding.items)
                    for finding in self.findings
                },
            }
        )


def contents(
    source: str, images: Sequence[Image], odd: Iterable[SkippedMember], *, folder: bool = False
) -> Contents:
    """Return what a listing says of a source."""
    per_shot = Counter(image.shot for image in images)
    return Contents(
        source=source,
        images=len(images),
        shots=len(per_shot),
        n_bytes=sum(image.size for image in images),
        thin={shot: n for shot, n in sorted(per_shot.items()) if n < IMAGES_A_SHOT},
        bad={image.member: EMPTY for image in images if not image.size},
        odd={member.member: member.reason for member in odd},
        folder=folder,
    )


def choose_taken(movie: str, sources: Iterable[Contents]) -> Film:
    """Return a film with the source that a build takes: more images win, then an archive."""
    ordered = sorted(sources, key=lambda found: (-found.images, found.folder, found.source))
    return Film(movie, ordered[0], tuple(ordered[1:]))


def short_limit(images: Iterable[int]) -> float:
    """Return below how many images a movie is abnormally short.

    Args:
        images: Images of each movie; those without one do not count.
    """
    return max(SHORT_IMAGES, SHORT_SHARE * _median(images))


def judge(
    films: Sequence[Film],
    facts: Facts,
    *,
    unusable: Sequence[str] = (),
    decoded: bool = False,
    max_bad_fraction: float = 0.01,
) -> Report:
    """Return the report of a dump.

    Args:
        films: Its movies; their order does not matter.
        facts: Metadata and split.
        unusable: What could not be read at all, one line each.
        decoded: Whether every image was decoded.
        max_bad_fraction: Share of a movie's images that may be bad.
    """
    films = sorted(films, key=lambda film: film.movie)
    built = [film for film in films if film.taken.images]
    totals = {
        "movies": len(built),
        "shots": sum(film.taken.shots for film in built),
        "images": sum(film.taken.images for film in built),
        "bytes": sum(film.taken.n_bytes for film in built),
    }
    findings = (
        *_of_sources(films),
        *_of_split(built, facts),
        *_of_genres(built, facts),
        *_of_images(built, decoded=decoded, max_bad_fraction=max_bad_fraction),
    )
    return Report(
        totals=totals,
        median_images=_median(film.taken.images for film in built),
        findings=findings,
        unusable=(*unusable, *_nothing_left(films, facts)),
        decoded=decoded,
    )


def _of_sources(films: Sequence[Film]) -> Iterator[Finding]:
    sources = [source for film in films for source in (film.taken, *film.others)]
    unread = {source.source: source.error for source in sources if source.error}
    yield Finding("unreadable", "truncated or damaged sources", unread)
    empty = [film.movie for film in films if not film.taken.images and not film.taken.error]
    yield Finding("without_images", "movies without an image", dict.fromkeys(empty))
    twice = {
        film.movie: f"taking {_with_images(film.taken)}, not "
        + ", ".join(map(_with_images, film.others))
        for film in films
        if film.others
    }
    yield Finding("twice", "movies present twice", twice)


def _of_split(built: Sequence[Film], facts: Facts) -> Iterator[Finding]:
    missing: Details | None = None
    extra: Details | None = None
    if facts.split is not None:
        there = {film.movie for film in built}
        if facts.whole:
            missing = {m: split for m, split in sorted(facts.split.items()) if m not in there}
        extra = dict.fromkeys(sorted(there - set(facts.split)))
    yield Finding("missing", "movies of the split that are missing", missing)
    yield Finding("extra", "movies that the split does not name", extra)


def _of_genres(built: Sequence[Film], facts: Facts) -> Iterator[Finding]:
    absent: Details | None = None
    null: Details | None = None
    foreign: Details | None = None
    unknown: Details | None = None
    if facts.genres is not None:
        known = {film.movie: facts.genres.get(film.movie) for film in built}
        read = {movie: genres for movie, genres in known.items() if movie not in facts.damaged}
        absent = dict.fromkeys(movie for movie, genres in read.items() if genres is None)
        null = dict.fromkeys(movie for movie, genres in read.items() if genres == ())
        words = {movie: set(genres or ()) for movie, genres in read.items()}
        foreign = {
            movie: ", ".join(sorted(genres))
            for movie, genres in words.items()
            if genres and not genres & set(facts.vocabulary)
        }
        counts = Counter(genre for genres in words.values() for genre in genres)
        unknown = {genre: n for genre, n in sorted(counts.items()) if genre not in facts.vocabulary}
    yield Finding("damaged_metadata", "metadata files that cannot be read", dict(facts.damaged))
    yield Finding("without_metadata", "movies without metadata", absent)
    yield Finding("null_genres", "movies with missing or null genres", null)
    yield Finding("only_unknown_genres", "movies without a genre of the vocabulary", foreign)
    yield Finding("unknown_genres", "genres outside the vocabulary (movies)", unknown)


def _of_images(
    built: Sequence[Film], *, decoded: bool, max_bad_fraction: float
) -> Iterator[Finding]:
    thin = {
        f"{film.movie}/shot_{shot:04d}": n for film in built for shot, n in film.taken.thin.items()
    }
    yield Finding("thin_shots", f"shots with fewer than {IMAGES_A_SHOT} images", thin)
    bad = {f"{film.movie}/{m}": why for film in built for m, why in film.taken.bad.items()}
    zero = dict.fromkeys(name for name, why in bad.items() if why == EMPTY)
    yield Finding("empty_images", "zero-byte images", zero)
    broken = {name: why for name, why in bad.items() if why != EMPTY} if decoded else None
    yield Finding("undecodable_images", "undecodable images", broken)
    over = {
        film.movie: len(film.taken.bad)
        for film in built
        if len(film.taken.bad) > max_bad_fraction * film.taken.images
    }
    yield Finding("too_many_bad", f"movies with over {max_bad_fraction:.1%} bad images", over)
    odd = {f"{film.movie}/{m}": why for film in built for m, why in film.taken.odd.items()}
    yield Finding("odd_members", "members that are no image of a shot", odd)
    limit = short_limit(film.taken.images for film in built)
    short = {film.movie: film.taken.images for film in built if film.taken.images < limit}
    yield Finding("short_movies", f"movies with fewer than {limit:g} images", short)


def _nothing_left(films: Sequence[Film], facts: Facts) -> Iterator[str]:
    good = {film.movie for film in films if film.n_good > 0}
    if not good:
        yield "no movie has a whole image"
    if facts.genres is None:
        return
    vocabulary = set(facts.vocabulary)
    labelled = {m for m in good if vocabulary.intersection(facts.genres.get(m) or ())}
    if good and not labelled:
        yield "no movie with images has a genre of data.genres"
    trained = {m for m in labelled if facts.split is None or facts.split.get(m) == "train"}
    if labelled and not trained:
        yield "no movie with images and genres is in train"


def _with_images(source: Contents) -> str:
    return f"{source.source} ({'unreadable' if source.error else source.images})"


def _median(images: Iterable[int]) -> float:
    counts = [n for n in images if n]
    return float(median(counts)) if counts else 0.0


# --- table ----------------------------------------------------------------------------------------


def render_table(report: Report) -> str:
    """Return a report as text for a terminal: every kind of defect, by count and first names."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("found", no_wrap=True)
    table.add_column("count", justify="right")
    table.add_column("first of them", overflow="fold")
    for finding in report.findings:
        count = "–" if finding.items is None else f"{finding.count:,}"
        table.add_row(finding.text, count, finding.names())
    text = StringIO()
    plain = Console(file=text, width=_WIDTH, color_system=None, highlight=False, markup=False)
    plain.print(table)
    rows = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join([_headline(report), "", *rows, "", *_verdict(report)])


def _headline(report: Report) -> str:
    totals = report.totals
    return (
        f"movies {totals['movies']:,}   shots {totals['shots']:,}   images {totals['images']:,}   "
        f"bytes {format_bytes(totals['bytes'])}   median {report.median_images:g} images a movie"
    )


def _verdict(report: Report) -> Iterator[str]:
    yield from (f"unusable: {reason}" for reason in report.unusable)
    if report.verdict == "usable":
        yield "usable, with findings: repair what is named, or leave it out"
    if report.verdict == "clean":
        yield "clean"
    if not report.decoded:
        yield "images were listed, not decoded; --decode reads every one"
