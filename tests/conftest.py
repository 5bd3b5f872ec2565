"""Every tensor function of the model and the data is checked against its annotated shapes while the tests run."""

from jaxtyping import install_import_hook

install_import_hook(["minicpm_lite.language", "minicpm_lite.data"], "beartype.beartype")
