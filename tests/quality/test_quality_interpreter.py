"""The evaluator of answers: Python's own results on what it allows, and a refusal of all else."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.interpreter import ProgramError, run_function

PROGRAMS = sorted({item.completion for item in itertools.islice(TASKS["code"].generate(1), 400)})
VALUES = {
    "xs": st.lists(st.integers(-60, 60), max_size=12),
    "words": st.lists(st.text("abcdeglstwAB", min_size=1, max_size=9), max_size=8),
    "text": st.text("abcdefgXYZ .,", max_size=20),
    "n": st.integers(-20, 200),
}


@settings(max_examples=300)
@given(st.data())
def test_programs_give_what_python_gives(data):
    source = data.draw(st.sampled_from(PROGRAMS))
    parameter = source[len("def f(") : source.index(")")]
    value = data.draw(VALUES[parameter])
    namespace: dict[str, object] = {}
    exec(source, namespace)  # the references are ours
    expected = namespace["f"](list(value) if isinstance(value, list) else value)  # type: ignore[operator]
    assert repr(run_function(source, "f", [value])) == repr(expected)


@pytest.mark.parametrize(
    "body",
    [
        "for a, b in zip([1, 2], [3, 4]):\n        if a == 2:\n            break\n        c = a * b\n    return c",
        "n = 0\n    while n < 9:\n        n += 1\n        if n % 2: continue\n        if n > 6: break\n    return n",
        "return [i * w for i, w in enumerate(['a', 'bc']) if w]",
        "return sorted(['bb', 'a', 'ccc'], key=lambda w: (-len(w), w))",
        "return max([3, 1], default=0) if 1 < 2 <= 2 else min([])",
        "xs = [1, 2, 3]\n    xs[0] = 7\n    xs.append(len(xs))\n    return xs[1:], not xs, -xs[0] ** 2",
        "return len({x % 3 for x in range(10)}) or None",
        "return ' '.join(w.capitalize() for w in 'ab cd'.split()).replace('C', 'x'), 7 // -2, 7 % -2, 1 / 4",
    ],
)
def test_the_rest_of_the_language(body):
    source = f"def f():\n    {body}"
    namespace: dict[str, object] = {}
    exec(source, namespace)
    assert repr(run_function(source, "f", [])) == repr(namespace["f"]())  # type: ignore[operator]


@pytest.mark.parametrize(
    "body",
    [
        "import os",
        "return open('/etc/passwd').read()",
        "return ().__class__.__bases__",
        "return getattr(1, 'real')",
        "return 'a'.__len__()",
        "return '{0.__class__}'.format(1)",
        "return f'{1}'",
        "return '%99999999d' % 3",
        "return eval('1')",
        "return f()",
        "return (lambda: 1)()",
        "return 10 ** 10 ** 10",
        "return 'a' * 10 ** 9",
        "return [0] * 10 ** 9",
        "return list(range(10 ** 9))",
        "return sum(range(10 ** 12))",
        "x = 2\n    while True:\n        x = x * x",
        "while True:\n        pass",
        "x = [1]\n    for i in range(60):\n        x = x + x\n    return x",
        "x = []\n    for i in range(10):\n        x.append(x)\n    return str([x, x]) * 10 ** 6",
        "return [a for a in range(999) for b in range(999) for c in range(999)]",
        "return 'aaaa'.replace('a', 'a' * 1500)",
        "return [1][5]",
        "return 1 // 0",
        "return undefined",
        "return max",
        "global x",
        "yield 1",
        "def g():\n        pass",
        "class A: pass",
        "try:\n        pass\n    except: pass",
        "break",
        "return " + "(" * 300 + "1" + ")" * 300,
        "return " + "-" * 5000 + "1",
    ],
)
def test_everything_else_is_refused_quickly(body):
    with pytest.raises(ProgramError):
        run_function(f"def f():\n    {body}", "f", [])


@pytest.mark.parametrize(
    "source",
    ["", "def g():\n    return 1", "def f(x):\n    return x", "def f(*a):\n    return 1", "def f(:"],
)
def test_a_function_that_cannot_be_called_is_refused(source):
    with pytest.raises(ProgramError):
        run_function(source, "f", [])
