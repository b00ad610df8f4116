"""The passes of fxcompress, one pass or one small family a file.

Import this package as `fxcompress.passes`.
"""

if __name__ != "fxcompress.passes":
    raise ImportError("import this package as fxcompress.passes: a second copy would hold a second set of classes")
