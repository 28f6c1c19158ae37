"""Scores the example requests of an export, with PyTorch and NumPy only: python example.py"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch._inductor import aoti_load_package


def main() -> None:
    """Check the files, score the requests in example.npz, and compare the scores with those in it."""
    folder = Path(__file__).parent
    manifest = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    for name, expected in manifest["files"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected["sha256"]:
            sys.exit(f"{name}: damaged; copy the export again")
    model = aoti_load_package(str(folder / "model.pt2"))
    example = np.load(folder / "example.npz")
    inputs = [torch.from_numpy(example[f"input_{place}"]) for place in range(len(manifest["inputs"]))]
    for place, (one, scores) in enumerate(zip(manifest["outputs"], model(*inputs), strict=True)):
        difference = np.abs(scores.numpy() - example[f"output_{place}"]).max()
        print(f"{one['name']} {list(scores.shape)}: {difference:.1e} from the example")
        if not difference <= 1e-4:
            sys.exit("the scores differ")


if __name__ == "__main__":
    main()
