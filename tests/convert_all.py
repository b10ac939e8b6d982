"""Runs llama.cpp's converter on several models in one process:

    python convert_all.py plain|fast SCRIPT MODEL OUT [MODEL OUT ...]

`plain`: as it is; `fast`: with gguf-py replaced in part by athena_gguf.model.converter, which must have been possible.
"""

import logging
import runpy
import sys
from pathlib import Path


def main(how: str, script: str, *models: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    sys.path[0] = str(Path(script).parent)
    stored = []
    if how == "fast":
        from athena_gguf.model import converter, lazy_tensors

        tree = Path(script).parent / "gguf-py"
        converter.hasten(tree)
        import gguf

        assert Path(gguf.__file__).is_relative_to(tree)
        replaced = (gguf.quants._apply_over_grouped_rows, gguf.GGUFWriter.write_tensors_to_file)
        assert all(function.__module__.startswith("athena_gguf.") for function in replaced)
        as_stored = lazy_tensors._as_stored
        lazy_tensors._as_stored = lambda *given: stored.append(as_stored(*given)) or stored[-1]
    for model, out in zip(models[::2], models[1::2], strict=True):
        sys.argv = [script, model, "--outtype", "bf16", "--outfile", out]
        runpy.run_path(script, run_name="__main__")
    assert how == "plain" or {array is None for array in stored} == {True, False}


if __name__ == "__main__":
    main(*sys.argv[1:])
