"""Triton's interpreter patches `triton.language` in every function that a kernel calls, again and again: half its time.

Here it does so once in a launch for each module of the language that the launch's functions see. What is patched, with
what, and that it is undone after the launch stay the interpreter's.
"""

from __future__ import annotations


def patch_once_a_launch() -> None:
    """Where the interpreter is built otherwise it stays as it is, which costs time only."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    except (ImportError, AttributeError):
        return
    seen_by: dict = {}
    patched: set[int] = set()

    def modules_of(function) -> set[int]:
        if function not in seen_by:
            seen_by[function] = {
                id(value) for value in function.__globals__.values() if value is tl or value is tl.core
            }
        return seen_by[function]

    def patch_what_is_not(function):
        modules = modules_of(function)
        if modules and modules <= patched:
            return interpreter._LangPatchScope()
        patched.update(modules)
        return patch(function)

    def restore_and_forget(scope) -> None:
        # Called at the end of a launch, and of nothing within it.
        patched.clear()
        restore(scope)

    interpreter._patch_lang = patch_what_is_not
    interpreter._LangPatchScope.restore = restore_and_forget
