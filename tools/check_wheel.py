"""Install a built wheel into a clean environment and stream from it, far from the source tree.

    python tools/check_wheel.py WHEEL STAMP [PIP OPTION ...]

Writes the wheel's sha256 into STAMP, and does nothing when it stands there already.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

CONSTRAINTS = Path("constraints.txt").resolve()

STREAM = """
import sys
from pathlib import Path

import gemma2_stream

home = Path(gemma2_stream.__file__).parent
assert Path(sys.prefix) in home.parents, f"imported from {home}"
for name in ("py.typed", "products.c"):
    assert (home / name).exists(), f"{name} is not in the wheel"
chunks = list(gemma2_stream.Gemma2LLM("demo").stream("你是谁"))
assert len(chunks) > 1, f"not streamed: {chunks!r}"
print(f"{len(chunks)} chunks: {''.join(chunks)}")
"""


def check(wheel: Path, pip_options: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print("Making a clean environment ...", flush=True)
        venv.create(Path(folder) / "env", with_pip=True)
        programs = Path(folder).resolve() / "env" / "bin"

        def run(program: str, *args: str | Path) -> None:
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            subprocess.run([programs / program, *args], cwd=folder, env=environment, check=True)

        print(f"Installing {wheel.name} into it (a minute or more) ...", flush=True)
        pip = ("python", "-m", "pip", "install", "-q", "--no-compile", *pip_options)
        run(*pip, "-c", CONSTRAINTS, wheel)
        print("Streaming from it ...", flush=True)
        run("python", "-X", "utf8", "-c", STREAM)
        run("gemma2-stream", "--version")


def main() -> None:
    wheel, stamp = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    digest = hashlib.sha256(wheel.read_bytes() + CONSTRAINTS.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        print(f"{wheel.name} is the one that was checked before.")
        return
    start = time.monotonic()
    check(wheel, sys.argv[3:])
    stamp.write_text(digest)
    print(f"{wheel.name} works on its own ({time.monotonic() - start:.0f} s).")


if __name__ == "__main__":
    main()
