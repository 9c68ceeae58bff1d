"""Put the vLLM plugin into an artifact, so that vLLM finds it with nothing installed.

``PYTHONPATH=<folder> vllm serve <folder>`` is enough: Python takes a ``.dist-info`` folder on its path for an installed package,
and vLLM asks those for entry points of the group ``vllm.general_plugins`` in each of its processes.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from compile_sparse.compiler.files.digests import digest_file
from compile_sparse.compiler.version import TOOL_VERSION

__all__ = ["PLUGIN_FOLDER", "PLUGIN_PACKAGE", "copy_plugin"]

PLUGIN_FOLDER = "vllm_plugin"
"""Where the copy lies in a model's folder."""
PLUGIN_PACKAGE = "compile_sparse_vllm"
"""Name of the plugin's copy; not that of the installed package, which the copy must not shadow."""


def copy_plugin(out: Path) -> dict[str, str]:
    """Write the plugin and its entry point into ``out``; sha256 by relative file name.

    The copy holds no bytecode and nothing that depends on the machine: the same version gives the same bytes.
    """
    contents = {
        f"{PLUGIN_PACKAGE}/{source.name}": source.read_text(encoding="utf-8")
        for source in files("compile_sparse.backends.vllm").joinpath("plugin").iterdir()
        if source.name.endswith(".py")
    }
    info = f"{PLUGIN_PACKAGE}-{TOOL_VERSION}.dist-info"
    contents[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {PLUGIN_PACKAGE}\nVersion: {TOOL_VERSION}\nSummary: vLLM plugin of compile-sparse\n"
    )
    contents[f"{info}/entry_points.txt"] = f"[vllm.general_plugins]\ncompile-sparse = {PLUGIN_PACKAGE}:register\n"
    for name, text in contents.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    return {name: digest_file(out / name)[0] for name in sorted(contents)}
