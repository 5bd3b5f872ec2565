"""Ways to hand an answer to its check, which the tests of grading share."""

# An answer `f` in other words: what stands before the call of the check, and what is given to it.
SPELLINGS = {
    "its name": ("", "f"),
    "another name": ("g = f", "g"),
    "a lambda in the call": ("", "lambda *args, **kwargs: f(*args, **kwargs)"),
    "a partial": ("import functools", "functools.partial(f)"),
    "an attribute": ("class A:\n    f = staticmethod(f)", "A.f"),
    "an object": ("class A:\n    def __call__(self, *args, **kwargs):\n        return f(*args, **kwargs)", "A()"),
    "a bound method": ("class A:\n    def f(self, *args, **kwargs):\n        return f(*args, **kwargs)", "A().f"),
    "a table": ("table = {'f': f}", "table['f']"),
    "a table that is read": ("table = {'f': [f]}", "lambda *args, **kwargs: table['f'][0](*args, **kwargs)"),
    "annotated": ("g: object = f", "g"),
    "chained": ("g = h = f", "g"),
    "a tuple": ("g, h = f, 1", "g"),
    "a condition": ("", "f if f else None"),
    "a walrus": ("(g := f)", "g"),
    "within if": ("if True:\n    g = f", "g"),
    "within try": ("try:\n    g = f\nexcept Exception:\n    pass", "g"),
    "within with": ("import contextlib\nwith contextlib.nullcontext():\n    g = f", "g"),
    "a default": ("def g(*args, f=f, **kwargs):\n    return f(*args, **kwargs)\ndel f", "g"),
    "an enclosed one": ("def make(f):\n    return lambda *args, **kwargs: f(*args, **kwargs)", "make(f)"),
    "a decorator": (
        "def instead(other):\n    def g(*args, **kwargs):\n        return f(*args, **kwargs)\n    return g\n"
        "@instead\ndef h():\n    return None",
        "h",
    ),
    "a factory with a loop": ("def make():\n    for _ in range(2):\n        g = f\n    return g", "make()"),
}  # fmt: skip
