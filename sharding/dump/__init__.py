"""A dump of key frames in MovieNet's layout, read in the form in which it was delivered.

    DUMP/tt0032138/            a folder of shot_0000_img_0.jpg …
    DUMP/tt0032138.tar         a tar of these images, at its top level or in a folder; also .tar.gz
    DUMP/movies.zip            a zip of such folders or tars; also a tar of such folders
    DUMP/movies.zip.001 …      a zip or tar in several parts
    DUMP/tt0032138.mp4         a video, whose key frames are extracted
    DUMP/240P/…                any of these in subfolders: 240P/all/, frames/, tt0032138/tt0032138/

DUMP (``data.dump``) is a folder, a single zip or tar, or URLs of such archives (``remote``).

A movie's source is its path relative to DUMP, or its URL. A member of an archive follows ``::``,
e.g. ``movies.zip::frames/tt0032138``.

Nothing is unpacked, and no name from a dump becomes a path that is written. An invalid image is
skipped and listed. A read error is never taken for an invalid image.

    scan       which movies a dump contains
    archives   opens one movie: the only module that maps archive suffixes to readers
    sources    the images of one movie: in a folder, a tar, or a folder of a zip
    readers    files, parts of files, members and compressed streams, read at any offset
    remote     the same for URLs
    key_frames the shots of a video and their key frames
    video      the frames of a video, as displayed
    shot_detection  where a shot of a video ends
    tone_mapping    high to standard dynamic range
    zip        the central directory of a zip
    listing    which byte ranges of an archive's listing belong to which movie
    multipart  which files are parts of one archive
    jpeg       whether an image is valid
    junk       names that systems and file managers add
"""
