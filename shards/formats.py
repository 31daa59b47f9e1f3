"""Which files are images: by their suffix, or by their first bytes where the suffix says nothing."""

import os
import re

_FORMATS = (
    "AVIF BLP BMP CUR DCX DDS DIB FITS FLI FTEX GBR GIF ICNS ICO IM JPEG JPEG2000 MSP PCD PCX PIXAR PNG PPM PSD QOI "
    "SGI SPIDER SUN TGA TIFF WEBP XBM XPM"
)
FORMATS = tuple(_FORMATS.split())
"""Pillow's raster formats: none for which it starts another program (EPS) or only keeps a place (HDF5, WMF)."""

_SUFFIXES = (
    ".apng .avif .avifs .blp .bmp .bw .cur .dcx .dds .dib .fit .fits .flc .fli .ftc .ftu .gbr .gif .icb .icns .ico .im "
    ".j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .mpo .msp .pbm .pcd .pcx .pfm .pgm .png .pnm .ppm .psd .pxr "
    ".qoi .ras .rgb .rgba .sgi .spider .tga .tif .tiff .vda .vst .webp .xbm .xpm"
)
SUFFIXES = frozenset(_SUFFIXES.split())
HEIF_SUFFIXES = frozenset((".heic", ".heics", ".heif", ".heifs", ".hif"))

_OTHERS = (
    ".bz2 .cfg .cls .csv .db .doc .docx .emf .eps .gz .h5 .hdf5 .html .ini .json .jsonl .log .m4v .mat .md .mov .mp3 "
    ".mp4 .npy .npz .parquet .pdf .pkl .ps .pt .pth .py .rar .safetensors .sh .svg .tar .tgz .tsv .txt .wav .wmf .xls "
    ".xlsx .xml .xz .yaml .yml .zip .zst"
)
OTHERS = frozenset(_OTHERS.split())
"""Suffixes of what is no image: such files are not opened to be asked."""

FIRST_BYTES = 32
OF_OURS = ("Software", "semmae")
"""Text in the PNGs of sheets that our verbs draw, by which they are not taken for images."""

_ASIDE = re.compile(
    r"(?:^|/)(@eaDir|#recycle|@Recycle|@Recently-Snapshot|#snapshot|__MACOSX|\$RECYCLE\.BIN|System Volume Information"
    r"|lost\+found|Thumbs\.db|ehthumbs\.db|desktop\.ini|\.thumbnails|\.@__thumb|\.ipynb_checkpoints)(?:/|$)",
    re.IGNORECASE,
)

_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|II\*\x00|MM\x00\*|II\+\x00|MM\x00\+"
    rb"|RIFF....WEBP|BM.{12}[\x0c\x28\x40\x6c\x7c]\x00{3}"
    rb"|....ftyp(?:avif|avis)|\x00{3}\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51|P[1-6][\s]+(?:#|\d)|P[fF]\n-?\d|qoif"
    rb"|8BPS\x00\x01|DDS \x7c|icns|\x00\x00\x01\x00[^\x00]\x00|SIMPLE  =|\x59\xa6\x6a\x95|/\* XPM \*/",
    re.DOTALL,
)
_HEIF = re.compile(rb"....ftyp(?:heic|heix|heim|heis|hevc|hevx|mif1|msf1)", re.DOTALL)

try:
    import pillow_heif  # pyrefly: ignore[missing-import]
except ImportError:
    HEIF = False
else:
    pillow_heif.register_heif_opener()
    FORMATS, SUFFIXES, HEIF = (*FORMATS, "HEIF"), SUFFIXES | HEIF_SUFFIXES, True


def suffix_of(name: str) -> str:
    """`.jpg`, in lower case; empty where the last part of a name has none."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - pathlib takes ten times as long, for every image


def set_aside(name: str) -> str:
    """Why a file is never an image of the source, from a name relative to it: `hidden`, or what a NAS or a desktop
    keeps beside images (`@eaDir`); empty where it may be one."""
    found = _ASIDE.search(name)
    if found:
        return found[1]
    return "hidden" if name.startswith(".") or "/." in name else ""


def kind_of(name: str) -> str:
    """What a file is counted as that is not taken: its suffix."""
    return suffix_of(name) or "without suffix"


def starts_like_an_image(first: bytes) -> bool:
    """Whether the first 32 bytes of a file are those of a format that says so there, and that can be read here."""
    return bool(_MAGIC.match(first)) or (HEIF and is_heif(first))


def is_sheet(first: bytes) -> bool:
    """Whether the first 64 bytes of a PNG are those of a sheet of ours: text right behind its header."""
    return b"tEXt" + "\0".join(OF_OURS).encode() in first


def is_heif(first: bytes) -> bool:
    """Whether a file is HEIC or HEIF, which Pillow reads with pillow-heif alone."""
    return bool(_HEIF.match(first))
