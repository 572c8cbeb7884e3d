import functools
import os
import types

import pytest


@pytest.fixture(scope="module")
def few_rows():
    """`device.few_rows` for a whole file."""
    from tests.kernels import device  # here, since the tests that start processes of their own need none of it

    with device.few_rows():
        yield


@pytest.fixture(scope="session", autouse=os.environ.get("TRITON_INTERPRET") == "1")
def nothing_in_vain():
    """Triton's interpreter without half of its time. It works out for each operation whether it overflows, for an
    assertion that is off; replaces the functions of Triton's language at each call anew; and makes a table of all
    dtypes to look up one."""
    import triton.language as tl
    from triton.runtime import interpreter

    assert not interpreter.interpreter_builder.options.debug
    any_of, scalar = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)
    replaced = interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    with pytest.MonkeyPatch.context() as patch:
        options = interpreter.InterpreterOptions(sanitize_overflow=False)
        patch.setattr(interpreter.interpreter_builder, "options", options)
        patch.setattr(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
        patch.setattr(interpreter, "_get_np_dtype", lambda of: (scalar if type(of) is tl.dtype else any_of)(of))
        yield
    replaced.restore()
