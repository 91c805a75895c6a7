"""Lays out manual pages in several languages as a text for experiments: a folder for each page, a file for each language.

    apt-get download manpages-de manpages-es manpages-fr manpages-it manpages-nl manpages-pl manpages-ro
    python tools/experiments/manuals.py *.deb --out manuals
    senmon compare --data manuals --domains extension ...

The domain of a document is its language (the extension), and a page is held out in all languages at once (the folder), so that no held-out page was
seen in another language. Pages stay as they are, with their markup; short ones (mostly links to others) are left out.
"""

import argparse
import gzip
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

SHORTEST = 1500


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path, metavar="PACKAGE.deb")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    args = parser.parse_args()
    size = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for package in args.packages:
            subprocess.run(["dpkg", "-x", package, folder], check=True)
        for page in sorted(Path(folder, "usr/share/man").glob("*/man*/*.gz")):
            if page.is_symlink():
                continue
            text, language = gzip.decompress(page.read_bytes()), page.parts[-3]
            try:
                text.decode()
            except UnicodeDecodeError:
                continue
            if len(text) < SHORTEST:
                continue
            to = args.out / page.stem.replace(".", "_")
            to.mkdir(parents=True, exist_ok=True)
            (to / f"page.{language}").write_bytes(text)
            size[language] += len(text)
    print(", ".join(f"{language} {bytes / 1e6:.1f} MB" for language, bytes in size.most_common()))


if __name__ == "__main__":
    main()
