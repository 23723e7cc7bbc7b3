"""Checks that the versions which the Dockerfile pins exist and fit together,
without docker and without a GPU.

    python tools/check_container.py [--torch 2.15.0a0+875d815502] [--pin VLLM=0.32.0 ...]

uv resolves them for the base's Python and platform against the package index, with the base's torch
standing in as a wheel without content: whatever wants another torch, or another package than its
neighbours, fails, and uv says why. vLLM's own requirements are taken as use_existing_torch.py
leaves them: without the lines that name torch.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# nvcr.io/nvidia/vllm:26.10-py3, built on the same month's torch as
# nvcr.io/nvidia/pytorch:26.10-py3:
# docs.nvidia.com/deeplearning/frameworks/vllm-release-notes/rel-26-10.html
TORCH = "2.15.0a0+875d815502"
TARGET = (
    "--python-version",
    "3.12",
    "--python-platform",
    "x86_64-manylinux_2_39",
    "--only-binary",
    ":all:",
)
PACKAGES = {"VLLM": "vllm", "MEGATRON_CORE": "megatron-core", "MATH_VERIFY": "math-verify"}


def main() -> int:
    """Prints what the image would hold; returns 1, with the resolver's reason,
    if there is no such image.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--torch", default=TORCH, help="version of the base's torch (pip list in it)"
    )
    parser.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="ARG=VERSION",
        help="instead of the Dockerfile's",
    )
    parser.add_argument(
        "--keep-torch-pins", action="store_true", help="vLLM as published: fails, as it must"
    )
    options = parser.parse_args()
    pins = read_pins() | dict(word.split("=", 1) for word in options.pin)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        stand_in(folder, "torch", options.torch)
        try:
            wanted = [f"{PACKAGES[name]}=={pins[name]}" for name in PACKAGES if name != "VLLM"]
            wanted += [*ours(), *of_vllm(pins["VLLM"], folder, keep_torch=options.keep_torch_pins)]
            print(resolve(wanted, folder, f"torch=={options.torch}"))
        except subprocess.CalledProcessError as error:
            print(error.stderr, file=sys.stderr)
            return 1
    return 0


def read_pins(dockerfile: Path = ROOT / "Dockerfile") -> dict[str, str]:
    """The Dockerfile's ARG lines."""
    return dict(re.findall(r"^ARG (\w+)=\"?([^\"\n]+)", dockerfile.read_text(), re.MULTILINE))


def ours() -> list[str]:
    """What setup.py asks for."""
    requirements = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.S)
    assert requirements is not None, "setup.py has an install_requires"
    return re.findall(r'"(.+)"', requirements[1])


def of_vllm(version: str, folder: Path, *, keep_torch: bool) -> list[str]:
    """The requirements of a vLLM release, from its published metadata."""
    report = folder / "vllm.json"
    # pip takes a wheel of exactly these tags, and not of any older one by itself.
    platform = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (39, 35, 31, 28, 17)]
    install = [
        "--dry-run",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version=3.12",
        f"--target={folder}",
        *platform,
    ]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        *install,
        f"--report={report}",
        f"vllm=={version}",
    ]
    subprocess.run(command, capture_output=True, text=True, check=True)
    # An extra is asked for by nobody here, and torch is the base's.
    required = json.loads(report.read_text())["install"][0]["metadata"]["requires_dist"]
    return [r for r in required if "extra ==" not in r and (keep_torch or "torch" not in r)]


def stand_in(folder: Path, name: str, version: str) -> None:
    """A wheel that has a version and nothing else."""
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        record = f"{name}-{version}.dist-info"
        wheel.writestr(
            f"{record}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{record}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{record}/RECORD", "")


def resolve(wanted: list[str], wheels: Path, constraint: str) -> str:
    """One version of every package, as uv finds them."""
    (wheels / "wanted.txt").write_text("\n".join(wanted))
    (wheels / "base.txt").write_text(constraint)
    files = [
        "--find-links",
        str(wheels),
        "--constraint",
        str(wheels / "base.txt"),
        str(wheels / "wanted.txt"),
    ]
    command = [
        "uv",
        "pip",
        "compile",
        "--system-certs",
        "--quiet",
        "--no-annotate",
        "--no-header",
        *TARGET,
        *files,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
