"""Checks the built pages: each link within them leads somewhere; with a browser, that they render, that search works.

python tools/check_docs.py build/docs/html
python tools/check_docs.py build/docs/html --browser chromium    also writes pictures to build/docs/pictures
"""

import argparse
import functools
import http.server
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SEARCHES = {"GradScaler": "mixed-precision", "closure": "training-loops", "RandomSAM": "api"}
PICTURES = ("index", "how-it-works", "choosing", "api")


class Page(HTMLParser):
    """A page's links and the places that links can lead to."""

    def __init__(self, path):
        super().__init__()
        self.path, self.links, self.anchors = path, [], {""}
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        """Collects links, pictures and ids."""
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id":
                self.anchors.add(value)


def dead_links(folder):
    """Returns the links within the pages that lead to no file, or to no place in it."""
    pages = {path: Page(path) for path in sorted(folder.rglob("*.html"))}
    dead = []
    for page in pages.values():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("data:"):
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            anchors = pages[target].anchors if target in pages else {"", parts.fragment}
            if not target.exists() or unquote(parts.fragment) not in anchors:
                dead.append(f"{page.path.relative_to(folder)}: {link}")
    return dead


def browse(folder, browser):
    """Returns what a browser finds wrong with the pages; writes pictures of some."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    server = QuietServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        root = f"http://127.0.0.1:{server.server_address[1]}"
        return [*not_rendered(folder, root, browser), *not_found(root, browser), *pictures(folder, root, browser)]
    finally:
        server.shutdown()


class QuietServer(http.server.ThreadingHTTPServer):
    """Does not report that a browser has closed a connection before it had the whole answer."""

    def handle_error(self, request, client_address):
        """Prints what is not that."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files, and prints nothing."""

    def log_message(self, *args):
        """Prints nothing."""


def run_browser(browser, *arguments):
    """Returns what headless Chromium prints on both streams."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


def not_rendered(folder, root, browser):
    """Pages whose scripts fail, or which have no title or text in the browser."""
    wrong = []
    for path in sorted(folder.glob("*.html")):
        page, log = run_browser(browser, "--dump-dom", f"{root}/{path.name}")
        wrong += [f"{path.name}: {line}" for line in log.splitlines() if "CONSOLE" in line]
        if not re.search(r"<h1>\s*\S", page) and path.name not in ("search.html", "genindex.html", "py-modindex.html"):
            wrong.append(f"{path.name}: no heading")
    return wrong


def not_found(root, browser):
    """Searches that do not find their page."""
    wrong = []
    for word, expected in SEARCHES.items():
        page, _ = run_browser(browser, "--virtual-time-budget=8000", "--dump-dom", f"{root}/search.html?q={word}")
        if not re.search(rf'id="search-results".*href="{expected}\.html', page, re.DOTALL):
            wrong.append(f"the search for {word} does not find {expected}")
    return wrong


def pictures(folder, root, browser):
    """Writes pictures of some pages; returns those that could not be drawn."""
    target = folder.parent / "pictures"
    target.mkdir(exist_ok=True)
    for name in PICTURES:
        file = f"--screenshot={target / name}.png"
        run_browser(browser, "--window-size=1280,1600", "--hide-scrollbars", file, f"{root}/{name}.html")
    return [f"no picture of {name}" for name in PICTURES if not (target / f"{name}.png").exists()]


def main():
    """Runs the checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--browser", help="the name of Chromium's program")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    wrong = [f"dead link in {link}" for link in dead_links(folder)]
    if arguments.browser:
        wrong += browse(folder, arguments.browser)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
