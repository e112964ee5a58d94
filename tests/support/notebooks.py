"""Runs the notebooks as a reader would, in an empty folder with Pixloom installed.

python -m tests.support.notebooks       # runs all and keeps their outputs in the repository
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat

from tests.stores.s3 import ACCESS_KEY, SECRET_KEY
from tests.stores.seaweed import SeaweedS3

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BUCKET = "street"


def execute(notebook: Path, folder: Path, store: SeaweedS3, bucket: str) -> Any:
    """Run a notebook in a folder. Returns it with its outputs; an error in a cell raises."""
    copy = folder / notebook.name
    empty = nbformat.read(notebook, as_version=4)
    for cell in empty.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell |= {"outputs": [], "execution_count": None}
    nbformat.write(empty, copy)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "jupyter"),
        "RAY_TMPDIR": str(folder),
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_ENDPOINT_URL": store.url,
        "BUCKET": bucket,
    }
    command = "import sys; from nbclient.cli import main; sys.exit(main())"
    subprocess.run(
        [sys.executable, "-c", command, "--inplace", str(copy)], env=environment, cwd=folder, check=True
    )
    return nbformat.read(copy, as_version=4)


def without_places(text: str, folder: Path) -> str:
    """Text without this machine's folders, and without the codes that colour it."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text.replace(str(folder), "/home/you"))
    return text.replace(str(ROOT), "/opt/pixloom").replace(str(Path(sys.executable).parent), "/opt/venv/bin")


def main() -> None:
    """Run notebooks and keep their outputs."""
    for notebook in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        with (
            tempfile.TemporaryDirectory(prefix="nb", dir="/tmp", ignore_cleanup_errors=True) as place,
            tempfile.TemporaryDirectory(prefix="weed", ignore_cleanup_errors=True) as disk,
            SeaweedS3(Path(disk)) as store,
        ):
            store.client().call_s3("create_bucket", Bucket=BUCKET)
            done = execute(notebook.absolute(), Path(place), store, BUCKET)
            for cell in done.cells:
                cell.metadata.pop("execution", None)
                for output in cell.get("outputs", []):
                    if "text" in output:
                        output.text = without_places(output.text, Path(place))
            nbformat.write(done, notebook)


if __name__ == "__main__":
    main()
