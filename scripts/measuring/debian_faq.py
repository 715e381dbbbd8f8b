"""The text of Debian's FAQ out of its packages, which texts to measure quality on are made of."""
import gzip
import re
import subprocess
import tempfile
from pathlib import Path


def read(package, file):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True, stderr=subprocess.DEVNULL)
        subprocess.run(["dpkg-deb", "-x", next(Path(folder).glob("*.deb")), "x"], cwd=folder, check=True)
        text = gzip.decompress((Path(folder) / "x/usr/share/doc/debian/FAQ" / file).read_bytes()).decode("utf-8")
    return text[re.search(r"(?m)^\d+\.\d+\.\s", text).start():]  # behind the table of contents, whose lines are indented
