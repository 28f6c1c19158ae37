"""Scores the example requests of an export, with onnxruntime and NumPy only: python example.py"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main() -> None:
    """Check the files, score the requests in example.npz, and compare the scores with those in it."""
    folder = Path(__file__).parent
    manifest = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    for name, expected in manifest["files"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected["sha256"]:
            sys.exit(f"{name}: damaged; copy the export again")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    example = np.load(folder / "example.npz")
    inputs = {one["name"]: example[f"input_{place}"] for place, one in enumerate(manifest["inputs"])}
    names = [one["name"] for one in manifest["outputs"]]
    for place, (name, scores) in enumerate(zip(names, session.run(names, inputs), strict=True)):
        difference = np.abs(scores - example[f"output_{place}"]).max()
        print(f"{name} {list(scores.shape)}: {difference:.1e} from the example")
        if not difference <= 1e-4:
            sys.exit("the scores differ")


if __name__ == "__main__":
    main()
