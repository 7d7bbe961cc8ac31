"""Every check and benchmark for a GPU, in some minutes on one card: python -m tests.gpu OUT.json

Options after OUT.json are key=value pairs for the benchmarks, such as data.root=data.
"""

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

BATCHES = (32, 128, 1024)


def _tests(folder: Path) -> dict[str, Any]:
    """Outcome of each test of tests/gpu, with what it recorded."""
    report = folder / "junit.xml"
    command = ["-m", "pytest", "-q", "tests/gpu", f"--junitxml={report}"]
    code = subprocess.run([sys.executable, *command]).returncode
    found: dict[str, Any] = {"exit_code": code}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        facts = {p.get("name"): p.get("value") for p in case.iter("property")}
        found[str(case.get("name"))] = {"outcome": bad[0] if bad else "passed", **facts}
    return found


def _bench(folder: Path, name: str, *arguments: str) -> Any:
    """The JSON of one benchmark, or why there is none."""
    target = folder / "bench.json"
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "dist_resnet.bench", name, "--json", str(target), *arguments]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failure": done.stderr.strip().splitlines()[-1:]}
    return json.loads(target.read_text())


def main() -> int:
    if len(sys.argv) < 2:
        print("usage: python -m tests.gpu OUT.json [key=value ...]", file=sys.stderr)
        return 2
    target, pairs = Path(sys.argv[1]), sys.argv[2:]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, Any] = {"tests": _tests(folder)}
        for size in BATCHES:
            batch = f"data.batch_size_per_replica={size}"
            found[f"step, batch {size}"] = _bench(folder, "step", batch, *pairs)
            target.write_text(json.dumps(found, indent=1))  # what there is, should time run out
        for mode in ("eager", "graph"):
            keys = (f"train.step_mode={mode}", "data.loader=resident", *pairs)
            found[f"train, {mode}"] = _bench(folder, "train", *keys)
        found["loader"] = _bench(folder, "loader", *pairs)
        target.write_text(json.dumps(found, indent=1))
    return int(found["tests"]["exit_code"])


if __name__ == "__main__":
    sys.exit(main())
