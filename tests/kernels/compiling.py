"""A kernel compiled from another text or for another processor, which the tests of kernels share."""

import subprocess
from pathlib import Path

import torch


def compiled(text: str, folder: Path, namespace: str, *flags: str):
    """Its operators, under another name."""
    source, library = folder / f"{namespace}.cpp", folder / f"{namespace}.so"
    source.write_text(text.replace("(minicpm_lite,", f"({namespace},"))
    torch_folder = Path(torch.__file__).parent
    command = ["c++", "-std=c++20", "-fPIC", "-shared", "-Wno-psabi", *flags, f"-I{torch_folder / 'include'}", str(source),
               "-o", str(library), f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    torch.ops.load_library(library)
    return getattr(torch.ops, namespace)


def of_one_width(text: str) -> str:
    """With vectors of 32 alone, which do for all, so that it compiles in a quarter of the time."""
    for fewer in (4, 8, 16):
        text = text.replace(f"<Lanes<{fewer}>>", "<Lanes<32>>")
    return text
