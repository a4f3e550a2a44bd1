"""Checks every component at its published size against PyTorch and writes the parity record.

    python bench/peers/parity.py --programs target/release --work /tmp/parity

For each component `full_size.py` makes random weights, inputs, the f32 reference and PyTorch's own bf16 run; `bench-parity`
then loads the same files. A row passes when our error is at most 1.25 times PyTorch's bf16 error. Transformers and the text
encoder are run again with the weights of their blocks in eight bits; a transformer's row then passes when its int8 error is at most
three times PyTorch's bf16 error. A component's files are removed before the next one's are made. The record is bench/results/GPU/parity.json, where bench-report finds it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

#: What bench-parity is asked for, per component of full_size.py.
COMPONENTS = {
    "head-1k": "head",
    "head-4k": "head",
    "vae": "vae",
    "text": "text",
    "latent-1k": "dit",
    "pixel-1k": "dit",
    "pixel-4k": "dit",
    "pixel-4k-outliers": "dit",
    "klein-latent-1k": "dit",
    "klein-pixel-1k": "dit",
    "klein-pixel-4k": "dit",
    "klein-vae": "vae",
}
LARGEST_RATIO = 1.25

#: The same with the weights of blocks in eight bits, and what int8 may be of PyTorch's bf16 error.
WEIGHTS = ["int8", "fp8"]
WITH_WEIGHTS = ["dit", "text"]
LARGEST_RATIO_OF_INT8 = 3.0

#: Where full_size.py is: in the source tree, or in a bundle.
FIXTURES = [Path(__file__).parent / "../../tests/fixtures", Path(__file__).parent / "../fixtures"]


def model_path(folder: Path) -> Path:
    """The weights in the folder of a component: one file, or the folder that the library wrote."""
    single = folder / "model.safetensors"
    if single.exists():
        return single
    return next(path for name in ("transformer", "text_encoder", "vae") if (path := folder / name).is_dir())


def reference(arguments: argparse.Namespace, component: str) -> dict:
    """Makes weights and reference; returns the report on PyTorch's runs."""
    script = arguments.fixtures / "full_size.py"
    command = [sys.executable, str(script), "--component", component, "--out", str(arguments.work)]
    command += ["--repeats", str(arguments.repeats)]
    command += ["--tiny", "--device", "cpu"] if arguments.tiny else []
    subprocess.run(command, check=True)
    return json.loads((arguments.work / component / "report.json").read_text())


def ours(arguments: argparse.Namespace, component: str, weights: str = "bf16") -> dict:
    """Runs bench-parity on the same files; its tolerance is left to the ratio."""
    folder = arguments.work / component
    command = [str(arguments.programs / "bench-parity"), COMPONENTS[component], "--model", str(model_path(folder))]
    command += ["--io", str(folder / "io.safetensors"), "--tolerance", "inf", "--repeats", str(arguments.repeats), "--json"]
    command += ["--device", "cpu" if arguments.tiny else "cuda", "--weights", weights]
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    return json.loads(finished.stdout) if finished.returncode == 0 else {}


def eight_bits(arguments: argparse.Namespace, component: str, line: dict) -> None:
    """Adds what the component gives with weights in eight bits."""
    line["weights"] = {}
    for weights in WEIGHTS:
        found = ours(arguments, component, weights)
        if not found:
            line["pass"] = False
            continue
        error = max(output["error"] for output in found["outputs"])
        ratio = error / line["torch_bf16_error"]
        line["weights"][weights] = {
            "error": error,
            "ratio": ratio,
            "ms": found["median_ms"],
            "samples_ms": found["samples_ms"],
            "peak_bytes": found["peak_bytes"],
        }
        if weights == "int8" and COMPONENTS[component] == "dit":
            line["pass"] = line["pass"] and ratio <= LARGEST_RATIO_OF_INT8


