"""Copy the scripts and fonts that the built pages carry out of ``node_modules``.

``npm ci --prefix book`` has checked every package against the hashes of ``package-lock.json``
before this runs.

    python book/_ext/vendor.py FOLDER

FOLDER is the ``_assets/vendor`` of the tree that Sphinx will read.
"""

import argparse
import shutil
import sys
from pathlib import Path

MODULES = Path(__file__).resolve().parent.parent / "node_modules"

# destination inside FOLDER -> patterns inside node_modules
FILES = {
    "mathjax": ["mathjax/es5/tex-chtml-full.js", "mathjax/LICENSE"],
    "mathjax/output/chtml/fonts/woff-v2": ["mathjax/es5/output/chtml/fonts/woff-v2/*.woff"],
    "html-manager": [
        "@jupyter-widgets/html-manager/dist/embed.js",
        "@jupyter-widgets/html-manager/dist/embed.js.LICENSE.txt",
        "@jupyter-widgets/html-manager/dist/*.woff2",
    ],
    "fonts/source-serif": [
        "@fontsource-variable/source-serif-4/LICENSE",
        "@fontsource-variable/source-serif-4/files/source-serif-4-latin-wght-*.woff2",
        "@fontsource-variable/source-serif-4/files/source-serif-4-greek-wght-*.woff2",
    ],
    "fonts/source-sans": [
        "@fontsource-variable/source-sans-3/LICENSE",
        "@fontsource-variable/source-sans-3/files/source-sans-3-latin-wght-*.woff2",
        "@fontsource-variable/source-sans-3/files/source-sans-3-greek-wght-*.woff2",
    ],
}


def vendor(destination: Path, modules: Path = MODULES) -> list[Path]:
    """Replace ``destination`` by a fresh copy of the files and return the paths written.

    Parameters
    ----------
    destination : Path
        Folder to write; whatever it held is removed.
    modules : Path
        The ``node_modules`` folder to read.

    Raises
    ------
    FileNotFoundError
        If a pattern finds no file. ``destination`` is then as it was.
    """
    plan: list[tuple[Path, Path]] = []
    for folder, patterns in FILES.items():
        for pattern in patterns:
            found = sorted(modules.glob(pattern))
            if not found:
                raise FileNotFoundError(
                    f"no file matches {pattern} in {modules}: run `npm ci --prefix book` first"
                )
            plan.extend((source, destination / folder / source.name) for source in found)
    shutil.rmtree(destination, ignore_errors=True)
    for source, target in plan:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return [target for _, target in plan]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Copy MathJax, the widget manager and the fonts out of node_modules."
    )
    parser.add_argument(
        "destination", type=Path, help="the _assets/vendor folder of the tree that Sphinx will read"
    )
    try:
        written = vendor(parser.parse_args().destination)
    except FileNotFoundError as error:
        sys.exit(str(error))
    size = sum(path.stat().st_size for path in written)
    print(f"vendored {len(written)} files, {size / 1e6:.1f} MB")
