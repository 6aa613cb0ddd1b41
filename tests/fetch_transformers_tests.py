"""Takes the tests out of the source archive of the transformers that is installed, for test_transformers_common.py."""

import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


def main():
    version = importlib.metadata.version("transformers")
    target = Path(sys.prefix, f"transformers-tests-{version}")
    if (target / "__init__.py").exists():
        return
    options = ["--no-deps", "--no-binary", "transformers", "--no-build-isolation", "--quiet"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", f"transformers=={version}", *options, "--dest", folder]
        subprocess.run(command, check=True)
        with tarfile.open(next(Path(folder).glob("transformers-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        target.mkdir(exist_ok=True)
        for path in Path(folder, f"transformers-{version}", "tests").glob("*.py"):
            path.rename(target / path.name)
    (target / "__init__.py").touch()  # last: now all of it is there


if __name__ == "__main__":
    main()
