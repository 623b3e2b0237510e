"""The part of the build that pyproject.toml cannot express: the README for PyPI's page, which has no files beside it.

If the environment variable ``CLIPFAST_URL`` names the repository (https://HOST/clipfast), links and pictures lead to
the tag of this version there.
"""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parent


def for_pypi(text: str, url: str, version: str) -> str:
    """Return a page in Markdown with absolute links; without a ``url``, relative links become text and pictures go."""

    def absolute(match: re.Match[str]) -> str:
        """Return a link or a picture with its absolute address."""
        mark, label, target = match.groups()
        if re.match(r"https?:|#", target):
            return match[0]
        if not url:
            return "" if mark else label
        return f"{mark}[{label}]({url}/{'raw' if mark else 'blob'}/v{version}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, text)


if __name__ == "__main__":
    from setuptools import setup

    url = os.environ.get("CLIPFAST_URL", "").rstrip("/")
    found = re.search(r'__version__ = "(.*)"', (ROOT / "clipfast" / "__init__.py").read_text())
    version = found[1] if found else ""
    setup(
        long_description=for_pypi((ROOT / "README.md").read_text(), url, version),
        long_description_content_type="text/markdown",
        project_urls={"Source": url, "Changes": f"{url}/blob/v{version}/CHANGELOG.md"} if url else {},
    )
