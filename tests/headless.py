"""Shows a page in a headless Chromium, where there is one."""

import re
import shutil
import subprocess
from collections import namedtuple

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
# The page's own size and pictures, told to the frame around it: a window is never as narrow as a phone.
PROBE = """<script>
const errors = [];
addEventListener("error", event => errors.push(event), true);
addEventListener("load", () => {
  const page = document.documentElement, images = [...document.images];
  const decoded = images.filter(image => image.complete && image.naturalWidth > 0);
  parent.postMessage([innerWidth, page.scrollWidth, images.length, decoded.length, errors.length].join(" "), "*");
});
</script>"""
FRAME = """<!doctype html><script>
addEventListener("message", event => { document.body.dataset.probe = event.data; });
</script><body><iframe src="page.html" width="WIDTH" height="800" style="border: 0"></iframe></body>"""
# Widths in CSS pixels: of the window, and of what is in it; pictures, and how many of them could be decoded.
Shown = namedtuple("Shown", "width page_width images decoded errors log")


def show(html, width, folder):
    (folder / "page.html").write_text(html.replace("<head>", f"<head>{PROBE}", 1), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    off = ("gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage")
    options = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in off)]
    options += [f"--user-data-dir={folder / 'chromium'}", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    command = [CHROMIUM, *options, "--dump-dom", (folder / "frame.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    probe = re.search(r'data-probe="([\d ]+)"', shown.stdout)
    assert probe, shown.stderr
    return Shown(*map(int, probe[1].split()), shown.stderr)
