"""Builds the training text and the shipped filler excerpt. Run once by whoever trains; nothing else imports it but train.py.

Sources, all public domain and packaged by Debian: the King James Bible (`bible-kjv-text`, printed by the program of
`bible-kjv`), The Devil's Dictionary (`dict-devil`), the Jargon File 4.4.7 (`dict-jargon`). The excerpt that ships as
filler.txt is cut out of the training text, so that evaluation never sees text that was trained on.

    python -m tidepool.deploy.demo.corpus --debs DIR --out .corpus
"""

import argparse
import gzip
import subprocess
import tempfile
from pathlib import Path

from .data import FILLER_PATH

# File of the corpus -> half-open byte range that is the shipped excerpt and is not trained on.
EXCERPTS = {
    "bible.txt": (2_000_000, 2_072_000),
    "devil.txt": (200_000, 224_000),
    "jargon.txt": (700_000, 732_000),
}
ASCII_FORMS = {
    "\u2013": "-",
    "\u2014": "--",
    "\u2018": "'",
    "\u2019": "'",
    "\u201c": '"',
    "\u201d": '"',
}


def read_training_text(folder: Path) -> bytes:
    """The corpus without the excerpts, as one string of bytes."""
    parts = []
    for name, (start, end) in EXCERPTS.items():
        text = (folder / name).read_bytes()
        parts += [text[:start], text[end:]]
    return b"".join(parts)


def write_filler(folder: Path) -> None:
    """Writes the excerpts as filler.txt in ASCII."""
    parts = []
    for name, (start, end) in EXCERPTS.items():
        text = (folder / name).read_bytes()[start:end].decode("utf-8", "ignore")
        parts.append(text.translate(str.maketrans(ASCII_FORMS)).encode("ascii", "ignore"))
    FILLER_PATH.write_bytes(b"\n\n".join(part.strip() for part in parts) + b"\n")


def unpack(debs: Path, folder: Path) -> None:
    """Writes the three texts of the Debian packages in `debs` to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        for deb in sorted(debs.glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(deb), root], check=True)
        for name in ("devil", "jargon"):
            packed = Path(root, "usr/share/dictd", f"{name}.dict.dz").read_bytes()
            (folder / f"{name}.txt").write_bytes(gzip.decompress(packed))
        (folder / "bible.txt").write_bytes(_print_bible(Path(root)))


def _print_bible(root: Path) -> bytes:
    command = [root / "usr/bin/bible", "-p", f"{root}/usr/lib/", "-l72", "ge1:1-re22:21"]
    return subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--debs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    unpack(args.debs, args.out)
    write_filler(args.out)


if __name__ == "__main__":
    main()
