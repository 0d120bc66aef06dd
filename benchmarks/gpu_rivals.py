"""The stage `rivals` of `make gpu`, with other packages from wheels in a folder.

    make gpu-rivals WHEELS=DIR
    python3 -m benchmarks.gpu_rivals --wheels DIR [options of benchmarks.gpu]

For a machine without network: each wheel is installed by pip, without an index and without dependencies, into
a temporary folder that only this run sees. A wheel that does not fit this Python or platform is named and
left out; without any that fits nothing runs. All other options are those of `benchmarks.gpu`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import gpu


def install(wheels: list[Path], target: Path) -> list[Path]:
    """Installs the wheels into a folder; returns those that pip took, and prints why it left others out."""
    taken = []
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--target", str(target)]
    for wheel in wheels:
        done = subprocess.run([*command, str(wheel)], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            taken.append(wheel)
        else:
            reason = (done.stderr.strip() or done.stdout.strip()).splitlines()
            print(f"left out: {wheel.name}: {reason[-1] if reason else 'pip says nothing'}", flush=True)
    return taken


def main(arguments: list[str] | None = None) -> int:
    """As `benchmarks.gpu.main`; 2 if no wheel can be installed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, required=True, help="folder with *.whl files")
    options, others = parser.parse_known_args(arguments)
    wheels = sorted(options.wheels.glob("*.whl"))
    if not wheels:
        print(f"--wheels must be a folder with *.whl files, and {options.wheels} has none")
        return 2
    with tempfile.TemporaryDirectory(prefix="vrpo-rivals-") as folder:
        taken = install(wheels, Path(folder))
        if not taken:
            print(f"none of the {len(wheels)} wheels in {options.wheels} can be installed")
            return 2
        print("installed for this run:", ", ".join(wheel.name for wheel in taken), flush=True)
        return gpu.main(["--stages", "rivals", *others, "--rivals", folder])


if __name__ == "__main__":
    sys.exit(main())