def row(component: str, torch: dict, found: dict) -> dict:
    """One line of the record. PyTorch's error and time are those of its better way of attention."""
    runs = torch["torch_bf16"].values()
    error = min(max(output["error"] for output in run["outputs"].values()) for run in runs)
    fastest = min(torch["torch_bf16"].items(), key=lambda item: item[1]["median_ms"])
    line = {
        "component": component,
        "inputs": torch["inputs"],
        "parameters": torch["parameters"],
        "torch_bf16_error": error,
        "torch_attention": fastest[0],
        "torch_ms": fastest[1]["median_ms"],
        "torch_samples_ms": fastest[1]["samples_ms"],
        "torch_peak_bytes": fastest[1].get("peak_bytes"),
        "ours_error": None,
        "ratio": None,
        "pass": False,
    }
    if found:
        worst = max(output["error"] for output in found["outputs"])
        line |= {
            "ours_error": worst,
            "ratio": worst / error,
            "pass": worst <= LARGEST_RATIO * error,
            "ours_ms": found["median_ms"],
            "ours_samples_ms": found["samples_ms"],
            "ours_peak_bytes": found["peak_bytes"],
        }
    return line


def environment(arguments: argparse.Namespace) -> dict:
    """GPU, driver, commit and date."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu, driver = ("cpu", "none")
    if not arguments.tiny:
        gpu, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    commit = arguments.commit or os.environ.get("L2P_COMMIT")
    if not commit:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = head.stdout.strip() or "unknown"
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"gpu": gpu, "driver": driver, "commit": commit, "date": date}


def folder_of(gpu: str) -> str:
    """A GPU's name as a folder, as bench/src/environment.rs has it: the word with a digit in it, `h200` for `NVIDIA H200`."""
    words = re.findall(r"[a-z0-9]+", gpu.lower())
    return next((word for word in words if re.search(r"\d", word)), "-".join(words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=Path, required=True, help="folder with bench-parity")
    parser.add_argument("--fixtures", type=Path, default=next(filter(Path.is_dir, FIXTURES), None), help="folder with full_size.py")
    parser.add_argument("--work", type=Path, required=True, help="folder for weights and references (14 GB)")
    parser.add_argument("--out", type=Path, help="the record [default: bench/results/GPU/parity.json]")
    parser.add_argument("--component", choices=COMPONENTS, action="append", help="repeatable; all by default")
    parser.add_argument("--keep", choices=COMPONENTS, action="append", default=[], help="leave its files; repeatable")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--commit", help="the commit of the programs, where this is no checkout")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU, to try this script")
    arguments = parser.parse_args()

    where = environment(arguments)
    out = arguments.out or Path("bench/results") / folder_of(where["gpu"]) / "parity.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for component in arguments.component or COMPONENTS:
        start = time.perf_counter()
        torch = reference(arguments, component)
        made = time.perf_counter()
        rows.append(row(component, torch, ours(arguments, component)))
        if COMPONENTS[component] in WITH_WEIGHTS:
            eight_bits(arguments, component, rows[-1])
        if component not in arguments.keep:
            shutil.rmtree(arguments.work / component)
        print(f"{component}: reference {made - start:.1f} s, ours {time.perf_counter() - made:.1f} s", flush=True)
        out.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")
    print(f"{'component':<18}{'ours':>11}{'PyTorch':>11}{'ratio':>7}{'ours ms':>10}{'PyTorch ms':>12}{'ours GB':>9}{'PyTorch GB':>12}")
    for line in rows:
        if line["ours_error"] is None:
            print(f"{line['component']:<18}     failed")
            continue
        memory = (line["torch_peak_bytes"] or 0) / 1e9
        print(
            f"{line['component']:<18}{line['ours_error']:>11.2e}{line['torch_bf16_error']:>11.2e}{line['ratio']:>7.2f}"
            f"{line['ours_ms']:>10.2f}{line['torch_ms']:>12.2f}{line['ours_peak_bytes'] / 1e9:>9.2f}{memory:>12.2f}"
        )
        for weights, found in line.get("weights", {}).items():
            print(
                f"  {weights:<16}{found['error']:>11.2e}{'':>11}{found['ratio']:>7.2f}{found['ms']:>10.2f}{'':>12}"
                f"{found['peak_bytes'] / 1e9:>9.2f}"
            )
    sys.exit(0 if all(line["pass"] for line in rows) else 1)


if __name__ == "__main__":
    main()
